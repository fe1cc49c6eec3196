package sessionmanager_test

// The numbered cases of the gateway whose behaviour this package covers, and what
// else a caller may rely on.

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"weak"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/sessionmanager"
)

func TestSessionIsRegisteredBeforeItsStartAndReadyAfterIt(t *testing.T) {
	m, b := newManager(t, sessionmanager.WithMax(1))
	s, err := m.Open(t.Context(), sessionmanager.Spec{Owner: "ann"}, func(ctx context.Context, id string) (*fake, error) {
		s, err := m.Get(id, "ann")
		require.NoError(t, err)
		assert.Equal(t, sessionmanager.StateStarting, s.State())
		assert.ErrorIs(t, do(ctx, s), sessionmanager.ErrNotReady)
		assert.Equal(t, sessionmanager.Stats{Sessions: 1, Opened: 0}, m.Stats(), "it has its slot, and is not open yet")
		return &fake{}, nil
	})
	require.NoError(t, err)
	assert.Equal(t, sessionmanager.StateReady, s.State())
	assert.Equal(t, sessionmanager.Stats{Sessions: 1, Open: 1, Opened: 1}, m.Stats())
	assert.Equal(t, 1, b.gauge())
	got, err := m.Get(s.ID(), "ann")
	require.NoError(t, err)
	assert.Same(t, s, got)
	assert.Equal(t, "ann", s.Owner())
}

func TestFullManagerRefusesAtOnce(t *testing.T) {
	m, b := newManager(t, sessionmanager.WithMax(2))
	first := open(t, m, nil)
	open(t, m, nil)
	started := false
	for range 3 {
		_, err := m.Open(t.Context(), sessionmanager.Spec{}, func(context.Context, string) (*fake, error) {
			started = true
			return &fake{}, nil
		})
		require.ErrorIs(t, err, sessionmanager.ErrLimit)
		assert.NotErrorIs(t, err, sessionmanager.ErrOpen)
		assert.Equal(t, sessionmanager.CodeLimit, code(err))
	}
	assert.False(t, started)
	assert.Empty(t, b.faults())
	assert.Equal(t, sessionmanager.Stats{Sessions: 2, Open: 2, Opened: 2, Refused: 3}, m.Stats())
	require.NoError(t, first.Close(t.Context()))
	open(t, m, nil)
	assert.Equal(t, 2, m.Stats().Sessions)
}

func TestFailedStartLeavesNothing(t *testing.T) {
	cause := errors.New("no such printer, says https://user:hunter2@api.acme.test")
	for name, tt := range map[string]struct {
		start func(w *fake) (*fake, error)
		is    func(t *testing.T, err error)
		kills int
	}{
		"an error": {start: func(*fake) (*fake, error) { return nil, cause }, is: func(t *testing.T, err error) {
			assert.ErrorIs(t, err, cause)
		}},
		"an error and a worker": {start: func(w *fake) (*fake, error) { return w, cause }, kills: 1, is: func(t *testing.T, err error) {
			assert.ErrorIs(t, err, cause)
		}},
		"no worker": {start: func(*fake) (*fake, error) { return nil, nil }, is: func(t *testing.T, err error) {
			assert.ErrorContains(t, err, "no worker")
		}},
		"a panic": {start: func(*fake) (*fake, error) { panic("hunter2") }, is: func(t *testing.T, err error) {
			var p *sessionmanager.PanicError
			require.ErrorAs(t, err, &p)
			assert.Equal(t, "hunter2", p.Value)
			assert.Contains(t, string(p.Stack), "manager_test.go")
		}},
		"the end of its goroutine": {start: func(*fake) (*fake, error) { exit(); return nil, nil }, is: func(t *testing.T, err error) {
			var p *sessionmanager.PanicError
			require.ErrorAs(t, err, &p)
			assert.Nil(t, p.Value)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			m, b := newManager(t, sessionmanager.WithMax(1))
			var id string
			w := &fake{kill: func(string) error {
				s, err := m.Get(id, "")
				assert.NoError(t, err)
				assert.Equal(t, sessionmanager.StateFaulted, s.State(), "and keeps its slot until its worker has ended")
				assert.ErrorIs(t, s.Err(), sessionmanager.ErrOpen)
				return nil
			}}
			_, err := m.Open(t.Context(), sessionmanager.Spec{Name: "bob"}, func(_ context.Context, got string) (*fake, error) {
				id = got
				return tt.start(w)
			})
			require.ErrorIs(t, err, sessionmanager.ErrOpen)
			tt.is(t, err)
			assert.NotContains(t, err.Error(), "hunter2")
			assert.Contains(t, err.Error(), "open bob-"+m.LogID(id))
			assert.Equal(t, sessionmanager.Stats{Faulted: 1}, m.Stats())
			assert.Equal(t, []sessionmanager.Code{sessionmanager.CodeOpenFailed}, b.faults())
			assert.Empty(t, b.of(sessionmanager.EventOpened))
			_, err = m.Get(id, "")
			require.ErrorIs(t, err, sessionmanager.ErrNotFound)
			shutdowns, kills := w.ledger()
			assert.Equal(t, [...]int{0, tt.kills}, [...]int{shutdowns, kills})
			if kills > 0 {
				assert.Equal(t, sessionmanager.ReasonNotOpen, w.lastReason())
			}
			open(t, m, nil) // the slot is back
		})
	}
}

// An open that is overtaken once it is ready is opened and closed in the books.
func TestGaugeIsBackWhenAnOpenFailsAfterItWasCounted(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var m *manager
		b := &books{}
		closes := observer(func(e sessionmanager.Event) {
			b.Observe(t.Context(), e)
			if e.Kind == sessionmanager.EventOpened {
				assert.Equal(t, 1, e.Open)
				for s := range m.All() {
					go func() { assert.NoError(t, s.Close(t.Context())) }()
				}
				synctest.Wait()
				panic("and the observer fails, too")
			}
		})
		m, err := sessionmanager.New[*fake](sessionmanager.WithObserver(closes))
		require.NoError(t, err)
		s, err := m.Open(t.Context(), sessionmanager.Spec{}, starts(&fake{}))
		require.NoError(t, err)
		<-s.Done()
		assert.Equal(t, sessionmanager.Stats{Opened: 1, Closed: 1}, m.Stats())
		assert.Zero(t, b.gauge())
		balanced(t, m, b)
	})
}

type observer func(sessionmanager.Event)

func (o observer) Observe(_ context.Context, e sessionmanager.Event) { o(e) }

func TestBlankFieldsOfASpecAreDefaults(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, _ := newManager(t, sessionmanager.WithCallTimeout(7*time.Second))
		for _, spec := range []sessionmanager.Spec{{}, {Name: "  "}, {Timeout: -1}, {Timeout: -time.Hour}} {
			s, err := m.Open(t.Context(), spec, starts(&fake{}))
			require.NoError(t, err)
			assert.Equal(t, "client-"+m.LogID(s.ID()), s.Name())
			begun := time.Now()
			require.ErrorIs(t, s.Do(t.Context(), func(ctx context.Context, _ *fake) error { return untilDone(ctx) }), context.DeadlineExceeded)
			assert.Equal(t, 7*time.Second, time.Since(begun))
		}
		s, err := m.Open(t.Context(), sessionmanager.Spec{ID: "matsb-1", Name: " bob ", Timeout: time.Second}, starts(&fake{}))
		require.NoError(t, err)
		assert.Equal(t, "matsb-1", s.ID())
		assert.Equal(t, "bob-"+m.LogID("matsb-1"), s.Name())
		begun := time.Now()
		require.Error(t, s.Do(t.Context(), func(ctx context.Context, _ *fake) error { return untilDone(ctx) }))
		assert.Equal(t, time.Second, time.Since(begun))
	})
}

func TestIDsAreUniqueAndTellWhatTheyAre(t *testing.T) {
	m, _ := newManager(t, sessionmanager.WithMax(1000))
	seen := map[string]bool{}
	for range 1000 {
		s, err := m.Open(t.Context(), sessionmanager.Spec{}, func(_ context.Context, id string) (*fake, error) {
			assert.Regexp(t, `^session-[0-9a-f]{32}$`, id)
			assert.False(t, seen[id])
			seen[id] = true
			return &fake{}, nil
		})
		require.NoError(t, err)
		assert.True(t, seen[s.ID()], "start is told the id")
	}
}

