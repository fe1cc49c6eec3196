package sessionlock

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sessionlock/sessionlock/internal/entry"
	"github.com/sessionlock/sessionlock/internal/keyname"
	"github.com/sessionlock/sessionlock/internal/near"
	"github.com/sessionlock/sessionlock/internal/record"
)

// Client gives out the sessions of one upstream. Make one per upstream and
// process with [New] and keep it; all methods are safe for concurrent use.
// Its configuration must be the same in the whole fleet.
type Client struct{ *core }

// core is a client's content, behind a pointer: a printer that comes to a Client
// past its Format method, as fmt does for an unexported field of a stranger's
// struct, finds an address.
type core struct {
	config
	upstream string
	auth     Authenticator
	names    keyname.Namer
	store    *store
	near     near.Map[*local]
	looks    looks
	stats    counters
	told     atomic.Int64 // when a refused call was last logged
	hub      func()       // ends the push subscription; nil: none of ours

	base  context.Context //nolint:containedctx // the client's own life: ended when Close is over
	end   context.CancelFunc
	drain context.Context //nolint:containedctx // ended when Close begins: who has not sent a login ends, graces too
	close context.CancelFunc

	mu      sync.Mutex // guards closed, and running.Add against it
	closed  bool
	running sync.WaitGroup // attempts, re-reads and logouts
}

// New returns a client for upstream, a URL or a name: it is part of every key,
// so clients of different upstreams never meet. Two APIs of one host with sessions of
// their own are two upstreams: give them different paths. auth makes the logins. A store
// is required: [WithRedis] for a fleet, WithCache(new(MemoryCache)) for this
// process only.
//
// New does no I/O and starts nothing. It reports everything that is wrong with
// its arguments at once, as an error that matches [ErrInvalid]; how they relate is
// judged once each is right by itself.
func New(upstream string, auth Authenticator, opts ...Option) (*Client, error) {
	cfg, err := configure(upstream, auth, opts)
	if err != nil {
		return nil, err
	}
	c := &Client{&core{
		config: cfg, upstream: upstream, auth: auth,
		names: keyname.Namer{Secret: cfg.keySecret, Namespace: cfg.namespace, Upstream: upstream},
	}}
	c.drain, c.close = context.WithCancel(context.Background())
	c.base, c.end = context.WithCancel(context.Background())
	c.near = near.Map[*local]{Max: max(cfg.nearMax, 16), New: c.newLocal} // attempts need a place even when nothing is held near
	c.store = c.newStore()
	return c, nil
}

// Format writes a fixed word whatever the verb: a client holds secrets.
func (c *Client) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "[sessionlock client]") }

// newStore joins the configured backends; what is not configured is the Redis
// one, and without Redis a lock in the cache.
func (c *Client) newStore() *store {
	st := &store{
		cache: c.cache, locker: c.locker,
		rules: c.rules(), lockTTL: c.lockTTL, gate: newGate(c.opTimeout), lockGate: newGate(c.opTimeout), holder: holder(),
	}
	if st.cache == nil {
		rc := newRedisCache(c.rdb)
		c.hub = rc.hub.Close
		st.cache = rc
	}
	if st.locker == nil && c.rdb != nil {
		st.locker = newRedisLocker(c.rdb)
	}
	if st.locker == nil {
		st.locker = cacheLocker{st.cache}
	}
	if st.watcher, _ = st.cache.(Watcher); c.hub != nil && !canPush(c.rdb) {
		st.watcher = nil
	}
	st.clock.face, _ = st.cache.(Clock)
	st.clock.gate = st.gate
	return st
}

// Session returns the session of key, logging in if the fleet has none. Callers
// of one process share the attempt; each waits under its own ctx, and one that
// leaves fails nobody. The key is any non-blank byte string of at most 256
// bytes.
//
// Errors: [*LoginError] when there is no session because logins fail
// ([ErrDenied], [ErrSuppressed], [ErrIncomplete]); [*LockError]; [ErrStale];
// [ErrUnavailable] when lock or cache cannot be used; [ErrReentrant],
// [ErrInvalid], [ErrClosed]; and ctx's error, wrapped.
func (c *Client) Session(ctx context.Context, key string) (Session, error) {
	if l, ok := c.near.Load(key); ok && ctx != nil && ctx.Err() == nil {
		if s, ok := l.hit(); ok {
			c.nearHit(ctx, l)
			return s, nil
		}
	}
	return c.session(ctx, key, rejection{})
}

