package hub_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/internal/hub"
	"github.com/sessionlock/sessionlock/internal/redistest"
)

// soon bounds what happens at once on a machine that is not overloaded.
const soon = 20 * time.Second

func open(t *testing.T, rdb redis.UniversalClient) *hub.Hub {
	h := hub.New(rdb)
	t.Cleanup(h.Close)
	return h
}

// wakes counts the calls of one watcher.
type wakes struct {
	atomic.Int64
	stop func()
}

func watch(h *hub.Hub, channel string) *wakes {
	w := new(wakes)
	w.stop = h.Watch(channel, func() { w.Add(1) })
	return w
}

// more waits until w has been woken more often than n times, and returns how often.
func (w *wakes) more(t *testing.T, n int64) int64 {
	t.Helper()
	require.Eventually(t, func() bool { return w.Load() > n }, soon, time.Millisecond, "not woken")
	return w.Load()
}

// confirmed waits until the subscription stands and returns how often w was woken.
func (w *wakes) confirmed(t *testing.T) int64 { t.Helper(); return w.more(t, 0) }

func publish(t *testing.T, rdb redis.UniversalClient, channel, payload string) {
	t.Helper()
	require.NoError(t, rdb.Publish(t.Context(), channel, payload).Err())
}

func subscribers(t *testing.T, rdb redis.UniversalClient, channel string) int64 {
	t.Helper()
	n, err := rdb.PubSubNumSub(t.Context(), channel).Result()
	require.NoError(t, err)
	return n[channel]
}

func eventuallySubscribers(t *testing.T, rdb redis.UniversalClient, channel string, n int64) {
	t.Helper()
	require.Eventually(t, func() bool { return subscribers(t, rdb, channel) == n }, soon, time.Millisecond)
}

// connections counts the server's pub/sub connections.
func connections(t *testing.T, rdb *redis.Client) int {
	t.Helper()
	list, err := rdb.Do(t.Context(), "client", "list", "type", "pubsub").Text()
	require.NoError(t, err)
	return strings.Count(list, "\n")
}

func TestConfirmationAndEveryMessageWake(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		w := watch(open(t, rdb), "c")
		require.EqualValues(t, 1, w.confirmed(t))
		for i, payload := range []string{"1", "", "garbage \x00\xff\r\n*1\r\n:1\r\n", strings.Repeat("x", 1<<20)} {
			publish(t, rdb, "c", payload)
			assert.EqualValues(t, i+2, w.more(t, int64(i+1)))
		}
	})
}

func TestEveryProtocolAndTopologyWakes(t *testing.T) {
	s := redistest.Start(t)
	for _, protocol := range []int{2, 3} {
		t.Run(fmt.Sprint("RESP", protocol), func(t *testing.T) {
			rdb := s.Client(func(o *redis.Options) { o.Protocol = protocol })
			w := watch(open(t, rdb), "c")
			n := w.confirmed(t)
			publish(t, rdb, "c", "")
			w.more(t, n)
		})
	}
	t.Run("cluster", func(t *testing.T) {
		redistest.Each(t, func(t *testing.T, single *redis.Client) {
			rdb := redis.NewClusterClient(&redis.ClusterOptions{
				ClusterSlots: func(context.Context) ([]redis.ClusterSlot, error) {
					node := redis.ClusterNode{Addr: single.Options().Addr}
					return []redis.ClusterSlot{{Start: 0, End: 16383, Nodes: []redis.ClusterNode{node}}}, nil
				},
			})
			defer rdb.Close()
			h := hub.New(rdb)
			defer h.Close()
			a, b := watch(h, "a"), watch(h, "{other slot}")
			n := b.confirmed(t)
			a.confirmed(t)
			publish(t, single, "{other slot}", "")
			b.more(t, n)
		})
	})
}

func TestWatchersOfAChannelShareASubscription(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		h := open(t, rdb)
		other := watch(h, "other")
		a := watch(h, "c")
		a.confirmed(t)
		b := watch(h, "c")
		require.EqualValues(t, 1, subscribers(t, rdb, "c"))

		a.stop()
		a.stop()
		na := a.Load()
		publish(t, rdb, "c", "")
		nb := b.more(t, 0)
		assert.EqualValues(t, 1, subscribers(t, rdb, "c"))

		b.stop()
		eventuallySubscribers(t, rdb, "c", 0)
		no := other.confirmed(t)
		publish(t, rdb, "c", "")
		publish(t, rdb, "other", "")
		other.more(t, no)
		assert.Equal(t, na, a.Load())
		assert.Equal(t, nb, b.Load())

		again := watch(h, "c")
		n := again.confirmed(t)
		publish(t, rdb, "c", "")
		again.more(t, n)
	})
}

