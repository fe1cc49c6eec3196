package main

// acts.go is what happens to the service. In each act, who sends goes on until all is
// sent, and then the books are read.

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"
)

// act is one thing that happens to the service.
type act struct {
	name string
	play func(context.Context) (tally, error)
	want want
}

const (
	many   = 1000 // messages of the first act
	saying = 300  // of the second
	asked  = 20   // requests of the third
	crowd  = 20   // clients of the fourth and fifth
	each   = 100  // messages to each of them
	back   = 25   // messages of each
)

func (s *stage) acts() []act {
	return []act{
		{"a client is cut off amid messages to it", s.cutOff, want{sent: many, again: 1, homeless: 1}},
		{"one is cut off again and again, and stutters", s.stutter, want{sent: saying, again: saying, homeless: saying / 30}},
		{"requests are answered elsewhere, and twice", s.asked, want{sent: asked, again: asked, homeless: 1}},
		{"a node is killed at work", s.nodeDies, want{sent: crowd * (each + back), homeless: crowd / nodes}},
		{"the Redis is killed at work, and comes back", s.redisDies, want{sent: crowd * (each + back)}},
		{"a stranger and a twin want the session", s.intruders, want{sent: 3}},
	}
}

// bodies are n messages that can be told apart.
func bodies(what string, n int) []string {
	all := make([]string, n)
	for i := range all {
		all[i] = fmt.Sprintf("%s %d", what, i+1)
	}
	return all
}

// cutOff: the connection is lost after half of the messages, and the last of them is
// not acknowledged.
func (s *stage) cutOff(ctx context.Context) (tally, error) {
	c := s.newClient("ada", "")
	c.onMessage = func(n int) bool { return n == many/2 }
	if err := s.connect(ctx, c, 0); err != nil {
		return tally{}, err
	}
	first, back := c.current(), make(chan error, 1)
	go func() { back <- errors.Join(within(ctx, first.done), s.connect(ctx, c, 1)) }()
	sent := bodies("message", many)
	for i, body := range sent {
		if err := s.fleet.deliver(ctx, i%nodes, c.id(), outgoing{Body: body}); err != nil {
			return tally{}, err
		}
	}
	err := errors.Join(<-back, c.await(ctx, many))
	return c.received(sent), err
}

// stutter: the client says everything twice, and loses its connection in the middle of
// each thirtieth message.
func (s *stage) stutter(ctx context.Context) (tally, error) {
	c := s.newClient("bob", "")
	c.stutter = true
	if err := s.connect(ctx, c, 0); err != nil {
		return tally{}, err
	}
	sent := bodies("message", saying)
	for i, body := range sent {
		m := c.say(body)
		if i%30 == 29 {
			c.cut()
			if err := s.connect(ctx, c, (i/30+1)%nodes); err != nil {
				return tally{}, err
			}
		}
		if err := within(ctx, m.done); err != nil {
			return tally{}, fmt.Errorf("no reply to %q: %w", body, err)
		}
	}
	t, err := s.processed(ctx, c, sent)
	runs, fault := s.reruns(ctx, c)
	t.Twice += runs
	t.Again, t.Homeless = c.report().Said-saying, c.absences()
	return t, errors.Join(err, fault)
}

// asked: the nodes ask the client, which is cut off amid the requests, and answers each
// of them twice.
func (s *stage) asked(ctx context.Context) (tally, error) {
	c := s.newClient("cyd", "")
	c.onMessage, c.answers = func(n int) bool { return n == asked/2 }, 2
	if err := s.connect(ctx, c, 0); err != nil {
		return tally{}, err
	}
	first := c.current()
	var sent []string
	for i := range asked {
		m := outgoing{Body: fmt.Sprint("question ", i), About: fmt.Sprint("matter ", i)}
		if err := s.fleet.deliver(ctx, i%nodes, c.id(), m); err != nil {
			return tally{}, err
		}
		sent = append(sent, m.About+": yes to "+m.Body)
	}
	if err := within(ctx, first.done); err != nil {
		return tally{}, err
	}
	if err := errors.Join(s.connect(ctx, c, 1), c.await(ctx, asked)); err != nil {
		return tally{}, err
	}
	t, err := s.processed(ctx, c, sent)
	t.Again, t.Homeless = c.report().Late, c.absences()
	return t, err
}

