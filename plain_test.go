package sessionlock_test

// What PlainCache makes of a store that can only read and write: that it is a
// Cache to calls that follow one another; every order in which the steps of an
// invalidation and of something else can come; and clients on top of it.

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock"
	"github.com/sessionlock/sessionlock/internal/entry"
	"github.com/sessionlock/sessionlock/sessionlocktest"
)

// shelf is a plain store in memory.
type shelf struct {
	// slow makes each Set take a millisecond more for every Set under way, so that
	// calls at once have all read before the first one writes.
	slow bool

	mu     sync.Mutex
	values map[string]shelved
	under  int
}

type shelved struct {
	value   []byte
	expires time.Time
}

func (s *shelf) Get(_ context.Context, key string) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := s.values[key]
	if !time.Now().Before(v.expires) {
		return nil, nil
	}
	return bytes.Clone(v.value), nil
}

func (s *shelf) Set(_ context.Context, key string, value []byte, ttl time.Duration) error {
	s.mu.Lock()
	s.under++
	pause := time.Duration(s.under) * time.Millisecond
	s.mu.Unlock()
	if s.slow {
		time.Sleep(pause)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.under--
	if s.values == nil {
		s.values = map[string]shelved{}
	}
	s.values[key] = shelved{bytes.Clone(value), time.Now().Add(ttl)}
	return nil
}

// stored returns the keys that hold something.
func (s *shelf) stored() (keys []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for key, v := range s.values {
		if time.Now().Before(v.expires) {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	return keys
}

// process is one process's way to a plain store.
type process struct {
	sessionlock.PlainStore

	mu     sync.Mutex
	before func(op, key string) error
	sets   []string
}

// on has f run before each step; with an error the step is not made.
func (p *process) on(f func(op, key string) error) *process {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.before = f
	return p
}

func (p *process) enter(op, key string) error {
	p.mu.Lock()
	before := p.before
	p.mu.Unlock()
	if before == nil {
		return nil
	}
	return before(op, key)
}

// The steps of a process.
const (
	opGet = "get"
	opSet = "set"
)

func (p *process) Get(ctx context.Context, key string) ([]byte, error) {
	if err := p.enter(opGet, key); err != nil {
		return nil, err
	}
	return p.PlainStore.Get(ctx, key)
}

func (p *process) Set(ctx context.Context, key string, value []byte, ttl time.Duration) error {
	if err := p.enter(opSet, key); err != nil {
		return err
	}
	p.mu.Lock()
	p.sets = append(p.sets, key)
	p.mu.Unlock()
	return p.PlainStore.Set(ctx, key, value, ttl)
}

// wrote returns the keys that were set.
func (p *process) wrote() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.sets)
}

func isMark(key string) bool { return strings.Contains(key, ":dead:") }

// Calls one after the other.

var plainRules = entry.Rules{
	Budget: 3, Window: 15 * time.Minute, Proving: 30 * time.Second,
	Retry:  entry.Backoff{Min: 250 * time.Millisecond, Max: 30 * time.Second},
	Reject: entry.Backoff{Min: time.Second, Max: 30 * time.Second},
}

func storeTime() entry.Time { return entry.Time(time.Now().UnixMicro()) }

func encode(t testing.TB, e entry.Entry) []byte {
	t.Helper()
	b, err := entry.Encode(e)
	require.NoError(t, err)
	return b
}

// loadEntry returns what key holds, nil and zero for nothing.
func loadEntry(t testing.TB, c sessionlock.Cache) ([]byte, entry.Entry) {
	t.Helper()
	raw, err := c.Load(t.Context(), "k")
	require.NoError(t, err)
	e, _ := entry.Decode(raw)
	return raw, e
}

// change is what a client does to the entry under k: apply, swap, start over from
// what is shown instead.
func change(t testing.TB, c sessionlock.Cache, raw []byte, rule func(entry.Entry) entry.Entry) entry.Entry {
	t.Helper()
	for {
		e, _ := entry.Decode(raw)
		next := rule(e)
		if next == e {
			return e
		}
		next.Stamp = entry.NewNonce()
		want := encode(t, next)
		now, err := c.CompareAndSwap(t.Context(), "k", raw, want, next.TTL(storeTime()))
		require.NoError(t, err)
		if bytes.Equal(now, want) {
			return next
		}
		raw = now
	}
}

// anyRule returns one of the things a client does to an entry, chosen by r.
func anyRule(r *rand.Rand, e entry.Entry, now entry.Time) (name string, rule func(entry.Entry) entry.Entry) {
	session := func() entry.Session {
		s := entry.Session{Record: "record", Expires: now.Add(time.Hour)}
		if r.IntN(2) == 0 {
			s.Refresh = now.Add(2 * time.Hour)
		}
		return s
	}
	commit := func(res entry.Result) func(entry.Entry) entry.Entry {
		return func(e entry.Entry) entry.Entry {
			e, _, _ = plainRules.Commit(e, e.Open.Gen, e.Open.Nonce, res, now)
			return e
		}
	}
	switch r.IntN(15) {
	case 12:
		put := session()
		return "put", func(e entry.Entry) entry.Entry {
			if e.Session.Record == put.Record && e.Session.Expires == put.Expires {
				return e // by the swap before
			}
			e, _ = plainRules.Put(e, entry.Number(e, now), put, now)
			return e
		}
	case 13:
		return "retire", func(e entry.Entry) entry.Entry { e, _ = entry.Retire(e, e.Session.Gen, now); return e }
	case 14:
		return "renew", func(e entry.Entry) entry.Entry {
			return entry.Renew(e, e.Open.Gen, e.Open.Nonce, 5*time.Second, now)
		}
	case 0, 1, 2:
		return "begin", func(e entry.Entry) entry.Entry {
			e, _ = plainRules.Begin(e, entry.Ask{Nonce: entry.NewNonce(), After: e.Session.Gen, Lease: 3 * time.Second}, now)
			return e
		}
	case 3, 4, 5:
		return "commit", commit(entry.Result{Session: session()})
	case 6:
		return "fail", commit(entry.Result{Class: []entry.Class{entry.Denied, entry.Deferred, entry.Unknown, entry.NotSent}[r.IntN(4)]})
	case 7, 8:
		gen := e.Session.Gen
		return "invalidate", func(e entry.Entry) entry.Entry { return plainRules.Invalidate(e, gen, now) }
	case 9:
		return "clear", func(e entry.Entry) entry.Entry { e, _ = entry.Clear(e, now); return e }
	case 10:
		return "unsuppress", entry.Unsuppress
	default:
		ttl := time.Duration(1+r.IntN(120)) * time.Minute
		return "touch", func(e entry.Entry) entry.Entry { return entry.Touch(e, e.Session.Gen, ttl, 0, now) }
	}
}

// Whatever clients do one after the other, in whichever process, comes out as on
// a Cache that compares: byte by byte, also when a swap is sent again, starts from
// what is no longer stored, or follows the end of the value.
func TestPlainCacheIsAnyCacheToCallsInARow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for seed := range uint64(100) {
			r := rand.New(rand.NewPCG(seed, 0))
			store, right := new(shelf), new(sessionlock.MemoryCache)
			caches := []sessionlock.Cache{sessionlock.PlainCache(store), sessionlock.PlainCache(store)}
			var history [][]byte
			done := []string{}
			for range 60 {
				time.Sleep([]time.Duration{time.Microsecond, time.Second, 40 * time.Second, 5 * time.Minute, 20 * time.Minute}[r.IntN(5)])
				plain := caches[r.IntN(2)]
				raw, e := loadEntry(t, right)
				name, rule := anyRule(r, e, storeTime())
				done = append(done, name)
				next := rule(e)
				if next == e {
					continue
				}
				next.Stamp = entry.NewNonce()
				old := raw
				if len(history) > 0 && r.IntN(4) == 0 {
					old = history[r.IntN(len(history))]
				}
				history = append(history, raw, encode(t, next))
				for range 1 + r.IntN(2) {
					want, _ := right.CompareAndSwap(t.Context(), "k", old, encode(t, next), next.TTL(storeTime()))
					got, err := plain.CompareAndSwap(t.Context(), "k", old, encode(t, next), next.TTL(storeTime()))
					require.NoError(t, err)
					require.Equal(t, want, got, "seed %d: %v", seed, done)
				}
				want, _ := loadEntry(t, right)
				for _, c := range caches {
					got, _ := loadEntry(t, c)
					require.Equal(t, want, got, "seed %d: %v", seed, done)
				}
			}
			require.Contains(t, strings.Join(done, " "), "invalidate", "seed %d", seed)
		}
	})
}

