package sessionlock_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock"
)

// sealingKey returns a key that shows the canary wherever it is shown.
func sealingKey(seed byte) []byte {
	return append([]byte(strings.Repeat(canary, 5)), seed, 'k')
}

func newKeyring(t testing.TB) *sessionlock.Keyring {
	t.Helper()
	k, err := sessionlock.NewKeyring("2025-02", sealingKey(1))
	require.NoError(t, err)
	require.NoError(t, k.Also("2025-01", sealingKey(2)))
	return k
}

// A fleet on its way from one key to the next: the new one seals, the old one
// still opens what it sealed.
func ExampleNewKeyring() {
	older, newer := bytes.Repeat([]byte("your old secret."), 2), bytes.Repeat([]byte("your new secret."), 2)

	keyring, err := sessionlock.NewKeyring("2025-02", newer)
	if err != nil {
		panic(err)
	}
	fmt.Println(keyring.Also("2025-01", older))
	fmt.Println(keyring.Also("2024-12", older[:31]))
	fmt.Println(keyring)

	ctx := context.Background()
	client := client(sessionlock.WithKeyring(keyring))
	defer client.Close(ctx)
	show(client.Session(ctx, "bob"))
	// Output:
	// <nil>
	// sessionlock: invalid argument: key has 31 bytes, not 32
	// [sessionlock keyring]
	// token-bob-1
}

func TestKeyringRefusesBadIDsAndKeys(t *testing.T) {
	good := sealingKey(9)
	for name, tt := range map[string]struct {
		id   string
		key  []byte
		want string
	}{
		"no id":                  {"", good, "key id"},
		"a blank id":             {"   ", good, "key id"},
		"an id over 32 bytes":    {strings.Repeat("i", 33), good, "key id"},
		"an id of 1 MB":          {strings.Repeat(canary, 1<<17), good, "key id"},
		"a line break":           {"2025\n" + canary, good, "key id"},
		"a tab":                  {"2025\t", good, "key id"},
		"a NUL":                  {"2025\x00", good, "key id"},
		"a DEL":                  {"2025\x7f", good, "key id"},
		"letters outside ASCII":  {"schlüssel", good, "key id"},
		"invalid UTF-8":          {"2025\xff", good, "key id"},
		"no key":                 {"id", nil, "0 bytes, not 32"},
		"an empty key":           {"id", []byte{}, "0 bytes, not 32"},
		"a key of 16 bytes":      {"id", good[:16], "16 bytes, not 32"},
		"a key of 31 bytes":      {"id", good[:31], "31 bytes, not 32"},
		"a key of 33 bytes":      {"id", append(good[:32:32], 'x'), "33 bytes, not 32"},
		"a key in hex":           {"id", []byte(hex.EncodeToString(good)), "64 bytes, not 32"},
		"a key of zeros":         {"id", make([]byte, 32), "equal"},
		"a key of one character": {"id", bytes.Repeat([]byte("k"), 32), "equal"},
		"a key of one byte":      {"id", bytes.Repeat([]byte{0xff}, 32), "equal"},
	} {
		t.Run(name, func(t *testing.T) {
			k, err := sessionlock.NewKeyring(tt.id, tt.key)
			refusedArgument(t, err, "NewKeyring")
			assert.ErrorContains(t, err, tt.want)
			assert.Nil(t, k)
			assert.Less(t, len(err.Error()), 200)

			err = newKeyring(t).Also(tt.id, tt.key)
			refusedArgument(t, err, "Also")
			assert.ErrorContains(t, err, tt.want)
		})
	}
	_, err := sessionlock.NewKeyring("", nil)
	require.ErrorContains(t, err, "key id")
	require.ErrorContains(t, err, "0 bytes", "all that is wrong is said at once")
}

func TestKeyringAccepts(t *testing.T) {
	almostEqual := make([]byte, 32)
	almostEqual[31] = 1
	for name, tt := range map[string]struct {
		id  string
		key []byte
	}{
		"one character":          {"1", sealingKey(9)},
		"32 characters":          {strings.Repeat("i", 32), sealingKey(9)},
		"punctuation":            {" !\"#$%&'()*+,-./:;<=>?@[", sealingKey(9)},
		"more of it":             {"\\]^_`{|}~", sealingKey(9)},
		"an id with spaces":      {" 2025 02 ", sealingKey(9)},
		"the id in another case": {"2025-02A", sealingKey(9)},
		"two different bytes":    {"id", almostEqual},
		"a key of control bytes": {"id", append(bytes.Repeat([]byte{0}, 31), 0xff)},
	} {
		_, err := sessionlock.NewKeyring(tt.id, tt.key)
		require.NoError(t, err, name)
		require.NoError(t, newKeyring(t).Also(tt.id, tt.key), name)
	}
}

func TestKeyringTakesNoIDAndNoKeyTwice(t *testing.T) {
	k := newKeyring(t)
	for name, tt := range map[string]struct {
		id   string
		key  []byte
		want string
	}{
		"the sealing id":          {"2025-02", sealingKey(3), "id is in the keyring"},
		"an opening id":           {"2025-01", sealingKey(3), "id is in the keyring"},
		"the sealing key":         {"2025-03", sealingKey(1), "under another id"},
		"an opening key":          {"2025-03", sealingKey(2), "under another id"},
		"the sealing id and key":  {"2025-02", sealingKey(1), "id is in the keyring"},
		"an opening id and key":   {"2025-01", sealingKey(2), "id is in the keyring"},
		"one's id, another's key": {"2025-01", sealingKey(1), "id is in the keyring"},
	} {
		err := k.Also(tt.id, tt.key)
		refusedArgument(t, err, name)
		require.ErrorContains(t, err, tt.want, name)
		assert.NotContains(t, err.Error(), tt.id, name)
	}
	require.NoError(t, k.Also("2025-03", sealingKey(3)), "what was refused left nothing behind")
	require.Error(t, k.Also("2025-03", sealingKey(4)))
	require.Error(t, k.Also("2025-04", sealingKey(3)))
}

