package sessionlockgrpc_test

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http/httptest"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/sessionlock/sessionlock"
	"github.com/sessionlock/sessionlock/sessionlockgrpc"
)

func TestColdCallsLogInOnce(t *testing.T) {
	u, _, api := begin(t)
	ctx := asBob(t)
	var all sync.WaitGroup
	for range 50 {
		all.Go(func() {
			_, err := api.UnaryCall(ctx, simple("hello"))
			assert.NoError(t, err)
		})
	}
	all.Wait()
	assert.Equal(t, 1, u.sent())
	assert.Equal(t, slices.Repeat([]string{"bob/1"}, 50), u.tokens())
}

func TestRefusedCallIsRepairedOnce(t *testing.T) {
	u, _, api := begin(t)
	ctx := asBob(t)
	echo(t, ctx, api)
	u.revoke()
	echo(t, ctx, api)
	echo(t, ctx, api)
	assert.Equal(t, []string{"bob/1", "bob/1", "bob/2", "bob/2"}, u.tokens())
	assert.Equal(t, 2, u.sent())
}

func TestManyRefusedCallsCostOneLogin(t *testing.T) {
	u, _, api := begin(t)
	ctx := asBob(t)
	echo(t, ctx, api)
	u.revoke()
	var all sync.WaitGroup
	for range 100 {
		all.Go(func() {
			_, err := api.UnaryCall(ctx, simple("hello"))
			assert.NoError(t, err)
		})
	}
	all.Wait()
	assert.Equal(t, 2, u.sent())
}

func TestCallRefusedForEverIsSentTwice(t *testing.T) {
	u, _, api := begin(t)
	u.refuses = true
	_, err := api.UnaryCall(asBob(t), simple("hello"))
	assertStatus(t, codes.Unauthenticated, err)
	assert.Equal(t, "no such session", status.Convert(err).Message())
	require.ErrorIs(t, err, sessionlock.ErrRejected)
	var reauth *sessionlock.ReauthError
	require.ErrorAs(t, err, &reauth)
	assert.Equal(t, []string{"bob/1", "bob/2"}, u.tokens())
	assert.Equal(t, 2, u.sent())
}

func TestOtherAnswersAreTheServersOwn(t *testing.T) {
	u, _, api := begin(t)
	ctx := asBob(t)
	for _, code := range []codes.Code{codes.PermissionDenied, codes.Unavailable, codes.Canceled, codes.Unknown} {
		_, err := api.UnaryCall(ctx, failing(code, "no"))
		assert.Equal(t, status.Error(code, "no"), err)
	}
	assert.Len(t, u.tokens(), 4)
	assert.Equal(t, 1, u.sent())
}

// The client may know more refusals than one code.
func TestClientsOwnRefusalsAreRepaired(t *testing.T) {
	u, _, api := begin(t, sessionlock.WithRejected(func(err error) sessionlock.Verdict {
		if status.Code(err) == codes.PermissionDenied {
			return sessionlock.RejectedBefore
		}
		return sessionlock.NotRejected
	}))
	u.code = codes.PermissionDenied
	ctx := asBob(t)
	echo(t, ctx, api)
	u.revoke()
	echo(t, ctx, api)
	assert.Equal(t, []string{"bob/1", "bob/1", "bob/2"}, u.tokens())
	u.change(func() { u.refuses = true })
	_, err := api.UnaryCall(sessionlock.KeyContext(t.Context(), "ann"), simple("hello"))
	assertStatus(t, codes.PermissionDenied, err)
	require.ErrorIs(t, err, sessionlock.ErrRejected)
}

func TestKeyFuncNamesTheSession(t *testing.T) {
	u := newUpstream(t)
	c := newClient(t, u)
	keyless := errors.New("no tenant")
	type tenant struct{}
	key := func(ctx context.Context) (string, error) {
		name, ok := ctx.Value(tenant{}).(string)
		if !ok {
			return "", keyless
		}
		return name, nil
	}
	conn := connect(t, u, c,
		grpc.WithUnaryInterceptor(sessionlockgrpc.UnaryClientInterceptor(c, key)),
		grpc.WithStreamInterceptor(sessionlockgrpc.StreamClientInterceptor(c, key)))
	api := testgrpc.NewTestServiceClient(conn)
	echo(t, sessionlock.KeyContext(context.WithValue(t.Context(), tenant{}, "ann"), "ann"), api)
	assert.Equal(t, []string{"ann/1"}, u.tokens()[:1])
	_, err := api.UnaryCall(asBob(t), simple("hello"))
	require.ErrorIs(t, err, keyless)
	_, err = api.FullDuplexCall(asBob(t))
	require.ErrorIs(t, err, keyless)
	assert.Empty(t, u.tokens())
}

