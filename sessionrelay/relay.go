// Package sessionrelay gives a session that outlives its connections one home in a
// fleet of nodes, and delivers messages to it from any of them, once in effect.
//
//	store, err := sessionrelay.NewRedisStore(rdb, "node-7")
//	node, err := sessionrelay.New(store)
//	go node.Run(ctx)
//	…
//	conn, err := node.Connect(ctx, sessionrelay.Hello{Session: said.Session, User: user}, send) // a WebSocket came in
//	defer conn.Disconnect()
//	…
//	id, err := node.Send(ctx, session, payload) // from any node; kept until the client has it
//
// # Words
//
// A session belongs to a user and outlives its connections. Its home is the node and
// connection that it is connected by now; connecting elsewhere moves it. The outbox
// holds messages to the client until it has acknowledged them, the inbox the ids of
// messages from the client until it will not send them again.
//
// # Delivery
//
// Whoever sends keeps the message until the receiver has it, and the receiver
// remembers its id until the sender does not send it any more:
//
//	node                                client
//	Send: into the outbox ──message──▶  seen its id before? else process it
//	Conn.Acked: out of it  ◀───ack────  and remember the id
//	                       ────ack2──▶  forget the id
//
//	client                              node
//	keep the message       ──message──▶ Conn.Receive: claim its id, process it, keep the reply
//	                       ◀──reply───  (or the kept one, when it comes again)
//	drop the message       ────ack2──▶  Conn.Forget: forget the id
//
// The wire, and the client's half, are the application's. A client that has connected
// anew reads the old connection no more, and sends again over the new one what was not
// replied to; a node hands over to Receive, Acked and Forget in the order of the wire
// what is about one message. Messages of one session are
// sent in the order they were put. What was sent over a connection and not
// acknowledged is sent again over the next one, alone and before anything new. After
// ten attempts it is a dead letter, which an operator may read and revive.
//
// # States
//
//	session   none ──Connect──▶ connected ◀──Connect/Disconnect──▶ away
//	                               └────── Remove, timeout ──────────┴──▶ none
//	to the client    pending ──sent──▶ tried ──ack──▶ none
//	                    ▲                │ connected anew: pending; 10 times: dead letter
//	                    └────Revive──────┘
//	from the client  none ──Receive──▶ in progress ──▶ done ──Forget──▶ none
//	                    ▲                 │ failed: none; deadline over: may be taken over
//	                    └─────────────────┘
//
// # What can fail, and what happens then
//
//	step        fails by                    what follows
//	connect     session is another user's,  an error, and nothing has changed: neither the session, nor
//	            or one too many             its connection, nor its messages
//	connect     store unreachable           an error; if it was registered all the same, it is given up
//	connection  lost                        Disconnect: the session is away, its messages wait
//	connection  replaced by another         the old Conn ends with ErrMoved, as soon as it hears of it or
//	                                        touches the outbox: the store refuses it
//	node        dies                        its sessions seem connected until they connect elsewhere, or
//	                                        time out; a node of its name puts that right at its start
//	send        store unreachable           an error; it may have been stored
//	wake-up     lost                        found at the next one, or with the sign of life (54 s)
//	delivery    send func fails             counts as an attempt; 2.5 s later the rest is tried, and up to
//	                                        sixteen times later while failures follow one another
//	delivery    send func does not return   its context ends with the Conn: a move is found with the sign of
//	                                        life at the latest
//	delivery    not marked as tried         it is sent again; the client knows its id
//	delivery    kills the connection        counted: before it is sent, but for the first time, when it is
//	                                        counted after, unless the session has moved by then; from half of the
//	                                        attempts on the next message waits until this one is acknowledged,
//	                                        or was survived for 2.5 s
//	process     client has moved            ErrMoved: it is sent again over the new connection
//	process     func fails                  the message is as if it had never come
//	process     node dies in it             after the patience (30 s) the next delivery is processed: the
//	                                        effect may happen twice, unless the func makes it with the id
//	                                        in one transaction
//	process     longer than the patience    ErrTaken, if somebody else has taken it over meanwhile
//	store       fails over and loses the    what was lost was never sent, or is sent or processed again;
//	            last writes                 see WithReplicas
//	loops       store unreachable           logged, tried again at the next interval
package sessionrelay

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// The states an error can report; match with errors.Is.
var (
	// ErrWrongUser: the session is another user's. Nothing has changed.
	ErrWrongUser = errors.New("sessionrelay: the session is another user's")
	// ErrCap: the user has as many sessions as he may. Nothing has changed.
	ErrCap = errors.New("sessionrelay: the user has too many sessions")
	// ErrGone: there is no such session, or not any more.
	ErrGone = errors.New("sessionrelay: no such session")
	// ErrMoved: the session has another home by now, or none.
	ErrMoved = errors.New("sessionrelay: the session is not connected here any more")
	// ErrInProgress: the message is being processed, or sent; ask again later.
	ErrInProgress = errors.New("sessionrelay: the message is in progress")
	// ErrTaken: somebody else has taken over what this caller had accepted.
	ErrTaken = errors.New("sessionrelay: the message was taken over")
	// ErrUnavailable: the store could not be used, or not in time. What was asked may
	// have happened.
	ErrUnavailable = errors.New("sessionrelay: store unavailable")
	// ErrInvalid: an argument or option is wrong. Returned before any I/O.
	ErrInvalid = errors.New("sessionrelay: invalid argument")
	// ErrClosed: the node has ended: it connects nobody. Send goes on working.
	ErrClosed = errors.New("sessionrelay: node closed")
)

