package sessionrelay_test

import (
	"context"
	"errors"
	"math"
	"runtime"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/sessionrelay"
)

// slowStop is a store whose watches take a while to stop.
type slowStop struct {
	*spy
	stopping, goOn chan struct{}
}

func (s slowStop) Watch(session string, changed func()) func() {
	stop := s.spy.Watch(session, changed)
	return func() { close(s.stopping); <-s.goOn; stop() }
}

func TestDisconnectWhileTheNodeEndsIsNotLost(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		s := slowStop{&spy{Store: f.open("a")}, make(chan struct{}), make(chan struct{})}
		a := f.nodeOn(s)
		stop := runs(t, a)
		conn := comes(t, a, new(client))
		synctest.Wait() // Run's first sweep is over
		go conn.Disconnect()
		<-s.stopping
		over := make(chan struct{})
		go func() { stop(); close(over) }()
		synctest.Wait()
		close(s.goOn)
		<-over
		assert.Zero(t, home(t, s, conn.Session()))
	})
}

func TestHugeIntervalsAreRefused(t *testing.T) {
	for name, o := range map[string]sessionrelay.Option{
		"expire": sessionrelay.WithIntervals(time.Minute, math.MaxInt64, time.Hour),
		"alive":  sessionrelay.WithIntervals(math.MaxInt64, time.Hour, time.Hour),
	} {
		t.Run(name, func(t *testing.T) {
			_, err := sessionrelay.New(new(sessionrelay.Memory).Store("a"), o)
			assert.ErrorIs(t, err, sessionrelay.ErrInvalid)
		})
	}
}

func TestHugePauseAndNamelessNodeAreRefused(t *testing.T) {
	_, err := sessionrelay.New(new(sessionrelay.Memory).Store("a"), sessionrelay.WithAttempts(10, math.MaxInt64))
	assert.ErrorIs(t, err, sessionrelay.ErrInvalid)
	_, err = sessionrelay.New(new(sessionrelay.Memory).Store(""))
	assert.ErrorIs(t, err, sessionrelay.ErrInvalid)
}

func TestMessageOfAConnectionThatIsBeingMadeIsSentAfterIt(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		session := comes(t, a, new(client)).Session()
		synctest.Wait()
		store.then("Register", func(context.Context) error {
			sends(t, a, session, "1")
			time.Sleep(time.Second)
			return nil
		})
		c := client{does: func(context.Context, sessionrelay.Message) error { return errNo }}
		comes(t, a, &c, session)
		pass(time.Minute)
		assert.Equal(t, []string{"connected", "reconnected", "send_failed"}, f.kinds())
		assert.Equal(t, home(t, store, session), f.events("send_failed")[0].Home)
	})
}

func TestMessageThatKillsItsConnectionIsADeadLetterInTheEnd(t *testing.T) {
	everywhere(t, func(t *testing.T, open func(string) sessionrelay.Store) {
		f := newFleet(t, open)
		a, _ := f.node("a")
		var c client
		made := make(chan *sessionrelay.Conn, 1)
		c.does = func(ctx context.Context, m sessionrelay.Message) error {
			(<-made).Disconnect()
			return ctx.Err()
		}
		conn := comes(t, a, &c)
		session := conn.Session()
		made <- conn
		sends(t, a, session, "poison")
		for range 12 {
			time.Sleep(100 * time.Millisecond)
			if len(f.events("dead_letter")) == 1 {
				return
			}
			made = make(chan *sessionrelay.Conn, 1)
			conn := comes(t, a, &c, session)
			made <- conn
		}
		var attempts []int
		for _, m := range c.messages() {
			attempts = append(attempts, m.Attempts)
		}
		assert.Fail(t, "no dead letter", "%v", attempts)
	})
}

func TestNewSessionNobodyHeardOfIsRemoved(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		store.then("Register", down)
		for range 75 {
			_, err := a.Connect(t.Context(), sessionrelay.Hello{User: "bob"}, new(client).send)
			require.ErrorIs(t, err, sessionrelay.ErrUnavailable)
		}
		store.then("Register", nil)
		synctest.Wait()
		_, err := a.Connect(t.Context(), sessionrelay.Hello{User: "bob"}, new(client).send)
		require.NoError(t, err)
	})
}

