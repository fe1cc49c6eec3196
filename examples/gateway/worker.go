package main

// worker.go is a session's process: first as the gateway sees it, through two
// pipes, which is what a sessionmanager.Worker has to be; then from the inside.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/sessionlock/sessionlock"
	"github.com/sessionlock/sessionlock/sessionlocktest"
	"github.com/sessionlock/sessionlock/sessionmanager"
)

// order is a line to a worker, answer the line that comes back. The first order is
// the place, without an ID.
type (
	order struct {
		ID   int
		Text string
	}
	answer struct {
		ID         int
		User, Text string
		PID        int
		Error      string
	}
)

// place is where a worker works.
type place struct{ Redis, Upstream, Namespace, User string }

var errGone = errors.New("the worker's process has ended")

// worker is a process that has logged in as a user.
type worker struct {
	cmd  *exec.Cmd
	gone chan struct{} // closed when the process has ended and is out of the process table

	mu      sync.Mutex
	in      io.WriteCloser
	last    int // ID of the last order
	waiting map[int]chan answer
}

var (
	_ sessionmanager.Worker = (*worker)(nil)
	_ sessionmanager.Mortal = (*worker)(nil)
)

// startWorker starts this program again and waits until it has logged in. ctx is
// for that only: the process must outlive the open. One that fails is returned all
// the same, because the manager kills what comes with an error.
func startWorker(ctx context.Context, p place) (*worker, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	w := &worker{cmd: exec.Command(self, workerArg), gone: make(chan struct{}), waiting: map[int]chan answer{}} //nolint:gosec,noctx // this very program; ended by Shutdown or Kill
	w.cmd.Stderr = os.Stderr
	in, err1 := w.cmd.StdinPipe()
	out, err2 := w.cmd.StdoutPipe()
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	if err := w.cmd.Start(); err != nil {
		return nil, err
	}
	w.in = in
	hello := make(chan answer, 1)
	w.waiting[0] = hello
	go w.listen(json.NewDecoder(out))
	if err := json.NewEncoder(in).Encode(p); err != nil {
		return w, err
	}
	_, err = w.await(ctx, hello)
	return w, err
}

// listen hands answers to their askers until the process ends, however that
// happens, and takes it out of the process table.
func (w *worker) listen(answers *json.Decoder) {
	defer close(w.gone)
	for {
		var a answer
		if answers.Decode(&a) != nil {
			break
		}
		w.mu.Lock()
		asker := w.waiting[a.ID]
		delete(w.waiting, a.ID)
		w.mu.Unlock()
		if asker != nil {
			asker <- a
		}
	}
	_ = w.cmd.Process.Kill() // one that does not speak the protocol is of no use
	_ = w.cmd.Wait()
}

func (w *worker) await(ctx context.Context, asked chan answer) (answer, error) {
	var a answer
	select {
	case a = <-asked:
	case <-ctx.Done():
		return a, ctx.Err()
	case <-w.gone:
		select {
		case a = <-asked: // its last words
		default:
			return a, errGone
		}
	}
	if a.Error != "" {
		return a, errors.New(a.Error)
	}
	return a, nil
}

// Ask has the worker do what text says. Many may ask at once, and an answer that
// nobody waits for any more does not get to another.
func (w *worker) Ask(ctx context.Context, text string) (answer, error) {
	asked := make(chan answer, 1)
	w.mu.Lock()
	w.last++
	id := w.last
	w.waiting[id] = asked
	_ = json.NewEncoder(w.in).Encode(order{id, text}) // who cannot be told is about to be gone
	w.mu.Unlock()
	defer func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.waiting, id)
	}()
	return w.await(ctx, asked)
}

// Shutdown ends the process's standard input. It finishes what it has been told
// and goes.
func (w *worker) Shutdown(ctx context.Context) error {
	w.mu.Lock()
	err := w.in.Close()
	w.mu.Unlock()
	select {
	case <-w.gone:
		return nil
	case <-ctx.Done():
		return errors.Join(ctx.Err(), err)
	}
}

// Kill returns when the process has left the process table.
func (w *worker) Kill(string) error {
	err := w.cmd.Process.Kill()
	if err == nil || errors.Is(err, os.ErrProcessDone) {
		<-w.gone
		return nil
	}
	return err
}

// Done is closed when the process has ended. The manager listens to it.
func (w *worker) Done() <-chan struct{} { return w.gone }

// Err tells of a process that has ended by itself.
func (w *worker) Err() error {
	select {
	case <-w.gone:
		return errGone
	default:
		return nil
	}
}

// deaf is the order after which a worker does not end with its standard input.
const deaf = "deaf"

// work is the process: it logs in, and takes orders until its standard input ends:
// with the session, or the gateway, however that ends.
func work() error {
	in, out := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	var p place
	if err := in.Decode(&p); err != nil {
		return err
	}
	rdb := redis.NewClient(&redis.Options{Addr: p.Redis})
	defer rdb.Close()
	upstream := sessionlocktest.At(p.Upstream)
	client, err := sessionlock.New(
		p.Upstream, upstream,
		sessionlock.WithRedis(rdb), sessionlock.WithNamespace(p.Namespace),
		// The Redis is a guest of the gateway, and on a busy machine late by seconds.
		// One that is a server needs neither.
		sessionlock.WithOpTimeout(4*time.Second), sessionlock.WithLockTTL(8*time.Second),
	)
	if err != nil {
		return err
	}
	defer client.Close(context.Background()) // the user stays logged in
	var mu sync.Mutex                        // one line at a time
	do := func(o order) {
		a := answer{ID: o.ID, User: p.User, Text: o.Text, PID: os.Getpid()}
		if err := client.Do(context.Background(), p.User, upstream.Call); err != nil {
			a.Error = fmt.Sprintf("as %s: %v", p.User, err)
		}
		mu.Lock()
		defer mu.Unlock()
		_ = out.Encode(a) // a gateway that is gone needs none
	}
	do(order{}) // the login
	listening := true
	var orders sync.WaitGroup
	for {
		var o order
		if in.Decode(&o) != nil {
			break
		}
		listening = listening && o.Text != deaf
		orders.Go(func() { do(o) })
	}
	orders.Wait()
	if !listening {
		time.Sleep(limit)
	}
	return nil
}
