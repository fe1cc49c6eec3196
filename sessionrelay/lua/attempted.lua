-- KEYS s tries pend sent; ARGV conn ids…
-- Counts an attempt of each. Returns OK, GONE or MOVED. Run twice: what is sent already
-- is not counted again.
local bad = at_home(KEYS[1], ARGV[1])
if bad then return bad end
for i = 2, #ARGV do
	local seq = redis.call('ZSCORE', KEYS[3], ARGV[i])
	if seq then
		redis.call('ZADD', KEYS[4], seq, ARGV[i])
		redis.call('ZREM', KEYS[3], ARGV[i])
		redis.call('HINCRBY', KEYS[2], ARGV[i], 1)
	end
end
return 'OK'
