package sessionguard_test

import (
	"context"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/internal/redistest"
	"github.com/sessionlock/sessionlock/sessionguard"
)

func newMonitor(t testing.TB, rdb redis.UniversalClient, opts ...sessionguard.Option) *sessionguard.Monitor {
	t.Helper()
	m, err := sessionguard.New(rdb, opts...)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, m.Close(context.Background())) })
	return m
}

func TestNewerRequestInterruptsTheOlder(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		a, b := newMonitor(t, rdb), newMonitor(t, rdb)
		ctxA, ga, err := a.Register(t.Context(), "s")
		require.NoError(t, err)
		defer ga.End()
		require.NoError(t, ga.Check(ctxA))
		ctxB, gb, err := b.Register(t.Context(), "s")
		require.NoError(t, err)
		defer gb.End()
		select {
		case <-ctxA.Done():
		case <-time.After(10 * time.Second):
			t.Fatal("not interrupted")
		}
		var by *sessionguard.SupersededError
		require.ErrorAs(t, context.Cause(ctxA), &by)
		assert.Equal(t, gb.Epoch(), by.By)
		assert.Equal(t, ga.Epoch(), by.Epoch)
		require.NoError(t, ctxB.Err())
		incr := sessionguard.NewScript(`return redis.call('INCRBY', KEYS[1], ARGV[1])`)
		v, err := gb.Eval(ctxB, incr, []string{gb.Key("n")}, 7)
		require.NoError(t, err)
		assert.EqualValues(t, 7, v)
		_, err = ga.Eval(t.Context(), incr, []string{ga.Key("n")}, 1)
		require.ErrorIs(t, err, sessionguard.ErrSuperseded)
	})
}
