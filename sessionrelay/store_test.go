package sessionrelay_test

import (
	"context"
	"crypto/sha1"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/internal/redistest"
	"github.com/sessionlock/sessionlock/sessionrelay"
	"github.com/sessionlock/sessionlock/sessionrelay/relaytest"
)

// stores returns a func that makes stores of nodes on rdb, which end with the test.
func stores(t testing.TB, rdb redis.UniversalClient, opts ...sessionrelay.RedisOption) func(node string) sessionrelay.Store {
	return func(node string) sessionrelay.Store {
		s, err := sessionrelay.NewRedisStore(rdb, node, opts...)
		require.NoError(t, err)
		t.Cleanup(s.(interface{ Close() }).Close)
		return s
	}
}

func memory(testing.TB) func(node string) sessionrelay.Store { return new(sessionrelay.Memory).Store }

// bubbled are stores on a miniredis in a bubble.
func bubbled(t testing.TB) func(node string) sessionrelay.Store {
	_, client := redistest.Bubble(t)
	return stores(t, client())
}

// everywhere runs f on each kind of store.
func everywhere(t *testing.T, f func(t *testing.T, open func(node string) sessionrelay.Store)) {
	t.Run("memory", func(t *testing.T) { f(t, memory(t)) })
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) { f(t, stores(t, rdb)) })
}

// timed runs f where time is fake and exact, on each kind of store that can.
func timed(t *testing.T, f func(t *testing.T, open func(node string) sessionrelay.Store)) {
	t.Run("memory", func(t *testing.T) { synctest.Test(t, func(t *testing.T) { f(t, memory(t)) }) })
	t.Run("miniredis", func(t *testing.T) { synctest.Test(t, func(t *testing.T) { f(t, bubbled(t)) }) })
}

const plenty = 1000

// at connects a session of bob's.
func at(t testing.TB, s sessionrelay.Store, session, conn string) sessionrelay.Info {
	t.Helper()
	i, _, err := s.Register(t.Context(), sessionrelay.Hello{Session: session, User: "bob"}, conn, plenty)
	require.NoError(t, err)
	return i
}

func exists(t testing.TB, s sessionrelay.Store, session string) bool {
	t.Helper()
	_, err := s.Lookup(t.Context(), session)
	if !errors.Is(err, sessionrelay.ErrGone) {
		require.NoError(t, err)
	}
	return err == nil
}

func puts(t testing.TB, s sessionrelay.Store, session string, ids ...string) {
	t.Helper()
	for _, id := range ids {
		_, err := s.Put(t.Context(), session, sessionrelay.Message{ID: id}, nil)
		require.NoError(t, err)
	}
}

// ids are those of what there is to be fetched.
func ids(t testing.TB, s sessionrelay.Store, session, conn string) []string {
	t.Helper()
	messages, err := s.Fetch(t.Context(), session, conn, plenty)
	require.NoError(t, err)
	all := []string{}
	for _, m := range messages {
		all = append(all, m.ID)
	}
	return all
}

func listed(t testing.TB, s sessionrelay.Store, f sessionrelay.Filter) []string {
	t.Helper()
	all := []string{}
	require.NoError(t, s.List(t.Context(), f, func(i sessionrelay.Info) bool { all = append(all, i.Session); return true }))
	slices.Sort(all)
	return all
}

func homed(t testing.TB, s sessionrelay.Store) []string {
	t.Helper()
	infos, err := s.Homed(t.Context())
	require.NoError(t, err)
	all := []string{}
	for _, i := range infos {
		all = append(all, i.Session)
	}
	slices.Sort(all)
	return all
}

func TestMemoryKeepsTheContract(t *testing.T) {
	suite := relaytest.StoreTest{New: func(t *testing.T) func(string) sessionrelay.Store { return memory(t) }, Tick: 50 * time.Millisecond}
	t.Run("real time", suite.Run)
	suite.In = synctest.Test
	t.Run("bubble", suite.Run)
}