func TestCallersMetadataIsNotTouched(t *testing.T) {
	u, c, api := begin(t)
	theirs := metadata.Pairs("authorization", "Basic old", "x-trace", "7")
	ctx := metadata.AppendToOutgoingContext(metadata.NewOutgoingContext(asBob(t), theirs), "Authorization", "Basic older", "x-more", "8")
	opts := make([]grpc.CallOption, 1, 8)
	opts[0] = grpc.WaitForReady(true)
	err := connect(t, u, c).Invoke(ctx, testgrpc.TestService_UnaryCall_FullMethodName, simple("hello"), new(testgrpc.SimpleResponse), opts...)
	require.NoError(t, err)
	stream, err := api.FullDuplexCall(ctx, opts...)
	require.NoError(t, err)
	require.NoError(t, stream.CloseSend())
	_, _ = stream.Recv()

	assert.Equal(t, metadata.Pairs("authorization", "Basic old", "x-trace", "7"), theirs)
	now, _ := metadata.FromOutgoingContext(ctx)
	assert.Equal(t, []string{"Basic old", "Basic older"}, now.Get("authorization"))
	assert.Equal(t, make([]grpc.CallOption, 7), opts[1:8])
	assert.Equal(t, []string{"bob/1", "bob/1"}, u.tokens())
	for _, md := range u.seen {
		assert.Equal(t, []string{"7"}, md.Get("x-trace"))
		assert.Equal(t, []string{"8"}, md.Get("x-more"))
	}
}

// perRPC is somebody else's credentials.
type perRPC struct {
	md     map[string]string
	err    error
	secure bool
}

func (p perRPC) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return p.md, p.err
}
func (p perRPC) RequireTransportSecurity() bool { return p.secure }

func TestCallersCredentialsGoAlong(t *testing.T) {
	u, _, api := begin(t)
	theirs := map[string]string{"Authorization": "Basic old", "x-api-key": "9"}
	for range 20 { // the order of a map
		echo(t, asBob(t), api, grpc.PerRPCCredentials(perRPC{md: theirs}))
	}
	assert.Equal(t, slices.Repeat([]string{"bob/1"}, 20), u.tokens())
	assert.Equal(t, []string{"9"}, u.seen[0].Get("x-api-key"))
	assert.Len(t, theirs, 2)
}

// gRPC says Unauthenticated of credentials that it could not get or must not send.
// The server has not refused anything then.
func TestCredentialsThatFailAreNoRefusal(t *testing.T) {
	bad := errors.New("vault is sealed")
	u, c, api := begin(t)
	ctx := asBob(t)
	echo(t, ctx, api)
	atDial := testgrpc.NewTestServiceClient(connect(t, u, c, grpc.WithPerRPCCredentials(perRPC{err: bad})))
	_, err := atDial.UnaryCall(ctx, simple("hello"))
	assert.Equal(t, codes.Unauthenticated, status.Code(err))
	_, err = atDial.FullDuplexCall(ctx)
	assert.Equal(t, codes.Unauthenticated, status.Code(err))
	_, err = api.UnaryCall(ctx, simple("hello"), grpc.PerRPCCredentials(perRPC{err: status.Error(codes.Unauthenticated, "sealed")}))
	assert.Equal(t, codes.Unauthenticated, status.Code(err))
	_, err = api.UnaryCall(ctx, simple("hello"), grpc.PerRPCCredentials(perRPC{secure: true}))
	assertStatus(t, codes.InvalidArgument, err)
	require.ErrorIs(t, err, sessionlock.ErrInvalid)
	echo(t, ctx, api)
	assert.Equal(t, []string{"bob/1", "bob/1"}, u.tokens())
	assert.Equal(t, 1, u.sent())
}

