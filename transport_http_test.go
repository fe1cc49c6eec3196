package sessionlock_test

// The net/http side of the transport, against real servers: what the standard
// library expects of a RoundTripper, and where a token must never go. What is
// refused, repaired and reported is in transport_test.go.

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"mime/multipart"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/http/httputil"
	"net/textproto"
	"net/url"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock"
)

const (
	wireKey  = "bob"
	promptly = 5 * time.Second  // of what takes no time, on a busy machine
	tooLong  = 30 * time.Second // ends a test that hangs
)

// wire is a way to speak HTTP.
type wire struct {
	name    string
	tls, h2 bool
}

var (
	wires = []wire{{name: "http1"}, {name: "http1 tls", tls: true}, {name: "http2", tls: true, h2: true}}
	http1 = wires[:2]
)

// wireSite is a server with a ledger. Sessions of its transports are bob/1, bob/2
// and so on; it refuses those that were revoked.
type wireSite struct {
	*httptest.Server
	base    *http.Transport // that knows its certificate
	u       *upstream
	refusal http.HandlerFunc

	mu            sync.Mutex
	dead          map[string]bool
	seen          []*http.Request // headers are copies, bodies gone
	opened, ended int             // connections
}

func (w wire) serve(t *testing.T, h http.HandlerFunc) *wireSite {
	t.Helper()
	s := &wireSite{u: &upstream{}, dead: map[string]bool{}}
	s.refusal = func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "dead", http.StatusUnauthorized) }
	s.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if s.note(r) {
			s.refusal(w, r)
			return
		}
		h(w, r)
	}))
	s.EnableHTTP2 = w.h2
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.Config.ConnState = s.count
	if w.tls {
		s.StartTLS()
	} else {
		s.Start()
	}
	s.base = s.Client().Transport.(*http.Transport)
	t.Cleanup(func() {
		s.base.CloseIdleConnections()
		s.CloseClientConnections()
		s.Close()
	})
	return s
}

// note reports whether r carries a session that was revoked.
func (s *wireSite) note(r *http.Request) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen = append(s.seen, &http.Request{
		Method: r.Method, URL: r.URL, Host: r.Host, RequestURI: r.RequestURI, Header: r.Header.Clone(), ContentLength: r.ContentLength,
	})
	return s.dead[strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")]
}

func (s *wireSite) count(_ net.Conn, state http.ConnState) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch state {
	case http.StateNew:
		s.opened++
	case http.StateClosed:
		s.ended++
	default:
	}
}

func (s *wireSite) connections() (opened, ended int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.opened, s.ended
}

func (s *wireSite) revoke(token string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dead[token] = true
}

// requests returns what was seen since the last call.
func (s *wireSite) requests() []*http.Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	seen := s.seen
	s.seen = nil
	return seen
}

// wireClient returns a client of u for the upstream called name.
func wireClient(t *testing.T, name string, auth sessionlock.Authenticator) *sessionlock.Client {
	t.Helper()
	c, err := sessionlock.New(name, auth, sessionlock.WithCache(new(sessionlock.MemoryCache)))
	require.NoError(t, err)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), promptly)
		defer cancel()
		_ = c.Close(ctx)
	})
	return c
}

// over returns a transport for s with bob's sessions.
func (s *wireSite) over(t *testing.T, o sessionlock.TransportOptions) http.RoundTripper {
	t.Helper()
	if o.Key == nil {
		o.Key = sessionlock.FixedKey(wireKey)
	}
	return wireClient(t, s.URL, s.u).Transport(s.base, &o)
}

// way is a wire, with a Rejected of its own or not, and with a repair or not.
type way struct {
	wire
	judged, repaired bool
}

func everyWay(t *testing.T, over []wire, f func(t *testing.T, y way)) {
	t.Helper()
	for _, w := range over {
		for i := range 4 {
			y := way{w, i&1 != 0, i&2 != 0}
			t.Run(fmt.Sprintf("%s/judged=%t/repaired=%t", w.name, y.judged, y.repaired), func(t *testing.T) { f(t, y) })
		}
	}
}

// site is serve; the first session is refused when there is to be a repair.
func (y way) site(t *testing.T, h http.HandlerFunc) *wireSite {
	t.Helper()
	s := y.serve(t, h)
	if y.repaired {
		s.revoke("bob/1")
	}
	return s
}

func (y way) options() (o sessionlock.TransportOptions) {
	if y.judged {
		o.Rejected = func(answer *http.Response, head []byte) sessionlock.Verdict {
			if answer.StatusCode == http.StatusUnauthorized || bytes.HasPrefix(head, []byte("dead")) {
				return sessionlock.RejectedBefore
			}
			return sessionlock.NotRejected
		}
	}
	return o
}

func (y way) logins() int {
	if y.repaired {
		return 2
	}
	return 1
}

func wireRequest(t *testing.T, method, target string, body io.Reader) *http.Request {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), tooLong)
	t.Cleanup(cancel)
	r, err := http.NewRequestWithContext(ctx, method, target, body)
	require.NoError(t, err)
	return r
}

// wireReply is an answer that was read to its end.
type wireReply struct {
	status          int
	header, trailer http.Header
	length          int64 // as announced
	body            string
}

// wireDo sends r and reads the answer, whose Request is always r.
func wireDo(t *testing.T, rt http.RoundTripper, r *http.Request) wireReply {
	t.Helper()
	answer, err := rt.RoundTrip(r)
	require.NoError(t, err)
	defer answer.Body.Close()
	assert.Same(t, r, answer.Request)
	body, err := io.ReadAll(answer.Body)
	require.NoError(t, err)
	return wireReply{answer.StatusCode, answer.Header, answer.Trailer, answer.ContentLength, string(body)}
}

func ok(w http.ResponseWriter, r *http.Request) {
	_, _ = io.Copy(io.Discard, r.Body)
	_, _ = io.WriteString(w, "fine")
}

// soon waits for ch, and fails the test if that takes long.
func soon[T any](t *testing.T, ch <-chan T, what string) (v T) {
	t.Helper()
	select {
	case v = <-ch:
	case <-time.After(promptly):
		require.Fail(t, "took too long: "+what)
	}
	return v
}

// tracked is a request body that says what became of it.
type tracked struct {
	io.Reader
	read   atomic.Int64
	closed atomic.Int64
	ended  chan struct{} // closed with it; nil: nobody waits
}

func (b *tracked) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	b.read.Add(int64(n))
	return n, err
}

func (b *tracked) Close() error {
	if b.closed.Add(1) == 1 && b.ended != nil {
		close(b.ended)
	}
	return nil
}

// bodies opens bodies and keeps them.
type bodies struct {
	mu  sync.Mutex
	all []*tracked
}

func (b *bodies) open(r io.Reader) *tracked {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.all = append(b.all, &tracked{Reader: r})
	return b.all[len(b.all)-1]
}

// unclosed returns how many of those that were opened are not closed.
func (b *bodies) unclosed() (n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, one := range b.all {
		if one.closed.Load() == 0 {
			n++
		}
	}
	return n
}

// baseFunc is a base in memory.
type baseFunc func(*http.Request) (*http.Response, error)

func (f baseFunc) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Body != nil {
		defer r.Body.Close()
	}
	return f(r)
}

