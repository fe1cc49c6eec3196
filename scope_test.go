package sessionlock_test

// Scopes and Put: the behaviour table of the persistent sessions this package
// follows, call for call, and what must hold beyond it.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock"
	"github.com/sessionlock/sessionlock/internal/redistest"
)

// fileMaker is an upstream that also answers requests: error 952 once a session
// was logged out or killed. Its sessions have no expiry and end when not used.
type fileMaker struct {
	*upstream
	lock          sync.Mutex
	data, refused int
	killed        []string
}

const (
	fileMakerIdle = 14 * time.Minute
	fileMakerLife = fileMakerIdle - 20*time.Second // less the margin
)

func newFileMaker() *fileMaker { return &fileMaker{upstream: &upstream{}} }

// request is one data call.
func (f *fileMaker) request(_ context.Context, s sessionlock.Session) error {
	token := s.Token.Reveal()
	ended := f.ended()
	f.lock.Lock()
	defer f.lock.Unlock()
	f.data++
	if slices.Contains(f.killed, token) || slices.Contains(ended, token) {
		f.refused++
		return &upstreamError{952}
	}
	return nil
}

func (f *fileMaker) kill(token string) {
	f.lock.Lock()
	defer f.lock.Unlock()
	f.killed = append(f.killed, token)
}

// client returns one of the fleet, configured as the table has it.
func (f *fileMaker) client(t *testing.T, store sessionlock.Cache, opts ...sessionlock.Option) *sessionlock.Client {
	opts = append([]sessionlock.Option{sessionlock.WithIdleTTL(fileMakerIdle), sessionlock.WithRejected(byCode)}, opts...)
	return newClient(t, f.upstream, store, opts...)
}

// noCache stores nothing and says it did.
type noCache struct{}

func (noCache) Load(context.Context, string) ([]byte, error) { return nil, nil }
func (noCache) CompareAndSwap(_ context.Context, _ string, _, next []byte, _ time.Duration) ([]byte, error) {
	return next, nil
}

// lossy is a MemoryCache whose content can be lost.
type lossy struct {
	mu sync.Mutex
	in *sessionlock.MemoryCache
}

func newLossy() *lossy { return &lossy{in: new(sessionlock.MemoryCache)} }

func (l *lossy) now() *sessionlock.MemoryCache {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.in
}

func (l *lossy) lose() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.in = new(sessionlock.MemoryCache)
}

func (l *lossy) Load(ctx context.Context, name string) ([]byte, error) {
	return l.now().Load(ctx, name)
}

func (l *lossy) CompareAndSwap(ctx context.Context, name string, old, next []byte, ttl time.Duration) ([]byte, error) {
	return l.now().CompareAndSwap(ctx, name, old, next, ttl)
}

// put stores token for bob.
func put(t *testing.T, c *sessionlock.Client, token string) sessionlock.Session {
	t.Helper()
	s, err := c.Put(t.Context(), "bob", sessionlock.Session{Token: sessionlock.NewToken(token)})
	require.NoError(t, err)
	return s
}

// scopeOfBob runs fn in a scope of bob and waits for its end.
func scopeOfBob(t *testing.T, c *sessionlock.Client, fn func(ctx context.Context, sc *sessionlock.Scope)) {
	t.Helper()
	require.NoError(t, c.Scope(t.Context(), "bob", func(ctx context.Context, sc *sessionlock.Scope) error {
		fn(ctx, sc)
		return nil
	}))
	synctest.Wait()
}

// used returns the token a Do ran with last, and asserts that it succeeded.
func used(ctx context.Context, t *testing.T, d sessionlock.Doer) (token string) {
	t.Helper()
	assert.NoError(t, d.Do(ctx, func(_ context.Context, s sessionlock.Session) error {
		token = s.Token.Reveal()
		return nil
	}))
	return token
}

// everyGrace lets every grace pass, and what is logged out after it.
func everyGrace() {
	time.Sleep(31 * time.Second)
	synctest.Wait()
}

// stored returns the token that the fleet shares, "" when there is none.
func stored(t *testing.T, store sessionlock.Cache) string {
	t.Helper()
	u := &upstream{}
	u.script = func(context.Context, string, int) (sessionlock.Session, error) {
		return sessionlock.Session{}, sessionlock.RetryAfter(errDead, 0)
	}
	c := newClient(t, u, store)
	st, err := c.Inspect(t.Context(), "bob")
	require.NoError(t, err)
	if st.Generation == 0 {
		return ""
	}
	return tokenOf(t, c, "bob")
}

// retryOff is a classifier that knows no rejection.
func retryOff(error) sessionlock.Verdict { return sessionlock.NotRejected }

// The table of persistent sessions, its rows in its words.
func TestPersistentSessionsCallForCall(t *testing.T) {
	type fleet struct {
		*fileMaker
		t         *testing.T
		store     *lossy
		us, other *sessionlock.Client
	}
	scope := func(f *fleet, fn func(ctx context.Context, sc *sessionlock.Scope) error) error {
		return f.us.Scope(context.Background(), "bob", fn)
	}
	calls := func(f *fleet, n int) func(context.Context, *sessionlock.Scope) error {
		return func(ctx context.Context, sc *sessionlock.Scope) (err error) {
			for range n {
				time.Sleep(time.Minute)
				err = errors.Join(err, sc.Do(ctx, f.request))
			}
			time.Sleep(time.Minute)
			return err
		}
	}
	single := func(f *fleet) error { return f.us.Do(context.Background(), "bob", f.request) }
	inside := func(what func(f *fleet)) func(f *fleet) error {
		return func(f *fleet) error {
			return scope(f, func(ctx context.Context, sc *sessionlock.Scope) error {
				if err := sc.Do(ctx, f.request); err != nil {
					return err
				}
				what(f)
				return sc.Do(ctx, f.request)
			})
		}
	}
	const fresh, spent = true, false
	for _, row := range []struct {
		name          string
		cache         sessionlock.Cache // nil: one that is shared
		off           bool              // retry
		warm          time.Duration     // how old the session is that another worker has stored; 0: none
		before        func(f *fleet)
		run           func(f *fleet) error
		err           error
		logins, calls int // of all: what the upstream saw since the table's row began
		refused       int // of calls
		logouts       []string
		after         string // the token stored; "": none
		life          bool   // fresh: renewed at the end
	}{
		{name: "cold, scope with 3 calls", run: func(f *fleet) error { return scope(f, calls(f, 3)) }, logins: 1, calls: 3, after: "bob/1", life: fresh},
		{name: "warm, scope with 3 calls", warm: 5 * time.Minute, run: func(f *fleet) error { return scope(f, calls(f, 3)) }, calls: 3, after: "bob/1", life: fresh},
		{name: "warm, scope without calls", warm: 5 * time.Minute, run: func(f *fleet) error { return scope(f, calls(f, 0)) }, after: "bob/1", life: fresh},
		{name: "warm, single call without scope", warm: time.Minute, run: single, calls: 1, after: "bob/1", life: spent},
		{name: "cached token dead", warm: 5 * time.Minute, before: func(f *fleet) { f.kill("bob/1") }, run: single, logins: 1, calls: 2, refused: 1, after: "bob/2", life: fresh},
		{name: "cached token dead, in a scope", warm: 5 * time.Minute, before: func(f *fleet) { f.kill("bob/1") }, run: func(f *fleet) error { return scope(f, calls(f, 3)) }, logins: 1, calls: 4, refused: 1, after: "bob/2", life: fresh},
		{name: "another worker replaced the token during our scope", warm: 5 * time.Minute, run: inside(func(f *fleet) {
			put(f.t, f.other, "another's")
		}), calls: 2, logouts: []string{"bob/1"}, after: "another's", life: fresh},
		{name: "another worker replaced the token after our entry had expired", warm: 5 * time.Minute, run: inside(func(f *fleet) {
			time.Sleep(fileMakerIdle)
			assert.NoError(t, f.other.Do(context.Background(), "bob", f.request))
		}), logins: 1, calls: 3, logouts: []string{"bob/1"}, after: "bob/2", life: fresh},
		{name: "entry expired during our scope", warm: 5 * time.Minute, run: inside(func(*fleet) { time.Sleep(fileMakerIdle) }), calls: 2, logouts: []string{"bob/1"}},
		{name: "entry lost during our scope", warm: 5 * time.Minute, run: inside(func(f *fleet) { f.store.lose() }), calls: 2, logouts: []string{"bob/1"}},
		{name: "no cache, retry off", cache: noCache{}, off: true, run: func(f *fleet) error { return scope(f, calls(f, 3)) }, logins: 1, calls: 3, logouts: []string{"bob/1"}},
		{
			name: "no cache, retry off, 952 in scope", cache: noCache{}, off: true, run: inside(func(f *fleet) { f.kill("bob/1") }),
			err: &upstreamError{952}, logins: 1, calls: 2, refused: 1, logouts: []string{"bob/1"},
		},
		{name: "no cache, retry on, 952 in scope", cache: noCache{}, before: func(f *fleet) { f.kill("bob/1") }, run: func(f *fleet) error { return scope(f, calls(f, 3)) }, logins: 2, calls: 4, refused: 1, logouts: []string{"bob/2"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := &fleet{fileMaker: newFileMaker(), t: t, store: newLossy()}
				var store sessionlock.Cache = f.store
				if row.cache != nil {
					store = row.cache
				}
				var opts []sessionlock.Option
				if row.off {
					opts = append(opts, sessionlock.WithRejected(retryOff))
				}
				f.us, f.other = f.client(t, store, opts...), f.client(t, store)
				if row.warm > 0 {
					tokenOf(t, f.other, "bob")
					time.Sleep(row.warm)
				}
				if row.before != nil {
					row.before(f)
				}
				had, start := f.logins(), time.Now()
				err := row.run(f)
				assert.Equal(t, row.err, err)
				synctest.Wait()
				st, err := f.us.Inspect(t.Context(), "bob")
				require.NoError(t, err)
				end := time.Now()
				everyGrace()
				assert.Equal(t, row.logins, f.logins()-had, "logins")
				assert.Equal(t, row.calls, f.data, "data calls")
				assert.Equal(t, row.refused, f.refused, "of them refused")
				assert.Equal(t, append([]string{}, row.logouts...), f.ended(), "logouts")
				assert.Equal(t, row.after, stored(t, store), "the token stored")
				switch {
				case row.after == "":
				case row.life == fresh:
					assert.WithinDuration(t, end.Add(fileMakerLife), st.Expiry, 0, "renewed")
				default:
					assert.WithinDuration(t, start.Add(-row.warm).Add(fileMakerLife), st.Expiry, 0, "not renewed")
				}
			})
		})
	}
}

// Where use alone renewed nothing, a session used without a scope would be lost
// to the fleet while it lives.
func TestUseWithoutAScopeRenewsTheLifeToo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, store := newFileMaker(), new(sessionlock.MemoryCache)
		tokenOf(t, f.client(t, store), "bob")
		for range 10 {
			time.Sleep(5 * time.Minute)
			require.NoError(t, f.client(t, store).Do(t.Context(), "bob", f.request))
		}
		assert.Equal(t, 1, f.logins())
	})
}

func TestEndOfAScopeRenewsTheLife(t *testing.T) {
	for name, tc := range map[string]struct {
		opts []sessionlock.Option
		want time.Duration // of life after the end
	}{
		"with an idle TTL":    {nil, fileMakerLife},
		"up to the max age":   {[]sessionlock.Option{sessionlock.WithMaxAge(15 * time.Minute)}, 10 * time.Minute},
		"without an idle TTL": {[]sessionlock.Option{sessionlock.WithIdleTTL(0), sessionlock.WithMaxAge(fileMakerIdle)}, fileMakerIdle - 5*time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f, store := newFileMaker(), new(sessionlock.MemoryCache)
				c := f.client(t, store, tc.opts...)
				scopeOfBob(t, c, func(ctx context.Context, sc *sessionlock.Scope) {
					assert.NoError(t, sc.Do(ctx, f.request))
					time.Sleep(5 * time.Minute)
				})
				st, err := c.Inspect(t.Context(), "bob")
				require.NoError(t, err)
				assert.WithinDuration(t, time.Now().Add(tc.want), st.Expiry, 0)
				assert.Equal(t, 1, f.logins())
				assert.Empty(t, f.ended())
			})
		})
	}
}

func TestScopePinsOneSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u := new(sessionlock.MemoryCache), &upstream{life: time.Hour}
		a, b := newClient(t, u, store), newClient(t, u, store)
		scopeOfBob(t, a, func(ctx context.Context, sc *sessionlock.Scope) {
			assert.Equal(t, "bob/1", used(ctx, t, sc))
			put(t, b, "theirs")
			time.Sleep(time.Second)
			assert.Equal(t, "theirs", tokenOf(t, a, "bob"), "the client goes on with the newer one")
			assert.Equal(t, "bob/1", used(ctx, t, sc), "the scope does not")
		})
		assert.Equal(t, "theirs", stored(t, store))
	})
}

// A late rejection is of the session it was given, not of what is pinned by then.
func TestLateRejectionLeavesThePinnedSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, store := newFileMaker(), new(sessionlock.MemoryCache)
		c, peer := f.client(t, store), f.client(t, store)
		scopeOfBob(t, c, func(ctx context.Context, sc *sessionlock.Scope) {
			err := sc.Do(ctx, func(ctx context.Context, _ sessionlock.Session) error {
				assert.NoError(t, sc.Do(ctx, rejectOld("bob/1")))
				put(t, peer, "theirs")
				time.Sleep(time.Second)
				return &upstreamError{112}
			})
			require.ErrorIs(t, err, sessionlock.ErrRejected)
			assert.Equal(t, "bob/2", used(ctx, t, sc))
		})
	})
}

func TestCallOfAScopeCostsNoIO(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sp, u := &spy{}, &upstream{life: time.Hour}
		c := newClient(t, u, spyCache{sp, new(sessionlock.MemoryCache)})
		scopeOfBob(t, c, func(ctx context.Context, sc *sessionlock.Scope) {
			time.Sleep(time.Second) // for the look that follows a login
			before := sp.count()
			for range 10 {
				assert.NoError(t, sc.Do(ctx, nothing))
				time.Sleep(time.Second)
			}
			assert.Equal(t, before, sp.count())
		})
	})
}

func TestScopeGoesOnWithAnotherSessionWhenItsExpiryIsOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := &upstream{life: time.Hour}
		c := newClient(t, u, new(sessionlock.MemoryCache))
		setUps := 0
		scopeOfBob(t, c, func(ctx context.Context, sc *sessionlock.Scope) {
			sc.SetUp(func(context.Context, sessionlock.Session) error { setUps++; return nil })
			assert.Equal(t, "bob/1", used(ctx, t, sc))
			time.Sleep(time.Hour - time.Nanosecond)
			assert.Equal(t, "bob/1", used(ctx, t, sc))
			time.Sleep(time.Nanosecond)
			assert.Equal(t, "bob/2", used(ctx, t, sc))
		})
		assert.Equal(t, 2, setUps)
	})
}

// A caller that comes late must not be given, for its second run, a session whose
// expiry is over.
func TestLateRejectionInAScopeIsNotGivenAnExpiredSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := &upstream{life: time.Hour}
		c := newClient(t, u, new(sessionlock.MemoryCache))
		scopeOfBob(t, c, func(ctx context.Context, sc *sessionlock.Scope) {
			var saw []string
			assert.NoError(t, sc.Do(ctx, func(ctx context.Context, s sessionlock.Session) error {
				saw = append(saw, s.Token.Reveal())
				if len(saw) == 1 {
					assert.NoError(t, sc.Do(ctx, rejectOld("bob/1")))
					time.Sleep(2 * time.Hour)
					return sessionlock.Reject(errDead)
				}
				return nil
			}))
			assert.Equal(t, []string{"bob/1", "bob/3"}, saw)
		})
	})
}

func TestScopeInsideAScope(t *testing.T) {
	open := func(t *testing.T, opts ...sessionlock.Option) (*upstream, *sessionlock.Client) {
		u := &upstream{life: time.Hour}
		return u, newClient(t, u, noCache{}, opts...)
	}
	t.Run("of the same key is the same", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			u, c := open(t)
			scopeOfBob(t, c, func(ctx context.Context, outer *sessionlock.Scope) {
				for range 2 {
					assert.NoError(t, c.Scope(ctx, "bob", func(ctx context.Context, inner *sessionlock.Scope) error {
						assert.Same(t, outer, inner)
						return c.Scope(ctx, "bob", func(ctx context.Context, innermost *sessionlock.Scope) error {
							assert.Same(t, outer, innermost)
							assert.Equal(t, "bob/1", used(ctx, t, innermost))
							return nil
						})
					}))
					everyGrace()
					assert.Empty(t, u.ended(), "the end of an inner one does nothing")
				}
				assert.Equal(t, "bob/1", used(ctx, t, outer))
				assert.Empty(t, u.ended())
			})
			everyGrace()
			assert.Equal(t, []string{"bob/1"}, u.ended(), "the outermost ends, once")
			assert.Equal(t, 1, u.logins())
		})
	})
	t.Run("returns its func's error", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			_, c := open(t)
			want := errors.New("inner")
			err := c.Scope(t.Context(), "bob", func(ctx context.Context, _ *sessionlock.Scope) error {
				return c.Scope(ctx, "bob", func(context.Context, *sessionlock.Scope) error { return want })
			})
			assert.Equal(t, want, err)
		})
	})
	t.Run("of another key has a session of its own", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			u, c := open(t)
			scopeOfBob(t, c, func(ctx context.Context, bob *sessionlock.Scope) {
				assert.NoError(t, c.Scope(ctx, "eve", func(ctx context.Context, eve *sessionlock.Scope) error {
					assert.NotSame(t, bob, eve)
					assert.Equal(t, "eve/2", used(ctx, t, eve))
					assert.Equal(t, "bob/1", used(ctx, t, bob))
					return c.Scope(ctx, "bob", func(_ context.Context, again *sessionlock.Scope) error {
						assert.Same(t, bob, again, "also past a scope of another key")
						return nil
					})
				}))
				synctest.Wait()
				assert.Equal(t, []string{"eve/2"}, u.ended())
			})
			assert.Equal(t, []string{"eve/2", "bob/1"}, u.ended())
		})
	})
	t.Run("of another client has a session of its own", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			_, c := open(t)
			_, other := open(t)
			scopeOfBob(t, c, func(ctx context.Context, ours *sessionlock.Scope) {
				assert.NoError(t, other.Scope(ctx, "bob", func(_ context.Context, theirs *sessionlock.Scope) error {
					assert.NotSame(t, ours, theirs)
					return nil
				}))
			})
		})
	})
	t.Run("by a context that has outlived its scope is a new one", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			u, c := open(t)
			var leaked context.Context
			var over *sessionlock.Scope
			scopeOfBob(t, c, func(ctx context.Context, sc *sessionlock.Scope) { leaked, over = ctx, sc })
			for n := range 2 {
				require.NoError(t, c.Scope(leaked, "bob", func(ctx context.Context, sc *sessionlock.Scope) error {
					assert.NotSame(t, over, sc)
					assert.Equal(t, "bob/"+strconv.Itoa(n+2), used(ctx, t, sc))
					return nil
				}))
				synctest.Wait()
			}
			assert.Equal(t, []string{"bob/1", "bob/2", "bob/3"}, u.ended())
		})
	})
}

// Two scopes of one client that end with the same orphan.
func TestScopesThatShareAnOrphanEndItOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u := newLossy(), &upstream{life: time.Hour}
		c := newClient(t, u, store)
		tokenOf(t, c, "bob")
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				assert.NoError(t, c.Scope(t.Context(), "bob", func(context.Context, *sessionlock.Scope) error {
					time.Sleep(time.Minute)
					return nil
				}))
			})
		}
		time.Sleep(time.Second)
		store.lose()
		wg.Wait()
		everyGrace()
		assert.Equal(t, []string{"bob/1"}, u.ended())
		assert.Equal(t, 1, u.logins())
	})
}

func TestScopeEndsHoweverItsFuncDoes(t *testing.T) {
	for name, end := range map[string]func(){
		"return":  func() {},
		"panic":   func() { panic("canary") },
		"goexit":  runtime.Goexit,
		"nothing": nil,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				u := &upstream{life: time.Hour}
				c := newClient(t, u, noCache{})
				var sc *sessionlock.Scope
				var panicked any
				var wg sync.WaitGroup
				wg.Go(func() {
					defer func() { panicked = recover() }()
					err := c.Scope(t.Context(), "bob", func(ctx context.Context, s *sessionlock.Scope) error {
						sc = s
						return c.Scope(ctx, "bob", func(ctx context.Context, s *sessionlock.Scope) error {
							if end == nil {
								return nil
							}
							return s.Do(ctx, func(context.Context, sessionlock.Session) error { end(); return nil })
						})
					})
					assert.NoError(t, err)
				})
				wg.Wait()
				synctest.Wait()
				if name == "panic" {
					assert.Equal(t, "canary", panicked, "it passes through")
				} else {
					assert.Nil(t, panicked)
				}
				assert.Equal(t, []string{"bob/1"}, u.ended(), "once, although two ends were passed")
				require.ErrorIs(t, sc.Do(t.Context(), nothing), sessionlock.ErrInvalid)
				require.ErrorIs(t, sc.Do(t.Context(), nothing), sessionlock.ErrInvalid)
				everyGrace()
				assert.Equal(t, []string{"bob/1"}, u.ended())
				assert.Equal(t, "bob/2", tokenOf(t, c, "bob"), "nothing stays locked")
			})
		})
	}
}

// The end of a scope is beside its caller, and so is who comes too late.
func TestScopeThatIsOverIsInvalidAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := &upstream{life: time.Hour}
		c := newClient(t, u, noCache{}, sessionlock.WithLogout(func(ctx context.Context, _ sessionlock.Session) error {
			<-ctx.Done()
			return ctx.Err()
		}))
		start := time.Now()
		var over *sessionlock.Scope
		var leaked context.Context
		scopeOfBob(t, c, func(ctx context.Context, sc *sessionlock.Scope) { leaked, over = ctx, sc })
		ran := false
		err := over.Do(t.Context(), func(context.Context, sessionlock.Session) error { ran = true; return nil })
		require.ErrorIs(t, err, sessionlock.ErrInvalid)
		assert.NotContains(t, err.Error(), "bob")
		_, err = sessionlock.Call(t.Context(), over, func(context.Context, sessionlock.Session) (int, error) { return 1, nil })
		require.ErrorIs(t, err, sessionlock.ErrInvalid)
		over.SetUp(nothing)
		require.NoError(t, c.Scope(leaked, "bob", func(context.Context, *sessionlock.Scope) error { return nil }))
		assert.False(t, ran)
		assert.Equal(t, start, time.Now(), "nobody waited for a logout that hangs")

		left := make(chan struct{})
		var wg sync.WaitGroup
		scopeOfBob(t, c, func(ctx context.Context, sc *sessionlock.Scope) {
			over = sc
			sc.SetUp(func(context.Context, sessionlock.Session) error { <-left; return nil })
			wg.Go(func() { _ = sc.Do(ctx, nothing) })
			synctest.Wait()
		})
		require.ErrorIs(t, over.Do(t.Context(), nothing), sessionlock.ErrInvalid, "nor for a set-up that was left running")
		close(left)
		wg.Wait()
	})
}

