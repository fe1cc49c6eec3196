package sessionlock_test

// Sessions that are renewed before they end, by refresh or login, and sessions
// that live on by being used.

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http/httptrace"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock"
)

// exactly makes a session's end its Expiry.
func exactly() sessionlock.Option { return sessionlock.WithExpiryMargin(0) }

// noNear is a process that holds no copies.
func noNear() sessionlock.Option { return sessionlock.WithNearCache(0, time.Minute) }

// inUse has one caller of each client ask for bob every step until d has passed,
// and fails the test when one gets an error or has to wait. It returns the tokens
// that were served last.
func inUse(t *testing.T, d, step time.Duration, clients ...*sessionlock.Client) []string {
	t.Helper()
	var wg sync.WaitGroup
	tokens := make([]string, len(clients))
	for i, c := range clients {
		wg.Go(func() {
			for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(step) {
				asked := time.Now()
				s, err := c.Session(t.Context(), "bob")
				if !assert.NoError(t, err) || !assert.Zero(t, time.Since(asked), "a caller waited") {
					return
				}
				tokens[i] = s.Token.Reveal()
			}
		})
	}
	wg.Wait()
	return tokens
}

// gaps returns what lies between the starts.
func gaps(starts []time.Duration) (out []time.Duration) {
	for i := 1; i < len(starts); i++ {
		out = append(out, starts[i]-starts[i-1])
	}
	return out
}

// allWithin checks that every duration lies between low and high.
func allWithin(t *testing.T, low, high time.Duration, ds []time.Duration) {
	t.Helper()
	for _, d := range ds {
		assert.GreaterOrEqual(t, d, low, "%v", ds)
		assert.LessOrEqual(t, d, high, "%v", ds)
	}
}

func bobs(from, to int) []string {
	out := []string{}
	for n := from; n <= to; n++ {
		out = append(out, fmt.Sprintf("bob/%d", n))
	}
	return out
}

// R7

func TestSessionInUseIsRenewedAheadAndNobodyWaits(t *testing.T) {
	for name, opts := range map[string][]sessionlock.Option{"near": nil, "no near": {noNear()}} {
		t.Run(name, func(t *testing.T) {
			eachStore(t, func(t *testing.T, process func() sessionlock.Option) {
				const life, window, login, step = time.Minute, 20 * time.Second, 2 * time.Second, 250 * time.Millisecond
				u, start := &upstream{life: life, takes: login}, time.Now()
				var fleet []*sessionlock.Client
				for range 3 {
					c := newProcess(t, u, process(), append(opts, exactly(), sessionlock.WithRefreshAhead(window))...)
					fleet = append(fleet, c)
					tokenOf(t, c, "bob")
				}
				inUse(t, 5*time.Minute, step, fleet...)
				used := u.starts(start)
				assert.Equal(t, 1, u.atOnce())
				// A session begins when its login ends, and is renewed window ± 10 % before its end.
				allWithin(t, login+life-window*11/10, login+life-window*9/10+step, gaps(used))
				assert.GreaterOrEqual(t, len(used), 7)

				time.Sleep(5 * time.Minute)
				n := u.logins()
				assert.LessOrEqual(t, n, len(used)+1, "one more at the most when nobody uses it")
				assert.Equal(t, bobs(1, n-1), u.ended(), "each that was displaced, once")
				for i, at := range u.starts(start)[1:] {
					assert.Equal(t, at+login+30*time.Second, u.outAt[i].Sub(start), "after the grace")
				}
			})
		})
	}
}

func TestRenewalsAreSpreadOverAFifthOfTheWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const life, window, keys = 10 * time.Minute, time.Minute, 200
		u, start := &upstream{life: life}, time.Now()
		c := newClient(t, u, new(sessionlock.MemoryCache), exactly(), sessionlock.WithRefreshAhead(window))
		for time.Since(start) < life-time.Second {
			for k := range keys {
				tokenOf(t, c, fmt.Sprint("bob ", k))
			}
			time.Sleep(10 * time.Second)
		}
		began := u.starts(start)[keys:]
		require.Len(t, began, keys, "each key once")
		allWithin(t, life-window*11/10, life-window*9/10, began)
		assert.Less(t, slices.Min(began), life-window*108/100)
		assert.Greater(t, slices.Max(began), life-window*92/100)
		slices.Sort(began)
		assert.Less(t, slices.Max(gaps(began)), window/20, "evenly")
	})
}

func TestWindowIsHalfOfALifeAtMost(t *testing.T) {
	for name, opts := range map[string][]sessionlock.Option{"near": nil, "no near": {noNear()}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const life = time.Minute
				u, start := &upstream{life: life}, time.Now()
				c := newClient(t, u, new(sessionlock.MemoryCache), append(opts, exactly(), sessionlock.WithRefreshAhead(time.Hour))...)
				tokenOf(t, c, "bob")
				inUse(t, 10*time.Minute, 100*time.Millisecond, c)
				allWithin(t, life-life/2*11/10, life-life/2*9/10+100*time.Millisecond, gaps(u.starts(start)))
			})
		})
	}
}

func TestSessionThatNobodyUsesIsNotRenewed(t *testing.T) {
	for name, used := range map[string]time.Duration{"once": 0, "for half of its life": 5 * time.Minute} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store, u := new(sessionlock.MemoryCache), &upstream{life: 10 * time.Minute}
				a := newClient(t, u, store, exactly(), sessionlock.WithRefreshAhead(time.Minute))
				b := newClient(t, u, store, exactly(), sessionlock.WithRefreshAhead(time.Minute))
				tokenOf(t, a, "bob")
				tokenOf(t, b, "bob")
				inUse(t, used, time.Second, a, b)
				time.Sleep(time.Hour)
				assert.Equal(t, 1, u.logins())
			})
		})
	}
}

func TestRenewedSessionThatNobodyUsesIsNotRenewedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := &upstream{life: 10 * time.Second} // several are over before a near copy is judged
		c := newClient(t, u, new(sessionlock.MemoryCache), exactly(), sessionlock.WithRefreshAhead(2*time.Second))
		tokenOf(t, c, "bob")
		time.Sleep(time.Hour)
		assert.Equal(t, 2, u.logins(), "it was used, just before")
	})
}

func TestRenewerThatDiesIsSucceeded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const window = 30 * time.Second
		store := new(sessionlock.MemoryCache)
		u, start, died := &upstream{life: 2 * time.Minute}, time.Now(), time.Duration(0)
		var fleet []*sessionlock.Client
		for range 3 {
			dead := &cut{}
			own := sessionlock.AuthenticatorFunc(func(ctx context.Context, key string) (sessionlock.Session, error) {
				s, err := u.Login(ctx, key)
				if s.Token.Reveal() == "bob/2" { // and the store does not hear of this process again
					died = time.Since(start)
					dead.off.Store(true)
					<-ctx.Done()
					return sessionlock.Session{}, ctx.Err()
				}
				return s, err
			})
			c, err := sessionlock.New(acme, own, sessionlock.WithCache(spyCache{&spy{before: dead.before}, store}), exactly(), sessionlock.WithRefreshAhead(window))
			require.NoError(t, err)
			t.Cleanup(func() { _ = c.Close(context.WithoutCancel(t.Context())) })
			tokenOf(t, c, "bob")
			fleet = append(fleet, c)
		}
		tokens := inUse(t, 110*time.Second, 100*time.Millisecond, fleet...)
		slices.Sort(tokens)
		assert.Equal(t, []string{"bob/1", "bob/3", "bob/3"}, tokens, "the dead one has its copy still")
		require.Equal(t, 3, u.logins())
		assert.NotZero(t, died)
		// What is left of lock and lease, and a try of who was not elected.
		assert.LessOrEqual(t, u.starts(start)[2]-died, 2*lockTTL)
	})
}

func TestRenewalWaitsForNobody(t *testing.T) {
	for name, opts := range map[string][]sessionlock.Option{"near": nil, "no near": {noNear()}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				u, held, sp := &upstream{life: 2 * time.Minute, takes: time.Second}, new(memoryLocker), &spy{}
				c := newClient(t, u, new(sessionlock.MemoryCache), append(opts, exactly(),
					sessionlock.WithLocker(spyLocker{sp, held}), sessionlock.WithRefreshAhead(time.Minute))...)
				tokenOf(t, c, "bob")
				synctest.Wait() // the answer comes before the unlock
				other, err := held.TryLock(t.Context(), sp.seen(lockSuffix)[0], time.Hour)
				require.NoError(t, err)
				inUse(t, 100*time.Second, 100*time.Millisecond, c)
				tries := sp.count(opLock) - 1
				assert.GreaterOrEqual(t, tries, 34/3, "it tries again")
				assert.LessOrEqual(t, tries, 46*2/3+1, "but not sooner than half of the lock TTL")
				require.Equal(t, 1, u.logins())
				require.NoError(t, other.Unlock(t.Context()))
				assert.Equal(t, []string{"bob/2"}, inUse(t, lockTTL+2*time.Second, 100*time.Millisecond, c))
			})
		})
	}
}

func TestProcessThatIsNotElectedAdopts(t *testing.T) {
	for name, tc := range map[string]struct {
		faces  func(*sessionlock.MemoryCache) sessionlock.Cache
		within time.Duration
	}{
		"by push": {func(m *sessionlock.MemoryCache) sessionlock.Cache { return m }, 20 * time.Millisecond},
		"by poll": {func(m *sessionlock.MemoryCache) sessionlock.Cache { return polled{m} }, lockTTL},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store, u, start := new(sessionlock.MemoryCache), &upstream{life: time.Minute, takes: 5 * time.Second}, time.Now()
				var fleet []*sessionlock.Client
				for range 5 {
					c := newClient(t, u, tc.faces(store), exactly(), sessionlock.WithRefreshAhead(20*time.Second))
					tokenOf(t, c, "bob")
					fleet = append(fleet, c)
				}
				inUse(t, 51*time.Second, 100*time.Millisecond, fleet...)
				require.Equal(t, 2, u.logins())
				time.Sleep(u.starts(start)[1] + u.takes + tc.within - time.Since(start))
				for _, c := range fleet {
					assert.Equal(t, "bob/2", tokenOf(t, c, "bob"))
				}
				var waited uint64
				for _, c := range fleet {
					waited += c.Stats().Adopted
				}
				assert.Zero(t, waited)
			})
		})
	}
}

