package sessionguard_test

// What follows from a Redis that is down, silent, forgetful, or holds what nobody of
// ours wrote: on a real server. Faults that need no network stand in time_test.go.

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/internal/redistest"
	"github.com/sessionlock/sessionlock/sessionguard"
)

// within checks that f is done in five times d, for the machine is busy.
func within(t *testing.T, d time.Duration, f func()) {
	t.Helper()
	start := time.Now()
	f()
	assert.Less(t, time.Since(start), 5*d)
}

// behind returns a proxy to s and a client by way of it.
func behind(t *testing.T, s *redistest.Server, opts ...func(*redis.Options)) (*redistest.Proxy, *redis.Client) {
	t.Helper()
	p := redistest.NewProxy(t, s.Addr())
	return p, s.Client(append([]func(*redis.Options){func(o *redis.Options) { o.Addr = p.Addr() }}, opts...)...)
}

var set = sessionguard.NewScript(`return redis.call('SET', KEYS[1], ARGV[1])`)

func TestRegisterWhileRedisIsDownLeavesNothing(t *testing.T) {
	s := redistest.Start(t)
	rdb := s.Client()
	s.Stop()
	m := newMonitor(t, rdb)
	within(t, time.Second, func() {
		ctx, g, err := m.Register(t.Context(), "s")
		require.ErrorIs(t, err, sessionguard.ErrUnavailable)
		assert.Nil(t, g)
		assert.Equal(t, t.Context(), ctx)
	})
	quiet(t)

	s.Restart()
	ctx, g := register(t, newMonitor(t, s.Client()), "s")
	require.Eventually(t, func() bool {
		_, g, err := m.Register(t.Context(), "another")
		g.End()
		return err == nil
	}, soon, 10*time.Millisecond, "it recovers by itself")
	goesOn(t, ctx, g)
	g.End()
	quiet(t)
}

// Longer than the third of its TTL after which it is renewed, shorter than the rest.
func TestGuardOutlivesAnOutageAtItsRenewal(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t)
	p, rdb := behind(t, s)
	const ttl = 6 * time.Second
	m := newMonitor(t, rdb, sessionguard.WithTTL(ttl))
	start := time.Now()
	ctx, g := register(t, m, "s")
	time.Sleep(ttl / 4)
	p.Cut()
	time.Sleep(ttl / 3)
	require.ErrorIs(t, g.Check(ctx), sessionguard.ErrUnavailable)
	p.Heal()
	time.Sleep(time.Until(start.Add(ttl + ttl/6)))
	goesOn(t, ctx, g)
}

func TestCommitWhileRedisIsDownWritesNothing(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t)
	m := newMonitor(t, s.Client())
	ctx, g := register(t, m, "s")
	s.Stop()
	within(t, time.Second, func() { assert.ErrorIs(t, g.Commit(ctx, never(t)), sessionguard.ErrUnavailable) })
	within(t, time.Second, func() { assert.ErrorIs(t, g.Check(ctx), sessionguard.ErrUnavailable) })
	within(t, time.Second, func() {
		_, err := g.Eval(ctx, set, []string{g.Key("k")}, 1)
		assert.ErrorIs(t, err, sessionguard.ErrUnavailable)
	})
	assert.NoError(t, ctx.Err(), "it says nothing of the request")
	g.End()
	assert.Equal(t, context.Canceled, context.Cause(ctx))
}

func TestLossOfDataLosesEveryRequestUnderWay(t *testing.T) {
	s := redistest.Start(t)
	a, b := newMonitor(t, s.Client()), newMonitor(t, s.Client())
	var guards []*sessionguard.Guard
	var contexts []context.Context
	for i := range 5 {
		for _, m := range []*sessionguard.Monitor{a, b} {
			ctx, g := register(t, m, fmt.Sprint(i))
			guards, contexts = append(guards, g), append(contexts, ctx)
		}
	}
	s.Restart()
	for i, g := range guards {
		var err error
		require.Eventually(t, func() bool {
			err = g.Commit(t.Context(), never(t))
			return !errors.Is(err, sessionguard.ErrUnavailable)
		}, soon, 10*time.Millisecond)
		if i%2 == 1 { // the others were superseded before
			assert.ErrorIs(t, err, sessionguard.ErrLost)
			assert.NotErrorIs(t, err, sessionguard.ErrSuperseded)
		}
		assert.Equal(t, err, cause(t, contexts[i]))
		_, err = g.Eval(t.Context(), set, []string{g.Key("k")}, 1)
		assert.Error(t, err)
	}
	ctx, g := register(t, a, "0")
	for _, old := range guards {
		assert.Greater(t, g.Epoch(), old.Epoch())
		assert.Error(t, old.Check(t.Context()), "for ever")
	}
	goesOn(t, ctx, g)
}