func TestScopeRefusesBadArguments(t *testing.T) {
	sp, u := &spy{}, &upstream{life: time.Hour}
	c := newClient(t, u, spyCache{sp, new(sessionlock.MemoryCache)})
	fn := func(context.Context, *sessionlock.Scope) error { return nil }
	for name, err := range map[string]error{
		"blank key": c.Scope(t.Context(), " ", fn),
		"long key":  c.Scope(t.Context(), canary+string(make([]byte, 256)), fn),
		"context":   c.Scope(nil, canary, fn), //nolint:staticcheck // on purpose
		"func":      c.Scope(t.Context(), canary, nil),
	} {
		refusedArgument(t, err, name)
	}
	assert.Zero(t, sp.count())
	require.NoError(t, c.Scope(t.Context(), canary, func(ctx context.Context, sc *sessionlock.Scope) error {
		refusedArgument(t, sc.Do(nil, nothing), "context") //nolint:staticcheck // on purpose
		refusedArgument(t, sc.Do(ctx, nil), "func")
		return nil
	}))
}

func TestSetUpRunsOnceForEachSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := &upstream{life: time.Hour}
		c := newClient(t, u, new(sessionlock.MemoryCache))
		var log []string
		scopeOfBob(t, c, func(ctx context.Context, sc *sessionlock.Scope) {
			sc.SetUp(func(_ context.Context, s sessionlock.Session) error {
				log = append(log, "set up "+s.Token.Reveal())
				return nil
			})
			call := func(dead string) {
				assert.NoError(t, sc.Do(ctx, func(_ context.Context, s sessionlock.Session) error {
					log = append(log, "call "+s.Token.Reveal())
					return rejectOld(dead)(nil, s)
				}))
			}
			assert.Empty(t, log, "not before it is needed")
			call("")
			call("")
			call("bob/1")
			call("")
			time.Sleep(time.Minute) // bob/2 is no longer young
			sc.SetUp(nil)
			call("bob/2")
		})
		assert.Equal(t, []string{
			"set up bob/1", "call bob/1", "call bob/1", "call bob/1",
			"set up bob/2", "call bob/2", "call bob/2", "call bob/2",
			"call bob/3",
		}, log)
		assert.Equal(t, 3, u.logins())
	})
}

func TestFailedSetUpIsTheErrorOfItsCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := &upstream{life: time.Hour}
		c := newClient(t, u, new(sessionlock.MemoryCache))
		want := errors.New("no such layout")
		setUps, runs := 0, 0
		scopeOfBob(t, c, func(ctx context.Context, sc *sessionlock.Scope) {
			sc.SetUp(func(context.Context, sessionlock.Session) error {
				if setUps++; setUps == 1 {
					return want
				}
				return nil
			})
			fn := func(context.Context, sessionlock.Session) error { runs++; return nil }
			assert.Equal(t, want, sc.Do(ctx, fn))
			assert.Zero(t, runs)
			assert.NoError(t, sc.Do(ctx, fn), "the next call tries again")
			assert.NoError(t, sc.Do(ctx, fn))
		})
		assert.Equal(t, 2, setUps)
		assert.Equal(t, 2, runs)
		assert.Equal(t, 1, u.logins())
	})
}

func TestPanicInSetUpPassesThrough(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := &upstream{life: time.Hour}
		c := newClient(t, u, new(sessionlock.MemoryCache))
		scopeOfBob(t, c, func(ctx context.Context, sc *sessionlock.Scope) {
			setUps := 0
			sc.SetUp(func(context.Context, sessionlock.Session) error {
				if setUps++; setUps == 1 {
					panic("canary")
				}
				return nil
			})
			assert.PanicsWithValue(t, "canary", func() { _ = sc.Do(ctx, nothing) })
			assert.NoError(t, sc.Do(ctx, nothing), "nothing stays locked")
			assert.Equal(t, 2, setUps, "what panicked is not set up")
		})
	})
}

func TestRejectionInSetUpIsRepairedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for refused, wantRuns := range []int{1, 1, 0} { // set-ups refused, runs of the func
			u := &upstream{life: time.Hour}
			c := newClient(t, u, new(sessionlock.MemoryCache))
			setUps, runs := 0, 0
			scopeOfBob(t, c, func(ctx context.Context, sc *sessionlock.Scope) {
				sc.SetUp(func(context.Context, sessionlock.Session) error {
					if setUps++; setUps <= refused {
						return sessionlock.Reject(errDead)
					}
					return nil
				})
				err := sc.Do(ctx, func(context.Context, sessionlock.Session) error { runs++; return nil })
				if refused < 2 {
					assert.NoError(t, err)
					return
				}
				var re *sessionlock.ReauthError
				require.ErrorAs(t, err, &re)
				require.ErrorIs(t, re.First, errDead)
				require.ErrorIs(t, re.Second, errDead)
			})
			assert.Equal(t, wantRuns, runs)
			assert.Equal(t, min(refused+1, 2), setUps)
			assert.Equal(t, min(refused+1, 2), u.logins())
			everyGrace()
			assert.Empty(t, u.ended(), "what was rejected is not logged out")
		}
	})
}

// A rejection in the set-up and one in the func are the two of one call.
func TestRejectionsInSetUpAndFuncAreTwoOfOneCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := &upstream{life: time.Hour}
		c := newClient(t, u, new(sessionlock.MemoryCache))
		scopeOfBob(t, c, func(ctx context.Context, sc *sessionlock.Scope) {
			sc.SetUp(rejectOld("bob/1"))
			runs := 0
			err := sc.Do(ctx, func(context.Context, sessionlock.Session) error {
				runs++
				return sessionlock.Reject(errWindow)
			})
			var re *sessionlock.ReauthError
			require.ErrorAs(t, err, &re)
			require.ErrorIs(t, re.First, errDead)
			require.ErrorIs(t, re.Second, errWindow)
			assert.Equal(t, 1, runs)
			assert.Equal(t, 2, u.logins())
		})
	})
}

// meanwhile is a context that has something happen when it is asked for the nth time.
type meanwhile struct {
	context.Context //nolint:containedctx // it is one
	n               atomic.Int32
	happen          func()
}

func (m *meanwhile) Err() error {
	if m.n.Add(-1) == 0 {
		m.happen()
	}
	return m.Context.Err()
}

// A caller that still holds a session which another has replaced meanwhile does not
// set it up: then the newer one would be set up twice, and this one for nothing.
func TestReplacedSessionIsNotSetUpAgain(t *testing.T) {
	for at := range int32(2) { // before the session is found; before it is set up
		synctest.Test(t, func(t *testing.T) {
			u := &upstream{life: time.Hour}
			c := newClient(t, u, new(sessionlock.MemoryCache))
			var log []string
			scopeOfBob(t, c, func(ctx context.Context, sc *sessionlock.Scope) {
				sc.SetUp(func(_ context.Context, s sessionlock.Session) error {
					log = append(log, "set up "+s.Token.Reveal())
					return nil
				})
				assert.NoError(t, sc.Do(ctx, nothing))
				late := &meanwhile{Context: ctx, happen: func() { assert.NoError(t, sc.Do(ctx, rejectOld("bob/1"))) }}
				late.n.Store(at + 1)
				log = append(log, used(late, t, sc), used(ctx, t, sc))
			})
			assert.Equal(t, []string{"set up bob/1", "set up bob/2", "bob/2", "bob/2"}, log)
			assert.Equal(t, 2, u.logins())
		})
	}
}

func TestScopeIsReentrantWhereItMustNotBe(t *testing.T) {
	within := func(t *testing.T, f func()) {
		t.Helper()
		start := time.Now()
		f()
		assert.Equal(t, start, time.Now(), "at once")
	}
	type setUp func(context.Context, sessionlock.Session) error
	for name, f := range map[string]func(*sessionlock.Client, *sessionlock.Scope) setUp{
		"Do inside SetUp": func(_ *sessionlock.Client, bob *sessionlock.Scope) setUp {
			return func(ctx context.Context, _ sessionlock.Session) error { return bob.Do(ctx, nothing) }
		},
		"the scope again inside SetUp": func(c *sessionlock.Client, _ *sessionlock.Scope) setUp {
			return func(ctx context.Context, _ sessionlock.Session) error {
				return c.Scope(ctx, "bob", func(context.Context, *sessionlock.Scope) error { return nil })
			}
		},
		"Do inside the SetUp of a scope inside SetUp": func(c *sessionlock.Client, bob *sessionlock.Scope) setUp {
			return func(ctx context.Context, _ sessionlock.Session) error {
				return c.Scope(ctx, "eve", func(ctx context.Context, eve *sessionlock.Scope) error {
					eve.SetUp(func(ctx context.Context, _ sessionlock.Session) error { return bob.Do(ctx, nothing) })
					return eve.Do(ctx, nothing)
				})
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newClient(t, &upstream{life: time.Hour}, new(sessionlock.MemoryCache))
				scopeOfBob(t, c, func(ctx context.Context, bob *sessionlock.Scope) {
					ctx, cancel := context.WithTimeout(ctx, time.Minute)
					defer cancel()
					bob.SetUp(f(c, bob))
					within(t, func() { require.ErrorIs(t, bob.Do(ctx, nothing), sessionlock.ErrReentrant) })
				})
			})
		})
	}
	t.Run("Do and the scope again inside a login of its key", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			u := &upstream{life: time.Hour}
			var sc *sessionlock.Scope
			var c *sessionlock.Client
			u.script = func(ctx context.Context, key string, n int) (sessionlock.Session, error) {
				if n == 2 {
					assert.ErrorIs(t, sc.Do(ctx, nothing), sessionlock.ErrReentrant)
					assert.ErrorIs(t, c.Scope(ctx, key, func(context.Context, *sessionlock.Scope) error { return nil }), sessionlock.ErrReentrant)
				}
				return u.grant(key, n), nil
			}
			c = newClient(t, u, new(sessionlock.MemoryCache))
			scopeOfBob(t, c, func(ctx context.Context, s *sessionlock.Scope) {
				sc = s
				within(t, func() { assert.NoError(t, sc.Do(ctx, rejectOld("bob/1"))) })
			})
			assert.Equal(t, 2, u.logins())
		})
	})
	t.Run("Do inside Do is not", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			c := newClient(t, &upstream{life: time.Hour}, new(sessionlock.MemoryCache))
			scopeOfBob(t, c, func(ctx context.Context, sc *sessionlock.Scope) {
				assert.NoError(t, sc.Do(ctx, func(ctx context.Context, s sessionlock.Session) error {
					assert.Equal(t, s.Token.Reveal(), used(ctx, t, sc))
					return nil
				}))
			})
		})
	})
	t.Run("SetUp inside SetUp is not, and does not hang", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			c := newClient(t, &upstream{life: time.Hour}, new(sessionlock.MemoryCache))
			scopeOfBob(t, c, func(ctx context.Context, sc *sessionlock.Scope) {
				runs := 0
				sc.SetUp(func(context.Context, sessionlock.Session) error {
					runs++
					sc.SetUp(nil)
					return nil
				})
				assert.NoError(t, sc.Do(ctx, nothing))
				assert.NoError(t, sc.Do(ctx, nothing))
				assert.Equal(t, 1, runs)
			})
		})
	})
}

func TestCallersOfAScopeShareOneRenewal(t *testing.T) {
	for _, apart := range []time.Duration{0, 50 * time.Millisecond} { // how far apart their rejections are
		t.Run(apart.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				u := &upstream{life: time.Hour, takes: 200 * time.Millisecond}
				c := newClient(t, u, new(sessionlock.MemoryCache))
				var mu sync.Mutex
				setUps := map[string]int{}
				var saw [50][]string
				scopeOfBob(t, c, func(ctx context.Context, sc *sessionlock.Scope) {
					sc.SetUp(func(_ context.Context, s sessionlock.Session) error {
						mu.Lock()
						defer mu.Unlock()
						setUps[s.Token.Reveal()]++
						return nil
					})
					var wg sync.WaitGroup
					for i := range saw {
						wg.Go(func() {
							assert.NoError(t, sc.Do(ctx, func(_ context.Context, s sessionlock.Session) error {
								saw[i] = append(saw[i], s.Token.Reveal())
								time.Sleep(time.Second + time.Duration(i)*apart)
								return rejectOld("bob/1")(nil, s)
							}))
						})
					}
					wg.Wait()
				})
				for i := range saw {
					assert.Equal(t, []string{"bob/1", "bob/2"}, saw[i])
				}
				assert.Equal(t, map[string]int{"bob/1": 1, "bob/2": 1}, setUps)
				assert.Equal(t, 2, u.logins())
			})
		})
	}
}

