// Package record turns a session into the bytes that an entry carries, and
// back, and binds them to the place they were written for.
//
// The binding is why a value that was copied from another key, restored from
// another generation, or answered to the wrong request by a confused client
// library is never taken for a session: Decode compares all of it.
//
//	plain   "SL" | version 1 | alg 1 | binding | content
//	sealed  "SL" | version 1 | alg 1 | length 1, key id | salt 32 | nonce 12 | ciphertext | tag 16
//
//	binding  namespace, upstream, key, each with its length | generation 8
//	content  expiry 8 | refresh 8 | token | number of values 1 | name, value, …
//
// The plain form shows everything and authenticates nothing: it keeps mistakes
// out, not people. In the sealed form the content is encrypted by AES-256-GCM
// under a key of its own, HKDF-SHA256 of a master key and the salt. Its
// associated data are all bytes before the nonce and the binding, which is not
// in the record: a reader has to know it. What shows is which master key, that
// there is a session, and how long its content is.
//
// The salt is fresh per record because random nonces under one key want it
// replaced after 2³² records, which a busy fleet reaches in weeks.
package record

import (
	"encoding/binary"
	"errors"
	"sort"
)

const (
	magic     = "SL"
	version   = 1
	algPlain  = 0
	algSealed = 1
)

// ErrUnreadable is returned by Decode for bytes that Encode did not write for
// the same Binding with the same key, and, given Keys, for any plain record:
// whoever can write to the store could write one.
var ErrUnreadable = errors.New("record: unreadable or written for another place")

// Binding says where a record belongs.
type Binding struct {
	Namespace, Upstream, Key string
	Gen                      uint64
}

// Content is what a record carries. Expiry and Refresh are in microseconds of the
// store's time, 0 when the upstream gave none.
type Content struct {
	Expiry, Refresh int64
	Token           string
	Values          map[string]string // at most 255
}

// Encode returns the record of c for b: sealed by the key of keys that seals, or
// plain when keys is nil. A sealed record is at most MaxOverhead bytes longer
// than the content, and never the same twice.
func Encode(b Binding, c Content, keys *Keys) string {
	if keys != nil {
		return string(keys.seal(b, appendContent(nil, c)))
	}
	return string(appendContent(appendBinding(preamble(algPlain), b), c))
}

// Decode returns the content of a record that Encode wrote for b: with one of
// keys, or plain when keys is nil. Otherwise the content is zero and the error
// is ErrUnreadable, or matches ErrUnknownKey.
func Decode(b Binding, rec string, keys *Keys) (Content, error) {
	if e, ok := parseEnvelope(rec); ok {
		plain, err := keys.open(b, e)
		if err != nil {
			return Content{}, err
		}
		return readContent(plain)
	}
	want := string(appendBinding(preamble(algPlain), b))
	if keys != nil || len(rec) < len(want) || rec[:len(want)] != want {
		return Content{}, ErrUnreadable
	}
	return readContent(rec[len(want):])
}

func preamble(alg byte) []byte { return append([]byte(magic), version, alg) }

func appendBinding(out []byte, b Binding) []byte {
	for _, part := range []string{b.Namespace, b.Upstream, b.Key} {
		out = appendString(out, part)
	}
	return binary.BigEndian.AppendUint64(out, b.Gen)
}

func appendContent(out []byte, c Content) []byte {
	out = binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(out, uint64(c.Expiry)), uint64(c.Refresh))
	out = appendString(out, c.Token)
	names := make([]string, 0, len(c.Values))
	for name := range c.Values {
		names = append(names, name)
	}
	sort.Strings(names)
	out = append(out, byte(len(names)))
	for _, name := range names {
		out = appendString(appendString(out, name), c.Values[name])
	}
	return out
}

// readContent is strict: it takes only what appendContent writes.
func readContent(s string) (Content, error) {
	r := reader{rest: s}
	c := Content{Expiry: int64(r.uint64()), Refresh: int64(r.uint64()), Token: r.string()}
	n, last := int(r.byte()), ""
	for i := 0; i < n && !r.bad; i++ {
		if c.Values == nil {
			c.Values = make(map[string]string, n)
		}
		name := r.string()
		c.Values[name] = r.string()
		if i > 0 && name <= last { // appendContent sorts, and writes no name twice
			r.bad = true
		}
		last = name
	}
	if r.bad || r.rest != "" {
		return Content{}, ErrUnreadable
	}
	return c, nil
}

func appendString(b []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint32(b, uint32(len(s))), s...)
}

// reader takes fields off the front of rest; bad once one was not there.
type reader struct {
	rest string
	bad  bool
}

func (r *reader) take(n uint64) string {
	if r.bad || n > uint64(len(r.rest)) {
		r.bad = true
		return ""
	}
	s := r.rest[:n]
	r.rest = r.rest[n:]
	return s
}

func (r *reader) byte() byte {
	if s := r.take(1); s != "" {
		return s[0]
	}
	return 0
}

func (r *reader) uint64() uint64 {
	if s := r.take(8); s != "" {
		return binary.BigEndian.Uint64([]byte(s))
	}
	return 0
}

func (r *reader) string() string {
	s := r.take(4)
	if s == "" {
		return ""
	}
	return r.take(uint64(binary.BigEndian.Uint32([]byte(s))))
}
