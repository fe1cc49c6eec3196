package main

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vmware/govmomi/fault"
	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/property"
	"github.com/vmware/govmomi/session"
	"github.com/vmware/govmomi/task"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/sessionlock/sessionlock"
)

var users = map[string]string{operator: "pw-operator", ada: "pw-ada", bob: "pw-bob", cyd: "pw-cyd"}

// site is a vCenter, and this process as the only one of the fleet.
type site struct {
	*vcenter
	place place
	rest  *restClient
	soap  *soapClient
}

func newSite(t *testing.T) site {
	t.Helper()
	v, err := startVCenter(t.Context(), users, 0)
	require.NoError(t, err)
	t.Cleanup(v.close)
	s := site{vcenter: v, place: place{
		VCenter: v.URL, Certificate: v.certificate(), Passwords: passwords{ada: users[ada], bob: users[bob], cyd: "wrong"},
	}}
	both := sessionlock.WithCache(new(sessionlock.MemoryCache)) // one store, as in the fleet
	s.rest, err = newREST(s.place, both)
	require.NoError(t, err)
	s.soap, err = newSOAP(t.Context(), s.place, both)
	require.NoError(t, err)
	t.Cleanup(func() {
		assert.NoError(t, s.rest.Close(context.Background()))
		assert.NoError(t, s.soap.Close(context.Background()))
	})
	return s
}

// apis returns either, with how the vCenter ends its sessions.
func (s site) apis() map[string]struct {
	api
	end func(context.Context, string) error
} {
	type both = struct {
		api
		end func(context.Context, string) error
	}
	return map[string]both{overREST: {s.rest, s.forget}, overSOAP: {s.soap, s.terminate}}
}

func (s site) is(t *testing.T, a api, user string) {
	t.Helper()
	name, err := a.WhoAmI(t.Context(), user)
	require.NoError(t, err)
	assert.Equal(t, user, name)
}

// keeps asserts how many sessions the vCenter keeps, by itself and by the door's book.
func (s site) keeps(t *testing.T, want count) {
	t.Helper()
	live, err := s.live(t.Context())
	require.NoError(t, err)
	assert.Equal(t, want, live)
	book := count{}
	for _, k := range s.tickets {
		if !k.ended && k.User != operator {
			book[k.account]++
		}
	}
	assert.Equal(t, want, book)
}

func TestDeadSessionIsRepairedOnce(t *testing.T) {
	for _, name := range []string{overREST, overSOAP} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			a := s.apis()[name]
			s.is(t, a, ada)
			s.is(t, a, bob)
			require.NoError(t, a.end(t.Context(), ada))
			s.is(t, a, ada)
			s.is(t, a, bob)
			n := s.counted()
			assert.Equal(t, 2, n[account{name, ada}].Logins)
			assert.Equal(t, 1, n[account{name, ada}].Refused)
			assert.Equal(t, 1, n[account{name, bob}].Logins)
			assert.Zero(t, n[account{name, bob}].Refused)
			assert.Zero(t, n[account{name, ada}].Logouts, "a dead session needs no end")
			s.keeps(t, one(name, ada, bob))
		})
	}
}

func TestWrongPasswordIsSentOnce(t *testing.T) {
	s := newSite(t)
	for name, a := range s.apis() {
		t.Run(name, func(t *testing.T) {
			_, err := a.WhoAmI(t.Context(), cyd)
			require.ErrorIs(t, err, sessionlock.ErrDenied)
			require.NotErrorIs(t, err, sessionlock.ErrSuppressed)
			assert.NotContains(t, err.Error(), s.place.Passwords[cyd])
			_, err = a.WhoAmI(t.Context(), cyd)
			require.ErrorIs(t, err, sessionlock.ErrSuppressed)
			n := s.counted()[account{name, cyd}]
			assert.Equal(t, tally{Logins: 1, Denied: 1, AtOnce: 1}, n)
		})
	}
}

func TestWithoutAPasswordNothingIsSent(t *testing.T) {
	s := newSite(t)
	for name, a := range s.apis() {
		t.Run(name, func(t *testing.T) {
			_, err := a.WhoAmI(t.Context(), "eve@vsphere.local")
			var login *sessionlock.LoginError
			require.ErrorAs(t, err, &login)
			assert.Equal(t, sessionlock.LoginDeferred, login.Class)
			assert.Zero(t, login.Attempts)
			assert.Zero(t, s.counted()[account{name, "eve@vsphere.local"}])
		})
	}
}

