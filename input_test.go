package sessionlock_test

// What callers get wrong, per function: what is refused is refused before
// anything is touched, by an error that says what and quotes nothing.

import (
	"bytes"
	"context"
	"encoding/gob"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	htmltemplate "html/template"
	"io"
	"log/slog"
	"math"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"text/template"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock"
	"github.com/sessionlock/sessionlock/sessionlocktest"
)

// canary must not be seen anywhere but where it was put.
const canary = "c4n4ry"

// seen fails when s shows the canary, as it is or as a verb may have encoded it.
func seen(t testing.TB, s, where string) {
	t.Helper()
	shown := strings.ToLower(s)
	for _, form := range []string{
		canary, fmt.Sprintf("%x", canary), fmt.Sprintf("% x", canary), strings.Trim(fmt.Sprintf("%d", []byte(canary)), "[]"),
		strings.TrimSuffix(fmt.Sprintf("%#v", []byte(canary)), "}")[len("[]byte{"):],
	} {
		if strings.Contains(shown, form) {
			t.Errorf("%s shows the secret: %.300s", where, s)
			return
		}
	}
}

// refusedArgument checks that err is what a bad argument gets.
func refusedArgument(t testing.TB, err error, where string) {
	t.Helper()
	require.ErrorIs(t, err, sessionlock.ErrInvalid, where)
	seen(t, err.Error(), where)
}

func nothing(context.Context, sessionlock.Session) error { return nil }

func TestNewRefuses(t *testing.T) {
	var (
		auth     = &upstream{}
		cache    = sessionlock.WithCache(new(sessionlock.MemoryCache))
		wait     = sessionlock.WithWait
		long     = strings.Repeat(canary, 1000)
		noClient *redis.Client
		noRing   *redis.Ring
	)
	for name, tt := range map[string]struct {
		upstream string
		auth     sessionlock.Authenticator
		opts     []sessionlock.Option
		want     string
	}{
		"no upstream":               {"", auth, nil, "upstream"},
		"a blank upstream":          {" \t\n", auth, nil, "upstream"},
		"a long upstream":           {long, auth, nil, "upstream"},
		"no authenticator":          {acme, nil, nil, "authenticator"},
		"a nil authenticator func":  {acme, sessionlock.AuthenticatorFunc(nil), nil, "authenticator"},
		"a nil authenticator":       {acme, (*upstream)(nil), nil, "authenticator"},
		"a nil option":              {acme, auth, []sessionlock.Option{nil}, "Option"},
		"no redis":                  {acme, auth, []sessionlock.Option{sessionlock.WithRedis(nil)}, "WithRedis"},
		"a nil redis client":        {acme, auth, []sessionlock.Option{sessionlock.WithRedis(noClient)}, "WithRedis"},
		"a nil redis ring":          {acme, auth, []sessionlock.Option{sessionlock.WithRedis(noRing)}, "WithRedis"},
		"no cache":                  {acme, auth, []sessionlock.Option{sessionlock.WithCache(nil)}, "WithCache"},
		"a nil cache":               {acme, auth, []sessionlock.Option{sessionlock.WithCache((*sessionlock.MemoryCache)(nil))}, "WithCache"},
		"no locker":                 {acme, auth, []sessionlock.Option{sessionlock.WithLocker(nil)}, "WithLocker"},
		"a nil locker":              {acme, auth, []sessionlock.Option{sessionlock.WithLocker((*memoryLocker)(nil))}, "WithLocker"},
		"no logout":                 {acme, auth, []sessionlock.Option{sessionlock.WithLogout(nil)}, "WithLogout"},
		"no rejected":               {acme, auth, []sessionlock.Option{sessionlock.WithRejected(nil)}, "WithRejected"},
		"no complete":               {acme, auth, []sessionlock.Option{sessionlock.WithComplete(nil)}, "WithComplete"},
		"no fingerprint":            {acme, auth, []sessionlock.Option{sessionlock.WithFingerprint(nil)}, "WithFingerprint"},
		"no lock key":               {acme, auth, []sessionlock.Option{sessionlock.WithLockKey(nil)}, "WithLockKey"},
		"no logger":                 {acme, auth, []sessionlock.Option{sessionlock.WithLogger(nil)}, "WithLogger"},
		"no observer":               {acme, auth, []sessionlock.Option{sessionlock.WithObserver(nil)}, "WithObserver"},
		"a nil observer":            {acme, auth, []sessionlock.Option{sessionlock.WithObserver((*recorder)(nil))}, "WithObserver"},
		"no lock scope":             {acme, auth, []sessionlock.Option{sessionlock.WithLockScope(" ")}, "WithLockScope"},
		"a long lock scope":         {acme, auth, []sessionlock.Option{sessionlock.WithLockScope(long)}, "WithLockScope"},
		"a long namespace":          {acme, auth, []sessionlock.Option{sessionlock.WithNamespace(long)}, "WithNamespace"},
		"no key secret":             {acme, auth, []sessionlock.Option{sessionlock.WithKeySecret(nil)}, "WithKeySecret"},
		"an empty key secret":       {acme, auth, []sessionlock.Option{sessionlock.WithKeySecret([]byte{})}, "WithKeySecret"},
		"a short key secret":        {acme, auth, []sessionlock.Option{sessionlock.WithKeySecret([]byte(canary + canary)[:15-3])}, "WithKeySecret"},
		"no budget":                 {acme, auth, []sessionlock.Option{sessionlock.WithLoginBudget(0, time.Hour)}, "WithLoginBudget"},
		"a negative budget":         {acme, auth, []sessionlock.Option{sessionlock.WithLoginBudget(-1, time.Hour)}, "WithLoginBudget"},
		"an endless budget":         {acme, auth, []sessionlock.Option{sessionlock.WithLoginBudget(math.MaxInt, time.Hour)}, "WithLoginBudget"},
		"no wait":                   {acme, auth, []sessionlock.Option{wait(0, time.Second)}, "WithWait"},
		"a negative wait":           {acme, auth, []sessionlock.Option{wait(-1, time.Second)}, "WithWait"},
		"an endless wait":           {acme, auth, []sessionlock.Option{wait(math.MaxInt, time.Second)}, "WithWait"},
		"a negative near cache":     {acme, auth, []sessionlock.Option{sessionlock.WithNearCache(-1, time.Minute)}, "WithNearCache"},
		"a back-off upside down":    {acme, auth, []sessionlock.Option{sessionlock.WithReauthBackoff(2*time.Second, time.Second)}, "WithReauthBackoff"},
		"a wait as long as a lock":  {acme, auth, []sessionlock.Option{sessionlock.WithLoginTimeout(time.Second), wait(30, 100*time.Millisecond)}, "lock TTL"},
		"a lock as long as a wait":  {acme, auth, []sessionlock.Option{sessionlock.WithLockTTL(12 * time.Second)}, "lock TTL"},
		"a wait shorter than login": {acme, auth, []sessionlock.Option{sessionlock.WithLoginTimeout(12*time.Second + 1)}, "login timeout"},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := sessionlock.New(tt.upstream, tt.auth, append([]sessionlock.Option{cache}, tt.opts...)...)
			refusedArgument(t, err, name)
			assert.Nil(t, c)
			assert.ErrorContains(t, err, tt.want)
		})
	}
}

