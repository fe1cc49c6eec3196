package fleet_test

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/internal/fleet"
)

func TestMain(m *testing.M) {
	fleet.Main(func(setup json.RawMessage) (fleet.Handler, error) {
		return func(_ context.Context, op string, arg json.RawMessage) (any, error) {
			switch op {
			case "echo":
				return []json.RawMessage{setup, arg}, nil
			case "pid":
				return os.Getpid(), nil
			case "hang":
				select {}
			}
			return nil, errors.New("no such op")
		}, nil
	})
	m.Run()
}

func bounded(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestWorkersAnswer(t *testing.T) {
	ctx := bounded(t)
	for _, p := range fleet.Start(t, 3, "blue") {
		var pid int
		require.NoError(t, p.Call(ctx, "pid", nil, &pid))
		assert.Equal(t, p.Pid(), pid)
		assert.NotEqual(t, os.Getpid(), pid)

		var echo []any
		require.NoError(t, p.Call(ctx, "echo", 7, &echo))
		assert.Equal(t, []any{"blue", 7.0}, echo)
		assert.ErrorContains(t, p.Call(ctx, "sing", nil, nil), "no such op")
	}
}

func TestAKilledWorkerAnswersNobody(t *testing.T) {
	ctx, p := bounded(t), fleet.Start(t, 1, nil)[0]
	hung := make(chan error, 1)
	go func() { hung <- p.Call(ctx, "hang", nil, nil) }()
	require.NoError(t, p.Call(ctx, "pid", nil, nil))

	p.Kill()
	p.Kill()
	require.ErrorIs(t, <-hung, fleet.ErrDead)
	assert.ErrorIs(t, p.Call(ctx, "pid", nil, nil), fleet.ErrDead)
}

func TestAStoppedWorkerAnswersOnceContinued(t *testing.T) {
	ctx, p := bounded(t), fleet.Start(t, 1, nil)[0]
	require.NoError(t, p.Call(ctx, "pid", nil, nil))

	p.Stop()
	short, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	require.ErrorIs(t, p.Call(short, "pid", nil, nil), context.DeadlineExceeded)

	p.Continue()
	assert.NoError(t, p.Call(ctx, "pid", nil, nil))
}
