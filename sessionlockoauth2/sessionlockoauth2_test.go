package sessionlockoauth2_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/fstest"
	"testing/synctest"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/oauth2"

	"github.com/sessionlock/sessionlock"
	"github.com/sessionlock/sessionlock/sessionlockoauth2"
	"github.com/sessionlock/sessionlock/sessionlocktest"
)

const acme = "https://api.acme.test"

// logins is an upstream's login: the nth brings the token "secret-n".
type logins struct {
	life time.Duration // of a session; 0: the upstream does not say
	n    atomic.Int64
}

func (l *logins) Login(context.Context, string) (sessionlock.Session, error) {
	s := sessionlock.Session{Token: sessionlock.NewToken(fmt.Sprintf("secret-%d", l.n.Add(1)))}
	if l.life > 0 {
		s.Expiry = time.Now().Add(l.life)
	}
	return s, nil
}

// newClient returns a client that is closed with t.
func newClient(t testing.TB, upstream string, auth sessionlock.Authenticator, store sessionlock.Option) *sessionlock.Client {
	t.Helper()
	c, err := sessionlock.New(upstream, auth, store)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, c.Close(context.WithoutCancel(t.Context()))) })
	return c
}

// recorded is a base transport that notes the credentials of each request.
type recorded struct {
	mu   sync.Mutex
	sent []string
	code func(*http.Request) (status int, location string)
}

func (b *recorded) RoundTrip(r *http.Request) (*http.Response, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.sent = append(b.sent, r.URL.Host+" "+r.Header.Get("Authorization"))
	resp := &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, Body: http.NoBody, Request: r}
	if b.code != nil {
		var location string
		if resp.StatusCode, location = b.code(r); location != "" {
			resp.Header.Set("Location", location)
		}
	}
	return resp, nil
}

func (b *recorded) last() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	_, credentials, _ := strings.Cut(b.sent[len(b.sent)-1], " ")
	return credentials
}

// asked counts the calls of a source.
type asked struct {
	oauth2.TokenSource
	n atomic.Int64
}

func (a *asked) Token() (*oauth2.Token, error) {
	a.n.Add(1)
	return a.TokenSource.Token()
}

// over returns oauth2's own client of src on base.
func over(ctx context.Context, base http.RoundTripper, src oauth2.TokenSource) *http.Client {
	return oauth2.NewClient(context.WithValue(ctx, oauth2.HTTPClient, &http.Client{Transport: base}), src)
}

// get makes one request and returns its status.
func get(t *testing.T, hc *http.Client, url string) int {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, http.NoBody)
	require.NoError(t, err)
	resp, err := hc.Do(req)
	require.NoError(t, err)
	require.NoError(t, resp.Body.Close())
	return resp.StatusCode
}

func tokenOf(t *testing.T, src oauth2.TokenSource) string {
	t.Helper()
	token, err := src.Token()
	require.NoError(t, err)
	return token.AccessToken
}

// refused reports key's session as the upstream's refusal of it would be.
func refused(t *testing.T, c *sessionlock.Client, key string) {
	t.Helper()
	s, err := c.Session(t.Context(), key)
	require.NoError(t, err)
	require.NoError(t, c.Invalidate(t.Context(), s))
}

func TestTokenIsTheSessionForAWhile(t *testing.T) {
	for name, tc := range map[string]struct{ life, want time.Duration }{
		"of a long session":                 {time.Hour, 30 * time.Second},
		"of one that ends with the while":   {30 * time.Second, 30 * time.Second},
		"of one that ends sooner":           {25 * time.Second, 25 * time.Second},
		"of one whose upstream says no end": {0, 30 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := sessionlocktest.Client(t, &logins{life: tc.life})
				src := sessionlockoauth2.TokenSource(t.Context(), c.For("bob"))
				token, err := src.Token()
				require.NoError(t, err)
				assert.Equal(t, "secret-1", token.AccessToken)
				assert.Equal(t, "Bearer", token.TokenType)
				assert.Empty(t, token.RefreshToken)
				assert.Equal(t, tc.want, time.Until(token.Expiry))
				assert.True(t, token.Valid())

				time.Sleep(3 * time.Second)
				token, err = src.Token()
				require.NoError(t, err)
				assert.Equal(t, "secret-1", token.AccessToken)
				if tc.want == tc.life {
					tc.want -= 3 * time.Second // its end stays where it is
				}
				assert.Equal(t, min(tc.want, 30*time.Second), time.Until(token.Expiry))
			})
		})
	}
}