func (s *stage) nodeDies(ctx context.Context) (tally, error) {
	t, err := s.atWork(ctx, "ann", func() error { s.fleet.kill(0); return nil })
	return t, errors.Join(err, s.fleet.start(0))
}

func (s *stage) redisDies(ctx context.Context) (tally, error) {
	return s.atWork(ctx, "tom", func() error {
		err := s.redis.kill()
		pause(ctx, 300*time.Millisecond)
		return errors.Join(err, s.redis.start())
	})
}

// atWork: clients on both nodes are sent messages by both and send some themselves.
// When a third is sent, disaster strikes.
func (s *stage) atWork(ctx context.Context, name string, disaster func() error) (sum tally, err error) {
	ctx, cancel := context.WithCancel(ctx)
	var staying sync.WaitGroup
	defer staying.Wait()
	defer cancel()
	clients := make([]*client, crowd)
	for i := range clients {
		c, err := s.join(ctx, fmt.Sprint(name, "-", i+1), "", i%nodes)
		if err != nil {
			return tally{}, err
		}
		clients[i] = c
		staying.Go(func() { c.stay(ctx, s.fleet.addrs, i+1) })
	}
	down, up := bodies("message", each), bodies("word", back)
	third, ended := make(chan struct{}, crowd), make(chan error, crowd)
	for i, c := range clients {
		go func() { ended <- s.load(ctx, c, i, down, up, third) }()
	}
	for range clients {
		if err := within(ctx, third); err != nil {
			return tally{}, err
		}
	}
	if err := disaster(); err != nil {
		return tally{}, err
	}
	for range clients {
		if err := <-ended; err != nil {
			return tally{}, err
		}
	}
	for _, c := range clients {
		if err := c.await(ctx, each); err != nil {
			return tally{}, err
		}
		t, err := s.processed(ctx, c, up)
		if err != nil {
			return tally{}, err
		}
		sum.add(c.received(down))
		sum.add(t)
	}
	return sum, nil
}

// load sends messages to a client, and has it send some. After a third it says so.
func (s *stage) load(ctx context.Context, c *client, first int, down, up []string, third chan<- struct{}) error {
	for i, body := range down {
		if i == each/3 {
			third <- struct{}{}
		}
		if i%(each/back) == 0 {
			c.say(up[i*back/each])
		}
		if err := s.fleet.insist(ctx, first+i, c.id(), outgoing{ID: fmt.Sprint(i), Body: body}); err != nil {
			return err
		}
	}
	return nil
}

// intruders: someone else who knows the session's id is refused, and its owner does not
// notice; a second connection of its owner takes the place of the first, on the other
// node and on its own.
func (s *stage) intruders(ctx context.Context) (tally, error) {
	owner, err := s.join(ctx, "dan", "", 0)
	if err != nil {
		return tally{}, err
	}
	var w wrong
	sent := bodies("message", 3)
	deliver := func(i int, to *client) error {
		return errors.Join(s.fleet.deliver(ctx, 1, owner.id(), outgoing{Body: sent[i]}), to.await(ctx, 1))
	}
	for i := range nodes {
		eve, err := s.join(ctx, "eve", owner.id(), i)
		closed := eve.report().Closed
		w.unless(err != nil && len(closed) == 1 && closed[0].Code == closedRefused, "the stranger is told %v at node %d", closed, i)
	}
	if err := deliver(0, owner); err != nil {
		return tally{}, err
	}
	got := owner.report().Got
	for i := range nodes {
		w.unless(len(owner.report().Closed) == 0, "the owner is told %v", owner.report().Closed)
		twin, err := s.join(ctx, "dan", owner.id(), (i+1)%nodes)
		if err := errors.Join(err, within(ctx, owner.current().done), deliver(i+1, twin)); err != nil {
			return tally{}, err
		}
		closed := owner.report().Closed
		w.unless(len(closed) == 1 && closed[0].Code == closedReplaced && strings.Contains(closed[0].Reason, owner.id()),
			"the first connection ends with %v", closed)
		owner, got = twin, append(got, twin.report().Got...)
	}
	return compare(sent, got), w.error()
}
