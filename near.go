// near.go is what one process knows of a key, kept beside client.go so that the
// algorithm there reads without mutexes and timers.

package sessionlock

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
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
//	                      once per age while it is used, and to be touched
//
// A look that fails keeps the copy until it expires: an outage of the store ends
// no session. A copy that is used is renewed before that (rule R7), by an attempt
// of its own beside the one that callers wait for.
type local struct {
	c       *Client
	key, id string
	place   place // where nothing but the key decides it

	copy atomic.Pointer[nearCopy]
	used atomic.Uint32 // since when the copy was hit: a bit for each who wants to know
	idle atomic.Bool   // the next look is to touch the session

	mu      sync.Mutex
	attempt *attempt
	ahead   *attempt        // to renew the copy before it ends
	before  <-chan struct{} // closed when the last attempt has freed its lock
	floor   rejection       // nothing of that entry at or below it is kept: rule R2
	owed    []*lease        // attempts that may be open in the store and were given up
	own     ownCount
	behind  <-chan struct{} // closed when a login that was left behind returns
	ended   [8]uint64       // the generations that were logged out last
	saying  string          // what was last said of the key in the log and lasts
	gone    bool            // evicted or closed: keeps nothing any more

	timer          *time.Timer
	judged, calm   time.Time // when it was last asked whether the copy is used; before when calmOf is not renewed
	calmOf         uint64    // a generation
	told           time.Time // when the next use was last made to touch the session
	watched        string    // name of the entry under watch
	unwatch        func()
	looking, again bool      // a look is under way; another follows
	looked, wanted time.Time // when the last look began, and was last asked for
}

// nearCopy is a session this process holds. It is dropped by a timer rather than
// compared with the clock at each hit, which would be most of a hit's cost. A
// timer that comes late, after a suspend for instance, serves a session past
// its expiry; the upstream rejects it and it is repaired once.
type nearCopy struct {
	session Session
	name    string    // of its entry
	until   time.Time // by this process's clock
	renew   time.Time // ahead of that; zero: not
}

// The bits of local.used. A hit sets all and writes only when one is not set:
// writing one word from all cores would cost more than the rest of a hit.
const (
	usedSinceJudged = 1 << iota
	usedSinceAsked  // to leave
	usedSinceKept   // this generation
	usedSinceTouched
	usedSinceAll = 1<<iota - 1
)

// lookGap is the least time between two looks that wake-ups cause.
const lookGap = 10 * time.Millisecond

func (c *Client) newLocal(key string) *local {
	over := make(chan struct{})
	close(over)
	l := &local{c: c, key: key, id: c.KeyID(key), place: c.placeOf(key, "", key), before: over, behind: over}
	l.used.Store(usedSinceAsked | usedSinceTouched) // it was, just now
	return l
}

// nearCopy returns s to be kept near. When it is to be renewed is jittered by a
// tenth of the window, so that a fleet does not ask in step; and a window as long
// as the session's life, which began with its generation, would renew without end.
// Use does not move the end that counts here.
func (c *Client) nearCopy(s Session, name string, stored entry.Session) *nearCopy {
	n := &nearCopy{session: s, name: name, until: c.store.clock.toLocal(stored.Expires)}
	if w := min(c.aheadOf, stored.End.Sub(entry.Time(s.Generation()))/2); w > 0 {
		n.renew = c.store.clock.toLocal(stored.End).Add(-w*9/10 - rand.N(w/5+1)) //nolint:gosec // jitter, not a secret
	}
	return n
}

// hit returns the near copy, if there is one.
func (l *local) hit() (Session, bool) {
	n := l.copy.Load()
	if n == nil {
		return Session{}, false
	}
	l.hitOnce()
	return n.session, true
}

// hitOnce notes a near hit.
func (l *local) hitOnce() {
	if l.used.Load() != usedSinceAll {
		if l.used.Swap(usedSinceAll)&usedSinceTouched == 0 {
			l.idle.Store(true)
			l.changed()
		}
	}
	l.c.stats.near.add()
}

// reject records that in one entry every generation up to one is dead, and reports
// whether that is news. l.mu is held.
func (l *local) reject(no rejection) bool {
	if no.gen == 0 || no.gen <= l.floor.in(no.name) {
		return false
	}
	l.floor = rejection{name: no.name, gen: max(no.gen, l.floor.in(no.name))}
	if n := l.copy.Load(); n != nil && n.session.Generation() <= l.floor.in(n.name) {
		l.drop()
	}
	return true
}

