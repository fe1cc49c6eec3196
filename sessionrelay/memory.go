package sessionrelay

import (
	"bytes"
	"context"
	"slices"
	"sync"
	"time"

	"github.com/sessionlock/sessionlock/internal/hub"
)

// Memory keeps sessions in this process. Nodes whose stores come from one Memory stand
// for a fleet in tests; in production it serves one node, and what it keeps ends with
// the process. The zero value is ready. Safe for concurrent use.
type Memory struct {
	mu       sync.Mutex
	sessions map[string]*held
	users    map[string]int     // how many sessions each has
	was      map[string]*recent // by session: connections that were replaced or given up, also before it existed
	watched  hub.Local
}

// Store returns the [Store] of node, which must be the only one of its name. It has no
// outages, and does not look at contexts.
func (m *Memory) Store(node string) Store { return &memoryStore{m, node} }

type memoryStore struct {
	*Memory
	node string
}

func (s *memoryStore) Node() string { return s.node }

// held is a session with all that belongs to it.
type held struct {
	Info
	before Home // which the present one has replaced
	in     map[string]*claim
	out    map[string]*letter
	order  []*letter // of out, oldest first, and some that are out no more
	gone   recent    // messages that were delivered
	req    map[string]*correlated
}

type correlated struct {
	of    []byte
	by    string // the answer that has it
	taken bool
}

type claim struct {
	owner   string
	until   int64 // milliseconds
	done    bool
	outcome []byte
}

type letter struct {
	Message
	sent, dead, removed bool
}

// remembered is how long what is over still counts, as it does in Redis.
const remembered = time.Minute

// recent knows what was added to it within the last minute.
type recent struct {
	at    map[string]time.Time
	order []string
}

func (r *recent) add(name string) {
	now := time.Now()
	for len(r.order) > 0 && now.Sub(r.at[r.order[0]]) >= remembered {
		delete(r.at, r.order[0])
		r.order = r.order[1:]
	}
	if r.at == nil {
		r.at = map[string]time.Time{}
	}
	if _, ok := r.at[name]; !ok {
		r.order = append(r.order, name)
	}
	r.at[name] = now
}

func (r *recent) has(name string) bool {
	if r == nil {
		return false
	}
	at, ok := r.at[name]
	return ok && time.Since(at) < remembered
}

func (m *Memory) left(session, node, conn string) {
	if m.was == nil {
		m.was = map[string]*recent{}
	}
	if m.was[session] == nil {
		m.was[session] = &recent{}
	}
	m.was[session].add(pair(node, conn))
}

// Watch has changed called when there may be something for whoever is connected to
// session: a message, or another connection in its place.
func (m *Memory) Watch(session string, changed func()) (stop func()) {
	return m.watched.Watch(session, changed)
}

func (s *memoryStore) Register(_ context.Context, h Hello, conn string, limit int) (Info, Home, error) {
	if err := h.check(conn); err != nil {
		return Info{}, Home{}, err
	}
	now, before, err := s.register(h, conn, limit)
	if err == nil {
		s.watched.Wake(h.Session)
	}
	return now, before, err
}

func (s *memoryStore) register(h Hello, conn string, limit int) (Info, Home, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	is := s.sessions[h.Session]
	switch {
	case is != nil && is.User != h.User:
		return Info{}, Home{}, ErrWrongUser
	case is == nil && s.users[h.User] >= limit:
		return Info{}, Home{}, ErrCap
	case s.was[h.Session].has(pair(s.node, conn)):
		return Info{}, Home{}, ErrMoved
	case is == nil:
		is = s.create(h)
	}
	home := Home{s.node, conn}
	if is.Home != home {
		if is.before = is.Home; is.before != (Home{}) {
			s.left(h.Session, is.before.Node, is.before.Conn)
		}
		for _, l := range is.order {
			l.sent = false
		}
	}
	is.Info = Info{
		Session: h.Session, User: h.User, Lib: h.Lib, App: h.App, Version: h.Version,
		Created: is.Created, Live: stamp(), Home: home,
	}
	return is.Info, is.before, nil
}

// create adds a session; s.mu is held.
func (s *memoryStore) create(h Hello) *held {
	if s.sessions == nil {
		s.sessions, s.users = map[string]*held{}, map[string]int{}
	}
	is := &held{
		Info: Info{Created: stamp()},
		in:   map[string]*claim{}, out: map[string]*letter{}, req: map[string]*correlated{},
	}
	s.sessions[h.Session] = is
	s.users[h.User]++
	return is
}

