package sessionmanager_test

// What is refused before anything is done, what is taken for granted where nothing
// is said, and what is told of it all.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/sessionmanager"
)

func TestWrongOptionsAreReportedAllAtOnce(t *testing.T) {
	var none *redis.Client
	var nobody observer
	long := strings.Repeat("hunter2", 200)
	type option = sessionmanager.Option
	wrong := map[string][]option{}
	for name, with := range map[string]func(time.Duration) option{
		"WithLease": sessionmanager.WithLease, "WithSweepInterval": sessionmanager.WithSweepInterval,
		"WithCallTimeout": sessionmanager.WithCallTimeout, "WithStartTimeout": sessionmanager.WithStartTimeout,
		"WithShutdownTimeout": sessionmanager.WithShutdownTimeout, "WithKillTimeout": sessionmanager.WithKillTimeout,
		"WithSlotTTL": sessionmanager.WithSlotTTL, "WithOpTimeout": sessionmanager.WithOpTimeout, "WithGrace": sessionmanager.WithGrace,
	} {
		for _, d := range []time.Duration{-1, 1, time.Millisecond - 1, 24*time.Hour + 1, math.MaxInt64, math.MinInt64} {
			wrong[name] = append(wrong[name], with(d))
		}
		if name != "WithGrace" {
			wrong[name] = append(wrong[name], with(0))
		}
	}
	for name, with := range map[string]func(int) option{
		"WithMax": sessionmanager.WithMax, "WithPending": sessionmanager.WithPending,
		"WithListeners": sessionmanager.WithListeners, "WithParallel": sessionmanager.WithParallel,
	} {
		wrong[name] = []option{with(0), with(-1), with(math.MinInt)}
	}
	wrong["WithParallel"] = append(wrong["WithParallel"], sessionmanager.WithParallel(math.MaxInt), sessionmanager.WithParallel(10_001))
	rdb := redis.NewClient(&redis.Options{Addr: "127.0.0.1:1"})
	defer rdb.Close()
	wrong["WithFleetMax"] = []option{
		sessionmanager.WithFleetMax(nil, "a", 1), sessionmanager.WithFleetMax(none, "a", 1), sessionmanager.WithFleetMax(rdb, "", 1),
		sessionmanager.WithFleetMax(rdb, " ", 1), sessionmanager.WithFleetMax(rdb, long, 1), sessionmanager.WithFleetMax(rdb, "a", 0),
		sessionmanager.WithFleetMax(rdb, "a", -1),
	}
	wrong["WithNamespace"] = []option{sessionmanager.WithNamespace(long)}
	wrong["WithKeySecret"] = []option{sessionmanager.WithKeySecret(nil), sessionmanager.WithKeySecret([]byte("hunter2"))}
	wrong["WithObserver"] = []option{sessionmanager.WithObserver(nil), sessionmanager.WithObserver(nobody)}
	wrong["WithLogger"] = []option{sessionmanager.WithLogger(nil)}
	wrong["an Option is nil"] = []option{nil}

	var all []option
	for name, opts := range wrong {
		for i, opt := range opts {
			m, err := sessionmanager.New[*fake](opt)
			assert.Nil(t, m)
			require.ErrorIs(t, err, sessionmanager.ErrInvalid, "%s, %d", name, i)
			assert.ErrorContains(t, err, name)
			assert.NotContains(t, err.Error(), "hunter2")
			assert.NotContains(t, err.Error(), "\n", "one thing is wrong")
		}
		all = append(all, opts[0])
	}
	_, err := sessionmanager.New[*fake](all...)
	for name := range wrong {
		assert.ErrorContains(t, err, name)
	}
	_, err = sessionmanager.New[*fake](sessionmanager.WithSlotTTL(2*time.Second), sessionmanager.WithOpTimeout(time.Second))
	assert.ErrorContains(t, err, "three times")
}

