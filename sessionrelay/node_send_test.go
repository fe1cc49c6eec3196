package sessionrelay_test

// Messages to clients: what is sent when, how often, and what becomes of the rest.

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/sessionrelay"
)

func TestMessagesReachASessionWhereverItIs(t *testing.T) {
	onEach(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		b, _ := f.node("b")
		runs(t, a)
		runs(t, b)
		var c client
		conn := comes(t, a, &c)
		gone := comes(t, a, new(client)).Session()
		require.NoError(t, b.Remove(t.Context(), gone))
		first := sends(t, a, conn.Session(), "here")
		second := sends(t, b, conn.Session(), "elsewhere")
		gets(t, &c, "here", "elsewhere")
		assert.Equal(t, append(first, second...), c.ids())
		require.NoError(t, conn.Acked(t.Context(), c.ids()...))
		conn.Disconnect()
		away(t, store, conn.Session())
		sends(t, a, conn.Session(), "to nobody")
		comes(t, b, &c, conn.Session())
		gets(t, &c, "here", "elsewhere", "to nobody")
		for _, n := range []*sessionrelay.Node{a, b} {
			id, err := n.Send(t.Context(), gone, []byte("late"))
			require.ErrorIs(t, err, sessionrelay.ErrGone)
			assert.Empty(t, id)
			_, err = n.Request(t.Context(), gone, []byte("late"), nil)
			require.ErrorIs(t, err, sessionrelay.ErrGone)
		}
		assert.False(t, exists(t, store, gone))
	})
}

func TestMessageToAConnectionHereNeedsNoWakeUp(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		store.deaf = true
		var c client
		conn := comes(t, a, &c)
		synctest.Wait()
		sends(t, a, conn.Session(), "1")
		synctest.Wait()
		assert.Equal(t, []string{"1"}, c.received())
	})
}

func TestWakeUpThatIsLostIsMadeUpForBySignsOfLife(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		store.deaf = true
		b, _ := f.node("b")
		runs(t, a)
		var c client
		conn, moves := comes(t, a, &c), comes(t, a, new(client))
		synctest.Wait()
		sends(t, b, conn.Session(), "1")
		comes(t, b, new(client), moves.Session())
		pass(53 * time.Second)
		synctest.Wait()
		assert.Empty(t, c.received())
		lives(t, moves)
		pass(7 * time.Second)
		assert.Equal(t, []string{"1"}, c.received())
		ends(t, moves, sessionrelay.ErrMoved)
		lives(t, conn)
	})
}

func TestMessagesAreSentInOrderTwentyAtATime(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		var c client
		conn := comes(t, a, new(client))
		conn.Disconnect()
		synctest.Wait()
		want := []string{}
		for i := range 45 {
			want = append(want, fmt.Sprint(i))
		}
		sends(t, a, conn.Session(), want...)
		comes(t, a, &c, conn.Session())
		synctest.Wait()
		assert.Equal(t, want, c.received())
		assert.Equal(t, 3, store.times("Attempted"))
		assert.Equal(t, 2, store.times("Attempted 20"))
		assert.Equal(t, 1, store.times("Attempted 5"))
		assert.Equal(t, store.times("Fetch"), store.times("Fetch 20"))
	})
}

// Case 32 of the original.
func TestWhatWasTriedBeforeIsSentFirstAndAlone(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		var c client
		conn := comes(t, a, &c)
		synctest.Wait()
		tried := sends(t, a, conn.Session(), "1", "2", "3")
		synctest.Wait()
		require.NoError(t, conn.Acked(t.Context(), tried[1]))
		conn.Disconnect()
		synctest.Wait()
		sends(t, a, conn.Session(), "4", "5")
		was, two := store.times("Attempted 1"), store.times("Attempted 2")
		var c2 client
		comes(t, a, &c2, conn.Session())
		synctest.Wait()
		assert.Equal(t, []string{"1", "3", "4", "5"}, c2.received())
		assert.Equal(t, 2, store.times("Attempted 1")-was)
		assert.Equal(t, 1, store.times("Attempted 2")-two)
		var attempts []int
		for _, m := range c2.messages() {
			attempts = append(attempts, m.Attempts)
		}
		assert.Equal(t, []int{1, 1, 0, 0}, attempts)
	})
}

