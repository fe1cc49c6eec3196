// check.go is Check alone: what an operator asks once, kept out of the files that
// every call runs through.

package sessionlock

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/sessionlock/sessionlock/internal/entry"
)

// CheckError is one finding of [Client.Check]. It matches [ErrUnavailable] when the
// client cannot work like that; otherwise it is advice.
type CheckError struct {
	Subject string // cache, lock, push, clock, redis
	Finding string
	Advice  string
	Err     error // what was met; nil: the finding is all
}

// Error names subject and finding, and says what to do.
func (e *CheckError) Error() string {
	s := "sessionlock: check " + e.Subject + ": " + e.Finding
	if e.Err != nil {
		s += " (" + e.Err.Error() + ")"
	}
	return s + ": " + e.Advice
}

// Unwrap returns what was met.
func (e *CheckError) Unwrap() error { return e.Err }

// Check tries everything a client needs, on names of its own: cache and lock
// can be used and do what they should, pushes arrive, this host's clock agrees
// with the store's to within the expiry margin, and, of Redis where the user
// may read INFO: version, eviction policy, persistence. It touches no session
// and makes no login. nil: nothing to say. Else every finding, as a
// [*CheckError] each, joined as by errors.Join; for a readiness probe
// errors.Is(err, ErrUnavailable) is the question, the rest is advice to
// operators. It asks also while calls are refused because the store is known to
// be dead, and takes a few round trips; without pushes the operation timeout;
// and three of them when nothing answers. Its names are of one key: of a
// Cluster one node is tried, the others are asked for INFO only.
func (c *Client) Check(ctx context.Context) error {
	if err := checkContext(ctx); err != nil {
		return err
	}
	if !c.enter() {
		return fmt.Errorf("%w: check", ErrClosed)
	}
	defer c.running.Done()
	p := &probe{c: c, name: c.names.Entry("", fmt.Sprintf("%x", entry.NewNonce()))} // no user's key is ""
	p.checkCache(ctx)
	works := len(p.found) == 0
	p.checkLock(ctx) // which may be elsewhere
	if works {
		p.checkPush(ctx)
		p.checkClock(ctx)
	}
	if c.rdb != nil {
		p.found = append(p.found, checkRedis(ctx, c.opTimeout, c.rdb)...)
	}
	if ctx.Err() != nil {
		return fmt.Errorf("sessionlock: check: %w", context.Cause(ctx))
	}
	return errors.Join(p.found...)
}

// probe is one Check on its way.
type probe struct {
	c     *Client
	name  string // of the entry it plays with
	value []byte // what that holds
	found []error
}

const probeTTL = 10 * time.Second

// The rights that each step needs of a Redis user. Redis 7.0 does not say which
// command a script was refused.
const (
	rightsWrite  = "+eval +evalsha +getrange +set +publish"
	rightsRead   = "+getrange"
	rightsTake   = "+eval +evalsha +getrange +msetnx +mset +pexpire +pttl"
	rightsExtend = "+eval +evalsha +mget +pexpire"
	rightsFree   = "+eval +evalsha +mget +del"
	rightsClock  = "+time"
)

// mayDo is the advice for a call that failed.
func mayDo(rights string) string {
	return "see that the store is up and its address right; a Redis user of its own needs " + rights + ", see docs/promises.md"
}

func (p *probe) finds(subject, finding, advice string, err error) {
	p.found = append(p.found, &CheckError{subject, finding, advice, err})
}

// broken is a finding that the client cannot work with.
func (p *probe) broken(subject, finding, advice string) {
	p.finds(subject, finding, advice, ErrUnavailable)
}

// probing makes one call through an urged gate: Check is for those who want to
// know now.
func probing[T any](ctx context.Context, g *gate, op func(context.Context) (T, error)) (T, error) {
	g.urge()
	return bounded(ctx, g, op, nil)
}

