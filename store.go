// store.go is the seam below client.go, kept out of it so that the algorithm
// there reads without locks, swaps and clocks: it joins any Locker with any
// Cache into four steps (acquire, renew, commit, invalidate) and bounds every
// one of their calls.

package sessionlock

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/sessionlock/sessionlock/internal/bound"
	"github.com/sessionlock/sessionlock/internal/entry"
)

// store runs the rules of internal/entry over a Cache and a Locker. Every call
// to either passes the gate: it ends in time for the caller, however the backend
// behaves, and is not made at all while the backend is known to be dead.
type store struct {
	cache    Cache
	watcher  Watcher // nil: polling only
	locker   Locker
	clock    storeClock
	rules    entry.Rules
	lockTTL  time.Duration
	gate     *gate // of the cache
	lockGate *gate // of the locker, which may be elsewhere
	holder   string
}

// snapshot is an entry as it was last seen, with the bytes a swap compares.
type snapshot struct {
	raw   []byte
	entry entry.Entry
}

// decode treats bytes nobody wrote as the zero Entry: a miss, replaced by the
// next swap and never deleted.
func decode(raw []byte) snapshot {
	e, _ := entry.Decode(raw)
	return snapshot{raw, e}
}

func (st *store) now() entry.Time { return st.clock.now() }

// load returns the entry of name: the zero Entry for a missing or corrupt one,
// ErrUnavailable when the store cannot be asked.
func (st *store) load(ctx context.Context, name string) (snapshot, error) {
	raw, err := bounded(ctx, st.gate, func(ctx context.Context) ([]byte, error) {
		return st.cache.Load(ctx, name)
	}, nil)
	return decode(raw), err
}

type rule = func(entry.Entry, entry.Time) entry.Entry

// change applies rule to the entry until a swap succeeds or rule changes
// nothing. It starts from what was seen before and returns what is stored now.
func (st *store) change(ctx context.Context, name string, from snapshot, r rule) (snapshot, error) {
	return st.swap(ctx, name, from, r, st.cache.CompareAndSwap)
}

// quiet is an unexported face of a Cache: a swap that wakes nobody, for changes
// that nobody waits for. Without it a heartbeat would wake the whole fleet.
type quiet interface {
	swapQuietly(ctx context.Context, key string, old, next []byte, ttl time.Duration) ([]byte, error)
}

// changeQuietly is change without a wake-up, where the cache can do that.
func (st *store) changeQuietly(ctx context.Context, name string, from snapshot, r rule) (snapshot, error) {
	if q, ok := st.cache.(quiet); ok {
		return st.swap(ctx, name, from, r, q.swapQuietly)
	}
	return st.change(ctx, name, from, r)
}

func (st *store) swap(ctx context.Context, name string, from snapshot, r rule,
	cas func(context.Context, string, []byte, []byte, time.Duration) ([]byte, error),
) (snapshot, error) {
	for range 1000 { // every round somebody else's swap succeeded
		now := st.now()
		next := r(from.entry, now)
		if next == from.entry {
			return from, nil
		}
		next.Stamp = entry.NewNonce()
		raw, err := entry.Encode(next)
		if err != nil {
			return from, &outage{cause: err}
		}
		stored, err := bounded(ctx, st.gate, func(ctx context.Context) ([]byte, error) {
			return cas(ctx, name, from.raw, raw, next.TTL(now))
		}, nil)
		if err != nil {
			return from, err
		}
		if bytes.Equal(stored, raw) {
			return snapshot{raw, next}, nil
		}
		from = decode(stored)
	}
	return from, &outage{cause: errors.New("the value changes faster than it can be swapped")}
}

// ask is what a caller wants of acquire.
type ask struct {
	name, lock string // of entry and lock
	after      uint64 // the generation that will not do
	unread     bool   // it is alive, but sealed with a key that is not ours
	ahead      bool   // it is alive and in use
}

// shielded reports whether a session that cannot be read here must stay: others
// can, and one was replaced for that reason already.
func (a ask) shielded(e entry.Entry, now entry.Time) bool {
	return a.unread && e.Usable(0, now) && now < e.Unread
}

// lease is a lock with the attempt begun under it.
type lease struct {
	ask
	lock  Lock
	nonce entry.Nonce
	gen   uint64
	from  snapshot

	unsure bool // whether the attempt was begun: nobody answered

	mu    sync.Mutex
	until time.Time // local; lock and attempt live until then unless renewed
}

