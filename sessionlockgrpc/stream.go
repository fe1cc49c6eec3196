package sessionlockgrpc

import (
	"context"
	"io"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/sessionlock/sessionlock"
)

// What a stream keeps to send it again. The bytes are those of gRPC's frames, and no
// more than a new stream takes without waiting for its server: the goroutine that
// sends them again may be the one that would have to receive meanwhile.
const (
	maxKept  = 64
	maxBytes = 64 << 10
	frame    = 5 // bytes before each message
)

// stream is a call whose stream may be replaced, once.
type stream struct {
	ctx    context.Context //nolint:containedctx // of the call, for Context; ended with it
	cancel context.CancelFunc
	client *sessionlock.Client
	from   *sessions
	open   func(context.Context, []grpc.CallOption) (grpc.ClientStream, error)
	opts   []grpc.CallOption
	single bool // one message is received, and the call is over with it

	// turn is taken by who waits for something to be received, or asks how a stream has
	// ended: gRPC allows one at a time. Only its holder replaces cur.
	turn chan struct{}

	mu         sync.Mutex // guards the rest; held while a stream is replaced, so that nothing is sent meanwhile
	cur        *attempt   // the stream in use
	repairable bool       // it was not replaced, nothing was received, and kept is all that was sent
	kept       []any
	bytes      int
	closed     bool  // by CloseSend
	end        error // what RecvMsg says from now on; nil: not over
}

// attempt is one stream, and the session it was opened with.
type attempt struct {
	grpc.ClientStream
	*guard
	session sessionlock.Session
	over    chan struct{} // closed when it was replaced, or has ended and will not be
}

func newStream(ctx context.Context, c *sessionlock.Client, from *sessions, key func(context.Context) (string, error),
	single bool, open func(context.Context, []grpc.CallOption) (grpc.ClientStream, error), opts []grpc.CallOption,
) (grpc.ClientStream, error) {
	call, cancel := context.WithCancel(ctx)
	s := &stream{ctx: call, cancel: cancel, client: c, from: from, open: open, opts: opts, single: single, turn: make(chan struct{}, 1)}
	var bare grpc.ClientStream
	err := from.do(call, key, func(run context.Context, session *sessionlock.Session) (err error) {
		if session == nil {
			bare, err = open(ctx, opts)
			return err
		}
		s.cur, err = s.attempt(run, *session)
		s.repairable = sessionlock.RejectionFromContext(run) == nil // else refused while it was opened
		return s.cur.judge(err)
	})
	if err != nil || bare != nil {
		cancel()
		return bare, withStatus(err)
	}
	return s, nil
}

// attempt opens a stream with session.
func (s *stream) attempt(ctx context.Context, session sessionlock.Session) (*attempt, error) {
	ctx, opts, g := attach(ctx, session, s.opts)
	cs, err := s.open(ctx, opts)
	return &attempt{cs, g, session, make(chan struct{})}, err
}

// now returns the stream in use, and how the call has ended if it has.
func (s *stream) now() (*attempt, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cur, s.end
}

// RecvMsg receives from the stream in use, and replaces it if it is refused.
func (s *stream) RecvMsg(m any) error {
	s.turn <- struct{}{}
	defer func() { <-s.turn }()
	for {
		a, end := s.now()
		if end != nil {
			return end
		}
		err := a.RecvMsg(m)
		if err == nil {
			s.settle(a)
			if s.single {
				s.cancel()
			}
			return nil
		}
		s.conclude(a, err)
	}
}

// Header waits for the stream in use, and replaces it if it is refused. Like
// that of gRPC it says nil and nil when there is none.
func (s *stream) Header() (metadata.MD, error) {
	for {
		a, _ := s.now()
		md, err := a.Header()
		if md != nil && s.settle(a) || md == nil && !s.replaced(a) {
			return md, err
		}
	}
}

// SendMsg sends on the stream in use. What was kept before it was replaced
// has been sent again.
func (s *stream) SendMsg(m any) error {
	a := s.keep(m)
	err := a.SendMsg(m)
	switch {
	case err == nil:
		return nil
	case err != io.EOF: //nolint:errorlint // gRPC's word for a stream that has ended, always bare
		s.cancel()
	case s.replaced(a):
		return nil
	}
	return err
}

