package sessionmanager_test

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/internal/redistest"
	"github.com/sessionlock/sessionlock/sessionmanager"
)

// idler is a worker that costs nothing.
type idler struct{ _ byte }

func (*idler) Shutdown(context.Context) error { return nil }
func (*idler) Kill(string) error              { return nil }
func (*idler) Err() error                     { return nil }

func startIdler(context.Context, string) (*idler, error) { return new(idler), nil }

// bare is what a manager is measured against: a map with a mutex, and no rules.
type bare struct {
	mu      sync.Mutex
	workers map[string]*idler
	n       int
}

func (b *bare) open() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.n++
	id := strconv.Itoa(b.n)
	b.workers[id] = new(idler)
	return id
}

func (b *bare) do(id string, fn func(*idler)) {
	b.mu.Lock()
	w := b.workers[id]
	b.mu.Unlock()
	fn(w)
}

func (b *bare) close(id string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.workers, id)
}

func benchManager(tb testing.TB, opts ...sessionmanager.Option) *sessionmanager.Manager[*idler] {
	tb.Helper()
	m, err := sessionmanager.New[*idler](append([]sessionmanager.Option{sessionmanager.WithMax(1 << 30)}, opts...)...)
	require.NoError(tb, err)
	return m
}

func benchOpen(tb testing.TB, m *sessionmanager.Manager[*idler]) *sessionmanager.Session[*idler] {
	tb.Helper()
	s, err := m.Open(tb.Context(), sessionmanager.Spec{}, startIdler)
	if err != nil {
		tb.Fatal(err)
	}
	return s
}

// alternate runs ours and theirs in turn, a hundred times each, and reports the
// median of both and their ratio: this machine's speed differs from minute to minute.
func alternate(b *testing.B, ours, theirs func()) {
	b.Helper()
	const batch = 100
	var us, them []time.Duration
	took := func(f func()) time.Duration {
		start := time.Now()
		for range batch {
			f()
		}
		return time.Since(start) / batch
	}
	for b.Loop() {
		us = append(us, took(ours))
		them = append(them, took(theirs))
	}
	slices.Sort(us)
	slices.Sort(them)
	o, t := us[len(us)/2], them[len(them)/2]
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(o.Nanoseconds()), "ours-p50-ns")
	b.ReportMetric(float64(t.Nanoseconds()), "bare-p50-ns")
	b.ReportMetric(float64(o)/float64(t), "ratio")
}

func BenchmarkOpenAndClose(b *testing.B) {
	for _, others := range []int{0, 100_000} {
		b.Run(fmt.Sprintf("others=%d", others), func(b *testing.B) {
			m, plain, ctx := benchManager(b), &bare{workers: map[string]*idler{}}, b.Context()
			for range others {
				benchOpen(b, m)
				plain.open()
			}
			alternate(b, func() {
				if err := benchOpen(b, m).Close(ctx); err != nil {
					b.Fatal(err)
				}
			}, func() { plain.close(plain.open()) })
		})
	}
}

func BenchmarkDo(b *testing.B) {
	m, plain, ctx := benchManager(b), &bare{workers: map[string]*idler{}}, b.Context()
	s, id := benchOpen(b, m), plain.open()
	fn := func(context.Context, *idler) error { return nil }
	b.Run("alternating", func(b *testing.B) {
		alternate(b, func() {
			s, err := m.Get(s.ID(), "")
			if err == nil {
				err = s.Do(ctx, fn)
			}
			if err != nil {
				b.Fatal(err)
			}
		}, func() { plain.do(id, func(*idler) {}) })
	})
	b.Run("against a timeout alone", func(b *testing.B) {
		alternate(b, func() { _ = s.Do(ctx, fn) }, func() {
			plain.do(id, func(w *idler) {
				ctx, cancel := context.WithTimeout(ctx, time.Minute)
				defer cancel()
				_ = fn(ctx, w)
			})
		})
	})
	b.Run("serial", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			_ = s.Do(ctx, fn)
		}
	})
	b.Run("parallel/one session", func(b *testing.B) {
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				_ = s.Do(ctx, fn)
			}
		})
	})
	b.Run("parallel/a session each", func(b *testing.B) {
		b.RunParallel(func(pb *testing.PB) {
			s := benchOpen(b, m)
			for pb.Next() {
				_ = s.Do(ctx, fn)
			}
		})
	})
}

