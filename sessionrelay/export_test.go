package sessionrelay

import "github.com/sessionlock/sessionlock/internal/keyname"

// SessionKey is the name of a session's hash, with no options; AllKey is that of the
// index of all sessions.
func SessionKey(session string) string {
	return keyname.Of(keyname.Namer{Upstream: "sessionrelay"}.Tag("session "+session), "r:s")
}

func AllKey() string { return keyname.Of(keyname.Namer{Upstream: "sessionrelay"}.Tag("all "), "r:all") }