func TestUnknownSessionIsNotFoundAtOnce(t *testing.T) {
	m, _ := newManager(t)
	s := open(t, m, nil)
	for _, id := range []string{"", "session-0", s.ID() + " ", strings.ToUpper(s.ID())} {
		_, err := m.Get(id, "ann")
		require.ErrorIs(t, err, sessionmanager.ErrNotFound)
		assert.Equal(t, sessionmanager.CodeNotFound, code(err))
		assert.Contains(t, err.Error(), m.LogID(id))
		if id != "" {
			assert.NotContains(t, err.Error(), id, "ids are hashed in texts")
		}
	}
}

// Nobody learns whether a session exists that is not his.
func TestSomebodyElsesSessionIsNotFound(t *testing.T) {
	m, _ := newManager(t)
	s := open(t, m, nil)
	_, stranger := m.Get(s.ID(), "mallory")
	_, nobody := m.Get(s.ID(), "")
	require.ErrorIs(t, stranger, sessionmanager.ErrNotFound)
	assert.Equal(t, stranger, nobody)
	require.NoError(t, s.Close(t.Context()))
	_, gone := m.Get(s.ID(), "mallory")
	assert.Equal(t, stranger, gone)
}

func TestCallsAreLetInWhileReadyOnly(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, _ := newManager(t)
		release := make(chan struct{})
		w := &fake{shutdown: func(context.Context) error { <-release; return nil }}
		refused := func(s *session, state string) {
			t.Helper()
			_, _, err := s.Attach()
			for _, err := range []error{do(t.Context(), s), err} {
				require.ErrorIs(t, err, sessionmanager.ErrNotReady)
				assert.Contains(t, err.Error(), "session "+state)
			}
		}
		s, err := m.Open(t.Context(), sessionmanager.Spec{}, func(_ context.Context, id string) (*fake, error) {
			s, err := m.Get(id, "")
			require.NoError(t, err)
			refused(s, "starting, worker not started")
			return w, nil
		})
		require.NoError(t, err)
		use(t, s)
		go func() { _ = s.Close(t.Context()) }()
		synctest.Wait()
		refused(s, "closing, worker ending")
		close(release)
		<-s.Done()
		refused(s, "closed")
	})
}

func TestBrokenWorkerIsToldWithBothStates(t *testing.T) {
	m, b := newManager(t)
	w := &fake{}
	s := open(t, m, w)
	w.breaks(errBroken)
	ran := false
	err := s.Do(t.Context(), func(context.Context, *fake) error { ran = true; return nil })
	require.ErrorIs(t, err, sessionmanager.ErrNotReady)
	require.ErrorIs(t, err, errBroken)
	assert.Contains(t, err.Error(), "session ready, worker broken")
	assert.NotContains(t, err.Error(), "hunter2")
	assert.False(t, ran)
	assert.Equal(t, sessionmanager.StateFaulted, s.State())
	require.ErrorIs(t, s.Err(), errBroken)
	require.ErrorIs(t, s.Err(), sessionmanager.ErrFaulted)
	assert.Contains(t, do(t.Context(), s).Error(), "session faulted")
	assert.Equal(t, []sessionmanager.Code{sessionmanager.CodeFaulted}, b.faults(), "once")

	w = &fake{}
	s = open(t, m, w)
	w.breaks(errBroken)
	_, _, err = s.Attach()
	assert.ErrorContains(t, err, "session ready, worker broken")
	assert.Equal(t, sessionmanager.StateFaulted, s.State())

	s = open(t, m, &fake{state: func() error { panic("hunter2") }})
	err = do(t.Context(), s)
	require.ErrorIs(t, err, sessionmanager.ErrNotReady)
	assert.NotContains(t, err.Error(), "hunter2")
	assert.Equal(t, sessionmanager.StateFaulted, s.State())
}

func TestErrorOfACallIsReturnedAsItIs(t *testing.T) {
	m, b := newManager(t)
	w := &fake{}
	s := open(t, m, w)
	assert.Same(t, errFn, s.Do(t.Context(), func(context.Context, *fake) error { return errFn }))
	assert.Equal(t, sessionmanager.StateReady, s.State(), "the worker is well")
	assert.NoError(t, s.Err())
	assert.Same(t, errFn, s.Do(t.Context(), func(_ context.Context, w *fake) error {
		w.breaks(errBroken)
		return errFn
	}))
	assert.Equal(t, sessionmanager.StateFaulted, s.State())

	w = &fake{}
	well := open(t, m, w)
	require.NoError(t, well.Do(t.Context(), func(_ context.Context, w *fake) error { w.breaks(errBroken); return nil }))
	assert.Equal(t, sessionmanager.StateReady, well.State(), "nobody asks after a success")
	require.NoError(t, well.Close(t.Context()))
	assert.Equal(t, 1, m.Stats().Open, "it stays registered")
	got, err := m.Get(s.ID(), "ann")
	require.NoError(t, err)
	assert.Same(t, s, got)
	assert.Equal(t, []sessionmanager.Code{sessionmanager.CodeFaulted}, b.faults())
}

func TestFaultedGoesToClosedOnlyAndClosedNowhere(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, b := newManager(t)
		w := &fake{kill: func(string) error { time.Sleep(time.Second); return nil }}
		s := open(t, m, w)
		leave := occupies(t, s, func(context.Context, *fake) error { return errFn })
		w.breaks(errBroken)
		require.Error(t, do(t.Context(), s))
		assert.Equal(t, sessionmanager.StateFaulted, s.State())
		go func() { assert.NoError(t, s.Close(t.Context())) }()
		synctest.Wait()
		assert.Equal(t, sessionmanager.StateFaulted, s.State(), "not closing")
		time.Sleep(time.Second)
		<-s.Done()
		assert.Equal(t, sessionmanager.StateClosed, s.State())
		assert.NoError(t, s.Err())
		require.ErrorIs(t, leave(), errFn) // which finds the worker broken
		assert.Equal(t, sessionmanager.StateClosed, s.State(), "for ever")
		require.NoError(t, s.Kill(t.Context(), "again"))
		assert.Equal(t, sessionmanager.StateClosed, s.State())
		shutdowns, kills := w.ledger()
		assert.Equal(t, [...]int{0, 1}, [...]int{shutdowns, kills}, "a broken worker is not asked to shut down")
		assert.Equal(t, []sessionmanager.Code{sessionmanager.CodeFaulted}, b.faults())
	})
}

func TestCloseEndsTheWorkerOnce(t *testing.T) {
	m, b := newManager(t)
	w := &fake{}
	s := open(t, m, w)
	require.NoError(t, s.Close(t.Context()))
	shutdowns, kills := w.ledger()
	assert.Equal(t, [...]int{1, 0}, [...]int{shutdowns, kills})
	assert.Equal(t, sessionmanager.Stats{Opened: 1, Closed: 1}, m.Stats())
	assert.Equal(t, []string{sessionmanager.ReasonClient}, b.reasons())
	assert.Equal(t, sessionmanager.StateClosed, s.State())
	_, err := m.Get(s.ID(), "ann")
	require.ErrorIs(t, err, sessionmanager.ErrNotFound)
	require.NoError(t, s.Close(t.Context()), "again: nothing happens")
	assert.Equal(t, uint64(1), m.Stats().Closed)
}

func TestConcurrentClosesEndTheWorkerOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, b := newManager(t, sessionmanager.WithMax(1))
		w := &fake{shutdown: stubborn(time.Second, nil)}
		s := open(t, m, w)
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() {
				s, err := m.Get(s.ID(), "ann")
				if err == nil {
					err = s.Close(t.Context())
				} else {
					assert.ErrorIs(t, err, sessionmanager.ErrNotFound)
					err = nil
				}
				assert.NoError(t, err)
			})
		}
		wg.Wait()
		shutdowns, kills := w.ledger()
		assert.Equal(t, [...]int{1, 0}, [...]int{shutdowns, kills})
		assert.Equal(t, sessionmanager.Stats{Opened: 1, Closed: 1}, m.Stats())
		assert.Len(t, b.reasons(), 1)
		open(t, m, nil)
		_, err := m.Open(t.Context(), sessionmanager.Spec{}, starts(&fake{}))
		require.ErrorIs(t, err, sessionmanager.ErrLimit, "the slot came back once")
	})
}

