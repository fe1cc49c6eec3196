package sessionrelay_test

// What the tests of nodes and connections share: a fleet, spies before its stores, and
// clients at the far end.

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/internal/redistest"
	"github.com/sessionlock/sessionlock/sessionrelay"
)

// client is the far end of connections: it remembers what it was sent.
type client struct {
	does func(context.Context, sessionrelay.Message) error // with each message; nil: takes it

	mu  sync.Mutex
	all []sessionrelay.Message
}

func (c *client) send(ctx context.Context, m sessionrelay.Message) error {
	c.mu.Lock()
	c.all = append(c.all, m)
	c.mu.Unlock()
	if c.does != nil {
		return c.does(ctx, m)
	}
	return nil
}

func (c *client) messages() []sessionrelay.Message {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.all)
}

// received are the payloads.
func (c *client) received() []string {
	all := []string{}
	for _, m := range c.messages() {
		all = append(all, string(m.Payload))
	}
	return all
}

func (c *client) ids() (all []string) {
	for _, m := range c.messages() {
		all = append(all, m.ID)
	}
	return all
}

// spy stands before a store: it counts what is asked, and answers what a test wants.
type spy struct {
	sessionrelay.Store
	deaf bool // no wake-ups come through

	mu       sync.Mutex
	watchers int
	asked    []string
	before   map[string]func(context.Context) error
	after    map[string]func(context.Context) error
}

// on has f called before verb; its error is the answer then, and nothing is done. With
// an empty verb before each.
func (s *spy) on(verb string, f func(context.Context) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.before == nil {
		s.before = map[string]func(context.Context) error{}
	}
	s.before[verb] = f
}

// then has f called when verb was done; its error is the answer then.
func (s *spy) then(verb string, f func(context.Context) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.after == nil {
		s.after = map[string]func(context.Context) error{}
	}
	s.after[verb] = f
}

// down is the answer of a store that cannot be reached.
func down(context.Context) error {
	return fmt.Errorf("sessionrelay: %w: no route", sessionrelay.ErrUnavailable)
}

// times says how often something was asked.
func (s *spy) times(what string) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range s.asked {
		if a == what {
			n++
		}
	}
	return n
}

// ask asks what, which begins with verb.
func (s *spy) ask(ctx context.Context, verb string, f func() error, size ...int) error {
	s.mu.Lock()
	s.asked = append(s.asked, verb)
	for _, n := range size {
		s.asked = append(s.asked, fmt.Sprint(verb, " ", n))
	}
	before, every, after := s.before[verb], s.before[""], s.after[verb]
	s.mu.Unlock()
	for _, hook := range []func(context.Context) error{every, before} {
		if hook != nil {
			if err := hook(ctx); err != nil {
				return err
			}
		}
	}
	err := f()
	if after != nil {
		if e := after(ctx); e != nil {
			return e
		}
	}
	return err
}

func (s *spy) Register(ctx context.Context, h sessionrelay.Hello, conn string, limit int) (now sessionrelay.Info, home sessionrelay.Home, err error) {
	err = s.ask(ctx, "Register", func() error { now, home, err = s.Store.Register(ctx, h, conn, limit); return err }, limit)
	return now, home, err
}

func (s *spy) Deregister(ctx context.Context, session, conn string) error {
	return s.ask(ctx, "Deregister", func() error { return s.Store.Deregister(ctx, session, conn) })
}

func (s *spy) Lookup(ctx context.Context, session string) (i sessionrelay.Info, err error) {
	err = s.ask(ctx, "Lookup", func() error { i, err = s.Store.Lookup(ctx, session); return err })
	return i, err
}

func (s *spy) Remove(ctx context.Context, session string) (ok bool, err error) {
	err = s.ask(ctx, "Remove", func() error { ok, err = s.Store.Remove(ctx, session); return err })
	return ok, err
}

func (s *spy) Alive(ctx context.Context, sessions []string) (unknown []string, err error) {
	err = s.ask(ctx, "Alive", func() error { unknown, err = s.Store.Alive(ctx, sessions); return err }, len(sessions))
	return unknown, err
}

func (s *spy) Expire(ctx context.Context, idle time.Duration) (expired []string, err error) {
	err = s.ask(ctx, "Expire", func() error { expired, err = s.Store.Expire(ctx, idle); return err })
	return expired, err
}

func (s *spy) Scavenge(ctx context.Context) (n int, err error) {
	err = s.ask(ctx, "Scavenge", func() error { n, err = s.Store.Scavenge(ctx); return err })
	return n, err
}

func (s *spy) Homed(ctx context.Context) (all []sessionrelay.Info, err error) {
	err = s.ask(ctx, "Homed", func() error { all, err = s.Store.Homed(ctx); return err })
	return all, err
}