// Calls at once.

// orders runs actors, each with a handle of its own on one store, once for every
// order in which their steps can come; or, with some, for that many orders by
// chance. stored is under k before, check looks at what is there afterwards.
func orders(t *testing.T, some int, stored []byte, actors []func(c sessionlock.Cache), check func(c sessionlock.Cache)) (ran int) {
	t.Helper()
	r := rand.New(rand.NewPCG(1, 2))
	var plan, width []int // of the steps so far: who made it, of how many
	for {
		store := new(shelf)
		require.NoError(t, store.Set(t.Context(), "k", stored, time.Hour))
		width = width[:0]
		oneOrder(store, actors, func(n int) int {
			i := len(width)
			width = append(width, n)
			switch {
			case some > 0:
				return r.IntN(n)
			case i == len(plan):
				plan = append(plan, 0)
			}
			return plan[i]
		})
		check(sessionlock.PlainCache(store))
		ran++
		if t.Failed() {
			t.Fatalf("in the order %v", plan)
		}
		if some > 0 {
			if ran == some {
				return ran
			}
			continue
		}
		plan = plan[:len(width)]
		for len(plan) > 0 && plan[len(plan)-1]+1 == width[len(plan)-1] {
			plan = plan[:len(plan)-1]
		}
		if len(plan) == 0 {
			return ran
		}
		plan[len(plan)-1]++
	}
}

