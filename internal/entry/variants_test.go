package entry_test

// Weaker contracts, each of which was once thought to be enough. The checker
// must find what each breaks, and nothing when the same bounds are explored
// with the rules as they are.

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/internal/entry"
)

type (
	procs  = [maxProcs][maxCallers]kind
	counts = [faults]uint8
)

// find asserts that the checker finds want with the weaker contract, and that
// neither the full one nor the one that is weak only in part breaks.
func find(t *testing.T, want string, sc scenario, w weak, inPart ...weak) {
	t.Helper()
	for _, f := range sc.faults {
		sc.total += f
	}
	for _, ok := range append(inPart, weak{}) {
		m := newModel(sc, ok)
		f := m.explore(bound(100_000), slower)
		require.Empty(t, f.violation, "%s", m.story(f))
		t.Logf("%d states, complete %v", f.states, f.complete)
	}
	m := newModel(sc, w)
	f := m.explore(400_000, 1)
	t.Logf("%d states: %s%s", f.states, f.violation, m.story(f))
	require.Contains(t, f.violation, want)
}

// weakBegin returns a Begin that sees the entry as blind shows it. What it was
// blind to is still there afterwards.
func weakBegin(blind func(*entry.Entry, entry.Ask)) func(entry.Rules, entry.Entry, entry.Ask, entry.Time) (entry.Entry, entry.Verdict) {
	return func(r entry.Rules, e entry.Entry, a entry.Ask, now entry.Time) (entry.Entry, entry.Verdict) {
		seen := e
		blind(&seen, a)
		next, v := r.Begin(seen, a, now)
		if v != entry.Lead {
			return e, v
		}
		return next, v
	}
}

// weakCommit returns a Commit that takes whoever owns says for the owner.
func weakCommit(owns func(e entry.Entry, gen uint64) bool) func(entry.Rules, entry.Entry, uint64, entry.Nonce, entry.Result, entry.Time) (entry.Entry, entry.Session, entry.Verdict) {
	return func(r entry.Rules, e entry.Entry, gen uint64, n entry.Nonce, res entry.Result, now entry.Time) (entry.Entry, entry.Session, entry.Verdict) {
		if e.Open.Gen == 0 && e.Session.Gen != gen && owns(e, gen) {
			e.Gen, e.Open = max(e.Gen, gen), entry.Attempt{Gen: gen, Nonce: n}
		}
		return r.Commit(e, gen, n, res, now)
	}
}

func TestModelFindsC1BeginWithoutALease(t *testing.T) {
	find(
		t, "P4: 3 logins",
		scenario{procs: procs{{doer}, {doer}, {doer}}, faults: counts{lockLost: 1}},
		weak{begin: weakBegin(func(e *entry.Entry, a entry.Ask) {
			if e.Open.Nonce != a.Nonce {
				e.Open.Lease = 0
			}
		})},
	)
}

// The weakness needs a Commit that goes by the last issued number, and a logout
// func without the token check; neither harms alone.
func TestModelFindsC2BeginThatBumpsWithoutLeading(t *testing.T) {
	byNumber := func(r entry.Rules, e entry.Entry, gen uint64, n entry.Nonce, res entry.Result, now entry.Time) (entry.Entry, entry.Session, entry.Verdict) {
		switch {
		case e.Open.Gen == gen:
			return r.Commit(e, gen, n, res, now)
		case e.Gen == gen:
			return e, entry.Session{}, entry.Stored
		}
		return e, entry.Session{}, entry.Stale
	}
	bumps := func(r entry.Rules, e entry.Entry, a entry.Ask, now entry.Time) (entry.Entry, entry.Verdict) {
		next, v := r.Begin(e, a, now)
		if v == entry.Found {
			next.Gen++
		}
		return next, v
	}
	find(
		t, "R5: the stored token",
		scenario{procs: procs{{doer}, {doer}}, faults: counts{replyLost: 1, lockLost: 1}},
		weak{begin: bumps, commit: byNumber, noTokenCheck: true},
		weak{commit: byNumber, noTokenCheck: true},
	)
}

