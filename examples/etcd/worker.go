package main

// worker.go is one process of the fleet: first how it uses etcd through
// sessionlock, then how it does as the parent says, and what it counts.

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/sessionlock/sessionlock"
)

// The users that the fleet logs in as. A user is the key of its session.
const (
	app   = "app"   // its token is kept alive by use
	batch = "batch" // its tokens are replaced before they end
)

const (
	// tokenTTL is how long etcd keeps a token that is not used, and up to a second
	// longer.
	tokenTTL = 5 * time.Second
	// batchLife is how long a token of batch is said to live. The fleet ends it
	// batchMargin earlier: see sessionlock.WithExpiryMargin.
	batchLife   = 8 * time.Second
	batchMargin = batchLife / 4
	// batchAhead is how long before that end one process takes the next token.
	batchAhead = 2 * time.Second
)

// newClient joins this process to the fleet as user. How a session lives is
// configured per client, and one client may serve many users that are alike.
func newClient(p place, user string, rdb *redis.Client, sent *ledger) (*sessionlock.Client, error) {
	auth := authenticator{etcd: gateway(p.etcd), secrets: secretFile(p.secrets), sent: sent}
	opts := []sessionlock.Option{
		sessionlock.WithRedis(rdb),
		sessionlock.WithNamespace(p.namespace + "/" + user),
		sessionlock.WithObserver(nearHits{}),
	}
	switch user {
	case app:
		// etcd says nothing of an expiry. A token dies when it idles, and use keeps
		// it alive; that it has died otherwise is learnt from a 401.
		opts = append(opts, sessionlock.WithIdleTTL(tokenTTL))
	case batch:
		auth.life = batchLife
		opts = append(opts, sessionlock.WithRefreshAhead(batchAhead))
	}
	return sessionlock.New(p.etcd, auth, opts...)
}

type authenticator struct {
	etcd    gateway
	secrets secretFile
	life    time.Duration // of a session; 0: nobody knows
	sent    *ledger
}

// Login makes authenticator a sessionlock.Authenticator. etcd answers a wrong
// password with 400 (code 3) and has 503 (code 14) for when it cannot judge one;
// LoginStatus tells them apart. An etcd that is not there is recognised without.
func (a authenticator) Login(ctx context.Context, user string) (s sessionlock.Session, err error) {
	passwords, err := a.secrets.read()
	if err != nil {
		return s, sessionlock.RetryAfter(err, 0) // ours, and nothing was sent: not counted
	}
	if a.life > 0 {
		s.Expiry = time.Now().Add(a.life) // counted from before it is sent
	}
	var grant struct{ Token sessionlock.Token }
	err = a.etcd.post(ctx, "/v3/auth/authenticate", "", map[string]string{"name": user, "password": passwords[user]}, &grant)
	s.Token = grant.Token
	var refusal *statusError
	if errors.As(err, &refusal) {
		err = sessionlock.LoginStatus(refusal.res)
	}
	switch {
	case err == nil:
		a.sent.enter(user, logins{OK: 1})
	case refusal != nil && refusal.res.StatusCode == http.StatusBadRequest:
		a.sent.enter(user, logins{Denied: 1})
	default:
		a.sent.enter(user, logins{Other: 1})
	}
	return s, err
}

// roundTrip is what the application does: it writes a value and reads it back.
func (g gateway) roundTrip(ctx context.Context, s sessionlock.Session, key, value string) error {
	if err := g.call(ctx, s, "/v3/kv/put", map[string][]byte{"key": []byte(key), "value": []byte(value)}, nil); err != nil {
		return err
	}
	var got struct {
		KVs []struct{ Value []byte }
	}
	if err := g.call(ctx, s, "/v3/kv/range", map[string][]byte{"key": []byte(key)}, &got); err != nil {
		return err
	}
	if len(got.KVs) != 1 || string(got.KVs[0].Value) != value {
		return errors.New("etcd returned another value than was put")
	}
	return nil
}

// call is a request with a session, marked when etcd refuses that before it has
// executed anything: a dead token is a 401 (code 16); a request that was under
// way when root changed users or roles is a 400, told from others by its text,
// and etcd's own client takes a new token then too. A 403 (code 7) is for keys
// that are not the user's, and no reason to log in again.
func (g gateway) call(ctx context.Context, s sessionlock.Session, path string, in, out any) error {
	err := g.post(ctx, path, s.Token.Reveal(), in, out)
	if refused(err) {
		return sessionlock.Reject(err)
	}
	return err
}

