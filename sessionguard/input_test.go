package sessionguard_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/internal/redistest"
	"github.com/sessionlock/sessionlock/sessionguard"
)

// unused returns a client that counts its attempts to connect, all of which fail.
func unused(t *testing.T) (rdb *redis.Client, dials *atomic.Int64) {
	t.Helper()
	dials = new(atomic.Int64)
	rdb = redis.NewClient(&redis.Options{Dialer: func(context.Context, string, string) (net.Conn, error) {
		dials.Add(1)
		return nil, errors.New("not in this test")
	}})
	t.Cleanup(func() {
		_ = rdb.Close()
		assert.Zero(t, dials.Load(), "an argument was wrong, and Redis was asked")
	})
	return rdb, dials
}

// nilStore is a store that may be nil inside its interface.
type nilStore struct{ sessionguard.MemoryStore }

// values is a store that no pointer is needed for.
type values struct{ sessionguard.Store }

func TestNewReportsWhatIsWrong(t *testing.T) {
	rdb, _ := unused(t)
	cluster := redis.NewClusterClient(&redis.ClusterOptions{Addrs: []string{"127.0.0.1:1"}})
	ring := redis.NewRing(&redis.RingOptions{Addrs: map[string]string{"a": "127.0.0.1:1"}})
	t.Cleanup(func() { _ = cluster.Close(); _ = ring.Close() })
	var (
		noClient  *redis.Client
		noCluster *redis.ClusterClient
		noStore   *nilStore
		noHandler http.HandlerFunc
	)
	memory := sessionguard.WithStore(new(sessionguard.MemoryStore))
	events := sessionguard.WithKeyspaceEvents()
	type opts = []sessionguard.Option
	for name, c := range map[string]struct {
		rdb  redis.UniversalClient
		opts opts
		want []string // one for each problem
	}{
		"nothing":                  {nil, nil, []string{"no store"}},
		"typed nil client":         {noClient, nil, []string{"no store"}},
		"typed nil cluster":        {noCluster, nil, []string{"no store"}},
		"two stores":               {rdb, opts{memory}, []string{"two stores"}},
		"nil store":                {nil, opts{sessionguard.WithStore(nil)}, []string{"WithStore", "no store"}},
		"nil store with a client":  {rdb, opts{sessionguard.WithStore(nil)}, []string{"WithStore"}},
		"typed nil store":          {nil, opts{sessionguard.WithStore(noStore)}, []string{"WithStore: store is nil"}},
		"nil option":               {rdb, opts{nil}, []string{"an option is nil"}},
		"nil options":              {rdb, opts{nil, sessionguard.WithTTL(time.Minute), nil}, []string{"an option is nil", "an option is nil"}},
		"no secret":                {rdb, opts{sessionguard.WithKeySecret(nil)}, []string{"WithKeySecret: fewer than 16"}},
		"short secret":             {rdb, opts{sessionguard.WithKeySecret([]byte("fifteen bytes!!"))}, []string{"WithKeySecret: fewer than 16"}},
		"nil handler":              {rdb, opts{sessionguard.WithConflict(nil)}, []string{"WithConflict"}},
		"typed nil handler":        {rdb, opts{sessionguard.WithConflict(noHandler)}, []string{"WithConflict"}},
		"events on a cluster":      {cluster, opts{events}, []string{"WithKeyspaceEvents"}},
		"events on a ring":         {ring, opts{events}, []string{"WithKeyspaceEvents"}},
		"events of another store":  {nil, opts{memory, events}, []string{"WithKeyspaceEvents"}},
		"ttl 0":                    {rdb, opts{sessionguard.WithTTL(0)}, []string{"WithTTL"}},
		"ttl -1":                   {rdb, opts{sessionguard.WithTTL(-1)}, []string{"WithTTL"}},
		"ttl too short":            {rdb, opts{sessionguard.WithTTL(100*time.Millisecond - 1)}, []string{"WithTTL"}},
		"ttl too long":             {rdb, opts{sessionguard.WithTTL(24*time.Hour + 1)}, []string{"WithTTL"}},
		"ttl endless":              {rdb, opts{sessionguard.WithTTL(math.MaxInt64)}, []string{"WithTTL"}},
		"op timeout 0":             {rdb, opts{sessionguard.WithOpTimeout(0)}, []string{"WithOpTimeout"}},
		"op timeout -1":            {rdb, opts{sessionguard.WithOpTimeout(-1)}, []string{"WithOpTimeout"}},
		"op timeout too short":     {rdb, opts{sessionguard.WithOpTimeout(999 * time.Microsecond)}, []string{"WithOpTimeout"}},
		"op timeout too long":      {rdb, opts{sessionguard.WithOpTimeout(time.Hour + 1)}, []string{"WithOpTimeout"}},
		"op timeout endless":       {rdb, opts{sessionguard.WithOpTimeout(math.MaxInt64)}, []string{"WithOpTimeout"}},
		"ttl below 3 op timeouts":  {rdb, opts{sessionguard.WithTTL(3*time.Second - 1)}, []string{"WithTTL: "}},
		"the other way round":      {rdb, opts{sessionguard.WithOpTimeout(10*time.Second + 1)}, []string{"WithTTL: "}},
		"everything at once":       {nil, opts{nil, sessionguard.WithTTL(0), sessionguard.WithOpTimeout(0), sessionguard.WithConflict(nil)}, []string{"an option is nil", "WithConflict", "no store", "WithTTL", "WithOpTimeout"}},
		"a nil store, then a good": {nil, opts{sessionguard.WithStore(nil), memory}, []string{"WithStore"}},
	} {
		t.Run(name, func(t *testing.T) {
			m, err := sessionguard.New(c.rdb, c.opts...)
			require.ErrorIs(t, err, sessionguard.ErrInvalid)
			assert.Nil(t, m)
			lines := strings.Split(err.Error(), "\n")
			require.Len(t, lines, len(c.want), err)
			for i, line := range lines {
				assert.Truef(t, strings.HasPrefix(line, "sessionguard: invalid argument: "+c.want[i]), "%q is not about %s", line, c.want[i])
			}
			assert.NotContains(t, err.Error(), "fifteen")
		})
	}
}

