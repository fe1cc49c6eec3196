package sessionlock_test

// The backends under the suites that implementations of others are held to, on
// every server there is; what Redis alone can get wrong; and who may import what.

import (
	"context"
	"encoding/json"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/bsm/redislock"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock"
	"github.com/sessionlock/sessionlock/internal/entry"
	"github.com/sessionlock/sessionlock/internal/redistest"
	"github.com/sessionlock/sessionlock/sessionlocktest"
)

// backing is a Redis of one case of a suite.
type backing struct {
	client func() *redis.Client // another process's
	down   func()               // until the case ends
}

// onEveryRedis runs suite on a miniredis, each case in a bubble of its own, and
// on a real server, which all cases share.
func onEveryRedis(t *testing.T, suite func(t *testing.T, open func(t *testing.T) backing, in func(*testing.T, func(*testing.T)))) {
	t.Run("miniredis", func(t *testing.T) {
		suite(t, func(t *testing.T) backing {
			m, client := bubbleRedis(t)
			return backing{client, func() {
				m.SetError("LOADING")
				t.Cleanup(func() { m.SetError("") })
			}}
		}, synctest.Test)
	})
	t.Run("redis", func(t *testing.T) {
		server := redistest.Start(t)
		suite(t, func(t *testing.T) backing {
			return backing{func() *redis.Client { return server.Client() }, func() {
				server.Stop()
				t.Cleanup(server.Restart)
			}}
		}, nil)
	})
}

// redisCacheOn returns the cache of WithRedis, ended with the case.
func redisCacheOn(t *testing.T, rdb *redis.Client) sessionlock.Cache {
	c := sessionlock.NewRedisCache(rdb)
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// handles remembers where the first handle of a case came from, for the second
// one and for the outage.
type handles[T any] struct {
	open func(t *testing.T) backing
	make func(t *testing.T, rdb *redis.Client) T
	last backing // cases come one after the other
}

func (h *handles[T]) New(t *testing.T) T {
	h.last = h.open(t)
	return h.make(t, h.last.client())
}
func (h *handles[T]) Second(t *testing.T, _ T) T { return h.make(t, h.last.client()) }
func (h *handles[T]) Outage(_ *testing.T, _ T)   { h.last.down() }
func memoryCache(*testing.T) sessionlock.Cache   { return new(sessionlock.MemoryCache) }
func memoryLocks(*testing.T) sessionlock.Locker {
	return sessionlock.NewCacheLocker(new(sessionlock.MemoryCache))
}

func TestMemoryCache(t *testing.T) {
	t.Run("bubble", sessionlocktest.CacheTest{New: memoryCache, In: synctest.Test}.Run)
	t.Run("real time", sessionlocktest.CacheTest{New: memoryCache, TTL: 100 * time.Millisecond}.Run)
}

func TestRedisCache(t *testing.T) {
	onEveryRedis(t, func(t *testing.T, open func(*testing.T) backing, in func(*testing.T, func(*testing.T))) {
		h := &handles[sessionlock.Cache]{open: open, make: redisCacheOn}
		sessionlocktest.CacheTest{New: h.New, Second: h.Second, Outage: h.Outage, In: in}.Run(t)
	})
}

func TestRedisLocker(t *testing.T) {
	onEveryRedis(t, func(t *testing.T, open func(*testing.T) backing, in func(*testing.T, func(*testing.T))) {
		h := &handles[sessionlock.Locker]{open: open, make: func(_ *testing.T, rdb *redis.Client) sessionlock.Locker {
			return sessionlock.NewRedisLocker(rdb)
		}}
		sessionlocktest.LockerTest{New: h.New, Second: h.Second, Outage: h.Outage, In: in}.Run(t)
	})
}

func TestCacheLocker(t *testing.T) {
	t.Run("memory", sessionlocktest.LockerTest{New: memoryLocks, In: synctest.Test}.Run)
	t.Run("memory in real time", sessionlocktest.LockerTest{New: memoryLocks, TTL: 100 * time.Millisecond}.Run)
	onEveryRedis(t, func(t *testing.T, open func(*testing.T) backing, in func(*testing.T, func(*testing.T))) {
		h := &handles[sessionlock.Locker]{open: open, make: func(t *testing.T, rdb *redis.Client) sessionlock.Locker {
			return sessionlock.NewCacheLocker(redisCacheOn(t, rdb))
		}}
		sessionlocktest.LockerTest{New: h.New, Second: h.Second, Outage: h.Outage, In: in}.Run(t)
	})
}

// everyLocker runs f with each locker of this package.
func everyLocker(t *testing.T, f func(t *testing.T, l sessionlock.Locker)) {
	t.Run("memory", func(t *testing.T) { f(t, memoryLocks(t)) })
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		t.Run("locker", func(t *testing.T) { f(t, sessionlock.NewRedisLocker(rdb)) })
		t.Run("cache", func(t *testing.T) { f(t, sessionlock.NewCacheLocker(redisCacheOn(t, rdb))) })
	})
}

