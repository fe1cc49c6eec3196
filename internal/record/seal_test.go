package record_test

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/internal/record"
)

// golden is content, sealed for here by the first release that could.
var golden = unhex("534c010107323032352d3032" +
	"d7244735340169cf18b6064348d5daee7599eba2e969907c29a573a4d9897a47" +
	"ae6e0c8ee0b78280d7829941" +
	"a8efcba832dd2b1c7b87493f0ee65a06c3efcd43d8ce4e4dfe1b20624647bb32e7250fdb7fbe8f30" +
	"c73b52ac17902d36d95a174a3db10d3bae2827c19aa0daa3596791a9a28c")

// Where a record that keys sealed has its fields.
const (
	idLength     = 4
	id           = idLength + 1
	salt         = id + len("2025-02")
	goldenSealed = salt + 32 // nonce, ciphertext, tag
	ciphertext   = goldenSealed + 12
)

func unhex(s string) string {
	b, err := hex.DecodeString(s)
	if err != nil {
		panic(err)
	}
	return string(b)
}

// What was stored is read by every later release.
func TestSealedRecordOfTheFirstReleaseIsReadable(t *testing.T) {
	got, err := record.Decode(here, golden, keys)
	require.NoError(t, err)
	assert.Equal(t, content, got)
}

// The form, opened by the standard library alone, as the package comment has it.
func TestSealedFormIsTheDocumentedOne(t *testing.T) {
	rec := record.Encode(here, content, keys)
	require.True(t, strings.HasPrefix(rec, "SL\x01\x01\x072025-02"))
	subkey, err := hkdf.Key(sha256.New, master(1), []byte(rec[salt:goldenSealed]), "sessionlock/v1/record", 32)
	require.NoError(t, err)
	block, err := aes.NewCipher(subkey)
	require.NoError(t, err)
	aead, err := cipher.NewGCM(block)
	require.NoError(t, err)
	data := []byte(rec[:goldenSealed])
	for _, part := range []string{here.Namespace, here.Upstream, here.Key} {
		data = append(binary.BigEndian.AppendUint32(data, uint32(len(part))), part...)
	}
	data = binary.BigEndian.AppendUint64(data, here.Gen)
	plain, err := aead.Open(nil, []byte(rec[goldenSealed:ciphertext]), []byte(rec[ciphertext:]), data)
	require.NoError(t, err)
	assert.Equal(t, strings.TrimPrefix(record.Encode(here, content, nil), headerOf(here)), string(plain))
}

func TestSealedRecordShowsNothing(t *testing.T) {
	b := record.Binding{Namespace: "a-namespace", Upstream: "an-upstream", Key: "a-user-key", Gen: 0x0102030405060708}
	c := record.Content{Expiry: 0x1112131415161718, Refresh: 0x2122232425262728, Token: "a-token", Values: map[string]string{"a-name": "a-value"}}
	secrets := []string{
		"a-namespace", "an-upstream", "a-user-key", "\x01\x02\x03\x04\x05\x06\x07\x08",
		"\x11\x12\x13\x14\x15\x16\x17\x18", "\x21\x22\x23\x24\x25\x26\x27\x28", "a-token", "a-name", "a-value", string(master(1)),
	}
	plain, sealed := record.Encode(b, c, nil), record.Encode(b, c, keys)
	for _, secret := range secrets[:len(secrets)-1] {
		require.Contains(t, plain, secret)
	}
	for _, secret := range secrets {
		for from := 0; from+4 <= len(secret); from++ { // no part of it either
			assert.NotContains(t, sealed, secret[from:from+4])
		}
	}
}

// Everything in a sealed record is authenticated: no bit of it can change.
func TestFlippedBitInASealedRecordIsRefused(t *testing.T) {
	rec := record.Encode(here, content, keys)
	for bit := range 8 * len(rec) {
		flipped := []byte(rec)
		flipped[bit/8] ^= 1 << (bit % 8)
		got, err := record.Decode(here, string(flipped), keys)
		requireRefused(t, got, err)
		if at := bit / 8; at < idLength || at >= salt { // the rest may name another key
			require.ErrorIsf(t, err, record.ErrUnreadable, "bit %d of byte %d", bit%8, at)
		}
	}
}

