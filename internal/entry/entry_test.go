package entry_test

import (
	"math"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/internal/entry"
)

// now is where every test begins.
const now = entry.Time(1_790_000_000_000_000)

const (
	window  = 15 * time.Minute
	proving = 30 * time.Second
	lease   = 3 * time.Second
	life    = 10 * time.Minute
	day     = 24 * time.Hour
)

var rules = entry.Rules{
	Budget: 3, Window: window, Proving: proving,
	Retry:  entry.Backoff{Min: 250 * time.Millisecond, Max: 30 * time.Second},
	Reject: entry.Backoff{Min: time.Second, Max: 30 * time.Second},
}

var ours, theirs = nonce(1), nonce(2)

func ask(n entry.Nonce, after uint64) entry.Ask {
	return entry.Ask{Nonce: n, After: after, Lease: lease, Holder: "host/1"}
}

func session(at entry.Time) entry.Result {
	return entry.Result{Session: entry.Session{Record: "secret", Expires: at.Add(life)}}
}

// begun is e with an attempt of n's opened at a time, after any session there.
func begun(t *testing.T, e entry.Entry, n entry.Nonce, at entry.Time) entry.Entry {
	t.Helper()
	next, v := rules.Begin(e, ask(n, e.Session.Gen), at)
	require.Equal(t, entry.Lead, v)
	return next
}

// loggedIn is e with a session made and stored at a time.
func loggedIn(t *testing.T, e entry.Entry, at entry.Time) entry.Entry {
	t.Helper()
	e = begun(t, e, theirs, at)
	return committed(t, e, theirs, session(at), at)
}

// material may be refreshed until some time.
func material(until entry.Time) entry.Result {
	return entry.Result{Session: entry.Session{Record: "refresh", Expires: now.Add(life), End: now.Add(2 * life), Refresh: until}}
}

// storing is e with res made and stored now.
func storing(t *testing.T, e entry.Entry, res entry.Result) entry.Entry {
	t.Helper()
	return committed(t, begun(t, e, theirs, now), theirs, res, now)
}

// unread asks to replace a session because its record cannot be read.
func unread(n entry.Nonce, after uint64) entry.Ask {
	a := ask(n, after)
	a.Unread = true
	return a
}

func committed(t *testing.T, e entry.Entry, n entry.Nonce, res entry.Result, at entry.Time) entry.Entry {
	t.Helper()
	next, _, v := rules.Commit(e, e.Open.Gen, n, res, at)
	require.Equal(t, entry.Stored, v)
	return next
}

func failed(t *testing.T, e entry.Entry, c entry.Class, at entry.Time) entry.Entry {
	t.Helper()
	return committed(t, begun(t, e, theirs, at), theirs, entry.Result{Class: c}, at)
}

// Begin

// Each entry satisfies the condition of its own clause and of every later one,
// so an answer out of order shows.
func TestBeginAsksItsQuestionsInOrder(t *testing.T) {
	all := entry.Entry{
		Gen: 50, Open: entry.Attempt{Gen: 50, Nonce: ours, Lease: now + 1},
		Session:  entry.Session{Gen: 40, Expires: now + 1},
		Failure:  entry.Failure{Class: entry.Denied, Until: now + 1},
		Attempts: 3, Window: now + 1, Proven: now + 1,
	}
	notOurs := all
	notOurs.Open.Nonce = theirs
	noSession := notOurs
	noSession.Session = entry.Session{}
	noFailure := noSession
	noFailure.Failure = entry.Failure{}
	noLease := noFailure
	noLease.Open.Lease = now
	noBudget := noLease
	noBudget.Attempts = 2

	for name, c := range map[string]struct {
		e    entry.Entry
		want entry.Verdict
	}{
		"1 our own attempt":       {all, entry.Lead},
		"2 a session":             {notOurs, entry.Found},
		"3 a failure in force":    {noSession, entry.Suppressed},
		"4 somebody else's lease": {noFailure, entry.Busy},
		"5 the budget":            {noLease, entry.Suppressed},
		"6 nothing in the way":    {noBudget, entry.Lead},
	} {
		t.Run(name, func(t *testing.T) {
			next, v := rules.Begin(c.e, ask(ours, 0), now)
			assert.Equal(t, c.want, v)
			if v != entry.Lead {
				assert.Equal(t, c.e, next, "only Lead changes the entry")
			}
			if c.want == entry.Lead && c.e.Open.Nonce == theirs {
				assert.NotEqual(t, c.e.Open.Gen, next.Open.Gen)
			}
		})
	}
}

// What time alone decides is not worth a write.
func TestBeginThatDoesNotLeadWritesNothingEvenWhenSomethingIsDue(t *testing.T) {
	due := loggedIn(t, entry.Entry{Attempts: 2, Window: now.Add(day), Young: 1}, now)
	at := due.Proven
	failing, busy := due, begun(t, due, theirs, now)
	failing.Failure = entry.Failure{Class: entry.Denied, Until: at + 1}
	for name, c := range map[string]struct {
		e     entry.Entry
		after uint64
		want  entry.Verdict
	}{
		"found":      {due, 0, entry.Found},
		"suppressed": {failing, due.Session.Gen, entry.Suppressed},
		"busy":       {busy, due.Session.Gen, entry.Busy},
		"refused":    {due, 1<<64 - 1, entry.Refused},
	} {
		t.Run(name, func(t *testing.T) {
			c.e.Open.Lease = at + 1
			next, v := rules.Begin(c.e, ask(ours, c.after), at)
			assert.Equal(t, c.want, v)
			assert.Equal(t, c.e, next)
		})
	}
}

func TestBeginTakesNoAttemptForItsOwnWhereNoneIsOpen(t *testing.T) {
	e, v := rules.Begin(entry.Entry{}, ask(entry.Nonce{}, 0), now)
	require.Equal(t, entry.Lead, v)
	assert.EqualValues(t, now, e.Open.Gen)
}

func TestBeginOpensACountedAttemptOnANewEntry(t *testing.T) {
	e, v := rules.Begin(entry.Entry{}, ask(ours, 0), now)
	require.Equal(t, entry.Lead, v)
	assert.Equal(t, entry.Entry{
		Born: now, Keep: now.Add(window), Gen: uint64(now),
		Open:     entry.Attempt{Gen: uint64(now), Nonce: ours, Since: now, Lease: now.Add(lease), Holder: "host/1"},
		Attempts: 1, Window: now.Add(window),
	}, e)
}

func TestBeginRepeatedLeadsTheSameGenerationAndCountsNothing(t *testing.T) {
	first := begun(t, entry.Entry{}, ours, now)
	later := now.Add(time.Second)
	again, v := rules.Begin(first, ask(ours, 0), later)
	require.Equal(t, entry.Lead, v)
	want := first
	want.Open.Lease = later.Add(lease)
	assert.Equal(t, want, again)

	sameInstant, v := rules.Begin(first, ask(ours, 0), now)
	require.Equal(t, entry.Lead, v)
	assert.Equal(t, first, sameInstant, "nothing to swap")
}

func TestBeginKnowsItsOwnAttemptAfterTheLease(t *testing.T) {
	e := begun(t, entry.Entry{}, ours, now)
	again, v := rules.Begin(e, ask(ours, 0), now.Add(2*lease))
	require.Equal(t, entry.Lead, v)
	assert.Equal(t, e.Open.Gen, again.Open.Gen)
}

func TestBeginNumbersAreThePastTheAskedAndTheTimeWhicheverIsMost(t *testing.T) {
	for name, c := range map[string]struct {
		gen, after, want uint64
	}{
		"time":                       {gen: 5, after: 4, want: uint64(now)},
		"one more than issued":       {gen: uint64(now) + 7, after: 4, want: uint64(now) + 8},
		"one more than asked":        {gen: 5, after: uint64(now) + 9, want: uint64(now) + 10},
		"asked beyond what is known": {gen: uint64(now) + 7, after: uint64(now) + 9, want: uint64(now) + 10},
	} {
		t.Run(name, func(t *testing.T) {
			e, v := rules.Begin(entry.Entry{Gen: c.gen}, ask(ours, c.after), now)
			require.Equal(t, entry.Lead, v)
			assert.Equal(t, c.want, e.Gen)
			assert.Equal(t, c.want, e.Open.Gen)
		})
	}
}

func TestBeginRefusesAnAfterFromTheFuture(t *testing.T) {
	limit := uint64(now.Add(day))
	for name, c := range map[string]struct {
		e     entry.Entry
		after uint64
		want  entry.Verdict
	}{
		"a day ahead":                    {entry.Entry{}, limit, entry.Lead},
		"more than a day":                {entry.Entry{}, limit + 1, entry.Refused},
		"as far as numbers go":           {entry.Entry{}, 1<<64 - 1, entry.Refused},
		"ahead, but issued by the entry": {entry.Entry{Gen: limit + 5}, limit + 5, entry.Lead},
		"ahead of what the entry issued": {entry.Entry{Gen: limit + 5}, limit + 6, entry.Refused},
	} {
		t.Run(name, func(t *testing.T) {
			next, v := rules.Begin(c.e, ask(ours, c.after), now)
			require.Equal(t, c.want, v)
			if v == entry.Refused {
				assert.Equal(t, c.e, next)
			}
		})
	}
}

