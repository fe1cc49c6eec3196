package sessionlock_test

// The promises on Redis as it is run in earnest: behind Sentinels, as a Cluster,
// over TLS, and as the user of least privilege that docs/promises.md makes. All
// servers are real, all clients have go-redis' default options.

import (
	"context"
	"errors"
	"fmt"
	"slices"
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

// realm is a Redis of any topology and an upstream.
type realm struct {
	t        *testing.T
	connect  func() redis.UniversalClient // another process's
	upstream *sessionlocktest.Upstream
}

func (r realm) client(opts ...sessionlock.Option) *sessionlock.Client {
	r.t.Helper()
	opts = append([]sessionlock.Option{sessionlock.WithRedis(r.connect()), sessionlock.WithLogout(r.upstream.Logout)}, opts...)
	c, err := sessionlock.New(r.upstream.URL, r.upstream, opts...)
	require.NoError(r.t, err)
	r.t.Cleanup(func() { closeClient(r.t, c) })
	return c
}

func (r realm) clients(n int) []*sessionlock.Client {
	r.t.Helper()
	out := make([]*sessionlock.Client, n)
	for i := range out {
		out[i] = r.client()
	}
	return out
}

// burst runs f at once for many callers of each client.
func burst(clients []*sessionlock.Client, f func(c *sessionlock.Client)) {
	var wg sync.WaitGroup
	for _, c := range clients {
		for range 25 {
			wg.Go(func() { f(c) })
		}
	}
	wg.Wait()
}

func (r realm) logins(want int, key string) {
	r.t.Helper()
	total, atOnce := r.upstream.Logins(key)
	assert.Equal(r.t, want, total, "logins of %s", key)
	assert.LessOrEqual(r.t, atOnce, 1, "logins of %s at once", key)
}

// promised is what holds on every topology, on clients of their own.
func promised(t *testing.T, connect func() redis.UniversalClient) {
	for name, holds := range map[string]func(realm){
		"cold burst costs one login":            realm.coldBurst,
		"rejection is repaired by one login":    realm.rejection,
		"denied password costs one login":       realm.denial,
		"logout reaches near copies":            realm.logout,
		"waiter is served before its poll tick": func(r realm) { r.push(r.client(), "bob") },
	} {
		t.Run(name, func(t *testing.T) {
			holds(realm{t, connect, sessionlocktest.NewUpstream(t)})
		})
	}
	a, b := connect(), connect()
	t.Run("cache", sessionlocktest.CacheTest{
		New:    func(t *testing.T) sessionlock.Cache { return newOwnNames(t, a) },
		Second: func(t *testing.T, _ sessionlock.Cache) sessionlock.Cache { return newOwnNames(t, b) },
		TTL:    100 * time.Millisecond,
	}.Run)
	t.Run("locker", sessionlocktest.LockerTest{
		New: func(*testing.T) sessionlock.Locker { return ownLocks{sessionlock.NewRedisLocker(a)} },
		Second: func(*testing.T, sessionlock.Locker) sessionlock.Locker {
			return ownLocks{sessionlock.NewRedisLocker(b)}
		},
		TTL: 100 * time.Millisecond,
	}.Run)
}

func (r realm) coldBurst() {
	r.upstream.Delay(50 * time.Millisecond)
	burst(r.clients(4), func(c *sessionlock.Client) {
		s, err := c.Session(r.t.Context(), "bob")
		if assert.NoError(r.t, err) {
			assert.NoError(r.t, r.upstream.Call(r.t.Context(), s))
		}
	})
	r.logins(1, "bob")
}

func (r realm) rejection() {
	clients := r.clients(4)
	work := func(c *sessionlock.Client) { assert.NoError(r.t, c.Do(r.t.Context(), "bob", r.upstream.Call)) }
	burst(clients, work)
	r.logins(1, "bob")
	r.upstream.Revoke("bob")
	burst(clients, work)
	r.logins(2, "bob")
}

func (r realm) denial() {
	r.upstream.Delay(50 * time.Millisecond)
	r.upstream.DenyAfter("bob", 0)
	burst(r.clients(4), func(c *sessionlock.Client) {
		_, err := c.Session(r.t.Context(), "bob")
		var failed *sessionlock.LoginError
		if assert.ErrorAs(r.t, err, &failed) {
			assert.Equal(r.t, sessionlock.LoginDenied, failed.Class)
		}
	})
	r.logins(1, "bob")
}

func (r realm) logout() {
	near, far := r.client(), r.client()
	old, err := near.Session(r.t.Context(), "bob")
	require.NoError(r.t, err)
	require.NoError(r.t, far.Logout(r.t.Context(), "bob"))
	assert.Zero(r.t, r.upstream.Sessions("bob"))
	r.hears(near, old)
	r.logins(2, "bob")
}

// hears waits until c has no near copy of old any more, which by itself it would
// keep for minutes.
func (r realm) hears(c *sessionlock.Client, old sessionlock.Session) {
	r.t.Helper()
	begin := time.Now()
	require.Eventually(r.t, func() bool {
		s, err := c.Session(r.t.Context(), old.Key())
		return err == nil && s.Generation() > old.Generation()
	}, 20*time.Second, time.Millisecond)
	r.t.Logf("near copy ended after %v", time.Since(begin))
}

// push has waiter wait for a login of another process with a poll tick that
// comes too late to explain when it was served.
func (r realm) push(leader *sessionlock.Client, key string) {
	r.t.Helper()
	const tick = 3 * time.Second // at most a fifth early
	waiter := r.client(sessionlock.WithWait(5, tick))
	r.upstream.Delay(300 * time.Millisecond)
	defer r.upstream.Delay(0)
	before, _ := r.upstream.Logins(key)
	first := askFor(r.t.Context(), leader, key)
	require.Eventually(r.t, func() bool {
		n, _ := r.upstream.Logins(key)
		return n > before
	}, 10*time.Second, time.Millisecond)
	begin := time.Now()
	second := <-askFor(r.t.Context(), waiter, key)
	led := <-first
	require.NoError(r.t, led.err)
	require.NoError(r.t, second.err)
	assert.Equal(r.t, led.session.Generation(), second.session.Generation())
	r.t.Logf("waiter served %v after the leader, a tick would have been %v later",
		second.at.Sub(led.at), begin.Add(tick).Sub(second.at))
	assert.Less(r.t, second.at.Sub(begin), tick*4/5)
	r.logins(before+1, key)
}

// ownNames gives the keys of a suite the prefix of all of ours: the user of least
// privilege may touch no others.
type ownNames struct {
	sessionlock.Cache
	sessionlock.Watcher
	sessionlock.Clock
}

const ownPrefix = "sl:"

func newOwnNames(t *testing.T, rdb redis.UniversalClient) ownNames {
	c := sessionlock.NewRedisCache(rdb)
	t.Cleanup(func() { _ = c.Close() })
	return ownNames{c, c, c}
}

func (o ownNames) Load(ctx context.Context, key string) ([]byte, error) {
	return o.Cache.Load(ctx, ownPrefix+key)
}

func (o ownNames) CompareAndSwap(ctx context.Context, key string, old, next []byte, ttl time.Duration) ([]byte, error) {
	return o.Cache.CompareAndSwap(ctx, ownPrefix+key, old, next, ttl)
}

func (o ownNames) Watch(key string, changed func()) func() {
	return o.Watcher.Watch(ownPrefix+key, changed)
}

type ownLocks struct{ sessionlock.Locker }

func (o ownLocks) TryLock(ctx context.Context, key string, ttl time.Duration) (sessionlock.Lock, error) {
	return o.Locker.TryLock(ctx, ownPrefix+key, ttl)
}

func TestRedisOverTLSKeepsThePromises(t *testing.T) {
	t.Parallel()
	s := redistest.StartTLS(t)
	promised(t, func() redis.UniversalClient { return s.Client() })
}

func TestRedisUserOfLeastPrivilegeKeepsThePromises(t *testing.T) {
	t.Parallel()
	s := redistest.StartACL(t)
	promised(t, func() redis.UniversalClient { return s.Client() })
	assert.Empty(t, denied(t, s, redistest.User))
}

func TestRedisSentinelKeepsThePromises(t *testing.T) {
	t.Parallel()
	s := redistest.StartSentinel(t)
	promised(t, s.Client)
	assert.Empty(t, denied(t, s.Master(), redistest.User))
	t.Run("failover", func(t *testing.T) {
		realm{t, s.Client, sessionlocktest.NewUpstream(t)}.failover(3*time.Second, func(string) *redistest.Server { return s.Master() })
	})
	assert.Empty(t, denied(t, s.Master(), redistest.User))
}

func TestRedisClusterKeepsThePromises(t *testing.T) {
	t.Parallel()
	s := redistest.StartCluster(t)
	connect := func() redis.UniversalClient { return s.Client() }
	promised(t, connect)
	t.Run("failover", func(t *testing.T) {
		realm{t, connect, sessionlocktest.NewUpstream(t)}.failover(5*time.Second, s.Owner)
	})
	for _, name := range []string{"sl:{a}", "sl:{b}", "sl:{c}"} { // one of each master
		assert.Empty(t, denied(t, s.Owner(name), redistest.User))
	}
}

// denied returns what user was refused to do on s, other than to name the client
// library, which go-redis tries and does without.
func denied(t *testing.T, s *redistest.Server, user string) []string {
	t.Helper()
	log, err := s.Admin().ACLLog(t.Context(), 1000).Result()
	require.NoError(t, err)
	out := []string{}
	for _, e := range log {
		if e.Username == user && e.Object != "client|setinfo" {
			out = append(out, e.Context+": "+e.Object)
		}
	}
	return out
}

// failover kills the master that owns all keys in use, while they are, and checks
// that within the bound a client without near copies reads and logs in again,
// while a client with near copies does not notice; and that what the replica did
// not have costs a login. owner tells the master of a name.
func (r realm) failover(bound time.Duration, owner func(name string) *redistest.Server) {
	t, ctx := r.t, r.t.Context()
	near, far := r.client(), r.client(sessionlock.WithNearCache(0, time.Minute))
	looking := r.client(sessionlock.WithNearCache(100, 300*time.Millisecond)) // near copies are compared with Redis meanwhile
	victim := owner(nameOf(far, "bob"))
	some := func(kind string) (keys []string) {
		for i := 0; len(keys) < 4; i++ {
			key := fmt.Sprintf("%s-%d", kind, i)
			if owner(nameOf(far, key)).Addr() == victim.Addr() {
				keys = append(keys, key)
			}
		}
		return keys
	}
	hot, fresh, cold := some("hot"), some("fresh"), some("cold")
	before := map[string]sessionlock.Session{}
	login := func(key string) {
		s, err := far.Session(ctx, key)
		require.NoError(t, err)
		before[key] = s
	}
	for _, key := range hot {
		login(key)
		for _, c := range []*sessionlock.Client{near, looking} {
			_, err := c.Session(ctx, key)
			require.NoError(t, err)
		}
	}
	replicated(t, victim, nameOf(far, "bob"))

	over := make(chan struct{})
	var users sync.WaitGroup
	for _, key := range hot {
		users.Go(func() {
			for running(over) {
				_, err := near.Session(ctx, key)
				_, err2 := looking.Session(ctx, key)
				assert.NoError(t, errors.Join(err, err2), "a near copy outlives its master")
				time.Sleep(time.Millisecond)
			}
		})
		users.Go(func() {
			for running(over) {
				if _, err := far.Session(ctx, key); err != nil {
					unavailable(t, err)
				}
				time.Sleep(time.Millisecond)
			}
		})
	}
	victim.Isolate()
	for _, key := range fresh {
		login(key)
	}
	begin := time.Now()
	deadline := begin.Add(slack * bound)
	victim.Stop()
	read := r.back(far, slices.Concat(hot, fresh), begin, deadline)
	logged := r.back(far, cold, begin, deadline)
	reads, logins := <-read, <-logged
	close(over)
	users.Wait()
	require.NoError(t, errors.Join(reads.err, logins.err))
	t.Logf("after the kill: read first %v, last %v; cold login first %v, last %v",
		reads.first, reads.last, logins.first, logins.last)
	r.costs(far, hot, before, 0)
	r.costs(far, fresh, before, 1)
	r.logins(1, cold[0])
	r.works(near, far, before[hot[0]])
}

func nameOf(c *sessionlock.Client, key string) string { return ownPrefix + "{" + c.KeyID(key) + "}" }

func running(over <-chan struct{}) bool {
	select {
	case <-over:
		return false
	default:
		return true
	}
}

// replicated waits until the replica of s has all that was written so far.
func replicated(t *testing.T, s *redistest.Server, name string) {
	t.Helper()
	conn := s.Admin().Conn()
	defer conn.Close()
	require.NoError(t, conn.Set(t.Context(), name+":barrier", "", time.Minute).Err())
	n, err := conn.Wait(t.Context(), 1, 5*time.Second).Result()
	require.NoError(t, err)
	require.EqualValues(t, 1, n, "replicas in step")
}

// recovery is when some keys could be used again.
type recovery struct {
	first, last time.Duration
	err         error
}

// back asks for every key until it is answered.
func (r realm) back(c *sessionlock.Client, keys []string, since, deadline time.Time) <-chan recovery {
	var (
		wg   sync.WaitGroup
		took = make([]time.Duration, len(keys))
		errs = make([]error, len(keys))
		out  = make(chan recovery, 1)
	)
	for i, key := range keys {
		wg.Go(func() {
			// Calls that hang take a second; staggered, one of them tells to a fraction when it was over.
			time.Sleep(time.Duration(i) * time.Second / time.Duration(len(keys)))
			for {
				_, err := c.Session(r.t.Context(), key)
				took[i] = time.Since(since)
				if err == nil {
					return
				}
				if unavailable(r.t, err); time.Now().After(deadline) {
					errs[i] = fmt.Errorf("%s after %v: %w", key, took[i], err)
					return
				}
				time.Sleep(10 * time.Millisecond)
			}
		})
	}
	go func() {
		wg.Wait()
		out <- recovery{slices.Min(took), slices.Max(took), errors.Join(errs...)}
	}()
	return out
}

// costs checks that a failover has cost each key so many logins, and that what
// they brought is newer than what was lost.
func (r realm) costs(c *sessionlock.Client, keys []string, before map[string]sessionlock.Session, logins int) {
	r.t.Helper()
	for _, key := range keys {
		now, err := c.Session(r.t.Context(), key)
		require.NoError(r.t, err)
		assert.NoError(r.t, r.upstream.Call(r.t.Context(), now))
		r.logins(1+logins, key)
		if old := before[key].Generation(); logins == 0 {
			assert.Equal(r.t, old, now.Generation(), key)
		} else {
			assert.Greater(r.t, now.Generation(), old, key)
		}
	}
}

// works checks that repair, push and near copies are what they were before the
// failover, on clients that lived through it.
func (r realm) works(near, far *sessionlock.Client, old sessionlock.Session) {
	r.t.Helper()
	key := old.Key()
	before, _ := r.upstream.Logins(key)
	r.upstream.Revoke(key)
	var now sessionlock.Session
	require.NoError(r.t, far.Do(r.t.Context(), key, func(ctx context.Context, s sessionlock.Session) error {
		now = s
		return r.upstream.Call(ctx, s)
	}))
	assert.Greater(r.t, now.Generation(), old.Generation())
	r.logins(before+1, key)
	r.hears(near, old)
	require.NoError(r.t, far.Logout(r.t.Context(), key))
	r.push(far, key)
}

// deed is something a client does, that tells when it cannot.
type deed struct {
	name string
	do   func(g grant) error
}

// grant is a user of a server, and the server.
type grant struct {
	t     *testing.T
	user  string
	rdb   func() *redis.Client // as that user
	admin *redis.Client
}

func (g grant) client(u *upstream, opts ...sessionlock.Option) *sessionlock.Client {
	opts = append([]sessionlock.Option{
		sessionlock.WithRedis(g.rdb()), sessionlock.WithNamespace(g.user), sessionlock.WithLogout(u.Logout),
	}, opts...)
	c, err := sessionlock.New(acme, u, opts...)
	require.NoError(g.t, err)
	g.t.Cleanup(func() { closeClient(g.t, c) })
	return c
}

// name returns a name of the user's own.
func (g grant) name(s string) string { return ownPrefix + g.user + ":" + s }

// deeds are all that clients ask of Redis, the quick ones first.
var deeds = []deed{
	{"log in on a server without scripts, and find the session again", grant.logIn},
	{"give the lock back", grant.unlock},
	{"keep a lock", grant.extend},
	{"take a lock by a request that is sent twice", grant.twice},
	{"heal a lock", grant.heal},
	{"repair a session", grant.repair},
	{"log out", grant.logOut},
	{"be woken", grant.wake},
	{"leave a channel", grant.leave},
	{"hold a silent subscription", grant.silence},
}

func (g grant) logIn() error {
	if err := g.admin.ScriptFlush(g.t.Context()).Err(); err != nil {
		return err
	}
	u := &upstream{life: time.Hour}
	_, err := g.client(u).Session(g.t.Context(), "bob")
	_, err2 := g.client(u).Session(g.t.Context(), "bob")
	if err := errors.Join(err, err2); err != nil {
		return err
	}
	if u.logins() != 1 {
		return fmt.Errorf("%d logins", u.logins())
	}
	return nil
}

func (g grant) unlock() error {
	u := &upstream{life: time.Hour}
	c := g.client(u)
	if _, err := c.Session(g.t.Context(), "lock"); err != nil {
		return err
	}
	return until(lockTTL/2, func() error {
		if n := g.admin.Exists(g.t.Context(), nameOf(c, "lock")+lockSuffix).Val(); n > 0 {
			return errors.New("still locked")
		}
		return nil
	})
}

func (g grant) extend() error {
	lock, err := sessionlock.NewRedisLocker(g.rdb()).TryLock(g.t.Context(), g.name("kept"), time.Second)
	if err != nil {
		return err
	}
	return lock.Extend(g.t.Context(), time.Minute)
}

func (g grant) twice() error {
	rdb := g.rdb()
	rdb.AddHook(repeating{})
	_, err := sessionlock.NewRedisLocker(rdb).TryLock(g.t.Context(), g.name("twice"), time.Minute)
	return err
}

// repeating is a hook that sends every command again, as go-redis does when the
// reply was lost.
type repeating struct{}

func (repeating) DialHook(next redis.DialHook) redis.DialHook { return next }

func (repeating) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

func (repeating) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		_ = next(ctx, cmd)
		return next(ctx, cmd)
	}
}

