package sessionmanager_test

// What was tried against it: callbacks that are slow or end their goroutine, callers
// that leave at the wrong moment, extreme times.

import (
	"context"
	"math"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/internal/redistest"
	"github.com/sessionlock/sessionlock/sessionmanager"
)

type observerFunc func(context.Context, sessionmanager.Event)

func (f observerFunc) Observe(ctx context.Context, e sessionmanager.Event) { f(ctx, e) }

// observed returns a manager whose events of a kind f sees.
func observed(t *testing.T, kind string, f func(), opts ...sessionmanager.Option) *manager {
	t.Helper()
	m, err := sessionmanager.New[*fake](append(opts, sessionmanager.WithObserver(observerFunc(func(_ context.Context, e sessionmanager.Event) {
		if e.Kind == kind {
			f()
		}
	})))...)
	require.NoError(t, err)
	return m
}

func TestCallerThatLeavesASlowObserverLeavesASessionThatCanEnd(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m := observed(t, sessionmanager.EventOpened, func() { time.Sleep(time.Second) })
		w := &fake{}
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		s, err := m.Open(ctx, sessionmanager.Spec{}, starts(w))
		require.NoError(t, err, "it was ready in time")
		assert.Equal(t, sessionmanager.StateReady, s.State())
		require.NoError(t, s.Close(t.Context()))
		shutdowns, kills := w.ledger()
		assert.Equal(t, [...]int{1, 0}, [...]int{shutdowns, kills})
		assert.Zero(t, m.Stats().Sessions)
	})
}

func TestObserverThatEndsItsGoroutineHarmsNobody(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m := observed(t, sessionmanager.EventClosed, runtime.Goexit)
		s := open(t, m, nil)
		begun := time.Now()
		require.NoError(t, s.Close(t.Context()))
		<-s.Done()
		assert.Zero(t, time.Since(begun))
		assert.Zero(t, m.Stats().Sessions)
	})
}

func TestShutdownWaitsUntilTheObserverHasHeard(t *testing.T) {
	bubble(t, func(t *testing.T) {
		told := false
		m := observed(t, sessionmanager.EventClosed, func() { time.Sleep(50 * time.Millisecond); told = true })
		s := open(t, m, nil)
		go s.Close(context.Background())
		synctest.Wait()
		require.NoError(t, m.Shutdown(t.Context()))
		assert.True(t, told)
		<-s.Done()
	})
}

// Whoever counts events never counts more sessions than there may be.
func TestPlaceIsFreeWhenTheObserverHasHeard(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m := observed(t, sessionmanager.EventClosed, func() { time.Sleep(time.Second) }, sessionmanager.WithMax(1))
		s := open(t, m, nil)
		go s.Close(context.Background())
		synctest.Wait()
		_, err := m.Open(t.Context(), sessionmanager.Spec{}, starts(&fake{}))
		require.ErrorIs(t, err, sessionmanager.ErrLimit)
		<-s.Done()
		open(t, m, nil)
	})
}

func TestSweepAtAHugeTimeEnds(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, _ := newManager(t)
		_, _, err := open(t, m, nil).Attach()
		require.NoError(t, err)
		open(t, m, nil)
		n, err := m.Sweep(t.Context(), time.Unix(math.MaxInt64/4, 0))
		require.NoError(t, err)
		assert.Equal(t, 1, n)
	})
}

func TestStreamIsRangedOverOnce(t *testing.T) {
	f, err := sessionmanager.NewFanout[int](4, 0)
	require.NoError(t, err)
	stream := f.Subscribe(t.Context())
	f.Publish(1)
	outer, inner := 0, 0
	for range stream {
		outer++
		for range stream { // it is taken already, and does not wait for its end
			inner++
		}
		break
	}
	assert.Equal(t, [...]int{1, 0}, [...]int{outer, inner})
}

func TestListenerThatLeftItsStreamLeavesNothingWithItsContext(t *testing.T) {
	f, err := sessionmanager.NewFanout[int](4, 0)
	require.NoError(t, err)
	ctx := &counting{Context: t.Context()}
	for range 10 {
		stream := f.Subscribe(ctx)
		f.Publish(1)
		for range stream {
			break
		}
	}
	assert.Zero(t, ctx.held())
}

// counting is a context that counts who waits for its end.
type counting struct {
	context.Context //nolint:containedctx // it is one
	mu              sync.Mutex
	n               int
}

func (c *counting) AfterFunc(func()) (stop func() bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n++
	return func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.n--
		return true
	}
}

func (c *counting) held() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.n
}

