package relaytest_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/sessionrelay"
	"github.com/sessionlock/sessionlock/sessionrelay/relaytest"
)

// fleet is what the stores of one case share.
type fleet struct {
	memory sessionrelay.Memory
	notes  sync.Map // of faults
	down   bool
}

// store is a right store until one of its funcs, each of which stands for a mistake, is
// set.
type store struct {
	sessionrelay.Store
	*fleet

	register   func(h sessionrelay.Hello, conn string, limit int) (sessionrelay.Info, sessionrelay.Home, error)
	deregister func(session, conn string) error
	lookup     func(session string) (sessionrelay.Info, error)
	remove     func(session string) (bool, error)
	list       func(f sessionrelay.Filter, each func(sessionrelay.Info) bool) error
	alive      func(sessions []string) ([]string, error)
	expire     func(idle time.Duration) ([]string, error)
	scavenge   func() (int, error)
	homed      func() ([]sessionrelay.Info, error)
	accept     func(session, conn, id, owner string, patience time.Duration) (sessionrelay.Claim, error)
	complete   func(session, id, owner string, outcome []byte, answered ...string) error
	release    func(session, id, owner string) error
	forget     func(session string, ids []string) error
	put        func(ctx context.Context, session string, m sessionrelay.Message, correlation []byte) (sessionrelay.Home, error)
	fetch      func(session, conn string, most int) ([]sessionrelay.Message, error)
	attempted  func(session, conn string, ids []string) error
	delivered  func(session string, ids []string) error
	bury       func(session, conn string, ids []string) error
	buried     func(session string) ([]sessionrelay.Message, error)
	revive     func(session string, ids []string) error
	take       func(session, id, answer string) ([]byte, bool, error)
	watch      func(session string, changed func()) func()
}

var (
	ctx     = context.Background()
	errDown = fmt.Errorf("%w: down", sessionrelay.ErrUnavailable)
)

func (s *store) Register(_ context.Context, h sessionrelay.Hello, conn string, limit int) (sessionrelay.Info, sessionrelay.Home, error) {
	switch {
	case s.down:
		return sessionrelay.Info{}, sessionrelay.Home{}, errDown
	case s.register != nil:
		return s.register(h, conn, limit)
	}
	return s.Store.Register(ctx, h, conn, limit)
}

func (s *store) Deregister(_ context.Context, session, conn string) error {
	switch {
	case s.down:
		return errDown
	case s.deregister != nil:
		return s.deregister(session, conn)
	}
	return s.Store.Deregister(ctx, session, conn)
}

func (s *store) Lookup(_ context.Context, session string) (sessionrelay.Info, error) {
	switch {
	case s.lookup != nil:
		return s.lookup(session)
	case s.down:
		return sessionrelay.Info{}, errDown
	}
	return s.Store.Lookup(ctx, session)
}

func (s *store) Remove(_ context.Context, session string) (bool, error) {
	switch {
	case s.down:
		return false, errDown
	case s.remove != nil:
		return s.remove(session)
	}
	return s.Store.Remove(ctx, session)
}

func (s *store) List(_ context.Context, f sessionrelay.Filter, each func(sessionrelay.Info) bool) error {
	switch {
	case s.down:
		return errDown
	case s.list != nil:
		return s.list(f, each)
	}
	return s.Store.List(ctx, f, each)
}

func (s *store) Alive(_ context.Context, sessions []string) ([]string, error) {
	switch {
	case s.down:
		return nil, errDown
	case s.alive != nil:
		return s.alive(sessions)
	}
	return s.Store.Alive(ctx, sessions)
}

func (s *store) Expire(_ context.Context, idle time.Duration) ([]string, error) {
	switch {
	case s.down:
		return nil, errDown
	case s.expire != nil:
		return s.expire(idle)
	}
	return s.Store.Expire(ctx, idle)
}

func (s *store) Scavenge(context.Context) (int, error) {
	switch {
	case s.down:
		return 0, errDown
	case s.scavenge != nil:
		return s.scavenge()
	}
	return s.Store.Scavenge(ctx)
}

func (s *store) Homed(context.Context) ([]sessionrelay.Info, error) {
	switch {
	case s.down:
		return nil, errDown
	case s.homed != nil:
		return s.homed()
	}
	return s.Store.Homed(ctx)
}

func (s *store) Accept(_ context.Context, session, conn, id, owner string, patience time.Duration) (sessionrelay.Claim, error) {
	switch {
	case s.down:
		return sessionrelay.Claim{}, errDown
	case s.accept != nil:
		return s.accept(session, conn, id, owner, patience)
	}
	return s.Store.Accept(ctx, session, conn, id, owner, patience)
}

func (s *store) Complete(_ context.Context, session, id, owner string, outcome []byte, answered ...string) error {
	switch {
	case s.down:
		return errDown
	case s.complete != nil:
		return s.complete(session, id, owner, outcome, answered...)
	}
	return s.Store.Complete(ctx, session, id, owner, outcome, answered...)
}

func (s *store) Release(_ context.Context, session, id, owner string) error {
	switch {
	case s.down:
		return errDown
	case s.release != nil:
		return s.release(session, id, owner)
	}
	return s.Store.Release(ctx, session, id, owner)
}

func (s *store) Forget(_ context.Context, session string, ids ...string) error {
	switch {
	case s.down:
		return errDown
	case s.forget != nil:
		return s.forget(session, ids)
	}
	return s.Store.Forget(ctx, session, ids...)
}

func (s *store) Put(ctx context.Context, session string, m sessionrelay.Message, correlation []byte) (sessionrelay.Home, error) {
	switch {
	case s.down:
		return sessionrelay.Home{}, errDown
	case s.put != nil:
		return s.put(ctx, session, m, correlation)
	}
	return s.Store.Put(ctx, session, m, correlation)
}

func (s *store) Fetch(_ context.Context, session, conn string, most int) ([]sessionrelay.Message, error) {
	switch {
	case s.down:
		return nil, errDown
	case s.fetch != nil:
		return s.fetch(session, conn, most)
	}
	return s.Store.Fetch(ctx, session, conn, most)
}

func (s *store) Attempted(_ context.Context, session, conn string, ids ...string) error {
	switch {
	case s.down:
		return errDown
	case s.attempted != nil:
		return s.attempted(session, conn, ids)
	}
	return s.Store.Attempted(ctx, session, conn, ids...)
}

