package main

// rest.go is how a fleet shares sessions of vSphere's REST API. A session is an id
// in a header; a dead one and a wrong password are both a 401.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/sessionlock/sessionlock"
)

const (
	restSession = "/rest/com/vmware/cis/session"
	restHeader  = "vmware-api-session-id"
)

// idle is after how long without use a vCenter ends a session, unless its
// administrator says otherwise.
const idle = 30 * time.Minute

// passwords are where a secret store would be, by user.
type passwords map[string]string

func (p passwords) of(user string) (string, error) {
	password, ok := p[user]
	if !ok {
		return "", sessionlock.RetryAfter(errors.New("no password for this user"), 0) // nothing was sent: not counted
	}
	return password, nil
}

// restLogin is the sessionlock.Authenticator of the REST API.
type restLogin struct {
	url       string
	passwords passwords
	http      *http.Client // without sessions
}

// Login makes one session. A 401 can only mean the password here, and
// LoginStatus says so; to the transport, which never sees this request, it means
// the session.
func (l restLogin) Login(ctx context.Context, user string) (s sessionlock.Session, err error) {
	password, err := l.passwords.of(user)
	if err != nil {
		return s, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, l.url+restSession, http.NoBody)
	if err != nil {
		return s, err
	}
	req.SetBasicAuth(user, password)
	req.Header.Set("vmware-use-header-authn", "true") // the id alone, no cookie
	res, err := l.http.Do(req)
	if err != nil {
		return s, err
	}
	defer res.Body.Close()
	if err := sessionlock.LoginStatus(res); err != nil {
		return s, err
	}
	var answer struct{ Value sessionlock.Token }
	err = json.NewDecoder(res.Body).Decode(&answer)
	s.Token = answer.Value
	return s, err
}

// Logout ends s. One that is dead already has ended as well as can be.
func (l restLogin) Logout(ctx context.Context, s sessionlock.Session) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodDelete, l.url+restSession, http.NoBody)
	if err != nil {
		return err
	}
	sessionlock.ApplyHeader(restHeader)(req, s)
	res, err := l.http.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode == http.StatusUnauthorized {
		return nil
	}
	return sessionlock.LoginStatus(res)
}

// restClient calls the REST API with the sessions of the fleet.
type restClient struct {
	*sessionlock.Client
	url  string
	http *http.Client
}

// newREST joins this process to the fleet. The path makes it another upstream than
// the SOAP API of the same vCenter: its sessions are other ones, and under one name
// either client would take the other's for its own.
func newREST(p place, opts ...sessionlock.Option) (*restClient, error) {
	base, err := p.transport()
	if err != nil {
		return nil, err
	}
	l := restLogin{p.VCenter, p.Passwords, &http.Client{Transport: base}}
	c, err := sessionlock.New(p.VCenter+"/rest", l, append([]sessionlock.Option{
		sessionlock.WithLogout(l.Logout),
		sessionlock.WithIdleTTL(idle),
	}, opts...)...)
	if err != nil {
		return nil, err
	}
	sessions := c.Transport(base, &sessionlock.TransportOptions{Apply: sessionlock.ApplyHeader(restHeader)})
	return &restClient{c, p.VCenter, &http.Client{Transport: sessions}}, nil
}

// WhoAmI asks as whom the session is logged in.
func (c *restClient) WhoAmI(ctx context.Context, user string) (string, error) {
	ctx = sessionlock.KeyContext(ctx, user)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url+restSession+"?~action=get", http.NoBody)
	if err != nil {
		return "", err
	}
	res, err := c.http.Do(req)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return "", fmt.Errorf("vCenter answered with %s", res.Status)
	}
	var answer struct{ Value struct{ User string } }
	err = json.NewDecoder(res.Body).Decode(&answer)
	return answer.Value.User, err
}
