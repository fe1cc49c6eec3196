package keyname_test

import (
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/internal/keyname"
)

// awkward are keys that break out of a name, or are mixed up, where keys are
// put into names as they are.
var awkward = []string{
	"k", "K", " k", "k ", "k\x00", "\x00", "\xff", "\r\n", "{}", "{a}b", "a}b{c", ":", "a:b", "*?[", "../", "%", "e", ":e",
	"Zoë", "Zoe\u0308", "\u202eabc", "😀", strings.Repeat("x", 256), strings.Repeat("x", 255),
}

var (
	secret = []byte("0123456789abcdef")
	namer  = keyname.Namer{Secret: secret, Namespace: "prod", Upstream: "https://api.acme.test"}
	shape  = regexp.MustCompile(`^sl:\{[A-Za-z0-9_-]{24}\}:(l|e|e:[A-Za-z0-9_-]{24})$`)
)

// tagOf is the part that Redis Cluster hashes.
func tagOf(t testing.TB, name string) string {
	t.Helper()
	_, rest, ok := strings.Cut(name, "{")
	require.True(t, ok)
	tag, _, ok := strings.Cut(rest, "}")
	require.True(t, ok)
	return tag
}

func TestNameHasOneShapeWhateverTheKey(t *testing.T) {
	for _, key := range awkward {
		for _, name := range []string{namer.Entry(key, ""), namer.Entry(key, key), namer.Lock("", key), namer.Lock(key, key)} {
			assert.Regexp(t, shape, name)
			assert.LessOrEqual(t, len(name), 128)
			assert.Equal(t, 1, strings.Count(name, "{"), "one hash tag")
		}
	}
}

// A name is seen by whoever lists keys, reads a slow log or a metric.
func TestNameNeverContainsTheKey(t *testing.T) {
	for _, key := range []string{"alice@example.com", "4711-0815", strings.Repeat("p", 32)} {
		for _, name := range []string{namer.Entry(key, ""), namer.Entry("k", key), namer.Lock("", key), namer.Lock(key, "k")} {
			assert.NotContains(t, name, key)
		}
	}
}

func TestDifferentKeysHaveDifferentNames(t *testing.T) {
	seen := map[string]string{}
	for _, key := range awkward {
		for _, name := range []string{namer.Entry(key, ""), namer.Entry(key, "f"), namer.Entry("k", "f"+key), namer.Lock("", key)} {
			other, twice := seen[name]
			assert.Falsef(t, twice, "%q and %q", key, other)
			seen[name] = key
		}
	}
}

func TestAllNamesOfAKeyShareItsSlot(t *testing.T) {
	for _, key := range awkward {
		tag := namer.Tag(key)
		assert.Equal(t, tag, tagOf(t, namer.Entry(key, "")))
		assert.Equal(t, tag, tagOf(t, namer.Entry(key, "v2")), "the fingerprint stands behind the tag")
		assert.Equal(t, tag, tagOf(t, namer.Lock("", key)))
	}
}

func TestTagDependsOnEveryPart(t *testing.T) {
	tags := map[string]string{}
	for name, n := range map[string]keyname.Namer{
		"itself":            namer,
		"another secret":    {Secret: []byte("0123456789abcdeg"), Namespace: namer.Namespace, Upstream: namer.Upstream},
		"no secret":         {Namespace: namer.Namespace, Upstream: namer.Upstream},
		"another namespace": {Secret: secret, Namespace: "staging", Upstream: namer.Upstream},
		"no namespace":      {Secret: secret, Upstream: namer.Upstream},
		"another upstream":  {Secret: secret, Namespace: namer.Namespace, Upstream: "https://api.acme.test/"},
		"a moved letter":    {Secret: secret, Namespace: "prodh", Upstream: namer.Upstream[1:]},
	} {
		tag := n.Tag("bob")
		other, twice := tags[tag]
		assert.Falsef(t, twice, "%s and %s", name, other)
		tags[tag] = name
	}
}

// Names are what a fleet shares: a release that changed them would log every key
// in again. This one was computed by another implementation of the HMAC.
func TestNamesStayTheSame(t *testing.T) {
	assert.Equal(t, "sl:{CXg2Jx2OJooA5w18i-1zSaXQ}:e", namer.Entry("bob", ""))
}

// Clients of two upstreams with one scope share locks, and keep entries of
// their own.
func TestScopeTakesTheUpstreamsPlaceInLocksOnly(t *testing.T) {
	rx := keyname.Namer{Secret: secret, Namespace: "prod", Upstream: "rx"}
	sm := keyname.Namer{Secret: secret, Namespace: "prod", Upstream: "sm"}
	staging := keyname.Namer{Secret: secret, Namespace: "staging", Upstream: "rx"}
	assert.Equal(t, rx.Lock("mhv", "bob"), sm.Lock("mhv", "bob"))
	assert.NotEqual(t, rx.Lock("", "bob"), sm.Lock("", "bob"))
	assert.NotEqual(t, rx.Entry("bob", ""), sm.Entry("bob", ""))
	assert.NotEqual(t, rx.Lock("mhv", "bob"), rx.Lock("mhv", "eve"))
	assert.NotEqual(t, rx.Lock("mhv", "bob"), rx.Lock("other", "bob"))
	assert.NotEqual(t, rx.Lock("mhv", "bob"), staging.Lock("mhv", "bob"), "a scope does not reach across namespaces")
	assert.Equal(t, rx.Lock("", "bob"), sm.Lock("rx", "bob"), "the default scope is the upstream")
}

// Without a secret names are uniform all the same; they can be guessed by
// whoever guesses the key, which WithKeySecret says.
func TestNoSecretIsAFixedOne(t *testing.T) {
	a, b := keyname.Namer{Upstream: "up"}, keyname.Namer{Secret: []byte{}, Upstream: "up"}
	assert.Equal(t, a.Tag("bob"), b.Tag("bob"))
}

func TestLockAndEntryNeverCollide(t *testing.T) {
	for _, key := range awkward {
		for _, print := range []string{"", "l", key} {
			assert.NotEqual(t, namer.Lock("", key), namer.Entry(key, print))
		}
	}
}

// FuzzTag: different tuples have different tags, and every name one shape.
func FuzzTag(f *testing.F) {
	f.Add([]byte("s"), "n", "u", "k", "n2", "u2", "k2")
	f.Add([]byte(nil), "", "ab", "c", "", "a", "bc")
	f.Add([]byte("s"), "a", "", "", "", "a", "")
	f.Add([]byte("s"), "", "u", "\xff}{", "", "u", "\xfe}{")
	f.Fuzz(func(t *testing.T, secret []byte, n1, u1, k1, n2, u2, k2 string) {
		a := keyname.Namer{Secret: secret, Namespace: n1, Upstream: u1}
		b := keyname.Namer{Secret: secret, Namespace: n2, Upstream: u2}
		same := n1 == n2 && u1 == u2 && k1 == k2
		require.Equalf(t, same, a.Tag(k1) == b.Tag(k2), "%q %q", []string{n1, u1, k1}, []string{n2, u2, k2})
		require.Equal(t, same, a.Entry(k1, "") == b.Entry(k2, ""))
		for _, name := range []string{a.Entry(k1, k2), a.Lock(u2, k1)} {
			require.Regexp(t, shape, name)
		}
		require.Equal(t, k1 == k2, a.Entry("k", "f"+k1) == a.Entry("k", "f"+k2))
	})
}
