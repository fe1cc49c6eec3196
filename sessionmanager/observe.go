package sessionmanager

import (
	"context"
	"log/slog"
	"time"
)

// Event is one thing that became of a session.
//
// Every opened is followed by exactly one closed of that session, never the other
// way round, so the difference of their counts is the number of open sessions and
// is never negative.
type Event struct {
	Kind     string        // one of the Event constants; expect new ones
	Session  string        // its [Session.Name]
	Code     Code          // of faulted and refused: what failed
	Reason   string        // of closed: why; a Reason constant, or what Kill was given
	Duration time.Duration // of opened: how long it took; of closed: how long it was open
	Open     int           // sessions that were open then. Events may come out of order: count, or ask [Manager.Stats]
	Err      error         // of faulted, refused and degraded. Prints no error of a worker, which is its cause
}

// The kinds of events.
const (
	EventOpened   = "opened"   // a session is ready
	EventClosed   = "closed"   // one that was opened has ended, and its slot is free
	EventFaulted  = "faulted"  // an open failed, a worker broke, or one did not end as it should
	EventRefused  = "refused"  // there was no slot, or the manager is shut down
	EventDegraded = "degraded" // slots in the fleet could not be renewed, released or counted
)

// Why sessions are closed, beside what [Session.Kill] is given.
const (
	ReasonClient   = "client-close"         // Session.Close
	ReasonLease    = "lease-expired"        // not used for [WithLease]; goes before the two below
	ReasonDetached = "detach-grace-expired" // nobody came back within [WithGrace]
	ReasonFaulted  = "faulted"              // the worker broke, and [WithGrace] is over
	ReasonShutdown = "manager-shutdown"     // Manager.Shutdown
	ReasonNotOpen  = "open-failed"          // what Kill is told of a worker that came too late, or with an error
)

// Observer sees what becomes of sessions: metrics, audits. Observe is called from
// many goroutines and on callers' paths, so it must be quick and must not call the
// manager. A panic of it is swallowed. ctx has the values of the open, call or close
// that it happened in, if any, and does not end with it. New kinds of events are added
// without notice.
type Observer interface {
	Observe(ctx context.Context, e Event)
}

// Stats are counts of this process, all taken at one instant.
type Stats struct {
	Sessions int // registered: being opened, open, being closed. Each has a slot
	Open     int // of these, opened and not yet gone
	Opened   uint64
	Closed   uint64
	Faulted  uint64 // opens that failed, workers that broke, closes that failed
	Refused  uint64 // opens without a slot, or after Shutdown had begun
}

// emit logs and reports one event; what it counts has been counted with the change
// itself.
func (m *Manager[W]) emit(ctx context.Context, e Event) {
	ctx = context.WithoutCancel(ctx)
	if m.logger != nil {
		_, _ = protect(func() (struct{}, error) { m.log(ctx, e); return struct{}{}, nil })
	}
	if m.observer != nil {
		_, _ = protect(func() (struct{}, error) { m.observer.Observe(ctx, e); return struct{}{}, nil })
	}
}

// degraded reports trouble with the slots in the fleet that no caller is told.
func (m *Manager[W]) degraded(ctx context.Context, err error) {
	err = &ownError{"sessionmanager: " + told(err), err}
	m.emit(ctx, Event{Kind: EventDegraded, Code: CodeUnavailable, Open: m.Stats().Open, Err: err})
}

// log leaves out what a caller is told anyway and may happen often.
func (m *Manager[W]) log(ctx context.Context, e Event) {
	level := slog.LevelInfo
	switch e.Kind {
	case EventRefused:
		return
	case EventFaulted, EventDegraded:
		level = slog.LevelWarn
	}
	attrs := []slog.Attr{slog.Int("open", e.Open)}
	if e.Session != "" {
		attrs = append(attrs, slog.String("session", e.Session))
	}
	if e.Code != "" {
		attrs = append(attrs, slog.String("code", string(e.Code)))
	}
	if e.Reason != "" {
		attrs = append(attrs, slog.String("reason", e.Reason))
	}
	if e.Duration > 0 {
		attrs = append(attrs, slog.Duration("took", e.Duration))
	}
	if e.Err != nil {
		attrs = append(attrs, slog.Any("error", e.Err))
	}
	m.logger.LogAttrs(ctx, level, "sessionmanager: "+e.Kind, attrs...)
}
