package sessionlock_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock"
	"github.com/sessionlock/sessionlock/internal/exampletest"
	"github.com/sessionlock/sessionlock/sessionlocktest"
)

// acmeAPI stands for the client library of somebody else's API.
type acmeAPI struct {
	ErrBadPassword, ErrDown, ErrDeadSession error
	logins                                  int
	ledgers                                 []string // chosen, and in which session
}

type Order struct{ ID int }

func newAcme() *acmeAPI {
	return &acmeAPI{ErrBadPassword: errors.New("bad password"), ErrDown: errors.New("down"), ErrDeadSession: errors.New("dead session")}
}

func (a *acmeAPI) Login(_ context.Context, tenant string) (token string, ttl time.Duration, err error) {
	a.logins++
	if tenant == "mallory" {
		return "", 0, a.ErrBadPassword
	}
	return fmt.Sprintf("token %d of %s", a.logins, tenant), time.Hour, nil
}

// Orders refuses the first session there was.
func (a *acmeAPI) Orders(_ context.Context, token string) ([]Order, error) {
	if strings.HasPrefix(token, "token 1 ") {
		return nil, a.ErrDeadSession
	}
	return []Order{{ID: 42}}, nil
}

func (a *acmeAPI) SelectLedger(_ context.Context, token, ledger string) error {
	a.ledgers = append(a.ledgers, token+": "+ledger)
	return nil
}

// client returns a client of this process alone, with logins that always
// succeed: the first of bob brings "token-bob-1".
func client(opts ...sessionlock.Option) *sessionlock.Client {
	return clientOf(sessionlocktest.Static(), opts...)
}

func clientOf(auth sessionlock.Authenticator, opts ...sessionlock.Option) *sessionlock.Client {
	opts = append([]sessionlock.Option{sessionlock.WithCache(new(sessionlock.MemoryCache))}, opts...)
	c, err := sessionlock.New("https://api.acme.test", auth, opts...)
	if err != nil {
		panic(err)
	}
	return c
}

func show(s sessionlock.Session, err error) {
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(s.Token.Reveal())
}

func ExampleNew() {
	ctx, acme, server := context.Background(), newAcme(), miniredis.NewMiniRedis()
	if err := server.Start(); err != nil {
		panic(err)
	}
	defer server.Close()
	rdb := redis.NewClient(&redis.Options{Addr: server.Addr()})
	defer rdb.Close()

	run := func() error {
		login := func(ctx context.Context, tenant string) (sessionlock.Session, error) {
			token, ttl, err := acme.Login(ctx, tenant) // your code
			switch {
			case errors.Is(err, acme.ErrBadPassword):
				err = sessionlock.Denied(err) // nobody tries these credentials again for a while
			case errors.Is(err, acme.ErrDown):
				err = sessionlock.RetryAfter(err, 0) // not judged, not counted; an unmarked error counts
			}
			return sessionlock.Session{Token: sessionlock.NewToken(token), Expiry: time.Now().Add(ttl)}, err
		}
		client, err := sessionlock.New("https://api.acme.test", sessionlock.AuthenticatorFunc(login), sessionlock.WithRedis(rdb))
		if err != nil {
			return err
		}
		defer client.Close(context.Background()) // finishes logins under way; the fleet stays logged in

		show(client.Session(ctx, "tenant-7"))
		_, err = client.Session(ctx, "mallory")
		fmt.Println(errors.Is(err, sessionlock.ErrDenied), acme.logins, "logins")
		return nil
	}
	fmt.Println(run())
	// Output:
	// token 1 of tenant-7
	// true 2 logins
	// <nil>
}

func ExampleCall() {
	ctx, acme, tenant := context.Background(), newAcme(), "tenant-7"
	client := clientOf(sessionlock.AuthenticatorFunc(func(ctx context.Context, tenant string) (sessionlock.Session, error) {
		token, _, err := acme.Login(ctx, tenant)
		return sessionlock.Session{Token: sessionlock.NewToken(token)}, err
	}))
	defer client.Close(ctx)

	orders, err := sessionlock.Call(ctx, client.For(tenant), func(ctx context.Context, s sessionlock.Session) ([]Order, error) {
		orders, err := acme.Orders(ctx, s.Token.Reveal())
		if errors.Is(err, acme.ErrDeadSession) {
			err = sessionlock.Reject(err) // renew once, then run this func once more
		}
		return orders, err
	})
	var failed *sessionlock.LoginError
	switch {
	case errors.As(err, &failed): // no session; nobody in the fleet tries again before failed.Until
	case errors.Is(err, sessionlock.ErrUnavailable): // Redis, not the password
	}
	fmt.Println(orders, err, acme.logins, "logins")
	// Output: [{42}] <nil> 2 logins
}

