package sessionlock_test

// What WithKeyring promises, seen from clients: what the store shows, how a fleet
// changes its keys, rightly and wrongly, and what becomes of sessions that somebody
// cannot read.

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock"
	"github.com/sessionlock/sessionlock/internal/entry"
	"github.com/sessionlock/sessionlock/internal/redistest"
)

// The default of WithLoginBudget: nobody replaces a session that he cannot read
// more often than once in this time.
const unreadWindow = 15 * time.Minute

// ringOf returns a keyring that seals with the first of keys and opens with all.
// A key is called as it is written, up to a colon: "a" and "a:other" have one id.
func ringOf(t testing.TB, keys ...string) *sessionlock.Keyring {
	t.Helper()
	k, err := sessionlock.NewKeyring(masterKey(keys[0]))
	require.NoError(t, err)
	for _, also := range keys[1:] {
		require.NoError(t, k.Also(masterKey(also)))
	}
	return k
}

func masterKey(name string) (id string, key []byte) {
	id, _, _ = strings.Cut(name, ":")
	return id, []byte(fmt.Sprintf("%-32s", canary+"-master-"+name)[:32])
}

// sealing is WithKeyring, or nothing without keys.
func sealing(t testing.TB, keys ...string) sessionlock.Option {
	t.Helper()
	if len(keys) == 0 {
		return sessionlock.WithNamespace("")
	}
	return sessionlock.WithKeyring(ringOf(t, keys...))
}

// unreadable counts the sessions that r saw and could not use.
func unreadable(r *recorder) (n int) {
	for _, e := range r.all() {
		if e.Kind == sessionlock.EventUnreadable {
			n++
		}
	}
	return n
}

// What the store shows

// formsOf returns what secret may look like to who reads the store or its
// traffic.
func formsOf(secret string) map[string]string {
	forms := map[string]string{
		"as it is": secret, "hex": hex.EncodeToString([]byte(secret)), "HEX": strings.ToUpper(hex.EncodeToString([]byte(secret))),
	}
	for shift := range 3 { // what stands before it decides how base64 cuts it
		whole := base64.RawStdEncoding.EncodeToString([]byte(strings.Repeat("x", shift) + secret))
		part := whole[4 : len(whole)-4]
		forms[fmt.Sprintf("base64 at %d", shift)] = part
		forms[fmt.Sprintf("base64url at %d", shift)] = strings.NewReplacer("+", "-", "/", "_").Replace(part)
	}
	return forms
}

// shown returns which of secrets s shows, and how.
func shown(s string, secrets map[string]string) (out []string) {
	for what, secret := range secrets {
		for form, text := range formsOf(secret) {
			if strings.Contains(s, text) {
				out = append(out, what+", "+form)
			}
		}
	}
	slices.Sort(out)
	return out
}

// everything returns all names and values of a server.
func everything(t *testing.T, rdb *redis.Client) string {
	t.Helper()
	var all strings.Builder
	names, err := rdb.Keys(t.Context(), "*").Result()
	require.NoError(t, err)
	require.NotEmpty(t, names)
	for _, name := range names {
		value, err := rdb.Get(t.Context(), name).Result()
		if errors.Is(err, redis.Nil) { // a lock that was freed meanwhile
			continue
		}
		require.NoError(t, err)
		dump, err := rdb.Dump(t.Context(), name).Result()
		require.NoError(t, err)
		fmt.Fprintln(&all, name, value, dump)
	}
	return all.String()
}

// monitor records every command that the server is sent, until stop, which
// returns them.
func monitor(t *testing.T, srv *redistest.Server) (stop func() string) {
	t.Helper()
	conn, err := (&net.Dialer{Timeout: 5 * time.Second}).DialContext(t.Context(), "tcp", srv.Addr())
	require.NoError(t, err)
	require.NoError(t, conn.SetDeadline(time.Now().Add(30*time.Second)))
	_, err = conn.Write([]byte("MONITOR\r\n"))
	require.NoError(t, err)
	in := bufio.NewReader(conn)
	ok, err := in.ReadString('\n')
	require.NoError(t, err)
	require.Equal(t, "+OK\r\n", ok)
	const last = "that was all"
	var all strings.Builder
	over := make(chan error, 1)
	go func() {
		for !strings.Contains(all.String(), last) {
			line, err := in.ReadString('\n')
			if err != nil {
				over <- err
				return
			}
			all.WriteString(line)
		}
		over <- nil
	}()
	return func() string {
		defer conn.Close()
		require.NoError(t, srv.Client().Echo(t.Context(), last).Err())
		require.NoError(t, <-over)
		return all.String()
	}
}

// secretive is an upstream whose sessions, and the key they are of, are secrets.
type secretive struct {
	mu sync.Mutex
	n  int
}

const secretKey = "c4n4ry-user@example.org"

// secrets are all that a sealed store must not show.
func secrets() map[string]string {
	_, master := masterKey("2025-02")
	return map[string]string{
		"the token": "c4n4ry-token", "a value's name": "c4n4ry-name", "a value": "c4n4ry-value", "the refresh token": "c4n4ry-refresh",
		"the key": secretKey, "the namespace": "c4n4ry-namespace", "the master key": strings.TrimSpace(string(master)), "the key secret": "c4n4ry-key-secret",
	}
}

func (u *secretive) Login(context.Context, string) (sessionlock.Session, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.n++
	s := sessionlock.Session{
		Token: sessionlock.NewToken(fmt.Sprintf("c4n4ry-token-%d", u.n)), Expiry: time.Now().Add(time.Hour), RefreshExpiry: time.Now().Add(2 * time.Hour),
	}
	return s.WithValue("c4n4ry-name", "c4n4ry-value").WithValue("refresh", fmt.Sprintf("c4n4ry-refresh-%d", u.n)), nil
}

