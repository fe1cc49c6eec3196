package record_test

import (
	"bytes"
	"encoding/binary"
	"errors"
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
	content = record.Content{Expiry: 1_700_000_000_000_000, Refresh: 1_700_086_400_000_000, Token: "t0k3n", Values: map[string]string{"refresh": "r", "csrf": ""}}
)

// master returns a master key with every byte another one.
func master(seed byte) []byte {
	key := make([]byte, record.KeySize)
	for i := range key {
		key[i] = seed + byte(i)
	}
	return key
}

var keys = record.NewKeys("2025-02", master(1)).With("2025-01", master(101))

// forms are the two that a record can have.
var forms = map[string]*record.Keys{"plain": nil, "sealed": keys}

func TestRoundTrip(t *testing.T) {
	many := map[string]string{}
	for i := range 255 {
		many[fmt.Sprint("name", i)] = strings.Repeat("v", i)
	}
	for name, c := range map[string]record.Content{
		"zero":           {},
		"all fields":     content,
		"negative times": {Expiry: math.MinInt64, Refresh: -1, Token: "t"},
		"largest times":  {Expiry: math.MaxInt64 - 1, Refresh: math.MaxInt64},
		"any bytes":      {Token: "\x00\xff\r\n", Values: map[string]string{"": "\x00", "\xff": ""}},
		"many values":    {Token: "t", Values: many},
		"long token":     {Token: strings.Repeat("t", 16<<10)},
	} {
		t.Run(name, func(t *testing.T) {
			for form, keys := range forms {
				got, err := record.Decode(here, record.Encode(here, c, keys), keys)
				require.NoError(t, err, form)
				assert.Equal(t, c, got, form)
			}
		})
	}
}

// Two processes that encode one session in clear write one record.
func TestPlainEncodingIsDeterministic(t *testing.T) {
	values := map[string]string{}
	for i := range 20 {
		values[fmt.Sprint(i)] = "v"
	}
	first := record.Encode(here, record.Content{Token: "t", Values: values}, nil)
	for range 20 {
		require.Equal(t, first, record.Encode(here, record.Content{Token: "t", Values: values}, nil))
	}
}

func TestRecordIsReadOnlyWhereItBelongs(t *testing.T) {
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
			for form, keys := range forms {
				got, err := record.Decode(there, record.Encode(here, content, keys), keys)
				require.ErrorIs(t, err, record.ErrUnreadable, form)
				assert.Zero(t, got, form)
			}
		})
	}
}

func TestTruncatedRecordIsUnreadable(t *testing.T) {
	for form, keys := range forms {
		rec := record.Encode(here, content, keys)
		for n := range len(rec) {
			got, err := record.Decode(here, rec[:n], keys)
			require.ErrorIsf(t, err, record.ErrUnreadable, "%s: first %d of %d bytes", form, n, len(rec))
			require.Zero(t, got)
		}
	}
}

func TestTrailingBytesAreUnreadable(t *testing.T) {
	for form, keys := range forms {
		rec := record.Encode(here, content, keys)
		for _, more := range []string{"\x00", "x", rec} {
			_, err := record.Decode(here, rec+more, keys)
			require.ErrorIs(t, err, record.ErrUnreadable, form)
		}
	}
}

// The plain form authenticates nothing: a flipped bit in the content may read as
// other content. One in the header never may.
func TestFlippedBitInAPlainHeaderIsUnreadable(t *testing.T) {
	rec := record.Encode(here, content, nil)
	header := strings.Index(rec, here.Key) + len(here.Key) + 8 // the generation ends it
	for bit := range 8 * len(rec) {
		flipped := []byte(rec)
		flipped[bit/8] ^= 1 << (bit % 8)
		got, err := record.Decode(here, string(flipped), nil)
		if bit/8 < header {
			require.ErrorIsf(t, err, record.ErrUnreadable, "bit %d of byte %d", bit%8, bit/8)
		} else if err == nil {
			require.NotEqualf(t, content, got, "bit %d of byte %d", bit%8, bit/8)
		}
	}
}

