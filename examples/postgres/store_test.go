package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock"
	"github.com/sessionlock/sessionlock/examples/postgres/pgserver"
	"github.com/sessionlock/sessionlock/internal/redistest"
	"github.com/sessionlock/sessionlock/sessionlocktest"
)

const (
	soon = 15 * time.Second // for what a healthy server does at once
	tick = 5 * time.Millisecond
)

// shared is the server of all tests; each has a database of its own. What is
// written survives the end of the server without fsync too, and no more than
// that is done to it here.
var shared struct {
	once sync.Once
	*pgserver.Server
	err error
}

func TestMain(m *testing.M) {
	code := m.Run()
	if shared.Server != nil {
		shared.Stop()
	}
	os.Exit(code)
}

// db is a database of one test.
type db struct {
	*pgserver.Server
	name string
}

// newDB skips the test without a PostgreSQL, or fails it when
// SESSIONLOCK_REQUIRE_REDIS=1.
func newDB(t *testing.T) db {
	t.Helper()
	shared.once.Do(func() { shared.Server, shared.err = pgserver.Start(context.Background(), "fsync=off") })
	mustStart(t, shared.err)
	d := db{shared.Server, "test_" + strings.ToLower(rand.Text())}
	root, err := pgx.Connect(t.Context(), d.URL(d.Addr(), "postgres"))
	require.NoError(t, err)
	defer root.Close(t.Context())
	_, err = root.Exec(t.Context(), "CREATE DATABASE "+d.name)
	require.NoError(t, err)
	t.Cleanup(func() {
		ctx := context.WithoutCancel(t.Context())
		root, err := pgx.Connect(ctx, d.URL(d.Addr(), "postgres"))
		require.NoError(t, err)
		defer root.Close(ctx)
		_, err = root.Exec(ctx, "DROP DATABASE "+d.name+" WITH (FORCE)")
		assert.NoError(t, err)
	})
	return d
}

func mustStart(tb testing.TB, err error) {
	tb.Helper()
	if errors.Is(err, pgserver.ErrMissing) && os.Getenv("SESSIONLOCK_REQUIRE_REDIS") != "1" {
		tb.Skipf("%v; THIS TEST DID NOT RUN", err)
	}
	require.NoError(tb, err)
}

func (d db) url(addr string) string { return d.URL(addr, d.name) }

// crash kills the server; it is back when the test ends, at the latest.
func (d db) crash(t *testing.T) {
	t.Helper()
	d.Kill()
	t.Cleanup(func() { d.comeBack(t) })
}

func (d db) comeBack(t *testing.T) {
	t.Helper()
	if !d.Running() {
		require.NoError(t, d.Restart(context.WithoutCancel(t.Context())))
	}
}

// storeAt returns another process's store, ended with the test.
func storeAt(tb testing.TB, url string) *Store {
	tb.Helper()
	pool, err := pgxpool.New(tb.Context(), url)
	require.NoError(tb, err)
	tb.Cleanup(pool.Close)
	s := NewStore(pool)
	require.NoError(tb, s.Migrate(tb.Context()))
	tb.Cleanup(s.Close)
	return s
}

func storeOn(t *testing.T, d db) *Store {
	t.Helper()
	return storeAt(t, d.url(d.Addr()))
}

func TestStoreIsACache(t *testing.T) {
	d := newDB(t)
	open := func(t *testing.T) sessionlock.Cache { return storeOn(t, d) }
	sessionlocktest.CacheTest{
		New:    open,
		Second: func(t *testing.T, _ sessionlock.Cache) sessionlock.Cache { return open(t) },
		Outage: func(t *testing.T, _ sessionlock.Cache) { d.crash(t) },
	}.Run(t)
}

// The commit is the last thing a server does, and may fail.
func TestSwapThatIsNotCommittedIsAnError(t *testing.T) {
	ctx := t.Context()
	s := storeOn(t, newDB(t))
	_, err := s.pool.Exec(ctx, `
		CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''no''; END';
		CREATE CONSTRAINT TRIGGER refuse AFTER INSERT OR UPDATE ON sessionlock
			DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse()`)
	require.NoError(t, err)
	for range 2 * sweepOdds { // with and without a sweep
		now, err := s.CompareAndSwap(ctx, "k", nil, []byte("v"), time.Hour)
		require.Error(t, err)
		require.Nil(t, now)
	}
}

