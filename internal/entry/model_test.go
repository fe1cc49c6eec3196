package entry_test

// An explicit-state model checker that runs the real rules of this package.
//
// # State
//
// One key. The store holds its entry (or none) and remembers the value before
// the last write. The lock has a holder and an end. The upstream has a set of
// live tokens. Up to three processes each have a near copy, the highest
// generation they saw rejected, tokens still to be logged out, one shared
// attempt, and up to two callers. Everything is small integers; entries are
// interned, so that a state is a comparable struct of a few hundred bytes.
//
// A caller runs a func with a session, or does one thing only: it renews the
// session ahead of its end, logs out, forgives, puts a session obtained
// elsewhere, touches the one in use, or ends a scope and retires what it used.
// Where sessions carry refresh material a leader refreshes rather than logs in.
//
// # Steps
//
// A step is one thing the world can see: one request to the store, the lock or
// the upstream, together with the local thinking after its answer. A swap is
// computed in one step and executed in a later one, so whatever can come
// between does. The attempt of a process walks
//
//	load → lock → begin (swap) → login → inside → commit (swap) → unlock
//	  ▲──────┘ held, busy, overtaken
//
// and a caller start → wait → run → invalidate (swap) → start → wait → run, or
// start → swap.
// Waiting is loading again: polling finds everything that a wake-up would.
// Time stands still but for a microsecond per generation, until a tick makes
// everything with a lease, a lock or a short back-off run out at once.
//
// # Faults
//
// Each has a budget of its own and all share one: a tick while a leader lives
// (it was paused), a lock lost, a crash, a reply lost after its request was
// executed, a swap executed after its sender gave up waiting or never, a flush,
// a failover to the value before the last write, a revocation upstream, a login
// that fails, an Invalidate that cannot reach the store. A pause shorter than a
// lease needs no step of its own.
//
// # Invariants
//
// Logins are bounded by their causes (P1, P4) and refused logins by the budget
// (P5). A stored generation is never replaced by an older or a dead one, none
// is issued twice, none from before a logout is stored, no write drops a
// session that it does not name, none makes a rejected or an expired one usable
// again (P2). A caller gets only what is newer than what it saw rejected (R1).
// The logout func gets neither the stored token nor one known to be rejected;
// what leaves the entry alive is handed to one process, and to no second (R5). A
// Do runs its func at most twice and logs in at most once after the first run
// (R6). A session is served while it is renewed, and when that fails (R7).
// Nobody waits for a lock or an attempt of his own.
// From any state the rest ends without further faults, and then no token
// lives upstream that nobody knows of.
//
// One thing is simpler than in the world: comparing the stored token and
// logging another one out is one step. And what a flush or a failover of the
// store takes away by nature (a count, a logout, the order of numbers) is not
// held against the rules.
//
// # Limits
//
// Breadth-first runs see every state up to a bound on their number, so deep
// ones are left to random walks; -model.depth=15 multiplies both.

import (
	"flag"
	"fmt"
	"hash/maphash"
	"math/bits"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/internal/entry"
)

// Model times, in microseconds. A tick outlasts every lease, lock and the
// first back-off; a window outlasts every run.
const (
	tickLen  = 100
	leaseLen = 80
	patience = 3 // ticks after which nobody may wait any more
	longLife = 40_000
	epoch    = 10
)

const (
	maxProcs   = 3
	maxCallers = 2
	maxIssued  = 16
)

// kind is what a caller is there for.
type kind uint8

const (
	idler kind = iota
	doer
	refresher
	leaver   // Logout
	forgiver // Unsuppress
	putter   // Put
	toucher
	retirer // a scope that ends
)

// fault is one of the things that may go wrong.
type fault uint8

const (
	pause fault = iota // a tick while a leader lives
	lockLost
	crash
	replyLost
	late // executed after its sender has given up waiting for the reply, or never
	flush
	failover
	revoke
	loginFails
	unreachable // an Invalidate that gives up
	faults
)

var faultNames = [faults]string{"pause", "lock lost", "crash", "reply lost", "late", "flush", "failover", "revoke", "login fails", "unreachable"}

// behaviour is how the upstream treats logins.
type behaviour uint8

const (
	ordinary  behaviour = iota
	single              // a login ends the session before it
	denying             // credentials are refused
	repeating           // a login returns the live token again
	hostile             // logins succeed, their sessions never work
	stuck               // logins return the same dead token for ever
	spoiled             // refreshes succeed, their sessions never work
)

// scenario bounds a run.
type scenario struct {
	procs      [maxProcs][maxCallers]kind
	up         behaviour
	warm       bool // starts with a session stored and near everywhere
	heartbeats bool // leaders send a heartbeat
	budget     int  // of logins; 0: 3
	life       int  // of sessions; 0: long
	refresh    int  // how long sessions may be refreshed; 0: while they are usable
	ticks      int  // besides those that are faults
	faults     [faults]uint8
	total      uint8 // of all faults

	clockBack bool // a flush sets the store's clock back as well
	evicts    bool // a near copy may go while its session is renewed
}

// weak is what a weaker contract does otherwise.
type weak struct {
	begin      func(entry.Rules, entry.Entry, entry.Ask, entry.Time) (entry.Entry, entry.Verdict)
	commit     func(entry.Rules, entry.Entry, uint64, entry.Nonce, entry.Result, entry.Time) (entry.Entry, entry.Session, entry.Verdict)
	invalidate func(entry.Rules, entry.Entry, uint64, entry.Time) entry.Entry
	clear      func(entry.Entry, entry.Time) (entry.Entry, entry.Session)
	renew      func(r entry.Rules, e entry.Entry, gen uint64, a entry.Ask, now entry.Time) entry.Entry
	look       func(entry.Entry, uint64, entry.Time) entry.Verdict
	put        func(entry.Rules, entry.Entry, uint64, entry.Session, entry.Time) (entry.Entry, entry.Session)
	number     func(entry.Entry, entry.Time) uint64
	touch      func(e entry.Entry, gen uint64, ttl, least time.Duration, now entry.Time) entry.Entry
	retire     func(entry.Entry, uint64, entry.Time) (entry.Entry, entry.Session)

	adoptOther   bool // R1: different instead of greater
	joinersAdopt bool // no R1 for joiners
	waitOnOpen   bool // R3: an open attempt is waited for, dead or alive
	staleAgain   bool // R4: a stale leader logs in again
	spentBegins  bool // R6: a caller that has logged in for its second run begins again
	noTokenCheck bool // R5: the stored token is not looked at
	keepDispl    bool // R5: nobody ends what Commit displaced
	blindDelete  bool // invalidate deletes whatever is there by then
	noLockNonce  bool // TryLock does not know its own nonce
	failTogether bool // R7: who joined a refresh-ahead fails with it
}

type sess struct {
	gen uint16
	tok uint8
}

// newerThan is R1.
func (s sess) newerThan(rejected sess) bool {
	return s.gen > rejected.gen && (rejected.tok == 0 || s.tok != rejected.tok)
}

// Program counters.
const (
	aIdle uint8 = iota
	aLoad
	aLock
	aBegin
	aLogin
	aInside
	aCommit
	aUnlock
)

const (
	cStart uint8 = iota
	cWait
	cRun
	cSwap // invalidate, clear or unsuppress under way
	cDone
)