// session is Session past the near copy: arguments first, then the attempt.
func (c *Client) session(ctx context.Context, key string, no rejection) (Session, error) {
	if err := errors.Join(checkContext(ctx), checkKey(key)); err != nil {
		return Session{}, err
	}
	l := c.near.LoadOrNew(key)
	if err := ctx.Err(); err != nil {
		return Session{}, gone(ctx, l.id)
	}
	if insideLogin(ctx, c, key) {
		return Session{}, fmt.Errorf("%w: %s", ErrReentrant, l.id)
	}
	return c.wait(ctx, l, no)
}

// Do runs fn with the session of key. When fn reports that the session was
// refused ([Reject], [WithRejected]), that generation is invalidated, a newer
// one obtained, and fn run once more; never a third time. A peer's newer
// session is adopted without a login, so a late rejection never costs one. When
// two sessions in a row were refused while young, the renewal has to wait, and
// until then fails: see [WithReauthBackoff].
//
// Errors are fn's own; those of [Client.Session] when there is no session to
// run with; and [*ReauthError], which matches [ErrRejected], when the renewal
// failed, the second run was rejected too, or the operation must not be run
// again. A panic of fn passes through; nothing is left locked.
func (c *Client) Do(ctx context.Context, key string, fn func(context.Context, Session) error) error {
	if err := errors.Join(checkContext(ctx), checkKey(key), checkFunc(fn)); err != nil {
		return err
	}
	s, err := c.Session(ctx, key)
	if err != nil {
		return err
	}
	return c.run(ctx, s, fn, c)
}

// origin is where the session of a Do comes from: the client, or a scope.
type origin interface {
	session(ctx context.Context, key string, no rejection) (Session, error) // that follows a rejected one
	condemn(ctx context.Context, s Session)
}

// run is the loop of Do, written out because it has two rounds and no more:
//
//	first run      ok, or an error that is no rejection   → that
//	               rejected, may have been executed       → *ReauthError, not run again
//	renewal        no session                             → *ReauthError
//	second run     ok, or an error that is no rejection   → that
//	               rejected                               → *ReauthError; the back-off for young
//	                                                        sessions decides when anybody logs in
func (c *Client) run(ctx context.Context, s Session, fn func(context.Context, Session) error, from origin) error {
	first := fn(ctx, s)
	verdict := c.verdict(first)
	if verdict == NotRejected {
		return first
	}
	id := c.KeyID(s.Key())
	if again, _ := ctx.Value(idempotentKey{}).(bool); verdict == rejectedForGood || verdict == RejectedDuring && !again {
		from.condemn(ctx, s)
		return c.reauth(ctx, s, &ReauthError{First: first, id: id})
	}
	s2, err := from.session(ctx, s.Key(), rejects(s))
	if ctx.Err() != nil || errors.Is(err, ErrInvalid) { // a scope that has ended asked nobody
		from.condemn(ctx, s)
	}
	if err != nil {
		return c.reauth(ctx, s, &ReauthError{First: first, Second: err, id: id})
	}
	second := fn(context.WithValue(ctx, rejectionKey{}, first), s2)
	if c.verdict(second) != NotRejected {
		from.condemn(ctx, s2)
		return c.reauth(ctx, s2, &ReauthError{First: first, Second: second, id: id, again: true})
	}
	_ = c.reauth(ctx, s2, nil)
	return second
}

func (c *Client) reauth(ctx context.Context, s Session, failed *ReauthError) error {
	e := Event{Kind: EventReauthOK, KeyID: c.KeyID(s.Key()), Generation: s.Generation()}
	if failed == nil {
		c.emit(ctx, e)
		return nil
	}
	e.Kind, e.Err = EventReauthFailed, failed
	c.emit(ctx, e)
	return failed
}

func (c *Client) verdict(err error) Verdict {
	if mark := verdictIn(err); err == nil || mark != NotRejected || c.rejected == nil {
		return mark
	}
	var inner *ReauthError // of a session used inside
	if errors.As(err, &inner) {
		return NotRejected
	}
	return c.rejected(err)
}

// condemn ends a rejected session for the fleet, also when its caller has no
// time left: a request that is refused as slowly as its deadline is short would
// otherwise never be repaired.
func (c *Client) condemn(ctx context.Context, s Session) {
	if ctx.Err() == nil {
		_ = c.Invalidate(ctx, s) // a failure shows at the next use
		return
	}
	l := c.near.LoadOrNew(s.Key())
	l.condemn(rejects(s))
	c.spawn(func() { _, _ = c.store.invalidate(c.base, s.inside().name, s.Generation()) })
}