// condemn is reject for who does not hold l.mu.
func (l *local) condemn(no rejection) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.reject(no)
}

// dead returns the highest generation of an entry that is known to be rejected.
func (l *local) dead(name string) uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.floor.in(name)
}

// loggedOut ends this process's part in a session that was logged out: the
// attempt under way is left to its callers, for its login will be stale, and
// who comes now starts another. With lost, the near copy is dropped and returned
// if it is of that entry: the store no longer knew the session.
func (l *local) loggedOut(name string, lost bool) (s Session, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.attempt, l.ahead = nil, nil
	n := l.copy.Load()
	if !lost || n == nil || n.name != name {
		return Session{}, false
	}
	l.reject(rejects(n.session))
	return n.session, true
}

// ends reports whether gen is still to be logged out by this process, for it is now. A
// session without a generation was never given out, so only one knows of it.
func (l *local) ends(gen uint64) bool {
	if gen == 0 {
		return true
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if slices.Contains(l.ended[:], gen) {
		return false
	}
	copy(l.ended[1:], l.ended[:])
	l.ended[0] = gen
	return true
}

// forsake leaves a to those who wait for it already.
func (l *local) forsake(a *attempt) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.attempt == a {
		l.attempt = nil
	}
}

// said reports whether what was what this key was last said of, and notes it.
func (l *local) said(what string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	last := l.saying
	l.saying = what
	return last == what
}

// owe remembers attempts that could not be given back.
func (l *local) owe(held ...*lease) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.owed = append(l.owed, held...)
}

// owesStill reports whether something owed is still counted: what is older than
// the window is not. l.mu is held.
func (l *local) owesStill() bool {
	for _, held := range l.owed {
		held.mu.Lock()
		until := held.until
		held.mu.Unlock()
		if time.Since(until) < l.c.window {
			return true
		}
	}
	return false
}

func (l *local) owing() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.owed) > 0
}

// repay gives back what is owed, now that the store answers again, and returns
// the entry called name as it then is. Before all is given back nothing is begun:
// only the attempt that is open can be uncounted.
func (l *local) repay(ctx context.Context, st *store, name string, seen snapshot) (snapshot, error) {
	l.mu.Lock()
	owed := l.owed
	l.owed = nil
	l.mu.Unlock()
	for i, held := range owed {
		if err := st.abandon(ctx, held); err != nil {
			l.owe(owed[i:]...)
			return seen, err
		}
		if held.name == name {
			seen = held.from
		}
	}
	return seen, nil
}

// leave takes one caller off a. The last one ends it, unless its login is sent:
// that one is finished and stored.
func (l *local) leave(a *attempt) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.left(a)
}

// leaveUnsent is leave for who does not wait for somebody else any longer, but
// does for a login of this process; it reports whether there was none.
func (l *local) leaveUnsent(a *attempt) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !a.sent {
		l.left(a)
	}
	return !a.sent
}

// left is leave with l.mu held.
func (l *local) left(a *attempt) {
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
	if l.ahead == a {
		l.ahead = nil
	}
	renews := a.ahead.gen != 0
	if renews && a.err != nil {
		l.calmDown(a.ahead.gen, a.err)
	}
	if a.err != nil || a.near == nil {
		return
	}
	l.keep(a.near, !renews)
	if n := a.near; !renews && l.renewable(n, time.Now()) { // adopted so late; or there is no copy whose timer would
		l.c.renew(l, n)
	}
}

// put keeps n, which came from outside.
func (l *local) put(n *nearCopy) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.keep(n, true)
}

// calmDown has generation gen not renewed for a while, because that has just
// failed, or is made by another process, which may die. l.mu is held.
func (l *local) calmDown(gen uint64, err error) {
	ttl := l.c.lockTTL
	l.calmOf, l.calm = gen, time.Now().Add(ttl/2+rand.N(ttl/2+1))      //nolint:gosec // jitter, not a secret
	if failed, ok := err.(*LoginError); ok && !failed.Until.IsZero() { //nolint:errorlint // ours
		l.calm = failed.Until.Add(rand.N(lookGap)) //nolint:gosec // as above
	}
	if n := l.copy.Load(); n != nil {
		l.schedule(n)
	}
}

