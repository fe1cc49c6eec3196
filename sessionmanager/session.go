package sessionmanager

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"sync"
	"time"
)

// State is where a session is in its life; see the package comment.
type State uint8

// The states of a session.
const (
	StateCreating State = iota // it waits for its slot in the fleet
	StateStarting              // its start runs
	StateReady                 // calls are let in
	StateClosing               // its worker is being ended
	StateClosed                // it is gone
	StateFaulted               // something broke; it is gone when Done says so
)

var stateNames = [...]string{"creating", "starting", "ready", "closing", "closed", "faulted"}

// String returns the word that the package comment has for it.
func (s State) String() string {
	if int(s) < len(stateNames) {
		return stateNames[s]
	}
	return fmt.Sprintf("State(%d)", uint8(s))
}

// patience is for what should return at once when its context ends.
const patience = 100 * time.Millisecond

// Session is one open session of a [Manager]. It is safe for concurrent use.
type Session[W Worker] struct {
	m               *Manager[W]
	id, owner, name string
	timeout         time.Duration
	slot            string        // in the fleet; known when settled
	settled         chan struct{} // closed when start is over, and what it came to known
	done            chan struct{} // closed when the session is gone
	openErr         error         // why it was not opened; known when settled
	endErr          error         // what went wrong as it ended; known when done
	worker          W             // set before it is ready

	due time.Duration // its place in the heap; under the manager's mu
	at  int           // and index there; -1: none

	mu        sync.Mutex
	state     State
	fault     error         // why it is faulted
	opened    bool          // it was ready once
	ending    bool          // its end has begun, or its open was given up
	reason    string        // of the end
	short     bool          // the grace is its lease
	begun     time.Duration // when it was begun, then when it became ready
	last      time.Duration // when it was last used
	pending   int           // calls under way
	listeners int           // attached
	calls     *call         // under way, doubly linked

	abort context.CancelCauseFunc // gives up the open; nil once it is ready
	cut   context.CancelFunc      // ends the Shutdown of the worker; nil before the end has begun
}

// call is one that is under way.
type call struct {
	cancel     context.CancelCauseFunc
	prev, next *call
}

// ID returns the name under which [Manager.Get] finds it.
func (s *Session[W]) ID() string { return s.id }

// Owner returns whose it is.
func (s *Session[W]) Owner() string { return s.owner }

// Name returns what logs, events and errors call it: [Spec].Name, and behind it the
// [Manager.LogID] of its id.
func (s *Session[W]) Name() string { return s.name }

// Done returns a channel that is closed when the session is gone: its worker has
// ended and its slot is free.
func (s *Session[W]) Done() <-chan struct{} { return s.done }

// State returns where it is in its life.
func (s *Session[W]) State() State {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state
}

// Err returns why the session is faulted, nil while it is not: [ErrFaulted],
// [ErrOpen] or [ErrClose] with the cause, which its text does not quote: errors.As finds
// an *exec.ExitError, or whatever [Worker].Err has said.
func (s *Session[W]) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state != StateFaulted {
		return nil
	}
	return s.fault
}

// Info is what can be seen of a session at one instant: for operators.
type Info struct {
	State     State
	Begun     time.Time // when it became ready, before that when it was registered
	Used      time.Time // last; zero before it is ready
	Ends      time.Time // when its lease is over unless it is used; zero before it is ready, and while somebody listens
	Calls     int       // under way
	Listeners int       // attached
	Reason    string    // why it ends, or has ended; "" before
}

// Info returns how the session is.
func (s *Session[W]) Info() Info {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := Info{State: s.state, Begun: s.m.born.Add(s.begun), Calls: s.pending, Listeners: s.listeners, Reason: s.reason}
	if s.opened {
		i.Used = s.m.born.Add(s.last)
		if s.listeners == 0 || s.state == StateFaulted {
			i.Ends = i.Used.Add(s.held())
		}
	}
	return i
}

// window is how long s lives on after its last use. s.mu is held.
func (s *Session[W]) window() time.Duration {
	if s.short {
		return min(s.m.lease, s.m.grace)
	}
	return s.m.lease
}

// held is the same for a session in which a call may be under way: within its
// timeout it keeps the session alive, and no longer, for it may never return.
func (s *Session[W]) held() time.Duration {
	if s.pending > 0 {
		return max(s.window(), s.timeout)
	}
	return s.window()
}

