// Package sessionmanager holds a bounded number of live sessions, each with a
// worker of its own: a process, a connection, a login at somebody's API. It says
// who may open one, lends it to callers, and sees to it that each ends, once.
//
//	manager, err := sessionmanager.New[*Worker](sessionmanager.WithMax(200))
//	go manager.Run(ctx)
//	…
//	session, err := manager.Open(ctx, sessionmanager.Spec{Owner: user}, func(ctx context.Context, id string) (*Worker, error) {
//		return startWorker(ctx, id)
//	})
//	…
//	session, err := manager.Get(id, user)
//	err = session.Do(ctx, func(ctx context.Context, w *Worker) error { return w.Print(ctx, page) })
//
// # States
//
//	creating ──▶ starting ──▶ ready ──▶ closing ──▶ closed
//	    │            │          │          │           ▲
//	    └────────────┴──────────┴──────────┴─▶ faulted ┘
//
// A session is creating while it has no slot in the fleet yet, starting while its
// start runs, ready while calls are let in. It is closing from the moment that
// somebody closes it until its worker has ended, faulted when something broke: the
// open, the worker, the close. Faulted goes to closed only, or stays: a session that
// could not be opened, or not closed cleanly, is faulted when it is gone, too. Closed
// goes nowhere.
//
// It is registered, and has its slot, from creating until its worker has ended:
// there are never more workers than slots. Only Open registers, and whoever ends
// the session, which happens once, takes it out: all that is counted is counted
// there.
//
// # Ending
//
// Close, Kill, a sweep and a shutdown all begin the same end, or join the one that
// has begun. It is detached from all of them: who stops waiting, because his
// context ends, leaves the session closing, and it is gone soon. It is one call of
// [Worker.Shutdown], and one of [Worker.Kill] if that did not return nil in time or
// is cut short by a Kill or the end of a shutdown's context. So no gate is needed
// between them, and nobody can leave a session half closed.
//
// A session ends by itself when its lease is over (see [WithLease], [WithGrace]),
// at the next sweep after that. A lease that is over is never renewed: calls are
// refused already before the sweep.
//
// # What can fail, and what happens then
//
//	step       fails by                    what follows
//	open       no slot                     ErrLimit at once, start is not called
//	open       fleet's store unreachable   ErrUnavailable; the slot, if it was taken, is free after its TTL
//	open       id is taken                 ErrOpen; the session that has it is not touched
//	start      error, panic, no worker     ErrOpen; a worker that came with an error is killed
//	start      timeout, caller leaves,     its context ends; ErrOpen. If it has not returned 100 ms later it
//	           close, shutdown             is left behind: the session is faulted and keeps its slot until
//	                                       start returns, and a worker that comes then is killed
//	do         error of fn                 returned as it is; faulted if the worker says that it is broken
//	do         panic of fn                 faulted; ErrFaulted with the panic. Other sessions notice nothing
//	do         worker is broken            faulted; ErrNotReady
//	worker     dies                        faulted at once if it has Done, and the contexts of its calls
//	                                       end; else by the next call
//	do         timeout, session killed     fn's context ends; Do returns when fn does
//	faulted    nobody closes it            swept when the grace is over
//	shutdown   error, panic, timeout       the worker is killed; ErrClose
//	kill       error, panic, timeout       ErrClose; the session is gone, there is nothing left to try
//	sweep      a close fails               the others are closed, the errors joined
//	release    fleet's store unreachable   the slot is free after its TTL
//	renewal    fleet's store unreachable   tried again at the next third of the TTL
//	renewal    lease was over              taken again, whatever the limit: the session does live. Nobody
//	                                       opens another until the fleet is below it
//	fleet      process dies                its slots are free after their TTL
//
// # Promises
//
// Sessions are never more than [WithMax], nor are workers, but for those whose Kill
// failed. Each slot is returned once, each worker is ended once, on every path. An
// observer's counts are those of the manager, see [Event]. One session's trouble is
// not another's: callbacks run without a lock, and what hangs is left behind. Nothing
// runs in the background but the end of a session, a start that was left behind, the
// wait for the death of a [Mortal], the renewal of slots that are held, and
// [Manager.Run].
//
// A func, start or worker that never returns keeps its goroutine, and a start keeps
// its slot too: nobody can take those away.
package sessionmanager

