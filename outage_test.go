package sessionlock_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock"
	"github.com/sessionlock/sessionlock/internal/redistest"
	"github.com/sessionlock/sessionlock/sessionlocktest"
)

// What follows from a Redis that is down, slow, silent, or holds what nobody of
// ours wrote: on a real server, with go-redis' default options.

const opTimeout = time.Second // the default of WithOpTimeout

// site is a Redis and an upstream.
type site struct {
	*redistest.Server
	t        *testing.T
	upstream *sessionlocktest.Upstream
}

func newSite(t *testing.T) *site {
	t.Helper()
	return &site{redistest.Start(t), t, sessionlocktest.NewUpstream(t)}
}

// client returns a client on rdb, nil for one of its own, with the upstream's
// own logins.
func (s *site) client(rdb *redis.Client, opts ...sessionlock.Option) *sessionlock.Client {
	s.t.Helper()
	return s.clientWith(s.upstream, rdb, opts...)
}

func (s *site) clientWith(auth sessionlock.Authenticator, rdb *redis.Client, opts ...sessionlock.Option) *sessionlock.Client {
	s.t.Helper()
	if rdb == nil {
		rdb = s.Client()
	}
	opts = append([]sessionlock.Option{sessionlock.WithRedis(rdb), sessionlock.WithLogout(s.upstream.Logout)}, opts...)
	c, err := sessionlock.New(s.upstream.URL, auth, opts...)
	require.NoError(s.t, err)
	s.t.Cleanup(func() { closeClient(s.t, c) })
	return c
}

// pass waits until the server's clock has left the number of a session behind by
// more than what two clients' readings of it differ: where the entry is lost,
// generations grow by that clock alone.
func (s *site) pass(held sessionlock.Session) {
	s.t.Helper()
	rdb := s.Client()
	require.Eventually(s.t, func() bool {
		return rdb.Time(s.t.Context()).Val().UnixMicro() > int64(held.Generation())+50_000
	}, 10*time.Second, time.Millisecond)
}

// during returns an authenticator that calls f once the upstream has answered.
func (s *site) during(f func()) sessionlock.Authenticator {
	return sessionlock.AuthenticatorFunc(func(ctx context.Context, key string) (sessionlock.Session, error) {
		got, err := s.upstream.Login(ctx, key)
		f()
		return got, err
	})
}

// behind returns a proxy to the server and a go-redis client that uses it.
func (s *site) behind(t *testing.T) (*redistest.Proxy, *redis.Client) {
	t.Helper()
	p := redistest.NewProxy(t, s.Addr())
	return p, s.Client(func(o *redis.Options) { o.Addr = p.Addr() })
}

// session checks that c has a session of key that the upstream accepts as
// key's, and returns it.
func (s *site) session(c *sessionlock.Client, key string) sessionlock.Session {
	s.t.Helper()
	got, err := c.Session(s.t.Context(), key)
	require.NoError(s.t, err)
	require.Equal(s.t, key, got.Key())
	require.NoError(s.t, s.upstream.Call(s.t.Context(), got))
	return got
}

// recovers waits until c has a session of key again.
func (s *site) recovers(c *sessionlock.Client, key string) {
	s.t.Helper()
	require.Eventually(s.t, func() bool {
		_, err := c.Session(s.t.Context(), key)
		if err != nil {
			unavailable(s.t, err)
		}
		return err == nil
	}, 15*time.Second, 10*time.Millisecond)
	s.session(c, key)
}

// logins checks what the upstream has seen of key.
func (s *site) logins(want int, key string) {
	s.t.Helper()
	total, atOnce := s.upstream.Logins(key)
	assert.Equal(s.t, want, total, "logins of %s", key)
	assert.LessOrEqual(s.t, atOnce, 1, "logins of %s at once", key)
}

// name returns the one name in Redis that matches pattern.
func (s *site) name(pattern string) string {
	s.t.Helper()
	names, err := s.Client().Keys(s.t.Context(), pattern).Result()
	require.NoError(s.t, err)
	require.Len(s.t, names, 1, pattern)
	return names[0]
}

