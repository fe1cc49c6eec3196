package sessionmanager_test

// Slots of a whole fleet, on miniredis and on a real server.

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
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
	"github.com/sessionlock/sessionlock/sessionmanager"
)

const account = "printers@acme.test"

// member returns a manager of a fleet of n slots.
func member(t testing.TB, rdb redis.UniversalClient, n int, opts ...sessionmanager.Option) (*manager, *books) {
	t.Helper()
	return newManager(t, append([]sessionmanager.Option{
		sessionmanager.WithFleetMax(rdb, account, n), sessionmanager.WithMax(1000),
	}, opts...)...)
}

// names returns the keys there are.
func names(t testing.TB, rdb redis.UniversalClient) []string {
	t.Helper()
	keys, err := rdb.Keys(t.Context(), "*").Result()
	require.NoError(t, err)
	return keys
}

// counted returns how many slots are taken, as Redis has them.
func counted(t testing.TB, rdb redis.UniversalClient) int {
	t.Helper()
	n := 0
	for _, key := range names(t, rdb) {
		n += int(rdb.ZCard(context.WithoutCancel(t.Context()), key).Val())
	}
	return n
}

// runs runs m until the test ends.
func runs(t testing.TB, m *manager) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	over := make(chan struct{})
	go func() {
		defer close(over)
		_ = m.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-over
	})
}

func TestFleetNeverHasMoreSessionsThanItsMax(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		const n = 7
		var now, most, opened atomic.Int64
		var wg sync.WaitGroup
		for range 3 {
			m, b := member(t, rdb, n)
			for range 8 {
				wg.Go(func() {
					for range 20 {
						s, err := m.Open(t.Context(), sessionmanager.Spec{}, func(context.Context, string) (*fake, error) {
							for v := now.Add(1); ; {
								if was := most.Load(); v <= was || most.CompareAndSwap(was, v) {
									break
								}
							}
							return &fake{shutdown: func(context.Context) error { now.Add(-1); return nil }}, nil
						})
						if err != nil {
							assert.ErrorIs(t, err, sessionmanager.ErrLimit)
							continue
						}
						opened.Add(1)
						assert.NoError(t, s.Close(t.Context()))
					}
				})
			}
			t.Cleanup(func() { assert.Empty(t, b.faults()) })
		}
		wg.Wait()
		assert.LessOrEqual(t, most.Load(), int64(n))
		assert.GreaterOrEqual(t, opened.Load(), int64(n))
		assert.Zero(t, counted(t, rdb))
	})
}

func TestFullFleetRefusesAtOnceAndTakesNoSlot(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		one, _ := member(t, rdb, 3)
		two, b := member(t, rdb, 3)
		a, _, _ := open(t, one, nil), open(t, two, nil), open(t, two, nil)
		for range 5 {
			_, err := two.Open(t.Context(), sessionmanager.Spec{}, func(context.Context, string) (*fake, error) {
				assert.Fail(t, "started")
				return &fake{}, nil
			})
			require.ErrorIs(t, err, sessionmanager.ErrLimit)
			assert.NotErrorIs(t, err, sessionmanager.ErrOpen)
			assert.ErrorContains(t, err, "3 in the fleet")
		}
		assert.Equal(t, 3, counted(t, rdb))
		assert.Equal(t, sessionmanager.Stats{Sessions: 2, Open: 2, Opened: 2, Refused: 5}, two.Stats())
		assert.Empty(t, b.faults())
		require.NoError(t, a.Close(t.Context()))
		open(t, two, nil)

		for key := range maps(names(t, rdb)) {
			assert.Regexp(t, `^sl:\{[A-Za-z0-9_-]{24}\}:s$`, key)
			assert.NotContains(t, key, one.LogID(account), "hashes of sessions and accounts are apart")
			assert.InDelta(t, 30, rdb.PTTL(t.Context(), key).Val().Seconds(), 5)
		}
	})
}

func maps(list []string) map[string]bool {
	out := map[string]bool{}
	for _, v := range list {
		out[v] = true
	}
	return out
}

func TestSlotsAreApartWhereAnythingDiffers(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		for i, opts := range [][]sessionmanager.Option{
			{},
			{sessionmanager.WithFleetMax(rdb, account+".", 1)},
			{sessionmanager.WithNamespace("staging")},
			{sessionmanager.WithKeySecret([]byte("a secret of the fleet"))},
		} {
			for range 2 {
				m, _ := member(t, rdb, 1, opts...)
				_, err := m.Open(t.Context(), sessionmanager.Spec{ID: "same"}, starts(&fake{}))
				assert.Len(t, names(t, rdb), i+1)
				if err != nil {
					require.ErrorIs(t, err, sessionmanager.ErrLimit, "the second of the same kind")
				}
			}
		}
	})
}