func TestRedisKeepsTheContract(t *testing.T) {
	t.Run("miniredis", relaytest.StoreTest{
		New: func(t *testing.T) func(string) sessionrelay.Store { return bubbled(t) },
		In:  synctest.Test,
	}.Run)
	server := redistest.Start(t)
	var way *redistest.Proxy
	t.Run("redis", relaytest.StoreTest{
		New: func(t *testing.T) func(string) sessionrelay.Store {
			way = redistest.NewProxy(t, server.Addr())
			return stores(t, server.Client(func(o *redis.Options) { o.Addr, o.MaxRetries = way.Addr(), -1 }))
		},
		Tick:   50 * time.Millisecond,
		Outage: func(*testing.T, sessionrelay.Store) { way.Cut() },
	}.Run)
}

func TestClusterKeepsTheContract(t *testing.T) {
	relaytest.StoreTest{
		New: func() func(t *testing.T) func(string) sessionrelay.Store {
			cluster := clusterClient(t)
			return func(t *testing.T) func(string) sessionrelay.Store { return stores(t, cluster) }
		}(),
		Tick: 50 * time.Millisecond,
	}.Run(t)
}

// clusterClient returns a client of a new cluster who may do everything.
func clusterClient(t *testing.T) *redis.ClusterClient {
	t.Helper()
	o := redistest.StartCluster(t).Client().Options()
	rdb := redis.NewClusterClient(&redis.ClusterOptions{Addrs: o.Addrs})
	t.Cleanup(func() { _ = rdb.Close() })
	return rdb
}

// twice is a hook that has each command executed two times, as go-redis does when the
// first reply is lost, and remembers which scripts were.
type twice struct {
	mu      sync.Mutex
	scripts map[string]bool
}

func (*twice) DialHook(next redis.DialHook) redis.DialHook { return next }

func (h *twice) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		_ = next(ctx, cmd)
		cmd.SetErr(nil)
		err := next(ctx, cmd)
		if err == nil || errors.Is(err, redis.Nil) {
			h.note(cmd)
		}
		return err
	}
}

func (h *twice) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		_ = next(ctx, cmds)
		for _, cmd := range cmds {
			cmd.SetErr(nil)
		}
		return next(ctx, cmds)
	}
}

func (h *twice) note(cmd redis.Cmder) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if name := cmd.Name(); name == "evalsha" {
		h.scripts[cmd.Args()[1].(string)] = true
	}
}

func TestCommandsThatAreExecutedTwiceHaveOneEffect(t *testing.T) {
	server := redistest.Start(t)
	hook := &twice{scripts: map[string]bool{}}
	relaytest.StoreTest{
		New: func(t *testing.T) func(string) sessionrelay.Store {
			rdb := server.Client()
			rdb.AddHook(hook)
			return stores(t, rdb)
		},
		Tick: 50 * time.Millisecond,
	}.Run(t)
	for name, sha := range scripts(t) {
		assert.True(t, hook.scripts[sha], "%s was not run twice", name)
	}
}

// scripts returns the hashes by which Redis knows the files of lua/.
func scripts(t *testing.T) map[string]string {
	t.Helper()
	files, err := filepath.Glob("lua/*.lua")
	require.NoError(t, err)
	common, err := os.ReadFile("lua/common.lua")
	require.NoError(t, err)
	all := map[string]string{}
	for _, file := range files {
		if filepath.Base(file) == "common.lua" {
			continue
		}
		source, err := os.ReadFile(file)
		require.NoError(t, err)
		sum := sha1.Sum(append(slices.Clone(common), source...))
		all[file] = hex.EncodeToString(sum[:])
	}
	require.NotEmpty(t, all)
	return all
}

func TestIdleIsExactToTheMillisecond(t *testing.T) {
	timed(t, func(t *testing.T, open func(string) sessionrelay.Store) {
		a, b := open("a"), open("b")
		at(t, a, "s", "c1")
		time.Sleep(time.Minute)
		expired, err := b.Expire(t.Context(), time.Minute)
		require.NoError(t, err)
		assert.Empty(t, expired, "idle for exactly as long as allowed")
		time.Sleep(time.Millisecond)
		for _, want := range [][]string{{"s"}, nil} {
			expired, err = b.Expire(t.Context(), time.Minute)
			require.NoError(t, err)
			assert.Equal(t, want, expired)
		}
	})
}

func TestWithoutIdleTimeAllSessionsTimeOut(t *testing.T) {
	timed(t, func(t *testing.T, open func(string) sessionrelay.Store) {
		a := open("a")
		at(t, a, "s", "c1")
		time.Sleep(time.Millisecond)
		expired, err := a.Expire(t.Context(), 0)
		require.NoError(t, err)
		assert.Equal(t, []string{"s"}, expired)
	})
}

