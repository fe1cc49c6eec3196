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

	"github.com/sessionlock/sessionlock/internal/bound"
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
// goes on: commit decides. When the attempt is found closed, by a Put or a Logout
// for instance, who comes from then on does not wait for it.
func (c *Client) heartbeat(ctx context.Context, l *local, a *attempt) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	over := make(chan struct{})
	go func() {
		defer close(over)
		for reported := false; bound.Sleep(ctx, c.lockTTL/3) == nil; {
			open, err := c.store.renew(ctx, a.lease)
			if !open && errors.Is(err, ErrNotHeld) {
				l.forsake(a)
			}
			if errors.Is(err, ErrNotHeld) && !reported {
				reported = true
				c.emit(ctx, Event{Kind: EventLockLost, KeyID: l.id, Generation: a.lease.gen, Err: err})
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

// outcome is what a leader brings from the upstream: a session, or why there is
// none, in which class, and for how long the upstream wants to be left alone.
type outcome struct {
	session   Session
	refreshed bool // by WithRefresh alone: no login was sent
	denied    bool // it was; and no login may follow, for it would end the session
	class     entry.Class
	pause     time.Duration
	err       error
}

// event is how an attempt that ended so is reported.
func (out outcome) event(class entry.Class) string {
	switch {
	case out.err == nil && out.refreshed:
		return EventRefreshed
	case out.err == nil:
		return EventLoginOK
	}
	return loginEvent(class)
}

// source is what a leader starts from.
type source struct {
	place
	gen   uint64     // of what it brings
	no    rejection  // what it must not bring again
	old   Session    // to be refreshed; zero: log in
	until entry.Time // before it old is good to those who have not seen it rejected; 0: it is not, and somebody waits
}

// good reports whether old will still do for who has it.
func (c *Client) good(l *local, src source) bool {
	return c.store.now() < src.until && src.old.Generation() > l.dead(src.entry)
}

// source finds out whether there is a session to refresh.
func (c *Client) source(l *local, a *attempt, p place) source {
	src := source{place: p, gen: a.lease.gen, no: a.no}
	e, now := a.lease.from.entry, c.store.now()
	dead := l.dead(p.entry)
	if a.lease.after != a.ahead.in(p.entry) { // rejected; or found and of no use
		dead = max(dead, a.lease.after)
	}
	if c.refresh != nil && e.Refreshable(dead, now) && now >= e.Calm { // else it has just failed: log in
		if old, bad := c.read(p, e.Session); bad == nil {
			src.old = old
			if e.Usable(dead, now) {
				src.until = e.Session.Expires
			}
		}
	}
	return src
}

// bring makes of what the upstream gives the session to be shared, and the result
// to commit. out.err says why there is no session.
func (c *Client) bring(ctx context.Context, l *local, a *attempt, p place) (got Session, res entry.Result, out outcome) {
	src := c.source(l, a, p)
	stop := c.heartbeat(ctx, l, a)
	out = c.login(ctx, l, src)
	stop()
	res = entry.Result{Class: out.class, Wait: out.pause}
	if out.err == nil {
		got, res, out.err = c.accept(src, out)
	}
	if out.err != nil && a.ahead.gen != 0 {
		res.Calm = c.calm(a.lease.from.entry.Session, out)
	}
	return got, res, out
}

// login brings a session from the upstream, in a goroutine of its own. What does
// not return is left behind: this process sends no other login for the key until
// it has, and ends the session that it may still bring.
func (c *Client) login(ctx context.Context, l *local, src source) outcome {
	var reached reach
	ctx, cancel := context.WithTimeout(reached.watch(withLogin(ctx, c, l.key)), c.loginTimeout)
	done, ended := make(chan outcome, 1), make(chan struct{})
	go func() {
		out := outcome{class: entry.Unknown}
		defer func() {
			if out.err == nil && out.class == entry.Unknown {
				out.err = &PanicError{Stack: debug.Stack()}
			}
			cancel()
			done <- out
			close(ended)
		}()
		out = c.obtain(ctx, l, src, &reached)
	}()
	late := time.NewTimer(c.loginTimeout + answerGrace)
	defer late.Stop()
	select {
	case out := <-done:
		if out.err != nil {
			c.endReturned(src.place, out)
		}
		return out
	case <-late.C:
		l.leaveBehind(ended)
		class, what, begun := entry.Unknown, "login", reached.begun.Load()
		if !begun {
			class, what = entry.Deferred, "refresh"
		}
		err := error(&toldError{text: fmt.Sprintf("%s did not return within %v", what, c.loginTimeout), err: context.DeadlineExceeded})
		if !begun {
			c.refreshFailed(ctx, l, src, &reached, time.Now().Add(-c.loginTimeout-answerGrace), err)
		}
		go func() {
			if out := <-done; c.enter() {
				c.endReturned(src.place, out)
				c.running.Done()
			}
		}()
		return outcome{class: class, refreshed: !begun, err: err}
	}
}

// calm is how long a session that could not be renewed ahead of time is left
// alone: for what the upstream asked, and a quarter of what is left of its life,
// so that an upstream in trouble is not asked as often as it would be by callers
// who need a session. Where a refresh was denied and a login would end the
// session, until that has ended by itself, and longer: then the next leader logs in.
func (c *Client) calm(old entry.Session, out outcome) time.Duration {
	left := old.Expires.Sub(c.store.now())
	if out.denied {
		return left + c.window
	}
	return max(out.pause, left/4, firstRetry)
}

// left is the error of a renewal that is not made now.
func (c *Client) left(l *local, e entry.Entry) *LoginError {
	err := c.suppression(l, e)
	if calm := c.store.clock.toLocal(e.Calm); e.Calm != 0 && calm.After(err.Until) {
		err.Until = calm
	}
	return err
}

// obtain is a leader's way to a session:
//
//	nothing to refresh                     → log in
//	refresh  a usable session              → that
//	         failed, old good              → whoever has the old session goes on with it. If denied: log
//	                                         in, but not with WithSingleSession
//	         throttled or never sent       → deferred
//	         failed otherwise              → log in, if there is time left
func (c *Client) obtain(ctx context.Context, l *local, src source, reached *reach) outcome {
	if src.old.Token.p != nil {
		out, enough := c.tryRefresh(ctx, l, src, reached)
		if enough {
			return out
		}
	}
	reached.begun.Store(true)
	var login reach // of its own: what the refresh reached says nothing of it
	s, err := protect(func() (Session, error) { return c.auth.Login(login.watch(ctx), l.key) })
	if err != nil {
		class, pause := classify(err, &login)
		return outcome{session: s, class: class, pause: pause, err: err}
	}
	return outcome{session: s}
}

// tryRefresh is the part of obtain that is not the login; enough: nor needs it.
func (c *Client) tryRefresh(ctx context.Context, l *local, src source, reached *reach) (out outcome, enough bool) {
	start := time.Now()
	s, err := c.callRefresh(ctx, l, src)
	if err == nil {
		_, _, err = c.fit(src.place, src.gen, s)
	}
	if err == nil && src.no.token.p != nil && s.Token.equal(src.no.token) {
		err = incomplete("the rejected token again")
	}
	if err == nil {
		return outcome{session: s, refreshed: true}, true
	}
	c.refreshFailed(ctx, l, src, reached, start, err)
	class, pause := classify(err, reached)
	good := c.good(l, src)
	switch {
	case class != entry.Denied && good, class == entry.Denied && good && c.single: // whoever has it goes on with it
		return outcome{class: entry.NotSent, refreshed: true, denied: class == entry.Denied, pause: pause, err: err}, true
	case class == entry.Deferred, ctx.Err() != nil:
		return outcome{class: entry.Deferred, refreshed: true, pause: pause, err: err}, true
	}
	return outcome{}, false
}

// callRefresh has a goroutine of its own, so that one that ends it leaves the login
// possible. Where a login may have to follow, half of the time is kept for it.
func (c *Client) callRefresh(ctx context.Context, l *local, src source) (s Session, err error) {
	if !c.good(l, src) {
		half, cancel := context.WithTimeout(ctx, c.loginTimeout/2)
		defer cancel()
		ctx = half
	}
	over := make(chan struct{})
	go func() {
		defer close(over)
		err = &PanicError{} // unless it returns
		s, err = protect(func() (Session, error) { return c.refresh(ctx, l.key, src.old) })
	}()
	<-over
	return s, err
}

// refreshFailed reports that, once, whether or not the refresh was waited for.
func (c *Client) refreshFailed(ctx context.Context, l *local, src source, reached *reach, start time.Time, err error) {
	if reached.told.CompareAndSwap(false, true) {
		c.emit(ctx, Event{
			Kind: EventRefreshFailed, KeyID: l.id, Generation: src.old.Generation(), Start: start,
			Err: &quietError{"sessionlock: refresh " + l.id, err},
		})
	}
}

// accept makes of what a login returned the session to be shared and the result
// to commit; or, when it cannot be used, ErrIncomplete and a failure.
func (c *Client) accept(src source, out outcome) (Session, entry.Result, error) {
	s, stored, err := c.fit(src.place, src.gen, out.session)
	if err != nil {
		c.endReturned(src.place, out)
		return Session{}, entry.Result{Class: entry.Unknown}, err
	}
	return s, entry.Result{Session: stored}, nil
}

func (c *Client) fit(p place, gen uint64, got Session) (Session, entry.Session, error) {
	values := got.inside().values
	s := Session{Token: got.Token, Expiry: got.Expiry, RefreshExpiry: got.RefreshExpiry}.
		with(meta{values: values, key: p.binding.Key, gen: gen, name: p.entry, client: c})
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
	stored := entry.Session{Refresh: c.storeTime(s.RefreshExpiry, now)}
	life := c.maxAge
	if !s.Expiry.IsZero() {
		expiry := c.storeTime(s.Expiry, now)
		content.Expiry = int64(expiry)
		life = c.less(expiry.Sub(now))
	}
	if life <= 0 {
		if s.Expiry.IsZero() {
			return Session{}, stored, incomplete("no expiry, and WithMaxAge is 0")
		}
		return Session{}, stored, incomplete("expired")
	}
	stored.End = now.Add(min(life, maxShared))
	stored.Expires = stored.End
	if c.idle > 0 {
		stored.Expires = min(stored.Expires, now.Add(c.less(c.idle)))
	}
	b := p.binding
	b.Gen = gen
	content.Refresh = int64(stored.Refresh)
	if stored.Record = record.Encode(b, content, c.keyring.keys()); len(stored.Record) > entry.MaxRecord {
		return Session{}, stored, incomplete("larger than 32 KiB")
	}
	return s, stored, c.completes(s)
}

// less takes the expiry margin off a life.
func (c *Client) less(life time.Duration) time.Duration { return life - min(c.margin, life/4) }

// storeTime is t by the store's clock, 0 for the zero one.
func (c *Client) storeTime(t time.Time, now entry.Time) entry.Time {
	if t.IsZero() {
		return 0
	}
	return max(1, min(c.store.clock.toStore(t), now.Add(farthest)))
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
	s, err := c.read(p, stored)
	if err != nil {
		return Session{}, err
	}
	if !s.Expiry.IsZero() && !time.Now().Before(s.Expiry) { // the entry's own times are not sealed
		return Session{}, incomplete("expired")
	}
	return s, c.completes(s)
}

// read is open for who can do with a session that is not complete.
func (c *Client) read(p place, stored entry.Session) (Session, error) {
	b := p.binding
	b.Gen = stored.Gen
	content, err := record.Decode(b, stored.Record, c.keyring.keys())
	if err != nil {
		return Session{}, err
	}
	if err := checkContent(content); err != nil {
		return Session{}, err
	}
	m := meta{key: b.Key, gen: b.Gen, name: p.entry, client: c}
	s := Session{Token: NewToken(content.Token), Expiry: c.localTime(content.Expiry), RefreshExpiry: c.localTime(content.Refresh)}
	if len(content.Values) > 0 {
		m.values = make(map[string]Token, len(content.Values))
		for name, v := range content.Values {
			m.values[name] = NewToken(v)
		}
	}
	return s.with(m), nil
}

// localTime is the inverse of storeTime.
func (c *Client) localTime(t int64) time.Time {
	if t == 0 {
		return time.Time{}
	}
	return c.store.clock.toLocal(entry.Time(t))
}

// sealedAway reports whether err, of open or read, leaves it open that others can
// read stored: they may have the key that seals it.
func sealedAway(stored entry.Session, err error) bool {
	return err != nil && !errors.Is(err, ErrIncomplete) && record.IsSealed(stored.Record)
}

// sealed is the cause for who cannot read a session that others may.
func (c *Client) sealed(err error) error {
	what := "; Keyring.Also gives this process the key"
	switch {
	case c.keyring == nil:
		what = "; this process has no WithKeyring"
	case !errors.Is(err, record.ErrUnknownKey):
		what = ", or with another key under the same id"
	}
	return &toldError{text: err.Error() + what, err: err, answered: true}
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

// loginFailed is the error of an attempt that gave no session.
func (c *Client) loginFailed(l *local, now entry.Entry, class entry.Class, cause error) *LoginError {
	failed := c.loginError(l, now, entry.Failure{Class: class}, cause)
	if why := c.store.rules.Suppression(now, c.store.now()); c.store.now() < why.Until {
		failed.Until = c.store.clock.toLocal(why.Until)
	}
	return failed
}

func loginEvent(class entry.Class) string {
	switch class { //nolint:exhaustive // the rest is unknown
	case entry.Denied:
		return EventLoginDenied
	case entry.Deferred:
		return EventLoginDeferred
	}
	return EventLoginUnknown
}

// suppressed reports that no login is sent because logins fail.
func (c *Client) suppressed(ctx context.Context, l *local, e entry.Entry) error {
	err := c.suppression(l, e)
	c.emit(ctx, Event{Kind: EventSuppressed, KeyID: l.id, Generation: e.Gen, Err: err, again: l.said(fmt.Sprint(e.Failure, e.Window))})
	return err
}

// suppression is the error of suppressed.
func (c *Client) suppression(l *local, e entry.Entry) *LoginError {
	why := c.store.rules.Suppression(e, c.store.now())
	cause := ErrSuppressed
	if why.Class == entry.Rejected {
		cause = fmt.Errorf("%w: %w", ErrSuppressed, ErrRejected)
	}
	return c.loginError(l, e, why, cause)
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
// that was rejected, nor for one whose token the stored session has too, or may
// have, because it cannot be read.

// endOrphan ends own, which was overtaken before it was stored.
func (c *Client) endOrphan(own, stored Session) {
	if own.Token.p != nil && !own.Token.equal(stored.Token) {
		c.background(func(ctx context.Context) { _ = c.logOut(ctx, own) })
	}
}

// endReturned ends what a login returned and what is not fit to be stored. One
// that a client has given out is somebody's, of another key perhaps, and lives.
func (c *Client) endReturned(p place, out outcome) {
	s, m := out.session, out.session.inside()
	if s.Token.p == nil || m.gen != 0 || out.refreshed {
		return
	}
	c.endUnlessStored(p, s.with(meta{values: m.values, key: p.binding.Key, client: c}), 0)
}

// endDisplaced ends, after a grace, the session that now replaced, unless that
// happened because the old one had been rejected, or its token is stored again by
// then.
func (c *Client) endDisplaced(l *local, no rejection, p place, old entry.Session, now Session) {
	s, bad := c.read(p, old)
	if bad != nil || s.Token.equal(now.Token) || !no.allows(s) || old.Gen <= l.dead(p.entry) {
		return
	}
	c.endUnlessStored(p, s, grace)
}

// endUnlessStored ends s after a while, unless the stored session has its token:
// a commit that was not answered may have been executed all the same, and an
// upstream may return one token twice. When the entry cannot be asked the session
// is left to its upstream's own end; so is one that was rejected meanwhile.
func (c *Client) endUnlessStored(p place, s Session, after time.Duration) {
	c.background(func(ctx context.Context) {
		c.pass(after)
		seen, err := c.store.load(ctx, p.entry)
		if gen := s.Generation(); err != nil || (gen != 0 && gen == c.peek(s.Key()).dead(p.entry)) {
			return
		}
		stored, bad := c.read(p, seen.entry.Session)
		if !sealedAway(seen.entry.Session, bad) && (bad != nil || !s.Token.equal(stored.Token)) {
			_ = c.logOut(ctx, s)
		}
	})
}

// endScope ends a scope's part in s. A session that the fleet shares is touched. One
// whose idle life in the store is over was used by nobody for that long: it is
// taken out by the one swap that does it, and ended. One that the store does not
// know, because it never kept it or has lost it, nobody else will end; another
// process that still has it near is repaired once, by the login that the lost
// entry costs anyway. What was displaced, rejected or logged out is the business of
// who did that, and what has an Expiry and no idle life ends by itself.
func (c *Client) endScope(ctx context.Context, l *local, s Session) {
	name, gen := s.inside().name, s.Generation()
	if gen <= l.dead(name) || (c.idle == 0 && c.logout == nil) {
		return
	}
	seen, err := c.store.load(ctx, name)
	switch e := seen.entry; {
	case err != nil:
	case e.Gen == 0, uint64(e.Born) > gen && !c.single: // the entry is younger
		l.condemn(rejects(s))
		_ = c.logOut(ctx, s)
	case e.Session.Gen != gen, c.idle == 0:
	case e.Usable(0, c.store.now()):
		_, _ = c.store.touch(ctx, name, seen, gen, c.less(c.idle), c.idle/100) // more finely than by each use
	default:
		var removed entry.Session
		_, err := c.store.change(ctx, name, seen, func(e entry.Entry, now entry.Time) entry.Entry {
			e, removed = entry.Retire(e, gen, now)
			return e
		})
		if err == nil && removed.Gen != 0 {
			l.condemn(rejects(s))
			_ = c.logOut(ctx, s)
		}
	}
}

// touch extends the life of session gen, which is in use. The last step to its end
// is worth a write however short it is.
func (c *Client) touch(ctx context.Context, name string, seen snapshot, gen uint64) (snapshot, error) {
	life, least := c.less(c.idle), c.idle/10
	if s := seen.entry.Session; s.End.Sub(s.Expires) < least && c.store.now().Add(life) >= s.End {
		least = time.Microsecond
	}
	return c.store.touch(ctx, name, seen, gen, life, least)
}

// pass lets d pass, until requests that use a session may be over; Close does not
// wait for them.
func (c *Client) pass(d time.Duration) { _ = bound.Sleep(c.drain, d) }

// logOut calls WithLogout's func for s, once: what was never stored, or displaced,
// may be the session of scopes too.
func (c *Client) logOut(ctx context.Context, s Session) error {
	if c.logout == nil || !c.near.LoadOrNew(s.Key()).ends(s.Generation()) {
		return nil
	}
	e := Event{Kind: EventEnded, KeyID: c.KeyID(s.Key()), Generation: s.Generation(), Start: time.Now()}
	_, e.Err = within(ctx, c.loginTimeout, func(ctx context.Context) (struct{}, error) {
		return struct{}{}, c.logout(context.WithValue(ctx, bareKey{c}, true), s)
	}, nil)
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
