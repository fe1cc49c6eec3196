package sessionlocktest_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock"
	"github.com/sessionlock/sessionlock/sessionlocktest"
)

func TestStaticCountsPerKey(t *testing.T) {
	auth := sessionlocktest.Static()
	for _, want := range []struct{ key, token string }{{"a", "token-a-1"}, {"b", "token-b-1"}, {"a", "token-a-2"}} {
		s, err := auth.Login(t.Context(), want.key)
		require.NoError(t, err)
		assert.Equal(t, want.token, s.Token.Reveal())
		assert.WithinDuration(t, time.Now().Add(time.Hour), s.Expiry, time.Minute)
	}
	s, err := sessionlocktest.Static().Login(t.Context(), "a")
	require.NoError(t, err)
	assert.Equal(t, "token-a-1", s.Token.Reveal(), "a Static counts for itself")
}

func TestStaticNeverRepeatsAToken(t *testing.T) {
	auth := sessionlocktest.Static()
	var tokens sync.Map
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() {
			s, err := auth.Login(t.Context(), "a")
			assert.NoError(t, err)
			_, seen := tokens.LoadOrStore(s.Token.Reveal(), true)
			assert.False(t, seen)
		})
	}
	wg.Wait()
}

func TestClientIsRealAndItsOwn(t *testing.T) {
	auth := sessionlocktest.Static()
	for n := range 2 {
		c := sessionlocktest.Client(t, auth)
		for range 2 {
			s, err := c.Session(t.Context(), "a")
			require.NoError(t, err)
			assert.Equal(t, fmt.Sprintf("token-a-%d", n+1), s.Token.Reveal())
		}
	}
}

func TestClientOptionsOverrideTheCache(t *testing.T) {
	fleet := new(sessionlock.MemoryCache)
	auth := sessionlocktest.Static()
	for range 2 {
		s, err := sessionlocktest.Client(t, auth, sessionlock.WithCache(fleet)).Session(t.Context(), "a")
		require.NoError(t, err)
		assert.Equal(t, "token-a-1", s.Token.Reveal(), "two clients with one cache are a fleet")
	}
}

func TestClientIsClosedWithItsTest(t *testing.T) {
	var c *sessionlock.Client
	t.Run("inner", func(t *testing.T) { c = sessionlocktest.Client(t, sessionlocktest.Static()) })
	_, err := c.Session(t.Context(), "a")
	assert.ErrorIs(t, err, sessionlock.ErrClosed)
}

func TestClientWorksInABubble(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := sessionlocktest.Client(t, sessionlocktest.Static())
		_, err := c.Session(t.Context(), "a")
		require.NoError(t, err)
		time.Sleep(2 * time.Hour)
		s, err := c.Session(t.Context(), "a")
		require.NoError(t, err)
		assert.Equal(t, "token-a-2", s.Token.Reveal())
	})
}

// fakeTB records what a helper does to its test, and stops it as a test does.
type fakeTB struct {
	testing.TB
	failures []string
	cleanups []func()
}

func (f *fakeTB) Helper()                  {}
func (f *fakeTB) Context() context.Context { return context.Background() }
func (f *fakeTB) Cleanup(c func())         { f.cleanups = append(f.cleanups, c) }
func (f *fakeTB) Errorf(format string, args ...any) {
	f.failures = append(f.failures, fmt.Sprintf(format, args...))
}

func (f *fakeTB) Fatalf(format string, args ...any) {
	f.Errorf(format, args...)
	runtime.Goexit()
}

// run runs f as a test.
func (f *fakeTB) run(test func(t testing.TB)) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		test(f)
	}()
	<-done
	for i := len(f.cleanups) - 1; i >= 0; i-- {
		f.cleanups[i]()
	}
}

func TestClientFailsItsTest(t *testing.T) {
	t.Run("when it cannot be made", func(t *testing.T) {
		tb := &fakeTB{}
		tb.run(func(t testing.TB) {
			sessionlocktest.Client(t, nil)
			panic("went on")
		})
		assert.Len(t, tb.failures, 1)
	})
	t.Run("when a login is still running at its end", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			over, started := make(chan struct{}), make(chan struct{})
			auth := sessionlock.AuthenticatorFunc(func(context.Context, string) (sessionlock.Session, error) {
				close(started)
				<-over
				return sessionlock.Session{}, errors.New("over")
			})
			tb := &fakeTB{}
			start := time.Now()
			tb.run(func(t testing.TB) {
				c := sessionlocktest.Client(t, auth)
				go func() { _, _ = c.Session(context.Background(), "a") }()
				<-started
			})
			assert.Len(t, tb.failures, 1)
			assert.Equal(t, 5*time.Second, time.Since(start))
			close(over)
		})
	})
}

// ExampleClient is the body of a test; t is its *testing.T.
func ExampleClient() {
	test := func(t testing.TB) {
		client := sessionlocktest.Client(t, sessionlocktest.Static())
		err := client.Do(t.Context(), "tenant-7", func(ctx context.Context, s sessionlock.Session) error {
			fmt.Println("with", s.Token.Reveal())
			if strings.HasSuffix(s.Token.Reveal(), "-1") {
				return sessionlock.Reject(errors.New("401"))
			}
			return nil
		})
		fmt.Println(err)
	}
	new(fakeTB).run(test)
	// Output:
	// with token-tenant-7-1
	// with token-tenant-7-2
	// <nil>
}

// A cache of one's own is tested with a func that makes one, and another that
// takes its store away.
func ExampleCacheTest() {
	_ = func(t *testing.T) { // func TestMyCache(t *testing.T)
		sessionlocktest.CacheTest{
			New:    func(*testing.T) sessionlock.Cache { return new(faultyCache) },
			Outage: func(_ *testing.T, c sessionlock.Cache) { c.(*faultyCache).down.Store(true) },
		}.Run(t)
	}
}

func ExampleStartUpstream() {
	up, err := sessionlocktest.StartUpstream()
	if err != nil {
		fmt.Println(err)
		return
	}
	defer up.Close()

	ctx := context.Background()
	s, err := up.Login(ctx, "tenant-7")
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("call:", up.Call(ctx, s))
	up.Revoke("tenant-7")
	fmt.Println("call:", up.Call(ctx, s))
	total, atOnce := up.Logins("tenant-7")
	fmt.Println("logins:", total, "at once:", atOnce, "live:", up.Sessions("tenant-7"))
	// Output:
	// call: <nil>
	// call: sessionlocktest: call: 401 Unauthorized
	// logins: 1 at once: 1 live: 0
}

// A store among the options is the client's, as with sessionlock.New.
func TestClientsOnOneRedisShareSessions(t *testing.T) {
	rdb := redis.NewClient(&redis.Options{Addr: miniredis.RunT(t).Addr()})
	t.Cleanup(func() { assert.NoError(t, rdb.Close()) })
	auth := sessionlocktest.Static()
	a := sessionlocktest.Client(t, auth, sessionlock.WithRedis(rdb))
	b := sessionlocktest.Client(t, auth, sessionlock.WithRedis(rdb))
	for _, c := range []*sessionlock.Client{a, b} {
		s, err := c.Session(t.Context(), "bob")
		require.NoError(t, err)
		assert.Equal(t, "token-bob-1", s.Token.Reveal())
	}
}