func (s *spy) Accept(ctx context.Context, session, conn, id, owner string, patience time.Duration) (c sessionrelay.Claim, err error) {
	err = s.ask(ctx, "Accept", func() error { c, err = s.Store.Accept(ctx, session, conn, id, owner, patience); return err })
	return c, err
}

func (s *spy) Complete(ctx context.Context, session, id, owner string, outcome []byte, answered ...string) error {
	return s.ask(ctx, "Complete", func() error { return s.Store.Complete(ctx, session, id, owner, outcome, answered...) })
}

func (s *spy) Release(ctx context.Context, session, id, owner string) error {
	return s.ask(ctx, "Release", func() error { return s.Store.Release(ctx, session, id, owner) })
}

func (s *spy) Forget(ctx context.Context, session string, ids ...string) error {
	return s.ask(ctx, "Forget", func() error { return s.Store.Forget(ctx, session, ids...) })
}

func (s *spy) Put(ctx context.Context, session string, m sessionrelay.Message, correlation []byte) (home sessionrelay.Home, err error) {
	err = s.ask(ctx, "Put", func() error { home, err = s.Store.Put(ctx, session, m, correlation); return err })
	return home, err
}

func (s *spy) Fetch(ctx context.Context, session, conn string, most int) (found []sessionrelay.Message, err error) {
	_ = s.ask(ctx, "Fetch by "+conn, func() error { return nil })
	err = s.ask(ctx, "Fetch", func() error { found, err = s.Store.Fetch(ctx, session, conn, most); return err }, most)
	return found, err
}

func (s *spy) Attempted(ctx context.Context, session, conn string, ids ...string) error {
	return s.ask(ctx, "Attempted", func() error { return s.Store.Attempted(ctx, session, conn, ids...) }, len(ids))
}

func (s *spy) Delivered(ctx context.Context, session string, ids ...string) error {
	return s.ask(ctx, "Delivered", func() error { return s.Store.Delivered(ctx, session, ids...) })
}

func (s *spy) Bury(ctx context.Context, session, conn string, ids ...string) error {
	return s.ask(ctx, "Bury", func() error { return s.Store.Bury(ctx, session, conn, ids...) })
}

func (s *spy) Take(ctx context.Context, session, id, answer string) (correlation []byte, ok bool, err error) {
	err = s.ask(ctx, "Take", func() error { correlation, ok, err = s.Store.Take(ctx, session, id, answer); return err })
	return correlation, ok, err
}

func (s *spy) Watch(session string, changed func()) (stop func()) {
	if s.deaf {
		return func() {}
	}
	s.mu.Lock()
	s.watchers++
	s.mu.Unlock()
	unwatch := s.Store.(interface {
		Watch(string, func()) func()
	}).Watch(session, changed)
	return func() {
		s.mu.Lock()
		s.watchers--
		s.mu.Unlock()
		unwatch()
	}
}

// watching says how many watches have not been stopped.
func (s *spy) watching() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.watchers
}

func (s *spy) Close() {
	_ = s.ask(context.Background(), "Close", func() error { return nil })
	if c, ok := s.Store.(interface{ Close() }); ok {
		c.Close()
	}
}

// fleet is nodes on stores of one kind, and what they tell.
type fleet struct {
	t    *testing.T
	open func(node string) sessionrelay.Store

	mu   sync.Mutex
	told []sessionrelay.Event
}

func newFleet(t *testing.T, open func(node string) sessionrelay.Store) *fleet {
	t.Helper()
	return &fleet{t: t, open: open}
}

// inBubble runs f with a fleet on one memory, where time is fake.
func inBubble(t *testing.T, f func(t *testing.T, f *fleet)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { f(t, newFleet(t, memory(t))) })
}

// onEach runs f with a fleet on each kind of store.
func onEach(t *testing.T, f func(t *testing.T, f *fleet)) {
	everywhere(t, func(t *testing.T, open func(string) sessionrelay.Store) { f(t, newFleet(t, open)) })
}

func (f *fleet) note(e sessionrelay.Event) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.told = append(f.told, e)
}

// events are those of a kind that were told by any node, or all.
func (f *fleet) events(kind string) (all []sessionrelay.Event) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, e := range f.told {
		if kind == "" || e.Kind == kind {
			all = append(all, e)
		}
	}
	return all
}

func (f *fleet) kinds() (all []string) {
	for _, e := range f.events("") {
		all = append(all, e.Kind)
	}
	return all
}

// node makes a node that does not run.
func (f *fleet) node(name string, opts ...sessionrelay.Option) (*sessionrelay.Node, *spy) {
	f.t.Helper()
	s := &spy{Store: f.open(name)}
	return f.nodeOn(s, opts...), s
}

func (f *fleet) nodeOn(s sessionrelay.Store, opts ...sessionrelay.Option) *sessionrelay.Node {
	f.t.Helper()
	n, err := sessionrelay.New(s, append([]sessionrelay.Option{sessionrelay.WithObserver(f.note)}, opts...)...)
	require.NoError(f.t, err)
	return n
}