// oneOrder lets actors make one step after the other, each chosen by pick among
// those that are not done.
func oneOrder(store *shelf, actors []func(sessionlock.Cache), pick func(n int) int) {
	stopped := make(chan bool) // by who is let go: at its next step, or done
	ready := []chan struct{}{}
	for _, act := range actors {
		turn := make(chan struct{})
		p := (&process{PlainStore: store}).on(func(string, string) error {
			stopped <- true
			<-turn
			return nil
		})
		go func() {
			defer func() { stopped <- false }()
			act(sessionlock.PlainCache(p))
		}()
		if <-stopped {
			ready = append(ready, turn)
		}
	}
	for len(ready) > 0 {
		i := pick(len(ready))
		ready[i] <- struct{}{}
		if !<-stopped {
			ready = slices.Delete(ready, i, i+1)
		}
	}
}

// begun is an entry with a usable session, and with an attempt for the next one
// open if renewing.
func begun(now entry.Time, ours entry.Nonce, renewing bool) (e entry.Entry, g1 uint64) {
	const long = time.Hour
	e, _ = plainRules.Begin(e, entry.Ask{Nonce: ours, Lease: long}, now)
	e, _, _ = plainRules.Commit(e, e.Open.Gen, ours, entry.Result{Session: entry.Session{Record: "one", Expires: now.Add(long), Refresh: now.Add(2 * long)}}, now)
	g1 = e.Session.Gen
	if renewing {
		e, _ = plainRules.Begin(e, entry.Ask{Nonce: ours, After: g1, Lease: long}, now.Add(time.Second))
	}
	return e, g1
}

// An invalidation of the first generation, and what else may go on at that very
// moment, in every order of their Gets and Sets. Both have seen the same value.
func TestInvalidateOnAPlainStoreInEveryOrder(t *testing.T) {
	start := storeTime()
	now := start.Add(2 * time.Second)
	leader, other := entry.Nonce{1}, entry.Nonce{2}
	two := entry.Session{Record: "two", Expires: now.Add(time.Hour)}
	rules := plainRules
	rules.Reject = entry.Backoff{Min: 5 * time.Hour, Max: 5 * time.Hour} // longer than anything else matters

	// peer is a process beside the one that invalidates g1.
	type peer struct {
		t     *testing.T
		cache sessionlock.Cache
		seen  []byte
		g1    uint64
	}
	does := func(p peer, rule func(e entry.Entry) entry.Entry) entry.Entry {
		return change(p.t, p.cache, p.seen, rule)
	}
	commit := func(p peer, n entry.Nonce, res entry.Result) {
		seen, err := entry.Decode(p.seen)
		require.NoError(p.t, err)
		does(p, func(e entry.Entry) entry.Entry {
			e, _, v := rules.Commit(e, seen.Open.Gen, n, res, now)
			assert.Equal(p.t, entry.Stored, v)
			return e
		})
	}
	invalidate := func(p peer) {
		does(p, func(e entry.Entry) entry.Entry { return rules.Invalidate(e, p.g1, now) })
	}

	for name, tt := range map[string]struct {
		renewing bool
		young    uint32 // before
		peer     func(p peer)
		want     func(t *testing.T, e entry.Entry)
		orders   int // at least
	}{
		"a login": {peer: func(p peer) {
			var v entry.Verdict
			e := does(p, func(e entry.Entry) entry.Entry {
				e, v = rules.Begin(e, entry.Ask{Nonce: other, After: p.g1, Lease: time.Hour}, now)
				return e
			})
			assert.Equal(p.t, entry.Lead, v)
			p.seen = encode(p.t, e)
			commit(p, other, entry.Result{Session: two})
		}, want: func(t *testing.T, e entry.Entry) {
			assert.Equal(t, "two", e.Session.Record)
			assert.Zero(t, e.Attempts)
		}, orders: 5000},
		"the login that renews it": {renewing: true, peer: func(p peer) {
			commit(p, leader, entry.Result{Session: two})
		}, want: func(t *testing.T, e entry.Entry) {
			assert.Equal(t, "two", e.Session.Record)
		}, orders: 100},
		"a session put there": {peer: func(p peer) {
			does(p, func(e entry.Entry) entry.Entry {
				if e.Session.Record == two.Record {
					return e // by the swap before
				}
				e, _ = rules.Put(e, entry.Number(e, now), two, now)
				return e
			})
		}, want: func(t *testing.T, e entry.Entry) {
			assert.Equal(t, "two", e.Session.Record)
		}, orders: 100},
		"a login that is denied": {renewing: true, peer: func(p peer) {
			commit(p, leader, entry.Result{Class: entry.Denied})
		}, want: func(t *testing.T, e entry.Entry) {
			assert.Zero(t, e.Open)
			assert.Equal(t, entry.Denied, e.Failure.Class)
			assert.EqualValues(t, 1, e.Attempts)
			assert.EqualValues(t, 1, e.Young)
			assert.Equal(t, "one", e.Session.Record, "may still be refreshed")
		}, orders: 100},
		"a login that is given up": {renewing: true, young: 1, peer: func(p peer) {
			commit(p, leader, entry.Result{Class: entry.NotSent})
		}, want: func(t *testing.T, e entry.Entry) {
			assert.Zero(t, e.Open)
			assert.Zero(t, e.Session, "the second one refused while young")
			assert.EqualValues(t, 2, e.Young)
			assert.Equal(t, entry.Failure{Class: entry.Rejected, Until: now.Add(5 * time.Hour)}, e.Failure)
			assert.GreaterOrEqual(t, e.Keep, e.Failure.Until)
		}, orders: 100},
		"a heartbeat": {renewing: true, peer: func(p peer) {
			does(p, func(e entry.Entry) entry.Entry { return entry.Renew(e, e.Open.Gen, leader, 2*time.Hour, now) })
		}, want: func(t *testing.T, e entry.Entry) {
			assert.Equal(t, leader, e.Open.Nonce)
		}, orders: 100},
		"a touch": {peer: func(p peer) {
			does(p, func(e entry.Entry) entry.Entry { return entry.Touch(e, p.g1, 3*time.Hour, 0, now) })
		}, orders: 100},
		"another invalidation": {peer: invalidate, want: func(t *testing.T, e entry.Entry) {
			assert.EqualValues(t, 1, e.Young, "counted once")
			assert.Equal(t, "one", e.Session.Record, "may still be refreshed")
		}, orders: 100},
		"a logout": {peer: func(p peer) {
			does(p, func(e entry.Entry) entry.Entry { e, _ = entry.Clear(e, now); return e })
		}, orders: 100},
	} {
		t.Run(name, func(t *testing.T) {
			stored, g1 := begun(start, leader, tt.renewing)
			stored.Young = tt.young
			raw := encode(t, stored)
			as := func(f func(p peer)) func(sessionlock.Cache) {
				return func(c sessionlock.Cache) { f(peer{t, c, raw, g1}) }
			}
			ran := orders(t, 0, raw, []func(sessionlock.Cache){as(invalidate), as(tt.peer)}, func(c sessionlock.Cache) {
				_, e := loadEntry(t, c)
				if e.Session.Record != two.Record {
					assert.Zero(t, e.Session.Expires, "dead")
					assert.Zero(t, e.Proven)
				}
				if tt.want != nil {
					tt.want(t, e)
				}
			})
			t.Logf("%d orders", ran)
			assert.GreaterOrEqual(t, ran, tt.orders)
		})
	}
}

