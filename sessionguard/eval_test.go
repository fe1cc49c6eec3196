package sessionguard_test

import (
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/internal/redistest"
	"github.com/sessionlock/sessionlock/sessionguard"
)

func TestEvalHandsOverKeysAndArguments(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		m := newMonitor(t, rdb)
		ctx, g := register(t, m, "s")
		all := sessionguard.NewScript(`return {#KEYS, #ARGV, KEYS[1] or 'none', KEYS[2] or 'none', ARGV[1] or 'none', ARGV[2] or 'none', unpack(ARGV)}`)
		eval := func(keys []string, args ...any) []any {
			t.Helper()
			v, err := g.Eval(ctx, all, keys, args...)
			require.NoError(t, err)
			return v.([]any)
		}
		assert.Equal(t, []any{int64(0), int64(0), "none", "none", "none", "none"}, eval(nil))
		a, b := g.Key("a"), g.Key("b")
		assert.Equal(t, []any{int64(2), int64(0), a, b, "none", "none"}, eval([]string{a, b}))
		assert.Equal(t,
			[]any{int64(1), int64(5), a, "none", "1", "two", "1", "two", "3.5", "1", "\x00\xff"},
			eval([]string{a}, 1, "two", 3.5, true, []byte("\x00\xff")))
		keys, args := []string{a, b}, []any{"x", "y"}
		eval(keys, args...)
		assert.Equal(t, []string{a, b}, keys, "the caller's stay as they are")
		assert.Equal(t, []any{"x", "y"}, args)
		many := make([]any, 2000)
		for i := range many {
			many[i] = i
		}
		assert.Equal(t, int64(2000), eval(nil, many...)[1])
	})
}

func TestEvalReturnsWhatTheScriptDoes(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		m := newMonitor(t, rdb)
		ctx, g := register(t, m, "s")
		for src, want := range map[string]any{
			"return 7":                          int64(7),
			"return 'text'":                     "text",
			"return {1, 'two', {3}}":            []any{int64(1), "two", []any{int64(3)}},
			"return nil":                        nil,
			"return false":                      nil,
			"":                                  nil,
			"return redis.call('GET', KEYS[1])": nil,
			"return true":                       int64(1),
			"return {ok='FINE'}":                "FINE",
			"-- a comment\nreturn 1":            int64(1),
			"local now = 5\nlocal KEY = 1\nreturn now": int64(5),
		} {
			v, err := g.Eval(ctx, sessionguard.NewScript(src), []string{g.Key("missing")})
			require.NoError(t, err, src)
			assert.Equal(t, want, v, src)
		}
		goesOn(t, ctx, g)
	})
}

func TestErrorOfTheScript(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		m := newMonitor(t, rdb)
		ctx, g := register(t, m, "s")
		for src, want := range map[string]string{
			"return redis.error_reply('MINE of the script')": "MINE of the script",
			"return {err='MINE of a table'}":                 "MINE of a table",
			"error('boom')":                                  "boom",
			"return redis.call('NOSUCHCOMMAND')":             "command",
			"return redis.call('LPUSH', KEYS[1])":            "wrong number of arg",
			"this is no Lua":                                 "compiling script",
		} {
			v, err := g.Eval(ctx, sessionguard.NewScript(src), []string{g.Key("k")})
			assert.Nil(t, v, src)
			var said redis.Error
			require.ErrorAs(t, err, &said, src)
			assert.NotErrorIs(t, err, sessionguard.ErrUnavailable, src)
			assert.NotErrorIs(t, err, sessionguard.ErrSuperseded, src)
			assert.NotErrorIs(t, err, sessionguard.ErrLost, src)
			assert.ErrorContains(t, err, "run a script for session "+m.KeyID("s"), src)
			assert.Contains(t, strings.ToLower(err.Error()), strings.ToLower(want), src)
		}
		goesOn(t, ctx, g)
	})
}