func (g grant) heal() error {
	name := g.name("healed")
	if err := g.admin.Set(g.t.Context(), name, "a hand", 0).Err(); err != nil {
		return err
	}
	_, err := sessionlock.NewRedisLocker(g.rdb()).TryLock(g.t.Context(), name, time.Minute)
	if ttl := g.admin.PTTL(g.t.Context(), name).Val(); ttl <= 0 {
		return fmt.Errorf("no TTL: %w", err)
	}
	return nil
}

func (g grant) repair() error {
	return g.client(&upstream{life: time.Hour}).Do(g.t.Context(), "dead", rejectOld("dead/1"))
}

func (g grant) logOut() error {
	u := &upstream{life: time.Hour}
	c := g.client(u)
	_, err := c.Session(g.t.Context(), "eve")
	if err := errors.Join(err, c.Logout(g.t.Context(), "eve")); err != nil {
		return err
	}
	if len(u.ended()) != 1 {
		return errors.New("not ended")
	}
	return nil
}

// wake has a caller wait for another process's login, with a poll tick that is
// further than its patience.
func (g grant) wake() error {
	u := &upstream{life: time.Hour, takes: 300 * time.Millisecond}
	leader, waiter := g.client(u), g.client(u, sessionlock.WithWait(2, time.Minute))
	led := askFor(g.t.Context(), leader, "woken")
	if err := until(10*time.Second, func() error {
		if u.logins() == 0 {
			return errors.New("no login")
		}
		return nil
	}); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(g.t.Context(), 2*time.Second)
	defer cancel()
	_, err := waiter.Session(ctx, "woken")
	return errors.Join(err, (<-led).err)
}