func TestClaimEndsWithItsPatience(t *testing.T) {
	timed(t, func(t *testing.T, open func(string) sessionrelay.Store) {
		a := open("a")
		at(t, a, "s", "c1")
		accepts := func(owner string) sessionrelay.State {
			c, err := a.Accept(t.Context(), "s", "", "i", owner, time.Second)
			require.NoError(t, err)
			return c.State
		}
		assert.Equal(t, sessionrelay.Accepted, accepts("first"))
		time.Sleep(time.Second - time.Millisecond)
		assert.Equal(t, sessionrelay.InProgress, accepts("second"))
		time.Sleep(time.Millisecond)
		assert.Equal(t, sessionrelay.Accepted, accepts("second"))
	})
}

func TestDeliveredIDIsRefusedForAMinute(t *testing.T) {
	timed(t, func(t *testing.T, open func(string) sessionrelay.Store) {
		a := open("a")
		at(t, a, "s", "c1")
		puts(t, a, "s", "m", "n")
		require.NoError(t, a.Delivered(t.Context(), "s", "m"))
		time.Sleep(time.Minute - time.Millisecond)
		require.NoError(t, a.Delivered(t.Context(), "s", "n")) // does not prolong the other
		puts(t, a, "s", "m", "n")
		assert.Empty(t, ids(t, a, "s", "c1"))
		time.Sleep(time.Millisecond)
		puts(t, a, "s", "m", "n")
		assert.Equal(t, []string{"m"}, ids(t, a, "s", "c1"))
	})
}

func TestConnectionThatWasGivenUpIsRefusedForAMinute(t *testing.T) {
	timed(t, func(t *testing.T, open func(string) sessionrelay.Store) {
		a := open("a")
		require.NoError(t, a.Deregister(t.Context(), "s", "c1"))
		register := func() error {
			_, _, err := a.Register(t.Context(), sessionrelay.Hello{Session: "s", User: "bob"}, "c1", 1)
			return err
		}
		time.Sleep(time.Minute - time.Millisecond)
		require.ErrorIs(t, register(), sessionrelay.ErrMoved)
		time.Sleep(time.Millisecond)
		require.NoError(t, register())
	})
}

func TestRegisterNeedsNames(t *testing.T) {
	everywhere(t, func(t *testing.T, open func(string) sessionrelay.Store) {
		a := open("a")
		for what, tt := range map[string]struct{ session, user, conn string }{
			"session": {"", "bob", "c"}, "user": {"s", "", "c"}, "connection": {"s", "bob", ""},
		} {
			_, _, err := a.Register(t.Context(), sessionrelay.Hello{Session: tt.session, User: tt.user}, tt.conn, 1)
			require.ErrorIs(t, err, sessionrelay.ErrInvalid)
			assert.ErrorContains(t, err, "no "+what)
		}
		assert.Empty(t, listed(t, a, sessionrelay.Filter{}))
	})
}

func TestSessionThatTimesOutIsNotAlive(t *testing.T) {
	everywhere(t, func(t *testing.T, open func(string) sessionrelay.Store) {
		a, b := open("a"), open("b")
		for round := range 10 {
			var all []string
			for i := range 20 {
				all = append(all, fmt.Sprint("s", round, " ", i))
				at(t, a, all[i], "c")
			}
			time.Sleep(30 * time.Millisecond)
			var expired, unknown []string
			var expireErr, aliveErr error
			var both sync.WaitGroup
			both.Go(func() { expired, expireErr = b.Expire(t.Context(), 20*time.Millisecond) })
			both.Go(func() { unknown, aliveErr = a.Alive(t.Context(), all) })
			both.Wait()
			require.NoError(t, errors.Join(expireErr, aliveErr))
			for _, s := range unknown {
				assert.Contains(t, expired, s, "unknown to Alive")
			}
			for _, s := range expired {
				assert.False(t, exists(t, b, s), "timed out, and exists")
			}
			for _, s := range all {
				_, err := a.Remove(t.Context(), s)
				require.NoError(t, err)
			}
		}
	})
}