// live runs a whole life of sessions, by two clients, and returns what the store
// showed on the way.
func live(t *testing.T, srv *redistest.Server, keys ...string) (stored, sent string) {
	t.Helper()
	u, rdb := new(secretive), srv.Client()
	stop := monitor(t, srv)
	open := func() *sessionlock.Client {
		c, err := sessionlock.New(acme, sessionlock.AuthenticatorFunc(u.Login), sessionlock.WithRedis(srv.Client()), sealing(t, keys...),
			sessionlock.WithNamespace("c4n4ry-namespace"), sessionlock.WithKeySecret([]byte("c4n4ry-key-secret")), sessionlock.WithIdleTTL(time.Minute),
			sessionlock.WithLogout(func(context.Context, sessionlock.Session) error { return nil }),
			sessionlock.WithRefresh(func(ctx context.Context, key string, _ sessionlock.Session) (sessionlock.Session, error) {
				return u.Login(ctx, key)
			}))
		require.NoError(t, err)
		t.Cleanup(func() { _ = c.Close(context.WithoutCancel(t.Context())) })
		return c
	}
	var seen strings.Builder
	look := func() { seen.WriteString(everything(t, rdb)) }
	a, b := open(), open()
	require.Contains(t, tokenOf(t, a, secretKey), "c4n4ry-token") // a login
	look()
	first := tokenOf(t, b, secretKey) // a hit
	look()
	require.NoError(t, b.Do(t.Context(), secretKey, rejectOld(first))) // a rejection and a refresh
	require.Equal(t, uint64(1), b.Stats().Refreshes)
	look()
	require.NoError(t, a.Scope(t.Context(), secretKey, func(ctx context.Context, sc *sessionlock.Scope) error { return sc.Do(ctx, nothing) }))
	look()
	require.NoError(t, a.Logout(t.Context(), secretKey))
	look()
	s, err := u.Login(t.Context(), secretKey)
	require.NoError(t, err)
	_, err = b.Put(t.Context(), secretKey, s)
	require.NoError(t, err)
	look()
	require.NoError(t, a.Close(t.Context()))
	require.NoError(t, b.Close(t.Context()))
	look()
	return seen.String(), stop()
}

func TestRedisSeesNoSecretOfASealedSession(t *testing.T) {
	srv := redistest.Start(t)
	stored, sent := live(t, srv, "2025-02")
	assert.Empty(t, shown(stored, secrets()), "names and values")
	assert.Empty(t, shown(sent, secrets()), "commands")
	assert.Contains(t, stored, "2025-02", "the id of the key stands in clear")
	assert.Contains(t, strings.ToLower(sent), "evalsha")

	require.NoError(t, srv.Client().FlushAll(t.Context()).Err())
	stored, sent = live(t, srv)
	for _, what := range []string{"the token", "a value's name", "a value", "the refresh token", "the key", "the namespace"} {
		assert.Contains(t, shown(stored, secrets()), what+", as it is", "in clear the test sees it")
		assert.Contains(t, shown(sent, secrets()), what+", as it is", "in clear the test sees it")
	}
	assert.NotContains(t, stored+sent, "c4n4ry-key-secret")
}

// The other forms that the test above looks for are such that it would find them.
func TestEveryFormOfASecretIsFound(t *testing.T) {
	const secret = "c4n4ry-token-1"
	for shift := range 4 {
		text := strings.Repeat("<", shift) + secret + ">>>"
		for form, s := range map[string]string{
			"base64": base64.StdEncoding.EncodeToString([]byte(text)), "base64url": base64.URLEncoding.EncodeToString([]byte(text)),
			"hex": hex.EncodeToString([]byte(text)), "HEX": fmt.Sprintf("%X", text),
		} {
			assert.NotEmpty(t, shown(s, secrets()), "%s at %d", form, shift)
		}
	}
}

// Sharing

// onEach runs f on the caches that have fake time.
func onEach(t *testing.T, f func(t *testing.T, store func() sessionlock.Option)) {
	t.Helper()
	t.Run("memory", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			cache := new(sessionlock.MemoryCache)
			f(t, func() sessionlock.Option { return sessionlock.WithCache(cache) })
		})
	})
	t.Run("redis", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			_, client := bubbleRedis(t)
			f(t, func() sessionlock.Option { return sessionlock.WithRedis(client()) })
		})
	})
}

func TestSealedSessionIsSharedAsItIs(t *testing.T) {
	onEach(t, func(t *testing.T, store func() sessionlock.Option) {
		expiry := time.Now().Add(50 * time.Minute).Truncate(time.Microsecond)
		refresh := time.Now().Add(30 * 24 * time.Hour).Truncate(time.Microsecond)
		u := &upstream{script: func(context.Context, string, int) (sessionlock.Session, error) {
			s := sessionlock.Session{Token: sessionlock.NewToken("tökén \xff"), Expiry: expiry, RefreshExpiry: refresh}
			return s.WithValue("", "nameless").WithValue("empty", "").WithValue("bytes", "\x00\xff\n").WithValue("long", strings.Repeat("v", 1020)), nil
		}}
		events := new(recorder)
		for i := range 4 {
			c, err := sessionlock.New(acme, u, store(), sealing(t, "a"), sessionlock.WithObserver(events))
			require.NoError(t, err)
			defer c.Close(context.WithoutCancel(t.Context()))
			s, err := c.Session(t.Context(), "bob")
			require.NoError(t, err)
			assert.Equal(t, "tökén \xff", s.Token.Reveal())
			assert.True(t, s.Expiry.Equal(expiry), "client %d: %v, not %v", i, s.Expiry, expiry)
			assert.True(t, s.RefreshExpiry.Equal(refresh), "client %d: %v, not %v", i, s.RefreshExpiry, refresh)
			for name, want := range map[string]string{"": "nameless", "empty": "", "bytes": "\x00\xff\n", "long": strings.Repeat("v", 1020)} {
				assert.Equal(t, want, s.Value(name), name)
			}
			assert.Equal(t, "bob", s.Key())
		}
		assert.Equal(t, 1, u.logins())
		assert.Zero(t, unreadable(events))
	})
}

