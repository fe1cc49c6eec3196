package main

// node.go is one node of the service: the half of the protocol that an application
// writes around a sessionrelay.Node.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"github.com/coder/websocket"
	"github.com/redis/go-redis/v9"

	"github.com/sessionlock/sessionlock/sessionrelay"
)

// server is a node with its HTTP interface.
type server struct {
	place
	node  *sessionrelay.Node
	store sessionrelay.Store
	rdb   *redis.Client
	open  atomic.Int64 // connections of clients
}

// serveClient is a client's connection from its begin to its end.
func (s *server) serveClient(w http.ResponseWriter, r *http.Request) {
	user := userOf(s.Secret, strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer "))
	if user == "" {
		http.Error(w, "who are you?", http.StatusUnauthorized)
		return
	}
	ws, err := websocket.Accept(w, r, nil)
	if err != nil {
		return // it has been answered
	}
	s.open.Add(1)
	defer s.open.Add(-1)
	defer func() { _ = ws.CloseNow() }()
	first, cancel := context.WithTimeout(r.Context(), helloLimit)
	f, err := read(first, ws)
	cancel()
	if err != nil || f.Kind != hello {
		ws.Close(closedRefused, "say hello first")
		return
	}
	l := &line{server: s, ws: ws, ready: make(chan struct{})}
	l.conn, err = s.node.Connect(r.Context(), sessionrelay.Hello{Session: f.ID, User: user, App: "relay"}, l.send)
	if err != nil {
		code, reason := refusal(err)
		ws.Close(code, reason)
		return
	}
	defer l.conn.Disconnect()
	if write(r.Context(), ws, frame{Kind: welcome, ID: l.conn.Session()}) != nil {
		return
	}
	close(l.ready)
	go l.closeAtTheEnd()
	for l.handle(r.Context()) == nil {
	}
}

// refusal is how a client hears that it cannot connect.
func refusal(err error) (websocket.StatusCode, string) {
	switch {
	case errors.Is(err, sessionrelay.ErrWrongUser):
		return closedRefused, "the session is another user's"
	case errors.Is(err, sessionrelay.ErrCap):
		return closedRefused, "too many sessions"
	case errors.Is(err, sessionrelay.ErrGone):
		return closedLost, "no such session"
	case errors.Is(err, sessionrelay.ErrClosed):
		return closedRestart, "the node ends"
	}
	return closedTryLater, "not now"
}

// line is one connection.
type line struct {
	*server
	ws    *websocket.Conn
	conn  *sessionrelay.Conn
	ready chan struct{} // closed when welcome has been said
}

// send is what the relay sends messages by.
func (l *line) send(ctx context.Context, m sessionrelay.Message) error {
	select {
	case <-l.ready:
	case <-ctx.Done():
		return ctx.Err()
	}
	f := frame{Kind: message, ID: m.ID, Body: string(m.Payload)}
	if m.Request {
		f.Kind = request
	}
	return write(ctx, l.ws, f)
}

// closeAtTheEnd closes the WebSocket when the Conn has ended, and says why. When it was
// the client that left there is nobody to be told.
func (l *line) closeAtTheEnd() {
	<-l.conn.Done()
	switch err := l.conn.Err(); {
	case errors.Is(err, sessionrelay.ErrMoved):
		l.ws.Close(closedReplaced, "session "+l.conn.Session()+" has another connection")
	case errors.Is(err, sessionrelay.ErrGone):
		l.ws.Close(closedRemoved, "the session has ended")
	case errors.Is(err, sessionrelay.ErrClosed):
		l.ws.Close(closedRestart, "the node ends")
	}
}

// handle reads a frame and does as it says; an error ends the connection. What the
// store cannot do now is not an error: the client says it again, to this node or
// another.
func (l *line) handle(ctx context.Context) error {
	f, err := read(ctx, l.ws)
	if err != nil {
		return err
	}
	switch f.Kind {
	case ack:
		if l.conn.Acked(ctx, f.IDs...) == nil { // else the client says it again
			return write(ctx, l.ws, frame{Kind: forget, IDs: f.IDs})
		}
	case forget:
		_ = l.conn.Forget(ctx, f.IDs...) // what stays goes with the session
	case message, answer:
		body, err := l.conn.Receive(ctx, f.ID, func(ctx context.Context) ([]byte, error) { return l.process(ctx, f) })
		if err != nil {
			return write(ctx, l.ws, frame{Kind: again, ID: f.ID})
		}
		return write(ctx, l.ws, frame{Kind: reply, ID: f.ID, Body: string(body)})
	}
	return nil
}

// What the application does with messages: it notes them. Some have words in them
// that it knows.
const (
	slowly = "slowly" // takes its time, and the client is told that it has begun
	begun  = "begun"
	push   = "push" // the client is told two things, beside the reply
	late   = "late" // the reply to an answer that has been given already
)

const slow = 300 * time.Millisecond

// process is the effect of a message from the client, which returns the reply to it.
// It goes on when the client has left: the reply is kept for its next connection.
func (l *line) process(ctx context.Context, f frame) ([]byte, error) {
	note := f.Body
	if f.Kind == answer {
		about, first, err := l.conn.Answered(ctx, f.Re)
		if err != nil || !first {
			return []byte(late), err
		}
		note = string(about) + ": " + f.Body
	}
	switch f.Body {
	case slowly:
		if _, err := l.node.Send(ctx, l.conn.Session(), []byte(begun)); err != nil {
			return nil, err
		}
		pause(ctx, slow)
	case push:
		if err := l.push(ctx); err != nil {
			return nil, err
		}
	}
	return []byte("done " + f.Body), l.note(ctx, f.ID, note)
}

func (l *line) push(ctx context.Context) error {
	go func() { _, _ = l.node.Send(context.WithoutCancel(ctx), l.conn.Session(), []byte("from beside")) }()
	_, err := l.node.Send(ctx, l.conn.Session(), []byte("from inside"))
	return err
}

// noting makes the effect together with the id of the message: a node may die after
// the effect and before the relay knows of it, and then the message is processed again.
var noting = redis.NewScript(`
if redis.call('HINCRBY', KEYS[1], ARGV[1], 1) == 1 then redis.call('RPUSH', KEYS[2], ARGV[2]) end
redis.call('EXPIRE', KEYS[1], 600)
redis.call('EXPIRE', KEYS[2], 600)
return 1`)

func (l *line) note(ctx context.Context, id, text string) error {
	runs, notes := books(l.conn.Session())
	return noting.Run(ctx, l.rdb, []string{runs, notes}, id, text).Err()
}

// delivery is what the rest of the service asks a node for: messages to a session, in
// this order.
type delivery struct {
	Session  string
	Messages []outgoing
}

type outgoing struct {
	ID    string // "": the relay makes one; else it may be asked again, by the same id
	Body  string
	About string // it is a request, about this
}

// serveDelivery sends messages to a session, wherever it is connected.
func (s *server) serveDelivery(w http.ResponseWriter, r *http.Request) {
	var d delivery
	if !s.ours(w, r, &d) {
		return
	}
	for _, m := range d.Messages {
		if err := s.deliver(r.Context(), d.Session, m); err != nil {
			fail(w, err)
			return
		}
	}
}

func (s *server) deliver(ctx context.Context, session string, m outgoing) (err error) {
	switch {
	case m.ID != "":
		_, err = s.store.Put(ctx, session, sessionrelay.Message{ID: m.ID, Payload: []byte(m.Body)}, nil)
	case m.About != "":
		_, err = s.node.Request(ctx, session, []byte(m.Body), []byte(m.About))
	default:
		_, err = s.node.Send(ctx, session, []byte(m.Body))
	}
	return err
}

func (s *server) serveRemoval(w http.ResponseWriter, r *http.Request) {
	var d delivery
	if !s.ours(w, r, &d) {
		return
	}
	if err := s.node.Remove(r.Context(), d.Session); err != nil {
		fail(w, err)
	}
}

// ours reads a request from inside the service, and refuses one from outside.
func (s *server) ours(w http.ResponseWriter, r *http.Request, d *delivery) bool {
	if userOf(s.Secret, r.Header.Get("Authorization")) != operator {
		http.Error(w, "who are you?", http.StatusUnauthorized)
		return false
	}
	if err := json.NewDecoder(r.Body).Decode(d); err != nil {
		http.Error(w, "what?", http.StatusBadRequest)
		return false
	}
	return true
}

func fail(w http.ResponseWriter, err error) {
	status := http.StatusServiceUnavailable
	if errors.Is(err, sessionrelay.ErrGone) {
		status = http.StatusNotFound
	}
	http.Error(w, err.Error(), status)
}

// place is where the nodes meet, and who this one is. A node reads it from its
// standard input: it has a secret in it.
type place struct {
	Node   string
	Redis  string
	Secret string
}

const operator = "operator" // who may ask for deliveries

// books are where the effects of a session's messages are noted: how often each was
// processed, and what was done.
func books(session string) (runs, notes string) {
	tag := "relay:{" + session + "}:"
	return tag + "runs", tag + "notes"
}

// work is a node until its standard input ends: where nodes end by SIGTERM, that takes
// its place. Then its clients are told to go elsewhere.
func work() error {
	var s server
	over, err := told(&s.place)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		<-over
		cancel()
	}()
	s.rdb = redis.NewClient(&redis.Options{Addr: s.Redis})
	defer s.rdb.Close()
	if s.store, err = sessionrelay.NewRedisStore(s.rdb, s.Node); err != nil {
		return err
	}
	s.node, err = sessionrelay.New(s.store,
		sessionrelay.WithAttempts(10, 100*time.Millisecond), // a failed send is a dead connection here: nobody need be spared
		sessionrelay.WithPatience(2*time.Second))            // no message takes as long, unless its node has died
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // returns at once
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /relay", s.serveClient)
	mux.HandleFunc("POST /deliver", s.serveDelivery)
	mux.HandleFunc("POST /remove", s.serveRemoval)
	web := &http.Server{Handler: mux, ReadHeaderTimeout: helloLimit}
	go func() { _ = web.Serve(l) }()
	fmt.Println(l.Addr())
	err = s.node.Run(ctx)
	_ = web.Close()
	for end := time.Now().Add(writeLimit); s.open.Load() > 0 && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond) // until the last client has been told
	}
	return err
}
