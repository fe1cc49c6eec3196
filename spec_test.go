package sessionlock_test

// The cases of testdata/spec-cases.tsv, in its order. Everything with time in
// it runs in a testing/synctest bubble, where clients that share a cache stand
// for a fleet and times are exact.

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock"
	"github.com/sessionlock/sessionlock/internal/redistest"
)

func TestBlankKeyIsRefused(t *testing.T) {
	refused := func(t *testing.T, keys ...string) {
		sp, u := &spy{}, &upstream{}
		c := newClient(t, u, spyCache{sp, new(sessionlock.MemoryCache)})
		for _, key := range keys {
			for call, err := range everyCall(t.Context(), c, key) {
				assert.ErrorIs(t, err, sessionlock.ErrInvalid, call)
			}
		}
		assert.Zero(t, sp.count())
		assert.Zero(t, u.logins())
	}
	t.Run("empty", func(t *testing.T) { refused(t, "") })
	t.Run("white space", func(t *testing.T) { refused(t, " ", "\t\n") })
	t.Run("before anything is touched", func(t *testing.T) {
		key := "somebody" + strings.Repeat("x", 256)
		sp, u, seen, lines := &spy{}, &upstream{}, &recorder{}, &logbook{}
		c := newClient(t, u, spyCache{sp, new(sessionlock.MemoryCache)}, sessionlock.WithObserver(seen),
			sessionlock.WithLogger(slog.New(slog.NewJSONHandler(lines, nil))))
		for call, err := range everyCall(t.Context(), c, key) {
			require.ErrorIs(t, err, sessionlock.ErrInvalid, call)
			assert.NotContains(t, err.Error(), "somebody", call)
		}
		assert.Zero(t, sp.count())
		assert.Zero(t, u.logins())
		assert.Empty(t, seen.all())
		assert.Empty(t, lines.String())
	})
}

func TestValidSessionNeedsNoLockAndNoLogin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, held, u := new(sessionlock.MemoryCache), new(memoryLocker), &upstream{life: time.Hour}
		a := newClient(t, u, store, sessionlock.WithLocker(held))
		require.Equal(t, "bob/1", tokenOf(t, a, "bob"))

		sp := &spy{}
		b := newClient(t, u, spyCache{sp, store}, sessionlock.WithLocker(spyLocker{sp, held}))
		assert.Equal(t, "bob/1", tokenOf(t, b, "bob"))
		assert.Zero(t, sp.count(opLock, opSwap))
		assert.Equal(t, 1, sp.count(opLoad))
		assert.Equal(t, "bob/1", tokenOf(t, b, "bob"))
		assert.Equal(t, 1, sp.count(), "the near copy needs no I/O")
		assert.Equal(t, 1, u.logins())
	})
}

func TestExpiredSessionIsReplacedByOneLogin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u := new(sessionlock.MemoryCache), &upstream{life: time.Hour}
		a, b := newClient(t, u, store), newClient(t, u, store)
		first, err := a.Session(t.Context(), "bob")
		require.NoError(t, err)
		time.Sleep(time.Hour)
		for _, c := range []*sessionlock.Client{a, b, a} {
			s, err := c.Session(t.Context(), "bob")
			require.NoError(t, err)
			assert.Equal(t, "bob/2", s.Token.Reveal())
			assert.Greater(t, s.Generation(), first.Generation())
		}
		assert.Equal(t, 2, u.logins())
	})
}

func TestWaitForAHeldLockIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, sp := &upstream{}, &spy{before: func(_ context.Context, op, _ string) error {
			if op == opLock {
				return sessionlock.ErrLocked
			}
			return nil
		}}
		c := newClient(t, u, new(sessionlock.MemoryCache), sessionlock.WithLocker(spyLocker{sp, new(memoryLocker)}), sessionlock.WithWait(40, 300*time.Millisecond))
		start := time.Now()
		_, err := c.Session(t.Context(), "bob")
		assert.Equal(t, 12*time.Second, time.Since(start))
		var timeout *sessionlock.LockError
		require.ErrorAs(t, err, &timeout)
		require.ErrorIs(t, err, sessionlock.ErrLockTimeout)
		require.ErrorIs(t, err, sessionlock.ErrLocked)
		assert.Equal(t, 40, timeout.Attempts)
		assert.Equal(t, 12*time.Second, timeout.Waited)
		assert.GreaterOrEqual(t, sp.count(opLock), 40)
		assert.LessOrEqual(t, sp.count(opLock), 41)
		assert.Zero(t, u.logins())
	})
}

func TestLeaderLogsInOnceAndUnlocksOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var order []string
		var mu sync.Mutex
		sp, u := &spy{}, &upstream{life: time.Hour}
		sp.after = func(_ context.Context, op, _ string) error {
			mu.Lock()
			defer mu.Unlock()
			order = append(order, op)
			return nil
		}
		c := newClient(t, u, spyCache{sp, new(sessionlock.MemoryCache)}, sessionlock.WithLocker(spyLocker{sp, new(memoryLocker)}))
		tokenOf(t, c, "bob")
		synctest.Wait() // for the unlock, which is off the caller's path
		assert.Equal(t, 1, u.logins())
		assert.Equal(t, opLoad, order[0])
		order = slices.DeleteFunc(order, func(op string) bool { return op == opLoad }) // the other is the near copy's, beside
		assert.Equal(t, []string{opLock, opSwap, opSwap, opUnlock}, order, "lock, begin, commit, unlock")
	})
}

func TestWaiterNeitherLogsInNorUnlocks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, held, sp, u := new(sessionlock.MemoryCache), new(memoryLocker), &spy{}, &upstream{life: time.Hour, takes: 2 * time.Second}
		other := &upstream{}
		a := newClient(t, u, store, sessionlock.WithLocker(held))
		b := newClient(t, other, store, sessionlock.WithLocker(spyLocker{sp, held}))
		leader := askFor(t.Context(), a, "bob")
		synctest.Wait()
		waiter := askFor(t.Context(), b, "bob")
		time.Sleep(time.Second)
		assert.Equal(t, 1, u.logins(), "the leader is inside")
		got, led := <-waiter, <-leader
		require.NoError(t, got.err)
		assert.Equal(t, "bob/1", got.session.Token.Reveal())
		assert.Equal(t, led.session.Generation(), got.session.Generation())
		synctest.Wait()
		assert.Zero(t, other.logins())
		assert.Zero(t, sp.count(opUnlock))
		assert.LessOrEqual(t, sp.count(opLock), 8, "once, and once per tick: the entry says as much as the lock")
	})
}

func TestNamesAreKeyedHashes(t *testing.T) {
	long := strings.Repeat("k", 256)
	names := func(t *testing.T, key string, opts ...sessionlock.Option) []string {
		sp := &spy{}
		c := newClient(t, &upstream{life: time.Hour}, spyCache{sp, new(sessionlock.MemoryCache)},
			append(opts, sessionlock.WithLocker(spyLocker{sp, new(memoryLocker)}))...)
		tokenOf(t, c, key)
		got := append(sp.seen(""), c.KeyID(key))
		require.Len(t, got, 3, "entry, lock, id")
		for _, name := range got {
			assert.LessOrEqual(t, len(name), 128)
			assert.Regexp(t, `^[!-~]+$`, name)
			if len(key) > 3 { // shorter ones are found in any hash
				assert.NotContains(t, name, key)
			}
		}
		return got
	}
	check := func(t *testing.T, others [][]sessionlock.Option, opts ...sessionlock.Option) {
		short, again, wide := names(t, "7", opts...), names(t, "7", opts...), names(t, long, opts...)
		names(t, "patient-4711", opts...)
		assert.Equal(t, short, again, "equal keys have equal names")
		for i := range short {
			assert.NotEqual(t, short[i], wide[i])
			assert.Len(t, wide[i], len(short[i]), "names say nothing of a key's length")
		}
		for _, other := range others {
			for i, name := range names(t, "7", other...) {
				assert.NotEqual(t, short[i], name, "another secret, another name")
			}
		}
	}
	one, two := []byte("0123456789abcdef"), []byte("fedcba9876543210")
	t.Run("with a secret", func(t *testing.T) {
		check(t, [][]sessionlock.Option{{}, {sessionlock.WithKeySecret(two)}}, sessionlock.WithKeySecret(one))
	})
	t.Run("without a secret", func(t *testing.T) { check(t, [][]sessionlock.Option{{sessionlock.WithKeySecret(one)}}) })
}

// jwtLogin logs in to an upstream that answers with a JWT in a header.
type jwtLogin struct {
	user, app string
	send      func(user, app string) http.Header
}

var errMissing = errors.New("user or app token missing")

