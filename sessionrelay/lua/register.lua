-- KEYS s was pend sent; ARGV session user lib app version node conn channel
-- Makes conn the home. Returns OK created live node conn (the home before), WRONGUSER,
-- or MOVED for a conn that was replaced or given up. Run twice: the conn is the home
-- already, or has been replaced since.
local old = redis.call('HMGET', KEYS[1], 'user', 'node', 'conn', 'created', 'node0', 'conn0')
if old[1] and old[1] ~= ARGV[2] then return { 'WRONGUSER' } end
if remembered(KEYS[2], pair(ARGV[6], ARGV[7])) then return { 'MOVED' } end
local at = text(now())
local created, node0, conn0 = old[4] or at, old[2] or '', old[3] or ''
if node0 == ARGV[6] and conn0 == ARGV[7] then
	node0, conn0 = old[5], old[6]
else
	if conn0 ~= '' then remember(KEYS[2], { pair(node0, conn0) }) end
	if redis.call('EXISTS', KEYS[4]) == 1 then
		redis.call('ZUNIONSTORE', KEYS[3], 2, KEYS[3], KEYS[4], 'AGGREGATE', 'MAX')
		redis.call('DEL', KEYS[4])
	end
end
redis.call('HSET', KEYS[1], 'id', ARGV[1], 'user', ARGV[2], 'lib', ARGV[3], 'app', ARGV[4], 'version', ARGV[5],
	'node', ARGV[6], 'conn', ARGV[7], 'created', created, 'live', at, 'node0', node0, 'conn0', conn0)
redis.call('PUBLISH', ARGV[8], '')
return { 'OK', created, at, node0, conn0 }
