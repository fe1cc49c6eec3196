package sessionrelay_test

// The upkeep of all sessions: signs of life, timeouts, clearing up, and the end of a node.

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/sessionrelay"
)

func TestRemovedSessionEndsOnceAndTakesItsConnectionWithIt(t *testing.T) {
	onEach(t, func(t *testing.T, f *fleet) {
		ctx := t.Context()
		a, store := f.node("a")
		b, _ := f.node("b")
		runs(t, a)
		var c client
		conn := comes(t, a, &c)
		session := conn.Session()
		sends(t, b, session, "1")
		gets(t, &c, "1")
		var removed sync.WaitGroup
		for _, n := range []*sessionrelay.Node{a, b, a, b} {
			removed.Go(func() { assert.NoError(t, n.Remove(ctx, session)) })
		}
		removed.Wait()
		if conn.Err() == nil { // a's own answer says so, or the wake-up, of which the first may be lost
			require.NoError(t, a.Remove(ctx, session))
		}
		ends(t, conn, sessionrelay.ErrGone)
		assert.False(t, exists(t, store, session))
		assert.Equal(t, []sessionrelay.Event{{Kind: sessionrelay.EventRemoved, Session: session}}, f.events(sessionrelay.EventRemoved))
		conn.Disconnect()
		assert.Empty(t, f.events(sessionrelay.EventDisconnected))
		require.NoError(t, b.Remove(ctx, "never was"))
		assert.Len(t, f.events(sessionrelay.EventRemoved), 1)
	})
}

func TestRemoveTheStoreDidNotHearOfRemovesNothing(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		conn := comes(t, a, new(client))
		synctest.Wait()
		store.on("Remove", down)
		require.ErrorIs(t, a.Remove(t.Context(), conn.Session()), sessionrelay.ErrUnavailable)
		synctest.Wait()
		lives(t, conn)
		assert.Empty(t, f.events(sessionrelay.EventRemoved))
	})
}

func TestTimedOutSessionIsToldByOneNode(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		others := []*sessionrelay.Node{a}
		for i := range 4 {
			n, _ := f.node(fmt.Sprint("other ", i))
			others = append(others, n)
		}
		for _, n := range others {
			runs(t, n)
		}
		kept := comes(t, a, new(client))
		lost := map[string]bool{}
		for range 20 {
			conn := comes(t, a, new(client))
			conn.Disconnect()
			lost[conn.Session()] = true
		}
		pass(72*time.Hour - time.Second)
		assert.Empty(t, f.events(sessionrelay.EventTimedOut))
		pass(6 * time.Minute)
		told := f.events(sessionrelay.EventTimedOut)
		assert.Len(t, told, 20)
		for _, e := range told {
			assert.Equal(t, sessionrelay.Event{Kind: sessionrelay.EventTimedOut, Session: e.Session}, e)
			assert.True(t, lost[e.Session])
			delete(lost, e.Session)
		}
		assert.Empty(t, lost)
		pass(10 * 24 * time.Hour)
		assert.Len(t, f.events(sessionrelay.EventTimedOut), 20)
		lives(t, kept)
		assert.True(t, exists(t, store, kept.Session()), "while it is connected it does not time out")
	})
}

func TestConnectionWhoseSessionTimedOutElsewhereEnds(t *testing.T) {
	for _, deaf := range []bool{false, true} {
		t.Run(fmt.Sprint("deaf ", deaf), func(t *testing.T) {
			inBubble(t, func(t *testing.T, f *fleet) {
				a, store := f.node("a")
				store.deaf = deaf
				b, _ := f.node("b", sessionrelay.WithTimeout(10*time.Minute), sessionrelay.WithIntervals(time.Minute, time.Minute, time.Hour))
				runs(t, a)
				runs(t, b)
				conn := comes(t, a, new(client))
				synctest.Wait()
				store.on("Alive", down)
				pass(9 * time.Minute)
				lives(t, conn)
				pass(3 * time.Minute)
				if deaf {
					lives(t, conn)
				}
				store.on("Alive", nil)
				pass(time.Minute)
				ends(t, conn, sessionrelay.ErrGone)
				assert.Len(t, f.events(sessionrelay.EventTimedOut), 1)
			})
		})
	}
}

