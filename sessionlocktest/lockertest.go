package sessionlocktest

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sessionlock/sessionlock"
	"github.com/sessionlock/sessionlock/internal/suite"
)

// LockerTest shows whether an implementation of [sessionlock.Locker] can be
// relied on by a client. Only New is required; the fields are those of
// [CacheTest].
type LockerTest struct {
	// New returns a locker that works; it is called once for each case.
	New func(t *testing.T) sessionlock.Locker

	// Second returns another handle on l's store, as another process would have
	// it. Default: l itself.
	Second func(t *testing.T, l sessionlock.Locker) sessionlock.Locker

	// Outage makes l's store unreachable, until the end of the case at least.
	// Default: none, and the rules for outages are not looked at.
	Outage func(t *testing.T, l sessionlock.Locker)

	// Sleep lets d pass for the store, which may have a clock of its own in a
	// test. Default: time.Sleep.
	Sleep func(d time.Duration)

	// TTL is the shortest life that the store can give a lock and that the
	// machine can do a few calls in. A lock has to be free after twice that.
	// Default: 200 ms.
	TTL time.Duration

	// Prompt is more than a call to the store takes, on a machine as busy as
	// this one may be: a TryLock that takes longer is taken to have waited.
	// Default: 250 ms.
	Prompt time.Duration

	// In runs each case; synctest.Test puts each into a bubble of its own, New
	// and the other funcs included. Default: just runs it.
	In func(t *testing.T, f func(t *testing.T))
}

// Run runs every case as a subtest of t.
func (l LockerTest) Run(t *testing.T) {
	t.Helper()
	suite.Run(t, l.In, l.cases())
}

func (l LockerTest) cases() []suite.Case {
	if l.Sleep == nil {
		l.Sleep = time.Sleep
	}
	if l.TTL == 0 {
		l.TTL = 200 * time.Millisecond
	}
	if l.Prompt == 0 {
		l.Prompt = 250 * time.Millisecond
	}
	var cases []suite.Case
	add := func(name, rule string, run func(*lockerCase) error) {
		cases = append(cases, suite.Case{Name: name, Rule: rule, Run: func(t *testing.T) error { return run(l.open(t)) }})
	}
	add("Held", "TryLock takes a free lock, and refuses one that is held with ErrLocked, to every handle and the holder itself", (*lockerCase).held)
	add("NeverWaits", "TryLock never waits for the lock", (*lockerCase).neverWaits)
	add("Keys", "keys are independent, whatever printable ASCII they are made of, up to 128 bytes", (*lockerCase).keys)
	add("BadTTL", "a ttl under a millisecond is ErrInvalid, and takes no lock", (*lockerCase).badTTL)
	add("TTLs", "a ttl is a millisecond or more, not always in whole ones, and may be rounded up but not down", (*lockerCase).ttls)
	add("Expiry", "a lock that is not extended is free after its ttl", (*lockerCase).expiry)
	add("Extend", "Extend sets the remaining life, longer or shorter than it was", (*lockerCase).extend)
	add("ExtendExpired", "Extend of an expired lock is ErrNotHeld and does not take it again", (*lockerCase).extendExpired)
	add("ExtendUnlocked", "Extend of a lock that was unlocked is ErrNotHeld and does not take it again", (*lockerCase).extendUnlocked)
	add("Unlock", "Unlock frees the lock, for every handle", (*lockerCase).unlock)
	add("UnlockAgain", "Unlock of a lock that is no longer held is no error: unlocked before, at the same time, or expired", (*lockerCase).unlockAgain)
	add("NextHolder", "Extend and Unlock of a lost lock never touch the one of the next holder", (*lockerCase).nextHolder)
	add("OneWinner", "of any number of TryLocks at once exactly one is granted, the others are ErrLocked", (*lockerCase).oneWinner)
	add("Cancelled", "TryLock with a context that has ended returns soon; a free lock is not reported as held, and not left held for longer than its ttl", (*lockerCase).cancelled)
	if l.Outage != nil {
		add("Outage", "a store that cannot be reached is an error of its own: not ErrLocked, for which callers wait, not ErrNotHeld, and not a success", (*lockerCase).outage)
	}
	return cases
}

// lockerCase is one case's locker.
type lockerCase struct {
	LockerTest
	t    *testing.T
	ctx  context.Context //nolint:containedctx // lives exactly as long as the case
	a, b sessionlock.Locker
}

