package sessionrelay

import (
	"context"
	"time"
)

// Hello is what a client says when it connects.
type Hello struct {
	Session string // which it had before; "": a new one
	User    string // who it is, as authenticated by the application. Required
	Lib     string // client library, application and its version: for operators
	App     string
	Version string
}

// Home is where a session is connected; the zero Home is nowhere.
type Home struct {
	Node string
	Conn string // one physical connection, never used twice
}

// Info is what is known of a session.
type Info struct {
	Session string
	User    string
	Lib     string
	App     string
	Version string
	Created time.Time // by the store's clock, to the millisecond
	Live    time.Time // when a node last vouched for it, likewise
	Home    Home
}

// Filter chooses sessions; the zero Filter all of them.
type Filter struct {
	Connected bool   // only those that have a home
	User      string // "": anybody's
	App       string // "": any
	Since     string // only this App version or a later one, compared as strings: "10" is before "9"
}

// Message is one from a node to a client.
type Message struct {
	ID       string
	Request  bool // the client is to answer it, see [Conn.Answered]
	Attempts int  // deliveries tried before
	Payload  []byte
}

// Claim is how [Inbox.Accept] answers.
type Claim struct {
	State   State
	Outcome []byte // of a message that is done; nil and empty differ
}

// State is how far a message from a client has come.
type State uint8

// The states.
const (
	Accepted   State = iota + 1 // by this call: process it, then Complete or Release
	InProgress                  // somebody else processes it, and has until his deadline
	Done                        // it was processed, with this outcome
)

// Store keeps the sessions of a fleet and their messages. It is bound to a node.
// relaytest.StoreTest shows whether an implementation is right. What its methods do
// is atomic per session and survives being asked twice: a request whose reply was
// lost is sent again. It must be safe for concurrent use and should end with its
// context.
//
// Errors: [ErrGone] for a session that does not exist, [ErrMoved] for a connection
// that is not the session's home any more, [ErrUnavailable] with the cause for an
// outage, and those that a method names.
type Store interface {
	// Node returns the name of the node that the store is bound to.
	Node() string

	Registry
	Directory
	Inbox
	Outbox
	DeadLetters
	Correlations
}

// Registry says where a session is at home.
type Registry interface {
	// Register makes conn on this node the session's home, in place of any other, and
	// returns that. A session that does not exist is created. What was tried over the
	// connection before, and not acknowledged, is there to be fetched again.
	// [ErrWrongUser] if the session is another user's, [ErrCap] if the user has limit
	// sessions besides this one; then nothing has changed. [ErrMoved] for a conn that
	// another one has replaced already.
	Register(ctx context.Context, h Hello, conn string, limit int) (now Info, before Home, err error)

	// Deregister leaves the session without a home, if conn on this node still is it.
	// The session stays. No error if it is not, or does not exist.
	Deregister(ctx context.Context, session, conn string) error

	// Lookup returns what is known of the session. ErrGone.
	Lookup(ctx context.Context, session string) (Info, error)

	// Remove removes the session and all that belongs to it, and reports whether it
	// existed.
	Remove(ctx context.Context, session string) (bool, error)
}

// Directory is what operators and the upkeep of all sessions need.
type Directory interface {
	// List calls each with the sessions that f chooses, in no order, until it returns
	// false. A session that comes or goes meanwhile may be missed, or not.
	List(ctx context.Context, f Filter, each func(Info) bool) error

	// Alive vouches for sessions, and returns those that do not exist. It creates none.
	Alive(ctx context.Context, sessions []string) (unknown []string, err error)

	// Expire removes the sessions that nobody vouched for during more than idle, and
	// returns them: each to one caller only, however many there are.
	Expire(ctx context.Context, idle time.Duration) ([]string, error)

	// Scavenge removes what refers to sessions that do not exist, and returns how much.
	Scavenge(ctx context.Context) (int, error)

	// Homed returns the sessions whose home is this node.
	Homed(ctx context.Context) ([]Info, error)
}

// Inbox has a message from a client processed once.
type Inbox interface {
	// Accept claims message id, which came over conn, for owner, until patience has
	// passed: then somebody else may take it over. A repeated call of the same owner is
	// Accepted again. ErrGone. ErrMoved: the client has another connection by now, and
	// may have forgotten the message there. With an empty conn, for what came another
	// way, that is not asked.
	Accept(ctx context.Context, session, conn, id, owner string, patience time.Duration) (Claim, error)

	// Complete stores the outcome of what owner has accepted, and forgets the
	// correlations of the requests that it answered. [ErrTaken] if somebody else has
	// taken it over; no error if owner has completed it already. The connection may have
	// moved: what was done is done.
	Complete(ctx context.Context, session, id, owner string, outcome []byte, answered ...string) error

	// Release gives up what owner has accepted, as if it had never come.
	Release(ctx context.Context, session, id, owner string) error

	// Forget removes messages: the client will not send them again. Unknown ids are no
	// error.
	Forget(ctx context.Context, session string, ids ...string) error
}

// Outbox keeps messages to a client until it has them, in the order they were put.
type Outbox interface {
	// Put adds m, unless one of its id is there, or was until a minute ago: then
	// nothing changes. It returns the session's home. correlation, unless nil, is kept
	// for [Correlations.Take]. ErrGone.
	Put(ctx context.Context, session string, m Message, correlation []byte) (Home, error)

	// Fetch returns up to most messages that were not tried over conn, oldest first.
	// ErrMoved, ErrGone.
	Fetch(ctx context.Context, session, conn string, most int) ([]Message, error)

	// Attempted says that ids were tried over conn: each counts one attempt more, and
	// is not fetched again before the next Register. ErrMoved, ErrGone.
	Attempted(ctx context.Context, session, conn string, ids ...string) error

	// Delivered removes messages that the client has acknowledged. Unknown ids are no
	// error.
	Delivered(ctx context.Context, session string, ids ...string) error
}

// DeadLetters are messages that could not be delivered.
type DeadLetters interface {
	// Bury takes messages out of the outbox's order, for good. ErrMoved, ErrGone.
	Bury(ctx context.Context, session, conn string, ids ...string) error

	// Buried returns them, oldest first.
	Buried(ctx context.Context, session string) ([]Message, error)

	// Revive puts messages back where they were in the order, without attempts.
	Revive(ctx context.Context, session string, ids ...string) error
}

// Correlations remember what a request to a client was about.
type Correlations interface {
	// Take returns the correlation of request id to one answer only, the first that
	// takes it, as often as it does, until [Inbox.Complete]; to other answers, and for a
	// request that is not known, ok is false.
	Take(ctx context.Context, session, id, answer string) (correlation []byte, ok bool, err error)
}
