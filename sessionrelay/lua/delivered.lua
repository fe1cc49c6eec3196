-- KEYS out tries pend sent dead gone; ARGV ids…
-- Removes messages. Run twice: they are gone.
local found = {}
for _, id in ipairs(ARGV) do
	if redis.call('HDEL', KEYS[1], id) == 1 then found[#found + 1] = id end
end
if #found == 0 then return 'OK' end
redis.call('HDEL', KEYS[2], unpack(found))
local left = #found - redis.call('ZREM', KEYS[4], unpack(found))
for _, key in ipairs({ KEYS[3], KEYS[5] }) do
	if left > 0 then left = left - redis.call('ZREM', key, unpack(found)) end
end
remember(KEYS[6], found)
return 'OK'
