package relaytest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sessionlock/sessionlock/internal/suite"
	"github.com/sessionlock/sessionlock/sessionrelay"
)

func (f *fleet) register() {
	session, user := f.name("s"), f.name("u")
	equal(f, "Node", f.a.Node(), f.name("node a"))
	h := sessionrelay.Hello{Session: session, User: user, Lib: "lib", App: "app", Version: "1.0"}
	info, before, err := f.a.Register(f.ctx, h, "c1", 1)
	f.wants("Register", err)
	equal(f, "home before the first", before, sessionrelay.Home{})
	want := sessionrelay.Info{
		Session: session, User: user, Lib: "lib", App: "app", Version: "1.0",
		Created: info.Created, Live: info.Live, Home: sessionrelay.Home{Node: f.a.Node(), Conn: "c1"},
	}
	equal(f, "Register", plain(info), plain(want))
	if info.Live.Before(info.Created) { // later, when the call was sent twice
		f.failf("Live is %v before Created", info.Created.Sub(info.Live))
	}
	if off := time.Until(info.Created).Abs(); off > 24*time.Hour {
		f.failf("Created is %v off: is it in another unit?", off)
	}
	for _, s := range f.stores {
		equal(f, "Lookup", f.looks(s, session), plain(info))
	}
}

func (f *fleet) reconnect() {
	session, user := f.name("s"), f.name("u")
	first, _, err := f.a.Register(f.ctx, hello(session, user), "c1", 1)
	f.wants("Register", err)
	before := first.Home
	later := sessionrelay.Hello{Session: session, User: user, Lib: "lib 2", App: "app 2", Version: "2"}
	for i, s := range []sessionrelay.Store{f.b, f.b, f.a} {
		f.Sleep(f.Tick / 4)
		conn := fmt.Sprint("c", i+2)
		info, old, err := s.Register(f.ctx, later, conn, 1)
		f.wants("Register of another connection", err)
		equal(f, "home before", old, before)
		want := sessionrelay.Info{
			Session: session, User: user, Lib: "lib 2", App: "app 2", Version: "2",
			Created: first.Created, Live: info.Live, Home: sessionrelay.Home{Node: s.Node(), Conn: conn},
		}
		equal(f, "Register of another connection", plain(info), plain(want))
		if !info.Live.After(first.Live) {
			f.failf("Live = %v, though it was %v before", info.Live, first.Live)
		}
		f.home(session, want.Home)
		_, old, err = s.Register(f.ctx, later, conn, 1)
		f.wants("Register sent again, as clients do when a reply is lost", err)
		equal(f, "home before, asked again", old, before)
		f.home(session, want.Home)
		before = want.Home
	}
}

func (f *fleet) wrongUser() {
	session, owner, eve := f.name("s"), f.name("owner"), f.name("eve")
	f.connects(f.a, session, owner, "c1")
	f.puts(session, "tried", "dead")
	f.wants("Attempted", f.a.Attempted(f.ctx, session, "c1", "tried"))
	f.wants("Bury", f.a.Bury(f.ctx, session, "c1", "dead"))
	_, err := f.b.Put(f.ctx, session, request("asked"), []byte("about"))
	f.wants("Put", err)
	f.accepts(f.a, session, "in", "owner", sessionrelay.Accepted)
	was := f.looks(f.a, session)
	refused := func() {
		f.Sleep(f.Tick / 4)
		for _, s := range f.stores {
			_, _, err := s.Register(f.ctx, sessionrelay.Hello{Session: session, User: eve, App: "other"}, "stolen", 1)
			f.wants("Register for another user", err, sessionrelay.ErrWrongUser)
		}
	}
	refused()
	equal(f, "the session after another user's attempts", f.looks(f.b, session), was)
	f.fetches(f.a, session, "c1", request("asked"))
	dead, err := f.b.Buried(f.ctx, session)
	f.wants("Buried", err)
	f.same("Buried", dead, messages("dead"))
	f.accepts(f.b, session, "in", "another", sessionrelay.InProgress)
	f.lists("the owner's", sessionrelay.Filter{User: owner}, session)
	f.lists("the other's", sessionrelay.Filter{User: eve})
	_, _, err = f.a.Register(f.ctx, hello(f.name("eve's own"), eve), "e1", 1)
	f.wants("Register of the other's own session, of which he may have one", err)

	f.wants("Deregister", f.a.Deregister(f.ctx, session, "c1"))
	refused()
	f.home(session, sessionrelay.Home{})
	f.connects(f.b, session, owner, "c2")
	f.took(f.b, session, "asked", []byte("about"))
}

func (f *fleet) limits() {
	user := f.name("u")
	n := 0
	register := func(session, user string, limit int) error {
		n++
		_, _, err := f.a.Register(f.ctx, hello(f.name(session), user), fmt.Sprint("c", n), limit)
		return err
	}
	f.wants("Register of the first of two", register("one", user, 2))
	f.wants("Register of the second of two", register("two", user, 2))
	for range 2 {
		f.wants("Register of a third of two", register("three", user, 2), sessionrelay.ErrCap)
	}
	_, err := f.b.Lookup(f.ctx, f.name("three"))
	f.wants("Lookup of a session that was refused", err, sessionrelay.ErrGone)
	f.lists("the user's", sessionrelay.Filter{User: user}, f.name("one"), f.name("two"))
	f.wants("Register of the second again, at the limit", register("two", user, 2))
	f.wants("Register of the first again, with a lower limit", register("one", user, 1))
	f.wants("Register for another user", register("other", f.name("other"), 1))

	_, err = f.b.Remove(f.ctx, f.name("one"))
	f.wants("Remove", err)
	f.wants("Register of a third after one was removed", register("three", user, 2))
	f.Sleep(2 * f.Tick)
	_, err = f.c.Expire(f.ctx, f.Tick)
	f.wants("Expire", err)
	f.wants("Register after the others timed out", register("four", user, 1))
}

func (f *fleet) capRace() {
	const limit = 5
	user := f.name("u")
	var in atomic.Int64
	f.crowd(30, func(i int, s sessionrelay.Store) error {
		_, _, err := s.Register(f.ctx, hello(f.name(fmt.Sprint("s", i)), user), fmt.Sprint("c", i), limit)
		switch {
		case err == nil:
			in.Add(1)
		case !errors.Is(err, sessionrelay.ErrCap):
			return err
		}
		return nil
	})
	equal(f, "accepted", in.Load(), limit)
	equal(f, "sessions", len(f.listed(sessionrelay.Filter{User: user})), limit)
}

func (f *fleet) oldConnections() {
	session, user := f.name("s"), f.name("u")
	f.connects(f.a, session, user, "c1")
	f.connects(f.b, session, user, "c2")
	f.connects(f.b, session, user, "c3")
	home := sessionrelay.Home{Node: f.b.Node(), Conn: "c3"}
	late := func(s sessionrelay.Store, conn, what string) {
		_, _, err := s.Register(f.ctx, hello(session, user), conn, plenty)
		f.wants("Register of a connection that was "+what, err, sessionrelay.ErrMoved)
		f.home(session, home)
	}
	late(f.a, "c1", "replaced")
	late(f.b, "c2", "replaced")
	f.wants("Deregister", f.b.Deregister(f.ctx, session, "c3"))
	home = sessionrelay.Home{}
	late(f.b, "c3", "given up")
	f.wants("Deregister of a connection whose Register is still under way", f.c.Deregister(f.ctx, session, "c4"))
	late(f.c, "c4", "given up")
	f.connects(f.a, session, user, "c5")
}