func (l LockerTest) open(t *testing.T) *lockerCase {
	t.Helper()
	c := &lockerCase{LockerTest: l, t: t, ctx: suite.Context(t), a: l.New(t)}
	c.b = c.a
	if l.Second != nil {
		c.b = l.Second(t, c.a)
	}
	return c
}

// take takes a lock that has to be free.
func (c *lockerCase) take(key string, ttl time.Duration) (sessionlock.Lock, error) {
	l, err := c.a.TryLock(c.ctx, key, ttl)
	if err != nil {
		return nil, fmt.Errorf("TryLock of a free lock: %w", err)
	}
	if l == nil {
		return nil, errors.New("TryLock returned no lock and no error")
	}
	return l, nil
}

// takeFor takes a lock for the short TTL and does f while it is held.
func (c *lockerCase) takeFor(f func(key string, l sessionlock.Lock) error) (key string, l sessionlock.Lock, err error) {
	err = suite.Timely(c.TTL, func() error {
		key = suite.Unique("k")
		if l, err = c.take(key, c.TTL); err != nil {
			return err
		}
		return f(key, l)
	})
	return key, l, err
}

// expired returns a lock that has expired.
func (c *lockerCase) expired() (key string, l sessionlock.Lock, err error) {
	key = suite.Unique("k")
	if l, err = c.take(key, c.TTL); err != nil {
		return "", nil, err
	}
	c.Sleep(2 * c.TTL)
	return key, l, nil
}

// isHeld checks that key's lock is refused to everybody.
func (c *lockerCase) isHeld(key string) error {
	for _, locker := range []sessionlock.Locker{c.a, c.b} {
		_, err := locker.TryLock(c.ctx, key, time.Hour)
		if err == nil {
			return errors.New("TryLock of a lock that is held was granted")
		}
		if !errors.Is(err, sessionlock.ErrLocked) {
			return fmt.Errorf("TryLock of a lock that is held: %w, want ErrLocked", err)
		}
	}
	return nil
}

// isFree checks that key's lock can be taken by another process.
func (c *lockerCase) isFree(key string) error {
	_, err := c.b.TryLock(c.ctx, key, time.Hour)
	if err != nil {
		return fmt.Errorf("TryLock of a free lock: %w", err)
	}
	return nil
}

func wantNotHeld(err error) error {
	if !errors.Is(err, sessionlock.ErrNotHeld) {
		return fmt.Errorf("Extend of a lock that is not held: %v, want ErrNotHeld", err)
	}
	return nil
}

func (c *lockerCase) held() error {
	key := suite.Unique("k")
	if _, err := c.take(key, time.Hour); err != nil {
		return err
	}
	if err := c.isHeld(key); err != nil {
		return err
	}
	return c.isHeld(key) // being refused changes nothing
}

// neverWaits takes the best of a few tries, for busy machines. Its contexts end,
// for lockers that wait until then.
func (c *lockerCase) neverWaits() error {
	key := suite.Unique("k")
	if _, err := c.take(key, time.Hour); err != nil {
		return err
	}
	best := time.Duration(-1)
	for range 3 {
		ctx, cancel := context.WithTimeout(c.ctx, 4*c.Prompt)
		start := time.Now()
		_, err := c.b.TryLock(ctx, key, time.Hour)
		took := time.Since(start)
		cancel()
		if err == nil {
			return errors.New("TryLock of a lock that is held was granted")
		}
		if best < 0 || took < best {
			best = took
		}
	}
	if best > c.Prompt {
		return fmt.Errorf("TryLock of a lock that is held took %v, at best of three", best)
	}
	return nil
}

func (c *lockerCase) keys() error {
	base := suite.Unique("")
	long := func(n int) string { return fmt.Sprintf("%s%0*d", base, n-len(base), 0) }
	keys := []string{long(128), long(127)}
	for _, k := range suite.Awkward() {
		keys = append(keys, base+k)
	}
	locks := make([]sessionlock.Lock, len(keys))
	for i, key := range keys {
		l, err := c.take(key, time.Hour)
		if err != nil {
			return fmt.Errorf("key %q, with locks of other keys held: %w", key, err)
		}
		locks[i] = l
	}
	for i := 0; i < len(keys); i += 2 {
		if err := locks[i].Unlock(c.ctx); err != nil {
			return fmt.Errorf("key %q: Unlock: %w", keys[i], err)
		}
	}
	for i, key := range keys {
		check := c.isHeld
		if i%2 == 0 {
			check = c.isFree
		}
		if err := check(key); err != nil {
			return fmt.Errorf("key %q, with others unlocked: %w", key, err)
		}
	}
	return nil
}

