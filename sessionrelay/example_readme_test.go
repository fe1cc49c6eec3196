package sessionrelay_test

import (
	"context"
	"errors"
	"fmt"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"

	"github.com/sessionlock/sessionlock/sessionrelay"
)

// wire stands for a WebSocket.
type wire struct{ frames chan string }

func (w wire) write(_ context.Context, kind, id string, body []byte) error {
	w.frames <- fmt.Sprintf("%s %s", kind, body)
	_ = id
	return nil
}

func (w wire) close() {}

// frame is what a client says.
type frame struct {
	session, id string
	body        []byte
	has, done   []string
}

// What the README shows.
func Example_readme() {
	m := miniredis.NewMiniRedis()
	if err := m.Start(); err != nil {
		panic(err)
	}
	defer m.Close()
	rdb := redis.NewClient(&redis.Options{Addr: m.Addr()})
	defer rdb.Close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ws, user, said := wire{make(chan string, 10)}, "bob", frame{id: "m1", body: []byte("a cup of tea")}
	order := func(_ context.Context, what []byte) ([]byte, error) { return append([]byte("ordered "), what...), nil }
	err := func() error {
		store, err := sessionrelay.NewRedisStore(rdb, "node-7") // stable over restarts, never two at once of one name
		if err != nil {
			return err
		}
		node, err := sessionrelay.New(store)
		if err != nil {
			return err
		}
		go node.Run(ctx) // signs of life, timeouts; disconnects all at the end

		// A WebSocket came in, and its user has been authenticated:
		conn, err := node.Connect(ctx, sessionrelay.Hello{Session: said.session, User: user}, func(ctx context.Context, m sessionrelay.Message) error {
			return ws.write(ctx, "message", m.ID, m.Payload) // once per connection, until conn.Acked
		})
		if err != nil {
			return err // ErrWrongUser, ErrGone, ErrCap …: nothing has changed
		}
		defer conn.Disconnect()                   // the session is away, and its messages wait
		go func() { <-conn.Done(); ws.close() }() // replaced, removed, or the node ends: conn.Err

		// The client says what it has (ACK), and which replies it has (ACK2):
		if err := errors.Join(conn.Acked(ctx, said.has...), conn.Forget(ctx, said.done...)); err != nil {
			return err
		}
		// A message from it, which it sends until it has the reply:
		reply, err := conn.Receive(ctx, said.id, func(ctx context.Context) ([]byte, error) { return order(ctx, said.body) })
		if err != nil {
			return err
		}
		if err := ws.write(ctx, "reply", said.id, reply); err != nil {
			return err
		}

		_, err = node.Send(ctx, conn.Session(), []byte("your tea is ready")) // to it, from any node
		fmt.Println(<-ws.frames)
		fmt.Println(<-ws.frames)
		return err
	}()
	fmt.Println(err)
	// Output:
	// reply ordered a cup of tea
	// message your tea is ready
	// <nil>
}