// Invalidate says that the upstream refuses s: that generation ends in the whole
// fleet. Any other generation, and a login under way, are not touched, so a late
// rejection is harmless. [ErrInvalid] for a session that no client of this
// upstream and namespace gave out; [ErrUnavailable] when only this process knows
// now.
func (c *Client) Invalidate(ctx context.Context, s Session) error {
	if err := errors.Join(checkContext(ctx), c.checkOwn(s)); err != nil {
		return err
	}
	l := c.near.LoadOrNew(s.Key())
	l.condemn(rejects(s))
	return c.operate(ctx, l, func(ctx context.Context) error {
		_ = c.store.clock.learn(ctx, c.spawn) // better judged by our own clock than not at all
		_, err := c.store.invalidate(ctx, s.inside().name, s.Generation())
		return err
	})
}

// Logout ends the session of key for the whole fleet: it is removed, and given
// to [WithLogout], whose error is returned. A login under way stores nothing, and
// the callers of its process get [ErrStale]. Copies near other processes end with
// the wake-up, at the latest with the age of [WithNearCache]. A key without a
// session is no error; a session sealed with a key that this process does not have
// is removed and lives on upstream. Calls that come later log in again.
func (c *Client) Logout(ctx context.Context, key string) error {
	if err := errors.Join(checkContext(ctx), checkKey(key)); err != nil {
		return err
	}
	l := c.peek(key)
	return c.operate(ctx, l, func(ctx context.Context) error {
		p, removed, lost, err := c.clear(ctx, l)
		if err != nil { // it may have been removed all the same
			if s, bad := c.open(p, removed); bad == nil {
				c.endUnlessStored(p, s, grace)
			}
			return err
		}
		if s, ok := l.loggedOut(p.entry, lost); ok {
			return c.logOut(ctx, s)
		}
		if s, bad := c.open(p, removed); bad == nil {
			return c.logOut(ctx, s)
		}
		return nil
	})
}

// Put makes s, a session obtained elsewhere, in a browser for instance, the
// fleet's session of key and returns it as stored. It takes the place of the
// one before, which is given to [WithLogout] after 30 s; a login under way
// stores nothing, and its callers get s when it returns; who comes later need
// not wait for it. Failed logins no longer suppress, and stay counted until s
// has proved itself, by 30 s or a quarter of its life.
//
// [ErrInvalid] for what would be [ErrIncomplete] of a login, matching both;
// [ErrUnavailable] when s may or may not have been stored: Put it again.
func (c *Client) Put(ctx context.Context, key string, s Session) (Session, error) {
	if err := errors.Join(checkContext(ctx), checkKey(key)); err != nil {
		return Session{}, err
	}
	l := c.near.LoadOrNew(key)
	fit := func(p place, gen uint64) (kept Session, stored entry.Session, err error) {
		if kept, stored, err = c.fit(p, gen, s); err != nil {
			err = fmt.Errorf("%w: session put for %s: %w", ErrInvalid, l.id, err)
		}
		return kept, stored, err
	}
	kept, _, err := fit(l.place, 0)
	if err != nil {
		return Session{}, err
	}
	err = c.operate(ctx, l, func(ctx context.Context) error {
		p, seen, err := c.look(ctx, l)
		if err != nil {
			return err
		}
		var bad error
		var stored, displaced entry.Session
		_, err = c.store.change(ctx, p.entry, seen, func(e entry.Entry, now entry.Time) entry.Entry {
			gen := entry.Number(e, now)
			if kept, stored, bad = fit(p, gen); bad == nil {
				e, displaced = c.store.rules.Put(e, gen, stored, now)
			}
			return e
		})
		if err = errors.Join(bad, err); err == nil {
			l.put(c.nearCopy(kept, p.entry, stored))
		}
		if !c.single { // after an error too: it may have been stored all the same
			c.endDisplaced(l, rejection{}, p, displaced, kept)
		}
		return err
	})
	if err != nil {
		return Session{}, err
	}
	return kept, nil
}

// clear removes the session from the entry; lost: there was no entry.
func (c *Client) clear(ctx context.Context, l *local) (p place, removed entry.Session, lost bool, err error) {
	p, seen, err := c.look(ctx, l)
	if err != nil {
		return p, removed, false, err
	}
	seen, err = c.store.change(ctx, p.entry, seen, func(e entry.Entry, now entry.Time) entry.Entry {
		e, removed = entry.Clear(e, now)
		return e
	})
	if err != nil {
		return p, removed, false, err
	}
	l.condemn(rejection{name: p.entry, gen: seen.entry.Gen})
	return p, removed, seen.entry.Gen == 0, nil
}

// Unsuppress forgets the failed logins of key, after its password was put right
// for instance, so that the next call may log in at once. The session stays. A
// key that nothing is known of is no error.
func (c *Client) Unsuppress(ctx context.Context, key string) error {
	if err := errors.Join(checkContext(ctx), checkKey(key)); err != nil {
		return err
	}
	l := c.peek(key)
	l.forgive()
	return c.operate(ctx, l, func(ctx context.Context) error {
		p, seen, err := c.look(ctx, l)
		if err != nil {
			return err
		}
		_, err = c.store.change(ctx, p.entry, seen, func(e entry.Entry, _ entry.Time) entry.Entry {
			return entry.Unsuppress(e)
		})
		return err
	})
}

