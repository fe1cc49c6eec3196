package sessionlockgrpc

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sessionlock/sessionlock"
)

// callError is an error of ours with a status. Its texts are log-safe: those of
// package sessionlock are, and any other is the server's own.
type callError struct {
	status *status.Status
	err    error
}

func (e *callError) Error() string              { return e.status.String() }
func (e *callError) GRPCStatus() *status.Status { return e.status }
func (e *callError) Unwrap() error              { return e.err }

type withGRPCStatus interface{ GRPCStatus() *status.Status }

// withStatus gives err the status of what it says. One that has a status of its own
// and one that is nothing of ours are returned as they are.
func withStatus(err error) error {
	if _, ok := err.(withGRPCStatus); ok { // not what it wraps: that may be the status of a login
		return err
	}
	if st := statusOf(err); st != nil {
		return &callError{st, err}
	}
	return err
}

// statusOf returns nil for an error that is nothing of ours.
func statusOf(err error) *status.Status {
	var reauth *sessionlock.ReauthError
	if errors.As(err, &reauth) {
		return refusal(reauth)
	}
	if code := codeOf(err); code != codes.OK {
		return status.New(code, err.Error())
	}
	return nil
}

// codeOf looks for the facts before it looks for what may have caused them: a login
// that timed out is no deadline of the call.
func codeOf(err error) codes.Code {
	is := func(targets ...error) bool {
		return slices.ContainsFunc(targets, func(t error) bool { return errors.Is(err, t) })
	}
	var login *sessionlock.LoginError
	switch {
	case errors.As(err, &login) && login.Class == sessionlock.LoginDenied:
		return codes.Unauthenticated
	case login != nil, is(sessionlock.ErrUnavailable, sessionlock.ErrLockTimeout, sessionlock.ErrStale, sessionlock.ErrClosed):
		return codes.Unavailable
	case is(sessionlock.ErrInvalid):
		return codes.InvalidArgument
	case is(context.Canceled):
		return codes.Canceled
	case is(context.DeadlineExceeded):
		return codes.DeadlineExceeded
	}
	return codes.OK
}

// refusal is the status of a session that was refused: why there was no other one, or
// what the server said last.
func refusal(e *sessionlock.ReauthError) *status.Status {
	last := e.Second
	if last == nil {
		last = e.First
	} else if code := codeOf(last); code != codes.OK {
		return status.New(code, e.Error())
	}
	var server withGRPCStatus
	if errors.As(last, &server) && server.GRPCStatus().Code() != codes.OK {
		return server.GRPCStatus()
	}
	return status.New(codes.Unauthenticated, e.Error())
}

// ended is the error of a stream that was refused and cannot be repaired.
func ended(err error) error {
	return &callError{status.Convert(err), fmt.Errorf("%w: %w", sessionlock.ErrRejected, err)}
}
