package main

// gateway.go is the gateway: a line of a client's connection is an order, and a
// line goes back. This is what an application writes.
//
//	OPEN user      → OK id            a session with a worker of its own
//	BACK user id   → OK id            the same one, from another connection
//	DO text        → OK pid user text what its worker says
//	CLOSE          → OK
//
// or ERR and why. While a connection has a session, its lease does not run out.

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/sessionlock/sessionlock/sessionmanager"
)

type (
	manager = sessionmanager.Manager[*worker]
	session = sessionmanager.Session[*worker]
)

type gateway struct {
	sessions *manager
	place    func(user string) place // of a worker
	listener net.Listener
	serving  sync.WaitGroup

	mu    sync.Mutex
	conns map[net.Conn]struct{} // nil: closed
}

func startGateway(ctx context.Context, sessions *manager, place func(user string) place) (*gateway, error) {
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	g := &gateway{sessions: sessions, place: place, listener: listener, conns: map[net.Conn]struct{}{}}
	g.serving.Go(func() { g.accept(ctx) })
	g.serving.Go(func() { _ = sessions.Run(ctx) }) // it says why it ended
	return g, nil
}

func (g *gateway) accept(ctx context.Context) {
	for {
		conn, err := g.listener.Accept()
		if err != nil {
			return // it was closed
		}
		if !g.enter(conn) {
			_ = conn.Close()
			return
		}
		g.serving.Go(func() {
			g.serve(ctx, conn)
			_ = conn.Close()
			g.mu.Lock()
			defer g.mu.Unlock()
			delete(g.conns, conn)
		})
	}
}

// enter reports whether conn is to be served.
func (g *gateway) enter(conn net.Conn) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.conns == nil {
		return false
	}
	g.conns[conn] = struct{}{}
	return true
}

// close hangs up on all clients. The sessions are the manager's to end, and Run ends
// with them.
func (g *gateway) close() {
	_ = g.listener.Close()
	g.mu.Lock()
	for conn := range g.conns {
		_ = conn.Close()
	}
	g.conns = nil
	g.mu.Unlock()
	g.serving.Wait()
}

// line is one connection.
type line struct {
	*gateway
	session *session // nil: it has none
	detach  func()
}

// serve answers lines until the client hangs up. That ends its attachment, not
// what its worker is doing, so no call ends with the connection.
func (g *gateway) serve(ctx context.Context, conn net.Conn) {
	l := &line{gateway: g, detach: func() {}}
	defer func() { l.detach() }()
	for lines := bufio.NewScanner(conn); lines.Scan(); {
		reply, err := l.obey(ctx, lines.Text())
		if err != nil {
			reply = "ERR " + reason(err)
		}
		if _, err := fmt.Fprintln(conn, reply); err != nil {
			return
		}
	}
}

var errProtocol = errors.New("protocol")

func (l *line) obey(ctx context.Context, text string) (reply string, err error) {
	verb, rest, _ := strings.Cut(text, " ")
	switch {
	case verb == "OPEN" && rest != "" && l.session == nil:
		return l.open(ctx, rest)
	case verb == "BACK" && l.session == nil:
		user, id, _ := strings.Cut(rest, " ")
		s, err := l.sessions.Get(id, user) // a real gateway would know the user better
		if err != nil {
			return "", err
		}
		return l.attach(s) //nolint:contextcheck // an attachment outlives what asked for it
	case verb == "DO" && l.session != nil:
		a, err := sessionmanager.Call(ctx, l.session, func(ctx context.Context, w *worker) (answer, error) {
			return w.Ask(ctx, rest)
		})
		return fmt.Sprintf("OK %d %s %s", a.PID, a.User, a.Text), err
	case verb == "CLOSE" && l.session != nil:
		err := l.session.Close(ctx)
		l.detach()
		l.session = nil
		return "OK", err
	}
	return "", errProtocol
}

func (l *line) open(ctx context.Context, user string) (reply string, err error) {
	s, err := l.sessions.Open(ctx, sessionmanager.Spec{Owner: user, Name: "gateway"}, func(ctx context.Context, _ string) (*worker, error) {
		return startWorker(ctx, l.place(user))
	})
	if err != nil {
		return "", err
	}
	if reply, err = l.attach(s); err != nil { //nolint:contextcheck // likewise
		_ = s.Close(ctx) // nobody was told its id
		return "", err
	}
	return reply, nil
}

func (l *line) attach(s *session) (reply string, err error) {
	_, detach, err := s.Attach()
	if err != nil {
		return "", err
	}
	l.session, l.detach = s, detach
	return "OK " + s.ID(), nil
}

// reason is what a client is told: a code, and no text that somebody else wrote.
func reason(err error) string {
	var e *sessionmanager.Error
	switch {
	case errors.As(err, &e):
		return string(e.Code)
	case errors.Is(err, errProtocol), errors.Is(err, sessionmanager.ErrInvalid):
		return "protocol"
	case errors.Is(err, errGone):
		return "gone"
	}
	return "failed"
}

// client is the other end of a connection.
type client struct {
	conn     net.Conn
	answers  *bufio.Scanner
	user, id string
	pid      string // of its worker
}

func dial(ctx context.Context, addr, user string) (*client, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	return &client{conn: conn, answers: bufio.NewScanner(conn), user: user}, nil
}

const answerTime = 10 * time.Second // of the gateway, at most

// ask returns the line that comes back, or why none did.
func (c *client) ask(format string, args ...any) string {
	_ = c.conn.SetDeadline(time.Now().Add(answerTime))
	if _, err := fmt.Fprintf(c.conn, format+"\n", args...); err != nil {
		return "hung up"
	}
	if !c.answers.Scan() {
		return "hung up"
	}
	return c.answers.Text()
}

// open returns "OK", or why not.
func (c *client) open() string { return c.admitted(c.ask("OPEN %s", c.user)) }
func (c *client) back() string { return c.admitted(c.ask("BACK %s %s", c.user, c.id)) }

func (c *client) admitted(reply string) string {
	id, ok := strings.CutPrefix(reply, "OK ")
	if !ok {
		return reply
	}
	c.id = id
	return "OK"
}

// do returns "OK" if the session's own worker has answered, as its user and to this
// text. Which worker it is, the first answer tells.
func (c *client) do(text string) string {
	reply := c.ask("DO %s", text)
	words := strings.SplitN(reply, " ", 4)
	if len(words) != 4 {
		return reply
	}
	if c.pid == "" {
		c.pid = words[1]
	}
	if words[1] != c.pid || words[2] != c.user || words[3] != text {
		return "the answer of another"
	}
	return "OK"
}

func (c *client) close() { _ = c.conn.Close() }