// The bound itself: oauth2's caches, the one of NewClient and the laziest there is.
func TestRevocationIsSeenWithinTheBound(t *testing.T) {
	for name, tc := range map[string]struct {
		cache func(oauth2.TokenSource) oauth2.TokenSource
		kept  time.Duration
	}{
		"uncached":  {func(src oauth2.TokenSource) oauth2.TokenSource { return src }, -1},
		"NewClient": {nil, 20 * time.Second},
		"to the last moment": {func(src oauth2.TokenSource) oauth2.TokenSource {
			return oauth2.ReuseTokenSourceWithExpiry(nil, src, time.Nanosecond)
		}, 30*time.Second - time.Nanosecond},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				auth, base := &logins{life: time.Hour}, &recorded{}
				c := sessionlocktest.Client(t, auth)
				src := sessionlockoauth2.TokenSource(t.Context(), c.For("bob"))
				hc := over(t.Context(), base, src)
				if tc.cache != nil {
					hc = &http.Client{Transport: &oauth2.Transport{Base: base, Source: tc.cache(src)}}
				}
				get(t, hc, acme)
				require.Equal(t, "Bearer secret-1", base.last())
				refused(t, c, "bob")

				if tc.kept >= 0 {
					time.Sleep(tc.kept)
					get(t, hc, acme)
					assert.Equal(t, "Bearer secret-1", base.last(), "oauth2 keeps a token until then")
				}
				time.Sleep(time.Nanosecond)
				get(t, hc, acme)
				assert.Equal(t, "Bearer secret-2", base.last())
				assert.EqualValues(t, 2, auth.n.Load())
			})
		})
	}
}

// oauth2's cache takes every token of such a session for expired.
func TestSessionAboutToEndIsAskedForOncePerRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		auth, base := &logins{life: 9 * time.Second}, &recorded{}
		c := sessionlocktest.Client(t, auth)
		src := &asked{TokenSource: sessionlockoauth2.TokenSource(t.Context(), c.For("bob"))}
		hc := over(t.Context(), base, src)
		for i := range 5 {
			assert.Equal(t, http.StatusOK, get(t, hc, acme))
			assert.Equal(t, "Bearer secret-1", base.last())
			assert.EqualValues(t, i+1, src.n.Load())
			time.Sleep(time.Second)
		}
		assert.EqualValues(t, 1, auth.n.Load(), "a session that has not ended is nobody's reason to log in")
		time.Sleep(4 * time.Second)
		get(t, hc, acme)
		assert.Equal(t, "Bearer secret-2", base.last())
		assert.EqualValues(t, 6, src.n.Load())
	})
}

// A refusal that the upstream itself makes, through oauth2's cache, which here
// keeps a token for a tenth of a second.
func TestRefusedSessionIsReplacedAtTheNextAsk(t *testing.T) {
	u := sessionlocktest.NewUpstream(t)
	c := sessionlocktest.Client(t, u)
	src := &asked{TokenSource: sessionlockoauth2.TokenSource(t.Context(), c.For("bob"))}
	hc := &http.Client{Transport: &oauth2.Transport{Source: oauth2.ReuseTokenSourceWithExpiry(nil, src, 29_900*time.Millisecond)}}
	defer hc.CloseIdleConnections()

	require.Equal(t, http.StatusOK, get(t, hc, u.URL+"/whoami"))
	u.Revoke("bob")
	refused(t, c, "bob")
	require.Eventually(t, func() bool { return get(t, hc, u.URL+"/whoami") == http.StatusOK }, 30*time.Second, 5*time.Millisecond)
	assert.EqualValues(t, 2, src.n.Load())
	total, _ := u.Logins("bob")
	assert.Equal(t, 2, total)
}

