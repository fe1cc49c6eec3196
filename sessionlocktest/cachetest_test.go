package sessionlocktest_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/sessionlock/sessionlock"
	"github.com/sessionlock/sessionlock/sessionlocktest"
)

func TestMemoryCache(t *testing.T) {
	suite := sessionlocktest.CacheTest{
		New: func(*testing.T) sessionlock.Cache { return new(sessionlock.MemoryCache) },
		TTL: 50 * time.Millisecond,
	}
	t.Run("real time", suite.Run)
	suite.In = synctest.Test
	t.Run("bubble", suite.Run)
}

// faultyCache is a right cache until one of its funcs, each of which stands for
// a mistake, is set. They run one at a time unless racy.
type faultyCache struct {
	*sessionlock.MemoryCache
	mu    sync.Mutex
	racy  bool
	load  func(ctx context.Context, key string) ([]byte, error)
	swap  func(ctx context.Context, key string, old, next []byte, ttl time.Duration) ([]byte, error)
	watch func(key string, changed func()) func()
	now   func() (time.Time, error)
	down  atomic.Bool
}

var errDown = errors.New("down")

func (c *faultyCache) Load(ctx context.Context, key string) ([]byte, error) {
	if !c.racy {
		c.mu.Lock()
		defer c.mu.Unlock()
	}
	switch {
	case c.load != nil:
		return c.load(ctx, key)
	case c.down.Load():
		return nil, errDown
	}
	return c.MemoryCache.Load(ctx, key)
}

func (c *faultyCache) CompareAndSwap(ctx context.Context, key string, old, next []byte, ttl time.Duration) ([]byte, error) {
	if !c.racy {
		c.mu.Lock()
		defer c.mu.Unlock()
	}
	switch {
	case c.down.Load():
		return nil, errDown
	case c.swap != nil:
		return c.swap(ctx, key, old, next, ttl)
	}
	return c.MemoryCache.CompareAndSwap(ctx, key, old, next, ttl)
}

func (c *faultyCache) Watch(key string, changed func()) func() {
	if c.watch != nil {
		return c.watch(key, changed)
	}
	return c.MemoryCache.Watch(key, changed)
}

func (c *faultyCache) Now(context.Context) (time.Time, error) {
	switch {
	case c.now != nil:
		return c.now()
	case c.down.Load():
		return time.Time{}, errDown
	}
	return time.Now(), nil
}

func faultySuite(fault func(t *testing.T, c *faultyCache)) sessionlocktest.CacheTest {
	return sessionlocktest.CacheTest{
		New: func(t *testing.T) sessionlock.Cache {
			c := &faultyCache{MemoryCache: new(sessionlock.MemoryCache)}
			fault(t, c)
			return c
		},
		Outage: func(_ *testing.T, c sessionlock.Cache) { c.(*faultyCache).down.Store(true) },
		In:     synctest.Test,
	}
}

func TestCacheWithEveryFacePasses(t *testing.T) {
	faultySuite(func(*testing.T, *faultyCache) {}).Run(t)
}

func TestCacheTestUsesItsHooks(t *testing.T) {
	var second, slept, outages int
	suite := faultySuite(func(*testing.T, *faultyCache) {})
	suite.Second = func(_ *testing.T, c sessionlock.Cache) sessionlock.Cache { second++; return c }
	suite.Sleep = func(d time.Duration) { slept++; time.Sleep(d) }
	outage := suite.Outage
	suite.Outage = func(t *testing.T, c sessionlock.Cache) { outages++; outage(t, c) }
	suite.Run(t)
	assert.Positive(t, second)
	assert.Positive(t, slept)
	assert.Equal(t, 1, outages)
}

