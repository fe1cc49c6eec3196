package sessionguard

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"reflect"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

// Option configures a [Monitor].
type Option func(*config)

type config struct {
	store     Store
	namespace string
	keySecret []byte
	ttl       time.Duration
	opTimeout time.Duration
	events    bool
	conflict  http.Handler
	problems  []error
}

// WithNamespace keeps the sessions of env apart: the same id in two namespaces is two
// sessions. Default: "".
func WithNamespace(env string) Option { return func(c *config) { c.namespace = env } }

// WithKeySecret keys the hash by which sessions are known in Redis and in errors: at
// least 16 bytes, the same in the whole fleet. Default: a fixed one, so that whoever
// reads names can find ids of a dictionary.
func WithKeySecret(secret []byte) Option {
	return func(c *config) {
		if c.keySecret = append([]byte{}, secret...); len(secret) < minSecret {
			c.problem("WithKeySecret: fewer than %d bytes", minSecret)
		}
	}
}

// WithTTL is how long a registration outlives the last renewal, which comes every third
// of it: from 100 ms to 24 h, and at least three times the op timeout. A process that
// stood still for longer has lost its guards. Default: 30 s.
func WithTTL(d time.Duration) Option { return func(c *config) { c.ttl = d } }

// WithOpTimeout bounds each call of the store, whatever the client's own timeouts: from
// 1 ms to 1 h. Default: 1 s.
func WithOpTimeout(d time.Duration) Option { return func(c *config) { c.opTimeout = d } }

// WithKeyspaceEvents has Redis tell of registrations by keyspace notifications rather
// than by messages of our own: for servers where this user may not publish. They must be
// on: notify-keyspace-events with K and $ at least. The first Register finds out by a
// write whether they come, and fails while they do not. Never with a Cluster or Ring,
// whose nodes keep such events to themselves. Default: messages of our own.
func WithKeyspaceEvents() Option { return func(c *config) { c.events = true } }

// WithStore keeps registrations elsewhere: New's client is nil then. Default: in Redis.
func WithStore(s Store) Option {
	return func(c *config) {
		if c.store = s; isNil(s) {
			c.problem("WithStore: store is nil")
		}
	}
}

// WithConflict answers, in [Monitor.Middleware], a request that was superseded and whose
// handler did not answer it. Default: 409 Conflict.
func WithConflict(h http.Handler) Option {
	return func(c *config) {
		if c.conflict = h; isNil(h) {
			c.problem("WithConflict: handler is nil")
		}
	}
}

const (
	minSecret  = 16
	maxSession = 1024
)

func (c *config) problem(format string, args ...any) {
	c.problems = append(c.problems, fmt.Errorf("%w: "+format, append([]any{ErrInvalid}, args...)...))
}

func configure(rdb redis.UniversalClient, opts []Option) (config, error) {
	c := config{
		ttl: 30 * time.Second, opTimeout: time.Second,
		conflict: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, "superseded by a newer request", http.StatusConflict)
		}),
	}
	for _, o := range opts {
		if o == nil {
			c.problem("an option is nil")
			continue
		}
		o(&c)
	}
	c.validate(rdb)
	return c, errors.Join(c.problems...)
}

func (c *config) validate(rdb redis.UniversalClient) {
	_, single := rdb.(*redis.Client)
	switch {
	case isNil(rdb) && c.store == nil:
		c.problem("no store: New wants a Redis client, or WithStore")
	case !isNil(rdb) && c.store != nil:
		c.problem("two stores: New's Redis client must be nil with WithStore")
	case c.events && !single:
		c.problem("WithKeyspaceEvents: only with one Redis server, not with a Cluster, a Ring or another store")
	}
	if c.ttl < 100*time.Millisecond || c.ttl > 24*time.Hour {
		c.problem("WithTTL: %v is not within 100ms and 24h", c.ttl)
	}
	if c.opTimeout < time.Millisecond || c.opTimeout > time.Hour {
		c.problem("WithOpTimeout: %v is not within 1ms and 1h", c.opTimeout)
	}
	if len(c.problems) == 0 && c.ttl < 3*c.opTimeout {
		c.problem("WithTTL: %v is less than three times the op timeout of %v", c.ttl, c.opTimeout)
	}
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

func checkContext(ctx context.Context) error {
	if ctx == nil {
		return fmt.Errorf("%w: context is nil", ErrInvalid)
	}
	return nil
}

func checkSession(session string) error {
	if strings.TrimSpace(session) == "" {
		return fmt.Errorf("%w: session is blank", ErrInvalid)
	}
	if len(session) > maxSession {
		return fmt.Errorf("%w: session has %d bytes, more than %d", ErrInvalid, len(session), maxSession)
	}
	return nil
}
