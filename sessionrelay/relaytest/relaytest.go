// Package relaytest shows whether an implementation of [sessionrelay.Store] can be
// relied on by nodes.
package relaytest

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sessionlock/sessionlock/internal/suite"
	"github.com/sessionlock/sessionlock/sessionrelay"
)

// StoreTest shows whether an implementation of [sessionrelay.Store] can be relied on:
//
//	relaytest.StoreTest{
//		New: func(t *testing.T) func(node string) sessionrelay.Store {
//			db := open(t)
//			return func(node string) sessionrelay.Store { return newStore(db, node) }
//		},
//	}.Run(t)
//
// Only New is required. Names are unique per case and run, so a database need not be
// empty; but nothing else may use it meanwhile, as sessions in it time out. Run it with
// -race.
type StoreTest struct {
	// New returns a func that makes the stores of a fleet's nodes: they share one
	// memory. It is called for each case, again for one that the machine was too busy for.
	New func(t *testing.T) func(node string) sessionrelay.Store

	// Outage makes the memory of s and of all that came from the same New
	// unreachable, until the end of the case at least. Default: none, and the rule
	// for outages is not looked at.
	Outage func(t *testing.T, s sessionrelay.Store)

	// Sleep lets d pass for the store, which may have a clock of its own in a test.
	// Default: time.Sleep.
	Sleep func(d time.Duration)

	// Tick is a time that the machine can do a few calls in. Claims and idle times
	// are that long, and have to be over after twice that. Default: 200 ms.
	Tick time.Duration

	// In runs each case; synctest.Test puts each into a bubble of its own, New and
	// the other funcs included. Default: just runs it.
	In func(t *testing.T, f func(t *testing.T))
}

// Run runs every case as a subtest of t.
func (s StoreTest) Run(t *testing.T) {
	t.Helper()
	suite.Run(t, s.In, s.cases())
}

