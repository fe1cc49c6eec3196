package sessionrelay_test

import (
	"context"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/internal/redistest"
	"github.com/sessionlock/sessionlock/sessionrelay"
)

// world is a plain model of what stores keep: no time, no locks, everything looked for
// from front to back.
type world struct {
	sessions map[string]*modelled
	left     map[string]bool // session, node and conn of what is no home any more
}

type modelled struct {
	sessionrelay.Info
	before  sessionrelay.Home
	claims  map[string]string // id: owner
	done    map[string][]byte
	letters []*post
	seen    map[string]bool // ids that were put ever
	about   map[string][]byte
	takers  map[string]string // of what is about
}

type post struct {
	sessionrelay.Message
	state string // "", tried or dead
}

// model is the store of one node in a world.
type model struct {
	*world
	node string
}

func newWorld() *world { return &world{map[string]*modelled{}, map[string]bool{}} }

func (m model) Node() string { return m.node }

func mark(session, node, conn string) string { return fmt.Sprintf("%q %q %q", session, node, conn) }

func (m model) Register(_ context.Context, h sessionrelay.Hello, conn string, limit int) (sessionrelay.Info, sessionrelay.Home, error) {
	is := m.sessions[h.Session]
	if is != nil && is.User != h.User {
		return sessionrelay.Info{}, sessionrelay.Home{}, sessionrelay.ErrWrongUser
	}
	if is == nil {
		n := 0
		for _, s := range m.sessions {
			if s.User == h.User {
				n++
			}
		}
		if n >= limit {
			return sessionrelay.Info{}, sessionrelay.Home{}, sessionrelay.ErrCap
		}
	}
	if m.left[mark(h.Session, m.node, conn)] {
		return sessionrelay.Info{}, sessionrelay.Home{}, sessionrelay.ErrMoved
	}
	if is == nil {
		is = &modelled{claims: map[string]string{}, done: map[string][]byte{}, seen: map[string]bool{}, about: map[string][]byte{}, takers: map[string]string{}}
		m.sessions[h.Session] = is
	}
	home := sessionrelay.Home{Node: m.node, Conn: conn}
	if is.Home != home {
		m.left[mark(h.Session, is.Home.Node, is.Home.Conn)] = true
		is.before = is.Home
		for _, p := range is.letters {
			if p.state == "tried" {
				p.state = ""
			}
		}
	}
	is.Info = sessionrelay.Info{Session: h.Session, User: h.User, Lib: h.Lib, App: h.App, Version: h.Version, Home: home}
	return is.Info, is.before, nil
}

func (m model) Deregister(_ context.Context, session, conn string) error {
	m.left[mark(session, m.node, conn)] = true
	if is := m.sessions[session]; is != nil && is.Home == (sessionrelay.Home{Node: m.node, Conn: conn}) {
		is.Home = sessionrelay.Home{}
	}
	return nil
}

func (m model) Lookup(_ context.Context, session string) (sessionrelay.Info, error) {
	if m.sessions[session] == nil {
		return sessionrelay.Info{}, sessionrelay.ErrGone
	}
	return m.sessions[session].Info, nil
}

func (m model) Remove(_ context.Context, session string) (bool, error) {
	is := m.sessions[session]
	delete(m.sessions, session)
	if is != nil {
		maps.DeleteFunc(m.left, func(k string, _ bool) bool { return strings.HasPrefix(k, fmt.Sprintf("%q ", session)) })
	}
	return is != nil, nil
}

func (m model) List(_ context.Context, f sessionrelay.Filter, each func(sessionrelay.Info) bool) error {
	for _, s := range m.sessions {
		switch {
		case f.Connected && s.Home == (sessionrelay.Home{}), f.User != "" && s.User != f.User, f.App != "" && s.App != f.App, s.Version < f.Since:
		default:
			each(s.Info)
		}
	}
	return nil
}

func (m model) Alive(_ context.Context, sessions []string) (unknown []string, err error) {
	for _, s := range sessions {
		if m.sessions[s] == nil {
			unknown = append(unknown, s)
		}
	}
	return unknown, nil
}

