package main

// store.go is what to copy: a sessionlock.Cache in a table of PostgreSQL. The
// rest of the package shows it at work.

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Expiry is judged by the database's clock, and by clock_timestamp, because now
// stands still while a swap waits for another.
const (
	// Two processes may migrate at once, which CREATE … IF NOT EXISTS alone does
	// not survive. The collation C compares keys byte by byte. An UNLOGGED table
	// would be faster and forget all sessions when the server crashes.
	migrateSQL = `
SELECT pg_advisory_xact_lock(hashtext('sessionlock'));
CREATE TABLE IF NOT EXISTS sessionlock (
	key     text COLLATE "C" PRIMARY KEY,
	value   bytea NOT NULL,
	expires timestamptz NOT NULL
);
CREATE INDEX IF NOT EXISTS sessionlock_expires ON sessionlock (expires);`

	loadSQL = `SELECT value FROM sessionlock WHERE key = $1 AND expires > clock_timestamp()`

	// What was swapped is told to all who listen, when and if it is committed.
	insertSQL = `
WITH swapped AS (
	INSERT INTO sessionlock AS s (key, value, expires)
	VALUES ($1, $2, clock_timestamp() + $3::interval)
	ON CONFLICT (key) DO UPDATE SET value = excluded.value, expires = clock_timestamp() + $3::interval
		WHERE s.expires <= clock_timestamp()
	RETURNING key
) SELECT pg_notify('sessionlock', key) FROM swapped`

	updateSQL = `
WITH swapped AS (
	UPDATE sessionlock SET value = $2, expires = clock_timestamp() + $3::interval
	WHERE key = $1 AND value = $4 AND expires > clock_timestamp()
	RETURNING key
) SELECT pg_notify('sessionlock', key) FROM swapped`

	// Rows that are locked are being swapped, or swept by somebody else. The
	// array has rows chosen once, and now, unlike clock_timestamp, lets the index
	// find them: without either the limit would bound nothing.
	sweepSQL = `
DELETE FROM sessionlock WHERE key = ANY(ARRAY(
	SELECT key FROM sessionlock WHERE expires <= now()
	ORDER BY expires LIMIT $1 FOR UPDATE SKIP LOCKED
))`
)

const (
	sweepOdds  = 32  // one swap in so many sweeps
	sweepLimit = 256 // at most so many rows: more than all swaps between two sweeps can leave behind
	beat       = 3 * time.Second
)

// Store keeps sessions in the table sessionlock, on the primary and at READ
// COMMITTED, PostgreSQL's default. It is a [sessionlock.Cache], a
// [sessionlock.Watcher] and a [sessionlock.Clock], and safe for concurrent use.
// Its pool must reach the server itself for the watches: through a pooler that
// shares connections nothing is heard, and clients find changes by polling.
//
// Everybody who may read the table can use the sessions in it.
type Store struct {
	pool *pgxpool.Pool

	mu      sync.Mutex // never held during I/O or a call of a watcher
	watched map[string]map[*watcher]struct{}
	end     context.CancelFunc // ends the listener; nil: there is none yet
	ended   chan struct{}      // closed when it has
	closed  bool
}

type watcher struct {
	changed func()
	stopped atomic.Bool
}

// NewStore returns a Store on pool, without I/O. Close what uses it first, then
// the Store, then pool.
func NewStore(pool *pgxpool.Pool) *Store {
	return &Store{pool: pool, watched: map[string]map[*watcher]struct{}{}, ended: make(chan struct{})}
}

// Migrate makes the table if there is none. Any number of processes may call it
// at once.
func (s *Store) Migrate(ctx context.Context) error {
	if _, err := s.pool.Exec(ctx, migrateSQL); err != nil {
		return fmt.Errorf("postgres: migrate: %w", err)
	}
	return nil
}

// Load implements sessionlock.Cache.
func (s *Store) Load(ctx context.Context, key string) ([]byte, error) {
	v, err := value(s.pool.QueryRow(ctx, loadSQL, key))
	if err != nil {
		return nil, fmt.Errorf("postgres: load: %w", err)
	}
	return v, nil
}

// value returns nil when there is no row.
func value(row pgx.Row) (v []byte, err error) {
	if err := row.Scan(&v); err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return nil, err
	}
	return v, nil
}

