package sessionguard_test

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/internal/fleet"
	"github.com/sessionlock/sessionlock/internal/redistest"
	"github.com/sessionlock/sessionlock/sessionguard"
)

// Several processes, each this test binary run again with a monitor of its own,
// modify one session at once. A round is: everybody registers, and when all have,
// everybody commits.

const (
	processes = 4
	each      = 2 // requests of one process in a round
)

func TestMain(m *testing.M) {
	fleet.Main(newWorker)
	m.Run()
}

// setup is what the workers of one fleet have in common.
type setup struct {
	Redis string
	Drop  float64       // of the wake-ups, this share is lost,
	Twice float64       // this comes twice,
	Late  time.Duration // and each this late at most, so that they overtake each other
}

// round is one worker's part of a round.
type round struct {
	Session string
	Row     string // the Redis hash that stands for a row of a database
}

// result is what became of one request.
type result struct {
	Epoch   uint64
	Won     bool
	Err     string
	Verdict bool   // it was told that it is superseded or lost
	Cause   string // with which its context had ended when the round was over
}

// faulty loses, repeats and delays wake-ups.
type faulty struct {
	sessionguard.Store
	sessionguard.Watcher
	setup
}

func (f faulty) Watch(session string, changed func()) func() {
	return f.Watcher.Watch(session, func() {
		n := 1
		switch p := rand.Float64(); {
		case p < f.Drop:
			n = 0
		case p < f.Drop+f.Twice:
			n = 2
		}
		for range n {
			if f.Late > 0 {
				time.AfterFunc(rand.N(f.Late), changed)
			} else {
				changed()
			}
		}
	})
}

// worker is the far side of a fleet.
type worker struct {
	rdb      *redis.Client
	monitor  *sessionguard.Monitor
	requests []request // of the round, which the parent plays one after the other
}

type request struct {
	ctx   context.Context //nolint:containedctx // the request's, which is over with the round
	guard *sessionguard.Guard
}

func newWorker(config json.RawMessage) (fleet.Handler, error) {
	var s setup
	if err := json.Unmarshal(config, &s); err != nil {
		return nil, err
	}
	w := &worker{rdb: redis.NewClient(&redis.Options{Addr: s.Redis})}
	store := sessionguard.NewRedisStore(w.rdb)
	var err error
	w.monitor, err = sessionguard.New(nil, sessionguard.WithStore(faulty{store, store, s}))
	return w.handle, err
}

func (w *worker) handle(ctx context.Context, op string, arg json.RawMessage) (any, error) {
	var r round
	if err := json.Unmarshal(arg, &r); err != nil {
		return nil, err
	}
	switch op {
	case "register":
		return nil, w.register(ctx, r)
	case "commit":
		return w.commit(ctx, r), nil
	case "settle": // until the subscription stands and the last request is known to be the last
		return nil, w.settle(ctx)
	case "interrupted":
		last := slices.MaxFunc(w.requests, func(a, b request) int { return cmp.Compare(a.guard.Epoch(), b.guard.Epoch()) })
		<-last.ctx.Done()
		return map[string]time.Time{"At": time.Now()}, nil
	}
	return nil, fmt.Errorf("unknown op %s", op)
}

// register registers this worker's requests, all at once. A store that is down is
// tried again, as whoever sends a request would.
func (w *worker) register(ctx context.Context, r round) error {
	var all sync.WaitGroup
	errs := make([]error, each)
	w.requests = make([]request, each)
	for i := range each {
		all.Go(func() {
			errs[i] = untilUp(func() (err error) {
				w.requests[i].ctx, w.requests[i].guard, err = w.monitor.Register(ctx, r.Session)
				return err
			})
		})
	}
	all.Wait()
	return errors.Join(errs...)
}

// untilUp calls f until the store answers, for half a minute.
func untilUp(f func() error) (err error) {
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if err = f(); !errors.Is(err, sessionguard.ErrUnavailable) {
			return err
		}
	}
	return err
}

// settle waits until the server has this process's subscription of the session: what
// it is told from then on arrives.
func (w *worker) settle(ctx context.Context) error {
	for ctx.Err() == nil {
		channels, err := w.rdb.PubSubChannels(ctx, "*").Result()
		if err != nil || len(channels) > 0 {
			return err
		}
		time.Sleep(time.Millisecond)
	}
	return ctx.Err()
}

// row is an UPDATE … WHERE epoch <= $epoch, and counts those that found the row.
var row = redis.NewScript(`
if tonumber(redis.call('HGET', KEYS[1], 'epoch') or 0) > tonumber(ARGV[1]) then return 0 end
redis.call('HSET', KEYS[1], 'epoch', ARGV[1])
redis.call('HINCRBY', KEYS[1], 'writes', 1)
return 1`)

// commit commits with the context of nobody: a request that does not look at its
// own is refused all the same.
func (w *worker) commit(ctx context.Context, r round) []result {
	results := make([]result, each)
	var all sync.WaitGroup
	for i, q := range w.requests {
		all.Go(func() {
			defer q.guard.End()
			err := untilUp(func() error {
				return q.guard.Commit(ctx, func(ctx context.Context, epoch uint64) (bool, error) {
					return row.Run(ctx, w.rdb, []string{r.Row}, epoch).Bool()
				})
			})
			res := result{Epoch: q.guard.Epoch(), Won: err == nil, Verdict: errors.Is(err, sessionguard.ErrSuperseded) || errors.Is(err, sessionguard.ErrLost)}
			if err != nil {
				res.Err = err.Error()
			}
			if cause := context.Cause(q.ctx); cause != nil {
				res.Cause = cause.Error()
			}
			results[i] = res
		})
	}
	all.Wait()
	return results
}

