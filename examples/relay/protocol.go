package main

// protocol.go is what clients and nodes say to each other: JSON in the text messages
// of a WebSocket.
//
//	client                                     node
//	hello (session, or none)      ──────▶
//	                              ◀──────      welcome (session), or a close with its reason
//
//	                              ◀──────      message, request (id, body)
//	ack (ids)                     ──────▶
//	                              ◀──────      forget (ids): they will not come any more
//
//	message, answer (id, body)    ──────▶
//	                              ◀──────      reply (id, body), or again (id): ask later
//	forget (ids)                  ──────▶
//
// Whoever sends keeps a message until the other side has it, over any number of
// connections. Whoever receives keeps its id until it is told to forget it, and does
// nothing about a message whose id it has.

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"strings"
	"time"

	"github.com/coder/websocket"
	"github.com/coder/websocket/wsjson"
)

type frame struct {
	Kind string   `json:"kind"`
	ID   string   `json:"id,omitempty"`  // of the message; of hello and welcome: the session's
	IDs  []string `json:"ids,omitempty"` // of ack and forget
	Re   string   `json:"re,omitempty"`  // of an answer: which request
	Body string   `json:"body,omitempty"`
}

const (
	hello, welcome            = "hello", "welcome"
	message, request, answer  = "message", "request", "answer"
	ack, reply, again, forget = "ack", "reply", "again", "forget"
)

// Why a node closes a connection.
const (
	closedRefused  = websocket.StatusPolicyViolation // the session is another user's, or one too many
	closedRestart  = websocket.StatusServiceRestart  // the node ends: come back, elsewhere
	closedTryLater = websocket.StatusTryAgainLater   // the store is down
	closedRemoved  = 4000                            // the session was ended
	closedLost     = 4001                            // there is no such session: start anew
	closedReplaced = 4003                            // the session has another connection
)

const (
	helloLimit = 5 * time.Second
	writeLimit = 5 * time.Second // then the other side is as good as gone
	idsLimit   = 500             // in one frame: a WebSocket takes 32 KiB, unless SetReadLimit says more
)

// write writes a frame. It does not end with ctx: a WebSocket whose write is cancelled
// is closed, and could not say the reason any more.
func write(ctx context.Context, ws *websocket.Conn, f frame) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), writeLimit)
	defer cancel()
	return wsjson.Write(ctx, ws, f)
}

func read(ctx context.Context, ws *websocket.Conn) (f frame, err error) {
	err = wsjson.Read(ctx, ws, &f)
	return f, err
}

// token proves to a node who somebody is. An application has its own way.
func token(secret, user string) string {
	mac := hmac.New(sha256.New, []byte(secret))
	mac.Write([]byte(user))
	return user + "." + hex.EncodeToString(mac.Sum(nil))
}

// userOf returns whose a token is, or "".
func userOf(secret, bearer string) string {
	user, _, _ := strings.Cut(bearer, ".")
	if hmac.Equal([]byte(bearer), []byte(token(secret, user))) {
		return user
	}
	return ""
}
