package sessionguard_test

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/internal/fleet"
	"github.com/sessionlock/sessionlock/internal/lua"
	"github.com/sessionlock/sessionlock/internal/redistest"
	"github.com/sessionlock/sessionlock/sessionguard"
)

// percentile of what was measured.
func percentile(of []time.Duration, p float64) time.Duration {
	slices.Sort(of)
	return of[min(len(of)-1, int(p*float64(len(of))))]
}

func report(b *testing.B, of []time.Duration, what string) {
	b.Helper()
	b.ReportMetric(float64(percentile(of, 0.5).Microseconds()), what+"-p50-µs")
	b.ReportMetric(float64(percentile(of, 0.99).Microseconds()), what+"-p99-µs")
}

// A request's whole cost, against the round trips that nobody can do without: the one
// that registers, and, where guards are deleted at the end, one more.
func BenchmarkRegisterAndEnd(b *testing.B) {
	rdb := redistest.Start(b).Client()
	m := newMonitor(b, rdb)
	ctx := b.Context()
	n := 0
	register := func(key string) error {
		return lua.Register.Run(ctx, rdb, []string{key}, "token", 0, 30000, key).Err()
	}
	sides := []func(key string) error{
		register,
		func(key string) error {
			if err := register(key); err != nil {
				return err
			}
			return rdb.Del(ctx, key).Err()
		},
		func(key string) error {
			_, g, err := m.Register(ctx, key)
			g.End()
			return err
		},
	}
	took := make([][]time.Duration, len(sides))
	for b.Loop() {
		for side, f := range sides {
			for range 100 { // in turns this long, for what ours does beside its callers would slow the others
				n++
				key := fmt.Sprint("session ", n)
				start := time.Now()
				require.NoError(b, f(key))
				took[side] = append(took[side], time.Since(start))
			}
		}
	}
	one, two, ours := took[0], took[1], took[2]
	report(b, ours, "ours")
	p50 := func(of []time.Duration) float64 { return float64(percentile(of, 0.5)) }
	b.ReportMetric(p50(ours)/p50(one), "x-one-trip")
	b.ReportMetric(p50(ours)/p50(two), "x-two-trips")
}

// From a newer registration, in this process, to the interrupt in another one: that
// notes the wall clock, which both share.
func BenchmarkInterrupt(b *testing.B) {
	server := redistest.Start(b)
	m := newMonitor(b, server.Client())
	w := fleet.Start(b, 1, setup{Redis: server.Addr()})[0]
	var took []time.Duration
	for n := 0; b.Loop(); n++ {
		r := round{Session: fmt.Sprint("session ", n)}
		require.NoError(b, w.Call(b.Context(), "register", r, nil))
		var ended struct{ At time.Time }
		done := make(chan error, 1)
		go func() { done <- w.Call(b.Context(), "interrupted", r, &ended) }()
		require.NoError(b, w.Call(b.Context(), "settle", r, nil))
		start := time.Now()
		_, g, err := m.Register(b.Context(), r.Session)
		require.NoError(b, err)
		require.NoError(b, <-done)
		g.End()
		took = append(took, ended.At.Sub(start))
	}
	report(b, took, "interrupt")
}

// What one process pays for many guards: on the wire per renewal, in memory each, and
// for a wake-up that is none of theirs nothing.
func BenchmarkManyGuards(b *testing.B) {
	const guards = 10_000
	for b.Loop() {
		server := redistest.Start(b)
		m := newMonitor(b, server.Client(func(o *redis.Options) { o.PoolSize = 16 }), sessionguard.WithTTL(6*time.Second))
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		held := make([]*sessionguard.Guard, guards)
		start := time.Now()
		for i := range held {
			var err error
			_, held[i], err = m.Register(context.Background(), fmt.Sprint("session ", i))
			require.NoError(b, err)
		}
		b.ReportMetric(float64(time.Since(start).Microseconds())/guards, "µs/register")
		runtime.GC()
		runtime.ReadMemStats(&after)
		b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/guards, "B/guard")
		time.Sleep(2 * time.Second) // until each has been renewed once
		clients, err := server.Client().Do(b.Context(), "CLIENT", "LIST", "TYPE", "pubsub").Text()
		require.NoError(b, err)
		require.Equal(b, 1, strings.Count(clients, "id="), clients)
		commands := server.Commands()
		time.Sleep(6 * time.Second) // three renewals each
		b.ReportMetric(float64(server.Commands()-commands)/3/guards, "commands/renewal")
		for _, g := range held {
			require.NoError(b, g.Check(b.Context()))
			g.End()
		}
	}
}
