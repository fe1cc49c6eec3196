package sessionrelay_test

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/sessionrelay"
)

// A client comes back, acks what it had while the first Fetch is under way; the ack is over before the fetch returns.
func TestAcknowledgementDuringAFetchHoldsNothingUp(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		var c client
		conn := comes(t, a, &c)
		session := conn.Session()
		id := sends(t, a, session, "A")[0]
		synctest.Wait()
		conn.Disconnect()
		synctest.Wait()
		sends(t, a, session, "B")
		var once atomic.Bool
		store.then("Fetch", func(context.Context) error { // a slow reply
			if !once.Swap(true) {
				time.Sleep(100 * time.Millisecond)
			}
			return nil
		})
		var c2 client
		conn = comes(t, a, &c2, session)
		pass(10 * time.Millisecond)
		require.NoError(t, conn.Acked(t.Context(), id))
		pass(time.Second)
		assert.Equal(t, []string{"B"}, c2.received())
	})
}

// Its own error wraps ErrGone (it asked the relay about another session).
func TestErrorOfASendFuncSaysNothingOfItsSession(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		c := client{}
		c.does = func(ctx context.Context, m sessionrelay.Message) error {
			_, err := a.Send(ctx, "another session", m.Payload)
			return err
		}
		conn := comes(t, a, &c)
		sends(t, a, conn.Session(), "1")
		pass(time.Second)
		assert.NoError(t, conn.Err())
		conn.Disconnect()
		pass(time.Second)
		assert.Zero(t, home(t, store, conn.Session()))
	})
}

// Somebody sends on this node between the loss of the connection and the end of the send func.
func TestMessageThatKillsItsConnectionIsCountedThoughSomebodySends(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, _ := f.node("a")
		var c client
		made := make(chan *sessionrelay.Conn, 1)
		var session string
		c.does = func(ctx context.Context, m sessionrelay.Message) error {
			if string(m.Payload) != "poison" {
				return nil
			}
			(<-made).Disconnect()
			sends(t, a, session, "news")
			time.Sleep(time.Millisecond)
			return errNo
		}
		conn := comes(t, a, &c)
		session = conn.Session()
		made <- conn
		sends(t, a, session, "poison")
		for range 12 {
			pass(time.Second)
			made = make(chan *sessionrelay.Conn, 1)
			conn := comes(t, a, &c, session)
			made <- conn
		}
		pass(time.Second)
		var at []int
		for _, m := range c.messages() {
			at = append(at, m.Attempts)
		}
		assert.NotEmpty(t, f.events("dead_letter"), "%v", at)
	})
}

// It takes the client 50 ms to die of it, and until then others are sent, too.
func TestMessagesBehindAPoisonedOneAreNotBuriedWithIt(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, _ := f.node("a")
		var conn atomic.Pointer[sessionrelay.Conn]
		var c client
		c.does = func(ctx context.Context, m sessionrelay.Message) error {
			if string(m.Payload) == "poison" {
				go func() { time.Sleep(50 * time.Millisecond); conn.Load().Disconnect() }()
			}
			return nil // in the socket's buffer
		}
		conn.Store(comes(t, a, new(client)))
		session := conn.Load().Session()
		conn.Load().Disconnect()
		synctest.Wait()
		ids := sends(t, a, session, "poison", "i1", "i2", "i3")
		for range 11 {
			conn.Store(comes(t, a, &c, session))
			pass(time.Second)
		}
		var dead []string
		for _, e := range f.events("dead_letter") {
			dead = append(dead, e.Message)
		}
		assert.Equal(t, ids[:1], dead)
		pass(time.Minute)
	})
}