func (s *store) Delivered(_ context.Context, session string, ids ...string) error {
	switch {
	case s.down:
		return errDown
	case s.delivered != nil:
		return s.delivered(session, ids)
	}
	return s.Store.Delivered(ctx, session, ids...)
}

func (s *store) Bury(_ context.Context, session, conn string, ids ...string) error {
	switch {
	case s.down:
		return errDown
	case s.bury != nil:
		return s.bury(session, conn, ids)
	}
	return s.Store.Bury(ctx, session, conn, ids...)
}

func (s *store) Buried(_ context.Context, session string) ([]sessionrelay.Message, error) {
	switch {
	case s.down:
		return nil, errDown
	case s.buried != nil:
		return s.buried(session)
	}
	return s.Store.Buried(ctx, session)
}

func (s *store) Revive(_ context.Context, session string, ids ...string) error {
	switch {
	case s.down:
		return errDown
	case s.revive != nil:
		return s.revive(session, ids)
	}
	return s.Store.Revive(ctx, session, ids...)
}

func (s *store) Take(_ context.Context, session, id, answer string) ([]byte, bool, error) {
	switch {
	case s.down:
		return nil, false, errDown
	case s.take != nil:
		return s.take(session, id, answer)
	}
	return s.Store.Take(ctx, session, id, answer)
}

func (s *store) Watch(session string, changed func()) func() {
	if s.watch != nil {
		return s.watch(session, changed)
	}
	return s.memory.Watch(session, changed)
}

// with returns a suite of stores that make a mistake.
func with(fault func(s *store)) relaytest.StoreTest {
	return relaytest.StoreTest{
		New: func(*testing.T) func(string) sessionrelay.Store {
			all := &fleet{}
			return func(node string) sessionrelay.Store {
				s := &store{Store: all.memory.Store(node), fleet: all}
				fault(s)
				return s
			}
		},
		Outage: func(_ *testing.T, s sessionrelay.Store) { s.(*store).down = true },
		In:     synctest.Test,
	}
}

func right(*store) {}

func TestRightStorePasses(t *testing.T) { with(right).Run(t) }

func TestStoreWithoutItsOptionalFacePasses(t *testing.T) {
	relaytest.StoreTest{
		New: func(*testing.T) func(string) sessionrelay.Store {
			all := &fleet{}
			return func(node string) sessionrelay.Store { return struct{ sessionrelay.Store }{all.memory.Store(node)} }
		},
		In: synctest.Test,
	}.Run(t)
}

func TestSuiteUsesItsHooks(t *testing.T) {
	var slept, outages int
	suite := with(right)
	suite.Sleep = func(d time.Duration) { slept++; time.Sleep(d) }
	outage := suite.Outage
	suite.Outage = func(t *testing.T, s sessionrelay.Store) { outages++; outage(t, s) }
	suite.Run(t)
	assert.Positive(t, slept)
	assert.Equal(t, 1, outages)
}