func TestReviveWakesTheHome(t *testing.T) {
	everywhere(t, func(t *testing.T, open func(string) sessionrelay.Store) {
		a, b := open("a"), open("b")
		at(t, a, "s", "c1")
		puts(t, b, "s", "m")
		require.NoError(t, a.Bury(t.Context(), "s", "c1", "m"))
		woken := make(chan struct{}, 1)
		stop := a.(interface {
			Watch(string, func()) func()
		}).Watch("s", func() {
			select {
			case woken <- struct{}{}:
			default:
			}
		})
		defer stop()
		hears := func() bool {
			require.NoError(t, b.Revive(t.Context(), "s", "m"))
			select {
			case <-woken:
				return true
			case <-time.After(20 * time.Millisecond):
				return false
			}
		}
		require.Eventually(t, hears, 10*time.Second, time.Millisecond)
		assert.Eventually(t, hears, 10*time.Second, time.Millisecond, "in force by now, so this is no greeting")
	})
}

func TestWatchersOfOneMemoryHearAllItsNodes(t *testing.T) {
	var m sessionrelay.Memory
	a, b := m.Store("a"), m.Store("b")
	at(t, a, "s", "c1")
	heard := 0
	stop := m.Watch("s", func() { heard++ })
	other := m.Watch("s", func() { heard += 100 })
	puts(t, b, "s", "m")
	assert.Equal(t, 101, heard)
	puts(t, b, "s", "m")
	assert.Equal(t, 101, heard, "nothing was put")
	other()
	other()
	at(t, b, "s", "c2")
	assert.Equal(t, 102, heard)
	_, err := a.Remove(t.Context(), "s")
	require.NoError(t, err)
	assert.Equal(t, 103, heard)
	_, err = a.Remove(t.Context(), "s")
	require.NoError(t, err)
	assert.Equal(t, 103, heard, "nothing was removed")
	stop()
	at(t, b, "s", "c3")
	assert.Equal(t, 103, heard)
}

// dump is all that Redis holds, except what only a clock changes.
func dump(t testing.TB, rdb *redis.Client) map[string]string {
	t.Helper()
	ctx, all := t.Context(), map[string]string{}
	for _, key := range keys(t, rdb) {
		var v any
		switch kind := rdb.Type(ctx, key).Val(); kind {
		case "hash":
			v = rdb.HGetAll(ctx, key).Val()
		case "zset":
			v = rdb.ZRangeWithScores(ctx, key, 0, -1).Val()
		case "set":
			members := rdb.SMembers(ctx, key).Val()
			slices.Sort(members)
			v = members
		default:
			require.Fail(t, "unexpected type", "%s", kind)
		}
		all[key] = fmt.Sprint(v)
	}
	return all
}

func keys(t testing.TB, rdb *redis.Client) []string {
	t.Helper()
	all, err := rdb.Keys(t.Context(), "*").Result()
	require.NoError(t, err)
	slices.Sort(all)
	return all
}

// keyOf returns the key of a kind, of which there is one.
func keyOf(t testing.TB, rdb *redis.Client, name string) string {
	t.Helper()
	of := slices.DeleteFunc(keys(t, rdb), func(k string) bool { return kind(k) != name })
	require.Len(t, of, 1, name)
	return of[0]
}

// kind is the last part of a key's name.
func kind(key string) string { return key[strings.LastIndex(key, ":")+1:] }

// fill gives a session something of everything.
func fill(t testing.TB, s sessionrelay.Store, session, user string) {
	t.Helper()
	ctx := t.Context()
	for _, conn := range []string{"c1", "c2"} {
		_, _, err := s.Register(ctx, sessionrelay.Hello{Session: session, User: user}, conn, plenty)
		require.NoError(t, err)
	}
	puts(t, s, session, "new", "tried", "dead", "delivered")
	for _, id := range []string{"asked", "taken"} {
		_, err := s.Put(ctx, session, sessionrelay.Message{ID: id, Request: true}, []byte("about"))
		require.NoError(t, err)
	}
	_, ok, err := s.Take(ctx, session, "taken", "answer")
	require.NoError(t, err)
	require.True(t, ok)
	require.NoError(t, s.Attempted(ctx, session, "c2", "tried"))
	require.NoError(t, s.Bury(ctx, session, "c2", "dead"))
	require.NoError(t, s.Delivered(ctx, session, "delivered"))
	for _, id := range []string{"busy", "done"} {
		c, err := s.Accept(ctx, session, "", id, "owner", time.Hour)
		require.NoError(t, err)
		require.Equal(t, sessionrelay.Accepted, c.State)
	}
	require.NoError(t, s.Complete(ctx, session, "done", "owner", []byte("outcome")))
}

