// Package entry holds the small value that sessionlock keeps in a store for
// every key, and the rules by which it changes.
//
// The entry says which generation of a session is stored, which one is being
// made and by whom, how many logins failed and until when nobody tries again.
// It changes only by compare-and-swap: a loop in the caller loads it, applies
// one of the rules below, swaps the outcome in, and starts over with what it
// was shown when somebody was faster. So every rule is a pure function
//
//	(entry, arguments, store time) → (entry, verdict)
//
// without I/O, the same for every backend, and the model checker among this
// package's tests runs these very functions.
//
// # States
//
// Two things live side by side in an entry and neither may touch the other:
//
//	session   absent ──commit, put──▶ stored ──invalidate, clear, expiry──▶ absent
//	attempt   none ──begin──▶ open ──commit (session or failure)──▶ none
//
// A stored session stays readable while the next one is made. An attempt is
// open under a nonce and a lease: the lease says that its leader lives, the
// nonce says whose commit counts. Every failure of a step ends in one of:
//
//   - The leader dies: its lease runs out, the next Begin opens a higher
//     generation. The attempt stays counted.
//   - The leader is overtaken: its Commit finds another nonce, or no entry at
//     all, writes nothing, and reports Stale.
//   - A reply is lost and the request repeated: Begin finds its own nonce and
//     leads the same generation; Commit finds its generation stored, or closed
//     under its own nonce, and reports Stored again. Nothing counts twice.
//   - The entry is lost: generations go on growing, because they start from the
//     store's time; counts are lost with it.
//
// # Times
//
// All times are the store's, in microseconds, and are arguments: no rule reads
// a clock. Generations grow from the same time, never by a counter, so that a
// store which forgot its last write cannot issue a number twice.
package entry

import (
	"crypto/rand"
	"time"

	"github.com/sessionlock/sessionlock/internal/epoch"
)

// Time is the store's time in microseconds since 1970. It fits the 53 bits a
// double carries exactly until the year 2255.
type Time int64

// Add returns t + d, rounded down to a microsecond.
func (t Time) Add(d time.Duration) Time { return t + Time(d/time.Microsecond) }

// Sub returns t - u.
func (t Time) Sub(u Time) time.Duration { return time.Duration(t-u) * time.Microsecond }

// Nonce is a random identity: of an attempt, or of one version of an entry.
type Nonce [16]byte

// NewNonce returns a fresh random nonce.
func NewNonce() (n Nonce) {
	_, _ = rand.Read(n[:]) // never fails, crypto/rand documents
	return n
}

// Entry is the value of one key. It is comparable and immutable: the rules take
// it by value and return another. The zero Entry is that of a key nobody ever
// logged in.
type Entry struct {
	Stamp    Nonce // fresh at every write: no two values of a key are equal (no ABA)
	Born     Time  // when the entry was first written; what is older it cannot remember
	Keep     Time  // the latest time anything in it matters; only ever grows
	Gen      uint64
	Open     Attempt
	Done     Closed
	Session  Session
	Proven   Time   // from here on the stored session counts as good; 0: that was acted on, or none is stored
	Attempts uint32 // logins in the window that did not succeed, open ones included
	Window   Time   // when Attempts starts from zero again
	Failure  Failure
	Young    uint32 // consecutive sessions rejected before they were proven
	Unread   Time   // until then nobody replaces a session only because he cannot read it
	Calm     Time   // until then the stored session is not renewed ahead of time
}

// Attempt is a login being made. Gen 0: none.
type Attempt struct {
	Gen          uint64
	Nonce        Nonce
	Since, Lease Time   // begun; held until, unless renewed
	Holder       string // who, for operators; at most MaxHolder bytes
}

// Closed remembers the last attempt that was committed, so that a repeated
// commit is recognised.
type Closed struct {
	Gen   uint64
	Nonce Nonce
}

// Session is a stored session. Gen 0: none. Record is opaque here.
//
// One with a Refresh later than its Expires outlives it: nobody uses it any
// more, but the next leader may start from what it carries.
type Session struct {
	Gen     uint64
	Record  string
	Expires Time // usable before this; 0: it was rejected
	End     Time // Touch never extends Expires past this; 0: no such bound
	Refresh Time // may be refreshed before this; 0: only while it is usable
}

