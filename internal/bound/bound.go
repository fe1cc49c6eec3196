// Package bound waits no longer than it is told to: for a call that its context
// does not end, or for time to pass. A context alone does not end a call: go-redis
// with default options stays in a socket read for seconds past its deadline.
package bound

import (
	"context"
	"errors"
	"time"
)

var (
	// ErrTimeout says that the call did not return in time, and was left behind.
	ErrTimeout = errors.New("no answer in time")
	// ErrGoexit says that the call ended its goroutine, as t.FailNow does.
	ErrGoexit = errors.New("the call ended its goroutine (runtime.Goexit)")
)

// Call runs op in a goroutine of its own and leaves it behind when d has passed
// or ctx has ended; op's context has ended then, too. late, unless nil, gets what
// an op that was left behind returned after all without an error. The error is
// op's, or ctx's cause, [ErrTimeout] or [ErrGoexit]. A panic of op is for op to
// recover.
func Call[T any](ctx context.Context, d time.Duration, op func(context.Context) (T, error), late func(T)) (T, error) {
	type result struct {
		v   T
		err error
	}
	opCtx, cancel := context.WithTimeout(ctx, d)
	done := make(chan result, 1)
	go func() {
		r := result{err: ErrGoexit}
		defer func() {
			done <- r
			cancel() // after it, so that an end of opCtx with nothing in done is a timeout
		}()
		r.v, r.err = op(opCtx)
	}()
	var zero T
	<-opCtx.Done()
	select {
	case r := <-done:
		if r.err != nil && ctx.Err() != nil {
			return zero, context.Cause(ctx)
		}
		return r.v, r.err
	default:
	}
	if late != nil {
		go func() {
			if r := <-done; r.err == nil {
				late(r.v)
			}
		}()
	}
	if ctx.Err() != nil {
		return zero, context.Cause(ctx)
	}
	return zero, ErrTimeout
}

// Sleep waits for d, or until ctx has ended, and returns ctx's error then. Zero and less
// is no wait, and makes no timer.
func Sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