func TestRemovedSessionLeavesNoKeys(t *testing.T) {
	remove := map[string]func(ctx context.Context, s sessionrelay.Store) error{
		"remove": func(ctx context.Context, s sessionrelay.Store) error { _, err := s.Remove(ctx, "s"); return err },
		"expire": func(ctx context.Context, s sessionrelay.Store) error { _, err := s.Expire(ctx, 0); return err },
	}
	for name, remove := range remove {
		t.Run(name, func(t *testing.T) {
			redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
				a := stores(t, rdb)("a")
				fill(t, a, "s", "bob")
				var kinds []string
				for _, key := range keys(t, rdb) {
					kinds = append(kinds, kind(key))
				}
				slices.Sort(kinds)
				assert.Equal(t, strings.Fields("all dead gone in node out pend req s sent taken tries user was"), kinds)
				require.NoError(t, a.Deregister(t.Context(), "s", "c1")) // as its node would have
				time.Sleep(2 * time.Millisecond)
				require.NoError(t, remove(t.Context(), stores(t, rdb)("b")))
				left := keys(t, rdb)
				require.Len(t, left, 1, "what a repeated request is told")
				assert.Equal(t, "rm", kind(left[0]))
				assert.Positive(t, rdb.TTL(t.Context(), left[0]).Val())
			})
		})
	}
}

func TestWhatIsRememberedForRepeatsEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, client := redistest.Bubble(t)
		rdb := client()
		a := stores(t, rdb)("a")
		fill(t, a, "s", "bob")
		require.NoError(t, a.Deregister(t.Context(), "none", "c"))
		time.Sleep(time.Minute)
		for _, key := range m.Keys() {
			assert.NotContains(t, []string{"was", "gone"}, kind(key))
		}
		// A busy session forgets, too.
		for i := range 50 {
			id := fmt.Sprint("m", i)
			_, err := a.Put(t.Context(), "s", sessionrelay.Message{ID: id}, []byte("about"))
			require.NoError(t, err)
			_, ok, err := a.Take(t.Context(), "s", id, "answer")
			require.NoError(t, err)
			require.True(t, ok)
			_, err = a.Accept(t.Context(), "s", "", "answer", id, time.Minute)
			require.NoError(t, err)
			require.NoError(t, a.Complete(t.Context(), "s", "answer", id, nil, id))
			require.NoError(t, a.Forget(t.Context(), "s", "answer"))
			require.NoError(t, a.Delivered(t.Context(), "s", id))
			at(t, a, "s", fmt.Sprint("d", i))
			time.Sleep(10 * time.Second)
		}
		for _, key := range m.Keys() {
			switch kind(key) {
			case "was", "gone":
				members, err := m.ZMembers(key)
				require.NoError(t, err)
				assert.LessOrEqual(t, len(members), 6, kind(key))
			case "taken":
				fields, err := m.HKeys(key)
				require.NoError(t, err)
				assert.Equal(t, []string{"taken"}, fields, "that of fill, whose answer is not complete")
			}
		}
	})
}

func TestRefusalChangesNothing(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		a, b := stores(t, rdb)("a"), stores(t, rdb)("b")
		ctx := t.Context()
		for name, tt := range map[string]struct {
			hello sessionrelay.Hello
			conn  string
			want  error
		}{
			"another's session":           {sessionrelay.Hello{Session: "s", User: "eve"}, "e", sessionrelay.ErrWrongUser},
			"another's session, at a cap": {sessionrelay.Hello{Session: "s", User: "full"}, "e", sessionrelay.ErrWrongUser},
			"a session too many":          {sessionrelay.Hello{Session: "s9", User: "full"}, "e", sessionrelay.ErrCap},
		} {
			require.NoError(t, rdb.FlushAll(ctx).Err())
			fill(t, a, "s", "bob")
			_, _, err := a.Register(ctx, sessionrelay.Hello{Session: "t", User: "full"}, "c", 1)
			require.NoError(t, err)
			before := dump(t, rdb)
			_, _, err = b.Register(ctx, tt.hello, tt.conn, 1)
			require.ErrorIs(t, err, tt.want, name)
			assert.Equal(t, before, dump(t, rdb), name)
		}
	})
}

