// Relay shows sessions that outlive their connections: two nodes, each a process with
// a WebSocket endpoint, and clients that are cut off, come back to the other node, and
// have nothing lost and nothing twice.
//
//	apt-get install redis-server
//	go -C examples/relay run .
//
// A client loses its connection in the middle of 1 000 messages; another one stutters,
// and loses it ten times; nodes ask a third, which answers twice; a node is killed at
// work, and then the Redis (SIGKILL); a stranger wants somebody's session. Each time the
// example prints how much was sent, what the receivers' own books say has come of it,
// and how long each client was without a home. A number that is wrong makes the exit
// status 1. It takes some ten seconds, and ends all that it has started.
//
//	go -C examples/relay run . -forgetful # what that looks like: clients that act on whatever comes
//
// What to copy is in node.go and client.go, and the protocol in protocol.go.
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
	"sync"
	"syscall"
	"time"

	"github.com/redis/go-redis/v9"
)

const limit = 55 * time.Second // of the acts; then everything is ended

func main() {
	if len(os.Args) == 2 && os.Args[1] == nodeArg {
		exit(work())
	}
	if len(os.Args) == 2 && os.Args[1] == redisArg {
		exit(keep())
	}
	forgetful := flag.Bool("forgetful", false, "have clients act on whatever comes, known or not, which makes the numbers wrong")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	exit(run(ctx, os.Stdout, *forgetful))
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "relay:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// run sets the stage and plays the acts, all of them, even when one goes wrong.
func run(ctx context.Context, out io.Writer, forgetful bool) (failed error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	s, err := newStage()
	defer func() { failed = errors.Join(failed, s.close()) }()
	if err != nil {
		return err
	}
	s.forgetful = forgetful
	fmt.Fprintf(out, "%d nodes, one Redis; sent, and what the receivers' books say\n", nodes)
	printHead(out)
	for i, a := range s.acts() {
		title := fmt.Sprintf("%d. %s", i+1, a.name)
		t, err := a.play(ctx)
		if ctx.Err() != nil { // interrupted, or too slow
			return errors.Join(failed, fmt.Errorf("%s: %w", title, errors.Join(err, context.Cause(ctx))))
		}
		if err = errors.Join(err, a.want.judge(t)); err != nil {
			failed = errors.Join(failed, fmt.Errorf("%s:\n%w", title, err))
		}
		printLine(out, title, t, err == nil)
	}
	return failed
}

const nodes = 2

// stage is what the acts are played on.
type stage struct {
	redis     *database
	rdb       *redis.Client // to read the books of the nodes
	fleet     *fleet
	forgetful bool // the clients are

	mu      sync.Mutex
	clients []*client
}

// newStage starts what there has to be. The stage is to be closed, also with an error.
func newStage() (s *stage, err error) {
	s = &stage{}
	if s.redis, err = startRedis(); err != nil {
		return s, err
	}
	s.rdb = redis.NewClient(&redis.Options{Addr: s.redis.addr()})
	s.fleet, err = startFleet(place{Redis: s.redis.addr(), Secret: rand.Text()}, nodes)
	return s, err
}

// close ends the clients, the nodes and the Redis.
func (s *stage) close() (err error) {
	for _, c := range s.clients {
		if c.current() != nil {
			c.cut()
		}
	}
	if s.fleet != nil {
		err = s.fleet.stop()
	}
	if s.rdb != nil {
		err = errors.Join(err, s.rdb.Close())
	}
	if s.redis != nil {
		err = errors.Join(err, s.redis.stop())
	}
	return err
}

// newClient returns a client of user that is not connected; it is to go on with
// session, unless that is "".
func (s *stage) newClient(user, session string) *client {
	c := newClient(s.fleet.Secret, user)
	c.forgetful, c.session = s.forgetful, session
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clients = append(s.clients, c)
	return c
}

// connect connects c to node i.
func (s *stage) connect(ctx context.Context, c *client, i int) error {
	return c.connect(ctx, s.fleet.addrs()[i])
}

// join returns a client of user that is connected to node i.
func (s *stage) join(ctx context.Context, user, session string, i int) (*client, error) {
	c := s.newClient(user, session)
	return c, s.connect(ctx, c, i)
}

// await waits until c has got n different messages and the nodes know that, and until
// all its own are processed.
func (c *client) await(ctx context.Context, n int) error {
	for {
		c.mu.Lock()
		got, has, out := len(c.Got), len(c.has), len(c.out)
		if got >= n {
			got = different(c.Got)
		}
		c.mu.Unlock()
		if got >= n && has == 0 && out == 0 {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("%s has %d of %d messages, the nodes do not know of %d, and %d of its own have no reply: %w", c.user(), got, n, has, out, err)
		}
		pause(ctx, 5*time.Millisecond)
	}
}

func different(all []string) int {
	set := map[string]bool{}
	for _, s := range all {
		set[s] = true
	}
	return len(set)
}

// within waits for done as long as ctx allows.
func within(ctx context.Context, done <-chan struct{}) error {
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
