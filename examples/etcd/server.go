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

const (
	tokenTTL     = 2 * time.Second // a token that idles for it dies, up to a second later
	rootPassword = "root's"
)

type server struct {
	gateway
	dir    string
	end    context.CancelFunc
	exited chan struct{}
	output bytes.Buffer // to be read when exited is closed
	logins int          // root's: not the fleet's
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
	ctx, end := context.WithCancel(ctx)
	s := &server{gateway: gateway(urls[0]), dir: dir, end: end, exited: make(chan struct{})}
	cmd := exec.CommandContext(ctx, path, //nolint:gosec // etcd, and nothing of it comes from outside
		"--data-dir", filepath.Join(dir, "data"),
		"--listen-client-urls", urls[0], "--advertise-client-urls", urls[0],
		"--listen-peer-urls", urls[1], "--initial-advertise-peer-urls", urls[1], "--initial-cluster", "default="+urls[1],
		"--auth-token", "simple", "--auth-token-ttl", strconv.Itoa(int(tokenTTL.Seconds())),
		"--logger", "zap", "--log-level", "error")
	cmd.Env = append(os.Environ(), "ETCD_UNSUPPORTED_ARCH="+runtime.GOARCH) // 3.4 calls arm64 that, and works
	cmd.Stdout, cmd.Stderr = &s.output, &s.output
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 2 * time.Second // then it is killed
	if err := cmd.Start(); err != nil {
		end()
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	go func() {
		_ = cmd.Wait()
		close(s.exited)
	}()
	if err := s.ready(ctx); err != nil {
		s.stop()
		return nil, fmt.Errorf("start etcd: %w\n%s", err, s.output.Bytes())
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
		case <-s.exited:
			return errors.New("it has ended")
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (s *server) stop() {
	s.end()
	<-s.exited
	_ = os.RemoveAll(s.dir)
}

func (s *server) get(ctx context.Context, path string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, string(s.gateway)+path, http.NoBody)
	if err != nil {
		return nil, err
	}
	return httpClient.Do(req)
}

// enableAuth makes the users root and app, and gives app the keys app/… .
func (s *server) enableAuth(ctx context.Context, password string) error {
	type object map[string]any
	for _, step := range []struct {
		path string
		in   object
	}{
		{"user/add", object{"name": "root", "password": rootPassword}},
		{"role/add", object{"name": "root"}},
		{"user/grant", object{"user": "root", "role": "root"}},
		{"user/add", object{"name": user, "password": password}},
		{"role/add", object{"name": user}},
		{"role/grant", object{"name": user, "perm": object{
			"permType": "READWRITE", "key": []byte(user + "/"), "range_end": []byte(user + "0"), // '0' follows '/'
		}}},
		{"user/grant", object{"user": user, "role": user}},
		{"enable", object{}},
	} {
		if err := s.post(ctx, "/v3/auth/"+step.path, "", step.in, nil); err != nil {
			return err
		}
	}
	return nil
}

// changePassword also ends all of the user's tokens.
func (s *server) changePassword(ctx context.Context, password string) error {
	var root struct{ Token string }
	s.logins++
	if err := s.post(ctx, "/v3/auth/authenticate", "", map[string]string{"name": "root", "password": rootPassword}, &root); err != nil {
		return err
	}
	return s.post(ctx, "/v3/auth/user/changepw", root.Token, map[string]string{"name": user, "password": password}, nil)
}

// logins are those of the fleet, as etcd has counted them.
type logins struct{ ok, denied, other int }

func (n logins) since(was logins) logins {
	return logins{n.ok - was.ok, n.denied - was.denied, n.other - was.other}
}

// seen reads etcd's metrics.
func (s *server) seen(ctx context.Context) (n logins, err error) {
	res, err := s.get(ctx, "/metrics")
	if err != nil {
		return n, err
	}
	defer res.Body.Close()
	lines := bufio.NewScanner(res.Body)
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), "} ")
		if !strings.HasPrefix(name, "grpc_server_handled_total{") || !strings.Contains(name, `grpc_method="Authenticate"`) {
			continue
		}
		count, err := strconv.Atoi(value)
		if err != nil {
			return n, err
		}
		switch {
		case strings.Contains(name, `grpc_code="OK"`):
			n.ok = count - s.logins
		case strings.Contains(name, `grpc_code="InvalidArgument"`):
			n.denied = count
		default:
			n.other += count
		}
	}
	return n, lines.Err()
}
