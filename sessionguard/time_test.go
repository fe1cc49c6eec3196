package sessionguard_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/sessionguard"
)

// What the passing of time does, on a clock that only tests move. Defaults: a TTL of
// 30 s, so a renewal at every 10 s, tried again every second.

// offsets returns when calls were made, counted from start.
func offsets(calls []call, start time.Time) []time.Duration {
	out := make([]time.Duration, len(calls))
	for i, c := range calls {
		out[i] = c.at.Sub(start)
	}
	return out
}

func TestIdleGuardIsRenewedEveryThirdOfItsTTL(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := new(sessionguard.MemoryStore)
		s := &spy{Store: store}
		start := time.Now()
		ctx, g := register(t, on(t, mute(s)), "s")
		time.Sleep(time.Hour)
		synctest.Wait()
		renewals := s.made("renew")
		require.Len(t, offsets(renewals, start), 360)
		for i, at := range offsets(renewals, start) {
			assert.Equal(t, time.Duration(i+1)*10*time.Second, at)
			assert.Equal(t, 30*time.Second, renewals[i].ttl)
		}
		assert.Zero(t, s.count("current"))
		goesOn(t, ctx, g)
	})
}

func TestGuardsOfOneSessionAreRenewedTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &spy{Store: new(sessionguard.MemoryStore)}
		m := on(t, mute(s), sessionguard.WithTTL(3*time.Second))
		ctx, _ := register(t, m, "s")
		for range 10 {
			_, _, err := m.Register(ctx, "s")
			require.NoError(t, err)
		}
		assert.Equal(t, 1, s.count("register"))
		time.Sleep(time.Minute)
		synctest.Wait()
		assert.Equal(t, 60, s.count("renew"))
	})
}

func TestAfterTheLastEndNothingRuns(t *testing.T) {
	fleets(t, func(t *testing.T, node nodeFunc) {
		m := node()
		for round := range 3 {
			_, g := register(t, m, fmt.Sprint(round))
			_, g2 := register(t, m, "s")
			settle()
			require.NotEmpty(t, busy())
			g.End()
			time.Sleep(time.Minute)
			require.NotEmpty(t, busy(), "one is left")
			g2.End()
			time.Sleep(time.Minute)
			assert.Empty(t, busy())
		}
	})
	synctest.Test(t, func(t *testing.T) {
		s := &spy{Store: new(sessionguard.MemoryStore)}
		_, g := register(t, on(t, s), "s")
		time.Sleep(15 * time.Second)
		g.End()
		before := s.count("")
		time.Sleep(time.Hour)
		assert.Equal(t, before, s.count(""), "no renewal")
	})
}

// Superseded and lost requests are renewed as little as ended ones.
func TestWhoIsNoLongerTheLastIsNotRenewed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := new(sessionguard.MemoryStore)
		s := &spy{Store: store}
		register(t, on(t, s), "s")
		_, g := register(t, on(t, store), "s")
		settle()
		before := s.count("")
		time.Sleep(time.Hour)
		assert.Equal(t, before, s.count(""))
		g.End()
		time.Sleep(time.Minute)
		assert.Empty(t, busy())
	})
}

func TestTenThousandGuards(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 10_000
		s := &spy{Store: new(sessionguard.MemoryStore)}
		m := on(t, s)
		contexts, guards := make([]context.Context, n), make([]*sessionguard.Guard, n)
		for i := range n {
			contexts[i], guards[i] = register(t, m, fmt.Sprint(i))
		}
		time.Sleep(31 * time.Second)
		synctest.Wait()
		perSession := map[string]int{}
		for _, c := range s.made("renew") {
			perSession[c.session]++
		}
		require.Len(t, perSession, n)
		for _, times := range perSession {
			require.Equal(t, 3, times)
		}
		for i, g := range guards {
			require.NoError(t, contexts[i].Err())
			require.NoError(t, g.Check(contexts[i]))
			g.End()
		}
		time.Sleep(2 * time.Second)
		assert.Empty(t, busy())
	})
}

