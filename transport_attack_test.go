package sessionlock_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock"
)

// URL.Opaque takes the place of the request target; of an absolute one a server
// takes the host, whatever the Host header says (RFC 9112, 3.2.2).
func TestWireOpaqueURLMovesNoToken(t *testing.T) {
	for _, w := range http1 {
		for _, opaque := range []string{"//evil.test/b", "http://evil.test/b"} {
			tn := newTown(t, w, townName)
			_, hc := tn.client(t, "bearer")
			r := wireRequest(t, http.MethodGet, tn.url("{S}://{N}/b"), nil)
			r.URL.Opaque = opaque
			require.NoError(t, readAll(hc.Do, r))
			with, without, _ := tn.carrying(t, "bearer")
			assert.Equal(t, []int{0, 1}, []int{with, without}, opaque)
		}
	}
}

// F1, from outside: SetURL keeps Opaque, and a server parses "x:http://evil.test/b" as one.
func TestWireProxyCallersCannotMoveTheTokenByTheirRequestLine(t *testing.T) {
	for _, w := range http1 {
		tn := newTown(t, w, townName)
		home, err := url.Parse(tn.url("{S}://{N}"))
		require.NoError(t, err)
		front := wireProxy(t, tn, &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(home) }})
		conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", front.Listener.Addr().String())
		require.NoError(t, err)
		defer conn.Close()
		_, err = io.WriteString(conn, "GET x:http://evil.test/b HTTP/1.1\r\nHost: proxy.test\r\n\r\n")
		require.NoError(t, err)
		answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
		require.NoError(t, err)
		require.NoError(t, answer.Body.Close())
		for _, r := range tn.home.requests() {
			if r.Host != townName {
				assertNoSecret(t, r)
			}
		}
	}
}

// early answers before the body has come, as servers do that refuse by the header.
func early(w http.ResponseWriter, _ *http.Request) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	defer conn.Close()
	_, _ = io.WriteString(conn, "HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n")
	time.Sleep(100 * time.Millisecond)
}

// slow is a body that fills in its trailer while it is read.
type slow struct {
	trailer http.Header
	n       int
}

func (b *slow) Read(p []byte) (int, error) {
	if b.n++; b.n > 50 {
		return 0, io.EOF
	}
	time.Sleep(time.Millisecond)
	b.trailer.Set("X-Sum", fmt.Sprint(b.n))
	return copy(p, "x"), nil
}

func (b *slow) Close() error { return nil }

// F2 (under -race; without it the runtime may end the process: concurrent map
// iteration and map write). One trailer map is filled in by the first body, which
// base is still sending, while Clone reads it for the second try.
func TestWireEarlyRefusalLeavesTrailersAlone(t *testing.T) {
	site := wires[0].serve(t, ok)
	site.refusal = early
	site.revoke("bob/1")
	r := wireRequest(t, http.MethodPost, site.URL, nil)
	r.Trailer = http.Header{"X-Sum": nil}
	r.Body, r.ContentLength = &slow{trailer: r.Trailer}, -1
	r.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader("again")), nil }
	assert.NoError(t, readAll(site.over(t, sessionlock.TransportOptions{}).RoundTrip, r))
}

// A deadline is a timeout for net/http's callers: url.Error.Timeout asks the
// error itself, not its chain.
func TestWireDeadlinesAreTimeouts(t *testing.T) {
	for where, build := range stalls {
		t.Run(where, func(t *testing.T) {
			site, o, in := build(t, wires[0], make(chan struct{}, 4))
			r := wireRequest(t, http.MethodPost, site.URL, nil)
			if in != nil {
				r.Body, r.ContentLength = io.NopCloser(in), 10
			}
			ctx, cancel := context.WithTimeout(r.Context(), 100*time.Millisecond)
			defer cancel()
			err := readAll((&http.Client{Transport: site.over(t, o)}).Do, r.WithContext(ctx))
			var timeout net.Error
			require.ErrorAs(t, err, &timeout)
			assert.True(t, timeout.Timeout(), err)
		})
	}
}

// After Close nothing can be read, as of any answer of net/http.
func TestWireClosedAnswerCannotBeRead(t *testing.T) {
	everyWay(t, wires, func(t *testing.T, y way) {
		site := y.site(t, func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no", http.StatusInternalServerError) })
		answer, err := site.over(t, y.options()).RoundTrip(wireRequest(t, http.MethodGet, site.URL, nil))
		require.NoError(t, err)
		require.NoError(t, answer.Body.Close())
		_, err = answer.Body.Read(make([]byte, 1))
		assert.Error(t, err)
	})
}

// F5, http2 only: END_STREAM may come later than the last byte.
// A head that is as long as the answer says is whole, whether or not that has ended.
func TestWireShortAnswersAreNotWaitedFor(t *testing.T) {
	everyWay(t, wires, func(t *testing.T, y way) {
		site := y.site(t, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "4")
			w.WriteHeader(http.StatusInternalServerError)
			_, _ = io.WriteString(w, "body")
			_ = http.NewResponseController(w).Flush()
			<-t.Context().Done()
		})
		r := wireRequest(t, http.MethodGet, site.URL, nil)
		ctx, cancel := context.WithTimeout(r.Context(), promptly)
		defer cancel()
		answer, err := site.over(t, y.options()).RoundTrip(r.WithContext(ctx))
		require.NoError(t, err)
		require.NoError(t, ctx.Err())
		got := make([]byte, 4)
		_, err = io.ReadFull(answer.Body, got)
		require.NoError(t, err)
		assert.Equal(t, "body", string(got))
		assert.NoError(t, answer.Body.Close())
	})
}