const entries, locks = "sl:*:e", "sl:*:l"

// unavailable checks that err blames the store, and nothing else.
func unavailable(t *testing.T, err error) {
	t.Helper()
	assert.ErrorIs(t, err, sessionlock.ErrUnavailable)
	blameless(t, err)
}

// blameless checks that err says nothing of credentials.
func blameless(t *testing.T, err error) {
	t.Helper()
	var login *sessionlock.LoginError
	assert.False(t, errors.As(err, &login) || errors.Is(err, sessionlock.ErrDenied) || errors.Is(err, sessionlock.ErrSuppressed),
		"reported as a failed login: %v", err)
}

func timed(f func()) time.Duration {
	start := time.Now()
	f()
	return time.Since(start)
}

func TestRedisDownAtStartIsUnavailableUntilItIsUp(t *testing.T) {
	s := newSite(t)
	s.Stop()
	c := s.client(nil)
	took := timed(func() {
		_, err := c.Session(t.Context(), "bob")
		unavailable(t, err)
	})
	t.Logf("unavailable after %v", took)
	assert.Less(t, took, slack*opTimeout)
	s.logins(0, "bob")

	s.Restart()
	s.recovers(c, "bob")
	s.logins(1, "bob")
}

func TestRedisKilledServesNearSessionsOnly(t *testing.T) {
	s := newSite(t)
	c := s.client(nil)
	held := s.session(c, "bob")
	s.Stop()
	for range crowd {
		got := s.session(c, "bob")
		require.Equal(t, held.Generation(), got.Generation())
	}
	_, err := c.Session(t.Context(), "eve")
	unavailable(t, err)
	err = c.Do(t.Context(), "eve", s.upstream.Call)
	unavailable(t, err)
	s.logins(0, "eve")

	s.Restart()
	s.recovers(c, "eve")
	s.logins(1, "eve")
	s.session(c, "bob")
}

func TestRedisTroubleEndsCallsInTimeAndIsNoFailedLogin(t *testing.T) {
	for _, tt := range []struct {
		trouble string
		cause   func(*redistest.Proxy)
		served  bool // callers with time are
		either  bool
	}{
		{"slow by 100ms", func(p *redistest.Proxy) { p.Delay(50 * time.Millisecond) }, true, false},
		{"slow by 900ms", func(p *redistest.Proxy) { p.Delay(450 * time.Millisecond) }, false, true},
		{"slow by 5s", func(p *redistest.Proxy) { p.Delay(2500 * time.Millisecond) }, false, false},
		{"silent", (*redistest.Proxy).BlackHole, false, false},
		{"deaf", (*redistest.Proxy).DropReplies, false, false},
		{"cut off", (*redistest.Proxy).Cut, false, false},
	} {
		for _, connected := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, connected %t", tt.trouble, connected), func(t *testing.T) {
				t.Parallel()
				s := newSite(t)
				proxy, rdb := s.behind(t)
				c := s.client(rdb)
				t.Cleanup(proxy.Heal) // a driver that waits in a socket keeps Close waiting
				if connected {
					s.session(c, "warm-up")
				}
				tt.cause(proxy)

				const patience = 50 * time.Millisecond
				back := timed(func() {
					ctx, cancel := context.WithTimeout(t.Context(), patience)
					defer cancel()
					_, err := c.Session(ctx, "impatient")
					if !errors.Is(err, sessionlock.ErrUnavailable) {
						assert.ErrorIs(t, err, context.DeadlineExceeded)
					}
					blameless(t, err)
				})
				assert.Less(t, back, slack*patience)

				var err error
				took := timed(func() { _, err = c.Session(t.Context(), "bob") })
				t.Logf("after %v and %v: %v", back, took, err)
				blameless(t, err)
				if tt.either || tt.served {
					assert.True(t, err == nil || tt.either && errors.Is(err, sessionlock.ErrUnavailable), "%v", err)
					return
				}
				unavailable(t, err)
				assert.Less(t, took, slack*opTimeout)
				s.logins(0, "bob")
				proxy.Heal()
				s.recovers(c, "bob")
				s.logins(1, "bob")
			})
		}
	}
}

