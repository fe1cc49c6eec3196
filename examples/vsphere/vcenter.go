package main

// vcenter.go is the upstream: govmomi's simulator of a vCenter, and in front of it
// a door that counts who comes through, and is as strict as a vCenter where the
// simulator is not.

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/vmware/govmomi/property"
	"github.com/vmware/govmomi/session"
	"github.com/vmware/govmomi/simulator"
	_ "github.com/vmware/govmomi/vapi/simulator" // the REST API
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// operator may see and end everybody's SOAP sessions.
const operator = "operator@vsphere.local"

// The APIs of a vCenter. Each has sessions of its own.
const (
	overREST = "REST"
	overSOAP = "SOAP"
)

// account is a user of one of the APIs.
type account struct{ API, User string }

// tally is what the door has counted for an account.
type tally struct {
	Logins  int // sent
	Denied  int // of these, not granted
	AtOnce  int // most at a time
	Logouts int
	Calls   int // with a session
	Refused int // of these, with one that had ended
	Odd     int // calls that the simulator did not answer as the session deserved
}

func (t *tally) add(o tally) { // AtOnce is nobody's sum
	t.Logins += o.Logins
	t.Denied += o.Denied
	t.Logouts += o.Logouts
	t.Calls += o.Calls
	t.Refused += o.Refused
	t.Odd += o.Odd
}

func (t tally) minus(o tally) tally {
	t.Logins -= o.Logins
	t.Denied -= o.Denied
	t.Logouts -= o.Logouts
	t.Calls -= o.Calls
	t.Refused -= o.Refused
	t.Odd -= o.Odd
	return t
}

// ticket is a session that was granted.
type ticket struct {
	account
	ended bool
}

type vcenter struct {
	URL       string
	loginTime time.Duration // what a login takes, at least

	door     *httptest.Server
	model    *simulator.Model
	sim      *simulator.Server
	operator *vim25.Client

	// ending is held while a session is ended, and shared by every call. For each
	// call the simulator looks the session up and puts it back with the time: one
	// that is ended in between lives on, 6 of 1500 under eight busy callers.
	ending sync.RWMutex

	mu      sync.Mutex
	tallies map[account]tally
	logins  map[account]int    // under way
	tickets map[string]*ticket // by what the client shows
}

// startVCenter starts a vCenter without inventory that these users can log in to.
// End it by close.
func startVCenter(ctx context.Context, users map[string]string, loginTime time.Duration) (v *vcenter, err error) {
	v = &vcenter{
		loginTime: loginTime,
		model:     simulator.VPX(),
		tallies:   map[account]tally{},
		logins:    map[account]int{},
		tickets:   map[string]*ticket{},
	}
	v.model.Datacenter = 0
	if err := v.model.Create(); err != nil {
		return nil, err
	}
	// Left to itself the simulator takes any password that is not empty, and ends
	// no session that idles.
	v.model.Service.Listen = &url.URL{User: url.UserPassword(operator, users[operator])}
	v.model.Map().SessionManager().ValidLogin = func(l *types.Login) bool {
		password, ok := users[l.UserName]
		return ok && l.Password == password
	}
	v.model.Map().Handler = authorize
	v.model.Service.RegisterEndpoints = true
	v.sim = v.model.Service.NewServer() // also on a port of its own, of which nobody is told
	v.door = httptest.NewTLSServer(v)
	v.URL = v.door.URL
	if v.operator, err = v.login(ctx, operator, users[operator]); err != nil {
		v.close()
		return nil, err
	}
	return v, nil
}

func (v *vcenter) close() {
	v.door.Close()
	v.sim.Close()
	v.model.Remove()
}

// certificate is what clients have to trust, in PEM.
func (v *vcenter) certificate() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: v.door.Certificate().Raw})
}

func (v *vcenter) login(ctx context.Context, user, password string) (*vim25.Client, error) {
	api, err := connectSOAP(ctx, v.URL, v.door.Client().Transport)
	if err != nil {
		return nil, err
	}
	vim := api.nobody()
	return vim, session.NewManager(vim).Login(ctx, url.UserPassword(user, password))
}

// authorize stops what the simulator would allow and a vCenter would not: logging
// in by a token or certificate that nobody has issued; and seeing, ending or taking
// over sessions without the privilege. (A vCenter leaves the list out of its answer.)
func authorize(ctx *simulator.Context, m *simulator.Method) (mo.Reference, types.BaseMethodFault) {
	privileged := false
	switch body := m.Body.(type) {
	case *types.LoginByToken, *types.LoginExtensionByCertificate:
		return nil, &types.InvalidLogin{}
	case *types.TerminateSession, *types.ImpersonateUser:
		privileged = true
	case *types.RetrievePropertiesEx:
		privileged = listsSessions(body.SpecSet)
	case *types.RetrieveProperties:
		privileged = listsSessions(body.SpecSet)
	}
	if privileged && ctx.Session != nil && ctx.Session.UserName != operator {
		return nil, &types.NoPermission{Object: &m.This, PrivilegeId: "Sessions.TerminateSession"}
	}
	return nil, nil
}