// Every duration, with the set of those that are often got wrong.
func TestNewChecksEveryDuration(t *testing.T) {
	const ms, day = time.Millisecond, 24 * time.Hour
	for name, tt := range map[string]struct {
		with func(time.Duration) sessionlock.Option
		zero bool // allowed
	}{
		"WithLockTTL":             {sessionlock.WithLockTTL, false},
		"WithWait's delay":        {func(d time.Duration) sessionlock.Option { return sessionlock.WithWait(100, d) }, false},
		"WithLoginTimeout":        {sessionlock.WithLoginTimeout, false},
		"WithOpTimeout":           {sessionlock.WithOpTimeout, false},
		"WithExpiryMargin":        {sessionlock.WithExpiryMargin, true},
		"WithMaxAge":              {sessionlock.WithMaxAge, true},
		"WithLoginBudget's":       {func(d time.Duration) sessionlock.Option { return sessionlock.WithLoginBudget(1, d) }, false},
		"WithReauthBackoff's min": {func(d time.Duration) sessionlock.Option { return sessionlock.WithReauthBackoff(d, day) }, false},
		"WithReauthBackoff's max": {func(d time.Duration) sessionlock.Option { return sessionlock.WithReauthBackoff(ms, d) }, false},
		"WithNearCache's age":     {func(d time.Duration) sessionlock.Option { return sessionlock.WithNearCache(1, d) }, false},
	} {
		t.Run(name, func(t *testing.T) {
			for d, ok := range map[time.Duration]bool{
				math.MinInt64: false, -1: false, 0: tt.zero, 1: false, ms - 1: false,
				ms: true, day: true, day + 1: false, math.MaxInt64: false,
			} {
				_, err := sessionlock.New(acme, &upstream{}, sessionlock.WithCache(new(sessionlock.MemoryCache)), tt.with(d))
				if ok { // the relations of waits are judged elsewhere
					assert.NotContains(t, fmt.Sprint(err), "not between", d)
					continue
				}
				refusedArgument(t, err, name)
				assert.ErrorContains(t, err, name)
				assert.ErrorContains(t, err, "not between")
			}
		})
	}
}

func TestNewAcceptsTheBounds(t *testing.T) {
	for name, opts := range map[string][]sessionlock.Option{
		"a wait just longer than the lock": {sessionlock.WithLoginTimeout(time.Second), sessionlock.WithWait(1, 3*time.Second+1)},
		"a wait as long as a login":        {sessionlock.WithLoginTimeout(12 * time.Second)},
		"no margin, no max age":            {sessionlock.WithExpiryMargin(0), sessionlock.WithMaxAge(0)},
		"a back-off that does not grow":    {sessionlock.WithReauthBackoff(time.Second, time.Second)},
		"no near cache":                    {sessionlock.WithNearCache(0, time.Minute)},
		"the largest budget":               {sessionlock.WithLoginBudget(1000, 24*time.Hour)},
		"names at their limit":             {sessionlock.WithNamespace(strings.Repeat("n", 1024)), sessionlock.WithLockScope(strings.Repeat("s", 1024))},
		"a secret at its limit":            {sessionlock.WithKeySecret(make([]byte, 16))},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := sessionlock.New(acme, &upstream{}, append(opts, sessionlock.WithCache(new(sessionlock.MemoryCache)))...)
			assert.NoError(t, err)
		})
	}
}

func TestNewReportsAllThatIsWrongAtOnce(t *testing.T) {
	_, err := sessionlock.New(" ", nil, nil, sessionlock.WithLockTTL(-1), sessionlock.WithLoginBudget(0, 0),
		sessionlock.WithKeySecret([]byte(canary)), sessionlock.WithLogger(nil))
	refusedArgument(t, err, "New")
	for _, want := range []string{"upstream", "authenticator", "Option", "WithLockTTL", "n is 0", "window", "WithKeySecret", "WithLogger", "no store"} {
		assert.ErrorContains(t, err, want)
	}
}

func TestLaterOptionWins(t *testing.T) {
	open := func(opts ...sessionlock.Option) *sessionlock.Client {
		c, err := sessionlock.New(acme, &upstream{}, append(opts, sessionlock.WithCache(new(sessionlock.MemoryCache)))...)
		require.NoError(t, err)
		return c
	}
	a := open(sessionlock.WithNamespace("a"), sessionlock.WithNamespace("b"), sessionlock.WithLockTTL(-1), sessionlock.WithLockTTL(time.Second))
	b := open(sessionlock.WithNamespace("b"))
	assert.Equal(t, b.KeyID("bob"), a.KeyID("bob"))
	first, second := new(sessionlock.MemoryCache), new(sessionlock.MemoryCache)
	c := newClient(t, &upstream{}, first, sessionlock.WithCache(second))
	tokenOf(t, c, "bob")
	status, err := newClient(t, &upstream{}, second).Inspect(t.Context(), "bob")
	require.NoError(t, err)
	assert.NotZero(t, status.Generation)
}

// The caller may wipe the secret it passed.
func TestKeySecretIsCopied(t *testing.T) {
	secret := []byte("0123456789abcdef")
	c := newClient(t, &upstream{}, new(sessionlock.MemoryCache), sessionlock.WithKeySecret(secret))
	before := c.KeyID("bob")
	clear(secret)
	assert.Equal(t, before, c.KeyID("bob"))
}

// watched returns a client that works, and the spy on all of its store.
func watched(t *testing.T, u *upstream, opts ...sessionlock.Option) (*sessionlock.Client, *spy) {
	t.Helper()
	s := &spy{}
	opts = append([]sessionlock.Option{sessionlock.WithLocker(spyLocker{s, new(memoryLocker)})}, opts...)
	return newClient(t, u, spyCache{s, new(sessionlock.MemoryCache)}, opts...), s
}

// asks counts what a spy has seen but unlocks, which nobody waits for.
func asks(s *spy) int { return s.count(opLoad, opSwap, opLock, opExtend) }

func TestNewTouchesNothing(t *testing.T) {
	u := &upstream{}
	c, s := watched(t, u)
	c.KeyID("bob")
	c.For("bob")
	c.Stats()
	require.NoError(t, c.Close(t.Context()))
	assert.Zero(t, s.count())
	assert.Zero(t, u.logins())
}

// badKeys are refused, whoever is given them.
var badKeys = map[string]string{
	"empty":        "",
	"a space":      " ",
	"white space":  "\t\r\n\v\f",
	"wide space":   "\u00a0\u2003\u3000",
	"a byte long":  canary + strings.Repeat("k", 257-len(canary)),
	"a megabyte":   canary + strings.Repeat("k", 1<<20),
	"long in utf8": canary + strings.Repeat("ü", 128),
}

func TestBadKeyTouchesNothing(t *testing.T) {
	for name, key := range badKeys {
		t.Run(name, func(t *testing.T) {
			u := &upstream{}
			c, s := watched(t, u)
			for call, err := range everyCall(t.Context(), c, key) {
				refusedArgument(t, err, call)
			}
			assert.Zero(t, s.count())
			assert.Zero(t, u.logins())
		})
	}
}

func TestNilContextTouchesNothing(t *testing.T) {
	u := &upstream{}
	c, s := watched(t, u)
	warm := tokenOf(t, c, "warm") // a near copy is no way round
	require.NotEmpty(t, warm)
	own, err := c.Session(t.Context(), "warm")
	require.NoError(t, err)
	before := asks(s)
	for _, key := range []string{"warm", "cold", ""} {
		for call, err := range everyCall(nil, c, key) { //nolint:staticcheck // that is the case
			refusedArgument(t, err, call)
		}
	}
	refusedArgument(t, c.Invalidate(nil, own), "Invalidate") //nolint:staticcheck // that is the case
	refusedArgument(t, c.Close(nil), "Close")                //nolint:staticcheck // that is the case
	assert.Equal(t, before, asks(s))
	assert.Equal(t, 1, u.logins())
	assert.Equal(t, warm, tokenOf(t, c, "warm"), "a Close that was refused has closed nothing")
}

func TestNilFuncTouchesNothing(t *testing.T) {
	u := &upstream{}
	c, s := watched(t, u)
	_, call := sessionlock.Call[int](t.Context(), c.For("bob"), nil)
	for name, err := range map[string]error{
		"Do": c.Do(t.Context(), "bob", nil), "Handle.Do": c.For("bob").Do(t.Context(), nil), "Call": call,
	} {
		refusedArgument(t, err, name)
	}
	assert.Zero(t, s.count())
	assert.Zero(t, u.logins())
}

