package sessionlockgrpc_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
	"weak"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/sessionlock/sessionlock"
)

type duplex = grpc.BidiStreamingClient[testgrpc.StreamingOutputCallRequest, testgrpc.StreamingOutputCallResponse]

// said is a message of a duplex stream.
func said(body string) *testgrpc.StreamingOutputCallRequest {
	return &testgrpc.StreamingOutputCallRequest{Payload: payload(body)}
}

func uploaded(body string) *testgrpc.StreamingInputCallRequest {
	return &testgrpc.StreamingInputCallRequest{Payload: payload(body)}
}

// ping sends body and receives it.
func ping(t *testing.T, stream duplex, body string) {
	t.Helper()
	require.NoError(t, stream.Send(said(body)))
	hear(t, stream, body)
}

func hear(t *testing.T, stream duplex, body string) {
	t.Helper()
	got, err := stream.Recv()
	require.NoError(t, err)
	assert.Equal(t, body, string(got.GetPayload().GetBody()))
}

// end half-closes and expects nothing more.
func end(t *testing.T, stream duplex) {
	t.Helper()
	require.NoError(t, stream.CloseSend())
	_, err := stream.Recv()
	require.Equal(t, io.EOF, err)
}

// dead returns an upstream that has just ended the session that the client has.
func dead(t *testing.T, opts ...sessionlock.Option) (*upstream, *sessionlock.Client, testgrpc.TestServiceClient) {
	t.Helper()
	u, c, api := begin(t, opts...)
	echo(t, asBob(t), api)
	u.revoke()
	u.tokens()
	return u, c, api
}

func TestServerStreamIsRepaired(t *testing.T) {
	u, _, api := dead(t)
	req := said("news")
	req.ResponseParameters = make([]*testgrpc.ResponseParameters, 3)
	stream, err := api.StreamingOutputCall(asBob(t), req)
	require.NoError(t, err)
	for range 3 {
		got, err := stream.Recv()
		require.NoError(t, err)
		assert.Equal(t, "news", string(got.GetPayload().GetBody()))
	}
	_, err = stream.Recv()
	assert.Equal(t, io.EOF, err)
	_, err = stream.Recv()
	assert.Equal(t, io.EOF, err)
	assert.Equal(t, []string{"bob/1", "bob/2"}, u.tokens())
	assert.Equal(t, 2, u.sent())
	noStreamsLeft(t)
}

// However the refusal is met: the stream ends while messages are sent, when all
// were sent, or after some have arrived.
func TestClientStreamIsRepairedWhole(t *testing.T) {
	for _, lazy := range []int{0, 1, 5, 10} {
		t.Run(fmt.Sprintf("refused after %d", lazy), func(t *testing.T) {
			u, _, api := dead(t)
			u.lazy = lazy
			stream, err := api.StreamingInputCall(asBob(t))
			require.NoError(t, err)
			want := []string{}
			for i := range 10 {
				want = append(want, fmt.Sprint(i))
				require.NoError(t, stream.Send(uploaded(want[i])))
			}
			got, err := stream.CloseAndRecv()
			require.NoError(t, err)
			assert.EqualValues(t, 10, got.GetAggregatedPayloadSize())
			assert.Equal(t, [][]string{want}, u.uploads)
			assert.Equal(t, []string{"bob/1", "bob/2"}, u.tokens())
			assert.Equal(t, 2, u.sent())
			noStreamsLeft(t)
		})
	}
}

// A sender that meets the end of its stream stops, so it must not meet a refusal:
// what it has not sent yet would be missing.
func TestSenderDoesNotSeeARefusal(t *testing.T) {
	u, _, api := dead(t)
	stream, err := api.StreamingInputCall(asBob(t))
	require.NoError(t, err)
	for i := 0; i < 60 && u.sent() == 1; i++ {
		require.NoError(t, stream.Send(uploaded("x")))
		time.Sleep(50 * time.Millisecond)
	}
	require.Equal(t, 2, u.sent(), "the refusal was not met by Send")
	require.NoError(t, stream.Send(uploaded("y")))
	_, err = stream.CloseAndRecv()
	require.NoError(t, err)
	require.Len(t, u.uploads, 1)
	assert.Equal(t, "y", u.uploads[0][len(u.uploads[0])-1])
}