// The request body is closed however the request ends: by base, if it was sent, and
// by the transport, if not.
func TestWireBodyIsClosedHoweverItEnds(t *testing.T) {
	const content = "0123456789"
	broken := errors.New("cable is cut")
	kinds := map[string]func(*bodies, *http.Request){
		"with GetBody": func(b *bodies, r *http.Request) {
			r.Body, r.ContentLength = b.open(strings.NewReader(content)), int64(len(content))
			r.GetBody = func() (io.ReadCloser, error) { return b.open(strings.NewReader(content)), nil }
		},
		"with a GetBody that fails": func(b *bodies, r *http.Request) {
			r.Body, r.ContentLength = b.open(strings.NewReader(content)), int64(len(content))
			r.GetBody = func() (io.ReadCloser, error) { return nil, broken }
		},
		"short": func(b *bodies, r *http.Request) {
			r.Body, r.ContentLength = b.open(strings.NewReader(content)), int64(len(content))
		},
		"of unknown length": func(b *bodies, r *http.Request) {
			r.Body, r.ContentLength = b.open(strings.NewReader(content)), -1
		},
		"shorter than it says": func(b *bodies, r *http.Request) {
			r.Body, r.ContentLength = b.open(strings.NewReader(content[1:])), int64(len(content))
		},
		"longer than it says": func(b *bodies, r *http.Request) {
			r.Body, r.ContentLength = b.open(strings.NewReader(content)), int64(len(content)-1)
		},
		"failing": func(b *bodies, r *http.Request) {
			r.Body, r.ContentLength = b.open(iotest.ErrReader(broken)), int64(len(content))
		},
	}
	never := func(http.ResponseWriter, *http.Request) { t.Error("was sent") }
	type rig struct {
		handler http.HandlerFunc
		login   func(ctx context.Context, key string, n int) (sessionlock.Session, error)
		options sessionlock.TransportOptions
		dead    string // session
		base    http.RoundTripper
		url     string // of the request
		name    string // of the upstream
		ctx     func(context.Context) context.Context
		closed  bool // the client
		fails   bool // RoundTrip
	}
	endings := map[string]rig{
		"answered":                         {handler: ok},
		"answered unread":                  {handler: func(http.ResponseWriter, *http.Request) {}},
		"refused and sent again":           {handler: ok, dead: "bob/1"},
		"refused and no other session":     {handler: ok, dead: "bob/1", login: second(errors.New("no")), fails: true},
		"refused and the next not allowed": {handler: ok, dead: "bob/1", options: sessionlock.TransportOptions{Allow: onlyFirst}, fails: true},
		"base fails":                       {handler: never, base: baseFunc(func(*http.Request) (*http.Response, error) { return nil, broken }), fails: true},
		"no session":                       {handler: never, login: first(errors.New("no")), fails: true},
		"no key":                           {handler: never, options: sessionlock.TransportOptions{Key: func(*http.Request) (string, error) { return "", broken }}, fails: true},
		"a key that is none":               {handler: never, options: sessionlock.TransportOptions{Key: sessionlock.FixedKey("")}, fails: true},
		"closed client":                    {handler: never, closed: true, fails: true},
		"upstream is no URL":               {handler: never, name: "acme", fails: true},
		"canceled before":                  {handler: never, ctx: ended, fails: true},
		"to another host":                  {handler: never, url: "http://other.test/", base: baseFunc(answering), fails: false},
		"to another host that is down":     {handler: never, url: "http://other.test/", base: baseFunc(func(*http.Request) (*http.Response, error) { return nil, broken }), fails: true},
	}
	for ending, e := range endings {
		for kind, fill := range kinds {
			t.Run(ending+"/"+kind, func(t *testing.T) {
				site := wires[0].serve(t, e.handler)
				site.u.script = e.login
				site.revoke(e.dead)
				name, target, base := site.URL, site.URL, http.RoundTripper(site.base)
				if e.name != "" {
					name = e.name
				}
				if e.url != "" {
					target = e.url
				}
				if e.base != nil {
					base = e.base
				}
				c := wireClient(t, name, site.u)
				if e.closed {
					require.NoError(t, c.Close(t.Context()))
				}
				o := e.options
				if o.Key == nil {
					o.Key = sessionlock.FixedKey(wireKey)
				}
				var all bodies
				r := wireRequest(t, http.MethodPost, target, nil)
				fill(&all, r)
				if e.ctx != nil {
					r = r.WithContext(e.ctx(r.Context()))
				}
				answer, err := c.Transport(base, &o).RoundTrip(r)
				if err == nil {
					_ = answer.Body.Close()
				}
				if e.fails && kind == "with GetBody" {
					assert.Error(t, err)
				}
				assert.Eventually(t, func() bool { return all.unclosed() == 0 }, promptly, time.Millisecond)
			})
		}
	}
}

// first and second are logins of which one fails.
func first(err error) func(context.Context, string, int) (sessionlock.Session, error) {
	return nth(1, err)
}

func second(err error) func(context.Context, string, int) (sessionlock.Session, error) {
	return nth(2, err)
}

func nth(bad int, err error) func(context.Context, string, int) (sessionlock.Session, error) {
	return func(_ context.Context, key string, n int) (sessionlock.Session, error) {
		if n == bad {
			return sessionlock.Session{}, sessionlock.Denied(err)
		}
		return sessionlock.Session{Token: sessionlock.NewToken(fmt.Sprintf("%s/%d", key, n))}, nil
	}
}

func onlyFirst(s sessionlock.Session, _ *url.URL) bool { return s.Token.Reveal() == "bob/1" }

func ended(ctx context.Context) context.Context {
	ctx, cancel := context.WithCancel(ctx)
	cancel()
	return ctx
}

func answering(*http.Request) (*http.Response, error) {
	return &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, Body: http.NoBody}, nil
}

// A panic of Apply is the caller's to see, and no reason to leave a body open.
func TestWireBodyIsClosedWhenApplyPanics(t *testing.T) {
	site := wires[0].serve(t, ok)
	rt := site.over(t, sessionlock.TransportOptions{Apply: func(*http.Request, sessionlock.Session) { panic("mine") }})
	var all bodies
	r := wireRequest(t, http.MethodPost, site.URL, all.open(strings.NewReader("x")))
	assert.PanicsWithValue(t, "mine", func() { _, _ = rt.RoundTrip(r) }) //nolint:bodyclose // there is no answer
	assert.Zero(t, all.unclosed())
	assert.Empty(t, site.requests())
}

// A body that is not what its request says, or fails, is base's to see: nothing is
// cut off or made up on the way.
func TestWireBrokenBodiesReachBaseAsTheyAre(t *testing.T) {
	broken := errors.New("cable is cut")
	for content, fails := range map[string]error{"123": nil, "12345": nil, "": nil, "12": broken, "1234": broken, "12345678": broken} {
		for _, length := range []int64{4, -1} {
			rt := wireClient(t, acme, &upstream{}).Transport(baseFunc(func(r *http.Request) (*http.Response, error) {
				got, err := io.ReadAll(r.Body)
				assert.Equal(t, content, string(got))
				assert.Equal(t, fails, err)
				assert.Equal(t, length, r.ContentLength)
				return answering(r)
			}), &sessionlock.TransportOptions{Key: sessionlock.FixedKey(wireKey)})
			body := io.Reader(strings.NewReader(content))
			if fails != nil {
				body = io.MultiReader(body, &failsOnce{fails})
			}
			r := wireRequest(t, http.MethodPost, acme, io.MultiReader(body))
			r.ContentLength = length
			assert.Equal(t, http.StatusOK, wireDo(t, rt, r).status)
		}
	}
}

// failsOnce fails, and has ended for whoever reads on.
type failsOnce struct{ err error }

func (f *failsOnce) Read([]byte) (int, error) {
	if err := f.err; err != nil {
		f.err = nil
		return 0, err
	}
	return 0, io.EOF
}

// When a body cannot be opened again, the refusal is the answer.
func TestWireRefusalIsTheAnswerWhenTheBodyIsGone(t *testing.T) {
	everyWay(t, wires, func(t *testing.T, y way) {
		site := y.serve(t, ok)
		site.revoke("bob/1")
		r := wireRequest(t, http.MethodPost, site.URL, strings.NewReader("body"))
		r.GetBody = func() (io.ReadCloser, error) { return nil, errors.New("gone") }
		got := wireDo(t, site.over(t, y.options()), r)
		assert.Equal(t, http.StatusUnauthorized, got.status)
		assert.Equal(t, "dead\n", got.body)
		assert.Len(t, site.requests(), 1)
	})
}

// Requests that net/http would not make by itself end in an error at worst.
func TestWireIncompleteRequestsDoNotPanic(t *testing.T) {
	for _, allow := range []func(sessionlock.Session, *url.URL) bool{nil, func(sessionlock.Session, *url.URL) bool { return true }} {
		site := wires[0].serve(t, ok)
		rt := site.over(t, sessionlock.TransportOptions{Allow: allow})
		r := wireRequest(t, http.MethodGet, site.URL, nil)
		r.Header, r.Method = nil, ""
		assert.Equal(t, "fine", wireDo(t, rt, r).body)
		assert.Nil(t, r.Header)
		var all bodies
		r = wireRequest(t, http.MethodPost, site.URL, all.open(strings.NewReader("body")))
		r.URL = nil
		assert.Error(t, readAll(rt.RoundTrip, r))
		assert.Zero(t, all.unclosed())
	}
}

// Apply may do to its copy what it likes.
func TestWireCallersRequestIsNotTouched(t *testing.T) {
	everyWay(t, wires, func(t *testing.T, y way) {
		site := y.site(t, ok)
		o := y.options()
		o.Apply = func(r *http.Request, s sessionlock.Session) {
			sessionlock.ApplyBearer(r, s)
			r.Header["X-Kept"][0] = "changed"
			r.Header.Del("X-Gone")
			r.URL.Path, r.URL.RawQuery, r.URL.User = "/changed", "changed=1", url.UserPassword("a", "b")
			r.Host, r.Method, r.Close = "changed.test", http.MethodPut, true
			r.TransferEncoding[0] = "changed"
			r.Form.Set("changed", "1")
			r.PostForm["a"][0] = "changed"
			r.MultipartForm.Value["a"][0] = "changed"
		}
		r := wireRequest(t, http.MethodPost, site.URL+"/mine?a=b", strings.NewReader("body"))
		r.Header = http.Header{"X-Kept": {"1", "2"}, "X-Gone": {"3"}, "Authorization": {"mine"}}
		r.Form, r.PostForm = url.Values{"a": {"b"}}, url.Values{"a": {"b"}}
		r.MultipartForm = &multipart.Form{Value: map[string][]string{"a": {"b"}}}
		r.TransferEncoding = []string{"identity"}
		if !y.repaired { // else it is sent again only if the first body has ended, which is a race here
			r.Trailer = http.Header{"X-Trailer": {"mine"}}
		}
		was := r.Clone(r.Context())
		shallow := *r
		got := wireDo(t, site.over(t, o), r)
		assert.Equal(t, "fine", got.body)
		assertSameRequest(t, was, &shallow, r)
		seen := site.requests()
		require.Len(t, seen, y.logins())
		for _, got := range seen {
			assert.Equal(t, "PUT /changed?changed=1", got.Method+" "+got.RequestURI)
			assert.Equal(t, []string{"changed", "2"}, got.Header["X-Kept"])
		}
	})
}