// Run is seen failing from outside, in a process of its own.
func TestRunFailsItsTest(t *testing.T) {
	const env = "RELAYTEST_BROKEN"
	if os.Getenv(env) != "" {
		with(func(s *store) {
			s.lookup = func(string) (sessionrelay.Info, error) { return sessionrelay.Info{}, sessionrelay.ErrGone }
		}).Run(t)
		return
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestRunFailsItsTest$", "-test.timeout=1m")
	cmd.Env = append(os.Environ(), env+"=1")
	out, err := cmd.CombinedOutput()
	assert.Error(t, err)
	assert.Contains(t, string(out), "--- FAIL: TestRunFailsItsTest/Outage")
	assert.Contains(t, string(out), "rule: a store that cannot be reached is ErrUnavailable")
}

func TestSuiteForgivesABusyMachine(t *testing.T) {
	slowly := func(n int) relaytest.StoreTest {
		return with(func(s *store) {
			s.accept = func(session, conn, id, owner string, patience time.Duration) (sessionrelay.Claim, error) {
				c, err := s.Store.Accept(ctx, session, conn, id, owner, patience)
				if n--; n >= 0 {
					time.Sleep(300 * time.Millisecond)
				}
				return c, err
			}
		})
	}
	for n, want := range map[int]string{5: "", 1000: "set Tick to a longer one"} {
		synctest.Test(t, func(t *testing.T) {
			err := relaytest.Only(t, slowly(n), "Takeover")
			assert.Equal(t, want == "", err == nil, "%v", err)
			if err != nil {
				assert.Contains(t, err.Error(), want)
			}
		})
	}
}

// faults maps mistakes to the case that must find them.
var faults = map[string]struct {
	by    string
	fault func(s *store)
}{
	"a node's name that is another's": {"Register", func(s *store) { s.Store = s.memory.Store("x") }},
	"what a client says is lost": {"Register", func(s *store) {
		s.lookup = func(session string) (sessionrelay.Info, error) {
			i, err := s.right(session)
			i.App = ""
			return i, err
		}
	}},
	"times in seconds": {"Register", func(s *store) {
		s.register = func(h sessionrelay.Hello, conn string, limit int) (sessionrelay.Info, sessionrelay.Home, error) {
			i, before, err := s.Store.Register(ctx, h, conn, limit)
			i.Created = time.UnixMilli(i.Created.Unix())
			i.Live = i.Created
			return i, before, err
		}
	}},
	"no home before": {"Reconnect", func(s *store) {
		s.register = func(h sessionrelay.Hello, conn string, limit int) (sessionrelay.Info, sessionrelay.Home, error) {
			i, _, err := s.Store.Register(ctx, h, conn, limit)
			return i, sessionrelay.Home{}, err
		}
	}},
	"the home before is what it is when asked twice": {"Reconnect", func(s *store) {
		s.register = func(h sessionrelay.Hello, conn string, limit int) (sessionrelay.Info, sessionrelay.Home, error) {
			old, _ := s.right(h.Session)
			i, _, err := s.Store.Register(ctx, h, conn, limit)
			return i, old.Home, err
		}
	}},
	"a session is created anew each time": {"Reconnect", func(s *store) {
		s.register = func(h sessionrelay.Hello, conn string, limit int) (sessionrelay.Info, sessionrelay.Home, error) {
			i, before, err := s.Store.Register(ctx, h, conn, limit)
			i.Created = i.Live
			return i, before, err
		}
	}},
	"a reconnect is no sign of life": {"Reconnect", func(s *store) {
		s.register = func(h sessionrelay.Hello, conn string, limit int) (sessionrelay.Info, sessionrelay.Home, error) {
			i, before, err := s.Store.Register(ctx, h, conn, limit)
			i.Live = i.Created
			return i, before, err
		}
	}},
	"anybody's session is anybody's": {"WrongUser", func(s *store) {
		s.register = func(h sessionrelay.Hello, conn string, limit int) (sessionrelay.Info, sessionrelay.Home, error) {
			if old, err := s.right(h.Session); err == nil {
				h.User = old.User
			}
			return s.Store.Register(ctx, h, conn, limit)
		}
	}},
	"the owner is thrown out first, and the thief then": {"WrongUser", func(s *store) {
		s.register = func(h sessionrelay.Hello, conn string, limit int) (sessionrelay.Info, sessionrelay.Home, error) {
			if old, err := s.right(h.Session); err == nil && old.User != h.User {
				_ = s.memory.Store(old.Home.Node).Deregister(ctx, h.Session, old.Home.Conn)
			}
			return s.Store.Register(ctx, h, conn, limit)
		}
	}},
	"a refused session is removed": {"WrongUser", func(s *store) {
		s.register = func(h sessionrelay.Hello, conn string, limit int) (sessionrelay.Info, sessionrelay.Home, error) {
			i, before, err := s.Store.Register(ctx, h, conn, limit)
			if err != nil {
				_, _ = s.Store.Remove(ctx, h.Session)
			}
			return i, before, err
		}
	}},
	"no limit": {"Cap", func(s *store) {
		s.register = func(h sessionrelay.Hello, conn string, _ int) (sessionrelay.Info, sessionrelay.Home, error) {
			return s.Store.Register(ctx, h, conn, 1000)
		}
	}},
	"a limit for those that exist": {"Cap", func(s *store) {
		s.register = func(h sessionrelay.Hello, conn string, limit int) (sessionrelay.Info, sessionrelay.Home, error) {
			others := 0
			_ = s.Store.List(ctx, sessionrelay.Filter{User: h.User}, func(i sessionrelay.Info) bool { others++; return true })
			if others > limit {
				return sessionrelay.Info{}, sessionrelay.Home{}, sessionrelay.ErrCap
			}
			return s.Store.Register(ctx, h, conn, limit)
		}
	}},
	"the one above the limit is created": {"Cap", func(s *store) {
		s.register = func(h sessionrelay.Hello, conn string, limit int) (sessionrelay.Info, sessionrelay.Home, error) {
			i, before, err := s.Store.Register(ctx, h, conn, limit)
			if errors.Is(err, sessionrelay.ErrCap) {
				_, _, _ = s.Store.Register(ctx, h, conn, 1000)
			}
			return i, before, err
		}
	}},
	"sessions are counted before they are created": {"CapRace", func(s *store) {
		s.register = func(h sessionrelay.Hello, conn string, limit int) (sessionrelay.Info, sessionrelay.Home, error) {
			others := 0
			_ = s.Store.List(ctx, sessionrelay.Filter{User: h.User}, func(i sessionrelay.Info) bool {
				if i.Session != h.Session {
					others++
				}
				return true
			})
			_, err := s.right(h.Session)
			time.Sleep(time.Millisecond)
			if err != nil && others >= limit {
				return sessionrelay.Info{}, sessionrelay.Home{}, sessionrelay.ErrCap
			}
			return s.Store.Register(ctx, h, conn, 1000)
		}
	}},
	"the last to arrive is the home": {"OldConnections", func(s *store) {
		s.register = func(h sessionrelay.Hello, conn string, limit int) (sessionrelay.Info, sessionrelay.Home, error) {
			i, before, err := s.Store.Register(ctx, h, conn, limit)
			if errors.Is(err, sessionrelay.ErrMoved) {
				return s.Store.Register(ctx, h, conn+" again", limit)
			}
			return i, before, err
		}
	}},
	"a connection that was given up arrives": {"OldConnections", func(s *store) {
		s.deregister = func(session, conn string) error {
			if i, err := s.right(session); err != nil || i.Home != (sessionrelay.Home{Node: s.Node(), Conn: conn}) {
				return nil
			}
			return s.Store.Deregister(ctx, session, conn)
		}
	}},
	"any connection leaves": {"Deregister", func(s *store) {
		s.deregister = func(session, _ string) error {
			i, _ := s.right(session)
			return s.Store.Deregister(ctx, session, i.Home.Conn)
		}
	}},
	"any node leaves": {"Deregister", func(s *store) {
		s.deregister = func(session, conn string) error {
			i, _ := s.right(session)
			return s.memory.Store(i.Home.Node).Deregister(ctx, session, conn)
		}
	}},
	"who leaves is gone": {"Deregister", func(s *store) {
		s.deregister = func(session, conn string) error {
			if i, _ := s.right(session); i.Home == (sessionrelay.Home{Node: s.Node(), Conn: conn}) {
				_, err := s.Store.Remove(ctx, session)
				return err
			}
			return s.Store.Deregister(ctx, session, conn)
		}
	}},
	"messages outlive a session": {"Remove", func(s *store) {
		s.remove = func(session string) (bool, error) {
			if i, err := s.right(session); err == nil {
				left, _ := s.Store.Fetch(ctx, session, i.Home.Conn, 100)
				s.notes.Store(session, left)
			}
			return s.Store.Remove(ctx, session)
		}
		s.register = func(h sessionrelay.Hello, conn string, limit int) (sessionrelay.Info, sessionrelay.Home, error) {
			i, before, err := s.Store.Register(ctx, h, conn, limit)
			if left, ok := s.notes.LoadAndDelete(h.Session); ok && err == nil {
				for _, m := range left.([]sessionrelay.Message) {
					_, _ = s.Store.Put(ctx, h.Session, m, nil)
				}
			}
			return i, before, err
		}
	}},
	"a removal always finds something": {"Remove", func(s *store) {
		s.remove = func(session string) (bool, error) {
			_, err := s.Store.Remove(ctx, session)
			return true, err
		}
	}},
	"only the home may remove": {"Remove", func(s *store) {
		s.remove = func(session string) (bool, error) {
			if i, _ := s.right(session); i.Home.Node != s.Node() {
				return false, nil
			}
			return s.Store.Remove(ctx, session)
		}
	}},
	"a message makes a session": {"Gone", func(s *store) {
		s.put = func(_ context.Context, session string, m sessionrelay.Message, correlation []byte) (sessionrelay.Home, error) {
			_, _, _ = s.Store.Register(ctx, sessionrelay.Hello{Session: session, User: "x"}, "x", 1000)
			return s.Store.Put(ctx, session, m, correlation)
		}
	}},
	"nothing to fetch of a session that is not": {"Gone", func(s *store) {
		s.fetch = func(session, conn string, most int) ([]sessionrelay.Message, error) {
			got, err := s.Store.Fetch(ctx, session, conn, most)
			if errors.Is(err, sessionrelay.ErrGone) {
				err = nil
			}
			return got, err
		}
	}},
	"an error for what cannot be taken": {"Gone", func(s *store) {
		s.take = func(session, id, answer string) ([]byte, bool, error) {
			if _, err := s.right(session); err != nil {
				return nil, false, err
			}
			return s.Store.Take(ctx, session, id, answer)
		}
	}},
	"any connection fetches": {"Moved", func(s *store) {
		s.fetch = func(session, _ string, most int) ([]sessionrelay.Message, error) {
			i, _ := s.right(session)
			return s.Store.Fetch(ctx, session, i.Home.Conn, most)
		}
	}},
	"any connection marks": {"Moved", func(s *store) {
		s.attempted = func(session, _ string, ids []string) error {
			i, _ := s.right(session)
			return s.Store.Attempted(ctx, session, i.Home.Conn, ids...)
		}
	}},
	"any connection buries": {"Moved", func(s *store) {
		s.bury = func(session, _ string, ids []string) error {
			i, _ := s.right(session)
			return s.Store.Bury(ctx, session, i.Home.Conn, ids...)
		}
	}},
	"no connection is the home of a session without one": {"Moved", func(s *store) {
		s.fetch = func(session, conn string, most int) ([]sessionrelay.Message, error) {
			got, err := s.Store.Fetch(ctx, session, conn, most)
			if i, _ := s.right(session); conn == "" && i.User != "" && i.Home == (sessionrelay.Home{}) {
				return nil, nil
			}
			return got, err
		}
	}},
	"a filter without users": {"List", func(s *store) {
		s.list = func(f sessionrelay.Filter, each func(sessionrelay.Info) bool) error {
			f.User = ""
			return s.Store.List(ctx, f, each)
		}
	}},
	"a filter without apps": {"List", func(s *store) {
		s.list = func(f sessionrelay.Filter, each func(sessionrelay.Info) bool) error {
			f.App = ""
			return s.Store.List(ctx, f, each)
		}
	}},
	"a filter without connections": {"List", func(s *store) {
		s.list = func(f sessionrelay.Filter, each func(sessionrelay.Info) bool) error {
			f.Connected = false
			return s.Store.List(ctx, f, each)
		}
	}},
	"versions as numbers": {"List", func(s *store) {
		s.list = func(f sessionrelay.Filter, each func(sessionrelay.Info) bool) error {
			var since float64
			_, _ = fmt.Sscan(f.Since, &since)
			f.Since = ""
			return s.Store.List(ctx, f, func(i sessionrelay.Info) bool {
				var v float64
				_, _ = fmt.Sscan(i.Version, &v)
				return v < since || each(i)
			})
		}
	}},
	"a list that does not stop": {"List", func(s *store) {
		s.list = func(f sessionrelay.Filter, each func(sessionrelay.Info) bool) error {
			return s.Store.List(ctx, f, func(i sessionrelay.Info) bool { each(i); return true })
		}
	}},
	"a list that repeats itself": {"List", func(s *store) {
		s.list = func(f sessionrelay.Filter, each func(sessionrelay.Info) bool) error {
			return s.Store.List(ctx, f, func(i sessionrelay.Info) bool { first := each(i); return each(i) && first })
		}
	}},
	"a sign of life that nobody sees": {"Alive", func(s *store) {
		s.alive = func(sessions []string) (unknown []string, err error) {
			for _, session := range sessions {
				if _, err := s.right(session); err != nil {
					unknown = append(unknown, session)
				}
			}
			return unknown, nil
		}
	}},
	"unknown sessions that are not reported": {"Alive", func(s *store) {
		s.alive = func(sessions []string) ([]string, error) {
			_, err := s.Store.Alive(ctx, sessions)
			return nil, err
		}
	}},
	"a sign of life that creates": {"Alive", func(s *store) {
		s.alive = func(sessions []string) ([]string, error) {
			unknown, err := s.Store.Alive(ctx, sessions)
			for _, session := range unknown {
				_, _, _ = s.Store.Register(ctx, sessionrelay.Hello{Session: session, User: "x"}, "x", 1000)
			}
			return unknown, err
		}
	}},
	"a sign of life for those connected only": {"Alive", func(s *store) {
		s.alive = func(sessions []string) (unknown []string, err error) {
			return s.Store.Alive(ctx, slices.DeleteFunc(slices.Clone(sessions), func(session string) bool {
				i, err := s.right(session)
				return err == nil && i.Home == sessionrelay.Home{}
			}))
		}
	}},
	"those disconnected do not time out": {"Expire", func(s *store) {
		s.expire = func(idle time.Duration) ([]string, error) {
			var away []string
			_ = s.Store.List(ctx, sessionrelay.Filter{}, func(i sessionrelay.Info) bool {
				if (i.Home == sessionrelay.Home{}) {
					away = append(away, i.Session)
				}
				return true
			})
			_, _ = s.Store.Alive(ctx, away)
			return s.Store.Expire(ctx, idle)
		}
	}},
	"all time out": {"Expire", func(s *store) {
		s.expire = func(time.Duration) ([]string, error) { return s.Store.Expire(ctx, -time.Minute) }
	}},
	"those that timed out stay": {"Expire", func(s *store) {
		s.expire = func(idle time.Duration) (expired []string, err error) {
			err = s.Store.List(ctx, sessionrelay.Filter{}, func(i sessionrelay.Info) bool {
				if time.Since(i.Live) > idle {
					expired = append(expired, i.Session)
				}
				return true
			})
			return expired, err
		}
	}},
	"candidates are what was removed": {"ExpireOnce", func(s *store) {
		s.expire = func(idle time.Duration) (expired []string, err error) {
			_ = s.Store.List(ctx, sessionrelay.Filter{}, func(i sessionrelay.Info) bool {
				if time.Since(i.Live) > idle {
					expired = append(expired, i.Session)
				}
				return true
			})
			time.Sleep(time.Millisecond)
			_, err = s.Store.Expire(ctx, idle)
			return expired, err
		}
	}},
	"clearing up takes messages": {"Scavenge", func(s *store) {
		s.scavenge = func() (int, error) {
			_ = s.Store.List(ctx, sessionrelay.Filter{}, func(i sessionrelay.Info) bool {
				m, _ := s.Store.Fetch(ctx, i.Session, i.Home.Conn, 1)
				for _, m := range m {
					_ = s.Store.Delivered(ctx, i.Session, m.ID)
				}
				return true
			})
			return 0, nil
		}
	}},
	"there is always something to clear": {"Scavenge", func(s *store) {
		s.scavenge = func() (int, error) { return 1, nil }
	}},
	"homed anywhere": {"Homed", func(s *store) {
		s.homed = func() (all []sessionrelay.Info, err error) {
			err = s.Store.List(ctx, sessionrelay.Filter{Connected: true}, func(i sessionrelay.Info) bool { all = append(all, i); return true })
			return all, err
		}
	}},
	"the connection before takes its successor out of the index": {"Homed", func(s *store) {
		s.deregister = func(session, conn string) error {
			s.notes.Store("left "+session, true)
			return s.Store.Deregister(ctx, session, conn)
		}
		s.homed = func() ([]sessionrelay.Info, error) {
			all, err := s.Store.Homed(ctx)
			return slices.DeleteFunc(all, func(i sessionrelay.Info) bool { _, left := s.notes.Load("left " + i.Session); return left }), err
		}
	}},
	"an owner who asks twice is refused": {"Accept", func(s *store) {
		s.accept = func(session, conn, id, owner string, patience time.Duration) (sessionrelay.Claim, error) {
			return s.Store.Accept(ctx, session, conn, id, owner+" "+unique(), patience)
		}
	}},
	"ids of all sessions are one": {"Accept", func(s *store) {
		s.accept = func(session, conn, id, owner string, patience time.Duration) (sessionrelay.Claim, error) {
			first, _ := s.notes.LoadOrStore("first", session)
			return s.Store.Accept(ctx, first.(string), conn, id, owner, patience)
		}
	}},
	"who looks first accepts": {"AcceptRace", func(s *store) {
		s.accept = func(session, conn, id, owner string, patience time.Duration) (sessionrelay.Claim, error) {
			_, seen := s.notes.Load(session + id)
			time.Sleep(time.Millisecond)
			s.notes.Store(session+id, true)
			c, err := s.Store.Accept(ctx, session, conn, id, owner, patience)
			if !seen && c.State == sessionrelay.InProgress {
				c.State = sessionrelay.Accepted
			}
			return c, err
		}
	}},
	"claims for ever": {"Takeover", func(s *store) {
		s.accept = func(session, conn, id, owner string, _ time.Duration) (sessionrelay.Claim, error) {
			return s.Store.Accept(ctx, session, conn, id, owner, 1000*time.Hour)
		}
	}},
	"claims that do not protect": {"Takeover", func(s *store) {
		s.accept = func(session, conn, id, owner string, _ time.Duration) (sessionrelay.Claim, error) {
			return s.Store.Accept(ctx, session, conn, id, owner, 0)
		}
	}},
	"a late completion is none, and no error": {"Takeover", func(s *store) {
		s.complete = func(session, id, owner string, outcome []byte, answered ...string) error {
			err := s.Store.Complete(ctx, session, id, owner, outcome, answered...)
			if errors.Is(err, sessionrelay.ErrTaken) {
				err = nil
			}
			return err
		}
	}},
	"a claim that cannot be renewed": {"Takeover", func(s *store) {
		s.accept = func(session, conn, id, owner string, patience time.Duration) (sessionrelay.Claim, error) {
			if _, mine := s.notes.LoadOrStore(session+id+owner, true); mine {
				patience = 0
			}
			return s.Store.Accept(ctx, session, conn, id, owner, patience)
		}
	}},
	"owners by their first word": {"Owner", func(s *store) {
		s.accept = func(session, conn, id, owner string, patience time.Duration) (sessionrelay.Claim, error) {
			return s.Store.Accept(ctx, session, conn, id, word(owner), patience)
		}
		s.complete = func(session, id, owner string, outcome []byte, answered ...string) error {
			return s.Store.Complete(ctx, session, id, word(owner), outcome, answered...)
		}
	}},
	"anybody releases": {"Owner", func(s *store) {
		s.release = func(session, id, _ string) error { return s.Store.Forget(ctx, session, id) }
	}},
	"nobody releases": {"Owner", func(s *store) {
		s.release = func(session, id, owner string) error { return nil }
	}},
	"what nobody accepted is completed": {"Owner", func(s *store) {
		s.complete = func(session, id, owner string, outcome []byte, answered ...string) error {
			_, _ = s.Store.Accept(ctx, session, "", id, owner, time.Hour)
			return s.Store.Complete(ctx, session, id, owner, outcome, answered...)
		}
	}},
	"no outcome is an empty one": {"Outcome", func(s *store) {
		s.complete = func(session, id, owner string, outcome []byte, answered ...string) error {
			return s.Store.Complete(ctx, session, id, owner, append([]byte{}, outcome...), answered...)
		}
	}},
	"an empty outcome is none": {"Outcome", func(s *store) {
		s.accept = func(session, conn, id, owner string, patience time.Duration) (sessionrelay.Claim, error) {
			c, err := s.Store.Accept(ctx, session, conn, id, owner, patience)
			if len(c.Outcome) == 0 {
				c.Outcome = nil
			}
			return c, err
		}
	}},
	"outcomes that end at a NUL": {"Outcome", func(s *store) {
		s.complete = func(session, id, owner string, outcome []byte, answered ...string) error {
			cut, _, _ := bytes.Cut(outcome, []byte{0})
			return s.Store.Complete(ctx, session, id, owner, cut, answered...)
		}
	}},
	"the last outcome counts": {"Outcome", func(s *store) {
		s.complete = func(session, id, owner string, outcome []byte, answered ...string) error {
			err := s.Store.Complete(ctx, session, id, owner, outcome, answered...)
			if err == nil {
				_ = s.Store.Forget(ctx, session, id)
				_, _ = s.Store.Accept(ctx, session, "", id, owner, time.Hour)
				return s.Store.Complete(ctx, session, id, owner, outcome, answered...)
			}
			return err
		}
	}},
	"nothing is forgotten": {"Forget", func(s *store) {
		s.forget = func(string, []string) error { return nil }
	}},
	"only the first is forgotten": {"Forget", func(s *store) {
		s.forget = func(session string, ids []string) error {
			return s.Store.Forget(ctx, session, ids[:min(len(ids), 1)]...)
		}
	}},
	"an id that is there is an error": {"Put", func(s *store) {
		s.put = func(_ context.Context, session string, m sessionrelay.Message, correlation []byte) (sessionrelay.Home, error) {
			if _, again := s.notes.LoadOrStore(session+m.ID, true); again {
				return sessionrelay.Home{}, errors.New("duplicate key")
			}
			return s.Store.Put(ctx, session, m, correlation)
		}
	}},
	"what was delivered comes again": {"Put", func(s *store) {
		s.put = func(_ context.Context, session string, m sessionrelay.Message, correlation []byte) (sessionrelay.Home, error) {
			if _, was := s.notes.Load(session + m.ID); was {
				m.ID += "'"
			}
			return s.Store.Put(ctx, session, m, correlation)
		}
		s.delivered = func(session string, ids []string) error {
			for _, id := range ids {
				s.notes.Store(session+id, true)
			}
			return s.Store.Delivered(ctx, session, ids...)
		}
	}},
	"where the session is, nobody says": {"Put", func(s *store) {
		s.put = func(_ context.Context, session string, m sessionrelay.Message, correlation []byte) (sessionrelay.Home, error) {
			_, err := s.Store.Put(ctx, session, m, correlation)
			return sessionrelay.Home{}, err
		}
	}},
	"an id that is there replaces": {"Put", func(s *store) {
		s.put = func(_ context.Context, session string, m sessionrelay.Message, correlation []byte) (sessionrelay.Home, error) {
			s.notes.Store(session+m.ID, m)
			return s.Store.Put(ctx, session, m, correlation)
		}
		s.fetch = func(session, conn string, most int) ([]sessionrelay.Message, error) {
			got, err := s.Store.Fetch(ctx, session, conn, most)
			for i := range got {
				if m, ok := s.notes.Load(session + got[i].ID); ok {
					got[i].Payload, got[i].Request = bytes.Clone(m.(sessionrelay.Message).Payload), m.(sessionrelay.Message).Request
				}
			}
			return got, err
		}
	}},
	"as many as there are": {"Fetch", func(s *store) {
		s.fetch = func(session, conn string, _ int) ([]sessionrelay.Message, error) {
			return s.Store.Fetch(ctx, session, conn, 100)
		}
	}},
	"none is all": {"Fetch", func(s *store) {
		s.fetch = func(session, conn string, most int) ([]sessionrelay.Message, error) {
			if most <= 0 {
				most = 1000
			}
			return s.Store.Fetch(ctx, session, conn, most)
		}
	}},
	"fetching marks": {"Fetch", func(s *store) {
		s.fetch = func(session, conn string, most int) ([]sessionrelay.Message, error) {
			got, err := s.Store.Fetch(ctx, session, conn, most)
			for _, m := range got {
				_ = s.Store.Attempted(ctx, session, conn, m.ID)
			}
			return got, err
		}
	}},
	"messages by id": {"Fetch", func(s *store) { s.fetch = s.sorted }},
	"in any order":   {"Order", func(s *store) { s.fetch = s.sorted }},
	"some messages are lost": {"Order", func(s *store) {
		s.put = func(_ context.Context, session string, m sessionrelay.Message, correlation []byte) (sessionrelay.Home, error) {
			if strings.HasSuffix(m.ID, " 17") {
				return sessionrelay.Home{}, nil
			}
			return s.Store.Put(ctx, session, m, correlation)
		}
	}},
	"an attempt counts each time it is told": {"Attempted", func(s *store) {
		s.attempted = func(session, conn string, ids []string) error {
			for _, id := range ids {
				n, _ := s.notes.LoadOrStore(session+id, 0)
				s.notes.Store(session+id, n.(int)+1)
			}
			return s.Store.Attempted(ctx, session, conn, ids...)
		}
		s.fetch = func(session, conn string, most int) ([]sessionrelay.Message, error) {
			got, err := s.Store.Fetch(ctx, session, conn, most)
			for i := range got {
				n, _ := s.notes.LoadOrStore(session+got[i].ID, 0)
				got[i].Attempts = n.(int)
			}
			return got, err
		}
	}},
	"what was tried does not come back": {"Attempted", func(s *store) {
		s.fetch = func(session, conn string, most int) ([]sessionrelay.Message, error) {
			got, err := s.Store.Fetch(ctx, session, conn, most)
			return slices.DeleteFunc(got, func(m sessionrelay.Message) bool { return m.Attempts > 0 }), err
		}
	}},
	"attempts are not counted": {"Attempted", func(s *store) {
		s.fetch = func(session, conn string, most int) ([]sessionrelay.Message, error) {
			got, err := s.Store.Fetch(ctx, session, conn, most)
			for i := range got {
				got[i].Attempts = 0
			}
			return got, err
		}
	}},
	"what was tried is not delivered": {"Delivered", func(s *store) {
		s.delivered = func(session string, ids []string) error {
			i, _ := s.right(session)
			pending, _ := s.Store.Fetch(ctx, session, i.Home.Conn, 1000)
			for _, m := range pending {
				if slices.Contains(ids, m.ID) {
					_ = s.Store.Delivered(ctx, session, m.ID)
				}
			}
			return nil
		}
	}},
	"unknown ids are an error": {"Delivered", func(s *store) {
		s.delivered = func(session string, ids []string) error {
			if slices.Contains(ids, "never was") {
				return errors.New("no rows")
			}
			return s.Store.Delivered(ctx, session, ids...)
		}
	}},
	"dead letters rise with the next connection": {"DeadLetters", func(s *store) {
		s.register = func(h sessionrelay.Hello, conn string, limit int) (sessionrelay.Info, sessionrelay.Home, error) {
			i, before, err := s.Store.Register(ctx, h, conn, limit)
			dead, _ := s.Store.Buried(ctx, h.Session)
			for _, m := range dead {
				_ = s.Store.Revive(ctx, h.Session, m.ID)
			}
			return i, before, err
		}
	}},
	"dead letters are thrown away": {"DeadLetters", func(s *store) {
		s.bury = func(session, conn string, ids []string) error { return s.Store.Delivered(ctx, session, ids...) }
	}},
	"what is revived comes last": {"DeadLetters", func(s *store) {
		s.revive = func(session string, ids []string) error {
			dead, _ := s.Store.Buried(ctx, session)
			for _, m := range dead {
				if slices.Contains(ids, m.ID) {
					s.notes.Store(session+m.ID, true)
				}
			}
			return s.Store.Revive(ctx, session, ids...)
		}
		s.fetch = func(session, conn string, most int) ([]sessionrelay.Message, error) {
			got, err := s.Store.Fetch(ctx, session, conn, most)
			slices.SortStableFunc(got, func(a, b sessionrelay.Message) int {
				_, x := s.notes.Load(session + a.ID)
				_, y := s.notes.Load(session + b.ID)
				switch {
				case x == y:
					return 0
				case x:
					return 1
				}
				return -1
			})
			return got, err
		}
	}},
	"a correlation is read, not taken": {"Correlations", func(s *store) {
		s.take = func(session, id, answer string) ([]byte, bool, error) {
			c, ok, err := s.Store.Take(ctx, session, id, answer)
			if ok {
				s.notes.Store(session+" "+id, c)
			} else if was, is := s.notes.Load(session + " " + id); is {
				return was.([]byte), true, nil
			}
			return c, ok, err
		}
	}},
	"a correlation is gone once it is taken": {"Correlations", func(s *store) {
		s.take = func(session, id, _ string) ([]byte, bool, error) {
			return s.Store.Take(ctx, session, id, unique())
		}
	}},
	"a correlation that was answered is kept": {"Correlations", func(s *store) {
		s.complete = func(session, id, owner string, outcome []byte, _ ...string) error {
			return s.Store.Complete(ctx, session, id, owner, outcome)
		}
	}},
	"a message from a connection that was replaced is accepted": {"Accept", func(s *store) {
		s.accept = func(session, _, id, owner string, patience time.Duration) (sessionrelay.Claim, error) {
			return s.Store.Accept(ctx, session, "", id, owner, patience)
		}
	}},
	"an empty correlation is none": {"Correlations", func(s *store) {
		s.take = func(session, id, answer string) ([]byte, bool, error) {
			c, _, err := s.Store.Take(ctx, session, id, answer)
			return c, len(c) > 0, err
		}
	}},
	"no correlation is an empty one": {"Correlations", func(s *store) {
		s.put = func(_ context.Context, session string, m sessionrelay.Message, correlation []byte) (sessionrelay.Home, error) {
			return s.Store.Put(ctx, session, m, append([]byte{}, correlation...))
		}
	}},
	"a correlation goes with its message": {"Correlations", func(s *store) {
		s.delivered = func(session string, ids []string) error {
			for _, id := range ids {
				_, _, _ = s.Store.Take(ctx, session, id, "none")
			}
			return s.Store.Delivered(ctx, session, ids...)
		}
	}},
	"who reads first takes": {"TakeRace", func(s *store) {
		s.take = func(session, id, answer string) ([]byte, bool, error) {
			c, ok, err := s.Store.Take(ctx, session, id, answer)
			key := session + " " + id
			if ok {
				s.notes.Store(key, c)
				time.Sleep(time.Millisecond)
				s.notes.Delete(key)
			} else if was, is := s.notes.Load(key); is {
				return was.([]byte), true, nil
			}
			return c, ok, err
		}
	}},
	"payloads that are made valid UTF-8": {"Bytes", func(s *store) {
		s.put = func(_ context.Context, session string, m sessionrelay.Message, correlation []byte) (sessionrelay.Home, error) {
			if m.Payload != nil {
				m.Payload = bytes.ToValidUTF8(m.Payload, []byte("?"))
			}
			return s.Store.Put(ctx, session, m, correlation)
		}
	}},
	"no payload is an empty one": {"Bytes", func(s *store) {
		s.put = func(_ context.Context, session string, m sessionrelay.Message, correlation []byte) (sessionrelay.Home, error) {
			m.Payload = append([]byte{}, m.Payload...)
			return s.Store.Put(ctx, session, m, correlation)
		}
	}},
	"requests are messages": {"Bytes", func(s *store) {
		s.put = func(_ context.Context, session string, m sessionrelay.Message, correlation []byte) (sessionrelay.Home, error) {
			m.Request = false
			return s.Store.Put(ctx, session, m, correlation)
		}
	}},
	"sessions in a folding collation": {"Names", func(s *store) {
		s.lookup = func(session string) (sessionrelay.Info, error) { return s.right(strings.ToUpper(session)) }
		s.register = func(h sessionrelay.Hello, conn string, limit int) (sessionrelay.Info, sessionrelay.Home, error) {
			h.Session = strings.ToUpper(h.Session)
			return s.Store.Register(ctx, h, conn, limit)
		}
	}},
	"message ids without spaces around": {"Names", func(s *store) {
		s.put = func(_ context.Context, session string, m sessionrelay.Message, correlation []byte) (sessionrelay.Home, error) {
			m.ID = strings.TrimSpace(m.ID)
			return s.Store.Put(ctx, session, m, correlation)
		}
	}},
	"ids in text columns": {"Names", func(s *store) {
		s.accept = func(session, conn, id, owner string, patience time.Duration) (sessionrelay.Claim, error) {
			return s.Store.Accept(ctx, session, conn, strings.ToValidUTF8(strings.ReplaceAll(id, "\x00", ""), "?"), owner, patience)
		}
	}},
	"ids of at most 255 bytes": {"Names", func(s *store) {
		s.take = func(session, id, answer string) ([]byte, bool, error) {
			return s.Store.Take(ctx, session, id[:min(len(id), 255)], answer)
		}
	}},
	"what is fetched is what is stored": {"Copies", func(s *store) {
		s.fetch = func(session, conn string, most int) ([]sessionrelay.Message, error) {
			got, err := s.Store.Fetch(ctx, session, conn, most)
			for i := range got {
				was, _ := s.notes.LoadOrStore(session+got[i].ID, got[i].Payload)
				got[i].Payload = was.([]byte)
			}
			return got, err
		}
	}},
	"what is put is what is stored": {"Copies", func(s *store) {
		s.put = func(_ context.Context, session string, m sessionrelay.Message, correlation []byte) (sessionrelay.Home, error) {
			s.notes.LoadOrStore(session+m.ID, m.Payload)
			return s.Store.Put(ctx, session, m, correlation)
		}
		s.fetch = func(session, conn string, most int) ([]sessionrelay.Message, error) {
			got, err := s.Store.Fetch(ctx, session, conn, most)
			for i := range got {
				if was, ok := s.notes.Load(session + got[i].ID); ok {
					got[i].Payload = bytes.Clone(was.([]byte))
				}
			}
			return got, err
		}
	}},
	"the first 500": {"Many", func(s *store) {
		s.delivered = func(session string, ids []string) error {
			return s.Store.Delivered(ctx, session, ids[:min(len(ids), 500)]...)
		}
	}},
	"too many parameters": {"Many", func(s *store) {
		s.forget = func(session string, ids []string) error {
			if len(ids) > 1000 {
				return errors.New("too many SQL variables")
			}
			return s.Store.Forget(ctx, session, ids...)
		}
	}},
	"a context that is not looked at": {"Cancelled", func(s *store) {
		s.put = func(ctx context.Context, session string, m sessionrelay.Message, correlation []byte) (sessionrelay.Home, error) {
			if ctx.Err() != nil {
				time.Sleep(15 * time.Second)
			}
			return s.Store.Put(ctx, session, m, correlation)
		}
	}},
	"half of what was asked": {"Cancelled", func(s *store) {
		s.put = func(ctx context.Context, session string, m sessionrelay.Message, correlation []byte) (sessionrelay.Home, error) {
			if ctx.Err() != nil {
				correlation = nil
			}
			return s.Store.Put(ctx, session, m, correlation)
		}
	}},
	"a watch that hears nothing": {"Watch", func(s *store) {
		s.watch = func(string, func()) func() { return func() {} }
	}},
	"a watch that hears messages only": {"Watch", func(s *store) {
		s.watch = func(session string, changed func()) func() {
			old, _ := s.right(session)
			return s.memory.Watch(session, func() {
				if i, _ := s.right(session); i.Home == old.Home {
					changed()
				}
			})
		}
	}},
	"a watch that hears everybody": {"Watch", func(s *store) {
		s.watch = func(_ string, changed func()) func() {
			n, _ := s.notes.LoadOrStore("all", &sync.Map{})
			n.(*sync.Map).Store(&changed, changed)
			return func() { n.(*sync.Map).Delete(&changed) }
		}
		s.put = func(_ context.Context, session string, m sessionrelay.Message, correlation []byte) (sessionrelay.Home, error) {
			home, err := s.Store.Put(ctx, session, m, correlation)
			if n, ok := s.notes.Load("all"); ok {
				n.(*sync.Map).Range(func(_, changed any) bool { changed.(func())(); return true })
			}
			return home, err
		}
	}},
	"a watch that does not stop": {"Watch", func(s *store) {
		s.watch = func(session string, changed func()) func() { s.memory.Watch(session, changed); return func() {} }
	}},
	"an outage is the end of a session": {"Outage", func(s *store) {
		s.lookup = func(session string) (sessionrelay.Info, error) {
			if s.down {
				return sessionrelay.Info{}, sessionrelay.ErrGone
			}
			return s.right(session)
		}
	}},
	"an outage is nothing": {"Outage", func(s *store) {
		s.lookup = func(session string) (sessionrelay.Info, error) {
			if s.down {
				return sessionrelay.Info{}, nil
			}
			return s.right(session)
		}
	}},
	"an outage that outlasts the context": {"Outage", func(s *store) {
		s.lookup = func(session string) (sessionrelay.Info, error) {
			if s.down {
				time.Sleep(15 * time.Second)
				return sessionrelay.Info{}, errDown
			}
			return s.right(session)
		}
	}},
	"a panic": {"Outage", func(s *store) {
		s.lookup = func(session string) (sessionrelay.Info, error) {
			if s.down {
				panic("nil pointer")
			}
			return s.right(session)
		}
	}},
}

func (s *store) right(session string) (sessionrelay.Info, error) { return s.Store.Lookup(ctx, session) }

// sorted fetches by id.
func (s *store) sorted(session, conn string, most int) ([]sessionrelay.Message, error) {
	got, err := s.Store.Fetch(ctx, session, conn, 1000)
	slices.SortFunc(got, func(a, b sessionrelay.Message) int { return strings.Compare(a.ID, b.ID) })
	return got[:max(0, min(most, len(got)))], err
}

func word(s string) string {
	first, _, _ := strings.Cut(s, " ")
	return first
}

var counter struct {
	sync.Mutex
	n int
}

func unique() string {
	counter.Lock()
	defer counter.Unlock()
	counter.n++
	return fmt.Sprint(counter.n)
}

func TestSuiteCatches(t *testing.T) {
	idle := relaytest.Cases(with(right)) // cases that have caught nothing
	for name, f := range faults {
		idle = slices.DeleteFunc(idle, func(c string) bool { return c == f.by })
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				err := relaytest.Only(t, with(f.fault), f.by)
				require.Error(t, err, "by %s", f.by)
				t.Log(err)
			})
		})
	}
	assert.Empty(t, idle, "cases that nothing fails")
}