func TestWhatIsNewAndBeforeWhatWasTriedIsSentWithoutIt(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		session := comes(t, a, new(client)).Session()
		synctest.Wait()
		all := sends(t, a, session, "1", "2", "3")
		synctest.Wait()
		is := home(t, store, session)
		require.NoError(t, store.Bury(t.Context(), session, is.Conn, all[:2]...))
		require.NoError(t, store.Revive(t.Context(), session, all[:2]...))
		synctest.Wait()
		conn := comes(t, a, new(client), session) // 1 and 2 were tried again, over the old one
		conn.Disconnect()
		synctest.Wait()
		require.NoError(t, store.Bury(t.Context(), session, comesDeaf(t, store, session), all[:2]...))
		require.NoError(t, store.Revive(t.Context(), session, all[:2]...))
		was, two := store.times("Attempted 1"), store.times("Attempted 2")
		var c client
		comes(t, a, &c, session)
		synctest.Wait()
		assert.Equal(t, []string{"1", "2", "3"}, c.received())
		assert.Equal(t, 1, store.times("Attempted 2")-two, "1 and 2, which count as new")
		assert.Equal(t, 1, store.times("Attempted 1")-was, "3 alone")
	})
}

// comesDeaf registers a connection that no node has.
func comesDeaf(t *testing.T, s *spy, session string) (conn string) {
	t.Helper()
	conn = "deaf " + t.Name()
	_, _, err := s.Store.Register(t.Context(), sessionrelay.Hello{Session: session, User: "bob"}, conn, plenty)
	require.NoError(t, err)
	return conn
}

// Case 36 of the original.
func TestWakeUpsDuringARoundMakeOneMore(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		hold := make(chan struct{})
		c := client{does: func(context.Context, sessionrelay.Message) error { <-hold; return nil }}
		conn := comes(t, a, &c)
		synctest.Wait()
		sends(t, a, conn.Session(), "1")
		synctest.Wait()
		was := store.times("Fetch")
		for range 7 {
			require.NoError(t, store.Revive(t.Context(), conn.Session())) // no more than a wake-up
		}
		synctest.Wait()
		assert.Equal(t, was, store.times("Fetch"), "one round at a time")
		close(hold)
		synctest.Wait()
		assert.Equal(t, was+2, store.times("Fetch"), "the rest of the round, and one more")
		sends(t, a, conn.Session(), "2")
		synctest.Wait()
		assert.Equal(t, []string{"1", "2"}, c.received())
	})
}

// busy is how many goroutines of the caller's bubble are inside the package.
func busy() (n int) {
	stacks := make([]byte, 4<<20)
	stacks = stacks[:runtime.Stack(stacks, true)]
	_, bubble, _ := strings.Cut(string(stacks), "synctest bubble ") // the caller's is first
	bubble, _, _ = strings.Cut(bubble, "]")
	for g := range strings.SplitSeq(string(stacks), "\n\n") {
		if strings.Contains(g, "synctest bubble "+bubble+"]") && strings.Contains(g, "/sessionrelay.(*") {
			n++
		}
	}
	return n
}

func TestOneGoroutineForwardsAndNoneIsIdle(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, _ := f.node("a", sessionrelay.WithLimit(plenty))
		for range 100 {
			comes(t, a, new(client)).Disconnect()
			sends(t, a, comes(t, a, new(client)).Session(), "1")
		}
		synctest.Wait()
		assert.Zero(t, busy(), "of a hundred idle connections")
		var at, most atomic.Int64
		slow := client{does: func(context.Context, sessionrelay.Message) error {
			most.Store(max(most.Load(), at.Add(1)))
			time.Sleep(time.Millisecond)
			at.Add(-1)
			return nil
		}}
		conn := comes(t, a, &slow)
		var all sync.WaitGroup
		for i := range 100 {
			all.Go(func() { sends(t, a, conn.Session(), fmt.Sprint(i)) })
		}
		all.Wait()
		synctest.Wait()
		assert.Equal(t, 1, busy())
		pass(time.Second)
		assert.Len(t, slow.received(), 100)
		assert.Equal(t, int64(1), most.Load())
		assert.Zero(t, busy())
	})
}