func (f *fleet) deregister() {
	session, user := f.name("s"), f.name("u")
	f.connects(f.a, session, user, "c1")
	f.connects(f.b, session, user, "c2")
	home := sessionrelay.Home{Node: f.b.Node(), Conn: "c2"}
	for what, err := range map[string]error{
		"an old connection":               f.a.Deregister(f.ctx, session, "c1"),
		"another node's connection":       f.a.Deregister(f.ctx, session, "c2"),
		"an old connection elsewhere":     f.b.Deregister(f.ctx, session, "c1"),
		"a connection that never was":     f.b.Deregister(f.ctx, session, "c"),
		"one of a session that is not":    f.b.Deregister(f.ctx, f.name("none"), "c2"),
		"no connection":                   f.b.Deregister(f.ctx, session, ""),
		"a session's of whom it is a bit": f.b.Deregister(f.ctx, session[:len(session)-1], "c2"),
	} {
		f.wants("Deregister of "+what, err)
		f.home(session, home)
	}
	f.connects(f.b, session, user, "c2") // sent again
	f.connects(f.b, session, user, "c3")
	f.wants("Deregister of an old connection of the same node", f.b.Deregister(f.ctx, session, "c2"))
	f.home(session, sessionrelay.Home{Node: f.b.Node(), Conn: "c3"})

	was := f.looks(f.b, session)
	was.Home = sessionrelay.Home{}
	for range 2 {
		f.wants("Deregister", f.b.Deregister(f.ctx, session, "c3"))
		equal(f, "a session after Deregister", f.looks(f.a, session), was)
	}
	home, err := f.a.Put(f.ctx, session, message("m"), nil)
	f.wants("Put to a session without a home", err)
	equal(f, "home", home, sessionrelay.Home{})
	_, before, err := f.a.Register(f.ctx, hello(session, user), "c4", plenty)
	f.wants("Register", err)
	equal(f, "home before, of a session that had none", before, sessionrelay.Home{})
}

func (f *fleet) remove() {
	session, user := f.name("s"), f.name("u")
	fill := func() {
		f.connects(f.a, session, user, "c1")
		f.puts(session, "new", "tried", "dead", "delivered")
		f.wants("Attempted", f.a.Attempted(f.ctx, session, "c1", "tried"))
		f.wants("Bury", f.a.Bury(f.ctx, session, "c1", "dead"))
		f.wants("Delivered", f.a.Delivered(f.ctx, session, "delivered"))
		_, err := f.a.Put(f.ctx, session, request("asked"), []byte("about"))
		f.wants("Put", err)
		f.accepts(f.a, session, "busy", "owner", sessionrelay.Accepted)
		f.accepts(f.a, session, "done", "owner", sessionrelay.Accepted)
		f.wants("Complete", f.a.Complete(f.ctx, session, "done", "owner", []byte("outcome")))
	}
	fill()
	other := f.session("other")
	f.puts(other, "m")
	for i := range 2 {
		existed, err := f.b.Remove(f.ctx, session)
		f.wants("Remove", err)
		equal(f, "whether it existed", existed, i == 0)
		for _, s := range f.stores {
			_, err := s.Lookup(f.ctx, session)
			f.wants("Lookup of a session that was removed", err, sessionrelay.ErrGone)
		}
	}
	f.lists("the user's", sessionrelay.Filter{User: user})
	f.lists("all", sessionrelay.Filter{}, other)
	homed, err := f.a.Homed(f.ctx)
	f.wants("Homed", err)
	equal(f, "sessions homed", len(homed), 1)

	user = f.name("another user") // the session is nobody's
	f.connects(f.a, session, user, "c2")
	f.fetches(f.a, session, "c2")
	dead, err := f.a.Buried(f.ctx, session)
	f.wants("Buried", err)
	f.same("Buried", dead, nil)
	f.took(f.a, session, "asked", nil)
	f.accepts(f.a, session, "busy", "another", sessionrelay.Accepted)
	f.accepts(f.a, session, "done", "another", sessionrelay.Accepted)
	f.puts(session, "tried", "delivered", "new")
	f.fetches(f.a, session, "c2", messages("tried", "delivered", "new")...)
	f.fetches(f.a, other, "c1", message("m"))
}

func (f *fleet) gone() {
	none := f.name("none")
	there := f.session("there") // so that a store has its tables
	f.puts(there, "m")
	calls := f.calls(none)
	for _, lost := range []string{"Lookup", "Accept", "Complete", "Put", "Fetch", "Attempted", "Bury", "Buried", "Revive"} {
		f.wants(lost, calls[lost](f.ctx), sessionrelay.ErrGone)
	}
	for _, nothing := range []string{"Deregister", "Remove", "Release", "Forget", "Delivered", "Take", "Alive"} {
		f.wants(nothing, calls[nothing](f.ctx))
	}
	existed, err := f.a.Remove(f.ctx, none)
	f.wants("Remove", err)
	equal(f, "whether it existed", existed, false)
	f.took(f.a, none, "m", nil)
	f.lists("all", sessionrelay.Filter{}, there)
	_, err = f.a.Lookup(f.ctx, none)
	f.wants("Lookup after all that", err, sessionrelay.ErrGone)
}

// calls are all that can be asked, about a session.
func (f *fleet) calls(session string) map[string]func(context.Context) error {
	s := f.a
	return map[string]func(context.Context) error{
		"Register": func(ctx context.Context) error {
			_, _, err := s.Register(ctx, hello(session, f.name("user")), "c9", plenty)
			return err
		},
		"Deregister": func(ctx context.Context) error { return s.Deregister(ctx, session, "c1") },
		"Lookup":     func(ctx context.Context) error { _, err := s.Lookup(ctx, session); return err },
		"Remove":     func(ctx context.Context) error { _, err := s.Remove(ctx, session); return err },
		"List": func(ctx context.Context) error {
			return s.List(ctx, sessionrelay.Filter{}, func(sessionrelay.Info) bool { return true })
		},
		"ListUser": func(ctx context.Context) error {
			return s.List(ctx, sessionrelay.Filter{User: f.name("user")}, func(sessionrelay.Info) bool { return true })
		},
		"Alive":    func(ctx context.Context) error { _, err := s.Alive(ctx, []string{session}); return err },
		"Expire":   func(ctx context.Context) error { _, err := s.Expire(ctx, time.Hour); return err },
		"Scavenge": func(ctx context.Context) error { _, err := s.Scavenge(ctx); return err },
		"Homed":    func(ctx context.Context) error { _, err := s.Homed(ctx); return err },
		"Accept": func(ctx context.Context) error {
			_, err := s.Accept(ctx, session, "", "i", "owner", time.Hour)
			return err
		},
		"Complete": func(ctx context.Context) error { return s.Complete(ctx, session, "i", "owner", []byte("done")) },
		"Release":  func(ctx context.Context) error { return s.Release(ctx, session, "i", "owner") },
		"Forget":   func(ctx context.Context) error { return s.Forget(ctx, session, "i") },
		"Put": func(ctx context.Context) error {
			_, err := s.Put(ctx, session, message("put"), []byte("about"))
			return err
		},
		"Fetch":     func(ctx context.Context) error { _, err := s.Fetch(ctx, session, "c1", 10); return err },
		"Attempted": func(ctx context.Context) error { return s.Attempted(ctx, session, "c1", "m") },
		"Delivered": func(ctx context.Context) error { return s.Delivered(ctx, session, "m") },
		"Bury":      func(ctx context.Context) error { return s.Bury(ctx, session, "c1", "m") },
		"Buried":    func(ctx context.Context) error { _, err := s.Buried(ctx, session); return err },
		"Revive":    func(ctx context.Context) error { return s.Revive(ctx, session, "m") },
		"Take":      func(ctx context.Context) error { _, _, err := s.Take(ctx, session, "m", "answer"); return err },
	}
}

