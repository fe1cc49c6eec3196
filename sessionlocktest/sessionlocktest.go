// Package sessionlocktest helps to test code that uses sessionlock, and code
// that extends it.
//
// Code that uses it: [Client] is a real client in memory, [Static] an
// authenticator that always succeeds, and [Upstream] a server that wants
// sessions, can be made to misbehave, and keeps a ledger of what it has seen.
//
// Code that extends it: [CacheTest] and [LockerTest] show whether an
// implementation of [sessionlock.Cache] or [sessionlock.Locker] keeps the
// promises that a client relies on. Each failure names the rule it breaks.
package sessionlocktest

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/sessionlock/sessionlock"
)

// closeTimeout bounds what a test waits for at its end.
const closeTimeout = 5 * time.Second

// Client returns a client that shares sessions within this test only. It is the
// real one, algorithm and defaults included; without [sessionlock.WithRedis] and
// [sessionlock.WithCache] its store is in memory. The client is closed with t, which fails if a login is
// still running five seconds later.
func Client(t testing.TB, auth sessionlock.Authenticator, opts ...sessionlock.Option) *sessionlock.Client {
	t.Helper()
	name := "sessionlocktest"
	if u, ok := auth.(*Upstream); ok {
		name = u.URL // so that a Transport knows where tokens may go
	}
	c, err := sessionlock.New(name, auth, opts...)
	if errors.Is(err, sessionlock.ErrInvalid) {
		opts = append([]sessionlock.Option{sessionlock.WithCache(new(sessionlock.MemoryCache))}, opts...)
		c, err = sessionlock.New(name, auth, opts...)
	}
	if err != nil {
		t.Fatalf("sessionlocktest: new client: %v", err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), closeTimeout)
		defer cancel()
		if err := c.Close(ctx); err != nil {
			t.Errorf("sessionlocktest: close client: %v", err)
		}
	})
	return c
}

// Static returns an authenticator whose nth login of key yields the token
// "token-<key>-<n>", valid for an hour. Each Static counts for itself.
func Static() sessionlock.Authenticator {
	var mu sync.Mutex
	logins := map[string]int{}
	return sessionlock.AuthenticatorFunc(func(_ context.Context, key string) (sessionlock.Session, error) {
		mu.Lock()
		defer mu.Unlock()
		logins[key]++
		return sessionlock.Session{
			Token:  sessionlock.NewToken(fmt.Sprintf("token-%s-%d", key, logins[key])),
			Expiry: time.Now().Add(time.Hour),
		}, nil
	})
}
