package sessionguard

import (
	"bufio"
	"errors"
	"net"
	"net/http"
)

// Middleware guards the requests of a net/http server. session says which session a
// request modifies, "" for none; then it is not guarded. The handler's context ends when
// a newer request for the session registers, on any node, and [FromContext] finds the
// guard in it.
//
// What the handler answers is the answer. A handler whose context has ended should
// return without one: what a driver or client returns then is context.Canceled, not the
// cause, and an answer of 500 made of it hides that it was superseded. A superseded
// request without an answer, that knows of nothing it has committed, is answered with 409
// ([WithConflict]), one whose registration was lost with 503.
// A request that could not be registered is answered with 503, for an invalid session
// with 400, as all are if session is nil, and its handler is not called. A panic passes
// through.
//
// Only requests that modify need to be guarded: let session return "" for the others,
// or reading a page ends the request that is saving it.
func (m *Monitor) Middleware(session func(*http.Request) string) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if session == nil {
				m.refuse(w, r, ErrInvalid)
				return
			}
			id := session(r)
			if id == "" {
				next.ServeHTTP(w, r)
				return
			}
			ctx, guard, err := m.Register(r.Context(), id)
			if err != nil {
				m.refuse(w, r, err)
				return
			}
			defer guard.End()
			answer := &answer{ResponseWriter: w}
			next.ServeHTTP(answer, r.WithContext(ctx))
			if failed, _ := guard.r.state(); failed != nil && !answer.begun && !guard.r.wrote.Load() {
				m.refuse(w, r, failed)
			}
		})
	}
}

// refuse answers a request that was not handled, or not to its end.
func (m *Monitor) refuse(w http.ResponseWriter, r *http.Request, err error) {
	switch {
	case errors.Is(err, ErrSuperseded):
		m.conflict.ServeHTTP(w, r)
	case errors.Is(err, ErrInvalid):
		http.Error(w, "invalid session", http.StatusBadRequest)
	case r.Context().Err() != nil: // nobody is there to read it
	default:
		w.Header().Set("Retry-After", "1")
		http.Error(w, "the session cannot be guarded", http.StatusServiceUnavailable)
	}
}

// answer notes whether the handler has answered.
type answer struct {
	http.ResponseWriter
	begun bool
}

func (a *answer) WriteHeader(status int) {
	if status >= 200 || status == http.StatusSwitchingProtocols {
		a.begun = true
	}
	a.ResponseWriter.WriteHeader(status)
}

func (a *answer) Write(b []byte) (int, error) {
	a.begun = true
	return a.ResponseWriter.Write(b)
}

// Unwrap is for [http.ResponseController].
func (a *answer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

// FlushError is for [http.ResponseController], which has to learn that a client is gone.
func (a *answer) FlushError() error {
	err := http.NewResponseController(a.ResponseWriter).Flush()
	a.begun = a.begun || err == nil
	return err
}

// Flush and Hijack are for handlers that ask for the interfaces themselves.
func (a *answer) Flush() { _ = a.FlushError() }

func (a *answer) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, rw, err := http.NewResponseController(a.ResponseWriter).Hijack()
	a.begun = a.begun || err == nil
	return conn, rw, err
}
