package main

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// The stand-in answers as the Data API is documented to: statuses, codes and where
// the token is.
func TestServerKeepsToTheDataAPI(t *testing.T) {
	fm := newFileMaker(15 * time.Minute)
	fm.admit("bob", "secret")
	fm.add("sales", ada)
	token := ""
	for _, step := range []struct {
		name, request, authorization, body string
		status, code                       int
		response                           string
	}{
		{"wrong password", "POST /sessions", "Basic Ym9iOmd1ZXNzZWQ=", "{}", 401, 212, `{}`},
		{"nobody's", "POST /sessions", "Basic ZXZlOnNlY3JldA==", "{}", 401, 212, `{}`},
		{"login", "POST /sessions", "Basic Ym9iOnNlY3JldA==", "{}", 200, 0, `{"token":"TOKEN"}`},
		{"list", "GET /layouts/customers/records", "Bearer TOKEN", "", 200, 0, `{"data":[{"fieldData":{"name":"Ada"}}]}`},
		{"globals", "PATCH /globals", "Bearer TOKEN", `{"globalFields":{"g":"1"}}`, 200, 0, `{}`},
		{"create", "POST /layouts/customers/records", "Bearer TOKEN", `{"fieldData":{"name":"Grace"}}`, 200, 0, `{"recordId":"2"}`},
		{"find", "POST /layouts/customers/_find", "Bearer TOKEN", `{"query":[{"name":"Grace"}]}`, 200, 0, `{"data":[{"fieldData":{"name":"Grace","g":"1"}}]}`},
		{"find nothing", "POST /layouts/customers/_find", "Bearer TOKEN", `{"query":[{"name":"Eve"}]}`, 500, 401, `{}`},
		{"no token", "GET /layouts/customers/records", "", "", 401, 952, `{}`},
		{"another's token", "GET /layouts/customers/records", "Bearer other", "", 401, 952, `{}`},
		{"log out another", "DELETE /sessions/other", "", "", 401, 952, `{}`},
		{"log out", "DELETE /sessions/TOKEN", "", "", 200, 0, `{}`},
		{"log out again", "DELETE /sessions/TOKEN", "", "", 401, 952, `{}`},
		{"dead token", "GET /layouts/customers/records", "Bearer TOKEN", "", 401, 952, `{}`},
	} {
		fill := strings.NewReplacer("TOKEN", token).Replace
		method, path, _ := strings.Cut(fill(step.request), " ")
		r := httptest.NewRequestWithContext(t.Context(), method, "/fmi/data/v1/databases/sales"+path, strings.NewReader(step.body))
		r.Header.Set("Authorization", fill(step.authorization))
		w := httptest.NewRecorder()
		fm.ServeHTTP(w, r)
		if token == "" {
			token = w.Header().Get("X-FM-Data-Access-Token")
			fill = strings.NewReplacer("TOKEN", token).Replace
		}
		code, response := parse(w.Body.Bytes())
		assert.Equal(t, step.status, w.Code, step.name)
		assert.Equal(t, step.code, code, step.name)
		assert.JSONEq(t, fill(step.response), string(response), step.name)
	}
	require.NotEmpty(t, token)
	assert.Equal(t, []call{
		{callLogin, 0, 212},
		{callLogin, 1, 0},
		{callList, 1, 0},
		{callGlobals, 1, 0},
		{callCreate, 1, 0},
		{callFind, 1, 0},
		{callFind, 1, 401},
		{callLogout, 1, 0},
		{callLogout, 1, 952},
		{callList, 1, 952},
	}, fm.calls("bob"))
	assert.Equal(t, []call{{callList, 0, 952}, {callList, 0, 952}, {callLogout, 0, 952}}, fm.calls(""))
}

func TestServerEndsSessions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fm := newFileMaker(15 * time.Minute)
		fm.admit("bob", "secret")
		do := func(method, database, path, token string) (code int, got string) {
			r := httptest.NewRequestWithContext(t.Context(), method, "/fmi/data/v1/databases/"+database+path, strings.NewReader("{}"))
			r.Header.Set("Authorization", "Bearer "+token)
			if path == "/sessions" {
				r.SetBasicAuth("bob", "secret")
			}
			w := httptest.NewRecorder()
			fm.ServeHTTP(w, r)
			code, _ = parse(w.Body.Bytes())
			return code, w.Header().Get("X-FM-Data-Access-Token")
		}
		login := func() string {
			code, token := do(http.MethodPost, "sales", "/sessions", "")
			require.Zero(t, code)
			return token
		}
		use := func(token string) int {
			code, _ := do(http.MethodPatch, "sales", "/globals", token)
			return code
		}
		idle, disconnected := login(), login()
		time.Sleep(15*time.Minute - 1)
		assert.Equal(t, codeOK, use(idle))
		assert.Equal(t, codeOK, use(disconnected))
		code, _ := do(http.MethodPatch, "stock", "/globals", idle)
		assert.Equal(t, codeToken, code, "a token is for one database")
		time.Sleep(15*time.Minute - 1)
		assert.Equal(t, codeOK, use(idle), "each use counts")
		time.Sleep(15 * time.Minute)
		assert.Equal(t, codeToken, use(idle))
		assert.Equal(t, codeToken, use(disconnected))

		fm.room = 2
		one, two := login(), login()
		code, _ = do(http.MethodPost, "sales", "/sessions", "")
		assert.Equal(t, codeNoRoom, code)
		fm.fail("bob", callGlobals, codeWindow, 500)
		assert.Equal(t, codeWindow, use(one))
		assert.Equal(t, codeToken, use(one), "its window is gone for good")
		assert.Equal(t, 500, use(two))
		assert.Equal(t, codeOK, use(two))
		assert.Equal(t, 1, fm.live("bob"))
		three := login()
		fm.disconnect("bob")
		assert.Equal(t, codeToken, use(two))
		assert.Equal(t, codeToken, use(three))
		assert.Zero(t, fm.live("bob"))
	})
}

func TestServerSaysWhatItDoesNotUnderstand(t *testing.T) {
	fm := newFileMaker(time.Minute)
	for request, want := range map[string]int{
		"PATCH /fmi/data/v1/databases/sales/globals":            http.StatusBadRequest,
		"PUT /fmi/data/v1/databases/sales/globals":              http.StatusMethodNotAllowed,
		"GET /fmi/data/v1/databases/sales/layouts/none/nothing": http.StatusNotFound,
	} {
		method, path, _ := strings.Cut(request, " ")
		w := httptest.NewRecorder()
		fm.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), method, path, strings.NewReader("no JSON")))
		assert.Equal(t, want, w.Code, request)
		assert.False(t, json.Valid(w.Body.Bytes()), "not FileMaker's: %s", request)
	}
}