// One store, one user, two APIs: neither client may take the other's session.
func TestTheAPIsKeepSessionsOfTheirOwn(t *testing.T) {
	s := newSite(t)
	s.is(t, s.rest, ada)
	s.is(t, s.soap, ada)
	n := s.counted()
	assert.Equal(t, map[account]tally{
		{overREST, ada}: {Logins: 1, AtOnce: 1, Calls: 1},
		{overSOAP, ada}: {Logins: 1, AtOnce: 1, Calls: 2},
	}, n)
	s.keeps(t, count{{overREST, ada}: 1, {overSOAP, ada}: 1})
}

func TestLogoutEndsThatSessionOnly(t *testing.T) {
	for _, name := range []string{overREST, overSOAP} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			a := s.apis()[name]
			s.is(t, a, ada)
			s.is(t, a, bob)
			require.NoError(t, a.Logout(t.Context(), ada))
			s.keeps(t, one(name, bob))
			assert.Equal(t, 1, s.counted()[account{name, ada}].Logouts)

			require.NoError(t, a.end(t.Context(), bob))
			require.NoError(t, a.Logout(t.Context(), bob), "of a session that is dead")
		})
	}
}

// answering is a vCenter with one answer to everything.
func answering(t *testing.T, status int, body string) *httptest.Server {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		_, _ = w.Write([]byte(body))
	}))
	t.Cleanup(s.Close)
	return s
}

// class is what sessionlock makes of a login that fails.
func class(t *testing.T, auth sessionlock.Authenticator) sessionlock.LoginClass {
	t.Helper()
	c, err := sessionlock.New("a vCenter", auth, sessionlock.WithCache(new(sessionlock.MemoryCache)))
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, c.Close(context.Background())) })
	_, err = c.Session(t.Context(), ada)
	var login *sessionlock.LoginError
	require.ErrorAs(t, err, &login)
	return login.Class
}

func soapFault(kind string) string {
	return `<?xml version="1.0" encoding="UTF-8"?>
<soapenv:Envelope xmlns:soapenv="http://schemas.xmlsoap.org/soap/envelope/" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"><soapenv:Body>
<soapenv:Fault><faultcode>ServerFaultCode</faultcode><faultstring>not InvalidLogin, not NotAuthenticated</faultstring>
<detail><` + kind + `Fault xmlns="urn:vim25" xsi:type="` + kind + `"></` + kind + `Fault></detail></soapenv:Fault></soapenv:Body></soapenv:Envelope>`
}

func TestLoginsSayWhatIsKnown(t *testing.T) {
	for _, tc := range []struct {
		name       string
		status     int
		body       string
		rest, soap sessionlock.LoginClass
	}{
		{"unauthorized", 401, "", sessionlock.LoginDenied, sessionlock.LoginDenied},
		{"on its way up", 503, "no healthy upstream", sessionlock.LoginDeferred, sessionlock.LoginDeferred},
		{"too many requests", 429, "", sessionlock.LoginDeferred, sessionlock.LoginDeferred},
		{"bad gateway", 502, "", sessionlock.LoginUnknown, sessionlock.LoginUnknown},
		{"broken", 500, "<html>", sessionlock.LoginUnknown, sessionlock.LoginUnknown},
		{"broken off", 200, `{"value":`, sessionlock.LoginUnknown, sessionlock.LoginUnknown},
		{"wrong password", 500, soapFault("InvalidLogin"), sessionlock.LoginUnknown, sessionlock.LoginDenied},
		{"may not log in", 500, soapFault("NoPermission"), sessionlock.LoginUnknown, sessionlock.LoginDenied},
		{"another fault", 500, soapFault("InvalidLocale"), sessionlock.LoginUnknown, sessionlock.LoginUnknown},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := answering(t, tc.status, tc.body)
			u, err := url.Parse(s.URL + vim25.Path)
			require.NoError(t, err)
			manager := types.ManagedObjectReference{Type: "SessionManager", Value: "SessionManager"}
			api := soapAPI{u, s.Client().Transport, types.ServiceContent{SessionManager: &manager}}
			assert.Equal(t, tc.rest, class(t, restLogin{s.URL, users, s.Client()}), overREST)
			assert.Equal(t, tc.soap, class(t, soapLogin{api, users}), overSOAP)
		})
	}
}