func TestDuplexStreamIsRepaired(t *testing.T) {
	u, _, api := dead(t)
	stream, err := api.FullDuplexCall(asBob(t))
	require.NoError(t, err)
	for i := range 5 {
		ping(t, stream, fmt.Sprint(i))
	}
	end(t, stream)
	assert.Equal(t, []string{"bob/1", "bob/2"}, u.tokens())
	noStreamsLeft(t)
}

// One goroutine sends, the other receives, and the refusal comes when it likes.
func TestStreamIsRepairedUnderConcurrentUse(t *testing.T) {
	for round := range 10 {
		u, _, api := dead(t)
		u.lazy = round % 2
		stream, err := api.FullDuplexCall(asBob(t))
		require.NoError(t, err)
		const n = 200
		var sender sync.WaitGroup
		sender.Go(func() {
			for i := range n {
				if i == 60 { // no more can be kept: wait for the stream that is to stay
					_, err := stream.Header()
					assert.NoError(t, err)
				}
				assert.NoError(t, stream.Send(said(fmt.Sprint(i))))
			}
			assert.NoError(t, stream.CloseSend())
		})
		for i := range n {
			hear(t, stream, fmt.Sprint(i))
		}
		_, err = stream.Recv()
		assert.Equal(t, io.EOF, err)
		sender.Wait()
		assert.Equal(t, 2, u.sent())
	}
	noStreamsLeft(t)
}

func TestManyRefusedStreamsCostOneLogin(t *testing.T) {
	u, _, api := dead(t)
	ctx := asBob(t)
	var all sync.WaitGroup
	for range 100 {
		all.Go(func() {
			stream, err := api.FullDuplexCall(ctx)
			if !assert.NoError(t, err) {
				return
			}
			assert.NoError(t, stream.Send(said("hello")))
			_, err = stream.Recv()
			assert.NoError(t, err)
			assert.NoError(t, stream.CloseSend())
			_, err = stream.Recv()
			assert.Equal(t, io.EOF, err)
		})
	}
	all.Wait()
	assert.Equal(t, 2, u.sent())
	noStreamsLeft(t)
}

func TestStreamRefusedForEverIsOpenedTwice(t *testing.T) {
	for name, use := range map[string]func(stream duplex) error{
		"receiver": func(stream duplex) error { _, err := stream.Recv(); return err },
		"sender": func(stream duplex) error {
			for {
				if err := stream.Send(said("hello")); err != nil {
					assert.Equal(t, io.EOF, err)
					_, err := stream.Recv()
					return err
				}
				time.Sleep(20 * time.Millisecond)
			}
		},
		"header": func(stream duplex) error {
			md, err := stream.Header()
			assert.NoError(t, err)
			assert.Nil(t, md)
			_, err = stream.Recv()
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			u, c, api := dead(t)
			u.change(func() { u.refuses = true })
			stream, err := api.FullDuplexCall(asBob(t))
			require.NoError(t, err)
			err = use(stream)
			assertStatus(t, codes.Unauthenticated, err)
			assert.Equal(t, "no such session", status.Convert(err).Message())
			require.ErrorIs(t, err, sessionlock.ErrRejected)
			_, again := stream.Recv()
			assert.Equal(t, err, again)
			assert.Equal(t, io.EOF, stream.Send(said("hello")))
			assert.Equal(t, []string{"bob/1", "bob/2"}, u.tokens())
			assert.Equal(t, 2, u.sent())
			invalid(t, c)
			noStreamsLeft(t)
		})
	}
}

