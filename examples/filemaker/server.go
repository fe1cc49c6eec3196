package main

// server.go stands in for FileMaker Server: the calls of its Data API that have to
// do with sessions, on the wire as Claris documents them, and a ledger of all of
// them.

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// The codes of FileMaker that a client of its sessions has to know. They are in the
// body of an answer; the HTTP status only says whether it is 0 (200), about who may
// do what (401), or another (500).
const (
	codeOK        = 0
	codeWindow    = 112 // what a call meets whose session is closed while it runs
	codeAccount   = 212
	codeNoRecords = 401 // with status 500: nothing was found, and nothing is wrong
	codeNoRoom    = 812
	codeToken     = 952
	codeLimit     = 953
)

var texts = map[int]string{
	codeOK:        "OK",
	codeWindow:    "Window is missing",
	codeAccount:   "Invalid user account and/or password; please try again",
	codeNoRecords: "No records match the request",
	codeNoRoom:    "Exceeded host's capacity",
	codeToken:     "Invalid FileMaker Data API token (*)",
	codeLimit:     "Exceeded limit on data the FileMaker Data API and OData can transmit (*)",
}

// The calls, as the ledger names them. All but the first two are data calls.
const (
	callLogin   = "login"
	callLogout  = "logout"
	callList    = "list"
	callFind    = "find"
	callCreate  = "create"
	callGlobals = "globals"
)

// fileMaker is the server. It is an http.Handler; start gives it a port.
type fileMaker struct {
	idle time.Duration // a session that is not used for so long is over. FileMaker has 15 minutes
	room int           // for sessions of one account at a time; 0: for any number
	mux  *http.ServeMux

	mu        sync.Mutex
	passwords map[string]string   // by account
	sessions  map[string]*session // by token; also those that are over
	records   map[string][]fields // by database
	ledger    map[string][]call   // by account; "": of tokens that never were
	faults    map[fault][]int     // the codes of calls to come
}

// fields are those of a record, or the global ones of a session.
type fields map[string]string

type session struct {
	account, database string
	number            int // of its login, among those of its account
	used              time.Time
	over              bool
	globals           fields
}

// call is one line of the ledger.
type call struct {
	what    string
	session int // by number; 0: none
	code    int
}

// String is "list 1" for what went well with an account's first session, and
// "list 1: 952" for what did not.
func (c call) String() string {
	s := c.what
	if c.session > 0 {
		s += " " + strconv.Itoa(c.session)
	}
	if c.code != codeOK {
		s += ": " + strconv.Itoa(c.code)
	}
	return s
}

type fault struct{ account, what string }

func newFileMaker(idle time.Duration) *fileMaker {
	f := &fileMaker{
		idle: idle, mux: http.NewServeMux(),
		passwords: map[string]string{}, sessions: map[string]*session{},
		records: map[string][]fields{}, ledger: map[string][]call{}, faults: map[fault][]int{},
	}
	const database = " /fmi/data/v1/databases/{database}"
	f.mux.HandleFunc("POST"+database+"/sessions", f.login)
	f.mux.HandleFunc("DELETE"+database+"/sessions/{token}", f.logout)
	f.mux.HandleFunc("GET"+database+"/layouts/{layout}/records", f.data(callList, f.list))
	f.mux.HandleFunc("POST"+database+"/layouts/{layout}/records", f.data(callCreate, f.create))
	f.mux.HandleFunc("POST"+database+"/layouts/{layout}/_find", f.data(callFind, f.find))
	f.mux.HandleFunc("PATCH"+database+"/globals", f.data(callGlobals, f.setGlobals))
	return f
}

func (f *fileMaker) ServeHTTP(w http.ResponseWriter, r *http.Request) { f.mux.ServeHTTP(w, r) }

// start listens on a free port of loopback until stop.
func (f *fileMaker) start(ctx context.Context) (url string, stop func(), err error) {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, err
	}
	srv := &http.Server{Handler: f, ReadHeaderTimeout: 10 * time.Second}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = srv.Serve(l)
	}()
	return "http://" + l.Addr().String(), func() { _ = srv.Close(); <-ended }, nil
}

// admit makes an account, or gives it another password.
func (f *fileMaker) admit(account, password string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.passwords[account] = password
}

// disconnect ends the sessions of an account, as an administrator does.
func (f *fileMaker) disconnect(account string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range f.sessions {
		s.over = s.over || s.account == account
	}
}

// fail gives the next calls of a kind these codes instead of what they ask for.
// Only codeWindow is different: such a call is executed, and its session ends.
func (f *fileMaker) fail(account, what string, codes ...int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	at := fault{account, what}
	f.faults[at] = append(f.faults[at], codes...)
}

// calls returns what the ledger has of an account.
func (f *fileMaker) calls(account string) []call {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.ledger[account])
}

// live counts the sessions of an account that are not over.
func (f *fileMaker) live(account string) (n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.lives(account)
}

func (f *fileMaker) lives(account string) (n int) {
	for _, s := range f.sessions {
		if s.account == account && f.alive(s) {
			n++
		}
	}
	return n
}

func (f *fileMaker) alive(s *session) bool { return !s.over && time.Since(s.used) < f.idle }