// A short life may be over when its swap is.
func TestSwapThatTakesLongerThanItsTTLIsTold(t *testing.T) {
	s := storeOn(t, newDB(t))
	_, err := s.pool.Exec(t.Context(), `
		CREATE FUNCTION linger() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.05); RETURN NULL; END';
		CREATE TRIGGER linger AFTER INSERT OR UPDATE ON sessionlock FOR EACH ROW EXECUTE FUNCTION linger()`)
	require.NoError(t, err)
	now, err := s.CompareAndSwap(t.Context(), "k", nil, []byte("v"), time.Millisecond)
	require.NoError(t, err)
	assert.Equal(t, []byte("v"), now)
	now, err = s.Load(t.Context(), "k")
	require.NoError(t, err)
	assert.Nil(t, now)
}

// One that is not swept for long must not make a swap long, and none is kept for
// ever.
func TestExpiredRowsAreDeletedAFewAtATime(t *testing.T) {
	ctx := t.Context()
	s := storeOn(t, newDB(t))
	_, err := s.pool.Exec(ctx, `INSERT INTO sessionlock SELECT 'dead' || i, 'v', now() - interval '1s' FROM generate_series(1, 1000) i`)
	require.NoError(t, err)
	swapping, err := s.pool.Begin(ctx) // a row that somebody else has locked is waited for by no sweep
	require.NoError(t, err)
	defer func() { _ = swapping.Rollback(context.WithoutCancel(ctx)) }()
	_, err = swapping.Exec(ctx, `SELECT FROM sessionlock WHERE key = 'dead1' FOR UPDATE`)
	require.NoError(t, err)
	rows := func() (n int) {
		require.NoError(t, s.pool.QueryRow(ctx, `SELECT count(*) FROM sessionlock WHERE key LIKE 'dead%'`).Scan(&n))
		return n
	}
	_, err = s.CompareAndSwap(ctx, "live", nil, []byte("v"), time.Hour)
	require.NoError(t, err)
	left := rows()
	sweepTo := func(n int) {
		for end := time.Now().Add(2 * soon); left > n; {
			require.True(t, time.Now().Before(end), "%d rows left", left)
			ctx, cancel := context.WithTimeout(ctx, soon)
			_, err := s.CompareAndSwap(ctx, "busy", nil, []byte("v"), time.Millisecond)
			cancel()
			require.NoError(t, err)
			now := rows()
			require.LessOrEqual(t, left-now, sweepLimit)
			left = now
		}
	}
	sweepTo(1)
	require.NoError(t, swapping.Rollback(ctx))
	sweepTo(0)
	v, err := s.Load(ctx, "live")
	require.NoError(t, err)
	assert.Equal(t, []byte("v"), v)
}

func TestSweepReadsNoMoreThanItDeletes(t *testing.T) {
	ctx := t.Context()
	s := storeOn(t, newDB(t))
	_, err := s.pool.Exec(ctx, `INSERT INTO sessionlock SELECT 'live' || i, 'v', now() + interval '1h' FROM generate_series(1, 20000) i;
		ANALYZE sessionlock`)
	require.NoError(t, err)
	rows, err := s.pool.Query(ctx, "EXPLAIN "+sweepSQL, sweepLimit)
	require.NoError(t, err)
	var plan bytes.Buffer
	for rows.Next() {
		var line string
		require.NoError(t, rows.Scan(&line))
		plan.WriteString(line + "\n")
	}
	require.NoError(t, rows.Err())
	assert.Contains(t, plan.String(), "Index Cond: (expires <= now())")
	assert.NotContains(t, plan.String(), "Seq Scan")
}

func TestProcessesMayMigrateAtOnce(t *testing.T) {
	d := newDB(t)
	var all sync.WaitGroup
	for range 8 {
		pool, err := pgxpool.New(t.Context(), d.url(d.Addr()))
		require.NoError(t, err)
		t.Cleanup(pool.Close)
		require.NoError(t, pool.Ping(t.Context()))
		all.Go(func() { assert.NoError(t, NewStore(pool).Migrate(t.Context())) })
	}
	all.Wait()
}

// listeners returns the server's processes that listen.
func listeners(t *testing.T, s *Store) (n int) {
	t.Helper()
	require.NoError(t, s.pool.QueryRow(t.Context(),
		`SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN%'`).Scan(&n))
	return n
}

// counted watches key, and returns how often it was called.
func counted(t *testing.T, s *Store, key string) (calls *atomic.Int64) {
	t.Helper()
	calls = &atomic.Int64{}
	t.Cleanup(s.Watch(key, func() { calls.Add(1) }))
	require.Eventually(t, func() bool { return calls.Load() > 0 }, soon, tick, "called when the connection stands")
	return calls
}

func TestWatchersHearOfEachKindOfSwap(t *testing.T) {
	d := newDB(t)
	s, other := storeOn(t, d), storeOn(t, d)
	calls := counted(t, s, "k")
	var old []byte
	for want, next := range []string{"inserted", "updated"} {
		_, err := other.CompareAndSwap(t.Context(), "k", old, []byte(next), time.Hour)
		require.NoError(t, err)
		require.Eventually(t, func() bool { return calls.Load() == int64(want+2) }, soon, tick, next)
		old = []byte(next)
	}
}