func TestNewAcceptsTheLimits(t *testing.T) {
	rdb, _ := unused(t)
	for name, opts := range map[string][]sessionguard.Option{
		"defaults":       nil,
		"shortest ttl":   {sessionguard.WithTTL(100 * time.Millisecond), sessionguard.WithOpTimeout(time.Millisecond)},
		"longest ttl":    {sessionguard.WithTTL(24 * time.Hour), sessionguard.WithOpTimeout(time.Hour)},
		"just thrice":    {sessionguard.WithTTL(3 * time.Second)},
		"shortest":       {sessionguard.WithKeySecret(make([]byte, 16))},
		"last one wins":  {sessionguard.WithTTL(time.Hour), sessionguard.WithTTL(time.Minute)},
		"any namespace":  {sessionguard.WithNamespace("\x00\xff{}:*")},
		"own conflict":   {sessionguard.WithConflict(http.NotFoundHandler())},
		"with events":    {sessionguard.WithKeyspaceEvents()},
		"another option": {func() sessionguard.Option { return sessionguard.WithNamespace("") }()},
	} {
		t.Run(name, func(t *testing.T) { newMonitor(t, rdb, opts...) })
	}
	newMonitor(t, nil, sessionguard.WithStore(values{new(sessionguard.MemoryStore)}))
}

// A secret is the monitor's from New on, whatever its caller does with the slice.
func TestKeySecretIsCopied(t *testing.T) {
	secret := []byte("0123456789abcdef")
	option := sessionguard.WithKeySecret(secret)
	a := on(t, new(sessionguard.MemoryStore), option)
	want := a.KeyID("s")
	clear(secret)
	assert.Equal(t, want, a.KeyID("s"))
	assert.NotEqual(t, want, on(t, new(sessionguard.MemoryStore), option).KeyID("s"))
}

var blank = []string{"", " ", "\t\r\n", "\u00a0\u2003"}

func TestRegisterOfABadSessionAsksNobody(t *testing.T) {
	rdb, _ := unused(t)
	s := &spy{Store: new(sessionguard.MemoryStore)}
	for _, m := range []*sessionguard.Monitor{newMonitor(t, rdb), on(t, s)} {
		for _, session := range append(blank, strings.Repeat("x", 1025), strings.Repeat("secret ", 150_000)) {
			ctx, g, err := m.Register(t.Context(), session)
			require.ErrorIs(t, err, sessionguard.ErrInvalid)
			assert.Nil(t, g)
			assert.Equal(t, t.Context(), ctx)
			assert.NotContains(t, err.Error(), "xx")
			assert.NotContains(t, err.Error(), "secret")
			assert.Less(t, len(err.Error()), 200)
		}
		var none context.Context
		ctx, g, err := m.Register(none, "s")
		require.ErrorIs(t, err, sessionguard.ErrInvalid)
		assert.Nil(t, g)
		assert.Nil(t, ctx)
		_, _, err = m.Register(none, "")
		assert.ErrorContains(t, err, "context is nil")
		assert.ErrorContains(t, err, "session is blank")
	}
	assert.Zero(t, s.count(""))
	quiet(t)
}