func TestFailingRenewalKeepsTheSessionAndIsNotRepeatedTooSoon(t *testing.T) {
	const s = time.Second
	for name, tc := range map[string]struct {
		err   error
		asked time.Duration // by the upstream, to be left alone
		most  int           // tries
		class sessionlock.LoginClass
	}{
		"throttled": {sessionlock.RetryAfter(errors.New("429"), 7*s), 7 * s, 8, sessionlock.LoginDeferred},
		"down":      {&net.OpError{Op: "dial", Err: errors.New("refused")}, 0, 8, sessionlock.LoginDeferred},
		"unknown":   {errors.New("500"), 0, 2, sessionlock.LoginUnknown}, // the last of the budget is the callers'
		"denied":    {sessionlock.Denied(errors.New("wrong password")), 0, 1, sessionlock.LoginDenied},
	} {
		t.Run(name, func(t *testing.T) {
			eachStore(t, func(t *testing.T, process func() sessionlock.Option) {
				const life, window = 3 * time.Minute, time.Minute
				start := time.Now()
				u := failing(func(n int) error {
					if n == 1 {
						return nil
					}
					return tc.err
				})
				u.life = life
				var fleet []*sessionlock.Client
				for range 3 {
					c := newProcess(t, u, process(), exactly(), sessionlock.WithRefreshAhead(window))
					tokenOf(t, c, "bob")
					fleet = append(fleet, c)
				}
				tokens := inUse(t, life-100*time.Millisecond, 100*time.Millisecond, fleet...)
				assert.Equal(t, []string{"bob/1", "bob/1", "bob/1"}, tokens)
				for _, c := range fleet {
					assert.Zero(t, c.Stats().Suppressed, "nobody was refused a session")
				}
				tries := u.starts(start)[1:]
				require.LessOrEqual(t, len(tries), tc.most, "%v", tries)
				require.GreaterOrEqual(t, len(tries), min(tc.most, 5), "%v", tries)
				for i, gap := range gaps(tries) {
					left := max(tc.asked, (life-tries[i])/4)
					assert.GreaterOrEqual(t, gap, left-time.Millisecond, "%v", tries) // the store's time is in µs
					assert.LessOrEqual(t, gap, max(left, s<<i/4)+lockTTL, "%v", tries)
				}
				time.Sleep(200 * time.Millisecond)
				_, err := fleet[0].Session(t.Context(), "bob")
				var failed *sessionlock.LoginError
				require.ErrorAs(t, err, &failed, "when the session has ended its callers learn why there is no other")
				assert.Equal(t, tc.class, failed.Class)
			})
		})
	}
}

// renewal returns an upstream whose first login is done and whose second has just
// begun ahead of time in c; what the second brings is said by script.
func renewal(t *testing.T, u *upstream, c *sessionlock.Client) sessionlock.Session {
	t.Helper()
	s, err := c.Session(t.Context(), "bob")
	require.NoError(t, err)
	for u.logins() == 1 {
		inUse(t, 100*time.Millisecond, 100*time.Millisecond, c)
		require.Less(t, time.Since(s.Expiry), time.Duration(0), "it was not renewed")
	}
	return s
}

func TestRejectedCallerJoinsTheRenewal(t *testing.T) {
	for name, opts := range map[string][]sessionlock.Option{"near": nil, "no near": {noNear()}} {
		t.Run(name, func(t *testing.T) {
			eachStore(t, func(t *testing.T, process func() sessionlock.Option) {
				u := &upstream{life: time.Minute, takes: 3 * time.Second}
				opts := append(opts, exactly(), sessionlock.WithRefreshAhead(20*time.Second))
				a := newProcess(t, u, process(), opts...)
				tokenOf(t, a, "bob")
				b := newProcess(t, u, process(), append(opts, sessionlock.WithRefreshAhead(0))...) // never elected
				tokenOf(t, b, "bob")
				renewal(t, u, a)
				start, callers := time.Now(), sync.WaitGroup{}
				for _, c := range []*sessionlock.Client{a, b, b} {
					callers.Go(func() { assert.NoError(t, c.Do(t.Context(), "bob", rejectOld("bob/1"))) })
					synctest.Wait()
				}
				callers.Wait()
				assert.LessOrEqual(t, time.Since(start), u.takes+20*time.Millisecond)
				assert.Equal(t, 2, u.logins())
				assert.Zero(t, a.Stats().Adopted, "its own callers wait for nobody else")
				st, err := a.Inspect(t.Context(), "bob")
				require.NoError(t, err)
				assert.NotZero(t, st.Generation)
				time.Sleep(40 * time.Second)
				assert.Empty(t, u.ended(), "a rejected session is not logged out")
			})
		})
	}
}

func TestRejectedCallerOfARenewalEndsTheSessionForTheFleet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u := new(sessionlock.MemoryCache), &upstream{life: time.Minute, takes: 3 * time.Second}
		a := newClient(t, u, store, exactly(), sessionlock.WithRefreshAhead(20*time.Second))
		old := renewal(t, u, a)
		go func() { _ = a.Do(t.Context(), "bob", rejectOld("bob/1")) }()
		synctest.Wait()
		b := newClient(t, u, store)
		st, err := b.Inspect(t.Context(), "bob")
		require.NoError(t, err)
		assert.Zero(t, st.Generation, "generation %d is dead", old.Generation())
		assert.Equal(t, "bob/2", tokenOf(t, b, "bob"))
	})
}

func TestRejectedCallerOfAProcessThatIsNotElectedIsServed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, held := new(sessionlock.MemoryCache), new(memoryLocker)
		u := &upstream{life: time.Minute, takes: 3 * time.Second}
		asking := make(chan struct{}, 100)
		sp := &spy{after: func(_ context.Context, op, _ string) error {
			if op == opLock && u.logins() > 0 {
				asking <- struct{}{}
				time.Sleep(500 * time.Millisecond)
			}
			return nil
		}}
		a := newClient(t, u, store, exactly(), sessionlock.WithLocker(held))
		b := newClient(t, u, store, exactly(), sessionlock.WithLocker(spyLocker{sp, held}), sessionlock.WithRefreshAhead(20*time.Second))
		old, err := a.Session(t.Context(), "bob")
		require.NoError(t, err)
		time.Sleep(time.Until(old.Expiry) - 30*time.Second)
		other, err := held.TryLock(t.Context(), (&names{}).lock(t, u), time.Hour)
		require.NoError(t, err)
		for len(asking) == 0 {
			inUse(t, 100*time.Millisecond, 100*time.Millisecond, b)
		}
		// b's renewal has asked for a lock that it will not get.
		require.NoError(t, other.Unlock(t.Context()))
		require.NoError(t, b.Do(t.Context(), "bob", rejectOld("bob/1")))
		assert.Equal(t, 2, u.logins(), "a real attempt, at once")
		assert.Equal(t, "bob/2", tokenOf(t, a, "bob"))
	})
}

// names finds out under which names bob is stored.
type names struct{}

func (*names) lock(t *testing.T, u *upstream) string {
	t.Helper()
	sp := &spy{}
	c := newClient(t, &upstream{life: u.life}, new(sessionlock.MemoryCache), sessionlock.WithLocker(spyLocker{sp, new(memoryLocker)}))
	tokenOf(t, c, "bob")
	return sp.seen(lockSuffix)[0]
}

func TestFailedRenewalDoesNotRestoreARejectedSession(t *testing.T) {
	for name, failure := range map[string]error{"denied": sessionlock.Denied(errDead), "unknown": errDead, "deferred": sessionlock.RetryAfter(errDead, time.Second)} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store, u := new(sessionlock.MemoryCache), &upstream{life: time.Minute, takes: 3 * time.Second}
				u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
					if n == 1 {
						return u.grant(key, n), nil
					}
					return sessionlock.Session{}, failure
				}
				a := newClient(t, u, store, exactly(), sessionlock.WithRefreshAhead(20*time.Second))
				b := newClient(t, u, store, exactly())
				tokenOf(t, b, "bob")
				old := renewal(t, u, a)
				require.NoError(t, b.Invalidate(t.Context(), old))
				time.Sleep(u.takes + 100*time.Millisecond)
				for _, c := range []*sessionlock.Client{a, b} {
					s, err := c.Session(t.Context(), "bob")
					require.ErrorIs(t, err, sessionlock.ErrSuppressed)
					assert.Zero(t, s.Generation())
				}
				assert.Equal(t, 2, u.logins())
			})
		})
	}
}

func TestLogoutDuringARenewalStoresNothing(t *testing.T) {
	eachStore(t, func(t *testing.T, process func() sessionlock.Option) {
		u := &upstream{life: time.Minute, takes: 3 * time.Second}
		a := newProcess(t, u, process(), exactly(), sessionlock.WithRefreshAhead(20*time.Second))
		b := newProcess(t, u, process(), exactly(), sessionlock.WithRefreshAhead(20*time.Second))
		renewal(t, u, a)
		require.NoError(t, b.Logout(t.Context(), "bob"))
		time.Sleep(u.takes)
		synctest.Wait()
		assert.ElementsMatch(t, []string{"bob/1", "bob/2"}, u.ended())
		st, err := b.Inspect(t.Context(), "bob")
		require.NoError(t, err)
		assert.Zero(t, st.Generation)
		time.Sleep(10 * time.Minute)
		assert.Equal(t, 2, u.logins(), "nobody asks")
		assert.Equal(t, "bob/3", tokenOf(t, a, "bob"))
	})
}