// attempt is the shared attempt of a process.
type attempt struct {
	pc, back uint8 // back: where unlock leads
	starter  uint8 // caller
	joined   uint8 // callers, a bit each
	nonce    uint8
	refresh  bool
	noLogin  bool // adopt or wait, never begin
	refused  bool // the refresh was denied, the login is next
	carried  bool // got is from a refresh
	renewed  bool
	after    sess
	deadline uint16
	old, new int32 // the swap under way; old < 0: load first
	known    int32 // the entry as last seen by us
	gen      uint16
	got      sess
	result   entry.Class
	displ    sess  // what Commit displaced
	kept     sess  // what a Commit without a reply may have displaced
	orphan   uint8 // token that was not stored
}

type caller struct {
	pc       uint8
	runs     uint8
	before   uint8 // logins it caused before the first run
	after    uint8 // and after
	failed   bool
	rejected sess
	held     sess
	names    uint16 // generation that its swap is about
	own      uint8  // token to put
	old, new int32
	removed  uint32 // tokens that a swap without a reply may have removed
	gone     uint16 // their generations
}

type proc struct {
	dead    bool
	near    sess
	floor   uint16
	refused uint32 // tokens it saw rejected
	ending  uint32 // tokens to log out
	stamps  uint8
	nonces  uint8
	att     attempt
	callers [maxCallers]caller
}

// tally counts logins and their causes.
type tally struct {
	logins, denied, unknown                                               uint8
	invalidated, expired, dead, lost, lostEntry, logouts, forgiven, ended uint8
	refreshes, puts, proved                                               uint8
}

func (t tally) causes() uint8 {
	return t.invalidated + t.expired + t.dead + t.lost + t.lostEntry + t.logouts + t.forgiven + t.ended + t.refreshes
}

type state struct {
	now         uint16
	store, prev int32 // interned entries, 0: none
	lock        uint8 // nonce of its holder, 0: free
	lockUntil   uint16
	live        uint32
	tokens      uint8 // issued so far
	ticks       uint8
	used        [faults]uint8
	ghost       ghost
	procs       [maxProcs]proc
	tally       tally
	issued      [maxIssued]uint16
	maxStored   uint16 // newest generation ever stored
	barrier     uint8  // so many were issued before the last logout or flush, and must not be stored any more

	// Generations, a bit each, by their place in issued.
	rejected uint16 // in the store
	left     uint16 // the entry, alive
	handed   uint16 // to the process whose swap removed them
	maybe    uint16 // handed, by a swap of which that process does not know whether it was executed

	vain uint32 // tokens that a refresh brought in vain: nobody ends them
}

// bit is generation g's among the issued ones.
func (s *state) bit(g uint16) uint16 {
	if i := slices.Index(s.issued[:], g); g != 0 && i >= 0 {
		return 1 << i
	}
	return 0
}

// ghost is a swap under way that nobody waits for any more. old < 0: none.
type ghost struct {
	old, new int32
	by       kind
	names    uint16
}

// step names a transition, for traces.
type step struct {
	what  uint8
	p, c  uint8
	fault fault // faults: none
}

const (
	sAttempt uint8 = iota
	sRenew
	sCaller
	sEnd
	sTick
	sGhost
	sEvict
	sFault
)

type model struct {
	scenario
	weak
	rules   entry.Rules
	entries []entry.Entry
	index   map[entry.Entry]int32
	bad     string // the invariant that the step just made broke
	seen    map[string]int
	log     []string
}

func newModel(sc scenario, w weak) *model {
	if sc.budget == 0 {
		sc.budget = 3
	}
	if sc.life == 0 {
		sc.life = longLife
	}
	us := time.Microsecond
	m := &model{scenario: sc, weak: w, index: map[entry.Entry]int32{}, seen: map[string]int{}, rules: entry.Rules{
		Budget: sc.budget, Window: 30_000 * us, Proving: leaseLen * us,
		Retry:  entry.Backoff{Min: leaseLen * us, Max: 2 * leaseLen * us},
		Reject: entry.Backoff{Min: leaseLen * us, Max: 8 * leaseLen * us},
	}}
	m.intern(entry.Entry{}) // 0 is the missing entry
	if m.begin == nil {
		m.begin = entry.Rules.Begin
	}
	if m.commit == nil {
		m.commit = entry.Rules.Commit
	}
	if m.invalidate == nil {
		m.invalidate = entry.Rules.Invalidate
	}
	if m.clear == nil {
		m.clear = entry.Clear
	}
	if m.look == nil {
		m.look = entry.Entry.Look
	}
	if m.put == nil {
		m.put = entry.Rules.Put
	}
	if m.number == nil {
		m.number = entry.Number
	}
	if m.touch == nil {
		m.touch = entry.Touch
	}
	if m.retire == nil {
		m.retire = entry.Retire
	}
	if m.renew == nil {
		m.renew = func(_ entry.Rules, e entry.Entry, gen uint64, a entry.Ask, now entry.Time) entry.Entry {
			return entry.Renew(e, gen, a.Nonce, a.Lease, now)
		}
	}
	return m
}

func (m *model) initial() state {
	s := state{now: epoch, ghost: ghost{old: -1}}
	if !m.warm {
		return s
	}
	n := nonce(255)
	e, _ := m.rules.Begin(entry.Entry{}, entry.Ask{Nonce: n, Lease: leaseLen * time.Microsecond}, entry.Time(s.now))
	gen := e.Gen
	e, _, _ = m.rules.Commit(e, gen, n, m.success(s, 1), entry.Time(s.now))
	e.Stamp = n
	s.store = m.intern(e)
	s.prev = s.store
	s.tokens, s.live = 1, 1<<1
	s.issued[0], s.maxStored = uint16(gen), uint16(gen)
	s.tally.logins = 1
	for p := range s.procs {
		s.procs[p].near = sess{uint16(gen), 1}
	}
	s.now += tickLen // proven
	return s
}

func (m *model) success(s state, tok uint8) entry.Result {
	ses := entry.Session{Record: string([]byte{tok}), Expires: s.time().Add(time.Duration(m.life) * time.Microsecond)}
	if m.refresh != 0 {
		ses.Refresh = s.time().Add(time.Duration(m.refresh) * time.Microsecond)
	}
	return entry.Result{Session: ses}
}

func (s *state) time() entry.Time { return entry.Time(s.now) }

func nonce(n uint8) (out entry.Nonce) {
	out[0] = n
	return out
}

func stored(e entry.Entry) sess {
	if e.Session.Gen == 0 {
		return sess{}
	}
	return sess{uint16(e.Session.Gen), e.Session.Record[0]}
}

func (m *model) intern(e entry.Entry) int32 {
	id, ok := m.index[e]
	if !ok {
		id = int32(len(m.entries))
		m.entries = append(m.entries, e)
		m.index[e] = id
	}
	return id
}

// stamped interns an entry that process p is about to write.
func (m *model) stamped(s *state, p int, e entry.Entry) int32 {
	s.procs[p].stamps++
	e.Stamp = entry.Nonce{1, byte(p), s.procs[p].stamps}
	return m.intern(e)
}

func (m *model) fail(format string, args ...any) {
	if m.bad == "" {
		m.bad = fmt.Sprintf(format, args...)
	}
}

// see counts the turns that a run took, so that a test can tell whether the
// model still reaches all of them.
func (m *model) see(turn string) { m.seen[turn]++ }

var turns = []string{
	"begin replayed", "begin busy", "begin finds", "begin suppressed", "begin overtaken", "not sent",
	"commit replayed", "stale: adopt", "stale: wait", "stale: nothing", "waits in vain",
	"joiner starts over", "token again", "displaced", "orphan", "logged out", "kept: rejected", "kept: stored",
	"refresh not elected", "lock replayed",
	"put", "touched", "retired", "stays to be refreshed", "refreshed", "refreshed though rejected",
	"refresh denied", "refreshed in vain", "served though the refresh failed",
}

