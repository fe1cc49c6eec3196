package sessionguard_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
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

type nodeFunc = func(opts ...sessionguard.Option) *sessionguard.Monitor

func TestOwnRegistrationDoesNotInterrupt(t *testing.T) {
	fleets(t, func(t *testing.T, node nodeFunc) {
		ctx, g := register(t, node(), "s")
		settle() // its own wake-up has come
		goesOn(t, ctx, g)
	})
	synctest.Test(t, func(t *testing.T) {
		s := &spy{Store: new(sessionguard.MemoryStore)}
		ctx, g := register(t, on(t, s), "s")
		settle()
		assert.Positive(t, s.count("current"), "it was woken, and has looked")
		goesOn(t, ctx, g)
	})
}

func TestNodeIgnoresSessionsThatItDoesNotGuard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := new(sessionguard.MemoryStore)
		idle, other := &spy{Store: store}, &spy{Store: store}
		on(t, idle)
		ctx, g := register(t, on(t, other), "another")
		settle()
		before := other.count("")
		for range 3 {
			register(t, on(t, store), "s")
		}
		settle()
		assert.Zero(t, idle.count(""))
		assert.Equal(t, before, other.count(""))
		goesOn(t, ctx, g)
	})
}

func TestLaterNodeInterruptsTheEarlier(t *testing.T) {
	fleets(t, func(t *testing.T, node nodeFunc) {
		a, b := node(), node()
		ctxA, ga := register(t, a, "s")
		settle()
		ctxB, gb := register(t, b, "s")
		settle()
		supersededBy(t, context.Cause(ctxA), ga, gb)
		supersededBy(t, ga.Commit(t.Context(), never(t)), ga, gb)
		goesOn(t, ctxB, gb)
	})
}

func TestOfThreeTheLastSurvives(t *testing.T) {
	fleets(t, func(t *testing.T, node nodeFunc) {
		ctxA, ga := register(t, node(), "s")
		ctxB, gb := register(t, node(), "s")
		ctxC, gc := register(t, node(), "s")
		settle()
		require.Less(t, ga.Epoch(), gb.Epoch())
		require.Less(t, gb.Epoch(), gc.Epoch())
		assert.ErrorIs(t, context.Cause(ctxA), sessionguard.ErrSuperseded)
		supersededBy(t, context.Cause(ctxB), gb, gc)
		assert.ErrorIs(t, ga.Commit(t.Context(), never(t)), sessionguard.ErrSuperseded)
		assert.ErrorIs(t, gb.Commit(t.Context(), never(t)), sessionguard.ErrSuperseded)
		goesOn(t, ctxC, gc)
	})
}

// A store that tells nobody anything shows that nobody waits for it to.
func TestConflictInOneProcessNeedsNoEcho(t *testing.T) {
	m := on(t, mute(new(sessionguard.MemoryStore)))
	ctxA, ga := register(t, m, "s")
	ctxB, gb := register(t, m, "s")
	supersededBy(t, context.Cause(ctxA), ga, gb) // already
	goesOn(t, ctxB, gb)
}

func TestSessionsDoNotInterfere(t *testing.T) {
	fleets(t, func(t *testing.T, node nodeFunc) {
		a, b := node(), node(sessionguard.WithNamespace("staging"))
		keyed := node(sessionguard.WithKeySecret([]byte("0123456789abcdef")))
		ctx, g := register(t, a, "s")
		contexts, guards := []context.Context{ctx}, []*sessionguard.Guard{g}
		for i := range 20 {
			ctx, g := register(t, a, fmt.Sprint("s", i))
			contexts, guards = append(contexts, ctx), append(guards, g)
		}
		for _, other := range []*sessionguard.Monitor{b, keyed} {
			ctx, g := register(t, other, "s")
			contexts, guards = append(contexts, ctx), append(guards, g)
		}
		settle()
		for i, ctx := range contexts {
			goesOn(t, ctx, guards[i])
		}
	})
}

func TestEndedGuardIsLeftAlone(t *testing.T) {
	fleets(t, func(t *testing.T, node nodeFunc) {
		a, b := node(), node()
		ctxA, ga := register(t, a, "s")
		ga.End()
		ctxB, gb := register(t, b, "s")
		settle()
		assert.Equal(t, context.Canceled, context.Cause(ctxA), "by its own end")
		assert.ErrorIs(t, ga.Check(t.Context()), sessionguard.ErrInvalid)
		ga.End()
		goesOn(t, ctxB, gb)
	})
}