func TestModelFindsC4BeginBlindToTheFailure(t *testing.T) {
	find(
		t, "P5: 2 denied logins",
		scenario{procs: procs{{doer}, {doer}}, up: denying},
		weak{begin: weakBegin(func(e *entry.Entry, _ entry.Ask) { e.Failure = entry.Failure{} })},
	)
}

func TestModelFindsC5BeginThatDoesNotKnowItsNonce(t *testing.T) {
	find(
		t, "P5: suppressed by the budget after 0 logins",
		scenario{procs: procs{{doer}, {doer}}, budget: 1, faults: counts{replyLost: 1}},
		weak{begin: weakBegin(func(e *entry.Entry, a entry.Ask) {
			if e.Open.Nonce == a.Nonce {
				e.Open.Nonce, e.Open.Lease = entry.Nonce{}, 0
			}
		})},
	)
}

func TestModelFindsC5BeginThatWaitsForItself(t *testing.T) {
	find(
		t, "told to wait for its own attempt",
		scenario{procs: procs{{doer}, {doer}}, faults: counts{replyLost: 1}},
		weak{begin: weakBegin(func(e *entry.Entry, _ entry.Ask) { e.Open.Nonce = entry.Nonce{} })},
	)
}

// counting numbers generations by a counter in the entry.
func counting(r entry.Rules, e entry.Entry, a entry.Ask, now entry.Time) (entry.Entry, entry.Verdict) {
	next, v := r.Begin(e, a, now)
	if v == entry.Lead && next.Open.Gen != e.Open.Gen {
		next.Gen = max(e.Gen, a.After) + 1
		next.Open.Gen = next.Gen
	}
	return next, v
}

func TestModelFindsC6GenerationsByCounter(t *testing.T) {
	find(
		t, "issued twice",
		scenario{procs: procs{{doer}, {doer}}, faults: counts{flush: 1}},
		weak{begin: counting},
	)
}

func TestModelFindsC6EntryThatDiesWithItsSession(t *testing.T) {
	find(
		t, "P2: generation 0 written over",
		scenario{procs: procs{{doer}, {doer}}, warm: true, faults: counts{revoke: 1}},
		weak{invalidate: func(r entry.Rules, e entry.Entry, gen uint64, now entry.Time) entry.Entry {
			if e.Session.Gen == gen {
				return entry.Entry{}
			}
			return r.Invalidate(e, gen, now)
		}},
	)
}

func TestModelFindsC7CommitByNumberAlone(t *testing.T) {
	find(
		t, "P2: generation",
		scenario{procs: procs{{doer}, {doer}}, faults: counts{replyLost: 1, revoke: 1}},
		weak{commit: func(r entry.Rules, e entry.Entry, gen uint64, n entry.Nonce, res entry.Result, now entry.Time) (entry.Entry, entry.Session, entry.Verdict) {
			e.Done = entry.Closed{} // nobody remembers what was closed
			return weakCommit(func(e entry.Entry, gen uint64) bool { return e.Gen == gen })(r, e, gen, n, res, now)
		}},
	)
}

func lateOnMissing(e entry.Entry, _ uint64) bool { return e == entry.Entry{} }

func TestModelFindsC8LateCommitOfADeadSession(t *testing.T) {
	find(
		t, "in a lost entry",
		scenario{procs: procs{{doer}, {doer}}, up: single, faults: counts{flush: 1}},
		weak{commit: weakCommit(lateOnMissing)},
	)
}

func TestModelFindsC9LateCommitOfALoggedOutSession(t *testing.T) {
	find(
		t, "begun before a logout",
		scenario{procs: procs{{doer}, {leaver}}, faults: counts{flush: 1}},
		weak{commit: weakCommit(lateOnMissing)},
	)
}

