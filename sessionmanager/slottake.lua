-- Takes slots of a limited number, each a lease.
--
-- KEYS[1] the slots: a sorted set of holders, by when each lease is over, in
--         milliseconds of this server's clock
-- ARGV[1] the life of a lease in milliseconds
-- ARGV[2] how many slots there are; 0: as many as it takes
-- ARGV[3…] the holders, never used before by anybody else
--
-- Returns the holders that got none. Run twice: the second run finds the holders
-- and renews their leases. The set lives as long as its longest lease.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local life, limit = tonumber(ARGV[1]), tonumber(ARGV[2])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', now))
local taken, refused = redis.call('ZCARD', KEYS[1]), {}
for i = 3, #ARGV do
	local has = redis.call('ZSCORE', KEYS[1], ARGV[i])
	if has or limit == 0 or taken < limit then
		if not has then
			taken = taken + 1
		end
		redis.call('ZADD', KEYS[1], string.format('%.0f', now + life), ARGV[i])
	else
		refused[#refused + 1] = ARGV[i]
	end
end
if redis.call('PTTL', KEYS[1]) < life then
	redis.call('PEXPIRE', KEYS[1], ARGV[1])
end
return refused
