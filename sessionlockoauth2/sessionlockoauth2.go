// Package sessionlockoauth2 gives sessions to code that asks for its tokens through
// golang.org/x/oauth2, as the client libraries of many APIs do.
//
//	src := sessionlockoauth2.TokenSource(ctx, client.For("tenant-7"))
//	hc := &http.Client{Transport: &oauth2.Transport{Source: src}}
//
// # Where it falls short
//
// Nobody tells a token source how a request ended. A session that the upstream
// refuses is handed out until it is over, unless somebody reports it:
//
//	if resp.StatusCode == http.StatusUnauthorized {
//		s, err := handle.Session(ctx)
//		if err == nil && resp.Request.Header.Get("Authorization") == "Bearer "+s.Token.Reveal() { // and not an older one
//			err = client.Invalidate(ctx, s)
//		}
//	}
//
// The request stays refused; the next one that asks for a token gets another.
// oauth2's transport also puts the token on whatever passes through it, a redirect
// to another host included. So where an [http.Client] will do, use
// [sessionlock.Client.Transport]: it repairs a refused request by itself, and sends
// the session to the upstream only.
package sessionlockoauth2

import (
	"context"
	"fmt"
	"io"
	"time"

	"golang.org/x/oauth2"

	"github.com/sessionlock/sessionlock"
)

// reuse is for how long at most a token may be kept by who asked for it.
const reuse = 30 * time.Second

// TokenSource returns a source whose tokens are the session that h has at the
// moment: AccessToken is its token, TokenType is Bearer.
//
// Expiry is 30 s from now, or the session's own where that is sooner, and never
// zero. It bounds how long what caches tokens keeps a dead one: after an Invalidate,
// a Logout, a Put or a renewal by anybody in the fleet the next token is another one
// as soon as h knows (at once in the same process, with the store's push in others,
// at the latest with the age of [sessionlock.WithNearCache]), and oauth2's cache asks
// for it at most 30 s later. That cache is [oauth2.ReuseTokenSource], which
// [oauth2.NewClient] has built in. By default it gives a token up 10 s before Expiry:
// after 20 s, and for every request when the session has less than 10 s left. Asking
// costs no I/O while the session is held near, so an [oauth2.Transport] with this
// source itself sees the end of a session sooner.
//
// Errors are those of [sessionlock.Client.Session], as they are; oauth2 passes them
// on, and an http.Client wraps them in a *url.Error. With a nil h or a nil ctx
// every call is [sessionlock.ErrInvalid].
//
// Each call of Token asks with ctx: a login started by it sees ctx's values, and once ctx
// has ended there are no more tokens. Use one that lives as long as the source, not
// a request's. A request's own context ends neither a call of Token nor the wait for
// another's in oauth2's cache; [sessionlock.WithWait] and
// [sessionlock.WithLoginTimeout] bound these. For the same reason Login must not use
// an http.Client that has this source: it would wait for itself until it times out.
//
// The source is safe for concurrent use. Each call returns a token of its own. One
// prints its AccessToken, as oauth2's tokens do; the source prints nothing of it.
func TokenSource(ctx context.Context, h *sessionlock.Handle) oauth2.TokenSource {
	return &source{ctx, h}
}

type source struct {
	ctx context.Context //nolint:containedctx // Token has none
	h   *sessionlock.Handle
}

// Format writes a fixed word whatever the verb: a source holds a raw key.
func (s *source) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "[sessionlock token source]") }

// Token implements [oauth2.TokenSource].
func (s *source) Token() (*oauth2.Token, error) {
	if s.h == nil {
		return nil, fmt.Errorf("%w: the token source has no handle", sessionlock.ErrInvalid)
	}
	session, err := s.h.Session(s.ctx)
	if err != nil {
		return nil, err
	}
	expiry := time.Now().Add(reuse)
	if e := session.Expiry; !e.IsZero() && e.Before(expiry) {
		expiry = e
	}
	return &oauth2.Token{AccessToken: session.Token.Reveal(), TokenType: "Bearer", Expiry: expiry}, nil
}