func refused(err error) bool {
	var refusal *statusError
	return errors.As(err, &refusal) && (refusal.res.StatusCode == http.StatusUnauthorized ||
		refusal.text == "etcdserver: revision of auth store is old")
}

// unreachable reports whether err is of a request that etcd, being down or on its
// way up, did not answer.
func unreachable(err error) bool {
	var transport *url.Error
	var refusal *statusError
	return errors.As(err, &transport) ||
		errors.As(err, &refusal) && refusal.res.StatusCode == http.StatusServiceUnavailable
}

// statusError is an answer of etcd that is not 200. Its texts quote no secret.
type statusError struct {
	res  *http.Response // its body is closed
	text string
}

func (e *statusError) Error() string { return fmt.Sprintf("etcd: %s: %s", e.res.Status, e.text) }

// gateway is the URL of etcd's JSON gateway. Keys and values are base64 in it,
// as encoding/json writes a []byte.
type gateway string

var httpClient = &http.Client{
	Transport: &http.Transport{MaxIdleConnsPerHost: callers},
	Timeout:   5 * time.Second,
}

// post sends in and decodes the answer into out; one that is not 200 is a
// *statusError.
func (g gateway) post(ctx context.Context, path, token string, in, out any) error {
	body, err := json.Marshal(in)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, string(g)+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	if token != "" {
		req.Header.Set("Authorization", token)
	}
	res, err := httpClient.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(res.Body)
	switch {
	case err != nil: // it broke off
		return &url.Error{Op: "Read", URL: path, Err: err}
	case res.StatusCode != http.StatusOK:
		var failure struct{ Error string }
		_ = json.Unmarshal(answer, &failure) // what is no JSON has no text worth showing
		return &statusError{res, failure.Error}
	case out != nil:
		return json.Unmarshal(answer, out)
	}
	return nil
}

// secretFile is where a secret store would put the passwords, by user.
type secretFile string

func (f secretFile) read() (passwords map[string]string, err error) {
	b, err := os.ReadFile(string(f))
	if err != nil {
		return nil, err
	}
	return passwords, json.Unmarshal(b, &passwords)
}

// write replaces the file as a whole: no reader sees half of it.
func (f secretFile) write(passwords map[string]string) error {
	b, err := json.Marshal(passwords)
	if err != nil {
		return err
	}
	if err := os.WriteFile(string(f)+".new", b, 0o600); err != nil {
		return err
	}
	return os.Rename(string(f)+".new", string(f))
}

// nearHits is an observer that marks the calls which found a session in their own
// process: all others had to wait for one.
type nearHits struct{}

type nearKey struct{}

func (nearHits) Observe(ctx context.Context, e sessionlock.Event) {
	if near, ok := ctx.Value(nearKey{}).(*atomic.Bool); ok && e.Kind == sessionlock.EventNear {
		near.Store(true)
	}
}

const (
	callers  = 50               // goroutines of each process that use etcd
	patience = 15 * time.Second // of each; no act denies anybody for so long
)

// place is where the fleet meets.
type place struct{ redis, etcd, secrets, namespace string }

// logins are counted by how they ended.
type logins struct{ OK, Denied, Other int }

func (n logins) plus(m logins) logins {
	return logins{n.OK + m.OK, n.Denied + m.Denied, n.Other + m.Other}
}

func (n logins) minus(m logins) logins {
	return n.plus(logins{-m.OK, -m.Denied, -m.Other})
}

// ledger has the logins that this process has made since its start, by user.
type ledger struct {
	mu   sync.Mutex
	made map[string]logins
}

func (l *ledger) enter(user string, n logins) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.made[user] = l.made[user].plus(n)
}

// report is what the callers of a process have seen in an act.
type report struct {
	Served     int           // round trips
	Waited     int           // of these, with a session that was not there when the call came
	Refused    int           // requests whose token was dead
	Down       int           // tries that met an etcd that did not answer
	Denied     int           // tries told that the password is wrong
	Suppressed int           // tries told for another reason that nobody logs in now
	Slowest    time.Duration // from the first try of a round trip to its end
	Back       time.Time     // the first round trip of one whom etcd had not answered; zero: there is none
	Fault      string        // what should never happen
}