func TestExtremeOptionsThatAreRight(t *testing.T) {
	for _, opts := range [][]sessionmanager.Option{
		nil,
		{sessionmanager.WithMax(math.MaxInt), sessionmanager.WithPending(math.MaxInt), sessionmanager.WithListeners(math.MaxInt), sessionmanager.WithParallel(10_000)},
		{sessionmanager.WithGrace(0), sessionmanager.WithLease(time.Millisecond), sessionmanager.WithSweepInterval(24 * time.Hour)},
		{sessionmanager.WithMax(1), sessionmanager.WithMax(1)},
		{sessionmanager.WithSlotTTL(3 * time.Second), sessionmanager.WithOpTimeout(time.Second)},
		{sessionmanager.WithKeySecret([]byte("16 bytes of this")), sessionmanager.WithNamespace("")},
	} {
		m, _ := newManager(t, opts...)
		require.NoError(t, open(t, m, nil).Close(t.Context()))
	}
}

func TestDefaults(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, b := newManager(t)
		for range 64 {
			open(t, m, nil)
		}
		_, err := m.Open(t.Context(), sessionmanager.Spec{}, starts(&fake{}))
		require.ErrorIs(t, err, sessionmanager.ErrLimit)

		s := first(m)
		var leave []func() error
		for range 128 {
			leave = append(leave, occupies(t, s, nil))
		}
		require.ErrorIs(t, do(t.Context(), s), sessionmanager.ErrBusy)
		for _, leave := range leave {
			require.NoError(t, leave())
		}
		var detach []func()
		for range 8 {
			_, d, err := s.Attach()
			require.NoError(t, err)
			detach = append(detach, d)
		}
		_, _, err = s.Attach()
		require.ErrorIs(t, err, sessionmanager.ErrBusy)
		for _, d := range detach {
			d()
		}
		runs(t, m)
		begun := time.Now()
		<-s.Done()
		assert.Equal(t, 30*time.Second, time.Since(begun), "grace and sweep")
		for m.Stats().Sessions > 0 {
			time.Sleep(time.Second)
		}
		assert.InDelta(t, 1800, time.Since(begun).Seconds(), 31, "lease and sweep")
		assert.Contains(t, b.reasons(), sessionmanager.ReasonDetached)
		assert.Contains(t, b.reasons(), sessionmanager.ReasonLease)
	})
}

func TestWrongArgumentsAreRefusedBeforeAnythingIsDone(t *testing.T) {
	m, b := newManager(t)
	s := open(t, m, nil)
	var noCtx context.Context
	ctx := t.Context()
	var zero manager
	var nobody *manager
	var none *session
	var empty session
	started := func(context.Context, string) (*fake, error) { assert.Fail(t, "started"); return &fake{}, nil }
	spec := func(spec sessionmanager.Spec) error { return second(m.Open(ctx, spec, started)) }
	fn := func(context.Context, *fake) error { assert.Fail(t, "called"); return nil }
	attach := func(s *session) error { _, _, err := s.Attach(); return err }
	long := strings.Repeat("hunter2", 40)
	for name, err := range map[string]error{
		"Open without a context":         second(m.Open(noCtx, sessionmanager.Spec{}, started)),
		"Open without a start":           second(m.Open(ctx, sessionmanager.Spec{}, nil)),
		"Open with a blank id":           spec(sessionmanager.Spec{ID: " \t"}),
		"Open with a long id":            spec(sessionmanager.Spec{ID: long}),
		"Open with a long owner":         spec(sessionmanager.Spec{Owner: long}),
		"Open with a long name":          spec(sessionmanager.Spec{Name: long}),
		"Open with a name of two lines":  spec(sessionmanager.Spec{Name: "hunter2\nlevel=ERROR"}),
		"Open with a timeout of a day":   spec(sessionmanager.Spec{Timeout: 24*time.Hour + 1}),
		"Open with a timeout of nothing": spec(sessionmanager.Spec{Timeout: 1}),
		"Open of the zero manager":       second(zero.Open(ctx, sessionmanager.Spec{}, started)),
		"Open of no manager":             second(nobody.Open(ctx, sessionmanager.Spec{}, started)),
		"Get of the zero manager":        second(zero.Get("x", "")),
		"Get of no manager":              second(nobody.Get("x", "")),
		"Do without a context":           s.Do(noCtx, fn),
		"Do without a func":              s.Do(ctx, nil),
		"Do of no session":               none.Do(ctx, fn),
		"Do of the zero session":         empty.Do(ctx, fn),
		"Call without a func":            second(sessionmanager.Call[*fake, int](ctx, s, nil)),
		"Attach to no session":           attach(none),
		"Close without a context":        s.Close(noCtx),
		"Close of no session":            none.Close(ctx),
		"Close of the zero session":      empty.Close(ctx),
		"Kill without a context":         s.Kill(noCtx, "admin"),
		"Kill without a reason":          s.Kill(ctx, ""),
		"Kill with a long reason":        s.Kill(ctx, long),
		"Kill of no session":             none.Kill(ctx, ""),
		"Sweep without a context":        second(m.Sweep(noCtx, time.Now())),
		"Sweep of the zero manager":      second(zero.Sweep(ctx, time.Now())),
		"Run without a context":          m.Run(noCtx),
		"Shutdown without a context":     m.Shutdown(noCtx),
		"Shutdown of no manager":         nobody.Shutdown(ctx),
	} {
		require.ErrorIs(t, err, sessionmanager.ErrInvalid, name)
		assert.NotContains(t, err.Error(), "hunter2", name)
	}
	use(t, s)
	assert.Equal(t, sessionmanager.Stats{Sessions: 1, Open: 1, Opened: 1}, m.Stats())
	assert.Len(t, b.of(sessionmanager.EventOpened), 1)
	assert.Empty(t, b.faults())

	err := spec(sessionmanager.Spec{ID: " ", Owner: long})
	assert.ErrorContains(t, err, "id is blank")
	assert.ErrorContains(t, err, "owner is over", "all at once")
}