func TestBadTTLOfALockTouchesNothing(t *testing.T) {
	everyLocker(t, func(t *testing.T, l sessionlock.Locker) {
		held, err := l.TryLock(t.Context(), t.Name()+"held", time.Hour)
		require.NoError(t, err)
		for _, ttl := range []time.Duration{0, -1, 1, time.Millisecond - 1, -1 << 63} {
			lock, err := l.TryLock(t.Context(), t.Name()+"free", ttl)
			refusedArgument(t, err, "TryLock")
			assert.Nil(t, lock)
			refusedArgument(t, held.Extend(t.Context(), ttl), "Extend")
		}
		_, err = l.TryLock(t.Context(), t.Name()+"held", time.Hour)
		require.ErrorIs(t, err, sessionlock.ErrLocked)
		_, err = l.TryLock(t.Context(), t.Name()+"free", time.Hour)
		require.NoError(t, err)
	})
}

// A context that is over never makes a lost lock out of one that is held, nor
// the other way round.
func TestLockUnderAContextThatIsOver(t *testing.T) {
	over, cancel := context.WithCancel(t.Context())
	cancel()
	late, cancelLate := context.WithTimeout(t.Context(), 1)
	defer cancelLate()
	everyLocker(t, func(t *testing.T, l sessionlock.Locker) {
		for name, ctx := range map[string]context.Context{"cancelled": over, "expired": late} {
			lock, err := l.TryLock(t.Context(), t.Name()+name, time.Hour)
			require.NoError(t, err)
			if err := lock.Extend(ctx, time.Hour); err != nil {
				require.NotErrorIs(t, err, sessionlock.ErrNotHeld, name)
			}
			err = lock.Unlock(ctx)
			if _, taken := l.TryLock(t.Context(), t.Name()+name, time.Hour); err == nil {
				require.NoError(t, taken, "an Unlock without an error has unlocked")
			} else {
				require.ErrorIs(t, taken, sessionlock.ErrLocked)
				require.NoError(t, lock.Unlock(context.WithoutCancel(ctx)))
			}
		}
	})
}

// Programs that use redislock themselves can share our locks, and ours theirs.
func TestOurLockIsTheOneThatRedislockTakes(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		ctx := t.Context()
		ours, theirs := sessionlock.NewRedisLocker(rdb), redislock.New(rdb)

		lock, err := ours.TryLock(ctx, "k", time.Minute)
		require.NoError(t, err)
		assert.InDelta(t, 60, rdb.PTTL(ctx, "k").Val().Seconds(), 5)
		_, err = theirs.Obtain(ctx, "k", time.Minute, nil)
		require.ErrorIs(t, err, redislock.ErrNotObtained)
		require.NoError(t, lock.Unlock(ctx))
		assert.Zero(t, rdb.Exists(ctx, "k").Val(), "nothing is left behind")

		held, err := theirs.Obtain(ctx, "k", time.Minute, nil)
		require.NoError(t, err)
		_, err = ours.TryLock(ctx, "k", time.Minute)
		require.ErrorIs(t, err, sessionlock.ErrLocked)
		left, err := held.TTL(ctx)
		require.NoError(t, err)
		assert.InDelta(t, 60, left.Seconds(), 5, "a sane life is not touched")
		require.NoError(t, held.Release(ctx))
		_, err = ours.TryLock(ctx, "k", time.Minute)
		require.NoError(t, err)
	})
}