// next emits every state that follows s, with the step that leads there. After
// each, m.bad tells whether an invariant broke on the way.
func (m *model) next(s *state, emit func(step, *state)) {
	do := func(st step, f func(*state)) {
		n := *s
		m.bad = ""
		f(&n)
		if n == *s && m.bad == "" {
			return
		}
		m.atRest(&n)
		emit(st, &n)
	}
	m.normal(s, do)
	m.faulty(s, do)
}

// normal are the steps that need no fault.
func (m *model) normal(s *state, do func(step, func(*state))) {
	for p := range s.procs {
		pr := &s.procs[p]
		if pr.dead {
			continue
		}
		if pr.att.pc != aIdle {
			do(step{what: sAttempt, p: uint8(p), fault: faults}, func(n *state) { m.attempt(n, p, false) })
			if pr.att.pc == aInside && m.heartbeats && !pr.att.renewed {
				do(step{what: sRenew, p: uint8(p), fault: faults}, func(n *state) { m.heartbeat(n, p) })
			}
		}
		for c := range pr.callers {
			if m.procs[p][c] != idler && pr.callers[c].pc != cDone && pr.callers[c].pc != cWait {
				do(step{what: sCaller, p: uint8(p), c: uint8(c), fault: faults}, func(n *state) { m.caller(n, p, c, false) })
			}
		}
		if m.evicts && pr.near.gen != 0 && pr.att.pc != aIdle && pr.att.refresh {
			do(step{what: sEvict, p: uint8(p), fault: faults}, func(n *state) { n.procs[p].near = sess{} })
		}
		if pr.ending != 0 {
			do(step{what: sEnd, p: uint8(p), fault: faults}, func(n *state) { m.end(n, p) })
		}
	}
	if s.ghost.old >= 0 {
		do(step{what: sGhost, fault: faults}, func(n *state) {
			g := n.ghost
			n.ghost = ghost{old: -1}
			m.swap(n, g.old, g.new, g.by, g.names)
		})
	}
	if int(s.ticks) < m.ticks && !m.leading(s) {
		do(step{what: sTick, fault: faults}, func(n *state) { n.ticks++; m.tick(n) })
	}
}

func (m *model) spend(s *state, f fault) bool {
	var total uint8
	for _, n := range s.used {
		total += n
	}
	if s.used[f] >= m.faults[f] || total >= m.total {
		return false
	}
	s.used[f]++
	return true
}

// faulty are the steps that cost a fault.
func (m *model) faulty(s *state, do func(step, func(*state))) {
	try := func(f fault, p, c int, enabled bool, g func(*state)) {
		n := *s
		if !enabled || !m.spend(&n, f) {
			return
		}
		do(step{what: sFault, p: uint8(p), c: uint8(c), fault: f}, func(n *state) { m.spend(n, f); g(n) })
	}
	try(pause, 0, 0, m.leading(s), m.tick)
	try(lockLost, 0, 0, s.lock != 0, func(n *state) { n.lock, n.lockUntil = 0, 0; n.tally.lost++ })
	try(flush, 0, 0, s.store != 0, func(n *state) {
		n.store, n.lock, n.lockUntil = 0, 0, 0
		n.tally.lostEntry++
		n.maxStored, n.barrier = 0, n.begun()
		if m.clockBack {
			n.tally.lostEntry++                                        // whoever saw a number rejected will not take it for another session
			n.now, n.issued, n.barrier = epoch, [maxIssued]uint16{}, 0 // numbers may come again
			n.rejected, n.left, n.handed, n.maybe = 0, 0, 0, 0
		}
	})
	try(failover, 0, 0, s.store != s.prev, func(n *state) {
		n.store = n.prev
		n.tally.lostEntry++
		back := m.entries[n.store].Session
		n.maxStored, n.barrier = uint16(back.Gen), 0 // what was acknowledged since is gone
		n.left &^= n.bit(uint16(back.Gen))
		n.handed &^= n.bit(uint16(back.Gen))
		if back.Expires != 0 {
			n.rejected &^= n.bit(uint16(back.Gen))
		}
	})
	try(revoke, 0, 0, s.live != 0, func(n *state) { n.live = 0 })
	for p := range s.procs {
		pr := &s.procs[p]
		if pr.dead || m.finished(pr, p) {
			continue
		}
		try(crash, p, 0, true, func(n *state) { m.crash(n, p) })
		pc := pr.att.pc
		swapping := (pc == aBegin || pc == aCommit) && pr.att.old >= 0
		try(late, p, 9, swapping && s.ghost.old < 0, func(n *state) {
			a := &n.procs[p].att
			n.ghost = ghost{old: a.old, new: a.new}
			a.old, a.kept = -1, a.displ
			n.maybe |= n.bit(a.kept.gen)
		})
		try(replyLost, p, 9, pc == aLock || swapping, func(n *state) { m.attempt(n, p, true) })
		for c := range pr.callers {
			swapping := pr.callers[c].pc == cSwap
			try(late, p, c, swapping && pr.callers[c].old >= 0 && s.ghost.old < 0, func(n *state) {
				cl := &n.procs[p].callers[c]
				n.ghost = ghost{old: cl.old, new: cl.new, by: m.procs[p][c], names: cl.names}
				cl.unanswered(n)
			})
			try(replyLost, p, c, swapping && pr.callers[c].old >= 0, func(n *state) { m.caller(n, p, c, true) })
			try(unreachable, p, c, swapping && m.procs[p][c] == doer, func(n *state) {
				n.tally.invalidated++ // a login may be due as if it had been
				m.swapped(n, p, c)
			})
		}
		try(loginFails, p, 0, pc == aLogin && s.now < pr.att.deadline, func(n *state) { m.login(n, p, entry.Unknown) })
		try(loginFails, p, 1, pc == aLogin && s.now < pr.att.deadline, func(n *state) { m.login(n, p, entry.Deferred) })
	}
}

func (m *model) finished(pr *proc, p int) bool {
	for c := range pr.callers {
		if m.procs[p][c] != idler && pr.callers[c].pc != cDone {
			return false
		}
	}
	return pr.att.pc == aIdle && pr.ending == 0
}

// leading tells whether a live process holds the lock or a lease.
func (m *model) leading(s *state) bool {
	e := m.entries[s.store]
	for p := range s.procs {
		n := s.procs[p].att.nonce
		if s.procs[p].dead || s.procs[p].att.pc < aLock {
			continue
		}
		if s.lock == n && s.now < s.lockUntil || e.Alive(s.time()) && e.Open.Nonce == nonce(n) {
			return true
		}
	}
	return false
}

func (m *model) tick(s *state) {
	if m.leading(s) {
		s.tally.lost++
	}
	was := s.time()
	s.now += tickLen
	e := m.entries[s.store]
	if e.Session.Gen != 0 && was < e.Session.Expires && s.time() >= e.Session.Expires {
		s.tally.expired++
		for p := range s.procs {
			if s.procs[p].near.gen == uint16(e.Session.Gen) {
				s.procs[p].near = sess{}
			}
		}
	}
	if was < e.Failure.Until && s.time() >= e.Failure.Until {
		s.tally.ended++
	}
	if was < e.Proven && s.time() >= e.Proven {
		s.tally.proved++
	}
	if s.lock != 0 && s.now >= s.lockUntil {
		s.lock, s.lockUntil = 0, 0
	}
}

