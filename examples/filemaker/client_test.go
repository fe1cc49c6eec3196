package main

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock"
)

func TestGlobalFieldsFollowTheScopesSession(t *testing.T) {
	company := fields{"company": "Acme"}
	with := []fields{{"company": "Acme", "name": "Ada"}}
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t)
		us := f.process()
		require.NoError(t, us.communicate(t.Context(), company, func(ctx context.Context) error {
			for range 2 {
				for range 2 {
					got, err := us.list(ctx, layout)
					assert.NoError(t, err)
					assert.Equal(t, with, got)
				}
				f.fm.disconnect(bob)
			}
			return nil
		}))
		f.seen("login 1", "globals 1", "list 1", "list 1", "list 1: 952", "login 2", "globals 2", "list 2", "list 2")
	})
	t.Run("and are lost with it outside of one", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := newFleet(t)
			us := f.process()
			require.NoError(t, us.setGlobals(t.Context(), company))
			got, err := us.list(t.Context(), layout)
			require.NoError(t, err)
			assert.Equal(t, with, got)
			f.fm.disconnect(bob)
			f.list(us)
		})
	})
	for name, code := range map[string]int{"a session that dies before them": codeToken, "a session that dies with them": codeWindow} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFleet(t)
				f.fm.fail(bob, callGlobals, code)
				us := f.process()
				require.NoError(t, us.communicate(t.Context(), company, func(ctx context.Context) error {
					grace := fields{"name": "Grace"}
					err := us.create(ctx, layout, grace)
					assert.Equal(t, 1, f.fm.count("sales", grace))
					return err
				}))
				f.seen("login 1", fmt.Sprintf("globals 1: %d", code), "login 2", "globals 2", "create 2")
			})
		})
	}
	t.Run("fields that there are not", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := newFleet(t)
			f.fm.fail(bob, callGlobals, 102)
			us := f.process()
			assertCode(t, 102, us.communicate(t.Context(), company, func(ctx context.Context) error {
				_, err := us.list(ctx, layout)
				return err
			}))
			f.seen("login 1", "globals 1: 102")
		})
	})
}

func TestFullServerIsNoWrongPassword(t *testing.T) {
	for _, code := range []int{codeNoRoom, codeLimit} {
		t.Run(fmt.Sprint(code), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFleet(t)
				us, other := f.process(), f.process()
				f.fm.fail(bob, callLogin, code, code, code, code, code) // more than the budget of wrong passwords
				for n := range 5 {
					_, err := us.list(t.Context(), layout)
					require.True(t, deferred(err))
					require.NotErrorIs(t, err, sessionlock.ErrDenied)
					_, err = other.list(t.Context(), layout)
					require.ErrorIs(t, err, sessionlock.ErrSuppressed, "the whole fleet waits")
					st, err := us.sessions.Inspect(t.Context(), bob)
					require.NoError(t, err)
					assert.Zero(t, st.Attempts)
					assert.Len(t, f.fm.calls(bob), n+1)
					time.Sleep(time.Until(st.SuppressedUntil))
				}
				f.list(us)
			})
		})
	}
}

func TestRoomOfASessionThatIdledIsUsed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t)
		f.fm.room = 1
		stranger := f.process(uncached) // its session stays
		f.list(stranger)
		us := f.process()
		_, err := us.list(t.Context(), layout)
		require.True(t, deferred(err))
		time.Sleep(15 * time.Minute)
		f.list(us)
		f.seen("login 1", "list 1", "login: 812", "login 2", "list 2")
		assert.Equal(t, 1, f.fm.live(bob))
	})
}

func TestWrongPasswordIsSentOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t)
		f.fm.admit(bob, "another")
		for range 5 {
			_, err := f.process().list(t.Context(), layout)
			require.ErrorIs(t, err, sessionlock.ErrDenied)
		}
		f.seen("login: 212")
	})
}

// A refusal inside a SetUp is an error that the scope knows: it is repaired, and the
// SetUp runs again, with the next session.
func TestRefusedSetUpIsRepaired(t *testing.T) {
	for _, code := range []int{codeToken, codeWindow} {
		synctest.Test(t, func(t *testing.T) {
			f := newFleet(t)
			f.fm.fail(bob, callGlobals, code)
			us := f.process()
			err := us.sessions.Scope(t.Context(), bob, func(ctx context.Context, sc *sessionlock.Scope) error {
				sc.SetUp(func(ctx context.Context, _ sessionlock.Session) error {
					return us.setGlobals(ctx, fields{"company": "Acme"})
				})
				_, err := us.list(ctx, layout)
				return err
			})
			require.NoError(t, err)
			f.seen("login 1", fmt.Sprintf("globals 1: %d", code), "login 2", "globals 2", "list 2")
		})
	}
}

