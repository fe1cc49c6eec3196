// Etcd shows a fleet that shares the session of a server nobody here wrote: an
// etcd with passwords, whose tokens die when they idle, and when the password
// changes. 4 processes with 10 callers each put and get; etcd's own metrics say
// how often they have logged in.
//
//	apt-get install etcd-server
//	go run ./examples/etcd
//	go run ./examples/etcd -redis localhost:6379 # on a real Redis
//
// The example starts an etcd of its own, in a temporary folder, and ends it. It
// prints a line for each thing that happens to the fleet. A number that is wrong
// makes the exit status 1. It takes some ten seconds, at most 25.
//
// How the library is used is in worker.go.
package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/alicebob/miniredis/v2"
)

const (
	processes = 4
	workerArg = "worker"
	limit     = 22 * time.Second // of the whole; then everything is ended
)

func main() {
	redisAddr := flag.String("redis", "", "host:port of a real Redis `server`; its other keys are not touched")
	flag.Parse()
	if flag.Arg(0) == workerArg && flag.NArg() == 5 {
		exit(work(place{flag.Arg(1), flag.Arg(2), flag.Arg(3), flag.Arg(4)}))
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	exit(run(ctx, *redisAddr))
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "etcd:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// run sets the stage and plays the acts.
func run(ctx context.Context, redisAddr string) error {
	etcd, err := startEtcd(ctx)
	if err != nil {
		return err
	}
	defer etcd.stop()
	first := secret{1, rand.Text()}
	file := secretFile(filepath.Join(etcd.dir, "secret"))
	if err := errors.Join(etcd.enableAuth(ctx, first.Password), file.write(first)); err != nil {
		return err
	}
	if redisAddr == "" {
		m := miniredis.NewMiniRedis()
		m.ClockTTL(true)
		if err := m.Start(); err != nil {
			return err
		}
		defer m.Close()
		redisAddr = m.Addr()
	}
	workers, err := startFleet(ctx, place{redisAddr, string(etcd.gateway), string(file), "etcd-" + rand.Text()})
	defer workers.stop()
	if err != nil {
		return err
	}
	s := &stage{etcd, file, workers}
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
	etcd    *server
	secret  secretFile
	workers fleet
}

// act is one thing that happens to the fleet.
type act struct {
	name           string
	before, during func(context.Context) error // what happens before the callers are at work, and meanwhile
	want           logins
}

func (s *stage) acts() []act {
	return []act{
		{"all put and get, cold", nil, nil, logins{ok: 1}},
		{"the token has idled away", idle, nil, logins{ok: 1}},
		{"the password is changed at work", nil, s.rotate, logins{ok: 1, denied: 1}},
	}
}

func idle(ctx context.Context) error {
	pause(ctx, 2*tokenTTL)
	return ctx.Err()
}

// rotate changes the password and tells the fleet only when it has been denied:
// the wrong order, and a common one. The slowest wait here has three parts. The
// token of the act before has died young, as this one does, and after two in a
// row the fleet waits a second before it logs in; that login is denied, and
// nobody sends another for the second that rotate watches; then the new password
// is used at once, although a denial is kept for 15 minutes.
func (s *stage) rotate(ctx context.Context) error {
	next := secret{2, rand.Text()}
	if err := s.etcd.changePassword(ctx, next.Password); err != nil {
		return err
	}
	watching, cancel := context.WithTimeout(ctx, 6*time.Second)
	defer cancel()
	for {
		switch seen, err := s.etcd.seen(watching); {
		case err != nil:
			return err
		case seen.denied > 0:
			pause(ctx, time.Second) // nobody tries it a second time
			return s.secret.write(next)
		}
		pause(ctx, 50*time.Millisecond)
	}
}

// play has the workers play a, prints its line, and holds what callers and etcd
// have seen against what should have happened.
func (s *stage) play(ctx context.Context, title string, a act) error {
	was, err := s.etcd.seen(ctx)
	if a.before != nil {
		err = errors.Join(err, a.before(ctx))
	}
	err = errors.Join(err, s.workers.order("start"))
	if a.during != nil {
		err = errors.Join(err, a.during(ctx))
	}
	err = errors.Join(err, s.workers.order("stop"))
	got, fault := s.workers.collect()
	now, unseen := s.etcd.seen(ctx)
	if err = errors.Join(err, fault, unseen); unseen != nil {
		return fmt.Errorf("%s:\n%w", title, err)
	}

	check := func(ok bool, format string, args ...any) {
		if !ok {
			err = errors.Join(err, fmt.Errorf("  "+format, args...))
		}
	}
	did := now.since(was)
	check(did == a.want, "logins: %+v, want %+v", did, a.want)
	check(got.Served >= processes*callers, "%d round trips, want %d or more", got.Served, processes*callers)
	check((got.Denied > 0) == (a.want.denied > 0), "%d tries told that the password is wrong", got.Denied)
	check(got.Fault == "", "%s", got.Fault)
	verdict := "ok"
	if err != nil {
		verdict = "WRONG"
		err = fmt.Errorf("%s:\n%w", title, err)
	}
	fmt.Printf("%-35s %d callers, logins: %d, denied: %d, slowest wait %v: %s\n", title,
		processes*callers, did.ok, did.denied, got.Slowest.Round(time.Millisecond), verdict)
	return err
}

type fleet []process

type process struct {
	cmd     *exec.Cmd
	orders  io.WriteCloser
	reports *json.Decoder
}

// startFleet starts this program again, as workers. They are killed when ctx
// ends, and end by themselves when their standard input does.
func startFleet(ctx context.Context, p place) (f fleet, err error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	for range processes {
		cmd := exec.CommandContext(ctx, self, workerArg, p.redis, p.etcd, p.secret, p.namespace) //nolint:gosec // this very program
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
		sum.Denied += r.Denied
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