func TestSendFuncThatBlocksHearsOfAMove(t *testing.T) {
	for _, how := range []string{"moved", "removed"} {
		t.Run(how, func(t *testing.T) {
			inBubble(t, func(t *testing.T, f *fleet) {
				a, _ := f.node("a")
				b, _ := f.node("b")
				runs(t, a)
				c := client{does: func(ctx context.Context, _ sessionrelay.Message) error { <-ctx.Done(); return ctx.Err() }}
				conn := comes(t, a, &c)
				sends(t, b, conn.Session(), "1")
				synctest.Wait()
				if how == "moved" {
					comes(t, b, new(client), conn.Session())
				} else {
					require.NoError(t, b.Remove(t.Context(), conn.Session()))
				}
				pass(10 * time.Minute)
				assert.Error(t, conn.Err(), "ten minutes later")
			})
		})
	}
}

func TestLostConnectionAsksNothingMore(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		made := make(chan *sessionrelay.Conn, 1)
		c := client{does: func(context.Context, sessionrelay.Message) error { (<-made).Disconnect(); return nil }}
		session := comes(t, a, new(client)).Session()
		synctest.Wait()
		is := home(t, store, session)
		require.NoError(t, store.Store.Deregister(t.Context(), session, is.Conn))
		sends(t, a, session, "1", "2", "3")
		hold := make(chan struct{})
		store.on("Deregister", func(context.Context) error { <-hold; return nil })
		var n atomic.Int32 // the replaced connection may be asking, too
		store.on("Fetch", func(context.Context) error {
			if n.Add(1) == 1000 {
				close(hold)
			}
			return nil
		})
		made <- comes(t, a, &c, session)
		synctest.Wait()
		if n.Load() < 1000 {
			close(hold)
		}
		assert.Less(t, n.Load(), int32(10))
	})
}

func TestSendFuncThatEndsItsGoroutineHasFailed(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, _ := f.node("a")
		c := client{does: func(_ context.Context, m sessionrelay.Message) error {
			if string(m.Payload) == "1" {
				runtime.Goexit()
			}
			return nil
		}}
		conn := comes(t, a, &c)
		sends(t, a, conn.Session(), "1")
		pass(time.Minute)
		sends(t, a, conn.Session(), "2")
		pass(time.Minute)
		assert.Contains(t, c.received(), "2")
	})
}

func TestEffectIsStoredUpToTheDeadline(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		conn := comes(t, a, new(client))
		synctest.Wait()
		begun := time.Now()
		store.on("Complete", func(ctx context.Context) error {
			if time.Since(begun) < 27*time.Second {
				return down(ctx)
			}
			return nil
		})
		_, err := conn.Receive(t.Context(), "m", says("paid"))
		require.NoError(t, err)
	})
}

func TestRunWithAnEndedContextTellsNoFailure(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		store.on("Homed", func(ctx context.Context) error { return ctx.Err() })
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		require.NoError(t, a.Run(ctx))
		assert.Empty(t, f.kinds())
	})
}

// deaf hides Watch, as a node whose subscription is down (or that was stopped for a moment) has it.
type deaf struct{ sessionrelay.Store }

func none(context.Context, sessionrelay.Message) error { return nil }

func nodesOf(t *testing.T) (a, b *sessionrelay.Node) {
	fleet := new(sessionrelay.Memory)
	a, err := sessionrelay.New(deaf{fleet.Store("a")})
	require.NoError(t, err)
	b, err = sessionrelay.New(deaf{fleet.Store("b")})
	require.NoError(t, err)
	return a, b
}

func TestReplacedConnectionReceivesNothing(t *testing.T) {
	ctx := t.Context()
	a, b := nodesOf(t)
	old, err := a.Connect(ctx, sessionrelay.Hello{User: "u"}, none)
	require.NoError(t, err)
	now, err := b.Connect(ctx, sessionrelay.Hello{Session: old.Session(), User: "u"}, none)
	require.NoError(t, err)
	runs := 0
	handle := func(context.Context) ([]byte, error) { runs++; return nil, nil }
	_, err = now.Receive(ctx, "m", handle)
	require.NoError(t, err)
	require.NoError(t, now.Forget(ctx, "m")) // the client has its reply
	_, err = old.Receive(ctx, "m", handle)   // the first copy, read late from the old socket
	assert.ErrorIs(t, err, sessionrelay.ErrMoved)
	assert.Equal(t, 1, runs)
	<-old.Done()
	assert.ErrorIs(t, old.Err(), sessionrelay.ErrMoved)
}