// overdue returns why s is to be closed at now, "" while it is not. s.mu is held.
func (s *Session[W]) overdue(now time.Duration) string {
	switch idle := now - s.last; {
	case s.state == StateFaulted:
		if idle >= s.window() {
			return ReasonFaulted
		}
		return ""
	case s.listeners > 0, idle < s.held():
		return ""
	case idle < s.m.lease:
		return ReasonDetached
	}
	return ReasonLease
}

// look is when s is to be looked at again that is not overdue at now: never after
// the end of its lease, whatever happens until then. s.mu is held.
func (s *Session[W]) look(now time.Duration) time.Duration {
	switch {
	case s.state == StateFaulted:
		return s.last + s.window()
	case s.listeners > 0: // a detach brings it forward
		return now + s.m.lease
	}
	return min(now+s.window(), s.last+s.held())
}

func (s *Session[W]) check(ctx context.Context) error {
	if s == nil || s.m == nil {
		return invalid("the session was not opened by a Manager")
	}
	return checkContext(ctx)
}

func (s *Session[W]) error(op string, code Code, detail string, err error) *Error {
	return &Error{Code: code, Session: s.name, Err: err, op: op, detail: detail}
}

// notReady tells the states of session and worker. s.mu is held.
func (s *Session[W]) notReady(op string, worker error) *Error {
	detail := "session " + s.state.String() + ", worker "
	switch {
	case worker != nil:
		detail += "broken"
	case !s.opened:
		detail += "not started"
	case s.state == StateClosed:
		detail += "ended"
	case s.ending:
		detail += "ending"
	case s.state == StateFaulted:
		detail += "in doubt"
	default:
		detail += "ready"
	}
	if worker == nil {
		worker = s.fault
	}
	return s.error(op, CodeNotReady, detail, worker)
}

// usable refuses calls and listeners that may not enter now. s.mu is held.
func (s *Session[W]) usable(op string, now time.Duration) error {
	switch {
	case s.state != StateReady || s.ending:
		return s.notReady(op, nil)
	case s.overdue(now) != "":
		return s.error(op, CodeNotReady, "its lease is over", nil)
	}
	return nil
}

// Do runs fn with the worker. fn's context ends with ctx, after the session's
// timeout, and when the session has ended or is killed; Do returns when fn does. A
// call is a use: it begins the lease anew as it begins and as it ends.
//
// The error of fn is returned as it is, except that one which says that its context
// ended is joined to why. Others: [ErrNotReady], [ErrBusy] over [WithPending],
// [ErrFaulted] when fn panicked, ctx's when it has ended before, [ErrInvalid]. A
// session whose worker says that it is broken, before fn or after an error of it, is
// faulted; so is one whose fn panicked or ended its goroutine, because nobody knows
// then in which state the worker is.
func (s *Session[W]) Do(ctx context.Context, fn func(ctx context.Context, w W) error) (err error) {
	err = s.check(ctx)
	if fn == nil {
		err = errors.Join(err, invalid("func is nil"))
	}
	if err != nil {
		return err
	}
	fnCtx, c, err := s.enter(ctx)
	if err != nil {
		return err
	}
	defer s.leave(c)
	if err := s.sick(ctx, "do"); err != nil {
		return err
	}
	fnCtx, cancel := context.WithTimeout(fnCtx, s.timeout)
	defer cancel()
	returned := false
	defer func() {
		if !returned {
			err = s.broke(ctx, &PanicError{Value: recover(), Stack: debug.Stack()})
		}
	}()
	err = fn(fnCtx, s.worker)
	returned = true
	if err != nil {
		err = s.judge(ctx, fnCtx, err)
	}
	return err
}

// Call is [Session.Do] with a result. It is the zero one when there is an error.
func Call[W Worker, T any](ctx context.Context, s *Session[W], fn func(ctx context.Context, w W) (T, error)) (T, error) {
	var v, zero T
	if fn == nil {
		return zero, invalid("func is nil")
	}
	err := s.Do(ctx, func(ctx context.Context, w W) (err error) {
		v, err = fn(ctx, w)
		return err
	})
	if err != nil {
		return zero, err
	}
	return v, nil
}