func TestKeyringThatNobodyMadeIsRefused(t *testing.T) {
	var none *sessionlock.Keyring
	refusedArgument(t, none.Also("2025-01", sealingKey(1)), "nil")
	refusedArgument(t, new(sessionlock.Keyring).Also("2025-01", sealingKey(1)), "zero")
}

// The caller may clear his slices, and usually should.
func TestKeyringCopiesKeys(t *testing.T) {
	sealing, opening := sealingKey(1), sealingKey(2)
	k, err := sessionlock.NewKeyring("2025-02", sealing)
	require.NoError(t, err)
	require.NoError(t, k.Also("2025-01", opening))
	clear(sealing)
	clear(opening)
	require.Error(t, k.Also("a", sealingKey(1)), "it still has the key that seals")
	require.Error(t, k.Also("b", sealingKey(2)), "it still has the key that opens")
}

// Of keys that are added at once none is lost, and of the same one only one is taken.
func TestKeysAreAddedConcurrently(t *testing.T) {
	const n = 200
	k := newKeyring(t)
	key := func(i int) []byte { return fmt.Appendf(nil, "%32d", i) }
	id := func(i int) string { return fmt.Sprint("id ", i) }
	var wg sync.WaitGroup
	var taken atomic.Int64
	for part := range 8 {
		wg.Go(func() {
			for i := range n / 4 { // each key by two of them
				if i += part / 2 * n / 4; k.Also(id(i), key(i)) == nil {
					taken.Add(1)
				}
			}
		})
	}
	wg.Wait()
	assert.EqualValues(t, n, taken.Load())
	for i := range n {
		assert.ErrorContains(t, k.Also(id(i), key(n)), "id is in the keyring", "key %d", i)
	}
}

// A key that is added to a keyring in use opens what is stored from then on:
// the first step of a rotation needs no restart.
func TestClientsUseAKeyThatIsAddedMeanwhile(t *testing.T) {
	newer, err := sessionlock.NewKeyring("2025-03", sealingKey(3))
	require.NoError(t, err)
	older, cache := newKeyring(t), sessionlock.WithCache(new(sessionlock.MemoryCache))
	clientOf := func(k *sessionlock.Keyring) *sessionlock.Client {
		auth := sessionlock.AuthenticatorFunc(func(_ context.Context, key string) (sessionlock.Session, error) {
			return sessionlock.Session{Token: sessionlock.NewToken(key)}, nil
		})
		c, err := sessionlock.New(acme, auth, cache, sessionlock.WithKeyring(k))
		require.NoError(t, err)
		t.Cleanup(func() { _ = c.Close(context.WithoutCancel(t.Context())) })
		return c
	}
	sealing, opening := clientOf(newer), clientOf(older)
	mustSession(t, opening, "another key: the client is in use")
	want := mustSession(t, sealing, "bob")
	require.NoError(t, older.Also("2025-03", sealingKey(3)))
	got := mustSession(t, opening, "bob")
	assert.Equal(t, want.Generation(), got.Generation())
	assert.EqualValues(t, 1, opening.Stats().Logins, "for the other key alone")
}

func TestKeyringIsNeverPrinted(t *testing.T) {
	const word = "[sessionlock keyring]"
	k := newKeyring(t)
	for kind, places := range map[string]map[string]any{"pointer": around(k), "value": around(*k)} {
		for where, v := range places {
			for how, s := range printed(v) {
				seen(t, s, how+" of "+where+" of a "+kind)
			}
		}
	}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%t", "%c", "%U", "%e", "%20v"} {
		for _, v := range []any{k, *k, sessionlock.Keyring{}, &sessionlock.Keyring{}} {
			assert.Equal(t, word, fmt.Sprintf(verb, v), verb)
		}
	}
	for _, v := range []any{k, *k} {
		shown := printed(v)
		for _, how := range []string{"slog text", "slog json", "json", "xml", "template", "Sprint", "Sprintln", "Errorf"} {
			assert.Contains(t, shown[how], word, how)
		}
	}
	assert.Equal(t, word, k.String())
	assert.Equal(t, slog.StringValue(word), slog.AnyValue(k).Resolve(), "for handlers that print by themselves")
	written, err := json.Marshal(map[string]any{"k": k})
	require.NoError(t, err)
	assert.JSONEq(t, `{"k":"`+word+`"}`, string(written))

	var none *sessionlock.Keyring
	assert.Equal(t, "<nil>", fmt.Sprint(none))
	assert.NotPanics(t, func() { slog.New(slog.DiscardHandler).Info("msg", slog.Any("k", none)) })

	f := &told{}
	other, err := sessionlock.NewKeyring("other", sealingKey(7))
	require.NoError(t, err)
	assert.False(t, assert.Equal(f, k, other))
	assert.False(t, assert.Equal(f, struct{ k sessionlock.Keyring }{*k}, struct{ k sessionlock.Keyring }{*other}))
	seen(t, f.String(), "a failing assertion")
}
