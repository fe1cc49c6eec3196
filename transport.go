// transport.go puts sessions on HTTP requests. It is kept beside client.go because
// it adds nothing to the algorithm: a request is what Do runs.

package sessionlock

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	defaultPeek   = 4 << 10
	defaultBuffer = 64 << 10
	maxDrain      = 64 << 10 // of an answer nobody will read, so that its connection can be used again
	drainTime     = 100 * time.Millisecond
)

// TransportOptions say how an upstream's requests carry a session. The zero value
// is a bearer token for the key of [KeyContext], and 401 for a dead session.
type TransportOptions struct {
	// Key says whose session a request needs. Its error is the request's. Default:
	// [KeyFromContext], and [ErrInvalid] without one; see also [FixedKey].
	Key func(*http.Request) (string, error)

	// Apply puts the session on a request, which is a copy of the caller's. Default:
	// [ApplyBearer]; see also [ApplyHeader] and [ApplyCookies].
	Apply func(*http.Request, Session)

	// Rejected says whether an answer means that the session was refused. It must not
	// read the answer's body: head is how that begins, up to Peek bytes, as it came
	// (compressed where the caller asked for that). An answer below 400 that does not
	// say how long it is may be a stream, and has no head: chunked ones, and those that
	// net/http asked to be compressed. Where the upstream refuses by such an answer set
	// DisableCompression in base, or judge by its status and headers. Default: 401 is
	// RejectedBefore, anything else NotRejected.
	Rejected func(answer *http.Response, head []byte) Verdict

	// Allow says whether s may be sent to u; where it may not, the request goes
	// without a session. Look at the scheme too. It takes the place of the default,
	// which is the scheme, host and port of the client's upstream: for an instance URL
	// that came with the login, for instance. It is also asked about the Host header,
	// where that names another host.
	Allow func(s Session, u *url.URL) bool

	// Peek is how much of an answer's body Rejected is shown, in bytes. Default: 4 KiB;
	// negative: nothing.
	Peek int

	// Buffer is how much of the body of a request that has no GetBody is kept, so that it
	// can be sent again, in bytes. A body whose Content-Length is no more than that is
	// read before it is sent. One of unknown length is kept as it is sent, and can be sent
	// again if it was that short and had ended when it was refused. Default: 64 KiB;
	// negative: none is kept.
	Buffer int
}

// Transport returns base with sessions: a request to the upstream goes out with the
// session of its key, and when the upstream refuses that, once more with the next
// one, as in [Client.Do]. Any other request goes to base as it is: to another host,
// port or scheme, so that no redirect carries the session away, or with an opaque URL;
// one made inside Login, WithRefresh or WithLogout with the context these were given,
// unless Key says that it needs another key's session; and one that comes from another
// Transport of c. A nil base is [http.DefaultTransport]; nil
// options will do.
//
//	hc := &http.Client{Transport: client.Transport(nil, nil)}
//
// A request is sent again only if its body can be: there is none, it has GetBody (as
// [http.NewRequest] sets it for the usual readers), or it is short, see Buffer. After
// [RejectedDuring] it must also be safe to repeat: GET, HEAD, OPTIONS or TRACE, an
// Idempotency-Key header, or [IdempotentContext]. The refused answer is read to its
// end, up to 64 KiB and for 100 ms, and closed, so that the connection can be used again.
//
// An answer is returned as it came whenever there is one: also a refusal, when the
// request cannot be sent again or was refused twice; the session has ended for the
// fleet then. Errors are those of base; those of [Client.Session] when there is no
// session to send it with; and [*ReauthError] when there is no other one. They come
// wrapped in a [*url.Error] from an http.Client. [ErrInvalid] is returned for any
// request when c's upstream is not an http or https URL and there is no Allow.
//
// Requests made with the context of a [Scope] use its session. Inside its SetUp they use
// the one to be set up and are sent once, and its refusal is an error, for the SetUp to
// return: then the scope repairs it. The caller's request is not changed, and is
// what the answer's Request says, so it shows no token. Leave the http.Client's Jar
// nil where the upstream sets cookies: a jar knows no keys.
func (c *Client) Transport(base http.RoundTripper, opts *TransportOptions) http.RoundTripper {
	t := &transport{c: c, base: base}
	if opts != nil {
		t.TransportOptions = *opts
	}
	if base == nil {
		t.base = http.DefaultTransport
	}
	if t.Key == nil {
		t.Key = keyOfContext
	}
	if t.Apply == nil {
		t.Apply = ApplyBearer
	}
	if t.Peek == 0 {
		t.Peek = defaultPeek
	}
	if t.Buffer == 0 {
		t.Buffer = defaultBuffer
	}
	home, err := url.Parse(c.upstream)
	switch {
	case isNil(t.base):
		t.bad = fmt.Errorf("%w: the transport's base is a nil pointer", ErrInvalid)
	case t.Allow != nil:
	case err != nil, home.Hostname() == "", portOf(home) == "":
		t.bad = fmt.Errorf("%w: the client's upstream is no http or https URL, so the transport needs an Allow", ErrInvalid)
	default:
		t.home = home
	}
	return t
}

