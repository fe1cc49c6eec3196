package sessionlock_test

// Cases at the seams: what happens to an attempt that nobody answered, to a call
// that comes while another is being undone, to funcs of the user that hang, end
// their goroutine or call back, and to a store that steps, forgets or talks.

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/alicebob/miniredis/v2/server"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock"
)

// forgetful is a cache that can lose all it holds. It wakes nobody.
type forgetful struct {
	in atomic.Pointer[sessionlock.MemoryCache]
}

func newForgetful() *forgetful {
	f := &forgetful{}
	f.forget()
	return f
}

func (f *forgetful) forget() { f.in.Store(new(sessionlock.MemoryCache)) }

func (f *forgetful) Load(ctx context.Context, name string) ([]byte, error) {
	return f.in.Load().Load(ctx, name)
}

func (f *forgetful) CompareAndSwap(ctx context.Context, name string, old, next []byte, ttl time.Duration) ([]byte, error) {
	return f.in.Load().CompareAndSwap(ctx, name, old, next, ttl)
}

// spied is any cache seen by a spy, without its faces.
type spied struct {
	*spy
	in sessionlock.Cache
}

func (c spied) Load(ctx context.Context, name string) ([]byte, error) {
	if err := c.enter(ctx, opLoad, name); err != nil {
		return nil, err
	}
	v, err := c.in.Load(ctx, name)
	return v, errors.Join(err, c.leave(ctx, opLoad, name))
}

func (c spied) CompareAndSwap(ctx context.Context, name string, old, next []byte, ttl time.Duration) ([]byte, error) {
	if err := c.enter(ctx, opSwap, name); err != nil {
		return nil, err
	}
	now, err := c.in.CompareAndSwap(ctx, name, old, next, ttl)
	return now, errors.Join(err, c.leave(ctx, opSwap, name))
}

// gate holds back the ops it was shut for, whatever becomes of their contexts,
// until it is opened.
type gate struct {
	mu   sync.Mutex
	shut map[string]chan struct{}
}

func (g *gate) close(ops ...string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.shut == nil {
		g.shut = map[string]chan struct{}{}
	}
	for _, op := range ops {
		if g.shut[op] == nil {
			g.shut[op] = make(chan struct{})
		}
	}
}

func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, ch := range g.shut {
		close(ch)
	}
	g.shut = nil
}

func (g *gate) before(_ context.Context, op, _ string) error {
	g.mu.Lock()
	ch := g.shut[op]
	g.mu.Unlock()
	if ch != nil {
		<-ch
	}
	return nil
}

// clocked is a memory cache with a clock of its own.
type clocked struct {
	*sessionlock.MemoryCache
	now func() time.Time
}

func (c clocked) Now(context.Context) (time.Time, error) { return c.now(), nil }

// observing is an Observer of a func.
type observing func(sessionlock.Event)

func (f observing) Observe(_ context.Context, e sessionlock.Event) { f(e) }

// printsFrom is credentials whose version is v.
func printsFrom(v *atomic.Value) sessionlock.Option {
	return sessionlock.WithFingerprint(func(context.Context, string) (string, error) { return v.Load().(string), nil })
}

func versioned(v string) *atomic.Value {
	out := &atomic.Value{}
	out.Store(v)
	return out
}

// Rejections

func TestRejectionByAnotherUpstreamIsNotOurs(t *testing.T) {
	for name, wrap := range map[string]func(error) error{
		"as it is": func(err error) error { return err },
		"wrapped":  func(err error) error { return fmt.Errorf("get orders: %w", err) },
		"joined":   func(err error) error { return errors.Join(errors.New("half of it"), err) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ours, theirs := &upstream{life: time.Hour}, &upstream{life: time.Hour}
				asked := 0
				a := newClient(t, ours, new(sessionlock.MemoryCache), sessionlock.WithRejected(func(error) sessionlock.Verdict {
					asked++
					return sessionlock.RejectedBefore
				}))
				b, err := sessionlock.New("https://other.test", theirs, sessionlock.WithCache(new(sessionlock.MemoryCache)))
				require.NoError(t, err)
				defer b.Close(t.Context())
				runs := 0
				var inner error
				err = a.Do(t.Context(), "bob", func(ctx context.Context, _ sessionlock.Session) error {
					runs++
					inner = wrap(b.Do(ctx, "bob", func(context.Context, sessionlock.Session) error { return sessionlock.Reject(errDead) }))
					return inner
				})
				require.ErrorIs(t, err, sessionlock.ErrRejected)
				assert.Equal(t, inner, err, "the func's own")
				assert.Equal(t, 1, runs)
				assert.Zero(t, asked, "a classifier sees no rejection of another session")
				assert.Equal(t, "bob/1", tokenOf(t, a, "bob"))
				assert.Equal(t, 1, ours.logins())
				assert.Equal(t, 2, theirs.logins())

				inner = nil
				err = a.Do(t.Context(), "bob", func(ctx context.Context, s sessionlock.Session) error {
					if s.Token.Reveal() == "bob/1" {
						return sessionlock.Reject(&sessionlock.ReauthError{})
					}
					return nil
				})
				require.NoError(t, err)
				assert.Equal(t, "bob/2", tokenOf(t, a, "bob"), "marked by the func itself, it is ours")
			})
		})
	}
}

func TestRejectionSeenAsTheContextEndsEndsTheSession(t *testing.T) {
	for name, verdict := range map[string]sessionlock.Verdict{
		"before execution": sessionlock.RejectedBefore, "maybe executed": sessionlock.RejectedDuring,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				sp, u, shut := &spy{}, &upstream{life: time.Hour}, &gate{}
				sp.before = shut.before
				store := new(sessionlock.MemoryCache)
				c := newClient(t, u, spyCache{sp, store}, sessionlock.WithRejected(func(error) sessionlock.Verdict { return verdict }))
				require.Equal(t, "bob/1", tokenOf(t, c, "bob"))
				ctx, cancel := context.WithCancel(t.Context())
				err := c.Do(ctx, "bob", func(context.Context, sessionlock.Session) error {
					shut.close(opLoad, opSwap)
					cancel()
					return errDead
				})
				require.ErrorIs(t, err, sessionlock.ErrRejected)
				ctx, cancel = context.WithTimeout(t.Context(), 10*time.Millisecond)
				defer cancel()
				_, err = c.Session(ctx, "bob")
				require.ErrorIs(t, err, context.DeadlineExceeded, "at once it is not near any more, whatever the store does")
				shut.open()
				synctest.Wait()
				assert.Equal(t, "bob/2", tokenOf(t, newClient(t, u, store), "bob"), "and soon not in the store")
			})
		})
	}
}

func TestSecondRejectionSeenAsTheContextEndsEndsTheSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u := new(sessionlock.MemoryCache), &upstream{life: time.Hour}
		c := newClient(t, u, store)
		ctx, cancel := context.WithCancel(t.Context())
		err := c.Do(ctx, "bob", func(_ context.Context, s sessionlock.Session) error {
			if s.Token.Reveal() == "bob/2" {
				cancel()
			}
			return sessionlock.Reject(errDead)
		})
		require.ErrorIs(t, err, sessionlock.ErrRejected)
		synctest.Wait()
		st, err := newClient(t, u, store).Inspect(t.Context(), "bob")
		require.NoError(t, err)
		assert.Zero(t, st.Generation)
	})
}

