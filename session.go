// Package sessionlock lets a fleet of processes share one login session per
// user of somebody else's API: one login when it is missing, one repair when
// the upstream says it is dead, and no storms, lock-outs, mix-ups or leaks.
//
//	client, err := sessionlock.New("https://api.acme.test", auth, sessionlock.WithRedis(rdb))
//	…
//	err = client.Do(ctx, "tenant-7", func(ctx context.Context, s sessionlock.Session) error {
//		return acme.Orders(ctx, s.Token.Reveal()) // a sessionlock.Reject(err) renews once and runs this again
//	})
//
// # Words
//
// The upstream is the API that wants a session. A key says whose session: user,
// tenant, account. A login is one call of the [Authenticator]. The leader is the
// one caller in the fleet that is logging in, everyone else waits for the
// result. A generation is the number of a login; it grows per key for ever. A
// session is rejected when the upstream refuses it, an orphan when it lives
// upstream and nobody will use it. Logins are suppressed while they fail.
//
// # The algorithm
//
// A [Client] keeps a near copy of each session in use, and behind it, per key,
// one small value in a [Cache] (the entry) and one lock in a [Locker].
//
//  1. Near: a copy that is usable and not the one just rejected is the answer.
//     No I/O, no allocation.
//  2. Otherwise all callers of this process share one attempt. It is detached
//     from every caller's context; each caller waits under its own.
//  3. Load the entry. A session: adopt it. A failure in force: [ErrSuppressed]
//     at once, on every process.
//  4. TryLock. Held: wait for the result, woken by push, with polling behind it.
//  5. Locked: begin. The swap that opens the generation is the double check.
//  6. Log in, lock and lease extended meanwhile; validate; commit; unlock.
//     A commit that comes too late stores nothing: the newer session is adopted
//     and the own one logged out.
//  7. A failed login is committed in the step that wakes the waiters, so one
//     burst costs one login.
//
// A session in use can be renewed before it ends ([WithRefreshAhead]): the same
// steps from 3 on, beside the callers, asking for a generation newer than the one
// they go on using, and given up where another process is at it. What a login
// does can also be a refresh of the old session ([WithRefresh]).
//
// The lock keeps logins rare; the entry keeps them right. If the lock is lost
// the worst that follows is an extra login. The rules of the entry are pure
// functions in internal/entry, where its states and failures are written down
// and model-checked.
//
// # What can fail, and what happens then
//
//	step       fails by                what follows
//	any        store dead              after 5 failures in a row, and no answer meanwhile, one call a
//	                                   second is made to see whether it is back, the rest fail at once
//	load       store unreachable       ErrUnavailable; near copies are still served
//	TryLock    reply lost              the late lock is released; else it dies at its TTL
//	begin      reply lost              the attempt is given up by its nonce, nothing counted
//	login      error, panic, hang      a failure record by class: denied, deferred, unknown
//	refresh    denied                  a login follows, at once
//	refresh    fails otherwise         the old session is served on while it is good; see WithRefresh
//	renewal    fails                   the old session is served on; tried again after a quarter of its rest
//	login      leader dies             lock and lease run out, the next leads; counted
//	login      lock or lease lost      goes on; commit decides
//	commit     store unreachable       retried while the lease lasts; then served in this
//	                                   process only, for at most 30 s, and logged out
//	commit     overtaken               adopt the newer; else wait; else ErrStale. No second login
//	unlock     store unreachable       the lock dies at its TTL
//	touch      fails                   the next use tries again
//	scope end  store unreachable       nothing is ended: an orphan lives to its upstream's end
//
// # Promises
//
// docs/promises.md numbers them P1 to P12; comments and tests cite them. They
// assume that one primary answers for a key, that clocks do not step by more
// than the expiry margin while a lock is held, and that a login returns when
// its context ends. When the first two break, generations still only grow and
// extra logins are the worst; when the third breaks, see [WithLoginTimeout].
package sessionlock

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"strings"
	"time"
)

const redacted = "[redacted]"

// Token is a secret. Every verb of fmt, text, JSON, XML and slog render it as
// [redacted]; [Token.Reveal] is the one way to the value. The zero Token is
// empty. Tokens are immutable and safe for concurrent use; == compares
// identity, not the secret.
type Token struct{ p *secret }

// secret hides the value behind a func: reflection-based printers (spew, test
// diffs) follow pointers to strings, but cannot look into a closure.
type secret struct{ reveal func() string }

