package sessionrelay_test

// What is refused before anything is done.

import (
	"context"
	"math"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/sessionrelay"
)

func TestWrongOptionsAreReportedAllAtOnce(t *testing.T) {
	type option = sessionrelay.Option
	const ok = time.Minute
	wrong := map[string][]option{
		"WithLimit":    {sessionrelay.WithLimit(0), sessionrelay.WithLimit(-1), sessionrelay.WithLimit(math.MinInt)},
		"WithAttempts": {sessionrelay.WithAttempts(0, ok), sessionrelay.WithAttempts(-1, ok), sessionrelay.WithAttempts(math.MinInt, ok)},
		"WithObserver": {sessionrelay.WithObserver(nil)},
		"WithLogger":   {sessionrelay.WithLogger(nil)},
		"an option":    {nil},
	}
	for _, d := range []time.Duration{0, -1, 1, time.Millisecond - 1, math.MinInt64} {
		for name, o := range map[string]option{
			"WithTimeout": sessionrelay.WithTimeout(d), "WithPatience": sessionrelay.WithPatience(d), "WithAttempts: pause": sessionrelay.WithAttempts(1, d),
			"WithIntervals: alive": sessionrelay.WithIntervals(d, ok, ok), "WithIntervals: expire": sessionrelay.WithIntervals(ok, d, ok),
			"WithIntervals: scavenge": sessionrelay.WithIntervals(ok, ok, d),
		} {
			wrong[name] = append(wrong[name], o)
		}
	}
	store := &spy{Store: new(sessionrelay.Memory).Store("a")}
	store.on("", func(context.Context) error { assert.Fail(t, "asked"); return nil })
	var all []option
	for name, options := range wrong {
		for i, o := range options {
			n, err := sessionrelay.New(store, o)
			require.ErrorIs(t, err, sessionrelay.ErrInvalid, "%s, %d", name, i)
			require.ErrorContains(t, err, name)
			assert.NotContains(t, err.Error(), "\n", "one problem")
			assert.Nil(t, n)
			all = append(all, o)
		}
	}
	all = append(all, sessionrelay.WithAttempts(0, 0), sessionrelay.WithIntervals(0, 0, 0))
	_, err := sessionrelay.New(nil, all...)
	require.ErrorIs(t, err, sessionrelay.ErrInvalid)
	require.ErrorContains(t, err, "store is nil")
	for name := range wrong {
		require.ErrorContains(t, err, name)
	}
}

func TestOptionsAtTheirLimitsAreTaken(t *testing.T) {
	store := new(sessionrelay.Memory).Store("a")
	ms := time.Millisecond
	for _, o := range []sessionrelay.Option{
		sessionrelay.WithLimit(1), sessionrelay.WithAttempts(1, ms), sessionrelay.WithPatience(ms), sessionrelay.WithIntervals(ms, ms, ms),
		sessionrelay.WithTimeout(2*54*time.Second + 1), sessionrelay.WithIntervals(36*time.Hour-1, time.Hour, time.Hour),
	} {
		_, err := sessionrelay.New(store, o)
		require.NoError(t, err)
	}
	for _, o := range []sessionrelay.Option{sessionrelay.WithTimeout(2 * 54 * time.Second), sessionrelay.WithIntervals(36*time.Hour, time.Hour, time.Hour)} {
		_, err := sessionrelay.New(store, o)
		require.ErrorIs(t, err, sessionrelay.ErrInvalid, "no session would live from one sign of life to the next but one")
	}
}

func TestStoreIsRequired(t *testing.T) {
	var none *spy
	for _, s := range []sessionrelay.Store{nil, none} {
		n, err := sessionrelay.New(s)
		require.ErrorIs(t, err, sessionrelay.ErrInvalid)
		assert.Nil(t, n)
	}
}

