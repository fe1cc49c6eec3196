-- Makes a request the last one that registered for a session.
--
-- KEYS[1] the registration: epoch, a space, token
-- ARGV[1] the request's token, never used before
-- ARGV[2] the floor: the epoch is greater
-- ARGV[3] its life in milliseconds
-- ARGV[4] the channel to publish on; '' wakes nobody
--
-- Returns the epoch, in decimal: greater than every one before it, and never less
-- than the server's time in microseconds (package epoch). An error when that does
-- not fit a double. Run twice: the second run finds the token and returns its
-- epoch, unless another request has registered meanwhile; then it registers anew,
-- and the first run was a request that nobody made.
local last = 0
local now = redis.call('GET', KEYS[1])
if now then
	local epoch, token = string.match(now, '^(%d+) (.*)$')
	if token == ARGV[1] then
		redis.call('PEXPIRE', KEYS[1], ARGV[3])
		return epoch
	end
	last = tonumber(epoch or 0) or 0
	if last >= 9007199254740991 then -- none of ours
		last = 0
	end
end
local time = redis.call('TIME')
local next = math.max(last + 1, tonumber(ARGV[2]) + 1, tonumber(time[1]) * 1000000 + tonumber(time[2]))
if next > 9007199254740991 then
	return redis.error_reply('ERR the registration has an impossible epoch')
end
local epoch = string.format('%.0f', next)
redis.call('SET', KEYS[1], epoch .. ' ' .. ARGV[1], 'PX', ARGV[3])
if ARGV[4] ~= '' then
	redis.call('PUBLISH', ARGV[4], '')
end
return epoch