// Class says what is known of a login that gave no session.
type Class uint8

// The classes of a failure.
const (
	None     Class = iota
	Denied         // credentials evaluated and refused
	Deferred       // never evaluated: not counted
	Unknown        // may have been evaluated: counted
	Rejected       // logins succeed, but their sessions are refused while young
	NotSent        // the attempt was given up before its login was sent: neither counted nor recorded
)

// Failure is the record that suppresses logins before Until. Streak counts
// failures since the last success and drives the back-off.
type Failure struct {
	Class  Class
	Until  Time
	Streak uint8
}

// Rules are the numbers the rules work with, the same in the whole fleet.
type Rules struct {
	Budget  int           // logins without success per window
	Window  time.Duration // of the budget, and of a denial
	Retry   Backoff       // after a deferred or unknown outcome
	Reject  Backoff       // after the second young rejection in a row
	Proving time.Duration // a session is young for this long, or a quarter of its life
}

// Backoff doubles from Min to Max. Its zero value never waits.
type Backoff struct{ Min, Max time.Duration }

// Delay is the wait after n earlier failures: Min·2ⁿ, at most Max.
func (b Backoff) Delay(n int) time.Duration {
	d := b.Min
	for ; n > 0 && d < b.Max; n-- {
		d *= 2
	}
	return min(d, b.Max)
}

// Verdict is a rule's answer.
type Verdict uint8

// The verdicts.
const (
	Free       Verdict = iota // Look: no session, no failure: go for the lock
	Found                     // a session newer than the one refused: adopt it
	Suppressed                // no login now; Suppression tells why and until when
	Busy                      // somebody else's attempt is open and alive
	Lead                      // the attempt is ours: log in
	Refused                   // an After that no generation can have reached: nothing is done
	Stored                    // Commit: done, now or by an earlier copy of this request
	Stale                     // Commit: overtaken; nothing written
)

// maxAhead bounds how far past the store's time an After may lie that this
// entry never issued. A day covers a store whose clock was set back.
const maxAhead = 24 * time.Hour

// agree is how far apart two processes may see the store's clock.
const agree = time.Second

// settle applies what the passage of time alone decides: a session that lived
// to Proven clears what was held against its key, a window that ended forgets.
// A session clears once: it stays in the entry after its expiry and while it is
// renewed, and would go on clearing what is counted then.
func (e Entry) settle(now Time) Entry {
	if e.Proven != 0 && now >= e.Proven {
		e.Attempts, e.Young, e.Proven = 0, 0, 0
	}
	if now >= e.Window {
		e.Attempts = 0
	}
	return e
}

// Usable reports whether a session newer than after is stored and alive.
func (e Entry) Usable(after uint64, now Time) bool {
	return e.Session.Gen > after && now < e.Session.Expires
}

// Alive reports whether somebody's attempt is open under a running lease. One
// begun in the future is not: the store's clock was put back, and its lease would
// run for as long as the step.
func (e Entry) Alive(now Time) bool {
	return e.Open.Gen != 0 && now < e.Open.Lease && e.Open.Since <= now.Add(agree)
}

// Look is what a reader does with an entry: Found, Suppressed, or Free to go
// for the lock. Attempts are not judged here, Begin does that.
func (e Entry) Look(after uint64, now Time) Verdict {
	switch {
	case e.Usable(after, now):
		return Found
	case now < e.Failure.Until:
		return Suppressed
	}
	return Free
}

// Spent reports whether the budget of the window is. A reader who finds it so,
// and nobody's attempt alive, need not ask Begin.
func (r Rules) Spent(e Entry, now Time) bool { return int(e.settle(now).Attempts) >= r.Budget }

// Leave reports whether a session in use is to be left alone: a renewal has just
// failed, or could take from callers the last login of the window, and the
// session may outlive what is wrong.
func (r Rules) Leave(e Entry, now Time) bool {
	return now < e.Calm || (r.Budget > 1 && int(e.settle(now).Attempts) >= r.Budget-1)
}

