package sessionguard_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/textproto"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/internal/redistest"
	"github.com/sessionlock/sessionlock/sessionguard"
)

// cookie says which session a request modifies.
func cookie(r *http.Request) string { return r.Header.Get("X-Session") }

// serve returns the address of a node whose handler is guarded.
func serve(t *testing.T, m *sessionguard.Monitor, h http.HandlerFunc) string {
	t.Helper()
	s := httptest.NewServer(m.Middleware(cookie)(h))
	t.Cleanup(s.Close)
	return s.URL
}

// answered is what a client got.
type answered struct {
	status int
	header http.Header
	body   string
	err    error
}

func ask(ctx context.Context, url, session string) answered {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, nil)
	if err != nil {
		return answered{err: err}
	}
	req.Header.Set("X-Session", session)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return answered{err: err}
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return answered{resp.StatusCode, resp.Header, string(body), err}
}

// superseded is one guarded request that a newer one supersedes while it is in h, and
// what it is answered; h is called once it knows.
func superseded(t *testing.T, h http.HandlerFunc, opts ...sessionguard.Option) answered {
	t.Helper()
	store := new(sessionguard.MemoryStore)
	m := on(t, store, opts...)
	newer := on(t, store)
	return ask(t.Context(), serve(t, m, func(w http.ResponseWriter, r *http.Request) {
		register(t, newer, cookie(r))
		assert.ErrorIs(t, cause(t, r.Context()), sessionguard.ErrSuperseded)
		h(w, r)
	}), "s")
}

// The case that all this is for: a node is slow, the request is sent again to another
// one, which answers; what the first one finishes afterwards changes nothing.
func TestRequestSentAgainToAnotherNode(t *testing.T) {
	s := redistest.Start(t)
	var mu sync.Mutex
	page := 1
	slow := make(chan struct{})
	handler := func(name string, wait <-chan struct{}, to int) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			g := sessionguard.FromContext(r.Context())
			if wait != nil {
				<-wait // whatever its context says
			}
			err := g.Commit(r.Context(), func(context.Context, uint64) (bool, error) {
				mu.Lock()
				defer mu.Unlock()
				page = to
				return true, nil
			})
			if err == nil {
				fmt.Fprint(w, name)
			}
		}
	}
	one := serve(t, newMonitor(t, s.Client()), handler("one", slow, 2))
	two := serve(t, newMonitor(t, s.Client()), handler("two", nil, 3))
	first := make(chan answered, 1)
	go func() { first <- ask(t.Context(), one, "s") }()
	rdb := s.Client()
	require.Eventually(t, func() bool { return len(rdb.Keys(t.Context(), "*").Val()) > 0 }, soon, time.Millisecond)

	second := ask(t.Context(), two, "s")
	require.NoError(t, second.err)
	assert.Equal(t, http.StatusOK, second.status)
	assert.Equal(t, "two", second.body)
	close(slow)
	late := <-first
	require.NoError(t, late.err)
	assert.Equal(t, http.StatusConflict, late.status)
	assert.Equal(t, 3, page)
}

func TestHandlersContextEndsWhenANewerRequestRegisters(t *testing.T) {
	s := redistest.Start(t)
	a, b := newMonitor(t, s.Client()), newMonitor(t, s.Client())
	inside := make(chan *sessionguard.Guard, 1)
	var got error
	url := serve(t, a, func(_ http.ResponseWriter, r *http.Request) {
		inside <- sessionguard.FromContext(r.Context())
		got = cause(t, r.Context())
	})
	done := make(chan answered, 1)
	go func() { done <- ask(t.Context(), url, "s") }()
	old := <-inside
	_, g := register(t, b, "s")
	r := <-done
	require.NoError(t, r.err)
	supersededBy(t, got, old, g)
	assert.Equal(t, http.StatusConflict, r.status)
	assert.Equal(t, "superseded by a newer request\n", r.body)
	assert.ErrorIs(t, old.Check(t.Context()), sessionguard.ErrSuperseded)
}