// assertSameRequest compares r, field by field, with a deep and a shallow copy that
// were taken before.
func assertSameRequest(t *testing.T, deep, shallow, r *http.Request) {
	t.Helper()
	d, s, now := reflect.ValueOf(deep).Elem(), reflect.ValueOf(shallow).Elem(), reflect.ValueOf(r).Elem()
	for i := range now.NumField() {
		f := now.Type().Field(i)
		if !f.IsExported() {
			continue
		}
		switch f.Type.Kind() {
		case reflect.Func, reflect.Chan, reflect.Map, reflect.Pointer, reflect.Slice:
			assert.Equal(t, s.Field(i).Pointer(), now.Field(i).Pointer(), f.Name)
		default:
			assert.Equal(t, s.Field(i).Interface(), now.Field(i).Interface(), f.Name)
		}
		if f.Type.Kind() != reflect.Func {
			assert.Equal(t, d.Field(i).Interface(), now.Field(i).Interface(), f.Name)
		}
	}
	assert.Equal(t, shallow.Context(), r.Context())
}

// Hundreds of callers share a transport, and even one request without a body.
func TestWireManyShareATransportAndARequest(t *testing.T) {
	const callers = 300
	for _, w := range wires {
		t.Run(w.name, func(t *testing.T) {
			site := w.serve(t, ok)
			site.base.MaxConnsPerHost = 8
			rt := site.over(t, sessionlock.TransportOptions{})
			r := wireRequest(t, http.MethodGet, site.URL, nil)
			r.Header.Set("X-Mine", "1")
			var wg sync.WaitGroup
			for i := range callers {
				wg.Go(func() {
					if i == callers/2 {
						site.revoke("bob/1")
					}
					answer, err := rt.RoundTrip(r)
					if !assert.NoError(t, err) {
						return
					}
					defer answer.Body.Close()
					body, err := io.ReadAll(answer.Body)
					assert.NoError(t, err)
					assert.Equal(t, "fine", string(body))
					assert.Same(t, r, answer.Request)
				})
			}
			wg.Wait()
			wireDo(t, rt, r)
			assert.Equal(t, 2, site.u.logins())
			assert.Equal(t, http.Header{"X-Mine": {"1"}}, r.Header)
		})
	}
}

// Whatever the status, an answer is no error, and has a body that can be closed.
func TestWireAnswersAreNoErrors(t *testing.T) {
	everyWay(t, wires, func(t *testing.T, y way) {
		site := y.site(t, func(w http.ResponseWriter, r *http.Request) {
			status, _ := strconv.Atoi(r.URL.Query().Get("status"))
			w.Header().Set("X-Mine", "1")
			w.WriteHeader(status)
		})
		rt := site.over(t, y.options())
		for _, status := range []int{200, 201, 302, 400, 403, 404, 407, 429, 500, 503, 599} {
			got := wireDo(t, rt, wireRequest(t, http.MethodGet, site.URL+"/?status="+strconv.Itoa(status), nil))
			assert.Equal(t, status, got.status)
			assert.Equal(t, "1", got.header.Get("X-Mine"))
		}
		site.revoke("bob/2")
		site.revoke("bob/3")
		got := wireDo(t, rt, wireRequest(t, http.MethodPost, site.URL+"/?status=200", io.MultiReader(strings.NewReader(strings.Repeat("once", 20<<10)))))
		if y.repaired {
			assert.Equal(t, http.StatusUnauthorized, got.status)
			assert.Equal(t, "dead\n", got.body)
		}
	})
}

// A base in memory may leave Body out, which net/http forgives an http.Client's
// base, so it never reaches a caller.
func TestWireAnswerWithoutABodyGetsOne(t *testing.T) {
	for _, judged := range []bool{false, true} {
		c := wireClient(t, acme, &upstream{})
		o := way{judged: judged}.options()
		o.Key = sessionlock.FixedKey(wireKey)
		rt := c.Transport(baseFunc(func(r *http.Request) (*http.Response, error) {
			status := map[string]int{"Bearer bob/1": 401, "Bearer bob/2": 500}[r.Header.Get("Authorization")]
			return &http.Response{StatusCode: status, ContentLength: -1, Header: http.Header{}}, nil
		}), &o)
		got := wireDo(t, rt, wireRequest(t, http.MethodGet, acme, nil))
		assert.Equal(t, 500, got.status)
		assert.Empty(t, got.body)
	}
}

// What was looked at is put back: every byte arrives once, whether or not the answer
// says how long it is.
func TestWireAnswersBodyIsWhole(t *testing.T) {
	everyWay(t, wires, func(t *testing.T, y way) {
		content := bytes.Repeat([]byte("0123456789abcdef"), 1<<13)
		site := y.site(t, func(w http.ResponseWriter, r *http.Request) {
			size, _ := strconv.Atoi(r.URL.Query().Get("size"))
			status, _ := strconv.Atoi(r.URL.Query().Get("status"))
			if r.URL.Query().Get("said") == "true" {
				w.Header().Set("Content-Length", strconv.Itoa(size))
			}
			w.WriteHeader(status)
			_ = http.NewResponseController(w).Flush()
			_, _ = w.Write(content[:size])
		})
		rt := site.over(t, y.options())
		for _, status := range []int{200, 500} {
			for _, size := range []int{0, 1, 4095, 4096, 4097, 64 << 10, 128 << 10} {
				for _, said := range []bool{false, true} {
					got := wireDo(t, rt, wireRequest(t, http.MethodGet, fmt.Sprintf("%s/?status=%d&size=%d&said=%t", site.URL, status, size, said), nil))
					assert.Equal(t, status, got.status)
					assert.True(t, bytes.Equal(content[:size], []byte(got.body)), "%d bytes of %d, said=%t", len(got.body), size, said)
					if said {
						assert.EqualValues(t, size, got.length)
					} else if size > 0 {
						assert.EqualValues(t, -1, got.length)
					}
				}
			}
		}
	})
}

// Closing an answer ends it, read to its end or not: base's body is closed, the
// server told, and nothing can be read any more.
func TestWireClosingAnAnswerEndsIt(t *testing.T) {
	everyWay(t, wires, func(t *testing.T, y way) {
		for _, status := range []int{200, 500} {
			for _, read := range []int64{0, 1, 5000} {
				gone := make(chan struct{})
				site := y.site(t, func(w http.ResponseWriter, r *http.Request) {
					defer close(gone)
					w.WriteHeader(status)
					_, _ = w.Write(bytes.Repeat([]byte("x"), 8<<10))
					_ = http.NewResponseController(w).Flush()
					<-r.Context().Done()
				})
				answer, err := site.over(t, y.options()).RoundTrip(wireRequest(t, http.MethodGet, site.URL, nil))
				require.NoError(t, err)
				n, err := io.CopyN(io.Discard, answer.Body, read)
				require.NoError(t, err)
				require.Equal(t, read, n)
				require.NoError(t, answer.Body.Close())
				soon(t, gone, "the server learns that nobody listens")
				if !y.judged {
					_, err = answer.Body.Read(make([]byte, 1))
					assert.Error(t, err)
				}
				assert.NoError(t, answer.Body.Close())
			}
		}
	})
}

// A refused answer is read to its end, so a repair costs no connection.
func TestWireRepairKeepsTheConnection(t *testing.T) {
	for _, w := range wires {
		for _, judged := range []bool{false, true} {
			for _, size := range []int{0, 100, 5000, 64 << 10} {
				for _, said := range []bool{false, true} {
					if size == 64<<10 && !said {
						size-- // its end is behind it
					}
					t.Run(fmt.Sprintf("%s/judged=%t/%d/said=%t", w.name, judged, size, said), func(t *testing.T) {
						site := way{wire: w, repaired: true}.site(t, ok)
						site.refusal = func(w http.ResponseWriter, r *http.Request) {
							_, _ = io.Copy(io.Discard, r.Body)
							if said {
								w.Header().Set("Content-Length", strconv.Itoa(size))
							}
							w.WriteHeader(http.StatusUnauthorized)
							_ = http.NewResponseController(w).Flush()
							_, _ = w.Write(make([]byte, size))
						}
						rt := site.over(t, way{judged: judged}.options())
						var reused []bool
						r := wireRequest(t, http.MethodPost, site.URL, strings.NewReader("body"))
						r = r.WithContext(httptrace.WithClientTrace(r.Context(), &httptrace.ClientTrace{
							GotConn: func(i httptrace.GotConnInfo) { reused = append(reused, i.Reused) },
						}))
						got := wireDo(t, rt, r)
						assert.Equal(t, "fine", got.body)
						assert.Equal(t, []bool{false, true}, reused)
						opened, _ := site.connections()
						assert.Equal(t, 1, opened)
						assert.Len(t, site.requests(), 2)
					})
				}
			}
		}
	}
}

// A refused answer that goes on and on is closed: one without an end could not be
// read to it.
func TestWireEndlessRefusalIsLeft(t *testing.T) {
	for _, w := range wires {
		for _, judged := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/judged=%t", w.name, judged), func(t *testing.T) {
				left := make(chan struct{})
				site := way{wire: w, repaired: true}.site(t, ok)
				site.refusal = func(w http.ResponseWriter, _ *http.Request) {
					defer close(left)
					w.WriteHeader(http.StatusUnauthorized)
					for chunk := make([]byte, 16<<10); ; {
						if _, err := w.Write(chunk); err != nil {
							return
						}
					}
				}
				got := wireDo(t, site.over(t, way{judged: judged}.options()), wireRequest(t, http.MethodGet, site.URL, nil))
				assert.Equal(t, "fine", got.body)
				soon(t, left, "the server learns that nobody listens")
			})
		}
	}
}

