package sessionguard_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"

	"github.com/sessionlock/sessionlock/internal/exampletest"
	"github.com/sessionlock/sessionlock/sessionguard"
)

// cart stands for a row of a database.
type cart struct {
	mu    sync.Mutex
	items string
	epoch uint64
}

// Save is UPDATE cart SET items = $1, epoch = $2 WHERE id = $3 AND epoch <= $2.
func (c *cart) Save(_ context.Context, items string, epoch uint64) (applied bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.epoch > epoch {
		return false, nil
	}
	c.items, c.epoch = items, epoch
	return true, nil
}

// exampleRedis starts a Redis for an example.
func exampleRedis() (rdb *redis.Client, stop func()) {
	server, err := miniredis.Run()
	if err != nil {
		panic(err)
	}
	rdb = redis.NewClient(&redis.Options{Addr: server.Addr()})
	return rdb, func() {
		_ = rdb.Close()
		server.Close()
	}
}

// A request is sent again while it is slow: the second one goes on, what the first one
// finishes later changes nothing.
func Example() {
	rdb, stop := exampleRedis()
	defer stop()
	monitor, err := sessionguard.New(rdb)
	if err != nil {
		panic(err)
	}
	ctx := context.Background()
	defer monitor.Close(ctx)
	db := new(cart)

	save := func(ctx context.Context, items string, whileSlow func()) error {
		ctx, guard, err := monitor.Register(ctx, "session 7") // ctx ends when a newer request registers, on any node
		if err != nil {
			return err
		}
		defer guard.End()
		whileSlow()
		return guard.Commit(ctx, func(ctx context.Context, epoch uint64) (bool, error) {
			return db.Save(ctx, items, epoch)
		})
	}
	err = save(ctx, "page 2", func() {
		fmt.Println("again:", save(ctx, "page 3", func() {}))
	})
	fmt.Println("first is superseded:", errors.Is(err, sessionguard.ErrSuperseded))
	fmt.Println(db.items)
	// Output:
	// again: <nil>
	// first is superseded: true
	// page 3
}

func ExampleNew() {
	rdb, stop := exampleRedis()
	defer stop()
	monitor, err := sessionguard.New(rdb,
		sessionguard.WithNamespace("staging"),
		sessionguard.WithKeySecret([]byte("the same in the whole fleet")),
		sessionguard.WithTTL(time.Minute),
		sessionguard.WithOpTimeout(500*time.Millisecond))
	if err != nil {
		panic(err)
	}
	defer monitor.Close(context.Background())
	fmt.Println(monitor, len(monitor.KeyID("session 7")))

	_, err = sessionguard.New(nil, sessionguard.WithTTL(0))
	fmt.Println(errors.Is(err, sessionguard.ErrInvalid))
	fmt.Println(err)
	// Output:
	// [sessionguard monitor] 24
	// true
	// sessionguard: invalid argument: no store: New wants a Redis client, or WithStore
	// sessionguard: invalid argument: WithTTL: 0s is not within 100ms and 24h
}

// The context says why it has ended.
func ExampleMonitor_Register() {
	monitor, _ := sessionguard.New(nil, sessionguard.WithStore(new(sessionguard.MemoryStore)))
	ctx := context.Background()
	first, guard, err := monitor.Register(ctx, "session 7")
	if err != nil {
		panic(err)
	}
	defer guard.End()
	_, newer, err := monitor.Register(ctx, "session 7")
	if err != nil {
		panic(err)
	}
	defer newer.End()

	<-first.Done()
	var superseded *sessionguard.SupersededError
	if errors.As(context.Cause(first), &superseded) {
		fmt.Println(superseded.Epoch == guard.Epoch(), superseded.By == newer.Epoch())
	}
	_ = monitor.Close(ctx)
	_, _, err = monitor.Register(ctx, "session 7")
	fmt.Println(errors.Is(err, sessionguard.ErrClosed))
	// Output:
	// true true
	// true
}

