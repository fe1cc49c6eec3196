package main

// redis.go is a Redis for the nodes to meet at. It has written to disk whatever it
// acknowledges, so that it may be killed and come back with it.

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
)

const redisServer = "redis-server"

// errNoRedis says that there is none on this machine.
var errNoRedis = errors.New("there is no " + redisServer + " in PATH; Debian has it in redis-server (apt-get install redis-server)")

// database is a Redis on a free port of loopback, with its files in a temporary folder.
// Its methods are for one goroutine, but for addr.
type database struct {
	port, dir string
	keeper    *child // nil while it is killed
}

func startRedis() (d *database, err error) {
	if _, err := exec.LookPath(redisServer); err != nil {
		return nil, errNoRedis
	}
	d = &database{}
	if d.dir, err = os.MkdirTemp("", "sessionlock-relay-"); err != nil {
		return nil, err
	}
	for range 5 { // between choosing a port and using it another process can take it
		if d.port, err = freePort(); err == nil {
			err = d.start()
		}
		if err == nil {
			return d, nil
		}
	}
	return nil, errors.Join(err, d.stop())
}

func freePort() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // returns at once
	if err != nil {
		return "", err
	}
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	return port, err
}

func (d *database) addr() string { return net.JoinHostPort("127.0.0.1", d.port) }

// start returns when the Redis has read its files and takes connections.
func (d *database) start() (err error) {
	d.keeper, _, err = startChild("the Redis", redisArg, []string{
		"--bind", "127.0.0.1", "--port", d.port, "--dir", d.dir, "--save", "", "--appendonly", "yes", "--appendfsync", "always",
	})
	return err
}

// kill ends the Redis as a crash does (SIGKILL), and returns when it is dead.
func (d *database) kill() (err error) {
	if d.keeper != nil {
		err = d.keeper.end()
		d.keeper = nil
	}
	return err
}

func (d *database) restart() error { return errors.Join(d.kill(), d.start()) }

// stop ends the Redis for good, and removes its files.
func (d *database) stop() error { return errors.Join(d.kill(), os.RemoveAll(d.dir)) }

// keep runs a redis-server until standard input ends, and then kills it. It stands
// between the example and the server because the server would outlive an example that
// is killed.
func keep() error {
	var args []string
	over, err := told(&args)
	if err != nil {
		return err
	}
	server := exec.Command(redisServer, args...) //nolint:gosec,noctx // by its name; it ends with the input
	server.Stderr = os.Stderr
	log, err := server.StdoutPipe()
	if err != nil {
		return err
	}
	if err := server.Start(); err != nil {
		return err
	}
	go func() {
		<-over
		_ = server.Process.Kill()
	}()
	lines, last := bufio.NewScanner(log), ""
	for lines.Scan() {
		if last = lines.Text(); strings.Contains(last, "Ready to accept connections") {
			fmt.Println("ready")
			break
		}
	}
	_, _ = io.Copy(io.Discard, log)
	err = server.Wait()
	select {
	case <-over:
		return nil
	default:
	}
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", redisServer, err, last)
	}
	return err
}
