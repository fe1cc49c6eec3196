package main

// worker.go is one process of the fleet. How it uses the library is in rest.go and
// soap.go; here it does as the parent says, and counts.

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/sessionlock/sessionlock"
)

const callers = 25 // goroutines of each process

// place is where the fleet meets.
type place struct {
	VCenter     string // URL
	Certificate []byte // that it has, in PEM
	Redis       string // host:port
	Namespace   string
	Passwords   passwords
}

// transport returns one that trusts the vCenter, without sessions.
func (p place) transport() (*http.Transport, error) {
	trusted := x509.NewCertPool()
	if !trusted.AppendCertsFromPEM(p.Certificate) {
		return nil, errors.New("the certificate is no PEM")
	}
	return &http.Transport{
		TLSClientConfig:     &tls.Config{RootCAs: trusted, MinVersion: tls.VersionTLS12},
		MaxIdleConnsPerHost: callers,
	}, nil
}

// api is either API of a vCenter, with the sessions of the fleet.
type api interface {
	WhoAmI(ctx context.Context, user string) (string, error)
	Logout(ctx context.Context, user string) error
	Close(ctx context.Context) error
}

// join makes this process one of the fleet. leave ends its part.
func join(ctx context.Context, p place) (apis map[string]api, leave func() error, err error) {
	rdb := redis.NewClient(&redis.Options{Addr: p.Redis})
	opts := []sessionlock.Option{
		sessionlock.WithRedis(rdb), sessionlock.WithNamespace(p.Namespace),
		// The Redis is a guest of the parent, beside a whole vCenter, and on a busy
		// machine late by seconds. One that is a server needs neither.
		sessionlock.WithOpTimeout(4 * time.Second), sessionlock.WithLockTTL(8 * time.Second),
	}
	r, err := newREST(p, opts...)
	if err != nil {
		_ = rdb.Close()
		return nil, nil, err
	}
	s, err := newSOAP(ctx, p, opts...)
	if err != nil {
		_ = rdb.Close()
		return nil, nil, err
	}
	return map[string]api{overREST: r, overSOAP: s}, func() error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer cancel()
		return errors.Join(r.Close(ctx), s.Close(ctx), rdb.Close()) // the fleet stays logged in
	}, nil
}

// order sets the callers to work as users of an API; one without users has them
// finish with one more call each, and report.
type order struct {
	API   string
	Users []string
}

// report is what the callers of a process have seen in an act.
type report struct {
	Served     int           // calls answered to the right user
	Denied     int           // calls told that the password has just been found wrong
	Suppressed int           // calls told that it is known to be
	Slowest    time.Duration // call
	Fault      string        // what should never happen
}

func (r *report) add(o report) {
	r.Served += o.Served
	r.Denied += o.Denied
	r.Suppressed += o.Suppressed
	r.Slowest = max(r.Slowest, o.Slowest)
	if o.Fault != "" {
		r.Fault = o.Fault
	}
}

type worker struct {
	apis map[string]api

	mu     sync.Mutex
	report report
}

// work takes orders until its standard input ends: with the parent, however that
// ends.
func work() error {
	in, out := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	var p place
	if err := in.Decode(&p); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	apis, leave, err := join(ctx, p)
	if err != nil {
		return err
	}
	w := &worker{apis: apis}
	var act sync.WaitGroup
	var stop chan struct{}
	for {
		var o order
		switch err := in.Decode(&o); {
		case err != nil:
			cancel()
			act.Wait()
			return leave()
		case len(o.Users) > 0:
			w.report, stop = report{}, make(chan struct{})
			for i := range callers {
				act.Go(func() { w.call(ctx, stop, o.API, o.Users[i%len(o.Users)]) })
			}
		default:
			close(stop)
			act.Wait()
			_ = out.Encode(w.report)
		}
	}
}

// call is one caller: a call after another until stop, and one more.
func (w *worker) call(ctx context.Context, stop <-chan struct{}, api, user string) {
	for last := false; !last; {
		select {
		case <-stop:
			last = true
		default:
		}
		start := time.Now()
		name, err := w.apis[api].WhoAmI(ctx, user)
		w.enter(user, name, err, time.Since(start))
		select {
		case <-stop:
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// enter counts the outcome of one call. There is no second try: who asked while a
// session was repaired has waited for the next one.
func (w *worker) enter(user, name string, err error, took time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.report.Slowest = max(w.report.Slowest, took)
	switch {
	case err == nil && name == user: // a vCenter would say VSPHERE.LOCAL\ada
		w.report.Served++
	case err == nil:
		w.report.Fault = fmt.Sprintf("%s was served as %s", user, name)
	case errors.Is(err, sessionlock.ErrDenied) && errors.Is(err, sessionlock.ErrSuppressed):
		w.report.Suppressed++
	case errors.Is(err, sessionlock.ErrDenied):
		w.report.Denied++
	default:
		w.report.Fault = fmt.Sprintf("call for %s: %v", user, err)
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
