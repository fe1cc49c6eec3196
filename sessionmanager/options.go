package sessionmanager

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"strings"
	"time"
	"unicode"

	"github.com/redis/go-redis/v9"
)

// Option configures a [Manager]. Of two that set the same thing the later wins.
// Durations are 1 ms to 24 h.
type Option func(*config)

type config struct {
	max, pending, listeners, parallel int
	lease, grace, sweep               time.Duration
	call, start, shutdown, kill       time.Duration

	rdb                redis.UniversalClient
	account            string
	fleetMax           int
	slotTTL, opTimeout time.Duration
	namespace          string
	keySecret          []byte

	observer Observer
	logger   *slog.Logger

	problems []error
}

func defaults() config {
	return config{
		max: 64, pending: 128, listeners: 8, parallel: 64,
		lease: 30 * time.Minute, grace: 30 * time.Second, sweep: 30 * time.Second,
		call: 30 * time.Second, start: 30 * time.Second, shutdown: 10 * time.Second, kill: 5 * time.Second,
		slotTTL: 30 * time.Second, opTimeout: time.Second,
	}
}

// WithMax bounds the sessions of this process: those being opened and closed
// count, so there are never more workers either. Default: 64.
func WithMax(n int) Option { return func(c *config) { c.max = n } }

// WithFleetMax bounds the sessions of all processes that name the same account,
// for upstreams that cap what one account may have open. Slots are counted in
// Redis 6.2 or later, on any client of go-redis; rdb stays the caller's to close.
// A slot is a lease that is renewed while its session lives: that of a process that
// died is free after [WithSlotTTL]. A process that was cut off from Redis
// for longer keeps its sessions, and for as long as they live there can be more
// than n. All processes should give the same n and the same [WithSlotTTL]. [WithMax]
// holds as well.
//
// Accounts are hashed into the names of keys, sl:{hash}:s. The rights it takes are
// EVAL, EVALSHA, PEXPIRE, PTTL, TIME, ZADD, ZCARD, ZREM, ZREMRANGEBYSCORE and ZSCORE.
// Default: none.
func WithFleetMax(rdb redis.UniversalClient, account string, n int) Option {
	return func(c *config) {
		c.rdb, c.account, c.fleetMax = rdb, account, n
		c.check(!isNil(rdb), "WithFleetMax: the Redis client is nil")
		c.check(strings.TrimSpace(account) != "" && len(account) <= maxName, "WithFleetMax: the account is blank or over %d bytes", maxName)
		c.check(n >= 1, "WithFleetMax: %d, not at least 1", n)
	}
}

// WithSlotTTL is how long a slot in the fleet outlives the last renewal, which
// comes every third of it. At least three times the op timeout. For [WithFleetMax] only.
// Default: 30 s.
func WithSlotTTL(d time.Duration) Option { return func(c *config) { c.slotTTL = d } }

// WithOpTimeout bounds each call of Redis, whatever the client's own timeouts.
// Default: 1 s.
func WithOpTimeout(d time.Duration) Option { return func(c *config) { c.opTimeout = d } }

// WithNamespace keeps the slots of fleets apart that share a Redis and an
// account's name: staging and production. Default: "".
func WithNamespace(env string) Option {
	return func(c *config) {
		c.namespace = env
		c.check(len(env) <= maxName, "WithNamespace is over %d bytes", maxName)
	}
}

// WithKeySecret keys the hash under which Redis and logs know accounts and
// sessions: at least 16 bytes, the same in the whole fleet. Default: a fixed one,
// with which a guessed name can be confirmed.
func WithKeySecret(secret []byte) Option {
	return func(c *config) {
		c.keySecret = append([]byte{}, secret...)
		c.check(len(secret) >= 16, "WithKeySecret has under 16 bytes")
	}
}

// WithLease is how long a session lives on after its last use: a call's begin and
// end, an attach and a detach. While somebody is attached it does not end, nor
// during a call that is within its timeout. Default: 30 min.
func WithLease(d time.Duration) Option { return func(c *config) { c.lease = d } }

// WithGrace is the lease of a session whose last listener has left, or whose
// worker is broken, where it is shorter than [WithLease]: a client that lost its
// connection can come back for as long, and one that asks what became of its
// session finds it. Who comes back, with an attach or a call, has the whole lease
// again. 0 turns it off: who leaves keeps the whole lease, and what is broken goes at
// the next sweep.
// Default: 30 s.
func WithGrace(d time.Duration) Option { return func(c *config) { c.grace = d } }

// WithSweepInterval is how often [Manager.Run] sweeps, and so by how much a
// session can outlive its lease. It is of no use then any more, but keeps its slot.
// Default: 30 s.
func WithSweepInterval(d time.Duration) Option { return func(c *config) { c.sweep = d } }

// WithPending bounds the calls under way in one session; those over it are refused
// at once and not queued. Default: 128.
func WithPending(n int) Option { return func(c *config) { c.pending = n } }

// WithListeners bounds who is attached to one session at a time: 1 where a stream
// has one reader. Default: 8.
func WithListeners(n int) Option { return func(c *config) { c.listeners = n } }

// WithCallTimeout ends the context of a call. [Spec] can set another. Default: 30 s.
func WithCallTimeout(d time.Duration) Option { return func(c *config) { c.call = d } }

