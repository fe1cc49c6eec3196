package main

// acts.go is what happens to the gateway.

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/sessionlock/sessionlock/sessionmanager"
)

// act is one thing that happens to the gateway.
type act struct {
	name string
	play func(context.Context) error // an error: it could not be played
}

func (s *stage) acts() []act {
	return []act{
		{"sessions are opened, to capacity and beyond", s.open},
		{"commands reach the right worker", s.command},
		{"leases run out", s.idle},
		{"two workers are killed", s.killed},
		{"the manager is shut down under load", s.shutdown},
	}
}

var users = []string{"ada", "bob", "cyd", "dan"}

const eve = "eve" // comes late

// enter opens n sessions at once, for users in turn, and returns how many were
// granted.
func (s *stage) enter(ctx context.Context, n int, users ...string) (granted int, err error) {
	var all []*client
	for i := range n {
		c, err := dial(ctx, s.addr, users[i%len(users)])
		if err != nil {
			return 0, err
		}
		all = append(all, c)
	}
	s.clients = append(s.clients, all...)
	return count("OK", all, (*client).open), nil
}

// count has all ask at once, and returns how many got want.
func count(want string, all []*client, ask func(*client) string) (n int) {
	var asking sync.WaitGroup
	replies := make([]string, len(all))
	for i, c := range all {
		asking.Go(func() { replies[i] = ask(c) })
	}
	asking.Wait()
	for _, reply := range replies {
		if reply == want {
			n++
		}
	}
	return n
}

func hello(c *client) string { return c.do("hello") }

func (s *stage) open(ctx context.Context) error {
	granted, err := s.enter(ctx, capacity, users...)
	if err != nil {
		return err
	}
	s.expect("opens granted", "clients", capacity, granted)
	s.workers(capacity)
	before, _, err := children()
	if err != nil {
		return err
	}
	late, err := dial(ctx, s.addr, eve)
	if err != nil {
		return err
	}
	defer late.close()
	start := time.Now()
	s.expect("one open more", "clients", "ERR limit", late.open())
	s.within("until it was refused", time.Second, time.Since(start))
	s.same("the processes are the same", before.live)
	s.kernel("page faults of those that ended", before.reaped, func(p processes) any { return p.reaped })
	s.ledger(len(users))
	return nil
}

func (s *stage) command(ctx context.Context) error {
	const commands = 5
	before, right := s.served(), 0
	for i := range commands {
		right += count("OK", s.clients, func(c *client) string { return c.do(fmt.Sprintf("%s %d", c.id, i)) })
	}
	s.expect("commands answered by the session's worker", "clients", capacity*commands, right)
	s.expect("requests that they took there", "upstream", capacity*commands, s.served()-before)
	s.same("the workers that answered", s.pids())
	thief, err := dial(ctx, s.addr, eve)
	if err != nil {
		return err
	}
	defer thief.close()
	thief.id = s.clients[0].id
	s.expect("somebody else comes back", "clients", "ERR not_found", thief.back())
	if err := s.reconnect(ctx, s.clients[1]); err != nil {
		return err
	}
	s.expect("a client hangs up, and comes back", "clients", "OK", s.clients[1].back())
	s.expect("its worker is the same", "clients", "OK", hello(s.clients[1]))
	s.workers(capacity)
	s.ledger(len(users))
	return nil
}

// pids of the clients' workers, in order.
func (s *stage) pids() (all []string) {
	for _, c := range s.clients {
		all = append(all, c.pid)
	}
	slices.Sort(all)
	return all
}

// reconnect gives c a new connection, without a session.
func (s *stage) reconnect(ctx context.Context, c *client) error {
	c.close()
	again, err := dial(ctx, s.addr, c.user)
	if err != nil {
		return err
	}
	c.conn, c.answers = again.conn, again.answers
	return nil
}

// idle has all hang up but the first two.
func (s *stage) idle(ctx context.Context) error {
	start := time.Now()
	gone := s.clients[2:]
	s.clients = s.clients[:2]
	for _, c := range gone {
		c.close()
	}
	var first, last time.Duration
	err := until(ctx, func() bool {
		p, known, err := children()
		since := time.Since(start)
		if !known {
			first, last = lease, since
			return since > 2*lease
		}
		if first == 0 && len(p.live)+p.zombies < capacity {
			first = since
		}
		last = since
		return err != nil || len(p.live) == len(s.clients) || last > 5*lease
	})
	if err != nil {
		return err
	}
	s.show("the first process ends when its lease is over", "clock", "from "+lease.String(), first.Round(time.Millisecond), first >= lease)
	s.within("the last", 3*lease, last)
	pause(ctx, lease) // and another
	s.workers(len(s.clients))
	s.same("those of clients that have stayed live", s.pids())
	s.expect("and answer", "clients", len(s.clients), count("OK", s.clients, hello))
	for _, c := range gone {
		if err := s.reconnect(ctx, c); err != nil {
			return err
		}
		defer c.close()
	}
	s.expect("those who come back too late", "clients", len(gone), count("ERR not_found", gone, (*client).back))
	s.ledger(len(users))
	return nil
}

