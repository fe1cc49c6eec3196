package entry_test

import (
	"encoding/binary"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/internal/entry"
)

// sample has a different value in every field.
func sample() entry.Entry {
	return entry.Entry{
		Stamp: nonce(3), Born: now, Keep: now.Add(time.Hour), Gen: uint64(now) + 9,
		Open:    entry.Attempt{Gen: uint64(now) + 8, Nonce: nonce(4), Since: now + 1, Lease: now + 2, Holder: "host/7"},
		Done:    entry.Closed{Gen: uint64(now) + 7, Nonce: nonce(5)},
		Session: entry.Session{Gen: uint64(now) + 6, Record: "\x00sealed\xff", Expires: now + 3, End: now + 4, Refresh: now + 10},
		Proven:  now + 5, Attempts: 2, Window: now + 6,
		Failure: entry.Failure{Class: entry.Rejected, Until: now + 7, Streak: 8}, Young: 9, Unread: now + 11,
	}
}

func encoded(t testing.TB, e entry.Entry) []byte {
	t.Helper()
	b, err := entry.Encode(e)
	require.NoError(t, err)
	return b
}

func TestDecodeReturnsWhatWasEncoded(t *testing.T) {
	full := sample()
	full.Session.Record = strings.Repeat("r", entry.MaxRecord)
	full.Open.Holder = strings.Repeat("h", entry.MaxHolder)
	for name, e := range map[string]entry.Entry{
		"zero": {}, "sample": sample(), "largest": full,
		"begun":  begun(t, entry.Entry{}, ours, now),
		"stored": loggedIn(t, entry.Entry{}, now),
		"denied": failed(t, entry.Entry{}, entry.Denied, now),
	} {
		t.Run(name, func(t *testing.T) {
			b := encoded(t, e)
			assert.LessOrEqual(t, len(b), entry.MaxSize)
			got, err := entry.Decode(b)
			require.NoError(t, err)
			assert.Equal(t, e, got)
		})
	}
}

// randomly fills an entry with anything the rules could have written.
func randomly(r *rand.Rand) entry.Entry {
	at := func() entry.Time { return entry.Time(r.Int64N(1 << 54)) }
	text := func(limit int) string {
		b := make([]byte, r.IntN(limit+1))
		for i := range b {
			b[i] = byte(r.UintN(256))
		}
		return string(b)
	}
	gen := r.Uint64N(1 << 54)
	older := func() uint64 { return r.Uint64N(gen + 1) }
	id := func() (n entry.Nonce) {
		binary.BigEndian.PutUint64(n[4:], r.Uint64())
		return n
	}
	return entry.Entry{
		Stamp: id(), Born: at(), Keep: at(), Gen: gen,
		Open:    entry.Attempt{Gen: older(), Nonce: id(), Since: at(), Lease: at(), Holder: text(entry.MaxHolder)},
		Done:    entry.Closed{Gen: older(), Nonce: id()},
		Session: entry.Session{Gen: older(), Record: text(300), Expires: at(), End: at(), Refresh: at()},
		Proven:  at(), Attempts: r.Uint32N(1 << 31), Window: at(),
		Failure: entry.Failure{Class: entry.Class(r.UintN(5)), Until: at(), Streak: uint8(r.UintN(256))},
		Young:   r.Uint32N(1 << 31), Unread: at(),
	}
}

func TestAnyEntryTheRulesCanWriteSurvivesTheStore(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 5000 {
		e := randomly(r)
		got, err := entry.Decode(encoded(t, e))
		require.NoError(t, err)
		require.Equal(t, e, got)
	}
}

func TestDifferentEntriesHaveDifferentBytes(t *testing.T) {
	e, other := sample(), sample()
	other.Stamp = nonce(200)
	assert.NotEqual(t, encoded(t, e), encoded(t, other))
}

// faithful asserts that b is refused, or is exactly the encoding of what it was
// taken for.
func faithful(t testing.TB, b []byte) {
	t.Helper()
	e, err := entry.Decode(b)
	if err != nil {
		require.ErrorIs(t, err, entry.ErrCorrupt)
		require.Zero(t, e)
		return
	}
	require.Equal(t, b, encoded(t, e))
}

func TestDecodeRefusesEveryTruncation(t *testing.T) {
	b := encoded(t, sample())
	for n := range b {
		e, err := entry.Decode(b[:n])
		require.ErrorIs(t, err, entry.ErrCorrupt, "%d bytes", n)
		require.Zero(t, e)
	}
}

func TestDecodeTakesNoFlippedBitForSomethingElse(t *testing.T) {
	b := encoded(t, sample())
	for i := range 8 * len(b) {
		b[i/8] ^= 1 << (i % 8)
		faithful(t, b)
		b[i/8] ^= 1 << (i % 8)
	}
}

// Offsets of fields within an encoded entry.
const (
	atKeep     = 1 + 16 + 8
	atGen      = atKeep + 8
	atOpenGen  = atGen + 8
	atDoneGen  = atOpenGen + 8 + 16 + 16
	atSession  = atDoneGen + 8 + 16
	atRefresh  = atSession + 3*8
	atAttempts = atSession + 4*8 + 8
	atClass    = atAttempts + 2*8
	atYoung    = atClass + 2 + 8
	atUnread   = atYoung + 8
	atCalm     = atUnread + 8
	atHolder   = atCalm + 8
)

