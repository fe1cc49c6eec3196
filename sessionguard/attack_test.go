package sessionguard_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/internal/redistest"
	"github.com/sessionlock/sessionlock/sessionguard"
)

// slowStore answers after a while what it has done at once, per verb.
type slowStore struct {
	*spy
	takes map[string]*atomic.Int64
}

func newSlowStore(store sessionguard.Store) *slowStore {
	s := &slowStore{spy: &spy{Store: store}, takes: map[string]*atomic.Int64{"register": {}, "current": {}, "renew": {}}}
	s.after = func(verb string) error {
		time.Sleep(time.Duration(s.takes[verb].Load()))
		return nil
	}
	return s
}

// answers has verb take d from now on.
func (s *slowStore) answers(verb string, d time.Duration) { s.takes[verb].Store(int64(d)) }

// registering starts a registration on m, and returns what tells why its context had ended
// soon after; nil: it had not.
func registering(t *testing.T, m *sessionguard.Monitor) (soonAfter func() error) {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		ctx, g, err := m.Register(t.Context(), "s")
		if err == nil {
			settle()
			err = context.Cause(ctx)
			g.End()
		}
		done <- err
	}()
	synctest.Wait()
	return func() error { return <-done }
}

// A newer request that registers before the older one is listened for is found when the
// older one's reply comes.
func TestNewerRequestBeforeTheWatchIsFoundByALateReply(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := new(sessionguard.MemoryStore)
		slow := newSlowStore(store)
		slow.answers("register", 500*time.Millisecond)
		why := registering(t, on(t, slow))
		register(t, on(t, mute(store)), "s") // nobody listens yet
		assert.ErrorIs(t, why(), sessionguard.ErrSuperseded)
	})
}

// A wake-up that comes while somebody looks is kept for who is registering, though nobody
// is left to look for when that look is over.
func TestWakeUpDuringALookIsKeptForWhoIsRegistering(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := new(sessionguard.MemoryStore)
		var wake func()
		slow := newSlowStore(store)
		a := on(t, &hinted{spy: slow.spy, watch: func(changed func()) { wake = changed }})
		_, first := register(t, a, "s")
		settle()
		slow.answers("current", 100*time.Millisecond)
		slow.answers("register", 500*time.Millisecond)
		wake()
		synctest.Wait() // it has read that first is the last
		why := registering(t, a)
		register(t, on(t, mute(store)), "s")
		wake()
		synctest.Wait()
		first.End()
		slow.answers("current", 0)
		assert.ErrorIs(t, why(), sessionguard.ErrSuperseded)
	})
}

// What this process learns while the store is asked counts, though the store's answer is
// older: then nothing is written.
func TestRequestSupersededWhileItIsCheckedDoesNotWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		slow := newSlowStore(new(sessionguard.MemoryStore))
		m := on(t, mute(slow))
		_, g := register(t, m, "s")
		slow.answers("current", 500*time.Millisecond)
		done := make(chan error, 1)
		go func() { done <- g.Commit(t.Context(), never(t)) }()
		synctest.Wait() // the store has said that it is the last
		_, newer := register(t, m, "s")
		supersededBy(t, <-done, g, newer)
	})
}

// The floor for epochs is the highest seen of any session: what is read of a session that
// is older, or gone, does not lower it.
func TestFloorForEpochsNeverFalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &forgetful{}
		s := &spy{Store: f}
		m := on(t, mute(s))
		_, older := register(t, m, "older")
		_, newer := register(t, m, "newer")
		require.Greater(t, newer.Epoch(), older.Epoch())
		require.NoError(t, older.Check(t.Context()))
		register(t, m, "third")
		f.forget()
		require.ErrorIs(t, older.Check(t.Context()), sessionguard.ErrLost)
		register(t, m, "fourth")
		calls := s.made("register")
		assert.Equal(t, newer.Epoch(), calls[2].floor, "after an older one was read")
		assert.Equal(t, newer.Epoch()+1, calls[3].floor, "after one was lost")
	})
}