func (m *model) crash(s *state, p int) {
	pr := &s.procs[p]
	n := pr.att.nonce
	if n != 0 && (s.lock == n || m.entries[s.store].Open.Nonce == nonce(n) || pr.att.pc == aInside) {
		s.tally.dead++
	}
	*pr = proc{dead: true, stamps: pr.stamps, nonces: pr.nonces}
}

// swap is the store's compare-and-swap. by is the kind of caller that asks for
// it, idler for an attempt; names is the generation that it invalidates.
func (m *model) swap(s *state, old, next int32, by kind, names uint16) bool {
	if s.store == next {
		return true
	}
	if s.store != old {
		return false
	}
	was, is := m.entries[s.store], m.entries[next]
	s.prev, s.store = s.store, next
	if is.Gen < was.Gen {
		m.fail("P2: generation %d written over %d", is.Gen, was.Gen)
	}
	if g := uint16(is.Open.Gen); g != 0 && is.Open.Gen != was.Open.Gen {
		m.issue(s, g)
	}
	if by == putter {
		m.issue(s, uint16(is.Session.Gen))
	}
	if is.Session.Gen == was.Session.Gen {
		m.changed(s, was.Session, is.Session, by, names)
	} else {
		m.replaced(s, was.Session, uint16(is.Session.Gen), by, names)
	}
	switch by {
	case leaver:
		s.tally.logouts++
		s.barrier = s.begun()
	case forgiver:
		s.tally.forgiven++
	case putter:
		m.see("put")
		s.tally.puts++
	case toucher:
		m.see("touched")
	default:
	}
	return true
}

// changed judges a write that left the session the one it was.
func (m *model) changed(s *state, was, is entry.Session, by kind, names uint16) {
	g := uint16(is.Gen)
	switch {
	case is.Expires == was.Expires:
	case by == toucher && g == names && is.Expires > was.Expires && was.Expires != 0:
	case is.Expires == 0 && by == doer && g == names:
		m.see("stays to be refreshed")
		s.tally.invalidated++
		s.rejected |= s.bit(g)
	default:
		m.fail("P2: life of session %d changed from %d to %d", g, was.Expires, is.Expires)
	}
}

// replaced judges a write after which generation g is stored where was was.
func (m *model) replaced(s *state, was entry.Session, g uint16, by kind, names uint16) {
	named := uint16(was.Gen) == names
	switch {
	case g == 0 && by == doer && named && was.Expires != 0:
		s.tally.invalidated++
		s.rejected |= s.bit(names)
		return
	case g == 0 && by != leaver && (!named || by != doer && by != retirer):
		m.fail("P2: session %d dropped by a write that does not name it", was.Gen)
	case g == 0:
	case g <= s.maxStored:
		m.fail("P2: generation %d stored after %d", g, s.maxStored)
	case slices.Contains(s.issued[:s.barrier], g):
		m.fail("P2: generation %d stored, begun before a logout or in a lost entry", g)
	default:
		s.maxStored = g
	}
	if was.Expires != 0 {
		s.left |= s.bit(uint16(was.Gen))
	}
}

// hand gives a session to the process whose swap took it out of the entry.
func (m *model) hand(s *state, was sess) {
	b := s.bit(was.gen)
	switch {
	case was.gen == 0 || m.clockBack: // a number that comes again says nothing
	case s.rejected&b != 0:
		m.fail("R5: session %d was rejected and is handed out to be ended", was.gen)
	case s.left&b == 0:
		m.fail("R5: session %d is handed out though it did not leave", was.gen)
	case s.handed&b != 0:
		m.fail("R5: session %d is handed to two", was.gen)
	}
	s.handed |= b
}

func (m *model) issue(s *state, g uint16) {
	if slices.Contains(s.issued[:], g) {
		m.fail("P2: generation %d issued twice", g)
	}
	s.issued[s.begun()] = g
}

// begun is how many generations were issued.
func (s *state) begun() uint8 {
	i := slices.Index(s.issued[:], 0)
	if i < 0 {
		panic("model: maxIssued is too small")
	}
	return uint8(i)
}

// attempt makes one step of the shared attempt of p. With lost the request is
// executed and its reply is not received, so it is made again.
func (m *model) attempt(s *state, p int, lost bool) {
	a := &s.procs[p].att
	switch a.pc {
	case aLoad:
		m.load(s, p)
	case aLock:
		switch {
		case s.lock == 0:
			s.lock, s.lockUntil = a.nonce, s.now+leaseLen
		case s.lock == a.nonce && !m.noLockNonce:
			m.see("lock replayed")
		default:
			if a.refresh {
				m.see("refresh not elected")
				m.deliver(s, p, sess{}, true)
				a.pc = aIdle
				return
			}
			a.pc = aLoad
			return
		}
		if lost {
			return
		}
		a.deadline = s.lockUntil
		m.lead(s, p, a.known)
	case aBegin:
		if a.old < 0 {
			m.lead(s, p, s.store)
			return
		}
		ok := m.swap(s, a.old, a.new, idler, 0)
		switch {
		case lost:
			a.old = -1
		case !ok:
			m.see("begin overtaken")
			m.lead(s, p, s.store)
		default:
			a.known, a.pc = s.store, aLogin
		}
	case aLogin:
		if s.now >= a.deadline {
			m.see("not sent")
			a.result = entry.NotSent
			m.close(s, p, a.known)
			return
		}
		class := entry.None
		if m.up == denying {
			class = entry.Denied
		}
		m.login(s, p, class)
	case aInside:
		m.close(s, p, a.known)
	case aCommit:
		if a.old < 0 {
			m.close(s, p, s.store)
			return
		}
		ok := m.swap(s, a.old, a.new, idler, 0)
		switch {
		case lost:
			a.old, a.kept = -1, a.displ
			s.maybe |= s.bit(a.kept.gen)
		case !ok:
			m.close(s, p, s.store)
		default:
			m.closed(s, p)
		}
	case aUnlock:
		if s.lock == a.nonce {
			s.lock, s.lockUntil = 0, 0
		}
		a.pc = a.back
		if a.pc == aIdle {
			*a = attempt{nonce: a.nonce}
		}
	}
}

// load is a reader's look (R3: polling and waking are the same step here).
func (m *model) load(s *state, p int) {
	pr := &s.procs[p]
	a := &pr.att
	e := m.entries[s.store]
	if m.waitOnOpen && e.Open.Gen != 0 && !e.Usable(uint64(a.after.gen), s.time()) {
		return
	}
	switch m.look(e, uint64(a.after.gen), s.time()) {
	case entry.Found:
		m.adopt(s, p, stored(e))
		a.pc = aIdle
	case entry.Suppressed:
		m.deliver(s, p, sess{}, false)
		a.pc = aIdle
	default:
		if a.noLogin {
			if !e.Alive(s.time()) || e.Open.Nonce == nonce(a.nonce) {
				m.see("waits in vain")
				m.deliver(s, p, sess{}, true)
				a.pc = aIdle
			}
			return
		}
		a.known, a.pc = s.store, aLock
	}
	if a.pc == aIdle {
		*a = attempt{nonce: a.nonce}
	}
}

