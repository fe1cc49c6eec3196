-- Gives a lock whose life is missing or absurd the life it should have had.
-- A lock set by hand has none; one set before the server's clock was put back
-- lives for as long as the step.
--
-- KEYS[1] the lock
-- ARGV[1] the life it should have, in milliseconds
--
-- Returns 1 when it was healed, otherwise 0. Run twice: the second run finds
-- nothing to heal. Twice the life is the threshold, so that a fleet whose
-- members differ by less can roll out a new setting.
local left = redis.call('PTTL', KEYS[1])
if left == -1 or left > 2 * tonumber(ARGV[1]) then
	return redis.call('PEXPIRE', KEYS[1], ARGV[1])
end
return 0