func TestFailedRenewalIsTriedAgainEveryThirtiethOfTheTTL(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &spy{Store: new(sessionguard.MemoryStore)}
		var down atomic.Bool
		s.before = func(_ context.Context, verb string) error {
			if down.Load() && verb == "renew" {
				return errStoreDown
			}
			return nil
		}
		start := time.Now()
		ctx, g := register(t, on(t, mute(s)), "s")
		down.Store(true)
		time.Sleep(14*time.Second + time.Second/2)
		down.Store(false)
		time.Sleep(20 * time.Second)
		synctest.Wait()
		seconds := []int{10, 11, 12, 13, 14, 15, 25}
		want := make([]time.Duration, len(seconds))
		for i, s := range seconds {
			want[i] = time.Duration(s) * time.Second
		}
		assert.Equal(t, want, offsets(s.made("renew"), start))
		goesOn(t, ctx, g)
	})
}

// Where the wake-up came and its look failed, the renewal does not wait for its turn.
func TestLookThatFailedIsMadeUpForByTheNextRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := new(sessionguard.MemoryStore)
		var down atomic.Bool
		s := &spy{Store: store, before: func(_ context.Context, verb string) error {
			if down.Load() {
				return errStoreDown
			}
			return nil
		}}
		ctx, g := register(t, on(t, s), "s")
		time.Sleep(time.Second + time.Second/2)
		down.Store(true)
		_, newer := register(t, on(t, store), "s")
		settle()
		require.NoError(t, ctx.Err())
		down.Store(false)
		time.Sleep(time.Second)
		synctest.Wait()
		supersededBy(t, context.Cause(ctx), g, newer)
	})
}

// However often somebody looks, the registration is also renewed.
func TestWakeUpsDoNotPutOffTheRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var wake func()
		s := &spy{Store: new(sessionguard.MemoryStore)}
		hinted := &hinted{spy: s, watch: func(changed func()) { mu.Lock(); defer mu.Unlock(); wake = changed }}
		ctx, g := register(t, on(t, hinted), "s")
		for range 60 { // as subscriptions that are lost and found, or messages that somebody forges
			time.Sleep(5 * time.Second)
			mu.Lock()
			wake()
			mu.Unlock()
		}
		synctest.Wait()
		require.NoError(t, context.Cause(ctx))
		assert.GreaterOrEqual(t, s.count("renew"), 20)
		goesOn(t, ctx, g)
	})
}

// hinted hands wake-ups to the test.
type hinted struct {
	*spy
	watch func(changed func())
}

func (h *hinted) Watch(_ string, changed func()) (stop func()) {
	h.watch(changed)
	return func() {}
}

func TestWakeUpsThatComeTogetherCostFewLooks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var wake func()
		s := &spy{Store: new(sessionguard.MemoryStore), before: func(_ context.Context, verb string) error {
			if verb == "current" {
				time.Sleep(100 * time.Millisecond)
			}
			return nil
		}}
		ctx, g := register(t, on(t, &hinted{spy: s, watch: func(changed func()) { wake = changed }}), "s")
		time.Sleep(time.Second)
		before := s.count("current")
		for range 10_000 {
			wake()
		}
		time.Sleep(time.Second)
		assert.Equal(t, 2, s.count("current")-before, "one, and one more for what came meanwhile")
		goesOn(t, ctx, g)
	})
}

// A dead store that answers nobody has at most as many renewals waiting for it as are
// made at once, however many sessions there are.
func TestRenewalsOfADeadStoreDoNotPileUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var dead atomic.Bool
		s := &spy{Store: new(sessionguard.MemoryStore), before: func(ctx context.Context, _ string) error {
			if !dead.Load() {
				return nil
			}
			<-ctx.Done()
			return ctx.Err()
		}}
		m := on(t, mute(s), sessionguard.WithTTL(time.Hour))
		const n = 1000
		contexts := make([]context.Context, n)
		for i := range n {
			contexts[i], _ = register(t, m, fmt.Sprint(i))
		}
		dead.Store(true)
		time.Sleep(30 * time.Minute)
		s.mu.Lock()
		assert.LessOrEqual(t, s.most, 16, "a round's, and those of the one before that are just ending")
		s.mu.Unlock()
		tried := s.count("renew")
		assert.Positive(t, tried)
		assert.LessOrEqual(t, tried, 20*16, "a round ends when nothing answers")
		dead.Store(false)
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		assert.GreaterOrEqual(t, s.count("renew")-tried, n)
		for _, ctx := range contexts {
			require.NoError(t, context.Cause(ctx))
		}
	})
}