func TestWhatTheHandlerAnswersIsTheAnswer(t *testing.T) {
	for name, c := range map[string]struct {
		h      http.HandlerFunc
		status int
		body   string
	}{
		"status": {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) }, 204, ""},
		"body":   {func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "mine") }, 200, "mine"},
		"both": {func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusTeapot)
			fmt.Fprint(w, "tea")
		}, 418, "tea"},
		"empty body": {func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(nil) }, 200, ""},
		"flush":      {func(w http.ResponseWriter, _ *http.Request) { w.(http.Flusher).Flush() }, 200, ""},
		"flush by controller": {func(w http.ResponseWriter, _ *http.Request) {
			assert.NoError(t, http.NewResponseController(w).Flush())
		}, 200, ""},
		"string": {func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "text") }, 200, "text"},
		"copy":   {func(w http.ResponseWriter, _ *http.Request) { _, _ = io.Copy(w, strings.NewReader("copied")) }, 200, "copied"},
	} {
		t.Run(name, func(t *testing.T) {
			r := superseded(t, c.h)
			require.NoError(t, r.err)
			assert.Equal(t, c.status, r.status)
			assert.Equal(t, c.body, r.body)
		})
	}
}

func TestSupersededRequestWithoutAnAnswer(t *testing.T) {
	for name, h := range map[string]http.HandlerFunc{
		"nothing": func(http.ResponseWriter, *http.Request) {},
		"only headers": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "1000")
			w.Header().Set("Content-Type", "image/png")
		},
		"early hints": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusEarlyHints) },
		"continue":    func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusContinue) },
		"processing":  func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusProcessing) },
	} {
		t.Run(name, func(t *testing.T) {
			r := superseded(t, h)
			require.NoError(t, r.err)
			assert.Equal(t, http.StatusConflict, r.status)
			assert.Equal(t, "superseded by a newer request\n", r.body)
			assert.Equal(t, "text/plain; charset=utf-8", r.header.Get("Content-Type"))
		})
	}
}

// What was committed is not answered with a conflict, though a newer request has come
// before the handler returned; what was refused is.
func TestSupersededRequestThatHasCommitted(t *testing.T) {
	s := redistest.Start(t)
	rdb := s.Client()
	m, node := newMonitor(t, rdb), newMonitor(t, s.Client())
	newer := func(r *http.Request) {
		register(t, node, cookie(r))
		assert.ErrorIs(t, cause(t, r.Context()), sessionguard.ErrSuperseded)
	}
	for name, c := range map[string]struct {
		h    func(g *sessionguard.Guard, r *http.Request)
		want int
	}{
		"committed": {func(g *sessionguard.Guard, r *http.Request) {
			assert.NoError(t, g.Commit(r.Context(), applied))
			newer(r)
		}, http.StatusOK},
		"run": {func(g *sessionguard.Guard, r *http.Request) {
			_, err := g.Eval(r.Context(), set, []string{g.Key("k")}, 1)
			assert.NoError(t, err)
			newer(r)
		}, http.StatusOK},
		"not applied": {func(g *sessionguard.Guard, r *http.Request) {
			err := g.Commit(r.Context(), func(context.Context, uint64) (bool, error) { return false, nil })
			assert.ErrorIs(t, err, sessionguard.ErrSuperseded)
		}, http.StatusConflict},
		"failed": {func(g *sessionguard.Guard, r *http.Request) {
			err := g.Commit(r.Context(), func(context.Context, uint64) (bool, error) { return false, errStoreDown })
			assert.ErrorIs(t, err, errStoreDown)
			newer(r)
		}, http.StatusConflict},
		"refused": {func(g *sessionguard.Guard, r *http.Request) {
			newer(r)
			assert.ErrorIs(t, g.Commit(t.Context(), never(t)), sessionguard.ErrSuperseded)
			_, err := g.Eval(t.Context(), set, []string{g.Key("k")}, 1)
			assert.ErrorIs(t, err, sessionguard.ErrSuperseded)
		}, http.StatusConflict},
		"only checked": {func(g *sessionguard.Guard, r *http.Request) {
			assert.NoError(t, g.Check(r.Context()))
			newer(r)
		}, http.StatusConflict},
	} {
		t.Run(name, func(t *testing.T) {
			r := ask(t.Context(), serve(t, m, func(_ http.ResponseWriter, r *http.Request) {
				c.h(sessionguard.FromContext(r.Context()), r)
			}), name)
			require.NoError(t, r.err)
			assert.Equal(t, c.want, r.status)
		})
	}
}

func TestInformationalResponsesArrive(t *testing.T) {
	m := on(t, new(sessionguard.MemoryStore))
	url := serve(t, m, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Link", "</style.css>")
		w.WriteHeader(http.StatusEarlyHints)
		w.WriteHeader(http.StatusAccepted)
	})
	var hints atomic.Int64
	ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{
		Got1xxResponse: func(code int, header textproto.MIMEHeader) error {
			assert.Equal(t, http.StatusEarlyHints, code)
			assert.Equal(t, "</style.css>", header.Get("Link"))
			hints.Add(1)
			return nil
		},
	})
	r := ask(ctx, url, "s")
	require.NoError(t, r.err)
	assert.Equal(t, http.StatusAccepted, r.status)
	assert.EqualValues(t, 1, hints.Load())
}