func (r *report) add(o report) {
	r.Served += o.Served
	r.Waited += o.Waited
	r.Refused += o.Refused
	r.Down += o.Down
	r.Denied += o.Denied
	r.Suppressed += o.Suppressed
	r.Slowest = max(r.Slowest, o.Slowest)
	if r.Back.IsZero() || (!o.Back.IsZero() && o.Back.Before(r.Back)) {
		r.Back = o.Back
	}
	if o.Fault != "" {
		r.Fault = o.Fault
	}
}

type worker struct {
	etcd    gateway
	clients map[string]*sessionlock.Client // by user
	sent    ledger

	mu     sync.Mutex
	report report
}

// work takes orders, a line each, until its standard input ends: with the parent,
// however that ends.
//
//	start USER...  sets the callers to work
//	stop           has them finish with one more round trip each, and reports
//	count          tells the ledger
func work(p place) (err error) {
	rdb := redis.NewClient(&redis.Options{Addr: p.redis})
	defer rdb.Close()
	w := &worker{etcd: gateway(p.etcd), clients: map[string]*sessionlock.Client{}, sent: ledger{made: map[string]logins{}}}
	for _, user := range []string{app, batch} {
		if w.clients[user], err = newClient(p, user, rdb, &w.sent); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	out := json.NewEncoder(os.Stdout)
	var act sync.WaitGroup
	var stop chan struct{}
	for orders := bufio.NewScanner(os.Stdin); orders.Scan(); {
		switch words := strings.Fields(orders.Text()); words[0] {
		case "start":
			w.report, stop = report{}, make(chan struct{})
			for i := range callers {
				act.Go(func() { w.call(ctx, stop, i, words[1:]) })
			}
		case "stop":
			close(stop)
			act.Wait()
			_ = out.Encode(w.report)
		case "count":
			w.sent.mu.Lock()
			_ = out.Encode(w.sent.made)
			w.sent.mu.Unlock()
		}
	}
	cancel()
	closing, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	for _, c := range w.clients { // the fleet stays logged in
		err = errors.Join(err, c.Close(closing))
	}
	return err
}

// call is one caller: round trips for each of users, until stop and one more.
func (w *worker) call(ctx context.Context, stop <-chan struct{}, i int, users []string) {
	for last := false; !last; {
		select {
		case <-stop:
			last = true
		default:
		}
		for n := range users {
			user := users[(i+n)%len(users)]
			w.serve(ctx, user, fmt.Sprintf("%s/%d/%d", user, os.Getpid(), i))
		}
		select {
		case <-stop:
		case <-time.After(time.Duration(400+8*i) * time.Millisecond): // not in step
		}
	}
}

// serve tries until it is served. It needs no back-off for etcd's sake: while
// logins fail, each try is answered from what the fleet knows, and sends none.
func (w *worker) serve(ctx context.Context, user, key string) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	start := time.Now()
	down := false
	for ctx.Err() == nil {
		var near atomic.Bool
		err := w.clients[user].Do(context.WithValue(ctx, nearKey{}, &near), user, func(ctx context.Context, s sessionlock.Session) error {
			err := w.etcd.roundTrip(ctx, s, key, start.String())
			if refused(err) {
				w.count(func(r *report) { r.Refused++ })
			}
			return err
		})
		if w.enter(err, start, near.Load(), &down) {
			return
		}
		pause(ctx, 100*time.Millisecond)
	}
	w.count(func(r *report) { r.Fault = fmt.Sprintf("%s was not served within %v", user, patience) })
}

// enter counts the outcome of one try and returns whether it was the last.
func (w *worker) enter(err error, start time.Time, near bool, down *bool) (done bool) {
	now := time.Now()
	w.count(func(r *report) {
		var login *sessionlock.LoginError
		switch {
		case err == nil:
			r.add(report{Served: 1, Slowest: now.Sub(start)})
			if !near {
				r.Waited++
			}
			if *down {
				r.add(report{Back: now})
			}
			done = true
		case errors.Is(err, sessionlock.ErrDenied):
			r.Denied++
		case errors.As(err, &login):
			r.Suppressed++
		case unreachable(err):
			r.Down++
			*down = true
		default:
			r.Fault = err.Error()
			done = true
		}
	})
	return done
}

func (w *worker) count(add func(*report)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	add(&w.report)
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
