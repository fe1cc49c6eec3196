package main

// table.go is the table of situations: what two processes do in each, and what has
// to come of it.

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/sessionlock/sessionlock"
)

// row is a situation.
type row struct {
	situation string
	warm      float64 // how old the session is that another process has stored, in minutes; 0: there is none
	noCache   bool    // nothing is shared, nor kept from one communication to the next
	noRetry   bool
	run       func(ctx context.Context, p *play) error
	want      seen
}

// seen is what came of a row.
type seen struct {
	calls []string // in their order, as the server saw them since the row began
	after string   // the session that the fleet shares now, by its number
}

// What a session's life is after a row. That of a fresh one counts from its last use.
const (
	empty  = "none"
	fresh  = ", fresh"
	stale  = ", not renewed"
	nobody = "-" // there is no cache
)

// The table. Up to the empty line its rows are those of FMDataAPI.
func table() []row {
	return []row{
		{
			situation: "cold, scope with 3 calls", run: three,
			want: seen{[]string{"login 1", "list 1", "list 1", "list 1"}, "session 1" + fresh},
		},
		{
			situation: "warm, scope with 3 calls", warm: 1, run: three,
			want: seen{[]string{"list 1", "list 1", "list 1"}, "session 1" + fresh},
		},
		{
			situation: "warm, single call without scope", warm: 0.5, run: single,
			want: seen{[]string{"list 1"}, "session 1" + stale},
		},
		{
			situation: "cached token dead", warm: 1, run: dead(single),
			want: seen{[]string{"list 1: 952", "login 2", "list 2"}, "session 2" + fresh},
		},
		{
			situation: "another worker replaced the token during our scope", warm: 1, run: replaced,
			want: seen{[]string{"list 1", "login 2", "list 2", "logout 1"}, "session 2" + fresh},
		},
		{
			situation: "entry expired during our scope", warm: 1, run: expired,
			want: seen{[]string{"list 1", "logout 1"}, empty},
		},
		{
			situation: "no cache, retry off", noCache: true, noRetry: true, run: three,
			want: seen{[]string{"login 1", "list 1", "list 1", "list 1", "logout 1"}, nobody},
		},
		{
			situation: "no cache, retry off, 952 in scope", noCache: true, noRetry: true, run: deadInScope(codeToken),
			want: seen{[]string{"login 1", "list 1", "list 1: 952", "logout 1: 952"}, nobody},
		},
		{
			situation: "no cache, retry on, 952 in scope", noCache: true, run: deadInScope(codeOK),
			want: seen{[]string{"login 1", "list 1", "list 1: 952", "login 2", "list 2", "list 2", "logout 2"}, nobody},
		},

		{
			situation: "nothing found (401)", warm: 0.5, run: nothingFound,
			want: seen{[]string{"find 1: 401"}, "session 1" + stale},
		},
		{
			situation: "window missing (112) in a find", warm: 1, run: windowInFind,
			want: seen{[]string{"find 1: 112", "login 2", "find 2"}, "session 2" + fresh},
		},
		{
			situation: "window missing (112) while a record is created", warm: 1, run: windowInCreate,
			want: seen{[]string{"create 1: 112"}, empty},
		},
		{
			situation: "global fields, and a dead token in their scope", run: globals,
			want: seen{[]string{"login 1", "globals 1", "list 1", "list 1: 952", "login 2", "globals 2", "list 2"}, "session 2" + fresh},
		},
		{
			situation: "no room for a session (812)", run: noRoom,
			want: seen{[]string{"login: 812", "login 1", "list 1"}, "session 1" + fresh},
		},
		{
			situation: "wrong password (212)", run: wrongPassword,
			want: seen{[]string{"login: 212"}, empty},
		},
	}
}

const layout = "customers"

// ada is the record that there is.
var ada = fields{"name": "Ada"}

// three is a scope with three calls, a minute each.
func three(ctx context.Context, p *play) error {
	return p.us.communicate(ctx, nil, func(ctx context.Context) error {
		for range 3 {
			if err := p.list(ctx, p.us); err != nil {
				return err
			}
			p.wait(ctx, 1)
		}
		return nil
	})
}

func single(ctx context.Context, p *play) error { return p.list(ctx, p.us) }

// dead has an administrator end the session first.
func dead(then func(context.Context, *play) error) func(context.Context, *play) error {
	return func(ctx context.Context, p *play) error {
		p.fm.disconnect(p.account)
		return then(ctx, p)
	}
}

