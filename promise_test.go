package sessionlock_test

// The promises of docs/promises.md, in their order, and what the comments of
// the API say besides. Cases that spec_test.go shows are not repeated.

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock"
)

// eachStore runs f in a bubble for each backend; process gives the store to one
// more process of the fleet.
func eachStore(t *testing.T, f func(t *testing.T, process func() sessionlock.Option)) {
	t.Helper()
	t.Run("memory", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			store := new(sessionlock.MemoryCache)
			f(t, func() sessionlock.Option { return sessionlock.WithCache(store) })
		})
	})
	t.Run("redis", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			_, client := bubbleRedis(t)
			f(t, func() sessionlock.Option { return sessionlock.WithRedis(client()) })
		})
	})
}

// newProcess is newClient on any store.
func newProcess(t *testing.T, u *upstream, store sessionlock.Option, opts ...sessionlock.Option) *sessionlock.Client {
	t.Helper()
	c, err := sessionlock.New(acme, u, append([]sessionlock.Option{store, sessionlock.WithLogout(u.Logout)}, opts...)...)
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close(context.WithoutCancel(t.Context())) })
	return c
}

// P1

func TestOneLeaderInTheFleet(t *testing.T) {
	eachStore(t, func(t *testing.T, process func() sessionlock.Option) {
		u := &upstream{life: 10 * time.Second, takes: 500 * time.Millisecond} // used for 7.5 s
		var wg sync.WaitGroup
		for i := range 4 {
			c := newProcess(t, u, process())
			for j := range 5 {
				wg.Go(func() {
					time.Sleep(time.Duration(7*i+j) * time.Millisecond)
					for range 100 {
						_, err := c.Session(t.Context(), "bob")
						assert.NoError(t, err)
						time.Sleep(300 * time.Millisecond)
					}
				})
			}
		}
		wg.Wait()
		assert.Equal(t, 1, u.atOnce())
		assert.InDelta(t, 4, u.logins(), 1, "30 s, a login every 8")
	})
}

func TestLostLockCostsNoLoginWhileTheLeaseLives(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, held, seen := new(sessionlock.MemoryCache), new(memoryLocker), &recorder{}
		u, other := &upstream{life: time.Hour, takes: 5 * time.Second}, &upstream{}
		a := newClient(t, u, store, sessionlock.WithLocker(held), sessionlock.WithObserver(seen))
		leader := askFor(t.Context(), a, "bob")
		time.Sleep(time.Second / 2)
		held.lose()
		waiter := askFor(t.Context(), newClient(t, other, store, sessionlock.WithLocker(held)), "bob")
		for _, caller := range []<-chan answer{leader, waiter} {
			got := <-caller
			require.NoError(t, got.err)
			assert.Equal(t, "bob/1", got.session.Token.Reveal())
			assert.NotZero(t, got.session.Generation())
		}
		assert.Zero(t, other.logins())
		assert.Equal(t, []string{sessionlock.EventLockLost, sessionlock.EventLoginOK}, seen.kinds(), "said once")
	})
}

// P2

func TestGenerationsGrowThroughAFlush(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, client := bubbleRedis(t)
		u := &upstream{life: time.Hour}
		var last uint64
		for range 5 {
			s, err := newProcess(t, u, sessionlock.WithRedis(client())).Session(t.Context(), "bob")
			require.NoError(t, err)
			assert.Greater(t, s.Generation(), last)
			assert.Less(t, s.Generation(), uint64(1)<<63, "fits a BIGINT")
			last = s.Generation()
			m.FlushAll()
			time.Sleep(time.Millisecond)
		}
		assert.Equal(t, 5, u.logins())
	})
}

func TestLoginWhoseEntryWasLostStoresNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, client := bubbleRedis(t)
		u := &upstream{life: time.Hour}
		u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
			if n == 1 {
				m.FlushAll()
			}
			return u.grant(key, n), nil
		}
		c := newProcess(t, u, sessionlock.WithRedis(client()))
		_, err := c.Session(t.Context(), "bob")
		require.ErrorIs(t, err, sessionlock.ErrStale)
		synctest.Wait()
		assert.Equal(t, []string{"bob/1"}, u.ended())
		assert.Equal(t, 1, u.logins(), "it does not log in again by itself")
		assert.Equal(t, "bob/2", tokenOf(t, c, "bob"))
	})
}

func TestOvertakenLeaderWaitsForTheNewerAttempt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, gone := new(sessionlock.MemoryCache), &cut{}
		u := &upstream{life: time.Hour}
		u.script = func(ctx context.Context, key string, n int) (sessionlock.Session, error) {
			if n == 1 {
				gone.off.Store(true)
				_ = pauseFor(ctx, 4*time.Second)
				gone.off.Store(false)
			} else {
				_ = pauseFor(ctx, 2500*time.Millisecond)
			}
			return u.grant(key, n), nil
		}
		start := time.Now()
		slow := askFor(t.Context(), newClient(t, u, spyCache{&spy{before: gone.before}, store}), "bob")
		time.Sleep(3100 * time.Millisecond)
		newer := askFor(t.Context(), newClient(t, u, store), "bob")
		for _, caller := range []<-chan answer{slow, newer} {
			got := <-caller
			require.NoError(t, got.err)
			assert.Equal(t, "bob/2", got.session.Token.Reveal())
			assert.Equal(t, 5600*time.Millisecond, got.at.Sub(start))
		}
		synctest.Wait()
		assert.Equal(t, 2, u.logins())
		assert.Equal(t, []string{"bob/1"}, u.ended())
	})
}

// P3

// crossed is a cache whose connection answers with the reply of another request.
type crossed struct {
	*sessionlock.MemoryCache
	other map[string]string // whose value is answered instead
	swaps bool              // of swaps too
}

func (c crossed) Load(ctx context.Context, name string) ([]byte, error) {
	if other, ok := c.other[name]; ok {
		name = other
	}
	return c.MemoryCache.Load(ctx, name)
}

func (c crossed) CompareAndSwap(ctx context.Context, name string, old, next []byte, ttl time.Duration) ([]byte, error) {
	now, err := c.MemoryCache.CompareAndSwap(ctx, name, old, next, ttl)
	if other, ok := c.other[name]; ok && c.swaps && !bytes.Equal(now, next) {
		return c.MemoryCache.Load(ctx, other)
	}
	return now, err
}

func TestCrossedRepliesNeverMixUpSessions(t *testing.T) {
	for _, swaps := range []bool{false, true} {
		for _, order := range [][]string{{"bob", "eve"}, {"eve", "bob"}} {
			t.Run(fmt.Sprint(swaps, order), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					store, u, names := new(sessionlock.MemoryCache), &upstream{life: time.Hour}, map[string]string{}
					for _, key := range order {
						sp := &spy{}
						tokenOf(t, newClient(t, u, spyCache{sp, store}), key)
						names[key] = sp.seen(entrySuffix)[0]
					}
					bob, eve := names["bob"], names["eve"]
					seen := &recorder{}
					c := newClient(t, u, crossed{store, map[string]string{bob: eve, eve: bob}, swaps}, sessionlock.WithObserver(seen))
					for _, key := range []string{"bob", "eve", "bob", "eve"} {
						s, err := c.Session(t.Context(), key)
						if err != nil {
							assertUnavailable(t, err)
							continue
						}
						assert.Equal(t, key, s.Key())
						assert.True(t, strings.HasPrefix(s.Token.Reveal(), key+"/"), "a session of another")
					}
					assert.Contains(t, seen.kinds(), sessionlock.EventUnreadable)
				})
			})
		}
	}
}

func TestCopiedEntryIsAMiss(t *testing.T) {
	for name, from := range map[string]struct{ upstream, namespace, key string }{
		"key":       {acme, "", "eve"},
		"upstream":  {"https://other.test", "", "bob"},
		"namespace": {acme, "staging", "bob"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store, u, theirs, ours := new(sessionlock.MemoryCache), &upstream{life: time.Hour}, &spy{}, &spy{}
				c, err := sessionlock.New(from.upstream, u, sessionlock.WithCache(spyCache{theirs, store}), sessionlock.WithNamespace(from.namespace))
				require.NoError(t, err)
				tokenOf(t, c, from.key)
				require.NoError(t, c.Close(t.Context()))
				b := newClient(t, u, spyCache{ours, store})
				_, err = b.Inspect(t.Context(), "bob")
				require.NoError(t, err)
				v, err := store.Load(t.Context(), theirs.seen(entrySuffix)[0])
				require.NoError(t, err)
				_, err = store.CompareAndSwap(t.Context(), ours.seen(entrySuffix)[0], nil, v, time.Hour)
				require.NoError(t, err)
				assert.Equal(t, "bob/2", tokenOf(t, b, "bob"))
			})
		})
	}
}

// P4

func TestUpstreamThatRefusesEverySessionCostsALoginPerThirtySeconds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u, start := new(sessionlock.MemoryCache), &upstream{life: time.Hour}, time.Now()
		var wg sync.WaitGroup
		for range 3 {
			c := newClient(t, u, store)
			wg.Go(func() {
				for time.Since(start) < 200*time.Second {
					err := c.Do(t.Context(), "bob", func(context.Context, sessionlock.Session) error { return sessionlock.Reject(errDead) })
					assert.Error(t, err)
					time.Sleep(50 * time.Millisecond)
				}
			})
		}
		wg.Wait()
		var seconds []int
		for _, at := range u.starts(start) {
			seconds = append(seconds, int(at.Round(time.Second)/time.Second))
		}
		assert.Equal(t, []int{0, 0, 1, 3, 7, 15, 31, 61, 91, 121, 151, 181}, seconds)
	})
}

func TestSessionThatProvedItselfIsRepairedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := &upstream{life: time.Hour}
		c := newClient(t, u, new(sessionlock.MemoryCache))
		for n := 1; n < 10; n += 2 {
			tokenOf(t, c, "bob")
			time.Sleep(30 * time.Second) // what the one before was refused for is forgotten
			require.NoError(t, c.Do(t.Context(), "bob", rejectOld(fmt.Sprintf("bob/%d", n))))
			require.NoError(t, c.Do(t.Context(), "bob", rejectOld(fmt.Sprintf("bob/%d", n+1))), "the first young one")
		}
		assert.Equal(t, 11, u.logins())
	})
}

func TestReauthBackoffEndsWithUnsuppress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := &upstream{life: time.Hour}
		c := newClient(t, u, new(sessionlock.MemoryCache))
		refuse := func(context.Context, sessionlock.Session) error { return sessionlock.Reject(errDead) }
		require.Error(t, c.Do(t.Context(), "bob", refuse))
		_, err := c.Session(t.Context(), "bob")
		var login *sessionlock.LoginError
		require.ErrorAs(t, err, &login)
		require.ErrorIs(t, err, sessionlock.ErrSuppressed)
		require.ErrorIs(t, err, sessionlock.ErrRejected, "it says why")
		assert.Equal(t, sessionlock.LoginDeferred, login.Class)
		assert.Equal(t, time.Second, time.Until(login.Until))
		require.NoError(t, c.Unsuppress(t.Context(), "bob"))
		assert.Equal(t, "bob/3", tokenOf(t, c, "bob"))
	})
}

// P5

// failing is an upstream whose logins fail while err returns an error.
func failing(err func(n int) error) *upstream {
	u := &upstream{life: time.Hour}
	u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
		if err := err(n); err != nil {
			return sessionlock.Session{}, err
		}
		return u.grant(key, n), nil
	}
	return u
}

// hammer asks all clients in turn, every step until d has passed.
func hammer(t *testing.T, d, step time.Duration, clients ...*sessionlock.Client) {
	t.Helper()
	for start := time.Now(); time.Since(start) < d; time.Sleep(step) {
		for _, c := range clients {
			_, _ = c.Session(t.Context(), "bob")
		}
	}
}

func TestDeniedLoginIsNotRepeated(t *testing.T) {
	eachStore(t, func(t *testing.T, process func() sessionlock.Option) {
		wrong := errors.New("wrong password")
		u := failing(func(int) error { return sessionlock.Denied(wrong) })
		a, b := newProcess(t, u, process()), newProcess(t, u, process())
		_, err := a.Session(t.Context(), "bob")
		require.ErrorIs(t, err, wrong)
		require.ErrorIs(t, err, sessionlock.ErrDenied)
		assert.NotErrorIs(t, err, sessionlock.ErrSuppressed, "this one was sent")
		start := time.Now()
		for _, c := range []*sessionlock.Client{a, b} {
			_, err := c.Session(t.Context(), "bob")
			var login *sessionlock.LoginError
			require.ErrorAs(t, err, &login)
			require.ErrorIs(t, err, sessionlock.ErrDenied)
			require.ErrorIs(t, err, sessionlock.ErrSuppressed)
			assert.Equal(t, sessionlock.LoginDenied, login.Class)
			assert.WithinDuration(t, start.Add(15*time.Minute), login.Until, time.Millisecond)
			assert.Equal(t, 1, login.Attempts)
			st, err := c.Inspect(t.Context(), "bob")
			require.NoError(t, err)
			assert.Equal(t, sessionlock.LoginDenied, st.Failure)
			assert.WithinDuration(t, start.Add(15*time.Minute), st.SuppressedUntil, time.Millisecond)
			assert.Equal(t, 1, st.Attempts)
		}
		hammer(t, 15*time.Minute-time.Second, 10*time.Second, a, b)
		assert.Equal(t, 1, u.logins())
		time.Sleep(10 * time.Second)
		hammer(t, 14*time.Minute, 10*time.Second, a, b)
		assert.Equal(t, 2, u.logins(), "one more when the window has passed")
		require.NoError(t, b.Unsuppress(t.Context(), "bob"))
		hammer(t, time.Minute, time.Second, a, b)
		assert.Equal(t, 3, u.logins(), "and one after Unsuppress")
	})
}

func TestOtherCredentialsAreTriedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := failing(func(n int) error {
			if n == 1 {
				return sessionlock.Denied(errors.New("wrong password"))
			}
			return nil
		})
		var version atomic.Value
		version.Store("old")
		c := newClient(t, u, new(sessionlock.MemoryCache),
			sessionlock.WithFingerprint(func(context.Context, string) (string, error) { return version.Load().(string), nil }))
		for range 3 {
			_, err := c.Session(t.Context(), "bob")
			require.ErrorIs(t, err, sessionlock.ErrDenied)
		}
		version.Store("new")
		assert.Equal(t, "bob/2", tokenOf(t, c, "bob"))
	})
}

func TestUnknownOutcomesSpendTheBudget(t *testing.T) {
	for name, err := range map[string]error{
		"unmarked": errors.New("500"),
		"read":     &net.OpError{Op: "read", Err: errors.New("connection reset")},
		"timeout":  context.DeadlineExceeded,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store, u, start := new(sessionlock.MemoryCache), failing(func(int) error { return err }), time.Now()
				a, b := newClient(t, u, store), newClient(t, u, store)
				hammer(t, 15*time.Minute, 250*time.Millisecond, a, b)
				assert.Equal(t, []time.Duration{0, 250 * time.Millisecond, 750 * time.Millisecond}, u.starts(start))
				hammer(t, time.Second, 10*time.Millisecond, a, b)
				assert.Equal(t, 4, u.logins(), "the next window has begun")
			})
		})
	}
}

func TestCrashedLeadersSpendTheBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, start := new(sessionlock.MemoryCache), time.Now()
		good := &upstream{life: time.Hour}
		var began []time.Duration
		for range 3 {
			dead := &cut{}
			u := &upstream{script: func(ctx context.Context, _ string, _ int) (sessionlock.Session, error) {
				began = append(began, time.Since(start))
				dead.off.Store(true)
				<-ctx.Done()
				return sessionlock.Session{}, ctx.Err()
			}}
			c := newClient(t, u, spyCache{&spy{before: dead.before}, store})
			_, err := c.Session(t.Context(), "bob")
			require.Error(t, err)
		}
		require.Len(t, began, 3)
		c := newClient(t, good, store)
		_, err := c.Session(t.Context(), "bob")
		require.ErrorIs(t, err, sessionlock.ErrSuppressed)
		st, err := c.Inspect(t.Context(), "bob")
		require.NoError(t, err)
		assert.Equal(t, 3, st.Attempts)
		assert.Equal(t, 15*time.Minute, st.SuppressedUntil.Sub(start))
		assert.Zero(t, good.logins())
		require.NoError(t, c.Unsuppress(t.Context(), "bob"))
		assert.Equal(t, "bob/1", tokenOf(t, c, "bob"))
	})
}

func TestSuccessfulLoginsSpendNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := &upstream{life: time.Hour}
		c := newClient(t, u, new(sessionlock.MemoryCache))
		for n := range 10 {
			require.NoError(t, c.Logout(t.Context(), "bob"))
			assert.Equal(t, fmt.Sprintf("bob/%d", n+1), tokenOf(t, c, "bob"))
		}
	})
}

func TestDeferredLoginsAreNotCounted(t *testing.T) {
	for name, err := range map[string]error{
		"dial":   fmt.Errorf("post: %w", &net.OpError{Op: "dial", Err: errors.New("connection refused")}),
		"dns":    &net.DNSError{Err: "no such host", Name: "acme.test"},
		"tls":    &tls.CertificateVerificationError{Err: errors.New("unknown authority")},
		"429":    sessionlock.LoginStatus(&http.Response{StatusCode: http.StatusTooManyRequests}),
		"503":    sessionlock.LoginStatus(&http.Response{StatusCode: http.StatusServiceUnavailable}),
		"marked": sessionlock.RetryAfter(errors.New("our vault is down"), 0),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				start := time.Now()
				back := start.Add(5 * time.Minute)
				store, u := new(sessionlock.MemoryCache), failing(func(int) error {
					if time.Now().Before(back) {
						return err
					}
					return nil
				})
				a, b := newClient(t, u, store), newClient(t, u, store)
				_, got := a.Session(t.Context(), "bob")
				var login *sessionlock.LoginError
				require.ErrorAs(t, got, &login)
				require.ErrorIs(t, got, err)
				assert.Equal(t, sessionlock.LoginDeferred, login.Class)
				assert.Zero(t, login.Attempts)
				hammer(t, 4*time.Minute, 50*time.Millisecond, a, b)
				var gaps []time.Duration
				starts := u.starts(start)
				for i := range starts[1:] {
					gaps = append(gaps, starts[i+1]-starts[i])
				}
				const s = time.Second
				assert.Equal(t, []time.Duration{s / 4, s / 2, s, 2 * s, 4 * s, 8 * s, 16 * s, 30 * s, 30 * s, 30 * s, 30 * s, 30 * s, 30 * s}, gaps)
				time.Sleep(time.Until(back))
				hammer(t, 31*time.Second, 10*time.Millisecond, a, b)
				starts = u.starts(back)
				assert.LessOrEqual(t, starts[len(starts)-1], 30*time.Second, "soon after the upstream is back")
				tokenOf(t, b, "bob")
			})
		})
	}
}

