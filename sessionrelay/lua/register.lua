-- KEYS s was pend sent; ARGV session user lib app version node conn channel
-- Makes conn the home. Returns OK created live node conn (the home before), WRONGUSER,
-- or MOVED for a conn that was replaced or given up. Run twice: the conn is the home
-- already, or has been replaced since.
local old = redis.call('HMGET', KEYS[1], 'user', 'node', 'conn', 'created')
if old[1] and old[1] ~= ARGV[2] then return { 'WRONGUSER' } end
if redis.call('ZSCORE', KEYS[2], ARGV[7]) then return { 'MOVED' } end
local at = text(now())
local created = old[4] or at
if old[3] ~= ARGV[7] then
	if old[3] and old[3] ~= '' then remember(KEYS[2], old[3]) end
	redis.call('ZUNIONSTORE', KEYS[3], 2, KEYS[3], KEYS[4], 'AGGREGATE', 'MAX')
	redis.call('DEL', KEYS[4])
end
redis.call('HSET', KEYS[1], 'id', ARGV[1], 'user', ARGV[2], 'lib', ARGV[3], 'app', ARGV[4], 'version', ARGV[5],
	'node', ARGV[6], 'conn', ARGV[7], 'created', created, 'live', at)
redis.call('PUBLISH', ARGV[8], '')
return { 'OK', created, at, old[2] or '', old[3] or '' }