// NewToken returns a Token holding secret.
func NewToken(value string) Token {
	if value == "" {
		return Token{}
	}
	return Token{&secret{func() string { return value }}}
}

// Reveal returns the secret, "" for the zero Token.
func (t Token) Reveal() string {
	if t.p == nil {
		return ""
	}
	return t.p.reveal()
}

func (t Token) equal(o Token) bool {
	return subtle.ConstantTimeCompare([]byte(t.Reveal()), []byte(o.Reveal())) == 1
}

// String returns [redacted].
func (t Token) String() string { return redacted }

// GoString returns [redacted].
func (t Token) GoString() string { return redacted }

// Format writes [redacted] whatever the verb.
func (t Token) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// LogValue returns [redacted].
func (t Token) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText returns [redacted], so a Token that was marshalled cannot be read
// back: UnmarshalText refuses that word.
func (t Token) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// UnmarshalText sets t to the text, so that the JSON answer of a login can be
// decoded straight into a struct with a Token in it. It returns ErrInvalid for
// the word MarshalText writes.
func (t *Token) UnmarshalText(b []byte) error {
	if string(b) == redacted {
		return fmt.Errorf("%w: token was redacted when it was written", ErrInvalid)
	}
	*t = NewToken(string(b))
	return nil
}

// Session is what a login yields: an immutable value, safe for concurrent use.
// An [Authenticator] sets Token, Expiry and values; a [Client] adds key and
// generation. It prints as [redacted] as a whole.
type Session struct {
	// Token is the secret that the upstream wants to see. Required: printable
	// (no control characters), at most 16 KiB.
	Token Token
	// Expiry is when the upstream ends the session by this process's clock.
	// Zero: the upstream said nothing, and [WithMaxAge] applies. A session is
	// shared for at most 24 hours, whatever its Expiry.
	Expiry time.Time
	// RefreshExpiry is until when [WithRefresh] may start from the session,
	// although it has ended or was rejected. Zero: only while it is usable.
	RefreshExpiry time.Time

	meta *hidden
}

// hidden is a session's meta, behind one pointer so that copying stays cheap,
// and behind a func for the reason that secret has one: a printer would find the
// key and, through the client, the authenticator with its password.
type hidden struct{ reveal func() meta }

// meta is what makes a Session larger than its fields.
type meta struct {
	values map[string]Token
	key    string
	gen    uint64
	name   string  // of the entry it is stored in
	client *Client // that gave it out
}

// WithValue returns a copy of s that also carries value under name: a refresh
// token, a CSRF token, the instance URL a login returned. Values are secrets
// and travel with the session. At most 32 of at most 1 KiB each, name included;
// a login that returns more is [ErrIncomplete]. Unlike the token a value may be
// any bytes: it is for the caller to know where it goes.
func (s Session) WithValue(name, value string) Session {
	m := s.inside()
	values := make(map[string]Token, len(m.values)+1)
	for k, v := range m.values {
		values[k] = v
	}
	values[name] = NewToken(value)
	m.values = values
	return s.with(m)
}

// inside returns the meta of s, the zero one for a session that has none.
func (s Session) inside() meta {
	if s.meta == nil {
		return meta{}
	}
	return s.meta.reveal()
}

// with returns s with m as its meta.
func (s Session) with(m meta) Session {
	s.meta = &hidden{func() meta { return m }}
	return s
}

// Value returns the value stored under name, "" when there is none.
func (s Session) Value(name string) string {
	return s.inside().values[name].Reveal()
}

// Key returns the key the session was obtained for, "" for one that no client
// gave out.
func (s Session) Key() string { return s.inside().key }

// Generation returns the session's number: a fencing token that grows per key
// for ever and fits a signed 64-bit column. 0 for a session that no client gave
// out.
func (s Session) Generation() uint64 { return s.inside().gen }

// String returns [redacted].
func (s Session) String() string { return redacted }

// Format writes [redacted] whatever the verb.
func (s Session) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// LogValue returns [redacted].
func (s Session) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText returns [redacted].
func (s Session) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// Authenticator logs in to an upstream.
type Authenticator interface {
	// Login makes one login for key and returns its session. It needs nothing
	// but key: ctx carries the values of the caller that happened to start the
	// attempt, not its deadline, and ends after [WithLoginTimeout]. Login is
	// called from a goroutine of its own and for different keys concurrently.
	//
	// Mark failures: [Denied] when the credentials were evaluated and refused,
	// [RetryAfter] when they were not. Anything else is unknown and counts
	// against [WithLoginBudget]. When both a session and an error are returned
	// the error wins and the session is ended by [WithLogout].
	Login(ctx context.Context, key string) (Session, error)
}