func TestConnectionThatIsBusyForeverHearsThatItsSessionIsGone(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, _ := f.node("a")
		b, _ := f.node("b")
		runs(t, a)
		c := client{does: func(ctx context.Context, _ sessionrelay.Message) error { <-ctx.Done(); return ctx.Err() }}
		conn := comes(t, a, &c)
		sends(t, b, conn.Session(), "1")
		synctest.Wait()
		require.NoError(t, b.Remove(t.Context(), conn.Session()))
		pass(time.Minute)
		ends(t, conn, sessionrelay.ErrGone)
	})
}

func TestTimeoutEndsTheConnectionOfTheNodeThatFindsIt(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a", sessionrelay.WithTimeout(10*time.Minute))
		store.deaf = true
		runs(t, a)
		conn := comes(t, a, new(client))
		synctest.Wait()
		store.on("Alive", down)
		store.then("Expire", down) // it fails after some
		pass(16 * time.Minute)
		ends(t, conn, sessionrelay.ErrGone)
		assert.Len(t, f.events(sessionrelay.EventTimedOut), 1, "what was done is told, though the rest failed")
	})
}

// timesOf notes when something is asked.
func (s *spy) timesOf(verb string) func() []time.Duration {
	begun := time.Now()
	var mu sync.Mutex
	var all []time.Duration
	s.on(verb, func(context.Context) error {
		mu.Lock()
		defer mu.Unlock()
		all = append(all, time.Since(begun))
		return nil
	})
	return func() []time.Duration {
		mu.Lock()
		defer mu.Unlock()
		return all
	}
}

func TestIntervalsDifferBetweenNodesByUpToATenth(t *testing.T) {
	for name, tt := range map[string]struct {
		opts []sessionrelay.Option
		want map[string]time.Duration
	}{
		"by default": {nil, map[string]time.Duration{"Alive": 54 * time.Second, "Expire": 5 * time.Minute, "Scavenge": 90 * time.Minute}},
		"as wanted": {
			[]sessionrelay.Option{sessionrelay.WithIntervals(time.Second, 2*time.Second, 3*time.Second)},
			map[string]time.Duration{"Alive": time.Second, "Expire": 2 * time.Second, "Scavenge": 3 * time.Second},
		},
		"as short as can be": {
			[]sessionrelay.Option{sessionrelay.WithIntervals(time.Millisecond, time.Millisecond, time.Millisecond)},
			map[string]time.Duration{"Alive": time.Millisecond, "Expire": time.Millisecond, "Scavenge": time.Millisecond},
		},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, f *fleet) {
				const nodes = 60 // the mean of their first times is off by a fiftieth once in ten million runs
				seen := map[string][]func() []time.Duration{}
				for i := range nodes {
					n, s := f.node(fmt.Sprint(i), tt.opts...)
					for verb := range tt.want {
						seen[verb] = append(seen[verb], s.timesOf(verb))
					}
					runs(t, n)
				}
				pass(max(5*tt.want["Scavenge"], 5*time.Millisecond))
				for verb, want := range tt.want {
					first, last, sum := time.Duration(1<<62), time.Duration(0), time.Duration(0)
					for _, all := range seen[verb] {
						when := all()
						require.GreaterOrEqual(t, len(when), 4)
						for i, at := range when {
							assert.Equal(t, time.Duration(i+1)*when[0], at, "%s: of one node it stays the same", verb)
						}
						first, last, sum = min(first, when[0]), max(last, when[0]), sum+when[0]
					}
					assert.GreaterOrEqual(t, first, want, verb)
					assert.LessOrEqual(t, last, want*11/10, verb)
					assert.Greater(t, last-first, want/20, verb)
					assert.InDelta(t, float64(want)*1.05, float64(sum/nodes), float64(want)/50, verb)
				}
			})
		})
	}
}

