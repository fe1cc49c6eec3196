// Package hub wakes whoever waits for something to change in Redis. A [Hub]
// keeps one pub/sub subscription for all channels that are watched through it.
//
// # What callers may rely on
//
// A wake-up is a hint: look again. It may come late, more than once, without
// cause, or never; what was published is ignored, so a forged message wakes and
// does no more. Whoever must not miss a change polls as well; the hub makes it
// earlier. What does hold:
//
//   - Watch and stop return at once, whatever the state of Redis.
//   - While the subscription stands, every message on a channel wakes every
//     watcher of the channel.
//   - Messages may be lost while it does not stand. So all watchers of a
//     channel are woken when Redis confirms the channel, the first time and
//     after each loss: what was missed until then is found by looking. A
//     watcher who joins a confirmed channel has missed nothing and is not woken.
//   - After stop has returned its func is not called, except for a call already
//     under way. After Close has returned none is.
//   - Nothing runs for a hub that watches nothing.
//
// # States, and how each step fails
//
//	stopped ──Watch──▶ connecting ──▶ subscribed ──nothing watched for 5 s──▶ stopped
//	                    ▲      │          │
//	                    └──────┴─ pause ──┘
//
//	step         fails by                         what follows
//	connect      refused, timeout, bad login      pause, connect again
//	subscribe    connection lost                  pause, connect again
//	subscribe    refused by the server, an ACL    that channel stays silent, others do not suffer:
//	             for instance                     reconnect once, then one channel per command
//	unsubscribe  connection lost                  pause, connect again; the channel is not asked for
//	receive      connection lost or closed        pause, connect again
//	receive      silence (half-open connection)   a PING after 3 s; without any answer to it within
//	                                              3 s more, connect again
//	receive      messages faster than they are    TCP pushes back; at its output limit the server
//	             handled                          closes the connection, see above
//
// A pause lasts 50 to 100 ms, and doubles with each connection that ended within
// 5 s of its start up to 2.5 to 5 s. Connecting again always means a new
// connection and subscribes whatever is watched by then.
//
// With a cluster the subscription is on one node, to which the others forward.
// A [redis.Ring] has no subscription that spans its shards: it gives no hints.
package hub

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/sessionlock/sessionlock/internal/bound"
)

const (
	linger   = 5 * time.Second        // how long a subscription without channels is kept
	beat     = 3 * time.Second        // how long silence is taken for health, and then for death
	minPause = 100 * time.Millisecond // before the first reconnect
	maxPause = 5 * time.Second        // and before the last
	maxBatch = 1000                   // channels in one command
)

// errRefused: the server answered a command with an error. Which one is not
// known, and of a command with many channels it refused all.
var errRefused = errors.New("hub: refused")

// Hub is one subscription for many watchers. Safe for concurrent use.
type Hub struct {
	rdb  redis.UniversalClient
	kick chan struct{} // something is in dirty; capacity 1
	runs sync.WaitGroup

	mu      sync.Mutex // never held during I/O or a call of a watcher
	watched map[string]map[*watcher]struct{}
	dirty   map[string]struct{} // channels that gained their first watcher or lost their last
	cancel  context.CancelFunc  // ends the run; nil: none
	closed  bool
}

type watcher struct {
	changed func()
	stopped atomic.Bool
}

// New returns a Hub on rdb. It does no I/O and starts no goroutine; those of
// Watch end by themselves when nothing is watched, or by Close. rdb stays the
// caller's and must be closed after the hub.
func New(rdb redis.UniversalClient) *Hub {
	return &Hub{
		rdb:     rdb,
		kick:    make(chan struct{}, 1),
		watched: map[string]map[*watcher]struct{}{},
		dirty:   map[string]struct{}{},
	}
}