// invalid asserts that the fleet has no session of bob.
func invalid(t *testing.T, c *sessionlock.Client) {
	t.Helper()
	now, err := c.Inspect(asBob(t), bob)
	require.NoError(t, err)
	assert.True(t, now.Expiry.IsZero(), "the session has not ended for the fleet")
}

// What was received may have had effects: there the caller decides. But nobody else
// is to use that session.
func TestStreamIsNotRepairedOnceSomethingWasReceived(t *testing.T) {
	t.Run("a message", func(t *testing.T) {
		u, c, api := begin(t)
		stream, err := api.FullDuplexCall(asBob(t))
		require.NoError(t, err)
		ping(t, stream, "one")
		u.revoke()
		require.NoError(t, stream.Send(said("two")))
		_, err = stream.Recv()
		assertStatus(t, codes.Unauthenticated, err)
		require.ErrorIs(t, err, sessionlock.ErrRejected)
		assert.Equal(t, []string{"bob/1"}, u.tokens())
		assert.Equal(t, 1, u.sent())
		invalid(t, c)
		noStreamsLeft(t)
	})
	t.Run("a header", func(t *testing.T) {
		u, c, api := dead(t)
		u.greets, u.lazy = true, 1
		stream, err := api.FullDuplexCall(asBob(t))
		require.NoError(t, err)
		md, err := stream.Header()
		require.NoError(t, err)
		assert.Equal(t, []string{"you"}, md.Get("hello"))
		require.NoError(t, stream.Send(said("one")))
		_, err = stream.Recv()
		assertStatus(t, codes.Unauthenticated, err)
		assert.Equal(t, []string{"bob/1"}, u.tokens())
		invalid(t, c)
	})
}

// A header that nobody has asked for was not received.
func TestStreamIsRepairedAfterAHeaderNobodySaw(t *testing.T) {
	u, _, api := dead(t)
	u.greets = true
	stream, err := api.FullDuplexCall(asBob(t))
	require.NoError(t, err)
	require.NoError(t, stream.CloseSend())
	_, err = stream.Recv()
	assert.Equal(t, io.EOF, err)
	assert.Equal(t, []string{"bob/1", "bob/2"}, u.tokens())
}

// Behind a header there may be messages, which only the caller may receive. So a sender
// that meets the end of such a stream is told.
func TestSenderIsToldOfAnEndBehindAHeader(t *testing.T) {
	u, c, api := dead(t)
	u.greets = true
	stream, err := api.FullDuplexCall(asBob(t))
	require.NoError(t, err)
	require.Eventually(t, func() bool { return errors.Is(stream.Send(said("hello")), io.EOF) }, 10*time.Second, 20*time.Millisecond)
	_, err = stream.Recv()
	assertStatus(t, codes.Unauthenticated, err)
	assert.Equal(t, []string{"bob/1"}, u.tokens())
	invalid(t, c)
}

func TestHeaderIsOfTheStreamThatStays(t *testing.T) {
	u, _, api := dead(t)
	stream, err := api.FullDuplexCall(asBob(t))
	require.NoError(t, err)
	require.NoError(t, stream.Send(said("hello")))
	md, err := stream.Header()
	require.NoError(t, err)
	assert.NotNil(t, md)
	hear(t, stream, "hello")
	end(t, stream)
	assert.Equal(t, []string{"bob/1", "bob/2"}, u.tokens())
}