// cases returns the cases, each of which ends by [fleet.failf] when a store breaks its
// rule.
func (s StoreTest) cases() []suite.Case {
	var cases []suite.Case
	add := func(name, rule string, run func(*fleet)) {
		cases = append(cases, suite.Case{Name: name, Rule: rule, Run: func(t *testing.T) error { return s.try(t, run) }})
	}
	add("Register", "a session that does not exist is created; every node sees what was said of it, and where it is", (*fleet).register)
	add("Reconnect", "the latest connection is the home, on whatever node; Created stays, all else is as said last; the home before is returned, also when asked twice", (*fleet).reconnect)
	add("WrongUser", "another user's attempt is ErrWrongUser, before anything changes", (*fleet).wrongUser)
	add("Cap", "a new session above the user's limit is ErrCap, and nothing is created or removed; those that exist come back", (*fleet).limits)
	add("CapRace", "of sessions registered at once as many are accepted as the limit allows", (*fleet).capRace)
	add("OldConnections", "a connection that was replaced or given up does not become the home again: ErrMoved", (*fleet).oldConnections)
	add("Deregister", "only the home's own connection, on its own node, leaves the session without a home; the session stays", (*fleet).deregister)
	add("Remove", "a removed session takes with it all that was its, whoever asks; the first to ask is told that it existed", (*fleet).remove)
	add("Gone", "what is asked of a session that does not exist is ErrGone, or without effect where there is nothing to lose; nothing creates it", (*fleet).gone)
	add("Moved", "only the home's connection fetches, tries and buries messages; others get ErrMoved, and change nothing", (*fleet).moved)
	add("List", "each filter excludes the sessions it says, alone and with others; versions are compared as strings; each session is listed once", (*fleet).list)
	add("Alive", "vouching moves Live, and reports what does not exist without creating it", (*fleet).alive)
	add("Expire", "a session that nobody vouched for during more than idle is removed and returned, connected or not; others stay", (*fleet).expire)
	add("ExpireOnce", "each session that timed out is returned to one caller, however many ask", (*fleet).expireOnce)
	add("Scavenge", "clearing up takes nothing from sessions that exist, and finds nothing a second time", (*fleet).scavenge)
	add("Homed", "the sessions whose home is this node, and no others", (*fleet).homed)
	add("Accept", "a message is accepted once per session, and again by the same owner: a request that was sent twice; others are told that it is in progress, or done; over a connection that is not the home any more it is ErrMoved", (*fleet).accept)
	add("AcceptRace", "of owners that accept at once one has it", (*fleet).acceptRace)
	add("Takeover", "after its suite.Patience, and not before, a claim may be taken over; who had it can store nothing any more", (*fleet).takeover)
	add("Owner", "only the owner completes (others: ErrTaken) and releases; what is done stays done", (*fleet).owner)
	add("Outcome", "an outcome comes back byte by byte; nil and empty differ; the first one counts", (*fleet).outcome)
	add("Forget", "a message that was forgotten may come again; unknown ids are no error", (*fleet).forget)
	add("Put", "a message is stored once, and the session's home returned; an id that is there, in whatever state, or was until just now, changes nothing", (*fleet).put)
	add("Fetch", "up to most messages that were not tried, oldest first; fetching changes nothing", (*fleet).fetch)
	add("Attempted", "an attempt is counted once per connection and hides the message; the next Register brings it back in its old place, with its count", (*fleet).attempted)
	add("Delivered", "what is delivered is gone, in whatever state, and no other; unknown ids are no error", (*fleet).delivered)
	add("DeadLetters", "a dead letter is not fetched, also not after Register, until it is revived: in its old place and without attempts", (*fleet).deadLetters)
	add("Order", "messages of one sender stay in order, also when others send at once; none is lost", (*fleet).order)
	add("Correlations", "a correlation is taken by one answer, as often as that comes until it is complete; nil is none and empty is one; it outlives the delivery of its request", (*fleet).correlations)
	add("TakeRace", "of those that take a correlation at once one gets it", (*fleet).takeRace)
	add("Bytes", "payloads, outcomes and correlations are opaque; nil and empty differ", (*fleet).opaque)
	add("Names", "ids are opaque, up to 256 bytes, and never mixed up", (*fleet).names)
	add("Copies", "callers own the slices they pass and get: writing to them changes nothing that is stored", (*fleet).copies)
	add("Many", "thousands of ids in one call are no more than thousands of calls", (*fleet).many)
	add("Cancelled", "a call whose context has ended returns soon, and did either all or nothing", (*fleet).cancelled)
	add("Watch", "a watch of a session is called after a message was put or its home has changed (a hint may be lost, most are not), and not after stop", (*fleet).watch)
	if s.Outage != nil {
		add("Outage", "a store that cannot be reached is ErrUnavailable: never ErrGone, which would end the session", (*fleet).outage)
	}
	return cases
}

// try runs a case, again if the machine was too busy for it to tell anything.
func (s StoreTest) try(t *testing.T, run func(*fleet)) (err error) {
	if s.Sleep == nil {
		s.Sleep = time.Sleep
	}
	if s.Tick == 0 {
		s.Tick = 200 * time.Millisecond
	}
	for range 10 {
		if err = s.once(t, run); !errors.Is(err, errSlow) {
			return err
		}
	}
	return err
}

var errSlow = errors.New("ten times not done in time: set Tick to a longer one")

func (s StoreTest) once(t *testing.T, run func(*fleet)) error {
	ctx, cancel := context.WithTimeout(t.Context(), suite.Patience)
	defer cancel()
	open := s.New(t)
	f := &fleet{StoreTest: s, t: t, ctx: ctx, mark: rand.Text()[:10]}
	for i, node := range []string{"node a", "node b", "node c"} {
		f.stores[i] = open(f.name(node))
	}
	f.a, f.b, f.c = f.stores[0], f.stores[1], f.stores[2]
	done := make(chan error, 1)
	go func() {
		defer func() {
			switch r := recover().(type) {
			case nil:
				done <- nil
			case broken:
				done <- r
			default:
				done <- fmt.Errorf("panic: %v", r)
			}
		}()
		run(f)
	}()
	timer := time.NewTimer(suite.Patience + suite.Patience/2)
	defer timer.Stop()
	select {
	case err := <-done:
		return err
	case <-timer.C:
		return fmt.Errorf("did not return within %v", suite.Patience)
	}
}

