package sessionlockgrpc_test

// What the tests share: an upstream that speaks gRPC on loopback, wants bearer
// tokens, and keeps a ledger of the logins and of every token it was shown.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime/pprof"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/sessionlock/sessionlock"
	"github.com/sessionlock/sessionlock/sessionlockgrpc"
)

const bob = "bob"

var errStoreDown = errors.New("store is down")

// upstream is a gRPC server and an Authenticator for itself. The nth login of all
// brings the token "key/n", unless login says otherwise.
type upstream struct {
	testgrpc.UnimplementedTestServiceServer
	addr  string
	login func(ctx context.Context, key string, n int) (sessionlock.Session, error)
	code  codes.Code // of a refusal

	mu       sync.Mutex
	logins   int
	live     map[string]bool
	shown    []string // the authorization of every call that arrived, handled or not
	seen     []metadata.MD
	uploads  [][]string // the bodies of every client stream that was read to its end
	refuses  bool       // every token
	lazy     int        // at which message of a stream its token is looked at; 0: before the first
	greets   bool       // every stream is sent a header before it is judged
	welcomes bool       // a stream that is let in is sent a header
}

// newUpstream starts one. It ends with the test.
func newUpstream(t *testing.T, opts ...grpc.ServerOption) *upstream {
	t.Helper()
	u := &upstream{live: map[string]bool{}, code: codes.Unauthenticated}
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	u.addr = l.Addr().String()
	srv := grpc.NewServer(append(opts, grpc.UnaryInterceptor(u.unary), grpc.StreamInterceptor(u.stream))...)
	testgrpc.RegisterTestServiceServer(srv, u)
	var serving sync.WaitGroup
	serving.Go(func() { _ = srv.Serve(l) })
	t.Cleanup(func() {
		srv.Stop()
		serving.Wait()
	})
	return u
}

func (u *upstream) Login(ctx context.Context, key string) (sessionlock.Session, error) {
	u.mu.Lock()
	u.logins++
	n := u.logins
	u.mu.Unlock()
	if u.login != nil {
		return u.login(ctx, key, n)
	}
	return u.grant(key, n), nil
}

func (u *upstream) grant(key string, n int) sessionlock.Session {
	token := fmt.Sprintf("%s/%d", key, n)
	u.change(func() { u.live[token] = true })
	return sessionlock.Session{Token: sessionlock.NewToken(token), Expiry: time.Now().Add(time.Hour)}
}

func (u *upstream) change(f func()) {
	u.mu.Lock()
	defer u.mu.Unlock()
	f()
}

// revoke ends all sessions.
func (u *upstream) revoke() { u.change(func() { clear(u.live) }) }

// sent returns how many logins were sent.
func (u *upstream) sent() (n int) {
	u.change(func() { n = u.logins })
	return n
}

// tokens returns what the calls since the last time carried, without "Bearer ".
func (u *upstream) tokens() (tokens []string) {
	u.change(func() { tokens, u.shown = u.shown, nil })
	return tokens
}

// arrived waits until n calls have arrived since the start.
func (u *upstream) arrived(t *testing.T, n int) {
	t.Helper()
	require.Eventually(t, func() (yes bool) {
		u.change(func() { yes = len(u.seen) >= n })
		return yes
	}, 10*time.Second, time.Millisecond)
}

// judge enters a call into the ledger.
func (u *upstream) judge(ctx context.Context) error {
	md, _ := metadata.FromIncomingContext(ctx)
	values := md.Get("authorization")
	u.mu.Lock()
	defer u.mu.Unlock()
	u.seen = append(u.seen, md)
	u.shown = append(u.shown, strings.TrimPrefix(strings.Join(values, " and "), "Bearer "))
	return u.verdict(values)
}

func (u *upstream) verdict(values []string) error {
	if len(values) == 1 && values[0] == "Basic secret" {
		return nil
	}
	token := ""
	if len(values) == 1 {
		token, _ = strings.CutPrefix(values[0], "Bearer ")
	}
	if u.refuses || !u.live[token] {
		return status.Error(u.code, "no such session")
	}
	return nil
}

