-- KEYS s out tries pend; ARGV conn most
-- Returns OK, and of the oldest messages to be fetched id, message and tries; GONE or
-- MOVED. Changes nothing.
local bad = at_home(KEYS[1], ARGV[1])
if bad then return { bad } end
local ids = {}
if tonumber(ARGV[2]) > 0 then ids = redis.call('ZRANGE', KEYS[4], 0, tonumber(ARGV[2]) - 1) end
return letters(KEYS[2], KEYS[3], ids)