func TestKeyNamesTellNothing(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		session, user, node := "secret-session", "secret-user", "secret-node"
		fill(t, stores(t, rdb)(node), session, user)
		slots := map[string]bool{}
		for _, key := range keys(t, rdb) {
			assert.NotContains(t, key, "secret")
			assert.Regexp(t, `^sl:\{[\w-]{24}\}:r:\w+$`, key)
			if !slices.Contains([]string{"all", "user", "node"}, kind(key)) {
				slots[key[:strings.Index(key, "}")]] = true
			}
		}
		assert.Len(t, slots, 1, "of a session")

		for _, opt := range []sessionrelay.RedisOption{
			sessionrelay.WithNamespace("test"), sessionrelay.WithKeySecret([]byte("0123456789abcdef")),
		} {
			require.NoError(t, rdb.FlushAll(t.Context()).Err())
			fill(t, stores(t, rdb)(node), session, user)
			before := dump(t, rdb)
			other := stores(t, rdb, opt)(node)
			assert.False(t, exists(t, other, session))
			assert.Empty(t, listed(t, other, sessionrelay.Filter{}))
			fill(t, other, session, user)
			after := dump(t, rdb)
			assert.Len(t, after, 2*len(before))
			assert.Subset(t, after, before)
		}
	})
}

func TestScavengeClearsWhatACrashHasLeft(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		ctx := t.Context()
		a := stores(t, rdb)("a")
		at(t, a, "kept", "c1")
		before := dump(t, rdb)
		// Of sessions whose node died between the session and the indexes only those are left.
		for i := range 600 {
			_, _, err := a.Register(ctx, sessionrelay.Hello{Session: fmt.Sprint("s", i), User: fmt.Sprint("u", i%7)}, "c2", plenty)
			require.NoError(t, err)
		}
		for _, key := range keys(t, rdb) {
			if kind(key) == "s" && before[key] == "" {
				require.NoError(t, rdb.Del(ctx, key).Err())
			}
		}
		// So with one that another user was about to be refused.
		all := keyOf(t, rdb, "all")
		require.NoError(t, rdb.ZAdd(ctx, all, redis.Z{Score: 1, Member: "3:evekept"}, redis.Z{Score: 2, Member: "garbage"}).Err())
		assert.Equal(t, []string{"kept"}, listed(t, a, sessionrelay.Filter{}))
		assert.Empty(t, listed(t, a, sessionrelay.Filter{User: "u1"}))
		assert.Empty(t, listed(t, a, sessionrelay.Filter{User: "eve"}))

		removed, err := stores(t, rdb)("b").Scavenge(ctx)
		require.NoError(t, err)
		assert.Equal(t, 601, removed)
		assert.Equal(t, []string{"kept"}, homed(t, a))
		removed, err = a.Scavenge(ctx)
		require.NoError(t, err)
		assert.Zero(t, removed)
		require.NoError(t, rdb.ZRem(ctx, all, "garbage").Err())
		assert.Len(t, keys(t, rdb), len(before))
		assert.True(t, exists(t, a, "kept"))
	})
}

func TestExpireClearsWhatACrashHasLeft(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		ctx := t.Context()
		a := stores(t, rdb)("a")
		at(t, a, "s", "c1")
		for _, key := range keys(t, rdb) {
			switch kind(key) {
			case "s":
				require.NoError(t, rdb.Del(ctx, key).Err())
			case "all":
				require.NoError(t, rdb.ZAdd(ctx, key, redis.Z{Score: 1, Member: "garbage"}, redis.Z{Score: 1, Member: "9:too short"}).Err())
			}
		}
		time.Sleep(2 * time.Millisecond)
		expired, err := a.Expire(ctx, 0)
		require.NoError(t, err)
		assert.Empty(t, expired, "it was no session")
		assert.Empty(t, homed(t, a))
		assert.Empty(t, keys(t, rdb))
	})
}

