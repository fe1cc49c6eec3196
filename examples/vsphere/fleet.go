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
// ends, and end by themselves when their standard input does. The first line of
// that is p: it has passwords in it, and arguments are for everybody to read.
func startFleet(ctx context.Context, p place) (f fleet, err error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	for range processes {
		cmd := exec.CommandContext(ctx, self, workerArg) //nolint:gosec // this very program
		cmd.Stderr = os.Stderr
		stdin, err1 := cmd.StdinPipe()
		stdout, err2 := cmd.StdoutPipe()
		if err := errors.Join(err1, err2, cmd.Start()); err != nil {
			return f, err
		}
		f = append(f, process{cmd, stdin, json.NewDecoder(stdout)})
		if err := json.NewEncoder(stdin).Encode(p); err != nil {
			return f, err
		}
	}
	return f, nil
}

func (f fleet) order(o order) (err error) {
	for _, p := range f {
		if e := json.NewEncoder(p.orders).Encode(o); e != nil {
			err = errors.Join(err, fmt.Errorf("order to worker %d: %w", p.cmd.Process.Pid, e))
		}
	}
	return err
}

// stopCallers returns what the callers have seen since they were started.
func (f fleet) stopCallers() (sum report, err error) {
	err = f.order(order{})
	for _, p := range f {
		var r report
		if e := p.answers.Decode(&r); e != nil {
			err = errors.Join(err, fmt.Errorf("answer of worker %d: %w", p.cmd.Process.Pid, e))
		}
		sum.add(r)
	}
	return sum, err
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