// The largest session that is stored in clear is stored sealed as well.
func TestSealingCostsNoRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		token := strings.Repeat("t", 16<<10)
		u := &upstream{script: func(context.Context, string, int) (sessionlock.Session, error) {
			return sessionlock.Session{Token: sessionlock.NewToken(token)}.WithValue("v", strings.Repeat("v", 1<<10-1)), nil
		}}
		cache := new(sessionlock.MemoryCache)
		for range 2 {
			require.Equal(t, token, tokenOf(t, newClient(t, u, cache, sessionlock.WithKeyring(ringOf(t, strings.Repeat("i", 32)))), strings.Repeat("k", 256)))
		}
		assert.Equal(t, 1, u.logins())
	})
}

// Rotation

// member is one of a fleet.
type member struct {
	*sessionlock.Client
	ring *sessionlock.Keyring
}

func enlist(t *testing.T, u *upstream, cache sessionlock.Cache, ring *sessionlock.Keyring, opts ...sessionlock.Option) *member {
	t.Helper()
	if ring != nil {
		opts = append(opts, sessionlock.WithKeyring(ring))
	}
	return &member{newClient(t, u, cache, opts...), ring}
}

// work has every process asked every other second for d.
func work(t *testing.T, fleet []*member, d time.Duration, each func(p int, a answer)) {
	t.Helper()
	const pause = 2 * time.Second
	for range d / pause {
		time.Sleep(pause)
		answers := make([]<-chan answer, len(fleet))
		for i, p := range fleet {
			answers[i] = askFor(t.Context(), p.Client, "bob")
		}
		for i, ch := range answers {
			each(i, <-ch)
		}
	}
}

// The documented procedure: no session is lost, and nobody waits.
func TestRotationInOrderCostsNoLogin(t *testing.T) {
	for name, near := range map[string]sessionlock.Option{
		"with near copies": sessionlock.WithNearCache(100, time.Minute), "without": sessionlock.WithNearCache(0, time.Minute),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				u, cache, events := &upstream{life: time.Hour, takes: 50 * time.Millisecond}, new(sessionlock.MemoryCache), new(recorder)
				open := func(ring *sessionlock.Keyring) *member {
					return enlist(t, u, cache, ring, near, sessionlock.WithObserver(events))
				}
				fleet := []*member{}
				for range 4 {
					fleet = append(fleet, open(ringOf(t, "old")))
				}
				served := func(d time.Duration) {
					work(t, fleet, d, func(p int, a answer) { require.NoError(t, a.err, "process %d", p) })
				}
				replace := func(keys ...string) {
					for i, p := range fleet {
						require.NoError(t, p.Close(t.Context()))
						fleet[i] = open(ringOf(t, keys...))
						served(time.Minute)
					}
				}
				served(time.Minute)
				for i, p := range fleet { // half while they run, half by a restart
					if i%2 == 0 {
						require.NoError(t, p.ring.Also(masterKey("new")))
					} else {
						require.NoError(t, p.Close(t.Context()))
						fleet[i] = open(ringOf(t, "old", "new"))
					}
					served(time.Minute)
				}
				replace("new", "old")
				assert.Equal(t, 1, u.logins(), "until the session ends by itself")
				served(time.Hour)
				assert.Equal(t, 2, u.logins(), "its successor")
				replace("new")
				served(time.Minute)
				assert.Equal(t, 2, u.logins(), "until that one ends")
				served(time.Hour)
				assert.Equal(t, 3, u.logins())
				assert.Zero(t, unreadable(events))
			})
		})
	}
}

// Rotations that went wrong: for an hour processes of a fleet meet sessions that
// they have no key for. Each key of the fleet costs its own login and, once a
// window, one more; whoever can read what is stored is served.
func TestRotationOutOfOrderCausesNoStorm(t *testing.T) {
	for name, tt := range map[string]struct {
		populations [][]string // the keys of each
		also        []string   // what heals it, in all of them
		logins      int        // in an hour
	}{
		"the new key seals before all have it":       {[][]string{{"new", "old"}, {"old"}}, []string{"new"}, 2},
		"the old key is dropped before it is unused": {[][]string{{"old", "new"}, {"new"}}, []string{"old"}, 2},
		"nobody has both":                            {[][]string{{"old"}, {"new"}}, []string{"old", "new"}, 5},
		"three keys":                                 {[][]string{{"old"}, {"new"}, {"newer"}}, []string{"old", "new", "newer"}, 5},
		"two steps at once":                          {[][]string{{"old"}, {"new", "old"}, {"new"}}, []string{"old", "new"}, 5},
		"one id, two keys":                           {[][]string{{"same:1"}, {"same:2"}}, nil, 5},
	} {
		for first := range tt.populations {
			t.Run(fmt.Sprintf("%s, %s first", name, tt.populations[first]), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					u, cache := &upstream{life: 24 * time.Hour, takes: 50 * time.Millisecond}, new(sessionlock.MemoryCache)
					fleet, of := []*member{}, []int{}
					for i, keys := range tt.populations {
						for _, near := range []int{0, 100} {
							fleet = append(fleet, enlist(t, u, cache, ringOf(t, keys...), sessionlock.WithNearCache(near, time.Minute)))
							of = append(of, i)
						}
					}
					tokenOf(t, fleet[2*first].Client, "bob")
					began, failed := time.Now(), make([]int, len(fleet))
					served, fewest := 0, len(fleet) // in one round
					work(t, fleet, 58*time.Minute, func(p int, a answer) {
						if a.err == nil {
							served++
						} else {
							failed[p]++
							requireUnreadable(t, a.err, tt.populations)
						}
						if p == len(fleet)-1 {
							served, fewest = 0, min(served, fewest)
						}
					})
					t.Logf("%d logins in an hour; calls refused: %v", u.logins(), failed)
					assert.GreaterOrEqual(t, fewest, 2, "a whole population is served")
					require.LessOrEqual(t, u.logins(), tt.logins)
					assert.Equal(t, 1, u.atOnce())
					at := u.starts(began)
					for i := 2; i < len(at); i++ {
						assert.GreaterOrEqual(t, at[i]-at[i-1], unreadWindow)
					}
					for p, n := range failed {
						if tt.logins == 2 {
							assert.Zero(t, n, "process %d of population %d: what the others store it can read", p, of[p])
						}
					}
					assert.Empty(t, u.ended(), "what cannot be read is not logged out")

					before := u.logins()
					for _, p := range fleet {
						for _, also := range tt.also {
							_ = p.ring.Also(masterKey(also)) // it may have it
						}
					}
					if tt.also != nil {
						work(t, fleet, 30*time.Minute, func(p int, a answer) { require.NoError(t, a.err, "process %d is healed at once", p) })
						assert.Equal(t, before, u.logins())
					}
				})
			})
		}
	}
}

