package near_test

import (
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/internal/near"
)

// item is used when somebody sets used, and stays while it is busy.
type item struct {
	key        string
	used, busy atomic.Bool
	left       atomic.Bool
}

func (i *item) Evict() bool {
	if i.busy.Load() || i.used.Swap(false) {
		return false
	}
	i.left.Store(true)
	return true
}

func newMap(size int) *near.Map[*item] {
	return &near.Map[*item]{Max: size, New: func(key string) *item { return &item{key: key} }}
}

func count(m *near.Map[*item]) (n int) {
	m.All(func(*item) { n++ })
	return n
}

func TestMapHoldsAtMostMax(t *testing.T) {
	for _, size := range []int{1, 2, 3, 100} {
		m := newMap(size)
		for i := range 1000 {
			key := fmt.Sprint(i)
			require.Equal(t, key, m.LoadOrNew(key).key)
			require.LessOrEqual(t, count(m), size)
		}
		assert.Equal(t, size, count(m))
	}
}

// A Max below 1 is 1: whoever adds an entry needs it.
func TestMapHoldsAtLeastTheOneJustAdded(t *testing.T) {
	for _, size := range []int{-1, 0, 1} {
		m := newMap(size)
		for i := range 100 {
			e := m.LoadOrNew(fmt.Sprint(i))
			require.False(t, e.left.Load())
			require.Equal(t, 1, count(m))
		}
	}
}

func TestFloodOfKeysIsBounded(t *testing.T) {
	const size = 1000
	m := newMap(size)
	for i := range 100_000 {
		m.LoadOrNew(fmt.Sprint(i))
	}
	assert.Equal(t, size, count(m))
}

func TestLoadFindsWhatIsThereAndAddsNothing(t *testing.T) {
	m := newMap(10)
	_, ok := m.Load("a")
	assert.False(t, ok)
	assert.Zero(t, count(m))
	a := m.LoadOrNew("a")
	got, ok := m.Load("a")
	assert.True(t, ok)
	assert.Same(t, a, got)
	assert.Same(t, a, m.LoadOrNew("a"))
	assert.Equal(t, 1, count(m))
	assert.Zero(t, testing.AllocsPerRun(100, func() { m.Load("a") }))
}

// An entry used since the hand last came by gets a second chance; the first
// that was not used leaves.
func TestUsedEntriesHaveASecondChance(t *testing.T) {
	m := newMap(4)
	for i := range 4 {
		m.LoadOrNew(fmt.Sprint(i)).used.Store(i != 2)
	}
	m.LoadOrNew("new")
	_, ok := m.Load("2")
	assert.False(t, ok, "the one that was not used")
	assert.Equal(t, 4, count(m))

	hot := m.LoadOrNew("new")
	for i := range 100 {
		hot.used.Store(true)
		m.LoadOrNew(fmt.Sprint("cold", i))
		_, ok := m.Load("new")
		require.True(t, ok, "an entry in use survives a scan over others")
	}
}

func TestEvictedEntryIsGoneAndMadeAnew(t *testing.T) {
	m := newMap(1)
	a := m.LoadOrNew("a")
	m.LoadOrNew("b")
	assert.True(t, a.left.Load())
	assert.NotSame(t, a, m.LoadOrNew("a"))
}

func TestBusyEntriesStayAboveMaxAndLeaveLater(t *testing.T) {
	const size, flood = 10, 1000
	m := newMap(size)
	busy := make([]*item, flood)
	for i := range busy {
		busy[i] = m.LoadOrNew(fmt.Sprint("busy", i))
		busy[i].busy.Store(true)
	}
	assert.InDelta(t, flood, count(m), size, "busy ones stay")
	for _, b := range busy {
		b.busy.Store(false)
	}
	for i := range flood { // each addition goes on from where the last gave up
		m.LoadOrNew(fmt.Sprint("idle", i))
	}
	assert.Equal(t, size, count(m))
}

// Adding costs the same however many are busy: in a flood nobody goes round all
// of them. Counted in steps, because time says little on a busy machine.
func TestFloodOfBusyEntriesIsFast(t *testing.T) {
	const flood = 10_000
	var asked atomic.Int64
	m := &near.Map[*counted]{Max: 1, New: func(string) *counted { return &counted{&asked} }}
	for i := range flood {
		before := asked.Load()
		m.LoadOrNew(fmt.Sprint(i))
		require.LessOrEqual(t, asked.Load()-before, int64(64))
	}
	assert.Positive(t, asked.Load())
}

type counted struct{ asked *atomic.Int64 }

func (c *counted) Evict() bool { c.asked.Add(1); return false }

// Everything at once: one live entry per key, no key lost, the bound kept.
func TestConcurrentUse(t *testing.T) {
	const size, keys, workers = 50, 200, 8
	m := newMap(size)
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := range 5000 {
				key := fmt.Sprint((i*7 + w*13) % keys)
				e := m.LoadOrNew(key)
				assert.Equal(t, key, e.key)
				e.used.Store(true)
				if got, ok := m.Load(key); ok {
					assert.Equal(t, key, got.key)
				}
				if i%500 == 0 {
					m.All(func(e *item) { e.used.Load() })
				}
			}
		})
	}
	wg.Wait()
	seen := map[string]bool{}
	m.All(func(e *item) {
		assert.Falsef(t, seen[e.key], "two entries of %s", e.key)
		assert.False(t, e.left.Load(), "one that has left")
		seen[e.key] = true
	})
	for i := range 10 * size { // used ones lose their second chance
		m.LoadOrNew(fmt.Sprint("later", i))
	}
	assert.Equal(t, size, count(m))
}