func TestAnyBytesAreAnIDAndAnOwner(t *testing.T) {
	m, _ := newManager(t)
	for _, id := range []string{"\x00", "\xff", "{}", "a}b{c", ":", "*?[", "\r\nx", "../", "é", "e\u0301", " x ", strings.Repeat("x", 256)} {
		s, err := m.Open(t.Context(), sessionmanager.Spec{ID: id, Owner: id}, starts(&fake{}))
		require.NoError(t, err, "%q", id)
		got, err := m.Get(id, id)
		require.NoError(t, err)
		assert.Same(t, s, got)
		assert.Regexp(t, "^client-[A-Za-z0-9_-]{8}$", s.Name())
		if strings.ContainsAny(id, "{}:*?[]\r\n/\x00 ") || len(id) > 3 {
			assert.NotContains(t, s.Name(), id)
		}
	}
	assert.Equal(t, 12, m.Stats().Open)
}

func TestCallReturnsAResultOrAnError(t *testing.T) {
	m, _ := newManager(t)
	s := open(t, m, nil)
	got, err := sessionmanager.Call(t.Context(), s, func(context.Context, *fake) (int, error) { return 42, nil })
	require.NoError(t, err)
	assert.Equal(t, 42, got)
	got, err = sessionmanager.Call(t.Context(), s, func(context.Context, *fake) (int, error) { return 42, errFn })
	require.ErrorIs(t, err, errFn)
	assert.Zero(t, got)
}