func TestEvalOfASupersededRequestDoesNotRun(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		a, b := newMonitor(t, rdb), newMonitor(t, rdb)
		_, old := register(t, a, "s")
		ctx, g := register(t, b, "s")
		v, err := old.Eval(t.Context(), set, []string{old.Key("k")}, "old")
		supersededBy(t, err, old, g)
		assert.Nil(t, v)
		assert.Zero(t, rdb.Exists(t.Context(), g.Key("k")).Val())
		v, err = g.Eval(ctx, set, []string{g.Key("k")}, "new")
		require.NoError(t, err)
		assert.Equal(t, "OK", v)

		require.NoError(t, rdb.Del(t.Context(), nameOf(b, "s")).Err())
		_, err = g.Eval(ctx, set, []string{g.Key("k")}, "lost")
		require.ErrorIs(t, err, sessionguard.ErrLost)
		assert.Equal(t, "new", rdb.Get(t.Context(), g.Key("k")).Val())
	})
}

// However registrations and scripts mix: what a request writes it writes before any
// newer one has registered.
func TestEvalIsAtomicAgainstNewerRegistrations(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		nodes := []*sessionguard.Monitor{newMonitor(t, rdb), newMonitor(t, rdb), newMonitor(t, rdb)}
		// The script itself looks who has registered last, and notes one that runs after a newer one has.
		script := sessionguard.NewScript(`
local epoch = string.match(redis.call('GET', KEYS[2]), '^%d+')
if epoch ~= ARGV[1] then redis.call('INCR', KEYS[1]) end
if tonumber(redis.call('GET', KEYS[3]) or 0) > tonumber(ARGV[1]) then redis.call('INCR', KEYS[1]) end
redis.call('SET', KEYS[3], ARGV[1])
return 1`)
		var ran, refused atomic.Int64
		var all sync.WaitGroup
		for i := range 6 {
			all.Go(func() {
				for range 60 {
					_, g, err := nodes[i%3].Register(t.Context(), "s")
					if !assert.NoError(t, err) {
						return
					}
					for range 3 {
						_, err = g.Eval(t.Context(), script, []string{g.Key("violations"), nameOf(nodes[0], "s"), g.Key("row")}, g.Epoch())
						if err == nil {
							ran.Add(1)
						} else if assert.ErrorIs(t, err, sessionguard.ErrSuperseded) {
							refused.Add(1)
						}
					}
					g.End()
				}
			})
		}
		all.Wait()
		_, g := register(t, nodes[0], "s")
		assert.Empty(t, rdb.Get(t.Context(), g.Key("violations")).Val())
		assert.Positive(t, ran.Load())
		assert.Positive(t, refused.Load())
	})
}

func TestScriptIsSafeForConcurrentUse(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		m := newMonitor(t, rdb)
		incr := sessionguard.NewScript(`return redis.call('INCR', KEYS[1])`)
		var all sync.WaitGroup
		for i := range 8 {
			all.Go(func() {
				_, g, err := m.Register(t.Context(), fmt.Sprint(i))
				if !assert.NoError(t, err) {
					return
				}
				defer g.End()
				for want := range 10 {
					v, err := g.Eval(t.Context(), incr, []string{g.Key("n")})
					assert.NoError(t, err)
					assert.EqualValues(t, want+1, v)
				}
			})
		}
		all.Wait()
	})
}

func TestEvalOfAForgottenScript(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		m := newMonitor(t, rdb)
		ctx, g := register(t, m, "s")
		for i := range 5 {
			require.NoError(t, rdb.ScriptFlush(t.Context()).Err())
			v, err := g.Eval(ctx, set, []string{g.Key("k")}, i)
			require.NoError(t, err)
			assert.Equal(t, "OK", v)
		}
	})
}

// What is needed of a Redis user beyond its connection. Scripts of Eval need the
// commands they call.
var (
	needed         = []string{"evalsha", "eval", "get", "set", "pexpire", "time", "publish", "getex", "subscribe", "unsubscribe", "ping"}
	neededOfEvents = []string{"evalsha", "eval", "get", "set", "pexpire", "time", "getex", "subscribe", "unsubscribe", "ping"}
)