func TestLoopsEndWithTheirContext(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		stop := runs(t, a)
		pass(2 * time.Hour)
		store.on("Alive", func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() })
		pass(time.Minute)
		stop()
		assert.Empty(t, f.events(sessionrelay.EventFailed), "that is no failure")
		assert.Equal(t, 1, store.times("Close"))
		store.on("", func(context.Context) error { assert.Fail(t, "asked"); return nil })
		pass(24 * time.Hour)
	})
}

func TestNodeRunsOnce(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		stop := runs(t, a)
		conn := comes(t, a, new(client))
		synctest.Wait()
		for range 2 {
			was := store.times("Homed")
			require.ErrorIs(t, a.Run(t.Context()), sessionrelay.ErrInvalid)
			assert.Equal(t, was, store.times("Homed"))
			stop()
		}
		ends(t, conn, sessionrelay.ErrClosed)
	})
}

func TestConnectionsNeedNoRun(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, _ := f.node("a")
		b, _ := f.node("b")
		var c client
		conn := comes(t, a, &c)
		sends(t, b, conn.Session(), "1")
		synctest.Wait()
		assert.Equal(t, []string{"1"}, c.received())
		comes(t, b, new(client), conn.Session())
		synctest.Wait()
		ends(t, conn, sessionrelay.ErrMoved)
	})
}

func TestNodeThatEndsLeavesNobodyConnected(t *testing.T) {
	onEach(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a", sessionrelay.WithLimit(plenty))
		b, other := f.node("b", sessionrelay.WithLimit(plenty))
		stop := runs(t, a)
		var conns []*sessionrelay.Conn
		for range 100 {
			conns = append(conns, comes(t, a, new(client)))
		}
		elsewhere := comes(t, b, new(client))
		var at, most atomic.Int64
		store.on("Deregister", func(context.Context) error {
			most.Store(max(most.Load(), at.Add(1)))
			time.Sleep(2 * time.Millisecond)
			at.Add(-1)
			return nil
		})
		stop()
		assert.Empty(t, homed(t, store), "it has waited")
		for _, c := range conns {
			ends(t, c, sessionrelay.ErrClosed)
			assert.Zero(t, home(t, other, c.Session()), "it stays, and may come back")
			c.Disconnect()
		}
		assert.Len(t, f.events(sessionrelay.EventDisconnected), 100)
		assert.Equal(t, 100, store.times("Deregister"))
		assert.LessOrEqual(t, most.Load(), int64(16))
		assert.Greater(t, most.Load(), int64(1))
		lives(t, elsewhere)
		comes(t, b, new(client), conns[0].Session())
		_, err := a.Connect(t.Context(), sessionrelay.Hello{User: "bob"}, new(client).send)
		require.ErrorIs(t, err, sessionrelay.ErrClosed)
		sends(t, a, conns[0].Session(), "an ended node may send")
	})
}

func TestEndWaitsForWhatIsUnderWay(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		stop := runs(t, a)
		c := client{does: func(ctx context.Context, _ sessionrelay.Message) error {
			<-ctx.Done()
			time.Sleep(3 * time.Second)
			return ctx.Err()
		}}
		conn := comes(t, a, &c)
		sends(t, a, conn.Session(), "1")
		lost := comes(t, a, new(client))
		synctest.Wait()
		store.on("Deregister", func(context.Context) error { time.Sleep(5 * time.Second); return nil })
		lost.Disconnect()
		synctest.Wait()
		begun := time.Now()
		stop()
		assert.Equal(t, 7500*time.Millisecond, time.Since(begun), "the send func for 2.5 s, then its Deregister")
		assert.Empty(t, homed(t, store))
		assert.Equal(t, 1, store.times("Attempted"))
	})
}

