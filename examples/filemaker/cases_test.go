package main

// The cases of FMDataAPI's persistent sessions, as a server sees them.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock"
)

func TestColdStartLogsInOnceFor14Minutes(t *testing.T) {
	const life = 840 * time.Second
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t)
		us := f.process()
		f.list(us)
		time.Sleep(life - time.Millisecond)
		assert.True(t, f.inForce())
		time.Sleep(time.Millisecond)
		assert.False(t, f.inForce(), "a minute before FileMaker's own end")
		assert.Equal(t, 1, f.fm.live(bob))
		f.list(us)
		f.seen("login 1", "list 1", "login 2", "list 2")
	})
	t.Run("the end of a scope begins them anew", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := newFleet(t)
			require.NoError(t, f.process().communicate(t.Context(), nil, func(context.Context) error {
				time.Sleep(5 * time.Minute)
				return nil
			}))
			synctest.Wait()
			st, err := f.process().sessions.Inspect(t.Context(), bob)
			require.NoError(t, err)
			assert.WithinDuration(t, time.Now().Add(life), st.Expiry, 0)
			f.seen("login 1")
			assert.Equal(t, 1, f.fm.live(bob), "not logged out")
		})
	})
}

func TestWarmStartNeedsNoLogin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t)
		f.list(f.process())
		for range 2 {
			f.list(f.process())
		}
		f.seen("login 1", "list 1", "list 1", "list 1")
	})
}

func TestDeadSessionIsReplacedOnce(t *testing.T) {
	for name, tc := range map[string]struct {
		call func(*fleet, *database) error
		kill func(*fleet)
		want []string
	}{
		"invalid token": {
			func(f *fleet, us *database) error { f.list(us); return nil },
			func(f *fleet) { f.fm.disconnect(bob) },
			[]string{"list 1: 952", "login 2", "list 2"},
		},
		"window missing": {
			func(f *fleet, us *database) error { f.list(us); return nil },
			func(f *fleet) { f.fm.fail(bob, callList, codeWindow) },
			[]string{"list 1: 112", "login 2", "list 2"},
		},
		"invalid token, with a body to send again": {
			func(f *fleet, us *database) error {
				grace := fields{"name": "Grace"}
				err := us.create(f.t.Context(), layout, grace)
				assert.Equal(f.t, 1, f.fm.count("sales", grace))
				return err
			},
			func(f *fleet) { f.fm.disconnect(bob) },
			[]string{"create 1: 952", "login 2", "create 2"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFleet(t)
				us := f.process()
				f.list(us)
				tc.kill(f)
				require.NoError(t, tc.call(f, us))
				f.seen(append([]string{"login 1", "list 1"}, tc.want...)...)
				assert.Equal(t, 2, f.stored())
			})
		})
	}
}

func TestOtherErrorsAreReturnedAsTheyAre(t *testing.T) {
	t.Run("by their code, whatever the status", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := newFleet(t)
			us := f.process()
			want := []string{"login 1"}
			for _, code := range []int{102, 105, codeNoRecords, 500, codeNoRoom, 951, codeLimit} {
				f.fm.fail(bob, callList, code)
				_, err := us.list(t.Context(), layout)
				assert.Equal(t, &fileMakerError{http.StatusInternalServerError, code}, err)
				want = append(want, fmt.Sprintf("list 1: %d", code))
			}
			f.fm.fail(bob, callList, codeAccount)
			_, err := us.list(t.Context(), layout)
			assert.Equal(t, &fileMakerError{http.StatusUnauthorized, codeAccount}, err)
			f.seen(append(want, "list 1: 212")...)
		})
	})
	t.Run("nothing found is no error", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := newFleet(t)
			got, err := f.process().find(t.Context(), layout, fields{"name": "nobody"})
			require.NoError(t, err)
			assert.Empty(t, got)
			f.seen("login 1", "find 1: 401")
		})
	})
	t.Run("an answer that is not FileMaker's", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := newFleet(t)
			us := f.process()
			f.list(us)
			for _, status := range []int{http.StatusUnauthorized, http.StatusBadGateway} {
				f.net.put(func(w http.ResponseWriter, _ *http.Request) bool {
					http.Error(w, "952 of no use", status)
					return true
				})
				_, err := us.list(t.Context(), layout)
				assert.Equal(t, &fileMakerError{status, codeNone}, err)
			}
			f.net.put(func(http.ResponseWriter, *http.Request) bool { panic(http.ErrAbortHandler) })
			assert.Error(t, us.create(t.Context(), layout, ada), "no answer at all")
			f.net.put(nil)
			f.list(us)
			f.seen("login 1", "list 1", "list 1")
		})
	})
}