func (c *lockerCase) badTTL() error {
	for _, ttl := range []time.Duration{0, -1, -time.Hour, 1, time.Millisecond - 1} {
		key := suite.Unique("k")
		if _, err := c.a.TryLock(c.ctx, key, ttl); !errors.Is(err, sessionlock.ErrInvalid) {
			return fmt.Errorf("TryLock with a ttl of %v: %v, want ErrInvalid", ttl, err)
		}
		if err := c.isFree(key); err != nil {
			return fmt.Errorf("after a TryLock with a ttl of %v: %w", ttl, err)
		}
	}
	return nil
}

func (c *lockerCase) ttls() error {
	for _, ttl := range []time.Duration{time.Millisecond, 1500 * time.Microsecond, 24 * time.Hour} {
		key := suite.Unique("k")
		if _, err := c.take(key, ttl); err != nil {
			return fmt.Errorf("with a ttl of %v: %w", ttl, err)
		}
		if ttl < time.Hour {
			continue
		}
		c.Sleep(time.Millisecond)
		if err := c.isHeld(key); err != nil {
			return fmt.Errorf("a millisecond after it was locked for %v: %w", ttl, err)
		}
	}
	return nil
}

func (c *lockerCase) expiry() error {
	key, _, err := c.takeFor(func(key string, _ sessionlock.Lock) error { return c.isHeld(key) })
	if err != nil {
		return err
	}
	c.Sleep(2 * c.TTL)
	if err := c.isFree(key); err != nil {
		return fmt.Errorf("%v after it was locked for %v: %w", 2*c.TTL, c.TTL, err)
	}
	return nil
}

func (c *lockerCase) extend() error {
	longer, held, err := c.takeFor(func(_ string, l sessionlock.Lock) error { return l.Extend(c.ctx, time.Hour) })
	if err != nil {
		return fmt.Errorf("extend a lock that is held: %w", err)
	}
	shorter := suite.Unique("k")
	l, err := c.take(shorter, time.Hour)
	if err != nil {
		return err
	}
	if err := l.Extend(c.ctx, c.TTL); err != nil {
		return fmt.Errorf("extend a lock that is held: %w", err)
	}
	c.Sleep(2 * c.TTL)
	if err := c.isHeld(longer); err != nil {
		return fmt.Errorf("extended to an hour, %v after its first ttl: %w", c.TTL, err)
	}
	if err := c.isFree(shorter); err != nil {
		return fmt.Errorf("extended to %v in place of an hour, %v later: %w", c.TTL, 2*c.TTL, err)
	}
	if err := held.Extend(c.ctx, time.Hour); err != nil {
		return fmt.Errorf("extend a lock for the second time: %w", err)
	}
	if err := held.Unlock(c.ctx); err != nil {
		return fmt.Errorf("unlock a lock that was extended: %w", err)
	}
	return c.isFree(longer)
}

func (c *lockerCase) extendExpired() error {
	key, l, err := c.expired()
	if err != nil {
		return err
	}
	if err := wantNotHeld(l.Extend(c.ctx, time.Hour)); err != nil {
		return err
	}
	if err := c.isFree(key); err != nil {
		return fmt.Errorf("after an Extend that came too late: %w", err)
	}
	return nil
}

func (c *lockerCase) extendUnlocked() error {
	key := suite.Unique("k")
	l, err := c.take(key, time.Hour)
	if err != nil {
		return err
	}
	if err := l.Unlock(c.ctx); err != nil {
		return fmt.Errorf("Unlock: %w", err)
	}
	if err := wantNotHeld(l.Extend(c.ctx, time.Hour)); err != nil {
		return err
	}
	if err := c.isFree(key); err != nil {
		return fmt.Errorf("after an Extend that followed Unlock: %w", err)
	}
	return nil
}

func (c *lockerCase) unlock() error {
	key := suite.Unique("k")
	l, err := c.take(key, time.Hour)
	if err != nil {
		return err
	}
	if err := l.Unlock(c.ctx); err != nil {
		return fmt.Errorf("Unlock: %w", err)
	}
	return c.isFree(key)
}