func TestRejectionUnderOldCredentialsEndsTheirSessionAndAdoptsTheNew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u := new(sessionlock.MemoryCache), &upstream{life: time.Hour}
		version := versioned("old")
		fresh := newClient(t, u, store, printsFrom(versioned("new")))
		require.Equal(t, "bob/1", tokenOf(t, fresh, "bob"))
		a := newClient(t, u, store, printsFrom(version))
		require.Equal(t, "bob/2", tokenOf(t, a, "bob"), "of the higher generation")
		version.Store("new")
		used := []string{}
		require.NoError(t, a.Do(t.Context(), "bob", func(ctx context.Context, s sessionlock.Session) error {
			used = append(used, s.Token.Reveal())
			return rejectOld("bob/2")(ctx, s)
		}))
		assert.Equal(t, []string{"bob/2", "bob/1"}, used)
		assert.Equal(t, 2, u.logins())
		synctest.Wait()
		st, err := newClient(t, u, store, printsFrom(versioned("old"))).Inspect(t.Context(), "bob")
		require.NoError(t, err)
		assert.Zero(t, st.Generation, "nobody else gets the rejected one")
		assert.Equal(t, "bob/1", tokenOf(t, a, "bob"), "near from now on")
		assert.Equal(t, "bob/1", tokenOf(t, fresh, "bob"))
	})
}

// Attempts nobody answered, and waits

func TestBeginThatComesLateIsGivenBack(t *testing.T) {
	for name, budget := range map[string]int{"the default budget": 3, "a budget of one": 1} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				sp, shut, u := &spy{}, &gate{}, &upstream{life: time.Hour}
				sp.before = shut.before
				c := newClient(t, u, spyCache{sp, new(sessionlock.MemoryCache)},
					sessionlock.WithLocker(new(memoryLocker)), sessionlock.WithLoginBudget(budget, 15*time.Minute))
				for range 3 {
					shut.close(opSwap)
					time.AfterFunc(500*time.Millisecond, func() { shut.close(opLoad) }) // the server stalls once the swap is sent
					time.AfterFunc(4*time.Second, shut.open)
					_, err := c.Session(t.Context(), "bob")
					assertUnavailable(t, err)
					time.Sleep(10 * time.Second)
				}
				start := time.Now()
				assert.Equal(t, "bob/1", tokenOf(t, c, "bob"), "nothing was sent, so nothing is counted")
				assert.Zero(t, time.Since(start))
				st, err := c.Inspect(t.Context(), "bob")
				require.NoError(t, err)
				assert.Zero(t, st.Attempts)
				assert.Equal(t, 1, u.logins())
			})
		})
	}
}

func TestJoinerWaitsNoLongerThanTheWholeWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		taken := &spy{before: func(_ context.Context, op, _ string) error {
			if op == opLock {
				return sessionlock.ErrLocked
			}
			return nil
		}}
		c := newClient(t, &upstream{}, new(sessionlock.MemoryCache), sessionlock.WithLocker(spyLocker{taken, new(memoryLocker)}))
		start, callers := time.Now(), map[time.Duration]<-chan answer{}
		for _, at := range []time.Duration{0, 100 * time.Millisecond, 11900 * time.Millisecond, 12050 * time.Millisecond} {
			time.Sleep(at - time.Since(start))
			callers[at] = askFor(t.Context(), c, "bob")
			synctest.Wait()
		}
		for at, caller := range callers {
			got := <-caller
			require.ErrorIs(t, got.err, sessionlock.ErrLockTimeout)
			assert.Equal(t, 12*time.Second, got.at.Sub(start)-at, "who came after %v", at)
		}
		assert.LessOrEqual(t, taken.count(opLock), 2*41+4, "in 24 s, a try per tick and one per attempt")
	})
}

// overtaking is a store and an upstream whose first login takes a while and is
// overtaken in its last moment: entry and lock are lost, and a peer begins.
func overtaking(t *testing.T, first, second time.Duration) (*forgetful, *upstream) {
	t.Helper()
	store, u := newForgetful(), &upstream{life: time.Hour}
	peer := newClient(t, u, store)
	began := make(chan struct{})
	u.script = func(ctx context.Context, key string, n int) (sessionlock.Session, error) {
		if n == 1 {
			_ = pauseFor(ctx, first)
			store.forget()
			askFor(context.WithoutCancel(t.Context()), peer, key)
			<-began
			return u.grant(key, n), nil
		}
		close(began)
		_ = pauseFor(ctx, second)
		return u.grant(key, n), nil
	}
	return store, u
}

func TestPollsAfterAnOvertakenLoginKeepTheirPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u := overtaking(t, 9*time.Second, 7*time.Second)
		var looks []time.Time
		sp := &spy{before: func(_ context.Context, op, name string) error {
			if op == opLoad && isEntry(name) {
				looks = append(looks, time.Now())
			}
			return nil
		}}
		start := time.Now()
		a := newClient(t, u, spied{sp, store})
		assert.Equal(t, "bob/2", tokenOf(t, a, "bob"))
		assert.InDelta(t, 16*time.Second, time.Since(start), float64(300*time.Millisecond), "the login is no part of the wait of 12 s")
		require.Greater(t, len(looks), 20)
		looks = looks[slices.IndexFunc(looks, func(at time.Time) bool { return at.Sub(start) > 9*time.Second }):]
		for i, at := range looks[1:] {
			assert.GreaterOrEqual(t, at.Sub(looks[i]), 180*time.Millisecond, "look %d", i)
		}
	})
}

func TestOvertakenLeaderSeesWhatCameAfterItsLastHeartbeat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u := newForgetful(), &upstream{life: time.Hour}
		peer := newClient(t, u, store)
		u.script = func(ctx context.Context, key string, n int) (sessionlock.Session, error) {
			if n == 1 {
				_ = pauseFor(ctx, 900*time.Millisecond)
				store.forget()
				_ = pauseFor(ctx, 600*time.Millisecond) // a heartbeat finds nothing
				_ = tokenOf(t, peer, key)
			}
			return u.grant(key, n), nil
		}
		assert.Equal(t, "bob/2", tokenOf(t, newClient(t, u, store), "bob"))
		synctest.Wait()
		assert.Equal(t, []string{"bob/1"}, u.ended())
	})
}

func TestCloseFreesTheCallersOfAnOvertakenLeader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u := overtaking(t, 500*time.Millisecond, 8*time.Second)
		a := newClient(t, u, store)
		caller := askFor(t.Context(), a, "bob")
		time.Sleep(time.Second)
		start := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		_ = a.Close(ctx)
		got := <-caller
		require.ErrorIs(t, got.err, sessionlock.ErrClosed)
		assert.LessOrEqual(t, got.at.Sub(start), 100*time.Millisecond)
	})
}

func TestProcessWithAHungLoginIsServedByAPeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u := new(sessionlock.MemoryCache), &upstream{life: time.Hour}
		u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
			time.Sleep([]time.Duration{20 * time.Second, 3 * time.Second}[n-1]) // whatever the context
			return u.grant(key, n), nil
		}
		a, b := newClient(t, u, store), newClient(t, u, store)
		_, err := a.Session(t.Context(), "bob")
		require.ErrorIs(t, err, context.DeadlineExceeded)
		_, err = a.Session(t.Context(), "bob")
		require.ErrorIs(t, err, sessionlock.ErrSuppressed)
		time.Sleep(time.Second)
		start := time.Now()
		leader := askFor(t.Context(), b, "bob")
		time.Sleep(time.Second)
		assert.Equal(t, "bob/2", tokenOf(t, a, "bob"))
		assert.InDelta(t, 3*time.Second, time.Since(start), float64(20*time.Millisecond))
		require.NoError(t, (<-leader).err)
		time.Sleep(20 * time.Second)
		assert.Equal(t, 2, u.logins())
		assert.Equal(t, []string{"bob/1"}, u.ended(), "what the hung one brought")
	})
}

