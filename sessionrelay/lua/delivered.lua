-- KEYS out tries pend sent dead gone; ARGV ids…
-- Removes messages. Run twice: they are gone.
for i = 1, #ARGV do
	if redis.call('HDEL', KEYS[1], ARGV[i]) == 1 then remember(KEYS[6], ARGV[i]) end
end
redis.call('HDEL', KEYS[2], unpack(ARGV))
for k = 3, 5 do redis.call('ZREM', KEYS[k], unpack(ARGV)) end
return 'OK'