// P4: late rejections in the scopes of fifty processes.
func TestRejectionsInScopesOfAFleetCostOneLogin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u := new(sessionlock.MemoryCache), &upstream{life: time.Hour, takes: 200 * time.Millisecond}
		var wg sync.WaitGroup
		for i := range 50 {
			c := newClient(t, u, store)
			wg.Go(func() {
				assert.NoError(t, c.Scope(t.Context(), "bob", func(ctx context.Context, sc *sessionlock.Scope) error {
					assert.NoError(t, sc.Do(ctx, nothing))
					time.Sleep(5*time.Second + time.Duration(i)*20*time.Millisecond)
					err := sc.Do(ctx, rejectOld("bob/1"))
					assert.Equal(t, "bob/2", used(ctx, t, sc))
					return err
				}))
			})
		}
		wg.Wait()
		everyGrace()
		assert.Equal(t, 2, u.logins())
		assert.Empty(t, u.ended())
		assert.Equal(t, "bob/2", stored(t, store))
	})
}

// P8 holds for each call of a scope, whatever is refused and whatever there was
// before.
func TestCallInAScopeRunsTwiceAndLogsInOnceAtMost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for pattern := range 1 << 7 { // which sessions and set-ups are refused
			bit := func(n int) bool { return pattern&(1<<n) != 0 }
			u, store := &upstream{life: time.Hour}, new(sessionlock.MemoryCache)
			c := newClient(t, u, store, sessionlock.WithReauthBackoff(time.Millisecond, time.Millisecond))
			scopeOfBob(t, c, func(ctx context.Context, sc *sessionlock.Scope) {
				if bit(0) {
					sc.SetUp(func(context.Context, sessionlock.Session) error {
						if bit(1 + u.logins()%3) {
							return sessionlock.Reject(errDead)
						}
						return nil
					})
				}
				for range 4 {
					runs, before := 0, -1
					err := sc.Do(ctx, func(context.Context, sessionlock.Session) error {
						if runs++; runs == 1 {
							before = u.logins()
						}
						if bit(4 + (runs+u.logins())%3) {
							return sessionlock.Reject(errWindow)
						}
						return nil
					})
					assert.LessOrEqual(t, runs, 2, "pattern %b", pattern)
					if before >= 0 {
						assert.LessOrEqual(t, u.logins()-before, 1, "pattern %b", pattern)
					}
					if err != nil {
						assert.ErrorIs(t, err, sessionlock.ErrRejected)
					}
					time.Sleep(time.Second)
				}
			})
			everyGrace()
			assert.Empty(t, u.ended(), "pattern %b", pattern)
		}
	})
}

func TestScopeGoesOnAfterAFailedRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, store := newFileMaker(), new(sessionlock.MemoryCache)
		down := errors.New("no answer")
		f.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
			if n == 2 {
				return sessionlock.Session{}, sessionlock.RetryAfter(down, 0)
			}
			return f.grant(key, n), nil
		}
		c := f.client(t, store)
		var after string
		scopeOfBob(t, c, func(ctx context.Context, sc *sessionlock.Scope) {
			assert.NoError(t, sc.Do(ctx, f.request))
			f.kill("bob/1")
			err := sc.Do(ctx, f.request)
			var re *sessionlock.ReauthError
			var first *upstreamError
			require.ErrorAs(t, err, &re)
			require.ErrorAs(t, re.First, &first)
			assert.Equal(t, 952, first.Code)
			require.ErrorIs(t, re.Second, down)

			err = sc.Do(ctx, f.request)
			require.ErrorIs(t, err, sessionlock.ErrSuppressed, "still none: the back-off runs")
			assert.Equal(t, 2, f.data, "and nothing was run")

			time.Sleep(time.Second)
			after = used(ctx, t, sc)
			assert.NoError(t, sc.Do(ctx, f.request))
			assert.NoError(t, c.Scope(ctx, "bob", func(_ context.Context, inner *sessionlock.Scope) error {
				assert.Same(t, sc, inner, "the scope was not left")
				return nil
			}))
			assert.Equal(t, 3, f.logins(), "one session for all that follow")
		})
		assert.Equal(t, "bob/3", after)
		assert.Equal(t, "bob/3", stored(t, store))
		everyGrace()
		assert.Empty(t, f.ended())
	})
	t.Run("its end forgets", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f, store := newFileMaker(), new(sessionlock.MemoryCache)
			f.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
				if n == 2 {
					return sessionlock.Session{}, sessionlock.RetryAfter(errDead, 0)
				}
				return f.grant(key, n), nil
			}
			c := f.client(t, store)
			var over *sessionlock.Scope
			scopeOfBob(t, c, func(ctx context.Context, sc *sessionlock.Scope) {
				over = sc
				f.kill("bob/1")
				require.Error(t, sc.Do(ctx, f.request))
			})
			everyGrace()
			assert.Equal(t, 2, f.logins(), "nobody logs in for a scope that has ended")
			assert.Equal(t, "bob/3", tokenOf(t, c, "bob"))
			require.ErrorIs(t, over.Do(t.Context(), f.request), sessionlock.ErrInvalid, "a later login does not open it again")
			assert.Empty(t, f.ended())
		})
	})
}

func TestScopeWithoutASessionIsNotRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := &upstream{life: time.Hour}
		wrong := errors.New("maintenance")
		u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
			if n == 1 {
				return sessionlock.Session{}, sessionlock.RetryAfter(wrong, 0)
			}
			return u.grant(key, n), nil
		}
		c := newClient(t, u, new(sessionlock.MemoryCache))
		ran := false
		err := c.Scope(t.Context(), "bob", func(context.Context, *sessionlock.Scope) error {
			ran = true
			return nil
		})
		var login *sessionlock.LoginError
		require.ErrorAs(t, err, &login)
		require.ErrorIs(t, err, wrong)
		assert.False(t, ran, "not in a scope")
		time.Sleep(time.Second)
		require.NoError(t, c.Do(t.Context(), "bob", nothing), "a call that follows logs in itself")
		assert.Equal(t, 2, u.logins())
		scopeOfBob(t, c, func(ctx context.Context, sc *sessionlock.Scope) {
			assert.Equal(t, "bob/2", used(ctx, t, sc))
		})
		everyGrace()
		assert.Empty(t, u.ended())
	})
}

// Between the login and the end of the outermost scope nothing is logged out, with
// a store or without.
func TestNothingIsLoggedOutInsideAScope(t *testing.T) {
	for name, tc := range map[string]struct {
		store sessionlock.Cache
		want  []string
	}{
		"stored":     {new(sessionlock.MemoryCache), []string{}},
		"not stored": {noCache{}, []string{"bob/1"}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFileMaker()
				c := f.client(t, tc.store)
				scopeOfBob(t, c, func(ctx context.Context, sc *sessionlock.Scope) {
					for range 3 {
						assert.NoError(t, sc.Do(ctx, f.request))
						assert.NoError(t, c.Scope(ctx, "bob", func(ctx context.Context, sc *sessionlock.Scope) error { return sc.Do(ctx, f.request) }))
						time.Sleep(time.Minute)
						assert.Empty(t, f.ended())
					}
				})
				everyGrace()
				assert.Equal(t, tc.want, f.ended())
				assert.Equal(t, 1, f.logins())
				assert.Zero(t, f.refused)
				if name == "stored" {
					assert.Equal(t, "bob/1", stored(t, tc.store), "forgotten by the scope, not by the fleet")
				}
			})
		})
	}
}

// What a scope ends at its end, and what it leaves alone.
func TestScopeEndsOrphansOnly(t *testing.T) {
	life := func(u *upstream) { u.life = time.Hour }
	lost := func(t *testing.T, _ context.Context, store *lossy, _, peer *sessionlock.Client, _ *sessionlock.Scope) {
		store.lose()
		time.Sleep(2 * time.Minute) // for the peer's near copy
		assert.Equal(t, "bob/2", tokenOf(t, peer, "bob"))
	}
	for name, tc := range map[string]struct {
		opts   []sessionlock.Option
		up     func(u *upstream)
		during func(t *testing.T, ctx context.Context, store *lossy, c, peer *sessionlock.Client, sc *sessionlock.Scope)
		atEnd  []string // logged out when the scope has ended
		total  []string // and after every grace
		after  string
	}{
		"stored": {up: life, after: "bob/1"},
		"stored under another number, with the same token": {
			up: life,
			during: func(t *testing.T, _ context.Context, _ *lossy, _, peer *sessionlock.Client, _ *sessionlock.Scope) {
				put(t, peer, "bob/1")
			},
			after: "bob/1",
		},
		"rejected by this scope, and none followed": {
			up: life,
			during: func(t *testing.T, ctx context.Context, _ *lossy, _, _ *sessionlock.Client, sc *sessionlock.Scope) {
				require.ErrorIs(t, sc.Do(sessionlock.IdempotentContext(ctx), func(context.Context, sessionlock.Session) error {
					return sessionlock.Reject(errDead)
				}), sessionlock.ErrRejected)
			},
		},
		"rejected by this process": {
			up: life,
			during: func(t *testing.T, ctx context.Context, _ *lossy, c, _ *sessionlock.Client, _ *sessionlock.Scope) {
				require.NoError(t, c.Do(ctx, "bob", rejectOld("bob/1")))
			},
			after: "bob/2",
		},
		"rejected by another process": {
			up: life,
			during: func(t *testing.T, ctx context.Context, _ *lossy, _, peer *sessionlock.Client, _ *sessionlock.Scope) {
				require.NoError(t, peer.Do(ctx, "bob", rejectOld("bob/1")))
			},
			after: "bob/2",
		},
		"rejected, and the entry lost since": {
			up: life,
			during: func(t *testing.T, ctx context.Context, store *lossy, c, _ *sessionlock.Client, _ *sessionlock.Scope) {
				s, err := c.Session(ctx, "bob")
				require.NoError(t, err)
				require.NoError(t, c.Invalidate(ctx, s))
				store.lose()
			},
		},
		"logged out by this process": {
			up: life,
			during: func(t *testing.T, ctx context.Context, _ *lossy, c, _ *sessionlock.Client, _ *sessionlock.Scope) {
				require.NoError(t, c.Logout(ctx, "bob"))
			},
			atEnd: []string{"bob/1"}, total: []string{"bob/1"},
		},
		"logged out by another process": {
			up: life,
			during: func(t *testing.T, ctx context.Context, _ *lossy, _, peer *sessionlock.Client, _ *sessionlock.Scope) {
				require.NoError(t, peer.Logout(ctx, "bob"))
			},
			atEnd: []string{"bob/1"}, total: []string{"bob/1"},
		},
		"displaced by another process": {
			up: life,
			during: func(t *testing.T, _ context.Context, _ *lossy, _, peer *sessionlock.Client, _ *sessionlock.Scope) {
				put(t, peer, "theirs")
			},
			total: []string{"bob/1"}, after: "theirs",
		},
		"expired in the entry": { // others may hold it to the upstream's own end
			during: func(*testing.T, context.Context, *lossy, *sessionlock.Client, *sessionlock.Client, *sessionlock.Scope) {
				time.Sleep(15 * time.Minute)
			},
		},
		"expired in the entry by idleness": {
			opts: []sessionlock.Option{sessionlock.WithIdleTTL(14 * time.Minute)},
			during: func(*testing.T, context.Context, *lossy, *sessionlock.Client, *sessionlock.Client, *sessionlock.Scope) {
				time.Sleep(15 * time.Minute)
			},
			atEnd: []string{"bob/1"}, total: []string{"bob/1"},
		},
		"expired in the entry, but refreshable": {
			up: func(u *upstream) {
				u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
					s := u.grant(key, n)
					s.RefreshExpiry = time.Now().Add(24 * time.Hour)
					return s, nil
				}
			},
			opts: []sessionlock.Option{sessionlock.WithRefresh(func(context.Context, string, sessionlock.Session) (sessionlock.Session, error) {
				return sessionlock.Session{Token: sessionlock.NewToken("refreshed")}, nil
			})},
			during: func(*testing.T, context.Context, *lossy, *sessionlock.Client, *sessionlock.Client, *sessionlock.Scope) {
				time.Sleep(15 * time.Minute)
			},
		},
		"refreshed by another process": {
			opts: []sessionlock.Option{sessionlock.WithRefresh(func(context.Context, string, sessionlock.Session) (sessionlock.Session, error) {
				return sessionlock.Session{Token: sessionlock.NewToken("refreshed")}, nil
			})},
			up: func(u *upstream) {
				u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
					s := u.grant(key, n)
					s.RefreshExpiry = time.Now().Add(24 * time.Hour)
					return s, nil
				}
			},
			during: func(t *testing.T, _ context.Context, _ *lossy, _, peer *sessionlock.Client, _ *sessionlock.Scope) {
				time.Sleep(15 * time.Minute)
				assert.Equal(t, "refreshed", tokenOf(t, peer, "bob"))
			},
			after: "refreshed",
		},
		"lost by the store": {
			up: life,
			during: func(_ *testing.T, _ context.Context, store *lossy, _, _ *sessionlock.Client, _ *sessionlock.Scope) {
				store.lose()
			},
			atEnd: []string{"bob/1"}, total: []string{"bob/1"},
		},
		"lost by the store, and another made since": {
			up: life, during: lost,
			atEnd: []string{"bob/1"}, total: []string{"bob/1"}, after: "bob/2",
		},
		"lost by the store, and ended by the login that made another": {
			up: life, during: lost, opts: []sessionlock.Option{sessionlock.WithSingleSession()}, after: "bob/2",
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store, u := newLossy(), &upstream{}
				if tc.up != nil {
					tc.up(u)
				}
				c, peer := newClient(t, u, store, tc.opts...), newClient(t, u, store, tc.opts...)
				scopeOfBob(t, c, func(ctx context.Context, sc *sessionlock.Scope) {
					assert.Equal(t, "bob/1", used(ctx, t, sc))
					if tc.during != nil {
						tc.during(t, ctx, store, c, peer, sc)
					}
				})
				assert.Equal(t, append([]string{}, tc.atEnd...), u.ended(), "at the end")
				everyGrace()
				assert.Equal(t, append([]string{}, tc.total...), u.ended(), "after every grace")
				assert.Equal(t, tc.after, stored(t, store))
			})
		})
	}
}