// An authenticator uses the connection that its sessions are for, also while the
// session before is still good.
func TestCallsOfALoginGoOutBare(t *testing.T) {
	u := newUpstream(t)
	var api testgrpc.TestServiceClient
	basic := func(ctx context.Context) context.Context {
		return metadata.AppendToOutgoingContext(ctx, "authorization", "Basic secret")
	}
	deny := false
	u.login = func(ctx context.Context, key string, n int) (sessionlock.Session, error) {
		if _, err := api.UnaryCall(basic(ctx), simple("password")); err != nil {
			return sessionlock.Session{}, err
		}
		stream, err := api.FullDuplexCall(basic(ctx))
		if err != nil {
			return sessionlock.Session{}, err
		}
		_ = stream.CloseSend()
		if _, err := stream.Recv(); status.Code(err) != codes.Unknown {
			return sessionlock.Session{}, err
		}
		if deny {
			_, err := api.UnaryCall(ctx, simple("wrong password"))
			return sessionlock.Session{}, sessionlock.Denied(err)
		}
		return u.grant(key, n), nil
	}
	ended := make(chan string, 1)
	c := newClient(t, u,
		sessionlock.WithRefresh(func(ctx context.Context, key string, old sessionlock.Session) (sessionlock.Session, error) {
			_, err := api.UnaryCall(basic(ctx), simple(old.Token.Reveal()))
			return sessionlock.Session{}, sessionlock.Denied(errors.Join(err, errors.New("refresh is over")))
		}),
		sessionlock.WithLogout(func(ctx context.Context, s sessionlock.Session) error {
			_, err := api.UnaryCall(basic(ctx), simple("bye"))
			ended <- s.Token.Reveal()
			return err
		}))
	api = testgrpc.NewTestServiceClient(connect(t, u, c))
	ctx := asBob(t)
	echo(t, ctx, api)
	assert.Equal(t, []string{"Basic secret", "Basic secret", "bob/1"}, u.tokens())

	require.NoError(t, c.Logout(ctx, bob))
	assert.Equal(t, "bob/1", <-ended)
	assert.Equal(t, []string{"Basic secret"}, u.tokens())

	deny = true
	_, err := api.UnaryCall(ctx, simple("hello"))
	assertStatus(t, codes.Unauthenticated, err)
	require.ErrorIs(t, err, sessionlock.ErrDenied)
	assert.Equal(t, []string{"Basic secret", "Basic secret", ""}, u.tokens())
	assert.Equal(t, 2, u.sent())
}

// While a session is renewed ahead of its end, Client.Session would return it.
func TestCallsOfARenewalGoOutBare(t *testing.T) {
	u := newUpstream(t)
	var api testgrpc.TestServiceClient
	u.login = func(ctx context.Context, key string, n int) (sessionlock.Session, error) {
		if n > 1 {
			_, err := api.UnaryCall(ctx, simple("wrong password"))
			return sessionlock.Session{}, sessionlock.Denied(err)
		}
		s := u.grant(key, n)
		s.Expiry = time.Now().Add(12 * time.Second) // 9 to be used, renewed after 3
		return s, nil
	}
	c := newClient(t, u, sessionlock.WithRefreshAhead(time.Minute))
	api = testgrpc.NewTestServiceClient(connect(t, u, c))
	ctx := asBob(t)
	require.Eventually(t, func() bool {
		echo(t, ctx, api)
		return u.sent() == 2
	}, 9*time.Second, 100*time.Millisecond)
	require.Eventually(t, func() bool { return slices.Contains(u.tokens(), "") }, 10*time.Second, 5*time.Millisecond)
	echo(t, ctx, api)
	assert.Equal(t, []string{"bob/1"}, u.tokens())
}

func TestScopesSessionIsUsed(t *testing.T) {
	u, c, api := begin(t)
	err := c.Scope(asBob(t), bob, func(ctx context.Context, sc *sessionlock.Scope) error {
		setUps := 0
		sc.SetUp(func(ctx context.Context, _ sessionlock.Session) error {
			setUps++
			_, err := api.UnaryCall(ctx, simple("set up"))
			return err
		})
		echo(t, ctx, api)
		_, err := c.Put(ctx, bob, u.grant(bob, 9)) // everybody else's by now
		require.NoError(t, err)
		echo(t, ctx, api)
		assert.Equal(t, []string{"bob/1", "bob/1", "bob/1"}, u.tokens())
		u.change(func() { delete(u.live, "bob/1") })
		echo(t, ctx, api)
		assert.Equal(t, []string{"bob/1", "bob/9", "bob/9"}, u.tokens())
		assert.Equal(t, 2, setUps)

		u.change(func() { delete(u.live, "bob/9") })
		stream, err := api.FullDuplexCall(ctx)
		require.NoError(t, err)
		ping(t, stream, "hello")
		assert.Equal(t, []string{"bob/9", "bob/2", "bob/2"}, u.tokens())
		assert.Equal(t, 3, setUps)
		return nil
	})
	require.NoError(t, err)
	assert.Equal(t, 2, u.sent())
}