func TestSlotIsGivenBackHoweverASessionEnds(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		m, _ := member(t, rdb, 2)
		for name, end := range map[string]func() error{
			"close": func() error { return open(t, m, nil).Close(t.Context()) },
			"a close that fails": func() error {
				return open(t, m, &fake{shutdown: func(context.Context) error { return errBroken }}).Close(t.Context())
			},
			"kill": func() error { return open(t, m, nil).Kill(t.Context(), "admin") },
			"a start that fails": func() error {
				return second(m.Open(t.Context(), sessionmanager.Spec{}, func(context.Context, string) (*fake, error) { return nil, errFn }))
			},
			"a caller that leaves": func() error {
				ctx, cancel := context.WithCancel(t.Context())
				return second(m.Open(ctx, sessionmanager.Spec{}, func(context.Context, string) (*fake, error) {
					cancel()
					return nil, errFn
				}))
			},
			"a start that panics": func() error {
				return second(m.Open(t.Context(), sessionmanager.Spec{}, func(context.Context, string) (*fake, error) { panic("x") }))
			},
			"sweep": func() error { open(t, m, nil); return second(m.Sweep(t.Context(), time.Now().Add(time.Hour))) },
		} {
			_ = end()
			assert.Zero(t, counted(t, rdb), name)
		}
		open(t, m, nil)
		open(t, m, nil)
		require.NoError(t, m.Shutdown(t.Context()))
		assert.Zero(t, counted(t, rdb))
	})
}

// unrenewed returns a client through which no slot is renewed, as after the death of
// its process.
func unrenewed(t testing.TB, rdb *redis.Client) *redis.Client {
	t.Helper()
	c := redis.NewClient(rdb.Options())
	t.Cleanup(func() { _ = c.Close() })
	c.AddHook(trip{before: unrenewedOnes})
	return c
}

func unrenewedOnes(cmd redis.Cmder) error {
	if isRenewal(cmd) {
		return io.ErrUnexpectedEOF
	}
	return nil
}

func TestSlotsOfADeadProcessAreFreeAfterTheirTTL(t *testing.T) {
	t.Parallel()
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		short := []sessionmanager.Option{sessionmanager.WithSlotTTL(3 * time.Second)}
		dead, _ := member(t, unrenewed(t, rdb), 2, short...)
		alive, _ := member(t, rdb, 2, short...)
		runs(t, alive)
		open(t, dead, nil)
		open(t, alive, nil)
		_, err := alive.Open(t.Context(), sessionmanager.Spec{}, starts(&fake{}))
		require.ErrorIs(t, err, sessionmanager.ErrLimit)
		require.Eventually(t, func() bool {
			_, err := alive.Open(t.Context(), sessionmanager.Spec{}, starts(&fake{}))
			return err == nil
		}, 30*time.Second, 50*time.Millisecond)
		other, _ := member(t, rdb, 2, short...)
		for begun := time.Now(); time.Since(begun) < 4*time.Second; time.Sleep(100 * time.Millisecond) {
			_, err := other.Open(t.Context(), sessionmanager.Spec{}, starts(&fake{}))
			require.ErrorIs(t, err, sessionmanager.ErrLimit, "those of a process that runs are not")
		}
	})
}

// All of it under a fake clock: how long exactly.
func TestLifeOfASlot(t *testing.T) {
	bubble(t, func(t *testing.T) {
		_, clientOf := redistest.Bubble(t)
		rdb := clientOf()
		gone := clientOf()
		gone.AddHook(trip{before: unrenewedOnes})
		dead, _ := member(t, gone, 1)
		open(t, dead, nil)
		m, _ := member(t, rdb, 1)
		refused := func() {
			t.Helper()
			_, err := m.Open(t.Context(), sessionmanager.Spec{}, starts(&fake{}))
			require.ErrorIs(t, err, sessionmanager.ErrLimit)
		}
		time.Sleep(30*time.Second - time.Millisecond)
		refused()
		time.Sleep(2 * time.Millisecond)
		s := open(t, m, nil)
		runs(t, m)
		m = dead
		for range 20 {
			time.Sleep(29 * time.Second)
			refused()
		}
		require.NoError(t, s.Close(t.Context()))
		open(t, m, nil)
	})
}