// enter lets a call in.
func (s *Session[W]) enter(ctx context.Context) (context.Context, *call, error) {
	if ctx.Err() != nil {
		return nil, nil, fmt.Errorf("sessionmanager: do %s: %w", s.name, ended(ctx))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.m.now()
	if err := s.usable("do", now); err != nil {
		return nil, nil, err
	}
	if s.pending >= s.m.pending {
		return nil, nil, s.error("do", CodeBusy, fmt.Sprintf("%d calls under way", s.pending), nil)
	}
	s.short = false // somebody came back
	ctx, cancel := context.WithCancelCause(ctx)
	c := &call{cancel: cancel, next: s.calls}
	if s.calls != nil {
		s.calls.prev = c
	}
	s.calls = c
	s.pending++
	s.last = now
	return ctx, c, nil
}

func (s *Session[W]) leave(c *call) {
	c.cancel(nil)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.use()
	if c.prev != nil {
		c.prev.next = c.next
	} else {
		s.calls = c.next
	}
	if c.next != nil {
		c.next.prev = c.prev
	}
	s.pending--
}

// use begins the lease anew, unless it is over. s.mu is held.
func (s *Session[W]) use() {
	if now := s.m.now(); s.state == StateReady && s.overdue(now) == "" {
		s.last = now
	}
}

// sick faults s when its worker is broken.
func (s *Session[W]) sick(ctx context.Context, op string) error {
	broken := s.workerErr()
	if broken == nil {
		return nil
	}
	s.mu.Lock()
	err := s.notReady(op, broken)
	s.mu.Unlock()
	s.faulted(ctx, broken)
	return err
}

// outlive faults s when its worker dies.
func (s *Session[W]) outlive(w Mortal) {
	died, broken := protect(func() (<-chan struct{}, error) { return w.Done(), nil })
	if broken == nil {
		select {
		case <-s.done:
			return
		case <-died:
			broken = s.workerErr()
		}
	}
	s.faulted(context.Background(), cmp.Or(broken, errDied))
	s.sever()
}

// isDead reports whether w has told so.
func isDead[W Worker](w W) bool {
	m, ok := any(w).(Mortal)
	if !ok {
		return false
	}
	done, err := protect(func() (<-chan struct{}, error) { return m.Done(), nil })
	return err == nil && done != nil && isClosed(done)
}

// errDied is of a worker that gives no reason.
var errDied error = &ownError{text: "the worker has ended"}

func (s *Session[W]) workerErr() error {
	broken, panicked := protect(func() (error, error) { return s.worker.Err(), nil })
	if panicked != nil {
		return panicked
	}
	return broken
}

// faulted lets nobody in any more, and shortens the lease to the grace.
func (s *Session[W]) faulted(ctx context.Context, cause error) {
	failed := s.error("fault", CodeFaulted, "", cause)
	s.m.mu.Lock()
	s.mu.Lock()
	first := s.state == StateReady && !s.ending
	if first {
		s.state, s.fault, s.short, s.last = StateFaulted, failed, true, s.m.now()
		s.m.leases.forward(s)
		s.m.stats.Faulted++
	}
	open := s.m.stats.Open
	s.mu.Unlock()
	s.m.mu.Unlock()
	if first {
		s.m.emit(ctx, Event{Kind: EventFaulted, Session: s.name, Code: CodeFaulted, Open: open, Err: failed})
	}
}

// broke faults s because of a call that did not return.
func (s *Session[W]) broke(ctx context.Context, panicked error) error {
	s.faulted(ctx, panicked)
	return s.error("do", CodeFaulted, "", panicked)
}

// judge looks at an error of fn: is the worker broken, did the session end under
// the call?
func (s *Session[W]) judge(ctx, fnCtx context.Context, err error) error {
	if broken := s.workerErr(); broken != nil {
		s.faulted(ctx, broken)
	}
	var over *Error
	if ctx.Err() == nil && fnCtx.Err() != nil && errors.Is(err, fnCtx.Err()) && errors.As(context.Cause(fnCtx), &over) {
		return fmt.Errorf("%w: %w", over, err)
	}
	return err
}

// Attach returns the worker to somebody who listens to it. While anybody is
// attached the lease does not run out. Call detach when done, once or more: the
// lease begins anew with it, and once the last has gone [WithGrace] applies.
//
// A listener hears of the session's end from the worker, or by [Session.Done].
// Errors: [ErrNotReady], [ErrBusy] over [WithListeners], [ErrInvalid].
func (s *Session[W]) Attach() (w W, detach func(), err error) {
	var none W
	if err := s.check(context.Background()); err != nil {
		return none, nil, err
	}
	if err := s.listen(); err != nil {
		return none, nil, err
	}
	detach = sync.OnceFunc(s.detach)
	if err := s.sick(context.Background(), "attach"); err != nil {
		detach()
		return none, nil, err
	}
	return s.worker, detach, nil
}

func (s *Session[W]) listen() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.usable("attach", s.m.now()); err != nil {
		return err
	}
	if s.listeners >= s.m.listeners {
		return s.error("attach", CodeBusy, fmt.Sprintf("%d listeners", s.listeners), nil)
	}
	s.listeners++ // which holds the lease, until the detach begins it anew
	return nil
}