// A handler need not know who guards it: its context ends, and if it has not answered
// then, 409 is the answer.
func ExampleMonitor_Middleware() {
	monitor, _ := sessionguard.New(nil,
		sessionguard.WithStore(new(sessionguard.MemoryStore)),
		sessionguard.WithConflict(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, "you have sent this again", http.StatusConflict)
		})))
	defer monitor.Close(context.Background())
	db := new(cart)
	again := func() {}
	handler := monitor.Middleware(func(r *http.Request) string {
		if r.Method == http.MethodGet {
			return "" // reading guards nothing
		}
		return r.Header.Get("X-Session")
	})(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		again()
		g := sessionguard.FromContext(r.Context())
		err := g.Commit(r.Context(), func(ctx context.Context, epoch uint64) (bool, error) {
			return db.Save(ctx, r.FormValue("items"), epoch)
		})
		if err == nil {
			fmt.Fprint(w, "saved")
		}
	}))
	post := func(items string) {
		r := httptest.NewRequestWithContext(context.Background(), http.MethodPost, "/cart?items="+items, nil)
		r.Header.Set("X-Session", "session 7")
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, r)
		fmt.Println(items, w.Code, strings.TrimSpace(w.Body.String()))
	}
	again = func() {
		again = func() {}
		post("pear")
	}
	post("apple")
	fmt.Println(db.items)
	// Output:
	// pear 200 saved
	// apple 409 you have sent this again
	// pear
}

// Where the session is kept in Redis itself, nothing can come between check and write.
func ExampleGuard_Eval() {
	rdb, stop := exampleRedis()
	defer stop()
	monitor, _ := sessionguard.New(rdb)
	ctx := context.Background()
	defer monitor.Close(ctx)
	push := sessionguard.NewScript(`return redis.call('RPUSH', KEYS[1], ARGV[1])`)

	first, guard, err := monitor.Register(ctx, "session 7")
	if err != nil {
		panic(err)
	}
	defer guard.End()
	n, err := guard.Eval(first, push, []string{guard.Key("items")}, "apple")
	fmt.Println(n, err)

	second, newer, err := monitor.Register(ctx, "session 7")
	if err != nil {
		panic(err)
	}
	defer newer.End()
	_, err = guard.Eval(ctx, push, []string{guard.Key("items")}, "apple again")
	fmt.Println(errors.Is(err, sessionguard.ErrSuperseded))
	n, err = newer.Eval(second, push, []string{newer.Key("items")}, "pear")
	fmt.Println(n, err)
	// Output:
	// 1 <nil>
	// true
	// 2 <nil>
}

// A script is made once.
func ExampleNewScript() {
	scripts := map[string]*sessionguard.Script{"touch": sessionguard.NewScript(`return redis.call('EXPIRE', KEYS[1], ARGV[1])`)}
	fmt.Println(len(scripts))
	// Output: 1
}

// Long work looks now and then whether it is still wanted.
func ExampleGuard_Check() {
	monitor, _ := sessionguard.New(nil, sessionguard.WithStore(new(sessionguard.MemoryStore)))
	ctx := context.Background()
	defer monitor.Close(ctx)
	ctx, guard, _ := monitor.Register(ctx, "session 7")
	fmt.Println(guard.Check(ctx))
	guard.End()
	fmt.Println(errors.Is(guard.Check(context.Background()), sessionguard.ErrInvalid), ctx.Err())
	// Output:
	// <nil>
	// true context canceled
}

// What to do with an error of Register, Check, Commit or Eval.
func Example_errors() {
	advice := func(err error) string {
		switch {
		case errors.Is(err, sessionguard.ErrSuperseded):
			return "drop what was done: a newer request has taken over"
		case errors.Is(err, sessionguard.ErrLost):
			return "drop what was done, and ask to send it again"
		case errors.Is(err, sessionguard.ErrUnavailable):
			return "the store is down: try again"
		case errors.Is(err, sessionguard.ErrClosed):
			return "this process is going down"
		case errors.Is(err, sessionguard.ErrInvalid):
			return "mend the call"
		}
		return "not ours"
	}
	var nobody *sessionguard.Guard // of a request that is not guarded
	fmt.Println(advice(nobody.Check(context.Background())))
	// Output: mend the call
}