// Logout

func TestCallAfterALogoutGetsASessionOfItsOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := &upstream{life: time.Hour, takes: 5 * time.Second}
		c := newClient(t, u, new(sessionlock.MemoryCache))
		doomed := askFor(t.Context(), c, "bob")
		time.Sleep(time.Second)
		require.NoError(t, c.Logout(t.Context(), "bob"))
		time.Sleep(time.Second)
		later := askFor(t.Context(), c, "bob")
		require.ErrorIs(t, (<-doomed).err, sessionlock.ErrStale)
		got := <-later
		require.NoError(t, got.err)
		assert.Equal(t, "bob/2", got.session.Token.Reveal())
		assert.Equal(t, 1, u.atOnce())
		assert.Equal(t, "bob/2", tokenOf(t, c, "bob"))
		synctest.Wait()
		assert.Equal(t, []string{"bob/1"}, u.ended())
	})
}

func TestLogoutEndsWhatTheStoreHasLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u := newForgetful(), &upstream{life: time.Hour}
		c := newClient(t, u, store)
		require.Equal(t, "bob/1", tokenOf(t, c, "bob"))
		store.forget()
		require.NoError(t, c.Logout(t.Context(), "bob"))
		assert.Equal(t, []string{"bob/1"}, u.ended())
		require.NoError(t, c.Logout(t.Context(), "bob"))
		assert.Equal(t, "bob/2", tokenOf(t, c, "bob"))
		time.Sleep(time.Minute)
		assert.Equal(t, []string{"bob/1"}, u.ended(), "once")
	})
}

func TestLogoutBetweenLookAndWatchReachesTheNearCopy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u := new(sessionlock.MemoryCache), &upstream{life: time.Hour}
		a := newClient(t, u, store)
		require.Equal(t, "bob/1", tokenOf(t, a, "bob"))
		var once sync.Once
		sp := &spy{after: func(_ context.Context, op, _ string) error {
			if op == opLoad {
				once.Do(func() { assert.NoError(t, a.Logout(t.Context(), "bob")) })
			}
			return nil
		}}
		b := newClient(t, u, spyCache{sp, store})
		require.Equal(t, "bob/1", tokenOf(t, b, "bob"), "what it saw")
		time.Sleep(50 * time.Millisecond)
		assert.Equal(t, "bob/2", tokenOf(t, b, "bob"))
	})
}

func TestTokenOfTheStoredSessionIsNeverLoggedOut(t *testing.T) {
	// script returns the token of the nth login, which is every time the same, or not.
	for name, c := range map[string]struct {
		token func(key string, n int) int
		ended []string
	}{
		"the same token": {func(string, int) int { return 1 }, []string{}},
		"another token":  {func(_ string, n int) int { return n }, []string{"bob/1"}},
	} {
		t.Run("left behind, "+name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store, u := new(sessionlock.MemoryCache), &upstream{life: time.Hour}
				u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
					if n == 1 {
						time.Sleep(20 * time.Second) // whatever the context
					}
					return u.grant(key, c.token(key, n)), nil
				}
				_, err := newClient(t, u, store).Session(t.Context(), "bob")
				require.Error(t, err)
				time.Sleep(time.Second)
				_ = tokenOf(t, newClient(t, u, store), "bob")
				time.Sleep(time.Minute)
				assert.Equal(t, c.ended, u.ended())
			})
		})
		t.Run("stored by nobody, "+name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store, down, u := new(sessionlock.MemoryCache), &cut{}, &upstream{life: time.Hour}
				u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
					down.off.Store(n == 1)
					return u.grant(key, c.token(key, n)), nil
				}
				a := newClient(t, u, spyCache{&spy{before: down.before}, store}, sessionlock.WithLocker(new(memoryLocker)))
				require.Equal(t, "bob/1", tokenOf(t, a, "bob"))
				down.off.Store(false)
				time.Sleep(5 * time.Second)
				_ = tokenOf(t, newClient(t, u, store), "bob")
				time.Sleep(time.Minute)
				assert.Equal(t, 2, u.logins())
				assert.Equal(t, c.ended, u.ended())
			})
		})
	}
}

// Budgets

func TestOwnBudgetIsPerCredentials(t *testing.T) {
	for _, budget := range []int{1, 3} {
		t.Run(strconv.Itoa(budget), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store, version := newForgetful(), versioned("wrong")
				u := failing(func(int) error {
					if version.Load() == "right" {
						return nil
					}
					return sessionlock.Denied(errors.New("wrong password"))
				})
				c := newClient(t, u, store, printsFrom(version), sessionlock.WithLoginBudget(budget, 15*time.Minute))
				for range budget {
					_, err := c.Session(t.Context(), "bob")
					require.ErrorIs(t, err, sessionlock.ErrDenied)
					require.NotErrorIs(t, err, sessionlock.ErrSuppressed)
					store.forget()
				}
				_, err := c.Session(t.Context(), "bob")
				require.ErrorIs(t, err, sessionlock.ErrSuppressed, "its own budget is spent")
				version.Store("right")
				assert.Equal(t, fmt.Sprint("bob/", budget+1), tokenOf(t, c, "bob"))
			})
		})
	}
}

func TestKeysThatComeAndGoLeaveTheOwnBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u, failed := newForgetful(), &upstream{life: time.Hour}, 0
		u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
			if key == "bob" {
				failed++
				return sessionlock.Session{}, errors.New("502")
			}
			return u.grant(key, n), nil
		}
		c := newClient(t, u, store, sessionlock.WithNearCache(0, time.Minute))
		for round := range 5 {
			for range 4 {
				_, err := c.Session(t.Context(), "bob")
				require.Error(t, err)
				time.Sleep(3 * time.Second)
			}
			store.forget()
			for i := range 200 {
				_ = tokenOf(t, c, fmt.Sprint(round, "/", i))
			}
		}
		assert.Equal(t, 3, failed)
	})
}

func TestDenialThatCouldNotBeStoredIsNotRepeated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		down, start := &cut{}, time.Now()
		u := failing(func(int) error {
			down.off.Store(true)
			return sessionlock.Denied(errors.New("wrong password"))
		})
		c := newClient(t, u, spyCache{&spy{before: down.before}, new(sessionlock.MemoryCache)}, sessionlock.WithLocker(new(memoryLocker)))
		_, err := c.Session(t.Context(), "bob")
		require.ErrorIs(t, err, sessionlock.ErrDenied)
		down.off.Store(false)
		for time.Since(start) < 14*time.Minute {
			time.Sleep(10 * time.Second)
			_, err = c.Session(t.Context(), "bob")
			require.ErrorIs(t, err, sessionlock.ErrSuppressed)
			require.ErrorIs(t, err, sessionlock.ErrDenied)
			require.Equal(t, 1, u.logins())
		}
		time.Sleep(2 * time.Minute)
		_, err = c.Session(t.Context(), "bob")
		require.NotErrorIs(t, err, sessionlock.ErrSuppressed)
		assert.Equal(t, 2, u.logins(), "the window is over")
	})
}