// requireUnreadable requires that err says why a session cannot be used, and
// nothing secret.
func requireUnreadable(t *testing.T, err error, populations [][]string) {
	t.Helper()
	assertUnavailable(t, err)
	require.NotContains(t, err.Error(), canary)
	require.NotContains(t, err.Error(), "bob")
	var ids []string
	for _, key := range slices.Concat(populations...) {
		if id, sub, _ := strings.Cut(key, ":"); sub == "" {
			ids = append(ids, id)
		}
	}
	named := len(ids) == 0
	for _, id := range ids {
		named = named || strings.Contains(err.Error(), `unknown key: "`+id+`"`)
	}
	require.Truef(t, named, "names the key: %v", err)
}

// A refused call costs little: no lock is taken for it.
func TestUnreadableSessionIsNotContendedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, sp, events := &upstream{life: 24 * time.Hour}, new(spy), new(recorder)
		cache := spyCache{sp, new(sessionlock.MemoryCache)}
		a, b := enlist(t, u, cache, ringOf(t, "a")), enlist(t, u, cache, ringOf(t, "b"), sessionlock.WithObserver(events))
		tokenOf(t, a.Client, "bob")
		tokenOf(t, b.Client, "bob")
		time.Sleep(time.Second)
		calls, loads, before := sp.count(), sp.count(opLoad), unreadable(events)
		for range 100 {
			_, err := a.Session(t.Context(), "bob")
			require.Error(t, err)
		}
		assert.Equal(t, 100, sp.count(opLoad)-loads)
		assert.Equal(t, 100, sp.count()-calls, "nothing but a read for each")
		assert.Zero(t, unreadable(events)-before)
		assert.Equal(t, 2, u.logins())
	})
}

// A login that was never sent is not the one that a window allows.
func TestUnreadableSessionIsReplacedAfterALoginThatWasNotSent(t *testing.T) {
	for name, spoil := range map[string]func(t *testing.T, u *upstream, begun func(func()), b *sessionlock.Client){
		"its caller left": func(t *testing.T, _ *upstream, begun func(func()), b *sessionlock.Client) {
			ctx, leave := context.WithCancel(t.Context())
			begun(leave)
			_, err := b.Session(ctx, "bob")
			require.ErrorIs(t, err, context.Canceled)
		},
		"it could not be dialled": func(t *testing.T, u *upstream, _ func(func()), b *sessionlock.Client) {
			u.script = func(context.Context, string, int) (sessionlock.Session, error) {
				return sessionlock.Session{}, sessionlock.RetryAfter(errors.New("503"), time.Second)
			}
			_, err := b.Session(t.Context(), "bob")
			var failed *sessionlock.LoginError
			require.ErrorAs(t, err, &failed)
			require.Equal(t, sessionlock.LoginDeferred, failed.Class)
			u.script = nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				u, sp := &upstream{life: 24 * time.Hour}, new(spy)
				var begun atomic.Pointer[func()]
				sp.after = func(_ context.Context, op, name string) error {
					if do := begun.Load(); do != nil && op == opSwap && isEntry(name) {
						(*do)()
						time.Sleep(time.Millisecond) // whoever left is gone
					}
					return nil
				}
				cache := spyCache{sp, new(sessionlock.MemoryCache)}
				tokenOf(t, enlist(t, u, cache, ringOf(t, "a")).Client, "bob")
				synctest.Wait()
				b := enlist(t, u, cache, ringOf(t, "b"))
				spoil(t, u, func(do func()) { begun.Store(&do) }, b.Client)
				begun.Store(nil)
				time.Sleep(5 * time.Second)
				before := u.logins()
				tokenOf(t, b.Client, "bob")
				assert.Equal(t, 1, u.logins()-before)
			})
		})
	}
}

// What suppresses the replacement of a session ends with that session.
func TestUnreadableSessionThatEndsIsSucceededAtOnce(t *testing.T) {
	for name, end := range map[string]func(t *testing.T, s sessionlock.Session, b *sessionlock.Client){
		"by expiry": func(_ *testing.T, _ sessionlock.Session, _ *sessionlock.Client) { time.Sleep(5 * time.Minute) },
		"by rejection": func(t *testing.T, s sessionlock.Session, b *sessionlock.Client) {
			require.NoError(t, b.Invalidate(t.Context(), s))
		},
		"by logout": func(t *testing.T, s sessionlock.Session, b *sessionlock.Client) {
			require.NoError(t, b.Logout(t.Context(), "bob"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				u, cache := &upstream{life: 5 * time.Minute}, new(sessionlock.MemoryCache)
				a, b := enlist(t, u, cache, ringOf(t, "a")), enlist(t, u, cache, ringOf(t, "b"))
				tokenOf(t, a.Client, "bob")
				s, err := b.Session(t.Context(), "bob")
				require.NoError(t, err)
				time.Sleep(time.Second)
				_, err = a.Session(t.Context(), "bob")
				require.ErrorIs(t, err, sessionlock.ErrUnavailable)
				end(t, s, b.Client)
				assert.Equal(t, "bob/3", tokenOf(t, a.Client, "bob"))
			})
		})
	}
}

