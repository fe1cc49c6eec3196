-- KEYS in; ARGV id owner
-- Gives up what owner has accepted. Run twice: no effect.
local is = redis.call('HGET', KEYS[1], ARGV[1]) or ''
if string.match(is, '^P%d+ (.*)$') == ARGV[2] then redis.call('HDEL', KEYS[1], ARGV[1]) end
return 'OK'