// The upstream keeps the chosen ledger in the session.
func ExampleScope() {
	ctx, acme, tenant := context.Background(), newAcme(), "tenant-7"
	client := clientOf(sessionlock.AuthenticatorFunc(func(ctx context.Context, tenant string) (sessionlock.Session, error) {
		token, _, err := acme.Login(ctx, tenant)
		return sessionlock.Session{Token: sessionlock.NewToken(token)}, err
	}))
	defer client.Close(ctx)

	run := func() (err error) {
		err = client.Check(ctx) // reachable, rights, pushes, clock; version, eviction and persistence of Redis
		if errors.Is(err, sessionlock.ErrUnavailable) {
			return err // not ready; the rest is advice
		}
		err = client.Scope(ctx, tenant, func(ctx context.Context, sc *sessionlock.Scope) error {
			sc.SetUp(func(ctx context.Context, s sessionlock.Session) error {
				return acme.SelectLedger(ctx, s.Token.Reveal(), "2026") // once for each session, so again after a renewal
			})
			return sc.Do(ctx, func(ctx context.Context, s sessionlock.Session) error {
				_, err := acme.Orders(ctx, s.Token.Reveal())
				if errors.Is(err, acme.ErrDeadSession) {
					err = sessionlock.Reject(err)
				}
				return err
			})
		})
		return err
	}
	fmt.Println(run(), acme.logins, "logins", acme.ledgers)
	// Output: <nil> 2 logins [token 1 of tenant-7: 2026 token 2 of tenant-7: 2026]
}

// A login over HTTP: its answer is decoded straight into a Token, and its status
// says what a failure means.
func ExampleLoginStatus() {
	login := sessionlock.AuthenticatorFunc(func(ctx context.Context, user string) (sessionlock.Session, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://api.acme.test/login", strings.NewReader(user))
		if err != nil {
			return sessionlock.Session{}, err
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			return sessionlock.Session{}, err // a dial error is known to have sent nothing
		}
		defer res.Body.Close()
		if err := sessionlock.LoginStatus(res); err != nil {
			return sessionlock.Session{}, err // 401: denied; 503: come back after Retry-After
		}
		var answer struct {
			Token     sessionlock.Token `json:"token"`
			ExpiresIn int               `json:"expires_in"`
		}
		err = json.NewDecoder(res.Body).Decode(&answer)
		return sessionlock.Session{Token: answer.Token, Expiry: time.Now().Add(time.Duration(answer.ExpiresIn) * time.Second)}, err
	})
	_ = login

	fmt.Println(sessionlock.LoginStatus(&http.Response{StatusCode: http.StatusOK}))
	fmt.Println(sessionlock.LoginStatus(&http.Response{StatusCode: http.StatusUnauthorized}))
	// Output:
	// <nil>
	// answered with status 401
}

// alwaysFails is an Authenticator that does.
func alwaysFails(err error) sessionlock.Authenticator {
	return sessionlock.AuthenticatorFunc(func(context.Context, string) (sessionlock.Session, error) { return sessionlock.Session{}, err })
}

func ExampleDenied() {
	ctx := context.Background()
	client := clientOf(alwaysFails(sessionlock.Denied(errors.New("wrong password"))))
	defer client.Close(ctx)
	for range 2 { // the second call, on any process, sends no login
		_, err := client.Session(ctx, "bob")
		var login *sessionlock.LoginError
		if errors.As(err, &login) {
			fmt.Println(login.Class, login.Attempts, time.Until(login.Until).Round(time.Minute),
				errors.Is(err, sessionlock.ErrDenied), errors.Is(err, sessionlock.ErrSuppressed))
		}
	}
	fmt.Println(client.Stats().Logins, "login")
	// Output:
	// denied 1 15m0s true false
	// denied 1 15m0s true true
	// 1 login
}