// AuthenticatorFunc is a func as an Authenticator.
type AuthenticatorFunc func(ctx context.Context, key string) (Session, error)

// Login calls f.
func (f AuthenticatorFunc) Login(ctx context.Context, key string) (Session, error) {
	return f(ctx, key)
}

// JoinKey returns one key of several parts, of tenant and user for instance.
// Different parts give different keys: JoinKey("ab", "c") is not
// JoinKey("a", "bc"). Of no parts the key is "", which is refused where it is used.
func JoinKey(parts ...string) string {
	var b strings.Builder
	for _, p := range parts {
		fmt.Fprintf(&b, "%d:%s", len(p), p)
	}
	return b.String()
}

// Verdict says whether an error means that the session was refused.
type Verdict uint8

// The verdicts.
const (
	NotRejected    Verdict = iota // another error, or none
	RejectedBefore                // refused before anything was executed: renew and run again
	RejectedDuring                // refused, but the operation may have been executed: renew, and run again only under IdempotentContext

	rejectedForGood // refused, and must not be run again whatever the context says
)

// String names the verdict.
func (v Verdict) String() string {
	switch v {
	case NotRejected:
		return "not rejected"
	case RejectedBefore:
		return "rejected before execution"
	case RejectedDuring:
		return "rejected, may have been executed"
	case rejectedForGood:
		return "rejected, not to be run again"
	}
	return "unknown verdict"
}

// rejection is a caller's session that the upstream refused: its generation and
// its token will not do any more. The zero value rejects nothing.
//
// Generations are compared under one name only: other credentials
// ([WithFingerprint]) have an entry of their own.
type rejection struct {
	name  string // of the entry the session is stored in
	gen   uint64
	token Token
}

// in returns the generation that will not do in the entry called name.
func (no rejection) in(name string) uint64 {
	if no.name != name {
		return 0
	}
	return no.gen
}

// allows is rule R1: adopt only what is newer than the rejected generation and
// not the same token under a new number.
func (no rejection) allows(s Session) bool {
	return s.Generation() > no.in(s.inside().name) && (no.token.p == nil || !s.Token.equal(no.token))
}

// rejects returns the rejection of s.
func rejects(s Session) rejection {
	return rejection{s.inside().name, s.Generation(), s.Token}
}

// Reject marks err, inside a func run by Do, as the upstream's refusal of the
// session before anything was executed. errors.Is and errors.As see err
// through it. Reject(nil) is nil.
func Reject(err error) error {
	if err == nil {
		return nil
	}
	return &rejectedError{err, RejectedBefore}
}

type rejectedError struct {
	err     error
	verdict Verdict
}

func (e *rejectedError) Error() string { return e.err.Error() }
func (e *rejectedError) Unwrap() error { return e.err }

// verdictIn returns the mark of Reject that err carries for the session it came from,
// NotRejected without one. What stands below a *ReauthError was said of another
// session, one that a func run by Do used inside.
func verdictIn(err error) Verdict {
	switch e := err.(type) { //nolint:errorlint // this is the walk
	case *rejectedError:
		return e.verdict
	case *ReauthError:
		return NotRejected
	case interface{ Unwrap() error }:
		return verdictIn(e.Unwrap())
	case interface{ Unwrap() []error }:
		for _, err := range e.Unwrap() {
			if v := verdictIn(err); v != NotRejected {
				return v
			}
		}
	}
	return NotRejected
}

type (
	idempotentKey struct{}
	rejectionKey  struct{}
	keyKey        struct{}
	loginKey      struct{}
	bareKey       struct{ *Client } // of a context whose requests the client's transports leave alone
)

// KeyContext returns a context whose requests, by [Client.Transport] and the
// adapters, are made with the session of key.
func KeyContext(ctx context.Context, key string) context.Context {
	return context.WithValue(ctx, keyKey{}, func() string { return key }) // a func, as contexts print strings
}

// KeyFromContext returns the key of [KeyContext]. Inside a login it is the key that is
// logged in.
func KeyFromContext(ctx context.Context) (key string, ok bool) {
	f, ok := ctx.Value(keyKey{}).(func() string)
	if !ok {
		return "", false
	}
	return f(), true
}