// Parts of two good records for one place make no third.
func TestMixedSealedRecordsAreRefused(t *testing.T) {
	a, b := record.Encode(here, content, keys), record.Encode(here, record.Content{Token: "other"}, keys)
	for name, cut := range map[string]int{
		"another salt": goldenSealed, "another salt and nonce": ciphertext, "another tag": len(b) - 16, "another last byte": len(b) - 1,
	} {
		got, err := record.Decode(here, a[:min(cut, len(a))]+b[cut:], keys)
		require.ErrorIs(t, err, record.ErrUnreadable, name)
		assert.Zero(t, got, name)
	}
}

// The id is authenticated, and not only used to find the key: one that names
// the very same key is refused as well.
func TestKeyIDIsAuthenticated(t *testing.T) {
	rec := record.Encode(here, content, record.NewKeys("a", master(1)))
	got, err := record.Decode(here, strings.Replace(rec, "\x01a", "\x01b", 1), record.NewKeys("b", master(1)))
	require.ErrorIs(t, err, record.ErrUnreadable)
	assert.Zero(t, got)
}

func TestWrongKeyUnderTheSameIDIsUnreadable(t *testing.T) {
	for bit := range 8 * record.KeySize {
		wrong := master(1)
		wrong[bit/8] ^= 1 << (bit % 8)
		got, err := record.Decode(here, record.Encode(here, content, keys), record.NewKeys("2025-02", wrong))
		require.ErrorIs(t, err, record.ErrUnreadable)
		require.NotErrorIs(t, err, record.ErrUnknownKey)
		require.Zero(t, got)
	}
}

func TestUnknownKeyIsNamed(t *testing.T) {
	rec := record.Encode(here, content, keys)
	for name, others := range map[string]*record.Keys{
		"no keys": nil, "other keys": record.NewKeys("2025-01", master(1)), "a longer id": record.NewKeys("2025-02x", master(1)),
	} {
		got, err := record.Decode(here, rec, others)
		require.ErrorIs(t, err, record.ErrUnknownKey, name)
		require.NotErrorIs(t, err, record.ErrUnreadable, name)
		assert.Zero(t, got, name)
		assert.EqualError(t, err, `record: sealed with an unknown key: "2025-02"`, name)
	}
}

// A record too short to have been sealed was not sealed by an unknown key.
func TestTruncatedRecordNamesNoKey(t *testing.T) {
	rec := record.Encode(here, content, keys)
	for n := range len(rec) {
		_, err := record.Decode(here, rec[:n], nil)
		want := record.ErrUnreadable
		if n >= ciphertext+16 {
			want = record.ErrUnknownKey
		}
		require.ErrorIsf(t, err, want, "first %d of %d bytes", n, len(rec))
	}
}

// Whoever writes to the store chooses the id: it is of bounded length, and
// cannot write lines of its own into a log.
func TestForgedKeyIDIsQuotedAndBounded(t *testing.T) {
	rest := strings.Repeat("x", 100)
	for forged, known := range map[string]bool{
		"":                                      false,
		"\n":                                    true,
		strings.Repeat("\x00", record.MaxKeyID): true,
		strings.Repeat("k", record.MaxKeyID+1):  false,
		strings.Repeat("k", 255):                false,
	} {
		rec := "SL\x01\x01" + string([]byte{byte(len(forged))}) + forged + rest
		for form, keys := range forms {
			got, err := record.Decode(here, rec, keys)
			require.Zero(t, got)
			require.Equal(t, known, errorIsUnknownKey(t, err), "%s: %q", form, forged)
			assert.NotContains(t, err.Error(), "\n")
			assert.Less(t, len(err.Error()), 200)
		}
	}
}

func errorIsUnknownKey(t *testing.T, err error) bool {
	t.Helper()
	requireRefused(t, record.Content{}, err)
	return strings.Contains(err.Error(), "unknown key")
}

// Given keys, a record in clear is no record: whoever can write to the store
// could write one.
func TestPlainRecordIsUnreadableWithKeys(t *testing.T) {
	rec := record.Encode(here, content, nil)
	got, err := record.Decode(here, rec, keys)
	require.ErrorIs(t, err, record.ErrUnreadable)
	assert.Zero(t, got)

	claimed := []byte(rec)
	claimed[3] = 1 // says that it is sealed
	got, err = record.Decode(here, string(claimed), keys)
	requireRefused(t, got, err)

	stripped := []byte(record.Encode(here, content, keys))
	stripped[3] = 0 // says that it is plain
	for _, keys := range forms {
		got, err = record.Decode(here, string(stripped), keys)
		require.ErrorIs(t, err, record.ErrUnreadable)
		assert.Zero(t, got)
	}
}