func TestTooMuchToKeepIsNotRepaired(t *testing.T) {
	const frame = 5
	long := func(n int) string { return strings.Repeat("x", n) }
	fits := 64<<10 - frame
	for ; len(mustMarshal(t, uploaded(long(fits)))) > 64<<10-frame; fits-- {
	}
	for _, tc := range []struct {
		name     string
		messages []string
		repaired bool
	}{
		{"64 messages", make([]string, 64), true},
		{"65 messages", make([]string, 65), false},
		{"64 KiB", []string{long(fits)}, true},
		{"64 KiB and one", []string{long(fits + 1)}, false},
		{"64 KiB in two", []string{long(fits - 20), long(20)}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			u, c, api := dead(t)
			u.lazy = len(tc.messages)
			stream, err := api.StreamingInputCall(asBob(t))
			require.NoError(t, err)
			for _, m := range tc.messages {
				require.NoError(t, stream.Send(uploaded(m)))
			}
			_, err = stream.CloseAndRecv()
			if tc.repaired {
				require.NoError(t, err)
				assert.Equal(t, [][]string{tc.messages}, u.uploads)
				return
			}
			assertStatus(t, codes.Unauthenticated, err)
			require.ErrorIs(t, err, sessionlock.ErrRejected)
			assert.Equal(t, []string{"bob/1"}, u.tokens())
			assert.Equal(t, 1, u.sent())
			invalid(t, c)
			noStreamsLeft(t)
		})
	}
}

// A message whose size cannot be known is not kept.
func TestMessageThatIsNoProtocolBufferIsTooLong(t *testing.T) {
	u, c, _ := dead(t)
	u.lazy = 1
	conn := connect(t, u, c)
	stream, err := conn.NewStream(asBob(t), &testgrpc.TestService_ServiceDesc.Streams[2],
		testgrpc.TestService_FullDuplexCall_FullMethodName, grpc.ForceCodec(raw{}))
	require.NoError(t, err)
	require.NoError(t, stream.SendMsg(ptr(string(mustMarshal(t, said("hello"))))))
	assertStatus(t, codes.Unauthenticated, stream.RecvMsg(new(string)))
	assert.Equal(t, []string{"bob/1"}, u.tokens())
}

func TestOldProtocolBuffersAreKept(t *testing.T) {
	u, c, _ := dead(t)
	u.lazy = 1
	conn := connect(t, u, c)
	stream, err := conn.NewStream(asBob(t), &testgrpc.TestService_ServiceDesc.Streams[2], testgrpc.TestService_FullDuplexCall_FullMethodName)
	require.NoError(t, err)
	require.NoError(t, stream.SendMsg(new(oldMessage)))
	require.NoError(t, stream.RecvMsg(new(testgrpc.StreamingOutputCallResponse)))
	assert.Equal(t, []string{"bob/1", "bob/2"}, u.tokens())
}

// A stream that ends otherwise ends for its caller, who stops sending: it must not be
// repaired any more, or it would succeed by half.
func TestStreamThatEndsOtherwiseIsNotReplaced(t *testing.T) {
	u, _, api := begin(t)
	stream, err := api.FullDuplexCall(asBob(t))
	require.NoError(t, err)
	require.NoError(t, stream.Send(&testgrpc.StreamingOutputCallRequest{
		ResponseStatus: &testgrpc.EchoStatus{Code: int32(codes.ResourceExhausted), Message: "enough"},
	}))
	require.Eventually(t, func() bool { return errors.Is(stream.Send(said("hello")), io.EOF) }, 10*time.Second, time.Millisecond)
	for range 2 {
		_, err = stream.Recv()
		assert.Equal(t, status.Error(codes.ResourceExhausted, "enough"), err)
	}
	md, err := stream.Header()
	require.NoError(t, err)
	assert.Nil(t, md)
	assert.Equal(t, []string{"bob/1"}, u.tokens())
	assert.Equal(t, 1, u.sent())
	noStreamsLeft(t)
}