// Nor where a call may take longer than the pause between two rounds.
func TestRoundsOfRenewalsDoNotOverlap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var dead atomic.Bool
		s := &spy{Store: new(sessionguard.MemoryStore), before: func(ctx context.Context, _ string) error {
			if !dead.Load() {
				return nil
			}
			<-ctx.Done()
			return ctx.Err()
		}}
		m := on(t, mute(s), sessionguard.WithOpTimeout(10*time.Second))
		for i := range 1000 {
			register(t, m, fmt.Sprint(i))
		}
		dead.Store(true)
		time.Sleep(time.Minute)
		s.mu.Lock()
		defer s.mu.Unlock()
		assert.LessOrEqual(t, s.most, 16)
	})
}

// One session's trouble is not the others'.
func TestRenewalThatFailsForSomeSessionsHindersNoOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &spy{Store: new(sessionguard.MemoryStore)}
		b := &brokenFor{Store: s}
		m := on(t, b)
		const good = 400 // of so many, no eight bad ones in a row are tried
		contexts := make([]context.Context, good)
		for i := range good {
			contexts[i], _ = register(t, m, fmt.Sprint(i))
			if i%20 == 0 {
				bad := fmt.Sprint("bad", i)
				b.bad.Store(nameOf(m, bad), true)
				register(t, m, bad)
			}
		}
		time.Sleep(10*time.Second + time.Millisecond)
		synctest.Wait()
		assert.Equal(t, good, s.count("renew"), "all in the first round")
		time.Sleep(5 * time.Minute)
		for _, ctx := range contexts {
			require.NoError(t, context.Cause(ctx))
		}
	})
}

type brokenFor struct {
	sessionguard.Store
	bad sync.Map
}

func (b *brokenFor) Renew(ctx context.Context, session string, ttl time.Duration) (sessionguard.Registration, error) {
	if _, bad := b.bad.Load(session); bad {
		return sessionguard.Registration{}, errStoreDown
	}
	return b.Store.Renew(ctx, session, ttl)
}

func TestProcessThatStoodStillHasLostItsGuards(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := new(sessionguard.MemoryStore)
		var cut atomic.Bool
		s := &spy{Store: store, before: func(context.Context, string) error {
			if cut.Load() {
				return errStoreDown
			}
			return nil
		}}
		m := on(t, s)
		ctx, g := register(t, m, "s")
		cut.Store(true)
		time.Sleep(time.Minute)
		require.NoError(t, ctx.Err())
		cut.Store(false)
		time.Sleep(time.Second)
		synctest.Wait()
		require.ErrorIs(t, context.Cause(ctx), sessionguard.ErrLost)
		require.ErrorIs(t, g.Commit(t.Context(), never(t)), sessionguard.ErrLost)
		_, _, err := m.Register(ctx, "s")
		require.ErrorIs(t, err, sessionguard.ErrLost, "under its own context it stays what it is")

		ctx2, g2 := register(t, m, "s")
		assert.Greater(t, g2.Epoch(), g.Epoch())
		goesOn(t, ctx2, g2)
		assert.ErrorIs(t, g.Check(t.Context()), sessionguard.ErrLost, "for ever")
	})
}

// What was lost before a newer request came and went is lost: nobody can say any more.
func TestExpiredRegistrationIsNotTakenForTheLast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := new(sessionguard.MemoryStore)
		var cut atomic.Bool
		s := &spy{Store: store, hint: func(func()) {}, before: func(context.Context, string) error {
			if cut.Load() {
				return errStoreDown
			}
			return nil
		}}
		ctx, g := register(t, on(t, s), "s")
		cut.Store(true)
		_, newer := register(t, on(t, store), "s")
		newer.End()
		time.Sleep(time.Minute)
		cut.Store(false)
		require.ErrorIs(t, g.Commit(t.Context(), never(t)), sessionguard.ErrLost)
		require.ErrorIs(t, context.Cause(ctx), sessionguard.ErrLost)
	})
}