// The close goes on without who began it, so the session is never half closed.
func TestCallerThatLeavesAClosePreventsNothing(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, b := newManager(t)
		w := &fake{shutdown: stubborn(3*time.Second, nil)}
		s := open(t, m, w)
		over, cancel := context.WithCancel(t.Context())
		cancel()
		require.ErrorIs(t, s.Close(over), context.Canceled)
		use(t, s) // nothing has happened

		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		require.ErrorIs(t, s.Close(ctx), context.DeadlineExceeded)
		got, err := m.Get(s.ID(), "ann")
		require.NoError(t, err, "still registered")
		assert.Equal(t, sessionmanager.StateClosing, got.State())
		assert.Equal(t, 1, m.Stats().Sessions)
		require.NoError(t, got.Close(t.Context()))
		shutdowns, kills := w.ledger()
		assert.Equal(t, [...]int{1, 0}, [...]int{shutdowns, kills})
		assert.Equal(t, []string{sessionmanager.ReasonClient}, b.reasons())
	})
}

func TestFailedCloseIsCountedAndKills(t *testing.T) {
	for name, shutdown := range map[string]func(context.Context) error{
		"an error":                 func(context.Context) error { return errBroken },
		"a panic":                  func(context.Context) error { panic("hunter2") },
		"the end of its goroutine": func(context.Context) error { exit(); return nil },
		"its timeout":              untilDone,
		"never":                    stubborn(time.Hour, nil),
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				m, b := newManager(t)
				w := &fake{shutdown: shutdown}
				s := open(t, m, w)
				begun := time.Now()
				err := s.Close(t.Context())
				assert.LessOrEqual(t, time.Since(begun), 10*time.Second)
				require.ErrorIs(t, err, sessionmanager.ErrClose)
				assert.NotContains(t, err.Error(), "hunter2")
				shutdowns, kills := w.ledger()
				assert.Equal(t, [...]int{1, 1}, [...]int{shutdowns, kills})
				assert.Equal(t, sessionmanager.ReasonClient, w.lastReason())
				assert.Equal(t, sessionmanager.StateFaulted, s.State())
				require.ErrorIs(t, s.Err(), sessionmanager.ErrClose)
				assert.Equal(t, sessionmanager.Stats{Opened: 1, Closed: 1, Faulted: 1}, m.Stats())
				assert.Equal(t, []sessionmanager.Code{sessionmanager.CodeCloseFailed}, b.faults())
				assert.Equal(t, []string{sessionmanager.ReasonClient}, b.reasons())
				assert.Equal(t, err, s.Close(t.Context()), "again: how it ended")
				_, err = m.Get(s.ID(), "ann")
				require.ErrorIs(t, err, sessionmanager.ErrNotFound)
			})
		})
	}
}

func TestKillWantsAReasonAndASession(t *testing.T) {
	m, _ := newManager(t)
	w := &fake{}
	s := open(t, m, w)
	for _, reason := range []string{"", " ", "\t\n", strings.Repeat("x", 257)} {
		require.ErrorIs(t, s.Kill(t.Context(), reason), sessionmanager.ErrInvalid)
	}
	over, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorIs(t, s.Kill(over, "admin"), context.Canceled)
	use(t, s)
	shutdowns, kills := w.ledger()
	assert.Zero(t, shutdowns+kills)
	_, err := m.Get("session-unknown", "ann")
	require.ErrorIs(t, err, sessionmanager.ErrNotFound)
}

func TestKillLeavesShutdownOut(t *testing.T) {
	m, b := newManager(t)
	w := &fake{}
	s := open(t, m, w)
	require.NoError(t, s.Kill(t.Context(), "said the admin"))
	shutdowns, kills := w.ledger()
	assert.Equal(t, [...]int{0, 1}, [...]int{shutdowns, kills})
	assert.Equal(t, "said the admin", w.lastReason())
	assert.Equal(t, []string{"said the admin"}, b.reasons())
	assert.Equal(t, sessionmanager.StateClosed, s.State())
	_, err := m.Get(s.ID(), "ann")
	require.ErrorIs(t, err, sessionmanager.ErrNotFound)
}

// Not even for a moment, which the race of the kill with its own end could give it.
func TestKillNeverBeginsAShutdown(t *testing.T) {
	m, _ := newManager(t)
	for range 3000 {
		w := &fake{}
		require.NoError(t, open(t, m, w).Kill(t.Context(), "admin"))
		shutdowns, _ := w.ledger()
		require.Zero(t, shutdowns)
	}
}

func TestFailedKillIsCountedAndGone(t *testing.T) {
	for name, kill := range map[string]func(string) error{
		"an error":                 func(string) error { return errBroken },
		"a panic":                  func(string) error { panic("hunter2") },
		"the end of its goroutine": func(string) error { exit(); return nil },
		"never":                    func(string) error { time.Sleep(time.Hour); return nil },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				m, b := newManager(t)
				s := open(t, m, &fake{kill: kill})
				begun := time.Now()
				err := s.Kill(t.Context(), "admin")
				assert.LessOrEqual(t, time.Since(begun), 5*time.Second)
				require.ErrorIs(t, err, sessionmanager.ErrClose)
				assert.NotContains(t, err.Error(), "hunter2")
				assert.Equal(t, sessionmanager.Stats{Opened: 1, Closed: 1, Faulted: 1}, m.Stats())
				assert.Zero(t, b.gauge())
				assert.Equal(t, []sessionmanager.Code{sessionmanager.CodeCloseFailed}, b.faults())
				assert.Equal(t, sessionmanager.StateFaulted, s.State())
			})
		})
	}
}

func TestKillsAndClosesRaceToOneEnd(t *testing.T) {
	for name, failure := range map[string]error{"that works": nil, "that fails": errBroken} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				m, b := newManager(t)
				for range 200 {
					w := &fake{
						shutdown: func(ctx context.Context) error { return untilDone(ctx) },
						kill:     func(string) error { return failure },
					}
					s := open(t, m, w)
					var wg sync.WaitGroup
					for i := range 8 {
						wg.Go(func() {
							err := error(nil)
							if i%2 == 0 {
								err = s.Close(t.Context())
							} else {
								err = s.Kill(t.Context(), "admin")
							}
							assert.Equal(t, failure != nil, err != nil)
						})
					}
					wg.Wait()
					shutdowns, kills := w.ledger()
					assert.LessOrEqual(t, shutdowns, 1)
					assert.Equal(t, 1, kills)
				}
				assert.Len(t, b.reasons(), 200)
				assert.Equal(t, uint64(200), m.Stats().Closed)
				assert.Zero(t, b.gauge())
			})
		})
	}
}

// A close that hangs is cut short by a kill, which is no failure of either.
func TestKillCutsAShutdownShort(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, b := newManager(t)
		w := &fake{shutdown: stubborn(time.Hour, nil)}
		s := open(t, m, w)
		closed := make(chan error, 1)
		go func() { closed <- s.Close(t.Context()) }()
		time.Sleep(time.Second)
		begun := time.Now()
		require.NoError(t, s.Kill(t.Context(), "admin"))
		assert.Zero(t, time.Since(begun))
		require.NoError(t, <-closed)
		assert.Equal(t, "admin", w.lastReason())
		assert.Equal(t, []string{"admin"}, b.reasons())
		assert.Empty(t, b.faults())
	})
}

func TestSweepClosesWhatIsOverdueOnly(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, b := newManager(t, sessionmanager.WithLease(time.Minute))
		idle, used := open(t, m, nil), open(t, m, nil)
		time.Sleep(time.Minute - 1)
		use(t, used)
		assert.Zero(t, sweep(t, m))
		use(t, idle) // not yet over
		time.Sleep(time.Minute - 2)
		assert.Zero(t, sweep(t, m))
		time.Sleep(time.Nanosecond)
		use(t, used)
		assert.Zero(t, sweep(t, m))
		time.Sleep(time.Nanosecond)
		assert.Equal(t, 1, sweep(t, m), "at its deadline")
		assert.Equal(t, []string{sessionmanager.ReasonLease}, b.reasons())
		assert.Equal(t, sessionmanager.StateClosed, idle.State())
		use(t, used)
		assert.Zero(t, sweep(t, m))
		time.Sleep(time.Minute)
		assert.Equal(t, 1, sweep(t, m))
	})
}

