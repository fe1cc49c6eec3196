package sessionlock_test

// The transport: which requests carry a session, which are sent again, and what
// comes back when there is no session to be had. What it owes net/http as a
// RoundTripper is beside this file.

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock"
	"github.com/sessionlock/sessionlock/sessionlocktest"
)

const (
	ordersURL = acme + "/v1/orders"
	refusal   = "no such session"
)

// farEnd is a base with the upstream behind it: 200 and the token for a session that
// lives, 401 for any other, unless script answers.
type farEnd struct {
	script func(n int, r *http.Request) (*http.Response, error) // of the nth request; nil, nil: as above

	mu     sync.Mutex
	dead   map[string]bool
	got    []shipped
	bodies []*spiedBody // of the answers
}

// shipped is a request as base saw it.
type shipped struct {
	*http.Request
	token, body string
	broken      error // of the body
}

func (w *farEnd) RoundTrip(r *http.Request) (*http.Response, error) {
	s := shipped{Request: r, token: tokenOn(r)}
	if r.Body != nil {
		b, err := io.ReadAll(r.Body)
		_ = r.Body.Close()
		s.body, s.broken = string(b), err
	}
	w.mu.Lock()
	w.got = append(w.got, s)
	n := len(w.got)
	w.mu.Unlock()
	if w.script != nil {
		if a, err := w.script(n, r); a != nil || err != nil {
			return w.answered(a, r), err
		}
	}
	switch {
	case s.broken != nil:
		return nil, s.broken
	case r.ContentLength > 0 && r.ContentLength != int64(len(s.body)):
		return nil, fmt.Errorf("length %d with a body of %d", r.ContentLength, len(s.body))
	case s.token == "" || w.isDead(s.token):
		return w.answered(reply(http.StatusUnauthorized, refusal), r), nil
	}
	return w.answered(reply(http.StatusOK, s.token), r), nil
}

func (w *farEnd) answered(a *http.Response, r *http.Request) *http.Response {
	if a == nil {
		return nil
	}
	if a.Request = r; a.Body != nil {
		b := &spiedBody{Reader: a.Body}
		a.Body = b
		w.mu.Lock()
		w.bodies = append(w.bodies, b)
		w.mu.Unlock()
	}
	return a
}

func (w *farEnd) isDead(token string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.dead[token]
}

func (w *farEnd) kill(token string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.dead == nil {
		w.dead = map[string]bool{}
	}
	w.dead[token] = true
}

func (w *farEnd) sent() []shipped {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.got)
}

// tokens returns what each request carried, "" for none.
func (w *farEnd) tokens() []string {
	out := []string{}
	for _, s := range w.sent() {
		out = append(out, s.token)
	}
	return out
}

// payloads returns the body of each request.
func (w *farEnd) payloads() []string {
	out := []string{}
	for _, s := range w.sent() {
		out = append(out, s.body)
	}
	return out
}

// left returns the answers whose body was not closed.
func (w *farEnd) left() (n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, b := range w.bodies {
		if !b.closed.Load() {
			n++
		}
	}
	return n
}

func tokenOn(r *http.Request) string {
	token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	return token
}

func reply(status int, body string) *http.Response {
	return &http.Response{
		StatusCode: status, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Header: http.Header{},
		Body: io.NopCloser(strings.NewReader(body)), ContentLength: int64(len(body)),
	}
}

// refuseAll is an upstream that knows no session.
func refuseAll(int, *http.Request) (*http.Response, error) {
	return reply(http.StatusUnauthorized, refusal), nil
}

// spiedBody is a body that net/http knows nothing of: no length, no GetBody.
type spiedBody struct {
	io.Reader
	n      atomic.Int64
	ended  atomic.Bool
	closed atomic.Bool
}

func bodyOf(s string) *spiedBody { return &spiedBody{Reader: strings.NewReader(s)} }

func (b *spiedBody) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	b.n.Add(int64(n))
	if err != nil {
		b.ended.Store(true)
	}
	return n, err
}

func (b *spiedBody) Close() error {
	b.closed.Store(true)
	return nil
}

// web is an http.Client with the sessions of c.
type web struct {
	*http.Client
	c   *sessionlock.Client
	far *farEnd
	up  *upstream
}

func newWeb(t *testing.T, to *sessionlock.TransportOptions, opts ...sessionlock.Option) *web {
	t.Helper()
	return webOn(t, new(sessionlock.MemoryCache), &upstream{}, &farEnd{}, to, opts...)
}

// webOn is one of a fleet.
func webOn(t *testing.T, store sessionlock.Cache, u *upstream, base *farEnd, to *sessionlock.TransportOptions, opts ...sessionlock.Option) *web {
	t.Helper()
	c := newClient(t, u, store, opts...)
	return &web{&http.Client{Transport: c.Transport(base, to)}, c, base, u}
}

// fetched is what became of a request.
type fetched struct {
	status int
	body   string
	err    error // also of the body
}

func (w *web) fetch(r *http.Request) (f fetched) {
	resp, err := w.Do(r)
	if err != nil {
		return fetched{err: err}
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return fetched{resp.StatusCode, string(b), err}
}

func (w *web) get(t *testing.T) fetched {
	t.Helper()
	return w.fetch(forBob(t, http.MethodGet, nil))
}

// assertServed asserts that a request of bob is answered, with this token.
func (w *web) assertServed(t *testing.T, token string) {
	t.Helper()
	assert.Equal(t, fetched{status: http.StatusOK, body: token}, w.get(t))
}

// refusedOnce has bob's first session refused from now on.
func (w *web) refusedOnce(t *testing.T) {
	t.Helper()
	require.Equal(t, "bob/1", tokenOf(t, w.c, "bob"))
	w.far.kill("bob/1")
}

func forBob(t *testing.T, method string, body io.Reader) *http.Request {
	t.Helper()
	return requestFor(sessionlock.KeyContext(t.Context(), "bob"), t, method, body)
}

func requestFor(ctx context.Context, t *testing.T, method string, body io.Reader) *http.Request {
	t.Helper()
	r, err := http.NewRequestWithContext(ctx, method, ordersURL, body)
	require.NoError(t, err)
	return r
}

// posted is a request with a body of known length and no GetBody.
func posted(t *testing.T, body io.ReadCloser, length int64) *http.Request {
	t.Helper()
	r := forBob(t, http.MethodPost, body)
	r.ContentLength = length
	return r
}

// The line that gives an http.Client sessions, against the fake upstream.
func TestTransportRepairsARequestOnce(t *testing.T) {
	u := sessionlocktest.NewUpstream(t)
	c, err := sessionlock.New(u.URL, u, sessionlock.WithCache(new(sessionlock.MemoryCache)))
	require.NoError(t, err)
	hc := &http.Client{Transport: c.Transport(nil, nil)}
	ctx := sessionlock.KeyContext(t.Context(), "bob")
	get := func() (int, string) {
		t.Helper()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.URL+"/whoami", http.NoBody)
		require.NoError(t, err)
		resp, err := hc.Do(req)
		require.NoError(t, err)
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		assert.Same(t, req, resp.Request)
		assert.Empty(t, req.Header)
		return resp.StatusCode, strings.TrimSpace(string(body))
	}
	for range 2 {
		status, body := get()
		assert.Equal(t, http.StatusOK, status)
		assert.JSONEq(t, `{"user":"bob"}`, body)
		u.Revoke("bob")
	}
	total, _ := u.Logins("bob")
	assert.Equal(t, 2, total)
}

// Renewal

func TestLateRefusalOfARequestCostsNoLogin(t *testing.T) {
	for name, peer := range map[string]bool{"renewed by this process": false, "renewed by a peer": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				answer := make(chan struct{})
				store, u, base := new(sessionlock.MemoryCache), &upstream{}, &farEnd{}
				base.script = func(n int, _ *http.Request) (*http.Response, error) {
					if n == 1 {
						<-answer
					}
					return nil, nil
				}
				us := webOn(t, store, u, base, nil)
				other := us
				if peer {
					other = webOn(t, store, u, base, nil)
				}
				slow, got := forBob(t, http.MethodGet, nil), make(chan fetched, 1)
				go func() { got <- us.fetch(slow) }()
				synctest.Wait()
				base.kill("bob/1")
				other.assertServed(t, "bob/2")
				other.assertServed(t, "bob/2")
				close(answer)
				assert.Equal(t, fetched{status: http.StatusOK, body: "bob/2"}, <-got)
				us.assertServed(t, "bob/2")
				assert.Equal(t, 2, u.logins())
			})
		})
	}
}

func TestThousandRequestsThatMeetOneRevocationCostOneLogin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWeb(t, nil)
		w.refusedOnce(t)
		w.up.takes = time.Second
		w.far.script = func(int, *http.Request) (*http.Response, error) {
			time.Sleep(10 * time.Millisecond) // so that all are sent before one is answered
			return nil, nil
		}
		got := make(chan fetched, 1000)
		for range cap(got) {
			r := forBob(t, http.MethodPost, strings.NewReader("one of a thousand"))
			go func() { got <- w.fetch(r) }()
		}
		for range cap(got) {
			require.Equal(t, fetched{status: http.StatusOK, body: "bob/2"}, <-got)
		}
		sent := map[string]int{}
		for _, s := range w.far.sent() {
			sent[s.token+" with "+s.body]++
		}
		assert.Equal(t, map[string]int{"bob/1 with one of a thousand": 1000, "bob/2 with one of a thousand": 1000}, sent)
		assert.Equal(t, 2, w.up.logins())
	})
}

func TestRequestsDuringARenewalWaitForIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWeb(t, nil)
		w.refusedOnce(t)
		w.up.takes = 5 * time.Second
		start, got := time.Now(), make(chan fetched, 101)
		ask := func() {
			r := forBob(t, http.MethodGet, nil)
			go func() { got <- w.fetch(r) }()
		}
		ask()
		time.Sleep(time.Second)
		for range 100 {
			ask()
		}
		synctest.Wait()
		assert.Equal(t, []string{"bob/1"}, w.far.tokens())
		for range cap(got) {
			require.Equal(t, fetched{status: http.StatusOK, body: "bob/2"}, <-got)
		}
		assert.Equal(t, 5*time.Second, time.Since(start))
		assert.Len(t, w.far.sent(), 102)
		assert.Equal(t, 2, w.up.logins())
	})
}