func TestBeginFindsOnlyNewerAndLiveSessions(t *testing.T) {
	e := loggedIn(t, entry.Entry{}, now)
	gen := e.Session.Gen
	for name, c := range map[string]struct {
		after uint64
		at    entry.Time
		want  entry.Verdict
	}{
		"any will do":             {0, now, entry.Found},
		"an older was rejected":   {gen - 1, now, entry.Found},
		"this one was rejected":   {gen, now, entry.Lead},
		"a newer was rejected":    {gen + 1, now, entry.Lead},
		"the last instant":        {0, e.Session.Expires - 1, entry.Found},
		"the instant it expires":  {0, e.Session.Expires, entry.Lead},
		"rejected, long after it": {gen, e.Session.Expires.Add(time.Hour), entry.Lead},
	} {
		t.Run(name, func(t *testing.T) {
			_, v := rules.Begin(e, ask(ours, c.after), c.at)
			assert.Equal(t, c.want, v)
		})
	}
}

func TestBeginLeavesTheStoredSessionReadable(t *testing.T) {
	e := loggedIn(t, entry.Entry{}, now)
	next := begun(t, e, ours, now.Add(time.Minute))
	assert.Equal(t, e.Session, next.Session)
	assert.Equal(t, entry.Found, next.Look(0, now.Add(time.Minute)))
}

func TestBeginOvertakesADeadLeaderWhoStaysCounted(t *testing.T) {
	dead := begun(t, entry.Entry{}, theirs, now)
	_, v := rules.Begin(dead, ask(ours, 0), dead.Open.Lease-1)
	require.Equal(t, entry.Busy, v)
	next, v := rules.Begin(dead, ask(ours, 0), dead.Open.Lease)
	require.Equal(t, entry.Lead, v)
	assert.Greater(t, next.Open.Gen, dead.Open.Gen)
	assert.EqualValues(t, 2, next.Attempts)
	assert.Equal(t, dead.Window, next.Window, "the first attempt sets the window")
	assert.Equal(t, dead.Born, next.Born)
}

func TestBeginKeepsTheEntryAsLongAsTheLease(t *testing.T) {
	a := ask(ours, 0)
	a.Lease = day
	e, v := rules.Begin(entry.Entry{}, a, now)
	require.Equal(t, entry.Lead, v)
	assert.Equal(t, now.Add(day), e.Keep)
}

// Budget and window

func TestThreeCrashedLeadersSuppressUntilTheWindowEnds(t *testing.T) {
	e, at := entry.Entry{}, now
	for i := range 3 {
		var v entry.Verdict
		e, v = rules.Begin(e, ask(nonce(byte(10+i)), 0), at)
		require.Equal(t, entry.Lead, v)
		at = at.Add(lease)
	}
	_, v := rules.Begin(e, ask(ours, 0), at)
	require.Equal(t, entry.Suppressed, v)
	assert.Equal(t, entry.Failure{Class: entry.Unknown, Until: now.Add(window)}, rules.Suppression(e, at))
	assert.Equal(t, entry.Free, e.Look(0, at), "readers do not judge attempts")
	over := e
	over.Failure = entry.Failure{Class: entry.Deferred, Until: at}
	assert.Equal(t, entry.Failure{Class: entry.Unknown, Until: now.Add(window)}, rules.Suppression(over, at), "of two reasons the one in force")

	_, v = rules.Begin(e, ask(ours, 0), now.Add(window)-1)
	require.Equal(t, entry.Suppressed, v)
	next, v := rules.Begin(e, ask(ours, 0), now.Add(window))
	require.Equal(t, entry.Lead, v)
	assert.EqualValues(t, 1, next.Attempts)
	assert.Equal(t, now.Add(2*window), next.Window)
}

func TestUnknownOutcomesSpendTheBudget(t *testing.T) {
	e, at := entry.Entry{}, now
	for range 3 {
		e = failed(t, e, entry.Unknown, at)
		at = e.Failure.Until
	}
	_, v := rules.Begin(e, ask(ours, 0), at)
	assert.Equal(t, entry.Suppressed, v)
}

// An expired session stays in the entry, and had proved itself.
func TestBudgetHoldsWhileAnExpiredSessionIsStillStored(t *testing.T) {
	for name, crash := range map[string]bool{"unknown outcomes": false, "crashed leaders": true} {
		t.Run(name, func(t *testing.T) {
			e := loggedIn(t, entry.Entry{}, now)
			at := e.Session.Expires
			for i := range 3 {
				n := nonce(byte(10 + i))
				e = begun(t, e, n, at)
				if !crash {
					e = committed(t, e, n, entry.Result{Class: entry.Unknown}, at)
				}
				at = max(at.Add(lease), e.Failure.Until)
			}
			assert.EqualValues(t, 3, e.Attempts)
			_, v := rules.Begin(e, ask(ours, 0), at)
			assert.Equal(t, entry.Suppressed, v)
		})
	}
}

func TestSessionThatProvedItselfClearsWhatWasCounted(t *testing.T) {
	counted := failed(t, entry.Entry{}, entry.Unknown, now)
	counted.Young = 1
	at := counted.Failure.Until
	e := loggedIn(t, counted, at)
	require.EqualValues(t, 1, e.Attempts, "not by its success alone")

	early := begun(t, e, ours, at.Add(proving)-1)
	assert.EqualValues(t, 2, early.Attempts)
	assert.EqualValues(t, 1, early.Young)
	proven := begun(t, e, ours, at.Add(proving))
	assert.EqualValues(t, 1, proven.Attempts)
	assert.Zero(t, proven.Young)
}

func TestSessionThatProvesItselfDuringARenewalClearsThenToo(t *testing.T) {
	e := loggedIn(t, entry.Entry{Young: 1}, now)
	e = begun(t, e, ours, e.Proven-1)
	require.EqualValues(t, 1, e.Young)
	for _, res := range []entry.Result{session(now), {Class: entry.Unknown}} {
		assert.Zero(t, committed(t, e, ours, res, e.Proven).Young)
	}
}

func TestSessionIsProvenAfterAQuarterOfAShortLife(t *testing.T) {
	e := begun(t, entry.Entry{}, ours, now)
	e = committed(t, e, ours, entry.Result{Session: entry.Session{Expires: now.Add(40 * time.Second)}}, now)
	assert.Equal(t, now.Add(10*time.Second), e.Proven)
	long := loggedIn(t, entry.Entry{}, now)
	assert.Equal(t, now.Add(proving), long.Proven)
}

// Unread

func TestUnreadableSessionIsReplacedOncePerWindow(t *testing.T) {
	stored := loggedIn(t, entry.Entry{}, now)
	at := now.Add(time.Minute)
	open, v := rules.Begin(stored, unread(ours, stored.Session.Gen), at)
	require.Equal(t, entry.Lead, v)
	plain, _ := rules.Begin(stored, ask(ours, stored.Session.Gen), at)
	assert.Zero(t, plain.Unread, "who can read it does not stop those who cannot")
	plain.Unread = at.Add(window)
	require.Equal(t, plain, open, "that is all the difference")

	replaced := committed(t, open, ours, session(at), at)
	invalidated := rules.Invalidate(replaced, replaced.Session.Gen, at)
	cleared, _ := entry.Clear(replaced, at)
	put, _ := rules.Put(replaced, entry.Number(replaced, at), session(at).Session, at)
	for name, c := range map[string]struct {
		e      entry.Entry
		stands bool // a session that others can read
	}{
		"replaced":             {replaced, true},
		"nobody came back":     {open, true},
		"the login failed":     {committed(t, open, ours, entry.Result{Class: entry.Unknown}, at), true},
		"replaced, rejected":   {invalidated, false},
		"replaced, logged out": {cleared, false},
		"put since":            {put, true},
	} {
		t.Run(name, func(t *testing.T) {
			e := c.e
			assert.Equal(t, at.Add(window), e.Unread)
			e.Open.Lease, e.Failure = 0, entry.Failure{}
			if c.stands { // longer than the window
				e.Session.Expires = at.Add(2 * day)
			}
			for when, shielded := range map[entry.Time]bool{
				at: c.stands, at.Add(window) - 1: c.stands, at.Add(window): false, at.Add(day): false,
			} {
				next, v := rules.Begin(e, unread(theirs, e.Gen), when)
				switch stands := e.Usable(0, when); {
				case shielded:
					require.Equal(t, entry.Suppressed, v, when.Sub(at))
					assert.Equal(t, e, next)
				case stands:
					require.Equal(t, entry.Lead, v, when.Sub(at))
					assert.Equal(t, when.Add(window), next.Unread)
				default:
					require.Equal(t, entry.Lead, v, when.Sub(at))
					assert.Equal(t, e.Unread, next.Unread, "nothing is replaced")
				}
				next, v = rules.Begin(e, ask(theirs, e.Gen), when)
				require.Equal(t, entry.Lead, v, "who has read it, and was refused, goes on")
				assert.Equal(t, e.Unread, next.Unread)
			}
			_, v := rules.Begin(entry.Unsuppress(e), unread(theirs, e.Gen), at)
			assert.Equal(t, entry.Lead, v, "an operator's word ends it")
		})
	}
}

func TestUnreadableSessionIsWaitedForWhileItIsReplaced(t *testing.T) {
	stored := loggedIn(t, entry.Entry{}, now)
	open, v := rules.Begin(stored, unread(ours, stored.Session.Gen), now)
	require.Equal(t, entry.Lead, v)
	_, v = rules.Begin(open, unread(theirs, stored.Session.Gen), now)
	assert.Equal(t, entry.Busy, v)
	_, v = rules.Begin(committed(t, open, ours, session(now), now), unread(theirs, stored.Session.Gen), now)
	assert.Equal(t, entry.Found, v, "and what took its place is looked at")
}