// CloseSend closes the stream in use, and the one that may take its place.
func (s *stream) CloseSend() error {
	s.mu.Lock()
	s.closed = true
	a := s.cur
	s.mu.Unlock()
	return a.CloseSend()
}

// Trailer is that of the stream in use.
func (s *stream) Trailer() metadata.MD {
	a, _ := s.now()
	return a.Trailer()
}

// Context ends with the call and not with a stream that is replaced. It does not
// wait for the latter.
func (s *stream) Context() context.Context { return s.ctx }

// keep remembers m, if it can be helped, and returns the stream to send it on.
func (s *stream) keep(m any) *attempt {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.repairable {
		s.kept = append(s.kept, m)
		s.bytes += size(m) + frame
		if len(s.kept) > maxKept || s.bytes > maxBytes {
			s.forget()
		}
	}
	return s.cur
}

// size returns that of m in bytes, and of what cannot be known one that is too much.
func size(m any) int {
	switch m := m.(type) {
	case proto.Message:
		return proto.Size(m)
	case protoadapt.MessageV1:
		return proto.Size(protoadapt.MessageV2Of(m))
	}
	return maxBytes
}

// forget rules out that the stream in use is replaced. s.mu is held.
func (s *stream) forget() {
	s.repairable, s.kept = false, nil
}

// settle reports whether a is in use; then the caller has something of it, and keeps it.
func (s *stream) settle(a *attempt) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cur != a {
		return false
	}
	s.forget()
	return true
}

// replaced is asked when a has ended: it finds out why, unless somebody else has, and
// reports whether there is another stream now.
func (s *stream) replaced(a *attempt) bool {
	select {
	case s.turn <- struct{}{}:
		defer func() { <-s.turn }()
	case <-a.over: // whoever has the turn may wait for the next stream already
	}
	if known, yes := s.known(a); known {
		return yes
	}
	var err error
	if md, _ := a.Header(); md == nil { // else messages may follow, and they are the caller's
		err = a.RecvMsg(new(emptypb.Empty))
	}
	if err == nil {
		s.settle(a)
		return false
	}
	s.conclude(a, err)
	_, yes := s.known(a)
	return yes
}

// known reports whether it is decided if a is replaced, and how.
func (s *stream) known(a *attempt) (known, yes bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cur != a || !s.repairable, s.cur != a
}

// conclude replaces a, which has ended by err, or ends the call. The turn is held.
func (s *stream) conclude(a *attempt, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer close(a.over)
	defer s.forget()
	switch {
	case !a.refused(err):
	case s.repairable:
		var next *attempt
		if next, err = s.repair(a, err); err == nil {
			s.cur = next
			return
		}
	default:
		err = s.refuse(a, err)
	}
	s.end = withStatus(err)
	s.cancel()
}

// refuse ends the session of a, for which there is no other, and says so.
func (s *stream) refuse(a *attempt, err error) error {
	_ = s.client.Invalidate(s.ctx, a.session) // a failure shows at the next use
	return ended(err)
}

// repair returns a stream with the session that follows that of a, on which
// everything was sent again. Do is told of the refusal where it has no other session
// yet, and of nothing else, or it would renew a second time. s.mu is held.
func (s *stream) repair(a *attempt, refusal error) (*attempt, error) {
	var next *attempt
	var bad error
	key := func(context.Context) (string, error) { return a.session.Key(), nil }
	err := s.from.do(s.ctx, key, func(run context.Context, session *sessionlock.Session) error {
		if session.Token.Reveal() == a.token.Reveal() {
			return sessionlock.Reject(refusal)
		}
		next, bad = s.attempt(run, *session)
		return nil
	})
	switch {
	case err != nil:
		return nil, err
	case next.refused(bad):
		return nil, s.refuse(next, bad)
	case bad != nil:
		return nil, next.judge(bad)
	}
	for _, m := range s.kept {
		if next.SendMsg(m) != nil {
			break // RecvMsg says why
		}
	}
	if s.closed {
		_ = next.CloseSend()
	}
	return next, nil
}