// beforeSwap is a hook of go-redis: it calls f before the nth swap of an entry
// is sent. A login of a key swaps twice, to begin and to commit.
type beforeSwap struct {
	nth int
	f   func()

	mu   sync.Mutex
	seen int
}

func (h *beforeSwap) DialHook(next redis.DialHook) redis.DialHook { return next }

func (h *beforeSwap) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

func (h *beforeSwap) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		if args := cmd.Args(); cmd.Name() == "evalsha" && strings.HasSuffix(fmt.Sprint(args[3]), ":e") && h.due() {
			h.f()
		}
		return next(ctx, cmd)
	}
}

func (h *beforeSwap) due() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.seen++
	return h.seen == h.nth
}

func TestRedisReplyOfABeginLostCostsNoLogin(t *testing.T) {
	s := newSite(t)
	proxy, rdb := s.behind(t)
	deaf, fine := s.client(rdb), s.client(nil)
	t.Cleanup(proxy.Heal)
	s.session(deaf, "warm-up")
	rdb.AddHook(&beforeSwap{nth: 1, f: proxy.DropReplies})

	took := timed(func() {
		_, err := deaf.Session(t.Context(), "bob")
		unavailable(t, err)
	})
	assert.Less(t, took, 2*opTimeout, "tidying up is not the caller's to wait for")
	s.logins(0, "bob")
	status, err := fine.Inspect(t.Context(), "bob")
	require.NoError(t, err)
	require.NotEmpty(t, status.Holder, "the begin was executed")

	var got sessionlock.Session
	took = timed(func() { got = s.session(fine, "bob") })
	t.Logf("the next login came after %v", took)
	assert.Less(t, took, lockTTL+slack*poll)
	s.logins(1, "bob")
	proxy.Heal()
	s.recovers(deaf, "bob")
	again := s.session(deaf, "bob")
	assert.Equal(t, got.Generation(), again.Generation())
	s.logins(1, "bob")
}

func TestRedisReplyOfACommitLostStillServesCallersAndFleet(t *testing.T) {
	s := newSite(t)
	proxy, rdb := s.behind(t)
	deaf := s.client(rdb)
	t.Cleanup(proxy.Heal)
	s.session(deaf, "warm-up")
	rdb.AddHook(&beforeSwap{nth: 2, f: proxy.DropReplies})

	outcomes := order{Key: "bob", Callers: crowd}.run(t.Context(), func(ctx context.Context, i int) (sessionlock.Session, error) {
		if i%2 == 1 {
			short, cancel := context.WithTimeout(ctx, opTimeout/2)
			defer cancel()
			ctx = short
		}
		return deaf.Session(ctx, "bob")
	})
	s.logins(1, "bob")
	var served, left []outcome
	for i, o := range outcomes {
		if i%2 == 1 {
			left = append(left, o)
			assert.Less(t, o.Took, slack*opTimeout/2)
			continue
		}
		served = append(served, o)
		assert.Less(t, o.Took, lockTTL+slack*opTimeout)
	}
	refused(t, crowd/2, left, "deadline")
	first := oneSession(t, crowd/2, served)
	t.Logf("served after %v", served[0].Took)

	proxy.Heal()
	stored := s.session(s.client(nil), "bob")
	assert.Equal(t, first.Generation, stored.Generation(), "it was stored all the same")
	closeClient(t, deaf)
	assert.NoError(t, s.upstream.Call(t.Context(), stored), "and is not logged out")
	s.logins(1, "bob")
}

func TestRedisKilledDuringALoginStillServesItsCallers(t *testing.T) {
	s := newSite(t)
	c := s.clientWith(s.during(s.Stop), nil)
	outcomes := order{Callers: crowd}.run(t.Context(), func(ctx context.Context, _ int) (sessionlock.Session, error) {
		return c.Session(ctx, "bob")
	})
	oneSession(t, crowd, outcomes)
	t.Logf("served after %v", outcomes[0].Took)
	assert.Less(t, outcomes[0].Took, lockTTL+slack*opTimeout)
	s.session(c, "bob")
	s.logins(1, "bob")
}

