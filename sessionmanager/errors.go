package sessionmanager

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"time"

	"github.com/sessionlock/sessionlock/internal/bound"
)

// What an error can say; match with errors.Is. Each but ErrInvalid comes as, or in, an
// [*Error].
var (
	// ErrInvalid: an argument or option is wrong. Returned before anything is
	// done; the text names it and never quotes it.
	ErrInvalid = errors.New("sessionmanager: invalid argument")
	// ErrLimit: as many sessions as allowed are open, here or in the fleet.
	ErrLimit = errors.New("sessionmanager: too many sessions")
	// ErrNotFound: no such session, or it is somebody else's.
	ErrNotFound = errors.New("sessionmanager: session not found")
	// ErrNotReady: the session is being opened, or closed, or it has ended, or
	// its worker is broken, or its lease is over. Only the first of these passes:
	// while [Session.State] is before StateReady.
	ErrNotReady = errors.New("sessionmanager: session not ready")
	// ErrBusy: the session has as many calls, or listeners, as allowed.
	ErrBusy = errors.New("sessionmanager: session busy")
	// ErrOpen: the session could not be opened. Nothing of it is left, except a
	// start that ignores its context: it keeps the session's place until it returns.
	ErrOpen = errors.New("sessionmanager: session not opened")
	// ErrTaken: another session has the id, and be it while it ends. A cause of ErrOpen.
	ErrTaken error = &ownError{text: "the id is taken"}
	// ErrClose: the worker did not end as it should. The session is gone all the
	// same, or will be as soon as a start that ignores its context has returned.
	ErrClose = errors.New("sessionmanager: session not closed cleanly")
	// ErrFaulted: a call broke the session, or its worker broke or died.
	ErrFaulted = errors.New("sessionmanager: session faulted")
	// ErrClosed: the manager is shut down.
	ErrClosed = errors.New("sessionmanager: manager closed")
	// ErrUnavailable: the store of fleet-wide slots did not answer. What is open
	// stays open.
	ErrUnavailable = errors.New("sessionmanager: slots unavailable")
)

// Code says what an [Error] is about, in a word that does as a metric's label
// or for the status of an RPC.
type Code string

// The codes, and the errors that they match.
const (
	CodeLimit       Code = "limit"        // ErrLimit
	CodeNotFound    Code = "not_found"    // ErrNotFound
	CodeNotReady    Code = "not_ready"    // ErrNotReady
	CodeBusy        Code = "busy"         // ErrBusy
	CodeOpenFailed  Code = "open_failed"  // ErrOpen
	CodeCloseFailed Code = "close_failed" // ErrClose
	CodeFaulted     Code = "faulted"      // ErrFaulted
	CodeClosed      Code = "closed"       // ErrClosed
	CodeUnavailable Code = "unavailable"  // ErrUnavailable
)

var sentinels = map[Code]error{
	CodeLimit: ErrLimit, CodeNotFound: ErrNotFound, CodeNotReady: ErrNotReady, CodeBusy: ErrBusy,
	CodeOpenFailed: ErrOpen, CodeCloseFailed: ErrClose, CodeFaulted: ErrFaulted,
	CodeClosed: ErrClosed, CodeUnavailable: ErrUnavailable,
}

// Error is why something was not done. It matches the error of its code and
// whatever Err matches. Its text does not quote the errors of workers, which may
// hold a URL or a body; Err has them.
type Error struct {
	Code    Code
	Session string // its [Session.Name]; for a session that is not there "" or the name its id would have
	Err     error  // the cause; nil where the code says it all

	op, detail string
}

// Error names the session by its log-safe name; see [Error] for what it does not quote.
func (e *Error) Error() string {
	s := "sessionmanager: " + e.op
	if e.Session != "" {
		s += " " + e.Session
	}
	s += ": " + sentinels[e.Code].Error()[len("sessionmanager: "):]
	if e.detail != "" {
		s += ": " + e.detail
	}
	if e.Err != nil {
		s += ": " + told(e.Err)
	}
	return s
}

// Unwrap gives the error of the code, and the cause.
func (e *Error) Unwrap() []error {
	if e.Err == nil {
		return []error{sentinels[e.Code]}
	}
	return []error{sentinels[e.Code], e.Err}
}

// PanicError is the cause when a func or a worker panicked, or ended its
// goroutine: then Value is nil.
type PanicError struct {
	Value any    // what it panicked with
	Stack []byte // of the panic
}

// Error does not print the value, which may be anything.
func (e *PanicError) Error() string {
	if e.Value == nil {
		return "goroutine ended (runtime.Goexit)"
	}
	return fmt.Sprintf("panic with a value of type %T", e.Value)
}

// ownError is a cause in our own words, which may be printed.
type ownError struct {
	text string
	err  error
}

func (e *ownError) Error() string { return e.text }
func (e *ownError) Unwrap() error { return e.err }

// told is what can be said of err without quoting what somebody else wrote.
func told(err error) string {
	var (
		own     *ownError
		panicky *PanicError
		ours    *Error
	)
	switch {
	case errors.As(err, &own):
		return own.text
	case errors.As(err, &ours):
		return ours.Error()
	case errors.As(err, &panicky):
		return panicky.Error()
	case errors.Is(err, context.DeadlineExceeded):
		return "timed out"
	case errors.Is(err, context.Canceled):
		return "cancelled"
	}
	return fmt.Sprintf("failed (%T)", err)
}

// ended is why ctx has ended, as something that matches ctx.Err() too.
func ended(ctx context.Context) error {
	cause := context.Cause(ctx)
	if errors.Is(cause, ctx.Err()) {
		return cause
	}
	return fmt.Errorf("%w: %w", ctx.Err(), cause)
}

// protect turns a panic of f into an error.
func protect[T any](f func() (T, error)) (v T, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = &PanicError{Value: r, Stack: debug.Stack()}
		}
	}()
	return f()
}

// within runs f in a goroutine of its own, and leaves it behind when d has
// passed or ctx has ended. Its error is never nil unless f's was.
func within(ctx context.Context, d time.Duration, f func(context.Context) error) error {
	_, err := bound.Call(ctx, d, func(ctx context.Context) (struct{}, error) {
		return protect(func() (struct{}, error) { return struct{}{}, f(ctx) })
	}, nil)
	switch {
	case errors.Is(err, bound.ErrGoexit):
		return &PanicError{}
	case errors.Is(err, bound.ErrTimeout):
		return &ownError{"timed out", context.DeadlineExceeded}
	}
	return err
}