func TestConflictIsAnsweredAsConfigured(t *testing.T) {
	var asked *http.Request
	r := superseded(t, func(http.ResponseWriter, *http.Request) {},
		sessionguard.WithConflict(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			asked = r
			assert.NoError(t, r.Context().Err(), "it can still do something")
			w.WriteHeader(http.StatusMultiStatus)
		})))
	require.NoError(t, r.err)
	assert.Equal(t, http.StatusMultiStatus, r.status)
	assert.Nil(t, sessionguard.FromContext(asked.Context()))
	assert.Equal(t, "s", cookie(asked))
}

func TestRequestThatIsNotSupersededIsLeftAlone(t *testing.T) {
	m := on(t, new(sessionguard.MemoryStore))
	r := ask(t.Context(), serve(t, m, func(_ http.ResponseWriter, r *http.Request) {
		assert.NotZero(t, sessionguard.FromContext(r.Context()).Epoch())
	}), "s")
	require.NoError(t, r.err)
	assert.Equal(t, http.StatusOK, r.status)
	assert.Empty(t, r.body)
}

func TestRequestWithoutASessionIsNotGuarded(t *testing.T) {
	s := &spy{Store: new(sessionguard.MemoryStore)}
	m := on(t, s)
	var w http.ResponseWriter
	handler := http.HandlerFunc(func(got http.ResponseWriter, r *http.Request) {
		w = got
		assert.Nil(t, sessionguard.FromContext(r.Context()))
	})
	rec := httptest.NewRecorder()
	req := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil)
	m.Middleware(cookie)(handler).ServeHTTP(rec, req)
	assert.Same(t, rec, w, "nor is its response looked at")
	assert.Equal(t, http.StatusOK, rec.Code)
	m.Middleware(nil)(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		assert.Fail(t, "handled, and not guarded")
	})).ServeHTTP(rec, req)
	assert.Equal(t, http.StatusBadRequest, rec.Code)
	assert.Zero(t, s.count(""))
}

func TestSessionThatIsNoneIsABadRequest(t *testing.T) {
	rdb, _ := unused(t)
	m := newMonitor(t, rdb)
	url := serve(t, m, func(http.ResponseWriter, *http.Request) { assert.Fail(t, "handled") })
	for _, session := range []string{strings.Repeat("x", 1025)} {
		r := ask(t.Context(), url, session)
		require.NoError(t, r.err)
		assert.Equal(t, http.StatusBadRequest, r.status)
		assert.NotContains(t, r.body, "x1")
	}
	rec := httptest.NewRecorder()
	m.Middleware(func(*http.Request) string { return " " })(http.NotFoundHandler()).
		ServeHTTP(rec, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil))
	assert.Equal(t, http.StatusBadRequest, rec.Code)
	assert.Equal(t, "invalid session\n", rec.Body.String())
}

func TestRequestThatCannotBeGuardedIsNotHandled(t *testing.T) {
	down := on(t, &spy{Store: new(sessionguard.MemoryStore), before: func(context.Context, string) error { return errStoreDown }})
	closed := on(t, new(sessionguard.MemoryStore))
	require.NoError(t, closed.Close(t.Context()))
	for name, m := range map[string]*sessionguard.Monitor{"store down": down, "closed": closed} {
		t.Run(name, func(t *testing.T) {
			r := ask(t.Context(), serve(t, m, func(http.ResponseWriter, *http.Request) { assert.Fail(t, "handled") }), "s")
			require.NoError(t, r.err)
			assert.Equal(t, http.StatusServiceUnavailable, r.status)
			assert.Equal(t, "1", r.header.Get("Retry-After"))
			assert.Equal(t, "the session cannot be guarded\n", r.body)
		})
	}
}

func TestRequestWhoseRegistrationWasLost(t *testing.T) {
	s := redistest.Start(t)
	rdb := s.Client()
	m := newMonitor(t, rdb)
	r := ask(t.Context(), serve(t, m, func(_ http.ResponseWriter, r *http.Request) {
		assert.NoError(t, rdb.FlushAll(r.Context()).Err())
		err := sessionguard.FromContext(r.Context()).Commit(r.Context(), never(t))
		assert.ErrorIs(t, err, sessionguard.ErrLost)
	}), "s")
	require.NoError(t, r.err)
	assert.Equal(t, http.StatusServiceUnavailable, r.status)
	assert.Equal(t, "1", r.header.Get("Retry-After"))
}