func TestLeaseThatIsOverIsNeverRenewed(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, b := newManager(t, sessionmanager.WithLease(time.Minute), sessionmanager.WithCallTimeout(time.Second))
		s := open(t, m, nil)
		hung := occupies(t, s, nil)
		time.Sleep(time.Minute)
		for range 2 {
			_, _, err := s.Attach()
			for _, err := range []error{err, do(t.Context(), s)} {
				require.ErrorIs(t, err, sessionmanager.ErrNotReady)
				assert.ErrorContains(t, err, "its lease is over")
			}
		}
		require.NoError(t, hung()) // a call that outlived its timeout and the lease
		require.ErrorIs(t, do(t.Context(), s), sessionmanager.ErrNotReady)
		assert.Equal(t, 1, sweep(t, m))
		assert.Equal(t, []string{sessionmanager.ReasonLease}, b.reasons())
	})
}

// A call that keeps to its timeout is never swept away, one that ignores it is.
func TestCallUnderWayHoldsTheLeaseWithinItsTimeout(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, b := newManager(t, sessionmanager.WithLease(time.Second), sessionmanager.WithCallTimeout(time.Minute))
		s := open(t, m, nil)
		open(t, m, nil) // without a call its lease is the lease
		leave := occupies(t, s, nil)
		time.Sleep(time.Second)
		assert.Equal(t, 1, sweep(t, m))
		for range 58 {
			time.Sleep(time.Second)
			assert.Zero(t, sweep(t, m))
		}
		require.NoError(t, leave())
		time.Sleep(time.Second - 1)
		assert.Zero(t, sweep(t, m), "its end is a use")
		leave = occupies(t, s, func(ctx context.Context, _ *fake) error { return ctx.Err() })
		time.Sleep(time.Minute - 1)
		assert.Zero(t, sweep(t, m))
		time.Sleep(time.Nanosecond)
		assert.Equal(t, 1, sweep(t, m))
		assert.Equal(t, []string{sessionmanager.ReasonLease, sessionmanager.ReasonLease}, b.reasons())
		require.Error(t, leave())
	})
}

func TestSessionWithAListenerDoesNotExpire(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, b := newManager(t, sessionmanager.WithLease(time.Minute), sessionmanager.WithGrace(0))
		s := open(t, m, nil)
		w, detach, err := s.Attach()
		require.NoError(t, err)
		assert.NotNil(t, w)
		for range 100 {
			time.Sleep(time.Hour)
			assert.Zero(t, sweep(t, m))
		}
		use(t, s)
		detach()
		detach() // once or more
		time.Sleep(time.Minute - 1)
		assert.Zero(t, sweep(t, m))
		time.Sleep(time.Nanosecond)
		assert.Equal(t, 1, sweep(t, m))
		assert.Equal(t, []string{sessionmanager.ReasonLease}, b.reasons())
	})
}

// The sweep judges a session in the step that closes it, whatever it found before.
func TestListenerThatCameBackWinsOverTheSweep(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, b := newManager(t, sessionmanager.WithParallel(1))
		slow := &fake{shutdown: stubborn(5*time.Second, nil)}
		first, second := open(t, m, slow), open(t, m, nil)
		swept := make(chan int, 1)
		go func() {
			n, err := m.Sweep(t.Context(), time.Now().Add(time.Hour))
			assert.NoError(t, err)
			swept <- n
		}()
		synctest.Wait() // the sweep found both overdue, and closes the first
		if second.State() != sessionmanager.StateReady {
			first, second = second, first
		}
		assert.Equal(t, sessionmanager.StateClosing, first.State())
		_, detach, err := second.Attach()
		require.NoError(t, err)
		defer detach()
		assert.Equal(t, 1, <-swept)
		assert.Equal(t, sessionmanager.StateReady, second.State())
		use(t, second)
		assert.Zero(t, sweepAt(t, m, time.Now().Add(24*time.Hour)))
		assert.Len(t, b.reasons(), 1)
	})
}

func sweepAt(t *testing.T, m *manager, now time.Time) int {
	t.Helper()
	n, err := m.Sweep(t.Context(), now)
	require.NoError(t, err)
	return n
}

// 1 000 times: either the listener is in and the session lives, or the sweep was
// first and the listener is refused.
func TestListenersRaceTheSweepToOneWinner(t *testing.T) {
	m, _ := newManager(t, sessionmanager.WithMax(1000))
	won := 0
	for range 1000 {
		s := open(t, m, nil)
		var wg sync.WaitGroup
		var attached error
		closed := 0
		wg.Go(func() { _, _, attached = s.Attach() })
		wg.Go(func() { closed = sweepAt(t, m, time.Now().Add(time.Hour)) })
		wg.Wait()
		if attached == nil {
			won++
			require.Zero(t, closed)
			use(t, s)
			require.NoError(t, s.Close(t.Context()))
		} else {
			require.ErrorIs(t, attached, sessionmanager.ErrNotReady)
			require.Equal(t, 1, closed)
		}
	}
	t.Logf("%d listeners won", won)
}

func TestDetachedSessionIsKeptForTheGrace(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, b := newManager(t, sessionmanager.WithLease(time.Hour), sessionmanager.WithGrace(time.Minute))
		s := open(t, m, nil)
		attach := func() func() {
			_, detach, err := s.Attach()
			require.NoError(t, err)
			return detach
		}
		one, two := attach(), attach()
		one()
		time.Sleep(30 * time.Minute)
		assert.Zero(t, sweep(t, m), "the other one listens")
		two()
		time.Sleep(time.Minute - 1)
		assert.Zero(t, sweep(t, m))
		back := attach()
		time.Sleep(30 * time.Minute)
		assert.Zero(t, sweep(t, m))
		back()
		time.Sleep(50 * time.Second)
		use(t, s)
		time.Sleep(time.Hour - 1)
		assert.Zero(t, sweep(t, m), "who calls has come back")
		attach()()
		time.Sleep(time.Minute)
		assert.Equal(t, 1, sweep(t, m))
		assert.Equal(t, []string{sessionmanager.ReasonDetached}, b.reasons())
	})
}

func TestGraceAndLease(t *testing.T) {
	for name, tt := range map[string]struct {
		grace, idle time.Duration
		reason      string
	}{
		"both over":              {time.Minute, time.Hour, sessionmanager.ReasonLease},
		"the grace alone":        {time.Minute, time.Hour - 1, sessionmanager.ReasonDetached},
		"a grace over the lease": {2 * time.Hour, time.Hour, sessionmanager.ReasonLease},
		"no grace":               {0, time.Hour, sessionmanager.ReasonLease},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				m, b := newManager(t, sessionmanager.WithLease(time.Hour), sessionmanager.WithGrace(tt.grace))
				s := open(t, m, nil)
				_, detach, err := s.Attach()
				require.NoError(t, err)
				detach()
				if tt.grace == 0 {
					time.Sleep(tt.idle - 1)
					assert.Zero(t, sweep(t, m), "0 turns it off")
					time.Sleep(time.Nanosecond)
				} else {
					time.Sleep(tt.idle)
				}
				assert.Equal(t, 1, sweep(t, m))
				assert.Equal(t, []string{tt.reason}, b.reasons())
			})
		})
	}
}

func TestFaultedSessionIsSweptAfterTheGrace(t *testing.T) {
	for name, listens := range map[string]bool{"idle": false, "with a listener": true} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				m, b := newManager(t, sessionmanager.WithGrace(time.Minute))
				w := &fake{}
				s := open(t, m, w)
				if listens {
					_, detach, err := s.Attach()
					require.NoError(t, err)
					defer detach()
				}
				time.Sleep(time.Minute)
				w.breaks(errBroken)
				require.Error(t, do(t.Context(), s))
				time.Sleep(time.Minute - 1)
				assert.Zero(t, sweep(t, m))
				require.Error(t, do(t.Context(), s)) // is no use of it
				time.Sleep(time.Nanosecond)
				assert.Equal(t, 1, sweep(t, m))
				assert.Equal(t, []string{sessionmanager.ReasonFaulted}, b.reasons())
			})
		})
	}
}

func TestShutdownClosesAllOneFailingOrNot(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, b := newManager(t)
		fails := &fake{shutdown: func(context.Context) error { return errBroken }}
		immortal := &fake{shutdown: func(context.Context) error { return errBroken }, kill: func(string) error { return errBroken }}
		fine := []*fake{{}, {}, {}}
		for _, w := range append(fine, fails, immortal) {
			open(t, m, w)
		}
		err := m.Shutdown(t.Context())
		require.ErrorIs(t, err, sessionmanager.ErrClose)
		require.ErrorIs(t, err, errBroken)
		assert.NotErrorIs(t, err, context.Canceled)
		for _, w := range fine {
			shutdowns, kills := w.ledger()
			assert.Equal(t, [...]int{1, 0}, [...]int{shutdowns, kills})
		}
		for _, w := range []*fake{fails, immortal} {
			shutdowns, kills := w.ledger()
			assert.Equal(t, [...]int{1, 1}, [...]int{shutdowns, kills})
			assert.Equal(t, sessionmanager.ReasonShutdown, w.lastReason())
		}
		assert.Equal(t, sessionmanager.Stats{Opened: 5, Closed: 5, Faulted: 2}, m.Stats())
		for _, reason := range b.reasons() {
			assert.Equal(t, sessionmanager.ReasonShutdown, reason)
		}
		require.NoError(t, m.Shutdown(t.Context()), "again: there is nothing left")
	})
}

