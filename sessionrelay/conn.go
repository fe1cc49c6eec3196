package sessionrelay

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/sessionlock/sessionlock/internal/bound"
)

// Conn is a session's home on this node, until it is disconnected, replaced by another
// connection, or the session ends. Safe for concurrent use.
type Conn struct {
	n       *Node
	session string
	id      string
	home    Home
	send    func(context.Context, Message) error
	base    context.Context //nolint:containedctx // for what goes on after it
	ctx     context.Context //nolint:containedctx // the connection's life
	cancel  context.CancelCauseFunc
	done    chan struct{}

	begun bool // it is registered; guarded by n.mu

	mu      sync.Mutex
	ready   bool // Connect has told of it
	ended   bool
	unwatch func()
	running chan struct{}   // closed when messages are not being forwarded any more; nil: they are not
	again   bool            // there may be more since
	acking  map[string]int  // ids that are being removed, and by how many
	acked   map[string]bool // those and what was removed since the fetch under way began
	skipped bool            // a message was fetched and not sent, because it is one of acked
	sending string          // id of the message that is being sent
	sent    chan struct{}   // closed when it has been
	awaited string          // id of the message whose acknowledgement is waited for; "": none is
	heard   chan struct{}   // closed when it comes
}

// watcher is the face of a store that tells of messages and moves.
type watcher interface {
	Watch(session string, changed func()) (stop func())
}

// start begins to forward what is there and what comes. Not ok: the node has ended.
func (c *Conn) start() (ok bool) {
	c.n.mu.Lock()
	c.begun = !c.n.closed
	c.n.mu.Unlock()
	if !c.begun {
		return false
	}
	c.mu.Lock()
	c.ready = true
	c.mu.Unlock()
	if w, ok := c.n.store.(watcher); ok {
		stop := w.Watch(c.session, c.kick)
		c.mu.Lock()
		ended := c.ended
		c.unwatch = stop
		c.mu.Unlock()
		if ended {
			stop()
		}
	}
	c.kick()
	return true
}

// Session returns the id of the session, which the client says when it comes back.
func (c *Conn) Session() string { return c.session }

// Done is closed when the Conn has ended: close the connection then.
func (c *Conn) Done() <-chan struct{} { return c.done }