func TestRenewalThatTakesLongIsNotBegunAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sp, u := &spy{}, &upstream{life: time.Minute, takes: 9 * time.Second}
		c := newClient(t, u, spyCache{sp, new(sessionlock.MemoryCache)}, exactly(), sessionlock.WithRefreshAhead(20*time.Second),
			sessionlock.WithLocker(new(memoryLocker)), sessionlock.WithNearCache(100, time.Hour))
		renewal(t, u, c)
		loads := sp.count(opLoad)
		inUse(t, 8*time.Second, 100*time.Millisecond, c)
		// A heartbeat per second, each of which wakes the copy here.
		assert.LessOrEqual(t, sp.count(opLoad)-loads, 9)
		assert.Equal(t, 2, u.logins())
	})
}

func TestRejectionAfterALogoutDoesNotWaitForTheRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := &upstream{life: time.Minute, takes: 3 * time.Second}
		c := newClient(t, u, new(sessionlock.MemoryCache), exactly(), sessionlock.WithRefreshAhead(20*time.Second))
		held := make(chan struct{})
		tokenOf(t, c, "bob")
		caller := make(chan error)
		go func() {
			caller <- c.Do(t.Context(), "bob", func(_ context.Context, s sessionlock.Session) error {
				<-held
				return rejectOld("bob/1")(t.Context(), s)
			})
		}()
		renewal(t, u, c)
		require.NoError(t, c.Logout(t.Context(), "bob"))
		close(held)
		require.NoError(t, <-caller, "what that brings is stale")
		assert.Equal(t, 3, u.logins())
	})
}

func TestSessionUsedAgainInItsWindowIsRenewed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := &upstream{life: time.Minute, takes: time.Second}
		c := newClient(t, u, new(sessionlock.MemoryCache), exactly(), sessionlock.WithRefreshAhead(20*time.Second), sessionlock.WithNearCache(100, time.Hour))
		renewal(t, u, c)
		time.Sleep(u.takes + u.life - 15*time.Second) // nobody has used the second one
		require.Equal(t, 2, u.logins())
		inUse(t, 30*time.Second, time.Second, c)
		assert.Equal(t, 3, u.logins())
	})
}

func TestCloseLetsARenewalFinish(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u := new(sessionlock.MemoryCache), &upstream{life: time.Minute, takes: 3 * time.Second}
		a := newClient(t, u, store, exactly(), sessionlock.WithRefreshAhead(20*time.Second))
		renewal(t, u, a)
		start := time.Now()
		require.NoError(t, a.Close(t.Context()))
		assert.LessOrEqual(t, time.Since(start), u.takes)
		assert.Equal(t, "bob/2", tokenOf(t, newClient(t, u, store), "bob"), "it was sent, so it is stored")
		assert.Equal(t, []string{"bob/1"}, u.ended())
	})
}

func TestCloseEndsARenewalThatWasNotSent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u := new(sessionlock.MemoryCache), &upstream{life: time.Minute}
		asking := make(chan struct{}, 100)
		sp := &spy{after: func(_ context.Context, op, _ string) error {
			if op == opLock && u.logins() == 1 {
				asking <- struct{}{}
				time.Sleep(900 * time.Millisecond)
			}
			return nil
		}}
		held := new(memoryLocker)
		a := newClient(t, u, store, exactly(), sessionlock.WithRefreshAhead(20*time.Second), sessionlock.WithLocker(spyLocker{sp, held}))
		tokenOf(t, a, "bob")
		for len(asking) == 0 {
			inUse(t, 100*time.Millisecond, 100*time.Millisecond, a)
		}
		require.NoError(t, a.Close(t.Context()))
		time.Sleep(time.Second)
		assert.Equal(t, 1, u.logins())
		assert.True(t, held.free())
		st, err := newClient(t, u, store).Inspect(t.Context(), "bob")
		require.NoError(t, err)
		assert.Zero(t, st.Attempts)
		assert.NotZero(t, st.Generation, "the session stays")
	})
}

func TestStoreThatIsDownWhenARenewalIsDueIsNotHammered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u, gone := new(sessionlock.MemoryCache), &upstream{life: 3 * time.Minute, takes: time.Second}, &cut{}
		sp := &spy{before: gone.before}
		c := newClient(t, u, spyCache{sp, store}, exactly(), sessionlock.WithRefreshAhead(time.Minute))
		tokenOf(t, c, "bob")
		inUse(t, 100*time.Second, 100*time.Millisecond, c)
		gone.off.Store(true)
		synctest.Wait()
		calls := sp.count()
		inUse(t, 60*time.Second, 100*time.Millisecond, c)
		assert.LessOrEqual(t, sp.count()-calls, 60*2/3, "one try in half of the lock TTL at most")
		assert.GreaterOrEqual(t, sp.count()-calls, 10)
		require.Equal(t, 1, u.logins())
		gone.off.Store(false)
		assert.Equal(t, []string{"bob/2"}, inUse(t, lockTTL+2*time.Second, 100*time.Millisecond, c))
	})
}

func TestRenewalThatFailedDoesNotHoldUpTheNextSession(t *testing.T) {
	put := func(ctx context.Context, _, b *sessionlock.Client) error {
		_, err := b.Put(ctx, "bob", sessionlock.Session{Token: sessionlock.NewToken("put"), Expiry: time.Now().Add(3 * time.Minute)})
		return err
	}
	for name, tc := range map[string]struct {
		mend func(ctx context.Context, a, b *sessionlock.Client) error
		opts []sessionlock.Option
	}{
		"put by a peer":          {put, nil},
		"put by a peer, no near": {put, []sessionlock.Option{noNear()}},
		"unsuppressed by a peer": {func(ctx context.Context, _, b *sessionlock.Client) error { return b.Unsuppress(ctx, "bob") }, nil},
		"unsuppressed, no near":  {func(ctx context.Context, a, _ *sessionlock.Client) error { return a.Unsuppress(ctx, "bob") }, []sessionlock.Option{noNear()}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := new(sessionlock.MemoryCache)
				u := failing(func(n int) error {
					if n == 2 {
						return sessionlock.Denied(errors.New("wrong password"))
					}
					return nil
				})
				u.life, u.takes = 3*time.Minute, time.Second
				a := newClient(t, u, store, append(tc.opts, exactly(), sessionlock.WithRefreshAhead(time.Minute))...)
				b := newClient(t, u, store)
				tokenOf(t, a, "bob")
				inUse(t, 150*time.Second, 100*time.Millisecond, a)
				require.Equal(t, 2, u.logins())
				require.NoError(t, tc.mend(t.Context(), a, b))
				inUse(t, 5*time.Minute, 100*time.Millisecond, a)
				assert.GreaterOrEqual(t, u.logins(), 3)
			})
		})
	}
}

func TestSuppressedRenewalLeavesTheStoreAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sp, u := &spy{}, failing(func(n int) error {
			if n == 1 {
				return nil
			}
			return sessionlock.Denied(errors.New("wrong password"))
		})
		u.life = 10 * time.Minute
		c := newClient(t, u, spyCache{sp, new(sessionlock.MemoryCache)}, exactly(), sessionlock.WithRefreshAhead(5*time.Minute))
		tokenOf(t, c, "bob")
		inUse(t, 6*time.Minute, 100*time.Millisecond, c)
		require.Equal(t, 2, u.logins())
		calls := sp.count()
		inUse(t, 3*time.Minute, 100*time.Millisecond, c)
		assert.LessOrEqual(t, sp.count()-calls, 4, "a look per age")
	})
}

func TestSessionAdoptedLateIsRenewedAtOnce(t *testing.T) {
	for name, opts := range map[string][]sessionlock.Option{"near": nil, "no near": {noNear()}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store, u := new(sessionlock.MemoryCache), &upstream{life: 5 * time.Minute, takes: time.Second}
				s := mustSession(t, newClient(t, u, store, exactly()), "bob")
				time.Sleep(time.Until(s.Expiry) - 2*time.Second)
				late := newClient(t, u, store, append(opts, exactly(), sessionlock.WithRefreshAhead(time.Minute))...)
				inUse(t, 10*time.Second, 100*time.Millisecond, late)
				assert.Equal(t, 2, u.logins())
			})
		})
	}
}

// WithRefresh

// refreshes is a func for WithRefresh with a ledger. The nth of all brings the
// token "bob~n" and the value "refresh" "r<n>", unless script says otherwise.
type refreshes struct {
	life, until time.Duration // of what it brings; until 0: without RefreshExpiry
	takes       time.Duration
	script      func(ctx context.Context, old sessionlock.Session, n int) (sessionlock.Session, error)

	mu    sync.Mutex
	began []time.Time
	olds  []sessionlock.Session
}

func (r *refreshes) refresh(ctx context.Context, key string, old sessionlock.Session) (sessionlock.Session, error) {
	r.mu.Lock()
	r.began, r.olds = append(r.began, time.Now()), append(r.olds, old)
	n := len(r.olds)
	r.mu.Unlock()
	if err := pauseFor(ctx, r.takes); err != nil {
		return sessionlock.Session{}, err
	}
	if r.script != nil {
		return r.script(ctx, old, n)
	}
	return r.grant(key, n), nil
}

func (r *refreshes) grant(key string, n int) sessionlock.Session {
	return r.carrying(sessionlock.Session{Token: sessionlock.NewToken(fmt.Sprintf("%s~%d", key, n)), Expiry: time.Now().Add(r.life)}, n)
}

// carrying gives s what the next refresh needs.
func (r *refreshes) carrying(s sessionlock.Session, n int) sessionlock.Session {
	if r.until > 0 {
		s.RefreshExpiry = time.Now().Add(r.until)
	}
	return s.WithValue("refresh", fmt.Sprint("r", n))
}

func (r *refreshes) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.olds)
}