// leave leaves two channels, one after the other, while one more is watched. The
// server must not go on sending what nobody listens to.
func (g grant) leave() error {
	cache := sessionlock.NewRedisCache(g.rdb())
	defer cache.Close()
	defer cache.Watch(g.name("stays"), func() {})()
	for _, name := range []string{g.name("first"), g.name("second")} {
		stop := cache.Watch(name, func() {})
		if err := g.subscribers(name, 1); err != nil {
			return err
		}
		stop()
		if err := g.subscribers(name, 0); err != nil {
			return err
		}
	}
	return nil
}

func (g grant) subscribers(name string, want int64) error {
	return until(2*time.Second, func() error {
		n, err := g.admin.PubSubNumSub(g.t.Context(), name).Result()
		if err == nil && n[name] != want {
			return fmt.Errorf("%d subscribers", n[name])
		}
		return err
	})
}

// silence watches a channel on which nothing happens for longer than a hub takes
// for health. A subscription that is made anew wakes its watchers.
func (g grant) silence() error {
	cache := sessionlock.NewRedisCache(g.rdb())
	defer cache.Close()
	woken := make(chan struct{}, 100)
	defer cache.Watch(g.name("silent"), func() { woken <- struct{}{} })()
	select {
	case <-woken: // it stands
	case <-time.After(10 * time.Second):
		return errors.New("not subscribed")
	}
	select {
	case <-woken:
		return errors.New("subscribed again")
	case <-time.After(7 * time.Second): // two beats of the hub, and an answer
		return nil
	}
}

