// Package sessionguard lets the last of several requests that modify one session
// go on, and stops the others, whatever nodes they run on.
//
//	monitor, err := sessionguard.New(rdb)
//	…
//	ctx, guard, err := monitor.Register(ctx, sessionID) // ctx ends when a newer request registers, on any node
//	defer guard.End()
//	…
//	err = guard.Commit(ctx, func(ctx context.Context, epoch uint64) (bool, error) {
//		return db.SaveCart(ctx, cart, epoch) // UPDATE … WHERE epoch <= $epoch; false: no row
//	})
//
// # The case it is for
//
// A load balancer sends a request to a node, the node is slow, and the balancer, or
// the user, sends it again to another. The second node answers, the user goes on, and
// then the first one finishes: it overwrites the session with what was true before.
//
// # How it works
//
// A session has one registration in a [Store]: the epoch and the token of the request
// that registered last. An epoch is greater than every one given out before it, also
// before a failover, if the clocks of master and replica agree to within the time that
// was lost (internal/epoch). Whoever registers replaces it, and wakes the
// others, who look and find that they are superseded: their context ends. What decides
// is the registration, never the wake-up: [Guard.Commit], [Guard.Eval] and
// [Guard.Check] compare it, so a request whose wake-up was lost is refused all the same.
//
//	            ┌─ newer one registered ──▶ superseded ─┐
//	registered ─┤                                       ├─ End ─▶ ended
//	            ├─ registration gone ─────▶ lost ───────┤
//	            └───────────────────────────────────────┘
//
// Superseded and lost are for ever. A registration lives for the TTL (30 s), renewed at
// every third of it while a process guards the session. [Guard.End] leaves it to die:
// while it stands, an older request that is still under way learns by whom it was
// superseded, and after a crash nothing needs to be cleaned up.
//
// # What can fail, and what happens then
//
//	step        fails by                  what follows
//	register    store unreachable         an error; nothing is left in this process
//	register    reply lost                an error; it may have superseded the others all the same, and does
//	                                      when the command arrives late: a retry is then refused, too
//	wake-up     lost, late, repeated      the next look finds it: at a resubscription, a renewal, a commit
//	look        store unreachable         the next one
//	renewal     store unreachable         tried again every thirtieth of the TTL
//	renewal     process stood still, or   the registration is gone: lost, for nobody can say any more
//	            cut off, for the TTL      whether a newer request has come and gone
//	commit      store unreachable         an error, nothing written
//	commit      overtaken after the look  the epoch in the WHERE clause refuses it, if the newer request has
//	                                      written; [Guard.Eval] has no such gap
//	store       loses its data            every request under way is lost: none of them writes
//	store       fails over and loses the  the requests whose registration is lost are lost; the one whose
//	            last writes               is stored again goes on, unless it learnt that it was superseded
//
// So of the requests that are registered before any of them commits at most one does, by
// Check: the one with the highest epoch that is stored; and exactly one unless a row of
// the table came between. Of those that register while another commits the newest
// writes last. [Guard.Eval], or a row that was claimed, leaves no gap between.
package sessionguard

import (
	"context"
	"crypto/rand"
	"encoding"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/sessionlock/sessionlock/internal/bound"
	"github.com/sessionlock/sessionlock/internal/keyname"
	"github.com/sessionlock/sessionlock/internal/lua"
	"github.com/sessionlock/sessionlock/internal/rediserr"
)

// The states an error can report; match with errors.Is.
var (
	// ErrSuperseded: a newer request for the session has registered. A
	// [*SupersededError] in the chain has its epoch.
	ErrSuperseded = errors.New("sessionguard: superseded by a newer request")
	// ErrLost: the registration is gone, because the store lost it or the process
	// could not renew it in time. Nobody can say whether a newer request has come.
	ErrLost = errors.New("sessionguard: registration lost")
	// ErrUnavailable: the store could not be asked. It says nothing of the request.
	ErrUnavailable = errors.New("sessionguard: store unavailable")
	// ErrInvalid: an argument or option is wrong. Returned before any I/O.
	ErrInvalid = errors.New("sessionguard: invalid argument")
	// ErrClosed: the monitor was closed.
	ErrClosed = errors.New("sessionguard: monitor closed")
)