// Several arguments that are wrong are reported together.
func TestCallReportsAllThatIsWrongAtOnce(t *testing.T) {
	c, _ := watched(t, &upstream{})
	err := c.Do(nil, " ", nil) //nolint:staticcheck // that is the case
	refusedArgument(t, err, "Do")
	for _, want := range []string{"context", "key", "func"} {
		assert.ErrorContains(t, err, want)
	}
}

func TestContextThatIsOverTouchesNothing(t *testing.T) {
	cause := errors.New("the user has left")
	for name, tt := range map[string]struct {
		ctx  func(ctx context.Context) (context.Context, context.CancelFunc)
		want []error
	}{
		"cancelled": {func(ctx context.Context) (context.Context, context.CancelFunc) {
			ctx, cancel := context.WithCancel(ctx)
			cancel()
			return ctx, cancel
		}, []error{context.Canceled}},
		"cancelled with a cause": {func(ctx context.Context) (context.Context, context.CancelFunc) {
			ctx, cancel := context.WithCancelCause(ctx)
			cancel(cause)
			return ctx, func() { cancel(nil) }
		}, []error{context.Canceled, cause}},
		"expired": {func(ctx context.Context) (context.Context, context.CancelFunc) {
			return context.WithDeadline(ctx, time.Now().Add(-time.Hour))
		}, []error{context.DeadlineExceeded}},
		"expired long ago": {func(ctx context.Context) (context.Context, context.CancelFunc) {
			return context.WithDeadline(ctx, time.Time{})
		}, []error{context.DeadlineExceeded}},
		"with a nanosecond": {func(ctx context.Context) (context.Context, context.CancelFunc) {
			ctx, cancel := context.WithTimeout(ctx, 1)
			<-ctx.Done()
			return ctx, cancel
		}, []error{context.DeadlineExceeded}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				u := &upstream{}
				c, s := watched(t, u)
				own, err := c.Session(t.Context(), "warm")
				require.NoError(t, err)
				synctest.Wait()
				before := s.count()
				ctx, cancel := tt.ctx(t.Context())
				defer cancel()
				errs := everyCall(ctx, c, "cold")
				errs["Invalidate"] = c.Invalidate(ctx, own)
				_, errs["warm"] = c.Session(ctx, "warm")
				for call, err := range errs {
					for _, want := range tt.want {
						require.ErrorIs(t, err, want, call)
					}
				}
				synctest.Wait()
				assert.Equal(t, before, s.count())
				assert.Equal(t, 1, u.logins())
			})
		})
	}
}

func TestContextWithoutAnEndWorks(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	c, _ := watched(t, &upstream{})
	for call, err := range everyCall(context.WithoutCancel(ctx), c, "bob") {
		assert.NoError(t, err, call)
	}
}

// Keys that are awkward wherever keys are put into names as they are.
func TestAwkwardKeysHaveSessionsOfTheirOwn(t *testing.T) {
	keys := []string{
		"\x00", "\xff", "\xff\xfe", "{}", "{a}b", "a}b{c", ":", "a:b", "*?[", "a\r\nb", "\u202eevil", "😀", "../", "%s%n", "e", ":e", ":l",
		"Zo\u00eb", "Zoe\u0308", "bob", "Bob", "bob ", " bob", "bob\x00", "\u200b", strings.Repeat("k", 256), strings.Repeat("k", 255), strings.Repeat("ü", 128),
		sessionlock.JoinKey("a", "bc"), sessionlock.JoinKey("ab", "c"),
	}
	synctest.Test(t, func(t *testing.T) {
		u, store := &upstream{life: time.Hour}, new(sessionlock.MemoryCache)
		u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
			return u.grant(fmt.Sprintf("%x", key), n), nil
		}
		a, b := newClient(t, u, store), newClient(t, u, store)
		tokens := map[string]string{}
		for _, key := range keys {
			s, err := a.Session(t.Context(), key)
			require.NoErrorf(t, err, "%q", key)
			assert.Equal(t, key, s.Key())
			tokens[s.Token.Reveal()] = key
		}
		assert.Len(t, tokens, len(keys), "one session per key")
		for _, key := range keys {
			s, err := b.For(key).Session(t.Context())
			require.NoErrorf(t, err, "%q", key)
			assert.Equal(t, key, tokens[s.Token.Reveal()], "the other process finds it")
			assert.Equal(t, key, s.Key())
		}
		assert.Equal(t, len(keys), u.logins())
	})
}

func TestInvalidateRefusesSessionsOfOthers(t *testing.T) {
	u, store := &upstream{life: time.Hour}, new(sessionlock.MemoryCache)
	s := &spy{}
	c := newClient(t, u, spyCache{s, store}, sessionlock.WithLocker(new(memoryLocker))) // unlocks are not the cache's
	of := func(upstream string, opts ...sessionlock.Option) sessionlock.Session {
		other, err := sessionlock.New(upstream, u, append(opts, sessionlock.WithCache(store))...)
		require.NoError(t, err)
		t.Cleanup(func() { _ = other.Close(context.WithoutCancel(t.Context())) })
		got, err := other.Session(t.Context(), "bob")
		require.NoError(t, err)
		return got
	}
	made := sessionlock.Session{Token: sessionlock.NewToken(canary)}
	own, err := c.Session(t.Context(), "bob")
	require.NoError(t, err)
	before := s.count()
	for name, bad := range map[string]sessionlock.Session{
		"the zero one":         {},
		"made by hand":         made,
		"made, with a value":   made.WithValue("v", canary),
		"of another upstream":  of("https://other.test"),
		"of another namespace": of(acme, sessionlock.WithNamespace("staging")),
	} {
		refusedArgument(t, c.Invalidate(t.Context(), bad), name)
	}
	assert.Equal(t, before, s.count())
	assert.Equal(t, own.Token, mustSession(t, c, "bob").Token, "nothing was invalidated")

	require.NoError(t, c.Invalidate(t.Context(), of(acme)), "another client of the same fleet is no stranger")
	assert.NotEqual(t, own.Generation(), mustSession(t, c, "bob").Generation())
}

func mustSession(t *testing.T, c *sessionlock.Client, key string) sessionlock.Session {
	t.Helper()
	s, err := c.Session(t.Context(), key)
	require.NoError(t, err)
	return s
}

func TestInvalidateAgainHasNoEffect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := &upstream{life: time.Hour}
		c, _ := watched(t, u)
		old := mustSession(t, c, "bob")
		time.Sleep(time.Minute) // it has proved itself: no back-off
		var wg sync.WaitGroup
		for range 1000 {
			wg.Go(func() { assert.NoError(t, c.Invalidate(t.Context(), old.WithValue("copy", "of it"))) })
		}
		wg.Wait()
		next := mustSession(t, c, "bob")
		assert.Greater(t, next.Generation(), old.Generation())
		require.NoError(t, c.Invalidate(t.Context(), old), "an older generation")
		assert.Equal(t, next.Token, mustSession(t, c, "bob").Token)
		assert.Equal(t, 2, u.logins())
	})
}

func TestCloseMayBeCalledAgainAndAtOnce(t *testing.T) {
	over, cancel := context.WithCancel(t.Context())
	cancel()
	late, cancelLate := context.WithDeadline(t.Context(), time.Now().Add(-time.Second))
	defer cancelLate()
	for name, warm := range map[string]bool{"before any call": false, "after a call": true} {
		t.Run(name, func(t *testing.T) {
			c, _ := watched(t, &upstream{})
			if warm {
				tokenOf(t, c, "bob")
			}
			var wg sync.WaitGroup
			for range 20 {
				wg.Go(func() { assert.NoError(t, c.Close(t.Context())) })
				wg.Go(func() { assert.NoError(t, c.Close(context.WithoutCancel(over))) })
				wg.Go(func() { // whether anything was left to wait for is a race
					if err := c.Close(over); err != nil {
						assert.ErrorIs(t, err, context.Canceled)
					}
					if err := c.Close(late); err != nil {
						assert.ErrorIs(t, err, context.DeadlineExceeded)
					}
				})
			}
			wg.Wait()
			assert.NoError(t, c.Close(t.Context()))
		})
	}
}