// whole is what every kind of Redis must do.
func whole(t *testing.T, connect func() redis.UniversalClient, opts ...sessionguard.Option) {
	t.Helper()
	opts = append([]sessionguard.Option{sessionguard.WithTTL(24 * time.Hour)}, opts...)
	a, b := newMonitor(t, connect(), opts...), newMonitor(t, connect(), opts...)
	for i := range 10 { // on a Cluster, of several masters
		session := fmt.Sprint("session ", i)
		ctxA, ga := register(t, a, session)
		require.NoError(t, ga.Check(ctxA))
		move := sessionguard.NewScript(`redis.call('SET', KEYS[2], ARGV[1]) return redis.call('GET', KEYS[2])`)
		keys := []string{ga.Key("from"), ga.Key("to")}
		v, err := ga.Eval(ctxA, move, keys, i)
		require.NoError(t, err)
		assert.Equal(t, fmt.Sprint(i), v)
		ctxB, gb := register(t, b, session)
		supersededBy(t, cause(t, ctxA), ga, gb)
		_, err = ga.Eval(t.Context(), move, keys, "late")
		supersededBy(t, err, ga, gb)
		goesOn(t, ctxB, gb)
		v, err = gb.Eval(ctxB, move, keys, "new")
		require.NoError(t, err)
		assert.Equal(t, "new", v)
		gb.End()
	}
}

func TestGuardOnACluster(t *testing.T) {
	t.Parallel()
	c := redistest.StartCluster(t)
	granted := map[string]bool{}
	for i := 0; len(granted) < 3; i++ {
		owner := c.Owner(fmt.Sprint(i))
		if !granted[owner.Addr()] {
			owner.Grant(redistest.User, append(needed, redistest.InCluster...)...)
			granted[owner.Addr()] = true
		}
	}
	whole(t, func() redis.UniversalClient { return c.Client() })
	t.Run("keys of two sessions", func(t *testing.T) {
		m := newMonitor(t, c.Client())
		ctx, g := register(t, m, "one")
		_, other := register(t, m, "two")
		_, err := g.Eval(ctx, set, []string{other.Key("k")}, 1)
		assert.ErrorContains(t, err, "slot")
	})
}

func TestGuardOverTLS(t *testing.T) {
	s := redistest.StartTLS(t)
	whole(t, func() redis.UniversalClient { return s.Client() })
}

func TestGuardOfTheLeastUser(t *testing.T) {
	t.Parallel()
	s := redistest.StartACL(t)
	s.Grant(redistest.User, needed...)
	whole(t, func() redis.UniversalClient { return s.Client() })
	log, err := s.Admin().ACLLog(t.Context(), 100).Result()
	require.NoError(t, err)
	for _, l := range log {
		assert.Contains(t, l.Object, "client|", "nothing else was refused: %v", l)
	}
	for i, command := range needed { // and nothing of it can be left out
		if command == "ping" || command == "pexpire" { // for a connection that is silent, and for a reply that was lost
			continue
		}
		t.Run("without "+command, func(t *testing.T) {
			s := redistest.StartACL(t)
			s.Grant(redistest.User, append(append([]string{}, needed[:i]...), needed[i+1:]...)...)
			missed := func() bool {
				m, err := sessionguard.New(s.Client(), sessionguard.WithTTL(time.Second), sessionguard.WithOpTimeout(300*time.Millisecond))
				require.NoError(t, err)
				ctx, g, err := m.Register(t.Context(), "s")
				if err == nil {
					_, _ = g.Eval(ctx, set, []string{g.Key("k")}, 1)
					_ = g.Check(ctx)
					time.Sleep(50 * time.Millisecond) // it subscribes
				}
				g.End()
				time.Sleep(50 * time.Millisecond) // and unsubscribes
				require.NoError(t, m.Close(t.Context()))
				log, err := s.Admin().ACLLog(t.Context(), 100).Result()
				require.NoError(t, err)
				for _, l := range log {
					if strings.EqualFold(l.Object, command) {
						return true
					}
				}
				return false
			}
			assert.Eventually(t, missed, soon, 10*time.Millisecond)
		})
	}
}

// Where a user may not publish, keyspace events do.
func TestGuardByKeyspaceEventsOfAUserWhoMayNotPublish(t *testing.T) {
	s := redistest.StartACL(t)
	s.Grant(redistest.User, neededOfEvents...)
	admin := s.Admin()
	require.NoError(t, admin.Do(t.Context(), "ACL", "SETUSER", redistest.User, "resetchannels", "&__keyspace@0__:sl:*").Err())
	require.NoError(t, admin.ConfigSet(t.Context(), "notify-keyspace-events", "K$").Err())
	whole(t, func() redis.UniversalClient { return s.Client() }, sessionguard.WithKeyspaceEvents())
}