func TestUnreachableVCenterJudgesNobody(t *testing.T) {
	s := answering(t, 200, "")
	s.Close()
	u, err := url.Parse(s.URL + vim25.Path)
	require.NoError(t, err)
	manager := types.ManagedObjectReference{Type: "SessionManager", Value: "SessionManager"}
	api := soapAPI{u, http.DefaultTransport, types.ServiceContent{SessionManager: &manager}}
	assert.Equal(t, sessionlock.LoginDeferred, class(t, restLogin{s.URL, users, http.DefaultClient}))
	assert.Equal(t, sessionlock.LoginDeferred, class(t, soapLogin{api, users}))
}

func TestDeadSessionIsToldFromOtherFaults(t *testing.T) {
	asFault := func(f types.AnyType) error {
		s := &soap.Fault{String: "NotAuthenticated"}
		s.Detail.Fault = f
		return soap.WrapSoapFault(s)
	}
	dead := types.NotAuthenticated{}
	cause := &types.LocalizedMethodFault{Fault: &dead}
	byCause := types.HostConnectFault{VimFault: types.VimFault{MethodFault: types.MethodFault{FaultCause: cause}}}
	require.True(t, fault.Is(asFault(byCause), &dead), "what fault.Is would have said")
	for _, tc := range []struct {
		name string
		err  error
		want sessionlock.Verdict
	}{
		{"fault", asFault(dead), sessionlock.RejectedBefore},
		{"missing property", soap.WrapVimFault(&dead), sessionlock.RejectedBefore},
		{"wrapped", fmt.Errorf("list: %w", asFault(dead)), sessionlock.RejectedBefore},
		{"none", nil, sessionlock.NotRejected},
		{"no permission", asFault(types.NoPermission{}), sessionlock.NotRejected},
		{"no permission for a property", soap.WrapVimFault(&types.NoPermission{}), sessionlock.NotRejected},
		{"no detail", asFault(nil), sessionlock.NotRejected},
		{"a host's session", asFault(byCause), sessionlock.NotRejected},
		{"a task's", task.Error{LocalizedMethodFault: cause}, sessionlock.NotRejected},
		{"text", errors.New("ServerFaultCode: NotAuthenticated"), sessionlock.NotRejected},
	} {
		t.Run(tc.name, func(t *testing.T) { assert.Equal(t, tc.want, notAuthenticated(tc.err)) })
	}
}

// What the vCenter itself says, of a session that it has ended.
func TestEveryKindOfCallFindsADeadSession(t *testing.T) {
	for name, call := range map[string]func(context.Context, *vim25.Client) error{
		"method": func(ctx context.Context, vim *vim25.Client) error {
			_, err := methods.GetCurrentTime(ctx, vim)
			return err
		},
		"property": func(ctx context.Context, vim *vim25.Client) error {
			var m mo.OptionManager
			return property.DefaultCollector(vim).RetrieveOne(ctx, *vim.ServiceContent.Setting, []string{"setting"}, &m)
		},
		"current session": func(ctx context.Context, vim *vim25.Client) error {
			_, err := loggedIn(ctx, vim)
			return err
		},
		"task": func(ctx context.Context, vim *vim25.Client) error {
			_, err := object.NewRootFolder(vim).CreateFolder(ctx, "once")
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			s.is(t, s.soap, ada)
			before := s.counted()[account{overSOAP, ada}]
			require.NoError(t, s.terminate(t.Context(), ada))
			var failed []error
			require.NoError(t, s.soap.Do(t.Context(), ada, func(ctx context.Context, vim *vim25.Client) error {
				err := call(ctx, vim)
				failed = append(failed, err)
				return err
			}))
			require.Len(t, failed, 2)
			require.Error(t, failed[0])
			did := s.counted()[account{overSOAP, ada}].minus(before)
			assert.Equal(t, 1, did.Logins)
			assert.Equal(t, 1, did.Refused)
		})
	}
}

func TestNoPermissionCostsNoLogin(t *testing.T) {
	s := newSite(t)
	s.is(t, s.soap, bob)
	runs := 0
	err := s.soap.Do(t.Context(), ada, func(ctx context.Context, vim *vim25.Client) error {
		runs++
		list, err := s.sessions(ctx)
		if err != nil {
			return err
		}
		for _, k := range list {
			if k.UserName == bob {
				return session.NewManager(vim).TerminateSession(ctx, []string{k.Key})
			}
		}
		return errNoSession
	})
	require.True(t, fault.Is(err, &types.NoPermission{}), "%v", err)
	require.NotErrorIs(t, err, sessionlock.ErrRejected)
	assert.Equal(t, 1, runs)
	assert.Equal(t, 1, s.counted()[account{overSOAP, ada}].Logins)
	s.is(t, s.soap, bob)
	assert.Zero(t, s.counted()[account{overSOAP, bob}].Refused)
}

