package sessionrelay_test

// Connections: who gets a session, who loses it, and what a refusal leaves behind.

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/sessionrelay"
)

func TestNewSessionIsKnownToAllNodes(t *testing.T) {
	onEach(t, func(t *testing.T, f *fleet) {
		a, _ := f.node("a")
		_, b := f.node("b")
		h := sessionrelay.Hello{User: "bob", Lib: "lib", App: "app", Version: "1.2"}
		conn, err := a.Connect(t.Context(), h, new(client).send)
		require.NoError(t, err)
		lives(t, conn)
		i, err := b.Lookup(t.Context(), conn.Session())
		require.NoError(t, err)
		got := sessionrelay.Hello{Session: i.Session, User: i.User, Lib: i.Lib, App: i.App, Version: i.Version}
		h.Session = conn.Session()
		assert.Equal(t, h, got)
		assert.Equal(t, "a", i.Home.Node)
		assert.Equal(t, []sessionrelay.Event{{Kind: sessionrelay.EventConnected, Session: conn.Session(), Home: i.Home}}, f.events(""))
		other := comes(t, a, new(client))
		assert.NotEqual(t, conn.Session(), other.Session())
		assert.NotEqual(t, i.Home.Conn, home(t, b, other.Session()).Conn)
		lives(t, conn)
	})
}

func TestSecondConnectionTakesTheSessionFromTheFirst(t *testing.T) {
	for _, where := range []string{"a", "b"} {
		t.Run("on "+where, func(t *testing.T) {
			onEach(t, func(t *testing.T, f *fleet) {
				a, store := f.node("a")
				n := a
				if where == "b" {
					n, _ = f.node("b")
				}
				var c1, c2 client
				first := comes(t, a, &c1)
				sends(t, a, first.Session(), "1")
				gets(t, &c1, "1")
				second := comes(t, n, &c2, first.Session())
				assert.Equal(t, first.Session(), second.Session())
				ends(t, first, sessionrelay.ErrMoved)
				sends(t, a, first.Session(), "2")
				gets(t, &c2, "1", "2")
				assert.Equal(t, []string{"1"}, c1.received())
				is := home(t, store, first.Session())
				assert.Equal(t, where, is.Node)
				first.Disconnect()
				first.Disconnect()
				sends(t, a, first.Session(), "3")
				gets(t, &c2, "1", "2", "3")
				assert.Equal(t, is, home(t, store, first.Session()), "a late disconnect is of the old connection only")
				assert.Equal(t, []string{sessionrelay.EventConnected, sessionrelay.EventReconnected}, f.kinds())
				lives(t, second)
			})
		})
	}
}

func TestLostConnectionLeavesASessionThatComesBack(t *testing.T) {
	onEach(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		b, _ := f.node("b")
		var c client
		conn := comes(t, a, &c)
		was := home(t, store, conn.Session())
		conn.Disconnect()
		ends(t, conn, nil)
		away(t, store, conn.Session())
		soon(t, func() bool { return len(f.events(sessionrelay.EventDisconnected)) == 1 })
		sends(t, b, conn.Session(), "1", "2")
		assert.Empty(t, c.received())
		again := comes(t, b, &c, conn.Session())
		gets(t, &c, "1", "2")
		is := home(t, store, conn.Session())
		conn.Disconnect()
		conn.Disconnect()
		assert.Equal(t, []sessionrelay.Event{
			{Kind: sessionrelay.EventConnected, Session: conn.Session(), Home: was},
			{Kind: sessionrelay.EventDisconnected, Session: conn.Session(), Home: was},
			{Kind: sessionrelay.EventReconnected, Session: conn.Session(), Home: is},
		}, f.events(""))
		lives(t, again)
	})
}

// Cases 6 and 37 of the original: there it ended the owner's session.
func TestStrangerChangesNothing(t *testing.T) {
	for _, where := range []string{"a", "b"} {
		t.Run("on "+where, func(t *testing.T) {
			onEach(t, func(t *testing.T, f *fleet) {
				ctx := t.Context()
				a, store := f.node("a")
				n, spied := a, store
				if where == "b" {
					n, spied = f.node("b")
				}
				var c client
				conn := comes(t, a, &c)
				reply, err := conn.Receive(ctx, "m", func(context.Context) ([]byte, error) { return []byte("kept"), nil })
				require.NoError(t, err)
				request, err := a.Request(ctx, conn.Session(), []byte("what?"), []byte("about"))
				require.NoError(t, err)
				gets(t, &c, "what?")
				was, err := store.Lookup(ctx, conn.Session())
				require.NoError(t, err)
				told := f.kinds()

				got, err := n.Connect(ctx, sessionrelay.Hello{Session: conn.Session(), User: "eve", App: "evil"}, new(client).send)
				require.ErrorIs(t, err, sessionrelay.ErrWrongUser)
				assert.Nil(t, got)

				is, err := store.Lookup(ctx, conn.Session())
				require.NoError(t, err)
				assert.Equal(t, was, is)
				assert.Equal(t, told, f.kinds())
				assert.Zero(t, spied.times("Deregister"))
				lives(t, conn)
				again, err := conn.Receive(ctx, "m", never(t))
				require.NoError(t, err)
				assert.Equal(t, reply, again)
				sends(t, n, conn.Session(), "next")
				gets(t, &c, "what?", "next")
				conn.Disconnect()
				away(t, store, conn.Session())
				var c2 client
				conn = comes(t, n, &c2, conn.Session())
				gets(t, &c2, "what?", "next")
				about, first, err := answered(ctx, conn, request)
				require.NoError(t, err)
				assert.True(t, first)
				assert.Equal(t, "about", string(about))
			})
		})
	}
}