func TestDecodeRefusesWhatNoRuleWrites(t *testing.T) {
	e := sample()
	e.Open.Holder, e.Session.Record = "", ""
	put := func(at int, v uint64) func([]byte) []byte {
		return func(b []byte) []byte {
			binary.BigEndian.PutUint64(b[at:], v)
			return b
		}
	}
	const limit = 1 << 54
	for name, c := range map[string]struct {
		change func([]byte) []byte
		ok     bool
	}{
		"nothing changed":                  {func(b []byte) []byte { return b }, true},
		"nothing at all":                   {func([]byte) []byte { return nil }, false},
		"empty":                            {func([]byte) []byte { return []byte{} }, false},
		"version 0":                        {func(b []byte) []byte { b[0] = 0; return b }, false},
		"a later version":                  {func(b []byte) []byte { b[0] = 2; return b }, false},
		"trailing byte":                    {func(b []byte) []byte { return append(b, 0) }, false},
		"twice":                            {func(b []byte) []byte { return append(b, b...) }, false},
		"generation at the limit":          {put(atGen, limit), true},
		"generation above the limit":       {put(atGen, limit+1), false},
		"generation that leaves no room":   {put(atGen, 1<<64-1), false},
		"open above issued":                {put(atOpenGen, e.Gen+1), false},
		"open as issued":                   {put(atOpenGen, e.Gen), true},
		"done above issued":                {put(atDoneGen, e.Gen+1), false},
		"session above issued":             {put(atSession, e.Gen+1), false},
		"issued below all of them":         {put(atGen, 1), false},
		"time beyond 2540":                 {put(atKeep, limit+1), false},
		"time before 1970":                 {put(atKeep, 1<<63), false},
		"refresh beyond 2540":              {put(atRefresh, limit+1), false},
		"refresh at the limit":             {put(atRefresh, limit), true},
		"unread beyond 2540":               {put(atUnread, limit+1), false},
		"unread at the limit":              {put(atUnread, limit), true},
		"calm beyond 2540":                 {put(atCalm, limit+1), false},
		"calm at the limit":                {put(atCalm, limit), true},
		"attempts beyond counting":         {put(atAttempts, 1<<31+1), false},
		"attempts that wrap to nothing":    {put(atAttempts, 1<<32), false},
		"young beyond counting":            {put(atYoung, 1<<31+1), false},
		"class that is never recorded":     {func(b []byte) []byte { b[atClass] = byte(entry.NotSent); return b }, false},
		"class nobody knows":               {func(b []byte) []byte { b[atClass] = 200; return b }, false},
		"holder longer than there is":      {func(b []byte) []byte { b[atHolder] = 9; return b }, false},
		"record longer than there is":      {func(b []byte) []byte { b[atHolder+4] = 1; return b }, false},
		"record of 4 GiB":                  {func(b []byte) []byte { copy(b[atHolder+1:], "\xff\xff\xff\xff"); return b }, false},
		"record of 2 GiB":                  {func(b []byte) []byte { copy(b[atHolder+1:], "\x80\x00\x00\x00"); return b }, false},
		"holder over its limit, and there": {func(b []byte) []byte { return grown(b, entry.MaxHolder+1, 0) }, false},
		"holder at its limit":              {func(b []byte) []byte { return grown(b, entry.MaxHolder, 0) }, true},
		"record over its limit, and there": {func(b []byte) []byte { return grown(b, 0, entry.MaxRecord+1) }, false},
		"record at its limit":              {func(b []byte) []byte { return grown(b, 0, entry.MaxRecord) }, true},
	} {
		t.Run(name, func(t *testing.T) {
			b := c.change(encoded(t, e))
			got, err := entry.Decode(b)
			if c.ok {
				require.NoError(t, err)
				faithful(t, b)
				return
			}
			require.ErrorIs(t, err, entry.ErrCorrupt)
			assert.Zero(t, got)
		})
	}
}

// grown gives an entry with neither holder nor record some of the given sizes.
func grown(b []byte, holder, record int) []byte {
	b = append(b[:atHolder:atHolder], byte(holder))
	b = append(b, make([]byte, holder)...)
	b = binary.BigEndian.AppendUint32(b, uint32(record))
	return append(b, make([]byte, record)...)
}

func TestEncodeRefusesWhatNoReaderAccepts(t *testing.T) {
	record, holder := sample(), sample()
	record.Session.Record = strings.Repeat("r", entry.MaxRecord+1)
	holder.Open.Holder = strings.Repeat("h", entry.MaxHolder+1)
	for name, e := range map[string]entry.Entry{"record": record, "holder": holder} {
		t.Run(name, func(t *testing.T) {
			b, err := entry.Encode(e)
			require.ErrorIs(t, err, entry.ErrSize)
			assert.Nil(t, b)
		})
	}
}

func FuzzDecode(f *testing.F) {
	b := encoded(f, sample())
	f.Add(b)
	f.Add(b[:len(b)-3])
	f.Add([]byte{})
	f.Add([]byte{1})
	f.Add(encoded(f, entry.Entry{}))
	f.Fuzz(func(t *testing.T, b []byte) { faithful(t, b) })
}
