// Package redistest gives tests a Redis to work on: a real redis-server, a
// miniredis over TCP or inside a testing/synctest bubble, and a proxy that
// breaks the way to either.
//
// It is for tests only; nothing that is not a test may import it.
package redistest

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"
)

const (
	binary   = "redis-server"
	require  = "SESSIONLOCK_REQUIRE_REDIS"
	patience = 10 * time.Second // for anything a healthy server does at once
)

// Server is a real redis-server on a loopback port. Unless it is StartDurable's it
// keeps nothing on disk: a restart is also a loss of all data. Its methods are for one goroutine at a
// time, except Addr.
type Server struct {
	tb   testing.TB
	kind kind
	port string
	dir  string
	cmd  *exec.Cmd
	out  *output
	info int64 // commands this Server itself has sent since the process started
}

// kind is how a server differs from a plain one.
type kind struct {
	args func(s *Server) []string // the command line; nil: a plain server's
	port func(tb testing.TB) string
	tls  *tls.Config          // of its clients; nil: it speaks plain TCP
	user func(*redis.Options) // who its clients are; nil: the default user
}

// Start starts a server that answers before Start returns and is killed when
// the test ends. Without a redis-server in PATH it skips the test, or fails it
// when SESSIONLOCK_REQUIRE_REDIS=1.
func Start(tb testing.TB) *Server {
	tb.Helper()
	return start(tb, kind{})
}

// StartDurable starts a server like Start's that has written to disk whatever it
// acknowledges: a restart loses nothing.
func StartDurable(tb testing.TB) *Server {
	tb.Helper()
	return start(tb, kind{args: func(s *Server) []string {
		return append(s.plain(), "--appendonly", "yes", "--appendfsync", "always")
	}})
}

func start(tb testing.TB, k kind) *Server {
	tb.Helper()
	if k.args == nil {
		k.args = (*Server).plain
	}
	if k.port == nil {
		k.port = freePort
	}
	if _, err := exec.LookPath(binary); err != nil {
		missing(tb, err)
	}
	s := &Server{tb: tb, kind: k, dir: tb.TempDir()}
	tb.Cleanup(s.Stop)
	// Between choosing a free port and the server's bind another process can
	// take it, so a few ports are tried.
	var err error
	for range 5 {
		s.port = k.port(tb)
		if err = s.launch(); err == nil {
			return s
		}
		s.Stop()
	}
	tb.Fatalf("redistest: start %s: %v", binary, err)
	return nil
}

func missing(tb testing.TB, err error) {
	tb.Helper()
	const hint = "redistest: %v: install redis-server 6.2 or later (Debian: apt-get install redis-server)"
	if os.Getenv(require) == "1" {
		tb.Fatalf(hint+"; "+require+"=1 forbids skipping", err)
	}
	tb.Skipf(hint+"; THIS TEST DID NOT RUN", err)
}

