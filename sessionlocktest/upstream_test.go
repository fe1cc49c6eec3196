package sessionlocktest_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock"
	"github.com/sessionlock/sessionlock/sessionlocktest"
)

const (
	wait = 5 * time.Second
	tick = 2 * time.Millisecond
)

func login(t *testing.T, auth sessionlock.Authenticator, key string) sessionlock.Session {
	t.Helper()
	s, err := auth.Login(t.Context(), key)
	require.NoError(t, err)
	return s
}

// status returns the HTTP status in err's chain, 0 when there is none.
func status(err error) int {
	var e *sessionlocktest.StatusError
	if errors.As(err, &e) {
		return e.Code
	}
	return 0
}

// ledgerOf returns key's account, and checks that every login has one outcome.
func ledgerOf(t *testing.T, u *sessionlocktest.Upstream, key string) sessionlocktest.Account {
	t.Helper()
	a := u.Ledger().Accounts[key]
	assert.Equal(t, a.Sent, a.AtOnce+a.OK+a.Denied+a.LockedOut+a.TurnedAway+a.Abandoned, "%+v", a)
	return a
}

func TestUpstreamSessionsLiveUntilLogout(t *testing.T) {
	u := sessionlocktest.NewUpstream(t)
	s, other := login(t, u, "a"), login(t, u, "a")
	assert.NotEqual(t, s.Token.Reveal(), other.Token.Reveal())
	assert.WithinDuration(t, time.Now().Add(time.Hour), s.Expiry, time.Minute)
	require.NoError(t, u.Call(t.Context(), s))
	require.NoError(t, u.Logout(t.Context(), s))
	require.NoError(t, u.Logout(t.Context(), s), "over already")
	assert.Equal(t, http.StatusUnauthorized, status(u.Call(t.Context(), s)))
	require.NoError(t, u.Call(t.Context(), other), "a logout ends one session")
	assert.Equal(t, sessionlocktest.Account{
		Sent: 2, OK: 2, MaxAtOnce: 1, Live: 1, Logouts: 1, LateLogouts: 1, Served: 2, Refused: 1,
	}, ledgerOf(t, u, "a"))
	assert.Equal(t, 1, u.Sessions("a"))
}

func TestUpstreamRevokeEndsAllOfOneKey(t *testing.T) {
	u := sessionlocktest.NewUpstream(t)
	a1, a2, b := login(t, u, "a"), login(t, u, "a"), login(t, u, "b")
	u.Revoke("a")
	require.Error(t, u.Call(t.Context(), a1))
	require.Error(t, u.Call(t.Context(), a2))
	require.NoError(t, u.Call(t.Context(), b))
	assert.Equal(t, 2, ledgerOf(t, u, "a").Revoked)
	assert.Equal(t, 0, u.Sessions("a"))
	assert.Equal(t, 1, u.Sessions("b"))
}

func TestUpstreamSessionsExpire(t *testing.T) {
	u := sessionlocktest.NewUpstream(t)
	u.SetTTL(20 * time.Millisecond)
	s := login(t, u, "a")
	assert.False(t, s.Expiry.After(time.Now().Add(20*time.Millisecond)), "never taken for longer than it is")
	require.Eventually(t, func() bool { return u.Sessions("a") == 0 }, wait, tick)
	assert.Equal(t, http.StatusUnauthorized, status(u.Call(t.Context(), s)))

	u.SetTTL(0)
	s = login(t, u, "a")
	assert.True(t, s.Expiry.IsZero())
	require.NoError(t, u.Call(t.Context(), s))
}

func TestUpstreamStrangers(t *testing.T) {
	u := sessionlocktest.NewUpstream(t)
	for _, token := range []string{"", "made up", "[redacted]"} {
		err := u.Call(t.Context(), sessionlock.Session{Token: sessionlock.NewToken(token)})
		assert.Equal(t, http.StatusUnauthorized, status(err))
	}
	assert.Equal(t, 3, u.Ledger().Strangers)
	assert.Contains(t, u.Ledger().String(), "3 requests with unknown tokens")
}

