package sessionlock

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/bsm/redislock"
	"github.com/redis/go-redis/v9"

	"github.com/sessionlock/sessionlock/internal/entry"
	"github.com/sessionlock/sessionlock/internal/lua"
)

// Locker makes logins rare: whoever holds the lock of a key may log in.
// Correctness does not rest on it, the [Cache] sees to that, so a lock that is
// lost costs a login and nothing else. sessionlocktest.LockerTest shows whether
// an implementation is right. Keys are printable ASCII of at most 128 bytes.
// It must be safe for concurrent use.
type Locker interface {
	// TryLock tries once and never waits. It returns ErrLocked when somebody
	// else holds the lock; any other error means that the lock could not be
	// asked for. A ttl under a millisecond is ErrInvalid. Each call is a holder
	// of its own, so a second call of the same process is refused too.
	TryLock(ctx context.Context, key string, ttl time.Duration) (Lock, error)
}

// Lock is a lock that is held. Both methods compare the holder: a lock that was
// lost and taken by somebody else is never touched.
type Lock interface {
	// Extend sets the remaining life to ttl, at least a millisecond as for
	// TryLock. ErrNotHeld when the lock was lost or unlocked; it is not taken
	// again.
	Extend(ctx context.Context, ttl time.Duration) error
	// Unlock frees the lock. A lock that is no longer held is no error.
	Unlock(ctx context.Context) error
}

func checkTTL(ttl time.Duration) error {
	if ttl < time.Millisecond {
		return fmt.Errorf("%w: lock ttl under 1ms", ErrInvalid)
	}
	return nil
}

// redisLocker is the Redis NX lock, by redislock. Only its single attempts are
// used: its retry loop caps the wait at the TTL, waits for the lock where we
// wait for the result, and its LimitRetry is spent after one use. It is never
// given a token of ours, because it compares tokens by prefix.
type redisLocker struct {
	rdb redis.UniversalClient
	rl  *redislock.Client
}

func newRedisLocker(rdb redis.UniversalClient) *redisLocker {
	return &redisLocker{rdb: rdb, rl: redislock.New(rdb)}
}

// TryLock survives being executed twice: the second copy finds its own random
// token and is granted the lock it already has.
func (l *redisLocker) TryLock(ctx context.Context, key string, ttl time.Duration) (Lock, error) {
	if err := checkTTL(ttl); err != nil { // redislock answers "held" and sets a lock that never was
		return nil, err
	}
	held, err := l.rl.Obtain(ctx, key, ttl, nil)
	if errors.Is(err, redislock.ErrNotObtained) {
		return nil, l.heal(ctx, key, ttl)
	}
	if err != nil {
		return nil, redisError(ctx, l.rdb, "lock", err)
	}
	return redisLock{l.rdb, held}, nil
}

// heal gives a lock without a sane TTL the configured one, and returns ErrLocked.
func (l *redisLocker) heal(ctx context.Context, key string, ttl time.Duration) error {
	if err := lua.Heal.Run(ctx, l.rdb, []string{key}, ttl.Milliseconds()).Err(); err != nil {
		return redisError(ctx, l.rdb, "heal lock", err)
	}
	return ErrLocked
}

type redisLock struct {
	rdb  redis.UniversalClient
	held *redislock.Lock
}

func (l redisLock) Extend(ctx context.Context, ttl time.Duration) error {
	if err := checkTTL(ttl); err != nil {
		return err
	}
	err := l.held.Refresh(ctx, ttl, nil)
	if errors.Is(err, redislock.ErrNotObtained) {
		return ErrNotHeld
	}
	if err != nil {
		return redisError(ctx, l.rdb, "extend lock", err)
	}
	return nil
}

// Unlock counts "not held" as done: it is also what a repeated release reports
// whose first copy did the work.
func (l redisLock) Unlock(ctx context.Context) error {
	err := l.held.Release(ctx)
	if err != nil && !errors.Is(err, redislock.ErrLockNotHeld) {
		return redisError(ctx, l.rdb, "unlock", err)
	}
	return nil
}

// cacheLocker makes a Locker of any Cache: absent is NX, the holder is the
// value, and a freed lock is a value of its own that is as good as absent.
type cacheLocker struct{ cache Cache }

const lockFree = 'f'

func (l cacheLocker) TryLock(ctx context.Context, key string, ttl time.Duration) (Lock, error) {
	if err := checkTTL(ttl); err != nil {
		return nil, err
	}
	old, err := l.cache.Load(ctx, key)
	if err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	if old != nil && old[0] != lockFree {
		return nil, ErrLocked
	}
	held := &cacheLock{cache: l.cache, key: key, turn: make(chan struct{}, 1), value: old}
	err = held.swap(ctx, 'h', ttl)
	if errors.Is(err, ErrNotHeld) {
		return nil, ErrLocked
	}
	if err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	return held, nil
}

// cacheLock takes one call at a time: an Extend that its caller has left behind
// may still run when Unlock comes, and would leave it a value that is not ours.
type cacheLock struct {
	cache Cache
	key   string
	turn  chan struct{} // taken while a call runs; the rest is of whose turn it is
	value []byte        // what is stored while we hold it
	freed bool          // it is ours no more, although what is stored still is
}

// swap replaces what is stored by a fresh value of the given kind.
func (l *cacheLock) swap(ctx context.Context, kind byte, ttl time.Duration) error {
	select {
	case l.turn <- struct{}{}:
		defer func() { <-l.turn }()
	case <-ctx.Done():
		return ctx.Err()
	}
	if l.freed {
		return ErrNotHeld
	}
	n := entry.NewNonce()
	next := append([]byte{kind}, n[:]...)
	now, err := l.cache.CompareAndSwap(ctx, l.key, l.value, next, ttl)
	if err != nil {
		return err
	}
	if string(now) != string(next) {
		return ErrNotHeld
	}
	l.value, l.freed = next, kind == lockFree
	return nil
}

func (l *cacheLock) Extend(ctx context.Context, ttl time.Duration) error {
	if err := checkTTL(ttl); err != nil {
		return err
	}
	err := l.swap(ctx, 'h', ttl)
	if err != nil && !errors.Is(err, ErrNotHeld) {
		return fmt.Errorf("extend lock: %w", err)
	}
	return err
}

func (l *cacheLock) Unlock(ctx context.Context) error {
	err := l.swap(ctx, lockFree, time.Second)
	if err != nil && !errors.Is(err, ErrNotHeld) {
		return fmt.Errorf("unlock: %w", err)
	}
	return nil
}

// holder names this process to operators, in entries.
func holder() string {
	host, _ := os.Hostname()
	return fmt.Sprintf("%s/%d", host[:min(len(host), 40)], os.Getpid())
}
