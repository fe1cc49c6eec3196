// Filemaker shows the persistent sessions of a FileMaker client, held against the
// ledger of a FileMaker server: which situation costs how many logins, data calls
// and logouts, and what the processes of a fleet share afterwards.
//
//	go run ./examples/filemaker
//
// It takes no arguments and needs nothing but Go: the server is a stand-in that
// speaks the Data API on loopback, the Redis is embedded. Two processes, each a
// client of its own, play each situation; FileMaker's minutes last 600 ms. A number
// that is wrong makes the exit status 1. It takes some ten seconds.
//
// How the library is used is in client.go.
package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"

	"github.com/sessionlock/sessionlock"
)

const (
	minute = 600 * time.Millisecond
	limit  = 18 * time.Second // of the whole
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "filemaker:", err)
		os.Exit(1)
	}
}

// run sets the stage, plays all rows of the table at once and prints them.
func run(ctx context.Context, out io.Writer) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	fm := newFileMaker(15 * minute)
	server, stop, err := fm.start(ctx)
	if err != nil {
		return err
	}
	defer stop()
	m := miniredis.NewMiniRedis()
	m.ClockTTL(true)
	if err := m.Start(); err != nil {
		return err
	}
	defer m.Close()
	rdb := redis.NewClient(&redis.Options{Addr: m.Addr()})
	defer rdb.Close()
	base := http.DefaultTransport.(*http.Transport).Clone()
	defer base.CloseIdleConnections()
	s := &stage{
		fm: fm, server: server, base: base, minute: minute,
		store: []sessionlock.Option{sessionlock.WithRedis(rdb), sessionlock.WithNamespace("filemaker-" + rand.Text())},
	}
	all := table()
	seen, wrong := make([]seen, len(all)), make([]error, len(all))
	var playing sync.WaitGroup
	for i, r := range all {
		playing.Go(func() {
			if seen[i], wrong[i] = s.play(ctx, fmt.Sprintf("account %d", i+1), r); wrong[i] == nil {
				wrong[i] = r.judge(seen[i])
			}
		})
	}
	playing.Wait()
	printTable(out, all, seen, wrong)
	return errors.Join(wrong...)
}

func printTable(out io.Writer, rows []row, got []seen, wrong []error) {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "\tlogins, data calls, logouts\t\tcache after\t\t")
	fmt.Fprintln(w, "situation\texpected\tseen\texpected\tseen\t")
	for i, r := range rows {
		verdict := "ok"
		if wrong[i] != nil {
			verdict = "WRONG"
		}
		fmt.Fprintf(w, "%s\t%v\t%v\t%s\t%s\t%s\n", r.situation, count(r.want.calls), count(got[i].calls), r.want.after, got[i].after, verdict)
	}
	_ = w.Flush()
}
