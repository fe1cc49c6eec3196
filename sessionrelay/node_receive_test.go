package sessionrelay_test

// Messages from clients: processed once in effect, whatever becomes of whoever does it.

import (
	"context"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/sessionrelay"
)

// says is a handler with that reply.
func says(reply string) func(context.Context) ([]byte, error) {
	return func(context.Context) ([]byte, error) { return []byte(reply), nil }
}

func TestMessageIsProcessedOnce(t *testing.T) {
	onEach(t, func(t *testing.T, f *fleet) {
		ctx := t.Context()
		a, _ := f.node("a")
		b, _ := f.node("b")
		conn, other := comes(t, a, new(client)), comes(t, a, new(client))
		var runs, done, busy atomic.Int64
		var all sync.WaitGroup
		for range 20 {
			all.Go(func() {
				reply, err := conn.Receive(ctx, "m", func(context.Context) ([]byte, error) {
					return fmt.Append(nil, "reply ", runs.Add(1)), nil
				})
				switch {
				case err == nil:
					done.Add(1)
					assert.Equal(t, "reply 1", string(reply))
				case assert.ErrorIs(t, err, sessionrelay.ErrInProgress):
					busy.Add(1)
					assert.Nil(t, reply)
				}
			})
		}
		all.Wait()
		assert.Equal(t, int64(1), runs.Load())
		assert.Equal(t, int64(20), done.Load()+busy.Load())
		conn = comes(t, b, new(client), conn.Session())
		reply, err := conn.Receive(ctx, "m", never(t))
		require.NoError(t, err)
		assert.Equal(t, "reply 1", string(reply))
		reply, err = other.Receive(ctx, "m", says("of another session"))
		require.NoError(t, err)
		assert.Equal(t, "of another session", string(reply))

		require.NoError(t, conn.Forget(ctx, "m", "never was"))
		reply, err = conn.Receive(ctx, "m", says("anew"))
		require.NoError(t, err)
		assert.Equal(t, "anew", string(reply))
		reply, err = other.Receive(ctx, "m", never(t))
		require.NoError(t, err)
		assert.Equal(t, "of another session", string(reply))
	})
}

func TestKeptReplyIsTheReply(t *testing.T) {
	onEach(t, func(t *testing.T, f *fleet) {
		a, _ := f.node("a")
		conn := comes(t, a, new(client))
		for id, want := range map[string][]byte{"nil": nil, "empty": {}, "bytes": {0, 0xff, '\n'}, "long": make([]byte, 1<<20)} {
			got, err := conn.Receive(t.Context(), id, func(context.Context) ([]byte, error) { return want, nil })
			require.NoError(t, err)
			assert.Equal(t, want, got)
			got, err = conn.Receive(t.Context(), id, never(t))
			require.NoError(t, err)
			assert.Equal(t, want, got, "%s: the reply of another delivery", id)
		}
	})
}

func TestMessageWhoseHandlerFailsHasNeverCome(t *testing.T) {
	onEach(t, func(t *testing.T, f *fleet) {
		ctx := t.Context()
		a, _ := f.node("a")
		conn := comes(t, a, new(client))
		for how, handle := range map[string]func(context.Context) ([]byte, error){
			"error":  func(context.Context) ([]byte, error) { return []byte("no reply"), errNo },
			"panic":  func(context.Context) ([]byte, error) { panic(errNo) },
			"Goexit": func(context.Context) ([]byte, error) { runtime.Goexit(); return nil, nil },
			"context": func(context.Context) ([]byte, error) { // of its caller, who does not wait for the rest
				return nil, errNo
			},
		} {
			ctx, cancel := context.WithCancel(ctx)
			if how == "context" {
				handle = func(within context.Context) ([]byte, error) { cancel(); <-within.Done(); return nil, errNo }
			}
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				defer func() {
					if how == "panic" {
						assert.Equal(t, errNo, recover(), "it passes through")
					}
				}()
				reply, err := conn.Receive(ctx, how, handle)
				assert.Equal(t, errNo, err, how)
				assert.Nil(t, reply)
			}()
			<-ended
			cancel()
			for range 2 {
				reply, err := conn.Receive(t.Context(), how, says("at last"))
				require.NoError(t, err, how)
				assert.Equal(t, "at last", string(reply))
			}
		}
	})
}