// lead applies Begin to the entry seen, and acts on the verdict.
func (m *model) lead(s *state, p int, seen int32) {
	a := &s.procs[p].att
	e := m.entries[seen]
	a.back = aIdle
	if s.now >= a.deadline { // no Begin is sent any more
		a.pc, a.back = aUnlock, aLoad
		if e.Open.Nonce == nonce(a.nonce) {
			a.gen, a.result = uint16(e.Open.Gen), entry.NotSent
			m.close(s, p, seen)
		}
		return
	}
	next, v := m.begin(m.rules, e, entry.Ask{Nonce: nonce(a.nonce), After: uint64(a.after.gen), Lease: leaseLen * time.Microsecond}, s.time())
	a.pc = aUnlock
	switch v {
	case entry.Lead:
		a.gen = uint16(next.Open.Gen)
		if next.Open.Gen == e.Open.Gen {
			m.see("begin replayed")
		}
		if next == e {
			a.known, a.pc = seen, aLogin
			return
		}
		if next.Open.Gen != e.Open.Gen {
			s.now++
		}
		a.old, a.new, a.pc = seen, m.stamped(s, p, next), aBegin
	case entry.Found:
		m.see("begin finds")
		if next != e && !m.swap(s, seen, m.stamped(s, p, next), idler, 0) {
			m.lead(s, p, s.store)
			return
		}
		m.adopt(s, p, stored(e))
	case entry.Suppressed:
		m.see("begin suppressed")
		t := s.tally
		if s.time() >= e.Failure.Until && int(t.logins+t.dead+t.lost+t.lostEntry+t.puts) < m.budget {
			m.fail("P5: suppressed by the budget after %d logins", t.logins)
		}
		m.deliver(s, p, sess{}, false)
	case entry.Busy:
		m.see("begin busy")
		if e.Open.Nonce == nonce(a.nonce) {
			m.fail("process %d is told to wait for its own attempt", p)
		}
		if a.refresh {
			m.deliver(s, p, sess{}, true)
			return
		}
		a.back = aLoad
	default:
		m.fail("begin answers %d", v)
	}
}

// login is sent, or a refresh where one may be, and what the upstream does with
// it happens. A refresh that is denied is followed by a login.
func (m *model) login(s *state, p int, class entry.Class) {
	pr := &s.procs[p]
	a := &pr.att
	from := m.entries[a.known]
	if !a.refused && m.refreshing() && from.Refreshable(uint64(pr.floor), s.time()) {
		m.renewal(s, p, from, class)
		return
	}
	m.count(s, p)
	a.pc, a.result = aInside, class
	if class == entry.None {
		if fresh := m.up != stuck && (m.up != repeating || s.live == 0); fresh || s.tokens == 0 {
			s.tokens++
			if m.up == single {
				s.live = 0
			}
			if m.up != hostile && m.up != stuck {
				s.live |= 1 << s.tokens
			}
		}
		a.got = sess{a.gen, s.tokens}
	}
	m.judge(s, class)
}

func (m *model) refreshing() bool { return m.refresh != 0 }

// renewal is a refresh: the old session carried on.
func (m *model) renewal(s *state, p int, from entry.Entry, class entry.Class) {
	a := &s.procs[p].att
	if from.Session.Expires == 0 {
		m.see("refreshed though rejected")
		if from.Young >= 2 {
			m.fail("refresh of session %d after %d were rejected young", from.Session.Gen, from.Young)
		}
	}
	switch class {
	case entry.None:
		m.see("refreshed")
		s.tokens++
		s.live &^= 1 << stored(from).tok
		if m.up != hostile && m.up != spoiled {
			s.live |= 1 << s.tokens
		}
		a.got, a.carried = sess{a.gen, s.tokens}, true
	case entry.Deferred:
	default:
		m.see("refresh denied")
		a.refused = true
		return
	}
	m.count(s, p)
	a.pc, a.result = aInside, class
	m.judge(s, class)
}

// count counts the login of an attempt, or the refresh instead of it: R6.
func (m *model) count(s *state, p int) {
	pr := &s.procs[p]
	a := &pr.att
	s.tally.logins++
	if c := &pr.callers[a.starter]; !a.refresh {
		if c.runs > 0 {
			c.after++
		} else {
			c.before++
		}
		if c.before > 1 || c.after > 1 {
			m.fail("R6: logins of one Do: %d before its first run, %d after", c.before, c.after)
		}
	}
}

// judge compares the logins so far with their causes.
func (m *model) judge(s *state, class entry.Class) {
	t := &s.tally
	switch class {
	case entry.Denied:
		t.denied++
	case entry.Unknown:
		t.unknown++
	default:
	}
	entries := 1 + t.lostEntry + t.forgiven // each counts on its own
	if int(t.denied+t.unknown) > m.budget*int(entries+t.proved) {
		m.fail("P5: %d logins with a budget of %d, %+v", t.denied+t.unknown, m.budget, *t)
	}
	if class == entry.Denied {
		if t.denied > entries+t.puts+t.dead+t.lost {
			m.fail("P5: %d denied logins, %+v", t.denied, *t)
		}
	}
	if t.logins > 1+t.causes() {
		m.fail("P4: %d logins, causes %+v", t.logins, *t)
	}
	inside := uint8(0)
	for i := range s.procs {
		if !s.procs[i].dead && s.procs[i].att.pc == aInside {
			inside++
		}
	}
	if inside > 1+t.lost+t.lostEntry {
		m.fail("P1: %d processes inside Login, %+v", inside, *t)
	}
}

// heartbeat extends the lease, and the lock if it is still ours. It is lost
// when somebody else was faster.
func (m *model) heartbeat(s *state, p int) {
	a := &s.procs[p].att
	a.renewed = true
	if s.lock == a.nonce {
		s.lockUntil = s.now + leaseLen
		a.deadline = s.lockUntil
	}
	e := m.entries[s.store]
	s.now++
	next := m.renew(m.rules, e, uint64(a.gen), entry.Ask{Nonce: nonce(a.nonce), After: uint64(a.after.gen), Lease: leaseLen * time.Microsecond}, s.time())
	if next.Open.Gen != e.Open.Gen {
		m.fail("a heartbeat opened generation %d", next.Open.Gen)
	}
	if next != e && m.swap(s, s.store, m.stamped(s, p, next), idler, 0) {
		a.known = s.store
	}
}

// close applies Commit to the entry seen.
func (m *model) close(s *state, p int, seen int32) {
	a := &s.procs[p].att
	e := m.entries[seen]
	res := entry.Result{Class: a.result}
	if a.result == entry.None {
		res = m.success(*s, a.got.tok)
	}
	next, displaced, v := m.commit(m.rules, e, uint64(a.gen), nonce(a.nonce), res, s.time())
	switch {
	case v == entry.Stale:
		m.stale(s, p, e)
	case next == e:
		m.see("commit replayed")
		if got := stored(e); a.result == entry.None && got.gen == a.gen && got != a.got {
			m.fail("P2: %v is said to be stored where %v is", a.got, got)
		}
		m.closed(s, p)
	default:
		a.displ = stored(entry.Entry{Session: displaced})
		a.old, a.new, a.pc = seen, m.stamped(s, p, next), aCommit
	}
}

// closed follows a Commit that was stored.
func (m *model) closed(s *state, p int) {
	a := &s.procs[p].att
	a.pc, a.back = aUnlock, aIdle
	switch a.result {
	case entry.None:
		m.hand(s, a.displ)
		if a.displ.gen != 0 && !m.keepDispl && !a.carried {
			m.see("displaced")
			s.procs[p].ending |= 1 << a.displ.tok
		}
		m.adopt(s, p, a.got)
	case entry.NotSent:
		m.again(s, p)
	default:
		m.deliver(s, p, sess{}, false)
	}
}