func TestFailureThatSpendsTheBudgetSaysUntilWhen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, start := failing(func(int) error { return errors.New("502") }), time.Now()
		c := newClient(t, u, new(sessionlock.MemoryCache))
		var login *sessionlock.LoginError
		for n := 1; n <= 3; n++ {
			_, err := c.Session(t.Context(), "bob")
			require.ErrorAs(t, err, &login)
			require.NotErrorIs(t, err, sessionlock.ErrSuppressed)
			assert.Equal(t, n, login.Attempts)
			if n < 3 {
				time.Sleep(time.Until(login.Until))
			}
		}
		end := start.Add(15 * time.Minute)
		assert.WithinDuration(t, end, login.Until, time.Millisecond)
		for range 2 { // while the back-off runs, and after it
			st, err := c.Inspect(t.Context(), "bob")
			require.NoError(t, err)
			assert.WithinDuration(t, end, st.SuppressedUntil, time.Millisecond)
			assert.Equal(t, sessionlock.LoginUnknown, st.Failure)
			time.Sleep(time.Minute)
		}
		time.Sleep(time.Until(end) - time.Second)
		_, err := c.Session(t.Context(), "bob")
		require.ErrorIs(t, err, sessionlock.ErrSuppressed)
		time.Sleep(2 * time.Second)
		_, err = c.Session(t.Context(), "bob")
		assert.NotErrorIs(t, err, sessionlock.ErrSuppressed)
	})
}

// Funcs of the user

func TestGoexitInAFuncOfTheUserFreesItsCallers(t *testing.T) {
	for name, option := range map[string]func(end func()) sessionlock.Option{
		"complete": func(end func()) sessionlock.Option {
			return sessionlock.WithComplete(func(sessionlock.Session) bool { end(); return true })
		},
		"fingerprint": func(end func()) sessionlock.Option {
			return sessionlock.WithFingerprint(func(context.Context, string) (string, error) { end(); return "v1", nil })
		},
		"lock key": func(end func()) sessionlock.Option {
			return sessionlock.WithLockKey(func(key string) string { end(); return key })
		},
		"observer": func(end func()) sessionlock.Option {
			return sessionlock.WithObserver(observing(func(sessionlock.Event) { end() }))
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var ended atomic.Bool
				c := newClient(t, &upstream{life: time.Hour}, new(sessionlock.MemoryCache), option(func() {
					if !ended.Swap(true) {
						runtime.Goexit()
					}
				}))
				start := time.Now()
				got := <-askFor(t.Context(), c, "bob")
				require.Error(t, got.err)
				for _, other := range []error{sessionlock.ErrUnavailable, sessionlock.ErrInvalid, sessionlock.ErrRejected} {
					require.NotErrorIs(t, got.err, other)
				}
				assert.Zero(t, got.at.Sub(start))
				require.True(t, ended.Load())
				got = <-askFor(t.Context(), c, "bob")
				require.NoError(t, got.err)
				assert.LessOrEqual(t, got.at.Sub(start), 3300*time.Millisecond, "the lease of what was ended, and a poll")
			})
		})
	}
}

// eager is a Watcher that has news at once.
type eager struct{ *sessionlock.MemoryCache }

func (e eager) Watch(name string, changed func()) func() {
	changed()
	return e.MemoryCache.Watch(name, changed)
}

// Outside a bubble, which cannot see that somebody waits for a mutex.
func TestWatcherMayHaveNewsAtOnce(t *testing.T) {
	u := &upstream{life: time.Hour, takes: 20 * time.Millisecond}
	store := eager{new(sessionlock.MemoryCache)}
	a, b := newClient(t, u, store), newClient(t, u, store)
	for _, caller := range []<-chan answer{askFor(t.Context(), a, "bob"), askFor(t.Context(), b, "bob")} {
		select {
		case got := <-caller:
			require.NoError(t, got.err)
		case <-time.After(10 * time.Second):
			t.Fatal("deadlock")
		}
	}
	assert.Equal(t, 1, u.logins())
}

func TestFingerprintThatHangsFreesItsCallers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hang := make(chan struct{})
		defer close(hang)
		u := &upstream{life: time.Hour}
		c := newClient(t, u, new(sessionlock.MemoryCache), sessionlock.WithFingerprint(func(context.Context, string) (string, error) {
			<-hang
			return "v1", nil
		}))
		start := time.Now()
		patient := askFor(t.Context(), c, "bob")
		for range 5 {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
			asked := time.Now()
			got := <-askFor(ctx, c, "bob")
			cancel()
			require.ErrorIs(t, got.err, context.DeadlineExceeded)
			assert.Equal(t, 10*time.Millisecond, got.at.Sub(asked))
		}
		got := <-patient
		assert.Equal(t, time.Second, got.at.Sub(start), "the op timeout")
		require.Error(t, got.err)
		require.NotErrorIs(t, got.err, sessionlock.ErrUnavailable, "the store is not to blame")
		for call, err := range everyCall(t.Context(), c, "bob") {
			assert.Error(t, err, call)
		}
		assert.Zero(t, u.logins())
	})
}

// A store that hangs, talks, steps

func TestCancelledCallsSayThatTheyWere(t *testing.T) {
	errCause := errors.New("the user went away")
	for name, f := range map[string]func(context.Context, *sessionlock.Client, sessionlock.Session) error{
		"Logout": func(ctx context.Context, c *sessionlock.Client, _ sessionlock.Session) error {
			return c.Logout(ctx, "bob")
		},
		"Unsuppress": func(ctx context.Context, c *sessionlock.Client, _ sessionlock.Session) error {
			return c.Unsuppress(ctx, "bob")
		},
		"Inspect": func(ctx context.Context, c *sessionlock.Client, _ sessionlock.Session) error {
			_, err := c.Inspect(ctx, "bob")
			return err
		},
		"Invalidate": func(ctx context.Context, c *sessionlock.Client, s sessionlock.Session) error {
			return c.Invalidate(ctx, s)
		},
		"Session": func(ctx context.Context, c *sessionlock.Client, _ sessionlock.Session) error {
			_, err := c.Session(ctx, "alice")
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				shut := &gate{}
				c := newClient(t, &upstream{life: time.Hour}, spyCache{&spy{before: shut.before}, new(sessionlock.MemoryCache)})
				s, err := c.Session(t.Context(), "bob")
				require.NoError(t, err)
				shut.close(opLoad, opSwap)
				defer shut.open()
				for _, after := range []time.Duration{0, 50 * time.Millisecond} {
					ctx, cancel := context.WithCancelCause(t.Context())
					time.AfterFunc(after, func() { cancel(errCause) })
					if after == 0 {
						synctest.Wait()
					}
					start := time.Now()
					err := f(ctx, c, s)
					require.ErrorIs(t, err, context.Canceled)
					require.ErrorIs(t, err, errCause)
					require.NotErrorIs(t, err, sessionlock.ErrUnavailable)
					assert.Equal(t, after, time.Since(start))

					ctx, stop := context.WithTimeout(t.Context(), after)
					require.ErrorIs(t, f(ctx, c, s), context.DeadlineExceeded)
					stop()
				}
			})
		})
	}
}