// Watch has changed called whenever channel may have news, until stop. changed
// is called from one goroutine that serves all watchers: it must not block. It
// may call Watch and any stop, but not Close. stop may be called repeatedly.
// After Close, Watch does nothing.
func (h *Hub) Watch(channel string, changed func()) (stop func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return func() {}
	}
	if len(h.watched[channel]) == 0 {
		h.watched[channel] = map[*watcher]struct{}{}
		h.note(channel)
	}
	w := &watcher{changed: changed}
	h.watched[channel][w] = struct{}{}
	if h.cancel == nil {
		ctx, cancel := context.WithCancel(context.Background())
		h.cancel = cancel
		h.runs.Go(func() { h.run(ctx) })
	}
	return func() { h.stop(channel, w) }
}

func (h *Hub) stop(channel string, w *watcher) {
	if w.stopped.Swap(true) {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.watched[channel], w)
	if len(h.watched[channel]) == 0 && !h.closed {
		delete(h.watched, channel)
		h.note(channel)
	}
}

// note tells the run, if there is one, to look at channel. Called with mu held.
func (h *Hub) note(channel string) {
	h.dirty[channel] = struct{}{}
	select {
	case h.kick <- struct{}{}:
	default:
	}
}

// Close ends all watches and returns when the hub's goroutines have. That takes
// no longer than a go-redis call that is under way: on a server that hangs, its
// timeouts for dialling and one handshake. Closing again waits likewise.
func (h *Hub) Close() {
	h.mu.Lock()
	h.closed = true
	clear(h.watched)
	clear(h.dirty)
	if h.cancel != nil {
		h.cancel()
	}
	h.mu.Unlock()
	h.runs.Wait()
}

// run keeps a subscription up until nothing is watched or the hub is closed.
func (h *Hub) run(ctx context.Context) {
	batch, failures := maxBatch, 0
	for {
		channels := h.begin()
		if channels == nil {
			return
		}
		began := time.Now()
		err := h.serve(ctx, channels, batch)
		if err == nil {
			continue
		}
		if errors.Is(err, errRefused) {
			batch = 1
		}
		// The node may have been replaced, and who only listens learns of it from nobody else.
		if cluster, ok := h.rdb.(*redis.ClusterClient); ok {
			cluster.ReloadState(ctx)
		}
		if time.Since(began) >= maxPause {
			failures = 0
		}
		_ = bound.Sleep(ctx, pause(failures))
		failures++
	}
}

// begin returns all watched channels, or nil after ending the run, in one step:
// a Watch that comes later starts another.
func (h *Hub) begin() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	clear(h.dirty)
	if len(h.watched) == 0 {
		h.cancel()
		h.cancel = nil
		return nil
	}
	return slices.Collect(maps.Keys(h.watched))
}

// pause is the time to wait after n failures in a row. It is random by half, so
// that a fleet does not come back to a restarted server as one.
func pause(n int) time.Duration {
	d := min(minPause<<min(n, 16), maxPause)
	return d/2 + rand.N(d/2) //nolint:gosec // not a secret
}

// link is one connection of a run.
type link struct {
	sub    *redis.PubSub
	asked  map[string]struct{} // channels that were subscribed on it
	batch  int
	frames atomic.Int64 // received so far
	lost   chan error   // why it can receive no more; capacity 1
}

// serve connects, subscribes channels and whatever is watched later, and wakes
// the watchers. It returns nil when the hub is closed or has watched nothing
// for a while, otherwise why the connection cannot be used any more.
func (h *Hub) serve(ctx context.Context, channels []string, batch int) error {
	sub, err := open(ctx, h.rdb)
	if err != nil {
		return err
	}
	l := &link{sub: sub, batch: batch, asked: map[string]struct{}{}, lost: make(chan error, 1)}
	first, rest := channels[:min(batch, len(channels))], channels[min(batch, len(channels)):]
	// The first command opens the connection. Only then is it read from, and
	// only when it is read from is more sent: a server may want its replies
	// taken before it takes more commands.
	if err := l.subscribe(ctx, first); err != nil {
		_ = sub.Close()
		return err
	}
	var receiver sync.WaitGroup
	receiver.Go(func() { l.lost <- h.receive(ctx, l) })
	defer receiver.Wait()
	defer sub.Close()
	if err := l.subscribe(ctx, rest); err != nil {
		return err
	}
	return h.tend(ctx, l)
}

