package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const header = "# A 2\n# package m\n# system, case, test, reason\n"

// events joins go test -json events, each written as "action test [output]" in
// package m; a test of "-" is the package itself.
func events(lines ...string) string {
	var b strings.Builder
	for _, l := range lines {
		f := strings.SplitN(l, " ", 3)
		b.WriteString(`{"Action":"` + f[0] + `","Package":"m"`)
		if f[1] != "-" {
			b.WriteString(`,"Test":"` + f[1] + `"`)
		}
		if len(f) == 3 {
			b.WriteString(`,"Output":"` + f[2] + `\n"`)
		}
		b.WriteString("}\n")
	}
	return b.String()
}

func check(t *testing.T, table, stream string) (string, error) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "cases.tsv")
	require.NoError(t, os.WriteFile(file, []byte(table), 0o600))
	var out bytes.Buffer
	err := run([]string{"-cases", file}, strings.NewReader(stream), &out)
	return out.String(), err
}

func TestTableIsMetByTestsThatPassed(t *testing.T) {
	out, err := check(t, header+"A\t1\tTestX m.TestY/sub\nA\t2\t\tno such thing here\n",
		events("run TestX", "pass TestX", "run TestY", "run TestY/sub", "pass TestY/sub", "pass TestY",
			"run TestXY", "skip TestXY", "pass -"))
	require.NoError(t, err)
	assert.Equal(t, "A: 1 of 2 cases shown by tests that passed, 1 do not apply\n", out)
}

func TestTableIsNotMet(t *testing.T) {
	const rest = "A\t2\t\treason\n"
	passed := events("run TestX", "pass TestX")
	for name, c := range map[string]struct{ table, stream, want string }{
		"test did not run":      {header + "A\t1\tTestX\n" + rest, events("run TestXY", "pass TestXY"), "line 4: A 1: did not run: m.TestX"},
		"other package":         {header + "A\t1\tn.TestX\n" + rest, passed, "did not run: n.TestX"},
		"one of two did not":    {header + "A\t1\tTestX TestY\n" + rest, passed, "did not run: m.TestY"},
		"test failed":           {header + "A\t1\tTestX\n" + rest, events("run TestX", "fail TestX"), "failed: m.TestX"},
		"test failed once":      {header + "A\t1\tTestX\n" + rest, events("fail TestX", "pass TestX"), "failed: m.TestX"},
		"test never ended":      {header + "A\t1\tTestX\n" + rest, events("run TestX"), "failed: m.TestX"},
		"test was skipped":      {header + "A\t1\tTestX\n" + rest, events("run TestX", "skip TestX"), "skipped, or something in it: m.TestX"},
		"subtest was skipped":   {header + "A\t1\tTestX\n" + rest, events("run TestX", "run TestX/a", "skip TestX/a", "pass TestX"), "skipped, or something in it: m.TestX"},
		"number missing":        {header + rest, passed, "A 1: missing"},
		"number twice":          {header + "A\t1\tTestX\n" + rest + rest, passed, "line 6: A 2: listed twice"},
		"number out of range":   {header + "A\t1\tTestX\nA\t3\tTestX\n" + rest, passed, "A 3: not in 1..2"},
		"number out of range 0": {header + "A\t1\tTestX\nA\t0\tTestX\n" + rest, passed, "A 0: not in 1..2"},
		"number is none":        {header + "A\tone\tTestX\n" + rest, passed, "line 4: number of the case"},
		"undeclared system":     {header + "A\t1\tTestX\nB\t1\tTestX\n" + rest, passed, "B 1: system not declared"},
		"nothing declared":      {"A\t1\tTestX\n", passed, "no comment declares a system"},
		"neither test nor why":  {header + "A\t1\t\t\n" + rest, passed, "A 1: wants tests or a reason"},
		"test and reason":       {header + "A\t1\tTestX\twhy\n" + rest, passed, "A 1: wants tests or a reason"},
		"spaces for tabs":       {header + "A 1 TestX\n" + rest, passed, "1 columns, want 3 or 4"},
		"not go test -json":     {header + "A\t1\tTestX\n" + rest, "ok\n", "read go test -json"},
		"stream was cut":        {header + "A\t1\tTestX\n" + rest, passed[:len(passed)-4], "read go test -json"},
		"no stream, all reason": {header + "A\t1\tTestX\n" + rest, "", "did not run: m.TestX"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := check(t, c.table, c.stream)
			require.ErrorContains(t, err, c.want)
		})
	}
	t.Run("no table", func(t *testing.T) {
		err := run([]string{"-cases", filepath.Join(t.TempDir(), "none")}, strings.NewReader(""), &bytes.Buffer{})
		require.ErrorIs(t, err, os.ErrNotExist)
	})
}

func summary(t *testing.T, stream string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	err := run(nil, strings.NewReader(stream), &out)
	return out.String(), err
}

func TestSummaryOfSuccessIsClosingLinesAndCounts(t *testing.T) {
	out, err := summary(t, events("output - -test.shuffle 7", "run TestX", "output TestX chatter", "pass TestX",
		"run TestY", "output TestY no redis-server", "skip TestY", "output - PASS", `output - ok  \tm\t1.2s`, "pass -"))
	require.NoError(t, err)
	assert.Equal(t, "skip: m.TestY\nno redis-server\nok  \tm\t1.2s\n1 passed, 0 failed, 1 skipped\n", out)
}

func TestSummaryOfFailure(t *testing.T) {
	for name, c := range map[string]struct{ stream, want string }{
		"says what a failed test said": {
			events("run TestX", "output TestX wrong", "fail TestX", `output - FAIL\tm\t1.2s`, "fail -"),
			"fail: m.TestX\nwrong\nFAIL\tm\t1.2s\n0 passed, 1 failed, 0 skipped\n",
		},
		"counts a package that failed without a failed test": {
			`{"Action":"build-output","ImportPath":"m","Output":"syntax error\n"}` + "\n" +
				events(`output - FAIL\tm [build failed]`, "fail -", "run TestX", "pass TestX"),
			"syntax error\nFAIL\tm [build failed]\n1 passed, 1 failed, 0 skipped\n",
		},
		"counts a test that a dying package left behind once": {
			events("run TestX", "output - signal: killed", "fail -"),
			"signal: killed\ndid not end: m.TestX\n0 passed, 1 failed, 0 skipped\n",
		},
		"is also no test at all": {"", "0 passed, 0 failed, 0 skipped\n"},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := summary(t, c.stream)
			require.Error(t, err)
			assert.Equal(t, c.want, out)
		})
	}
}