// Event is what a [Node] tells its observer.
type Event struct {
	Kind    string // one of the EventX constants
	Session string
	Home    Home   // of connections: which; else zero
	Message string // id of the message it is about, or ""
	Err     error  // of what failed
}

// The kinds of an [Event]. A session begins with connected, is reconnected any number
// of times, and ends with removed or timed out. A connection ends with disconnected, or
// untold, with the one that replaced it or with its session.
const (
	EventConnected    = "connected"    // a new session
	EventReconnected  = "reconnected"  // one that existed
	EventDisconnected = "disconnected" // it may come back
	EventRemoved      = "removed"      // by Remove
	EventTimedOut     = "timed_out"    // told by the one node that removed it
	EventDeadLetter   = "dead_letter"  // a message was tried too often
	EventSendFailed   = "send_failed"  // a connection's send func failed
	EventFailed       = "failed"       // one of Run's loops, for want of the store
)

// Node is one process's part: its connections, and the upkeep of all sessions. Make
// one with [New]; it is safe for concurrent use.
type Node struct {
	config
	store Store

	mu      sync.Mutex
	conns   map[string]*Conn // by connection id, those that are being registered too
	started bool
	closed  bool
	running sync.WaitGroup
}

// New returns a Node on s. It does no I/O and starts nothing: see [Node.Run].
// [ErrInvalid] for what is wrong with the arguments, all at once.
func New(s Store, opts ...Option) (*Node, error) {
	cfg, err := configure(s, opts)
	if err != nil {
		return nil, err
	}
	return &Node{config: cfg, store: s, conns: map[string]*Conn{}}, nil
}

