package sessionrelay_test

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/internal/redistest"
	"github.com/sessionlock/sessionlock/sessionrelay"
	"github.com/sessionlock/sessionlock/sessionrelay/relaytest"
)

// calls are all that can be asked of a store, about session "s" and connection "c1".
func calls(s sessionrelay.Store) map[string]func(context.Context) error {
	return map[string]func(context.Context) error{
		"Register": func(ctx context.Context) error {
			_, _, err := s.Register(ctx, sessionrelay.Hello{Session: "s", User: "bob"}, "c2", 1)
			return err
		},
		"Deregister": func(ctx context.Context) error { return s.Deregister(ctx, "s", "c0") },
		"Lookup":     func(ctx context.Context) error { _, err := s.Lookup(ctx, "s"); return err },
		"Remove":     func(ctx context.Context) error { _, err := s.Remove(ctx, "none"); return err },
		"List": func(ctx context.Context) error {
			return s.List(ctx, sessionrelay.Filter{}, func(sessionrelay.Info) bool { return true })
		},
		"List of a user": func(ctx context.Context) error {
			return s.List(ctx, sessionrelay.Filter{User: "bob"}, func(sessionrelay.Info) bool { return true })
		},
		"Alive":    func(ctx context.Context) error { _, err := s.Alive(ctx, []string{"s"}); return err },
		"Expire":   func(ctx context.Context) error { _, err := s.Expire(ctx, time.Hour); return err },
		"Scavenge": func(ctx context.Context) error { _, err := s.Scavenge(ctx); return err },
		"Homed":    func(ctx context.Context) error { _, err := s.Homed(ctx); return err },
		"Accept":   func(ctx context.Context) error { _, err := s.Accept(ctx, "s", "", "i", "o", time.Hour); return err },
		"Complete": func(ctx context.Context) error { return s.Complete(ctx, "s", "busy", "owner", nil) },
		"Release":  func(ctx context.Context) error { return s.Release(ctx, "s", "i", "o") },
		"Forget":   func(ctx context.Context) error { return s.Forget(ctx, "s", "none") },
		"Put": func(ctx context.Context) error {
			_, err := s.Put(ctx, "s", sessionrelay.Message{ID: "put"}, []byte("x"))
			return err
		},
		"Fetch":     func(ctx context.Context) error { _, err := s.Fetch(ctx, "s", "c2", 10); return err },
		"Attempted": func(ctx context.Context) error { return s.Attempted(ctx, "s", "c2", "new") },
		"Delivered": func(ctx context.Context) error { return s.Delivered(ctx, "s", "tried") },
		"Bury":      func(ctx context.Context) error { return s.Bury(ctx, "s", "c2", "new") },
		"Buried":    func(ctx context.Context) error { _, err := s.Buried(ctx, "s"); return err },
		"Revive":    func(ctx context.Context) error { return s.Revive(ctx, "s", "dead") },
		"Take":      func(ctx context.Context) error { _, _, err := s.Take(ctx, "s", "asked", "answer"); return err },
	}
}

func TestOutageEndsWithinTheOpTimeout(t *testing.T) {
	for name, fault := range map[string]func(*redistest.Proxy){
		"cut": (*redistest.Proxy).Cut, "black hole": (*redistest.Proxy).BlackHole, "lost replies": (*redistest.Proxy).DropReplies,
		"slow": func(p *redistest.Proxy) { p.Delay(time.Minute) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := redistest.Start(t)
			way := redistest.NewProxy(t, server.Addr())
			rdb := server.Client(func(o *redis.Options) { o.Addr = way.Addr() })
			const opTimeout = 300 * time.Millisecond
			a := stores(t, rdb, sessionrelay.WithOpTimeout(opTimeout))("a")
			fill(t, a, "s", "bob")
			fault(way)
			var all sync.WaitGroup
			for what, call := range calls(a) {
				all.Go(func() {
					start := time.Now()
					err := call(t.Context())
					assert.ErrorIs(t, err, sessionrelay.ErrUnavailable, what)
					assert.Less(t, time.Since(start), 5*opTimeout, what)
				})
			}
			all.Wait()
		})
	}
}