func TestUnreadBeginRepeatedLeadsAndMovesNothingButTheLease(t *testing.T) {
	stored := loggedIn(t, entry.Entry{}, now)
	open, _ := rules.Begin(stored, unread(ours, stored.Session.Gen), now)
	later := now.Add(time.Second)
	again, v := rules.Begin(open, unread(ours, stored.Session.Gen), later)
	require.Equal(t, entry.Lead, v)
	want := open
	want.Open.Lease = later.Add(lease)
	assert.Equal(t, want, again)
}

func TestUnreadIsKeptAsLongAsItHolds(t *testing.T) {
	e := loggedIn(t, entry.Entry{}, now)
	e.Keep = 0
	e, v := rules.Begin(begun(t, e, theirs, now), unread(ours, e.Session.Gen), now.Add(lease))
	require.Equal(t, entry.Lead, v)
	require.Equal(t, now.Add(window), e.Window, "the first attempt set it")
	assert.Equal(t, now.Add(lease+window), e.Keep)
}

// Renew

func TestRenewExtendsItsOwnAttemptOnly(t *testing.T) {
	open := begun(t, entry.Entry{}, ours, now)
	gen, later := open.Open.Gen, now.Add(time.Second)
	cleared, _ := entry.Clear(open, now)
	overtaken := begun(t, open, theirs, open.Open.Lease)
	for name, c := range map[string]struct {
		e    entry.Entry
		gen  uint64
		n    entry.Nonce
		want entry.Time
	}{
		"ours":                 {open, gen, ours, later.Add(lease)},
		"another nonce":        {open, gen, theirs, open.Open.Lease},
		"another generation":   {open, gen + 1, ours, open.Open.Lease},
		"after a logout":       {cleared, gen, ours, 0},
		"overtaken":            {overtaken, gen, ours, overtaken.Open.Lease},
		"nothing open":         {entry.Entry{}, 0, entry.Nonce{}, 0},
		"generation 0 is none": {open, 0, ours, open.Open.Lease},
	} {
		t.Run(name, func(t *testing.T) {
			want := c.e
			want.Open.Lease = c.want
			assert.Equal(t, want, entry.Renew(c.e, c.gen, c.n, lease, later))
		})
	}
}

func TestRenewNeverShortensALease(t *testing.T) {
	open := begun(t, entry.Entry{}, ours, now)
	assert.Equal(t, open, entry.Renew(open, open.Open.Gen, ours, time.Millisecond, now))
}

func TestRenewKeepsTheEntryAsLongAsTheLease(t *testing.T) {
	open := begun(t, entry.Entry{}, ours, now)
	long := entry.Renew(open, open.Open.Gen, ours, window+time.Hour, now)
	assert.Equal(t, now.Add(window+time.Hour), long.Keep)
}

// Commit

func TestCommitOfASessionReplacesTheStoredOneAndReturnsIt(t *testing.T) {
	old := loggedIn(t, entry.Entry{}, now)
	at := now.Add(10 * time.Second)
	old.Failure = entry.Failure{Class: entry.Unknown, Until: now, Streak: 4}
	open := begun(t, old, ours, at)
	e, displaced, v := rules.Commit(open, open.Open.Gen, ours, session(at), at)
	require.Equal(t, entry.Stored, v)
	assert.Equal(t, old.Session, displaced)
	assert.Equal(t, open.Open.Gen, e.Session.Gen)
	assert.Equal(t, "secret", e.Session.Record)
	assert.Equal(t, entry.Attempt{}, e.Open)
	assert.Equal(t, entry.Closed{Gen: open.Open.Gen, Nonce: ours}, e.Done)
	assert.Equal(t, entry.Failure{}, e.Failure)
	assert.Equal(t, at.Add(proving), e.Proven)
	assert.Equal(t, open.Attempts-1, e.Attempts, "a login that succeeded is given back")
	assert.Equal(t, open.Gen, e.Gen)
}

func TestCommitGivesASessionItsOwnGeneration(t *testing.T) {
	open := begun(t, entry.Entry{}, ours, now)
	res := session(now)
	res.Session.Gen = 7
	assert.Equal(t, open.Open.Gen, committed(t, open, ours, res, now).Session.Gen)
}

func TestCommitAfterTheLeaseStillOwnsWhatNobodyTook(t *testing.T) {
	open := begun(t, entry.Entry{}, ours, now)
	_, _, v := rules.Commit(open, open.Open.Gen, ours, session(now), now.Add(time.Minute))
	assert.Equal(t, entry.Stored, v)
}

func TestCommitOfAFailureNeitherRemovesNorRestoresASession(t *testing.T) {
	stored := loggedIn(t, entry.Entry{}, now)
	at := now.Add(time.Minute)
	open := begun(t, stored, ours, at)
	invalidated := rules.Invalidate(open, stored.Session.Gen, at)
	for _, class := range []entry.Class{entry.Denied, entry.Deferred, entry.Unknown, entry.NotSent} {
		e, displaced, v := rules.Commit(open, open.Open.Gen, ours, entry.Result{Class: class}, at)
		require.Equal(t, entry.Stored, v)
		assert.Equal(t, stored.Session, e.Session)
		assert.Zero(t, displaced)
		assert.Equal(t, entry.Attempt{}, e.Open)
		assert.Equal(t, entry.Closed{Gen: open.Open.Gen, Nonce: ours}, e.Done)

		e, _, v = rules.Commit(invalidated, open.Open.Gen, ours, entry.Result{Class: class}, at)
		require.Equal(t, entry.Stored, v)
		assert.Zero(t, e.Session)
	}
}

func TestCommitOfAFailureSuppressesByItsClass(t *testing.T) {
	at := now.Add(time.Minute)
	for name, c := range map[string]struct {
		res      entry.Result
		want     entry.Failure
		attempts uint32
	}{
		"denied":                     {entry.Result{Class: entry.Denied}, entry.Failure{Class: entry.Denied, Until: at.Add(window), Streak: 2}, 2},
		"unknown":                    {entry.Result{Class: entry.Unknown}, entry.Failure{Class: entry.Unknown, Until: at.Add(time.Second), Streak: 3}, 2},
		"deferred":                   {entry.Result{Class: entry.Deferred}, entry.Failure{Class: entry.Deferred, Until: at.Add(time.Second), Streak: 3}, 1},
		"deferred, told to wait":     {entry.Result{Class: entry.Deferred, Wait: time.Minute}, entry.Failure{Class: entry.Deferred, Until: at.Add(time.Minute), Streak: 3}, 1},
		"deferred, told too little":  {entry.Result{Class: entry.Deferred, Wait: time.Millisecond}, entry.Failure{Class: entry.Deferred, Until: at.Add(time.Second), Streak: 3}, 1},
		"deferred, told for a week":  {entry.Result{Class: entry.Deferred, Wait: 7 * day}, entry.Failure{Class: entry.Deferred, Until: at.Add(window), Streak: 3}, 1},
		"unknown cannot ask to wait": {entry.Result{Class: entry.Unknown, Wait: time.Minute}, entry.Failure{Class: entry.Unknown, Until: at.Add(time.Second), Streak: 3}, 2},
		"not sent":                   {entry.Result{Class: entry.NotSent}, entry.Failure{Class: entry.Unknown, Until: now, Streak: 2}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			before := entry.Entry{Attempts: 1, Window: now.Add(window), Failure: entry.Failure{Class: entry.Unknown, Until: now, Streak: 2}}
			e := committed(t, begun(t, before, ours, at), ours, c.res, at)
			assert.Equal(t, c.want, e.Failure)
			assert.Equal(t, c.attempts, e.Attempts)
			assert.GreaterOrEqual(t, e.Keep, e.Failure.Until)
			if c.res.Class != entry.NotSent {
				assert.Equal(t, entry.Suppressed, e.Look(0, e.Failure.Until-1))
				assert.Equal(t, c.want, rules.Suppression(e, e.Failure.Until-1))
			}
			assert.Equal(t, entry.Free, e.Look(0, e.Failure.Until))
		})
	}
}

func TestCommitRepeatedIsStoredAndWritesNothing(t *testing.T) {
	open := begun(t, entry.Entry{}, ours, now)
	gen := open.Open.Gen
	stored := committed(t, open, ours, session(now), now)
	rejected := rules.Invalidate(stored, gen, now)
	refreshing := begun(t, stored, theirs, now)
	refreshFailed := committed(t, refreshing, theirs, entry.Result{Class: entry.Unknown}, now)
	for name, e := range map[string]entry.Entry{
		"still stored":                  stored,
		"invalidated meanwhile":         rejected,
		"another is being made":         refreshing,
		"another was tried and failed":  refreshFailed,
		"a failure of ours":             committed(t, open, ours, entry.Result{Class: entry.Denied}, now),
		"given up by us":                committed(t, open, ours, entry.Result{Class: entry.NotSent}, now),
		"invalidated, another is being": begun(t, rejected, theirs, now),
	} {
		t.Run(name, func(t *testing.T) {
			next, displaced, v := rules.Commit(e, gen, ours, session(now), now)
			assert.Equal(t, entry.Stored, v)
			assert.Equal(t, e, next)
			assert.Zero(t, displaced)
		})
	}
}

