package sessionlock_test

// What the tests of the client share: an upstream with a ledger, spies around
// cache and lock that count, record and break, and clients that end with their
// test.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock"
	"github.com/sessionlock/sessionlock/internal/redistest"
)

const acme = "https://api.acme.test"

var (
	errStoreDown = errors.New("store is down")
	errDead      = errors.New("952 invalid token")
	errWindow    = errors.New("112 window is missing")
)

// upstream is somebody else's API: an Authenticator with a ledger. The nth login
// of all brings the token "key/n", unless script says otherwise.
type upstream struct {
	life   time.Duration // of a session; 0: logins do not say
	takes  time.Duration // how long a login takes
	script func(ctx context.Context, key string, n int) (sessionlock.Session, error)
	refuse error // what a logout answers

	mu           sync.Mutex
	began        []time.Time // of every login
	inside, most int
	out          []sessionlock.Session // what was logged out
	outAt        []time.Time
}

func (u *upstream) Login(ctx context.Context, key string) (sessionlock.Session, error) {
	u.mu.Lock()
	u.began = append(u.began, time.Now())
	n := len(u.began)
	u.inside++
	u.most = max(u.most, u.inside)
	u.mu.Unlock()
	defer func() {
		u.mu.Lock()
		defer u.mu.Unlock()
		u.inside--
	}()
	if err := pauseFor(ctx, u.takes); err != nil {
		return sessionlock.Session{}, err
	}
	if u.script != nil {
		return u.script(ctx, key, n)
	}
	return u.grant(key, n), nil
}

func (u *upstream) grant(key string, n int) sessionlock.Session {
	s := sessionlock.Session{Token: sessionlock.NewToken(fmt.Sprintf("%s/%d", key, n))}
	if u.life > 0 {
		s.Expiry = time.Now().Add(u.life)
	}
	return s
}

func (u *upstream) Logout(_ context.Context, s sessionlock.Session) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.out = append(u.out, s)
	u.outAt = append(u.outAt, time.Now())
	return u.refuse
}

// fails sets what a logout answers from now on.
func (u *upstream) fails(err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.refuse = err
}

func (u *upstream) logins() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return len(u.began)
}

// starts returns when the logins began, counted from start.
func (u *upstream) starts(start time.Time) []time.Duration {
	u.mu.Lock()
	defer u.mu.Unlock()
	out := make([]time.Duration, len(u.began))
	for i, at := range u.began {
		out[i] = at.Sub(start)
	}
	return out
}

func (u *upstream) atOnce() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.most
}

// ended returns the tokens that were logged out.
func (u *upstream) ended() []string {
	u.mu.Lock()
	defer u.mu.Unlock()
	out := []string{}
	for _, s := range u.out {
		out = append(out, s.Token.Reveal())
	}
	return out
}

func pauseFor(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// newClient returns a client of u on cache, closed when the test ends.
func newClient(t *testing.T, u *upstream, cache sessionlock.Cache, opts ...sessionlock.Option) *sessionlock.Client {
	t.Helper()
	opts = append([]sessionlock.Option{sessionlock.WithCache(cache), sessionlock.WithLogout(u.Logout)}, opts...)
	c, err := sessionlock.New(acme, u, opts...)
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close(context.WithoutCancel(t.Context())) })
	return c
}

// tokenOf returns the token of key's session; it fails the test without one.
func tokenOf(t *testing.T, c *sessionlock.Client, key string) string {
	t.Helper()
	s, err := c.Session(t.Context(), key)
	require.NoError(t, err)
	return s.Token.Reveal()
}

type answer struct {
	session sessionlock.Session
	err     error
	at      time.Time
}

// askFor calls Session in a goroutine of its own.
func askFor(ctx context.Context, c *sessionlock.Client, key string) <-chan answer {
	out := make(chan answer, 1)
	go func() {
		s, err := c.Session(ctx, key)
		out <- answer{s, err, time.Now()}
	}()
	return out
}