// again lets the attempt start over under another nonce.
func (m *model) again(s *state, p int) {
	pr := &s.procs[p]
	a := &pr.att
	if s.lock == a.nonce {
		s.lock, s.lockUntil = 0, 0
	}
	pr.nonces++
	*a = attempt{
		pc: aLoad, starter: a.starter, joined: a.joined, refresh: a.refresh, noLogin: a.noLogin, after: a.after,
		nonce: uint8(p+1)<<4 | pr.nonces,
	}
}

// stale follows a Commit that came too late: R4.
func (m *model) stale(s *state, p int, e entry.Entry) {
	pr := &s.procs[p]
	a := &pr.att
	if a.result == entry.NotSent {
		m.again(s, p)
		return
	}
	switch {
	case a.result != entry.None:
	case a.carried:
		m.see("refreshed in vain")
		s.vain |= 1 << a.got.tok
	default:
		a.orphan = a.got.tok
	}
	if a.kept.gen != 0 && !a.carried {
		pr.ending |= 1 << a.kept.tok
	}
	a.pc, a.back = aUnlock, aIdle
	switch {
	case m.staleAgain:
		m.again(s, p)
	case e.Usable(uint64(a.after.gen), s.time()):
		m.see("stale: adopt")
		m.adopt(s, p, stored(e))
	case e.Alive(s.time()) && e.Open.Nonce != nonce(a.nonce): // ours can come back with a lost entry
		m.see("stale: wait")
		a.noLogin, a.back = true, aLoad
	default:
		m.see("stale: nothing")
		m.deliver(s, p, sess{}, false)
	}
}

// adopt makes a session the process's own and gives it to the callers.
func (m *model) adopt(s *state, p int, got sess) {
	pr := &s.procs[p]
	if got.gen > pr.floor && got.gen > pr.near.gen {
		pr.near = got
	}
	m.deliver(s, p, got, false)
}

// deliver ends the attempt for all its callers: with a session; with an error
// that is everybody's; or, notElected, with one that is only the starter's.
func (m *model) deliver(s *state, p int, got sess, notElected bool) {
	pr := &s.procs[p]
	a := &pr.att
	if a.orphan != 0 {
		m.see("orphan")
		pr.ending |= 1 << a.orphan
		a.orphan = 0
	}
	for c := range pr.callers {
		if a.joined&(1<<c) == 0 {
			continue
		}
		cl := &pr.callers[c]
		switch {
		case got.gen != 0:
			m.take(s, p, c, got)
		case notElected && (a.refresh || uint8(c) != a.starter):
			cl.pc = cStart
		case a.refresh && cl.rejected.gen < a.after.gen && !m.failTogether:
			m.see("served though the refresh failed")
			cl.pc = cStart
		default:
			if a.refresh && m.entries[s.store].Usable(uint64(cl.rejected.gen), s.time()) {
				m.fail("R7: a caller fails with a refresh ahead, and could be served")
			}
			cl.pc, cl.failed = cDone, true
		}
	}
	a.joined = 0
}

// take is R1 for one caller.
func (m *model) take(s *state, p, c int, got sess) {
	cl := &s.procs[p].callers[c]
	ok := got.newerThan(cl.rejected)
	if m.adoptOther {
		ok = got.gen != cl.rejected.gen
	}
	if m.joinersAdopt {
		ok = true
	}
	switch {
	case ok:
		if !got.newerThan(cl.rejected) {
			m.fail("R1: %v returned after %v was rejected", got, cl.rejected)
		}
		cl.held, cl.pc = got, cRun
	case got.gen > cl.rejected.gen: // the rejected token under another number
		m.see("token again")
		m.reject(s, p, c, got)
	default:
		m.see("joiner starts over")
		cl.pc = cStart
	}
}

// reject is the first half of R2: mark, drop the near copy, go on to Invalidate.
func (m *model) reject(s *state, p, c int, got sess) {
	pr := &s.procs[p]
	cl := &pr.callers[c]
	pr.floor = max(pr.floor, got.gen)
	pr.refused |= 1 << got.tok
	if pr.near.gen <= pr.floor {
		pr.near = sess{}
	}
	cl.rejected, cl.held, cl.names = got, sess{}, got.gen
	cl.pc, cl.old = cSwap, -1
}

func (m *model) caller(s *state, p, c int, lost bool) {
	pr := &s.procs[p]
	cl := &pr.callers[c]
	switch {
	case cl.pc == cSwap:
		m.callerSwap(s, p, c, lost)
	case cl.pc == cRun:
		m.run(s, p, c)
	case m.procs[p][c] == leaver || m.procs[p][c] == forgiver:
		cl.pc, cl.old = cSwap, -1
	case m.procs[p][c] == putter:
		s.tokens++
		if m.up == single {
			s.live = 0
		}
		s.live |= 1 << s.tokens
		cl.pc, cl.old, cl.own = cSwap, -1, s.tokens
	case m.procs[p][c] == toucher || m.procs[p][c] == retirer:
		if cl.names = pr.near.gen; cl.names != 0 {
			cl.pc, cl.old = cSwap, -1
		}
	case m.procs[p][c] == refresher:
		if pr.near.gen != 0 && pr.att.pc == aIdle {
			s.tally.refreshes++
			m.open(s, p, c, sess{gen: pr.near.gen})
			pr.att.refresh, pr.att.joined = true, 0
			cl.pc = cDone
		}
	default:
		m.start(s, p, c)
	}
}

func (m *model) start(s *state, p, c int) {
	pr := &s.procs[p]
	cl := &pr.callers[c]
	switch {
	case pr.near.gen != 0 && pr.near.newerThan(cl.rejected):
		m.take(s, p, c, pr.near)
	case pr.att.pc == aIdle:
		m.open(s, p, c, cl.rejected)
		pr.att.noLogin = cl.after > 0 && !m.spentBegins
		cl.pc = cWait
	case pr.att.pc != aUnlock || pr.att.back == aLoad:
		pr.att.joined |= 1 << c
		cl.pc = cWait
	}
}

// open starts the shared attempt.
func (m *model) open(s *state, p, c int, after sess) {
	pr := &s.procs[p]
	pr.nonces++
	pr.att = attempt{pc: aLoad, starter: uint8(c), joined: 1 << c, after: after, nonce: uint8(p+1)<<4 | pr.nonces}
}

// run is the caller's func: R6.
func (m *model) run(s *state, p, c int) {
	cl := &s.procs[p].callers[c]
	cl.runs++
	if cl.runs > 2 {
		m.fail("R6: fn ran %d times", cl.runs)
	}
	if s.live&(1<<cl.held.tok) != 0 {
		cl.pc, cl.held = cDone, sess{}
		return
	}
	m.reject(s, p, c, cl.held)
}

// callerSwap is a step of Invalidate, Clear or Unsuppress.
func (m *model) callerSwap(s *state, p, c int, lost bool) {
	cl := &s.procs[p].callers[c]
	if cl.old >= 0 {
		old := cl.old
		if m.blindDelete && m.entries[s.store].Session.Gen != 0 && m.procs[p][c] == doer {
			e := m.entries[s.store]
			e.Session = entry.Session{}
			old, cl.new = s.store, m.stamped(s, p, e)
		}
		ok := m.swap(s, old, cl.new, m.procs[p][c], cl.names)
		switch {
		case lost:
			cl.unanswered(s)
		case ok:
			m.swapped(s, p, c)
		default:
			m.callerLoad(s, p, c)
		}
		return
	}
	m.callerLoad(s, p, c)
}

// unanswered notes what a swap may have removed, and begins anew.
func (cl *caller) unanswered(s *state) {
	cl.old = -1
	cl.removed |= 1 << cl.held.tok
	cl.gone |= s.bit(cl.held.gen)
}