// A slow scope that still has the old session when another worker has stored a
// new one ends neither the new one nor the old one twice.
func TestSlowEndOfAScopeSparesTheNewerSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, store := newFileMaker(), new(sessionlock.MemoryCache)
		slow, peer := f.client(t, store), f.client(t, store)
		scopeOfBob(t, slow, func(ctx context.Context, sc *sessionlock.Scope) {
			assert.NoError(t, sc.Do(ctx, f.request))
			time.Sleep(fileMakerIdle)
			require.NoError(t, peer.Do(ctx, "bob", f.request))
			assert.Equal(t, "bob/1", used(ctx, t, sc), "W4: the touch of the old one is not the new one's")
		})
		st, err := peer.Inspect(t.Context(), "bob")
		require.NoError(t, err)
		s, err := peer.Session(t.Context(), "bob")
		require.NoError(t, err)
		assert.Equal(t, s.Generation(), st.Generation)
		everyGrace()
		assert.Equal(t, []string{"bob/1"}, f.ended(), "once")
		assert.Equal(t, "bob/2", stored(t, store))
		assert.Equal(t, 2, f.logins())
	})
}

// A session whose commit was not answered belongs to this process; it is ended by
// the scope or after the grace, not by both.
func TestUnstoredSessionOfAScopeIsEndedOnce(t *testing.T) {
	for name, tc := range map[string]struct {
		scope time.Duration
		loses bool // the store, what it had of the attempt
	}{
		"short scope":                {5 * time.Second, false},
		"short scope, entry lost":    {5 * time.Second, true},
		"as long as the grace":       {30 * time.Second, true},
		"long scope":                 {time.Minute, false},
		"long scope, entry lost":     {time.Minute, true},
		"long scope, entry run out":  {20 * time.Minute, false},
		"short scope, store is back": {time.Second, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var down atomic.Bool
				store, u := newLossy(), &upstream{life: time.Hour}
				u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
					if n == 1 {
						down.Store(true)
					}
					return u.grant(key, n), nil
				}
				c := newClient(t, u, brokenCache{store, &down})
				scopeOfBob(t, c, func(ctx context.Context, sc *sessionlock.Scope) {
					assert.Equal(t, "bob/1", used(ctx, t, sc))
					down.Store(false)
					time.Sleep(time.Second) // the gate lets calls through again
					if tc.loses {
						store.lose()
					}
					time.Sleep(tc.scope - time.Second)
				})
				everyGrace()
				everyGrace()
				assert.Equal(t, []string{"bob/1"}, u.ended())
			})
		})
	}
}

// brokenCache fails every call while down.
type brokenCache struct {
	sessionlock.Cache
	down *atomic.Bool
}

func (c brokenCache) Load(ctx context.Context, name string) ([]byte, error) {
	if c.down.Load() {
		return nil, errStoreDown
	}
	return c.Cache.Load(ctx, name)
}

func (c brokenCache) CompareAndSwap(ctx context.Context, name string, old, next []byte, ttl time.Duration) ([]byte, error) {
	if c.down.Load() {
		return nil, errStoreDown
	}
	return c.Cache.CompareAndSwap(ctx, name, old, next, ttl)
}

func TestStoreDownAtTheEndOfAScopeLosesNothing(t *testing.T) {
	for name, fault := range map[string]func(context.Context) error{
		"refuses": func(context.Context) error { return errStoreDown },
		"hangs":   func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var down atomic.Bool
				sp, store, f := &spy{}, new(sessionlock.MemoryCache), newFileMaker()
				sp.before = func(ctx context.Context, _, _ string) error {
					if down.Load() {
						return fault(ctx)
					}
					return nil
				}
				c := f.client(t, spyCache{sp, store})
				start := time.Now()
				require.NoError(t, c.Scope(t.Context(), "bob", func(ctx context.Context, sc *sessionlock.Scope) error {
					assert.NoError(t, sc.Do(ctx, f.request))
					down.Store(true)
					assert.NoError(t, sc.Do(ctx, f.request), "the pinned session is served")
					return nil
				}))
				assert.Equal(t, start, time.Now(), "the caller is not delayed")
				require.NoError(t, c.Close(t.Context()))
				assert.LessOrEqual(t, time.Since(start), 2*time.Second, "bounded by the operation timeouts")
				everyGrace()
				assert.Empty(t, f.ended())
				assert.Equal(t, "bob/1", stored(t, store), "the fleet's session is where it was")
			})
		})
	}
}

func TestCancelledContextEndsACallOfAScope(t *testing.T) {
	t.Run("before it", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			sp, u := &spy{}, &upstream{life: time.Hour}
			c := newClient(t, u, spyCache{sp, new(sessionlock.MemoryCache)})
			scopeOfBob(t, c, func(ctx context.Context, sc *sessionlock.Scope) {
				synctest.Wait()
				before := sp.count()
				over, cancel := context.WithCancelCause(ctx)
				why := errors.New("user went away")
				cancel(why)
				for range 100 {
					ran := false
					for _, err := range []error{
						sc.Do(over, func(context.Context, sessionlock.Session) error { ran = true; return nil }),
						c.Scope(over, "bob", func(context.Context, *sessionlock.Scope) error { ran = true; return nil }),
					} {
						require.ErrorIs(t, err, context.Canceled)
						require.ErrorIs(t, err, why)
					}
					require.False(t, ran)
				}
				assert.Equal(t, before, sp.count(), "without I/O")
				assert.Equal(t, "bob/1", used(ctx, t, sc), "the scope goes on")
			})
			over, cancel := context.WithCancel(t.Context())
			cancel()
			require.ErrorIs(t, c.Scope(over, "bob", func(context.Context, *sessionlock.Scope) error { return nil }), context.Canceled)
			everyGrace()
			assert.Empty(t, u.ended())
		})
	})
	t.Run("while another caller renews", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			u := &upstream{life: time.Hour, takes: 5 * time.Second}
			c := newClient(t, u, new(sessionlock.MemoryCache))
			scopeOfBob(t, c, func(ctx context.Context, sc *sessionlock.Scope) {
				var wg sync.WaitGroup
				wg.Go(func() { assert.NoError(t, sc.Do(ctx, rejectOld("bob/1"))) })
				synctest.Wait()
				short, cancel := context.WithTimeout(ctx, time.Second)
				defer cancel()
				start := time.Now()
				require.ErrorIs(t, sc.Do(short, nothing), context.DeadlineExceeded)
				assert.Equal(t, time.Second, time.Since(start))
				wg.Wait()
				assert.Equal(t, "bob/2", used(ctx, t, sc))
			})
			assert.Equal(t, 2, u.logins())
		})
	})
	t.Run("while it renews", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			u := &upstream{life: time.Hour, takes: 5 * time.Second}
			c := newClient(t, u, new(sessionlock.MemoryCache))
			scopeOfBob(t, c, func(ctx context.Context, sc *sessionlock.Scope) {
				short, cancel := context.WithTimeout(ctx, time.Second)
				defer cancel()
				err := sc.Do(short, rejectOld("bob/1"))
				require.ErrorIs(t, err, context.DeadlineExceeded)
				require.ErrorIs(t, err, errDead)
				assert.Equal(t, "bob/2", used(ctx, t, sc), "the login it left is the next call's")
			})
			assert.Equal(t, 2, u.logins())
		})
	})
	t.Run("between the rejection and the renewal", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			u := &upstream{life: time.Hour}
			c := newClient(t, u, new(sessionlock.MemoryCache))
			scopeOfBob(t, c, func(ctx context.Context, sc *sessionlock.Scope) {
				for range 20 {
					before, runs := u.logins(), 0
					over, cancel := context.WithCancel(ctx)
					err := sc.Do(over, func(context.Context, sessionlock.Session) error {
						runs++
						cancel()
						return sessionlock.Reject(errWindow)
					})
					require.ErrorIs(t, err, context.Canceled)
					require.ErrorIs(t, err, errWindow)
					assert.Equal(t, 1, runs)
					assert.Equal(t, before, u.logins())
					time.Sleep(time.Minute)
					assert.Equal(t, "bob/"+strconv.Itoa(before+1), used(ctx, t, sc), "dead all the same")
					time.Sleep(time.Minute)
				}
			})
		})
	})
}