// never is a handler that must not run.
func never(t *testing.T) func(context.Context) ([]byte, error) {
	return func(context.Context) ([]byte, error) {
		assert.Fail(t, "handled")
		return nil, nil
	}
}

func TestUserAtTheLimitKeepsAndComesBackToHisSessions(t *testing.T) {
	onEach(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a", sessionrelay.WithLimit(2))
		b, spied := f.node("b", sessionrelay.WithLimit(2))
		first, second := comes(t, a, new(client)), comes(t, b, new(client))
		sends(t, a, first.Session(), "waits")
		told := len(f.events(""))
		for _, n := range []*sessionrelay.Node{a, b} {
			conn, err := n.Connect(t.Context(), sessionrelay.Hello{User: "bob"}, new(client).send)
			require.ErrorIs(t, err, sessionrelay.ErrCap)
			assert.Nil(t, conn)
		}
		assert.Len(t, f.events(""), told)
		assert.Zero(t, spied.times("Deregister")+store.times("Deregister"), "a refusal has registered nothing")
		assert.Len(t, listed(t, store, sessionrelay.Filter{User: "bob"}), 2)
		lives(t, first)
		lives(t, second)
		var c client
		comes(t, b, &c, first.Session())
		gets(t, &c, "waits")
		_, err := a.Connect(t.Context(), sessionrelay.Hello{User: "ann"}, new(client).send)
		require.NoError(t, err)
		require.NoError(t, b.Remove(t.Context(), second.Session()))
		comes(t, a, new(client))
	})
}

func TestUserMayHaveSeventyFiveSessions(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		var last *sessionrelay.Conn
		for range 75 {
			last = comes(t, a, new(client))
		}
		_, err := a.Connect(t.Context(), sessionrelay.Hello{User: "bob"}, new(client).send)
		require.ErrorIs(t, err, sessionrelay.ErrCap)
		comes(t, a, new(client), last.Session())
		assert.Len(t, listed(t, store, sessionrelay.Filter{}), 75)
	})
}

func TestSessionThatIsGoneCannotComeBack(t *testing.T) {
	onEach(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		conn := comes(t, a, new(client))
		require.NoError(t, a.Remove(t.Context(), conn.Session()))
		for _, session := range []string{conn.Session(), "never was"} {
			got, err := a.Connect(t.Context(), sessionrelay.Hello{Session: session, User: "bob"}, new(client).send)
			require.ErrorIs(t, err, sessionrelay.ErrGone)
			assert.Nil(t, got)
			assert.False(t, exists(t, store, session), "it is not made anew")
		}
		assert.Equal(t, 1, store.times("Register"))
		assert.Equal(t, []string{sessionrelay.EventConnected, sessionrelay.EventRemoved}, f.kinds())
	})
}

// Case 24 of the original.
func TestSessionThatTimedOutCannotComeBack(t *testing.T) {
	timed(t, func(t *testing.T, open func(string) sessionrelay.Store) {
		f := newFleet(t, open)
		a, store := f.node("a", sessionrelay.WithTimeout(time.Hour))
		b, _ := f.node("b", sessionrelay.WithTimeout(time.Hour))
		conn := comes(t, a, new(client))
		session := conn.Session()
		conn.Disconnect()
		synctest.Wait()
		sends(t, a, session, "1")
		pass(time.Hour)
		stop := runs(t, b)
		pass(6 * time.Minute)
		stop()
		assert.Len(t, f.events(sessionrelay.EventTimedOut), 1)
		_, err := a.Connect(t.Context(), sessionrelay.Hello{Session: session, User: "bob"}, new(client).send)
		require.ErrorIs(t, err, sessionrelay.ErrGone)
		_, err = b.Send(t.Context(), session, []byte("2"))
		require.ErrorIs(t, err, sessionrelay.ErrGone)
		assert.False(t, exists(t, store, session))
		var c client
		again := comes(t, a, &c)
		assert.NotEqual(t, session, again.Session())
		synctest.Wait()
		assert.Empty(t, c.received())
	})
}

