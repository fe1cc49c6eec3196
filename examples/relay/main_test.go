package main

import (
	"bufio"
	"bytes"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// mainEnv makes a process of the test binary the example.
const mainEnv = "SESSIONLOCK_RELAY_MAIN"

func TestMain(m *testing.M) {
	child := len(os.Args) == 2 && (os.Args[1] == nodeArg || os.Args[1] == redisArg) // of startChild
	if child || os.Getenv(mainEnv) != "" {
		main()
	}
	// A process with the race detector takes a second to exit, unless it is told.
	_ = os.Setenv("GORACE", "atexit_sleep_ms=0 "+os.Getenv("GORACE"))
	os.Exit(m.Run())
}

// mustHaveRedis skips the test without a redis-server, or fails it when
// SESSIONLOCK_REQUIRE_REDIS=1.
func mustHaveRedis(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath(redisServer); err != nil {
		if os.Getenv("SESSIONLOCK_REQUIRE_REDIS") != "1" {
			t.Skipf("%v; THIS TEST DID NOT RUN", errNoRedis)
		}
		require.NoError(t, errNoRedis)
	}
}

func TestNothingIsLostOrTwiceBetweenTwoNodes(t *testing.T) {
	mustHaveRedis(t)
	var lines bytes.Buffer
	require.NoError(t, run(t.Context(), io.MultiWriter(&lines, t.Output()), false))
	assert.Equal(t, len((&stage{}).acts()), strings.Count(lines.String(), "  ok"))
	assert.NotContains(t, lines.String(), "WRONG")
}

// The example would show nothing if it could not fail.
func TestEveryWrongNumberIsTold(t *testing.T) {
	sent := []string{"a", "b", "c", "d"}
	for _, tc := range []struct {
		name string
		done string
		want tally
	}{
		{"all", "a b c d", tally{Sent: 4, Done: 4}},
		{"the first is lost", "b c d", tally{Sent: 4, Done: 3, Lost: 1}},
		{"the last is lost", "a b c", tally{Sent: 4, Done: 3, Lost: 1}},
		{"one twice", "a b b c d", tally{Sent: 4, Done: 4, Twice: 1}},
		{"one much later again", "a b c d a", tally{Sent: 4, Done: 4, Twice: 1}},
		{"one twice and one lost", "a b b d", tally{Sent: 4, Done: 3, Twice: 1, Lost: 1}},
		{"two in the wrong order", "a c b d", tally{Sent: 4, Done: 4, Misplaced: 1}},
		{"one that was not sent", "a b x c d", tally{Sent: 4, Done: 4, Strange: 1}},
		{"nothing", "", tally{Sent: 4, Lost: 4}},
	} {
		assert.Equal(t, tc.want, compare(sent, strings.Fields(tc.done)), tc.name)
	}

	right := tally{Sent: 4, Done: 4, Again: 2, Homeless: []absence{{"ada", time.Millisecond}}}
	a := want{sent: 4, again: 2, homeless: 1}
	require.NoError(t, a.judge(right))
	for want, wrong := range map[string]func(*tally){
		"3 sent, want 4":             func(t *tally) { t.Sent = 3 },
		"1 lost":                     func(t *tally) { t.Lost = 1 },
		"1 done twice":               func(t *tally) { t.Twice = 1 },
		"1 not in their order":       func(t *tally) { t.Misplaced = 1 },
		"1 that nobody has sent":     func(t *tally) { t.Strange = 1 },
		"1 came again, want 2":       func(t *tally) { t.Again = 1 },
		"0 connections lost, want 1": func(t *tally) { t.Homeless = nil },
	} {
		o := right
		wrong(&o)
		err := a.judge(o)
		require.Error(t, err, want)
		assert.Contains(t, err.Error(), want)
		assert.NotContains(t, err.Error(), "\n", "one thing is wrong")
	}
}

// example is the program as a user starts it, with a folder for its temporary files.
// It counts as ended when its children have, too, for they share its standard error.
type example struct {
	*exec.Cmd
	lines *bufio.Scanner
	told  bytes.Buffer
	temp  string
	ended chan struct{} // closed when told and ProcessState may be read
}

func startExample(t *testing.T, args ...string) *example {
	t.Helper()
	mustHaveRedis(t)
	e := &example{Cmd: exec.CommandContext(t.Context(), os.Args[0], args...), temp: t.TempDir(), ended: make(chan struct{})}
	e.Env = append(os.Environ(), mainEnv+"=1", "TMPDIR="+e.temp)
	e.Stderr = &e.told
	out, lines := io.Pipe()
	e.Stdout, e.lines = lines, bufio.NewScanner(out)
	require.NoError(t, e.Start())
	go func() {
		defer close(e.ended)
		_ = e.Wait()
		_ = lines.Close()
	}()
	return e
}

func TestWrongNumbersMakeTheExitStatusOne(t *testing.T) {
	e := startExample(t, "-forgetful")
	var lines []string
	for e.lines.Scan() {
		lines = append(lines, e.lines.Text())
	}
	in(t, e.ended, "the end of the example")
	assert.Equal(t, 1, e.ProcessState.ExitCode())
	require.Greater(t, len(lines), 2)
	assert.Regexp(t, `^1\. .* 1000 +1000 +[1-9]\d* +0 .* WRONG$`, lines[2])
	assert.Regexp(t, `1\. a client is cut off amid messages to it:\n  [1-9]\d* done twice`, e.told.String())
}

// Ctrl-C, a supervisor's SIGTERM, and the end that nothing can be done about.
func TestNoProcessOutlivesTheExample(t *testing.T) {
	for name, signal := range map[string]os.Signal{"interrupted": os.Interrupt, "terminated": syscall.SIGTERM, "killed": os.Kill} {
		t.Run(name, func(t *testing.T) {
			e := startExample(t)
			for e.lines.Scan() && !strings.HasPrefix(e.lines.Text(), "1. ") {
			}
			go func() {
				for e.lines.Scan() {
				}
			}()
			require.NoError(t, e.Process.Signal(signal))
			in(t, e.ended, "the end of the example and its children")
			if signal == os.Kill {
				return
			}
			assert.Equal(t, 1, e.ProcessState.ExitCode())
			assert.Regexp(t, `(?s)^relay: \d\. .*(signal received|context canceled)`, e.told.String())
			left, err := os.ReadDir(e.temp)
			require.NoError(t, err)
			assert.Empty(t, left)
		})
	}
}