func TestPanicPassesThroughAndTheGuardEnds(t *testing.T) {
	s := &spy{Store: new(sessionguard.MemoryStore)}
	m := on(t, s)
	for _, value := range []any{"boom", http.ErrAbortHandler, errors.New("an error")} {
		var ctx context.Context
		h := m.Middleware(cookie)(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			ctx = r.Context()
			panic(value)
		}))
		req := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil)
		req.Header.Set("X-Session", "s")
		rec := httptest.NewRecorder()
		assert.PanicsWithValue(t, value, func() { h.ServeHTTP(rec, req) })
		assert.Equal(t, context.Canceled, context.Cause(ctx))
		assert.ErrorIs(t, sessionguard.FromContext(ctx).Check(t.Context()), sessionguard.ErrInvalid)
		assert.Empty(t, rec.Body.String())
	}
	quiet(t)
}

func TestGuardEndsWithItsRequest(t *testing.T) {
	m := on(t, new(sessionguard.MemoryStore))
	var ctx context.Context
	url := serve(t, m, func(_ http.ResponseWriter, r *http.Request) { ctx = r.Context() })
	for range 5 {
		require.NoError(t, ask(t.Context(), url, "s").err)
		require.ErrorIs(t, cause(t, ctx), context.Canceled)
		assert.ErrorIs(t, sessionguard.FromContext(ctx).Check(t.Context()), sessionguard.ErrInvalid)
	}
	quiet(t)
}

func TestClientThatHasGoneIsAnsweredNothing(t *testing.T) {
	conflicts := 0
	m := on(t, new(sessionguard.MemoryStore), sessionguard.WithConflict(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { conflicts++ })))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	h := m.Middleware(cookie)(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		cancel()
		assert.ErrorIs(t, cause(t, r.Context()), context.Canceled)
	}))
	req := httptest.NewRequestWithContext(ctx, http.MethodGet, "/", nil)
	req.Header.Set("X-Session", "s")
	for range 2 { // the second is gone before it is registered
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, req)
		assert.Empty(t, rec.Body.String())
		assert.Empty(t, rec.Header())
	}
	assert.Zero(t, conflicts)
}

func TestStreamedResponseArrivesAsItIsWritten(t *testing.T) {
	m := on(t, new(sessionguard.MemoryStore))
	more := make(chan struct{})
	url := serve(t, m, func(w http.ResponseWriter, r *http.Request) {
		rc := http.NewResponseController(w)
		assert.NoError(t, rc.SetWriteDeadline(time.Now().Add(time.Minute)))
		assert.NoError(t, rc.SetReadDeadline(time.Now().Add(time.Minute)))
		assert.NoError(t, rc.EnableFullDuplex())
		for _, flush := range []func(){func() { assert.NoError(t, rc.Flush()) }, w.(http.Flusher).Flush} {
			fmt.Fprintln(w, "line")
			flush()
			<-more
		}
	})
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, nil)
	require.NoError(t, err)
	req.Header.Set("X-Session", "s")
	resp, err := http.DefaultClient.Do(req)
	require.NoError(t, err)
	defer resp.Body.Close()
	lines := bufio.NewReader(resp.Body)
	for range 2 {
		line, err := lines.ReadString('\n')
		require.NoError(t, err)
		assert.Equal(t, "line\n", line)
		more <- struct{}{}
	}
	_, err = lines.ReadString('\n')
	assert.ErrorIs(t, err, io.EOF)
}

func TestHijackedConnectionIsTheHandlers(t *testing.T) {
	for name, hijack := range map[string]func(w http.ResponseWriter) (io.ReadWriteCloser, error){
		"interface": func(w http.ResponseWriter) (io.ReadWriteCloser, error) {
			c, _, err := w.(http.Hijacker).Hijack()
			return c, err
		},
		"controller": func(w http.ResponseWriter) (io.ReadWriteCloser, error) {
			c, _, err := http.NewResponseController(w).Hijack()
			return c, err
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := superseded(t, func(w http.ResponseWriter, _ *http.Request) {
				c, err := hijack(w)
				if assert.NoError(t, err) {
					fmt.Fprint(c, "HTTP/1.1 299 Mine\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
					assert.NoError(t, c.Close())
				}
			}, sessionguard.WithConflict(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
				assert.Fail(t, "answered, though the connection is another's")
			})))
			require.NoError(t, r.err)
			assert.Equal(t, 299, r.status)
		})
	}
}

