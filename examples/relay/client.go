package main

// client.go is the far end: what a browser or an app has to do for its half of the
// protocol, and the book it keeps of all that has happened to it.

import (
	"context"
	"crypto/rand"
	"errors"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/coder/websocket"
)

// client is one session's user, over one connection after the other.
type client struct {
	token string

	mu      sync.Mutex
	session string
	link    *link           // the last one
	has     map[string]bool // ids of messages that the nodes may send again
	out     []*call         // what the nodes have not replied to; the first is under way
	over    bool            // the session has ended

	// What the client does, beside noting what it is told.
	forgetful bool                   // it does not look whether it knows an id, which makes the numbers wrong
	onMessage func(n int) (cut bool) // after the nth that was new; cut: without a word to the node
	answers   int                    // how often it answers a request
	no        bool                   // its answer, else yes
	stutter   bool                   // it says everything twice

	book
}

// book is what has happened to a client.
type book struct {
	Got      []string               // bodies of messages, as they were acted on: the effect
	Again    int                    // how many came again, and were known
	Said     int                    // frames with messages of its own
	Late     int                    // answers that had been given before
	Closed   []websocket.CloseError // by the nodes
	Ended    int                    // how often it was told that the session has ended
	Homeless []time.Duration        // from the loss of each connection to the next welcome
	lost     time.Time
}

// link is one connection.
type link struct {
	ws   *websocket.Conn
	wake chan struct{} // there is something to be written; capacity 1
	done chan struct{} // nothing is read any more

	due  []frame  // guarded by client.mu, like the rest
	acks []string // beside them
}

// call is a message of the client.
type call struct {
	frame
	reply string
	err   error
	done  chan struct{}
}

const (
	linger   = 50 * time.Millisecond // so long acknowledgements are gathered
	patience = time.Second           // after it they are said again
)

var errEnded = errors.New("the session has ended")

func newClient(secret, user string) *client {
	return &client{token: token(secret, user), has: map[string]bool{}, answers: 1}
}

// connect says hello to the node at addr, and goes on where the last connection broke
// off: what is still unacknowledged on either side is said again.
func (c *client) connect(ctx context.Context, addr string) error {
	c.mu.Lock()
	old, session := c.link, c.session
	c.mu.Unlock()
	if old != nil {
		_ = old.ws.CloseNow()
		<-old.done
	}
	ctx, cancel := context.WithTimeout(ctx, 2*helloLimit)
	defer cancel()
	ws, _, err := websocket.Dial(ctx, "ws://"+addr+"/relay", &websocket.DialOptions{ //nolint:bodyclose // there is none, says Dial
		HTTPHeader: http.Header{"Authorization": {"Bearer " + c.token}},
	})
	if err != nil {
		return err
	}
	f := frame{}
	if err = write(ctx, ws, frame{Kind: hello, ID: session}); err == nil {
		f, err = read(ctx, ws)
	}
	if err != nil || f.Kind != welcome {
		_ = ws.CloseNow()
		c.closed(err)
		return errors.Join(errors.New("not welcome"), err)
	}
	c.begin(context.WithoutCancel(ctx), &link{ws: ws, wake: make(chan struct{}, 1), done: make(chan struct{})}, f.ID)
	return nil
}

func (c *client) begin(ctx context.Context, l *link, session string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.session, c.link = session, l
	if !c.lost.IsZero() {
		c.Homeless = append(c.Homeless, time.Since(c.lost))
		c.lost = time.Time{}
	}
	c.speak(l)
	go c.read(ctx, l)
	go c.write(ctx, l)
	go c.repeat(l)
}

// repeat acknowledges again what a node has not taken note of in time: it could not, or
// its answer was lost with the last connection.
func (c *client) repeat(l *link) {
	tick := time.NewTicker(patience)
	defer tick.Stop()
	for before := []string(nil); ; {
		select {
		case <-l.done:
			return
		case <-tick.C:
		}
		c.mu.Lock()
		for _, id := range before {
			if c.has[id] {
				l.ack(id)
			}
		}
		before = slices.Collect(maps.Keys(c.has))
		c.mu.Unlock()
	}
}

// read takes what comes until the connection is lost.
func (c *client) read(ctx context.Context, l *link) {
	for {
		f, err := read(ctx, l.ws)
		if err == nil && c.take(l, f) {
			err = errors.New("cut")
			_ = l.ws.CloseNow()
		}
		if err != nil {
			c.mu.Lock()
			c.lost = time.Now()
			c.mu.Unlock()
			c.closed(err)
			close(l.done)
			return
		}
	}
}

