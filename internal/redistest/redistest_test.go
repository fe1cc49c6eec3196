package redistest_test

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/internal/redistest"
)

const soon = 10 * time.Second

// impatient gives up on a silent server fast and asks once.
func impatient(o *redis.Options) {
	o.MaxRetries = -1
	o.DialTimeout = 400 * time.Millisecond
	o.ReadTimeout = 400 * time.Millisecond
	o.DialerRetries = 1
}

func ping(ctx context.Context, rdb *redis.Client) error { return rdb.Ping(ctx).Err() }

func TestRestartedServerKeepsItsAddressAndLosesItsData(t *testing.T) {
	s := redistest.Start(t)
	addr, rdb := s.Addr(), s.Client(impatient)
	require.NoError(t, rdb.Set(t.Context(), "k", "v", 0).Err())

	s.Stop()
	s.Stop()
	require.Error(t, ping(t.Context(), rdb))

	s.Restart()
	assert.Equal(t, addr, s.Addr())
	require.Eventually(t, func() bool { return ping(t.Context(), rdb) == nil }, soon, 5*time.Millisecond)
	assert.ErrorIs(t, rdb.Get(t.Context(), "k").Err(), redis.Nil)
}

func TestPausedServerAnswersOnceResumed(t *testing.T) {
	s := redistest.Start(t)
	rdb := s.Client(impatient)
	require.NoError(t, ping(t.Context(), rdb))

	s.Pause()
	var timeout net.Error
	require.ErrorAs(t, ping(t.Context(), rdb), &timeout)
	assert.True(t, timeout.Timeout())

	s.Resume()
	assert.NoError(t, ping(t.Context(), rdb))
}

func TestCommandsCountsAllButItself(t *testing.T) {
	s := redistest.Start(t)
	rdb := s.Client()
	require.NoError(t, ping(t.Context(), rdb))

	before := s.Commands()
	require.Equal(t, before, s.Commands())
	for range 7 {
		require.NoError(t, ping(t.Context(), rdb))
	}
	assert.Equal(t, before+7, s.Commands())

	s.Restart()
	assert.Zero(t, s.Commands())
}

func TestServersDoNotMeet(t *testing.T) {
	a, b := redistest.Start(t), redistest.Start(t)
	require.NotEqual(t, a.Addr(), b.Addr())
	require.NoError(t, a.Client().Set(t.Context(), "k", "v", 0).Err())
	assert.ErrorIs(t, b.Client().Get(t.Context(), "k").Err(), redis.Nil)
}

func TestEachIsEmptyAndAnswers(t *testing.T) {
	var ran []string
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		ran = append(ran, t.Name())
		n, err := rdb.DBSize(t.Context()).Result()
		require.NoError(t, err)
		assert.Zero(t, n)
	})
	want := []string{t.Name() + "/miniredis"}
	if _, err := exec.LookPath("redis-server"); err == nil {
		want = append(want, t.Name()+"/redis")
	}
	assert.Equal(t, want, ran)
}

func TestBubbleRunsOnItsClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, connect := redistest.Bubble(t)
		rdb := connect(func(o *redis.Options) { o.ClientName = "one" })
		require.NoError(t, rdb.Set(t.Context(), "k", "v", time.Hour).Err())
		assert.Equal(t, "v", connect().Get(t.Context(), "k").Val())

		time.Sleep(time.Hour - time.Millisecond)
		assert.True(t, m.Exists("k"))
		time.Sleep(time.Millisecond)
		assert.False(t, m.Exists("k"))
	})
}

// On a bare pipe this hangs within a few hundred rounds.
func TestBubbleSubscriptionsDoNotLockUp(t *testing.T) {
	for range 300 {
		synctest.Test(t, func(t *testing.T) {
			m, connect := redistest.Bubble(t)
			sub := connect().Subscribe(t.Context(), "a")
			defer sub.Close()
			messages := sub.Channel()
			synctest.Wait()
			go func() {
				for range 20 {
					m.Publish("a", "")
				}
			}()
			for range 20 {
				require.NoError(t, sub.Subscribe(t.Context(), "b"))
			}
			for range 20 {
				<-messages
			}
		})
	}
}

func TestDialledConnectionIsASocket(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, _ := redistest.Bubble(t)
		c, err := redistest.Dial(m)
		require.NoError(t, err)
		var many strings.Builder
		for range 1000 {
			many.WriteString("*1\r\n$4\r\nPING\r\n")
		}
		n, err := c.Write([]byte(many.String()))
		require.NoError(t, err, "nobody reads the replies yet")
		assert.Equal(t, many.Len(), n)
		replies, err := io.ReadAll(io.LimitReader(c, 7000))
		require.NoError(t, err)
		assert.Equal(t, strings.Repeat("+PONG\r\n", 1000), string(replies))

		require.NoError(t, c.SetDeadline(time.Now().Add(time.Second)))
		_, err = c.Read(make([]byte, 1))
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
		require.NoError(t, c.Close())
		_, err = c.Write([]byte("x"))
		assert.ErrorIs(t, err, net.ErrClosed)
	})
}

// proxied returns a proxy to a server, a client by way of it with one
// connection open, and a client that goes straight to the server.
func proxied(t *testing.T) (p *redistest.Proxy, through, straight *redis.Client) {
	s := redistest.Start(t)
	p = redistest.NewProxy(t, s.Addr())
	through = s.Client(impatient, func(o *redis.Options) { o.Addr = p.Addr() })
	require.NoError(t, ping(t.Context(), through))
	return p, through, s.Client()
}

