package main

// fleet.go is the service as its parent sees it: nodes that are processes, and may be
// killed.

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"
)

// fleet are the nodes of a place. Safe for concurrent use, but for what starts and ends
// one node.
type fleet struct {
	place
	http *http.Client

	mu    sync.Mutex
	nodes []process
}

type process struct {
	addr string // of its HTTP interface; it stays when the process is killed
	*child
}

// startFleet starts n nodes at p. They are to be stopped, also with an error.
func startFleet(p place, n int) (*fleet, error) {
	f := &fleet{
		place: p, nodes: make([]process, n),
		http: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 100}, Timeout: 10 * time.Second},
	}
	for i := range n {
		if err := f.start(i); err != nil {
			return f, err
		}
	}
	return f, nil
}

// start starts node i, for the first time or again.
func (f *fleet) start(i int) error {
	setup := f.place
	setup.Node = fmt.Sprintf("node-%d", i)
	c, addr, err := startChild(setup.Node, nodeArg, setup)
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.nodes[i] = process{addr, c}
	return nil
}

// kill ends node i as a crash does (SIGKILL), and returns when it is dead.
func (f *fleet) kill(i int) {
	f.mu.Lock()
	c := f.nodes[i].child
	f.nodes[i].child = nil
	f.mu.Unlock()
	c.kill()
}

// addrs returns where the nodes are, or were when they died.
func (f *fleet) addrs() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	addrs := make([]string, len(f.nodes))
	for i, p := range f.nodes {
		addrs[i] = p.addr
	}
	return addrs
}

// deliver has node i put messages into a session's outbox.
func (f *fleet) deliver(ctx context.Context, i int, session string, messages ...outgoing) error {
	return f.ask(ctx, i, "/deliver", delivery{session, messages})
}

// insist has any node put messages into a session's outbox, beginning with node i. It
// asks again when one fails or dies, which may have put some: so messages need ids.
func (f *fleet) insist(ctx context.Context, i int, session string, messages ...outgoing) error {
	for ; ; i++ {
		err := f.deliver(ctx, i%len(f.addrs()), session, messages...)
		if err == nil || ctx.Err() != nil {
			return err
		}
		pause(ctx, 20*time.Millisecond)
	}
}

// remove ends a session.
func (f *fleet) remove(ctx context.Context, i int, session string) error {
	return f.ask(ctx, i, "/remove", delivery{Session: session})
}

func (f *fleet) ask(ctx context.Context, i int, path string, d delivery) error {
	body, err := json.Marshal(d)
	if err != nil {
		return err
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+f.addrs()[i]+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	r.Header.Set("Authorization", token(f.Secret, operator))
	res, err := f.http.Do(r)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("node %d: %s", i, strings.TrimSpace(string(text)))
	}
	return err
}

// stop ends the nodes, all at once.
func (f *fleet) stop() (err error) {
	defer f.http.CloseIdleConnections()
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, n := range f.nodes {
		if n.child != nil {
			_ = n.stdin.Close()
		}
	}
	for i, n := range f.nodes {
		if n.child != nil {
			err = errors.Join(err, n.end())
			f.nodes[i].child = nil
		}
	}
	return err
}