// SupersededError is the cause with which a request's context ends, and the error of
// what it tries to commit. It matches ErrSuperseded.
type SupersededError struct {
	Epoch uint64 // of this request
	By    uint64 // of the newer one; 0: only the application's store knows it
	id    string
}

// Error names the log-safe session id and the epochs.
func (e *SupersededError) Error() string {
	if e.By == 0 {
		return fmt.Sprintf("sessionguard: session %s: request %d superseded by a newer one", e.id, e.Epoch)
	}
	return fmt.Sprintf("sessionguard: session %s: request %d superseded by %d", e.id, e.Epoch, e.By)
}

// Unwrap returns ErrSuperseded.
func (e *SupersededError) Unwrap() error { return ErrSuperseded }

// Monitor registers the requests of one process. Make one per process and keep it;
// all methods are safe for concurrent use. Its configuration must be the same in the
// whole fleet.
type Monitor struct {
	config
	names keyname.Namer
	rdb   redis.UniversalClient // for Eval; nil: another store

	mu       sync.Mutex
	closed   bool
	floor    uint64              // the highest epoch this process has seen and believes, of any session
	sessions map[string]*session // that this process guards, by name
	young    []named             // those that are not watched yet, oldest first
	stop     context.CancelFunc  // ends the renewals; nil: none run
	running  sync.WaitGroup
}

// session is one that this process guards.
type session struct {
	guards  map[*registration]bool
	pending int       // requests that are registering
	latest  uint64    // the highest epoch seen
	due     time.Time // when its registration is renewed
	begun   time.Time // when this process began to guard it
	unwatch func()
	looking bool
	again   bool // what is being looked at may have changed since
}

// registration is one request's.
type registration struct {
	m       *Monitor
	name    string
	id      string // log-safe
	token   string
	cancel  context.CancelCauseFunc
	session *session
	epoch   uint64
	failed  error // superseded or lost; guarded by m.mu
	ended   bool  // guarded by m.mu
	wrote   atomic.Bool
}

// Guard is a request's part in a session. A nil Guard, which [FromContext] returns for
// a request that is not guarded, and the zero Guard refuse to commit: [ErrInvalid].
// Safe for concurrent use.
type Guard struct {
	r     *registration
	inner bool // of a request that was registered already: its end is not the request's
}

// New returns a Monitor on rdb, any go-redis v9 client of Redis 6.2 or later. It does
// no I/O and starts nothing. It reports everything that is wrong with its arguments at
// once, as an error that matches [ErrInvalid]. rdb stays the caller's, and must be
// closed after the monitor; it is nil only with [WithStore].
func New(rdb redis.UniversalClient, opts ...Option) (*Monitor, error) {
	cfg, err := configure(rdb, opts)
	if err != nil {
		return nil, err
	}
	m := &Monitor{
		config:   cfg,
		names:    keyname.Namer{Secret: cfg.keySecret, Namespace: cfg.namespace, Upstream: "sessionguard"},
		sessions: map[string]*session{},
	}
	if m.store == nil {
		m.rdb, m.store = rdb, newRedisStore(rdb, cfg.events)
	}
	return m, nil
}

// Format writes a fixed word whatever the verb: a monitor holds a key secret.
func (m *Monitor) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "[sessionguard monitor]") }

// KeyID returns the id under which errors and Redis know a session: a keyed hash, see
// [WithKeySecret].
func (m *Monitor) KeyID(session string) string { return m.names.Tag(session) }

type contextKey struct{}

// FromContext returns the guard that ctx carries, of the last session if there are
// several, and nil for none.
func FromContext(ctx context.Context) *Guard {
	if ctx == nil {
		return nil
	}
	g, _ := ctx.Value(contextKey{}).(*chain)
	if g == nil {
		return nil
	}
	return g.Guard
}

// chain is a context's guards, innermost first.
type chain struct {
	*Guard
	outer *chain
}