// Err says why the Conn has ended: [ErrMoved], the client has another connection;
// [ErrGone], the session was removed or has timed out; [ErrClosed]; nil while it has
// not, and after Disconnect.
func (c *Conn) Err() error {
	if err := context.Cause(c.ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// Disconnect says that the connection is lost: the session is away from now on, unless
// it has moved already, and its messages wait. It does not wait for the store. Calling
// it again does nothing.
func (c *Conn) Disconnect() {
	first := make(chan bool, 1)
	if c.n.spawn(func() {
		if <-first {
			_ = c.deregister() // it has been told
		}
	}) {
		first <- c.end(context.Canceled)
	} // else the node is ending, and disconnects all that it has
}

// deregister gives up c's home, once what was sent over it has been counted.
func (c *Conn) deregister() error {
	defer c.n.forget(c)
	c.mu.Lock()
	running := c.running
	c.mu.Unlock()
	if running != nil {
		select {
		case <-running:
		case <-time.After(c.n.pause): // a send func that does not heed its context
		}
	}
	err := c.n.store.Deregister(c.base, c.session, c.id)
	if err != nil {
		c.n.failed(err)
	}
	if c.home != (Home{}) {
		c.n.emit(Event{Kind: EventDisconnected, Session: c.session, Home: c.home})
	}
	return err
}

// end ends c in this process, for the first reason only.
func (c *Conn) end(why error) (first bool) {
	c.mu.Lock()
	if c.ended {
		c.mu.Unlock()
		return false
	}
	c.ended = true
	unwatch := c.unwatch
	c.mu.Unlock()
	c.cancel(why)
	close(c.done)
	if !errors.Is(why, context.Canceled) && !errors.Is(why, ErrClosed) { // deregister does it, when nothing is under way
		c.n.forget(c)
	}
	if unwatch != nil {
		unwatch()
	}
	return true
}

// kick has messages forwarded: by whoever does it already, who then looks once more,
// or by a goroutine that ends when there are none. So a connection that nothing is
// sent to costs none.
func (c *Conn) kick() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.again = c.running != nil; c.again || c.ended || !c.ready {
		return
	}
	running := make(chan struct{})
	if c.n.spawn(func() { c.forward(running) }) {
		c.running = running
	}
}

func (c *Conn) forward(running chan struct{}) {
	over := false
	defer func() {
		if !over { // the send func has ended this goroutine
			c.n.spawn(func() {
				_ = bound.Sleep(c.ctx, c.n.pause)
				c.forward(running)
			})
		}
	}()
	for failures := 0; ; {
		err := c.round()
		if errors.Is(err, ErrMoved) || errors.Is(err, ErrGone) {
			c.end(cause(err))
		}
		if err != nil { // up to 16 pauses: a store that is down is asked by every connection
			pause := c.n.pause << min(failures, 4)
			if !errors.Is(err, errSend) { // and not by all at once
				pause -= mathrand.N(pause/10 + 1) //nolint:gosec // not a secret
			}
			_ = bound.Sleep(c.ctx, pause)
			failures++
		} else {
			failures = 0
		}
		c.mu.Lock()
		if c.ended || err == nil && !c.again {
			c.running, c.acked = nil, nil
			c.mu.Unlock()
			over = true
			close(running)
			return
		}
		c.again = false
		c.mu.Unlock()
	}
}

// cause is the sentinel by which c ends.
func cause(err error) error {
	if errors.Is(err, ErrMoved) {
		return ErrMoved
	}
	return ErrGone
}

// round forwards until there is nothing to be forwarded.
func (c *Conn) round() error {
	for c.ctx.Err() == nil {
		c.fetching()
		found, err := c.n.store.Fetch(c.ctx, c.session, c.id, c.n.batch)
		if err != nil || len(found) == 0 {
			return err
		}
		if found[0].Attempts >= c.n.attempts {
			if err := c.bury(found[0]); err != nil {
				return err
			}
			continue
		}
		if more, err := c.deliver(together(found)); err != nil || !more {
			return err
		}
		c.outlast(found[0])
	}
	return nil
}

// bury makes a dead letter of what was tried too often.
func (c *Conn) bury(m Message) error {
	if err := c.n.store.Bury(c.ctx, c.session, c.id, m.ID); err != nil {
		return err
	}
	c.n.emit(Event{Kind: EventDeadLetter, Session: c.session, Home: c.home, Message: m.ID})
	return nil
}

// together returns the messages that are sent at once: one that was tried before goes
// alone, for it may be what broke the connection.
func together(found []Message) []Message {
	for i, m := range found {
		if m.Attempts > 0 {
			return found[:max(i, 1)]
		}
	}
	return found
}

// deliver sends messages in order, up to the first that fails, and marks what it tried.
// Without more there is nothing to do before an acknowledgement has been stored, whose
// end kicks.
func (c *Conn) deliver(messages []Message) (more bool, err error) {
	var tried []string
	sent := false
	defer func() { // whatever the send func does: also when it is what ends the connection
		if len(tried) > 0 {
			err = errors.Join(c.n.store.Attempted(c.base, c.session, c.id, tried...), err)
		}
	}()
	for _, m := range messages {
		if c.ctx.Err() != nil {
			break
		}
		if !c.begin(m.ID) {
			continue
		}
		if m.Attempts == 0 {
			tried = append(tried, m.ID)
		} else if err = c.count(m.ID); err != nil {
			break
		}
		sent = true
		if failed := c.try(m); failed != nil {
			c.n.emit(Event{Kind: EventSendFailed, Session: c.session, Home: c.home, Message: m.ID, Err: failed})
			err = errSend
			break
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return sent || !c.skipped, err
}

// count stores an attempt before it is made: of a message that goes alone, which may be
// what kills its connection, and afterwards the session may have moved.
func (c *Conn) count(id string) error {
	err := c.n.store.Attempted(c.ctx, c.session, c.id, id)
	if err != nil {
		c.finish()
	}
	return err
}

// errSend is that a send func failed, whatever its own error is about.
var errSend = errors.New("send failed")

// outlast waits until a message that has been tried so often that it may be what kills
// its connections is acknowledged, or the connection has survived it for a pause: so it
// does not take those behind it along.
func (c *Conn) outlast(m Message) {
	if m.Attempts == 0 || m.Attempts < c.n.attempts/2 {
		return
	}
	c.mu.Lock()
	if c.acked[m.ID] {
		c.mu.Unlock()
		return
	}
	heard := make(chan struct{})
	c.awaited, c.heard = m.ID, heard
	c.mu.Unlock()
	select {
	case <-heard:
	case <-c.ctx.Done():
	case <-time.After(c.n.pause):
	}
	c.mu.Lock()
	c.awaited = ""
	c.mu.Unlock()
}

// fetching begins to note what is acknowledged: a message that was fetched before its
// acknowledgement came must not be sent after it, when the client has forgotten its id.
func (c *Conn) fetching() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.acked = map[string]bool{}
	for id := range c.acking {
		c.acked[id] = true
	}
}

// begin reports whether id is to be sent still.
func (c *Conn) begin(id string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.acked[id] {
		c.skipped = c.skipped || c.acking[id] > 0
		return false
	}
	c.sending, c.sent = id, make(chan struct{})
	return true
}

func (c *Conn) finish() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sending = ""
	close(c.sent)
}

// acknowledge has ids sent no more, and waits while one of them is. Call done when they
// are removed.
func (c *Conn) acknowledge(ctx context.Context, ids []string) (done func(), err error) {
	c.mu.Lock()
	if c.acking == nil {
		c.acking = map[string]int{}
	}
	for _, id := range ids {
		c.acking[id]++
		if c.acked != nil {
			c.acked[id] = true
		}
	}
	if c.awaited != "" && slices.Contains(ids, c.awaited) {
		close(c.heard)
		c.awaited = ""
	}
	var sent chan struct{}
	if slices.Contains(ids, c.sending) {
		sent = c.sent
	}
	c.mu.Unlock()
	done = func() {
		c.mu.Lock()
		for _, id := range ids {
			if c.acking[id]--; c.acking[id] == 0 {
				delete(c.acking, id)
			}
		}
		skipped := c.skipped
		c.skipped = false
		c.mu.Unlock()
		if skipped {
			c.kick()
		}
	}
	if sent == nil || ctx.Value(sendingKey{}) == c {
		return done, nil
	}
	select {
	case <-sent:
		return done, nil
	case <-ctx.Done():
		err = ctx.Err()
	case <-time.After(c.n.pause):
		err = ErrInProgress
	}
	done()
	return nil, about(c.session, err)
}

// sendingKey is of the Conn in whose send func a context is.
type sendingKey struct{}

// try sends one message. A panic of the application's func is its error.
func (c *Conn) try(m Message) (err error) {
	defer c.finish()
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("sessionrelay: the send func panicked with a %T", r)
			if c.n.logger != nil {
				c.n.logger.Error("sessionrelay: send func panicked", slog.Any("panic", r))
			}
		}
	}()
	return c.send(c.ctx, m)
}