// An operator need not wait for the end of the window.
func TestUnsuppressLetsAnUnreadableSessionBeReplaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, cache := &upstream{life: 24 * time.Hour}, new(sessionlock.MemoryCache)
		a, b := newClient(t, u, cache, sealing(t, "a")), newClient(t, u, cache, sealing(t, "b"))
		tokenOf(t, a, "bob")
		tokenOf(t, b, "bob")
		time.Sleep(time.Second)
		_, err := a.Session(t.Context(), "bob")
		requireUnreadable(t, err, [][]string{{"b"}})
		require.NoError(t, a.Unsuppress(t.Context(), "bob"))
		assert.Equal(t, "bob/3", tokenOf(t, a, "bob"))
	})
}

// The same while somebody waits for a login of the others.
func TestWaiterForAnUnreadableSessionLogsInWhenThereIsNone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, cache := &upstream{life: 5 * time.Minute}, new(sessionlock.MemoryCache)
		a, b := enlist(t, u, cache, ringOf(t, "a")), enlist(t, u, cache, ringOf(t, "b"), sessionlock.WithRefreshAhead(4*time.Minute))
		tokenOf(t, a.Client, "bob")
		s, err := b.Session(t.Context(), "bob") // nobody may replace it for a window
		require.NoError(t, err)
		u.takes = 5 * time.Second
		for began := u.logins(); u.logins() == began; time.Sleep(time.Second) { // b renews it ahead of time
			tokenOf(t, b.Client, "bob")
		}
		waiting := askFor(t.Context(), a.Client, "bob")
		synctest.Wait()
		u.takes = 0
		require.NoError(t, b.Logout(t.Context(), "bob"))
		got := <-waiting
		require.NoError(t, got.err)
		assert.NotEqual(t, s.Token.Reveal(), got.session.Token.Reveal())
	})
}

// Turning it on and off

// A session in clear is as good as none, and is never used: anybody can write one.
func TestSessionInClearIsAMissWithAKeyring(t *testing.T) {
	onEach(t, func(t *testing.T, store func() sessionlock.Option) {
		u, events := &upstream{life: 24 * time.Hour}, new(recorder)
		open := func(opts ...sessionlock.Option) *sessionlock.Client {
			c, err := sessionlock.New(acme, u, append(opts, store(), sessionlock.WithObserver(events), sessionlock.WithLogout(u.Logout))...)
			require.NoError(t, err)
			t.Cleanup(func() { _ = c.Close(context.WithoutCancel(t.Context())) })
			return c
		}
		plain := open()
		require.Equal(t, "bob/1", tokenOf(t, plain, "bob"))
		require.NoError(t, plain.Close(t.Context()))
		for range 3 {
			require.Equal(t, "bob/2", tokenOf(t, open(sealing(t, "a")), "bob"))
		}
		assert.Equal(t, 1, unreadable(events))
		time.Sleep(time.Hour)
		assert.Empty(t, u.ended())
	})
}

// A fleet that turns the keyring on or off client by client. Those with it take a
// session in clear for none; those without cannot read a sealed one, and do not
// replace it, for theirs would stand in clear: they wait until it ends, or is
// logged out. In a namespace of its own the change costs one login, and nobody
// waits.
func TestRolloutOfAKeyringCausesNoStorm(t *testing.T) {
	moved := sessionlock.WithNamespace("2")
	for name, tt := range map[string]struct {
		from, to []sessionlock.Option
		logins   int
		waits    bool
	}{
		"on":                     {nil, []sessionlock.Option{sealing(t, "a")}, 4, true},
		"off":                    {[]sessionlock.Option{sealing(t, "a")}, nil, 1, true},
		"on, another namespace":  {nil, []sessionlock.Option{sealing(t, "a"), moved}, 2, false},
		"off, another namespace": {[]sessionlock.Option{sealing(t, "a")}, []sessionlock.Option{moved}, 2, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				u, cache := &upstream{life: 24 * time.Hour, takes: 50 * time.Millisecond}, new(sessionlock.MemoryCache)
				fleet, refused := []*member{}, 0
				for range 8 {
					fleet = append(fleet, enlist(t, u, cache, nil, tt.from...))
				}
				count := func(_ int, a answer) {
					if a.err != nil {
						refused++
						requireUnreadable(t, a.err, [][]string{{"a"}})
					}
				}
				work(t, fleet, time.Minute, count)
				for i, p := range fleet {
					require.NoError(t, p.Close(t.Context()))
					fleet[i] = enlist(t, u, cache, nil, tt.to...)
					work(t, fleet, time.Minute, count)
				}
				work(t, fleet, unreadWindow, count) // none of them waits longer
				if name == "off" {
					before := refused
					work(t, fleet, time.Minute, count)
					assert.Greater(t, refused, before)
					require.NoError(t, fleet[0].Logout(t.Context(), "bob"))
					tt.logins++
				}
				work(t, fleet, time.Minute, func(_ int, a answer) { require.NoError(t, a.err) })
				t.Logf("%d logins, %d calls refused", u.logins(), refused)
				assert.LessOrEqual(t, u.logins(), tt.logins)
				assert.Equal(t, tt.waits, refused > 0)
			})
		})
	}
}

