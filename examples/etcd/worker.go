package main

// worker.go is one process of the fleet: first how it uses etcd through
// sessionlock, then how it does as the parent says.

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/sessionlock/sessionlock"
)

// user is whom the whole fleet logs in as. It is the key of its session.
const user = "app"

// newClient joins this process to the fleet.
func newClient(p place, rdb *redis.Client) (*sessionlock.Client, error) {
	auth := authenticator{gateway(p.etcd), secretFile(p.secret)}
	return sessionlock.New(p.etcd, auth,
		sessionlock.WithRedis(rdb), sessionlock.WithNamespace(p.namespace),
		// etcd says nothing of an expiry, and none is known: a token lives as
		// long as it is used. That it has died is learnt from a 401.
		sessionlock.WithMaxAge(24*time.Hour),
		// A denial counts for the password that was denied, not for the next.
		sessionlock.WithFingerprint(auth.fingerprint))
}

type authenticator struct {
	etcd   gateway
	secret secretFile
}

// Login makes authenticator a sessionlock.Authenticator. etcd answers a wrong
// password with 400 (code 3) and has 503 (code 14) for when it cannot judge one;
// LoginStatus tells them apart.
func (a authenticator) Login(ctx context.Context, name string) (sessionlock.Session, error) {
	s, err := a.secret.read()
	if err != nil {
		return sessionlock.Session{}, err
	}
	var grant struct{ Token sessionlock.Token }
	err = a.etcd.post(ctx, "/v3/auth/authenticate", "", map[string]string{"name": name, "password": s.Password}, &grant)
	var refusal *statusError
	if errors.As(err, &refusal) {
		err = sessionlock.LoginStatus(refusal.res)
	}
	return sessionlock.Session{Token: grant.Token}, err
}

// fingerprint is the version of the password: telling, and no secret.
func (a authenticator) fingerprint(context.Context, string) (string, error) {
	s, err := a.secret.read()
	return strconv.Itoa(s.Version), err
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
	var refusal *statusError
	if errors.As(err, &refusal) && (refusal.res.StatusCode == http.StatusUnauthorized ||
		refusal.text == "etcdserver: revision of auth store is old") {
		return sessionlock.Reject(err)
	}
	return err
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
	case err != nil:
		return err
	case res.StatusCode != http.StatusOK:
		var failure struct{ Error string }
		_ = json.Unmarshal(answer, &failure) // what is no JSON has no text worth showing
		return &statusError{res, failure.Error}
	case out != nil:
		return json.Unmarshal(answer, out)
	}
	return nil
}

// secret is what the fleet knows of its password.
type secret struct {
	Version  int
	Password string
}

// secretFile is where a secret store would put it.
type secretFile string

func (f secretFile) read() (s secret, err error) {
	b, err := os.ReadFile(string(f))
	if err != nil {
		return s, err
	}
	return s, json.Unmarshal(b, &s)
}

// write replaces the file as a whole: no reader sees half of it.
func (f secretFile) write(s secret) error {
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	if err := os.WriteFile(string(f)+".new", b, 0o600); err != nil {
		return err
	}
	return os.Rename(string(f)+".new", string(f))
}

// callers is how many goroutines of each process use etcd.
const callers = 10

// place is where the fleet meets.
type place struct{ redis, etcd, secret, namespace string }

// report is what the callers of a process have seen in an act.
type report struct {
	Served  int           // round trips
	Denied  int           // tries told that the password is wrong
	Slowest time.Duration // from the first try of a round trip to its end
	Fault   string        // what should never happen
}

type worker struct {
	etcd   gateway
	client *sessionlock.Client

	mu     sync.Mutex
	report report
}

// work takes orders, a word per line, until its standard input ends: with the
// parent, however that ends. start sets the callers to work, stop has them
// finish with one more round trip each, and report.
func work(p place) error {
	rdb := redis.NewClient(&redis.Options{Addr: p.redis})
	defer rdb.Close()
	client, err := newClient(p, rdb)
	if err != nil {
		return err
	}
	w := &worker{etcd: gateway(p.etcd), client: client}
	ctx, cancel := context.WithCancel(context.Background())
	var stop chan struct{}
	for orders := bufio.NewScanner(os.Stdin); orders.Scan(); {
		switch orders.Text() {
		case "start":
			stop = make(chan struct{})
			go w.act(ctx, stop)
		case "stop":
			close(stop)
		}
	}
	cancel()
	closing, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	return client.Close(closing) // the fleet stays logged in
}

func (w *worker) act(ctx context.Context, stop <-chan struct{}) {
	w.report = report{}
	var all sync.WaitGroup
	for i := range callers {
		all.Go(func() {
			key := fmt.Sprintf("%s/%d/%d", user, os.Getpid(), i)
			for last := false; !last; pause(ctx, 100*time.Millisecond) {
				select {
				case <-stop:
					last = true
				default:
				}
				w.serve(ctx, key)
			}
		})
	}
	all.Wait()
	_ = json.NewEncoder(os.Stdout).Encode(w.report)
}

// serve tries until it is served. It needs no back-off for etcd's sake: while
// logins fail, each try is answered from what the fleet knows, and sends none.
func (w *worker) serve(ctx context.Context, key string) {
	start := time.Now()
	for ctx.Err() == nil {
		err := w.client.Do(ctx, user, func(ctx context.Context, s sessionlock.Session) error {
			return w.etcd.roundTrip(ctx, s, key, start.String())
		})
		if w.count(err, time.Since(start)) {
			return
		}
		pause(ctx, 100*time.Millisecond)
	}
}

// count enters the outcome of one try and returns whether it was the last.
func (w *worker) count(err error, waited time.Duration) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	var login *sessionlock.LoginError
	switch {
	case err == nil:
		w.report.Served++
	case errors.Is(err, sessionlock.ErrDenied):
		w.report.Denied++
		return false
	case errors.As(err, &login) && login.Class == sessionlock.LoginDeferred:
		return false
	default:
		w.report.Fault = err.Error()
	}
	w.report.Slowest = max(w.report.Slowest, waited)
	return true
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