func TestRequestThatIsRefusedForEverCostsTwoCallsAndOneRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, u, base := new(sessionlock.MemoryCache), &upstream{}, &farEnd{script: refuseAll}
		w := webOn(t, store, u, base, nil)
		require.Equal(t, "bob/1", tokenOf(t, w.c, "bob"))
		assert.Equal(t, fetched{status: http.StatusUnauthorized, body: refusal}, w.get(t))
		assert.Equal(t, []string{"bob/1", "bob/2"}, base.tokens())
		assert.Equal(t, 2, u.logins())
		assert.Zero(t, base.left())
		assert.True(t, base.bodies[0].ended.Load(), "the first answer was not read to its end")

		base.script = nil
		time.Sleep(time.Minute)
		webOn(t, store, u, base, nil).assertServed(t, "bob/3") // nobody in the fleet uses what was refused
	})
}

func TestRefusalsForEverAreNoStorm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWeb(t, nil)
		w.far.script = refuseAll
		got := make(chan fetched, 1000)
		for i := range cap(got) {
			r := forBob(t, http.MethodGet, nil)
			r.Header.Set("X-Call", fmt.Sprint(i))
			go func() { got <- w.fetch(r) }()
			time.Sleep(10 * time.Millisecond)
		}
		refused := 0
		for range cap(got) {
			f := <-got
			if f.err == nil {
				refused++
				require.Equal(t, fetched{status: http.StatusUnauthorized, body: refusal}, f)
				continue
			}
			require.ErrorIs(t, f.err, sessionlock.ErrRejected)
			require.ErrorIs(t, f.err, sessionlock.ErrSuppressed)
		}
		assert.Positive(t, refused)
		assert.LessOrEqual(t, w.up.logins(), 6)
		calls := map[string]int{}
		for _, s := range w.far.sent() {
			calls[s.Header.Get("X-Call")]++
			require.LessOrEqual(t, calls[s.Header.Get("X-Call")], 2)
		}
	})
}

func TestSecondRequestKnowsWhyItIsSentAgain(t *testing.T) {
	w := newWeb(t, nil)
	w.refusedOnce(t)
	w.assertServed(t, "bob/2")
	sent := w.far.sent()
	require.Len(t, sent, 2)
	require.NoError(t, sessionlock.RejectionFromContext(sent[0].Context()))
	assert.EqualError(t, sessionlock.RejectionFromContext(sent[1].Context()), "sessionlock: the upstream refused the session: 401 Unauthorized")
}

// Requests made inside

// insider is a web whose login, refresh and logout make a request each, with what
// ctx makes of the context they were given. Such a request must go out bare and
// its answer come back as it is.
type insider struct {
	*web
	ctx     func(context.Context) context.Context
	t       *testing.T
	login   int
	refresh int
	logout  int
}

func newInsider(t *testing.T, to *sessionlock.TransportOptions, ctx func(context.Context) context.Context, opts ...sessionlock.Option) *insider {
	t.Helper()
	in := &insider{ctx: ctx, t: t}
	in.web = newWeb(t, to, append([]sessionlock.Option{sessionlock.WithLogout(in.logOut)}, opts...)...)
	in.up.life = 10 * time.Minute
	in.up.script = func(ctx context.Context, key string, n int) (sessionlock.Session, error) {
		in.login++
		in.request(ctx)
		s := in.up.grant(key, n)
		s.RefreshExpiry = s.Expiry.Add(time.Hour)
		return s, nil
	}
	return in
}

func (in *insider) request(ctx context.Context) {
	n := len(in.far.sent())
	f := in.fetch(requestFor(in.ctx(ctx), in.t, http.MethodPost, strings.NewReader("password")))
	assert.Equal(in.t, fetched{status: http.StatusUnauthorized, body: refusal}, f)
	if sent := in.far.sent(); assert.Len(in.t, sent, n+1) {
		assert.Empty(in.t, sent[n].Header)
		assert.Equal(in.t, "password", sent[n].body)
	}
}

func (in *insider) refreshed(ctx context.Context, key string, _ sessionlock.Session) (sessionlock.Session, error) {
	in.refresh++
	in.request(ctx)
	return in.up.grant(key, 100), nil
}

func (in *insider) logOut(ctx context.Context, _ sessionlock.Session) error {
	in.logout++
	in.request(ctx)
	return nil
}

func TestRequestsOfALoginRefreshOrLogoutGoOutBare(t *testing.T) {
	asGiven := func(ctx context.Context) context.Context { return ctx }
	for name, how := range map[string]struct {
		to  *sessionlock.TransportOptions
		ctx func(context.Context) context.Context
	}{
		"with the context that was given": {nil, asGiven},
		"with its own key once more":      {nil, func(ctx context.Context) context.Context { return sessionlock.KeyContext(ctx, "bob") }},
		"with a fixed key":                {&sessionlock.TransportOptions{Key: sessionlock.FixedKey("bob")}, asGiven},
		"with a key that cannot be found": {&sessionlock.TransportOptions{Key: func(*http.Request) (string, error) { return "", errDead }}, asGiven},
		"detached":                        {nil, context.WithoutCancel},
		"where Allow says yes":            {&sessionlock.TransportOptions{Allow: func(sessionlock.Session, *url.URL) bool { return true }}, asGiven},
	} {
		t.Run(name+", in a login and a logout", func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				in := newInsider(t, how.to, how.ctx)
				assert.Equal(t, "bob/1", tokenOf(t, in.c, "bob"))
				require.NoError(t, in.c.Logout(t.Context(), "bob"))
				assert.Equal(t, []int{1, 1}, []int{in.login, in.logout})
			})
		})
		t.Run(name+", ahead of time", func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				in := newInsider(t, how.to, how.ctx, sessionlock.WithRefreshAhead(time.Minute))
				assert.Equal(t, "bob/1", tokenOf(t, in.c, "bob"))
				time.Sleep(9*time.Minute + 20*time.Second)
				assert.Equal(t, "bob/1", tokenOf(t, in.c, "bob"))
				synctest.Wait()
				assert.Equal(t, "bob/2", tokenOf(t, in.c, "bob"))
				assert.Equal(t, 2, in.login)
			})
		})
		t.Run(name+", in a refresh", func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var in *insider
				in = newInsider(t, how.to, how.ctx, sessionlock.WithRefresh(
					func(ctx context.Context, key string, old sessionlock.Session) (sessionlock.Session, error) {
						return in.refreshed(ctx, key, old)
					}))
				assert.Equal(t, "bob/1", tokenOf(t, in.c, "bob"))
				time.Sleep(10 * time.Minute)
				assert.Equal(t, "bob/100", tokenOf(t, in.c, "bob"))
				assert.Equal(t, []int{1, 1}, []int{in.login, in.refresh})
			})
		})
	}
}

func TestLogoutMakesNoRequestWithAnotherSession(t *testing.T) {
	in := newInsider(t, nil, func(ctx context.Context) context.Context { return sessionlock.KeyContext(ctx, "admin") })
	require.NoError(t, in.c.Logout(t.Context(), "nobody"))
	put(t, in.c, "elsewhere")
	require.NoError(t, in.c.Logout(t.Context(), "bob"))
	assert.Equal(t, []int{0, 1}, []int{in.login, in.logout})
}

func TestLoginOfOneKeyMayUseTheSessionOfAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWeb(t, nil)
		w.up.script = func(ctx context.Context, key string, n int) (sessionlock.Session, error) {
			if key == "admin" {
				return w.up.grant(key, n), nil
			}
			f := w.fetch(requestFor(sessionlock.KeyContext(ctx, "admin"), t, http.MethodGet, nil))
			assert.Equal(t, fetched{status: http.StatusOK, body: "admin/2"}, f)
			return w.up.grant(key, n), nil
		}
		w.assertServed(t, "bob/1")
		assert.Equal(t, []string{"admin/2", "bob/1"}, w.far.tokens())
	})
}

// Two logins that need each other's session must not wait for each other.
func TestLoginsThatNeedEachOtherEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWeb(t, nil)
		w.up.script = func(ctx context.Context, key string, n int) (sessionlock.Session, error) {
			other := map[string]string{"bob": "admin", "admin": "bob"}[key]
			f := w.fetch(requestFor(sessionlock.KeyContext(ctx, other), t, http.MethodGet, nil))
			assert.NoError(t, f.err)
			return w.up.grant(key, n), nil
		}
		start := time.Now()
		w.assertServed(t, "bob/1")
		assert.Equal(t, []string{"", "admin/2", "bob/1"}, w.far.tokens())
		assert.Zero(t, time.Since(start))
	})
}

func TestLoginsAndLogoutsOfOneClientMayUseAnothers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		other := newWeb(t, nil)
		use := func(ctx context.Context) {
			f := other.fetch(requestFor(ctx, t, http.MethodGet, nil))
			assert.Equal(t, fetched{status: http.StatusOK, body: "bob/1"}, f)
		}
		u := &upstream{}
		u.script = func(ctx context.Context, key string, n int) (sessionlock.Session, error) {
			use(ctx)
			return u.grant(key, n), nil
		}
		c := newClient(t, u, new(sessionlock.MemoryCache), sessionlock.WithLogout(func(ctx context.Context, _ sessionlock.Session) error {
			use(sessionlock.KeyContext(ctx, "bob"))
			return nil
		}))
		assert.Equal(t, "bob/1", tokenOf(t, c, "bob"))
		require.NoError(t, c.Logout(t.Context(), "bob"))
		assert.Len(t, other.far.sent(), 2)
	})
}

