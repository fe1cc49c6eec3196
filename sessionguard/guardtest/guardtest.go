// Package guardtest shows whether an implementation of [sessionguard.Store] keeps the
// promises that a monitor relies on. Each failure names the rule it breaks.
package guardtest

import (
	"context"
	"crypto/rand"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sessionlock/sessionlock/internal/suite"
	"github.com/sessionlock/sessionlock/sessionguard"
)

// StoreTest shows whether an implementation of [sessionguard.Store], and of
// [sessionguard.Watcher] if it has that face, can be relied on by a monitor:
//
//	guardtest.StoreTest{
//		New:    func(t *testing.T) sessionguard.Store { return newMyStore(t, db) },
//		Outage: func(t *testing.T, s sessionguard.Store) { s.(*myStore).db.Close() },
//	}.Run(t)
//
// Only New is required. Sessions are unique per case and run, so a database may be
// shared by suites, and need not be empty. Run it with -race.
type StoreTest struct {
	// New returns a store that works; it is called once for each case.
	New func(t *testing.T) sessionguard.Store

	// Second returns another handle on what s keeps, as another process would have
	// it. Default: s itself.
	Second func(t *testing.T, s sessionguard.Store) sessionguard.Store

	// Outage makes s unreachable, until the end of the case at least. Default: none,
	// and the rule for outages is not looked at.
	Outage func(t *testing.T, s sessionguard.Store)

	// Forget makes s lose all its data. Default: none, and epochs are looked at only
	// after a registration has expired.
	Forget func(t *testing.T, s sessionguard.Store)

	// Sleep lets d pass for the store, which may have a clock of its own in a test.
	// Default: time.Sleep.
	Sleep func(d time.Duration)

	// TTL is the shortest life that the store can give a registration and that the
	// machine can do a few calls in. A registration has to be gone after twice that.
	// Default: 200 ms.
	TTL time.Duration

	// In runs each case; synctest.Test puts each into a bubble of its own, New and the
	// other funcs included. Default: just runs it.
	In func(t *testing.T, f func(t *testing.T))
}

// Run runs every case as a subtest of t.
func (s StoreTest) Run(t *testing.T) {
	t.Helper()
	suite.Run(t, s.In, s.cases())
}

func (s StoreTest) cases() []suite.Case {
	var cases []suite.Case
	add := func(name, rule string, run func(*storeCase) error) {
		cases = append(cases, suite.Case{Name: name, Rule: rule, Run: func(t *testing.T) error { return run(s.open(t)) }})
	}
	add("Nobody", "a session that nobody has registered for is the zero Registration, without an error", (*storeCase).nobody)
	add("Register", "who registered last is current, with the epoch and the token it registered with, on every handle", (*storeCase).register)
	add("Epochs", "an epoch is at least 1, at most 2⁵³ − 1, and greater than every one of its session before", (*storeCase).epochs)
	add("Floor", "an epoch is greater than the floor it was asked for", (*storeCase).floor)
	add("Repeated", "a repeated registration of the token that is stored returns its epoch and changes nothing but its life", (*storeCase).repeated)
	add("Overtaken", "a repeated registration of a token that was overtaken is a new one", (*storeCase).overtaken)
	add("Tokens", "tokens are compared as a whole, byte by byte: no prefixes, no folded case", (*storeCase).tokens)
	add("Sessions", "sessions are independent, whatever printable ASCII they are made of, up to 64 bytes", (*storeCase).sessions)
	add("Expiry", "a registration is gone after its ttl: nobody is current, and Renew does not bring it back", (*storeCase).expiry)
	add("AfterExpiry", "an epoch is greater than those of registrations that have expired", (*storeCase).afterExpiry)
	add("Renew", "Renew returns who is current and lets it live for ttl from now on, longer or shorter than before", (*storeCase).renew)
	add("RenewNobody", "Renew of a session without a registration makes none", (*storeCase).renewNobody)
	add("Replaced", "a registration lives for its own ttl, not for what is left of the one it replaced", (*storeCase).replaced)
	add("OneLast", "of requests that register at once no two get one epoch, and the one with the highest is current", (*storeCase).oneLast)
	add("Cancelled", "a call whose context has ended returns soon, and did either all or nothing", (*storeCase).cancelled)
	add("Watch", "a watch is called after registrations of its session (a hint may be lost, most are not), hardly for others, and not after stop", (*storeCase).watch)
	add("WatchReturns", "Watch and its stop return at once, whatever the state of the store", (*storeCase).watchReturns)
	if s.Forget != nil {
		add("Forgotten", "a store that has lost its data has nobody current, and gives out greater epochs than before: start from the time", (*storeCase).forgotten)
	}
	if s.Outage != nil {
		add("Outage", "a store that cannot be reached is an error, never nobody: that would end every request", (*storeCase).outage)
	}
	return cases
}