// Receive processes a message from the client, once in effect: handle runs for the
// first delivery, and its reply is kept and returned for every other one until Forget,
// on any node. A nil and an empty reply differ. The id is the client's, of 1 to 256
// bytes, unique in the session.
//
// handle's context ends when the patience is over ([WithPatience]); then another
// delivery may be processed. If handle fails or panics the message counts as never
// received, and its error is returned: have the client send it again.
//
// Errors: handle's; [ErrInProgress] while another delivery is processed; [ErrTaken] if
// another one has taken over meanwhile, so that the effect may have happened twice;
// [ErrMoved] when the client has another connection, over which it sends the message
// again, or the Conn has ended; ErrGone, ErrUnavailable, ErrInvalid and ctx's.
// After ErrUnavailable have the client send it again: what was done is known, or, if
// its end could not be stored, done again when the patience is over.
func (c *Conn) Receive(ctx context.Context, id string, handle func(context.Context) (reply []byte, err error)) ([]byte, error) {
	if err := errors.Join(checkContext(ctx), checkID("message", id), checkFunc(handle == nil)); err != nil {
		return nil, err
	}
	if err := c.open(); err != nil {
		return nil, err
	}
	owner, deadline := rand.Text(), time.Now().Add(c.n.patience)
	claim, err := c.n.store.Accept(ctx, c.session, c.id, id, owner, c.n.patience)
	switch {
	case errors.Is(err, ErrMoved), errors.Is(err, ErrGone):
		c.end(cause(err))
		return nil, about(c.session, err)
	case err != nil: // it may be ours, and is free then sooner than after the patience
		c.n.spawn(func() { _ = c.n.store.Release(c.base, c.session, id, owner) })
		return nil, about(c.session, err)
	case claim.State == Done:
		return claim.Outcome, nil
	case claim.State == InProgress:
		return nil, about(c.session, ErrInProgress)
	}
	r := &received{conn: c, id: id}
	reply, err := c.process(context.WithValue(ctx, receivedKey{}, r), id, owner, deadline, handle)
	if err != nil {
		return nil, err
	}
	return reply, c.complete(ctx, id, owner, deadline, reply, r.answered())
}