// asked collects the requests of a client, without the handshakes of connections
// that its pool opens whenever it likes.
type asked struct {
	mu    sync.Mutex
	names []string
}

// take returns what was asked since it was last called.
func (a *asked) take() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	names := a.names
	a.names = nil
	return names
}

func (a *asked) DialHook(next redis.DialHook) redis.DialHook { return next }
func (a *asked) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		if name := cmd.Name(); name != "hello" && name != "client" {
			a.mu.Lock()
			a.names = append(a.names, name)
			a.mu.Unlock()
		}
		return next(ctx, cmd)
	}
}

func (a *asked) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next // handshakes
}

func TestEachCallOfABackendIsOneRequest(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		ctx := t.Context()
		locker, cache := sessionlock.NewRedisLocker(rdb), redisCacheOn(t, rdb)
		var lock sessionlock.Lock
		for range 2 { // the first round teaches the server its scripts
			a := &asked{}
			rdb.AddHook(a)
			for name, call := range map[string]func() error{
				"TryLock": func() (err error) { lock, err = locker.TryLock(ctx, "k", time.Minute); return err },
				"Load":    func() error { _, err := cache.Load(ctx, "v"); return err },
				"CompareAndSwap": func() error {
					_, err := cache.CompareAndSwap(ctx, "v", nil, []byte("1"), time.Minute)
					return err
				},
			} {
				a.take()
				require.NoError(t, call())
				if names := a.take(); !slices.Contains(names, "eval") { // it was not new to the server
					assert.Lenf(t, names, 1, "%s: %v", name, names)
				}
			}
			require.NoError(t, lock.Unlock(ctx))
			assert.Positive(t, rdb.PTTL(ctx, "v").Val())
		}
	})
}

func TestLockWithoutASaneLifeIsHealedByWhoeverMeetsIt(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		const ttl = time.Minute
		locker := sessionlock.NewRedisLocker(rdb)
		for name, tt := range map[string]struct{ has, want time.Duration }{
			"none":               {0, ttl},
			"absurd":             {24 * time.Hour, ttl},
			"more than twice":    {2*ttl + time.Second, ttl},
			"a member's, longer": {3 * ttl / 2, 3 * ttl / 2},
			"as it should be":    {ttl, ttl},
			"short":              {ttl / 4, ttl / 4},
		} {
			require.NoError(t, rdb.Set(t.Context(), name, "a hand", tt.has).Err())
			for range 2 {
				_, err := locker.TryLock(t.Context(), name, ttl)
				require.ErrorIs(t, err, sessionlock.ErrLocked, name)
			}
			assert.InDelta(t, tt.want.Seconds(), rdb.PTTL(t.Context(), name).Val().Seconds(), 5, name)
			assert.Equal(t, "a hand", rdb.Get(t.Context(), name).Val())
		}
	})
}

func TestOversizedValueTravelsToTheLimitAndCanBeReplaced(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		cache := redisCacheOn(t, rdb)
		for _, size := range []int{entry.MaxSize - 1, entry.MaxSize, entry.MaxSize + 1, entry.MaxSize + 2, 4 << 20} {
			require.NoError(t, rdb.Set(t.Context(), "k", strings.Repeat("x", size), time.Hour).Err())
			want := min(size, entry.MaxSize+1)
			v, err := cache.Load(t.Context(), "k")
			require.NoError(t, err)
			assert.Len(t, v, want)
			now, err := cache.CompareAndSwap(t.Context(), "k", []byte("old"), []byte("next"), time.Hour)
			require.NoError(t, err)
			assert.Len(t, now, want)
			now, err = cache.CompareAndSwap(t.Context(), "k", v, []byte("next"), time.Hour)
			require.NoError(t, err)
			assert.Equal(t, "next", string(now))
		}
	})
}

