package bound_test

import (
	"context"
	"errors"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/internal/bound"
)

func TestWhatTheCallReturnsIsReturned(t *testing.T) {
	bad := errors.New("bad")
	v, err := bound.Call(t.Context(), time.Minute, func(context.Context) (int, error) { return 7, bad }, nil)
	assert.Equal(t, 7, v)
	assert.ErrorIs(t, err, bad)
	_, err = bound.Call(t.Context(), time.Minute, func(context.Context) (int, error) { runtime.Goexit(); return 0, nil }, nil)
	assert.ErrorIs(t, err, bound.ErrGoexit)
}

// The call ignores its context, as one inside a socket does.
func TestCallThatDoesNotReturnIsLeftBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start, late := time.Now(), make(chan int, 1)
		slow := func(d time.Duration, err error) func(context.Context) (int, error) {
			return func(ctx context.Context) (int, error) {
				time.Sleep(d)
				assert.Error(t, ctx.Err())
				return 7, err
			}
		}
		_, err := bound.Call(t.Context(), time.Second, slow(time.Minute, nil), func(v int) { late <- v })
		require.ErrorIs(t, err, bound.ErrTimeout)
		assert.Equal(t, time.Second, time.Since(start))
		assert.Equal(t, 7, <-late)
		assert.Equal(t, time.Minute, time.Since(start))

		gone := errors.New("gone")
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(time.Second, func() { cancel(gone) })
		start = time.Now()
		_, err = bound.Call(ctx, time.Minute, slow(time.Hour, errors.New("late")), func(int) { t.Error("called for an error") })
		require.ErrorIs(t, err, gone)
		assert.Equal(t, time.Second, time.Since(start))
		time.Sleep(time.Hour) // until nothing is left behind
	})
}

func TestSleepLastsAsLongAsItsContextAtMost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		slept := func() time.Duration { return time.Since(start) }
		require.NoError(t, bound.Sleep(t.Context(), time.Minute))
		require.Equal(t, time.Minute, slept())
		require.NoError(t, bound.Sleep(t.Context(), 0))
		require.NoError(t, bound.Sleep(t.Context(), -time.Minute))
		require.Equal(t, time.Minute, slept())
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		require.ErrorIs(t, bound.Sleep(ctx, time.Minute), context.DeadlineExceeded)
		require.Equal(t, time.Minute+time.Second, slept())
		require.ErrorIs(t, bound.Sleep(ctx, 0), context.DeadlineExceeded)
		require.Zero(t, testing.AllocsPerRun(10, func() { _ = bound.Sleep(ctx, -1) }), "no timer")
	})
}
