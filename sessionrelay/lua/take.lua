-- KEYS req taken; ARGV id answer
-- Takes a correlation for an answer, which has it until it is complete. Returns it, or
-- nil. Run twice: taken says by which.
local it = redis.call('HGET', KEYS[1], ARGV[1])
if it then
	redis.call('HSET', KEYS[2], ARGV[1], pair(ARGV[2], it))
	redis.call('HDEL', KEYS[1], ARGV[1])
	return it
end
it = redis.call('HGET', KEYS[2], ARGV[1])
local by = pair(ARGV[2], '')
if it and string.sub(it, 1, #by) == by then return string.sub(it, #by + 1) end
return nil