func TestCloseAndScopes(t *testing.T) {
	t.Run("waits for the end of a scope", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			u := &upstream{life: time.Hour}
			var ended []string
			c := newClient(t, u, noCache{}, sessionlock.WithLogout(func(_ context.Context, s sessionlock.Session) error {
				time.Sleep(3 * time.Second)
				ended = append(ended, s.Token.Reveal())
				return nil
			}))
			start := time.Now()
			require.NoError(t, c.Scope(t.Context(), "bob", func(context.Context, *sessionlock.Scope) error { return nil }))
			assert.Equal(t, start, time.Now())
			require.NoError(t, c.Close(t.Context()))
			assert.Equal(t, 3*time.Second, time.Since(start))
			assert.Equal(t, []string{"bob/1"}, ended)
		})
	})
	t.Run("does not wait for its func, which goes on with what it has", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f, store := newFileMaker(), new(sessionlock.MemoryCache)
			c := f.client(t, store)
			require.NoError(t, c.Scope(t.Context(), "bob", func(ctx context.Context, sc *sessionlock.Scope) error {
				assert.NoError(t, sc.Do(ctx, f.request))
				require.NoError(t, c.Close(ctx))
				assert.NoError(t, sc.Do(ctx, f.request), "the pinned session is still good")
				f.kill("bob/1")
				err := sc.Do(ctx, f.request)
				require.ErrorIs(t, err, sessionlock.ErrClosed)
				require.ErrorIs(t, err, sessionlock.ErrRejected)
				require.ErrorIs(t, sc.Do(ctx, f.request), sessionlock.ErrClosed)
				return nil
			}))
			everyGrace()
			assert.Empty(t, f.ended())
			assert.Equal(t, 1, f.logins())
			require.ErrorIs(t, c.Scope(t.Context(), "bob", func(context.Context, *sessionlock.Scope) error { return nil }), sessionlock.ErrClosed)
		})
	})
	t.Run("does not wait for a set-up that was left running", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			c := newClient(t, &upstream{life: time.Hour}, new(sessionlock.MemoryCache))
			left := make(chan struct{})
			var wg sync.WaitGroup
			scopeOfBob(t, c, func(ctx context.Context, sc *sessionlock.Scope) {
				sc.SetUp(func(context.Context, sessionlock.Session) error { <-left; return nil })
				wg.Go(func() { _ = sc.Do(ctx, nothing) })
				synctest.Wait()
			})
			ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
			defer cancel()
			start := time.Now()
			assert.NoError(t, c.Close(ctx))
			assert.Equal(t, start, time.Now())
			close(left)
			wg.Wait()
		})
	})
}

// What a func has left running when its scope ends leaves no orphan.
func TestCallLeftRunningAtTheEndOfItsScope(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := &upstream{life: time.Hour, takes: 5 * time.Second}
		c := newClient(t, u, noCache{})
		left := make(chan error, 2)
		require.NoError(t, c.Scope(t.Context(), "bob", func(ctx context.Context, sc *sessionlock.Scope) error {
			go func() { left <- sc.Do(ctx, rejectOld("bob/1")) }()
			synctest.Wait() // it renews
			go func() { left <- sc.Do(ctx, nothing) }()
			synctest.Wait() // it waits for that
			return nil
		}))
		for range 2 {
			require.ErrorIs(t, <-left, sessionlock.ErrInvalid)
		}
		everyGrace()
		assert.Equal(t, 2, u.logins())
		assert.Equal(t, []string{"bob/2"}, u.ended(), "the scope's last session")
	})
}

func TestCallThatWaitedForTheEndOfItsScopeLogsNobodyIn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := &upstream{takes: time.Second}
		u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
			if n == 2 {
				return sessionlock.Session{}, errDead
			}
			return u.grant(key, n), nil
		}
		c := newClient(t, u, noCache{}) // nor does it remember that a login failed
		renewed, waited := make(chan error, 1), make(chan error, 1)
		require.NoError(t, c.Scope(t.Context(), "bob", func(ctx context.Context, sc *sessionlock.Scope) error {
			go func() { renewed <- sc.Do(ctx, rejectOld("bob/1")) }()
			synctest.Wait()
			go func() { waited <- sc.Do(ctx, nothing) }()
			synctest.Wait()
			return nil
		}))
		require.ErrorIs(t, <-renewed, sessionlock.ErrRejected)
		require.ErrorIs(t, <-waited, sessionlock.ErrInvalid)
		everyGrace()
		assert.Equal(t, 2, u.logins())
		assert.Empty(t, u.ended())
	})
}

// A scope that lasts longer than the idle TTL keeps its session alive for the
// fleet, as long as it uses it.
func TestLongScopeKeepsTheSessionAlive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, store, sp := newFileMaker(), new(sessionlock.MemoryCache), &spy{}
		c := f.client(t, spyCache{sp, store})
		scopeOfBob(t, c, func(ctx context.Context, sc *sessionlock.Scope) {
			for range 12 {
				assert.NoError(t, sc.Do(ctx, f.request))
				time.Sleep(5 * time.Minute)
				assert.Equal(t, "bob/1", stored(t, store))
			}
			synctest.Wait()
			before := sp.count()
			for range 1000 {
				assert.NoError(t, sc.Do(ctx, f.request))
			}
			synctest.Wait()
			assert.LessOrEqual(t, sp.count()-before, 2, "throttled")
		})
		assert.Equal(t, 1, f.logins())
		assert.Empty(t, f.ended())
	})
}

// What a call found rejected is nobody's any more, also where the call itself was
// not to be run again or had no time left for it.
func TestRejectedSessionIsNotPinnedAnyLonger(t *testing.T) {
	for name, refuse := range map[string]func(ctx context.Context, t *testing.T, sc *sessionlock.Scope){
		"may have been executed": func(ctx context.Context, t *testing.T, sc *sessionlock.Scope) {
			var re *sessionlock.ReauthError
			require.ErrorAs(t, sc.Do(ctx, func(context.Context, sessionlock.Session) error { return &upstreamError{112} }), &re)
			require.NoError(t, re.Second)
		},
		"no time left": func(ctx context.Context, t *testing.T, sc *sessionlock.Scope) {
			ctx, cancel := context.WithCancel(ctx)
			require.ErrorIs(t, sc.Do(ctx, func(context.Context, sessionlock.Session) error {
				cancel()
				return &upstreamError{952}
			}), context.Canceled)
		},
		"the second too": func(ctx context.Context, t *testing.T, sc *sessionlock.Scope) {
			require.ErrorIs(t, sc.Do(ctx, func(context.Context, sessionlock.Session) error {
				time.Sleep(time.Minute) // not young
				return &upstreamError{952}
			}), sessionlock.ErrRejected)
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f, store := newFileMaker(), new(sessionlock.MemoryCache)
				c := f.client(t, store)
				scopeOfBob(t, c, func(ctx context.Context, sc *sessionlock.Scope) {
					sc.SetUp(f.request)
					refuse(ctx, t, sc)
					had := f.logins()
					f.kill("bob/1")
					if name == "the second too" {
						f.kill("bob/2")
					}
					assert.NoError(t, sc.Do(ctx, f.request))
					assert.Zero(t, f.refused, "nothing is run with it again")
					assert.LessOrEqual(t, f.logins()-had, 1)
				})
				everyGrace()
				assert.Empty(t, f.ended(), "nor is it logged out")
			})
		})
	}
}

// What a call that came after the end of its scope found rejected is dead for the
// fleet all the same.
func TestRejectionAfterTheEndOfAScopeIsKnownToTheFleet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u := new(sessionlock.MemoryCache), &upstream{life: time.Hour}
		c := newClient(t, u, store)
		over, left := make(chan struct{}), make(chan error, 1)
		scopeOfBob(t, c, func(ctx context.Context, sc *sessionlock.Scope) {
			go func() {
				left <- sc.Do(ctx, func(context.Context, sessionlock.Session) error {
					<-over
					return sessionlock.Reject(errDead)
				})
			}()
			synctest.Wait()
		})
		close(over)
		err := <-left
		require.ErrorIs(t, err, sessionlock.ErrRejected)
		require.ErrorIs(t, err, sessionlock.ErrInvalid)
		assert.Empty(t, stored(t, store))
		assert.Equal(t, "bob/2", tokenOf(t, c, "bob"))
		everyGrace()
		assert.Empty(t, u.ended())
	})
}

func TestCallOnAScope(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := &upstream{life: time.Hour}
		c := newClient(t, u, new(sessionlock.MemoryCache))
		scopeOfBob(t, c, func(ctx context.Context, sc *sessionlock.Scope) {
			got, err := sessionlock.Call(ctx, sc, func(ctx context.Context, s sessionlock.Session) (string, error) {
				return "for " + s.Token.Reveal(), rejectOld("bob/1")(ctx, s)
			})
			require.NoError(t, err)
			assert.Equal(t, "for bob/2", got)
			_, err = sessionlock.Call[int](ctx, sc, nil)
			require.ErrorIs(t, err, sessionlock.ErrInvalid)
		})
	})
}

func TestScopeIsNeverPrinted(t *testing.T) {
	c, err := sessionlock.New(acme, &password{canary}, sessionlock.WithCache(new(sessionlock.MemoryCache)))
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close(context.WithoutCancel(t.Context())) })
	type stranger struct{ sc *sessionlock.Scope }
	type worse struct{ stranger *stranger }
	require.NoError(t, c.Scope(t.Context(), canary, func(ctx context.Context, sc *sessionlock.Scope) error {
		sc.SetUp(func(context.Context, sessionlock.Session) error { return nil })
		require.NoError(t, sc.Do(ctx, nothing))
		for name, v := range map[string]any{"scope": sc, "stranger": stranger{sc}, "pointer to a stranger": &worse{&stranger{sc}}, "context": ctx} {
			for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
				seen(t, fmt.Sprintf(verb, v), verb+" of a "+name)
			}
			var b bytes.Buffer
			slog.New(slog.NewJSONHandler(&b, nil)).Info("msg", slog.Any("v", v))
			slog.New(slog.NewTextHandler(&b, nil)).Info("msg", slog.Any("v", v))
			seen(t, b.String(), "a log line of a "+name)
		}
		assert.Equal(t, "[sessionlock scope]", fmt.Sprint(sc))
		sc.SetUp(func(ctx context.Context, _ sessionlock.Session) error { return sc.Do(ctx, nothing) })
		err := sc.Do(ctx, nothing)
		require.ErrorIs(t, err, sessionlock.ErrReentrant)
		seen(t, err.Error(), "ErrReentrant")
		return nil
	}))
}

// In real time, for the race detector: scopes of a few keys, nested and side by
// side, beside everything that changes their sessions.
func TestConcurrentScopesAreRaceFree(t *testing.T) {
	u := &upstream{life: time.Hour}
	c := newClient(t, u, new(sessionlock.MemoryCache), sessionlock.WithIdleTTL(10*time.Millisecond),
		sessionlock.WithReauthBackoff(time.Millisecond, time.Millisecond), sessionlock.WithNearCache(2, time.Millisecond))
	known := []error{sessionlock.ErrRejected, sessionlock.ErrStale, sessionlock.ErrSuppressed, sessionlock.ErrInvalid, context.DeadlineExceeded, context.Canceled}
	fine := func(err error) {
		assert.True(t, err == nil || slices.ContainsFunc(known, func(k error) bool { return errors.Is(err, k) }), "%v", err)
	}
	var wg sync.WaitGroup
	for g := range 16 {
		wg.Go(func() {
			for i := range 20 {
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration(1+i)*time.Millisecond)
				key := "key" + strconv.Itoa((g+i)%3)
				switch (g + i) % 5 {
				case 0:
					fine(c.Logout(ctx, key))
				case 1:
					_, err := c.Put(ctx, key, sessionlock.Session{Token: sessionlock.NewToken(key + "/put"), Expiry: time.Now().Add(time.Hour)})
					fine(err)
				default:
					fine(c.Scope(ctx, key, func(ctx context.Context, sc *sessionlock.Scope) error {
						sc.SetUp(func(_ context.Context, s sessionlock.Session) error {
							assert.Equal(t, key, s.Key())
							return nil
						})
						var inner sync.WaitGroup
						for j := range 3 {
							inner.Go(func() {
								fine(sc.Do(ctx, func(_ context.Context, s sessionlock.Session) error {
									assert.Equal(t, key, s.Key())
									if (g+i+j)%7 == 0 {
										return sessionlock.Reject(errDead)
									}
									return nil
								}))
							})
						}
						if i%4 != 0 {
							inner.Wait()
						} else { // they outlive their scope, not the test
							wg.Go(inner.Wait)
						}
						return c.Scope(ctx, key, func(ctx context.Context, sc *sessionlock.Scope) error { return sc.Do(ctx, nothing) })
					}))
				}
				cancel()
			}
		})
	}
	wg.Wait()
}

