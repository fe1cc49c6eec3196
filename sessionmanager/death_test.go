package sessionmanager_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/sessionmanager"
)

// mortal is a worker that tells when it has died.
type mortal struct {
	fake
	done func() <-chan struct{}
}

func (w *mortal) Done() <-chan struct{} { return w.done() }

func TestDeathOfAnIdleWorkerIsNoticedAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := &books{}
		m, err := sessionmanager.New[*mortal](sessionmanager.WithObserver(b), sessionmanager.WithMax(1), sessionmanager.WithGrace(0))
		require.NoError(t, err)
		opens := func(w *mortal) *sessionmanager.Session[*mortal] {
			s, err := m.Open(t.Context(), sessionmanager.Spec{}, func(context.Context, string) (*mortal, error) { return w, nil })
			require.NoError(t, err)
			return s
		}
		gone := make(chan struct{})
		dies := func() <-chan struct{} { return gone }

		s := opens(&mortal{done: dies})
		_, detach, err := s.Attach() // which keeps no session whose worker is dead
		require.NoError(t, err)
		defer detach()
		n, err := m.Sweep(t.Context(), time.Now())
		require.NoError(t, err)
		require.Zero(t, n)
		close(gone)
		synctest.Wait()
		assert.Equal(t, sessionmanager.StateFaulted, s.State())
		require.ErrorIs(t, s.Err(), sessionmanager.ErrFaulted)
		require.ErrorContains(t, s.Err(), "the worker has ended")
		n, err = m.Sweep(t.Context(), time.Now())
		require.NoError(t, err)
		assert.Equal(t, 1, n)
		assert.Equal(t, []string{sessionmanager.ReasonFaulted}, b.reasons())

		w := &mortal{done: dies}
		w.breaks(errBroken)
		s = opens(w) // it died as it was made
		synctest.Wait()
		require.ErrorIs(t, s.Err(), errBroken, "who says why is heard")
		require.NoError(t, s.Close(t.Context()))

		s = opens(&mortal{done: func() <-chan struct{} { panic("hunter2") }})
		synctest.Wait()
		require.ErrorIs(t, s.Err(), sessionmanager.ErrFaulted)
		assert.NotContains(t, s.Err().Error(), "hunter2")
		require.NoError(t, s.Close(t.Context()))
		assert.Equal(t, []sessionmanager.Code{sessionmanager.CodeFaulted, sessionmanager.CodeFaulted, sessionmanager.CodeFaulted}, b.faults())
	})
}

// What it ends is the session; whose end has begun already is not faulted by it.
func TestWorkerThatIsShutDownDoesNotFault(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := &books{}
		m, err := sessionmanager.New[*mortal](sessionmanager.WithObserver(b))
		require.NoError(t, err)
		gone := make(chan struct{})
		w := &mortal{done: func() <-chan struct{} { return gone }}
		w.shutdown = func(context.Context) error { close(gone); time.Sleep(time.Second); return nil }
		s, err := m.Open(t.Context(), sessionmanager.Spec{}, func(context.Context, string) (*mortal, error) { return w, nil })
		require.NoError(t, err)
		require.NoError(t, s.Close(t.Context()))
		assert.Equal(t, sessionmanager.StateClosed, s.State())
		assert.Empty(t, b.faults())

		w = &mortal{done: func() <-chan struct{} { return nil }} // which ends with its session
		_, err = m.Open(t.Context(), sessionmanager.Spec{}, func(context.Context, string) (*mortal, error) { return w, nil })
		require.NoError(t, err)
		require.NoError(t, m.Shutdown(t.Context()))
		assert.Empty(t, b.faults())
	})
}

func TestCallOfAWorkerThatDiesEnds(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, err := sessionmanager.New[*mortal]()
		require.NoError(t, err)
		gone := make(chan struct{})
		w := &mortal{done: func() <-chan struct{} { return gone }}
		w.kill = func(string) error { return errBroken } // as os.ErrProcessDone
		s, err := m.Open(t.Context(), sessionmanager.Spec{}, func(context.Context, string) (*mortal, error) { return w, nil })
		require.NoError(t, err)
		time.AfterFunc(time.Second, func() { w.breaks(errBroken); close(gone) })
		begun := time.Now()
		err = s.Do(t.Context(), func(ctx context.Context, _ *mortal) error { return untilDone(ctx) })
		assert.Equal(t, time.Second, time.Since(begun))
		require.ErrorIs(t, err, sessionmanager.ErrNotReady)
		require.ErrorIs(t, err, errBroken)
		require.NoError(t, s.Close(t.Context()), "nobody minds that the dead cannot be killed")
		require.NoError(t, m.Shutdown(t.Context()))
	})
}