func ExampleRetryAfter() {
	ctx := context.Background()
	client := clientOf(alwaysFails(sessionlock.RetryAfter(errors.New("too many requests"), time.Minute)))
	defer client.Close(ctx)
	_, err := client.Session(ctx, "bob")
	var login *sessionlock.LoginError
	if errors.As(err, &login) {
		fmt.Println(login.Class == sessionlock.LoginDeferred, login.Attempts, "counted,", time.Until(login.Until).Round(time.Second))
	}
	// Output: true 0 counted, 1m0s
}

// A login that panics is a failed login, for everybody who waits for it.
func ExamplePanicError() {
	ctx := context.Background()
	client := clientOf(sessionlock.AuthenticatorFunc(func(context.Context, string) (sessionlock.Session, error) { panic("oops") }))
	defer client.Close(ctx)
	_, err := client.Session(ctx, "bob")
	var login *sessionlock.LoginError
	var panicked *sessionlock.PanicError
	fmt.Println(errors.As(err, &login) && login.Class == sessionlock.LoginUnknown, errors.As(err, &panicked) && panicked.Value == "oops")
	fmt.Println(len(panicked.Stack) > 0)
	// Output:
	// true true
	// true
}

func ExampleJoinKey() {
	fmt.Println(sessionlock.JoinKey("tenant-7", "bob"))
	fmt.Println(sessionlock.JoinKey("ab", "c") == sessionlock.JoinKey("a", "bc"))
	// Output:
	// 8:tenant-73:bob
	// false
}

func ExampleToken() {
	var answer struct{ Token sessionlock.Token }
	_ = json.Unmarshal([]byte(`{"Token":"s3cret"}`), &answer)
	fmt.Printf("%v %q %x %+v\n", answer.Token, answer.Token, answer.Token, answer)
	slog.New(slog.NewTextHandler(os.Stdout, withoutTime)).Info("logged in", slog.Any("token", answer.Token))
	fmt.Println(answer.Token.Reveal())
	// Output:
	// [redacted] [redacted] [redacted] {Token:[redacted]}
	// level=INFO msg="logged in" token=[redacted]
	// s3cret
}

var withoutTime = &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
	if a.Key == slog.TimeKey || a.Key == "took" || a.Key == "generation" {
		return slog.Attr{}
	}
	return a
}}

// What was marshalled is not a token any more.
func ExampleToken_UnmarshalText() {
	text, _ := sessionlock.NewToken("s3cret").MarshalText()
	err := new(sessionlock.Token).UnmarshalText(text)
	fmt.Println(errors.Is(err, sessionlock.ErrInvalid))
	// Output: true
}

func ExampleSession_WithValue() {
	s := sessionlock.Session{Token: sessionlock.NewToken("s3cret")}.
		WithValue("csrf", "c-1").
		WithValue("instance", "https://eu5.acme.test")
	fmt.Println(s.Value("instance"), s.Value("absent") == "")
	fmt.Printf("%+v\n", s)
	// Output:
	// https://eu5.acme.test true
	// [redacted]
}

// A generation is a fencing token: a store of your own can refuse what an older
// session comes with.
func ExampleSession_Generation() {
	ctx := context.Background()
	client := client()
	defer client.Close(ctx)
	first, _ := client.Session(ctx, "bob")
	_ = client.Logout(ctx, "bob")
	second, _ := client.Session(ctx, "bob")
	fmt.Println(second.Generation() > first.Generation(), second.Key())
	// Output: true bob
}

func ExampleClient_Session() {
	ctx := context.Background()
	client := client()
	defer client.Close(ctx)
	show(client.Session(ctx, "bob"))
	show(client.Session(ctx, "bob"))
	show(client.Session(ctx, "eve"))
	show(client.Session(ctx, " "))
	// Output:
	// token-bob-1
	// token-bob-1
	// token-eve-1
	// sessionlock: invalid argument: key is blank
}

func ExampleClient_Do() {
	ctx := context.Background()
	client := client()
	defer client.Close(ctx)
	err := client.Do(ctx, "bob", func(ctx context.Context, s sessionlock.Session) error {
		fmt.Println(s.Token.Reveal(), "after", sessionlock.RejectionFromContext(ctx))
		if s.Token.Reveal() == "token-bob-1" {
			return sessionlock.Reject(errors.New("401"))
		}
		return nil
	})
	fmt.Println(err)
	// Output:
	// token-bob-1 after <nil>
	// token-bob-2 after 401
	// <nil>
}

