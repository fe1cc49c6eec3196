-- KEYS s tries pend dead; ARGV channel ids…
-- Puts dead letters back where they were in the order. Returns OK or GONE. Run twice:
-- they are back, and what was tried since is not touched.
if not redis.call('HGET', KEYS[1], 'user') then return 'GONE' end
for i = 2, #ARGV do
	local seq = redis.call('ZSCORE', KEYS[4], ARGV[i])
	if seq then
		redis.call('ZADD', KEYS[3], seq, ARGV[i])
		redis.call('ZREM', KEYS[4], ARGV[i])
		redis.call('HDEL', KEYS[2], ARGV[i])
	end
end
redis.call('PUBLISH', ARGV[1], '')
return 'OK'