func TestOpenThatIsGivenUpSaysWhy(t *testing.T) {
	tired := errors.New("tired of waiting")
	for name, tt := range map[string]struct {
		ctx   func(ctx context.Context) context.Context
		opts  []sessionmanager.Option
		start func(ctx context.Context) (*fake, error)
		is    []error
		isNot []error
	}{
		"the caller leaves": {
			ctx:   func(ctx context.Context) context.Context { return cancelledAfter(ctx, time.Second, nil) },
			start: func(ctx context.Context) (*fake, error) { return nil, fmt.Errorf("dial: %w", untilDone(ctx)) },
			is:    []error{sessionmanager.ErrOpen, context.Canceled},
			isNot: []error{context.DeadlineExceeded},
		},
		"the caller leaves with a cause": {
			ctx:   func(ctx context.Context) context.Context { return cancelledAfter(ctx, time.Second, tired) },
			start: func(ctx context.Context) (*fake, error) { _ = untilDone(ctx); return nil, errFn },
			is:    []error{sessionmanager.ErrOpen, context.Canceled, tired, errFn},
		},
		"start fails in its own way then": {
			ctx:   func(ctx context.Context) context.Context { return cancelledAfter(ctx, time.Second, nil) },
			start: func(ctx context.Context) (*fake, error) { _ = untilDone(ctx); return nil, errFn },
			is:    []error{sessionmanager.ErrOpen, context.Canceled, errFn},
		},
		"start brings its worker then": {
			ctx:   func(ctx context.Context) context.Context { return cancelledAfter(ctx, time.Second, nil) },
			start: func(ctx context.Context) (*fake, error) { _ = untilDone(ctx); return &fake{}, nil },
			is:    []error{sessionmanager.ErrOpen, context.Canceled},
		},
		"start takes too long": {
			opts:  []sessionmanager.Option{sessionmanager.WithStartTimeout(time.Second)},
			start: func(ctx context.Context) (*fake, error) { return nil, untilDone(ctx) },
			is:    []error{sessionmanager.ErrOpen, context.DeadlineExceeded},
			isNot: []error{context.Canceled},
		},
		"start fails by itself": {
			start: func(context.Context) (*fake, error) { return nil, errFn },
			is:    []error{sessionmanager.ErrOpen, errFn},
			isNot: []error{context.Canceled, context.DeadlineExceeded},
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				m, b := newManager(t, tt.opts...)
				ctx := t.Context()
				if tt.ctx != nil {
					ctx = tt.ctx(ctx)
				}
				begun := time.Now()
				_, err := m.Open(ctx, sessionmanager.Spec{}, func(ctx context.Context, _ string) (*fake, error) { return tt.start(ctx) })
				assert.LessOrEqual(t, time.Since(begun), time.Second)
				for _, is := range tt.is {
					require.ErrorIs(t, err, is)
				}
				for _, is := range tt.isNot {
					require.NotErrorIs(t, err, is)
				}
				var e *sessionmanager.Error
				require.ErrorAs(t, err, &e)
				assert.NotContains(t, e.Err.Error(), "%!")
				assert.Equal(t, sessionmanager.Stats{Faulted: 1}, m.Stats())
				assert.Equal(t, []sessionmanager.Code{sessionmanager.CodeOpenFailed}, b.faults())
			})
		})
	}
}

func cancelledAfter(ctx context.Context, d time.Duration, cause error) context.Context {
	ctx, cancel := context.WithCancelCause(ctx)
	time.AfterFunc(d, func() { cancel(cause) })
	return ctx
}

// What ends with its caller's context says so, in every call.
func TestEndOfTheCallersContextIsPassedOn(t *testing.T) {
	m, _ := newManager(t)
	s := open(t, m, nil)
	why := errors.New("left")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(why)
	_, swept := m.Sweep(ctx, time.Now())
	for name, err := range map[string]error{
		"Open":  second(m.Open(ctx, sessionmanager.Spec{}, starts(&fake{}))),
		"Do":    do(ctx, s),
		"Close": s.Close(ctx),
		"Kill":  s.Kill(ctx, "admin"),
		"Sweep": swept,
		"Run":   m.Run(ctx),
	} {
		require.ErrorIs(t, err, context.Canceled, name)
		require.ErrorIs(t, err, why, name)
	}
	use(t, s)
	assert.Zero(t, m.Stats().Faulted)
}

func second[T any](_ T, err error) error { return err }

func TestTakenIDLeavesTheSessionThatHasIt(t *testing.T) {
	m, b := newManager(t, sessionmanager.WithMax(3))
	w := &fake{}
	spec := sessionmanager.Spec{ID: "one"}
	s, err := m.Open(t.Context(), spec, starts(w))
	require.NoError(t, err)
	other := &fake{}
	for range 5 {
		_, err = m.Open(t.Context(), spec, starts(other))
		require.ErrorIs(t, err, sessionmanager.ErrOpen)
		assert.ErrorContains(t, err, "taken")
	}
	shutdowns, kills := other.ledger()
	assert.Zero(t, shutdowns+kills, "it was not even started")
	got, err := m.Get("one", "")
	require.NoError(t, err)
	assert.Same(t, s, got)
	use(t, s)
	assert.Equal(t, sessionmanager.Stats{Sessions: 1, Open: 1, Opened: 1, Faulted: 5}, m.Stats())
	assert.Len(t, b.faults(), 5)
	open(t, m, nil)
	open(t, m, nil)
	require.NoError(t, s.Close(t.Context()))
	_, err = m.Open(t.Context(), spec, starts(&fake{}))
	require.NoError(t, err, "the id is free again")
}

func TestSweepGoesOnAfterAFailure(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, b := newManager(t)
		for i := range 10 {
			w := &fake{}
			if i%5 == 0 {
				w.shutdown = func(context.Context) error { return errBroken }
			}
			open(t, m, w)
		}
		time.Sleep(time.Hour)
		n, err := m.Sweep(t.Context(), time.Now())
		assert.Equal(t, 8, n)
		require.ErrorIs(t, err, sessionmanager.ErrClose)
		require.ErrorIs(t, err, errBroken)
		assert.Equal(t, 2, strings.Count(err.Error(), "not closed cleanly"), "all are told")
		assert.Len(t, b.reasons(), 10)
		assert.Zero(t, m.Stats().Sessions)
	})
}

// Of many failures the first are told, and how many there were.
func TestManyFailuresAreCounted(t *testing.T) {
	m, _ := newManager(t, sessionmanager.WithMax(100))
	for range 100 {
		open(t, m, &fake{shutdown: func(context.Context) error { return errBroken }})
	}
	n, err := m.Sweep(t.Context(), time.Now().Add(time.Hour))
	assert.Zero(t, n)
	assert.Equal(t, 16, strings.Count(err.Error(), "not closed cleanly"))
	assert.ErrorContains(t, err, "and 84 more")
}

func TestNothingIsOpenedOnceShutdownHasBegun(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, _ := newManager(t, sessionmanager.WithMax(1000))
		var wg sync.WaitGroup
		var mu sync.Mutex
		var workers []*fake
		for i := range 500 {
			wg.Go(func() {
				time.Sleep(time.Duration(i) * time.Millisecond)
				_, err := m.Open(t.Context(), sessionmanager.Spec{}, func(ctx context.Context, _ string) (*fake, error) {
					if i%3 == 0 {
						if err := untilDone(ctx); i%2 == 0 {
							return nil, err
						}
					} else {
						time.Sleep(time.Duration(i%7) * time.Millisecond)
					}
					w := &fake{}
					mu.Lock()
					defer mu.Unlock()
					workers = append(workers, w)
					return w, nil
				})
				if err != nil {
					assert.ErrorIs(t, err, sessionmanager.ErrClosed)
				}
			})
		}
		time.Sleep(250 * time.Millisecond)
		require.NoError(t, m.Shutdown(t.Context()))
		assert.Zero(t, m.Stats().Sessions, "also what was being opened")
		_, err := m.Open(t.Context(), sessionmanager.Spec{}, starts(&fake{}))
		require.ErrorIs(t, err, sessionmanager.ErrClosed)
		wg.Wait()
		assert.Zero(t, m.Stats().Sessions)
		assert.NotEmpty(t, workers)
		for _, w := range workers {
			shutdowns, kills := w.ledger()
			assert.Equal(t, 1, shutdowns+kills, "each worker is ended once")
		}
	})
}