// Forged and damaged sessions

// forgeable is a cache whose entries a test reads and forges.
type forgeable struct {
	spyCache
}

func newForgeable() forgeable { return forgeable{spyCache{new(spy), new(sessionlock.MemoryCache)}} }

// entries returns the names of the entries, in no order that means anything.
func (s forgeable) entries() []string { return s.seen(entrySuffix) }

func (s forgeable) entry(t *testing.T, name string) entry.Entry {
	t.Helper()
	raw, err := s.MemoryCache.Load(t.Context(), name)
	require.NoError(t, err)
	e, err := entry.Decode(raw)
	require.NoError(t, err)
	return e
}

// put writes raw over an entry, as whoever can write to the store could.
func (s forgeable) put(t *testing.T, name string, raw []byte) {
	t.Helper()
	old, err := s.MemoryCache.Load(t.Context(), name)
	require.NoError(t, err)
	now, err := s.CompareAndSwap(t.Context(), name, old, raw, 24*time.Hour)
	require.NoError(t, err)
	require.Equal(t, raw, now)
}

func (s forgeable) forge(t *testing.T, name string, change func(*entry.Entry)) {
	t.Helper()
	e := s.entry(t, name)
	change(&e)
	e.Stamp = entry.NewNonce()
	raw, err := entry.Encode(e)
	require.NoError(t, err)
	s.put(t, name, raw)
}

// What was sealed for one place is nothing in another, and neither is what was
// sealed by another key, or not sealed. Each costs the one login that replaces it.
func TestSealedSessionOutOfItsPlaceIsAMiss(t *testing.T) {
	sealed := func(t *testing.T, s forgeable, u *upstream, key string, opts ...sessionlock.Option) entry.Session {
		t.Helper()
		before := s.entries()
		tokenOf(t, newClient(t, u, s, opts...), key)
		for _, name := range s.entries() {
			if !slices.Contains(before, name) {
				return s.entry(t, name).Session
			}
		}
		t.Fatal("nothing was stored")
		return entry.Session{}
	}
	for name, forge := range map[string]func(t *testing.T, s forgeable, u *upstream, e *entry.Entry){
		"of another key": func(t *testing.T, s forgeable, u *upstream, e *entry.Entry) {
			e.Session.Record = sealed(t, s, u, "eve", sealing(t, "a")).Record
		},
		"of another key, with its generation": func(t *testing.T, s forgeable, u *upstream, e *entry.Entry) {
			e.Session = sealed(t, s, u, "eve", sealing(t, "a"))
			e.Gen = max(e.Gen, e.Session.Gen)
		},
		"of another namespace, with its generation": func(t *testing.T, s forgeable, u *upstream, e *entry.Entry) {
			e.Session = sealed(t, s, u, "bob", sealing(t, "a"), sessionlock.WithNamespace("staging"))
			e.Gen = max(e.Gen, e.Session.Gen)
		},
		"of an older generation": func(_ *testing.T, _ forgeable, _ *upstream, e *entry.Entry) { e.Session.Gen++; e.Gen = e.Session.Gen },
		"of a later generation":  func(_ *testing.T, _ forgeable, _ *upstream, e *entry.Entry) { e.Session.Gen-- },
		"by another key of the same id": func(t *testing.T, _ forgeable, u *upstream, e *entry.Entry) {
			other := newForgeable()
			e.Session = sealed(t, other, u, "bob", sealing(t, "a:other"))
			e.Gen = max(e.Gen, e.Session.Gen)
		},
		"in clear": func(t *testing.T, _ forgeable, u *upstream, e *entry.Entry) {
			e.Session = sealed(t, newForgeable(), u, "bob")
			e.Gen = max(e.Gen, e.Session.Gen)
		},
		"empty":            func(_ *testing.T, _ forgeable, _ *upstream, e *entry.Entry) { e.Session.Record = "" },
		"cut off":          func(_ *testing.T, _ forgeable, _ *upstream, e *entry.Entry) { e.Session.Record = e.Session.Record[:60] },
		"with a byte more": func(_ *testing.T, _ forgeable, _ *upstream, e *entry.Entry) { e.Session.Record += "x" },
		"of the largest size": func(_ *testing.T, _ forgeable, _ *upstream, e *entry.Entry) {
			e.Session.Record += strings.Repeat("x", entry.MaxRecord-len(e.Session.Record))
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				u, s, events := &upstream{life: 24 * time.Hour}, newForgeable(), new(recorder)
				require.Equal(t, "bob/1", tokenOf(t, newClient(t, u, s, sealing(t, "a")), "bob"))
				at := s.entries()[0]
				s.forge(t, at, func(e *entry.Entry) { forge(t, s, u, e) })
				before := u.logins()
				for range 3 {
					c := newClient(t, u, s, sealing(t, "a"), sessionlock.WithObserver(events))
					require.Equal(t, fmt.Sprintf("bob/%d", before+1), tokenOf(t, c, "bob"))
				}
				assert.Equal(t, 1, u.logins()-before)
				assert.Equal(t, 1, unreadable(events))
				time.Sleep(time.Minute)
				assert.Empty(t, u.ended())
			})
		})
	}
}

// Every bit of a sealed record, one after the other. A damaged id may be that of a
// key that somebody else has, and so may a record that cannot be opened: each is
// replaced, but not more often than once a window.
func TestFlippedBitOfASealedSessionIsAMiss(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, s, events := &upstream{life: 24 * time.Hour}, newForgeable(), new(recorder)
		c := newClient(t, u, s, sealing(t, "a"), sessionlock.WithObserver(events), sessionlock.WithNearCache(0, time.Minute))
		require.Equal(t, "bob/1", tokenOf(t, c, "bob"))
		at := s.entries()[0]
		for bit := range 8 * len(s.entry(t, at).Session.Record) {
			s.forge(t, at, func(e *entry.Entry) {
				record := []byte(e.Session.Record)
				record[bit/8] ^= 1 << (bit % 8)
				e.Session.Record = string(record)
			})
			require.Equalf(t, fmt.Sprintf("bob/%d", bit+2), tokenOf(t, c, "bob"), "bit %d", bit)
			require.Equal(t, bit+1, unreadable(events))
			time.Sleep(unreadWindow)
		}
		assert.Empty(t, u.ended())
	})
}

