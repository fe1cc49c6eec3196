package sessionlock_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock"
	"github.com/sessionlock/sessionlock/internal/redistest"
	"github.com/sessionlock/sessionlock/sessionlocktest"
)

// findings takes Check's error apart: "subject: finding" each.
func findings(t *testing.T, err error) (all []string) {
	t.Helper()
	if err == nil {
		return nil
	}
	joined, ok := err.(interface{ Unwrap() []error })
	require.True(t, ok)
	for _, err := range joined.Unwrap() {
		var f *sessionlock.CheckError
		require.ErrorAs(t, err, &f)
		assert.NotEmpty(t, f.Advice, "of %v", err)
		all = append(all, f.Subject+": "+f.Finding)
	}
	return all
}

func TestCheckOfAHealthyStoreFindsNothing(t *testing.T) {
	t.Run("memory", func(t *testing.T) {
		sp, u := &spy{}, &upstream{}
		c := newClient(t, u, spyCache{sp, new(sessionlock.MemoryCache)})
		require.NoError(t, c.Check(t.Context()))
		assert.Zero(t, u.logins())
	})
	t.Run("redis", func(t *testing.T) {
		redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
			_ = rdb.ConfigSet(t.Context(), "appendonly", "yes").Err() // miniredis has no CONFIG
			c, err := sessionlock.New(acme, &upstream{}, sessionlock.WithRedis(rdb))
			require.NoError(t, err)
			t.Cleanup(func() { _ = c.Close(context.Background()) })
			require.NoError(t, c.Check(t.Context()))
			names, err := rdb.Keys(t.Context(), "*").Result()
			require.NoError(t, err)
			for _, name := range names {
				assert.True(t, strings.HasPrefix(name, "sl:{"), name)
				assert.Positive(t, rdb.PTTL(t.Context(), name).Val(), "what Check leaves behind ends by itself")
			}
		})
	})
}

func TestRedisCheckFindsHowTheServerIsSetUp(t *testing.T) {
	s := redistest.Start(t)
	rdb := s.Client()
	c, err := sessionlock.New(acme, &upstream{}, sessionlock.WithRedis(rdb))
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close(context.Background()) })

	require.NoError(t, rdb.ConfigSet(t.Context(), "appendonly", "no").Err())
	require.NoError(t, rdb.ConfigSet(t.Context(), "maxmemory-policy", "allkeys-lru").Err())
	err = c.Check(t.Context())
	assert.Equal(t, []string{"redis: " + s.Addr() + " keeps no append-only file"}, findings(t, err), "without maxmemory nothing is evicted")
	require.NotErrorIs(t, err, sessionlock.ErrUnavailable, "advice, no outage")

	require.NoError(t, rdb.ConfigSet(t.Context(), "appendonly", "yes").Err())
	require.NoError(t, rdb.ConfigSet(t.Context(), "maxmemory", "100mb").Err())
	err = c.Check(t.Context())
	assert.Equal(t, []string{"redis: " + s.Addr() + " evicts by allkeys-lru"}, findings(t, err))
	assert.ErrorContains(t, err, "set maxmemory-policy noeviction")
}

func TestRedisCheckNamesTheRightThatIsMissing(t *testing.T) {
	s := redistest.Start(t)
	admin := s.Client()
	require.NoError(t, admin.ConfigSet(t.Context(), "appendonly", "yes").Err())
	granted := redistest.Commands(t)
	check := func(without string) error {
		user := "u" + strings.TrimPrefix(without, "+")
		acl := []any{"acl", "setuser", user, "on", ">pw", "resetchannels", "&sl:*", "resetkeys", "~sl:*", "-@all"}
		for _, g := range granted {
			if "+"+g != without {
				acl = append(acl, "+"+g)
			}
		}
		require.NoError(t, admin.Do(t.Context(), acl...).Err())
		rdb := s.Client(func(o *redis.Options) {
			o.Username, o.Password, o.DisableIdentity = user, "pw", true
		})
		c, err := sessionlock.New(acme, &upstream{}, sessionlock.WithRedis(rdb), sessionlock.WithOpTimeout(300*time.Millisecond))
		require.NoError(t, err)
		t.Cleanup(func() { _ = c.Close(context.Background()) })
		return c.Check(t.Context())
	}
	require.NoError(t, check("nothing"), "the rights suffice, and INFO is none of them")
	for right, subject := range map[string]string{
		"getrange": "cache", "set": "cache", "publish": "cache", "evalsha": "cache",
		"msetnx": "lock", "pexpire": "lock", "pttl": "lock", "del": "lock", "time": "clock",
	} {
		err := check("+" + right)
		require.Error(t, err, "without %s", right)
		assert.Contains(t, fmt.Sprint(findings(t, err)), subject+": ", "without %s", right)
		assert.ErrorContains(t, err, "+"+right)
		require.ErrorIs(t, err, sessionlock.ErrUnavailable)
	}
	err := check("+subscribe")
	require.Error(t, err)
	assert.Contains(t, findings(t, err), "push: no wake-up arrived within 300ms")
	require.NotErrorIs(t, err, sessionlock.ErrUnavailable, "polling does the same, later")
}

