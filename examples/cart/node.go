package main

// node.go is one server of the two.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"

	"github.com/sessionlock/sessionlock/sessionguard"
)

// The row of a cart remembers the request that wrote it last, by its epoch. A new cart
// is one that no request has written.
const (
	schema    = `CREATE TABLE cart (id text PRIMARY KEY, items text[] NOT NULL DEFAULT '{}', epoch bigint NOT NULL DEFAULT 0)`
	readSQL   = `SELECT items FROM cart WHERE id = $1`
	updateSQL = `UPDATE cart SET items = $2, epoch = $3 WHERE id = $1 AND epoch <= $3`
	plainSQL  = `UPDATE cart SET items = $2 WHERE id = $1`
)

type node struct {
	db *pgxpool.Pool
	journal
}

// handler has the same work done by four handlers. Only what modifies is guarded.
func (n *node) handler(monitor *sessionguard.Monitor) http.Handler {
	guarded := monitor.Middleware(func(r *http.Request) string { return r.PathValue("cart") })
	mux := http.NewServeMux()
	mux.Handle("POST /unguarded/{cart}", n.observe(http.HandlerFunc(n.unguarded)))
	mux.Handle("POST /polite/{cart}", n.arrive(guarded(n.observe(http.HandlerFunc(n.polite)))))
	mux.Handle("POST /rude/{cart}", n.arrive(guarded(n.observe(http.HandlerFunc(n.rude)))))
	mux.Handle("POST /stuck/{cart}", n.arrive(guarded(n.observe(http.HandlerFunc(n.stuck)))))
	mux.HandleFunc("GET /journal/{cart}", n.show)
	return mux
}

// polite is how a handler should be: all that it does ends with its context, and it
// saves by Commit.
func (n *node) polite(w http.ResponseWriter, r *http.Request) {
	ctx := r.Context()
	items, err := n.read(ctx, r)
	if err == nil {
		err = work(ctx, r)
	}
	if err == nil {
		err = sessionguard.FromContext(ctx).Commit(ctx, n.update(r, items))
		n.note(r, event{What: committed, Err: name(err)})
	}
	reply(w, r, err)
}

// update is what Commit wants: whether the row was found is whether it was applied.
func (n *node) update(r *http.Request, items []string) func(context.Context, uint64) (bool, error) {
	return func(ctx context.Context, epoch uint64) (bool, error) {
		return n.exec(ctx, r, items, updateSQL, r.PathValue("cart"), items, epoch)
	}
}

// reply leaves a request whose context has ended to the middleware: it is answered 409
// if it is superseded. What err says depends on who noticed: pgx returns
// context.Canceled, whatever the cause.
func reply(w http.ResponseWriter, r *http.Request, err error) {
	switch {
	case err == nil: // it was written, whatever has happened since
		w.WriteHeader(http.StatusOK)
	case r.Context().Err() == nil:
		http.Error(w, "the cart cannot be changed", http.StatusInternalServerError)
	}
}

// rude does what no handler should: it is deaf to its context, and when Commit refuses
// it sends the UPDATE on its own.
func (n *node) rude(w http.ResponseWriter, r *http.Request) {
	ctx := context.WithoutCancel(r.Context())
	items, err := n.read(ctx, r)
	if err == nil {
		err = work(ctx, r)
	}
	if err == nil {
		guard, update := sessionguard.FromContext(ctx), n.update(r, items)
		err = guard.Commit(ctx, update)
		n.note(r, event{What: committed, Err: name(err)})
		if errors.Is(err, sessionguard.ErrSuperseded) {
			_, failed := update(ctx, guard.Epoch())
			err = errors.Join(err, failed)
		}
	}
	reply(w, r, err)
}

// stuck is superseded when Commit has looked, and the UPDATE is on its way: in a full
// pool, for instance, or in a process that stands still.
func (n *node) stuck(w http.ResponseWriter, r *http.Request) {
	ctx := r.Context()
	items, err := n.read(ctx, r)
	if err == nil {
		update := n.update(r, items)
		err = sessionguard.FromContext(ctx).Commit(ctx, func(ctx context.Context, epoch uint64) (bool, error) {
			ctx = context.WithoutCancel(ctx)
			if err := work(ctx, r); err != nil {
				return false, err
			}
			return update(ctx, epoch)
		})
		n.note(r, event{What: committed, Err: name(err)})
	}
	reply(w, r, err)
}

// unguarded is polite, without a guard and without an epoch.
func (n *node) unguarded(w http.ResponseWriter, r *http.Request) {
	ctx := r.Context()
	items, err := n.read(ctx, r)
	if err == nil {
		err = work(ctx, r)
	}
	if err == nil {
		_, err = n.exec(ctx, r, items, plainSQL, r.PathValue("cart"), items)
	}
	reply(w, r, err)
}

