package sessionguard_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/internal/redistest"
	"github.com/sessionlock/sessionlock/sessionguard"
)

// notify sets which keyspace events a server sends.
func notify(t *testing.T, s *redistest.Server, events string) {
	t.Helper()
	require.NoError(t, s.Client().ConfigSet(t.Context(), "notify-keyspace-events", events).Err())
}

// eventful returns a node that lives by keyspace events; its renewals tell nothing
// within a test.
func eventful(t *testing.T, s *redistest.Server, opts ...func(*redis.Options)) *sessionguard.Monitor {
	t.Helper()
	return newMonitor(t, s.Client(opts...), sessionguard.WithKeyspaceEvents(), sessionguard.WithTTL(24*time.Hour))
}

func TestKeyspaceEventsInterrupt(t *testing.T) {
	for _, events := range []string{"K$", "AKE", "K$gx"} {
		t.Run(events, func(t *testing.T) {
			s := redistest.Start(t)
			notify(t, s, events)
			rdb := s.Client()
			ours := rdb.PSubscribe(t.Context(), "sl:*")
			defer ours.Close()
			_, err := ours.Receive(t.Context())
			require.NoError(t, err)
			a, b := eventful(t, s), eventful(t, s)
			for range 3 {
				ctxA, ga := register(t, a, "s")
				subscribed(t, s, 1)
				ctxB, gb := register(t, b, "s")
				supersededBy(t, cause(t, ctxA), ga, gb)
				goesOn(t, ctxB, gb)
			}
			for _, channel := range rdb.PubSubChannels(t.Context(), "*").Val() {
				assert.Equal(t, "__keyspace@0__:"+nameOf(a, "s"), channel)
			}
			_, err = ours.ReceiveTimeout(t.Context(), 50*time.Millisecond)
			assert.ErrorContains(t, err, "timeout", "nothing of our own is published")
		})
	}
}

func TestKeyspaceEventsOfTheClientsDatabase(t *testing.T) {
	s := redistest.Start(t)
	notify(t, s, "K$")
	third := func(o *redis.Options) { o.DB = 3 }
	a, b, elsewhere := eventful(t, s, third), eventful(t, s, third), eventful(t, s)
	ctx, g := register(t, a, "s")
	subscribed(t, s, 1)
	register(t, elsewhere, "s")
	goesOn(t, ctx, g)
	_, newer := register(t, b, "s")
	supersededBy(t, cause(t, ctx), g, newer)
}

func TestMissingKeyspaceEventsAreAClearError(t *testing.T) {
	for name, events := range map[string]string{"off": "", "other events": "Kxl", "other channel": "E$"} {
		t.Run(name, func(t *testing.T) {
			s := redistest.Start(t)
			notify(t, s, events)
			m := eventful(t, s)
			within(t, time.Second, func() {
				_, _, err := m.Register(t.Context(), "s")
				require.ErrorIs(t, err, sessionguard.ErrUnavailable)
				assert.ErrorContains(t, err, "set notify-keyspace-events to K$ at least")
			})
			assert.Zero(t, s.Client().Exists(t.Context(), nameOf(m, "s")).Val(), "nobody is superseded by it")
		})
	}
}

func TestMissingKeyspaceEventsAreAClearErrorWhateverTheOpTimeout(t *testing.T) {
	s := redistest.Start(t)
	m := newMonitor(t, s.Client(), sessionguard.WithKeyspaceEvents(), sessionguard.WithOpTimeout(200*time.Millisecond))
	_, _, err := m.Register(t.Context(), "s")
	require.ErrorIs(t, err, sessionguard.ErrUnavailable)
	assert.ErrorContains(t, err, "notify-keyspace-events", "rather than that there was no answer in time")
}

