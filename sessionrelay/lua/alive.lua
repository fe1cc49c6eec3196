-- KEYS s
-- Vouches for the session. Returns its user, or nil when there is none.
local user = redis.call('HGET', KEYS[1], 'user')
if user then redis.call('HSET', KEYS[1], 'live', text(now())) end
return user
