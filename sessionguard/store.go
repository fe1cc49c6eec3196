package sessionguard

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/sessionlock/sessionlock/internal/epoch"
	"github.com/sessionlock/sessionlock/internal/hub"
	"github.com/sessionlock/sessionlock/internal/lua"
	"github.com/sessionlock/sessionlock/internal/rediserr"
)

// Registration is who registered last for a session; the zero one is nobody.
type Registration struct {
	Epoch uint64
	Token string // of the request: printable ASCII, never used twice
}

// String is how the Redis store keeps it.
func (r Registration) String() string { return strconv.FormatUint(r.Epoch, 10) + " " + r.Token }

// parseRegistration reads one; what is none of ours is nobody.
func parseRegistration(s string) Registration {
	number, token, _ := strings.Cut(s, " ")
	n, err := strconv.ParseUint(number, 10, 64)
	if r := (Registration{n, token}); err == nil && n <= epoch.Max && r.String() == s {
		return r
	}
	return Registration{}
}

// Store keeps the registrations of a fleet. guardtest.StoreTest shows whether an
// implementation is right. A store that can only get, set and delete will not do:
// of two requests that register at once both would be given one epoch, or the
// older one would be stored last.
//
// Names of sessions are printable ASCII of at most 64 bytes. A Store must be safe for
// concurrent use, must not panic, and should end with its context, though the monitor
// does not rely on that. Its optional face is [Watcher].
type Store interface {
	// Register makes token the last one of session, for ttl, and returns its epoch:
	// greater than floor and than every epoch it has returned for the session before,
	// also before it lost its data (start from the time), and at most 2⁵³ − 1. A repeated
	// call with the token that is stored returns that one's epoch.
	Register(ctx context.Context, session, token string, floor uint64, ttl time.Duration) (uint64, error)

	// Current returns who registered last, as of now: not as of a replica. Nobody, or
	// one whose ttl is over, is the zero Registration; an outage is an error.
	Current(ctx context.Context, session string) (Registration, error)

	// Renew is Current, and has what it returns live for ttl from now on.
	Renew(ctx context.Context, session string, ttl time.Duration) (Registration, error)
}

// Watcher is an optional face of a [Store]: a hint that somebody has registered for a
// session. It may come late, twice, or never; without it a request learns that it was
// superseded when its registration is renewed, or when it commits. Watch and stop must
// return at once, whatever the state of the store. After stop has returned changed is not
// called, except for a call already under way.
type Watcher interface {
	Watch(session string, changed func()) (stop func())
}

// MemoryStore is a [Store] and [Watcher] in this process. The zero value is ready.
// Monitors that share one stand for a fleet in tests; in production it guards against
// requests of this process only. Safe for concurrent use; what has expired is dropped
// as others register.
type MemoryStore struct {
	mu      sync.Mutex
	last    map[string]memory
	high    uint64 // epochs of sessions that were forgotten are no greater
	watched hub.Local
	sweepAt int
}

type memory struct {
	Registration
	expires time.Time
}

// Register implements [Store]. Its error is nil.
func (m *MemoryStore) Register(_ context.Context, session, token string, floor uint64, ttl time.Duration) (uint64, error) {
	m.mu.Lock()
	now := time.Now()
	last := m.current(session)
	if last.Token != token {
		last = Registration{epoch.Next(max(last.Epoch, m.high), floor, uint64(now.UnixMicro())), token}
		m.high = last.Epoch
	}
	m.sweep(now)
	if m.last == nil {
		m.last = map[string]memory{}
	}
	m.last[session] = memory{last, now.Add(ttl)}
	m.mu.Unlock()
	m.watched.Wake(session)
	return last.Epoch, nil
}

// current returns who registered last and is not forgotten; m.mu is held.
func (m *MemoryStore) current(session string) Registration {
	if r, ok := m.last[session]; ok && time.Now().Before(r.expires) {
		return r.Registration
	}
	return Registration{}
}

// sweep drops what has expired whenever the number of sessions has doubled.
func (m *MemoryStore) sweep(now time.Time) {
	if len(m.last) < max(m.sweepAt, 64) {
		return
	}
	for session, r := range m.last {
		if !now.Before(r.expires) {
			delete(m.last, session)
		}
	}
	m.sweepAt = 2 * len(m.last)
}

