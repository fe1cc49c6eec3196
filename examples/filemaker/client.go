package main

// client.go is what an application writes to use FileMaker through sessionlock: how
// it logs in and out, how it knows a dead session, and its calls.

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"

	"github.com/sessionlock/sessionlock"
)

// settings are those of one database and account.
type settings struct {
	server, database string // server: a URL without a path
	account          string
	secret           func(account string) (password, version string)
	minute           time.Duration        // how long FileMaker's minutes last
	base             http.RoundTripper    // nil: http.DefaultTransport
	noRetry          bool                 // what FileMaker refuses is not sent again
	options          []sessionlock.Option // the store, for instance
}

// database is one as an application knows it. Its methods may be called from many
// goroutines. Those that take no session use the fleet's, or that of the
// communication whose context they are given.
type database struct {
	settings
	url      string
	sessions *sessionlock.Client
	http     *http.Client // puts sessions on requests
}

// open joins this process to the fleet that shares the sessions of a database. A
// server, a database and a user make a session's name; so does the version of the
// password, because a session says nothing of whether a password is right.
func open(set settings) (*database, error) {
	d := &database{settings: set, url: set.server + "/fmi/data/v1/databases/" + url.PathEscape(set.database)}
	auth := authenticator{d.url, set.secret, &http.Client{Transport: set.base, CheckRedirect: stay, Timeout: time.Minute}}
	client, err := sessionlock.New(d.url, auth, append([]sessionlock.Option{
		sessionlock.WithLogout(auth.logout),
		sessionlock.WithFingerprint(func(_ context.Context, account string) (string, error) {
			_, version := set.secret(account)
			return version, nil
		}),
		// FileMaker ends a session 15 minutes after its last call, and says nothing of
		// an expiry. A minute less is time for a call that is under way by then.
		sessionlock.WithIdleTTL(15 * set.minute), sessionlock.WithExpiryMargin(set.minute),
	}, set.options...)...)
	if err != nil {
		return nil, err
	}
	opts := &sessionlock.TransportOptions{Key: sessionlock.FixedKey(set.account), Rejected: rejected}
	if set.noRetry {
		opts.Rejected = func(*http.Response, []byte) sessionlock.Verdict { return sessionlock.NotRejected }
	}
	d.sessions = client
	d.http = &http.Client{Transport: client.Transport(set.base, opts), CheckRedirect: stay}
	return d, nil
}

// stay follows no redirect: FileMaker sends none, and one of a logout would take the
// token along in its Referer header.
func stay(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

// rejected tells a dead session by the code in the answer's body. A status does not
// do: with 401 a session is dead or an account may not do something, and with 500 it
// is closed or there are no such records.
func rejected(_ *http.Response, head []byte) sessionlock.Verdict {
	code, _ := parse(head)
	return verdict(code)
}

func verdict(code int) sessionlock.Verdict {
	switch code {
	case codeToken:
		return sessionlock.RejectedBefore
	case codeWindow:
		return sessionlock.RejectedDuring
	}
	return sessionlock.NotRejected
}

// authenticator logs in to one database, without the fleet's sessions.
type authenticator struct {
	url    string
	secret func(account string) (password, version string)
	http   *http.Client
}

// Login makes authenticator a sessionlock.Authenticator.
func (a authenticator) Login(ctx context.Context, account string) (s sessionlock.Session, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, a.url+"/sessions", bytes.NewBufferString("{}"))
	if err != nil {
		return s, err
	}
	password, _ := a.secret(account)
	req.SetBasicAuth(account, password)
	req.Header.Set("Content-Type", "application/json")
	res, err := a.http.Do(req)
	if err != nil {
		return s, err
	}
	var grant struct{ Token sessionlock.Token }
	err = read(res, &grant)
	var refusal *fileMakerError
	switch {
	case err == nil:
		s.Token = grant.Token
	case !errors.As(err, &refusal):
	case refusal.code == codeNoRoom, refusal.code == codeLimit: // the password was not the point
		err = sessionlock.RetryAfter(err, 0)
	case refusal.status == http.StatusUnauthorized:
		err = sessionlock.Denied(err)
	case refusal.code == codeNone: // the web server before it
		err = sessionlock.LoginStatus(res)
	}
	return s, err
}

