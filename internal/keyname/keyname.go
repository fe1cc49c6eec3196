// Package keyname derives the names under which keys are stored.
//
// A name is a prefix, a hash tag and a kind. The tag is an HMAC, so a name
// never contains the key, has one length whatever the key, and cannot be used
// to break out of the tag or to match a pattern. All names of one key share the
// tag, and so one slot of a Redis Cluster.
//
//	sl:{tag}:e        the entry
//	sl:{tag}:e:print  the entry under one fingerprint of credentials
//	sl:{tag}:l        the lock; its tag may be another, see Namer.Lock
//	sl:{tag}:g        the registration of who modifies a session (sessionguard)
//	sl:{tag}:d:name   data in the slot of that
package keyname

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
)

// Namer names the keys of one upstream in one namespace.
type Namer struct {
	Secret    []byte // keys the hash; empty: names can be guessed by dictionary
	Namespace string
	Upstream  string
}

// tagBytes of the HMAC go into a tag: 144 bits, 24 characters without padding.
const tagBytes = 18

// Tag returns the hash tag of key. Different namespaces, upstreams or keys give
// different tags: the parts are hashed with their lengths.
func (n Namer) Tag(key string) string { return n.tag("key", n.Upstream, key) }

// Entry returns the name of the entry of key. fingerprint, when not empty,
// keeps the sessions of different credentials apart.
func (n Namer) Entry(key, fingerprint string) string {
	name := Of(n.Tag(key), "e")
	if fingerprint != "" {
		name += ":" + n.tag("fingerprint", n.Upstream, fingerprint)
	}
	return name
}

// Lock returns the name of the lock of key. scope, when not empty, takes the
// upstream's place, so that clients of several upstreams share the lock.
func (n Namer) Lock(scope, key string) string {
	if scope == "" {
		scope = n.Upstream
	}
	return Of(n.tag("key", scope, key), "l")
}

// Of returns the name of what is kept under a tag.
func Of(tag, kind string) string { return "sl:{" + tag + "}:" + kind }

func (n Namer) tag(kind, upstream, value string) string {
	secret := n.Secret
	if len(secret) == 0 {
		secret = []byte("sessionlock/v1")
	}
	h := hmac.New(sha256.New, secret)
	for _, part := range []string{kind, n.Namespace, upstream, value} {
		var size [8]byte
		binary.BigEndian.PutUint64(size[:], uint64(len(part)))
		h.Write(size[:])
		h.Write([]byte(part))
	}
	return base64.RawURLEncoding.EncodeToString(h.Sum(nil)[:tagBytes])
}