// Of many calls at once some are lost, but not an invalidation that found its
// session: nothing brings that back.
func TestInvalidatedSessionStaysDeadOnAPlainStore(t *testing.T) {
	start := storeTime()
	now := start.Add(2 * time.Second)
	stored, g1 := begun(start, entry.Nonce{1}, true)
	raw := encode(t, stored)
	var found bool
	took := 0
	r := rand.New(rand.NewPCG(3, 4)) // one actor runs at a time
	anything := func(c sessionlock.Cache) {
		for range 2 {
			raw, e := loadEntry(t, c)
			_, rule := anyRule(r, e, now)
			tries := 0
			change(t, c, raw, func(e entry.Entry) entry.Entry {
				if tries++; tries > 20 { // some of them always find something to do
					return e
				}
				return rule(e)
			})
		}
	}
	orders(t, 2000, raw, []func(sessionlock.Cache){func(c sessionlock.Cache) {
		change(t, c, raw, func(e entry.Entry) entry.Entry {
			next := plainRules.Invalidate(e, g1, now)
			found = next != e
			return next
		})
	}, anything, anything, anything}, func(c sessionlock.Cache) {
		if found {
			took++
			_, e := loadEntry(t, c)
			require.False(t, e.Session.Gen == g1 && e.Session.Expires != 0)
		}
	})
	assert.Greater(t, took, 500)
}

// A backup, a replica that took over, a write that was very late.
func TestOldValueThatComesBackToAPlainStoreIsDead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := new(shelf)
		cache := sessionlock.PlainCache(store)
		e, g1 := begun(storeTime(), entry.Nonce{1}, false)
		e.Session.Refresh, e.Keep = 0, e.Session.Expires
		e = change(t, cache, nil, func(entry.Entry) entry.Entry { return e })
		old := encode(t, e)
		touched := entry.Touch(e, g1, 90*time.Minute, 0, storeTime())
		change(t, cache, old, func(e entry.Entry) entry.Entry { return plainRules.Invalidate(e, g1, storeTime()) })
		_, dead := loadEntry(t, cache)
		require.Zero(t, dead.Session.Expires)
		begin := func(e entry.Entry) entry.Entry {
			e, _ = plainRules.Begin(e, entry.Ask{Nonce: entry.Nonce{2}, Lease: time.Hour}, storeTime())
			return e
		}
		change(t, cache, encode(t, dead), begin)
		for _, v := range [][]byte{old, encode(t, touched)} {
			require.NoError(t, store.Set(t.Context(), "k", v, touched.TTL(storeTime())))
			_, e = loadEntry(t, cache)
			assert.Equal(t, dead, e, "with its counts and back-offs")
		}
		for range 10 {
			time.Sleep(10 * time.Minute)
			_, e = loadEntry(t, cache)
			require.False(t, e.Usable(0, storeTime()), "the mark outlives what it marks")
		}
		// By a store's very late write of another version of this library, too.
		require.NoError(t, store.Set(t.Context(), "k", old, time.Hour))
		require.NoError(t, store.Set(t.Context(), fmt.Sprintf("k:dead:%d", g1), []byte("\xffunknown"), time.Hour))
		raw, _ := loadEntry(t, cache)
		assert.Equal(t, "\xffunknown", string(raw))
		assert.NotZero(t, change(t, cache, raw, begin).Open.Gen, "and can be replaced")
		_, e = loadEntry(t, cache)
		assert.NotZero(t, e.Open.Gen)
	})
}

