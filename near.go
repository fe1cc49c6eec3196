// near.go is what one process knows of a key, kept beside client.go so that the
// algorithm there reads without mutexes and timers.

package sessionlock

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sessionlock/sessionlock/internal/entry"
)

// local is what this process knows of one key: a near copy of its session, what
// it knows to be dead, and the attempt that runs for it.
//
//	no copy ──land──▶ copy ──expiry, rejection, logout, eviction, 2 quiet ages──▶ no copy
//	                   │▲
//	                   └┘ looked at again: on a wake-up, after a resubscription,
//	                      and once per age while it is used
//
// A look that fails keeps the copy until it expires: an outage of the store ends
// no session.
type local struct {
	c       *Client
	key, id string
	place   place // where nothing but the key decides it

	copy atomic.Pointer[nearCopy]
	hits atomic.Uint64 // near hits; also tells whether the copy is used

	mu      sync.Mutex
	attempt *attempt
	before  <-chan struct{} // closed when the last attempt has freed its lock
	floor   uint64          // nothing at or below it is kept: rule R2
	own     ownCount
	behind  <-chan struct{} // closed when a login that was left behind returns
	gone    bool            // evicted or closed: keeps nothing any more

	reviewed, asked uint64 // hits when last reviewed, and when last asked to leave
	timer           *time.Timer
	watched         string // name of the entry under watch
	unwatch         func()
	looking, again  bool // a look is under way; another is wanted after it
}

// nearCopy is a session this process holds. It is dropped by a timer rather than
// compared with the clock at each hit, which would be most of a hit's cost. A
// timer that comes late, after a suspend for instance, serves a session past
// its expiry; the upstream rejects it and it is repaired once.
type nearCopy struct {
	session Session
	name    string    // of its entry
	until   time.Time // by this process's clock
}

// lookGap is the least time between two looks that wake-ups cause.
const lookGap = 10 * time.Millisecond

func (c *Client) newLocal(key string) *local {
	over := make(chan struct{})
	close(over)
	return &local{c: c, key: key, id: c.KeyID(key), place: c.placeOf(key, "", key), before: over, behind: over, asked: ^uint64(0)}
}

func (c *Client) nearCopy(s Session, name string, stored entry.Session) *nearCopy {
	return &nearCopy{session: s, name: name, until: c.store.clock.toLocal(stored.Expires)}
}

// hit returns the near copy, if there is one.
func (l *local) hit() (Session, bool) {
	n := l.copy.Load()
	if n == nil {
		return Session{}, false
	}
	l.hits.Add(1)
	return n.session, true
}

// reject records that every generation up to gen is dead. l.mu is held.
func (l *local) reject(gen uint64) {
	l.floor = max(l.floor, gen)
	if n := l.copy.Load(); n != nil && n.session.Generation() <= l.floor {
		l.drop()
	}
}

// dead returns the highest generation known to be rejected.
func (l *local) dead() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.floor
}

// leave takes one caller off a. The last one ends it, unless its login is sent:
// that one is finished and stored.
func (l *local) leave(a *attempt) {
	l.mu.Lock()
	defer l.mu.Unlock()
	a.callers--
	if a.callers > 0 || a.sent {
		return
	}
	if l.attempt == a {
		l.attempt = nil // who comes now starts another
	}
	a.cancel(context.Canceled)
}

// send marks a's login as sent: from now on nobody who leaves ends it. Whether
// somebody had before, a's context tells.
func (l *local) send(a *attempt) {
	l.mu.Lock()
	defer l.mu.Unlock()
	a.sent = true
}

// land ends a, and keeps the session it brought.
func (l *local) land(a *attempt) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.attempt == a {
		l.attempt = nil
	}
	if a.err == nil && a.near != nil {
		l.keep(a.near)
	}
}

// mayLogin reports, as a *LoginError, why this process must not send a login
// although the entry would let it.
func (l *local) mayLogin(e entry.Entry, now entry.Time) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-l.behind:
	default:
		return &LoginError{Class: LoginUnknown, id: l.id, Err: fmt.Errorf("%w: the last login has not returned yet", ErrSuppressed)}
	}
	if l.own.forbids(e, now, l.c.store.rules) {
		return &LoginError{
			Class: LoginUnknown, Attempts: l.own.failed, Until: l.c.store.clock.toLocal(l.own.until), id: l.id,
			Err: fmt.Errorf("%w: the store has lost its count", ErrSuppressed),
		}
	}
	return nil
}

// failed counts a login against this process's own budget, forgive clears it.
func (l *local) failed(now entry.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.own.add(now, l.c.store.rules)
}

func (l *local) forgive() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.own = ownCount{}
}

func (l *local) leaveBehind(ended <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.behind = ended
}