func (f *fleet) moved() {
	session, user := f.name("s"), f.name("u")
	f.connects(f.a, session, user, "c1")
	f.puts(session, "m1", "m2")
	f.connects(f.b, session, user, "c2")
	refused := func(conn string) {
		_, err := f.a.Fetch(f.ctx, session, conn, plenty)
		f.wants("Fetch", err, sessionrelay.ErrMoved)
		f.wants("Attempted", f.a.Attempted(f.ctx, session, conn, "m1"), sessionrelay.ErrMoved)
		f.wants("Bury", f.a.Bury(f.ctx, session, conn, "m1"), sessionrelay.ErrMoved)
	}
	refused("c1")
	refused("")
	f.fetches(f.b, session, "c2", messages("m1", "m2")...)
	f.wants("Deregister", f.b.Deregister(f.ctx, session, "c2"))
	refused("c2")
	refused("")
	f.connects(f.b, session, user, "c3")
	f.fetches(f.b, session, "c3", messages("m1", "m2")...)
}

func (f *fleet) list() {
	ann, bob := f.name("ann"), f.name("bob")
	for _, s := range []struct {
		session, user, app, version string
		connected                   bool
	}{
		{"1", ann, f.name("x"), "9", true},
		{"2", ann, f.name("x"), "10", false},
		{"3", ann, f.name("y"), "9", false},
		{"4", bob, f.name("x"), "9.1", true},
		{"5", bob, f.name("y"), "", true},
	} {
		h := sessionrelay.Hello{Session: f.name(s.session), User: s.user, App: s.app, Version: s.version}
		_, _, err := f.a.Register(f.ctx, h, "c1", plenty)
		f.wants("Register", err)
		if !s.connected {
			f.wants("Deregister", f.a.Deregister(f.ctx, h.Session, "c1"))
		}
	}
	type filter = sessionrelay.Filter
	for what, tt := range map[string]struct {
		filter filter
		want   string
	}{
		"all":                       {filter{}, "1 2 3 4 5"},
		"the connected":             {filter{Connected: true}, "1 4 5"},
		"one user's":                {filter{User: ann}, "1 2 3"},
		"another's":                 {filter{User: bob}, "4 5"},
		"a user's who has none":     {filter{User: f.name("an")}, ""},
		"an app's":                  {filter{App: f.name("x")}, "1 2 4"},
		"an app's that nobody has":  {filter{App: f.name("")}, ""},
		"a version or later":        {filter{Since: "9"}, "1 3 4"},
		"10 or later, as a string":  {filter{Since: "10"}, "1 2 3 4"},
		"a user's and app's":        {filter{User: ann, App: f.name("x")}, "1 2"},
		"the connected of a user":   {filter{User: ann, Connected: true}, "1"},
		"an app's version":          {filter{App: f.name("x"), Since: "9"}, "1 4"},
		"an app's later version":    {filter{App: f.name("x"), Since: "9.0"}, "4"},
		"all constraints":           {filter{User: bob, App: f.name("x"), Since: "9", Connected: true}, "4"},
		"all constraints, none fit": {filter{User: ann, App: f.name("y"), Since: "9", Connected: true}, ""},
	} {
		var want []string
		for _, n := range strings.Fields(tt.want) {
			want = append(want, f.name(n))
		}
		f.lists(what, tt.filter, want...)
	}
	for _, stop := range []filter{{}, {User: ann}} {
		n := 0
		f.wants("List", f.a.List(f.ctx, stop, func(sessionrelay.Info) bool { n++; return false }))
		equal(f, "sessions listed until each returned false", n, 1)
	}
	var got sessionrelay.Info
	f.wants("List", f.c.List(f.ctx, filter{User: bob, Since: "9"}, func(i sessionrelay.Info) bool { got = i; return true }))
	equal(f, "what is listed", plain(got), f.looks(f.a, f.name("4")))
}

func (f *fleet) alive() {
	here, away := f.session("here"), f.session("away")
	f.wants("Deregister", f.a.Deregister(f.ctx, away, "c1"))
	quiet := f.session("quiet")
	was := map[string]sessionrelay.Info{}
	for _, s := range []string{here, away, quiet} {
		was[s] = f.looks(f.a, s)
	}
	f.Sleep(f.Tick)
	unknown, err := f.b.Alive(f.ctx, []string{here, f.name("none"), away, f.name("nor this")})
	f.wants("Alive", err)
	slices.Sort(unknown)
	if want := []string{f.name("none"), f.name("nor this")}; !slices.Equal(unknown, want) {
		f.failf("Alive reports %q as unknown, want %q", unknown, want)
	}
	for _, s := range unknown {
		_, err := f.a.Lookup(f.ctx, s)
		f.wants("Lookup of a session that was vouched for, but is none", err, sessionrelay.ErrGone)
	}
	for s, old := range was {
		now := f.looks(f.a, s)
		if now.Live.After(old.Live) != (s != quiet) {
			f.failf("%q: Live was %v, and is %v after Alive of others", s, old.Live, now.Live)
		}
		now.Live = old.Live
		equal(f, "a session after Alive", now, old)
	}
	unknown, err = f.a.Alive(f.ctx, nil)
	f.wants("Alive of none", err)
	equal(f, "unknown", len(unknown), 0)
}

