package main

// client.go is the client of the two servers: how it starts them, how it sends, and
// what it learns of what has happened.

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// How the client says what a request is, instead of a body.
const (
	requestHeader = "Request" // 1, 2, 3
	itemHeader    = "Item"
	workHeader    = "Work" // how long it takes: it stands for a node that is slow
)

const databaseEnv = "DATABASE_URL"

type nodes []process

type process struct {
	cmd *exec.Cmd
	in  io.Closer
	url string
}

// startNodes starts this program again, twice. The database's URL has a password in
// it, so it is no argument, which everybody could read.
func startNodes(ctx context.Context, redis, namespace, database string) (all nodes, err error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	for _, name := range []string{"1", "2"} {
		cmd := exec.CommandContext(ctx, self, nodeArg, name, redis, namespace) //nolint:gosec // this very program
		cmd.Env = append(os.Environ(), databaseEnv+"="+database)
		cmd.Stderr = os.Stderr
		stdin, err1 := cmd.StdinPipe()
		stdout, err2 := cmd.StdoutPipe()
		if err := errors.Join(err1, err2, cmd.Start()); err != nil {
			return all, err
		}
		all = append(all, process{cmd: cmd, in: stdin})
		addr, err := bufio.NewReader(stdout).ReadString('\n')
		if err != nil {
			return all, fmt.Errorf("node %s: %w", name, err)
		}
		all[len(all)-1].url = "http://" + strings.TrimSpace(addr)
	}
	return all, nil
}

// stop ends the nodes: politely, then by pid. A node that fails says so.
func (all nodes) stop() (err error) {
	for _, p := range all {
		_ = p.in.Close()
	}
	for i, p := range all {
		late := time.AfterFunc(3*time.Second, func() { _ = p.cmd.Process.Kill() })
		if e := p.cmd.Wait(); e != nil {
			err = errors.Join(err, fmt.Errorf("node %d: %w", i+1, e))
		}
		late.Stop()
	}
	return err
}

// teller tells one story: it sends the requests about one cart, to the nodes in turns.
type teller struct {
	*stage
	path, cart string
	start      time.Time

	mu       sync.Mutex
	requests int
	events   []event
}

// open begins a story, with a new cart.
func (s *stage) open(ctx context.Context, path string) (*teller, error) {
	t := &teller{stage: s, path: path, cart: rand.Text()}
	_, err := s.db.Exec(ctx, `INSERT INTO cart (id) VALUES ($1)`, t.cart)
	t.start = time.Now()
	return t, err
}

type answer struct {
	status string
	err    error
}

// send sends the next request to the next node. Whoever gives up waiting does not hang
// up: that would reach the handler too, but only where each hop between client and
// handler passes it on, and none has to.
func (t *teller) send(ctx context.Context, item string, work time.Duration) <-chan answer {
	t.requests++
	n := t.requests
	c := make(chan answer, 1)
	t.note(event{Request: n, What: asked})
	go func() {
		status, err := t.post(ctx, n, item, work)
		t.note(event{Request: n, What: answered, Status: status})
		c <- answer{status, err}
	}()
	return c
}

func (t *teller) post(ctx context.Context, n int, item string, work time.Duration) (status string, err error) {
	url := fmt.Sprintf("%s/%s/%s", t.nodes[(n-1)%len(t.nodes)].url, t.path, t.cart)
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, url, nil)
	if err != nil {
		return "", err
	}
	r.Header.Set(requestHeader, strconv.Itoa(n))
	r.Header.Set(itemHeader, item)
	r.Header.Set(workHeader, work.String())
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	return strconv.Itoa(resp.StatusCode), nil
}

func (t *teller) note(e event) {
	e.At = time.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.events = append(t.events, e)
}

// story is what has happened to one cart, at the client and at both nodes, by time:
// they are on one machine, and have one clock.
type story struct {
	start  time.Time
	events []event
	cart   string // what is in it now
}

func (t *teller) story(ctx context.Context) (story, error) {
	t.mu.Lock()
	st := story{start: t.start, events: slices.Clone(t.events)}
	t.mu.Unlock()
	for _, p := range t.nodes {
		events, err := p.journal(ctx, t.cart)
		if err != nil {
			return story{}, err
		}
		st.events = append(st.events, events...)
	}
	slices.SortStableFunc(st.events, func(a, b event) int { return a.At.Compare(b.At) })
	var items []string
	err := t.db.QueryRow(ctx, readSQL, t.cart).Scan(&items)
	st.cart = strings.Join(items, ", ")
	return st, err
}

// await returns when that has happened.
func (t *teller) await(ctx context.Context, request int, what string) error {
	for {
		st, err := t.story(ctx)
		if err != nil {
			return err
		}
		if _, ok := st.find(request, what); ok {
			return nil
		}
		pause(ctx, time.Millisecond)
	}
}

func (p process) journal(ctx context.Context, cart string) (events []event, err error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, p.url+"/journal/"+cart, nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	return events, json.NewDecoder(resp.Body).Decode(&events)
}

// find returns the last event of that kind.
func (st story) find(request int, what string) (e event, ok bool) {
	for _, e := range slices.Backward(st.events) {
		if e.Request == request && e.What == what {
			return e, true
		}
	}
	return e, false
}

// between returns how long it took from one event to another, if both happened.
func (st story) between(request int, what string, request2 int, what2 string) (time.Duration, bool) {
	a, ok := st.find(request, what)
	b, ok2 := st.find(request2, what2)
	return b.At.Sub(a.At), ok && ok2
}

// inTime reports whether the first request was at work when it was sent again, and was
// to be until the book was in the cart.
func (st story) inTime() bool {
	waited, ok := st.between(1, registered, 2, asked)
	whole, ok3 := st.between(1, registered, 3, answered)
	return ok && ok3 && waited > 0 && whole < slow
}

// told is how long after the second request had come to node 2 the first one was told:
// the registration of the second is in it.
func (st story) told() (time.Duration, bool) { return st.between(2, arrived, 1, told) }

func (st story) worked() time.Duration {
	d, _ := st.between(1, registered, 1, left)
	return d
}

func (st story) status(request int) string {
	e, _ := st.find(request, answered)
	return e.Status
}

func (st story) commit() string {
	e, ok := st.find(1, committed)
	if ok && e.Err == "" {
		return "nil"
	}
	return e.Err
}

// update is what the late UPDATE has changed.
func (st story) update() string {
	e, ok := st.find(1, updated)
	waited, ordered := st.between(3, updated, 1, sent)
	switch {
	case !ok:
		return noUpdate
	case !ordered || waited < 0:
		return "something before the book came"
	case e.Rows == 1:
		return "1 row"
	}
	return fmt.Sprintf("%d rows", e.Rows)
}