func TestCloseEndsRenewalsAndWatches(t *testing.T) {
	fleets(t, func(t *testing.T, node nodeFunc) {
		m := node()
		ctx, g := register(t, m, "s")
		settle()
		require.NoError(t, m.Close(t.Context()))
		synctest.Wait()
		assert.Empty(t, busy())
		require.NoError(t, ctx.Err(), "it interrupts nobody")
		goesOn(t, ctx, g)
		time.Sleep(29 * time.Second)
		goesOn(t, ctx, g) // while its registration lives
		time.Sleep(2 * time.Second)
		require.ErrorIs(t, g.Commit(t.Context(), never(t)), sessionguard.ErrLost)
		require.ErrorIs(t, context.Cause(ctx), sessionguard.ErrLost)
		g.End()
	})
}

// Most requests are over before anybody could have told them of a newer one.
func TestShortRequestsAreNotWatched(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var watched, stopped atomic.Int64
		m := on(t, &watching{spy: spy{Store: new(sessionguard.MemoryStore)}, watched: &watched, stopped: &stopped})
		_, long := register(t, m, "long")
		for i := range 100 {
			_, g := register(t, m, fmt.Sprint(i%3))
			g.End()
		}
		settle()
		assert.EqualValues(t, 1, watched.Load())
		long.End()
		assert.EqualValues(t, 1, stopped.Load())

		// Nor is one that began just before another had been there for long enough.
		register(t, m, "before")
		time.Sleep(900 * time.Microsecond)
		_, g := register(t, m, "just before")
		time.Sleep(500 * time.Microsecond)
		g.End()
		settle()
		assert.EqualValues(t, 2, watched.Load())

		// Each is watched in its turn, whatever came shortly before it.
		for i := range 20 {
			register(t, m, fmt.Sprint("another ", i))
			time.Sleep(100 * time.Microsecond)
		}
		time.Sleep(2 * time.Millisecond)
		synctest.Wait()
		assert.EqualValues(t, 22, watched.Load())
	})
}

func TestEveryWatchIsStoppedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var watched, stopped atomic.Int64
		m := on(t, &watching{spy: spy{Store: new(sessionguard.MemoryStore)}, watched: &watched, stopped: &stopped})
		guards := make([]*sessionguard.Guard, 10)
		for i := range guards {
			_, guards[i] = register(t, m, fmt.Sprint(i%9)) // the last one supersedes the first
		}
		settle()
		assert.EqualValues(t, 9, watched.Load())
		assert.Zero(t, stopped.Load())
		for _, g := range guards[1:5] {
			g.End()
			g.End()
		}
		assert.EqualValues(t, 4, stopped.Load())
		require.NoError(t, m.Close(t.Context()))
		for _, g := range guards {
			g.End()
		}
		require.NoError(t, m.Close(t.Context()))
		assert.EqualValues(t, 9, stopped.Load())
	})
}

func TestCloseBetweenARegistrationAndItsWatch(t *testing.T) {
	fleets(t, func(t *testing.T, node nodeFunc) {
		m := node()
		_, g := register(t, m, "s")
		require.NoError(t, m.Close(t.Context()))
		settle()
		assert.Empty(t, busy())
		g.End()
	})
}

