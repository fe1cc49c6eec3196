package sessionlock

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

// Option configures a [Client]. Of two that set the same thing the later wins; one
// that is given nil is an error all the same.
type Option func(*config)

type config struct {
	rdb    redis.UniversalClient
	cache  Cache
	locker Locker

	refresh     func(context.Context, string, Session) (Session, error)
	logout      func(context.Context, Session) error
	rejected    func(error) Verdict
	complete    func(Session) bool
	fingerprint func(context.Context, string) (string, error)
	lockKey     func(string) string
	logger      *slog.Logger
	observer    Observer

	namespace, lockScope string
	keySecret            []byte
	keyring              *Keyring

	contention           contention
	lockTTL              time.Duration
	loginTimeout         time.Duration
	opTimeout            time.Duration
	margin, maxAge       time.Duration
	aged                 bool // maxAge was given
	aheadOf, idle        time.Duration
	single               bool
	budget               int
	window               time.Duration
	reauthMin, reauthMax time.Duration
	nearMax              int
	nearAge              time.Duration

	given []given // collaborators passed by options, to tell a nil one from none
}

type given struct {
	option string
	value  any
}

func defaults() config {
	return config{
		contention:   contention{attempts: 40, delay: 300 * time.Millisecond},
		lockTTL:      3 * time.Second,
		loginTimeout: 10 * time.Second,
		opTimeout:    time.Second,
		margin:       20 * time.Second,
		maxAge:       14 * time.Minute,
		budget:       3, window: 15 * time.Minute,
		reauthMin: time.Second, reauthMax: 30 * time.Second,
		nearMax: 10_000, nearAge: time.Minute,
	}
}

// WithRedis keeps lock, cache and push in Redis 6.2 or later, on any client of
// go-redis: single, Sentinel, Cluster, Ring (which does not push: waiters
// poll). Its options may be the defaults. The client stays the caller's to
// close, after [Client.Close]. With WithCache as well, Redis keeps the lock
// only. Default: none; New wants this or WithCache.
func WithRedis(rdb redis.UniversalClient) Option {
	return func(c *config) { c.rdb = rdb; c.gave("WithRedis", rdb) }
}

// WithCache keeps entries in another store; WithCache(new(MemoryCache)) says
// aloud that sessions are shared by this process only. Default: Redis.
func WithCache(cache Cache) Option {
	return func(c *config) { c.cache = cache; c.gave("WithCache", cache) }
}

// WithLocker takes locks elsewhere. Default: the Redis NX lock; without Redis a
// lock in the cache itself, where absent is NX.
func WithLocker(l Locker) Option {
	return func(c *config) { c.locker = l; c.gave("WithLocker", l) }
}

// WithRefresh renews sessions from what they carry, a refresh token for instance,
// where that is cheaper than a login or the only way. f returns the session that
// takes old's place, values and [Session.RefreshExpiry] included: what it does not
// carry over is gone. It runs like Login: one in the fleet, within one
// [WithLoginTimeout] together with the login that may follow, ErrReentrant inside.
//
// When f fails and old is still good, because nobody has seen it rejected and it
// has not ended, old is used on, and not renewed again for a quarter of what is
// left of its life, or for as long as [RetryAfter] asks; but after [Denied] a login
// is next, at once. When f fails and old is no good, RetryAfter and errors of
// dialling, DNS and TLS have the fleet wait, and anything else a login follows. No
// failure of f counts against [WithLoginBudget]. Where a login may have to follow,
// f has half of the login timeout.
//
// A session that was refreshed is the old one carried on (RFC 7009, 2.1: revoking
// either may end both), so [WithLogout] gets neither what a refresh replaced nor
// what it brought in vain. Default: none, a session that has ended is followed by
// a login.
func WithRefresh(f func(ctx context.Context, key string, old Session) (Session, error)) Option {
	return func(c *config) { c.refresh = f; c.gave("WithRefresh", f) }
}

// WithLogout tells how a session is ended upstream. f must end s only, not all
// sessions of its user. It is called for sessions that nobody will use: one that
// was overtaken before it was stored, one that a newer one displaced (after 30 s),
// one ended by [Client.Logout]; never for one that was rejected, nor for one whose
// token the stored session has too. Its context ends after the login timeout. Where the
// token is part of the URL its error quotes it ([*url.Error] does); ours does not.
// Default: they are left to the upstream's own end.
func WithLogout(f func(ctx context.Context, s Session) error) Option {
	return func(c *config) { c.logout = f; c.gave("WithLogout", f) }
}

