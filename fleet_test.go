package sessionlock_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock"
	"github.com/sessionlock/sessionlock/internal/fleet"
	"github.com/sessionlock/sessionlock/internal/redistest"
	"github.com/sessionlock/sessionlock/sessionlocktest"
)

// The promises about fleets, with processes on a real Redis: each worker is this
// test binary run again, with a go-redis client of default options and a Client
// of its own. The upstream runs here; its ledger is the truth.

const (
	processes = 8
	crowd     = 50 // callers per process
	slack     = 5  // how far a bound may be overrun on a busy machine

	lockTTL = 3 * time.Second        // the defaults of WithLockTTL
	poll    = 300 * time.Millisecond // and WithWait
)

func TestMain(m *testing.M) {
	fleet.Main(newWorker)
	m.Run()
}

// setup is what the workers of one fleet have in common.
type setup struct {
	Redis, Upstream      string
	LockTTL              time.Duration // 0: the default
	ReauthMin, ReauthMax time.Duration // 0: the defaults
	Ahead                time.Duration // WithRefreshAhead
}

func (s setup) client(rdb redis.UniversalClient) (*sessionlock.Client, error) {
	remote := sessionlocktest.At(s.Upstream)
	opts := []sessionlock.Option{sessionlock.WithRedis(rdb), sessionlock.WithLogout(remote.Logout)}
	if s.LockTTL > 0 {
		opts = append(opts, sessionlock.WithLockTTL(s.LockTTL))
	}
	if s.ReauthMin > 0 {
		opts = append(opts, sessionlock.WithReauthBackoff(s.ReauthMin, s.ReauthMax))
	}
	if s.Ahead > 0 {
		opts = append(opts, sessionlock.WithRefreshAhead(s.Ahead))
	}
	return sessionlock.New(s.Upstream, remote, opts...)
}

// order is what a worker is asked to do, by several callers at once.
type order struct {
	Key     string
	Callers int
	At      time.Time     // when they start; zero: at once
	Timeout time.Duration // of each; zero: a minute
	Pace    time.Duration // caller i starts i times this after At
	Tick    time.Duration // between the tries of a caller that makes several; zero: 20 ms
}

// outcome is what one caller got.
type outcome struct {
	Token      string
	Generation uint64
	Err        string
	Is         []string // what Err matches
	Took       time.Duration
	End        time.Time
}

var sentinels = map[string]error{
	"denied": sessionlock.ErrDenied, "suppressed": sessionlock.ErrSuppressed, "rejected": sessionlock.ErrRejected,
	"unavailable": sessionlock.ErrUnavailable, "lock timeout": sessionlock.ErrLockTimeout, "stale": sessionlock.ErrStale,
	"mix-up": sessionlocktest.ErrMixUp, "deadline": context.DeadlineExceeded,
}

func matches(err error) (is []string) {
	for name, sentinel := range sentinels {
		if errors.Is(err, sentinel) {
			is = append(is, name)
		}
	}
	slices.Sort(is)
	return is
}

// worker is the far side of a fleet: one process with one client.
type worker struct {
	client *sessionlock.Client
	remote *sessionlocktest.Remote

	mu      sync.Mutex
	release chan order     // tells the callers of "hold" how to go on
	held    chan []outcome // what became of them
}

func newWorker(config json.RawMessage) (fleet.Handler, error) {
	var s setup
	if err := json.Unmarshal(config, &s); err != nil {
		return nil, err
	}
	c, err := s.client(redis.NewClient(&redis.Options{Addr: s.Redis}))
	w := &worker{
		client: c, remote: sessionlocktest.At(s.Upstream),
		release: make(chan order), held: make(chan []outcome, 1),
	}
	return w.answer, err
}

