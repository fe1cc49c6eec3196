package sessionlock_test

import (
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock"
	"github.com/sessionlock/sessionlock/sessionlocktest"
)

// The line that gives an http.Client sessions, against the fake upstream.
func TestTransportRepairsARequestOnce(t *testing.T) {
	u := sessionlocktest.NewUpstream(t)
	c, err := sessionlock.New(u.URL, u, sessionlock.WithCache(new(sessionlock.MemoryCache)))
	require.NoError(t, err)
	hc := &http.Client{Transport: c.Transport(nil, nil)}
	ctx := sessionlock.KeyContext(t.Context(), "bob")
	get := func() (int, string) {
		t.Helper()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.URL+"/whoami", http.NoBody)
		require.NoError(t, err)
		resp, err := hc.Do(req)
		require.NoError(t, err)
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		assert.Same(t, req, resp.Request)
		assert.Empty(t, req.Header)
		return resp.StatusCode, strings.TrimSpace(string(body))
	}
	for range 2 {
		status, body := get()
		assert.Equal(t, http.StatusOK, status)
		assert.JSONEq(t, `{"user":"bob"}`, body)
		u.Revoke("bob")
	}
	total, _ := u.Logins("bob")
	assert.Equal(t, 2, total)
}