func TestMessageInProgressIsNotProcessedTwice(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		ctx := t.Context()
		a, _ := f.node("a")
		b, _ := f.node("b")
		conn := comes(t, a, new(client))
		var first string
		go func() {
			reply, err := conn.Receive(ctx, "m", func(context.Context) ([]byte, error) {
				time.Sleep(20 * time.Second)
				return []byte("slow"), nil
			})
			assert.NoError(t, err, "a connection that moves does not lose what it processed")
			first = string(reply)
		}()
		synctest.Wait()
		_, err := conn.Receive(ctx, "m", never(t))
		require.ErrorIs(t, err, sessionrelay.ErrInProgress)
		again := comes(t, b, new(client), conn.Session())
		_, err = again.Receive(ctx, "m", never(t))
		require.ErrorIs(t, err, sessionrelay.ErrInProgress)
		_, err = again.Receive(ctx, "other", says("free"))
		require.NoError(t, err)
		pass(20 * time.Second)
		assert.Equal(t, "slow", first)
		reply, err := again.Receive(ctx, "m", never(t))
		require.NoError(t, err)
		assert.Equal(t, "slow", string(reply))
	})
}

// Case 37 of the original: it had no states, and took what was in progress for done.
func TestMessageOfADeadProcessIsTakenOver(t *testing.T) {
	for patience, opts := range map[time.Duration][]sessionrelay.Option{
		30 * time.Second: nil, time.Minute: {sessionrelay.WithPatience(time.Minute)},
	} {
		t.Run(patience.String(), func(t *testing.T) {
			inBubble(t, func(t *testing.T, f *fleet) {
				ctx := t.Context()
				a, _ := f.node("a", opts...)
				conn := comes(t, a, new(client))
				begun := time.Now()
				var warned time.Duration
				var late error
				go func() {
					var reply []byte
					reply, late = conn.Receive(ctx, "m", func(ctx context.Context) ([]byte, error) {
						<-ctx.Done()
						warned = time.Since(begun)
						assert.ErrorIs(t, ctx.Err(), context.DeadlineExceeded)
						time.Sleep(time.Second)
						return []byte("late"), nil
					})
					assert.Equal(t, "late", string(reply))
				}()
				pass(patience - time.Millisecond)
				_, err := conn.Receive(ctx, "m", never(t))
				require.ErrorIs(t, err, sessionrelay.ErrInProgress)
				pass(time.Millisecond)
				reply, err := conn.Receive(ctx, "m", says("in its place"))
				require.NoError(t, err)
				assert.Equal(t, "in its place", string(reply))
				pass(time.Minute)
				assert.Equal(t, patience, warned)
				require.ErrorIs(t, late, sessionrelay.ErrTaken)
				reply, err = conn.Receive(ctx, "m", never(t))
				require.NoError(t, err)
				assert.Equal(t, "in its place", string(reply))
			})
		})
	}
}

func TestSlowHandlerThatNobodyReplacedIsDone(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, _ := f.node("a")
		conn := comes(t, a, new(client))
		reply, err := conn.Receive(t.Context(), "m", func(context.Context) ([]byte, error) {
			time.Sleep(time.Hour)
			return []byte("slow"), nil
		})
		require.NoError(t, err)
		assert.Equal(t, "slow", string(reply))
	})
}

func TestFailureOfAnOvertakenHandlerFreesNothing(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, _ := f.node("a")
		conn := comes(t, a, new(client))
		_, err := conn.Receive(t.Context(), "m", func(context.Context) ([]byte, error) {
			time.Sleep(30 * time.Second)
			_, err := conn.Receive(t.Context(), "m", says("in its place"))
			require.NoError(t, err)
			return nil, errNo
		})
		require.Equal(t, errNo, err)
		reply, err := conn.Receive(t.Context(), "m", never(t))
		require.NoError(t, err)
		assert.Equal(t, "in its place", string(reply))
	})
}

func TestEffectIsStoredThroughAnOutage(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		conn := comes(t, a, new(client))
		synctest.Wait()
		begun := time.Now()
		store.on("Complete", func(ctx context.Context) error {
			assert.NoError(t, ctx.Err())
			if time.Since(begun) < 10*time.Second {
				return down(ctx)
			}
			return nil
		})
		ctx, cancel := context.WithCancel(t.Context())
		reply, err := conn.Receive(ctx, "m", func(context.Context) ([]byte, error) { cancel(); return []byte("paid"), nil })
		require.NoError(t, err, "its caller's context does not count any more")
		assert.Equal(t, "paid", string(reply))
		assert.Less(t, store.times("Complete"), 12, "less and less often")
		assert.Greater(t, store.times("Complete"), 5)
		assert.Zero(t, store.times("Release"))
		again, err := conn.Receive(t.Context(), "m", never(t))
		require.NoError(t, err)
		assert.Equal(t, reply, again)
	})
}

