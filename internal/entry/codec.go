package entry

import (
	"encoding/binary"
	"errors"
)

// Sizes of an encoded entry, in bytes.
const (
	MaxRecord = 32 << 10 // Session.Record
	MaxHolder = 64       // Attempt.Holder
	MaxSize   = 33 << 10 // a whole entry: the fixed fields and the holder are under 320
)

// version is the first byte of every encoded entry. A reader that meets another
// one treats the entry as missing and replaces it at its next swap.
const version = 1

// maxGen bounds the numbers a decoder believes: 2⁵⁴ µs is the year 2540. A
// forged generation above it could leave no room to grow.
const maxGen = 1 << 54

// ErrCorrupt is returned by Decode for bytes that no Encode wrote.
var ErrCorrupt = errors.New("entry: corrupt")

// ErrSize is returned by Encode for a record or holder over its limit.
var ErrSize = errors.New("entry: too large")

// Encode returns the entry's bytes: a version, every field in order and fixed
// width (big-endian), then holder and record with their lengths.
func Encode(e Entry) ([]byte, error) {
	if len(e.Session.Record) > MaxRecord || len(e.Open.Holder) > MaxHolder {
		return nil, ErrSize
	}
	b := make([]byte, 0, 256+len(e.Open.Holder)+len(e.Session.Record))
	b = append(b, version)
	b = append(b, e.Stamp[:]...)
	b = appendU64(b, uint64(e.Born), uint64(e.Keep), e.Gen)
	b = appendU64(b, e.Open.Gen)
	b = append(b, e.Open.Nonce[:]...)
	b = appendU64(b, uint64(e.Open.Since), uint64(e.Open.Lease))
	b = appendU64(b, e.Done.Gen)
	b = append(b, e.Done.Nonce[:]...)
	b = appendU64(b, e.Session.Gen, uint64(e.Session.Expires), uint64(e.Session.End), uint64(e.Session.Refresh))
	b = appendU64(b, uint64(e.Proven), uint64(e.Attempts), uint64(e.Window))
	b = append(b, byte(e.Failure.Class), e.Failure.Streak)
	b = appendU64(b, uint64(e.Failure.Until), uint64(e.Young), uint64(e.Unread), uint64(e.Calm))
	b = append(b, byte(len(e.Open.Holder)))
	b = append(b, e.Open.Holder...)
	b = binary.BigEndian.AppendUint32(b, uint32(len(e.Session.Record)))
	return append(b, e.Session.Record...), nil
}

func appendU64(b []byte, vs ...uint64) []byte {
	for _, v := range vs {
		b = binary.BigEndian.AppendUint64(b, v)
	}
	return b
}

// Decode is the inverse of Encode. It returns the zero Entry and ErrCorrupt for
// anything else: another version, a truncated or longer value, a number no rule
// can have written.
func Decode(b []byte) (Entry, error) {
	r := reader{b: b}
	if r.byte() != version {
		return Entry{}, ErrCorrupt
	}
	var e Entry
	e.Stamp = r.nonce()
	e.Born, e.Keep, e.Gen = r.time(), r.time(), r.gen()
	e.Open.Gen, e.Open.Nonce = r.gen(), r.nonce()
	e.Open.Since, e.Open.Lease = r.time(), r.time()
	e.Done = Closed{r.gen(), r.nonce()}
	e.Session = Session{Gen: r.gen(), Expires: r.time(), End: r.time(), Refresh: r.time()}
	e.Proven, e.Attempts, e.Window = r.time(), r.count(), r.time()
	e.Failure = Failure{Class: Class(r.byte()), Streak: r.byte()}
	e.Failure.Until, e.Young, e.Unread, e.Calm = r.time(), r.count(), r.time(), r.time()
	e.Open.Holder = string(r.bytes(int(r.byte()), MaxHolder))
	e.Session.Record = string(r.bytes(int(r.u32()), MaxRecord))
	if r.bad || len(r.b) != 0 || e.Failure.Class > Rejected ||
		e.Open.Gen > e.Gen || e.Done.Gen > e.Gen || e.Session.Gen > e.Gen {
		return Entry{}, ErrCorrupt
	}
	return e, nil
}

// reader takes fields off the front of b; bad once one was not there.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) bytes(n, limit int) []byte {
	if r.bad || n < 0 || n > limit || n > len(r.b) { // < 0: a length of 32 bits where int has no more
		r.bad = true
		return nil
	}
	b := r.b[:n]
	r.b = r.b[n:]
	return b
}

func (r *reader) byte() byte {
	if b := r.bytes(1, 1); b != nil {
		return b[0]
	}
	return 0
}

func (r *reader) u32() uint32 {
	if b := r.bytes(4, 4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

func (r *reader) u64(limit uint64) uint64 {
	b := r.bytes(8, 8)
	if b == nil {
		return 0
	}
	v := binary.BigEndian.Uint64(b)
	if v > limit {
		r.bad = true
		return 0
	}
	return v
}

func (r *reader) gen() uint64   { return r.u64(maxGen) }
func (r *reader) time() Time    { return Time(r.u64(maxGen)) }
func (r *reader) count() uint32 { return uint32(r.u64(1 << 31)) }

func (r *reader) nonce() (n Nonce) {
	copy(n[:], r.bytes(len(n), len(n)))
	return n
}