// onEachStore runs f, in a bubble where that is possible, on every store there is;
// open returns another process's options for it.
func onEachStore(t *testing.T, f func(t *testing.T, open func() []sessionlock.Option)) {
	t.Run("memory", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			store := new(sessionlock.MemoryCache)
			f(t, func() []sessionlock.Option { return []sessionlock.Option{sessionlock.WithCache(store)} })
		})
	})
	t.Run("miniredis", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			_, client := bubbleRedis(t)
			f(t, func() []sessionlock.Option { return []sessionlock.Option{sessionlock.WithRedis(client())} })
		})
	})
	t.Run("redis", func(t *testing.T) {
		server := redistest.Start(t)
		f(t, func() []sessionlock.Option { return []sessionlock.Option{sessionlock.WithRedis(server.Client())} })
	})
}

// open returns a client of u with opts.
func open(t *testing.T, u *upstream, opts ...sessionlock.Option) *sessionlock.Client {
	t.Helper()
	c, err := sessionlock.New(acme, u, append([]sessionlock.Option{sessionlock.WithLogout(u.Logout)}, opts...)...)
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close(context.WithoutCancel(t.Context())) })
	return c
}

func TestPutIsTheFleetsSession(t *testing.T) {
	onEachStore(t, func(t *testing.T, store func() []sessionlock.Option) {
		u := &upstream{life: time.Hour}
		a, b, cold := open(t, u, store()...), open(t, u, store()...), open(t, u, store()...)
		old, err := a.Session(t.Context(), "bob")
		require.NoError(t, err)
		require.Equal(t, "bob/1", tokenOf(t, b, "bob"), "b holds the old one near")
		expiry := time.Now().Add(2 * time.Hour).Truncate(time.Millisecond)
		got, err := a.Put(t.Context(), "bob", sessionlock.Session{Token: sessionlock.NewToken("put"), Expiry: expiry}.WithValue("csrf", "x"))
		require.NoError(t, err)
		assert.Equal(t, "put", got.Token.Reveal())
		assert.Equal(t, "bob", got.Key())
		assert.Equal(t, "x", got.Value("csrf"))
		assert.Greater(t, got.Generation(), old.Generation())
		assert.Equal(t, "put", tokenOf(t, a, "bob"))

		s, err := cold.Session(t.Context(), "bob")
		require.NoError(t, err)
		assert.Equal(t, "put", s.Token.Reveal(), "at once where nothing is near")
		assert.Equal(t, got.Generation(), s.Generation())
		assert.Equal(t, "x", s.Value("csrf"))
		assert.WithinDuration(t, expiry, s.Expiry, time.Second)
		assert.EventuallyWithT(t, func(t *assert.CollectT) {
			s, err := b.Session(context.Background(), "bob")
			assert.NoError(t, err)
			assert.Equal(t, "put", s.Token.Reveal())
		}, 10*time.Second, 5*time.Millisecond, "by the wake-up, where the old one was near")

		again, err := b.Put(t.Context(), "bob", got)
		require.NoError(t, err)
		assert.Greater(t, again.Generation(), got.Generation(), "what a client gave out may be put too")
		require.NoError(t, a.Invalidate(t.Context(), again))
		assert.Equal(t, "bob/2", tokenOf(t, open(t, u, store()...), "bob"))
		assert.Equal(t, 2, u.logins())
	})
}

func TestPutWithoutAnEntryNeedsNoLogin(t *testing.T) {
	onEachStore(t, func(t *testing.T, store func() []sessionlock.Option) {
		u := &upstream{life: time.Hour}
		put(t, open(t, u, store()...), "put")
		assert.Equal(t, "put", tokenOf(t, open(t, u, store()...), "bob"))
		assert.Zero(t, u.logins())
	})
}

func TestPutEndsWhatItDisplacedOnce(t *testing.T) {
	for name, tc := range map[string]struct {
		opts []sessionlock.Option
		puts []string
		want []string // logged out after every grace
	}{
		"another":                         {nil, []string{"put"}, []string{"bob/1"}},
		"two":                             {nil, []string{"put", "second"}, []string{"bob/1", "put"}},
		"the same again":                  {nil, []string{"put", "put"}, []string{"bob/1"}},
		"the token that was stored":       {nil, []string{"bob/1"}, []string{}},
		"and back again":                  {nil, []string{"put", "bob/1"}, []string{"put"}},
		"where logins end the one before": {[]sessionlock.Option{sessionlock.WithSingleSession()}, []string{"put"}, []string{}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store, u := new(sessionlock.MemoryCache), &upstream{life: time.Hour}
				c, other := newClient(t, u, store, tc.opts...), newClient(t, u, store, tc.opts...)
				tokenOf(t, c, "bob")
				for _, token := range tc.puts {
					put(t, other, token)
					time.Sleep(time.Second)
				}
				time.Sleep(28*time.Second - time.Millisecond)
				synctest.Wait()
				assert.Empty(t, u.ended(), "requests may still use it")
				everyGrace()
				ended := u.ended()
				slices.Sort(ended)
				assert.Equal(t, tc.want, ended)
				assert.Equal(t, tc.puts[len(tc.puts)-1], stored(t, store))
			})
		})
	}
}

func TestPutDoesNotEndWhatWasRejected(t *testing.T) {
	t.Run("and the store does not know", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			store, u := new(sessionlock.MemoryCache), &upstream{life: time.Hour}
			var down atomic.Bool
			c := newClient(t, u, brokenCache{store, &down})
			s, err := c.Session(t.Context(), "bob")
			require.NoError(t, err)
			down.Store(true)
			require.ErrorIs(t, c.Invalidate(t.Context(), s), sessionlock.ErrUnavailable)
			down.Store(false)
			put(t, c, "put")
			everyGrace()
			assert.Empty(t, u.ended())
		})
	})
	t.Run("and is kept to be refreshed", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			store, u := new(sessionlock.MemoryCache), &upstream{}
			u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
				s := u.grant(key, n)
				s.RefreshExpiry = time.Now().Add(time.Hour)
				return s, nil
			}
			c := newClient(t, u, store)
			s, err := c.Session(t.Context(), "bob")
			require.NoError(t, err)
			require.NoError(t, c.Invalidate(t.Context(), s))
			put(t, newClient(t, u, store), "put")
			everyGrace()
			assert.Empty(t, u.ended())
		})
	})
}

// Whether it may be stored again cannot be asked.
func TestDisplacedSessionIsLeftAloneWhenTheStoreIsDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u := new(sessionlock.MemoryCache), &upstream{life: time.Hour}
		var down atomic.Bool
		c := newClient(t, u, brokenCache{store, &down})
		tokenOf(t, c, "bob")
		put(t, c, "put")
		down.Store(true)
		everyGrace()
		assert.Empty(t, u.ended())
	})
}

func TestSessionIsLoggedOutOnceThoughOthersAreInBetween(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u := new(sessionlock.MemoryCache), &upstream{life: time.Hour}
		var down atomic.Bool
		c := newClient(t, u, spyCache{&spy{before: func(_ context.Context, op, _ string) error {
			if down.Load() && op == opSwap {
				return errStoreDown
			}
			return nil
		}}, store})
		tokenOf(t, c, "bob")
		down.Store(true)
		_, err := c.Put(t.Context(), "bob", sessionlock.Session{Token: sessionlock.NewToken("put")})
		assertUnavailable(t, err)
		down.Store(false)
		time.Sleep(time.Second)
		put(t, c, "put")
		time.Sleep(29*time.Second + 500*time.Millisecond)
		require.NoError(t, c.Logout(t.Context(), "bob"))
		everyGrace()
		assert.Equal(t, []string{"bob/1", "put"}, u.ended())
	})
}

func TestLoginUnderWayYieldsToAPut(t *testing.T) {
	onEachStore(t, func(t *testing.T, store func() []sessionlock.Option) {
		u := &upstream{}
		sent, answered := make(chan struct{}), make(chan struct{})
		u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
			close(sent)
			<-answered
			return sessionlock.Session{Token: sessionlock.NewToken(fmt.Sprint(key, "/", n)), Expiry: time.Now().Add(time.Hour)}, nil
		}
		a, b := open(t, u, store()...), open(t, u, store()...)
		leads := askFor(t.Context(), a, "bob")
		<-sent
		joins, waits := askFor(t.Context(), a, "bob"), askFor(t.Context(), b, "bob")
		put(t, open(t, u, store()...), "put")
		got := <-waits
		require.NoError(t, got.err)
		assert.Equal(t, "put", got.session.Token.Reveal(), "the waiters of other processes at once")
		close(answered)
		for _, asked := range []<-chan answer{leads, joins} {
			got := <-asked
			require.NoError(t, got.err)
			assert.Equal(t, "put", got.session.Token.Reveal(), "and its own callers when it has returned")
		}
		assert.Equal(t, 1, u.logins())
		require.Eventually(t, func() bool { return slices.Equal(u.ended(), []string{"bob/1"}) }, 10*time.Second, 5*time.Millisecond,
			"the session nobody will use is logged out")
		assert.Equal(t, "put", tokenOf(t, open(t, u, store()...), "bob"))
	})
}

func TestPutEndsASuppressionAndKeepsTheCount(t *testing.T) {
	for name, fails := range map[string]func(error) error{
		"denied":   sessionlock.Denied,
		"deferred": func(err error) error { return sessionlock.RetryAfter(err, time.Hour) },
		"unknown":  func(err error) error { return err },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store, u := new(sessionlock.MemoryCache), &upstream{}
				u.script = func(context.Context, string, int) (sessionlock.Session, error) {
					return sessionlock.Session{}, fails(errDead)
				}
				a, b := newClient(t, u, store), newClient(t, u, store)
				_, err := a.Session(t.Context(), "bob")
				require.Error(t, err)
				_, err = b.Session(t.Context(), "bob")
				require.ErrorIs(t, err, sessionlock.ErrSuppressed)
				was, err := b.Inspect(t.Context(), "bob")
				require.NoError(t, err)

				s, err := b.Put(t.Context(), "bob", sessionlock.Session{Token: sessionlock.NewToken("put"), Expiry: time.Now().Add(20 * time.Second)})
				require.NoError(t, err)
				for _, c := range []*sessionlock.Client{a, b} {
					assert.Equal(t, "put", tokenOf(t, c, "bob"))
				}
				now, err := b.Inspect(t.Context(), "bob")
				require.NoError(t, err)
				assert.Equal(t, s.Generation(), now.Generation)
				assert.Equal(t, was.Attempts, now.Attempts, "still counted")
				assert.Zero(t, now.Failure)
				assert.Zero(t, now.SuppressedUntil)
				assert.Equal(t, 1, u.logins())

				time.Sleep(20 * time.Second)
				_, err = a.Session(t.Context(), "bob")
				require.NotErrorIs(t, err, sessionlock.ErrSuppressed, "when it has ended the next login may be tried")
				assert.Equal(t, 2, u.logins())
			})
		})
	}
}

// Counts stay until the session has proved itself, as after any login: a fleet
// that has spent its budget logs in again no sooner for a Put that is refused.
func TestPutThatIsRefusedGivesNoBudgetBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := &upstream{}
		u.script = func(context.Context, string, int) (sessionlock.Session, error) {
			return sessionlock.Session{}, errors.New("no answer")
		}
		c := newClient(t, u, new(sessionlock.MemoryCache), sessionlock.WithLoginBudget(2, time.Hour))
		for range 2 {
			_, err := c.Session(t.Context(), "bob")
			require.Error(t, err)
			time.Sleep(time.Minute)
		}
		for range 3 {
			s := put(t, c, "put")
			assert.Equal(t, "put", tokenOf(t, c, "bob"))
			require.NoError(t, c.Invalidate(t.Context(), s))
			_, err := c.Session(t.Context(), "bob")
			require.ErrorIs(t, err, sessionlock.ErrSuppressed)
		}
		assert.Equal(t, 2, u.logins())
	})
}