// keep stores n near and watches its entry. l.mu is held.
func (l *local) keep(n *nearCopy) {
	old := l.copy.Load()
	if l.gone || l.c.nearMax == 0 || n.session.Generation() <= l.floor ||
		(old != nil && old.session.Generation() > n.session.Generation()) {
		return
	}
	l.copy.Store(n)
	if l.watched != n.name {
		l.stopWatching()
		if w := l.c.store.watcher; w != nil {
			l.watched, l.unwatch = n.name, w.Watch(n.name, l.changed)
		}
	}
	l.schedule(n)
}

// schedule sets the timer for the next review: at the copy's end or after an
// age, a tenth of it early at the most so that a fleet does not look in step.
func (l *local) schedule(n *nearCopy) {
	age := l.c.nearAge
	age -= rand.N(age/10 + 1) //nolint:gosec // jitter, not a secret
	d := min(time.Until(n.until), age)
	if l.timer == nil {
		l.timer = time.AfterFunc(d, l.review)
		return
	}
	l.timer.Reset(d)
}

// drop forgets the near copy. l.mu is held.
func (l *local) drop() {
	l.copy.Store(nil)
	l.stopWatching()
	if l.timer != nil {
		l.timer.Stop()
	}
}

func (l *local) stopWatching() {
	if l.unwatch != nil {
		l.unwatch()
	}
	l.watched, l.unwatch = "", nil
}

// review drops a copy that has expired or was not used for an age, and looks
// again at one that was, off every caller's path.
func (l *local) review() {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := l.copy.Load()
	if n == nil {
		return
	}
	hits := l.hits.Load()
	if used := hits != l.reviewed; !used || !time.Now().Before(n.until) {
		l.drop()
		return
	}
	l.reviewed = hits
	l.lookAgain()
	l.schedule(n)
}

// changed is the wake-up of the entry's watch.
func (l *local) changed() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lookAgain()
}

// lookAgain starts a look at the entry, or has the one under way repeated.
// l.mu is held.
func (l *local) lookAgain() {
	if l.copy.Load() == nil {
		return
	}
	if l.looking {
		l.again = true
		return
	}
	l.looking, l.again = true, false
	l.c.looks.add(l)
}

// look looks at the entry once and then rests for a gap, so that wake-ups, forged
// ones too, cost one look per key and gap.
func (l *local) look() {
	if n := l.copy.Load(); n != nil {
		l.lookAt(l.c.base, n)
	}
	time.AfterFunc(lookGap, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.looking = false
		if l.again {
			l.lookAgain()
		}
	})
}

// looks are the near copies waiting to be compared with the store. Few at a
// time: when a server comes back every copy is wanted at once, and callers need
// its connections too.
type looks struct {
	mu      sync.Mutex
	waiting []*local
	workers int
}

const maxLooks = 4

func (q *looks) add(l *local) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.waiting = append(q.waiting, l)
	if q.workers < maxLooks && l.c.enter() {
		q.workers++
		go q.work(&l.c.running)
	}
}

func (q *looks) work(running *sync.WaitGroup) {
	defer running.Done()
	for {
		q.mu.Lock()
		if len(q.waiting) == 0 {
			q.workers--
			q.waiting = nil
			q.mu.Unlock()
			return
		}
		l := q.waiting[0]
		q.waiting = q.waiting[1:]
		q.mu.Unlock()
		l.look()
	}
}

// lookAt compares n with the entry: extended, replaced, or gone.
func (l *local) lookAt(ctx context.Context, n *nearCopy) {
	c := l.c
	seen, err := c.store.load(ctx, n.name)
	if err != nil {
		_ = c.failed(ctx, l, err)
		return
	}
	stored := seen.entry.Session
	next := *n
	ok := seen.entry.Usable(0, c.store.now())
	if ok && stored.Gen != n.session.Generation() {
		p, err := c.place(ctx, l)
		if ok = err == nil; ok {
			next.session, ok = c.open(ctx, p, stored)
		}
	}
	next.until = c.store.clock.toLocal(stored.Expires)
	l.mu.Lock()
	defer l.mu.Unlock()
	switch now := l.copy.Load(); {
	case now == nil || now.session.Generation() != n.session.Generation(): // changed meanwhile
	case !ok:
		l.drop()
	default:
		l.keep(&next)
	}
}

// close ends what this process does for the key: the near copy, and an attempt
// whose login was not sent.
func (l *local) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.gone = true
	l.drop()
	if a := l.attempt; a != nil && !a.sent {
		a.cancel(fmt.Errorf("%w: session %s", ErrClosed, l.id))
	}
}

// Evict implements near.Entry: the least used leave when there are too many.
// What they knew to be dead leaves with them, so the worst that follows is that
// a store set back to an older state is believed once more.
func (l *local) Evict() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	hits := l.hits.Load()
	idle := hits == l.asked && l.attempt == nil && !l.looking
	l.asked = hits
	select {
	case <-l.behind:
	default:
		idle = false
	}
	if idle {
		l.gone = true
		l.drop()
		l.c.stats.evicted.Add(hits)
	}
	return idle
}