func TestSecondRejectionIsReturned(t *testing.T) {
	want := []string{"login 1", "list 1: 952", "login 2", "list 2: 112"}
	t.Run("as an answer", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := newFleet(t)
			f.fm.fail(bob, callList, codeToken, codeWindow)
			var seen reauths
			_, err := f.process(option(sessionlock.WithObserver(&seen))).list(t.Context(), layout)
			assert.Equal(t, &fileMakerError{http.StatusInternalServerError, codeWindow}, err)
			f.seen(want...)
			assert.Zero(t, f.stored(), "and ends the session for the fleet")
			require.Len(t, seen.failed, 1)
			assert.ErrorContains(t, seen.failed[0].First, "401")
			assert.ErrorContains(t, seen.failed[0].Second, "500")
		})
	})
	t.Run("with the first, where requests carry the session themselves", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := newFleet(t)
			f.fm.fail(bob, callList, codeToken, codeWindow)
			us := f.process(option(sessionlock.WithRejected(byCode)))
			err := us.sessions.Do(t.Context(), bob, us.bare(http.MethodGet, ""))
			var re *sessionlock.ReauthError
			require.ErrorAs(t, err, &re)
			require.ErrorIs(t, err, sessionlock.ErrRejected)
			assertCode(t, codeToken, re.First)
			assertCode(t, codeWindow, re.Second)
			f.seen(want...)
		})
	})
}

func TestFailedRenewalIsReturnedWithTheRejection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t)
		us := f.process()
		f.list(us)
		f.fm.disconnect(bob)
		f.fm.admit(bob, "another")
		_, err := us.list(t.Context(), layout)
		var re *sessionlock.ReauthError
		require.ErrorAs(t, err, &re)
		require.ErrorIs(t, err, sessionlock.ErrDenied)
		require.ErrorContains(t, re.First, "401")
		assertCode(t, codeAccount, re.Second)
		f.seen("login 1", "list 1", "list 1: 952", "login: 212")
	})
}

func TestScopeGoesOnAfterAFailedRenewal(t *testing.T) {
	company := fields{"company": "Acme"}
	want := []string{"login 1", "globals 1", "list 1", "list 1: 952", "login: 812"}
	// lost loses the session of a scope, and finds no other.
	lost := func(ctx context.Context, f *fleet, us *database) {
		_, err := us.list(ctx, layout)
		require.NoError(f.t, err)
		f.fm.disconnect(bob)
		f.fm.fail(bob, callLogin, codeNoRoom)
		_, err = us.list(ctx, layout)
		var re *sessionlock.ReauthError
		require.ErrorAs(f.t, err, &re)
		require.ErrorContains(f.t, re.First, "401")
		require.True(f.t, deferred(re.Second))
		_, err = us.list(ctx, layout)
		require.ErrorIs(f.t, err, sessionlock.ErrSuppressed, "the back-off runs")
		f.seen(want...)
	}
	t.Run("with the next session", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := newFleet(t)
			us := f.process()
			require.NoError(t, us.communicate(t.Context(), company, func(ctx context.Context) error {
				lost(ctx, f, us)
				time.Sleep(time.Second)
				for range 2 {
					got, err := us.list(ctx, layout)
					assert.NoError(t, err)
					assert.Equal(t, []fields{{"company": "Acme", "name": "Ada"}}, got, "still in the scope")
				}
				return nil
			}))
			graces()
			f.seen(append(want, "login 2", "globals 2", "list 2", "list 2")...)
			assert.Equal(t, 2, f.stored())
		})
	})
	t.Run("its end forgets", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := newFleet(t)
			us := f.process()
			require.NoError(t, us.communicate(t.Context(), company, func(ctx context.Context) error {
				lost(ctx, f, us)
				return nil
			}))
			graces()
			f.seen(want...)
			f.list(us)
			f.seen(append(want, "login 2", "list 2")...)
		})
	})
}

