-- KEYS s
-- Returns the session's fields. A script, because no replica answers one.
return redis.call('HGETALL', KEYS[1])
