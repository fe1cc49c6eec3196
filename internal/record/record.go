// Package record turns a session into the bytes that an entry carries, and
// back, and binds them to the place they were written for.
//
// The binding is why a value that was copied from another key, restored from
// another generation, or answered to the wrong request by a confused client
// library is never taken for a session: Decode compares all of it. In the plain
// form it stands in clear before the content; a sealed form (another alg)
// would authenticate it instead and encrypt the content.
//
//	"SL" | version 1 | alg 1 | binding | content
//	binding  namespace, upstream, key, each with its length | generation 8
//	content  expiry 8 | token | number of values 1 | name, value, …
package record

import (
	"encoding/binary"
	"errors"
	"sort"
)

const (
	magic    = "SL"
	version  = 1
	algPlain = 0
)

// ErrUnreadable is returned by Decode for bytes that Encode did not write for
// the same Binding.
var ErrUnreadable = errors.New("record: unreadable or written for another place")

// Binding says where a record belongs.
type Binding struct {
	Namespace, Upstream, Key string
	Gen                      uint64
}

// Content is what a record carries. Expiry is in microseconds of the store's
// time, 0 when the upstream gave none.
type Content struct {
	Expiry int64
	Token  string
	Values map[string]string // at most 255
}

// Encode returns the record of c for b.
func Encode(b Binding, c Content) string {
	out := header(b)
	out = binary.BigEndian.AppendUint64(out, uint64(c.Expiry))
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
	return string(out)
}

// Decode returns the content of a record that was written for b.
func Decode(b Binding, rec string) (Content, error) {
	want := string(header(b))
	if len(rec) < len(want) || rec[:len(want)] != want {
		return Content{}, ErrUnreadable
	}
	r := reader{rest: rec[len(want):]}
	c := Content{Expiry: int64(r.uint64()), Token: r.string()}
	n, last := int(r.byte()), ""
	for i := 0; i < n && !r.bad; i++ {
		if c.Values == nil {
			c.Values = make(map[string]string, n)
		}
		name := r.string()
		c.Values[name] = r.string()
		if i > 0 && name <= last { // Encode sorts, and writes no name twice
			r.bad = true
		}
		last = name
	}
	if r.bad || r.rest != "" {
		return Content{}, ErrUnreadable
	}
	return c, nil
}

func header(b Binding) []byte {
	out := append([]byte(magic), version, algPlain)
	for _, part := range []string{b.Namespace, b.Upstream, b.Key} {
		out = appendString(out, part)
	}
	return binary.BigEndian.AppendUint64(out, b.Gen)
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