func TestNestedTransportsOfOneClientRepairOnce(t *testing.T) {
	w := newWeb(t, nil)
	w.far.script = refuseAll
	base := w.far
	rt := w.c.Transport(base, nil)
	for range 3 {
		rt = w.c.Transport(rt, &sessionlock.TransportOptions{Key: sessionlock.FixedKey("bob"), Apply: sessionlock.ApplyHeader("X-Outer")})
	}
	w.Transport = rt
	assert.Equal(t, fetched{status: http.StatusUnauthorized, body: refusal}, w.get(t))
	assert.Equal(t, 2, w.up.logins())
	sent := base.sent()
	require.Len(t, sent, 2)
	for i, s := range sent {
		assert.Equal(t, http.Header{"X-Outer": {bobs(1, 2)[i]}}, s.Header)
	}
}

func TestTransportsOfTwoClientsBothApply(t *testing.T) {
	inner := newWeb(t, nil)
	outer := newClient(t, &upstream{}, new(sessionlock.MemoryCache))
	inner.Transport = outer.Transport(inner.Transport, &sessionlock.TransportOptions{Apply: sessionlock.ApplyHeader("X-Outer")})
	inner.assertServed(t, "bob/1")
	assert.Equal(t, http.Header{"Authorization": {"Bearer bob/1"}, "X-Outer": {"bob/1"}}, inner.far.sent()[0].Header)
}

func TestRequestsInsideADoAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWeb(t, nil)
		w.far.script = refuseAll
		err := w.c.Do(t.Context(), "bob", func(ctx context.Context, _ sessionlock.Session) error {
			f := w.fetch(requestFor(sessionlock.KeyContext(ctx, "bob"), t, http.MethodGet, nil))
			return sessionlock.Reject(errors.Join(errDead, f.err))
		})
		require.ErrorIs(t, err, sessionlock.ErrRejected)
		require.ErrorIs(t, err, errDead)
		assert.LessOrEqual(t, len(w.far.sent()), 4)
		assert.LessOrEqual(t, w.up.logins(), 3)
	})
}

// Bodies

func TestBodyIsSentAgainIfItCanBe(t *testing.T) {
	text := func(n int) string { return strings.Repeat("0123456789", n/10+1)[:n] }
	getBody := func(s string) func() (io.ReadCloser, error) {
		return func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader(s)), nil }
	}
	for name, row := range map[string]struct {
		body    string
		length  int64
		getBody func() (io.ReadCloser, error)
		buffer  int
		times   int
	}{
		"short":                                {body: "short", length: 5, times: 2},
		"a byte":                               {body: "x", length: 1, times: 2},
		"as long as the buffer":                {body: text(64 << 10), length: 64 << 10, times: 2},
		"longer than the buffer":               {body: text(64<<10 + 1), length: 64<<10 + 1, times: 1},
		"as long as a buffer of ten":           {body: text(10), length: 10, buffer: 10, times: 2},
		"longer than a buffer of ten":          {body: text(11), length: 11, buffer: 10, times: 1},
		"without a buffer":                     {body: "x", length: 1, buffer: -1, times: 1},
		"of unknown length":                    {body: "stream", length: -1, times: 2},
		"of a length that nobody set":          {body: "stream", length: 0, times: 2},
		"of unknown length, the buffer's":      {body: text(10), length: -1, buffer: 10, times: 2},
		"of unknown length, and longer":        {body: text(11), length: -1, buffer: 10, times: 1},
		"of unknown length, much longer":       {body: text(200 << 10), length: -1, times: 1},
		"of unknown length, without a buffer":  {body: "stream", length: -1, buffer: -1, times: 1},
		"with GetBody":                         {body: "again", length: 5, getBody: getBody("again"), times: 2},
		"with GetBody, without a buffer":       {body: "again", length: 5, getBody: getBody("again"), buffer: -1, times: 2},
		"with GetBody, longer than the buffer": {body: text(100), length: 100, getBody: getBody(text(100)), buffer: 10, times: 2},
		"with GetBody, of unknown length":      {body: "again", length: -1, getBody: getBody("again"), times: 2},
		"with GetBody that fails": {body: "once", length: 4, times: 1, getBody: func() (io.ReadCloser, error) {
			return nil, errDead
		}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWeb(t, &sessionlock.TransportOptions{Buffer: row.buffer})
			w.refusedOnce(t)
			body := bodyOf(row.body)
			r := posted(t, body, row.length)
			r.GetBody = row.getBody
			f := w.fetch(r)
			assert.True(t, body.closed.Load())
			assert.Equal(t, slices.Repeat([]string{row.body}, row.times), w.far.payloads())
			assert.Equal(t, bobs(1, row.times), w.far.tokens())
			for _, s := range w.far.sent() {
				assert.Equal(t, row.length, s.ContentLength)
			}
			if row.times == 2 {
				assert.Equal(t, fetched{status: http.StatusOK, body: "bob/2"}, f)
			} else {
				assert.Equal(t, fetched{status: http.StatusUnauthorized, body: refusal}, f)
			}
			w.assertServed(t, "bob/2") // whatever became of the request, its session is over
			assert.Zero(t, w.far.left())
		})
	}
}

// What has not been read to its end when the answer comes is not there to be sent.
func TestStreamThatGoesOnIsNotSentAgain(t *testing.T) {
	w := newWeb(t, nil)
	require.Equal(t, "bob/1", tokenOf(t, w.c, "bob"))
	sent := 0
	w.Transport = w.c.Transport(tripFunc(func(r *http.Request) (*http.Response, error) {
		sent++
		_, err := io.ReadFull(r.Body, make([]byte, 4))
		require.NoError(t, err)
		return reply(http.StatusUnauthorized, refusal), nil
	}), nil)
	assert.Equal(t, fetched{status: http.StatusUnauthorized, body: refusal}, w.fetch(posted(t, bodyOf("body, and more"), -1)))
	assert.Equal(t, 1, sent)
}

func TestRequestWithoutABodyIsSentAgainWithoutOne(t *testing.T) {
	for name, body := range map[string]io.ReadCloser{"nil": nil, "NoBody": http.NoBody} {
		t.Run(name, func(t *testing.T) {
			w := newWeb(t, &sessionlock.TransportOptions{Buffer: -1})
			w.refusedOnce(t)
			r := forBob(t, http.MethodDelete, nil)
			r.Body = body
			assert.Equal(t, fetched{status: http.StatusOK, body: "bob/2"}, w.fetch(r))
			assert.Equal(t, []string{"", ""}, w.far.payloads())
		})
	}
}

type tripFunc func(*http.Request) (*http.Response, error)

func (f tripFunc) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// It may read on when it has answered.
func TestBodyThatWasSentIsForBaseToClose(t *testing.T) {
	for name, row := range map[string]struct {
		url   string
		dead  bool
		wants int // sent
	}{
		"sent once":         {ordersURL, false, 1},
		"sent again":        {ordersURL, true, 2},
		"without a session": {"https://elsewhere.test/", false, 1},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWeb(t, nil)
			require.Equal(t, "bob/1", tokenOf(t, w.c, "bob"))
			var sent []io.ReadCloser
			w.Transport = w.c.Transport(tripFunc(func(r *http.Request) (*http.Response, error) {
				sent = append(sent, r.Body)
				if row.dead && len(sent) == 1 {
					return reply(http.StatusUnauthorized, refusal), nil
				}
				return reply(http.StatusOK, ""), nil
			}), nil)
			r, err := http.NewRequestWithContext(sessionlock.KeyContext(t.Context(), "bob"), http.MethodPost, row.url, bodyOf("body"))
			require.NoError(t, err)
			r.GetBody = func() (io.ReadCloser, error) { return bodyOf("body"), nil }
			assert.Equal(t, fetched{status: http.StatusOK}, w.fetch(r))
			assert.Len(t, sent, row.wants)
			for _, b := range sent {
				assert.False(t, b.(*spiedBody).closed.Load())
			}
		})
	}
}

func TestBodyThatIsNotKeptIsNotReadAhead(t *testing.T) {
	for name, row := range map[string]struct{ length, buffer int }{
		"of unknown length": {-1, 0}, "of a length that nobody set": {0, 0}, "longer than the buffer": {11, 10}, "without a buffer": {5, -1},
	} {
		t.Run(name, func(t *testing.T) {
			w, body := newWeb(t, nil), bodyOf("body")
			w.Transport = w.c.Transport(tripFunc(func(r *http.Request) (*http.Response, error) {
				assert.Zero(t, body.n.Load())
				assert.False(t, body.ended.Load())
				return reply(http.StatusOK, ""), nil
			}), &sessionlock.TransportOptions{Buffer: row.buffer})
			assert.Equal(t, fetched{status: http.StatusOK}, w.fetch(posted(t, body, int64(row.length))))
		})
	}
}

// What net/http does by itself on a broken connection.
func TestBaseMayReopenTheBodyOfEachTry(t *testing.T) {
	for name, known := range map[string]bool{"buffered": false, "with GetBody": true} {
		t.Run(name, func(t *testing.T) {
			w := newWeb(t, nil)
			w.refusedOnce(t)
			w.far.script = func(_ int, r *http.Request) (*http.Response, error) {
				b, err := r.GetBody()
				if !assert.NoError(t, err) {
					return nil, err
				}
				again, err := io.ReadAll(b)
				assert.NoError(t, err)
				assert.Equal(t, "short", string(again))
				return nil, nil
			}
			r := posted(t, bodyOf("short"), 5)
			if known {
				r = forBob(t, http.MethodPost, strings.NewReader("short"))
			}
			assert.Equal(t, fetched{status: http.StatusOK, body: "bob/2"}, w.fetch(r))
			assert.Equal(t, []string{"short", "short"}, w.far.payloads())
		})
	}
}

func TestCallersRequestIsLeftAsItIs(t *testing.T) {
	w := newWeb(t, nil)
	w.refusedOnce(t)
	body := bodyOf("short")
	r := posted(t, body, 5)
	r.Header = nil
	resp, err := w.Transport.RoundTrip(r)
	require.NoError(t, err)
	defer resp.Body.Close()
	assert.Equal(t, http.StatusOK, resp.StatusCode)
	assert.Same(t, r, resp.Request)
	assert.Nil(t, r.Header)
	assert.Nil(t, r.GetBody)
	assert.Same(t, body, r.Body)
}

