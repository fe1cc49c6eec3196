package sessionmanager_test

// What the tests share: a worker with a ledger that can be told to break, an
// observer that counts, and managers whose books are checked as their test ends.

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/sessionmanager"
)

var (
	errBroken = errors.New("the worker is broken, says https://user:hunter2@api.acme.test")
	errFn     = errors.New("paper jam")
)

// fake is a worker. Funcs that are nil do nothing and succeed.
type fake struct {
	shutdown func(ctx context.Context) error
	kill     func(reason string) error
	state    func() error // of Err; nil: broken, below

	mu        sync.Mutex
	broken    error
	shutdowns int
	good      int // Shutdowns that returned nil
	reasons   []string
}

func (w *fake) Shutdown(ctx context.Context) (err error) {
	w.mu.Lock()
	w.shutdowns++
	w.mu.Unlock()
	if w.shutdown != nil {
		err = w.shutdown(ctx)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if err == nil {
		w.good++
	}
	return err
}

func (w *fake) Kill(reason string) error {
	w.mu.Lock()
	w.reasons = append(w.reasons, reason)
	w.mu.Unlock()
	if w.kill != nil {
		return w.kill(reason)
	}
	return nil
}

func (w *fake) Err() error {
	if w.state != nil {
		return w.state()
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.broken
}

func (w *fake) breaks(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.broken = err
}

// ledger returns how often the worker was asked to shut down, and told to die.
func (w *fake) ledger() (shutdowns, kills int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.shutdowns, len(w.reasons)
}

func (w *fake) lastReason() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.reasons) == 0 {
		return ""
	}
	return w.reasons[len(w.reasons)-1]
}

type (
	manager = sessionmanager.Manager[*fake]
	session = sessionmanager.Session[*fake]
)

// starts returns a start that returns w.
func starts(w *fake) func(context.Context, string) (*fake, error) {
	return func(context.Context, string) (*fake, error) { return w, nil }
}

// books is an observer. It notes whatever could not be.
type books struct {
	mu     sync.Mutex
	events []sessionmanager.Event
	open   map[string]int // of each session: opened and not closed
	total  int
	most   int
	wrong  []string
}

func (b *books) Observe(_ context.Context, e sessionmanager.Event) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.open == nil {
		b.open = map[string]int{}
	}
	b.events = append(b.events, e)
	switch e.Kind {
	case sessionmanager.EventOpened:
		b.open[e.Session]++
		b.total++
	case sessionmanager.EventClosed:
		b.open[e.Session]--
		b.total--
	case sessionmanager.EventFaulted, sessionmanager.EventRefused, sessionmanager.EventDegraded:
		if e.Code == "" || e.Err == nil {
			b.wrong = append(b.wrong, fmt.Sprintf("%s without a cause", e.Kind))
		}
	default:
		b.wrong = append(b.wrong, fmt.Sprintf("an event of kind %q", e.Kind))
	}
	b.most = max(b.most, b.total)
	if n := b.open[e.Session]; n < 0 || n > 1 {
		b.wrong = append(b.wrong, fmt.Sprintf("%s is open %d times after %s", e.Session, n, e.Kind))
	}
	if b.open[e.Session] == 0 {
		delete(b.open, e.Session)
	}
	if e.Open < 0 {
		b.wrong = append(b.wrong, fmt.Sprintf("gauge %d", e.Open))
	}
}

// of returns the events of a kind.
func (b *books) of(kind string) (out []sessionmanager.Event) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, e := range b.events {
		if e.Kind == kind {
			out = append(out, e)
		}
	}
	return out
}

// gauge is opened less closed.
func (b *books) gauge() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.total
}

// reasons returns why sessions were closed.
func (b *books) reasons() []string {
	out := []string{}
	for _, e := range b.of(sessionmanager.EventClosed) {
		out = append(out, e.Reason)
	}
	return out
}