// What a SetUp reports is repaired by the scope, which has the next session to set up.
func TestRefusalInSetUpIsTheScopesToRepair(t *testing.T) {
	for name, call := range map[string]func(context.Context, testgrpc.TestServiceClient) error{
		"unary": func(ctx context.Context, api testgrpc.TestServiceClient) error {
			_, err := api.UnaryCall(ctx, simple("set up"))
			return err
		},
		"stream": func(ctx context.Context, api testgrpc.TestServiceClient) error {
			stream, err := api.FullDuplexCall(ctx)
			if err != nil {
				return err
			}
			if err := stream.Send(said("set up")); err != nil && !errors.Is(err, io.EOF) {
				return err
			}
			_, err = stream.Recv()
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			u, c, api := dead(t)
			err := c.Scope(asBob(t), bob, func(ctx context.Context, sc *sessionlock.Scope) error {
				sc.SetUp(func(ctx context.Context, _ sessionlock.Session) error { return call(ctx, api) })
				echo(t, ctx, api)
				return nil
			})
			require.NoError(t, err)
			assert.Equal(t, []string{"bob/1", "bob/2", "bob/2"}, u.tokens())
			assert.Equal(t, 2, u.sent())
		})
	}
}

// No outage of ours may look like a dead session.
func TestErrorsHaveTheStatusOfWhatTheySay(t *testing.T) {
	leaky := errors.New("password of bob is wrong")
	fails := func(mark func(error) error) func(*upstream, *faults) {
		return func(u *upstream, _ *faults) {
			u.login = func(context.Context, string, int) (sessionlock.Session, error) {
				return sessionlock.Session{}, mark(leaky)
			}
		}
	}
	for _, tc := range []struct {
		name  string
		spoil func(*upstream, *faults)
		code  codes.Code
		is    error
	}{
		{"denied", fails(sessionlock.Denied), codes.Unauthenticated, sessionlock.ErrDenied},
		{"deferred", fails(func(err error) error { return sessionlock.RetryAfter(err, time.Minute) }), codes.Unavailable, leaky},
		{"unknown", fails(func(err error) error { return err }), codes.Unavailable, leaky},
		{"login refused by gRPC", fails(func(err error) error { return status.Error(codes.Unauthenticated, err.Error()) }), codes.Unavailable, nil},
		{"login timed out", fails(func(err error) error { return errors.Join(err, context.DeadlineExceeded) }), codes.Unavailable, context.DeadlineExceeded},
		{"unusable", fails(func(error) error { return nil }), codes.Unavailable, sessionlock.ErrIncomplete},
		{"outage", func(_ *upstream, f *faults) { f.breakDown() }, codes.Unavailable, sessionlock.ErrUnavailable},
	} {
		t.Run(tc.name, func(t *testing.T) {
			u, f := newUpstream(t), newFaults()
			tc.spoil(u, f)
			c := newClient(t, u, sessionlock.WithCache(f))
			api := testgrpc.NewTestServiceClient(connect(t, u, c))
			_, unary := api.UnaryCall(asBob(t), simple("hello"))
			_, stream := api.FullDuplexCall(asBob(t))
			for _, err := range []error{unary, stream} {
				assertStatus(t, tc.code, err)
			}
			if tc.is != nil {
				require.ErrorIs(t, unary, tc.is)
			}
			assert.Empty(t, u.tokens())
		})
	}
}

func TestRenewalThatFailsHasTheStatusOfItsCause(t *testing.T) {
	for _, tc := range []struct {
		name string
		fail error
		code codes.Code
	}{
		{"denied", sessionlock.Denied(errors.New("password of bob is wrong")), codes.Unauthenticated},
		{"deferred", sessionlock.RetryAfter(status.Error(codes.Unauthenticated, "bob, later"), 0), codes.Unavailable},
	} {
		t.Run(tc.name, func(t *testing.T) {
			u := newUpstream(t)
			u.login = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
				if n > 1 {
					return sessionlock.Session{}, tc.fail
				}
				return u.grant(key, n), nil
			}
			api := testgrpc.NewTestServiceClient(connect(t, u, newClient(t, u)))
			ctx := asBob(t)
			echo(t, ctx, api)
			u.revoke()
			_, err := api.UnaryCall(ctx, simple("hello"))
			assertStatus(t, tc.code, err)
			assert.NotContains(t, status.Convert(err).Message(), "no such session")
			require.ErrorIs(t, err, sessionlock.ErrRejected)
			assert.Equal(t, []string{"bob/1", "bob/1"}, u.tokens())
		})
	}
}