// look loads the entry of l.
func (c *Client) look(ctx context.Context, l *local) (place, snapshot, error) {
	p, err := c.place(ctx, l)
	if err != nil {
		return p, snapshot{}, err
	}
	seen, err := c.first(ctx, p, rejection{})
	return p, seen, err
}

// operate runs one of the calls that are not an attempt: open client, running
// context, errors that name the key.
func (c *Client) operate(ctx context.Context, l *local, f func(context.Context) error) error {
	if ctx.Err() != nil {
		return gone(ctx, l.id)
	}
	if !c.enter() {
		return fmt.Errorf("%w: session %s", ErrClosed, l.id)
	}
	defer c.running.Done()
	err := f(ctx)
	if err != nil && ctx.Err() != nil {
		return gone(ctx, l.id)
	}
	return c.failed(ctx, l, err)
}

// KeyID returns the id under which logs, errors, events and Redis know key: a
// keyed hash, see [WithKeySecret].
func (c *Client) KeyID(key string) string { return c.names.Tag(key) }

// Close ends this process's part; the fleet stays logged in. New calls get
// [ErrClosed] and so do callers whose login was not sent yet. Logins under way
// are finished and stored until ctx ends; then they are cancelled and ctx's error
// is returned. What is left ends by itself: a commit and its unlock within the
// lock TTL, a call inside a driver when the driver gives it up. Locks are freed. A
// login that was cancelled has an unknown outcome and counts, so give ctx the
// login timeout and some, or no end at all: Close then waits for a login, its
// commit, and a call of WithLogout at the most.
// Close may be called more than once and concurrently.
func (c *Client) Close(ctx context.Context) error {
	if err := checkContext(ctx); err != nil {
		return err
	}
	c.mu.Lock()
	first := !c.closed
	c.closed = true
	c.mu.Unlock()
	if first {
		c.close()
		c.near.All(func(l *local) { l.close() })
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if c.hub != nil {
			c.hub() // whoever still runs polls
		}
		c.running.Wait()
	}()
	var err error
	select {
	case <-ended:
	case <-ctx.Done():
		err = fmt.Errorf("sessionlock: close: %w", ctx.Err())
	}
	c.end()
	return err
}

// enter reports whether the client is open, and if so counts one more thing
// running; end it with running.Done.
func (c *Client) enter() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closed {
		c.running.Add(1)
	}
	return !c.closed
}

// spawn runs f beside its caller, unless the client is closed; Close waits for it.
func (c *Client) spawn(f func()) {
	if !c.enter() {
		return
	}
	go func() {
		defer c.running.Done()
		f()
	}()
}

// peek returns what this process knows of key without making room for it.
func (c *Client) peek(key string) *local {
	if l, ok := c.near.Load(key); ok {
		return l
	}
	return c.newLocal(key)
}

// gone is the error of a caller whose context ended.
func gone(ctx context.Context, id string) error {
	err := fmt.Errorf("sessionlock: session %s: %w", id, ctx.Err())
	if cause := context.Cause(ctx); !errors.Is(ctx.Err(), cause) {
		err = fmt.Errorf("%w: %w", err, cause)
	}
	return err
}

// Doer is what [Call] runs on: a [*Handle] or a [*Scope].
type Doer interface {
	Do(ctx context.Context, fn func(context.Context, Session) error) error
}

// Call is Do for a func with a result. The result is the zero T with an error;
// [ErrInvalid] without a Doer or func.
func Call[T any](ctx context.Context, on Doer, fn func(context.Context, Session) (T, error)) (T, error) {
	var got T
	if on == nil {
		return got, fmt.Errorf("%w: no Doer to call on", ErrInvalid)
	}
	if fn == nil {
		return got, on.Do(ctx, nil)
	}
	err := on.Do(ctx, func(ctx context.Context, s Session) (err error) {
		got, err = fn(ctx, s)
		return err
	})
	if err != nil {
		var zero T
		return zero, err
	}
	return got, nil
}

// Handle is one key of a client. Its near hit skips the look-up; keep it where
// one key is used often. Safe for concurrent use.
type Handle struct {
	c   *Client
	key func() string // as in core, so that no printer finds it
	l   atomic.Pointer[local]
}

// For returns a handle for key. It does no I/O and cannot fail: a bad key is
// reported when the handle is used.
func (c *Client) For(key string) *Handle { return &Handle{c: c, key: func() string { return key }} }

