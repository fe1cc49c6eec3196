package sessionlockoauth2_test

import (
	"context"
	"fmt"
	"net/http"

	"golang.org/x/oauth2"

	"github.com/sessionlock/sessionlock"
	"github.com/sessionlock/sessionlock/sessionlockoauth2"
	"github.com/sessionlock/sessionlock/sessionlocktest"
)

func ExampleTokenSource() {
	ctx := context.Background()
	upstream, err := sessionlocktest.StartUpstream()
	if err != nil {
		panic(err)
	}
	defer upstream.Close()
	client, err := sessionlock.New(upstream.URL, upstream, sessionlock.WithCache(new(sessionlock.MemoryCache)))
	if err != nil {
		panic(err)
	}
	defer client.Close(ctx)

	bob := client.For("bob")
	hc := &http.Client{Transport: &oauth2.Transport{Source: sessionlockoauth2.TokenSource(ctx, bob)}}
	whoami := func() error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, upstream.URL+"/whoami", http.NoBody)
		if err != nil {
			return err
		}
		resp, err := hc.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		fmt.Println(resp.Status)
		if resp.StatusCode != http.StatusUnauthorized {
			return nil
		}
		s, err := bob.Session(ctx)
		if err != nil || resp.Request.Header.Get("Authorization") != "Bearer "+s.Token.Reveal() {
			return err // another session by now: it was not this one that was refused
		}
		return client.Invalidate(ctx, s)
	}

	for _, revoked := range []bool{false, true, false} {
		if revoked {
			upstream.Revoke("bob")
		}
		if err := whoami(); err != nil {
			panic(err)
		}
	}
	// Output:
	// 200 OK
	// 401 Unauthorized
	// 200 OK
}