func TestShutdownWithAnExpiredContextEndsEveryWorkerInTime(t *testing.T) {
	for name, shutdown := range map[string]func(context.Context) error{
		"workers that hang":         stubborn(time.Hour, nil),
		"workers that would behave": nil,
	} {
		for when, left := range map[string]time.Duration{"before": 0, "meanwhile": 2 * time.Second} {
			t.Run(name+", over "+when, func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					m, b := newManager(t, sessionmanager.WithMax(1000), sessionmanager.WithParallel(10))
					var workers []*fake
					for i := range 1000 {
						w := &fake{shutdown: shutdown}
						if i%100 == 0 {
							w.kill = func(string) error { time.Sleep(time.Hour); return nil }
						}
						workers = append(workers, w)
						open(t, m, w)
					}
					closes := occupies(t, first(m), func(ctx context.Context, _ *fake) error { return untilDone(ctx) })
					ctx, cancel := context.WithTimeout(t.Context(), left)
					defer cancel()
					begun := time.Now()
					err := m.Shutdown(ctx)
					if shutdown == nil && left > 0 {
						require.NoError(t, err)
						assert.Zero(t, time.Since(begun))
					} else {
						require.ErrorIs(t, err, context.DeadlineExceeded)
						assert.NotContains(t, err.Error(), "start has not returned")
						require.ErrorIs(t, err, sessionmanager.ErrClose, "some could not be killed")
						assert.LessOrEqual(t, time.Since(begun), left+5*time.Second)
					}
					assert.Zero(t, m.Stats().Sessions)
					ended := 0
					for _, w := range workers {
						shutdowns, kills := w.ledger()
						assert.LessOrEqual(t, kills, 1)
						assert.LessOrEqual(t, shutdowns, int(left), "none begins when it is over")
						if kills > 0 || (shutdown == nil && shutdowns == 1) {
							ended++
						}
					}
					assert.Equal(t, 1000, ended)
					assert.Zero(t, b.gauge())
					require.Error(t, closes(), "its context has ended, too")
				})
			})
		}
	}
}

func first(m *manager) *session {
	for s := range m.All() {
		return s
	}
	return nil
}

// A start that ignores its context keeps its slot: its worker may exist.
func TestStartThatIgnoresItsContextIsLeftBehind(t *testing.T) {
	for name, giveUp := range map[string]func(t *testing.T, m *manager, cancel func()){
		"by its caller": func(_ *testing.T, _ *manager, cancel func()) { cancel() },
		"by its timeout": func(*testing.T, *manager, func()) {
			time.Sleep(30 * time.Second)
		},
		"by a close": func(t *testing.T, m *manager, _ func()) {
			assert.ErrorIs(t, first(m).Close(t.Context()), sessionmanager.ErrClose)
		},
		"by a kill": func(t *testing.T, m *manager, _ func()) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			assert.ErrorIs(t, first(m).Kill(ctx, "admin"), context.DeadlineExceeded)
		},
		"by a shutdown": func(t *testing.T, m *manager, _ func()) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			begun := time.Now()
			err := m.Shutdown(ctx)
			assert.ErrorContains(t, err, "start has not returned")
			assert.ErrorIs(t, err, context.DeadlineExceeded)
			assert.LessOrEqual(t, time.Since(begun), 8*time.Second)
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				m, b := newManager(t, sessionmanager.WithMax(1))
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				w, opened := &fake{}, make(chan error, 1)
				go func() {
					_, err := m.Open(ctx, sessionmanager.Spec{}, func(context.Context, string) (*fake, error) {
						time.Sleep(time.Hour)
						return w, nil
					})
					opened <- err
				}()
				synctest.Wait()
				giveUp(t, m, cancel)
				err := <-opened
				assert.True(t, errors.Is(err, sessionmanager.ErrOpen) || errors.Is(err, sessionmanager.ErrClosed))
				assert.ErrorContains(t, err, "left behind")
				assert.Equal(t, 1, m.Stats().Sessions)
				s := first(m)
				assert.Equal(t, sessionmanager.StateFaulted, s.State())
				assert.Error(t, s.Err())
				_, err = m.Open(t.Context(), sessionmanager.Spec{}, starts(&fake{}))
				assert.True(t, errors.Is(err, sessionmanager.ErrLimit) || errors.Is(err, sessionmanager.ErrClosed), "its slot is taken")

				time.Sleep(time.Hour)
				<-s.Done()
				shutdowns, kills := w.ledger()
				assert.Equal(t, [...]int{0, 1}, [...]int{shutdowns, kills})
				assert.Zero(t, m.Stats().Sessions)
				assert.Empty(t, b.of(sessionmanager.EventOpened))
				assert.Equal(t, uint64(1), m.Stats().Faulted+m.Stats().Refused-1)
			})
		})
	}
}

func TestCloseOfASessionThatIsBeingOpenedGivesItUp(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, b := newManager(t)
		opened := make(chan error, 1)
		go func() {
			_, err := m.Open(t.Context(), sessionmanager.Spec{}, func(ctx context.Context, _ string) (*fake, error) {
				return nil, untilDone(ctx)
			})
			opened <- err
		}()
		synctest.Wait()
		s := first(m)
		require.NoError(t, s.Close(t.Context()))
		err := <-opened
		require.ErrorIs(t, err, sessionmanager.ErrOpen)
		require.ErrorIs(t, err, sessionmanager.ErrNotReady)
		assert.ErrorContains(t, err, "closed while it was opened")
		assert.Zero(t, m.Stats().Sessions)
		assert.Empty(t, b.reasons(), "it was never open")

		go func() {
			_, err := m.Open(t.Context(), sessionmanager.Spec{}, func(ctx context.Context, _ string) (*fake, error) {
				_ = untilDone(ctx)
				return &fake{kill: func(string) error { return errBroken }}, nil
			})
			opened <- err
		}()
		synctest.Wait()
		err = first(m).Close(t.Context())
		require.ErrorIs(t, err, sessionmanager.ErrClose, "who closes it hears of a worker that may live on")
		require.ErrorIs(t, err, errBroken)
		require.ErrorIs(t, <-opened, sessionmanager.ErrOpen)
	})
}

// What is gone, and calls that have returned, are held by nothing.
func TestNothingIsHeldOfWhatIsOver(t *testing.T) {
	type key struct{}
	m, _ := newManager(t)
	s := open(t, m, nil)
	ctx := withoutTimers(t)
	var calls []weak.Pointer[[64]byte]
	for range 10 {
		v := new([64]byte)
		calls = append(calls, weak.Make(v))
		require.NoError(t, s.Do(context.WithValue(ctx, key{}, v), func(context.Context, *fake) error { return nil }))
	}
	var gone []weak.Pointer[session]
	for range 10 {
		s := open(t, m, nil)
		gone = append(gone, weak.Make(s))
		require.NoError(t, s.Close(t.Context()))
	}
	require.Eventually(t, func() bool {
		runtime.GC()
		for i := range calls {
			if calls[i].Value() != nil || gone[i].Value() != nil {
				return false
			}
		}
		return true
	}, 10*time.Second, 10*time.Millisecond)
	use(t, s)
}

// withoutTimers returns a context that ends before any call's timeout, so that no
// call has a timer: the runtime holds on to those that were stopped, for a while.
func withoutTimers(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 25*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// Not even one start that never returns at a time, with one turn for all.
func TestStartThatNeverReturnsHoldsUpNoClose(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, _ := newManager(t, sessionmanager.WithParallel(1))
		for i := range 3 {
			go func() {
				_, err := m.Open(t.Context(), sessionmanager.Spec{ID: fmt.Sprint(i)}, func(context.Context, string) (*fake, error) {
					time.Sleep(time.Hour)
					return nil, errFn
				})
				assert.ErrorIs(t, err, sessionmanager.ErrClosed)
			}()
		}
		synctest.Wait()
		w := &fake{}
		open(t, m, w)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		require.ErrorIs(t, m.Shutdown(ctx), context.DeadlineExceeded)
		shutdowns, kills := w.ledger()
		assert.Equal(t, [...]int{1, 0}, [...]int{shutdowns, kills})
	})
}