import (
	"cmp"
	"container/heap"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"iter"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/sessionlock/sessionlock/internal/keyname"
)

// Worker is what a session is about: its life only. What it can do are methods of
// its own type, called in [Session.Do]. It must be safe for concurrent use.
//
// One that may die by itself, as a process does, should be a [Mortal] too.
type Worker interface {
	// Shutdown ends the worker in good order: calls that are under way finish, or fail. It
	// returns nil when the worker has ended: its place is free then. It is called at most
	// once, and not on one whose Err is not nil. When it fails, panics, or has not returned
	// when ctx ends, Kill follows.
	Shutdown(ctx context.Context) error

	// Kill ends the worker at once. It is called at most once, also while Shutdown
	// still runs, and on one that is broken or dead. An error says that it may live on;
	// that of a [Mortal] which is dead is not heard.
	Kill(reason string) error

	// Err returns nil while the worker can be used, and from then on why not. It
	// must be quick: it is called with every call of Do.
	Err() error
}

// Mortal is the optional face of a [Worker] that may die by itself. Done returns a
// channel that is closed when it has: then its session is faulted at once, and without
// it by the next call. Assert it, because a method of another form goes unnoticed:
//
//	var _ sessionmanager.Mortal = (*Worker)(nil)
type Mortal interface{ Done() <-chan struct{} }

// Spec says what to open. The zero Spec will do.
type Spec struct {
	// ID names the session, at most 256 bytes: where something else has named it
	// already. Default: "session-" and 32 hexadecimal digits, at random.
	ID string
	// Name is what logs, events and errors call the session, with a hash of its id
	// behind it: printable, at most 64 bytes, no secret. Default: "client".
	Name string
	// Owner is whose session it is, at most 256 bytes. [Manager.Get] wants to hear
	// the same. Default: "".
	Owner string
	// Timeout ends the context of a call. Default, also for a negative one:
	// [WithCallTimeout].
	Timeout time.Duration
}

// Manager holds sessions. Make one with [New]; it is safe for concurrent use.
type Manager[W Worker] struct {
	config
	names   keyname.Namer
	slots   *slots // in the fleet; nil: local only
	born    time.Time
	turns   chan struct{} // taken by each close of sweeps and shutdowns
	stopped chan struct{} // closed when Shutdown begins

	mu       sync.Mutex // before the mu of a session
	sessions map[string]*Session[W]
	leases   leases[W]
	closed   bool
	stats    Stats // but for Sessions
}

// New returns a manager without sessions. It does no I/O and starts nothing; all
// that is wrong with opts is reported at once, as an error that matches
// [ErrInvalid].
func New[W Worker](opts ...Option) (*Manager[W], error) {
	c, err := configure(opts)
	if err != nil {
		return nil, err
	}
	m := &Manager[W]{
		config: c, born: time.Now(),
		names:   keyname.Namer{Secret: c.keySecret, Namespace: c.namespace, Upstream: "sessionmanager"},
		turns:   make(chan struct{}, c.parallel),
		stopped: make(chan struct{}),

		sessions: map[string]*Session[W]{},
	}
	if c.rdb != nil {
		m.slots = newSlots(&m.config, m.names, m.degraded)
	}
	return m, nil
}

// now is the time since m was made, by the monotonic clock.
func (m *Manager[W]) now() time.Duration { return time.Since(m.born) }

// LogID is the part of [Session.Name] that belongs to id: a hash. It finds in logs
// what became of a session whose id is known.
func (m *Manager[W]) LogID(id string) string { return m.names.Tag(id)[:8] }

func (m *Manager[W]) check(ctx context.Context) error {
	if m == nil || m.sessions == nil {
		return invalid("the manager was not made by New")
	}
	return checkContext(ctx)
}