func listsSessions(specs []types.PropertyFilterSpec) bool {
	return slices.ContainsFunc(specs, func(spec types.PropertyFilterSpec) bool {
		return slices.ContainsFunc(spec.PropSet, func(set types.PropertySpec) bool {
			return set.Type == "SessionManager" && (slices.Contains(set.PathSet, "sessionList") || set.All != nil && *set.All)
		})
	})
}

// ServeHTTP is the door. The simulator has others behind it; by one of them, /api,
// it gives a REST session to whoever asks.
func (v *vcenter) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var answer *httptest.ResponseRecorder
	switch {
	case r.URL.Path == vim25.Path:
		answer = v.serveSOAP(r)
	case strings.HasPrefix(r.URL.Path, "/rest/"):
		answer = v.serveREST(r)
	default:
		http.NotFound(w, r)
		return
	}
	maps.Copy(w.Header(), answer.Header())
	w.WriteHeader(answer.Code)
	_, _ = w.Write(answer.Body.Bytes())
}

func (v *vcenter) serveREST(r *http.Request) *httptest.ResponseRecorder {
	if r.URL.Path == restSession && r.Method == http.MethodPost && r.URL.Query().Get("~action") == "" {
		user, _, ok := r.BasicAuth()
		if !ok { // the simulator believes any signature
			return status(http.StatusUnauthorized)
		}
		return v.grant(account{overREST, user}, r, func(answer *httptest.ResponseRecorder) string {
			var id struct{ Value string }
			_ = json.Unmarshal(answer.Body.Bytes(), &id) // "" without one
			return id.Value
		})
	}
	logout := r.URL.Path == restSession && r.Method == http.MethodDelete
	id := r.Header.Get(restHeader)
	return v.call(overREST, id, logout, r, func(answer *httptest.ResponseRecorder, dead bool) bool {
		return (answer.Code == http.StatusUnauthorized) == dead
	})
}

func (v *vcenter) serveSOAP(r *http.Request) *httptest.ResponseRecorder {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return status(http.StatusBadRequest)
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	m, err := simulator.UnmarshalBody(types.TypeFunc(), body)
	if err != nil {
		return status(http.StatusBadRequest)
	}
	switch body := m.Body.(type) {
	case *types.RetrieveServiceContent:
		return v.ask(r)
	case *types.Login:
		return v.grant(account{overSOAP, body.UserName}, r, func(answer *httptest.ResponseRecorder) string {
			return cookie(answer.Result().Cookies())
		})
	case *types.TerminateSession:
		v.ending.Lock()
		defer v.ending.Unlock()
		answer := v.ask(r)
		if answer.Code == http.StatusOK {
			v.ended(body.SessionId...) // the simulator's cookies are its sessions' ids
		}
		return answer
	}
	_, logout := m.Body.(*types.Logout)
	return v.call(overSOAP, cookie(r.Cookies()), logout, r, func(answer *httptest.ResponseRecorder, dead bool) bool {
		if strings.HasPrefix(m.Name, "RetrieveProperties") { // see notAuthenticated
			return true
		}
		return bytes.Contains(answer.Body.Bytes(), []byte("<NotAuthenticatedFault ")) == dead
	})
}

func cookie(cookies []*http.Cookie) string {
	for _, c := range cookies {
		if c.Name == soap.SessionCookieName {
			return c.Value
		}
	}
	return ""
}

func status(code int) *httptest.ResponseRecorder {
	answer := httptest.NewRecorder()
	answer.WriteHeader(code)
	return answer
}

// ask has the simulator answer r.
func (v *vcenter) ask(r *http.Request) *httptest.ResponseRecorder {
	answer := httptest.NewRecorder()
	v.model.Service.ServeMux.ServeHTTP(answer, r)
	return answer
}

// grant has the simulator answer a login of a, and notes the session in the answer.
func (v *vcenter) grant(a account, r *http.Request, id func(*httptest.ResponseRecorder) string) *httptest.ResponseRecorder {
	v.mu.Lock()
	v.logins[a]++
	t := v.tallies[a]
	t.Logins++
	t.AtOnce = max(t.AtOnce, v.logins[a])
	v.tallies[a] = t
	v.mu.Unlock()
	pause(r.Context(), v.loginTime)
	answer := v.ask(r)

	v.mu.Lock()
	defer v.mu.Unlock()
	v.logins[a]--
	if granted := id(answer); answer.Code == http.StatusOK && granted != "" {
		v.tickets[granted] = &ticket{account: a}
		return answer
	}
	t = v.tallies[a]
	t.Denied++
	v.tallies[a] = t
	return answer
}