// swap replaces the probe's value by another and reports whether that is stored.
func (p *probe) swap(ctx context.Context) (bool, error) {
	old, next := p.value, entry.NewNonce() // a call that is left behind goes on reading them
	now, err := probing(ctx, p.c.store.gate, func(ctx context.Context) ([]byte, error) {
		return p.c.store.cache.CompareAndSwap(ctx, p.name, old, next[:], probeTTL)
	})
	p.value = next[:]
	return bytes.Equal(now, next[:]), err
}

func (p *probe) checkCache(ctx context.Context) {
	swapped, err := p.swap(ctx)
	if err != nil {
		p.finds("cache", "cannot be written", mayDo(rightsWrite), err)
		return
	}
	now, err := probing(ctx, p.c.store.gate, func(ctx context.Context) ([]byte, error) {
		return p.c.store.cache.Load(ctx, p.name)
	})
	switch {
	case err != nil:
		p.finds("cache", "cannot be read", mayDo(rightsRead), err)
	case !swapped, !bytes.Equal(now, p.value):
		p.broken("cache", "a value that was just written is not read back",
			"read from the primary: no ReadOnly, RouteByLatency or RouteRandomly in the options of go-redis; run sessionlocktest.CacheTest against a cache of your own")
	}
}

// checkPush wants two wake-ups: the first may only say that the watch stands.
func (p *probe) checkPush(ctx context.Context) {
	c := p.c
	if c.store.watcher == nil {
		return
	}
	changed, stop := c.store.watch(p.name)
	defer stop()
	for range 2 {
		late := time.NewTimer(c.opTimeout)
		defer late.Stop()
		for woken := false; !woken; {
			if _, err := p.swap(ctx); err != nil {
				p.finds("cache", "cannot be written", mayDo(rightsWrite), err)
				return
			}
			again := time.NewTimer(50 * time.Millisecond) // the watch may not have stood yet
			select {
			case <-changed:
				woken = true
			case <-again.C:
			case <-late.C:
				p.finds("push", fmt.Sprintf("no wake-up arrived within %v", c.opTimeout),
					fmt.Sprintf("allow +subscribe +unsubscribe and the channels &sl:*, and see that a proxy before Redis forwards them; until then who waits for a login learns of its end up to %v later", c.contention.delay), nil)
				return
			case <-ctx.Done():
				return
			}
			again.Stop()
		}
	}
}

func (p *probe) checkLock(ctx context.Context) {
	c, name := p.c, p.c.names.Lock("", p.name)
	try := func(ctx context.Context) (Lock, error) { return c.store.locker.TryLock(ctx, name, c.lockTTL) }
	held, err := probing(ctx, c.store.lockGate, try)
	if err != nil {
		p.finds("lock", "cannot be taken", mayDo(rightsTake), err)
		return
	}
	if _, err = probing(ctx, c.store.lockGate, try); !errors.Is(err, ErrLocked) {
		if err == nil {
			p.broken("lock", "it was granted twice", "run sessionlocktest.LockerTest against a locker of your own")
		} else {
			p.finds("lock", "cannot be asked for while it is held", mayDo(rightsTake), err)
		}
	}
	call := func(what, rights string, f func(context.Context) error) {
		if _, err := probing(ctx, c.store.lockGate, func(ctx context.Context) (struct{}, error) { return struct{}{}, f(ctx) }); err != nil {
			p.finds("lock", "cannot be "+what, mayDo(rights), err)
		}
	}
	call("extended", rightsExtend, func(ctx context.Context) error { return held.Extend(ctx, c.lockTTL) })
	call("freed", rightsFree, held.Unlock)
}

func (p *probe) checkClock(ctx context.Context) {
	c := p.c
	if c.store.clock.face == nil {
		return
	}
	sent := time.Now()
	remote, err := probing(ctx, c.store.gate, c.store.clock.face.Now)
	if err != nil {
		p.finds("clock", "cannot be read", mayDo(rightsClock), err)
		return
	}
	here := sent.Add(time.Since(sent) / 2)
	if off := here.Sub(remote).Round(time.Millisecond); off.Abs() > max(c.margin, time.Second) {
		p.finds("clock", fmt.Sprintf("this host's is %v off the store's", off),
			"synchronise both by NTP: the Expiry that a login returns is judged by this host's clock", nil)
	}
}