// Of a refused answer 64 KiB are read, no more, and it is closed before the request
// is sent again.
func TestWireRefusalIsReadUpTo64KiB(t *testing.T) {
	for _, size := range []int{0, 1, 64<<10 - 1, 64 << 10, 64<<10 + 1, 1 << 20} {
		for _, judged := range []bool{false, true} {
			refused := &tracked{Reader: bytes.NewReader(make([]byte, size))}
			o := way{judged: judged}.options()
			o.Key = sessionlock.FixedKey(wireKey)
			rt := wireClient(t, acme, &upstream{}).Transport(baseFunc(func(r *http.Request) (*http.Response, error) {
				if r.Header.Get("Authorization") == "Bearer bob/1" {
					return &http.Response{StatusCode: http.StatusUnauthorized, ContentLength: -1, Body: refused}, nil
				}
				assert.EqualValues(t, 1, refused.closed.Load())
				return answering(r)
			}), &o)
			got := wireDo(t, rt, wireRequest(t, http.MethodGet, acme, nil))
			assert.Equal(t, http.StatusOK, got.status)
			assert.EqualValues(t, min(size, 64<<10), refused.read.Load(), "of %d", size)
		}
	}
}

// The first event of a stream is there when it is sent, not when the stream ends.
func TestWireEventsArriveAsTheyAreSent(t *testing.T) {
	everyWay(t, wires, func(t *testing.T, y way) {
		next := make(chan struct{})
		site := y.site(t, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/event-stream")
			for i := range 3 {
				_, _ = fmt.Fprintf(w, "data: %d\n\n", i)
				_ = http.NewResponseController(w).Flush()
				select {
				case <-next:
				case <-r.Context().Done():
					return
				}
			}
		})
		answer, err := site.over(t, y.options()).RoundTrip(wireRequest(t, http.MethodGet, site.URL, nil))
		require.NoError(t, err)
		defer answer.Body.Close()
		events := bufio.NewReader(answer.Body)
		for i := range 3 {
			line, err := events.ReadString('\n')
			require.NoError(t, err)
			assert.Equal(t, fmt.Sprintf("data: %d\n", i), line)
			_, err = events.ReadString('\n')
			require.NoError(t, err)
			next <- struct{}{}
		}
		_, err = events.ReadByte()
		assert.ErrorIs(t, err, io.EOF)
	})
}

// The headers of a stream that has sent nothing yet are there, too.
func TestWireHeadersArriveBeforeTheFirstByte(t *testing.T) {
	everyWay(t, wires, func(t *testing.T, y way) {
		for _, status := range []int{200, 206, 399} {
			site := y.site(t, func(w http.ResponseWriter, r *http.Request) {
				w.WriteHeader(status)
				_ = http.NewResponseController(w).Flush()
				<-r.Context().Done()
			})
			answer, err := site.over(t, y.options()).RoundTrip(wireRequest(t, http.MethodGet, site.URL, nil))
			require.NoError(t, err)
			assert.Equal(t, status, answer.StatusCode)
			assert.NoError(t, answer.Body.Close())
		}
	})
}

// A large answer passes through; only its head is looked at before the caller has it.
func TestWireLargeAnswersAreNotBuffered(t *testing.T) {
	const size = 16 << 20 // more than sockets and windows hold
	for _, w := range wires {
		for _, judged := range []bool{false, true} {
			for _, status := range []int{200, 500} {
				t.Run(fmt.Sprintf("%s/judged=%t/%d", w.name, judged, status), func(t *testing.T) {
					var sent atomic.Bool
					site := w.serve(t, func(w http.ResponseWriter, _ *http.Request) {
						w.Header().Set("Content-Length", strconv.Itoa(size))
						w.WriteHeader(status)
						for chunk, n := make([]byte, 1<<20), 0; n < size; n += len(chunk) {
							if _, err := w.Write(chunk); err != nil {
								return
							}
						}
						sent.Store(true)
					})
					answer, err := site.over(t, way{judged: judged}.options()).RoundTrip(wireRequest(t, http.MethodGet, site.URL, nil))
					require.NoError(t, err)
					assert.False(t, sent.Load())
					n, err := io.Copy(io.Discard, answer.Body)
					require.NoError(t, err)
					assert.EqualValues(t, size, n)
					assert.NoError(t, answer.Body.Close())
				})
			}
		}
	}
}

// Over HTTP/2 a request and its answer run side by side, line by line; that of one
// that is not for the upstream, too.
func TestWireBothDirectionsStreamAtOnce(t *testing.T) {
	for _, judged := range []bool{false, true} {
		for _, elsewhere := range []bool{false, true} {
			site := wires[2].serve(t, func(w http.ResponseWriter, r *http.Request) {
				_ = http.NewResponseController(w).Flush()
				for lines := bufio.NewReader(r.Body); ; {
					line, err := lines.ReadString('\n')
					if err != nil {
						return
					}
					_, _ = io.WriteString(w, "echo "+line)
					_ = http.NewResponseController(w).Flush()
				}
			})
			rt := site.over(t, way{judged: judged}.options())
			if elsewhere {
				rt = wireClient(t, acme, site.u).Transport(site.base, nil)
			}
			in, out := io.Pipe()
			answer, err := rt.RoundTrip(wireRequest(t, http.MethodPost, site.URL, in))
			require.NoError(t, err)
			lines := bufio.NewReader(answer.Body)
			for i := range 3 {
				_, err := fmt.Fprintln(out, i)
				require.NoError(t, err)
				line, err := lines.ReadString('\n')
				require.NoError(t, err)
				assert.Equal(t, fmt.Sprintf("echo %d\n", i), line)
			}
			require.NoError(t, out.Close())
			_, err = lines.ReadByte()
			require.ErrorIs(t, err, io.EOF)
			require.NoError(t, answer.Body.Close())
		}
	}
}

// A request body that is long, or does not say how long it is, is sent as it is
// written, not when it ends.
func TestWireUploadsAreSentAsTheyAreWritten(t *testing.T) {
	const long = 64<<10 + 1
	first := strings.Repeat("x", 32<<10) + "\n" // more than net/http keeps back
	second := strings.Repeat("y", long-len(first)-1) + "\n"
	for _, w := range wires {
		for _, length := range []int64{-1, long} {
			if w.h2 && length == long {
				continue // which net/http keeps back by itself
			}
			t.Run(fmt.Sprintf("%s/%d", w.name, length), func(t *testing.T) {
				got := make(chan string)
				site := w.serve(t, func(w http.ResponseWriter, r *http.Request) {
					lines := bufio.NewReader(r.Body)
					for range 2 {
						line, _ := lines.ReadString('\n')
						got <- line
					}
					ok(w, r)
				})
				in, out := io.Pipe()
				done := make(chan error, 1)
				r := wireRequest(t, http.MethodPost, site.URL, in)
				r.ContentLength = length
				rt := site.over(t, sessionlock.TransportOptions{})
				go func() { done <- readAll(rt.RoundTrip, r) }()
				for _, line := range []string{first, second} {
					_, err := io.WriteString(out, line)
					require.NoError(t, err)
					assert.Equal(t, line, soon(t, got, "the line arrives"))
				}
				require.NoError(t, out.Close())
				assert.NoError(t, soon(t, done, "the answer"))
			})
		}
	}
}

// What base gets it can open again for itself, both times: a connection that was
// closed while it was idle, a stream refused by HTTP/2.
func TestWireBaseCanOpenTheBodyAgain(t *testing.T) {
	for _, opens := range []bool{false, true} {
		var bodies []string
		rt := wireClient(t, acme, &upstream{}).Transport(baseFunc(func(r *http.Request) (*http.Response, error) {
			if !assert.NotNil(t, r.GetBody) {
				return answering(r)
			}
			once, err := r.GetBody()
			assert.NoError(t, err)
			for _, body := range []io.Reader{r.Body, once} {
				b, err := io.ReadAll(body)
				assert.NoError(t, err)
				bodies = append(bodies, string(b))
			}
			if len(bodies) == 2 {
				return &http.Response{StatusCode: http.StatusUnauthorized, Body: http.NoBody}, nil
			}
			return answering(r)
		}), &sessionlock.TransportOptions{Key: sessionlock.FixedKey(wireKey)})
		r := wireRequest(t, http.MethodPost, acme, strings.NewReader("body"))
		if !opens {
			r.GetBody = nil
		}
		assert.Equal(t, http.StatusOK, wireDo(t, rt, r).status)
		assert.Equal(t, []string{"body", "body", "body", "body"}, bodies)
	}
}

