// leader.go is what a leader does between its lock and its commit, kept beside
// client.go so that the algorithm there stays one page: the heartbeat, the login
// itself, what makes a login's session fit to be shared, and how sessions that
// nobody will use are ended.

package sessionlock

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"strings"
	"time"

	"github.com/sessionlock/sessionlock/internal/entry"
	"github.com/sessionlock/sessionlock/internal/record"
)

const (
	maxToken  = 16 << 10
	maxValues = 32
	maxValue  = 1 << 10 // name included
	maxShared = 24 * time.Hour

	// answerGrace is how long past its timeout a login may take to say why it
	// ended: a dial error then is not an unknown outcome.
	answerGrace = 100 * time.Millisecond
	// farthest bounds an Expiry: a Duration counts 292 years.
	farthest = 250 * 365 * 24 * time.Hour
	// grace is how long requests may still use a session that was displaced, or
	// that only this process has, before it is logged out.
	grace = 30 * time.Second
)

// heartbeat extends lock and lease at a third of their life until stop is
// called, which waits for it. A lock found lost is reported once and the login
// goes on: commit decides.
func (c *Client) heartbeat(ctx context.Context, l *local, held *lease) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	over := make(chan struct{})
	go func() {
		defer close(over)
		for reported := false; sleep(ctx, c.lockTTL/3) == nil; {
			err := c.store.renew(ctx, held)
			if errors.Is(err, ErrNotHeld) && !reported {
				reported = true
				c.emit(ctx, Event{Kind: EventLockLost, KeyID: l.id, Generation: held.gen, Err: err})
			}
		}
	}()
	return func() {
		cancel()
		<-over
	}
}

// PanicError is the cause inside a [*LoginError] when a Login panicked, or ended
// its goroutine: then Value is nil.
type PanicError struct {
	Value any    // what it panicked with
	Stack []byte // of the panic
}

// Error does not print the value, which may be anything.
func (e *PanicError) Error() string {
	if e.Value == nil {
		return "login ended its goroutine (runtime.Goexit)"
	}
	return fmt.Sprintf("panic with a value of type %T", e.Value)
}

// protect turns a panic of f into an error.
func protect[T any](f func() (T, error)) (v T, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = &PanicError{Value: r, Stack: debug.Stack()}
		}
	}()
	return f()
}

// login makes the login in a goroutine of its own and says, when it fails, in
// which class and for how long the upstream wants to be left alone. A login that
// does not return is left behind: this process sends no other for the key until
// it has, and ends the session that it may still bring.
func (c *Client) login(ctx context.Context, l *local, p place) (s Session, class entry.Class, pause time.Duration, err error) {
	type result struct {
		s   Session
		err error
	}
	var reached reach
	ctx, cancel := context.WithTimeout(reached.watch(withLogin(ctx, c, l.key)), c.loginTimeout)
	done, ended := make(chan result, 1), make(chan struct{})
	go func() {
		var r result
		returned := false
		defer func() {
			if !returned {
				r.err = &PanicError{Stack: debug.Stack()}
			}
			cancel()
			done <- r
			close(ended)
		}()
		r.s, r.err = protect(func() (Session, error) { return c.auth.Login(ctx, l.key) })
		returned = true
	}()
	late := time.NewTimer(c.loginTimeout + answerGrace)
	defer late.Stop()
	select {
	case r := <-done:
		if r.err == nil {
			return r.s, entry.None, 0, nil
		}
		c.endReturned(p, r.s)
		class, pause = classify(r.err, &reached)
		return Session{}, class, pause, r.err
	case <-late.C:
		l.leaveBehind(ended)
		go func() {
			if r := <-done; c.enter() {
				c.endReturned(p, r.s)
				c.running.Done()
			}
		}()
		return Session{}, entry.Unknown, 0, fmt.Errorf("login did not return within %v: %w", c.loginTimeout, context.DeadlineExceeded)
	}
}

// accept makes of what a login returned the session of generation gen and the
// result to commit; or, when it cannot be used, ErrIncomplete and a failure.
func (c *Client) accept(p place, gen uint64, got Session) (Session, entry.Result, error) {
	s, stored, err := c.fit(p, gen, got)
	if err != nil {
		c.endReturned(p, got)
		return Session{}, entry.Result{Class: entry.Unknown}, err
	}
	return s, entry.Result{Session: stored}, nil
}

