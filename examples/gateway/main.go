// Gateway shows sessions that are processes: a TCP gateway whose every session has a
// worker process of its own, held by a sessionmanager, and workers that share the
// logins of their users by sessionlock.
//
//	go run ./examples/gateway
//
// Nothing is needed but Go. Opened to capacity, idle, with workers killed, shut
// down under load: each time the example prints what should be seen and what is. It
// asks the operating system's process table (on Linux; elsewhere it says what is not
// checked), the ledger of the API that the workers log in to, and the clients; never
// the manager. A number that is wrong makes the exit status 1. It takes some ten
// seconds.
//
//	go run ./examples/gateway -apart # what that looks like: workers that share nothing
//
// How the libraries are used is in gateway.go and worker.go.
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
	"slices"
	"strconv"
	"syscall"
	"time"

	"github.com/alicebob/miniredis/v2"

	"github.com/sessionlock/sessionlock/sessionlocktest"
	"github.com/sessionlock/sessionlock/sessionmanager"
)

const (
	workerArg = "worker"
	limit     = 25 * time.Second // of the whole; then everything is ended
)

const (
	capacity     = 8
	lease        = 2 * time.Second
	endTime      = 2 * time.Second // that a worker is given to end by itself
	killTime     = 2 * time.Second // that the kernel is given
	shutdownTime = 5 * time.Second // that all are given
)

