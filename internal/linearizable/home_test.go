package linearizable_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/internal/redistest"
	"github.com/sessionlock/sessionlock/sessionrelay"
)

const (
	clients = 6 // of which two are on each node
	plenty  = 1000
)

// contender is one client, the connections it has registered, and the last home it saw.
type contender struct {
	*rand.Rand
	store   sessionrelay.Store
	session string
	conns   []call
	seen    sessionrelay.Home
}

// registers is a new connection, or an older one that comes late.
func (c *contender) registers(user string, bit uint64, again bool) call {
	if again && len(c.conns) > 0 {
		return c.conns[c.IntN(len(c.conns))]
	}
	home := sessionrelay.Home{Node: c.store.Node(), Conn: fmt.Sprintf("%x", bit)}
	fresh := call{op: register, user: user, home: home, bit: bit}
	c.conns = append(c.conns, fresh)
	return fresh
}

// next chooses what to call; bit stands for no connection yet.
func (c *contender) next(bit uint64) call {
	switch k := c.IntN(10); {
	case k < 3 || len(c.conns) == 0:
		return c.registers("bob", bit, false)
	case k < 4:
		return c.registers("bob", bit, true)
	case k < 5:
		return c.registers("eve", bit, false)
	case k < 6:
		given := c.registers("", bit, true)
		given.op, given.user = deregister, ""
		return given
	case k < 7 && c.seen.Node != "" && c.seen.Node != c.store.Node(): // not this node's to give up
		return call{op: deregister, home: sessionrelay.Home{Node: c.store.Node(), Conn: c.seen.Conn}, bit: bit}
	}
	return call{op: lookup}
}

func (c *contender) do(ctx context.Context, next *call) {
	switch next.op {
	case register:
		h := sessionrelay.Hello{Session: c.session, User: next.user}
		_, next.saw, next.err = c.store.Register(ctx, h, next.home.Conn, plenty)
	case deregister:
		next.err = c.store.Deregister(ctx, c.session, next.home.Conn)
	default:
		var i sessionrelay.Info
		i, next.err = c.store.Lookup(ctx, c.session)
		next.saw, next.whose, c.seen = i.Home, i.User, i.Home
	}
}

// contend has clients on three nodes register, give up and look up the home of one
// session at once, and look it up once more after settle.
func contend(t *testing.T, open func(node string) sessionrelay.Store, session string, each int, settle func()) []call {
	t.Helper()
	require.LessOrEqual(t, clients*each, 64, "connections are bits")
	var clock atomic.Int64
	var mu sync.Mutex
	var history []call
	ask := func(c *contender, next call) {
		next.begin = clock.Add(1)
		c.do(t.Context(), &next)
		next.end = clock.Add(1)
		mu.Lock()
		defer mu.Unlock()
		history = append(history, next)
	}
	var all sync.WaitGroup
	start := make(chan struct{})
	for n := range clients {
		c := &contender{Rand: rand.New(rand.NewPCG(uint64(n), rand.Uint64())), store: open(fmt.Sprint("node", n%3)), session: session}
		all.Go(func() {
			<-start
			for i := range each {
				ask(c, c.next(1<<(n*each+i)))
				runtime.Gosched()
			}
		})
	}
	close(start)
	all.Wait()
	settle()
	for n := range 3 {
		last := &contender{store: open(fmt.Sprint("node", n)), session: session}
		ask(last, call{op: lookup})
	}
	return history
}

func explained(t *testing.T, history []call, resent bool) {
	t.Helper()
	if result := check(history, resent); result != porcupine.Ok {
		for _, c := range history {
			t.Log(c)
		}
		require.Fail(t, "no order explains this history", "%v", result)
	}
}

func count(history []call, what func(call) bool) (n int) {
	for _, c := range history {
		if what(c) {
			n++
		}
	}
	return n
}

func is(err error) func(call) bool { return func(c call) bool { return errors.Is(c.err, err) } }

// opener makes stores over clients of their own each.
func opener(t *testing.T, dial func() *redis.Client) func(node string) sessionrelay.Store {
	return func(node string) sessionrelay.Store {
		s, err := sessionrelay.NewRedisStore(dial(), node, sessionrelay.WithOpTimeout(20*time.Second)) // a busy machine loses no calls
		require.NoError(t, err)
		t.Cleanup(s.(interface{ Close() }).Close)
		return s
	}
}

// reused opens the stores that open makes once, and hands them out in turns.
func reused(open func(node string) sessionrelay.Store) func(node string) sessionrelay.Store {
	made, turn := map[string][]sessionrelay.Store{}, map[string]int{}
	return func(node string) sessionrelay.Store {
		for len(made[node]) < clients/3 {
			made[node] = append(made[node], open(node))
		}
		turn[node]++
		return made[node][turn[node]%len(made[node])]
	}
}

func TestHomeIsLinearizable(t *testing.T) {
	server := redistest.Start(t)
	for name, open := range map[string]func(string) sessionrelay.Store{
		"memory": new(sessionrelay.Memory).Store,
		"redis":  reused(opener(t, func() *redis.Client { return server.Client() })),
	} {
		t.Run(name, func(t *testing.T) {
			var all []call
			for round := range 100 {
				history := contend(t, open, fmt.Sprint("s", round), 10, func() {})
				explained(t, history, false)
				all = append(all, history...)
			}
			assert.Zero(t, count(all, call.lost))
			assert.Greater(t, count(all, is(sessionrelay.ErrMoved)), 50)
			assert.Greater(t, count(all, is(sessionrelay.ErrWrongUser)), 50)
		})
	}
}