// FixedKey is a [TransportOptions].Key for one service account.
func FixedKey(key string) func(*http.Request) (string, error) {
	return func(*http.Request) (string, error) { return key, nil }
}

func keyOfContext(r *http.Request) (string, error) {
	key, ok := KeyFromContext(r.Context())
	if !ok {
		return "", fmt.Errorf("%w: no key for a request to the upstream: set KeyContext or TransportOptions.Key", ErrInvalid)
	}
	return key, nil
}

// ApplyBearer sets the Authorization header to Bearer and the token (RFC 6750).
func ApplyBearer(r *http.Request, s Session) {
	r.Header.Set("Authorization", "Bearer "+s.Token.Reveal())
}

// ApplyHeader is a [TransportOptions].Apply that sets the header called name to the
// token.
func ApplyHeader(name string) func(*http.Request, Session) {
	return func(r *http.Request, s Session) { r.Header.Set(name, s.Token.Reveal()) }
}

// TokenFromCookies returns the cookies of a login's answer as one secret, for
// [ApplyCookies]. A later cookie takes the place of an earlier one of its name; what
// the answer deletes is left out. The zero Token when nothing is left. Names and
// values are all that is kept: set Session.Expiry from what the cookies say, and
// leave a cookie out that is meant for another path.
func TokenFromCookies(cookies []*http.Cookie) Token {
	var kept []*http.Cookie
	for _, k := range cookies {
		if k == nil {
			continue
		}
		kept = without(kept, k.Name)
		if k.MaxAge < 0 || k.MaxAge == 0 && !k.Expires.IsZero() && k.Expires.Before(time.Now()) {
			continue
		}
		kept = append(kept, k)
	}
	return NewToken(cookieHeader(kept))
}

// ApplyCookies adds the cookies of a token made by [TokenFromCookies]. Other cookies
// of the request stay; those of the same names are replaced.
func ApplyCookies(r *http.Request, s Session) {
	ours, err := http.ParseCookie(s.Token.Reveal())
	if err != nil { // a token that was made otherwise
		r.Header.Set("Cookie", s.Token.Reveal())
		return
	}
	all := r.Cookies()
	for _, k := range ours {
		all = append(without(all, k.Name), k)
	}
	r.Header.Set("Cookie", cookieHeader(all))
}

func without(cookies []*http.Cookie, name string) []*http.Cookie {
	var rest []*http.Cookie
	for _, k := range cookies {
		if k.Name != name {
			rest = append(rest, k)
		}
	}
	return rest
}

func cookieHeader(cookies []*http.Cookie) string {
	r := http.Request{Header: http.Header{}}
	for _, k := range cookies {
		r.AddCookie(k)
	}
	return r.Header.Get("Cookie")
}

// transport is Client.Transport's.
type transport struct {
	TransportOptions
	c    *Client
	base http.RoundTripper
	home *url.URL // where sessions go; nil: Allow knows
	bad  error    // what is wrong with the above
}

// Format writes a fixed word whatever the verb: a transport holds a client.
func (t *transport) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "[sessionlock transport]") }

// CloseIdleConnections is what [http.Client.CloseIdleConnections] looks for.
func (t *transport) CloseIdleConnections() {
	if base, ok := t.base.(interface{ CloseIdleConnections() }); ok {
		base.CloseIdleConnections()
	}
}