func TestCloseWaitsForWhatIsUnderWayUntilItsContextEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // a renewal is given up, a look is waited for
		store := new(sessionguard.MemoryStore)
		const takes = 800 * time.Millisecond
		var slow atomic.Bool
		s := &spy{Store: store, before: func(context.Context, string) error {
			if slow.Load() {
				time.Sleep(takes) // whatever its context says
			}
			return nil
		}}
		m := on(t, s)
		register(t, m, "s")
		settle()
		slow.Store(true)
		register(t, on(t, store), "s")
		synctest.Wait()
		start := time.Now()
		short, cancel := context.WithTimeout(t.Context(), takes/2)
		defer cancel()
		var closing sync.WaitGroup
		for range 5 {
			closing.Go(func() { assert.ErrorIs(t, m.Close(short), context.DeadlineExceeded) })
			closing.Go(func() { assert.NoError(t, m.Close(t.Context())) })
		}
		closing.Wait()
		assert.Equal(t, takes, time.Since(start))
		require.NoError(t, m.Close(t.Context()))
		assert.Equal(t, takes, time.Since(start))
	})
	synctest.Test(t, func(t *testing.T) {
		over := make(chan struct{})
		var slow atomic.Bool
		m := on(t, mute(&spy{Store: new(sessionguard.MemoryStore), before: func(context.Context, string) error {
			if slow.Load() {
				<-over
			}
			return nil
		}}))
		register(t, m, "s")
		slow.Store(true)
		time.Sleep(10*time.Second + time.Millisecond)
		start := time.Now()
		require.NoError(t, m.Close(t.Context()))
		assert.Zero(t, time.Since(start))
		close(over)
	})
	synctest.Test(t, func(t *testing.T) {
		stuck := make(chan struct{})
		m := on(t, &stuckWatch{MemoryStore: new(sessionguard.MemoryStore), stuck: stuck})
		register(t, m, "s")
		settle()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		start := time.Now()
		err := m.Close(ctx)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		assert.ErrorContains(t, err, "sessionguard: close: ")
		assert.Equal(t, time.Minute, time.Since(start))
		close(stuck)
		require.NoError(t, m.Close(t.Context()))
	})
}

// stuckWatch is a store whose watches do not stop at once.
type stuckWatch struct {
	*sessionguard.MemoryStore
	stuck chan struct{}
}

func (s *stuckWatch) Watch(session string, changed func()) (stop func()) {
	inner := s.MemoryStore.Watch(session, changed)
	return func() { <-s.stuck; inner() }
}

// Whoever is registering when the monitor is closed is refused, and leaves nothing.
func TestCloseDuringARegistration(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &spy{Store: new(sessionguard.MemoryStore), before: func(_ context.Context, verb string) error {
			time.Sleep(500 * time.Millisecond)
			return nil
		}}
		m := on(t, s)
		done := make(chan error, 1)
		go func() {
			_, _, err := m.Register(t.Context(), "s")
			done <- err
		}()
		time.Sleep(100 * time.Millisecond)
		require.NoError(t, m.Close(t.Context()))
		require.ErrorIs(t, <-done, sessionguard.ErrClosed)
		time.Sleep(time.Minute)
		assert.Empty(t, busy())
		assert.Equal(t, 1, s.count(""))
	})
}

// A wake-up that comes while a request is still registering is not forgotten.
func TestWakeUpDuringARegistrationIsLookedAtAfterwards(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := new(sessionguard.MemoryStore)
		slow := &spy{Store: store}
		slow.after = func(verb string) error { // the reply is late
			if verb == "register" {
				time.Sleep(500 * time.Millisecond)
			}
			return nil
		}
		type result struct {
			ctx context.Context //nolint:containedctx // handed over
			g   *sessionguard.Guard
		}
		done := make(chan result, 1)
		a := on(t, slow)
		go func() {
			ctx, g, err := a.Register(t.Context(), "s")
			assert.NoError(t, err)
			done <- result{ctx, g}
		}()
		time.Sleep(100 * time.Millisecond)
		_, newer := register(t, on(t, store), "s")
		r := <-done
		defer r.g.End()
		settle()
		supersededBy(t, context.Cause(r.ctx), r.g, newer)
	})
}

// Nor one that comes when the only request that guarded the session has just ended.
func TestWakeUpWhileOneEndsAndAnotherRegisters(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := new(sessionguard.MemoryStore)
		var late atomic.Bool
		slow := &spy{Store: store, after: func(verb string) error {
			if late.Load() && verb == "register" {
				time.Sleep(500 * time.Millisecond)
			}
			return nil
		}}
		a := on(t, slow)
		_, first := register(t, a, "s")
		settle()
		late.Store(true)
		done := make(chan error, 1)
		go func() {
			ctx, g, err := a.Register(t.Context(), "s")
			if assert.NoError(t, err) {
				defer g.End()
				settle()
				err = context.Cause(ctx)
			}
			done <- err
		}()
		settle()
		first.End()
		_, newer := register(t, on(t, store), "s")
		var by *sessionguard.SupersededError
		require.ErrorAs(t, <-done, &by)
		assert.Equal(t, newer.Epoch(), by.By)
	})
}