func (c *Client) fit(p place, gen uint64, got Session) (Session, entry.Session, error) {
	values := got.inside().values
	s := Session{Token: got.Token, Expiry: got.Expiry}.with(meta{values: values, key: p.binding.Key, gen: gen, name: p.entry, client: c})
	content := record.Content{Token: s.Token.Reveal(), Values: map[string]string{}}
	for name, v := range values {
		content.Values[name] = v.Reveal()
	}
	if err := checkContent(content); err != nil {
		return Session{}, entry.Session{}, err
	}
	if k := got.Key(); k != "" && k != s.Key() {
		return Session{}, entry.Session{}, incomplete("it belongs to another key")
	}
	now := c.store.now()
	life := c.maxAge
	stored := entry.Session{}
	if !s.Expiry.IsZero() {
		stored.End = min(c.store.clock.toStore(s.Expiry), now.Add(farthest))
		content.Expiry = int64(stored.End)
		life = stored.End.Sub(now)
		life -= min(c.margin, life/4)
	}
	if life <= 0 {
		if s.Expiry.IsZero() {
			return Session{}, stored, incomplete("no expiry, and WithMaxAge is 0")
		}
		return Session{}, stored, incomplete("expired")
	}
	stored.Expires = now.Add(min(life, maxShared))
	b := p.binding
	b.Gen = gen
	if stored.Record = record.Encode(b, content); len(stored.Record) > entry.MaxRecord {
		return Session{}, stored, incomplete("larger than 32 KiB")
	}
	return s, stored, c.completes(s)
}