func TestRetryOffSurfacesTheRejection(t *testing.T) {
	for name, more := range map[string]func(*settings){"cache": func(*settings) {}, "no cache": uncached} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFleet(t)
				us := f.process(more, func(set *settings) { set.noRetry = true })
				f.list(us)
				f.fm.disconnect(bob)
				_, err := us.list(t.Context(), layout)
				assert.Equal(t, &fileMakerError{http.StatusUnauthorized, codeToken}, err)
				f.seen("login 1", "list 1", "list 1: 952")
			})
		})
	}
}

func TestRepairNeedsNoCache(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t)
		us, other := f.process(uncached), f.process(uncached)
		f.list(us)
		f.fm.disconnect(bob)
		f.list(us)
		f.list(other)
		f.seen("login 1", "list 1", "list 1: 952", "login 2", "list 2", "login 3", "list 3")
		assert.Empty(t, f.store.seen())
	})
}

func TestLogoutWithoutASessionCallsNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t)
		us := f.process()
		require.NoError(t, us.sessions.Logout(t.Context(), bob))
		f.seen()
		f.list(us)
		for range 2 {
			require.NoError(t, us.sessions.Logout(t.Context(), bob))
		}
		f.seen("login 1", "list 1", "logout 1")
		assert.Zero(t, f.fm.live(bob))
	})
}

func TestNothingIsLoggedOutInsideAScope(t *testing.T) {
	for name, tc := range map[string]struct {
		with func(*settings)
		end  []string
	}{
		"cache":    {func(*settings) {}, nil},
		"no cache": {uncached, []string{"logout 1"}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFleet(t)
				us := f.process(tc.with)
				want := []string{"login 1"}
				require.NoError(t, us.communicate(t.Context(), nil, func(ctx context.Context) error {
					for range 3 {
						assert.NoError(t, us.communicate(ctx, nil, func(ctx context.Context) error {
							_, err := us.list(ctx, layout)
							return err
						}))
						graces()
						want = append(want, "list 1")
						f.seen(want...)
					}
					return nil
				}))
				graces()
				f.seen(append(want, tc.end...)...)
			})
		})
	}
}

func TestEndOfAProcessLogsNobodyOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t)
		us, other := f.process(), f.process()
		f.list(us)
		require.NoError(t, us.sessions.Close(t.Context()))
		_, err := us.list(t.Context(), layout)
		require.ErrorIs(t, err, sessionlock.ErrClosed, "it has forgotten the session")
		f.list(other)
		f.seen("login 1", "list 1", "list 1")
	})
}

func TestFailedLogoutStillForgetsTheSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t)
		us, other := f.process(), f.process()
		f.list(us)
		f.fm.fail(bob, callLogout, 802)
		err := us.sessions.Logout(t.Context(), bob)
		assertCode(t, 802, err)
		assert.NotContains(t, err.Error(), "802", "its text is the upstream's")
		f.list(other)
		f.list(us)
		f.seen("login 1", "list 1", "logout 1: 802", "login 2", "list 2", "list 2")
	})
}

func TestScopeWithoutASessionIsNotRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t)
		us := f.process()
		f.fm.fail(bob, callLogin, codeNoRoom)
		ran := false
		err := us.communicate(t.Context(), nil, func(context.Context) error {
			ran = true
			return nil
		})
		require.True(t, deferred(err))
		assert.False(t, ran)
		time.Sleep(time.Second)
		f.list(us)
		f.seen("login: 812", "login 1", "list 1")
	})
}

