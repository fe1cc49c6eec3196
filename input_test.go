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
)

// canary must not be seen anywhere but where it was put.
const canary = "c4n4ry"

// seen fails when s shows the canary, as it is or as a verb may have encoded it.
func seen(t testing.TB, s, where string) {
	t.Helper()
	shown := strings.ToLower(s)
	for _, form := range []string{
		canary, fmt.Sprintf("%x", canary), fmt.Sprintf("% x", canary), strings.Trim(fmt.Sprint([]byte(canary)), "[]"),
		strings.ToLower(strings.TrimSuffix(fmt.Sprintf("%#v", []byte(canary)), "}"))[len("[]byte{"):],
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
	before := s.count()
	for _, key := range []string{"warm", "cold", ""} {
		for call, err := range everyCall(nil, c, key) { //nolint:staticcheck // that is the case
			refusedArgument(t, err, call)
		}
	}
	refusedArgument(t, c.Invalidate(nil, own), "Invalidate") //nolint:staticcheck // that is the case
	refusedArgument(t, c.Close(nil), "Close")                //nolint:staticcheck // that is the case
	assert.Equal(t, before, s.count())
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
			u := &upstream{}
			c, s := watched(t, u)
			own, err := c.Session(t.Context(), "warm")
			require.NoError(t, err)
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
			assert.Equal(t, before, s.count())
			assert.Equal(t, 1, u.logins())
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
	c := newClient(t, u, spyCache{s, store})
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
	before := s.count()
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
	assert.Equal(t, before, s.count())
	assert.Equal(t, 1, u.logins())
	assert.Equal(t, id, c.KeyID("bob"))
	assert.Equal(t, hits, c.Stats().NearHits)
	assert.Equal(t, "c4n4ry", canary) // the canary is lower case, or seen would not find it
}