// A fleet goes from one key to another in four steps. Whatever one step seals
// the next and the one before can open, so a fleet that is half way loses
// nothing. Steps left out, or taken in another order, meet records whose key
// they do not have, and are told which.
func TestRotation(t *testing.T) {
	older, newer := master(1), master(2)
	steps := []*record.Keys{
		record.NewKeys("old", older),
		record.NewKeys("old", older).With("new", newer),
		record.NewKeys("new", newer).With("old", older),
		record.NewKeys("new", newer),
	}
	unknown := map[[2]int]string{ // writer, reader
		{2, 0}: `"new"`, {3, 0}: `"new"`, // the new key sealed before everybody had it
		{0, 3}: `"old"`, {1, 3}: `"old"`, // the old one was dropped too early
	}
	for w, writer := range steps {
		for r, reader := range steps {
			got, err := record.Decode(here, record.Encode(here, content, writer), reader)
			if id, missing := unknown[[2]int{w, r}]; missing {
				require.ErrorIsf(t, err, record.ErrUnknownKey, "sealed in step %d, read in step %d", w, r)
				assert.Contains(t, err.Error(), id)
				assert.Zero(t, got)
				assert.Greater(t, max(w-r, r-w), 1, "steps that meet in the right order")
				continue
			}
			require.NoErrorf(t, err, "sealed in step %d, read in step %d", w, r)
			assert.Equal(t, content, got)
		}
	}
}

// Salt and nonce are fresh, so no two records share a subkey.
func TestSealedRecordsAreNeverTheSame(t *testing.T) {
	const n = 4096
	salts, nonces, texts := map[string]bool{}, map[string]bool{}, map[string]bool{}
	for range n {
		rec := record.Encode(here, content, keys)
		salts[rec[salt:goldenSealed]] = true
		nonces[rec[goldenSealed:ciphertext]] = true
		texts[rec[ciphertext:]] = true
	}
	assert.Len(t, salts, n)
	assert.Len(t, nonces, n)
	assert.Len(t, texts, n)
	for at := range 32 { // every byte of the salt is random
		first := map[byte]bool{}
		for s := range salts {
			first[s[at]] = true
		}
		assert.Greaterf(t, len(first), 200, "byte %d of the salt", at)
	}
}

// The keys are copied: what the caller does to his slice afterwards changes
// nothing, and With leaves alone whoever works with the set as it was.
func TestKeysNeverChange(t *testing.T) {
	sealing, opening := master(1), master(2)
	one := record.NewKeys("one", sealing)
	two := one.With("two", opening)
	clear(sealing)
	clear(opening)
	rec := record.Encode(here, content, two)
	_, err := record.Decode(here, rec, record.NewKeys("one", master(1)))
	require.NoError(t, err, "one seals, and its key was copied")
	_, err = record.Decode(here, record.Encode(here, content, record.NewKeys("two", master(2))), two)
	require.NoError(t, err, "the other key was copied")
	assert.Equal(t, []bool{true, false, true, true}, []bool{one.HasID("one"), one.HasID("two"), two.HasID("one"), two.HasID("two")})
	assert.Equal(t, []bool{true, false, true, true, false}, []bool{
		one.HasKey(master(1)), one.HasKey(master(2)), two.HasKey(master(1)), two.HasKey(master(2)), two.HasKey(master(3)),
	})
}

// A caller may rely on MaxOverhead for his limit, and reach it.
func TestOverheadIsBounded(t *testing.T) {
	for _, size := range []int{0, 1, 1 << 10, 32 << 10} {
		c := record.Content{Token: strings.Repeat("t", size)}
		inside := len(record.Encode(here, c, nil)) - len(headerOf(here))
		longest := record.NewKeys(strings.Repeat("k", record.MaxKeyID), master(1))
		assert.Equal(t, inside+record.MaxOverhead, len(record.Encode(here, c, longest)))                                          //nolint:testifylint // Len would print them
		assert.Equal(t, inside+record.MaxOverhead-record.MaxKeyID+1, len(record.Encode(here, c, record.NewKeys("k", master(1))))) //nolint:testifylint // as above
	}
}