func (f *fleet) expire() {
	here, away, live := f.name("here"), f.name("away"), f.name("live")
	user := f.name("u")
	for _, session := range []string{here, away, live} {
		f.connects(f.a, session, user, "c1")
	}
	f.wants("Deregister", f.a.Deregister(f.ctx, away, "c1"))
	f.puts(here, "m")
	f.puts(live, "m")
	expired, err := f.b.Expire(f.ctx, time.Hour)
	f.wants("Expire", err)
	if slices.ContainsFunc(expired, func(s string) bool { return strings.Contains(s, f.mark) }) {
		f.failf("Expire after an hour = %q, at once", expired)
	}
	f.Sleep(2 * f.Tick)
	f.within(func() {
		_, err := f.a.Alive(f.ctx, []string{live})
		f.wants("Alive", err)
		expired, err = f.b.Expire(f.ctx, f.Tick)
		f.wants("Expire", err)
	})
	slices.Sort(expired)
	mine := slices.DeleteFunc(expired, func(s string) bool { return !strings.Contains(s, f.mark) })
	if want := []string{away, here}; !slices.Equal(mine, want) {
		f.failf("Expire = %q, want %q", mine, want)
	}
	for _, session := range mine {
		_, err := f.a.Lookup(f.ctx, session)
		f.wants("Lookup of a session that timed out", err, sessionrelay.ErrGone)
	}
	f.lists("the user's", sessionrelay.Filter{User: user}, live)
	f.fetches(f.a, live, "c1", message("m"))
	f.Sleep(2 * f.Tick)
	expired, err = f.c.Expire(f.ctx, f.Tick)
	f.wants("Expire", err)
	if !slices.Contains(expired, live) || slices.Contains(expired, here) || slices.Contains(expired, away) {
		f.failf("second Expire = %q, want only %q of these, which is idle by now", expired, live)
	}
	f.connects(f.a, here, f.name("somebody else"), "c2")
	f.fetches(f.a, here, "c2")
}

func (f *fleet) expireOnce() {
	const n = 40
	want := map[string]int{}
	for i := range n {
		want[f.session(fmt.Sprint("s", i))] = 1
	}
	f.Sleep(2 * f.Tick)
	var mu sync.Mutex
	got := map[string]int{}
	f.crowd(12, func(_ int, s sessionrelay.Store) error {
		expired, err := s.Expire(f.ctx, f.Tick)
		mu.Lock()
		defer mu.Unlock()
		for _, session := range expired {
			got[session]++
		}
		return err
	})
	for session := range want {
		equal(f, "how many callers were told of a session", got[session], 1)
	}
}

func (f *fleet) scavenge() {
	keep, user := f.name("keep"), f.name("u")
	f.connects(f.a, keep, user, "c1")
	f.puts(keep, "m1", "m2")
	f.wants("Attempted", f.a.Attempted(f.ctx, keep, "c1", "m1"))
	f.accepts(f.a, keep, "in", "owner", sessionrelay.Accepted)
	_, err := f.a.Put(f.ctx, keep, request("asked"), []byte("about"))
	f.wants("Put", err)
	for i := range 3 {
		_, err := f.b.Remove(f.ctx, f.session(fmt.Sprint("gone", i)))
		f.wants("Remove", err)
	}
	was := f.looks(f.a, keep)
	_, err = f.c.Scavenge(f.ctx)
	f.wants("Scavenge", err)
	again, err := f.b.Scavenge(f.ctx)
	f.wants("Scavenge", err)
	equal(f, "found by a second Scavenge", again, 0)
	equal(f, "a session after Scavenge", f.looks(f.a, keep), was)
	f.fetches(f.a, keep, "c1", message("m2"), request("asked"))
	f.accepts(f.b, keep, "in", "another", sessionrelay.InProgress)
	f.took(f.b, keep, "asked", []byte("about"))
	f.lists("the user's", sessionrelay.Filter{User: user}, keep)
}

func (f *fleet) homed() {
	user := f.name("u")
	for _, session := range []string{"stays", "moves", "leaves", "ends", "returns", "reconnects"} {
		f.connects(f.a, f.name(session), user, "c1 of "+session)
	}
	f.connects(f.b, f.name("moves"), user, "c2")
	f.wants("Deregister", f.a.Deregister(f.ctx, f.name("leaves"), "c1 of leaves"))
	_, err := f.b.Remove(f.ctx, f.name("ends"))
	f.wants("Remove", err)
	f.connects(f.b, f.name("returns"), user, "c2")
	f.connects(f.a, f.name("returns"), user, "c3")
	f.connects(f.a, f.name("reconnects"), user, "c2") // and only then its old connection is given up
	f.wants("Deregister", f.a.Deregister(f.ctx, f.name("reconnects"), "c1 of reconnects"))
	for range 2 {
		for i, want := range [][]string{{"reconnects", "returns", "stays"}, {"moves"}, {}} {
			homed, err := f.stores[i].Homed(f.ctx)
			f.wants("Homed", err)
			got := []string{}
			for _, info := range homed {
				got = append(got, strings.TrimPrefix(info.Session, f.name("")))
				equal(f, "what is homed", plain(info), f.looks(f.c, info.Session))
			}
			slices.Sort(got)
			if !slices.Equal(got, want) {
				f.failf("homed at node %d = %q, want %q", i, got, want)
			}
		}
	}
}

func (f *fleet) accept() {
	one, two := f.session("one"), f.session("two")
	for range 2 {
		f.accepts(f.a, one, "i", "owner 1", sessionrelay.Accepted)
		f.accepts(f.b, one, "i", "owner 2", sessionrelay.InProgress)
	}
	f.accepts(f.b, two, "i", "owner 2", sessionrelay.Accepted)
	f.accepts(f.b, one, "j", "owner 2", sessionrelay.Accepted)
	f.wants("Complete", f.a.Complete(f.ctx, one, "i", "owner 1", []byte("outcome")))
	f.holds(one, "i", []byte("outcome"))
	f.accepts(f.a, one, "i", "owner 1", sessionrelay.Done)
	f.accepts(f.a, two, "i", "owner 1", sessionrelay.InProgress)
	f.wants("Complete of another node's claim by its owner", f.c.Complete(f.ctx, two, "i", "owner 2", nil))
	f.holds(two, "i", nil)
	f.connects(f.b, one, f.name("user of one"), "c2")
	f.holds(one, "i", []byte("outcome"))

	over := func(s sessionrelay.Store, session, conn, id string, want sessionrelay.State, no ...error) {
		claim, err := s.Accept(f.ctx, session, conn, id, "owner of "+id, time.Hour)
		f.wants("Accept over "+conn, err, no...)
		equal(f, "state over "+conn, claim.State, want)
	}
	over(f.b, one, "c2", "k", sessionrelay.Accepted)
	over(f.a, one, "c1", "k", 0, sessionrelay.ErrMoved)
	f.wants("Complete", f.b.Complete(f.ctx, one, "k", "owner of k", nil))
	f.wants("Forget", f.b.Forget(f.ctx, one, "k"))
	over(f.a, one, "c1", "k", 0, sessionrelay.ErrMoved) // the client sends it over c2, or has forgotten it
	over(f.b, one, "c2", "l", sessionrelay.Accepted)
	f.wants("Deregister", f.b.Deregister(f.ctx, one, "c2"))
	over(f.b, one, "c2", "m", 0, sessionrelay.ErrMoved)
	f.wants("Complete after the connection was lost", f.b.Complete(f.ctx, one, "l", "owner of l", []byte("done")))
	f.holds(one, "l", []byte("done"))
	over(f.b, f.name("nobody"), "c2", "m", 0, sessionrelay.ErrGone)
}

func (f *fleet) acceptRace() {
	session := f.session("s")
	for round := range 5 {
		id := fmt.Sprint("i", round)
		var winners, busy atomic.Int64
		f.crowd(30, func(i int, s sessionrelay.Store) error {
			claim, err := s.Accept(f.ctx, session, "", id, fmt.Sprint("owner ", i), time.Hour)
			switch claim.State {
			case sessionrelay.Accepted:
				winners.Add(1)
			case sessionrelay.InProgress:
				busy.Add(1)
			case sessionrelay.Done:
			}
			return err
		})
		equal(f, "owners", winners.Load(), 1)
		equal(f, "told that it is in progress", busy.Load(), 29)
	}
}

