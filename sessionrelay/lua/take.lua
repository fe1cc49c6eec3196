-- KEYS req taken took; ARGV id taker
-- Takes a correlation. Returns it, or nil. Run twice: taken says by whom.
local it = redis.call('HGET', KEYS[1], ARGV[1])
if it then
	for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', text(now() - memory))) do
		redis.call('HDEL', KEYS[2], id)
	end
	redis.call('HDEL', KEYS[1], ARGV[1])
	redis.call('HSET', KEYS[2], ARGV[1], pair(ARGV[2], it))
	redis.call('PEXPIRE', KEYS[2], memory)
	remember(KEYS[3], { ARGV[1] })
	return it
end
it = redis.call('HGET', KEYS[2], ARGV[1])
local by = pair(ARGV[2], '')
if it and string.sub(it, 1, #by) == by then return string.sub(it, #by + 1) end
return nil
