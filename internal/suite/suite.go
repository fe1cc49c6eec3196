// Package suite is what the conformance suites of sessionlocktest, guardtest and
// relaytest share: cases that tell which rule a backend breaks, and what a case needs to
// be fair to it.
package suite

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"
)

// Case is one case of a suite. Run returns what it saw a backend do against Rule, nil
// when it kept it.
type Case struct {
	Name, Rule string
	Run        func(t *testing.T) error
}

// In is a suite's In: it runs f, in a bubble or not.
type In func(t *testing.T, f func(t *testing.T))

// Run runs every case as a subtest of t, and fails those that saw a rule broken.
func Run(t *testing.T, in In, cases []Case) {
	t.Helper()
	each(t, in, cases, func(t *testing.T, c Case, err error) {
		t.Errorf("%v\nrule: %s", err, c.Rule)
	})
}

// Broken runs every case and returns the names of those that saw a rule broken, without
// failing t: a suite is tested by backends that break its rules.
func Broken(t *testing.T, in In, cases []Case) (names []string) {
	t.Helper()
	each(t, in, cases, func(t *testing.T, c Case, err error) {
		t.Logf("%v\nrule: %s", err, c.Rule)
		names = append(names, c.Name)
	})
	return names
}

// Names returns the names of cases.
func Names(cases []Case) (names []string) {
	for _, c := range cases {
		names = append(names, c.Name)
	}
	return names
}

func each(t *testing.T, in In, cases []Case, found func(t *testing.T, c Case, err error)) {
	t.Helper()
	if in == nil {
		in = func(t *testing.T, f func(t *testing.T)) { f(t) }
	}
	for _, c := range cases {
		t.Run(c.Name, func(t *testing.T) {
			in(t, func(t *testing.T) {
				if err := c.Run(t); err != nil {
					found(t, c, err)
				}
			})
		})
	}
}

// Patience bounds each case, so that a backend that never returns fails one.
const Patience = 30 * time.Second

// Context returns a context for all that a case asks of a backend.
func Context(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), Patience)
	t.Cleanup(cancel)
	return ctx
}

// Unique returns a name that no other case and no other run has used, so suites can
// share a server: of printable ASCII, 22 bytes longer than suffix.
func Unique(suffix string) string { return "conform:" + rand.Text()[:13] + ":" + suffix }

// Awkward are names that are legal and easy to mix up or to misread: by hash tags, globs,
// LIKE patterns, paths, and collations that fold case.
func Awkward() []string {
	return []string{"k", "K", "{k}", "{k}:k", "k}{", ":", "k:", "*", "k?[a-z]", "%", "_", "../k", `k\`, `k'"`, "k;--"}
}

// Timely returns what f returns, which has to be done within life. A machine too busy
// for that says nothing about a backend, so f gets more tries then.
func Timely(life time.Duration, f func() error) error {
	for range 10 {
		start := time.Now()
		err := f()
		if time.Since(start) < life {
			return err
		}
	}
	return fmt.Errorf("ten times not done within %v: set TTL to a longer life", life)
}

// Crowd runs f n times at once and joins their errors.
func Crowd(n int, f func(i int) error) error {
	errs := make([]error, n)
	start := make(chan struct{})
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			<-start
			errs[i] = f(i)
		})
	}
	close(start)
	wg.Wait()
	return errors.Join(errs...)
}

// Ends runs f and reports one that does not return within the patience. What hangs is
// left behind.
func Ends(f func() error) error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	timer := time.NewTimer(Patience)
	defer timer.Stop()
	select {
	case err := <-done:
		return err
	case <-timer.C:
		return fmt.Errorf("did not return within %v", Patience)
	}
}