func TestEndingAnotherRequestLeavesThisOneRegistered(t *testing.T) {
	fleets(t, func(t *testing.T, node nodeFunc) {
		a, b, staging := node(), node(), node(sessionguard.WithNamespace("staging"))
		_, old := register(t, b, "s")
		ctx, g := register(t, a, "s")
		for _, other := range []*sessionguard.Guard{old, must(register(t, a, "other")), must(register(t, staging, "s"))} {
			other.End()
		}
		_, inner, err := a.Register(ctx, "s")
		require.NoError(t, err)
		inner.End()
		settle()
		goesOn(t, ctx, g)

		_, newer := register(t, b, "s")
		settle()
		supersededBy(t, context.Cause(ctx), g, newer)
	})
}

func must(_ context.Context, g *sessionguard.Guard) *sessionguard.Guard { return g }

func TestClosedMonitorHearsNothing(t *testing.T) {
	fleets(t, func(t *testing.T, node nodeFunc) {
		a, b := node(), node()
		ctxA, ga := register(t, a, "s")
		require.NoError(t, a.Close(t.Context()))
		require.NoError(t, a.Close(t.Context()))
		ctxB, gb := register(t, b, "s")
		settle()
		require.NoError(t, context.Cause(ctxA))
		goesOn(t, ctxB, gb)
		_, _, err := a.Register(t.Context(), "s")
		require.ErrorIs(t, err, sessionguard.ErrClosed)
		require.ErrorIs(t, ga.Commit(ctxA, never(t)), sessionguard.ErrSuperseded, "what decides is the registration")
		goesOn(t, ctxB, gb)
	})
}

func TestFreshRequestIsNotInterrupted(t *testing.T) {
	fleets(t, func(t *testing.T, node nodeFunc) {
		a, b := node(), node()
		ctxOld, _ := register(t, a, "s")
		_, _ = register(t, b, "s")
		settle()
		require.Error(t, ctxOld.Err())
		ctx, g := register(t, a, "s")
		settle()
		goesOn(t, ctx, g)
	})
}

func TestOneRequestGuardsSeveralSessions(t *testing.T) {
	fleets(t, func(t *testing.T, node nodeFunc) {
		a, b := node(), node()
		ctx1, g1 := register(t, a, "parent")
		ctx2, g2, err := a.Register(ctx1, "widget")
		require.NoError(t, err)
		defer g2.End()
		side, g3 := register(t, a, "beside")
		_, newer := register(t, b, "widget")
		settle()
		supersededBy(t, context.Cause(ctx2), g2, newer)
		goesOn(t, ctx1, g1)
		goesOn(t, side, g3)

		ctx4, g4, err := a.Register(ctx1, "another widget")
		require.NoError(t, err)
		defer g4.End()
		_, newer = register(t, b, "parent")
		settle()
		supersededBy(t, context.Cause(ctx1), g1, newer)
		supersededBy(t, context.Cause(ctx4), g1, newer) // made from it
		require.NoError(t, g4.Check(t.Context()), "its own session is still its")
		goesOn(t, side, g3)
	})
}

// A thousand rounds: of the requests that registered at once only the one with the
// highest epoch is left, and commits.
func TestOfSimultaneousRequestsTheHighestEpochSurvives(t *testing.T) {
	const rounds, modifiers = 1000, 8
	round := func(t *testing.T, nodes []*sessionguard.Monitor, session string) {
		var all sync.WaitGroup
		contexts, guards := make([]context.Context, modifiers), make([]*sessionguard.Guard, modifiers)
		for i := range modifiers {
			all.Go(func() {
				var err error
				contexts[i], guards[i], err = nodes[i%len(nodes)].Register(t.Context(), session)
				assert.NoError(t, err)
			})
		}
		all.Wait()
		if t.Failed() {
			t.FailNow()
		}
		last := 0
		for i, g := range guards {
			if g.Epoch() > guards[last].Epoch() {
				last = i
			}
		}
		var commits atomic.Int64
		for i, g := range guards {
			all.Go(func() {
				if g.Commit(t.Context(), applied) == nil {
					commits.Add(1)
				}
				if i != last {
					assert.ErrorIs(t, cause(t, contexts[i]), sessionguard.ErrSuperseded)
				}
			})
		}
		all.Wait()
		require.EqualValues(t, 1, commits.Load())
		goesOn(t, contexts[last], guards[last])
		for _, g := range guards {
			g.End()
		}
	}
	t.Run("memory", func(t *testing.T) {
		store := new(sessionguard.MemoryStore)
		nodes := []*sessionguard.Monitor{on(t, store), on(t, store), on(t, store)}
		for i := range rounds {
			round(t, nodes, fmt.Sprint(i%7))
		}
	})
	t.Run("redis", func(t *testing.T) {
		s := redistest.Start(t)
		nodes := []*sessionguard.Monitor{newMonitor(t, s.Client()), newMonitor(t, s.Client()), newMonitor(t, s.Client())}
		for i := range rounds {
			round(t, nodes, fmt.Sprint(i%7))
		}
	})
}