// A login under way is waited for as long as ctx says, and not longer.
func TestCloseWaitsAsLongAsItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := &upstream{takes: 5 * time.Second, life: time.Hour}
		c, _ := watched(t, u)
		got := askFor(t.Context(), c, "bob")
		time.Sleep(time.Second)
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		start := time.Now()
		require.ErrorIs(t, c.Close(ctx), context.DeadlineExceeded)
		assert.Equal(t, 2*time.Second, time.Since(start))
		require.Error(t, (<-got).err, "it was cancelled")

		c, _ = watched(t, u)
		got = askFor(t.Context(), c, "bob")
		time.Sleep(time.Second)
		start = time.Now()
		require.NoError(t, c.Close(t.Context()))
		assert.Equal(t, 4*time.Second, time.Since(start))
		require.NoError(t, (<-got).err, "it was finished")
	})
}

func TestCallsAfterCloseTouchNothing(t *testing.T) {
	u := &upstream{}
	c, s := watched(t, u)
	handle := c.For("bob")
	own, err := handle.Session(t.Context())
	require.NoError(t, err)
	id, hits := c.KeyID("bob"), c.Stats().NearHits
	require.NoError(t, c.Close(t.Context()))
	before := asks(s)
	for _, key := range []string{"bob", "eve"} {
		for call, err := range everyCall(t.Context(), c, key) {
			assert.ErrorIs(t, err, sessionlock.ErrClosed, call)
		}
	}
	assert.ErrorIs(t, c.Invalidate(t.Context(), own), sessionlock.ErrClosed)
	_, err = handle.Session(t.Context())
	assert.ErrorIs(t, err, sessionlock.ErrClosed, "a handle that was warm")
	for call, err := range everyCall(t.Context(), c, "") {
		refusedArgument(t, err, call)
	}
	assert.Equal(t, before, asks(s))
	assert.Equal(t, 1, u.logins())
	assert.Equal(t, id, c.KeyID("bob"))
	assert.Equal(t, hits, c.Stats().NearHits)
}

// printed are the ways in which values end up in logs, errors, pages and
// answers by accident. Each returns what it wrote.
func printed(v any) map[string]string {
	out := map[string]string{}
	for _, verb := range []string{
		"%v", "%+v", "%#v", "%s", "%+s", "%q", "%#q", "%+q", "%x", "%X", "% x", "%#x", "%d", "%+d", "%t", "%c", "%U", "%o", "%b",
		"%e", "%g", "%p", "%T", "%20v", "%-20.3s", "%010d", "%w", "%z", "%!",
	} {
		out[verb] = fmt.Sprintf(verb, v)
	}
	out["Sprint"], out["Sprintln"] = fmt.Sprint(v), fmt.Sprintln(v)
	out["Errorf"] = fmt.Errorf("%w: %v", io.EOF, v).Error()
	out["panic"] = func() (s string) {
		defer func() { s = fmt.Sprint(recover()) }()
		panic(v)
	}()
	write := func(name string, f func(w io.Writer) error) {
		var b bytes.Buffer
		if err := f(&b); err != nil {
			b.WriteString(err.Error())
		}
		out[name] = b.String()
	}
	write("json", func(w io.Writer) error { return json.NewEncoder(w).Encode(v) })
	write("xml", func(w io.Writer) error { return xml.NewEncoder(w).Encode(v) })
	write("gob", func(w io.Writer) error { return gob.NewEncoder(w).Encode(v) })
	write("template", func(w io.Writer) error {
		return template.Must(template.New("").Parse(`{{.}} {{printf "%x" .}} {{js .}}`)).Execute(w, v)
	})
	write("html", func(w io.Writer) error {
		return htmltemplate.Must(htmltemplate.New("").Parse(`<a href="{{.}}" title={{.}}><script>x = {{.}}</script>{{.}}</a>`)).Execute(w, v)
	})
	for name, handler := range map[string]func(w io.Writer) slog.Handler{
		"slog text": func(w io.Writer) slog.Handler { return slog.NewTextHandler(w, nil) },
		"slog json": func(w io.Writer) slog.Handler { return slog.NewJSONHandler(w, nil) },
	} {
		write(name, func(w io.Writer) error {
			slog.New(handler(w)).Info("msg", slog.Any("v", v), slog.Group("g", slog.Any("v", v)))
			return nil
		})
	}
	return out
}

// around are the places a secret is printed from: as it is, and inside of what
// a caller's code may keep it in.
func around[T comparable](v T) map[string]any {
	type named struct{ V T }
	type hidden struct{ v T }
	return map[string]any{
		"itself": v, "pointer": &v, "slice": []T{v}, "array": [1]T{v}, "map": map[string]T{"v": v}, "map key": map[T]int{v: 1},
		"field": named{v}, "field of a pointer": &named{v}, "embedded": struct{ In named }{named{v}},
		"unexported field": hidden{v}, "pointer in an unexported field": struct{ v *T }{&v}, "slice in an unexported field": struct{ v []T }{[]T{v}},
		"any": struct{ V any }{v}, "unexported any": struct{ v any }{v}, "func": func() T { return v }, "chan": make(chan T),
	}
}

func TestTokenIsNeverPrinted(t *testing.T) {
	for where, v := range around(sessionlock.NewToken(canary)) {
		for how, s := range printed(v) {
			seen(t, s, how+" of "+where)
		}
	}
	token := sessionlock.NewToken(canary)
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d", "%t"} {
		assert.Equal(t, "[redacted]", fmt.Sprintf(verb, token))
		assert.Equal(t, "[redacted]", fmt.Sprintf(verb, sessionlock.Token{}), "the zero token does not say that it is empty")
	}
	assert.Equal(t, "sessionlock.Token", fmt.Sprintf("%T", token))
	assert.Equal(t, canary, token.Reveal())
	assert.Empty(t, sessionlock.Token{}.Reveal())
}

func TestTokenIsReadFromTextAndNotBackFromWhatItWrote(t *testing.T) {
	var answer struct {
		Token sessionlock.Token `json:"token"`
	}
	require.NoError(t, json.Unmarshal([]byte(`{"token":"`+canary+`"}`), &answer))
	assert.Equal(t, canary, answer.Token.Reveal())
	written, err := json.Marshal(answer)
	require.NoError(t, err)
	assert.JSONEq(t, `{"token":"[redacted]"}`, string(written))
	refusedArgument(t, json.Unmarshal(written, &answer), "json")
	refusedArgument(t, new(sessionlock.Token).UnmarshalText([]byte("[redacted]")), "text")
	assert.Equal(t, canary, answer.Token.Reveal(), "a refused text changes nothing")
	for _, text := range []string{"", " ", "[REDACTED]", "\x00", "\xff", strings.Repeat("t", 1<<20)} {
		var token sessionlock.Token
		require.NoError(t, token.UnmarshalText([]byte(text)))
		assert.Equal(t, text, token.Reveal())
	}
	b := []byte(canary)
	var token sessionlock.Token
	require.NoError(t, token.UnmarshalText(b))
	clear(b)
	assert.Equal(t, canary, token.Reveal(), "the caller's slice is the caller's")
}