func (model) Expire(context.Context, time.Duration) ([]string, error) { return nil, nil }

func (model) Scavenge(context.Context) (int, error) { return 0, nil }

func (m model) Homed(context.Context) (all []sessionrelay.Info, err error) {
	for _, s := range m.sessions {
		if s.Home.Node == m.node {
			all = append(all, s.Info)
		}
	}
	return all, nil
}

func (m model) Accept(_ context.Context, session, conn, id, owner string, _ time.Duration) (sessionrelay.Claim, error) {
	is := m.sessions[session]
	switch {
	case is == nil:
		return sessionrelay.Claim{}, sessionrelay.ErrGone
	case conn != "" && conn != is.Home.Conn:
		return sessionrelay.Claim{}, sessionrelay.ErrMoved
	}
	by, claimed := is.claims[id]
	if outcome, done := is.done[id]; done {
		return sessionrelay.Claim{State: sessionrelay.Done, Outcome: outcome}, nil
	}
	if claimed && by != owner {
		return sessionrelay.Claim{State: sessionrelay.InProgress}, nil
	}
	is.claims[id] = owner
	return sessionrelay.Claim{State: sessionrelay.Accepted}, nil
}

func (m model) Complete(_ context.Context, session, id, owner string, outcome []byte, answered ...string) error {
	is := m.sessions[session]
	if is == nil {
		return sessionrelay.ErrGone
	}
	if by, claimed := is.claims[id]; !claimed || by != owner {
		return sessionrelay.ErrTaken
	}
	if _, done := is.done[id]; !done {
		is.done[id] = outcome
		for _, request := range answered {
			if _, taken := is.takers[request]; taken {
				delete(is.about, request)
			}
		}
	}
	return nil
}

func (m model) Release(_ context.Context, session, id, owner string) error {
	if is := m.sessions[session]; is != nil && is.claims[id] == owner {
		if _, done := is.done[id]; !done {
			delete(is.claims, id)
		}
	}
	return nil
}

func (m model) Forget(_ context.Context, session string, ids ...string) error {
	if is := m.sessions[session]; is != nil {
		for _, id := range ids {
			delete(is.claims, id)
			delete(is.done, id)
		}
	}
	return nil
}

func (m model) Put(_ context.Context, session string, msg sessionrelay.Message, correlation []byte) (sessionrelay.Home, error) {
	is := m.sessions[session]
	if is == nil {
		return sessionrelay.Home{}, sessionrelay.ErrGone
	}
	if !is.seen[msg.ID] {
		is.seen[msg.ID] = true
		is.letters = append(is.letters, &post{Message: msg})
		if correlation != nil {
			is.about[msg.ID] = correlation
		}
	}
	return is.Home, nil
}

func (m model) at(session, conn string) (*modelled, error) {
	is := m.sessions[session]
	if is == nil {
		return nil, sessionrelay.ErrGone
	}
	if is.Home.Conn != conn || conn == "" {
		return nil, sessionrelay.ErrMoved
	}
	return is, nil
}

func (m model) Fetch(_ context.Context, session, conn string, most int) (found []sessionrelay.Message, err error) {
	is, err := m.at(session, conn)
	if err != nil {
		return nil, err
	}
	for _, p := range is.letters {
		if p.state == "" && len(found) < most {
			found = append(found, p.Message)
		}
	}
	return found, nil
}

func (m model) move(session, conn string, ids []string, from []string, to string) error {
	is, err := m.at(session, conn)
	if err != nil {
		return err
	}
	for _, p := range is.letters {
		if slices.Contains(ids, p.ID) && slices.Contains(from, p.state) {
			p.state = to
			if to == "tried" {
				p.Attempts++
			}
		}
	}
	return nil
}

func (m model) Attempted(_ context.Context, session, conn string, ids ...string) error {
	return m.move(session, conn, ids, []string{""}, "tried")
}

func (m model) Bury(_ context.Context, session, conn string, ids ...string) error {
	return m.move(session, conn, ids, []string{"", "tried"}, "dead")
}