// Run is seen failing from outside, in a process of its own.
func TestRunFailsItsTest(t *testing.T) {
	const env = "SESSIONLOCKTEST_BROKEN"
	suites := map[string]func(*testing.T){
		"cache": faultySuite(func(_ *testing.T, c *faultyCache) {
			c.load = func(context.Context, string) ([]byte, error) { return nil, nil }
		}).Run,
		"locker": faultyLockerSuite(func(l *faultyLocker) { l.outage = sessionlock.ErrLocked }).Run,
	}
	if run := suites[os.Getenv(env)]; run != nil {
		run(t)
		return
	}
	for suite, want := range map[string]string{
		"cache":  "rule: a store that cannot be reached is an error, never absent",
		"locker": "rule: a store that cannot be reached is an error of its own",
	} {
		t.Run(suite, func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestRunFailsItsTest$", "-test.timeout=1m")
			cmd.Env = append(os.Environ(), env+"="+suite)
			out, err := cmd.CombinedOutput()
			assert.Error(t, err)
			assert.Contains(t, string(out), "--- FAIL: TestRunFailsItsTest/Outage")
			assert.Contains(t, string(out), want)
		})
	}
}

// slowly makes the first n swaps take longer than a value lives.
func slowly(n int) func(*testing.T, *faultyCache) {
	return func(_ *testing.T, c *faultyCache) {
		c.racy = true
		var swaps atomic.Int64
		c.swap = func(ctx context.Context, key string, old, next []byte, ttl time.Duration) ([]byte, error) {
			if swaps.Add(1) <= int64(n) {
				time.Sleep(300 * time.Millisecond)
			}
			return c.MemoryCache.CompareAndSwap(ctx, key, old, next, ttl)
		}
	}
}

func TestCacheTestForgivesABusyMachine(t *testing.T) {
	faultySuite(slowly(5)).Run(t)
	assert.Equal(t, []string{"Expiry", "Renewal"}, sessionlocktest.Broken(t, faultySuite(slowly(1000))), "what TTL is too short for")
}