func TestUpstreamDeniesWrongPasswords(t *testing.T) {
	u := sessionlocktest.NewUpstream(t)
	_, err := u.LoginAs("hunter2").Login(t.Context(), "some user")
	assert.Equal(t, http.StatusUnauthorized, status(err))
	assert.NotContains(t, err.Error(), "hunter2", "the answer quotes it, the error must not")
	assert.NotContains(t, err.Error(), "some user")
	login(t, u.LoginAs(sessionlocktest.Password), "some user")
	a := ledgerOf(t, u, "some user")
	assert.Equal(t, []int{2, 1, 1}, []int{a.Sent, a.Denied, a.OK})
}

func TestUpstreamDenyAfter(t *testing.T) {
	u := sessionlocktest.NewUpstream(t)
	u.DenyAfter("a", 3)
	for nth, want := range []int{0, 0, http.StatusUnauthorized, http.StatusUnauthorized} {
		_, err := u.Login(t.Context(), "a")
		assert.Equal(t, want, status(err), "login %d", nth+1)
	}
	u.Allow("a")
	login(t, u, "a")
	u.DenyAfter("a", 0)
	_, err := u.Login(t.Context(), "a")
	assert.Equal(t, http.StatusUnauthorized, status(err), "from now on")
	login(t, u, "b")
	a := ledgerOf(t, u, "a")
	assert.Equal(t, []int{6, 3, 3}, []int{a.Sent, a.OK, a.Denied})
}

func TestUpstreamLockoutAfter(t *testing.T) {
	u := sessionlocktest.NewUpstream(t)
	u.LockoutAfter(2)
	wrong := u.LoginAs("wrong")
	_, err := wrong.Login(t.Context(), "a")
	assert.Equal(t, http.StatusUnauthorized, status(err))
	login(t, u, "a") // starts the count anew
	for _, want := range []int{http.StatusUnauthorized, http.StatusUnauthorized, http.StatusLocked} {
		_, err := wrong.Login(t.Context(), "a")
		assert.Equal(t, want, status(err))
	}
	_, err = u.Login(t.Context(), "a")
	assert.Equal(t, http.StatusLocked, status(err), "the right password does not help")
	login(t, u, "b")
	a := ledgerOf(t, u, "a")
	assert.Equal(t, []int{6, 1, 3, 2}, []int{a.Sent, a.OK, a.Denied, a.LockedOut})
	u.Allow("a")
	login(t, u, "a")
}

func TestUpstreamCapRefuses(t *testing.T) {
	u := sessionlocktest.NewUpstream(t)
	u.Cap(2, false)
	s := login(t, u, "a")
	login(t, u, "a")
	_, err := u.Login(t.Context(), "a")
	assert.Equal(t, http.StatusTooManyRequests, status(err))
	login(t, u, "b")
	require.NoError(t, u.Call(t.Context(), s))
	require.NoError(t, u.Logout(t.Context(), s))
	login(t, u, "a")
	a := ledgerOf(t, u, "a")
	assert.Equal(t, []int{3, 1, 2, 0}, []int{a.OK, a.TurnedAway, a.Live, a.Killed})
}

func TestUpstreamCapKillsTheOldest(t *testing.T) {
	u := sessionlocktest.NewUpstream(t)
	s1, s2 := login(t, u, "a"), login(t, u, "a")
	u.Cap(2, true)
	s3 := login(t, u, "a")
	require.Error(t, u.Call(t.Context(), s1))
	require.NoError(t, u.Call(t.Context(), s2))
	u.Cap(1, true)
	s4 := login(t, u, "a")
	require.Error(t, u.Call(t.Context(), s2))
	require.Error(t, u.Call(t.Context(), s3))
	require.NoError(t, u.Call(t.Context(), s4))
	a := ledgerOf(t, u, "a")
	assert.Equal(t, []int{4, 3, 1}, []int{a.OK, a.Killed, a.Live})
}