// deadInScope has the second call of a scope meet a dead session. With a code that
// is what the call comes to, and else another one follows.
func deadInScope(code int) func(context.Context, *play) error {
	return func(ctx context.Context, p *play) error {
		return p.us.communicate(ctx, nil, func(ctx context.Context) error {
			if err := p.list(ctx, p.us); err != nil {
				return err
			}
			p.fm.disconnect(p.account)
			if err := p.list(ctx, p.us); code != codeOK || err != nil {
				return surfaced(err, code)
			}
			return p.list(ctx, p.us)
		})
	}
}

// replaced has a scope whose session nobody uses for so long that the next process
// to come takes another.
func replaced(ctx context.Context, p *play) error {
	return p.us.communicate(ctx, nil, func(ctx context.Context) error {
		if err := errors.Join(p.list(ctx, p.us), p.expiry(ctx)); err != nil {
			return err
		}
		return p.list(ctx, p.other)
	})
}

func expired(ctx context.Context, p *play) error {
	return p.us.communicate(ctx, nil, func(ctx context.Context) error {
		return errors.Join(p.list(ctx, p.us), p.expiry(ctx))
	})
}

func nothingFound(ctx context.Context, p *play) error {
	got, err := p.us.find(ctx, layout, fields{"name": "nobody"})
	if err == nil && len(got) > 0 {
		err = errors.New("found what there is not")
	}
	return err
}

func windowInFind(ctx context.Context, p *play) error {
	p.fm.fail(p.account, callFind, codeWindow)
	got, err := p.us.find(ctx, layout, ada)
	if err == nil && len(got) != 1 {
		err = fmt.Errorf("%d records found", len(got))
	}
	return err
}

func windowInCreate(ctx context.Context, p *play) error {
	p.fm.fail(p.account, callCreate, codeWindow)
	charles := fields{"name": "Charles"}
	if err := surfaced(p.us.create(ctx, layout, charles), codeWindow); err != nil {
		return err
	}
	if n := p.fm.count(p.us.database, charles); n != 1 {
		return fmt.Errorf("the record is there %d times", n)
	}
	return nil
}

func globals(ctx context.Context, p *play) error {
	company := fields{"company": "Acme"}
	list := func(ctx context.Context) error {
		got, err := p.us.list(ctx, layout)
		if err == nil && (len(got) == 0 || !matches(got[0], company)) {
			err = errors.New("the session does not have its global fields")
		}
		return err
	}
	return p.us.communicate(ctx, company, func(ctx context.Context) error {
		if err := list(ctx); err != nil {
			return err
		}
		p.fm.disconnect(p.account)
		return list(ctx)
	})
}

// noRoom has neither process log in again before the back-off is over.
func noRoom(ctx context.Context, p *play) error {
	p.fm.fail(p.account, callLogin, codeNoRoom)
	first, second := p.list(ctx, p.us), p.list(ctx, p.other)
	if !deferred(first) || !deferred(second) {
		return fmt.Errorf("login not deferred: %w", errors.Join(first, second))
	}
	st, err := p.other.sessions.Inspect(ctx, p.account)
	if err != nil || st.Attempts > 0 {
		return fmt.Errorf("%d logins counted: %w", st.Attempts, err)
	}
	pause(ctx, time.Until(st.SuppressedUntil)+p.minute/10)
	return p.list(ctx, p.other)
}

func deferred(err error) bool {
	var login *sessionlock.LoginError
	return errors.As(err, &login) && login.Class == sessionlock.LoginDeferred
}

func wrongPassword(ctx context.Context, p *play) error {
	p.fm.admit(p.account, "another")
	for _, d := range []*database{p.us, p.other} {
		if err := p.list(ctx, d); !errors.Is(err, sessionlock.ErrDenied) {
			return fmt.Errorf("login not denied: %w", err)
		}
	}
	return nil
}

// surfaced expects of a call that it failed with a code of FileMaker.
func surfaced(err error, code int) error {
	var refusal *fileMakerError
	if code == codeOK || errors.As(err, &refusal) && refusal.code == code {
		return nil
	}
	return fmt.Errorf("no error %d: %w", code, err)
}

// stage is where rows are played, each with an account of its own.
type stage struct {
	fm     *fileMaker
	server string
	base   http.RoundTripper
	store  []sessionlock.Option // what the processes share
	minute time.Duration
}

// play is one row that is being played: two processes, and how the time passes.
type play struct {
	*stage
	account   string
	us, other *database
}

const password = "secret"