// hungClock is a cache whose clock is behind a gate too.
type hungClock struct {
	spyCache
	clock *gate
}

func (c hungClock) Now(ctx context.Context) (time.Time, error) {
	_ = c.clock.before(ctx, "clock", "")
	return time.Now(), nil
}

func TestHungStoreCostsOneOpTimeoutHoweverOldItsClockIs(t *testing.T) {
	for name, quiet := range map[string]time.Duration{"never read": -1, "just read": 0, "six minutes old": 6 * time.Minute} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				shut, u := &gate{}, &upstream{life: time.Hour}
				c := newClient(t, u, hungClock{spyCache{&spy{before: shut.before}, new(sessionlock.MemoryCache)}, shut})
				if quiet >= 0 {
					require.Equal(t, "bob/1", tokenOf(t, c, "bob"))
					time.Sleep(quiet)
				}
				before := u.logins()
				shut.close(opLoad, opSwap, "clock")
				start := time.Now()
				_, err := c.Session(t.Context(), "alice")
				assertUnavailable(t, err)
				assert.Equal(t, time.Second, time.Since(start))
				assert.Equal(t, before, u.logins())
				shut.open()
			})
		})
	}
}

func TestColdBurstReadsTheClockOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var read atomic.Int64
		u := &upstream{life: time.Hour}
		c := newClient(t, u, clocked{new(sessionlock.MemoryCache), func() time.Time {
			read.Add(1)
			time.Sleep(5 * time.Millisecond)
			return time.Now()
		}})
		var wg sync.WaitGroup
		for i := range 500 {
			wg.Go(func() { _ = tokenOf(t, c, strconv.Itoa(i)) })
		}
		wg.Wait()
		assert.EqualValues(t, 1, read.Load())
		time.Sleep(6 * time.Minute)
		for i := range 500 {
			wg.Go(func() { _ = tokenOf(t, c, "late"+strconv.Itoa(i)) })
		}
		wg.Wait()
		synctest.Wait()
		assert.EqualValues(t, 2, read.Load())
	})
}

func TestTextOfAStoreThatQuotesIsNotPrinted(t *testing.T) {
	const secret = "canary-token-9"
	lines, seen := &logbook{}, &recorder{}
	told := []string{}
	synctest.Test(t, func(t *testing.T) {
		var quoted atomic.Bool
		var loud atomic.Bool
		store := new(sessionlock.MemoryCache)
		quote := func(b []byte) error {
			quoted.Store(quoted.Load() || strings.Contains(string(b), secret))
			return fmt.Errorf("pq: value too long: %q", b)
		}
		u := &upstream{}
		u.script = func(context.Context, string, int) (sessionlock.Session, error) {
			loud.Store(true)
			return sessionlock.Session{Token: sessionlock.NewToken(secret), Expiry: time.Now().Add(time.Hour)}, nil
		}
		c := newClient(t, u, quoting{store, &loud, quote}, sessionlock.WithLocker(new(memoryLocker)),
			sessionlock.WithLogger(slog.New(slog.NewJSONHandler(lines, nil))), sessionlock.WithObserver(seen))
		tell := func(err error) {
			told = append(told, fmt.Sprintf("%v %+v %#v %q", err, err, err, err))
		}
		s, err := c.Session(t.Context(), "bob")
		require.NoError(t, err, "served without being stored")
		require.True(t, quoted.Load())
		loud.Store(false)
		_, err = newClient(t, &upstream{script: u.script}, store).Session(t.Context(), "bob") // stored, for the next to trip over
		require.NoError(t, err)
		loud.Store(true)
		for call, err := range everyCall(t.Context(), c, "bob") {
			if call == "Logout" || call == "Unsuppress" || call == "Inspect" {
				assertUnavailable(t, err)
			}
			tell(err)
		}
		err = c.Invalidate(t.Context(), s)
		assertUnavailable(t, err)
		tell(err)
		loud.Store(false)
	})
	for _, e := range seen.all() {
		told = append(told, fmt.Sprintf("%v %+v", e, e.Err))
	}
	assert.Contains(t, lines.String(), "degraded")
	assert.NotContains(t, lines.String(), secret)
	assert.NotContains(t, strings.Join(told, "\n"), secret)
}

// quoting is a cache that while loud fails every call and says what it was
// given, or would have given.
type quoting struct {
	*sessionlock.MemoryCache
	loud  *atomic.Bool
	quote func([]byte) error
}

func (q quoting) Load(ctx context.Context, name string) ([]byte, error) {
	v, err := q.MemoryCache.Load(ctx, name)
	if q.loud.Load() {
		return nil, q.quote(v)
	}
	return v, err
}

func (q quoting) CompareAndSwap(ctx context.Context, name string, old, next []byte, ttl time.Duration) ([]byte, error) {
	if q.loud.Load() {
		return nil, q.quote(slices.Concat(old, next))
	}
	return q.MemoryCache.CompareAndSwap(ctx, name, old, next, ttl)
}

func TestBeginAndHeartbeatWakeNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, client := bubbleRedis(t)
		u := &upstream{life: time.Hour, takes: 2500 * time.Millisecond}
		sp := &spy{}
		c := newProcess(t, u, sessionlock.WithRedis(client()), sessionlock.WithLockTTL(600*time.Millisecond),
			sessionlock.WithLocker(spyLocker{sp, new(memoryLocker)}))
		_, err := c.Inspect(t.Context(), "bob") // the server is up
		require.NoError(t, err)
		ear := m.NewSubscriber()
		defer ear.Close()
		ear.Psubscribe("*")
		var heard atomic.Int64
		go func() {
			for range ear.Pmessages() {
				heard.Add(1)
			}
		}()
		caller := askFor(t.Context(), c, "bob")
		time.Sleep(2400 * time.Millisecond)
		assert.GreaterOrEqual(t, sp.count(opExtend), 10)
		assert.Zero(t, heard.Load())
		require.NoError(t, (<-caller).err)
		synctest.Wait()
		assert.EqualValues(t, 1, heard.Load(), "the commit")
		require.NoError(t, c.Logout(t.Context(), "bob"))
		synctest.Wait()
		assert.EqualValues(t, 2, heard.Load(), "and the logout")
	})
}

func TestUnwrapNeverHoldsNil(t *testing.T) {
	c := newClient(t, &upstream{life: time.Hour}, new(sessionlock.MemoryCache),
		sessionlock.WithRejected(func(error) sessionlock.Verdict { return sessionlock.RejectedDuring }))
	notAgain := c.Do(t.Context(), "bob", func(context.Context, sessionlock.Session) error { return errDead })
	require.ErrorIs(t, notAgain, errDead)
	for name, err := range map[string]error{
		"not run again": notAgain, "no rejection": &sessionlock.ReauthError{}, "no cause": &sessionlock.LoginError{},
		"a denial without cause": &sessionlock.LoginError{Class: sessionlock.LoginDenied}, "no try": &sessionlock.LockError{},
	} {
		many, ok := err.(interface{ Unwrap() []error })
		require.True(t, ok, name)
		assert.NotContains(t, many.Unwrap(), error(nil), name)
		assert.NotErrorIs(t, err, context.Canceled, name)
	}
}

// F18