func TestUpstreamIsLeftAloneForAsLongAsItAsks(t *testing.T) {
	for name, tc := range map[string]struct{ asked, waits time.Duration }{
		"two minutes":      {2 * time.Minute, 2 * time.Minute},
		"our own at least": {time.Millisecond, 250 * time.Millisecond},
		"a window at most": {9 * time.Hour, 15 * time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store, start := new(sessionlock.MemoryCache), time.Now()
				u := failing(func(n int) error {
					if n == 1 {
						return sessionlock.RetryAfter(errors.New("throttled"), tc.asked)
					}
					return nil
				})
				a, b := newClient(t, u, store), newClient(t, u, store)
				hammer(t, 16*time.Minute, 250*time.Millisecond, a, b)
				assert.Equal(t, []time.Duration{0, tc.waits}, u.starts(start))
			})
		})
	}
}

func TestLostEntryLeavesEachProcessItsOwnBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, client := bubbleRedis(t)
		u := failing(func(int) error { return sessionlock.Denied(errors.New("wrong password")) })
		for process := range 2 {
			c := newProcess(t, u, sessionlock.WithRedis(client()))
			for range 10 {
				m.FlushAll()
				_, err := c.Session(t.Context(), "bob")
				var login *sessionlock.LoginError
				require.ErrorAs(t, err, &login)
				time.Sleep(time.Second)
			}
			assert.Equal(t, 3*(process+1), u.logins())
			_, err := c.Session(t.Context(), "bob")
			require.ErrorIs(t, err, sessionlock.ErrSuppressed)
			if process == 1 {
				require.NoError(t, c.Unsuppress(t.Context(), "bob"))
				_, err = c.Session(t.Context(), "bob")
				assert.NotErrorIs(t, err, sessionlock.ErrSuppressed)
				assert.Equal(t, 7, u.logins())
			}
		}
	})
}

// P6

func TestWaiterIsServedWhenTheSessionIsStored(t *testing.T) {
	eachStore(t, func(t *testing.T, process func() sessionlock.Option) {
		u, start := &upstream{life: time.Hour, takes: 2500 * time.Millisecond}, time.Now()
		leader := askFor(t.Context(), newProcess(t, u, process()), "bob")
		time.Sleep(time.Millisecond)
		waiter := askFor(t.Context(), newProcess(t, u, process()), "bob")
		require.NoError(t, (<-leader).err)
		got := <-waiter
		require.NoError(t, got.err)
		assert.Equal(t, u.takes, got.at.Sub(start))
		assert.Equal(t, 1, u.logins())
	})
}

func TestWaiterHearsOfAFailureAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u := new(sessionlock.MemoryCache), failing(func(int) error { return sessionlock.Denied(errors.New("no")) })
		u.takes = 2500 * time.Millisecond // between two heartbeats
		leader := askFor(t.Context(), newClient(t, u, store), "bob")
		time.Sleep(time.Millisecond)
		waiter := askFor(t.Context(), newClient(t, u, store), "bob")
		first, second := <-leader, <-waiter
		require.ErrorIs(t, first.err, sessionlock.ErrDenied)
		require.ErrorIs(t, second.err, sessionlock.ErrDenied)
		require.ErrorIs(t, second.err, sessionlock.ErrSuppressed)
		assert.Equal(t, first.at, second.at)
		assert.Equal(t, 1, u.logins())
	})
}

func TestWaiterWithoutPushIsServedByTheNextTick(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u := new(sessionlock.MemoryCache), &upstream{life: time.Hour, takes: 2 * time.Second}
		leader := askFor(t.Context(), newClient(t, u, store), "bob")
		time.Sleep(time.Millisecond)
		var waiters []<-chan answer
		for range 10 {
			waiters = append(waiters, askFor(t.Context(), newClient(t, u, polled{store}), "bob"))
			time.Sleep(17 * time.Millisecond)
		}
		stored := (<-leader).at
		for _, waiter := range waiters {
			got := <-waiter
			require.NoError(t, got.err)
			assert.LessOrEqual(t, got.at.Sub(stored), 300*time.Millisecond)
		}
		assert.Equal(t, 1, u.logins())
	})
}

func TestNearHitAllocatesNothing(t *testing.T) {
	c := newClient(t, &upstream{life: time.Hour}, new(sessionlock.MemoryCache))
	h, ctx := c.For("bob"), t.Context()
	_, err := h.Session(ctx)
	require.NoError(t, err)
	assert.Zero(t, testing.AllocsPerRun(100, func() { _, _ = h.Session(ctx) }))
	key := "bob"
	assert.Zero(t, testing.AllocsPerRun(100, func() { _, _ = c.Session(ctx, key) }))
}

// counted is a hook that counts round trips, handshakes left out.
type counted struct {
	cutHook
	n atomic.Int64
}

func (h *counted) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		if name := strings.ToLower(cmd.Name()); name != "hello" && name != "client" {
			h.n.Add(1)
		}
		return next(ctx, cmd)
	}
}

func TestStoredSessionCostsOneRoundTrip(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, client := bubbleRedis(t)
		u, trips := &upstream{life: time.Hour}, &counted{}
		a := newProcess(t, u, sessionlock.WithRedis(client()))
		for _, key := range []string{"bob", "eve"} {
			tokenOf(t, a, key)
		}
		rdb := client()
		rdb.AddHook(trips)
		b := newProcess(t, u, sessionlock.WithRedis(rdb), sessionlock.WithNearCache(0, time.Minute)) // none that is looked at again
		tokenOf(t, b, "bob")
		assert.EqualValues(t, 2, trips.n.Load(), "the first asks for the clock too")
		for i := range 5 {
			tokenOf(t, b, "eve")
			assert.EqualValues(t, 3+i, trips.n.Load())
		}
	})
}

// P7

func TestLoginContextIsTheFirstCallersWithoutItsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		type trace struct{}
		u := &upstream{life: time.Hour}
		u.script = func(ctx context.Context, key string, n int) (sessionlock.Session, error) {
			assert.Equal(t, "first", ctx.Value(trace{}))
			end, ok := ctx.Deadline()
			assert.True(t, ok)
			assert.Equal(t, 7*time.Second, time.Until(end))
			assert.NoError(t, pauseFor(ctx, time.Second))
			return u.grant(key, n), nil
		}
		c := newClient(t, u, new(sessionlock.MemoryCache), sessionlock.WithLoginTimeout(7*time.Second))
		short, cancel := context.WithTimeout(context.WithValue(t.Context(), trace{}, "first"), time.Millisecond)
		defer cancel()
		first := askFor(short, c, "bob")
		synctest.Wait()
		second := askFor(context.WithValue(t.Context(), trace{}, "second"), c, "bob")
		require.ErrorIs(t, (<-first).err, context.DeadlineExceeded)
		got := <-second
		require.NoError(t, got.err)
		assert.Equal(t, "bob/1", got.session.Token.Reveal())
	})
}

func TestLoginThatIgnoresItsContextIsLeftBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, held, u := new(sessionlock.MemoryCache), new(memoryLocker), &upstream{life: time.Hour}
		u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
			if n == 1 {
				time.Sleep(time.Minute)
			}
			return u.grant(key, n), nil
		}
		c, start := newClient(t, u, store, sessionlock.WithLocker(held)), time.Now()
		_, err := c.Session(t.Context(), "bob")
		var login *sessionlock.LoginError
		require.ErrorAs(t, err, &login)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		assert.Equal(t, sessionlock.LoginUnknown, login.Class)
		assert.Equal(t, 10100*time.Millisecond, time.Since(start))
		synctest.Wait()
		assert.True(t, held.free())
		time.Sleep(time.Second)
		_, err = c.Session(t.Context(), "bob")
		require.ErrorIs(t, err, sessionlock.ErrSuppressed)
		assert.Equal(t, 1, u.logins(), "no second one beside it")
		time.Sleep(time.Until(start.Add(time.Minute)))
		synctest.Wait()
		assert.Equal(t, []string{"bob/1"}, u.ended(), "what it brings at last is an orphan")
		assert.Equal(t, "bob/2", tokenOf(t, c, "bob"))
	})
}

func TestLeaderLeftBeforeItsLoginSendsNone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		held, slow, u := new(memoryLocker), atomic.Bool{}, &upstream{life: time.Hour}
		slow.Store(true)
		sp := &spy{after: func(_ context.Context, op, _ string) error {
			if op == opSwap && slow.CompareAndSwap(true, false) {
				time.Sleep(500 * time.Millisecond) // the attempt is begun, its reply is on the way
			}
			return nil
		}}
		c, start := newClient(t, u, spyCache{sp, new(sessionlock.MemoryCache)}, sessionlock.WithLocker(held)), time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		_, err := c.Session(ctx, "bob")
		require.ErrorIs(t, err, context.DeadlineExceeded)
		assert.Equal(t, 200*time.Millisecond, time.Since(start))
		time.Sleep(time.Second) // the begin is seen through, so that what became of it is known
		synctest.Wait()
		assert.True(t, held.free())
		st, err := c.Inspect(t.Context(), "bob")
		require.NoError(t, err)
		assert.Zero(t, st.Attempts, "not sent, not counted")
		assert.Zero(t, u.logins())
		start = time.Now()
		assert.Equal(t, "bob/1", tokenOf(t, c, "bob"))
		assert.Zero(t, time.Since(start), "at once")
	})
}

func TestLoginNeverBeginsForNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var leave context.CancelFunc
		u := &upstream{life: time.Hour}
		u.script = func(ctx context.Context, key string, n int) (sessionlock.Session, error) {
			assert.NoError(t, ctx.Err())
			return u.grant(key, n), nil
		}
		sp := &spy{after: func(_ context.Context, op, _ string) error {
			if op == opSwap {
				leave()
			}
			return nil
		}}
		c := newClient(t, u, spyCache{sp, new(sessionlock.MemoryCache)}, sessionlock.WithLocker(new(memoryLocker)))
		for i := range 300 { // the caller leaves as its attempt is begun: either is first
			ctx, cancel := context.WithCancel(t.Context())
			leave = cancel
			_, _ = c.Session(ctx, strconv.Itoa(i))
			synctest.Wait()
			cancel()
		}
	})
}

func TestPanicOfDoPassesThrough(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := &upstream{life: time.Hour}
		c := newClient(t, u, new(sessionlock.MemoryCache))
		assert.PanicsWithValue(t, "mine", func() {
			_ = c.Do(t.Context(), "bob", func(context.Context, sessionlock.Session) error { panic("mine") })
		})
		require.NoError(t, c.Do(t.Context(), "bob", rejectOld("bob/1")))
		assert.Equal(t, 2, u.logins())
	})
}

func TestPanicsOfOptionsAreErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for name, opt := range map[string]sessionlock.Option{
			"fingerprint": sessionlock.WithFingerprint(func(context.Context, string) (string, error) { panic("canary") }),
			"lock key":    sessionlock.WithLockKey(func(string) string { panic("canary") }),
			"complete":    sessionlock.WithComplete(func(sessionlock.Session) bool { panic("canary") }),
			"logout":      sessionlock.WithLogout(func(context.Context, sessionlock.Session) error { panic("canary") }),
		} {
			c := newClient(t, &upstream{life: time.Hour}, new(sessionlock.MemoryCache), opt)
			_, err := c.Session(t.Context(), "bob")
			if name == "logout" {
				require.NoError(t, err)
				err = c.Logout(t.Context(), "bob")
			}
			var panicked *sessionlock.PanicError
			require.ErrorAs(t, err, &panicked, name)
			assert.NotContains(t, err.Error(), "canary", name)
		}
	})
}

// P8

func TestDoLogsInAtMostOnceAfterItsFirstRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := &upstream{life: time.Hour}
		c := newClient(t, u, new(sessionlock.MemoryCache))
		var at []int // logins at each run
		err := c.Do(t.Context(), "bob", func(context.Context, sessionlock.Session) error {
			at = append(at, u.logins())
			return sessionlock.Reject(errDead)
		})
		require.ErrorIs(t, err, sessionlock.ErrRejected)
		assert.Equal(t, []int{1, 2}, at)
		assert.Equal(t, 2, u.logins())
		st, err := c.Inspect(t.Context(), "bob")
		require.NoError(t, err)
		assert.Zero(t, st.Generation, "the second is invalidated too")
	})
}

func TestJoinerIsNotHandedWhatItRejected(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u := new(sessionlock.MemoryCache), &upstream{life: time.Hour}
		tokenOf(t, newClient(t, u, store), "bob")
		slow := atomic.Bool{}
		sp := &spy{after: func(_ context.Context, op, name string) error {
			if op == opLoad && isEntry(name) && slow.CompareAndSwap(true, false) {
				time.Sleep(500 * time.Millisecond)
			}
			return nil
		}}
		c := newClient(t, u, spyCache{sp, store}, sessionlock.WithNearCache(0, time.Minute))
		var saw []string
		var other <-chan answer
		err := c.Do(t.Context(), "bob", func(ctx context.Context, s sessionlock.Session) error {
			saw = append(saw, s.Token.Reveal())
			if len(saw) > 1 {
				return nil
			}
			slow.Store(true)
			other = askFor(ctx, c, "bob") // an attempt that will bring what is about to be rejected
			synctest.Wait()
			return sessionlock.Reject(errDead)
		})
		require.NoError(t, err)
		assert.Equal(t, []string{"bob/1", "bob/2"}, saw)
		got := <-other
		require.NoError(t, got.err)
		assert.Equal(t, "bob/2", got.session.Token.Reveal(), "what one caller knows to be dead is given to no other")
		assert.Equal(t, 2, u.logins())
	})
}

func TestSessionBroughtBackByAFailoverIsNotAdopted(t *testing.T) {
	for _, joins := range []bool{false, true} {
		t.Run(map[bool]string{false: "alone", true: "by a joiner"}[joins], func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store, names, u := new(sessionlock.MemoryCache), &spy{}, &upstream{life: time.Hour}
				a := newClient(t, u, spyCache{names, store})
				tokenOf(t, a, "bob")
				name := names.seen(entrySuffix)[0]
				older, err := store.Load(t.Context(), name)
				require.NoError(t, err)
				require.NoError(t, a.Do(t.Context(), "bob", rejectOld("bob/1")))
				require.NoError(t, a.Close(t.Context()))

				slow := atomic.Bool{}
				sp := &spy{after: func(_ context.Context, op, name string) error {
					if op == opLoad && isEntry(name) && slow.CompareAndSwap(true, false) {
						time.Sleep(500 * time.Millisecond)
					}
					return nil
				}}
				c := newClient(t, u, spyCache{sp, store}, sessionlock.WithNearCache(0, time.Minute))
				var saw []string
				var gens []uint64
				err = c.Do(t.Context(), "bob", func(ctx context.Context, s sessionlock.Session) error {
					saw, gens = append(saw, s.Token.Reveal()), append(gens, s.Generation())
					if len(saw) > 1 {
						return nil
					}
					newer, err := store.Load(ctx, name)
					assert.NoError(t, err)
					_, err = store.CompareAndSwap(ctx, name, newer, older, time.Hour)
					assert.NoError(t, err)
					if joins {
						slow.Store(true)
						askFor(ctx, c, "bob")
						synctest.Wait()
					}
					return sessionlock.Reject(errDead)
				})
				require.NoError(t, err)
				assert.Equal(t, []string{"bob/2", "bob/3"}, saw)
				assert.Greater(t, gens[1], gens[0])
			})
		})
	}
}

func TestRejectedSessionIsNotKeptNear(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u, down := new(sessionlock.MemoryCache), &upstream{life: time.Hour}, &cut{}
		c := newClient(t, u, spyCache{&spy{before: down.before}, store})
		s, err := c.Session(t.Context(), "bob")
		require.NoError(t, err)
		down.off.Store(true)
		assertUnavailable(t, c.Invalidate(t.Context(), s))
		_, err = c.Session(t.Context(), "bob")
		assertUnavailable(t, err)
		down.off.Store(false)
		assert.Equal(t, "bob/2", tokenOf(t, c, "bob"), "the entry still has the first, this process knows better")
	})
}

func TestStoredSessionThatIsIncompleteIsReplaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u := new(sessionlock.MemoryCache), &upstream{life: time.Hour}
		old := newClient(t, u, store) // an older release, which asks for less
		u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
			if n == 1 {
				return u.grant(key, n), nil
			}
			return u.grant(key, n).WithValue("csrf", "x"), nil
		}
		require.Equal(t, "bob/1", tokenOf(t, old, "bob"))
		c := newClient(t, u, store, sessionlock.WithComplete(func(s sessionlock.Session) bool { return s.Value("csrf") != "" }))
		s, err := c.Session(t.Context(), "bob")
		require.NoError(t, err)
		assert.Equal(t, "bob/2", s.Token.Reveal())
		assert.Equal(t, "x", s.Value("csrf"))
	})
}

func TestInvalidateRefusesForeignSessions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, sp, u := new(sessionlock.MemoryCache), &spy{}, &upstream{life: time.Hour}
		c := newClient(t, u, spyCache{sp, store})
		other, err := sessionlock.New("https://other.test", u, sessionlock.WithCache(store))
		require.NoError(t, err)
		foreign, err := other.Session(t.Context(), "bob")
		require.NoError(t, err)
		require.NoError(t, other.Close(t.Context()))
		for _, s := range []sessionlock.Session{{}, {Token: sessionlock.NewToken("x")}, sessionlock.Session{}.WithValue("a", "b"), foreign} {
			require.ErrorIs(t, c.Invalidate(t.Context(), s), sessionlock.ErrInvalid)
		}
		assert.Zero(t, sp.count())
		peers, err := newClient(t, u, store).Session(t.Context(), "bob")
		require.NoError(t, err)
		require.NoError(t, c.Invalidate(t.Context(), peers), "one that a peer gave out will do")
		assert.Equal(t, "bob/3", tokenOf(t, c, "bob"))
		require.NoError(t, c.Invalidate(t.Context(), peers))
		assert.Equal(t, "bob/3", tokenOf(t, c, "bob"))
	})
}

func TestLoginInsideItsOwnLoginIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var c *sessionlock.Client
		u := &upstream{life: time.Hour}
		u.script = func(ctx context.Context, key string, n int) (sessionlock.Session, error) {
			if key == "bob" {
				for call, err := range everyCall(ctx, c, "bob") {
					switch call {
					case "Logout", "Unsuppress", "Inspect":
					default:
						assert.ErrorIs(t, err, sessionlock.ErrReentrant, call)
					}
				}
				other, err := c.Session(ctx, "master") // whose login asks for bob again
				assert.NoError(t, err)
				assert.Equal(t, "master/2", other.Token.Reveal())
			} else {
				_, err := c.Session(ctx, "bob")
				assert.ErrorIs(t, err, sessionlock.ErrReentrant)
			}
			return u.grant(key, n), nil
		}
		c = newClient(t, u, new(sessionlock.MemoryCache))
		_, err := c.Session(t.Context(), "bob")
		require.ErrorIs(t, err, sessionlock.ErrStale, "its own Logout overtook it")
		assert.Equal(t, 2, u.logins())
	})
}

func TestLogoutDuringALoginMakesItStale(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u, seen := new(sessionlock.MemoryCache), &upstream{life: time.Hour, takes: 800 * time.Millisecond}, &recorder{}
		a, b, c := newClient(t, u, store, sessionlock.WithObserver(seen)), newClient(t, u, store), newClient(t, u, store)
		leader := askFor(t.Context(), a, "bob")
		time.Sleep(500 * time.Millisecond)
		require.NoError(t, b.Logout(t.Context(), "bob"))
		require.ErrorIs(t, (<-leader).err, sessionlock.ErrStale)
		synctest.Wait()
		assert.Equal(t, 1, u.logins(), "no second login")
		assert.Equal(t, []string{"bob/1"}, u.ended())
		assert.Equal(t, []string{"login_ok", "stale", "ended"}, seen.kinds())
		assert.Equal(t, "bob/2", tokenOf(t, c, "bob"))
	})
}

func TestDisplacedSessionIsEndedAfterAGrace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := &upstream{life: time.Hour}
		c := newClient(t, u, new(sessionlock.MemoryCache))
		s, err := c.Session(t.Context(), "bob")
		require.NoError(t, err)
		time.Sleep(time.Until(s.Expiry) - 20*time.Second)
		synctest.Wait()
		at := time.Now()
		assert.Equal(t, "bob/2", tokenOf(t, c, "bob"))
		time.Sleep(time.Hour / 2)
		require.Equal(t, []string{"bob/1"}, u.ended())
		assert.Equal(t, 30*time.Second, u.outAt[0].Sub(at), "requests may still use it")
	})
}

func TestCurrentTokenIsNeverLoggedOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, gone := new(sessionlock.MemoryCache), &cut{}
		u := &upstream{life: time.Minute}
		u.script = func(ctx context.Context, key string, n int) (sessionlock.Session, error) {
			if n == 1 {
				gone.off.Store(true)
				_ = pauseFor(ctx, 5*time.Second)
				gone.off.Store(false)
			}
			return u.grant(key, 1), nil // one token for all
		}
		slow := askFor(t.Context(), newClient(t, u, spyCache{&spy{before: gone.before}, store}), "bob")
		time.Sleep(3100 * time.Millisecond)
		b := newClient(t, u, store)
		assert.Equal(t, "bob/1", tokenOf(t, b, "bob"))
		require.NoError(t, (<-slow).err)
		time.Sleep(time.Minute)
		assert.Equal(t, "bob/1", tokenOf(t, b, "bob"), "displaced by itself")
		time.Sleep(40 * time.Second)
		assert.Equal(t, 3, u.logins())
		assert.Empty(t, u.ended())
	})
}

// P9

func TestStoreThatHangsFreesItsCallersInTime(t *testing.T) {
	for name, hangs := range map[string]func(sp *spy, op, name string) bool{
		"load":              func(_ *spy, op, _ string) bool { return op == opLoad },
		"lock":              func(_ *spy, op, _ string) bool { return op == opLock },
		"begin":             func(_ *spy, op, _ string) bool { return op == opSwap },
		"all from begin on": func(sp *spy, op, _ string) bool { return op == opSwap || sp.count(opSwap) > 0 },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				release := make(chan struct{})
				sp, u := &spy{}, &upstream{life: time.Hour}
				sp.before = func(_ context.Context, op, name string) error {
					if hangs(sp, op, name) {
						<-release // whatever its context says
					}
					return nil
				}
				c := newClient(t, u, spyCache{sp, new(sessionlock.MemoryCache)}, sessionlock.WithLocker(spyLocker{sp, new(memoryLocker)}))
				t.Cleanup(func() { close(release) })
				start := time.Now()
				var callers []<-chan answer
				for range 100 {
					callers = append(callers, askFor(t.Context(), c, "bob"))
				}
				for _, caller := range callers {
					got := <-caller
					assertUnavailable(t, got.err)
					assert.Equal(t, time.Second, got.at.Sub(start))
				}
				time.Sleep(10 * time.Second)
				assert.Zero(t, u.logins())
				assert.LessOrEqual(t, sp.count(), 6, "calls do not grow with callers")
			})
		})
	}
}

func TestNearCacheIsBounded(t *testing.T) {
	const keys, bound = 5000, 100
	sp := &spy{}
	c := newClient(t, &upstream{life: time.Hour}, spyCache{sp, new(sessionlock.MemoryCache)},
		sessionlock.WithLocker(new(memoryLocker)), sessionlock.WithNearCache(bound, time.Minute))
	key := func(i int) string { return "key" + strconv.Itoa(i) }
	for i := range keys {
		tokenOf(t, c, key(i))
	}
	before := c.Stats().SharedHits
	for i := range keys {
		s, err := c.Session(t.Context(), key(keys-1-i))
		require.NoError(t, err)
		require.Equal(t, key(keys-1-i), s.Key())
	}
	hits := keys - int(c.Stats().SharedHits-before)
	assert.LessOrEqual(t, hits, bound)
	assert.Positive(t, hits)
	assert.EqualValues(t, hits, c.Stats().NearHits, "those of keys that left are counted too")
}

func TestAnyNearCacheServesEveryKey(t *testing.T) {
	for _, size := range []int{0, 1, 2} {
		t.Run(strconv.Itoa(size), func(t *testing.T) {
			u := &upstream{life: time.Hour}
			c := newClient(t, u, new(sessionlock.MemoryCache), sessionlock.WithNearCache(size, time.Minute))
			var wg sync.WaitGroup
			for g := range 16 {
				wg.Go(func() {
					for i := range 100 {
						key := "key" + strconv.Itoa((g*7+i)%40)
						s, err := c.Session(t.Context(), key)
						if assert.NoError(t, err) {
							assert.True(t, strings.HasPrefix(s.Token.Reveal(), key+"/"), "%q of %s", s.Key(), key)
						}
					}
				})
			}
			wg.Wait()
			assert.Equal(t, 40, u.logins())
		})
	}
}

// P10

func TestSecretsAreNowhere(t *testing.T) {
	const key, secret, value, password = "canary-key-7", "canary-token-7", "canary-value-7", "canary-password-7"
	quoting := errors.New(`{"user":"` + key + `","token":"` + secret + `","password":"` + password + `"}`)
	var told []any // whatever a caller could print
	tell := func(vs ...any) { told = append(told, vs...) }
	text, lines, seen := &logbook{}, &logbook{}, &recorder{}
	var names []string
	synctest.Test(t, func(t *testing.T) {
		m, client := bubbleRedis(t)
		down := &cut{}
		rdb := client()
		rdb.AddHook(cutHook{down})
		var fail error
		u := &upstream{life: time.Hour}
		u.script = func(_ context.Context, _ string, n int) (sessionlock.Session, error) {
			if n == 2 {
				panic(quoting)
			}
			return sessionlock.Session{Token: sessionlock.NewToken(fmt.Sprint(secret, "/", n)), Expiry: time.Now().Add(time.Hour)}.WithValue("refresh", value), fail
		}
		open := func(l *logbook, h func(*logbook) slog.Handler) *sessionlock.Client {
			return newProcess(t, u, sessionlock.WithRedis(rdb), sessionlock.WithLogger(slog.New(h(l))), sessionlock.WithObserver(seen),
				sessionlock.WithKeySecret([]byte(password)))
		}
		a := open(text, func(l *logbook) slog.Handler { return slog.NewTextHandler(l, nil) })
		b := open(lines, func(l *logbook) slog.Handler { return slog.NewJSONHandler(l, nil) })
		reject := func(context.Context, sessionlock.Session) error { return sessionlock.Reject(quoting) }
		for _, c := range []*sessionlock.Client{a, b} {
			fail = nil
			u.fails(nil)
			s, err := c.Session(t.Context(), key)
			tell(s, &s, s.Token, err, []any{s}, map[string]sessionlock.Session{"s": s}, struct{ S sessionlock.Session }{s})
			tell(c.Do(t.Context(), key, reject))
			st, err := c.Inspect(t.Context(), key)
			tell(st, err, c.Stats(), c.KeyID(key))
			tell(c.Unsuppress(t.Context(), key), c, c.For(key), struct{ C *sessionlock.Client }{c})
			for _, fail = range []error{quoting, sessionlock.Denied(quoting), sessionlock.RetryAfter(quoting, 0), context.DeadlineExceeded} {
				_, err := c.Session(t.Context(), key)
				_, again := c.Session(t.Context(), key)
				tell(err, again, c.Unsuppress(t.Context(), key))
			}
			synctest.Wait() // for logouts
			fail = nil
			u.fails(quoting)
			_, err = c.Session(t.Context(), key)
			tell(err, c.Logout(t.Context(), key))
			down.off.Store(true)
			_, err = c.Session(t.Context(), key)
			tell(err, c.Invalidate(t.Context(), s), c.Logout(t.Context(), key))
			down.off.Store(false)
			_, err = c.Session(t.Context(), key)
			tell(err)
			gone, cancel := context.WithCancel(t.Context())
			cancel()
			_, err = c.Session(gone, key)
			tell(err)
			names = append(names, m.Keys()...)
			tell(c.Close(t.Context()))
			_, err = c.Session(t.Context(), key)
			tell(err)
		}
		for _, err := range []error{quoting} {
			_, bad := sessionlock.New(key+secret, u, sessionlock.WithKeySecret([]byte(secret)[:3]), nil)
			tell(bad)
			c := newProcess(t, u, sessionlock.WithRedis(rdb), sessionlock.WithFingerprint(func(context.Context, string) (string, error) { return "", err }))
			_, bad = c.Session(t.Context(), key)
			tell(bad)
		}
	})
	for _, e := range seen.all() {
		tell(e, e.Err)
	}
	clean := func(where, s string) {
		t.Helper()
		for _, canary := range []string{key, secret, value, password} {
			assert.NotContains(t, s, canary, where)
			assert.NotContains(t, s, fmt.Sprintf("%x", canary), where)
			assert.NotContains(t, s, strings.Trim(fmt.Sprintf("%d", []byte(canary)), "[]"), where)
		}
	}
	require.Greater(t, len(told), 60)
	for _, v := range told {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
			clean(verb, fmt.Sprintf(verb, v))
		}
		if _, isErr := v.(error); !isErr {
			if b, err := json.Marshal(v); err == nil {
				clean("json", string(b))
			}
		}
		var out bytes.Buffer
		slog.New(slog.NewJSONHandler(&out, nil)).Info("seen", slog.Any("v", v))
		slog.New(slog.NewTextHandler(&out, nil)).Info("seen", slog.Any("v", v))
		clean("slog", out.String())
	}
	require.NotEmpty(t, names)
	clean("names", strings.Join(names, "\n"))
	for _, l := range []*logbook{text, lines} {
		assert.Contains(t, l.String(), "login_denied")
		clean("log", l.String())
	}
}

