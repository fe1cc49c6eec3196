package main

// fleet.go is the fleet as its parent sees it: processes that take orders and
// answer them.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"time"
)

const processes = 4

type fleet []process

type process struct {
	cmd     *exec.Cmd
	orders  io.WriteCloser
	answers *json.Decoder
}

// startFleet starts this program again, as workers. They are killed when ctx
// ends, and end by themselves when their standard input does.
func startFleet(ctx context.Context, p place) (f fleet, err error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	for range processes {
		cmd := exec.CommandContext(ctx, self, workerArg, p.redis, p.etcd, p.secrets, p.namespace) //nolint:gosec // this very program
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

func (f fleet) order(line string) (err error) {
	for _, p := range f {
		if _, e := fmt.Fprintln(p.orders, line); e != nil {
			err = errors.Join(err, fmt.Errorf("order to worker %d: %w", p.cmd.Process.Pid, e))
		}
	}
	return err
}

// answers returns what each worker answers to its last order.
func answers[T any](f fleet) (all []T, err error) {
	for _, p := range f {
		var a T
		if e := p.answers.Decode(&a); e != nil {
			err = errors.Join(err, fmt.Errorf("answer of worker %d: %w", p.cmd.Process.Pid, e))
		}
		all = append(all, a)
	}
	return all, err
}

// stopCallers returns what the callers have seen since they were started.
func (f fleet) stopCallers() (sum report, err error) {
	err = f.order("stop")
	reports, fault := answers[report](f)
	for _, r := range reports {
		sum.add(r)
	}
	return sum, errors.Join(err, fault)
}

// logins returns those that the fleet has made, by user.
func (f fleet) logins() (made map[string]logins, err error) {
	err = f.order("count")
	ledgers, fault := answers[map[string]logins](f)
	made = map[string]logins{}
	for _, l := range ledgers {
		for user, n := range l {
			made[user] = made[user].plus(n)
		}
	}
	return made, errors.Join(err, fault)
}

// stop ends the workers: politely, then by pid. One that ends badly, with a data
// race for instance, is an error.
func (f fleet) stop() (err error) {
	for _, p := range f {
		_ = p.orders.Close()
	}
	for _, p := range f {
		late := time.AfterFunc(5*time.Second, func() { _ = p.cmd.Process.Kill() })
		if e := p.cmd.Wait(); e != nil {
			err = errors.Join(err, fmt.Errorf("worker %d: %w", p.cmd.Process.Pid, e))
		}
		late.Stop()
	}
	return err
}