// Each of two watchers stops the other: whoever is called first is the only one.
func TestStoppedWatcherIsNotCalled(t *testing.T) {
	s := storeOn(t, newDB(t))
	counted(t, s, "up")
	var stop [2]func()
	called := make(chan int, 2)
	for i := range stop {
		stop[i] = s.Watch("k", func() {
			stop[1-i]()
			called <- i
		})
	}
	s.wake("k")
	assert.Len(t, called, 1)
}

// What happens while there is no connection is not heard, so a new one is news.
func TestWatchersAreCalledForEachNewConnection(t *testing.T) {
	d := newDB(t)
	s, other := storeOn(t, d), storeOn(t, d)
	a, b := counted(t, s, "a"), counted(t, other, "b")
	for want := int64(2); want < 4; want++ {
		_, err := other.pool.Exec(t.Context(), `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
			WHERE datname = current_database() AND query LIKE 'LISTEN%'`)
		require.NoError(t, err)
		require.Eventually(t, func() bool { return a.Load() == want && b.Load() == want }, soon, tick)
	}
}

// A connection that is open on this side only says nothing, and nothing tells.
func TestSilentConnectionIsReplaced(t *testing.T) {
	d := newDB(t)
	proxy := redistest.NewProxy(t, d.Addr())
	var way atomic.Value // where new connections go
	way.Store(proxy.Addr())
	config, err := pgxpool.ParseConfig(d.url(d.Addr()))
	require.NoError(t, err)
	config.ConnConfig.DialFunc = func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, way.Load().(string))
	}
	pool, err := pgxpool.NewWithConfig(t.Context(), config)
	require.NoError(t, err)
	t.Cleanup(pool.Close)
	s := NewStore(pool)
	t.Cleanup(s.Close)
	calls := counted(t, s, "k")
	proxy.BlackHole()
	way.Store(d.Addr())
	require.Eventually(t, func() bool { return calls.Load() > 1 }, soon, tick)
}

func TestWatchesShareOneConnectionThatEndsByClose(t *testing.T) {
	d := newDB(t)
	s, other := storeOn(t, d), storeOn(t, d)
	counted(t, s, "a")
	stop := s.Watch("d", func() {})
	assert.Equal(t, 1, listeners(t, other))
	stop()
	stop()
	assert.NotContains(t, s.watched, "d", "nothing is left of a watch")
	assert.True(t, storesRun())
	s.Close()
	s.Close()
	require.Eventually(t, func() bool { return !storesRun() }, soon, tick)
	require.Eventually(t, func() bool { return listeners(t, other) == 0 }, soon, tick)
	v, err := s.Load(t.Context(), "a")
	require.NoError(t, err)
	assert.Nil(t, v)
}

func TestCloseWaitsForACallUnderWay(t *testing.T) {
	d := newDB(t)
	s, other := storeOn(t, d), storeOn(t, d)
	counted(t, s, "up")
	entered, leave, closed := make(chan struct{}), make(chan struct{}), make(chan struct{})
	s.Watch("k", func() {
		close(entered)
		<-leave
	})
	_, err := other.CompareAndSwap(t.Context(), "k", nil, []byte("v"), time.Hour)
	require.NoError(t, err)
	<-entered
	go func() {
		s.Close()
		close(closed)
	}()
	select {
	case <-closed:
		t.Error("Close has returned while a watcher is called")
	case <-time.After(100 * time.Millisecond):
	}
	close(leave)
	<-closed
}

func TestWatchAfterCloseStartsNothing(t *testing.T) {
	s := storeOn(t, newDB(t))
	s.Close()
	stop := s.Watch("k", func() { t.Error("called after Close") })
	require.Eventually(t, func() bool { return !storesRun() }, soon, tick)
	stop()
}

// storesRun reports whether a goroutine of any Store does.
func storesRun() bool {
	b := make([]byte, 1<<20)
	return bytes.Contains(b[:runtime.Stack(b, true)], []byte(".(*Store)."))
}

// member joins one process more to the fleet of d.
func member(t *testing.T, d db, auth sessionlock.Authenticator, opts ...sessionlock.Option) (*sessionlock.Client, *Store) {
	t.Helper()
	s := storeOn(t, d)
	c, err := sessionlock.New("upstream", auth, append([]sessionlock.Option{sessionlock.WithCache(s)}, opts...)...)
	require.NoError(t, err)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), soon)
		defer cancel()
		assert.NoError(t, c.Close(ctx))
	})
	return c, s
}