// The token check of C19 would hide it, so it is off; that alone harms nothing.
func TestModelFindsC10StaleForWhatIsStored(t *testing.T) {
	noReplay := func(r entry.Rules, e entry.Entry, gen uint64, n entry.Nonce, res entry.Result, now entry.Time) (entry.Entry, entry.Session, entry.Verdict) {
		if e.Open.Gen != gen {
			return e, entry.Session{}, entry.Stale
		}
		return r.Commit(e, gen, n, res, now)
	}
	find(
		t, "R5: the stored token",
		scenario{procs: procs{{doer}, {doer}}, faults: counts{replyLost: 1}},
		weak{commit: noReplay, noTokenCheck: true},
		weak{noTokenCheck: true},
	)
}

func TestModelFindsC11FailureThatDropsTheSession(t *testing.T) {
	find(
		t, "dropped by a write that does not name it",
		scenario{procs: procs{{refresher}, {doer}}, warm: true, faults: counts{loginFails: 1}},
		weak{commit: func(r entry.Rules, e entry.Entry, gen uint64, n entry.Nonce, res entry.Result, now entry.Time) (entry.Entry, entry.Session, entry.Verdict) {
			next, displaced, v := r.Commit(e, gen, n, res, now)
			if v == entry.Stored && res.Class != entry.None {
				next.Session = entry.Session{}
			}
			return next, displaced, v
		}},
	)
}

// The session that was there at the beginning travels in the holder.
func TestModelFindsC11FailureThatRestoresTheSession(t *testing.T) {
	find(
		t, "P2: generation",
		scenario{procs: procs{{refresher}, {doer}}, warm: true, faults: counts{loginFails: 1, revoke: 1}},
		weak{
			begin: func(r entry.Rules, e entry.Entry, a entry.Ask, now entry.Time) (entry.Entry, entry.Verdict) {
				if s := stored(e); s.gen != 0 {
					a.Holder = string([]byte{byte(s.gen), s.tok})
				}
				return r.Begin(e, a, now)
			},
			commit: func(r entry.Rules, e entry.Entry, gen uint64, n entry.Nonce, res entry.Result, now entry.Time) (entry.Entry, entry.Session, entry.Verdict) {
				next, displaced, v := r.Commit(e, gen, n, res, now)
				if h := e.Open.Holder; v == entry.Stored && res.Class != entry.None && h != "" {
					next.Session = entry.Session{Gen: uint64(h[0]), Record: h[1:], Expires: now.Add(time.Second)}
				}
				return next, displaced, v
			},
		},
	)
}

func TestModelFindsC13InvalidateOfTheLastBegun(t *testing.T) {
	find(
		t, "is stored after Invalidate",
		scenario{procs: procs{{refresher}, {doer}}, warm: true, faults: counts{revoke: 1, loginFails: 1}},
		weak{invalidate: func(r entry.Rules, e entry.Entry, gen uint64, now entry.Time) entry.Entry {
			if e.Gen != gen {
				return e
			}
			return r.Invalidate(e, gen, now)
		}},
	)
}

func TestModelFindsC14LogoutThatOnlyDeletes(t *testing.T) {
	find(
		t, "begun before a logout",
		scenario{procs: procs{{refresher}, {leaver}}, warm: true},
		weak{clear: func(e entry.Entry, _ entry.Time) (entry.Entry, entry.Session) {
			removed := e.Session
			e.Session = entry.Session{}
			return e, removed
		}},
	)
}

func TestModelFindsC15AdoptWhatIsDifferent(t *testing.T) {
	other := func(e entry.Entry, after uint64, now entry.Time) bool {
		return e.Session.Gen != after && e.Usable(0, now)
	}
	find(
		t, "R1:",
		scenario{procs: procs{{doer, refresher}}, warm: true, faults: counts{revoke: 1, failover: 1}},
		weak{
			adoptOther: true,
			look: func(e entry.Entry, after uint64, now entry.Time) entry.Verdict {
				if other(e, after, now) {
					return entry.Found
				}
				return e.Look(after, now)
			},
			begin: func(r entry.Rules, e entry.Entry, a entry.Ask, now entry.Time) (entry.Entry, entry.Verdict) {
				if other(e, a.After, now) {
					return e, entry.Found
				}
				return r.Begin(e, a, now)
			},
		},
	)
}