// maxEpoch is the largest number that is exact wherever it goes.
const maxEpoch = 1<<53 - 1

// storeCase is one case's store, on two handles.
type storeCase struct {
	StoreTest
	t    *testing.T
	ctx  context.Context //nolint:containedctx // lives exactly as long as the case
	a, b sessionguard.Store
}

func (s StoreTest) open(t *testing.T) *storeCase {
	t.Helper()
	if s.Sleep == nil {
		s.Sleep = time.Sleep
	}
	if s.TTL == 0 {
		s.TTL = 200 * time.Millisecond
	}
	c := &storeCase{StoreTest: s, t: t, ctx: suite.Context(t), a: s.New(t)}
	c.b = c.a
	if s.Second != nil {
		c.b = s.Second(t, c.a)
	}
	return c
}

type registration = sessionguard.Registration

// is checks who is current, on both handles.
func (c *storeCase) is(session string, want registration) error {
	for _, s := range []sessionguard.Store{c.a, c.b} {
		got, err := s.Current(c.ctx, session)
		if err != nil {
			return fmt.Errorf("Current of a session registered by %s: %w", show(want), err)
		}
		if got != want {
			return fmt.Errorf("Current = %s, want %s", show(got), show(want))
		}
	}
	return nil
}

func show(r registration) string {
	if r == (registration{}) {
		return "nobody"
	}
	return fmt.Sprintf("{%d %q}", r.Epoch, r.Token)
}

// registers registers a token of its own and checks the epoch that it gets.
func (c *storeCase) registers(s sessionguard.Store, session string, floor uint64, ttl time.Duration) (registration, error) {
	r := registration{Token: rand.Text()}
	var err error
	r.Epoch, err = s.Register(c.ctx, session, r.Token, floor, ttl)
	switch {
	case err != nil:
		return r, fmt.Errorf("Register: %w", err)
	case r.Epoch == 0 || r.Epoch > maxEpoch:
		return r, fmt.Errorf("Register = %d, which is not within 1 and 2⁵³ − 1", r.Epoch)
	case r.Epoch <= floor:
		return r, fmt.Errorf("Register above a floor of %d = %d", floor, r.Epoch)
	}
	return r, nil
}

// last registers and checks that this is current from then on.
func (c *storeCase) last(session string, ttl time.Duration) (registration, error) {
	r, err := c.registers(c.a, session, 0, ttl)
	if err == nil {
		err = c.is(session, r)
	}
	return r, err
}

func (c *storeCase) nobody() error { return c.is(suite.Unique("nobody"), registration{}) }

func (c *storeCase) register() error {
	session := suite.Unique("s")
	for range 3 {
		if _, err := c.last(session, time.Hour); err != nil {
			return err
		}
	}
	return nil
}

func (c *storeCase) epochs() error {
	session, last := suite.Unique("s"), uint64(0)
	for i := range 100 {
		s := c.a
		if i%2 == 1 {
			s = c.b
		}
		r, err := c.registers(s, session, 0, time.Hour)
		if err != nil {
			return err
		}
		if r.Epoch <= last {
			return fmt.Errorf("Register = %d, after one that returned %d", r.Epoch, last)
		}
		last = r.Epoch
	}
	return nil
}

func (c *storeCase) floor() error {
	session := suite.Unique("s")
	first, err := c.last(session, time.Hour)
	if err != nil {
		return err
	}
	ahead := max(first.Epoch, uint64(time.Now().Add(24*time.Hour).UnixMicro()))
	if _, err := c.registers(c.a, suite.Unique("fresh"), ahead, time.Hour); err != nil {
		return fmt.Errorf("a session that nobody has registered for: %w", err)
	}
	for _, floor := range []uint64{first.Epoch, ahead, maxEpoch - 2} {
		r, err := c.registers(c.b, session, floor, time.Hour)
		if err != nil {
			return err
		}
		if err := c.is(session, r); err != nil {
			return err
		}
	}
	return nil
}