// Format writes a fixed word whatever the verb: a handle holds a raw key.
func (h *Handle) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "[sessionlock handle]") }

// Session is [Client.Session] for the handle's key.
func (h *Handle) Session(ctx context.Context) (Session, error) {
	if l := h.l.Load(); l != nil && ctx != nil && ctx.Err() == nil {
		if s, ok := l.hit(); ok {
			h.c.nearHit(ctx, l)
			return s, nil
		}
	}
	if h.c == nil {
		return Session{}, fmt.Errorf("%w: the handle is none of Client.For", ErrInvalid)
	}
	s, err := h.c.Session(ctx, h.key())
	if l, ok := h.c.near.Load(h.key()); ok {
		h.l.Store(l)
	}
	return s, err
}

// Do is [Client.Do] for the handle's key.
func (h *Handle) Do(ctx context.Context, fn func(context.Context, Session) error) error {
	if err := errors.Join(checkContext(ctx), checkFunc(fn)); err != nil {
		return err
	}
	s, err := h.Session(ctx)
	if err != nil {
		return err
	}
	return h.c.run(ctx, s, fn, h.c)
}

// wait joins the shared attempt for l on behalf of one caller and stays until it
// ends or ctx does. What an attempt that somebody else began brings may not do
// for this caller: it may be the very session just rejected, or the end of a
// wait this caller has only just joined. Then it begins one of its own; what
// that brings is the answer, so no caller causes two logins.
func (c *Client) wait(ctx context.Context, l *local, no rejection) (Session, error) {
	start := time.Now()
	for {
		if n := l.copy.Load(); n != nil && no.allows(n.session) {
			l.hitOnce()
			c.nearHit(ctx, l)
			return n.session, nil
		}
		a, mine, err := c.join(ctx, l, no, start)
		if err != nil {
			return Session{}, err
		}
		s, err := c.await(ctx, l, a, mine, start)
		timeout, _ := err.(*LockError) //nolint:errorlint // ours, not one that a login met
		switch {
		case err == nil && no.allows(s):
			return s, nil
		case err == nil && mine:
			return Session{}, fmt.Errorf("%w: the login of %s returned the rejected token again", ErrRejected, l.id)
		case err == nil, a.ahead.gen != 0 && timeout == nil && ctx.Err() == nil: // nor may the end of a renewal that nobody needed
		case !mine && timeout != nil && time.Since(start) < c.contention.total():
		default:
			return Session{}, err
		}
	}
}

// await is one caller's stay with an attempt. An attempt keeps the time of who
// began it; who joined may have come earlier, and then leaves earlier, unless the
// wait is over because this process logs in.
func (c *Client) await(ctx context.Context, l *local, a *attempt, mine bool, start time.Time) (Session, error) {
	c.stats.waiters.Add(1)
	defer c.stats.waiters.Add(-1)
	var limit <-chan time.Time
	if !mine {
		t := time.NewTimer(time.Until(start.Add(c.contention.total())))
		defer t.Stop()
		limit = t.C
	}
	for {
		select {
		case <-a.done:
			return a.session, a.err
		case <-ctx.Done():
			l.leave(a)
			return Session{}, gone(ctx, l.id)
		case <-limit:
			select {
			case <-a.done:
				return a.session, a.err
			default:
			}
			if l.leaveUnsent(a) {
				return Session{}, &LockError{Attempts: c.contention.attempts, Waited: time.Since(start), Err: ErrLocked, id: l.id}
			}
		}
	}
}

// attempt is one shared try to get a session: the work of all callers of this
// process that ask at the same time. It is detached from their contexts (rule
// R8) and ends with the last of them only while its login is not sent.
type attempt struct {
	no     rejection               // what the caller that started it will not take
	ahead  rejection               // what it renews before it ends; zero: callers wait for it
	start  time.Time               // when that caller came: its wait counts from then
	cancel context.CancelCauseFunc // ends it
	before <-chan struct{}         // closed when the attempt before it has freed its lock
	over   chan struct{}           // closed when this one has

	callers int  // guarded by local.mu
	sent    bool // guarded by local.mu

	done    chan struct{} // closed when the next three are set
	session Session
	err     error
	near    *nearCopy // to be kept by this process; nil: none

	lease   *lease // to be given back after done
	waiting *waiting
}

// errEnded is what callers get when a user's func ended the goroutine of their
// attempt, by t.FailNow for instance.
var errEnded = errors.New("sessionlock: a func of the user ended the attempt (runtime.Goexit)")