func (m *model) callerLoad(s *state, p, c int) {
	pr := &s.procs[p]
	cl := &pr.callers[c]
	e := m.entries[s.store]
	var next entry.Entry
	switch m.procs[p][c] {
	case leaver:
		var removed entry.Session
		next, removed = m.clear(e, s.time())
		s.now++
		cl.held = stored(entry.Entry{Session: removed})
	case putter:
		var displaced entry.Session
		gen := m.number(e, s.time())
		next, displaced = m.put(m.rules, e, gen, m.success(*s, cl.own).Session, s.time())
		s.now++
		cl.held = stored(entry.Entry{Session: displaced})
	case toucher:
		next = m.touch(e, uint64(cl.names), time.Duration(m.life)*time.Microsecond, time.Microsecond, s.time())
		if next.Usable(0, s.time()) && !e.Usable(0, s.time()) {
			m.fail("P2: session %d revived by Touch", cl.names)
		}
	case retirer:
		var removed entry.Session
		next, removed = m.retire(e, uint64(cl.names), s.time())
		cl.held = stored(entry.Entry{Session: removed})
		if next.Session != e.Session && e.Refreshable(0, s.time()) {
			m.fail("P2: session %d retired while it can be used or refreshed", cl.names)
		}
	case forgiver:
		next = entry.Unsuppress(e)
	default:
		next = m.invalidate(m.rules, e, uint64(cl.rejected.gen), s.time())
		if next.Session.Gen == uint64(cl.rejected.gen) && next.Session.Gen != 0 && next.Session.Expires != 0 {
			m.fail("P2: generation %d is stored after Invalidate", next.Session.Gen)
		}
	}
	if next == e {
		m.swapped(s, p, c)
		return
	}
	cl.pc, cl.old, cl.new = cSwap, s.store, m.stamped(s, p, next)
}

// swapped follows a caller's swap that is done.
func (m *model) swapped(s *state, p, c int) {
	pr := &s.procs[p]
	cl := &pr.callers[c]
	cl.old, cl.new = 0, 0
	switch by := m.procs[p][c]; {
	case by == leaver || by == putter || by == retirer:
		m.hand(s, cl.held)
		s.maybe |= cl.gone
		pr.ending |= (cl.removed | 1<<cl.held.tok) &^ (1 | 1<<cl.own)
		switch {
		case by == leaver:
			pr.near = sess{}
		case by == retirer && cl.held.gen != 0:
			m.see("retired")
		}
		*cl = caller{pc: cDone}
	case by == forgiver || by == toucher:
		cl.pc = cDone
	case cl.runs >= 2:
		cl.pc, cl.failed = cDone, true
	default:
		cl.pc = cStart
	}
}

// end logs one token out: R5.
func (m *model) end(s *state, p int) {
	pr := &s.procs[p]
	tok := uint8(bits.TrailingZeros32(pr.ending))
	pr.ending &^= 1 << tok
	current := stored(m.entries[s.store]).tok == tok
	switch {
	case pr.refused&(1<<tok) != 0:
		m.see("kept: rejected")
		return
	case current && !m.noTokenCheck:
		m.see("kept: stored")
		return
	}
	m.see("logged out")
	if current {
		m.fail("R5: the stored token %d was logged out", tok)
	}
	s.live &^= 1 << tok
}

// atRest checks what must hold in every state.
func (m *model) atRest(s *state) {
	for p := range s.procs {
		a := &s.procs[p].att
		if !s.procs[p].dead && s.lock != 0 && s.lock == a.nonce && (a.pc == aLoad || a.pc == aIdle) {
			m.fail("process %d waits for its own lock", p)
		}
	}
	e := m.entries[s.store]
	if !e.Usable(0, s.time()) {
		return
	}
	if s.rejected&s.bit(uint16(e.Session.Gen)) != 0 && !m.clockBack {
		m.fail("P2: session %d is usable after it was rejected", e.Session.Gen)
	}
	if e.Look(0, s.time()) != entry.Found {
		m.fail("R7: session %d is not served", e.Session.Gen)
	}
}

// settle runs on without faults, every actor in turn, and lets time pass after
// more turns than a login takes, until nobody has anything left to do. That
// must be so once whatever is dead has run out.
func (m *model) settle(s state) {
	m.bad, m.log = "", m.log[:0]
	for range patience {
		for range 40 {
			if m.bad != "" {
				return
			}
			if m.done(&s) {
				m.noLeak(&s)
				return
			}
			m.turn(&s)
		}
		m.log = append(m.log, "tick")
		m.tick(&s)
	}
	m.fail("progress: somebody waits for ever")
}

// turn lets every actor make one step.
func (m *model) turn(s *state) {
	m.normal(s, func(st step, f func(*state)) {
		if m.bad != "" || st.what == sTick || st.what == sRenew || st.what == sEvict {
			return
		}
		was := *s
		f(s)
		m.atRest(s)
		if *s != was {
			m.log = append(m.log, m.name(st, &was))
		}
	})
}

func (m *model) done(s *state) bool {
	for p := range s.procs {
		if s.procs[p].dead {
			continue
		}
		if s.procs[p].att.pc != aIdle || s.procs[p].ending != 0 {
			return false
		}
		for c, k := range m.procs[p] {
			pc := s.procs[p].callers[c].pc
			needless := k == idler || k == refresher || pc == cStart && (k == toucher || k == retirer)
			if !needless && pc != cDone {
				return false
			}
		}
	}
	return true
}

// noLeak: without a crash or a lost entry every token that lives is stored, and
// every session that left the entry alive is somebody's.
func (m *model) noLeak(s *state) {
	if s.used[crash]+s.used[flush]+s.used[failover] > 0 {
		return
	}
	leaked := s.live &^ s.vain
	if tok := stored(m.entries[s.store]).tok; tok != 0 {
		leaked &^= 1 << tok
	}
	if leaked != 0 {
		m.fail("leak: tokens %b live and nobody knows of them", leaked)
	}
	if left := s.left &^ (s.handed | s.maybe); left != 0 {
		m.fail("R5: sessions %b left the entry and nobody was given them", left)
	}
}

var stepNames = [...]string{"attempt", "renews", "caller", "logs a token out", "tick", "late request", "forgets its near copy"}

func (m *model) name(st step, s *state) string {
	pcs := [...]string{"idle", "load", "lock", "begin", "login", "inside", "commit", "unlock"}
	switch st.what {
	case sAttempt:
		return fmt.Sprintf("p%d %s", st.p, pcs[s.procs[st.p].att.pc])
	case sCaller:
		return fmt.Sprintf("p%d.%d %s", st.p, st.c, [...]string{"start", "wait", "run", "swap", "done"}[s.procs[st.p].callers[st.c].pc])
	case sFault:
		return fmt.Sprintf("FAULT %s p%d at %s", faultNames[st.fault], st.p, pcs[s.procs[st.p].att.pc])
	}
	return fmt.Sprintf("p%d %s", st.p, stepNames[st.what])
}

// finding is the outcome of an exploration.
type finding struct {
	violation string
	trace     []step
	after     []string // steps of settle
	states    int
	complete  bool // every state within the bounds was seen
}