func (s *stage) killed(ctx context.Context) error {
	granted, err := s.enter(ctx, capacity-len(s.clients), users...)
	if err != nil {
		return err
	}
	s.expect("slots of the idle were free", "clients", capacity-2, granted)
	s.expect("all answer", "clients", capacity, count("OK", s.clients, hello))
	last := len(s.clients) - 2
	victim, silent := s.clients[last], s.clients[last+1] // nobody asks for the session of silent
	defer victim.close()
	defer silent.close()
	s.clients = s.clients[:last]
	stop := working(s.clients)
	if err := errors.Join(kill(victim.pid), kill(silent.pid)); err != nil {
		return err
	}
	looking, cancel := context.WithTimeout(ctx, lease/2) // it is there for a lease
	defer cancel()
	_ = until(looking, func() bool { return hello(victim) == "ERR not_ready" })
	again := *victim
	if err := s.reconnect(ctx, &again); err != nil {
		return err
	}
	defer again.close()
	s.expect("a client comes back to its faulted session", "clients", "ERR not_ready", again.back())
	s.kernel("worker processes", last, func(p processes) any { return len(p.live) })
	if err := until(ctx, func() bool { return again.back() == "ERR not_found" }); err != nil {
		return err
	}
	pause(ctx, lease/2) // the other one is due, too
	granted, err = s.enter(ctx, 2, eve)
	if err != nil {
		return err
	}
	s.expect("both slots are free for others", "clients", 2, granted)
	done, failed := stop()
	s.show("commands of the others meanwhile", "clients", "some", done, done > 0)
	s.expect("of these failed", "clients", 0, failed)
	s.expect("all answer", "clients", capacity, count("OK", s.clients, hello))
	s.workers(capacity)
	s.same("and are those that answer", s.pids())
	s.ledger(len(users) + 1)
	return nil
}

// working has all send one command after another until stop.
func working(all []*client) (stop func() (done, failed int)) {
	over := make(chan struct{})
	var mu sync.Mutex
	var done, failed int
	var work sync.WaitGroup
	for _, c := range all {
		work.Go(func() {
			for !isClosed(over) {
				reply := hello(c)
				mu.Lock()
				done++
				if reply != "OK" {
					failed++
				}
				mu.Unlock()
				time.Sleep(20 * time.Millisecond)
			}
		})
	}
	return func() (int, int) {
		close(over)
		work.Wait()
		return done, failed
	}
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// shutdown is under load: clients send commands, others open and close sessions in
// the two slots that are left. One worker does not end when it is told to.
func (s *stage) shutdown(ctx context.Context) error {
	left := slices.Clone(s.clients[5:7])
	s.clients = slices.Delete(s.clients, 5, 7) // eve stays
	s.expect("two clients close", "clients", 2, count("OK", left, func(c *client) string { return c.ask("CLOSE") }))
	for _, c := range left {
		c.close()
	}
	s.expect("a worker goes deaf", "clients", "OK", s.clients[0].do(deaf))
	load := &load{over: make(chan struct{}), replies: map[string]int{}}
	for _, c := range s.clients {
		load.running.Go(func() { load.command(c) })
	}
	for i := range 4 {
		load.running.Go(func() { load.open(ctx, s.addr, users[i]) })
	}
	if err := until(ctx, func() bool { return load.seen("OK opened") >= 3 }); err != nil {
		return err
	}
	bounded, cancel := context.WithTimeout(ctx, shutdownTime)
	defer cancel()
	start := time.Now()
	err := s.sessions.Shutdown(bounded)
	took := time.Since(start)
	s.workers(0)
	s.within("Shutdown took", shutdownTime+killTime, took)
	s.expect("it tells that the deaf one was killed", "caller", true, errors.Is(err, sessionmanager.ErrClose))
	err = until(ctx, func() bool { return load.seen("ERR closed") > 0 })
	close(load.over)
	load.running.Wait()
	if err != nil {
		return err
	}
	s.show("commands answered under load", "clients", "some", load.seen("OK"), load.seen("OK") > 0)
	s.show("sessions opened under load", "clients", "3 or more", load.seen("OK opened"), load.seen("OK opened") >= 3)
	s.expect("answers that should not be", "clients", "none", load.odd())
	s.wrongOpens(ctx)
	s.workers(0)
	s.ledger(len(users) + 1)
	return nil
}

// wrongOpens tries to open when nobody may any more.
func (s *stage) wrongOpens(ctx context.Context) {
	const tries = 10
	refused := 0
	for range tries {
		c, err := dial(ctx, s.addr, users[0])
		if err != nil {
			continue
		}
		if c.open() == "ERR closed" {
			refused++
		}
		c.close()
	}
	s.expect("opens refused from now on", "clients", tries, refused)
}

// load is what clients do meanwhile, and what they hear.
type load struct {
	over    chan struct{}
	running sync.WaitGroup

	mu      sync.Mutex
	replies map[string]int
}

func (l *load) hear(reply string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.replies[reply]++
}

func (l *load) seen(reply string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.replies[reply]
}

// odd returns the replies that nobody should get, "none" if there are none.
func (l *load) odd() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	fine := []string{
		"OK", "OK opened",
		"ERR limit",                 // opens before
		"ERR closed",                // and after
		"ERR not_ready", "ERR gone", // commands after, and those that were under way
	}
	for reply := range l.replies {
		if !slices.Contains(fine, reply) {
			return reply
		}
	}
	return "none"
}

func (l *load) command(c *client) {
	for !isClosed(l.over) {
		l.hear(hello(c))
		time.Sleep(20 * time.Millisecond)
	}
}

// open opens sessions, uses and closes them.
func (l *load) open(ctx context.Context, addr, user string) {
	for !isClosed(l.over) {
		c, err := dial(ctx, addr, user)
		if err != nil {
			l.hear("no connection")
			return
		}
		reply := c.open()
		if reply != "OK" {
			l.hear(reply)
		} else {
			l.hear("OK opened")
			l.hear(hello(c))
			l.hear(c.ask("CLOSE"))
		}
		c.close()
		time.Sleep(50 * time.Millisecond)
	}
}