// FuzzTokenFormat: no verb, flag or width shows a token, nor a session with it.
func FuzzTokenFormat(f *testing.F) {
	f.Add("%v", 0, false)
	f.Add("%#x", 10, true)
	f.Add("%+.3[1]q %[1]p %[1]T", -5, false)
	f.Fuzz(func(t *testing.T, format string, width int, hidden bool) {
		if strings.Contains(format, canary) || strings.Count(format, "%") > 20 || len(format) > 200 || strings.ContainsAny(format, "0123456789") {
			return
		}
		s := sessionlock.Session{Token: sessionlock.NewToken(canary)}.WithValue("v", canary)
		values := []any{s.Token, s, &s, []any{s, s.Token}}
		if hidden {
			values = []any{struct{ v any }{s.Token}, struct{ s sessionlock.Session }{s}, struct{ p *sessionlock.Token }{&s.Token}, width}
		}
		seen(t, fmt.Sprintf(format, values...), format)
	})
}

// password is an authenticator with a secret of its own.
type password struct{ Secret string }

func (p *password) Login(context.Context, string) (sessionlock.Session, error) {
	return sessionlock.Session{Token: sessionlock.NewToken(p.Secret + "-token")}.WithValue("refresh", p.Secret), nil
}

// given returns a session as a client gives it out: with all that the client
// has put into it, and behind it the client with its own secrets.
func given(t *testing.T, key string) sessionlock.Session {
	t.Helper()
	c, err := sessionlock.New(acme, &password{canary}, sessionlock.WithCache(new(sessionlock.MemoryCache)),
		sessionlock.WithKeySecret([]byte(canary+canary+canary)))
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close(context.WithoutCancel(t.Context())) })
	return mustSession(t, c, key)
}

func TestSessionIsNeverPrinted(t *testing.T) {
	for kind, s := range map[string]sessionlock.Session{
		"made":  sessionlock.Session{Token: sessionlock.NewToken(canary)}.WithValue("v", canary).WithValue(canary, "v"),
		"given": given(t, canary+"-key"),
	} {
		for where, v := range around(s) {
			for how, s := range printed(v) {
				seen(t, s, how+" of "+where+", "+kind)
			}
		}
	}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d", "%t"} {
		assert.Equal(t, "[redacted]", fmt.Sprintf(verb, given(t, "bob")))
		assert.Equal(t, "[redacted]", fmt.Sprintf(verb, sessionlock.Session{}))
	}
}

// told collects what an assertion says.
type told struct{ strings.Builder }

func (f *told) Errorf(format string, args ...any) { fmt.Fprintf(&f.Builder, format, args...) }

// A failing test of a caller prints what it compared by reflection, past every
// method, into a log that more people read than production's.
func TestFailingAssertionShowsNoSecret(t *testing.T) {
	a, b := given(t, canary+"-1"), given(t, canary+"-2")
	for name, assertion := range map[string]func(f *told) bool{
		"sessions": func(f *told) bool { return assert.Equal(f, a, b) },
		"made ones": func(f *told) bool {
			return assert.Equal(f, a, sessionlock.Session{Token: a.Token}.WithValue("v", canary))
		},
		"tokens":   func(f *told) bool { return assert.Equal(f, a.Token, b.Token) },
		"pointers": func(f *told) bool { return assert.Equal(f, &a, &b) },
		"slices":   func(f *told) bool { return assert.ElementsMatch(f, []sessionlock.Session{a}, []sessionlock.Session{b}) },
		"structs": func(f *told) bool {
			return assert.Equal(f, struct{ s sessionlock.Session }{a}, struct{ s sessionlock.Session }{b})
		},
		"something it is":  func(f *told) bool { return assert.Empty(f, a) },
		"something it has": func(f *told) bool { return assert.Contains(f, []sessionlock.Session{a}, b) },
	} {
		t.Run(name, func(t *testing.T) {
			f := &told{}
			assert.False(t, assertion(f), "it must fail to be of use here")
			seen(t, f.String(), "the assertion")
		})
	}
}

func TestSessionIsAnImmutableValue(t *testing.T) {
	zero := sessionlock.Session{}
	assert.Empty(t, zero.Value("v"))
	assert.Empty(t, zero.Key())
	assert.Zero(t, zero.Generation())

	a := sessionlock.Session{Token: sessionlock.NewToken("t")}.WithValue("v", "1")
	b, c := a.WithValue("v", "2"), a.WithValue("w", "3")
	assert.Equal(t, []string{"1", "2", "1", ""}, []string{a.Value("v"), b.Value("v"), c.Value("v"), a.Value("w")})
	assert.Equal(t, "3", c.Value("w"))
	assert.Empty(t, a.WithValue("v", "").Value("v"))
	assert.Equal(t, "x", a.WithValue("", "x").Value(""))

	own := given(t, "bob")
	more := own.WithValue("more", "m")
	assert.Empty(t, own.Value("more"))
	assert.Equal(t, canary, more.Value("refresh"))
	assert.Equal(t, own.Generation(), more.Generation())
	assert.Equal(t, "bob", more.Key())

	var wg sync.WaitGroup
	for i := range 32 {
		wg.Go(func() {
			name := fmt.Sprint(i)
			assert.Equal(t, name, a.WithValue(name, name).Value(name))
			assert.Equal(t, "1", a.Value("v"))
		})
	}
	wg.Wait()
	for i := range 32 {
		assert.Empty(t, a.Value(fmt.Sprint(i)))
	}
}

// values returns s with n values of size bytes, name included.
func values(s sessionlock.Session, n, size int) sessionlock.Session {
	for i := range n {
		name := fmt.Sprintf("%02d", i)
		s = s.WithValue(name, strings.Repeat("v", size-len(name)))
	}
	return s
}

func TestLoginIsSharedWhole(t *testing.T) {
	token := func(v string) sessionlock.Session { return sessionlock.Session{Token: sessionlock.NewToken(v)} }
	until := func(at time.Time) sessionlock.Session { s := token("t"); s.Expiry = at; return s }
	for name, tt := range map[string]struct{ login func() sessionlock.Session }{
		"a token at its limit": {func() sessionlock.Session { return token(strings.Repeat("t", 16<<10)) }},
		"a token of any bytes": {func() sessionlock.Session { return token("ü\xff\u202e {}") }},
		"a token with spaces":  {func() sessionlock.Session { return token(" t ") }},
		"32 values":            {func() sessionlock.Session { return values(token("t"), 32, 100) }},
		"values at their size": {func() sessionlock.Session { return values(token("t"), 15, 1024) }},
		"a value of any bytes": {func() sessionlock.Session { return token("t").WithValue("\x00", "\r\n\xff") }},
		"an empty value":       {func() sessionlock.Session { return token("t").WithValue("v", "") }},
		"no expiry":            {func() sessionlock.Session { return until(time.Time{}) }},
		"a short life":         {func() sessionlock.Session { return until(time.Now().Add(10 * time.Second)) }},
		"the year 9999":        {func() sessionlock.Session { return until(time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC)) }},
		"a zone of its own":    {func() sessionlock.Session { return until(time.Now().Add(time.Hour).In(time.FixedZone("", 14*3600))) }},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store, u := new(sessionlock.MemoryCache), &upstream{}
				want := tt.login()
				u.script = func(context.Context, string, int) (sessionlock.Session, error) { return want, nil }
				first := mustSession(t, newClient(t, u, store), "bob")
				other := mustSession(t, newClient(t, u, store), "bob")
				assert.Equal(t, 1, u.logins())
				assert.Equal(t, first.Generation(), other.Generation())
				for _, got := range []sessionlock.Session{first, other} {
					assert.Equal(t, want.Token.Reveal(), got.Token.Reveal())
					for _, v := range []string{"00", "31", "v", "\x00"} {
						assert.Equal(t, want.Value(v), got.Value(v))
					}
					if want.Expiry.Year() < 9999 { // further off than anybody can count is far off
						assert.WithinDuration(t, want.Expiry, got.Expiry, time.Microsecond)
					} else {
						assert.Greater(t, got.Expiry.Year(), 2200)
					}
				}
			})
		})
	}
}