// renewAt returns when n is to be renewed. l.mu is held.
func (l *local) renewAt(n *nearCopy) time.Time {
	if l.calmOf == n.session.Generation() && l.calm.After(n.renew) {
		return l.calm
	}
	return n.renew
}

// renewable reports whether n is to be renewed now. l.mu is held.
func (l *local) renewable(n *nearCopy, now time.Time) bool {
	return !n.renew.IsZero() && !now.Before(l.renewAt(n)) && now.Before(n.until)
}

// mayLogin reports, as a *LoginError, why this process must not send a login
// although the entry would let it.
func (l *local) mayLogin(name string, e entry.Entry, now entry.Time) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-l.behind:
	default:
		return &LoginError{Class: LoginUnknown, id: l.id, Err: fmt.Errorf("%w: the last login has not returned yet", ErrSuppressed)}
	}
	if l.own.forbids(name, e, now, l.c.store.rules) {
		return &LoginError{
			Class: loginClass(l.own.class), Attempts: l.own.failed, Until: l.c.store.clock.toLocal(l.own.until), id: l.id,
			Err: fmt.Errorf("%w: the store does not remember, this process does", ErrSuppressed),
		}
	}
	return nil
}

// count counts a login that failed against this process's own budget, forgive
// clears it.
func (l *local) count(name string, class entry.Class, recorded bool) {
	if class == entry.Deferred || class == entry.NotSent {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.own.add(name, class, recorded, l.c.store.now(), l.c.store.rules)
}

func (l *local) forgive() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.own, l.calm = ownCount{}, time.Time{}
}

func (l *local) leaveBehind(ended <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.behind = ended
}

// keep stores n near and watches its entry; used: a caller wanted it. l.mu is
// held.
func (l *local) keep(n *nearCopy, used bool) {
	old := l.copy.Load()
	if l.gone || l.c.nearMax == 0 || n.session.Generation() <= l.floor.in(n.name) ||
		(old != nil && old.name == n.name && old.session.Generation() > n.session.Generation()) {
		return
	}
	switch {
	case old == nil:
		l.judged, l.told = time.Now(), time.Now()
		fallthrough
	case old.session.Generation() != n.session.Generation():
		l.used.And(^uint32(usedSinceKept))
		if old != nil && old.session.Token.equal(n.session.Token) && n.until.Sub(old.until) < l.c.aheadOf {
			n.renew = time.Time{} // the upstream gives no other before this one ends
		}
	case !n.renew.IsZero(): // drawn once: each look would have another chance to be late
		n.renew = old.renew
	}
	l.copy.Store(n)
	if used {
		l.used.Or(usedSinceKept)
	}
	if l.watched != n.name {
		l.stopWatching()
		if w := l.c.store.watcher; w != nil {
			l.watched, l.unwatch = n.name, w.Watch(n.name, l.changed)
			l.lookLater(lookGap) // something may have changed between the look that brought n and the watch
		}
	}
	l.schedule(n)
}