func TestRedisErrorIsUnavailableInTheServersWords(t *testing.T) {
	writes := []string{"EVALSHA", "EVAL", "SET"}
	all := append([]string{"GETRANGE", "TIME"}, writes...)
	for text, refused := range map[string][]string{
		"LOADING Redis is loading the dataset in memory":                    all,
		"NOPERM this user has no permissions to run the command":            all,
		"READONLY You can't write against a read only replica.":             writes,
		"OOM command not allowed when used memory > 'maxmemory'.":           writes,
		"MISCONF Redis is configured to save RDB snapshots, but it cannot.": writes,
	} {
		word, _, _ := strings.Cut(text, " ")
		t.Run(word, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m, client := bubbleRedis(t)
				u := &upstream{life: time.Hour}
				c := newProcess(t, u, sessionlock.WithRedis(client()))
				require.Equal(t, "bob/1", tokenOf(t, c, "bob"))
				synctest.Wait()
				m.Server().SetPreHook(func(p *server.Peer, cmd string, _ ...string) bool {
					if slices.Contains(refused, strings.ToUpper(cmd)) {
						p.WriteError(text)
						return true
					}
					return false
				})
				assert.Equal(t, "bob/1", tokenOf(t, c, "bob"), "near")
				_, session := c.Session(t.Context(), "alice")
				for _, err := range []error{session, c.Logout(t.Context(), "bob")} {
					assertUnavailable(t, err)
					require.ErrorContains(t, err, text)
					var said redis.Error
					require.ErrorAs(t, err, &said)
				}
				assert.Equal(t, 1, u.logins())
				m.Server().SetPreHook(nil)
				assert.Equal(t, "alice/2", tokenOf(t, c, "alice"), "nothing was counted")
			})
		})
	}
}

// F22

func TestRedisPoolThatIsExhaustedIsUnavailable(t *testing.T) {
	s := newSite(t)
	rdb := s.Client(func(o *redis.Options) { o.PoolSize = 1 })
	c := s.client(rdb)
	s.session(c, "bob")
	held := make(chan error, 1)
	go func() { held <- rdb.BLPop(context.WithoutCancel(t.Context()), 0, "nothing-yet").Err() }()
	other := s.Client()
	require.Eventually(t, func() bool {
		info, err := other.Info(t.Context(), "clients").Result()
		return err == nil && strings.Contains(info, "blocked_clients:1")
	}, 10*time.Second, 5*time.Millisecond)
	s.session(c, "bob") // near
	var err error
	took := timed(func() { _, err = c.Session(t.Context(), "alice") })
	unavailable(t, err)
	assert.GreaterOrEqual(t, took, opTimeout)
	assert.Less(t, took, opTimeout+500*time.Millisecond)
	s.logins(0, "alice")
	require.NoError(t, other.RPush(t.Context(), "nothing-yet", "now").Err())
	require.NoError(t, <-held)
	s.recovers(c, "alice")
	s.logins(1, "alice")
}

// F33

func TestStepOfTheStoresClockCostsOneLoginAtMost(t *testing.T) {
	for _, step := range []time.Duration{time.Hour, -time.Hour} {
		t.Run(step.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var off atomic.Int64
				store := clocked{new(sessionlock.MemoryCache), func() time.Time { return time.Now().Add(time.Duration(off.Load())) }}
				u := &upstream{life: 30 * time.Minute, takes: 5 * time.Second}
				a := newClient(t, u, store)
				first, err := a.Session(t.Context(), "alice") // a session
				require.NoError(t, err)
				leader := askFor(t.Context(), a, "bob") // a lease
				time.Sleep(2 * time.Second)
				off.Store(int64(step))
				b := newClient(t, u, store) // reads the clock as it is now
				highest := map[string]uint64{"alice": first.Generation()}
				for start := time.Now(); time.Since(start) < 10*time.Minute; time.Sleep(5 * time.Second) {
					for _, c := range []*sessionlock.Client{b, a} {
						for _, key := range []string{"alice", "bob"} {
							asked := time.Now()
							s, err := c.Session(t.Context(), key)
							require.NoError(t, err)
							require.LessOrEqual(t, time.Since(asked), 12*time.Second)
							require.GreaterOrEqual(t, s.Generation(), highest[key], key)
							highest[key] = s.Generation()
							time.Sleep(50 * time.Millisecond) // until the other has heard of it
						}
					}
				}
				require.NoError(t, (<-leader).err)
				assert.LessOrEqual(t, u.logins(), 4, "one more per key")
			})
		})
	}
}

func TestLeaseOfADeadLeaderEndsThoughTheStoresClockWasSetBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var off atomic.Int64
		now := func() time.Time { return time.Now().Add(time.Duration(off.Load())) }
		store, gone, u := new(sessionlock.MemoryCache), &cut{}, &upstream{life: time.Hour}
		u.script = func(ctx context.Context, key string, n int) (sessionlock.Session, error) {
			if n == 1 {
				gone.off.Store(true)
				_ = pauseFor(ctx, 9*time.Second)
			}
			return u.grant(key, n), nil
		}
		dead := askFor(t.Context(), newClient(t, u, hungClock{spyCache{&spy{before: gone.before}, store}, &gate{}}), "bob")
		time.Sleep(500 * time.Millisecond)
		off.Store(int64(-time.Hour))
		start := time.Now()
		s, err := newClient(t, u, clocked{store, now}).Session(t.Context(), "bob")
		require.NoError(t, err)
		assert.LessOrEqual(t, time.Since(start), 3300*time.Millisecond, "lock TTL and a poll")
		got := <-dead
		require.NoError(t, got.err)
		assert.Greater(t, s.Generation(), got.session.Generation())
		assert.Equal(t, 2, u.logins())
	})
}

// F64

func TestUpstreamWithOneSessionPerUserIsRepairedOnce(t *testing.T) {
	eachStore(t, func(t *testing.T, process func() sessionlock.Option) {
		u := &upstream{life: time.Hour, takes: 300 * time.Millisecond}
		var alive, repaired atomic.Value // tokens: each login kills the one before
		repaired.Store("")
		var late atomic.Int64
		u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
			s := u.grant(key, n)
			alive.Store(s.Token.Reveal())
			return s, nil
		}
		var fleet []*sessionlock.Client
		for range 3 {
			fleet = append(fleet, newProcess(t, u, process()))
		}
		call := func(_ context.Context, s sessionlock.Session) error {
			if s.Token.Reveal() == alive.Load() {
				return nil
			}
			if repaired.Load() == alive.Load() {
				late.Add(1)
			}
			return sessionlock.Reject(errDead)
		}
		for round := range 3 {
			for _, c := range fleet {
				require.NoError(t, c.Do(t.Context(), "bob", call))
			}
			require.Equal(t, round+1, u.logins())
			time.Sleep(time.Minute)                            // it has proved itself
			alive.Store(fmt.Sprint("somebody else's ", round)) // the user logs in by hand
			var wg sync.WaitGroup
			for _, c := range fleet {
				for range 10 {
					wg.Go(func() { assert.NoError(t, c.Do(t.Context(), "bob", call)) })
				}
			}
			wg.Wait()
			synctest.Wait()
			require.Equal(t, round+2, u.logins(), "one repair for the fleet")
			repaired.Store(alive.Load())
		}
		assert.Zero(t, late.Load(), "uses of a killed session after its repair")
	})
}

// silentClock is a cache whose clock never answers.
type silentClock struct{ *sessionlock.MemoryCache }