func TestScopeEndsOrphansOnly(t *testing.T) {
	for name, tc := range map[string]struct {
		during func(f *fleet, other *database)
		want   []string
		after  int
	}{
		"still stored": {func(*fleet, *database) {}, []string{"login 1", "list 1"}, 1},
		"another is stored": {func(f *fleet, other *database) {
			time.Sleep(14 * time.Minute)
			f.list(other)
		}, []string{"login 1", "list 1", "login 2", "list 2", "logout 1"}, 2},
		"another is stored, in a new store": {func(f *fleet, other *database) {
			time.Sleep(time.Second)
			f.store.lose()
			f.list(other)
		}, []string{"login 1", "list 1", "login 2", "list 2", "logout 1"}, 2},
		"none is stored, it was not used": {func(*fleet, *database) { time.Sleep(14 * time.Minute) }, []string{"login 1", "list 1", "logout 1"}, 0},
		"none is stored, it was lost":     {func(f *fleet, _ *database) { f.store.lose() }, []string{"login 1", "list 1", "logout 1"}, 0},
		"another is stored, it was dead": {func(f *fleet, other *database) {
			f.list(other)
			f.fm.disconnect(bob)
			f.list(other)
		}, []string{"login 1", "list 1", "list 1", "list 1: 952", "login 2", "list 2"}, 2},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFleet(t)
				us, other := f.process(), f.process()
				require.NoError(t, us.communicate(t.Context(), nil, func(ctx context.Context) error {
					_, err := us.list(ctx, layout)
					tc.during(f, other)
					return err
				}))
				graces()
				f.seen(tc.want...)
				assert.Equal(t, tc.after, f.stored())
				assert.Equal(t, min(tc.after, 1), f.fm.live(bob), "and none besides")
			})
		})
	}
}

func TestIdleLifeWantsAStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t)
		_, err := open(settings{
			server: f.server, database: "sales", account: bob, minute: time.Minute, base: f.base,
			secret: func(string) (string, string) { return password, "1" },
		})
		require.ErrorIs(t, err, sessionlock.ErrInvalid)
		assert.ErrorContains(t, err, "no store")
		f.seen()
	})
}

// Where a part of what makes a session differs, the session does, though all share
// one store.
func TestNoPartOfTheNameIsLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		type place struct{ server, database, account, version string }
		f := newFleet(t)
		places := []place{
			{"http://fm.test", "sales", bob, "1"},
			{"https://fm.test", "sales", bob, "1"},
			{"http://fm.test:8080", "sales", bob, "1"},
			{"http://fm2.test", "sales", bob, "1"},
			{"http://fm.test", "stock", bob, "1"},
			{"http://fm.test", "sales", "eve", "1"},
			{"http://fm.test", "ab", "c", "1"},
			{"http://fm.test", "a", "bc", "b1"}, // laid end to end, all parts are those of the one before
			{"http://fm.test", "a/sessions", "c", "1"},
		}
		servers, nets := map[place]*fileMaker{}, map[place]http.RoundTripper{}
		for _, p := range places { // each has a server of its own, which knows no other's tokens
			fm := newFileMaker(15 * time.Minute)
			fm.admit(p.account, password)
			if servers[p] = fm; strings.HasPrefix(p.server, "https:") {
				nets[p] = overTLS(t, fm)
			} else {
				nets[p] = newNetwork(t, fm).client()
			}
		}
		for range 2 {
			for _, p := range places {
				_, err := f.process(func(set *settings) {
					set.server, set.database, set.account, set.base = p.server, p.database, p.account, nets[p]
					set.secret = func(string) (string, string) { return password, p.version }
				}).list(t.Context(), layout)
				assert.NoError(t, err, "%v", p)
			}
		}
		for p, fm := range servers {
			assert.Equal(t, []call{{callLogin, 1, codeOK}, {callList, 1, codeOK}, {callList, 1, codeOK}}, fm.calls(p.account), "%v", p)
			assert.Empty(t, fm.calls(""), "%v", p)
		}
		for _, name := range f.store.seen() {
			assert.Regexp(t, `^sl:\{[0-9A-Za-z_-]{24}\}:`, name, "a hash")
			for _, part := range []string{bob, "eve", "sales", "stock", "fm.test", "fm2", "8080"} {
				assert.NotContains(t, name, part)
			}
		}
	})
}