// P11

func TestCloseLetsLoginsFinish(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, held, u := new(sessionlock.MemoryCache), new(memoryLocker), &upstream{life: time.Hour, takes: 2 * time.Second}
		c := newClient(t, u, store, sessionlock.WithLocker(held))
		caller := askFor(t.Context(), c, "bob")
		time.Sleep(time.Second)
		start := time.Now()
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() { assert.NoError(t, c.Close(t.Context())) })
		}
		synctest.Wait()
		for call, err := range everyCall(t.Context(), c, "eve") {
			require.ErrorIs(t, err, sessionlock.ErrClosed, call)
		}
		wg.Wait()
		assert.Equal(t, time.Second, time.Since(start))
		got := <-caller
		require.NoError(t, got.err)
		assert.Equal(t, "bob/1", got.session.Token.Reveal())
		assert.True(t, held.free(), "before Close returns")
		_, err := c.Session(t.Context(), "bob")
		require.ErrorIs(t, err, sessionlock.ErrClosed)
		require.NoError(t, c.Close(t.Context()))
		assert.Equal(t, "bob/1", tokenOf(t, newClient(t, u, store, sessionlock.WithLocker(held)), "bob"))
	})
}

func TestCloseCancelsLoginsWhenItsContextEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, held, u := new(sessionlock.MemoryCache), new(memoryLocker), &upstream{life: time.Hour, takes: 5 * time.Second}
		c := newClient(t, u, store, sessionlock.WithLocker(held))
		caller, start := askFor(t.Context(), c, "bob"), time.Now()
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		require.ErrorIs(t, c.Close(ctx), context.DeadlineExceeded)
		assert.Equal(t, time.Second, time.Since(start))
		got := <-caller
		require.Error(t, got.err)
		assert.Equal(t, time.Second, got.at.Sub(start))
		synctest.Wait()
		assert.True(t, held.free())
		require.NoError(t, c.Close(t.Context()), "and the rest has ended")
		assert.Equal(t, time.Second, time.Since(start))
	})
}

func TestCloseFreesWaiters(t *testing.T) {
	eachStore(t, func(t *testing.T, process func() sessionlock.Option) {
		u := &upstream{life: time.Hour, takes: 5 * time.Second}
		leader := askFor(t.Context(), newProcess(t, u, process()), "bob")
		time.Sleep(time.Second)
		c := newProcess(t, u, process())
		var waiters []<-chan answer
		for range 10 {
			waiters = append(waiters, askFor(t.Context(), c, "bob"))
		}
		time.Sleep(time.Second)
		start := time.Now()
		require.NoError(t, c.Close(t.Context()))
		for _, waiter := range waiters {
			got := <-waiter
			require.ErrorIs(t, got.err, sessionlock.ErrClosed)
			assert.Equal(t, start, got.at)
		}
		require.NoError(t, (<-leader).err)
		assert.Equal(t, 1, u.logins())
	})
}

func TestCloseEndsGracesAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := &upstream{life: time.Minute}
		c := newClient(t, u, new(sessionlock.MemoryCache))
		tokenOf(t, c, "bob")
		time.Sleep(45 * time.Second)
		synctest.Wait()
		tokenOf(t, c, "bob")
		start := time.Now()
		require.NoError(t, c.Close(t.Context()))
		assert.Zero(t, time.Since(start))
		assert.Equal(t, []string{"bob/1"}, u.ended())
	})
}

// ours returns the other goroutines of this bubble that run code of the library.
func ours() (stacks []string) {
	buf := make([]byte, 1<<22)
	all := strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n")
	_, rest, _ := strings.Cut(all[0], "synctest bubble ")
	bubble, _, _ := strings.Cut(rest, "]")
	for _, stack := range all[1:] {
		head, calls, _ := strings.Cut(stack, "\n")
		library := strings.Contains(calls, "/sessionlock.(") || strings.Contains(calls, "/internal/hub.")
		if strings.HasSuffix(strings.TrimSuffix(head, "]:"), "synctest bubble "+bubble) && library {
			stacks = append(stacks, stack)
		}
	}
	return stacks
}

func TestCloseEndsEveryGoroutine(t *testing.T) {
	eachStore(t, func(t *testing.T, process func() sessionlock.Option) {
		u := &upstream{life: time.Hour, takes: time.Second}
		first := newProcess(t, u, process())
		leader := askFor(t.Context(), first, "0")
		synctest.Wait()
		require.NotEmpty(t, ours(), "a login is under way")
		require.NoError(t, (<-leader).err)
		require.NoError(t, first.Close(t.Context()))
		for _, patience := range []time.Duration{0, time.Minute} {
			c := newProcess(t, u, process())
			for i := range 5 {
				tokenOf(t, c, strconv.Itoa(i))
			}
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			_ = c.Close(ctx)
			cancel()
			require.NoError(t, c.Close(t.Context()))
		}
		synctest.Wait()
		assert.Empty(t, ours())
	})
}

// P12

func TestNearCopiesOutliveAnOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		down, u := &cut{}, &upstream{life: time.Hour}
		c := newClient(t, u, spyCache{&spy{before: down.before}, new(sessionlock.MemoryCache)})
		s, err := c.Session(t.Context(), "bob")
		require.NoError(t, err)
		down.off.Store(true)
		for time.Until(s.Expiry) > 20*time.Second {
			require.Equal(t, "bob/1", tokenOf(t, c, "bob"))
			time.Sleep(10 * time.Second)
		}
		synctest.Wait()
		_, err = c.Session(t.Context(), "bob")
		assertUnavailable(t, err)
		assert.Equal(t, 1, u.logins())
		down.off.Store(false)
		time.Sleep(time.Second) // when it is asked again, at the latest
		assert.Equal(t, "bob/2", tokenOf(t, c, "bob"))
	})
}

func TestSessionThatCannotBeStoredStillServesItsProcess(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, down, seen := new(sessionlock.MemoryCache), &cut{}, &recorder{}
		u := &upstream{life: time.Hour}
		u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
			down.off.Store(n == 1)
			return u.grant(key, n), nil
		}
		c := newClient(t, u, spyCache{&spy{before: down.before}, store}, sessionlock.WithObserver(seen))
		start := time.Now()
		callers := []<-chan answer{askFor(t.Context(), c, "bob"), askFor(t.Context(), c, "bob")}
		var at time.Time
		for _, caller := range callers {
			got := <-caller
			require.NoError(t, got.err)
			assert.Equal(t, "bob/1", got.session.Token.Reveal())
			assert.LessOrEqual(t, got.at.Sub(start), 6*time.Second, "retried while the lease lasts")
			at = got.at
		}
		assert.Equal(t, []string{"login_ok", "degraded"}, seen.kinds())
		time.Sleep(29 * time.Second)
		assert.Equal(t, "bob/1", tokenOf(t, c, "bob"))
		down.off.Store(false)
		time.Sleep(time.Second)
		synctest.Wait()
		require.Equal(t, []string{"bob/1"}, u.ended())
		assert.Equal(t, 30*time.Second, u.outAt[0].Sub(at))
		assert.Equal(t, "bob/2", tokenOf(t, c, "bob"))
	})
}