// Current implements [Store]. Its error is nil.
func (m *MemoryStore) Current(_ context.Context, session string) (Registration, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.current(session), nil
}

// Renew implements [Store]. Its error is nil.
func (m *MemoryStore) Renew(_ context.Context, session string, ttl time.Duration) (Registration, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	r := m.current(session)
	if r != (Registration{}) {
		m.last[session] = memory{r, time.Now().Add(ttl)}
	}
	return r, nil
}

// Watch implements [Watcher].
func (m *MemoryStore) Watch(session string, changed func()) (stop func()) {
	return m.watched.Watch(session, changed)
}

// redisStore keeps each registration in a string, by the script register.lua.
type redisStore struct {
	rdb    redis.UniversalClient
	hub    *hub.Hub
	events bool // keyspace events, not messages of our own

	probing sync.Mutex
	works   bool      // keyspace events were seen
	silent  time.Time // until when they are known to be missing
}

func newRedisStore(rdb redis.UniversalClient, events bool) *redisStore {
	return &redisStore{rdb: rdb, hub: hub.New(rdb), events: events}
}

func (s *redisStore) Register(ctx context.Context, session, token string, floor uint64, ttl time.Duration) (uint64, error) {
	channel := session
	if s.events {
		if err := s.probe(ctx, session+":probe"); err != nil {
			return 0, err
		}
		channel = ""
	}
	text, err := lua.Register.Run(ctx, s.rdb, []string{session}, token, floor, ttl.Milliseconds(), channel).Text()
	rediserr.Seen(ctx, s.rdb, err)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(text, 10, 64)
}

// Current reads by GETEX, which no replica answers.
func (s *redisStore) Current(ctx context.Context, session string) (Registration, error) {
	return s.read(ctx, "GETEX", session)
}

func (s *redisStore) Renew(ctx context.Context, session string, ttl time.Duration) (Registration, error) {
	return s.read(ctx, "GETEX", session, "PX", ttl.Milliseconds())
}

func (s *redisStore) read(ctx context.Context, args ...any) (Registration, error) {
	text, err := s.rdb.Do(ctx, args...).Text()
	if errors.Is(err, redis.Nil) {
		return Registration{}, nil
	}
	rediserr.Seen(ctx, s.rdb, err)
	if err != nil {
		return Registration{}, err
	}
	return parseRegistration(text), nil
}

// Watch gives no hints on a Ring, which has no subscription that spans its shards.
func (s *redisStore) Watch(session string, changed func()) (stop func()) {
	if _, ring := s.rdb.(*redis.Ring); ring {
		return func() {}
	}
	if s.events {
		session = s.keyspace(session)
	}
	return s.hub.Watch(session, changed)
}

// keyspace is the channel of the events of key.
func (s *redisStore) keyspace(key string) string {
	db := 0
	if c, ok := s.rdb.(*redis.Client); ok {
		db = c.Options().DB
	}
	return fmt.Sprintf("__keyspace@%d__:%s", db, key)
}

// probePause is how long a server that sends no events is not asked again.
const probePause = 5 * time.Second

// probe finds out by a write to key whether the server sends keyspace events. Its
// configuration may not be read everywhere, and need not be this user's.
func (s *redisStore) probe(ctx context.Context, key string) error {
	s.probing.Lock()
	defer s.probing.Unlock()
	silent := errors.New("the server sends no keyspace events: set notify-keyspace-events to K$ at least, or leave WithKeyspaceEvents out")
	switch {
	case s.works:
		return nil
	case time.Now().Before(s.silent):
		return silent
	}
	sub := s.rdb.Subscribe(ctx, s.keyspace(key))
	defer sub.Close()
	if _, err := sub.Receive(ctx); err != nil {
		return err
	}
	if err := s.rdb.Set(ctx, key, 1, time.Second).Err(); err != nil {
		return err
	}
	wait := probeWait
	if end, ok := ctx.Deadline(); ok {
		wait = min(wait, time.Until(end)/2) // or the caller is told that there was no answer
	}
	if _, err := sub.ReceiveTimeout(ctx, wait); err != nil {
		var late net.Error // else the connection is lost, which says nothing
		if errors.As(err, &late) && late.Timeout() && ctx.Err() == nil {
			s.silent = time.Now().Add(probePause)
			err = silent
		}
		return err
	}
	s.works = true
	return nil
}

// probeWait is how long an event may take at most.
const probeWait = 300 * time.Millisecond