// join returns the attempt that runs for l, or starts one, and says which.
func (c *Client) join(ctx context.Context, l *local, no rejection, start time.Time) (a *attempt, mine bool, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	news := l.reject(no)
	a = l.attempt
	if l.ahead != nil && l.ahead.ahead.in(no.name) != 0 && l.ahead.ahead.gen <= no.gen {
		a = l.ahead // it is making what this caller needs; what it renews is dead for the fleet now
		if news {
			c.spawn(func() { _, _ = c.store.invalidate(c.base, no.name, no.gen) })
		}
	}
	if a != nil && a.callers >= maxWaiters {
		return nil, false, &LockError{Err: ErrLocked, id: l.id}
	}
	if a != nil {
		a.callers++
		return a, false, nil
	}
	a = c.start(context.WithoutCancel(ctx), l, &attempt{no: no, start: start, callers: 1})
	if a == nil {
		return nil, false, fmt.Errorf("%w: session %s", ErrClosed, l.id)
	}
	l.attempt = a
	return a, true, nil
}

// start lets a fly, after the attempt before it; nil when the client is closed.
// l.mu is held.
func (c *Client) start(ctx context.Context, l *local, a *attempt) *attempt {
	if !c.enter() {
		return nil
	}
	ctx, a.cancel = context.WithCancelCause(ctx)
	a.before, a.over, a.done, a.err = l.before, make(chan struct{}), make(chan struct{}), errEnded
	l.before = a.over
	go c.fly(ctx, l, a)
	return a
}

// renew starts to replace n before it ends (rule R7): the shared attempt, except
// that it asks for what is newer than n, never waits, and is nobody's to wait
// for but those whose n was rejected. l.mu is held.
func (c *Client) renew(l *local, n *nearCopy) {
	if l.attempt == nil && l.ahead == nil {
		l.ahead = c.start(c.base, l, &attempt{ahead: rejects(n.session), start: time.Now(), callers: 1})
	}
}

// errNotElected ends a renewal ahead of time that is not for this process to make.
var errNotElected = errors.New("sessionlock: not for this process to renew the session")

// fly runs an attempt to its end: the answer first, then what nobody waits for.
func (c *Client) fly(ctx context.Context, l *local, a *attempt) {
	defer c.running.Done()
	defer close(a.over)
	defer context.AfterFunc(c.base, func() { a.cancel(ErrClosed) })() //nolint:contextcheck // an attempt has two ends: its callers' and the client's
	defer context.AfterFunc(c.drain, func() { l.endUnsent(a) })()     //nolint:contextcheck // as above
	defer a.cancel(nil)
	defer func() {
		l.land(a)
		close(a.done)
		if a.waiting != nil {
			a.waiting.stop()
		}
		if a.lease != nil && c.store.giveBack(ctx, a.lease) != nil {
			l.owe(a.lease)
		}
	}()
	a.session, a.err = c.try(ctx, l, a)
}

// try is the algorithm of the package comment from step 3 on.
func (c *Client) try(ctx context.Context, l *local, a *attempt) (Session, error) {
	p, err := c.place(ctx, l)
	if err != nil {
		return Session{}, err
	}
	seen, err := c.first(ctx, p, a.no)
	if err != nil {
		return Session{}, c.failed(ctx, l, err)
	}
	w := &waiting{contention: c.contention, store: c.store, name: p.entry, start: a.start}
	a.waiting = w
	q := ask{name: p.entry, lock: p.lock, ahead: a.ahead.gen != 0, after: max(a.no.in(p.entry), a.ahead.in(p.entry), l.dead(p.entry))}
	var sealed error // why the session of q.after cannot be read here
	if gen := a.ahead.in(p.entry); gen != 0 && seen.entry.Gen > gen && seen.entry.Session.Gen < gen {
		l.changed() // logged out or rejected, and this process was not told: nobody needs a renewal
		return Session{}, errNotElected
	}
	for {
		var verdict entry.Verdict
		verdict, seen, err = c.acquire(ctx, l, a, q, seen)
		switch {
		case err != nil:
			return Session{}, c.failed(ctx, l, err)
		case verdict == entry.Found:
			s, bad := c.open(p, seen.entry.Session)
			if bad == nil && a.no.allows(s) {
				return c.adopt(ctx, l, a, w, s, seen), nil
			}
			if bad != nil {
				c.emit(ctx, Event{Kind: EventUnreadable, KeyID: l.id, Generation: seen.entry.Session.Gen, Err: bad, again: l.said(fmt.Sprint(seen.entry.Session.Gen, bad))})
			}
			q.after = seen.entry.Session.Gen // unusable, or the rejected token again: as good as rejected
			if q.unread = sealedAway(seen.entry.Session, bad); q.unread {
				sealed = c.sealed(bad)
			}
			if q.unread && c.keyring == nil { // what replaced it would stand in clear
				return Session{}, c.failed(ctx, l, &outage{cause: sealed, lasting: true})
			}
			continue
		case verdict == entry.Suppressed && q.shielded(seen.entry, c.store.now()):
			return Session{}, c.failed(ctx, l, &outage{cause: sealed, lasting: true})
		case verdict == entry.Suppressed && q.ahead:
			return Session{}, c.left(l, seen.entry)
		case verdict == entry.Suppressed:
			return Session{}, c.suppressed(ctx, l, seen.entry)
		case verdict == entry.Lead:
			return c.lead(ctx, l, a, p, q.after)
		case q.ahead:
			return Session{}, errNotElected
		}
		if seen, err = w.next(ctx, q.after); err != nil {
			return Session{}, c.failed(ctx, l, err)
		}
	}
}

