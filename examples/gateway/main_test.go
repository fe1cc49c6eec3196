package main

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// mainEnv makes a process of the test binary the example.
const mainEnv = "SESSIONLOCK_GATEWAY_MAIN"

func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == workerArg || os.Getenv(mainEnv) != "" { // started by startWorker, or below
		main()
	}
	// A process with the race detector takes a second to exit, unless it is told.
	_ = os.Setenv("GORACE", "atexit_sleep_ms=0 "+os.Getenv("GORACE"))
	os.Exit(m.Run())
}

func TestEverySessionHasOneProcess(t *testing.T) {
	var lines bytes.Buffer
	require.NoError(t, run(t.Context(), io.MultiWriter(&lines, t.Output()), false))
	assert.NotContains(t, lines.String(), "WRONG")
	assert.Contains(t, lines.String(), "5. ")
	p, _, err := children()
	require.NoError(t, err)
	assert.Empty(t, p.live)
	assert.Zero(t, p.zombies)
}

// Workers that share nothing log in once each: the ledger tells, and the exit status.
func TestAWrongNumberIsTold(t *testing.T) {
	example := exec.CommandContext(t.Context(), os.Args[0], "-apart")
	example.Env = append(os.Environ(), mainEnv+"=1")
	var lines, told strings.Builder
	example.Stdout, example.Stderr = &lines, &told
	var failed *exec.ExitError
	require.ErrorAs(t, example.Run(), &failed)
	assert.Equal(t, 1, failed.ExitCode())
	assert.Regexp(t, `logins since the start.* 4 +8  WRONG`, lines.String())
	assert.Contains(t, told.String(), "ada has logged in 2 times")
	assert.NotContains(t, lines.String(), "2. ", "it has gone on")
}

// What is asked of everything is told apart by stage.show alone.
func TestWhatDiffersIsWrong(t *testing.T) {
	var out strings.Builder
	s := &stage{out: &out}
	s.expect("same", "nobody", 1, 1)
	s.within("soon", 2, 1)
	require.Empty(t, s.wrong)
	s.expect("other", "nobody", 1, 2)
	s.within("late", 1, 1)
	require.Len(t, s.wrong, 2)
	assert.EqualError(t, s.wrong[0], "  other: 2, want 1")
	assert.Equal(t, 2, strings.Count(out.String(), "WRONG"))
}