// all has 20 callers of each client use the session of key, and returns the
// errors.
func all(ctx context.Context, u *sessionlocktest.Upstream, fleet []*sessionlock.Client, key string) error {
	var mu sync.Mutex
	var failed []error
	var calls sync.WaitGroup
	for _, c := range fleet {
		for range 20 {
			calls.Go(func() {
				if err := c.Do(ctx, key, u.Call); err != nil {
					mu.Lock()
					defer mu.Unlock()
					failed = append(failed, err)
				}
			})
		}
	}
	calls.Wait()
	return errors.Join(failed...)
}

func TestFleetLogsInOnce(t *testing.T) {
	d, u := newDB(t), sessionlocktest.NewUpstream(t)
	u.Delay(100 * time.Millisecond)
	var fleet []*sessionlock.Client
	for range 4 {
		c, _ := member(t, d, u)
		fleet = append(fleet, c)
	}
	require.NoError(t, all(t.Context(), u, fleet, ada))
	sent, _ := u.Logins(ada)
	require.Equal(t, 1, sent, "cold")
	u.Revoke(ada)
	require.NoError(t, all(t.Context(), u, fleet, ada))
	sent, atOnce := u.Logins(ada)
	require.Equal(t, []int{2, 1}, []int{sent, atOnce}, "revoked")
	late, _ := member(t, d, u)
	require.NoError(t, all(t.Context(), u, []*sessionlock.Client{late}, ada))
	sent, _ = u.Logins(ada)
	assert.Equal(t, 2, sent, "a process that starts later finds the session")
}

// Also the lock is in the table: whoever waits for it is served by NOTIFY, long
// before it would poll.
func TestWaiterIsWokenLongBeforeItsPollTick(t *testing.T) {
	const poll = 20 * time.Second
	d, u := newDB(t), sessionlocktest.NewUpstream(t)
	u.Hang(true)
	leader, _ := member(t, d, u)
	waiter, store := member(t, d, u, sessionlock.WithWait(3, poll))
	served := make(chan error, 1)
	go func() { served <- leader.Do(t.Context(), ada, u.Call) }()
	require.Eventually(t, func() bool { n, _ := u.Logins(ada); return n == 1 }, soon, tick)
	waited := make(chan error, 1)
	go func() { waited <- waiter.Do(t.Context(), ada, u.Call) }()
	require.Eventually(t, func() bool {
		store.mu.Lock()
		defer store.mu.Unlock()
		return len(store.watched) > 0
	}, soon, tick)
	require.Eventually(t, func() bool { return listeners(t, store) > 0 }, soon, tick)
	u.Hang(false)
	require.NoError(t, <-served)
	select {
	case err := <-waited:
		require.NoError(t, err)
	case <-time.After(poll / 4):
		t.Fatalf("not served %v after the leader, and would not be until its next poll", poll/4)
	}
	sent, _ := u.Logins(ada)
	assert.Equal(t, 1, sent)
}

// Nothing of the fleet is restarted when its database is.
func TestFleetOutlivesItsDatabase(t *testing.T) {
	ctx := t.Context()
	d, u := newDB(t), sessionlocktest.NewUpstream(t)
	var fleet []*sessionlock.Client
	for range 3 {
		c, _ := member(t, d, u)
		fleet = append(fleet, c)
	}
	require.NoError(t, all(ctx, u, fleet, ada))
	require.NoError(t, all(ctx, u, fleet, bob))

	d.crash(t)
	fresh, _ := u.Logins(cyd)
	require.Zero(t, fresh)
	require.NoError(t, all(ctx, u, fleet, ada), "held near")
	for _, c := range fleet {
		for range 10 {
			err := c.Do(ctx, cyd, u.Call)
			require.ErrorIs(t, err, sessionlock.ErrUnavailable)
			var login *sessionlock.LoginError
			require.NotErrorAs(t, err, &login, "an outage is no failed login")
		}
	}
	u.Revoke(bob)
	require.ErrorIs(t, all(ctx, u, fleet, bob), sessionlock.ErrUnavailable)
	logins := func() (n []int) {
		for _, user := range []string{ada, bob, cyd} {
			sent, _ := u.Logins(user)
			n = append(n, sent)
		}
		return n
	}
	require.Equal(t, []int{1, 1, 0}, logins(), "nobody logs in without the database")

	d.comeBack(t)
	for _, c := range fleet {
		require.Eventually(t, func() bool {
			return c.Do(ctx, cyd, u.Call) == nil && c.Do(ctx, bob, u.Call) == nil
		}, soon, tick)
	}
	require.NoError(t, all(ctx, u, fleet, ada))
	late, _ := member(t, d, u)
	require.NoError(t, all(ctx, u, []*sessionlock.Client{late}, ada))
	assert.Equal(t, []int{1, 2, 1}, logins(), "what was committed before the crash is there after it")
}
