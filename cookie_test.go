package sessionlock_test

// Cookies as a session's token.

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock"
)

// baked returns the cookies of an answer with these Set-Cookie headers.
func baked(lines ...string) []*http.Cookie {
	return (&http.Response{Header: http.Header{"Set-Cookie": lines}}).Cookies()
}

// withCookies returns the Cookie headers of a request after ApplyCookies.
func withCookies(t *testing.T, token sessionlock.Token, own ...string) []string {
	t.Helper()
	r := requestFor(t.Context(), t, http.MethodGet, nil)
	if len(own) > 0 {
		r.Header["Cookie"] = own
	}
	sessionlock.ApplyCookies(r, sessionlock.Session{Token: token})
	return r.Header["Cookie"]
}

func TestTokenFromCookiesKeepsWhatTheAnswerLeavesSet(t *testing.T) {
	future, past := time.Now().Add(time.Hour).UTC().Format(http.TimeFormat), time.Now().Add(-time.Hour).UTC().Format(http.TimeFormat)
	for name, row := range map[string]struct {
		cookies []*http.Cookie
		want    string
	}{
		"none":                                {},
		"nil entries only":                    {cookies: []*http.Cookie{nil, nil}},
		"one":                                 {baked("sid=1"), "sid=1"},
		"its attributes are left out":         {baked("sid=1; Path=/; Domain=acme.test; HttpOnly; Secure; SameSite=Lax; Max-Age=60"), "sid=1"},
		"several, in their order":             {baked("sid=1", "csrf=2", "lb=3"), "sid=1; csrf=2; lb=3"},
		"nil entries between":                 {[]*http.Cookie{nil, {Name: "a", Value: "1"}, nil, {Name: "b", Value: "2"}}, "a=1; b=2"},
		"a later one of the name":             {baked("sid=1", "csrf=2", "sid=3"), "csrf=2; sid=3"},
		"names differ by their case":          {baked("sid=1", "SID=2"), "sid=1; SID=2"},
		"empty value":                         {baked("sid="), "sid="},
		"quoted value":                        {baked(`sid="a b"`), `sid="a b"`},
		"quoted without need":                 {baked(`sid="ab"`), `sid="ab"`},
		"value with a comma":                  {baked("sid=a,b"), `sid="a,b"`},
		"value with an equals sign":           {baked("sid=YWI="), "sid=YWI="},
		"deleted by Max-Age=0":                {baked("sid=1", "csrf=2; Max-Age=0"), "sid=1"},
		"deleted by a negative Max-Age":       {baked("csrf=2; Max-Age=-1", "sid=1"), "sid=1"},
		"deleted by Expires":                  {baked("sid=1", "csrf=2; Expires="+past), "sid=1"},
		"deleted by the oldest Expires":       {baked("sid=1", "csrf=; Expires=Thu, 01 Jan 1970 00:00:00 GMT"), "sid=1"},
		"set and deleted":                     {baked("sid=1", "sid=; Max-Age=0"), ""},
		"set and deleted by Expires":          {baked("sid=1", "csrf=2", "sid=x; Expires="+past), "csrf=2"},
		"deleted and set":                     {baked("sid=; Max-Age=0", "sid=1"), "sid=1"},
		"Expires to come":                     {baked("sid=1; Expires=" + future), "sid=1"},
		"Max-Age counts more than Expires":    {baked("sid=1; Max-Age=60; Expires=" + past), "sid=1"},
		"a deletion whose Expires is to come": {baked("sid=1; Max-Age=0; Expires=" + future), ""},
	} {
		t.Run(name, func(t *testing.T) {
			token := sessionlock.TokenFromCookies(row.cookies)
			assert.Equal(t, row.want, token.Reveal())
			if row.want == "" {
				assert.Equal(t, sessionlock.Token{}, token)
				return
			}
			assert.Equal(t, []string{row.want}, withCookies(t, token))
		})
	}
}

func TestTokenFromCookiesLeavesItsArgumentsAlone(t *testing.T) {
	cookies := baked("sid=1", "csrf=2", "sid=3", "lb=4")
	sessionlock.TokenFromCookies(cookies)
	names := ""
	for _, k := range cookies {
		names += k.Name + k.Value + " "
	}
	assert.Equal(t, "sid1 csrf2 sid3 lb4 ", names)
}

func TestApplyCookiesReplacesItsOwnNamesOnly(t *testing.T) {
	token := sessionlock.TokenFromCookies(baked("sid=ours", "csrf=too"))
	for name, row := range map[string]struct {
		own  []string
		want string
	}{
		"none":                       {nil, "sid=ours; csrf=too"},
		"others stay":                {[]string{"lang=en; theme=dark"}, "lang=en; theme=dark; sid=ours; csrf=too"},
		"same name":                  {[]string{"sid=old"}, "sid=ours; csrf=too"},
		"same name among others":     {[]string{"lang=en; sid=old; theme=dark"}, "lang=en; theme=dark; sid=ours; csrf=too"},
		"same name twice":            {[]string{"sid=old; lang=en; sid=older"}, "lang=en; sid=ours; csrf=too"},
		"in several headers":         {[]string{"lang=en", "csrf=old; theme=dark"}, "lang=en; theme=dark; sid=ours; csrf=too"},
		"another's twice":            {[]string{"lang=en; lang=de"}, "lang=en; lang=de; sid=ours; csrf=too"},
		"others quoted":              {[]string{`lang="en us"`}, `lang="en us"; sid=ours; csrf=too`},
		"a name that ends like ours": {[]string{"xsid=1; sidx=2; SID=3"}, "xsid=1; sidx=2; SID=3; sid=ours; csrf=too"},
	} {
		t.Run(name, func(t *testing.T) {
			assert.Equal(t, []string{row.want}, withCookies(t, token, row.own...))
		})
	}
}