// play plays one round and returns what became of its requests. between runs while
// everybody has registered and nobody committed.
func play(t *testing.T, workers []*fleet.Process, r round, between func()) (results []result) {
	t.Helper()
	parts := make([][]result, len(workers))
	everybody(t, workers, "register", r, func(int) any { return nil })
	between()
	everybody(t, workers, "commit", r, func(i int) any { return &parts[i] })
	for _, p := range parts {
		results = append(results, p...)
	}
	return results
}

func everybody(t *testing.T, workers []*fleet.Process, op string, r round, into func(int) any) {
	t.Helper()
	var all sync.WaitGroup
	for i, w := range workers {
		all.Go(func() {
			assert.NoError(t, w.Call(t.Context(), op, r, into(i)))
		})
	}
	all.Wait()
}

// winners returns the winners' epochs, and the highest of all.
func winners(t *testing.T, results []result) (won []uint64, highest uint64) {
	t.Helper()
	seen := map[uint64]bool{}
	for _, r := range results {
		assert.False(t, seen[r.Epoch], "epoch given out twice")
		seen[r.Epoch] = true
		highest = max(highest, r.Epoch)
		if r.Won {
			won = append(won, r.Epoch)
			continue
		}
		assert.True(t, r.Verdict, r.Err)
		assert.NotEmpty(t, r.Cause, "refused, and its context goes on")
	}
	return won, highest
}

// Whatever becomes of the wake-ups: of eight requests that modify a session at once
// exactly the last one to register writes.
func TestFleetOfSimultaneousModifiersExactlyTheLastWrites(t *testing.T) {
	for name, s := range map[string]setup{
		"wake-ups arrive": {},
		"dropped":         {Drop: 1},
		"some dropped, repeated, late, reordered": {Drop: 0.3, Twice: 0.4, Late: 20 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := redistest.Start(t)
			s.Redis = server.Addr()
			oneWinnerEach(t, server.Client(), fleet.Start(t, processes, s), 1000, func(int) {})
		})
	}
}

// oneWinnerEach plays rounds; trouble runs in the middle of each.
func oneWinnerEach(t *testing.T, rdb *redis.Client, workers []*fleet.Process, rounds int, trouble func(i int)) {
	t.Helper()
	last := uint64(0)
	for i := range rounds {
		r := round{Session: "cart 7", Row: fmt.Sprint("row ", i)}
		won, highest := winners(t, play(t, workers, r, func() { trouble(i) }))
		require.Equal(t, []uint64{highest}, won, "round %d", i)
		require.Greater(t, highest, last)
		last = highest
		writes, err := rdb.HGet(t.Context(), r.Row, "writes").Int()
		require.NoError(t, err)
		require.Equal(t, 1, writes)
	}
}

func TestFleetWhoseSubscriptionsAreKilledHasOneWinner(t *testing.T) {
	server := redistest.Start(t)
	rdb := server.Client()
	oneWinnerEach(t, rdb, fleet.Start(t, processes, setup{Redis: server.Addr()}), 200, func(int) {
		assert.NoError(t, rdb.ClientKillByFilter(t.Context(), "TYPE", "pubsub").Err())
	})
}

func TestFleetOnARestartedRedisThatKeptItsDataHasOneWinner(t *testing.T) {
	server := redistest.StartDurable(t)
	oneWinnerEach(t, server.Client(), fleet.Start(t, processes, setup{Redis: server.Addr()}), 30, func(i int) {
		if i%3 == 0 {
			server.Restart()
		}
	})
}

// Without its data nobody can say who was the last: nobody writes. What comes
// afterwards is not concerned, and its epochs are greater.
func TestFleetOnARestartedRedisThatLostItsDataHasNoWinner(t *testing.T) {
	server := redistest.Start(t)
	workers := fleet.Start(t, processes, setup{Redis: server.Addr()})
	last := uint64(0)
	for i := range 10 {
		r := round{Session: "cart 7", Row: fmt.Sprint("row ", i)}
		won, highest := winners(t, play(t, workers, r, server.Restart))
		assert.Empty(t, won)
		assert.Greater(t, highest, last)
		r.Row += " again"
		won, last = winners(t, play(t, workers, r, func() {}))
		assert.Equal(t, []uint64{last}, won)
		assert.Greater(t, last, highest)
	}
}

// The new master has not heard of the last registrations: their epochs are not given
// out again.
func TestEpochsGrowThroughAFailoverThatLosesThem(t *testing.T) {
	t.Parallel()
	s := redistest.StartSentinel(t)
	rdb := s.Client()
	epoch := func() (epoch uint64) {
		t.Helper()
		m := newMonitor(t, rdb) // has seen nothing
		require.NoError(t, untilUp(func() error {
			_, g, err := m.Register(t.Context(), "cart 7")
			epoch = g.Epoch()
			g.End()
			return err
		}))
		return epoch
	}
	first := epoch()
	master := s.Master()
	master.Isolate()
	second := epoch()
	master.Stop()
	require.Greater(t, second, first)
	assert.Greater(t, epoch(), second)
}
