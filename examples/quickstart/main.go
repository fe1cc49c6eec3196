// Quickstart shows a fleet that shares sessions, and holds it against the ledger
// of the API that it logs in to: 8 processes with 50 callers each, one Redis, an
// upstream that wants sessions.
//
//	go run ./examples/quickstart                       # nothing needed but Go
//	go run ./examples/quickstart -redis localhost:6379 # on a real Redis
//
// Four things happen to the fleet: a cold start, a token revoked at work, a wrong
// password, an outage of the upstream. Each ends in one line: how many callers,
// how many logins the upstream has seen, how long the slowest caller waited. A
// number that is wrong makes the exit status 1. It takes some seconds, at most 20.
//
// How the library is used is in worker.go.
package main

import (
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/alicebob/miniredis/v2"

	"github.com/sessionlock/sessionlock"
	"github.com/sessionlock/sessionlock/sessionlocktest"
)

const (
	workerArg = "worker"
	limit     = 18 * time.Second // of the whole; then everything is killed
)

func main() {
	redisAddr := flag.String("redis", "", "host:port of a real Redis `server`; its other keys are not touched")
	flag.Parse()
	if flag.Arg(0) == workerArg && flag.NArg() == 4 {
		exit(work(place{flag.Arg(1), flag.Arg(2), flag.Arg(3)}))
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	exit(run(ctx, *redisAddr))
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "quickstart:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// run sets the stage, plays the acts and prints a line for each.
func run(ctx context.Context, redisAddr string) error {
	upstream, err := sessionlocktest.StartUpstream()
	if err != nil {
		return err
	}
	defer upstream.Close()
	upstream.Delay(200 * time.Millisecond) // a login takes its time
	if redisAddr == "" {
		m := miniredis.NewMiniRedis()
		m.ClockTTL(true)
		if err := m.Start(); err != nil {
			return err
		}
		defer m.Close()
		redisAddr = m.Addr()
	}
	p := place{redisAddr, upstream.URL, "quickstart-" + rand.Text()}
	client, err := newClient(p) // the parent looks, and never logs in
	if err != nil {
		return err
	}
	workers, err := startFleet(ctx, p)
	defer workers.stop()
	if err != nil {
		return err
	}
	s := &stage{upstream, client, workers}
	var lines string
	var failed error
	for i, a := range s.acts() {
		line, err := s.play(ctx, i+1, a)
		failed = errors.Join(failed, err)
		lines += line
		if ctx.Err() != nil {
			break
		}
	}
	fmt.Print(lines)
	return failed
}

// stage is what the acts are played on.
type stage struct {
	upstream *sessionlocktest.Upstream
	client   *sessionlock.Client
	workers  fleet
}

// act is one thing that happens to the fleet.
type act struct {
	name   string
	users  []string                    // whom every caller calls for
	during func(context.Context) error // what happens while they do; nil: they do it once
	want   map[string]logins           // by user; nobody else may log in
}

// logins are those of one user in one act.
type logins struct {
	ok, denied int
	turnedAway bool // while the upstream was down, at least one
}

const ada, bob, cyd, mallory = "ada", "bob", "cyd", "mallory"

func (s *stage) acts() []act {
	users := []string{ada, bob, cyd}
	s.upstream.DenyAfter(mallory, 0)
	return []act{
		{"all ask for three users, cold", users, nil, map[string]logins{ada: {ok: 1}, bob: {ok: 1}, cyd: {ok: 1}}},
		{"a token is revoked at work", users, s.revocation, map[string]logins{ada: {ok: 1}}},
		{"a password is denied", []string{mallory}, nil, map[string]logins{mallory: {denied: 1}}},
		{"the upstream is down, and back", users, s.outage, map[string]logins{
			bob: {ok: 1, turnedAway: true}, cyd: {ok: 1, turnedAway: true},
		}},
	}
}

func (s *stage) revocation(ctx context.Context) error {
	pause(ctx, time.Second)
	s.upstream.Revoke(ada)
	pause(ctx, time.Second)
	return ctx.Err()
}

// outage kills the sessions of bob and cyd, lets the fleet get as far as logging
// in, and only then goes down: so there are logins that fail. ada's session
// lives through it.
func (s *stage) outage(ctx context.Context) error {
	u := s.upstream
	u.Hang(true)
	u.Revoke(bob)
	u.Revoke(cyd)
	err := until(ctx, func() bool {
		l := u.Ledger()
		return l.Accounts[bob].AtOnce > 0 && l.Accounts[cyd].AtOnce > 0
	})
	u.Down(sessionlocktest.Refusing)
	u.Hang(false)
	pause(ctx, 2500*time.Millisecond)
	u.Down(sessionlocktest.Up)
	return errors.Join(err, ctx.Err())
}

// play has the workers play a and returns its line.
func (s *stage) play(ctx context.Context, number int, a act) (string, error) {
	before := s.upstream.Ledger()
	stop := watch(fmt.Sprintf("%d. %s", number, a.name), s.workers, s.upstream)
	err := s.workers.order(order{Act: number, Users: a.users, Keep: a.during != nil})
	if a.during != nil {
		err = errors.Join(err, a.during(ctx), s.workers.order(order{}))
	}
	got, late := s.workers.await(ctx, number)
	stop()
	sent, wrong := s.audit(ctx, a, got, before, s.upstream.Ledger())
	if err = errors.Join(err, late, wrong); err != nil {
		err = fmt.Errorf("%d. %s:\n%w", number, a.name, err)
	}
	return fmt.Sprintf("%d. %-31s  %d callers, %s, slowest wait %v: %s\n", number, a.name,
		processes*callers, sent, got.Slowest.Round(time.Millisecond), map[bool]string{true: "ok", false: "WRONG"}[err == nil]), err
}

// audit compares what the callers and the upstream have seen with what should
// have happened.
func (s *stage) audit(ctx context.Context, a act, got report, before, after sessionlocktest.Ledger) (sent string, wrong error) {
	check := func(ok bool, format string, args ...any) {
		if !ok {
			wrong = errors.Join(wrong, fmt.Errorf("  "+format, args...))
		}
	}
	var judged, turnedAway, denied int
	outage := false
	for user, now := range after.Accounts {
		was, want := before.Accounts[user], a.want[user]
		ok, no, away := now.OK-was.OK, now.Denied-was.Denied, now.TurnedAway-was.TurnedAway
		judged, turnedAway, denied, outage = judged+ok+no, turnedAway+away, denied+no, outage || want.turnedAway
		check(ok == want.ok && no == want.denied, "%s: %d logins ok and %d denied, want %d and %d", user, ok, no, want.ok, want.denied)
		check((away > 0) == want.turnedAway && away <= 5, "%s: %d logins turned away", user, away)
		check(now.MaxAtOnce <= 1 && now.Live <= 1, "%s: %d logins at once, %d live sessions", user, now.MaxAtOnce, now.Live)
		check(now.Sent == now.OK+now.Denied+now.TurnedAway, "%s: logins are missing: %+v", user, now)
	}
	check(judged > 0 && after.Strangers == 0, "%d logins, %d requests with unknown tokens", judged, after.Strangers)
	for _, user := range a.users {
		status, err := s.client.Inspect(ctx, user)
		check(err == nil && status.Attempts == a.want[user].denied, "%s: %d logins counted against the budget, want %d (%v)", user, status.Attempts, a.want[user].denied, err)
	}
	calls := processes * callers * len(a.users)
	switch {
	case denied > 0:
		check(got.Denied == calls && got.Served == 0, "%d callers told that the password is wrong, want %d", got.Denied, calls)
	case a.during == nil:
		check(got.Served == calls, "%d calls served, want %d", got.Served, calls)
	default:
		check(got.Served >= 2*calls, "%d calls served, want %d or more", got.Served, 2*calls)
	}
	check((got.Retries > 0) == outage, "%d tries in vain", got.Retries)
	check(got.Fault == "", "%s", got.Fault)
	sent = fmt.Sprintf("%d logins", judged)
	if turnedAway > 0 {
		sent += fmt.Sprintf(" (and %d turned away)", turnedAway)
	}
	return sent, wrong
}
