// Package sessionlockgrpc puts the sessions of a [sessionlock.Client] on gRPC calls:
// each carries the token of its key as bearer metadata, and when the server answers
// Unauthenticated it is made once more with the next session.
//
//	conn, err := grpc.NewClient("api.acme.test:443",
//		grpc.WithTransportCredentials(credentials.NewTLS(nil)),
//		grpc.WithChainUnaryInterceptor(sessionlockgrpc.UnaryClientInterceptor(client, nil)),
//		grpc.WithChainStreamInterceptor(sessionlockgrpc.StreamClientInterceptor(client, nil)),
//	)
//	…
//	ctx = sessionlock.KeyContext(ctx, "tenant-7") // whose session
//	orders, err := acme.NewOrdersClient(conn).List(ctx, req)
//
// An upstream is one server with one kind of session: give each its own client and
// its own connection, for the interceptors do not look where a call goes.
//
// # A unary call
//
//	of a login, WithRefresh or WithLogout   → made as it is, with its caller's metadata
//	without a key or session                → an error, nothing sent
//	answered, but not by Unauthenticated    → the answer
//	refused, and there is no other session  → an error
//	refused, and made with another session  → the second answer
//
// It is [sessionlock.Client.Do] for a call, with all that this promises: a call is
// sent at most twice, and however many are refused at once, the fleet logs in once.
// A WithRejected option of the client is asked about every other status. An
// Unauthenticated that the server cannot have sent, of credentials that failed before
// the token went out, is not taken for a refusal of it.
//
// # A stream
//
// A stream is refused after it was opened, when something is received, so what was
// sent until then is kept: up to 64 messages of 64 KiB in all, as gRPC's frames have
// them. Only protocol buffers have a size that can be known; any other message counts
// as too long.
//
//	open ──a message or header received──▶ settled    nothing is kept any more
//	  │
//	  ├──refused, all that was sent is kept──▶ open, on another stream, and for the last time:
//	  │        renewed, everything sent again, half-closed if the first one was
//	  │
//	  └──refused otherwise, or settled and refused──▶ over    the error is the caller's; the session
//	                                                          has ended for the fleet
//
// What can fail meanwhile, and what follows:
//
//	opening        fails otherwise     the error
//	SendMsg        finds the end       asks why: a refusal is repaired there and then, and nobody sees
//	                                   an io.EOF; else io.EOF, after which there is no repair, because
//	                                   a caller that stops sending must not succeed by half
//	repair         no session          the error of the call, SendMsg says io.EOF
//	repair         refused too         the second refusal, from RecvMsg; that session ends too
//	repair         context ends        the error of the context
//	settled        refused             no repair, it may have been executed; the session ends. A Scope
//	                                   keeps it until its next call is refused, and repaired
//
// Context is one context for all streams until the call is settled, then that of the
// stream itself. Trailer is that of the last stream, and of the others nothing is left:
// they have ended before they are replaced.
//
// # Errors
//
// All are errors of package status, and match with errors.Is and errors.As what
// [sessionlock.Client.Do] returns. The server's own errors are returned as they came.
//
//	Unavailable       ErrUnavailable, ErrLockTimeout, ErrStale, ErrClosed; *LoginError of class
//	                  LoginDeferred or LoginUnknown: it says nothing of the session
//	Unauthenticated   *LoginError of class LoginDenied; a session refused and not to be helped,
//	                  with the server's status if it was its second refusal
//	InvalidArgument   ErrInvalid: no key, a connection in clear, a nil client
//	Canceled, DeadlineExceeded   the context of the call ended
//
// A retryPolicy in a service config works below the interceptors: it sees the server's
// Unavailable, never ours, so our outages are not multiplied. Do not name
// UNAUTHENTICATED in it: it would repeat the refused token. A retrying interceptor in
// front of these repeats what fails here too; failed logins stay bounded by
// WithLoginBudget and fail at once while they are suppressed.
//
// # Where the token goes
//
// It travels as credentials of the call, not in the context: interceptors behind these,
// stats handlers and gRPC's binary log do not see it. It takes the place of an
// authorization entry in the caller's metadata and of one from a
// [grpc.PerRPCCredentials] option of the call; those of grpc.WithPerRPCCredentials
// cannot be seen here and would be sent beside it.
//
// It leaves this machine only on connections that are private and authentic, TLS for
// instance. In clear it goes to loopback addresses and unix sockets, to which belong
// sidecars and tests; to a proxy that listens there too. Anywhere else the call fails,
// unless [AllowPlaintext] says that the network itself is trusted.
package sessionlockgrpc

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/sessionlock/sessionlock"
)

