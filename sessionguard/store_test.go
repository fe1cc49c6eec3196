package sessionguard_test

import (
	"context"
	"fmt"
	"net"
	"runtime"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/internal/redistest"
	"github.com/sessionlock/sessionlock/sessionguard"
	"github.com/sessionlock/sessionlock/sessionguard/guardtest"
)

// The store of New keeps the promises that the suite for everybody's stores looks at.
func TestRedisStore(t *testing.T) {
	t.Parallel()
	t.Run("redis", func(t *testing.T) {
		s := redistest.Start(t)
		guardtest.StoreTest{
			New:    func(*testing.T) sessionguard.Store { return sessionguard.NewRedisStore(s.Client()) },
			Second: func(*testing.T, sessionguard.Store) sessionguard.Store { return sessionguard.NewRedisStore(s.Client()) },
			Forget: func(t *testing.T, _ sessionguard.Store) { require.NoError(t, s.Client().FlushAll(t.Context()).Err()) },
		}.Run(t)
	})
	t.Run("outage", func(t *testing.T) {
		guardtest.StoreTest{
			New: func(t *testing.T) sessionguard.Store {
				s := redistest.Start(t)
				p, rdb := behind(t, s)
				return &cuttable{NewRedisStore: sessionguard.NewRedisStore(rdb), cut: p.Cut}
			},
			Outage: func(_ *testing.T, s sessionguard.Store) { s.(*cuttable).cut() },
		}.Run(t)
	})
	t.Run("miniredis", func(t *testing.T) {
		guardtest.StoreTest{New: func(t *testing.T) sessionguard.Store {
			m := miniredis.RunT(t)
			m.ClockTTL(true)
			return sessionguard.NewRedisStore(direct(t, m))
		}}.Run(t)
	})
	t.Run("ring", func(t *testing.T) {
		s := redistest.Start(t)
		ring := redis.NewRing(&redis.RingOptions{Addrs: map[string]string{"one": s.Addr()}})
		t.Cleanup(func() { _ = ring.Close() })
		guardtest.StoreTest{New: func(*testing.T) sessionguard.Store { return mute(sessionguard.NewRedisStore(ring)) }}.Run(t)
	})
}

// A Ring has no wake-ups, and nothing tries to have some.
func TestWatchOnARingStartsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ring := redis.NewRing(&redis.RingOptions{
			Addrs:  map[string]string{"one": "127.0.0.1:1"},
			Dialer: func(context.Context, string, string) (net.Conn, error) { return nil, errStoreDown },
		})
		stop := sessionguard.NewRedisStore(ring).Watch("s", func() { assert.Fail(t, "called") })
		synctest.Wait()
		assert.Empty(t, busy())
		stop()
		require.NoError(t, ring.Close())
	})
}

// cuttable is a store of New with what a case does to it.
type cuttable struct {
	NewRedisStore
	cut func()
}

// NewRedisStore is the type of the store of New.
type NewRedisStore = interface {
	sessionguard.Store
	sessionguard.Watcher
}

func TestRegistrationsAreWrittenAsTheyAreShown(t *testing.T) {
	assert.Equal(t, "7 TOKEN", sessionguard.Registration{Epoch: 7, Token: "TOKEN"}.String())
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		store := sessionguard.NewRedisStore(rdb)
		epoch, err := store.Register(t.Context(), "s", "TOKEN", 0, time.Minute)
		require.NoError(t, err)
		assert.Equal(t, sessionguard.Registration{Epoch: epoch, Token: "TOKEN"}.String(), rdb.Get(t.Context(), "s").Val())
		assert.InDelta(t, time.Now().UnixMicro(), epoch, float64(24*time.Hour.Microseconds()), "the time")
	})
}

// What has expired is dropped as others register: memory does not grow with sessions
// that are over.
func TestMemoryStoreForgetsWhatHasExpired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := new(sessionguard.MemoryStore)
		heap := func() uint64 {
			runtime.GC()
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			return m.HeapAlloc
		}
		fill := func(round int) {
			for i := range 10_000 {
				_, err := store.Register(t.Context(), fmt.Sprint(round, " ", i), "token", 0, time.Second)
				require.NoError(t, err)
			}
			time.Sleep(2 * time.Second)
		}
		fill(0)
		before := heap()
		for round := range 20 {
			fill(round)
		}
		assert.Less(t, heap(), 3*before+1<<20)

		// What lives is kept.
		_, err := store.Register(t.Context(), "lives", "token", 0, time.Hour)
		require.NoError(t, err)
		fill(21)
		r, err := store.Current(t.Context(), "lives")
		require.NoError(t, err)
		assert.Equal(t, "token", r.Token)
	})
}

// Nor are epochs given out again that were ahead of the time.
func TestMemoryStoreNeverGoesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := new(sessionguard.MemoryStore)
		ahead := uint64(time.Now().Add(time.Hour).UnixMicro())
		first, err := store.Register(t.Context(), "s", "one", ahead, time.Second)
		require.NoError(t, err)
		time.Sleep(2 * time.Second)
		for i := range 200 { // so that it is swept away
			_, err := store.Register(t.Context(), fmt.Sprint(i), "token", 0, time.Second)
			require.NoError(t, err)
		}
		second, err := store.Register(t.Context(), "s", "two", 0, time.Second)
		require.NoError(t, err)
		assert.Greater(t, second, first)
	})
}

func TestMemoryStoreWakesWatchersOfTheSessionOnly(t *testing.T) {
	store := new(sessionguard.MemoryStore)
	var first, second, other atomic.Int64
	stop := store.Watch("s", func() { first.Add(1) })
	stopSecond := store.Watch("s", func() { second.Add(1) })
	defer store.Watch("t", func() { other.Add(1) })()
	register := func() {
		_, err := store.Register(t.Context(), "s", fmt.Sprint(time.Now()), 0, time.Minute)
		require.NoError(t, err)
	}
	register()
	stop()
	stop()
	register()
	stopSecond()
	register()
	assert.EqualValues(t, 1, first.Load())
	assert.EqualValues(t, 2, second.Load())
	assert.Zero(t, other.Load())
}