func TestDamagedEntryIsAMiss(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t)
		f.list(f.process())
		time.Sleep(time.Minute) // until there is no trace of a lock
		require.Equal(t, 1, f.store.garble(t))
		f.list(f.process())
		f.list(f.process())
		f.seen("login 1", "list 1", "login 2", "list 2", "list 2")
	})
}

func TestUnreadableStoreNeverLogsIn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t)
		us := f.process()
		f.list(us)
		f.store.fail(errors.New("down"))
		f.list(us)
		_, err := f.process().list(t.Context(), layout)
		require.ErrorIs(t, err, sessionlock.ErrUnavailable)
		f.store.fail(nil)
		f.seen("login 1", "list 1", "list 1")
	})
}

func TestLoginAndLogoutAreNeverRetried(t *testing.T) {
	for _, code := range []int{codeToken, codeWindow, 951} {
		t.Run(fmt.Sprint(code), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFleet(t)
				us := f.process()
				f.fm.fail(bob, callLogin, code)
				_, err := us.list(t.Context(), layout)
				var login *sessionlock.LoginError
				require.ErrorAs(t, err, &login)
				require.NotErrorIs(t, err, sessionlock.ErrRejected)
				require.NoError(t, us.sessions.Unsuppress(t.Context(), bob))
				f.list(us)
				f.fm.fail(bob, callLogout, code)
				err = us.sessions.Logout(t.Context(), bob)
				assert.Equal(t, code == codeToken, err == nil, "one that is over is logged out")
				graces()
				f.seen(fmt.Sprintf("login: %d", code), "login 1", "list 1", fmt.Sprintf("logout 1: %d", code))
			})
		})
	}
}

func TestFiftyLateRejectionsCostOneLogin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t)
		var workers [50]*database
		for i := range workers {
			workers[i] = f.process()
			f.list(workers[i])
		}
		f.fm.disconnect(bob)
		var late atomic.Int64
		f.net.put(func(_ http.ResponseWriter, r *http.Request) bool {
			time.Sleep(200 * time.Millisecond)
			if n := late.Add(1); n <= 50 && r.Method == http.MethodGet { // for five logins' time
				time.Sleep(5*time.Second + time.Duration(n)*20*time.Millisecond)
			}
			return false
		})
		var wg sync.WaitGroup
		for _, w := range workers {
			wg.Go(func() { f.list(w) })
		}
		wg.Wait()
		n := map[string]int{}
		for _, c := range f.fm.calls(bob) {
			n[c.String()]++
		}
		assert.Equal(t, map[string]int{"login 1": 1, "list 1": 50, "list 1: 952": 50, "login 2": 1, "list 2": 50}, n)
		assert.Equal(t, 2, f.stored(), "still stored")
	})
}

func TestLateRejectionAdoptsTheNewerSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t)
		us, other := f.process(), f.process()
		f.list(us)
		f.list(other)
		late, release := f.held(us)
		f.fm.disconnect(bob)
		f.list(other)
		release()
		require.NoError(t, <-late)
		f.seen("login 1", "list 1", "list 1", "list 1: 952", "login 2", "list 2", "list 1: 952", "list 2")
		assert.Equal(t, 2, f.stored(), "not removed")
	})
}

func TestSlowEndOfAScopeSparesTheNewerSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t)
		us, other := f.process(), f.process()
		require.NoError(t, us.communicate(t.Context(), nil, func(ctx context.Context) error {
			_, err := us.list(ctx, layout)
			time.Sleep(14 * time.Minute)
			f.list(other)
			_, err2 := us.list(ctx, layout)
			return errors.Join(err, err2)
		}))
		graces()
		f.seen("login 1", "list 1", "login 2", "list 2", "list 1", "logout 1")
		assert.Equal(t, 2, f.stored())
		f.list(other)
	})
}