// What Login returns that cannot be used is stored nowhere, and ended upstream
// where there is anything to end.
func TestUnusableLoginIsRefusedAndEnded(t *testing.T) {
	token := func(v string) sessionlock.Session { return sessionlock.Session{Token: sessionlock.NewToken(v)} }
	until := func(at time.Time) sessionlock.Session { s := token("t"); s.Expiry = at; return s }
	noMaxAge := sessionlock.WithMaxAge(0)
	for name, tt := range map[string]struct {
		login func() sessionlock.Session
		opt   sessionlock.Option
		ended bool
	}{
		"the zero session":            {func() sessionlock.Session { return sessionlock.Session{} }, nil, false},
		"no token, but values":        {func() sessionlock.Session { return sessionlock.Session{}.WithValue("v", "v") }, nil, false},
		"white space":                 {func() sessionlock.Session { return token(" \u00a0 ") }, nil, true},
		"a token over its limit":      {func() sessionlock.Session { return token(strings.Repeat("t", 16<<10+1)) }, nil, true},
		"CR LF":                       {func() sessionlock.Session { return token("t\r\nX-Admin: 1") }, nil, true},
		"LF":                          {func() sessionlock.Session { return token("t\n") }, nil, true},
		"NUL":                         {func() sessionlock.Session { return token("t\x00") }, nil, true},
		"DEL":                         {func() sessionlock.Session { return token("t\x7f") }, nil, true},
		"33 values":                   {func() sessionlock.Session { return values(token("t"), 33, 10) }, nil, true},
		"a value over its size":       {func() sessionlock.Session { return values(token("t"), 1, 1025) }, nil, true},
		"a record over its size":      {func() sessionlock.Session { return values(token(strings.Repeat("t", 16<<10)), 16, 1024) }, nil, true},
		"expired":                     {func() sessionlock.Session { return until(time.Now().Add(-time.Second)) }, nil, true},
		"expires now":                 {func() sessionlock.Session { return until(time.Now()) }, nil, true},
		"expired before anything":     {func() sessionlock.Session { return until(time.Unix(0, 0)) }, nil, true},
		"expired in the year -1":      {func() sessionlock.Session { return until(time.Date(-1, 1, 1, 0, 0, 0, 0, time.UTC)) }, nil, true},
		"no expiry where one must be": {func() sessionlock.Session { return token("t") }, noMaxAge, true},
		"refused by WithComplete":     {func() sessionlock.Session { return token("t") }, sessionlock.WithComplete(func(sessionlock.Session) bool { return false }), true},
		"a panic of WithComplete":     {func() sessionlock.Session { return token("t") }, sessionlock.WithComplete(func(sessionlock.Session) bool { panic(canary) }), true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store, u := new(sessionlock.MemoryCache), &upstream{}
				u.script = func(context.Context, string, int) (sessionlock.Session, error) { return tt.login(), nil }
				opts := []sessionlock.Option{}
				if tt.opt != nil {
					opts = append(opts, tt.opt)
				}
				_, err := newClient(t, u, store, opts...).Session(t.Context(), canary+"-key")
				var login *sessionlock.LoginError
				require.ErrorIs(t, err, sessionlock.ErrIncomplete)
				require.ErrorAs(t, err, &login)
				assert.Equal(t, sessionlock.LoginUnknown, login.Class, "the upstream may have counted it")
				assert.True(t, login.Until.After(time.Now()))
				seen(t, err.Error(), "the error")
				synctest.Wait()
				if tt.ended {
					require.Equal(t, []string{tt.login().Token.Reveal()}, u.ended())
					assert.Equal(t, canary+"-key", u.out[0].Key())
					assert.Zero(t, u.out[0].Generation())
				} else {
					assert.Empty(t, u.ended())
				}
				st, err := newClient(t, u, store).Inspect(t.Context(), canary+"-key")
				require.NoError(t, err)
				assert.Zero(t, st.Generation, "nothing is stored")
			})
		})
	}
}

// A session that somebody else uses is neither stored under a second key nor
// ended.
func TestSessionOfAnotherKeyIsRefusedAndLives(t *testing.T) {
	for name, also := range map[string]error{"alone": nil, "with an error": errDead} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				u := &upstream{life: time.Hour}
				c, _ := watched(t, u)
				alice := mustSession(t, c, "alice")
				u.script = func(context.Context, string, int) (sessionlock.Session, error) {
					return alice.WithValue("v", "v"), also
				}
				_, err := c.Session(t.Context(), "bob")
				require.Error(t, err)
				if also == nil {
					require.ErrorIs(t, err, sessionlock.ErrIncomplete)
				}
				synctest.Wait()
				assert.Empty(t, u.ended(), "alice still uses it")
				assert.Equal(t, alice.Token, mustSession(t, c, "alice").Token)
				st, err := c.Inspect(t.Context(), "bob")
				require.NoError(t, err)
				assert.Zero(t, st.Generation)
			})
		})
	}
}

// The text of what a login returns as an error is the upstream's; it is reached
// by errors.As and printed nowhere.
func TestLoginErrorDoesNotPrintItsCause(t *testing.T) {
	var log bytes.Buffer
	var seenEvents recorder
	u := &upstream{}
	u.script = func(context.Context, string, int) (sessionlock.Session, error) {
		return sessionlock.Session{Token: sessionlock.NewToken(canary)}, sessionlock.Denied(errors.New("user " + canary + " refused"))
	}
	c, _ := watched(t, u, sessionlock.WithLogger(slog.New(slog.NewJSONHandler(&log, nil))), sessionlock.WithObserver(&seenEvents))
	for call, err := range everyCall(t.Context(), c, canary+"-key") {
		if err != nil {
			require.ErrorIs(t, err, sessionlock.ErrDenied, call)
			seen(t, err.Error(), call)
		}
	}
	require.NoError(t, c.Close(t.Context()))
	seen(t, log.String(), "the log")
	assert.NotEmpty(t, log.String())
	for _, e := range seenEvents.all() {
		seen(t, e.KeyID+e.Kind, "an event")
		if e.Err != nil {
			seen(t, e.Err.Error(), "the error of an event")
		}
	}
}

type nilError struct{}

func (*nilError) Error() string { return "typed nil" }

func TestMarksOfNilAreNil(t *testing.T) {
	assert.NoError(t, sessionlock.Denied(nil))
	assert.NoError(t, sessionlock.RetryAfter(nil, time.Hour))
	assert.NoError(t, sessionlock.Reject(nil))
}

func TestMarkedErrorIsSeenThrough(t *testing.T) {
	cause := fmt.Errorf("wrapped: %w", io.EOF)
	for name, err := range map[string]error{
		"Denied": sessionlock.Denied(cause), "RetryAfter": sessionlock.RetryAfter(cause, -1), "Reject": sessionlock.Reject(cause),
	} {
		require.ErrorIs(t, err, io.EOF, name)
		assert.Equal(t, cause.Error(), err.Error())
	}
}