func TestConnectOfAStoreThatIsDownConnectsNothing(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		conn := comes(t, a, new(client))
		for _, verb := range []string{"Lookup", "Register"} {
			store.on(verb, down)
			_, err := a.Connect(t.Context(), sessionrelay.Hello{Session: conn.Session(), User: "bob"}, new(client).send)
			require.ErrorIs(t, err, sessionrelay.ErrUnavailable, verb)
			store.on(verb, nil)
			synctest.Wait()
			lives(t, conn)
			assert.Equal(t, "a", home(t, store, conn.Session()).Node)
			assert.Equal(t, []string{sessionrelay.EventConnected}, f.kinds())
		}
		assert.Equal(t, 1, store.times("Deregister"), "what may have been registered is given up, what was not is not")
	})
}

func TestRegistrationNobodyHeardOfIsGivenUp(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		b, _ := f.node("b")
		var c client
		conn := comes(t, a, &c)
		session := conn.Session()
		hello := sessionrelay.Hello{Session: session, User: "bob"}

		_, lost := f.node("c")
		lost.then("Register", down)
		n := f.nodeOn(lost)
		got, err := n.Connect(t.Context(), hello, c.send)
		require.ErrorIs(t, err, sessionrelay.ErrUnavailable)
		assert.Nil(t, got)
		synctest.Wait()
		ends(t, conn, sessionrelay.ErrMoved)
		assert.Zero(t, home(t, store, session))

		ctx, cancel := context.WithCancel(t.Context())
		lost.then("Register", func(ctx context.Context) error { cancel(); return ctx.Err() })
		_, err = n.Connect(ctx, hello, c.send)
		require.ErrorIs(t, err, context.Canceled)
		synctest.Wait()
		assert.Zero(t, home(t, store, session), "given up though its caller has gone")

		sends(t, b, session, "later")
		synctest.Wait()
		assert.Empty(t, c.received(), "nothing is sent over what was never connected")
		comes(t, b, &c, session)
		synctest.Wait()
		assert.Equal(t, []string{"later"}, c.received())
		assert.Empty(t, f.events(sessionrelay.EventDisconnected), "it was never said to be connected")
	})
}

func TestRegistrationThatCouldNotBeGivenUpIsFoundBySignsOfLife(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		runs(t, a)
		var c client
		session := comes(t, a, new(client)).Session()
		synctest.Wait()
		store.then("Register", down)
		store.on("Deregister", down)
		_, err := a.Connect(t.Context(), sessionrelay.Hello{Session: session, User: "bob"}, c.send)
		require.ErrorIs(t, err, sessionrelay.ErrUnavailable)
		synctest.Wait()
		store.on("Deregister", nil)
		assert.NotZero(t, home(t, store, session))
		pass(time.Minute)
		assert.Zero(t, home(t, store, session))
		sends(t, a, session, "1")
		synctest.Wait()
		assert.Empty(t, c.received())
	})
}

func TestRefusalGivesNothingUp(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a", sessionrelay.WithLimit(1))
		session := comes(t, a, new(client)).Session()
		synctest.Wait()
		refused := func(h sessionrelay.Hello, why error) {
			_, err := a.Connect(t.Context(), h, new(client).send)
			require.ErrorIs(t, err, why)
			synctest.Wait()
			assert.Zero(t, store.times("Deregister"), "%v", why)
		}
		refused(sessionrelay.Hello{Session: session, User: "eve"}, sessionrelay.ErrWrongUser)
		refused(sessionrelay.Hello{User: "bob"}, sessionrelay.ErrCap)
		store.on("Register", func(context.Context) error { return sessionrelay.ErrMoved })
		refused(sessionrelay.Hello{Session: session, User: "bob"}, sessionrelay.ErrMoved)
		assert.Equal(t, []string{sessionrelay.EventConnected}, f.kinds())
	})
}

func TestEndedNodeConnectsNobody(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		runs(t, a)()
		store.on("", func(context.Context) error { assert.Fail(t, "the store was asked"); return nil })
		got, err := a.Connect(t.Context(), sessionrelay.Hello{User: "bob"}, new(client).send)
		require.ErrorIs(t, err, sessionrelay.ErrClosed)
		assert.Nil(t, got)
	})
}

func TestNodeThatEndsWhileSomebodyConnectsGivesHimUp(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		stop := runs(t, a)
		store.then("Register", func(context.Context) error { stop(); return nil })
		var c client
		got, err := a.Connect(t.Context(), sessionrelay.Hello{User: "bob"}, c.send)
		require.ErrorIs(t, err, sessionrelay.ErrClosed)
		assert.Nil(t, got)
		all := listed(t, store, sessionrelay.Filter{})
		require.Len(t, all, 1)
		assert.Zero(t, home(t, store, all[0]))
		sends(t, a, all[0], "1")
		synctest.Wait()
		assert.Empty(t, c.received())
		assert.Equal(t, []string{sessionrelay.EventConnected, sessionrelay.EventDisconnected}, f.kinds())
	})
}