func (f *fleet) takeover() {
	session := f.session("s")
	claims := func(owner string, patience time.Duration, want sessionrelay.State) {
		claim, err := f.b.Accept(f.ctx, session, "", "i", owner, patience)
		f.wants("Accept", err)
		equal(f, "state, as told to "+owner, claim.State, want)
	}
	f.within(func() {
		claims("first", f.Tick, sessionrelay.Accepted)
		claims("second", time.Hour, sessionrelay.InProgress)
	})
	f.Sleep(2 * f.Tick)
	claims("second", time.Hour, sessionrelay.Accepted)
	claims("first", time.Hour, sessionrelay.InProgress)
	f.wants("Complete by who had it", f.a.Complete(f.ctx, session, "i", "first", []byte("late")), sessionrelay.ErrTaken)
	f.wants("Release by who had it", f.a.Release(f.ctx, session, "i", "first"))
	claims("third", time.Hour, sessionrelay.InProgress)
	f.wants("Complete", f.b.Complete(f.ctx, session, "i", "second", []byte("right")))
	f.holds(session, "i", []byte("right"))

	_, err := f.a.Accept(f.ctx, session, "", "alone", "slow", f.Tick)
	f.wants("Accept", err)
	_, err = f.a.Accept(f.ctx, session, "", "renewed", "slow", f.Tick)
	f.wants("Accept", err)
	f.accepts(f.a, session, "renewed", "slow", sessionrelay.Accepted)
	f.Sleep(2 * f.Tick)
	f.accepts(f.b, session, "renewed", "another", sessionrelay.InProgress)
	f.wants("Complete of what nobody has taken over", f.a.Complete(f.ctx, session, "alone", "slow", nil))
	f.holds(session, "alone", nil)
	f.Sleep(2 * f.Tick)
	f.holds(session, "alone", nil)
}

func (f *fleet) owner() {
	session := f.session("s")
	owners := []string{"a", "a b", "a ", " ", "b", "1:a", "a:", "A", "", "a\x00", "a\nb"}
	for i, owner := range owners {
		id := fmt.Sprint("i", i)
		f.wants("Complete of a message that nobody accepted", f.a.Complete(f.ctx, session, id, owner, []byte("x")), sessionrelay.ErrTaken)
		f.accepts(f.a, session, id, owner, sessionrelay.Accepted)
		for _, other := range owners {
			if other == owner {
				continue
			}
			f.accepts(f.b, session, id, other, sessionrelay.InProgress)
			f.wants("Complete by another", f.b.Complete(f.ctx, session, id, other, []byte("wrong")), sessionrelay.ErrTaken)
			f.wants("Release by another", f.b.Release(f.ctx, session, id, other))
		}
		f.accepts(f.b, session, id, "somebody", sessionrelay.InProgress)
		for range 2 {
			f.wants("Release", f.a.Release(f.ctx, session, id, owner))
		}
		f.accepts(f.b, session, id, "somebody", sessionrelay.Accepted)
		f.wants("Release", f.b.Release(f.ctx, session, id, "somebody"))

		f.accepts(f.a, session, id, owner, sessionrelay.Accepted)
		for range 2 {
			f.wants("Complete", f.a.Complete(f.ctx, session, id, owner, []byte("-right\n")))
		}
		for _, other := range owners {
			if other != owner {
				f.wants("Complete of what is done by another", f.b.Complete(f.ctx, session, id, other, []byte("wrong")), sessionrelay.ErrTaken)
			}
			f.wants("Release of what is done", f.a.Release(f.ctx, session, id, other))
		}
		f.holds(session, id, []byte("-right\n"))
	}
}

func (f *fleet) outcome() {
	session := f.session("s")
	for i, want := range [][]byte{nil, {}, []byte("text"), {0}, []byte("-"), []byte("+ \r\n"), every()} {
		id := fmt.Sprint("i", i)
		f.accepts(f.a, session, id, "owner", sessionrelay.Accepted)
		f.wants("Complete", f.b.Complete(f.ctx, session, id, "owner", want))
		f.holds(session, id, want)
		f.wants("Complete with another outcome", f.a.Complete(f.ctx, session, id, "owner", []byte("other")))
		f.holds(session, id, want)
	}
}

func (f *fleet) forget() {
	one, two := f.session("one"), f.session("two")
	for _, session := range []string{one, two} {
		for _, id := range []string{"busy", "done", "kept"} {
			f.accepts(f.a, session, id, "owner", sessionrelay.Accepted)
		}
		f.wants("Complete", f.a.Complete(f.ctx, session, "done", "owner", nil))
	}
	f.wants("Forget", f.b.Forget(f.ctx, one, "done", "never was", "busy"))
	f.wants("Forget of nothing", f.b.Forget(f.ctx, one))
	f.accepts(f.a, one, "done", "another", sessionrelay.Accepted)
	f.accepts(f.a, one, "busy", "another", sessionrelay.Accepted)
	f.accepts(f.a, one, "kept", "another", sessionrelay.InProgress)
	f.accepts(f.a, two, "done", "another", sessionrelay.Done)
	f.accepts(f.a, two, "busy", "another", sessionrelay.InProgress)
}

func (f *fleet) put() {
	one, two := f.session("one"), f.session("two")
	other := sessionrelay.Message{ID: "m1", Request: true, Payload: []byte("other")}
	again := func() {
		home, err := f.b.Put(f.ctx, one, other, []byte("about"))
		f.wants("Put of an id that is there", err)
		equal(f, "home", home, sessionrelay.Home{Node: f.a.Node(), Conn: "c1"})
		f.took(f.b, one, "m1", nil)
	}
	for range 2 {
		home, err := f.b.Put(f.ctx, one, message("m1"), nil)
		f.wants("Put", err)
		equal(f, "home", home, sessionrelay.Home{Node: f.a.Node(), Conn: "c1"})
	}
	again()
	f.fetches(f.a, one, "c1", message("m1"))
	f.wants("Attempted", f.a.Attempted(f.ctx, one, "c1", "m1"))
	again()
	f.fetches(f.a, one, "c1")
	f.wants("Bury", f.a.Bury(f.ctx, one, "c1", "m1"))
	again()
	f.fetches(f.a, one, "c1")
	dead, err := f.a.Buried(f.ctx, one)
	f.wants("Buried", err)
	f.same("Buried", dead, []sessionrelay.Message{tried(1, "m1")})
	f.wants("Delivered", f.a.Delivered(f.ctx, one, "m1"))
	again()
	f.fetches(f.a, one, "c1")

	f.puts(two, "m1")
	f.fetches(f.a, two, "c1", message("m1"))
	f.wants("Delivered of what never was", f.a.Delivered(f.ctx, one, "m2"))
	f.puts(one, "m2")
	f.fetches(f.a, one, "c1", message("m2"))
}

