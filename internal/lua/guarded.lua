-- Lets the script that follows run only for the request that registered last. The
-- script's own keys and arguments come after those named here.
--
-- KEYS[1] the registration
-- ARGV[1] what it must be
--
-- Otherwise returns the error SESSIONGUARD_SUPERSEDED and what the registration is. Run twice:
-- the script that follows runs twice.
do
	local now = redis.call('GET', KEYS[1])
	if now ~= ARGV[1] then
		return redis.error_reply('SESSIONGUARD_SUPERSEDED ' .. (now or ''))
	end
	table.remove(KEYS, 1)
	table.remove(ARGV, 1)
end
