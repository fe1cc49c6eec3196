package main

// worker.go is one process of the fleet: first how it joins, then how it does as
// the parent says.

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/sessionlock/sessionlock"
	"github.com/sessionlock/sessionlock/sessionlocktest"
)

const databaseEnv = "DATABASE_URL"

// join makes this process one of the fleet: same upstream, same table. leave
// ends its part.
func join(ctx context.Context, upstream string, auth sessionlock.Authenticator, opts ...sessionlock.Option) (c *sessionlock.Client, leave func(), err error) {
	pool, err := pgxpool.New(ctx, os.Getenv(databaseEnv))
	if err != nil {
		return nil, nil, err
	}
	store := NewStore(pool)
	if err := store.Migrate(ctx); err != nil {
		pool.Close()
		return nil, nil, err
	}
	c, err = sessionlock.New(upstream, auth, append([]sessionlock.Option{sessionlock.WithCache(store)}, opts...)...)
	if err != nil {
		pool.Close()
		return nil, nil, err
	}
	return c, func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_ = c.Close(ctx) // the fleet stays logged in
		store.Close()
		pool.Close()
	}, nil
}

// The users of the upstream, and how many goroutines of each process call for
// one of them.
const (
	ada, bob, cyd = "ada", "bob", "cyd"
	callers       = 25
)

// report is what the callers of a process have seen in an act.
type report struct {
	Served  int           // calls answered, with a session of the right user
	InVain  int           // calls that failed because the database was down
	Slowest time.Duration // from the first try of a call to its answer
	Fault   string        // what should never happen
}

type worker struct {
	api    *sessionlocktest.Remote
	client *sessionlock.Client

	mu     sync.Mutex
	report report
}

// work takes orders, a word per line, until its standard input ends: with the
// parent, however that ends. start sets the callers to work, stop has them
// finish with one more call each, and report.
func work(upstream string) error {
	ctx, cancel := context.WithCancel(context.Background())
	api := sessionlocktest.At(upstream)
	client, leave, err := join(ctx, upstream, api)
	if err != nil {
		cancel()
		return err
	}
	defer leave()
	defer cancel()
	w := &worker{api: api, client: client}
	var stop chan struct{}
	for orders := bufio.NewScanner(os.Stdin); orders.Scan(); {
		switch orders.Text() {
		case "start":
			stop = make(chan struct{})
			go w.act(ctx, stop)
		case "stop":
			close(stop)
		}
	}
	return nil
}

func (w *worker) act(ctx context.Context, stop <-chan struct{}) {
	w.report = report{}
	var all sync.WaitGroup
	for i := range callers {
		all.Go(func() {
			user := []string{ada, bob, cyd}[i%3]
			for last := false; !last; pause(ctx, 100*time.Millisecond) {
				select {
				case <-stop:
					last = true
				default:
				}
				w.serve(ctx, user)
			}
		})
	}
	all.Wait()
	_ = json.NewEncoder(os.Stdout).Encode(w.report)
}

// serve tries until it is served.
func (w *worker) serve(ctx context.Context, user string) {
	start := time.Now()
	for ctx.Err() == nil {
		err := w.client.Do(ctx, user, w.api.Call)
		if w.count(user, err, time.Since(start)) {
			return
		}
		pause(ctx, 100*time.Millisecond)
	}
}

// count enters the outcome of one try and returns whether it was the last.
func (w *worker) count(user string, err error, waited time.Duration) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case err == nil:
		w.report.Served++
	case errors.Is(err, sessionlock.ErrUnavailable) && user == bob: // the others are held near
		w.report.InVain++
		return false
	default:
		w.report.Fault = fmt.Sprintf("called for %s: %v", user, err)
	}
	w.report.Slowest = max(w.report.Slowest, waited)
	return true
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