// A proxy that gives a login the answer of the one before, token and all.
func TestRejectedTokenIsNeverAdopted(t *testing.T) {
	replay := func(f *fleet) (replayed *atomic.Int64) {
		replayed = new(atomic.Int64)
		var token string
		for t, s := range f.fm.sessions {
			if s.account == bob {
				token = t
			}
		}
		f.net.put(func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method != http.MethodPost || !strings.HasSuffix(r.URL.Path, "/sessions") {
				return false
			}
			replayed.Add(1)
			answer(w, map[string]string{"token": token}, codeOK)
			return true
		})
		return replayed
	}
	t.Run("we were given it again", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := newFleet(t)
			us := f.process()
			f.list(us)
			f.fm.disconnect(bob)
			replayed := replay(f)
			_, err := us.list(t.Context(), layout)
			var re *sessionlock.ReauthError
			require.ErrorAs(t, err, &re)
			require.ErrorIs(t, re.Second, sessionlock.ErrRejected)
			f.seen("login 1", "list 1", "list 1: 952")
			assert.EqualValues(t, 1, replayed.Load(), "no loop")
		})
	})
	t.Run("a peer was given it again", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := newFleet(t)
			us, peer := f.process(), f.process()
			f.list(us)
			late, release := f.held(us)
			f.fm.disconnect(bob)
			replayed := replay(f)
			s, err := peer.sessions.Session(t.Context(), bob)
			require.NoError(t, err)
			require.NoError(t, peer.sessions.Invalidate(t.Context(), s))
			again, err := peer.sessions.Session(t.Context(), bob)
			require.NoError(t, err)
			require.Equal(t, s.Token.Reveal(), again.Token.Reveal())
			require.Greater(t, again.Generation(), s.Generation())
			f.net.put(nil)
			release()
			require.NoError(t, <-late)
			f.seen("login 1", "list 1", "list 1: 952", "login 2", "list 2")
			assert.EqualValues(t, 1, replayed.Load())
		})
	})
	t.Run("a scope that ends slowly does not store it again", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := newFleet(t)
			us, other := f.process(), f.process()
			f.list(other)
			require.NoError(t, us.communicate(t.Context(), nil, func(ctx context.Context) error {
				_, err := us.list(ctx, layout)
				f.fm.disconnect(bob)
				f.list(other)
				return err
			}))
			synctest.Wait()
			assert.Equal(t, 2, f.stored())
			f.list(other)
			f.seen("login 1", "list 1", "list 1", "list 1: 952", "login 2", "list 2", "list 2")
		})
	})
}

func TestMaybeExecutedIsNotSentAgain(t *testing.T) {
	grace := fields{"name": "Grace"}
	t.Run("the answer is FileMaker's", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := newFleet(t)
			us := f.process()
			f.fm.fail(bob, callCreate, codeWindow)
			assert.Equal(t, &fileMakerError{http.StatusInternalServerError, codeWindow}, us.create(t.Context(), layout, grace))
			assert.Equal(t, 1, f.fm.count("sales", grace))
			_, err := us.list(t.Context(), layout)
			require.NoError(t, err)
			f.seen("login 1", "create 1: 112", "login 2", "list 2") // the session is dead all the same
		})
	})
	t.Run("typed, where requests carry the session themselves", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := newFleet(t)
			us := f.process(option(sessionlock.WithRejected(byCode)))
			f.fm.fail(bob, callCreate, codeWindow)
			err := us.sessions.Do(t.Context(), bob, us.bare(http.MethodPost, `{"fieldData":{"name":"Grace"}}`))
			var re *sessionlock.ReauthError
			require.ErrorAs(t, err, &re)
			require.ErrorIs(t, err, sessionlock.ErrRejected)
			assertCode(t, codeWindow, re.First)
			require.NoError(t, re.Second)
			assert.Equal(t, 1, f.fm.count("sales", grace))
			f.seen("login 1", "create 1: 112")
		})
	})
	t.Run("unless it may be executed twice", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := newFleet(t)
			f.fm.fail(bob, callCreate, codeWindow)
			require.NoError(t, f.process().create(sessionlock.IdempotentContext(t.Context()), layout, grace))
			assert.Equal(t, 2, f.fm.count("sales", grace))
			f.seen("login 1", "create 1: 112", "login 2", "create 2")
		})
	})
}