func TestMasterKeyIsNotPrinted(t *testing.T) {
	// As a failing assertion prints it.
	var said strings.Builder
	assert.Equal(errorf(func(format string, args ...any) { fmt.Fprintf(&said, format, args...) }), keys, record.NewKeys("x", master(3)))
	shown := []string{said.String()}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x", "%d", "%t"} {
		shown = append(shown, fmt.Sprintf(verb, *keys))
	}
	for _, s := range shown[:3] {
		require.Contains(t, s, "2025-02", "ids may be printed")
	}
	for _, s := range shown {
		for _, form := range []string{string(master(1)), hex.EncodeToString(master(1)[:4]), "1, 2, 3, 4", "1 2 3 4", "01 02 03 04", "0x1, 0x2, 0x3"} {
			assert.NotContains(t, s, form)
		}
	}
}

type errorf func(format string, args ...any)

func (f errorf) Errorf(format string, args ...any) { f(format, args...) }

// FuzzSealOpen: what was sealed is opened, with the same key and for the same
// place only, and not after any change. More to start from is in testdata/fuzz.
func FuzzSealOpen(f *testing.F) {
	f.Add("prod", "up", "key", uint64(1), int64(2), "token", "name", "value", "id", byte(1), uint16(0), byte(1), []byte("x"))
	f.Add("", "", "", uint64(0), int64(-1), "", "", "", "\xff", byte(9), uint16(60), byte(0), []byte(nil))
	f.Fuzz(func(t *testing.T, namespace, upstream, key string, gen uint64, expiry int64, token, name, value, id string,
		seed byte, at uint16, xor byte, insert []byte,
	) {
		if id == "" || len(id) > record.MaxKeyID {
			id = "id"
		}
		b := record.Binding{Namespace: namespace, Upstream: upstream, Key: key, Gen: gen}
		c := record.Content{Expiry: expiry, Token: token, Values: map[string]string{name: value}}
		keys := record.NewKeys(id, master(seed))
		rec := record.Encode(b, c, keys)
		got, err := record.Decode(b, rec, keys)
		require.NoError(t, err)
		require.Equal(t, c, got)

		for _, there := range []record.Binding{
			{namespace, upstream, name, gen},
			{namespace, name, key, gen},
			{name, upstream, key, gen},
			{upstream, namespace, key, gen},
			{namespace, key, upstream, gen},
			{namespace, upstream, key, gen ^ 1<<(at%64)},
		} {
			if there != b {
				got, err := record.Decode(there, rec, keys)
				require.ErrorIs(t, err, record.ErrUnreadable)
				require.Zero(t, got)
			}
		}
		got, err = record.Decode(b, rec, record.NewKeys(id, master(seed+1+xor%255)))
		require.ErrorIs(t, err, record.ErrUnreadable)
		require.Zero(t, got)

		i := int(at) % len(rec)
		flipped := []byte(rec)
		flipped[i] ^= xor
		for _, changed := range []string{
			string(flipped), rec[:i], rec[i:], rec[:i] + rec[i+1:], rec[:i] + string(insert) + rec[i:], rec[:i] + string(insert), string(insert) + rec[i:],
		} {
			if changed != rec {
				got, err := record.Decode(b, changed, keys)
				requireRefused(t, got, err)
			}
		}
	})
}

func BenchmarkSeal(b *testing.B) {
	for _, kib := range []int{1, 4, 16} {
		b.Run(fmt.Sprint(kib, "KiB"), func(b *testing.B) {
			c := record.Content{Token: strings.Repeat("t", kib<<10)}
			b.SetBytes(int64(kib << 10))
			b.ReportAllocs()
			for b.Loop() {
				_ = record.Encode(here, c, keys)
			}
		})
	}
}

func BenchmarkOpen(b *testing.B) {
	for _, kib := range []int{1, 4, 16} {
		b.Run(fmt.Sprint(kib, "KiB"), func(b *testing.B) {
			rec := record.Encode(here, record.Content{Token: strings.Repeat("t", kib<<10)}, keys)
			b.SetBytes(int64(kib << 10))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := record.Decode(here, rec, keys); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
