package sessionlocktest_test

import (
	"bytes"
	"context"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/sessionlock/sessionlock"
	"github.com/sessionlock/sessionlock/sessionlocktest"
)

// slowShelf is a plain store whose Set takes a millisecond more for each Set
// under way, so that of swaps at once all have read before the first one writes,
// and each finds its own value when it looks again.
type slowShelf struct {
	mu     sync.Mutex
	values map[string]shelved
	under  int // Sets under way
	down   bool
}

type shelved struct {
	value   []byte
	expires time.Time
}

func (s *slowShelf) Get(_ context.Context, key string) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := s.values[key]
	switch {
	case s.down:
		return nil, errDown
	case !time.Now().Before(v.expires):
		return []byte{}, nil // an empty value counts as missing
	}
	return bytes.Clone(v.value), nil
}

func (s *slowShelf) Set(_ context.Context, key string, value []byte, ttl time.Duration) error {
	s.mu.Lock()
	s.under++
	pause := time.Duration(s.under) * time.Millisecond
	s.mu.Unlock()
	time.Sleep(pause)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.under--
	if s.down {
		return errDown
	}
	if s.values == nil {
		s.values = map[string]shelved{}
	}
	s.values[key] = shelved{bytes.Clone(value), time.Now().Add(ttl)}
	return nil
}

// seenShelf is a slowShelf with every face.
type seenShelf struct {
	*slowShelf
	watches sessionlock.MemoryCache // for its watches only
}

func (s *seenShelf) Set(ctx context.Context, key string, value []byte, ttl time.Duration) error {
	err := s.slowShelf.Set(ctx, key, value, ttl)
	old, _ := s.watches.Load(ctx, key)
	_, _ = s.watches.CompareAndSwap(ctx, key, old, value, ttl)
	return err
}

func (s *seenShelf) Watch(key string, changed func()) func() { return s.watches.Watch(key, changed) }

func (s *seenShelf) Now(context.Context) (time.Time, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.down {
		return time.Time{}, errDown
	}
	return time.Now(), nil
}

// What the documentation of PlainCache says it fails, and nothing else.
func TestPlainCacheFailsOneWinnerOnly(t *testing.T) {
	for name, faces := range map[string]bool{"plain": false, "with every face": true} {
		t.Run(name, func(t *testing.T) {
			var last *slowShelf // cases come one after the other
			var store sessionlock.PlainStore
			suite := sessionlocktest.CacheTest{
				New: func(*testing.T) sessionlock.Cache {
					last = new(slowShelf)
					if store = last; faces {
						store = &seenShelf{slowShelf: last}
					}
					return sessionlock.PlainCache(store)
				},
				Second: func(*testing.T, sessionlock.Cache) sessionlock.Cache { return sessionlock.PlainCache(store) },
				Outage: func(*testing.T, sessionlock.Cache) {
					last.mu.Lock()
					defer last.mu.Unlock()
					last.down = true
				},
				In: synctest.Test,
			}
			assert.Equal(t, []string{"OneWinner"}, sessionlocktest.Broken(t, suite))
			for _, c := range []string{"OneWinner", "Swap", "Repeated", "Watch", "Clock", "Outage"} {
				assert.True(t, slices.Contains(sessionlocktest.Cases(suite), c), c)
			}
		})
	}
}