// go-redis sends a request again that was executed, and one that is still to be.
func TestHomeIsLinearizableWhenRepliesAreLost(t *testing.T) {
	server := redistest.Start(t)
	way := &way{every: 5}
	open := reused(opener(t, func() *redis.Client { return way.client(server, 50) }))
	var all []call
	for round := range 50 {
		history := contend(t, open, fmt.Sprint("s", round), 8, way.underway.Wait)
		explained(t, history, true)
		all = append(all, history...)
	}
	assert.Zero(t, count(all, call.lost))
	assert.Greater(t, count(all, is(sessionrelay.ErrWrongUser)), 25)
	for fault := requestLost; fault <= requestLate; fault++ {
		assert.Greater(t, way.met[fault].Load(), int64(50), fault)
	}
}

// Nobody knows what a call did that failed: nothing, something, or something later.
func TestHomeIsLinearizableWhenCallsAreLost(t *testing.T) {
	server := redistest.Start(t)
	way := &way{every: 7}
	open := reused(opener(t, func() *redis.Client { return way.client(server, -1) }))
	var all []call
	for round := range 100 {
		history := contend(t, open, fmt.Sprint("s", round), 6, way.underway.Wait)
		explained(t, history, true)
		all = append(all, history...)
	}
	assert.Greater(t, count(all, call.lost), 300)
	assert.Greater(t, count(all, func(c call) bool { return c.err == nil }), 1000)
	assert.Greater(t, count(all, is(sessionrelay.ErrWrongUser)), 25)
	for fault := requestLost; fault <= requestLate; fault++ {
		assert.Greater(t, way.met[fault].Load(), int64(100), fault)
	}
}

// The stores below break one promise each. The rest is a right one's, which is asked
// more than once for what ought to be one step, or for what it was not asked.

// careless gives up whatever the home is, not only the connection it was told.
type careless struct{ sessionrelay.Store }

func (s careless) Deregister(ctx context.Context, session, _ string) error {
	i, _ := s.Lookup(ctx, session)
	return s.Store.Deregister(ctx, session, i.Home.Conn)
}

// hasty takes the home away before it looks whose the session is.
type hasty struct{ sessionrelay.Store }

func (s hasty) Register(ctx context.Context, h sessionrelay.Hello, conn string, limit int) (sessionrelay.Info, sessionrelay.Home, error) {
	now, before, err := s.Store.Register(ctx, h, conn, limit)
	if errors.Is(err, sessionrelay.ErrWrongUser) {
		return now, before, errors.Join(err, careless(s).Deregister(ctx, h.Session, ""))
	}
	return now, before, err
}

// racing looks for the home before in a step of its own.
type racing struct{ sessionrelay.Store }

func (s racing) Register(ctx context.Context, h sessionrelay.Hello, conn string, limit int) (sessionrelay.Info, sessionrelay.Home, error) {
	was, _ := s.Lookup(ctx, h.Session)
	runtime.Gosched()
	now, before, err := s.Store.Register(ctx, h, conn, limit)
	if before != was.Home && was.Home != now.Home {
		before = was.Home
	}
	return now, before, err
}

// cached answers what it knew.
type cached struct {
	sessionrelay.Store
	known *sync.Map
}

func (s cached) Lookup(ctx context.Context, session string) (sessionrelay.Info, error) {
	i, err := s.Store.Lookup(ctx, session)
	if err != nil {
		return i, err
	}
	known, _ := s.known.LoadOrStore(session, i)
	return known.(sessionrelay.Info), nil
}

// lenient lets a connection back in that was replaced, or given up.
type lenient struct{ sessionrelay.Store }

func (s lenient) Register(ctx context.Context, h sessionrelay.Hello, conn string, limit int) (sessionrelay.Info, sessionrelay.Home, error) {
	now, before, err := s.Store.Register(ctx, h, conn, limit)
	if errors.Is(err, sessionrelay.ErrMoved) {
		return s.Store.Register(ctx, h, conn+" again", limit)
	}
	return now, before, err
}

func TestBrokenStoresAreNotLinearizable(t *testing.T) {
	var known sync.Map
	for name, broken := range map[string]func(sessionrelay.Store) sessionrelay.Store{
		"deregisters any connection": func(s sessionrelay.Store) sessionrelay.Store { return careless{s} },
		"refuses another user late":  func(s sessionrelay.Store) sessionrelay.Store { return hasty{s} },
		"asks for the home before":   func(s sessionrelay.Store) sessionrelay.Store { return racing{s} },
		"answers what it knew":       func(s sessionrelay.Store) sessionrelay.Store { return cached{s, &known} },
		"lets an old connection in":  func(s sessionrelay.Store) sessionrelay.Store { return lenient{s} },
	} {
		t.Run(name, func(t *testing.T) {
			var m sessionrelay.Memory
			open := func(node string) sessionrelay.Store { return broken(m.Store(node)) }
			found := porcupine.Ok
			for round := 0; round < 1000 && found == porcupine.Ok; round++ {
				history := contend(t, open, fmt.Sprint(name, round), 10, func() {})
				found = check(history, true)
			}
			assert.Equal(t, porcupine.Illegal, found)
		})
	}
}