func TestEndOfAContextEndsACall(t *testing.T) {
	server := redistest.Start(t)
	way := redistest.NewProxy(t, server.Addr())
	rdb := server.Client(func(o *redis.Options) { o.Addr = way.Addr() })
	a := stores(t, rdb, sessionrelay.WithOpTimeout(time.Minute))("a")
	fill(t, a, "s", "bob")
	way.BlackHole()
	enough := errors.New("enough")
	for what, call := range calls(a) {
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(20*time.Millisecond, func() { cancel(enough) })
		start := time.Now()
		err := call(ctx)
		require.ErrorIs(t, err, enough, what)
		assert.NotErrorIs(t, err, sessionrelay.ErrUnavailable, what)
		assert.Less(t, time.Since(start), 10*time.Second, what)
	}
}

func TestServerThatComesBackIsUsed(t *testing.T) {
	server := redistest.StartDurable(t)
	a := stores(t, server.Client(), sessionrelay.WithOpTimeout(300*time.Millisecond))("a")
	fill(t, a, "s", "bob")
	server.Stop()
	_, err := a.Lookup(t.Context(), "s")
	require.ErrorIs(t, err, sessionrelay.ErrUnavailable)
	server.Restart()
	require.Eventually(t, func() bool {
		_, err := a.Fetch(t.Context(), "s", "c2", 10)
		return err == nil
	}, 10*time.Second, 10*time.Millisecond)
	assert.Equal(t, []string{"new", "asked", "taken"}, ids(t, a, "s", "c2"))
}

// What stands under our names and is not ours is an error, and stays as it is.
func TestForeignKeysAreErrorsAndStay(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		ctx := t.Context()
		a := stores(t, rdb)("a")
		fill(t, a, "s", "bob")
		_, err := a.Remove(ctx, "none")
		require.NoError(t, err)
		touched := map[string][]string{
			"s":    {"Register", "Deregister", "Lookup", "List", "List of a user", "Alive", "Scavenge", "Homed", "Accept", "Complete", "Put", "Fetch", "Attempted", "Bury", "Buried", "Revive"},
			"was":  {"Register", "Deregister"},
			"in":   {"Accept", "Complete", "Release", "Forget"},
			"out":  {"Put", "Fetch", "Delivered", "Buried"},
			"pend": {"Put", "Fetch", "Attempted", "Bury", "Revive"},
			"dead": {"Bury", "Buried", "Revive"}, "gone": {"Put", "Delivered"}, "req": {"Put", "Take"}, "tries": {"Attempted", "Fetch", "Buried", "Delivered", "Revive"},
			"sent": {"Attempted", "Delivered"}, "taken": {"Take"},
			"all": {"Register", "List", "Expire", "Scavenge", "Alive"}, "user": {"Register", "List of a user", "Alive"}, "node": {"Homed", "Alive"},
		}
		var names []string
		for _, key := range keys(t, rdb) {
			if kind(key) == "rm" {
				continue
			}
			names = append(names, kind(key))
			spoil := func() {
				require.NoError(t, rdb.FlushAll(ctx).Err())
				fill(t, a, "s", "bob")
				require.NoError(t, rdb.Del(ctx, key).Err())
				require.NoError(t, rdb.Set(ctx, key, "not ours", 0).Err())
			}
			spoil()
			for _, touches := range []bool{false, true} {
				for what, call := range calls(a) {
					if slices.Contains(touched[kind(key)], what) != touches {
						continue
					}
					if touches {
						spoil()
					}
					if err := call(ctx); touches {
						assert.ErrorIs(t, err, sessionrelay.ErrUnavailable, "%s, with a string for %s", what, kind(key))
					}
					v, err := rdb.Get(ctx, key).Result()
					require.NoError(t, err, "%s, with a string for %s", what, kind(key))
					assert.Equal(t, "not ours", v)
				}
			}
		}
		assert.ElementsMatch(t, slices.Collect(maps.Keys(touched)), names)
	})
}