func TestAnswerWhoseHandlerFailsIsFirstAgain(t *testing.T) {
	ctx := t.Context()
	a, _ := nodesOf(t)
	c, err := a.Connect(ctx, sessionrelay.Hello{User: "u"}, none)
	require.NoError(t, err)
	id, err := a.Request(ctx, c.Session(), []byte("?"), []byte("order 1"))
	require.NoError(t, err)
	handle := func(fail error) func(context.Context) ([]byte, error) {
		return func(ctx context.Context) ([]byte, error) {
			about, first, err := c.Answered(ctx, id)
			if err != nil || !first {
				return []byte("late"), err
			}
			return about, fail
		}
	}
	_, err = c.Receive(ctx, "answer", handle(errors.New("database down")))
	require.Error(t, err)
	reply, err := c.Receive(ctx, "answer", handle(nil)) // "as if it had never come"
	require.NoError(t, err)
	assert.Equal(t, "order 1", string(reply))
}

// flaky fails Attempted once, and lets the test in between Fetch and send.
type flaky struct {
	sessionrelay.Store
	fails   atomic.Int32
	fetched func(n int)
	n       atomic.Int32
}

func (f *flaky) Attempted(ctx context.Context, s, c string, ids ...string) error {
	if f.fails.Add(-1) >= 0 {
		return sessionrelay.ErrUnavailable
	}
	return f.Store.Attempted(ctx, s, c, ids...)
}

func (f *flaky) Fetch(ctx context.Context, s, c string, most int) ([]sessionrelay.Message, error) {
	m, err := f.Store.Fetch(ctx, s, c, most)
	if len(m) > 0 {
		f.fetched(int(f.n.Add(1)))
	}
	return m, err
}

func TestAcknowledgedMessageIsNotSentThoughItWasFetched(t *testing.T) {
	ctx := t.Context()
	f := &flaky{Store: new(sessionrelay.Memory).Store("a")}
	f.fails.Store(1)
	n, err := sessionrelay.New(f, sessionrelay.WithAttempts(10, time.Millisecond))
	require.NoError(t, err)
	sent := make(chan string, 10)
	var c *sessionrelay.Conn
	var id atomic.Value
	acked := make(chan struct{})
	f.fetched = func(n int) {
		if n == 2 { // the ACK is handled by the WebSocket's reader meanwhile
			assert.NoError(t, c.Acked(ctx, id.Load().(string)))
			close(acked)
		}
	}
	c, err = n.Connect(ctx, sessionrelay.Hello{User: "u"}, func(_ context.Context, m sessionrelay.Message) error {
		id.Store(m.ID)
		sent <- m.ID
		return nil
	})
	require.NoError(t, err)
	_, err = n.Send(ctx, c.Session(), []byte("x"))
	require.NoError(t, err)
	<-sent
	<-acked // from here on the node says "forget" to the client
	select {
	case <-sent:
		t.Error("sent again after Acked had returned")
	case <-time.After(time.Second):
	}
}

// A send func may wait for the acknowledgement itself; anybody else waits for it.
func TestAcknowledgementDuringItsOwnSend(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		var conn *sessionrelay.Conn
		made, acked := make(chan struct{}), make(chan error, 1)
		other := false
		c := client{does: func(ctx context.Context, m sessionrelay.Message) error {
			<-made
			if other {
				go func() { acked <- conn.Acked(t.Context(), m.ID) }()
				time.Sleep(time.Second)
				assert.Empty(t, acked)
				return nil
			}
			return conn.Acked(ctx, m.ID)
		}}
		conn = comes(t, a, &c)
		close(made)
		begun := time.Now()
		sends(t, a, conn.Session(), "1")
		synctest.Wait()
		assert.Zero(t, time.Since(begun))
		other = true
		sends(t, a, conn.Session(), "2")
		require.NoError(t, <-acked)
		assert.Equal(t, time.Second, time.Since(begun))
		assert.Equal(t, 2, store.times("Delivered"))

		c.does = func(context.Context, sessionrelay.Message) error { time.Sleep(time.Minute); return nil }
		id := sends(t, a, conn.Session(), "3")[0]
		synctest.Wait()
		require.ErrorIs(t, conn.Acked(t.Context(), id), sessionrelay.ErrInProgress)
		assert.Equal(t, 3500*time.Millisecond, time.Since(begun))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		require.ErrorIs(t, conn.Acked(ctx, id), context.DeadlineExceeded)
		assert.Equal(t, 2, store.times("Delivered"))
		time.Sleep(time.Minute)
		require.NoError(t, conn.Acked(t.Context(), id))
	})
}
