-- KEYS s and all others of the session, the last one rm; ARGV nonce channel idle
-- Removes the session; with an idle of 0 or more only if nobody vouched for it during
-- more than so many milliseconds. Returns REMOVED user node, LIVE since, or NONE. Run
-- twice: rm says whose removal it was.
local s, rm = KEYS[1], KEYS[#KEYS]
local is = redis.call('HMGET', s, 'user', 'node', 'live')
if not is[1] then
	local by = redis.call('HMGET', rm, 'nonce', 'user', 'node')
	if by[1] == ARGV[1] then return { 'REMOVED', by[2], by[3] } end
	return { 'NONE' }
end
local idle = tonumber(ARGV[3])
if idle >= 0 and tonumber(is[3]) >= now() - idle then return { 'LIVE', is[3] } end
redis.call('DEL', unpack(KEYS))
redis.call('HSET', rm, 'nonce', ARGV[1], 'user', is[1], 'node', is[2])
redis.call('PEXPIRE', rm, memory)
redis.call('PUBLISH', ARGV[2], '')
return { 'REMOVED', is[1], is[2] }