// until repeats f for d, as long as it returns an error.
func until(d time.Duration, f func() error) error {
	end := time.Now().Add(d)
	for {
		err := f()
		if err == nil || time.Now().After(end) {
			return err
		}
		time.Sleep(time.Millisecond)
	}
}

// The documented user may do all that is asked of Redis; and whoever lacks one
// command of it cannot do something.
func TestRedisEveryGrantedCommandIsNeeded(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t)
	commands := redistest.Commands(t)
	try := func(t *testing.T, user string, granted []string) error {
		s.Grant(user, granted...)
		g := grant{t, user, func() *redis.Client {
			return s.Client(func(o *redis.Options) { o.Username, o.Password = user, redistest.Password })
		}, s.Admin()}
		for _, d := range deeds {
			if err := d.do(g); err != nil {
				return fmt.Errorf("%s: %w", d.name, err)
			}
		}
		return nil
	}
	t.Run("all", func(t *testing.T) {
		require.NoError(t, try(t, "all", commands))
		assert.Empty(t, denied(t, s, "all"))
	})
	for _, command := range commands {
		t.Run("without "+command, func(t *testing.T) {
			rest := slices.DeleteFunc(slices.Clone(commands), func(c string) bool { return c == command })
			err := try(t, "without-"+command, rest)
			require.Error(t, err, "%s is granted in vain", command)
			t.Log(strings.ReplaceAll(err.Error(), "\n", "; "))
		})
	}
}
