-- KEYS s out tries dead
-- Returns OK, and of each dead letter id, message and tries; GONE.
if not redis.call('HGET', KEYS[1], 'user') then return { 'GONE' } end
return letters(KEYS[2], KEYS[3], redis.call('ZRANGE', KEYS[4], 0, -1))