func TestLoginThatBringsTheRefusedTokenIsUnauthenticated(t *testing.T) {
	u := newUpstream(t)
	u.login = func(_ context.Context, key string, _ int) (sessionlock.Session, error) { return u.grant(key, 1), nil }
	u.refuses = true
	api := testgrpc.NewTestServiceClient(connect(t, u, newClient(t, u)))
	_, err := api.UnaryCall(asBob(t), simple("hello"))
	assertStatus(t, codes.Unauthenticated, err)
	assert.Equal(t, []string{"bob/1"}, u.tokens())
}

func TestOperationThatMayHaveRunIsNotRepeated(t *testing.T) {
	u, _, api := begin(t, sessionlock.WithRejected(func(err error) sessionlock.Verdict {
		if status.Code(err) == codes.Aborted {
			return sessionlock.RejectedDuring
		}
		return sessionlock.NotRejected
	}))
	u.code, u.refuses = codes.Aborted, true
	_, err := api.UnaryCall(asBob(t), simple("hello"))
	assertStatus(t, codes.Aborted, err)
	require.ErrorIs(t, err, sessionlock.ErrRejected)
	assert.Equal(t, []string{"bob/1"}, u.tokens())

	_, err = api.UnaryCall(sessionlock.IdempotentContext(sessionlock.KeyContext(t.Context(), "ann")), simple("hello"))
	assertStatus(t, codes.Aborted, err)
	assert.Len(t, u.tokens(), 2, "unless it says that it can be")
}

func TestWaitingForAnotherLoginIsUnavailable(t *testing.T) {
	u, lock := newUpstream(t), new(heldLocker)
	c := newClient(t, u, sessionlock.WithLocker(lock), sessionlock.WithLockTTL(50*time.Millisecond),
		sessionlock.WithLoginTimeout(50*time.Millisecond), sessionlock.WithWait(3, 30*time.Millisecond))
	_, err := testgrpc.NewTestServiceClient(connect(t, u, c)).UnaryCall(asBob(t), simple("hello"))
	assertStatus(t, codes.Unavailable, err)
	require.ErrorIs(t, err, sessionlock.ErrLockTimeout)
}

type heldLocker struct{}

func (*heldLocker) TryLock(context.Context, string, time.Duration) (sessionlock.Lock, error) {
	return nil, sessionlock.ErrLocked
}

// A login that a Logout overtakes leaves its callers without a session.
func TestOvertakenLoginIsUnavailable(t *testing.T) {
	u := newUpstream(t)
	var c *sessionlock.Client
	u.login = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
		if err := c.Logout(context.Background(), key); err != nil {
			return sessionlock.Session{}, err
		}
		return u.grant(key, n), nil
	}
	c = newClient(t, u)
	_, err := testgrpc.NewTestServiceClient(connect(t, u, c)).UnaryCall(asBob(t), simple("hello"))
	assertStatus(t, codes.Unavailable, err)
	require.ErrorIs(t, err, sessionlock.ErrStale)
}

func TestClosedClientIsUnavailable(t *testing.T) {
	_, c, api := begin(t)
	require.NoError(t, c.Close(t.Context()))
	_, err := api.UnaryCall(asBob(t), simple("hello"))
	assertStatus(t, codes.Unavailable, err)
	require.ErrorIs(t, err, sessionlock.ErrClosed)
}

func TestMissingKeyAndClientAreInvalid(t *testing.T) {
	u, _, api := begin(t)
	_, err := api.UnaryCall(t.Context(), simple("hello"))
	assertStatus(t, codes.InvalidArgument, err)
	require.ErrorIs(t, err, sessionlock.ErrInvalid)
	require.ErrorContains(t, err, "KeyContext")
	_, err = api.FullDuplexCall(t.Context())
	assertStatus(t, codes.InvalidArgument, err)

	api = testgrpc.NewTestServiceClient(connect(t, u, nil))
	_, err = api.UnaryCall(asBob(t), simple("hello"))
	assertStatus(t, codes.InvalidArgument, err)
	_, err = api.FullDuplexCall(asBob(t))
	assertStatus(t, codes.InvalidArgument, err)
	require.ErrorIs(t, err, sessionlock.ErrInvalid)
	assert.Empty(t, u.tokens())
}