func TestRedisFlushedWhileASessionIsHeldCostsOneLogin(t *testing.T) {
	s := newSite(t)
	a, b := s.client(nil), s.client(nil)
	held := s.session(a, "bob")
	// A new near copy is looked at again, and would be dropped if that came later.
	commands := int64(-1)
	require.Eventually(t, func() bool {
		before := commands
		commands = s.Commands()
		return commands == before
	}, 10*time.Second, 100*time.Millisecond)
	require.NoError(t, s.Client().FlushAll(t.Context()).Err())
	s.pass(held)

	assert.Equal(t, held.Generation(), s.session(a, "bob").Generation(), "its process goes on with it")
	newer := s.session(b, "bob")
	assert.Greater(t, newer.Generation(), held.Generation())
	s.logins(2, "bob")
	assert.NoError(t, s.upstream.Call(t.Context(), held), "nobody has ended it")
}

func TestRedisFlushedDuringALoginStoresNothingDead(t *testing.T) {
	s := newSite(t)
	var flush sync.Once
	c := s.clientWith(s.during(func() {
		flush.Do(func() { assert.NoError(t, s.Client().FlushAll(t.Context()).Err()) })
	}), nil)

	_, err := c.Session(t.Context(), "bob")
	require.ErrorIs(t, err, sessionlock.ErrStale)
	blameless(t, err)
	first := s.session(c, "bob")
	second := s.session(s.client(nil), "bob")
	assert.Equal(t, first.Generation(), second.Generation())
	s.logins(2, "bob")
	require.Eventually(t, func() bool { return s.upstream.Sessions("bob") == 1 }, 10*time.Second, time.Millisecond,
		"the session of the first login was not logged out")
}

func TestRedisForgettingItsScriptsIsNotNoticed(t *testing.T) {
	s := newSite(t)
	admin := s.Client()
	ctx, cancel := context.WithCancel(t.Context())
	flushed := make(chan int)
	go func() {
		n := 0
		for ; ctx.Err() == nil; n++ {
			admin.ScriptFlush(ctx)
		}
		flushed <- n
	}()
	clients := []*sessionlock.Client{s.client(nil), s.client(nil)}
	outcomes := order{Callers: 2 * crowd}.run(t.Context(), func(ctx context.Context, i int) (sessionlock.Session, error) {
		return clients[i%2].Session(ctx, fmt.Sprint("bob ", i/2))
	})
	cancel()
	t.Logf("flushed %d times", <-flushed)
	for i, o := range outcomes {
		require.Empty(t, o.Err)
		require.Equal(t, outcomes[i/2*2].Token, o.Token)
		s.logins(1, fmt.Sprint("bob ", i/2))
	}
}

// waiter has a second client, on rdb, wait for a login of the first; it calls
// ready when it does, then lets the login end, and returns how long after that
// the waiter was served.
func (s *site) waiter(rdb *redis.Client, ready func()) time.Duration {
	s.t.Helper()
	s.upstream.Hang(true)
	a, b := s.client(nil), s.client(rdb)
	var leader sync.WaitGroup
	leader.Go(func() {
		_, err := a.Session(s.t.Context(), "bob")
		assert.NoError(s.t, err)
	})
	require.Eventually(s.t, func() bool { n, _ := s.upstream.Logins("bob"); return n == 1 }, 10*time.Second, time.Millisecond)
	served := make(chan time.Time)
	go func() {
		_, err := b.Session(s.t.Context(), "bob")
		assert.NoError(s.t, err)
		served <- time.Now()
	}()
	ready()
	s.upstream.Hang(false)
	leader.Wait()
	committed := time.Now()
	took := (<-served).Sub(committed)
	s.logins(1, "bob")
	return took
}