// hiccup reads s, fails once with err, and goes on with rest.
func hiccup(s string, err error, rest string) io.Reader {
	failed := false
	return io.MultiReader(strings.NewReader(s), readFunc(func([]byte) (int, error) {
		if failed {
			return 0, io.EOF
		}
		failed = true
		return 0, err
	}), strings.NewReader(rest))
}

type readFunc func([]byte) (int, error)

func (f readFunc) Read(p []byte) (int, error) { return f(p) }

func TestBodyThatIsNotWhatItSaysBehavesAsWithoutTheTransport(t *testing.T) {
	for name, body := range map[string]func() io.Reader{
		"shorter":              func() io.Reader { return strings.NewReader("1234") },
		"empty":                func() io.Reader { return strings.NewReader("") },
		"longer":               func() io.Reader { return strings.NewReader("123456") },
		"much longer":          func() io.Reader { return strings.NewReader(strings.Repeat("12345", 1000)) },
		"failing":              func() io.Reader { return hiccup("123", errDead, "") },
		"failing at its end":   func() io.Reader { return hiccup("12345", errDead, "") },
		"failing at once":      func() io.Reader { return hiccup("", errDead, "") },
		"failing in its midst": func() io.Reader { return hiccup("123", errDead, "45") },
	} {
		t.Run(name, func(t *testing.T) {
			run := func(w *web) (shipped, string) {
				t.Helper()
				b := &spiedBody{Reader: body()}
				f := w.fetch(posted(t, b, 5))
				assert.True(t, b.closed.Load())
				assert.Zero(t, f.status)
				require.Len(t, w.far.sent(), 1)
				return w.far.sent()[0], f.err.Error()
			}
			bare := &farEnd{}
			wanted, wantErr := run(&web{Client: &http.Client{Transport: bare}, far: bare})
			w := newWeb(t, nil)
			got, err := run(w)
			assert.Equal(t, wanted.body, got.body)
			assert.Equal(t, wanted.broken, got.broken)
			assert.Equal(t, wantErr, err)
			w.assertServed(t, "bob/1") // nobody refused it

			w.far.kill("bob/1")
			w.far.script = func(_ int, r *http.Request) (*http.Response, error) {
				if r.Method == http.MethodPost { // refused by its head
					return refuseAll(0, r)
				}
				return nil, nil
			}
			f := w.fetch(posted(t, &spiedBody{Reader: body()}, 5))
			assert.Equal(t, fetched{status: http.StatusUnauthorized, body: refusal}, f)
			assert.Equal(t, []string{"bob/1", "bob/1", "bob/1"}, w.far.tokens())
		})
	}
}

func TestBodyThatBlocksIsNotWaitedForLongerThanItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWeb(t, nil)
		block := make(chan struct{})
		defer close(block)
		body := &spiedBody{Reader: readFunc(func([]byte) (int, error) {
			<-block // closing does not end it
			return 0, io.EOF
		})}
		ctx, cancel := context.WithTimeout(sessionlock.KeyContext(t.Context(), "bob"), time.Second)
		defer cancel()
		start, r := time.Now(), posted(t, body, 5).WithContext(ctx)
		require.ErrorIs(t, w.fetch(r).err, context.DeadlineExceeded)
		assert.Equal(t, time.Second, time.Since(start))
		assert.True(t, body.closed.Load())
		assert.Empty(t, w.far.sent())
		w.assertServed(t, "bob/1")
	})
}

// Verdicts

func maybeExecuted(a *http.Response, _ []byte) sessionlock.Verdict {
	if a.StatusCode == http.StatusUnauthorized {
		return sessionlock.RejectedDuring
	}
	return sessionlock.NotRejected
}

func TestRequestThatMayHaveBeenExecutedIsSentAgainIfThatIsSafe(t *testing.T) {
	type row struct {
		method string
		header http.Header
		safe   bool // by its context
		stream bool
		times  int
	}
	rows := map[string]row{
		"no method":                          {times: 2},
		"Idempotency-Key":                    {method: http.MethodPost, header: http.Header{"Idempotency-Key": {"7"}}, times: 2},
		"Idempotency-Key, empty":             {method: http.MethodPost, header: http.Header{"Idempotency-Key": nil}, times: 2},
		"X-Idempotency-Key":                  {method: http.MethodPost, header: http.Header{"X-Idempotency-Key": {"7"}}, times: 2},
		"another header":                     {method: http.MethodPost, header: http.Header{"Idempotency": {"7"}}, times: 1},
		"IdempotentContext":                  {method: http.MethodPost, safe: true, times: 2},
		"IdempotentContext, a stream":        {method: http.MethodPost, safe: true, stream: true, times: 1},
		"Idempotency-Key, a stream":          {method: http.MethodPost, header: http.Header{"Idempotency-Key": {"7"}}, stream: true, times: 1},
		"GET of a stream":                    {method: http.MethodGet, stream: true, times: 1},
		"a method with the name of one safe": {method: "get", times: 1},
	}
	for _, method := range []string{http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace} {
		rows[method] = row{method: method, times: 2}
	}
	for _, method := range []string{http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete, http.MethodConnect, "MERGE"} {
		rows[method] = row{method: method, times: 1}
	}
	for name, row := range rows {
		t.Run(name, func(t *testing.T) {
			opts := &sessionlock.TransportOptions{Rejected: maybeExecuted}
			if row.stream {
				opts.Buffer = -1
			}
			w := newWeb(t, opts)
			w.refusedOnce(t)
			ctx := sessionlock.KeyContext(t.Context(), "bob")
			if row.safe {
				ctx = sessionlock.IdempotentContext(ctx)
			}
			r := requestFor(ctx, t, http.MethodGet, strings.NewReader("body"))
			r.Method = row.method
			if row.stream {
				r.Body, r.GetBody, r.ContentLength = bodyOf("body"), nil, -1
			}
			if row.header != nil {
				r.Header = row.header
			}
			resp, err := w.Transport.RoundTrip(r)
			require.NoError(t, err)
			defer resp.Body.Close()
			got, err := io.ReadAll(resp.Body)
			require.NoError(t, err)
			if row.times == 2 {
				assert.Equal(t, "bob/2", string(got))
			} else {
				assert.Equal(t, refusal, string(got))
			}
			assert.Equal(t, slices.Repeat([]string{"body"}, row.times), w.far.payloads())
			w.assertServed(t, "bob/2")
			assert.Equal(t, 2, w.up.logins())
		})
	}
}

func TestOnlyTheStatusOfADeadSessionIsARefusalByDefault(t *testing.T) {
	for _, status := range []int{200, 204, 302, 400, 402, 403, 404, 407, 419, 440, 500, 503} {
		w := newWeb(t, nil)
		w.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
		w.far.script = func(int, *http.Request) (*http.Response, error) { return reply(status, ""), nil }
		assert.Equal(t, fetched{status: status}, w.get(t))
		assert.Equal(t, []string{"bob/1"}, w.far.tokens())
		w.far.script = nil
		w.assertServed(t, "bob/1")
	}
}

// byFileMaker says what FileMaker's codes mean.
func byFileMaker(a *http.Response, head []byte) sessionlock.Verdict {
	switch {
	case a.StatusCode == http.StatusUnauthorized && strings.Contains(string(head), `"code":"952"`):
		return sessionlock.RejectedBefore
	case a.StatusCode == http.StatusInternalServerError && strings.Contains(string(head), `"code":"112"`):
		return sessionlock.RejectedDuring
	}
	return sessionlock.NotRejected
}

func TestAnswerIsJudgedByTheHeadOfItsBody(t *testing.T) {
	said := func(code string) string {
		return `{"messages":[{"code":"` + code + `"}],"response":{}}` + strings.Repeat(" ", 5000)
	}
	for name, row := range map[string]struct {
		status       int
		code, method string
		times        int
		over         bool
	}{
		"401 of a dead session":                  {http.StatusUnauthorized, "952", http.MethodPost, 2, true},
		"401 of something else":                  {http.StatusUnauthorized, "212", http.MethodPost, 1, false},
		"500 of a lost window, read":             {http.StatusInternalServerError, "112", http.MethodGet, 2, true},
		"500 of a lost window, written":          {http.StatusInternalServerError, "112", http.MethodPost, 1, true},
		"500 of something else":                  {http.StatusInternalServerError, "101", http.MethodGet, 1, false},
		"the code of one with another's status":  {http.StatusInternalServerError, "952", http.MethodGet, 1, false},
		"a success that quotes a dead session's": {http.StatusOK, "952", http.MethodGet, 1, false},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWeb(t, &sessionlock.TransportOptions{Rejected: byFileMaker})
			w.far.script = func(n int, _ *http.Request) (*http.Response, error) {
				if n == 1 {
					return reply(row.status, said(row.code)), nil
				}
				return nil, nil
			}
			f := w.fetch(forBob(t, row.method, nil))
			if row.times == 2 {
				assert.Equal(t, fetched{status: http.StatusOK, body: "bob/2"}, f)
			} else {
				assert.Equal(t, fetched{status: row.status, body: said(row.code)}, f)
			}
			assert.Len(t, w.far.sent(), row.times)
			next := "bob/1"
			if row.over {
				next = "bob/2"
			}
			w.assertServed(t, next)
		})
	}
}

func TestHeadOfAnAnswerIsPutBack(t *testing.T) {
	text := strings.Repeat("0123456789abcdef", 1000)
	for _, peek := range []int{-1, 0, 1, 10, 1000} {
		most := peek
		if peek == 0 {
			most = 4 << 10
		}
		for _, n := range []int{0, 1, 9, 10, 11, 999, 4095, 4096, 4097, 16000} {
			for kind, of := range map[string]struct {
				status  int
				unknown bool
				blind   bool
			}{
				"200 with a length":    {status: 200},
				"401 with a length":    {status: 401},
				"400 without a length": {status: 400, unknown: true},
				"503 without a length": {status: 503, unknown: true},
				"200 without a length": {status: 200, unknown: true, blind: true},
				"399 without a length": {status: 399, unknown: true, blind: true},
			} {
				var head []byte
				judged := 0
				w := newWeb(t, &sessionlock.TransportOptions{Peek: peek, Rejected: func(_ *http.Response, b []byte) sessionlock.Verdict {
					head = b
					judged++
					return sessionlock.NotRejected
				}})
				w.far.script = func(int, *http.Request) (*http.Response, error) {
					a := reply(of.status, text[:n])
					if of.unknown {
						a.ContentLength = -1
					}
					return a, nil
				}
				what := fmt.Sprintf("%s, %d bytes, peek %d", kind, n, peek)
				require.Equal(t, fetched{status: of.status, body: text[:n]}, w.get(t), what)
				require.Equal(t, 1, judged, what)
				if of.blind || peek < 0 {
					require.Empty(t, head, what)
				} else {
					require.Equal(t, text[:min(n, most)], string(head), what)
				}
				require.Zero(t, w.far.left(), what)
			}
		}
	}
}