// alive looks at the token of a call that runs.
func (u *upstream) alive(ctx context.Context) (err error) {
	md, _ := metadata.FromIncomingContext(ctx)
	u.change(func() { err = u.verdict(md.Get("authorization")) })
	return err
}

func (u *upstream) unary(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if err := u.judge(ctx); err != nil {
		return nil, err
	}
	return handler(ctx, req)
}

func (u *upstream) stream(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	err := u.judge(ss.Context())
	ss.SetTrailer(metadata.Pairs("refused", fmt.Sprint(err != nil)))
	var lazy int
	var greeted bool
	u.change(func() { lazy, greeted = u.lazy, u.greets || u.welcomes && err == nil })
	if greeted {
		_ = ss.SendHeader(metadata.Pairs("hello", "you"))
	}
	if err != nil && lazy == 0 {
		return err
	}
	return handler(srv, &lazily{ss, u, lazy})
}

// lazily is a stream whose token is looked at when so many messages have arrived.
type lazily struct {
	grpc.ServerStream
	u    *upstream
	lazy int
}

func (l *lazily) RecvMsg(m any) error {
	err := l.ServerStream.RecvMsg(m)
	if l.lazy > 0 && err == nil {
		if l.lazy--; l.lazy == 0 {
			return l.u.alive(l.Context())
		}
	}
	return err
}

func (u *upstream) UnaryCall(_ context.Context, r *testgrpc.SimpleRequest) (*testgrpc.SimpleResponse, error) {
	if s := r.GetResponseStatus(); s != nil {
		return nil, status.Error(codes.Code(s.GetCode()), s.GetMessage())
	}
	return &testgrpc.SimpleResponse{Payload: r.GetPayload()}, nil
}

// StreamingOutputCall answers with as many messages as were asked for, and looks at
// the token after each.
func (u *upstream) StreamingOutputCall(r *testgrpc.StreamingOutputCallRequest, out grpc.ServerStreamingServer[testgrpc.StreamingOutputCallResponse]) error {
	for range r.GetResponseParameters() {
		if err := out.Send(&testgrpc.StreamingOutputCallResponse{Payload: r.GetPayload()}); err != nil {
			return err
		}
		if err := u.alive(out.Context()); err != nil {
			return err
		}
	}
	return nil
}

// StreamingInputCall answers with how many messages there were.
func (u *upstream) StreamingInputCall(in grpc.ClientStreamingServer[testgrpc.StreamingInputCallRequest, testgrpc.StreamingInputCallResponse]) error {
	bodies := []string{}
	for {
		m, err := in.Recv()
		if errors.Is(err, io.EOF) {
			u.change(func() { u.uploads = append(u.uploads, bodies) })
			return in.SendAndClose(&testgrpc.StreamingInputCallResponse{AggregatedPayloadSize: int32(len(bodies))})
		}
		if err != nil {
			return err
		}
		bodies = append(bodies, string(m.GetPayload().GetBody()))
	}
}

// FullDuplexCall echoes, and looks at the token before each echo.
func (u *upstream) FullDuplexCall(both grpc.BidiStreamingServer[testgrpc.StreamingOutputCallRequest, testgrpc.StreamingOutputCallResponse]) error {
	for {
		m, err := both.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if s := m.GetResponseStatus(); s != nil {
			return status.Error(codes.Code(s.GetCode()), s.GetMessage())
		}
		if err := u.alive(both.Context()); err != nil {
			return err
		}
		if err := both.Send(&testgrpc.StreamingOutputCallResponse{Payload: m.GetPayload()}); err != nil {
			return err
		}
	}
}