// A request that has ended is over, whatever is learnt later by what it still tried: what
// registers under its context is a new one.
func TestEndedRequestIsNotSupersededLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := new(sessionguard.MemoryStore)
		s := &spy{Store: store}
		m := on(t, mute(s))
		ctx, g := register(t, m, "s")
		register(t, on(t, mute(store)), "s")
		s.before = func(_ context.Context, verb string) error {
			if verb == "current" {
				g.End()
			}
			return nil
		}
		require.ErrorIs(t, g.Check(t.Context()), sessionguard.ErrSuperseded)
		require.ErrorIs(t, g.Check(t.Context()), sessionguard.ErrInvalid, "it has ended")
		s.before = nil
		again, g2, err := m.Register(context.WithoutCancel(ctx), "s")
		require.NoError(t, err)
		defer g2.End()
		goesOn(t, again, g2)
	})
}

// A wake-up that was under way when the monitor was closed asks nobody and ends nobody.
func TestWakeUpAfterCloseIsNotLookedAt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := new(sessionguard.MemoryStore)
		var wake func()
		s := &spy{Store: store}
		m := on(t, &hinted{spy: s, watch: func(changed func()) { wake = changed }})
		ctx, _ := register(t, m, "s")
		settle()
		require.NoError(t, m.Close(t.Context()))
		before := s.count("")
		register(t, on(t, mute(store)), "s")
		wake()
		settle()
		assert.Equal(t, before, s.count(""))
		assert.NoError(t, context.Cause(ctx))
	})
}

// Close waits for the look that is under way, and not for those that were to follow.
func TestCloseIsNotHeldUpByWakeUpsThatWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var wake func()
		slow := newSlowStore(new(sessionguard.MemoryStore))
		m := on(t, &hinted{spy: slow.spy, watch: func(changed func()) { wake = changed }})
		register(t, m, "s")
		settle()
		slow.answers("current", 500*time.Millisecond)
		before := slow.count("current")
		wake()
		wake()
		synctest.Wait()
		start := time.Now()
		require.NoError(t, m.Close(t.Context()))
		assert.Equal(t, 500*time.Millisecond, time.Since(start))
		assert.Equal(t, 1, slow.count("current")-before)
	})
}

// A service registers under one long-lived context while its store is down: what failed
// leaves nothing on that context.
func TestFailedRegistrationLeavesNothingOnItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &spy{Store: new(sessionguard.MemoryStore), before: func(context.Context, string) error { return errStoreDown }}
		m := on(t, mute(s))
		ctx := &counting{Context: t.Context(), done: make(chan struct{})}
		for range 10 {
			_, _, err := m.Register(ctx, "s")
			require.ErrorIs(t, err, sessionguard.ErrUnavailable)
		}
		synctest.Wait() // what one call of the store needs is given back beside it
		assert.Zero(t, ctx.children.Load())
	})
}

// counting is a context that counts what is made from it and has not ended.
type counting struct {
	context.Context //nolint:containedctx // it is one
	done            chan struct{}
	children        atomic.Int64
}

func (c *counting) Done() <-chan struct{} { return c.done }

// AfterFunc is how package context follows a context that is not its own.
func (c *counting) AfterFunc(func()) (stop func() bool) {
	c.children.Add(1)
	return func() bool { c.children.Add(-1); return true }
}

// One of the requests that wait for it asks whether the server sends events, for all.
func TestKeyspaceEventsAreProbedOnceForAll(t *testing.T) {
	s := redistest.Start(t)
	notify(t, s, "K$")
	rdb := s.Client()
	var probes atomic.Int64
	rdb.AddHook(beforeEach(func(cmd redis.Cmder) {
		if cmd.Name() == "set" {
			probes.Add(1)
		}
	}))
	m := newMonitor(t, rdb, sessionguard.WithKeyspaceEvents(), sessionguard.WithTTL(24*time.Hour), sessionguard.WithOpTimeout(soon))
	var all sync.WaitGroup
	for i := range 20 {
		all.Go(func() {
			_, g, err := m.Register(t.Context(), fmt.Sprint(i))
			assert.NoError(t, err)
			g.End()
		})
	}
	all.Wait()
	assert.EqualValues(t, 1, probes.Load())
}