func TestRedisPubSubKilledAtThePublishDelaysWaitersByAPollAtMost(t *testing.T) {
	s := newSite(t)
	admin := s.Client()
	killed := 0
	kill := func() {
		n, err := admin.ClientKillByFilter(t.Context(), "TYPE", "pubsub").Result()
		assert.NoError(t, err)
		killed += int(n)
	}
	over := make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	took := s.waiter(nil, func() {
		require.Eventually(t, func() bool { kill(); return killed > 0 }, 10*time.Second, time.Millisecond, "the waiter subscribes")
		go func() {
			defer close(over)
			for range (order{Tick: time.Millisecond}).ticks(ctx) {
				kill()
			}
		}()
	})
	cancel()
	<-over
	t.Logf("served after %v, subscriptions killed: %d", took, killed)
	assert.Less(t, took, slack*poll)
}

func TestRedisWithoutPushServesWaitersByPoll(t *testing.T) {
	s := newSite(t)
	require.NoError(t, s.Client().Do(t.Context(), "ACL", "SETUSER", "silent", "on", ">pw", "resetchannels", "~*", "+@all").Err())
	rdb := s.Client(func(o *redis.Options) { o.Username, o.Password = "silent", "pw" })
	require.ErrorContains(t, rdb.Publish(t.Context(), "any", "").Err(), "NOPERM")
	took := s.waiter(rdb, func() {
		require.Eventually(t, func() bool {
			var denied int64
			log, err := s.Client().ACLLog(t.Context(), 10).Result()
			for _, e := range log {
				if e.Reason == "channel" {
					denied += e.Count
				}
			}
			return err == nil && denied > 1
		}, 10*time.Second, 10*time.Millisecond, "the waiter tries to subscribe")
	})
	t.Logf("served after %v", took)
	assert.Less(t, took, slack*poll)
}

func TestRedisLockWithoutASaneTTLHeals(t *testing.T) {
	for name, ttl := range map[string]time.Duration{"none": 0, "absurd": 24 * time.Hour} {
		t.Run(name, func(t *testing.T) {
			const lockTTL = 500 * time.Millisecond
			s := newSite(t)
			var lock string
			c := s.clientWith(s.during(func() {
				if lock == "" {
					lock = s.name(locks)
				}
			}), nil, sessionlock.WithLockTTL(lockTTL))
			s.session(c, "bob")
			require.NoError(t, c.Logout(t.Context(), "bob"))
			require.Eventually(t, func() bool { return s.Client().Exists(t.Context(), lock).Val() == 0 }, 10*time.Second, 5*time.Millisecond)
			require.NoError(t, s.Client().Set(t.Context(), lock, "a hand", ttl).Err())

			took := timed(func() { s.session(c, "bob") })
			t.Logf("the next login came after %v", took)
			assert.Less(t, took, lockTTL+slack*poll)
			assert.Greater(t, took, lockTTL/2, "the lock was respected")
			s.logins(2, "bob")
		})
	}
}

func TestRedisValueOfAnotherTypeIsUnavailableAndKept(t *testing.T) {
	s := newSite(t)
	admin := s.Client()
	var lock string
	first := s.clientWith(s.during(func() { lock = s.name(locks) }), nil)
	s.session(first, "bob")
	require.NoError(t, first.Logout(t.Context(), "bob"))
	entry := s.name(entries)
	require.Eventually(t, func() bool { return admin.Exists(t.Context(), lock).Val() == 0 }, 10*time.Second, 5*time.Millisecond)

	for _, name := range []string{lock, entry} {
		was, _ := admin.Dump(t.Context(), name).Result()
		admin.Del(t.Context(), name)
		require.NoError(t, admin.RPush(t.Context(), name, "some", "body's").Err())
		c := s.client(nil)
		_, err := c.Session(t.Context(), "bob")
		unavailable(t, err)
		assert.ErrorContains(t, err, "WRONGTYPE")
		list, err := admin.LRange(t.Context(), name, 0, -1).Result()
		require.NoError(t, err)
		assert.Equal(t, []string{"some", "body's"}, list)
		assert.Equal(t, time.Duration(-1), admin.PTTL(t.Context(), name).Val(), "no TTL was given to it")
		s.logins(1, "bob")

		admin.Del(t.Context(), name)
		if was != "" {
			require.NoError(t, admin.Restore(t.Context(), name, 0, was).Err())
		}
	}
	s.session(s.client(nil), "bob")
	s.logins(2, "bob")
}