// WithRejected classifies errors of funcs run by Do that are not marked by
// [Reject], those of a foreign client library. Look at what refused this call, not at
// what it reports of another: an error inside the answer of a task, say, would have the
// call made twice. Default: they are no rejections.
func WithRejected(f func(error) Verdict) Option {
	return func(c *config) { c.rejected = f; c.gave("WithRejected", f) }
}

// WithComplete says whether a session has all it needs. A login's session that
// has not is [ErrIncomplete] and not stored; a stored one that has not, written
// by an older release for instance, is treated as rejected. f must be quick.
// Default: every session is complete.
func WithComplete(f func(Session) bool) Option {
	return func(c *config) { c.complete = f; c.gave("WithComplete", f) }
}

// WithFingerprint says which credentials Login would use for key now: a
// version, or a hash. It is part of the entry's name but not of the lock's:
// during a roll-out both populations keep sessions of their own and log in one
// at a time, and a denial of the old credentials does not suppress the new. f
// is called once per attempt and by the calls for operators, must be quick, and
// is not asked for a near hit. Default: one set of credentials per key.
func WithFingerprint(f func(ctx context.Context, key string) (string, error)) Option {
	return func(c *config) { c.fingerprint = f; c.gave("WithFingerprint", f) }
}

// WithLockKey names the identity to lock where it is not the key: a session per
// patient, say, and one login at a time per user. Keys that share a lock must
// not log in at once, and their waits add up: see [WithWait]. Default: the key.
func WithLockKey(f func(key string) string) Option {
	return func(c *config) { c.lockKey = f; c.gave("WithLockKey", f) }
}

// WithLockScope replaces the upstream in the lock's name, so that clients of
// several upstreams that must not log one key in at once share a lock and keep
// sessions of their own. Who waits for another client's login learns of its end
// by polling. Default: the upstream.
func WithLockScope(name string) Option {
	return func(c *config) { c.lockScope = name; c.gave("WithLockScope", name) }
}

// WithNamespace keeps fleets apart that share a store: staging and production.
// Default: "".
func WithNamespace(env string) Option { return func(c *config) { c.namespace = env } }

// WithKeySecret keys the hash of the names under which keys are stored and
// logged. At least 16 bytes, the same in the whole fleet; changing it costs a
// login per key. Default: a fixed one. Names never contain the key then either,
// but whoever can list them can find a guessed key by dictionary.
func WithKeySecret(secret []byte) Option {
	return func(c *config) { c.keySecret = append([]byte{}, secret...) }
}

// WithKeyring seals what is stored, so that who can read the store cannot use the
// sessions in it. The same keys in the whole fleet; see [Keyring] for how they
// are changed. With it, a session that was stored in clear is as good as none, and
// a process without it can do nothing with a sealed one: it meets [ErrUnavailable]
// until that has ended or is logged out. So change [WithNamespace] when a running
// fleet is given its first keyring, or none again; that costs a login per key.
// Default: sessions are stored in clear.
func WithKeyring(k *Keyring) Option {
	return func(c *config) { c.keyring = k; c.gave("WithKeyring", k) }
}

// WithLogger logs logins, failures and degradations; hits are not logged.
// Default: no log.
func WithLogger(l *slog.Logger) Option {
	return func(c *config) { c.logger = l; c.gave("WithLogger", l) }
}

// WithObserver reports every outcome. Default: none.
func WithObserver(o Observer) Option {
	return func(c *config) { c.observer = o; c.gave("WithObserver", o) }
}

// WithLockTTL is how long the lock and the attempt begun under it outlive their
// leader. While it lives both are extended at a third of it, so the TTL need not
// cover a login. Members of a fleet may differ by less than a factor of two.
// Default: 3 s.
func WithLockTTL(d time.Duration) Option { return func(c *config) { c.lockTTL = d } }

// WithWait bounds how long a caller waits for somebody else's login: attempts
// poll ticks, delay apart (the first part of each jittered). Pushed wake-ups make
// it earlier. In total it must exceed the lock TTL and not be shorter than the
// login timeout; where several clients share a lock, theirs together. Default:
// 40 times 300 ms, 12 s in total.
func WithWait(attempts int, delay time.Duration) Option {
	return func(c *config) { c.contention = contention{attempts, delay} }
}

// WithLoginTimeout bounds one login, and so how long its leader holds the lock.
// A login that does not return 100 ms after its context has ended is left
// behind: its callers are freed with an unknown outcome, and this process sends
// no other for the key until it has returned. Over 12 s, raise [WithWait] too.
// Default: 10 s.
func WithLoginTimeout(d time.Duration) Option { return func(c *config) { c.loginTimeout = d } }