func TestSwitchingProtocolsIsAnAnswer(t *testing.T) {
	m := on(t, new(sessionguard.MemoryStore))
	rec := httptest.NewRecorder()
	req := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil)
	req.Header.Set("X-Session", "s")
	m.Middleware(cookie)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		register(t, m, "s")
		assert.ErrorIs(t, context.Cause(r.Context()), sessionguard.ErrSuperseded)
		w.WriteHeader(http.StatusSwitchingProtocols)
	})).ServeHTTP(rec, req)
	assert.Equal(t, http.StatusSwitchingProtocols, rec.Code)
	assert.Empty(t, rec.Body.String())
}

// bare is a ResponseWriter that can do nothing else.
type bare struct{ http.ResponseWriter }

// What the writer beneath cannot do is said to be so, and is no answer.
func TestHijackThatFailsIsNoAnswer(t *testing.T) {
	m := on(t, new(sessionguard.MemoryStore))
	h := m.Middleware(cookie)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _, err := http.NewResponseController(w).Hijack()
		assert.ErrorIs(t, err, http.ErrNotSupported)
		_, _, err = w.(http.Hijacker).Hijack()
		assert.ErrorIs(t, err, http.ErrNotSupported)
		register(t, m, "s")
		assert.ErrorIs(t, context.Cause(r.Context()), sessionguard.ErrSuperseded)
	}))
	req := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil)
	req.Header.Set("X-Session", "s")
	rec := httptest.NewRecorder()
	h.ServeHTTP(bare{rec}, req)
	assert.Equal(t, http.StatusConflict, rec.Code)
}

func TestMiddlewareTwiceIsOneRequest(t *testing.T) {
	s := &spy{Store: new(sessionguard.MemoryStore)}
	m := on(t, s)
	newer := on(t, s.Store)
	var epochs []uint64
	note := func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			epochs = append(epochs, sessionguard.FromContext(r.Context()).Epoch())
			next.ServeHTTP(w, r)
			assert.NoError(t, sessionguard.FromContext(r.Context()).Check(t.Context()), "the inner end has ended nothing")
		})
	}
	guard := m.Middleware(cookie)
	server := httptest.NewServer(guard(note(guard(note(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(201) }))))))
	defer server.Close()
	r := ask(t.Context(), server.URL, "s")
	require.NoError(t, r.err)
	assert.Equal(t, http.StatusCreated, r.status)
	assert.Equal(t, 1, s.count("register"))
	require.Len(t, epochs, 2)
	assert.Equal(t, epochs[0], epochs[1])

	// Superseded, it is answered once.
	conflicts := httptest.NewServer(guard(guard(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		register(t, newer, "s")
		assert.Error(t, cause(t, r.Context()))
	}))))
	defer conflicts.Close()
	r = ask(t.Context(), conflicts.URL, "s")
	require.NoError(t, r.err)
	assert.Equal(t, http.StatusConflict, r.status)
	assert.Equal(t, "superseded by a newer request\n", r.body)

	// Superseded between the two, it never reaches the inner handler.
	between := httptest.NewServer(guard(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		register(t, newer, "s")
		assert.Error(t, cause(t, r.Context()))
		guard(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { assert.Fail(t, "handled") })).ServeHTTP(w, r)
	})))
	defer between.Close()
	r = ask(t.Context(), between.URL, "s")
	require.NoError(t, r.err)
	assert.Equal(t, http.StatusConflict, r.status)
}

func TestMiddlewareOverHTTP2(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		m := newMonitor(t, rdb)
		server := httptest.NewUnstartedServer(m.Middleware(cookie)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			assert.Equal(t, 2, r.ProtoMajor)
			if cookie(r) == "flushed" {
				assert.NoError(t, http.NewResponseController(w).Flush())
				return
			}
			register(t, m, cookie(r))
			assert.ErrorIs(t, context.Cause(r.Context()), sessionguard.ErrSuperseded)
		})))
		server.EnableHTTP2 = true
		server.StartTLS()
		defer server.Close()
		for session, want := range map[string]int{"flushed": 200, "s": 409} {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, server.URL, nil)
			require.NoError(t, err)
			req.Header.Set("X-Session", session)
			resp, err := server.Client().Do(req)
			require.NoError(t, err)
			_, err = io.Copy(io.Discard, resp.Body) // to its end, or the handler may find the stream closed
			assert.NoError(t, err)
			assert.NoError(t, resp.Body.Close())
			assert.Equal(t, want, resp.StatusCode)
		}
	})
}