// read returns what the cart will be: what is in it, and what the request adds.
func (n *node) read(ctx context.Context, r *http.Request) (items []string, err error) {
	if err := n.db.QueryRow(ctx, readSQL, r.PathValue("cart")).Scan(&items); err != nil {
		return nil, err
	}
	if item := r.Header.Get(itemHeader); !slices.Contains(items, item) {
		items = append(items, item)
	}
	return items, nil
}

// work takes as long as the client says, in small steps.
func work(ctx context.Context, r *http.Request) error {
	d, err := time.ParseDuration(r.Header.Get(workHeader))
	if err != nil {
		return err
	}
	for end := time.Now().Add(d); time.Now().Before(end) && ctx.Err() == nil; {
		pause(ctx, 10*time.Millisecond)
	}
	return context.Cause(ctx)
}

func (n *node) exec(ctx context.Context, r *http.Request, items []string, sql string, args ...any) (applied bool, err error) {
	n.note(r, event{What: sent})
	var done pgconn.CommandTag
	if done, err = n.db.Exec(ctx, sql, args...); err == nil {
		n.note(r, event{What: updated, Rows: done.RowsAffected(), Items: items})
	}
	return done.RowsAffected() == 1, err
}

func name(err error) string {
	switch {
	case err == nil:
		return ""
	case errors.Is(err, sessionguard.ErrSuperseded):
		return superseded
	}
	return err.Error()
}

// event is something that happens to a request at a node.
type event struct {
	At      time.Time
	Node    string
	Request int
	What    string
	Rows    int64    `json:",omitempty"` // that an UPDATE has changed
	Items   []string `json:",omitempty"` // that it has written
	Err     string   `json:",omitempty"` // of Commit
	Status  string   `json:",omitempty"` // of the answer
}

// What can happen, in this order; the last two only at the client.
const (
	arrived    = "arrived"
	registered = "registered"
	told       = "told" // that it is superseded
	sent       = "sent" // the UPDATE
	updated    = "updated"
	committed  = "committed"
	left       = "left" // the handler has returned
	asked      = "asked"
	answered   = "answered"
)

// journal keeps the events of a node, by cart.
type journal struct {
	mu     sync.Mutex
	node   string
	events map[string][]event
}

func (j *journal) note(r *http.Request, e event) {
	e.At, e.Node = time.Now(), j.node
	_, _ = fmt.Sscan(r.Header.Get(requestHeader), &e.Request)
	j.mu.Lock()
	defer j.mu.Unlock()
	cart := r.PathValue("cart")
	j.events[cart] = append(j.events[cart], e)
}

func (j *journal) show(w http.ResponseWriter, r *http.Request) {
	j.mu.Lock()
	defer j.mu.Unlock()
	_ = json.NewEncoder(w).Encode(j.events[r.PathValue("cart")])
}

// arrive notes that a request has come, before it is registered.
func (j *journal) arrive(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		j.note(r, event{What: arrived})
		next.ServeHTTP(w, r)
	})
}

// observe notes when a request is at work, told to stop, and over, whatever the
// handler makes of it.
func (j *journal) observe(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx := r.Context()
		j.note(r, event{What: registered})
		tell := sync.OnceFunc(func() {
			if errors.Is(context.Cause(ctx), sessionguard.ErrSuperseded) {
				j.note(r, event{What: told})
			}
		})
		stop := context.AfterFunc(ctx, tell)
		next.ServeHTTP(w, r)
		stop()
		tell() // a handler may hear of it first
		j.note(r, event{What: left})
	})
}

// serve is the process of a node. It says its address, and lives as long as its
// standard input: until its parent is gone, however that ends.
func serve(name, redisAddr, namespace string) error {
	ctx := context.Background()
	db, err := pgxpool.New(ctx, os.Getenv(databaseEnv))
	if err != nil {
		return err
	}
	defer db.Close()
	rdb := redis.NewClient(&redis.Options{Addr: redisAddr})
	defer rdb.Close()
	monitor, err := sessionguard.New(rdb, sessionguard.WithNamespace(namespace))
	if err != nil {
		return err
	}
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	n := &node{db: db, journal: journal{node: name, events: map[string][]event{}}}
	server := &http.Server{Handler: n.handler(monitor), ReadHeaderTimeout: time.Second}
	go func() { _ = server.Serve(listener) }() // it ends by Shutdown
	fmt.Println(listener.Addr())
	_, _ = io.Copy(io.Discard, os.Stdin)
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	return errors.Join(server.Shutdown(ctx), monitor.Close(ctx))
}
