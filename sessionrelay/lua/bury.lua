-- KEYS s pend sent dead; ARGV conn ids…
-- Takes messages out of the order. Returns OK, GONE or MOVED. Run twice: they are dead.
local bad = at_home(KEYS[1], ARGV[1])
if bad then return bad end
for i = 2, #ARGV do
	for k = 2, 3 do
		local seq = redis.call('ZSCORE', KEYS[k], ARGV[i])
		if seq then
			redis.call('ZADD', KEYS[4], seq, ARGV[i])
			redis.call('ZREM', KEYS[k], ARGV[i])
		end
	end
end
return 'OK'