// RoundTrip sends r, which is
//
//	not for the upstream, nested, or of a login  → sent as it is
//	without a key or session                     → an error, nothing sent
//	answered                                     → the answer
//	refused, cannot or must not be sent again    → the answer, and the session ends
//	refused, and there is no other session       → an error
//	refused, and sent with another session       → the second answer
func (t *transport) RoundTrip(r *http.Request) (*http.Response, error) {
	x := &exchange{transport: t, r: r}
	defer x.close()
	if t.bad != nil {
		return nil, t.bad
	}
	ctx := r.Context()
	if r.URL == nil || ctx.Value(bareKey{t.c}) != nil || t.home != nil && !t.atHome(r) {
		return x.bare()
	}
	key, err := t.Key(r)
	if insideLogin(ctx, t.c) && (err != nil || insideLogin(ctx, t.c, key)) {
		return x.bare()
	}
	if err != nil {
		return nil, err
	}
	x.within = RejectionFromContext(ctx) != nil
	sc := scopeIn(ctx, t.c, key)
	if sc == nil {
		return x.result(t.c.Do(ctx, key, x.run))
	}
	if s, ok := ctx.Value(setUpKey{sc}).(Session); ok {
		return x.setUp(ctx, s)
	}
	return x.result(sc.Do(ctx, x.run))
}

// setUp sends the request of a [Scope.SetUp] with the session to be set up, once. A
// refusal of that is an error, which the scope knows: returned by the SetUp's func it
// is repaired like that of any request.
func (x *exchange) setUp(ctx context.Context, s Session) (*http.Response, error) {
	x.once = true
	err := x.run(ctx, s)
	if verdictIn(err) == NotRejected {
		return x.result(err)
	}
	if x.answer != nil {
		drain(x.answer.Body)
	}
	return nil, Reject(err)
}

// atHome reports whether r goes to the client's upstream. A Host header is
// compared too: servers that many share, content delivery networks, choose by it
// whose backend gets the request. So is by what an opaque URL puts in the first line.
func (t *transport) atHome(r *http.Request) bool {
	u, home := r.URL, t.home
	if u.Scheme != home.Scheme || u.Opaque != "" {
		return false
	}
	if u.Host != home.Host && (portOf(u) != portOf(home) || !sameHost(u.Hostname(), home.Hostname())) {
		return false
	}
	return r.Host == "" || r.Host == u.Host || sameHost((&url.URL{Host: r.Host}).Hostname(), home.Hostname())
}

// allows reports whether r may carry s, which is for Allow to say if there is one.
func (t *transport) allows(s Session, r *http.Request) bool {
	if t.Allow == nil {
		return true
	}
	if r.URL.Opaque != "" { // it says nothing of where that leads
		return false
	}
	if r.Host != "" && r.Host != r.URL.Host {
		u := *r.URL
		if u.Host = r.Host; !t.Allow(s, &u) {
			return false
		}
	}
	return t.Allow(s, r.URL)
}

// portOf returns the port of an http or https URL, "" for any other.
func portOf(u *url.URL) string {
	port := u.Port()
	switch {
	case u.Scheme != "http" && u.Scheme != "https":
		return ""
	case port != "":
		return port
	case u.Scheme == "http":
		return "80"
	}
	return "443"
}

// sameHost compares the names of hosts. Unicode folds more letters than ASCII has.
func sameHost(a, b string) bool {
	return a == b || strings.EqualFold(a, b) && strings.IndexFunc(a+b, func(c rune) bool { return c >= 0x80 }) < 0
}

// exchange is one request on its way, and what became of it.
type exchange struct {
	*transport
	r      *http.Request
	sent   int
	once   bool                          // it is not sent again, whatever happens
	within bool                          // the second round of another Do
	alone  bool                          // it carries no session, so no answer is a refusal of one
	body   func() (io.ReadCloser, error) // opens the request's body once more; nil: it cannot be
	next   io.ReadCloser                 // what that opened for the second time
	answer *http.Response                // to be returned,
	err    error                         // or this: an error of base that is no refusal
}

// close is what a RoundTripper owes the bodies that it did not send.
func (x *exchange) close() {
	if x.sent == 0 && x.r.Body != nil {
		_ = x.r.Body.Close()
	}
	if x.sent < 2 && x.next != nil {
		_ = x.next.Close()
	}
}

// bare sends the request as it is.
func (x *exchange) bare() (*http.Response, error) {
	x.sent++
	return x.base.RoundTrip(x.r)
}

// result prefers an answer to any error, as a RoundTripper must.
func (x *exchange) result(err error) (*http.Response, error) {
	if x.answer != nil {
		return x.answer, nil
	}
	err = cmp.Or(err, x.err)
	if errors.Is(err, context.DeadlineExceeded) {
		err = &timeoutError{err}
	}
	return nil, err
}