// fleet is one case's three nodes.
type fleet struct {
	StoreTest
	t       *testing.T
	ctx     context.Context //nolint:containedctx // lives exactly as long as the case
	mark    string          // of the names of this case
	stores  [3]sessionrelay.Store
	a, b, c sessionrelay.Store
	answers atomic.Int64
}

// broken is what a case ends by.
type broken struct{ error }

func (b broken) Unwrap() error { return b.error }

func (f *fleet) failf(format string, args ...any) { panic(broken{fmt.Errorf(format, args...)}) }

// name returns a name that no other case and no other run has used.
func (f *fleet) name(base string) string { return "relaytest " + f.mark + " " + base }

// wants ends the case unless err is one of want; with none, unless it is nil.
func (f *fleet) wants(what string, err error, want ...error) {
	if len(want) == 0 && err == nil || slices.ContainsFunc(want, func(w error) bool { return errors.Is(err, w) }) {
		return
	}
	if len(want) == 0 {
		f.failf("%s: %w", what, err)
	}
	f.failf("%s: error %v, want %v", what, err, want[0])
}

func equal[T comparable](f *fleet, what string, got, want T) {
	if got != want {
		f.failf("%s = %+v, want %+v", what, got, want)
	}
}

const plenty = 1000

func hello(session, user string) sessionrelay.Hello {
	return sessionrelay.Hello{Session: session, User: user, Lib: "lib", App: "app", Version: "1"}
}

// connects registers conn and returns it.
func (f *fleet) connects(s sessionrelay.Store, session, user, conn string) string {
	_, _, err := s.Register(f.ctx, hello(session, user), conn, plenty)
	f.wants("Register", err)
	return conn
}

// session registers a session of its own on node a, with connection "c1".
func (f *fleet) session(base string) string {
	session := f.name(base)
	f.connects(f.a, session, f.name("user of "+base), "c1")
	return session
}

func (f *fleet) puts(session string, ids ...string) {
	for _, id := range ids {
		_, err := f.c.Put(f.ctx, session, message(id), nil)
		f.wants("Put", err)
	}
}

func message(id string) sessionrelay.Message {
	return sessionrelay.Message{ID: id, Payload: []byte("payload of " + id)}
}

func request(id string) sessionrelay.Message {
	return sessionrelay.Message{ID: id, Request: true, Payload: []byte("question")}
}

// fetches checks what there is to be fetched by conn.
func (f *fleet) fetches(s sessionrelay.Store, session, conn string, want ...sessionrelay.Message) {
	got, err := s.Fetch(f.ctx, session, conn, plenty)
	f.wants("Fetch", err)
	f.same("Fetch", got, want)
}

// tried is message(id) after n attempts.
func tried(n int, id string) sessionrelay.Message {
	m := message(id)
	m.Attempts = n
	return m
}

func messages(ids ...string) (all []sessionrelay.Message) {
	for _, id := range ids {
		all = append(all, message(id))
	}
	return all
}

func (f *fleet) same(what string, got, want []sessionrelay.Message) {
	if !slices.EqualFunc(got, want, func(a, b sessionrelay.Message) bool {
		return a.ID == b.ID && a.Request == b.Request && a.Attempts == b.Attempts && same(a.Payload, b.Payload)
	}) {
		f.failf("%s = %s, want %s", what, show(got), show(want))
	}
}

// same compares bytes; nil is not empty.
func same(a, b []byte) bool { return (a == nil) == (b == nil) && bytes.Equal(a, b) }

