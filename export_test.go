package sessionlock

import (
	"io"

	"github.com/redis/go-redis/v9"
)

// The backends that are reached through WithRedis and WithCache only, for the
// suites of sessionlocktest.

// NewRedisCache returns the cache of WithRedis; close it.
func NewRedisCache(rdb redis.UniversalClient) interface {
	Cache
	Watcher
	Clock
	io.Closer
} {
	return closingCache{newRedisCache(rdb)}
}

type closingCache struct{ *redisCache }

func (c closingCache) Close() error {
	c.hub.Close()
	return nil
}

// NewRedisLocker returns the locker of WithRedis.
func NewRedisLocker(rdb redis.UniversalClient) Locker { return newRedisLocker(rdb) }

// NewCacheLocker returns the locker of a client without Redis.
func NewCacheLocker(c Cache) Locker { return cacheLocker{c} }

// CheckInfo is what Check makes of a node's INFO.
var CheckInfo = checkInfo