// Any other bytes are a session.
func TestRegisterOfAnyBytes(t *testing.T) {
	m := on(t, new(sessionguard.MemoryStore))
	for _, session := range []string{"\x00", "\xff", strings.Repeat("x", 1024), "{}", "{a}b", "a}b{c", ":", "*?[", "a\r\nb", "../", "\u202eé😀", " s ", "s"} {
		ctx, g := register(t, m, session)
		goesOn(t, ctx, g)
	}
}

func ended(t *testing.T) map[string]context.Context {
	t.Helper()
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	expired, cancel2 := context.WithDeadline(t.Context(), time.Now().Add(-time.Second))
	t.Cleanup(cancel2)
	caused, cancel3 := context.WithCancelCause(t.Context())
	cancel3(errors.New("the user has left"))
	return map[string]context.Context{"cancelled": cancelled, "expired": expired, "with a cause": caused}
}

func TestEndedContextAsksNobody(t *testing.T) {
	for name := range ended(t) {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx := ended(t)[name]
				s := &spy{Store: new(sessionguard.MemoryStore)}
				m := on(t, s)
				_, g := register(t, m, "s")
				settle()
				before := s.count("")
				for verb, op := range map[string]func() error{
					"register": func() error {
						back, g, err := m.Register(ctx, "t")
						assert.Nil(t, g)
						assert.Equal(t, ctx, back)
						return err
					},
					"check":  func() error { return g.Check(ctx) },
					"commit": func() error { return g.Commit(ctx, never(t)) },
				} {
					err := op()
					require.Error(t, err, verb)
					assert.ErrorIs(t, err, ctx.Err(), verb)
					assert.ErrorIs(t, err, context.Cause(ctx), verb)
					assert.NotErrorIs(t, err, sessionguard.ErrUnavailable, verb)
					assert.Contains(t, err.Error(), "sessionguard: ", verb)
				}
				require.NoError(t, g.Check(t.Context()), "the guard is not concerned")
				g.End()
				settle() // nothing that was left behind is still to come
				assert.Equal(t, before+1, s.count(""))
			})
		})
	}
}

// The same on Redis: not even a subscription is made.
func TestRegisterWithAnEndedContextSendsNothing(t *testing.T) {
	s := redistest.Start(t)
	m := newMonitor(t, s.Client())
	before := s.Commands()
	for range 100 {
		for _, ctx := range ended(t) {
			_, _, err := m.Register(ctx, "s")
			require.ErrorIs(t, err, ctx.Err())
		}
	}
	quiet(t)
	assert.Equal(t, before, s.Commands())
}

func TestEvalWithAnEndedContext(t *testing.T) {
	s := redistest.Start(t)
	m := newMonitor(t, s.Client())
	_, g := register(t, m, "s")
	for name, ctx := range ended(t) {
		_, err := g.Eval(ctx, set, []string{g.Key("k")}, 1)
		require.ErrorIs(t, err, ctx.Err(), name)
	}
	assert.Zero(t, s.Client().Exists(t.Context(), g.Key("k")).Val())
}

func TestContextThatNeverEndsIsAccepted(t *testing.T) {
	m := on(t, new(sessionguard.MemoryStore))
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	for _, ctx := range []context.Context{context.Background(), context.TODO(), context.WithoutCancel(cancelled)} {
		guarded, g, err := m.Register(ctx, "s")
		require.NoError(t, err)
		goesOn(t, guarded, g)
		g.End()
		assert.Error(t, guarded.Err())
	}
}

// A nil guard is what FromContext returns for a request that nobody guards.
func TestGuardOfNobodyRefuses(t *testing.T) {
	script := sessionguard.NewScript("return 1")
	for name, g := range map[string]*sessionguard.Guard{"nil": nil, "zero": {}} {
		t.Run(name, func(t *testing.T) {
			assert.ErrorIs(t, g.Check(t.Context()), sessionguard.ErrInvalid)
			assert.ErrorIs(t, g.Commit(t.Context(), never(t)), sessionguard.ErrInvalid)
			_, err := g.Eval(t.Context(), script, nil)
			assert.ErrorIs(t, err, sessionguard.ErrInvalid)
			assert.ErrorContains(t, err, "not guarded")
			assert.Zero(t, g.Epoch())
			assert.Empty(t, g.Key("k"))
			g.End()
			g.End()
		})
	}
}

