package sessionlocktest_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/sessionlock/sessionlock"
	"github.com/sessionlock/sessionlock/sessionlocktest"
)

// faultyLocker is a right locker until one of its fields, each of which stands
// for a mistake, is set.
type faultyLocker struct {
	mu      sync.Mutex
	holders map[string]*faultyLock
	down    bool

	outage      error                                                            // instead of errDown
	refused     error                                                            // instead of ErrLocked
	waits       bool                                                             // until the context ends
	minTTL      time.Duration                                                    // under it: ErrInvalid
	truncates   bool                                                             // a ttl to whole seconds
	forever     bool                                                             // locks do not expire
	reentrant   bool                                                             // one process is one holder
	cancelled   error                                                            // for a context that has ended
	leaves      bool                                                             // a lock for ever when the context has ended
	fold        func(key string) string                                          // keys that are one
	twoSteps    bool                                                             // asks, then takes
	extend      func(l *faultyLock, ttl time.Duration, holds bool) (error, bool) // answers, and whether that is all
	unlockAny   bool                                                             // frees whoever holds
	unlockNone  bool                                                             // frees nothing
	unlockTwice error                                                            // when it is no longer held
	unlockDown  bool                                                             // an outage is fine
}

type faultyLock struct {
	of   *faultyLocker
	key  string
	ends time.Time
}

func (l *faultyLocker) TryLock(ctx context.Context, key string, ttl time.Duration) (sessionlock.Lock, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if ttl < l.minTTL {
		return nil, sessionlock.ErrInvalid
	}
	if ctx.Err() != nil && l.cancelled != nil {
		return nil, l.cancelled
	}
	if l.down {
		return nil, l.outage
	}
	if l.fold != nil {
		key = l.fold(key)
	}
	if l.truncates {
		ttl = ttl.Truncate(time.Second)
	}
	if l.forever || l.leaves && ctx.Err() != nil {
		ttl = 1000 * time.Hour
	}
	if l.holds(key) && !l.reentrant {
		if l.waits {
			l.mu.Unlock()
			<-ctx.Done()
			l.mu.Lock()
		}
		return nil, l.refused
	}
	if l.twoSteps {
		l.mu.Unlock()
		time.Sleep(time.Millisecond)
		l.mu.Lock()
	}
	lock := &faultyLock{l, key, time.Now().Add(ttl)}
	l.holders[key] = lock
	return lock, nil
}

func (l *faultyLocker) holds(key string) bool {
	h := l.holders[key]
	return h != nil && time.Now().Before(h.ends)
}

func (k *faultyLock) Extend(_ context.Context, ttl time.Duration) error {
	l := k.of
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.down {
		return l.outage
	}
	holds := l.holders[k.key] == k && l.holds(k.key)
	if l.extend != nil {
		if err, done := l.extend(k, ttl, holds); done {
			return err
		}
	}
	if !holds {
		return sessionlock.ErrNotHeld
	}
	k.ends = time.Now().Add(ttl)
	return nil
}

func (k *faultyLock) Unlock(context.Context) error {
	l := k.of
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.down && l.unlockDown, l.unlockNone:
		return nil
	case l.down:
		return l.outage
	case l.unlockAny, l.holders[k.key] == k && l.holds(k.key):
		delete(l.holders, k.key)
		return nil
	}
	return l.unlockTwice
}

func faultyLockerSuite(fault func(l *faultyLocker)) sessionlocktest.LockerTest {
	return sessionlocktest.LockerTest{
		New: func(*testing.T) sessionlock.Locker {
			l := &faultyLocker{holders: map[string]*faultyLock{}, minTTL: time.Millisecond, outage: errDown, refused: sessionlock.ErrLocked}
			fault(l)
			return l
		},
		Outage: func(_ *testing.T, l sessionlock.Locker) { l.(*faultyLocker).down = true },
		In:     synctest.Test,
	}
}

func TestLocker(t *testing.T) {
	suite := faultyLockerSuite(func(*faultyLocker) {})
	t.Run("bubble", suite.Run)
	suite.In = nil
	suite.TTL = 50 * time.Millisecond
	t.Run("real time", suite.Run)
}

func TestLockerTestUsesItsHooks(t *testing.T) {
	var second, slept int
	suite := faultyLockerSuite(func(*faultyLocker) {})
	suite.Second = func(_ *testing.T, l sessionlock.Locker) sessionlock.Locker { second++; return l }
	suite.Sleep = func(d time.Duration) { slept++; time.Sleep(d) }
	suite.Run(t)
	assert.Positive(t, second)
	assert.Positive(t, slept)
}

