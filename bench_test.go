package sessionlock_test

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"github.com/bsm/redislock"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock"
	"github.com/sessionlock/sessionlock/internal/redistest"
)

// The figures of docs/figures.md. Ratios are taken in one run, the two sides
// alternating, because this machine's speed differs from minute to minute.

func instant(_ context.Context, key string) (sessionlock.Session, error) {
	return sessionlock.Session{Token: sessionlock.NewToken("token-of-" + key), Expiry: time.Now().Add(time.Hour)}, nil
}

func benchClient(b *testing.B, opts ...sessionlock.Option) *sessionlock.Client {
	b.Helper()
	c, err := sessionlock.New("bench", sessionlock.AuthenticatorFunc(instant), opts...)
	require.NoError(b, err)
	b.Cleanup(func() { _ = c.Close(context.Background()) })
	return c
}

func warm(b *testing.B, c *sessionlock.Client, keys int) (names []string, handles []*sessionlock.Handle) {
	b.Helper()
	for i := range keys {
		h := c.For("tenant-" + strconv.Itoa(i))
		for range 2 { // the second is a near hit
			_, err := h.Session(b.Context())
			require.NoError(b, err)
		}
		names, handles = append(names, "tenant-"+strconv.Itoa(i)), append(handles, h)
	}
	return names, handles
}

func BenchmarkNearHit(b *testing.B) {
	ctx := context.Background()
	for _, keys := range []int{1, 10_000} {
		c := benchClient(b, sessionlock.WithCache(new(sessionlock.MemoryCache)))
		names, handles := warm(b, c, keys)
		for how, get := range map[string]func(i int) error{
			"by=key":    func(i int) error { _, err := c.Session(ctx, names[i]); return err },
			"by=handle": func(i int) error { _, err := handles[i].Session(ctx); return err },
		} {
			b.Run(fmt.Sprintf("%s/keys=%d/serial", how, keys), func(b *testing.B) {
				b.ReportAllocs()
				i := 0
				for b.Loop() {
					if i++; i >= keys {
						i = 0
					}
					if err := get(i); err != nil {
						b.Fatal(err)
					}
				}
			})
			b.Run(fmt.Sprintf("%s/keys=%d/parallel", how, keys), func(b *testing.B) {
				b.ReportAllocs()
				var start atomic.Int64
				b.RunParallel(func(pb *testing.PB) {
					i := int(start.Add(7919)) % keys
					for pb.Next() {
						if i++; i >= keys {
							i = 0
						}
						if err := get(i); err != nil {
							b.Error(err)
							return
						}
					}
				})
			})
		}
	}
}

// alternate runs ours and bare in turn and reports the median of each and their
// ratio.
func alternate(b *testing.B, ours, bare func(i int)) {
	b.Helper()
	var us, them []time.Duration
	took := func(f func(int), i int) time.Duration {
		start := time.Now()
		f(i)
		return time.Since(start)
	}
	for i := 0; b.Loop(); i++ {
		us = append(us, took(ours, i))
		them = append(them, took(bare, i))
	}
	slices.Sort(us)
	slices.Sort(them)
	o, t := us[len(us)/2], them[len(them)/2]
	b.ReportMetric(float64(o.Microseconds()), "ours-p50-µs")
	b.ReportMetric(float64(t.Microseconds()), "bare-p50-µs")
	b.ReportMetric(float64(o)/float64(t), "ratio")
}

// A hit in Redis is one round trip, so the bare cost is one GET of the same
// client. The near cache is off.
func BenchmarkCachedInRedis(b *testing.B) {
	srv := redistest.Start(b)
	rdb := srv.Client()
	c := benchClient(b, sessionlock.WithRedis(rdb), sessionlock.WithNearCache(0, time.Minute))
	ctx := b.Context()
	_, err := c.Session(ctx, "tenant")
	require.NoError(b, err)
	entry := rdb.Keys(ctx, "sl:*:e").Val()[0]
	alternate(b,
		func(int) {
			if _, err := c.Session(ctx, "tenant"); err != nil {
				b.Fatal(err)
			}
		},
		func(int) {
			if err := rdb.Get(ctx, entry).Err(); err != nil {
				b.Fatal(err)
			}
		})
	before := srv.Commands()
	for range 100 {
		_, _ = c.Session(ctx, "tenant")
	}
	b.ReportMetric(float64(srv.Commands()-before)/100, "round-trips")
}

// A cold acquisition with an instant login is four round trips that its caller
// waits for: read, lock, begin, commit. The bare cost is the same four commands
// by hand: a GET, redislock's Obtain, two SETs. The unlock is off the path.
func BenchmarkCold(b *testing.B) {
	srv := redistest.Start(b)
	rdb := srv.Client()
	c := benchClient(b, sessionlock.WithRedis(rdb), sessionlock.WithNearCache(0, time.Minute))
	ctx := b.Context()
	_, err := c.Session(ctx, "first")
	require.NoError(b, err)
	locker := redislock.New(rdb)
	value := make([]byte, 400)
	alternate(b,
		func(i int) {
			if _, err := c.Session(ctx, "tenant-"+strconv.Itoa(i)); err != nil {
				b.Fatal(err)
			}
		},
		func(i int) {
			n := strconv.Itoa(i)
			rdb.Get(ctx, "bare:e:"+n)
			if _, err := locker.Obtain(ctx, "bare:l:"+n, time.Second, nil); err != nil {
				b.Fatal(err)
			}
			rdb.Set(ctx, "bare:e:"+n, value, time.Minute)
			rdb.Set(ctx, "bare:e:"+n, value, time.Minute)
		})
}

// What a key costs that this process holds.
func BenchmarkBytesPerNearKey(b *testing.B) {
	const keys = 10_000
	heap := func() uint64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	for b.Loop() {
		cache := new(sessionlock.MemoryCache)
		first := benchClient(b, sessionlock.WithCache(cache)) // so that the cache's own share is not counted
		warm(b, first, keys)
		c := benchClient(b, sessionlock.WithCache(cache))
		before := heap()
		for i := range keys {
			_, err := c.Session(b.Context(), "tenant-"+strconv.Itoa(i))
			require.NoError(b, err)
		}
		b.ReportMetric(float64(heap()-before)/keys, "bytes/key")
		runtime.KeepAlive(first)
	}
}

// A client that nobody calls: after its last key was dropped it sends nothing;
// while it holds one it sends the subscription's pings.
func BenchmarkIdle(b *testing.B) {
	srv := redistest.Start(b)
	c := benchClient(b, sessionlock.WithRedis(srv.Client(func(*redis.Options) {})))
	_, err := c.Session(b.Context(), "tenant")
	require.NoError(b, err)
	const window = 10 * time.Second
	for b.Loop() {
		time.Sleep(time.Second) // the look after the subscription's confirmation
		before := srv.Commands()
		time.Sleep(window)
		b.ReportMetric(float64(srv.Commands()-before)/window.Seconds(), "commands/s")
	}
}