func (w *worker) answer(ctx context.Context, op string, arg json.RawMessage) (any, error) {
	var o order
	if err := json.Unmarshal(arg, &o); err != nil {
		return nil, err
	}
	switch op {
	case "session": // once
		return o.run(ctx, func(ctx context.Context, _ int) (sessionlock.Session, error) {
			return w.client.Session(ctx, o.Key)
		}), nil
	case "insist": // until there is one
		return o.run(ctx, func(ctx context.Context, _ int) (s sessionlock.Session, err error) {
			for range o.ticks(ctx) {
				if s, err = w.client.Session(ctx, o.Key); err == nil {
					break
				}
			}
			return s, err
		}), nil
	case "work": // requests, one after the other, until the timeout; the last error that is not its own end
		return o.run(ctx, func(ctx context.Context, _ int) (s sessionlock.Session, last error) {
			for range o.ticks(ctx) {
				if err := w.client.Do(ctx, o.Key, w.remote.Call); err != nil && ctx.Err() == nil {
					last = err
				}
			}
			return s, last
		}), nil
	case "keep": // as "work", without requests; what it took is that of the slowest call
		return w.keep(ctx, o), nil
	case "hold": // callers inside Do, all with a session that they have not used yet
		w.hold(ctx, o)
		return nil, nil
	case "release": // now they use it
		w.mu.Lock()
		defer w.mu.Unlock()
		for range o.Callers {
			w.release <- o
		}
		return <-w.held, nil
	case "close":
		return nil, w.client.Close(ctx)
	}
	return nil, fmt.Errorf("no such op: %s", op)
}

// ticks yields at once and then at every tick until ctx ends.
func (o order) ticks(ctx context.Context) func(func(int) bool) {
	return func(yield func(int) bool) {
		if o.Tick == 0 {
			o.Tick = 20 * time.Millisecond
		}
		t := time.NewTicker(o.Tick)
		defer t.Stop()
		for i := 0; yield(i); i++ {
			select {
			case <-t.C:
			case <-ctx.Done():
				return
			}
		}
	}
}

// run has o's callers call f at the same time.
func (o order) run(ctx context.Context, f func(ctx context.Context, i int) (sessionlock.Session, error)) []outcome {
	if o.Timeout == 0 {
		o.Timeout = time.Minute
	}
	outcomes := make([]outcome, o.Callers)
	var callers sync.WaitGroup
	for i := range outcomes {
		callers.Go(func() {
			o.wait(i)
			ctx, cancel := context.WithTimeout(ctx, o.Timeout)
			defer cancel()
			start := time.Now()
			s, err := f(ctx, i)
			out := outcome{Token: s.Token.Reveal(), Generation: s.Generation(), Is: matches(err), Took: time.Since(start), End: time.Now()}
			if err != nil {
				out.Err = err.Error()
			}
			outcomes[i] = out
		})
	}
	callers.Wait()
	return outcomes
}

// wait waits until caller i of o may start.
func (o order) wait(i int) {
	if !o.At.IsZero() {
		time.Sleep(time.Until(o.At.Add(time.Duration(i) * o.Pace)))
	}
}

// hold returns when all callers are inside their first run.
func (w *worker) hold(ctx context.Context, o order) {
	var inside sync.WaitGroup
	inside.Add(o.Callers)
	go func() {
		w.held <- o.run(ctx, func(ctx context.Context, i int) (got sessionlock.Session, err error) {
			err = w.client.Do(ctx, o.Key, func(ctx context.Context, s sessionlock.Session) error {
				got = s
				if sessionlock.RejectionFromContext(ctx) == nil {
					inside.Done()
					next := <-w.release
					next.wait(i)
				}
				return w.remote.Call(ctx, s)
			})
			return got, err
		})
	}()
	inside.Wait()
}

// company is a fleet at work: a Redis, an upstream, and the processes.
type company struct {
	t        testing.TB
	redis    *redistest.Server
	upstream *sessionlocktest.Upstream
	workers  []*fleet.Process
	eye      *sessionlock.Client // of this process, to look at entries
}

func found(t testing.TB, n int, s setup) *company {
	t.Helper()
	c := &company{t: t, redis: redistest.Start(t), upstream: sessionlocktest.NewUpstream(t)}
	s.Redis, s.Upstream = c.redis.Addr(), c.upstream.URL
	c.workers = fleet.Start(t, n, s)
	eye, err := s.client(c.redis.Client())
	require.NoError(t, err)
	t.Cleanup(func() { closeClient(t, eye) })
	c.eye = eye
	// Each has connected before a test measures anything.
	c.all("session", order{Key: "warm-up", Callers: 1})
	return c
}

func closeClient(t testing.TB, c *sessionlock.Client) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 20*time.Second)
	defer cancel()
	assert.NoError(t, c.Close(ctx))
}

// ask has one worker do o.
func (c *company) ask(p *fleet.Process, op string, o order) ([]outcome, error) {
	ctx, cancel := context.WithTimeout(c.t.Context(), max(90*time.Second, o.Timeout+30*time.Second))
	defer cancel()
	var got []outcome
	err := p.Call(ctx, op, o, &got)
	return got, err
}