func (l jwtLogin) Login(context.Context, string) (sessionlock.Session, error) {
	if l.user == "" || l.app == "" {
		return sessionlock.Session{}, sessionlock.RetryAfter(errMissing, 0) // nothing was sent, so nothing counts
	}
	token, ok := strings.CutPrefix(l.send(l.user, l.app).Get("Authorization"), "Bearer ")
	if !ok {
		return sessionlock.Session{}, sessionlock.Denied(errors.New("no bearer token in the answer"))
	}
	expiry, err := jwtExpiry(token)
	if err != nil {
		return sessionlock.Session{}, sessionlock.Denied(err)
	}
	return sessionlock.Session{Token: sessionlock.NewToken(token), Expiry: expiry}, nil
}

// jwtExpiry returns the exp claim, or an hour from now where there is none. The
// signature is the upstream's to check.
func jwtExpiry(token string) (time.Time, error) {
	var claims struct {
		Exp int64 `json:"exp"`
	}
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return time.Time{}, errors.New("not a JWT")
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err == nil {
		err = json.Unmarshal(payload, &claims)
	}
	if err != nil {
		return time.Time{}, fmt.Errorf("decode claims: %w", err)
	}
	if claims.Exp == 0 {
		return time.Now().Add(time.Hour), nil
	}
	return time.Unix(claims.Exp, 0), nil
}

func jwt(claims string) string {
	enc := base64.RawURLEncoding.EncodeToString
	return enc([]byte(`{"alg":"none"}`)) + "." + enc([]byte(claims)) + ".c2ln"
}

func bearer(value string) func(string, string) http.Header {
	return func(string, string) http.Header {
		h := http.Header{}
		if value != "" {
			h.Set("Authorization", value)
		}
		return h
	}
}

func ExampleAuthenticatorFunc_jwt() {
	login := func(context.Context, string) (sessionlock.Session, error) {
		token := jwt(`{"sub":"7","exp":4102444800}`) // from the upstream's answer
		expiry, err := jwtExpiry(token)
		if err != nil {
			return sessionlock.Session{}, sessionlock.Denied(err)
		}
		return sessionlock.Session{Token: sessionlock.NewToken(token), Expiry: expiry}, nil
	}
	ctx := context.Background()
	client, err := sessionlock.New("https://api.acme.test", sessionlock.AuthenticatorFunc(login),
		sessionlock.WithCache(new(sessionlock.MemoryCache)))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer func() { _ = client.Close(ctx) }()
	s, err := client.Session(ctx, "user-7")
	fmt.Println(s.Expiry.UTC(), err)
	// Output: 2100-01-01 00:00:00 +0000 UTC <nil>
}

func TestJWTLogin(t *testing.T) {
	open := func(t *testing.T, l jwtLogin) (*sessionlock.Client, *sessionlock.MemoryCache) {
		store := new(sessionlock.MemoryCache)
		c, err := sessionlock.New(acme, l, sessionlock.WithCache(store))
		require.NoError(t, err)
		t.Cleanup(func() { _ = c.Close(context.WithoutCancel(t.Context())) })
		return c, store
	}
	storedNothing := func(t *testing.T, c *sessionlock.Client) {
		st, err := c.Inspect(t.Context(), "user-7")
		require.NoError(t, err)
		assert.Zero(t, st.Generation)
	}
	t.Run("needs user and app token", func(t *testing.T) {
		sent := 0
		send := func(string, string) http.Header {
			sent++
			return bearer("Bearer "+jwt(`{}`))("", "")
		}
		for _, l := range []jwtLogin{{"", "app", send}, {"icn", "", send}} {
			c, _ := open(t, l)
			_, err := c.Session(t.Context(), "user-7")
			require.ErrorIs(t, err, errMissing)
			storedNothing(t, c)
		}
		assert.Zero(t, sent)
		c, _ := open(t, jwtLogin{"icn", "app", send})
		tokenOf(t, c, "user-7")
		assert.Equal(t, 1, sent)
	})
	t.Run("needs a bearer header", func(t *testing.T) {
		want := jwt(`{}`)
		c, _ := open(t, jwtLogin{"icn", "app", bearer("Bearer " + want)})
		assert.Equal(t, want, tokenOf(t, c, "user-7"))
		for _, header := range []string{"", want, "Basic " + want} {
			c, _ := open(t, jwtLogin{"icn", "app", bearer(header)})
			_, err := c.Session(t.Context(), "user-7")
			require.ErrorIs(t, err, sessionlock.ErrDenied, header)
			storedNothing(t, c)
		}
	})
	t.Run("expiry is the exp claim or an hour", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			exp := time.Now().Add(25 * time.Minute).Unix()
			c, _ := open(t, jwtLogin{"icn", "app", bearer("Bearer " + jwt(`{"exp":`+strconv.FormatInt(exp, 10)+`}`))})
			s, err := c.Session(t.Context(), "user-7")
			require.NoError(t, err)
			assert.Equal(t, exp, s.Expiry.Unix())

			c, _ = open(t, jwtLogin{"icn", "app", bearer("Bearer " + jwt(`{}`))})
			s, err = c.Session(t.Context(), "user-7")
			require.NoError(t, err)
			assert.Equal(t, time.Hour, time.Until(s.Expiry))
		})
	})
	t.Run("undecodable claims are denied", func(t *testing.T) {
		for _, token := range []string{"x", "x.y", "x.!.z", "x." + base64.RawURLEncoding.EncodeToString([]byte("{")) + ".z"} {
			c, _ := open(t, jwtLogin{"icn", "app", bearer("Bearer " + token)})
			_, err := c.Session(t.Context(), "user-7")
			require.ErrorIs(t, err, sessionlock.ErrDenied, token)
			storedNothing(t, c)
		}
	})
}

func TestLoginOfSeveralStepsIsSharedWhole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		patientOf := func(token string) string { return "patient of " + token }
		store, u := new(sessionlock.MemoryCache), &upstream{life: time.Hour}
		u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
			s := u.grant(key, n)
			return s.WithValue("patient", patientOf(s.Token.Reveal())).WithValue("app", "x"), nil
		}
		for range 3 {
			s, err := newClient(t, u, store).Session(t.Context(), "bob")
			require.NoError(t, err)
			assert.Equal(t, "bob/1", s.Token.Reveal())
			assert.Equal(t, "patient of bob/1", s.Value("patient"))
			assert.Equal(t, "x", s.Value("app"))
		}
		assert.Equal(t, 1, u.logins())
	})
}

func TestSessionReturnedWithAnErrorIsAnOrphan(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		notFound := errors.New("no patient found")
		store, u := new(sessionlock.MemoryCache), &upstream{life: time.Hour}
		u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
			if n == 1 {
				return u.grant(key, n).WithValue("csrf", "c"), notFound
			}
			return u.grant(key, n), nil
		}
		_, err := newClient(t, u, store).Session(t.Context(), "bob")
		var login *sessionlock.LoginError
		require.ErrorAs(t, err, &login)
		require.ErrorIs(t, err, notFound)
		assert.Equal(t, sessionlock.LoginUnknown, login.Class)
		time.Sleep(time.Minute)
		require.Equal(t, []string{"bob/1"}, u.ended())
		assert.Equal(t, "c", u.out[0].Value("csrf"), "what ends a session may need its values")
		assert.Equal(t, "bob/2", tokenOf(t, newClient(t, u, store), "bob"), "nothing was stored")
		time.Sleep(time.Minute)
		assert.Equal(t, []string{"bob/1"}, u.ended())
	})
}

func TestClientWithoutAStoreCannotBeBuilt(t *testing.T) {
	check := func(t *testing.T, opts ...sessionlock.Option) {
		_, err := sessionlock.New(acme, &upstream{}, opts...)
		require.ErrorIs(t, err, sessionlock.ErrInvalid)
		require.ErrorContains(t, err, "WithRedis")
		require.ErrorContains(t, err, "WithCache")
	}
	t.Run("alone", func(t *testing.T) { check(t) })
	t.Run("with a max age", func(t *testing.T) { check(t, sessionlock.WithMaxAge(time.Minute)) })
	t.Run("with a locker", func(t *testing.T) { check(t, sessionlock.WithLocker(new(memoryLocker))) })
}

func TestKeyIsAnyNonBlankString(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys := []string{"1", "01", "1 ", " 1", strings.Repeat("k", 256), "\xff", "\x00", "{a}b", "a:b", "a\nb", "ä"}
		u := &upstream{life: time.Hour}
		u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
			return u.grant(fmt.Sprintf("%x", key), n), nil
		}
		c := newClient(t, u, new(sessionlock.MemoryCache))
		ids := map[string]bool{}
		for range 2 {
			for i, key := range keys {
				s, err := c.Session(t.Context(), key)
				require.NoError(t, err, i)
				assert.Equal(t, fmt.Sprintf("%x/%d", key, i+1), s.Token.Reveal())
				assert.Equal(t, key, s.Key())
				ids[c.KeyID(key)] = true
			}
		}
		assert.Equal(t, len(keys), u.logins())
		assert.Len(t, ids, len(keys))
		_, err := c.Session(t.Context(), strings.Repeat("k", 257))
		require.ErrorIs(t, err, sessionlock.ErrInvalid)
	})
}