// With Expect: 100-continue a body is sent when the server asks for it: not to be
// refused, and once when it is not.
func TestWireBodyWaitsUntilItIsAskedFor(t *testing.T) {
	const content = "a body that costs something to send"
	everyWay(t, wires, func(t *testing.T, y way) {
		asked, ask := make(chan struct{}), make(chan struct{})
		site := y.site(t, func(w http.ResponseWriter, r *http.Request) {
			close(asked)
			<-ask
			body, _ := io.ReadAll(r.Body)
			_, _ = w.Write(body)
		})
		site.base.ExpectContinueTimeout = tooLong
		var all bodies
		r := wireRequest(t, http.MethodPost, site.URL, all.open(strings.NewReader(content)))
		r.ContentLength = int64(len(content))
		r.GetBody = func() (io.ReadCloser, error) { return all.open(strings.NewReader(content)), nil }
		r.Header.Set("Expect", "100-continue")
		var read []int64
		go func() {
			defer close(ask)
			<-asked
			all.mu.Lock()
			defer all.mu.Unlock()
			for _, b := range all.all {
				read = append(read, b.read.Load())
			}
		}()
		got := wireDo(t, site.over(t, y.options()), r)
		assert.Equal(t, content, got.body)
		assert.Equal(t, make([]int64, y.logins()), read, "before it was asked for")
		for i, b := range all.all {
			want := 0
			if i == y.logins()-1 {
				want = len(content)
			}
			assert.EqualValues(t, want, b.read.Load(), "body %d", i)
		}
		assert.Eventually(t, func() bool { return all.unclosed() == 0 }, promptly, time.Millisecond)
	})
}

// summed is a body whose trailer is known when it has been read.
type summed struct {
	io.Reader
	trailer http.Header
}

func (b *summed) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	if err == io.EOF {
		b.trailer.Set("X-Sum", "42")
	}
	return n, err
}

func (b *summed) Close() error { return nil }

// A request's trailers may be filled in while its body is read, as net/http has it;
// the first one of a request that is sent twice, too.
func TestWireRequestTrailersArrive(t *testing.T) {
	everyWay(t, wires, func(t *testing.T, y way) {
		got := make(chan http.Header, 2)
		read := func(r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body)
			got <- r.Trailer
		}
		site := y.site(t, func(w http.ResponseWriter, r *http.Request) {
			read(r)
			ok(w, r)
		})
		refuse := site.refusal
		site.refusal = func(w http.ResponseWriter, r *http.Request) {
			read(r)
			refuse(w, r)
		}
		r := wireRequest(t, http.MethodPost, site.URL, nil)
		r.Trailer = http.Header{"X-Sum": nil}
		open := func() (io.ReadCloser, error) { return &summed{strings.NewReader("body"), r.Trailer}, nil }
		r.Body, _ = open()
		r.GetBody, r.ContentLength = open, -1
		wireDo(t, site.over(t, y.options()), r)
		for range y.logins() {
			assert.Equal(t, http.Header{"X-Sum": {"42"}}, soon(t, got, "the trailer"))
		}
	})
}

// An answer's trailers are there when its body has been read.
func TestWireAnswersTrailersArrive(t *testing.T) {
	everyWay(t, wires, func(t *testing.T, y way) {
		for _, status := range []int{200, 500} {
			for _, size := range []int{1, 64 << 10} {
				site := y.site(t, func(w http.ResponseWriter, _ *http.Request) {
					w.Header().Set("Trailer", "X-Sum")
					w.WriteHeader(status)
					_, _ = w.Write(make([]byte, size))
					_ = http.NewResponseController(w).Flush()
					w.Header().Set("X-Sum", "42")
					w.Header().Set(http.TrailerPrefix+"X-Late", "1")
				})
				got := wireDo(t, site.over(t, y.options()), wireRequest(t, http.MethodGet, site.URL, nil))
				assert.Equal(t, http.Header{"X-Sum": {"42"}, "X-Late": {"1"}}, got.trailer)
			}
		}
	})
}

// A connection that was upgraded is the caller's, both ways.
func TestWireUpgradesKeepTheConnection(t *testing.T) {
	everyWay(t, http1, func(t *testing.T, y way) {
		site := y.site(t, func(w http.ResponseWriter, _ *http.Request) {
			conn, both, err := http.NewResponseController(w).Hijack()
			if !assert.NoError(t, err) {
				return
			}
			defer conn.Close()
			_, _ = both.WriteString("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
			_ = both.Flush()
			_, _ = io.Copy(conn, both)
		})
		r := wireRequest(t, http.MethodGet, site.URL, nil)
		r.Header.Set("Connection", "Upgrade")
		r.Header.Set("Upgrade", "echo")
		answer, err := site.over(t, y.options()).RoundTrip(r) //nolint:bodyclose // conn is its body
		require.NoError(t, err)
		require.Equal(t, http.StatusSwitchingProtocols, answer.StatusCode)
		conn, both := answer.Body.(io.ReadWriteCloser)
		require.True(t, both, "%T", answer.Body)
		for _, word := range []string{"one", "two"} {
			_, err := io.WriteString(conn, word)
			require.NoError(t, err)
			got := make([]byte, len(word))
			_, err = io.ReadFull(conn, got)
			require.NoError(t, err)
			assert.Equal(t, word, string(got))
		}
		assert.NoError(t, conn.Close())
	})
}

// Early hints reach the caller's trace.
func TestWireEarlyHintsArrive(t *testing.T) {
	everyWay(t, wires, func(t *testing.T, y way) {
		site := y.site(t, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Link", "</style.css>")
			w.WriteHeader(http.StatusEarlyHints)
			ok(w, r)
		})
		var hints []string
		r := wireRequest(t, http.MethodGet, site.URL, nil)
		r = r.WithContext(httptrace.WithClientTrace(r.Context(), &httptrace.ClientTrace{
			Got1xxResponse: func(code int, h textproto.MIMEHeader) error {
				hints = append(hints, fmt.Sprintf("%d %s", code, h.Get("Link")))
				return nil
			},
		}))
		got := wireDo(t, site.over(t, y.options()), r)
		assert.Equal(t, "fine", got.body)
		assert.Equal(t, []string{"103 </style.css>"}, hints)
	})
}

// Answers that have no body by definition keep what they say of one.
func TestWireAnswersThatHaveNoBody(t *testing.T) {
	everyWay(t, wires, func(t *testing.T, y way) {
		site := y.site(t, func(w http.ResponseWriter, r *http.Request) {
			status, _ := strconv.Atoi(r.URL.Query().Get("status"))
			w.Header().Set("ETag", `"1"`)
			if r.Method == http.MethodHead {
				w.Header().Set("Content-Length", "5000")
			}
			w.WriteHeader(status)
		})
		rt := site.over(t, y.options())
		for _, one := range []struct {
			method string
			status int
			length int64
		}{
			{http.MethodHead, 200, 5000}, {http.MethodHead, 500, 5000}, {http.MethodGet, 204, 0}, {http.MethodGet, 304, 0}, {http.MethodDelete, 204, 0},
		} {
			got := wireDo(t, rt, wireRequest(t, one.method, fmt.Sprintf("%s/?status=%d", site.URL, one.status), nil))
			assert.Equal(t, one.status, got.status)
			assert.Equal(t, `"1"`, got.header.Get("ETag"))
			assert.Equal(t, one.length, got.length)
			assert.Empty(t, got.body)
		}
		opened, _ := site.connections()
		assert.Equal(t, 1, opened)
	})
}

// stalls are the places where a request can wait. Each is a site whose server or
// login hangs there and says so on at.
var stalls = map[string]func(t *testing.T, w wire, at chan<- struct{}) (*wireSite, sessionlock.TransportOptions, io.Reader){
	"login": func(t *testing.T, w wire, at chan<- struct{}) (*wireSite, sessionlock.TransportOptions, io.Reader) {
		site := w.serve(t, ok)
		site.u.script = func(context.Context, string, int) (sessionlock.Session, error) {
			at <- struct{}{}
			<-t.Context().Done()
			return sessionlock.Session{}, errors.New("hung")
		}
		return site, sessionlock.TransportOptions{}, nil
	},
	"answer": func(t *testing.T, w wire, at chan<- struct{}) (*wireSite, sessionlock.TransportOptions, io.Reader) {
		return w.serve(t, func(_ http.ResponseWriter, r *http.Request) { hang(t, r, at) }), sessionlock.TransportOptions{}, nil
	},
	"second answer": func(t *testing.T, w wire, at chan<- struct{}) (*wireSite, sessionlock.TransportOptions, io.Reader) {
		site := w.serve(t, func(_ http.ResponseWriter, r *http.Request) { hang(t, r, at) })
		site.revoke("bob/1")
		return site, sessionlock.TransportOptions{}, nil
	},
	"body": func(t *testing.T, w wire, at chan<- struct{}) (*wireSite, sessionlock.TransportOptions, io.Reader) {
		return w.serve(t, partly(t, http.StatusOK, at)), sessionlock.TransportOptions{}, nil
	},
	"head that Rejected wants": func(t *testing.T, w wire, at chan<- struct{}) (*wireSite, sessionlock.TransportOptions, io.Reader) {
		return w.serve(t, partly(t, http.StatusInternalServerError, at)), way{judged: true}.options(), nil
	},
	"refusal": func(t *testing.T, w wire, at chan<- struct{}) (*wireSite, sessionlock.TransportOptions, io.Reader) {
		return w.serve(t, partly(t, http.StatusUnauthorized, at)), sessionlock.TransportOptions{}, nil
	},
	"short request body": func(t *testing.T, w wire, at chan<- struct{}) (*wireSite, sessionlock.TransportOptions, io.Reader) {
		in, out := io.Pipe()
		t.Cleanup(func() { _ = out.Close() })
		go func() {
			_, _ = io.WriteString(out, "part")
			at <- struct{}{}
		}()
		return w.serve(t, ok), sessionlock.TransportOptions{}, in
	},
}

