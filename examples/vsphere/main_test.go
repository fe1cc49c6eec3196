package main

import (
	"bytes"
	"io"
	"maps"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == workerArg { // started by startFleet
		main()
	}
	os.Exit(m.Run())
}

func TestFleetSharesTheSessionsOfAVCenter(t *testing.T) {
	var lines bytes.Buffer
	require.NoError(t, run(t.Context(), io.MultiWriter(&lines, t.Output())))
	assert.Equal(t, 8, strings.Count(lines.String(), "  ok\n"))
}

// The example would show nothing if it could not fail.
func TestEveryWrongNumberIsTold(t *testing.T) {
	const all = processes * callers
	type outcome struct {
		did  map[account]tally
		live count
		got  report
	}
	var (
		restAda, restBob           = account{overREST, ada}, account{overREST, bob}
		soapAda, soapBob, soapCyd  = account{overSOAP, ada}, account{overSOAP, bob}, account{overSOAP, cyd}
		acts                       = (&stage{}).acts()
		cold, killed, wrong, leave = acts[0], acts[3], acts[5], acts[7]
	)
	right := func(a act) outcome {
		o := outcome{live: count{}}
		maps.Copy(o.live, a.want.live)
		switch a.name {
		case cold.name:
			o.did = map[account]tally{restAda: {Logins: 1, AtOnce: 1, Calls: 50}, restBob: {Logins: 1, AtOnce: 1, Calls: 50}}
			o.got = report{Served: all}
		case killed.name:
			o.did = map[account]tally{soapAda: {Calls: 100}, soapBob: {Logins: 1, Calls: 110, Refused: 10}}
			o.got = report{Served: all}
		case wrong.name:
			o.did = map[account]tally{soapCyd: {Logins: 1, Denied: 1}}
			o.got = report{Denied: 1, Suppressed: all}
		case leave.name:
			o.did = map[account]tally{restAda: {Logouts: 1}, restBob: {Logouts: 1}, soapAda: {Logouts: 1}, soapBob: {Logouts: 1}}
		}
		return o
	}
	also := func(who account, more tally) func(*outcome) {
		return func(o *outcome) {
			n := o.did[who]
			n.add(more)
			n.AtOnce += more.AtOnce
			o.did[who] = n
		}
	}
	for _, a := range []act{cold, killed, wrong, leave} {
		o := right(a)
		assert.NoError(t, a.judge(o.did, o.live, o.got), a.name)
	}
	o := right(killed)
	also(soapAda, tally{Calls: 1})(&o) // half of a call of a caller, before the session was ended
	assert.NoError(t, killed.judge(o.did, o.live, o.got))

	for _, tc := range []struct {
		want  string
		act   act
		wrong func(*outcome)
	}{
		{"2 logins of {REST ada@vsphere.local}, want 1", cold, also(restAda, tally{Logins: 1})},
		{"0 logins of {REST ada@vsphere.local}, want 1", cold, also(restAda, tally{Logins: -1})},
		{"1 logins of {SOAP cyd@vsphere.local}, want 0", cold, also(soapCyd, tally{Logins: 1})},
		{"2 logins of {SOAP cyd@vsphere.local}, want 1", wrong, also(soapCyd, tally{Logins: 1})},
		{"1 logins of {REST bob@vsphere.local} were denied, want 0", cold, also(restBob, tally{Denied: 1})},
		{"2 logins of {REST bob@vsphere.local} at once", cold, also(restBob, tally{AtOnce: 1})},
		{"1 logouts of {REST bob@vsphere.local}, want 0", cold, also(restBob, tally{Logouts: 1})},
		{"0 logouts of {SOAP ada@vsphere.local}, want 1", leave, also(soapAda, tally{Logouts: -1})},
		{"1 calls of {REST bob@vsphere.local} with a dead session", cold, also(restBob, tally{Calls: 1, Refused: 1})},
		{"1 calls of {REST } with a dead session", cold, also(account{API: overREST}, tally{Calls: 1, Refused: 1})},
		{"0 calls of {SOAP bob@vsphere.local} with a dead session", killed, also(soapBob, tally{Calls: -10, Refused: -10})},
		{"101 calls of {SOAP bob@vsphere.local} with a dead session", killed, also(soapBob, tally{Calls: 91, Refused: 91})},
		{"1 calls of {REST bob@vsphere.local} were not answered", cold, also(restBob, tally{Odd: 1})},
		{"2 live sessions of {REST ada@vsphere.local}, want 1", cold, func(o *outcome) { o.live[restAda]++ }},
		{"0 live sessions of {REST ada@vsphere.local}, want 1", cold, func(o *outcome) { o.live[restAda]-- }},
		{"1 live sessions of {SOAP ada@vsphere.local}, want 0", leave, func(o *outcome) { o.live[soapAda]++ }},
		{"101 good calls upstream, 100 served", cold, also(restAda, tally{Calls: 1})},
		{"99 good calls upstream, 100 served", cold, also(restAda, tally{Calls: -1})},
		{"99 calls served, want 100 or more", cold, func(o *outcome) {
			also(restAda, tally{Calls: -1})(o)
			o.got.Served--
		}},
		{"1 calls served with a wrong password", wrong, func(o *outcome) {
			also(soapCyd, tally{Calls: 2})(o)
			o.got.Served++
		}},
		{"1 calls denied", cold, func(o *outcome) { o.got.Denied++ }},
		{"nobody heard of the denial", wrong, func(o *outcome) { o.got.Denied = 0 }},
		{"99 calls suppressed, want 100 or more", wrong, func(o *outcome) { o.got.Suppressed-- }},
		{"lost", cold, func(o *outcome) { o.got.Fault = "lost" }},
	} {
		t.Run(tc.want, func(t *testing.T) {
			o := right(tc.act)
			tc.wrong(&o)
			err := tc.act.judge(o.did, o.live, o.got)
			require.Error(t, err)
			assert.Contains(t, err.Error(), tc.want)
			assert.NotContains(t, err.Error(), "\n", "one thing is wrong")
		})
	}
}
