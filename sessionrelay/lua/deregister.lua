-- KEYS s was; ARGV node conn
-- Leaves the session without a home if that is conn on node. conn will not register
-- any more, not even by a request that is still under way. Run twice: no effect.
remember(KEYS[2], { pair(ARGV[1], ARGV[2]) })
local is = redis.call('HMGET', KEYS[1], 'node', 'conn')
if is[1] == ARGV[1] and is[2] == ARGV[2] then redis.call('HSET', KEYS[1], 'node', '', 'conn', '') end
return 'OK'