// connect returns a connection to u whose calls have the sessions of c, closed when
// the test ends.
func connect(t *testing.T, u *upstream, c *sessionlock.Client, opts ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	opts = append([]grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithChainUnaryInterceptor(sessionlockgrpc.UnaryClientInterceptor(c, nil)),
		grpc.WithChainStreamInterceptor(sessionlockgrpc.StreamClientInterceptor(c, nil)),
	}, opts...)
	conn, err := grpc.NewClient(u.addr, opts...)
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func newClient(t *testing.T, auth sessionlock.Authenticator, opts ...sessionlock.Option) *sessionlock.Client {
	t.Helper()
	opts = append([]sessionlock.Option{sessionlock.WithCache(new(sessionlock.MemoryCache))}, opts...)
	c, err := sessionlock.New("grpc-upstream", auth, opts...)
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close(context.WithoutCancel(t.Context())) })
	return c
}

// begin returns an upstream, a client of it, and calls with its sessions.
func begin(t *testing.T, opts ...sessionlock.Option) (*upstream, *sessionlock.Client, testgrpc.TestServiceClient) {
	t.Helper()
	u := newUpstream(t)
	c := newClient(t, u, opts...)
	return u, c, testgrpc.NewTestServiceClient(connect(t, u, c))
}

// asBob is a context of a test that ends while the test can still say what it waited for.
func asBob(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return sessionlock.KeyContext(ctx, bob)
}

func payload(body string) *testgrpc.Payload { return &testgrpc.Payload{Body: []byte(body)} }

func simple(body string) *testgrpc.SimpleRequest {
	return &testgrpc.SimpleRequest{Payload: payload(body)}
}

// failing is a request that a handler fails.
func failing(code codes.Code, text string) *testgrpc.SimpleRequest {
	return &testgrpc.SimpleRequest{ResponseStatus: &testgrpc.EchoStatus{Code: int32(code), Message: text}}
}

// echo makes a unary call, and fails the test if it fails.
func echo(t *testing.T, ctx context.Context, api testgrpc.TestServiceClient, opts ...grpc.CallOption) { //nolint:revive // the test comes first in helpers
	t.Helper()
	got, err := api.UnaryCall(ctx, simple("hello"), opts...)
	require.NoError(t, err)
	assert.Equal(t, "hello", string(got.GetPayload().GetBody()))
}

// assertStatus asserts the code of err and that no text of it has a secret.
func assertStatus(t *testing.T, code codes.Code, err error) {
	t.Helper()
	require.Error(t, err)
	assert.Equal(t, code, status.Code(err), "%v", err)
	for _, secret := range []string{bob, "password"} {
		assert.NotContains(t, status.Convert(err).Message(), secret)
		assert.NotContains(t, err.Error(), secret)
	}
}

// faults is a cache that can be broken.
type faults struct {
	*sessionlock.MemoryCache
	mu     sync.Mutex
	broken bool
	calls  int
}

func newFaults() *faults { return &faults{MemoryCache: new(sessionlock.MemoryCache)} }

func (f *faults) breakDown() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.broken = true
}

func (f *faults) enter() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls++
	if f.broken {
		return errStoreDown
	}
	return nil
}

func (f *faults) Load(ctx context.Context, name string) ([]byte, error) {
	if err := f.enter(); err != nil {
		return nil, err
	}
	return f.MemoryCache.Load(ctx, name)
}

func (f *faults) CompareAndSwap(ctx context.Context, name string, old, next []byte, ttl time.Duration) ([]byte, error) {
	if err := f.enter(); err != nil {
		return nil, err
	}
	return f.MemoryCache.CompareAndSwap(ctx, name, old, next, ttl)
}

// noStreamsLeft asserts that gRPC's goroutine of every stream has ended, although
// the connection has not.
func noStreamsLeft(t *testing.T) {
	t.Helper()
	left := func() string { return goroutines("grpc.newClientStream") }
	assert.Eventually(t, func() bool { return left() == "" }, 10*time.Second, 5*time.Millisecond, "%s", left())
}

// goroutines returns the stacks of those that are inside of what, "" when none is.
func goroutines(what string) string {
	var b strings.Builder
	_ = pprof.Lookup("goroutine").WriteTo(&b, 1)
	if !strings.Contains(b.String(), what) {
		return ""
	}
	return b.String()
}
