-- KEYS the user's places, a zset of sessions; ARGV session limit lease
-- Reserves a place for the lease at least, if the session has one or the limit allows
-- another. Returns 1 or 0. Run twice: it has one.
local at = now()
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', text(at))
if not redis.call('ZSCORE', KEYS[1], ARGV[1]) and redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[2]) then return 0 end
redis.call('ZADD', KEYS[1], 'GT', text(at + tonumber(ARGV[3])), ARGV[1])
return 1
