package main

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/sessionrelay"
)

// service is two nodes on a Redis of their own, and the test's look at it.
type service struct {
	*stage
	t     *testing.T
	store sessionrelay.Store
}

func newService(t *testing.T) service {
	t.Helper()
	mustHaveRedis(t)
	s, err := newStage()
	t.Cleanup(func() { assert.NoError(t, s.close()) })
	require.NoError(t, err)
	store, err := sessionrelay.NewRedisStore(s.rdb, "the test")
	require.NoError(t, err)
	return service{s, t, store}
}

// joined returns a client that is connected to node i, which has subscribed to wake-ups
// for it: a message or a move is not found by chance.
func (s service) joined(user string, i int) *client {
	s.t.Helper()
	c, err := s.join(s.t.Context(), user, "", i)
	require.NoError(s.t, err)
	s.subscribed()
	return c
}

// subscribed waits until the nodes listen for all clients.
func (s service) subscribed() {
	s.t.Helper()
	eventually(s.t, func() bool {
		channels, err := s.rdb.PubSubChannels(s.t.Context(), "*").Result()
		return err == nil && len(channels) >= len(s.clients)
	}, "the subscriptions of the nodes")
}

// twin returns another client with the session of c, connected to node i.
func (s service) twin(c *client, i int) *client {
	s.t.Helper()
	twin, err := s.join(s.t.Context(), c.user(), c.id(), i)
	require.NoError(s.t, err)
	return twin
}

func (s service) move(c *client, i int) {
	s.t.Helper()
	require.NoError(s.t, s.connect(s.t.Context(), c, i))
}

func (s service) deliver(i int, session string, m outgoing) {
	s.t.Helper()
	require.NoError(s.t, s.fleet.deliver(s.t.Context(), i, session, m))
}

// notes are the effects of what the client of a session has said.
func (s service) notes(session string) []string {
	s.t.Helper()
	_, key := books(session)
	notes, err := s.rdb.LRange(s.t.Context(), key, 0, -1).Result()
	require.NoError(s.t, err)
	return notes
}

// runs is how often messages of a session's client were processed.
func (s service) runs(session string) (runs []string) {
	s.t.Helper()
	key, _ := books(session)
	runs, err := s.rdb.HVals(s.t.Context(), key).Result()
	require.NoError(s.t, err)
	return runs
}

// forgotten waits until the nodes have forgotten a message of a session's client: for
// then they would process it anew.
func (s service) forgotten(session, id string) {
	s.t.Helper()
	eventually(s.t, func() bool {
		claim, err := s.store.Accept(s.t.Context(), session, "", id, "the test", time.Minute)
		return err == nil && claim.State == sessionrelay.Accepted
	}, "the end of a message")
	require.NoError(s.t, s.store.Release(s.t.Context(), session, id, "the test"))
}

func (s service) home(session string) (home sessionrelay.Home, listed bool) {
	s.t.Helper()
	err := s.store.List(s.t.Context(), sessionrelay.Filter{}, func(i sessionrelay.Info) bool {
		if i.Session == session {
			home, listed = i.Home, true
		}
		return true
	})
	require.NoError(s.t, err)
	return home, listed
}

// in waits for something that takes no time on a machine that is not busy.
func in(t *testing.T, done <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-done:
	case <-time.After(time.Minute):
		require.Fail(t, "waited in vain", what)
	}
}

func eventually(t *testing.T, cond func() bool, what string) {
	t.Helper()
	require.Eventually(t, cond, time.Minute, 5*time.Millisecond, what)
}

func got(t *testing.T, c *client, want ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	require.NoError(t, c.await(ctx, len(want)))
	assert.Equal(t, want, c.report().Got)
}

func TestSecondConnectionClosesTheFirst(t *testing.T) {
	for name, other := range map[string]int{"on one node": 0, "on two nodes": 1} {
		t.Run(name, func(t *testing.T) {
			s := newService(t)
			first := s.joined("ada", 0)
			second := s.twin(first, other)
			in(t, first.current().done, "the end of the first connection")
			closed := first.report().Closed
			require.Len(t, closed, 1)
			assert.EqualValues(t, closedReplaced, closed[0].Code)
			assert.Contains(t, closed[0].Reason, first.id())
			assert.Zero(t, first.report().Ended, "the session goes on")
			s.deliver(0, first.id(), outgoing{Body: "hello"})
			got(t, second, "hello")
			in(t, second.say("word").done, "a reply")
			assert.Equal(t, []string{"word"}, s.notes(first.id()))
		})
	}
}

func TestReplyToASlowMessageFindsItsClientElsewhere(t *testing.T) {
	s := newService(t)
	c := s.joined("ada", 0)
	m := c.say(slowly)
	eventually(t, func() bool { return len(c.report().Got) == 1 }, "the begin of it")
	c.cut()
	s.move(c, 1)
	in(t, m.done, "the reply")
	require.NoError(t, m.err)
	assert.Equal(t, "done "+slowly, m.reply)
	assert.Greater(t, c.report().Said, 1)
	assert.Equal(t, []string{begun}, c.report().Got)
	assert.Equal(t, []string{slowly}, s.notes(c.id()))
	assert.Equal(t, []string{"1"}, s.runs(c.id()), "processed once")
}

