// Package fleet gives tests processes of their own: it runs the test binary
// again as workers that answer requests of the test, so that a fleet can be
// tested with what only processes can do: be killed, be stopped, start late.
//
//	func TestMain(m *testing.M) {
//		fleet.Main(newWorker) // does not return in a worker
//		m.Run()
//	}
//
// It is for tests only; nothing that is not a test may import it.
package fleet

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"
)

// marker is set for workers, to the setup of Start.
const marker = "SESSIONLOCK_FLEET_WORKER"

const patience = 10 * time.Second // for what a healthy system does at once

// ErrDead is returned by calls of a process that has ended, or ended before it
// answered.
var ErrDead = errors.New("fleet: process is dead")

// Handler answers requests inside a worker; it is called concurrently.
type Handler func(ctx context.Context, op string, arg json.RawMessage) (any, error)

// Main makes a worker of a process that Start has started: it answers requests
// until its parent is gone and never returns. In any other process it does
// nothing.
func Main(open func(setup json.RawMessage) (Handler, error)) {
	setup, ok := os.LookupEnv(marker)
	if !ok {
		return
	}
	h, err := open(json.RawMessage(setup))
	if err == nil {
		err = serve(os.Stdin, os.Stdout, h)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "fleet: worker:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// request and reply are the lines that go to a worker and come back.
type (
	request struct {
		ID  int             `json:"id"`
		Op  string          `json:"op"`
		Arg json.RawMessage `json:"arg"`
	}
	reply struct {
		ID     int             `json:"id"`
		Result json.RawMessage `json:"result,omitempty"`
		Error  string          `json:"error,omitempty"`
	}
)

func serve(in io.Reader, out io.Writer, h Handler) error {
	var mu sync.Mutex // one line at a time
	lines, answers := json.NewDecoder(in), json.NewEncoder(out)
	for {
		var q request
		if err := lines.Decode(&q); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		go func() {
			a := answer(h, q)
			mu.Lock()
			defer mu.Unlock()
			_ = answers.Encode(a)
		}()
	}
}

func answer(h Handler, q request) reply {
	v, err := h(context.Background(), q.Op, q.Arg)
	a := reply{ID: q.ID}
	if err == nil {
		a.Result, err = json.Marshal(v)
	}
	if err != nil {
		a.Error = err.Error()
	}
	return a
}

// Process is a worker. Its methods are safe for concurrent use.
type Process struct {
	tb     testing.TB
	cmd    *exec.Cmd
	in     io.WriteCloser
	stderr bytes.Buffer // complete once dead is closed
	dead   chan struct{}

	mu      sync.Mutex
	last    int // id of the last request
	waiting map[int]chan reply
	doomed  bool // killed by us
}

// Start starts n workers, all with the same setup. They are killed when the test
// ends, and the test fails if one had ended by itself, or with a data race.
func Start(tb testing.TB, n int, setup any) []*Process {
	tb.Helper()
	b, err := json.Marshal(setup)
	if err != nil {
		tb.Fatalf("fleet: start: %v", err)
	}
	workers := make([]*Process, n)
	for i := range workers {
		workers[i] = start(tb, string(b))
	}
	return workers
}

func start(tb testing.TB, setup string) *Process {
	tb.Helper()
	p := &Process{tb: tb, dead: make(chan struct{}), waiting: map[int]chan reply{}}
	p.cmd = exec.Command(os.Args[0]) //nolint:gosec,noctx // this very binary; ends by Kill
	p.cmd.Env = append(os.Environ(), marker+"="+setup)
	p.cmd.SysProcAttr = ownGroup
	p.cmd.Stderr = &p.stderr
	in, errIn := p.cmd.StdinPipe()
	out, errOut := p.cmd.StdoutPipe()
	if err := errors.Join(errIn, errOut, p.cmd.Start()); err != nil {
		tb.Fatalf("fleet: start: %v", err)
	}
	p.in = in
	go p.read(out)
	tb.Cleanup(p.end)
	return p
}

// read hands replies to their callers until the process is dead.
func (p *Process) read(out io.Reader) {
	defer close(p.dead)
	lines := json.NewDecoder(out)
	for {
		var a reply
		if lines.Decode(&a) != nil {
			break
		}
		p.mu.Lock()
		ch := p.waiting[a.ID]
		delete(p.waiting, a.ID)
		p.mu.Unlock()
		if ch != nil {
			ch <- a
		}
	}
	_ = p.cmd.Wait()
}

func (p *Process) end() {
	p.mu.Lock()
	killed := p.doomed
	p.mu.Unlock()
	select {
	case <-p.dead:
		if !killed {
			p.tb.Errorf("fleet: process %d ended by itself: %s", p.Pid(), p.stderr.String())
		}
	default:
	}
	p.Kill()
	if text := p.stderr.String(); strings.Contains(text, "DATA RACE") {
		p.tb.Errorf("fleet: process %d: %s", p.Pid(), text)
	}
}

// Pid returns the id of the process.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Call sends a request and stores what the worker's Handler returned in out,
// which may be nil. It ends with ctx, or with ErrDead when the process dies.
func (p *Process) Call(ctx context.Context, op string, arg, out any) error {
	b, err := json.Marshal(arg)
	if err != nil {
		return fmt.Errorf("fleet: %s: %w", op, err)
	}
	id, ch, err := p.send(op, b)
	if err != nil {
		return err
	}
	select {
	case a := <-ch:
		return a.into(op, out)
	case <-p.dead:
		select {
		case a := <-ch: // answered before it died
			return a.into(op, out)
		default:
			return fmt.Errorf("%w: %s", ErrDead, op)
		}
	case <-ctx.Done():
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.waiting, id)
		return fmt.Errorf("fleet: %s: %w", op, ctx.Err())
	}
}

func (p *Process) send(op string, arg json.RawMessage) (id int, ch chan reply, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.last++
	ch = make(chan reply, 1)
	p.waiting[p.last] = ch
	if err := json.NewEncoder(p.in).Encode(request{p.last, op, arg}); err != nil {
		delete(p.waiting, p.last)
		return 0, nil, fmt.Errorf("%w: %s: %w", ErrDead, op, err)
	}
	return p.last, ch, nil
}

func (a reply) into(op string, out any) error {
	if a.Error != "" {
		return fmt.Errorf("fleet: %s: %s", op, a.Error)
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(a.Result, out)
}

// Kill ends the process as a crash would (SIGKILL), stopped or not, and waits
// until it is gone. Killing a dead process does nothing.
func (p *Process) Kill() {
	p.mu.Lock()
	p.doomed = true
	p.mu.Unlock()
	_ = p.cmd.Process.Kill()
	<-p.dead
	_ = p.in.Close()
}

// Stop freezes a running process (SIGSTOP) until Continue or Kill; when it
// returns, nothing of it runs. On systems that cannot do that it skips the test.
func (p *Process) Stop() {
	p.tb.Helper()
	p.signal(sigstop)
	if err := awaitStop(p.Pid()); err != nil {
		p.tb.Fatalf("fleet: stop: %v", err)
	}
}

// Continue lets a stopped process go on.
func (p *Process) Continue() { p.tb.Helper(); p.signal(sigcont) }

func (p *Process) signal(sig os.Signal) {
	p.tb.Helper()
	if sig == nil {
		p.tb.Skip("fleet: this system has no SIGSTOP; THIS TEST DID NOT RUN")
	}
	if err := p.cmd.Process.Signal(sig); err != nil {
		p.tb.Fatalf("fleet: signal: %v", err)
	}
}
