// scope.go pins one session across several calls. It is kept beside client.go
// because it adds nothing to the algorithm: it decides which session a Do runs
// with, and what becomes of that session at the end.

package sessionlock

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"time"
)

// Scope is one session held across several calls, for upstreams that keep state
// in it: global fields, a found set, a transaction. [Client.Scope] makes it.
//
//	none ──Do──▶ pinned ──rejected──▶ renewed, and pinned
//	 ▲              │                    │
//	 └── renewal failed, its end is over ┘        end: touched, or ended if an orphan
//
// Its Do may be called from several goroutines at once; they share the session.
type Scope struct {
	c     *Client
	key   func() string // as in core, so that no printer finds it
	outer *Scope        // that the context already carried, of other keys

	turn   chan struct{}           // taken by who finds or sets up the session
	pinned atomic.Pointer[Session] // nil: none. Set by whose turn it is, and unset by who finds it rejected
	used   time.Time               // when the fleet was last told that the session is in use; of whose turn it is

	setUp atomic.Pointer[setUp]
	over  atomic.Bool
}

// setUp is what SetUp was given.
type setUp struct {
	f     func(context.Context, Session) error
	ready uint64 // the generation it has set up; of whose turn it is
}

type (
	scopeKey struct{}
	setUpKey struct{ *Scope } // of a context inside its SetUp
)

// Scope runs fn with a scope of key: one session for several calls of
// [Scope.Do]. Errors are fn's, and those of [Client.Session] when there is no
// session to begin with; then fn is not run.
//
// When fn has returned, or panicked, the scope ends, beside its caller;
// [Client.Close] waits for that. With [WithIdleTTL] the session that the fleet
// shares lives on from now, and one whose idle life was over is given to
// [WithLogout]; so is one that the store does not know, because it has lost it or
// never kept it.
//
// A scope inside a scope of the same key, by the context that fn was given, is
// the same scope: only the outermost ends it, and a SetUp replaces its.
func (c *Client) Scope(ctx context.Context, key string, fn func(context.Context, *Scope) error) error {
	if err := errors.Join(checkContext(ctx), checkKey(key)); err != nil {
		return err
	}
	if fn == nil {
		return fmt.Errorf("%w: func is nil", ErrInvalid)
	}
	if sc := scopeIn(ctx, c, key); sc != nil {
		if err := sc.reentered(ctx); err != nil {
			return err
		}
		if sc.open(ctx) == nil {
			return fn(ctx, sc)
		}
	}
	outer, _ := ctx.Value(scopeKey{}).(*Scope)
	sc := &Scope{c: c, key: func() string { return key }, outer: outer, turn: make(chan struct{}, 1)}
	if _, err := sc.find(ctx); err != nil {
		return err
	}
	defer sc.end()
	return fn(context.WithValue(ctx, scopeKey{}, sc), sc)
}

// scopeIn returns the innermost scope of key that ctx carries and that is not over.
func scopeIn(ctx context.Context, c *Client, key string) *Scope {
	sc, _ := ctx.Value(scopeKey{}).(*Scope)
	for sc != nil && (sc.c != c || sc.key() != key || sc.over.Load()) {
		sc = sc.outer
	}
	return sc
}

// Format writes a fixed word whatever the verb: a scope holds a session.
func (sc *Scope) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "[sessionlock scope]") }

// SetUp has f run once with each session that the scope comes to use, before
// what Do runs: state that the upstream keeps per session is lost with it. Call it
// before the first Do; nil means none. An error of f is the error of the Do, and a
// rejection in it is repaired like one of Do's own func. f must use the session and
// the context it is given: a Do of the scope under that is [ErrReentrant], and under
// any other context waits for f to return, which waits for the Do.
func (sc *Scope) SetUp(f func(ctx context.Context, s Session) error) { sc.setUp.Store(&setUp{f: f}) }

// Do is [Client.Do] with the scope's session, which stays pinned until it is
// rejected or its Expiry is over. Then the scope goes on with another; when there
// is none to be had, the next Do tries again. [ErrInvalid] after the scope's end.
func (sc *Scope) Do(ctx context.Context, fn func(context.Context, Session) error) error {
	if err := errors.Join(checkContext(ctx), checkFunc(fn)); err != nil {
		return err
	}
	if err := sc.reentered(ctx); err != nil {
		return err
	}
	s, err := sc.find(ctx)
	if err != nil {
		return err
	}
	return sc.c.run(ctx, s, func(ctx context.Context, s Session) error {
		if err := sc.prepare(ctx, s); err != nil {
			return err
		}
		return fn(ctx, s)
	}, sc)
}

