package sessionlock

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/sessionlock/sessionlock/internal/entry"
	"github.com/sessionlock/sessionlock/internal/hub"
	"github.com/sessionlock/sessionlock/internal/lua"
	"github.com/sessionlock/sessionlock/internal/rediserr"
)

// Cache is the store behind a [Client]: any that can compare. SQL does it by
// WHERE, memcached by cas, etcd and DynamoDB natively;
// sessionlocktest.CacheTest shows whether an implementation is right. Values
// are opaque, between 1 byte and 33 KiB, and two values of one key are never
// equal, so comparing whole values is exact. Callers own the slices they pass
// and get: copy them. Keys are printable ASCII of at most 128 bytes. It must be
// safe for concurrent use and should end with its context, though the client
// does not rely on that.
//
// Optional faces, looked for once by New: [Watcher] and [Clock]. A decorator
// that hides them costs speed, never correctness.
type Cache interface {
	// Load returns the value of key. A missing or expired one is nil, nil; err
	// is for failures of the store itself: an outage reported as absent would
	// log the whole fleet in again.
	Load(ctx context.Context, key string) ([]byte, error)

	// CompareAndSwap stores next for ttl if old is what is stored; a nil old
	// means that nothing is. It returns what is stored afterwards: next when it
	// was swapped, also by an earlier copy of the same request; otherwise the
	// value that was in the way, nil when there is none. Nothing changes unless
	// next is returned. ttl is at least a millisecond; a store may round it up.
	CompareAndSwap(ctx context.Context, key string, old, next []byte, ttl time.Duration) (now []byte, err error)
}

// Watcher is an optional face of a [Cache]: a hint that the value of a key has
// changed. It may come late, twice, or never: a hint only makes things earlier
// that polling finds as well. changed must not block; it is not called after
// stop has returned, except for a call already under way.
type Watcher interface {
	Watch(key string, changed func()) (stop func())
}

// Clock is an optional face of a [Cache]: the store's time. It is read at the
// first attempt, every five minutes, and when the process's own clocks part;
// between readings its offset is kept. Without it the process's clock is used,
// and clocks of a fleet must agree to within the expiry margin.
type Clock interface {
	Now(ctx context.Context) (time.Time, error)
}

// redisCache keeps each value in a Redis string. It has all three faces.
type redisCache struct {
	rdb redis.UniversalClient
	hub *hub.Hub
}

// canPush: a Ring has no subscription that spans its shards.
func canPush(rdb redis.UniversalClient) bool {
	_, ring := rdb.(*redis.Ring)
	return !ring
}

func newRedisCache(rdb redis.UniversalClient) *redisCache {
	return &redisCache{rdb: rdb, hub: hub.New(rdb)}
}

// Load reads with GETRANGE rather than GET: the same cost, and of a value that
// no client wrote at most one byte more than the limit travels.
func (r *redisCache) Load(ctx context.Context, key string) ([]byte, error) {
	v, err := r.rdb.GetRange(ctx, key, 0, entry.MaxSize).Bytes()
	if err != nil {
		return nil, redisError(ctx, r.rdb, "read", err)
	}
	if len(v) == 0 {
		return nil, nil
	}
	return v, nil
}

func (r *redisCache) CompareAndSwap(ctx context.Context, key string, old, next []byte, ttl time.Duration) ([]byte, error) {
	return r.swap(ctx, key, key, old, next, ttl)
}

func (r *redisCache) swapQuietly(ctx context.Context, key string, old, next []byte, ttl time.Duration) ([]byte, error) {
	return r.swap(ctx, key, "", old, next, ttl)
}

func (r *redisCache) swap(ctx context.Context, key, channel string, old, next []byte, ttl time.Duration) ([]byte, error) {
	res, err := lua.Swap.Run(ctx, r.rdb, []string{key}, old, next, ttl.Milliseconds(), channel, entry.MaxSize).Result()
	if err != nil {
		return nil, redisError(ctx, r.rdb, "swap", err)
	}
	switch now := res.(type) {
	case int64:
		return next, nil
	case string:
		if now == "" {
			return nil, nil
		}
		return []byte(now), nil
	}
	return nil, fmt.Errorf("swap: unexpected reply of type %T", res)
}

func (r *redisCache) Watch(key string, changed func()) func() { return r.hub.Watch(key, changed) }

func (r *redisCache) Now(ctx context.Context) (time.Time, error) {
	t, err := r.rdb.Time(ctx).Result()
	if err != nil {
		return time.Time{}, redisError(ctx, r.rdb, "clock", err)
	}
	return t, nil
}

// redisError names what failed. It prints what the server or the network said,
// but not what the client library makes of a reply it cannot parse: that quotes
// the reply.
func redisError(ctx context.Context, rdb redis.UniversalClient, op string, err error) error {
	var (
		server  redis.Error
		network net.Error
	)
	told := &toldError{text: fmt.Sprintf("%s: failed (%T)", op, err), err: err, answered: rediserr.Answered(err)}
	if errors.As(err, &server) || errors.As(err, &network) || errors.Is(err, redis.ErrClosed) || errors.Is(err, io.EOF) {
		told.text = op + ": " + err.Error()
	}
	rediserr.Seen(ctx, rdb, err)
	return told
}