// The same where another request of that process guards the session already, and has
// looked before the reply came.
func TestLateReplyIsJudgedByWhatIsKnown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := new(sessionguard.MemoryStore)
		var late atomic.Bool
		var wake func()
		slow := &spy{Store: store, after: func(verb string) error {
			if late.Load() && verb == "register" {
				time.Sleep(500 * time.Millisecond)
			}
			return nil
		}}
		a := on(t, &hinted{spy: slow, watch: func(changed func()) { wake = changed }})
		ctx1, g1 := register(t, a, "s")
		settle()
		late.Store(true)
		done := make(chan error, 1)
		go func() {
			ctx, g, err := a.Register(t.Context(), "s")
			if err == nil {
				defer g.End()
				err = context.Cause(ctx) // at once: nobody has to look again
			}
			done <- err
		}()
		time.Sleep(100 * time.Millisecond)
		_, newer := register(t, on(t, store), "s")
		wake()
		settle()
		supersededBy(t, context.Cause(ctx1), g1, newer)
		var by *sessionguard.SupersededError
		require.ErrorAs(t, <-done, &by)
		assert.Equal(t, newer.Epoch(), by.By)
	})
}

// A fresh process gives out greater epochs than the one before, and a process never
// less than it has seen anywhere.
func TestStoreIsToldTheHighestEpochSeen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &spy{Store: new(sessionguard.MemoryStore)}
		m := on(t, s)
		var last uint64
		for i := range 5 {
			_, g := register(t, m, fmt.Sprint(i))
			last = g.Epoch()
			assert.Less(t, s.made("register")[i].floor, last)
		}
		register(t, m, "again")
		assert.Equal(t, last, s.made("register")[5].floor)
		assert.Zero(t, s.made("register")[0].floor)
	})
}

// A store that forgets everything, and whose clock was put back, is held to epochs that
// nobody has seen.
func TestEpochsGrowWhateverTheStoreForgets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &forgetful{}
		m := on(t, f)
		var last uint64
		for range 10 {
			ctx, g := register(t, m, "s")
			require.Greater(t, g.Epoch(), last)
			last = g.Epoch()
			require.NoError(t, ctx.Err())
			g.End()
			f.forget()
		}
	})
}

// forgetful numbers from its floor alone.
type forgetful struct {
	mu   sync.Mutex
	last map[string]sessionguard.Registration
}

func (f *forgetful) forget() {
	f.mu.Lock()
	defer f.mu.Unlock()
	clear(f.last)
}

func (f *forgetful) Register(_ context.Context, session, token string, floor uint64, _ time.Duration) (uint64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.last == nil {
		f.last = map[string]sessionguard.Registration{}
	}
	f.last[session] = sessionguard.Registration{Epoch: floor + 1, Token: token}
	return floor + 1, nil
}

func (f *forgetful) Current(_ context.Context, session string) (sessionguard.Registration, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.last[session], nil
}

func (f *forgetful) Renew(ctx context.Context, session string, _ time.Duration) (sessionguard.Registration, error) {
	return f.Current(ctx, session)
}