func (c *counting) Done() <-chan struct{} { return make(chan struct{}) }

// With a context that does not end: what cannot be ended is told.
func TestShutdownDoesNotWaitForAStartThatNeverReturns(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, _ := newManager(t)
		let := make(chan struct{})
		_, err := m.Open(t.Context(), sessionmanager.Spec{}, func(context.Context, string) (*fake, error) { <-let; return nil, errBroken })
		require.ErrorIs(t, err, sessionmanager.ErrOpen)
		begun := time.Now()
		err = m.Shutdown(context.Background())
		require.ErrorIs(t, err, sessionmanager.ErrClose)
		require.ErrorContains(t, err, "start has not returned")
		assert.Equal(t, 15*time.Second+100*time.Millisecond, time.Since(begun))
		close(let)
		synctest.Wait()
		require.NoError(t, m.Shutdown(context.Background()))
	})
}

func TestOpenAfterShutdownIsRefusedAndNoFault(t *testing.T) {
	m, b := newManager(t)
	require.NoError(t, m.Shutdown(t.Context()))
	_, err := m.Open(t.Context(), sessionmanager.Spec{}, starts(&fake{}))
	require.ErrorIs(t, err, sessionmanager.ErrClosed)
	assert.EqualValues(t, 1, m.Stats().Refused)
	assert.Zero(t, m.Stats().Faulted)
	assert.Len(t, b.of(sessionmanager.EventRefused), 1)
}

func TestLeaseAfterALongCallIsTheLease(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, _ := newManager(t, sessionmanager.WithLease(time.Minute))
		s, err := m.Open(t.Context(), sessionmanager.Spec{Timeout: time.Hour}, starts(&fake{}))
		require.NoError(t, err)
		leave := occupies(t, s, nil)
		time.Sleep(time.Minute)
		require.Zero(t, sweep(t, m))
		require.NoError(t, leave())
		time.Sleep(time.Minute)
		assert.Equal(t, 1, sweep(t, m))
	})
}

func TestCallPastAShortTimeoutEndsNoLease(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, _ := newManager(t)
		s, err := m.Open(t.Context(), sessionmanager.Spec{Timeout: time.Second}, starts(&fake{}))
		require.NoError(t, err)
		leave := occupies(t, s, nil)
		time.Sleep(time.Minute)
		use(t, s)
		require.NoError(t, leave())
	})
}

func TestFaultHasItsGraceWhateverElseEnds(t *testing.T) {
	for name, tt := range map[string]struct {
		idle time.Duration // before the fault
		opts []sessionmanager.Option
		then func(leave func() error, detach func())
		left time.Duration
	}{
		"a listener leaves, without a grace": {0, []sessionmanager.Option{sessionmanager.WithGrace(0)}, func(_ func() error, detach func()) { detach() }, 0},
		"a call ends":                        {0, nil, func(leave func() error, _ func()) { time.Sleep(20 * time.Second); _ = leave() }, 10 * time.Second},
		"after a long time of idleness":      {29 * time.Minute, nil, func(func() error, func()) {}, 30 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				m, _ := newManager(t, tt.opts...)
				w := &fake{}
				s := open(t, m, w)
				leave := sync.OnceValue(occupies(t, s, nil))
				_, detach, err := s.Attach()
				require.NoError(t, err)
				time.Sleep(tt.idle)
				w.breaks(errBroken)
				require.Error(t, do(t.Context(), s))
				tt.then(leave, detach)
				if tt.left > 0 {
					time.Sleep(tt.left - 1)
					assert.Zero(t, sweep(t, m))
					time.Sleep(time.Nanosecond)
				}
				assert.Equal(t, 1, sweep(t, m))
				_ = leave()
			})
		})
	}
}

func TestInfoTellsWhatOperatorsAsk(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, _ := newManager(t)
		let := make(chan struct{})
		go func() {
			_, err := m.Open(t.Context(), sessionmanager.Spec{ID: "7"}, func(context.Context, string) (*fake, error) { <-let; return &fake{}, nil })
			assert.NoError(t, err)
		}()
		registered := time.Now()
		synctest.Wait()
		s, err := m.Get("7", "")
		require.NoError(t, err)
		assert.Equal(t, sessionmanager.Info{State: sessionmanager.StateStarting, Begun: registered}, inUTC(s.Info(), registered))
		time.Sleep(time.Second)
		close(let)
		synctest.Wait()
		ready := time.Now()
		time.Sleep(time.Second)
		use(t, s)
		used := time.Now()
		assert.Equal(t, sessionmanager.Info{State: sessionmanager.StateReady, Begun: ready, Used: used, Ends: used.Add(30 * time.Minute)}, inUTC(s.Info(), ready))
		leave := occupies(t, s, nil)
		_, detach, err := s.Attach()
		require.NoError(t, err)
		assert.Equal(t, sessionmanager.Info{State: sessionmanager.StateReady, Begun: ready, Used: used, Calls: 1, Listeners: 1}, inUTC(s.Info(), ready))
		require.NoError(t, leave())
		detach()
		require.NoError(t, s.Kill(t.Context(), "by order"))
		assert.Equal(t, "by order", s.Info().Reason)
		assert.Equal(t, sessionmanager.StateClosed, s.Info().State)
	})
}