func (f *fleet) fetch() {
	session := f.session("s")
	f.fetches(f.a, session, "c1")
	ids := []string{"z", "a", "10", "9", "m", "Z", "0"}
	f.puts(session, ids...)
	for _, most := range []int{1, 3, 7, 8, 1 << 30} {
		got, err := f.a.Fetch(f.ctx, session, "c1", most)
		f.wants("Fetch", err)
		f.same(fmt.Sprintf("Fetch of %d", most), got, messages(ids[:min(most, len(ids))]...))
	}
	for _, most := range []int{0, -1, -1 << 30} {
		got, err := f.a.Fetch(f.ctx, session, "c1", most)
		f.wants("Fetch", err)
		f.same(fmt.Sprintf("Fetch of %d", most), got, nil)
	}
	f.wants("Attempted", f.a.Attempted(f.ctx, session, "c1", "z", "10", "Z"))
	f.fetches(f.a, session, "c1", messages("a", "9", "m", "0")...)
}

func (f *fleet) attempted() {
	session, user := f.session("s"), f.name("user of s")
	f.puts(session, "m1", "m2", "m3")
	for range 2 { // a request that was sent twice
		f.wants("Attempted", f.a.Attempted(f.ctx, session, "c1", "m2", "never was", "m3"))
	}
	f.fetches(f.a, session, "c1", message("m1"))
	f.connects(f.a, session, user, "c1") // likewise
	f.fetches(f.a, session, "c1", message("m1"))
	f.puts(session, "m4")
	f.connects(f.b, session, user, "c2")
	f.puts(session, "m5")
	f.fetches(f.b, session, "c2", message("m1"), tried(1, "m2"), tried(1, "m3"), message("m4"), message("m5"))
	f.wants("Attempted", f.b.Attempted(f.ctx, session, "c2", "m1", "m2", "m5"))
	f.fetches(f.b, session, "c2", tried(1, "m3"), message("m4"))
	f.wants("Deregister", f.b.Deregister(f.ctx, session, "c2"))
	f.connects(f.b, session, user, "c3")
	f.fetches(f.b, session, "c3", tried(1, "m1"), tried(2, "m2"), tried(1, "m3"), message("m4"), tried(1, "m5"))
	for i := range 20 {
		conn := f.connects(f.a, session, user, fmt.Sprint("d", i))
		f.wants("Attempted", f.a.Attempted(f.ctx, session, conn, "m2"))
	}
	conn := f.connects(f.a, session, user, "last")
	got, err := f.a.Fetch(f.ctx, session, conn, 2)
	f.wants("Fetch", err)
	f.same("Fetch", got, []sessionrelay.Message{tried(1, "m1"), tried(22, "m2")})
}

func (f *fleet) delivered() {
	one, two := f.session("one"), f.session("two")
	ids := []string{"new", "tried", "dead", "kept", "kept tried", "kept dead"}
	for _, session := range []string{one, two} {
		f.puts(session, ids...)
		f.wants("Attempted", f.a.Attempted(f.ctx, session, "c1", "tried", "kept tried"))
		f.wants("Bury", f.a.Bury(f.ctx, session, "c1", "dead", "kept dead"))
	}
	for range 2 {
		f.wants("Delivered", f.b.Delivered(f.ctx, one, "tried", "never was", "dead", "new"))
	}
	f.wants("Delivered of nothing", f.b.Delivered(f.ctx, one))
	f.fetches(f.a, one, "c1", message("kept"))
	f.wants("Revive", f.a.Revive(f.ctx, one, "dead", "kept dead"))
	f.connects(f.a, one, f.name("user of one"), "c2")
	f.fetches(f.a, one, "c2", message("kept"), tried(1, "kept tried"), message("kept dead"))
	f.wants("Attempted of what is delivered", f.a.Attempted(f.ctx, one, "c2", "new"))
	f.fetches(f.a, two, "c1", messages("new", "kept")...)
}

func (f *fleet) deadLetters() {
	session, user := f.session("s"), f.name("user of s")
	buries := func(want ...sessionrelay.Message) {
		dead, err := f.b.Buried(f.ctx, session)
		f.wants("Buried", err)
		f.same("Buried", dead, want)
	}
	buries()
	f.puts(session, "m1", "m2", "m3", "m4")
	f.wants("Attempted", f.a.Attempted(f.ctx, session, "c1", "m1", "m2"))
	for range 2 { // a request that was sent twice
		f.wants("Bury", f.a.Bury(f.ctx, session, "c1", "m3", "never was", "m2"))
	}
	f.fetches(f.a, session, "c1", message("m4"))
	buries(tried(1, "m2"), message("m3"))
	f.connects(f.b, session, user, "c2")
	f.wants("Attempted of a dead letter", f.b.Attempted(f.ctx, session, "c2", "m3"))
	f.fetches(f.b, session, "c2", tried(1, "m1"), message("m4"))
	buries(tried(1, "m2"), message("m3"))

	f.wants("Attempted", f.b.Attempted(f.ctx, session, "c2", "m1"))
	for range 2 {
		f.wants("Revive", f.a.Revive(f.ctx, session, "m2", "never was", "m1", "m4"))
	}
	f.fetches(f.b, session, "c2", messages("m2", "m4")...)
	buries(message("m3"))
	f.wants("Attempted", f.b.Attempted(f.ctx, session, "c2", "m2"))
	f.wants("Revive of what was revived and tried", f.a.Revive(f.ctx, session, "m2"))
	f.fetches(f.b, session, "c2", message("m4"))
	f.connects(f.b, session, user, "c3")
	f.fetches(f.b, session, "c3", tried(2, "m1"), tried(1, "m2"), message("m4"))
	f.wants("Delivered", f.b.Delivered(f.ctx, session, "m3"))
	buries()
}

func (f *fleet) order() {
	const senders, each = 6, 40
	session := f.session("s")
	f.crowd(senders, func(i int, s sessionrelay.Store) error {
		for n := range each {
			if _, err := s.Put(f.ctx, session, message(fmt.Sprint(i, " ", n)), nil); err != nil {
				return err
			}
		}
		return nil
	})
	next := make([]int, senders)
	for {
		got, err := f.a.Fetch(f.ctx, session, "c1", 7)
		f.wants("Fetch", err)
		if len(got) == 0 {
			break
		}
		for _, m := range got {
			var i, n int
			_, _ = fmt.Sscan(m.ID, &i, &n)
			f.same("Fetch", []sessionrelay.Message{m}, messages(fmt.Sprint(i, " ", next[i])))
			next[i]++
			f.wants("Delivered", f.a.Delivered(f.ctx, session, m.ID))
		}
	}
	for _, n := range next {
		equal(f, "messages of one sender", n, each)
	}
}