func TestCancelBeforeTheSecondRequestReturnsBothErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		us := f.process(func(set *settings) {
			set.base = roundTripper(func(r *http.Request) (*http.Response, error) {
				res, err := f.base.RoundTrip(r)
				if err == nil && res.StatusCode == http.StatusUnauthorized {
					body, err := io.ReadAll(res.Body)
					assert.NoError(t, err)
					assert.NoError(t, res.Body.Close())
					res.Body = io.NopCloser(bytes.NewReader(body))
					cancel()
				}
				return res, err
			})
		})
		f.list(us)
		f.fm.disconnect(bob)
		_, err := us.list(ctx, layout)
		var re *sessionlock.ReauthError
		require.ErrorAs(t, err, &re)
		require.ErrorIs(t, err, context.Canceled)
		require.ErrorContains(t, re.First, "401")
		f.seen("login 1", "list 1", "list 1: 952")
		assert.Zero(t, f.stored(), "and the fleet knows")
	})
}

func TestScopeInsideAScope(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t)
		us := f.process()
		expiry := func() time.Time {
			synctest.Wait()
			st, err := f.process().sessions.Inspect(t.Context(), bob)
			require.NoError(t, err)
			return st.Expiry
		}
		require.NoError(t, us.communicate(t.Context(), nil, func(ctx context.Context) error {
			before := expiry()
			assert.NoError(t, us.communicate(ctx, nil, func(context.Context) error {
				time.Sleep(10 * time.Minute)
				return nil
			}))
			assert.Equal(t, before, expiry(), "the end of an inner one does nothing")
			return nil
		}))
		assert.Equal(t, time.Now().Add(14*time.Minute), expiry(), "that of the outermost renews")
		f.seen("login 1")
	})
	t.Run("scopes that share an orphan end it once", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := newFleet(t)
			us := f.process()
			var wg sync.WaitGroup
			for range 20 {
				wg.Go(func() {
					assert.NoError(t, us.communicate(t.Context(), nil, func(ctx context.Context) error {
						time.Sleep(time.Minute)
						return us.communicate(ctx, nil, func(context.Context) error { return nil })
					}))
				})
			}
			time.Sleep(time.Second)
			f.store.lose()
			wg.Wait()
			graces()
			f.seen("login 1", "logout 1")
		})
	})
}

func TestDifferentPasswordsKeepDifferentSessions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t)
		with := func(password, version string) *database {
			return f.process(func(set *settings) { set.secret = func(string) (string, string) { return password, version } })
		}
		f.list(with(password, "1"))
		_, err := with("guessed", "2").list(t.Context(), layout)
		require.ErrorIs(t, err, sessionlock.ErrDenied, "a session that there is makes no password right")
		f.list(with(password, "1"))
		f.fm.admit(bob, "new")
		f.list(with("new", "3"))
		f.list(with(password, "1"))
		f.list(with("new", "3"))
		f.seen("login 1", "list 1", "login: 212", "list 1", "login 2", "list 2", "list 1", "list 2")
	})
}

