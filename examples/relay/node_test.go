package main

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/sessionrelay"
)

// These lines have no WebSocket: to write is to panic.

func TestMessageIsNotSentAgainAfterItsForget(t *testing.T) {
	l := &line{ready: make(chan struct{})}
	close(l.ready)
	l.acked.add(time.Now(), []string{"a"})
	require.NoError(t, l.send(t.Context(), sessionrelay.Message{ID: "a"}))
	assert.Panics(t, func() { _ = l.send(t.Context(), sessionrelay.Message{ID: "b"}) })
}

func TestNoMessageComesBeforeWelcome(t *testing.T) {
	l := &line{ready: make(chan struct{})}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	require.ErrorIs(t, l.send(ctx, sessionrelay.Message{ID: "a"}), context.DeadlineExceeded)
}

func TestWhatWasAcknowledgedIsNotKeptForEver(t *testing.T) {
	var r recent
	at := time.Now()
	r.add(at, []string{"a"})
	r.add(at.Add(recentFor), []string{"b"})
	assert.True(t, r.has("a"))
	r.add(at.Add(recentFor+1), []string{"c"})
	assert.True(t, r.has("a"))
	assert.True(t, r.has("b"), "it was acknowledged a moment ago")
	r.add(at.Add(2*recentFor+2), []string{"d"})
	assert.False(t, r.has("a"))
	assert.True(t, r.has("c"))
	assert.Len(t, r.before, 1)
}