// WithOpTimeout bounds every call of cache and lock, however they behave: a
// go-redis client with default options ignores deadlines for seconds. One that
// is not shorter than the lock TTL lets one slow call cost the lock. Default: 1 s.
func WithOpTimeout(d time.Duration) Option { return func(c *config) { c.opTimeout = d } }

// WithExpiryMargin ends a session this long before its Expiry, or a quarter of
// the life it had when it was made if that is shorter. Inclusive: with 20 s, a
// session that expires in exactly 20 s is not used. Default: 20 s.
func WithExpiryMargin(d time.Duration) Option { return func(c *config) { c.margin = d } }

// WithMaxAge is the life of a session whose login gave no Expiry; it never
// shortens a known one. With 0 such a login is [ErrIncomplete]. Default: 14 min;
// with [WithIdleTTL] 24 h.
func WithMaxAge(d time.Duration) Option {
	return func(c *config) { c.maxAge, c.aged = d, true }
}

// WithIdleTTL says that the upstream ends a session that was not used for d, and
// that use keeps it alive. Its life is d from its last use then, less
// [WithExpiryMargin], and at most until its Expiry. What counts as use is that it
// was handed out: a use is made known to the fleet beside the caller, and only
// when that gains a tenth of d. Default: 0, use changes nothing.
func WithIdleTTL(d time.Duration) Option { return func(c *config) { c.idle = d } }

// WithRefreshAhead renews a session that is in use this long before it ends, which
// is [WithExpiryMargin] before its Expiry, by
// [WithRefresh] or else a login, so that no caller has to wait for it. One process
// of the fleet does it; the window is jittered by a tenth, so that not all ask at
// once, and is at most half of the session's life. While it fails the old session
// is served for as long as it is valid, and it is tried again after a quarter of
// what is left of that; the last login of [WithLoginBudget] is left to callers.
// With [WithLogout] the old session is ended 30 s after it was replaced, also for
// a [Scope] that takes longer: that one is repaired, and set up, once. Default: 0,
// who finds it ended renews it.
func WithRefreshAhead(window time.Duration) Option {
	return func(c *config) { c.aheadOf = window }
}

// WithSingleSession says that a login ends the session before it. So nobody logs
// in ahead of time: [WithRefreshAhead] wants [WithRefresh] then, and after a refresh
// that was denied the session is left to its end. And [WithLogout] does not get what a login
// displaced. Default: sessions live side by side.
func WithSingleSession() Option { return func(c *config) { c.single = true } }

// WithLoginBudget bounds the logins per key and window that were denied or whose
// outcome is unknown, those of leaders that died included: keep n below what
// makes the upstream lock the account. A denial alone suppresses logins for a
// whole window. Default: 3 in 15 min.
func WithLoginBudget(n int, window time.Duration) Option {
	return func(c *config) { c.budget, c.window = n, window }
}

// WithReauthBackoff is the wait before the next login of a key whose last two
// sessions or more were rejected while young (within 30 s, or a quarter of their
// life): min, doubling to max. It bounds what an upstream costs that accepts
// every login and refuses every session, as with a 403 that means "you may not".
// Default: 1 s to 30 s.
func WithReauthBackoff(min, max time.Duration) Option { //nolint:revive // the usual words
	return func(c *config) { c.reauthMin, c.reauthMax = min, max }
}

// WithNearCache bounds the sessions this process holds: at most keys, the least
// used leave first; 0 holds none, and age is ignored. One in use is compared with the store every
// age, and when the store says that it changed; one that is not used is dropped
// after it. Default: 10 000 keys, 60 s.
func WithNearCache(keys int, age time.Duration) Option {
	return func(c *config) { c.nearMax, c.nearAge = keys, age }
}

func (c *config) gave(option string, value any) {
	c.given = append(c.given, given{option, value})
}

// configure applies opts to the defaults and checks the outcome with everything
// else New was given.
func configure(upstream string, auth Authenticator, opts []Option) (config, error) {
	c := defaults()
	c.gave("the authenticator", auth)
	for _, opt := range opts {
		if opt == nil {
			c.gave("an Option", nil)
			continue
		}
		opt(&c)
	}
	if c.idle != 0 && !c.aged { // use keeps it alive, so age alone does not end it
		c.maxAge = maxShared
	}
	return c, c.validate(upstream)
}