// Every bit of a whole entry: what an attacker makes of it is an error or a login
// more, never another session.
func TestFlippedBitOfAnEntryGivesNoOtherSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, s := &upstream{life: 24 * time.Hour}, newForgeable()
		tokenOf(t, newClient(t, u, s, sealing(t, "a")), "bob")
		at := s.entries()[0]
		whole, err := s.MemoryCache.Load(t.Context(), at)
		require.NoError(t, err)
		for bit := range 8 * len(whole) {
			forged := bytes.Clone(whole)
			forged[bit/8] ^= 1 << (bit % 8)
			s.put(t, at, forged)
			before := u.logins()
			c := newClient(t, u, s, sealing(t, "a"))
			got, err := c.Session(t.Context(), "bob")
			if err == nil && got.Token.Reveal() != "bob/1" {
				require.Equalf(t, fmt.Sprintf("bob/%d", before+1), got.Token.Reveal(), "bit %d", bit)
			}
			require.LessOrEqual(t, u.logins()-before, 1)
			require.NoError(t, c.Close(t.Context()))
		}
	})
}

// Sealing does not keep anybody from putting an older session back; but who saw it
// rejected does not use it.
func TestOlderSealedSessionPutBackIsNotUsedByWhoSawItRejected(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, s := &upstream{life: 24 * time.Hour}, newForgeable()
		c := newClient(t, u, s, sealing(t, "a"))
		require.Equal(t, "bob/1", tokenOf(t, c, "bob"))
		at := s.entries()[0]
		old, err := s.MemoryCache.Load(t.Context(), at)
		require.NoError(t, err)
		require.NoError(t, c.Do(t.Context(), "bob", rejectOld("bob/1")))
		require.Equal(t, "bob/2", tokenOf(t, c, "bob"))
		s.put(t, at, old)
		time.Sleep(time.Second)
		assert.NotEqual(t, "bob/1", tokenOf(t, c, "bob"))
	})
}

// Logouts

// A session that cannot be read is not logged out by who replaces or removes it:
// others may use it, and its token is not known.
func TestUnreadableSessionIsLeftAlone(t *testing.T) {
	for name, end := range map[string]func(t *testing.T, b *sessionlock.Client){
		"replaced by a login": func(t *testing.T, b *sessionlock.Client) { tokenOf(t, b, "bob") },
		"replaced by a Put": func(t *testing.T, b *sessionlock.Client) {
			_, err := b.Put(t.Context(), "bob", sessionlock.Session{Token: sessionlock.NewToken("put")})
			require.NoError(t, err)
			require.Equal(t, "put", tokenOf(t, b, "bob"))
		},
		"removed by a Logout": func(t *testing.T, b *sessionlock.Client) { require.NoError(t, b.Logout(t.Context(), "bob")) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				u, s := &upstream{life: 24 * time.Hour}, newForgeable()
				a, b := newClient(t, u, s, sealing(t, "a")), newClient(t, u, s, sealing(t, "b"))
				tokenOf(t, a, "bob")
				first := s.entry(t, s.entries()[0]).Session.Gen
				end(t, b)
				require.NotEqual(t, first, s.entry(t, s.entries()[0]).Session.Gen)
				time.Sleep(time.Hour)
				assert.Empty(t, u.ended())
			})
		})
	}
}

// One that can be read is logged out as ever.
func TestSealedSessionIsLoggedOutByWhoReadsIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, cache := &upstream{life: 24 * time.Hour}, new(sessionlock.MemoryCache)
		a, b := newClient(t, u, cache, sealing(t, "a", "b")), newClient(t, u, cache, sealing(t, "b", "a"))
		require.Equal(t, "bob/1", tokenOf(t, a, "bob"))
		require.NoError(t, b.Do(t.Context(), "bob", rejectOld("bob/1")))
		require.Empty(t, u.ended(), "what was rejected is not")
		_, err := a.Put(t.Context(), "bob", sessionlock.Session{Token: sessionlock.NewToken("put")}.WithValue("v", "1"))
		require.NoError(t, err)
		time.Sleep(time.Minute)
		require.Equal(t, []string{"bob/2"}, u.ended(), "what a Put replaced")
		require.NoError(t, b.Logout(t.Context(), "bob"))
		require.Equal(t, []string{"bob/2", "put"}, u.ended())
		assert.Equal(t, "1", u.out[1].Value("v"))
	})
}

// An upstream that hands everybody one token: ending what a login brought in vain
// would end the stored session too, and who cannot read that one cannot know.
func TestSessionIsNotEndedWhileTheStoredOneCannotBeRead(t *testing.T) {
	shared := func() sessionlock.Session { return sessionlock.Session{Token: sessionlock.NewToken("one for all")} }
	for name, script := range map[string]func(t *testing.T, a *sessionlock.Client) (sessionlock.Session, error){
		"a login that failed": func(*testing.T, *sessionlock.Client) (sessionlock.Session, error) {
			return shared(), errors.New("half a login")
		},
		"an unusable session": func(*testing.T, *sessionlock.Client) (sessionlock.Session, error) {
			s := shared()
			s.Expiry = time.Now().Add(-time.Second)
			return s, nil
		},
		"an overtaken login": func(t *testing.T, a *sessionlock.Client) (sessionlock.Session, error) {
			_, err := a.Put(t.Context(), "bob", shared())
			require.NoError(t, err)
			return shared(), nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cache := new(sessionlock.MemoryCache)
				u := &upstream{script: func(context.Context, string, int) (sessionlock.Session, error) { return shared(), nil }}
				a, b := newClient(t, u, cache, sealing(t, "a")), newClient(t, u, cache, sealing(t, "b"))
				tokenOf(t, a, "bob")
				u.script = func(context.Context, string, int) (sessionlock.Session, error) { return script(t, a) }
				_, err := b.Session(t.Context(), "bob")
				require.Error(t, err)
				time.Sleep(time.Minute)
				assert.Empty(t, u.ended())
				assert.Equal(t, "one for all", tokenOf(t, a, "bob"))
			})
		})
	}
}