// reentered reports, as ErrReentrant, that ctx is of a func for which whoever has
// the turn waits.
func (sc *Scope) reentered(ctx context.Context) error {
	if ctx.Value(setUpKey{sc}) == nil && !insideLogin(ctx, sc.c, sc.key()) {
		return nil
	}
	return fmt.Errorf("%w: the scope of %s inside its SetUp or login", ErrReentrant, sc.c.KeyID(sc.key()))
}

// open takes the turn and gives it back, to see that the scope is not over.
func (sc *Scope) open(ctx context.Context) error {
	err := sc.take(ctx)
	if err == nil {
		<-sc.turn
	}
	return err
}

// take waits for the turn. Give it back by receiving from it.
func (sc *Scope) take(ctx context.Context) error {
	ended := func() error { return fmt.Errorf("%w: the scope of %s has ended", ErrInvalid, sc.c.KeyID(sc.key())) }
	switch {
	case sc.over.Load():
		return ended()
	case ctx.Err() != nil: // select would choose at random
		return gone(ctx, sc.c.KeyID(sc.key()))
	}
	select {
	case sc.turn <- struct{}{}:
	case <-ctx.Done():
		return gone(ctx, sc.c.KeyID(sc.key()))
	}
	if sc.over.Load() {
		<-sc.turn
		return ended()
	}
	return nil
}

// find returns the pinned session, or pins the client's.
func (sc *Scope) find(ctx context.Context) (Session, error) {
	return sc.pin(ctx, rejection{}, func() (Session, error) { return sc.c.Session(ctx, sc.key()) })
}

// session is what a rejection leads to: another caller of the scope may have pinned
// a newer session already.
func (sc *Scope) session(ctx context.Context, key string, no rejection) (Session, error) {
	return sc.pin(ctx, no, func() (Session, error) { return sc.c.session(ctx, key, no) })
}

// condemn is the client's, and unpins s: after it, or it would be found again.
func (sc *Scope) condemn(ctx context.Context, s Session) {
	sc.c.condemn(ctx, s)
	if p := sc.pinned.Load(); p != nil && p.Generation() == s.Generation() {
		sc.pinned.CompareAndSwap(p, nil)
	}
}

// pin returns the pinned session if it will do, else what other brings, and pins it.
func (sc *Scope) pin(ctx context.Context, no rejection, other func() (Session, error)) (Session, error) {
	if err := sc.take(ctx); err != nil {
		return Session{}, err
	}
	defer func() { <-sc.turn }()
	if p := sc.pinned.Load(); p != nil && no.allows(*p) && (p.Expiry.IsZero() || time.Now().Before(p.Expiry)) {
		sc.touch(*p)
		return *p, nil
	}
	s, err := other()
	if err != nil {
		sc.pinned.Store(nil)
		return Session{}, err
	}
	sc.pinned.Store(&s)
	return s, nil
}

// touch tells the fleet that s is in use, as near hits do.
func (sc *Scope) touch(s Session) {
	c := sc.c
	if c.idle == 0 || time.Since(sc.used) < c.idle/10 {
		return
	}
	sc.used = time.Now()
	name := s.inside().name
	c.spawn(func() {
		if seen, err := c.store.load(c.base, name); err == nil {
			_, _ = c.touch(c.base, name, seen, s.Generation())
		}
	})
}

// errReplaced is the first error of a Do whose session another caller of the scope
// found rejected before this one could use it.
var errReplaced = errors.New("sessionlock: the scope has another session by now")

// prepare sets s up unless that was done.
func (sc *Scope) prepare(ctx context.Context, s Session) error {
	if err := sc.take(ctx); err != nil {
		return err
	}
	defer func() { <-sc.turn }()
	u, p := sc.setUp.Load(), sc.pinned.Load()
	switch {
	case u == nil, u.f == nil, u.ready == s.Generation():
		return nil
	case p == nil, p.Generation() != s.Generation():
		return Reject(errReplaced)
	}
	if err := u.f(context.WithValue(ctx, setUpKey{sc}, s), s); err != nil {
		return err
	}
	u.ready = s.Generation()
	return nil
}

// end closes the scope; its func has returned, but what that started may not have.
// Close does not wait for the latter.
func (sc *Scope) end() {
	c := sc.c
	sc.over.Store(true)
	c.spawn(func() {
		select {
		case sc.turn <- struct{}{}:
		default: // after what is free: select would choose at random
			select {
			case sc.turn <- struct{}{}:
			case <-c.drain.Done():
				return
			}
		}
		s := sc.pinned.Load()
		<-sc.turn
		if s != nil {
			c.endScope(c.base, c.near.LoadOrNew(s.Key()), *s)
		}
	})
}
