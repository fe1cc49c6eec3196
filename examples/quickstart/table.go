package main

// table.go is the fleet as its parent sees it: processes, what they report, and
// a table of that which is redrawn while they work.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/sessionlock/sessionlock/sessionlocktest"
)

const processes = 8

type fleet []*process

type process struct {
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	orders *json.Encoder

	mu     sync.Mutex
	report report
	ended  bool
}

// startFleet starts this program again, as workers. They are killed when ctx
// ends, and end by themselves when their standard input does.
func startFleet(ctx context.Context, p place) (fleet, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	var f fleet
	for range processes {
		cmd := exec.CommandContext(ctx, self, workerArg, p.redis, p.upstream, p.namespace) //nolint:gosec // this very program
		cmd.Stderr = os.Stderr
		stdin, err1 := cmd.StdinPipe()
		stdout, err2 := cmd.StdoutPipe()
		if err := errors.Join(err1, err2, cmd.Start()); err != nil {
			return f, err
		}
		proc := &process{cmd: cmd, stdin: stdin, orders: json.NewEncoder(stdin)}
		f = append(f, proc)
		go proc.listen(json.NewDecoder(stdout))
	}
	return f, nil
}

func (p *process) listen(reports *json.Decoder) {
	for {
		var r report
		err := reports.Decode(&r)
		p.mu.Lock()
		p.ended = err != nil
		if err == nil {
			p.report = r
		}
		p.mu.Unlock()
		if err != nil {
			return
		}
	}
}

func (p *process) state() (report, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.report, p.ended
}

// stop ends the workers: politely, then by pid.
func (f fleet) stop() {
	for _, p := range f {
		_ = p.stdin.Close()
	}
	for _, p := range f {
		late := time.AfterFunc(2*time.Second, func() { _ = p.cmd.Process.Kill() })
		_ = p.cmd.Wait()
		late.Stop()
	}
}

func (f fleet) order(o order) (err error) {
	for _, p := range f {
		if e := p.orders.Encode(o); e != nil {
			err = errors.Join(err, fmt.Errorf("order to worker %d: %w", p.cmd.Process.Pid, e))
		}
	}
	return err
}

// await waits until all processes have finished act, and returns their sum.
func (f fleet) await(ctx context.Context, act int) (sum report, err error) {
	err = until(ctx, func() bool {
		sum = report{Act: act, Done: true}
		for _, p := range f {
			r, ended := p.state()
			if sum.Done = sum.Done && r.Act == act && r.Done; ended {
				sum.Fault = fmt.Sprintf("worker %d has ended", p.cmd.Process.Pid)
				return true
			}
			sum.add(r)
		}
		return sum.Done
	})
	return sum, err
}

func (r *report) add(o report) {
	r.Served += o.Served
	r.Denied += o.Denied
	r.Retries += o.Retries
	r.Slowest = max(r.Slowest, o.Slowest)
	if o.Fault != "" {
		r.Fault = o.Fault
	}
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

// watch shows fleet and ledger until the returned func is called: as a table in
// place on a terminal, as a line per second elsewhere.
func watch(title string, f fleet, u *sessionlocktest.Upstream) (stop func()) {
	terminal := false
	if info, err := os.Stdout.Stat(); err == nil {
		terminal = info.Mode()&os.ModeCharDevice != 0
	}
	over, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		if !terminal {
			printLines(title, f, u, over)
			return
		}
		for last := false; !last; {
			select {
			case <-over:
				last = true
			case <-time.After(100 * time.Millisecond):
			}
			table := f.table(title, u)
			fmt.Print("\x1b[J", table)
			fmt.Printf("\x1b[%dA", strings.Count(table, "\n"))
		}
		fmt.Print("\x1b[J")
	}()
	return func() {
		close(over)
		<-ended
	}
}

func printLines(title string, f fleet, u *sessionlocktest.Upstream, over <-chan struct{}) {
	for {
		select {
		case <-over:
			return
		case <-time.After(time.Second):
		}
		var sum report
		for _, p := range f {
			r, _ := p.state()
			sum.add(r)
		}
		sent := 0
		for _, a := range u.Ledger().Accounts {
			sent += a.Sent
		}
		fmt.Printf("  %s: %d calls served, %d tries in vain, slowest wait %v; %d logins since the start\n",
			title, sum.Served, sum.Retries, sum.Slowest.Round(time.Millisecond), sent)
	}
}

func (f fleet) table(title string, u *sessionlocktest.Upstream) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n\n", title)
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "process\tcallers\tserved\tdenied\tin vain\tslowest wait\t")
	for _, p := range f {
		r, _ := p.state()
		fmt.Fprintf(w, "%d\t%d\t%d\t%d\t%d\t%v\t\n", p.cmd.Process.Pid, callers, r.Served, r.Denied, r.Retries, r.Slowest.Round(time.Millisecond))
	}
	_ = w.Flush()
	fmt.Fprintf(&b, "\nthe upstream's ledger\n%s", u.Ledger())
	return b.String()
}
