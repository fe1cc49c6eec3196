package sessionrelay_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/internal/redistest"
	"github.com/sessionlock/sessionlock/sessionrelay"
)

// forgetful is a hook by which every third script meets a fault, in turns: its reply is
// lost and it is sent again, it is executed and the caller never knows, or it is never
// executed.
type forgetful struct {
	scripts atomic.Int64
	met     [3]atomic.Int64
}

func (*forgetful) DialHook(next redis.DialHook) redis.DialHook { return next }

func (*forgetful) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

func (h *forgetful) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		if !strings.HasPrefix(cmd.Name(), "eval") {
			return next(ctx, cmd)
		}
		n := h.scripts.Add(1)
		if n%3 != 0 {
			return next(ctx, cmd)
		}
		fault := n / 3 % 3
		h.met[fault].Add(1)
		if fault < 2 {
			_ = next(ctx, cmd)
			cmd.SetErr(nil)
		}
		if fault == 0 {
			return next(ctx, cmd)
		}
		cmd.SetErr(io.EOF)
		return io.EOF
	}
}

// fate is what becomes of the first owner of a message.
type fate int

const (
	completes fate = iota
	dies           // and nobody knows what it has done
	isLate         // with its Complete, after somebody else took over
	isKilled       // while it completes: perhaps it has
)

const fates = int(isKilled) + 1

const patience = 80 * time.Millisecond

// incoming is a message that clients deliver until it is done.
type incoming struct {
	t     *testing.T
	nodes []sessionrelay.Store
	n     int
	fate  fate

	owners, completed, taken atomic.Int64
	over                     chan struct{} // closed when a second owner has it

	mu      sync.Mutex
	granted []grant
	answers [][]byte // that were given to whoever asked again
}

// grant is an Accept that was granted.
type grant struct {
	owner      string
	begin, end time.Time // of the call
}

func (m *incoming) id() string { return fmt.Sprint("m", m.n) }

// outcome is what owner makes of it: one is told from another's where it can be.
func (m *incoming) outcome(owner string) []byte {
	return [][]byte{nil, {}, []byte("\x00\xff\r\n{}" + owner), append(bytes.Repeat([]byte("x\x00"), 5000), owner...)}[m.n%4]
}

// deliver is one delivery, by a client that asks again until it has an answer.
func (m *incoming) deliver(r *rand.Rand) {
	for m.t.Context().Err() == nil {
		owner := fmt.Sprintf("owner %d", m.owners.Add(1))
		s := m.nodes[r.IntN(len(m.nodes))]
		settled := m.completed.Load() > 0
		g := grant{owner: owner, begin: time.Now()}
		claim, err := s.Accept(m.t.Context(), "s", "", m.id(), owner, patience)
		g.end = time.Now()
		switch {
		case err != nil:
			assert.ErrorIs(m.t, err, sessionrelay.ErrUnavailable)
		case claim.State == sessionrelay.Done:
			m.mu.Lock()
			defer m.mu.Unlock()
			m.answers = append(m.answers, claim.Outcome)
			return
		case settled:
			assert.Fail(m.t, "was done, and is not", "%v", claim)
			return
		case claim.State == sessionrelay.Accepted:
			m.process(s, owner, m.grants(g))
		default:
			time.Sleep(5 * time.Millisecond)
		}
	}
}

// grants notes a grant and returns what becomes of its owner.
func (m *incoming) grants(g grant) fate {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.granted = append(m.granted, g)
	switch len(m.granted) {
	case 1:
		return m.fate
	case 2:
		close(m.over)
	}
	return completes
}

func (m *incoming) process(s sessionrelay.Store, owner string, fate fate) {
	switch fate {
	case dies:
		return
	case isKilled:
		_ = s.Complete(m.t.Context(), "s", m.id(), owner, m.outcome(owner))
		return
	case isLate:
		select {
		case <-m.over:
		case <-m.t.Context().Done():
		}
	case completes:
	}
	err := m.complete(s, owner, m.outcome(owner))
	if errors.Is(err, sessionrelay.ErrTaken) {
		m.taken.Add(1)
		return
	}
	assert.NoError(m.t, err)
	m.completed.Add(1)
	assert.NoError(m.t, m.complete(s, owner, []byte("another")), "it was sent again")
	m.mu.Lock()
	defer m.mu.Unlock()
	m.answers = append(m.answers, m.outcome(owner))
}

// complete asks until it is answered.
func (m *incoming) complete(s sessionrelay.Store, owner string, outcome []byte) (err error) {
	for range 100 {
		if err = s.Complete(m.t.Context(), "s", m.id(), owner, outcome); !errors.Is(err, sessionrelay.ErrUnavailable) {
			break
		}
	}
	return err
}