func TestCheckFindsWhatABackendGetsWrong(t *testing.T) {
	memory := func() *sessionlock.MemoryCache { return new(sessionlock.MemoryCache) }
	for name, c := range map[string]struct {
		cache       sessionlock.Cache
		opts        []sessionlock.Option
		want        []string
		unavailable bool
	}{
		"stale reads":       {staleCache{memory()}, nil, []string{"cache: a value that was just written is not read back"}, true},
		"silent pushes":     {silentCache{memory()}, nil, []string{"push: no wake-up arrived within 1s"}, false},
		"one push only":     {new(oncePushed), nil, []string{"push: no wake-up arrived within 1s"}, false},
		"no pushes":         {polled{memory()}, nil, nil, false},
		"clock an hour on":  {clockedCache{memory(), time.Hour}, nil, []string{"clock: this host's is -1h0m0s off the store's"}, false},
		"clock behind":      {clockedCache{memory(), -21 * time.Second}, nil, []string{"clock: this host's is 21s off the store's"}, false},
		"clock well enough": {clockedCache{memory(), -19 * time.Second}, nil, nil, false},
		"lock for everybody": {
			memory(),
			[]sessionlock.Option{sessionlock.WithLocker(openLocker{})},
			[]string{"lock: it was granted twice"},
			true,
		},
		"all broken": {
			spyCache{&spy{before: func(context.Context, string, string) error { return errStoreDown }}, memory()},
			nil,
			[]string{"cache: cannot be written", "lock: cannot be taken"},
			true,
		},
		"only the lock broken": {
			memory(),
			[]sessionlock.Option{sessionlock.WithLocker(spyLocker{&spy{before: func(context.Context, string, string) error { return errStoreDown }}, &memoryLocker{}})},
			[]string{"lock: cannot be taken"},
			true,
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				err := newClient(t, &upstream{}, c.cache, c.opts...).Check(t.Context())
				assert.Equal(t, c.want, findings(t, err))
				assert.Equal(t, c.unavailable, errors.Is(err, sessionlock.ErrUnavailable))
				if err != nil {
					assert.NotContains(t, err.Error(), errStoreDown.Error(), "a store may quote what it was given")
				}
			})
		})
	}
}

func TestCheckOfAStoreThatHangsEndsInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hangs := func(ctx context.Context, _, _ string) error { <-t.Context().Done(); return ctx.Err() }
		c := newClient(t, &upstream{}, spyCache{&spy{before: hangs}, new(sessionlock.MemoryCache)})
		start := time.Now()
		err := c.Check(t.Context())
		require.ErrorIs(t, err, sessionlock.ErrUnavailable)
		assert.Equal(t, 2*time.Second, time.Since(start), "one for the cache, one for the lock")

		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		require.ErrorIs(t, c.Check(ctx), context.DeadlineExceeded)
		assert.Equal(t, 2*time.Second+50*time.Millisecond, time.Since(start))
	})
}

func TestCheckAsksAlsoWhileCallsAreRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		down := true
		sp := &spy{before: func(context.Context, string, string) error {
			if down {
				return errStoreDown
			}
			return nil
		}}
		c := newClient(t, &upstream{}, spyCache{sp, new(sessionlock.MemoryCache)})
		for range 10 {
			_, err := c.Session(t.Context(), "bob")
			require.ErrorIs(t, err, sessionlock.ErrUnavailable)
		}
		down = false
		_, err := c.Session(t.Context(), "bob")
		require.ErrorIs(t, err, sessionlock.ErrUnavailable)
		require.NoError(t, c.Check(t.Context()))
		tokenOf(t, c, "bob") // and whoever asks next has the good of it
	})
}