func TestBadArgumentsOfAGuard(t *testing.T) {
	s := &spy{Store: new(sessionguard.MemoryStore)}
	_, g := register(t, on(t, s), "s")
	require.Eventually(t, func() bool { return s.count("current") > 0 }, soon, time.Millisecond)
	before := s.count("")
	var none context.Context
	script := sessionguard.NewScript("return 1")
	eval := func(ctx context.Context, script *sessionguard.Script) error {
		_, err := g.Eval(ctx, script, nil)
		return err
	}
	for name, err := range map[string]error{
		"check without a context":      g.Check(none),
		"commit without a context":     g.Commit(none, never(t)),
		"eval without a context":       eval(none, script),
		"commit without a func":        g.Commit(t.Context(), nil),
		"eval without a script":        eval(t.Context(), nil),
		"eval of the zero script":      eval(t.Context(), new(sessionguard.Script)),
		"eval on another store":        eval(t.Context(), script),
		"nil guard, commit, no func":   (*sessionguard.Guard)(nil).Commit(t.Context(), nil),
		"close without a context":      on(t, new(sessionguard.MemoryStore)).Close(none),
		"nil guard, no context either": (*sessionguard.Guard)(nil).Check(none),
	} {
		assert.ErrorIs(t, err, sessionguard.ErrInvalid, name)
	}
	assert.Equal(t, before, s.count(""))
	require.NoError(t, g.Check(t.Context()), "still guarded")
}

func TestAfterItsEndAGuardRefuses(t *testing.T) {
	m := on(t, new(sessionguard.MemoryStore))
	ctx, g := register(t, m, "s")
	epoch, key := g.Epoch(), g.Key("k")
	g.End()
	g.End()
	for range 2 {
		assert.ErrorIs(t, g.Check(t.Context()), sessionguard.ErrInvalid)
		assert.ErrorIs(t, g.Commit(t.Context(), never(t)), sessionguard.ErrInvalid)
		_, err := g.Eval(t.Context(), sessionguard.NewScript("return 1"), nil)
		assert.ErrorIs(t, err, sessionguard.ErrInvalid)
		assert.ErrorContains(t, err, "has ended")
	}
	assert.Equal(t, epoch, g.Epoch())
	assert.Equal(t, key, g.Key("k"))
	assert.Equal(t, context.Canceled, context.Cause(ctx))
}

// What a superseded guard was is not forgotten by its end.
func TestSupersededGuardStaysSupersededAfterItsEnd(t *testing.T) {
	m := on(t, new(sessionguard.MemoryStore))
	_, old := register(t, m, "s")
	_, g := register(t, m, "s")
	old.End()
	supersededBy(t, old.Check(t.Context()), old, g)
	supersededBy(t, old.Commit(t.Context(), never(t)), old, g)
}

func TestGuardIsSafeForConcurrentUse(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		m := newMonitor(t, rdb)
		for range 5 {
			ctx, g := register(t, m, "s")
			var all sync.WaitGroup
			for range 8 {
				all.Go(func() { known(t, g.Check(ctx)) })
				all.Go(func() { known(t, g.Commit(t.Context(), applied)) })
				all.Go(func() { _, err := g.Eval(t.Context(), set, []string{g.Key("k")}, 1); known(t, err) })
				all.Go(func() {
					_, inner, err := m.Register(ctx, "s")
					known(t, err)
					inner.End()
				})
			}
			for range 3 {
				all.Go(g.End)
			}
			all.Wait()
			assert.ErrorIs(t, g.Check(t.Context()), sessionguard.ErrInvalid)
		}
		require.NoError(t, m.Close(t.Context()))
		quiet(t)
	})
}

// known checks that a guard which is ended meanwhile says nothing else.
func known(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		assert.True(t, errors.Is(err, sessionguard.ErrInvalid) || errors.Is(err, sessionguard.ErrSuperseded) || errors.Is(err, context.Canceled), err)
	}
}