func TestPlainCacheWritesNothingForWhoHasGone(t *testing.T) {
	ctx, leave := context.WithCancel(t.Context())
	p := &process{PlainStore: new(shelf)}
	p.on(func(op, _ string) error {
		if op == opGet {
			leave() // while the Get is under way, in a driver that does not look
		}
		return nil
	})
	_, err := sessionlock.PlainCache(p).CompareAndSwap(ctx, "k", nil, []byte("late"), time.Hour)
	require.ErrorIs(t, err, context.Canceled)
	assert.Empty(t, p.wrote())
}

func TestPlainCacheReportsEveryFailureOfItsStore(t *testing.T) {
	e, g1 := begun(storeTime(), entry.Nonce{1}, false)
	taken := plainRules.Invalidate(e, g1, storeTime())
	for steps := range 6 { // what is asked of the store by a swap that sets a mark
		store := new(shelf)
		require.NoError(t, store.Set(t.Context(), "k", encode(t, e), time.Hour))
		p, left := &process{PlainStore: store}, steps
		p.on(func(string, string) error {
			if left--; left == -1 { // only this one fails
				return errStoreDown
			}
			return nil
		})
		cache := sessionlock.PlainCache(p)
		v, err := cache.Load(t.Context(), "k")
		if steps < 2 {
			require.ErrorIs(t, err, errStoreDown, "also when only the mark cannot be read: the session may be dead")
			assert.Nil(t, v)
		}
		left = steps
		v, err = cache.CompareAndSwap(t.Context(), "k", encode(t, e), encode(t, taken), time.Hour)
		if steps < 5 {
			require.ErrorIs(t, err, errStoreDown, "after %d steps", steps)
			assert.Nil(t, v)
			continue
		}
		require.NoError(t, err)
		assert.Equal(t, encode(t, taken), v)
	}
}

// A value that is over at once was stored all the same.
func TestPlainCacheSwapWhoseValueEndsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &process{PlainStore: new(shelf)}
		p.on(func(op, _ string) error {
			if op == opGet && len(p.wrote()) > 0 {
				time.Sleep(time.Second)
			}
			return nil
		})
		now, err := sessionlock.PlainCache(p).CompareAndSwap(t.Context(), "k", nil, []byte("short"), time.Millisecond)
		require.NoError(t, err)
		assert.Equal(t, "short", string(now))
	})
}

type (
	watchingShelf struct {
		*shelf
		sessionlock.Watcher
	}
	tellingShelf struct {
		*shelf
		sessionlock.Clock
	}
	seeingShelf struct {
		watchingShelf
		sessionlock.Clock
	}
)

type noon struct{}

func (noon) Now(context.Context) (time.Time, error) { return time.Unix(43200, 0), nil }

func TestPlainCacheHasTheFacesOfItsStore(t *testing.T) {
	watches := watchingShelf{new(shelf), new(sessionlock.MemoryCache)}
	for _, tt := range []struct {
		store          sessionlock.PlainStore
		watches, tells bool
	}{
		{new(shelf), false, false},
		{watches, true, false},
		{tellingShelf{new(shelf), noon{}}, false, true},
		{seeingShelf{watches, noon{}}, true, true},
	} {
		cache := sessionlock.PlainCache(tt.store)
		w, ok := cache.(sessionlock.Watcher)
		if assert.Equal(t, tt.watches, ok) && ok {
			w.Watch("k", func() {})()
		}
		c, ok := cache.(sessionlock.Clock)
		if assert.Equal(t, tt.tells, ok) && ok {
			now, err := c.Now(t.Context())
			require.NoError(t, err)
			assert.EqualValues(t, 43200, now.Unix())
		}
		now, err := cache.CompareAndSwap(t.Context(), "k", nil, []byte("v"), time.Hour)
		require.NoError(t, err)
		assert.Equal(t, "v", string(now))
	}
}

func TestPlainCacheOfNothingIsRefused(t *testing.T) {
	for _, store := range []sessionlock.PlainStore{nil, (*shelf)(nil)} {
		cache := sessionlock.PlainCache(store)
		assert.Nil(t, cache)
		_, err := sessionlock.New(acme, new(upstream), sessionlock.WithCache(cache))
		require.ErrorIs(t, err, sessionlock.ErrInvalid)
		assert.ErrorContains(t, err, "WithCache")
	}
}

// The longest key of a Cache, with the highest number there is.
func TestKeysOfAPlainStoreAreBounded(t *testing.T) {
	p := &process{PlainStore: new(shelf)}
	cache, key := sessionlock.PlainCache(p), strings.Repeat("k", 128)
	e := entry.Entry{Gen: 1 << 54, Session: entry.Session{Gen: 1 << 54, Expires: storeTime().Add(time.Hour)}}
	dead := plainRules.Invalidate(e, e.Gen, storeTime())
	for _, swap := range [][2][]byte{{nil, encode(t, e)}, {encode(t, e), encode(t, dead)}} {
		now, err := cache.CompareAndSwap(t.Context(), key, swap[0], swap[1], time.Hour)
		require.NoError(t, err)
		require.Equal(t, swap[1], now)
	}
	require.Len(t, p.wrote(), 2)
	assert.Len(t, p.wrote()[1], 151)
	assert.Regexp(t, `^[!-~]+$`, p.wrote()[1])
}

