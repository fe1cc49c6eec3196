package sessionmanager_test

// Random histories: whatever workers, callers and the store do, slots, gauge and
// workers add up after every step.

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sessionlock/sessionlock/sessionmanager"
)

// trouble is what a callback does. What lasts is drawn when the history is, so that
// a seed says it all.
type trouble struct {
	kind int
	d    time.Duration
}

const (
	fine = iota
	fails
	panics
	exits
	waits     // until its context ends, then fails
	late      // is fine after d, or fails when its context ends before
	ignores   // its context, and is fine after d
	failsLate // ignores its context, and fails after d
	kinds
)

// happen does it.
func (x trouble) happen(ctx context.Context) error {
	switch x.kind {
	case fails:
		return errFn
	case panics:
		panic("as drawn")
	case exits:
		runtime.Goexit()
	case waits:
		return untilDone(ctx)
	case late:
		select {
		case <-time.After(x.d):
		case <-ctx.Done():
			return ctx.Err()
		}
	case ignores:
		time.Sleep(x.d)
	case failsLate:
		time.Sleep(x.d)
		return errFn
	}
	return nil
}

// history is one run: a manager, and a world around it that keeps books of its own.
type history struct {
	t    *testing.T
	seed uint64
	rnd  *rand.Rand
	m    *sessionmanager.Manager[*actor]
	max  int
	step int

	creating bool // sessions wait for their slot

	mu       sync.Mutex
	actors   []*actor
	alive    int
	gauge    int
	open     map[string]bool
	sessions []*sessionmanager.Session[*actor]
	detaches []func()
	wrong    string
}

// actor is a worker whose troubles are drawn before it begins.
type actor struct {
	h                 *history
	down, kill        trouble
	broken            error
	shutdowns, kills  int
	dead, panicsOnErr bool
}

func (a *actor) dies() {
	if !a.dead {
		a.dead = true
		a.h.alive--
	}
}

func (a *actor) Shutdown(ctx context.Context) error {
	a.h.mu.Lock()
	a.shutdowns++
	a.h.mu.Unlock()
	err := a.down.happen(ctx)
	if err == nil {
		a.h.mu.Lock()
		a.dies()
		a.h.mu.Unlock()
	}
	return err
}

func (a *actor) Kill(reason string) error {
	a.h.mu.Lock()
	if a.kills++; reason == "" {
		a.h.wrong = "killed without a reason"
	}
	a.dies()
	a.h.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
	defer cancel()
	return a.kill.happen(ctx)
}

func (a *actor) Err() error {
	a.h.mu.Lock()
	defer a.h.mu.Unlock()
	if a.panicsOnErr {
		panic("as drawn")
	}
	return a.broken
}

// Observe fails the history as soon as a gauge is impossible, and now and then panics.
func (h *history) Observe(_ context.Context, e sessionmanager.Event) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch e.Kind {
	case sessionmanager.EventOpened:
		h.gauge++
		if h.open[e.Session] {
			h.wrong = "opened twice: " + e.Session
		}
		h.open[e.Session] = true
	case sessionmanager.EventClosed:
		h.gauge--
		if !h.open[e.Session] || e.Reason == "" {
			h.wrong = "closed twice, before it was opened, or without a reason: " + e.Session
		}
		delete(h.open, e.Session)
	}
	if h.gauge < 0 || e.Open < 0 || h.gauge > h.max || e.Open > h.max {
		h.wrong = fmt.Sprintf("gauge %d, event says %d", h.gauge, e.Open)
	}
	if len(e.Session)%16 == 3 { // any will do
		panic("as drawn")
	}
}

func (h *history) fatalf(format string, args ...any) {
	h.t.Helper()
	h.t.Fatalf("seed %d, step %d: "+format, append([]any{h.seed, h.step}, args...)...)
}

// draw is fine in one of two cases.
func (h *history) draw() trouble {
	if h.rnd.IntN(2) == 0 {
		return trouble{}
	}
	return trouble{kind: h.rnd.IntN(kinds), d: h.some()}
}

// some is a time that is short, about as long as a timeout, or much longer.
func (h *history) some() time.Duration {
	switch h.rnd.IntN(8) {
	case 0:
		return 3 * time.Minute
	case 1, 2:
		return time.Duration(h.rnd.IntN(60)) * time.Second
	}
	return time.Duration(h.rnd.IntN(2000)) * time.Millisecond
}