// Suppression tells why no login is sent, and until when: a failure in force, or
// a spent budget.
func (r Rules) Suppression(e Entry, now Time) Failure {
	why := e.Failure
	if now >= why.Until {
		why = Failure{Class: Unknown}
	}
	if r.Spent(e, now) {
		why.Until = max(why.Until, e.Window)
	}
	return why
}

// Refreshable reports whether a refresh may start from the stored session, for a
// leader who knows that generations up to dead are rejected: while it is usable,
// or as long as it says.
func (e Entry) Refreshable(dead uint64, now Time) bool {
	return e.Session.Gen != 0 && (now < e.Session.Refresh || e.Usable(dead, now))
}

// Ask is what a caller asks Begin for.
type Ask struct {
	Nonce  Nonce         // fresh per attempt
	After  uint64        // the generation that will not do; 0: any will
	Unread bool          // After is alive, but the caller lacks the key to read it
	Ahead  bool          // After is alive and in use: nobody waits for what replaces it
	Lease  time.Duration // how long the attempt is alive without Renew
	Holder string        // who, for operators
}

// next is the number of a generation issued now: above every other, and never
// one that a store issued before it forgot its last writes.
func (e Entry) next(after uint64, now Time) uint64 {
	return epoch.Next(e.Gen, after, uint64(now))
}

// Begin opens an attempt.
//
// Precondition: the caller holds the lock of the key (else the answer is still
// right, only more logins are made than need be).
// Effect: only Lead changes the entry: a new generation is open, and counted.
// Returns: Found and Suppressed: unlock and answer. Busy: unlock and wait.
// Replay: finds its own nonce, leads the same generation, counts nothing.
func (r Rules) Begin(e Entry, a Ask, now Time) (Entry, Verdict) {
	s := e.settle(now)
	switch {
	case a.After > s.Gen && a.After > uint64(now.Add(maxAhead)):
		return e, Refused
	case s.Open.Gen != 0 && s.Open.Nonce == a.Nonce:
		return Renew(e, s.Open.Gen, a.Nonce, a.Lease, now), Lead
	case s.Usable(a.After, now):
		return e, Found
	case now < s.Failure.Until:
		return e, Suppressed
	case s.Alive(now):
		return e, Busy
	case r.Spent(e, now), a.Unread && s.Usable(0, now) && now < s.Unread, a.Ahead && r.Leave(e, now):
		return e, Suppressed
	}
	if s.Born == 0 {
		s.Born = now
	}
	if s.Attempts == 0 {
		s.Window = now.Add(r.Window)
	}
	if a.Unread && s.Usable(0, now) {
		s.Unread = now.Add(r.Window)
	}
	s.Attempts++
	s.Gen = s.next(a.After, now)
	s.Open = Attempt{Gen: s.Gen, Nonce: a.Nonce, Since: now, Lease: now.Add(a.Lease), Holder: a.Holder}
	return s.keep(s.Window, s.Unread, s.Open.Lease), Lead
}

// Renew extends the lease of an open attempt of ours; of any other it changes
// nothing. It is the first line of Begin and no more: a heartbeat that ran all
// of Begin would, after a Clear, open a generation its leader knows nothing of.
func Renew(e Entry, gen uint64, n Nonce, lease time.Duration, now Time) Entry {
	if gen == 0 || e.Open.Gen != gen || e.Open.Nonce != n {
		return e
	}
	e.Open.Lease = max(e.Open.Lease, now.Add(lease))
	return e.keep(e.Open.Lease)
}

// Result is the outcome of a login.
type Result struct {
	Session Session       // on success; its Gen is set by Commit
	Class   Class         // None on success
	Wait    time.Duration // Deferred: what the upstream asked for; 0: our own back-off
	Calm    time.Duration // how long a session that could not be renewed is left alone
}

