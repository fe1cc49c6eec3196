-- What the scripts share; it stands before each of them. The keys of a session are
-- in one slot:
--
--   s     hash: id user lib app version node conn created live seq; node and conn are
--         '' while the session is connected nowhere; node0 and conn0 were its home before
--   was   zset: connections that were replaced or given up, as pairs of node and conn,
--         by time
--   in    hash: messages from the client, 'P' deadline ' ' owner while one is processed,
--         'D' and, when it is done, the pair of owner and '-' or '+' outcome
--   out   hash: messages to the client, 'M' or, for a request, 'R', and the payload;
--         'm' or 'r' if that is nil
--   tries hash: how often each was tried
--   pend, sent, dead
--         zsets of their ids by sequence: to be fetched; tried over this connection;
--         dead letters
--   gone  zset: ids that were delivered, by time
--   req   hash: correlations of requests
--   taken hash: those that an answer has taken which is not complete, as pairs of the
--         answer's id and the correlation
--   rm    hash: the nonce of who removed the session, and whose it was
--
-- What is only remembered so that a script may be run twice lives for a minute, a good
-- deal longer than go-redis repeats a command.
local memory = 60000

local function now()
	local t = redis.call('TIME')
	return tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
end

local function text(n) return string.format('%.0f', n) end

-- remember notes members, a list that is not empty.
local function remember(key, members)
	local at, noted = now(), {}
	for i, member in ipairs(members) do
		noted[2 * i - 1], noted[2 * i] = text(at), member
	end
	redis.call('ZREMRANGEBYSCORE', key, '-inf', text(at - memory))
	redis.call('ZADD', key, unpack(noted))
	redis.call('PEXPIRE', key, memory)
end

local function remembered(key, member)
	local at = redis.call('ZSCORE', key, member)
	return at and tonumber(at) > now() - memory
end

-- pair is one string of two, of which no others are made.
local function pair(a, b) return #a .. ':' .. a .. b end

-- at_home returns why conn may not touch the session s, or nil.
local function at_home(s, conn)
	local is = redis.call('HMGET', s, 'user', 'conn')
	if not is[1] then return 'GONE' end
	if conn == '' or is[2] ~= conn then return 'MOVED' end
end

-- letters returns OK, and of each of ids itself, the message and its tries.
local function letters(out, tries, ids)
	local found = { 'OK' }
	for first = 1, #ids, 500 do -- as many as can be unpacked
		local last = math.min(first + 499, #ids)
		local messages = redis.call('HMGET', out, unpack(ids, first, last))
		local counts = redis.call('HMGET', tries, unpack(ids, first, last))
		for i = 1, last - first + 1 do
			found[#found + 1] = ids[first + i - 1]
			found[#found + 1] = messages[i]
			found[#found + 1] = counts[i] or '0'
		end
	end
	return found
end