// A process that was cut off, or a store that forgot: the sessions live, so they count.
func TestLostSlotsAreTakenAgain(t *testing.T) {
	bubble(t, func(t *testing.T) {
		server, clientOf := redistest.Bubble(t)
		rdb := clientOf()
		m, b := member(t, rdb, 2)
		runs(t, m)
		one := open(t, m, nil)
		open(t, m, nil)
		server.FlushAll()
		other, _ := member(t, rdb, 2)
		late := open(t, other, nil) // nobody knows better
		time.Sleep(11 * time.Second)
		assert.Equal(t, 3, counted(t, rdb), "more than there are, for as long as they live")
		told := b.of(sessionmanager.EventDegraded)
		require.Len(t, told, 1)
		assert.ErrorContains(t, told[0].Err, "2 were lost")
		assert.Equal(t, sessionmanager.CodeUnavailable, told[0].Code)
		require.NoError(t, one.Close(t.Context()))
		_, err := other.Open(t.Context(), sessionmanager.Spec{}, starts(&fake{}))
		require.ErrorIs(t, err, sessionmanager.ErrLimit)
		require.NoError(t, late.Close(t.Context()))
		open(t, other, nil)
		time.Sleep(time.Minute)
		assert.Len(t, b.of(sessionmanager.EventDegraded), 1)
	})
}

// isRenewal reports whether a command renews slots.
func isRenewal(cmd redis.Cmder) bool {
	args := cmd.Args() // eval or evalsha, script or hash, 1, key, life, limit, slots
	return strings.HasPrefix(cmd.Name(), "eval") && len(args) > 5 && args[5] == 0
}

func TestFailedRenewalIsToldAndTriedAgain(t *testing.T) {
	bubble(t, func(t *testing.T) {
		_, clientOf := redistest.Bubble(t)
		rdb, faulty := clientOf(), clientOf()
		fails := 1 // a second one in a row would cost the slot
		faulty.AddHook(trip{before: func(cmd redis.Cmder) error {
			if isRenewal(cmd) && fails > 0 {
				fails--
				return io.ErrUnexpectedEOF
			}
			return nil
		}})
		var log bytes.Buffer
		m, b := member(t, faulty, 1, sessionmanager.WithLogger(slog.New(slog.NewTextHandler(&log, nil))))
		runs(t, m)
		open(t, m, nil)
		time.Sleep(time.Minute)
		synctest.Wait()
		assert.Equal(t, 1, counted(t, rdb))
		told := b.of(sessionmanager.EventDegraded)
		require.Len(t, told, 1)
		require.ErrorIs(t, told[0].Err, io.ErrUnexpectedEOF)
		assert.Contains(t, log.String(), `level=WARN msg="sessionmanager: degraded" open=1 code=unavailable error="sessionmanager: renew slots: failed`)
	})
}

// A session that ends while its slot is renewed leaves none behind.
func TestSlotThatIsGivenBackDuringItsRenewalIsGone(t *testing.T) {
	bubble(t, func(t *testing.T) {
		server, clientOf := redistest.Bubble(t)
		rdb, hooked := clientOf(), clientOf()
		var s *session
		hooked.AddHook(trip{after: func(cmd redis.Cmder) error {
			if isRenewal(cmd) {
				assert.NoError(t, s.Close(t.Context()))
			}
			return nil
		}})
		m, b := member(t, hooked, 1)
		runs(t, m)
		s = open(t, m, nil)
		server.FlushAll() // so that it is found to be lost
		time.Sleep(15 * time.Second)
		assert.Zero(t, m.Stats().Sessions)
		assert.Zero(t, counted(t, rdb))
		assert.Empty(t, b.of(sessionmanager.EventDegraded))
	})
}

// Worst of all: a worker that cannot be killed, and a store that does not answer.
func TestExpiredShutdownWaitsForSlotsToo(t *testing.T) {
	bubble(t, func(t *testing.T) {
		_, clientOf := redistest.Bubble(t)
		rdb := clientOf()
		rdb.AddHook(trip{before: func(cmd redis.Cmder) error {
			if cmd.Name() == "zrem" {
				time.Sleep(time.Minute)
			}
			return nil
		}})
		m, _ := member(t, rdb, 1)
		open(t, m, &fake{kill: func(string) error { time.Sleep(time.Hour); return nil }})
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		begun := time.Now()
		err := m.Shutdown(ctx)
		require.ErrorIs(t, err, sessionmanager.ErrClose)
		assert.NotContains(t, err.Error(), "start has not returned")
		assert.Equal(t, 6*time.Second, time.Since(begun))
	})
}

