package sessionguard_test

// What the tests of this package share: stores that count, break and lose
// wake-ups, fleets of nodes on one store, and what to wait for.

import (
	"context"
	"errors"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/internal/redistest"
	"github.com/sessionlock/sessionlock/sessionguard"
)

// soon is for what a healthy machine does at once.
const soon = 20 * time.Second

var errStoreDown = errors.New("store is down")

// spy is a node's way to a store that the whole fleet shares: it counts, breaks,
// and tampers with wake-ups. The zero value of every func does nothing.
type spy struct {
	sessionguard.Store
	before func(ctx context.Context, verb string) error // an error: not executed
	after  func(verb string) error                      // an error: executed, and the reply lost
	hint   func(changed func())                         // delivers a wake-up

	mu     sync.Mutex
	calls  []call
	inside int
	most   int
}

type call struct {
	verb, session string
	at            time.Time
	floor         uint64
	ttl           time.Duration
}

func (s *spy) do(ctx context.Context, c call, op func() error) error {
	s.mu.Lock()
	c.at = time.Now()
	s.calls = append(s.calls, c)
	s.inside++
	s.most = max(s.most, s.inside)
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.inside--
	}()
	if s.before != nil {
		if err := s.before(ctx, c.verb); err != nil {
			return err
		}
	}
	if err := op(); err != nil {
		return err
	}
	if s.after != nil {
		return s.after(c.verb)
	}
	return nil
}

func (s *spy) Register(ctx context.Context, session, token string, floor uint64, ttl time.Duration) (epoch uint64, err error) {
	err = s.do(ctx, call{verb: "register", session: session, floor: floor, ttl: ttl}, func() error {
		epoch, err = s.Store.Register(ctx, session, token, floor, ttl)
		return err
	})
	return epoch, err
}

func (s *spy) Current(ctx context.Context, session string) (r sessionguard.Registration, err error) {
	err = s.do(ctx, call{verb: "current", session: session}, func() error {
		r, err = s.Store.Current(ctx, session)
		return err
	})
	return r, err
}

func (s *spy) Renew(ctx context.Context, session string, ttl time.Duration) (r sessionguard.Registration, err error) {
	err = s.do(ctx, call{verb: "renew", session: session, ttl: ttl}, func() error {
		r, err = s.Store.Renew(ctx, session, ttl)
		return err
	})
	return r, err
}

func (s *spy) Watch(session string, changed func()) (stop func()) {
	w, ok := s.Store.(sessionguard.Watcher)
	if !ok {
		return func() {}
	}
	if s.hint != nil {
		return w.Watch(session, func() { s.hint(changed) })
	}
	return w.Watch(session, changed)
}

// count returns how many calls there were, of one verb or of all.
func (s *spy) count(verb string) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.calls {
		if verb == "" || c.verb == verb {
			n++
		}
	}
	return n
}

// made returns the calls of one verb.
func (s *spy) made(verb string) (out []call) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.calls {
		if c.verb == verb {
			out = append(out, c)
		}
	}
	return out
}

// mute is a store without hints.
func mute(s sessionguard.Store) sessionguard.Store { return struct{ sessionguard.Store }{s} }

// on returns a node on store.
func on(t testing.TB, store sessionguard.Store, opts ...sessionguard.Option) *sessionguard.Monitor {
	t.Helper()
	return newMonitor(t, nil, append([]sessionguard.Option{sessionguard.WithStore(store)}, opts...)...)
}

// fleets runs f in a bubble for each store that a fleet may share; node returns
// another node.
func fleets(t *testing.T, f func(t *testing.T, node func(opts ...sessionguard.Option) *sessionguard.Monitor)) {
	t.Helper()
	t.Run("memory", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			store := new(sessionguard.MemoryStore)
			f(t, func(opts ...sessionguard.Option) *sessionguard.Monitor { return on(t, store, opts...) })
		})
	})
	t.Run("redis", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			_, connect := redistest.Bubble(t)
			f(t, func(opts ...sessionguard.Option) *sessionguard.Monitor { return newMonitor(t, connect(), opts...) })
		})
	})
}

// register returns a request that is guarded until the test ends.
func register(t testing.TB, m *sessionguard.Monitor, session string) (context.Context, *sessionguard.Guard) {
	t.Helper()
	ctx, g, err := m.Register(t.Context(), session)
	require.NoError(t, err)
	t.Cleanup(g.End)
	return ctx, g
}

func applied(context.Context, uint64) (bool, error) { return true, nil }

// never is a write that must not happen.
func never(t *testing.T) func(context.Context, uint64) (bool, error) {
	return func(context.Context, uint64) (bool, error) {
		assert.Fail(t, "written")
		return true, nil
	}
}

// cause waits for the end of ctx and returns why it has ended.
func cause(t testing.TB, ctx context.Context) error { //nolint:revive // the test comes first
	t.Helper()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(soon):
		require.FailNow(t, "the context did not end")
		return nil
	}
}

// supersededBy checks that err says which request was superseded by which.
func supersededBy(t testing.TB, err error, g, by *sessionguard.Guard) {
	t.Helper()
	require.ErrorIs(t, err, sessionguard.ErrSuperseded)
	var s *sessionguard.SupersededError
	require.ErrorAs(t, err, &s)
	assert.Equal(t, g.Epoch(), s.Epoch)
	assert.Equal(t, by.Epoch(), s.By)
}

// goesOn checks that a request was not interrupted and can commit.
func goesOn(t testing.TB, ctx context.Context, g *sessionguard.Guard) { //nolint:revive // the test comes first
	t.Helper()
	require.NoError(t, context.Cause(ctx))
	require.NoError(t, g.Check(ctx))
	require.NoError(t, g.Commit(ctx, applied))
}

// busy returns the stacks of goroutines that work for a monitor or a hub: in a bubble
// those of the bubble.
func busy() (out []string) {
	buf := make([]byte, 1<<22)
	all := strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n")
	bubble := ""
	if _, rest, ok := strings.Cut(strings.SplitN(all[0], "\n", 2)[0], "synctest bubble "); ok {
		bubble = "synctest bubble " + strings.TrimRight(rest, "]:")
	}
	for _, stack := range all {
		head, calls, _ := strings.Cut(stack, "\n")
		if bubble != "" && !strings.HasSuffix(strings.TrimSuffix(head, "]:"), bubble) {
			continue
		}
		if library.MatchString(calls) {
			out = append(out, stack)
		}
	}
	return out
}

var library = regexp.MustCompile(`(?m)^github\.com/sessionlock/sessionlock/(sessionguard|internal/hub|internal/bound)\.`)

// quiet waits until nothing works for a monitor.
func quiet(t *testing.T) {
	t.Helper()
	require.Eventually(t, func() bool { return len(busy()) == 0 }, soon, 10*time.Millisecond, "still running")
}

// direct returns a client of a miniredis.
func direct(t testing.TB, m *miniredis.Miniredis) *redis.Client {
	t.Helper()
	rdb := redis.NewClient(&redis.Options{Addr: m.Addr()})
	t.Cleanup(func() { _ = rdb.Close() })
	return rdb
}

// nameOf returns the name of a session's registration.
func nameOf(m *sessionguard.Monitor, session string) string { return "sl:{" + m.KeyID(session) + "}:g" }

// settle lets a bubble's wake-ups arrive: monitors listen a little after they have
// registered.
func settle() {
	time.Sleep(10 * time.Millisecond)
	synctest.Wait()
}