func TestCallersContextIsItsOwn(t *testing.T) {
	u := newUpstream(t)
	hang := make(chan struct{})
	u.login = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
		<-hang
		return u.grant(key, n), nil
	}
	c := newClient(t, u)
	api := testgrpc.NewTestServiceClient(connect(t, u, c))
	t.Run("deadline", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(asBob(t), 20*time.Millisecond)
		defer cancel()
		_, err := api.UnaryCall(ctx, simple("hello"))
		assertStatus(t, codes.DeadlineExceeded, err)
		require.ErrorIs(t, err, context.DeadlineExceeded)
	})
	t.Run("cancel", func(t *testing.T) {
		ctx, cancel := context.WithCancel(asBob(t))
		cancel()
		_, err := api.FullDuplexCall(ctx)
		assertStatus(t, codes.Canceled, err)
		require.ErrorIs(t, err, context.Canceled)
	})
	close(hang)
}

// retryPolicy is of a service config that repeats every call the server could not
// serve.
const retryPolicy = `{"methodConfig": [{"name": [{}], "retryPolicy": {"maxAttempts": 5, "initialBackoff": "0.001s",
	"maxBackoff": "0.001s", "backoffMultiplier": 1, "retryableStatusCodes": ["UNAVAILABLE"]}}]}`

func TestRetryPolicyDoesNotMultiplyOurOutages(t *testing.T) {
	u := newUpstream(t)
	u.login = func(context.Context, string, int) (sessionlock.Session, error) {
		return sessionlock.Session{}, sessionlock.RetryAfter(errors.New("down"), 0)
	}
	c := newClient(t, u)
	api := testgrpc.NewTestServiceClient(connect(t, u, c, grpc.WithDefaultServiceConfig(retryPolicy)))
	_, err := api.UnaryCall(asBob(t), simple("hello"))
	assertStatus(t, codes.Unavailable, err)
	assert.Equal(t, 1, u.sent())
	assert.Zero(t, c.Stats().Suppressed, "asked for a session once")
	// The server's own are repeated, with the same token.
	ok := sessionlock.KeyContext(t.Context(), "ann")
	u.login = func(_ context.Context, key string, n int) (sessionlock.Session, error) { return u.grant(key, n), nil }
	_, err = api.UnaryCall(ok, failing(codes.Unavailable, "busy"))
	assert.Equal(t, codes.Unavailable, status.Code(err))
	assert.Equal(t, slices.Repeat([]string{"ann/2"}, 5), u.tokens())
}

// far makes a connection look as if it left this machine.
type far struct{ net.Conn }

func (far) RemoteAddr() net.Addr { return &net.TCPAddr{IP: net.IPv4(203, 0, 113, 1), Port: 443} }

func dialFar(ctx context.Context, addr string) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
	return far{conn}, err
}

func TestTokenLeavesTheMachineInClearOnlyWhenAsked(t *testing.T) {
	u, c, _ := begin(t)
	ctx := asBob(t)
	api := testgrpc.NewTestServiceClient(connect(t, u, c, grpc.WithContextDialer(dialFar)))
	_, err := api.UnaryCall(ctx, simple("hello"))
	assertStatus(t, codes.InvalidArgument, err)
	require.ErrorIs(t, err, sessionlock.ErrInvalid)
	_, err = api.FullDuplexCall(ctx)
	assertStatus(t, codes.InvalidArgument, err)
	assert.Empty(t, u.tokens())

	echo(t, ctx, api, sessionlockgrpc.AllowPlaintext())
	asked := connect(t, u, c, grpc.WithContextDialer(dialFar), grpc.WithDefaultCallOptions(sessionlockgrpc.AllowPlaintext()))
	echo(t, ctx, testgrpc.NewTestServiceClient(asked))
	assert.Equal(t, []string{"bob/1", "bob/1"}, u.tokens())
}

