-- KEYS s out pend gone req; ARGV id message channel, and a correlation if there is one
-- Adds a message. Returns OK node conn, or GONE. Run twice: the id is there, or has
-- been delivered.
local is = redis.call('HMGET', KEYS[1], 'user', 'node', 'conn')
if not is[1] then return { 'GONE' } end
if not remembered(KEYS[4], ARGV[1]) and redis.call('HSETNX', KEYS[2], ARGV[1], ARGV[2]) == 1 then
	redis.call('ZADD', KEYS[3], redis.call('HINCRBY', KEYS[1], 'seq', 1), ARGV[1])
	if ARGV[4] then redis.call('HSET', KEYS[5], ARGV[1], ARGV[4]) end
	if is[3] ~= '' then redis.call('PUBLISH', ARGV[3], '') end
end
return { 'OK', is[2], is[3] }