func (m model) Delivered(_ context.Context, session string, ids ...string) error {
	if is := m.sessions[session]; is != nil {
		is.letters = slices.DeleteFunc(is.letters, func(p *post) bool { return slices.Contains(ids, p.ID) })
	}
	return nil
}

func (m model) Buried(_ context.Context, session string) (found []sessionrelay.Message, err error) {
	is := m.sessions[session]
	if is == nil {
		return nil, sessionrelay.ErrGone
	}
	for _, p := range is.letters {
		if p.state == "dead" {
			found = append(found, p.Message)
		}
	}
	return found, nil
}

func (m model) Revive(_ context.Context, session string, ids ...string) error {
	is := m.sessions[session]
	if is == nil {
		return sessionrelay.ErrGone
	}
	for _, p := range is.letters {
		if slices.Contains(ids, p.ID) && p.state == "dead" {
			p.state, p.Attempts = "", 0
		}
	}
	return nil
}

func (m model) Take(_ context.Context, session, id, answer string) ([]byte, bool, error) {
	is := m.sessions[session]
	if is == nil {
		return nil, false, nil
	}
	about, ok := is.about[id]
	if by, taken := is.takers[id]; !ok || taken && by != answer {
		return nil, false, nil
	}
	is.takers[id] = answer
	return about, true, nil
}

// question is one random call. Its answer is all that a caller can see, times aside.
type question struct {
	node int
	text string
	ask  func(context.Context, sessionrelay.Store) string
}

// curiosity asks random questions about a few names.
type curiosity struct {
	*rand.Rand
	conns []string
}

func (c *curiosity) pick(from ...string) string { return from[c.IntN(len(from))] }

func (c *curiosity) conn() string {
	if c.IntN(3) == 0 || len(c.conns) == 0 {
		c.conns = append(c.conns, fmt.Sprint("c", len(c.conns)))
	}
	recent := c.conns[max(0, len(c.conns)-4):]
	return c.pick(recent...)
}

func (c *curiosity) some(from ...string) []string {
	c.Shuffle(len(from), func(i, j int) { from[i], from[j] = from[j], from[i] })
	return from[:1+c.IntN(len(from)-1)]
}

func (c *curiosity) bytes() []byte {
	return [][]byte{nil, {}, []byte("x"), []byte("\x00\r\n{}"), fmt.Append(nil, c.IntN(10))}[c.IntN(5)]
}