func TestExpiryDecidesWhetherASessionIsUsed(t *testing.T) {
	expiring := func(at func() time.Time) *upstream {
		u := &upstream{}
		u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
			s := u.grant(key, n)
			s.Expiry = at()
			return s, nil
		}
		return u
	}
	t.Run("none", func(t *testing.T) {
		c := newClient(t, &upstream{}, new(sessionlock.MemoryCache), sessionlock.WithMaxAge(0))
		_, err := c.Session(t.Context(), "bob")
		require.ErrorIs(t, err, sessionlock.ErrIncomplete)
	})
	t.Run("past", func(t *testing.T) {
		u := expiring(func() time.Time { return time.Date(1996, 1, 1, 0, 0, 0, 0, time.UTC) })
		_, err := newClient(t, u, new(sessionlock.MemoryCache)).Session(t.Context(), "bob")
		require.ErrorIs(t, err, sessionlock.ErrIncomplete)
	})
	t.Run("far future", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			far := time.Date(2099, 1, 1, 0, 0, 0, 0, time.UTC)
			u, store := expiring(func() time.Time { return far }), new(sessionlock.MemoryCache)
			tokenOf(t, newClient(t, u, store), "bob")
			for _, after := range []time.Duration{0, 23 * time.Hour, 59*time.Minute + 59*time.Second} {
				time.Sleep(after)
				s, err := newClient(t, u, store).Session(t.Context(), "bob")
				require.NoError(t, err)
				assert.Equal(t, "bob/1", s.Token.Reveal())
				assert.WithinDuration(t, far, s.Expiry, time.Microsecond)
			}
			time.Sleep(time.Second)
			assert.Equal(t, "bob/2", tokenOf(t, newClient(t, u, store), "bob"), "shared for a day at most")
		})
	})
}

func TestStoredSessionIsSharedUntilLogout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u := new(sessionlock.MemoryCache), &upstream{life: time.Hour}
		a, b, c := newClient(t, u, store), newClient(t, u, store), newClient(t, u, store)
		st, err := a.Inspect(t.Context(), "bob")
		require.NoError(t, err)
		assert.Zero(t, st)
		first, err := a.Session(t.Context(), "bob")
		require.NoError(t, err)
		assert.Equal(t, "bob/1", tokenOf(t, b, "bob"))
		st, err = b.Inspect(t.Context(), "bob")
		require.NoError(t, err)
		assert.Equal(t, first.Generation(), st.Generation)

		require.NoError(t, b.Logout(t.Context(), "bob"))
		assert.Equal(t, []string{"bob/1"}, u.ended())
		next, err := c.Session(t.Context(), "bob")
		require.NoError(t, err)
		assert.Equal(t, "bob/2", next.Token.Reveal())
		assert.Greater(t, next.Generation(), first.Generation())
	})
}

func TestStoredSessionDoesNotOutliveItsExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u := new(sessionlock.MemoryCache), &upstream{life: time.Minute}
		tokenOf(t, newClient(t, u, store), "bob")
		time.Sleep(45*time.Second - time.Millisecond) // the margin is a quarter of a minute
		assert.Equal(t, "bob/1", tokenOf(t, newClient(t, u, store), "bob"))
		time.Sleep(time.Millisecond)
		assert.Equal(t, "bob/2", tokenOf(t, newClient(t, u, store), "bob"))
	})
}

func TestExpiryMarginIsInclusive(t *testing.T) {
	for _, tc := range []struct {
		name         string
		life, margin time.Duration
		opts         []sessionlock.Option
	}{
		{"default", time.Hour, 20 * time.Second, nil},
		{"of five seconds", time.Hour, 5 * time.Second, []sessionlock.Option{sessionlock.WithExpiryMargin(5 * time.Second)}},
		{"a quarter of a short life", 40 * time.Second, 10 * time.Second, nil},
		{"none", time.Hour, 0, []sessionlock.Option{sessionlock.WithExpiryMargin(0)}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store, u := new(sessionlock.MemoryCache), &upstream{life: tc.life}
				near := newClient(t, u, store, tc.opts...)
				s, err := near.Session(t.Context(), "bob")
				require.NoError(t, err)
				time.Sleep(time.Until(s.Expiry) - tc.margin - time.Second)
				assert.Equal(t, "bob/1", tokenOf(t, near, "bob"))
				assert.Equal(t, "bob/1", tokenOf(t, newClient(t, u, store, tc.opts...), "bob"))
				time.Sleep(time.Second)
				synctest.Wait()
				assert.Equal(t, "bob/2", tokenOf(t, newClient(t, u, store, tc.opts...), "bob"))
				assert.Equal(t, "bob/2", tokenOf(t, near, "bob"))
				assert.Equal(t, 2, u.logins())
			})
		})
	}
}

func TestFailedLoginUnlocksAndIsNotRetried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cause := errors.New("mhv answered 500")
		sp, held, u := &spy{}, new(memoryLocker), &upstream{script: func(context.Context, string, int) (sessionlock.Session, error) {
			return sessionlock.Session{}, cause
		}}
		c := newClient(t, u, new(sessionlock.MemoryCache), sessionlock.WithLocker(spyLocker{sp, held}))
		_, err := c.Session(t.Context(), "bob")
		var login *sessionlock.LoginError
		require.ErrorIs(t, err, cause)
		require.ErrorAs(t, err, &login)
		assert.Equal(t, sessionlock.LoginUnknown, login.Class)
		assert.Equal(t, 1, login.Attempts)
		synctest.Wait()
		assert.Equal(t, 1, u.logins())
		require.Len(t, sp.seen(lockSuffix), 1)
		_, err = held.TryLock(t.Context(), sp.seen(lockSuffix)[0], time.Second)
		require.NoError(t, err)
	})
}

func TestPanickingLoginUnlocksAndReachesEveryCaller(t *testing.T) {
	check := func(t *testing.T, value any, login func()) {
		synctest.Test(t, func(t *testing.T) {
			held, u := new(memoryLocker), &upstream{life: time.Hour, takes: time.Second}
			u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
				if n == 1 {
					login()
				}
				return u.grant(key, n), nil
			}
			c := newClient(t, u, new(sessionlock.MemoryCache), sessionlock.WithLocker(held))
			var callers []<-chan answer
			for range 10 {
				callers = append(callers, askFor(t.Context(), c, "bob"))
			}
			for _, caller := range callers {
				err := (<-caller).err
				var failed *sessionlock.LoginError
				var panicked *sessionlock.PanicError
				require.ErrorAs(t, err, &failed)
				require.ErrorAs(t, err, &panicked)
				assert.Equal(t, sessionlock.LoginUnknown, failed.Class)
				assert.Equal(t, value, panicked.Value)
				assert.Contains(t, string(panicked.Stack), "goroutine")
				assert.NotContains(t, err.Error(), "canary")
				assert.NotContains(t, panicked.Error(), "canary")
			}
			synctest.Wait()
			assert.True(t, held.free())
			assert.Equal(t, 1, u.logins())
			time.Sleep(250 * time.Millisecond)
			assert.Equal(t, "bob/2", tokenOf(t, c, "bob"))
		})
	}
	t.Run("panic", func(t *testing.T) { check(t, "canary", func() { panic("canary") }) })
	t.Run("goexit", func(t *testing.T) { check(t, nil, runtime.Goexit) })
}

func TestTwoClientsShareOneLogin(t *testing.T) {
	const child = "SESSIONLOCK_TEST_REDIS"
	if addr := os.Getenv(child); addr != "" {
		printSharedToken(t, addr)
		return
	}
	t.Run("in one process", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			store, u := new(sessionlock.MemoryCache), &upstream{life: time.Hour, takes: time.Second}
			a, b := newClient(t, u, store), newClient(t, u, store)
			require.Equal(t, "bob/1", tokenOf(t, a, "bob"))
			require.Equal(t, "bob/1", tokenOf(t, b, "bob"))
			time.Sleep(time.Hour)
			var callers []<-chan answer
			for range 20 {
				callers = append(callers, askFor(t.Context(), a, "bob"), askFor(t.Context(), b, "bob"))
			}
			for _, caller := range callers {
				got := <-caller
				require.NoError(t, got.err)
				assert.Equal(t, "bob/2", got.session.Token.Reveal())
			}
			assert.Equal(t, 2, u.logins())
		})
	})
	t.Run("in two processes", func(t *testing.T) {
		s := redistest.Start(t)
		var children []*exec.Cmd
		var outs []*bytes.Buffer
		for range 2 {
			cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestTwoClientsShareOneLogin$", "-test.v=false", "-test.timeout=30s")
			cmd.Env = append(os.Environ(), child+"="+s.Addr())
			out := new(bytes.Buffer)
			cmd.Stdout, cmd.Stderr = out, out
			require.NoError(t, cmd.Start())
			children, outs = append(children, cmd), append(outs, out)
		}
		var tokens []string
		for i, cmd := range children {
			require.NoError(t, cmd.Wait(), outs[i])
			for lines := bufio.NewScanner(outs[i]); lines.Scan(); {
				if sum, ok := strings.CutPrefix(lines.Text(), "token "); ok {
					tokens = append(tokens, sum)
				}
			}
		}
		require.Len(t, tokens, 2, outs)
		assert.Equal(t, tokens[0], tokens[1])
		n, err := s.Client().Get(t.Context(), "logins").Int()
		require.NoError(t, err)
		assert.Equal(t, 1, n)
	})
}

