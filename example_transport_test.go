package sessionlock_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"time"

	"github.com/sessionlock/sessionlock"
	"github.com/sessionlock/sessionlock/sessionlocktest"
)

// acmeOverHTTP answers whose session a request carries, and refuses that of bob's
// first login.
func acmeOverHTTP() *httptest.Server {
	return httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer token-")
		if !ok || token == "bob-1" {
			http.Error(w, "no session", http.StatusUnauthorized)
			return
		}
		fmt.Fprintln(w, r.Method, r.URL.Path, "by", token)
	}))
}

func clientAt(upstream string, auth sessionlock.Authenticator, opts ...sessionlock.Option) *sessionlock.Client {
	c, err := sessionlock.New(upstream, auth, append(opts, sessionlock.WithCache(new(sessionlock.MemoryCache)))...)
	if err != nil {
		panic(err)
	}
	return c
}

func showAnswer(resp *http.Response, err error) {
	if err != nil {
		fmt.Println(err)
		return
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	fmt.Print(resp.StatusCode, " ", string(body))
}

// An http.Client gains sessions by one line.
func ExampleClient_Transport() {
	acme := acmeOverHTTP()
	defer acme.Close()
	client, ctx := clientAt(acme.URL, sessionlocktest.Static()), context.Background()
	err := func() error {
		hc := &http.Client{Transport: client.Transport(nil, nil)} // or around the transport you have

		ctx = sessionlock.KeyContext(ctx, "bob") // whose session
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, acme.URL+"/orders", http.NoBody)
		if err != nil {
			return err
		}
		resp, err := hc.Do(req) // one login in the whole fleet; a 401 is repaired once
		showAnswer(resp, err)
		return err
	}()
	fmt.Println(err)
	// Output:
	// 200 GET /orders by bob-2
	// <nil>
}

// One service account, a header of the upstream's own, and a rejection that only
// the body tells from other errors.
func ExampleTransportOptions() {
	dead := true
	upstream := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if dead {
			dead = false
			w.WriteHeader(http.StatusInternalServerError)
			fmt.Fprint(w, `{"code":"112","message":"window is missing"}`)
			return
		}
		fmt.Fprintln(w, r.Method, "with", r.Header.Get("X-Session"))
	}))
	defer upstream.Close()
	client := clientAt(upstream.URL, sessionlocktest.Static())
	hc := &http.Client{Transport: client.Transport(nil, &sessionlock.TransportOptions{
		Key:   sessionlock.FixedKey("svc"),
		Apply: sessionlock.ApplyHeader("X-Session"),
		Rejected: func(answer *http.Response, head []byte) sessionlock.Verdict {
			if answer.StatusCode == http.StatusInternalServerError && strings.Contains(string(head), `"112"`) {
				return sessionlock.RejectedDuring // it may have been executed
			}
			return sessionlock.NotRejected
		},
	})}
	ctx := sessionlock.IdempotentContext(context.Background()) // a POST that may be sent twice
	req, _ := http.NewRequestWithContext(ctx, http.MethodPost, upstream.URL, strings.NewReader("order"))
	showAnswer(hc.Do(req))
	// Output: 200 POST with token-svc-2
}

// A login form: its cookies are the session.
func ExampleTokenFromCookies() {
	site := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/login" {
			http.SetCookie(w, &http.Cookie{Name: "SID", Value: "s-" + r.FormValue("user"), MaxAge: 900})
			http.SetCookie(w, &http.Cookie{Name: "node", Value: "7"})
			return
		}
		fmt.Fprintln(w, r.Header.Get("Cookie"))
	}))
	defer site.Close()
	login := func(ctx context.Context, key string) (sessionlock.Session, error) {
		form := url.Values{"user": {key}, "password": {"…"}}
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, site.URL+"/login", strings.NewReader(form.Encode()))
		if err != nil {
			return sessionlock.Session{}, err
		}
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return sessionlock.Session{}, err
		}
		defer resp.Body.Close()
		return sessionlock.Session{
			Token:  sessionlock.TokenFromCookies(resp.Cookies()),
			Expiry: time.Now().Add(15 * time.Minute),
		}, sessionlock.LoginStatus(resp)
	}
	client := clientAt(site.URL, sessionlock.AuthenticatorFunc(login))
	hc := &http.Client{Transport: client.Transport(nil, &sessionlock.TransportOptions{Apply: sessionlock.ApplyCookies})}

	ctx := sessionlock.KeyContext(context.Background(), "bob")
	key, _ := sessionlock.KeyFromContext(ctx)
	req, _ := http.NewRequestWithContext(ctx, http.MethodGet, site.URL+"/"+key, http.NoBody)
	showAnswer(hc.Do(req))
	// Output: 200 SID=s-bob; node=7
}

// More than one header: what else the login returned travels in the session.
func ExampleApplyBearer() {
	upstream := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, r.Header.Get("Authorization"), r.Header.Get("X-CSRF"))
	}))
	defer upstream.Close()
	login := func(context.Context, string) (sessionlock.Session, error) {
		s := sessionlock.Session{Token: sessionlock.NewToken("t1"), Expiry: time.Now().Add(time.Hour)}
		return s.WithValue("csrf", "c1"), nil
	}
	client := clientAt(upstream.URL, sessionlock.AuthenticatorFunc(login))
	hc := &http.Client{Transport: client.Transport(nil, &sessionlock.TransportOptions{
		Key: sessionlock.FixedKey("svc"),
		Apply: func(r *http.Request, s sessionlock.Session) {
			sessionlock.ApplyBearer(r, s)
			r.Header.Set("X-CSRF", s.Value("csrf"))
		},
	})}
	req, _ := http.NewRequestWithContext(context.Background(), http.MethodGet, upstream.URL, http.NoBody)
	showAnswer(hc.Do(req))
	// Output: 200 Bearer t1 c1
}
