package main

import (
	"os"
	"os/exec"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// The acts rely on it: a process that lives is seen, one that nobody has waited for
// is no live one, and one that came and went has left a trace.
func TestTheKernelTellsOfEveryChild(t *testing.T) {
	before, known, err := children()
	require.NoError(t, err)
	require.True(t, known)
	require.Empty(t, before.live)

	child := exec.CommandContext(t.Context(), os.Args[0], workerArg) // it waits for its place
	in, err := child.StdinPipe()
	require.NoError(t, err)
	defer in.Close()
	require.NoError(t, child.Start())
	pid := strconv.Itoa(child.Process.Pid)
	p, _, err := children()
	require.NoError(t, err)
	assert.Equal(t, []string{pid}, p.live)
	assert.Equal(t, before.reaped, p.reaped)

	require.NoError(t, kill(pid))
	require.Eventually(t, func() bool {
		p, _, err = children()
		return err == nil && len(p.live) == 0 && p.zombies == 1
	}, 10*time.Second, 10*time.Millisecond)
	require.Error(t, child.Wait())
	p, _, err = children()
	require.NoError(t, err)
	assert.Zero(t, p.zombies)
	assert.NotEqual(t, before.reaped, p.reaped)
}