// Nobody looks: it is found out by the resubscription, long before the renewal.
func TestLossOfDataIsNoticedAtTheResubscription(t *testing.T) {
	s := redistest.Start(t)
	m := newMonitor(t, s.Client(), sessionguard.WithTTL(24*time.Hour))
	ctx, _ := register(t, m, "s")
	subscribed(t, s, 1)
	s.Restart()
	assert.ErrorIs(t, cause(t, ctx), sessionguard.ErrLost)
}

// subscribed waits until a server has n channels.
func subscribed(t *testing.T, s *redistest.Server, n int) {
	t.Helper()
	rdb := s.Client()
	require.Eventually(t, func() bool { return len(rdb.PubSubChannels(t.Context(), "*").Val()) >= n }, soon, 5*time.Millisecond)
}

func TestProcessCutOffForTheTTLHasLostItsGuards(t *testing.T) {
	s := redistest.Start(t)
	p, rdb := behind(t, s)
	m := newMonitor(t, rdb, sessionguard.WithTTL(time.Second), sessionguard.WithOpTimeout(300*time.Millisecond))
	ctx, g := register(t, m, "s")
	p.Cut()
	require.Eventually(t, func() bool { return s.Client().Exists(t.Context(), nameOf(m, "s")).Val() == 0 }, soon, 20*time.Millisecond)
	require.NoError(t, ctx.Err(), "it cannot know")
	p.Heal()
	assert.ErrorIs(t, cause(t, ctx), sessionguard.ErrLost)
	assert.ErrorIs(t, g.Commit(t.Context(), never(t)), sessionguard.ErrLost)
	_, err := g.Eval(t.Context(), set, []string{g.Key("k")}, 1)
	assert.ErrorIs(t, err, sessionguard.ErrLost)
}

func TestStandstillOfRedisLosesGuards(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t)
	m := newMonitor(t, s.Client(), sessionguard.WithTTL(time.Second), sessionguard.WithOpTimeout(300*time.Millisecond))
	ctx, _ := register(t, m, "s")
	s.Pause()
	time.Sleep(1500 * time.Millisecond)
	s.Resume()
	assert.ErrorIs(t, cause(t, ctx), sessionguard.ErrLost)
	ctx, g := register(t, m, "s")
	goesOn(t, ctx, g)
}

func TestHungRedisHoldsNobody(t *testing.T) {
	s := redistest.Start(t)
	p, rdb := behind(t, s)
	const limit = 200 * time.Millisecond
	m := newMonitor(t, rdb, sessionguard.WithOpTimeout(limit))
	_, g := register(t, m, "s")
	p.BlackHole()
	for name, op := range map[string]func(ctx context.Context) error{
		"register": func(ctx context.Context) error { _, _, err := m.Register(ctx, "t"); return err },
		"check":    g.Check,
		"commit":   func(ctx context.Context) error { return g.Commit(ctx, never(t)) },
		"eval": func(ctx context.Context) error {
			_, err := g.Eval(ctx, set, []string{g.Key("k")}, 1)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			within(t, limit, func() { assert.ErrorIs(t, op(t.Context()), sessionguard.ErrUnavailable) })

			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
			defer cancel()
			within(t, 50*time.Millisecond, func() {
				err := op(ctx)
				assert.ErrorIs(t, err, context.DeadlineExceeded)
				assert.NotErrorIs(t, err, sessionguard.ErrUnavailable)
			})
			ctx, cancel = context.WithCancel(t.Context())
			time.AfterFunc(20*time.Millisecond, cancel)
			within(t, 50*time.Millisecond, func() { assert.ErrorIs(t, op(ctx), context.Canceled) })
		})
	}
	p.Heal()
	require.Eventually(t, func() bool { return g.Check(t.Context()) == nil }, soon, 10*time.Millisecond)
}

