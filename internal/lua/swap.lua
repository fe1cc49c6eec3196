-- Compare-and-swap of one value, and a wake-up for whoever watches it.
--
-- KEYS[1] the value
-- ARGV[1] what must be stored now; '' means absent (values are never empty)
-- ARGV[2] what to store; never equal to any earlier value of the key
-- ARGV[3] its life in milliseconds
-- ARGV[4] the channel to publish on; '' wakes nobody
-- ARGV[5] the largest value read, in bytes: of a larger one only this many and
--         one more are compared and returned, so a hostile value never travels
--
-- Returns 1 when ARGV[2] is stored afterwards, otherwise the value that is.
-- Run twice: the second run finds ARGV[2] and returns 1.
local now = redis.call('GETRANGE', KEYS[1], 0, ARGV[5])
if now == ARGV[2] then
	return 1
end
if now ~= ARGV[1] then
	return now
end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
if ARGV[4] ~= '' then
	redis.call('PUBLISH', ARGV[4], '')
end
return 1
