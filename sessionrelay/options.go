package sessionrelay

import (
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

// RedisOption configures [NewRedisStore].
type RedisOption func(*redisConfig)

type redisConfig struct {
	namespace string
	keySecret []byte
	opTimeout time.Duration
	replicas  int
	problems  problems
}

// problems collects what is wrong with the arguments.
type problems []error

func (p *problems) add(format string, args ...any) {
	*p = append(*p, fmt.Errorf("%w: "+format, append([]any{ErrInvalid}, args...)...))
}

// WithNamespace keeps the sessions of env apart. Default: "".
func WithNamespace(env string) RedisOption { return func(c *redisConfig) { c.namespace = env } }

// WithKeySecret keys the hash by which sessions, users and nodes are known in the names
// of Redis: at least 16 bytes, the same in the whole fleet. The values of indexes hold
// the ids themselves. Default: a fixed one.
func WithKeySecret(secret []byte) RedisOption {
	return func(c *redisConfig) {
		if c.keySecret = append([]byte{}, secret...); len(secret) < minSecret {
			c.problems.add("WithKeySecret: fewer than %d bytes", minSecret)
		}
	}
}

// WithOpTimeout bounds each call of Redis, whatever the client's own timeouts: from
// 1 ms to 1 h. Default: 1 s.
func WithOpTimeout(d time.Duration) RedisOption { return func(c *redisConfig) { c.opTimeout = d } }

// WithReplicas has what must not be lost (a home, a message, an outcome) acknowledged by
// n replicas before it counts as stored, by WAIT; it costs their round trip. One that is
// not acknowledged in time is ErrUnavailable, and may be stored all the same. It narrows
// what a failover can lose, and does not close it: Redis may promote a replica that
// has not got it. With one server or a Cluster. Default: 0.
func WithReplicas(n int) RedisOption { return func(c *redisConfig) { c.replicas = n } }

const (
	minSecret  = 16
	maxID      = 256
	maxPayload = 1 << 20
)

func configureRedis(rdb redis.UniversalClient, node string, opts []RedisOption) (redisConfig, error) {
	c := redisConfig{opTimeout: time.Second}
	if isNil(rdb) {
		c.problems.add("Redis client is nil")
	}
	if strings.TrimSpace(node) == "" || len(node) > maxID {
		c.problems.add("node: a name of 1 to %d bytes is required", maxID)
	}
	for _, o := range opts {
		if o == nil {
			c.problems.add("an option is nil")
			continue
		}
		o(&c)
	}
	if c.opTimeout < time.Millisecond || c.opTimeout > time.Hour {
		c.problems.add("WithOpTimeout: %v is not within 1ms and 1h", c.opTimeout)
	}
	if c.replicas < 0 {
		c.problems.add("WithReplicas: %d is negative", c.replicas)
	}
	if _, ring := rdb.(*redis.Ring); ring && c.replicas > 0 {
		c.problems.add("WithReplicas: not with a Ring")
	}
	return c, errors.Join(c.problems...)
}

// Option configures a [Node]. Durations are 1 ms to a year.
type Option func(*config)

type config struct {
	name     string // of the node
	limit    int
	timeout  time.Duration
	alive    time.Duration
	expire   time.Duration
	scavenge time.Duration
	batch    int
	attempts int
	pause    time.Duration
	patience time.Duration
	observer func(Event)
	logger   *slog.Logger
	problems problems
}

// WithLimit is how many sessions a user may have; coming back to one of them is always
// allowed. Default: 75.
func WithLimit(n int) Option { return func(c *config) { c.limit = n } }

// WithTimeout is how long a session lives that no node vouches for: it is disconnected,
// or its node has died. From 1 ms. Default: 3 days.
func WithTimeout(d time.Duration) Option { return func(c *config) { c.timeout = d } }

// WithIntervals are how often a node vouches for its sessions, looks for those that
// timed out, and clears what is left of others, each up to a tenth later by its own
// measure. From 1 ms, alive less than half the timeout. Default: 54 s, 5 min, 90 min.
func WithIntervals(alive, expire, scavenge time.Duration) Option {
	return func(c *config) { c.alive, c.expire, c.scavenge = alive, expire, scavenge }
}

// WithAttempts is how often a message is tried, once per connection, before it is a
// dead letter, and how long a connection's messages rest after its send func failed, or
// the store: up to sixteen times that while failures follow one another. From 1, and
// 1 ms. Default: 10, 2.5 s.
func WithAttempts(n int, pause time.Duration) Option {
	return func(c *config) { c.attempts, c.pause = n, pause }
}

// WithPatience is how long a message from a client may be processed before another
// delivery of it may be, too: because its node has died. From 1 ms. Default: 30 s.
func WithPatience(d time.Duration) Option { return func(c *config) { c.patience = d } }

// WithObserver has f told of what happens to sessions. It is called from many
// goroutines and must not block. Default: none.
func WithObserver(f func(Event)) Option {
	return func(c *config) {
		if c.observer = f; f == nil {
			c.problems.add("WithObserver: func is nil")
		}
	}
}

// WithLogger has what nobody can return logged: failures of Run's loops, panics of send
// funcs. Default: none.
func WithLogger(l *slog.Logger) Option {
	return func(c *config) {
		if c.logger = l; l == nil {
			c.problems.add("WithLogger: logger is nil")
		}
	}
}

func configure(s Store, opts []Option) (config, error) {
	c := config{
		limit: 75, timeout: 72 * time.Hour, alive: 54 * time.Second, expire: 5 * time.Minute, scavenge: 90 * time.Minute,
		batch: 20, attempts: 10, pause: 2500 * time.Millisecond, patience: 30 * time.Second,
	}
	if isNil(s) {
		c.problems.add("store is nil")
	} else if c.name = s.Node(); strings.TrimSpace(c.name) == "" {
		c.problems.add("store: its node has no name")
	}
	for _, o := range opts {
		if o == nil {
			c.problems.add("an option is nil")
			continue
		}
		o(&c)
	}
	for name, d := range map[string]time.Duration{
		"WithTimeout": c.timeout, "WithIntervals: alive": c.alive, "WithIntervals: expire": c.expire,
		"WithIntervals: scavenge": c.scavenge, "WithAttempts: pause": c.pause, "WithPatience": c.patience,
	} {
		if d < time.Millisecond || d > 365*24*time.Hour {
			c.problems.add("%s: %v is not within 1ms and a year", name, d)
		}
	}
	if c.limit < 1 {
		c.problems.add("WithLimit: %d is less than 1", c.limit)
	}
	if c.attempts < 1 {
		c.problems.add("WithAttempts: %d is less than 1", c.attempts)
	}
	if len(c.problems) == 0 && c.timeout <= 2*c.alive {
		c.problems.add("WithTimeout: %v is not more than twice the interval of %v", c.timeout, c.alive)
	}
	return c, errors.Join(c.problems...)
}

// isNil sees through an interface that holds a nil pointer or func.
func isNil(v any) bool {
	if v == nil {
		return true
	}
	switch r := reflect.ValueOf(v); r.Kind() { //nolint:exhaustive // the rest cannot be nil
	case reflect.Pointer, reflect.Func, reflect.Map:
		return r.IsNil()
	}
	return false
}
