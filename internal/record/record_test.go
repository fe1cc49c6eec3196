package record_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/internal/record"
)

var (
	here    = record.Binding{Namespace: "prod", Upstream: "https://api.acme.test", Key: "tenant-7", Gen: 42}
	content = record.Content{Expiry: 1_700_000_000_000_000, Token: "t0k3n", Values: map[string]string{"refresh": "r", "csrf": ""}}
)

func TestRoundTrip(t *testing.T) {
	many := map[string]string{}
	for i := range 255 {
		many[fmt.Sprint("name", i)] = strings.Repeat("v", i)
	}
	for name, c := range map[string]record.Content{
		"zero":            {},
		"all fields":      content,
		"negative expiry": {Expiry: math.MinInt64, Token: "t"},
		"largest expiry":  {Expiry: math.MaxInt64},
		"any bytes":       {Token: "\x00\xff\r\n", Values: map[string]string{"": "\x00", "\xff": ""}},
		"many values":     {Token: "t", Values: many},
		"long token":      {Token: strings.Repeat("t", 16<<10)},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := record.Decode(here, record.Encode(here, c))
			require.NoError(t, err)
			assert.Equal(t, c, got)
		})
	}
}

// Two processes that encode one session must write one record.
func TestEncodingIsDeterministic(t *testing.T) {
	values := map[string]string{}
	for i := range 20 {
		values[fmt.Sprint(i)] = "v"
	}
	first := record.Encode(here, record.Content{Token: "t", Values: values})
	for range 20 {
		require.Equal(t, first, record.Encode(here, record.Content{Token: "t", Values: values}))
	}
}

func TestRecordIsReadOnlyWhereItBelongs(t *testing.T) {
	rec := record.Encode(here, content)
	for name, move := range map[string]func(b *record.Binding){
		"another namespace":   func(b *record.Binding) { b.Namespace = "staging" },
		"no namespace":        func(b *record.Binding) { b.Namespace = "" },
		"another upstream":    func(b *record.Binding) { b.Upstream += "/" },
		"another key":         func(b *record.Binding) { b.Key = "tenant-8" },
		"an older generation": func(b *record.Binding) { b.Gen-- },
		"a newer generation":  func(b *record.Binding) { b.Gen++ },
		"letters moved from upstream to key": func(b *record.Binding) {
			b.Upstream, b.Key = b.Upstream[:len(b.Upstream)-1], b.Upstream[len(b.Upstream)-1:]+b.Key
		},
		"letters moved from namespace to upstream": func(b *record.Binding) {
			b.Namespace, b.Upstream = "pro", "d"+b.Upstream
		},
	} {
		t.Run(name, func(t *testing.T) {
			there := here
			move(&there)
			got, err := record.Decode(there, rec)
			require.ErrorIs(t, err, record.ErrUnreadable)
			assert.Zero(t, got)
		})
	}
}

func TestTruncatedRecordIsUnreadable(t *testing.T) {
	rec := record.Encode(here, content)
	for n := range len(rec) {
		got, err := record.Decode(here, rec[:n])
		require.ErrorIsf(t, err, record.ErrUnreadable, "first %d of %d bytes", n, len(rec))
		require.Zero(t, got)
	}
}

func TestTrailingBytesAreUnreadable(t *testing.T) {
	rec := record.Encode(here, content)
	for _, more := range []string{"\x00", "x", rec} {
		_, err := record.Decode(here, rec+more)
		require.ErrorIs(t, err, record.ErrUnreadable)
	}
}

// The plain form authenticates nothing: a flipped bit in the content may read as
// other content. One in the header never may.
func TestFlippedBitInTheHeaderIsUnreadable(t *testing.T) {
	rec := record.Encode(here, content)
	header := strings.Index(rec, here.Key) + len(here.Key) + 8 // the generation ends it
	for bit := range 8 * len(rec) {
		flipped := []byte(rec)
		flipped[bit/8] ^= 1 << (bit % 8)
		got, err := record.Decode(here, string(flipped))
		if bit/8 < header {
			require.ErrorIsf(t, err, record.ErrUnreadable, "bit %d of byte %d", bit%8, bit/8)
		} else if err == nil {
			require.NotEqualf(t, content, got, "bit %d of byte %d", bit%8, bit/8)
		}
	}
}