// Texts of all kinds of errors, for log lines: they name the session, say what is
// known, and quote nothing.
func TestErrorsInWords(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, _ := newManager(t, sessionmanager.WithMax(3), sessionmanager.WithPending(1), sessionmanager.WithListeners(1))
		named := func(name string, start func(context.Context, string) (*fake, error)) (*session, error) {
			return m.Open(t.Context(), sessionmanager.Spec{ID: name, Name: name}, start)
		}
		s, err := named("a", starts(&fake{}))
		require.NoError(t, err)
		id := func(name string) string { return name + "-" + m.LogID(name) }
		leave := occupies(t, s, nil)
		_, _, err = s.Attach()
		require.NoError(t, err)
		over, cancel := context.WithCancel(t.Context())
		cancel()
		_, _, attached := s.Attach()
		expected := map[string]error{
			"sessionmanager: do " + id("a") + ": session busy: 1 calls under way":                                                  do(t.Context(), s),
			"sessionmanager: attach " + id("a") + ": session busy: 1 listeners":                                                    attached,
			"sessionmanager: open: session not opened: cancelled":                                                                  second(m.Open(over, sessionmanager.Spec{Name: "z"}, starts(&fake{}))),
			"sessionmanager: close " + id("a") + ": context canceled":                                                              s.Close(over),
			"sessionmanager: open " + id("a") + ": session not opened: the id is taken":                                            second(named("a", starts(&fake{}))),
			"sessionmanager: open " + id("b") + ": session not opened: failed (*errors.errorString)":                               second(named("b", func(context.Context, string) (*fake, error) { return nil, errBroken })),
			"sessionmanager: open " + id("b") + ": session not opened: panic with a value of type string":                          second(named("b", func(context.Context, string) (*fake, error) { panic("x") })),
			"sessionmanager: open " + id("b") + ": session not opened: goroutine ended (runtime.Goexit)":                           second(named("b", func(context.Context, string) (*fake, error) { exit(); return nil, nil })),
			"sessionmanager: open " + id("b") + ": session not opened: start returned no worker":                                   second(named("b", starts(nil))),
			"sessionmanager: open " + id("b") + ": session not opened: start timed out":                                            second(named("b", func(ctx context.Context, _ string) (*fake, error) { return nil, untilDone(ctx) })),
			"sessionmanager: open " + id("b") + ": session not opened: start has not returned and is left behind: start timed out": second(named("b", func(context.Context, string) (*fake, error) { time.Sleep(time.Hour); return nil, nil })),
			"sessionmanager: get " + m.LogID("nobody") + ": session not found":                                                     second(m.Get("nobody", "")),
		}
		require.NoError(t, leave())
		_, err = named("c", starts(&fake{}))
		require.NoError(t, err)
		expected["sessionmanager: open "+id("d")+": too many sessions: 3 in this process"] = second(named("d", starts(&fake{})))
		w := &fake{shutdown: func(context.Context) error { return errBroken }}
		c, err := m.Get("c", "")
		require.NoError(t, err)
		require.NoError(t, c.Close(t.Context()))
		c, err = named("c", starts(w))
		require.NoError(t, err)
		expected["sessionmanager: close "+id("c")+": session not closed cleanly: shut down: failed (*errors.errorString); killed"] = c.Close(t.Context())
		immortal, err := named("d", starts(&fake{
			shutdown: func(ctx context.Context) error { return untilDone(ctx) },
			kill:     func(string) error { return errBroken },
		}))
		require.NoError(t, err)
		err = immortal.Close(t.Context())
		require.ErrorIs(t, err, errBroken)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		expected["sessionmanager: close "+id("d")+": session not closed cleanly: shut down: timed out; kill: failed (*errors.errorString)"] = err
		for text, err := range expected {
			assert.EqualError(t, err, text)
			var e *sessionmanager.Error
			if errors.As(err, &e) {
				assert.Equal(t, !strings.Contains(text, "open:"), e.Session != "")
			}
		}
		require.NoError(t, s.Close(t.Context()))
		assert.EqualError(t, do(t.Context(), s), "sessionmanager: do "+id("a")+": session not ready: session closed, worker ended")
	})
}

func TestCodesMatchTheirErrors(t *testing.T) {
	for code, want := range map[sessionmanager.Code]error{
		sessionmanager.CodeLimit: sessionmanager.ErrLimit, sessionmanager.CodeNotFound: sessionmanager.ErrNotFound,
		sessionmanager.CodeNotReady: sessionmanager.ErrNotReady, sessionmanager.CodeBusy: sessionmanager.ErrBusy,
		sessionmanager.CodeOpenFailed: sessionmanager.ErrOpen, sessionmanager.CodeCloseFailed: sessionmanager.ErrClose,
		sessionmanager.CodeFaulted: sessionmanager.ErrFaulted, sessionmanager.CodeClosed: sessionmanager.ErrClosed,
		sessionmanager.CodeUnavailable: sessionmanager.ErrUnavailable,
	} {
		err := &sessionmanager.Error{Code: code, Err: errFn}
		require.ErrorIs(t, err, want)
		require.ErrorIs(t, err, errFn)
		for other, no := range map[sessionmanager.Code]error{sessionmanager.CodeLimit: sessionmanager.ErrLimit, sessionmanager.CodeBusy: sessionmanager.ErrBusy} {
			if other != code {
				require.NotErrorIs(t, err, no)
			}
		}
	}
	var p *sessionmanager.PanicError
	assert.False(t, errors.As(&sessionmanager.Error{Code: sessionmanager.CodeLimit}, &p), "one without a cause") //nolint:testifylint // which must not panic
	assert.Equal(t, "ready", sessionmanager.StateReady.String())
	assert.Equal(t, "faulted", sessionmanager.StateFaulted.String())
	assert.Equal(t, "State(6)", (sessionmanager.StateFaulted + 1).String())
}