// printSharedToken is what one of two processes does: it waits until the other
// has come, asks for the session, and prints a hash of its token.
func printSharedToken(t *testing.T, addr string) {
	rdb := redis.NewClient(&redis.Options{Addr: addr})
	defer func() { _ = rdb.Close() }()
	login := func(ctx context.Context, _ string) (sessionlock.Session, error) {
		n, err := rdb.Incr(ctx, "logins").Result()
		time.Sleep(200 * time.Millisecond)
		return sessionlock.Session{
			Token:  sessionlock.NewToken(fmt.Sprintf("%d of process %d", n, os.Getpid())),
			Expiry: time.Now().Add(time.Hour),
		}, err
	}
	c, err := sessionlock.New(acme, sessionlock.AuthenticatorFunc(login), sessionlock.WithRedis(rdb))
	require.NoError(t, err)
	require.NoError(t, rdb.Incr(t.Context(), "here").Err())
	require.Eventually(t, func() bool {
		n, err := rdb.Get(t.Context(), "here").Int()
		return err == nil && n == 2
	}, 20*time.Second, time.Millisecond)
	s, err := c.Session(t.Context(), "bob")
	require.NoError(t, err)
	fmt.Printf("token %x\n", sha256.Sum256([]byte(s.Token.Reveal())))
	require.NoError(t, c.Close(t.Context()))
}

func TestManyCallersShareOneAttempt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sp, u := &spy{}, &upstream{life: time.Hour, takes: time.Second}
		c := newClient(t, u, new(sessionlock.MemoryCache), sessionlock.WithLocker(spyLocker{sp, new(memoryLocker)}))
		var callers []<-chan answer
		for range 100 {
			callers = append(callers, askFor(t.Context(), c, "bob"))
		}
		synctest.Wait()
		assert.Equal(t, 100, c.Stats().Waiters)
		for _, caller := range callers {
			got := <-caller
			require.NoError(t, got.err)
			assert.Equal(t, "bob/1", got.session.Token.Reveal())
		}
		assert.Equal(t, 1, u.logins())
		assert.Equal(t, 1, sp.count(opLock))
		assert.Zero(t, c.Stats().Waiters)
	})
}

func TestDifferentKeysDoNotWaitForEachOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := &upstream{life: time.Hour}
		u.script = func(ctx context.Context, key string, n int) (sessionlock.Session, error) {
			if key == "a" {
				<-ctx.Done()
				return sessionlock.Session{}, ctx.Err()
			}
			return u.grant(key, n), nil
		}
		c := newClient(t, u, new(sessionlock.MemoryCache))
		stuck := askFor(t.Context(), c, "a")
		synctest.Wait()
		start := time.Now()
		assert.Equal(t, "b/2", tokenOf(t, c, "b"))
		assert.Zero(t, time.Since(start))
		require.ErrorIs(t, (<-stuck).err, context.DeadlineExceeded)
	})
}

func TestSessionStoredWhileLockingIsAdopted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, held, u, ours := new(sessionlock.MemoryCache), new(memoryLocker), &upstream{life: time.Hour}, &upstream{}
		peer := newClient(t, u, store, sessionlock.WithLocker(held))
		sp := &spy{before: func(ctx context.Context, op, _ string) error {
			if op == opLock {
				_, err := peer.Session(ctx, "bob")
				assert.NoError(t, err)
				synctest.Wait() // for its unlock
			}
			return nil
		}}
		c := newClient(t, ours, store, sessionlock.WithLocker(spyLocker{sp, held}))
		assert.Equal(t, "bob/1", tokenOf(t, c, "bob"))
		synctest.Wait()
		assert.Equal(t, 1, sp.count(opLock))
		assert.Equal(t, 1, sp.count(opUnlock), "the lock was granted and is given back")
		assert.True(t, held.free())
		assert.Zero(t, ours.logins())
	})
}

// cut is a store that one process can no longer reach.
type cut struct{ off atomic.Bool }

func (c *cut) before(context.Context, string, string) error {
	if c.off.Load() {
		return errStoreDown
	}
	return nil
}

// cutHook does the same to a Redis client.
type cutHook struct{ *cut }

func (h cutHook) DialHook(next redis.DialHook) redis.DialHook { return next }

func (h cutHook) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		if err := h.before(ctx, "", ""); err != nil {
			return err
		}
		return next(ctx, cmd)
	}
}

func (h cutHook) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

func TestLateUnlockSparesTheNextHolder(t *testing.T) {
	// check has a lose its lock inside its login, b take it, and a unlock.
	check := func(t *testing.T, gone *cut, lockValue func() string, a, b sessionlock.Option) {
		first := &upstream{life: time.Hour, takes: 5 * time.Second}
		first.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
			gone.off.Store(false)
			return first.grant(key, n), nil
		}
		second := &upstream{life: time.Hour, takes: 5 * time.Second}
		la, err := sessionlock.New(acme, first, a)
		require.NoError(t, err)
		lb, err := sessionlock.New(acme, second, b)
		require.NoError(t, err)
		leader := askFor(t.Context(), la, "bob")
		synctest.Wait()
		gone.off.Store(true)
		time.Sleep(3100 * time.Millisecond) // the lock has run out
		next := askFor(t.Context(), lb, "bob")
		synctest.Wait()
		require.Equal(t, 1, second.logins())
		value := lockValue()
		time.Sleep(2 * time.Second) // the first login ends at 5 s, and a unlocks
		synctest.Wait()
		held := lockValue()
		assert.NotEmpty(t, held)
		if value != "" && gone != nil {
			assert.Equal(t, value[:1], held[:1])
		}
		third := &upstream{}
		lc, err := sessionlock.New(acme, third, b)
		require.NoError(t, err)
		last := askFor(t.Context(), lc, "bob")
		for _, caller := range []<-chan answer{leader, next, last} {
			got := <-caller
			require.NoError(t, got.err)
			assert.Equal(t, "bob/1", got.session.Token.Reveal())
		}
		assert.Zero(t, third.logins())
		for _, c := range []*sessionlock.Client{la, lb, lc} {
			require.NoError(t, c.Close(t.Context()))
		}
	}
	t.Run("cache", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			store, gone, sp := new(sessionlock.MemoryCache), &cut{}, &spy{}
			sp.before = gone.before
			check(t, gone, func() string {
				v, err := store.Load(t.Context(), sp.seen(lockSuffix)[0])
				require.NoError(t, err)
				return string(v)
			}, sessionlock.WithCache(spyCache{sp, store}), sessionlock.WithCache(store))
		})
	})
	t.Run("redis", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			m, client := bubbleRedis(t)
			gone := &cut{}
			rdb := client()
			rdb.AddHook(cutHook{gone})
			check(t, gone, func() string {
				for _, name := range m.Keys() {
					if strings.HasSuffix(name, lockSuffix) {
						v, err := m.Get(name)
						require.NoError(t, err)
						return v
					}
				}
				return ""
			}, sessionlock.WithRedis(rdb), sessionlock.WithRedis(client()))
		})
	})
}

func TestOvertakenLoginAdoptsTheNewerSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, gone, seen := new(sessionlock.MemoryCache), &cut{}, &recorder{}
		u := &upstream{life: time.Hour}
		u.script = func(ctx context.Context, key string, n int) (sessionlock.Session, error) {
			if n == 1 {
				gone.off.Store(true)
				_ = pauseFor(ctx, 5*time.Second)
				gone.off.Store(false)
			}
			return u.grant(key, n), nil
		}
		a := newClient(t, u, spyCache{&spy{before: gone.before}, store}, sessionlock.WithObserver(seen))
		b := newClient(t, u, store)
		slow := askFor(t.Context(), a, "bob")
		time.Sleep(3100 * time.Millisecond)
		newer, err := b.Session(t.Context(), "bob")
		require.NoError(t, err)
		require.Equal(t, "bob/2", newer.Token.Reveal())
		got := <-slow
		require.NoError(t, got.err)
		assert.Equal(t, "bob/2", got.session.Token.Reveal())
		assert.Equal(t, newer.Generation(), got.session.Generation())
		assert.Equal(t, "bob/2", tokenOf(t, newClient(t, u, store), "bob"), "the store holds the newer")
		time.Sleep(time.Minute)
		assert.Equal(t, []string{"bob/1"}, u.ended())
		assert.Equal(t, 2, u.logins())
		assert.Contains(t, seen.kinds(), sessionlock.EventStale)
	})
}

