package sessionrelay_test

import (
	"context"
	"crypto/rand"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/internal/bound"
	"github.com/sessionlock/sessionlock/internal/redistest"
	"github.com/sessionlock/sessionlock/sessionrelay"
)

// bare is what one would write by hand with the same results, a pipeline for each call:
// messages in order, where the session is, who may fetch, how often each was tried, and
// a wake-up. Other than the store it is not atomic, repeats itself when a reply is lost,
// and finds out too late that it was not to do what it did.
//
// It waits for answers as long as go-redis does, which is longer than a context lasts;
// if bounded, no longer than the store. That costs a goroutine for each call: on loopback
// and few cores as much again as the trip, beside a network's latency next to nothing.
type bare struct {
	rdb     *redis.Client
	bounded bool
}

func (b bare) do(ctx context.Context, f func(context.Context) error) error {
	if !b.bounded {
		return f(ctx)
	}
	_, err := bound.Call(ctx, time.Second, func(ctx context.Context) (struct{}, error) { return struct{}{}, f(ctx) }, nil)
	return err
}

// pipelined makes one trip.
func (b bare) pipelined(ctx context.Context, f func(ctx context.Context, p redis.Pipeliner)) error {
	return b.do(ctx, func(ctx context.Context) error {
		_, err := b.rdb.Pipelined(ctx, func(p redis.Pipeliner) error { f(ctx, p); return nil })
		return err
	})
}

func (b bare) put(ctx context.Context, id string, n int, payload []byte) error {
	return b.pipelined(ctx, func(ctx context.Context, p redis.Pipeliner) {
		p.HMGet(ctx, "{bare}:s", "user", "node", "conn")
		p.HSet(ctx, "{bare}:out", id, payload)
		p.ZAdd(ctx, "{bare}:pend", redis.Z{Score: float64(n), Member: id})
		p.Publish(ctx, "{bare}:c", "")
	})
}

// fetch takes two trips: only the first one tells what to ask for.
func (b bare) fetch(ctx context.Context, most int) ([]string, error) {
	var found *redis.StringSliceCmd
	err := b.pipelined(ctx, func(ctx context.Context, p redis.Pipeliner) {
		p.HMGet(ctx, "{bare}:s", "user", "conn")
		found = p.ZRange(ctx, "{bare}:pend", 0, int64(most-1))
	})
	if err != nil {
		return nil, err
	}
	return found.Val(), b.pipelined(ctx, func(ctx context.Context, p redis.Pipeliner) {
		p.HMGet(ctx, "{bare}:out", found.Val()...)
		p.HMGet(ctx, "{bare}:tries", found.Val()...)
	})
}

func (b bare) attempted(ctx context.Context, n int, ids ...string) error {
	return b.pipelined(ctx, func(ctx context.Context, p redis.Pipeliner) {
		p.HMGet(ctx, "{bare}:s", "user", "conn")
		tried := make([]redis.Z, len(ids))
		for i, id := range ids {
			tried[i] = redis.Z{Score: float64(n), Member: id}
			p.HIncrBy(ctx, "{bare}:tries", id, 1)
		}
		p.ZRem(ctx, "{bare}:pend", ids)
		p.ZAdd(ctx, "{bare}:sent", tried...)
	})
}

func (b bare) delivered(ctx context.Context, ids ...string) error {
	return b.pipelined(ctx, func(ctx context.Context, p redis.Pipeliner) {
		p.HDel(ctx, "{bare}:out", ids...)
		p.HDel(ctx, "{bare}:tries", ids...)
		p.ZRem(ctx, "{bare}:sent", ids)
	})
}

// accept claims a message if nobody has.
func (b bare) accept(ctx context.Context, id string) error {
	return b.pipelined(ctx, func(ctx context.Context, p redis.Pipeliner) {
		p.HGet(ctx, "{bare}:s", "user")
		p.HSetNX(ctx, "{bare}:in", id, strconv.FormatInt(time.Now().Add(time.Minute).UnixMilli(), 10)+" o")
	})
}

func (b bare) complete(ctx context.Context, id string, outcome []byte) error {
	return b.do(ctx, func(ctx context.Context) error { return b.rdb.HSet(ctx, "{bare}:in", id, outcome).Err() })
}

func (b bare) forget(ctx context.Context, id string) error {
	return b.do(ctx, func(ctx context.Context) error { return b.rdb.HDel(ctx, "{bare}:in", id).Err() })
}

// step is one of a message's life, by hand and by the store.
type step struct {
	name        string
	bare, store func() error
	before      func() // both, unless nil, and not measured
}