func TestCallsAreFreedThoughTheKillHangs(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, _ := newManager(t)
		s := open(t, m, &fake{kill: func(string) error { time.Sleep(time.Hour); return nil }})
		begun := time.Now()
		freed := make(chan time.Duration, 1)
		go func() {
			_ = s.Do(t.Context(), func(ctx context.Context, _ *fake) error { return untilDone(ctx) })
			freed <- time.Since(begun)
		}()
		synctest.Wait()
		require.ErrorIs(t, s.Kill(t.Context(), "admin"), sessionmanager.ErrClose)
		assert.Zero(t, <-freed)
	})
}

// With a context that is over nothing begins, whatever there is to do.
func TestSweepWithAnExpiredContextClosesNothing(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, b := newManager(t)
		for range 50 {
			open(t, m, nil)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		for range 50 {
			n, err := m.Sweep(ctx, time.Now().Add(time.Hour))
			assert.Zero(t, n)
			require.ErrorIs(t, err, context.Canceled)
		}
		synctest.Wait()
		assert.Empty(t, b.reasons())
		assert.Equal(t, 50, m.Stats().Open)
	})
}

func TestCallsOverTheLimitAreRefusedAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, _ := newManager(t, sessionmanager.WithPending(3))
		s, other := open(t, m, nil), open(t, m, nil)
		var leave []func() error
		for range 3 {
			leave = append(leave, occupies(t, s, nil))
		}
		for range 3 {
			require.ErrorIs(t, do(t.Context(), s), sessionmanager.ErrBusy)
		}
		use(t, other)
		require.NoError(t, leave[1]())
		use(t, s)
		leave[1] = occupies(t, s, nil)
		require.ErrorIs(t, do(t.Context(), s), sessionmanager.ErrBusy)
		for _, leave := range leave {
			require.NoError(t, leave())
		}
		use(t, s)
	})
}

func TestListenersOverTheLimitAreRefused(t *testing.T) {
	m, _ := newManager(t, sessionmanager.WithListeners(1))
	s := open(t, m, nil)
	_, detach, err := s.Attach()
	require.NoError(t, err)
	_, none, err := s.Attach()
	require.ErrorIs(t, err, sessionmanager.ErrBusy)
	assert.Nil(t, none)
	detach()
	detach()
	_, again, err := s.Attach()
	require.NoError(t, err)
	detach() // of the first is over and done with
	_, _, err = s.Attach()
	require.ErrorIs(t, err, sessionmanager.ErrBusy)
	again()
}

func TestPanicOfACallFaultsItsSessionOnly(t *testing.T) {
	m, b := newManager(t)
	s, other := open(t, m, nil), open(t, m, nil)
	err := s.Do(t.Context(), func(context.Context, *fake) error { panic("hunter2") })
	require.ErrorIs(t, err, sessionmanager.ErrFaulted)
	var p *sessionmanager.PanicError
	require.ErrorAs(t, err, &p)
	assert.Equal(t, "hunter2", p.Value)
	assert.Contains(t, string(p.Stack), "manager_test.go")
	assert.NotContains(t, err.Error(), "hunter2")
	assert.Equal(t, sessionmanager.StateFaulted, s.State())
	after := do(t.Context(), s)
	require.ErrorIs(t, after, sessionmanager.ErrNotReady)
	require.ErrorAs(t, after, &p, "it says why")
	assert.ErrorContains(t, after, "session faulted, worker in doubt")
	use(t, other)

	third := open(t, m, nil)
	over := make(chan struct{})
	go func() {
		defer close(over)
		_ = third.Do(t.Context(), func(context.Context, *fake) error { exit(); return nil })
	}()
	<-over
	assert.Equal(t, sessionmanager.StateFaulted, third.State())
	assert.Len(t, b.faults(), 2)
	for _, s := range []*session{s, third} {
		require.NoError(t, s.Close(t.Context()), "nothing is left pending")
	}
}

// A call's context tells of its timeout, of its caller and of the session's end.
func TestContextOfACall(t *testing.T) {
	type key struct{}
	bubble(t, func(t *testing.T) {
		m, _ := newManager(t)
		s := open(t, m, nil)
		ctx := context.WithValue(t.Context(), key{}, "value")
		require.NoError(t, s.Do(ctx, func(ctx context.Context, _ *fake) error {
			assert.Equal(t, "value", ctx.Value(key{}))
			until, ok := ctx.Deadline()
			assert.True(t, ok)
			assert.Equal(t, 30*time.Second, time.Until(until))
			return nil
		}))
		leaves := cancelledAfter(t.Context(), time.Second, errFn)
		err := s.Do(leaves, func(ctx context.Context, _ *fake) error { _ = untilDone(ctx); return context.Cause(ctx) })
		require.ErrorIs(t, err, errFn)
		assert.NotErrorIs(t, err, sessionmanager.ErrNotReady)
		err = s.Do(t.Context(), func(ctx context.Context, _ *fake) error { return untilDone(ctx) })
		assert.Equal(t, context.DeadlineExceeded, err, "its timeout, as fn said it")

		killed := occupies(t, s, func(ctx context.Context, _ *fake) error { return untilDone(ctx) })
		other := occupies(t, s, func(ctx context.Context, _ *fake) error {
			assert.ErrorIs(t, context.Cause(ctx), sessionmanager.ErrNotReady)
			return errFn
		})
		require.NoError(t, s.Kill(t.Context(), "admin"))
		err = killed()
		require.ErrorIs(t, err, context.Canceled)
		require.ErrorIs(t, err, sessionmanager.ErrNotReady, "and why")
		assert.Equal(t, errFn, other())
	})
}

// registry is a context that counts what is registered with it.
type registry struct {
	context.Context //nolint:containedctx // it is one
	n               *atomic.Int64
	done            chan struct{}
}

func (r registry) Done() <-chan struct{} { return r.done }

func (r registry) AfterFunc(func()) func() bool {
	r.n.Add(1)
	return func() bool { r.n.Add(-1); return true }
}

// Callers' contexts may live for ever, and hold nothing of what was done in them.
func TestNothingStaysRegisteredWithTheCallersContext(t *testing.T) {
	m, _ := newManager(t)
	ctx := registry{context.Background(), new(atomic.Int64), make(chan struct{})}
	during := int64(0)
	_, err := m.Open(ctx, sessionmanager.Spec{}, func(context.Context, string) (*fake, error) {
		during = ctx.n.Load()
		return nil, errFn
	})
	require.ErrorIs(t, err, errFn)
	assert.Positive(t, during)
	for range 3 {
		s, err := m.Open(ctx, sessionmanager.Spec{}, starts(&fake{}))
		require.NoError(t, err)
		require.NoError(t, do(ctx, s))
		require.ErrorIs(t, s.Do(ctx, func(context.Context, *fake) error { panic("x") }), sessionmanager.ErrFaulted)
	}
	require.NoError(t, first(m).Close(ctx))
	require.NoError(t, first(m).Kill(ctx, "admin"))
	assert.Equal(t, 1, second2(m.Sweep(ctx, time.Now().Add(time.Hour))))
	require.NoError(t, m.Shutdown(ctx))
	assert.Zero(t, ctx.n.Load())

	for range newFanoutWith(t, 1).Subscribe(ctx) {
		break
	}
	assert.Zero(t, ctx.n.Load())
}

func second2(n int, _ error) int { return n }

func newFanoutWith(t *testing.T, e int) *sessionmanager.Fanout[int] {
	t.Helper()
	f := newFanout(t, 1, 1)
	f.Publish(e)
	return f
}

// Whoever came and went before, all calls that are left hear of the end, and no other.
func TestEveryCallUnderWayHearsOfTheEnd(t *testing.T) {
	for _, order := range [][]int{{0, 1, 2, 3, 4}, {4, 3, 2, 1, 0}, {2, 0, 4, 1, 3}, {1, 3, 0}, {3, 1}, {2}, {}} {
		m, _ := newManager(t)
		s := open(t, m, nil)
		ctx := withoutTimers(t)
		var calls [5]held
		for i := range calls {
			calls[i] = holds(ctx, s)
		}
		for _, i := range order {
			close(calls[i].leave)
			require.NoError(t, <-calls[i].result)
		}
		for _, i := range order {
			require.Eventually(t, func() bool { runtime.GC(); return calls[i].value.Value() == nil }, 10*time.Second, time.Millisecond,
				"%v: what has left is held by nothing", order)
		}
		require.NoError(t, s.Kill(t.Context(), "admin"))
		for i, c := range calls {
			if !slices.Contains(order, i) {
				close(c.leave)
				require.ErrorIs(t, <-c.result, sessionmanager.ErrNotReady)
			}
		}
	}
}