// ctx is a context that may end, now or later.
func (h *history) ctx() (context.Context, context.CancelFunc) {
	ctx := context.Background()
	switch h.rnd.IntN(8) {
	case 0:
		ctx, cancel := context.WithCancel(ctx)
		cancel()
		return ctx, cancel
	case 1, 2:
		return context.WithTimeout(ctx, h.some())
	}
	return ctx, func() {}
}

// one is a session, mostly one that is not gone.
func (h *history) one() *sessionmanager.Session[*actor] {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.sessions) == 0 {
		return nil
	}
	return h.sessions[h.rnd.IntN(len(h.sessions))]
}

func (h *history) doOpen() {
	ctx, cancel := h.ctx()
	spec := sessionmanager.Spec{Timeout: h.some()}
	if h.rnd.IntN(4) == 0 {
		spec.ID = strconv.Itoa(h.rnd.IntN(4))
	}
	start, a := h.draw(), &actor{h: h, down: h.draw(), kill: h.draw()}
	none, both := h.rnd.IntN(20) == 0, h.rnd.IntN(3) == 0
	full := h.m.Stats().Sessions == h.max
	go func() {
		defer cancel()
		s, err := h.m.Open(ctx, spec, func(ctx context.Context, id string) (*actor, error) {
			if s, err := h.m.Get(id, ""); err == nil {
				h.mu.Lock()
				h.met(s)
				h.mu.Unlock()
			}
			err := start.happen(ctx)
			if none || (err != nil && !both) {
				return nil, err
			}
			h.mu.Lock()
			defer h.mu.Unlock()
			h.actors = append(h.actors, a)
			if h.alive++; h.alive > h.max {
				h.wrong = fmt.Sprintf("%d workers", h.alive)
			}
			return a, err
		})
		h.mu.Lock()
		defer h.mu.Unlock()
		limited := errors.Is(err, sessionmanager.ErrLimit)
		switch {
		case (s == nil) != (err != nil):
			h.wrong = fmt.Sprintf("Open returned %v and %v", s, err)
		case limited && !full && !h.creating, !limited && full && ctx.Err() == nil && err == nil:
			h.wrong = fmt.Sprintf("full: %v, and Open returned %v", full, err)
		}
	}()
}

func (h *history) doCall() {
	s := h.one()
	if s == nil {
		return
	}
	ctx, cancel := h.ctx()
	x, inside := h.draw(), h.rnd.IntN(12)
	go func() {
		defer cancel()
		_ = s.Do(ctx, func(ctx context.Context, a *actor) error {
			switch inside {
			case 0:
				_ = s.Close(ctx)
			case 1:
				_ = s.Kill(ctx, "inside")
			case 2:
				h.mu.Lock()
				a.broken = errBroken
				h.mu.Unlock()
			case 3:
				h.mu.Lock()
				a.panicsOnErr = true
				h.mu.Unlock()
			}
			return x.happen(ctx)
		})
	}()
}

func (h *history) doEnd() {
	s := h.one()
	if s == nil {
		return
	}
	ctx, cancel := h.ctx()
	kill := h.rnd.IntN(3) == 0
	go func() {
		defer cancel()
		if kill {
			_ = s.Kill(ctx, "drawn")
		} else {
			_ = s.Close(ctx)
		}
	}()
}

func (h *history) doListen() {
	if n := len(h.detaches); n > 0 && h.rnd.IntN(2) == 0 {
		i := h.rnd.IntN(n)
		h.detaches[i]()
		h.detaches[i] = h.detaches[n-1]
		h.detaches = h.detaches[:n-1]
		return
	}
	if s := h.one(); s != nil {
		if _, detach, err := s.Attach(); err == nil {
			h.detaches = append(h.detaches, detach)
		}
	}
}

func (h *history) doSweep() {
	ctx, cancel := h.ctx()
	now := time.Now().Add(time.Duration(h.rnd.IntN(3)-1) * h.some())
	go func() {
		defer cancel()
		_, _ = h.m.Sweep(ctx, now)
	}()
}

// next draws one step, and lets it come to where it waits for the clock.
func (h *history) next() {
	h.step++
	switch n := h.rnd.IntN(100); {
	case n < 25:
		h.doOpen()
	case n < 55:
		h.doCall()
	case n < 68:
		h.doEnd()
	case n < 78:
		h.doListen()
	case n < 83:
		h.doSweep()
	default:
		time.Sleep(h.some())
	}
	synctest.Wait()
	h.check()
}