// What the documentation of PlainCache says of a lock kept in it. The suite is
// seen failing from outside, in a process of its own.
func TestLockInAPlainStoreFailsOneWinnerOnly(t *testing.T) {
	const env = "SESSIONLOCK_PLAIN_LOCK"
	if os.Getenv(env) != "" {
		sessionlocktest.LockerTest{
			New: func(*testing.T) sessionlock.Locker {
				return sessionlock.NewCacheLocker(sessionlock.PlainCache(&shelf{slow: true}))
			},
			In: synctest.Test,
		}.Run(t)
		return
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=1m")
	cmd.Env = append(os.Environ(), env+"=1")
	out, err := cmd.CombinedOutput()
	require.Error(t, err)
	cases := regexp.MustCompile(`(?m)^\s+--- (PASS|FAIL): `+t.Name()+`/(\w+) `).FindAllStringSubmatch(string(out), -1)
	failed := []string{}
	for _, c := range cases {
		if c[1] == "FAIL" {
			failed = append(failed, c[2])
		}
	}
	assert.Equal(t, []string{"OneWinner"}, failed, "%s", out)
	assert.GreaterOrEqual(t, len(cases), 14)
}

// Clients.

// plainClient returns a client on store, as a process of its own.
func plainClient(t *testing.T, u *upstream, store sessionlock.PlainStore, opts ...sessionlock.Option) (*sessionlock.Client, *process) {
	t.Helper()
	p := &process{PlainStore: store}
	return newClient(t, u, sessionlock.PlainCache(p), opts...), p
}

func TestClientsOnAPlainStore(t *testing.T) {
	inBubble := func(name string, f func(t *testing.T, u *upstream, store *shelf)) {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { f(t, &upstream{life: time.Hour, takes: 100 * time.Millisecond}, new(shelf)) })
		})
	}
	inBubble("one login is everybody's", func(t *testing.T, u *upstream, store *shelf) {
		a, _ := plainClient(t, u, store)
		b, p := plainClient(t, u, store)
		first := askFor(t.Context(), a, "k")
		time.Sleep(50 * time.Millisecond)
		second := askFor(t.Context(), b, "k")
		for _, ask := range []<-chan answer{first, second} {
			got := <-ask
			require.NoError(t, got.err)
			assert.Equal(t, "k/1", got.session.Token.Reveal())
		}
		synctest.Wait() // the lock is freed
		steps := 0
		p.on(func(string, string) error { steps++; return nil })
		assert.Equal(t, "k/1", tokenOf(t, b, "k"))
		assert.Zero(t, steps, "a near hit asks nothing of the store")
		assert.Equal(t, 1, u.logins())
	})
	inBubble("a rejected session is repaired once", func(t *testing.T, u *upstream, store *shelf) {
		clients := []*sessionlock.Client{}
		for range 3 {
			c, _ := plainClient(t, u, store)
			require.Equal(t, "k/1", tokenOf(t, c, "k"))
			clients = append(clients, c)
		}
		for _, c := range clients {
			require.NoError(t, c.Do(t.Context(), "k", rejectOld("k/1")))
			assert.Equal(t, "k/2", tokenOf(t, c, "k"))
		}
		assert.Equal(t, 2, u.logins())
		assert.Empty(t, u.ended(), "what was rejected is not logged out")
	})
	inBubble("an invalidation is everybody's", func(t *testing.T, u *upstream, store *shelf) {
		a, p := plainClient(t, u, store)
		b, _ := plainClient(t, u, store, sessionlock.WithNearCache(0, time.Minute))
		s, err := a.Session(t.Context(), "k")
		require.NoError(t, err)
		synctest.Wait() // the lock is freed
		before := len(p.wrote())
		require.NoError(t, a.Invalidate(t.Context(), s))
		require.NoError(t, a.Invalidate(t.Context(), s), "again")
		if wrote := p.wrote()[before:]; assert.Len(t, wrote, 1) {
			assert.True(t, isMark(wrote[0]), "the key itself is not written")
		}
		assert.Equal(t, "k/2", tokenOf(t, b, "k"))
		require.NoError(t, a.Invalidate(t.Context(), s), "late")
		assert.Equal(t, "k/2", tokenOf(t, b, "k"))
		assert.Equal(t, 2, u.logins())
	})
	inBubble("sessions refused while young wait for each other", func(t *testing.T, u *upstream, store *shelf) {
		a, _ := plainClient(t, u, store)
		b, _ := plainClient(t, u, store)
		refuse := func(context.Context, sessionlock.Session) error { return sessionlock.Reject(errDead) }
		require.ErrorIs(t, a.Do(t.Context(), "k", refuse), sessionlock.ErrRejected)
		_, err := b.Session(t.Context(), "k")
		require.ErrorIs(t, err, sessionlock.ErrSuppressed, "both invalidations are counted")
		time.Sleep(time.Second)
		assert.Equal(t, "k/3", tokenOf(t, b, "k"))
	})
	inBubble("a denial is everybody's, until it is forgiven", func(t *testing.T, u *upstream, store *shelf) {
		u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
			if n == 1 {
				return sessionlock.Session{}, sessionlock.Denied(errors.New("401"))
			}
			return u.grant(key, n), nil
		}
		a, _ := plainClient(t, u, store)
		b, _ := plainClient(t, u, store)
		for _, c := range []*sessionlock.Client{a, b, a, b} {
			_, err := c.Session(t.Context(), "k")
			require.ErrorIs(t, err, sessionlock.ErrDenied)
		}
		assert.Equal(t, 1, u.logins())
		require.NoError(t, a.Unsuppress(t.Context(), "k"))
		assert.Equal(t, "k/2", tokenOf(t, b, "k"))
		assert.Equal(t, "k/2", tokenOf(t, a, "k"))
	})
	inBubble("a logout is everybody's", func(t *testing.T, u *upstream, store *shelf) {
		a, _ := plainClient(t, u, store, sessionlock.WithNearCache(0, time.Minute))
		b, _ := plainClient(t, u, store, sessionlock.WithNearCache(0, time.Minute))
		require.Equal(t, "k/1", tokenOf(t, a, "k"))
		require.NoError(t, b.Logout(t.Context(), "k"))
		assert.Equal(t, []string{"k/1"}, u.ended())
		require.NoError(t, b.Logout(t.Context(), "k"), "nobody is logged in")
		assert.Equal(t, "k/2", tokenOf(t, a, "k"))

		ask := askFor(t.Context(), a, "other")
		time.Sleep(50 * time.Millisecond)
		require.NoError(t, b.Logout(t.Context(), "other"))
		got := <-ask
		require.ErrorIs(t, got.err, sessionlock.ErrStale, "a login under way stores nothing")
		time.Sleep(time.Second)
		assert.ElementsMatch(t, []string{"k/1", "other/3"}, u.ended())
	})
	inBubble("a store that cannot be reached is no miss", func(t *testing.T, u *upstream, store *shelf) {
		a, _ := plainClient(t, u, store)
		b, p := plainClient(t, u, store, sessionlock.WithNearCache(0, time.Minute))
		require.Equal(t, "k/1", tokenOf(t, a, "k"))
		for _, down := range []func(op, key string) bool{
			func(string, string) bool { return true },
			func(_, key string) bool { return isMark(key) },
		} {
			p.on(func(op, key string) error {
				if down(op, key) {
					return errStoreDown
				}
				return nil
			})
			_, err := b.Session(t.Context(), "k")
			assertUnavailable(t, err)
			require.ErrorIs(t, err, errStoreDown)
		}
		p.on(nil)
		time.Sleep(5 * time.Second)
		assert.Equal(t, "k/1", tokenOf(t, b, "k"))
		assert.Equal(t, 1, u.logins())
	})
}

