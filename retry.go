package sessionlock

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptrace"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sessionlock/sessionlock/internal/bound"
	"github.com/sessionlock/sessionlock/internal/entry"
)

// Three policies, kept apart because they answer different questions:
//
//	contention    somebody else is logging in   → how long and how often to look
//	rejection     sessions are refused          → entry.Rules.Reject
//	login failure logins give no session        → entry.Rules.Retry, Budget, Window
//
// The last two are shared by the fleet and live in the entry; here is what a
// process decides alone. A fourth is about the store itself: the gate.

const (
	firstRetry, lastRetry = 250 * time.Millisecond, 30 * time.Second
	proving               = 30 * time.Second
)

// gate is what every call of one backend passes, lock or cache (P9). It bounds the
// call, keeps a dead backend from costing each caller a timeout, and a failing one
// from being asked more often than if it did not fail:
//
//	open ── 5 failures in a row, and no answer for a while ──▶ shut
//	 ▲                                                          │ one call at a time, a second
//	 └──────────────────────── it is answered ◀─────────────────┘ after the last one failed
//
// A backend whose other keys are answered is not dead, however many calls for one
// key or one shard fail: those that began before the last answer do not count, and
// none does for a while after it. (Where fewer than ten calls a second are answered,
// others that fail at once can still shut it, until one that works is let through.)
// A refusal that names only this request (no permission, wrong type) is an answer.
type gate struct {
	timeout time.Duration // of one call

	mu       sync.Mutex
	failures int       // in a row
	cause    error     // the last of them
	answered time.Time // last
	shut     bool
	probe    time.Time // when the call that was let through began; zero: none is under way
	urged    bool      // the next call is let through whatever else
	next     time.Time // while shut: when the next one is
	earned   float64   // retries that are owed to the calls made
}

const (
	breakAfter = 5
	breakQuiet = 100 * time.Millisecond // without an answer
	breakEvery = time.Second
	retryShare = 0.1 // retries per first attempt
	retryBurst = 10  // and how many may be saved up
)

func newGate(timeout time.Duration) *gate { return &gate{timeout: timeout, earned: retryBurst} }

// refuses reports whether no call may be made now. g.mu is held.
func (g *gate) refuses() bool {
	return g.shut && !g.urged && (!g.probe.IsZero() || time.Now().Before(g.next))
}

// enter reports whether a call may be made now, and if not, what the last one
// failed with. Report what comes of it, with start, by passed.
func (g *gate) enter() (start time.Time, ok bool, last error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.refuses() {
		return start, false, g.cause
	}
	if start = time.Now(); g.shut {
		g.probe = start
	}
	g.urged = false
	g.earned = min(g.earned+retryShare, retryBurst)
	return start, true, nil
}

// urge has the next call let through although the gate is shut: a login was paid
// for what it carries, and there are no more of them than logins under way.
func (g *gate) urge() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.urged = true
}

// passed tells what came of a call that was let through at start: nil for an
// answer. Who gave up early on a call has waited for too short a time to say
// anything; a quarter of the timeout will do.
func (g *gate) passed(start time.Time, err error) {
	var told *toldError
	g.mu.Lock()
	defer g.mu.Unlock()
	now := time.Now()
	wasProbe := start.Equal(g.probe)
	if wasProbe {
		g.probe = time.Time{}
	}
	switch {
	case err == nil, errors.As(err, &told) && told.answered:
		g.failures, g.shut, g.answered = 0, false, now
		return
	case wasProbe:
		g.next = now.Add(breakEvery)
	}
	if g.answered.After(start) || (errors.Is(err, context.Canceled) && now.Sub(start) < g.timeout/4) {
		return
	}
	g.cause = err
	g.failures++
	if !g.shut && g.failures >= breakAfter && now.Sub(g.answered) >= breakQuiet {
		g.shut, g.next = true, now.Add(breakEvery)
	}
}

// retry reports whether a call that failed may be made again now, and counts it:
// against what the first attempts have earned, or as the call that a shut gate
// lets through.
func (g *gate) retry() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case g.shut:
		return !g.refuses()
	case g.earned < 1:
		return false
	}
	g.earned -= 1 + retryShare // the retry itself earns nothing
	return true
}