// hang says so on at and waits for the test to end: a server that ended its answer
// because nobody listens could be in time for who has just begun to leave.
func hang(t *testing.T, r *http.Request, at chan<- struct{}) {
	_, _ = io.Copy(io.Discard, r.Body)
	at <- struct{}{}
	<-t.Context().Done()
}

// partly begins an answer and hangs.
func partly(t *testing.T, status int, at chan<- struct{}) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(status)
		_, _ = io.WriteString(w, "part")
		_ = http.NewResponseController(w).Flush()
		hang(t, r, at)
	}
}

// readAll sends r and reads the answer to its end.
func readAll(do func(*http.Request) (*http.Response, error), r *http.Request) error {
	answer, err := do(r)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	_, err = io.Copy(io.Discard, answer.Body)
	return err
}

// A caller that gives up is let go at once wherever its request waits, and told why.
func TestWireCanceledCallersAreLetGo(t *testing.T) {
	for where, build := range stalls {
		for _, w := range wires {
			t.Run(where+"/"+w.name, func(t *testing.T) {
				at := make(chan struct{}, 4)
				site, o, in := build(t, w, at)
				body := &tracked{Reader: in, ended: make(chan struct{})}
				r := wireRequest(t, http.MethodPost, site.URL, nil)
				if in != nil {
					r.Body, r.ContentLength = body, 10
				}
				ctx, cancel := context.WithCancel(r.Context())
				defer cancel()
				rt, done := site.over(t, o), make(chan error, 1)
				go func() { done <- readAll(rt.RoundTrip, r.WithContext(ctx)) }()
				soon(t, at, "the request hangs")
				cancel()
				assert.ErrorIs(t, soon(t, done, "the caller is let go"), context.Canceled)
				if in != nil {
					soon(t, body.ended, "its body is closed")
				}
			})
		}
	}
}

// http.Client's own Timeout works wherever a request waits.
func TestWireClientTimeoutWorks(t *testing.T) {
	for where, build := range stalls {
		for _, w := range wires {
			t.Run(where+"/"+w.name, func(t *testing.T) {
				site, o, in := build(t, w, make(chan struct{}, 4))
				r := wireRequest(t, http.MethodPost, site.URL, nil)
				if in != nil {
					r.Body, r.ContentLength = io.NopCloser(in), 10
				}
				hc, done := &http.Client{Transport: site.over(t, o), Timeout: 100 * time.Millisecond}, make(chan error, 1)
				go func() { done <- readAll(hc.Do, r) }()
				assert.ErrorIs(t, soon(t, done, "the caller is let go"), context.DeadlineExceeded)
			})
		}
	}
}

// Callers that wait for one login are independent: whoever gives up, be it the one
// whose request began it, fails no other.
func TestWireImpatientCallersFailNobody(t *testing.T) {
	const callers = 20
	for _, w := range wires {
		t.Run(w.name, func(t *testing.T) {
			site := w.serve(t, ok)
			begun, over := make(chan struct{}), make(chan struct{})
			site.u.script = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
				close(begun)
				<-over
				return site.u.grant(key, n), nil
			}
			rt := site.over(t, sessionlock.TransportOptions{})
			ask := func(ctx context.Context) <-chan error {
				done := make(chan error, 1)
				r := wireRequest(t, http.MethodGet, site.URL, nil).WithContext(ctx)
				go func() { done <- readAll(rt.RoundTrip, r) }()
				return done
			}
			first, cancel := context.WithCancel(t.Context())
			defer cancel()
			leader := ask(first)
			soon(t, begun, "the login begins")
			var rest []<-chan error
			for i := range callers {
				ctx, leave := context.WithCancel(t.Context())
				defer leave()
				rest = append(rest, ask(ctx))
				if i%2 == 0 {
					leave()
				}
			}
			cancel()
			assert.ErrorIs(t, soon(t, leader, "the leader is let go"), context.Canceled)
			for i := 0; i < callers; i += 2 {
				assert.ErrorIs(t, soon(t, rest[i], "a caller is let go"), context.Canceled)
			}
			close(over)
			for i := 1; i < callers; i += 2 {
				assert.NoError(t, soon(t, rest[i], "the login serves the others"))
			}
			assert.Equal(t, 1, site.u.logins())
			assert.Len(t, site.requests(), callers/2)
		})
	}
}

// CloseIdleConnections of an http.Client is base's.
func TestWireIdleConnectionsCanBeClosed(t *testing.T) {
	for _, w := range wires {
		t.Run(w.name, func(t *testing.T) {
			site := w.serve(t, ok)
			hc := &http.Client{Transport: site.over(t, sessionlock.TransportOptions{})}
			require.NoError(t, readAll(hc.Do, wireRequest(t, http.MethodGet, site.URL, nil)))
			_, closed := site.connections()
			require.Zero(t, closed)
			hc.CloseIdleConnections()
			assert.Eventually(t, func() bool { _, closed := site.connections(); return closed == 1 }, promptly, time.Millisecond)
		})
	}
	c := wireClient(t, acme, &upstream{})
	assert.NotPanics(t, (&http.Client{Transport: c.Transport(baseFunc(answering), nil)}).CloseIdleConnections)
}

// town is a home, the only place sessions may go to, and everything else: names are
// resolved as DNS does, whatever their case and a dot at the end.
type town struct {
	*http.Transport
	scheme      string
	host        string // home's, and its port
	port        string
	home, other *wireSite // by home's scheme
	flip        *wireSite // as other, by the other scheme
}

const townName = "tokens.acme.test"

// newTown returns a town in which every server redirects: ?to=, with the status ?as=.
func newTown(t *testing.T, w wire, name string) *town {
	t.Helper()
	redirect := func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		if to := r.URL.Query().Get("to"); to != "" {
			status, _ := strconv.Atoi(r.URL.Query().Get("as"))
			w.Header()["Location"] = []string{to}
			w.WriteHeader(status)
		}
	}
	tn := &town{scheme: "http", host: name, port: "80", home: w.serve(t, redirect), other: w.serve(t, redirect)}
	tn.flip = wires[1].serve(t, redirect)
	if w.tls {
		tn.scheme, tn.port, tn.flip = "https", "443", wires[0].serve(t, redirect)
	}
	tn.Transport = &http.Transport{DialContext: tn.dial, ForceAttemptHTTP2: w.h2, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
	t.Cleanup(tn.CloseIdleConnections)
	return tn
}

func (tn *town) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(strings.ToLower(addr))
	if err != nil {
		return nil, err
	}
	site := tn.other
	switch encrypted := port == "443" || port == "8443"; {
	case strings.TrimSuffix(host, ".") == tn.host && port == tn.port:
		site = tn.home
	case encrypted != (tn.scheme == "https"):
		site = tn.flip
	}
	return new(net.Dialer).DialContext(ctx, network, site.Listener.Addr().String())
}

// url fills in a pattern: S and F for home's scheme and the other one, P and Q for
// home's port and a port of that scheme that is not home's, N for home's name.
func (tn *town) url(pattern string) string {
	flip, port := map[string]string{"http": "https", "https": "http"}, map[string]string{"http": "8080", "https": "8443"}
	return strings.NewReplacer("{S}", tn.scheme, "{F}", flip[tn.scheme], "{P}", tn.port, "{Q}", port[tn.scheme], "{N}", tn.host).Replace(pattern)
}

// secrets is what nobody but home may see.
const wireSecret = "s3cr3t"

// carriers are the ways in which a session goes out, and how home sees it.
var carriers = map[string]struct {
	apply  func(*http.Request, sessionlock.Session)
	header string
	value  string
}{
	"bearer": {nil, "Authorization", "Bearer SID=" + wireSecret},
	"header": {sessionlock.ApplyHeader("X-Token"), "X-Token", "SID=" + wireSecret},
	"cookie": {sessionlock.ApplyCookies, "Cookie", "SID=" + wireSecret},
}

// client returns a client of home, and its http.Client.
func (tn *town) client(t *testing.T, carrier string) (*upstream, *http.Client) {
	t.Helper()
	u := &upstream{script: func(context.Context, string, int) (sessionlock.Session, error) {
		return sessionlock.Session{Token: sessionlock.TokenFromCookies([]*http.Cookie{{Name: "SID", Value: wireSecret}})}, nil
	}}
	c := wireClient(t, tn.scheme+"://"+tn.host, u)
	o := &sessionlock.TransportOptions{Key: sessionlock.FixedKey(wireKey), Apply: carriers[carrier].apply}
	return u, &http.Client{Transport: c.Transport(tn.Transport, o)}
}

// carrying counts the requests that home saw with the session and without, and
// those that others saw. It fails the test if these saw a secret.
func (tn *town) carrying(t *testing.T, carrier string) (with, without, others int) {
	t.Helper()
	for _, r := range tn.home.requests() {
		if r.Header.Get(carriers[carrier].header) == carriers[carrier].value {
			with++
			continue
		}
		without++
		assertNoSecret(t, r)
	}
	for _, r := range append(tn.other.requests(), tn.flip.requests()...) {
		others++
		assertNoSecret(t, r)
		assert.Empty(t, r.Header.Get("Cookie")+r.Header.Get("X-Token"))
		assert.NotContains(t, r.Header.Get("Authorization"), "Bearer") // net/http makes Basic of a URL's user
	}
	return with, without, others
}

func assertNoSecret(t *testing.T, r *http.Request) {
	t.Helper()
	assert.NotContains(t, fmt.Sprint(r.Header, r.URL, r.RequestURI, r.Host), wireSecret)
}

