// Package near is a bounded map whose reads take no lock: the near cache's
// table of keys.
//
// When it is full, the clock algorithm picks what leaves: a hand goes round all
// entries and takes the first that was not used since it last came by. That is
// nearly least-recently-used, and a read need not move anything.
package near

import "sync"

// Entry is what a Map holds.
type Entry interface {
	// Evict asks the entry to leave. It reports whether it did: one in use
	// since it was last asked, or busy, stays.
	Evict() bool
}

// Map holds at most Max entries (at least 1), plus those that were busy when it
// was full.
// Safe for concurrent use.
type Map[E Entry] struct {
	Max int
	New func(key string) E

	m    sync.Map // string → E
	mu   sync.Mutex
	ring []string // every key in m, in the order the hand visits
	hand int
}

// Load returns the entry of key, if there is one. It does not allocate.
func (m *Map[E]) Load(key string) (e E, ok bool) {
	v, ok := m.m.Load(key)
	if !ok {
		return e, false
	}
	return v.(E), true
}

// LoadOrNew returns the entry of key, made by New if there was none; another
// may have to leave for it.
func (m *Map[E]) LoadOrNew(key string) E {
	if e, ok := m.Load(key); ok {
		return e
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if e, ok := m.Load(key); ok {
		return e
	}
	e := m.New(key)
	m.m.Store(key, e)
	m.ring = append(m.ring, key)
	m.shrink()
	return e
}

// shrink lets entries leave until at most Max are left. It gives up for now
// after scan steps, so that adding one costs the same when all the others are
// busy; whoever adds the next goes on from here.
func (m *Map[E]) shrink() {
	const scan = 64
	for i := 0; i < scan && len(m.ring) > max(m.Max, 1); i++ {
		m.hand = (m.hand + 1) % (len(m.ring) - 1) // never the one just added
		key := m.ring[m.hand]
		if e, ok := m.Load(key); ok && !e.Evict() {
			continue
		}
		m.m.Delete(key)
		last := len(m.ring) - 1
		m.ring[m.hand] = m.ring[last]
		m.ring = m.ring[:last]
	}
}

// All calls f for every entry.
func (m *Map[E]) All(f func(E)) {
	m.m.Range(func(_, v any) bool {
		f(v.(E))
		return true
	})
}