// validate reports everything that is wrong, as one error that matches
// ErrInvalid. It never quotes a value that could be a secret.
func (c *config) validate(upstream string) error {
	var wrong []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			wrong = append(wrong, fmt.Errorf("%w: "+format, append([]any{ErrInvalid}, args...)...))
		}
	}
	for _, g := range c.given {
		check(!isNil(g.value), "%s is nil or empty", g.option)
	}
	check(strings.TrimSpace(upstream) != "" && len(upstream) <= maxName, "upstream is blank or over %d bytes", maxName)
	check(len(c.namespace) <= maxName, "WithNamespace is over %d bytes", maxName)
	check(len(c.lockScope) <= maxName, "WithLockScope is over %d bytes", maxName)
	check(!isNil(c.rdb) || !isNil(c.cache), "no store: pass WithRedis(rdb) for a fleet, or WithCache(new(MemoryCache)) for this process only")
	check(c.keyring == nil || c.keyring.keys() != nil, "WithKeyring: the keyring was not made by NewKeyring")
	check(c.keySecret == nil || len(c.keySecret) >= 16, "WithKeySecret has under 16 bytes")
	for _, d := range []struct {
		option string
		d      time.Duration
		zero   bool // allowed
	}{
		{"WithLockTTL", c.lockTTL, false},
		{"WithWait's delay", c.contention.delay, false},
		{"WithLoginTimeout", c.loginTimeout, false},
		{"WithOpTimeout", c.opTimeout, false},
		{"WithExpiryMargin", c.margin, true},
		{"WithMaxAge", c.maxAge, true},
		{"WithIdleTTL", c.idle, true},
		{"WithRefreshAhead", c.aheadOf, true},
		{"WithLoginBudget's window", c.window, false},
		{"WithReauthBackoff's min", c.reauthMin, false},
		{"WithReauthBackoff's max", c.reauthMax, false},
		{"WithNearCache's age", c.nearAge, c.nearMax == 0},
	} {
		allowed := "between 1ms and 24h"
		if d.zero {
			allowed += ", nor 0"
		}
		check((d.zero && d.d == 0) || (d.d >= time.Millisecond && d.d <= 24*time.Hour), "%s is %v, not %s", d.option, d.d, allowed)
	}
	check(c.budget > 0 && c.budget <= 1000, "WithLoginBudget's n is %d, not between 1 and 1000", c.budget)
	check(c.aheadOf == 0 || !c.single || c.refresh != nil, "WithRefreshAhead with WithSingleSession wants WithRefresh: a login ahead of time would end the session in use")
	check(c.nearMax >= 0, "WithNearCache's keys is %d", c.nearMax)
	check(c.reauthMin <= c.reauthMax, "WithReauthBackoff's min is over its max")
	check(c.contention.attempts > 0 && c.contention.attempts <= 100_000, "WithWait's attempts is %d, not between 1 and 100000", c.contention.attempts)
	if len(wrong) == 0 {
		total := c.contention.total()
		check(total > c.lockTTL, "WithWait waits %v in total, not longer than the lock TTL of %v: a dead leader would outlast its waiters", total, c.lockTTL)
		check(total >= c.loginTimeout, "WithWait waits %v in total, shorter than the login timeout of %v: a slow login would outlast its waiters", total, c.loginTimeout)
	}
	return errors.Join(wrong...)
}

// isNil sees through an interface that holds a nil pointer, map or func. An
// empty string counts as nil: no option may be given one.
func isNil(v any) bool {
	if v == nil {
		return true
	}
	switch r := reflect.ValueOf(v); r.Kind() { //nolint:exhaustive // the rest cannot be nil
	case reflect.Pointer, reflect.Map, reflect.Func, reflect.Interface, reflect.Slice, reflect.Chan:
		return r.IsNil()
	case reflect.String:
		return strings.TrimSpace(r.String()) == ""
	}
	return false
}

const (
	maxKey     = 256
	maxName    = 1024
	maxWaiters = 10_000 // callers of one key and process that wait at once
)

// checkKey refuses a key before any I/O, without quoting it.
func checkKey(key string) error {
	if strings.TrimSpace(key) == "" {
		return fmt.Errorf("%w: key is blank", ErrInvalid)
	}
	if len(key) > maxKey {
		return fmt.Errorf("%w: key is over %d bytes", ErrInvalid, maxKey)
	}
	return nil
}

func checkContext(ctx context.Context) error {
	if ctx == nil {
		return fmt.Errorf("%w: context is nil", ErrInvalid)
	}
	return nil
}

func checkFunc(fn func(context.Context, Session) error) error {
	if fn == nil {
		return fmt.Errorf("%w: func is nil", ErrInvalid)
	}
	return nil
}

// checkOwn refuses a session that no client of this upstream and namespace gave
// out: its generation would mean nothing here.
func (c *Client) checkOwn(s Session) error {
	m := s.inside()
	if m.name == "" || m.client.upstream != c.upstream || m.client.namespace != c.namespace {
		return fmt.Errorf("%w: session was not given out by a client of this upstream and namespace", ErrInvalid)
	}
	return nil
}