// Register makes the request that ctx belongs to the last one for session, any
// non-blank byte string of at most 1024 bytes. The context it returns ends, with a
// [*SupersededError] as its cause, as soon as this process learns of a newer one, and
// carries the guard: see [FromContext]. End the guard when the request is over.
//
// Under a context that carries a guard of the same session the request is registered
// already, and does not fight itself: the guard is another handle of that one, whose
// End does nothing. One request may guard several sessions; what is made from
// another's context ends with that.
//
// Errors, with ctx returned as it is and a nil guard: [ErrUnavailable],
// [ErrInvalid], [ErrClosed], the request's own end if it is guarded already, and ctx's
// error, wrapped. After ErrUnavailable or ctx's error it may have superseded others.
func (m *Monitor) Register(ctx context.Context, session string) (context.Context, *Guard, error) {
	if err := errors.Join(checkContext(ctx), checkSession(session)); err != nil {
		return ctx, nil, err
	}
	id := m.KeyID(session)
	r := &registration{m: m, name: keyname.Of(id, "g"), id: id, token: rand.Text()}
	outer, _ := ctx.Value(contextKey{}).(*chain)
	for g := outer; g != nil; g = g.outer {
		if g.r.m != m || g.r.name != r.name {
			continue
		}
		switch failed, ended := g.r.state(); {
		case failed != nil:
			return ctx, nil, failed
		case !ended:
			return ctx, &Guard{r: g.r, inner: true}, nil
		}
	}
	guarded, cancel := context.WithCancelCause(ctx)
	r.cancel = cancel
	if err := m.join(ctx, r); err != nil {
		cancel(nil)
		return ctx, nil, err
	}
	g := &Guard{r: r}
	return context.WithValue(guarded, contextKey{}, &chain{g, outer}), g, nil
}

// join registers r in this process and then in the store: what tells of a newer
// request in between finds it.
func (m *Monitor) join(ctx context.Context, r *registration) error {
	if ctx.Err() != nil { // or it may be watched while it fails
		return r.error("register", gone(ctx))
	}
	floor, err := m.enter(r) //nolint:contextcheck // what watches and renews is not this request's
	if err != nil {
		return err
	}
	epoch, err := ask(ctx, r, "register", func(ctx context.Context) (uint64, error) {
		return m.store.Register(ctx, r.name, r.token, floor, m.ttl)
	})
	m.mu.Lock()
	defer m.unlock(r)
	s := r.session
	s.pending--
	switch {
	case err != nil:
		return err
	case m.closed:
		return r.error("register", ErrClosed)
	}
	r.epoch = epoch
	s.guards[r] = true
	if len(s.guards) == 1 {
		s.due = time.Now().Add(m.ttl / 3)
	}
	m.learn(s, epoch)
	if s.again {
		m.look(r.name, s) //nolint:contextcheck // as above
	}
	return nil
}

// enter makes room for r among what this process guards, and has it watched.
func (m *Monitor) enter(r *registration) (floor uint64, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return 0, r.error("register", ErrClosed)
	}
	s := m.sessions[r.name]
	if s == nil {
		s = &session{guards: map[*registration]bool{}, begun: time.Now()}
		m.sessions[r.name] = s
		m.young = append(m.young, named{r.name, s})
		if len(m.young) == 1 {
			time.AfterFunc(watchAfter, m.watchYoung)
		}
	}
	s.pending++
	r.session = s
	if m.stop == nil {
		ctx, stop := context.WithCancel(context.Background())
		m.stop = stop
		m.running.Go(func() { m.renewals(ctx) })
	}
	return m.floor, nil
}

// unlock ends what has held m.mu on behalf of r, and forgets its session if nobody
// guards that any more.
func (m *Monitor) unlock(r *registration) {
	s := r.session
	var unwatch func()
	if s.pending == 0 && len(s.guards) == 0 && m.sessions[r.name] == s {
		delete(m.sessions, r.name)
		unwatch = s.unwatch
	}
	m.mu.Unlock()
	if unwatch != nil {
		unwatch()
	}
}

// watchAfter is how long a request lives before newer ones are listened for: most
// requests are over by then, and a subscription costs more than their registration.
// What came in between is found by the look that follows a subscription.
const watchAfter = time.Millisecond

// watchYoung has the sessions watched that have been guarded for so long. One timer
// serves all: setting one wakes a thread, which costs as much as the registration.
func (m *Monitor) watchYoung() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for len(m.young) > 0 {
		s := m.young[0]
		if age := time.Since(s.begun); age < watchAfter && !m.closed {
			time.AfterFunc(watchAfter-age, m.watchYoung)
			return
		}
		m.young = m.young[1:]
		m.watch(s)
	}
	m.young = nil
}