func freePort(tb testing.TB) string {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // returns at once
	if err != nil {
		tb.Fatalf("redistest: find a free port: %v", err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

// plain is the command line of a server that keeps nothing on disk.
func (s *Server) plain() []string {
	return []string{"--save", "", "--appendonly", "no", "--bind", "127.0.0.1", "--port", s.port, "--dir", s.dir}
}

// launch starts the process and waits until it answers. What answers must be
// this very process: on a stolen port it may be another test's server.
func (s *Server) launch() error {
	s.info, s.out = 0, &output{}
	s.cmd = exec.Command(binary, s.kind.args(s)...) //nolint:noctx // ends by Stop
	s.cmd.Stdout, s.cmd.Stderr = s.out, s.out
	if err := s.cmd.Start(); err != nil {
		return err
	}
	var err error
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		var pid int64
		if pid, err = s.stat("server", "process_id"); err != nil {
			continue
		}
		if pid == int64(s.cmd.Process.Pid) {
			return nil
		}
		return fmt.Errorf("port %s belongs to process %d: %s", s.port, pid, s.out)
	}
	return fmt.Errorf("no answer: %w: %s", err, s.out)
}

// Addr returns host:port.
func (s *Server) Addr() string { return net.JoinHostPort("127.0.0.1", s.port) }

// Client returns a client with go-redis' default options and what it takes to
// get in, changed by opts in their order. It is closed when the test ends.
func (s *Server) Client(opts ...func(*redis.Options)) *redis.Client {
	s.tb.Helper()
	o := &redis.Options{Addr: s.Addr(), TLSConfig: s.kind.tls.Clone()}
	if s.kind.user != nil {
		s.kind.user(o)
	}
	return client(s.tb, o, opts)
}

// Stop kills the server as a crash would (SIGKILL) and waits until it is gone.
// Stopping a stopped server does nothing.
func (s *Server) Stop() {
	if s.cmd == nil || s.cmd.Process == nil {
		return
	}
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait()
	s.cmd = nil
}

// Restart starts the server again on its port, empty unless it is durable, stopping
// it first if it runs.
func (s *Server) Restart() {
	s.tb.Helper()
	s.Stop()
	if err := s.launch(); err != nil {
		s.tb.Fatalf("redistest: restart: %v", err)
	}
}

// Pause freezes the server: connections stay open, new ones are accepted by the
// kernel, nothing is answered.
func (s *Server) Pause() { s.tb.Helper(); s.signal(sigstop) }

// Resume lets a paused server go on with all it has received meanwhile.
func (s *Server) Resume() { s.tb.Helper(); s.signal(sigcont) }

func (s *Server) signal(sig os.Signal) {
	s.tb.Helper()
	if sig == nil {
		s.tb.Skip("redistest: this system has no SIGSTOP; THIS TEST DID NOT RUN")
	}
	if s.cmd == nil {
		s.tb.Fatal("redistest: signal: server is stopped")
	}
	if err := s.cmd.Process.Signal(sig); err != nil {
		s.tb.Fatalf("redistest: signal: %v", err)
	}
}

// Commands returns how many commands the server has processed since it started,
// those sent by this method left out. Everything else counts, handshakes of new
// connections too.
func (s *Server) Commands() int64 {
	s.tb.Helper()
	own := s.info
	n, err := s.stat("stats", "total_commands_processed")
	if err != nil {
		s.tb.Fatalf("redistest: count commands: %v", err)
	}
	return n - own
}

// stat reads one number of INFO.
func (s *Server) stat(section, field string) (int64, error) {
	v, err := s.lookup("INFO "+section, field)
	if err != nil {
		return 0, err
	}
	s.info++
	return strconv.ParseInt(v, 10, 64)
}

// lookup sends a command whose answer is lines of name:value, and returns one
// value. It does so by hand over a connection of its own: a client library would
// add commands of its own to the count, and not every kind of server takes them.
func (s *Server) lookup(command, field string) (string, error) {
	c, err := net.DialTimeout("tcp", s.Addr(), time.Second) //nolint:noctx // bounded
	if err != nil {
		return "", err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(patience))
	if s.kind.tls != nil {
		c = tls.Client(c, s.kind.tls)
	}
	if _, err = fmt.Fprintf(c, "%s\r\n", command); err != nil {
		return "", err
	}
	lines := bufio.NewScanner(c)
	for lines.Scan() {
		if v, ok := strings.CutPrefix(lines.Text(), field+":"); ok {
			return v, nil
		}
		if strings.HasPrefix(lines.Text(), "-") {
			return "", fmt.Errorf("%s: %s", command, lines.Text())
		}
	}
	return "", fmt.Errorf("no %s in %s: %w", field, command, lines.Err())
}

// output keeps what the server printed, for the message of a failed start.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// Each runs f on a miniredis and on a real server, both over TCP and with
// go-redis' default options, as subtests "miniredis" and "redis".
func Each(t *testing.T, f func(t *testing.T, rdb *redis.Client)) {
	t.Helper()
	t.Run("miniredis", func(t *testing.T) {
		f(t, client(t, &redis.Options{Addr: miniredis.RunT(t).Addr()}, nil))
	})
	t.Run("redis", func(t *testing.T) { f(t, Start(t).Client()) })
}

// Bubble returns a miniredis for a testing/synctest bubble and a func that makes
// clients of it; both are closed when the bubble's test ends. Nothing touches a
// socket, so the bubble's clock runs, and it also runs the TTLs.
//
// A dialer of your own, to add faults, should start from [Dial], and must not
// sleep in Write nor stall a handshake on a connection that subscribes, for the
// reason given there.
func Bubble(tb testing.TB) (*miniredis.Miniredis, func(opts ...func(*redis.Options)) *redis.Client) {
	tb.Helper()
	m := miniredis.NewMiniRedis()
	m.ClockTTL(true)
	tb.Cleanup(m.Close)
	return m, func(opts ...func(*redis.Options)) *redis.Client {
		tb.Helper()
		return client(tb, &redis.Options{
			Addr: "127.0.0.1:6379", // never dialled; a name would be looked up
			Dialer: func(ctx context.Context, _, _ string) (net.Conn, error) {
				if err := ctx.Err(); err != nil {
					return nil, err
				}
				return Dial(m)
			},
			PoolSize:                 200,
			MaintNotificationsConfig: &maintnotifications.Config{Mode: maintnotifications.ModeDisabled},
		}, opts)
	}
}

func client(tb testing.TB, o *redis.Options, opts []func(*redis.Options)) *redis.Client {
	tb.Helper()
	for _, opt := range opts {
		opt(o)
	}
	rdb := redis.NewClient(o)
	tb.Cleanup(func() { _ = rdb.Close() })
	return rdb
}