// tend keeps l's subscriptions what they should be, and l alive.
func (h *Hub) tend(ctx context.Context, l *link) error {
	heart := time.NewTicker(beat)
	defer heart.Stop()
	var idle <-chan time.Time
	var seen int64
	pinged := false
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-idle:
			return nil
		case err := <-l.lost:
			return err
		case <-h.kick:
			add, drop, none := h.changes(l.asked)
			if err := errors.Join(l.unsubscribe(ctx, drop), l.subscribe(ctx, add)); err != nil {
				return err
			}
			switch {
			case !none:
				idle = nil
			case idle == nil:
				idle = time.After(linger)
			}
		case <-heart.C:
			frames := l.frames.Load()
			silent := frames == seen
			seen = frames
			if silent && pinged {
				return errors.New("hub: connection is silent")
			}
			if pinged = silent; !pinged {
				continue
			}
			if err := l.sub.Ping(ctx); err != nil {
				return fmt.Errorf("hub: ping: %w", err)
			}
		}
	}
}

// changes compares what is watched with what was asked for.
func (h *Hub) changes(asked map[string]struct{}) (add, drop []string, none bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for channel := range h.dirty {
		_, want := h.watched[channel]
		_, have := asked[channel]
		switch {
		case want && !have:
			add = append(add, channel)
		case have && !want:
			drop = append(drop, channel)
		}
	}
	clear(h.dirty)
	return add, drop, len(h.watched) == 0
}

// open returns an empty subscription, without I/O. A Ring panics instead; what
// it cannot do must not end the process.
func open(ctx context.Context, rdb redis.UniversalClient) (sub *redis.PubSub, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("hub: subscribe: %v", r)
		}
	}()
	return rdb.Subscribe(ctx), nil
}

func (l *link) subscribe(ctx context.Context, channels []string) error {
	for some := range slices.Chunk(channels, l.batch) {
		if err := l.sub.Subscribe(ctx, some...); err != nil {
			return fmt.Errorf("hub: subscribe: %w", err)
		}
		for _, channel := range some {
			l.asked[channel] = struct{}{}
		}
	}
	return nil
}

func (l *link) unsubscribe(ctx context.Context, channels []string) error {
	for some := range slices.Chunk(channels, maxBatch) {
		if err := l.sub.Unsubscribe(ctx, some...); err != nil {
			return fmt.Errorf("hub: unsubscribe: %w", err)
		}
		for _, channel := range some {
			delete(l.asked, channel)
		}
	}
	return nil
}

// receive wakes watchers until the connection is lost, and returns why. It
// reads without a deadline: a reply cut in two by one would be read as garbage
// afterwards. The end comes by an error or by closing the subscription.
//
// PubSub itself would connect again and go on. That is not used, since it can
// neither be paced nor told that a connection is half open; the connection it
// may have made is closed with it.
func (h *Hub) receive(ctx context.Context, l *link) error {
	for {
		frame, err := l.sub.Receive(ctx)
		l.frames.Add(1)
		switch {
		case err == nil:
		case !errors.As(err, new(redis.Error)):
			return fmt.Errorf("hub: receive: %w", err)
		case l.batch > 1:
			return fmt.Errorf("%w: %w", errRefused, err)
		}
		switch f := frame.(type) {
		case *redis.Message:
			h.wake(f.Channel)
		case *redis.Subscription: // that of an unsubscription finds nobody, or wakes for nothing
			h.wake(f.Channel)
		}
	}
}

func (h *Hub) wake(channel string) {
	h.mu.Lock()
	watchers := slices.Collect(maps.Keys(h.watched[channel]))
	h.mu.Unlock()
	for _, w := range watchers {
		if !w.stopped.Load() {
			w.changed()
		}
	}
}