func TestSignOfLifeRestoresIndexes(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		ctx := t.Context()
		a, b := stores(t, rdb)("a"), stores(t, rdb)("b")
		at(t, a, "s", "c1")
		at(t, b, "t", "c2")
		for _, key := range keys(t, rdb) {
			if kind(key) != "s" {
				require.NoError(t, rdb.Del(ctx, key).Err())
			}
		}
		assert.Empty(t, listed(t, a, sessionrelay.Filter{}))
		_, _, err := a.Register(ctx, sessionrelay.Hello{Session: "t", User: "eve"}, "c3", plenty)
		require.ErrorIs(t, err, sessionrelay.ErrWrongUser)
		_, err = a.Alive(ctx, []string{"s"})
		require.NoError(t, err)
		_, err = b.Alive(ctx, []string{"t"})
		require.NoError(t, err)
		assert.Equal(t, []string{"s", "t"}, listed(t, a, sessionrelay.Filter{}))
		assert.Equal(t, []string{"s", "t"}, listed(t, a, sessionrelay.Filter{User: "bob"}))
		assert.Equal(t, []string{"s"}, homed(t, a))
		assert.Equal(t, []string{"t"}, homed(t, b))
		_, _, err = a.Register(ctx, sessionrelay.Hello{Session: "u", User: "bob"}, "c4", 2)
		require.ErrorIs(t, err, sessionrelay.ErrCap)
	})
}

func TestSessionThatItsUsersIndexHasLostComesBackAtTheLimit(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		ctx := t.Context()
		a := stores(t, rdb)("a")
		at(t, a, "lost", "c1")
		for _, key := range keys(t, rdb) {
			if kind(key) != "s" {
				require.NoError(t, rdb.Del(ctx, key).Err())
			}
		}
		at(t, a, "s", "c2")
		for _, session := range []string{"lost", "s"} {
			_, _, err := a.Register(ctx, sessionrelay.Hello{Session: session, User: "bob"}, "d of "+session, 1)
			require.NoError(t, err)
		}
		_, _, err := a.Register(ctx, sessionrelay.Hello{Session: "new", User: "bob"}, "e", 1)
		require.ErrorIs(t, err, sessionrelay.ErrCap)
		assert.Equal(t, []string{"lost", "s"}, listed(t, a, sessionrelay.Filter{}))
	})
}

func TestPlaceOfASessionThatNeverCameIsFreeAfterItsLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, client := redistest.Bubble(t)
		rdb := client()
		hook := &failing{}
		rdb.AddHook(hook)
		a := stores(t, rdb)("a")
		register := func(session string) error {
			_, _, err := a.Register(t.Context(), sessionrelay.Hello{Session: session, User: "bob"}, "c of "+session, 1)
			return err
		}
		hook.script = scriptText(t, "register")
		require.ErrorIs(t, register("never came"), sessionrelay.ErrUnavailable)
		hook.script = ""
		require.ErrorIs(t, register("s"), sessionrelay.ErrCap)
		time.Sleep(20 * time.Second)
		hook.script = scriptText(t, "register")
		require.ErrorIs(t, register("never came"), sessionrelay.ErrUnavailable)
		hook.script = ""
		time.Sleep(29 * time.Second)
		require.ErrorIs(t, register("s"), sessionrelay.ErrCap, "another try is another lease")
		time.Sleep(time.Second)
		require.NoError(t, register("s"))
		require.ErrorIs(t, register("never came"), sessionrelay.ErrCap)
	})
}

// failing is a hook that lets one script fail, and none if that is "".
type failing struct{ script string }

func (*failing) DialHook(next redis.DialHook) redis.DialHook { return next }

func (h *failing) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		if h.script != "" && strings.HasPrefix(cmd.Name(), "eval") && cmd.Args()[1] == h.script {
			err := errors.New("connection lost")
			cmd.SetErr(err)
			return err
		}
		return next(ctx, cmd)
	}
}

func (*failing) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

// scriptText is how a script is asked for.
func scriptText(t *testing.T, name string) string { return scripts(t)["lua/"+name+".lua"] }