func (silentClock) Now(ctx context.Context) (time.Time, error) {
	<-ctx.Done()
	return time.Time{}, ctx.Err()
}

// stepped is a cache whose clock differs from ours.
type stepped struct {
	*sessionlock.MemoryCache
	by time.Duration
}

func (s stepped) Now(context.Context) (time.Time, error) { return time.Now().Add(s.by), nil }

func TestColdKeysDoNotQueueForAClockThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, start := newClient(t, &upstream{}, silentClock{new(sessionlock.MemoryCache)}), time.Now()
		var callers []<-chan answer
		for i := range 30 {
			callers = append(callers, askFor(t.Context(), c, "key"+strconv.Itoa(i)))
		}
		for _, caller := range callers {
			got := <-caller
			require.ErrorIs(t, got.err, sessionlock.ErrUnavailable)
			require.Equal(t, time.Second, got.at.Sub(start), "one op timeout, not one for each key")
		}
	})
}

func TestLogoutDuringAHungLoginStartsNoSecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		free, u := make(chan struct{}), &upstream{life: time.Hour}
		u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
			if n == 1 {
				<-free
			}
			return u.grant(key, n), nil
		}
		c := newClient(t, u, new(sessionlock.MemoryCache))
		first := askFor(t.Context(), c, "bob")
		time.Sleep(time.Second)
		require.NoError(t, c.Logout(t.Context(), "bob"))
		second := askFor(t.Context(), c, "bob")
		require.Error(t, (<-first).err)
		require.ErrorIs(t, (<-second).err, sessionlock.ErrSuppressed)
		assert.Equal(t, 1, u.logins())
		close(free)
	})
}

func TestEvictionForgetsNoLoginUnderWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, inside, most := &upstream{life: time.Hour}, atomic.Int32{}, atomic.Int32{}
		u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
			if key == "bob" {
				most.Store(max(most.Load(), inside.Add(1)))
				time.Sleep(9 * time.Second)
				inside.Add(-1)
			}
			return u.grant(key, n), nil
		}
		c := newClient(t, u, new(sessionlock.MemoryCache), sessionlock.WithNearCache(16, time.Minute), sessionlock.WithLocker(grantsAll{}))
		first := askFor(t.Context(), c, "bob")
		time.Sleep(time.Second)
		require.NoError(t, c.Logout(t.Context(), "bob")) // the entry forgets the attempt, and the lock guards nothing
		for i := range 60 {
			tokenOf(t, c, "key"+strconv.Itoa(i))
		}
		second := askFor(t.Context(), c, "bob")
		require.ErrorIs(t, (<-first).err, sessionlock.ErrStale)
		require.NoError(t, (<-second).err)
		assert.EqualValues(t, 1, most.Load(), "logins of one key at once in one process")
	})
}

// grantsAll is a Locker that keeps nobody out.
type grantsAll struct{}

func (grantsAll) TryLock(context.Context, string, time.Duration) (sessionlock.Lock, error) {
	return grantsAll{}, nil
}
func (grantsAll) Extend(context.Context, time.Duration) error { return nil }
func (grantsAll) Unlock(context.Context) error                { return nil }

func TestCloseAfterALogoutFreesWhoWaitsForAPeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u := new(sessionlock.MemoryCache), &upstream{life: time.Hour}
		peer := askFor(t.Context(), newClient(t, &upstream{takes: 9 * time.Second}, store), "bob")
		time.Sleep(100 * time.Millisecond)
		c := newClient(t, u, store)
		waiter := askFor(t.Context(), c, "bob")
		time.Sleep(100 * time.Millisecond)
		require.NoError(t, c.Logout(t.Context(), "bob"))
		start := time.Now()
		require.NoError(t, c.Close(t.Context()))
		assert.Zero(t, time.Since(start))
		require.ErrorIs(t, (<-waiter).err, sessionlock.ErrClosed)
		assert.Zero(t, u.logins())
		<-peer
	})
}

func TestCommitIsTriedToTheEndOfTheLease(t *testing.T) {
	for _, ttl := range []time.Duration{3 * time.Second, 11 * time.Second} {
		t.Run(ttl.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				u, sp := &upstream{life: time.Hour}, &spy{}
				var tries []time.Time
				sp.before = func(_ context.Context, op, name string) error {
					if op == opSwap && isEntry(name) && u.logins() > 0 {
						tries = append(tries, time.Now())
						return errStoreDown
					}
					return nil
				}
				c, start := newClient(t, u, spyCache{sp, new(sessionlock.MemoryCache)}, sessionlock.WithLockTTL(ttl)), time.Now()
				tokenOf(t, c, "bob") // served all the same
				assert.WithinDuration(t, start.Add(ttl), time.Now(), 250*time.Millisecond)
				for i := range tries[1:] { // once a second when the store is known to be dead
					assert.LessOrEqual(t, tries[i+1].Sub(tries[i]), 1250*time.Millisecond)
				}
			})
		})
	}
}

func TestErrorsOfOtherClientsStayTheirOwn(t *testing.T) {
	foreign := func() *sessionlock.LockError {
		return &sessionlock.LockError{Attempts: 3, Waited: time.Second, Err: sessionlock.ErrLocked}
	}
	t.Run("from a logout", func(t *testing.T) {
		theirs, seen := foreign(), &recorder{}
		c := newClient(t, &upstream{life: time.Hour}, new(sessionlock.MemoryCache), sessionlock.WithObserver(seen),
			sessionlock.WithLogout(func(context.Context, sessionlock.Session) error { return theirs }))
		tokenOf(t, c, "bob")
		require.ErrorIs(t, c.Logout(t.Context(), "bob"), theirs)
		assert.Equal(t, foreign().Error(), theirs.Error())
		assert.NotContains(t, seen.kinds(), sessionlock.EventLockTimeout)
	})
	t.Run("from a login", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			u := &upstream{}
			u.script = func(context.Context, string, int) (sessionlock.Session, error) {
				time.Sleep(time.Second)
				return sessionlock.Session{}, foreign()
			}
			c := newClient(t, u, new(sessionlock.MemoryCache))
			callers := []<-chan answer{askFor(t.Context(), c, "bob"), askFor(t.Context(), c, "bob")}
			for _, caller := range callers {
				got := <-caller
				require.ErrorIs(t, got.err, sessionlock.ErrLockTimeout)
				require.NotErrorIs(t, got.err, sessionlock.ErrSuppressed)
			}
			assert.Equal(t, 1, u.logins())
		})
	})
}

func TestExpiryInAFarYearIsNeverInThePast(t *testing.T) {
	store, u := new(sessionlock.MemoryCache), &upstream{}
	u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
		s := u.grant(key, n)
		s.Expiry = time.Date(9999, 12, 31, 0, 0, 0, 0, time.UTC)
		return s, nil
	}
	for _, by := range []time.Duration{0, -time.Second, time.Second} {
		s, err := newClient(t, u, stepped{store, by}).Session(t.Context(), "bob")
		require.NoError(t, err)
		assert.Greater(t, s.Expiry.Year(), 2200)
	}
	assert.Equal(t, 1, u.logins())
}

func TestInvalidateJudgesByTheStoresClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, cache := &upstream{life: 48 * time.Hour}, stepped{new(sessionlock.MemoryCache), -24 * time.Hour}
		c := newClient(t, u, cache)
		for range 2 {
			s, err := c.Session(t.Context(), "bob")
			require.NoError(t, err)
			require.NoError(t, newClient(t, u, cache).Invalidate(t.Context(), s), "by one that has not looked at the clock yet")
			time.Sleep(100 * time.Millisecond)
			synctest.Wait()
		}
		_, err := c.Session(t.Context(), "bob")
		require.ErrorIs(t, err, sessionlock.ErrSuppressed, "two young rejections in a row")
		assert.Equal(t, 2, u.logins())
	})
}

// R2: what Invalidate could not say, After says.
func TestRejectionIsRepairedThoughInvalidatingFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var rejected, failed atomic.Bool
		sp := &spy{before: func(_ context.Context, op, name string) error {
			if op == opSwap && isEntry(name) && rejected.Load() && failed.CompareAndSwap(false, true) {
				return errStoreDown
			}
			return nil
		}}
		u, store := &upstream{life: time.Hour}, new(sessionlock.MemoryCache)
		c := newClient(t, u, spyCache{sp, store})
		err := c.Do(t.Context(), "bob", func(_ context.Context, s sessionlock.Session) error {
			if s.Token.Reveal() == "bob/1" {
				rejected.Store(true)
				return sessionlock.Reject(errDead)
			}
			return nil
		})
		require.NoError(t, err)
		require.True(t, failed.Load())
		assert.Equal(t, 2, u.logins())
		assert.Equal(t, "bob/2", tokenOf(t, newClient(t, u, store), "bob"))
	})
}

// R3: a commit that falls on either side of the watch is not missed. Ticks are
// 10 s apart, so who waits for one is late.
func TestNoWakeUpIsLostBetweenLookAndWatch(t *testing.T) {
	for _, load := range []int{1, 2} { // what was read there is old when it arrives
		t.Run(fmt.Sprint("after load ", load), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store, goOn, start := new(sessionlock.MemoryCache), make(chan struct{}), time.Now()
				u := &upstream{life: time.Hour}
				u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
					<-goOn
					return u.grant(key, n), nil
				}
				waits := sessionlock.WithWait(3, 10*time.Second)
				leader := askFor(t.Context(), newClient(t, u, store, waits), "bob")
				time.Sleep(100 * time.Millisecond)
				loads, sp := 0, &spy{}
				sp.after = func(_ context.Context, op, name string) error {
					if op == opLoad && isEntry(name) {
						if loads++; loads == load {
							close(goOn)
							<-leader
						}
					}
					return nil
				}
				got := <-askFor(t.Context(), newClient(t, u, spyCache{sp, store}, waits), "bob")
				require.NoError(t, got.err)
				assert.LessOrEqual(t, got.at.Sub(start), 200*time.Millisecond)
				assert.Equal(t, 1, u.logins())
			})
		})
	}
}

// A login that a Put overtakes and that then fails has a session all the same; and
// who comes while it hangs does not wait for it.
func TestPutServesTheCallersOfALoginThatFails(t *testing.T) {
	for name, err := range map[string]error{
		"denied": sessionlock.Denied(errors.New("401")), "deferred": sessionlock.RetryAfter(errors.New("503"), 0), "unknown": errors.New("500"),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store, start := new(sessionlock.MemoryCache), time.Now()
				u := &upstream{takes: 9 * time.Second}
				u.script = func(context.Context, string, int) (sessionlock.Session, error) { return sessionlock.Session{}, err }
				a := newClient(t, u, store)
				first := askFor(t.Context(), a, "bob")
				time.Sleep(100 * time.Millisecond)
				_, putErr := newClient(t, &upstream{}, store).Put(t.Context(), "bob", sessionlock.Session{Token: sessionlock.NewToken("put"), Expiry: time.Now().Add(time.Hour)})
				require.NoError(t, putErr)
				time.Sleep(lockTTL / 2) // a beat
				asked := time.Now()
				assert.Equal(t, "put", tokenOf(t, a, "bob"))
				assert.Zero(t, time.Since(asked))
				got := <-first
				require.NoError(t, got.err)
				assert.Equal(t, "put", got.session.Token.Reveal())
				assert.Equal(t, u.takes, got.at.Sub(start))
				assert.Equal(t, 1, u.logins())
			})
		})
	}
}

// What lasts is logged once per key, and observed each time.
func TestSuppressedKeyIsLoggedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		book, seen := &logbook{}, &recorder{}
		u := failing(func(int) error { return sessionlock.Denied(errors.New("401")) })
		c := newClient(t, u, new(sessionlock.MemoryCache), sessionlock.WithObserver(seen), sessionlock.WithLogger(slog.New(slog.NewJSONHandler(book, nil))))
		for range 100 {
			_, err := c.Session(t.Context(), "bob")
			require.ErrorIs(t, err, sessionlock.ErrDenied)
		}
		lines := func() int { return strings.Count(book.String(), `"sessionlock: suppressed"`) }
		assert.Equal(t, 1, lines())
		assert.Equal(t, 99, strings.Count(fmt.Sprint(seen.kinds()), sessionlock.EventSuppressed))
		require.NoError(t, c.Unsuppress(t.Context(), "bob"))
		time.Sleep(time.Second)
		for range 10 {
			_, err := c.Session(t.Context(), "bob")
			require.Error(t, err)
		}
		assert.Equal(t, 2, lines(), "another failure is news")
	})
}

func TestErrorsSayInOurWordsWhatIsKnown(t *testing.T) {
	for want, cause := range map[string]error{
		", answered with status 500":                sessionlock.LoginStatus(&http.Response{StatusCode: http.StatusInternalServerError}),
		", it could not connect":                    fmt.Errorf("secret: %w", &net.OpError{Op: "dial", Err: errors.New("secret")}),
		", it timed out":                            fmt.Errorf("secret: %w", context.DeadlineExceeded),
		", it asked for the session it was to make": fmt.Errorf("secret: %w", sessionlock.ErrReentrant),
		", panic with a value of type string":       nil,
	} {
		t.Run(want, func(t *testing.T) {
			u := failing(func(int) error {
				if cause == nil {
					panic("secret")
				}
				return cause
			})
			_, err := newClient(t, u, new(sessionlock.MemoryCache)).Session(t.Context(), "bob")
			require.ErrorContains(t, err, want)
			assert.NotContains(t, err.Error(), "secret")
		})
	}
}

// R1 holds for what overtakes a failing login too.
func TestRejectedTokenPutDuringTheRenewalIsNotAdopted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u := new(sessionlock.MemoryCache), &upstream{takes: 5 * time.Second}
		u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
			if n == 1 {
				return u.grant(key, n), nil
			}
			return sessionlock.Session{}, errors.New("500")
		}
		c := newClient(t, u, store)
		tokenOf(t, c, "bob")
		runs := 0
		done := make(chan error, 1)
		go func() {
			done <- c.Do(t.Context(), "bob", func(context.Context, sessionlock.Session) error {
				runs++
				return sessionlock.Reject(errDead)
			})
		}()
		time.Sleep(time.Second)
		_, err := newClient(t, &upstream{}, store).Put(t.Context(), "bob", sessionlock.Session{Token: sessionlock.NewToken("bob/1")})
		require.NoError(t, err)
		err = <-done
		require.ErrorIs(t, err, sessionlock.ErrRejected)
		require.ErrorAs(t, err, new(*sessionlock.LoginError), "why there is no other")
		assert.Equal(t, 1, runs)
	})
}