// met notes a session. h.mu is held.
func (h *history) met(s *sessionmanager.Session[*actor]) {
	if !slices.Contains(h.sessions, s) {
		h.sessions = append(h.sessions, s)
	}
}

// check compares the manager's books with those of the world.
func (h *history) check() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.creating { // which is seen here only
		for s := range h.m.All() {
			h.met(s)
		}
	}
	live := h.sessions[:0]
	for _, s := range h.sessions {
		select {
		case <-s.Done():
		default:
			live = append(live, s)
		}
	}
	clear(h.sessions[len(live):])
	h.sessions = live
	st := h.m.Stats()
	switch {
	case h.wrong != "":
		h.fatalf("%s", h.wrong)
	case st.Sessions != len(live):
		h.fatalf("%d slots, %d sessions", st.Sessions, len(live))
	case st.Sessions > h.max, st.Open > st.Sessions, st.Open < 0:
		h.fatalf("%+v", st)
	case st.Open != h.gauge, int(st.Opened-st.Closed) != h.gauge, len(h.open) != h.gauge:
		h.fatalf("%+v, and the gauge is %d", st, h.gauge)
	case h.alive > st.Sessions:
		h.fatalf("%d workers of %d sessions", h.alive, st.Sessions)
	}
}

// end shuts the manager down, and every worker must have been ended once.
func (h *history) end() {
	ctx, cancel := h.ctx()
	defer cancel()
	begun := time.Now()
	_ = h.m.Shutdown(ctx)
	over, ok := ctx.Deadline()
	if !ok || over.Before(begun) || ctx.Err() == nil {
		over = begun
	}
	if took := time.Since(over); ctx.Err() != nil && took > 5*time.Second+1100*time.Millisecond {
		h.fatalf("shutdown took %v too long", took)
	}
	synctest.Wait()
	h.check()
	time.Sleep(time.Hour) // starts that were left behind come back
	synctest.Wait()
	h.check()
	if st := h.m.Stats(); st.Sessions != 0 || h.gauge != 0 || h.alive != 0 {
		h.fatalf("left: %+v, gauge %d, %d workers", st, h.gauge, h.alive)
	}
	for i, a := range h.actors {
		if !a.dead || a.shutdowns > 1 || a.kills > 1 {
			h.fatalf("worker %d of %d: %d shutdowns, %d kills, dead: %v", i, len(h.actors), a.shutdowns, a.kills, a.dead)
		}
	}
}

// lives runs a history of so many steps, with sessions that wait for their slot or
// without.
func lives(t *testing.T, seed uint64, steps int, creating bool, opts ...sessionmanager.Option) *history {
	t.Helper()
	h := &history{t: t, seed: seed, rnd: rand.New(rand.NewPCG(seed, 0)), open: map[string]bool{}}
	h.max = 1 + h.rnd.IntN(12)
	opts = append([]sessionmanager.Option{
		sessionmanager.WithMax(h.max), sessionmanager.WithObserver(h),
		sessionmanager.WithLease(time.Minute), sessionmanager.WithGrace(time.Duration(h.rnd.IntN(3)) * 10 * time.Second),
		sessionmanager.WithPending(5), sessionmanager.WithListeners(2), sessionmanager.WithParallel(1 + h.rnd.IntN(4)),
	}, opts...)
	var err error
	if h.m, err = sessionmanager.New[*actor](opts...); err != nil {
		t.Fatal(err)
	}
	for h.creating = creating; h.step < steps; {
		h.next()
	}
	h.end()
	return h
}

// seeds returns n seeds, or the one of SESSIONLOCK_SEED.
func seeds(t *testing.T, n int) []uint64 {
	t.Helper()
	if s := os.Getenv("SESSIONLOCK_SEED"); s != "" {
		seed, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return []uint64{seed}
	}
	out := make([]uint64, n)
	for i := range out {
		out[i] = rand.Uint64()
	}
	return out
}

func TestBooksBalanceAfterEveryStepOfRandomHistories(t *testing.T) {
	const runs, steps = 100, 10_000
	for i, seed := range seeds(t, runs) {
		t.Run(strconv.Itoa(i), func(t *testing.T) {
			t.Parallel()
			bubble(t, func(t *testing.T) {
				h := lives(t, seed, steps, false)
				if testing.Verbose() && i == 0 {
					t.Logf("seed %d: %+v, %d workers", seed, h.m.Stats(), len(h.actors))
				}
			})
		})
	}
}