// Ten of 100 000 are overdue; beside it the same ten alone.
func BenchmarkSweep(b *testing.B) {
	for _, others := range []int{0, 100_000} {
		b.Run(fmt.Sprintf("ten of %d", others+10), func(b *testing.B) {
			m := benchManager(b, sessionmanager.WithLease(time.Hour), sessionmanager.WithGrace(time.Millisecond))
			for range others {
				benchOpen(b, m)
			}
			var all []time.Duration
			for b.Loop() {
				for range 10 {
					_, detach, err := benchOpen(b, m).Attach()
					require.NoError(b, err)
					detach() // the grace is over soon
				}
				start := time.Now()
				n, err := m.Sweep(b.Context(), start.Add(time.Second))
				all = append(all, time.Since(start))
				if n != 10 || err != nil {
					b.Fatal(n, err)
				}
			}
			report(b, all)
		})
	}
	// Once per lease each session in use is looked at.
	b.Run("100000 in use are looked at", func(b *testing.B) {
		m := benchManager(b, sessionmanager.WithLease(24*time.Hour))
		for range 100_000 {
			_, _, err := benchOpen(b, m).Attach()
			require.NoError(b, err)
		}
		now := time.Now()
		var all []time.Duration
		for b.Loop() {
			now = now.Add(25 * time.Hour)
			start := time.Now()
			n, err := m.Sweep(b.Context(), now)
			all = append(all, time.Since(start))
			if n != 0 || err != nil {
				b.Fatal(n, err)
			}
		}
		report(b, all)
	})
}

func report(b *testing.B, all []time.Duration) {
	b.Helper()
	slices.Sort(all)
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(all[len(all)/2].Microseconds()), "p50-µs")
}

// 10 000 sessions whose workers each take 1 ms to shut down.
func BenchmarkShutdownOf10000(b *testing.B) {
	for b.Loop() {
		b.StopTimer()
		m, err := sessionmanager.New[*fake](sessionmanager.WithMax(10_000))
		require.NoError(b, err)
		for range 10_000 {
			_, err := m.Open(b.Context(), sessionmanager.Spec{}, starts(&fake{shutdown: stubborn(time.Millisecond, nil)}))
			require.NoError(b, err)
		}
		b.StartTimer()
		require.NoError(b, m.Shutdown(b.Context()))
	}
}

func BenchmarkMemoryPerSession(b *testing.B) {
	const n = 100_000
	heap := func() uint64 {
		runtime.GC()
		var s runtime.MemStats
		runtime.ReadMemStats(&s)
		return s.HeapAlloc
	}
	for b.Loop() {
		m := benchManager(b)
		before := heap()
		for range n {
			benchOpen(b, m)
		}
		b.ReportMetric(float64(heap()-before)/n, "B/session")
		runtime.KeepAlive(m)
	}
	b.ReportMetric(0, "ns/op")
}

// A slot in the fleet costs a round trip as the session opens and one as it ends.
func BenchmarkOpenAndCloseInAFleet(b *testing.B) {
	rdb := redistest.Start(b).Client()
	m := benchManager(b, sessionmanager.WithFleetMax(rdb, account, 1000))
	ctx := b.Context()
	alternate(b, func() {
		if err := benchOpen(b, m).Close(ctx); err != nil {
			b.Fatal(err)
		}
	}, func() {
		_ = rdb.Get(ctx, "k").Err()
		_ = rdb.Get(ctx, "k").Err()
	})
}