func TestCommitThatCameTooLateWritesNothing(t *testing.T) {
	open := begun(t, entry.Entry{}, ours, now)
	gen := open.Open.Gen
	overtaken := begun(t, open, theirs, open.Open.Lease)
	cleared, _ := entry.Clear(open, now)
	sameNumber := open // a lost entry and a clock set back issue a number twice
	sameNumber.Open.Nonce = theirs
	putThere, _ := rules.Put(entry.Entry{}, gen, session(now).Session, now)
	for name, c := range map[string]struct {
		e   entry.Entry
		gen uint64
	}{
		"no entry":                          {entry.Entry{}, gen},
		"no generation":                     {entry.Entry{}, 0},
		"no generation, another open":       {overtaken, 0},
		"no generation, nothing open":       {committed(t, open, ours, session(now), now), 0},
		"overtaken":                         {overtaken, gen},
		"overtaken and stored":              {committed(t, overtaken, theirs, session(now), now), gen},
		"overtaken and failed":              {committed(t, overtaken, theirs, entry.Result{Class: entry.Denied}, now), gen},
		"logged out":                        {cleared, gen},
		"closed by Invalidate":              {rules.Invalidate(open, gen, now), gen},
		"our number, another's attempt":     {sameNumber, gen},
		"our number, another's session":     {committed(t, sameNumber, theirs, session(now), now), gen},
		"our number, closed by another":     {committed(t, sameNumber, theirs, entry.Result{Class: entry.Unknown}, now), gen},
		"our number, put by another":        {putThere, gen},
		"our nonce under a number not ours": {open, gen + 1},
	} {
		t.Run(name, func(t *testing.T) {
			next, displaced, v := rules.Commit(c.e, c.gen, ours, session(now), now)
			assert.Equal(t, entry.Stale, v)
			assert.Equal(t, c.e, next)
			assert.Zero(t, displaced)
		})
	}
}

func TestCommitOfNothingByNobodyIsStale(t *testing.T) {
	for _, e := range []entry.Entry{{}, begun(t, entry.Entry{}, ours, now)} {
		next, _, v := rules.Commit(e, 0, entry.Nonce{}, session(now), now)
		assert.Equal(t, entry.Stale, v)
		assert.Equal(t, e, next)
	}
}

func TestGivingBackNeverGoesBelowNothing(t *testing.T) {
	open := entry.Unsuppress(begun(t, entry.Entry{}, ours, now))
	for _, res := range []entry.Result{session(now), {Class: entry.NotSent}, {Class: entry.Deferred}} {
		assert.Zero(t, committed(t, open, ours, res, now).Attempts)
	}
}

// Put

func TestPutStoresASessionAndReturnsTheOneItReplaces(t *testing.T) {
	e := loggedIn(t, entry.Entry{Stamp: nonce(9), Attempts: 2, Window: now.Add(day), Young: 1}, now)
	e = begun(t, e, ours, now)
	e.Failure = entry.Failure{Class: entry.Denied, Until: now.Add(window), Streak: 3}
	e.Unread = now.Add(time.Hour)
	ses := material(now.Add(2 * day)).Session
	ses.Gen = 7 // is not its to say
	at := now.Add(time.Second)
	next, displaced := rules.Put(e, uint64(at), ses, at)
	assert.Equal(t, e.Session, displaced)
	ses.Gen = uint64(at)
	want := e
	want.Gen, want.Open, want.Session, want.Failure = uint64(at), entry.Attempt{}, ses, entry.Failure{}
	want.Proven, want.Keep = at.Add(proving), ses.Refresh
	assert.Equal(t, want, next, "counts stay, and all else")
	assert.Equal(t, entry.Found, next.Look(0, at))
}

func TestPutOnANewKeyIsItsBirth(t *testing.T) {
	ses := session(now).Session
	e, displaced := rules.Put(entry.Entry{}, uint64(now), ses, now)
	assert.Zero(t, displaced)
	ses.Gen = uint64(now)
	assert.Equal(t, entry.Entry{Born: now, Keep: ses.Expires, Gen: uint64(now), Session: ses, Proven: now.Add(proving)}, e)
	later, _ := rules.Put(e, e.Gen+1, ses, now.Add(time.Hour))
	assert.Equal(t, now, later.Born)
}

func TestPutIsProvenAfterAQuarterOfAShortLife(t *testing.T) {
	e, _ := rules.Put(entry.Entry{}, uint64(now), entry.Session{Expires: now.Add(40 * time.Second)}, now)
	assert.Equal(t, now.Add(10*time.Second), e.Proven)
	assert.EqualValues(t, 1, rules.Invalidate(e, e.Gen, e.Proven-1).Young, "and is young before")
}

func TestPutReturnsWhatIsAliveAndNothingRejected(t *testing.T) {
	stored := storing(t, entry.Entry{}, material(now.Add(day)))
	rejected := rules.Invalidate(stored, stored.Session.Gen, now)
	require.NotZero(t, rejected.Session.Gen)
	for name, c := range map[string]struct {
		e    entry.Entry
		at   entry.Time
		want entry.Session
	}{
		"usable":   {stored, now, stored.Session},
		"expired":  {stored, now.Add(day), stored.Session},
		"rejected": {rejected, now, entry.Session{}},
		"none":     {failed(t, entry.Entry{}, entry.Denied, now), now, entry.Session{}},
	} {
		t.Run(name, func(t *testing.T) {
			_, displaced := rules.Put(c.e, entry.Number(c.e, c.at), session(c.at).Session, c.at)
			assert.Equal(t, c.want, displaced)
		})
	}
}

func TestPutMakesTheLoginInFlightStale(t *testing.T) {
	open := begun(t, entry.Entry{}, ours, now)
	put, _ := rules.Put(open, entry.Number(open, now), session(now).Session, now)
	for _, res := range []entry.Result{session(now), {Class: entry.Denied}, {Class: entry.NotSent}} {
		next, displaced, v := rules.Commit(put, open.Open.Gen, ours, res, now)
		assert.Equal(t, entry.Stale, v)
		assert.Equal(t, put, next)
		assert.Zero(t, displaced)
	}
	assert.Equal(t, put, entry.Renew(put, open.Open.Gen, ours, lease, now.Add(time.Second)))
	assert.True(t, put.Usable(open.Open.Gen, now), "and its leader adopts")
	assert.EqualValues(t, 1, put.Attempts, "it stays counted")
	_, v := rules.Begin(put, ask(theirs, put.Session.Gen), now)
	assert.Equal(t, entry.Lead, v, "nobody waits for it")
}

func TestPutEndsASuppressionAndGivesNoneOfTheBudgetBack(t *testing.T) {
	denied := failed(t, entry.Entry{}, entry.Denied, now)
	put, _ := rules.Put(denied, entry.Number(denied, now), session(now).Session, now)
	assert.Equal(t, entry.Free, put.Look(put.Session.Gen, now))
	assert.EqualValues(t, 1, put.Attempts)
	assert.Equal(t, denied.Window, put.Window)

	spent := entry.Entry{Attempts: 3, Window: now.Add(window)}
	put, _ = rules.Put(spent, entry.Number(spent, now), session(now).Session, now)
	_, v := rules.Begin(put, ask(ours, put.Session.Gen), now)
	assert.Equal(t, entry.Suppressed, v)
	_, v = rules.Begin(put, ask(ours, put.Session.Gen), put.Proven)
	assert.Equal(t, entry.Lead, v, "until the session has proved itself")
}

func TestPutLetsAProvenSessionClearTheCounts(t *testing.T) {
	e := loggedIn(t, entry.Entry{Attempts: 2, Window: now.Add(day), Young: 1}, now)
	early, _ := rules.Put(e, entry.Number(e, e.Proven-1), session(now).Session, e.Proven-1)
	assert.EqualValues(t, 2, early.Attempts)
	assert.EqualValues(t, 1, early.Young)
	proven, _ := rules.Put(e, entry.Number(e, e.Proven), session(now).Session, e.Proven)
	assert.Zero(t, proven.Attempts)
	assert.Zero(t, proven.Young)
}

// A put whose reply was lost is put again.
func TestPutRepeatedReplacesItself(t *testing.T) {
	ses := session(now).Session
	first, _ := rules.Put(entry.Entry{}, uint64(now), ses, now)
	again, displaced := rules.Put(first, entry.Number(first, now), ses, now)
	assert.Equal(t, first.Session, displaced)
	assert.Greater(t, again.Session.Gen, first.Session.Gen)
	assert.True(t, again.Usable(first.Session.Gen, now), "who knows the first adopts the second")
}

func TestNumberIsAboveEveryOtherAndTheTime(t *testing.T) {
	for name, c := range map[string]struct {
		e    entry.Entry
		want uint64
	}{
		"a new key":            {entry.Entry{}, uint64(now)},
		"the time":             {entry.Entry{Gen: uint64(now) - 1}, uint64(now)},
		"one more than issued": {entry.Entry{Gen: uint64(now)}, uint64(now) + 1},
		"ahead of the time":    {entry.Entry{Gen: uint64(now) + 7}, uint64(now) + 8},
		"one is open":          {begun(t, entry.Entry{}, ours, now), uint64(now) + 1},
	} {
		t.Run(name, func(t *testing.T) { assert.Equal(t, c.want, entry.Number(c.e, now)) })
	}
}

// Back-offs

func TestBackoffDoublesFromMinToMax(t *testing.T) {
	b := entry.Backoff{Min: 250 * time.Millisecond, Max: 30 * time.Second}
	var got []time.Duration
	for n := range 9 {
		got = append(got, b.Delay(n))
	}
	ms := time.Millisecond
	assert.Equal(t, []time.Duration{250 * ms, 500 * ms, 1000 * ms, 2000 * ms, 4000 * ms, 8000 * ms, 16000 * ms, 30000 * ms, 30000 * ms}, got)
	assert.Equal(t, b.Min, b.Delay(-1))
	assert.Equal(t, b.Max, b.Delay(math.MaxInt))
	assert.Equal(t, time.Second, entry.Backoff{Min: time.Minute, Max: time.Second}.Delay(0))
	assert.Zero(t, entry.Backoff{}.Delay(1<<20), "the zero value never waits")
}

