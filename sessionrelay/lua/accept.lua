-- KEYS s in; ARGV conn id owner patience
-- Claims a message from the client. Returns ACCEPTED, BUSY, DONE and the outcome if
-- there is one, GONE or MOVED. Run twice: the owner has it.
local no = at_home(KEYS[1], ARGV[1])
if no == 'GONE' or no and ARGV[1] ~= '' then return { no } end
local is = redis.call('HGET', KEYS[2], ARGV[2])
if is and string.sub(is, 1, 1) == 'D' then
	local colon = string.find(is, ':', 2, true)
	local at = colon + tonumber(string.sub(is, 2, colon - 1)) + 1
	if string.sub(is, at, at) == '+' then return { 'DONE', string.sub(is, at + 1) } end
	return { 'DONE' }
end
if is then
	local deadline, owner = string.match(is, '^P(%d+) (.*)$')
	if owner ~= ARGV[3] and tonumber(deadline) > now() then return { 'BUSY' } end
end
redis.call('HSET', KEYS[2], ARGV[2], 'P' .. text(now() + tonumber(ARGV[4])) .. ' ' .. ARGV[3])
return { 'ACCEPTED' }