func infos(all []sessionrelay.Info) string {
	lines := make([]string, 0, len(all))
	for _, i := range all {
		i.Created, i.Live = time.Time{}, time.Time{}
		lines = append(lines, fmt.Sprintf("%+v", i))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

func mail(all []sessionrelay.Message, err error) string {
	if err != nil {
		return fmt.Sprint(err)
	}
	var s strings.Builder
	for _, m := range all {
		fmt.Fprintf(&s, "%s %t %d %#v; ", m.ID, m.Request, m.Attempts, m.Payload)
	}
	return s.String()
}

// next returns a question; those that move messages come up more often.
func (c *curiosity) next() question {
	session := c.pick("s", "s", "t", "S")
	user := c.pick("bob", "bob", "bob", "eve")
	conn, id, owner, most := c.conn(), c.pick("1", "2", "3", "4"), c.pick("o", "p", "o p"), c.IntN(5)
	over, other := c.pick("", conn), c.pick("1", "2", "3", "4")
	some, payload, about := c.some("1", "2", "3", "4", "none"), c.bytes(), c.bytes()
	app, version := c.pick("x", "y"), c.pick("1", "10", "9")
	q := question{node: c.IntN(2)}
	set := func(text string, ask func(context.Context, sessionrelay.Store) string) { q.text, q.ask = text, ask }
	ended := func(err error) string { return fmt.Sprint(err) }
	switch n := c.IntN(40); {
	case n < 7:
		limit := 1 + c.IntN(3)
		h := sessionrelay.Hello{Session: session, User: user, App: app, Version: version}
		set(fmt.Sprintf("Register %+v %s %d", h, conn, limit), func(ctx context.Context, s sessionrelay.Store) string {
			i, before, err := s.Register(ctx, h, conn, limit)
			return fmt.Sprint(infos([]sessionrelay.Info{i}), before, err)
		})
	case n < 9:
		set("Deregister "+session+conn, func(ctx context.Context, s sessionrelay.Store) string { return ended(s.Deregister(ctx, session, conn)) })
	case n < 11:
		set("Lookup "+session, func(ctx context.Context, s sessionrelay.Store) string {
			i, err := s.Lookup(ctx, session)
			return fmt.Sprint(infos([]sessionrelay.Info{i}), err)
		})
	case n < 12:
		set("Remove "+session, func(ctx context.Context, s sessionrelay.Store) string { return fmt.Sprint(s.Remove(ctx, session)) })
	case n < 14:
		f := sessionrelay.Filter{Connected: c.IntN(2) == 0, User: c.pick("", user), App: c.pick("", app), Since: c.pick("", version)}
		set(fmt.Sprintf("List %+v", f), func(ctx context.Context, s sessionrelay.Store) string {
			var all []sessionrelay.Info
			err := s.List(ctx, f, func(i sessionrelay.Info) bool { all = append(all, i); return true })
			return fmt.Sprint(infos(all), err)
		})
	case n < 15:
		set("Alive", func(ctx context.Context, s sessionrelay.Store) string {
			unknown, err := s.Alive(ctx, []string{"s", "t", "S", "u"})
			slices.Sort(unknown)
			return fmt.Sprint(unknown, err)
		})
	case n < 16:
		set("Expire", func(ctx context.Context, s sessionrelay.Store) string { return fmt.Sprint(s.Expire(ctx, time.Hour)) })
	case n < 17:
		set("Scavenge", func(ctx context.Context, s sessionrelay.Store) string { // refused attempts may have left hints
			_, err := s.Scavenge(ctx)
			return ended(err)
		})
	case n < 18:
		set("Homed", func(ctx context.Context, s sessionrelay.Store) string {
			all, err := s.Homed(ctx)
			return fmt.Sprint(infos(all), err)
		})
	case n < 21:
		set("Accept "+session+over+id+owner, func(ctx context.Context, s sessionrelay.Store) string {
			claim, err := s.Accept(ctx, session, over, id, owner, time.Hour)
			return fmt.Sprintf("%d %#v %v", claim.State, claim.Outcome, err)
		})
	case n < 23:
		set("Complete "+session+id+owner+other, func(ctx context.Context, s sessionrelay.Store) string {
			return ended(s.Complete(ctx, session, id, owner, payload, other))
		})
	case n < 24:
		set("Release "+session+id+owner, func(ctx context.Context, s sessionrelay.Store) string {
			return ended(s.Release(ctx, session, id, owner))
		})
	case n < 25:
		set(fmt.Sprint("Forget ", session, some), func(ctx context.Context, s sessionrelay.Store) string { return ended(s.Forget(ctx, session, some...)) })
	case n < 29:
		m := sessionrelay.Message{ID: id, Request: most > 2, Payload: payload}
		set(fmt.Sprintf("Put %s %+v %#v", session, m, about), func(ctx context.Context, s sessionrelay.Store) string {
			return fmt.Sprint(s.Put(ctx, session, m, about))
		})
	case n < 32:
		set(fmt.Sprint("Fetch ", session, conn, most), func(ctx context.Context, s sessionrelay.Store) string {
			return mail(s.Fetch(ctx, session, conn, most))
		})
	case n < 34:
		set(fmt.Sprint("Attempted ", session, conn, some), func(ctx context.Context, s sessionrelay.Store) string {
			return ended(s.Attempted(ctx, session, conn, some...))
		})
	case n < 35:
		set(fmt.Sprint("Delivered ", session, some[0]), func(ctx context.Context, s sessionrelay.Store) string {
			return ended(s.Delivered(ctx, session, some[0]))
		})
	case n < 37:
		set(fmt.Sprint("Bury ", session, conn, some), func(ctx context.Context, s sessionrelay.Store) string {
			return ended(s.Bury(ctx, session, conn, some...))
		})
	case n < 38:
		set("Buried "+session, func(ctx context.Context, s sessionrelay.Store) string { return mail(s.Buried(ctx, session)) })
	case n < 39:
		set(fmt.Sprint("Revive ", session, some), func(ctx context.Context, s sessionrelay.Store) string { return ended(s.Revive(ctx, session, some...)) })
	default:
		set("Take "+session+id+owner, func(ctx context.Context, s sessionrelay.Store) string {
			about, ok, err := s.Take(ctx, session, id, owner)
			return fmt.Sprintf("%#v %t %v", about, ok, err)
		})
	}
	return q
}

// agrees asks two nodes and the model the same random questions. before, unless nil,
// is called before each.
func agrees(t *testing.T, open func(node string) sessionrelay.Store, seed uint64, n int, before func(*rand.Rand)) {
	t.Helper()
	c := &curiosity{Rand: rand.New(rand.NewPCG(seed, 0))}
	nodes := []string{fmt.Sprint("a", seed), fmt.Sprint("b", seed)}
	all := newWorld()
	stores, models := []sessionrelay.Store{open(nodes[0]), open(nodes[1])}, []sessionrelay.Store{model{all, nodes[0]}, model{all, nodes[1]}}
	var asked []string
	for range n {
		q := c.next()
		asked = append(asked, fmt.Sprintf("%s: %s", nodes[q.node], q.text))
		if before != nil {
			before(c.Rand)
		}
		want := q.ask(t.Context(), models[q.node])
		got := q.ask(t.Context(), stores[q.node])
		require.Equal(t, want, got, "seed %d, the last of:\n%s", seed, strings.Join(asked[max(0, len(asked)-40):], "\n"))
	}
}

func TestStoresAgreeWithAModel(t *testing.T) {
	t.Run("memory", func(t *testing.T) {
		for seed := range uint64(200) {
			agrees(t, memory(t), seed, 400, nil)
		}
	})
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		for seed := range uint64(15) {
			require.NoError(t, rdb.FlushAll(t.Context()).Err())
			agrees(t, stores(t, rdb), 1000+seed, 300, nil)
		}
	})
}