// A server without events is not asked again by each request.
func TestMissingKeyspaceEventsCostOneProbe(t *testing.T) {
	s := redistest.Start(t)
	m := eventful(t, s)
	_, _, err := m.Register(t.Context(), "s")
	require.Error(t, err)
	before := s.Commands()
	start := time.Now()
	for range 200 {
		_, _, err := m.Register(t.Context(), "s")
		require.ErrorContains(t, err, "notify-keyspace-events")
	}
	require.Less(t, time.Since(start), 4*time.Second, "too slow to tell")
	assert.Less(t, s.Commands()-before, int64(20))
}

func TestKeyspaceEventsTurnedOnAreFound(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t)
	m := eventful(t, s)
	_, _, err := m.Register(t.Context(), "s")
	require.ErrorContains(t, err, "notify-keyspace-events")
	notify(t, s, "K$")
	require.Eventually(t, func() bool {
		ctx, g, err := m.Register(t.Context(), "s")
		if err != nil {
			return false
		}
		defer g.End()
		goesOn(t, ctx, g)
		return true
	}, soon, 50*time.Millisecond)
}

// Once they were seen nobody probes any more; when they are turned off then, what
// decides is the registration, as ever.
func TestKeyspaceEventsTurnedOffDelayTheInterruptOnly(t *testing.T) {
	s := redistest.Start(t)
	notify(t, s, "K$")
	a, b := eventful(t, s), eventful(t, s)
	_, g := register(t, b, "warm")
	g.End()
	ctxA, ga := register(t, a, "s")
	notify(t, s, "")
	ctxB, gb := register(t, b, "s")
	supersededBy(t, ga.Commit(ctxA, never(t)), ga, gb)
	goesOn(t, ctxB, gb)
}

func TestProbeOfKeyspaceEventsLeavesNothingBehind(t *testing.T) {
	s := redistest.Start(t)
	notify(t, s, "K$")
	m := eventful(t, s)
	var all sync.WaitGroup
	for i := range 20 {
		all.Go(func() {
			ctx, g, err := m.Register(t.Context(), fmt.Sprint(i))
			if assert.NoError(t, err) {
				assert.NoError(t, ctx.Err())
				g.End()
			}
		})
	}
	all.Wait()
	rdb := s.Client()
	assert.Eventually(t, func() bool {
		for _, key := range rdb.Keys(t.Context(), "*").Val() {
			if strings.Contains(key, "probe") {
				return false
			}
		}
		return true
	}, soon, 50*time.Millisecond)
}

// An outage is told apart from a server that sends no events, and is over when it is.
func TestOutageIsNotTakenForMissingEvents(t *testing.T) {
	s := redistest.Start(t)
	m := eventful(t, s)
	s.Stop()
	_, _, err := m.Register(t.Context(), "s")
	require.ErrorIs(t, err, sessionguard.ErrUnavailable)
	require.NotContains(t, err.Error(), "notify-keyspace-events")
	s.Restart()
	notify(t, s, "K$")
	require.Eventually(t, func() bool {
		_, g, err := m.Register(t.Context(), "s")
		g.End()
		return err == nil
	}, soon, 10*time.Millisecond)
}

func TestHungProbeHoldsNobody(t *testing.T) {
	s := redistest.Start(t)
	notify(t, s, "K$")
	p, rdb := behind(t, s)
	m := newMonitor(t, rdb, sessionguard.WithKeyspaceEvents(), sessionguard.WithOpTimeout(500*time.Millisecond))
	p.BlackHole()
	var all sync.WaitGroup
	for range 5 {
		all.Go(func() {
			within(t, 500*time.Millisecond, func() {
				_, _, err := m.Register(t.Context(), "s")
				assert.ErrorIs(t, err, sessionguard.ErrUnavailable)
			})
		})
		all.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			within(t, 100*time.Millisecond, func() {
				_, _, err := m.Register(ctx, "s")
				assert.True(t, errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, sessionguard.ErrUnavailable), err)
			})
		})
	}
	all.Wait()
	p.Heal()
	require.Eventually(t, func() bool {
		_, g, err := m.Register(t.Context(), "s")
		g.End()
		return err == nil
	}, 2*soon, 10*time.Millisecond)
}