// timeoutError is how an http.Client recognises a timeout.
type timeoutError struct{ error }

func (e *timeoutError) Timeout() bool { return true }
func (e *timeoutError) Unwrap() error { return e.error }

// run sends the request with s: the func of a Do.
func (x *exchange) run(ctx context.Context, s Session) error {
	r, err := x.request(ctx, s)
	if err != nil {
		return err
	}
	judged := false
	defer func() {
		if !judged && x.answer != nil { // a func of the user panicked
			_ = x.answer.Body.Close()
		}
	}()
	x.sent++
	answer, err := x.base.RoundTrip(r) //nolint:bodyclose // the caller's to close, or drained
	verdict := NotRejected
	switch {
	case err != nil && !x.alone:
		verdict = x.c.verdict(err)
	case err == nil && answer != nil:
		verdict, err = x.take(answer)
	}
	again := verdict != NotRejected && x.again(ctx, verdict)
	judged = true
	switch {
	case verdict == NotRejected:
		x.err = err
		return nil
	case !again:
		return &rejectedError{err, rejectedForGood}
	case x.answer != nil:
		drain(x.answer.Body)
		x.answer = nil
	}
	return &rejectedError{err, RejectedBefore}
}

// take makes answer the one to be returned, and judges it.
func (x *exchange) take(answer *http.Response) (Verdict, error) {
	answer.Request = x.r // what was sent shows the token
	if x.answer = answer; answer.Body == nil {
		answer.Body = http.NoBody
	}
	if x.alone {
		return NotRejected, nil
	}
	verdict := x.verdict(answer)
	if verdict == NotRejected {
		return verdict, nil
	}
	return verdict, &answeredError{answer.StatusCode}
}

// request returns a copy of the caller's request with s.
func (x *exchange) request(ctx context.Context, s Session) (*http.Request, error) {
	r := x.r.Clone(context.WithValue(ctx, bareKey{x.c}, true))
	r.Trailer = x.r.Trailer // the caller fills it in while the body is read
	if r.Header == nil {
		r.Header = make(http.Header)
	}
	if x.sent > 0 {
		r.Body, r.GetBody = x.next, x.body
	} else if err := x.keep(ctx, r); err != nil {
		return nil, err
	}
	x.alone = !x.allows(s, r)
	switch {
	case !x.alone:
		x.Apply(r, s)
	case x.sent > 0:
		return nil, fmt.Errorf("%w: the next session may not be sent where the one before was", ErrInvalid)
	}
	return r, nil
}

// keep sees to it that the body can be sent a second time, if it can be helped.
func (x *exchange) keep(ctx context.Context, r *http.Request) error {
	switch {
	case r.Body == nil, r.Body == http.NoBody:
		x.body = noBody
	case r.GetBody != nil && len(r.Trailer) > 0: // which the body fills in, until it has ended
		first := &keptBody{ReadCloser: r.Body, max: -1}
		again := r.GetBody
		r.Body, x.body = first, func() (io.ReadCloser, error) {
			if !first.ended() {
				return nil, io.ErrUnexpectedEOF
			}
			return again()
		}
	case r.GetBody != nil:
		x.body = r.GetBody
	case r.ContentLength > 0 && r.ContentLength <= int64(x.Buffer):
		return x.buffer(ctx, r)
	case r.ContentLength <= 0 && x.Buffer > 0:
		kept := &keptBody{ReadCloser: r.Body, max: x.Buffer}
		r.Body, x.body = kept, kept.again
	}
	return nil
}

// keptBody keeps a stream as it is read. It is not read ahead of time, for its end may
// wait for the answer.
type keptBody struct {
	io.ReadCloser
	max int

	mu    sync.Mutex
	bytes []byte // nil: too many
	whole bool   // it has ended
}

func (k *keptBody) Read(p []byte) (int, error) {
	n, err := k.ReadCloser.Read(p)
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.bytes = append(k.bytes, p[:n]...); len(k.bytes) > k.max {
		k.bytes, k.max = nil, -1
	}
	k.whole = k.whole || err == io.EOF
	return n, err
}

func (k *keptBody) ended() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.whole
}

