// Cart shows what sessionguard prevents: a lost update by a request that was sent
// twice. Two servers, which are processes of their own, share a shopping cart in
// PostgreSQL and one Redis. A client sends to them in turns, as a load balancer does.
//
//	apt-get install postgresql
//	go -C examples/cart run .
//	go -C examples/cart run . -redis localhost:6379  # on a real Redis
//	go -C examples/cart run . -svg last-request.svg  # draw what happened
//
// The lamp is put into the cart at node 1, which takes 2 s. After 600 ms the client
// sends the request again, to node 2, which answers. The user goes on and puts the
// book into the cart. Then node 1 is ready to save the cart that it has read at the
// beginning: with the lamp, and without the book.
//
// That is played without the guard, with it, and with handlers that ignore it. What
// was to be expected and what was seen make a table; where they differ the exit status
// is 1. The example starts a PostgreSQL of its own, in a temporary folder, and ends it.
// It takes some ten seconds, at most 28.
//
// What to copy is in node.go: guarded, polite and update.
package main

import (
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/sessionlock/sessionlock/examples/postgres/pgserver"
)

const (
	nodeArg = "node"
	limit   = 28 * time.Second // of the whole; then everything is ended

	slow     = 2 * time.Second        // node 1, with the first request
	quick    = 200 * time.Millisecond // every other request
	patience = 600 * time.Millisecond // of the client, until it sends a request again
	thought  = 250 * time.Millisecond // of the user, between lamp and book

	// Half of the requests are told to stop within median of the arrival of the newer
	// one; it is a millisecond or two on a machine that does nothing else. Each is
	// within promptly, a good while before it would be over.
	median   = 50 * time.Millisecond
	promptly = time.Second
)

// settings are what can be said on the command line.
type settings struct{ redis, svg string }

func main() {
	if len(os.Args) == 5 && os.Args[1] == nodeArg {
		exit(serve(os.Args[2], os.Args[3], os.Args[4]))
	}
	var set settings
	flag.StringVar(&set.redis, "redis", "", "host:port of a real Redis `server`; its other keys are not touched")
	flag.StringVar(&set.svg, "svg", "", "`file` to draw what happened into (default: none)")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	exit(run(ctx, set, os.Stdout))
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "cart:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// run sets the stage, plays the acts, prints what was expected and what was seen, and
// draws.
func run(ctx context.Context, set settings, out io.Writer) (failed error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	s, err := setUp(ctx, set.redis)
	defer func() { failed = errors.Join(failed, s.clear()) }()
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "%-61s %-13s %s\n", "", "expected", "seen")
	drawn := map[string]story{}
	for i, a := range acts() {
		st, err := s.play(ctx, a.path)
		if err != nil {
			return errors.Join(failed, err)
		}
		drawn[a.path] = st
		failed = errors.Join(failed, tell(out, fmt.Sprintf("%d. %s", i+1, a.name), judge(a.want, st)))
	}
	statuses, took, err := s.often(ctx)
	if err != nil {
		return errors.Join(failed, err)
	}
	title := fmt.Sprintf("%d. guarded, %d times", len(acts())+1, times)
	failed = errors.Join(failed, tell(out, title, judgeOften(statuses, took)))
	if set.svg != "" {
		failed = errors.Join(failed, os.WriteFile(set.svg, draw(drawn["unguarded"], drawn["rude"]), 0o644)) //nolint:gosec // a picture for everybody
	}
	return failed
}

// stage is what the acts are played on.
type stage struct {
	server *pgserver.Server
	db     *pgxpool.Pool
	redis  *miniredis.Miniredis // nil: another one is used
	nodes  nodes
}

// setUp returns a stage to be cleared, also with an error, and nodes that have worked.
func setUp(ctx context.Context, redis string) (s *stage, err error) {
	s = &stage{}
	if s.server, err = pgserver.Start(ctx, "fsync=off"); err != nil {
		return s, err
	}
	url := s.server.URL(s.server.Addr(), "postgres")
	if s.db, err = pgxpool.New(ctx, url); err != nil {
		return s, err
	}
	if _, err := s.db.Exec(ctx, schema); err != nil {
		return s, err
	}
	if redis == "" {
		m := miniredis.NewMiniRedis()
		m.ClockTTL(true)
		if err := m.Start(); err != nil {
			return s, err
		}
		s.redis, redis = m, m.Addr()
	}
	if s.nodes, err = startNodes(ctx, redis, "cart-"+rand.Text(), url); err != nil {
		return s, err
	}
	return s, s.warm(ctx)
}

// clear ends all that setUp has started.
func (s *stage) clear() error {
	err := s.nodes.stop()
	if s.redis != nil {
		s.redis.Close()
	}
	if s.db != nil {
		s.db.Close()
	}
	if s.server != nil {
		s.server.Stop()
	}
	return err
}

// act is one way to handle the request that is sent twice.
type act struct {
	name string
	path string // of the handler
	want want
}

// want is what happens to the first of the two.
type want struct {
	told   bool   // that there is a newer one
	stops  bool   // long before its work is done
	commit string // what Commit returns; "": it is not called
	update string // how many rows its UPDATE changes
	status string // of its answer
	cart   string // in the end
}

// What Commit returns, and what an UPDATE changes.
const (
	superseded  = "superseded"
	noUpdate    = "none is sent"
	both, loses = "lamp, book", "lamp"
)