func TestWaiterTakesOverFromACrashedLeader(t *testing.T) {
	for _, tc := range []struct {
		name string
		face func(sessionlock.Cache) sessionlock.Cache
	}{
		{"with push", func(c sessionlock.Cache) sessionlock.Cache { return c }},
		{"without", func(c sessionlock.Cache) sessionlock.Cache { return polled{c} }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store, dead, u, next := new(sessionlock.MemoryCache), &cut{}, &upstream{}, &upstream{life: time.Hour}
				u.script = func(ctx context.Context, _ string, _ int) (sessionlock.Session, error) {
					dead.off.Store(true)
					<-ctx.Done()
					return sessionlock.Session{}, ctx.Err()
				}
				start := time.Now()
				crashed := askFor(t.Context(), newClient(t, u, spyCache{&spy{before: dead.before}, store}), "bob")
				time.Sleep(100 * time.Millisecond)
				b := newClient(t, next, tc.face(store))
				assert.Equal(t, "bob/1", tokenOf(t, b, "bob"))
				took := next.starts(start)
				require.Len(t, took, 1)
				assert.GreaterOrEqual(t, took[0], 3*time.Second)
				assert.LessOrEqual(t, took[0], 3300*time.Millisecond)
				st, err := b.Inspect(t.Context(), "bob")
				require.NoError(t, err)
				assert.Equal(t, 1, st.Attempts, "the crashed one is counted")
				require.Error(t, (<-crashed).err)
			})
		})
	}
}

func TestCancelledWaiterLeavesAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, held, sp, u := new(sessionlock.MemoryCache), new(memoryLocker), &spy{}, &upstream{life: time.Hour, takes: 5 * time.Second}
		leader := askFor(t.Context(), newClient(t, u, store, sessionlock.WithLocker(held)), "bob")
		synctest.Wait()
		b := newClient(t, u, spyCache{sp, store}, sessionlock.WithLocker(spyLocker{sp, held}))
		gone := errors.New("user went away")
		ctx, cancel := context.WithCancelCause(t.Context())
		waiter := askFor(ctx, b, "bob")
		time.Sleep(time.Second)
		cancel(gone)
		left := time.Now()
		got := <-waiter
		assert.Equal(t, left, got.at)
		require.ErrorIs(t, got.err, context.Canceled)
		require.ErrorIs(t, got.err, gone)
		synctest.Wait()
		before := sp.count()
		require.NoError(t, (<-leader).err)
		time.Sleep(time.Minute)
		assert.Equal(t, before, sp.count(), "no I/O for nobody")
		assert.True(t, held.free())

		over, cancelled := context.WithCancel(t.Context())
		cancelled()
		for call, err := range everyCall(over, b, "bob") {
			require.ErrorIs(t, err, context.Canceled, call)
		}
		assert.Equal(t, before, sp.count(), "nor for a context that is over")
		assert.Equal(t, 1, u.logins())
	})
}

func TestCancelDuringLoginStillStoresAndUnlocks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, held, u := new(sessionlock.MemoryCache), new(memoryLocker), &upstream{life: time.Hour, takes: 5 * time.Second}
		c := newClient(t, u, store, sessionlock.WithLocker(held))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start := time.Now()
		_, err := c.Session(ctx, "bob")
		require.ErrorIs(t, err, context.DeadlineExceeded)
		assert.Equal(t, time.Second, time.Since(start))
		time.Sleep(4 * time.Second)
		synctest.Wait()
		assert.True(t, held.free())
		assert.Equal(t, "bob/1", tokenOf(t, newClient(t, u, store, sessionlock.WithLocker(held)), "bob"))
		assert.Equal(t, "bob/1", tokenOf(t, c, "bob"))
		assert.Equal(t, 1, u.logins())
	})
}

func TestDamagedEntryIsAMiss(t *testing.T) {
	flip := func(b []byte, at int) []byte {
		out := bytes.Clone(b)
		out[at] ^= 0x40
		return out
	}
	for name, damage := range map[string]func(bob, eve []byte) []byte{
		"truncated":        func(bob, _ []byte) []byte { return bob[:len(bob)-5] },
		"one byte":         func([]byte, []byte) []byte { return []byte{1} },
		"longer":           func(bob, _ []byte) []byte { return append(bytes.Clone(bob), 'x') },
		"other version":    func(bob, _ []byte) []byte { return append([]byte{99}, bob[1:]...) },
		"huge":             func([]byte, []byte) []byte { return bytes.Repeat([]byte("x"), 64<<10) },
		"flipped in front": func(bob, _ []byte) []byte { return flip(bob, 0) },
		"record flipped":   func(bob, _ []byte) []byte { return flip(bob, bytes.LastIndex(bob, []byte("SL"))) },
		"another key's":    func(_, eve []byte) []byte { return eve },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store, names, u := new(sessionlock.MemoryCache), &spy{}, &upstream{life: time.Hour}
				a := newClient(t, u, spyCache{names, store}, sessionlock.WithLocker(new(memoryLocker)), sessionlock.WithNearCache(10, time.Minute))
				tokenOf(t, a, "eve")
				eve := names.seen(entrySuffix)
				tokenOf(t, a, "bob")
				bob := slices.DeleteFunc(names.seen(entrySuffix), func(n string) bool { return n == eve[0] })
				of, err := store.Load(t.Context(), bob[0])
				require.NoError(t, err)
				other, err := store.Load(t.Context(), eve[0])
				require.NoError(t, err)
				require.NoError(t, a.Close(t.Context()))
				junk := damage(of, other)
				_, err = store.CompareAndSwap(t.Context(), bob[0], of, junk, time.Hour)
				require.NoError(t, err)

				sp := &spy{}
				b := newClient(t, u, spyCache{sp, store}, sessionlock.WithLocker(spyLocker{sp, new(memoryLocker)}))
				assert.Equal(t, "bob/3", tokenOf(t, b, "bob"))
				assert.Equal(t, 3, u.logins())
				assert.Equal(t, 1, sp.count(opLock))
				require.NotEmpty(t, sp.swapped())
				assert.Equal(t, junk, sp.swapped()[0].old, "replaced by comparison")
				assert.Equal(t, "bob/3", tokenOf(t, newClient(t, u, store), "bob"))
			})
		})
	}
}

func TestAbsentEntryIsAMiss(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sp, u := &spy{}, &upstream{life: time.Hour}
		c := newClient(t, u, spyCache{sp, new(sessionlock.MemoryCache)})
		assert.Equal(t, "bob/1", tokenOf(t, c, "bob"))
		swaps := slices.DeleteFunc(sp.swapped(), func(s swapped) bool { return !isEntry(s.name) })
		require.NotEmpty(t, swaps)
		assert.Nil(t, swaps[0].old, "absent is nil, not empty")
		assert.Equal(t, 1, u.logins())
	})
}

func TestUnreadableStoreNeverLogsIn(t *testing.T) {
	for _, broken := range []string{opLoad, opSwap, opLock} {
		t.Run(broken, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var down atomic.Bool
				sp, u := &spy{}, &upstream{life: time.Hour}
				sp.before = func(_ context.Context, op, _ string) error {
					if op == broken && down.Load() {
						return errStoreDown
					}
					return nil
				}
				c := newClient(t, u, spyCache{sp, new(sessionlock.MemoryCache)}, sessionlock.WithLocker(spyLocker{sp, new(memoryLocker)}))
				require.Equal(t, "bob/1", tokenOf(t, c, "bob"))
				down.Store(true)
				_, err := c.Session(t.Context(), "eve")
				assertUnavailable(t, err)
				require.ErrorIs(t, err, errStoreDown)
				assert.Equal(t, 1, u.logins())
				assert.Equal(t, "bob/1", tokenOf(t, c, "bob"), "the near copy is served")
				down.Store(false)
				assert.Equal(t, "eve/2", tokenOf(t, c, "eve"), "and all is well again by itself")
			})
		})
	}
}

func TestUnusableLoginIsNotStored(t *testing.T) {
	for name, bad := range map[string]sessionlock.Session{
		"empty token":        {},
		"blank token":        {Token: sessionlock.NewToken("  ")},
		"already expired":    {Token: sessionlock.NewToken("t"), Expiry: time.Date(1999, 1, 1, 0, 0, 0, 0, time.UTC)},
		"control characters": {Token: sessionlock.NewToken("a\r\nX-Admin: 1")},
		"too long":           {Token: sessionlock.NewToken(strings.Repeat("t", 16<<10+1))},
		"value too long":     sessionlock.Session{Token: sessionlock.NewToken("t")}.WithValue("v", strings.Repeat("v", 1024)),
		"incomplete":         {Token: sessionlock.NewToken("no scope")},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store, u := new(sessionlock.MemoryCache), &upstream{life: time.Hour}
				u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
					if n == 1 {
						return bad, nil
					}
					return u.grant(key, n), nil
				}
				complete := sessionlock.WithComplete(func(s sessionlock.Session) bool { return s.Token.Reveal() != "no scope" })
				_, err := newClient(t, u, store, complete).Session(t.Context(), "bob")
				var login *sessionlock.LoginError
				require.ErrorIs(t, err, sessionlock.ErrIncomplete)
				require.ErrorAs(t, err, &login)
				other := newClient(t, u, store, complete)
				st, err := other.Inspect(t.Context(), "bob")
				require.NoError(t, err)
				assert.Zero(t, st.Generation)
				time.Sleep(time.Second)
				assert.Equal(t, "bob/2", tokenOf(t, other, "bob"))
			})
		})
	}
}

