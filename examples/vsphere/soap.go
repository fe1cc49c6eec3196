package main

// soap.go is how a fleet shares sessions of vSphere's SOAP API through govmomi. A
// session is a cookie; a dead one and a wrong password are both a fault, which
// comes as a 500.

import (
	"context"
	"errors"
	"net/http"
	"net/url"

	"github.com/vmware/govmomi/fault"
	"github.com/vmware/govmomi/session"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/sessionlock/sessionlock"
)

// soapAPI makes govmomi clients. None of them knows of sessionlock.
type soapAPI struct {
	url     *url.URL
	base    http.RoundTripper
	content types.ServiceContent // the same for everybody, and told without a session
}

func connectSOAP(ctx context.Context, vcenter string, base http.RoundTripper) (soapAPI, error) {
	u, err := url.Parse(vcenter + vim25.Path)
	if err != nil {
		return soapAPI{}, err
	}
	a := soapAPI{url: u, base: base}
	vim, err := vim25.NewClient(ctx, a.nobody().Client)
	if err != nil {
		return soapAPI{}, err
	}
	a.content = vim.ServiceContent
	return a, nil
}

// nobody returns a client without a session.
func (a soapAPI) nobody() *vim25.Client {
	c := soap.NewClient(a.url, false)
	c.Transport = a.base // the connections are shared, by all clients
	c.Namespace, c.Version = "urn:"+vim25.Namespace, vim25.Version
	return &vim25.Client{Client: c, ServiceContent: a.content, RoundTripper: c}
}

// as returns a client with the cookies of s. They are in its jar, which sends them
// to this vCenter alone.
func (a soapAPI) as(s sessionlock.Session) (*vim25.Client, error) {
	cookies, err := http.ParseCookie(s.Token.Reveal())
	if err != nil {
		return nil, errors.New("the session is no cookie") // the cause could quote it
	}
	vim := a.nobody()
	vim.Jar.SetCookies(a.url, cookies)
	return vim, nil
}

// soapLogin is the sessionlock.Authenticator of the SOAP API.
type soapLogin struct {
	soapAPI
	passwords passwords
}

// Login makes one session. Its secret is what the jar holds afterwards.
func (l soapLogin) Login(ctx context.Context, user string) (s sessionlock.Session, err error) {
	password, err := l.passwords.of(user)
	if err != nil {
		return s, err
	}
	l.base = statusJudge{l.base}
	vim := l.nobody()
	if err := session.NewManager(vim).Login(ctx, url.UserPassword(user, password)); err != nil {
		return s, judged(err)
	}
	s.Token = sessionlock.TokenFromCookies(vim.Jar.Cookies(l.url))
	return s, nil
}

// judged says of a failed login what is certain: that the password is wrong, or
// right and of a user who may not log in.
func judged(err error) error {
	if fault.Is(err, &types.InvalidLogin{}) || fault.Is(err, &types.NoPermission{}) {
		return sessionlock.Denied(err)
	}
	return err
}

// statusJudge is for answers to a login that are no SOAP, the 503 of a vCenter on
// its way up for instance: govmomi keeps their status to itself.
type statusJudge struct{ base http.RoundTripper }

func (j statusJudge) RoundTrip(r *http.Request) (*http.Response, error) {
	res, err := j.base.RoundTrip(r)
	if err != nil || res.StatusCode == http.StatusInternalServerError { // a fault
		return res, err
	}
	if err := sessionlock.LoginStatus(res); err != nil {
		_ = res.Body.Close()
		return nil, err
	}
	return res, nil
}

// Logout ends s. One that is dead already has ended as well as can be.
func (a soapAPI) Logout(ctx context.Context, s sessionlock.Session) error {
	vim, err := a.as(s)
	if err != nil {
		return err
	}
	err = session.NewManager(vim).Logout(ctx)
	if notAuthenticated(err) == sessionlock.RejectedBefore {
		return nil
	}
	return err
}

// notAuthenticated is a sessionlock.WithRejected for errors of govmomi. A dead
// session is a fault of the call; but where the call reads properties it succeeds,
// and the fault stands where the property should. Either way nothing was executed.
//
// Other faults are no reason to log in: NoPermission, in nearly the same words; and
// what has failed because of a NotAuthenticated further down, a task for instance,
// which was executed and is about a host's session, not ours.
func notAuthenticated(err error) sessionlock.Verdict {
	for ; err != nil; err = errors.Unwrap(err) {
		if !soap.IsSoapFault(err) && !soap.IsVimFault(err) {
			continue
		}
		if f, ok := err.(interface{ Fault() types.BaseMethodFault }); ok {
			if _, dead := f.Fault().(*types.NotAuthenticated); dead {
				return sessionlock.RejectedBefore
			}
		}
	}
	return sessionlock.NotRejected
}

// soapClient calls the SOAP API with the sessions of the fleet.
type soapClient struct {
	*sessionlock.Client
	api soapAPI
}

// newSOAP joins this process to the fleet; see newREST for the path in the URL.
//
// There is no sessionlock transport below govmomi, for two reasons. It could not
// see a session that is dead to a call for properties, because the answer is a 200.
// And it could not send a call again: govmomi gives it a body of unknown length.
func newSOAP(ctx context.Context, p place, opts ...sessionlock.Option) (*soapClient, error) {
	base, err := p.transport()
	if err != nil {
		return nil, err
	}
	api, err := connectSOAP(ctx, p.VCenter, base)
	if err != nil {
		return nil, err
	}
	c, err := sessionlock.New(api.url.String(), soapLogin{api, p.Passwords}, append([]sessionlock.Option{
		sessionlock.WithLogout(api.Logout),
		sessionlock.WithRejected(notAuthenticated),
		sessionlock.WithIdleTTL(idle),
	}, opts...)...)
	if err != nil {
		return nil, err
	}
	return &soapClient{c, api}, nil
}

// Do runs f with a client that has user's session, and once more with the next one
// when that is dead.
func (c *soapClient) Do(ctx context.Context, user string, f func(context.Context, *vim25.Client) error) error {
	return c.Client.Do(ctx, user, func(ctx context.Context, s sessionlock.Session) error {
		vim, err := c.api.as(s)
		if err != nil {
			return err
		}
		return f(ctx, vim)
	})
}

// WhoAmI asks what time it is, which a vCenter tells no stranger, and as whom the
// session is logged in.
func (c *soapClient) WhoAmI(ctx context.Context, user string) (name string, err error) {
	err = c.Do(ctx, user, func(ctx context.Context, vim *vim25.Client) (err error) {
		if _, err := methods.GetCurrentTime(ctx, vim); err != nil {
			return err
		}
		name, err = loggedIn(ctx, vim)
		return err
	})
	return name, err
}

// loggedIn returns as whom vim is logged in. Of this one property a dead session
// gets not even a fault, and govmomi returns nothing at all.
func loggedIn(ctx context.Context, vim *vim25.Client) (string, error) {
	s, err := session.NewManager(vim).UserSession(ctx)
	if err != nil {
		return "", err
	}
	if s == nil {
		return "", sessionlock.Reject(errors.New("nobody is logged in"))
	}
	return s.UserName, nil
}