// from returns what the refreshes started from.
func (r *refreshes) from() (tokens []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, old := range r.olds {
		tokens = append(tokens, old.Token.Reveal())
	}
	return tokens
}

// refreshing returns an upstream whose logins and refreshes bring sessions that
// live that long and can be refreshed until then.
func refreshing(life, until time.Duration) (*upstream, *refreshes) {
	u, r := &upstream{life: life}, &refreshes{life: life, until: until}
	u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
		return r.carrying(u.grant(key, n), 0), nil
	}
	return u, r
}

// fails has every refresh fail.
func (r *refreshes) fails(err error) *refreshes {
	r.script = func(context.Context, sessionlock.Session, int) (sessionlock.Session, error) {
		return sessionlock.Session{}, err
	}
	return r
}

func TestRefreshStartsFromAllThatTheSessionCarries(t *testing.T) {
	eachStore(t, func(t *testing.T, process func() sessionlock.Option) {
		u, r := refreshing(time.Minute, 90*24*time.Hour)
		u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
			return r.carrying(u.grant(key, n), 0).WithValue("binary", "\x00\xff\n"), nil
		}
		opts := []sessionlock.Option{exactly(), sessionlock.WithRefresh(r.refresh)}
		first, err := newProcess(t, u, process(), opts...).Session(t.Context(), "bob")
		require.NoError(t, err)
		time.Sleep(24 * time.Hour)

		second, err := newProcess(t, u, process(), opts...).Session(t.Context(), "bob")
		require.NoError(t, err)
		require.Equal(t, 1, r.count())
		old := r.olds[0]
		assert.Equal(t, "bob/1", old.Token.Reveal())
		assert.Equal(t, "bob", old.Key())
		assert.Equal(t, first.Generation(), old.Generation())
		assert.Equal(t, "r0", old.Value("refresh"))
		assert.Equal(t, "\x00\xff\n", old.Value("binary"))
		assert.WithinDuration(t, first.Expiry, old.Expiry, time.Millisecond)
		assert.WithinDuration(t, first.RefreshExpiry, old.RefreshExpiry, time.Millisecond)

		assert.Equal(t, "bob~1", second.Token.Reveal())
		assert.Equal(t, "bob", second.Key())
		assert.Greater(t, second.Generation(), first.Generation())
		assert.Equal(t, "r1", second.Value("refresh"))
		assert.Empty(t, second.Value("binary"), "what f does not carry over is gone")
		assert.Equal(t, second.Token.Reveal(), tokenOf(t, newProcess(t, u, process(), opts...), "bob"))
		assert.Equal(t, 1, u.logins())
	})
}

func TestSessionIsRefreshedUntilItsRefreshExpiry(t *testing.T) {
	for name, tc := range map[string]struct {
		until time.Duration
		end   func(*testing.T, *sessionlock.Client) // of the session
		want  string
	}{
		"ended": {time.Hour, func(*testing.T, *sessionlock.Client) { time.Sleep(time.Minute) }, "bob~1"},
		"rejected": {time.Hour, func(t *testing.T, c *sessionlock.Client) {
			require.NoError(t, c.Do(t.Context(), "bob", rejectOld("bob/1")))
		}, "bob~1"},
		"invalidated": {time.Hour, func(t *testing.T, c *sessionlock.Client) {
			require.NoError(t, c.Invalidate(t.Context(), mustSession(t, c, "bob")))
		}, "bob~1"},
		"just before": {time.Hour, func(*testing.T, *sessionlock.Client) { time.Sleep(time.Hour - time.Second) }, "bob~1"},
		"too late":    {time.Hour, func(*testing.T, *sessionlock.Client) { time.Sleep(time.Hour) }, "bob/2"},
		"none, ended": {0, func(*testing.T, *sessionlock.Client) { time.Sleep(time.Minute) }, "bob/2"},
		"none, rejected": {0, func(t *testing.T, c *sessionlock.Client) {
			require.NoError(t, c.Do(t.Context(), "bob", rejectOld("bob/1")))
		}, "bob/2"},
		"logged out": {time.Hour, func(t *testing.T, c *sessionlock.Client) { require.NoError(t, c.Logout(t.Context(), "bob")) }, "bob/2"},
	} {
		t.Run(name, func(t *testing.T) {
			eachStore(t, func(t *testing.T, process func() sessionlock.Option) {
				u, r := refreshing(time.Minute, tc.until)
				a := newProcess(t, u, process(), exactly(), sessionlock.WithRefresh(r.refresh))
				b := newProcess(t, u, process(), exactly(), sessionlock.WithRefresh(r.refresh))
				require.Equal(t, "bob/1", tokenOf(t, a, "bob"))
				tc.end(t, a)
				assert.Equal(t, tc.want, tokenOf(t, b, "bob"))
				assert.Equal(t, tc.want, tokenOf(t, a, "bob"))
				assert.Equal(t, 2, u.logins()+r.count())
			})
		})
	}
}

func TestRefreshedSessionIsRefreshedAgain(t *testing.T) {
	eachStore(t, func(t *testing.T, process func() sessionlock.Option) {
		u, r := refreshing(time.Minute, time.Hour)
		c := newProcess(t, u, process(), exactly(), sessionlock.WithRefresh(r.refresh))
		for range 10 {
			tokenOf(t, c, "bob")
			time.Sleep(2 * time.Minute)
		}
		assert.Equal(t, []string{"bob/1", "bob~1", "bob~2", "bob~3", "bob~4", "bob~5", "bob~6", "bob~7", "bob~8"}, r.from())
		assert.Equal(t, 1, u.logins())
		assert.Empty(t, u.ended())
	})
}

func TestSecondYoungRejectionInARowLogsIn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, r := refreshing(time.Hour, 24*time.Hour)
		c := newClient(t, u, new(sessionlock.MemoryCache), sessionlock.WithRefresh(r.refresh))
		refuse := func(context.Context, sessionlock.Session) error { return sessionlock.Reject(errDead) }
		require.ErrorIs(t, c.Do(t.Context(), "bob", refuse), sessionlock.ErrRejected)
		assert.Equal(t, []string{"bob/1"}, r.from(), "the first is repaired by a refresh")
		time.Sleep(time.Second)
		assert.Equal(t, "bob/2", tokenOf(t, c, "bob"))
		assert.Equal(t, 1, r.count(), "what refreshes bring is refused")
	})
}

func TestRefreshAheadKeepsOneSessionAlive(t *testing.T) {
	for name, opts := range map[string][]sessionlock.Option{"near": nil, "no near": {noNear()}} {
		t.Run(name, func(t *testing.T) {
			eachStore(t, func(t *testing.T, process func() sessionlock.Option) {
				const life, window, takes, step = time.Minute, 20 * time.Second, 2 * time.Second, 250 * time.Millisecond
				u, r := refreshing(life, 0) // a refresh starts from what is usable
				r.takes = takes
				var fleet []*sessionlock.Client
				for range 3 {
					c := newProcess(t, u, process(), append(opts, exactly(), sessionlock.WithSingleSession(),
						sessionlock.WithRefresh(r.refresh), sessionlock.WithRefreshAhead(window))...)
					fleet = append(fleet, c)
					tokenOf(t, c, "bob")
				}
				start := time.Now()
				inUse(t, 5*time.Minute, step, fleet...)
				var starts []time.Duration
				for _, at := range r.began {
					starts = append(starts, at.Sub(start))
				}
				allWithin(t, takes+life-window*11/10, takes+life-window*9/10+step, gaps(starts))
				assert.GreaterOrEqual(t, len(starts), 6)
				time.Sleep(5 * time.Minute)
				assert.Equal(t, 1, u.logins())
				assert.Empty(t, u.ended())
				var n uint64
				for _, c := range fleet {
					st := c.Stats()
					n += st.Refreshes
					assert.LessOrEqual(t, st.Logins, uint64(1))
				}
				assert.EqualValues(t, r.count(), n)
			})
		})
	}
}

// refreshFunc is what a refresh does with the old session.
type refreshFunc func(context.Context, sessionlock.Session) (sessionlock.Session, error)

// deferred checks the error of a caller who got no session because a refresh has to wait.
func deferred(t *testing.T, err error) {
	t.Helper()
	var failed *sessionlock.LoginError
	require.ErrorAs(t, err, &failed)
	assert.Equal(t, sessionlock.LoginDeferred, failed.Class)
	assert.NotZero(t, failed.Until)
	assert.Zero(t, failed.Attempts)
}

