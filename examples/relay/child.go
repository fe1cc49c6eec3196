package main

// child.go starts this program again, as what else it takes: nodes, and the keeper of
// a Redis.

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

// The program is started again as one of these.
const (
	nodeArg  = "node"
	redisArg = "redis"
)

const (
	startLimit = 15 * time.Second
	endLimit   = 10 * time.Second
)

// child is a process of this program that ends with its standard input: when its
// parent does, however that ends.
type child struct {
	name  string
	cmd   *exec.Cmd
	stdin io.WriteCloser
}

// startChild starts one, tells it what it has to know, and returns what it says first.
func startChild(name, kind string, setup any) (c *child, said string, err error) {
	self, err := os.Executable()
	if err != nil {
		return nil, "", err
	}
	c = &child{name: name, cmd: exec.Command(self, kind)} //nolint:gosec,noctx // this very program; it ends with its input
	c.cmd.Stderr = os.Stderr
	stdin, err1 := c.cmd.StdinPipe()
	stdout, err2 := c.cmd.StdoutPipe()
	if err := errors.Join(err1, err2, c.cmd.Start()); err != nil {
		return nil, "", err
	}
	c.stdin = stdin
	late := time.AfterFunc(startLimit, func() { _ = stdin.Close() })
	defer late.Stop()
	if err = json.NewEncoder(stdin).Encode(setup); err == nil {
		said, err = bufio.NewReader(stdout).ReadString('\n')
	}
	if err != nil {
		return nil, "", fmt.Errorf("%s does not start: %w", name, errors.Join(err, c.end()))
	}
	return c, strings.TrimSpace(said), nil
}

// kill ends the process as a crash does (SIGKILL), and returns when it is dead.
func (c *child) kill() {
	_ = c.cmd.Process.Kill()
	_ = c.cmd.Wait()
}

// end ends the process: politely, then by kill. One that ends badly, with a data race
// for instance, is an error.
func (c *child) end() error {
	_ = c.stdin.Close()
	late := time.AfterFunc(endLimit, func() { _ = c.cmd.Process.Kill() })
	defer late.Stop()
	if err := c.cmd.Wait(); err != nil {
		return fmt.Errorf("%s: %w", c.name, err)
	}
	return nil
}

// told is the child's side: it reads its setup, and returns a channel that is closed
// when standard input ends. Ctrl-C and the like reach children too, and are left to the
// parent.
func told(setup any) (over <-chan struct{}, err error) {
	signal.Ignore(os.Interrupt, syscall.SIGTERM)
	err = json.NewDecoder(os.Stdin).Decode(setup)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_, _ = io.Copy(io.Discard, os.Stdin)
	}()
	return ended, err
}