// A slow shutdown keeps its slots to the end, though Run has ended.
func TestShutdownRenewsTheSlots(t *testing.T) {
	bubble(t, func(t *testing.T) {
		_, clientOf := redistest.Bubble(t)
		rdb := clientOf()
		m, _ := member(t, rdb, 1, sessionmanager.WithShutdownTimeout(10*time.Minute))
		open(t, m, &fake{shutdown: stubborn(5*time.Minute, nil)})
		over := make(chan error, 1)
		go func() { over <- m.Shutdown(t.Context()) }()
		other, _ := member(t, rdb, 1)
		for range 4 {
			time.Sleep(time.Minute)
			_, err := other.Open(t.Context(), sessionmanager.Spec{}, starts(&fake{}))
			require.ErrorIs(t, err, sessionmanager.ErrLimit)
		}
		require.NoError(t, <-over)
		open(t, other, nil)
	})
}

func TestMoreSlotsThanOneCallRenews(t *testing.T) {
	bubble(t, func(t *testing.T) {
		_, clientOf := redistest.Bubble(t)
		rdb := clientOf()
		m, _ := member(t, rdb, 510)
		runs(t, m)
		for range 510 {
			open(t, m, nil)
		}
		time.Sleep(5 * time.Minute)
		assert.Equal(t, 510, counted(t, rdb))
		other, _ := member(t, rdb, 510)
		_, err := other.Open(t.Context(), sessionmanager.Spec{}, starts(&fake{}))
		require.ErrorIs(t, err, sessionmanager.ErrLimit)
	})
}

// trip is what befalls a command: before it runs, after it ran well, or that it runs
// twice.
type trip struct {
	twice         bool
	before, after func(cmd redis.Cmder) error
}

func (h trip) DialHook(next redis.DialHook) redis.DialHook { return next }

func (h trip) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

func (h trip) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		if h.before != nil {
			if err := h.before(cmd); err != nil {
				cmd.SetErr(err)
				return err
			}
		}
		if h.twice {
			_ = next(ctx, cmd)
		}
		err := next(ctx, cmd)
		if h.after != nil && err == nil {
			if lost := h.after(cmd); lost != nil {
				err = lost
				cmd.SetErr(err)
			}
		}
		return err
	}
}

// go-redis sends a command again whose reply was lost.
func TestEveryCommandSentTwiceChangesNothing(t *testing.T) {
	t.Parallel()
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		twice := redis.NewClient(rdb.Options())
		defer twice.Close()
		twice.AddHook(trip{twice: true})
		m, b := member(t, twice, 3, sessionmanager.WithSlotTTL(3*time.Second))
		runs(t, m)
		var all []*session
		for range 3 {
			all = append(all, open(t, m, nil))
		}
		assert.Equal(t, 3, counted(t, rdb))
		_, err := m.Open(t.Context(), sessionmanager.Spec{}, starts(&fake{}))
		require.ErrorIs(t, err, sessionmanager.ErrLimit)
		time.Sleep(1500 * time.Millisecond) // through a renewal; that it is enough does not matter
		assert.Equal(t, 3, counted(t, rdb))
		for _, s := range all {
			require.NoError(t, s.Close(t.Context()))
		}
		assert.Zero(t, counted(t, rdb))
		assert.Empty(t, b.faults())
	})
}

func TestSlotWhoseReplyWasLostIsGivenBack(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		var executed atomic.Int64
		loses := redis.NewClient(rdb.Options())
		defer loses.Close()
		loses.AddHook(trip{after: func(cmd redis.Cmder) error {
			if cmd.Name() == "evalsha" || cmd.Name() == "eval" {
				executed.Add(1)
				return io.ErrUnexpectedEOF
			}
			return nil
		}})
		m, b := member(t, loses, 3)
		for range 5 {
			_, err := m.Open(t.Context(), sessionmanager.Spec{}, starts(&fake{}))
			require.ErrorIs(t, err, sessionmanager.ErrUnavailable)
			require.ErrorIs(t, err, io.ErrUnexpectedEOF)
			assert.NotErrorIs(t, err, sessionmanager.ErrLimit)
		}
		assert.EqualValues(t, 5, executed.Load())
		require.Eventually(t, func() bool { return counted(t, rdb) == 0 }, 10*time.Second, time.Millisecond)
		assert.Equal(t, sessionmanager.Stats{Faulted: 5}, m.Stats())
		assert.Equal(t, sessionmanager.CodeUnavailable, b.faults()[0])
	})
}

