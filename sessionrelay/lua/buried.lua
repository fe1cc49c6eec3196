-- KEYS s out tries dead
-- Returns OK, and of each dead letter id, message and tries; GONE.
if not redis.call('HGET', KEYS[1], 'user') then return { 'GONE' } end
local found = { 'OK' }
for _, id in ipairs(redis.call('ZRANGE', KEYS[4], 0, -1)) do
	found[#found + 1] = id
	found[#found + 1] = redis.call('HGET', KEYS[2], id)
	found[#found + 1] = redis.call('HGET', KEYS[3], id) or '0'
end
return found