const authorization = "authorization"

// UnaryClientInterceptor returns an interceptor that makes unary calls with the
// sessions of c and repairs a refused one once. key says whose session a call needs;
// its error is the call's. A nil key is [sessionlock.KeyFromContext], and
// [sessionlock.ErrInvalid] without one.
//
// Calls with the context of a [sessionlock.Scope] use its session. Those that Login,
// WithRefresh or WithLogout make with the context they were given pass through as they
// are, so an authenticator may use the same connection.
func UnaryClientInterceptor(c *sessionlock.Client, key func(context.Context) (string, error)) grpc.UnaryClientInterceptor {
	from := sessionsOf(c)
	key = orOfContext(key)
	return func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		return withStatus(from.do(ctx, key, func(ctx context.Context, s *sessionlock.Session) error {
			if s == nil {
				return invoker(ctx, method, req, reply, cc, opts...)
			}
			ctx, opts, g := attach(ctx, *s, opts)
			return g.judge(invoker(ctx, method, req, reply, cc, opts...))
		}))
	}
}

// StreamClientInterceptor is [UnaryClientInterceptor] for streams. What makes a stream
// repairable is said above. The messages given to SendMsg must not be modified
// afterwards, as gRPC demands anyway.
func StreamClientInterceptor(c *sessionlock.Client, key func(context.Context) (string, error)) grpc.StreamClientInterceptor {
	from := sessionsOf(c)
	key = orOfContext(key)
	return func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
		open := func(ctx context.Context, opts []grpc.CallOption) (grpc.ClientStream, error) {
			return streamer(ctx, desc, cc, method, opts...)
		}
		return newStream(ctx, c, from, key, !desc.ServerStreams, open, opts)
	}
}

// AllowPlaintext is an option for calls, or with grpc.WithDefaultCallOptions for a
// connection, that lets the token go out in clear to other machines. Default: it goes
// in clear to this machine only.
func AllowPlaintext() grpc.CallOption { return plaintext{} }

type plaintext struct{ grpc.EmptyCallOption }

func orOfContext(key func(context.Context) (string, error)) func(context.Context) (string, error) {
	if key != nil {
		return key
	}
	return func(ctx context.Context) (string, error) {
		key, ok := sessionlock.KeyFromContext(ctx)
		if !ok {
			return "", fmt.Errorf("%w: no key for a call to the upstream: set KeyContext or give the interceptor a key", sessionlock.ErrInvalid)
		}
		return key, nil
	}
}

// sessions is a client's Transport, used for what is no HTTP: it alone knows which
// contexts are of a login or a logout, so that their calls go out bare, and which
// scope a context carries. Nothing of net/http is ever sent.
type sessions struct{ http.RoundTripper }

// call is what a request of sessions stands for, and where its context has it.
type call struct {
	key     func(context.Context) (string, error)
	run     func(context.Context, *sessionlock.Session) error
	session *sessionlock.Session // of the next run
	err     error                // of the last one
}

type callKey struct{}

func callOf(r *http.Request) *call { return r.Context().Value(callKey{}).(*call) }

func sessionsOf(c *sessionlock.Client) *sessions {
	if c == nil {
		return nil
	}
	return &sessions{c.Transport(runner{}, &sessionlock.TransportOptions{
		Key:   func(r *http.Request) (string, error) { return callOf(r).key(r.Context()) },
		Apply: func(r *http.Request, s sessionlock.Session) { callOf(r).session = &s },
		Allow: func(sessionlock.Session, *url.URL) bool { return true },
	})}
}

type runner struct{}

func (runner) RoundTrip(r *http.Request) (*http.Response, error) {
	c := callOf(r)
	c.err = c.run(r.Context(), c.session)
	return nil, c.err
}