// held is a call under way, and a value in its context.
type held struct {
	value  weak.Pointer[[64]byte]
	leave  chan struct{}
	result chan error
}

func holds(ctx context.Context, s *session) held {
	type key struct{}
	v := new([64]byte)
	h := held{weak.Make(v), make(chan struct{}), make(chan error, 1)}
	in := make(chan struct{})
	go func(ctx context.Context) {
		h.result <- s.Do(ctx, func(ctx context.Context, _ *fake) error {
			close(in)
			<-h.leave
			return ctx.Err()
		})
	}(context.WithValue(ctx, key{}, v))
	<-in
	return h
}

// One start after the other that never returns does not add up.
func TestShutdownWaitsForAllStartsAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, _ := newManager(t)
		for range 5 {
			go func() {
				_, err := m.Open(t.Context(), sessionmanager.Spec{}, func(context.Context, string) (*fake, error) {
					time.Sleep(time.Hour)
					return nil, errFn
				})
				assert.ErrorIs(t, err, sessionmanager.ErrClosed)
			}()
		}
		synctest.Wait()
		begun := time.Now()
		err := m.Shutdown(cancelledAfter(t.Context(), time.Second, nil))
		assert.Equal(t, 5, strings.Count(err.Error(), "start has not returned"))
		assert.Equal(t, 6100*time.Millisecond, time.Since(begun))
	})
}

// Calls go on while the worker shuts down, and their contexts end after it.
func TestShutdownOfAWorkerMayLetCallsFinish(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, _ := newManager(t)
		s := open(t, m, &fake{shutdown: stubborn(2*time.Second, nil)})
		var quick, slow error
		var wg sync.WaitGroup
		call := func(d time.Duration, err *error) {
			wg.Go(func() {
				*err = s.Do(t.Context(), func(ctx context.Context, _ *fake) error {
					select {
					case <-time.After(d):
						return nil
					case <-ctx.Done():
						return ctx.Err()
					}
				})
			})
		}
		call(time.Second, &quick)
		call(time.Minute, &slow)
		synctest.Wait()
		require.NoError(t, s.Close(t.Context()))
		wg.Wait()
		require.NoError(t, quick)
		require.ErrorIs(t, slow, sessionmanager.ErrNotReady)
	})
}

// Sweep's and Shutdown's closes run a few at a time.
func TestClosesRunInBoundedParallel(t *testing.T) {
	for name, end := range map[string]func(ctx context.Context, m *manager) error{
		"sweep":    func(ctx context.Context, m *manager) error { return second(m.Sweep(ctx, time.Now().Add(time.Hour))) },
		"shutdown": func(ctx context.Context, m *manager) error { return m.Shutdown(ctx) },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				m, _ := newManager(t, sessionmanager.WithMax(100), sessionmanager.WithParallel(10))
				var mu sync.Mutex
				now, most := 0, 0
				for range 100 {
					open(t, m, &fake{shutdown: func(context.Context) error {
						mu.Lock()
						now++
						most = max(most, now)
						mu.Unlock()
						time.Sleep(time.Second)
						mu.Lock()
						now--
						mu.Unlock()
						return nil
					}})
				}
				begun := time.Now()
				require.NoError(t, end(t.Context(), m))
				assert.Equal(t, 10, most)
				assert.Equal(t, 10*time.Second, time.Since(begun))
			})
		})
	}
}

// What a sweep has begun ends without it; what it has not, it leaves alone.
func TestSweepThatIsGivenUpLeavesNothingHalfClosed(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, b := newManager(t, sessionmanager.WithParallel(2))
		for range 6 {
			open(t, m, &fake{shutdown: stubborn(3*time.Second, nil)})
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		n, err := m.Sweep(ctx, time.Now().Add(time.Hour))
		assert.Zero(t, n)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		time.Sleep(2 * time.Second)
		synctest.Wait()
		assert.Len(t, b.reasons(), 2)
		for s := range m.All() {
			use(t, s)
		}
		assert.Equal(t, 4, m.Stats().Open)
		assert.Equal(t, 4, sweepAt(t, m, time.Now().Add(2*time.Hour)))
	})
}

func TestSweepAtAnyTime(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, _ := newManager(t)
		s := open(t, m, nil)
		for _, now := range []time.Time{{}, time.Unix(0, 0), time.Unix(-1<<40, 0), time.Now().Add(-time.Hour)} {
			assert.Zero(t, sweepAt(t, m, now))
		}
		use(t, s)
		assert.Equal(t, 1, sweepAt(t, m, time.Unix(1<<60, 0)))
	})
}

func TestRunSweepsUntilItIsEnded(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, b := newManager(t, sessionmanager.WithLease(time.Minute), sessionmanager.WithSweepInterval(10*time.Second))
		ctx, cancel := context.WithCancel(t.Context())
		ran := make(chan error, 1)
		go func() { ran <- m.Run(ctx) }()
		s := open(t, m, nil)
		fails := open(t, m, &fake{shutdown: func(context.Context) error { return errBroken }})
		time.Sleep(55 * time.Second)
		use(t, s)
		begun := time.Now()
		<-fails.Done()
		<-s.Done()
		assert.LessOrEqual(t, time.Since(begun), 70*time.Second, "lease and interval")
		assert.Len(t, b.reasons(), 2)
		cancel()
		require.ErrorIs(t, <-ran, context.Canceled)
		go func() { ran <- m.Run(t.Context()) }()
		synctest.Wait()
		require.NoError(t, m.Shutdown(t.Context()))
		require.NoError(t, <-ran, "it is over when there is nothing left to sweep")
	})
}

// Whether a worker is broken is asked in the time that it has to shut down.
func TestWorkerThatDoesNotSayHowItIsIsKilled(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, _ := newManager(t)
		w := &fake{state: func() error { time.Sleep(time.Hour); return nil }}
		s := open(t, m, w)
		begun := time.Now()
		require.ErrorIs(t, s.Close(t.Context()), sessionmanager.ErrClose)
		assert.Equal(t, 10*time.Second, time.Since(begun))
		_, kills := w.ledger()
		assert.Equal(t, 1, kills)
		assert.Zero(t, m.Stats().Sessions)
		time.Sleep(2 * time.Hour)
		shutdowns, _ := w.ledger()
		assert.Equal(t, 1, shutdowns)
	})
}

// A worker that asks its manager about itself, from anywhere, blocks nobody.
func TestCallbacksMayCallBack(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, _ := newManager(t)
		var s *session
		w := &fake{}
		w.shutdown = func(ctx context.Context) error {
			assert.ErrorIs(t, do(ctx, s), sessionmanager.ErrNotReady)
			m.Stats()
			return s.Close(ctx) // waits for itself, and gives up
		}
		w.kill = func(string) error {
			_, err := m.Get(s.ID(), "ann")
			return err
		}
		s = open(t, m, w)
		begun := time.Now()
		require.ErrorIs(t, s.Close(t.Context()), sessionmanager.ErrClose)
		assert.Equal(t, 10*time.Second, time.Since(begun))

		for range 100 {
			s = open(t, m, nil)
			require.NoError(t, s.Do(t.Context(), func(ctx context.Context, _ *fake) error {
				if err := do(ctx, s); err != nil {
					return err
				}
				return s.Close(ctx)
			}))
		}
		s = open(t, m, nil)
		require.NoError(t, s.Do(t.Context(), func(ctx context.Context, _ *fake) error { return m.Shutdown(ctx) }))
	})
}

func TestAllIsEverySessionWhoeverOwnsIt(t *testing.T) {
	m, _ := newManager(t)
	want := map[string]bool{}
	for _, owner := range []string{"", "ann", "bob"} {
		s, err := m.Open(t.Context(), sessionmanager.Spec{Owner: owner}, starts(&fake{}))
		require.NoError(t, err)
		want[s.ID()] = true
	}
	last := ""
	for s := range m.All() {
		assert.Less(t, last, s.ID())
		last = s.ID()
		delete(want, last)
	}
	assert.Empty(t, want)
	for range m.All() {
		break // is allowed
	}
}
