-- KEYS s in; ARGV id owner patience
-- Claims a message from the client. Returns ACCEPTED, BUSY, DONE and the outcome if
-- there is one, or GONE. Run twice: the owner has it.
if not redis.call('HGET', KEYS[1], 'user') then return { 'GONE' } end
local is = redis.call('HGET', KEYS[2], ARGV[1])
if is and string.sub(is, 1, 1) == 'D' then
	local colon = string.find(is, ':', 2, true)
	local at = colon + tonumber(string.sub(is, 2, colon - 1)) + 1
	if string.sub(is, at, at) == '+' then return { 'DONE', string.sub(is, at + 1) } end
	return { 'DONE' }
end
if is then
	local deadline, owner = string.match(is, '^P(%d+) (.*)$')
	if owner ~= ARGV[2] and tonumber(deadline) > now() then return { 'BUSY' } end
end
redis.call('HSET', KEYS[2], ARGV[1], 'P' .. text(now() + tonumber(ARGV[3])) .. ' ' .. ARGV[2])
return { 'ACCEPTED' }