// Open starts a session. It never waits for a slot: without one it is [ErrLimit].
//
// start makes the worker. Its ctx has the values of Open's and ends with it, after
// [WithStartTimeout], when the session is closed, or the manager shut down; and
// when Open returns, so the worker must not live by it. A worker that comes too late
// is killed; one that comes with an error too.
//
// Other errors: [ErrOpen] with the cause, [ErrTaken] or that ctx ended; [ErrClosed];
// [ErrUnavailable] with [WithFleetMax]; [ErrInvalid].
func (m *Manager[W]) Open(ctx context.Context, spec Spec, start func(ctx context.Context, id string) (W, error)) (*Session[W], error) {
	if err := m.check(ctx); err != nil {
		return nil, err
	}
	err := spec.check(&m.config)
	if start == nil {
		err = errors.Join(err, invalid("start is nil"))
	}
	if err != nil {
		return nil, err
	}
	if ctx.Err() != nil {
		return nil, &Error{Code: CodeOpenFailed, op: "open", Err: ended(ctx)}
	}
	startCtx, abort := context.WithCancelCause(ctx)
	defer abort(nil)
	startCtx, cancel := context.WithTimeoutCause(startCtx, m.start, errStartTimeout)
	defer cancel()
	s, err := m.register(ctx, spec, abort)
	if err != nil {
		return nil, err
	}
	go m.launch(startCtx, s, start)
	if !s.awaitStart(startCtx) {
		if err := s.leaveBehind(startCtx); err != nil {
			return nil, err
		}
	} else if s.openErr != nil {
		return nil, s.openErr
	}
	return s, nil
}

var errStartTimeout error = &ownError{"start timed out", context.DeadlineExceeded}

// register gives a new session its id and a slot of this process.
func (m *Manager[W]) register(ctx context.Context, spec Spec, abort context.CancelCauseFunc) (*Session[W], error) {
	if spec.ID == "" {
		spec.ID = newID()
	}
	s := &Session[W]{
		m: m, id: spec.ID, owner: spec.Owner, name: spec.Name + "-" + m.LogID(spec.ID), timeout: spec.Timeout,
		begun: m.now(), abort: abort, at: -1,
		settled: make(chan struct{}), done: make(chan struct{}),
	}
	m.mu.Lock()
	refused := m.refuse(s)
	if refused == nil {
		m.sessions[s.id] = s
		m.mu.Unlock()
		return s, nil
	}
	e := m.count(refused)
	m.mu.Unlock()
	m.emit(ctx, e)
	return nil, refused
}

// refuse says why s may not be registered. m.mu is held.
func (m *Manager[W]) refuse(s *Session[W]) *Error {
	switch {
	case m.closed:
		return s.error("open", CodeClosed, "", nil)
	case len(m.sessions) >= m.max:
		return s.error("open", CodeLimit, fmt.Sprintf("%d in this process", m.max), nil)
	case m.sessions[s.id] != nil: // whoever has it keeps it
		return s.error("open", CodeOpenFailed, "", ErrTaken)
	}
	return nil
}

func newID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	return "session-" + hex.EncodeToString(b[:])
}

// launch runs start and settles what becomes of s, whatever start does.
func (m *Manager[W]) launch(ctx context.Context, s *Session[W], start func(context.Context, string) (W, error)) {
	defer close(s.settled)
	var w W
	slot, code, err := m.slots.take(ctx)
	if err != nil {
		m.unopened(ctx, s, w, s.openError(ctx, code, err))
		return
	}
	s.slot = slot
	s.starting()
	err = &PanicError{} // unless start returns
	defer func() { m.settle(ctx, s, w, err) }()
	w, err = protect(func() (W, error) { return start(ctx, s.id) })
}

// settle makes s ready, if that can be.
func (m *Manager[W]) settle(ctx context.Context, s *Session[W], w W, err error) {
	if err == nil && isNil(w) {
		err = &ownError{text: "start returned no worker"}
	}
	if err != nil || !m.admit(ctx, s, w) {
		m.unopened(ctx, s, w, s.openError(ctx, CodeOpenFailed, err))
	}
}

// unopened takes back all that was done for s. w may be nil.
func (m *Manager[W]) unopened(ctx context.Context, s *Session[W], w W, failed *Error) {
	ctx = context.WithoutCancel(ctx)
	s.fail(failed)
	s.openErr = failed
	if !isNil(w) {
		if err := s.kill(ctx, w, ReasonNotOpen); err != nil {
			s.endErr = s.error("close", CodeCloseFailed, "", err)
		}
	}
	m.remove(ctx, s, failed)
}

