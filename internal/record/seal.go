package record

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"maps"
)

// Sizes of the sealed form, in bytes.
const (
	MaxKeyID    = 32 // a key id; it has at least 1
	KeySize     = 32 // a master key
	MaxOverhead = 4 + 1 + MaxKeyID + saltSize + gcmOverhead

	saltSize    = 32
	gcmOverhead = 12 + 16 // nonce and tag
)

// info separates these subkeys from whatever else is derived of a master key.
const info = "sessionlock/v1/record"

// ErrUnknownKey is matched by the error of Decode for a sealed record whose key
// id its Keys do not have; the text names the id. Nobody has vouched for that
// id: whoever can write to the store can have put any.
var ErrUnknownKey = errors.New("record: sealed with an unknown key")

// Keys is a set of master keys by id. One seals, all open. A set never changes,
// so it is safe for concurrent use; nil stands for the plain form.
type Keys struct {
	sealing string
	byID    map[string]masterKey
}

// masterKey returns the key from a func, so that no printer that works by
// reflection comes to it.
type masterKey func() []byte

// NewKeys returns the set of the one key that seals. id has 1 to MaxKeyID bytes
// and key, which is copied, KeySize: the caller has checked that.
func NewKeys(id string, key []byte) *Keys {
	return (&Keys{sealing: id}).With(id, key)
}

// With returns k and one key more, which opens only. Demands on id and key are
// those of NewKeys, and k has neither.
func (k *Keys) With(id string, key []byte) *Keys {
	more := &Keys{sealing: k.sealing, byID: map[string]masterKey{}}
	maps.Copy(more.byID, k.byID)
	key = bytes.Clone(key)
	more.byID[id] = func() []byte { return key }
	return more
}

// HasID reports whether a key of k has this id.
func (k *Keys) HasID(id string) bool { return k.byID[id] != nil }

// HasKey reports whether k has this key, under whatever id.
func (k *Keys) HasKey(key []byte) bool {
	for _, own := range k.byID {
		if subtle.ConstantTimeCompare(own(), key) == 1 {
			return true
		}
	}
	return false
}

func (k *Keys) seal(b Binding, content []byte) []byte {
	out := make([]byte, 0, MaxOverhead+len(content))
	out = append(out, preamble(algSealed)...)
	out = append(append(out, byte(len(k.sealing))), k.sealing...)
	salt := make([]byte, saltSize)
	_, _ = rand.Read(salt) // never fails
	out = append(out, salt...)
	return k.byID[k.sealing].aead(salt).Seal(out, nil, content, appendBinding(bytes.Clone(out), b))
}

// open returns the content of e as it was sealed for b. k may be nil.
func (k *Keys) open(b Binding, e envelope) (string, error) {
	var key masterKey
	if k != nil {
		key = k.byID[e.id]
	}
	if key == nil {
		return "", fmt.Errorf("%w: %q", ErrUnknownKey, e.id)
	}
	content, err := key.aead([]byte(e.salt)).Open(nil, nil, []byte(e.sealed), appendBinding([]byte(e.header), b))
	if err != nil {
		return "", ErrUnreadable
	}
	return string(content), nil
}

// aead returns the cipher of the one record with this salt. It puts a random
// nonce before what it seals.
func (key masterKey) aead(salt []byte) cipher.AEAD {
	block := must(aes.NewCipher(must(hkdf.Key(sha256.New, key(), salt, info, KeySize))))
	return must(cipher.NewGCMWithRandomNonce(block))
}

// must is for funcs that fail by the sizes of their arguments only.
func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// IsSealed reports whether rec has the shape of a sealed record: one that cannot
// be opened here may be good to somebody who has its key.
func IsSealed(rec string) bool {
	_, ok := parseEnvelope(rec)
	return ok
}

// envelope is a sealed record taken apart; nothing in it is authenticated yet.
type envelope struct{ header, id, salt, sealed string }

// parseEnvelope reports false for what has not the shape of a sealed record.
func parseEnvelope(rec string) (envelope, bool) {
	r := reader{rest: rec}
	if r.take(4) != string(preamble(algSealed)) {
		return envelope{}, false
	}
	e := envelope{id: r.take(uint64(r.byte())), salt: r.take(saltSize)}
	e.header, e.sealed = rec[:len(rec)-len(r.rest)], r.rest
	ok := !r.bad && e.id != "" && len(e.id) <= MaxKeyID && len(e.sealed) >= gcmOverhead
	return e, ok
}