func TestDeferredLoginsBackOffForAsLongAsTheOutageAndAreNotCounted(t *testing.T) {
	e, at := entry.Entry{}, now
	var waits []time.Duration
	for range 400 {
		e = failed(t, e, entry.Deferred, at)
		waits = append(waits, e.Failure.Until.Sub(at))
		at = e.Failure.Until
		require.Zero(t, e.Attempts)
	}
	ms := time.Millisecond
	assert.Equal(t, []time.Duration{250 * ms, 500 * ms, 1000 * ms, 2000 * ms, 4000 * ms, 8000 * ms, 16000 * ms, 30000 * ms, 30000 * ms}, waits[:9])
	for _, w := range waits[9:] {
		require.Equal(t, 30*time.Second, w)
	}
	e = loggedIn(t, e, at)
	assert.Equal(t, 250*time.Millisecond, failed(t, e, entry.Deferred, at).Failure.Until.Sub(at), "a success begins anew")
}

// rejectedAtOnce logs in as often as the rules allow until end, and has every
// session rejected the instant it is stored.
func rejectedAtOnce(t *testing.T, until time.Duration) (logins []time.Duration) {
	t.Helper()
	e, at := entry.Entry{}, now
	for at < now.Add(until) {
		next, v := rules.Begin(e, ask(ours, e.Session.Gen), at)
		if v == entry.Suppressed {
			at = rules.Suppression(e, at).Until
			continue
		}
		require.Equal(t, entry.Lead, v)
		logins = append(logins, at.Sub(now))
		e = committed(t, next, ours, session(at), at)
		e = rules.Invalidate(e, e.Session.Gen, at)
	}
	return logins
}

func TestUpstreamThatRefusesEveryFreshSessionGetsALoginEvery30Seconds(t *testing.T) {
	s := time.Second
	minute := rejectedAtOnce(t, time.Minute)
	assert.Equal(t, []time.Duration{0, 0, 1 * s, 3 * s, 7 * s, 15 * s, 31 * s}, minute)
	assert.LessOrEqual(t, len(minute), 8)
	assert.Len(t, rejectedAtOnce(t, time.Hour), 7+118, "then one every 30 s, never suppressed for a window")
}

// Invalidate

func TestInvalidateRemovesTheGenerationItNamesAndNoOther(t *testing.T) {
	stored := loggedIn(t, entry.Entry{}, now)
	at := now.Add(time.Minute)
	renewing := begun(t, stored, ours, at)
	g1, g2 := stored.Session.Gen, renewing.Open.Gen
	for name, c := range map[string]struct {
		e             entry.Entry
		gen           uint64
		session, open uint64
	}{
		"stored":                          {stored, g1, 0, 0},
		"stored, the next one goes on":    {renewing, g1, 0, g2},
		"open, the stored one stays":      {renewing, g2, g1, 0},
		"neither":                         {renewing, g1 - 1, g1, g2},
		"newer than anything":             {renewing, g2 + 1, g1, g2},
		"0 is no generation":              {renewing, 0, g1, g2},
		"0 is no open attempt":            {stored, 0, g1, 0},
		"0 is no generation on a new key": {entry.Entry{}, 0, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			next := rules.Invalidate(c.e, c.gen, at)
			assert.Equal(t, c.session, next.Session.Gen)
			assert.Equal(t, c.open, next.Open.Gen)
			assert.Equal(t, c.e.Gen, next.Gen)
			if c.session == c.e.Session.Gen && c.open == c.e.Open.Gen {
				assert.Equal(t, c.e, next)
			}
			assert.Equal(t, next, rules.Invalidate(next, c.gen, at), "a second one changes nothing")
		})
	}
}

func TestInvalidateOfWhatIsOpenMakesItsCommitStale(t *testing.T) {
	open := begun(t, entry.Entry{}, ours, now)
	e := rules.Invalidate(open, open.Open.Gen, now)
	assert.Equal(t, open.Attempts, e.Attempts, "still counted")
	assert.Zero(t, e.Young)
	_, _, v := rules.Commit(e, open.Open.Gen, ours, session(now), now)
	assert.Equal(t, entry.Stale, v)
}

func TestInvalidateCountsYoungSessionsOnly(t *testing.T) {
	e := loggedIn(t, entry.Entry{Young: 3}, now)
	young := rules.Invalidate(e, e.Session.Gen, e.Proven-1)
	assert.EqualValues(t, 4, young.Young)
	assert.Zero(t, young.Proven)
	proven := rules.Invalidate(e, e.Session.Gen, e.Proven)
	assert.Zero(t, proven.Young)
	assert.Zero(t, proven.Failure)

	settled := begun(t, e, ours, e.Proven) // acted on the proof; the same session is rejected later
	assert.Zero(t, rules.Invalidate(settled, e.Session.Gen, e.Proven.Add(time.Second)).Young)
}

func TestFirstRepairIsImmediateAndTheSecondWaits(t *testing.T) {
	e := loggedIn(t, entry.Entry{}, now)
	e = rules.Invalidate(e, e.Session.Gen, now)
	require.Zero(t, e.Failure)
	e = loggedIn(t, e, now)
	e = rules.Invalidate(e, e.Session.Gen, now)
	assert.Equal(t, entry.Failure{Class: entry.Rejected, Until: now.Add(time.Second)}, e.Failure)
	assert.Equal(t, entry.Suppressed, e.Look(0, now))
	assert.GreaterOrEqual(t, e.Keep, e.Failure.Until)
}

func TestInvalidateKeepsTheEntryAsLongAsItsBackoff(t *testing.T) {
	short := rules
	short.Window = time.Second
	e := entry.Entry{Gen: 5, Session: entry.Session{Gen: 5, Expires: now + 2}, Proven: now + 1, Keep: now + 2, Young: 9}
	e = short.Invalidate(e, 5, now)
	require.Equal(t, now.Add(30*time.Second), e.Failure.Until)
	assert.Equal(t, e.Failure.Until, e.Keep)
}

func TestInvalidateNeverShortensASuppression(t *testing.T) {
	e := loggedIn(t, entry.Entry{Young: 1}, now)
	denied := entry.Failure{Class: entry.Denied, Until: now.Add(window), Streak: 2}
	e.Failure = denied
	assert.Equal(t, denied, rules.Invalidate(e, e.Session.Gen, now).Failure)
	e.Failure = entry.Failure{Class: entry.Deferred, Until: now + 1, Streak: 2}
	assert.Equal(t, entry.Failure{Class: entry.Rejected, Until: now.Add(time.Second), Streak: 2},
		rules.Invalidate(e, e.Session.Gen, now).Failure, "and keeps the streak")
}

// Sessions that outlive their rejection

func TestRejectedSessionThatMayBeRefreshedStays(t *testing.T) {
	e := storing(t, entry.Entry{}, material(now.Add(day)))
	open := begun(t, e, ours, now)
	next := rules.Invalidate(open, e.Session.Gen, now)
	want := open
	want.Session.Expires, want.Proven, want.Young = 0, 0, 1
	assert.Equal(t, want, next, "and the login in flight goes on")

	for name, c := range map[string]struct {
		refresh, at entry.Time
		stays       bool
	}{
		"no material":               {0, now, false},
		"over long ago":             {now - 1, now, false},
		"over this instant":         {now, now, false},
		"the last instant":          {now + 1, now, true},
		"though it has expired":     {now.Add(day), now.Add(life), true},
		"expired, and over as well": {now.Add(day), now.Add(day), false},
	} {
		t.Run(name, func(t *testing.T) {
			e := storing(t, entry.Entry{}, material(c.refresh))
			next := rules.Invalidate(e, e.Session.Gen, c.at)
			if !c.stays {
				assert.Zero(t, next.Session)
				return
			}
			want := e.Session
			want.Expires = 0
			assert.Equal(t, want, next.Session)
		})
	}
}

func TestRejectedSessionIsNobodysWhateverHeKnows(t *testing.T) {
	stored := storing(t, entry.Entry{}, material(now.Add(day)))
	gen := stored.Session.Gen
	rejected := rules.Invalidate(stored, gen, now)
	require.Equal(t, gen, rejected.Session.Gen)
	for _, at := range []entry.Time{
		0, 1, now.Add(-time.Second), now - 1, now, now + 1, now.Add(time.Second), stored.Proven,
		stored.Session.Expires - 1, stored.Session.Expires, stored.Session.End, now.Add(day) - 1, now.Add(day),
	} {
		for _, after := range []uint64{0, gen - 1, gen, gen + 1} {
			assert.False(t, rejected.Usable(after, at), "%d at %d", after, at)
			assert.Equal(t, entry.Free, rejected.Look(after, at), "%d at %d", after, at)
			if at > now.Add(-day) {
				_, v := rules.Begin(rejected, ask(ours, after), at)
				assert.Equal(t, entry.Lead, v, "%d at %d", after, at)
			}
		}
		assert.Equal(t, rejected, entry.Touch(rejected, gen, day, 0, at))
		_, removed := entry.Clear(rejected, at)
		assert.Zero(t, removed, "cleared at %d", at)
		_, removed = entry.Retire(rejected, gen, at)
		assert.Zero(t, removed, "retired at %d", at)
		_, removed = rules.Put(rejected, entry.Number(rejected, at), session(at).Session, at)
		assert.Zero(t, removed, "replaced at %d", at)
	}
	open := begun(t, rejected, ours, now)
	assert.Equal(t, rejected.Session, open.Session)
	_, displaced, v := rules.Commit(open, open.Open.Gen, ours, session(now), now)
	require.Equal(t, entry.Stored, v)
	assert.Zero(t, displaced)
	for _, class := range []entry.Class{entry.Denied, entry.Deferred, entry.Unknown, entry.NotSent} {
		assert.Equal(t, rejected.Session, committed(t, open, ours, entry.Result{Class: class}, now).Session, "neither removed nor restored")
	}
	next, _, v := rules.Commit(rejected, gen, theirs, material(now.Add(day)), now)
	assert.Equal(t, entry.Stored, v, "the commit that stored it, repeated")
	assert.Equal(t, rejected, next)
}