// admit lets calls in, unless the open was given up meanwhile.
func (m *Manager[W]) admit(ctx context.Context, s *Session[W], w W) bool {
	m.mu.Lock()
	s.mu.Lock()
	if ctx.Err() != nil || s.ending {
		s.mu.Unlock()
		m.mu.Unlock()
		return false
	}
	now := m.now()
	took := now - s.begun
	s.state, s.worker, s.opened, s.abort = StateReady, w, true, nil
	s.begun, s.last = now, now
	m.stats.Open++
	m.stats.Opened++
	m.leases.push(s, now+s.window())
	open := m.stats.Open
	s.mu.Unlock()
	m.mu.Unlock()
	m.emit(ctx, Event{Kind: EventOpened, Session: s.name, Duration: took, Open: open})
	if w, ok := any(w).(Mortal); ok {
		go s.outlive(w)
	}
	return true
}

// remove takes s out, with its slots and all that is counted. Who calls it is the
// only one, and comes once: the goroutine that opens s when that fails, else the
// one that ends it. failed is what went wrong, if anything did.
// It keeps its place until an observer has heard of its end, so that a shutdown waits
// for that, and nobody hears of more sessions than there may be.
func (m *Manager[W]) remove(ctx context.Context, s *Session[W], failed *Error) {
	defer func() { // even when an observer ends the goroutine
		m.mu.Lock()
		delete(m.sessions, s.id)
		m.mu.Unlock()
		close(s.done)
	}()
	m.slots.release(ctx, s.slot)
	m.mu.Lock()
	s.mu.Lock()
	m.leases.drop(s)
	opened := s.opened
	if opened {
		m.stats.Open--
		m.stats.Closed++
	}
	closed := Event{Kind: EventClosed, Session: s.name, Reason: s.reason, Duration: m.now() - s.begun, Open: m.stats.Open}
	if s.state = StateClosed; failed != nil {
		s.state, s.fault = StateFaulted, failed
		if opened {
			s.endErr = failed
		}
	}
	s.mu.Unlock()
	fault := m.count(failed)
	m.mu.Unlock()
	if opened {
		m.emit(ctx, closed)
	}
	if failed != nil {
		m.emit(ctx, fault)
	}
}

// count counts what went wrong. m.mu is held.
func (m *Manager[W]) count(failed *Error) Event {
	if failed == nil {
		return Event{}
	}
	e := Event{Kind: EventFaulted, Session: failed.Session, Code: failed.Code, Open: m.stats.Open, Err: failed}
	if failed.Code == CodeLimit || failed.Code == CodeClosed {
		e.Kind = EventRefused
		m.stats.Refused++
	} else {
		m.stats.Faulted++
	}
	return e
}

// Get returns the session of that id, in whatever state it is. [ErrNotFound] when
// there is none, or it has another owner: nobody learns which.
func (m *Manager[W]) Get(id, owner string) (*Session[W], error) {
	if m == nil || m.sessions == nil {
		return nil, invalid("the manager was not made by New")
	}
	m.mu.Lock()
	s := m.sessions[id]
	m.mu.Unlock()
	if s == nil || s.owner != owner {
		return nil, &Error{Code: CodeNotFound, Session: m.LogID(id), op: "get"}
	}
	return s, nil
}

// All is every session that is registered, whoever owns it, in order of their ids:
// for operators. It is taken when it is ranged over, and may have ended when it is
// looked at.
func (m *Manager[W]) All() iter.Seq[*Session[W]] {
	return func(yield func(*Session[W]) bool) {
		for _, s := range m.snapshot() {
			if !yield(s) {
				return
			}
		}
	}
}

func (m *Manager[W]) snapshot() []*Session[W] {
	m.mu.Lock()
	all := make([]*Session[W], 0, len(m.sessions))
	for _, s := range m.sessions {
		all = append(all, s)
	}
	m.mu.Unlock()
	slices.SortFunc(all, func(a, b *Session[W]) int { return cmp.Compare(a.id, b.id) })
	return all
}

// Stats returns this process's counts.
func (m *Manager[W]) Stats() Stats {
	m.mu.Lock()
	defer m.mu.Unlock()
	st := m.stats
	st.Sessions = len(m.sessions)
	return st
}