func TestNothingRunsAfterTheEnd(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		stop := runs(t, a)
		session := comes(t, a, new(client)).Session()
		stop()
		comesDeaf(t, store, session)
		was := store.times("Deregister")
		sends(t, a, session, "1")
		synctest.Wait()
		assert.Equal(t, was, store.times("Deregister"), "that is for the next node of its name")
	})
}

func TestUpkeepLeavesWhoIsJustConnectingAlone(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		runs(t, a)
		store.on("Register", func(context.Context) error { time.Sleep(5 * time.Minute); return nil })
		var c client
		conn := comes(t, a, &c)
		lives(t, conn)
		sends(t, a, conn.Session(), "1")
		synctest.Wait()
		assert.Equal(t, []string{"1"}, c.received())
		assert.Zero(t, store.times("Deregister"))
	})
}

func TestUpkeepTellsOfWhatItCannotPutRight(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		dead, _ := f.node("a")
		session := comes(t, dead, new(client)).Session()
		synctest.Wait()
		a, store := f.node("a")
		store.on("Deregister", down)
		sends(t, a, session, "1")
		synctest.Wait()
		assert.Len(t, f.events(sessionrelay.EventFailed), 1)
		runs(t, a)
		synctest.Wait()
		assert.Len(t, f.events(sessionrelay.EventFailed), 2)
		store.on("Deregister", nil)
		store.on("Homed", down)
		pass(time.Minute)
		assert.Len(t, f.events(sessionrelay.EventFailed), 3)
		assert.NotZero(t, home(t, store, session))
		store.on("Homed", nil)
		pass(time.Minute)
		assert.Zero(t, home(t, store, session))
	})
}

func TestNodeWhoseStoreIsDownAtItsStartRuns(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		store.on("Homed", down)
		runs(t, a)
		synctest.Wait()
		require.Len(t, f.events(sessionrelay.EventFailed), 1)
		require.ErrorIs(t, f.events(sessionrelay.EventFailed)[0].Err, sessionrelay.ErrUnavailable)
		store.on("Homed", nil)
		pass(time.Hour)
		assert.Len(t, f.events(sessionrelay.EventFailed), 1)
		assert.Greater(t, store.times("Alive"), 50)
	})
}

func TestEndOfANodeOnAStoreThatIsDownEnds(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		stop := runs(t, a)
		conn := comes(t, a, new(client))
		synctest.Wait()
		store.on("", down)
		stop()
		ends(t, conn, sessionrelay.ErrClosed)
		assert.Len(t, f.events(sessionrelay.EventFailed), 1)
	})
}

func TestNodeOfADeadOnesNamePutsItsSessionsRight(t *testing.T) {
	onEach(t, func(t *testing.T, f *fleet) {
		dead, store := f.node("a")
		b, _ := f.node("b")
		lost, moved := comes(t, dead, new(client)), comes(t, dead, new(client))
		elsewhere := comes(t, b, new(client))
		comes(t, b, new(client), moved.Session())
		sends(t, b, lost.Session(), "1")

		a, _ := f.node("a")
		alive := comes(t, a, new(client))
		runs(t, a)
		away(t, store, lost.Session())
		assert.Equal(t, "a", home(t, store, alive.Session()).Node, "which connected before it ran")
		assert.Equal(t, "b", home(t, store, moved.Session()).Node)
		lives(t, alive)
		lives(t, elsewhere)
		var c client
		comes(t, a, &c, lost.Session())
		gets(t, &c, "1")
		assert.Empty(t, f.events(sessionrelay.EventDisconnected))
	})
}

