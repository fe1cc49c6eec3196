// Package pgserver starts a PostgreSQL for an example: Debian's, or whichever is in
// PATH, with a temporary folder, a free port of loopback and a random password.
package pgserver

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const startLimit = 15 * time.Second

// Server is one that may die and come back, with its data. Its methods are for one
// goroutine, but for Addr and URL.
type Server struct {
	dir, port, password string
	settings            []string
	postgres            string
	cmd                 *exec.Cmd
	exited              chan struct{}
}

// ErrMissing says that there is no PostgreSQL on this machine.
var ErrMissing = errors.New("there is no PostgreSQL in PATH or /usr/lib/postgresql; Debian has it in postgresql (apt-get install postgresql)")

// binaries returns the folder that initdb and postgres are in. Debian has it in
// no PATH.
func binaries() (string, error) {
	folders, _ := filepath.Glob("/usr/lib/postgresql/*/bin")
	if path, err := exec.LookPath("postgres"); err == nil {
		if path, err = filepath.EvalSymlinks(path); err == nil {
			folders = append(folders, filepath.Dir(path))
		}
	}
	for i := len(folders) - 1; i >= 0; i-- {
		if _, err := os.Stat(filepath.Join(folders[i], "initdb")); err == nil {
			return folders[i], nil
		}
	}
	return "", ErrMissing
}

// Start returns when the server answers; Stop ends it. The settings are like those
// in postgresql.conf.
func Start(ctx context.Context, settings ...string) (*Server, error) {
	bin, err := binaries()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "sessionlock-postgres-")
	if err != nil {
		return nil, err
	}
	s := &Server{dir: dir, password: rand.Text(), settings: settings, postgres: filepath.Join(bin, "postgres")}
	secret := filepath.Join(dir, "password")
	if err := errors.Join(os.WriteFile(secret, []byte(s.password), 0o600), giveAway(dir, secret)); err != nil {
		s.Stop()
		return nil, err
	}
	initdb := s.command(ctx, filepath.Join(bin, "initdb"), "--pgdata", s.data(), "--username", "sessionlock",
		"--auth", "scram-sha-256", "--pwfile", secret, "--encoding", "UTF8", "--locale", "C", "--no-sync")
	if out, err := initdb.CombinedOutput(); err != nil {
		s.Stop()
		return nil, fmt.Errorf("initdb: %w\n%s", err, out)
	}
	// Between choosing a port and using it another process can take it.
	for range 5 {
		if s.port, err = freePort(); err == nil {
			err = s.launch(ctx)
		}
		if err == nil {
			return s, nil
		}
	}
	s.Stop()
	return nil, err
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

func (s *Server) data() string { return filepath.Join(s.dir, "data") }

// Addr returns host:port.
func (s *Server) Addr() string { return net.JoinHostPort("127.0.0.1", s.port) }

// URL is what pgx connects to, by way of addr. It holds the password. A new server
// has the database postgres.
func (s *Server) URL(addr, database string) string {
	return fmt.Sprintf("postgres://sessionlock:%s@%s/%s?sslmode=disable", s.password, addr, database)
}

// command returns one that does not run as root, which PostgreSQL refuses, and in
// a folder that it may enter.
func (s *Server) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...) //nolint:gosec // nothing of it comes from outside
	cmd.Dir = s.dir
	cmd.SysProcAttr = unprivileged()
	return cmd
}

// launch starts the process and returns when it takes connections.
func (s *Server) launch(ctx context.Context) error {
	args := []string{"-D", s.data(), "-p", s.port, "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="}
	for _, setting := range s.settings {
		args = append(args, "-c", setting)
	}
	output := &bytes.Buffer{} // to be read when the process has ended
	cmd := s.command(context.WithoutCancel(ctx), s.postgres, args...)
	cmd.Stdout, cmd.Stderr = output, output
	cmd.WaitDelay = time.Second // what a killed server leaves behind may hold its output
	if err := cmd.Start(); err != nil {
		return err
	}
	s.cmd, s.exited = cmd, make(chan struct{})
	go func() {
		defer close(s.exited)
		_ = cmd.Wait()
	}()
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	for !s.ready() {
		select {
		case <-s.exited:
			return fmt.Errorf("PostgreSQL has ended: %s", output)
		case <-ctx.Done():
			s.end(os.Kill)
			return fmt.Errorf("PostgreSQL does not answer: %w: %s", ctx.Err(), output)
		case <-time.After(10 * time.Millisecond):
		}
	}
	return nil
}

// ready looks into the file that says so; its first line is of which process.
func (s *Server) ready() bool {
	b, err := os.ReadFile(filepath.Join(s.data(), "postmaster.pid"))
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return err == nil && lines[0] == strconv.Itoa(s.cmd.Process.Pid) && strings.TrimSpace(lines[len(lines)-1]) == "ready"
}

// Running reports whether the process lives.
func (s *Server) Running() bool {
	select {
	case <-s.exited:
		return false
	default:
		return true
	}
}

// Kill ends the server as a crash would.
func (s *Server) Kill() { s.end(os.Kill) }

// Restart starts a server that was killed again, on its port and data. The first
// tries may find what the killed one has left behind still ending.
func (s *Server) Restart(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	for {
		err := s.launch(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Stop ends the server and removes its data.
func (s *Server) Stop() {
	s.end(syscall.SIGQUIT) // at once, but its own processes first
	_ = os.RemoveAll(s.dir)
}

// end sends sig, and returns when the process is gone.
func (s *Server) end(sig os.Signal) {
	if s.cmd == nil {
		return
	}
	late := time.AfterFunc(5*time.Second, func() { _ = s.cmd.Process.Kill() })
	defer late.Stop()
	if s.cmd.Process.Signal(sig) != nil {
		_ = s.cmd.Process.Kill() // this system does not know sig
	}
	<-s.exited
}