func TestRefreshThatFails(t *testing.T) {
	fails := func(err error) refreshFunc {
		return func(context.Context, sessionlock.Session) (sessionlock.Session, error) {
			return sessionlock.Session{Token: sessionlock.NewToken("in vain")}, err
		}
	}
	brings := func(s sessionlock.Session) refreshFunc {
		return func(context.Context, sessionlock.Session) (sessionlock.Session, error) { return s, nil }
	}
	of := func(token string) sessionlock.Session {
		return sessionlock.Session{Token: sessionlock.NewToken(token), Expiry: time.Now().Add(24 * 365 * time.Hour)}
	}
	const (
		logsIn = iota // in the same attempt
		waits         // deferred
		keeps         // waits while the old one is good, else logs in
	)
	for name, tc := range map[string]struct {
		does int
		f    refreshFunc
	}{
		"denied":     {logsIn, fails(sessionlock.Denied(errDead))},
		"throttled":  {waits, fails(sessionlock.RetryAfter(errDead, 2*time.Second))},
		"dial":       {waits, fails(&net.OpError{Op: "dial", Err: errors.New("connection refused")})},
		"unmarked":   {keeps, fails(errDead)},
		"no token":   {keeps, brings(sessionlock.Session{})},
		"expired":    {keeps, brings(sessionlock.Session{Token: sessionlock.NewToken("x"), Expiry: time.Unix(1, 0)})},
		"control":    {keeps, brings(of("x\n"))},
		"too large":  {keeps, brings(of("x").WithValue("v", string(make([]byte, 2000))))},
		"incomplete": {keeps, brings(of("incomplete"))},
		"panic":      {keeps, func(context.Context, sessionlock.Session) (sessionlock.Session, error) { panic("no") }},
		"goexit": {keeps, func(context.Context, sessionlock.Session) (sessionlock.Session, error) {
			runtime.Goexit()
			return sessionlock.Session{}, nil
		}},
		"timeout": {keeps, func(ctx context.Context, _ sessionlock.Session) (sessionlock.Session, error) {
			<-ctx.Done()
			return sessionlock.Session{}, ctx.Err()
		}},
		"hang": {waits, func(context.Context, sessionlock.Session) (sessionlock.Session, error) {
			time.Sleep(12 * time.Second)
			return of("too late"), nil
		}},
		"hang, and fail": {waits, func(context.Context, sessionlock.Session) (sessionlock.Session, error) {
			time.Sleep(10*time.Second + 500*time.Millisecond)
			return sessionlock.Session{}, errDead
		}},
		"late": {waits, func(context.Context, sessionlock.Session) (sessionlock.Session, error) {
			time.Sleep(10*time.Second + 50*time.Millisecond)
			return sessionlock.Session{}, errDead
		}},
	} {
		for _, state := range []string{"ahead", "ended", "rejected"} {
			t.Run(name+"/"+state, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					u, r := refreshing(time.Minute, time.Hour)
					var mended atomic.Bool
					r.script = func(ctx context.Context, old sessionlock.Session, n int) (sessionlock.Session, error) {
						if mended.Load() {
							return r.grant("bob", n), nil
						}
						return tc.f(ctx, old)
					}
					locks, seen := &spy{}, &recorder{}
					opts := []sessionlock.Option{
						exactly(), sessionlock.WithRefresh(r.refresh), sessionlock.WithObserver(seen),
						sessionlock.WithLocker(spyLocker{locks, new(memoryLocker)}),
						sessionlock.WithComplete(func(s sessionlock.Session) bool { return s.Token.Reveal() != "incomplete" }),
					}
					if state == "ahead" {
						opts = append(opts, sessionlock.WithRefreshAhead(25*time.Second))
					}
					c := newClient(t, u, new(sessionlock.MemoryCache), opts...)
					tokenOf(t, c, "bob")

					want, err := "bob/1", error(nil)
					if tc.does == logsIn || tc.does == keeps && state != "ahead" {
						want = "bob/2"
					}
					switch state {
					case "ahead":
						for r.count() == 0 {
							inUse(t, 100*time.Millisecond, 100*time.Millisecond, c)
						}
						inUse(t, 11*time.Second, 100*time.Millisecond, c)
						synctest.Wait()
					case "ended":
						time.Sleep(time.Minute)
						_, err = c.Session(t.Context(), "bob")
					case "rejected":
						err = c.Do(t.Context(), "bob", rejectOld("bob/1"))
					}
					if err != nil {
						time.Sleep(time.Second) // what was left behind returns
					}
					var kinds []string
					for _, kind := range seen.kinds() {
						if kind != sessionlock.EventNear && kind != sessionlock.EventReauthOK && kind != sessionlock.EventReauthFailed {
							kinds = append(kinds, kind)
						}
					}
					assert.Equal(t, 1+r.count(), locks.count(opLock), "one lock for refresh and login")
					assert.Zero(t, c.Stats().Refreshes)
					assert.EqualValues(t, u.logins(), c.Stats().Logins)
					st, bad := c.Inspect(t.Context(), "bob")
					require.NoError(t, bad)
					assert.Zero(t, st.Attempts, "a refresh counts against no budget")

					wantKinds := []string{sessionlock.EventLoginOK}
					if want == "bob/1" {
						assert.Equal(t, 1, u.logins())
						for range r.count() {
							wantKinds = append(wantKinds, sessionlock.EventRefreshFailed)
						}
						assert.Equal(t, wantKinds, kinds)
					} else {
						assert.Equal(t, 2, u.logins())
						assert.Equal(t, 1, r.count())
						assert.Equal(t, append(wantKinds, sessionlock.EventRefreshFailed, sessionlock.EventLoginOK), kinds)
					}
					if want == "bob/1" && state != "ahead" {
						deferred(t, err)
					} else {
						require.NoError(t, err)
						assert.Equal(t, want, tokenOf(t, c, "bob"))
					}
					if want == "bob/2" {
						return
					}
					mended.Store(true)
					time.Sleep(31 * time.Second)
					assert.Contains(t, tokenOf(t, c, "bob"), "bob~")
					assert.Equal(t, 1, u.logins())
					time.Sleep(time.Minute)
					assert.Empty(t, u.ended())
				})
			})
		}
	}
}

func TestRefreshedTokenThatWasRejectedIsNotStored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, r := refreshing(time.Minute, time.Hour)
		r.script = func(_ context.Context, old sessionlock.Session, n int) (sessionlock.Session, error) {
			return r.carrying(sessionlock.Session{Token: old.Token, Expiry: time.Now().Add(time.Minute)}, n), nil
		}
		c := newClient(t, u, new(sessionlock.MemoryCache), exactly(), sessionlock.WithRefresh(r.refresh))
		require.NoError(t, c.Do(t.Context(), "bob", rejectOld("bob/1")))
		assert.Equal(t, "bob/2", tokenOf(t, c, "bob"))
		assert.Equal(t, 1, r.count())
		time.Sleep(time.Minute)
		assert.Equal(t, "bob/2", tokenOf(t, c, "bob"), "one that has only ended may be carried on")
		assert.Equal(t, 2, u.logins())
	})
}

func TestSessionThatIsNotGoodAnyMoreWhenItsRefreshFailsIsFollowedByALogin(t *testing.T) {
	for name, tc := range map[string]struct {
		takes time.Duration // the session ends in 7.2 to 8.8 s
		end   func(*testing.T, *sessionlock.Client)
	}{
		"rejected": {3 * time.Second, func(t *testing.T, c *sessionlock.Client) {
			require.NoError(t, c.Do(t.Context(), "bob", rejectOld("bob/1")))
		}},
		"ended": {9 * time.Second, func(*testing.T, *sessionlock.Client) { time.Sleep(9 * time.Second) }},
	} {
		for _, single := range []bool{false, true} {
			t.Run(fmt.Sprint(name, single), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					u, r := refreshing(time.Minute, 0)
					r.takes = tc.takes
					r.fails(errDead)
					opts := []sessionlock.Option{exactly(), sessionlock.WithRefresh(r.refresh), sessionlock.WithRefreshAhead(8 * time.Second)}
					if single {
						r.fails(sessionlock.Denied(errDead))
						opts = append(opts, sessionlock.WithSingleSession())
					}
					c := newClient(t, u, new(sessionlock.MemoryCache), opts...)
					tokenOf(t, c, "bob")
					for r.count() == 0 {
						inUse(t, 100*time.Millisecond, 100*time.Millisecond, c)
					}
					tc.end(t, c)
					assert.Equal(t, "bob/2", tokenOf(t, c, "bob"))
					assert.Equal(t, 1, r.count())
				})
			})
		}
	}
}

func TestIncompleteSessionIsRefreshedOnlyAsARejectedOneIs(t *testing.T) {
	for name, tc := range map[string]struct {
		until time.Duration
		want  int
	}{"until its refresh expiry": {time.Hour, 1}, "not without": {0, 0}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := new(sessionlock.MemoryCache)
				u, r := refreshing(time.Minute, tc.until)
				r.fails(errDead)
				tokenOf(t, newClient(t, u, store), "bob") // an older release
				c := newClient(t, u, store, sessionlock.WithRefresh(r.refresh),
					sessionlock.WithComplete(func(s sessionlock.Session) bool { return s.Token.Reveal() != "bob/1" }))
				assert.Equal(t, "bob/2", tokenOf(t, c, "bob"))
				assert.Equal(t, tc.want, r.count())
			})
		})
	}
}

func TestDeniedRefreshOfASingleSessionWaitsForItsEnd(t *testing.T) {
	for name, opts := range map[string][]sessionlock.Option{"near": nil, "no near": {noNear()}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store, start := new(sessionlock.MemoryCache), time.Now()
				u, r := refreshing(5*time.Minute, time.Hour)
				r.fails(sessionlock.Denied(errDead))
				var fleet []*sessionlock.Client
				for range 3 {
					c := newClient(t, u, store, append(opts, exactly(), sessionlock.WithSingleSession(),
						sessionlock.WithRefresh(r.refresh), sessionlock.WithRefreshAhead(2*time.Minute))...)
					tokenOf(t, c, "bob")
					fleet = append(fleet, c)
				}
				inUse(t, 5*time.Minute-50*time.Millisecond, 100*time.Millisecond, fleet...)
				assert.Equal(t, 1, u.logins(), "it would end the session in use")
				assert.LessOrEqual(t, r.count(), len(fleet), "once per process")
				assert.NotZero(t, r.count())
				for range 100 {
					for _, c := range fleet {
						tokenOf(t, c, "bob") // nobody is suppressed
					}
					time.Sleep(10 * time.Millisecond)
				}
				assert.WithinDuration(t, start.Add(5*time.Minute), u.began[1], 100*time.Millisecond)
				time.Sleep(time.Minute)
				assert.Empty(t, u.ended(), "a login ended it")
			})
		})
	}
}

func TestRejectionAfterADeniedRefreshOfASingleSessionLogsInAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, r := refreshing(5*time.Minute, time.Hour)
		r.fails(sessionlock.Denied(errDead))
		c := newClient(t, u, new(sessionlock.MemoryCache), exactly(), sessionlock.WithSingleSession(),
			sessionlock.WithRefresh(r.refresh), sessionlock.WithRefreshAhead(2*time.Minute))
		tokenOf(t, c, "bob")
		for r.count() == 0 {
			inUse(t, 100*time.Millisecond, 100*time.Millisecond, c)
		}
		require.NoError(t, c.Do(t.Context(), "bob", rejectOld("bob/1")))
		assert.Equal(t, "bob/2", tokenOf(t, c, "bob"))
	})
}