func TestUpstreamRefuseFresh(t *testing.T) {
	u := sessionlocktest.NewUpstream(t)
	old := login(t, u, "a")
	u.RefuseFresh(true)
	s := login(t, u, "a")
	assert.Equal(t, http.StatusUnauthorized, status(u.Call(t.Context(), s)))
	require.NoError(t, u.Call(t.Context(), old), "minted before")
	assert.Equal(t, 2, u.Sessions("a"), "refused, but alive")
	u.RefuseFresh(false)
	require.NoError(t, u.Call(t.Context(), s))
	a := ledgerOf(t, u, "a")
	assert.Equal(t, []int{2, 1}, []int{a.Served, a.Refused})
}

func TestUpstreamDown(t *testing.T) {
	u := sessionlocktest.NewUpstream(t)
	s := login(t, u, "a")
	u.Hang(true) // what is turned away does not hang
	u.Down(sessionlocktest.Refusing)
	ctx, cancel := context.WithTimeout(t.Context(), wait)
	defer cancel()
	_, err := u.Login(ctx, "a")
	assert.Equal(t, http.StatusServiceUnavailable, status(err))
	assert.Equal(t, http.StatusServiceUnavailable, status(u.Call(t.Context(), s)))
	assert.Equal(t, http.StatusServiceUnavailable, status(u.Logout(t.Context(), s)))
	u.Down(sessionlocktest.Dropping)
	_, err = u.Login(ctx, "a")
	require.Error(t, err)
	assert.Equal(t, 0, status(err), "no answer at all")
	require.Error(t, u.Call(t.Context(), s))
	u.Down(sessionlocktest.Up)
	require.NoError(t, u.Call(t.Context(), s), "the session has survived")
	assert.Equal(t, sessionlocktest.Account{
		Sent: 3, OK: 1, TurnedAway: 2, MaxAtOnce: 1, Live: 1, Served: 1,
	}, ledgerOf(t, u, "a"))
}

func TestUpstreamCountsLoginsAtOnce(t *testing.T) {
	u := sessionlocktest.NewUpstream(t)
	u.Hang(true)
	var wg sync.WaitGroup
	for i := range 7 {
		wg.Go(func() {
			_, err := u.Login(t.Context(), []string{"a", "b"}[i/5])
			assert.NoError(t, err)
		})
	}
	require.Eventually(t, func() bool {
		l := u.Ledger()
		return l.Accounts["a"].AtOnce == 5 && l.Accounts["b"].AtOnce == 2
	}, wait, tick)
	assert.Equal(t, 0, ledgerOf(t, u, "a").OK)
	u.Hang(true) // those that hang are not forgotten
	u.Hang(false)
	wg.Wait()
	login(t, u, "a")
	total, atOnce := u.Logins("a")
	assert.Equal(t, []int{6, 5}, []int{total, atOnce})
	a := ledgerOf(t, u, "a")
	assert.Equal(t, []int{0, 6}, []int{a.AtOnce, a.OK})
	for range 5 {
		login(t, u, "c")
	}
	total, atOnce = u.Logins("c")
	assert.Equal(t, []int{5, 1}, []int{total, atOnce}, "one after the other is never two at once")
}

// impatient sends a login and leaves once it has arrived.
func impatient(t *testing.T, u *sessionlocktest.Upstream, key string) {
	t.Helper()
	before, _ := u.Logins(key)
	ctx, cancel := context.WithCancel(t.Context())
	left := make(chan error)
	go func() {
		_, err := u.Login(ctx, key)
		left <- err
	}()
	require.Eventually(t, func() bool { n, _ := u.Logins(key); return n > before }, wait, tick)
	cancel()
	require.ErrorIs(t, <-left, context.Canceled)
}

func TestUpstreamForgetsHangingLoginsOfClientsThatLeft(t *testing.T) {
	u := sessionlocktest.NewUpstream(t)
	u.Hang(true)
	impatient(t, u, "a")
	require.Eventually(t, func() bool { return ledgerOf(t, u, "a").Abandoned == 1 }, wait, tick)
	u.Hang(false)
	assert.Equal(t, 0, u.Sessions("a"))
}