func checkContent(content record.Content) error {
	switch t := content.Token; {
	case strings.TrimSpace(t) == "":
		return incomplete("no token")
	case len(t) > maxToken:
		return incomplete("token over 16 KiB")
	case strings.ContainsFunc(t, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return incomplete("control characters in the token")
	case len(content.Values) > maxValues:
		return incomplete("more than 32 values")
	}
	for name, v := range content.Values {
		if len(name)+len(v) > maxValue {
			return incomplete("a value over 1 KiB")
		}
	}
	return nil
}

func incomplete(why string) error { return fmt.Errorf("%w: %s", ErrIncomplete, why) }

// open reads a stored session. The error says why it is as good as rejected, so
// that somebody logs in again and replaces it: there is none, its record was
// written for another place, or it lacks what WithComplete wants.
func (c *Client) open(p place, stored entry.Session) (Session, error) {
	b := p.binding
	b.Gen = stored.Gen
	content, err := record.Decode(b, stored.Record)
	if err != nil {
		return Session{}, err
	}
	if err := checkContent(content); err != nil {
		return Session{}, err
	}
	m := meta{key: b.Key, gen: b.Gen, name: p.entry, client: c}
	s := Session{Token: NewToken(content.Token)}
	if content.Expiry != 0 {
		s.Expiry = c.store.clock.toLocal(entry.Time(content.Expiry))
	}
	if len(content.Values) > 0 {
		m.values = make(map[string]Token, len(content.Values))
		for name, v := range content.Values {
			m.values[name] = NewToken(v)
		}
	}
	s = s.with(m)
	return s, c.completes(s)
}

// completes asks WithComplete.
func (c *Client) completes(s Session) error {
	if c.complete == nil {
		return nil
	}
	ok, err := protect(func() (bool, error) { return c.complete(s), nil })
	if err != nil {
		return fmt.Errorf("%w: %w", incomplete("WithComplete failed"), err)
	}
	if !ok {
		return incomplete("refused by WithComplete")
	}
	return nil
}

// loginFailed reports a login that gave no session.
func (c *Client) loginFailed(ctx context.Context, l *local, e Event, now entry.Entry, class entry.Class, cause error) error {
	failed := c.loginError(l, now, entry.Failure{Class: class}, cause)
	if e.Kind = EventLoginUnknown; class == entry.Denied {
		e.Kind = EventLoginDenied
	} else if class == entry.Deferred {
		e.Kind = EventLoginDeferred
	}
	if why := c.store.rules.Suppression(now, c.store.now()); c.store.now() < why.Until {
		failed.Until = c.store.clock.toLocal(why.Until)
	}
	e.Err = failed
	c.emit(ctx, e)
	return failed
}

// suppressed reports that no login is sent because logins fail.
func (c *Client) suppressed(ctx context.Context, l *local, e entry.Entry) error {
	why := c.store.rules.Suppression(e, c.store.now())
	cause := ErrSuppressed
	if why.Class == entry.Rejected {
		cause = fmt.Errorf("%w: %w", ErrSuppressed, ErrRejected)
	}
	err := c.loginError(l, e, why, cause)
	c.emit(ctx, Event{Kind: EventSuppressed, KeyID: l.id, Generation: e.Gen, Err: err})
	return err
}

func (c *Client) loginError(l *local, e entry.Entry, why entry.Failure, cause error) *LoginError {
	err := &LoginError{Class: loginClass(why.Class), Attempts: int(e.Attempts), Err: cause, id: l.id}
	if why.Until != 0 {
		err.Until = c.store.clock.toLocal(why.Until)
	}
	return err
}

func loginClass(class entry.Class) LoginClass {
	switch class {
	case entry.Denied:
		return LoginDenied
	case entry.Deferred, entry.Rejected, entry.NotSent:
		return LoginDeferred
	case entry.Unknown:
		return LoginUnknown
	case entry.None:
	}
	return 0
}

// Sessions that nobody will use (rule R5). None of these is called for a session
// that was rejected, nor for one whose token the stored session has too.

// endOrphan ends own, which was overtaken before it was stored.
func (c *Client) endOrphan(own, stored Session) {
	if !own.Token.equal(stored.Token) {
		c.background(func(ctx context.Context) { _ = c.logOut(ctx, own) })
	}
}

// endReturned ends what a login returned and what is not fit to be stored. One
// that a client has given out is somebody's, of another key perhaps, and lives.
func (c *Client) endReturned(p place, s Session) {
	m := s.inside()
	if s.Token.p == nil || m.gen != 0 {
		return
	}
	c.endUnlessStored(p, s.with(meta{values: m.values, key: p.binding.Key, client: c}), 0)
}

// endDisplaced ends, after a grace, the session that now replaced, unless that
// happened because the old one had been rejected.
func (c *Client) endDisplaced(l *local, a *attempt, p place, old entry.Session, now Session) {
	s, bad := c.open(p, old)
	if bad != nil || s.Token.equal(now.Token) || !a.no.allows(s) || old.Gen <= l.dead(p.entry) {
		return
	}
	c.background(func(ctx context.Context) {
		c.pass(grace)
		_ = c.logOut(ctx, s)
	})
}

// endUnlessStored ends s after a while, unless the stored session has its token:
// a commit that was not answered may have been executed all the same, and an
// upstream may return one token twice. When the entry cannot be asked the session
// is left to its upstream's own end.
func (c *Client) endUnlessStored(p place, s Session, after time.Duration) {
	c.background(func(ctx context.Context) {
		c.pass(after)
		seen, err := c.store.load(ctx, p.entry)
		if err != nil {
			return
		}
		if stored, bad := c.open(p, seen.entry.Session); bad != nil || !s.Token.equal(stored.Token) {
			_ = c.logOut(ctx, s)
		}
	})
}

// pass lets d pass, until requests that use a session may be over; Close does not
// wait for them.
func (c *Client) pass(d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-c.drain.Done():
	}
}

// logOut calls WithLogout's func for s.
func (c *Client) logOut(ctx context.Context, s Session) error {
	if c.logout == nil {
		return nil
	}
	e := Event{Kind: EventEnded, KeyID: c.KeyID(s.Key()), Generation: s.Generation(), Start: time.Now()}
	ctx, cancel := context.WithTimeout(ctx, c.loginTimeout)
	defer cancel()
	_, e.Err = protect(func() (struct{}, error) { return struct{}{}, c.logout(ctx, s) })
	if e.Err != nil {
		e.Err = &quietError{"sessionlock: log out " + e.KeyID, e.Err}
	}
	c.emit(ctx, e)
	return e.Err
}

// background runs f, for as long as something else of this client runs when it
// is called; Close waits for it.
func (c *Client) background(f func(context.Context)) {
	if c.logout == nil {
		return
	}
	c.running.Add(1)
	go func() {
		defer c.running.Done()
		f(c.base)
	}()
}