func TestCacheTestCatches(t *testing.T) {
	type swapFunc = func(ctx context.Context, key string, old, next []byte, ttl time.Duration) ([]byte, error)
	// swapIf is a swap with an idea of its own when stored and old are equal.
	swapIf := func(equal func(stored, old []byte) bool) func(*testing.T, *faultyCache) {
		return func(_ *testing.T, c *faultyCache) {
			c.swap = func(ctx context.Context, key string, old, next []byte, ttl time.Duration) ([]byte, error) {
				stored, _ := c.MemoryCache.Load(ctx, key)
				if stored != nil && old != nil && equal(stored, old) {
					old = stored
				}
				return c.MemoryCache.CompareAndSwap(ctx, key, old, next, ttl)
			}
		}
	}
	// swapWith changes what right swaps are asked, or answer.
	swapWith := func(f func(right swapFunc) swapFunc) func(*testing.T, *faultyCache) {
		return func(_ *testing.T, c *faultyCache) { c.swap = f(c.MemoryCache.CompareAndSwap) }
	}
	keyed := func(fold func(string) string) func(*testing.T, *faultyCache) {
		return func(_ *testing.T, c *faultyCache) {
			c.load = func(ctx context.Context, key string) ([]byte, error) {
				if c.down.Load() {
					return nil, errDown
				}
				return c.MemoryCache.Load(ctx, fold(key))
			}
			c.swap = func(ctx context.Context, key string, old, next []byte, ttl time.Duration) ([]byte, error) {
				return c.MemoryCache.CompareAndSwap(ctx, fold(key), old, next, ttl)
			}
		}
	}

	idle := sessionlocktest.Cases(faultySuite(nil)) // cases that have caught nothing
	for name, tt := range map[string]struct {
		fault func(t *testing.T, c *faultyCache)
		by    string
	}{
		"an outage reported as absent": {func(_ *testing.T, c *faultyCache) {
			c.load = func(ctx context.Context, key string) ([]byte, error) {
				if c.down.Load() {
					return nil, nil
				}
				return c.MemoryCache.Load(ctx, key)
			}
		}, "Outage"},
		"absent reported as an error": {func(_ *testing.T, c *faultyCache) {
			c.load = func(ctx context.Context, key string) ([]byte, error) {
				v, err := c.MemoryCache.Load(ctx, key)
				if v == nil {
					err = errors.New("no rows in result set")
				}
				return v, err
			}
		}, "Absent"},
		"absent reported as an empty value": {func(_ *testing.T, c *faultyCache) {
			c.load = func(ctx context.Context, key string) ([]byte, error) {
				v, err := c.MemoryCache.Load(ctx, key)
				return append([]byte{}, v...), err
			}
		}, "Absent"},
		"a swap that ignores old": {swapIf(func(_, _ []byte) bool { return true }), "Swap"},
		"a swap that writes over what is there when absent is expected": {swapWith(func(right swapFunc) swapFunc {
			return func(ctx context.Context, key string, old, next []byte, ttl time.Duration) ([]byte, error) {
				now, err := right(ctx, key, old, next, ttl)
				if old == nil && now != nil {
					return right(ctx, key, now, next, ttl)
				}
				return now, err
			}
		}), "SwapAbsent"},
		"a swap that takes absent for anything": {swapWith(func(right swapFunc) swapFunc {
			return func(ctx context.Context, key string, old, next []byte, ttl time.Duration) ([]byte, error) {
				now, err := right(ctx, key, old, next, ttl)
				if now == nil {
					return right(ctx, key, nil, next, ttl)
				}
				return now, err
			}
		}), "ExpiredOld"},
		"a swap that compares prefixes of what is stored": {swapIf(bytes.HasPrefix), "WholeValues"},
		"a swap that compares prefixes of old":            {swapIf(func(stored, old []byte) bool { return bytes.HasPrefix(old, stored) }), "WholeValues"},
		"a swap that compares with a folding collation":   {swapIf(bytes.EqualFold), "WholeValues"},
		"a swap that compares up to 32 KiB": {swapIf(func(s, o []byte) bool {
			return len(s) == len(o) && len(s) > 32<<10 && bytes.Equal(s[:32<<10], o[:32<<10])
		}), "Bytes"},
		"a swap that returns what it was asked for": {swapWith(func(right swapFunc) swapFunc {
			return func(ctx context.Context, key string, old, next []byte, ttl time.Duration) ([]byte, error) {
				_, err := right(ctx, key, old, next, ttl)
				return next, err
			}
		}), "Swap"},
		"a repeated swap reported as lost": {swapWith(func(right swapFunc) swapFunc {
			return func(ctx context.Context, key string, old, next []byte, ttl time.Duration) ([]byte, error) {
				now, err := right(ctx, key, append([]byte(nil), old...), []byte("\x00probe"), ttl)
				if string(now) != "\x00probe" && bytes.Equal(now, next) {
					return nil, err
				}
				if string(now) == "\x00probe" {
					return right(ctx, key, now, next, ttl)
				}
				return now, err
			}
		}), "Repeated"},
		"a repeated swap that undoes a newer one": {func(_ *testing.T, c *faultyCache) {
			olds := map[string][]byte{} // by value: what it replaced
			c.swap = func(ctx context.Context, key string, old, next []byte, ttl time.Duration) ([]byte, error) {
				now, err := c.MemoryCache.CompareAndSwap(ctx, key, old, next, ttl)
				if bytes.Equal(now, next) {
					olds[key+string(next)] = old
				} else if o, ok := olds[key+string(next)]; ok && bytes.Equal(o, old) {
					return c.MemoryCache.CompareAndSwap(ctx, key, now, next, ttl)
				}
				return now, err
			}
		}, "Repeated"},
		"values that end at a NUL": {swapWith(func(right swapFunc) swapFunc {
			return func(ctx context.Context, key string, old, next []byte, ttl time.Duration) ([]byte, error) {
				cut, _, _ := bytes.Cut(next, []byte{0})
				return right(ctx, key, old, cut, ttl)
			}
		}), "Bytes"},
		"values that are made valid UTF-8": {swapWith(func(right swapFunc) swapFunc {
			return func(ctx context.Context, key string, old, next []byte, ttl time.Duration) ([]byte, error) {
				return right(ctx, key, old, bytes.ToValidUTF8(next, []byte("?")), ttl)
			}
		}), "Bytes"},
		"aliased slices": {func(_ *testing.T, c *faultyCache) {
			stored := map[string][]byte{}
			c.load = func(_ context.Context, key string) ([]byte, error) { return stored[key], nil }
			c.swap = func(_ context.Context, key string, old, next []byte, _ time.Duration) ([]byte, error) {
				if bytes.Equal(stored[key], old) {
					stored[key] = next
				}
				return stored[key], nil
			}
		}, "Copies"},
		"a refused swap that returns the stored slice itself": {func(_ *testing.T, c *faultyCache) {
			stored := map[string][]byte{}
			c.load = func(_ context.Context, key string) ([]byte, error) { return bytes.Clone(stored[key]), nil }
			c.swap = func(_ context.Context, key string, old, next []byte, _ time.Duration) ([]byte, error) {
				if !bytes.Equal(stored[key], old) {
					return stored[key], nil
				}
				stored[key] = bytes.Clone(next)
				return next, nil
			}
		}, "Copies"},
		"keys in a folding collation": {keyed(strings.ToUpper), "Keys"},
		"keys cut at 64 bytes":        {keyed(func(k string) string { return k[:min(len(k), 64)] }), "Keys"},
		"keys by their hash tag": {keyed(func(k string) string {
			if i := strings.Index(k, "}"); i > 0 {
				return k[:i]
			}
			return k
		}), "Keys"},
		"values that never expire": {swapWith(func(right swapFunc) swapFunc {
			return func(ctx context.Context, key string, old, next []byte, _ time.Duration) ([]byte, error) {
				return right(ctx, key, old, next, 1000*time.Hour)
			}
		}), "Expiry"},
		"a swap that finds expired values": {func(_ *testing.T, c *faultyCache) {
			forever := new(sessionlock.MemoryCache)
			c.swap = func(ctx context.Context, key string, old, next []byte, ttl time.Duration) ([]byte, error) {
				now, err := forever.CompareAndSwap(ctx, key, old, next, 1000*time.Hour)
				if bytes.Equal(now, next) {
					stored, _ := c.MemoryCache.Load(ctx, key)
					_, _ = c.MemoryCache.CompareAndSwap(ctx, key, stored, next, ttl)
				}
				return now, err
			}
		}, "ExpiredOld"},
		"a swap that keeps the first ttl": {func(_ *testing.T, c *faultyCache) {
			ends := map[string]time.Time{}
			c.swap = func(ctx context.Context, key string, old, next []byte, ttl time.Duration) ([]byte, error) {
				if old == nil {
					ends[key] = time.Now().Add(ttl)
				}
				return c.MemoryCache.CompareAndSwap(ctx, key, old, next, time.Until(ends[key]))
			}
		}, "Renewal"},
		"a swap that only lengthens": {func(_ *testing.T, c *faultyCache) {
			ends := map[string]time.Time{}
			c.swap = func(ctx context.Context, key string, old, next []byte, ttl time.Duration) ([]byte, error) {
				ttl = max(ttl, time.Until(ends[key]))
				ends[key] = time.Now().Add(ttl)
				return c.MemoryCache.CompareAndSwap(ctx, key, old, next, ttl)
			}
		}, "Renewal"},
		"a ttl in whole seconds, rounded down": {swapWith(func(right swapFunc) swapFunc {
			return func(ctx context.Context, key string, old, next []byte, ttl time.Duration) ([]byte, error) {
				if ttl.Truncate(time.Second) == 0 {
					return nil, errors.New("invalid expire time")
				}
				return right(ctx, key, old, next, ttl)
			}
		}), "TTLs"},
		"a long ttl taken for a date": {swapWith(func(right swapFunc) swapFunc {
			return func(ctx context.Context, key string, old, next []byte, ttl time.Duration) ([]byte, error) {
				if ttl > 30*24*time.Hour { // as memcached does
					ttl = -1
				}
				return right(ctx, key, old, next, ttl)
			}
		}), "TTLs"},
		"a swap in two steps": {func(_ *testing.T, c *faultyCache) {
			c.racy = true
			c.swap = func(ctx context.Context, key string, old, next []byte, ttl time.Duration) ([]byte, error) {
				stored, _ := c.MemoryCache.Load(ctx, key)
				if !bytes.Equal(stored, old) {
					return stored, nil
				}
				time.Sleep(time.Millisecond)
				stored, _ = c.MemoryCache.Load(ctx, key)
				return c.MemoryCache.CompareAndSwap(ctx, key, stored, next, ttl)
			}
		}, "OneWinner"},
		"a loser that is told nothing": {swapWith(func(right swapFunc) swapFunc {
			return func(ctx context.Context, key string, old, next []byte, ttl time.Duration) ([]byte, error) {
				now, err := right(ctx, key, old, next, ttl)
				if !bytes.Equal(now, next) && len(old) > 0 && old[0] == '0' {
					return nil, err
				}
				return now, err
			}
		}), "OneWinner"},
		"a cancelled swap reported as done": {swapWith(func(right swapFunc) swapFunc {
			return func(ctx context.Context, key string, old, next []byte, ttl time.Duration) ([]byte, error) {
				if ctx.Err() != nil {
					return next, nil
				}
				return right(ctx, key, old, next, ttl)
			}
		}), "Cancelled"},
		"a cancelled load reported as absent": {func(_ *testing.T, c *faultyCache) {
			c.load = func(ctx context.Context, key string) ([]byte, error) {
				if ctx.Err() != nil {
					return nil, nil
				}
				if c.down.Load() {
					return nil, errDown
				}
				return c.MemoryCache.Load(ctx, key)
			}
		}, "Cancelled"},
		"a cancelled load that never returns": {func(t *testing.T, c *faultyCache) {
			over := make(chan struct{})
			t.Cleanup(func() { close(over) })
			c.load = func(ctx context.Context, key string) ([]byte, error) {
				if ctx.Err() != nil {
					<-over
				}
				if c.down.Load() {
					return nil, errDown
				}
				return c.MemoryCache.Load(ctx, key)
			}
		}, "Cancelled"},
		"a watch that hears nothing": {func(_ *testing.T, c *faultyCache) {
			c.watch = func(string, func()) func() { return func() {} }
		}, "Watch"},
		"a watch that hears the first swap only": {func(_ *testing.T, c *faultyCache) {
			c.watch = func(key string, changed func()) (stop func()) {
				stopped := false
				stop = c.MemoryCache.Watch(key, func() {
					if !stopped {
						changed()
					}
					stopped = true
				})
				return stop
			}
		}, "Watch"},
		"a watch that hears every key": {func(_ *testing.T, c *faultyCache) {
			var all []func()
			c.watch = func(_ string, changed func()) func() {
				all = append(all, changed)
				return func() {}
			}
			c.swap = func(ctx context.Context, key string, old, next []byte, ttl time.Duration) ([]byte, error) {
				for _, f := range all {
					defer f()
				}
				return c.MemoryCache.CompareAndSwap(ctx, key, old, next, ttl)
			}
		}, "Watch"},
		"a watch that cannot be stopped": {func(_ *testing.T, c *faultyCache) {
			c.watch = func(key string, changed func()) func() {
				c.MemoryCache.Watch(key, changed)
				return func() {}
			}
		}, "Watch"},
		"a clock in milliseconds": {func(_ *testing.T, c *faultyCache) {
			c.now = func() (time.Time, error) { return time.Unix(time.Now().UnixMilli(), 0), nil }
		}, "Clock"},
		"a clock that runs backwards": {func(_ *testing.T, c *faultyCache) {
			now := time.Now()
			c.now = func() (time.Time, error) { now = now.Add(-time.Minute); return now, nil }
		}, "Clock"},
		"a clock that is zero in an outage": {func(_ *testing.T, c *faultyCache) {
			c.now = func() (time.Time, error) {
				if c.down.Load() {
					return time.Time{}, nil
				}
				return time.Now(), nil
			}
		}, "Outage"},
	} {
		t.Run(name, func(t *testing.T) {
			assert.Contains(t, sessionlocktest.Broken(t, faultySuite(tt.fault)), tt.by)
		})
		idle = slices.DeleteFunc(idle, func(name string) bool { return name == tt.by })
	}
	assert.Empty(t, idle, "nothing here shows that these cases can fail")
}