func TestAnswerThatBreaksWhileItIsJudgedBreaksForItsReaderToo(t *testing.T) {
	for name, row := range map[string]struct {
		body    func() io.Reader
		length  int64
		head    string
		read    string
		wantErr error
	}{
		"in its head":                 {func() io.Reader { return hiccup("12345", errDead, "") }, 20, "12345", "12345", errDead},
		"in its head, length unknown": {func() io.Reader { return hiccup("12345", errDead, "") }, -1, "12345", "12345", errDead},
		"shorter than it says":        {func() io.Reader { return strings.NewReader("12345") }, 20, "12345", "12345", nil},
		"behind its head":             {func() io.Reader { return hiccup("1234567890abc", errDead, "") }, 20, "1234567890", "1234567890abc", errDead},
		"right behind its head":       {func() io.Reader { return hiccup("1234567890", errDead, "") }, 20, "1234567890", "1234567890", errDead},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWeb(t, &sessionlock.TransportOptions{Peek: 10, Rejected: func(_ *http.Response, head []byte) sessionlock.Verdict {
				assert.Equal(t, row.head, string(head))
				return sessionlock.NotRejected
			}})
			w.far.script = func(int, *http.Request) (*http.Response, error) {
				a := reply(http.StatusForbidden, "")
				a.Body, a.ContentLength = io.NopCloser(row.body()), row.length
				return a, nil
			}
			assert.Equal(t, fetched{http.StatusForbidden, row.read, row.wantErr}, w.get(t))
			assert.Zero(t, w.far.left())
		})
	}
}

func TestWholeBodiesMayBeAskedFor(t *testing.T) {
	for name, length := range map[string]int64{"length known": 5, "length unknown": -1} {
		t.Run(name, func(t *testing.T) {
			w := newWeb(t, &sessionlock.TransportOptions{Peek: math.MaxInt, Rejected: func(_ *http.Response, head []byte) sessionlock.Verdict {
				assert.Equal(t, "12345", string(head))
				return sessionlock.NotRejected
			}})
			w.far.script = func(int, *http.Request) (*http.Response, error) {
				a := reply(http.StatusForbidden, "12345")
				a.ContentLength = length
				return a, nil
			}
			assert.NotPanics(t, func() { assert.Equal(t, fetched{status: http.StatusForbidden, body: "12345"}, w.get(t)) })
			assert.Zero(t, w.far.left())
		})
	}
}

func TestConnectionThatWasCutInTheHeadOfAnAnswerIsSeenByItsReader(t *testing.T) {
	w := newWeb(t, &sessionlock.TransportOptions{Rejected: maybeExecuted})
	w.far.script = func(int, *http.Request) (*http.Response, error) {
		a := reply(http.StatusForbidden, "")
		cut := readFunc(func([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }) // as net/http's, whenever it is asked
		a.Body, a.ContentLength = io.NopCloser(io.MultiReader(strings.NewReader("12345"), cut)), 20
		return a, nil
	}
	assert.Equal(t, fetched{http.StatusForbidden, "12345", io.ErrUnexpectedEOF}, w.get(t))
}

func TestStreamIsNeitherJudgedByItsBodyNorDelayed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		more := make(chan struct{}, 1)
		w := newWeb(t, &sessionlock.TransportOptions{Rejected: func(_ *http.Response, head []byte) sessionlock.Verdict {
			assert.Nil(t, head)
			return sessionlock.NotRejected
		}})
		w.far.script = func(int, *http.Request) (*http.Response, error) {
			a := reply(http.StatusOK, "")
			a.ContentLength = -1
			a.Body = io.NopCloser(readFunc(func(p []byte) (int, error) {
				if _, open := <-more; !open {
					return 0, io.EOF
				}
				return copy(p, "event"), nil
			}))
			return a, nil
		}
		resp, err := w.Do(forBob(t, http.MethodGet, nil)) // before there is anything to read
		require.NoError(t, err)
		defer resp.Body.Close()
		for range 3 {
			more <- struct{}{}
			p := make([]byte, 100)
			n, err := resp.Body.Read(p)
			require.NoError(t, err)
			assert.Equal(t, "event", string(p[:n]))
		}
		close(more)
		_, err = resp.Body.Read(make([]byte, 1))
		assert.Equal(t, io.EOF, err)
	})
}

func TestJudgeSeesTheCallersRequest(t *testing.T) {
	r := forBob(t, http.MethodGet, nil)
	w := newWeb(t, &sessionlock.TransportOptions{Rejected: func(a *http.Response, _ []byte) sessionlock.Verdict {
		assert.Same(t, r, a.Request)
		assert.NotNil(t, a.Body)
		return maybeExecuted(a, nil)
	}})
	w.refusedOnce(t)
	w.far.script = func(n int, _ *http.Request) (*http.Response, error) {
		return &http.Response{StatusCode: []int{401, 204}[n-1]}, nil // a base that is careless about bodies
	}
	resp, err := w.Transport.RoundTrip(r)
	require.NoError(t, err)
	assert.Equal(t, http.NoBody, resp.Body)
	require.NoError(t, resp.Body.Close())
	assert.Len(t, w.far.sent(), 2)
}

func TestRefusedAnswerIsReadToItsEndButNotForEver(t *testing.T) {
	for name, n := range map[string]int64{"short": 10, "as long as we read": 64 << 10, "endless": 1 << 40} {
		t.Run(name, func(t *testing.T) {
			w := newWeb(t, nil)
			w.refusedOnce(t)
			w.far.script = func(i int, _ *http.Request) (*http.Response, error) {
				if i > 1 {
					return nil, nil
				}
				a := reply(http.StatusUnauthorized, "")
				endless := readFunc(func(p []byte) (int, error) { return len(p), nil })
				a.Body, a.ContentLength = io.NopCloser(io.LimitReader(endless, n)), n
				return a, nil
			}
			w.assertServed(t, "bob/2")
			first := w.far.bodies[0]
			assert.True(t, first.closed.Load())
			assert.GreaterOrEqual(t, first.n.Load(), min(n, 64<<10))
			assert.LessOrEqual(t, first.n.Load(), int64(64<<10))
		})
	}
}

// No session

func TestRequestWithoutASessionIsNotSent(t *testing.T) {
	notStarted := &sessionlock.TransportOptions{Key: func(*http.Request) (string, error) { return "", errDead }}
	for name, row := range map[string]struct {
		to     *sessionlock.TransportOptions
		opts   []sessionlock.Option
		name   string // of the upstream
		key    string
		nilled bool // base
		before func(t *testing.T, w *web)
		wanted []error
	}{
		"login denied": {key: "bob", wanted: []error{sessionlock.ErrDenied, errDead}, before: func(_ *testing.T, w *web) {
			w.up.script = func(context.Context, string, int) (sessionlock.Session, error) {
				return sessionlock.Session{}, sessionlock.Denied(errDead)
			}
		}},
		"logins suppressed": {key: "bob", wanted: []error{sessionlock.ErrDenied, sessionlock.ErrSuppressed}, before: func(t *testing.T, w *web) {
			w.up.script = func(context.Context, string, int) (sessionlock.Session, error) {
				return sessionlock.Session{}, sessionlock.Denied(errDead)
			}
			_, err := w.c.Session(t.Context(), "bob")
			require.ErrorIs(t, err, sessionlock.ErrDenied)
		}},
		"unusable session": {key: "bob", wanted: []error{sessionlock.ErrIncomplete}, before: func(_ *testing.T, w *web) {
			w.up.script = func(context.Context, string, int) (sessionlock.Session, error) { return sessionlock.Session{}, nil }
		}},
		"store down": {key: "bob", wanted: []error{sessionlock.ErrUnavailable}, opts: []sessionlock.Option{
			sessionlock.WithCache(spyCache{&spy{before: func(context.Context, string, string) error { return errStoreDown }}, new(sessionlock.MemoryCache)}),
		}},
		"client closed": {key: "bob", wanted: []error{sessionlock.ErrClosed}, before: func(t *testing.T, w *web) {
			require.NoError(t, w.c.Close(t.Context()))
		}},
		"no key":                       {wanted: []error{sessionlock.ErrInvalid}},
		"Key fails":                    {to: notStarted, key: "bob", wanted: []error{errDead}},
		"blank key":                    {key: " ", wanted: []error{sessionlock.ErrInvalid}},
		"fixed to a blank key":         {to: &sessionlock.TransportOptions{Key: sessionlock.FixedKey("")}, key: "bob", wanted: []error{sessionlock.ErrInvalid}},
		"key that is too long":         {key: strings.Repeat("k", 257), wanted: []error{sessionlock.ErrInvalid}},
		"base is a nil pointer":        {key: "bob", nilled: true, wanted: []error{sessionlock.ErrInvalid}},
		"upstream is a name":           {key: "bob", name: "acme", wanted: []error{sessionlock.ErrInvalid}},
		"upstream has another scheme":  {key: "bob", name: "ftp://api.acme.test", wanted: []error{sessionlock.ErrInvalid}},
		"upstream has no host":         {key: "bob", name: "https://", wanted: []error{sessionlock.ErrInvalid}},
		"upstream has a port, no host": {key: "bob", name: "https://:443", wanted: []error{sessionlock.ErrInvalid}},
		"upstream is no URL at all":    {key: "bob", name: "https://api acme.test:x", wanted: []error{sessionlock.ErrInvalid}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWeb(t, row.to, row.opts...)
			if row.name != "" {
				c, err := sessionlock.New(row.name, w.up, sessionlock.WithCache(new(sessionlock.MemoryCache)))
				require.NoError(t, err)
				w.Transport = c.Transport(w.far, nil)
			}
			if row.nilled {
				w.Transport = w.c.Transport((*farEnd)(nil), nil)
			}
			if row.before != nil {
				row.before(t, w)
			}
			ctx := t.Context()
			if row.key != "" {
				ctx = sessionlock.KeyContext(ctx, row.key)
			}
			body := bodyOf("short")
			r := requestFor(ctx, t, http.MethodPost, body)
			r.ContentLength = 5
			err := w.fetch(r).err
			var outer *url.Error
			require.ErrorAs(t, err, &outer)
			for _, wanted := range row.wanted {
				require.ErrorIs(t, err, wanted)
			}
			assert.NotErrorIs(t, err, sessionlock.ErrRejected)
			assert.Empty(t, w.far.sent())
			assert.True(t, body.closed.Load())
			assert.NotContains(t, outer.Err.Error(), "bob")
			assert.NotContains(t, outer.Err.Error(), acme)
		})
	}
}

