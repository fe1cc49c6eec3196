package sessionlocktest

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
	"time"
)

// maxBody is more than any body on the wire: a key or a token may be escaped,
// never longer than this.
const maxBody = 64 << 10

// DownMode says how an [Upstream] is down.
type DownMode uint8

// The ways of being down.
const (
	Up       DownMode = iota // not down
	Refusing                 // every request: 503 and Retry-After
	Dropping                 // every request: read, and the connection closed
)

// Upstream is an HTTP server on loopback that wants sessions, and an
// [sessionlock.Authenticator] for itself. It accepts any user with [Password].
// What it has seen is in its ledger, which is exact at any time. All methods are
// safe for concurrent use. Network traffic does not go with testing/synctest:
// use [Static] or a func in a bubble.
//
// The wire, for clients in other languages or with other libraries:
//
//	POST /login      {"user","password"}  → {"token","expires_in"}, 401 denied, 423 locked out, 429 too many sessions
//	GET /whoami      Authorization: Bearer → {"user"}, 401 no such session
//	DELETE /session  Authorization: Bearer → 204, 401 no such session
//
// and 503 for everything while it is down. 429 and 503 carry Retry-After.
type Upstream struct {
	*Remote
	server *http.Server
	done   chan struct{} // closed by Close
	active sync.WaitGroup

	mu          sync.Mutex
	closed      bool
	accounts    map[string]*account
	tokens      map[string]*session // all that were ever minted
	strangers   int
	lockout     int
	limit       int
	killOldest  bool
	delay       time.Duration
	hang        chan struct{} // non-nil while logins hang; closed to let them go
	down        DownMode
	refuseFresh bool
	ttl         time.Duration
}

// account is what the upstream knows of one key.
type account struct {
	Account
	sessions []*session // oldest first
	denyFrom int        // the first login that is denied; 0: none is
	bad      int        // denials since the last good login
	locked   bool
}

type session struct {
	key   string
	ends  time.Time // zero: never by itself
	ended bool
	fresh bool // minted while fresh sessions were refused
}

func (s *session) alive() bool {
	return !s.ended && (s.ends.IsZero() || time.Now().Before(s.ends))
}

// NewUpstream starts an upstream that is closed with t.
func NewUpstream(t testing.TB) *Upstream {
	t.Helper()
	u, err := StartUpstream()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(u.Close)
	return u
}

// StartUpstream starts an upstream outside of a test; the caller closes it.
func StartUpstream() (*Upstream, error) {
	var lc net.ListenConfig
	l, err := lc.Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("sessionlocktest: start upstream: %w", err)
	}
	u := &Upstream{
		Remote:   At("http://" + l.Addr().String()),
		done:     make(chan struct{}),
		accounts: map[string]*account{},
		tokens:   map[string]*session{},
		ttl:      time.Hour,
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /login", u.serveLogin)
	mux.HandleFunc("GET /whoami", u.serveWhoami)
	mux.HandleFunc("DELETE /session", u.serveLogout)
	u.server = &http.Server{
		Handler:           u.track(mux),
		ReadHeaderTimeout: time.Minute,
		ErrorLog:          log.New(io.Discard, "", 0), // clients that leave are part of the game
	}
	u.active.Go(func() { _ = u.server.Serve(l) })
	return u, nil
}

// Close stops the upstream: logins that hang end, connections are closed. It
// returns when nothing is running any more; the ledger stays. Closing twice is
// fine.
func (u *Upstream) Close() {
	u.mu.Lock()
	if !u.closed {
		u.closed = true
		close(u.done)
	}
	u.mu.Unlock()
	_ = u.server.Close()
	u.active.Wait()
	u.http.CloseIdleConnections()
}

// track lets Close wait for what is being served.
func (u *Upstream) track(next http.Handler) http.Handler {
	enter := func() bool {
		u.mu.Lock()
		defer u.mu.Unlock()
		if !u.closed {
			u.active.Add(1)
		}
		return !u.closed
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !enter() {
			panic(http.ErrAbortHandler)
		}
		defer u.active.Done()
		next.ServeHTTP(w, r)
	})
}

// DenyAfter makes the upstream deny key's right password from its nth login on,
// all logins sent so far counted; 0 means from the next one on.
func (u *Upstream) DenyAfter(key string, n int) {
	u.change(func() { u.account(key).denyFrom = max(n, 1) })
}

// Allow ends what DenyAfter and LockoutAfter did to key.
func (u *Upstream) Allow(key string) {
	u.change(func() {
		a := u.account(key)
		a.denyFrom, a.bad, a.locked = 0, 0, false
	})
}

// LockoutAfter makes the upstream lock an account after n denied logins without
// a good one between them: from then on every login of it is answered with 423,
// until Allow. 0, as at the start, never locks.
func (u *Upstream) LockoutAfter(n int) { u.change(func() { u.lockout = n }) }

// Cap limits the live sessions per key to n. One login more is refused with 429,
// or ends the oldest session; Cap(1, true) is the upstream where a login kills
// the session before. 0, as at the start, is no limit.
func (u *Upstream) Cap(n int, killOldest bool) {
	u.change(func() { u.limit, u.killOldest = n, killOldest })
}