func (c *lockerCase) unlockAgain() error {
	key := suite.Unique("k")
	l, err := c.take(key, time.Hour)
	if err != nil {
		return err
	}
	if err := suite.Crowd(10, func(int) error { return l.Unlock(c.ctx) }); err != nil {
		return fmt.Errorf("Unlock, ten at once: %w", err)
	}
	if err := l.Unlock(c.ctx); err != nil {
		return fmt.Errorf("Unlock of a lock that was unlocked: %w", err)
	}
	if err := c.isFree(key); err != nil {
		return err
	}
	_, l, err = c.expired()
	if err != nil {
		return err
	}
	if err := l.Unlock(c.ctx); err != nil {
		return fmt.Errorf("Unlock of an expired lock: %w", err)
	}
	return nil
}

// nextHolder loses a lock in each of the two ways, lets somebody else take it,
// and then does everything the loser might still do.
func (c *lockerCase) nextHolder() error {
	unlocked := func() (string, sessionlock.Lock, error) {
		key := suite.Unique("k")
		l, err := c.take(key, time.Hour)
		if err == nil {
			err = l.Unlock(c.ctx)
		}
		return key, l, err
	}
	for how, lose := range map[string]func() (string, sessionlock.Lock, error){"expired": c.expired, "unlocked": unlocked} {
		key, lost, err := lose()
		if err != nil {
			return err
		}
		next, err := c.b.TryLock(c.ctx, key, time.Hour)
		if err != nil {
			return fmt.Errorf("TryLock of a lock that was %s: %w", how, err)
		}
		if err := c.untouched(key, lost, next); err != nil {
			return fmt.Errorf("a lock that was %s and taken by another holder: %w", how, err)
		}
	}
	return nil
}

func (c *lockerCase) untouched(key string, lost, next sessionlock.Lock) error {
	for range 2 {
		if err := wantNotHeld(lost.Extend(c.ctx, time.Millisecond)); err != nil {
			return err
		}
		if err := lost.Unlock(c.ctx); err != nil {
			return fmt.Errorf("Unlock by the loser: %w", err)
		}
		c.Sleep(2 * time.Millisecond)
		if err := c.isHeld(key); err != nil {
			return fmt.Errorf("after the loser's Extend and Unlock: %w", err)
		}
	}
	if err := next.Extend(c.ctx, time.Hour); err != nil {
		return fmt.Errorf("Extend by the new holder: %w", err)
	}
	if err := next.Unlock(c.ctx); err != nil {
		return fmt.Errorf("Unlock by the new holder: %w", err)
	}
	return c.isFree(key)
}

func (c *lockerCase) oneWinner() error {
	for range 5 {
		key := suite.Unique("k")
		var won atomic.Int64
		const n = 50
		if err := suite.Crowd(n, func(i int) error {
			locker := c.a
			if i%2 == 1 {
				locker = c.b
			}
			_, err := locker.TryLock(c.ctx, key, time.Hour)
			if err == nil {
				won.Add(1)
			}
			if errors.Is(err, sessionlock.ErrLocked) {
				return nil
			}
			return err
		}); err != nil {
			return fmt.Errorf("TryLock in a race of %d: %w", n, err)
		}
		if won.Load() != 1 {
			return fmt.Errorf("%d of %d TryLocks at once were granted", won.Load(), n)
		}
	}
	return nil
}

func (c *lockerCase) cancelled() error {
	ctx, cancel := context.WithCancel(c.ctx)
	cancel()
	key := suite.Unique("k")
	if err := suite.Ends(func() error {
		if _, err := c.a.TryLock(ctx, key, c.TTL); errors.Is(err, sessionlock.ErrLocked) {
			return fmt.Errorf("TryLock of a free lock with a cancelled context: %w", err)
		}
		return nil
	}); err != nil {
		return err
	}
	c.Sleep(2 * c.TTL)
	return c.isFree(key)
}

func (c *lockerCase) outage() error {
	held, err := c.take(suite.Unique("held"), time.Hour)
	if err != nil {
		return err
	}
	c.Outage(c.t, c.a)
	ctx, cancel := context.WithTimeout(c.ctx, time.Second)
	defer cancel()
	return suite.Ends(func() error {
		if _, err := c.a.TryLock(ctx, suite.Unique("k"), time.Hour); err == nil || errors.Is(err, sessionlock.ErrLocked) {
			return fmt.Errorf("TryLock during an outage: %v", err)
		}
		if err := held.Extend(ctx, time.Hour); err == nil || errors.Is(err, sessionlock.ErrNotHeld) {
			return fmt.Errorf("Extend during an outage: %v", err)
		}
		if err := held.Unlock(ctx); err == nil {
			return errors.New("Unlock during an outage: no error, though nothing was unlocked")
		}
		return nil
	})
}