func (s *stage) open(account string, r row) (*database, error) {
	set := settings{
		server: s.server, database: account + "'s", account: account,
		secret: func(string) (string, string) { return password, "1" },
		minute: s.minute, base: s.base, noRetry: r.noRetry, options: s.store,
	}
	if r.noCache {
		set.options = []sessionlock.Option{sessionlock.WithCache(noCache{})}
	}
	return open(set)
}

// play plays r and returns what the server and the fleet have of it.
func (s *stage) play(ctx context.Context, account string, r row) (got seen, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("%s: %w", r.situation, err)
		}
	}()
	us, err1 := s.open(account, r)
	other, err2 := s.open(account, row{})
	operator, err3 := s.open(account, row{}) // looks, and is none of the fleet's
	if err := errors.Join(err1, err2, err3); err != nil {
		return got, err
	}
	defer operator.sessions.Close(ctx)
	p := &play{s, account, us, other}
	s.fm.admit(account, password)
	s.fm.add(us.database, ada)
	if r.warm > 0 {
		if _, err := other.sessions.Session(ctx, account); err != nil {
			return got, err
		}
		p.wait(ctx, r.warm)
	}
	had := len(s.fm.calls(account))
	err = r.run(ctx, p)
	end := time.Now()
	p.wait(ctx, 0.1) // for what is done beside the callers
	err = errors.Join(err, us.sessions.Close(ctx), other.sessions.Close(ctx))
	for _, c := range s.fm.calls(account)[had:] {
		got.calls = append(got.calls, c.String())
	}
	shared := 0
	if got.after = nobody; !r.noCache {
		if got.after, err1 = s.after(ctx, operator, end); strings.HasPrefix(got.after, "session") {
			shared = 1
		}
	}
	if live := s.fm.live(account); live != shared {
		err = errors.Join(err, fmt.Errorf("the server has %d sessions, the fleet %d", live, shared))
	}
	return got, errors.Join(err, err1)
}

// after says which session the fleet shares, and whether its life counts from end.
func (s *stage) after(ctx context.Context, operator *database, end time.Time) (string, error) {
	st, err := operator.sessions.Inspect(ctx, operator.account)
	if err != nil || st.Generation == 0 {
		return empty, err
	}
	session, err := operator.sessions.Session(ctx, operator.account)
	if err != nil {
		return "", err
	}
	age := stale
	if left := st.Expiry.Sub(end); left > 14*s.minute-s.minute/4 {
		age = fresh
	}
	return fmt.Sprintf("session %d%s", s.fm.number(session.Token.Reveal()), age), nil
}

// judge says what is wrong with what came of r, call for call.
func (r row) judge(got seen) error {
	var wrong []error
	if !slices.Equal(got.calls, r.want.calls) {
		wrong = append(wrong, fmt.Errorf("%s: calls: %s, want: %s", r.situation, strings.Join(got.calls, ", "), strings.Join(r.want.calls, ", ")))
	}
	if got.after != r.want.after {
		wrong = append(wrong, fmt.Errorf("%s: cache after: %s, want: %s", r.situation, got.after, r.want.after))
	}
	return errors.Join(wrong...)
}

// tally counts calls by their kinds.
type tally struct{ logins, data, logouts int }

func (t tally) String() string { return fmt.Sprintf("%d, %d, %d", t.logins, t.data, t.logouts) }

func count(calls []string) (t tally) {
	for _, c := range calls {
		switch {
		case strings.HasPrefix(c, callLogin):
			t.logins++
		case strings.HasPrefix(c, callLogout):
			t.logouts++
		default:
			t.data++
		}
	}
	return t
}

func (p *play) list(ctx context.Context, d *database) error {
	_, err := d.list(ctx, layout)
	return err
}

// wait lets some of FileMaker's minutes pass.
func (p *play) wait(ctx context.Context, minutes float64) {
	pause(ctx, time.Duration(minutes*float64(p.minute)))
}

// expiry waits until the fleet has no session any more, because nobody used it, by
// the clocks of all its processes. FileMaker has it for the rest of a minute.
func (p *play) expiry(ctx context.Context) error {
	for {
		st, err := p.other.sessions.Inspect(ctx, p.account)
		if err != nil {
			return err
		}
		if st.Generation == 0 {
			p.wait(ctx, 0.3)
			return nil
		}
		p.wait(ctx, 1.0/60)
	}
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// noCache stores nothing and says it did.
type noCache struct{}

func (noCache) Load(context.Context, string) ([]byte, error) { return nil, nil }

func (noCache) CompareAndSwap(_ context.Context, _ string, _, next []byte, _ time.Duration) ([]byte, error) {
	return next, nil
}
