-- What the scripts share; it stands before each of them. The keys of a session are
-- in one slot:
--
--   s     hash: id user lib app version node conn created live seq; node and conn are
--         '' while the session is connected nowhere
--   was   zset: connections that were replaced or given up, by time
--   in    hash: messages from the client, 'P' deadline ' ' owner while one is processed,
--         'D' owner ' ' and then '-' or '+' outcome when it is done
--   out   hash: messages to the client, 'M' or, for a request, 'R', and the payload
--   tries hash: how often each was tried
--   pend, sent, dead
--         zsets of their ids by sequence: to be fetched; tried over this connection;
--         dead letters
--   gone  zset: ids that were delivered, by time
--   req   hash: correlations of requests
--   taken hash: those that were taken, and by whom
--   rm    string: who removed the session
--
-- What is only remembered so that a script may be run twice lives for a minute, a good
-- deal longer than go-redis repeats a command.
local memory = 60000

local function now()
	local t = redis.call('TIME')
	return tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
end

local function text(n) return string.format('%.0f', n) end

local function remember(key, member)
	local at = now()
	redis.call('ZREMRANGEBYSCORE', key, '-inf', text(at - memory))
	redis.call('ZADD', key, text(at), member)
	redis.call('PEXPIRE', key, memory)
end

-- at_home returns why conn may not touch the session s, or nil.
local function at_home(s, conn)
	local is = redis.call('HMGET', s, 'user', 'conn')
	if not is[1] then return 'GONE' end
	if is[2] ~= conn then return 'MOVED' end
end