func TestFailedLoginReachesTheCallerAsItsError(t *testing.T) {
	w := newWeb(t, nil)
	w.up.script = func(context.Context, string, int) (sessionlock.Session, error) {
		return sessionlock.Session{}, sessionlock.Denied(errDead)
	}
	err := w.get(t).err
	var login *sessionlock.LoginError
	require.ErrorAs(t, err, &login)
	assert.Equal(t, sessionlock.LoginDenied, login.Class)
	assert.Equal(t, 1, w.up.logins())
}

func TestRequestWhoseContextIsOverIsNotSent(t *testing.T) {
	w := newWeb(t, nil)
	ctx, cancel := context.WithCancel(sessionlock.KeyContext(t.Context(), "bob"))
	cancel()
	body := bodyOf("short")
	_, err := w.Transport.RoundTrip(requestFor(ctx, t, http.MethodPost, body)) //nolint:bodyclose // there is none
	require.ErrorIs(t, err, context.Canceled)
	assert.True(t, body.closed.Load())
	assert.Empty(t, w.far.sent())
	assert.Zero(t, w.up.logins())
}

func TestFailedRenewalIsTheRequestsError(t *testing.T) {
	w := newWeb(t, nil)
	w.up.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
		if n == 1 {
			return w.up.grant(key, n), nil
		}
		return sessionlock.Session{}, sessionlock.Denied(errWindow)
	}
	w.refusedOnce(t)
	again := bodyOf("body")
	r := forBob(t, http.MethodPost, strings.NewReader("body"))
	r.GetBody = func() (io.ReadCloser, error) { return again, nil }
	err := w.fetch(r).err
	var reauth *sessionlock.ReauthError
	var login *sessionlock.LoginError
	require.ErrorAs(t, err, &reauth)
	require.ErrorAs(t, reauth.Second, &login)
	require.ErrorIs(t, err, sessionlock.ErrRejected)
	require.ErrorIs(t, err, sessionlock.ErrDenied)
	require.ErrorIs(t, err, errWindow)
	assert.EqualError(t, reauth.First, "sessionlock: the upstream refused the session: 401 Unauthorized")
	for _, secret := range []string{"bob", refusal, acme} {
		assert.NotContains(t, reauth.Error(), secret)
	}
	assert.Equal(t, []string{"bob/1"}, w.far.tokens())
	assert.Zero(t, w.far.left())
	assert.True(t, w.far.bodies[0].ended.Load())
	assert.True(t, again.closed.Load(), "the body that was opened for the second try")
}

func TestErrorOfBaseIsReturnedAsItIs(t *testing.T) {
	w := newWeb(t, nil)
	for _, n := range []int{1, 2} { // the try that fails
		w.far.got = nil
		w.far.script = func(i int, r *http.Request) (*http.Response, error) {
			if i == n {
				return nil, errDead
			}
			return refuseAll(i, r)
		}
		_, err := w.Transport.RoundTrip(forBob(t, http.MethodGet, nil)) //nolint:bodyclose // there is none
		assert.Equal(t, errDead, err)
		assert.Len(t, w.far.sent(), n)
	}
	assert.Zero(t, w.far.left())
	w.far.script = nil
	w.assertServed(t, "bob/2")
}

type nothingBase struct{}

func (nothingBase) RoundTrip(*http.Request) (*http.Response, error) {
	return nil, nil //nolint:nilnil // that is the fault
}

func TestBaseThatReturnsNothingIsLeftToTheHTTPClient(t *testing.T) {
	w := newWeb(t, nil)
	w.Transport = w.c.Transport(nothingBase{}, nil)
	var outer *url.Error
	require.ErrorAs(t, w.get(t).err, &outer)
	assert.Contains(t, outer.Error(), "nil *Response")
}

// Rejections that a base reports as errors

func TestErrorOfBaseThatIsARejectionIsRepairedIfTheBodyCanBeSentAgain(t *testing.T) {
	for name, row := range map[string]struct {
		code   int
		method string
		safe   bool
		stream bool
		times  int
	}{
		"may have been executed, a read":         {code: 112, method: http.MethodGet, times: 2},
		"refused before":                         {code: 952, times: 2},
		"refused before, a stream":               {code: 952, stream: true, times: 1},
		"may have been executed":                 {code: 112, times: 1},
		"may have been executed, safe":           {code: 112, safe: true, times: 2},
		"may have been executed, safe, a stream": {code: 112, safe: true, stream: true, times: 1},
		"another error":                          {code: 101, times: 1},
	} {
		t.Run(name, func(t *testing.T) {
			opts := new(sessionlock.TransportOptions)
			if row.stream {
				opts.Buffer = -1
			}
			w := newWeb(t, opts, sessionlock.WithRejected(byCode))
			require.Equal(t, "bob/1", tokenOf(t, w.c, "bob"))
			w.far.script = func(_ int, r *http.Request) (*http.Response, error) {
				if tokenOn(r) == "bob/1" {
					return nil, &upstreamError{row.code}
				}
				return nil, nil
			}
			ctx := sessionlock.KeyContext(t.Context(), "bob")
			if row.safe {
				ctx = sessionlock.IdempotentContext(ctx)
			}
			r := requestFor(ctx, t, cmp.Or(row.method, http.MethodPost), strings.NewReader("body"))
			if row.stream {
				r.Body, r.GetBody, r.ContentLength = bodyOf("body"), nil, -1
			}
			f := w.fetch(r)
			assert.Equal(t, slices.Repeat([]string{"body"}, row.times), w.far.payloads())
			if row.times == 2 {
				assert.Equal(t, fetched{status: http.StatusOK, body: "bob/2"}, f)
				return
			}
			var said *upstreamError
			require.ErrorAs(t, f.err, &said)
			assert.Equal(t, row.code, said.Code)
			assert.Equal(t, row.code != 101, errors.Is(f.err, sessionlock.ErrRejected))
			next := "bob/2" // which nobody refused
			if row.code == 101 {
				next = "bob/1"
			}
			w.far.script = nil
			w.assertServed(t, next)
			assert.LessOrEqual(t, w.up.logins(), 2)
		})
	}
}

func TestErrorOfBaseSaysNothingOfASessionThatWasNotSent(t *testing.T) {
	w := newWeb(t, &sessionlock.TransportOptions{Allow: func(sessionlock.Session, *url.URL) bool { return false }},
		sessionlock.WithRejected(byCode))
	w.far.script = func(int, *http.Request) (*http.Response, error) { return nil, &upstreamError{952} }
	_, err := w.Transport.RoundTrip(forBob(t, http.MethodGet, nil)) //nolint:bodyclose // there is none
	assert.Equal(t, &upstreamError{952}, err)
	assert.Equal(t, []string{""}, w.far.tokens())
	assert.Equal(t, "bob/1", tokenOf(t, w.c, "bob"))
	assert.Equal(t, 1, w.up.logins())
}

// Allow

func TestInstanceThatCameWithTheLoginIsAllowed(t *testing.T) {
	byInstance := func(s sessionlock.Session, u *url.URL) bool {
		return u.Scheme == "https" && u.Host == s.Value("instance")
	}
	w := newWeb(t, nil)
	w.up.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
		return w.up.grant(key, n).WithValue("instance", "eu1.acme.test"), nil
	}
	c, err := sessionlock.New("acme", w.up, sessionlock.WithCache(new(sessionlock.MemoryCache)))
	require.NoError(t, err)
	w.Transport = c.Transport(w.far, &sessionlock.TransportOptions{Allow: byInstance})
	ask := func(where, host string) string {
		w.far.got = nil
		r, err := http.NewRequestWithContext(sessionlock.KeyContext(t.Context(), "bob"), http.MethodGet, where, http.NoBody)
		require.NoError(t, err)
		r.Host = host
		require.NoError(t, w.fetch(r).err)
		sent := w.far.sent()
		require.Len(t, sent, 1)
		assert.Equal(t, host, sent[0].Host)
		return sent[0].token
	}
	for range 2 { // a 401 to a request without the session does not end it
		assert.Equal(t, "bob/1", ask("https://eu1.acme.test/orders", "eu1.acme.test"))
		assert.Equal(t, "bob/1", ask("https://eu1.acme.test/orders", ""))
		assert.Empty(t, ask("https://eu2.acme.test/orders", "eu2.acme.test"))
		assert.Empty(t, ask("http://eu1.acme.test/orders", ""))
		assert.Empty(t, ask(ordersURL, ""), "the upstream's own name is no exception")
		assert.Empty(t, ask("https://eu1.acme.test/orders", "evil.test"), "a Host header chooses who gets it")
		assert.Empty(t, ask("https://evil.test/orders", "eu1.acme.test"))
	}
	assert.Equal(t, 1, w.up.logins())
}

