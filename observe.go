// observe.go is how a client is seen: events, counters and log lines come from
// one place, so that they agree.

package sessionlock

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"github.com/sessionlock/sessionlock/internal/entry"
)

// Event is one outcome. Near hits and reauths are a caller's. What an attempt comes
// to is reported once, however many callers wait for it. Degraded, unreadable and
// ended come from whatever met them, looks beside the callers' path included.
type Event struct {
	Kind       string        // one of the Event constants; expect new ones
	KeyID      string        // see [Client.KeyID]
	Generation uint64        // 0 where there is none
	Attempt    int           // poll ticks waited
	Start      time.Time     // zero where nothing lasted
	Duration   time.Duration // since Start
	Err        error         // prints no secret; its cause may, see LoginError
	again      bool          // the log has it already
}

// The kinds of events.
const (
	EventNear          = "near"           // served from this process
	EventShared        = "shared"         // served from the cache
	EventAdopted       = "adopted"        // waited for somebody else's login
	EventLoginOK       = "login_ok"       //
	EventLoginDenied   = "login_denied"   // credentials refused
	EventLoginDeferred = "login_deferred" // not evaluated
	EventLoginUnknown  = "login_unknown"  // failed otherwise, unusable sessions included
	EventRefreshed     = "refreshed"      // WithRefresh renewed the session
	EventRefreshFailed = "refresh_failed" // and could not; a login may follow
	EventSuppressed    = "suppressed"     // not sent, because logins fail
	EventLockTimeout   = "lock_timeout"   // waited in vain
	EventLockLost      = "lock_lost"      // while the login ran
	EventStale         = "stale"          // the login was overtaken
	EventEnded         = "ended"          // WithLogout was called
	EventReauthOK      = "reauth_ok"      // Do repaired a rejected session
	EventReauthFailed  = "reauth_failed"  // and could not
	EventDegraded      = "degraded"       // lock or cache unavailable
	EventUnreadable    = "unreadable"     // a stored record was written for another place, or by nobody
)

// Observer sees what a client does: metrics, traces, audits. Observe is called
// from many goroutines and from callers' paths, so it must be quick and must not
// call the client; near hits are reported too. A panic of it is swallowed. New
// kinds of events are added without notice.
type Observer interface {
	Observe(ctx context.Context, e Event)
}

// Stats counts since New. Near and shared hits are what the fleet saves.
type Stats struct {
	NearHits   uint64 // sessions served without I/O
	SharedHits uint64 // attempts served by the cache at once
	Adopted    uint64 // attempts served by somebody else's login
	Logins     uint64 // logins sent
	Denied     uint64 // of these, refused
	Refreshes  uint64 // sessions renewed by WithRefresh
	Suppressed uint64 // attempts refused because logins fail
	Reauths    uint64 // rejected sessions repaired by Do
	Waiters    int    // callers waiting now
}

type counters struct {
	shared, adopted, logins, denied, refreshes, suppressed, reauths atomic.Uint64
	near                                                            striped
	waiters                                                         atomic.Int64
}

// striped is a counter that all cores may add to at once: on one word they would
// wait for each other longer than a near hit takes.
type striped [16]struct {
	n atomic.Uint64
	_ [56]byte // a cache line each
}

func (s *striped) add() {
	s[rand.Uint32()%uint32(len(s))].n.Add(1) //nolint:gosec // spreads, no secret
}

func (s *striped) load() (sum uint64) {
	for i := range s {
		sum += s[i].n.Load()
	}
	return sum
}

// Stats returns this process's counts. They are each exact and not taken at one
// instant.
func (c *Client) Stats() Stats {
	n := &c.stats
	return Stats{
		NearHits: n.near.load(), SharedHits: n.shared.Load(), Adopted: n.adopted.Load(), Logins: n.logins.Load(),
		Denied: n.denied.Load(), Refreshes: n.refreshes.Load(), Suppressed: n.suppressed.Load(), Reauths: n.reauths.Load(),
		Waiters: int(n.waiters.Load()),
	}
}

// Status is what [Client.Inspect] finds. Times are by this process's clock and
// zero where they do not apply.
type Status struct {
	Generation      uint64     // of the stored session; 0: none is usable. Whether this process has its key (WithKeyring) is not looked at
	Expiry          time.Time  // until when it is used; before the upstream's own end by the expiry margin
	LockedSince     time.Time  // since when somebody is logging in
	Holder          string     // who: host/pid
	Attempts        int        // logins counted against the budget
	Failure         LoginClass // why logins are suppressed; deferred also while fresh sessions are refused
	SuppressedUntil time.Time  // no login before
}