// What is logged names sessions by their names, and nothing that is nobody's business.
func TestLogTellsWhatBecameOfSessions(t *testing.T) {
	var out bytes.Buffer
	logger := slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		switch a.Key {
		case slog.TimeKey:
			return slog.Attr{}
		case "took":
			return slog.String("took", "long")
		}
		return a
	}}))
	m, _ := newManager(t, sessionmanager.WithLogger(logger), sessionmanager.WithMax(1))
	spec := sessionmanager.Spec{ID: "hunter2", Name: "bob", Owner: "hunter2"}
	w := &fake{shutdown: func(context.Context) error { return errBroken }}
	s, err := m.Open(t.Context(), spec, starts(w))
	require.NoError(t, err)
	_, err = m.Open(t.Context(), sessionmanager.Spec{}, starts(w))
	require.ErrorIs(t, err, sessionmanager.ErrLimit) // is for its caller to log
	_ = s.Do(t.Context(), func(context.Context, *fake) error { panic("hunter2") })
	require.Error(t, s.Close(t.Context()))
	_, err = m.Open(t.Context(), spec, func(context.Context, string) (*fake, error) { return nil, errBroken })
	require.Error(t, err)
	name := s.Name()
	assert.Equal(t, fmt.Sprintf(`level=INFO msg="sessionmanager: opened" open=1 session=%s took=long
level=WARN msg="sessionmanager: faulted" open=1 session=%s code=faulted error="sessionmanager: fault %s: session faulted: panic with a value of type string"
level=INFO msg="sessionmanager: closed" open=0 session=%s reason=client-close took=long
level=WARN msg="sessionmanager: faulted" open=0 session=%s code=close_failed error="sessionmanager: close %s: session not closed cleanly: shut down: failed (*errors.errorString); killed"
level=WARN msg="sessionmanager: faulted" open=0 session=%s code=open_failed error="sessionmanager: open %s: session not opened: failed (*errors.errorString)"
`, name, name, name, name, name, name, name, name), out.String())
}

// bomb is a log handler that does not work.
type bomb struct{ slog.Handler }

func (bomb) Enabled(context.Context, slog.Level) bool  { return true }
func (bomb) Handle(context.Context, slog.Record) error { panic("as always") }
func (b bomb) WithAttrs([]slog.Attr) slog.Handler      { return b }

func TestPanicOfALoggerHarmsNobody(t *testing.T) {
	m, b := newManager(t, sessionmanager.WithLogger(slog.New(bomb{})))
	s := open(t, m, nil)
	require.NoError(t, s.Close(t.Context()))
	assert.Len(t, b.reasons(), 1, "the observer is told all the same")
}

func TestEventsSayHowLongItTook(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, b := newManager(t)
		s, err := m.Open(t.Context(), sessionmanager.Spec{}, func(context.Context, string) (*fake, error) {
			time.Sleep(2 * time.Second)
			return &fake{}, nil
		})
		require.NoError(t, err)
		time.Sleep(time.Minute)
		require.NoError(t, s.Close(t.Context()))
		opened, closed := b.of(sessionmanager.EventOpened), b.of(sessionmanager.EventClosed)
		assert.Equal(t, sessionmanager.Event{Kind: "opened", Session: s.Name(), Duration: 2 * time.Second, Open: 1}, opened[0])
		assert.Equal(t, sessionmanager.Event{Kind: "closed", Session: s.Name(), Reason: sessionmanager.ReasonClient, Duration: time.Minute}, closed[0])
	})
}