// acquire tries once, without waiting, to lead for a.name whose entry was seen to
// be free:
//
//	Found, Suppressed  it no longer is; the entry returned says what it holds
//	Lead               the lease is ours; end it with commit or abandon, then unlock
//	Free               somebody else holds the lock, or an attempt is open (Busy): wait
//
// Errors are ErrUnavailable. A lease returned with one is not to be led under but
// to be given back, once the caller has been told: that may take as long again.
func (st *store) acquire(ctx context.Context, a ask, from snapshot) (entry.Verdict, *lease, snapshot, error) {
	sent := time.Now()
	lock, err := bounded(ctx, st.lockGate, func(ctx context.Context) (Lock, error) {
		return st.locker.TryLock(ctx, a.lock, st.lockTTL)
	}, st.unlockLate)
	if errors.Is(err, ErrLocked) {
		return entry.Free, nil, from, nil
	}
	if err != nil {
		return entry.Free, nil, from, err
	}
	l := &lease{ask: a, lock: lock, nonce: entry.NewNonce(), until: sent.Add(st.lockTTL)}
	ctx = context.WithoutCancel(ctx) // what became of a begin must be known
	verdict, err := st.begin(ctx, l, from)
	switch {
	case err != nil:
		l.unsure = true
		return entry.Free, l, l.from, err
	case verdict == entry.Lead && !l.alive():
		if err := st.abandon(ctx, l); err != nil {
			l.unsure = true
			return entry.Free, l, l.from, err
		}
	case verdict == entry.Lead:
		return verdict, l, l.from, nil
	case verdict == entry.Refused:
		err = &outage{cause: errors.New("the store's clock is behind the session's generation")}
	}
	st.unlock(ctx, l)
	if verdict == entry.Busy || verdict == entry.Lead {
		verdict = entry.Free
	}
	return verdict, nil, l.from, err
}

func (st *store) begin(ctx context.Context, l *lease, from snapshot) (v entry.Verdict, err error) {
	q := entry.Ask{Nonce: l.nonce, After: l.after, Unread: l.unread, Ahead: l.ahead, Lease: st.lockTTL, Holder: st.holder}
	l.from, err = st.changeQuietly(ctx, l.name, from, func(e entry.Entry, now entry.Time) entry.Entry {
		e, v = st.rules.Begin(e, q, now)
		return e
	})
	l.gen = l.from.entry.Open.Gen
	return v, err
}

// alive reports whether the lease runs by our own clocks. The wall clock is
// asked as well: the monotonic one stands still while a machine is suspended.
func (l *lease) alive() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	return now.Before(l.until) && now.Round(0).Before(l.until.Round(0))
}

// renew extends lock and attempt, and reports whether the latter is still open. It
// is renewed even when the lock was lost: as long as it is open under our nonce
// nobody else begins one.
func (st *store) renew(ctx context.Context, l *lease) (open bool, err error) {
	sent := time.Now()
	_, lockErr := bounded(ctx, st.lockGate, func(ctx context.Context) (struct{}, error) {
		return struct{}{}, l.lock.Extend(ctx, st.lockTTL)
	}, nil)
	from, err := st.changeQuietly(ctx, l.name, l.from, func(e entry.Entry, now entry.Time) entry.Entry {
		open = e.Open.Gen == l.gen && e.Open.Nonce == l.nonce
		return entry.Renew(e, l.gen, l.nonce, st.lockTTL, now)
	})
	l.from = from
	if err == nil && open {
		l.mu.Lock()
		l.until = sent.Add(st.lockTTL)
		l.mu.Unlock()
	}
	if err == nil && !open {
		err = ErrNotHeld
	}
	return open, errors.Join(lockErr, err)
}

// commit ends the lease's attempt with res. While the store cannot be reached it
// tries again, at least every quarter of a second as far as the gate allows it,
// until the lease is over, because a login was paid for it.
func (st *store) commit(ctx context.Context, l *lease, res entry.Result) (v entry.Verdict, displaced entry.Session, now snapshot, err error) {
	var unanswered entry.Session // displaced by a swap that may have been executed
	st.gate.urge()
	for pause := 20 * time.Millisecond; ; {
		again := false
		now, err = st.change(ctx, l.name, l.from, func(e entry.Entry, t entry.Time) entry.Entry {
			next, d, verdict := st.rules.Commit(e, l.gen, l.nonce, res, t)
			displaced, v, again = d, verdict, next == e
			return next
		})
		if err == nil && again { // an earlier swap of ours did it
			displaced = unanswered
		}
		if err == nil || !errors.Is(err, ErrUnavailable) {
			return v, displaced, now, err
		}
		unanswered = displaced
		for allowed := false; !allowed; pause = min(2*pause, 250*time.Millisecond) {
			if !l.alive() || bound.Sleep(ctx, pause) != nil {
				return v, displaced, now, err
			}
			allowed = st.gate.retry()
		}
	}
}