func TestRepairWithoutASessionFails(t *testing.T) {
	t.Run("denied", func(t *testing.T) {
		u, _, api := dead(t)
		u.login = func(context.Context, string, int) (sessionlock.Session, error) {
			return sessionlock.Session{}, sessionlock.Denied(errors.New("password of bob is wrong"))
		}
		stream, err := api.FullDuplexCall(asBob(t))
		require.NoError(t, err)
		_, err = stream.Recv()
		assertStatus(t, codes.Unauthenticated, err)
		require.ErrorIs(t, err, sessionlock.ErrDenied)
		require.ErrorIs(t, err, sessionlock.ErrRejected)
		assert.NotContains(t, err.Error(), "no such session")
		assert.Equal(t, io.EOF, stream.Send(said("hello")))
		noStreamsLeft(t)
	})
	t.Run("outage", func(t *testing.T) {
		f := newFaults()
		u, _, api := dead(t, sessionlock.WithCache(f))
		f.breakDown()
		stream, err := api.FullDuplexCall(asBob(t))
		require.NoError(t, err)
		_, err = stream.Recv()
		assertStatus(t, codes.Unavailable, err)
		require.ErrorIs(t, err, sessionlock.ErrUnavailable)
		assert.Equal(t, []string{"bob/1"}, u.tokens())
	})
	t.Run("deadline", func(t *testing.T) {
		u, _, api := dead(t)
		hang := make(chan struct{})
		defer close(hang)
		ctx, cancel := context.WithCancel(asBob(t))
		u.login = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
			cancel()
			<-hang
			return u.grant(key, n), nil
		}
		stream, err := api.FullDuplexCall(ctx)
		require.NoError(t, err)
		_, err = stream.Recv()
		assertStatus(t, codes.Canceled, err)
		require.ErrorIs(t, err, context.Canceled)
	})
}

// Somebody else has logged in already: no login, and what they have is not refused.
func TestLateRefusalAdoptsTheNewerSession(t *testing.T) {
	u, c, api := begin(t)
	ctx := asBob(t)
	echo(t, ctx, api)
	u.lazy = 1
	stream, err := api.FullDuplexCall(ctx)
	require.NoError(t, err)
	u.arrived(t, 2)
	u.revoke()
	_, err = c.Put(ctx, bob, u.grant(bob, 9))
	require.NoError(t, err)
	ping(t, stream, "hello")
	end(t, stream)
	assert.Equal(t, []string{"bob/1", "bob/1", "bob/9"}, u.tokens())
	assert.Equal(t, 1, u.sent())
}

// But when that is refused too the call has had its two streams.
func TestNewerSessionThatIsRefusedIsTheLast(t *testing.T) {
	u, c, api := begin(t)
	ctx := asBob(t)
	echo(t, ctx, api)
	u.lazy = 1
	stream, err := api.FullDuplexCall(ctx)
	require.NoError(t, err)
	u.arrived(t, 2)
	u.revoke()
	_, err = c.Put(ctx, bob, u.grant(bob, 9))
	require.NoError(t, err)
	u.change(func() { u.refuses = true })
	require.NoError(t, stream.Send(said("hello")))
	_, err = stream.Recv()
	assertStatus(t, codes.Unauthenticated, err)
	assert.Equal(t, []string{"bob/1", "bob/1", "bob/9"}, u.tokens())
	assert.Equal(t, 1, u.sent())
	invalid(t, c)
}

func TestContextIsOfTheCall(t *testing.T) {
	_, _, api := dead(t)
	type mine struct{}
	stream, err := api.FullDuplexCall(context.WithValue(asBob(t), mine{}, 7))
	require.NoError(t, err)
	early := stream.Context()
	assert.Equal(t, 7, early.Value(mine{}))
	ping(t, stream, "hello")
	require.NoError(t, early.Err(), "it outlives the stream that was replaced")
	late := stream.Context()
	assert.Equal(t, 7, late.Value(mine{}))
	echo(t, late, api) // it marks no call as one of the stream's own
	end(t, stream)
	assert.Equal(t, context.Canceled, early.Err())
	assert.Equal(t, context.Canceled, late.Err())
}

func TestTrailerIsOfTheStreamThatStays(t *testing.T) {
	_, _, api := dead(t)
	stream, err := api.FullDuplexCall(asBob(t))
	require.NoError(t, err)
	end(t, stream)
	assert.Equal(t, []string{"false"}, stream.Trailer().Get("refused"))
}