// Connect makes a connection the home of its client's session, in place of any other,
// and starts to deliver its messages by send. With an empty h.Session a new one is
// made; a session that does not exist any more is [ErrGone]: the client has to start
// anew. The user must have been authenticated by the caller.
//
// send writes one message to the connection and returns; it is called from one goroutine
// at a time, with a context that ends with the Conn. It should have a deadline of its
// own: nothing else is sent meanwhile. An error counts as an attempt. Call
// [Conn.Disconnect] when the connection is lost.
//
// Errors: ErrGone, [ErrWrongUser], [ErrCap], [ErrUnavailable], [ErrInvalid],
// [ErrClosed], and ctx's error, wrapped. After any of them nothing is connected here.
func (n *Node) Connect(ctx context.Context, h Hello, send func(context.Context, Message) error) (*Conn, error) {
	if err := errors.Join(checkContext(ctx), checkHello(h), checkFunc(send == nil)); err != nil {
		return nil, err
	}
	kind := EventReconnected
	if h.Session == "" {
		kind, h.Session = EventConnected, rand.Text()
	} else if _, err := n.store.Lookup(ctx, h.Session); err != nil { // one that times out just now is made anew, and empty
		return nil, about(h.Session, err)
	}
	c := &Conn{n: n, session: h.Session, id: rand.Text(), send: send, done: make(chan struct{})}
	c.base = context.WithoutCancel(ctx)
	c.ctx, c.cancel = context.WithCancelCause(context.WithValue(c.base, sendingKey{}, c))
	if !n.add(c) {
		return nil, about(h.Session, ErrClosed)
	}
	info, before, err := n.store.Register(ctx, h, c.id, n.limit)
	if err != nil {
		c.end(err)
		if !slices.ContainsFunc([]error{ErrWrongUser, ErrCap, ErrMoved}, func(no error) bool { return errors.Is(err, no) }) {
			n.undo(c, kind)
		}
		return nil, about(h.Session, err)
	}
	c.home = info.Home
	n.emit(Event{Kind: kind, Session: c.session, Home: c.home})
	if old := n.conn(before.Conn); old != nil {
		old.end(ErrMoved)
	}
	if !c.start() { // the node has ended meanwhile
		c.end(ErrClosed)
		_ = c.deregister() // it has been told
		return nil, about(h.Session, ErrClosed)
	}
	return c, nil
}

// undo gives up what may have been registered though nobody heard of it: beside the
// caller, unless the node has ended. A session whose id nobody knows is of no use.
func (n *Node) undo(c *Conn, kind string) {
	undo := func() {
		if kind == EventConnected {
			if _, err := n.store.Remove(c.base, c.session); err != nil {
				n.failed(err)
			}
		}
		_ = c.deregister() // which also refuses what is still on its way
	}
	if !n.spawn(undo) {
		undo()
	}
}

// add enters c, unless the node has ended.
func (n *Node) add(c *Conn) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.closed {
		n.conns[c.id] = c
	}
	return !n.closed
}

func (n *Node) forget(c *Conn) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.conns, c.id)
}

func (n *Node) conn(id string) *Conn {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.conns[id]
}

// spawn runs f beside its caller; the end of Run waits for it. Not ok: the node has
// ended.
func (n *Node) spawn(f func()) (ok bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.closed {
		n.running.Go(f)
	}
	return !n.closed
}

// Send puts a message into the outbox of a session, connected anywhere or not at all,
// and returns its id. [ErrGone] if there is no such session. After [ErrUnavailable] it
// may have been put; to be able to put it again without having it twice, use
// [Outbox].Put with an id of your own.
func (n *Node) Send(ctx context.Context, session string, payload []byte) (id string, err error) {
	return n.put(ctx, session, Message{ID: rand.Text(), Payload: payload}, nil)
}

// Request is Send for a message that the client is to answer: correlation is what
// [Conn.Answered] returns then, on any node. Nil is kept as empty.
func (n *Node) Request(ctx context.Context, session string, payload, correlation []byte) (id string, err error) {
	if correlation == nil {
		correlation = []byte{}
	}
	return n.put(ctx, session, Message{ID: rand.Text(), Request: true, Payload: payload}, correlation)
}