func TestGarbageInOurKeysIsNoPanic(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		ctx := t.Context()
		a := stores(t, rdb)("a")
		fill(t, a, "s", "bob")
		for _, garbage := range []string{"", "D", "D:", "D9:x", "Dx:y", "P", "Px y", "P1", "x", "D-1:x+", "D0:", "\x00"} {
			require.NoError(t, rdb.HSet(ctx, keyOf(t, rdb, "in"), "i", garbage).Err())
			claim, err := a.Accept(ctx, "s", "", "i", "o", time.Hour)
			if err != nil {
				require.ErrorIs(t, err, sessionrelay.ErrUnavailable, "%q", garbage)
			}
			assert.Empty(t, claim.Outcome)
			if err := a.Complete(ctx, "s", "i", "other", nil); err != nil {
				require.True(t, errors.Is(err, sessionrelay.ErrUnavailable) || errors.Is(err, sessionrelay.ErrTaken), "%q: %v", garbage, err)
			}
			require.NoError(t, a.Release(ctx, "s", "i", "other"))
		}
		require.NoError(t, rdb.HSet(ctx, keyOf(t, rdb, "out"), "new", "").Err())
		require.NoError(t, rdb.ZAdd(ctx, keyOf(t, rdb, "pend"), redis.Z{Score: 0, Member: "no message"}).Err())
		require.NoError(t, rdb.HSet(ctx, keyOf(t, rdb, "tries"), "asked", "many").Err())
		assert.Equal(t, []string{"asked", "taken"}, ids(t, a, "s", "c2"), "what has a message")
		require.NoError(t, rdb.HSet(ctx, keyOf(t, rdb, "s"), "created", "yesterday", "live", "").Err())
		i, err := a.Lookup(ctx, "s")
		require.NoError(t, err)
		assert.Zero(t, i.Created)
		assert.Zero(t, i.Live)
		require.NoError(t, rdb.SAdd(ctx, keyOf(t, rdb, "node"), "garbage", "7:x").Err())
		assert.Equal(t, []string{"s"}, homed(t, a))
	})
}

// An id that stayed behind in the order would be fetched in place of a message.
func TestDeliveredMessagesTakeNoRoomInAFetch(t *testing.T) {
	everywhere(t, func(t *testing.T, open func(string) sessionrelay.Store) {
		a := open("a")
		ctx := t.Context()
		at(t, a, "s", "c1")
		puts(t, a, "s", "new", "tried", "tried again", "dead", "revived")
		require.NoError(t, a.Attempted(ctx, "s", "c1", "tried", "tried again"))
		require.NoError(t, a.Bury(ctx, "s", "c1", "dead", "revived"))
		require.NoError(t, a.Revive(ctx, "s", "revived"))
		at(t, a, "s", "c2")
		require.NoError(t, a.Attempted(ctx, "s", "c2", "tried again"))
		for _, id := range []string{"dead", "new", "tried", "revived", "tried again"} {
			require.NoError(t, a.Delivered(ctx, "s", id))
		}
		at(t, a, "s", "c3")
		puts(t, a, "s", "last")
		messages, err := a.Fetch(ctx, "s", "c3", 1)
		require.NoError(t, err)
		require.Len(t, messages, 1)
		assert.Equal(t, "last", messages[0].ID)
	})
}

func TestSessionKeepsItsPlaceWhenItsReconnectFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, client := redistest.Bubble(t)
		rdb := client()
		hook := &failing{}
		rdb.AddHook(hook)
		a := stores(t, rdb)("a")
		register := func(session, conn string) error {
			_, _, err := a.Register(t.Context(), sessionrelay.Hello{Session: session, User: "bob"}, conn, 1)
			return err
		}
		require.NoError(t, register("s", "c1"))
		time.Sleep(30 * time.Second)
		hook.script = scriptText(t, "register")
		require.ErrorIs(t, register("s", "c2"), sessionrelay.ErrUnavailable)
		hook.script = ""
		time.Sleep(time.Minute) // longer than a place waits for its session
		require.ErrorIs(t, register("t", "c3"), sessionrelay.ErrCap)
		expired, err := a.Expire(t.Context(), 75*time.Second)
		require.NoError(t, err)
		assert.Equal(t, []string{"s"}, expired, "nor was it a sign of life")
	})
}

func TestPlaceOfASessionThatIsGoneIsFreeAtTheLimit(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		a := stores(t, rdb)("a")
		at(t, a, "s", "c1")
		require.NoError(t, rdb.Del(t.Context(), sessionrelay.SessionKey("s")).Err()) // its node died while removing it
		_, _, err := a.Register(t.Context(), sessionrelay.Hello{Session: "t", User: "bob"}, "c2", 1)
		require.NoError(t, err)
		assert.Equal(t, []string{"t"}, listed(t, a, sessionrelay.Filter{User: "bob"}))
	})
}