// start has workers do o and returns what gives their outcomes; those of
// processes that were killed are left out.
func (c *company) start(workers []*fleet.Process, op string, o order) (outcomes func() []outcome) {
	var calls sync.WaitGroup
	got, errs := make([][]outcome, len(workers)), make([]error, len(workers))
	for i, p := range workers {
		calls.Go(func() { got[i], errs[i] = c.ask(p, op, o) })
	}
	return func() []outcome {
		c.t.Helper()
		calls.Wait()
		for _, err := range errs {
			if !errors.Is(err, fleet.ErrDead) {
				require.NoError(c.t, err)
			}
		}
		return slices.Concat(got...)
	}
}

// all has every worker do o, at the same moment unless o says when.
func (c *company) all(op string, o order) []outcome {
	c.t.Helper()
	if o.At.IsZero() {
		o.At = time.Now().Add(100 * time.Millisecond)
	}
	return c.start(c.workers, op, o)()
}

// login waits until the nth login of key has arrived upstream and is under way.
func (c *company) login(key string, n int) {
	c.t.Helper()
	require.Eventually(c.t, func() bool {
		a := c.upstream.Ledger().Accounts[key]
		return a.Sent == n && a.AtOnce == 1
	}, 20*time.Second, time.Millisecond, "login %d of %s", n, key)
}

// leader returns the process that is inside the nth login of key.
func (c *company) leader(key string, n int) *fleet.Process {
	c.t.Helper()
	c.login(key, n)
	status, err := c.eye.Inspect(c.t.Context(), key)
	require.NoError(c.t, err)
	_, pid, _ := strings.Cut(status.Holder, "/")
	for _, p := range c.workers {
		if strconv.Itoa(p.Pid()) == pid {
			return p
		}
	}
	require.FailNow(c.t, "no worker leads", "holder %q", status.Holder)
	return nil
}

func (c *company) others(not *fleet.Process) (rest []*fleet.Process) {
	return slices.DeleteFunc(slices.Clone(c.workers), func(p *fleet.Process) bool { return p == not })
}

// logins checks what the upstream has seen of key.
func (c *company) logins(want int, key string) {
	c.t.Helper()
	total, atOnce := c.upstream.Logins(key)
	assert.Equal(c.t, want, total, "logins")
	assert.LessOrEqual(c.t, atOnce, 1, "logins at once")
}

// oneSession checks that n callers all got the same session, and returns it.
func oneSession(t testing.TB, n int, outcomes []outcome) outcome {
	t.Helper()
	require.Len(t, outcomes, n)
	for _, o := range outcomes {
		require.Empty(t, o.Err)
		require.NotEmpty(t, o.Token)
		require.Equal(t, outcomes[0].Token, o.Token)
		require.Equal(t, outcomes[0].Generation, o.Generation)
	}
	return outcomes[0]
}

// refused checks that n callers all got an error that matches what is named.
func refused(t testing.TB, n int, outcomes []outcome, is ...string) {
	t.Helper()
	require.Len(t, outcomes, n)
	for _, o := range outcomes {
		require.Empty(t, o.Token)
		require.Subset(t, o.Is, is, o.Err)
	}
}

func TestFleetColdBurstCostsOneLogin(t *testing.T) {
	c := found(t, processes, setup{})
	c.upstream.Delay(200 * time.Millisecond)
	oneSession(t, processes*crowd, c.all("session", order{Key: "bob", Callers: crowd}))
	c.logins(1, "bob")
}

func TestFleetLateProcessFindsTheSession(t *testing.T) {
	c := found(t, 1, setup{})
	first := oneSession(t, 1, c.all("session", order{Key: "bob", Callers: 1}))
	require.NoError(t, c.workers[0].Call(t.Context(), "close", order{}, nil))

	c.workers = fleet.Start(t, 2, setup{Redis: c.redis.Addr(), Upstream: c.upstream.URL})
	later := oneSession(t, 2*crowd, c.all("session", order{Key: "bob", Callers: crowd}))
	assert.Equal(t, first.Token, later.Token)
	c.logins(1, "bob")
}