// stamp is the time to the millisecond.
func stamp() time.Time { return time.UnixMilli(time.Now().UnixMilli()) }

func (s *memoryStore) Deregister(_ context.Context, session, conn string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.left(session, s.node, conn)
	if is := s.sessions[session]; is != nil && is.Home == (Home{s.node, conn}) {
		is.Home = Home{}
	}
	return nil
}

func (s *memoryStore) Lookup(_ context.Context, session string) (Info, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if is := s.sessions[session]; is != nil {
		return is.Info, nil
	}
	return Info{}, ErrGone
}

func (s *memoryStore) Remove(_ context.Context, session string) (bool, error) {
	s.mu.Lock()
	existed := s.remove(session)
	s.mu.Unlock()
	if existed {
		s.watched.Wake(session)
	}
	return existed, nil
}

// remove removes a session; s.mu is held.
func (s *memoryStore) remove(session string) bool {
	is := s.sessions[session]
	if is == nil {
		return false
	}
	if s.users[is.User]--; s.users[is.User] == 0 {
		delete(s.users, is.User)
	}
	delete(s.sessions, session)
	delete(s.was, session)
	return true
}

func (s *memoryStore) List(_ context.Context, f Filter, each func(Info) bool) error {
	for _, i := range s.infos(f.chooses) {
		if !each(i) {
			break
		}
	}
	return nil
}

func (s *memoryStore) infos(chosen func(Info) bool) (found []Info) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, is := range s.sessions {
		if chosen(is.Info) {
			found = append(found, is.Info)
		}
	}
	return found
}

func (s *memoryStore) Alive(_ context.Context, sessions []string) (unknown []string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, session := range sessions {
		if is := s.sessions[session]; is != nil {
			is.Live = stamp()
		} else {
			unknown = append(unknown, session)
		}
	}
	return unknown, nil
}

func (s *memoryStore) Expire(_ context.Context, idle time.Duration) (expired []string, err error) {
	s.mu.Lock()
	since := stamp().Add(-idle)
	for session, is := range s.sessions {
		if is.Live.Before(since) {
			s.remove(session)
			expired = append(expired, session)
		}
	}
	s.mu.Unlock()
	for _, session := range expired {
		s.watched.Wake(session)
	}
	return expired, nil
}

// Scavenge finds nothing to count: sessions take all that is theirs with them. What it
// drops are connections that never had one.
func (s *memoryStore) Scavenge(context.Context) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for session, was := range s.was {
		if s.sessions[session] == nil && !was.has(was.order[len(was.order)-1]) {
			delete(s.was, session)
		}
	}
	return 0, nil
}

func (s *memoryStore) Homed(context.Context) ([]Info, error) {
	return s.infos(func(i Info) bool { return i.Home.Node == s.node }), nil
}

func (s *memoryStore) Accept(_ context.Context, session, conn, id, owner string, patience time.Duration) (Claim, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	is := s.sessions[session]
	switch {
	case is == nil:
		return Claim{}, ErrGone
	case conn != "" && conn != is.Home.Conn:
		return Claim{}, ErrMoved
	}
	now := time.Now().UnixMilli()
	switch c := is.in[id]; {
	case c != nil && c.done:
		return Claim{Done, bytes.Clone(c.outcome)}, nil
	case c != nil && c.owner != owner && c.until > now:
		return Claim{State: InProgress}, nil
	}
	is.in[id] = &claim{owner: owner, until: now + patience.Milliseconds()}
	return Claim{State: Accepted}, nil
}

func (s *memoryStore) Complete(_ context.Context, session, id, owner string, outcome []byte, answered ...string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	is := s.sessions[session]
	if is == nil {
		return ErrGone
	}
	c := is.in[id]
	switch {
	case c == nil || c.owner != owner:
		return ErrTaken
	case !c.done:
		c.done, c.outcome = true, bytes.Clone(outcome)
		for _, request := range answered {
			if r := is.req[request]; r != nil && r.taken {
				delete(is.req, request)
			}
		}
	}
	return nil
}

func (s *memoryStore) Release(_ context.Context, session, id, owner string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if is := s.sessions[session]; is != nil {
		if c := is.in[id]; c != nil && c.owner == owner && !c.done {
			delete(is.in, id)
		}
	}
	return nil
}