func TestConnectionReplacedBeforeItBeganHasEnded(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		var c1, c2 client
		session := comes(t, a, new(client)).Session()
		var second *sessionrelay.Conn
		store.then("Register", func(context.Context) error {
			store.then("Register", nil)
			second = comes(t, a, &c2, session)
			return nil
		})
		first := comes(t, a, &c1, session)
		ends(t, first, sessionrelay.ErrMoved)
		sends(t, a, session, "1")
		first.Disconnect()
		synctest.Wait()
		lives(t, second)
		assert.Empty(t, c1.received())
		assert.Equal(t, []string{"1"}, c2.received())
		assert.Empty(t, f.events(sessionrelay.EventDisconnected))
		assert.Equal(t, 1, store.watching())
		told := f.events(sessionrelay.EventReconnected)
		require.Len(t, told, 2)
		assert.Zero(t, store.times("Fetch by "+told[1].Home.Conn), "the first one's, which comes to know last")
	})
}

func TestDisconnectWaitsForNoStore(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		conn := comes(t, a, new(client))
		store.on("Deregister", func(context.Context) error { time.Sleep(time.Hour); return nil })
		begun := time.Now()
		conn.Disconnect()
		ends(t, conn, nil)
		assert.Zero(t, time.Since(begun))
		conn.Disconnect()
		pass(2 * time.Hour)
		assert.Equal(t, 1, store.times("Deregister"))
		assert.Zero(t, home(t, store, conn.Session()))
		assert.Len(t, f.events(sessionrelay.EventDisconnected), 1)
	})
}

func TestDisconnectTheStoreDidNotHearOfIsFoundBySignsOfLife(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		runs(t, a)
		conn := comes(t, a, new(client))
		synctest.Wait()
		store.on("Deregister", down)
		conn.Disconnect()
		synctest.Wait()
		require.Len(t, f.events(sessionrelay.EventFailed), 1)
		require.ErrorIs(t, f.events(sessionrelay.EventFailed)[0].Err, sessionrelay.ErrUnavailable)
		store.on("Deregister", nil)
		assert.NotZero(t, home(t, store, conn.Session()))
		pass(60 * time.Second)
		assert.Zero(t, home(t, store, conn.Session()))
	})
}

func TestConnectionEndsOfOneReasonOnly(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		b, _ := f.node("b")
		stop := runs(t, a)
		moved, gone, lost, last := comes(t, a, new(client)), comes(t, a, new(client)), comes(t, a, new(client)), comes(t, a, new(client))
		comes(t, b, new(client), moved.Session())
		require.NoError(t, b.Remove(t.Context(), gone.Session()))
		lost.Disconnect()
		synctest.Wait()
		assert.Equal(t, 1, store.watching(), "of the last")
		for range 2 {
			ends(t, moved, sessionrelay.ErrMoved)
			ends(t, gone, sessionrelay.ErrGone)
			ends(t, lost, nil)
			require.NoError(t, b.Remove(t.Context(), moved.Session()))
			moved.Disconnect()
			gone.Disconnect()
			stop()
			ends(t, last, sessionrelay.ErrClosed)
			last.Disconnect()
		}
		synctest.Wait()
		assert.Zero(t, store.watching())
		assert.Len(t, f.events(sessionrelay.EventDisconnected), 2, "of the one that was lost, and the last one")
	})
}

func TestErrorsOfANodeTellNoSessionID(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		conn := comes(t, a, new(client))
		session := conn.Session()
		synctest.Wait()
		store.on("", down)
		errs := map[string]error{"Remove": a.Remove(t.Context(), session), "Acked": conn.Acked(t.Context(), "m"), "Forget": conn.Forget(t.Context(), "m")}
		_, errs["Connect"] = a.Connect(t.Context(), sessionrelay.Hello{Session: session, User: "bob"}, new(client).send)
		_, errs["Send"] = a.Send(t.Context(), session, nil)
		_, errs["Receive"] = conn.Receive(t.Context(), "m", never(t))
		_, _, errs["Answered"] = answered(t.Context(), conn, "m")
		for verb, err := range errs {
			require.ErrorIs(t, err, sessionrelay.ErrUnavailable, verb)
			assert.NotContains(t, err.Error(), session, verb)
			assert.Contains(t, err.Error(), "session "+session[:4]+"…", verb)
		}
		_, err := a.Send(t.Context(), "abc", nil)
		require.ErrorIs(t, err, sessionrelay.ErrUnavailable)
		assert.NotContains(t, err.Error(), "abc", "half of it at most")
	})
}