func (c *storeCase) repeated() error {
	session := suite.Unique("s")
	r, err := c.last(session, time.Hour)
	if err != nil {
		return err
	}
	for range 3 {
		epoch, err := c.b.Register(c.ctx, session, r.Token, r.Epoch+1000, time.Hour)
		if err != nil {
			return fmt.Errorf("sent again, as clients do when a reply is lost: %w", err)
		}
		if epoch != r.Epoch {
			return fmt.Errorf("sent again, as clients do when a reply is lost: Register = %d, want %d as before", epoch, r.Epoch)
		}
		if err := c.is(session, r); err != nil {
			return err
		}
	}
	short := suite.Unique("short")
	if r, err = c.registers(c.a, short, 0, c.TTL); err != nil {
		return err
	}
	if _, err := c.a.Register(c.ctx, short, r.Token, 0, time.Hour); err != nil {
		return err
	}
	c.Sleep(2 * c.TTL)
	if err := c.is(short, r); err != nil {
		return fmt.Errorf("repeated with a ttl of an hour: %w", err)
	}
	return nil
}

func (c *storeCase) overtaken() error {
	session := suite.Unique("s")
	r, err := c.last(session, time.Hour)
	if err != nil {
		return err
	}
	newer, err := c.last(session, time.Hour)
	if err != nil {
		return err
	}
	again := registration{Token: r.Token}
	if again.Epoch, err = c.a.Register(c.ctx, session, r.Token, 0, time.Hour); err != nil {
		return err
	}
	if again.Epoch <= newer.Epoch {
		return fmt.Errorf("a token that was overtaken by %d registered again with %d", newer.Epoch, again.Epoch)
	}
	return c.is(session, again)
}

func (c *storeCase) tokens() error {
	base := rand.Text()
	for _, other := range []string{base[:25], base + "x", "x" + base, base + " ", lower(base)} {
		session := suite.Unique("s")
		first, err := c.a.Register(c.ctx, session, base, 0, time.Hour)
		if err != nil {
			return err
		}
		second, err := c.a.Register(c.ctx, session, other, 0, time.Hour)
		if err != nil {
			return err
		}
		if second <= first {
			return fmt.Errorf("tokens %q and %q are taken for one", base, other)
		}
		if err := c.is(session, registration{Epoch: second, Token: other}); err != nil {
			return err
		}
	}
	return nil
}

func lower(s string) string {
	b := []byte(s)
	for i, x := range b {
		if 'A' <= x && x <= 'Z' {
			b[i] = x + 'a' - 'A'
		}
	}
	return string(b)
}

func (c *storeCase) sessions() error {
	base := suite.Unique("")
	fill := func(n int) string {
		b := []byte(base)
		for len(b) < n {
			b = append(b, 'l')
		}
		return string(b)
	}
	sessions := []string{fill(64), fill(63)}
	for _, s := range suite.Awkward() {
		sessions = append(sessions, base+s)
	}
	want := map[string]registration{}
	for _, s := range sessions {
		r, err := c.registers(c.a, s, 0, time.Hour)
		if err != nil {
			return fmt.Errorf("session %q, with others registered: %w", s, err)
		}
		want[s] = r
	}
	for _, s := range sessions {
		if err := c.is(s, want[s]); err != nil {
			return fmt.Errorf("session %q: %w", s, err)
		}
	}
	return nil
}

// timely does f, which has to be done within the TTL, with a session of its own.
func (c *storeCase) timely(f func(session string) error) (session string, err error) {
	err = suite.Timely(c.TTL, func() error {
		session = suite.Unique("s")
		return f(session)
	})
	return session, err
}

func (c *storeCase) expiry() error {
	session, err := c.timely(func(session string) error {
		_, err := c.last(session, c.TTL)
		return err
	})
	if err != nil {
		return err
	}
	c.Sleep(2 * c.TTL)
	if err := c.is(session, registration{}); err != nil {
		return fmt.Errorf("%v after it was registered for %v: %w", 2*c.TTL, c.TTL, err)
	}
	r, err := c.a.Renew(c.ctx, session, time.Hour)
	if err != nil {
		return err
	}
	if r != (registration{}) {
		return fmt.Errorf("Renew of a registration that has expired = %s, want nobody", show(r))
	}
	return c.is(session, registration{})
}

func (c *storeCase) afterExpiry() error {
	session := suite.Unique("s")
	var last registration
	var err error
	for range 10 { // so that what is counted anew is behind
		if last, err = c.registers(c.a, session, 0, c.TTL); err != nil {
			return err
		}
	}
	c.Sleep(2 * c.TTL)
	r, err := c.registers(c.b, session, 0, time.Hour)
	if err == nil && r.Epoch <= last.Epoch {
		err = fmt.Errorf("Register = %d, after one that had %d and has expired", r.Epoch, last.Epoch)
	}
	return err
}