func (c *config) rules() entry.Rules {
	return entry.Rules{
		Budget:  c.budget,
		Window:  c.window,
		Retry:   entry.Backoff{Min: firstRetry, Max: lastRetry},
		Reject:  entry.Backoff{Min: c.reauthMin, Max: c.reauthMax},
		Proving: proving,
	}
}

// contention is the schedule of a wait: tick i of attempts comes i·delay after
// start, up to a fifth of a delay earlier so that a fleet does not tick in
// step; the last is exact, so jitter never shortens the whole.
type contention struct {
	attempts int
	delay    time.Duration
}

func (p contention) total() time.Duration { return time.Duration(p.attempts) * p.delay }

func (p contention) tick(start time.Time, i int) time.Time {
	at := start.Add(time.Duration(i) * p.delay)
	if i < p.attempts {
		at = at.Add(-rand.N(p.delay/5 + 1)) //nolint:gosec // jitter, not a secret
	}
	return at
}

// waiting is one attempt's wait for somebody else's result.
type waiting struct {
	contention
	store *store
	name  string
	start time.Time

	ticks   int
	changed <-chan struct{}
	unwatch func()
	read    time.Time // when the entry was last read
}

func (w *waiting) waited() bool { return w.unwatch != nil }

// restart begins the wait anew.
func (w *waiting) restart() { w.start, w.ticks = time.Now(), 0 }

func (w *waiting) stop() {
	if w.unwatch != nil {
		w.unwatch()
	}
}

// next waits until there is something new for a caller that rejects after, or
// until the next poll tick, when the lock may be tried again. It returns the
// entry then seen. The watch is registered before the first look, so no change
// can fall between them. *LockError when the ticks are used up. Ticks that nobody
// was there to see, because a login ran or the process was stopped, are over.
func (w *waiting) next(ctx context.Context, after uint64) (snapshot, error) {
	if !w.waited() {
		w.changed, w.unwatch = w.store.watch(w.name)
		if seen, err := w.look(ctx); err != nil || seen.entry.Look(after, w.store.now()) != entry.Free {
			return seen, err
		}
	}
	w.ticks = max(w.ticks, int(time.Since(w.start)/w.delay))
	if w.ticks >= w.attempts {
		return snapshot{}, &LockError{Attempts: w.ticks, Waited: time.Since(w.start), Err: ErrLocked}
	}
	tick := time.NewTimer(time.Until(w.tick(w.start, w.ticks+1)))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return snapshot{}, context.Cause(ctx)
		case <-tick.C:
			w.ticks++
			return w.look(ctx)
		case <-w.changed:
			if err := bound.Sleep(ctx, lookGap-time.Since(w.read)); err != nil {
				return snapshot{}, context.Cause(ctx)
			}
			if seen, err := w.look(ctx); err != nil || seen.entry.Look(after, w.store.now()) != entry.Free {
				return seen, err
			}
		}
	}
}

func (w *waiting) look(ctx context.Context) (snapshot, error) {
	w.read = time.Now()
	return w.store.load(ctx, w.name)
}

// Denied marks an error of Login: the credentials were evaluated and refused.
// Nobody in the fleet logs in with them again before the budget's window has
// passed, [Client.Unsuppress], or other credentials by [WithFingerprint].
// Denied(nil) is nil.
func Denied(err error) error { return mark(err, entry.Denied, 0) }

// RetryAfter marks an error of Login: the credentials were not evaluated,
// because the upstream is throttling or down or something before it failed.
// Such a login is not counted; the fleet waits for d, or for its own back-off
// of 250 ms doubling to 30 s if that is longer, at most for the budget's
// window. d ≤ 0 means that nothing was asked for. RetryAfter(nil, d) is nil.
func RetryAfter(err error, d time.Duration) error { return mark(err, entry.Deferred, max(d, 0)) }

func mark(err error, c entry.Class, wait time.Duration) error {
	if err == nil {
		return nil
	}
	return &markedError{err, c, wait}
}

type markedError struct {
	err   error
	class entry.Class
	wait  time.Duration
}

func (e *markedError) Error() string { return e.err.Error() }
func (e *markedError) Unwrap() error { return e.err }