// Errors of a foreign client library are classified in one place.
func ExampleWithRejected() {
	ctx := context.Background()
	errDead, errWindow := errors.New("952"), errors.New("112")
	client := client(sessionlock.WithRejected(func(err error) sessionlock.Verdict {
		switch {
		case errors.Is(err, errDead):
			return sessionlock.RejectedBefore // nothing was executed: run again
		case errors.Is(err, errWindow):
			return sessionlock.RejectedDuring // may have been executed: run again only if that is safe
		}
		return sessionlock.NotRejected
	}))
	defer client.Close(ctx)
	pay := func(ctx context.Context, _ sessionlock.Session) error {
		if sessionlock.RejectionFromContext(ctx) == nil {
			return errWindow
		}
		return nil
	}
	err := client.Do(ctx, "bob", pay)
	var reauth *sessionlock.ReauthError
	fmt.Println(errors.As(err, &reauth), errors.Is(err, sessionlock.ErrRejected), reauth.First, reauth.Second)
	fmt.Println(client.Do(sessionlock.IdempotentContext(ctx), "eve", pay))
	// Output:
	// true true 112 <nil>
	// <nil>
}

// Handle and whatever else has its Do are Doers; keep a handle where one key is
// used often.
func ExampleClient_For() {
	ctx := context.Background()
	client := client()
	defer client.Close(ctx)
	bob := client.For("bob") // a *sessionlock.Handle
	show(bob.Session(ctx))
	var on sessionlock.Doer = bob
	length, err := sessionlock.Call(ctx, on, func(_ context.Context, s sessionlock.Session) (int, error) {
		return len(s.Token.Reveal()), nil
	})
	fmt.Println(length, err)
	// Output:
	// token-bob-1
	// 11 <nil>
}

// A rejection that comes late is harmless: it names a generation.
func ExampleClient_Invalidate() {
	ctx := context.Background()
	client := client()
	defer client.Close(ctx)
	old, _ := client.Session(ctx, "bob")
	for range 2 {
		fmt.Println(client.Invalidate(ctx, old))
		show(client.Session(ctx, "bob"))
	}
	// Output:
	// <nil>
	// token-bob-2
	// <nil>
	// token-bob-2
}

func ExampleClient_Logout() {
	ctx := context.Background()
	client := client(sessionlock.WithLogout(func(_ context.Context, s sessionlock.Session) error {
		fmt.Println("end", s.Token.Reveal(), "of", s.Key())
		return nil
	}))
	defer client.Close(ctx)
	show(client.Session(ctx, "bob"))
	fmt.Println(client.Logout(ctx, "bob"))
	// Output:
	// token-bob-1
	// end token-bob-1 of bob
	// <nil>
}

func ExampleClient_Inspect() {
	ctx := context.Background()
	client := clientOf(alwaysFails(sessionlock.Denied(errors.New("wrong password"))))
	defer client.Close(ctx)
	_, _ = client.Session(ctx, "bob")
	st, err := client.Inspect(ctx, "bob")
	fmt.Println(st.Generation, st.Attempts, st.Failure, time.Until(st.SuppressedUntil).Round(time.Minute), st.LockedSince.IsZero(), st.Holder == "", err)
	// Output: 0 1 denied 15m0s true true <nil>
}

// After the password was put right nobody has to wait for the window to end.
func ExampleClient_Unsuppress() {
	ctx := context.Background()
	password := "wrong"
	client := clientOf(sessionlock.AuthenticatorFunc(func(context.Context, string) (sessionlock.Session, error) {
		if password == "wrong" {
			return sessionlock.Session{}, sessionlock.Denied(errors.New("401"))
		}
		return sessionlock.Session{Token: sessionlock.NewToken("fine")}, nil
	}))
	defer client.Close(ctx)
	_, err := client.Session(ctx, "bob")
	fmt.Println(errors.Is(err, sessionlock.ErrDenied))
	password = "right"
	_, err = client.Session(ctx, "bob")
	fmt.Println(errors.Is(err, sessionlock.ErrSuppressed))
	fmt.Println(client.Unsuppress(ctx, "bob"))
	show(client.Session(ctx, "bob"))
	// Output:
	// true
	// true
	// <nil>
	// fine
}