func acts() []act {
	return []act{
		{"without the guard", "unguarded", want{update: "1 row", status: "200", cart: loses}},
		{
			"guarded, by a handler that heeds its context", "polite",
			want{told: true, stops: true, update: noUpdate, status: "409", cart: both},
		},
		{
			"guarded, by one that ignores its context and Commit, and writes on its own", "rude",
			want{told: true, commit: superseded, update: "0 rows", status: "409", cart: both},
		},
		{
			"guarded, and stuck between Commit's look and the UPDATE", "stuck",
			want{told: true, commit: superseded, update: "0 rows", status: "409", cart: both},
		},
	}
}

// warm has each node work once: what follows is not the time of its first connections.
func (s *stage) warm(ctx context.Context) error {
	t, err := s.open(ctx, "polite")
	if err != nil {
		return err
	}
	for range s.nodes {
		if a := <-t.send(ctx, "lamp", 0); a.err != nil || a.status != "200" {
			return errors.Join(fmt.Errorf("a node is not at work: %q", a.status), a.err)
		}
	}
	return nil
}

// play tells one story, from the lamp to the late answer. On a machine so busy that its
// times cannot be kept it is told again.
func (s *stage) play(ctx context.Context, path string) (st story, err error) {
	for range 3 {
		if st, err = s.playOnce(ctx, path); err != nil || st.inTime() {
			break
		}
	}
	return st, err
}

func (s *stage) playOnce(ctx context.Context, path string) (story, error) {
	t, err := s.open(ctx, path)
	if err != nil {
		return story{}, err
	}
	first := t.send(ctx, "lamp", slow)
	pause(ctx, patience)
	retry := <-t.send(ctx, "lamp", quick)
	pause(ctx, thought)
	next := <-t.send(ctx, "book", quick)
	late := <-first
	if err := errors.Join(retry.err, next.err, late.err); err != nil {
		return story{}, err
	}
	return t.story(ctx)
}

// times is how often the last act is played: enough for a median.
const times = 21

// often plays only the beginning, many times, and looks at how long it takes until the
// older request is told. Here the newer one comes as soon as the older is registered.
func (s *stage) often(ctx context.Context) (statuses map[string]int, took []time.Duration, err error) {
	statuses = map[string]int{}
	for range times {
		t, err := s.open(ctx, "polite")
		if err != nil {
			return nil, nil, err
		}
		first := t.send(ctx, "lamp", slow)
		if err := t.await(ctx, 1, registered); err != nil {
			return nil, nil, err
		}
		newer, older := <-t.send(ctx, "lamp", 0), <-first
		statuses[newer.status+", "+older.status]++
		st, err := t.story(ctx)
		if err := errors.Join(newer.err, older.err, err); err != nil {
			return nil, nil, err
		}
		if d, ok := st.told(); ok {
			took = append(took, d)
		}
	}
	return statuses, took, nil
}

// line is a line of the table.
type line struct {
	what, want, seen string
	ok               bool
}

func same(what, want, seen string) line { return line{what, want, seen, want == seen} }

func judge(w want, st story) []line {
	after, ever := st.told()
	worked := st.worked()
	lines := []line{
		same("the request sent again, to node 2, is answered", "200", st.status(2)),
		same("the first one is told, after the second has come", "never", show(after, ever)),
		{"it works for at least", show(slow, true), show(worked, true), worked >= slow},
	}
	if w.told {
		lines[1] = line{"the first one is told, after the second has come, within", show(promptly, true), show(after, ever), ever && after <= promptly}
	}
	if w.stops {
		most := patience + promptly
		lines[2] = line{"it works for at most", show(most, true), show(worked, true), worked <= most}
	}
	if w.commit != "" {
		lines = append(lines, same("Commit returns", w.commit, st.commit()))
	}
	return append(lines,
		same("its UPDATE, later than that of the book, changes", w.update, st.update()),
		same("it is answered, when nobody waits any more", w.status, st.status(1)),
		same("in the cart is then", w.cart, st.cart))
}

func judgeOften(statuses map[string]int, took []time.Duration) []line {
	lines := []line{same("the newer is answered 200 and the older 409", fmt.Sprint(times), fmt.Sprint(statuses["200, 409"]))}
	if len(took) == 0 {
		return append(lines, same("the older is told", fmt.Sprint(times), "0"))
	}
	slices.Sort(took)
	middle := took[len(took)/2]
	return append(lines,
		same("the older is told", fmt.Sprint(times), fmt.Sprint(len(took))),
		line{
			"half of them, after the newer has come, within", show(median, true),
			fmt.Sprintf("%s (the slowest %s)", show(middle, true), show(took[len(took)-1], true)), middle <= median,
		})
}

func show(d time.Duration, ever bool) string {
	switch {
	case !ever:
		return "never"
	case d < 100*time.Millisecond:
		return fmt.Sprintf("%.1f ms", d.Seconds()*1000)
	}
	return fmt.Sprintf("%.2f s", d.Seconds())
}

// tell prints lines, and returns what is wrong with them.
func tell(out io.Writer, title string, lines []line) (failed error) {
	fmt.Fprintln(out, title)
	for _, l := range lines {
		mark := ""
		if !l.ok {
			mark = "  WRONG"
			failed = errors.Join(failed, fmt.Errorf("%s: %s %s, want %s", title, l.what, l.seen, l.want))
		}
		fmt.Fprintln(out, strings.TrimRight(fmt.Sprintf("   %-58s %-13s %s%s", l.what, l.want, l.seen, mark), " "))
	}
	return failed
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