// A dead or silent store refuses what is new, in time, and disturbs nothing else.
func TestOutageOfTheStoreIsFeltByOpenOnly(t *testing.T) {
	t.Parallel()
	for name, breaks := range map[string]func(s *redistest.Server){
		"dead":   (*redistest.Server).Stop,
		"silent": (*redistest.Server).Pause,
	} {
		t.Run(name, func(t *testing.T) {
			srv := redistest.Start(t)
			m, b := member(t, srv.Client(), 5, sessionmanager.WithOpTimeout(200*time.Millisecond))
			s, w := open(t, m, nil), &fake{}
			other := open(t, m, w)
			breaks(srv)
			if name == "silent" {
				defer srv.Resume()
			}
			begun := time.Now()
			_, err := m.Open(t.Context(), sessionmanager.Spec{}, starts(&fake{}))
			require.ErrorIs(t, err, sessionmanager.ErrUnavailable)
			assert.Less(t, time.Since(begun), 10*time.Second)
			use(t, s)
			require.NoError(t, other.Close(t.Context()), "the worker has ended well")
			shutdowns, _ := w.ledger()
			assert.Equal(t, 1, shutdowns)
			assert.NotEmpty(t, b.of(sessionmanager.EventDegraded), "that a slot could not be given back")
			assert.Equal(t, 1, m.Stats().Sessions)
		})
	}
}

func TestCallerThatLeavesWhileASlotIsTakenLeavesNone(t *testing.T) {
	bubble(t, func(t *testing.T) {
		_, clientOf := redistest.Bubble(t)
		rdb, slow := clientOf(), clientOf()
		slow.AddHook(trip{before: func(cmd redis.Cmder) error {
			if cmd.Name() == "evalsha" || cmd.Name() == "eval" {
				time.Sleep(300 * time.Millisecond)
			}
			return nil
		}})
		m, b := member(t, slow, 1)
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		begun := time.Now()
		_, err := m.Open(ctx, sessionmanager.Spec{}, starts(&fake{}))
		require.ErrorIs(t, err, context.DeadlineExceeded)
		assert.LessOrEqual(t, time.Since(begun), 200*time.Millisecond)
		synctest.Wait()
		assert.Zero(t, m.Stats().Sessions)
		assert.Len(t, b.faults(), 1)
		time.Sleep(31 * time.Second) // had it been taken after all
		assert.Zero(t, counted(t, rdb))
		_, err = m.Open(t.Context(), sessionmanager.Spec{}, starts(&fake{}))
		require.NoError(t, err)
	})
}

// What the text of an outage says is ours, or the server's.
func TestErrorsOfTheStoreQuoteNoReply(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		m, _ := member(t, rdb, 1)
		open(t, m, nil)
		key := names(t, rdb)[0]
		require.NoError(t, rdb.Set(t.Context(), key, "hunter2", 0).Err())
		_, err := m.Open(t.Context(), sessionmanager.Spec{}, starts(&fake{}))
		require.ErrorIs(t, err, sessionmanager.ErrUnavailable)
		assert.ErrorContains(t, err, "WRONGTYPE")
		assert.NotContains(t, err.Error(), "hunter2")
		assert.NotContains(t, err.Error(), account)
		assert.Equal(t, "hunter2", rdb.Get(t.Context(), key).Val(), "nothing is deleted")

		garbled := redis.NewClient(rdb.Options())
		defer garbled.Close()
		garbled.AddHook(trip{before: func(redis.Cmder) error { return errors.New("redis: can't parse hunter2") }})
		m, _ = member(t, garbled, 1)
		_, err = m.Open(t.Context(), sessionmanager.Spec{}, starts(&fake{}))
		require.ErrorIs(t, err, sessionmanager.ErrUnavailable)
		assert.NotContains(t, err.Error(), "hunter2")
	})
}

func TestScriptsAreSentAgainToAServerThatForgotThem(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		m, _ := member(t, rdb, 3)
		open(t, m, nil)
		require.NoError(t, rdb.ScriptFlush(t.Context()).Err())
		open(t, m, nil)
		assert.Equal(t, 2, counted(t, rdb))
	})
}