func TestForgedLengthIsUnreadable(t *testing.T) {
	rec := record.Encode(here, content, nil)
	at := strings.Index(rec, content.Token) - 4
	for _, n := range []uint32{0, 4, 6, 1 << 20, math.MaxInt32, math.MaxInt32 + 1, math.MaxUint32} {
		forged := []byte(rec)
		binary.BigEndian.PutUint32(forged[at:], n)
		_, err := record.Decode(here, string(forged), nil)
		require.ErrorIsf(t, err, record.ErrUnreadable, "a token of %d bytes", n)
	}
}

func TestUnknownVersionOrAlgorithmIsUnreadable(t *testing.T) {
	for form, keys := range forms {
		rec := record.Encode(here, content, keys)
		for _, at := range []int{2, 3} {
			for v := range 256 {
				if other := []byte(rec); other[at] != byte(v) {
					other[at] = byte(v)
					got, err := record.Decode(here, string(other), keys)
					require.ErrorIsf(t, err, record.ErrUnreadable, "%s: byte %d is %d", form, at, v)
					require.Zero(t, got)
				}
			}
		}
	}
}

// A name that comes twice was not written by Encode.
func TestRepeatedNameIsUnreadable(t *testing.T) {
	rec := record.Encode(here, record.Content{Token: "t", Values: map[string]string{"a": "1", "b": "2"}}, nil)
	forged := strings.Replace(rec, "\x00\x00\x00\x01b", "\x00\x00\x00\x01a", 1)
	require.NotEqual(t, rec, forged)
	_, err := record.Decode(here, forged, nil)
	require.ErrorIs(t, err, record.ErrUnreadable)
}

// FuzzDecode: no bytes make Decode panic or read past them. In clear it accepts
// what Encode writes; sealed, nothing but what was sealed. More to start from is
// in testdata/fuzz.
func FuzzDecode(f *testing.F) {
	rec := record.Encode(here, content, nil)
	f.Add([]byte(rec))
	f.Add([]byte(record.Encode(here, record.Content{}, nil)))
	f.Add([]byte(rec[:len(rec)/2]))
	f.Add([]byte(golden))
	f.Add([]byte(nil))
	f.Add(bytes.Repeat([]byte{0xff}, 64))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, rec := range []string{string(data), headerOf(here) + string(data)} { // past the binding too
			got, err := record.Decode(here, rec, nil)
			if err != nil {
				requireRefused(t, got, err)
				continue
			}
			require.Equal(t, rec, record.Encode(here, got, nil))
		}
		for _, rec := range []string{string(data), golden[:goldenSealed] + string(data)} {
			got, err := record.Decode(here, rec, keys)
			if rec == golden {
				require.NoError(t, err)
				continue
			}
			requireRefused(t, got, err)
		}
	})
}

// requireRefused checks what Decode returns for a record it does not take.
func requireRefused(t *testing.T, got record.Content, err error) {
	t.Helper()
	require.Zero(t, got)
	if !errors.Is(err, record.ErrUnknownKey) {
		require.ErrorIs(t, err, record.ErrUnreadable)
	}
}

// headerOf returns what every plain record for b begins with.
func headerOf(b record.Binding) string {
	rec := record.Encode(b, record.Content{}, nil)
	return rec[:len(rec)-8-8-4-1] // two times, an empty token, no values
}

func FuzzEncodeDecode(f *testing.F) {
	f.Add("prod", "up", "key", uint64(1), int64(2), "token", "name", "value", "key2")
	f.Add("", "", "", uint64(0), int64(-1), "", "", "", "\x00")
	f.Fuzz(func(t *testing.T, namespace, upstream, key string, gen uint64, expiry int64, token, name, value, other string) {
		b := record.Binding{Namespace: namespace, Upstream: upstream, Key: key, Gen: gen}
		c := record.Content{Expiry: expiry, Token: token, Values: map[string]string{name: value}}
		rec := record.Encode(b, c, nil)
		got, err := record.Decode(b, rec, nil)
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
			_, err := record.Decode(there, rec, nil)
			require.ErrorIs(t, err, record.ErrUnreadable)
		}
	})
}