// watch has s watched, unless nobody guards it any more. m.mu is held.
func (m *Monitor) watch(s named) {
	w, ok := m.store.(Watcher)
	if !ok || m.closed || m.sessions[s.name] != s.session {
		return
	}
	s.unwatch = w.Watch(s.name, func() { go m.changed(s.name, s.session) })
	s.again = true
	if len(s.guards) > 0 {
		m.look(s.name, s.session)
	}
}

// changed is a wake-up. Requests that are registering have it looked at then.
func (m *Monitor) changed(name string, s *session) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(s.guards) == 0 {
		s.again = true
		return
	}
	m.look(name, s)
}

// look has the registration of s read and judged, beside its caller. m.mu is held.
func (m *Monitor) look(name string, s *session) {
	s.again = s.looking
	if s.looking || m.closed {
		return
	}
	s.looking = true
	m.running.Go(func() {
		for m.lookOnce(name, s) {
		}
	})
}

// lookOnce reports whether there is to be another look at once. What could not be read,
// and what nobody is left to read for, is left to who is registering, and to renewals.
func (m *Monitor) lookOnce(name string, s *session) (more bool) {
	err := m.see(context.Background(), name, s, m.store.Current)
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case err != nil, len(s.guards) == 0:
		s.again = true
	case s.again && !m.closed:
		s.again = false
		return true
	}
	s.looking = false
	return false
}

// see reads the registration of s and judges the guards that were there before. What
// it could not read the next renewal reads.
func (m *Monitor) see(ctx context.Context, name string, s *session, read func(context.Context, string) (Registration, error)) error {
	m.mu.Lock()
	guards := slices.Collect(maps.Keys(s.guards))
	m.mu.Unlock()
	if len(guards) == 0 {
		return nil
	}
	now, err := ask(ctx, guards[0], "read", func(ctx context.Context) (Registration, error) { return read(ctx, name) })
	m.mu.Lock()
	defer m.unlock(guards[0])
	if err != nil {
		s.due = time.Time{}
		return err
	}
	for _, r := range guards {
		_ = m.judge(r, now)
	}
	return nil
}

// judge compares r with what is registered, as read after r had registered, and returns
// why it is not r, if it is not. m.mu is held.
func (m *Monitor) judge(r *registration, now Registration) error {
	m.learn(r.session, now.Epoch)
	switch {
	case now == Registration{r.epoch, r.token}:
		return r.failed
	case now.Epoch > r.epoch:
		return m.fail(r, r.superseded(now.Epoch))
	}
	return m.fail(r, r.error("guard", ErrLost))
}

// maxAhead is how far a store's clock may be ahead of this process's for its epochs to
// be believed of other sessions. Who can write to one registration must not be able to
// use up the numbers of all.
const maxAhead = 24 * time.Hour

// learn notes an epoch of s: what is older is superseded. m.mu is held.
func (m *Monitor) learn(s *session, epoch uint64) {
	s.latest = max(s.latest, epoch)
	if epoch <= uint64(time.Now().Add(maxAhead).UnixMicro()) {
		m.floor = max(m.floor, epoch)
	}
	for r := range s.guards {
		if r.epoch < s.latest {
			_ = m.fail(r, r.superseded(s.latest))
		}
	}
}

// fail ends r for ever, by the first of its reasons, which it returns. A request that is
// over is not ended, but what it still tried is refused. m.mu is held.
func (m *Monitor) fail(r *registration, err error) error {
	switch {
	case r.failed != nil:
		return r.failed
	case r.ended:
		return err
	}
	r.failed = err
	delete(r.session.guards, r)
	r.cancel(err)
	return err
}

// renewers is how many renewals are under way at once, and how many failures in a row
// end a round: the rest would only wait for the same store.
const renewers = 8