func TestTokenThatIsNoCookieIsSentAsItIs(t *testing.T) {
	for _, token := range []string{"no cookie at all", "sid=1; bare", "sid=\x80"} {
		assert.Equal(t, []string{token}, withCookies(t, sessionlock.NewToken(token), "lang=en"))
	}
}

// formSite is an upstream with a login form and cookies: GET /orders wants sid and
// lb of one login.
type formSite struct {
	*httptest.Server
	mu     sync.Mutex
	logins int
	dead   bool // the latest session
}

func newFormSite(t *testing.T) *formSite {
	t.Helper()
	f := &formSite{}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /login", f.login)
	mux.HandleFunc("GET /orders", f.orders)
	f.Server = httptest.NewServer(mux)
	t.Cleanup(f.Close)
	return f
}

func (f *formSite) login(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.logins++
	if r.Header.Get("Cookie") != "" {
		http.Error(w, "logged in already", http.StatusConflict)
		return
	}
	if r.PostFormValue("password") != "pass" {
		http.SetCookie(w, &http.Cookie{Name: "sid", MaxAge: -1})
		return // 200 and the form again, as sites do
	}
	f.dead = false
	http.SetCookie(w, &http.Cookie{Name: "lb", Value: "node 7", Path: "/"})
	http.SetCookie(w, &http.Cookie{Name: "sid", Value: "anonymous"})
	http.SetCookie(w, &http.Cookie{Name: "hint", MaxAge: -1})
	http.SetCookie(w, &http.Cookie{Name: "sid", Value: fmt.Sprint(r.PostFormValue("user"), f.logins), HttpOnly: true})
}

func (f *formSite) orders(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	sid, err := r.Cookie("sid")
	if _, bad := r.Cookie("lb"); err != nil || bad != nil || f.dead {
		http.Redirect(w, r, "/login", http.StatusFound) // no 401: a form
		return
	}
	fmt.Fprint(w, sid.Value, " ", r.Header.Get("Cookie"))
}

func (f *formSite) revoke() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.dead = true
}

// client returns one that logs in by the form, with its own wrapped http.Client.
func (f *formSite) client(t *testing.T, password string) *web {
	t.Helper()
	w := &web{}
	login := func(ctx context.Context, key string) (sessionlock.Session, error) {
		form := url.Values{"user": {key}, "password": {password}}.Encode()
		r, err := http.NewRequestWithContext(ctx, http.MethodPost, f.URL+"/login", strings.NewReader(form))
		if err != nil {
			return sessionlock.Session{}, err
		}
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		resp, err := w.Do(r)
		if err != nil {
			return sessionlock.Session{}, err
		}
		defer resp.Body.Close()
		if err := sessionlock.LoginStatus(resp); err != nil {
			return sessionlock.Session{}, err
		}
		return sessionlock.Session{Token: sessionlock.TokenFromCookies(resp.Cookies())}, nil
	}
	c, err := sessionlock.New(f.URL, sessionlock.AuthenticatorFunc(login), sessionlock.WithCache(new(sessionlock.MemoryCache)))
	require.NoError(t, err)
	w.c = c
	w.Client = &http.Client{
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: c.Transport(nil, &sessionlock.TransportOptions{
			Apply: sessionlock.ApplyCookies,
			Rejected: func(a *http.Response, _ []byte) sessionlock.Verdict {
				if a.StatusCode == http.StatusFound && a.Header.Get("Location") == "/login" {
					return sessionlock.RejectedBefore
				}
				return sessionlock.NotRejected
			},
		}),
	}
	return w
}

func (f *formSite) get(t *testing.T, w *web) fetched {
	t.Helper()
	r, err := http.NewRequestWithContext(sessionlock.KeyContext(t.Context(), "bob"), http.MethodGet, f.URL+"/orders", http.NoBody)
	require.NoError(t, err)
	r.AddCookie(&http.Cookie{Name: "lang", Value: "en"})
	return w.fetch(r)
}

func TestLoginByFormIsSharedAsCookiesAndRepaired(t *testing.T) {
	f := newFormSite(t)
	w := f.client(t, "pass")
	for n := 1; n <= 2; n++ {
		want := fetched{status: http.StatusOK, body: fmt.Sprintf(`bob%d lang=en; lb="node 7"; sid=bob%d`, n, n)}
		assert.Equal(t, want, f.get(t, w))
		assert.Equal(t, want, f.get(t, w))
		assert.Equal(t, n, f.logins)
		f.revoke()
	}
}

func TestLoginByFormThatSetsNoCookieIsIncomplete(t *testing.T) {
	f := newFormSite(t)
	require.ErrorIs(t, f.get(t, f.client(t, "wrong")).err, sessionlock.ErrIncomplete)
	assert.Equal(t, 1, f.logins)
}
