package sessionguard_test

import (
	"bytes"
	"context"
	"io"
	"net"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/internal/redistest"
	"github.com/sessionlock/sessionlock/sessionguard"
)

// awkward are sessions that are easily taken for each other, for a pattern, or for
// more than one part of a name.
var awkward = []string{
	"s", "S", "s ", " s", "s\x00", "\x00s", "s:t", "s:", ":s", "s:g", "s:d:n", "sl:{s}:g", "*", "s*", "?", "[s]", "[^t]", "s\\", "\\s", "{s}", "{s}t", "s}t{", "}{", "{}", "}",
	"\xff", "\xff\xfe", "é", "e\u0301", "😀", "\u202es", "s\r\n", "s\n", "../s", "s/", "%s", "'; DROP", strings.Repeat("s", 1024), strings.Repeat("s", 1023),
}

func TestAwkwardSessionsNeverMeet(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		a, b := newMonitor(t, rdb), newMonitor(t, rdb)
		contexts, guards := make([]context.Context, len(awkward)), make([]*sessionguard.Guard, len(awkward))
		names := map[string]bool{}
		for i, session := range awkward {
			contexts[i], guards[i] = register(t, a, session)
			names[guards[i].Key("n")] = true
			names[nameOf(a, session)] = true
		}
		assert.Len(t, names, 2*len(awkward))
		for i, ctx := range contexts {
			require.NoError(t, ctx.Err())
			require.NoError(t, guards[i].Check(ctx))
		}
		for i, session := range awkward { // each is interrupted by its own only
			_, newer := register(t, b, session)
			supersededBy(t, cause(t, contexts[i]), guards[i], newer)
			if i+1 < len(awkward) {
				goesOn(t, contexts[i+1], guards[i+1])
			}
		}
	})
}

var registrationName = regexp.MustCompile(`^sl:\{[A-Za-z0-9_-]{24}\}:g$`)

// Whatever the session, the names in Redis have one form.
func TestNamesInRedisHaveOneForm(t *testing.T) {
	s := redistest.Start(t)
	rdb := s.Client()
	m := newMonitor(t, rdb)
	for _, session := range awkward {
		_, g, err := m.Register(t.Context(), session)
		require.NoError(t, err)
		g.End()
		assert.Regexp(t, `^[A-Za-z0-9_-]{24}$`, m.KeyID(session))
		assert.Equal(t, "sl:{"+m.KeyID(session)+"}:d:any name", g.Key("any name"))
	}
	keys := rdb.Keys(t.Context(), "*").Val()
	assert.Len(t, keys, len(awkward))
	for _, key := range keys {
		assert.Regexp(t, registrationName, key)
		assert.LessOrEqual(t, len(key), 64)
		assert.Regexp(t, `^[0-9]{16} [A-Z0-9]{26}$`, rdb.Get(t.Context(), key).Val())
		assert.Positive(t, rdb.PTTL(t.Context(), key).Val())
	}
}

// Nothing that is sent contains the session's id.
func TestSessionIDIsNotSentToRedis(t *testing.T) {
	s := redistest.Start(t)
	monitor, err := new(net.Dialer).DialContext(t.Context(), "tcp", s.Addr()) // by hand: that of go-redis races with itself
	require.NoError(t, err)
	defer monitor.Close()
	require.NoError(t, monitor.SetDeadline(time.Now().Add(soon)))
	_, err = monitor.Write([]byte("MONITOR\r\n"))
	require.NoError(t, err)
	seen := make([]byte, len("+OK\r\n"))
	_, err = io.ReadFull(monitor, seen)
	require.NoError(t, err)
	m := newMonitor(t, s.Client())
	const id = "patient-4711"
	ctx, g := register(t, m, id)
	subscribed(t, s, 1)
	require.NoError(t, g.Check(ctx))
	_, err = g.Eval(ctx, set, []string{g.Key("k")}, 1)
	require.NoError(t, err)
	register(t, m, id)
	require.NoError(t, s.Client().Echo(t.Context(), "the end").Err())
	for !bytes.Contains(seen, []byte("the end")) {
		more := make([]byte, 1<<16)
		n, err := monitor.Read(more)
		require.NoError(t, err)
		seen = append(seen, more[:n]...)
	}
	assert.Contains(t, string(seen), m.KeyID(id))
	assert.Contains(t, strings.ToLower(string(seen)), "subscribe")
	assert.NotContains(t, string(seen), id)
}

func TestNamespacesAndSecretsKeepNamesApart(t *testing.T) {
	store := new(sessionguard.MemoryStore)
	ids := map[string]string{}
	for name, opts := range map[string][]sessionguard.Option{
		"plain":            nil,
		"namespace":        {sessionguard.WithNamespace("a")},
		"other namespace":  {sessionguard.WithNamespace("ab")},
		"secret":           {sessionguard.WithKeySecret([]byte("0123456789abcdef"))},
		"other secret":     {sessionguard.WithKeySecret([]byte("0123456789abcdeg"))},
		"both":             {sessionguard.WithNamespace("a"), sessionguard.WithKeySecret([]byte("0123456789abcdef"))},
		"namespace of ids": {sessionguard.WithNamespace("sessionguard")},
	} {
		m := on(t, store, opts...)
		for _, session := range []string{"s", "bs", "abs"} {
			id := m.KeyID(session)
			if before, ok := ids[id]; ok {
				assert.Fail(t, "met", "%s/%s and %s", name, session, before)
			}
			ids[id] = name + "/" + session
		}
		assert.Equal(t, m.KeyID("s"), on(t, store, opts...).KeyID("s"), "the same in the whole fleet")
	}
	assert.Len(t, ids, 21)
}

// Keys of a guard share the slot of its registration.
func TestKeysOfASessionShareASlot(t *testing.T) {
	m := on(t, new(sessionguard.MemoryStore))
	_, g := register(t, m, "s")
	tag := "{" + m.KeyID("s") + "}"
	seen := map[string]bool{nameOf(m, "s"): true}
	for _, name := range append([]string{"", "a", "b", "{x}", "g"}, awkward...) {
		key := g.Key(name)
		open, end := strings.Index(key, "{"), strings.Index(key, "}")
		assert.Equal(t, tag, key[open:end+1], name)
		seen[key] = true
	}
	assert.Len(t, seen, 6+len(awkward))
}