// slowLog is a store of one's own: here one that says what takes long.
type slowLog struct {
	sessionguard.Store
	slow time.Duration
}

func (s slowLog) Current(ctx context.Context, session string) (sessionguard.Registration, error) {
	defer s.note("current", time.Now())
	return s.Store.Current(ctx, session)
}

func (s slowLog) Renew(ctx context.Context, session string, ttl time.Duration) (sessionguard.Registration, error) {
	defer s.note("renew", time.Now())
	return s.Store.Renew(ctx, session, ttl)
}

// Watch passes the optional face on, which embedding the interface has hidden.
func (s slowLog) Watch(session string, changed func()) (stop func()) {
	if w, ok := s.Store.(sessionguard.Watcher); ok {
		return w.Watch(session, changed)
	}
	return func() {}
}

func (s slowLog) note(what string, start time.Time) {
	if took := time.Since(start); took > s.slow {
		fmt.Println(what, took)
	}
}

func ExampleWithStore() {
	monitor, err := sessionguard.New(nil, sessionguard.WithStore(slowLog{new(sessionguard.MemoryStore), time.Minute}))
	if err != nil {
		panic(err)
	}
	ctx := context.Background()
	defer monitor.Close(ctx)
	ctx, guard, err := monitor.Register(ctx, "session 7")
	defer guard.End()
	fmt.Println(err, guard.Check(ctx))
	// Output: <nil> <nil>
}

// Where a user may not publish, the server itself tells of registrations: if it was told
// to (notify-keyspace-events K$).
func ExampleWithKeyspaceEvents() {
	rdb := redis.NewClient(&redis.Options{Addr: "127.0.0.1:6379"})
	defer rdb.Close()
	monitor, err := sessionguard.New(rdb, sessionguard.WithKeyspaceEvents())
	if err != nil {
		panic(err)
	}
	defer monitor.Close(context.Background())
	cluster := redis.NewClusterClient(&redis.ClusterOptions{Addrs: []string{"127.0.0.1:6379"}})
	defer cluster.Close()
	_, err = sessionguard.New(cluster, sessionguard.WithKeyspaceEvents())
	fmt.Println(err)
	// Output: sessionguard: invalid argument: WithKeyspaceEvents: only with one Redis server, not with a Cluster, a Ring or another store
}

// What a monitor asks of a store, as it does.
func ExampleMemoryStore() {
	store := new(sessionguard.MemoryStore)
	ctx := context.Background()
	stop := store.Watch("session", func() { fmt.Println("somebody has registered") })
	defer stop()
	first, _ := store.Register(ctx, "session", "token 1", 0, time.Minute)
	second, _ := store.Register(ctx, "session", "token 2", first, time.Minute)
	now, _ := store.Current(ctx, "session")
	fmt.Println(now == sessionguard.Registration{Epoch: second, Token: "token 2"}, second > first)
	now, _ = store.Renew(ctx, "nobody's", time.Minute)
	fmt.Println(now == sessionguard.Registration{})
	// Output:
	// somebody has registered
	// somebody has registered
	// true true
	// true
}

// An option is a value: a fleet's may be made in one place.
func ExampleOption() {
	fleet := func(env string) []sessionguard.Option {
		return []sessionguard.Option{sessionguard.WithNamespace(env), sessionguard.WithTTL(time.Minute)}
	}
	opts := append(fleet("production"), sessionguard.WithStore(new(sessionguard.MemoryStore)))
	var monitor *sessionguard.Monitor
	monitor, err := sessionguard.New(nil, opts...)
	fmt.Println(monitor != nil, err)
	// Output: true <nil>
}

func TestExamplesShowEveryExportedName(t *testing.T) {
	exampletest.ReachAll(t, regexp.MustCompile(`^(String|Format|Error|Unwrap)$`))
}