// Commit ends an attempt. Its owner is whoever finds gen open under his nonce.
//
// Effect for the owner: a session replaces the stored one, which is returned
// for its logout, and clears the failure; a failure is recorded and neither
// removes nor restores a session. For anybody else: none.
// Returns: Stored; or Stale when the attempt was overtaken, cleared or lost
// with its entry. The session in the entry is then somebody else's.
// Replay: Stored, nothing written, whether or not the session is still there:
// a generation that was invalidated meanwhile is not stored a second time. The
// number alone is believed only when Done has gone on: a lost entry and a clock
// set back together can issue it to two leaders.
func (r Rules) Commit(e Entry, gen uint64, n Nonce, res Result, now Time) (next Entry, displaced Session, v Verdict) {
	if gen == 0 || e.Open.Gen != gen || e.Open.Nonce != n {
		if gen != 0 && (e.Done == Closed{gen, n} || e.Session.Gen == gen && e.Done.Gen > gen) {
			return e, Session{}, Stored
		}
		return e, Session{}, Stale
	}
	s := e.settle(now)
	s.Open, s.Done = Attempt{}, Closed{gen, n}
	if (res.Class == NotSent || res.Class == Deferred) && e.Unread == e.Open.Since.Add(r.Window) {
		s.Unread = 0 // by this attempt, which is none then
	}
	if res.Class == None {
		displaced = s.Session.live()
		s.giveBack()
		return r.store(s, gen, res.Session, now), displaced, Stored
	}
	if res.Calm > 0 {
		s.Calm = max(s.Calm, now.Add(res.Calm))
	}
	switch res.Class {
	case NotSent:
		s.giveBack()
	case Denied:
		s.fail(Denied, r.Window, now)
	case Deferred:
		s.giveBack()
		s.fail(Deferred, max(min(res.Wait, r.Window), r.backoff(s)), now)
	default:
		s.fail(Unknown, r.backoff(s), now)
	}
	return s.keep(s.Failure.Until, s.Calm), Session{}, Stored
}

// store makes ses generation gen and the entry's session.
func (r Rules) store(e Entry, gen uint64, ses Session, now Time) Entry {
	ses.Gen = gen
	e.Session, e.Failure, e.Calm = ses, Failure{}, 0
	e.Proven = now.Add(min(r.Proving, ses.Expires.Sub(now)/4))
	return e.keep(ses.Expires, ses.Refresh)
}

// live returns s unless it was rejected.
func (s Session) live() Session {
	if s.Expires == 0 {
		return Session{}
	}
	return s
}

// Put stores a session that was obtained elsewhere, under a number from Number,
// and returns the one it replaces. It needs no lock: an attempt that is open
// becomes stale, and adopts. Counts stay, for the session says nothing of the
// credentials that logins use; a failure does not.
// Replay: the swap finds its own bytes.
func (r Rules) Put(e Entry, gen uint64, ses Session, now Time) (next Entry, displaced Session) {
	s := e.settle(now)
	if s.Born == 0 {
		s.Born = now
	}
	displaced = s.Session.live()
	s.Gen, s.Open = gen, Attempt{}
	return r.store(s, gen, ses, now), displaced
}

// Number returns the generation that a Put at now has.
func Number(e Entry, now Time) uint64 { return e.next(0, now) }

// giveBack uncounts the attempt just closed. A login that succeeded is given
// back too: it threatens no account with a lock-out, and counting it would turn
// three young rejections into an outage of a whole window, where the back-off
// of Reject already allows only one login per Max.
func (e *Entry) giveBack() {
	if e.Attempts > 0 {
		e.Attempts--
	}
}

func (r Rules) backoff(e Entry) time.Duration { return r.Retry.Delay(int(e.Failure.Streak)) }

// fail records a failure. It never shortens one that is in force: a session
// that was rejected meanwhile may have set a longer wait.
func (e *Entry) fail(c Class, wait time.Duration, now Time) {
	streak := e.Failure.Streak
	if c != Denied { // a denial has a wait of its own and drives no back-off
		streak = min(streak+1, 200)
	}
	e.Failure = Failure{Class: c, Until: max(now.Add(wait), e.Failure.Until), Streak: streak}
}