func TestOutermostMarkWins(t *testing.T) {
	later := sessionlock.RetryAfter
	for name, tt := range map[string]struct {
		err  error
		want sessionlock.LoginClass
		wait time.Duration
	}{
		"unmarked":              {io.EOF, sessionlock.LoginUnknown, 250 * time.Millisecond},
		"a typed nil":           {(*nilError)(nil), sessionlock.LoginUnknown, 250 * time.Millisecond},
		"denied":                {sessionlock.Denied(io.EOF), sessionlock.LoginDenied, 15 * time.Minute},
		"denied, wrapped":       {fmt.Errorf("log in: %w", sessionlock.Denied(io.EOF)), sessionlock.LoginDenied, 15 * time.Minute},
		"denied, joined":        {errors.Join(io.EOF, sessionlock.Denied(io.EOF)), sessionlock.LoginDenied, 15 * time.Minute},
		"denied, then deferred": {later(sessionlock.Denied(io.EOF), time.Minute), sessionlock.LoginDeferred, time.Minute},
		"deferred, then denied": {sessionlock.Denied(later(io.EOF, time.Minute)), sessionlock.LoginDenied, 15 * time.Minute},
		"deferred by nothing":   {later(io.EOF, 0), sessionlock.LoginDeferred, 250 * time.Millisecond},
		"deferred by less":      {later(io.EOF, -time.Hour), sessionlock.LoginDeferred, 250 * time.Millisecond},
		"deferred by a wink":    {later(io.EOF, 1), sessionlock.LoginDeferred, 250 * time.Millisecond},
		"deferred for ever":     {later(io.EOF, math.MaxInt64), sessionlock.LoginDeferred, 15 * time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				u := &upstream{script: func(context.Context, string, int) (sessionlock.Session, error) { return sessionlock.Session{}, tt.err }}
				c, _ := watched(t, u)
				_, err := c.Session(t.Context(), "bob")
				var login *sessionlock.LoginError
				require.ErrorAs(t, err, &login)
				assert.Equal(t, tt.want, login.Class)
				assert.WithinDuration(t, time.Now().Add(tt.wait), login.Until, time.Millisecond)
			})
		})
	}
}

func TestLoginStatus(t *testing.T) {
	at := func(d time.Duration) string { return time.Now().Add(d).UTC().Format(http.TimeFormat) }
	for name, tt := range map[string]struct {
		status int
		header string
		class  sessionlock.LoginClass // 0: no error
		wait   time.Duration
	}{
		"200": {200, "", 0, 0}, "204": {204, "", 0, 0}, "299": {299, "60", 0, 0},
		"301": {301, "", sessionlock.LoginUnknown, 0}, "100": {100, "", sessionlock.LoginUnknown, 0}, "0": {0, "", sessionlock.LoginUnknown, 0},
		"400": {400, "", sessionlock.LoginDenied, 0}, "401": {401, "", sessionlock.LoginDenied, 0}, "403": {403, "60", sessionlock.LoginDenied, 0},
		"404": {404, "", sessionlock.LoginUnknown, 0}, "500": {500, "", sessionlock.LoginUnknown, 0}, "502": {502, "60", sessionlock.LoginUnknown, 0},
		"429": {429, "", sessionlock.LoginDeferred, 0}, "503": {503, "", sessionlock.LoginDeferred, 0},
		"429 for seconds":     {429, "60", sessionlock.LoginDeferred, time.Minute},
		"503 until a date":    {503, at(2 * time.Minute), sessionlock.LoginDeferred, 2 * time.Minute},
		"503 until yesterday": {503, at(-24 * time.Hour), sessionlock.LoginDeferred, 0},
		"503 for less":        {503, "-5", sessionlock.LoginDeferred, 0},
		"503 for a fraction":  {503, "1.5", sessionlock.LoginDeferred, 0},
		"503 for words":       {503, "soon " + canary, sessionlock.LoginDeferred, 0},
		"503 for 68 years":    {503, "2147483647", sessionlock.LoginDeferred, 15 * time.Minute},
		"503 for ever":        {503, strings.Repeat("9", 400), sessionlock.LoginDeferred, 0},
	} {
		t.Run(name, func(t *testing.T) {
			err := sessionlock.LoginStatus(&http.Response{
				StatusCode: tt.status, Status: canary, Header: http.Header{"Retry-After": {tt.header}},
				Body: io.NopCloser(iotestErr{}),
			})
			if tt.class == 0 {
				require.NoError(t, err)
				return
			}
			require.Error(t, err)
			seen(t, err.Error(), "the error")
			u := &upstream{script: func(context.Context, string, int) (sessionlock.Session, error) { return sessionlock.Session{}, err }}
			c, _ := watched(t, u)
			_, err = c.Session(t.Context(), "bob")
			var login *sessionlock.LoginError
			require.ErrorAs(t, err, &login)
			assert.Equal(t, tt.class, login.Class)
			if tt.class == sessionlock.LoginDeferred {
				assert.WithinDuration(t, time.Now().Add(max(tt.wait, 250*time.Millisecond)), login.Until, 3*time.Second)
			}
		})
	}
}

// iotestErr is a body that must not be read.
type iotestErr struct{}

func (iotestErr) Read([]byte) (int, error) { panic("the body was read") }

func TestJoinKeyOfNothingIsBlank(t *testing.T) {
	c, _ := watched(t, &upstream{})
	_, err := c.Session(t.Context(), sessionlock.JoinKey())
	refusedArgument(t, err, "no parts")
	_, err = c.Session(t.Context(), sessionlock.JoinKey(""))
	require.NoError(t, err, "one empty part is a key like any other")
	assert.NotEqual(t, sessionlock.JoinKey(""), sessionlock.JoinKey("", ""))
	assert.NotEqual(t, sessionlock.JoinKey("1:a"), sessionlock.JoinKey("", "1:a"))
}

// FuzzJoinKey: other parts, other key.
func FuzzJoinKey(f *testing.F) {
	f.Add("ab", "c", "a", "bc")
	f.Add("", "", "0:", "")
	f.Add("1:a", "", "", "1:a")
	f.Fuzz(func(t *testing.T, a, b, c, d string) {
		assert.Equal(t, a == c && b == d, sessionlock.JoinKey(a, b) == sessionlock.JoinKey(c, d))
		assert.NotEqual(t, sessionlock.JoinKey(a, b), sessionlock.JoinKey(c))
		assert.NotEqual(t, sessionlock.JoinKey(a, b), sessionlock.JoinKey(a, b, c))
	})
}

// fn of Do may fail in any way; nothing stays locked and the session stays.
func TestAnyErrorOfTheFuncIsReturnedAsItIs(t *testing.T) {
	u := &upstream{}
	c, _ := watched(t, u)
	for name, want := range map[string]error{
		"plain": io.EOF, "a typed nil": (*nilError)(nil), "joined": errors.Join(io.EOF, errDead), "cancelled": context.Canceled,
		"ours": sessionlock.ErrRejected, "denied": sessionlock.Denied(io.EOF), "wrapped": fmt.Errorf("x: %w", io.EOF),
	} {
		assert.Equal(t, want, c.Do(t.Context(), "bob", func(context.Context, sessionlock.Session) error { return want }), name)
	}
	assert.PanicsWithValue(t, canary, func() {
		_ = c.Do(t.Context(), "bob", func(context.Context, sessionlock.Session) error { panic(canary) })
	})
	var left sync.WaitGroup
	left.Go(func() {
		_ = c.Do(context.WithoutCancel(t.Context()), "bob", func(context.Context, sessionlock.Session) error { runtime.Goexit(); return nil })
	})
	left.Wait()
	require.NoError(t, c.Do(t.Context(), "bob", nothing))
	assert.Equal(t, 1, u.logins())
}

func TestRejectionIsFoundHoweverItIsWrapped(t *testing.T) {
	for name, wrap := range map[string]func(error) error{
		"itself":  func(err error) error { return err },
		"wrapped": func(err error) error { return fmt.Errorf("orders: %w", err) },
		"joined":  func(err error) error { return errors.Join(io.EOF, err) },
		"twice":   sessionlock.Reject,
	} {
		t.Run(name, func(t *testing.T) {
			u := &upstream{}
			c, _ := watched(t, u)
			got, err := sessionlock.Call(t.Context(), c.For("bob"), func(ctx context.Context, s sessionlock.Session) (string, error) {
				if sessionlock.RejectionFromContext(ctx) == nil {
					return "of the first run", wrap(sessionlock.Reject(errDead))
				}
				return s.Token.Reveal(), nil
			})
			require.NoError(t, err)
			assert.Equal(t, "bob/2", got)
		})
	}
}

