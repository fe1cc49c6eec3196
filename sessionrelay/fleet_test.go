package sessionrelay_test

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	processes "github.com/sessionlock/sessionlock/internal/fleet"
	"github.com/sessionlock/sessionlock/internal/redistest"
	"github.com/sessionlock/sessionlock/sessionrelay"
)

func TestMain(m *testing.M) {
	processes.Main(newReceiver)
	m.Run()
}

// receiver is the far side of a fleet: a node that is given messages from a client.
type receiver struct {
	rdb   *redis.Client
	store sessionrelay.Store
}

func newReceiver(config json.RawMessage) (processes.Handler, error) {
	var addr string
	if err := json.Unmarshal(config, &addr); err != nil {
		return nil, err
	}
	r := &receiver{rdb: redis.NewClient(&redis.Options{Addr: addr})}
	var err error
	r.store, err = sessionrelay.NewRedisStore(r.rdb, "node")
	return r.handle, err
}

// receipt is how a node has dealt with a message.
type receipt struct {
	State   sessionrelay.State
	Outcome string
}

// handle processes a message. The books are kept beside the store: who accepted it, and
// what was stored as its outcome.
func (r *receiver) handle(ctx context.Context, _ string, arg json.RawMessage) (any, error) {
	var id string
	if err := json.Unmarshal(arg, &id); err != nil {
		return nil, err
	}
	owner := fmt.Sprint(rand.Uint64())
	claim, err := r.store.Accept(ctx, "s", "", id, owner, time.Hour)
	if err != nil || claim.State != sessionrelay.Accepted {
		return receipt{claim.State, string(claim.Outcome)}, err
	}
	if err := r.rdb.HIncrBy(ctx, "accepted", id, 1).Err(); err != nil {
		return nil, err
	}
	time.Sleep(rand.N(3 * time.Millisecond)) // in which some are killed
	if err := r.store.Complete(ctx, "s", id, owner, []byte(owner)); err != nil {
		return nil, err
	}
	return receipt{sessionrelay.Done, owner}, nil
}

// Each message is delivered one to five times, by three processes that are killed at
// it. Nobody takes over within the patience, so what was accepted twice is wrong.
func TestFleetAcceptsAMessageOnceThroughKills(t *testing.T) {
	const messages, kills = 600, 12
	server := redistest.Start(t)
	rdb := server.Client()
	store, err := sessionrelay.NewRedisStore(rdb, "test")
	require.NoError(t, err)
	_, _, err = store.Register(t.Context(), sessionrelay.Hello{Session: "s", User: "bob"}, "c", 1)
	require.NoError(t, err)

	var mu sync.Mutex
	nodes := processes.Start(t, 3, server.Addr())
	outcomes := map[string]map[string]bool{}
	deliver := func(id string) (state sessionrelay.State) {
		mu.Lock()
		node := nodes[rand.N(len(nodes))]
		mu.Unlock()
		var got receipt
		if node.Call(t.Context(), "deliver", id, &got) != nil {
			return 0 // it was killed; the client sends it again, or not
		}
		if got.State == sessionrelay.Done {
			mu.Lock()
			defer mu.Unlock()
			if outcomes[id] == nil {
				outcomes[id] = map[string]bool{}
			}
			outcomes[id][got.Outcome] = true
		}
		return got.State
	}

	work := make(chan string)
	var clients sync.WaitGroup
	for range 16 {
		clients.Go(func() {
			for id := range work {
				deliver(id)
			}
		})
	}
	for i := range messages {
		for range 1 + rand.N(5) {
			work <- fmt.Sprint("m", i)
		}
		if i%(messages/kills) == 0 {
			fresh := processes.Start(t, 1, server.Addr())[0]
			mu.Lock()
			victim := nodes[0]
			nodes = append(nodes[1:], fresh)
			mu.Unlock()
			victim.Kill()
		}
	}
	close(work)
	clients.Wait()

	accepted := rdb.HGetAll(t.Context(), "accepted").Val()
	done, stuck := 0, 0
	for i := range messages {
		id := fmt.Sprint("m", i)
		assert.Contains(t, []string{"", "1"}, accepted[id], "%s was accepted more than once", id)
		switch deliver(id) {
		case sessionrelay.Done:
			done++
			assert.Len(t, outcomes[id], 1, "%s has one outcome, whoever asks", id)
		case sessionrelay.InProgress:
			stuck++ // whoever has it is dead
		case sessionrelay.Accepted:
			assert.Fail(t, "a receipt is never that")
		}
	}
	assert.Equal(t, messages, done+stuck)
	assert.Positive(t, stuck, "nobody was killed at work")
	assert.LessOrEqual(t, stuck, 16*kills, "each kill leaves what its process was given")
}