// Invalidate removes the stored session if it is generation gen, and closes the
// attempt if it is. It never touches another generation: a login in flight
// goes on. A session rejected before it was proven is young; after the second
// in a row the next login waits for the Reject back-off. Changes nothing when
// it finds neither, so a replay is harmless.
//
// A session that may still be refreshed stays, as rejected: no reader finds it,
// and nothing makes it usable again. After the second young one in a row it does
// not stay: what refreshes bring is refused, so the next leader logs in.
func (r Rules) Invalidate(e Entry, gen uint64, now Time) Entry {
	if gen == 0 || (e.Session.Gen != gen && e.Open.Gen != gen) {
		return e
	}
	s := e.settle(now)
	if s.Open.Gen == gen {
		s.Open = Attempt{}
	}
	if s.Session.Gen == gen {
		young := now < s.Proven
		s.Session.Expires, s.Proven = 0, 0
		if young {
			s.Young++
		}
		if s.Young >= 2 || now >= s.Session.Refresh {
			s.Session = Session{}
		}
		if young && s.Young >= 2 {
			until := now.Add(r.Reject.Delay(int(s.Young) - 2))
			if until > s.Failure.Until {
				s.Failure.Class, s.Failure.Until = Rejected, until
			}
		}
	}
	return s.keep(s.Failure.Until)
}

// Clear ends the key's session for a logout and returns it. A login in flight
// becomes stale; counts and failures stay. A key without an entry stays so:
// nothing can have been begun under it. It needs no nonce: a repeated swap finds
// its own bytes, and a caller who asks twice wants two logouts.
func Clear(e Entry, now Time) (next Entry, removed Session) {
	if e == (Entry{}) {
		return e, Session{}
	}
	s := e.settle(now)
	removed = s.Session.live()
	s.Gen = s.next(0, now)
	s.Open, s.Session, s.Proven, s.Calm = Attempt{}, Session{}, 0, 0
	return s, removed
}

// Unsuppress forgets failures, those of renewals too, attempts, young rejections,
// and that a session was replaced unread. The session and an open attempt stay.
func Unsuppress(e Entry) Entry {
	e.Attempts, e.Window, e.Failure, e.Young, e.Unread, e.Calm = 0, 0, Failure{}, 0, 0, 0
	return e
}

// Touch extends the stored session's life to now + ttl if it is generation gen
// and alive, never past its End and never backwards. It changes nothing for a
// gain under least: a fleet that touches at every use writes once per least.
func Touch(e Entry, gen uint64, ttl, least time.Duration, now Time) Entry {
	if gen == 0 || e.Session.Gen != gen || now >= e.Session.Expires {
		return e
	}
	until := now.Add(ttl)
	if e.Session.End != 0 {
		until = min(until, e.Session.End)
	}
	if until <= e.Session.Expires || until.Sub(e.Session.Expires) < least {
		return e
	}
	e.Session.Expires = until
	return e.keep(e.Session.Expires)
}

// Retire takes session gen out of the entry once nobody can use it any more, and
// returns it to the one caller whose swap did so: his to end upstream.
func Retire(e Entry, gen uint64, now Time) (next Entry, removed Session) {
	if gen == 0 || e.Session.Gen != gen || e.Usable(0, now) || now < e.Session.Refresh {
		return e, Session{}
	}
	s := e.settle(now)
	removed = s.Session.live()
	s.Session, s.Proven = Session{}, 0
	return s, removed
}

// keep records that the entry matters until the latest of times.
func (e Entry) keep(times ...Time) Entry {
	for _, t := range times {
		e.Keep = max(e.Keep, t)
	}
	return e
}

// maxKept bounds a TTL: no rule looks further ahead, but a forged Keep might.
const maxKept = 366 * 24 * time.Hour

// TTL is how long a store must keep the entry: until nothing in it matters and
// a minute longer. It is never shortened by a session's end, because the entry
// also remembers generations and counts; only the store's own expiry deletes it.
func (e Entry) TTL(now Time) time.Duration {
	kept := min(max(e.Keep-now, 0), Time(maxKept/time.Microsecond))
	return kept.Sub(0) + time.Minute
}