// renewals keeps the registrations alive that this process guards, until it guards
// none.
func (m *Monitor) renewals(ctx context.Context) {
	tick := time.NewTicker(m.ttl / 30)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		due, ok := m.due()
		if !ok {
			return
		}
		var round sync.WaitGroup
		var failures atomic.Int64
		for range min(renewers, len(due)) {
			round.Go(func() {
				for s := range due {
					if failures.Load() >= renewers || ctx.Err() != nil {
						continue
					}
					if m.renew(ctx, s) != nil {
						failures.Add(1)
					} else {
						failures.Store(0)
					}
				}
			})
		}
		round.Wait()
	}
}

// renew puts off the next renewal; what fails is due again at once.
func (m *Monitor) renew(ctx context.Context, s named) error {
	m.mu.Lock()
	s.due = time.Now().Add(m.ttl / 3)
	m.mu.Unlock()
	return m.see(ctx, s.name, s.session, func(ctx context.Context, name string) (Registration, error) {
		return m.store.Renew(ctx, name, m.ttl)
	})
}

type named struct {
	name string
	*session
}

// due returns the sessions to renew now; not ok: there are none at all, and the
// renewals have ended.
func (m *Monitor) due() (due chan named, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.sessions) == 0 {
		m.stop()
		m.stop = nil
		return nil, false
	}
	now := time.Now()
	due = make(chan named, len(m.sessions))
	for name, s := range m.sessions {
		if len(s.guards) > 0 && !now.Before(s.due) {
			due <- named{name, s}
		}
	}
	close(due)
	return due, true
}

// Close ends the process's part: nobody is interrupted or renewed any more, Register
// returns [ErrClosed], and what is guarded can still be committed while its
// registration lives. It waits for what is under way until ctx ends, and returns ctx's
// error then. Close may be called more than once and concurrently.
func (m *Monitor) Close(ctx context.Context) error {
	if err := checkContext(ctx); err != nil {
		return err
	}
	m.mu.Lock()
	m.closed = true
	if m.stop != nil {
		m.stop()
	}
	var unwatch []func()
	for _, s := range m.sessions {
		if s.unwatch != nil {
			unwatch = append(unwatch, s.unwatch)
		}
	}
	clear(m.sessions)
	m.mu.Unlock()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for _, f := range unwatch {
			f()
		}
		if rs, ok := m.store.(*redisStore); ok {
			rs.hub.Close()
		}
		m.running.Wait()
	}()
	select {
	case <-ended:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("sessionguard: close: %w", ctx.Err())
	}
}

// Epoch returns the number of the request: greater than that of every request that
// registered for the session before, for ever. It fits a BIGINT. 0 without a guard.
func (g *Guard) Epoch() uint64 {
	if g == nil || g.r == nil {
		return 0
	}
	return g.r.epoch
}

// Key returns the name of a Redis key for data of the session, "" without a guard. All
// keys of a session are in one slot of a Cluster, the guard's, so [Guard.Eval] may use
// them together. Keys of different sessions and namespaces differ, and none contains
// the session's id.
func (g *Guard) Key(name string) string {
	if g == nil || g.r == nil {
		return ""
	}
	return keyname.Of(g.r.id, "d:"+name)
}

// Format writes a fixed word whatever the verb.
func (g *Guard) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "[sessionguard guard]") }

// End says that the request is over. Its context ends, newer requests do not concern it
// any more, and it can commit nothing. End does no I/O: the registration is left to its
// TTL. Ending twice, or a guard of a request that another one ends, does nothing.
func (g *Guard) End() {
	if g == nil || g.r == nil || g.inner {
		return
	}
	r := g.r
	r.m.mu.Lock()
	r.ended = true
	delete(r.session.guards, r)
	r.m.unlock(r)
	r.cancel(nil)
}

// Check asks the store whether the request is still the last one: nil, or
// [ErrSuperseded], [ErrLost], [ErrUnavailable], ctx's error with its cause, which of the
// request's own context may be ErrSuperseded, too; [ErrInvalid] without a guard or after
// its end. It leaves a gap, in which a newer one may register, so it is
// no fence: see [Guard.Commit] and [Guard.Eval].
func (g *Guard) Check(ctx context.Context) error {
	r, err := g.open(ctx)
	if err != nil {
		return err
	}
	now, err := ask(ctx, r, "check", func(ctx context.Context) (Registration, error) { return r.m.store.Current(ctx, r.name) })
	if err != nil {
		return err
	}
	return r.judge(now)
}

