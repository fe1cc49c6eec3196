// Package rediserr says what an error of go-redis means.
package rediserr

import (
	"context"
	"errors"

	"github.com/redis/go-redis/v9"
)

// Answered reports whether err is the answer of a server that works: only this
// request was refused, for want of a right or because of a value's type.
func Answered(err error) bool {
	var server redis.Error
	return errors.As(err, &server) && !redis.IsLoadingError(err) && !redis.IsReadOnlyError(err) &&
		!redis.IsClusterDownError(err) && !redis.IsMasterDownError(err) && !redis.IsTryAgainError(err) && !redis.IsMaxClientsError(err)
}

// Seen tells rdb of err. A node of a Cluster that cannot be reached may have been
// replaced. go-redis asks who owns its slots once a minute, unless told to look
// now: with that, writes go on 3 s after a master was killed rather than 60.
func Seen(ctx context.Context, rdb redis.UniversalClient, err error) {
	if cluster, ok := rdb.(*redis.ClusterClient); ok && err != nil && !Answered(err) {
		cluster.ReloadState(ctx)
	}
}
