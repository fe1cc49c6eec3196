package main

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/sessionrelay"
)

// This line has no WebSocket: to write is to panic.
func TestNoMessageComesBeforeWelcome(t *testing.T) {
	l := &line{ready: make(chan struct{})}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	require.ErrorIs(t, l.send(ctx, sessionrelay.Message{ID: "a"}), context.DeadlineExceeded)
}