func TestLockerTestCatches(t *testing.T) {
	idle := sessionlocktest.Cases(faultyLockerSuite(nil)) // cases that have caught nothing
	for name, tt := range map[string]struct {
		fault func(l *faultyLocker)
		by    string
	}{
		"a lock that is granted again to the same process": {func(l *faultyLocker) { l.reentrant = true }, "Held"},
		"a held lock reported as any error":                {func(l *faultyLocker) { l.refused = errors.New("held") }, "Held"},
		"a TryLock that waits":                             {func(l *faultyLocker) { l.waits = true }, "NeverWaits"},
		"keys in a folding collation":                      {func(l *faultyLocker) { l.fold = strings.ToUpper }, "Keys"},
		"keys cut at 64 bytes":                             {func(l *faultyLocker) { l.fold = func(k string) string { return k[:min(len(k), 64)] } }, "Keys"},
		"a ttl under a millisecond that is accepted":       {func(l *faultyLocker) { l.minTTL = -1000 * time.Hour }, "BadTTL"},
		"a ttl in whole seconds, rounded down":             {func(l *faultyLocker) { l.truncates = true }, "Extend"},
		"a ttl under two milliseconds that is refused":     {func(l *faultyLocker) { l.minTTL = 2 * time.Millisecond }, "TTLs"},
		"a lock that never expires":                        {func(l *faultyLocker) { l.forever = true }, "Expiry"},
		"a lock in two steps":                              {func(l *faultyLocker) { l.twoSteps = true }, "OneWinner"},
		"a cancelled TryLock reported as held":             {func(l *faultyLocker) { l.cancelled = sessionlock.ErrLocked }, "Cancelled"},
		"a cancelled TryLock that leaves a lock for ever":  {func(l *faultyLocker) { l.leaves = true }, "Cancelled"},
		"a query failure reported as held":                 {func(l *faultyLocker) { l.outage = sessionlock.ErrLocked }, "Outage"},
		"an outage reported as not held":                   {func(l *faultyLocker) { l.outage = sessionlock.ErrNotHeld }, "Outage"},
		"an outage reported as success":                    {func(l *faultyLocker) { l.outage = nil }, "Outage"},
		"an Unlock that succeeds in an outage":             {func(l *faultyLocker) { l.unlockDown = true }, "Outage"},
		"an Unlock that frees somebody else's":             {func(l *faultyLocker) { l.unlockAny = true }, "NextHolder"},
		"an Unlock that frees nothing":                     {func(l *faultyLocker) { l.unlockNone = true }, "Unlock"},
		"an Unlock that wants to be the first":             {func(l *faultyLocker) { l.unlockTwice = sessionlock.ErrNotHeld }, "UnlockAgain"},
		"an Extend that takes an expired lock again": {func(l *faultyLocker) {
			l.extend = func(k *faultyLock, ttl time.Duration, _ bool) (error, bool) {
				if l.holders[k.key] == k {
					k.ends = time.Now().Add(ttl)
					return nil, true
				}
				return nil, false
			}
		}, "ExtendExpired"},
		"an Extend that takes an expired lock again and says no": {func(l *faultyLocker) {
			l.extend = func(k *faultyLock, ttl time.Duration, holds bool) (error, bool) {
				if !holds && l.holders[k.key] == k {
					k.ends = time.Now().Add(ttl)
				}
				return nil, false
			}
		}, "ExtendExpired"},
		"an Extend that takes an unlocked lock again": {func(l *faultyLocker) {
			l.extend = func(k *faultyLock, ttl time.Duration, _ bool) (error, bool) {
				if l.holders[k.key] == nil {
					l.holders[k.key] = k
					k.ends = time.Now().Add(ttl)
					return nil, true
				}
				return nil, false
			}
		}, "ExtendUnlocked"},
		"an Extend that shortens somebody else's": {func(l *faultyLocker) {
			l.extend = func(k *faultyLock, ttl time.Duration, holds bool) (error, bool) {
				if h := l.holders[k.key]; h != nil && !holds {
					h.ends = time.Now().Add(ttl)
				}
				return nil, false
			}
		}, "NextHolder"},
		"an Extend that is not told of the loss": {func(l *faultyLocker) {
			l.extend = func(_ *faultyLock, _ time.Duration, holds bool) (error, bool) { return nil, !holds }
		}, "ExtendExpired"},
		"an Extend that does nothing": {func(l *faultyLocker) {
			l.extend = func(_ *faultyLock, _ time.Duration, holds bool) (error, bool) { return nil, holds }
		}, "Extend"},
		"an Extend that only lengthens": {func(l *faultyLocker) {
			l.extend = func(k *faultyLock, ttl time.Duration, holds bool) (error, bool) {
				return nil, holds && time.Until(k.ends) > ttl
			}
		}, "Extend"},
	} {
		t.Run(name, func(t *testing.T) {
			assert.Contains(t, sessionlocktest.Broken(t, faultyLockerSuite(tt.fault)), tt.by)
		})
		idle = slices.DeleteFunc(idle, func(name string) bool { return name == tt.by })
	}
	assert.Empty(t, idle, "nothing here shows that these cases can fail")
}