func ExampleClient_Stats() {
	ctx := context.Background()
	store := new(sessionlock.MemoryCache) // shared, it stands for the fleet's
	a, b := client(sessionlock.WithCache(store)), client(sessionlock.WithCache(store))
	defer a.Close(ctx)
	defer b.Close(ctx)
	for range 3 {
		_, _ = a.Session(ctx, "bob")
		_, _ = b.Session(ctx, "bob")
	}
	fmt.Printf("%+v\n%+v\n", a.Stats(), b.Stats())
	// Output:
	// {NearHits:2 SharedHits:0 Adopted:0 Logins:1 Denied:0 Refreshes:0 Suppressed:0 Reauths:0 Waiters:0}
	// {NearHits:2 SharedHits:1 Adopted:0 Logins:0 Denied:0 Refreshes:0 Suppressed:0 Reauths:0 Waiters:0}
}

// Logs, errors, events and Redis know a key by its id.
func ExampleClient_KeyID() {
	secret := sessionlock.WithKeySecret([]byte("16 bytes or more")) // without it an id can be guessed by dictionary
	a, b := client(secret), client(secret, sessionlock.WithNamespace("staging"))
	fmt.Println(a.KeyID("bob@example.com"), a.KeyID("bob@example.com") == b.KeyID("bob@example.com"))
	// Output: D9JdamstoxDbWZJ1cJ6tjhaz false
}

func ExampleClient_Close() {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	client := client()
	fmt.Println(client.Close(ctx), client.Close(ctx)) // logins under way are finished, for as long as ctx lets them
	_, err := client.Session(ctx, "bob")
	fmt.Println(errors.Is(err, sessionlock.ErrClosed))
	// Output:
	// <nil> <nil>
	// true
}

// Two clients of one user that must not log in at once, as the pharmacy and the
// mail of one portal: one lock, and a session each.
func ExampleWithLockScope() {
	ctx := context.Background()
	store := sessionlock.WithCache(new(sessionlock.MemoryCache))
	inside := make(chan struct{}, 1)
	login := sessionlock.AuthenticatorFunc(func(_ context.Context, key string) (sessionlock.Session, error) {
		select {
		case inside <- struct{}{}:
		default:
			fmt.Println("two at once")
		}
		time.Sleep(10 * time.Millisecond)
		<-inside
		return sessionlock.Session{Token: sessionlock.NewToken("of " + key)}, nil
	})
	done := make(chan error)
	for _, upstream := range []string{"pharmacy", "mail"} {
		client, err := sessionlock.New(upstream, login, store, sessionlock.WithLockScope("portal"))
		if err != nil {
			panic(err)
		}
		defer client.Close(ctx)
		go func() {
			_, err := client.Session(ctx, "patient-7")
			done <- err
		}()
	}
	fmt.Println(<-done, <-done)
	// Output: <nil> <nil>
}

// A session per patient record, one login at a time per user.
func ExampleWithLockKey() {
	ctx := context.Background()
	client := client(sessionlock.WithLockKey(func(key string) string {
		user, _, _ := strings.Cut(key, "/")
		return user
	}))
	defer client.Close(ctx)
	show(client.Session(ctx, "bob/record-1"))
	show(client.Session(ctx, "bob/record-2"))
	// Output:
	// token-bob/record-1-1
	// token-bob/record-2-1
}

// During a change of password both populations keep sessions of their own, and a
// denial of the old one does not suppress the new.
func ExampleWithFingerprint() {
	ctx := context.Background()
	version := "v1"
	client := client(sessionlock.WithNearCache(0, time.Minute), // so that each call asks for the version
		sessionlock.WithFingerprint(func(context.Context, string) (string, error) { return version, nil }))
	defer client.Close(ctx)
	show(client.Session(ctx, "bob"))
	version = "v2"
	show(client.Session(ctx, "bob"))
	version = "v1"
	show(client.Session(ctx, "bob"))
	// Output:
	// token-bob-1
	// token-bob-2
	// token-bob-1
}

func ExampleWithComplete() {
	ctx := context.Background()
	client := client(sessionlock.WithComplete(func(s sessionlock.Session) bool { return s.Value("patient") != "" }))
	defer client.Close(ctx)
	_, err := client.Session(ctx, "bob")
	fmt.Println(errors.Is(err, sessionlock.ErrIncomplete))
	// Output: true
}