// A context that ends ends the stream, and leaves nothing behind.
func TestStreamEndsWithItsContext(t *testing.T) {
	_, _, api := begin(t)
	ctx, cancel := context.WithCancel(asBob(t))
	stream, err := api.FullDuplexCall(ctx)
	require.NoError(t, err)
	ping(t, stream, "hello")
	cancel()
	_, err = stream.Recv()
	assertStatus(t, codes.Canceled, err)
	noStreamsLeft(t)
}

// A message that cannot be sent ends the stream at once.
func TestMessageThatCannotBeSentEndsTheStream(t *testing.T) {
	u, c, _ := begin(t)
	stream, err := testgrpc.NewTestServiceClient(connect(t, u, c)).FullDuplexCall(asBob(t), grpc.MaxCallSendMsgSize(8))
	require.NoError(t, err)
	early := stream.Context()
	err = stream.Send(said("more than eight"))
	assertStatus(t, codes.ResourceExhausted, err)
	assert.Equal(t, context.Canceled, early.Err())
	noStreamsLeft(t)
}

// eager opens a stream no sooner than the server has let it in.
func eager(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	stream, err := streamer(ctx, desc, cc, method, opts...)
	if err != nil {
		return nil, err
	}
	if md, _ := stream.Header(); md == nil {
		return nil, stream.RecvMsg(new(testgrpc.Empty))
	}
	return stream, nil
}

func TestRefusalWhileOpeningIsRepairedOnce(t *testing.T) {
	u, c, _ := dead(t)
	u.welcomes = true
	api := testgrpc.NewTestServiceClient(connect(t, u, c, grpc.WithChainStreamInterceptor(eager)))
	stream, err := api.FullDuplexCall(asBob(t))
	require.NoError(t, err)
	assert.Equal(t, []string{"bob/1", "bob/2"}, u.tokens())
	u.revoke()
	require.NoError(t, stream.Send(said("hello")))
	_, err = stream.Recv()
	assertStatus(t, codes.Unauthenticated, err)
	assert.Empty(t, u.tokens(), "two streams are all that a call may have")
	invalid(t, c)
	noStreamsLeft(t)
}

func TestRefusalWhileReopeningEndsTheCall(t *testing.T) {
	u, c, _ := begin(t)
	u.welcomes, u.lazy = true, 1
	api := testgrpc.NewTestServiceClient(connect(t, u, c, grpc.WithChainStreamInterceptor(eager)))
	stream, err := api.FullDuplexCall(asBob(t))
	require.NoError(t, err)
	u.change(func() { u.refuses, u.lazy = true, 0 })
	require.NoError(t, stream.Send(said("hello")))
	_, err = stream.Recv()
	assertStatus(t, codes.Unauthenticated, err)
	require.ErrorIs(t, err, sessionlock.ErrRejected)
	assert.Equal(t, []string{"bob/1", "bob/2"}, u.tokens())
	assert.Equal(t, 2, u.sent())
	invalid(t, c)
	noStreamsLeft(t)
}

func TestReopeningThatFailsEndsTheCall(t *testing.T) {
	u, c, _ := begin(t)
	u.lazy = 1
	full := status.Error(codes.ResourceExhausted, "too many streams")
	opened := 0
	limit := func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
		if opened++; opened > 1 {
			return nil, full
		}
		return streamer(ctx, desc, cc, method, opts...)
	}
	api := testgrpc.NewTestServiceClient(connect(t, u, c, grpc.WithChainStreamInterceptor(limit)))
	stream, err := api.FullDuplexCall(asBob(t))
	require.NoError(t, err)
	u.arrived(t, 1)
	u.revoke()
	require.NoError(t, stream.Send(said("hello")))
	_, err = stream.Recv()
	assert.Equal(t, full, err)
	noStreamsLeft(t)
}