func TestAChannelLeftAndWatchedAgainMissesNothing(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		h := open(t, rdb)
		watch(h, "other").confirmed(t)
		for range 200 {
			w := watch(h, "c")
			if rand.N(2) == 0 {
				eventuallySubscribers(t, rdb, "c", 1)
			}
			w.stop()
			last := watch(h, "c")
			eventuallySubscribers(t, rdb, "c", 1)
			publish(t, rdb, "c", "")
			last.more(t, 0)
			last.stop()
		}
		eventuallySubscribers(t, rdb, "c", 0)
	})
}

func TestChangedMayWatchAndStop(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		h := open(t, rdb)
		woken := make(chan struct{})
		var once sync.Once
		var stop func()
		ready := make(chan struct{})
		stop = h.Watch("first", func() {
			once.Do(func() {
				<-ready
				stop()
				h.Watch("second", func() { close(woken) })
			})
		})
		close(ready)
		select {
		case <-woken:
		case <-time.After(soon):
			t.Fatal("not woken")
		}
		eventuallySubscribers(t, rdb, "first", 0)
	})
}

// Whichever watcher is called first stops all others of the channel, which were
// due to be called for the same message.
func TestNothingIsCalledAfterStop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, connect := redistest.Bubble(t)
		h := open(t, connect())
		watch(h, "c")
		synctest.Wait()

		var calls atomic.Int64
		stops := make([]func(), 50)
		for i := range stops {
			stops[i] = h.Watch("c", func() {
				calls.Add(1)
				for j, stop := range stops {
					if j != i {
						stop()
					}
				}
			})
		}
		m.Publish("c", "")
		synctest.Wait()
		assert.EqualValues(t, 1, calls.Load())
	})
}

func TestAWatcherWhoJoinsIsNotWokenForNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, connect := redistest.Bubble(t)
		h := open(t, connect())
		watch(h, "c")
		synctest.Wait()

		w := watch(h, "c")
		time.Sleep(time.Hour)
		assert.Zero(t, w.Load())
		m.Publish("c", "")
		synctest.Wait()
		assert.EqualValues(t, 1, w.Load())
	})
}

func TestKilledSubscriptionWakesEveryWatcherAgain(t *testing.T) {
	rdb := redistest.Start(t).Client()
	h := open(t, rdb)
	all := make([]*wakes, 50)
	before := make([]int64, len(all))
	for i := range all {
		all[i] = watch(h, fmt.Sprint("c", i/2))
		if i%2 == 0 {
			all[i].confirmed(t)
		}
	}
	for range 3 {
		// Right after a loss there may be a moment without a connection.
		require.Eventually(t, func() bool {
			killed, err := rdb.ClientKillByFilter(t.Context(), "TYPE", "pubsub").Result()
			return err == nil && killed > 0
		}, soon, time.Millisecond)
		for i, w := range all {
			before[i] = w.more(t, before[i])
		}
		require.Eventually(t, func() bool { return connections(t, rdb) == 1 }, soon, time.Millisecond)
	}
	for i, w := range all {
		publish(t, rdb, fmt.Sprint("c", i/2), "")
		w.more(t, before[i])
	}
}

func TestRestartedServerWakesEveryWatcher(t *testing.T) {
	s := redistest.Start(t)
	rdb := s.Client()
	h := open(t, rdb)
	a, b := watch(h, "a"), watch(h, "b")
	na, nb := a.confirmed(t), b.confirmed(t)

	s.Stop()
	late := watch(h, "late")
	b.stop()
	s.Restart()

	na = a.more(t, na)
	late.confirmed(t)
	publish(t, rdb, "a", "")
	a.more(t, na)
	assert.Equal(t, nb, b.Load())
	assert.Zero(t, subscribers(t, rdb, "b"))
}