func TestTokenGoesAnywhereOverTLS(t *testing.T) {
	web := httptest.NewTLSServer(nil)
	defer web.Close()
	pool := x509.NewCertPool()
	pool.AddCert(web.Certificate())
	u := newUpstream(t, grpc.Creds(credentials.NewServerTLSFromCert(&web.TLS.Certificates[0])))
	conn := connect(t, u, newClient(t, u), grpc.WithContextDialer(dialFar),
		grpc.WithTransportCredentials(credentials.NewClientTLSFromCert(pool, "example.com")))
	echo(t, asBob(t), testgrpc.NewTestServiceClient(conn), grpc.PerRPCCredentials(perRPC{secure: true}))
	assert.Equal(t, []string{"bob/1"}, u.tokens())
}

// elsewhere has an address that says nothing of where it is.
type elsewhere struct {
	net.Conn
	network, addr string
}

func (e elsewhere) RemoteAddr() net.Addr { return e }
func (e elsewhere) Network() string      { return e.network }
func (e elsewhere) String() string       { return e.addr }

func TestOnlyKnownAddressesAreOfThisMachine(t *testing.T) {
	u, c, _ := begin(t)
	for _, tc := range []struct {
		network, addr string
		here          bool
	}{
		{"tcp", "[::1]:80", true},
		{"tcp", "[::ffff:127.0.0.1]:80", true},
		{"unix", "@", true},
		{"bufconn", "bufconn", true},
		{"pipe", "pipe", true},
		{"tcp", "localhost:80", false},
		{"tcp", "10.0.0.1:80", false},
		{"vsock", "127.0.0.1:80", false},
	} {
		api := testgrpc.NewTestServiceClient(connect(t, u, c, grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
			conn, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
			return elsewhere{conn, tc.network, tc.addr}, err
		})))
		_, err := api.UnaryCall(asBob(t), simple("hello"))
		if tc.here {
			assert.NoError(t, err, tc.addr)
		} else {
			assert.ErrorIs(t, err, sessionlock.ErrInvalid, tc.addr)
		}
	}
}

// blind asks for the token of a call as if for a connection that cannot be seen.
func blind(opts []grpc.CallOption) (err error) {
	for _, o := range opts {
		if o, ok := o.(grpc.PerRPCCredsCallOption); ok {
			_, err = o.Creds.GetRequestMetadata(context.Background())
		}
	}
	return err
}

func TestConnectionThatCannotBeSeenGetsNoToken(t *testing.T) {
	u, c, _ := begin(t)
	found := false
	api := testgrpc.NewTestServiceClient(connect(t, u, c, grpc.WithChainUnaryInterceptor(
		func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			found = assert.ErrorIs(t, blind(opts), sessionlock.ErrInvalid)
			return invoker(ctx, method, req, reply, cc, opts...)
		})))
	echo(t, asBob(t), api) // which goes another way in the end
	assert.True(t, found)
	u.revoke()
	echo(t, asBob(t), api)
}

// oddError has a status that says nothing.
type oddError struct{}

func (oddError) Error() string              { return "odd" }
func (oddError) GRPCStatus() *status.Status { return nil }

func TestRefusalIsNeverOK(t *testing.T) {
	u := newUpstream(t)
	c := newClient(t, u, sessionlock.WithRejected(func(error) sessionlock.Verdict { return sessionlock.RejectedBefore }))
	api := testgrpc.NewTestServiceClient(connect(t, u, c, grpc.WithChainUnaryInterceptor(
		func(context.Context, string, any, any, *grpc.ClientConn, grpc.UnaryInvoker, ...grpc.CallOption) error {
			return fmt.Errorf("refused: %w", oddError{})
		})))
	_, err := api.UnaryCall(asBob(t), simple("hello"))
	assertStatus(t, codes.Unauthenticated, err)
}

// Users' tests run over bufconn.
func TestBufconnIsOfThisMachine(t *testing.T) {
	u := newUpstream(t)
	l := bufconn.Listen(1 << 16)
	srv := grpc.NewServer(grpc.UnaryInterceptor(u.unary))
	testgrpc.RegisterTestServiceServer(srv, u)
	go func() { _ = srv.Serve(l) }()
	defer srv.Stop()
	c := newClient(t, u)
	conn, err := grpc.NewClient("passthrough:///bufconn", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }),
		grpc.WithUnaryInterceptor(sessionlockgrpc.UnaryClientInterceptor(c, nil)))
	require.NoError(t, err)
	defer conn.Close()
	echo(t, asBob(t), testgrpc.NewTestServiceClient(conn))
}
