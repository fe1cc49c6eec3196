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
	b.ReportMetric(float64(o.Nanoseconds())/1000, "ours-p50-µs")
	b.ReportMetric(float64(t.Nanoseconds())/1000, "bare-p50-µs")
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

// What callers pay for sessions that are renewed and touched beside them: 1 000
// near hits at a time, against the same without. A login takes 20 ms, and a hit
// that waited for one would show as the slowest.
func BenchmarkNearHitWhileRenewed(b *testing.B) {
	login := func(ctx context.Context, key string) (sessionlock.Session, error) {
		time.Sleep(20 * time.Millisecond)
		s, err := instant(ctx, key)
		s.Expiry = time.Now().Add(400 * time.Millisecond)
		return s, err
	}
	c, err := sessionlock.New("bench", sessionlock.AuthenticatorFunc(login), sessionlock.WithCache(new(sessionlock.MemoryCache)),
		sessionlock.WithRefreshAhead(150*time.Millisecond), sessionlock.WithIdleTTL(time.Second))
	require.NoError(b, err)
	b.Cleanup(func() { _ = c.Close(context.Background()) })
	plain := benchClient(b, sessionlock.WithCache(new(sessionlock.MemoryCache)))
	ctx, slowest := b.Context(), time.Duration(0)
	hits := func(c *sessionlock.Client) func(int) {
		h := c.For("tenant")
		return func(int) {
			for range 1000 {
				if _, err := h.Session(ctx); err != nil {
					b.Fatal(err)
				}
			}
		}
	}
	renewed, bare := hits(c), hits(plain)
	renewed(0)
	bare(0)
	alternate(b, func(i int) {
		start := time.Now()
		renewed(i)
		slowest = max(slowest, time.Since(start))
	}, bare)
	b.ReportMetric(float64(slowest.Microseconds()), "slowest-1000-µs")
	b.ReportMetric(float64(c.Stats().Logins), "logins")
}

// A call while the store is known to be dead, against the near hit of the same
// client.
func BenchmarkRefusedWhileTheStoreIsDead(b *testing.B) {
	store := &dying{}
	c := benchClient(b, sessionlock.WithCache(store))
	names, _ := warm(b, c, 1)
	store.dead.Store(true)
	ctx := b.Context()
	for range 5 {
		_, err := c.Session(ctx, "cold")
		require.ErrorIs(b, err, sessionlock.ErrUnavailable)
	}
	alternate(b,
		func(int) {
			if _, err := c.Session(ctx, "cold"); err == nil {
				b.Fatal("served")
			}
		},
		func(int) {
			if _, err := c.Session(ctx, names[0]); err != nil {
				b.Fatal(err)
			}
		})
}

// dying is a cache that can die.
type dying struct {
	sessionlock.MemoryCache
	dead atomic.Bool
}

func (d *dying) Load(ctx context.Context, key string) ([]byte, error) {
	if d.dead.Load() {
		return nil, context.DeadlineExceeded
	}
	return d.MemoryCache.Load(ctx, key)
}

// cachedHit returns a hit in Redis, of a client with opts.
func cachedHit(b *testing.B, rdb *redis.Client, name string, opts ...sessionlock.Option) func(int) {
	b.Helper()
	opts = append([]sessionlock.Option{sessionlock.WithRedis(rdb), sessionlock.WithNearCache(0, time.Minute), sessionlock.WithNamespace(name)}, opts...)
	c := benchClient(b, opts...)
	hit := func(int) {
		if _, err := c.Session(b.Context(), "tenant"); err != nil {
			b.Fatal(err)
		}
	}
	hit(0)
	return hit
}

// A hit in Redis that also keeps the session alive, against one that does not.
// With an idle TTL of 10 ms nearly every hit is worth a touch, which is a read and
// a swap beside the caller.
func BenchmarkCachedInRedisAndTouched(b *testing.B) {
	srv := redistest.Start(b)
	rdb := srv.Client()
	touched, bare := cachedHit(b, rdb, "touched", sessionlock.WithIdleTTL(10*time.Millisecond)), cachedHit(b, rdb, "bare")
	alternate(b, touched, bare)
}

// A hit in Redis whose session is sealed, against one in clear.
func BenchmarkCachedInRedisSealed(b *testing.B) {
	srv := redistest.Start(b)
	rdb := srv.Client()
	keyring, err := sessionlock.NewKeyring("bench", []byte("32 bytes for a benchmark, no more"[:32]))
	require.NoError(b, err)
	sealed, bare := cachedHit(b, rdb, "sealed", sessionlock.WithKeyring(keyring)), cachedHit(b, rdb, "bare")
	alternate(b, sealed, bare)
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