// Its connections do not wait for the store.
func TestEndOfANodeOnAHangingStoreIsBounded(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		stop := runs(t, a)
		var conns []*sessionrelay.Conn
		for i := range 1000 {
			conn, err := a.Connect(t.Context(), sessionrelay.Hello{User: fmt.Sprint(i)}, new(client).send)
			require.NoError(t, err)
			conns = append(conns, conn)
		}
		synctest.Wait()
		store.on("Deregister", func(ctx context.Context) error { time.Sleep(time.Second); return down(ctx) })
		begun := time.Now()
		over := make(chan struct{})
		go func() { stop(); close(over) }()
		pass(time.Second)
		n := 0
		for _, c := range conns {
			if c.Err() != nil {
				n++
			}
		}
		assert.Equal(t, 1000, n, "all know at once")
		<-over
		assert.Less(t, time.Since(begun), 10*time.Second)
	})
}

func TestSweepEndsWithRun(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		dead, _ := f.node("a")
		for i := range 200 {
			_, err := dead.Connect(t.Context(), sessionrelay.Hello{User: fmt.Sprint(i)}, new(client).send)
			require.NoError(t, err)
		}
		synctest.Wait()
		a, store := f.node("a")
		store.on("Deregister", func(ctx context.Context) error { time.Sleep(time.Second); return down(ctx) })
		stop := runs(t, a)
		pass(time.Second)
		begun := time.Now()
		stop()
		assert.Less(t, time.Since(begun), 30*time.Second)
	})
}

// late is a store whose Register comes to it a second after it has failed.
type late struct{ *spy }

func (l late) Register(ctx context.Context, h sessionrelay.Hello, conn string, limit int) (sessionrelay.Info, sessionrelay.Home, error) {
	go func() { time.Sleep(time.Second); _, _, _ = l.Store.Register(context.Background(), h, conn, limit) }()
	return sessionrelay.Info{}, sessionrelay.Home{}, down(ctx)
}

// The request of a Register that timed out arrives after its Remove.
func TestRegistrationThatComesLateIsRefused(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		s := late{&spy{Store: f.open("a")}}
		a := f.nodeOn(s)
		_, err := a.Connect(t.Context(), sessionrelay.Hello{User: "bob"}, new(client).send)
		require.ErrorIs(t, err, sessionrelay.ErrUnavailable)
		pass(time.Minute)
		n := 0
		require.NoError(t, s.List(t.Context(), sessionrelay.Filter{}, func(sessionrelay.Info) bool { n++; return true }))
		assert.Zero(t, n)
	})
}

// Accept was stored, its reply was not heard.
func TestClaimNobodyHeardOfIsFreeSoon(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		conn := comes(t, a, new(client))
		store.then("Accept", down)
		_, err := conn.Receive(t.Context(), "m", func(context.Context) ([]byte, error) { return nil, nil })
		require.ErrorIs(t, err, sessionrelay.ErrUnavailable)
		store.then("Accept", nil)
		begun := time.Now()
		for {
			if _, err = conn.Receive(t.Context(), "m", func(context.Context) ([]byte, error) { return nil, nil }); err == nil {
				break
			}
			require.ErrorIs(t, err, sessionrelay.ErrInProgress)
			time.Sleep(time.Second)
		}
		assert.Less(t, time.Since(begun), 2*time.Second)
	})
}

// The client is at home on another node before its old one has heard of its end.
func TestMessageThatMovesItsSessionIsADeadLetterInTheEnd(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, _ := f.node("a")
		b, _ := f.node("b")
		session := comes(t, a, new(client)).Session()
		sends(t, a, session, "x")
		synctest.Wait()
		n := 0
		var c client
		nodes := []*sessionrelay.Node{a, b}
		c.does = func(ctx context.Context, m sessionrelay.Message) error {
			if n++; n < 15 {
				comes(t, nodes[n%2], &c, session)
			}
			return ctx.Err()
		}
		comes(t, b, &c, session)
		pass(time.Minute)
		var at []int
		for _, m := range c.messages() {
			at = append(at, m.Attempts)
		}
		assert.Len(t, f.events("dead_letter"), 1, "%v", at)
	})
}