// The same without a cache between: what NewClient would answer with 401 for 20 s.
func TestUncachedSourceForgetsARefusedSessionAtOnce(t *testing.T) {
	u := sessionlocktest.NewUpstream(t)
	c := sessionlocktest.Client(t, u)
	hc := &http.Client{Transport: &oauth2.Transport{Source: sessionlockoauth2.TokenSource(t.Context(), c.For("bob"))}}
	cached := oauth2.NewClient(t.Context(), sessionlockoauth2.TokenSource(t.Context(), c.For("bob")))
	require.Equal(t, http.StatusOK, get(t, hc, u.URL+"/whoami"))
	require.Equal(t, http.StatusOK, get(t, cached, u.URL+"/whoami"))
	u.Revoke("bob")
	require.Equal(t, http.StatusUnauthorized, get(t, hc, u.URL+"/whoami"), "nobody has told the source")
	refused(t, c, "bob")
	assert.Equal(t, http.StatusOK, get(t, hc, u.URL+"/whoami"))
	total, _ := u.Logins("bob")
	assert.Equal(t, 2, total)
}

// stores are what two clients can share, push included.
var stores = map[string]func(t *testing.T) sessionlock.Option{
	"memory": func(*testing.T) sessionlock.Option { return sessionlock.WithCache(new(sessionlock.MemoryCache)) },
	"miniredis": func(t *testing.T) sessionlock.Option {
		rdb := redis.NewClient(&redis.Options{Addr: miniredis.RunT(t).Addr()})
		t.Cleanup(func() { _ = rdb.Close() })
		return sessionlock.WithRedis(rdb)
	},
}

func TestWhatOneProcessEndsIsOverForTheSourceOfAnother(t *testing.T) {
	put := sessionlock.Session{Token: sessionlock.NewToken("by hand"), Expiry: time.Now().Add(time.Hour)}
	for store, open := range stores {
		for how, end := range map[string]func(*testing.T, *sessionlock.Client){
			"invalidated": func(t *testing.T, c *sessionlock.Client) { refused(t, c, "bob") },
			"logged out":  func(t *testing.T, c *sessionlock.Client) { require.NoError(t, c.Logout(t.Context(), "bob")) },
			"replaced": func(t *testing.T, c *sessionlock.Client) {
				_, err := c.Put(t.Context(), "bob", put)
				require.NoError(t, err)
			},
		} {
			t.Run(how+" in "+store, func(t *testing.T) {
				shared, auth := open(t), &logins{life: time.Hour}
				here, there := newClient(t, acme, auth, shared), newClient(t, acme, auth, shared)
				src := sessionlockoauth2.TokenSource(t.Context(), there.For("bob"))
				require.Equal(t, "secret-1", tokenOf(t, sessionlockoauth2.TokenSource(t.Context(), here.For("bob"))))
				require.Equal(t, "secret-1", tokenOf(t, src))

				end(t, here)
				require.Eventually(t, func() bool { return tokenOf(t, src) != "secret-1" }, 30*time.Second, 5*time.Millisecond)
				want := map[bool]string{false: "secret-2", true: "by hand"}[how == "replaced"]
				assert.Equal(t, want, tokenOf(t, src))
				assert.Equal(t, want, tokenOf(t, sessionlockoauth2.TokenSource(t.Context(), here.For("bob"))))
			})
		}
	}
}

// A peer's cached token too is given up within the bound.
func TestCacheOfAPeerGivesUpWithinTheBound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cache, auth, base := sessionlock.WithCache(new(sessionlock.MemoryCache)), &logins{life: time.Hour}, &recorded{}
		here, there := sessionlocktest.Client(t, auth, cache), sessionlocktest.Client(t, auth, cache)
		hc := over(t.Context(), base, sessionlockoauth2.TokenSource(t.Context(), there.For("bob")))
		get(t, hc, acme)
		require.Equal(t, "Bearer secret-1", base.last())
		refused(t, here, "bob")
		time.Sleep(20*time.Second + time.Nanosecond)
		get(t, hc, acme)
		assert.Equal(t, "Bearer secret-2", base.last())
	})
}

