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
				if h := e.Open.Holder; v == entry.Stored && res.Class != entry.None && h != "" && next.Session.Gen == 0 {
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

// Rejected sessions that may be refreshed.

// keepsRefreshable says of a rejected session only that it may be refreshed.
func keepsRefreshable(r entry.Rules, e entry.Entry, gen uint64, now entry.Time) entry.Entry {
	next := r.Invalidate(e, gen, now)
	if next.Session.Gen == gen {
		next.Session.Expires = e.Session.Expires
	}
	return next
}

func TestModelFindsRejectedSessionThatStaysUsable(t *testing.T) {
	find(
		t, "is stored after Invalidate",
		scenario{procs: procs{{doer}, {doer}}, warm: true, refresh: longLife, faults: counts{revoke: 1}},
		weak{invalidate: keepsRefreshable},
	)
}

func TestModelFindsRefreshesThatNeverEndInALogin(t *testing.T) {
	find(
		t, "refresh of session",
		scenario{procs: procs{{doer}, {doer}}, up: spoiled, refresh: longLife, ticks: 1, faults: counts{revoke: 1}},
		weak{invalidate: func(r entry.Rules, e entry.Entry, gen uint64, now entry.Time) entry.Entry {
			next := r.Invalidate(e, gen, now)
			if was := e.Session; next.Session.Gen == 0 && was.Gen == gen && now < was.Refresh {
				next.Session = was
				next.Session.Expires = 0
			}
			return next
		}},
	)
}

// What was rejected is nobody's to log out, whichever rule takes it away.
func TestModelFindsRejectedSessionHandedOut(t *testing.T) {
	alive := func(f func(entry.Entry) (entry.Entry, entry.Session), e entry.Entry) (entry.Entry, entry.Session) {
		next, gone := f(e)
		if next.Session.Gen != e.Session.Gen {
			gone = e.Session
		}
		return next, gone
	}
	const want = "was rejected and is handed out"
	sc := scenario{warm: true, refresh: longLife, faults: counts{revoke: 1}}
	t.Run("commit", func(t *testing.T) {
		sc := sc
		sc.procs = procs{{doer}, {doer}}
		find(t, want, sc, weak{commit: func(r entry.Rules, e entry.Entry, gen uint64, n entry.Nonce, res entry.Result, now entry.Time) (entry.Entry, entry.Session, entry.Verdict) {
			next, displaced, v := r.Commit(e, gen, n, res, now)
			if next.Session.Gen != e.Session.Gen {
				displaced = e.Session
			}
			return next, displaced, v
		}})
	})
	t.Run("put", func(t *testing.T) {
		sc := sc
		sc.procs = procs{{doer}, {putter}}
		find(t, want, sc, weak{put: func(r entry.Rules, e entry.Entry, gen uint64, ses entry.Session, now entry.Time) (entry.Entry, entry.Session) {
			return alive(func(e entry.Entry) (entry.Entry, entry.Session) { return r.Put(e, gen, ses, now) }, e)
		}})
	})
	t.Run("clear", func(t *testing.T) {
		sc := sc
		sc.procs = procs{{doer}, {leaver}}
		find(t, want, sc, weak{clear: func(e entry.Entry, now entry.Time) (entry.Entry, entry.Session) {
			return alive(func(e entry.Entry) (entry.Entry, entry.Session) { return entry.Clear(e, now) }, e)
		}})
	})
	t.Run("retire", func(t *testing.T) {
		sc := sc
		sc.procs, sc.refresh, sc.ticks = procs{{doer}, {retirer}}, tickLen+tickLen/2, 1
		find(t, want, sc, weak{retire: func(e entry.Entry, gen uint64, now entry.Time) (entry.Entry, entry.Session) {
			return alive(func(e entry.Entry) (entry.Entry, entry.Session) { return entry.Retire(e, gen, now) }, e)
		}})
	})
}

// Touch and Retire

// revives touches by the number alone.
func revives(e entry.Entry, gen uint64, ttl, least time.Duration, now entry.Time) entry.Entry {
	if gen != 0 && e.Session.Gen == gen {
		e.Session.Expires = max(e.Session.Expires, now.Add(ttl))
	}
	return e
}

func TestModelFindsTouchThatRevivesAnExpiredSession(t *testing.T) {
	find(
		t, "revived by Touch",
		scenario{procs: procs{{doer, toucher}}, warm: true, life: 2*tickLen - 10, ticks: 1},
		weak{touch: revives},
	)
}

func TestModelFindsTouchThatRevivesARejectedSession(t *testing.T) {
	find(
		t, "revived by Touch",
		scenario{procs: procs{{doer}, {toucher}}, warm: true, refresh: longLife, faults: counts{revoke: 1}},
		weak{touch: revives},
	)
}

func TestModelFindsRetireOfASessionInUse(t *testing.T) {
	weaker := func(open func(entry.Entry, entry.Time) entry.Entry) weak {
		return weak{retire: func(e entry.Entry, gen uint64, now entry.Time) (entry.Entry, entry.Session) {
			if gen == 0 || e.Session.Gen != gen {
				return e, entry.Session{}
			}
			return entry.Retire(open(e, now), gen, now)
		}}
	}
	const want = "retired while it can be used or refreshed"
	t.Run("usable", func(t *testing.T) {
		find(t, want, scenario{procs: procs{{doer, retirer}}, warm: true}, weaker(func(e entry.Entry, now entry.Time) entry.Entry {
			e.Session.Expires = min(e.Session.Expires, now)
			return e
		}))
	})
	t.Run("refreshable", func(t *testing.T) {
		sc := scenario{procs: procs{{doer, retirer}}, warm: true, life: 2*tickLen - 10, refresh: longLife, ticks: 1}
		find(t, want, sc, weaker(func(e entry.Entry, now entry.Time) entry.Entry {
			e.Session.Refresh = 0
			return e
		}))
	})
}

func TestModelFindsRetiredSessionThatStaysThere(t *testing.T) {
	find(
		t, "is handed out though it did not leave",
		scenario{procs: procs{{doer, retirer}}, warm: true, life: 2*tickLen - 10, ticks: 1},
		weak{retire: func(e entry.Entry, gen uint64, now entry.Time) (entry.Entry, entry.Session) {
			_, removed := entry.Retire(e, gen, now)
			return e, removed
		}},
	)
}

// A scope that ends what it used also when the entry has it no more.
func TestModelFindsRetiredSessionHandedToTwo(t *testing.T) {
	find(
		t, "is handed to two",
		scenario{procs: procs{{retirer}, {retirer}}, warm: true, life: 2*tickLen - 10, ticks: 1},
		weak{retire: func(e entry.Entry, gen uint64, now entry.Time) (entry.Entry, entry.Session) {
			next, removed := entry.Retire(e, gen, now)
			if e.Session.Gen == 0 {
				removed = entry.Session{Gen: gen, Record: "\x01", Expires: now}
			}
			return next, removed
		}},
	)
}

// Put

func TestModelFindsPutThatLeavesTheAttemptOpen(t *testing.T) {
	find(
		t, "P2: generation",
		scenario{procs: procs{{doer}, {putter}}},
		weak{put: func(r entry.Rules, e entry.Entry, gen uint64, ses entry.Session, now entry.Time) (entry.Entry, entry.Session) {
			next, displaced := r.Put(e, gen, ses, now)
			next.Open = e.Open
			return next, displaced
		}},
	)
}

func TestModelFindsPutUnderANumberThatWasIssued(t *testing.T) {
	find(
		t, "issued twice",
		scenario{procs: procs{{doer}, {putter}}, warm: true},
		weak{number: func(e entry.Entry, _ entry.Time) uint64 { return e.Gen }},
	)
}

func TestModelFindsPutWhoseDisplacedSessionNobodyGets(t *testing.T) {
	find(
		t, "left the entry and nobody was given them",
		scenario{procs: procs{{doer}, {putter}}, up: single, warm: true}, // else it is a leak first
		weak{put: func(r entry.Rules, e entry.Entry, gen uint64, ses entry.Session, now entry.Time) (entry.Entry, entry.Session) {
			next, _ := r.Put(e, gen, ses, now)
			return next, entry.Session{}
		}},
	)
}

// A refresh ahead of time

func TestModelFindsRefreshThatFailsItsJoiners(t *testing.T) {
	find(
		t, "R7: a caller fails",
		scenario{procs: procs{{doer, refresher}}, warm: true, evicts: true, faults: counts{loginFails: 1}},
		weak{failTogether: true},
	)
}

// Unread

// replacements plays an hour of two fleets that share a key and no keyring: each
// finds only the other's session, every second, and may replace it. It returns
// how many logins that costs.
func replacements(begin func(entry.Rules, entry.Entry, entry.Ask, entry.Time) (entry.Entry, entry.Verdict)) (logins int) {
	var e entry.Entry
	for s := range 3600 {
		now := now.Add(time.Duration(s) * time.Second)
		n := nonce(byte(1 + s%2))
		a := entry.Ask{Nonce: n, Lease: lease}
		if e.Usable(0, now) {
			if e.Done.Nonce == n {
				continue // his own
			}
			a.After, a.Unread = e.Session.Gen, true
		}
		next, v := begin(rules, e, a, now)
		if v != entry.Lead {
			continue
		}
		logins++
		e, _, _ = rules.Commit(next, next.Open.Gen, n, session(now), now)
	}
	return logins
}

func TestFleetsWithoutACommonKeyReplaceOneSessionPerWindow(t *testing.T) {
	const expiries, windows = int(time.Hour / life), int(time.Hour / window)
	require.LessOrEqual(t, replacements(entry.Rules.Begin), 1+expiries+windows)
	never := func(r entry.Rules, e entry.Entry, a entry.Ask, now entry.Time) (entry.Entry, entry.Verdict) {
		next, v := r.Begin(e, a, now)
		next.Unread = 0
		return next, v
	}
	require.Greater(t, replacements(never), 3000, "each replaces the other's for ever")
}