func TestCommitIsRetriedWhileTheLeaseLasts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, down := new(sessionlock.MemoryCache), &cut{}
		u := &upstream{life: time.Hour}
		u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
			down.off.Store(true)
			time.AfterFunc(2*time.Second, func() { down.off.Store(false) })
			return u.grant(key, n), nil
		}
		c := newClient(t, u, spyCache{&spy{before: down.before}, store})
		assert.Equal(t, "bob/1", tokenOf(t, c, "bob"))
		assert.Equal(t, "bob/1", tokenOf(t, newClient(t, u, store), "bob"))
		time.Sleep(time.Minute)
		assert.Empty(t, u.ended())
	})
}

func TestCommitWhoseReplyWasLostIsStoredOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, lost, u := new(sessionlock.MemoryCache), 0, &upstream{life: time.Hour}
		sp := &spy{after: func(_ context.Context, op, name string) error {
			if op == opSwap && isEntry(name) && u.logins() == 1 && lost == 0 {
				lost++
				return errStoreDown
			}
			return nil
		}}
		seen := &recorder{}
		c := newClient(t, u, spyCache{sp, store}, sessionlock.WithObserver(seen))
		s, err := c.Session(t.Context(), "bob")
		require.NoError(t, err)
		assert.Equal(t, 1, lost)
		assert.Equal(t, []string{sessionlock.EventLoginOK}, seen.kinds(), "not stale: it was our own")
		peers, err := newClient(t, u, store).Session(t.Context(), "bob")
		require.NoError(t, err)
		assert.Equal(t, s.Generation(), peers.Generation())
		time.Sleep(time.Minute)
		assert.Empty(t, u.ended())
		assert.Equal(t, 1, u.logins())
	})
}

func TestSessionStoredWithoutAnAnswerLives(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, lost, u := new(sessionlock.MemoryCache), &cut{}, &upstream{life: time.Hour}
		u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
			lost.off.Store(true)
			return u.grant(key, n), nil
		}
		c := newClient(t, u, spyCache{&spy{after: lost.before}, store})
		assert.Equal(t, "bob/1", tokenOf(t, c, "bob"))
		lost.off.Store(false)
		time.Sleep(time.Minute)
		assert.Empty(t, u.ended(), "the fleet has it")
		assert.Equal(t, "bob/1", tokenOf(t, newClient(t, u, store), "bob"))
		assert.Equal(t, "bob/1", tokenOf(t, c, "bob"))
	})
}

func TestNextAttemptWaitsForTheUnlockOfTheLast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sp, u := &spy{}, &upstream{life: time.Hour}
		sp.before = func(_ context.Context, op, _ string) error {
			if op == opUnlock {
				time.Sleep(50 * time.Millisecond)
			}
			return nil
		}
		c := newClient(t, u, new(sessionlock.MemoryCache), sessionlock.WithLocker(spyLocker{sp, new(memoryLocker)}))
		start := time.Now()
		require.NoError(t, c.Do(t.Context(), "bob", rejectOld("bob/1")))
		assert.Equal(t, 50*time.Millisecond, time.Since(start), "and not for a poll tick")
		assert.Equal(t, 2, sp.count(opLock), "it never meets its own lock")
	})
}

func TestBeginWhoseReplyWasLostCountsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, held, lost, u := new(sessionlock.MemoryCache), new(memoryLocker), 0, &upstream{life: time.Hour}
		sp := &spy{after: func(_ context.Context, op, _ string) error {
			if op == opSwap && lost < 1 {
				lost++
				return errStoreDown
			}
			return nil
		}}
		c := newClient(t, u, spyCache{sp, store}, sessionlock.WithLocker(held))
		_, err := c.Session(t.Context(), "bob")
		assertUnavailable(t, err)
		synctest.Wait()
		assert.True(t, held.free())
		st, err := c.Inspect(t.Context(), "bob")
		require.NoError(t, err)
		assert.Zero(t, st.Attempts)
		assert.Zero(t, st.LockedSince)
		assert.Equal(t, "bob/1", tokenOf(t, c, "bob"), "at once")
	})
}

func TestLockGrantedLateIsFreed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		held, slow, u := new(memoryLocker), atomic.Bool{}, &upstream{life: time.Hour}
		slow.Store(true)
		sp := &spy{after: func(_ context.Context, op, _ string) error {
			if op == opLock && slow.Load() {
				time.Sleep(1500 * time.Millisecond)
			}
			return nil
		}}
		c := newClient(t, u, new(sessionlock.MemoryCache), sessionlock.WithLocker(spyLocker{sp, held}))
		_, err := c.Session(t.Context(), "bob")
		assertUnavailable(t, err)
		assert.False(t, held.free())
		time.Sleep(600 * time.Millisecond)
		assert.True(t, held.free(), "before its TTL")
		slow.Store(false)
		assert.Equal(t, "bob/1", tokenOf(t, c, "bob"))
	})
}

// Near copies

func TestChangesElsewhereReachNearCopies(t *testing.T) {
	for name, change := range map[string]struct {
		do   func(*testing.T, *sessionlock.Client, sessionlock.Session)
		want string
	}{
		"logout": {func(t *testing.T, a *sessionlock.Client, _ sessionlock.Session) {
			assert.NoError(t, a.Logout(t.Context(), "bob"))
		}, "bob/2"},
		"invalidate": {func(t *testing.T, a *sessionlock.Client, s sessionlock.Session) {
			assert.NoError(t, a.Invalidate(t.Context(), s))
		}, "bob/2"},
		"new login": {func(t *testing.T, a *sessionlock.Client, _ sessionlock.Session) {
			assert.NoError(t, a.Do(t.Context(), "bob", rejectOld("bob/1")))
		}, "bob/2"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Run("by push at once", func(t *testing.T) {
				eachStore(t, func(t *testing.T, process func() sessionlock.Option) {
					u := &upstream{life: time.Hour}
					a, b := newProcess(t, u, process()), newProcess(t, u, process())
					s, err := a.Session(t.Context(), "bob")
					require.NoError(t, err)
					require.Equal(t, "bob/1", tokenOf(t, b, "bob"))
					time.Sleep(time.Second) // the subscription stands
					change.do(t, a, s)
					synctest.Wait()
					assert.Equal(t, change.want, tokenOf(t, b, "bob"))
					assert.Equal(t, 2, u.logins())
				})
			})
			t.Run("without it within the age", func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					store, u := new(sessionlock.MemoryCache), &upstream{life: time.Hour}
					a, b := newClient(t, u, store), newClient(t, u, polled{store})
					s, err := a.Session(t.Context(), "bob")
					require.NoError(t, err)
					require.Equal(t, "bob/1", tokenOf(t, b, "bob"))
					time.Sleep(time.Second)
					change.do(t, a, s)
					start := time.Now()
					assert.Equal(t, "bob/1", tokenOf(t, b, "bob"), "it cannot know yet")
					for tokenOf(t, b, "bob") == "bob/1" {
						require.LessOrEqual(t, time.Since(start), 60*time.Second)
						time.Sleep(time.Second)
					}
					assert.Equal(t, change.want, tokenOf(t, b, "bob"))
				})
			})
		})
	}
}

func TestNearCopyIsReplacedByWhatALookFinds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u := new(sessionlock.MemoryCache), &upstream{life: time.Hour}
		var slow atomic.Bool
		sp := &spy{before: func(context.Context, string, string) error {
			if slow.Load() {
				time.Sleep(500 * time.Millisecond)
			}
			return nil
		}}
		a, b := newClient(t, u, store), newClient(t, u, spyCache{sp, store})
		tokenOf(t, a, "bob")
		tokenOf(t, b, "bob")
		slow.Store(true)
		require.NoError(t, a.Do(t.Context(), "bob", rejectOld("bob/1")))
		time.Sleep(2 * time.Second)
		loads := sp.count()
		assert.Equal(t, "bob/2", tokenOf(t, b, "bob"))
		assert.Equal(t, loads, sp.count(), "from near")
	})
}

func TestNearCopyInUseIsLookedAtOffTheCallersPath(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u := new(sessionlock.MemoryCache), &upstream{life: time.Hour}
		var slow atomic.Bool
		sp := &spy{before: func(context.Context, string, string) error {
			if slow.Load() {
				time.Sleep(900 * time.Millisecond)
			}
			return nil
		}}
		c := newClient(t, u, spyCache{sp, store})
		tokenOf(t, c, "bob")
		synctest.Wait()
		loads := sp.count(opLoad)
		slow.Store(true)
		for range 3000 { // 5 minutes
			start := time.Now()
			require.Equal(t, "bob/1", tokenOf(t, c, "bob"))
			require.Zero(t, time.Since(start))
			time.Sleep(100 * time.Millisecond)
		}
		assert.InDelta(t, 5, sp.count(opLoad)-loads, 1)
		assert.EqualValues(t, 3000, c.Stats().NearHits)
	})
}

func TestUnusedNearCopyIsDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u, sp := new(sessionlock.MemoryCache), &upstream{life: time.Hour}, &spy{}
		c := newClient(t, u, spyCache{sp, store})
		tokenOf(t, c, "bob")
		tokenOf(t, c, "bob")
		synctest.Wait()
		before := sp.count()
		time.Sleep(30 * time.Minute)
		assert.LessOrEqual(t, sp.count()-before, 2, "once after it was taken, once after its use")
		before = sp.count(opLoad)
		assert.Equal(t, "bob/1", tokenOf(t, c, "bob"))
		assert.Equal(t, 1, sp.count(opLoad)-before, "from the cache again")
	})
}