// LoginStatus maps the status of a login's response: nil for 2xx; [Denied] for
// 400, 401 and 403; [RetryAfter] for 429 and 503, with the wait that the
// Retry-After header asks for (RFC 9110, 10.2.3: seconds or a date); an
// unmarked error for the rest, [ErrInvalid] for nil. It neither reads nor closes the body and never
// quotes it.
func LoginStatus(r *http.Response) error {
	if r == nil {
		return fmt.Errorf("%w: response is nil", ErrInvalid)
	}
	err := &toldError{text: fmt.Sprintf("answered with status %d", r.StatusCode)}
	switch {
	case r.StatusCode/100 == 2:
		return nil
	case r.StatusCode == http.StatusBadRequest, r.StatusCode == http.StatusUnauthorized, r.StatusCode == http.StatusForbidden:
		return Denied(err)
	case r.StatusCode == http.StatusTooManyRequests, r.StatusCode == http.StatusServiceUnavailable:
		return RetryAfter(err, retryAfterHeader(r.Header.Get("Retry-After")))
	}
	return err
}

func retryAfterHeader(v string) time.Duration {
	if s, err := strconv.ParseUint(v, 10, 31); err == nil {
		return time.Duration(s) * time.Second
	}
	if at, err := http.ParseTime(v); err == nil {
		return time.Until(at)
	}
	return 0
}

// classify says what a failed login means. A mark wins. Errors of dialling, DNS
// and TLS show that no credentials were sent; so does reach, for a deadline
// that ended a login before it had a connection.
func classify(err error, reached *reach) (entry.Class, time.Duration) {
	var marked *markedError
	if errors.As(err, &marked) {
		return marked.class, marked.wait
	}
	if neverSent(err) || (reached.nowhere() && errors.Is(err, context.DeadlineExceeded)) {
		return entry.Deferred, 0
	}
	return entry.Unknown, 0
}

func neverSent(err error) bool {
	var (
		op     *net.OpError
		dns    *net.DNSError
		record tls.RecordHeaderError
		verify *tls.CertificateVerificationError
		host   x509.HostnameError
		ca     x509.UnknownAuthorityError
		cert   x509.CertificateInvalidError
	)
	return (errors.As(err, &op) && op.Op == "dial") || errors.As(err, &dns) ||
		errors.As(err, &record) || errors.As(err, &verify) ||
		errors.As(err, &host) || errors.As(err, &ca) || errors.As(err, &cert)
}

// reach watches a login through net/http: one that asked for a connection and
// never got one has sent nothing. Without it an upstream that drops packets
// would look like one that hangs after judging, and spend the budget: net/http
// reports only the deadline.
type reach struct {
	asked, got atomic.Bool
	begun      atomic.Bool // the login itself; before it only a refresh was tried
	told       atomic.Bool // that the refresh failed
}

func (r *reach) watch(ctx context.Context) context.Context {
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GetConn: func(string) { r.asked.Store(true) },
		GotConn: func(httptrace.GotConnInfo) { r.got.Store(true) },
	})
}

func (r *reach) nowhere() bool { return r.asked.Load() && !r.got.Load() }

// ownCount caps what this process sends to one entry when the store does not
// remember: an entry born after our last counted login cannot know of it, and one
// that could not be written does not.
type ownCount struct {
	name        string // of the entry
	class       entry.Class
	failed      int
	unrecorded  bool
	last, until entry.Time
}

// add counts a login that failed. A denial that the store does not have is as
// good as a spent budget.
func (o *ownCount) add(name string, class entry.Class, recorded bool, now entry.Time, r entry.Rules) {
	if now >= o.until || o.name != name {
		*o = ownCount{name: name, until: now.Add(r.Window)}
	}
	o.failed++
	o.class, o.last = class, now
	if !recorded {
		o.unrecorded = true
		if class == entry.Denied {
			o.failed = max(o.failed, r.Budget)
		}
	}
}

// forbids reports whether this process has spent the budget of the window and
// the entry does not remember.
func (o *ownCount) forbids(name string, e entry.Entry, now entry.Time, r entry.Rules) bool {
	return o.name == name && o.failed >= r.Budget && now < o.until &&
		(o.unrecorded || e.Born == 0 || e.Born > o.last)
}