func TestEffectThatCannotBeStoredIsAnError(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		conn := comes(t, a, new(client))
		synctest.Wait()
		for _, tt := range []struct {
			answer  error
			longest time.Duration
		}{
			{sessionrelay.ErrUnavailable, 30 * time.Second}, {sessionrelay.ErrGone, 0}, {sessionrelay.ErrTaken, 0}, {errNo, 0},
		} {
			begun := time.Now()
			store.on("Complete", func(context.Context) error { return tt.answer })
			_, err := conn.Receive(t.Context(), tt.answer.Error(), says("paid"))
			require.ErrorIs(t, err, tt.answer)
			assert.LessOrEqual(t, time.Since(begun), tt.longest)
			if tt.longest > 0 {
				assert.Greater(t, time.Since(begun), tt.longest*3/4)
			}
		}
		assert.Zero(t, store.times("Release"), "what has had its effect is not free")
		store.on("Complete", nil)
		pass(30 * time.Second)
		reply, err := conn.Receive(t.Context(), sessionrelay.ErrUnavailable.Error(), says("paid twice"))
		require.NoError(t, err)
		assert.Equal(t, "paid twice", string(reply))
	})
}

func TestNothingIsProcessedThatCannotBeClaimed(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		conn := comes(t, a, new(client))
		synctest.Wait()
		for _, answer := range []error{sessionrelay.ErrUnavailable, context.Canceled} {
			store.on("Accept", func(context.Context) error { return answer })
			reply, err := conn.Receive(t.Context(), "m", never(t))
			require.ErrorIs(t, err, answer)
			assert.Nil(t, reply)
		}
		synctest.Wait()
		assert.Zero(t, store.times("Complete"))
		assert.Equal(t, 2, store.times("Release"), "it may have been claimed")
		store.on("Accept", nil)
		store.on("Release", down)
		_, err := conn.Receive(t.Context(), "m", func(context.Context) ([]byte, error) { return nil, errNo })
		assert.Equal(t, errNo, err, "not the store's")
		_, err = conn.Receive(t.Context(), "m", never(t))
		require.ErrorIs(t, err, sessionrelay.ErrInProgress)
		pass(30 * time.Second)
		_, err = conn.Receive(t.Context(), "m", says("free at the deadline"))
		require.NoError(t, err)
	})
}

func TestEndedConnectionReceivesNothing(t *testing.T) {
	for how, end := range map[string]func(*testing.T, *sessionrelay.Node, *sessionrelay.Conn){
		"disconnected": func(_ *testing.T, _ *sessionrelay.Node, c *sessionrelay.Conn) { c.Disconnect() },
		"moved": func(t *testing.T, n *sessionrelay.Node, c *sessionrelay.Conn) {
			comes(t, n, new(client), c.Session())
		},
		"removed": func(t *testing.T, n *sessionrelay.Node, c *sessionrelay.Conn) {
			require.NoError(t, n.Remove(t.Context(), c.Session()))
		},
	} {
		t.Run(how, func(t *testing.T) {
			inBubble(t, func(t *testing.T, f *fleet) {
				a, store := f.node("a")
				conn := comes(t, a, new(client))
				end(t, a, conn)
				synctest.Wait()
				_, err := conn.Receive(t.Context(), "m", never(t))
				require.ErrorIs(t, err, sessionrelay.ErrMoved)
				assert.Zero(t, store.times("Accept"))
			})
		})
	}
}

func TestAnswerIsProcessedOnceWhereverItComes(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		ctx := t.Context()
		a, _ := f.node("a")
		b, _ := f.node("b")
		conn := comes(t, a, new(client))
		id, err := b.Request(ctx, conn.Session(), []byte("ready?"), []byte("the question"))
		require.NoError(t, err)
		var abouts []string
		handle := func(ctx context.Context) ([]byte, error) {
			about, first, err := conn.Answered(ctx, id)
			if first {
				abouts = append(abouts, string(about))
			}
			return nil, err
		}
		_, err = conn.Receive(ctx, "answer", handle)
		require.NoError(t, err)
		_, err = conn.Receive(ctx, "answer under another id", handle)
		require.NoError(t, err)
		assert.Equal(t, []string{"the question"}, abouts)
	})
}

func TestOfThoseThatTakeAnAnswerOneIsFirst(t *testing.T) {
	onEach(t, func(t *testing.T, f *fleet) {
		a, store := f.node("a")
		conn := comes(t, a, new(client))
		id, err := a.Request(t.Context(), conn.Session(), nil, []byte("about"))
		require.NoError(t, err)
		var firsts atomic.Int64
		var all sync.WaitGroup
		for range 100 {
			all.Go(func() {
				about, first, err := answered(t.Context(), conn, id)
				assert.NoError(t, err)
				if first {
					firsts.Add(1)
					assert.Equal(t, "about", string(about))
				}
			})
		}
		all.Wait()
		assert.Equal(t, int64(1), firsts.Load())
		store.on("Take", down)
		_, first, err := answered(t.Context(), conn, id)
		require.ErrorIs(t, err, sessionrelay.ErrUnavailable)
		assert.False(t, first)
		assert.NotErrorIs(t, err, sessionrelay.ErrGone)
	})
}