// IdempotentContext says that what runs under ctx may safely be executed twice,
// so Do runs its func again even after [RejectedDuring].
func IdempotentContext(ctx context.Context) context.Context {
	return context.WithValue(ctx, idempotentKey{}, true)
}

// RejectionFromContext returns, inside a func run by Do: nil on the first run,
// the rejection that caused the second run on the second. Elsewhere nil.
func RejectionFromContext(ctx context.Context) error {
	err, _ := ctx.Value(rejectionKey{}).(error)
	return err
}

// inLogin is the chain of logins a context is inside of, for ErrReentrant.
type inLogin struct {
	client *Client
	key    string
	outer  *inLogin
}

func withLogin(ctx context.Context, c *Client, key string) context.Context {
	outer, _ := ctx.Value(loginKey{}).(*inLogin)
	return context.WithValue(KeyContext(ctx, key), loginKey{}, &inLogin{c, key, outer})
}

// insideLogin reports whether ctx is inside a login by c of one of keys, or of any
// key when none is named.
func insideLogin(ctx context.Context, c *Client, keys ...string) bool {
	in, _ := ctx.Value(loginKey{}).(*inLogin)
	for ; in != nil; in = in.outer {
		if in.client == c && (len(keys) == 0 || slices.Contains(keys, in.key)) {
			return true
		}
	}
	return false
}

// The states an error can report; match with errors.Is.
var (
	// ErrInvalid: an argument or option is wrong. Returned before any I/O; the
	// text names it and never quotes it.
	ErrInvalid = errors.New("sessionlock: invalid argument")
	// ErrClosed: the client was closed.
	ErrClosed = errors.New("sessionlock: client closed")
	// ErrReentrant: Session, Do or Scope for a key from inside Login of the same
	// key, or of a scope inside its SetUp.
	ErrReentrant = errors.New("sessionlock: called from inside what it would wait for")
	// ErrDenied: the upstream evaluated the credentials and refused them.
	ErrDenied = errors.New("sessionlock: login denied")
	// ErrSuppressed: no login was sent, because logins for this key fail. A
	// *LoginError in the chain has the class and until when.
	ErrSuppressed = errors.New("sessionlock: login suppressed")
	// ErrIncomplete: a login returned without error but its session cannot be
	// used: no token, control characters, over a size limit, expired, without
	// expiry where WithMaxAge(0) demands one, or refused by WithComplete.
	ErrIncomplete = errors.New("sessionlock: unusable session")
	// ErrRejected: the upstream refused the session and Do could not help it.
	ErrRejected = errors.New("sessionlock: session rejected")
	// ErrLockTimeout: somebody else kept the lock for the whole wait.
	ErrLockTimeout = errors.New("sessionlock: timed out waiting for another login")
	// ErrUnavailable: the lock or cache could not be used. It says nothing of
	// credentials or sessions.
	ErrUnavailable = errors.New("sessionlock: lock or cache unavailable")
	// ErrLocked: TryLock found the lock held.
	ErrLocked = errors.New("sessionlock: locked")
	// ErrNotHeld: Extend found the lock lost.
	ErrNotHeld = errors.New("sessionlock: lock not held")
	// ErrStale: a login was overtaken, by a Logout for instance, before its
	// session could be stored, and nobody has stored a newer one.
	ErrStale = errors.New("sessionlock: login overtaken")
)

// LoginClass says what is known of a login that failed.
type LoginClass uint8

// The classes of a failed login.
const (
	LoginDenied   LoginClass = iota + 1 // credentials evaluated and refused
	LoginDeferred                       // never evaluated, or its sessions are refused at once: try again after Until
	LoginUnknown                        // may have been evaluated; counted
)

// String names the class.
func (c LoginClass) String() string {
	switch c {
	case LoginDenied:
		return "denied"
	case LoginDeferred:
		return "deferred"
	case LoginUnknown:
		return "unknown outcome"
	}
	return "none"
}

// LoginError reports that there is no session because a login failed, now or
// earlier and on any process: then it matches ErrSuppressed. With LoginDenied
// it matches ErrDenied. Nobody in the fleet logs in for this key before Until.
type LoginError struct {
	Class    LoginClass
	Attempts int       // logins counted against the budget so far
	Until    time.Time // by this process's clock; zero: not suppressed
	Err      error     // the cause. Its text is the authenticator's, so Error does not print it
	id       string
}

