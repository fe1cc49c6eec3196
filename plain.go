// plain.go is the adapter for stores that cannot compare, kept out of cache.go
// because it promises less than a Cache does, and that takes a page to say.

package sessionlock

import (
	"bytes"
	"context"
	"strconv"
	"time"

	"github.com/sessionlock/sessionlock/internal/entry"
)

// PlainStore is a store that can read and write and nothing else: memcached
// without cas, a key-value service of one's own, a directory of files.
// [PlainCache] makes a [Cache] of it. Nothing is ever deleted, only its ttl ends
// a value.
//
// Values are those of a Cache, and callers own the slices they pass and get.
// Keys are printable ASCII of at most 151 bytes: those of a Cache, and longer
// ones made of them. Some differ in case only or contain what means something to
// a path, so files are better named by a hash. A PlainStore must be safe for
// concurrent use and should end with its context: a Set that goes on alone
// overwrites what others have stored meanwhile.
type PlainStore interface {
	// Get returns the value of key. It sees every Set that returned before Get was
	// called, in whichever process: a replica that lags behind will not do. A
	// missing or expired value is nil, nil, and an empty one counts as missing; err
	// is for failures of the store itself.
	Get(ctx context.Context, key string) ([]byte, error)

	// Set stores value under key for ttl, whatever is there. ttl is at least a
	// millisecond and may be days; a store may round it up. With an error the value
	// may be stored or not.
	Set(ctx context.Context, key string, value []byte, ttl time.Duration) error
}

// PlainCache makes a [Cache] of a store that cannot compare. It is weaker than
// any other: a swap is a Get, a comparison, a Set, and a Get that tells what came
// of it, and somebody else's Set may come in between. Use it where there is
// nothing better, and with a [Locker] that can be relied on where there is one:
// WithRedis(rdb) and WithCache(PlainCache(s)) keep the lock in Redis and the
// rest in s.
//
// What holds, whatever comes in between:
//
//   - Calls that follow one another, in any number of processes, do what they do
//     on any Cache.
//   - A session is never taken for that of another key (P3): its record names the
//     key.
//   - Invalidating the stored session overwrites nothing. It sets a mark under a
//     key of its own, made of key and generation, and the mark's value stands in
//     for the key's while that has the dead session. So a newer session is never
//     lost to a late rejection, and a newer login under way goes on.
//   - A session that was so invalidated stays dead, though somebody slower writes
//     the value that still had it: marks outlive that.
//
// What does not hold: of the swaps that start from one value and meet between
// their Get and their Set, each may be told that it succeeded, and the last Set
// stays. Hence:
//
//   - A lock kept in such a cache may be granted to several processes at once,
//     and each of them logs in (P1, P4).
//   - A session that was just stored may be overwritten, also by one that is older
//     or by an entry without any (P2). It then lives upstream until its own end.
//   - A failure that was just recorded may be lost, and counts with it. What bounds
//     the logins then is what each process counts for itself (P5).
//   - A Logout or Unsuppress may be undone by a login that is stored at the same
//     moment, or undo it.
//   - A mark does not make the key's own value live longer: of [WithReauthBackoff],
//     a wait longer than the window of [WithLoginBudget] may end early.
//
// Of sessionlocktest.CacheTest it fails OneWinner and passes every other case;
// so does, of LockerTest, a lock kept in it.
//
// [Watcher] and [Clock] are the store's, if it has them. A watch of a key hears
// nothing of invalidations, which are set elsewhere: other processes learn of one
// when the next session is stored, or when they are refused themselves. A hit past
// the near cache is two Gets. Safe for concurrent use if s is. PlainCache of nil
// is nil, which New refuses.
func PlainCache(s PlainStore) Cache {
	if isNil(s) {
		return nil
	}
	c := plainCache{s}
	watcher, watches := s.(Watcher)
	clock, tells := s.(Clock)
	switch {
	case watches && tells:
		return struct {
			plainCache
			Watcher
			Clock
		}{c, watcher, clock}
	case watches:
		return struct {
			plainCache
			Watcher
		}{c, watcher}
	case tells:
		return struct {
			plainCache
			Clock
		}{c, clock}
	}
	return c
}