func TestPutRefusesWhatALoginMustNotReturn(t *testing.T) {
	token := sessionlock.NewToken(canary + "-token")
	foreign, err := newClient(t, &upstream{life: time.Hour}, new(sessionlock.MemoryCache)).Session(t.Context(), canary+" of eve")
	require.NoError(t, err)
	for name, bad := range map[string]sessionlock.Session{
		"no token":           {},
		"blank token":        {Token: sessionlock.NewToken("  ")},
		"expired":            {Token: token, Expiry: time.Now().Add(-time.Hour)},
		"control characters": {Token: sessionlock.NewToken(canary + "\r\nX-Admin: 1")},
		"too long":           {Token: sessionlock.NewToken(canary + string(bytes.Repeat([]byte("t"), 16<<10)))},
		"value too long":     sessionlock.Session{Token: token}.WithValue("v", canary+string(bytes.Repeat([]byte("v"), 1024))),
		"incomplete":         {Token: sessionlock.NewToken("no scope")},
		"another key's":      foreign,
	} {
		t.Run(name, func(t *testing.T) {
			sp, u := &spy{}, &upstream{life: time.Hour}
			c := newClient(t, u, spyCache{sp, new(sessionlock.MemoryCache)},
				sessionlock.WithComplete(func(s sessionlock.Session) bool { return s.Token.Reveal() != "no scope" }))
			got, err := c.Put(t.Context(), canary, bad)
			require.ErrorIs(t, err, sessionlock.ErrInvalid)
			require.ErrorIs(t, err, sessionlock.ErrIncomplete)
			seen(t, err.Error(), "Put")
			seen(t, fmt.Sprintf("%v %+v %#v", err, err, err), "Put")
			assert.Zero(t, got)
			assert.Zero(t, sp.count(), "before any I/O")
		})
	}
	t.Run("and bad arguments", func(t *testing.T) {
		sp, u := &spy{}, &upstream{life: time.Hour}
		c := newClient(t, u, spyCache{sp, new(sessionlock.MemoryCache)})
		good := sessionlock.Session{Token: token}
		_, err := c.Put(nil, canary, good) //nolint:staticcheck // on purpose
		refusedArgument(t, err, "nil context")
		_, err = c.Put(t.Context(), " ", good)
		refusedArgument(t, err, "blank key")
		_, err = c.Put(t.Context(), canary+string(make([]byte, 256)), good)
		refusedArgument(t, err, "long key")
		over, cancel := context.WithCancel(t.Context())
		cancel()
		_, err = c.Put(over, canary, good)
		require.ErrorIs(t, err, context.Canceled)
		assert.Zero(t, sp.count())
		require.NoError(t, c.Close(t.Context()))
		got, err := c.Put(t.Context(), canary, good)
		require.ErrorIs(t, err, sessionlock.ErrClosed)
		seen(t, err.Error(), "ErrClosed")
		assert.Zero(t, got)
		assert.Zero(t, sp.count())
	})
	t.Run("without an expiry where one is demanded", func(t *testing.T) {
		c := newClient(t, &upstream{}, new(sessionlock.MemoryCache), sessionlock.WithMaxAge(0))
		_, err := c.Put(t.Context(), "bob", sessionlock.Session{Token: token})
		require.ErrorIs(t, err, sessionlock.ErrInvalid)
		require.ErrorIs(t, err, sessionlock.ErrIncomplete)
	})
}

// A Put that was not answered may have been executed; a second one is harmless, and
// what they displaced is ended once.
func TestPutDuringAnOutageCanBeRepeated(t *testing.T) {
	for name, executed := range map[string]bool{"not executed": false, "executed, the reply lost": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var down atomic.Bool
				fails := func(_ context.Context, op, name string) error {
					if down.Load() && op == opSwap && isEntry(name) {
						return errStoreDown
					}
					return nil
				}
				sp, store, u := &spy{}, new(sessionlock.MemoryCache), &upstream{life: time.Hour}
				if executed {
					sp.after = fails
				} else {
					sp.before = fails
				}
				c := newClient(t, u, spyCache{sp, store})
				tokenOf(t, c, "bob")
				down.Store(true)
				got, err := c.Put(t.Context(), "bob", sessionlock.Session{Token: sessionlock.NewToken(canary)})
				assertUnavailable(t, err)
				seen(t, err.Error(), "outage")
				assert.Zero(t, got)
				down.Store(false)
				time.Sleep(time.Second)
				put(t, c, canary)
				everyGrace()
				everyGrace()
				assert.Equal(t, []string{"bob/1"}, u.ended())
				assert.Equal(t, canary, stored(t, store))
				assert.Equal(t, 1, u.logins())
			})
		})
		t.Run(name+", and given up", func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var down atomic.Bool
				sp, store, u := &spy{}, new(sessionlock.MemoryCache), &upstream{life: time.Hour}
				fails := func(_ context.Context, op, name string) error {
					if down.Load() && op == opSwap && isEntry(name) {
						return errStoreDown
					}
					return nil
				}
				if executed {
					sp.after = fails
				} else {
					sp.before = fails
				}
				c := newClient(t, u, spyCache{sp, store})
				tokenOf(t, c, "bob")
				down.Store(true)
				_, err := c.Put(t.Context(), "bob", sessionlock.Session{Token: sessionlock.NewToken("put")})
				assertUnavailable(t, err)
				down.Store(false)
				everyGrace()
				if executed {
					assert.Equal(t, "put", stored(t, store))
					assert.Equal(t, []string{"bob/1"}, u.ended())
				} else {
					assert.Equal(t, "bob/1", stored(t, store))
					assert.Empty(t, u.ended(), "what is stored is not logged out")
				}
			})
		})
	}
}

func TestPutOnARedisThatIsDownIsUnavailable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, client := bubbleRedis(t)
		u := &upstream{life: time.Hour}
		c := open(t, u, sessionlock.WithRedis(client()))
		tokenOf(t, c, "bob")
		m.SetError("LOADING")
		_, err := c.Put(t.Context(), "bob", sessionlock.Session{Token: sessionlock.NewToken("put")})
		assertUnavailable(t, err)
		assert.Equal(t, "bob/1", tokenOf(t, c, "bob"), "the old one is still served")
		m.SetError("")
		time.Sleep(time.Second)
		put(t, c, "put")
		assert.Equal(t, "put", tokenOf(t, open(t, u, sessionlock.WithRedis(client())), "bob"))
	})
}

// A session from a browser, renewed later from what it carries.
func TestPutSessionIsRefreshedFromItsValues(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u := new(sessionlock.MemoryCache), &upstream{life: time.Hour}
		refresh := sessionlock.WithRefresh(func(_ context.Context, key string, old sessionlock.Session) (sessionlock.Session, error) {
			assert.Equal(t, "bob", key)
			assert.Equal(t, "bob", old.Key())
			return sessionlock.Session{Token: sessionlock.NewToken("from " + old.Value("refresh")), Expiry: time.Now().Add(time.Hour)}, nil
		})
		a, b := newClient(t, u, store, refresh), newClient(t, u, store, refresh)
		tokenOf(t, a, "bob")
		_, err := a.Put(t.Context(), "bob", sessionlock.Session{
			Token: sessionlock.NewToken("put"), Expiry: time.Now().Add(10 * time.Minute), RefreshExpiry: time.Now().Add(24 * time.Hour),
		}.WithValue("refresh", "r1"))
		require.NoError(t, err)
		assert.Equal(t, "put", tokenOf(t, b, "bob"))
		time.Sleep(15 * time.Minute)
		assert.Equal(t, "from r1", tokenOf(t, b, "bob"))
		assert.Equal(t, "from r1", tokenOf(t, a, "bob"))
		everyGrace()
		assert.Equal(t, []string{"bob/1"}, u.ended(), "displaced by the Put; what the refresh replaced is carried on")
		assert.Equal(t, 1, u.logins())
	})
}

func TestPutFollowsItsFingerprint(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u := new(sessionlock.MemoryCache), &upstream{life: time.Hour}
		with := func(version string) *sessionlock.Client {
			return newClient(t, u, store, sessionlock.WithFingerprint(func(context.Context, string) (string, error) { return version, nil }))
		}
		put(t, with("p1"), "put")
		assert.Equal(t, "put", tokenOf(t, with("p1"), "bob"))
		assert.Equal(t, "bob/1", tokenOf(t, with("p2"), "bob"))
	})
}

// Others beside it: each Put is a generation of its own, and the last one stays.
func TestPutsAtOnceAllHaveTheirOwnGeneration(t *testing.T) {
	onEachStore(t, func(t *testing.T, store func() []sessionlock.Option) {
		u := &upstream{life: time.Hour}
		var mu sync.Mutex
		gens := map[uint64]string{}
		var wg sync.WaitGroup
		for i := range 10 {
			c := open(t, u, store()...)
			wg.Go(func() {
				s, err := c.Put(t.Context(), "bob", sessionlock.Session{Token: sessionlock.NewToken("put" + strconv.Itoa(i))})
				assert.NoError(t, err)
				mu.Lock()
				defer mu.Unlock()
				assert.NotContains(t, gens, s.Generation())
				gens[s.Generation()] = s.Token.Reveal()
			})
		}
		wg.Wait()
		s, err := open(t, u, store()...).Session(t.Context(), "bob")
		require.NoError(t, err)
		newest := uint64(0)
		for gen := range gens {
			newest = max(newest, gen)
		}
		assert.Equal(t, newest, s.Generation())
		assert.Equal(t, gens[newest], s.Token.Reveal())
		assert.Zero(t, u.logins())
	})
}

// A call that holds the session before it is repaired with the one that was put.
func TestPutIsWhatARejectionLeadsTo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u := new(sessionlock.MemoryCache), &upstream{life: time.Hour}
		a, b := newClient(t, u, store), newClient(t, u, store)
		var saw []string
		fn := func(_ context.Context, s sessionlock.Session) error {
			saw = append(saw, s.Token.Reveal())
			if len(saw)%2 == 1 {
				put(t, b, "put"+strconv.Itoa(len(saw)))
				return sessionlock.Reject(errDead)
			}
			return nil
		}
		require.NoError(t, a.Do(t.Context(), "bob", fn))
		scopeOfBob(t, a, func(ctx context.Context, sc *sessionlock.Scope) { assert.NoError(t, sc.Do(ctx, fn)) })
		assert.Equal(t, []string{"bob/1", "put1", "put1", "put3"}, saw)
		assert.Equal(t, 1, u.logins())
	})
}

func ExampleClient_Scope() {
	ctx := context.Background()
	client := client()
	defer client.Close(ctx)
	globals := map[string]string{} // what the upstream keeps per session

	err := client.Scope(ctx, "bob", func(ctx context.Context, scope *sessionlock.Scope) error {
		scope.SetUp(func(_ context.Context, s sessionlock.Session) error {
			globals[s.Token.Reveal()] = "EUR" // once per session: a renewed one starts without
			return nil
		})
		for _, refused := range []bool{false, true, false} {
			err := scope.Do(ctx, func(ctx context.Context, s sessionlock.Session) error {
				if refused && sessionlock.RejectionFromContext(ctx) == nil {
					return sessionlock.Reject(errors.New("401"))
				}
				fmt.Println(s.Token.Reveal(), globals[s.Token.Reveal()])
				return nil
			})
			if err != nil {
				return err
			}
		}
		return nil
	}) // here the scope ends: the fleet keeps the session, an orphan is logged out
	fmt.Println(err)
	// Output:
	// token-bob-1 EUR
	// token-bob-2 EUR
	// token-bob-2 EUR
	// <nil>
}

func ExampleClient_Put() {
	ctx := context.Background()
	client := client()
	defer client.Close(ctx)

	// A person has logged in with a second factor, which no Login of ours can do.
	s, err := client.Put(ctx, "bob", sessionlock.Session{
		Token: sessionlock.NewToken("token from the browser"), Expiry: time.Now().Add(8 * time.Hour),
	})
	show(s, err)
	show(client.Session(ctx, "bob")) // the whole fleet has it

	_, err = client.Put(ctx, "bob", sessionlock.Session{Token: sessionlock.NewToken("old"), Expiry: time.Now().Add(-time.Hour)})
	fmt.Println(errors.Is(err, sessionlock.ErrInvalid), errors.Is(err, sessionlock.ErrIncomplete))
	// Output:
	// token from the browser
	// token from the browser
	// true true
}