func TestErrorsOfTheClientComeThroughOAuth2(t *testing.T) {
	cause := errors.New("wrong password")
	c := sessionlocktest.Client(t, sessionlock.AuthenticatorFunc(func(context.Context, string) (sessionlock.Session, error) {
		return sessionlock.Session{}, sessionlock.Denied(cause)
	}))
	base := &recorded{}
	for name, hc := range map[string]*http.Client{
		"NewClient": over(t.Context(), base, sessionlockoauth2.TokenSource(t.Context(), c.For("bob"))),
		"Transport": {Transport: &oauth2.Transport{Base: base, Source: sessionlockoauth2.TokenSource(t.Context(), c.For("eve"))}},
	} {
		for range 2 { // an error is not cached
			req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, acme, http.NoBody)
			require.NoError(t, err)
			_, err = hc.Do(req) //nolint:bodyclose // there is none
			var login *sessionlock.LoginError
			require.ErrorIs(t, err, sessionlock.ErrDenied, name)
			require.ErrorAs(t, err, &login, name)
			assert.Equal(t, sessionlock.LoginDenied, login.Class)
			assert.NotContains(t, err.Error(), cause.Error())
		}
	}
	assert.Empty(t, base.sent)
}

func TestSourceOfNothingIsInvalid(t *testing.T) {
	auth := &logins{life: time.Hour}
	c := sessionlocktest.Client(t, auth)
	for name, src := range map[string]oauth2.TokenSource{
		"no handle":  sessionlockoauth2.TokenSource(t.Context(), nil),
		"no context": sessionlockoauth2.TokenSource(nil, c.For("bob")), //nolint:staticcheck // that is the point
		"neither":    sessionlockoauth2.TokenSource(nil, nil),          //nolint:staticcheck // that is the point
		"a bad key":  sessionlockoauth2.TokenSource(t.Context(), c.For(" ")),
	} {
		token, err := src.Token()
		require.ErrorIs(t, err, sessionlock.ErrInvalid, name)
		assert.Nil(t, token, name)
	}
	assert.Zero(t, auth.n.Load())

	require.NotEmpty(t, tokenOf(t, sessionlockoauth2.TokenSource(t.Context(), c.For("bob"))))
	_, err := sessionlockoauth2.TokenSource(nil, c.For("bob")).Token() //nolint:staticcheck // that is the point
	require.ErrorIs(t, err, sessionlock.ErrInvalid, "also where the session is near")
}

func TestEveryCallAsksWithTheContext(t *testing.T) {
	type tenantKey struct{}
	seen := make(chan any, 2)
	static := sessionlocktest.Static()
	c := sessionlocktest.Client(t, sessionlock.AuthenticatorFunc(func(ctx context.Context, key string) (sessionlock.Session, error) {
		seen <- ctx.Value(tenantKey{})
		return static.Login(ctx, key)
	}))
	ctx, cancel := context.WithCancelCause(context.WithValue(t.Context(), tenantKey{}, 7))
	src := sessionlockoauth2.TokenSource(ctx, c.For("bob"))
	for range 2 {
		require.NotEmpty(t, tokenOf(t, src))
		assert.Equal(t, 7, <-seen)
		require.NoError(t, c.Logout(t.Context(), "bob"))
	}
	require.NotEmpty(t, tokenOf(t, src))
	why := errors.New("tenant left")
	cancel(why)
	_, err := src.Token()
	require.ErrorIs(t, err, context.Canceled)
	assert.ErrorIs(t, err, why)
	assert.NotEmpty(t, tokenOf(t, sessionlockoauth2.TokenSource(t.Context(), c.For("bob"))), "others go on")
}

func TestContextEndsAWaitForALogin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		c := sessionlocktest.Client(t, sessionlock.AuthenticatorFunc(func(ctx context.Context, key string) (sessionlock.Session, error) {
			<-release
			return sessionlock.Session{Token: sessionlock.NewToken("late"), Expiry: time.Now().Add(time.Hour)}, nil
		}))
		defer close(release)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start := time.Now()
		_, err := sessionlockoauth2.TokenSource(ctx, c.For("bob")).Token()
		require.ErrorIs(t, err, context.DeadlineExceeded)
		assert.Equal(t, time.Second, time.Since(start))
	})
}

// Why the docs say that Login must not use the source: nothing tells it where it is
// called from.
func TestLoginThatAsksForItsOwnTokenTimesOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var src oauth2.TokenSource
		c := sessionlocktest.Client(t, sessionlock.AuthenticatorFunc(func(context.Context, string) (sessionlock.Session, error) {
			_, err := src.Token()
			return sessionlock.Session{}, err
		}))
		src = sessionlockoauth2.TokenSource(t.Context(), c.For("bob"))
		start := time.Now()
		_, err := src.Token()
		var login *sessionlock.LoginError
		require.ErrorAs(t, err, &login)
		assert.InDelta(t, 10, time.Since(start).Seconds(), 1, "WithLoginTimeout")
	})
}

