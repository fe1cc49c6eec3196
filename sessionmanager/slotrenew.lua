-- Renews leases that are not over.
--
-- KEYS[1] the slots, as in slottake.lua
-- ARGV[1] the life of a lease in milliseconds
-- ARGV[2] not used
-- ARGV[3…] the holders
--
-- Returns the holders that have none any more. Run twice: the second run renews
-- once more. Run late, after a release: it gives nothing back to who is gone.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local life, lost = tonumber(ARGV[1]), {}
for i = 3, #ARGV do
	local over = redis.call('ZSCORE', KEYS[1], ARGV[i])
	if over and tonumber(over) > now then
		redis.call('ZADD', KEYS[1], 'XX', string.format('%.0f', now + life), ARGV[i])
	else
		lost[#lost + 1] = ARGV[i]
	end
end
if redis.call('PTTL', KEYS[1]) < life then
	redis.call('PEXPIRE', KEYS[1], ARGV[1])
end
return lost
