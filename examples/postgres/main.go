// Postgres shows a fleet that shares sessions through PostgreSQL, by a
// sessionlock.Cache of one table, and no Redis anywhere: 4 processes with 25
// callers each, and an upstream that wants sessions.
//
//	apt-get install postgresql
//	go -C examples/postgres run .
//
// The example starts a PostgreSQL of its own, in a temporary folder, and ends it.
// Four things happen to the fleet; one is that the database is killed. Each ends
// in a line of a table. A number that is wrong makes the exit status 1. It takes
// some ten seconds, at most 20.
//
// What to copy is in store.go, how it is used in worker.go.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"time"

	"github.com/sessionlock/sessionlock/examples/postgres/pgserver"
	"github.com/sessionlock/sessionlock/sessionlocktest"
)

const (
	processes = 4
	workerArg = "worker"
	limit     = 18 * time.Second // of the whole; then everything is ended
)

func main() {
	if len(os.Args) == 3 && os.Args[1] == workerArg {
		exit(work(os.Args[2]))
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	exit(run(ctx))
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "postgres:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// run sets the stage and plays the acts.
func run(ctx context.Context) error {
	upstream, err := sessionlocktest.StartUpstream() //nolint:contextcheck // it ends by Close
	if err != nil {
		return err
	}
	defer upstream.Close()
	upstream.Delay(200 * time.Millisecond)      // a login takes its time
	db, err := pgserver.Start(ctx, "fsync=off") // it is killed here, the machine is not
	if err != nil {
		return err
	}
	defer db.Stop()
	workers, err := startFleet(ctx, upstream.URL, db.URL(db.Addr(), "postgres"))
	defer workers.stop()
	if err != nil {
		return err
	}
	s := &stage{upstream, db, workers}
	fmt.Printf("%-46s %7s %7s %7s %7s %8s\n", "", "callers", "logins", "served", "in vain", "slowest")
	var failed error
	for i, a := range s.acts() {
		if ctx.Err() == nil {
			failed = errors.Join(failed, s.play(ctx, fmt.Sprintf("%d. %s", i+1, a.name), a))
		}
	}
	return errors.Join(failed, ctx.Err())
}

// stage is what the acts are played on.
type stage struct {
	upstream *sessionlocktest.Upstream
	db       *pgserver.Server
	workers  fleet
}

// act is one thing that happens to the fleet.
type act struct {
	name   string
	during func(context.Context) error // what happens while the callers are at work
	want   map[string]int              // good logins by user; there are no others
	inVain bool                        // whether calls fail meanwhile
}

func (s *stage) acts() []act {
	return []act{
		{"all ask for three users, cold", nil, map[string]int{ada: 1, bob: 1, cyd: 1}, false},
		{"a session is revoked at work", s.revoke(ada), map[string]int{ada: 1}, false},
		{"the database is killed, one revoked, and back", s.outage, map[string]int{bob: 1}, true},
		{"a session is revoked at work, after that", s.revoke(cyd), map[string]int{cyd: 1}, false},
	}
}

func (s *stage) revoke(user string) func(context.Context) error {
	return func(ctx context.Context) error {
		pause(ctx, 500*time.Millisecond)
		s.upstream.Revoke(user)
		pause(ctx, time.Second)
		return ctx.Err()
	}
}

// outage kills the database and then bob's session. The sessions of ada and cyd
// are served all the time, each process from what it holds near. Without the
// database bob cannot be helped: nobody knows who may log in.
func (s *stage) outage(ctx context.Context) error {
	pause(ctx, 200*time.Millisecond)
	s.db.Kill()
	pause(ctx, 100*time.Millisecond) // its connections live on for a moment
	before := s.upstream.Ledger().Accounts[bob].Sent
	s.upstream.Revoke(bob)
	pause(ctx, 1500*time.Millisecond)
	var err error
	if n := s.upstream.Ledger().Accounts[bob].Sent - before; n > 0 {
		err = fmt.Errorf("  %d logins of %s without the database", n, bob)
	}
	return errors.Join(err, s.db.Restart(ctx))
}

// play has the workers play a, prints its line, and holds what callers and
// upstream have seen against what should have happened.
func (s *stage) play(ctx context.Context, title string, a act) error {
	before := s.upstream.Ledger()
	err := s.workers.order("start")
	if a.during != nil {
		err = errors.Join(err, a.during(ctx))
	}
	err = errors.Join(err, s.workers.order("stop"))
	got, fault := s.workers.collect()
	sent, wrong := a.audit(before, s.upstream.Ledger())
	err = errors.Join(err, fault, wrong)

	check := func(ok bool, format string, args ...any) {
		if !ok {
			err = errors.Join(err, fmt.Errorf("  "+format, args...))
		}
	}
	check(got.Served >= processes*callers, "%d calls served, want %d or more", got.Served, processes*callers)
	check((got.InVain > 0) == a.inVain, "%d calls in vain", got.InVain)
	check(got.Fault == "", "%s", got.Fault)
	verdict := "ok"
	if err != nil {
		verdict = "WRONG"
		err = fmt.Errorf("%s:\n%w", title, err)
	}
	fmt.Printf("%-48s %5d %7d %7d %7d %8v  %s\n", title, processes*callers, sent, got.Served, got.InVain,
		got.Slowest.Round(time.Millisecond), verdict)
	return err
}

// audit compares the upstream's ledger with the logins that should have been
// made, and counts them.
func (a act) audit(before, after sessionlocktest.Ledger) (sent int, err error) {
	for user, now := range after.Accounts {
		n := now.Sent - before.Accounts[user].Sent
		sent += n
		if n != a.want[user] {
			err = errors.Join(err, fmt.Errorf("  %d logins of %s, want %d", n, user, a.want[user]))
		}
		if now.OK != now.Sent || now.MaxAtOnce > 1 || now.Live > 1 {
			err = errors.Join(err, fmt.Errorf("  the upstream's account of %s: %+v", user, now))
		}
	}
	if sent == 0 {
		err = errors.Join(err, errors.New("  no login was sent"))
	}
	return sent, err
}

type fleet []process

type process struct {
	cmd     *exec.Cmd
	orders  io.WriteCloser
	reports *json.Decoder
}

// startFleet starts this program again, as workers. They are killed when ctx
// ends, and end by themselves when their standard input does. The database's URL
// has a password in it, so it is no argument, which everybody could read.
func startFleet(ctx context.Context, upstream, database string) (f fleet, err error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	for range processes {
		cmd := exec.CommandContext(ctx, self, workerArg, upstream) //nolint:gosec // this very program
		cmd.Env = append(os.Environ(), databaseEnv+"="+database)
		cmd.Stderr = os.Stderr
		stdin, err1 := cmd.StdinPipe()
		stdout, err2 := cmd.StdoutPipe()
		if err := errors.Join(err1, err2, cmd.Start()); err != nil {
			return f, err
		}
		f = append(f, process{cmd, stdin, json.NewDecoder(stdout)})
	}
	return f, nil
}

func (f fleet) order(word string) (err error) {
	for _, p := range f {
		if _, e := fmt.Fprintln(p.orders, word); e != nil {
			err = errors.Join(err, fmt.Errorf("order to worker %d: %w", p.cmd.Process.Pid, e))
		}
	}
	return err
}

// collect waits for the report of each worker and adds them up.
func (f fleet) collect() (sum report, err error) {
	for _, p := range f {
		var r report
		if e := p.reports.Decode(&r); e != nil {
			err = errors.Join(err, fmt.Errorf("report of worker %d: %w", p.cmd.Process.Pid, e))
		}
		sum.Served += r.Served
		sum.InVain += r.InVain
		sum.Slowest = max(sum.Slowest, r.Slowest)
		if r.Fault != "" {
			sum.Fault = r.Fault
		}
	}
	return sum, err
}

// stop ends the workers: politely, then by pid.
func (f fleet) stop() {
	for _, p := range f {
		_ = p.orders.Close()
	}
	for _, p := range f {
		late := time.AfterFunc(2*time.Second, func() { _ = p.cmd.Process.Kill() })
		_ = p.cmd.Wait()
		late.Stop()
	}
}
