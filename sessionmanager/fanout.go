package sessionmanager

import (
	"context"
	"errors"
	"iter"
	"sync"
	"sync/atomic"
)

// ErrLagged ends the stream of a listener that did not keep up: more events waited
// for it than its queue holds.
var ErrLagged = errors.New("sessionmanager: listener too slow")

// Fanout hands a worker's events to several listeners, to each all of them, in the
// order in which they were published. A slow listener neither holds up the worker
// nor the others: it is cut off when its queue is full. Make one with [NewFanout];
// it is safe for concurrent use.
type Fanout[E any] struct {
	queue, replay int

	mu     sync.Mutex
	last   []E // what a new listener is told first: at most replay
	lists  map[*listener[E]]struct{}
	closed bool
	err    error
}

// listener is one stream.
type listener[E any] struct {
	f    *Fanout[E]
	more chan struct{} // something has changed; capacity 1

	// Under the fanout's mu.
	waiting []E
	old     int // of waiting, those that were published before
	over    bool
	err     error
}

// NewFanout returns a fanout without listeners. At most queue new events wait for
// each, and one that comes later is told the last replay events first; 0: none.
// [ErrInvalid] unless queue is greater than zero and replay is zero or greater.
func NewFanout[E any](queue, replay int) (*Fanout[E], error) {
	var wrong []error
	if queue <= 0 {
		wrong = append(wrong, invalid("the queue is %d, not greater than zero", queue))
	}
	if replay < 0 {
		wrong = append(wrong, invalid("the replay is %d, not zero or greater", replay))
	}
	if len(wrong) > 0 {
		return nil, errors.Join(wrong...)
	}
	return &Fanout[E]{queue: queue, replay: replay, lists: map[*listener[E]]struct{}{}}, nil
}

// Publish hands e to all listeners and never waits for them. Once the fanout is
// closed it does nothing.
func (f *Fanout[E]) Publish(e E) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return
	}
	if f.replay > 0 {
		f.last = shift(f.last, f.replay-1)
		f.last = append(f.last, e)
	}
	for l := range f.lists {
		if len(l.waiting)-l.old >= f.queue {
			l.end(ErrLagged)
			continue
		}
		l.waiting = append(l.waiting, e)
		l.wake()
	}
}

// shift drops the first of q until keep are left.
func shift[E any](q []E, keep int) []E {
	var none E
	for len(q) > keep {
		q[0] = none // it may be large
		q = q[1:]
	}
	return q
}

// Close ends all streams, those to come too, once they have been told what was
// published before: with err, or without an error when it is nil. The first Close
// counts.
func (f *Fanout[E]) Close(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return
	}
	f.closed, f.err = true, err
	for l := range f.lists {
		l.end(err)
	}
}

// Subscribe returns a stream of what is published from now on, and of the replay
// before it. It is to be ranged over once; a second time it is empty. The stream is
// over when the loop is left, and by itself when
//
//   - ctx ends: its last pair has ctx's error, whatever still waits,
//   - the fanout is closed: the last pair has the error of Close, if there is one,
//   - the listener is too slow: after what its queue holds the last pair has [ErrLagged].
//
// A stream that is never ranged over takes up its queue until ctx ends, the fanout
// is closed or the queue is full.
func (f *Fanout[E]) Subscribe(ctx context.Context) iter.Seq2[E, error] {
	err := checkContext(ctx)
	if f == nil || f.lists == nil {
		err = errors.Join(err, invalid("the fanout was not made by NewFanout"))
	}
	if err != nil {
		return func(yield func(E, error) bool) {
			var none E
			yield(none, err)
		}
	}
	l := &listener[E]{f: f, more: make(chan struct{}, 1)}
	f.mu.Lock()
	l.waiting = append(l.waiting, f.last...)
	l.old = len(l.waiting)
	if f.lists[l] = struct{}{}; f.closed {
		l.end(f.err)
	}
	f.mu.Unlock()
	forget := context.AfterFunc(ctx, l.leave)
	var ranged atomic.Bool
	return func(yield func(E, error) bool) {
		if ranged.Swap(true) {
			return
		}
		defer forget()
		defer l.leave()
		for l.yield(ctx, yield) {
		}
	}
}

// yield hands on what is next, and reports whether there may be more.
func (l *listener[E]) yield(ctx context.Context, yield func(E, error) bool) bool {
	e, ok := l.next(ctx)
	switch {
	case ctx.Err() != nil:
		var none E
		yield(none, ended(ctx))
	case ok:
		return yield(e, nil)
	case l.err != nil:
		yield(e, l.err)
	}
	return false
}

// next waits for an event; not ok: it is over.
func (l *listener[E]) next(ctx context.Context) (e E, ok bool) {
	for {
		l.f.mu.Lock()
		if len(l.waiting) > 0 {
			e = l.waiting[0]
			l.waiting = shift(l.waiting, len(l.waiting)-1)
			l.old = max(l.old-1, 0)
			l.f.mu.Unlock()
			return e, true
		}
		over := l.over
		l.f.mu.Unlock()
		if over {
			return e, false
		}
		select {
		case <-l.more:
		case <-ctx.Done():
			return e, false
		}
	}
}

// end ends the stream after what waits. f.mu is held.
func (l *listener[E]) end(err error) {
	l.over, l.err = true, err
	delete(l.f.lists, l)
	l.wake()
}

func (l *listener[E]) wake() {
	select {
	case l.more <- struct{}{}:
	default:
	}
}

// leave ends the stream without what waits.
func (l *listener[E]) leave() {
	l.f.mu.Lock()
	defer l.f.mu.Unlock()
	delete(l.f.lists, l)
	l.waiting = nil
}