// schedule sets the timer for the next review: at the copy's end, after an age (a
// tenth of it early at the most so that a fleet does not look in step), when it
// is to be renewed, and when its next use is worth a touch. l.mu is held.
func (l *local) schedule(n *nearCopy) {
	now, age := time.Now(), l.c.nearAge
	age -= rand.N(age/10 + 1) //nolint:gosec // jitter, not a secret
	d := min(n.until.Sub(now), l.judged.Add(age).Sub(now))
	if !n.renew.IsZero() {
		renew := l.renewAt(n).Sub(now)
		if renew <= 0 { // nobody has used it yet, or an attempt runs
			renew = n.until.Sub(n.renew)/10 + time.Millisecond
		}
		d = min(d, renew)
	}
	if l.c.idle > 0 {
		d = min(d, l.told.Add(l.c.idle/10).Sub(now))
	}
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

// review is what the timer does, off every caller's path: it drops a copy that has
// expired or was not used for an age, looks again at one that was, renews one
// whose end is near, and has the next use touch it.
func (l *local) review() {
	l.mu.Lock()
	defer l.mu.Unlock()
	n, now := l.copy.Load(), time.Now()
	if n == nil {
		return
	}
	if !now.Before(n.until) {
		l.drop()
		return
	}
	if now.Sub(l.judged) >= l.c.nearAge*9/10 {
		l.judged = now
		if l.used.And(^uint32(usedSinceJudged))&usedSinceJudged == 0 {
			l.drop()
			return
		}
		l.changed()
	}
	if l.renewable(n, now) && l.used.Load()&usedSinceKept != 0 {
		l.c.renew(l, n)
	}
	if l.c.idle > 0 && now.Sub(l.told) >= l.c.idle/10 {
		l.told = now
		l.used.And(^uint32(usedSinceTouched))
	}
	l.schedule(n)
}

// changed has the copy compared with the entry soon. It is the wake-up of the
// entry's watch, so it takes none of l's locks.
func (l *local) changed() { l.c.looks.add(l) }

// look compares the copy with the entry, once per gap: wake-ups, forged ones too,
// cost no more.
func (l *local) look() {
	l.mu.Lock()
	n, wait := l.copy.Load(), lookGap-time.Since(l.looked)
	if n == nil || l.gone || l.looking || wait > 0 {
		if n != nil && !l.gone {
			l.lookLater(max(wait, lookGap))
		}
		l.mu.Unlock()
		return
	}
	l.looking, l.looked = true, time.Now()
	l.mu.Unlock()
	l.lookAt(l.c.base, n)
	l.mu.Lock()
	l.looking = false
	l.mu.Unlock()
}

// lookLater has a look follow after d, one for all who ask until then, unless one
// has begun by then. l.mu is held.
func (l *local) lookLater(d time.Duration) {
	l.wanted = time.Now()
	if l.again {
		return
	}
	l.again = true
	time.AfterFunc(d, func() {
		l.mu.Lock()
		l.again = false
		done := l.looked.After(l.wanted)
		l.mu.Unlock()
		if !done {
			l.changed()
		}
	})
}

// looks are the near copies waiting to be compared with the store. Few at a
// time: when a server comes back every copy is wanted at once, and callers need
// its connections too.
type looks struct {
	mu      sync.Mutex
	queued  map[*local]struct{} // what is in waiting
	waiting []*local
	workers int
}

const maxLooks = 4

func (q *looks) add(l *local) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if _, ok := q.queued[l]; ok {
		return
	}
	if q.queued == nil {
		q.queued = map[*local]struct{}{}
	}
	q.queued[l] = struct{}{}
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
		delete(q.queued, l)
		q.mu.Unlock()
		l.look()
	}
}

// lookAt compares n with the entry: extended, replaced, or gone.
func (l *local) lookAt(ctx context.Context, n *nearCopy) {
	c := l.c
	seen, err := c.store.load(ctx, n.name)
	if err == nil && l.idle.Swap(false) {
		seen, err = c.touch(ctx, n.name, seen, n.session.Generation())
	}
	if err != nil {
		_ = c.failed(ctx, l, err)
		return
	}
	stored, s := seen.entry.Session, n.session
	ok := seen.entry.Usable(0, c.store.now())
	if ok && stored.Gen != s.Generation() {
		p, bad := l.place, error(nil)
		p.entry = n.name
		s, bad = c.open(p, stored)
		ok = bad == nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	switch now := l.copy.Load(); {
	case now == nil || now.session.Generation() != n.session.Generation(): // changed meanwhile
	case !ok:
		l.drop()
	default:
		if t := c.store.now(); t >= c.store.rules.Suppression(seen.entry, t).Until { // by Unsuppress, perhaps
			l.calm = earlier(l.calm, time.Now().Add(c.lockTTL))
		}
		l.keep(c.nearCopy(s, n.name, stored), false)
	}
}

// close drops the near copy for good.
func (l *local) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.gone = true
	l.drop()
}

// endUnsent ends a for Close, unless its login is sent.
func (l *local) endUnsent(a *attempt) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !a.sent {
		a.cancel(fmt.Errorf("%w: session %s", ErrClosed, l.id))
	}
}

// Evict implements near.Entry: the least used leave when there are too many, but
// not while they count failed logins. What they knew to be dead leaves with them,
// so the worst that follows is that a store set back to an older state is
// believed once more.
func (l *local) Evict() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	idle := l.used.And(^uint32(usedSinceAsked))&usedSinceAsked == 0 && l.attempt == nil && l.ahead == nil && !l.looking && !l.owesStill() &&
		(l.own.failed == 0 || l.c.store.now() >= l.own.until)
	for _, busy := range []<-chan struct{}{l.behind, l.before} {
		select {
		case <-busy:
		default:
			idle = false
		}
	}
	if idle {
		l.gone = true
		l.drop()
	}
	return idle
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}