func (s *memoryStore) Forget(_ context.Context, session string, ids ...string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if is := s.sessions[session]; is != nil {
		for _, id := range ids {
			delete(is.in, id)
		}
	}
	return nil
}

func (s *memoryStore) Put(_ context.Context, session string, m Message, correlation []byte) (Home, error) {
	home, added, err := s.put(session, m, correlation)
	if added {
		s.watched.Wake(session)
	}
	return home, err
}

func (s *memoryStore) put(session string, m Message, correlation []byte) (home Home, added bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	is := s.sessions[session]
	if is == nil {
		return Home{}, false, ErrGone
	}
	if is.out[m.ID] != nil || is.gone.has(m.ID) {
		return is.Home, false, nil
	}
	l := &letter{Message: Message{ID: m.ID, Request: m.Request, Payload: bytes.Clone(m.Payload)}}
	is.out[m.ID], is.order = l, append(is.order, l)
	if correlation != nil {
		is.req[m.ID] = &correlated{of: bytes.Clone(correlation)}
	}
	return is.Home, true, nil
}

// at returns the session if conn is its home; s.mu is held.
func (s *memoryStore) at(session, conn string) (*held, error) {
	is := s.sessions[session]
	switch {
	case is == nil:
		return nil, ErrGone
	case is.Home == Home{} || is.Home.Conn != conn:
		return nil, ErrMoved
	}
	return is, nil
}

func (s *memoryStore) Fetch(_ context.Context, session, conn string, most int) ([]Message, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	is, err := s.at(session, conn)
	if err != nil {
		return nil, err
	}
	return is.some(most, func(l *letter) bool { return !l.sent && !l.dead }), nil
}

// some returns copies of up to most messages, oldest first.
func (is *held) some(most int, chosen func(*letter) bool) (found []Message) {
	for _, l := range is.order {
		if len(found) >= most {
			break
		}
		if !l.removed && chosen(l) {
			m := l.Message
			m.Payload = bytes.Clone(m.Payload)
			found = append(found, m)
		}
	}
	return found
}

func (s *memoryStore) Attempted(_ context.Context, session, conn string, ids ...string) error {
	return s.each(session, conn, ids, func(l *letter) {
		if !l.sent && !l.dead {
			l.sent = true
			l.Attempts++
		}
	})
}

func (s *memoryStore) Bury(_ context.Context, session, conn string, ids ...string) error {
	return s.each(session, conn, ids, func(l *letter) { l.dead, l.sent = true, false })
}

// each calls f with those of ids that are out, if conn is the session's home.
func (s *memoryStore) each(session, conn string, ids []string, f func(*letter)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	is, err := s.at(session, conn)
	if err != nil {
		return err
	}
	for _, id := range ids {
		if l := is.out[id]; l != nil {
			f(l)
		}
	}
	return nil
}

func (s *memoryStore) Delivered(_ context.Context, session string, ids ...string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	is := s.sessions[session]
	if is == nil {
		return nil
	}
	for _, id := range ids {
		if l := is.out[id]; l != nil {
			l.removed = true
			delete(is.out, id)
			is.gone.add(id)
		}
	}
	if len(is.order) > 2*len(is.out)+64 {
		is.order = slices.DeleteFunc(is.order, func(l *letter) bool { return l.removed })
	}
	return nil
}

func (s *memoryStore) Buried(_ context.Context, session string) ([]Message, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	is := s.sessions[session]
	if is == nil {
		return nil, ErrGone
	}
	return is.some(len(is.out), func(l *letter) bool { return l.dead }), nil
}

func (s *memoryStore) Revive(_ context.Context, session string, ids ...string) error {
	if err := s.revive(session, ids); err != nil {
		return err
	}
	s.watched.Wake(session)
	return nil
}

func (s *memoryStore) revive(session string, ids []string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	is := s.sessions[session]
	if is == nil {
		return ErrGone
	}
	for _, id := range ids {
		if l := is.out[id]; l != nil && l.dead {
			l.dead, l.Attempts = false, 0
		}
	}
	return nil
}

func (s *memoryStore) Take(_ context.Context, session, id, answer string) ([]byte, bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	is := s.sessions[session]
	if is == nil {
		return nil, false, nil
	}
	c := is.req[id]
	if c == nil || c.taken && c.by != answer {
		return nil, false, nil
	}
	c.taken, c.by = true, answer
	return bytes.Clone(c.of), true, nil
}