// abandon gives up an attempt whose login was not sent, also when it is not
// known whether Begin was executed: the entry is written in any case, so that a
// Begin still on its way finds other bytes. An error means that it is not known
// to be given up; the attempt dies with its lease, and stays counted.
func (st *store) abandon(ctx context.Context, l *lease) error {
	ctx = context.WithoutCancel(ctx)
	from, err := st.load(ctx, l.name)
	if err != nil {
		return err
	}
	done := false
	l.from, err = st.change(ctx, l.name, from, func(e entry.Entry, now entry.Time) entry.Entry {
		switch {
		case e.Open.Nonce == l.nonce:
			e, _, _ = st.rules.Commit(e, e.Open.Gen, l.nonce, entry.Result{Class: entry.NotSent}, now)
		case l.unsure && !done:
			e.Keep = max(e.Keep+1, now)
		}
		done = true
		return e
	})
	return err
}

// giveBack ends what an attempt that was answered still holds. An error means
// that its attempt may still be open.
func (st *store) giveBack(ctx context.Context, l *lease) (err error) {
	if l.unsure {
		err = st.abandon(ctx, l)
	}
	st.unlock(ctx, l)
	return err
}

// unlock frees the lock whatever became of ctx; best effort, else it dies at
// its TTL.
func (st *store) unlock(ctx context.Context, l *lease) {
	ctx = context.WithoutCancel(ctx)
	_, _ = bounded(ctx, st.lockGate, func(ctx context.Context) (struct{}, error) {
		return struct{}{}, l.lock.Unlock(ctx)
	}, nil)
}

// unlockLate frees a lock that was granted after its caller had gone.
func (st *store) unlockLate(lock Lock) {
	ctx, cancel := context.WithTimeout(context.Background(), st.gate.timeout)
	defer cancel()
	_ = lock.Unlock(ctx)
}

// invalidate removes generation gen and returns the entry as it then is.
func (st *store) invalidate(ctx context.Context, name string, gen uint64) (snapshot, error) {
	from, err := st.load(ctx, name)
	if err != nil {
		return from, err
	}
	return st.drop(ctx, name, from, gen)
}

// drop is invalidate from what was seen.
func (st *store) drop(ctx context.Context, name string, from snapshot, gen uint64) (snapshot, error) {
	return st.change(ctx, name, from, func(e entry.Entry, now entry.Time) entry.Entry {
		return st.rules.Invalidate(e, gen, now)
	})
}

// touch extends the life of session gen of name to ttl from now, if it gains at
// least that much, and returns the entry as it then is. It wakes nobody: who uses
// the session touches it too, and sees.
func (st *store) touch(ctx context.Context, name string, from snapshot, gen uint64, ttl, least time.Duration) (snapshot, error) {
	return st.changeQuietly(ctx, name, from, func(e entry.Entry, now entry.Time) entry.Entry {
		return entry.Touch(e, gen, ttl, least, now)
	})
}

// watch returns a channel that receives after name has changed, or may have.
func (st *store) watch(name string) (changed <-chan struct{}, stop func()) {
	ch := make(chan struct{}, 1)
	if st.watcher == nil {
		return ch, func() {}
	}
	return ch, st.watcher.Watch(name, func() {
		select {
		case ch <- struct{}{}:
		default: // one look serves all changes before it
		}
	})
}

// within is [bound.Call] for a func that may be the user's.
func within[T any](ctx context.Context, d time.Duration, op func(context.Context) (T, error), late func(T)) (T, error) {
	return bound.Call(ctx, d, func(ctx context.Context) (T, error) {
		return protect(func() (T, error) { return op(ctx) })
	}, late)
}