func TestWhatALoginOfASingleSessionDisplacesIsNotLoggedOut(t *testing.T) {
	for name, tc := range map[string]struct {
		opts []sessionlock.Option
		want []string
	}{
		"single":       {[]sessionlock.Option{sessionlock.WithSingleSession()}, []string{}},
		"side by side": {nil, []string{"bob/1"}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				u := &upstream{life: 10 * time.Minute}
				c := newClient(t, u, new(sessionlock.MemoryCache), tc.opts...)
				tokenOf(t, c, "bob")
				time.Sleep(10*time.Minute - 10*time.Second) // it lives, but not for long enough to be used
				require.Equal(t, "bob/2", tokenOf(t, c, "bob"))
				time.Sleep(time.Minute)
				assert.Equal(t, tc.want, u.ended())
				require.NoError(t, c.Logout(t.Context(), "bob"))
				assert.Equal(t, append(tc.want, "bob/2"), u.ended(), "a logout is what it always is")
			})
		})
	}
}

func TestRefreshAheadOfASingleSessionWantsARefresh(t *testing.T) {
	_, r := refreshing(time.Minute, 0)
	opts := []sessionlock.Option{sessionlock.WithCache(new(sessionlock.MemoryCache)), sessionlock.WithSingleSession(), sessionlock.WithRefreshAhead(time.Second)}
	_, err := sessionlock.New(acme, &upstream{}, opts...)
	require.ErrorIs(t, err, sessionlock.ErrInvalid)
	assert.ErrorContains(t, err, "WithRefresh")
	_, err = sessionlock.New(acme, &upstream{}, append(opts, sessionlock.WithRefresh(r.refresh))...)
	require.NoError(t, err)
	_, err = sessionlock.New(acme, &upstream{}, opts[:2]...)
	require.NoError(t, err)
	_, err = sessionlock.New(acme, &upstream{}, opts[0], sessionlock.WithRefresh(nil))
	require.ErrorIs(t, err, sessionlock.ErrInvalid)
}

func TestWhatARefreshBringsIsNeverLoggedOut(t *testing.T) {
	for name, tc := range map[string]struct {
		meanwhile func(*testing.T, *sessionlock.Client, *cut)
		ended     []string
	}{
		"overtaken by a put": {func(t *testing.T, b *sessionlock.Client, _ *cut) {
			_, err := b.Put(t.Context(), "bob", sessionlock.Session{Token: sessionlock.NewToken("put"), Expiry: time.Now().Add(time.Hour)})
			require.NoError(t, err)
		}, []string{}},
		"overtaken by a logout": {func(t *testing.T, b *sessionlock.Client, _ *cut) { require.NoError(t, b.Logout(t.Context(), "bob")) }, []string{}},
		"not stored":            {func(_ *testing.T, _ *sessionlock.Client, gone *cut) { gone.off.Store(true) }, []string{}},
		"stored":                {func(*testing.T, *sessionlock.Client, *cut) {}, []string{}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store, gone := new(sessionlock.MemoryCache), &cut{}
				u, r := refreshing(time.Minute, time.Hour)
				r.takes = 2 * time.Second
				a := newClient(t, u, spyCache{&spy{before: gone.before}, store}, exactly(), sessionlock.WithRefresh(r.refresh))
				b := newClient(t, u, store, exactly())
				tokenOf(t, a, "bob")
				time.Sleep(time.Minute)
				caller := askFor(t.Context(), a, "bob")
				time.Sleep(time.Second)
				tc.meanwhile(t, b, gone)
				<-caller
				require.Equal(t, 1, r.count())
				gone.off.Store(false)
				time.Sleep(2 * time.Minute)
				for _, token := range u.ended() {
					assert.NotContains(t, token, "~")
				}
			})
		})
	}
}

func TestRefreshInsideItsOwnKeyIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, r := refreshing(time.Minute, time.Hour)
		var c *sessionlock.Client
		r.script = func(ctx context.Context, _ sessionlock.Session, n int) (sessionlock.Session, error) {
			for call, err := range everyCall(ctx, c, "bob") {
				if call != "Logout" && call != "Inspect" && call != "Unsuppress" {
					assert.ErrorIs(t, err, sessionlock.ErrReentrant, call)
				}
			}
			_, err := c.Session(ctx, "eve")
			assert.NoError(t, err, "another key is no matter")
			return r.grant("bob", n), nil
		}
		c = newClient(t, u, new(sessionlock.MemoryCache), exactly(), sessionlock.WithRefresh(r.refresh))
		tokenOf(t, c, "bob")
		time.Sleep(time.Minute)
		_, err := c.Session(t.Context(), "bob")
		require.ErrorIs(t, err, sessionlock.ErrStale, "it logged itself out")
	})
}

func TestRefreshesRunOneAtATimeInTheFleet(t *testing.T) {
	eachStore(t, func(t *testing.T, process func() sessionlock.Option) {
		u, r := refreshing(10*time.Second, 24*time.Hour)
		var inside, most atomic.Int64
		r.script = func(ctx context.Context, _ sessionlock.Session, n int) (sessionlock.Session, error) {
			most.Store(max(most.Load(), inside.Add(1)))
			defer inside.Add(-1)
			return r.grant("bob", n), pauseFor(ctx, 500*time.Millisecond)
		}
		var callers sync.WaitGroup
		for range 4 {
			c := newProcess(t, u, process(), exactly(), sessionlock.WithRefresh(r.refresh))
			for range 5 {
				callers.Go(func() {
					for range 100 {
						_, err := c.Session(t.Context(), "bob")
						assert.NoError(t, err)
						time.Sleep(300 * time.Millisecond)
					}
				})
			}
		}
		callers.Wait()
		assert.EqualValues(t, 1, most.Load())
		assert.Equal(t, 1, u.logins())
		assert.InDelta(t, 3, r.count(), 1, "30 s, one every 10.5 s")
	})
}

func TestRefreshIsReportedOnceAndQuotesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const secret = "refresh token 4711"
		u, r := refreshing(time.Minute, time.Hour)
		var failure error
		r.script = func(_ context.Context, _ sessionlock.Session, n int) (sessionlock.Session, error) {
			if failure != nil {
				return sessionlock.Session{}, failure
			}
			return r.grant("bob", n).WithValue("secret", secret), nil
		}
		seen, lines := &recorder{}, &logbook{}
		c := newClient(t, u, new(sessionlock.MemoryCache), exactly(), sessionlock.WithRefresh(r.refresh), sessionlock.WithObserver(seen),
			sessionlock.WithLogger(slog.New(slog.NewJSONHandler(lines, nil))))
		ask := func() error {
			time.Sleep(time.Minute)
			_, err := c.Session(t.Context(), "bob")
			return err
		}
		tokenOf(t, c, "bob")
		require.NoError(t, ask())
		assert.Equal(t, []string{"login_ok", "refreshed"}, seen.kinds())

		cause := errors.New("invalid_grant: " + secret)
		failure = sessionlock.RetryAfter(cause, time.Second)
		err := ask()
		require.ErrorIs(t, err, cause)
		events := seen.all()
		assert.Equal(t, []string{"refresh_failed"}, seen.kinds())
		require.ErrorIs(t, events[0].Err, cause)
		assert.NotZero(t, events[0].Generation)
		assert.Equal(t, c.KeyID("bob"), events[0].KeyID)
		failure = sessionlock.Denied(cause)
		require.NoError(t, ask())
		assert.Equal(t, []string{"refresh_failed", "login_ok"}, seen.kinds())

		st := c.Stats()
		assert.EqualValues(t, 1, st.Refreshes)
		assert.EqualValues(t, 2, st.Logins)
		assert.Zero(t, st.Denied)
		text := lines.String() + fmt.Sprintf("%v %+v %v", err, err, events[0].Err)
		assert.Contains(t, text, "refresh_failed")
		assert.NotContains(t, text, secret)
	})
}

// WithIdleTTL

// ends returns how long the stored session of bob will be used, if nobody uses it.
func ends(t *testing.T, c *sessionlock.Client) time.Duration {
	t.Helper()
	st, err := c.Inspect(t.Context(), "bob")
	require.NoError(t, err)
	if st.Generation == 0 {
		return 0
	}
	return time.Until(st.Expiry).Round(time.Millisecond)
}

// written is a cache that counts the values stored.
type written struct {
	*sessionlock.MemoryCache
	n atomic.Int64
}

func (w *written) CompareAndSwap(ctx context.Context, name string, old, next []byte, ttl time.Duration) ([]byte, error) {
	now, err := w.MemoryCache.CompareAndSwap(ctx, name, old, next, ttl)
	if isEntry(name) && string(now) == string(next) {
		w.n.Add(1)
	}
	return now, err
}