// inTurns has both do each step, so that whatever slows the machine down slows both. It
// says what they take per message, how many times as long the store does in all, and for
// each step: by medians, for one turn that another process got in the way of is as long
// as hundreds.
func inTurns(b *testing.B, messages int, steps ...step) {
	b.Helper()
	took := make([][2][]time.Duration, len(steps)+1) // the last are all of a turn
	for b.Loop() {
		var all [2]time.Duration
		for i, s := range steps {
			if s.before != nil {
				s.before()
			}
			for k, f := range []func() error{s.bare, s.store} {
				start := time.Now()
				err := f()
				d := time.Since(start)
				require.NoError(b, err, s.name)
				took[i][k] = append(took[i][k], d)
				all[k] += d
			}
		}
		for k := range all {
			took[len(steps)][k] = append(took[len(steps)][k], all[k])
		}
	}
	median := func(of, k int) float64 {
		slices.Sort(took[of][k])
		return float64(took[of][k][len(took[of][k])/2])
	}
	for i, s := range steps {
		b.ReportMetric(median(i, 1)/median(i, 0), "x-"+s.name)
	}
	bare, store := median(len(steps), 0), median(len(steps), 1)
	b.ReportMetric(0, "ns/op") // of both together says nothing
	b.ReportMetric(bare/float64(messages), "bare-ns/msg")
	b.ReportMetric(store/float64(messages), "store-ns/msg")
	b.ReportMetric(store/bare, "x")
}