func (s *Session[W]) detach() {
	s.m.mu.Lock()
	defer s.m.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.use()
	if s.listeners--; s.listeners == 0 {
		s.short = s.short || s.m.grace > 0
		s.m.leases.forward(s)
	}
}

// Close ends the session in good order; see the package comment. It returns when
// the session is gone, with [ErrClose] and the cause when its worker had to be
// killed because Shutdown failed, or could not be killed. When ctx ends it returns
// ctx's error, and the session goes on ending; with a ctx that has ended already
// nothing happens. Close of a session that is ending, or gone, waits for the same
// end and returns the same. One that is being opened is given up.
func (s *Session[W]) Close(ctx context.Context) error {
	return s.end(ctx, "close", ReasonClient, false)
}

// Kill ends the session without [Worker.Shutdown], or cuts short the one that runs.
// reason, which must not be blank, is what [Worker.Kill] and an observer are told.
// It returns as [Session.Close] does.
func (s *Session[W]) Kill(ctx context.Context, reason string) error {
	if err := checkReason(reason); err != nil {
		return errors.Join(s.check(ctx), err)
	}
	return s.end(ctx, "kill", reason, true)
}

func (s *Session[W]) end(ctx context.Context, op, reason string, kill bool) error {
	if err := s.check(ctx); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return fmt.Errorf("sessionmanager: %s %s: %w", op, s.name, ended(ctx))
	}
	s.begin(ctx, reason, errAborted, kill)
	return s.await(ctx, op)
}

// errAborted is why the context of a start ended that was given up by a Close.
var errAborted error = &ownError{"closed while it was opened", ErrNotReady}

// begin begins the end of s, unless it has begun. kill leaves Shutdown out, also of
// one that has begun. abort is what becomes of a start.
func (s *Session[W]) begin(ctx context.Context, reason string, abort error, kill bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var end func()
	if !s.ending {
		end = s.beginning(ctx, reason)
	}
	if s.abort != nil {
		s.abort(abort)
	}
	if kill && s.cut != nil {
		s.reason = reason
		s.cut() // before the end begins, so that it does not begin with Shutdown
	}
	if end != nil {
		go end()
	}
}

// beginning begins the end of s, which has not begun, and returns it. s.mu is held.
func (s *Session[W]) beginning(ctx context.Context, reason string) (end func()) {
	ctx, cut := context.WithCancel(context.WithoutCancel(ctx))
	s.ending, s.reason, s.cut = true, reason, cut
	if s.state != StateFaulted { // from which only closed is next
		s.state = StateClosing
	}
	return func() {
		defer cut()
		<-s.settled
		if s.openErr != nil {
			return // whoever opened it has ended it
		}
		var failed *Error
		if err := s.endWorker(ctx); err != nil {
			failed = s.error("close", CodeCloseFailed, "", err)
		}
		s.m.remove(context.WithoutCancel(ctx), s, failed)
		s.sever() // now, so that a call that closes its own session sees it done
	}
}