// warm opens connections, more than what goes on beside a registration can take, and has
// the script known: without replies neither is done.
func warm(t *testing.T, m *sessionguard.Monitor, rdb *redis.Client) {
	t.Helper()
	for range 4 {
		c := rdb.Conn()
		defer c.Close()
		require.NoError(t, c.Ping(t.Context()).Err())
	}
	_, g, err := m.Register(t.Context(), "warm")
	require.NoError(t, err)
	g.End()
}

// Somebody whose registration was executed and who was never told has superseded the
// others all the same, and nobody is left who could commit in its name.
func TestLostReplyOfARegistrationSupersedes(t *testing.T) {
	s := redistest.Start(t)
	p, rdb := behind(t, s)
	a, b := newMonitor(t, rdb), newMonitor(t, s.Client())
	ctxB, gb := register(t, b, "s")
	subscribed(t, s, 1)
	warm(t, a, rdb)
	p.DropReplies()
	_, _, err := a.Register(t.Context(), "s")
	require.ErrorIs(t, err, sessionguard.ErrUnavailable)
	require.ErrorIs(t, cause(t, ctxB), sessionguard.ErrSuperseded)
	require.ErrorIs(t, gb.Commit(t.Context(), never(t)), sessionguard.ErrSuperseded)
	p.Heal()
	require.Eventually(t, func() bool {
		ctx, g, err := a.Register(t.Context(), "s")
		if err != nil {
			return false
		}
		defer g.End()
		goesOn(t, ctx, g)
		return true
	}, soon, 10*time.Millisecond)
}

// go-redis sends a command again whose reply was lost; the registration is the one
// that was made first.
func TestRepeatedRegistrationIsOne(t *testing.T) {
	s := redistest.Start(t)
	p, rdb := behind(t, s, func(o *redis.Options) { o.ReadTimeout = 300 * time.Millisecond })
	m := newMonitor(t, rdb, sessionguard.WithOpTimeout(9*time.Second))
	straight := s.Client()
	warm(t, m, rdb)
	p.DropReplies()
	type result struct {
		ctx context.Context //nolint:containedctx // handed over
		g   *sessionguard.Guard
		err error
	}
	done := make(chan result, 1)
	go func() {
		ctx, g, err := m.Register(t.Context(), "s")
		done <- result{ctx, g, err}
	}()
	var stored string
	require.Eventually(t, func() bool {
		stored = straight.Get(t.Context(), nameOf(m, "s")).Val()
		return stored != ""
	}, soon, time.Millisecond, "executed")
	p.Heal()
	r := <-done
	require.NoError(t, r.err)
	defer r.g.End()
	assert.True(t, strings.HasPrefix(stored, fmt.Sprint(r.g.Epoch(), " ")), "%s is not of %d", stored, r.g.Epoch())
	assert.Equal(t, stored, straight.Get(t.Context(), nameOf(m, "s")).Val())
	goesOn(t, r.ctx, r.g)
}

func TestLostReplyOfAnEvalLeavesItsEffectOpen(t *testing.T) {
	s := redistest.Start(t)
	p, rdb := behind(t, s)
	m := newMonitor(t, rdb)
	ctx, g := register(t, m, "s")
	_, err := g.Eval(ctx, set, []string{g.Key("k")}, "one") // the script is known, the connection open
	require.NoError(t, err)
	p.DropReplies()
	_, err = g.Eval(ctx, set, []string{g.Key("k")}, "two")
	require.ErrorIs(t, err, sessionguard.ErrUnavailable)
	assert.Equal(t, "two", s.Client().Get(t.Context(), g.Key("k")).Val())
	p.Heal()
	require.Eventually(t, func() bool { return g.Check(ctx) == nil }, soon, 10*time.Millisecond)
}

func TestKilledSubscriptionsLoseNoInterrupt(t *testing.T) {
	s := redistest.Start(t)
	ttl := sessionguard.WithTTL(24 * time.Hour) // no renewal within this test
	a, b := newMonitor(t, s.Client(), ttl), newMonitor(t, s.Client(), ttl)
	admin := s.Client()
	for range 10 {
		ctxA, ga := register(t, a, "s")
		require.NoError(t, admin.ClientKillByFilter(t.Context(), "TYPE", "pubsub").Err())
		ctxB, gb := register(t, b, "s")
		supersededBy(t, cause(t, ctxA), ga, gb)
		goesOn(t, ctxB, gb)
		gb.End()
	}
}