// closed notes why a node has closed the connection, if it has.
func (c *client) closed(err error) {
	var why websocket.CloseError
	if !errors.As(err, &why) {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.Closed = append(c.Closed, why)
	if (why.Code == closedRemoved || why.Code == closedLost) && !c.over {
		c.over = true
		c.Ended++
		for _, m := range c.out {
			m.err = errEnded
			close(m.done)
		}
		c.out = nil
	}
}

// take acts on a frame.
func (c *client) take(l *link, f frame) (cut bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch f.Kind {
	case message, request:
		if c.has[f.ID] && !c.forgetful {
			c.Again++
		} else if cut = c.act(l, f); cut {
			return true
		}
		l.ack(f.ID)
	case forget:
		for _, id := range f.IDs {
			delete(c.has, id)
		}
	case reply:
		c.replied(l, f)
	case again:
		time.AfterFunc(50*time.Millisecond, func() {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.speak(l)
		})
	}
	return false
}

// act is the effect of a new message.
func (c *client) act(l *link, f frame) (cut bool) {
	c.has[f.ID] = true
	c.Got = append(c.Got, f.Body)
	if f.Kind == request {
		says := "yes"
		if c.no {
			says = "no"
		}
		for range c.answers {
			c.queue(l, frame{Kind: answer, ID: rand.Text(), Re: f.ID, Body: says + " to " + f.Body})
		}
	}
	return c.onMessage != nil && c.onMessage(len(c.Got))
}

// put has the writer write f.
func (l *link) put(f frame) {
	l.due = append(l.due, f)
	l.wakeUp()
}

// ack has the writer say, soon, that message id is here.
func (l *link) ack(id string) {
	if l.acks = append(l.acks, id); len(l.acks) == 1 {
		time.AfterFunc(linger, l.wakeUp)
	}
}

func (l *link) wakeUp() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// write writes what is due, one after the other: a copy of a message that came after
// its forget would be new to the node.
func (c *client) write(ctx context.Context, l *link) {
	for {
		select {
		case <-l.done:
			return
		case <-l.wake:
		}
		c.mu.Lock()
		due := l.due
		for ids := range slices.Chunk(l.acks, idsLimit) {
			due = append(due, frame{Kind: ack, IDs: ids})
		}
		l.due, l.acks = nil, nil
		c.mu.Unlock()
		for _, f := range due {
			if write(ctx, l.ws, f) != nil {
				return // what is lost is said again over the next connection
			}
		}
	}
}

// say has the nodes told something: once in effect, one thing after the other.
func (c *client) say(body string) *call {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.queue(c.link, frame{Kind: message, ID: rand.Text(), Body: body})
}

func (c *client) queue(l *link, f frame) *call {
	m := &call{frame: f, done: make(chan struct{})}
	if c.over {
		m.err = errEnded
		close(m.done)
		return m
	}
	c.out = append(c.out, m)
	if len(c.out) == 1 {
		c.speak(l)
	}
	return m
}

// speak says what is due, if anything is.
func (c *client) speak(l *link) {
	if len(c.out) == 0 || l == nil || l != c.link {
		return
	}
	l.put(c.out[0].frame)
	c.Said++
	if c.stutter {
		l.put(c.out[0].frame)
		c.Said++
	}
}

func (c *client) replied(l *link, f frame) {
	if len(c.out) == 0 || c.out[0].ID != f.ID {
		return // to what it has said twice
	}
	m := c.out[0]
	m.reply, c.out = f.Body, c.out[1:]
	close(m.done)
	if f.Body == late {
		c.Late++
	}
	l.put(frame{Kind: forget, IDs: []string{f.ID}})
	c.speak(l)
}

// cut loses the connection as a tunnel does: nobody says good-bye.
func (c *client) cut() {
	c.mu.Lock()
	l := c.link
	c.mu.Unlock()
	_ = l.ws.CloseNow()
	<-l.done
}

// stay has the client come back whenever its connection is lost, to one node after the
// other beginning with number next, until ctx or the session ends.
func (c *client) stay(ctx context.Context, nodes func() []string, next int) {
	for ; ; next++ {
		if l := c.current(); l != nil {
			select {
			case <-l.done:
			case <-ctx.Done():
			}
		}
		if ctx.Err() != nil || c.isOver() {
			return
		}
		if addrs := nodes(); c.connect(ctx, addrs[next%len(addrs)]) != nil {
			pause(ctx, 20*time.Millisecond)
		}
	}
}

func (c *client) isOver() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.over
}

func (c *client) current() *link {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.link
}

// id returns the session's.
func (c *client) id() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.session
}

// report returns a copy of the book.
func (c *client) report() book {
	c.mu.Lock()
	defer c.mu.Unlock()
	b := c.book
	b.Got, b.Closed, b.Homeless = slices.Clone(b.Got), slices.Clone(b.Closed), slices.Clone(b.Homeless)
	return b
}

func (c *client) user() string {
	user, _, _ := strings.Cut(c.token, ".")
	return user
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
