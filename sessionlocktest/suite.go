package sessionlocktest

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"
)

// check is one case of a suite. run returns what it saw a backend do against
// rule, nil when it kept it.
type check struct {
	name, rule string
	run        func(t *testing.T) error
}

// bubble is what the suites' In does: run f, in a bubble or not.
type bubble func(t *testing.T, f func(t *testing.T))

func (in bubble) each(t *testing.T, checks []check, report func(t *testing.T, c check, err error)) {
	if in == nil {
		in = func(t *testing.T, f func(t *testing.T)) { f(t) }
	}
	for _, c := range checks {
		t.Run(c.name, func(t *testing.T) {
			in(t, func(t *testing.T) { report(t, c, c.run(t)) })
		})
	}
}

// fail is how a suite reports to its user.
func fail(t *testing.T, c check, err error) {
	if err != nil {
		t.Errorf("%v\nrule: %s", err, c.rule)
	}
}

// patience bounds each case, so that a backend that never returns fails one.
const patience = 30 * time.Second

func caseContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// uniqueKey returns a key that no other case and no other run has used, so
// suites can share a server.
func uniqueKey(suffix string) string { return "sessionlocktest:" + rand.Text()[:12] + ":" + suffix }

// awkwardKeys are legal and easy to mix up or to misread: by hash tags, globs,
// LIKE patterns, paths, and collations that fold case.
var awkwardKeys = []string{"k", "K", "{k}", "{k}:k", "k}{", ":", "k:", "*", "k?[a-z]", "%", "_", "../k", `k\`, `k'"`, "k;--"}

// sleeper fills in the default of a suite's Sleep.
func sleeper(sleep func(time.Duration)) func(time.Duration) {
	if sleep == nil {
		return time.Sleep
	}
	return sleep
}

// timely returns what f returns, which has to be done within life. A machine
// too busy for that says nothing about a backend, so f gets more tries then.
func timely(life time.Duration, f func() error) error {
	for range 10 {
		start := time.Now()
		err := f()
		if time.Since(start) < life {
			return err
		}
	}
	return fmt.Errorf("ten times not done within %v: set TTL to a longer life", life)
}

// crowd runs f n times at once and joins their errors.
func crowd(n int, f func(i int) error) error {
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

// ends runs f and reports one that does not return within the suite's patience.
// What hangs is left behind.
func ends(f func() error) error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case err := <-done:
		return err
	case <-timer.C:
		return fmt.Errorf("did not return within %v", patience)
	}
}
