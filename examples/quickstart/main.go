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
	"github.com/redis/go-redis/v9"

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
	upstream, err := sessionlocktest.StartUpstream() //nolint:contextcheck // it ends by Close
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
	rdb := redis.NewClient(&redis.Options{Addr: p.redis})
	defer rdb.Close()
	client, err := newClient(p, rdb) // the parent's: it looks, and never logs in
	if err != nil {
		return err
	}
	defer client.Close(ctx)
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
	users  []string              // whom every caller calls for
	during func(context.Context) // what happens while they do; nil: they do it once
	want   map[string]logins     // by user; nobody else may log in
}

// logins are those of one user in one act.
type logins struct {
	ok, denied int
	turnedAway bool // at least one met the upstream down
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

func (s *stage) revocation(ctx context.Context) {
	pause(ctx, time.Second)
	s.upstream.Revoke(ada)
	pause(ctx, time.Second)
}

// outage kills the sessions of bob and cyd, lets the fleet get as far as logging
// in, and only then goes down: so there are logins that fail. ada's session
// lives through it.
func (s *stage) outage(ctx context.Context) {
	u := s.upstream
	u.Hang(true)
	u.Revoke(bob)
	u.Revoke(cyd)
	_ = until(ctx, func() bool {
		l := u.Ledger()
		return l.Accounts[bob].AtOnce > 0 && l.Accounts[cyd].AtOnce > 0
	})
	u.Down(sessionlocktest.Refusing)
	u.Hang(false)
	pause(ctx, 2500*time.Millisecond)
	u.Down(sessionlocktest.Up)
}

// play has the workers play a and returns its line.
func (s *stage) play(ctx context.Context, number int, a act) (string, error) {
	title := fmt.Sprintf("%d. %s", number, a.name)
	before := s.upstream.Ledger()
	stop := watch(title, s.workers, s.upstream)
	err := s.workers.order(order{Act: number, Users: a.users, Keep: a.during != nil})
	if a.during != nil {
		a.during(ctx)
		err = errors.Join(err, s.workers.order(order{}))
	}
	got, late := s.workers.await(ctx, number)
	stop()
	sent, wrong := a.audit(before, s.upstream.Ledger())
	verdict := "ok"
	if err = errors.Join(err, late, wrong, a.callers(got), s.budget(ctx, a)); err != nil {
		verdict = "WRONG"
		err = fmt.Errorf("%s:\n%w", title, err)
	}
	return fmt.Sprintf("%-35s %d callers, logins: %s, slowest wait %v: %s\n", title,
		processes*callers, sent, got.Slowest.Round(time.Millisecond), verdict), err
}

// audit compares the upstream's ledger with the logins that should have been
// made, and counts them.
func (a act) audit(before, after sessionlocktest.Ledger) (sent string, err error) {
	var w wrong
	judged, turnedAway := 0, 0
	for user, now := range after.Accounts {
		was := before.Accounts[user]
		away := now.TurnedAway - was.TurnedAway
		did := logins{now.OK - was.OK, now.Denied - was.Denied, away > 0}
		w.unless(did == a.want[user], "logins of %s: %+v, want %+v", user, did, a.want[user])
		w.unless(away <= 5, "%d logins of %s turned away: the fleet has not backed off", away, user)
		w.unless(now.MaxAtOnce <= 1, "%d logins of %s at once", now.MaxAtOnce, user)
		w.unless(now.Live <= 1, "%d live sessions of %s", now.Live, user)
		w.unless(now.Sent == now.OK+now.Denied+now.TurnedAway, "%s has logins without outcome: %+v", user, now)
		judged, turnedAway = judged+did.ok+did.denied, turnedAway+away
	}
	w.unless(judged > 0, "no login was sent")
	w.unless(after.Strangers == 0, "%d requests with tokens that never were", after.Strangers)
	if turnedAway == 0 {
		return fmt.Sprint(judged), w.error()
	}
	return fmt.Sprintf("%d, and %d turned away", judged, turnedAway), w.error()
}

// callers compares what the callers got with what they should have got.
func (a act) callers(got report) error {
	var w wrong
	denied, outage := false, false
	for _, want := range a.want {
		denied, outage = denied || want.denied > 0, outage || want.turnedAway
	}
	round := processes * callers * len(a.users)
	switch {
	case denied:
		w.unless(got.Denied == round && got.Served == 0, "%d callers heard of the denial, want %d", got.Denied, round)
	case a.during == nil:
		w.unless(got.Served == round, "%d calls served, want %d", got.Served, round)
	default: // at least one before, one after
		w.unless(got.Served >= 2*round, "%d calls served, want %d or more", got.Served, 2*round)
	}
	w.unless(outage == (got.Retries > 0), "%d tries in vain", got.Retries)
	w.unless(got.Fault == "", "%s", got.Fault)
	return w.error()
}

// budget looks at the logins that the fleet itself holds against a user: those
// denied, and none that met an upstream which was down.
func (s *stage) budget(ctx context.Context, a act) error {
	var w wrong
	for _, user := range a.users {
		status, err := s.client.Inspect(ctx, user)
		w.unless(err == nil, "inspect %s: %v", user, err)
		w.unless(status.Attempts == a.want[user].denied, "%d logins of %s counted against the budget", status.Attempts, user)
	}
	return w.error()
}

// wrong collects what is.
type wrong []error

func (w *wrong) unless(ok bool, format string, args ...any) {
	if !ok {
		*w = append(*w, fmt.Errorf("  "+format, args...))
	}
}

func (w wrong) error() error { return errors.Join(w...) }