// checkRedis looks at how every primary behind rdb is set up, as far as its user
// may: INFO is no right that a client needs.
func checkRedis(ctx context.Context, timeout time.Duration, rdb redis.UniversalClient) (found []error) {
	var mu sync.Mutex
	look := func(ctx context.Context, node *redis.Client) error {
		info, err := node.InfoMap(ctx).Result() // several sections at once would want Redis 7
		mu.Lock()
		defer mu.Unlock()
		var server redis.Error
		switch addr := node.Options().Addr; {
		case err == nil:
			found = append(found, checkInfo(addr, info)...)
		case !errors.As(err, &server): // else INFO is not granted
			found = append(found, &CheckError{Subject: "redis", Finding: addr + " does not answer", Advice: "see to that node: keys of other nodes are served meanwhile", Err: redisError(ctx, node, "info", err)})
		}
		return nil
	}
	if !canPush(rdb) {
		found = append(found, &CheckError{Subject: "push", Finding: "a Ring does not push", Advice: "use a Cluster or one server where waiting by polls is too slow"})
	}
	_, _ = within(ctx, timeout, func(ctx context.Context) (struct{}, error) {
		switch rdb := rdb.(type) {
		case *redis.Client:
			_ = look(ctx, rdb)
		case *redis.ClusterClient:
			_ = rdb.ForEachMaster(ctx, look)
		case *redis.Ring:
			_ = rdb.ForEachShard(ctx, look)
		}
		return struct{}{}, nil
	}, nil)
	mu.Lock()
	defer mu.Unlock()
	return slices.Clone(found)
}

func checkInfo(node string, info map[string]map[string]string) (found []error) {
	finds := func(finding, advice string, args ...any) {
		found = append(found, &CheckError{Subject: "redis", Finding: node + " " + fmt.Sprintf(finding, args...), Advice: advice})
	}
	var major, minor int
	version := info["Server"]["redis_version"]
	if n, _ := fmt.Sscanf(version, "%d.%d", &major, &minor); n == 2 && (major < 6 || (major == 6 && minor < 2)) {
		finds("is version %s", "use 6.2 or later", version)
	}
	if m := info["Memory"]; m["maxmemory"] != "0" && m["maxmemory_policy"] != "" && m["maxmemory_policy"] != "noeviction" {
		finds("evicts by %s", "set maxmemory-policy noeviction, or use an instance of its own: an evicted lock or entry costs a login, and an entry takes counted failures with it", m["maxmemory_policy"])
	}
	if info["Persistence"]["aof_enabled"] == "0" {
		finds("keeps no append-only file", "set appendonly yes, or accept that after a crash every key logs in once more and failed logins are counted from zero")
	}
	return found
}

// MemoryCache is a [Cache] and [Watcher] in this process. The zero value is
// ready. Two clients that share one stand for a fleet in tests; in production
// it says aloud that sessions are shared by this process only. Safe for
// concurrent use; expired values are dropped as others are written.
type MemoryCache struct {
	mu      sync.Mutex
	values  map[string]memoryValue
	watched hub.Local
	sweepAt int // number of values at which the next sweep is due
}

type memoryValue struct {
	value   string
	expires time.Time
}

// Load implements [Cache]. Its error is nil.
func (m *MemoryCache) Load(_ context.Context, key string) ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.live(key), nil
}

// live returns a copy of what is stored under key and not expired, else nil.
func (m *MemoryCache) live(key string) []byte {
	v, ok := m.values[key]
	if !ok || !time.Now().Before(v.expires) {
		return nil
	}
	return []byte(v.value)
}

// CompareAndSwap implements [Cache]. Its error is nil.
func (m *MemoryCache) CompareAndSwap(_ context.Context, key string, old, next []byte, ttl time.Duration) ([]byte, error) {
	m.mu.Lock()
	now := m.live(key)
	if string(now) != string(old) {
		m.mu.Unlock()
		return now, nil
	}
	if m.values == nil {
		m.values = map[string]memoryValue{}
	}
	m.values[key] = memoryValue{string(next), time.Now().Add(ttl)}
	m.sweep()
	m.mu.Unlock()
	m.watched.Wake(key)
	return next, nil
}

// sweep drops what has expired whenever the number of values has doubled, so
// each write pays for a constant share of it.
func (m *MemoryCache) sweep() {
	if len(m.values) < max(m.sweepAt, 64) {
		return
	}
	for k, v := range m.values {
		if !time.Now().Before(v.expires) {
			delete(m.values, k)
		}
	}
	m.sweepAt = 2 * len(m.values)
}

// Watch implements [Watcher].
func (m *MemoryCache) Watch(key string, changed func()) (stop func()) {
	return m.watched.Watch(key, changed)
}
