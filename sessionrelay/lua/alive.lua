-- KEYS s
-- Vouches for the session. Returns its user and its home, or nil when there is none.
local is = redis.call('HMGET', KEYS[1], 'user', 'node', 'conn')
if not is[1] then return nil end
redis.call('HSET', KEYS[1], 'live', text(now()))
return is
