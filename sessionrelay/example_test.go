package sessionrelay_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"regexp"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/sessionlock/sessionlock/internal/exampletest"
	"github.com/sessionlock/sessionlock/sessionrelay"
)

// A message finds its client on whatever node it is, and waits while it is on none.
func ExampleNode() {
	ctx := context.Background()
	var fleet sessionrelay.Memory // of two nodes in one process; else NewRedisStore(rdb, "node-7")
	a, err := sessionrelay.New(fleet.Store("a"))
	check(err)
	b, err := sessionrelay.New(fleet.Store("b"))
	check(err)

	has := make(chan string)
	send := func(_ context.Context, m sessionrelay.Message) error { // writes to the WebSocket
		fmt.Printf("client: %s\n", m.Payload)
		has <- m.ID
		return nil
	}
	conn, err := a.Connect(ctx, sessionrelay.Hello{User: "bob"}, send)
	check(err)
	_, err = b.Send(ctx, conn.Session(), []byte("hello")) // from any node
	check(err)
	check(conn.Acked(ctx, <-has))

	conn.Disconnect()
	_, err = a.Send(ctx, conn.Session(), []byte("while you were away"))
	check(err)
	_, err = b.Connect(ctx, sessionrelay.Hello{User: "bob", Session: conn.Session()}, send)
	check(err)
	<-has
	// Output:
	// client: hello
	// client: while you were away
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

// ignore is a send func for examples in which nothing is sent.
func ignore(context.Context, sessionrelay.Message) error { return nil }

func ExampleNew() {
	store, _ := newMemory("node-7")
	_, err := sessionrelay.New(store,
		sessionrelay.WithLimit(10),                                           // sessions of a user
		sessionrelay.WithTimeout(24*time.Hour),                               // of a session that is connected nowhere
		sessionrelay.WithIntervals(time.Minute, 10*time.Minute, 6*time.Hour), // of the upkeep
		sessionrelay.WithAttempts(5, time.Second),                            // to deliver a message
		sessionrelay.WithPatience(time.Minute),                               // with a message's handler
		sessionrelay.WithObserver(func(e sessionrelay.Event) { fmt.Println(e.Kind) }),
		sessionrelay.WithLogger(slog.Default()),
	)
	fmt.Println(err)
	_, err = sessionrelay.New(store, sessionrelay.WithLimit(0))
	fmt.Println(err)
	// Output:
	// <nil>
	// sessionrelay: invalid argument: WithLimit: 0 is less than 1
}

func newMemory(node string) (sessionrelay.Store, *sessionrelay.Memory) {
	var m sessionrelay.Memory
	return m.Store(node), &m
}

// Neither function does any I/O: a process starts while Redis is down.
func ExampleNewRedisStore() {
	rdb := redis.NewClient(&redis.Options{Addr: "127.0.0.1:1"}) // where nobody is
	defer rdb.Close()
	store, err := sessionrelay.NewRedisStore(rdb, "node-7",
		sessionrelay.WithNamespace("production"),
		sessionrelay.WithKeySecret([]byte("the same sixteen bytes or more in the fleet")),
		sessionrelay.WithOpTimeout(100*time.Millisecond),
		sessionrelay.WithReplicas(0),
	)
	check(err)
	node, err := sessionrelay.New(store)
	check(err)
	_, err = node.Connect(context.Background(), sessionrelay.Hello{User: "bob"}, ignore)
	fmt.Println(errors.Is(err, sessionrelay.ErrUnavailable))
	// Output: true
}

// Run is a node's upkeep. When it ends, so do its connections; the sessions stay.
func ExampleNode_Run() {
	store, _ := newMemory("node-7")
	node, err := sessionrelay.New(store)
	check(err)
	ctx, shutdown := context.WithCancel(context.Background()) // or signal.NotifyContext
	ended := make(chan error)
	go func() { ended <- node.Run(ctx) }()

	conn, err := node.Connect(ctx, sessionrelay.Hello{User: "bob"}, ignore)
	check(err)
	shutdown()
	<-conn.Done()
	fmt.Println(<-ended, errors.Is(conn.Err(), sessionrelay.ErrClosed))
	info, err := store.Lookup(context.Background(), conn.Session())
	check(err)
	fmt.Printf("%s is at %q\n", info.User, info.Home.Node)
	// Output:
	// <nil> true
	// bob is at ""
}

// A client that connects anew takes its session with it; the old connection is to be
// closed.
func ExampleConn_Done() {
	ctx := context.Background()
	_, fleet := newMemory("")
	a, err := sessionrelay.New(fleet.Store("a"))
	check(err)
	b, err := sessionrelay.New(fleet.Store("b"))
	check(err)
	old, err := a.Connect(ctx, sessionrelay.Hello{User: "bob"}, ignore)
	check(err)
	_, err = b.Connect(ctx, sessionrelay.Hello{User: "eve", Session: old.Session()}, ignore)
	fmt.Println(errors.Is(err, sessionrelay.ErrWrongUser), old.Err())
	_, err = b.Connect(ctx, sessionrelay.Hello{User: "bob", Session: old.Session()}, ignore)
	check(err)
	<-old.Done()
	fmt.Println(old.Err())
	old.Disconnect() // comes late, and moves nothing
	info, err := fleet.Store("a").Lookup(ctx, old.Session())
	check(err)
	fmt.Println(info.Home.Node)
	// Output:
	// true <nil>
	// sessionrelay: the session is not connected here any more
	// b
}

// A client sends a message until it has the reply: it may come any number of times, and
// is processed once.
func ExampleConn_Receive() {
	ctx := context.Background()
	store, _ := newMemory("a")
	node, err := sessionrelay.New(store)
	check(err)
	conn, err := node.Connect(ctx, sessionrelay.Hello{User: "bob"}, ignore)
	check(err)
	pay := func(context.Context) ([]byte, error) {
		fmt.Println("paid")
		return []byte("receipt 1"), nil
	}
	for range 3 {
		reply, err := conn.Receive(ctx, "message 1", pay)
		fmt.Printf("%s %v\n", reply, err)
	}
	check(conn.Forget(ctx, "message 1")) // the client has the reply
	// Output:
	// paid
	// receipt 1 <nil>
	// receipt 1 <nil>
	// receipt 1 <nil>
}

// The answer to a request may come to another node than the one that asked, and twice.
func ExampleNode_Request() {
	ctx := context.Background()
	store, _ := newMemory("a")
	node, err := sessionrelay.New(store)
	check(err)
	asked := make(chan string)
	conn, err := node.Connect(ctx, sessionrelay.Hello{User: "bob"}, func(_ context.Context, m sessionrelay.Message) error {
		fmt.Printf("%s (to be answered: %t)\n", m.Payload, m.Request)
		asked <- m.ID
		return nil
	})
	check(err)
	_, err = node.Request(ctx, conn.Session(), []byte("Confirm?"), []byte("order 17"))
	check(err)
	id := <-asked // which the client says in its answer
	for _, answer := range []string{"answer 1", "answer 2"} {
		_, err = conn.Receive(ctx, answer, func(ctx context.Context) ([]byte, error) {
			about, first, err := conn.Answered(ctx, id)
			fmt.Printf("first: %t, about: %q\n", first, about)
			return nil, err
		})
		check(err)
	}
	// Output:
	// Confirm? (to be answered: true)
	// first: true, about: "order 17"
	// first: false, about: ""
}

func ExampleNode_Remove() {
	ctx := context.Background()
	store, _ := newMemory("a")
	node, err := sessionrelay.New(store, sessionrelay.WithObserver(func(e sessionrelay.Event) { fmt.Println(e.Kind) }))
	check(err)
	conn, err := node.Connect(ctx, sessionrelay.Hello{User: "bob"}, ignore)
	check(err)
	check(node.Remove(ctx, conn.Session())) // bob has logged out
	check(node.Remove(ctx, conn.Session()))
	<-conn.Done()
	fmt.Println(conn.Err())
	_, err = node.Send(ctx, conn.Session(), []byte("too late"))
	fmt.Println(errors.Is(err, sessionrelay.ErrGone))
	// Output:
	// connected
	// removed
	// sessionrelay: no such session
	// true
}

// What an operator may look at, and put right.
func ExampleStore() {
	ctx := context.Background()
	store, _ := newMemory("a")
	buried, sent := make(chan string), make(chan int)
	node, err := sessionrelay.New(store, sessionrelay.WithAttempts(1, time.Millisecond), sessionrelay.WithObserver(func(e sessionrelay.Event) {
		if e.Kind == sessionrelay.EventDeadLetter {
			buried <- e.Message
		}
	}))
	check(err)
	send := func(_ context.Context, m sessionrelay.Message) error { sent <- m.Attempts; return nil }
	conn, err := node.Connect(ctx, sessionrelay.Hello{User: "bob", App: "shop", Version: "1.2"}, send)
	check(err)
	_, err = node.Send(ctx, conn.Session(), []byte("kills clients"))
	check(err)
	fmt.Println("attempts before:", <-sent)
	waitUntilTried(ctx, store, conn.Session())
	_, err = node.Connect(ctx, sessionrelay.Hello{User: "bob", Session: conn.Session(), App: "shop", Version: "1.3"}, send)
	check(err)
	<-buried

	var directory sessionrelay.Directory = store
	check(directory.List(ctx, sessionrelay.Filter{User: "bob", Connected: true}, func(i sessionrelay.Info) bool {
		fmt.Println(i.User, i.App, i.Version, "on", i.Home.Node)
		return true
	}))
	var dead sessionrelay.DeadLetters = store
	letters, err := dead.Buried(ctx, conn.Session())
	check(err)
	for _, m := range letters {
		fmt.Printf("%s (attempts: %d)\n", m.Payload, m.Attempts)
		check(dead.Revive(ctx, conn.Session(), m.ID))
	}
	fmt.Println("attempts before:", <-sent)
	expired, err := directory.Expire(ctx, 24*time.Hour)
	fmt.Println(len(expired), "timed out", err)
	// Output:
	// attempts before: 0
	// bob shop 1.3 on a
	// kills clients (attempts: 1)
	// attempts before: 0
	// 0 timed out <nil>
}

// waitUntilTried returns when there is nothing to be fetched, so that the connection may
// be lost.
func waitUntilTried(ctx context.Context, s sessionrelay.Store, session string) {
	for {
		info, err := s.Lookup(ctx, session)
		check(err)
		left, err := s.Fetch(ctx, session, info.Home.Conn, 1)
		check(err)
		if len(left) == 0 {
			return
		}
	}
}

// An answer that comes by HTTP, not over the client's connection, is processed once all
// the same, on whatever node, and belongs to its request.
func ExampleInbox() {
	ctx := context.Background()
	store, _ := newMemory("a")
	node, err := sessionrelay.New(store)
	check(err)
	conn, err := node.Connect(ctx, sessionrelay.Hello{User: "bob"}, ignore)
	check(err)
	session := conn.Session()
	request, err := node.Request(ctx, session, []byte("Confirm?"), []byte("order 17"))
	check(err)

	var inbox sessionrelay.Inbox = store
	var asked sessionrelay.Correlations = store
	answer := func(id, me string) { // me: never used twice
		claim, err := inbox.Accept(ctx, session, "", id, me, time.Minute)
		check(err)
		switch claim.State {
		case sessionrelay.InProgress:
			fmt.Println(me, "409: somebody else is at it")
		case sessionrelay.Done:
			fmt.Printf("%s 200: %s, as before\n", me, claim.Outcome)
		case sessionrelay.Accepted:
			order, first, err := asked.Take(ctx, session, request, id)
			check(err)
			err = inbox.Complete(ctx, session, id, me, []byte("thank you"), request)
			fmt.Printf("%s %s %t %v\n", me, order, first, err)
		}
	}
	_, err = inbox.Accept(ctx, session, "", "answer 1", "slow", time.Minute)
	check(err)
	answer("answer 1", "second")
	check(inbox.Release(ctx, session, "answer 1", "slow")) // it gives up
	answer("answer 1", "third")
	answer("answer 1", "fourth")
	err = inbox.Complete(ctx, session, "answer 1", "slow", nil) // and comes back too late
	fmt.Println(errors.Is(err, sessionrelay.ErrTaken))
	// Output:
	// second 409: somebody else is at it
	// third order 17 true <nil>
	// fourth 200: thank you, as before
	// true
}

// An id of the sender's own makes a message that is put again, because nobody knows
// whether it was put, the same one.
func ExampleOutbox() {
	ctx := context.Background()
	store, memory := newMemory("a")
	var sessions sessionrelay.Registry = store
	_, _, err := sessions.Register(ctx, sessionrelay.Hello{Session: "s", User: "bob"}, "conn 1", 10)
	check(err)
	stop := memory.Watch("s", func() { fmt.Println("something is there") }) // a hint
	defer stop()

	var outbox sessionrelay.Outbox = store
	for range 2 {
		home, err := outbox.Put(ctx, "s", sessionrelay.Message{ID: "invoice 9", Payload: []byte("9.99")}, nil)
		fmt.Println(home.Node, err)
	}
	messages, err := outbox.Fetch(ctx, "s", "conn 1", 100)
	fmt.Println(len(messages), err)
	_, err = outbox.Fetch(ctx, "s", "conn 0", 100)
	fmt.Println(errors.Is(err, sessionrelay.ErrMoved))
	// Output:
	// something is there
	// a <nil>
	// a <nil>
	// 1 <nil>
	// true
}

// What a gateway tells its client.
func Example_errors() {
	tell := func(err error) string {
		switch {
		case errors.Is(err, sessionrelay.ErrGone), errors.Is(err, sessionrelay.ErrWrongUser):
			return "start anew, without a session"
		case errors.Is(err, sessionrelay.ErrCap):
			return "log out somewhere else first"
		case errors.Is(err, sessionrelay.ErrMoved), errors.Is(err, sessionrelay.ErrClosed):
			return "" // close the connection: the client has another one, or will
		case errors.Is(err, sessionrelay.ErrInProgress), errors.Is(err, sessionrelay.ErrUnavailable):
			return "send it again in a moment"
		case errors.Is(err, sessionrelay.ErrTaken):
			return "send it again" // and look: its effect may have happened twice
		case errors.Is(err, sessionrelay.ErrInvalid):
			return "no such message"
		}
		return "it failed" // the handler's own error
	}
	ctx := context.Background()
	store, _ := newMemory("a")
	node, err := sessionrelay.New(store, sessionrelay.WithLimit(1))
	check(err)
	conn, err := node.Connect(ctx, sessionrelay.Hello{User: "bob"}, ignore)
	check(err)
	_, err = node.Connect(ctx, sessionrelay.Hello{User: "bob"}, ignore)
	fmt.Println(tell(err))
	_, err = node.Connect(ctx, sessionrelay.Hello{User: "bob", Session: "of yesterday"}, ignore)
	fmt.Println(tell(err))
	_, err = conn.Receive(ctx, "", nil)
	fmt.Println(tell(err))
	// Output:
	// log out somewhere else first
	// start anew, without a session
	// no such message
}

// Which events are about sessions, which about connections, and which want somebody to
// look.
func ExampleEvent() {
	sessions, connected := 0, 0
	count := func(e sessionrelay.Event) { // of one process: a fleet adds them up
		switch e.Kind {
		case sessionrelay.EventConnected:
			sessions++
			connected++
		case sessionrelay.EventReconnected:
			connected++ // and one less on the node that it left, which is not told: see Directory.Homed
		case sessionrelay.EventDisconnected:
			connected--
		case sessionrelay.EventRemoved, sessionrelay.EventTimedOut:
			sessions--
		case sessionrelay.EventSendFailed, sessionrelay.EventDeadLetter, sessionrelay.EventFailed:
			fmt.Println(e.Kind, e.Err)
		}
	}
	ctx := context.Background()
	store, _ := newMemory("a")
	node, err := sessionrelay.New(store, sessionrelay.WithObserver(count))
	check(err)
	conn, err := node.Connect(ctx, sessionrelay.Hello{User: "bob"}, ignore)
	check(err)
	fmt.Println(sessions, connected)
	check(node.Remove(ctx, conn.Session()))
	fmt.Println(sessions)
	// Output:
	// 1 1
	// 0
}

// An option is a value: a fleet's may be made in one place.
func ExampleOption() {
	of := func(env string) ([]sessionrelay.RedisOption, []sessionrelay.Option) {
		return []sessionrelay.RedisOption{sessionrelay.WithNamespace(env)},
			[]sessionrelay.Option{sessionrelay.WithTimeout(24 * time.Hour)}
	}
	rdb := redis.NewClient(&redis.Options{Addr: "127.0.0.1:1"})
	defer rdb.Close()
	forStore, forNode := of("production")
	store, err := sessionrelay.NewRedisStore(rdb, "node-7", forStore...)
	check(err)
	_, err = sessionrelay.New(store, forNode...)
	fmt.Println(store.Node(), err)
	// Output: node-7 <nil>
}

func TestExamplesShowEveryExportedName(t *testing.T) {
	exampletest.ReachAll(t, regexp.MustCompile(`^(State|Claim)$`))
}