// place is where a key lives: the names of its entry and lock, and what its
// record is bound to.
type place struct {
	entry, lock string
	binding     record.Binding
}

// place finds the place of l. It is the same every time unless lock key or
// fingerprint are asked of the user.
func (c *Client) place(ctx context.Context, l *local) (place, error) {
	if c.lockKey == nil && c.fingerprint == nil {
		return l.place, nil
	}
	type answer struct{ fingerprint, lockKey string }
	got, err := within(ctx, c.opTimeout, func(ctx context.Context) (a answer, err error) {
		a.lockKey = l.key
		if c.lockKey != nil {
			a.lockKey = c.lockKey(l.key)
		}
		if c.fingerprint != nil {
			a.fingerprint, err = c.fingerprint(ctx, l.key)
		}
		return a, err
	}, nil)
	if err != nil {
		return place{}, &quietError{"sessionlock: lock key or fingerprint of " + l.id, err}
	}
	if checkKey(got.lockKey) != nil {
		return place{}, fmt.Errorf("%w: the lock key of %s is blank or over %d bytes", ErrInvalid, l.id, maxKey)
	}
	return c.placeOf(l.key, got.fingerprint, got.lockKey), nil
}

func (c *Client) placeOf(key, fingerprint, lockKey string) place {
	return place{
		entry:   c.names.Entry(key, fingerprint),
		lock:    c.names.Lock(c.lockScope, lockKey),
		binding: record.Binding{Namespace: c.namespace, Upstream: c.upstream, Key: key},
	}
}

// first looks at the entry, and invalidates the rejected generation on the way. If
// that fails the attempt goes on: it asks for a newer one anyway.
func (c *Client) first(ctx context.Context, p place, no rejection) (snapshot, error) {
	if err := c.store.clock.learn(ctx, c.spawn); err != nil {
		return snapshot{}, err
	}
	if no.gen != 0 && no.name != p.entry { // other credentials since
		c.spawn(func() { _, _ = c.store.invalidate(c.base, no.name, no.gen) })
	}
	seen, err := c.store.load(ctx, p.entry)
	if gen := no.in(p.entry); err == nil && gen != 0 {
		if now, err := c.store.drop(ctx, p.entry, seen, gen); err == nil {
			return now, nil
		}
	}
	return seen, err
}

// acquire is the store's acquire, after what only this process can know: that its
// last lock is not yet given back, that a login of its own still hangs, that it
// has spent its budget with an entry that was lost since.
func (c *Client) acquire(ctx context.Context, l *local, a *attempt, q ask, seen snapshot) (entry.Verdict, snapshot, error) {
	now := c.store.now()
	if v := seen.entry.Look(q.after, now); v != entry.Free {
		return v, seen, nil
	}
	switch { // the lock would say no more
	case l.owing(): // but what the entry says may be ours
	case seen.entry.Alive(now):
		return entry.Free, seen, nil
	case c.store.rules.Spent(seen.entry, now), q.shielded(seen.entry, now), q.ahead && c.store.rules.Leave(seen.entry, now):
		return entry.Suppressed, seen, nil
	}
	select {
	case <-a.before:
	case <-ctx.Done():
		return entry.Free, seen, context.Cause(ctx)
	}
	if err := l.mayLogin(q.name, seen.entry, c.store.now()); err != nil && a.ahead.gen != 0 {
		return entry.Free, seen, err
	} else if err != nil {
		c.emit(ctx, Event{Kind: EventSuppressed, KeyID: l.id, Generation: seen.entry.Gen, Err: err})
		return entry.Free, seen, err
	}
	seen, err := l.repay(ctx, c.store, q.name, seen)
	if err != nil {
		return entry.Free, seen, err
	}
	verdict, held, seen, err := c.store.acquire(ctx, q, seen)
	a.lease = held
	return verdict, seen, err
}