// inUTC gives times that are equal the same representation, of which one is given.
func inUTC(i sessionmanager.Info, like time.Time) sessionmanager.Info {
	for _, at := range []*time.Time{&i.Begun, &i.Used, &i.Ends} {
		if !at.IsZero() {
			*at = like.Add(at.Sub(like))
		}
	}
	return i
}

func TestTakenIDIsToldApart(t *testing.T) {
	m, _ := newManager(t)
	_, err := m.Open(t.Context(), sessionmanager.Spec{ID: "7"}, starts(&fake{}))
	require.NoError(t, err)
	_, err = m.Open(t.Context(), sessionmanager.Spec{ID: "7"}, starts(&fake{}))
	require.ErrorIs(t, err, sessionmanager.ErrTaken)
	require.ErrorIs(t, err, sessionmanager.ErrOpen)
	assert.ErrorContains(t, err, "the id is taken")
}

// SIGTERM ends Run, and requests drain for minutes before Shutdown.
func TestSlotsAreHeldAsLongAsTheirSessionsWhateverRuns(t *testing.T) {
	bubble(t, func(t *testing.T) {
		_, clientOf := redistest.Bubble(t)
		rdb := clientOf()
		m, b := member(t, rdb, 2)
		ctx, stop := context.WithCancel(t.Context())
		go func() { _ = m.Run(ctx) }()
		one := open(t, m, nil)
		open(t, m, nil)
		time.Sleep(time.Minute)
		stop()
		other, _ := member(t, rdb, 2)
		for range 30 {
			time.Sleep(10 * time.Second)
			_, err := other.Open(t.Context(), sessionmanager.Spec{}, starts(&fake{}))
			require.ErrorIs(t, err, sessionmanager.ErrLimit)
		}
		require.NoError(t, one.Close(t.Context()))
		open(t, other, nil)
		assert.Empty(t, b.of(sessionmanager.EventDegraded))
	})
}

func TestSlotTakenAgainWhileItIsGivenBackIsFree(t *testing.T) {
	bubble(t, func(t *testing.T) {
		server, clientOf := redistest.Bubble(t)
		rdb, hooked := clientOf(), clientOf()
		var s *session
		var take atomic.Value // the hash of the script that takes
		var retaken atomic.Int64
		hooked.AddHook(trip{before: func(cmd redis.Cmder) error {
			switch {
			case cmd.Name() != "evalsha":
			case !isRenewal(cmd):
				take.Store(cmd.Args()[1])
			case cmd.Args()[1] == take.Load(): // what was lost is taken again
				retaken.Add(1)
				assert.NoError(t, s.Close(t.Context()))
			}
			return nil
		}})
		m, _ := member(t, hooked, 1)
		s = open(t, m, nil)
		server.FlushAll()
		time.Sleep(15 * time.Second)
		assert.EqualValues(t, 1, retaken.Load())
		assert.Zero(t, m.Stats().Sessions)
		assert.Zero(t, counted(t, rdb))
	})
}

func TestSlotOfACallerWhoLeftIsGivenBackHoweverLateItIsTaken(t *testing.T) {
	bubble(t, func(t *testing.T) {
		_, clientOf := redistest.Bubble(t)
		rdb, slow := clientOf(), clientOf()
		slow.AddHook(trip{before: func(cmd redis.Cmder) error {
			if len(cmd.Args()) > 5 { // on its way for longer than it is given back
				time.Sleep(5 * time.Second)
			}
			return nil
		}})
		m, _ := member(t, slow, 1)
		begun := time.Now()
		_, err := m.Open(t.Context(), sessionmanager.Spec{}, starts(&fake{}))
		require.ErrorIs(t, err, sessionmanager.ErrUnavailable)
		assert.Equal(t, time.Second, time.Since(begun), "one op timeout")
		time.Sleep(6 * time.Second)
		assert.Zero(t, counted(t, rdb), "long before its lease would be over")
	})
}
