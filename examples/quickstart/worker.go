package main

// worker.go is one process of the fleet. The first half is what an application
// writes to use sessionlock; the second half does as the parent says and counts.

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/sessionlock/sessionlock"
	"github.com/sessionlock/sessionlock/sessionlocktest"
)

// newClient joins this process to the fleet: same upstream, same Redis, same
// namespace. One client serves all users and goroutines.
func newClient(p place, rdb *redis.Client) (*sessionlock.Client, error) {
	return sessionlock.New(p.upstream, newAPI(p.upstream),
		sessionlock.WithRedis(rdb), sessionlock.WithNamespace(p.namespace))
}

// api is the upstream as an application knows it.
type api struct {
	url  string
	http *http.Client
}

func newAPI(url string) *api {
	return &api{url, &http.Client{
		Transport: &http.Transport{MaxIdleConnsPerHost: callers},
		Timeout:   5 * time.Second,
	}}
}

// Login makes api a sessionlock.Authenticator. It says of a failure whether the
// password was judged: LoginStatus knows the usual answers of HTTP, and a
// connection that cannot be dialled is recognised without a mark.
func (a *api) Login(ctx context.Context, user string) (sessionlock.Session, error) {
	body, err := json.Marshal(map[string]string{"user": user, "password": sessionlocktest.Password})
	if err != nil {
		return sessionlock.Session{}, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, a.url+"/login", bytes.NewReader(body))
	if err != nil {
		return sessionlock.Session{}, err
	}
	sent := time.Now() // a session never lives longer than counted from here
	res, err := a.http.Do(req)
	if err != nil {
		return sessionlock.Session{}, err
	}
	defer res.Body.Close()
	if err := sessionlock.LoginStatus(res); err != nil {
		return sessionlock.Session{}, err
	}
	var grant struct {
		Token     sessionlock.Token `json:"token"`
		ExpiresIn float64           `json:"expires_in"`
	}
	if err := json.NewDecoder(res.Body).Decode(&grant); err != nil {
		return sessionlock.Session{}, err
	}
	expiry := sent.Add(time.Duration(grant.ExpiresIn * float64(time.Second)))
	return sessionlock.Session{Token: grant.Token, Expiry: expiry}, nil
}

var errDown = errors.New("upstream is down")

// whoami is a request of the application. That the session is dead it says by
// Reject; the rest of the repair is not its business.
func (a *api) whoami(ctx context.Context, s sessionlock.Session) (user string, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, a.url+"/whoami", http.NoBody)
	if err != nil {
		return "", err
	}
	req.Header.Set("Authorization", "Bearer "+s.Token.Reveal())
	res, err := a.http.Do(req)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		return "", err
	}
	var answer struct{ User string }
	switch res.StatusCode {
	case http.StatusOK:
		err = json.Unmarshal(body, &answer)
	case http.StatusUnauthorized:
		err = sessionlock.Reject(errors.New("session refused"))
	case http.StatusServiceUnavailable:
		err = errDown
	default:
		err = fmt.Errorf("whoami answered with status %d", res.StatusCode)
	}
	return answer.User, err
}

// serve calls for user until there is an answer. It needs no back-off for the
// upstream's sake: while logins fail, each try is answered from what the fleet
// knows, and sends none.
func (w *worker) serve(ctx context.Context, user string) {
	start := time.Now()
	for ctx.Err() == nil {
		who, err := sessionlock.Call(ctx, w.client.For(user), w.api.whoami)
		var login *sessionlock.LoginError
		switch {
		case err == nil && who == user:
			w.count(start, func(r *report) { r.Served++ })
			return
		case errors.Is(err, sessionlock.ErrDenied): // by a login of this process, or of any other
			w.count(start, func(r *report) { r.Denied++ })
			return
		case errors.Is(err, errDown), errors.As(err, &login) && login.Class == sessionlock.LoginDeferred:
			w.count(start, func(r *report) { r.Retries++ })
			pause(ctx, 200*time.Millisecond)
		default:
			w.count(start, func(r *report) { r.Fault = fmt.Sprintf("asked as %s, served as %q: %v", user, who, err) })
			return
		}
	}
}

// callers is how many goroutines of each process want sessions.
const callers = 50

// place is where the fleet meets.
type place struct{ redis, upstream, namespace string }

// order is what the parent wants a worker to do, one JSON value per line.
type order struct {
	Act   int
	Users []string // each caller calls for all of them, in turns
	Keep  bool     // again and again, until the next order
}

// report is what a worker has done in an act, sent every 100 ms.
type report struct {
	Act     int
	Done    bool          // every caller has finished
	Served  int           // calls answered, with a session of the right user
	Denied  int           // calls told that the password is wrong
	Retries int           // tries that failed by the outage
	Slowest time.Duration // from the first try of a call to its answer
	Fault   string        // what should never happen
}

type worker struct {
	api    *api
	client *sessionlock.Client

	mu     sync.Mutex
	report report
}

// work follows orders until its standard input ends: with the parent, however
// that ends.
func work(p place) error {
	rdb := redis.NewClient(&redis.Options{Addr: p.redis})
	defer rdb.Close()
	client, err := newClient(p, rdb)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	w := &worker{api: newAPI(p.upstream), client: client}
	go w.tell(json.NewEncoder(os.Stdout))
	stop := make(chan struct{})
	for orders := json.NewDecoder(os.Stdin); ; {
		var o order
		if err := orders.Decode(&o); err != nil {
			break
		}
		if len(o.Users) == 0 {
			close(stop)
			continue
		}
		if stop = make(chan struct{}); !o.Keep {
			close(stop)
		}
		go w.act(ctx, o, stop)
	}
	cancel()
	closing, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	return client.Close(closing) // the fleet stays logged in
}

// act has every caller call for all users, and once more after stop.
func (w *worker) act(ctx context.Context, o order, stop <-chan struct{}) {
	w.count(time.Now(), func(r *report) { *r = report{Act: o.Act} })
	var all sync.WaitGroup
	for i := range callers {
		all.Go(func() {
			for last := false; !last; {
				select {
				case <-stop:
					last = true
				default:
				}
				for n := range o.Users {
					w.serve(ctx, o.Users[(i+n)%len(o.Users)])
				}
				if !last {
					pause(ctx, time.Duration(300+8*i)*time.Millisecond) // not in step
				}
			}
		})
	}
	all.Wait()
	w.count(time.Now(), func(r *report) { r.Done = true })
}

func (w *worker) count(start time.Time, add func(*report)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.report.Slowest = max(w.report.Slowest, time.Since(start))
	add(&w.report)
}

func (w *worker) tell(out *json.Encoder) {
	for range time.Tick(100 * time.Millisecond) {
		w.mu.Lock()
		r := w.report
		w.mu.Unlock()
		if out.Encode(r) != nil {
			return
		}
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
