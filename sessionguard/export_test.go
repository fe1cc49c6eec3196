package sessionguard

import "github.com/redis/go-redis/v9"

// NewRedisStore is the store of New, for tests that put faults around it.
func NewRedisStore(rdb redis.UniversalClient) interface {
	Store
	Watcher
} {
	return newRedisStore(rdb, false)
}