func TestReplySurvivesAnImmediateReconnect(t *testing.T) {
	s := newService(t)
	c := s.joined("ada", 0)
	want := bodies("word", 20)
	for i, body := range want {
		m := c.say(body)
		s.move(c, (i+1)%nodes)
		in(t, m.done, "the reply")
		require.NoError(t, m.err)
		assert.Equal(t, "done "+body, m.reply) // done is closed once, or the client panics
		s.forgotten(c.id(), m.ID)
	}
	assert.Equal(t, want, s.notes(c.id()))
	assert.Equal(t, slices.Repeat([]string{"1"}, len(want)), s.runs(c.id()), "processed once")
}

func TestListingShowsWhereASessionIs(t *testing.T) {
	s := newService(t)
	c := s.joined("ada", 0)
	home, listed := s.home(c.id())
	assert.True(t, listed)
	assert.Equal(t, "node-0", home.Node)

	c.cut()
	eventually(t, func() bool { home, listed = s.home(c.id()); return home.Node == "" }, "it is away")
	assert.True(t, listed)

	m := c.say("word") // it waits for a connection
	s.move(c, 1)
	in(t, m.done, "the reply")
	home, _ = s.home(c.id())
	assert.Equal(t, "node-1", home.Node)

	require.NoError(t, s.fleet.remove(t.Context(), 0, c.id()))
	_, listed = s.home(c.id())
	assert.False(t, listed)
}

func TestStrangerIsRefusedAndTheOwnerKeepsAll(t *testing.T) {
	s := newService(t)
	c := s.joined("ada", 0)
	link := c.current()
	s.deliver(1, c.id(), outgoing{Body: "before"})
	got(t, c, "before")
	before, err := s.store.Lookup(t.Context(), c.id())
	require.NoError(t, err)
	for i := range nodes {
		eve, err := s.join(t.Context(), "eve", c.id(), i)
		require.Error(t, err)
		closed := eve.report().Closed
		require.Len(t, closed, 1)
		assert.EqualValues(t, 1008, closed[0].Code)
		assert.Contains(t, closed[0].Reason, "another user's")
	}
	after, err := s.store.Lookup(t.Context(), c.id())
	require.NoError(t, err)
	assert.Equal(t, before.Home, after.Home)
	s.deliver(1, c.id(), outgoing{Body: "after"})
	got(t, c, "before", "after")
	assert.Same(t, link, c.current())
	assert.Empty(t, c.report().Closed)

	mallory := newClient("not the secret", "ada")
	require.Error(t, s.connect(t.Context(), mallory, 0), "a forged token")
}

func TestEndOfASessionIsToldOnceAndRejectsWhatIsPending(t *testing.T) {
	s := newService(t)
	c := s.joined("ada", 0)
	first, second := c.say(slowly), c.say("word")
	eventually(t, func() bool { return len(c.report().Got) == 1 }, "the begin of the first")
	require.NoError(t, s.fleet.remove(t.Context(), 1, c.id()))
	for _, m := range []*call{first, second} {
		in(t, m.done, "the end")
		require.ErrorIs(t, m.err, errEnded)
	}
	in(t, c.current().done, "the end of the connection")
	closed := c.report().Closed
	require.Len(t, closed, 1)
	assert.EqualValues(t, closedRemoved, closed[0].Code)
	require.Error(t, s.connect(t.Context(), c, 0), "there is no way back")
	assert.EqualValues(t, closedLost, c.report().Closed[1].Code)
	assert.Equal(t, 1, c.report().Ended)
}

func TestMessagesFromWithinProcessingReachTheClient(t *testing.T) {
	s := newService(t)
	for i := range nodes {
		c := s.joined("ada", i)
		m := c.say(push)
		in(t, m.done, "the reply")
		require.NoError(t, m.err)
		eventually(t, func() bool { return len(c.report().Got) == 2 }, "both messages")
		assert.ElementsMatch(t, []string{"from inside", "from beside"}, c.report().Got)
	}
}

func TestAnswerFindsWhatTheRequestWasAbout(t *testing.T) {
	for name, via := range map[string]int{"asked at home": 0, "asked by the other node": 1} {
		for verdict, no := range map[string]bool{"resolved": false, "rejected": true} {
			t.Run(name+", "+verdict, func(t *testing.T) {
				s := newService(t)
				c := s.newClient("ada", "")
				c.no = no
				s.move(c, 0)
				s.subscribed()
				s.deliver(via, c.id(), outgoing{Body: "this", About: "order 1"})
				s.deliver(via, c.id(), outgoing{Body: "that", About: "order 2"})
				eventually(t, func() bool { return len(s.notes(c.id())) == 2 }, "both answers")
				says := map[bool]string{false: "yes", true: "no"}[no]
				assert.Equal(t, []string{
					fmt.Sprintf("order 1: %s to this", says), fmt.Sprintf("order 2: %s to that", says),
				}, s.notes(c.id()))
				assert.Equal(t, []string{"this", "that"}, c.report().Got)
			})
		}
	}
}