// do is Client.Do, or Scope.Do where ctx carries a scope of the key. A run without a
// session is to go out bare, and is the only one then.
func (from *sessions) do(ctx context.Context, key func(context.Context) (string, error), run func(context.Context, *sessionlock.Session) error) error {
	if from == nil {
		return fmt.Errorf("%w: client is nil", sessionlock.ErrInvalid)
	}
	c := &call{key: key, run: run}
	// A method that is not thought to be safe to repeat.
	r := &http.Request{Method: http.MethodPost, URL: &url.URL{Scheme: "grpc"}}
	_, err := from.RoundTrip(r.WithContext(context.WithValue(ctx, callKey{}, c))) //nolint:bodyclose // there is never an answer
	var reauth *sessionlock.ReauthError
	if errors.Is(err, c.err) && !errors.As(err, &reauth) {
		return c.err // as the run marked it: in a SetUp it is the scope that repairs
	}
	return err
}

// attach returns ctx and opts for a call with s, and what watches over its token.
func attach(ctx context.Context, s sessionlock.Session, opts []grpc.CallOption) (context.Context, []grpc.CallOption, *guard) {
	g := &guard{token: s.Token}
	for _, o := range opts {
		switch o := o.(type) {
		case plaintext:
			g.plaintext = true
		case grpc.PerRPCCredsCallOption: // gRPC heeds the last one, which will be ours
			g.other = o.Creds
		}
	}
	if md, _ := metadata.FromOutgoingContext(ctx); len(md.Get(authorization)) > 0 { // md is a copy
		md.Delete(authorization)
		ctx = metadata.NewOutgoingContext(ctx, md)
	}
	return ctx, append(slices.Clip(opts), grpc.PerRPCCredentials(g)), g
}

// guard is the credentials of one call: it hands the token to connections that may
// have it, and knows afterwards whether any had it.
type guard struct {
	token     sessionlock.Token
	plaintext bool
	other     credentials.PerRPCCredentials // the caller's; nil: none
	sent      atomic.Bool
	kept      atomic.Pointer[error] // why it was not sent
}

// RequireTransportSecurity is asked before GetRequestMetadata, which looks for itself:
// gRPC's own refusal would read Unauthenticated.
func (g *guard) RequireTransportSecurity() bool { return false }

// GetRequestMetadata is called once for every attempt to send.
func (g *guard) GetRequestMetadata(ctx context.Context, uri ...string) (map[string]string, error) {
	info, _ := credentials.RequestInfoFromContext(ctx)
	private := credentials.CheckSecurityLevel(info.AuthInfo, credentials.PrivacyAndIntegrity) == nil
	if !private && !g.plaintext && !stays(ctx) {
		err := fmt.Errorf("%w: the token would leave this machine in clear: use TLS, or AllowPlaintext", sessionlock.ErrInvalid)
		g.kept.Store(&err)
		return nil, err
	}
	md := map[string]string{}
	if g.other != nil {
		if g.other.RequireTransportSecurity() && !private {
			err := fmt.Errorf("%w: the credentials of the call demand a connection that is private", sessionlock.ErrInvalid)
			g.kept.Store(&err)
			return nil, err
		}
		theirs, err := g.other.GetRequestMetadata(ctx, uri...)
		if err != nil {
			return nil, err
		}
		maps.Copy(md, theirs) // theirs may be shared by calls
		maps.DeleteFunc(md, func(k, _ string) bool { return strings.EqualFold(k, authorization) })
	}
	md[authorization] = "Bearer " + g.token.Reveal()
	g.sent.Store(true)
	return md, nil
}

// stays reports whether the connection in ctx does not leave this machine.
func stays(ctx context.Context) bool {
	p, ok := peer.FromContext(ctx)
	if !ok || p.Addr == nil {
		return false
	}
	switch p.Addr.Network() {
	case "unix", "pipe", "bufconn":
		return true
	case "tcp":
		at, err := netip.ParseAddrPort(p.Addr.String())
		return err == nil && at.Addr().IsLoopback()
	}
	return false
}

// refused reports whether err is the server's refusal of the token.
func (g *guard) refused(err error) bool {
	return err != nil && g.sent.Load() && status.Code(err) == codes.Unauthenticated
}

// judge returns what Do is to be told of err.
func (g *guard) judge(err error) error {
	why := g.kept.Load()
	switch {
	case g.refused(err):
		return sessionlock.Reject(err)
	case err != nil && why != nil:
		return *why
	}
	return err
}