func TestUseKeepsASessionAlive(t *testing.T) {
	const idle = time.Minute
	do := func(on sessionlock.Doer) func(context.Context) error {
		return func(ctx context.Context) error { return on.Do(ctx, nothing) }
	}
	for name, tc := range map[string]struct {
		opts []sessionlock.Option
		use  func(ctx context.Context, c *sessionlock.Client, f func(use func(context.Context) error) error) error
	}{
		"near hits": {nil, func(_ context.Context, c *sessionlock.Client, f func(func(context.Context) error) error) error {
			return f(func(ctx context.Context) error { _, err := c.Session(ctx, "bob"); return err })
		}},
		"handle": {nil, func(_ context.Context, c *sessionlock.Client, f func(func(context.Context) error) error) error {
			return f(do(c.For("bob")))
		}},
		"shared hits": {[]sessionlock.Option{noNear()}, func(_ context.Context, c *sessionlock.Client, f func(func(context.Context) error) error) error {
			return f(do(c.For("bob")))
		}},
		"scope": {nil, func(ctx context.Context, c *sessionlock.Client, f func(func(context.Context) error) error) error {
			return c.Scope(ctx, "bob", func(_ context.Context, sc *sessionlock.Scope) error { return f(do(sc)) })
		}},
		"scope without near": {[]sessionlock.Option{noNear()}, func(ctx context.Context, c *sessionlock.Client, f func(func(context.Context) error) error) error {
			return c.Scope(ctx, "bob", func(_ context.Context, sc *sessionlock.Scope) error { return f(do(sc)) })
		}},
	} {
		for _, step := range []time.Duration{time.Second, 35 * time.Second} {
			t.Run(fmt.Sprint(name, step), func(t *testing.T) {
				eachStore(t, func(t *testing.T, process func() sessionlock.Option) {
					u := &upstream{} // it does not say
					opts := append(tc.opts, sessionlock.WithIdleTTL(idle), sessionlock.WithExpiryMargin(10*time.Second))
					c, peer := newProcess(t, u, process(), opts...), newProcess(t, u, process(), opts...)
					tokenOf(t, c, "bob")
					err := tc.use(t.Context(), c, func(use func(context.Context) error) error {
						for start := time.Now(); time.Since(start) < 20*time.Minute; time.Sleep(step) {
							if err := use(t.Context()); err != nil {
								return err
							}
							time.Sleep(20 * time.Millisecond) // two looks keep a gap
							synctest.Wait()
							left := ends(t, peer)
							assert.GreaterOrEqual(t, left, 50*time.Second-idle/5-step, "after %v", time.Since(start))
							assert.LessOrEqual(t, left, 50*time.Second)
							if step > idle/10 {
								assert.Greater(t, left, 49*time.Second, "every use is worth a touch")
							}
						}
						return nil
					})
					require.NoError(t, err)
					assert.Equal(t, 1, u.logins())
					require.Equal(t, "bob/1", tokenOf(t, c, "bob"))
					time.Sleep(55 * time.Second)
					assert.Zero(t, ends(t, peer))
					assert.Equal(t, "bob/2", tokenOf(t, peer, "bob"))
				})
			})
		}
	}
}

func TestUnusedSessionEndsAfterItsIdleTTLLessTheMargin(t *testing.T) {
	for name, tc := range map[string]struct {
		margin, want time.Duration
	}{
		"a quarter at most": {time.Minute, 45 * time.Second},
		"margin":            {5 * time.Second, 55 * time.Second},
		"none":              {0, time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store, u := new(sessionlock.MemoryCache), &upstream{life: time.Hour}
				opts := []sessionlock.Option{sessionlock.WithIdleTTL(time.Minute), sessionlock.WithExpiryMargin(tc.margin)}
				a := newClient(t, u, store, opts...)
				s, err := a.Session(t.Context(), "bob")
				require.NoError(t, err)
				assert.Equal(t, time.Hour, time.Until(s.Expiry), "what the upstream said")
				assert.Equal(t, tc.want, ends(t, a))
				time.Sleep(tc.want)
				synctest.Wait()
				assert.Zero(t, ends(t, a))
				assert.Equal(t, "bob/2", tokenOf(t, a, "bob"))
			})
		})
	}
}

func TestUseIsWrittenOncePerTenthOfTheIdleTTLInTheFleet(t *testing.T) {
	for name, opts := range map[string][]sessionlock.Option{"near": nil, "no near": {noNear()}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const idle = 10 * time.Minute
				store, u := &written{MemoryCache: new(sessionlock.MemoryCache)}, &upstream{}
				var fleet []*sessionlock.Client
				for i := range 5 {
					c := newClient(t, u, store, append(opts, sessionlock.WithIdleTTL(idle))...)
					tokenOf(t, c, "bob")
					fleet = append(fleet, c)
					time.Sleep(time.Duration(i) * 3 * time.Second)
				}
				before := store.n.Load()
				inUse(t, 5*idle, time.Second, fleet...)
				assert.LessOrEqual(t, store.n.Load()-before, int64(51))
				assert.GreaterOrEqual(t, store.n.Load()-before, int64(30))
				assert.Equal(t, 1, u.logins())
			})
		})
	}
}

func TestUseKeepsASessionAliveUntilItsEndOnly(t *testing.T) {
	for name, tc := range map[string]struct {
		life time.Duration // 0: the upstream does not say
		opts []sessionlock.Option
		want time.Duration
	}{
		"expiry":       {30 * time.Minute, nil, 30*time.Minute - 20*time.Second},
		"a day":        {48 * time.Hour, nil, 24 * time.Hour},
		"does not say": {0, nil, 24 * time.Hour},
		"max age":      {0, []sessionlock.Option{sessionlock.WithMaxAge(10 * time.Minute)}, 10 * time.Minute},
	} {
		for _, near := range []string{"near", "no near"} {
			t.Run(name+" "+near, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					u, start := &upstream{life: tc.life}, time.Now()
					opts := append(tc.opts, sessionlock.WithIdleTTL(5*time.Minute))
					if near == "no near" {
						opts = append(opts, noNear())
					}
					c := newClient(t, u, new(sessionlock.MemoryCache), opts...)
					for u.logins() < 2 {
						tokenOf(t, c, "bob")
						time.Sleep(10 * time.Second)
						require.Less(t, time.Since(start), 25*time.Hour)
					}
					assert.InDelta(t, tc.want.Seconds(), u.starts(start)[1].Seconds(), 10)
				})
			})
		}
	}
}

func TestUseIsMadeKnownBesideTheCaller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u := new(sessionlock.MemoryCache), &upstream{}
		var slow atomic.Bool
		sp := &spy{before: func(context.Context, string, string) error {
			if slow.Load() {
				time.Sleep(900 * time.Millisecond)
			}
			return nil
		}}
		c := newClient(t, u, spyCache{sp, store}, sessionlock.WithIdleTTL(time.Minute))
		tokenOf(t, c, "bob")
		synctest.Wait()
		slow.Store(true)
		loads, swaps := sp.count(opLoad), sp.count(opSwap)
		inUse(t, 10*time.Minute, 50*time.Millisecond, c)
		assert.LessOrEqual(t, sp.count(opSwap)-swaps, 101)
		assert.LessOrEqual(t, sp.count(opLoad)-loads, 220, "a look per tenth, one that its write wakes, and one per age")
		assert.Equal(t, 1, u.logins())
		assert.Equal(t, uint64(12000), c.Stats().NearHits)
	})
}

func TestNearHitOfAnIdleSessionAllocatesNothing(t *testing.T) {
	c := newClient(t, &upstream{life: time.Hour}, new(sessionlock.MemoryCache),
		sessionlock.WithIdleTTL(time.Hour), sessionlock.WithRefreshAhead(time.Minute))
	h, ctx, key := c.For("bob"), t.Context(), "bob"
	_, err := h.Session(ctx)
	require.NoError(t, err)
	assert.Zero(t, testing.AllocsPerRun(1000, func() { _, _ = h.Session(ctx) }))
	assert.Zero(t, testing.AllocsPerRun(1000, func() { _, _ = c.Session(ctx, key) }))
}

func TestSessionThatAPeerUsesIsServedToTheEnd(t *testing.T) {
	for name, faces := range map[string]func(*sessionlock.MemoryCache) sessionlock.Cache{
		"by push": func(m *sessionlock.MemoryCache) sessionlock.Cache { return m },
		"by poll": func(m *sessionlock.MemoryCache) sessionlock.Cache { return polled{m} },
	} {
		for _, step := range []time.Duration{20 * time.Second, 55 * time.Second, 100 * time.Second, 10 * time.Minute} {
			t.Run(fmt.Sprint(name, step), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					store, u := new(sessionlock.MemoryCache), &upstream{takes: time.Second}
					a := newClient(t, u, store, exactly(), sessionlock.WithIdleTTL(time.Minute))
					b := newClient(t, u, faces(store), exactly(), sessionlock.WithIdleTTL(time.Minute))
					tokenOf(t, a, "bob")
					tokenOf(t, b, "bob")
					var wg sync.WaitGroup
					wg.Go(func() { inUse(t, time.Hour, time.Second, a) })
					inUse(t, time.Hour, step, b)
					wg.Wait()
					assert.Equal(t, 1, u.logins())
				})
			})
		}
	}
}

func TestUseIsMadeKnownThoughTheStoreIsNoisy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := &upstream{}
		store := &noisy{spyCache: spyCache{&spy{}, new(sessionlock.MemoryCache)}}
		c := newClient(t, u, store, exactly(), sessionlock.WithIdleTTL(30*time.Second))
		tokenOf(t, c, "bob")
		for range 600 {
			store.wake() // more often than a tenth of the idle TTL
			inUse(t, time.Second, 100*time.Millisecond, c)
		}
		assert.Equal(t, 1, u.logins())
	})
}

func TestStoreThatIsDownLosesNoUseForGood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, gone, u := new(sessionlock.MemoryCache), &cut{}, &upstream{takes: time.Second}
		c := newClient(t, u, spyCache{&spy{before: gone.before}, store}, exactly(), sessionlock.WithIdleTTL(time.Minute))
		tokenOf(t, c, "bob")
		inUse(t, 10*time.Second, time.Second, c)
		gone.off.Store(true)
		inUse(t, 40*time.Second, time.Second, c)
		gone.off.Store(false)
		inUse(t, 10*time.Minute, time.Second, c)
		assert.Equal(t, 1, u.logins())
	})
}