func TestAllowIsAskedAboutWhereTheRequestGoes(t *testing.T) {
	var asked []string
	w := newWeb(t, &sessionlock.TransportOptions{Allow: func(s sessionlock.Session, u *url.URL) bool {
		assert.Equal(t, "bob/1", s.Token.Reveal())
		asked = append(asked, u.String())
		return true
	}})
	r := forBob(t, http.MethodGet, nil)
	r.Host = "other.acme.test"
	assert.Equal(t, fetched{status: http.StatusOK, body: "bob/1"}, w.fetch(r))
	assert.ElementsMatch(t, []string{ordersURL, "https://other.acme.test/v1/orders"}, asked)
	assert.Equal(t, ordersURL, r.URL.String())
}

func TestRequestThatMayNotCarryTheSessionIsNoJudgeOfIt(t *testing.T) {
	judge := func(*http.Response, []byte) sessionlock.Verdict {
		t.Error("judged")
		return sessionlock.RejectedBefore
	}
	w := newWeb(t, &sessionlock.TransportOptions{Rejected: judge, Allow: func(sessionlock.Session, *url.URL) bool { return false }})
	for range 2 {
		f := w.fetch(posted(t, bodyOf("body"), 4))
		assert.Equal(t, fetched{status: http.StatusUnauthorized, body: refusal}, f)
	}
	assert.Equal(t, []string{"", ""}, w.far.tokens())
	assert.Equal(t, []string{"body", "body"}, w.far.payloads())
	assert.Equal(t, "bob/1", tokenOf(t, w.c, "bob"))
	assert.Equal(t, 1, w.up.logins())
}

func TestNextSessionThatMayNotBeSentEndsTheRequest(t *testing.T) {
	w := newWeb(t, &sessionlock.TransportOptions{Allow: func(s sessionlock.Session, _ *url.URL) bool {
		return s.Token.Reveal() == "bob/1"
	}})
	w.refusedOnce(t)
	again := bodyOf("body")
	r := forBob(t, http.MethodPost, strings.NewReader("body"))
	r.GetBody = func() (io.ReadCloser, error) { return again, nil }
	require.ErrorIs(t, w.fetch(r).err, sessionlock.ErrInvalid)
	assert.Equal(t, []string{"bob/1"}, w.far.tokens())
	assert.True(t, again.closed.Load())
	assert.Zero(t, w.far.left())
	assert.Equal(t, "bob/2", tokenOf(t, w.c, "bob")) // nobody refused it
	assert.Equal(t, 2, w.up.logins())
}

// Scopes

// inScope runs fn in a scope of bob.
func (w *web) inScope(t *testing.T, fn func(ctx context.Context, sc *sessionlock.Scope)) {
	t.Helper()
	require.NoError(t, w.c.Scope(sessionlock.KeyContext(t.Context(), "bob"), "bob", func(ctx context.Context, sc *sessionlock.Scope) error {
		fn(ctx, sc)
		return nil
	}))
}

func TestRequestsOfAScopeUseItsSession(t *testing.T) {
	w := newWeb(t, nil)
	var later context.Context
	w.inScope(t, func(ctx context.Context, _ *sessionlock.Scope) {
		later = ctx
		in := func() fetched { return w.fetch(requestFor(ctx, t, http.MethodGet, nil)) }
		assert.Equal(t, fetched{status: http.StatusOK, body: "bob/1"}, in())
		put(t, w.c, "another's")
		assert.Equal(t, fetched{status: http.StatusOK, body: "bob/1"}, in())
		w.assertServed(t, "another's") // without the scope's context
		f := w.fetch(requestFor(sessionlock.KeyContext(ctx, "ann"), t, http.MethodGet, nil))
		assert.Equal(t, fetched{status: http.StatusOK, body: "ann/2"}, f)
	})
	f := w.fetch(requestFor(later, t, http.MethodGet, nil))
	assert.Equal(t, fetched{status: http.StatusOK, body: "another's"}, f, "a scope that is over was used")
}

func TestRefusalInAScopeIsRepairedAndPinned(t *testing.T) {
	w := newWeb(t, nil)
	w.inScope(t, func(ctx context.Context, sc *sessionlock.Scope) {
		w.far.kill("bob/1")
		f := w.fetch(requestFor(ctx, t, http.MethodPost, strings.NewReader("body")))
		assert.Equal(t, fetched{status: http.StatusOK, body: "bob/2"}, f)
		put(t, w.c, "another's")
		assert.Equal(t, "bob/2", used(ctx, t, sc))
	})
	assert.Equal(t, []string{"body", "body"}, w.far.payloads())
	assert.Equal(t, 2, w.up.logins())
}

func TestRequestsOfSetUpCarryTheSessionThatIsSetUp(t *testing.T) {
	w := newWeb(t, nil)
	var readied []string
	w.inScope(t, func(ctx context.Context, sc *sessionlock.Scope) {
		sc.SetUp(func(ctx context.Context, s sessionlock.Session) error {
			readied = append(readied, s.Token.Reveal())
			f := w.fetch(requestFor(ctx, t, http.MethodPut, strings.NewReader("globals")))
			assert.Equal(t, fetched{status: http.StatusOK, body: s.Token.Reveal()}, f)
			return f.err
		})
		in := func() fetched { return w.fetch(requestFor(ctx, t, http.MethodGet, nil)) }
		assert.Equal(t, fetched{status: http.StatusOK, body: "bob/1"}, in())
		assert.Equal(t, fetched{status: http.StatusOK, body: "bob/1"}, in())
		w.far.kill("bob/1")
		assert.Equal(t, fetched{status: http.StatusOK, body: "bob/2"}, in())
		assert.Equal(t, fetched{status: http.StatusOK, body: "bob/2"}, in())
	})
	assert.Equal(t, []string{"bob/1", "bob/2"}, readied)
	assert.Equal(t, []string{"globals", "", "", "", "globals", "", ""}, w.far.payloads())
	assert.Equal(t, []string{"bob/1", "bob/1", "bob/1", "bob/1", "bob/2", "bob/2", "bob/2"}, w.far.tokens())
}

func TestRequestOfSetUpThatIsRefusedIsSentOnce(t *testing.T) {
	w := newWeb(t, nil)
	w.inScope(t, func(ctx context.Context, sc *sessionlock.Scope) {
		w.far.kill("bob/1")
		sc.SetUp(func(ctx context.Context, s sessionlock.Session) error {
			f := w.fetch(requestFor(sessionlock.IdempotentContext(ctx), t, http.MethodPut, strings.NewReader("globals")))
			if s.Token.Reveal() == "bob/1" {
				assert.Zero(t, f.status)
				return f.err // for the request that needs the set-up to repair
			}
			assert.Equal(t, fetched{status: http.StatusOK, body: "bob/2"}, f)
			return f.err
		})
		f := w.fetch(requestFor(ctx, t, http.MethodGet, nil))
		assert.Equal(t, fetched{status: http.StatusOK, body: "bob/2"}, f)
	})
	assert.Equal(t, []string{"bob/1", "bob/2", "bob/2"}, w.far.tokens())
	assert.Equal(t, 2, w.up.logins())
	assert.Zero(t, w.far.left())
}

type refusing struct{ dead string }

func (r refusing) RoundTrip(q *http.Request) (*http.Response, error) {
	if q.Header.Get("Authorization") == "Bearer "+r.dead {
		return nil, sessionlock.Reject(errDead)
	}
	return &http.Response{StatusCode: http.StatusOK, Body: http.NoBody, Request: q}, nil
}

func TestRejectionByBaseInsideSetUpIsRepaired(t *testing.T) {
	u := &upstream{}
	c := newClient(t, u, new(sessionlock.MemoryCache))
	hc := &http.Client{Transport: c.Transport(refusing{"bob/1"}, &sessionlock.TransportOptions{Allow: func(sessionlock.Session, *url.URL) bool { return true }})}
	err := c.Scope(t.Context(), "bob", func(ctx context.Context, sc *sessionlock.Scope) error {
		sc.SetUp(func(ctx context.Context, _ sessionlock.Session) error {
			req, err := http.NewRequestWithContext(sessionlock.KeyContext(ctx, "bob"), http.MethodGet, acme, http.NoBody)
			require.NoError(t, err)
			resp, err := hc.Do(req)
			if err == nil {
				err = resp.Body.Close()
			}
			return err
		})
		return sc.Do(ctx, func(context.Context, sessionlock.Session) error { return nil })
	})
	require.NoError(t, err)
	assert.Equal(t, 2, u.logins())
}

func TestFailedSetUpIsTheRequestsError(t *testing.T) {
	w := newWeb(t, nil)
	body := bodyOf("body")
	w.inScope(t, func(ctx context.Context, sc *sessionlock.Scope) {
		sc.SetUp(func(context.Context, sessionlock.Session) error { return errWindow })
		require.ErrorIs(t, w.fetch(requestFor(ctx, t, http.MethodPost, body)).err, errWindow)
	})
	assert.True(t, body.closed.Load())
	assert.Empty(t, w.far.sent())
}

// Keys

func TestKeyMayComeFromTheRequest(t *testing.T) {
	byHeader := func(r *http.Request) (string, error) { return r.Header.Get("X-Tenant"), nil }
	w := newWeb(t, &sessionlock.TransportOptions{Key: byHeader, Apply: sessionlock.ApplyHeader("x-session-token")})
	w.far.script = func(int, *http.Request) (*http.Response, error) { return reply(http.StatusOK, ""), nil }
	for i, tenant := range []string{"ann", "bob", "ann"} {
		r := forBob(t, http.MethodGet, nil)
		r.Header.Set("X-Tenant", tenant)
		r.Header.Set("X-Session-Token", "the caller's")
		require.NoError(t, w.fetch(r).err)
		token := []string{"ann/1", "bob/2", "ann/1"}[i]
		assert.Equal(t, http.Header{"X-Tenant": {tenant}, "X-Session-Token": {token}}, w.far.sent()[i].Header)
		assert.Equal(t, "the caller's", r.Header.Get("X-Session-Token"))
	}
}