// Run sweeps every [WithSweepInterval] until ctx ends, whose error it returns, or the
// manager is shut down: nil. What fails is observed and logged, and tried again. Slots
// in the fleet are renewed without it.
func (m *Manager[W]) Run(ctx context.Context) error {
	if err := m.check(ctx); err != nil {
		return err
	}
	tick := time.Tick(m.sweep)
	for {
		select {
		case <-ctx.Done():
			return ended(ctx)
		case <-m.stopped:
			return nil
		case <-tick:
			_, _ = m.Sweep(ctx, time.Now())
		}
	}
}

// Sweep closes the sessions whose lease is over at now, each judged once more as it
// is closed: a listener that came back has won. It returns how many ended well, and
// the errors of the others, joined. What it costs is what it closes: a session that
// is in use is looked at once per lease. When ctx ends, so does the wait for closes
// that have begun, and no other begins.
func (m *Manager[W]) Sweep(ctx context.Context, now time.Time) (closed int, err error) {
	if err := m.check(ctx); err != nil {
		return 0, err
	}
	var begun []*Session[W]
	for at := min(now.Sub(m.born), far); m.turn(ctx); {
		s, end := m.expired(ctx, at)
		if s == nil {
			<-m.turns
			break
		}
		begun = append(begun, s)
		go func() {
			defer func() { <-m.turns }()
			end()
		}()
	}
	var all outcomes
	if ctx.Err() != nil {
		all.add(fmt.Errorf("sessionmanager: sweep: %w", ended(ctx)))
	}
	for _, s := range begun {
		all.add(s.await(ctx, "sweep"))
	}
	return all.ok, all.join()
}

// far is later than any lease; the sum of both is no overflow.
const far = math.MaxInt64 / 2

// turn takes a turn to close a session; false: ctx has ended.
func (m *Manager[W]) turn(ctx context.Context) bool {
	if ctx.Err() != nil {
		return false
	}
	select {
	case m.turns <- struct{}{}:
		return true
	case <-ctx.Done():
		return false
	}
}

// expired begins the end of a session whose lease is over at now; nil: there is
// none. What is due and not expired gets a later place in the queue.
func (m *Manager[W]) expired(ctx context.Context, now time.Duration) (s *Session[W], end func()) {
	const atOnce = 1000 // then others have their turn with the lock
	for more := true; more && s == nil; {
		m.mu.Lock()
		for i := 0; i < atOnce && s == nil && more; i++ {
			if more = len(m.leases) > 0 && m.leases[0].due <= now; more {
				s, end = m.first(ctx, now)
			}
		}
		m.mu.Unlock()
	}
	return s, end
}

// first looks at the first of the queue: its end begins, or it gets a later place.
// m.mu is held.
func (m *Manager[W]) first(ctx context.Context, now time.Duration) (*Session[W], func()) {
	s := m.leases[0]
	s.mu.Lock()
	defer s.mu.Unlock()
	reason := s.overdue(now)
	if reason == "" && !s.ending {
		m.leases.move(s, s.look(now))
		return nil, nil
	}
	m.leases.drop(s)
	if s.ending { // begun by somebody else
		return nil, nil
	}
	return s, s.beginning(ctx, reason)
}

// Shutdown closes all sessions, [WithParallel] at a time, and gives up those that
// are being opened; [Manager.Open] is [ErrClosed] from now on. What has not ended
// when ctx ends, be it before the call, is killed, all of it at once: Shutdown returns
// 100 ms after [WithKillTimeout] at the latest (and [WithOpTimeout], with slots in the
// fleet), with ctx's error and those of the sessions that did not end well. A start
// that does not return is not waited for longer than a close may take. Called again it
// waits for the same.
func (m *Manager[W]) Shutdown(ctx context.Context) error {
	if err := m.check(ctx); err != nil {
		return err
	}
	m.mu.Lock()
	if !m.closed {
		m.closed = true
		close(m.stopped)
	}
	m.mu.Unlock()
	sessions := m.snapshot()
	m.closeAll(ctx, sessions)
	patient, cancel := context.WithTimeout(ctx, m.shutdown+m.killing())
	defer cancel()
	all, alive := m.collect(patient, sessions)
	if alive && ctx.Err() != nil {
		return m.killAll(ctx, sessions)
	}
	return all.join()
}