func TestCheckOfAClosedClientIsRefused(t *testing.T) {
	c := newClient(t, &upstream{}, new(sessionlock.MemoryCache))
	require.ErrorIs(t, c.Check(nil), sessionlock.ErrInvalid) //nolint:staticcheck // what is tested
	require.NoError(t, c.Close(t.Context()))
	require.ErrorIs(t, c.Check(t.Context()), sessionlock.ErrClosed)
}

// ExampleClient_Check asks once, at start: what makes the client useless ends the
// program, the rest is for the log.
func ExampleClient_Check() {
	client, err := sessionlock.New("https://api.acme.test", sessionlocktest.Static(), sessionlock.WithCache(new(sessionlock.MemoryCache)))
	if err != nil {
		panic(err)
	}
	err = client.Check(context.Background())
	if errors.Is(err, sessionlock.ErrUnavailable) {
		fmt.Println("not ready:", err)
		return
	}
	var advice *sessionlock.CheckError
	if errors.As(err, &advice) {
		fmt.Println(advice.Subject, advice.Finding, advice.Advice)
	}
	fmt.Println("ready")
	// Output: ready
}

// staleCache reads from a replica that is behind for ever.
type staleCache struct{ sessionlock.Cache }

func (staleCache) Load(context.Context, string) ([]byte, error) { return nil, nil }

// silentCache never pushes.
type silentCache struct{ sessionlock.Cache }

func (silentCache) Watch(string, func()) func() { return func() {} }

// oncePushed says that the watch stands, and nothing more.
type oncePushed struct{ sessionlock.MemoryCache }

func (*oncePushed) Watch(_ string, changed func()) func() { changed(); return func() {} }

// clockedCache has a clock that is off by ahead.
type clockedCache struct {
	sessionlock.Cache
	ahead time.Duration
}

func (c clockedCache) Now(context.Context) (time.Time, error) { return time.Now().Add(c.ahead), nil }

// openLocker refuses nobody.
type openLocker struct{}

func (openLocker) TryLock(context.Context, string, time.Duration) (sessionlock.Lock, error) {
	return (&memoryLocker{}).TryLock(context.Background(), "", time.Second)
}

func TestCheckOfARingSaysThatNobodyIsPushed(t *testing.T) {
	shards := map[string]string{}
	for i := range 2 {
		shards[fmt.Sprint(i)] = miniredis.RunT(t).Addr()
	}
	rdb := redis.NewRing(&redis.RingOptions{Addrs: shards})
	t.Cleanup(func() { _ = rdb.Close() })
	c, err := sessionlock.New(acme, &upstream{}, sessionlock.WithRedis(rdb))
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close(context.Background()) })
	start := time.Now()
	err = c.Check(t.Context())
	require.NotErrorIs(t, err, sessionlock.ErrUnavailable)
	assert.Equal(t, []string{"push: a Ring does not push"}, findings(t, err))
	assert.Less(t, time.Since(start), opTimeout, "and nobody waited for a push")
}

func TestRedisCheckFindsANodeThatDoesNotAnswer(t *testing.T) {
	up, down := redistest.Start(t), redistest.Start(t)
	require.NoError(t, up.Client().ConfigSet(t.Context(), "appendonly", "yes").Err())
	rdb := redis.NewRing(&redis.RingOptions{Addrs: map[string]string{"up": up.Addr(), "down": down.Addr()}, HeartbeatFrequency: time.Hour})
	t.Cleanup(func() { _ = rdb.Close() })
	down.Stop()
	c, err := sessionlock.New(acme, &upstream{}, sessionlock.WithRedis(rdb))
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close(context.Background()) })
	assert.Contains(t, findings(t, c.Check(t.Context())), "redis: "+down.Addr()+" does not answer")
}

func TestCheckFindsAnOldServer(t *testing.T) {
	for version, old := range map[string]bool{"5.0.14": true, "6.0.16": true, "6.2.0": false, "7.0.15": false, "10.0.1": false, "": false} {
		found := sessionlock.CheckInfo("node", map[string]map[string]string{"Server": {"redis_version": version}})
		assert.Equal(t, old, len(found) == 1, version)
		if old {
			assert.ErrorContains(t, found[0], "node is version "+version+": use 6.2 or later")
		}
	}
}