// runs runs a node until the test ends, or stop is called, which waits.
func runs(t *testing.T, n *sessionrelay.Node) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- n.Run(ctx) }()
	stop = sync.OnceFunc(func() { cancel(); assert.NoError(t, <-ended) })
	t.Cleanup(stop)
	return stop
}

func newNode(t *testing.T, rdb redis.UniversalClient, name string, opts ...sessionrelay.Option) *sessionrelay.Node {
	t.Helper()
	s, err := sessionrelay.NewRedisStore(rdb, name)
	require.NoError(t, err)
	n, err := sessionrelay.New(s, opts...)
	require.NoError(t, err)
	runs(t, n)
	return n
}

// comes connects bob, anew or with the session he had.
func comes(t *testing.T, n *sessionrelay.Node, c *client, session ...string) *sessionrelay.Conn {
	t.Helper()
	h := sessionrelay.Hello{User: "bob"}
	if len(session) > 0 {
		h.Session = session[0]
	}
	conn, err := n.Connect(t.Context(), h, c.send)
	require.NoError(t, err)
	return conn
}

func sends(t *testing.T, n *sessionrelay.Node, session string, payloads ...string) (all []string) {
	t.Helper()
	for _, p := range payloads {
		id, err := n.Send(t.Context(), session, []byte(p))
		require.NoError(t, err)
		all = append(all, id)
	}
	return all
}

func soon(t *testing.T, cond func() bool, what ...any) {
	t.Helper()
	require.Eventually(t, cond, 10*time.Second, time.Millisecond, what...)
}

// gets waits until c has been sent these payloads, and no others.
func gets(t *testing.T, c *client, want ...string) {
	t.Helper()
	soon(t, func() bool { return len(c.received()) >= len(want) }, "want %v", want)
	require.Equal(t, want, c.received())
}

// ends waits until a connection has ended, for that reason.
func ends(t *testing.T, c *sessionrelay.Conn, why error) {
	t.Helper()
	select {
	case <-c.Done():
	case <-time.After(10 * time.Second):
		require.Fail(t, "the connection has not ended")
	}
	if why == nil {
		require.NoError(t, c.Err())
		return
	}
	require.ErrorIs(t, c.Err(), why)
}

// lives says that a connection has not ended.
func lives(t *testing.T, c *sessionrelay.Conn) {
	t.Helper()
	select {
	case <-c.Done():
		require.NoError(t, c.Err(), "the connection has ended")
		require.Fail(t, "the connection has ended")
	default:
		require.NoError(t, c.Err())
	}
}

// home is where a store sees a session.
func home(t *testing.T, s sessionrelay.Store, session string) sessionrelay.Home {
	t.Helper()
	i, err := s.Lookup(t.Context(), session)
	require.NoError(t, err)
	return i.Home
}

// away waits until a session has no home.
func away(t *testing.T, s sessionrelay.Store, session string) {
	t.Helper()
	soon(t, func() bool {
		i, err := s.Lookup(t.Context(), session)
		return err == nil && i.Home == sessionrelay.Home{}
	}, "the session has a home")
}

// pass lets time pass in a bubble, and what is due then be done.
func pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

var errNo = errors.New("no")

func TestMessagesFollowASessionToItsNextHome(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		ctx := t.Context()
		a, b := newNode(t, rdb, "a"), newNode(t, rdb, "b")
		var c1, c2 client
		conn := comes(t, a, &c1)
		for i := range 50 {
			sends(t, b, conn.Session(), fmt.Sprint(i))
		}
		soon(t, func() bool { return len(c1.received()) == 50 })
		require.NoError(t, conn.Acked(ctx, c1.ids()[:40]...))
		again := comes(t, b, &c2, conn.Session())
		ends(t, conn, sessionrelay.ErrMoved)
		soon(t, func() bool { return len(c2.received()) == 10 })
		assert.Equal(t, c1.received()[40:], c2.received())
		n := 0
		for range 2 {
			reply, err := again.Receive(ctx, "m1", func(context.Context) ([]byte, error) { n++; return []byte("ok"), nil })
			require.NoError(t, err)
			assert.Equal(t, "ok", string(reply))
		}
		assert.Equal(t, 1, n)
		require.NoError(t, a.Remove(ctx, conn.Session()))
		ends(t, again, sessionrelay.ErrGone)
	})
}

// answered has an answer to request processed, as no other is, and returns what it learnt.
func answered(ctx context.Context, conn *sessionrelay.Conn, request string) (about []byte, first bool, err error) {
	_, err = conn.Receive(ctx, rand.Text(), func(ctx context.Context) (_ []byte, err error) {
		about, first, err = conn.Answered(ctx, request)
		return nil, err
	})
	return about, first, err
}