func TestFixedKeyNeedsNoContext(t *testing.T) {
	w := newWeb(t, &sessionlock.TransportOptions{Key: sessionlock.FixedKey("robot")})
	r := requestFor(t.Context(), t, http.MethodGet, nil)
	r.Header.Set("Authorization", "Basic of the caller")
	assert.Equal(t, fetched{status: http.StatusOK, body: "robot/1"}, w.fetch(r))
	assert.Equal(t, fetched{status: http.StatusOK, body: "robot/1"}, w.get(t), "whatever the context says")
}

func TestKeyOfAContextIsTheInnermost(t *testing.T) {
	_, ok := sessionlock.KeyFromContext(t.Context())
	assert.False(t, ok)
	ctx := sessionlock.KeyContext(sessionlock.KeyContext(t.Context(), "ann"), "bob")
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	key, ok := sessionlock.KeyFromContext(ctx)
	assert.True(t, ok)
	assert.Equal(t, "bob", key)
	key, ok = sessionlock.KeyFromContext(sessionlock.KeyContext(ctx, ""))
	assert.True(t, ok)
	assert.Empty(t, key)
}

func TestLoginKnowsItsKeyFromItsContext(t *testing.T) {
	u := &upstream{}
	u.script = func(ctx context.Context, key string, n int) (sessionlock.Session, error) {
		inside, ok := sessionlock.KeyFromContext(ctx)
		assert.True(t, ok)
		assert.Equal(t, key, inside)
		return u.grant(key, n), nil
	}
	c := newClient(t, u, new(sessionlock.MemoryCache))
	_, err := c.Session(sessionlock.KeyContext(t.Context(), "ann"), "bob")
	require.NoError(t, err)
}

func TestRequestWithoutAKeySaysHowToGiveItOne(t *testing.T) {
	w := newWeb(t, nil)
	_, err := w.Transport.RoundTrip(requestFor(t.Context(), t, http.MethodGet, nil)) //nolint:bodyclose // there is none
	require.ErrorIs(t, err, sessionlock.ErrInvalid)
	assert.ErrorContains(t, err, "set KeyContext or TransportOptions.Key")
}

// Secrets

func TestTransportAndItsRequestsShowNoSecret(t *testing.T) {
	const key, token = "c4n4ry-key", "c4n4ry-token"
	u := sessionlock.AuthenticatorFunc(func(context.Context, string) (sessionlock.Session, error) {
		return sessionlock.Session{Token: sessionlock.NewToken(token)}.WithValue("csrf", "c4n4ry-value"), nil
	})
	base := &farEnd{}
	c, err := sessionlock.New(acme, u, sessionlock.WithCache(new(sessionlock.MemoryCache)))
	require.NoError(t, err)
	rt := c.Transport(base, &sessionlock.TransportOptions{Rejected: maybeExecuted})
	hc := &http.Client{Transport: rt}
	ctx := sessionlock.KeyContext(t.Context(), key)
	resp, err := hc.Do(requestFor(ctx, t, http.MethodGet, nil))
	require.NoError(t, err)
	defer resp.Body.Close()
	for name, v := range map[string]any{
		"transport": rt, "client": hc, "client's value": *hc, "a stranger's struct": struct{ rt http.RoundTripper }{rt},
		"transport of nothing": c.Transport((*farEnd)(nil), nil),
	} {
		for verb, s := range printed(v) {
			assert.NotContains(t, s, "c4n4ry", "%s by %s", name, verb)
		}
	}
	for name, v := range map[string]any{ // fmt looks into what others are writing to
		"answer's request": resp.Request, "context": ctx, "context that was sent": base.sent()[0].Context(),
	} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s"} {
			assert.NotContains(t, fmt.Sprintf(verb, v), "c4n4ry", "%s by %s", name, verb)
		}
	}
	assert.Equal(t, "[sessionlock transport]", fmt.Sprintf("%+v", rt))
}

// Verbs that a context is not made for print one level more of it.
func TestContextOfARequestThatWasSentShowsNoSecret(t *testing.T) {
	u := sessionlock.AuthenticatorFunc(func(context.Context, string) (sessionlock.Session, error) {
		return sessionlock.Session{Token: sessionlock.NewToken("c4n4ry-token")}, nil
	})
	secret := []byte("c4n4ry-key-secret")
	decimal := strings.Trim(fmt.Sprintf("%d", secret), "[]")
	c, err := sessionlock.New(acme, u, sessionlock.WithCache(new(sessionlock.MemoryCache)), sessionlock.WithKeySecret(secret))
	require.NoError(t, err)
	base := &farEnd{}
	w := &web{Client: &http.Client{Transport: c.Transport(base, nil)}}
	require.NoError(t, w.fetch(requestFor(sessionlock.KeyContext(t.Context(), "c4n4ry-key"), t, http.MethodGet, nil)).err)
	for _, verb := range []string{"%v", "%s", "%q", "%x", "%t", "%d", "%c", "%e", "%U", "%p"} {
		s := fmt.Sprintf(verb, base.sent()[0].Context())
		assert.NotContains(t, s, "c4n4ry", verb)
		assert.NotContains(t, s, decimal, verb)
	}
}

func TestErrorsOfATransportShowNoSecret(t *testing.T) {
	for name, base := range map[string]http.RoundTripper{"no key": &farEnd{}, "refused": &farEnd{script: refuseAll}, "nil": (*farEnd)(nil)} {
		t.Run(name, func(t *testing.T) {
			u := &upstream{}
			u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
				if n == 1 {
					return u.grant(key, n), nil
				}
				return sessionlock.Session{}, sessionlock.Denied(errors.New("no password for bob"))
			}
			key := sessionlock.FixedKey("bob")
			if name == "no key" {
				key = nil
			}
			rt := newClient(t, u, new(sessionlock.MemoryCache)).Transport(base, &sessionlock.TransportOptions{Key: key})
			_, err := rt.RoundTrip(requestFor(t.Context(), t, http.MethodGet, nil)) //nolint:bodyclose // there is none
			require.Error(t, err)
			assert.True(t, strings.HasPrefix(err.Error(), "sessionlock: "), err)
			for _, secret := range []string{"bob", "acme", refusal} {
				assert.NotContains(t, err.Error(), secret)
			}
		})
	}
}

// Panics

func TestPanicLeavesNothingOpenAndNothingLocked(t *testing.T) {
	var armed atomic.Bool
	boom := func() {
		if armed.Load() {
			panic("boom")
		}
	}
	for name, row := range map[string]struct {
		to    *sessionlock.TransportOptions
		dead  bool // the session, so that the request is sent again
		sent  int
		again func() (io.ReadCloser, error)
	}{
		"Key": {to: &sessionlock.TransportOptions{Key: func(*http.Request) (string, error) {
			boom()
			return "bob", nil
		}}},
		"Allow": {to: &sessionlock.TransportOptions{Allow: func(sessionlock.Session, *url.URL) bool {
			boom()
			return true
		}}},
		"Apply": {to: &sessionlock.TransportOptions{Apply: func(r *http.Request, s sessionlock.Session) {
			boom()
			sessionlock.ApplyBearer(r, s)
		}}},
		"Apply, the second time": {dead: true, sent: 1, to: &sessionlock.TransportOptions{Apply: func(r *http.Request, s sessionlock.Session) {
			if s.Token.Reveal() != "bob/1" {
				boom()
			}
			sessionlock.ApplyBearer(r, s)
		}}},
		"Rejected": {sent: 1, to: &sessionlock.TransportOptions{Rejected: func(*http.Response, []byte) sessionlock.Verdict {
			boom()
			return sessionlock.NotRejected
		}}},
		"Rejected, the second time": {dead: true, sent: 2, to: &sessionlock.TransportOptions{Rejected: func(a *http.Response, _ []byte) sessionlock.Verdict {
			if a.StatusCode == http.StatusOK {
				boom()
			}
			return maybeExecuted(a, nil)
		}}},
		"GetBody": {dead: true, sent: 1, again: func() (io.ReadCloser, error) { panic("boom") }},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWeb(t, row.to)
			require.Equal(t, "bob/1", tokenOf(t, w.c, "bob"))
			if row.dead {
				w.far.kill("bob/1")
			}
			body, again := bodyOf("body"), bodyOf("body")
			r := posted(t, body, 4)
			r.Header.Set("Idempotency-Key", "7")
			r.GetBody = func() (io.ReadCloser, error) { return again, nil }
			if row.again != nil {
				r.GetBody = row.again
			}
			armed.Store(true)
			assert.PanicsWithValue(t, "boom", func() { _, _ = w.Transport.RoundTrip(r) }) //nolint:bodyclose // it panics
			armed.Store(false)
			assert.Len(t, w.far.sent(), row.sent)
			assert.True(t, body.closed.Load())
			if row.dead && row.again == nil {
				assert.True(t, again.closed.Load())
			}
			if row.again == nil {
				assert.Zero(t, w.far.left())
			}
			f := w.get(t)
			require.NoError(t, f.err)
			assert.Equal(t, http.StatusOK, f.status)
		})
	}
}

func TestPanickingLoginIsTheRequestsError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWeb(t, nil)
		w.up.script = func(context.Context, string, int) (sessionlock.Session, error) { panic("boom") }
		body := bodyOf("body")
		err := w.fetch(posted(t, body, 4)).err
		var panicked *sessionlock.PanicError
		require.ErrorAs(t, err, &panicked)
		assert.Equal(t, "boom", panicked.Value)
		assert.True(t, body.closed.Load())
		assert.Empty(t, w.far.sent())
		w.up.script = nil
		time.Sleep(time.Minute)
		require.NoError(t, w.c.Unsuppress(t.Context(), "bob"))
		w.assertServed(t, "bob/2")
	})
}

// Idle connections

type closingBase struct {
	farEnd
	closed int
}

func (b *closingBase) CloseIdleConnections() { b.closed++ }

func TestIdleConnectionsOfBaseAreClosed(t *testing.T) {
	w := newWeb(t, nil)
	w.CloseIdleConnections() // of a base that cannot
	base := &closingBase{}
	w.Transport = w.c.Transport(base, nil)
	w.CloseIdleConnections()
	assert.Equal(t, 1, base.closed)
}