// number says which session of its account a token is of; 0: of none.
func (f *fileMaker) number(token string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	if s := f.sessions[token]; s != nil {
		return s.number
	}
	return 0
}

// add adds a record to a database.
func (f *fileMaker) add(database string, record fields) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.records[database] = append(f.records[database], record)
}

// count says how many records of a database match.
func (f *fileMaker) count(database string, query fields) (n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, r := range f.records[database] {
		if matches(r, query) {
			n++
		}
	}
	return n
}

func (f *fileMaker) login(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	account, password, _ := r.BasicAuth()
	known, exists := f.passwords[account]
	code, failed := f.fault(account, callLogin)
	switch {
	case failed:
	case !exists || known != password:
		code = codeAccount
	case f.room > 0 && f.lives(account) >= f.room:
		code = codeNoRoom
	}
	if code != codeOK {
		f.enter(account, call{what: callLogin, code: code})
		answer(w, nil, code)
		return
	}
	token, number := rand.Text(), 1
	for _, s := range f.sessions {
		if s.account == account {
			number = max(number, s.number+1)
		}
	}
	f.sessions[token] = &session{account: account, database: r.PathValue("database"), number: number, used: time.Now(), globals: fields{}}
	f.enter(account, call{what: callLogin, session: number})
	w.Header().Set("X-FM-Data-Access-Token", token)
	answer(w, map[string]string{"token": token}, codeOK)
}

func (f *fileMaker) logout(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	s, code := f.use(r.PathValue("token"), r.PathValue("database"), callLogout)
	if code == codeOK {
		s.over = true
	}
	f.enter(s.account, call{callLogout, s.number, code})
	answer(w, nil, code)
}

// data makes a handler of do, which is called with a live session.
func (f *fileMaker) data(what string, do func(*session, request) (response any, code int)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		in := request{database: r.PathValue("database")}
		if r.Method != http.MethodGet && json.NewDecoder(r.Body).Decode(&in) != nil {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		f.mu.Lock()
		defer f.mu.Unlock()
		s, code := f.use(token, in.database, what)
		var response any
		if code == codeOK || code == codeWindow {
			s.over = code == codeWindow
			var did int
			if response, did = do(s, in); code == codeOK {
				code = did
			}
		}
		f.enter(s.account, call{what, s.number, code})
		answer(w, response, code)
	}
}

// request is what a data call may say.
type request struct {
	database  string
	Query     []fields `json:"query"`
	FieldData fields   `json:"fieldData"`
	Globals   fields   `json:"globalFields"`
}

// use finds the session of a call, which keeps it alive. Without one there is a
// nameless session, and codeToken.
func (f *fileMaker) use(token, database, what string) (*session, int) {
	s := f.sessions[token]
	if s == nil {
		return &session{}, codeToken
	}
	if s.database != database || !f.alive(s) {
		return s, codeToken
	}
	s.used = time.Now()
	code, _ := f.fault(s.account, what)
	return s, code
}

func (f *fileMaker) fault(account, what string) (code int, failed bool) {
	at := fault{account, what}
	codes := f.faults[at]
	if len(codes) == 0 {
		return codeOK, false
	}
	f.faults[at] = codes[1:]
	return codes[0], true
}

func (f *fileMaker) enter(account string, c call) {
	f.ledger[account] = append(f.ledger[account], c)
}

// list returns all records. Each shows the global fields too, as the session has them.
func (f *fileMaker) list(s *session, in request) (any, int) {
	return found(f.records[in.database], s.globals), codeOK
}

func (f *fileMaker) find(s *session, in request) (any, int) {
	var hits []fields
	for _, r := range f.records[in.database] {
		if slices.ContainsFunc(in.Query, func(q fields) bool { return matches(r, q) }) {
			hits = append(hits, r)
		}
	}
	if len(hits) == 0 {
		return nil, codeNoRecords
	}
	return found(hits, s.globals), codeOK
}

func matches(r, query fields) bool {
	for name, want := range query {
		if r[name] != want {
			return false
		}
	}
	return true
}

func found(records []fields, globals fields) any {
	type record struct {
		FieldData fields `json:"fieldData"`
	}
	data := []record{}
	for _, r := range records {
		all := maps.Clone(globals)
		maps.Copy(all, r)
		data = append(data, record{all})
	}
	return map[string]any{"data": data}
}

func (f *fileMaker) create(_ *session, in request) (any, int) {
	f.records[in.database] = append(f.records[in.database], in.FieldData)
	return map[string]string{"recordId": strconv.Itoa(len(f.records[in.database]))}, codeOK
}

func (f *fileMaker) setGlobals(s *session, in request) (any, int) {
	maps.Copy(s.globals, in.Globals)
	return nil, codeOK
}

func answer(w http.ResponseWriter, response any, code int) {
	if response == nil || code != codeOK {
		response = struct{}{}
	}
	status := http.StatusInternalServerError
	switch code {
	case codeOK:
		status = http.StatusOK
	case codeAccount, codeToken:
		status = http.StatusUnauthorized
	}
	text, ok := texts[code]
	if !ok {
		text = fmt.Sprintf("Error %d", code)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]any{
		"response": response,
		"messages": []map[string]string{{"code": strconv.Itoa(code), "message": text}},
	})
}