func TestStoresAgreeWithAModelWhateverTheServerForgets(t *testing.T) {
	rdb := redistest.Start(t).Client()
	agrees(t, stores(t, rdb), 2000, 300, func(r *rand.Rand) {
		if r.IntN(3) == 0 {
			require.NoError(t, rdb.ScriptFlush(t.Context()).Err())
		}
	})
}

// lossy is a way to a server on which replies are lost once their commands were
// executed: go-redis sends those again.
type lossy struct {
	net.Conn
	due *atomic.Int64 // replies until the one that is lost; negative: none is
}

func (c lossy) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if err == nil && c.due.Add(-1) == -1 {
		_ = c.Close()
		return 0, io.EOF
	}
	return n, err
}

// loses returns a client's option, and how many replies until the next one is lost.
func loses() (func(*redis.Options), *atomic.Int64) {
	due := &atomic.Int64{}
	due.Store(-1)
	return func(o *redis.Options) {
		o.MinRetryBackoff, o.MaxRetryBackoff = -1, -1
		o.Dialer = func(ctx context.Context, network, addr string) (net.Conn, error) {
			c, err := new(net.Dialer).DialContext(ctx, network, addr)
			return lossy{c, due}, err
		}
	}, due
}

func TestStoresAgreeWithAModelWhenRepliesAreLost(t *testing.T) {
	option, due := loses()
	rdb := redistest.Start(t).Client(option)
	lost := 0
	for seed := range uint64(10) {
		require.NoError(t, rdb.FlushAll(t.Context()).Err())
		agrees(t, stores(t, rdb), 3000+seed, 300, func(r *rand.Rand) {
			if due.Load() < 0 {
				lost++
				due.Store(r.Int64N(6))
			}
		})
	}
	assert.Greater(t, lost, 500)
}