func TestProxyHeals(t *testing.T) {
	faults := map[string]func(*redistest.Proxy){
		"cut":          (*redistest.Proxy).Cut,
		"black hole":   (*redistest.Proxy).BlackHole,
		"drop replies": (*redistest.Proxy).DropReplies,
		"delay":        func(p *redistest.Proxy) { p.Delay(time.Minute) },
	}
	for name, fault := range faults {
		t.Run(name, func(t *testing.T) {
			p, rdb, _ := proxied(t)
			fault(p)
			require.Error(t, ping(t.Context(), rdb), "an open connection")
			require.Error(t, ping(t.Context(), rdb), "a new connection")
			p.Heal()
			assert.Eventually(t, func() bool { return ping(t.Context(), rdb) == nil }, soon, 5*time.Millisecond)
		})
	}
}

func TestProxyCutClosesAndBlackHoleDoesNot(t *testing.T) {
	p, rdb, _ := proxied(t)
	var timeout net.Error
	p.BlackHole()
	require.ErrorAs(t, ping(t.Context(), rdb), &timeout)
	assert.True(t, timeout.Timeout())

	p.Heal()
	require.Eventually(t, func() bool { return ping(t.Context(), rdb) == nil }, soon, 5*time.Millisecond)
	p.Cut()
	err := ping(t.Context(), rdb)
	require.Error(t, err)
	assert.False(t, errors.As(err, &timeout) && timeout.Timeout(), "%v", err)
}

func TestProxyDropRepliesExecutes(t *testing.T) {
	p, through, straight := proxied(t)
	p.DropReplies()
	require.Error(t, through.Set(t.Context(), "k", "v", 0).Err())
	assert.Equal(t, "v", straight.Get(t.Context(), "k").Val())

	p.Heal()
	require.Eventually(t, func() bool { return ping(t.Context(), through) == nil }, soon, 5*time.Millisecond)
	p.BlackHole()
	require.Error(t, through.Set(t.Context(), "k", "w", 0).Err())
	assert.Equal(t, "v", straight.Get(t.Context(), "k").Val(), "a black hole executes nothing")
}

// echo is a server that sends back what it gets, and hangs up after a "bye".
func echo(t *testing.T) (addr string) {
	ln, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { _ = ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				b := make([]byte, 3)
				for string(b) != "bye" {
					if _, err := io.ReadFull(c, b); err != nil {
						return
					}
					if _, err := c.Write(b); err != nil {
						return
					}
				}
			}()
		}
	}()
	return ln.Addr().String()
}

func dial(t *testing.T, addr string) net.Conn {
	c, err := new(net.Dialer).DialContext(t.Context(), "tcp", addr)
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close() })
	require.NoError(t, c.SetDeadline(time.Now().Add(soon)))
	return c
}

func TestProxyHealedConnectionIsWholeOrClosed(t *testing.T) {
	p := redistest.NewProxy(t, echo(t))
	for range 50 {
		c := dial(t, p.Addr())
		p.BlackHole()
		_, err := c.Write([]byte("one"))
		require.NoError(t, err)
		time.Sleep(time.Millisecond) // to be swallowed, in most rounds
		p.Heal()
		b := make([]byte, 3)
		_, err = io.ReadFull(c, b)
		var timeout net.Error
		require.False(t, errors.As(err, &timeout) && timeout.Timeout(), "silence")
		if err == nil {
			assert.Equal(t, "one", string(b))
		}
	}
}

func TestProxyBlackHoleHidesTheEndOfAConnection(t *testing.T) {
	p := redistest.NewProxy(t, echo(t))
	c := dial(t, p.Addr())
	p.DropReplies()
	_, err := c.Write([]byte("bye"))
	require.NoError(t, err)
	require.NoError(t, c.SetReadDeadline(time.Now().Add(200*time.Millisecond)))
	_, err = c.Read(make([]byte, 1))
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)

	p.Heal()
	require.NoError(t, c.SetReadDeadline(time.Now().Add(soon)))
	_, err = c.Read(make([]byte, 1))
	require.Error(t, err)
	assert.NotErrorIs(t, err, os.ErrDeadlineExceeded)
}

func TestProxyDelayIsALatencyEachWay(t *testing.T) {
	p, rdb, _ := proxied(t)
	const d = 30 * time.Millisecond
	p.Delay(d)
	begin := time.Now()
	require.NoError(t, ping(t.Context(), rdb))
	assert.GreaterOrEqual(t, time.Since(begin), 2*d)

	// Many requests under way at once wait together, not one after the other.
	begin = time.Now()
	sub := rdb.Subscribe(t.Context())
	defer sub.Close()
	for range 100 {
		require.NoError(t, sub.Ping(t.Context()))
	}
	for range 100 {
		_, err := sub.Receive(t.Context())
		require.NoError(t, err)
	}
	assert.Less(t, time.Since(begin), 50*d)
}

func TestProxyHealSparesWholeConnections(t *testing.T) {
	p, rdb, _ := proxied(t)
	conn := rdb.Conn()
	defer conn.Close()
	id := conn.ClientID(t.Context()).Val()
	require.NotZero(t, id)

	p.BlackHole()
	p.Heal()
	assert.Equal(t, id, conn.ClientID(t.Context()).Val())
}

func TestDurableServerLosesNothing(t *testing.T) {
	s := redistest.StartDurable(t)
	rdb := s.Client()
	require.NoError(t, rdb.Set(t.Context(), "k", "v", 0).Err())
	s.Restart()
	v, err := rdb.Get(t.Context(), "k").Result()
	require.NoError(t, err)
	assert.Equal(t, "v", v)
}