func TestWakeUpsInMassesCostOneLookPerGap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sp, u := &spy{}, &upstream{life: time.Hour}
		store := &noisy{spyCache: spyCache{sp, new(sessionlock.MemoryCache)}}
		c := newClient(t, u, store)
		tokenOf(t, c, "bob")
		synctest.Wait()
		before := sp.count()
		for range 1000 {
			store.wake()
			time.Sleep(time.Millisecond)
		}
		time.Sleep(time.Second)
		assert.InDelta(t, 100, sp.count()-before, 5, "1 s of forged pushes, 10 ms apart")
		assert.Equal(t, "bob/1", tokenOf(t, c, "bob"))
	})
}

// noisy is a cache whose pushes a test makes.
type noisy struct {
	spyCache
	watches sync.Mutex
	changed []func()
}

func (n *noisy) Watch(_ string, changed func()) func() {
	n.watches.Lock()
	defer n.watches.Unlock()
	n.changed = append(n.changed, changed)
	return func() {}
}

func (n *noisy) wake() {
	n.watches.Lock()
	defer n.watches.Unlock()
	for _, f := range n.changed {
		f()
	}
}

// Events, Stats, Inspect

func TestEachOutcomeIsReportedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, seen, peer := new(sessionlock.MemoryCache), &recorder{}, &recorder{}
		var fail error
		u := &upstream{life: time.Hour, takes: time.Second}
		u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) { return u.grant(key, n), fail }
		held := new(memoryLocker)
		a := newClient(t, u, store, sessionlock.WithObserver(seen), sessionlock.WithLocker(held))
		b := newClient(t, u, store, sessionlock.WithObserver(peer), sessionlock.WithLocker(held))
		everybody := func(key string) {
			var callers []<-chan answer
			for range 5 {
				callers = append(callers, askFor(t.Context(), a, key))
				synctest.Wait() // a leads
				callers = append(callers, askFor(t.Context(), b, key))
			}
			for _, caller := range callers {
				<-caller
			}
			synctest.Wait()
		}
		expect := func(r *recorder, kinds ...string) {
			t.Helper()
			assert.Equal(t, kinds, r.kinds())
		}
		everybody("bob")
		expect(seen, sessionlock.EventLoginOK)
		expect(peer, sessionlock.EventAdopted)
		tokenOf(t, a, "bob")
		expect(seen, sessionlock.EventNear)
		tokenOf(t, newClient(t, u, store, sessionlock.WithObserver(seen)), "bob")
		expect(seen, sessionlock.EventShared)
		require.NoError(t, a.Do(t.Context(), "bob", rejectOld("bob/1")))
		expect(seen, sessionlock.EventNear, sessionlock.EventLoginOK, sessionlock.EventReauthOK)
		require.Error(t, a.Do(t.Context(), "bob", func(context.Context, sessionlock.Session) error { return sessionlock.Reject(errDead) }))
		expect(seen, sessionlock.EventNear, sessionlock.EventSuppressed, sessionlock.EventReauthFailed)
		peer.kinds()
		for _, tc := range []struct {
			key, kind string
			fail      error
		}{
			{"denied", sessionlock.EventLoginDenied, sessionlock.Denied(errDead)},
			{"deferred", sessionlock.EventLoginDeferred, sessionlock.RetryAfter(errDead, time.Hour)},
			{"unknown", sessionlock.EventLoginUnknown, errDead},
		} {
			fail = tc.fail
			everybody(tc.key)
			assert.ElementsMatch(t, []string{tc.kind, sessionlock.EventEnded}, seen.kinds())
			expect(peer, sessionlock.EventSuppressed)
		}
		fail = nil
		_, err := a.Session(t.Context(), "denied")
		require.Error(t, err)
		expect(seen, sessionlock.EventSuppressed)
		assert.Equal(t, sessionlock.Stats{NearHits: 3, Logins: 5, Denied: 1, Suppressed: 2, Reauths: 1}, a.Stats())
		assert.Equal(t, sessionlock.Stats{Adopted: 1, Suppressed: 3}, b.Stats())
	})
}

func TestEventsSayWhatHappened(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, seen := new(sessionlock.MemoryCache), &recorder{}
		u := &upstream{life: time.Hour, takes: 2 * time.Second}
		leader := askFor(t.Context(), newClient(t, u, store), "bob")
		time.Sleep(time.Second)
		b := newClient(t, u, polled{store}, sessionlock.WithObserver(seen))
		start := time.Now()
		s, err := b.Session(t.Context(), "bob")
		require.NoError(t, err)
		<-leader
		require.Len(t, seen.all(), 1)
		e := seen.all()[0]
		assert.Equal(t, sessionlock.EventAdopted, e.Kind)
		assert.Equal(t, b.KeyID("bob"), e.KeyID)
		assert.Equal(t, s.Generation(), e.Generation)
		assert.Equal(t, start, e.Start)
		assert.Equal(t, time.Since(start), e.Duration)
		assert.Equal(t, 4, e.Attempt, "ticks in 1 to 1.2 s")
		require.NoError(t, e.Err)
	})
}

func TestInspectShowsALoginUnderWay(t *testing.T) {
	eachStore(t, func(t *testing.T, process func() sessionlock.Option) {
		u := &upstream{life: time.Hour, takes: 5 * time.Second}
		start := time.Now()
		leader := askFor(t.Context(), newProcess(t, u, process()), "bob")
		time.Sleep(2 * time.Second)
		c := newProcess(t, u, process())
		st, err := c.Inspect(t.Context(), "bob")
		require.NoError(t, err)
		assert.WithinDuration(t, start, st.LockedSince, time.Millisecond)
		assert.NotEmpty(t, st.Holder)
		assert.Equal(t, 1, st.Attempts)
		assert.Zero(t, st.Generation)
		assert.Zero(t, st.SuppressedUntil)
		led := <-leader
		require.NoError(t, led.err)
		st, err = c.Inspect(t.Context(), "bob")
		require.NoError(t, err)
		assert.Equal(t, led.session.Generation(), st.Generation)
		assert.WithinDuration(t, led.session.Expiry.Add(-20*time.Second), st.Expiry, time.Millisecond)
		assert.Zero(t, st.LockedSince)
		assert.Empty(t, st.Holder)
		assert.Zero(t, st.Attempts)
		assert.Equal(t, 1, u.logins())
	})
}

func TestHandleFollowsItsKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u := new(sessionlock.MemoryCache), &upstream{life: time.Hour}
		c := newClient(t, u, store, sessionlock.WithNearCache(16, time.Minute))
		h := c.For("bob")
		for n := range 3 {
			for range 2 {
				s, err := h.Session(t.Context())
				require.NoError(t, err)
				assert.Equal(t, fmt.Sprintf("bob/%d", 41*n+1), s.Token.Reveal())
			}
			for i := range 40 { // its place is taken by others
				tokenOf(t, c, fmt.Sprint(n, i))
			}
			require.NoError(t, newClient(t, u, store).Logout(t.Context(), "bob"))
			synctest.Wait()
		}
		require.NoError(t, c.Close(t.Context()))
		_, err := h.Session(t.Context())
		require.ErrorIs(t, err, sessionlock.ErrClosed)
	})
}

func TestCallReturnsAResultOrAnError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := &upstream{life: time.Hour}
		c := newClient(t, u, new(sessionlock.MemoryCache))
		orders := func(_ context.Context, s sessionlock.Session) ([]string, error) {
			return []string{s.Token.Reveal()}, rejectOld("bob/1")(nil, s)
		}
		got, err := sessionlock.Call(t.Context(), c.For("bob"), orders)
		require.NoError(t, err)
		assert.Equal(t, []string{"bob/2"}, got)
		n, err := sessionlock.Call(t.Context(), c.For("bob"), func(context.Context, sessionlock.Session) (int, error) { return 7, errDead })
		require.ErrorIs(t, err, errDead)
		assert.Zero(t, n)
		_, err = sessionlock.Call[int](t.Context(), c.For("bob"), nil)
		require.ErrorIs(t, err, sessionlock.ErrInvalid)
		require.ErrorIs(t, c.Do(t.Context(), "bob", nil), sessionlock.ErrInvalid)
	})
}

func TestEveryBadArgumentOfNewIsReported(t *testing.T) {
	var nothing *upstream
	_, err := sessionlock.New(" ", nothing, nil,
		sessionlock.WithLogger(nil), sessionlock.WithLockTTL(0), sessionlock.WithLoginTimeout(25*time.Hour),
		sessionlock.WithLoginBudget(0, time.Minute), sessionlock.WithKeySecret([]byte("short")),
		sessionlock.WithReauthBackoff(time.Minute, time.Second), sessionlock.WithNearCache(-1, 0), sessionlock.WithWait(0, 0))
	require.ErrorIs(t, err, sessionlock.ErrInvalid)
	for _, want := range []string{
		"upstream is blank", "authenticator", "Option is nil", "WithLogger", "WithLockTTL", "WithLoginTimeout",
		"WithLoginBudget", "WithKeySecret", "WithReauthBackoff", "keys is -1", "WithNearCache's age", "attempts is 0", "delay", "no store",
	} {
		assert.Contains(t, err.Error(), want)
	}
}