func TestInvalidateOfARejectedSessionCountsNothingTwice(t *testing.T) {
	e := storing(t, entry.Entry{}, material(now.Add(day)))
	gen := e.Session.Gen
	once := rules.Invalidate(e, gen, now)
	assert.Equal(t, once, rules.Invalidate(once, gen, now))
	assert.Equal(t, once, rules.Invalidate(once, gen, now.Add(time.Minute)))
	late := rules.Invalidate(once, gen, now.Add(day))
	assert.Zero(t, late.Session, "of no use any more")
	assert.EqualValues(t, 1, late.Young)
}

func TestSecondYoungRejectionInARowLeavesNothingToRefresh(t *testing.T) {
	e := storing(t, entry.Entry{}, material(now.Add(day)))
	at := e.Proven
	e = rules.Invalidate(e, e.Session.Gen, at) // proven
	require.NotZero(t, e.Session)
	require.Zero(t, e.Young)
	refreshes, logins := 0, 0
	for range 5 {
		if e.Refreshable(e.Session.Gen, at) {
			refreshes++
		} else {
			logins++
		}
		e = begun(t, e, ours, at)
		e = committed(t, e, ours, material(now.Add(day)), at)
		e = rules.Invalidate(e, e.Session.Gen, at) // young
		at = max(at, e.Failure.Until)
	}
	assert.Equal(t, 2, refreshes, "of the proven one, and of the one it brought")
	assert.Equal(t, 3, logins)

	e = committed(t, begun(t, e, ours, at), ours, material(now.Add(day)), at)
	proven := rules.Invalidate(e, e.Session.Gen, e.Proven)
	assert.NotZero(t, proven.Session, "one that proved itself ends the row")
}

func TestRefreshStartsFromWhatIsUsableOrMayBeRefreshed(t *testing.T) {
	plain, with := loggedIn(t, entry.Entry{}, now), storing(t, entry.Entry{}, material(now.Add(day)))
	gen, expires := plain.Session.Gen, plain.Session.Expires
	require.Equal(t, gen, with.Session.Gen)
	rejected := rules.Invalidate(with, gen, now)
	for name, c := range map[string]struct {
		e    entry.Entry
		dead uint64
		at   entry.Time
		want bool
	}{
		"nothing stored":                     {entry.Entry{}, 0, now, false},
		"nothing stored, forged":             {entry.Entry{Session: entry.Session{Expires: now + 1, Refresh: now + 1}}, 0, now, false},
		"usable":                             {plain, 0, now, true},
		"usable, an older one is dead":       {plain, gen - 1, now, true},
		"usable, known to be dead":           {plain, gen, now, false},
		"the last instant":                   {plain, 0, expires - 1, true},
		"expired":                            {plain, 0, expires, false},
		"material, usable":                   {with, 0, now, true},
		"material, known to be dead":         {with, gen, now, true},
		"material, expired":                  {with, 0, expires, true},
		"material, rejected":                 {rejected, gen, now, true},
		"material, rejected, none the wiser": {rejected, 0, now, true},
		"material, the last instant":         {rejected, gen, now.Add(day) - 1, true},
		"material, over":                     {rejected, gen, now.Add(day), false},
		"material of a usable one is over":   {storing(t, entry.Entry{}, material(now+1)), 0, now + 1, true},
	} {
		t.Run(name, func(t *testing.T) { assert.Equal(t, c.want, c.e.Refreshable(c.dead, c.at)) })
	}
}

// Clear, Unsuppress, Touch, Retire

func TestClearEndsSessionAndAttemptAndKeepsCounts(t *testing.T) {
	e := begun(t, loggedIn(t, entry.Entry{}, now), ours, now)
	e.Failure, e.Young = entry.Failure{Class: entry.Unknown, Until: now, Streak: 3}, 2
	next, removed := entry.Clear(e, now)
	assert.Equal(t, e.Session, removed)
	want := e
	want.Gen, want.Open, want.Session, want.Proven = e.Gen+1, entry.Attempt{}, entry.Session{}, 0
	assert.Equal(t, want, next)
	_, _, v := rules.Commit(next, e.Open.Gen, ours, session(now), now)
	assert.Equal(t, entry.Stale, v, "the login in flight")

	later, _ := entry.Clear(e, now.Add(time.Hour))
	assert.EqualValues(t, now.Add(time.Hour), later.Gen, "numbers come from the time")
}

func TestClearBumpsTheGenerationThoughNothingIsStored(t *testing.T) {
	e := failed(t, entry.Entry{}, entry.Unknown, now)
	next, removed := entry.Clear(e, now)
	assert.Zero(t, removed)
	assert.Equal(t, e.Gen+1, next.Gen)
}

func TestClearLeavesNoEntryBehind(t *testing.T) {
	next, removed := entry.Clear(entry.Entry{}, now)
	assert.Zero(t, next)
	assert.Zero(t, removed)
}

func TestClearLetsAProvenSessionClearTheCounts(t *testing.T) {
	e := loggedIn(t, entry.Entry{Attempts: 2, Window: now.Add(day), Young: 1}, now)
	next, _ := entry.Clear(e, e.Proven)
	assert.Zero(t, next.Attempts)
	assert.Zero(t, next.Young)
}

func TestUnsuppressForgetsFailuresAndCountsOnly(t *testing.T) {
	e := begun(t, loggedIn(t, entry.Entry{}, now), ours, now)
	e.Failure, e.Young, e.Unread = entry.Failure{Class: entry.Denied, Until: now.Add(window), Streak: 3}, 5, now.Add(window)
	want := e
	want.Attempts, want.Window, want.Failure, want.Young, want.Unread = 0, 0, entry.Failure{}, 0, 0
	assert.Equal(t, want, entry.Unsuppress(e))
	assert.Zero(t, entry.Unsuppress(entry.Entry{}))
}

func TestUnsuppressedKeyLogsInAgain(t *testing.T) {
	e := failed(t, entry.Entry{}, entry.Denied, now)
	_, v := rules.Begin(e, ask(ours, 0), now)
	require.Equal(t, entry.Suppressed, v)
	next, v := rules.Begin(entry.Unsuppress(e), ask(ours, 0), now)
	require.Equal(t, entry.Lead, v)
	assert.EqualValues(t, 1, next.Attempts)
	assert.Equal(t, now.Add(window), next.Window)
}

func TestTouchExtendsTheNamedSessionUpToItsEnd(t *testing.T) {
	e := loggedIn(t, entry.Entry{}, now)
	bounded := e
	bounded.Session.End = now.Add(life + time.Minute)
	gen := e.Session.Gen
	expired := e
	expired.Session.Expires = now
	last := e
	last.Session.Expires = now + 1
	for name, c := range map[string]struct {
		e    entry.Entry
		gen  uint64
		ttl  time.Duration
		want entry.Time
	}{
		"the last instant":   {last, gen, time.Hour, now.Add(time.Hour)},
		"not once expired":   {expired, gen, time.Hour, now},
		"extends":            {e, gen, time.Hour, now.Add(time.Hour)},
		"never backwards":    {e, gen, time.Minute, now.Add(life)},
		"up to the end":      {bounded, gen, time.Hour, now.Add(life + time.Minute)},
		"below the end":      {bounded, gen, life + time.Second, now.Add(life + time.Second)},
		"another generation": {e, gen + 1, time.Hour, now.Add(life)},
		"no generation":      {entry.Entry{}, 0, time.Hour, 0},
	} {
		t.Run(name, func(t *testing.T) {
			want := c.e
			want.Session.Expires = c.want
			want.Keep = max(c.e.Keep, c.want)
			assert.Equal(t, want, entry.Touch(c.e, c.gen, c.ttl, 0, now))
		})
	}
}

func TestTouchWritesForNoGainUnderTheLeast(t *testing.T) {
	e := loggedIn(t, entry.Entry{}, now)
	bounded := e
	bounded.Session.End = e.Session.Expires.Add(30 * time.Second)
	over := e
	over.Session.End = e.Session.Expires.Add(-time.Second)
	for name, c := range map[string]struct {
		e     entry.Entry
		ttl   time.Duration
		least time.Duration
		gain  time.Duration
	}{
		"more than the least":               {e, life + 61*time.Second, time.Minute, 61 * time.Second},
		"the least":                         {e, life + time.Minute, time.Minute, time.Minute},
		"a microsecond less":                {e, life + time.Minute - time.Microsecond, time.Minute, 0},
		"no least":                          {e, life + time.Microsecond, 0, time.Microsecond},
		"no least, no gain":                 {e, life, 0, 0},
		"a loss":                            {e, life - time.Minute, 0, 0},
		"a loss is no gain of a minus":      {e, life - time.Minute, -time.Hour, 0},
		"the end leaves the least":          {bounded, day, 30 * time.Second, 30 * time.Second},
		"the end leaves less":               {bounded, day, 31 * time.Second, 0},
		"the end is before it":              {over, day, 0, 0},
		"the end is before it, minus least": {over, day, -time.Hour, 0},
	} {
		t.Run(name, func(t *testing.T) {
			want := c.e
			want.Session.Expires = c.e.Session.Expires.Add(c.gain)
			want.Keep = max(c.e.Keep, want.Session.Expires)
			assert.Equal(t, want, entry.Touch(c.e, c.e.Session.Gen, c.ttl, c.least, now))
		})
	}
}