func TestUpstreamFinishesDelayedLoginsOfClientsThatLeft(t *testing.T) {
	u := sessionlocktest.NewUpstream(t)
	u.Delay(50 * time.Millisecond)
	impatient(t, u, "a")
	require.Eventually(t, func() bool { return u.Sessions("a") == 1 }, wait, tick, "the orphan of a timed-out login")
	start := time.Now()
	login(t, u, "a")
	assert.GreaterOrEqual(t, time.Since(start), 50*time.Millisecond)
	u.Delay(0)
	login(t, u, "a")
	assert.Equal(t, 3, ledgerOf(t, u, "a").OK)
}

func TestUpstreamCloseEndsWhatHangs(t *testing.T) {
	u, err := sessionlocktest.StartUpstream()
	require.NoError(t, err)
	u.Hang(true)
	failed := make(chan error, 2)
	for _, key := range []string{"hangs", "sleeps"} {
		go func() {
			_, err := u.Login(context.Background(), key)
			failed <- err
		}()
		require.Eventually(t, func() bool { n, _ := u.Logins(key); return n == 1 }, wait, tick)
		u.Hang(true) // twice is once
		u.Delay(time.Hour)
	}
	u.Close()
	u.Close()
	require.Error(t, <-failed)
	require.Error(t, <-failed)
	assert.Equal(t, 1, ledgerOf(t, u, "hangs").Abandoned)
	assert.Equal(t, 1, ledgerOf(t, u, "sleeps").Abandoned)
	_, err = u.Login(t.Context(), "a")
	assert.Error(t, err)
}

func TestRemoteNeedsNothingButTheURL(t *testing.T) {
	u := sessionlocktest.NewUpstream(t)
	r := sessionlocktest.At(u.URL)
	s := login(t, r, "a")
	require.NoError(t, r.Call(t.Context(), s))
	require.NoError(t, u.Call(t.Context(), s))
	require.NoError(t, r.Logout(t.Context(), s))
	a := ledgerOf(t, u, "a")
	assert.Equal(t, []int{1, 2, 1}, []int{a.OK, a.Served, a.Logouts})
}

func TestRemoteKeepsKeysApart(t *testing.T) {
	u := sessionlocktest.NewUpstream(t)
	keys := []string{"a b", "a+b", "a%20b", "a|1", "{a}", "日本", "a\nb", `a"b`, strings.Repeat("x", 256)}
	for _, key := range keys {
		require.NoError(t, u.Call(t.Context(), login(t, u, key)), "%q", key)
	}
	for _, key := range keys {
		assert.Equal(t, 1, ledgerOf(t, u, key).Served, "%q", key)
	}
	_, err := u.Login(t.Context(), "\xff")
	require.Error(t, err, "two keys could become one")
	assert.Len(t, u.Ledger().Accounts, len(keys))
}

func TestUpstreamRefusesNonsense(t *testing.T) {
	u := sessionlocktest.NewUpstream(t)
	for _, body := range []string{"", "{", `{"password":"x"}`, `{"user":"` + strings.Repeat("x", 70<<10) + `"}`} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, u.URL+"/login", bytes.NewReader([]byte(body)))
		require.NoError(t, err)
		res, err := http.DefaultClient.Do(req)
		require.NoError(t, err)
		require.NoError(t, res.Body.Close())
		assert.Equal(t, http.StatusBadRequest, res.StatusCode)
	}
	assert.Empty(t, u.Ledger().Accounts)
}

func TestLedgerPrints(t *testing.T) {
	u := sessionlocktest.NewUpstream(t)
	login(t, u, "b")
	login(t, u, "a")
	lines := strings.Split(u.Ledger().String(), "\n")
	assert.Contains(t, lines[0], "logins")
	assert.True(t, strings.HasPrefix(lines[1], "a  "), lines[1])
	assert.True(t, strings.HasPrefix(lines[2], "b  "), lines[2])
}