func TestManyChannelsTravelTogetherOnOneConnection(t *testing.T) {
	s := redistest.Start(t)
	rdb := s.Client()
	h := open(t, rdb)
	s.Stop()
	all := make([]*wakes, 2000)
	for i := range all {
		all[i] = watch(h, fmt.Sprint("c", i))
	}
	s.Restart()
	for _, w := range all {
		w.confirmed(t)
	}
	assert.Equal(t, 1, connections(t, rdb))
	subscribed := func(pattern string) int {
		names, err := rdb.PubSubChannels(t.Context(), pattern).Result()
		require.NoError(t, err)
		return len(names)
	}
	assert.Equal(t, len(all), subscribed("c*"))
	assert.Equal(t, 2, calls(t, rdb, "subscribe"))

	// Those that come and go while it stands use the same.
	s.Pause()
	for i, w := range all {
		w.stop()
		watch(h, fmt.Sprint("d", i))
	}
	s.Resume()
	require.Eventually(t, func() bool { return subscribed("c*") == 0 && subscribed("d*") == len(all) }, soon, time.Millisecond)
	assert.Equal(t, 1, connections(t, rdb))
}

func commandsDuring(s *redistest.Server, d time.Duration) int64 {
	before := s.Commands()
	time.Sleep(d)
	return s.Commands() - before
}

// calls returns how often the server has executed a command.
func calls(t *testing.T, rdb *redis.Client, command string) (n int) {
	t.Helper()
	info, err := rdb.Info(t.Context(), "commandstats").Result()
	require.NoError(t, err)
	_, rest, _ := strings.Cut(info, "cmdstat_"+command+":calls=")
	_, _ = fmt.Sscanf(rest, "%d,", &n)
	return n
}

func TestStormStarvesNobody(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		h := open(t, rdb)
		noisy, quiet := watch(h, "noisy"), watch(h, "quiet")
		confirmed := noisy.confirmed(t)
		n := quiet.confirmed(t)
		for range 100 {
			_, err := rdb.Pipelined(t.Context(), func(p redis.Pipeliner) error {
				for range 100 {
					p.Publish(t.Context(), "noisy", "x")
				}
				p.Publish(t.Context(), "quiet", "x")
				return nil
			})
			require.NoError(t, err)
		}
		require.Eventually(t, func() bool { return quiet.Load() == n+100 }, soon, time.Millisecond)
		assert.Equal(t, confirmed+10_000, noisy.Load())
	})
}

func TestIdleHubSendsNothingAndHoldsNothing(t *testing.T) {
	t.Parallel() // it waits in real time
	s := redistest.Start(t)
	rdb := s.Client()
	h := open(t, s.Client(func(o *redis.Options) { o.ClientName = "hub" }))
	held := func() bool {
		list, err := rdb.ClientList(t.Context()).Result()
		require.NoError(t, err)
		return strings.Contains(list, "name=hub")
	}
	a, b := watch(h, "a"), watch(h, "b")
	a.confirmed(t)
	b.confirmed(t)
	require.True(t, held())
	a.stop()
	b.stop()
	stopped := time.Now()
	require.Eventually(t, func() bool { return !held() }, 10*time.Second, 50*time.Millisecond)
	assert.Greater(t, time.Since(stopped), 4*time.Second, "kept for the next watcher")

	assert.Zero(t, commandsDuring(s, 4*time.Second))

	w := watch(h, "a")
	n := w.confirmed(t)
	publish(t, rdb, "a", "")
	w.more(t, n)
}

func TestIdleHubEndsItsGoroutinesAfterTheLinger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, connect := redistest.Bubble(t)
		var l lines
		h := hub.New(connect(l.through(m, always))) // not closed: the bubble fails if anything is left of it
		synctest.Wait()
		assert.Zero(t, l.tried.Load())
		for range 3 {
			w := watch(h, "c")
			synctest.Wait()
			require.EqualValues(t, 1, w.Load())
			w.stop()
			time.Sleep(5*time.Second - time.Millisecond)
			assert.Equal(t, 1, m.CurrentConnectionCount())
			assert.Empty(t, m.PubSubChannels("*"))
			w = watch(h, "c")
			synctest.Wait()
			require.EqualValues(t, 1, w.Load(), "the lingering connection serves on")
			time.Sleep(time.Hour)
			require.Equal(t, 1, m.PubSubNumSub("c")["c"])
			w.stop()
			time.Sleep(5*time.Second + time.Millisecond)
			synctest.Wait()
			assert.Zero(t, m.CurrentConnectionCount())
		}
		assert.EqualValues(t, 3, l.tried.Load())
	})
}

func TestQuietSubscriptionStandsForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, connect := redistest.Bubble(t)
		h := open(t, connect())
		w := watch(h, "c")
		time.Sleep(time.Minute)
		before := m.CommandCount()
		time.Sleep(time.Hour)
		assert.EqualValues(t, 1, w.Load())
		assert.Equal(t, 1, m.TotalConnectionCount())
		assert.LessOrEqual(t, m.CommandCount()-before, 1200, "PINGs")
	})
}

// wire is a connection whose other end can vanish without a word.
type wire struct {
	net.Conn
	dead *atomic.Bool
}

func (w wire) Read(b []byte) (int, error) {
	for {
		n, err := w.Conn.Read(b)
		if err != nil || !w.dead.Load() {
			return n, err
		}
	}
}

func TestHalfOpenConnectionIsReplaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, connect := redistest.Bubble(t)
		var dead *atomic.Bool
		h := open(t, connect(func(o *redis.Options) {
			o.Dialer = func(context.Context, string, string) (net.Conn, error) {
				c, err := redistest.Dial(m)
				dead = new(atomic.Bool)
				return wire{c, dead}, err
			}
		}))
		for after := range 20 {
			w := watch(h, "c")
			synctest.Wait()
			time.Sleep(time.Duration(after) * 733 * time.Millisecond)
			n := w.Load()

			dead.Store(true)
			m.Publish("c", "lost")
			time.Sleep(9*time.Second + 100*time.Millisecond)
			synctest.Wait()
			require.Greater(t, w.Load(), n, "look again")
			n = w.Load()
			m.Publish("c", "")
			synctest.Wait()
			assert.Equal(t, n+1, w.Load())
			w.stop()
			assert.Equal(t, 1, m.CurrentConnectionCount())
		}
	})
}

// lines counts the connections a client makes.
type lines struct{ tried, open atomic.Int64 }

type line struct {
	net.Conn
	hangUp func()
}

func (l line) Close() error { l.hangUp(); return l.Conn.Close() }

// through has a client dial m by way of l, if pass lets the nth attempt through.
func (l *lines) through(m *miniredis.Miniredis, pass func(n int64) error) func(*redis.Options) {
	return func(o *redis.Options) {
		o.Dialer = func(ctx context.Context, _, _ string) (net.Conn, error) {
			if err := errors.Join(ctx.Err(), pass(l.tried.Add(1))); err != nil {
				return nil, err
			}
			c, err := redistest.Dial(m)
			if err != nil {
				return nil, err
			}
			l.open.Add(1)
			return line{c, sync.OnceFunc(func() { l.open.Add(-1) })}, nil
		}
	}
}

func always(int64) error { return nil }

func TestDownServerIsTriedAgainAtABoundedPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, connect := redistest.Bubble(t)
		var up atomic.Bool
		var l lines
		h := open(t, connect(l.through(m, func(int64) error {
			if up.Load() {
				return nil
			}
			return errors.New("connection refused")
		})))
		w := watch(h, "c")
		time.Sleep(10 * time.Minute)
		assert.Zero(t, w.Load())
		assert.LessOrEqual(t, l.tried.Load(), int64(10*60/2.5)+10)
		assert.GreaterOrEqual(t, l.tried.Load(), int64(10*60/5))

		// However many come and go meanwhile.
		before := l.tried.Load()
		for range 10_000 {
			watch(h, "d").stop()
			time.Sleep(time.Millisecond)
		}
		assert.LessOrEqual(t, l.tried.Load()-before, int64(5))

		up.Store(true)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		assert.EqualValues(t, 1, w.Load())

		w.stop()
		up.Store(false)
		time.Sleep(10 * time.Second)
		before = l.tried.Load()
		time.Sleep(time.Hour)
		assert.Equal(t, before, l.tried.Load(), "nothing is watched")
	})
}