// Delay makes each login take d before it is evaluated, even if its client has
// left by then: that is how logins succeed that nobody has the session of.
func (u *Upstream) Delay(d time.Duration) { u.change(func() { u.delay = d }) }

// Hang makes logins hang before they are evaluated, until Hang(false). One whose
// client leaves meanwhile is never evaluated.
func (u *Upstream) Hang(on bool) {
	u.change(func() {
		if on && u.hang == nil {
			u.hang = make(chan struct{})
		}
		if !on && u.hang != nil {
			close(u.hang)
			u.hang = nil
		}
	})
}

// Down takes the upstream down, or with [Up] back.
func (u *Upstream) Down(how DownMode) { u.change(func() { u.down = how }) }

// RefuseFresh makes the upstream refuse every session minted from now on, from
// its birth until RefuseFresh(false). Refused sessions live all the same: they
// count for Sessions and Cap, and can be logged out.
func (u *Upstream) RefuseFresh(on bool) { u.change(func() { u.refuseFresh = on }) }

// SetTTL sets the life of the sessions minted from now on. It is an hour at the
// start; with 0 sessions never end by themselves, and logins do not say when.
func (u *Upstream) SetTTL(d time.Duration) { u.change(func() { u.ttl = d }) }

// Revoke ends all live sessions of key.
func (u *Upstream) Revoke(key string) {
	u.change(func() {
		a := u.account(key)
		for _, s := range a.live() {
			s.ended = true
			a.Revoked++
		}
	})
}

// Logins returns how many logins of key were sent, however they ended, and how
// many of them there were at once at most. A login whose client has left counts
// until the upstream has noticed.
func (u *Upstream) Logins(key string) (total, atOnce int) {
	u.change(func() { total, atOnce = u.account(key).Sent, u.account(key).MaxAtOnce })
	return total, atOnce
}

// Sessions returns how many sessions of key are alive.
func (u *Upstream) Sessions(key string) (n int) {
	u.change(func() { n = len(u.account(key).live()) })
	return n
}

// Account is an upstream's ledger of one key. Every login that was sent is
// under way or counted by one outcome:
// Sent = AtOnce + OK + Denied + LockedOut + TurnedAway + Abandoned.
type Account struct {
	Sent       int // logins that arrived
	OK         int // a session was minted
	Denied     int // evaluated and refused
	LockedOut  int // refused without a look, because of LockoutAfter
	TurnedAway int // not evaluated: down, or over the cap
	Abandoned  int // not evaluated: hanging when the client left or Close was called
	AtOnce     int // logins under way now
	MaxAtOnce  int // at any time

	Live        int // sessions alive now
	Killed      int // sessions ended by a login over the cap
	Revoked     int // sessions ended by Revoke
	Logouts     int // sessions ended by their client
	LateLogouts int // logouts of sessions that were over

	Served  int // requests answered
	Refused int // requests whose session was over or refused
}

// Ledger is what an upstream has seen. Requests that met it down are logins
// turned away, and otherwise not in it.
type Ledger struct {
	Accounts  map[string]Account
	Strangers int // requests with a token that was never minted
}

// Ledger returns a snapshot.
func (u *Upstream) Ledger() Ledger {
	l := Ledger{Accounts: map[string]Account{}}
	u.change(func() {
		l.Strangers = u.strangers
		for key, a := range u.accounts {
			a.Live = len(a.live())
			l.Accounts[key] = a.Account
		}
	})
	return l
}

// String returns the ledger as a table, keys sorted.
func (l Ledger) String() string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "key\tlogins\tok\tdenied\tlocked out\tturned away\tabandoned\tat once\tlive\tlogouts\tserved\trefused")
	for _, key := range slices.Sorted(maps.Keys(l.Accounts)) {
		a := l.Accounts[key]
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%d\n", key, a.Sent, a.OK, a.Denied,
			a.LockedOut, a.TurnedAway, a.Abandoned, a.MaxAtOnce, a.Live, a.Logouts, a.Served, a.Refused)
	}
	_ = w.Flush()
	if l.Strangers > 0 {
		fmt.Fprintf(&b, "%d requests with unknown tokens\n", l.Strangers)
	}
	return b.String()
}

func (u *Upstream) change(f func()) {
	u.mu.Lock()
	defer u.mu.Unlock()
	f()
}

// account returns key's; u.mu is held.
func (u *Upstream) account(key string) *account {
	a := u.accounts[key]
	if a == nil {
		a = &account{}
		u.accounts[key] = a
	}
	return a
}

// live returns the sessions that are alive, and forgets the others.
func (a *account) live() []*session {
	a.sessions = slices.DeleteFunc(a.sessions, func(s *session) bool { return !s.alive() })
	return a.sessions
}

// answer is what goes back; code 0 closes the connection.
type answer struct {
	code int
	body any
}

func refusal(code int, text string) answer {
	return answer{code, map[string]string{"error": text}}
}

