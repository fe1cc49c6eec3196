package sessionlocktest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sessionlock/sessionlock"
	"github.com/sessionlock/sessionlock/internal/suite"
)

// CacheTest shows whether an implementation of [sessionlock.Cache] can be relied
// on by a client:
//
//	sessionlocktest.CacheTest{
//		New:    func(t *testing.T) sessionlock.Cache { return newMyCache(t, db) },
//		Outage: func(t *testing.T, c sessionlock.Cache) { c.(*myCache).db.Close() },
//	}.Run(t)
//
// Only New is required. Keys are unique per case and run, so a store may be
// shared by suites, and need not be empty. Run it with -race.
type CacheTest struct {
	// New returns a cache that works; it is called once for each case.
	New func(t *testing.T) sessionlock.Cache

	// Second returns another handle on c's store, as another process would have
	// it. Default: c itself.
	Second func(t *testing.T, c sessionlock.Cache) sessionlock.Cache

	// Outage makes c's store unreachable, until the end of the case at least.
	// Default: none, and the rules for outages are not looked at.
	Outage func(t *testing.T, c sessionlock.Cache)

	// Sleep lets d pass for the store, which may have a clock of its own in a
	// test. Default: time.Sleep.
	Sleep func(d time.Duration)

	// TTL is the shortest life that the store can give a value and that the
	// machine can do a few calls in. A value has to be gone after twice that.
	// Default: 200 ms.
	TTL time.Duration

	// In runs each case; synctest.Test puts each into a bubble of its own, New
	// and the other funcs included. Default: just runs it.
	In func(t *testing.T, f func(t *testing.T))
}

// Run runs every case as a subtest of t.
func (c CacheTest) Run(t *testing.T) {
	t.Helper()
	suite.Run(t, c.In, c.cases())
}

func (c CacheTest) cases() []suite.Case {
	if c.Sleep == nil {
		c.Sleep = time.Sleep
	}
	if c.TTL == 0 {
		c.TTL = 200 * time.Millisecond
	}
	var cases []suite.Case
	add := func(name, rule string, run func(*cacheCase) error) {
		cases = append(cases, suite.Case{Name: name, Rule: rule, Run: func(t *testing.T) error { return run(c.open(t)) }})
	}
	add("Absent", "a key that holds nothing loads as nil, nil: not as an error, not as an empty value", (*cacheCase).absent)
	add("SwapAbsent", "a swap with a nil old stores next when nothing is there; otherwise it changes nothing and returns what is", (*cacheCase).swapAbsent)
	add("Swap", "a swap stores next only if old is what is stored; otherwise it changes nothing and returns what is", (*cacheCase).swap)
	add("WholeValues", "old is compared as a whole, byte by byte: no prefixes, no folded case, no trimmed or padded ends", (*cacheCase).wholeValues)
	add("Repeated", "a repeated swap that finds its own next stored returns next; one that was overtaken returns the newer value", (*cacheCase).repeated)
	add("Bytes", "values are opaque bytes, 1 to 33 KiB", (*cacheCase).opaque)
	add("Copies", "callers own the slices they pass and get: writing to them changes nothing that is stored", (*cacheCase).copies)
	add("Keys", "keys are independent, whatever printable ASCII they are made of, up to 128 bytes", (*cacheCase).keys)
	add("Expiry", "a value is gone after its ttl: it loads as nil, nil and can be stored anew", (*cacheCase).expiry)
	add("ExpiredOld", "a value that has expired matches no old", (*cacheCase).expiredOld)
	add("Renewal", "a swap gives the value its own ttl, longer or shorter than that of the value before", (*cacheCase).renewal)
	add("TTLs", "a ttl is between a millisecond and days, not always in whole milliseconds, and may be rounded up but not down", (*cacheCase).ttls)
	add("OneWinner", "of swaps with the same old exactly one wins, and the others are told its value", (*cacheCase).oneWinner)
	add("Cancelled", "a call whose context has ended returns soon, and did either all or nothing", (*cacheCase).cancelled)
	add("Watch", "a watch of a key is called after swaps of that key (a hint may be lost, most are not), hardly for others, and not after stop", (*cacheCase).watch)
	add("Clock", "the store's clock says the time, and does not run backwards", (*cacheCase).clock)
	if c.Outage != nil {
		add("Outage", "a store that cannot be reached is an error, never absent: that would log the whole fleet in again", (*cacheCase).outage)
	}
	return cases
}