func TestTouchKeepsTheEntryAsLongAsTheSession(t *testing.T) {
	e := loggedIn(t, entry.Entry{}, now)
	assert.Equal(t, now.Add(day), entry.Touch(e, e.Session.Gen, day, time.Minute, now).Keep)
}

func TestTouchLeavesRefreshAndProofAlone(t *testing.T) {
	e := storing(t, entry.Entry{}, material(now.Add(day)))
	want := e
	want.Session.Expires = e.Session.Expires.Add(time.Minute)
	assert.Equal(t, want, entry.Touch(e, e.Session.Gen, life+time.Minute, 0, now))
}

func TestRetireTakesOutWhatNobodyCanUseOrRefresh(t *testing.T) {
	plain, with := loggedIn(t, entry.Entry{}, now), storing(t, entry.Entry{}, material(now.Add(day)))
	gen, expires := plain.Session.Gen, plain.Session.Expires
	rejected := rules.Invalidate(with, gen, now)
	short := storing(t, entry.Entry{}, material(now+1))
	unproven := plain
	unproven.Proven = expires + 1
	for name, c := range map[string]struct {
		e       entry.Entry
		gen     uint64
		at      entry.Time
		goes    bool
		removed entry.Session
	}{
		"usable":                     {plain, gen, now, false, entry.Session{}},
		"the last instant":           {plain, gen, expires - 1, false, entry.Session{}},
		"expired":                    {plain, gen, expires, true, plain.Session},
		"expired before it proved":   {unproven, gen, expires, true, plain.Session},
		"another generation":         {plain, gen - 1, expires, false, entry.Session{}},
		"a newer one":                {plain, gen + 1, expires, false, entry.Session{}},
		"expired, may be refreshed":  {with, gen, expires, false, entry.Session{}},
		"rejected, may be refreshed": {rejected, gen, expires, false, entry.Session{}},
		"refreshes, last instant":    {with, gen, now.Add(day) - 1, false, entry.Session{}},
		"refreshes are over":         {with, gen, now.Add(day), true, with.Session},
		"rejected, and over":         {rejected, gen, now.Add(day), true, entry.Session{}},
		"usable, refreshes are over": {short, gen, now + 1, false, entry.Session{}},
		"no generation":              {entry.Entry{}, 0, now, false, entry.Session{}},
		"no generation, none stored": {failed(t, entry.Entry{}, entry.Denied, now), 0, now.Add(day), false, entry.Session{}},
	} {
		t.Run(name, func(t *testing.T) {
			next, removed := entry.Retire(c.e, c.gen, c.at)
			assert.Equal(t, c.removed, removed)
			if !c.goes {
				assert.Equal(t, c.e, next)
				return
			}
			assert.Zero(t, next.Session)
			assert.Zero(t, next.Proven)
			again, removed := entry.Retire(next, c.gen, c.at)
			assert.Equal(t, next, again)
			assert.Zero(t, removed, "exactly once")
		})
	}
}

func TestRetireLeavesAllElse(t *testing.T) {
	e := loggedIn(t, entry.Entry{Stamp: nonce(9), Attempts: 2, Window: now.Add(day), Young: 1}, now)
	gen, at := e.Session.Gen, e.Session.Expires
	e.Proven = 0 // acted on
	e = begun(t, e, ours, at)
	e.Failure, e.Unread = entry.Failure{Class: entry.Deferred, Until: at + 1, Streak: 3}, at+2
	next, _ := entry.Retire(e, gen, at)
	want := e
	want.Session = entry.Session{}
	assert.Equal(t, want, next)
	_, _, v := rules.Commit(next, gen, theirs, session(now), at)
	assert.Equal(t, entry.Stored, v, "the commit that stored it, repeated")
	_, _, v = rules.Commit(next, e.Open.Gen, ours, session(at), at)
	assert.Equal(t, entry.Stored, v, "the login in flight")
}

func TestRetireLetsAProvenSessionClearTheCounts(t *testing.T) {
	e := loggedIn(t, entry.Entry{Attempts: 2, Window: now.Add(day), Young: 1}, now)
	next, _ := entry.Retire(e, e.Session.Gen, e.Session.Expires)
	assert.Zero(t, next.Attempts)
	assert.Zero(t, next.Young)
}

// Readers

func TestLookAnswersSessionThenFailureThenFree(t *testing.T) {
	stored := loggedIn(t, entry.Entry{}, now)
	both := stored
	both.Failure = entry.Failure{Class: entry.Denied, Until: now.Add(window)}
	for name, c := range map[string]struct {
		e     entry.Entry
		after uint64
		at    entry.Time
		want  entry.Verdict
	}{
		"nothing":                        {entry.Entry{}, 0, now, entry.Free},
		"a session":                      {stored, 0, now, entry.Found},
		"a session, though logins fail":  {both, 0, now, entry.Found},
		"rejected, and logins fail":      {both, both.Session.Gen, now, entry.Suppressed},
		"the failure's last instant":     {both, both.Session.Gen, now.Add(window) - 1, entry.Suppressed},
		"the failure is over":            {both, both.Session.Gen, now.Add(window), entry.Free},
		"expired":                        {stored, 0, stored.Session.Expires, entry.Free},
		"an open attempt says nothing":   {begun(t, entry.Entry{}, ours, now), 0, now, entry.Free},
		"what was rejected came back":    {stored, stored.Session.Gen + 5, now, entry.Free},
		"a spent budget is not its task": {entry.Entry{Attempts: 9, Window: now.Add(day)}, 0, now, entry.Free},
	} {
		t.Run(name, func(t *testing.T) { assert.Equal(t, c.want, c.e.Look(c.after, c.at)) })
	}
}

func TestAttemptIsAliveUnderItsLeaseOnly(t *testing.T) {
	e := begun(t, entry.Entry{}, ours, now)
	assert.True(t, e.Alive(e.Open.Lease-1))
	assert.False(t, e.Alive(e.Open.Lease))
	assert.False(t, entry.Entry{Open: entry.Attempt{Lease: now + 1}}.Alive(now), "none is open")
}

// Life of an entry

func TestEntryIsKeptUntilTheLastThingInItIsOverAndAMinute(t *testing.T) {
	e := begun(t, entry.Entry{}, ours, now)
	require.Equal(t, window+time.Minute, e.TTL(now))
	res := session(now)
	res.Session.Expires, res.Session.End = now.Add(2*window), now.Add(3*window)
	e = committed(t, e, ours, res, now)
	require.Equal(t, 2*window+time.Minute, e.TTL(now), "until the session is used no more, not until it ends upstream")
	assert.Equal(t, window+time.Minute, e.TTL(now.Add(window)))
	assert.Equal(t, time.Minute, e.TTL(now.Add(day)), "never less")
	e = entry.Touch(e, e.Session.Gen, 4*window, 0, now)
	assert.Equal(t, 3*window+time.Minute, e.TTL(now), "touched, to its end")
	e.Keep = 1 << 54
	assert.Equal(t, 366*day+time.Minute, e.TTL(now), "a forged one too ends")
}

func TestEntryIsKeptUntilItsSessionCanBeRefreshedNoMore(t *testing.T) {
	e := storing(t, entry.Entry{}, material(now.Add(day)))
	assert.Equal(t, day+time.Minute, e.TTL(now))
	assert.Equal(t, day+time.Minute, rules.Invalidate(e, e.Session.Gen, now).TTL(now))
	put, _ := rules.Put(entry.Entry{}, uint64(now), material(now.Add(day)).Session, now)
	assert.Equal(t, day+time.Minute, put.TTL(now))
	put, _ = rules.Put(entry.Entry{}, uint64(now), material(now+1).Session, now)
	assert.Equal(t, life+time.Minute, put.TTL(now), "or used no more")
}

func TestNothingShortensTheLifeOfAnEntry(t *testing.T) {
	res := session(now)
	res.Session.Expires = now.Add(day)
	e := committed(t, begun(t, entry.Entry{}, ours, now), ours, res, now)
	gen := e.Session.Gen
	open := begun(t, e, ours, now)
	cleared, _ := entry.Clear(e, now)
	put, _ := rules.Put(e, entry.Number(e, now), session(now).Session, now)
	retired, _ := entry.Retire(e, gen, now.Add(day))
	for name, next := range map[string]entry.Entry{
		"put":        put,
		"retire":     retired,
		"invalidate": rules.Invalidate(e, gen, now),
		"clear":      cleared,
		"unsuppress": entry.Unsuppress(e),
		"touch":      entry.Touch(e, gen, time.Second, 0, now),
		"begin":      open,
		"renew":      entry.Renew(open, open.Open.Gen, ours, lease, now.Add(time.Second)),
		"session":    committed(t, open, ours, session(now), now),
		"denied":     committed(t, open, ours, entry.Result{Class: entry.Denied}, now),
		"deferred":   committed(t, open, ours, entry.Result{Class: entry.Deferred}, now),
		"not sent":   committed(t, open, ours, entry.Result{Class: entry.NotSent}, now),
	} {
		t.Run(name, func(t *testing.T) { assert.Equal(t, e.Keep, next.Keep) })
	}
}

func TestBornIsSetOnceAndSurvives(t *testing.T) {
	e := loggedIn(t, entry.Entry{}, now)
	e = rules.Invalidate(e, e.Session.Gen, now)
	e = loggedIn(t, e, now.Add(time.Hour))
	assert.Equal(t, now, e.Born)
}