// endWorker ends the worker, without Shutdown when ctx has ended or ends.
func (s *Session[W]) endWorker(ctx context.Context) error {
	failed := ctx.Err()
	if failed == nil {
		failed = within(ctx, s.m.shutdown, s.shutDown)
	}
	switch {
	case failed == nil:
		return nil
	case ctx.Err() != nil, errors.Is(failed, errSick):
		failed = nil // it was cut short, or left out, and that is no failure
	}
	s.sever() // whatever Kill does
	s.mu.Lock()
	reason := s.reason
	s.mu.Unlock()
	killed := s.kill(ctx, s.worker, reason)
	if failed == nil {
		return killed
	}
	text := "shut down: " + told(failed) + "; "
	if killed == nil {
		return &ownError{text + "killed", failed}
	}
	return &ownError{text + told(killed), errors.Join(failed, killed)}
}

// errSick is that a worker cannot be asked to shut down.
var errSick = errors.New("broken")

func (s *Session[W]) shutDown(ctx context.Context) error {
	if s.workerErr() != nil {
		return errSick
	}
	return s.worker.Shutdown(ctx)
}

// sever ends the contexts of all calls.
func (s *Session[W]) sever() {
	s.mu.Lock()
	defer s.mu.Unlock()
	over := s.notReady("do", nil)
	for c := s.calls; c != nil; c = c.next {
		c.cancel(over)
	}
}

func (s *Session[W]) kill(ctx context.Context, w W, reason string) error {
	err := within(context.WithoutCancel(ctx), s.m.kill, func(context.Context) error { return w.Kill(reason) })
	if err == nil || isDead(w) {
		return nil
	}
	return &ownError{"kill: " + told(err), err}
}

// await waits for the end of s, which has begun. Nothing but a start that does not
// return can delay it beyond the timeouts.
func (s *Session[W]) await(ctx context.Context, op string) error {
	select {
	case <-s.done:
		return s.endErr
	case <-time.After(s.m.shutdown + s.m.killing()):
		return s.stuck(op)
	case <-ctx.Done():
	}
	select {
	case <-s.done:
		return s.endErr
	default:
		return fmt.Errorf("sessionmanager: %s %s: %w", op, s.name, ended(ctx))
	}
}

// stuck is what is said of an end that takes longer than its timeouts allow.
func (s *Session[W]) stuck(op string) error {
	if isClosed(s.settled) {
		return s.error(op, CodeCloseFailed, "it goes on ending", nil)
	}
	return s.error(op, CodeCloseFailed, "start has not returned; when it does, the session ends", nil)
}

// starting notes that s has its slot.
func (s *Session[W]) starting() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state == StateCreating {
		s.state = StateStarting
	}
}

// fail notes that s will not be opened, and why. Who closes it from now on waits
// for what is under way.
func (s *Session[W]) fail(why *Error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.state, s.fault, s.ending = StateFaulted, why, true
}

// awaitStart waits until s is settled, and a moment longer than ctx. It reports
// whether it is.
func (s *Session[W]) awaitStart(ctx context.Context) bool {
	select {
	case <-s.settled:
		return true
	case <-ctx.Done():
	}
	select {
	case <-s.settled:
		return true
	case <-time.After(patience):
		return false
	}
}

// leaveBehind gives up on a start that does not return when ctx has ended. Nil: it has
// returned.
func (s *Session[W]) leaveBehind(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.opened {
		return nil // in time: an observer is still being told
	}
	failed := s.openError(ctx, CodeOpenFailed, nil)
	failed.detail = "start has not returned and is left behind"
	if !isClosed(s.done) {
		s.state, s.fault, s.ending = StateFaulted, failed, true
	}
	return failed
}

// openError is what Open returns when err was in the way, or what it waited for came
// too late, and ctx was the context of that: that it ended is part of the cause.
func (s *Session[W]) openError(ctx context.Context, code Code, err error) *Error {
	if ctx.Err() == nil || code == CodeLimit {
		return s.error("open", code, "", err)
	}
	cause := context.Cause(ctx)
	// These very ones: the caller's own cause may wrap another manager's.
	switch cause {
	case errShutDown: //nolint:errorlint // see above
		return s.error("open", CodeClosed, "", err)
	case errAborted, errStartTimeout:
	default:
		cause = ended(ctx)
	}
	if err != nil {
		cause = fmt.Errorf("%w: %w", cause, err)
	}
	return s.error("open", CodeOpenFailed, "", cause)
}
