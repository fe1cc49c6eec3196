package sessionmanager_test

import (
	"context"
	"errors"
	"runtime"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"weak"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/sessionmanager"
)

func newFanout(t testing.TB, queue, replay int) *sessionmanager.Fanout[int] {
	t.Helper()
	f, err := sessionmanager.NewFanout[int](queue, replay)
	require.NoError(t, err)
	return f
}

// collect ranges over a stream to its end.
func collect(stream func(func(int, error) bool)) (got []int, err error) {
	for e, failed := range stream {
		if failed != nil {
			return got, failed
		}
		got = append(got, e)
	}
	return got, nil
}

func publish(f *sessionmanager.Fanout[int], from, to int) {
	for i := from; i <= to; i++ {
		f.Publish(i)
	}
}

func upTo(from, to int) (out []int) {
	for i := from; i <= to; i++ {
		out = append(out, i)
	}
	return out
}

func TestEveryListenerGetsEveryEventInOrder(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f := newFanout(t, 100, 0)
		var wg sync.WaitGroup
		for range 8 {
			stream := f.Subscribe(t.Context()) // from now on, whenever it is ranged over
			wg.Go(func() {
				got, err := collect(stream)
				assert.NoError(t, err)
				assert.Equal(t, upTo(1, 1000), got)
			})
		}
		for i := range 10 {
			publish(f, 100*i+1, 100*i+100)
			synctest.Wait()
		}
		f.Close(nil)
		wg.Wait()
	})
}

func TestConcurrentEventsComeToAllInOneOrder(t *testing.T) {
	f := newFanout(t, 10_000, 0)
	var streams [4][]int
	var wg, all sync.WaitGroup
	for i := range streams {
		stream := f.Subscribe(t.Context())
		all.Go(func() {
			var err error
			streams[i], err = collect(stream)
			assert.NoError(t, err)
		})
	}
	for i := range 4 {
		wg.Go(func() { publish(f, i*1000, i*1000+999) })
	}
	wg.Wait()
	f.Close(nil)
	all.Wait()
	assert.Len(t, streams[0], 4000)
	for _, s := range streams {
		assert.Equal(t, streams[0], s)
	}
}

func TestSlowListenerIsCutOffAlone(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f := newFanout(t, 10, 0)
		slow, quick := f.Subscribe(t.Context()), f.Subscribe(t.Context())
		publish(f, 1, 10)
		got := make(chan []int, 1)
		go func() {
			all, err := collect(quick)
			assert.NoError(t, err)
			got <- all
		}()
		synctest.Wait()
		publish(f, 11, 20) // one too many for slow, with the first
		f.Close(nil)
		assert.Equal(t, upTo(1, 20), <-got)
		all, err := collect(slow)
		require.ErrorIs(t, err, sessionmanager.ErrLagged)
		assert.Equal(t, upTo(1, 10), all, "what its queue holds, without a gap")
	})
}

func TestReplayIsNotHeldAgainstAListener(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f := newFanout(t, 3, 5)
		publish(f, 1, 3)
		early := f.Subscribe(t.Context())
		publish(f, 4, 9)
		late := f.Subscribe(t.Context())
		publish(f, 10, 12)
		all, err := collect(early)
		require.ErrorIs(t, err, sessionmanager.ErrLagged)
		assert.Equal(t, upTo(1, 6), all)
		f.Close(nil)
		all, err = collect(late)
		require.NoError(t, err)
		assert.Equal(t, upTo(5, 12), all, "the last five, and three more")
	})
}

// Old events that were read free no room for new ones, new ones that were read do.
func TestQueueBoundsWhatIsNewAndUnread(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f := newFanout(t, 2, 3)
		publish(f, 1, 3)
		var got []int
		for e, err := range f.Subscribe(t.Context()) {
			if err != nil {
				require.ErrorIs(t, err, sessionmanager.ErrLagged)
				break
			}
			got = append(got, e)
			switch e {
			case 1:
				publish(f, 4, 5)
			case 4:
				publish(f, 6, 6)
			case 5:
				publish(f, 7, 9) // 6 and 7 fill it
			}
		}
		assert.Equal(t, upTo(1, 7), got)
	})
}

func TestListenerAfterTheEndIsCompleted(t *testing.T) {
	for name, end := range map[string]error{"well": nil, "badly": errBroken} {
		t.Run(name, func(t *testing.T) {
			f := newFanout(t, 1, 2)
			publish(f, 1, 3)
			f.Close(end)
			f.Close(errFn) // the first counts
			f.Publish(4)
			for range 2 {
				got, err := collect(f.Subscribe(t.Context()))
				assert.Equal(t, end, err)
				assert.Equal(t, []int{2, 3}, got)
			}
		})
	}
}