func TestFleetDeniedPasswordCostsOneLogin(t *testing.T) {
	c := found(t, processes, setup{})
	c.upstream.Delay(200 * time.Millisecond)
	c.upstream.DenyAfter("bob", 0)
	refused(t, processes*crowd, c.all("session", order{Key: "bob", Callers: crowd}), "denied")
	refused(t, processes*crowd, c.all("session", order{Key: "bob", Callers: crowd}), "denied", "suppressed")
	c.logins(1, "bob")
}

func TestFleetDeniedPasswordStaysWithinTheBudgetWhenLeadersAreKilled(t *testing.T) {
	for _, tt := range []struct {
		kills, logins int
		is            string
	}{
		{1, 2, "denied"},
		{3, 3, "suppressed"},
	} {
		t.Run(fmt.Sprint(tt.kills), func(t *testing.T) {
			c := found(t, processes, setup{LockTTL: 500 * time.Millisecond})
			c.upstream.DenyAfter("bob", 0)
			c.upstream.Hang(true)
			outcomes := c.start(c.workers, "session", order{Key: "bob", Callers: crowd})
			for n := range tt.kills {
				leader := c.leader("bob", n+1)
				leader.Kill()
				c.workers = c.others(leader)
			}
			c.upstream.Hang(false)
			refused(t, len(c.workers)*crowd, outcomes(), tt.is)
			refused(t, len(c.workers)*crowd, c.all("session", order{Key: "bob", Callers: crowd}), tt.is)
			c.logins(tt.logins, "bob")
		})
	}
}

// rejections has the whole fleet hold one session, which is then revoked, and
// use it: the processes one after the other, spread over a while, and so the
// callers of each. With a spread longer than a login some are too late for it
// and find only what came of it.
func rejections(t *testing.T, login, spread time.Duration) {
	t.Helper()
	c := found(t, processes, setup{})
	first := oneSession(t, processes, c.all("session", order{Key: "bob", Callers: 1}))
	c.upstream.Delay(login)
	c.start(c.workers, "hold", order{Key: "bob", Callers: crowd})()
	c.upstream.Revoke("bob")

	start := time.Now().Add(100 * time.Millisecond)
	var parts []func() []outcome
	for i := range c.workers {
		at := start.Add(spread / 2 * time.Duration(i) / (processes - 1))
		parts = append(parts, c.start(c.workers[i:i+1], "release", order{Callers: crowd, At: at, Pace: spread / 2 / crowd}))
	}
	var got []outcome
	for _, part := range parts {
		got = append(got, part()...)
	}
	second := oneSession(t, processes*crowd, got)
	assert.NotEqual(t, first.Token, second.Token)
	assert.Greater(t, second.Generation, first.Generation)
	c.logins(1+1, "bob")
	assert.GreaterOrEqual(t, c.upstream.Ledger().Accounts["bob"].Refused, processes*crowd, "rejections")
}

func TestFleetRejectionsAtOnceCostOneLogin(t *testing.T) {
	rejections(t, 200*time.Millisecond, 0)
}

func TestFleetRejectionsOverSeveralLoginTimesCostOneLogin(t *testing.T) {
	const login = 400 * time.Millisecond
	rejections(t, login, login*5/2)
}

// The back-off is scaled to a tenth; TestSessionsRefusedForAMinuteCostEightLoginsAtMost
// has it in full.
func sessionsRefused(t *testing.T, s setup, o order) {
	c := found(t, processes, s)
	c.upstream.RefuseFresh(true)
	o.Key = "bob"
	for _, o := range c.all("work", o) {
		assert.Contains(t, o.Is, "rejected", o.Err)
	}
	logins, atOnce := c.upstream.Logins("bob")
	t.Logf("%d logins", logins)
	assert.LessOrEqual(t, logins, 8)
	assert.GreaterOrEqual(t, logins, 5, "the back-off must end")
	assert.Equal(t, 1, atOnce)
}

func TestFleetSessionsRefusedWhileFreshCostEightLoginsAtMost(t *testing.T) {
	sessionsRefused(t, setup{ReauthMin: 100 * time.Millisecond, ReauthMax: 3 * time.Second}, order{Callers: 5, Timeout: 6 * time.Second})
}

// atLength is for tests that take minutes of real time. They run beside each
// other, and only where everything is demanded; shorter ones show the same.
func atLength(t *testing.T) {
	t.Helper()
	if os.Getenv("SESSIONLOCK_REQUIRE_REDIS") == "" {
		t.Skip("NOT TESTED at full length, which takes a minute and a half: set SESSIONLOCK_REQUIRE_REDIS=1")
	}
	t.Parallel()
}