// Error names class, log-safe key id, count and time. Of the cause it prints only
// what is in our own words; the rest may quote the upstream.
func (e *LoginError) Error() string {
	s := "sessionlock: log in " + e.id + ": " + e.Class.String()
	switch {
	case errors.Is(e.Err, ErrSuppressed) && errors.Is(e.Err, ErrRejected):
		s = "sessionlock: log in " + e.id + ": suppressed, fresh sessions are refused"
	case errors.Is(e.Err, ErrSuppressed):
		s = "sessionlock: log in " + e.id + ": suppressed after " + e.Class.String()
	default:
		s += inOurWords(e.Err)
	}
	if e.Attempts > 0 {
		s += fmt.Sprintf(", %d counted", e.Attempts)
	}
	if !e.Until.IsZero() {
		s += ", not again before " + e.Until.Format("2006-01-02T15:04:05.000Z07:00")
	}
	return s
}

// inOurWords is what can be said of the error of a user's func without quoting it.
func inOurWords(err error) string {
	var (
		told    *toldError
		panicky *PanicError
		dial    *net.OpError
	)
	switch {
	case errors.Is(err, ErrIncomplete):
		return ", " + strings.TrimPrefix(err.Error(), "sessionlock: ")
	case errors.As(err, &panicky):
		return ", " + panicky.Error()
	case errors.As(err, &told):
		return ", " + told.Error()
	case errors.Is(err, ErrReentrant):
		return ", it asked for the session it was to make"
	case errors.As(err, &dial) && dial.Op == "dial":
		return ", it could not connect"
	case errors.Is(err, context.DeadlineExceeded):
		return ", it timed out"
	}
	return ""
}

// Unwrap returns ErrDenied for a denial, and the cause.
func (e *LoginError) Unwrap() []error {
	if e.Class == LoginDenied {
		return present(ErrDenied, e.Err)
	}
	return present(e.Err)
}

// present returns the errors that are not nil, as Unwrap must.
func present(errs ...error) []error {
	return slices.DeleteFunc(errs, func(err error) bool { return err == nil })
}

// LockError reports that somebody else kept the lock for the whole wait. It
// matches ErrLockTimeout. [Client.Inspect] names the holder, unless that is another
// key's or client's that shares the lock.
type LockError struct {
	Attempts int           // poll ticks
	Waited   time.Duration // from the first try; 0: 10 000 callers wait already, so this one did not
	Err      error         // what the last try said: ErrLocked
	id       string
}

// Error names the log-safe key id, how long and how often.
func (e *LockError) Error() string {
	if e.Waited == 0 {
		return fmt.Sprintf("sessionlock: lock %s: %d callers of this process wait already", e.id, maxWaiters)
	}
	return fmt.Sprintf("sessionlock: lock %s: held by another login for %v, tried %d times",
		e.id, e.Waited.Round(time.Millisecond), e.Attempts)
}

// Unwrap returns ErrLockTimeout and the last thing seen.
func (e *LockError) Unwrap() []error { return present(ErrLockTimeout, e.Err) }

// ReauthError reports that the upstream refused a session inside Do. It matches
// ErrRejected, and both of its errors.
type ReauthError struct {
	First  error // the rejection
	Second error // why there was no renewal, or the second rejection; nil: not run again, it may have been executed
	id     string
	again  bool // Second is the func's own error, so Error does not print it
}

// Error says what followed the rejection. It prints none of the func's errors,
// which may quote the upstream.
func (e *ReauthError) Error() string {
	s := "sessionlock: session " + e.id + " rejected"
	switch {
	case e.Second == nil:
		return s + ", not run again: the operation may have been executed"
	case e.again:
		return s + ", renewed, and rejected again"
	}
	return s + ", not renewed: " + strings.TrimPrefix(e.Second.Error(), "sessionlock: ")
}

// Unwrap returns ErrRejected and both errors.
func (e *ReauthError) Unwrap() []error { return present(ErrRejected, e.First, e.Second) }

// quietError carries the error of a user's func without printing it: it may
// quote a URL or body with a secret.
type quietError struct {
	text string
	err  error
}

func (e *quietError) Error() string {
	if said := inOurWords(e.err); said != "" {
		return e.text + ": failed" + said
	}
	return fmt.Sprintf("%s: failed (%T)", e.text, e.err)
}

func (e *quietError) Unwrap() error { return e.err }
