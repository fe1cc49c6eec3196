-- KEYS s in taken; ARGV id owner outcome: '-', or '+' and the bytes; requests that it
-- answers
-- Stores the outcome of what owner has accepted. Returns OK, TAKEN or GONE. Run twice:
-- it is stored.
if not redis.call('HGET', KEYS[1], 'user') then return 'GONE' end
local is = redis.call('HGET', KEYS[2], ARGV[1]) or ''
local done = 'D' .. pair(ARGV[2], '')
if string.sub(is, 1, #done) == done then return 'OK' end
if string.match(is, '^P%d+ (.*)$') ~= ARGV[2] then return 'TAKEN' end
redis.call('HSET', KEYS[2], ARGV[1], done .. ARGV[3])
for i = 4, #ARGV do redis.call('HDEL', KEYS[3], ARGV[i]) end
return 'OK'