func (a answer) write(w http.ResponseWriter) {
	if a.code == 0 {
		panic(http.ErrAbortHandler)
	}
	if a.code == http.StatusTooManyRequests || a.code == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", "1")
	}
	if a.body == nil {
		w.WriteHeader(a.code)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(a.code)
	_ = json.NewEncoder(w).Encode(a.body)
}

// serveLogin reads the body to its end: only then does the request's context
// end with the connection.
func (u *Upstream) serveLogin(w http.ResponseWriter, r *http.Request) {
	var c credentials
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err == nil {
		err = json.Unmarshal(body, &c)
	}
	if err == nil && c.User == "" {
		err = errors.New("no user")
	}
	if err != nil {
		refusal(http.StatusBadRequest, err.Error()).write(w)
		return
	}
	u.login(r.Context(), c).write(w)
}

// login enters one login into the ledger, from its arrival until its outcome.
// The answer is written after that, so a client that has it and logs in again is
// never seen twice at once.
func (u *Upstream) login(ctx context.Context, c credentials) answer {
	u.mu.Lock()
	defer u.mu.Unlock()
	a := u.account(c.User)
	a.Sent++
	nth := a.Sent
	a.AtOnce++
	a.MaxAtOnce = max(a.MaxAtOnce, a.AtOnce)
	defer func() { a.AtOnce-- }()
	if u.down == Up && !u.pause(ctx) {
		a.Abandoned++
		return answer{}
	}
	return u.judge(a, nth, c)
}

// pause waits as Delay and Hang want it, without u.mu. It returns whether the
// login is still to be judged.
func (u *Upstream) pause(ctx context.Context) bool {
	delay, hang := u.delay, u.hang
	u.mu.Unlock()
	defer u.mu.Lock()
	if delay > 0 {
		timer := time.NewTimer(delay)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-u.done:
			return false
		}
	}
	if hang == nil {
		return true
	}
	select {
	case <-hang:
		return true
	case <-ctx.Done():
	case <-u.done:
	}
	return false
}

func (u *Upstream) judge(a *account, nth int, c credentials) answer {
	full := u.limit > 0 && len(a.live()) >= u.limit
	switch {
	case u.down == Dropping:
		a.TurnedAway++
		return answer{}
	case u.down == Refusing:
		a.TurnedAway++
		return refusal(http.StatusServiceUnavailable, "down for maintenance")
	case a.locked:
		a.LockedOut++
		return refusal(http.StatusLocked, "account locked")
	case c.Password != Password || a.denyFrom > 0 && nth >= a.denyFrom:
		a.Denied++
		a.bad++
		a.locked = u.lockout > 0 && a.bad >= u.lockout
		// As careless as real ones: whoever quotes this answer leaks a password.
		return refusal(http.StatusUnauthorized, fmt.Sprintf("password %q of %q is wrong", c.Password, c.User))
	case full && !u.killOldest:
		a.TurnedAway++
		return refusal(http.StatusTooManyRequests, "too many sessions")
	}
	a.OK++
	a.bad = 0
	return answer{http.StatusOK, u.mint(a, nth, c.User)}
}

// mint makes a session, and room for it under the cap.
func (u *Upstream) mint(a *account, nth int, key string) map[string]any {
	for live := a.live(); u.limit > 0 && len(live) >= u.limit; live = live[1:] {
		live[0].ended = true
		a.Killed++
	}
	s := &session{key: key, fresh: u.refuseFresh}
	token := url.QueryEscape(key) + "|" + strconv.Itoa(nth) + "|" + rand.Text()
	body := map[string]any{"token": token}
	if u.ttl > 0 {
		s.ends = time.Now().Add(u.ttl)
		body["expires_in"] = u.ttl.Seconds()
	}
	u.tokens[token] = s
	a.sessions = append(a.sessions, s)
	return body
}

func (u *Upstream) serveWhoami(w http.ResponseWriter, r *http.Request) {
	u.serveSession(w, r, func(a *account, s *session) answer {
		if !s.alive() || s.fresh && u.refuseFresh {
			a.Refused++
			return refusal(http.StatusUnauthorized, "session is over")
		}
		a.Served++
		return answer{http.StatusOK, identity{s.key}}
	})
}

func (u *Upstream) serveLogout(w http.ResponseWriter, r *http.Request) {
	u.serveSession(w, r, func(a *account, s *session) answer {
		if !s.alive() {
			a.LateLogouts++
			return refusal(http.StatusUnauthorized, "session is over")
		}
		s.ended = true
		a.Logouts++
		return answer{code: http.StatusNoContent}
	})
}

// serveSession finds the session of a request and answers with f, under u.mu.
func (u *Upstream) serveSession(w http.ResponseWriter, r *http.Request, f func(*account, *session) answer) {
	token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	var a answer
	u.change(func() {
		s := u.tokens[token]
		switch {
		case u.down == Dropping:
		case u.down == Refusing:
			a = refusal(http.StatusServiceUnavailable, "down for maintenance")
		case s == nil:
			u.strangers++
			a = refusal(http.StatusUnauthorized, "no such session")
		default:
			a = f(u.account(s.key), s)
		}
	})
	a.write(w)
}
