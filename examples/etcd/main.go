// Etcd shows a fleet that shares the sessions of a server nobody here wrote: an
// etcd with passwords, whose tokens die when they idle, when it restarts, and when
// the password changes. 4 processes with 50 callers each put and get; etcd's own
// metrics say how often they have logged in.
//
//	apt-get install etcd-server
//	go run ./examples/etcd
//	go run ./examples/etcd -minute 60s           # keep the tokens alive for longer
//	go run ./examples/etcd -redis localhost:6379 # on a real Redis
//
// The example starts an etcd of its own, in a temporary folder, and ends it. It
// prints a line for each thing that happens to the fleet. A number that is wrong
// makes the exit status 1. It takes half a minute.
//
// How the library is used is in worker.go.
package main

import (
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"

	"github.com/sessionlock/sessionlock"
)

const (
	workerArg = "worker"
	limit     = 50 * time.Second // of all acts but the last; then everything is ended
)

// settings are what can be said on the command line.
type settings struct {
	redis  string
	minute time.Duration // how long the last act takes
}

func main() {
	var set settings
	flag.StringVar(&set.redis, "redis", "", "host:port of a real Redis `server`; its other keys are not touched")
	flag.DurationVar(&set.minute, "minute", 10*time.Second, "how long to keep the tokens alive")
	flag.Parse()
	if flag.Arg(0) == workerArg && flag.NArg() == 5 {
		exit(work(place{flag.Arg(1), flag.Arg(2), flag.Arg(3), flag.Arg(4)}))
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	exit(run(ctx, set, os.Stdout))
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "etcd:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// run sets the stage and plays the acts.
func run(ctx context.Context, set settings, out io.Writer) (failed error) {
	ctx, cancel := context.WithTimeout(ctx, limit+set.minute)
	defer cancel()
	etcd, err := startEtcd(ctx)
	if err != nil {
		return err
	}
	defer etcd.stop()
	passwords := map[string]string{app: rand.Text(), batch: rand.Text()}
	secrets := secretFile(filepath.Join(etcd.dir, "secrets"))
	if err := errors.Join(etcd.enableAuth(ctx, passwords), secrets.write(passwords)); err != nil {
		return err
	}
	if set.redis == "" {
		m := miniredis.NewMiniRedis()
		m.ClockTTL(true)
		if err := m.Start(); err != nil {
			return err
		}
		defer m.Close()
		set.redis = m.Addr()
	}
	p := place{set.redis, string(etcd.gateway), string(secrets), "etcd-" + rand.Text()}
	rdb := redis.NewClient(&redis.Options{Addr: p.redis})
	defer rdb.Close()
	operator, err := newClient(p, app, rdb, &ledger{made: map[string]logins{}}) // the parent's: it never logs in
	if err != nil {
		return err
	}
	defer operator.Close(ctx)
	workers, err := startFleet(ctx, p)
	defer func() { failed = errors.Join(failed, workers.stop()) }()
	if err != nil {
		return err
	}
	s := &stage{settings: set, out: out, etcd: etcd, secrets: secrets, passwords: passwords, operator: operator, workers: workers}
	fmt.Fprintf(out, "%d processes with %d callers each\n", processes, callers)
	for i, a := range s.acts() {
		goesOn, wrong := s.play(ctx, fmt.Sprintf("%d. %s", i+1, a.name), a)
		if failed = errors.Join(failed, wrong); !goesOn {
			break
		}
	}
	return failed
}

// stage is what the acts are played on.
type stage struct {
	settings
	out       io.Writer
	etcd      *server
	secrets   secretFile
	passwords map[string]string // by user
	operator  *sessionlock.Client
	workers   fleet

	made map[string]logins // before the act
	back time.Time         // when etcd answered again
}

// act is one thing that happens to the fleet.
type act struct {
	name   string
	users  []string                    // as whom every caller works, in turns
	before func(context.Context) error // what happens before the callers are at work; nil: nothing
	during func(context.Context) error // and meanwhile
	want   want
}

// want is what has to come of an act.
type want struct {
	logins map[string]span // that etcd granted, by user; nobody else logs in
	denied int             // logins of app
	crash  bool            // callers meet an etcd that is down
	dead   bool            // and tokens that are
	near   bool            // nobody waits for a session
}

type span struct{ least, most int }

var one = span{1, 1}

func (s *stage) acts() []act {
	crash := act{
		"etcd is killed and comes back",
		[]string{app},
		nil, s.crash,
		want{logins: map[string]span{app: one}, crash: true, dead: true},
	}
	return []act{
		{"cold", []string{app}, nil, nil, want{logins: map[string]span{app: one}}},
		{"the fleet idles until its token is dead", []string{app}, idle, nil, want{logins: map[string]span{app: one}}},
		crash, crash, crash,
		{"the password is changed elsewhere", []string{app}, nil, s.rotate, want{
			logins: map[string]span{app: one}, denied: 1, dead: true,
		}},
		{"a second user, cold", []string{app, batch}, nil, nil, want{logins: map[string]span{batch: one}}},
		{fmt.Sprintf("%v of work", s.minute), []string{app, batch}, nil, s.hold, want{
			logins: map[string]span{batch: renewals(s.minute)}, near: true,
		}},
	}
}

// idle lets the token of app die. The fleet knows that it has, without asking
// etcd with it.
func idle(ctx context.Context) error {
	pause(ctx, tokenTTL+time.Second)
	return ctx.Err()
}

// atWork is how long the callers are at it before something happens to them: longer
// than a session counts as young. Two young ones refused in a row would look like an
// etcd that refuses whatever it grants, and the next login would wait.
const atWork = tokenTTL/4 + 500*time.Millisecond

// crash kills etcd under load. It forgets all tokens by that, and the fleet learns
// it from the first request that is answered again.
func (s *stage) crash(ctx context.Context) error {
	pause(ctx, atWork)
	if err := s.etcd.crash(ctx); err != nil {
		return err
	}
	pause(ctx, 500*time.Millisecond)
	if err := s.etcd.start(ctx); err != nil {
		return err
	}
	s.back = time.Now()
	pause(ctx, time.Second)
	return nil
}

// rotate changes the password and tells the fleet only when it has been denied:
// the wrong order, and a common one. Nobody tries the old password a second time,
// and the denial, which is kept for 15 minutes, holds until an operator says that
// the password is right now.
func (s *stage) rotate(ctx context.Context) error {
	pause(ctx, atWork)
	was, err := s.etcd.seen(ctx)
	if err != nil {
		return err
	}
	next := rand.Text()
	if err := s.etcd.changePassword(ctx, app, next); err != nil {
		return err
	}
	if err := s.awaitDenial(ctx, was); err != nil {
		return err
	}
	pause(ctx, time.Second)
	s.passwords[app] = next
	if err := s.secrets.write(s.passwords); err != nil {
		return err
	}
	pause(ctx, 500*time.Millisecond)
	now, err := s.etcd.seen(ctx)
	if now.OK != was.OK {
		err = errors.Join(err, errors.New("  a login before the operator has allowed one"))
	}
	return errors.Join(err, s.operator.Unsuppress(ctx, app))
}

// awaitDenial returns when etcd has denied a login since was.
func (s *stage) awaitDenial(ctx context.Context, was logins) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	for {
		if now, err := s.etcd.seen(ctx); err != nil || now.Denied > was.Denied {
			return err
		}
		pause(ctx, 20*time.Millisecond)
	}
}

// hold has both users at work for many lives of a token that is left alone. app's
// is kept alive by use, and stays; batch's is replaced before it ends.
func (s *stage) hold(ctx context.Context) error {
	pause(ctx, s.minute)
	return ctx.Err()
}

// renewals are the logins of a user who takes a new token batchAhead, give or take
// a tenth, before the fleet would stop using the old one. Each takes its time, and
// the act some longer than d.
func renewals(d time.Duration) span {
	const (
		period = batchLife - batchMargin - batchAhead
		jitter = batchAhead / 10
		login  = 300 * time.Millisecond
		longer = 2 * time.Second
	)
	return span{int(d / (period + jitter + login)), int((d+longer)/(period-jitter)) + 1}
}

// play has the workers play a, prints its line, and holds what callers and etcd
// have seen against what should have happened. Without a fleet that works as it
// did there is no going on.
func (s *stage) play(ctx context.Context, title string, a act) (goesOn bool, err error) {
	if a.before != nil {
		err = a.before(ctx)
	}
	err = errors.Join(err, s.workers.order("start "+strings.Join(a.users, " ")))
	if a.during != nil {
		err = errors.Join(err, a.during(ctx))
	}
	got, fault := s.workers.stopCallers()
	made, wrong := s.audit(ctx)
	did := map[string]logins{}
	for user, n := range made {
		did[user] = n.minus(s.made[user])
	}
	s.made = made
	verdict := "ok"
	err = errors.Join(err, fault, wrong, ctx.Err())
	goesOn = err == nil && got.Fault == ""
	if err = errors.Join(err, a.judge(did, got)); err != nil {
		verdict = "WRONG"
		err = fmt.Errorf("%s:\n%w", title, err)
	}
	fmt.Fprintf(s.out, "%-42s %d round trips, %s: %s\n", title, got.Served, s.told(a, did, got), verdict)
	return goesOn, err
}

// audit returns the logins that the fleet has made since its start. The workers
// say by whom, etcd says how many; both agree, if not at once.
func (s *stage) audit(ctx context.Context) (made map[string]logins, err error) {
	for end := time.Now().Add(3 * time.Second); ; pause(ctx, 20*time.Millisecond) {
		made, err = s.workers.logins()
		seen, unseen := s.etcd.seen(ctx)
		if err = errors.Join(err, unseen); err != nil {
			return made, err
		}
		var sum logins
		for _, n := range made {
			sum = sum.plus(n)
		}
		if sum == seen {
			return made, nil
		}
		if time.Now().After(end) {
			return made, fmt.Errorf("  logins since the start: etcd has counted %+v, the workers %+v", seen, sum)
		}
	}
}

// judge compares what came of a with what should have.
func (a act) judge(did map[string]logins, got report) (err error) {
	check := func(ok bool, format string, args ...any) {
		if !ok {
			err = errors.Join(err, fmt.Errorf("  "+format, args...))
		}
	}
	for _, user := range []string{app, batch} {
		n, want := did[user], a.want.logins[user]
		denied := 0
		if user == app {
			denied = a.want.denied
		}
		check(n.OK >= want.least && n.OK <= want.most, "%d logins of %s, want %d to %d", n.OK, user, want.least, want.most)
		check(n.Denied == denied, "%d logins of %s were denied, want %d", n.Denied, user, denied)
		check(n.Other == 0, "%d logins of %s failed otherwise", n.Other, user)
	}
	atLeast := processes * callers * len(a.users)
	check(got.Served >= atLeast, "%d round trips, want %d or more", got.Served, atLeast)
	check((got.Denied > 0) == (a.want.denied > 0), "%d tries told that the password is wrong", got.Denied)
	check(got.Suppressed == 0, "%d tries suppressed", got.Suppressed)
	check((got.Down > 0) == a.want.crash, "%d tries met an etcd that did not answer", got.Down)
	check(got.Back.IsZero() != a.want.crash, "first round trip after an outage: %v", got.Back)
	check((got.Refused > 0) == a.want.dead, "%d requests with a token that was dead", got.Refused)
	check(got.Waited == 0 || !a.want.near, "%d round trips had to wait for a session", got.Waited)
	check(got.Fault == "", "%s", got.Fault)
	return err
}

// told is what came of a, for its line.
func (s *stage) told(a act, did map[string]logins, got report) string {
	var parts []string
	for _, user := range a.users {
		parts = append(parts, fmt.Sprintf("logins of %s: %d", user, did[user].OK))
		if n := did[user].Denied; n > 0 {
			parts = append(parts, fmt.Sprintf("denied: %d", n))
		}
	}
	if got.Down > 0 {
		parts = append(parts, fmt.Sprintf("%d tries in vain, served %v after it was back",
			got.Down, max(got.Back.Sub(s.back), 0).Round(time.Millisecond)))
	}
	if a.want.near {
		parts = append(parts, fmt.Sprintf("%d waited for one", got.Waited))
	}
	return strings.Join(slices.Concat(parts, []string{fmt.Sprintf("slowest %v", got.Slowest.Round(time.Millisecond))}), ", ")
}