func TestSendFuncThatFailsRestsTheMessages(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		begun := time.Now()
		var when []time.Duration
		broken := true
		c := client{does: func(context.Context, sessionrelay.Message) error {
			when = append(when, time.Since(begun))
			if broken {
				broken = false
				return errNo
			}
			return nil
		}}
		conn := comes(t, a, new(client))
		conn.Disconnect()
		synctest.Wait()
		all := sends(t, a, conn.Session(), "1", "2", "3")
		conn = comes(t, a, &c, conn.Session())
		pass(2 * time.Second)
		assert.Equal(t, []string{"1"}, c.received())
		require.NoError(t, store.Revive(t.Context(), conn.Session()))
		synctest.Wait()
		assert.Equal(t, []string{"1"}, c.received(), "a wake-up does not shorten it")
		pass(time.Minute)
		assert.Equal(t, []string{"1", "2", "3"}, c.received())
		assert.Equal(t, []time.Duration{0, 2500 * time.Millisecond, 2500 * time.Millisecond}, when)
		assert.Equal(t, []sessionrelay.Event{{
			Kind: sessionrelay.EventSendFailed, Session: conn.Session(), Home: home(t, store, conn.Session()), Message: all[0], Err: errNo,
		}}, f.events(sessionrelay.EventSendFailed))
		lives(t, conn)
		conn.Disconnect()
		synctest.Wait()
		var c2 client
		comes(t, a, &c2, conn.Session())
		synctest.Wait()
		for _, m := range c2.messages() {
			assert.Equal(t, 1, m.Attempts, "of %s", m.Payload)
		}
	})
}

func TestSendFuncThatKeepsFailingIsAskedEverLessOften(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, _ := f.node("a", sessionrelay.WithAttempts(10, time.Second))
		var when []time.Duration
		begun := time.Now()
		c := client{does: func(context.Context, sessionrelay.Message) error {
			when = append(when, time.Since(begun))
			return errNo
		}}
		conn := comes(t, a, new(client))
		conn.Disconnect()
		synctest.Wait()
		sends(t, a, conn.Session(), "1", "2", "3", "4", "5", "6", "7")
		comes(t, a, &c, conn.Session())
		pass(5 * time.Minute)
		assert.Equal(t, []time.Duration{0, 1e9, 3e9, 7e9, 15e9, 31e9, 47e9}, when)
		assert.Len(t, f.events(sessionrelay.EventSendFailed), 7)
	})
}

func TestPauseIsShortAgainAfterASuccess(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		begun := time.Now()
		var when []time.Duration
		c := client{does: func(_ context.Context, m sessionrelay.Message) error {
			when = append(when, time.Since(begun))
			if string(m.Payload) == "fails" {
				return errNo
			}
			return nil
		}}
		conn := comes(t, a, &c)
		synctest.Wait()
		once := false
		store.then("Fetch", func(context.Context) error {
			if time.Since(begun) > 0 && !once { // in the round after the pause, which finds nothing else
				once = true
				sends(t, a, conn.Session(), "fails", "is taken")
			}
			return nil
		})
		sends(t, a, conn.Session(), "fails")
		pass(time.Minute)
		assert.Equal(t, []time.Duration{0, 2500 * time.Millisecond, 5 * time.Second}, when)
	})
}

func TestSendFuncThatPanicsHasFailed(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		var out bytes.Buffer
		a, _ := f.node("a", sessionrelay.WithLogger(slog.New(slog.NewTextHandler(&out, nil))))
		b, _ := f.node("b")
		c := client{does: func(_ context.Context, m sessionrelay.Message) error {
			if string(m.Payload) == "1" {
				panic("of the application")
			}
			return nil
		}}
		for _, n := range []*sessionrelay.Node{a, b} {
			conn := comes(t, n, &c)
			sends(t, n, conn.Session(), "1", "2")
			pass(time.Minute)
			lives(t, conn)
		}
		assert.Equal(t, []string{"1", "2", "1", "2"}, c.received())
		failed := f.events(sessionrelay.EventSendFailed)
		require.Len(t, failed, 2)
		assert.NotContains(t, failed[0].Err.Error(), "of the application")
		assert.Contains(t, failed[0].Err.Error(), "string")
		assert.Contains(t, out.String(), "of the application")
	})
}