// Commit has write store what the request made of the session, if it is still the last
// one: it is checked, and then write must compare the epoch in the very statement that
// writes, for a newer request may have written meanwhile:
//
//	UPDATE cart SET items = $1, epoch = $2 WHERE id = $3 AND epoch <= $2
//
// applied says whether that found the row; when it did not the request is superseded,
// here too. So there must be a row (insert it, or use an upsert), and a database that
// counts changed rows must be told to count found ones (MySQL: clientFoundRows).
//
// A newer request that has registered since the check, and has not yet written, does not
// stop write. What it has read by then it overwrites: where that must not be it claims
// the row before it reads it, by UPDATE cart SET epoch = $1 WHERE id = $2 AND epoch < $1.
//
// Once this process knows that the request is superseded write is not called: the
// comparison is for what comes after the check. Errors: those of [Guard.Check], and then
// write was not called; [ErrSuperseded] when it found no row; write's own, with
// ErrSuperseded as well if the request has been superseded meanwhile: what write has done
// then only write can say.
func (g *Guard) Commit(ctx context.Context, write func(ctx context.Context, epoch uint64) (applied bool, err error)) error {
	if write == nil {
		return fmt.Errorf("%w: func is nil", ErrInvalid)
	}
	if err := g.Check(ctx); err != nil {
		return err
	}
	applied, err := write(ctx, g.r.epoch)
	switch {
	case err == nil && applied:
		g.r.wrote.Store(true)
		return nil
	case err == nil:
		return g.r.overtaken()
	}
	if failed, _ := g.r.state(); failed != nil { // most likely the reason
		return fmt.Errorf("%w: %w", failed, err)
	}
	return err
}

// Script is a Lua script for [Guard.Eval]. It is not go-redis' Script, which does not
// tell its source. Safe for concurrent use.
type Script struct{ guarded *redis.Script }

// NewScript returns the script src. It sees the KEYS and ARGV of Eval's caller. A
// first line that begins with #! is not supported.
func NewScript(src string) *Script { return &Script{lua.Guarded(src)} }

// Eval runs script if the request is still the last one, in one step: no newer request
// can register in between. keys are [Guard.Key]'s, at least on a Cluster. go-redis
// repeats commands whose reply was lost, so the script must bear to be run twice.
// The result is as of go-redis; a nil reply is nil, nil.
//
// Errors: those of [Guard.Check], and then the script did not run, except after
// [ErrUnavailable] and ctx's error, whatever its cause: then it may have, so ask for
// those first. What else the server answers, the script's own errors above all, is
// wrapped as a [redis.Error]: what the script did before it failed is done. [ErrInvalid]
// for a monitor that is not on Redis, and for an argument that go-redis cannot send.
func (g *Guard) Eval(ctx context.Context, script *Script, keys []string, args ...any) (any, error) {
	r, err := g.open(ctx)
	switch {
	case err != nil:
		return nil, err
	case script == nil || script.guarded == nil:
		return nil, fmt.Errorf("%w: script is nil", ErrInvalid)
	case r.m.rdb == nil:
		return nil, fmt.Errorf("%w: the monitor's store runs no scripts", ErrInvalid)
	}
	keys = append([]string{r.name}, keys...)
	if args, err = sendable(Registration{r.epoch, r.token}.String(), args); err != nil {
		return nil, err
	}
	type answer struct {
		v    any
		said error // by a server that works
	}
	a, err := ask(ctx, r, "run a script for", func(ctx context.Context) (answer, error) {
		v, err := script.guarded.Run(ctx, r.m.rdb, keys, args...).Result()
		rediserr.Seen(ctx, r.m.rdb, err)
		switch {
		case errors.Is(err, redis.Nil):
			return answer{}, nil
		case rediserr.Answered(err):
			return answer{said: err}, nil
		}
		return answer{v: v}, err
	})
	if err != nil {
		return nil, err
	}
	if now, ok := refusal(a.said); ok {
		return nil, r.refused(now)
	}
	if a.said != nil {
		return nil, r.error("run a script for", a.said)
	}
	r.wrote.Store(true)
	return a.v, nil
}