// A server may accept each connection, confirm, and close it at once.
func TestFlappingConnectionIsPaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, connect := redistest.Bubble(t)
		tried := new(atomic.Int64)
		h := open(t, connect(func(o *redis.Options) {
			o.Dialer = func(ctx context.Context, _, _ string) (net.Conn, error) {
				tried.Add(1)
				c, err := redistest.Dial(m)
				return &flapping{Conn: c}, errors.Join(ctx.Err(), err)
			}
		}))
		w := watch(h, "c")
		time.Sleep(10 * time.Minute)
		assert.Greater(t, w.Load(), int64(50), "it does confirm")
		assert.LessOrEqual(t, tried.Load(), int64(3*10*60/2.5))
	})
}

// flapping ends right after the first confirmation it delivered.
type flapping struct {
	net.Conn
	over bool
}

func (f *flapping) Read(b []byte) (int, error) {
	if f.over {
		return 0, io.EOF
	}
	n, err := f.Conn.Read(b)
	f.over = bytes.Contains(b[:n], []byte("subscribe"))
	return n, err
}

func TestWatchAndStopNeverWaitForTheNetwork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, connect := redistest.Bubble(t)
		h := hub.New(connect(func(o *redis.Options) {
			o.Dialer = func(ctx context.Context, _, _ string) (net.Conn, error) {
				<-ctx.Done()
				return nil, ctx.Err()
			}
		}))
		begin := time.Now()
		for i := range 1000 {
			w := watch(h, fmt.Sprint("c", i))
			if i%2 == 0 {
				w.stop()
			}
			synctest.Wait()
		}
		assert.Zero(t, time.Since(begin))
		h.Close()
		assert.Zero(t, time.Since(begin), "the dial ends with its context")
	})
}

func TestRefusedChannelHurtsNoOther(t *testing.T) {
	s := redistest.Start(t)
	admin := s.Client()
	require.NoError(t, admin.ACLSetUser(t.Context(), "some",
		"on", ">pw", "+@all", "resetchannels", "&ok:*").Err())
	rdb := s.Client(func(o *redis.Options) { o.Username, o.Password = "some", "pw" })
	h := open(t, rdb)
	s.Stop()
	all := make([]*wakes, 20)
	for i := range all {
		all[i] = watch(h, fmt.Sprint("ok:", i))
	}
	foreign := []*wakes{watch(h, "no:1"), watch(h, "no:2")}
	s.Restart()
	require.NoError(t, admin.ACLSetUser(t.Context(), "some",
		"on", ">pw", "+@all", "resetchannels", "&ok:*").Err())

	for _, w := range all {
		w.confirmed(t)
	}
	later := watch(h, "ok:later")
	foreign = append(foreign, watch(h, "no:later"))
	later.confirmed(t)
	for i, w := range all {
		n := w.Load()
		publish(t, admin, fmt.Sprint("ok:", i), "")
		w.more(t, n)
	}
	for _, w := range foreign {
		assert.Zero(t, w.Load())
	}
	assert.LessOrEqual(t, commandsDuring(s, time.Second), int64(2),
		"refused channels are not asked for again and again")
}

func TestRingGivesNoHintsAndDoesNoHarm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, _ := redistest.Bubble(t)
		ring := redis.NewRing(&redis.RingOptions{
			Addrs:  map[string]string{"one": "127.0.0.1:6379"},
			Dialer: func(context.Context, string, string) (net.Conn, error) { return redistest.Dial(m) },
		})
		defer ring.Close()
		h := hub.New(ring)
		defer h.Close()
		w := watch(h, "c")
		time.Sleep(time.Minute)
		m.Publish("c", "")
		synctest.Wait()
		assert.Zero(t, w.Load())
	})
}

func TestCloseEndsEverything(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, connect := redistest.Bubble(t)
		unused := hub.New(connect())
		unused.Close()
		unused.Close()

		var l lines
		h := hub.New(connect(l.through(m, always)))
		w := watch(h, "c")
		synctest.Wait()
		var closing sync.WaitGroup
		for range 3 {
			closing.Go(func() {
				h.Close()
				assert.Zero(t, l.open.Load(), "each Close waits")
			})
		}
		closing.Wait()

		n := w.Load()
		late := watch(h, "c")
		m.Publish("c", "")
		time.Sleep(time.Hour)
		assert.Equal(t, n, w.Load())
		assert.Zero(t, late.Load())
		assert.EqualValues(t, 1, l.tried.Load())
		w.stop()
		late.stop()
	})
}

func TestCloseWaitsForACallUnderWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, connect := redistest.Bubble(t)
		h := hub.New(connect())
		release, closed := make(chan struct{}), make(chan struct{})
		h.Watch("c", func() { <-release })
		synctest.Wait()
		go func() { h.Close(); close(closed) }()
		synctest.Wait()
		select {
		case <-closed:
			t.Error("Close returned before the call did")
		default:
		}
		close(release)
		<-closed
	})
}

// Close must come back whatever state it catches the hub in.
func TestCloseDuringEverything(t *testing.T) {
	for seed := range uint64(200) {
		synctest.Test(t, func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 0))
			m, connect := redistest.Bubble(t)
			var l lines
			h := hub.New(connect(l.through(m, func(n int64) error {
				if n%3 == 2 {
					return errors.New("connection refused")
				}
				return nil
			})))
			for range r.IntN(10) {
				switch w := watch(h, fmt.Sprint("c", r.IntN(5))); r.IntN(3) {
				case 0:
					w.stop()
				case 1:
					m.Publish(fmt.Sprint("c", r.IntN(5)), "")
				default:
					time.Sleep(time.Duration(r.Int64N(int64(4 * time.Second))))
				}
			}
			begin := time.Now()
			h.Close()
			assert.Zero(t, time.Since(begin))
			assert.Zero(t, l.open.Load())
		})
	}
}

func TestCloseOnAHangingServerIsBounded(t *testing.T) {
	s := redistest.Start(t)
	for _, connected := range []bool{false, true} {
		t.Run(fmt.Sprint("connected=", connected), func(t *testing.T) {
			p := redistest.NewProxy(t, s.Addr())
			var dialled atomic.Int64
			h := hub.New(s.Client(func(o *redis.Options) {
				o.ReadTimeout, o.WriteTimeout = 300*time.Millisecond, 300*time.Millisecond
				o.Dialer = func(ctx context.Context, network, _ string) (net.Conn, error) {
					defer dialled.Add(1)
					return new(net.Dialer).DialContext(ctx, network, p.Addr())
				}
			}))
			if !connected {
				p.BlackHole()
			}
			w := watch(h, "c")
			if connected {
				w.confirmed(t)
				p.BlackHole()
				watch(h, "d")
			}
			require.Eventually(t, func() bool { return dialled.Load() > 0 }, soon, time.Millisecond)

			begin := time.Now()
			h.Close()
			took := time.Since(begin)
			t.Log(took)
			assert.Less(t, took, 5*time.Second)
		})
	}
}

func TestHammer(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		h := hub.New(rdb)
		var workers sync.WaitGroup
		for i := range 8 {
			workers.Go(func() {
				r := rand.New(rand.NewPCG(uint64(i), 1))
				var open []*wakes
				for range 500 {
					switch channel := fmt.Sprint("c", r.IntN(10)); r.IntN(4) {
					case 0, 1:
						open = append(open, watch(h, channel))
					case 2:
						if len(open) > 0 {
							open[0].stop()
							open = open[1:]
						}
					default:
						rdb.Publish(t.Context(), channel, "")
					}
				}
				for _, w := range open {
					w.stop()
				}
			})
		}
		workers.Wait()
		last := watch(h, "c0")
		eventuallySubscribers(t, rdb, "c0", 1)
		publish(t, rdb, "c0", "")
		last.more(t, 0)
		for i := 1; i < 10; i++ {
			eventuallySubscribers(t, rdb, fmt.Sprint("c", i), 0)
		}

		for range 4 {
			workers.Go(func() {
				for range 100 {
					watch(h, "c0").stop()
				}
			})
		}
		h.Close()
		workers.Wait()
		eventuallySubscribers(t, rdb, "c0", 0)
	})
}

func TestLocalWakesWhoWatches(t *testing.T) {
	var l hub.Local
	l.Wake("a") // nobody
	var heard []string
	first := l.Watch("a", func() { heard = append(heard, "first") })
	l.Watch("b", func() { heard = append(heard, "b") })
	l.Wake("a")
	assert.Equal(t, []string{"first"}, heard)
	l.Watch("a", func() {
		first() // a watcher may stop another one, and watch
		heard = append(heard, "second")
	})
	l.Wake("a")
	l.Wake("a")
	assert.Len(t, heard, 4)
	assert.Equal(t, "second", heard[3])
	first()
	l.Wake("a")
	assert.Len(t, heard, 5)
}