// logout ends a session. One that has ended by itself is as good. Its token is in
// the URL, so what net/http says of a failure must not get out as it is.
func (a authenticator) logout(ctx context.Context, s sessionlock.Session) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodDelete, a.url+"/sessions/"+url.PathEscape(s.Token.Reveal()), http.NoBody)
	if err != nil {
		return errors.New("the URL of a logout is malformed")
	}
	req.Header.Set("Content-Type", "application/json")
	res, err := a.http.Do(req)
	var quotes *url.Error
	if errors.As(err, &quotes) {
		return quotes.Err
	}
	if err != nil {
		return err
	}
	var refusal *fileMakerError
	err = read(res, nil)
	if errors.As(err, &refusal) && refusal.code == codeToken {
		return nil
	}
	return err
}

// list returns the records of a layout.
func (d *database) list(ctx context.Context, layout string) ([]fields, error) {
	return d.records(ctx, http.MethodGet, "/layouts/"+url.PathEscape(layout)+"/records", nil)
}

// find returns the records that match; that there are none is no error. It only
// reads, so it may be sent again even if it may have been executed.
func (d *database) find(ctx context.Context, layout string, query ...fields) ([]fields, error) {
	all, err := d.records(sessionlock.IdempotentContext(ctx), http.MethodPost, "/layouts/"+url.PathEscape(layout)+"/_find",
		map[string]any{"query": query})
	var refusal *fileMakerError
	if errors.As(err, &refusal) && refusal.code == codeNoRecords {
		return nil, nil
	}
	return all, err
}

// create adds a record. It is never sent twice when it may have been executed.
func (d *database) create(ctx context.Context, layout string, record fields) error {
	return d.call(ctx, http.MethodPost, "/layouts/"+url.PathEscape(layout)+"/records", map[string]any{"fieldData": record}, nil)
}

// setGlobals sets global fields, which are those of a session.
func (d *database) setGlobals(ctx context.Context, values fields) error {
	return d.call(sessionlock.IdempotentContext(ctx), http.MethodPatch, "/globals", map[string]any{"globalFields": values}, nil)
}

// communicate has all calls that fn makes with its context use one session: what
// startCommunication and endCommunication are to FMDataAPI. Each session that it
// comes to use is given the global fields first; nil: none.
func (d *database) communicate(ctx context.Context, globals fields, fn func(context.Context) error) error {
	return d.sessions.Scope(ctx, d.account, func(ctx context.Context, sc *sessionlock.Scope) error {
		if globals != nil {
			sc.SetUp(func(ctx context.Context, _ sessionlock.Session) error {
				err := d.setGlobals(ctx, globals)
				var refusal *fileMakerError
				if errors.As(err, &refusal) && verdict(refusal.code) != sessionlock.NotRejected {
					return sessionlock.Reject(err) // setting the same twice does no harm
				}
				return err
			})
		}
		return fn(ctx)
	})
}

func (d *database) records(ctx context.Context, method, path string, in any) ([]fields, error) {
	var out struct {
		Data []struct{ FieldData fields }
	}
	err := d.call(ctx, method, path, in, &out)
	all := make([]fields, len(out.Data))
	for i, record := range out.Data {
		all[i] = record.FieldData
	}
	return all, err
}

func (d *database) call(ctx context.Context, method, path string, in, out any) error {
	body, err := json.Marshal(in)
	if err != nil {
		return err
	}
	if in == nil {
		body = nil
	}
	req, err := http.NewRequestWithContext(ctx, method, d.url+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	res, err := d.http.Do(req)
	if err != nil {
		return err
	}
	return read(res, out)
}

const codeNone = -1 // of an answer that is not FileMaker's

// fileMakerError is an answer that is not OK. FileMaker's own words stay out of it:
// they may name fields.
type fileMakerError struct{ status, code int }

func (e *fileMakerError) Error() string {
	return fmt.Sprintf("filemaker: error %d, status %d", e.code, e.status)
}

// read closes an answer and decodes its response, if it is OK, into out.
func read(res *http.Response, out any) error {
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		return err
	}
	code, response := parse(body)
	if code != codeOK {
		return &fileMakerError{res.StatusCode, code}
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(response, out)
}

func parse(body []byte) (code int, response json.RawMessage) {
	var a struct {
		Response json.RawMessage
		Messages []struct {
			Code int `json:",string"`
		}
	}
	if json.Unmarshal(body, &a) != nil || len(a.Messages) == 0 {
		return codeNone, nil
	}
	return a.Messages[0].Code, a.Response
}