// call has the simulator answer what came with the session id, or ends that. right
// says whether an answer is right for a session that is dead, or is not.
func (v *vcenter) call(api, id string, logout bool, r *http.Request, right func(answer *httptest.ResponseRecorder, dead bool) bool) *httptest.ResponseRecorder {
	if logout {
		v.ending.Lock()
		defer v.ending.Unlock()
	} else {
		v.ending.RLock()
		defer v.ending.RUnlock()
	}
	v.mu.Lock()
	who, dead := account{API: api}, true // a session that nobody was granted is a dead one of nobody
	if t := v.tickets[id]; t != nil {
		who, dead = t.account, t.ended
	}
	v.mu.Unlock()
	answer := v.ask(r)
	if logout && answer.Code == http.StatusOK {
		v.ended(id)
	}

	v.mu.Lock()
	defer v.mu.Unlock()
	t := v.tallies[who]
	if logout {
		t.Logouts++
	} else {
		t.Calls++
		if dead {
			t.Refused++
		}
	}
	if !right(answer, dead) {
		t.Odd++
	}
	v.tallies[who] = t
	return answer
}

// ended notes the end of sessions. Whoever calls it holds v.ending.
func (v *vcenter) ended(ids ...string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, id := range ids {
		if t := v.tickets[id]; t != nil {
			t.ended = true
		}
	}
}

// counted returns what was counted so far, the operator left out.
func (v *vcenter) counted() map[account]tally {
	v.mu.Lock()
	defer v.mu.Unlock()
	all := maps.Clone(v.tallies)
	delete(all, account{overSOAP, operator})
	return all
}

// sessions returns the SOAP sessions that the simulator knows, by its own list, the
// operator's left out.
func (v *vcenter) sessions(ctx context.Context) (list []types.UserSession, err error) {
	var m mo.SessionManager
	err = property.DefaultCollector(v.operator).RetrieveOne(ctx, *v.operator.ServiceContent.SessionManager, []string{"sessionList"}, &m)
	for _, s := range m.SessionList {
		if s.UserName != operator {
			list = append(list, s)
		}
	}
	return list, err
}

// live returns how many sessions the simulator keeps, by account. For REST it has
// no list, as a vCenter has none, so it is asked about each that it has granted.
func (v *vcenter) live(ctx context.Context) (count, error) {
	n := count{}
	list, err := v.sessions(ctx)
	for _, s := range list {
		n[account{overSOAP, s.UserName}]++
	}
	for id, a := range v.granted() {
		if v.askREST(ctx, http.MethodPost, "?~action=get", id).Code == http.StatusOK {
			n[a]++
		}
	}
	return n, err
}

// granted returns whose every REST session is or was, by id.
func (v *vcenter) granted() map[string]account {
	v.mu.Lock()
	defer v.mu.Unlock()
	ids := map[string]account{}
	for id, t := range v.tickets {
		if t.API == overREST {
			ids[id] = t.account
		}
	}
	return ids
}

// askREST asks the simulator past the door, so nobody counts it.
func (v *vcenter) askREST(ctx context.Context, method, query, id string) *httptest.ResponseRecorder {
	r := httptest.NewRequestWithContext(ctx, method, restSession+query, http.NoBody)
	r.Header.Set(restHeader, id)
	return v.ask(r)
}

var errNoSession = errors.New("there is no session to end")

// terminate ends the SOAP sessions of user, as an administrator would.
func (v *vcenter) terminate(ctx context.Context, user string) error {
	list, err := v.sessions(ctx)
	if err != nil {
		return err
	}
	var ids []string
	for _, s := range list {
		if s.UserName == user {
			ids = append(ids, s.Key)
		}
	}
	if len(ids) == 0 {
		return errNoSession
	}
	return session.NewManager(v.operator).TerminateSession(ctx, ids)
}

// forget ends the REST sessions of user. No administrator can: it stands for a
// vCenter whose API was started again.
func (v *vcenter) forget(ctx context.Context, user string) error {
	v.ending.Lock()
	defer v.ending.Unlock()
	err := errNoSession
	for id, a := range v.granted() {
		if a.User == user && v.askREST(ctx, http.MethodDelete, "", id).Code == http.StatusOK {
			v.ended(id)
			err = nil
		}
	}
	return err
}