// bounded is within for a call of the store, let through by g: errors match
// ErrUnavailable, except the Locker's own verdicts and the end of ctx.
func bounded[T any](ctx context.Context, g *gate, op func(context.Context) (T, error), late func(T)) (T, error) {
	start, ok, last := g.enter()
	if !ok {
		var zero T
		return zero, &outage{cause: last, refused: true}
	}
	v, err := within(ctx, g.timeout, op, late)
	switch {
	case err == nil, errors.Is(err, ErrLocked), errors.Is(err, ErrNotHeld):
		g.passed(start, nil)
		return v, err
	case ctx.Err() != nil: // what the store would have said nobody has waited for
		g.passed(start, context.Canceled)
		return v, err
	}
	g.passed(start, err)
	return v, &outage{cause: err}
}

// outage is the cause of an ErrUnavailable. Its text does not print the cause,
// unless it is known to quote nothing: a store may quote what it was given, and
// that holds a token.
type outage struct {
	cause   error
	refused bool // by the gate: the cause is what the store said last
	lasting bool // nothing a next call would find otherwise
}

func (e *outage) Error() string {
	var (
		told *toldError
		nerr net.Error
	)
	s := "lock or cache unavailable"
	if e.refused {
		s += ", not asked again yet"
	}
	switch {
	case errors.As(e.cause, &told):
		return s + ": " + told.Error()
	case errors.Is(e.cause, bound.ErrTimeout), errors.As(e.cause, &nerr):
		return s + ": " + e.cause.Error()
	}
	return fmt.Sprintf("%s: failed (%T)", s, e.cause)
}

func (e *outage) Unwrap() []error { return []error{ErrUnavailable, e.cause} }

// toldError is an error of our own backends, with a text that quotes no value.
type toldError struct {
	text     string
	err      error
	answered bool // by a server that works: only this request was refused
}

func (e *toldError) Error() string { return e.text }
func (e *toldError) Unwrap() error { return e.err }

// storeClock is the store's time: our own plus the offset last learnt. It runs
// on the monotonic clock, so a step of this host's wall clock does not move it.
type storeClock struct {
	face Clock // nil: our own wall clock is the store's
	gate *gate

	mu      sync.Mutex
	local   time.Time // when it was learnt; zero: never
	remote  time.Time
	reading *clockReading // under way; nil: none is
}

// clockReading is one reading of the store's clock, for all who wait for it.
type clockReading struct {
	over chan struct{}
	err  error // set before over is closed
}

const (
	relearn = 5 * time.Minute
	parted  = time.Second // wall and monotonic clock disagree by this: relearn
)

func (c *storeClock) now() entry.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.local.IsZero() {
		return entry.Time(time.Now().UnixMicro())
	}
	return entry.Time(c.remote.Add(time.Since(c.local)).UnixMicro())
}

// learn reads the store's clock if that is due, one reading at a time. Only the
// first is waited for and must succeed; later ones go on beside their caller,
// for an offset that is minutes old is better than none.
func (c *storeClock) learn(ctx context.Context, spawn func(func())) error {
	if c.face == nil {
		return nil
	}
	c.mu.Lock()
	known, due, reading := !c.local.IsZero(), c.due(), c.reading
	if due && reading == nil {
		c.reading = &clockReading{over: make(chan struct{})}
	}
	c.mu.Unlock()
	switch {
	case !due, known && reading != nil:
		return nil
	case known:
		spawn(func() { _ = c.read(context.WithoutCancel(ctx)) })
		return nil
	case reading == nil:
		return c.read(ctx)
	}
	select {
	case <-reading.over:
		if errors.Is(reading.err, ErrUnavailable) {
			return reading.err
		}
		return c.learn(ctx, spawn) // learnt, or its reader left
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// read is the reading that learn has announced.
func (c *storeClock) read(ctx context.Context) error {
	sent := time.Now()
	remote, err := bounded(ctx, c.gate, c.face.Now, nil)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.reading.err = err
	close(c.reading.over)
	c.reading = nil
	if err == nil {
		c.local = time.Now()
		c.remote = remote.Add(c.local.Sub(sent) / 2)
	}
	return err
}

// due reports whether a reading is. c.mu is held.
func (c *storeClock) due() bool {
	if c.local.IsZero() {
		return true
	}
	mono, wall := time.Since(c.local), time.Now().Round(0).Sub(c.local.Round(0))
	return mono > relearn || (mono-wall).Abs() > parted
}

// toLocal turns a time of the store into one of this process.
func (c *storeClock) toLocal(t entry.Time) time.Time {
	return time.Now().Add(t.Sub(c.now()))
}

// toStore turns a time of this process into one of the store.
func (c *storeClock) toStore(t time.Time) entry.Time {
	return c.now().Add(time.Until(t))
}