// judge looks at all that was seen, and says how often somebody was late.
func (m *incoming) judge() (late int64) {
	assert.LessOrEqual(m.t, m.completed.Load(), int64(1), "owners that completed a message")
	for _, answer := range m.answers {
		assert.Equal(m.t, m.answers[0], answer)
	}
	var whole [][]byte
	for _, g := range m.granted {
		whole = append(whole, m.outcome(g.owner))
	}
	assert.Contains(m.t, whole, m.answers[0], "an owner's outcome, byte by byte")
	// Of two owners one has had his patience before the other took over, to the millisecond.
	for i, a := range m.granted {
		for _, b := range m.granted[i+1:] {
			apart := max(a.end.Sub(b.begin), b.end.Sub(a.begin))
			assert.GreaterOrEqual(m.t, apart, patience-2*time.Millisecond, "%s and %s", a.owner, b.owner)
		}
	}
	return m.taken.Load()
}

// inbox has messages delivered to three nodes, one to five times each and at once.
func inbox(t *testing.T, open func(string) sessionrelay.Store) {
	t.Helper()
	nodes := []sessionrelay.Store{open("a"), open("b"), open("c")}
	for { // the hook may refuse it
		_, _, err := nodes[0].Register(t.Context(), sessionrelay.Hello{Session: "s", User: "bob"}, "c1", plenty)
		if err == nil {
			break
		}
		require.ErrorIs(t, err, sessionrelay.ErrUnavailable)
	}
	var late, want atomic.Int64
	var all sync.WaitGroup
	for n := range 60 {
		m := &incoming{t: t, nodes: nodes, n: n, over: make(chan struct{})}
		deliveries := 1 + n%5
		if m.fate = fate(n / 5 % fates); m.fate == isLate {
			deliveries = max(deliveries, 2) // there is somebody else
			want.Add(1)
		}
		all.Go(func() {
			var each sync.WaitGroup
			for i := range deliveries {
				r := rand.New(rand.NewPCG(uint64(n), uint64(i)))
				each.Go(func() { m.deliver(r) })
			}
			each.Wait()
			m.deliver(rand.New(rand.NewPCG(uint64(n), 100))) // a replay
			late.Add(m.judge())
		})
	}
	all.Wait()
	assert.GreaterOrEqual(t, late.Load(), want.Load())
}

func TestInboxAcceptsOnceWhoeverDies(t *testing.T) {
	everywhere(t, func(t *testing.T, open func(string) sessionrelay.Store) { inbox(t, open) })
}

func TestInboxAcceptsOnceWhenRepliesAreLost(t *testing.T) {
	rdb := redistest.Start(t).Client()
	hook := &forgetful{}
	rdb.AddHook(hook)
	inbox(t, stores(t, rdb))
	for fault := range hook.met {
		assert.GreaterOrEqual(t, hook.met[fault].Load(), int64(20), fault)
	}
}

// What is put, told to be tried, buried, revived and delivered at once ends in one
// place: nothing is lost, nothing is twice.
func TestMessagesAreInOnePlace(t *testing.T) {
	everywhere(t, func(t *testing.T, open func(string) sessionrelay.Store) {
		const n = 60
		ctx := t.Context()
		nodes := []sessionrelay.Store{open("a"), open("b"), open("c")}
		at(t, nodes[0], "s", "c1")
		var all []string
		for i := range n {
			all = append(all, fmt.Sprint("m", i))
		}
		var acked sync.Map
		one := func(s sessionrelay.Store, r *rand.Rand) error {
			switch id := all[r.IntN(n)]; r.IntN(10) {
			case 0, 1, 2:
				return s.Attempted(ctx, "s", "c1", id)
			case 3, 4, 5:
				return s.Bury(ctx, "s", "c1", id)
			case 6, 7, 8:
				return s.Revive(ctx, "s", id)
			default:
				acked.Store(id, true)
				return s.Delivered(ctx, "s", id)
			}
		}
		var work sync.WaitGroup
		for k := range 6 {
			r := rand.New(rand.NewPCG(uint64(k), 2))
			s := nodes[k%3]
			work.Go(func() {
				for _, id := range all {
					_, err := s.Put(ctx, "s", sessionrelay.Message{ID: id}, nil)
					assert.NoError(t, err)
					assert.NoError(t, one(s, r))
				}
			})
		}
		work.Wait()
		dead, err := nodes[1].Buried(ctx, "s")
		require.NoError(t, err)
		at(t, nodes[2], "s", "c2")
		live, err := nodes[2].Fetch(ctx, "s", "c2", plenty)
		require.NoError(t, err)
		assert.NotEmpty(t, dead)
		assert.NotEmpty(t, live)
		seen := map[string]int{}
		for _, m := range append(dead, live...) {
			seen[m.ID]++
		}
		for _, id := range all {
			if _, ok := acked.Load(id); ok && seen[id] == 0 {
				continue // it was delivered
			}
			assert.Equal(t, 1, seen[id], id)
		}
		puts(t, nodes[0], "s", all...)
		assert.Len(t, ids(t, nodes[2], "s", "c2"), len(live), "what was delivered does not come again, nor the rest twice")
		require.NoError(t, nodes[0].Delivered(ctx, "s", all...))
		assert.Empty(t, ids(t, nodes[2], "s", "c2"))
	})
}