// Inspect reads what the fleet knows of key, for operators: one look, no login,
// no secret. A key nobody asked for is the zero Status.
func (c *Client) Inspect(ctx context.Context, key string) (Status, error) {
	if err := errors.Join(checkContext(ctx), checkKey(key)); err != nil {
		return Status{}, err
	}
	var st Status
	l := c.peek(key)
	err := c.operate(ctx, l, func(ctx context.Context) error {
		_, seen, err := c.look(ctx, l)
		if err == nil {
			st = c.status(seen.entry)
		}
		return err
	})
	return st, err
}

func (c *Client) status(e entry.Entry) Status {
	now := c.store.now()
	var st Status
	if e.Usable(0, now) {
		st.Generation, st.Expiry = e.Session.Gen, c.store.clock.toLocal(e.Session.Expires)
	}
	if e.Alive(now) {
		st.LockedSince, st.Holder = c.store.clock.toLocal(e.Open.Since), e.Open.Holder
	}
	if now < e.Window {
		st.Attempts = int(e.Attempts)
	}
	if now < e.Failure.Until || st.Attempts >= c.budget {
		why := c.store.rules.Suppression(e, now)
		st.Failure, st.SuppressedUntil = loginClass(why.Class), c.store.clock.toLocal(why.Until)
	}
	return st
}

// nearHit reports a near hit; Stats counts it by itself.
func (c *Client) nearHit(ctx context.Context, l *local) {
	if c.observer != nil {
		c.emit(ctx, Event{Kind: EventNear, KeyID: l.id})
	}
}

// emit counts, logs and reports one outcome.
func (c *Client) emit(ctx context.Context, e Event) {
	if !e.Start.IsZero() && e.Duration == 0 {
		e.Duration = time.Since(e.Start)
	}
	c.count(e.Kind)
	if level, worth := logLevel(e); worth && c.logger != nil && c.news(e) {
		attrs := []slog.Attr{slog.String("key", e.KeyID), slog.Uint64("generation", e.Generation)}
		if e.Duration > 0 {
			attrs = append(attrs, slog.Duration("took", e.Duration))
		}
		if e.Err != nil {
			attrs = append(attrs, slog.Any("error", e.Err))
		}
		c.logger.LogAttrs(ctx, level, "sessionlock: "+e.Kind, attrs...)
	}
	if c.observer != nil {
		_, _ = protect(func() (struct{}, error) { c.observer.Observe(ctx, e); return struct{}{}, nil })
	}
}

func (c *Client) count(kind string) {
	n := &c.stats
	switch kind {
	case EventShared:
		n.shared.Add(1)
	case EventAdopted:
		n.adopted.Add(1)
	case EventLoginDenied:
		n.denied.Add(1)
		n.logins.Add(1)
	case EventLoginOK, EventLoginDeferred, EventLoginUnknown:
		n.logins.Add(1)
	case EventRefreshed:
		n.refreshes.Add(1)
	case EventSuppressed:
		n.suppressed.Add(1)
	case EventReauthOK:
		n.reauths.Add(1)
	}
}

// logLevel says how loud an event is; hits are not worth a line.
func logLevel(e Event) (slog.Level, bool) {
	switch e.Kind {
	case EventNear, EventShared, EventAdopted:
		return 0, false
	case EventLoginOK, EventRefreshed, EventReauthOK:
		return slog.LevelInfo, true
	case EventEnded:
		if e.Err == nil {
			return slog.LevelInfo, true
		}
	}
	return slog.LevelWarn, true
}

// news reports whether e is worth a log line: what lasts is said once per key, and
// of the calls that meet what is known
// already, a dead store or a session without its key, one in breakEvery is.
func (c *Client) news(e Event) bool {
	var out *outage
	if e.again {
		return false
	}
	if e.Kind != EventDegraded || !errors.As(e.Err, &out) || (!out.refused && !out.lasting) {
		return true
	}
	now, last := time.Now().UnixNano(), c.told.Load()
	return now-last >= int64(breakEvery) && c.told.CompareAndSwap(last, now)
}

// failed gives err of an attempt or call for l its name and place. Errors that
// have them already pass.
func (c *Client) failed(ctx context.Context, l *local, err error) error {
	var timeout *LockError
	var own *quietError
	switch {
	case errors.As(err, &own): // a user's func's, and named
	case errors.As(err, &timeout):
		timeout.id = l.id
		c.emit(ctx, Event{Kind: EventLockTimeout, KeyID: l.id, Attempt: timeout.Attempts, Duration: timeout.Waited, Err: err})
	case errors.Is(err, ErrUnavailable):
		err = fmt.Errorf("sessionlock: session %s: %w", l.id, err)
		c.emit(ctx, Event{Kind: EventDegraded, KeyID: l.id, Err: err})
	}
	return err
}