func TestRegistrationIsComparedAsAWhole(t *testing.T) {
	for name, c := range map[string]struct {
		change func(r sessionguard.Registration) sessionguard.Registration
		want   error
	}{
		"another token": {func(r sessionguard.Registration) sessionguard.Registration {
			return sessionguard.Registration{Epoch: r.Epoch, Token: "another"}
		}, sessionguard.ErrLost},
		"an older epoch": {func(r sessionguard.Registration) sessionguard.Registration {
			return sessionguard.Registration{Epoch: r.Epoch - 1, Token: r.Token}
		}, sessionguard.ErrLost},
		"a newer epoch": {func(r sessionguard.Registration) sessionguard.Registration {
			return sessionguard.Registration{Epoch: r.Epoch + 1, Token: r.Token}
		}, sessionguard.ErrSuperseded},
		"nobody": {func(sessionguard.Registration) sessionguard.Registration { return sessionguard.Registration{} }, sessionguard.ErrLost},
	} {
		t.Run(name, func(t *testing.T) {
			f := &forgetful{}
			m := on(t, f)
			_, other := register(t, m, "other")
			other.End()
			ctx, g := register(t, m, "s")
			f.mu.Lock()
			f.last[nameOf(m, "s")] = c.change(f.last[nameOf(m, "s")])
			f.mu.Unlock()
			require.ErrorIs(t, g.Check(t.Context()), c.want)
			require.ErrorIs(t, cause(t, ctx), c.want)
		})
	}
}

// Whatever the store says later: the first reason is the reason.
func TestFirstReasonIsKept(t *testing.T) {
	f := &forgetful{}
	s := &spy{Store: f}
	m := on(t, mute(s))
	ctx, g := register(t, m, "s")
	var newer *sessionguard.Guard
	s.before = func(_ context.Context, verb string) error {
		if verb == "current" && newer == nil {
			_, newer = register(t, m, "s")
			f.forget()
		}
		return nil
	}
	supersededBy(t, g.Check(t.Context()), g, newer)
	supersededBy(t, g.Check(t.Context()), g, newer)
	supersededBy(t, context.Cause(ctx), g, newer)
}

// After a failover that lost the newer one's registration the older goes on, unless it
// has learnt of it.
func TestFailoverThatLosesTheNewerRegistration(t *testing.T) {
	for name, told := range map[string]bool{"the older was told": true, "it was not": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := &forgetful{}
				a, b := on(t, f), on(t, f)
				ctxA, ga := register(t, a, "s")
				f.mu.Lock()
				before := f.last[nameOf(a, "s")]
				f.mu.Unlock()
				_, other := register(t, b, "another") // so that b's epochs are greater
				_, gb := register(t, b, "s")
				require.Greater(t, gb.Epoch(), ga.Epoch())
				require.Equal(t, ga.Epoch(), other.Epoch())
				if told {
					require.ErrorIs(t, ga.Check(t.Context()), sessionguard.ErrSuperseded)
				}
				f.mu.Lock()
				f.last[nameOf(a, "s")] = before
				f.mu.Unlock()
				require.ErrorIs(t, gb.Commit(t.Context(), never(t)), sessionguard.ErrLost)
				if told {
					require.ErrorIs(t, ga.Commit(t.Context(), never(t)), sessionguard.ErrSuperseded)
					return
				}
				goesOn(t, ctxA, ga)
			})
		})
	}
}

// A store that hangs whatever its context says holds nobody.
func TestStoreThatNeverReturnsHoldsNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		over := make(chan struct{})
		var hangs atomic.Bool
		s := &spy{Store: new(sessionguard.MemoryStore), before: func(context.Context, string) error {
			if hangs.Load() {
				<-over
				return errors.New("too late")
			}
			return nil
		}}
		m := on(t, s, sessionguard.WithOpTimeout(2*time.Second))
		ctx, g := register(t, m, "s")
		hangs.Store(true)
		for _, op := range []func(context.Context) error{
			func(ctx context.Context) error { _, _, err := m.Register(ctx, "t"); return err },
			g.Check,
			func(ctx context.Context) error { return g.Commit(ctx, never(t)) },
		} {
			start := time.Now()
			require.ErrorIs(t, op(ctx), sessionguard.ErrUnavailable)
			assert.Equal(t, 2*time.Second, time.Since(start))
			short, cancel := context.WithTimeout(ctx, time.Second)
			start = time.Now()
			err := op(short)
			cancel()
			require.ErrorIs(t, err, context.DeadlineExceeded)
			require.NotErrorIs(t, err, sessionguard.ErrUnavailable)
			assert.Equal(t, time.Second, time.Since(start))
		}
		require.NoError(t, m.Close(t.Context()))
		close(over)
	})
}