// everyCarrier runs f in every town, for every carrier.
func everyCarrier(t *testing.T, f func(t *testing.T, tn *town, carrier string)) {
	t.Helper()
	for _, w := range wires {
		tn := newTown(t, w, townName)
		for carrier := range carriers {
			t.Run(w.name+"/"+carrier, func(t *testing.T) { f(t, tn, carrier) })
		}
	}
}

// Places as a redirect, a link or a configuration may spell them.
var (
	homely = map[string]string{
		"same":            "{S}://{N}/b",
		"explicit port":   "{S}://{N}:{P}/b",
		"empty port":      "{S}://{N}:/b",
		"other case":      "{S}://Tokens.ACME.test/b",
		"other case port": "{S}://TOKENS.acme.test:{P}/b",
		"userinfo":        "{S}://mallory@{N}/b",
	}
	foreign = map[string]string{
		"other scheme":            "{F}://{N}/b",
		"other scheme, same port": "{F}://{N}:{P}/b",
		"other port":              "{S}://{N}:{Q}/b",
		"port with a zero":        "{S}://{N}:0{P}/b",
		"subdomain":               "{S}://sub.{N}/b",
		"parent":                  "{S}://acme.test/b",
		"sibling":                 "{S}://tokens2.acme.test/b",
		"prefix of a name":        "{S}://{N}.evil.test/b",
		"suffix of a name":        "{S}://evil{N}/b",
		"name as user":            "{S}://{N}@evil.test/b",
		"name and port as user":   "{S}://{N}:{P}@evil.test/b",
		"name in the path":        "{S}://evil.test/{N}",
		"address":                 "{S}://127.0.0.1/b",
		"trailing dot":            "{S}://{N}./b",
	}
	lookalike = map[string]string{ // letters that fold or map to home's
		"Kelvin sign":        "{S}://to\u212aens.acme.test/b",
		"long s":             "{S}://token\u017f.acme.test/b",
		"full width":         "{S}://\uff54okens.acme.test/b",
		"escaped look-alike": "{S}://to%E2%84%AAens.acme.test/b",
	}
)

// abroad returns more, and the places that are not home. Over HTTP/2 net/http itself
// waits for ever for a host whose name it has to map.
func (tn *town) abroad(more ...map[string]string) []map[string]string {
	if tn.ForceAttemptHTTP2 {
		return append(more, foreign)
	}
	return append(more, foreign, lookalike)
}

// A redirect within the upstream carries the session, with any status and body; one
// to anywhere else does not, in whatever header it goes.
func TestWireRedirectsCarryTheSessionNoFurther(t *testing.T) {
	relative := map[string]string{
		"path": "/b", "relative path": "b", "query": "?x=1", "protocol-relative": "//{N}/b", "protocol-relative with port": "//{N}:{P}/b",
	}
	away := map[string]string{
		"protocol-relative":            "//evil.test/b",
		"protocol-relative other port": "//{N}:{Q}/b",
		"protocol-relative user":       "//{N}@evil.test/b",
	}
	everyCarrier(t, func(t *testing.T, tn *town, carrier string) {
		u, hc := tn.client(t, carrier)
		follow := func(to, status string) {
			t.Helper()
			r := wireRequest(t, http.MethodPost, tn.url("{S}://{N}/a?as="+status+"&to=")+url.QueryEscape(tn.url(to)), strings.NewReader("body"))
			r.Header.Set("X-Mine", "1")
			_ = readAll(hc.Do, r) // a Location may be no URL for net/http
		}
		for _, status := range []string{"302", "307", "308"} {
			for _, places := range []map[string]string{homely, relative} {
				for name, to := range places {
					follow(to, status)
					with, without, others := tn.carrying(t, carrier)
					assert.Equal(t, []int{2, 0, 0}, []int{with, without, others}, "%s by %s", name, status)
				}
			}
			for _, places := range tn.abroad(away) {
				for name, to := range places {
					follow(to, status)
					with, _, _ := tn.carrying(t, carrier)
					assert.Equal(t, 1, with, "%s by %s", name, status)
				}
			}
		}
		assert.Equal(t, 1, u.logins())
	})
}

// The same holds for a request that names the place itself. Nobody logs in for one
// that is not for the upstream.
func TestWireOnlyTheUpstreamGetsTheSession(t *testing.T) {
	everyCarrier(t, func(t *testing.T, tn *town, carrier string) {
		u, hc := tn.client(t, carrier)
		arrived := 0
		for _, places := range tn.abroad() {
			for name, to := range places {
				if r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, tn.url(to), nil); err == nil {
					_ = readAll(hc.Transport.RoundTrip, r)
				}
				with, without, others := tn.carrying(t, carrier)
				assert.Zero(t, with, name)
				arrived += without + others
			}
		}
		assert.GreaterOrEqual(t, arrived, len(foreign)-2, "what arrives nowhere shows nothing")
		assert.Zero(t, u.logins())
		for name, to := range homely {
			require.NoError(t, readAll(hc.Do, wireRequest(t, http.MethodGet, tn.url(to), nil)))
			with, without, others := tn.carrying(t, carrier)
			assert.Equal(t, []int{1, 0, 0}, []int{with, without, others}, name)
		}
		assert.Equal(t, 1, u.logins())
	})
}

// A Host header decides whose backend gets the request where many share a server.
func TestWireHostHeaderIsPartOfThePlace(t *testing.T) {
	everyCarrier(t, func(t *testing.T, tn *town, carrier string) {
		_, hc := tn.client(t, carrier)
		for host, want := range map[string]int{
			"":                      1,
			"{N}":                   1,
			"{N}:{P}":               1,
			"{N}:{Q}":               1,
			"TOKENS.acme.test":      1,
			"evil.test":             0,
			"evil.test:{P}":         0,
			"{N}.":                  0,
			"sub.{N}":               0,
			"{N}.evil.test":         0,
			"{N}@evil.test":         0,
			"{N}:{P}@evil.test":     0,
			"evil.test@{N}":         0,
			"{N}/evil.test":         0,
			"{N} evil.test":         0,
			"{N}:evil":              0,
			"127.0.0.1":             0,
			"to\u212aens.acme.test": 0,
			"token\u017f.acme.test": 0,
		} {
			r := wireRequest(t, http.MethodGet, tn.url("{S}://{N}/b"), nil)
			r.Host = tn.url(host)
			err := readAll(hc.Do, r)
			with, without, others := tn.carrying(t, carrier)
			assert.Equal(t, want, with, host)
			assert.Zero(t, others)
			assert.True(t, err != nil || with+without == 1, host)
		}
	})
}

// What another host answers is no verdict about the session, and starts no login,
// whoever says that it is another.
func TestWireOthersAreNoJudges(t *testing.T) {
	for i, w := range append(wires, wires...) {
		t.Run(fmt.Sprintf("%s/%d", w.name, i), func(t *testing.T) {
			tn := newTown(t, w, townName)
			tn.other.revoke("") // 401, to a request without a session
			u, hc := tn.client(t, "bearer")
			if i >= len(wires) {
				hc.Transport = wireClient(t, acme, u).Transport(tn.Transport, &sessionlock.TransportOptions{
					Key:   sessionlock.FixedKey(wireKey),
					Allow: func(_ sessionlock.Session, u *url.URL) bool { return u.Host == townName },
				})
			}
			for range 3 {
				answer, err := hc.Do(wireRequest(t, http.MethodGet, tn.url("{S}://{N}/a?as=302&to=//evil.test/b"), nil))
				require.NoError(t, err)
				assert.Equal(t, http.StatusUnauthorized, answer.StatusCode)
				require.NoError(t, answer.Body.Close())
			}
			with, without, others := tn.carrying(t, "bearer")
			assert.Equal(t, []int{3, 0, 3}, []int{with, without, others})
			assert.Equal(t, 1, u.logins())
		})
	}
}

// An address and a name for it are two places.
func TestWireNamesOfOneAddressAreNotTheSame(t *testing.T) {
	for _, home := range []string{"127.0.0.1", "localhost", "[::1]", "[fe80::1]"} {
		for _, to := range []string{"127.0.0.1", "localhost", "[::1]", "[0:0::1]", "[fe80::1]", "0x7f.1", "2130706433"} {
			t.Run(home+" to "+to, func(t *testing.T) {
				tn := newTown(t, wires[0], strings.Trim(home, "[]"))
				u := &upstream{}
				c := wireClient(t, "http://"+home, u)
				rt := c.Transport(tn.Transport, &sessionlock.TransportOptions{Key: sessionlock.FixedKey(wireKey)})
				require.NoError(t, readAll(rt.RoundTrip, wireRequest(t, http.MethodGet, "http://"+to+"/", nil)))
				seen := append(tn.home.requests(), tn.other.requests()...)
				require.Len(t, seen, 1)
				want := ""
				if home == to {
					want = "Bearer bob/1"
				}
				assert.Equal(t, want, seen[0].Header.Get("Authorization"))
			})
		}
	}
}