// sendable returns first and args as go-redis takes them. It copies and marshals here: a
// call that is left behind reads its arguments later, and a panic of an argument's method
// is its caller's.
func sendable(first string, args []any) ([]any, error) {
	out := append(make([]any, 0, 1+len(args)), first)
	for i, arg := range args {
		switch a := arg.(type) {
		case []byte:
			arg = slices.Clone(a)
		case nil, string, bool, int, int8, int16, int32, int64, uint, uint8, uint16, uint32, uint64, float32, float64,
			*string, *bool, *int, *int8, *int16, *int32, *int64, *uint, *uint8, *uint16, *uint32, *uint64, *float32, *float64,
			time.Time, time.Duration, *time.Time, *time.Duration, net.IP:
		case encoding.BinaryMarshaler:
			b, err := a.MarshalBinary()
			if err != nil {
				return nil, fmt.Errorf("%w: argument %d, a %T: %w", ErrInvalid, i, arg, err)
			}
			arg = b
		default:
			return nil, fmt.Errorf("%w: argument %d is a %T, which go-redis cannot send", ErrInvalid, i, arg)
		}
		out = append(out, arg)
	}
	return out, nil
}

// refusal reads the error of guarded.lua.
func refusal(err error) (now Registration, ok bool) {
	var said redis.Error
	if !errors.As(err, &said) {
		return now, false
	}
	text, ok := strings.CutPrefix(said.Error(), "SESSIONGUARD_SUPERSEDED")
	if !ok {
		return now, false
	}
	text = strings.TrimPrefix(text, " ")
	return parseRegistration(text), true
}

// open returns the registration of a guard that may still commit.
func (g *Guard) open(ctx context.Context) (*registration, error) {
	if err := checkContext(ctx); err != nil {
		return nil, err
	}
	if g == nil || g.r == nil {
		return nil, fmt.Errorf("%w: the request is not guarded", ErrInvalid)
	}
	switch failed, ended := g.r.state(); {
	case failed != nil:
		return nil, failed
	case ended:
		return nil, g.r.over()
	}
	return g.r, nil
}

func (r *registration) over() error {
	return r.error("guard", fmt.Errorf("%w: the guard has ended", ErrInvalid))
}

func (r *registration) state() (failed error, ended bool) { //nolint:revive // it is no error of state
	r.m.mu.Lock()
	defer r.m.mu.Unlock()
	return r.failed, r.ended
}

// judge judges r by what was read just now. It may have ended meanwhile.
func (r *registration) judge(now Registration) error {
	r.m.mu.Lock()
	defer r.m.unlock(r)
	if err := r.m.judge(r, now); err != nil || !r.ended {
		return err
	}
	return r.over()
}

// refused judges r by what a script was refused for, which compares byte by byte.
func (r *registration) refused(now Registration) error {
	if err := r.judge(now); err != nil {
		return err
	}
	r.m.mu.Lock()
	defer r.m.unlock(r)
	return r.m.fail(r, r.error("guard", ErrLost))
}

// overtaken is what a store says by applying nothing.
func (r *registration) overtaken() error {
	r.m.mu.Lock()
	defer r.m.unlock(r)
	return r.m.fail(r, r.superseded(0))
}

func (r *registration) superseded(by uint64) error {
	return &SupersededError{Epoch: r.epoch, By: by, id: r.id}
}

func (r *registration) error(verb string, err error) error {
	return fmt.Errorf("sessionguard: %s session %s: %w", verb, r.id, err)
}

// ask makes one call of the store on behalf of r, bounded by the op timeout.
func ask[T any](ctx context.Context, r *registration, verb string, op func(context.Context) (T, error)) (T, error) {
	if ctx.Err() != nil {
		var zero T
		return zero, r.error(verb, gone(ctx))
	}
	v, err := bound.Call(ctx, r.m.opTimeout, op, nil)
	switch {
	case err == nil:
		return v, nil
	case ctx.Err() != nil:
		return v, r.error(verb, gone(ctx))
	}
	return v, r.error(verb, fmt.Errorf("%w: %w", ErrUnavailable, err))
}

// gone is why ctx has ended: its error, and its cause.
func gone(ctx context.Context) error {
	if cause := context.Cause(ctx); !errors.Is(ctx.Err(), cause) {
		return fmt.Errorf("%w: %w", ctx.Err(), cause)
	}
	return ctx.Err()
}