// A logout has the token in its URL, which net/http puts into its errors.
func TestNoErrorTellsTheToken(t *testing.T) {
	for name, before := range map[string]func(http.ResponseWriter, *http.Request) bool{
		"connection lost": func(http.ResponseWriter, *http.Request) bool { panic(http.ErrAbortHandler) },
		"redirected": func(w http.ResponseWriter, r *http.Request) bool {
			http.Redirect(w, r, "http://elsewhere.test/logout", http.StatusTemporaryRedirect)
			return true
		},
		"quoted": func(w http.ResponseWriter, r *http.Request) bool {
			http.Error(w, "no such page: "+r.URL.Path, http.StatusNotFound)
			return true
		},
		"a loop": func(w http.ResponseWriter, r *http.Request) bool {
			http.Redirect(w, r, r.URL.Path, http.StatusTemporaryRedirect)
			return true
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFleet(t)
				var log bytes.Buffer
				us := f.process(option(sessionlock.WithLogger(slog.New(slog.NewTextHandler(&log, nil)))))
				f.list(us)
				s, err := us.sessions.Session(t.Context(), bob)
				require.NoError(t, err)
				asked := 0
				f.net.put(func(w http.ResponseWriter, r *http.Request) bool {
					asked++
					assert.Equal(t, "fm.test", r.Host)
					return before(w, r)
				})
				err = us.sessions.Logout(t.Context(), bob)
				require.Error(t, err)
				synctest.Wait()
				assert.NotEmpty(t, log.String())
				for _, text := range append(textsOf(err), log.String()) {
					assert.NotContains(t, text, s.Token.Reveal())
				}
				assert.Equal(t, 1, asked)
			})
		})
	}
	t.Run("nobody there", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := newFleet(t)
			s := sessionlock.Session{Token: sessionlock.NewToken("canary")}
			require.NoError(t, f.net.Close())
			a := authenticator{f.server, nil, &http.Client{Transport: f.net.client()}}
			err := a.logout(t.Context(), s)
			require.Error(t, err)
			assert.NotContains(t, strings.Join(textsOf(err), "\n"), "canary")
			a.url = "http://fm.test:no port"
			err = a.logout(t.Context(), s)
			require.Error(t, err)
			assert.NotContains(t, strings.Join(textsOf(err), "\n"), "canary")
		})
	})
}

// textsOf returns what err and everything below it prints.
func textsOf(err error) (all []string) {
	if err == nil {
		return nil
	}
	all = []string{err.Error(), fmt.Sprintf("%+v", err), fmt.Sprintf("%#v", err)}
	switch e := err.(type) { //nolint:errorlint // this is the walk
	case interface{ Unwrap() error }:
		all = append(all, textsOf(e.Unwrap())...)
	case interface{ Unwrap() []error }:
		for _, err := range e.Unwrap() {
			all = append(all, textsOf(err)...)
		}
	}
	return all
}

func TestVerdictIsTheCodes(t *testing.T) {
	body := func(code string) string {
		return `{"messages":[{"code":"` + code + `","message":"x"}],"response":{}}`
	}
	for head, want := range map[string]sessionlock.Verdict{
		body("952"):       sessionlock.RejectedBefore,
		body("112"):       sessionlock.RejectedDuring,
		body("401"):       sessionlock.NotRejected,
		body("0"):         sessionlock.NotRejected,
		body(""):          sessionlock.NotRejected,
		body("952")[:20]:  sessionlock.NotRejected,
		"":                sessionlock.NotRejected,
		"952":             sessionlock.NotRejected,
		`{"messages":[]}`: sessionlock.NotRejected,
		`{"response":{"data":[{"fieldData":{"code":"952"}}]},"messages":[{"code":"0"}]}`: sessionlock.NotRejected,
	} {
		assert.Equal(t, want, rejected(&http.Response{StatusCode: http.StatusUnauthorized}, []byte(head)), "%s", head)
	}
}

// Records are long, and say nothing of sessions.
func TestLongAnswersArriveWhole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t)
		long := fields{"name": strings.Repeat(`"952" `, 100_000)}
		us := f.process()
		require.NoError(t, us.create(t.Context(), layout, long))
		got, err := us.list(t.Context(), layout)
		require.NoError(t, err)
		assert.Equal(t, []fields{ada, long}, got)
		f.fm.disconnect(bob)
		require.NoError(t, us.create(t.Context(), layout, long))
		f.seen("login 1", "create 1", "list 1", "create 1: 952", "login 2", "create 2")
	})
}