func TestContextOfASendEndsWithItsConnection(t *testing.T) {
	for name, end := range map[string]func(*testing.T, *sessionrelay.Node, *sessionrelay.Conn, func()){
		"disconnect": func(_ *testing.T, _ *sessionrelay.Node, c *sessionrelay.Conn, _ func()) { c.Disconnect() },
		"remove": func(t *testing.T, n *sessionrelay.Node, c *sessionrelay.Conn, _ func()) {
			assert.NoError(t, n.Remove(t.Context(), c.Session()))
		},
		"replaced": func(t *testing.T, n *sessionrelay.Node, c *sessionrelay.Conn, _ func()) {
			comes(t, n, new(client), c.Session())
		},
		"shutdown": func(_ *testing.T, _ *sessionrelay.Node, _ *sessionrelay.Conn, stop func()) { stop() },
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, f *fleet) {
				a, _ := f.node("a")
				stop := runs(t, a)
				ended := false
				c := client{does: func(ctx context.Context, _ sessionrelay.Message) error {
					<-ctx.Done()
					ended = true
					return ctx.Err()
				}}
				type key struct{}
				ctx, cancel := context.WithCancel(context.WithValue(t.Context(), key{}, "kept"))
				conn, err := a.Connect(ctx, sessionrelay.Hello{User: "bob"}, func(ctx context.Context, m sessionrelay.Message) error {
					assert.Equal(t, "kept", ctx.Value(key{}))
					return c.send(ctx, m)
				})
				require.NoError(t, err)
				cancel()
				sends(t, a, conn.Session(), "1", "2")
				pass(10 * time.Second)
				assert.False(t, ended, "it outlives the call that made it")
				assert.Equal(t, []string{"1"}, c.received())
				end(t, a, conn, stop)
				synctest.Wait()
				assert.True(t, ended)
				pass(10 * time.Minute)
				assert.Equal(t, []string{"1"}, c.received(), "nothing is forwarded any more")
			})
		})
	}
}

func TestEndedConnectionIsSentNothingMore(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		var c client
		conn := comes(t, a, new(client))
		session := conn.Session()
		conn.Disconnect()
		synctest.Wait()
		sends(t, a, session, "1", "2", "3")
		made := make(chan *sessionrelay.Conn, 1)
		c.does = func(_ context.Context, m sessionrelay.Message) error {
			if string(m.Payload) == "2" {
				(<-made).Disconnect()
			}
			return nil
		}
		store.on("Deregister", func(context.Context) error { time.Sleep(time.Second); return nil })
		store.on("Fetch", func(ctx context.Context) error { return ctx.Err() })
		made <- comes(t, a, &c, session)
		pass(time.Minute)
		assert.Equal(t, []string{"1", "2"}, c.received())
		var c2 client
		comes(t, a, &c2, session)
		pass(time.Minute)
		var attempts []int
		for _, m := range c2.messages() {
			attempts = append(attempts, m.Attempts)
		}
		assert.Equal(t, []string{"1", "2", "3"}, c2.received())
		assert.Equal(t, []int{1, 1, 0}, attempts)
	})
}