func TestRedisValueNobodyWroteIsAMissAndReplaced(t *testing.T) {
	for name, damage := range map[string]func(string) string{
		"empty":     func(string) string { return "" },
		"foreign":   func(string) string { return "OK" },
		"random":    func(v string) string { return randomBytes(len(v)) },
		"cut":       func(v string) string { return v[:len(v)-1] },
		"prolonged": func(v string) string { return v + "\x00" },
		"version":   func(v string) string { return "\x7f" + v[1:] },
		"other key": func(v string) string { return strings.Replace(v, "bob", "bub", 1) },
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			admin := s.Client()
			before := s.session(s.client(nil), "bob")
			entry := s.name(entries)
			value, err := admin.Get(t.Context(), entry).Result()
			require.NoError(t, err)
			require.NotEqual(t, value, damage(value))
			require.NoError(t, admin.Set(t.Context(), entry, damage(value), 0).Err())
			s.pass(before)

			after := s.session(s.client(nil), "bob")
			assert.Greater(t, after.Generation(), before.Generation())
			again := s.session(s.client(nil), "bob")
			assert.Equal(t, after.Generation(), again.Generation(), "replaced")
			assert.Positive(t, admin.PTTL(t.Context(), entry).Val())
			s.logins(2, "bob")
		})
	}
}

func randomBytes(n int) string {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rand.Uint32())
	}
	return string(b)
}

func TestRedisValueOfAnotherKeyIsNeverReturned(t *testing.T) {
	for _, known := range []bool{false, true} {
		t.Run(strconv.FormatBool(known), func(t *testing.T) {
			s := newSite(t)
			admin := s.Client()
			names := map[string]string{}
			for _, key := range []string{"eve", "bob"} { // bob's is the higher generation
				s.session(s.client(nil), key)
				all, err := admin.Keys(t.Context(), entries).Result()
				require.NoError(t, err)
				for _, n := range all {
					if n != names["eve"] {
						names[key] = n
					}
				}
			}
			if !known {
				require.NoError(t, admin.Del(t.Context(), names["eve"]).Err())
			}
			require.NoError(t, admin.Copy(t.Context(), names["bob"], names["eve"], 0, true).Err())

			c := s.client(nil)
			for range 3 {
				eve := s.session(c, "eve")
				assert.NotEqual(t, s.session(c, "bob").Token.Reveal(), eve.Token.Reveal())
			}
			s.logins(2, "eve")
			s.logins(1, "bob")
		})
	}
}

func TestRedisHugeValueIsAMissAndDoesNotTravel(t *testing.T) {
	s := newSite(t)
	admin := s.Client()
	before := s.session(s.client(nil), "bob")
	entry := s.name(entries)
	const huge = 1 << 20
	require.NoError(t, admin.Set(t.Context(), entry, strings.Repeat("x", huge), 0).Err())
	c := s.client(nil)

	sent := s.netOutput()
	after := s.session(c, "bob")
	travelled := s.netOutput() - sent
	t.Logf("%d bytes travelled", travelled)
	assert.Less(t, travelled, huge/4)
	assert.Greater(t, after.Generation(), before.Generation())
	assert.Less(t, admin.StrLen(t.Context(), entry).Val(), int64(huge/4), "replaced")
	s.logins(2, "bob")
}

// netOutput returns how many bytes Redis has sent.
func (s *site) netOutput() int {
	s.t.Helper()
	info, err := s.Client().InfoMap(s.t.Context(), "stats").Result()
	require.NoError(s.t, err)
	n, err := strconv.Atoi(info["Stats"]["total_net_output_bytes"])
	require.NoError(s.t, err)
	return n
}