// The token may be for connections that are private, and the next one is not.
func TestReopeningInClearEndsTheCall(t *testing.T) {
	u, c, _ := begin(t)
	u.lazy = 1
	opened := 0
	exposed := func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
		if opened++; opened > 1 {
			return nil, status.Error(codes.Internal, blind(opts).Error())
		}
		return streamer(ctx, desc, cc, method, opts...)
	}
	api := testgrpc.NewTestServiceClient(connect(t, u, c, grpc.WithChainStreamInterceptor(exposed)))
	stream, err := api.FullDuplexCall(asBob(t))
	require.NoError(t, err)
	u.arrived(t, 1)
	u.revoke()
	require.NoError(t, stream.Send(said("hello")))
	_, err = stream.Recv()
	assertStatus(t, codes.InvalidArgument, err)
	require.ErrorIs(t, err, sessionlock.ErrInvalid)
}

// held is the first stream of a call; what it is asked waits.
type held struct {
	grpc.ClientStream
	asked, release chan struct{}
	receives       chan struct{} // one for each message that is waited for on the second stream
}

func (h held) wait() {
	close(h.asked)
	<-h.release
}

// told says when it is asked for a message.
type told struct {
	grpc.ClientStream
	receives chan struct{}
}

func (r told) RecvMsg(m any) error {
	r.receives <- struct{}{}
	return r.ClientStream.RecvMsg(m)
}

// heldHeader says that there is one, after all.
type heldHeader struct{ held }

func (h heldHeader) Header() (metadata.MD, error) {
	h.wait()
	return metadata.Pairs("stream", "first"), nil
}

// heldSend sends and then finds that the stream has ended.
type heldSend struct{ held }

func (h heldSend) SendMsg(m any) error {
	_ = h.ClientStream.SendMsg(m)
	h.wait()
	return io.EOF
}

// holding returns calls of which the first stream is made by hold.
func holding(t *testing.T, u *upstream, c *sessionlock.Client, hold func(held) grpc.ClientStream) (api testgrpc.TestServiceClient, h held) {
	t.Helper()
	h = held{asked: make(chan struct{}), release: make(chan struct{}), receives: make(chan struct{}, 9)}
	opened := 0
	return testgrpc.NewTestServiceClient(connect(t, u, c, grpc.WithChainStreamInterceptor(
		func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			stream, err := streamer(ctx, desc, cc, method, opts...)
			if opened++; opened > 1 {
				return told{stream, h.receives}, err
			}
			return hold(held{stream, h.asked, h.release, nil}), err
		}))), h
}

func TestHeaderOfAReplacedStreamIsNotReturned(t *testing.T) {
	u, c, _ := dead(t)
	u.lazy = 1 // so that it is the receiver who meets the refusal
	api, h := holding(t, u, c, func(h held) grpc.ClientStream { return heldHeader{h} })
	stream, err := api.FullDuplexCall(asBob(t))
	require.NoError(t, err)
	var other sync.WaitGroup
	other.Go(func() {
		md, err := stream.Header()
		assert.NoError(t, err)
		assert.NotNil(t, md)
		assert.Empty(t, md.Get("stream"))
	})
	<-h.asked
	ping(t, stream, "hello")
	close(h.release)
	other.Wait()
	end(t, stream)
}

// A sender that was overtaken by the repair goes on, although the receiver waits for
// the next message already, which may depend on what is sent next.
func TestSenderDoesNotWaitForTheNextMessage(t *testing.T) {
	u, c, _ := dead(t)
	api, h := holding(t, u, c, func(h held) grpc.ClientStream { return heldSend{h} })
	stream, err := api.FullDuplexCall(asBob(t))
	require.NoError(t, err)
	var sender sync.WaitGroup
	waits := make(chan struct{})
	sender.Go(func() {
		assert.NoError(t, stream.Send(said("one")))
		<-waits
		assert.NoError(t, stream.Send(said("two")))
		assert.NoError(t, stream.CloseSend())
	})
	<-h.asked
	hear(t, stream, "one")
	sender.Go(func() {
		<-h.receives // "one"
		<-h.receives
		close(h.release)
		close(waits)
	})
	hear(t, stream, "two")
	sender.Wait()
	_, err = stream.Recv()
	assert.Equal(t, io.EOF, err)
}