func (c *storeCase) renew() error {
	var longer registration
	session, err := c.timely(func(session string) (err error) {
		if longer, err = c.registers(c.a, session, 0, c.TTL); err != nil {
			return err
		}
		got, err := c.b.Renew(c.ctx, session, time.Hour)
		if err == nil && got != longer {
			err = fmt.Errorf("Renew = %s, want %s", show(got), show(longer))
		}
		return err
	})
	if err != nil {
		return err
	}
	short := suite.Unique("short")
	shorter, err := c.last(short, time.Hour)
	if err != nil {
		return err
	}
	if got, err := c.a.Renew(c.ctx, short, c.TTL); err != nil || got != shorter {
		return fmt.Errorf("Renew = %s, %w, want %s", show(got), err, show(shorter))
	}
	c.Sleep(2 * c.TTL)
	if err := c.is(session, longer); err != nil {
		return fmt.Errorf("renewed for an hour, %v after its life was over: %w", c.TTL, err)
	}
	if err := c.is(short, registration{}); err != nil {
		return fmt.Errorf("renewed for %v, %v later: %w", c.TTL, 2*c.TTL, err)
	}
	return nil
}

func (c *storeCase) renewNobody() error {
	session := suite.Unique("s")
	r, err := c.a.Renew(c.ctx, session, time.Hour)
	if err != nil {
		return err
	}
	if r != (registration{}) {
		return fmt.Errorf("Renew = %s, want nobody", show(r))
	}
	return c.is(session, registration{})
}

func (c *storeCase) replaced() error {
	longer, shorter := suite.Unique("longer"), suite.Unique("shorter")
	for _, s := range []struct {
		session     string
		first, then time.Duration
	}{{longer, c.TTL, time.Hour}, {shorter, time.Hour, c.TTL}} {
		if _, err := c.registers(c.a, s.session, 0, s.first); err != nil {
			return err
		}
		if _, err := c.registers(c.a, s.session, 0, s.then); err != nil {
			return err
		}
	}
	c.Sleep(2 * c.TTL)
	r, err := c.a.Current(c.ctx, longer)
	if err != nil {
		return err
	}
	if r == (registration{}) {
		return fmt.Errorf("registered for an hour in place of %v, it is gone %v later", c.TTL, 2*c.TTL)
	}
	if err := c.is(shorter, registration{}); err != nil {
		return fmt.Errorf("registered for %v in place of an hour, %v later: %w", c.TTL, 2*c.TTL, err)
	}
	return nil
}

func (c *storeCase) oneLast() error {
	session := suite.Unique("s")
	for range 10 {
		all := make([]registration, 50)
		if err := suite.Crowd(len(all), func(i int) (err error) {
			s := c.a
			if i%2 == 1 {
				s = c.b
			}
			all[i], err = c.registers(s, session, 0, time.Hour)
			return err
		}); err != nil {
			return fmt.Errorf("in a race of %d: %w", len(all), err)
		}
		seen := map[uint64]bool{}
		var last registration
		for _, r := range all {
			if seen[r.Epoch] {
				return fmt.Errorf("of %d at once two got epoch %d", len(all), r.Epoch)
			}
			seen[r.Epoch] = true
			if r.Epoch > last.Epoch {
				last = r
			}
		}
		if err := c.is(session, last); err != nil {
			return fmt.Errorf("of %d at once: %w", len(all), err)
		}
	}
	return nil
}

func (c *storeCase) cancelled() error {
	ctx, cancel := context.WithCancel(c.ctx)
	cancel()
	for range 20 {
		session, token := suite.Unique("s"), rand.Text()
		before, err := c.last(session, time.Hour)
		if err != nil {
			return err
		}
		var read, renewed registration
		var epoch uint64
		var readErr, renewErr, registerErr error
		if err := suite.Ends(func() error {
			read, readErr = c.a.Current(ctx, session)
			renewed, renewErr = c.a.Renew(ctx, session, time.Hour)
			epoch, registerErr = c.a.Register(ctx, session, token, 0, time.Hour)
			return nil
		}); err != nil {
			return fmt.Errorf("with a cancelled context: %w", err)
		}
		if readErr == nil && read != before || renewErr == nil && renewed != before {
			return fmt.Errorf("with a cancelled context Current = %s, %w and Renew = %s, %w, want %s or an error", show(read), readErr, show(renewed), renewErr, show(before))
		}
		now, err := c.a.Current(c.ctx, session)
		if err != nil {
			return err
		}
		done := now.Token == token && now.Epoch > before.Epoch
		if !done && (registerErr == nil || now != before) || done && registerErr == nil && epoch != now.Epoch {
			return fmt.Errorf("Register with a cancelled context = %d, %w; then Current = %s", epoch, registerErr, show(now))
		}
	}
	return nil
}

