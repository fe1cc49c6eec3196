package main

// ledger.go holds what was sent against what the books of the receivers say has come
// of it.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

// tally is what has come of an act.
type tally struct {
	Sent, Done, Twice, Lost, Misplaced int
	Strange                            int // done, and never sent
	Again                              int // came again and were recognised
	Homeless                           []absence
}

// absence is the time of a client between two connections.
type absence struct {
	who string
	d   time.Duration
}

func (t *tally) add(o tally) {
	t.Sent += o.Sent
	t.Done += o.Done
	t.Twice += o.Twice
	t.Lost += o.Lost
	t.Misplaced += o.Misplaced
	t.Strange += o.Strange
	t.Again += o.Again
	t.Homeless = append(t.Homeless, o.Homeless...)
}

// compare holds what was done against what was sent, which is in no doubt: all
// different, in this order.
func compare(sent, done []string) tally {
	t := tally{Sent: len(sent)}
	place := map[string]int{}
	for i, m := range sent {
		place[m] = i
	}
	seen, last := map[string]bool{}, -1
	for _, m := range done {
		i, known := place[m]
		switch {
		case !known:
			t.Strange++
			continue
		case seen[m]:
			t.Twice++
			continue
		case i < last:
			t.Misplaced++
		}
		t.Done++
		seen[m], last = true, max(last, i)
	}
	t.Lost = t.Sent - t.Done
	return t
}

// received is the tally of what was sent to a client, by its own book.
func (c *client) received(sent []string) tally {
	b := c.report()
	t := compare(sent, b.Got)
	t.Again, t.Homeless = b.Again, c.absences()
	return t
}

func (c *client) absences() (all []absence) {
	for _, d := range c.report().Homeless {
		all = append(all, absence{c.user(), d})
	}
	return all
}

// processed is the tally of what a client has sent, by the nodes' books.
func (s *stage) processed(ctx context.Context, c *client, sent []string) (tally, error) {
	_, notes := books(c.id())
	done, err := s.rdb.LRange(ctx, notes, 0, -1).Result()
	return compare(sent, done), err
}

// reruns is how many messages of a client were processed more than once. That has an
// effect only where it is not made together with the id.
func (s *stage) reruns(ctx context.Context, c *client) (n int, err error) {
	key, _ := books(c.id())
	runs, err := s.rdb.HVals(ctx, key).Result()
	for _, r := range runs {
		if r != "1" {
			n++
		}
	}
	return n, err
}

// want is what has to come of an act, beside nothing lost, nothing twice, and all in
// its order.
type want struct {
	sent     int
	again    int // how many come again, at least
	homeless int // how many connections are lost
}

// judge compares what has come of an act with what should have.
func (a want) judge(t tally) error {
	var w wrong
	w.unless(t.Sent == a.sent, "%d sent, want %d", t.Sent, a.sent)
	w.unless(t.Lost == 0, "%d lost", t.Lost)
	w.unless(t.Twice == 0, "%d done twice", t.Twice)
	w.unless(t.Misplaced == 0, "%d not in their order", t.Misplaced)
	w.unless(t.Strange == 0, "%d that nobody has sent", t.Strange)
	w.unless(t.Again >= a.again, "%d came again, want %d or more", t.Again, a.again)
	w.unless(len(t.Homeless) == a.homeless, "%d connections lost, want %d", len(t.Homeless), a.homeless)
	return w.error()
}

// wrong collects what is.
type wrong []error

func (w *wrong) unless(ok bool, format string, args ...any) {
	if !ok {
		*w = append(*w, fmt.Errorf("  "+format, args...))
	}
}

func (w wrong) error() error { return errors.Join(w...) }

func printHead(out io.Writer) {
	fmt.Fprintf(out, "%-46s %5s %9s %10s %5s %9s %6s\n", "", "sent", "delivered", "duplicated", "lost", "misplaced", "again")
}

// printLine prints what has come of an act, and how long each client was without a home.
func printLine(out io.Writer, title string, t tally, ok bool) {
	verdict := "ok"
	if !ok {
		verdict = "WRONG"
	}
	fmt.Fprintf(out, "%-46s %5d %9d %10d %5d %9d %6d  %s\n", title, t.Sent, t.Done, t.Twice, t.Lost, t.Misplaced, t.Again, verdict)
	label, who := "without a home:", ""
	for some := range slices.Chunk(t.Homeless, 6) {
		var times []string
		for _, a := range some {
			text := fmt.Sprintf("%.1f ms", a.d.Seconds()*1000)
			if a.who != who {
				text = a.who + " " + text
			}
			who, times = a.who, append(times, text)
		}
		fmt.Fprintf(out, "   %-15s %s\n", label, strings.Join(times, ", "))
		label = ""
	}
}