func ExampleWithLogger() {
	ctx := context.Background()
	client := client(sessionlock.WithLogger(slog.New(slog.NewTextHandler(os.Stdout, withoutTime))))
	defer client.Close(ctx)
	_, _ = client.Session(ctx, "bob")
	// Output: level=INFO msg="sessionlock: login_ok" key=M78Az-BjbrGIxQNGVOsk7EXO
}

// meter counts outcomes.
type meter map[string]int

func (m meter) Observe(_ context.Context, e sessionlock.Event) { m[e.Kind]++ } // with a mutex, in earnest

func ExampleObserver() {
	ctx := context.Background()
	seen := meter{}
	var observer sessionlock.Observer = seen
	client := client(sessionlock.WithObserver(observer))
	_, _ = client.Session(ctx, "bob")
	_, _ = client.Session(ctx, "bob")
	_ = client.Close(ctx)
	fmt.Println(seen[sessionlock.EventLoginOK], seen[sessionlock.EventNear], seen)
	// Output: 1 1 map[login_ok:1 near:1]
}

// The numbers, with their defaults. New checks how they relate.
func ExampleOption() {
	options := []sessionlock.Option{
		sessionlock.WithLoginTimeout(10 * time.Second),
		sessionlock.WithLockTTL(3 * time.Second),
		sessionlock.WithWait(40, 300*time.Millisecond), // 12 s: above both of them
		sessionlock.WithOpTimeout(time.Second),
		sessionlock.WithLoginBudget(3, 15*time.Minute), // below what locks an account upstream
		sessionlock.WithExpiryMargin(20 * time.Second),
		sessionlock.WithMaxAge(14 * time.Minute),
		sessionlock.WithReauthBackoff(time.Second, 30*time.Second),
		sessionlock.WithNearCache(10_000, time.Minute),
	}
	client := client(options...)
	defer client.Close(context.Background())

	_, err := sessionlock.New("https://api.acme.test", sessionlocktest.Static(),
		sessionlock.WithLockTTL(-1), sessionlock.WithLoginBudget(0, time.Minute))
	fmt.Println(errors.Is(err, sessionlock.ErrInvalid))
	fmt.Println(err)
	// Output:
	// true
	// sessionlock: invalid argument: no store: pass WithRedis(rdb) for a fleet, or WithCache(new(MemoryCache)) for this process only
	// sessionlock: invalid argument: WithLockTTL is -1ns, not between 1ms and 24h
	// sessionlock: invalid argument: WithLoginBudget's n is 0, not between 1 and 1000
}

// A login that wants another session of the same client may have it, but not its
// own.
func ExampleAuthenticator() {
	ctx := context.Background()
	var client *sessionlock.Client
	client = clientOf(sessionlock.AuthenticatorFunc(func(ctx context.Context, key string) (sessionlock.Session, error) {
		if key == "admin" {
			return sessionlock.Session{Token: sessionlock.NewToken("a")}, nil
		}
		_, err := client.Session(ctx, key)
		fmt.Println(errors.Is(err, sessionlock.ErrReentrant))
		admin, err := client.Session(ctx, "admin")
		return sessionlock.Session{Token: sessionlock.NewToken(key + " by " + admin.Token.Reveal())}, err
	}))
	defer client.Close(ctx)
	show(client.Session(ctx, "bob"))
	// Output:
	// true
	// bob by a
}

// stopwatch is a Cache around another. It forwards the optional faces too; a
// decorator without them costs speed, never correctness.
type stopwatch struct {
	sessionlock.Cache
	slow func(op string, took time.Duration)
}

func (t stopwatch) Load(ctx context.Context, key string) ([]byte, error) {
	defer func(start time.Time) { t.slow("load", time.Since(start)) }(time.Now())
	return t.Cache.Load(ctx, key)
}

func (t stopwatch) CompareAndSwap(ctx context.Context, key string, old, next []byte, ttl time.Duration) ([]byte, error) {
	defer func(start time.Time) { t.slow("swap", time.Since(start)) }(time.Now())
	return t.Cache.CompareAndSwap(ctx, key, old, next, ttl)
}

func (t stopwatch) Watch(key string, changed func()) (stop func()) {
	if w, ok := t.Cache.(sessionlock.Watcher); ok {
		return w.Watch(key, changed)
	}
	return func() {}
}