// WithStartTimeout ends the context of a start. Default: 30 s.
func WithStartTimeout(d time.Duration) Option { return func(c *config) { c.start = d } }

// WithShutdownTimeout is what [Worker.Shutdown] is given; after it the worker is
// killed. Default: 10 s.
func WithShutdownTimeout(d time.Duration) Option { return func(c *config) { c.shutdown = d } }

// WithKillTimeout is how long [Worker.Kill] is waited for. Default: 5 s.
func WithKillTimeout(d time.Duration) Option { return func(c *config) { c.kill = d } }

// WithParallel bounds how many sessions sweeps and a shutdown close at a time, so
// that the upstream is not met by all of them at once. Default: 64.
func WithParallel(n int) Option { return func(c *config) { c.parallel = n } }

// WithObserver reports what becomes of sessions. Default: none.
func WithObserver(o Observer) Option {
	return func(c *config) {
		c.observer = o
		c.check(!isNil(o), "WithObserver is nil")
	}
}

// WithLogger logs what becomes of sessions. Default: no log.
func WithLogger(l *slog.Logger) Option {
	return func(c *config) {
		c.logger = l
		c.check(l != nil, "WithLogger is nil")
	}
}

const (
	maxID    = 256 // bytes of an id, an owner, a reason
	maxLabel = 64  // of a session's name
	maxName  = 1024
)

func (c *config) check(ok bool, format string, args ...any) {
	if !ok {
		c.problems = append(c.problems, invalid(format, args...))
	}
}

// configure applies opts to the defaults and reports all that is wrong, as one
// error that matches ErrInvalid.
func configure(opts []Option) (config, error) {
	c := defaults()
	for _, opt := range opts {
		if opt == nil {
			c.check(false, "an Option is nil")
			continue
		}
		opt(&c)
	}
	c.validate()
	return c, errors.Join(c.problems...)
}

func (c *config) validate() {
	for _, n := range []struct {
		option string
		n      int
	}{
		{"WithMax", c.max}, {"WithPending", c.pending}, {"WithListeners", c.listeners}, {"WithParallel", c.parallel},
	} {
		c.check(n.n >= 1, "%s is %d, not greater than zero", n.option, n.n)
	}
	c.check(c.parallel <= maxParallel, "WithParallel is %d, over %d", c.parallel, maxParallel)
	for _, d := range []struct {
		option string
		d      time.Duration
	}{
		{"WithLease", c.lease},
		{"WithSweepInterval", c.sweep},
		{"WithCallTimeout", c.call},
		{"WithStartTimeout", c.start},
		{"WithShutdownTimeout", c.shutdown},
		{"WithKillTimeout", c.kill},
		{"WithSlotTTL", c.slotTTL},
		{"WithOpTimeout", c.opTimeout},
	} {
		c.check(inRange(d.d), "%s is %v, not between 1ms and 24h", d.option, d.d)
	}
	c.check(c.grace == 0 || inRange(c.grace), "WithGrace is %v, not between 1ms and 24h, nor 0", c.grace)
	if len(c.problems) == 0 {
		c.check(c.slotTTL >= 3*c.opTimeout, "WithSlotTTL of %v is less than three times the op timeout of %v", c.slotTTL, c.opTimeout)
	}
}

const maxParallel = 10_000

func inRange(d time.Duration) bool { return d >= time.Millisecond && d <= 24*time.Hour }

// isNil sees through an interface that holds a nil pointer or func.
func isNil(v any) bool {
	if v == nil {
		return true
	}
	switch r := reflect.ValueOf(v); r.Kind() { //nolint:exhaustive // the rest cannot be nil
	case reflect.Pointer, reflect.Func, reflect.Map, reflect.Chan, reflect.Slice, reflect.Interface:
		return r.IsNil()
	}
	return false
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrInvalid}, args...)...)
}

func checkContext(ctx context.Context) error {
	if ctx == nil {
		return invalid("context is nil")
	}
	return nil
}

func checkReason(reason string) error {
	if strings.TrimSpace(reason) == "" || len(reason) > maxID {
		return invalid("reason is blank or over %d bytes", maxID)
	}
	return nil
}

// check refuses what cannot be opened, and fills in the defaults.
func (s *Spec) check(c *config) error {
	var wrong []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			wrong = append(wrong, invalid(format, args...))
		}
	}
	check(s.ID == "" || strings.TrimSpace(s.ID) != "", "id is blank")
	check(len(s.ID) <= maxID, "id is over %d bytes", maxID)
	check(len(s.Owner) <= maxID, "owner is over %d bytes", maxID)
	check(len(s.Name) <= maxLabel, "name is over %d bytes", maxLabel)
	check(!strings.ContainsFunc(s.Name, func(r rune) bool { return !unicode.IsPrint(r) }), "name is not printable")
	check(s.Timeout <= 24*time.Hour, "timeout is over 24h")
	check(s.Timeout <= 0 || s.Timeout >= time.Millisecond, "timeout is under 1ms")
	if s.Timeout <= 0 {
		s.Timeout = c.call
	}
	if s.Name = strings.TrimSpace(s.Name); s.Name == "" {
		s.Name = "client"
	}
	return errors.Join(wrong...)
}