func (n *Node) put(ctx context.Context, session string, m Message, correlation []byte) (string, error) {
	if err := errors.Join(checkContext(ctx), checkID("session", session)); err != nil {
		return "", err
	}
	if len(m.Payload)+len(correlation) > maxPayload {
		return "", fmt.Errorf("%w: message of %d bytes, more than %d", ErrInvalid, len(m.Payload)+len(correlation), maxPayload)
	}
	home, err := n.store.Put(ctx, session, m, correlation)
	if err != nil {
		return "", about(session, err)
	}
	if c := n.conn(home.Conn); c != nil {
		c.kick() // sooner than the wake-up
	} else if home.Node == n.name {
		n.spawn(func() { n.disown(Info{Session: session, Home: home}) }) //nolint:contextcheck // as above
	}
	return m.ID, nil
}

// disown corrects a home here that is none: a connection that this node has not got.
func (n *Node) disown(i Info) {
	if n.conn(i.Home.Conn) == nil {
		if err := n.store.Deregister(context.Background(), i.Session, i.Home.Conn); err != nil {
			n.failed(err)
		}
	}
}

// Remove ends a session for good, with all its messages; its connection, wherever it
// is, ends with [ErrGone]. A session that does not exist is no error.
func (n *Node) Remove(ctx context.Context, session string) error {
	if err := errors.Join(checkContext(ctx), checkID("session", session)); err != nil {
		return err
	}
	existed, err := n.store.Remove(ctx, session)
	if err != nil {
		return about(session, err)
	}
	n.gone(session)
	if existed {
		n.emit(Event{Kind: EventRemoved, Session: session})
	}
	return nil
}

// gone ends the connections that this node has of a session which does not exist.
func (n *Node) gone(sessions ...string) {
	for _, c := range n.all() {
		if slices.Contains(sessions, c.session) {
			c.end(ErrGone)
		}
	}
}

// all returns the connections that are registered.
func (n *Node) all() (conns []*Conn) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, c := range n.conns {
		if c.begun {
			conns = append(conns, c)
		}
	}
	return conns
}

// Run vouches for the node's sessions, removes those that timed out anywhere, and
// clears what is left of others, until ctx ends. Then it disconnects all its
// connections, which end with [ErrClosed], waits for what is under way, each call of
// the store bounded by that, and returns nil. [ErrInvalid] when it runs already or has
// ended. Nothing but the upkeep depends on it.
func (n *Node) Run(ctx context.Context) error {
	if err := checkContext(ctx); err != nil {
		return err
	}
	n.mu.Lock()
	again := n.started
	n.started = true
	n.mu.Unlock()
	if again {
		return fmt.Errorf("%w: the node runs already, or has ended", ErrInvalid)
	}
	if _, err := n.sweep(ctx); err != nil && ctx.Err() == nil { // a node of this name may have died
		n.failed(err)
	}
	var loops sync.WaitGroup
	loops.Go(func() { n.every(ctx, n.alive, n.vouch) })
	loops.Go(func() { n.every(ctx, n.expire, n.timeOut) })
	loops.Go(func() { n.every(ctx, n.scavenge, n.clear) })
	loops.Wait()
	n.shut()
	return nil
}

// every calls f at an interval that differs by up to a tenth between nodes, so that
// they do not meet.
func (n *Node) every(ctx context.Context, interval time.Duration, f func(context.Context) error) {
	tick := time.NewTicker(interval + mathrand.N(interval/10+1)) //nolint:gosec // not a secret
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if err := f(ctx); err != nil && ctx.Err() == nil {
			n.failed(err)
		}
	}
}

// vouch is the sign of life of all sessions that are connected here. It also finds
// what a lost wake-up would have told.
func (n *Node) vouch(ctx context.Context) error {
	conns := n.all()
	sessions := make([]string, len(conns))
	for i, c := range conns {
		sessions[i] = c.session
	}
	unknown, err := n.store.Alive(ctx, sessions)
	if err != nil {
		return err
	}
	n.gone(unknown...)
	for _, c := range conns {
		c.kick()
	}
	homed, err := n.sweep(ctx)
	if err != nil {
		return err
	}
	for _, c := range conns {
		if !homed[c.id] { // as far as the store's index knows
			switch i, err := n.store.Lookup(ctx, c.session); {
			case errors.Is(err, ErrUnavailable):
				return err // the others would fail likewise
			case err == nil && i.Home.Conn != c.id:
				c.end(ErrMoved)
			}
		}
	}
	return nil
}