// cacheCase is one case's cache. Its methods say what they saw when a call does
// not do what they are named for.
type cacheCase struct {
	CacheTest
	t    *testing.T
	ctx  context.Context //nolint:containedctx // lives exactly as long as the case
	a, b sessionlock.Cache
}

func (c CacheTest) open(t *testing.T) *cacheCase {
	t.Helper()
	cc := &cacheCase{CacheTest: c, t: t, ctx: suite.Context(t), a: c.New(t)}
	cc.b = cc.a
	if c.Second != nil {
		cc.b = c.Second(t, cc.a)
	}
	return cc
}

// holds checks that key holds want, nil for nothing, on both handles.
func (c *cacheCase) holds(key string, want []byte) error {
	for _, cache := range []sessionlock.Cache{c.a, c.b} {
		got, err := cache.Load(c.ctx, key)
		if err != nil {
			return fmt.Errorf("Load of a key that holds %s: %w", show(want), err)
		}
		if !same(got, want) {
			return fmt.Errorf("Load = %s, want %s", show(got), show(want))
		}
	}
	return nil
}

// swaps checks that a swap succeeds and can be seen.
func (c *cacheCase) swaps(key string, old, next []byte, ttl time.Duration) error {
	now, err := c.a.CompareAndSwap(c.ctx, key, old, next, ttl)
	if err != nil {
		return fmt.Errorf("swap of %s for %s: %w", show(old), show(next), err)
	}
	if !same(now, next) {
		return fmt.Errorf("swap of %s, which is stored, for %s = %s, want the latter", show(old), show(next), show(now))
	}
	return nil
}

// refuses checks that a swap returns stored, and has changed nothing.
func (c *cacheCase) refuses(key string, old, next, stored []byte) error {
	now, err := c.b.CompareAndSwap(c.ctx, key, old, next, time.Hour)
	if err != nil {
		return fmt.Errorf("swap of %s while %s is stored: %w", show(old), show(stored), err)
	}
	if !same(now, stored) {
		return fmt.Errorf("swap of %s while %s is stored = %s, want what is stored", show(old), show(stored), show(now))
	}
	if err := c.holds(key, stored); err != nil {
		return fmt.Errorf("after a swap of %s was refused: %w", show(old), err)
	}
	return nil
}

// same compares values; absent is nil and not merely empty.
func same(a, b []byte) bool { return (a == nil) == (b == nil) && bytes.Equal(a, b) }

func show(v []byte) string {
	switch {
	case v == nil:
		return "nothing (nil)"
	case len(v) > 40:
		return fmt.Sprintf("%q… (%d bytes)", v[:40], len(v))
	}
	return fmt.Sprintf("%q", v)
}

