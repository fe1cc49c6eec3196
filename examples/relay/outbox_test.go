package main

import (
	"context"
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// Senders go on through kills of nodes, which are started again, and of a Redis that
// has written to disk whatever it acknowledged.
func TestOutboxLosesNothingByKills(t *testing.T) {
	const sessions, batch = 40, 20
	messages, nodeKills, redisKills := 100_000, 20, 5
	if testing.Short() {
		messages, nodeKills, redisKills = 10_000, 4, 2
	}
	each := messages / sessions
	s := newService(t)
	ctx := t.Context()

	clients := make([]*client, sessions)
	for i := range clients {
		c := s.joined(fmt.Sprint("user-", i), i%nodes)
		clients[i] = c
		go c.stay(ctx, s.fleet.addrs, i+1)
	}

	start := time.Now()
	var sent atomic.Int64
	var sending sync.WaitGroup
	fail := make(chan error, sessions)
	for n, c := range clients {
		sending.Go(func() {
			for i := 0; i < each; i += batch {
				some := min(batch, each-i)
				if err := s.fleet.insist(ctx, i/batch+n, c.id(), numbered(i, some)...); err != nil {
					fail <- err
					return
				}
				sent.Add(int64(some))
			}
		})
	}

	kills := nodeKills + redisKills
	for i := range kills { // all along the way
		at := int64(messages * (i + 1) * 9 / 10 / (kills + 1))
		eventually(t, func() bool { return sent.Load() >= at || len(fail) > 0 }, "messages being sent")
		require.Less(t, sent.Load(), int64(messages), "there is work to be disturbed")
		if (i+1)*redisKills/kills > i*redisKills/kills {
			require.NoError(t, s.redis.restart())
			continue
		}
		s.fleet.kill(i % nodes)
		require.NoError(t, s.fleet.start(i%nodes))
	}
	sending.Wait()
	require.Empty(t, fail)
	stored := time.Since(start)

	within, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	want := make([]string, each)
	for i := range want {
		want[i] = strconv.Itoa(i)
	}
	var sum tally
	for _, c := range clients {
		require.NoError(t, c.await(within, each))
		sum.add(c.received(want))
		buried, err := s.store.Buried(ctx, c.id())
		require.NoError(t, err)
		assert.Empty(t, buried, "dead letters")
	}
	assert.Equal(t, messages, sum.Done)
	assert.Zero(t, sum.Lost, "lost")
	assert.Zero(t, sum.Twice, "duplicated in effect")
	assert.Zero(t, sum.Misplaced, "out of order")
	assert.Zero(t, sum.Strange, "never sent")
	assert.NotEmpty(t, sum.Homeless, "the kills did no harm")
	assert.NotZero(t, sum.Again, "the kills did no harm")
	t.Logf("%d messages to %d sessions, %d kills of nodes and %d of Redis: stored after %v, delivered after %v; %d lost, %d twice, %d misplaced; %d came again, %d connections lost",
		sum.Sent, sessions, nodeKills, redisKills, stored.Round(time.Millisecond), time.Since(start).Round(time.Millisecond),
		sum.Lost, sum.Twice, sum.Misplaced, sum.Again, len(sum.Homeless))
}

func numbered(from, n int) []outgoing {
	all := make([]outgoing, n)
	for i := range all {
		body := strconv.Itoa(from + i)
		all[i] = outgoing{ID: body, Body: body}
	}
	return all
}
