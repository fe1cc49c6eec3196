-- KEYS req taken; ARGV id taker
-- Takes a correlation. Returns it, or nil. Run twice: taken says by whom.
local it = redis.call('HGET', KEYS[1], ARGV[1])
if it then
	redis.call('HDEL', KEYS[1], ARGV[1])
	redis.call('HSET', KEYS[2], ARGV[1], ARGV[2] .. ' ' .. it)
	redis.call('PEXPIRE', KEYS[2], memory)
	return it
end
it = redis.call('HGET', KEYS[2], ARGV[1])
if it and string.sub(it, 1, #ARGV[2] + 1) == ARGV[2] .. ' ' then return string.sub(it, #ARGV[2] + 2) end
return nil
