package sessionlocktest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"
	"unicode/utf8"

	"github.com/sessionlock/sessionlock"
)

// Password is the one an [Upstream] accepts, and [Remote.Login] sends.
const Password = "open sesame"

// ErrMixUp reports that a session belongs to another user than the key it was
// handed out for.
var ErrMixUp = errors.New("sessionlocktest: session of another user")

// StatusError reports what an [Upstream] answered instead of what was asked for.
// Its text never quotes the answer's body.
type StatusError struct {
	Op   string // what was asked for: "login", "logout", "call"
	Code int    // HTTP status
	wait time.Duration
}

// Error names what was asked for and the status; never the body.
func (e *StatusError) Error() string {
	return fmt.Sprintf("sessionlocktest: %s: %d %s", e.Op, e.Code, http.StatusText(e.Code))
}

// Remote is the client half of an [Upstream]: a [sessionlock.Authenticator] and
// what goes with it. Safe for concurrent use.
type Remote struct {
	URL  string // of the upstream
	http *http.Client
}

// At returns the client half of the upstream at url, for the other processes of
// a test: the ledger stays with the process that started the upstream.
func At(url string) *Remote {
	return &Remote{URL: url, http: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 256}}}
}

// Login logs key in with the right [Password]. It implements
// [sessionlock.Authenticator]: a 401, 403 or 423 is marked with
// [sessionlock.Denied], a 429 or 503 with [sessionlock.RetryAfter]; everything
// else, a connection that breaks included, is left unmarked. Keys must be valid
// UTF-8, because they travel as JSON.
func (r *Remote) Login(ctx context.Context, key string) (sessionlock.Session, error) {
	return r.login(ctx, key, Password)
}

// LoginAs is like [Remote.Login] with a password of the caller's choice.
func (r *Remote) LoginAs(password string) sessionlock.Authenticator {
	return sessionlock.AuthenticatorFunc(func(ctx context.Context, key string) (sessionlock.Session, error) {
		return r.login(ctx, key, password)
	})
}

// credentials, grant and identity are the bodies on the wire.
type (
	credentials struct {
		User     string `json:"user"`
		Password string `json:"password"`
	}
	grant struct {
		Token     sessionlock.Token `json:"token"`
		ExpiresIn float64           `json:"expires_in,omitempty"` // seconds; 0: the upstream does not say
	}
	identity struct {
		User string `json:"user"`
	}
)

func (r *Remote) login(ctx context.Context, key, password string) (sessionlock.Session, error) {
	if !utf8.ValidString(key) {
		return sessionlock.Session{}, errors.New("sessionlocktest: login: key is not valid UTF-8")
	}
	body, err := json.Marshal(credentials{key, password})
	if err != nil {
		return sessionlock.Session{}, fmt.Errorf("sessionlocktest: login: %w", err)
	}
	sent := time.Now() // the session's life counts from here, so it is never taken for longer than it is
	var g grant
	if err := r.do(ctx, "login", http.MethodPost, "/login", "", body, &g); err != nil {
		return sessionlock.Session{}, mark(err)
	}
	s := sessionlock.Session{Token: g.Token}
	if g.ExpiresIn > 0 {
		s.Expiry = sent.Add(time.Duration(g.ExpiresIn * float64(time.Second)))
	}
	return s, nil
}

// mark says of a failed login what the answer allows to say.
func mark(err error) error {
	var e *StatusError
	if !errors.As(err, &e) {
		return err
	}
	switch e.Code {
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusLocked:
		return sessionlock.Denied(err)
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		return sessionlock.RetryAfter(err, e.wait)
	}
	return err
}

func isUnauthorized(err error) bool {
	var e *StatusError
	return errors.As(err, &e) && e.Code == http.StatusUnauthorized
}

// Logout ends s upstream, and only s. A session that is over already is no
// error. It fits [sessionlock.WithLogout].
func (r *Remote) Logout(ctx context.Context, s sessionlock.Session) error {
	err := r.do(ctx, "logout", http.MethodDelete, "/session", s.Token.Reveal(), nil, nil)
	if isUnauthorized(err) {
		return nil
	}
	return err
}

// Call uses s once. A session that the upstream refuses is marked with
// [sessionlock.Reject], as a func run by Do should; one of another user than
// s.Key() is [ErrMixUp], which is no rejection. A session that no client gave
// out has no key and passes for any user's.
func (r *Remote) Call(ctx context.Context, s sessionlock.Session) error {
	var who identity
	err := r.do(ctx, "call", http.MethodGet, "/whoami", s.Token.Reveal(), nil, &who)
	switch {
	case isUnauthorized(err):
		return sessionlock.Reject(err)
	case err != nil:
		return err
	case s.Key() != "" && s.Key() != who.User:
		return fmt.Errorf("%w: handed out for %q, belongs to %q", ErrMixUp, s.Key(), who.User)
	}
	return nil
}

// do sends one request and decodes a good answer into out.
func (r *Remote) do(ctx context.Context, op, method, path, bearer string, body []byte, out any) error {
	req, err := http.NewRequestWithContext(ctx, method, r.URL+path, bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("sessionlocktest: %s: %w", op, err)
	}
	if bearer != "" {
		req.Header.Set("Authorization", "Bearer "+bearer)
	}
	res, err := r.http.Do(req)
	if err != nil {
		return fmt.Errorf("sessionlocktest: %s: %w", op, err)
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(res.Body, maxBody))
	if res.StatusCode/100 != 2 {
		seconds, _ := strconv.Atoi(res.Header.Get("Retry-After"))
		return &StatusError{op, res.StatusCode, time.Duration(seconds) * time.Second}
	}
	if err == nil && out != nil {
		err = json.Unmarshal(answer, out)
	}
	if err != nil {
		return fmt.Errorf("sessionlocktest: %s: read answer: %w", op, err)
	}
	return nil
}