// explore walks breadth first through at most limit states, and lets every
// settleEvery-th of them run to its end. States are told apart by a 64-bit
// hash: two that collide would hide one, never invent a violation.
func (m *model) explore(limit, settleEvery int) finding {
	type edge struct {
		from uint64
		step step
	}
	seed := maphash.MakeSeed()
	start := m.initial()
	root := maphash.Comparable(seed, start)
	seen := map[uint64]edge{root: {}}
	queue := []state{start}
	f := finding{complete: true}
	path := func(h uint64) (steps []step) {
		for h != root {
			steps = append([]step{seen[h].step}, steps...)
			h = seen[h].from
		}
		return steps
	}
	for len(queue) > 0 && f.violation == "" {
		s := queue[0]
		queue = queue[1:]
		f.states++
		h := maphash.Comparable(seed, s)
		m.next(&s, func(st step, n *state) {
			if f.violation != "" {
				return
			}
			if m.bad != "" {
				f.violation, f.trace = m.bad, append(path(h), st)
				return
			}
			nh := maphash.Comparable(seed, *n)
			if _, ok := seen[nh]; ok {
				return
			}
			if len(seen) >= limit {
				f.complete = false
				return
			}
			seen[nh] = edge{h, st}
			queue = append(queue, *n)
		})
		if f.violation == "" && f.states%settleEvery == 0 {
			if m.settle(s); m.bad != "" {
				f.violation, f.trace, f.after = m.bad, path(h), m.log
			}
		}
	}
	return f
}

// walk makes n random walks to the end of each run.
func (m *model) walk(n int, seed uint64) finding {
	rnd := rand.New(rand.NewPCG(seed, 0))
	f := finding{}
	for range n {
		s := m.initial()
		var trace []step
		for range 500 {
			var pick state
			var by step
			options := 0
			faulty := rnd.IntN(8) == 0
			m.next(&s, func(st step, next *state) {
				if m.bad != "" && f.violation == "" {
					f.violation, f.trace = m.bad, append(trace, st)
				}
				if options > 0 && faulty != (st.what == sFault) {
					return
				}
				options++
				if rnd.IntN(options) == 0 {
					pick, by = *next, st
				}
			})
			if f.violation != "" {
				return f
			}
			if options == 0 {
				break
			}
			s, trace = pick, append(trace, by)
			f.states++
		}
		if m.settle(s); m.bad != "" {
			f.violation, f.trace, f.after = m.bad, trace, m.log
			return f
		}
	}
	return f
}

// story replays a finding and names its steps.
func (m *model) story(f finding) string {
	var b strings.Builder
	s := m.initial()
	for _, want := range f.trace {
		fmt.Fprintf(&b, "\n  %s", m.name(want, &s))
		var after state
		m.next(&s, func(st step, n *state) {
			if st == want {
				after = *n
			}
		})
		s = after
	}
	if len(f.after) > 0 {
		fmt.Fprintf(&b, "\n  and then, without further faults:\n  %s", strings.Join(f.after, "\n  "))
	}
	return b.String()
}

// everything may go wrong twice.
var everything = [faults]uint8{2, 2, 2, 2, 2, 2, 2, 2, 2, 2}

var depth = flag.Int("model.depth", 1, "multiplies the bounds of the model checker")

// bound scales a bound to the machinery that runs it.
func bound(n int) int { return max(1, n*(*depth)/slower) }

// TestModelHolds explores each scenario breadth first, with one fault to the
// end and with two as far as the bound goes, and then at random with four.
func TestModelHolds(t *testing.T) {
	scenarios := map[string]scenario{
		"two cold":         {procs: procs{{doer}, {doer}}, ticks: 1},
		"three cold":       {procs: procs{{doer}, {doer}, {doer}}, ticks: 1},
		"two warm":         {procs: procs{{doer}, {doer}}, warm: true, ticks: 1},
		"joiners":          {procs: procs{{doer, doer}, {doer, doer}}, warm: true, ticks: 1},
		"heartbeats":       {procs: procs{{doer}, {doer}, {leaver}}, heartbeats: true, ticks: 1},
		"logout":           {procs: procs{{doer}, {doer}, {leaver}}, warm: true, ticks: 1},
		"refresh":          {procs: procs{{doer, refresher}, {doer, refresher}}, warm: true, evicts: true, ticks: 1},
		"expiry":           {procs: procs{{doer}, {doer}}, warm: true, life: 2*tickLen - 10, ticks: 3, budget: 2},
		"clock set back":   {procs: procs{{doer, doer}, {doer}}, ticks: 1, clockBack: true},
		"single session":   {procs: procs{{doer, doer}, {doer}}, up: single, ticks: 1},
		"same token again": {procs: procs{{doer, doer}, {doer}}, up: repeating, ticks: 1},
		"denied":           {procs: procs{{doer}, {doer, doer}, {doer}}, up: denying, ticks: 2},
		"denied, forgiven": {procs: procs{{doer}, {doer}, {forgiver}}, up: denying, ticks: 1},
		"sessions refused": {procs: procs{{doer, doer}, {doer}}, up: hostile, ticks: 2},
		"one dead token":   {procs: procs{{doer, doer}, {doer}}, up: stuck, ticks: 2},
		"put":              {procs: procs{{doer}, {doer}, {putter}}, ticks: 1},
		"put, clock back":  {procs: procs{{doer}, {doer}, {putter}}, ticks: 1, clockBack: true},
		"put twice":        {procs: procs{{doer, putter}, {doer, putter}, {leaver}}, warm: true, ticks: 1},
		"put, denied":      {procs: procs{{doer, doer}, {doer}, {putter}}, up: denying, ticks: 2},
		"touch":            {procs: procs{{doer, toucher}, {doer, toucher}, {putter}}, warm: true, life: 2*tickLen - 10, ticks: 3},
		"scopes":           {procs: procs{{doer, retirer}, {doer, retirer}, {toucher}}, warm: true, life: 2*tickLen - 10, ticks: 3},
		"refresh material": {procs: procs{{doer, refresher}, {doer, refresher}}, warm: true, evicts: true, refresh: longLife, ticks: 1},
		"refresh, expired": {procs: procs{{doer, retirer}, {doer, retirer}}, warm: true, life: 2*tickLen - 10, refresh: 3*tickLen - 10, ticks: 3},
		"refresh, put":     {procs: procs{{doer, refresher}, {doer, putter}, {leaver}}, warm: true, refresh: longLife, ticks: 1},
		"refresh, spoiled": {procs: procs{{doer, doer}, {doer}}, up: spoiled, refresh: longLife, ticks: 2},
	}
	start := time.Now()
	seen := map[string]int{}
	var states, steps, ran int
	for name, sc := range scenarios {
		t.Run(name, func(t *testing.T) {
			sc.faults = everything
			if sc.clockBack { // a failover would bring back a lease that ends in the future
				sc.faults[failover] = 0
			}
			for _, bounds := range []struct {
				total  uint8
				states int
			}{{1, 50_000}, {2, 30_000}} {
				sc.total = bounds.total
				m := newModel(sc, weak{})
				f := m.explore(bound(bounds.states), 16)
				require.Empty(t, f.violation, "%s", m.story(f))
				t.Logf("%d faults: %d states, all: %v", sc.total, f.states, f.complete)
				states += f.states
			}
			sc.total = 4
			m := newModel(sc, weak{})
			f := m.walk(bound(1_500), 1)
			require.Empty(t, f.violation, "%s", m.story(f))
			steps += f.states
			for turn, n := range m.seen {
				seen[turn] += n
			}
			ran++
		})
	}
	t.Logf("%d states, %d random steps, %v", states, steps, time.Since(start).Round(time.Millisecond))
	for _, turn := range turns {
		if ran == len(scenarios) {
			require.NotZero(t, seen[turn], "the model no longer reaches: %s", turn)
		}
	}
}