// received is a message that is being processed; its handler's context carries it.
type received struct {
	conn *Conn
	id   string

	mu       sync.Mutex
	requests []string // that it answers
}

type receivedKey struct{}

func (r *received) answers(request string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.requests = append(r.requests, request)
}

func (r *received) answered() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.requests
}

// process runs handle, and gives the message up when that fails.
func (c *Conn) process(ctx context.Context, id, owner string, deadline time.Time, handle func(context.Context) ([]byte, error)) (reply []byte, err error) {
	finished := false
	defer func() {
		if err != nil || !finished {
			_ = c.n.store.Release(context.WithoutCancel(ctx), c.session, id, owner) // else it is free at the deadline
		}
	}()
	within, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	reply, err = handle(within)
	finished = true
	return reply, err
}

// complete stores the reply. The effect has happened, so the caller's context does not
// count any more, and a store in trouble is tried again to the deadline.
func (c *Conn) complete(ctx context.Context, id, owner string, deadline time.Time, reply []byte, answered []string) error {
	ctx = context.WithoutCancel(ctx)
	for pause := 50 * time.Millisecond; ; pause *= 2 {
		left := time.Until(deadline)
		err := c.n.store.Complete(ctx, c.session, id, owner, reply, answered...)
		if !errors.Is(err, ErrUnavailable) || left <= 0 {
			return about(c.session, err)
		}
		_ = bound.Sleep(ctx, min(pause, left))
	}
}

// open returns why c has ended.
func (c *Conn) open() error {
	select {
	case <-c.done:
		return about(c.session, ErrMoved)
	default:
		return nil
	}
}

// Acked removes messages that the client has (its ACK) from the outbox. Ids that are
// not there are no error. When it has returned nil none of them is sent over this Conn
// any more, so that the client may be told to forget them (ACK2); it waits for a send of
// one of them that is under way, unless ctx is that send func's, and gives up with
// [ErrInProgress] after the pause ([WithAttempts]). After an error do not tell it so: it
// acknowledges them again.
func (c *Conn) Acked(ctx context.Context, ids ...string) error {
	if err := errors.Join(checkContext(ctx), checkIDs("message", ids)); err != nil || len(ids) == 0 {
		return err
	}
	done, err := c.acknowledge(ctx, ids)
	if err != nil {
		return err
	}
	defer done()
	return about(c.session, c.n.store.Delivered(ctx, c.session, ids...))
}

// Forget removes messages from the inbox: the client has their replies (its ACK2) and
// will not send them again. Ids that are not there are no error.
func (c *Conn) Forget(ctx context.Context, ids ...string) error {
	if err := errors.Join(checkContext(ctx), checkIDs("message", ids)); err != nil || len(ids) == 0 {
		return err
	}
	return about(c.session, c.n.store.Forget(ctx, c.session, ids...))
}

// Answered returns what request id was about, to the first answer only: first is false
// for every other, and for a request that is not known. ctx is what [Conn.Receive] of
// this Conn has given the answer's handler, [ErrInvalid] otherwise: if that fails, the
// same answer is the first again when it comes again.
func (c *Conn) Answered(ctx context.Context, id string) (correlation []byte, first bool, err error) {
	if err := errors.Join(checkContext(ctx), checkID("message", id)); err != nil {
		return nil, false, err
	}
	r, _ := ctx.Value(receivedKey{}).(*received)
	if r == nil || r.conn != c {
		return nil, false, fmt.Errorf("%w: not the context of a handler of this Conn", ErrInvalid)
	}
	correlation, first, err = c.n.store.Take(ctx, c.session, id, r.id)
	if first {
		r.answers(id)
	}
	return correlation, first, about(c.session, err)
}