// watch allows what the contract allows: hints that are lost, late or repeated. It does
// not allow a watch that hears every session or hardly anything.
func (c *storeCase) watch() error {
	w, ok := c.a.(sessionguard.Watcher)
	if !ok {
		c.t.Log("no sessionguard.Watcher: requests learn by their renewal")
		return nil
	}
	const rounds = 20
	session, other := suite.Unique("s"), suite.Unique("other")
	woken := make(chan struct{}, 1)
	var others, late atomic.Int64
	stop := w.Watch(session, func() {
		select {
		case woken <- struct{}{}:
		default:
		}
	})
	defer stop()
	defer w.Watch(other, func() { others.Add(1) })()
	stopLate := w.Watch(session, func() { late.Add(1) })
	registered := 0
	// heard registers through the second handle until a watch has heard it.
	heard := func(within time.Duration, tries int) (bool, error) {
		for range tries {
			registered++
			if _, err := c.registers(c.b, session, 0, time.Hour); err != nil {
				return false, err
			}
			select {
			case <-woken:
				return true, nil
			case <-time.After(within):
			}
		}
		return false, nil
	}
	// A watch may take a while to be in force.
	if ok, err := heard(100*time.Millisecond, 100); err != nil {
		return err
	} else if !ok {
		return fmt.Errorf("never called, through %d registrations", registered)
	}
	stopLate()
	before, beforeOthers := late.Load(), others.Load()
	n := 0
	for range rounds {
		ok, err := heard(time.Second, 1)
		if err != nil {
			return err
		}
		if ok {
			n++
		}
	}
	if n < rounds/2 {
		return fmt.Errorf("called after %d of %d registrations", n, rounds)
	}
	if n := others.Load() - beforeOthers; n > rounds/2 {
		return fmt.Errorf("a watch of another session was called %d times in %d registrations", n, rounds)
	}
	if n := late.Load() - before; n > 1 {
		return fmt.Errorf("called %d times after stop had returned", n)
	}
	return nil
}

// A monitor watches while others wait for it.
func (c *storeCase) watchReturns() error {
	w, ok := c.a.(sessionguard.Watcher)
	if !ok {
		c.t.Log("no sessionguard.Watcher: requests learn by their renewal")
		return nil
	}
	if c.Outage != nil {
		c.Outage(c.t, c.a)
	}
	start := time.Now()
	err := suite.Ends(func() error {
		for range 10 {
			w.Watch(suite.Unique("s"), func() {})()
		}
		return nil
	})
	if took := time.Since(start); err == nil && took > time.Second {
		err = fmt.Errorf("ten watches begun and ended took %v", took)
	}
	return err
}

func (c *storeCase) forgotten() error {
	session := suite.Unique("s")
	first, err := c.last(session, time.Hour)
	if err != nil {
		return err
	}
	for range 10 { // so that a mere counter is behind
		if first, err = c.last(session, time.Hour); err != nil {
			return err
		}
	}
	c.Sleep(time.Millisecond) // for a store whose time is no finer
	c.Forget(c.t, c.a)
	if err := c.is(session, registration{}); err != nil {
		return err
	}
	r, err := c.last(session, time.Hour)
	if err != nil {
		return err
	}
	if r.Epoch <= first.Epoch {
		return fmt.Errorf("Register = %d after all data was lost, and %d before", r.Epoch, first.Epoch)
	}
	return nil
}

func (c *storeCase) outage() error {
	session := suite.Unique("s")
	if _, err := c.last(session, time.Hour); err != nil {
		return err
	}
	c.Outage(c.t, c.a)
	ctx, cancel := context.WithTimeout(c.ctx, time.Second)
	defer cancel()
	return suite.Ends(func() error {
		for _, s := range []string{session, suite.Unique("s")} {
			if r, err := c.a.Current(ctx, s); err == nil {
				return fmt.Errorf("Current during an outage = %s, nil", show(r))
			}
			if r, err := c.a.Renew(ctx, s, time.Hour); err == nil {
				return fmt.Errorf("Renew during an outage = %s, nil", show(r))
			}
			if n, err := c.a.Register(ctx, s, rand.Text(), 0, time.Hour); err == nil {
				return fmt.Errorf("Register during an outage = %d, nil", n)
			}
		}
		return nil
	})
}