// plainCache keeps the value of a key under that key, and under
//
//	<key>:dead:<generation>
//
// what the value became when that generation's session was taken out of it, by
// an invalidation or a logout. The mark is all that such a swap writes, because
// between its Get and its Set a peer may have stored a newer session under the
// key, and a Set there would end it. Marks are only ever set, so no order of two
// of them brings a session back.
//
// There is no lock around the steps of a swap, not even within this process: one
// call that hangs in a driver would stop the key for all of them.
type plainCache struct{ store PlainStore }

// Load implements [Cache].
func (c plainCache) Load(ctx context.Context, key string) ([]byte, error) {
	raw, err := c.get(ctx, key)
	if err != nil {
		return nil, err
	}
	e, _ := entry.Decode(raw) // zero if it is none: a lock, or nothing anybody here wrote
	if !live(e.Session) {
		return raw, nil
	}
	mark, err := c.get(ctx, markOf(key, e.Session.Gen))
	switch {
	case err != nil:
		return nil, err // not raw: its session may be dead
	case mark == nil:
		return raw, nil
	}
	return marked(e, mark)
}

// get is the store's Get without empty values.
func (c plainCache) get(ctx context.Context, key string) ([]byte, error) {
	v, err := c.store.Get(ctx, key)
	if err != nil || len(v) == 0 {
		return nil, err
	}
	return v, nil
}

// CompareAndSwap implements [Cache], as far as that is possible.
func (c plainCache) CompareAndSwap(ctx context.Context, key string, old, next []byte, ttl time.Duration) ([]byte, error) {
	now, err := c.Load(ctx, key)
	if err == nil {
		err = ctx.Err() // whoever asked has gone, and what was read may be old by now
	}
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(now, old) {
		return now, nil
	}
	name := key
	if gen := taken(old, next); gen != 0 {
		// Twice as long: a Touch that read the value before the mark was set may
		// still write it, with a longer life.
		name, ttl = markOf(key, gen), 2*ttl
	}
	if err := c.store.Set(ctx, name, next, ttl); err != nil {
		return nil, err
	}
	now, err = c.Load(ctx, key)
	if err == nil && now == nil {
		return next, nil // nobody deletes: it was stored, and its ttl has ended it
	}
	return now, err
}

// markOf names the mark of a generation: at most 23 bytes are added to key, and
// stay outside its hash tag.
func markOf(key string, gen uint64) string {
	return key + ":dead:" + strconv.FormatUint(gen, 10)
}

// live reports whether s is stored and not known to be rejected. Time is left out
// of it: processes may differ on that.
func live(s entry.Session) bool { return s.Gen != 0 && s.Expires != 0 }

// taken returns the generation whose session the swap of old for next takes away
// without bringing another; 0: none.
func taken(old, next []byte) uint64 {
	was, _ := entry.Decode(old)
	is, _ := entry.Decode(next)
	if live(was.Session) && !live(is.Session) {
		return was.Session.Gen
	}
	return 0
}

// marked is the value of a key under which e is stored, a live session in it, and
// which has a mark for that session. It is the mark's value, exactly what the
// swap that set it wanted, unless the key has gone on in a way that this swap
// could not see: then it is e without the session. A mark that cannot be read
// says dead all the same.
func marked(e entry.Entry, mark []byte) ([]byte, error) {
	dead, err := entry.Decode(mark)
	if err != nil || !wentOn(e, dead) {
		return mark, nil //nolint:nilerr // no reader will understand it either, and the next swap replaces it
	}
	e.Session, e.Proven = dead.Session, dead.Proven
	e.Young, e.Keep = max(e.Young, dead.Young), max(e.Keep, dead.Keep)
	if dead.Failure.Until > e.Failure.Until {
		e.Failure = dead.Failure
	}
	return entry.Encode(e)
}

// wentOn reports whether e has an attempt begun or ended that dead has not: both
// numbers only grow, and a Logout sets the first of them above every attempt it
// knows.
func wentOn(e, dead entry.Entry) bool {
	if e.Gen != dead.Gen {
		return e.Gen > dead.Gen
	}
	return e.Done.Gen > dead.Done.Gen
}
