-- KEYS the user's places, a zset of sessions; ARGV session limit lease
-- Reserves a place for the lease, unless the session has one. Returns 1, or 0 at the
-- limit. Run twice: it has one.
if redis.call('ZSCORE', KEYS[1], ARGV[1]) then return 1 end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', text(now()))
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[2]) then return 0 end
redis.call('ZADD', KEYS[1], text(now() + tonumber(ARGV[3])), ARGV[1])
return 1