func TestMessageThatIsNeverAcknowledgedIsADeadLetterAfterTenConnections(t *testing.T) {
	onEach(t, func(t *testing.T, f *fleet) {
		ctx := t.Context()
		a, store := f.node("a")
		b, _ := f.node("b")
		var c client
		conn := comes(t, a, &c)
		session := conn.Session()
		poison := sends(t, b, session, "poison")[0]
		for i := range 10 {
			soon(t, func() bool { return len(c.received()) == i+1 })
			assert.Equal(t, i, c.messages()[i].Attempts)
			soon(t, func() bool { // the attempt is counted before the connection is lost
				return len(ids(t, store, session, home(t, store, session).Conn)) == 0
			})
			assert.Empty(t, f.events(sessionrelay.EventDeadLetter))
			conn.Disconnect()
			away(t, store, session)
			conn = comes(t, []*sessionrelay.Node{b, a}[i%2], &c, session)
		}
		soon(t, func() bool { return len(f.events(sessionrelay.EventDeadLetter)) == 1 })
		assert.Equal(t, []sessionrelay.Event{
			{Kind: sessionrelay.EventDeadLetter, Session: session, Home: home(t, store, session), Message: poison},
		}, f.events(sessionrelay.EventDeadLetter))
		sends(t, a, session, "next")
		soon(t, func() bool { return len(c.received()) == 11 })
		conn.Disconnect()
		away(t, store, session)
		conn = comes(t, b, &c, session)
		soon(t, func() bool { return len(c.received()) == 12 })
		assert.Equal(t, []string{"next", "next"}, c.received()[10:], "the dead letter holds up nobody")
		assert.Len(t, f.events(sessionrelay.EventDeadLetter), 1)
		buried, err := store.Buried(ctx, session)
		require.NoError(t, err)
		assert.Equal(t, []sessionrelay.Message{{ID: poison, Attempts: 10, Payload: []byte("poison")}}, buried)

		require.NoError(t, store.Revive(ctx, session, poison))
		soon(t, func() bool { return len(c.received()) == 13 })
		assert.Equal(t, sessionrelay.Message{ID: poison, Payload: []byte("poison")}, c.messages()[12])
		require.NoError(t, conn.Acked(ctx, poison))
		buried, err = store.Buried(ctx, session)
		require.NoError(t, err)
		assert.Empty(t, buried)
	})
}

func TestDeadLetterIsToldWhenTheStoreHasIt(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a", sessionrelay.WithAttempts(1, time.Second))
		var c client
		conn := comes(t, a, &c)
		sends(t, a, conn.Session(), "1", "2", "3")
		synctest.Wait()
		store.on("Bury", down)
		comes(t, a, &c, conn.Session())
		synctest.Wait()
		assert.Empty(t, f.events(sessionrelay.EventDeadLetter))
		store.on("Bury", nil)
		pass(time.Second)
		synctest.Wait()
		assert.Len(t, f.events(sessionrelay.EventDeadLetter), 3)
		assert.Equal(t, []string{"1", "2", "3"}, c.received(), "each was tried once")
	})
}

func TestForwardingSurvivesAnOutage(t *testing.T) {
	for _, verb := range []string{"Fetch", "Attempted"} {
		t.Run(verb, func(t *testing.T) {
			inBubble(t, func(t *testing.T, f *fleet) {
				a, store := f.node("a")
				var c client
				conn := comes(t, a, &c)
				synctest.Wait()
				store.on(verb, down)
				was := store.times(verb)
				sends(t, a, conn.Session(), "1")
				pass(10 * time.Minute)
				n := store.times(verb) - was
				assert.Greater(t, n, 15)
				assert.Less(t, n, 25, "every 40 s by and by")
				lives(t, conn)
				store.on(verb, nil)
				sends(t, a, conn.Session(), "2")
				pass(41 * time.Second)
				got := c.received()
				assert.Equal(t, []string{"1", "2"}, got[len(got)-2:])
				was = store.times("Fetch")
				pass(10 * time.Minute)
				assert.Equal(t, was, store.times("Fetch"), "it rests")
				synctest.Wait()
				store.on(verb, down)
				sends(t, a, conn.Session(), "3")
				synctest.Wait()
				store.on(verb, nil)
				pass(2501 * time.Millisecond)
				assert.Contains(t, c.received(), "3", "the pause is short again after a success")
			})
		})
	}
}