// Whoever ends a guard while it commits must not make a refused write look done.
func TestRefusalIsReportedThoughTheGuardHasEndedMeanwhile(t *testing.T) {
	t.Run("commit", func(t *testing.T) {
		_, g := register(t, on(t, new(sessionguard.MemoryStore)), "s")
		err := g.Commit(t.Context(), func(context.Context, uint64) (bool, error) {
			g.End()
			return false, nil
		})
		assert.ErrorIs(t, err, sessionguard.ErrSuperseded, "nothing was written")
	})
	t.Run("check", func(t *testing.T) {
		store := new(sessionguard.MemoryStore)
		s := &spy{Store: store}
		_, g := register(t, on(t, mute(s)), "s")
		register(t, on(t, store), "s")
		s.before = func(context.Context, string) error { g.End(); return nil }
		assert.ErrorIs(t, g.Commit(t.Context(), never(t)), sessionguard.ErrSuperseded)
	})
	t.Run("eval", func(t *testing.T) {
		s := redistest.Start(t)
		rdb := s.Client()
		m := newMonitor(t, rdb)
		_, g := register(t, m, "s")
		_, _ = register(t, newMonitor(t, s.Client()), "s")
		rdb.AddHook(beforeEach(func(cmd redis.Cmder) {
			if strings.HasPrefix(cmd.Name(), "eval") {
				g.End()
			}
		}))
		_, err := g.Eval(t.Context(), set, []string{g.Key("k")}, 1)
		assert.ErrorIs(t, err, sessionguard.ErrSuperseded, "it did not run")
		assert.Zero(t, s.Client().Exists(t.Context(), g.Key("k")).Val())
	})
}

// beforeEach is a go-redis hook that is called before each command.
type beforeEach func(cmd redis.Cmder)

func (f beforeEach) DialHook(next redis.DialHook) redis.DialHook { return next }

func (f beforeEach) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		f(cmd)
		return next(ctx, cmd)
	}
}

func (f beforeEach) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

func TestAfterClose(t *testing.T) {
	rdb, _ := unused(t)
	m := newMonitor(t, rdb)
	require.NoError(t, m.Close(t.Context()))
	for range 3 {
		ctx, g, err := m.Register(t.Context(), "s")
		require.ErrorIs(t, err, sessionguard.ErrClosed)
		assert.Nil(t, g)
		assert.Equal(t, t.Context(), ctx)
	}
	_, _, err := m.Register(t.Context(), "")
	assert.ErrorIs(t, err, sessionguard.ErrInvalid)
	var all sync.WaitGroup
	for range 10 {
		all.Go(func() { assert.NoError(t, m.Close(t.Context())) })
	}
	all.Wait()
	quiet(t)
}

func TestSessionIDIsToldToNobody(t *testing.T) {
	const id = "patient-4711"
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		m := newMonitor(t, rdb, sessionguard.WithKeySecret([]byte("a secret of the fleet")))
		ctx, g := register(t, m, id)
		_, newer := register(t, m, id)
		_, err := g.Eval(t.Context(), set, []string{g.Key("k")}, 1)
		require.Error(t, err)
		told := []string{m.KeyID(id), g.Key("k"), err.Error(), context.Cause(ctx).Error()}
		for _, v := range []any{m, g, newer, *g, ctx, err, context.Cause(ctx), []any{m, g}, struct{ G *sessionguard.Guard }{g}} {
			for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
				told = append(told, fmt.Sprintf(verb, v))
			}
			if j, err := json.Marshal(v); err == nil {
				told = append(told, string(j))
			}
			var log strings.Builder
			slog.New(slog.NewTextHandler(&log, nil)).Info("x", slog.Any("v", v))
			slog.New(slog.NewJSONHandler(&log, nil)).Info("x", slog.Any("v", v))
			told = append(told, log.String())
		}
		for _, s := range told {
			assert.NotContains(t, s, id)
			assert.NotContains(t, s, fmt.Sprintf("%x", id))
			assert.NotContains(t, s, "a secret of the fleet")
			assert.NotContains(t, s, fmt.Sprintf("%x", "a secret of the fleet"))
		}
		assert.Equal(t, "[sessionguard monitor]", fmt.Sprint(m))
		assert.Equal(t, "[sessionguard guard]", fmt.Sprintf("%#v", g))

		_, err = newer.Eval(t.Context(), set, []string{newer.Key("k")}, 1)
		require.NoError(t, err)
		keys := rdb.Keys(t.Context(), "*").Val()
		assert.ElementsMatch(t, []string{nameOf(m, id), newer.Key("k")}, keys)
		for _, key := range keys {
			assert.NotContains(t, key+rdb.Get(t.Context(), key).Val(), id)
		}
	})
}