func TestForgottenScriptsAreSentAgain(t *testing.T) {
	s := redistest.Start(t)
	m := newMonitor(t, s.Client())
	admin := s.Client()
	ctx, cancel := context.WithCancel(t.Context())
	var flushing sync.WaitGroup
	flushing.Go(func() {
		for ctx.Err() == nil {
			_ = admin.ScriptFlush(ctx).Err()
			time.Sleep(time.Millisecond)
		}
	})
	for i := range 100 {
		ctx, g, err := m.Register(t.Context(), fmt.Sprint(i%3))
		require.NoError(t, err)
		v, err := g.Eval(ctx, set, []string{g.Key("k")}, i)
		require.NoError(t, err)
		assert.Equal(t, "OK", v)
		g.End()
	}
	cancel()
	flushing.Wait()
}

// foreign are values that nobody of ours has written.
var foreign = map[string]string{
	"empty": "", "a word": "garbage", "a space": " ", "no token": "12", "no number": " token",
	"negative": "-1 token", "a fraction": "1.5 token", "an exponent": "1e15 token", "hexadecimal": "0x10 token",
	"line breaks": "1\r\n+OK\r\n2 token", "NUL": "1\x00 token", "binary": "\xff\xfe\x00 \x01", "long": strings.Repeat("9", 1<<14),
	"not a number": "nan token", "endless": "inf token", "nil": "nil token",
}

// impossible are epochs that no store of ours gives out.
var impossible = map[string]string{
	"the last that fits": "9007199254740991 token",
	"2⁵³":                "9007199254740992 token", "2⁵³ + 1": "9007199254740993 token", "2⁶⁴ - 1": "18446744073709551615 token",
	"2⁶⁴": "18446744073709551616 token", "a hundred digits": strings.Repeat("9", 100) + " token",
}

func eachValue(t *testing.T, values map[string]string, f func(t *testing.T, rdb *redis.Client, value string)) {
	t.Helper()
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		for name, value := range values {
			t.Run(name, func(t *testing.T) {
				require.NoError(t, rdb.FlushAll(t.Context()).Err())
				f(t, rdb, value)
			})
		}
	})
}

func TestForeignValueIsNobodysRegistration(t *testing.T) {
	eachValue(t, foreign, func(t *testing.T, rdb *redis.Client, value string) {
		m := newMonitor(t, rdb)
		require.NoError(t, rdb.Set(t.Context(), nameOf(m, "s"), value, 0).Err())
		ctx, g := register(t, m, "s") // it is replaced
		goesOn(t, ctx, g)

		require.NoError(t, rdb.Set(t.Context(), nameOf(m, "s"), value, 0).Err())
		_, err := g.Eval(t.Context(), set, []string{g.Key("k")}, 1)
		require.ErrorIs(t, err, sessionguard.ErrLost)
		assert.Zero(t, rdb.Exists(t.Context(), g.Key("k")).Val())
		require.ErrorIs(t, cause(t, ctx), sessionguard.ErrLost)
		if len(value) > 3 {
			assert.NotContains(t, err.Error(), value)
		}

		ctx, g = register(t, m, "t")
		require.NoError(t, rdb.Set(t.Context(), nameOf(m, "t"), value, 0).Err())
		require.ErrorIs(t, g.Check(t.Context()), sessionguard.ErrLost)
		require.ErrorIs(t, cause(t, ctx), sessionguard.ErrLost)
		ctx, g = register(t, m, "t")
		goesOn(t, ctx, g)
	})
}