// CompareAndSwap implements sessionlock.Cache, in one round trip and one
// transaction: the swap, then what is stored, which a statement sees as it is
// when that statement starts. So a swap that lost is told who won, and a repeated
// one finds its own value. Some swaps sweep as well.
func (s *Store) CompareAndSwap(ctx context.Context, key string, old, next []byte, ttl time.Duration) (now []byte, err error) {
	swapped := false
	swap := func(tag pgconn.CommandTag) error {
		swapped = tag.RowsAffected() > 0
		return nil
	}
	ttl += time.Microsecond // an interval has no nanoseconds, and must not be too short
	batch := &pgx.Batch{}
	if old == nil {
		batch.Queue(insertSQL, key, next, ttl).Exec(swap)
	} else {
		batch.Queue(updateSQL, key, next, ttl, old).Exec(swap)
	}
	batch.Queue(loadSQL, key).QueryRow(func(row pgx.Row) error {
		now, err = value(row)
		return err
	})
	if rand.N(sweepOdds) == 0 { //nolint:gosec // not a secret
		batch.Queue(sweepSQL, sweepLimit)
	}
	// Nothing is true before Close has returned: the commit comes last.
	if err := s.pool.SendBatch(ctx, batch).Close(); err != nil {
		return nil, fmt.Errorf("postgres: swap: %w", err)
	}
	if swapped { // whatever is found: a short life may be over by then
		return next, nil
	}
	return now, nil
}

// Now implements sessionlock.Clock.
func (s *Store) Now(ctx context.Context) (now time.Time, err error) {
	if err := s.pool.QueryRow(ctx, `SELECT clock_timestamp()`).Scan(&now); err != nil {
		return now, fmt.Errorf("postgres: clock: %w", err)
	}
	return now, nil
}

// Watch implements sessionlock.Watcher. All watches of a Store share one
// connection, which the first one opens and Close closes. While it is lost
// changes go unheard; so everybody is called when there is a new one.
func (s *Store) Watch(key string, changed func()) (stop func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return func() {}
	}
	if s.end == nil {
		var ctx context.Context
		ctx, s.end = context.WithCancel(context.Background())
		go s.listen(ctx)
	}
	w := &watcher{changed: changed}
	if s.watched[key] == nil {
		s.watched[key] = map[*watcher]struct{}{}
	}
	s.watched[key][w] = struct{}{}
	return func() {
		w.stopped.Store(true)
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.watched[key], w)
		if len(s.watched[key]) == 0 {
			delete(s.watched, key)
		}
	}
}

// Close ends all watches and returns when nothing runs any more. Load and
// CompareAndSwap work on.
func (s *Store) Close() {
	s.mu.Lock()
	s.closed = true
	end := s.end
	s.mu.Unlock()
	if end != nil {
		end()
		<-s.ended
	}
}

// listen keeps a connection up. Why one was lost is not told: a Store that cannot
// be reached says so to everybody who loads and swaps.
func (s *Store) listen(ctx context.Context) {
	defer close(s.ended)
	for ctx.Err() == nil {
		_ = s.hear(ctx)
		select {
		case <-ctx.Done():
		case <-time.After(rand.N(500 * time.Millisecond)): //nolint:gosec // so that a fleet does not come back as one
		}
	}
}

// hear wakes watchers until the connection is lost.
func (s *Store) hear(ctx context.Context) error {
	conn, err := s.subscribe(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	s.mu.Lock()
	keys := slices.Collect(maps.Keys(s.watched))
	s.mu.Unlock()
	for _, key := range keys {
		s.wake(key)
	}
	for {
		n, err := await(ctx, conn)
		if err != nil {
			return err
		}
		if n != nil {
			s.wake(n.Payload)
		}
	}
}

// subscribe returns a connection that listens. It comes from the pool, whose
// hooks may know passwords, and does not count there any more.
func (s *Store) subscribe(ctx context.Context) (*pgx.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, beat)
	defer cancel()
	pooled, err := s.pool.Acquire(ctx)
	if err != nil {
		return nil, err
	}
	if _, err := pooled.Exec(ctx, `LISTEN sessionlock`); err != nil {
		pooled.Release()
		return nil, err
	}
	return pooled.Hijack(), nil
}

// await returns the next notification, nil when there was none for a while. Then
// the connection was asked whether it lives: one that is half open is silent too.
func await(ctx context.Context, conn *pgx.Conn) (*pgconn.Notification, error) {
	quiet, cancel := context.WithTimeout(ctx, beat)
	defer cancel()
	n, err := conn.WaitForNotification(quiet)
	if err == nil || quiet.Err() == nil || ctx.Err() != nil {
		return n, err
	}
	ping, cancel := context.WithTimeout(ctx, beat)
	defer cancel()
	return nil, conn.Ping(ping)
}

func (s *Store) wake(key string) {
	s.mu.Lock()
	watchers := slices.Collect(maps.Keys(s.watched[key]))
	s.mu.Unlock()
	for _, w := range watchers {
		if !w.stopped.Load() {
			w.changed()
		}
	}
}
