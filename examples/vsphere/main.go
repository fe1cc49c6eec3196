// Vsphere shows a fleet that shares the sessions of a vCenter: those of its REST
// API, an id in a header, and those of its SOAP API, a cookie that govmomi wants.
// 4 processes with 25 callers each; the vCenter is govmomi's own simulator, and it
// says how often they have logged in and how many sessions it keeps.
//
//	go -C examples/vsphere run .
//
// Nothing is needed but Go. The example prints a line for each thing that happens
// to the fleet, with what should be seen and what is. A number that is wrong makes
// the exit status 1. It takes some ten seconds.
//
// What to copy is in rest.go and soap.go.
package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/alicebob/miniredis/v2"
)

const (
	workerArg = "worker"
	limit     = 50 * time.Second // of the whole; then everything is ended
)

// The users of the vCenter that the fleet logs in as. A user is the key of its
// sessions.
const (
	ada = "ada@vsphere.local"
	bob = "bob@vsphere.local"
	cyd = "cyd@vsphere.local" // the fleet has a wrong password
)

func main() {
	if len(os.Args) == 2 && os.Args[1] == workerArg {
		exit(work())
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	exit(run(ctx, os.Stdout))
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "vsphere:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// run sets the stage and plays the acts.
func run(ctx context.Context, out io.Writer) (failed error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	users := map[string]string{operator: rand.Text(), ada: rand.Text(), bob: rand.Text(), cyd: rand.Text()}
	v, err := startVCenter(ctx, users, 200*time.Millisecond) // a login takes its time
	if err != nil {
		return err
	}
	defer v.close()
	m := miniredis.NewMiniRedis()
	m.ClockTTL(true)
	if err := m.Start(); err != nil {
		return err
	}
	defer m.Close()
	p := place{v.URL, v.certificate(), m.Addr(), "vsphere", passwords{ada: users[ada], bob: users[bob], cyd: "wrong"}}
	apis, leave, err := join(ctx, p) // the parent only logs out
	if err != nil {
		return err
	}
	defer func() { failed = errors.Join(failed, leave()) }()
	workers, err := startFleet(ctx, p)
	s := &stage{vcenter: v, apis: apis, workers: workers}
	defer func() { failed = errors.Join(failed, s.workers.stop()) }()
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "%d processes with %d callers each; what should be seen/what is\n", processes, callers)
	fmt.Fprintf(out, "%-44s %7s %7s %7s %7s %7s %7s %8s\n", "", "logins", "denied", "logouts", "live", "refused", "served", "slowest")
	for i, a := range s.acts() {
		if ctx.Err() == nil {
			failed = errors.Join(failed, s.play(ctx, out, fmt.Sprintf("%d. %s", i+1, a.name), a))
		}
	}
	return errors.Join(failed, ctx.Err())
}

// stage is what the acts are played on.
type stage struct {
	vcenter *vcenter
	apis    map[string]api
	workers fleet
}

// act is one thing that happens to the fleet.
type act struct {
	name   string
	api    string
	users  []string                    // as whom the callers work, in turns; none: they rest
	during func(context.Context) error // what happens meanwhile; nil: nothing
	want   want
}

// want is what has to come of an act. What is not in it does not happen.
type want struct {
	logins  count
	denied  count // of the logins; the callers are, too, and none is served
	logouts count
	refused account // whose session is refused, once per caller at most
	live    count   // sessions that the vCenter keeps afterwards
}

type count map[account]int

func (c count) sum() (n int) {
	for _, m := range c {
		n += m
	}
	return n
}

func one(api string, users ...string) count {
	c := count{}
	for _, user := range users {
		c[account{api, user}] = 1
	}
	return c
}

func (s *stage) acts() []act {
	rest, soap := one(overREST, ada, bob), one(overSOAP, ada, bob)
	all := maps.Clone(rest)
	maps.Copy(all, soap)
	both := []string{ada, bob}
	return []act{
		{"REST: all ask for two users, cold", overREST, both, nil, want{logins: rest, live: rest}},
		{"SOAP: the same users", overSOAP, both, nil, want{logins: soap, live: all}},
		{
			"REST: a session ends at work", overREST, both, s.atWork(s.vcenter.forget, ada),
			want{logins: one(overREST, ada), refused: account{overREST, ada}, live: all},
		},
		{
			"SOAP: a session is terminated at work", overSOAP, both, s.atWork(s.vcenter.terminate, bob),
			want{logins: one(overSOAP, bob), refused: account{overSOAP, bob}, live: all},
		},
		{"REST: a wrong password", overREST, []string{cyd}, nil, want{logins: one(overREST, cyd), denied: one(overREST, cyd), live: all}},
		{"SOAP: a wrong password", overSOAP, []string{cyd}, nil, want{logins: one(overSOAP, cyd), denied: one(overSOAP, cyd), live: all}},
		{"the processes end, the sessions live on", "", nil, s.dismiss, want{live: all}},
		{"both users are logged out", "", nil, s.logOut, want{logouts: all}},
	}
}

// atWork ends a session of user by end, with callers before and after.
func (s *stage) atWork(end func(context.Context, string) error, user string) func(context.Context) error {
	return func(ctx context.Context) error {
		pause(ctx, 500*time.Millisecond)
		return end(ctx, user)
	}
}

func (s *stage) dismiss(context.Context) error {
	workers := s.workers
	s.workers = nil
	return workers.stop()
}

func (s *stage) logOut(ctx context.Context) (err error) {
	for _, api := range s.apis {
		for _, user := range []string{ada, bob, cyd} { // cyd has no session, which is no error
			err = errors.Join(err, api.Logout(ctx, user))
		}
	}
	return err
}

// play has the workers play a, prints its line, and holds what callers and vCenter
// have seen against what should have happened.
func (s *stage) play(ctx context.Context, out io.Writer, title string, a act) (err error) {
	before := s.vcenter.counted()
	var got report
	if len(a.users) > 0 {
		err = s.workers.order(order{a.api, a.users})
	}
	if a.during != nil {
		err = errors.Join(err, a.during(ctx))
	}
	if len(a.users) > 0 {
		pause(ctx, time.Second)
		var fault error
		got, fault = s.workers.stopCallers()
		err = errors.Join(err, fault)
	}
	did := map[account]tally{}
	for who, now := range s.vcenter.counted() {
		did[who] = now.minus(before[who])
	}
	live, fault := s.vcenter.live(ctx)
	err = errors.Join(err, fault, a.judge(did, live, got))
	verdict := "ok"
	if err != nil {
		verdict = "WRONG"
		err = fmt.Errorf("%s:\n%w", title, err)
	}
	var sum tally
	for _, n := range did {
		sum.add(n)
	}
	pair := func(want count, seen int) string { return fmt.Sprintf("%d/%d", want.sum(), seen) }
	fmt.Fprintf(out, "%-44s %7s %7s %7s %7s %7d %7d %8v  %s\n", title,
		pair(a.want.logins, sum.Logins), pair(a.want.denied, sum.Denied), pair(a.want.logouts, sum.Logouts),
		pair(a.want.live, live.sum()), sum.Refused, got.Served, got.Slowest.Round(time.Millisecond), verdict)
	return err
}

// requests are what one call of a caller takes.
var requests = map[string]int{overREST: 1, overSOAP: 2}

// judge compares what came of a with what should have.
func (a act) judge(did map[account]tally, live count, got report) (err error) {
	check := func(ok bool, format string, args ...any) {
		if !ok {
			err = errors.Join(err, fmt.Errorf("  "+format, args...))
		}
	}
	const all = processes * callers
	for _, api := range []string{overREST, overSOAP} {
		for _, user := range []string{ada, bob, cyd, ""} { // "": with a session that nobody was granted
			who := account{api, user}
			n, want := did[who], a.want
			check(n.Logins == want.logins[who], "%d logins of %v, want %d", n.Logins, who, want.logins[who])
			check(n.Denied == want.denied[who], "%d logins of %v were denied, want %d", n.Denied, who, want.denied[who])
			check(n.AtOnce <= 1, "%d logins of %v at once", n.AtOnce, who)
			check(n.Logouts == want.logouts[who], "%d logouts of %v, want %d", n.Logouts, who, want.logouts[who])
			check((n.Refused > 0) == (who == want.refused) && n.Refused <= all, "%d calls of %v with a dead session", n.Refused, who)
			check(n.Odd == 0, "%d calls of %v were not answered as their session deserved", n.Odd, who)
			check(live[who] == want.live[who], "%d live sessions of %v, want %d", live[who], who, want.live[who])
		}
	}
	var sum tally
	for _, n := range did {
		sum.add(n)
	}
	good, each := sum.Calls-sum.Refused, requests[a.api]
	check(good >= each*got.Served && good <= each*got.Served+sum.Refused, "%d good calls upstream, %d served", good, got.Served)
	denied := len(a.want.denied) > 0
	switch {
	case denied:
		check(got.Served == 0, "%d calls served with a wrong password", got.Served)
		check(got.Denied > 0, "nobody heard of the denial")
		check(got.Suppressed >= all, "%d calls suppressed, want %d or more", got.Suppressed, all)
	case len(a.users) > 0:
		check(got.Served >= all, "%d calls served, want %d or more", got.Served, all)
	}
	check(denied || got.Denied+got.Suppressed == 0, "%d calls denied", got.Denied+got.Suppressed)
	check(got.Fault == "", "%s", got.Fault)
	return err
}