func TestResultOfAFailedCallIsZero(t *testing.T) {
	c, _ := watched(t, &upstream{})
	n, err := sessionlock.Call(t.Context(), c.For("bob"), func(context.Context, sessionlock.Session) (int, error) { return 7, io.EOF })
	require.ErrorIs(t, err, io.EOF)
	assert.Zero(t, n)
	e, err := sessionlock.Call(t.Context(), c.For("bob"), func(context.Context, sessionlock.Session) (any, error) { return nil, nil })
	require.NoError(t, err)
	assert.Nil(t, e)
	_, err = sessionlock.Call(t.Context(), c.For(""), func(context.Context, sessionlock.Session) (int, error) { panic("run without a session") })
	refusedArgument(t, err, "Call")
}

// The client may be closed by what it runs.
func TestFuncMayCloseItsClient(t *testing.T) {
	c, _ := watched(t, &upstream{})
	require.NoError(t, c.Do(t.Context(), "bob", func(ctx context.Context, _ sessionlock.Session) error { return c.Close(ctx) }))
	require.ErrorIs(t, c.Do(t.Context(), "bob", nothing), sessionlock.ErrClosed)
}

// counting watches how many watches are open: one per near copy.
type watching struct {
	*sessionlock.MemoryCache
	open, most atomic.Int64
}

func (w *watching) Watch(name string, changed func()) func() {
	if n := w.open.Add(1); n > w.most.Load() {
		w.most.Store(n)
	}
	stop := w.MemoryCache.Watch(name, changed)
	return sync.OnceFunc(func() { stop(); w.open.Add(-1) })
}

func TestDistinctKeysAreBounded(t *testing.T) {
	const keys, kept, workers = 100_000, 100, 8
	u := &counter{}
	store := &watching{MemoryCache: new(sessionlock.MemoryCache)}
	c, err := sessionlock.New(acme, u, sessionlock.WithCache(store), sessionlock.WithNearCache(kept, time.Minute))
	require.NoError(t, err)
	before := runtime.NumGoroutine()
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := w; i < keys; i += workers {
				if _, err := c.Session(t.Context(), fmt.Sprint(i)); !assert.NoError(t, err) {
					return
				}
			}
		})
	}
	wg.Wait()
	assert.EqualValues(t, keys, u.n.Load())
	assert.LessOrEqual(t, store.most.Load(), int64(kept+10*workers), "sessions held near, watches included")
	require.NoError(t, c.Close(context.WithoutCancel(t.Context())))
	assert.Zero(t, store.open.Load())
	require.Eventually(t, func() bool { return runtime.NumGoroutine() <= before+workers }, 10*time.Second, 10*time.Millisecond)
}

// counter logs everybody in at once.
type counter struct{ n atomic.Int64 }

func (c *counter) Login(_ context.Context, key string) (sessionlock.Session, error) {
	c.n.Add(1)
	return sessionlock.Session{Token: sessionlock.NewToken(key), Expiry: time.Now().Add(time.Hour)}, nil
}

// A near cache that is too small for the keys in use costs look-ups, and fails
// nobody.
func TestTinyNearCacheFailsNobody(t *testing.T) {
	for _, kept := range []int{0, 1, 2} {
		t.Run(fmt.Sprint(kept), func(t *testing.T) {
			u := &counter{}
			c, err := sessionlock.New(acme, u, sessionlock.WithCache(new(sessionlock.MemoryCache)), sessionlock.WithNearCache(kept, time.Minute))
			require.NoError(t, err)
			t.Cleanup(func() { _ = c.Close(context.WithoutCancel(t.Context())) })
			var wg sync.WaitGroup
			for w := range 16 {
				wg.Go(func() {
					for i := range 500 {
						key := fmt.Sprint((i*7 + w) % 40)
						s, err := c.Session(t.Context(), key)
						if !assert.NoError(t, err) || !assert.Equal(t, key, s.Token.Reveal()) {
							return
						}
					}
				})
			}
			wg.Wait()
			assert.EqualValues(t, 40, u.n.Load())
		})
	}
}

// evicting is a context that makes its near entry leave between the look-up and
// the attempt: asking it for a value fills the near cache with other keys.
type evicting struct {
	context.Context //nolint:containedctx // it is one
	fill            func()
}

func (e evicting) Value(key any) any {
	e.fill()
	return e.Context.Value(key)
}

func TestEvictionWhileACallBeginsFailsNobody(t *testing.T) {
	u := &counter{}
	c, err := sessionlock.New(acme, u, sessionlock.WithCache(new(sessionlock.MemoryCache)), sessionlock.WithNearCache(1, time.Minute))
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close(context.WithoutCancel(t.Context())) })
	fill := sync.OnceFunc(func() {
		for i := range 100 { // far more than are ever kept
			mustSession(t, c, fmt.Sprint(i))
		}
	})
	s, err := c.Session(evicting{t.Context(), fill}, "bob")
	require.NoError(t, err)
	assert.Equal(t, "bob", s.Token.Reveal())
}

func TestTenThousandCallersOfOneKeyCostOneLogin(t *testing.T) {
	const callers = 10_000
	u := &upstream{takes: 100 * time.Millisecond, life: time.Hour}
	c, s := watched(t, u)
	tokens := make([]string, callers)
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() {
			if s, err := c.Session(t.Context(), "bob"); assert.NoError(t, err) {
				tokens[i] = s.Token.Reveal()
			}
		})
	}
	wg.Wait()
	assert.Equal(t, 1, u.logins())
	assert.Equal(t, []string{"bob/1"}, slices.Compact(tokens))
	assert.Equal(t, 1, s.count(opLock))
}

// A client is printed by whoever prints the struct it is kept in, or by a panic.
func TestClientIsNeverPrinted(t *testing.T) {
	c, err := sessionlock.New(acme, &password{canary}, sessionlock.WithCache(new(sessionlock.MemoryCache)),
		sessionlock.WithKeySecret([]byte(canary+canary+canary)))
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close(context.WithoutCancel(t.Context())) })
	type stranger struct {
		c *sessionlock.Client
		h *sessionlock.Handle
	}
	for name, v := range map[string]any{"client": c, "handle": c.For(canary), "stranger": stranger{c, c.For(canary)}} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
			seen(t, fmt.Sprintf(verb, v), verb+" of a "+name)
		}
		var b bytes.Buffer
		slog.New(slog.NewJSONHandler(&b, nil)).Info("msg", slog.Any("v", v))
		slog.New(slog.NewTextHandler(&b, nil)).Info("msg", slog.Any("v", v))
		seen(t, b.String(), "a log line of a "+name)
	}
}

func TestNilResponseAndNilDoerAreInvalid(t *testing.T) {
	require.ErrorIs(t, sessionlock.LoginStatus(nil), sessionlock.ErrInvalid)
	_, err := sessionlock.Call(t.Context(), nil, func(context.Context, sessionlock.Session) (int, error) { return 1, nil })
	require.ErrorIs(t, err, sessionlock.ErrInvalid)
}

func TestLongestWaitIsCountedRight(t *testing.T) {
	_, err := sessionlock.New("up", sessionlocktest.Static(), sessionlock.WithCache(new(sessionlock.MemoryCache)),
		sessionlock.WithWait(100_000, 24*time.Hour))
	require.NoError(t, err)
	_, err = sessionlock.New("up", sessionlocktest.Static(), sessionlock.WithCache(new(sessionlock.MemoryCache)),
		sessionlock.WithWait(100_001, 24*time.Hour))
	require.ErrorIs(t, err, sessionlock.ErrInvalid)
}

func TestHandleOfNobodyIsInvalid(t *testing.T) {
	var h sessionlock.Handle
	_, err := h.Session(t.Context())
	require.ErrorIs(t, err, sessionlock.ErrInvalid)
	require.ErrorIs(t, h.Do(t.Context(), nothing), sessionlock.ErrInvalid)
}
