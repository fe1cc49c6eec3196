package main

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == workerArg { // started by startFleet
		main()
	}
	os.Exit(m.Run())
}

func TestFleetSharesEtcdTokensForAMinute(t *testing.T) {
	const demand = "SESSIONLOCK_REQUIRE_REDIS"
	if _, err := exec.LookPath("etcd"); err != nil {
		const hint = "install etcd (Debian: apt-get install etcd-server)"
		if os.Getenv(demand) == "1" {
			t.Fatalf("%v: %s; %s=1 forbids skipping", err, hint, demand)
		}
		t.Skipf("%v: %s; THIS TEST DID NOT RUN", err, hint)
	}
	minute := time.Minute
	if testing.Short() {
		minute = 10 * time.Second
	}
	var lines bytes.Buffer
	err := run(t.Context(), settings{minute: minute}, io.MultiWriter(&lines, t.Output()))
	require.NoError(t, err)
	acts := (&stage{}).acts()
	assert.Len(t, acts, 8)
	assert.Equal(t, len(acts), strings.Count(lines.String(), ": ok\n"))
}

// The example would show nothing if it could not fail.
func TestEveryWrongNumberIsTold(t *testing.T) {
	s := &stage{settings: settings{minute: time.Minute}}
	acts := s.acts()
	cold, crash, rotation, work := acts[0], acts[2], acts[5], acts[7]
	const all = processes * callers
	calm := report{Served: 2 * all}
	outage := report{Served: all, Down: 1, Refused: 1, Back: time.Now()}
	denial := report{Served: all, Denied: 1, Refused: 1}
	type made = map[string]logins
	for _, tc := range []struct {
		name string
		act  act
		did  made
		got  report
		want string // "": nothing is wrong
	}{
		{"cold", cold, made{app: {OK: 1}}, calm, ""},
		{"crash", crash, made{app: {OK: 1}}, outage, ""},
		{"rotation", rotation, made{app: {OK: 1, Denied: 1}}, denial, ""},
		{"work", work, made{batch: {OK: 15}}, calm, ""},

		{"no login", cold, made{}, calm, "0 logins of app, want 1 to 1"},
		{"a login more", crash, made{app: {OK: 2}}, outage, "2 logins of app, want 1 to 1"},
		{"a token died at work", work, made{app: {OK: 1}, batch: {OK: 15}}, calm, "1 logins of app, want 0 to 0"},
		{"renewed too rarely", work, made{batch: {OK: 12}}, calm, "12 logins of batch"},
		{"renewed too often", work, made{batch: {OK: 19}}, calm, "19 logins of batch"},
		{"denied more than once", rotation, made{app: {OK: 1, Denied: 2}}, denial, "2 logins of app were denied, want 1"},
		{"denied without a reason", cold, made{app: {OK: 1, Denied: 1}}, calm, "1 logins of app were denied, want 0"},
		{"failed", cold, made{app: {OK: 1, Other: 1}}, calm, "failed otherwise"},
		{"not all served", cold, made{app: {OK: 1}}, report{Served: all - 1}, "199 round trips, want 200 or more"},
		{"not all served as both", work, made{batch: {OK: 15}}, report{Served: 2*all - 1}, "399 round trips"},
		{"nobody heard of the denial", rotation, made{app: {OK: 1, Denied: 1}}, report{Served: all, Refused: 1}, "password is wrong"},
		{"suppressed", crash, made{app: {OK: 1}}, with(outage, report{Suppressed: 1}), "1 tries suppressed"},
		{"no outage", crash, made{app: {OK: 1}}, report{Served: all, Refused: 1, Back: time.Now()}, "did not answer"},
		{"an error at work", work, made{batch: {OK: 15}}, with(calm, report{Down: 1}), "1 tries met an etcd"},
		{"nobody was back", crash, made{app: {OK: 1}}, report{Served: all, Down: 1, Refused: 1}, "after an outage"},
		{"a dead token at work", work, made{batch: {OK: 15}}, with(calm, report{Refused: 1}), "1 requests with a token that was dead"},
		{"waited at work", work, made{batch: {OK: 15}}, with(calm, report{Waited: 1}), "1 round trips had to wait"},
		{"fault", cold, made{app: {OK: 1}}, with(calm, report{Fault: "lost"}), "lost"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := tc.act.judge(tc.did, tc.got)
			if tc.want == "" {
				assert.NoError(t, err)
				return
			}
			require.Error(t, err)
			assert.Contains(t, err.Error(), tc.want)
			assert.NotContains(t, err.Error(), "\n", "one thing is wrong")
		})
	}
}

func with(r, o report) report {
	r.add(o)
	return r
}