// The upstream's own spelling does not matter either.
func TestWireUpstreamMayBeSpeltInManyWays(t *testing.T) {
	for _, w := range wires {
		tn := newTown(t, w, townName)
		for _, name := range []string{"{S}://{N}", "{S}://{N}/", "{S}://{N}/api/v2?x=1", "{S}://{N}:{P}", "{S}://TOKENS.acme.test:{P}/"} {
			c := wireClient(t, tn.url(name), &upstream{})
			rt := c.Transport(tn.Transport, &sessionlock.TransportOptions{Key: sessionlock.FixedKey(wireKey)})
			for _, to := range homely {
				require.NoError(t, readAll(rt.RoundTrip, wireRequest(t, http.MethodGet, tn.url(to), nil)))
			}
			for _, r := range tn.home.requests() {
				assert.Equal(t, "Bearer bob/1", r.Header.Get("Authorization"), name)
			}
		}
	}
}

// A port is as much a part of the place as it is in a URL.
func TestWireUpstreamWithAPortIsThatPortOnly(t *testing.T) {
	for _, w := range wires {
		tn := newTown(t, w, townName)
		c := wireClient(t, tn.url("{S}://{N}:{Q}"), &upstream{})
		rt := c.Transport(tn.Transport, &sessionlock.TransportOptions{Key: sessionlock.FixedKey(wireKey)})
		for to, want := range map[string]string{"{S}://{N}:{Q}/": "Bearer bob/1", "{S}://{N}:{P}/": "", "{S}://{N}/": ""} {
			require.NoError(t, readAll(rt.RoundTrip, wireRequest(t, http.MethodGet, tn.url(to), nil)))
			seen := append(tn.home.requests(), tn.other.requests()...)
			require.Len(t, seen, 1)
			assert.Equal(t, want, seen[0].Header.Get("Authorization"), to)
		}
	}
}

// Allow takes the place of all that, and is asked for the Host header's place, too.
func TestWireAllowIsAskedForEveryPlace(t *testing.T) {
	everyCarrier(t, func(t *testing.T, tn *town, carrier string) {
		c := wireClient(t, tn.url("{S}://{N}"), &upstream{script: func(context.Context, string, int) (sessionlock.Session, error) {
			s := sessionlock.Session{Token: sessionlock.NewToken("SID=" + wireSecret)}
			return s.WithValue("instance", tn.url("{S}://{N}")), nil
		}})
		var asked []string
		rt := c.Transport(tn.Transport, &sessionlock.TransportOptions{
			Key: sessionlock.FixedKey(wireKey), Apply: carriers[carrier].apply,
			Allow: func(s sessionlock.Session, u *url.URL) bool {
				asked = append(asked, u.String())
				return u.Scheme+"://"+u.Host == s.Value("instance")
			},
		})
		for _, one := range []struct {
			url, host string
			with      int
			asked     []string
		}{
			{"{S}://{N}/b?x=1", "", 1, []string{"{S}://{N}/b?x=1"}},
			{"{S}://{N}/b?x=1", "{N}", 1, []string{"{S}://{N}/b?x=1"}},
			{"{S}://{N}/b?x=1", "evil.test", 0, []string{"{S}://evil.test/b?x=1"}},
			{"{S}://evil.test/b", "", 0, []string{"{S}://evil.test/b"}},
			{"{S}://evil.test/b", "{N}", 0, []string{"{S}://{N}/b", "{S}://evil.test/b"}},
			{"{F}://{N}/b", "", 0, []string{"{F}://{N}/b"}},
		} {
			asked = nil
			r := wireRequest(t, http.MethodGet, tn.url(one.url), nil)
			r.Host = tn.url(one.host)
			require.NoError(t, readAll(rt.RoundTrip, r))
			with, without, others := tn.carrying(t, carrier)
			assert.Equal(t, one.with, with, one)
			assert.Equal(t, 1, with+without+others)
			for i := range one.asked {
				one.asked[i] = tn.url(one.asked[i])
			}
			assert.Equal(t, one.asked, asked)
		}
	})
}

// wireProxy is a reverse proxy in front of a town, that lends its callers a session.
func wireProxy(t *testing.T, tn *town, p *httputil.ReverseProxy) *wireSite {
	t.Helper()
	_, hc := tn.client(t, "bearer")
	p.Transport = hc.Transport
	p.ErrorLog = log.New(io.Discard, "", 0)
	return wires[0].serve(t, p.ServeHTTP)
}

// An inbound Host header moves no token: with SetURL it is not passed on, and where
// it is, the request goes without.
func TestWireProxyCallersCannotMoveTheToken(t *testing.T) {
	for _, w := range wires {
		tn := newTown(t, w, townName)
		home, err := url.Parse(tn.url("{S}://{N}"))
		require.NoError(t, err)
		kept := func(r *httputil.ProxyRequest) {
			r.SetURL(home)
			r.Out.Host = r.In.Host
		}
		for name, one := range map[string]struct {
			proxy *httputil.ReverseProxy
			moved int // requests with the session, if the inbound Host is another
		}{
			"Rewrite":                 {&httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(home) }}, 1},
			"Rewrite that keeps Host": {&httputil.ReverseProxy{Rewrite: kept}, 0},
			"Director":                {httputil.NewSingleHostReverseProxy(home), 0},
		} {
			t.Run(w.name+"/"+name, func(t *testing.T) {
				front := wireProxy(t, tn, one.proxy)
				for host, with := range map[string]int{"evil.test": one.moved, "evil.test:443": one.moved, townName: 1, townName + ":8443": 1} {
					r := wireRequest(t, http.MethodGet, front.URL+"/a", nil)
					r.Host = host
					r.Header.Set("Connection", "Authorization, X-Token")
					require.NoError(t, readAll(front.base.RoundTrip, r))
					got, without, others := tn.carrying(t, "bearer")
					assert.Equal(t, []int{with, 1 - with, 0}, []int{got, without, others}, host)
				}
			})
		}
	}
}

// A body of known length that came in can go out twice.
func TestWireProxyRepairsWhatItPasses(t *testing.T) {
	for _, w := range wires {
		for _, size := range []int{0, 1, 64 << 10} {
			t.Run(fmt.Sprintf("%s/%d", w.name, size), func(t *testing.T) {
				site := way{wire: w, repaired: true}.site(t, func(w http.ResponseWriter, r *http.Request) {
					body, _ := io.ReadAll(r.Body)
					_, _ = w.Write(body)
				})
				home, err := url.Parse(site.URL)
				require.NoError(t, err)
				proxy := &httputil.ReverseProxy{
					Rewrite:   func(r *httputil.ProxyRequest) { r.SetURL(home) },
					Transport: site.over(t, sessionlock.TransportOptions{}),
				}
				front := wires[0].serve(t, proxy.ServeHTTP)
				content := strings.Repeat("x", size)
				got := wireDo(t, front.base, wireRequest(t, http.MethodPost, front.URL, strings.NewReader(content)))
				assert.Equal(t, http.StatusOK, got.status)
				assert.Equal(t, content, got.body)
				for _, r := range site.requests() {
					assert.EqualValues(t, size, r.ContentLength)
				}
			})
		}
	}
}

// Inbound trailers are filled in while the body passes, and arrive if the proxy hands
// on the map, as it would with base alone.
func TestWireProxyPassesTrailers(t *testing.T) {
	for _, w := range wires {
		t.Run(w.name, func(t *testing.T) {
			got := make(chan http.Header, 1)
			site := w.serve(t, func(w http.ResponseWriter, r *http.Request) {
				ok(w, r)
				got <- r.Trailer
			})
			home, err := url.Parse(site.URL)
			require.NoError(t, err)
			proxy := &httputil.ReverseProxy{
				Rewrite: func(r *httputil.ProxyRequest) {
					r.SetURL(home)
					r.Out.Trailer = r.In.Trailer
				},
				Transport: site.over(t, sessionlock.TransportOptions{}),
			}
			front := wires[0].serve(t, proxy.ServeHTTP)
			r := wireRequest(t, http.MethodPost, front.URL, nil)
			r.Trailer = http.Header{"X-Sum": nil}
			r.Body, r.ContentLength = &summed{strings.NewReader("body"), r.Trailer}, -1
			wireDo(t, front.base, r)
			assert.Equal(t, http.Header{"X-Sum": {"42"}}, soon(t, got, "the trailer"))
		})
	}
}

// What a session costs a request beside base, in allocations: not a matter of time,
// so it can be held. x/oauth2's Transport (v0.36.0, a static token, same requests)
// adds 6 without headers and 7 with; ours 7 and 8, and 16 where it has to read a body
// that has no GetBody. The bounds leave room for other versions of Go.
func TestWireSessionCostsFewAllocations(t *testing.T) {
	for _, one := range []struct {
		name    string
		headers int
		body    bool
		most    float64
	}{
		{"plain", 0, false, 8},
		{"headers", 6, false, 9},
		{"body to be read", 6, true, 18},
	} {
		t.Run(one.name, func(t *testing.T) {
			c := wireClient(t, acme, &upstream{})
			rt := c.Transport(baseFunc(answering), &sessionlock.TransportOptions{Key: sessionlock.FixedKey(wireKey)})
			r := wireRequest(t, http.MethodGet, acme, nil)
			for i := range one.headers {
				r.Header.Set(fmt.Sprintf("X-%d", i), "1")
			}
			run := func(rt http.RoundTripper) float64 {
				return testing.AllocsPerRun(1000, func() {
					if one.body {
						r.Body, r.ContentLength = io.NopCloser(strings.NewReader("body")), 4
					}
					assert.NoError(t, readAll(rt.RoundTrip, r))
				})
			}
			run(rt) // logs in
			assert.LessOrEqual(t, run(rt)-run(baseFunc(answering)), one.most)
		})
	}
}