// adopt takes a session that somebody else has stored.
func (c *Client) adopt(ctx context.Context, l *local, a *attempt, w *waiting, s Session, seen snapshot) Session {
	kind := EventShared
	if w.waited() {
		kind = EventAdopted
	}
	a.near = c.nearCopy(s, w.name, seen.entry.Session)
	if c.idle > 0 && seen.entry.Session.Expires.Sub(c.store.now()) <= c.less(c.idle)-c.idle/10 {
		c.spawn(func() { _, _ = c.touch(c.base, w.name, seen, s.Generation()) })
	}
	c.emit(ctx, Event{Kind: kind, KeyID: l.id, Generation: s.Generation(), Attempt: w.ticks, Start: w.start})
	return s
}

// lead makes the login and commits what comes of it, session or failure.
func (c *Client) lead(ctx context.Context, l *local, a *attempt, p place, after uint64) (Session, error) {
	l.send(a)
	if ctx.Err() != nil { // the last caller has left, or the client is closed
		if c.store.abandon(ctx, a.lease) != nil {
			l.owe(a.lease)
		}
		return Session{}, context.Cause(ctx)
	}
	start := time.Now()
	got, res, out := c.bring(ctx, l, a, p)
	verdict, displaced, seen, commitErr := c.store.commit(context.WithoutCancel(ctx), a.lease, res)
	done := Event{Kind: out.event(res.Class), KeyID: l.id, Generation: a.lease.gen, Start: start}
	if out.err != nil {
		l.count(p.entry, res.Class, commitErr == nil)
		defer func() { _ = c.failed(ctx, l, commitErr) }()
		failed := c.loginFailed(l, seen.entry, res.Class, out.err)
		if res.Calm > 0 {
			failed.Until = c.left(l, seen.entry).Until
		}
		if done.Err = failed; !out.refreshed { // else that was said
			c.emit(ctx, done)
		}
		if commitErr == nil && verdict == entry.Stale { // by a Put, for instance
			if s, err := c.overtaken(ctx, l, a, p, after, Session{}, seen); err == nil {
				return s, nil
			}
		}
		return Session{}, failed
	}
	c.emit(ctx, done)
	l.forgive()
	switch {
	case commitErr != nil: // served by this process alone, and not for long
		_ = c.failed(ctx, l, commitErr)
		a.near = c.nearCopy(got, p.entry, res.Session)
		a.near.until = earlier(a.near.until, time.Now().Add(grace))
		if !out.refreshed {
			c.endUnlessStored(p, got, grace)
		}
	case verdict == entry.Stale && out.refreshed:
		return c.overtaken(ctx, l, a, p, after, Session{}, seen)
	case verdict == entry.Stale:
		return c.overtaken(ctx, l, a, p, after, got, seen)
	default:
		a.near = c.nearCopy(got, p.entry, seen.entry.Session)
		if !out.refreshed && !c.single {
			c.endDisplaced(l, a.no, p, displaced, got)
		}
	}
	return got, nil
}

// overtaken is rule R4, for a leader whose commit came too late. It never logs
// in again: a newer session is adopted, a newer attempt waited for within the
// budget, and if there is neither the caller learns it by ErrStale. Then its own
// session, which nobody will ever use, is ended.
func (c *Client) overtaken(ctx context.Context, l *local, a *attempt, p place, after uint64, own Session, seen snapshot) (Session, error) {
	c.emit(ctx, Event{Kind: EventStale, KeyID: l.id, Generation: a.lease.gen, Err: ErrStale})
	nonce, w := a.lease.nonce, a.waiting
	c.store.unlock(ctx, a.lease)
	a.lease = nil
	w.restart() // the login is no part of the wait
	// Commit may have judged by what the last heartbeat saw.
	if now, err := c.store.load(ctx, p.entry); err == nil {
		seen = now
	}
	var stored Session
	unread := false
	defer func() {
		if !unread {
			c.endOrphan(own, stored)
		}
	}()
	for {
		var bad error
		e, now := seen.entry, c.store.now()
		stored, bad = c.open(p, e.Session)
		unread = sealedAway(e.Session, bad)
		switch verdict := e.Look(after, now); {
		case verdict == entry.Found && bad == nil && a.no.allows(stored):
			return c.adopt(ctx, l, a, w, stored, seen), nil
		case verdict == entry.Suppressed:
			return Session{}, c.suppressed(ctx, l, e)
		case !e.Alive(now), e.Open.Nonce == nonce: // nobody to wait for
			return Session{}, fmt.Errorf("%w: session %s", ErrStale, l.id)
		}
		if seen, bad = w.next(ctx, after); bad != nil {
			return Session{}, c.failed(ctx, l, bad)
		}
	}
}