func (f *fleet) correlations() {
	one, two := f.session("one"), f.session("two")
	asks := func(id string, correlation []byte) {
		_, err := f.b.Put(f.ctx, one, sessionrelay.Message{ID: id, Request: true}, correlation)
		f.wants("Put", err)
	}
	asks("about", []byte("about"))
	asks("about", []byte("something else"))
	f.took(f.c, two, "about", nil)
	f.took(f.c, one, "abou", nil)
	f.took(f.c, one, "about", []byte("about"))
	f.took(f.a, one, "about", nil)
	asks("about", []byte("again")) // sent twice
	f.took(f.a, one, "about", nil)
	asks("nothing", nil)
	f.took(f.a, one, "nothing", nil)
	asks("empty", []byte{})
	f.took(f.a, one, "empty", []byte{})
	f.took(f.a, one, "empty", nil)
	asks("delivered", []byte("about"))
	f.wants("Attempted", f.a.Attempted(f.ctx, one, "c1", "delivered"))
	f.wants("Delivered", f.a.Delivered(f.ctx, one, "delivered"))
	f.took(f.a, one, "delivered", []byte("about"))
	asks("dead", []byte("about"))
	f.wants("Bury", f.a.Bury(f.ctx, one, "c1", "dead"))
	f.connects(f.b, one, f.name("user of one"), "c2")
	f.took(f.a, one, "dead", []byte("about"))
	f.took(f.a, one, "never was", nil)

	asks("again", []byte("about"))
	takes := func(s sessionrelay.Store, answer string, want bool) {
		got, ok, err := s.Take(f.ctx, one, "again", answer)
		f.wants("Take", err)
		equal(f, "taken by "+answer, ok, want)
		equal(f, "correlation for "+answer, string(got) == "about", want)
	}
	takes(f.a, "first", true)
	takes(f.b, "second", false)
	takes(f.c, "first", true) // its handler failed, and it came again
	f.accepts(f.a, one, "first", "owner", sessionrelay.Accepted)
	f.wants("Complete", f.a.Complete(f.ctx, one, "first", "owner", nil, "again", "never was"))
	takes(f.a, "first", false)
	takes(f.a, "second", false)
	asks("kept", []byte("about"))
	f.accepts(f.a, one, "other", "owner", sessionrelay.Accepted)
	f.wants("Complete of a message that did not take it", f.a.Complete(f.ctx, one, "other", "owner", nil, "kept"))
	f.took(f.b, one, "kept", []byte("about"))
}

func (f *fleet) takeRace() {
	session := f.session("s")
	for round := range 5 {
		id := fmt.Sprint("r", round)
		_, err := f.a.Put(f.ctx, session, sessionrelay.Message{ID: id, Request: true}, []byte(id))
		f.wants("Put", err)
		var winners atomic.Int64
		f.crowd(100, func(_ int, s sessionrelay.Store) error {
			got, ok, err := s.Take(f.ctx, session, id, f.answer())
			if ok {
				winners.Add(1)
			}
			if ok != (string(got) == id) {
				return fmt.Errorf("Take = %q, %t", got, ok)
			}
			return err
		})
		equal(f, "winners", winners.Load(), 1)
	}
}

// every is all bytes, in a hundred kilobytes.
func every() []byte {
	all := make([]byte, 256)
	for i := range all {
		all[i] = byte(i)
	}
	return bytes.Repeat(all, 400)
}

func (f *fleet) opaque() {
	session := f.session("s")
	values := [][]byte{
		nil,
		{},
		{0},
		[]byte("nil"), []byte("\r\n"), []byte(" "), []byte("0"), []byte("-1"), []byte("1e3"),
		[]byte("\xc3\x28 not UTF-8 \xed\xa0\x80"), []byte("trailing \x00\x00"), []byte("M"), []byte("null"), every(),
	}
	var want []sessionrelay.Message
	for i, v := range values {
		m := sessionrelay.Message{ID: fmt.Sprint("m", i), Request: i%2 == 0, Payload: v}
		_, err := f.b.Put(f.ctx, session, m, v)
		f.wants("Put", err)
		want = append(want, m)
	}
	f.fetches(f.a, session, "c1", want...)
	for i, v := range values {
		f.took(f.c, session, want[i].ID, v)
	}
	ids := make([]string, len(want))
	for i := range want {
		ids[i] = want[i].ID
	}
	f.wants("Bury", f.a.Bury(f.ctx, session, "c1", ids...))
	dead, err := f.a.Buried(f.ctx, session)
	f.wants("Buried", err)
	f.same("Buried", dead, want)
}

// awkward are legal and easy to mix up or to misread: by separators, hash tags, globs,
// LIKE patterns, collations that fold case, normal forms.
func awkward() []string {
	return []string{
		"k", "K", "{k}", "{k}:k", "k}{", ":", "k:", "1:k", "*", "k?[a-z]", "%", "_", "../k", `k\`, `k'"`, "k;--", "k k", " k", "k ",
		"\x00", "k\x00", "k\x00k", "k\r\nk", "\xff", "é", "e\u0301", "מ", "😀", "+inf", "(1", "-", strings.Repeat("l", 255), strings.Repeat("l", 256),
	}
}

func (f *fleet) names() {
	names := awkward()
	session := func(name string) string {
		if len(name) >= 200 { // room for the mark
			name = name[len(f.name("")):]
		}
		return f.name(name)
	}
	for _, name := range names {
		info, _, err := f.a.Register(f.ctx, sessionrelay.Hello{Session: session(name), User: session(name), App: name, Lib: name, Version: name}, name, 1)
		f.wants(fmt.Sprintf("Register of %q", name), err)
		equal(f, "Register", info.App+info.Lib+info.Version+info.Home.Conn, name+name+name+name)
		f.accepts(f.a, session(name), name, name, sessionrelay.Accepted)
		_, err = f.b.Put(f.ctx, session(name), message(name), []byte("about "+name))
		f.wants("Put", err)
	}
	shared := f.session("shared")
	f.puts(shared, names...)
	f.fetches(f.a, shared, "c1", messages(names...)...)
	for _, name := range names {
		f.home(session(name), sessionrelay.Home{Node: f.a.Node(), Conn: name})
		f.lists("a user's", sessionrelay.Filter{User: session(name)}, session(name))
		f.lists("an app's", sessionrelay.Filter{User: session(name), App: name, Since: name}, session(name))
		f.fetches(f.a, session(name), name, message(name))
		f.accepts(f.b, shared, name, "in "+name, sessionrelay.Accepted)
		f.wants("Complete", f.b.Complete(f.ctx, session(name), name, name, []byte(name)))
	}
	for i, name := range names {
		f.holds(session(name), name, []byte(name))
		f.took(f.c, session(name), name, []byte("about "+name))
		f.wants("Delivered", f.b.Delivered(f.ctx, shared, name))
		f.wants("Forget", f.b.Forget(f.ctx, shared, name))
		f.accepts(f.b, shared, name, "another", sessionrelay.Accepted)
		f.fetches(f.a, shared, "c1", messages(names[i+1:]...)...)
		existed, err := f.c.Remove(f.ctx, session(name))
		f.wants("Remove", err)
		equal(f, "whether it existed", existed, true)
		for _, other := range names[i+1:] {
			f.looks(f.a, session(other))
		}
	}
}