// Whoever can write to one session's registration must not reach the others by it.
func TestImpossibleEpochConcernsItsOwnSessionOnly(t *testing.T) {
	eachValue(t, impossible, func(t *testing.T, rdb *redis.Client, value string) {
		m := newMonitor(t, rdb)
		_, g := register(t, m, "s")
		ctxT, gt := register(t, m, "t")
		require.NoError(t, rdb.Set(t.Context(), nameOf(m, "s"), value, 0).Err())
		want := sessionguard.ErrLost // it is nobody's
		if value == impossible["the last that fits"] {
			want = sessionguard.ErrSuperseded
		}
		require.ErrorIs(t, g.Commit(t.Context(), never(t)), want)
		ctx, g, err := m.Register(t.Context(), "another")
		require.NoError(t, err)
		defer g.End()
		goesOn(t, ctx, g)
		goesOn(t, ctxT, gt)
	})
	eachValue(t, impossible, func(t *testing.T, rdb *redis.Client, value string) {
		m := newMonitor(t, rdb)
		_, g := register(t, m, "s")
		require.NoError(t, rdb.Set(t.Context(), nameOf(m, "s"), value, 0).Err())
		_, err := g.Eval(t.Context(), set, []string{g.Key("k")}, 1)
		require.Error(t, err)
		_, g, err = m.Register(t.Context(), "another")
		require.NoError(t, err)
		g.End()
	})
}

func TestRegistrationOfAnotherTypeIsAnErrorAndIsNotTouched(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		m := newMonitor(t, rdb)
		_, g := register(t, m, "s")
		_, err := rdb.TxPipelined(t.Context(), func(p redis.Pipeliner) error { // it is never seen to be gone
			p.Del(t.Context(), nameOf(m, "s"))
			return p.RPush(t.Context(), nameOf(m, "s"), "x").Err()
		})
		require.NoError(t, err)
		_, _, err = m.Register(t.Context(), "s")
		require.Error(t, err, "its own process knows it to be registered")
		assert.ErrorContains(t, err, "WRONGTYPE")
		require.ErrorContains(t, g.Commit(t.Context(), never(t)), "WRONGTYPE")
		_, err = g.Eval(t.Context(), set, []string{g.Key("k")}, 1)
		require.ErrorContains(t, err, "WRONGTYPE")
		assert.Zero(t, rdb.Exists(t.Context(), g.Key("k")).Val())
		assert.Equal(t, []string{"x"}, rdb.LRange(t.Context(), nameOf(m, "s"), 0, -1).Val())
	})
}

// The faults of wake-ups that MemoryStore has in a bubble, on the store of New.
func TestMistreatedWakeUpsOnRedisChangeNoOutcome(t *testing.T) {
	for name, hint := range map[string]func(changed func()){
		"lost":       func(func()) {},
		"duplicated": func(changed func()) { changed(); go changed(); changed() },
		"late":       func(changed func()) { time.AfterFunc(100*time.Millisecond, changed) },
	} {
		t.Run(name, func(t *testing.T) {
			s := redistest.Start(t)
			node := func() *sessionguard.Monitor {
				return on(t, &spy{Store: sessionguard.NewRedisStore(s.Client()), hint: hint})
			}
			nodes := []*sessionguard.Monitor{node(), node(), node()}
			for round := range 20 {
				var guards []*sessionguard.Guard
				var contexts []context.Context
				for i := range 6 {
					ctx, g := register(t, nodes[i%3], fmt.Sprint(round))
					guards, contexts = append(guards, g), append(contexts, ctx)
				}
				for _, g := range guards[:5] {
					assert.ErrorIs(t, g.Commit(t.Context(), never(t)), sessionguard.ErrSuperseded)
				}
				goesOn(t, contexts[5], guards[5])
			}
		})
	}
}

// A message on a session's channel is no more than a reason to look.
func TestForgedMessagesInterruptNobody(t *testing.T) {
	s := redistest.Start(t)
	rdb := s.Client()
	spy := &spy{Store: sessionguard.NewRedisStore(s.Client())}
	m := on(t, spy)
	ctx, g := register(t, m, "s")
	subscribed(t, s, 1)
	var heard atomic.Int64
	for i := range 2000 {
		n, err := rdb.Publish(t.Context(), nameOf(m, "s"), fmt.Sprint(uint64(1<<53)+uint64(i), " forged")).Result()
		require.NoError(t, err)
		heard.Add(n)
	}
	assert.Positive(t, heard.Load())
	require.Eventually(t, func() bool { return spy.count("current") > 1 }, soon, time.Millisecond)
	goesOn(t, ctx, g)
}