// An Invalidate reads the first session, a peer stores the second one, the
// Invalidate writes: the second one stays.
func TestSlowInvalidateOnAPlainStoreNeverEndsANewerSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, store := &upstream{life: time.Hour}, new(shelf)
		slow, p := plainClient(t, u, store)
		peer, _ := plainClient(t, u, store)
		s1, err := slow.Session(t.Context(), "k")
		require.NoError(t, err)
		require.Equal(t, "k/1", tokenOf(t, peer, "k"))

		synctest.Wait() // the locks are freed
		atSet, goOn := make(chan string), make(chan struct{})
		p.on(func(op, key string) error {
			if op == opSet {
				atSet <- key
				<-goOn
			}
			return nil
		})
		done := make(chan error)
		go func() { done <- slow.Invalidate(t.Context(), s1) }()
		key := <-atSet
		require.NoError(t, peer.Do(t.Context(), "k", rejectOld("k/1")))
		require.Equal(t, "k/2", tokenOf(t, peer, "k"))
		close(goOn)
		require.NoError(t, <-done)

		assert.True(t, isMark(key), "%s", key)
		for range 3 {
			late, _ := plainClient(t, u, store)
			assert.Equal(t, "k/2", tokenOf(t, late, "k"))
			require.NoError(t, late.Invalidate(t.Context(), s1), "a late rejection")
		}
		assert.Equal(t, 2, u.logins())
		marks := slices.DeleteFunc(store.stored(), func(k string) bool { return !isMark(k) })
		assert.Len(t, marks, 1)
	})
}

// crowded is a stampede of callers on a plain store whose calls all meet between
// Get and Set. Each comes back until it is served.
type crowded struct {
	t       *testing.T
	u       *upstream
	clients []*sessionlock.Client

	mu   sync.Mutex
	dead map[string]bool
}

func (c *crowded) serve(keys []string, callers int) {
	c.t.Helper()
	var wg sync.WaitGroup
	for _, client := range c.clients {
		for _, key := range keys {
			for range callers {
				wg.Go(func() { assert.NoError(c.t, c.persist(client, key)) })
			}
		}
	}
	wg.Wait()
}