func first(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// beside runs f with a store that has a session, and with what does the same by hand.
func beside(b *testing.B, f func(b *testing.B, hand bare, s sessionrelay.Store)) {
	b.Helper()
	rdb := redistest.Start(b).Client()
	s := stores(b, rdb)("a")
	at(b, s, "s", "c1")
	require.NoError(b, rdb.HSet(b.Context(), "{bare}:s", "user", "bob", "node", "a", "conn", "c1").Err())
	b.Run("bare", func(b *testing.B) { f(b, bare{rdb, false}, s) })
	b.Run("bounded", func(b *testing.B) { f(b, bare{rdb, true}, s) })
}

// BenchmarkMessage is the life of one message to a client.
func BenchmarkMessage(b *testing.B) {
	beside(b, func(b *testing.B, hand bare, s sessionrelay.Store) { messages(b, hand, s, 1) })
}

// BenchmarkMessages is that of twenty, which are put one by one and travel together.
func BenchmarkMessages(b *testing.B) {
	beside(b, func(b *testing.B, hand bare, s sessionrelay.Store) { messages(b, hand, s, 20) })
}

func messages(b *testing.B, hand bare, s sessionrelay.Store, size int) {
	b.Helper()
	ctx, payload := b.Context(), make([]byte, 256)
	ids := make([]string, size)
	puts := step{
		name: "put",
		before: func() {
			for i := range ids {
				ids[i] = rand.Text()
			}
		},
		bare: func() (err error) {
			for i, id := range ids {
				err = first(err, hand.put(ctx, id, i, payload))
			}
			return err
		},
		store: func() (err error) {
			for _, id := range ids {
				_, put := s.Put(ctx, "s", sessionrelay.Message{ID: id, Payload: payload}, nil)
				err = first(err, put)
			}
			return err
		},
	}
	fetch := step{
		name: "fetch",
		bare: func() error {
			got, err := hand.fetch(ctx, 20)
			assert.Len(b, got, size)
			return err
		},
		store: func() error {
			got, err := s.Fetch(ctx, "s", "c1", 20)
			assert.Len(b, got, size)
			return err
		},
	}
	attempted := step{
		name:  "attempted",
		bare:  func() error { return hand.attempted(ctx, 1, ids...) },
		store: func() error { return s.Attempted(ctx, "s", "c1", ids...) },
	}
	delivered := step{
		name:  "delivered",
		bare:  func() error { return hand.delivered(ctx, ids...) },
		store: func() error { return s.Delivered(ctx, "s", ids...) },
	}
	inTurns(b, size, puts, fetch, attempted, delivered)
}

// BenchmarkInbox is the life of one message from a client.
func BenchmarkInbox(b *testing.B) {
	beside(b, func(b *testing.B, hand bare, s sessionrelay.Store) {
		ctx, outcome, id := b.Context(), make([]byte, 256), ""
		accept := step{
			name:   "accept",
			before: func() { id = rand.Text() },
			bare:   func() error { return hand.accept(ctx, id) },
			store: func() error {
				c, err := s.Accept(ctx, "s", "", id, "o", time.Minute)
				assert.Equal(b, sessionrelay.Accepted, c.State)
				return err
			},
		}
		complete := step{
			name:  "complete",
			bare:  func() error { return hand.complete(ctx, id, outcome) },
			store: func() error { return s.Complete(ctx, "s", id, "o", outcome) },
		}
		forget := step{
			name:  "forget",
			bare:  func() error { return hand.forget(ctx, id) },
			store: func() error { return s.Forget(ctx, "s", id) },
		}
		inTurns(b, 1, accept, complete, forget)
	})
}

// crowd registers n sessions of users who have twenty each.
func crowd(b *testing.B, n int) (*redis.Client, sessionrelay.Store) {
	b.Helper()
	rdb := redistest.Start(b).Client()
	s := stores(b, rdb, sessionrelay.WithOpTimeout(10*time.Second))("a")
	var all sync.WaitGroup
	start := time.Now()
	for k := range 16 {
		all.Go(func() {
			for i := k; i < n; i += 16 {
				h := sessionrelay.Hello{Session: fmt.Sprint("s", i), User: fmt.Sprint("u", i/20), App: "app", Version: "1"}
				_, _, err := s.Register(b.Context(), h, fmt.Sprint("c", i), plenty)
				assert.NoError(b, err)
			}
		})
	}
	all.Wait()
	b.Logf("registered %d sessions in %v", n, time.Since(start))
	return rdb, s
}

// outdate adds ten sessions that nobody has vouched for, as it seems, for hours.
func outdate(b *testing.B, rdb *redis.Client, s sessionrelay.Store) {
	b.Helper()
	ctx, old := b.Context(), time.Now().Add(-2*time.Hour).UnixMilli()
	for i := range 10 {
		session := fmt.Sprint("old", i)
		at(b, s, session, fmt.Sprint("c", old, ".", i))
		require.NoError(b, rdb.ZAddXX(ctx, sessionrelay.AllKey(), redis.Z{Score: float64(old), Member: "3:bob" + session}).Err())
		require.NoError(b, rdb.HSet(ctx, sessionrelay.SessionKey(session), "live", old).Err())
	}
}

// BenchmarkDirectory is the upkeep of a hundred thousand sessions.
func BenchmarkDirectory(b *testing.B) {
	const many, few = 100_000, 1_000
	rdb, s := crowd(b, many)
	lesser, less := crowd(b, few)
	ctx := b.Context()
	count := func(b *testing.B, f sessionrelay.Filter, want int) {
		for b.Loop() {
			got := 0
			require.NoError(b, s.List(ctx, f, func(sessionrelay.Info) bool { got++; return true }))
			assert.Equal(b, want, got)
		}
	}
	b.Run("list a user", func(b *testing.B) { count(b, sessionrelay.Filter{User: "u4999"}, 20) })
	b.Run("count all", func(b *testing.B) { count(b, sessionrelay.Filter{}, many) })
	b.Run("homed", func(b *testing.B) {
		for b.Loop() {
			all, err := s.Homed(ctx)
			require.NoError(b, err)
			assert.Len(b, all, many)
		}
	})
	b.Run("scavenge nothing", func(b *testing.B) {
		for b.Loop() {
			removed, err := s.Scavenge(ctx)
			require.NoError(b, err)
			assert.Zero(b, removed)
		}
	})
	b.Run("alive 1000", func(b *testing.B) {
		sessions := make([]string, 1000)
		for i := range sessions {
			sessions[i] = fmt.Sprint("s", many-1-i)
		}
		for b.Loop() {
			unknown, err := s.Alive(ctx, sessions)
			require.NoError(b, err)
			assert.Empty(b, unknown)
		}
	})
	// What an upkeep costs is what times out, not what there is: the "bare" side here is a
	// store with a hundredth of the sessions.
	expire := func(s sessionrelay.Store, want int) func() error {
		return func() error {
			expired, err := s.Expire(ctx, time.Hour)
			assert.Len(b, expired, want)
			return err
		}
	}
	b.Run("expire none", func(b *testing.B) {
		inTurns(b, 1, step{name: "expire", bare: expire(less, 0), store: expire(s, 0)})
	})
	b.Run("expire 10", func(b *testing.B) {
		inTurns(b, 1, step{
			name: "expire", bare: expire(less, 10), store: expire(s, 10),
			before: func() {
				outdate(b, rdb, s)
				outdate(b, lesser, less)
			},
		})
	})
}