func TestMessageSentDuringTheRepairIsNotLost(t *testing.T) {
	for range 20 {
		u, _, api := dead(t)
		u.lazy = 1
		repairing, sending := make(chan struct{}), make(chan struct{})
		u.login = func(_ context.Context, key string, n int) (sessionlock.Session, error) {
			close(repairing)
			<-sending
			return u.grant(key, n), nil
		}
		stream, err := api.FullDuplexCall(asBob(t))
		require.NoError(t, err)
		require.NoError(t, stream.Send(said("one")))
		var sender sync.WaitGroup
		sender.Go(func() {
			<-repairing
			close(sending)
			assert.NoError(t, stream.Send(said("two")))
			assert.NoError(t, stream.CloseSend())
		})
		hear(t, stream, "one")
		hear(t, stream, "two")
		_, err = stream.Recv()
		assert.Equal(t, io.EOF, err)
		sender.Wait()
	}
}

func TestSenderIsToldOfTheEndAtOnce(t *testing.T) {
	u := newUpstream(t)
	api, h := holding(t, u, newClient(t, u), func(h held) grpc.ClientStream { return heldSend{h} })
	close(h.release)
	stream, err := api.FullDuplexCall(asBob(t))
	require.NoError(t, err)
	assert.Equal(t, io.EOF, stream.Send(&testgrpc.StreamingOutputCallRequest{
		ResponseStatus: &testgrpc.EchoStatus{Code: int32(codes.ResourceExhausted), Message: "enough"},
	}))
	_, err = stream.Recv()
	assert.Equal(t, status.Error(codes.ResourceExhausted, "enough"), err)
}

func TestMessagesAreNotKeptForEver(t *testing.T) {
	_, _, api := begin(t)
	stream, err := api.FullDuplexCall(asBob(t))
	require.NoError(t, err)
	m := said("one")
	kept := weak.Make(m)
	require.NoError(t, stream.Send(m))
	hear(t, stream, "one")
	assert.Eventually(t, func() bool {
		runtime.GC()
		return kept.Value() == nil
	}, 10*time.Second, time.Millisecond)
	end(t, stream)
}

// strange is a context of a kind that package context does not know: what is derived
// from it has a goroutine until it is released.
type strange struct {
	context.Context //nolint:containedctx // it is one
	done            chan struct{}
}

func (s strange) Done() <-chan struct{} { return s.done }

func TestNothingIsLeftOfAStreamThatWasOver(t *testing.T) {
	_, _, api := begin(t)
	ctx := strange{asBob(t), make(chan struct{})}
	defer close(ctx.done)
	_, err := api.FullDuplexCall(strange{t.Context(), ctx.done})
	require.ErrorIs(t, err, sessionlock.ErrInvalid)
	stream, err := api.FullDuplexCall(ctx)
	require.NoError(t, err)
	end(t, stream)
	left := func() string { return goroutines("context.(*cancelCtx).propagateCancel") }
	assert.Eventually(t, func() bool { return left() == "" }, 10*time.Second, 5*time.Millisecond, "%s", left())
}

func ptr[T any](v T) *T { return &v }

func mustMarshal(t *testing.T, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	require.NoError(t, err)
	return b
}

// raw is a codec whose messages are bytes already.
type raw struct{}

func (raw) Name() string                  { return "proto" }
func (raw) Marshal(v any) ([]byte, error) { return []byte(*v.(*string)), nil }
func (raw) Unmarshal(b []byte, v any) error {
	*v.(*string) = string(b)
	return nil
}

// oldMessage is one of the first generation of protocol buffers in Go.
type oldMessage struct{}

func (*oldMessage) Reset()         {}
func (*oldMessage) String() string { return "" }
func (*oldMessage) ProtoMessage()  {}
