package main

// server.go is an etcd of our own, in a temporary folder and on free ports of
// loopback, and what root does with it.

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"
)

const rootPassword = "root's"

// server is an etcd that may die and come back, with its data. Its methods are
// for one goroutine.
type server struct {
	gateway
	dir     string
	command []string
	life    *life
	past    logins // of lives that are over
	root    int    // logins of root in this life: not the fleet's
}

// life is one run of the program.
type life struct {
	end    context.CancelFunc
	exited chan struct{}
	output bytes.Buffer // to be read when exited is closed
}

// startEtcd returns when etcd answers. It lives until stop, or until ctx ends.
func startEtcd(ctx context.Context) (*server, error) {
	path, err := exec.LookPath("etcd")
	if err != nil {
		return nil, fmt.Errorf("there is no etcd in PATH; Debian has it in etcd-server (apt-get install etcd-server): %w", err)
	}
	urls, err := freeURLs(2)
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "sessionlock-etcd-")
	if err != nil {
		return nil, err
	}
	s := &server{gateway: gateway(urls[0]), dir: dir, command: []string{
		path, "--data-dir", filepath.Join(dir, "data"),
		"--listen-client-urls", urls[0], "--advertise-client-urls", urls[0],
		"--listen-peer-urls", urls[1], "--initial-advertise-peer-urls", urls[1], "--initial-cluster", "default=" + urls[1],
		"--heartbeat-interval", "50", "--election-timeout", "500", // it is alone: the election is all that it waits for
		"--auth-token", "simple", "--auth-token-ttl", strconv.Itoa(int(tokenTTL.Seconds())),
		"--logger", "zap", "--log-level", "error",
	}}
	if err := s.start(ctx); err != nil {
		s.stop()
		return nil, err
	}
	return s, nil
}

func freeURLs(n int) (urls []string, err error) {
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // returns at once
		if err != nil {
			return nil, err
		}
		defer l.Close()
		urls = append(urls, "http://"+l.Addr().String())
	}
	return urls, nil
}

// start begins a life. A port of ours may be somebody's for a moment, of a
// connection that goes out for instance, so it is tried again.
func (s *server) start(ctx context.Context) (err error) {
	for range 3 {
		if err = s.launch(ctx); err == nil || ctx.Err() != nil {
			return err
		}
		pause(ctx, 500*time.Millisecond)
	}
	return err
}

func (s *server) launch(ctx context.Context) error {
	running, end := context.WithCancel(ctx)
	s.life = &life{end: end, exited: make(chan struct{})}
	l := s.life
	cmd := exec.CommandContext(running, s.command[0], s.command[1:]...)     //nolint:gosec // etcd, and nothing of it comes from outside
	cmd.Env = append(os.Environ(), "ETCD_UNSUPPORTED_ARCH="+runtime.GOARCH) // 3.4 calls arm64 that, and works
	cmd.Stdout, cmd.Stderr = &l.output, &l.output
	if err := cmd.Start(); err != nil {
		close(l.exited)
		return err
	}
	go func() {
		_ = cmd.Wait()
		close(l.exited)
	}()
	if err := s.ready(ctx); err != nil {
		l.kill()
		return fmt.Errorf("start etcd: %w\n%s", err, l.output.Bytes())
	}
	return nil
}

func (s *server) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for {
		if res, err := s.get(ctx, "/health"); err == nil {
			res.Body.Close()
			if res.StatusCode == http.StatusOK {
				return nil
			}
		}
		select {
		case <-s.life.exited:
			return errors.New("it has ended")
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// kill ends the life as a crash would (SIGKILL).
func (l *life) kill() {
	l.end()
	<-l.exited
}

// crash kills etcd. Its counts die with it, so they are read first; a login in
// the moment between would be missing, and show when the workers are asked.
func (s *server) crash(ctx context.Context) (err error) {
	s.past, err = s.seen(ctx)
	s.root = 0
	s.life.kill()
	return err
}

func (s *server) stop() {
	s.life.kill()
	_ = os.RemoveAll(s.dir)
}

func (s *server) get(ctx context.Context, path string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, string(s.gateway)+path, http.NoBody)
	if err != nil {
		return nil, err
	}
	return httpClient.Do(req)
}

// enableAuth makes root and the users, and gives each the keys user/… .
func (s *server) enableAuth(ctx context.Context, passwords map[string]string) error {
	type object map[string]any
	type step struct {
		path string
		in   object
	}
	steps := []step{
		{"user/add", object{"name": "root", "password": rootPassword}},
		{"role/add", object{"name": "root"}},
		{"user/grant", object{"user": "root", "role": "root"}},
	}
	for user, password := range passwords {
		steps = append(
			steps,
			step{"user/add", object{"name": user, "password": password}},
			step{"role/add", object{"name": user}},
			step{"role/grant", object{"name": user, "perm": object{
				"permType": "READWRITE", "key": []byte(user + "/"), "range_end": []byte(user + "0"), // '0' follows '/'
			}}},
			step{"user/grant", object{"user": user, "role": user}},
		)
	}
	for _, step := range append(steps, step{"enable", object{}}) {
		if err := s.post(ctx, "/v3/auth/"+step.path, "", step.in, nil); err != nil {
			return err
		}
	}
	return nil
}

// changePassword also ends all of the user's tokens.
func (s *server) changePassword(ctx context.Context, user, password string) error {
	var root struct{ Token string }
	s.root++
	if err := s.post(ctx, "/v3/auth/authenticate", "", map[string]string{"name": "root", "password": rootPassword}, &root); err != nil {
		return err
	}
	return s.post(ctx, "/v3/auth/user/changepw", root.Token, map[string]string{"name": user, "password": password}, nil)
}

// seen returns the fleet's logins as etcd has counted them, in its metrics.
func (s *server) seen(ctx context.Context) (logins, error) {
	res, err := s.get(ctx, "/metrics")
	if err != nil {
		return logins{}, err
	}
	defer res.Body.Close()
	var n logins
	lines := bufio.NewScanner(res.Body)
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), "} ")
		if !strings.HasPrefix(name, "grpc_server_handled_total{") || !strings.Contains(name, `grpc_method="Authenticate"`) {
			continue
		}
		count, err := strconv.Atoi(value)
		if err != nil {
			return logins{}, err
		}
		switch {
		case strings.Contains(name, `grpc_code="OK"`):
			n.OK = count - s.root
		case strings.Contains(name, `grpc_code="InvalidArgument"`):
			n.Denied = count
		default:
			n.Other += count
		}
	}
	return s.past.plus(n), lines.Err()
}