func TestRulesLeaveTheStampToTheWriter(t *testing.T) {
	e := loggedIn(t, entry.Entry{Stamp: nonce(9)}, now)
	cleared, _ := entry.Clear(e, now)
	for _, next := range []entry.Entry{e, begun(t, e, ours, now), rules.Invalidate(e, e.Session.Gen, now), cleared, entry.Unsuppress(e)} {
		assert.Equal(t, nonce(9), next.Stamp)
	}
}

// Small things

func TestTimeCountsMicroseconds(t *testing.T) {
	assert.Equal(t, now+1_500_000, now.Add(1500*time.Millisecond))
	assert.Equal(t, now+1, now.Add(1999*time.Nanosecond))
	assert.Equal(t, 2*time.Second, now.Add(2*time.Second).Sub(now))
}

func TestNewNonceNeverRepeats(t *testing.T) {
	seen := map[entry.Nonce]bool{{}: true}
	for range 1000 {
		n := entry.NewNonce()
		require.False(t, seen[n])
		seen[n] = true
	}
}

// rule is one of the rules with arguments; gone is what it took out of the entry.
type rule func(e entry.Entry, at entry.Time) (next entry.Entry, gone entry.Session)

// picks are the rules, as often as they are to be picked: some end the others' turns.
var picks = strings.Fields("begin begin renew commit commit commit commit put clear invalidate touch touch touch retire retire retire")

func anyRule(pick func(n int) int, e entry.Entry) (name string, f rule) {
	gens := []uint64{0, e.Gen, e.Gen + 1, e.Open.Gen, e.Open.Gen, e.Done.Gen, e.Session.Gen, e.Session.Gen}
	gen := gens[pick(len(gens))]
	n := []entry.Nonce{ours, theirs, e.Open.Nonce}[pick(3)]
	bounds := []entry.Time{0, now - 2, now - 1, now, now + 1, now + 2, now.Add(life)}
	ses := entry.Session{Record: "new", Expires: []entry.Time{now + 1, now + 2, now.Add(life)}[pick(3)], End: bounds[pick(len(bounds))], Refresh: bounds[pick(len(bounds))]}
	res := entry.Result{Session: ses}
	if class := entry.Class(pick(6)); class != entry.None && class != entry.Rejected {
		res = entry.Result{Class: class}
	}
	alone := func(f func(entry.Entry, entry.Time) entry.Entry) rule {
		return func(e entry.Entry, at entry.Time) (entry.Entry, entry.Session) { return f(e, at), entry.Session{} }
	}
	a := entry.Ask{Nonce: n, After: gen, Unread: pick(2) == 0, Lease: lease}
	ttl, least := []time.Duration{0, time.Microsecond, life, day}[pick(4)], []time.Duration{0, time.Microsecond, time.Minute}[pick(3)]
	switch picks[pick(len(picks))] {
	case "begin":
		return "begin", alone(func(e entry.Entry, at entry.Time) entry.Entry { e, _ = rules.Begin(e, a, at); return e })
	case "renew":
		return "renew", alone(func(e entry.Entry, at entry.Time) entry.Entry { return entry.Renew(e, gen, n, 2*lease, at) })
	case "commit":
		return "commit", func(e entry.Entry, at entry.Time) (entry.Entry, entry.Session) {
			next, displaced, _ := rules.Commit(e, gen, n, res, at)
			return next, displaced
		}
	case "put":
		return "put", func(e entry.Entry, at entry.Time) (entry.Entry, entry.Session) {
			return rules.Put(e, entry.Number(e, at), ses, at)
		}
	case "invalidate":
		return "invalidate", alone(func(e entry.Entry, at entry.Time) entry.Entry { return rules.Invalidate(e, gen, at) })
	case "clear":
		return "clear", entry.Clear
	case "touch":
		return "touch", alone(func(e entry.Entry, at entry.Time) entry.Entry { return entry.Touch(e, gen, ttl, least, at) })
	}
	return "retire", func(e entry.Entry, at entry.Time) (entry.Entry, entry.Session) { return entry.Retire(e, gen, at) }
}

// Long random lives of an entry, whose times lie on and beside each other.
func TestRulesKeepTheirWordOverAnyLifeOfAnEntry(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	ran := map[string]int{}
	for range 1000 {
		e, rejected, seen := entry.Entry{}, map[uint64]bool{}, map[uint64]bool{}
		for range 30 {
			at := now + entry.Time(r.IntN(5)) - 2
			name, f := anyRule(r.IntN, e)
			next, gone := f(e, at)
			again, goneAgain := f(e, at)
			require.Equal(t, next, again, "%s depends on its arguments only", name)
			require.Equal(t, gone, goneAgain, name)
			if next == e {
				require.Zero(t, gone, name)
				continue
			}
			ran[name]++
			got, err := entry.Decode(encoded(t, next))
			require.NoError(t, err, name)
			require.Equal(t, next, got, name)

			require.GreaterOrEqual(t, next.Gen, e.Gen, name)
			require.GreaterOrEqual(t, next.Keep, e.Keep, name)
			require.GreaterOrEqual(t, next.Keep, max(next.Session.Expires, next.Session.Refresh, next.Failure.Until, next.Unread, next.Open.Lease), name)
			if name != "commit" || next.Unread != 0 { // of a login that was never sent
				require.GreaterOrEqual(t, next.Unread, min(e.Unread, at), name)
			}
			require.True(t, e.Born == 0 || next.Born == e.Born, name)
			require.Equal(t, next.Session.Gen == 0, next.Session == entry.Session{}, name)

			was, is := e.Session, next.Session
			if was.Gen != 0 && (is.Gen == 0 || is.Expires == 0) && name == "invalidate" {
				rejected[was.Gen] = true
			}
			if was.Gen != is.Gen && is.Gen != 0 {
				require.False(t, seen[is.Gen], "%s stores generation %d again", name, is.Gen)
				seen[is.Gen] = true
			}
			require.False(t, rejected[is.Gen] && is.Expires != 0, "%s makes the rejected generation %d usable", name, is.Gen)
			switch {
			case was.Gen == is.Gen, was.Expires == 0, name == "invalidate":
				require.Zero(t, gone, "%s: it is there, was rejected, or is", name)
			default:
				require.Equal(t, was, gone, "%s: what leaves alive is handed out", name)
			}
			e = next
		}
	}
	for _, name := range picks {
		require.Greater(t, ran[name], 25, "%s: %v", name, ran)
	}
}

// Calm

func aheadOf(n entry.Nonce, after uint64) entry.Ask {
	a := ask(n, after)
	a.Ahead = true
	return a
}

func TestSessionThatCouldNotBeRenewedIsLeftAlone(t *testing.T) {
	e := loggedIn(t, entry.Entry{}, now)
	open, v := rules.Begin(e, aheadOf(ours, e.Session.Gen), now)
	require.Equal(t, entry.Lead, v)
	failed := committed(t, open, ours, entry.Result{Class: entry.NotSent, Calm: time.Minute}, now)
	assert.Equal(t, now.Add(time.Minute), failed.Calm)
	assert.Equal(t, e.Session, failed.Session)
	assert.Zero(t, failed.Failure)
	_, v = rules.Begin(failed, aheadOf(theirs, e.Session.Gen), now.Add(time.Minute)-1)
	assert.Equal(t, entry.Suppressed, v)
	_, v = rules.Begin(failed, ask(theirs, e.Session.Gen), now)
	assert.Equal(t, entry.Lead, v, "who needs another session gets one")
	_, v = rules.Begin(failed, aheadOf(theirs, e.Session.Gen), now.Add(time.Minute))
	assert.Equal(t, entry.Lead, v)

	long := committed(t, open, ours, entry.Result{Class: entry.NotSent, Calm: 100 * day}, now)
	assert.Equal(t, long.Calm, long.Keep, "it is kept as long as it holds")
	cleared, _ := entry.Clear(failed, now)
	put, _ := rules.Put(failed, entry.Number(failed, now), session(now).Session, now)
	for name, next := range map[string]entry.Entry{
		"a new session": loggedIn(t, failed, now), "put": put, "logged out": cleared, "forgiven": entry.Unsuppress(failed),
	} {
		assert.Zero(t, next.Calm, name)
	}
	again, _ := rules.Begin(failed, ask(theirs, e.Session.Gen), now)
	assert.Equal(t, failed.Calm, committed(t, again, theirs, entry.Result{Class: entry.Deferred, Calm: time.Second}, now).Calm, "never shortened")
}

func TestRenewalLeavesTheLastLoginOfTheBudgetToCallers(t *testing.T) {
	for attempts, want := range map[uint32]entry.Verdict{0: entry.Lead, uint32(rules.Budget) - 2: entry.Lead, uint32(rules.Budget) - 1: entry.Suppressed} {
		e := loggedIn(t, entry.Entry{}, now)
		e.Attempts, e.Window, e.Proven = attempts, now.Add(window), 0
		_, v := rules.Begin(e, aheadOf(ours, e.Session.Gen), now)
		assert.Equal(t, want, v, "%d", attempts)
		_, v = rules.Begin(e, ask(ours, e.Session.Gen), now)
		assert.Equal(t, entry.Lead, v, "%d", attempts)
	}
	one := rules
	one.Budget = 1
	e := loggedIn(t, entry.Entry{}, now)
	_, v := one.Begin(e, aheadOf(ours, e.Session.Gen), now)
	assert.Equal(t, entry.Lead, v, "a budget of one has no last of several")
}