func TestFleetSessionsRefusedForAMinuteCostEightLoginsAtMost(t *testing.T) {
	atLength(t)
	sessionsRefused(t, setup{}, order{Callers: crowd, Timeout: time.Minute, Tick: 200 * time.Millisecond})
}

// servedAfter returns how long after an outage the last caller was served, and
// how many logins were turned away.
func servedAfter(t *testing.T, outage time.Duration, o order) (late time.Duration, turnedAway int) {
	c := found(t, processes, setup{})
	c.upstream.Down(sessionlocktest.Refusing)
	o.Key = "bob"
	outcomes := c.start(c.workers, "insist", o)
	<-time.After(outage)
	c.upstream.Down(sessionlocktest.Up)
	back := time.Now()

	got := outcomes()
	oneSession(t, processes*o.Callers, got)
	last := slices.MaxFunc(got, func(a, b outcome) int { return a.End.Compare(b.End) })
	late = last.End.Sub(back)
	t.Logf("the last caller was served %v after the upstream was back", late)
	status, err := c.eye.Inspect(t.Context(), "bob")
	require.NoError(t, err)
	assert.Zero(t, status.Attempts, "counted against the budget")
	return late, c.upstream.Ledger().Accounts["bob"].TurnedAway
}

func TestFleetIsServedSoonAfterTheUpstreamIsBack(t *testing.T) {
	late, turnedAway := servedAfter(t, 3*time.Second, order{Callers: 5})
	// 503 came with "Retry-After: 1", and that is more than the back-off of 250 ms
	// until it has doubled twice: by then the outage is over but for one wait.
	assert.Less(t, late, slack*2*time.Second)
	assert.LessOrEqual(t, turnedAway, 4)
}

func TestFleetIsServedThirtySecondsAfterAMinuteOfOutage(t *testing.T) {
	atLength(t)
	late, turnedAway := servedAfter(t, time.Minute, order{Callers: crowd, Timeout: 2 * time.Minute, Tick: 200 * time.Millisecond})
	assert.Less(t, late, 31*time.Second)
	assert.LessOrEqual(t, turnedAway, 10)
}

func TestFleetKilledLeaderIsSucceededWithinLockTTLAndPoll(t *testing.T) {
	c := found(t, processes, setup{})
	c.upstream.Hang(true)
	outcomes := c.start(c.workers, "session", order{Key: "bob", Callers: crowd})
	leader := c.leader("bob", 1)
	leader.Kill()
	killed := time.Now()
	c.login("bob", 2)
	took := time.Since(killed)
	c.upstream.Hang(false)

	oneSession(t, (processes-1)*crowd, outcomes())
	c.logins(2, "bob")
	t.Logf("the next login arrived %v after the leader was killed; lock TTL and poll are %v", took, lockTTL+poll)
	assert.Less(t, took, lockTTL+slack*poll)
}

func TestFleetStoppedLeaderCannotOverwriteTheNewerSession(t *testing.T) {
	c := found(t, 3, setup{})
	c.upstream.Hang(true)
	stopped := c.workers[0]
	late := c.start(c.workers[:1], "session", order{Key: "bob", Callers: crowd})
	require.Same(t, stopped, c.leader("bob", 1))
	stopped.Stop()
	c.upstream.Hang(false) // its login succeeds, and it does not know

	newer := oneSession(t, 2*crowd, c.start(c.workers[1:], "session", order{Key: "bob", Callers: crowd})())
	require.Equal(t, 2, c.upstream.Ledger().Accounts["bob"].Live)
	stopped.Continue()

	got := oneSession(t, crowd, late())
	assert.Equal(t, newer.Token, got.Token, "its callers get the newer session")
	require.Eventually(t, func() bool { return c.upstream.Ledger().Accounts["bob"].Logouts == 1 },
		10*time.Second, time.Millisecond, "its own is logged out")
	stored, err := c.eye.Session(t.Context(), "bob")
	require.NoError(t, err)
	assert.Equal(t, newer.Token, stored.Token.Reveal())
	assert.Equal(t, newer.Generation, stored.Generation())
	require.NoError(t, c.upstream.Call(t.Context(), stored), "the one that lives is the one that is stored")
	c.logins(2, "bob")
}