func TestClientsSharingALockScopeLogInOneAtATime(t *testing.T) {
	for _, tc := range []struct {
		name   string
		rx, sm string // upstreams
		keys   [2]string
		opts   []sessionlock.Option
	}{
		{"one scope", "rx", "sm", [2]string{"bob", "bob"}, []sessionlock.Option{sessionlock.WithLockScope("mhv")}},
		{"one lock key", "rx", "rx", [2]string{"bob", "bob's other id"}, []sessionlock.Option{sessionlock.WithLockKey(func(string) string { return "bob" })}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store, u := new(sessionlock.MemoryCache), &upstream{life: time.Hour, takes: 2 * time.Second}
				open := func(name string) *sessionlock.Client {
					c, err := sessionlock.New(name, u, append(tc.opts, sessionlock.WithCache(store))...)
					require.NoError(t, err)
					t.Cleanup(func() { _ = c.Close(context.WithoutCancel(t.Context())) })
					return c
				}
				rx, sm := open(tc.rx), open(tc.sm)
				first, second := askFor(t.Context(), rx, tc.keys[0]), askFor(t.Context(), sm, tc.keys[1])
				a, b := <-first, <-second
				require.NoError(t, a.err)
				require.NoError(t, b.err)
				assert.NotEqual(t, a.session.Token.Reveal(), b.session.Token.Reveal())
				assert.Equal(t, 2, u.logins())
				assert.Equal(t, 1, u.atOnce())
			})
		})
	}
}

// commands is a hook that remembers what was sent for a lock.
type commands struct {
	cutHook
	mu   sync.Mutex
	sent []string
}

func (h *commands) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		if strings.Contains(fmt.Sprint(cmd.Args()...), lockSuffix) {
			h.mu.Lock()
			h.sent = append(h.sent, strings.ToLower(cmd.Name()))
			h.mu.Unlock()
		}
		return next(ctx, cmd)
	}
}

func TestLockIsAFreshNonceSetInOneStep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, client := bubbleRedis(t)
		lock := func() string {
			for _, name := range m.Keys() {
				if strings.HasSuffix(name, lockSuffix) {
					return name
				}
			}
			return ""
		}
		var values []string
		sent := &commands{}
		rdb := client()
		rdb.AddHook(sent)
		u := &upstream{life: time.Minute}
		u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
			name := lock()
			v, err := m.Get(name)
			assert.NoError(t, err)
			assert.Greater(t, m.TTL(name), 2*time.Second)
			assert.LessOrEqual(t, m.TTL(name), 3*time.Second)
			values = append(values, v)
			if n == 2 {
				assert.NoError(t, m.Set(name, "somebody else's"))
			}
			sent.mu.Lock()
			assert.NotContains(t, sent.sent, "expire")
			assert.NotContains(t, sent.sent, "pexpire")
			assert.Subset(t, []string{"eval", "evalsha", "set"}, sent.sent)
			assert.LessOrEqual(t, len(sent.sent), 2*n+1, "one step each, and the text of its script once")
			sent.mu.Unlock()
			return u.grant(key, n), nil
		}
		c, err := sessionlock.New(acme, u, sessionlock.WithRedis(rdb))
		require.NoError(t, err)
		tokenOf(t, c, "bob")
		time.Sleep(time.Minute)
		require.Empty(t, lock(), "unlocked")
		tokenOf(t, c, "bob")
		require.NoError(t, c.Close(t.Context()))
		require.Len(t, values, 2)
		assert.NotEqual(t, values[0], values[1])
		v, err := m.Get(lock())
		require.NoError(t, err)
		assert.Equal(t, "somebody else's", v)
	})
}

func TestWaitMustOutlastLockAndLogin(t *testing.T) {
	build := func(opts ...sessionlock.Option) error {
		_, err := sessionlock.New(acme, &upstream{}, append(opts, sessionlock.WithCache(new(sessionlock.MemoryCache)))...)
		return err
	}
	lock, login := sessionlock.WithLockTTL(4*time.Second), sessionlock.WithLoginTimeout(2*time.Second)
	err := build(lock, login, sessionlock.WithWait(4, time.Second))
	require.ErrorIs(t, err, sessionlock.ErrInvalid)
	require.ErrorContains(t, err, "lock TTL")
	assert.NotContains(t, err.Error(), "login timeout")
	err = build(sessionlock.WithWait(9, time.Second))
	require.ErrorIs(t, err, sessionlock.ErrInvalid)
	require.ErrorContains(t, err, "login timeout")
	assert.NotContains(t, err.Error(), "lock TTL")
	err = build(sessionlock.WithWait(1, time.Second))
	require.ErrorContains(t, err, "lock TTL")
	require.ErrorContains(t, err, "login timeout")
	require.NoError(t, build(sessionlock.WithWait(10, time.Second)))
	require.NoError(t, build(lock, login, sessionlock.WithWait(41, 100*time.Millisecond)))
}

func TestColdStartLogsInOnceFor14Minutes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u := new(sessionlock.MemoryCache), &upstream{}
		tokenOf(t, newClient(t, u, store), "bob")
		time.Sleep(840*time.Second - time.Millisecond)
		assert.Equal(t, "bob/1", tokenOf(t, newClient(t, u, store), "bob"))
		time.Sleep(time.Millisecond)
		assert.Equal(t, "bob/2", tokenOf(t, newClient(t, u, store), "bob"))
	})
}

func TestWarmStartNeedsNoLogin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u := new(sessionlock.MemoryCache), &upstream{life: time.Hour}
		tokenOf(t, newClient(t, u, store), "bob")
		calls := 0
		err := newClient(t, u, store).Do(t.Context(), "bob", func(_ context.Context, s sessionlock.Session) error {
			for range 3 {
				calls++
				assert.Equal(t, "bob/1", s.Token.Reveal())
			}
			return nil
		})
		require.NoError(t, err)
		assert.Equal(t, 3, calls)
		assert.Equal(t, 1, u.logins())
		assert.Empty(t, u.ended())
	})
}

// upstreamError is that of a client library which knows nothing of ours.
type upstreamError struct{ Code int }

func (e *upstreamError) Error() string { return "error " + strconv.Itoa(e.Code) }

func byCode(err error) sessionlock.Verdict {
	var e *upstreamError
	if !errors.As(err, &e) {
		return sessionlock.NotRejected
	}
	switch e.Code {
	case 952:
		return sessionlock.RejectedBefore
	case 112:
		return sessionlock.RejectedDuring
	}
	return sessionlock.NotRejected
}

func TestRejectionIsRepairedOnce(t *testing.T) {
	check := func(t *testing.T, code int, around func(context.Context) context.Context) {
		synctest.Test(t, func(t *testing.T) {
			store, u := new(sessionlock.MemoryCache), &upstream{life: time.Hour}
			c := newClient(t, u, store, sessionlock.WithRejected(byCode))
			tokenOf(t, c, "bob")
			var saw []string
			first := &upstreamError{code}
			err := c.Do(around(t.Context()), "bob", func(ctx context.Context, s sessionlock.Session) error {
				saw = append(saw, s.Token.Reveal())
				if len(saw) == 1 {
					assert.NoError(t, sessionlock.RejectionFromContext(ctx))
					return fmt.Errorf("find records: %w", first)
				}
				assert.ErrorIs(t, sessionlock.RejectionFromContext(ctx), first)
				return nil
			})
			require.NoError(t, err)
			assert.Equal(t, []string{"bob/1", "bob/2"}, saw)
			assert.Equal(t, 2, u.logins())
			assert.Equal(t, "bob/2", tokenOf(t, newClient(t, u, store), "bob"))
			assert.Empty(t, u.ended(), "a rejected session is not logged out")
		})
	}
	t.Run("invalid token", func(t *testing.T) { check(t, 952, func(ctx context.Context) context.Context { return ctx }) })
	t.Run("window missing", func(t *testing.T) { check(t, 112, sessionlock.IdempotentContext) })
}

func TestOtherErrorsAreReturnedAsTheyAre(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := &upstream{life: time.Hour}
		c := newClient(t, u, new(sessionlock.MemoryCache), sessionlock.WithRejected(byCode))
		for _, want := range []error{&upstreamError{401}, errors.New("other"), nil} {
			runs := 0
			err := c.Do(t.Context(), "bob", func(context.Context, sessionlock.Session) error {
				runs++
				return want
			})
			assert.Equal(t, want, err)
			assert.Equal(t, 1, runs)
		}
		assert.Equal(t, 1, u.logins())
	})
}

func TestSecondRejectionIsReturnedWithTheFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := &upstream{life: time.Hour}
		c := newClient(t, u, new(sessionlock.MemoryCache))
		tokenOf(t, c, "bob")
		failures := []error{errors.New("first"), errors.New("second")}
		runs := 0
		err := c.Do(t.Context(), "bob", func(context.Context, sessionlock.Session) error {
			runs++
			return sessionlock.Reject(failures[runs-1])
		})
		var re *sessionlock.ReauthError
		require.ErrorAs(t, err, &re)
		require.ErrorIs(t, err, sessionlock.ErrRejected)
		require.ErrorIs(t, re.First, failures[0])
		require.ErrorIs(t, re.Second, failures[1])
		require.ErrorIs(t, err, failures[0])
		require.ErrorIs(t, err, failures[1])
		assert.Equal(t, 2, runs)
		assert.Equal(t, 2, u.logins())
	})
}

func TestFailedRenewalIsReturnedWithTheRejection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		wrong := errors.New("password changed")
		u := &upstream{life: time.Hour}
		u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
			if n == 2 {
				return sessionlock.Session{}, sessionlock.Denied(wrong)
			}
			return u.grant(key, n), nil
		}
		c := newClient(t, u, new(sessionlock.MemoryCache))
		tokenOf(t, c, "bob")
		runs := 0
		err := c.Do(t.Context(), "bob", func(context.Context, sessionlock.Session) error {
			runs++
			return sessionlock.Reject(errDead)
		})
		var re *sessionlock.ReauthError
		require.ErrorAs(t, err, &re)
		require.ErrorIs(t, err, sessionlock.ErrRejected)
		require.ErrorIs(t, err, sessionlock.ErrDenied)
		require.ErrorIs(t, re.First, errDead)
		require.ErrorIs(t, re.Second, wrong)
		assert.Equal(t, 1, runs)
		assert.Equal(t, 2, u.logins())
	})
}

func TestRetryOffSurfacesTheRejection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := &upstream{life: time.Hour}
		off := func(error) sessionlock.Verdict { return sessionlock.NotRejected }
		for _, opts := range [][]sessionlock.Option{nil, {sessionlock.WithRejected(off)}} {
			c := newClient(t, u, new(sessionlock.MemoryCache), opts...)
			tokenOf(t, c, "bob")
			before, runs, want := u.logins(), 0, &upstreamError{952}
			err := c.Do(t.Context(), "bob", func(context.Context, sessionlock.Session) error {
				runs++
				return want
			})
			assert.Equal(t, error(want), err)
			assert.Equal(t, 1, runs)
			assert.Equal(t, before, u.logins())
		}
	})
}

func TestRepairNeedsNoSharedCache(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := &upstream{life: time.Hour}
		request := func(dead string) []string {
			var saw []string
			c := newClient(t, u, new(sessionlock.MemoryCache)) // nobody else's: as good as no cache
			err := c.Do(t.Context(), "bob", func(_ context.Context, s sessionlock.Session) error {
				saw = append(saw, s.Token.Reveal())
				return rejectOld(dead)(nil, s)
			})
			require.NoError(t, err)
			return saw
		}
		assert.Equal(t, []string{"bob/1", "bob/2"}, request("bob/1"))
		assert.Equal(t, []string{"bob/3"}, request(""), "the next request logs in itself")
		assert.Equal(t, 3, u.logins())
	})
}

func TestFailedLogoutStillForgetsTheSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, seen := new(sessionlock.MemoryCache), &recorder{}
		u := &upstream{life: time.Hour, refuse: errors.New("logout answered 500")}
		a, b := newClient(t, u, store, sessionlock.WithObserver(seen)), newClient(t, u, store)
		tokenOf(t, a, "bob")
		tokenOf(t, b, "bob")
		err := a.Logout(t.Context(), "bob")
		require.ErrorIs(t, err, u.refuse)
		assert.NotContains(t, err.Error(), "500", "its text is the upstream's")
		assert.Equal(t, []string{"bob/1"}, u.ended())
		synctest.Wait()
		assert.Equal(t, "bob/2", tokenOf(t, b, "bob"))
		assert.Equal(t, "bob/2", tokenOf(t, a, "bob"))
		assert.Equal(t, []string{"bob/1"}, u.ended(), "called once")
		assert.Equal(t, []string{"login_ok", "ended", "shared"}, seen.kinds())
	})
}

func TestLogoutWithoutASessionCallsNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sp, u := &spy{}, &upstream{life: time.Hour}
		c := newClient(t, u, spyCache{sp, new(sessionlock.MemoryCache)})
		require.NoError(t, c.Logout(t.Context(), "bob"))
		assert.Zero(t, sp.count(opSwap))
		tokenOf(t, c, "bob")
		require.NoError(t, c.Logout(t.Context(), "bob"))
		require.NoError(t, c.Logout(t.Context(), "bob"))
		assert.Equal(t, []string{"bob/1"}, u.ended())
	})
}

func TestCloseKeepsTheFleetLoggedIn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u := new(sessionlock.MemoryCache), &upstream{life: time.Hour}
		a, b := newClient(t, u, store), newClient(t, u, store)
		tokenOf(t, a, "bob")
		require.NoError(t, a.Close(t.Context()))
		assert.Equal(t, "bob/1", tokenOf(t, b, "bob"))
		time.Sleep(time.Minute)
		assert.Empty(t, u.ended())
	})
}

func TestNamesDifferWhenAnyPartDiffers(t *testing.T) {
	type parts struct{ upstream, namespace, key, print, secret string }
	entryName := func(t *testing.T, p parts) string {
		sp := &spy{}
		opts := []sessionlock.Option{
			sessionlock.WithCache(spyCache{sp, new(sessionlock.MemoryCache)}), sessionlock.WithLocker(new(memoryLocker)),
			sessionlock.WithNamespace(p.namespace),
			sessionlock.WithFingerprint(func(context.Context, string) (string, error) { return p.print, nil }),
		}
		if p.secret != "" {
			opts = append(opts, sessionlock.WithKeySecret([]byte(p.secret)))
		}
		c, err := sessionlock.New(p.upstream, &upstream{life: time.Hour}, opts...)
		require.NoError(t, err)
		tokenOf(t, c, p.key)
		require.NoError(t, c.Close(t.Context()))
		require.Len(t, sp.seen(""), 1)
		return sp.seen("")[0]
	}
	seen := map[string]parts{}
	for _, p := range []parts{
		{"https://a.test", "", "bob", "", ""},
		{"https://b.test", "", "bob", "", ""},
		{"http://a.test", "", "bob", "", ""},
		{"https://a.test:8443", "", "bob", "", ""},
		{"https://a.test", "staging", "bob", "", ""},
		{"https://a.test", "", "eve", "", ""},
		{"https://a.test", "", "bob", "p1", ""},
		{"https://a.test", "", "bob", "p2", ""},
		{"https://a.test", "", "bob", "", "0123456789abcdef"},
		{"https://a.test", "", "bob", "", "0123456789abcdeg"},
		{"https://a.testb", "", "ob", "", ""},
		{"https://a.test", "b", "ob", "", ""},
	} {
		name := entryName(t, p)
		assert.Equal(t, name, entryName(t, p), "equal parts, equal name")
		assert.NotContains(t, seen, name, "%v and %v", p, seen[name])
		seen[name] = p
	}
}

func TestJoinKeyIsUnambiguous(t *testing.T) {
	seen := map[string][]string{}
	for _, parts := range [][]string{
		{"ab", "c"},
		{"a", "bc"},
		{"abc"},
		{"abc", ""},
		{"", "abc"},
		{"a", "b", "c"},
		{"1:a", "b"},
		{"1:a1:b"},
		{"a1:b"},
		{"3:abc"},
		{"a:b"},
		{"a", "b"},
		{":"},
		{"", ""},
		{},
		{""},
	} {
		key := sessionlock.JoinKey(parts...)
		assert.NotContains(t, seen, key, "%q and %q", parts, seen[key])
		seen[key] = parts
	}
}

func TestLoginAndLogoutAreNeverRetried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := &upstream{life: time.Hour, refuse: &upstreamError{952}}
		u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
			if n == 1 {
				return sessionlock.Session{}, &upstreamError{952}
			}
			return u.grant(key, n), nil
		}
		c := newClient(t, u, new(sessionlock.MemoryCache), sessionlock.WithRejected(byCode))
		runs := 0
		err := c.Do(t.Context(), "bob", func(context.Context, sessionlock.Session) error {
			runs++
			return nil
		})
		var login *sessionlock.LoginError
		require.ErrorAs(t, err, &login)
		assert.NotErrorIs(t, err, sessionlock.ErrRejected)
		assert.Zero(t, runs)
		assert.Equal(t, 1, u.logins())
		time.Sleep(time.Second)
		tokenOf(t, c, "bob")
		require.ErrorIs(t, c.Logout(t.Context(), "bob"), u.refuse)
		time.Sleep(time.Minute)
		assert.Len(t, u.ended(), 1)
		assert.Equal(t, 2, u.logins())
	})
}

