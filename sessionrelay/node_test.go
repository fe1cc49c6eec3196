package sessionrelay_test

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/internal/redistest"
	"github.com/sessionlock/sessionlock/sessionrelay"
)

// client is the far end of connections: it remembers what it was sent.
type client struct {
	mu  sync.Mutex
	got []string
	ids []string
}

func (c *client) send(_ context.Context, m sessionrelay.Message) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.got, c.ids = append(c.got, string(m.Payload)), append(c.ids, m.ID)
	return nil
}

func (c *client) received() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]string{}, c.got...)
}

func newNode(t *testing.T, rdb redis.UniversalClient, name string, opts ...sessionrelay.Option) *sessionrelay.Node {
	t.Helper()
	s, err := sessionrelay.NewRedisStore(rdb, name)
	require.NoError(t, err)
	n, err := sessionrelay.New(s, opts...)
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- n.Run(ctx) }()
	t.Cleanup(func() { cancel(); assert.NoError(t, <-ended) })
	return n
}

func TestMessagesFollowASessionToItsNextHome(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		ctx := t.Context()
		a, b := newNode(t, rdb, "a"), newNode(t, rdb, "b")
		var c1, c2 client
		conn, err := a.Connect(ctx, sessionrelay.Hello{User: "bob"}, c1.send)
		require.NoError(t, err)
		for i := range 50 {
			_, err := b.Send(ctx, conn.Session(), fmt.Append(nil, i))
			require.NoError(t, err)
		}
		require.Eventually(t, func() bool { return len(c1.received()) == 50 }, 10*time.Second, time.Millisecond)
		require.NoError(t, conn.Acked(ctx, c1.ids[:40]...))
		again, err := b.Connect(ctx, sessionrelay.Hello{User: "bob", Session: conn.Session()}, c2.send)
		require.NoError(t, err)
		<-conn.Done()
		require.ErrorIs(t, conn.Err(), sessionrelay.ErrMoved)
		require.Eventually(t, func() bool { return len(c2.received()) == 10 }, 10*time.Second, time.Millisecond)
		assert.Equal(t, c1.received()[40:], c2.received())
		n := 0
		for range 2 {
			reply, err := again.Receive(ctx, "m1", func(context.Context) ([]byte, error) { n++; return []byte("ok"), nil })
			require.NoError(t, err)
			assert.Equal(t, "ok", string(reply))
		}
		assert.Equal(t, 1, n)
		require.NoError(t, a.Remove(ctx, conn.Session()))
		<-again.Done()
		require.ErrorIs(t, again.Err(), sessionrelay.ErrGone)
	})
}