// Whether a request is the last one is asked by commands that no replica answers, however
// the client routes what only reads: a replica may not know of the newer request yet.
func TestRegistrationIsNeverReadFromAReplica(t *testing.T) {
	s := redistest.Start(t)
	known, err := s.Client().Command(t.Context()).Result()
	require.NoError(t, err)
	require.True(t, known["get"].ReadOnly, "the server says what reads")
	rdb := s.Client()
	var mu sync.Mutex
	var sent []string
	rdb.AddHook(beforeEach(func(cmd redis.Cmder) {
		mu.Lock()
		defer mu.Unlock()
		sent = append(sent, cmd.Name())
	}))
	store := sessionguard.NewRedisStore(rdb)
	m := newMonitor(t, rdb)
	_, g := register(t, m, "s")
	require.NoError(t, g.Check(t.Context()))
	require.NoError(t, g.Commit(t.Context(), applied))
	_, err = store.Renew(t.Context(), nameOf(m, "s"), time.Minute)
	require.NoError(t, err)
	mu.Lock()
	defer mu.Unlock()
	require.GreaterOrEqual(t, len(sent), 4)
	for _, name := range sent {
		assert.False(t, known[name].ReadOnly, name)
	}
}

// What is looked for when the store fails is looked for again by who is registering, though
// the older request has ended by then.
func TestWakeUpWhoseLookFailsIsKeptForWhoIsRegistering(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := new(sessionguard.MemoryStore)
		slow := newSlowStore(store)
		var down atomic.Bool
		slow.before = func(_ context.Context, verb string) error {
			if down.Load() && verb == "current" {
				return errStoreDown
			}
			return nil
		}
		a := on(t, slow)
		_, first := register(t, a, "s")
		settle()
		slow.answers("register", 500*time.Millisecond)
		down.Store(true)
		why := registering(t, a)
		register(t, on(t, mute(store)), "s")
		settle()
		first.End()
		down.Store(false)
		assert.ErrorIs(t, why(), sessionguard.ErrSuperseded)
	})
}

// A look that fails is not repeated at once: the store is down.
func TestLookThatFailsIsLeftToTheRenewals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var wake func()
		s := &spy{Store: new(sessionguard.MemoryStore)}
		m := on(t, &hinted{spy: s, watch: func(changed func()) { wake = changed }})
		_, g := register(t, m, "s")
		defer g.End()
		settle()
		s.before = func(context.Context, string) error { return errStoreDown }
		before := s.count("current")
		wake()
		wake()
		settle()
		assert.LessOrEqual(t, s.count("current")-before, 2)
		time.Sleep(tick)
		synctest.Wait()
		assert.Equal(t, 1, s.count("renew"))
	})
}

// tick is how often a monitor looks for what is to be renewed, by default.
const tick = time.Second

func TestGuardThatEndsWhileItIsCheckedDoesNotWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &spy{Store: new(sessionguard.MemoryStore)}
		_, g := register(t, on(t, mute(s)), "s")
		s.before = func(context.Context, string) error { g.End(); return nil }
		assert.ErrorIs(t, g.Commit(t.Context(), never(t)), sessionguard.ErrInvalid)
	})
}

// A script compares byte by byte: what it refuses is never reported as done, whoever has
// written a registration that reads like the request's.
func TestScriptThatWasRefusedIsAnError(t *testing.T) {
	for name, like := range map[string]func(string) string{
		"zeros":   func(s string) string { return "00" + s },
		"newline": func(s string) string { return s + "\n" },
	} {
		redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
			m := newMonitor(t, rdb)
			for verb, op := range map[string]func(g *sessionguard.Guard) error{
				"eval": func(g *sessionguard.Guard) error {
					_, err := g.Eval(t.Context(), set, []string{g.Key("k")}, 1)
					assert.Zero(t, rdb.Exists(t.Context(), g.Key("k")).Val(), "it did not run")
					return err
				},
				"check": func(g *sessionguard.Guard) error { return g.Check(t.Context()) },
			} {
				_, g := register(t, m, verb)
				was := rdb.Get(t.Context(), nameOf(m, verb)).Val()
				require.NoError(t, rdb.Set(t.Context(), nameOf(m, verb), like(was), time.Minute).Err())
				assert.ErrorIs(t, op(g), sessionguard.ErrLost, "%s: %s", name, verb)
			}
		})
	}
}