func TestValueOfAnotherTypeIsAnErrorAndStays(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		require.NoError(t, rdb.RPush(t.Context(), "k", "some", "body's").Err())
		cache := redisCacheOn(t, rdb)
		v, err := cache.Load(t.Context(), "k")
		assert.ErrorContains(t, err, "WRONGTYPE")
		assert.Nil(t, v)
		v, err = cache.CompareAndSwap(t.Context(), "k", nil, []byte("next"), time.Hour)
		assert.ErrorContains(t, err, "WRONGTYPE")
		assert.Nil(t, v)
		_, err = sessionlock.NewRedisLocker(rdb).TryLock(t.Context(), "k", time.Hour)
		require.ErrorContains(t, err, "WRONGTYPE")
		assert.NotErrorIs(t, err, sessionlock.ErrLocked, "nobody would wait for it to end")
		assert.Equal(t, []string{"some", "body's"}, rdb.LRange(t.Context(), "k", 0, -1).Val())
		assert.Equal(t, time.Duration(-1), rdb.PTTL(t.Context(), "k").Val())
	})
}

const module = "github.com/sessionlock/sessionlock"

// The algorithm knows interfaces only; Redis is behind two of them.
func TestRedisStaysBehindItsSeam(t *testing.T) {
	files, err := filepath.Glob("*.go")
	require.NoError(t, err)
	found := []string{}
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
		require.NoError(t, err)
		for _, i := range parsed.Imports {
			path := strings.Trim(i.Path.Value, `"`)
			if strings.HasPrefix(path, "github.com/redis/") || strings.HasPrefix(path, "github.com/bsm/") {
				found = append(found, file)
				break
			}
		}
	}
	assert.ElementsMatch(t, []string{"cache.go", "lock.go", "options.go"}, found)
}

// golang runs a go command on this module and returns what it printed.
func golang(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "go", args...).Output()
	require.NoError(t, err)
	return string(out)
}

// What a program that imports this package compiles.
func TestUsersCompileNoTestHelpers(t *testing.T) {
	deps := strings.Fields(golang(t, "list", "-deps", "."))
	require.Contains(t, deps, module)
	require.Contains(t, deps, "github.com/bsm/redislock")
	for _, dep := range deps {
		for _, no := range []string{
			"testing", "github.com/stretchr", "github.com/alicebob", "github.com/yuin",
			module + "/internal/redistest", module + "/sessionlocktest", module + "/sessionguard", module + "/sessionmanager", module + "/sessionrelay",
		} {
			assert.Falsef(t, dep == no || strings.HasPrefix(dep, no+"/"), "%s is compiled in", dep)
		}
	}
}

func TestModuleRequiresFourOthers(t *testing.T) {
	var mod struct {
		Go      string
		Require []struct {
			Path, Version string
			Indirect      bool
		}
		Replace []any
	}
	require.NoError(t, json.Unmarshal([]byte(golang(t, "mod", "edit", "-json")), &mod))
	direct := []string{}
	for _, r := range mod.Require {
		if !r.Indirect {
			direct = append(direct, r.Path+" "+r.Version)
		}
	}
	assert.ElementsMatch(t, []string{
		"github.com/alicebob/miniredis/v2 v2.40.0", "github.com/bsm/redislock v0.10.0",
		"github.com/redis/go-redis/v9 v9.22.0", "github.com/stretchr/testify v1.12.1",
	}, direct)
	assert.Equal(t, "1.25", mod.Go)
	assert.Empty(t, mod.Replace)
}

// docs/promises.md names the test of each promise, rule and fault; a renamed test
// must not leave it behind.
func TestPromisesNameTestsThatExist(t *testing.T) {
	doc, err := os.ReadFile("docs/promises.md")
	require.NoError(t, err)
	written := map[string]bool{}
	function := regexp.MustCompile(`(?m)^func (Test[A-Za-z0-9_]+)\(`)
	for _, pattern := range []string{"*_test.go", "internal/*/*_test.go", "session*/*_test.go", "examples/*/*_test.go"} {
		files, err := filepath.Glob(pattern)
		require.NoError(t, err)
		for _, f := range files {
			b, err := os.ReadFile(f)
			require.NoError(t, err)
			for _, m := range function.FindAllSubmatch(b, -1) {
				written[string(m[1])] = true
			}
		}
	}
	named := regexp.MustCompile("`(Test[A-Za-z0-9_]+)").FindAllStringSubmatch(string(doc), -1)
	require.Greater(t, len(named), 60)
	for _, m := range named {
		assert.True(t, written[m[1]], m[1])
	}
}