// first returns the first error of steps, which are taken in order.
func first(steps ...func() error) error {
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

func (c *cacheCase) absent() error {
	return c.holds(suite.Unique("absent"), nil)
}

func (c *cacheCase) swapAbsent() error {
	key, v1, v2 := suite.Unique("k"), []byte("one"), []byte("two")
	return first(
		func() error { return c.swaps(key, nil, v1, time.Hour) },
		func() error { return c.holds(key, v1) },
		func() error { return c.refuses(key, nil, v2, v1) },
	)
}

func (c *cacheCase) swap() error {
	key, v1, v2, v3 := suite.Unique("k"), []byte("one"), []byte("two"), []byte("three")
	return first(
		func() error { return c.refuses(key, v1, v2, nil) },
		func() error { return c.swaps(key, nil, v1, time.Hour) },
		func() error { return c.swaps(key, v1, v2, time.Hour) },
		func() error { return c.holds(key, v2) },
		func() error { return c.refuses(key, v1, v3, v2) },
		func() error { return c.swaps(key, v2, v3, time.Hour) },
		func() error { return c.holds(key, v3) },
	)
}

func (c *cacheCase) wholeValues() error {
	stored := []byte("Value-01")
	for _, old := range []string{"V", "Value-0", "Value-01x", "Value-01\x00", "Value-01 ", " Value-01", "value-01", "Value-1", "alue-01", "%", "Value-0_"} {
		key := suite.Unique("k")
		if err := c.swaps(key, nil, stored, time.Hour); err != nil {
			return err
		}
		if err := c.refuses(key, []byte(old), []byte("next"), stored); err != nil {
			return err
		}
	}
	return nil
}

func (c *cacheCase) repeated() error {
	key, v1, v2, v3 := suite.Unique("k"), []byte("one"), []byte("two"), []byte("three")
	again := func(old, next []byte) func() error {
		return func() error {
			if err := c.swaps(key, old, next, time.Hour); err != nil {
				return err
			}
			if err := c.swaps(key, old, next, time.Hour); err != nil {
				return fmt.Errorf("sent again, as clients do when a reply is lost: %w", err)
			}
			return c.holds(key, next)
		}
	}
	return first(
		again(nil, v1),
		again(v1, v2),
		func() error { return c.swaps(key, v2, v3, time.Hour) },
		func() error { return c.refuses(key, v1, v2, v3) },
		func() error { return c.refuses(key, nil, v1, v3) },
	)
}

func (c *cacheCase) opaque() error {
	every := make([]byte, 256)
	for i := range every {
		every[i] = byte(i)
	}
	big := bytes.Repeat(every, 33<<10/len(every))
	values := [][]byte{{0}, {'0'}, {'\n'}, {0xff}, every, []byte("\xc3\x28 not UTF-8 \xed\xa0\x80"), []byte("trailing \x00\x00"), []byte(" \r\n"), []byte("nil"), []byte("1e3"), big}
	key := suite.Unique("k")
	var old []byte
	for _, v := range values {
		if err := c.swaps(key, old, v, time.Hour); err != nil {
			return err
		}
		if err := c.holds(key, v); err != nil {
			return err
		}
		old = v
	}
	nearly := bytes.Clone(big)
	nearly[len(nearly)-1]--
	return c.refuses(key, nearly, []byte("next"), big)
}

// copies writes over every slice that has crossed the interface.
func (c *cacheCase) copies() error {
	key, want := suite.Unique("k"), []byte("two")
	old, next := []byte("one"), []byte("two")
	if err := c.swaps(key, nil, old, time.Hour); err != nil {
		return err
	}
	swapped, err := c.a.CompareAndSwap(c.ctx, key, old, next, time.Hour)
	if err != nil {
		return err
	}
	if string(old) != "one" || string(next) != "two" {
		return fmt.Errorf("a swap of one for two wrote to its arguments: now %q and %q", old, next)
	}
	steps := []struct {
		what string
		get  func() ([]byte, error)
	}{
		{"the old of a swap", func() ([]byte, error) { return old, nil }},
		{"the next of a swap", func() ([]byte, error) { return next, nil }},
		{"what a swap returned", func() ([]byte, error) { return swapped, nil }},
		{"what Load returned", func() ([]byte, error) { return c.a.Load(c.ctx, key) }},
		{"what a refused swap returned", func() ([]byte, error) {
			return c.a.CompareAndSwap(c.ctx, key, []byte("other"), []byte("three"), time.Hour)
		}},
	}
	for _, s := range steps {
		v, err := s.get()
		if err != nil {
			return err
		}
		for i := range v {
			v[i] = 'x'
		}
		if err := c.holds(key, want); err != nil {
			return fmt.Errorf("after %s was overwritten: %w", s.what, err)
		}
	}
	return nil
}

func (c *cacheCase) keys() error {
	base := suite.Unique("")
	keys := []string{base + string(bytes.Repeat([]byte{'l'}, 128-len(base))), base + string(bytes.Repeat([]byte{'l'}, 127-len(base)))}
	for _, k := range suite.Awkward() {
		keys = append(keys, base+k)
	}
	value := func(key string) []byte { return []byte("value of " + key) }
	for _, key := range keys {
		if err := c.swaps(key, nil, value(key), time.Hour); err != nil {
			return fmt.Errorf("key %q, with other keys stored: %w", key, err)
		}
	}
	for _, key := range keys {
		if err := c.holds(key, value(key)); err != nil {
			return fmt.Errorf("key %q: %w", key, err)
		}
	}
	return nil
}

func (c *cacheCase) expiry() error {
	key, v1, v2 := suite.Unique("k"), []byte("one"), []byte("two")
	if err := suite.Timely(c.TTL, func() error {
		key = suite.Unique("k")
		return first(
			func() error { return c.swaps(key, nil, v1, c.TTL) },
			func() error { return c.holds(key, v1) },
		)
	}); err != nil {
		return err
	}
	c.Sleep(2 * c.TTL)
	if err := c.holds(key, nil); err != nil {
		return fmt.Errorf("%v after it was stored for %v: %w", 2*c.TTL, c.TTL, err)
	}
	return first(
		func() error { return c.swaps(key, nil, v2, time.Hour) },
		func() error { return c.holds(key, v2) },
	)
}

func (c *cacheCase) expiredOld() error {
	key, v1, v2 := suite.Unique("k"), []byte("one"), []byte("two")
	if err := c.swaps(key, nil, v1, c.TTL); err != nil {
		return err
	}
	c.Sleep(2 * c.TTL)
	return c.refuses(key, v1, v2, nil)
}

func (c *cacheCase) renewal() error {
	longer, shorter := "", suite.Unique("k")
	v1, v2 := []byte("one"), []byte("two")
	if err := suite.Timely(c.TTL, func() error {
		longer = suite.Unique("k")
		return first(
			func() error { return c.swaps(longer, nil, v1, c.TTL) },
			func() error { return c.swaps(longer, v1, v2, time.Hour) },
		)
	}); err != nil {
		return err
	}
	if err := first(
		func() error { return c.swaps(shorter, nil, v1, time.Hour) },
		func() error { return c.swaps(shorter, v1, v2, c.TTL) },
	); err != nil {
		return err
	}
	c.Sleep(2 * c.TTL)
	if err := c.holds(longer, v2); err != nil {
		return fmt.Errorf("swapped with a ttl of an hour, %v after the value before expired: %w", c.TTL, err)
	}
	if err := c.holds(shorter, nil); err != nil {
		return fmt.Errorf("swapped with a ttl of %v in place of an hour, %v later: %w", c.TTL, 2*c.TTL, err)
	}
	return nil
}

func (c *cacheCase) ttls() error {
	for _, ttl := range []time.Duration{time.Millisecond, 1500 * time.Microsecond, 24 * time.Hour, 100 * 24 * time.Hour} {
		key, v := suite.Unique("k"), []byte("value")
		if err := c.swaps(key, nil, v, ttl); err != nil {
			return fmt.Errorf("with a ttl of %v: %w", ttl, err)
		}
		if ttl < time.Hour {
			continue
		}
		c.Sleep(time.Millisecond)
		if err := c.holds(key, v); err != nil {
			return fmt.Errorf("a millisecond after it was stored for %v: %w", ttl, err)
		}
	}
	return nil
}

// oneWinner counts in the cache, each number a race on both handles.
func (c *cacheCase) oneWinner() error {
	key := suite.Unique("k")
	var old []byte
	for round := range 10 {
		var won atomic.Int64
		saw := make([][]byte, 50)
		if err := suite.Crowd(len(saw), func(i int) (err error) {
			cache, next := c.a, fmt.Appendf(nil, "%d by %d", round, i)
			if i%2 == 1 {
				cache = c.b
			}
			saw[i], err = cache.CompareAndSwap(c.ctx, key, old, next, time.Hour)
			if err == nil && bytes.Equal(saw[i], next) {
				won.Add(1)
			}
			return err
		}); err != nil {
			return fmt.Errorf("in a race of %d: %w", len(saw), err)
		}
		if won.Load() != 1 {
			return fmt.Errorf("%d of %d swaps of %s won", won.Load(), len(saw), show(old))
		}
		for _, s := range saw {
			if !same(s, saw[0]) {
				return fmt.Errorf("one was told that %s is stored, another %s", show(saw[0]), show(s))
			}
		}
		old = saw[0]
		if err := c.holds(key, old); err != nil {
			return fmt.Errorf("after a race won by %s: %w", show(old), err)
		}
	}
	return nil
}

func (c *cacheCase) cancelled() error {
	ctx, cancel := context.WithCancel(c.ctx)
	cancel()
	for range 20 {
		key, v1, v2 := suite.Unique("k"), []byte("one"), []byte("two")
		if err := c.swaps(key, nil, v1, time.Hour); err != nil {
			return err
		}
		var loaded, now []byte
		var loadErr, swapErr error
		if err := suite.Ends(func() error {
			loaded, loadErr = c.a.Load(ctx, key)
			now, swapErr = c.a.CompareAndSwap(ctx, key, v1, v2, time.Hour)
			return nil
		}); err != nil {
			return fmt.Errorf("with a cancelled context: %w", err)
		}
		if loadErr == nil && !same(loaded, v1) {
			return fmt.Errorf("Load with a cancelled context = %s without error, want %s", show(loaded), show(v1))
		}
		if swapErr == nil && !same(now, v2) {
			return fmt.Errorf("swap with a cancelled context = %s without error, want %s", show(now), show(v2))
		}
		stored, err := c.a.Load(c.ctx, key)
		if err != nil {
			return err
		}
		if !same(stored, v2) && (swapErr == nil || !same(stored, v1)) {
			return fmt.Errorf("after a swap with a cancelled context (error: %v): %s is stored", swapErr, show(stored))
		}
	}
	return nil
}

// watch allows what the contract allows: hints that are lost, late or repeated.
// It does not allow a watch that hears every key or hardly anything.
func (c *cacheCase) watch() error {
	w, ok := c.a.(sessionlock.Watcher)
	if !ok {
		c.t.Log("no sessionlock.Watcher: clients will poll")
		return nil
	}
	const rounds = 20
	key, other := suite.Unique("k"), suite.Unique("other")
	woken := make(chan struct{}, 1)
	var others, late atomic.Int64
	stop := w.Watch(key, func() {
		select {
		case woken <- struct{}{}:
		default:
		}
	})
	defer stop()
	defer w.Watch(other, func() { others.Add(1) })()
	stopLate := w.Watch(key, func() { late.Add(1) })

	var old []byte
	swapped := 0
	// heard swaps through the second handle until a watch has heard it.
	heard := func(within time.Duration, tries int) (bool, error) {
		for range tries {
			swapped++
			next := fmt.Appendf(nil, "value %d", swapped)
			now, err := c.b.CompareAndSwap(c.ctx, key, old, next, time.Hour)
			if err != nil || !same(now, next) {
				return false, fmt.Errorf("swap of a watched key = %s, %v", show(now), err)
			}
			old = next
			select {
			case <-woken:
				return true, nil
			case <-time.After(within):
			}
		}
		return false, nil
	}

	// A watch may take a while to be in force.
	if ok, err := heard(100*time.Millisecond, 100); err != nil {
		return err
	} else if !ok {
		return fmt.Errorf("never called, through %d swaps", swapped)
	}
	stopLate()
	count := func() (n int, err error) {
		for range rounds {
			ok, err := heard(time.Second, 1)
			if err != nil {
				return n, err
			}
			if ok {
				n++
			}
		}
		return n, nil
	}
	before, beforeOthers := late.Load(), others.Load()
	n, err := count()
	if err != nil {
		return err
	}
	if n < rounds/2 {
		return fmt.Errorf("called after %d of %d swaps", n, rounds)
	}
	if n := others.Load() - beforeOthers; n > rounds/2 {
		return fmt.Errorf("a watch of another key was called %d times in %d swaps", n, rounds)
	}
	if n := late.Load() - before; n > 1 {
		return fmt.Errorf("called %d times after stop had returned", n)
	}
	return nil
}

func (c *cacheCase) clock() error {
	clock, ok := c.a.(sessionlock.Clock)
	if !ok {
		c.t.Log("no sessionlock.Clock: clients will use their own")
		return nil
	}
	var last time.Time
	for range 5 {
		now, err := clock.Now(c.ctx)
		if err != nil {
			return fmt.Errorf("Now: %w", err)
		}
		if off := time.Until(now).Abs(); off > 24*time.Hour {
			return fmt.Errorf("the clock is %v off: is it in another unit?", off)
		}
		if now.Before(last) {
			return fmt.Errorf("the clock went back by %v", last.Sub(now))
		}
		last = now
	}
	return nil
}

func (c *cacheCase) outage() error {
	key, v1, v2 := suite.Unique("k"), []byte("one"), []byte("two")
	if err := c.swaps(key, nil, v1, time.Hour); err != nil {
		return err
	}
	c.Outage(c.t, c.a)
	ctx, cancel := context.WithTimeout(c.ctx, time.Second)
	defer cancel()
	return suite.Ends(func() error {
		for _, key := range []string{key, suite.Unique("k")} {
			if v, err := c.a.Load(ctx, key); err == nil {
				return fmt.Errorf("Load during an outage = %s, nil", show(v))
			}
			if v, err := c.a.CompareAndSwap(ctx, key, nil, v2, time.Hour); err == nil {
				return fmt.Errorf("swap during an outage = %s, nil", show(v))
			}
		}
		if clock, ok := c.a.(sessionlock.Clock); ok {
			if now, err := clock.Now(ctx); err == nil && now.IsZero() {
				return errors.New("Now during an outage is the zero time without an error")
			}
		}
		return nil
	})
}