func TestLoopsSurviveAnOutageAndTellOfIt(t *testing.T) {
	for verb, interval := range map[string]time.Duration{
		"Alive": 54 * time.Second, "Homed": 54 * time.Second, "Expire": 5 * time.Minute, "Scavenge": 90 * time.Minute,
	} {
		t.Run(verb, func(t *testing.T) {
			inBubble(t, func(t *testing.T, f *fleet) {
				var out bytes.Buffer
				a, store := f.node("a", sessionrelay.WithLogger(slog.New(slog.NewTextHandler(&out, nil))))
				store.on(verb, down)
				runs(t, a)
				conn := comes(t, a, new(client))
				pass(interval*11/10*3 + time.Second)
				failed := f.events(sessionrelay.EventFailed)
				require.GreaterOrEqual(t, len(failed), 3)
				for _, e := range failed {
					require.ErrorIs(t, e.Err, sessionrelay.ErrUnavailable)
					assert.Equal(t, sessionrelay.Event{Kind: sessionrelay.EventFailed, Err: e.Err}, e)
				}
				assert.Contains(t, out.String(), "upkeep failed")
				assert.Contains(t, out.String(), "no route")
				assert.NotContains(t, out.String(), conn.Session())
				lives(t, conn)
				store.on(verb, nil)
				was := store.times(verb)
				pass(interval*11/10 + time.Second)
				assert.Greater(t, store.times(verb), was)
				assert.Len(t, f.events(sessionrelay.EventFailed), len(failed))
			})
		})
	}
}

func TestObserverThatPanicsHarmsNobody(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		panics := sessionrelay.WithObserver(func(e sessionrelay.Event) { f.note(e); panic("of the observer") })
		a, store := f.node("a", panics, sessionrelay.WithAttempts(1, time.Second), sessionrelay.WithTimeout(time.Hour))
		stop := runs(t, a)
		c := client{does: func(context.Context, sessionrelay.Message) error { return errNo }}
		conn := comes(t, a, &c)
		sends(t, a, conn.Session(), "1")
		synctest.Wait()
		conn = comes(t, a, &c, conn.Session())
		synctest.Wait()
		require.NoError(t, a.Remove(t.Context(), conn.Session()))
		conn = comes(t, a, &c)
		conn.Disconnect()
		pass(2 * time.Hour)
		assert.Equal(t, []string{
			sessionrelay.EventConnected, sessionrelay.EventSendFailed, sessionrelay.EventReconnected, sessionrelay.EventDeadLetter,
			sessionrelay.EventRemoved, sessionrelay.EventConnected, sessionrelay.EventDisconnected, sessionrelay.EventTimedOut,
		}, f.kinds())
		assert.False(t, exists(t, store, conn.Session()))
		store.on("Alive", down)
		pass(2 * time.Minute)
		assert.GreaterOrEqual(t, len(f.events(sessionrelay.EventFailed)), 2, "the loop goes on")
		stop()
	})
}

func TestNodeWithoutObserverOrLoggerIsSilent(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		store := &spy{Store: f.open("a")}
		a, err := sessionrelay.New(store)
		require.NoError(t, err)
		runs(t, a)
		c := client{does: func(context.Context, sessionrelay.Message) error { panic(errNo) }}
		conn := comes(t, a, &c)
		sends(t, a, conn.Session(), "1", "2")
		store.on("Alive", down)
		pass(time.Minute)
		lives(t, conn)
		assert.Equal(t, []string{"1", "2"}, c.received())
		assert.GreaterOrEqual(t, store.times("Alive"), 1)
	})
}

func TestStoreThatGoesAwayAndComesBackIsCaughtUpWith(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		b, other := f.node("b")
		runs(t, a)
		runs(t, b)
		var c client
		conn := comes(t, a, &c)
		synctest.Wait()
		for _, s := range []*spy{store, other} {
			s.on("", down)
		}
		_, err := b.Send(t.Context(), conn.Session(), []byte("not stored"))
		require.ErrorIs(t, err, sessionrelay.ErrUnavailable)
		pass(time.Hour)
		lives(t, conn)
		for _, s := range []*spy{store, other} {
			s.on("", nil)
		}
		sends(t, b, conn.Session(), "1")
		pass(60 * time.Second)
		assert.Equal(t, []string{"1"}, c.received())
		i, err := store.Lookup(t.Context(), conn.Session())
		require.NoError(t, err)
		assert.Less(t, time.Since(i.Live), time.Minute)
	})
}