func TestStoreTimeDecides(t *testing.T) {
	for name, skew := range map[string]time.Duration{"behind": -10 * time.Hour, "ahead": 10 * time.Hour} {
		t.Run(name, func(t *testing.T) {
			m := miniredis.RunT(t)
			rdb := redis.NewClient(&redis.Options{Addr: m.Addr()})
			defer rdb.Close()
			now := time.Now().Add(skew)
			m.SetTime(now)
			a := stores(t, rdb)("a")
			i := at(t, a, "s", "c1")
			assert.Equal(t, now.UnixMilli(), i.Created.UnixMilli())
			// This process believes that it was idle for hours, or for no time.
			expired, err := a.Expire(t.Context(), time.Hour)
			require.NoError(t, err)
			assert.Empty(t, expired)
			c, err := a.Accept(t.Context(), "s", "", "i", "owner", time.Hour)
			require.NoError(t, err)
			assert.Equal(t, sessionrelay.Accepted, c.State)
			m.SetTime(now.Add(2 * time.Hour))
			c, err = a.Accept(t.Context(), "s", "", "i", "another", time.Hour)
			require.NoError(t, err)
			assert.Equal(t, sessionrelay.Accepted, c.State)
			expired, err = a.Expire(t.Context(), 0)
			require.NoError(t, err)
			assert.Equal(t, []string{"s"}, expired)
		})
	}
}

func TestNewRedisStoreReportsAllThatIsWrongAndAsksNothing(t *testing.T) {
	var dialled atomic.Int64
	rdb := redis.NewClient(&redis.Options{Dialer: func(context.Context, string, string) (net.Conn, error) {
		dialled.Add(1)
		return nil, errors.New("no")
	}})
	defer rdb.Close()
	ring := redis.NewRing(&redis.RingOptions{Addrs: map[string]string{"a": "127.0.0.1:1"}})
	defer ring.Close()
	var none *redis.Client
	type opts = []sessionrelay.RedisOption
	for name, tt := range map[string]struct {
		rdb  redis.UniversalClient
		node string
		opts opts
		want []string
	}{
		"nil client":       {nil, "a", nil, []string{"client is nil"}},
		"typed nil client": {none, "a", nil, []string{"client is nil"}},
		"blank node":       {rdb, " \t", nil, []string{"node"}},
		"long node":        {rdb, strings.Repeat("n", 257), nil, []string{"node"}},
		"nil option":       {rdb, "a", opts{nil}, []string{"option is nil"}},
		"short secret":     {rdb, "a", opts{sessionrelay.WithKeySecret(make([]byte, 15))}, []string{"WithKeySecret"}},
		"no op timeout":    {rdb, "a", opts{sessionrelay.WithOpTimeout(0)}, []string{"WithOpTimeout"}},
		"long op timeout":  {rdb, "a", opts{sessionrelay.WithOpTimeout(time.Hour + 1)}, []string{"WithOpTimeout"}},
		"fewer than none":  {rdb, "a", opts{sessionrelay.WithReplicas(-1)}, []string{"WithReplicas"}},
		"replicas of ring": {ring, "a", opts{sessionrelay.WithReplicas(1)}, []string{"WithReplicas"}},
		"all at once": {
			nil, "",
			opts{nil, sessionrelay.WithOpTimeout(-1), sessionrelay.WithReplicas(-1), sessionrelay.WithKeySecret(nil)},
			[]string{"client is nil", "node", "option is nil", "WithOpTimeout", "WithReplicas", "WithKeySecret"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := sessionrelay.NewRedisStore(tt.rdb, tt.node, tt.opts...)
			require.ErrorIs(t, err, sessionrelay.ErrInvalid)
			assert.Nil(t, s)
			for _, want := range tt.want {
				assert.ErrorContains(t, err, want)
			}
		})
	}
	s, err := sessionrelay.NewRedisStore(rdb, strings.Repeat("n", 256), sessionrelay.WithOpTimeout(time.Hour), sessionrelay.WithReplicas(1), sessionrelay.WithKeySecret(make([]byte, 16)))
	require.NoError(t, err)
	assert.Equal(t, strings.Repeat("n", 256), s.Node())
	assert.Zero(t, dialled.Load())
}

func TestSecretBelongsToItsCaller(t *testing.T) {
	rdb := redis.NewClient(&redis.Options{Addr: miniredis.RunT(t).Addr()})
	defer rdb.Close()
	secret := []byte("0123456789abcdef")
	opt := sessionrelay.WithKeySecret(secret)
	a := stores(t, rdb, opt)("a")
	at(t, a, "s", "c1")
	clear(secret)
	assert.True(t, exists(t, a, "s"))
}