func TestStreamEndsWithItsContext(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f := newFanout(t, 10, 10)
		why := errors.New("left")
		ctx := cancelledAfter(t.Context(), time.Second, why)
		begun := time.Now()
		publish(f, 1, 2)
		got, err := collect(f.Subscribe(ctx))
		require.ErrorIs(t, err, context.Canceled)
		require.ErrorIs(t, err, why)
		assert.Equal(t, []int{1, 2}, got)
		assert.Equal(t, time.Second, time.Since(begun))
		got, err = collect(f.Subscribe(ctx))
		require.ErrorIs(t, err, context.Canceled)
		assert.Empty(t, got, "whatever still waits")
	})
}

func TestStreamIsLeftAtAnyTime(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f := newFanout(t, 1, 0)
		stream := f.Subscribe(t.Context())
		f.Publish(1)
		for e, err := range stream {
			require.NoError(t, err)
			assert.Equal(t, 1, e)
			break
		}
		publish(f, 2, 100) // nobody is there to lag
		got, err := collect(stream)
		require.NoError(t, err)
		assert.Empty(t, got, "a second time it is empty")

		assert.Panics(t, func() {
			s := f.Subscribe(t.Context())
			f.Publish(1)
			for range s {
				panic("in the loop")
			}
		})
		ctx, cancel := context.WithCancel(t.Context())
		never := f.Subscribe(ctx)
		cancel()
		synctest.Wait()
		publish(f, 1, 100)
		_, err = collect(never)
		require.ErrorIs(t, err, context.Canceled, "not that it lagged")
	})
}

// Whoever has left, or is not there any more, holds no event.
func TestListenerThatLeftHoldsNothing(t *testing.T) {
	f, err := sessionmanager.NewFanout[*[64]byte](100, 0)
	require.NoError(t, err)
	publish := func(n int) (out []weak.Pointer[[64]byte]) {
		for range n {
			e := new([64]byte)
			f.Publish(e)
			out = append(out, weak.Make(e))
		}
		return out
	}
	ctx, cancel := context.WithCancel(t.Context())
	left, over := f.Subscribe(t.Context()), f.Subscribe(ctx)
	events := publish(10)
	for range left {
		break
	}
	cancel()
	events = append(events, publish(10)...)
	require.Eventually(t, func() bool {
		runtime.GC()
		return !slices.ContainsFunc(events, func(e weak.Pointer[[64]byte]) bool { return e.Value() != nil })
	}, 10*time.Second, time.Millisecond)
	runtime.KeepAlive(left)
	runtime.KeepAlive(over)
	runtime.KeepAlive(f)
}

func TestFanoutIsCheckedWhenItIsMade(t *testing.T) {
	for _, tt := range [][2]int{{0, 0}, {-1, 0}, {1, -1}, {0, -1}} {
		_, err := sessionmanager.NewFanout[int](tt[0], tt[1])
		require.ErrorIs(t, err, sessionmanager.ErrInvalid)
		if tt[0] <= 0 {
			assert.ErrorContains(t, err, "not greater than zero")
		}
		if tt[1] < 0 {
			assert.ErrorContains(t, err, "not zero or greater")
		}
	}
	_, err := collect(newFanout(t, 1, 0).Subscribe(nil)) //nolint:staticcheck // what nobody should
	require.ErrorIs(t, err, sessionmanager.ErrInvalid)
	_, err = collect(new(sessionmanager.Fanout[int]).Subscribe(t.Context()))
	require.ErrorIs(t, err, sessionmanager.ErrInvalid)
}

// A listener that comes back gets what it missed, if the replay holds it.
func TestListenersOfASession(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, _ := newManager(t)
		f := newFanout(t, 10, 100)
		s := open(t, m, &fake{shutdown: func(context.Context) error { f.Close(nil); return nil }})
		listen := func() (got []int) {
			_, detach, err := s.Attach()
			require.NoError(t, err)
			defer detach()
			for e := range f.Subscribe(t.Context()) {
				if got = append(got, e); e%10 == 0 {
					break
				}
			}
			return got
		}
		publish(f, 1, 10)
		assert.Equal(t, upTo(1, 10), listen())
		publish(f, 11, 20)
		assert.Equal(t, upTo(1, 10), listen())
		assert.Equal(t, 20, slices.Max(last(f.Subscribe(t.Context()), 20)))
		require.NoError(t, s.Close(t.Context()))
		assert.Equal(t, upTo(1, 20), last(f.Subscribe(t.Context()), 100))
	})
}

// last reads at most n.
func last(stream func(func(int, error) bool), n int) (got []int) {
	for e := range stream {
		if got = append(got, e); len(got) == n {
			break
		}
	}
	return got
}