// meanwhile is a hook that calls do, once, before the next command of a pipeline that
// removes something from an index.
type meanwhile struct{ do func() }

func (*meanwhile) DialHook(next redis.DialHook) redis.DialHook          { return next }
func (*meanwhile) ProcessHook(next redis.ProcessHook) redis.ProcessHook { return next }

func (h *meanwhile) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		if do := h.do; do != nil && slices.ContainsFunc(cmds, func(c redis.Cmder) bool { return c.Name() == "zrem" }) {
			h.do = nil
			do()
		}
		return next(ctx, cmds)
	}
}

func TestSessionThatComesWhileItIsRemovedIsFound(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		hook := &meanwhile{}
		unhooked := redis.NewClient(rdb.Options())
		defer unhooked.Close()
		other := stores(t, unhooked)("b")
		at(t, other, "s", "c1")
		rdb.AddHook(hook)
		a := stores(t, rdb)("a")
		hook.do = func() { at(t, other, "s", "c2") }
		existed, err := a.Remove(t.Context(), "s")
		require.NoError(t, err)
		assert.True(t, existed)
		assert.Nil(t, hook.do, "it came meanwhile")
		assert.Equal(t, []string{"s"}, listed(t, other, sessionrelay.Filter{}))
		assert.Equal(t, []string{"s"}, listed(t, other, sessionrelay.Filter{User: "bob"}))
	})
}

func TestRemoveWakesTheHome(t *testing.T) {
	everywhere(t, func(t *testing.T, open func(string) sessionrelay.Store) {
		a, b := open("a"), open("b")
		at(t, a, "s", "c1")
		woken := make(chan struct{}, 100)
		stop := a.(interface {
			Watch(string, func()) func()
		}).Watch("s", func() { woken <- struct{}{} })
		defer stop()
		for heard := 0; heard < 2; { // at the second, the watch is in force: that was no greeting
			puts(t, b, "s", rand.Text())
			select {
			case <-woken:
				heard++
			case <-time.After(time.Millisecond):
			}
		}
		for quiet := false; !quiet; {
			select {
			case <-woken:
			case <-time.After(50 * time.Millisecond):
				quiet = true
			}
		}
		_, err := b.Remove(t.Context(), "s")
		require.NoError(t, err)
		select {
		case <-woken:
		case <-time.After(10 * time.Second):
			assert.Fail(t, "not woken")
		}
	})
}

func TestHundredThousandIDs(t *testing.T) {
	rdb := redistest.Start(t).Client()
	ctx := t.Context()
	a := stores(t, rdb, sessionrelay.WithOpTimeout(10*time.Second))("a")
	fill(t, a, "s", "bob")
	many := make([]string, 100_000)
	for i := range many {
		many[i] = fmt.Sprint("none ", i)
	}
	unknown, err := a.Alive(ctx, append(many[:20_000:20_000], "s"))
	require.NoError(t, err)
	assert.Len(t, unknown, 20_000)
	all := append(many, "new", "tried", "dead", "done")
	require.NoError(t, a.Attempted(ctx, "s", "c2", all...))
	require.NoError(t, a.Bury(ctx, "s", "c2", all...))
	dead, err := a.Buried(ctx, "s")
	require.NoError(t, err)
	assert.Len(t, dead, 3)
	require.NoError(t, a.Revive(ctx, "s", all...))
	assert.Equal(t, []string{"new", "tried", "dead", "asked", "taken"}, ids(t, a, "s", "c2"))
	require.NoError(t, a.Delivered(ctx, "s", all...))
	assert.Equal(t, []string{"asked", "taken"}, ids(t, a, "s", "c2"))
	require.NoError(t, a.Forget(ctx, "s", all...))
	c, err := a.Accept(ctx, "s", "", "done", "another", time.Hour)
	require.NoError(t, err)
	assert.Equal(t, sessionrelay.Accepted, c.State)
	for _, key := range keys(t, rdb) {
		assert.Less(t, rdb.MemoryUsage(ctx, key).Val(), int64(10_000), "unknown ids leave nothing: %s", kind(key))
	}
}