func (t stopwatch) Now(ctx context.Context) (time.Time, error) {
	if c, ok := t.Cache.(sessionlock.Clock); ok {
		return c.Now(ctx)
	}
	return time.Now(), nil
}

func ExampleCache() {
	ctx := context.Background()
	calls := 0
	cache := stopwatch{new(sessionlock.MemoryCache), func(string, time.Duration) { calls++ }}
	client := client(sessionlock.WithCache(cache), sessionlock.WithLocker(new(mutexes)))
	show(client.Session(ctx, "bob"))
	_ = client.Close(ctx)
	fmt.Println(calls > 0)
	// Output:
	// token-bob-1
	// true
}

// mutexes is a Locker of one process whose locks never expire: too simple for
// a fleet, where sessionlocktest.LockerTest would say so.
type mutexes struct{ held chan string }

func (m *mutexes) TryLock(_ context.Context, key string, ttl time.Duration) (sessionlock.Lock, error) {
	if ttl < time.Millisecond {
		return nil, sessionlock.ErrInvalid
	}
	if m.held == nil {
		m.held = make(chan string, 1)
	}
	select {
	case m.held <- key:
		return m, nil
	default:
		return nil, sessionlock.ErrLocked
	}
}

func (m *mutexes) Extend(context.Context, time.Duration) error {
	if len(m.held) == 0 {
		return sessionlock.ErrNotHeld
	}
	return nil
}

func (m *mutexes) Unlock(context.Context) error {
	select {
	case <-m.held:
	default:
	}
	return nil
}

func ExampleLocker() {
	ctx := context.Background()
	var locker sessionlock.Locker = new(mutexes)
	held, err := locker.TryLock(ctx, "k", time.Second)
	fmt.Println(err)
	_, err = locker.TryLock(ctx, "k", time.Second)
	fmt.Println(errors.Is(err, sessionlock.ErrLocked), held.Extend(ctx, time.Second), held.Unlock(ctx), held.Unlock(ctx))
	fmt.Println(errors.Is(held.Extend(ctx, time.Second), sessionlock.ErrNotHeld))
	// Output:
	// <nil>
	// true <nil> <nil> <nil>
	// true
}

// The upstream issues refresh tokens that live a day, with sessions that live five
// minutes: one login a day, and no caller waits for a renewal.
func ExampleWithRefresh() {
	ctx := context.Background()
	issue := func(access, refresh string, until time.Time) sessionlock.Session {
		s := sessionlock.Session{Token: sessionlock.NewToken(access), Expiry: time.Now().Add(5 * time.Minute), RefreshExpiry: until}
		return s.WithValue("refresh", refresh)
	}
	login := sessionlock.AuthenticatorFunc(func(context.Context, string) (sessionlock.Session, error) {
		return issue("access-1", "refresh-1", time.Now().Add(24*time.Hour)), nil
	})
	refresh := func(_ context.Context, _ string, old sessionlock.Session) (sessionlock.Session, error) {
		if old.Value("refresh") != "refresh-1" {
			return sessionlock.Session{}, sessionlock.Denied(errors.New("invalid_grant")) // a login is next
		}
		return issue("access-2", "refresh-1", old.RefreshExpiry), nil
	}
	client, err := sessionlock.New("https://api.acme.test", login, sessionlock.WithCache(new(sessionlock.MemoryCache)),
		sessionlock.WithRefresh(refresh), sessionlock.WithRefreshAhead(time.Minute))
	if err != nil {
		panic(err)
	}
	defer client.Close(ctx)
	s, _ := client.Session(ctx, "bob")
	_ = client.Invalidate(ctx, s) // the upstream ended it early
	s, err = client.Session(ctx, "bob")
	fmt.Println(s.Token.Reveal(), err, client.Stats().Logins, client.Stats().Refreshes)
	// Output: access-2 <nil> 1 1
}

// An upstream that ends what was idle for a quarter of an hour and, with each
// login, the session before.
func ExampleWithIdleTTL() {
	ctx := context.Background()
	client := client(sessionlock.WithIdleTTL(15*time.Minute), sessionlock.WithSingleSession())
	defer client.Close(ctx)
	_, err := client.Session(ctx, "bob")
	status, _ := client.Inspect(ctx, "bob")
	fmt.Println(err, time.Until(status.Expiry).Round(time.Minute))
	// Output: <nil> 15m0s
}