func TestForgedLengthIsUnreadable(t *testing.T) {
	rec := record.Encode(here, content)
	at := strings.Index(rec, content.Token) - 4
	for _, n := range []uint32{0, 4, 6, 1 << 20, math.MaxInt32, math.MaxInt32 + 1, math.MaxUint32} {
		forged := []byte(rec)
		binary.BigEndian.PutUint32(forged[at:], n)
		_, err := record.Decode(here, string(forged))
		require.ErrorIsf(t, err, record.ErrUnreadable, "a token of %d bytes", n)
	}
}

func TestUnknownVersionOrAlgorithmIsUnreadable(t *testing.T) {
	rec := record.Encode(here, content)
	for _, at := range []int{2, 3} {
		for v := range 256 {
			other := []byte(rec)
			other[at] = byte(v)
			_, err := record.Decode(here, string(other))
			assert.Equalf(t, string(other) == rec, err == nil, "byte %d is %d", at, v)
		}
	}
}

// A name that comes twice was not written by Encode.
func TestRepeatedNameIsUnreadable(t *testing.T) {
	rec := record.Encode(here, record.Content{Token: "t", Values: map[string]string{"a": "1", "b": "2"}})
	forged := strings.Replace(rec, "\x00\x00\x00\x01b", "\x00\x00\x00\x01a", 1)
	require.NotEqual(t, rec, forged)
	_, err := record.Decode(here, forged)
	require.ErrorIs(t, err, record.ErrUnreadable)
}

// FuzzDecode: no bytes make Decode panic or read past them, and whatever it
// accepts is what Encode writes.
func FuzzDecode(f *testing.F) {
	rec := record.Encode(here, content)
	f.Add([]byte(rec))
	f.Add([]byte(record.Encode(here, record.Content{})))
	f.Add([]byte(rec[:len(rec)/2]))
	f.Add([]byte(nil))
	f.Add(bytes.Repeat([]byte{0xff}, 64))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, rec := range []string{string(data), headerOf(here) + string(data)} { // past the binding too
			got, err := record.Decode(here, rec)
			if err != nil {
				require.ErrorIs(t, err, record.ErrUnreadable)
				require.Zero(t, got)
				continue
			}
			require.Equal(t, rec, record.Encode(here, got))
		}
	})
}

// headerOf returns what every record for b begins with.
func headerOf(b record.Binding) string {
	rec := record.Encode(b, record.Content{})
	return rec[:len(rec)-8-4-1] // expiry, empty token, no values
}

func FuzzEncodeDecode(f *testing.F) {
	f.Add("prod", "up", "key", uint64(1), int64(2), "token", "name", "value", "key2")
	f.Add("", "", "", uint64(0), int64(-1), "", "", "", "\x00")
	f.Fuzz(func(t *testing.T, namespace, upstream, key string, gen uint64, expiry int64, token, name, value, other string) {
		b := record.Binding{Namespace: namespace, Upstream: upstream, Key: key, Gen: gen}
		c := record.Content{Expiry: expiry, Token: token, Values: map[string]string{name: value}}
		rec := record.Encode(b, c)
		got, err := record.Decode(b, rec)
		require.NoError(t, err)
		require.Equal(t, c, got)
		for _, there := range []record.Binding{
			{namespace, upstream, other, gen},
			{namespace, other, key, gen},
			{other, upstream, key, gen},
			{upstream, namespace, key, gen},
			{namespace, key, upstream, gen},
			{namespace, upstream, key, gen + 1},
		} {
			if there == b {
				continue
			}
			_, err := record.Decode(there, rec)
			require.ErrorIs(t, err, record.ErrUnreadable)
		}
	})
}
