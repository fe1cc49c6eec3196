package sessionguard_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/internal/lua"
	"github.com/sessionlock/sessionlock/internal/redistest"
)

func BenchmarkRegisterAndEnd(b *testing.B) {
	s := redistest.Start(b)
	rdb := s.Client()
	m := newMonitor(b, rdb)
	var bare, ours time.Duration
	ctx := b.Context()
	n := 0
	for b.Loop() {
		n++
		key := "k" + time.Now().String()
		t0 := time.Now()
		require.NoError(b, lua.Register.Run(ctx, rdb, []string{key}, "tok", 0, 30000, "").Err())
		t1 := time.Now()
		_, g, err := m.Register(ctx, key)
		g.End()
		t2 := time.Now()
		require.NoError(b, err)
		bare += t1.Sub(t0)
		ours += t2.Sub(t1)
	}
	b.ReportMetric(float64(ours)/float64(bare), "x-bare")
	b.ReportMetric(float64(bare)/float64(n), "bare-ns")
}