func TestModelFindsC16JoinersThatAdoptAnything(t *testing.T) {
	find(
		t, "R1:",
		scenario{procs: procs{{doer, doer}}, warm: true, faults: counts{revoke: 1, unreachable: 1}},
		weak{joinersAdopt: true},
	)
}

func TestModelFindsC17WaitingOnOpen(t *testing.T) {
	find(
		t, "progress: somebody waits for ever",
		scenario{procs: procs{{doer}, {doer}}, faults: counts{crash: 1}},
		weak{waitOnOpen: true},
	)
}

func TestModelFindsC18StaleLeaderThatLogsInAgain(t *testing.T) {
	find(
		t, "R6: logins of one Do: 0 before its first run, 2 after",
		scenario{procs: procs{{doer}, {leaver}}, warm: true, faults: counts{revoke: 1}},
		weak{staleAgain: true},
	)
}

// The upstream gives out one dead token for ever, under new numbers.
func TestModelFindsC18SpentCallerThatBeginsAgain(t *testing.T) {
	find(
		t, "R6: logins of one Do: 0 before its first run, 2 after",
		scenario{procs: procs{{doer}}, up: stuck, warm: true, faults: counts{revoke: 1}},
		weak{spentBegins: true},
	)
}

func TestModelFindsC19LogoutFuncWithoutTokenCheck(t *testing.T) {
	find(
		t, "R5: the stored token",
		scenario{procs: procs{{doer}, {doer}}, up: repeating, faults: counts{pause: 1}},
		weak{noTokenCheck: true},
	)
}

func TestModelFindsC21DisplacedSessionNobodyEnds(t *testing.T) {
	find(
		t, "leak:",
		scenario{procs: procs{{refresher}, {doer}}, warm: true},
		weak{keepDispl: true},
	)
}

func TestModelFindsC22InvalidateByDelete(t *testing.T) {
	find(
		t, "dropped by a write that does not name it",
		scenario{procs: procs{{doer}, {doer}}, warm: true, faults: counts{revoke: 1}},
		weak{blindDelete: true},
	)
}

func TestModelFindsC23LockThatDoesNotKnowItsNonce(t *testing.T) {
	find(
		t, "waits for its own lock",
		scenario{procs: procs{{doer}, {doer}}, faults: counts{replyLost: 1}},
		weak{noLockNonce: true},
	)
}

// A flush and a clock set back issue a number twice; only the nonce tells.
func TestModelFindsReplayByNumberAlone(t *testing.T) {
	find(
		t, "is said to be stored where",
		scenario{procs: procs{{doer}, {doer}}, clockBack: true, faults: counts{flush: 1}},
		weak{commit: func(r entry.Rules, e entry.Entry, gen uint64, n entry.Nonce, res entry.Result, now entry.Time) (entry.Entry, entry.Session, entry.Verdict) {
			if e.Session.Gen == gen {
				return e, entry.Session{}, entry.Stored
			}
			return r.Commit(e, gen, n, res, now)
		}},
	)
}

func TestModelFindsHeartbeatThatBegins(t *testing.T) {
	find(
		t, "a heartbeat opened generation",
		scenario{procs: procs{{doer}, {leaver}}, heartbeats: true},
		weak{renew: func(r entry.Rules, e entry.Entry, _ uint64, a entry.Ask, now entry.Time) entry.Entry {
			next, _ := r.Begin(e, a, now)
			return next
		}},
	)
}

// An expired session stays in the entry until the next one is stored.
func TestModelFindsSessionThatProvesItselfForEver(t *testing.T) {
	find(
		t, "P5: 2 logins with a budget of 1",
		scenario{procs: procs{{doer}, {doer}}, warm: true, life: 2*tickLen - 10, ticks: 2, budget: 1, faults: counts{loginFails: 2}},
		weak{begin: func(r entry.Rules, e entry.Entry, a entry.Ask, now entry.Time) (entry.Entry, entry.Verdict) {
			if e.Session.Gen != 0 && e.Proven == 0 {
				e.Attempts = 0
			}
			return r.Begin(e, a, now)
		}},
	)
}
