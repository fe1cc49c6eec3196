package main

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock"
)

func TestTableOverLoopbackAndRedis(t *testing.T) {
	var out bytes.Buffer
	err := run(t.Context(), io.MultiWriter(&out, t.Output()))
	require.NoError(t, err)
	assert.Equal(t, len(table()), strings.Count(out.String(), "  ok\n"))
}

// The same with minutes that are minutes.
func TestTableCallForCall(t *testing.T) {
	for _, r := range table() {
		t.Run(r.situation, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFleet(t)
				got, err := f.play(t.Context(), bob, r)
				require.NoError(t, err)
				assert.NoError(t, r.judge(got))
			})
		})
	}
}

// The table would show nothing if it could not be wrong.
func TestEveryWrongNumberIsTold(t *testing.T) {
	r := table()[0]
	require.NoError(t, r.judge(r.want))
	for name, tc := range map[string]struct {
		got  seen
		want string
	}{
		"a login more":    {seen{append(slices.Clone(r.want.calls), "login 2"), r.want.after}, "login 2, want: login 1"},
		"a call less":     {seen{r.want.calls[:3], r.want.after}, "calls: login 1, list 1, list 1, want"},
		"another order":   {seen{[]string{"list 1", "login 1", "list 1", "list 1"}, r.want.after}, "calls: list 1, login 1"},
		"another session": {seen{r.want.calls, "session 2, fresh"}, "cache after: session 2, fresh, want: session 1, fresh"},
		"an older life":   {seen{r.want.calls, "session 1, not renewed"}, "cache after: session 1, not renewed"},
	} {
		t.Run(name, func(t *testing.T) {
			err := r.judge(tc.got)
			require.Error(t, err)
			assert.Contains(t, err.Error(), tc.want)
			assert.NotContains(t, err.Error(), "\n", "one thing is wrong")
			var out strings.Builder
			printTable(&out, []row{r}, []seen{tc.got}, []error{err})
			assert.Contains(t, out.String(), "WRONG")
		})
	}
}

const bob = "bob"

// fleet is a stage inside a bubble: the server's minutes are minutes and its network
// a pipe, on which HTTP is spoken in full.
type fleet struct {
	*stage
	t     *testing.T
	store *store
	net   *network
}

func newFleet(t *testing.T) *fleet {
	t.Helper()
	f := &fleet{t: t, store: newStore()}
	fm := newFileMaker(15 * time.Minute)
	f.net = newNetwork(t, fm)
	f.stage = &stage{
		fm: fm, server: "http://fm.test", base: f.net.client(), minute: time.Minute,
		store: []sessionlock.Option{sessionlock.WithCache(f.store)},
	}
	fm.admit(bob, password)
	fm.add("sales", ada)
	return f
}

// process returns another of the fleet.
func (f *fleet) process(with ...func(*settings)) *database {
	f.t.Helper()
	set := settings{
		server: f.server, database: "sales", account: bob, minute: f.minute, base: f.base, options: f.stage.store,
		secret: func(string) (string, string) { return password, "1" },
	}
	for _, w := range with {
		w(&set)
	}
	d, err := open(set)
	require.NoError(f.t, err)
	f.t.Cleanup(func() { assert.NoError(f.t, d.sessions.Close(context.WithoutCancel(f.t.Context()))) })
	return d
}

func option(o ...sessionlock.Option) func(*settings) {
	return func(set *settings) { set.options = append(slices.Clone(set.options), o...) }
}

func uncached(set *settings) { set.options = []sessionlock.Option{sessionlock.WithCache(noCache{})} }

// list is a data call that has to succeed.
func (f *fleet) list(d *database) {
	f.t.Helper()
	got, err := d.list(f.t.Context(), layout)
	assert.NoError(f.t, err)
	assert.Equal(f.t, []fields{ada}, got)
}

// seen asserts the calls that the server has seen from bob, all of them.
func (f *fleet) seen(want ...string) {
	f.t.Helper()
	synctest.Wait()
	var got []string
	for _, c := range f.fm.calls(bob) {
		got = append(got, c.String())
	}
	assert.Equal(f.t, want, got)
	assert.Empty(f.t, f.fm.calls(""), "calls with tokens that never were")
}

