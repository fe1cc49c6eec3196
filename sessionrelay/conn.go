package sessionrelay

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"
)

// Conn is a session's home on this node, until it is disconnected, replaced by another
// connection, or the session ends. Safe for concurrent use.
type Conn struct {
	n       *Node
	session string
	id      string
	home    Home
	send    func(context.Context, Message) error
	ctx     context.Context //nolint:containedctx // the connection's life
	cancel  context.CancelCauseFunc
	done    chan struct{}

	begun bool // it is registered; guarded by n.mu

	mu      sync.Mutex
	ended   bool
	unwatch func()
	running bool // messages are being forwarded
	again   bool // there may be more since
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
	if c.end(context.Canceled) {
		c.leave()
	}
}

// leave deregisters c beside its caller.
func (c *Conn) leave() { c.n.spawn(c.deregister) }

func (c *Conn) deregister() {
	if err := c.n.store.Deregister(context.Background(), c.session, c.id); err != nil {
		c.n.failed(err)
	}
	if c.home != (Home{}) {
		c.n.emit(Event{Kind: EventDisconnected, Session: c.session, Home: c.home})
	}
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
	c.n.mu.Lock()
	delete(c.n.conns, c.id)
	c.n.mu.Unlock()
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
	if c.again = c.running; c.running || c.ended {
		return
	}
	c.running = c.n.spawn(c.forward)
}

func (c *Conn) forward() {
	for failures := 0; ; {
		err := c.round()
		if errors.Is(err, ErrMoved) || errors.Is(err, ErrGone) {
			c.end(cause(err))
		}
		if err != nil { // up to 16 pauses: a store that is down is asked by every connection
			sleep(c.ctx, c.n.pause<<min(failures, 4))
			failures++
		} else {
			failures = 0
		}
		c.mu.Lock()
		if c.ended || err == nil && !c.again {
			c.running = false
			c.mu.Unlock()
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
	for {
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
		if err := c.deliver(together(found)); err != nil {
			return err
		}
	}
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
func (c *Conn) deliver(messages []Message) (err error) {
	var tried []string
	for _, m := range messages {
		if c.ctx.Err() != nil {
			break
		}
		tried = append(tried, m.ID)
		if err = c.try(m); err != nil {
			c.n.emit(Event{Kind: EventSendFailed, Session: c.session, Home: c.home, Message: m.ID, Err: err})
			break
		}
	}
	return errors.Join(c.n.store.Attempted(c.ctx, c.session, c.id, tried...), err)
}

// try sends one message. A panic of the application's func is its error.
func (c *Conn) try(m Message) (err error) {
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
// ErrMoved after the Conn has ended; ErrGone, ErrUnavailable, ErrInvalid and ctx's.
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
	claim, err := c.n.store.Accept(ctx, c.session, id, owner, c.n.patience)
	switch {
	case err != nil:
		return nil, about(c.session, err)
	case claim.State == Done:
		return claim.Outcome, nil
	case claim.State == InProgress:
		return nil, about(c.session, ErrInProgress)
	}
	reply, err := c.process(ctx, id, owner, deadline, handle)
	if err != nil {
		return nil, err
	}
	return reply, c.complete(ctx, id, owner, deadline, reply)
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
func (c *Conn) complete(ctx context.Context, id, owner string, deadline time.Time, reply []byte) error {
	ctx = context.WithoutCancel(ctx)
	for pause := 50 * time.Millisecond; ; pause *= 2 {
		err := c.n.store.Complete(ctx, c.session, id, owner, reply)
		if !errors.Is(err, ErrUnavailable) || time.Now().Add(pause).After(deadline) {
			return about(c.session, err)
		}
		sleep(ctx, pause)
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
// not there are no error.
func (c *Conn) Acked(ctx context.Context, ids ...string) error {
	if err := errors.Join(checkContext(ctx), checkIDs("message", ids)); err != nil || len(ids) == 0 {
		return err
	}
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
// for every other, and for a request that is not known. Call it inside [Conn.Receive] of
// the answer.
func (c *Conn) Answered(ctx context.Context, id string) (correlation []byte, first bool, err error) {
	if err := errors.Join(checkContext(ctx), checkID("message", id)); err != nil {
		return nil, false, err
	}
	correlation, first, err = c.n.store.Take(ctx, c.session, id)
	return correlation, first, about(c.session, err)
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