// copies writes over every slice that has crossed the interface.
func (f *fleet) copies() {
	session := f.session("s")
	scribble := func(b []byte) {
		for i := range b {
			b[i] = 'x'
		}
	}
	payload, about, outcome := []byte("payload of m"), []byte("about"), []byte("outcome")
	_, err := f.a.Put(f.ctx, session, sessionrelay.Message{ID: "m", Payload: payload}, about)
	f.wants("Put", err)
	f.accepts(f.a, session, "i", "owner", sessionrelay.Accepted)
	f.wants("Complete", f.a.Complete(f.ctx, session, "i", "owner", outcome))
	if string(payload) != "payload of m" || string(about) != "about" || string(outcome) != "outcome" {
		f.failf("arguments were written to: %q, %q, %q", payload, about, outcome)
	}
	scribble(payload)
	scribble(about)
	scribble(outcome)
	for range 2 {
		got, err := f.a.Fetch(f.ctx, session, "c1", 1)
		f.wants("Fetch", err)
		f.same("Fetch, after slices were written to", got, messages("m"))
		scribble(got[0].Payload)
		claim, err := f.a.Accept(f.ctx, session, "", "i", "owner", time.Hour)
		f.wants("Accept", err)
		equal(f, "outcome, after slices were written to", string(claim.Outcome), "outcome")
		scribble(claim.Outcome)
	}
	f.took(f.a, session, "m", []byte("about"))
	f.wants("Bury", f.a.Bury(f.ctx, session, "c1", "m"))
	for range 2 {
		dead, err := f.a.Buried(f.ctx, session)
		f.wants("Buried", err)
		f.same("Buried, after slices were written to", dead, messages("m"))
		scribble(dead[0].Payload)
	}
}

func (f *fleet) many() {
	const n = 1200
	session, user := f.session("s"), f.name("user of s")
	ids, unknown := make([]string, n), make([]string, n)
	for i := range n {
		ids[i], unknown[i] = fmt.Sprint("m", i), f.name(fmt.Sprint("none ", i))
	}
	f.crowd(10, func(i int, s sessionrelay.Store) error {
		for k := i; k < n; k += 10 {
			if _, err := s.Put(f.ctx, session, message(ids[k]), nil); err != nil {
				return err
			}
			if _, err := s.Accept(f.ctx, session, "", ids[k], "owner", time.Hour); err != nil {
				return err
			}
		}
		return nil
	})
	all := append(slices.Clone(unknown), ids...)
	count := func(conn string, want int) {
		seen := map[string]bool{}
		for {
			got, err := f.a.Fetch(f.ctx, session, conn, n)
			f.wants("Fetch", err)
			if len(got) == 0 {
				break
			}
			var some []string
			for _, m := range got {
				seen[m.ID] = true
				some = append(some, m.ID)
			}
			f.wants("Attempted", f.a.Attempted(f.ctx, session, conn, some...))
		}
		equal(f, "messages fetched", len(seen), want)
	}
	f.wants("Attempted", f.a.Attempted(f.ctx, session, "c1", all...))
	count("c1", 0)
	f.connects(f.a, session, user, "c2")
	count("c2", n)
	f.wants("Bury", f.a.Bury(f.ctx, session, "c2", all...))
	dead, err := f.a.Buried(f.ctx, session)
	f.wants("Buried", err)
	equal(f, "dead letters", len(dead), n)
	f.wants("Revive", f.a.Revive(f.ctx, session, all...))
	count("c2", n)
	f.wants("Delivered", f.a.Delivered(f.ctx, session, all...))
	f.connects(f.a, session, user, "c3")
	count("c3", 0)
	f.wants("Forget", f.a.Forget(f.ctx, session, all...))
	f.accepts(f.a, session, ids[n-1], "another", sessionrelay.Accepted)
	got, err := f.a.Alive(f.ctx, append(unknown, session))
	f.wants("Alive", err)
	equal(f, "unknown sessions", len(got), n)
}

func (f *fleet) cancelled() {
	session := f.session("s")
	f.connects(f.a, session, f.name("user of s"), "c2")
	ctx, cancel := context.WithCancel(f.ctx)
	cancel()
	for name, call := range f.calls(session) {
		start := time.Now()
		_ = call(ctx) // a store may be as quick as that, or not
		if took := time.Since(start); took > suite.Patience/3 {
			f.failf("%s with a cancelled context took %v", name, took)
		}
	}
	session = f.session("t")
	for i := range 20 {
		id := fmt.Sprint("m", i)
		_, putErr := f.a.Put(ctx, session, message(id), []byte("about"))
		fetched, err := f.a.Fetch(f.ctx, session, "c1", plenty)
		f.wants("Fetch", err)
		if !slices.ContainsFunc(fetched, func(m sessionrelay.Message) bool { return m.ID == id }) {
			if putErr == nil {
				f.failf("Put with a cancelled context: no error, and no message")
			}
			continue
		}
		f.took(f.a, session, id, []byte("about"))
	}
}

func (f *fleet) watch() {
	w, ok := f.a.(interface {
		Watch(session string, changed func()) (stop func())
	})
	if !ok {
		f.t.Log("no Watch: nodes will look with each sign of life")
		return
	}
	const rounds = 20
	session, other, user := f.session("s"), f.session("other"), f.name("user of s")
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

	n := 0
	changes := []func(){
		func() { f.puts(session, fmt.Sprint("m", n)) },
		func() { f.connects(f.b, session, user, fmt.Sprint("d", n)) },
		func() {
			_, err := f.c.Remove(f.ctx, session)
			f.wants("Remove", err)
			f.connects(f.b, session, user, fmt.Sprint("e", n))
		},
	}
	heard := func(within time.Duration, change func()) bool {
		n++
		change()
		select {
		case <-woken:
			return true
		case <-time.After(within):
			return false
		}
	}
	force := false // a watch may take a while to be in force
	for try := 0; try < 100 && !force; try++ {
		force = heard(100*time.Millisecond, changes[0])
	}
	if !force {
		f.failf("never called, through %d messages", n)
	}
	stopLate()
	time.Sleep(10 * time.Millisecond) // calls that are under way
	before, beforeOthers := late.Load(), others.Load()
	for i, change := range changes {
		missed := 0
		for range rounds {
			if !heard(time.Second, change) {
				missed++
			}
			if missed > rounds/2 {
				f.failf("not called after most changes of kind %d", i)
			}
		}
	}
	if n := others.Load() - beforeOthers; n > rounds/2 {
		f.failf("a watch of another session was called %d times", n)
	}
	if n := late.Load() - before; n > 1 {
		f.failf("called %d times after stop had returned", n)
	}
}

func (f *fleet) outage() {
	session := f.session("s")
	f.puts(session, "m")
	f.Outage(f.t, f.a)
	for name, call := range f.calls(session) {
		ctx, cancel := context.WithTimeout(f.ctx, suite.Patience/30)
		start := time.Now()
		err := call(ctx)
		cancel()
		if took := time.Since(start); took > suite.Patience/3 {
			f.failf("%s during an outage took %v, though its context had ended", name, took)
		}
		f.wants(name+" during an outage", err, sessionrelay.ErrUnavailable, context.DeadlineExceeded)
		for _, state := range []error{sessionrelay.ErrGone, sessionrelay.ErrMoved, sessionrelay.ErrTaken, sessionrelay.ErrCap, sessionrelay.ErrWrongUser} {
			if errors.Is(err, state) {
				f.failf("%s during an outage: %w", name, err)
			}
		}
	}
}
