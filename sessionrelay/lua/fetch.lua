-- KEYS s out tries pend; ARGV conn most
-- Returns OK, and of the oldest messages to be fetched id, message and tries; GONE or
-- MOVED. Changes nothing.
local bad = at_home(KEYS[1], ARGV[1])
if bad then return { bad } end
local ids = redis.call('ZRANGE', KEYS[4], 0, tonumber(ARGV[2]) - 1)
local found = { 'OK' }
for _, id in ipairs(ids) do
	found[#found + 1] = id
	found[#found + 1] = redis.call('HGET', KEYS[2], id)
	found[#found + 1] = redis.call('HGET', KEYS[3], id) or '0'
end
return found