func TestFleetImpatientLeaderFailsNobody(t *testing.T) {
	const patience = 50 * time.Millisecond
	c := found(t, processes, setup{})
	c.upstream.Delay(500 * time.Millisecond)
	// On a busy machine its time may be up before its login is sent; then it was
	// no leader and another key is tried.
	for n := range 20 {
		key := fmt.Sprint("bob ", n)
		impatient := c.start(c.workers[:1], "session", order{Key: key, Callers: 1, Timeout: patience})
		refused(t, 1, impatient(), "deadline")
		if sent, _ := c.upstream.Logins(key); sent == 0 {
			continue
		}
		oneSession(t, processes*crowd, c.all("session", order{Key: key, Callers: crowd, At: time.Now()}))
		c.logins(1, key)
		return
	}
	require.Fail(t, "no login was sent within 50 ms in 20 tries")
}

func TestFleetCallersAreBackByTheirDeadline(t *testing.T) {
	const patience = 50 * time.Millisecond
	c := found(t, processes, setup{})
	c.upstream.Hang(true)
	c.start(c.workers[:1], "session", order{Key: "bob", Callers: 1, Timeout: patience})
	c.login("bob", 1)
	outcomes := c.all("session", order{Key: "bob", Callers: 5, Timeout: patience})
	c.upstream.Hang(false)
	refused(t, processes*5, outcomes, "deadline")
	last := slices.MaxFunc(outcomes, func(a, b outcome) int { return int(a.Took - b.Took) })
	t.Logf("the last of %d callers with a deadline of %v was back after %v", len(outcomes), patience, last.Took)
	assert.Less(t, last.Took, slack*patience)
}

// The same with exact times: clients that share a store stand for the fleet, in
// a bubble whose clock runs only while nobody works.

// mill is an upstream in memory.
type mill struct {
	mu     sync.Mutex
	logins int
	down   bool
	fails  error // of logins while it is down
}

func (m *mill) Login(context.Context, string) (sessionlock.Session, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.logins++
	if m.down {
		return sessionlock.Session{}, m.fails
	}
	return sessionlock.Session{Token: sessionlock.NewToken(fmt.Sprint("token ", m.logins)), Expiry: time.Now().Add(time.Hour)}, nil
}

func (m *mill) set(down bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.down = down
}

// bubbleFleet returns clients that share a store; it is for a bubble.
func bubbleFleet(t *testing.T, m *mill) []*sessionlock.Client {
	t.Helper()
	clients, cache := make([]*sessionlock.Client, processes), new(sessionlock.MemoryCache)
	for i := range clients {
		c, err := sessionlock.New("mill", m, sessionlock.WithCache(cache))
		require.NoError(t, err)
		t.Cleanup(func() { closeClient(t, c) })
		clients[i] = c
	}
	return clients
}

// everybody has n callers of each client call f, again and again until ctx ends.
func everybody(ctx context.Context, clients []*sessionlock.Client, n int, f func(*sessionlock.Client)) {
	var callers sync.WaitGroup
	for _, c := range clients {
		for range n {
			callers.Go(func() {
				for range (order{Tick: 50 * time.Millisecond}).ticks(ctx) {
					f(c)
				}
			})
		}
	}
	callers.Wait()
}

func TestSessionsRefusedForAMinuteCostEightLoginsAtMost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := new(mill)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		everybody(ctx, bubbleFleet(t, m), 3, func(c *sessionlock.Client) {
			err := c.Do(t.Context(), "bob", func(context.Context, sessionlock.Session) error {
				return sessionlock.Reject(errors.New("no such session"))
			})
			assert.ErrorIs(t, err, sessionlock.ErrRejected)
		})
		// At 0 and at once again, then after 1, 2, 4, 8, 16 and 30 s.
		assert.Equal(t, 7, m.logins)
	})
}