// sweep disowns the sessions whose home is a connection that is lost, and returns the
// connections that are homes here.
func (n *Node) sweep(ctx context.Context) (conns map[string]bool, err error) {
	homed, err := n.store.Homed(ctx)
	conns = make(map[string]bool, len(homed))
	for _, i := range homed {
		if ctx.Err() != nil {
			return conns, ctx.Err()
		}
		conns[i.Home.Conn] = true
		n.disown(i) //nolint:contextcheck // what is begun is finished
	}
	return conns, err
}

func (n *Node) timeOut(ctx context.Context) error {
	expired, err := n.store.Expire(ctx, n.timeout)
	for _, session := range expired {
		n.emit(Event{Kind: EventTimedOut, Session: session})
	}
	n.gone(expired...)
	return err
}

func (n *Node) clear(ctx context.Context) error {
	_, err := n.store.Scavenge(ctx)
	return err
}

// shut disconnects all that is connected here.
func (n *Node) shut() {
	n.mu.Lock()
	n.closed = true
	n.mu.Unlock()
	var ended []*Conn
	for _, c := range n.all() {
		if c.end(ErrClosed) {
			ended = append(ended, c)
		}
	}
	var all sync.WaitGroup
	var failed atomic.Int64
	turns := make(chan struct{}, parallel)
	for _, c := range ended {
		turns <- struct{}{}
		if failed.Load() > 2*parallel { // a store that is down; they time out, unless a node of this name comes first
			break
		}
		all.Go(func() {
			defer func() { <-turns }()
			if c.deregister() != nil {
				failed.Add(1)
			}
		})
	}
	all.Wait()
	n.running.Wait()
	if s, ok := n.store.(interface{ Close() }); ok {
		s.Close()
	}
}

func (n *Node) failed(err error) {
	n.emit(Event{Kind: EventFailed, Err: err})
	if n.logger != nil {
		n.logger.Warn("sessionrelay: upkeep failed", slog.Any("err", err))
	}
}

// emit tells the observer; what it does wrong is no business of ours.
func (n *Node) emit(e Event) {
	if n.observer == nil {
		return
	}
	defer func() { _ = recover() }()
	n.observer(e)
}

// about names the session an error is about, by a short mark: ids are half a secret.
func about(session string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("session %s…: %w", session[:min(4, len(session)/2)], err)
}

func checkContext(ctx context.Context) error {
	if ctx == nil {
		return fmt.Errorf("%w: context is nil", ErrInvalid)
	}
	return nil
}

func checkFunc(missing bool) error {
	if missing {
		return fmt.Errorf("%w: func is nil", ErrInvalid)
	}
	return nil
}

func checkHello(h Hello) error {
	errs := []error{checkID("user", h.User)}
	if h.Session != "" {
		errs = append(errs, checkID("session", h.Session))
	}
	for name, value := range map[string]string{"lib": h.Lib, "app": h.App, "version": h.Version} {
		if len(value) > maxID {
			errs = append(errs, fmt.Errorf("%w: %s has more than %d bytes", ErrInvalid, name, maxID))
		}
	}
	return errors.Join(errs...)
}

func checkID(what, id string) error {
	switch {
	case strings.TrimSpace(id) == "":
		return fmt.Errorf("%w: %s is blank", ErrInvalid, what)
	case len(id) > maxID:
		return fmt.Errorf("%w: %s has more than %d bytes", ErrInvalid, what, maxID)
	}
	return nil
}

func checkIDs(what string, ids []string) error {
	for _, id := range ids {
		if err := checkID(what, id); err != nil {
			return err
		}
	}
	return nil
}