// faults returns what failed.
func (b *books) faults() []sessionmanager.Code {
	out := []sessionmanager.Code{}
	for _, e := range b.of(sessionmanager.EventFaulted) {
		out = append(out, e.Code)
	}
	return out
}

// newManager returns a manager and what it reports. When the test ends it is shut
// down, and its books must balance.
func newManager(t testing.TB, opts ...sessionmanager.Option) (*manager, *books) {
	t.Helper()
	b := &books{}
	m, err := sessionmanager.New[*fake](append([]sessionmanager.Option{sessionmanager.WithObserver(b)}, opts...)...)
	require.NoError(t, err)
	t.Cleanup(func() {
		for range 1000 { // a start that has not returned is not waited for
			if _ = m.Shutdown(context.WithoutCancel(t.Context())); m.Stats().Sessions == 0 {
				break
			}
		}
		balanced(t, m, b)
		assert.Zero(t, m.Stats().Sessions)
		assert.Zero(t, b.gauge())
	})
	return m, b
}

// balanced checks that manager and observer agree. Nothing may be under way.
func balanced(t testing.TB, m *manager, b *books) {
	t.Helper()
	st := m.Stats()
	b.mu.Lock()
	defer b.mu.Unlock()
	assert.Empty(t, b.wrong)
	assert.Equal(t, st.Open, b.total, "the gauge")
	assert.Equal(t, int(st.Opened-st.Closed), st.Open)
	n := map[string]uint64{}
	for _, e := range b.events {
		n[e.Kind]++
	}
	assert.Equal(t, [...]uint64{st.Opened, st.Closed, st.Faulted, st.Refused}, [...]uint64{
		n[sessionmanager.EventOpened], n[sessionmanager.EventClosed], n[sessionmanager.EventFaulted], n[sessionmanager.EventRefused],
	}, "opened, closed, faulted, refused")
}

// open opens a session on w; nil: one that does as it is told.
func open(t testing.TB, m *manager, w *fake) *session {
	t.Helper()
	if w == nil {
		w = &fake{}
	}
	s, err := m.Open(t.Context(), sessionmanager.Spec{Owner: "ann"}, starts(w))
	require.NoError(t, err)
	return s
}

func use(t testing.TB, s *session) {
	t.Helper()
	require.NoError(t, do(t.Context(), s))
}

func do(ctx context.Context, s *session) error {
	return s.Do(ctx, func(context.Context, *fake) error { return nil })
}

// occupies has a call under way in s until leave is called, which returns its error.
func occupies(t testing.TB, s *session, fn func(context.Context, *fake) error) (leave func() error) {
	t.Helper()
	in, out, result := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	go func() {
		result <- s.Do(t.Context(), func(ctx context.Context, w *fake) error {
			close(in)
			<-out
			if fn == nil {
				return nil
			}
			return fn(ctx, w)
		})
	}()
	<-in
	var once sync.Once
	return func() error {
		once.Do(func() { close(out) })
		return <-result
	}
}

// untilDone blocks until ctx ends, as a worker's method may.
func untilDone(ctx context.Context) error {
	<-ctx.Done()
	return ctx.Err()
}

// stubborn returns a func that ignores its context for d.
func stubborn(d time.Duration, err error) func(context.Context) error {
	return func(context.Context) error { time.Sleep(d); return err }
}

// sweep sweeps at the clock's time and returns how many were closed.
func sweep(t testing.TB, m *manager) int {
	t.Helper()
	n, err := m.Sweep(t.Context(), time.Now())
	require.NoError(t, err)
	return n
}

// code returns the code of err, "" for none.
func code(err error) sessionmanager.Code {
	var e *sessionmanager.Error
	if !errors.As(err, &e) {
		return ""
	}
	return e.Code
}

// exit ends its goroutine, as t.FailNow in a callback does.
func exit() { runtime.Goexit() }

// bubble runs f under a fake clock, and then lets come back what was left behind.
func bubble(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		t.Cleanup(func() { time.Sleep(3 * time.Hour) })
		f(t)
	})
}