// The commands that WithFleetMax names are all it takes, and none is too many.
func TestLeastRightsForSlots(t *testing.T) {
	t.Parallel()
	srv := redistest.StartACL(t)
	all := []string{"eval", "evalsha", "pexpire", "pttl", "time", "zadd", "zcard", "zrem", "zremrangebyscore", "zscore"}
	attempt := func(user string) error {
		b := &books{}
		rdb := srv.Client(func(o *redis.Options) { o.Username = user })
		m, err := sessionmanager.New[*fake](sessionmanager.WithFleetMax(rdb, account+user, 1), sessionmanager.WithObserver(b),
			sessionmanager.WithSlotTTL(3*time.Second), sessionmanager.WithOpTimeout(time.Second))
		require.NoError(t, err)
		s, err := m.Open(t.Context(), sessionmanager.Spec{}, starts(&fake{}))
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
		defer cancel()
		_ = m.Run(ctx) // through a renewal
		require.NoError(t, s.Close(t.Context()))
		for _, e := range b.of(sessionmanager.EventDegraded) {
			err = errors.Join(err, e.Err)
		}
		return err
	}
	without := func(missing string) {
		user := "without-" + missing
		srv.Grant(user, slices.DeleteFunc(slices.Clone(all), func(c string) bool { return c == missing })...)
		assert.Error(t, attempt(user), user)
	}
	without("eval") // before the server knows the scripts
	srv.Grant("all", all...)
	require.NoError(t, attempt("all"))
	var wg sync.WaitGroup
	for _, missing := range all[1:] {
		wg.Go(func() { without(missing) })
	}
	wg.Wait()
}

func TestSlotsOnACluster(t *testing.T) {
	t.Parallel()
	node := redistest.StartCluster(t).Owner("any").Addr()
	client := func() *redis.ClusterClient {
		rdb := redis.NewClusterClient(&redis.ClusterOptions{Addrs: []string{node}})
		t.Cleanup(func() { _ = rdb.Close() })
		return rdb
	}
	one, _ := clusterMember(t, client())
	two, _ := clusterMember(t, client())
	runs(t, one)
	require.Eventually(t, func() bool {
		_, err := one.Open(t.Context(), sessionmanager.Spec{}, starts(&fake{}))
		return err == nil
	}, 30*time.Second, 50*time.Millisecond)
	s := open(t, two, nil)
	_, err := one.Open(t.Context(), sessionmanager.Spec{}, starts(&fake{}))
	require.ErrorIs(t, err, sessionmanager.ErrLimit)
	require.NoError(t, s.Close(t.Context()))
	open(t, one, nil)
}

func clusterMember(t *testing.T, rdb redis.UniversalClient) (*manager, *books) {
	t.Helper()
	return member(t, rdb, 2, sessionmanager.WithOpTimeout(5*time.Second))
}

// hangsUp has the test close connections that go-redis forgot: it does so when who
// wanted one left while it was dialled.
func hangsUp(t *testing.T, server *miniredis.Miniredis) func(*redis.Options) {
	var mu sync.Mutex
	var all []net.Conn
	t.Cleanup(func() {
		mu.Lock()
		defer mu.Unlock()
		for _, c := range all {
			_ = c.Close()
		}
	})
	return func(o *redis.Options) {
		o.Dialer = func(context.Context, string, string) (net.Conn, error) {
			c, err := redistest.Dial(server)
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				all = append(all, c)
			}
			return c, err
		}
	}
}

// The random histories again, with a store that loses requests and replies. It
// counts every session that lives, unless the store lost its slot, and nothing
// once its leases are over.
func TestSlotsBalanceInRandomHistoriesWithAFaultyStore(t *testing.T) {
	for i, seed := range seeds(t, 10) {
		t.Run(strconv.Itoa(i), func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				server, clientOf := redistest.Bubble(t)
				rdb, faulty := clientOf(), clientOf(hangsUp(t, server))
				var mu sync.Mutex
				rnd := rand.New(rand.NewPCG(seed, 1))
				drawn := func(redis.Cmder) error {
					mu.Lock()
					n := rnd.IntN(30)
					mu.Unlock()
					switch n {
					case 0, 1:
						return io.ErrUnexpectedEOF
					case 2:
						time.Sleep(3 * time.Second)
					}
					return nil
				}
				faulty.AddHook(trip{before: drawn, after: drawn})
				h := lives(t, seed, 1000, true, sessionmanager.WithFleetMax(faulty, account, 5))
				time.Sleep(time.Minute)
				if n := counted(t, rdb); n != 0 {
					h.fatalf("%d slots are left", n)
				}
			})
		})
	}
}