// stored makes the calls that wait for replicas, for a session of its own.
func stored(s sessionrelay.Store, session string) map[string]func(context.Context) error {
	return map[string]func(context.Context) error{
		"Register": func(ctx context.Context) error {
			_, _, err := s.Register(ctx, sessionrelay.Hello{Session: session, User: "bob"}, "c1", plenty)
			return err
		},
		"Put": func(ctx context.Context) error {
			_, err := s.Put(ctx, session, sessionrelay.Message{ID: "m"}, nil)
			return err
		},
		"Accept":   func(ctx context.Context) error { _, err := s.Accept(ctx, session, "", "i", "o", time.Hour); return err },
		"Complete": func(ctx context.Context) error { return s.Complete(ctx, session, "i", "o", []byte("done")) },
	}
}

func TestStoredMeansOnReplicas(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	rdb := redistest.StartSentinel(t).Master().Admin()
	enough := stores(t, rdb, sessionrelay.WithReplicas(1))("a")
	for _, what := range []string{"Register", "Put", "Accept", "Complete"} {
		require.NoError(t, stored(enough, "s")[what](ctx), what)
	}
	c, err := enough.Accept(ctx, "s", "", "i", "another", time.Hour)
	require.NoError(t, err)
	assert.Equal(t, sessionrelay.Claim{State: sessionrelay.Done, Outcome: []byte("done")}, c)
	assert.Equal(t, []string{"m"}, ids(t, enough, "s", "c1"))
	_, err = enough.Put(ctx, "none", sessionrelay.Message{ID: "m"}, nil)
	require.ErrorIs(t, err, sessionrelay.ErrGone)

	const opTimeout = time.Second
	tooMany := stores(t, rdb, sessionrelay.WithReplicas(2), sessionrelay.WithOpTimeout(opTimeout))("a")
	var all sync.WaitGroup
	for what, session := range map[string]string{"Register": "t", "Put": "s", "Accept": "s", "Complete": "s"} {
		all.Go(func() {
			start := time.Now()
			err := stored(tooMany, session)[what](ctx)
			assert.ErrorIs(t, err, sessionrelay.ErrUnavailable, what)
			assert.ErrorContains(t, err, "1 of 2 replicas", what)
			assert.Less(t, time.Since(start), 5*opTimeout, what)
		})
	}
	all.Wait()
	assert.True(t, exists(t, enough, "t"), "stored all the same")
}

func TestStoredMeansOnReplicasOfACluster(t *testing.T) {
	t.Parallel()
	rdb := clusterClient(t)
	a := stores(t, rdb, sessionrelay.WithReplicas(1))("a")
	for i := range 10 { // on all masters, in all likelihood
		for _, what := range []string{"Register", "Put", "Accept", "Complete"} {
			require.NoError(t, stored(a, fmt.Sprint("s", i))[what](t.Context()), what)
		}
	}
	tooMany := stores(t, rdb, sessionrelay.WithReplicas(2), sessionrelay.WithOpTimeout(300*time.Millisecond))("a")
	require.ErrorIs(t, stored(tooMany, "s0")["Put"](t.Context()), sessionrelay.ErrUnavailable)
}

func TestServerWithoutReplicasStoresNothingForSure(t *testing.T) {
	rdb := redistest.Start(t).Client()
	a := stores(t, rdb, sessionrelay.WithReplicas(1), sessionrelay.WithOpTimeout(200*time.Millisecond))("a")
	require.ErrorIs(t, stored(a, "s")["Register"](t.Context()), sessionrelay.ErrUnavailable)
}

// wrapped is a client that hides what it is.
type wrapped struct{ redis.UniversalClient }

func TestReplicasOfAnUnknownClientAreAnError(t *testing.T) {
	rdb := redistest.Start(t).Client()
	a := stores(t, wrapped{rdb}, sessionrelay.WithReplicas(1))("a")
	require.ErrorIs(t, stored(a, "s")["Register"](t.Context()), sessionrelay.ErrUnavailable)
	b := stores(t, wrapped{rdb})("b")
	require.NoError(t, stored(b, "s")["Register"](t.Context()))
}

// sent are the commands that the store sends itself, besides those of its scripts.
var sent = strings.Fields("evalsha eval zaddnx zadd zrem zrange zrangebyscore zscan hgetall sadd srem smembers hdel pexpire subscribe unsubscribe ping")