func show(messages []sessionrelay.Message) string {
	parts := make([]string, 0, len(messages))
	for _, m := range messages[:min(len(messages), 4)] {
		parts = append(parts, fmt.Sprintf("%q tried %d times: %s (request: %t)", m.ID, m.Attempts, text(m.Payload), m.Request))
	}
	return fmt.Sprintf("%d messages [%s]", len(messages), strings.Join(parts, "; "))
}

func text(b []byte) string {
	switch {
	case b == nil:
		return "nil"
	case len(b) > 40:
		return fmt.Sprintf("%q… (%d bytes)", b[:40], len(b))
	}
	return fmt.Sprintf("%q", b)
}

// looks returns what is known of a session.
func (f *fleet) looks(s sessionrelay.Store, session string) sessionrelay.Info {
	info, err := s.Lookup(f.ctx, session)
	f.wants("Lookup", err)
	return plain(info)
}

// plain makes equal what is, whatever the zones and the digits of its times.
func plain(i sessionrelay.Info) sessionrelay.Info {
	i.Created, i.Live = time.UnixMilli(i.Created.UnixMilli()), time.UnixMilli(i.Live.UnixMilli())
	return i
}

// home checks where a session is at home, as every node sees it.
func (f *fleet) home(session string, want sessionrelay.Home) {
	for _, s := range f.stores {
		equal(f, "home", f.looks(s, session).Home, want)
	}
}

// accepts checks how Accept answers.
func (f *fleet) accepts(s sessionrelay.Store, session, id, owner string, want sessionrelay.State) {
	claim, err := s.Accept(f.ctx, session, "", id, owner, time.Hour)
	f.wants("Accept", err)
	equal(f, "state of "+id, claim.State, want)
}

// holds checks that a message is done with an outcome.
func (f *fleet) holds(session, id string, want []byte) {
	for _, s := range f.stores {
		claim, err := s.Accept(f.ctx, session, "", id, "somebody", time.Hour)
		f.wants("Accept", err)
		equal(f, "state of a message that was completed", claim.State, sessionrelay.Done)
		if !same(claim.Outcome, want) {
			f.failf("outcome = %s, want %s", text(claim.Outcome), text(want))
		}
	}
}

// answer returns the id of an answer that no other has.
func (f *fleet) answer() string {
	return fmt.Sprint("answer ", f.answers.Add(1))
}

// took checks what Take returns to a new answer; a nil want is nothing.
func (f *fleet) took(s sessionrelay.Store, session, id string, want []byte) {
	got, ok, err := s.Take(f.ctx, session, id, f.answer())
	f.wants("Take", err)
	if ok != (want != nil) || ok && !same(got, want) {
		f.failf("Take = %s, %t, want %s", text(got), ok, text(want))
	}
}

func (f *fleet) listed(filter sessionrelay.Filter) (sessions []string) {
	err := f.b.List(f.ctx, filter, func(i sessionrelay.Info) bool {
		if strings.Contains(i.Session, f.mark) {
			sessions = append(sessions, i.Session)
		}
		return true
	})
	f.wants("List", err)
	slices.Sort(sessions)
	return sessions
}

func (f *fleet) lists(what string, filter sessionrelay.Filter, want ...string) {
	slices.Sort(want)
	if got := f.listed(filter); !slices.Equal(got, want) {
		f.failf("List of %s = %q, want %q", what, got, want)
	}
}

// within runs g, which has to be done within a tick: else nothing is told by it.
func (f *fleet) within(g func()) {
	start := time.Now()
	defer func() {
		if time.Since(start) >= f.Tick {
			panic(broken{errSlow})
		}
	}()
	g()
}

// crowd runs g n times at once, on the nodes in turn, and ends the case by the first
// error.
func (f *fleet) crowd(n int, g func(i int, s sessionrelay.Store) error) {
	err := suite.Crowd(n, func(i int) error { return g(i, f.stores[i%len(f.stores)]) })
	f.wants(fmt.Sprintf("%d calls at once", n), err)
}