func TestUpstreamIsUsedWithinThirtySecondsAfterAnOutage(t *testing.T) {
	for _, outage := range []time.Duration{time.Second, 31800 * time.Millisecond, time.Minute, 5 * time.Minute} {
		t.Run(outage.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := &mill{down: true, fails: &net.OpError{Op: "dial", Err: errors.New("connection refused")}}
				clients := bubbleFleet(t, m)
				time.AfterFunc(outage, func() { m.set(false) })
				start := time.Now()
				ctx, cancel := context.WithTimeout(t.Context(), outage+time.Minute)
				everybody(ctx, clients, 1, func(c *sessionlock.Client) {
					_, err := c.Session(t.Context(), "bob")
					if err == nil {
						cancel()
						return
					}
					var failed *sessionlock.LoginError
					assert.ErrorAs(t, err, &failed)
					assert.Equal(t, sessionlock.LoginDeferred, failed.Class)
					assert.Zero(t, failed.Attempts)
				})
				served := time.Since(start) - outage
				t.Logf("served %v after the outage, by login %d", served, m.logins)
				assert.LessOrEqual(t, served, 30*time.Second)
				assert.LessOrEqual(t, m.logins, 9+int(outage/(30*time.Second)))
				status, err := clients[0].Inspect(t.Context(), "bob")
				require.NoError(t, err)
				assert.Zero(t, status.Attempts)
			})
		})
	}
}

// keep has o's callers ask for a session that is there, until the timeout. Took is
// the longest that a call took, and Err counts those that were no near hits.
func (w *worker) keep(ctx context.Context, o order) []outcome {
	var calls atomic.Uint64
	before, longest := w.client.Stats(), make([]time.Duration, o.Callers)
	outcomes := o.run(ctx, func(ctx context.Context, i int) (s sessionlock.Session, last error) {
		for range o.ticks(ctx) {
			start := time.Now()
			got, err := w.client.Session(context.WithoutCancel(ctx), o.Key)
			longest[i] = max(longest[i], time.Since(start))
			calls.Add(1)
			if err != nil {
				last = err
				continue
			}
			s = got
		}
		return s, last
	})
	for i := range outcomes {
		outcomes[i].Took = longest[i]
		if waited := calls.Load() - (w.client.Stats().NearHits - before.NearHits); waited > 0 {
			outcomes[i].Err += fmt.Sprintf("%d of %d calls were no near hits", waited, calls.Load())
		}
	}
	return outcomes
}

// keptAlive has a fleet use one session for d, while it is renewed ahead of its end.
func keptAlive(t *testing.T, d time.Duration) {
	const (
		life, window = 6 * time.Second, 2 * time.Second
		used         = life * 3 / 4 // less the margin, which is a quarter
		login        = 300 * time.Millisecond
	)
	c := found(t, processes, setup{Ahead: window})
	c.upstream.SetTTL(life)
	oneSession(t, processes, c.all("session", order{Key: "bob", Callers: 1}))
	c.upstream.Delay(login) // from now on who waits for one shows it
	keeping := c.start(c.workers, "keep", order{Key: "bob", Callers: 5, Timeout: d, Tick: 5 * time.Millisecond})
	<-time.After(d - life/2)
	kept, atOnce := c.upstream.Logins("bob")
	c.upstream.SetTTL(time.Hour) // the last one lives on
	got := keeping()
	for _, o := range got {
		require.Empty(t, o.Err, "a caller waited")
		require.NotEmpty(t, o.Token)
	}
	slowest := slices.MaxFunc(got, func(a, b outcome) int { return int(a.Took - b.Took) })
	t.Logf("%d logins in %v; the slowest of all calls took %v", kept, d-life, slowest.Took)
	assert.Less(t, slowest.Took, login, "no longer than a login")
	assert.Equal(t, 1, atOnce)
	// A session is renewed window ± 10 % before its end, and the next one lives from
	// the time its login was sent. A busy machine may be late.
	soonest, latest := used-window*11/10, used-window*9/10+login
	assert.GreaterOrEqual(t, kept-1, int((d-life)/latest)-1, "logins")
	assert.LessOrEqual(t, kept-1, int((d-life)/soonest)+1, "logins")

	for _, p := range c.workers {
		require.NoError(t, p.Call(t.Context(), "close", order{}, nil))
	}
	bob := c.upstream.Ledger().Accounts["bob"]
	assert.Equal(t, bob.OK, bob.Sent)
	assert.Equal(t, 1, bob.Live, "sessions alive when all processes have ended")
	assert.Equal(t, bob.OK-1, bob.Logouts+bob.LateLogouts, "each that was displaced was logged out, once")
}

func TestFleetKeepsASessionAliveAndNobodyWaits(t *testing.T) {
	keptAlive(t, 13*time.Second)
}

func TestFleetKeepsASessionAliveForAMinuteAndNobodyWaits(t *testing.T) {
	atLength(t)
	keptAlive(t, time.Minute)
}