func main() {
	apart := flag.Bool("apart", false, "have workers share nothing, which makes the logins wrong")
	flag.Parse()
	if flag.NArg() == 1 && flag.Arg(0) == workerArg {
		exit(work())
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	exit(run(ctx, os.Stdout, *apart))
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "gateway:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// run sets the stage and plays the acts, until one goes wrong.
func run(ctx context.Context, out io.Writer, apart bool) (failed error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	upstream, err := sessionlocktest.StartUpstream() //nolint:contextcheck // it ends by Close
	if err != nil {
		return err
	}
	defer upstream.Close()
	upstream.Delay(200 * time.Millisecond) // a login takes its time
	redis := miniredis.NewMiniRedis()
	redis.ClockTTL(true)
	if err := redis.Start(); err != nil {
		return err
	}
	defer redis.Close()
	sessions, err := sessionmanager.New[*worker](
		sessionmanager.WithMax(capacity),
		sessionmanager.WithLease(lease), sessionmanager.WithGrace(lease),
		sessionmanager.WithSweepInterval(100*time.Millisecond),
		sessionmanager.WithCallTimeout(answerTime/2), sessionmanager.WithStartTimeout(answerTime),
		sessionmanager.WithShutdownTimeout(endTime), sessionmanager.WithKillTimeout(killTime),
	)
	if err != nil {
		return err
	}
	gateway, err := startGateway(ctx, sessions, func(user string) place {
		p := place{redis.Addr(), upstream.URL, "gateway", user}
		if apart {
			p.Namespace += rand.Text()
		}
		return p
	})
	if err != nil {
		return err
	}
	s := &stage{out: out, upstream: upstream, sessions: sessions, addr: gateway.listener.Addr().String()}
	defer func() {
		bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTime)
		defer cancel()
		_ = sessions.Shutdown(bounded) // the last act has judged it, or one before was wrong
		s.leave()
		gateway.close()
	}()
	fmt.Fprintf(out, "%-52s %-9s %14s %14s\n", "", "asked", "expected", "seen")
	for i, a := range s.acts() {
		fmt.Fprintf(out, "%d. %s\n", i+1, a.name)
		if err := a.play(ctx); err != nil {
			s.wrong = append(s.wrong, err)
		}
		if len(s.wrong) > 0 || ctx.Err() != nil {
			return fmt.Errorf("%d. %s:\n%w", i+1, a.name, errors.Join(append(s.wrong, ctx.Err())...))
		}
	}
	return nil
}

// stage is what the acts are played on.
type stage struct {
	out      io.Writer
	upstream *sessionlocktest.Upstream
	sessions *manager // to shut it down; nothing else is asked of it
	addr     string   // of the gateway
	clients  []*client
	wrong    []error
}

// leave hangs up.
func (s *stage) leave() {
	for _, c := range s.clients {
		c.close()
	}
}

// expect prints what should be seen and what is, and remembers if that differs.
func (s *stage) expect(what, asked string, want, seen any) {
	s.show(what, asked, want, seen, fmt.Sprint(want) == fmt.Sprint(seen))
}

func (s *stage) show(what, asked string, want, seen any, ok bool) {
	verdict := "ok"
	if !ok {
		verdict = "WRONG"
		s.wrong = append(s.wrong, fmt.Errorf("  %s: %v, want %v", what, seen, want))
	}
	fmt.Fprintf(s.out, "   %-49s %-9s %14v %14v  %s\n", what, asked, want, seen, verdict)
}

// within is for what may take as long as want.
func (s *stage) within(what string, want, seen time.Duration) {
	s.show(what, "clock", "under "+want.String(), seen.Round(time.Millisecond), seen < want)
}

// kernel is expect of the process table.
func (s *stage) kernel(what string, want any, see func(processes) any) {
	p, known, err := children()
	switch {
	case err != nil:
		s.wrong = append(s.wrong, err)
	case !known:
		fmt.Fprintf(s.out, "   %-49s %-9s %14v %14s\n", what, "kernel", want, "NOT CHECKED")
	default:
		s.expect(what, "kernel", want, see(p))
	}
}

// workers expects as many processes, and none that ended without being waited for.
func (s *stage) workers(n int) {
	s.kernel("worker processes", n, func(p processes) any { return len(p.live) })
	s.kernel("zombies", 0, func(p processes) any { return p.zombies })
}

// same expects the processes of these ids, and no others.
func (s *stage) same(what string, pids []string) {
	s.kernel(what, fmt.Sprintf("%d of %d", len(pids), len(pids)), func(p processes) any {
		known := slices.DeleteFunc(slices.Clone(p.live), func(pid string) bool { return !slices.Contains(pids, pid) })
		return fmt.Sprintf("%d of %d", len(known), len(p.live))
	})
}

// ledger expects one login of each user since the start, whose session lives, and
// nothing else.
func (s *stage) ledger(users int) {
	l := s.upstream.Ledger()
	var sum sessionlocktest.Account
	for user, a := range l.Accounts {
		sum.Sent, sum.OK, sum.Live, sum.Logouts = sum.Sent+a.Sent, sum.OK+a.OK, sum.Live+a.Live, sum.Logouts+a.Logouts
		if a.Sent != 1 || a.MaxAtOnce != 1 || a.Refused != 0 {
			s.wrong = append(s.wrong, fmt.Errorf("  %s has logged in %d times, %d at once, and was refused %d times", user, a.Sent, a.MaxAtOnce, a.Refused))
		}
	}
	s.expect("logins since the start: one for each user", "upstream", users, sum.Sent)
	s.expect("live sessions/logouts there", "upstream", fmt.Sprintf("%d/0", users), fmt.Sprintf("%d/%d", sum.Live, sum.Logouts))
	s.expect("requests with unknown tokens", "upstream", 0, l.Strangers)
}

func (s *stage) served() (n int) {
	for _, a := range s.upstream.Ledger().Accounts {
		n += a.Served
	}
	return n
}

// until polls for cond.
func until(ctx context.Context, cond func() bool) error {
	for !cond() {
		pause(ctx, 10*time.Millisecond)
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	return nil
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// kill is kill -9, by somebody who is not the manager.
func kill(pid string) error {
	n, err := strconv.Atoi(pid)
	if err != nil {
		return err
	}
	p, err := os.FindProcess(n)
	if err != nil {
		return err
	}
	defer p.Release() //nolint:errcheck // it has no way to fail
	return p.Kill()
}