func TestProbeWhoseConnectionIsLostSaysNothingOfEvents(t *testing.T) {
	s := redistest.Start(t)
	notify(t, s, "K$")
	rdb, admin := s.Client(), s.Client()
	var once sync.Once
	rdb.AddHook(beforeEach(func(cmd redis.Cmder) {
		if cmd.Name() == "set" {
			once.Do(func() {
				assert.NoError(t, admin.ClientKillByFilter(t.Context(), "TYPE", "pubsub").Err())
			})
		}
	}))
	m := newMonitor(t, rdb, sessionguard.WithKeyspaceEvents())
	_, _, err := m.Register(t.Context(), "s")
	require.ErrorIs(t, err, sessionguard.ErrUnavailable)
	assert.NotContains(t, err.Error(), "notify-keyspace-events")
	_, g, err := m.Register(t.Context(), "s")
	require.NoError(t, err, "it is asked again at once")
	g.End()
}

// marshals is an argument that go-redis would marshal.
type marshals func() ([]byte, error)

func (f marshals) MarshalBinary() ([]byte, error) { return f() }

// What go-redis cannot send is the caller's fault, and said before anything is sent. A
// method that panics does so in its caller's goroutine, where it can be recovered.
func TestArgumentsOfAScript(t *testing.T) {
	s := redistest.Start(t)
	rdb := s.Client()
	var sent atomic.Int64
	rdb.AddHook(beforeEach(func(cmd redis.Cmder) {
		if strings.HasPrefix(cmd.Name(), "eval") {
			sent.Add(1)
		}
	}))
	ctx, g := register(t, newMonitor(t, rdb), "s")
	sent.Store(0)
	bad := errors.New("cannot be marshalled")
	for name, arg := range map[string]any{
		"struct": struct{ Password string }{"hunter2"}, "map": map[string]string{"p": "hunter2"}, "func": func() {}, "strings": []string{"hunter2"},
		"marshaller": marshals(func() ([]byte, error) { return nil, bad }),
	} {
		_, err := g.Eval(ctx, set, []string{g.Key("k")}, arg)
		require.ErrorIs(t, err, sessionguard.ErrInvalid, name)
		assert.NotErrorIs(t, err, sessionguard.ErrUnavailable, name)
		assert.NotContains(t, err.Error(), "hunter2", name)
		assert.Equal(t, name == "marshaller", errors.Is(err, bad), name)
	}
	assert.PanicsWithValue(t, "in MarshalBinary", func() {
		_, _ = g.Eval(ctx, set, []string{g.Key("k")}, marshals(func() ([]byte, error) { panic("in MarshalBinary") }))
	})
	assert.Zero(t, sent.Load())

	marshalled := 0
	n, at := 7, time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for want, arg := range map[string]any{
		"": nil, "text": "text", "bytes": []byte("bytes"), "7": &n, "-8": int8(-8), "9": uint64(9), "1.5": 1.5, "1": true,
		"2026-01-02T03:04:05Z": at, "1000000000": time.Second, "127.0.0.1": net.IPv4(127, 0, 0, 1),
		"marshalled": marshals(func() ([]byte, error) { marshalled++; return []byte("marshalled"), nil }),
	} {
		_, err := g.Eval(ctx, set, []string{g.Key("k")}, arg)
		require.NoError(t, err, want)
		if ip, ok := arg.(net.IP); ok {
			want = string(ip)
		}
		assert.Equal(t, want, rdb.Get(t.Context(), g.Key("k")).Val())
	}
	assert.Equal(t, 1, marshalled, "where its caller is")
}

// A call that is left behind, because Redis does not answer in time, still reads what it
// was given; its caller may use his slices again by then.
func TestScriptLeftBehindReadsCopies(t *testing.T) {
	rdb := redistest.Start(t).Client()
	_, g := register(t, newMonitor(t, rdb, sessionguard.WithOpTimeout(50*time.Millisecond)), "s")
	goOn, sent := make(chan struct{}), make(chan string, 1)
	rdb.AddHook(beforeEach(func(cmd redis.Cmder) {
		if strings.HasPrefix(cmd.Name(), "eval") {
			<-goOn
			sent <- fmt.Sprintf("%s", cmd.Args())
		}
	}))
	value := []byte("lamp")
	_, err := g.Eval(t.Context(), set, []string{g.Key("k")}, value)
	require.ErrorIs(t, err, sessionguard.ErrUnavailable)
	copy(value, "....")
	close(goOn)
	assert.Contains(t, <-sent, "lamp")
}