func TestWrongArgumentsAreRefusedBeforeAnythingIsDone(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		ctx := t.Context()
		var none context.Context
		long := strings.Repeat("x", 257)
		huge := make([]byte, 1<<20+1)
		a, store := f.node("a")
		runs(t, a)
		var c client
		conn := comes(t, a, &c)
		session := conn.Session()
		synctest.Wait()
		told := f.kinds()
		store.on("", func(context.Context) error { assert.Fail(t, "the store was asked"); return nil })

		type hello = sessionrelay.Hello
		connect := func(ctx context.Context, h hello) func() error {
			return func() error {
				c, err := a.Connect(ctx, h, new(client).send)
				assert.Nil(t, c)
				return err
			}
		}
		send := func(ctx context.Context, session string, payload []byte) func() error {
			return func() error {
				id, err := a.Send(ctx, session, payload)
				assert.Empty(t, id)
				return err
			}
		}
		request := func(ctx context.Context, session string, payload, correlation []byte) func() error {
			return func() error {
				id, err := a.Request(ctx, session, payload, correlation)
				assert.Empty(t, id)
				return err
			}
		}
		receive := func(ctx context.Context, id string) func() error {
			return func() error {
				reply, err := conn.Receive(ctx, id, never(t))
				assert.Nil(t, reply)
				return err
			}
		}
		answered := func(ctx context.Context, id string) func() error {
			return func() error {
				_, first, err := conn.Answered(ctx, id)
				assert.False(t, first)
				return err
			}
		}
		calls := map[string]func() error{
			"Connect: nil context": connect(none, hello{User: "bob"}), "Connect: nobody": connect(ctx, hello{}),
			"Connect: blank user": connect(ctx, hello{User: " \t"}), "Connect: long user": connect(ctx, hello{User: long}),
			"Connect: blank session": connect(ctx, hello{User: "bob", Session: " "}), "Connect: long session": connect(ctx, hello{User: "bob", Session: long}),
			"Connect: long lib": connect(ctx, hello{User: "bob", Lib: long}), "Connect: long app": connect(ctx, hello{User: "bob", App: long}),
			"Connect: long version": connect(ctx, hello{User: "bob", Version: long}),
			"Connect: nil func":     func() error { _, err := a.Connect(ctx, hello{User: "bob"}, nil); return err },
			"Send: nil context":     send(none, session, nil), "Send: no session": send(ctx, "", nil), "Send: blank session": send(ctx, " ", nil),
			"Send: long session": send(ctx, long, nil), "Send: huge payload": send(ctx, session, huge),
			"Request: nil context": request(none, session, nil, nil), "Request: no session": request(ctx, "", nil, nil),
			"Request: long session": request(ctx, long, nil, nil), "Request: huge payload": request(ctx, session, huge, nil),
			"Request: huge correlation": request(ctx, session, nil, huge), "Request: huge together": request(ctx, session, huge[1<<19:], huge[:1<<19]),
			"Remove: nil context": func() error { return a.Remove(none, session) }, "Remove: no session": func() error { return a.Remove(ctx, "") },
			"Remove: long session": func() error { return a.Remove(ctx, long) },
			"Run: nil context":     func() error { return a.Run(none) }, "Run: again": func() error { return a.Run(ctx) },
			"Receive: nil context": receive(none, "m"), "Receive: no id": receive(ctx, ""), "Receive: blank id": receive(ctx, "\n"),
			"Receive: long id":    receive(ctx, long),
			"Receive: nil func":   func() error { _, err := conn.Receive(ctx, "m", nil); return err },
			"Acked: nil context":  func() error { return conn.Acked(none) },
			"Acked: no id":        func() error { return conn.Acked(ctx, "m", "") },
			"Acked: long id":      func() error { return conn.Acked(ctx, "m", long) },
			"Forget: nil context": func() error { return conn.Forget(none) },
			"Forget: no id":       func() error { return conn.Forget(ctx, "m", " ") },
			"Forget: long id":     func() error { return conn.Forget(ctx, "m", long) },
			"Answered: no id":     answered(ctx, ""), "Answered: long id": answered(ctx, long), "Answered: nil context": answered(none, "m"),
		}
		for what, call := range calls {
			err := call()
			require.ErrorIs(t, err, sessionrelay.ErrInvalid, what)
			assert.NotContains(t, err.Error(), "xxx", what)
		}
		store.on("", nil)
		assert.Equal(t, told, f.kinds())
		lives(t, conn)
		assert.Empty(t, c.received())
	})
}

func TestWhatIsWrongIsSaidAllAtOnce(t *testing.T) {
	n, err := sessionrelay.New(new(sessionrelay.Memory).Store("a"))
	require.NoError(t, err)
	long := strings.Repeat("x", 257)
	_, err = n.Connect(nil, sessionrelay.Hello{Session: " ", Lib: long, App: long, Version: long}, nil) //nolint:staticcheck // the case
	for _, what := range []string{"context", "user", "session", "lib", "app", "version", "func"} {
		require.ErrorContains(t, err, what)
	}
}

func TestNamesAndPayloadsAtTheirLimitsAreTaken(t *testing.T) {
	onEach(t, func(t *testing.T, f *fleet) {
		ctx := t.Context()
		longest := strings.Repeat("é", 128)
		a, _ := f.node("a")
		var c client
		conn, err := a.Connect(ctx, sessionrelay.Hello{User: longest, Lib: longest, App: longest, Version: longest}, c.send)
		require.NoError(t, err)
		big := []byte(strings.Repeat("x", 1<<20))
		_, err = a.Send(ctx, conn.Session(), big)
		require.NoError(t, err)
		_, err = a.Request(ctx, conn.Session(), big[:1<<19], big[:1<<19])
		require.NoError(t, err)
		_, err = a.Send(ctx, conn.Session(), nil)
		require.NoError(t, err)
		gets(t, &c, string(big), string(big[:1<<19]), "")
		reply, err := conn.Receive(ctx, longest, says("ok"))
		require.NoError(t, err)
		assert.Equal(t, "ok", string(reply))
		require.NoError(t, conn.Forget(ctx, longest))
		require.NoError(t, conn.Acked(ctx, longest))
	})
}
