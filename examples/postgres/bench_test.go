package main

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock"
	"github.com/sessionlock/sessionlock/examples/postgres/pgserver"
)

// The bare cost of everything here is one round trip of the same pool, taken in
// turns with it, because a machine's speed differs from minute to minute. The
// server keeps its defaults: a commit is on disk when it is told.

// turns runs ours and each of the others in turn, and reports the medians and
// how often the first of the others fits into ours.
func turns(b *testing.B, ours func(i int) error, others ...func(i int) error) (medians []time.Duration) {
	b.Helper()
	took := make([][]time.Duration, 1+len(others))
	for i := 0; b.Loop(); i++ {
		for n, f := range append([]func(int) error{ours}, others...) {
			start := time.Now()
			if err := f(i); err != nil {
				b.Fatal(err)
			}
			took[n] = append(took[n], time.Since(start))
		}
	}
	for _, t := range took {
		slices.Sort(t)
		medians = append(medians, t[len(t)/2])
	}
	b.ReportMetric(float64(medians[0].Microseconds()), "ours-p50-µs")
	b.ReportMetric(float64(medians[1].Microseconds()), "bare-p50-µs")
	b.ReportMetric(float64(medians[0])/float64(medians[1]), "ratio")
	return medians
}

func benchStore(b *testing.B) (s *Store, roundTrip func(int) error) {
	b.Helper()
	db, err := pgserver.Start(context.Background())
	mustStart(b, err)
	b.Cleanup(db.Stop)
	s = storeAt(b, db.URL(db.Addr(), "postgres"))
	return s, func(int) error {
		var one int
		return s.pool.QueryRow(b.Context(), `SELECT 1`).Scan(&one)
	}
}

// payload is as long as an entry with a session in it.
func payload(i int) []byte { return fmt.Appendf(nil, "%0400d", i) }

func BenchmarkPostgresLoad(b *testing.B) {
	s, roundTrip := benchStore(b)
	_, err := s.CompareAndSwap(b.Context(), "k", nil, payload(0), time.Hour)
	require.NoError(b, err)
	turns(b, func(int) error {
		_, err := s.Load(b.Context(), "k")
		return err
	}, roundTrip)
}

// A swap is a commit, and a commit waits for the disk. So beside the round trip
// stands an UPDATE that compares, tells and sweeps nothing.
func BenchmarkPostgresSwap(b *testing.B) {
	s, roundTrip := benchStore(b)
	ctx := b.Context()
	var stored []byte
	_, err := s.CompareAndSwap(ctx, "bare", nil, payload(0), time.Hour)
	require.NoError(b, err)
	medians := turns(b, func(i int) error {
		now, err := s.CompareAndSwap(ctx, "k", stored, payload(i), time.Hour)
		if err == nil && string(now) != string(payload(i)) {
			err = fmt.Errorf("swap %d was refused", i)
		}
		stored = now
		return err
	}, roundTrip, func(i int) error {
		_, err := s.pool.Exec(ctx, `UPDATE sessionlock SET value = $2 WHERE key = $1`, "bare", payload(i))
		return err
	})
	b.ReportMetric(float64(medians[2].Microseconds()), "update-p50-µs")
	b.ReportMetric(float64(medians[0])/float64(medians[2]), "ratio-to-update")
}

// A session that the fleet has and this process does not hold near.
func BenchmarkPostgresCachedHit(b *testing.B) {
	s, roundTrip := benchStore(b)
	login := func(context.Context, string) (sessionlock.Session, error) {
		return sessionlock.Session{Token: sessionlock.NewToken("token"), Expiry: time.Now().Add(time.Hour)}, nil
	}
	c, err := sessionlock.New("bench", sessionlock.AuthenticatorFunc(login),
		sessionlock.WithCache(s), sessionlock.WithNearCache(0, time.Minute))
	require.NoError(b, err)
	b.Cleanup(func() { _ = c.Close(context.Background()) })
	_, err = c.Session(b.Context(), ada)
	require.NoError(b, err)
	turns(b, func(int) error {
		_, err := c.Session(b.Context(), ada)
		return err
	}, roundTrip)
}
