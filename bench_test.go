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
// client. The near cache is off. Callers never wait in a socket, so a hit is
// also a hand-over between goroutines; what that costs a GET is measured beside.
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
	var handed []time.Duration
	for range 2000 {
		start, done := time.Now(), make(chan error)
		go func() { done <- rdb.Get(ctx, entry).Err() }()
		require.NoError(b, <-done)
		handed = append(handed, time.Since(start))
	}
	slices.Sort(handed)
	b.ReportMetric(float64(handed[len(handed)/2].Microseconds()), "handed-over-p50-µs")
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

// 8 processes × 50 callers want one cold key, login 200 ms. Wake-up is from the
// first caller served, the leader's, to each of the others. Commands are all
// that the server executed for the burst, those inside scripts included.
func BenchmarkWakeUp(b *testing.B) {
	c := found(b, processes, setup{})
	c.upstream.Delay(200 * time.Millisecond)
	var late []time.Duration
	var commands int64
	n := 0
	for b.Loop() {
		n++
		key := "tenant-" + strconv.Itoa(n)
		before := c.redis.Commands()
		got := c.all("session", order{Key: key, Callers: crowd})
		commands += c.redis.Commands() - before
		oneSession(b, processes*crowd, got)
		c.logins(1, key)
		first := slices.MinFunc(got, func(x, y outcome) int { return x.End.Compare(y.End) }).End
		for _, o := range got {
			late = append(late, o.End.Sub(first))
		}
	}
	slices.Sort(late)
	b.ReportMetric(float64(late[len(late)/2].Microseconds())/1000, "p50-ms")
	b.ReportMetric(float64(late[len(late)*99/100].Microseconds())/1000, "p99-ms")
	b.ReportMetric(float64(commands)/float64(n), "commands/burst")
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