func TestMoveThatIsFoundInTheOutboxEndsTheConnection(t *testing.T) {
	for _, verb := range []string{"Fetch", "Attempted", "Bury"} {
		for _, why := range []error{sessionrelay.ErrMoved, sessionrelay.ErrGone} {
			t.Run(fmt.Sprint(verb, " ", why), func(t *testing.T) {
				inBubble(t, func(t *testing.T, f *fleet) {
					a, store := f.node("a", sessionrelay.WithAttempts(1, time.Second))
					store.deaf = true
					session := comes(t, a, new(client)).Session()
					sends(t, a, session, "tried")
					synctest.Wait()
					if verb != "Bury" {
						buried := home(t, store, session).Conn
						require.NoError(t, store.Bury(t.Context(), session, buried, ids(t, store, session, buried)...))
						sends(t, a, session, "new")
					}
					store.on(verb, func(context.Context) error { return fmt.Errorf("in the store's words: %w", why) })
					conn := comes(t, a, new(client), session)
					sends(t, a, session, "newer")
					synctest.Wait()
					ends(t, conn, why)
					assert.Equal(t, why, conn.Err(), "nothing but the reason")
					was := store.times("Fetch")
					pass(time.Hour)
					assert.Equal(t, was, store.times("Fetch"))
					assert.Empty(t, f.events(sessionrelay.EventDisconnected))
				})
			})
		}
	}
}

func TestRequestIsAnsweredOnceOnAnyNode(t *testing.T) {
	onEach(t, func(t *testing.T, f *fleet) {
		ctx := t.Context()
		a, _ := f.node("a")
		b, _ := f.node("b")
		var c client
		conn := comes(t, a, &c)
		withData, err := b.Request(ctx, conn.Session(), []byte("1"), []byte("about"))
		require.NoError(t, err)
		without, err := a.Request(ctx, conn.Session(), []byte("2"), nil)
		require.NoError(t, err)
		plain := sends(t, a, conn.Session(), "3")[0]
		gets(t, &c, "1", "2", "3")
		for i, m := range c.messages() {
			assert.Equal(t, i < 2, m.Request)
		}
		require.NoError(t, conn.Acked(ctx, withData, without, plain))
		conn = comes(t, b, &c, conn.Session())
		for i := range 2 {
			about, first, err := answered(ctx, conn, withData)
			require.NoError(t, err)
			assert.Equal(t, i == 0, first)
			if first {
				assert.Equal(t, "about", string(about))
			}
			about, first, err = answered(ctx, conn, without)
			require.NoError(t, err)
			assert.Equal(t, i == 0, first)
			if first {
				assert.Equal(t, []byte{}, about, "empty, not nil")
			}
		}
		for _, id := range []string{plain, "never was"} {
			_, first, err := answered(ctx, conn, id)
			require.NoError(t, err)
			assert.False(t, first)
		}
	})
}

func TestAcknowledgedMessagesAreNotSentAgain(t *testing.T) {
	onEach(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		var c, c2 client
		conn := comes(t, a, &c)
		sends(t, a, conn.Session(), "1", "2", "3")
		gets(t, &c, "1", "2", "3")
		require.NoError(t, conn.Acked(t.Context(), c.ids()[0], "never was"))
		again := comes(t, a, &c2, conn.Session())
		gets(t, &c2, "2", "3")
		require.NoError(t, conn.Acked(t.Context(), c.ids()[1]), "the client has it, whoever hears of it")
		require.NoError(t, again.Acked(t.Context()))
		require.NoError(t, again.Forget(t.Context()))
		assert.Equal(t, 2, store.times("Delivered"), "nothing to say is not said")
		assert.Zero(t, store.times("Forget"))
		var c3 client
		comes(t, a, &c3, conn.Session())
		gets(t, &c3, "3")
	})
}

// Case 35 of the original.
func TestNodeThatHasNotGotTheConnectionDisownsIt(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		b, other := f.node("b")
		session := comes(t, a, new(client)).Session()
		synctest.Wait()
		dead := comesDeaf(t, store, session)
		synctest.Wait()
		sends(t, b, session, "1")
		synctest.Wait()
		assert.Equal(t, dead, home(t, store, session).Conn, "not b's to say")
		assert.Zero(t, other.times("Deregister"))
		sends(t, a, session, "2")
		synctest.Wait()
		assert.Zero(t, home(t, store, session))
		assert.Equal(t, 1, store.times("Deregister"))
		sends(t, a, session, "3")
		synctest.Wait()
		assert.Equal(t, 1, store.times("Deregister"), "a session that is nowhere is nobody's")
		var c client
		comes(t, b, &c, session)
		synctest.Wait()
		assert.Equal(t, []string{"1", "2", "3"}, c.received())
	})
}