// A wake-up is a hint, so whatever becomes of it the survivor is the same.
func TestMistreatedWakeUpsChangeNoOutcome(t *testing.T) {
	for name, mistreat := range map[string]func() func(changed func()){
		"lost":       func() func(func()) { return func(func()) {} },
		"duplicated": func() func(func()) { return func(changed func()) { changed(); changed(); go changed(); changed() } },
		"late": func() func(func()) {
			return func(changed func()) { time.AfterFunc(time.Minute, changed) }
		},
		"reordered": func() func(func()) {
			r := rand.New(rand.NewPCG(1, 2))
			var mu sync.Mutex
			return func(changed func()) {
				mu.Lock()
				defer mu.Unlock()
				time.AfterFunc(time.Duration(r.IntN(int(time.Second))), changed)
			}
		},
		"some lost": func() func(func()) {
			var n atomic.Int64
			return func(changed func()) {
				if n.Add(1)%3 == 0 {
					changed()
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := new(sessionguard.MemoryStore)
				var contexts []context.Context
				var guards []*sessionguard.Guard
				for range 4 {
					node := on(t, &spy{Store: store, hint: mistreat()})
					for range 2 {
						ctx, g := register(t, node, "s")
						contexts, guards = append(contexts, ctx), append(guards, g)
						time.Sleep(10 * time.Millisecond)
					}
				}
				time.Sleep(2 * time.Minute)
				settle()
				last := len(guards) - 1
				for i, g := range guards[:last] {
					assert.ErrorIs(t, context.Cause(contexts[i]), sessionguard.ErrSuperseded, "at the latest by a renewal")
					assert.ErrorIs(t, g.Commit(t.Context(), never(t)), sessionguard.ErrSuperseded)
				}
				goesOn(t, contexts[last], guards[last])
			})
		})
	}
}

func TestLostWakeUpsDelayTheInterruptAndNotTheRefusal(t *testing.T) {
	refused := func(t *testing.T, a, b *sessionguard.Monitor) {
		ctxA, ga := register(t, a, "s")
		ctxB, gb := register(t, b, "s")
		require.NoError(t, ctxA.Err(), "nobody has told it")
		supersededBy(t, ga.Commit(ctxA, never(t)), ga, gb)
		supersededBy(t, context.Cause(ctxA), ga, gb)
		goesOn(t, ctxB, gb)
	}
	t.Run("a store without wake-ups", func(t *testing.T) {
		store := new(sessionguard.MemoryStore)
		refused(t, on(t, mute(store)), on(t, store))
	})
	t.Run("all are lost", func(t *testing.T) {
		store := new(sessionguard.MemoryStore)
		refused(t, on(t, &spy{Store: store, hint: func(func()) {}}), on(t, store))
	})
	t.Run("a Ring, which has none", func(t *testing.T) {
		s := redistest.Start(t)
		ring := redis.NewRing(&redis.RingOptions{Addrs: map[string]string{"one": s.Addr()}})
		t.Cleanup(func() { _ = ring.Close() })
		refused(t, newMonitor(t, ring), newMonitor(t, s.Client()))
	})
	t.Run("a silent connection", func(t *testing.T) {
		s := redistest.Start(t)
		p := redistest.NewProxy(t, s.Addr())
		a := newMonitor(t, s.Client(func(o *redis.Options) { o.Addr = p.Addr() }))
		ctxA, ga := register(t, a, "s")
		p.BlackHole()
		_, gb := register(t, newMonitor(t, s.Client()), "s")
		require.NoError(t, ctxA.Err())
		require.ErrorIs(t, ga.Commit(ctxA, never(t)), sessionguard.ErrUnavailable, "nor can it ask")
		p.Heal()
		require.Eventually(t, func() bool {
			err := ga.Commit(t.Context(), never(t))
			return errors.Is(err, sessionguard.ErrSuperseded)
		}, soon, 10*time.Millisecond)
		supersededBy(t, cause(t, ctxA), ga, gb)
	})
}

func TestRegistrationOfADeadProcessExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, connect := redistest.Bubble(t)
		a, b := newMonitor(t, connect()), newMonitor(t, connect())
		_, ga := register(t, a, "s")
		_, _ = register(t, a, "t")
		require.NoError(t, a.Close(t.Context())) // no more of it is heard
		time.Sleep(29 * time.Second)
		assert.True(t, m.Exists(nameOf(a, "s")))
		ctx, g := register(t, b, "t") // does not wait for it to expire
		time.Sleep(2 * time.Second)
		assert.False(t, m.Exists(nameOf(a, "s")))
		goesOn(t, ctx, g)
		ctx, g = register(t, b, "s")
		assert.Greater(t, g.Epoch(), ga.Epoch())
		goesOn(t, ctx, g)
	})
}

func TestRegisterThatFailsLeavesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := new(sessionguard.MemoryStore)
		var stopped, watched atomic.Int64
		down := &watching{
			spy:     spy{Store: store, before: func(context.Context, string) error { return errStoreDown }},
			watched: &watched, stopped: &stopped,
		}
		a, b := on(t, down), on(t, store)
		parent := t.Context()
		ctx, g, err := a.Register(parent, "s")
		require.ErrorIs(t, err, sessionguard.ErrUnavailable)
		require.ErrorIs(t, err, errStoreDown)
		assert.Nil(t, g)
		assert.Equal(t, parent, ctx)
		assert.Equal(t, watched.Load(), stopped.Load(), "nor is it watched")
		calls := down.count("")
		ctxB, gb := register(t, b, "s")
		time.Sleep(time.Hour)
		assert.Equal(t, calls, down.count(""), "what happens to the session is no business of its")
		goesOn(t, ctxB, gb)
		gb.End()
		time.Sleep(time.Minute)
		assert.Empty(t, busy())
	})
}

// watching counts watches.
type watching struct {
	spy
	watched, stopped *atomic.Int64
}

func (w *watching) Watch(session string, changed func()) (stop func()) {
	w.watched.Add(1)
	inner := w.spy.Watch(session, changed)
	return func() { w.stopped.Add(1); inner() }
}

func TestEndNeedsNoStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &spy{Store: new(sessionguard.MemoryStore)}
		m := on(t, s)
		ctx, g := register(t, m, "s")
		settle()
		s.before = func(context.Context, string) error { return errStoreDown }
		before := s.count("")
		g.End()
		assert.Equal(t, context.Canceled, context.Cause(ctx))
		time.Sleep(time.Hour)
		assert.Equal(t, before, s.count(""))
		assert.Empty(t, busy())
	})
}

func TestInterruptTellsByWhom(t *testing.T) {
	fleets(t, func(t *testing.T, node nodeFunc) {
		a, b := node(), node()
		ctxA, ga := register(t, a, "s")
		child, cancel := context.WithCancel(ctxA)
		defer cancel()
		_, gb := register(t, b, "s")
		settle()
		assert.Equal(t, context.Canceled, child.Err())
		err := context.Cause(child)
		supersededBy(t, err, ga, gb)
		assert.Equal(t, fmt.Sprintf("sessionguard: session %s: request %d superseded by %d", a.KeyID("s"), ga.Epoch(), gb.Epoch()), err.Error())
	})
}

func TestResubscriptionLooksAtEverySession(t *testing.T) {
	s := redistest.Start(t)
	p := redistest.NewProxy(t, s.Addr())
	ttl := sessionguard.WithTTL(24 * time.Hour) // no renewal within this test
	a := newMonitor(t, s.Client(func(o *redis.Options) { o.Addr = p.Addr() }), ttl)
	b := newMonitor(t, s.Client(), ttl)
	const sessions = 20
	contexts, guards := make([]context.Context, sessions), make([]*sessionguard.Guard, sessions)
	for i := range sessions {
		contexts[i], guards[i] = register(t, a, fmt.Sprint(i))
	}
	ctxOwn, own := register(t, a, "nobody else's")
	p.Cut()
	newer := make([]*sessionguard.Guard, sessions)
	for i := range sessions {
		_, newer[i] = register(t, b, fmt.Sprint(i))
	}
	for _, ctx := range contexts {
		require.NoError(t, ctx.Err(), "nothing got through")
	}
	p.Heal()
	for i, ctx := range contexts {
		supersededBy(t, cause(t, ctx), guards[i], newer[i])
	}
	goesOn(t, ctxOwn, own)
}