func TestSessionInUseIsRenewedBeforeItsEndNotBeforeItIsIdle(t *testing.T) {
	for name, opts := range map[string][]sessionlock.Option{"near": nil, "no near": {noNear()}} {
		for _, idle := range []time.Duration{time.Minute, 10 * time.Minute, 50 * time.Minute} {
			t.Run(fmt.Sprint(name, idle), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					const life, window = time.Hour, 5 * time.Minute
					u, start := &upstream{life: life, takes: time.Second}, time.Now()
					c := newClient(t, u, new(sessionlock.MemoryCache), append(opts, exactly(),
						sessionlock.WithIdleTTL(idle), sessionlock.WithRefreshAhead(window))...)
					tokenOf(t, c, "bob")
					inUse(t, 3*time.Hour, time.Second, c)
					allWithin(t, u.takes+life-window*11/10, u.takes+life-window*9/10+time.Second, gaps(u.starts(start)))
				})
			})
		}
	}
}

func TestSessionThatWasLoggedOutUnnoticedIsNotRenewed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u := new(sessionlock.MemoryCache), &upstream{life: 40 * time.Second}
		a := newClient(t, u, store)
		b := newClient(t, u, polled{store}, exactly(), sessionlock.WithRefreshAhead(10*time.Second))
		tokenOf(t, b, "bob")
		inUse(t, 20*time.Second, time.Second, b)
		require.NoError(t, a.Logout(t.Context(), "bob"))
		time.Sleep(time.Hour)
		assert.Equal(t, 1, u.logins(), "nobody asked")
		assert.Equal(t, []string{"bob/1"}, u.ended())
		assert.Equal(t, "bob/2", tokenOf(t, b, "bob"))
	})
}

func TestEntryThatWasLostIsMadeAnewAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u := newForgetful(), &upstream{life: time.Minute, takes: time.Second}
		c := newClient(t, u, store, exactly(), sessionlock.WithRefreshAhead(20*time.Second))
		tokenOf(t, c, "bob")
		inUse(t, 35*time.Second, time.Second, c)
		store.forget()
		inUse(t, 3*time.Minute, time.Second, c)
		assert.GreaterOrEqual(t, u.logins(), 5)
	})
}

// What renewals ahead of time must not do: make an outage of what nobody would
// have noticed.

func TestTroubleWhileASessionIsRenewedIsNotNoticed(t *testing.T) {
	for name, tc := range map[string]struct{ from, to time.Duration }{
		"for four minutes": {18 * time.Minute, 22 * time.Minute}, "until a minute before the end": {18 * time.Minute, 29 * time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store, u, start := new(sessionlock.MemoryCache), &upstream{life: 30 * time.Minute}, time.Now()
				u.script = func(ctx context.Context, key string, n int) (sessionlock.Session, error) {
					if at := time.Since(start); at >= tc.from && at < tc.to {
						<-ctx.Done()
						return sessionlock.Session{}, ctx.Err()
					}
					return u.grant(key, n), nil
				}
				var fleet []*sessionlock.Client
				for range 3 {
					c := newClient(t, u, store, exactly(), sessionlock.WithRefreshAhead(10*time.Minute))
					tokenOf(t, c, "bob")
					fleet = append(fleet, c)
				}
				for time.Since(start) < time.Hour {
					for _, c := range fleet {
						tokenOf(t, c, "bob")
					}
					time.Sleep(100 * time.Millisecond)
				}
			})
		})
	}
}

func TestRefreshThatFailsAheadOfTimeHoldsUpNoLogin(t *testing.T) {
	t.Run("at the session's end", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			u, r := refreshing(10*time.Minute, 0)
			r.fails(errors.New("500"))
			c := newClient(t, u, new(sessionlock.MemoryCache), exactly(), sessionlock.WithRefresh(r.refresh), sessionlock.WithRefreshAhead(2*time.Minute))
			for start := time.Now(); time.Since(start) < time.Hour; time.Sleep(100 * time.Millisecond) {
				tokenOf(t, c, "bob")
			}
			assert.Equal(t, 6, u.logins())
		})
	})
	t.Run("when the session is rejected", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			store := new(sessionlock.MemoryCache)
			u, r := refreshing(10*time.Minute, 24*time.Hour)
			r.fails(sessionlock.RetryAfter(errors.New("429"), 5*time.Minute))
			a := newClient(t, u, store, exactly(), sessionlock.WithRefresh(r.refresh), sessionlock.WithRefreshAhead(4*time.Minute))
			for r.count() == 0 {
				tokenOf(t, a, "bob")
				time.Sleep(time.Second)
			}
			require.NoError(t, newClient(t, u, store, sessionlock.WithRefresh(r.refresh)).Do(t.Context(), "bob", rejectOld("bob/1")))
			assert.Equal(t, 2, u.logins())
			assert.Equal(t, 1, r.count(), "it asked to be left alone")
		})
	})
}

func TestRefreshThatReachedNothingSaysNothingOfTheLogin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, r := refreshing(time.Minute, time.Hour)
		r.script = func(ctx context.Context, _ sessionlock.Session, _ int) (sessionlock.Session, error) {
			httptrace.ContextClientTrace(ctx).GetConn("api.acme.test:443") // and never got it
			return sessionlock.Session{}, errors.New("broken pool")
		}
		c := newClient(t, u, new(sessionlock.MemoryCache), exactly(), sessionlock.WithRefresh(r.refresh))
		tokenOf(t, c, "bob")
		time.Sleep(time.Minute)
		u.script = func(context.Context, string, int) (sessionlock.Session, error) {
			return sessionlock.Session{}, context.DeadlineExceeded // by another means than net/http
		}
		_, err := c.Session(t.Context(), "bob")
		var failed *sessionlock.LoginError
		require.ErrorAs(t, err, &failed)
		assert.Equal(t, sessionlock.LoginUnknown, failed.Class)
		assert.Equal(t, 1, failed.Attempts)
	})
}

func TestManyRejectionsDuringARenewalInvalidateOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sp, u := &spy{}, &upstream{life: time.Minute, takes: 2 * time.Second}
		c := newClient(t, u, spyCache{sp, new(sessionlock.MemoryCache)}, exactly(), sessionlock.WithRefreshAhead(20*time.Second))
		renewal(t, u, c)
		synctest.Wait()
		before := sp.count(opLoad)
		var all sync.WaitGroup
		for range 500 {
			all.Go(func() { assert.NoError(t, c.Do(t.Context(), "bob", rejectOld("bob/1"))) })
		}
		all.Wait()
		assert.Equal(t, 2, u.logins())
		assert.LessOrEqual(t, sp.count(opLoad)-before, 20)
	})
}

func TestUpstreamThatRepeatsItsTokenIsNotAskedWithoutEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, issued := &upstream{}, time.Time{}
		u.script = func(context.Context, string, int) (sessionlock.Session, error) {
			if time.Since(issued) >= time.Hour {
				issued = time.Now()
			}
			return sessionlock.Session{Token: sessionlock.NewToken(issued.String()), Expiry: issued.Add(time.Hour)}, nil
		}
		count := func(opts ...sessionlock.Option) int {
			before := u.logins()
			c := newClient(t, u, new(sessionlock.MemoryCache), opts...)
			for start := time.Now(); time.Since(start) < time.Hour; time.Sleep(time.Second) {
				tokenOf(t, c, "bob")
			}
			return u.logins() - before
		}
		without := count()
		assert.LessOrEqual(t, count(sessionlock.WithRefreshAhead(5*time.Minute)), without+3)
	})
}

func TestCallerWhoJoinsARenewalTooLateLogsIn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, r := refreshing(time.Minute, 0)
		r.fails(errors.New("500"))
		joined, sp := make(chan error, 1), &spy{}
		var c *sessionlock.Client
		sp.before = func(_ context.Context, op, name string) error {
			if op == opSwap && isEntry(name) && r.count() == 1 && c.Stats().Waiters == 0 && len(joined) == 0 { // the renewal's commit
				go func() { joined <- c.Do(t.Context(), "bob", rejectOld("bob/1")) }()
				for c.Stats().Waiters == 0 {
					time.Sleep(time.Millisecond)
				}
			}
			return nil
		}
		c = newClient(t, u, spyCache{sp, new(sessionlock.MemoryCache)}, exactly(), sessionlock.WithRefresh(r.refresh), sessionlock.WithRefreshAhead(20*time.Second))
		tokenOf(t, c, "bob")
		for len(joined) == 0 && u.logins() == 1 {
			_, err := c.Session(t.Context(), "bob")
			require.NoError(t, err)
			time.Sleep(100 * time.Millisecond)
		}
		assert.NoError(t, <-joined)
		assert.Equal(t, 2, u.logins())
	})
}

func TestDeniedRefreshOfASingleSessionIsNotRepeatedByTheFleet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := new(sessionlock.MemoryCache)
		u, r := refreshing(10*time.Minute, 24*time.Hour)
		r.fails(sessionlock.Denied(errors.New("reused")))
		var fleet []*sessionlock.Client
		for range 10 {
			c := newClient(t, u, store, exactly(), sessionlock.WithRefresh(r.refresh), sessionlock.WithSingleSession(), sessionlock.WithRefreshAhead(2*time.Minute))
			tokenOf(t, c, "bob")
			fleet = append(fleet, c)
		}
		inUse(t, 10*time.Minute-time.Second, 500*time.Millisecond, fleet...)
		assert.Equal(t, 1, r.count())
		assert.Equal(t, 1, u.logins(), "not while the session lives")
		time.Sleep(2 * time.Second)
		assert.Equal(t, "bob/2", tokenOf(t, fleet[0], "bob"))
		assert.Equal(t, 1, r.count(), "nor is it asked again at the end")
	})
}

func TestLogoutFuncThatIgnoresItsContextHoldsUpNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hangs := func(context.Context, sessionlock.Session) error { <-t.Context().Done(); return nil }
		c := newClient(t, &upstream{life: time.Hour}, new(sessionlock.MemoryCache), sessionlock.WithLogout(hangs))
		tokenOf(t, c, "bob")
		start := time.Now()
		require.Error(t, c.Logout(t.Context(), "bob"))
		require.NoError(t, c.Close(context.Background()))
		assert.Equal(t, 10*time.Second, time.Since(start))
	})
}