// persist is one caller.
func (c *crowded) persist(client *sessionlock.Client, key string) (err error) {
	for range 30 {
		var refused uint64
		err = client.Do(c.t.Context(), key, func(_ context.Context, s sessionlock.Session) error {
			token := s.Token.Reveal()
			assert.Equal(c.t, key, s.Key())
			assert.Equal(c.t, key, strings.Split(token, "/")[0], "a session of another key")
			assert.Greater(c.t, s.Generation(), refused, "not newer than the one just refused")
			refused = s.Generation()
			c.mu.Lock()
			defer c.mu.Unlock()
			if c.dead[token] {
				return sessionlock.Reject(errDead)
			}
			return nil
		})
		if err == nil {
			return nil
		}
		if !errors.Is(err, sessionlock.ErrRejected) && !errors.Is(err, sessionlock.ErrStale) &&
			!errors.Is(err, sessionlock.ErrLockTimeout) && !errors.Is(err, sessionlock.ErrSuppressed) {
			return err
		}
		time.Sleep(time.Second)
	}
	return err
}

// kill ends every session there is.
func (c *crowded) kill(keys []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for n := range c.u.logins() {
		for _, key := range keys {
			c.dead[fmt.Sprintf("%s/%d", key, n+1)] = true
		}
	}
}

func crowd4(t *testing.T, opts ...sessionlock.Option) *crowded {
	t.Helper()
	c := &crowded{t: t, u: &upstream{life: time.Hour, takes: 100 * time.Millisecond}, dead: map[string]bool{}}
	store := &shelf{slow: true}
	for range 4 {
		client, _ := plainClient(t, c.u, store, opts...)
		c.clients = append(c.clients, client)
	}
	return c
}

func TestStampedeOnAPlainStoreServesEverybody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, keys := crowd4(t), []string{"a", "b"}
		c.serve(keys, 10)
		cold := c.u.logins()
		assert.Greater(t, cold, len(keys), "the lock is given to several")
		assert.LessOrEqual(t, cold, len(keys)*len(c.clients), "but each process makes one attempt")
		for range 3 {
			time.Sleep(40 * time.Second) // no session is young any more
			c.kill(keys)
			before := c.u.logins()
			c.serve(keys, 10)
			assert.Greater(t, c.u.logins(), before)
			assert.LessOrEqual(t, c.u.logins()-before, len(keys)*len(c.clients))
		}
	})
}

// The lock is what a plain store cannot do. With one from elsewhere it is enough.
func TestStampedeOnAPlainStoreWithALockFromElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		locks := new(memoryLocker)
		c, keys := crowd4(t, sessionlock.WithLocker(locks)), []string{"a", "b"}
		for round := range 4 {
			c.serve(keys, 10)
			assert.Equal(t, (round+1)*len(keys), c.u.logins())
			time.Sleep(40 * time.Second)
			c.kill(keys)
		}
	})
}

// A hit past the near cache, beside the same on a Cache that needs one look.
func BenchmarkPlainHit(b *testing.B) {
	ctx := b.Context()
	hit := func(cache sessionlock.Cache) func(int) {
		c := benchClient(b, sessionlock.WithCache(cache), sessionlock.WithNearCache(0, time.Minute))
		return func(int) {
			if _, err := c.Session(ctx, "tenant"); err != nil {
				b.Fatal(err)
			}
		}
	}
	plain, memory := hit(sessionlock.PlainCache(new(shelf))), hit(new(sessionlock.MemoryCache))
	plain(0)
	memory(0)
	alternate(b, plain, memory)
}

// files is a plain store in a directory, for the processes of one machine.
type files struct{ dir string }

// name is a hash: keys have characters that mean something to a path.
func (f files) name(key string) string {
	sum := sha256.Sum256([]byte(key))
	return filepath.Join(f.dir, hex.EncodeToString(sum[:]))
}

func (f files) Get(_ context.Context, key string) ([]byte, error) {
	b, err := os.ReadFile(f.name(key))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil || len(b) < 8 {
		return nil, err
	}
	expires := time.Unix(0, int64(binary.BigEndian.Uint64(b)))
	if !time.Now().Before(expires) {
		return nil, nil
	}
	return b[8:], nil
}

// Set renames, so that nobody reads half a value.
func (f files) Set(_ context.Context, key string, value []byte, ttl time.Duration) error {
	tmp, err := os.CreateTemp(f.dir, "new")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	expires := binary.BigEndian.AppendUint64(nil, uint64(time.Now().Add(ttl).UnixNano()))
	_, err = tmp.Write(append(expires, value...))
	if err := errors.Join(err, tmp.Close()); err != nil {
		return err
	}
	return os.Rename(tmp.Name(), f.name(key))
}

// Sessions in a directory. For anything but one machine's few processes give it a
// lock from elsewhere, too: sessionlock.WithRedis(rdb).
func ExamplePlainCache() {
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "sessions")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	var store sessionlock.PlainStore = files{dir}
	auth := sessionlocktest.Static()
	for range 2 { // two processes, one after the other
		client := clientOf(auth, sessionlock.WithCache(sessionlock.PlainCache(store)))
		show(client.Session(ctx, "bob"))
		_ = client.Close(ctx)
	}
	// Output:
	// token-bob-1
	// token-bob-1
}