// again returns the body once more, if all of it is here.
func (k *keptBody) again() (io.ReadCloser, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.whole || k.max < 0 {
		return nil, io.ErrUnexpectedEOF
	}
	return io.NopCloser(bytes.NewReader(k.bytes)), nil
}

// buffer reads the body of r, which says that it is short. A body that is as long as
// it says can be sent again; of any other, base is to see what it would have seen.
func (x *exchange) buffer(ctx context.Context, r *http.Request) error {
	body, n := r.Body, r.ContentLength
	type read struct {
		b   []byte
		err error
	}
	done := make(chan read, 1)
	go func() {
		b, err := io.ReadAll(io.LimitReader(body, n+1))
		done <- read{b, err}
	}()
	var got read
	select {
	case got = <-done:
	case <-ctx.Done(): // the caller closes the body, which ends most reads
		return ctx.Err()
	}
	if got.err != nil || int64(len(got.b)) != n {
		r.Body = &readCloser{Reader: io.MultiReader(bytes.NewReader(got.b), failing{got.err}, body), Closer: body}
		return nil //nolint:nilerr // base meets it where it stands
	}
	_ = body.Close()
	x.body = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(got.b)), nil }
	r.GetBody = x.body // for base's own use
	r.Body, _ = x.body()
	return nil
}

func noBody() (io.ReadCloser, error) { return http.NoBody, nil }

// open opens the body for the second time, and reports whether it could.
func (x *exchange) open() bool {
	if x.body == nil {
		return false
	}
	next, err := x.body()
	x.next = next
	return err == nil
}

// again reports whether the request may and can be sent again after verdict.
func (x *exchange) again(ctx context.Context, verdict Verdict) bool {
	last := x.sent > 1 || !x.within && RejectionFromContext(ctx) != nil // a scope's SetUp may have had the first round
	return !x.once && !last && (verdict != RejectedDuring || repeatable(ctx, x.r)) && x.open()
}

// repeatable says of a request what net/http says before it sends one again by
// itself, and what the caller says.
func repeatable(ctx context.Context, r *http.Request) bool {
	switch r.Method {
	case "", http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace:
		return true
	}
	if said, _ := ctx.Value(idempotentKey{}).(bool); said {
		return true
	}
	_, key := r.Header["Idempotency-Key"]
	_, xkey := r.Header["X-Idempotency-Key"]
	return key || xkey
}

func (x *exchange) verdict(answer *http.Response) Verdict {
	switch {
	case x.Rejected != nil:
		return x.Rejected(answer, peek(answer, x.Peek))
	case answer.StatusCode == http.StatusUnauthorized:
		return RejectedBefore
	}
	return NotRejected
}

// peek returns how the body of answer begins, up to n bytes, and puts that back.
func peek(answer *http.Response, n int) []byte {
	length := answer.ContentLength
	if n < 0 || length == 0 || length < 0 && answer.StatusCode < 400 {
		return nil
	}
	if length > 0 {
		n = int(min(int64(n), length)) // the end of the stream may be long in coming
	}
	head, err := io.ReadAll(io.LimitReader(answer.Body, int64(n)))
	answer.Body = &readCloser{Reader: io.MultiReader(bytes.NewReader(head), failing{err}, answer.Body), Closer: answer.Body}
	return head
}

// drain reads what is left of a body that nobody wants, so that its connection can
// be used again, but not for ever.
func drain(body io.ReadCloser) {
	enough := time.AfterFunc(drainTime, func() { _ = body.Close() })
	defer enough.Stop()
	_, _ = io.CopyN(io.Discard, body, maxDrain)
	_ = body.Close()
}

// readCloser is a body of which something was read already.
type readCloser struct {
	io.Reader
	io.Closer
	closed atomic.Bool
}

func (b *readCloser) Read(p []byte) (int, error) {
	if b.closed.Load() {
		return 0, http.ErrBodyReadAfterClose
	}
	return b.Reader.Read(p)
}

func (b *readCloser) Close() error {
	b.closed.Store(true)
	return b.Closer.Close()
}

// failing fails every read with err; with none it has ended.
type failing struct{ err error }

func (f failing) Read([]byte) (int, error) {
	if f.err != nil {
		return 0, f.err
	}
	return 0, io.EOF
}

// answeredError is the first error of a request that was refused.
type answeredError struct{ status int }

func (e *answeredError) Error() string {
	return fmt.Sprintf("sessionlock: the upstream refused the session: %d %s", e.status, http.StatusText(e.status))
}