// everyCall makes every call that takes a key, and returns their errors by name.
func everyCall(ctx context.Context, c *sessionlock.Client, key string) map[string]error {
	fn := func(context.Context, sessionlock.Session) error { return nil }
	_, session := c.Session(ctx, key)
	_, inspect := c.Inspect(ctx, key)
	_, handle := c.For(key).Session(ctx)
	_, call := sessionlock.Call(ctx, c.For(key), func(context.Context, sessionlock.Session) (int, error) { return 1, nil })
	return map[string]error{
		"Session": session, "Do": c.Do(ctx, key, fn), "Logout": c.Logout(ctx, key), "Unsuppress": c.Unsuppress(ctx, key),
		"Inspect": inspect, "Handle.Session": handle, "Handle.Do": c.For(key).Do(ctx, fn), "Call": call,
	}
}

// spy sees every call of a cache and a locker, and can break them: before runs
// instead of the call when it returns an error, after takes the reply away.
type spy struct {
	before, after func(ctx context.Context, op, name string) error

	mu    sync.Mutex
	calls map[string]int // by op
	names map[string]bool
	swaps []swapped
}

type swapped struct {
	name      string
	old, next []byte
}

// The ops of a spy.
const (
	opLoad   = "load"
	opSwap   = "swap"
	opLock   = "lock"
	opExtend = "extend"
	opUnlock = "unlock"
)

func (s *spy) enter(ctx context.Context, op, name string) error {
	s.mu.Lock()
	if s.calls == nil {
		s.calls, s.names = map[string]int{}, map[string]bool{}
	}
	s.calls[op]++
	s.names[name] = true
	s.mu.Unlock()
	if s.before != nil {
		return s.before(ctx, op, name)
	}
	return nil
}

func (s *spy) leave(ctx context.Context, op, name string) error {
	if s.after != nil {
		return s.after(ctx, op, name)
	}
	return nil
}

// count returns how often the ops were called; all of them without any.
func (s *spy) count(ops ...string) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for op, times := range s.calls {
		if len(ops) == 0 || slices.Contains(ops, op) {
			n += times
		}
	}
	return n
}

// seen returns the names that ended in suffix.
func (s *spy) seen(suffix string) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []string
	for name := range s.names {
		if strings.HasSuffix(name, suffix) {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

// swapped returns the swaps that were executed, successful or not.
func (s *spy) swapped() []swapped {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.swaps)
}

// Names of entries and locks end so.
const (
	entrySuffix = ":e"
	lockSuffix  = ":l"
)

func isEntry(name string) bool { return strings.HasSuffix(name, entrySuffix) }

// spyCache is a MemoryCache seen by a spy; it keeps the Watcher face.
type spyCache struct {
	*spy
	*sessionlock.MemoryCache
}

func (c spyCache) Load(ctx context.Context, name string) ([]byte, error) {
	if err := c.enter(ctx, opLoad, name); err != nil {
		return nil, err
	}
	v, err := c.MemoryCache.Load(ctx, name)
	return v, errors.Join(err, c.leave(ctx, opLoad, name))
}

func (c spyCache) CompareAndSwap(ctx context.Context, name string, old, next []byte, ttl time.Duration) ([]byte, error) {
	if err := c.enter(ctx, opSwap, name); err != nil {
		return nil, err
	}
	now, err := c.MemoryCache.CompareAndSwap(ctx, name, old, next, ttl)
	c.mu.Lock()
	c.swaps = append(c.swaps, swapped{name, bytes.Clone(old), bytes.Clone(next)})
	c.mu.Unlock()
	return now, errors.Join(err, c.leave(ctx, opSwap, name))
}

// polled hides the optional faces of a cache.
type polled struct{ sessionlock.Cache }

// spyLocker is a locker seen by a spy.
type spyLocker struct {
	*spy
	sessionlock.Locker
}

func (l spyLocker) TryLock(ctx context.Context, name string, ttl time.Duration) (sessionlock.Lock, error) {
	if err := l.enter(ctx, opLock, name); err != nil {
		return nil, err
	}
	held, err := l.Locker.TryLock(ctx, name, ttl)
	if err = errors.Join(err, l.leave(ctx, opLock, name)); err != nil {
		return nil, err
	}
	return spyLock{l.spy, held, name}, nil
}

type spyLock struct {
	*spy
	sessionlock.Lock
	name string
}

func (l spyLock) Extend(ctx context.Context, ttl time.Duration) error {
	if err := l.enter(ctx, opExtend, l.name); err != nil {
		return err
	}
	return errors.Join(l.Lock.Extend(ctx, ttl), l.leave(ctx, opExtend, l.name))
}

func (l spyLock) Unlock(ctx context.Context) error {
	if err := l.enter(ctx, opUnlock, l.name); err != nil {
		return err
	}
	return errors.Join(l.Lock.Unlock(ctx), l.leave(ctx, opUnlock, l.name))
}

// memoryLocker is a Locker in memory. The zero value is ready.
type memoryLocker struct {
	mu   sync.Mutex
	held map[string]*memoryLock
}

type memoryLock struct {
	in    *memoryLocker
	name  string
	until time.Time
}

func (l *memoryLocker) TryLock(_ context.Context, name string, ttl time.Duration) (sessionlock.Lock, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if h := l.held[name]; h != nil && time.Now().Before(h.until) {
		return nil, sessionlock.ErrLocked
	}
	if l.held == nil {
		l.held = map[string]*memoryLock{}
	}
	l.held[name] = &memoryLock{l, name, time.Now().Add(ttl)}
	return l.held[name], nil
}

// lose takes every lock from its holder.
func (l *memoryLocker) lose() {
	l.mu.Lock()
	defer l.mu.Unlock()
	clear(l.held)
}

func (l *memoryLocker) free() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, h := range l.held {
		if time.Now().Before(h.until) {
			return false
		}
	}
	return true
}