func TestSourceEndsWithItsClient(t *testing.T) {
	c := sessionlocktest.Client(t, &logins{life: time.Hour})
	src := sessionlockoauth2.TokenSource(t.Context(), c.For("bob"))
	require.NotEmpty(t, tokenOf(t, src))
	require.NoError(t, c.Close(t.Context()))
	_, err := src.Token()
	assert.ErrorIs(t, err, sessionlock.ErrClosed)
}

// oauth2's cache writes to the tokens it is given.
func TestTokensAreNotShared(t *testing.T) {
	auth := &logins{life: time.Hour}
	c := sessionlocktest.Client(t, auth)
	src := sessionlockoauth2.TokenSource(t.Context(), c.For("bob"))
	var wg sync.WaitGroup
	var tokens sync.Map
	for i := range 64 {
		asking := src
		if i%2 == 0 {
			asking = oauth2.ReuseTokenSourceWithExpiry(nil, src, time.Duration(i))
		}
		wg.Go(func() {
			token, err := asking.Token()
			if assert.NoError(t, err) {
				assert.Equal(t, "secret-1", token.AccessToken)
				tokens.Store(token, true)
				token.AccessToken = "spoilt"
			}
		})
	}
	wg.Wait()
	n := 0
	tokens.Range(func(any, any) bool { n++; return true })
	assert.Equal(t, 64, n)
	assert.Equal(t, "secret-1", tokenOf(t, src))
	assert.EqualValues(t, 1, auth.n.Load())
}

func TestSourcePrintsNoSecret(t *testing.T) {
	const key = "bobs-raw-key"
	c := sessionlocktest.Client(t, &logins{life: time.Hour})
	ctx := sessionlock.KeyContext(t.Context(), key)
	src := sessionlockoauth2.TokenSource(ctx, c.For(key))
	hc := over(t.Context(), http.NewFileTransportFS(fstest.MapFS{}), src)
	require.Equal(t, http.StatusNotFound, get(t, hc, acme+"/none"))
	stranger := struct{ src oauth2.TokenSource }{src}
	for _, v := range []any{src, stranger, &stranger, oauth2.Transport{Source: src}, &oauth2.Transport{Source: src}, hc, *hc, hc.Transport} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
			out := fmt.Sprintf(verb, v)
			for _, secret := range []string{"secret-1", key, fmt.Sprintf("%x", "secret-1"), fmt.Sprintf("%x", key)} {
				assert.NotContains(t, out, secret, "%s of a %T", verb, v)
			}
		}
	}
	assert.Equal(t, "[sessionlock token source]", fmt.Sprintf("%+v", src))

	require.NoError(t, c.Close(t.Context()))
	_, err := src.Token()
	require.Error(t, err)
	assert.NotContains(t, err.Error(), "secret-1")
	assert.NotContains(t, err.Error(), key)
}

// Why the docs send who can to Client.Transport.
func TestOnlyClientTransportKeepsTheTokenFromOtherHosts(t *testing.T) {
	elsewhere := func() *recorded {
		return &recorded{code: func(r *http.Request) (int, string) {
			if r.URL.Host == "api.acme.test" {
				return http.StatusFound, "https://elsewhere.test/"
			}
			return http.StatusOK, ""
		}}
	}
	c := newClient(t, acme, &logins{life: time.Hour}, sessionlock.WithCache(new(sessionlock.MemoryCache)))
	theirs, ours := elsewhere(), elsewhere()
	get(t, over(t.Context(), theirs, sessionlockoauth2.TokenSource(t.Context(), c.For("bob"))), acme)
	assert.Equal(t, []string{"api.acme.test Bearer secret-1", "elsewhere.test Bearer secret-1"}, theirs.sent)

	fixed := &sessionlock.TransportOptions{Key: sessionlock.FixedKey("bob")}
	get(t, &http.Client{Transport: c.Transport(ours, fixed)}, acme)
	assert.Equal(t, []string{"api.acme.test Bearer secret-1", "elsewhere.test "}, ours.sent)
}
