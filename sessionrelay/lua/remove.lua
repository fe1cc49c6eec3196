-- KEYS s and all others of the session, the last one rm; ARGV nonce channel idle
-- Removes the session; with an idle of 0 or more only if nobody vouched for it during
-- more than so many milliseconds. Returns REMOVED user node conn, LIVE age, or NONE.
-- Run twice: rm says whose removal it was, though there may be such a session again.
local s, rm = KEYS[1], KEYS[#KEYS]
local by = redis.call('HMGET', rm, 'nonce', 'user', 'node', 'conn')
if by[1] == ARGV[1] then return { 'REMOVED', by[2], by[3], by[4] } end
local is = redis.call('HMGET', s, 'user', 'node', 'conn', 'live')
if not is[1] then return { 'NONE' } end
local idle, age = tonumber(ARGV[3]), now() - tonumber(is[4])
if idle >= 0 and age <= idle then return { 'LIVE', age } end
redis.call('DEL', unpack(KEYS))
redis.call('HSET', rm, 'nonce', ARGV[1], 'user', is[1], 'node', is[2], 'conn', is[3])
redis.call('PEXPIRE', rm, memory)
redis.call('PUBLISH', ARGV[2], '')
return { 'REMOVED', is[1], is[2], is[3] }