// Sessions die under load; no record is lost, and none is made twice.
func TestConcurrentUseIsRaceFree(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t)
		fast := option(sessionlock.WithReauthBackoff(time.Millisecond, time.Millisecond))
		processes := []*database{f.process(fast), f.process(fast)}
		company := fields{"company": "Acme"}
		var made atomic.Int64
		var wg sync.WaitGroup
		for g := range 16 {
			us, grace := processes[g%2], fields{"name": "Grace"}
			wg.Go(func() {
				for i := range 12 {
					time.Sleep(time.Duration(g) * time.Millisecond)
					var err error
					switch (g + i) % 6 {
					case 0:
						f.fm.disconnect(bob)
					case 1:
						_, err = us.find(t.Context(), layout, ada)
					case 2:
						err = us.communicate(t.Context(), company, func(ctx context.Context) error {
							got, err := us.find(ctx, layout, ada)
							if err == nil {
								assert.Equal(t, []fields{{"company": "Acme", "name": "Ada"}}, got)
							}
							return err
						})
					case 3:
						err = us.sessions.Logout(t.Context(), bob)
					default:
						if err = us.create(t.Context(), layout, grace); err == nil {
							made.Add(1)
						}
					}
					assert.True(t, known(err), "%v", err)
				}
			})
		}
		wg.Wait()
		assert.EqualValues(t, made.Load(), f.fm.count("sales", fields{"name": "Grace"}))
		assert.Positive(t, made.Load())
		assert.Empty(t, f.fm.calls(""))
	})
}

// known says whether err is what an unlucky caller may get when sessions die as
// fast as they are made.
func known(err error) bool {
	var refusal *fileMakerError
	return err == nil || errors.Is(err, sessionlock.ErrRejected) || errors.Is(err, sessionlock.ErrSuppressed) ||
		errors.Is(err, sessionlock.ErrStale) || errors.As(err, &refusal) && refusal.code == codeToken
}

// held starts a data call whose request arrives when it is released, and returns
// when it is under way.
func (f *fleet) held(us *database) (done chan error, release func()) {
	gate := make(chan struct{})
	var first atomic.Bool
	f.net.put(func(_ http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodGet && first.CompareAndSwap(false, true) {
			<-gate
		}
		return false
	})
	done = make(chan error, 1)
	go func() {
		_, err := us.list(f.t.Context(), layout)
		done <- err
	}()
	synctest.Wait()
	return done, func() { close(gate) }
}

// bare is a data call that carries its session without the transport.
func (d *database) bare(method string, body string) func(context.Context, sessionlock.Session) error {
	return func(ctx context.Context, s sessionlock.Session) error {
		req, err := http.NewRequestWithContext(ctx, method, d.url+"/layouts/"+layout+"/records", strings.NewReader(body))
		if err != nil {
			return err
		}
		sessionlock.ApplyBearer(req, s)
		res, err := (&http.Client{Transport: d.base}).Do(req)
		if err != nil {
			return err
		}
		return read(res, nil)
	}
}

// byCode classifies the errors of bare.
func byCode(err error) sessionlock.Verdict {
	var refusal *fileMakerError
	if !errors.As(err, &refusal) {
		return sessionlock.NotRejected
	}
	return verdict(refusal.code)
}

func assertCode(t *testing.T, code int, err error) {
	t.Helper()
	var refusal *fileMakerError
	require.ErrorAs(t, err, &refusal)
	assert.Equal(t, code, refusal.code)
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// reauths is an observer of repairs that failed.
type reauths struct{ failed []*sessionlock.ReauthError }

func (r *reauths) Observe(_ context.Context, e sessionlock.Event) {
	var re *sessionlock.ReauthError
	if e.Kind == sessionlock.EventReauthFailed && errors.As(e.Err, &re) {
		r.failed = append(r.failed, re)
	}
}

// overTLS serves fm by https, and returns what reaches it.
func overTLS(t *testing.T, fm *fileMaker) *http.Transport {
	srv := httptest.NewUnstartedServer(fm)
	require.NoError(t, srv.Listener.Close())
	n := &network{t: t, conns: make(chan net.Conn), down: make(chan struct{})}
	srv.Listener = n
	srv.StartTLS()
	t.Cleanup(srv.Close)
	tr := n.client()
	tr.TLSClientConfig = srv.Client().Transport.(*http.Transport).TLSClientConfig.Clone()
	tr.TLSClientConfig.ServerName = "example.com"
	return tr
}