func TestLedgerIsExactUnderLoad(t *testing.T) {
	u := sessionlocktest.NewUpstream(t)
	u.Cap(3, true)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			key := fmt.Sprint("key ", i%2)
			for range 25 {
				s := login(t, u, key)
				_ = u.Call(t.Context(), s)
				assert.NoError(t, u.Logout(t.Context(), s))
				_, err := u.LoginAs("wrong").Login(t.Context(), key)
				assert.Error(t, err)
			}
		})
	}
	wg.Wait()
	for _, key := range []string{"key 0", "key 1"} {
		a := ledgerOf(t, u, key)
		assert.Equal(t, []int{200, 100, 100, 0}, []int{a.Sent, a.OK, a.Denied, a.AtOnce}, key)
		assert.Equal(t, 100, a.Killed+a.Logouts, key)
		assert.Equal(t, 100, a.Logouts+a.LateLogouts, key)
		assert.Equal(t, 100, a.Served+a.Refused, key)
		assert.Equal(t, 0, a.Live, key)
	}
}

// What the client makes of each answer shows how Login has marked it.
func TestRemoteMarksFailures(t *testing.T) {
	for name, tt := range map[string]struct {
		set  func(u *sessionlocktest.Upstream)
		want sessionlock.LoginClass
	}{
		"denied":            {func(u *sessionlocktest.Upstream) { u.DenyAfter("a", 0) }, sessionlock.LoginDenied},
		"down":              {func(u *sessionlocktest.Upstream) { u.Down(sessionlocktest.Refusing) }, sessionlock.LoginDeferred},
		"connection broken": {func(u *sessionlocktest.Upstream) { u.Down(sessionlocktest.Dropping) }, sessionlock.LoginUnknown},
		"over the cap": {func(u *sessionlocktest.Upstream) {
			_, _ = u.Login(context.Background(), "a")
			u.Cap(1, false)
		}, sessionlock.LoginDeferred},
		"locked out": {func(u *sessionlocktest.Upstream) {
			u.LockoutAfter(1)
			_, _ = u.LoginAs("wrong").Login(context.Background(), "a")
		}, sessionlock.LoginDenied},
	} {
		t.Run(name, func(t *testing.T) {
			u := sessionlocktest.NewUpstream(t)
			tt.set(u)
			_, err := sessionlocktest.Client(t, u).Session(t.Context(), "a")
			var failed *sessionlock.LoginError
			require.ErrorAs(t, err, &failed)
			assert.Equal(t, tt.want, failed.Class)
		})
	}
}

func TestUpstreamHonoursRetryAfter(t *testing.T) {
	u := sessionlocktest.NewUpstream(t)
	u.Down(sessionlocktest.Refusing)
	_, err := sessionlocktest.Client(t, u).Session(t.Context(), "a")
	var failed *sessionlock.LoginError
	require.ErrorAs(t, err, &failed)
	assert.WithinDuration(t, time.Now().Add(time.Second), failed.Until, 600*time.Millisecond, "the header says 1 s, the client's own back-off starts at 250 ms")
}

func TestClientRepairsWhatUpstreamRevokes(t *testing.T) {
	u := sessionlocktest.NewUpstream(t)
	c := sessionlocktest.Client(t, u)
	require.NoError(t, c.Do(t.Context(), "a", func(ctx context.Context, s sessionlock.Session) error { return u.Call(ctx, s) }))
	u.Revoke("a")
	require.NoError(t, c.Do(t.Context(), "a", func(ctx context.Context, s sessionlock.Session) error { return u.Call(ctx, s) }))
	total, atOnce := u.Logins("a")
	assert.Equal(t, []int{2, 1}, []int{total, atOnce})
	assert.Equal(t, 1, u.Sessions("a"))
}

func TestCallReportsAMixUp(t *testing.T) {
	u := sessionlocktest.NewUpstream(t)
	confused := sessionlock.AuthenticatorFunc(func(ctx context.Context, _ string) (sessionlock.Session, error) {
		return u.Login(ctx, "b")
	})
	c := sessionlocktest.Client(t, confused)
	runs := 0
	err := c.Do(t.Context(), "a", func(ctx context.Context, s sessionlock.Session) error {
		runs++
		return u.Call(ctx, s)
	})
	require.ErrorIs(t, err, sessionlocktest.ErrMixUp)
	assert.NotErrorIs(t, err, sessionlock.ErrRejected)
	assert.Equal(t, 1, runs, "a mix-up is not a rejection")
}