func TestFiftyLateRejectionsCostOneLogin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u := new(sessionlock.MemoryCache), &upstream{life: time.Hour, takes: 200 * time.Millisecond}
		var saw [50][]string
		var wg sync.WaitGroup
		for i := range saw {
			c := newClient(t, u, store)
			wg.Go(func() {
				assert.NoError(t, c.Do(t.Context(), "bob", func(_ context.Context, s sessionlock.Session) error {
					saw[i] = append(saw[i], s.Token.Reveal())
					if len(saw[i]) == 1 {
						time.Sleep(5*time.Second + time.Duration(i)*20*time.Millisecond) // for five logins' time
						return sessionlock.Reject(errDead)
					}
					return nil
				}))
			})
		}
		wg.Wait()
		for i := range saw {
			assert.Equal(t, []string{"bob/1", "bob/2"}, saw[i])
		}
		assert.Equal(t, 2, u.logins())
		assert.Equal(t, "bob/2", tokenOf(t, newClient(t, u, store), "bob"), "still stored")
	})
}

func TestLateRejectionAdoptsTheNewerSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u := new(sessionlock.MemoryCache), &upstream{life: time.Hour}
		a, b := newClient(t, u, store), newClient(t, u, store)
		tokenOf(t, a, "bob")
		var held sessionlock.Session
		var saw []string
		err := b.Do(t.Context(), "bob", func(ctx context.Context, s sessionlock.Session) error {
			saw = append(saw, s.Token.Reveal())
			if len(saw) == 1 {
				held = s
				assert.NoError(t, a.Do(ctx, "bob", rejectOld("bob/1")))
				return sessionlock.Reject(errDead)
			}
			return nil
		})
		require.NoError(t, err)
		assert.Equal(t, []string{"bob/1", "bob/2"}, saw)
		require.NoError(t, b.Invalidate(t.Context(), held), "later still")
		assert.Equal(t, "bob/2", tokenOf(t, newClient(t, u, store), "bob"), "not removed")
		assert.Equal(t, 2, u.logins())
	})
}

func TestRejectedTokenIsNeverAdopted(t *testing.T) {
	// repair runs a Do on c whose first session is refused, and returns what fn saw.
	repair := func(t *testing.T, c *sessionlock.Client, meanwhile func(context.Context)) (saw []string, err error) {
		err = c.Do(t.Context(), "bob", func(ctx context.Context, s sessionlock.Session) error {
			saw = append(saw, s.Token.Reveal())
			if len(saw) == 1 {
				meanwhile(ctx)
				return sessionlock.Reject(errDead)
			}
			return nil
		})
		return saw, err
	}
	t.Run("invalidation is not stored", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			store, u := new(sessionlock.MemoryCache), &upstream{life: time.Hour}
			tokenOf(t, newClient(t, u, store), "bob")
			failed := false
			c := newClient(t, u, spyCache{&spy{before: func(_ context.Context, op, name string) error {
				if op == opSwap && isEntry(name) && !failed {
					failed = true
					return errStoreDown
				}
				return nil
			}}, store})
			saw, err := repair(t, c, func(context.Context) {})
			require.NoError(t, err)
			assert.True(t, failed)
			assert.Equal(t, []string{"bob/1", "bob/2"}, saw)
			time.Sleep(time.Minute)
			assert.Empty(t, u.ended(), "what it displaced was rejected, so it is not logged out")
		})
	})
	t.Run("a peer was given it again", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			store, u := new(sessionlock.MemoryCache), &upstream{life: time.Hour}
			u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
				return u.grant(key, max(n-1, 1)), nil
			}
			a, b := newClient(t, u, store), newClient(t, u, store)
			s, err := a.Session(t.Context(), "bob")
			require.NoError(t, err)
			saw, err := repair(t, b, func(ctx context.Context) {
				assert.NoError(t, a.Invalidate(ctx, s))
				again, err := a.Session(ctx, "bob")
				assert.NoError(t, err)
				assert.Equal(t, s.Token.Reveal(), again.Token.Reveal())
				assert.Greater(t, again.Generation(), s.Generation())
			})
			require.NoError(t, err)
			assert.Equal(t, []string{"bob/1", "bob/2"}, saw)
			assert.Equal(t, 3, u.logins())
		})
	})
	t.Run("we were given it again", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			u := &upstream{life: time.Hour}
			u.script = func(_ context.Context, key string, _ int) (sessionlock.Session, error) { return u.grant(key, 1), nil }
			saw, err := repair(t, newClient(t, u, new(sessionlock.MemoryCache)), func(context.Context) {})
			var re *sessionlock.ReauthError
			require.ErrorAs(t, err, &re)
			require.ErrorIs(t, re.Second, sessionlock.ErrRejected)
			assert.Equal(t, []string{"bob/1"}, saw)
			assert.Equal(t, 2, u.logins(), "no loop")
			time.Sleep(time.Minute)
			assert.Empty(t, u.ended())
		})
	})
}

func TestMaybeExecutedIsNotRunAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := &upstream{life: time.Hour}
		c := newClient(t, u, new(sessionlock.MemoryCache), sessionlock.WithRejected(byCode))
		runs, first := 0, &upstreamError{112}
		err := c.Do(t.Context(), "bob", func(context.Context, sessionlock.Session) error {
			runs++
			return first
		})
		var re *sessionlock.ReauthError
		require.ErrorAs(t, err, &re)
		require.ErrorIs(t, err, sessionlock.ErrRejected)
		require.ErrorIs(t, re.First, first)
		require.NoError(t, re.Second)
		assert.Equal(t, 1, runs)
		assert.Equal(t, 1, u.logins())
		assert.Equal(t, "bob/2", tokenOf(t, c, "bob"), "the session is dead all the same")
	})
}

func TestCancelBeforeTheSecondRunReturnsBothErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := &upstream{life: time.Hour}
		c := newClient(t, u, new(sessionlock.MemoryCache))
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		runs := 0
		err := c.Do(ctx, "bob", func(context.Context, sessionlock.Session) error {
			runs++
			cancel()
			return sessionlock.Reject(errWindow)
		})
		var re *sessionlock.ReauthError
		require.ErrorAs(t, err, &re)
		require.ErrorIs(t, err, context.Canceled)
		require.ErrorIs(t, err, errWindow)
		assert.Equal(t, 1, runs)
		assert.Equal(t, 1, u.logins())
	})
}

func TestDifferentCredentialsKeepDifferentSessions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, sp, u := new(sessionlock.MemoryCache), &spy{}, &upstream{life: time.Hour}
		with := func(version string) *sessionlock.Client {
			return newClient(t, u, store, sessionlock.WithLocker(spyLocker{sp, new(memoryLocker)}),
				sessionlock.WithFingerprint(func(context.Context, string) (string, error) { return version, nil }))
		}
		assert.Equal(t, "bob/1", tokenOf(t, with("p1"), "bob"))
		assert.Equal(t, "bob/2", tokenOf(t, with("p2"), "bob"))
		assert.Equal(t, "bob/1", tokenOf(t, with("p1"), "bob"))
		assert.Equal(t, "bob/2", tokenOf(t, with("p2"), "bob"))
		assert.Len(t, sp.seen(lockSuffix), 1, "they log in one at a time")
	})
}

func TestConcurrentUseIsRaceFree(t *testing.T) {
	u := &upstream{life: time.Hour}
	c := newClient(t, u, new(sessionlock.MemoryCache), sessionlock.WithReauthBackoff(time.Millisecond, time.Millisecond), sessionlock.WithNearCache(2, time.Millisecond))
	known := []error{sessionlock.ErrRejected, sessionlock.ErrStale, sessionlock.ErrSuppressed, context.DeadlineExceeded}
	var wg sync.WaitGroup
	for g := range 32 {
		wg.Go(func() {
			h := c.For("key0")
			for i := range 30 {
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration(1+i)*time.Millisecond)
				key := "key" + strconv.Itoa(i%4)
				fn := func(_ context.Context, s sessionlock.Session) error {
					assert.True(t, strings.HasPrefix(s.Token.Reveal(), s.Key()+"/"))
					if (g+i)%5 == 0 {
						return sessionlock.Reject(errDead)
					}
					return nil
				}
				var err error
				switch (g + i) % 8 {
				case 0:
					err = c.Logout(ctx, key)
				case 1:
					_, err = c.Inspect(ctx, key)
					c.Stats()
				case 2:
					err = c.Unsuppress(ctx, key)
				case 3:
					err = h.Do(ctx, fn)
				case 4:
					var s sessionlock.Session
					if s, err = c.Session(ctx, key); err == nil {
						assert.Equal(t, key, s.Key())
						err = c.Invalidate(ctx, s)
					}
				default:
					err = c.Do(ctx, key, fn)
				}
				assert.True(t, err == nil || slices.ContainsFunc(known, func(k error) bool { return errors.Is(err, k) }), "%v", err)
				cancel()
			}
		})
	}
	wg.Wait()
}