// Near copies

// A near copy ends with the session that it is of, also when what follows cannot
// be read: it may have been logged out, and nobody would know.
func TestNearCopyEndsWhenItsSuccessorCannotBeRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, cache := &upstream{life: 24 * time.Hour}, polled{new(sessionlock.MemoryCache)}
		a, b := newClient(t, u, cache, sealing(t, "a")), newClient(t, u, cache, sealing(t, "b", "a"))
		require.Equal(t, "bob/1", tokenOf(t, a, "bob"))
		require.NoError(t, b.Logout(t.Context(), "bob"))
		require.Equal(t, "bob/2", tokenOf(t, b, "bob"))
		require.Equal(t, []string{"bob/1"}, u.ended())
		for range 60 { // the age of a near copy
			time.Sleep(time.Second)
			tokenOf(t, a, "bob")
		}
		time.Sleep(time.Second)
		assert.Equal(t, "bob/3", tokenOf(t, a, "bob"))
	})
}

// The rest of the surface

func TestPutScopeAndRefreshWithAKeyring(t *testing.T) {
	onEach(t, func(t *testing.T, store func() sessionlock.Option) {
		u, refreshed := &upstream{life: time.Hour}, new(atomic.Int32)
		open := func(keys ...string) *sessionlock.Client {
			c, err := sessionlock.New(acme, u, store(), sealing(t, keys...), sessionlock.WithRefreshAhead(10*time.Minute), sessionlock.WithIdleTTL(50*time.Minute),
				sessionlock.WithRefresh(func(_ context.Context, _ string, old sessionlock.Session) (sessionlock.Session, error) {
					refreshed.Add(1)
					s := sessionlock.Session{Token: sessionlock.NewToken(old.Value("next")), Expiry: time.Now().Add(time.Hour), RefreshExpiry: old.RefreshExpiry}
					return s.WithValue("next", old.Value("next")+"+"), nil
				}))
			require.NoError(t, err)
			t.Cleanup(func() { _ = c.Close(context.WithoutCancel(t.Context())) })
			return c
		}
		a, b := open("a", "b"), open("b", "a")
		s := sessionlock.Session{Token: sessionlock.NewToken("put"), Expiry: time.Now().Add(time.Hour), RefreshExpiry: time.Now().Add(12 * time.Hour)}
		_, err := a.Put(t.Context(), "bob", s.WithValue("next", "fresh"))
		require.NoError(t, err)
		require.Equal(t, "put", tokenOf(t, b, "bob"))

		require.NoError(t, b.Scope(t.Context(), "bob", func(ctx context.Context, sc *sessionlock.Scope) error {
			require.NoError(t, sc.Do(ctx, func(_ context.Context, s sessionlock.Session) error {
				require.Equal(t, "put", s.Token.Reveal())
				return nil
			}))
			return sc.Do(ctx, rejectOld("put"))
		}))
		time.Sleep(time.Second)
		require.Equal(t, "fresh", tokenOf(t, a, "bob"), "the scope's repair refreshed what the other had sealed")
		for refreshed.Load() < 2 { // ahead of time, by whoever
			tokenOf(t, a, "bob")
			tokenOf(t, b, "bob")
			time.Sleep(time.Minute)
		}
		time.Sleep(time.Second)
		require.Equal(t, "fresh+", tokenOf(t, a, "bob"))
		require.Equal(t, "fresh+", tokenOf(t, b, "bob"))
		time.Sleep(3 * time.Hour) // it has ended, and what refreshes it has not
		require.Equal(t, "fresh++", tokenOf(t, open("c", "b", "a"), "bob"))
		require.Zero(t, u.logins())
		time.Sleep(3 * time.Hour)
		require.Equal(t, "bob/1", tokenOf(t, open("d"), "bob"), "who cannot read it cannot refresh it")
		assert.EqualValues(t, 3, refreshed.Load())
	})
}

// The entry's own times are not sealed: who may write there can prolong them.
func TestProlongedEntryIsNotUsedPastTheSessionsExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, sp, store := &upstream{life: time.Minute}, &spy{}, new(sessionlock.MemoryCache)
		tokenOf(t, newClient(t, u, spyCache{sp, store}), "bob")
		name := sp.seen(entrySuffix)[0]
		raw, err := store.Load(t.Context(), name)
		require.NoError(t, err)
		e, err := entry.Decode(raw)
		require.NoError(t, err)
		e.Stamp, e.Session.Expires = entry.NewNonce(), e.Session.Expires.Add(time.Hour)
		forged, err := entry.Encode(e)
		require.NoError(t, err)
		_, err = store.CompareAndSwap(t.Context(), name, raw, forged, time.Hour)
		require.NoError(t, err)

		time.Sleep(time.Minute - time.Millisecond)
		assert.Equal(t, "bob/1", tokenOf(t, newClient(t, u, store), "bob"))
		time.Sleep(time.Millisecond)
		assert.Equal(t, "bob/2", tokenOf(t, newClient(t, u, store), "bob"))
	})
}