func TestCookiesAreKeptAsTheyCame(t *testing.T) {
	u, err := url.Parse("https://vcenter.test/sdk")
	require.NoError(t, err)
	api := soapAPI{url: u}
	came := []*http.Cookie{{Name: soap.SessionCookieName, Value: "c0ffee", Quoted: true, Path: "/", Secure: true}}
	vim, err := api.as(sessionlock.Session{Token: sessionlock.TokenFromCookies(came)})
	require.NoError(t, err)
	kept := vim.Jar.Cookies(u)
	require.Len(t, kept, 1)
	assert.Equal(t, came[0].Name, kept[0].Name)
	assert.Equal(t, came[0].Value, kept[0].Value)
	assert.True(t, kept[0].Quoted, "a vCenter quotes it")
	elsewhere, err := url.Parse("https://esx.test/sdk")
	require.NoError(t, err)
	assert.Empty(t, vim.Jar.Cookies(elsewhere))

	_, err = api.as(sessionlock.Session{Token: sessionlock.NewToken("hush")})
	require.Error(t, err)
	assert.NotContains(t, err.Error(), "hush")
}

func TestTheDoorNoticesASessionThatLivesOn(t *testing.T) {
	s := newSite(t)
	for name, a := range s.apis() {
		t.Run(name, func(t *testing.T) {
			s.is(t, a, ada)
			for id, k := range s.tickets {
				if k.account == (account{name, ada}) {
					s.ended(id) // but not in the simulator
				}
			}
			s.is(t, a, ada)
			assert.Equal(t, 1, s.counted()[account{name, ada}].Odd)
		})
	}
}

// What the simulator would have allowed.
func TestTheDoorIsAsStrictAsAVCenter(t *testing.T) {
	s := newSite(t)
	t.Run("REST", func(t *testing.T) {
		for _, tc := range []struct {
			name, path string
			head       http.Header
			body       string
			want       int
		}{
			{"no password", restSession, http.Header{}, "", http.StatusUnauthorized},
			{"a signature nobody knows", restSession, http.Header{"Authorization": {"SIGN me"}}, "", http.StatusUnauthorized},
			{"a session nobody was granted", restSession + "?~action=get", http.Header{restHeader: {"me"}}, "", http.StatusUnauthorized},
			{"the back door", "/api", http.Header{}, `{"params":{"serviceId":"com.vmware.cis.session","operationId":"create"}}`, http.StatusNotFound},
		} {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.URL+tc.path, strings.NewReader(tc.body))
			require.NoError(t, err)
			req.Header = tc.head
			res, err := s.door.Client().Do(req)
			require.NoError(t, err)
			_ = res.Body.Close()
			assert.Equal(t, tc.want, res.StatusCode, tc.name)
		}
	})
	t.Run("SOAP", func(t *testing.T) {
		nobody := s.soap.api.nobody()
		var token struct {
			XMLName xml.Name `xml:"Security"`
			User    string   `xml:"Assertion>Subject>NameID"`
		}
		token.User = ada
		ctx := nobody.WithHeader(t.Context(), soap.Header{Security: token})
		_, err := methods.LoginByToken(ctx, nobody, &types.LoginByToken{This: *nobody.ServiceContent.SessionManager})
		assert.True(t, fault.Is(err, &types.InvalidLogin{}), "%v", err)

		s.is(t, s.soap, bob)
		vim, err := s.login(t.Context(), ada, users[ada])
		require.NoError(t, err)
		for _, properties := range [][]string{{"sessionList"}, nil} { // nil: all there are
			var m mo.SessionManager
			err = property.DefaultCollector(vim).RetrieveOne(t.Context(), *vim.ServiceContent.SessionManager, properties, &m)
			assert.True(t, fault.Is(err, &types.NoPermission{}), "%v", err)
			assert.Empty(t, m.SessionList)
		}
		err = session.NewManager(vim).ImpersonateUser(t.Context(), bob)
		assert.True(t, fault.Is(err, &types.NoPermission{}), "%v", err)
	})
	s.keeps(t, one(overSOAP, ada, bob))
}