func (h *memoryLock) Extend(_ context.Context, ttl time.Duration) error {
	h.in.mu.Lock()
	defer h.in.mu.Unlock()
	if h.in.held[h.name] != h || !time.Now().Before(h.until) {
		return sessionlock.ErrNotHeld
	}
	h.until = time.Now().Add(ttl)
	return nil
}

func (h *memoryLock) Unlock(context.Context) error {
	h.in.mu.Lock()
	defer h.in.mu.Unlock()
	if h.in.held[h.name] == h {
		delete(h.in.held, h.name)
	}
	return nil
}

// bubbleRedis is redistest.Bubble whose connections all end with the test:
// go-redis may dial for a caller that has gone and forget the connection, which
// a bubble takes for a leak of ours.
func bubbleRedis(t *testing.T) (*miniredis.Miniredis, func() *redis.Client) {
	t.Helper()
	var mu sync.Mutex
	var dialled []net.Conn
	t.Cleanup(func() {
		synctest.Wait()
		mu.Lock()
		defer mu.Unlock()
		for _, c := range dialled {
			_ = c.Close()
		}
	})
	m, client := redistest.Bubble(t)
	return m, func() *redis.Client {
		return client(func(o *redis.Options) {
			dial := o.Dialer
			o.Dialer = func(ctx context.Context, network, addr string) (net.Conn, error) {
				c, err := dial(ctx, network, addr)
				if err == nil {
					mu.Lock()
					dialled = append(dialled, c)
					mu.Unlock()
				}
				return c, err
			}
		})
	}
}

// recorder is an Observer that remembers.
type recorder struct {
	mu     sync.Mutex
	events []sessionlock.Event
}

func (r *recorder) Observe(_ context.Context, e sessionlock.Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.events = append(r.events, e)
}

func (r *recorder) all() []sessionlock.Event {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.events)
}

// kinds returns the kinds of the events since the last call.
func (r *recorder) kinds() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := []string{}
	for _, e := range r.events {
		out = append(out, e.Kind)
	}
	r.events = nil
	return out
}

// logbook is a buffer that many may write to.
type logbook struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logbook) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logbook) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// rejectOld is a func for Do that refuses one token.
func rejectOld(dead string) func(context.Context, sessionlock.Session) error {
	return func(_ context.Context, s sessionlock.Session) error {
		if s.Token.Reveal() == dead {
			return sessionlock.Reject(errDead)
		}
		return nil
	}
}

// assertUnavailable asserts that err is the outage of a store and nothing else.
func assertUnavailable(t *testing.T, err error) {
	t.Helper()
	var login *sessionlock.LoginError
	require.ErrorIs(t, err, sessionlock.ErrUnavailable)
	assert.NotErrorIs(t, err, sessionlock.ErrDenied)
	assert.NotErrorAs(t, err, &login)
}