// inForce reports whether the fleet shares a session. It is no use of it.
func (f *fleet) inForce() bool {
	f.t.Helper()
	st, err := f.process().sessions.Inspect(f.t.Context(), bob)
	require.NoError(f.t, err)
	return st.Generation != 0
}

// stored returns the number of the session that the fleet shares, 0 when there is none.
func (f *fleet) stored() int {
	f.t.Helper()
	if !f.inForce() {
		return 0
	}
	s, err := f.process().sessions.Session(f.t.Context(), bob)
	require.NoError(f.t, err)
	return f.fm.number(s.Token.Reveal())
}

// graces lets pass what a displaced session is given.
func graces() {
	time.Sleep(31 * time.Second)
	synctest.Wait()
}

// network is how a server is reached in a bubble.
type network struct {
	t     *testing.T
	conns chan net.Conn
	down  chan struct{}
	once  sync.Once

	mu     sync.Mutex
	before func(w http.ResponseWriter, r *http.Request) (answered bool)
}

// newNetwork serves h, behind what the test puts before it.
func newNetwork(t *testing.T, h http.Handler) *network {
	n := &network{t: t, conns: make(chan net.Conn), down: make(chan struct{})}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n.mu.Lock()
		before := n.before
		n.mu.Unlock()
		if before == nil || !before(w, r) {
			h.ServeHTTP(w, r)
		}
	})}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = srv.Serve(n)
	}()
	t.Cleanup(func() {
		assert.NoError(t, srv.Close())
		<-ended
	})
	return n
}

// put has f called with each request first; nil: none.
func (n *network) put(f func(w http.ResponseWriter, r *http.Request) (answered bool)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.before = f
}

// client returns what reaches the server, whatever the URL's host.
func (n *network) client() *http.Transport {
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		ours, theirs := net.Pipe()
		select {
		case n.conns <- theirs:
			return ours, nil
		case <-n.down:
			return nil, &net.OpError{Op: "dial", Net: "pipe", Err: net.ErrClosed}
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}}
	n.t.Cleanup(tr.CloseIdleConnections)
	return tr
}

func (n *network) Accept() (net.Conn, error) {
	select {
	case c := <-n.conns:
		return c, nil
	case <-n.down:
		return nil, net.ErrClosed
	}
}

func (n *network) Close() error {
	n.once.Do(func() { close(n.down) })
	return nil
}

func (*network) Addr() net.Addr { return &net.UnixAddr{Name: "pipe"} }

// store is a MemoryCache that can lose or garble what it holds, and fail to read its
// entries.
type store struct {
	mu    sync.Mutex
	in    *sessionlock.MemoryCache
	names map[string]bool
	err   error // of reading an entry
}

func newStore() *store { return &store{in: new(sessionlock.MemoryCache), names: map[string]bool{}} }

func (s *store) at(name string) (*sessionlock.MemoryCache, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.names[name] = true
	if strings.HasSuffix(name, ":l") {
		return s.in, nil
	}
	return s.in, s.err
}

func (s *store) Load(ctx context.Context, name string) ([]byte, error) {
	in, err := s.at(name)
	if err != nil {
		return nil, err
	}
	return in.Load(ctx, name)
}

func (s *store) CompareAndSwap(ctx context.Context, name string, old, next []byte, ttl time.Duration) ([]byte, error) {
	in, _ := s.at(name)
	return in.CompareAndSwap(ctx, name, old, next, ttl)
}

func (s *store) lose() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.in = new(sessionlock.MemoryCache)
}

func (s *store) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = err
}

// garble replaces everything there is, and returns how much that was.
func (s *store) garble(t *testing.T) (n int) {
	for _, name := range s.seen() {
		old, err := s.Load(t.Context(), name)
		require.NoError(t, err)
		if old != nil {
			_, err = s.CompareAndSwap(t.Context(), name, old, []byte("no record"), time.Hour)
			require.NoError(t, err)
			n++
		}
	}
	return n
}

func (s *store) seen() (names []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name := range s.names {
		names = append(names, name)
	}
	return names
}