// What is stored is sealed: who can read Redis cannot use it.
func ExampleWithKeyring() {
	ctx := context.Background()
	key := []byte("32 random bytes out of a secret!") // the same in the whole fleet
	keyring, err := sessionlock.NewKeyring("2026-11", key)
	if err != nil {
		panic(err)
	}
	client := client(sessionlock.WithKeyring(keyring))
	defer client.Close(ctx)
	s, err := client.Session(ctx, "bob")
	fmt.Println(s.Token.Reveal(), err, keyring)
	// Output: token-bob-1 <nil> [sessionlock keyring]
}

// Whoever waits for a login that does not end learns for how long he did.
func ExampleLockError() {
	ctx := context.Background()
	locker := new(mutexes)
	_, _ = locker.TryLock(ctx, "somebody else's", time.Hour)
	client := client(sessionlock.WithLocker(locker), sessionlock.WithLockTTL(10*time.Millisecond),
		sessionlock.WithLoginTimeout(50*time.Millisecond), sessionlock.WithWait(5, 10*time.Millisecond))
	defer client.Close(ctx)
	_, err := client.Session(ctx, "bob")
	var timeout *sessionlock.LockError
	fmt.Println(errors.As(err, &timeout), errors.Is(err, sessionlock.ErrLockTimeout))
	fmt.Println(timeout.Attempts, timeout.Waited >= 50*time.Millisecond, timeout.Err)
	// Output:
	// true true
	// 5 true sessionlock: locked
}

// What to do with an error of Session, Do or Call.
func Example_errors() {
	comeBack := map[sessionlock.LoginClass]string{
		sessionlock.LoginDenied:   "never, or at ", // ErrDenied comes first
		sessionlock.LoginDeferred: "as the upstream wishes, at ",
		sessionlock.LoginUnknown:  "with care, at ",
	}
	advice := func(err error) string {
		var login *sessionlock.LoginError
		switch {
		case errors.Is(err, sessionlock.ErrDenied):
			return "ask for the password"
		case errors.Is(err, sessionlock.ErrIncomplete):
			return "mend the authenticator"
		case errors.As(err, &login):
			return comeBack[login.Class] + login.Until.Format(time.Kitchen)
		case errors.Is(err, sessionlock.ErrRejected):
			return "the upstream refuses its own new session"
		case errors.Is(err, sessionlock.ErrLockTimeout), errors.Is(err, sessionlock.ErrStale):
			return "try again"
		case errors.Is(err, sessionlock.ErrUnavailable):
			return "look at Redis"
		}
		return "not ours"
	}
	ctx := context.Background()
	client := clientOf(alwaysFails(sessionlock.Denied(errors.New("401"))))
	defer client.Close(ctx)
	_, err := client.Session(ctx, "bob")
	fmt.Println(advice(err))
	// Output: ask for the password
}

func TestExamplesShowEveryExportedName(t *testing.T) {
	exampletest.ReachAll(t, regexp.MustCompile(`^(String|GoString|Format|LogValue|MarshalText|Error|Unwrap|Evict|Event.+|Status|Stats|Keyring)$`))
}

// What the README shows is the body of an example, line by line.
func TestReadmeShowsCodeThatRuns(t *testing.T) {
	lines := func(files ...string) (out []string) {
		for _, file := range files {
			b, err := os.ReadFile(file)
			require.NoError(t, err)
			for line := range strings.Lines(string(b)) {
				out = append(out, strings.TrimSpace(line))
			}
		}
		return out
	}
	examples, err := filepath.Glob("example*_test.go")
	require.NoError(t, err)
	inPackages, err := filepath.Glob("session*/example*_test.go")
	require.NoError(t, err)
	tested, readme := lines(append(examples, inPackages...)...), lines("README.md")
	blocks := 0
	for i := 0; i < len(readme); i++ {
		if readme[i] != "```go" {
			continue
		}
		end := i + 1 + slices.Index(readme[i+1:], "```")
		block := readme[i+1 : end]
		found := false
		for at := 0; at+len(block) <= len(tested) && !found; at++ {
			found = slices.Equal(tested[at:at+len(block)], block)
		}
		assert.Truef(t, found, "line %d: %s …", i+2, block[0])
		blocks++
		i = end
	}
	assert.Equal(t, 8, blocks)
}