func TestLeastPrivilegesAreEnough(t *testing.T) {
	t.Parallel()
	commands := map[string]bool{}
	for _, c := range sent {
		commands[strings.TrimSuffix(c, "nx")] = true
	}
	called := regexp.MustCompile(`redis\.call\('(\w+)'`)
	for file := range scripts(t) {
		source, err := os.ReadFile(file)
		require.NoError(t, err)
		for _, c := range called.FindAllStringSubmatch(string(source), -1) {
			commands[strings.ToLower(c[1])] = true
		}
	}
	common, err := os.ReadFile("lua/common.lua")
	require.NoError(t, err)
	for _, c := range called.FindAllStringSubmatch(string(common), -1) {
		commands[strings.ToLower(c[1])] = true
	}
	t.Log(slices.Sorted(maps.Keys(commands)))
	server := redistest.Start(t)
	server.Grant("relay", slices.Sorted(maps.Keys(commands))...)
	relaytest.StoreTest{
		New: func(t *testing.T) func(string) sessionrelay.Store {
			return stores(t, server.Client(func(o *redis.Options) { o.Username, o.Password = "relay", redistest.Password }))
		},
		Tick: 50 * time.Millisecond,
	}.Run(t)
}

// Errors of Redis reach callers; nothing in them may tell who it was about.
func TestErrorsTellNoIDs(t *testing.T) {
	server := redistest.Start(t)
	server.Grant("nobody", "ping")
	a := stores(t, server.Client(func(o *redis.Options) { o.Username, o.Password = "nobody", redistest.Password }))("secret-node")
	b := stores(t, server.Client())("secret-node")
	_, _, err := b.Register(t.Context(), sessionrelay.Hello{Session: "secret-session", User: "secret-user"}, "secret-conn", 1)
	require.NoError(t, err)
	for _, key := range keys(t, server.Client()) {
		require.NoError(t, server.Client().Set(t.Context(), key, "not ours", 0).Err())
	}
	for _, s := range []sessionrelay.Store{a, b} {
		_, _, registered := s.Register(t.Context(), sessionrelay.Hello{Session: "secret-session", User: "secret-user"}, "secret-conn", 1)
		_, lookedUp := s.Lookup(t.Context(), "secret-session")
		_, put := s.Put(t.Context(), "secret-session", sessionrelay.Message{ID: "secret-id", Payload: []byte("secret-payload")}, []byte("secret-correlation"))
		_, homed := s.Homed(t.Context())
		for _, err := range []error{registered, lookedUp, put, homed} {
			require.ErrorIs(t, err, sessionrelay.ErrUnavailable)
			assert.NotContains(t, err.Error(), "secret")
		}
	}
}

// A call that is left behind, because Redis does not answer in time, still reads what it
// was given; its caller may use his slices again by then.
func TestCallLeftBehindReadsCopies(t *testing.T) {
	rdb := redistest.Start(t).Client()
	s := stores(t, rdb, sessionrelay.WithOpTimeout(50*time.Millisecond))("a")
	at(t, s, "s", "c1")
	held := &leftBehind{goOn: make(chan struct{}), sent: make(chan []any, 1)}
	rdb.AddHook(held)
	payload, correlation := []byte("Confirm?"), []byte("order 17")
	_, err := s.Put(t.Context(), "s", sessionrelay.Message{ID: "m", Payload: payload}, correlation)
	require.ErrorIs(t, err, sessionrelay.ErrUnavailable)
	copy(payload, "........")
	copy(correlation, "........")
	close(held.goOn)
	sent := fmt.Sprintf("%s", <-held.sent)
	assert.Contains(t, sent, "Confirm?")
	assert.Contains(t, sent, "order 17")
}

// leftBehind holds scripts up, and tells what it then has to send.
type leftBehind struct {
	goOn chan struct{}
	sent chan []any
}

func (*leftBehind) DialHook(next redis.DialHook) redis.DialHook { return next }

func (h *leftBehind) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		if !strings.HasPrefix(cmd.Name(), "eval") {
			return next(ctx, cmd)
		}
		<-h.goOn
		h.sent <- cmd.Args()
		cmd.SetErr(errors.New("nobody waits any more"))
		return cmd.Err()
	}
}

func (*leftBehind) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}