// collect waits for the end of sessions, which has begun, until ctx ends. It reports
// whether one is left.
func (m *Manager[W]) collect(ctx context.Context, sessions []*Session[W]) (all outcomes, alive bool) {
	for _, s := range sessions {
		select {
		case <-s.done:
		case <-ctx.Done():
		}
		if isClosed(s.done) {
			all.add(s.endErr)
		} else {
			all.add(s.stuck("shut down"))
			alive = true
		}
	}
	return all, alive
}

var errShutDown error = &Error{Code: CodeClosed, op: "open"}

// closeAll begins the end of all, until ctx ends.
func (m *Manager[W]) closeAll(ctx context.Context, sessions []*Session[W]) {
	for _, s := range sessions {
		if !isClosed(s.settled) { // a start that never returns shall not keep a turn
			s.begin(ctx, ReasonShutdown, errShutDown, false)
		}
	}
	for _, s := range sessions {
		if !isClosed(s.settled) || isClosed(s.done) {
			continue
		}
		if !m.turn(ctx) {
			return
		}
		s.begin(ctx, ReasonShutdown, errShutDown, false)
		go func() {
			<-s.done
			<-m.turns
		}()
	}
}

// killAll ends what is left when ctx has ended.
func (m *Manager[W]) killAll(ctx context.Context, sessions []*Session[W]) error {
	for _, s := range sessions {
		s.begin(ctx, ReasonShutdown, errShutDown, true)
	}
	late, cancel := context.WithTimeout(context.WithoutCancel(ctx), m.killing())
	defer cancel()
	all, _ := m.collect(late, sessions)
	return errors.Join(fmt.Errorf("sessionmanager: shut down: %w", ended(ctx)), all.join())
}

// killing is longer than it takes to kill a worker and to give its slot back.
func (m *Manager[W]) killing() time.Duration {
	if m.slots != nil {
		return m.kill + m.opTimeout + patience
	}
	return m.kill + patience
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// outcomes collects what became of many closes.
type outcomes struct {
	ok     int
	failed []error
	more   int
}

// maxErrors are joined into one; of the others the number is told.
const maxErrors = 16

func (o *outcomes) add(err error) {
	switch {
	case err == nil:
		o.ok++
	case len(o.failed) < maxErrors:
		o.failed = append(o.failed, err)
	default:
		o.more++
	}
}

func (o *outcomes) join() error {
	if o.more > 0 {
		o.failed = append(o.failed, fmt.Errorf("sessionmanager: and %d more", o.more))
	}
	return errors.Join(o.failed...)
}

// leases is a heap of the open sessions by when they are to be looked at: never
// after the end of their lease, mostly before, because use of a session moves the
// end and not its place.
type leases[W Worker] []*Session[W]

func (l leases[W]) Len() int           { return len(l) }
func (l leases[W]) Less(i, j int) bool { return l[i].due < l[j].due }
func (l leases[W]) Swap(i, j int)      { l[i], l[j] = l[j], l[i]; l[i].at, l[j].at = i, j }

// Push is for container/heap.
func (l *leases[W]) Push(x any) {
	s := x.(*Session[W]) // of push only
	s.at = len(*l)
	*l = append(*l, s)
}

// Pop is for container/heap.
func (l *leases[W]) Pop() any {
	last := len(*l) - 1
	s := (*l)[last]
	(*l)[last], s.at = nil, -1
	*l = (*l)[:last]
	return s
}

func (l *leases[W]) push(s *Session[W], due time.Duration) { s.due = due; heap.Push(l, s) }
func (l *leases[W]) move(s *Session[W], due time.Duration) { s.due = due; heap.Fix(l, s.at) }

// forward moves s, whose lease has become shorter, unless it is ending. s.mu is
// held, too.
func (l *leases[W]) forward(s *Session[W]) {
	if s.at >= 0 {
		l.move(s, s.look(s.m.now()))
	}
}

func (l *leases[W]) drop(s *Session[W]) {
	if s.at >= 0 {
		heap.Remove(l, s.at)
	}
}
