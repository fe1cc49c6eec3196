package redistest_test

import (
	"crypto/tls"
	"crypto/x509"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/internal/redistest"
)

// answers waits until rdb takes a value.
func answers(t *testing.T, rdb redis.UniversalClient, key string) {
	t.Helper()
	require.Eventually(t, func() bool {
		return rdb.Eval(t.Context(), "return redis.call('SET', KEYS[1], 'v')", []string{key}).Err() == nil
	}, 30*time.Second, 10*time.Millisecond)
}

func TestSentinelReplacesADeadMaster(t *testing.T) {
	t.Parallel()
	s := redistest.StartSentinel(t)
	rdb := s.Client()
	first := s.Master()
	answers(t, rdb, "sl:k")
	first.Stop()
	begin := time.Now()
	answers(t, rdb, "sl:k")
	t.Logf("back after %v", time.Since(begin))
	// The one sentinel that is asked may hear of it from the others.
	require.Eventually(t, func() bool { return s.Master().Addr() != first.Addr() }, 10*time.Second, 10*time.Millisecond)
}

func TestClusterReplacesADeadMaster(t *testing.T) {
	t.Parallel()
	c := redistest.StartCluster(t)
	const key = "sl:{k}"
	answers(t, c.Client(), key)
	first := c.Owner(key)
	first.Stop()
	begin := time.Now()
	// Clients that do not ask again are behind for a minute; a new one asks.
	require.Eventually(t, func() bool { return c.Owner(key).Addr() != first.Addr() }, 30*time.Second, 10*time.Millisecond)
	answers(t, c.Client(), key)
	t.Logf("back after %v", time.Since(begin))
}

func TestTLSServerRefusesPlainAndStrangers(t *testing.T) {
	s := redistest.StartTLS(t)
	require.NoError(t, ping(t.Context(), s.Client()))
	require.Error(t, ping(t.Context(), s.Client(impatient, func(o *redis.Options) { o.TLSConfig = nil })))

	err := ping(t.Context(), s.Client(impatient, func(o *redis.Options) { o.TLSConfig = &tls.Config{MinVersion: tls.VersionTLS12} }))
	require.ErrorAs(t, err, new(x509.UnknownAuthorityError))

	s.Restart()
	require.NoError(t, ping(t.Context(), s.Client()))
}

func TestACLUserMayNothingElse(t *testing.T) {
	s := redistest.StartACL(t)
	ctx, rdb := t.Context(), s.Client()
	require.NoError(t, rdb.Set(ctx, "sl:k", "v", 0).Err())
	require.NoError(t, rdb.Publish(ctx, "sl:k", "").Err())
	for name, err := range map[string]error{
		"another key":                   rdb.Set(ctx, "k", "v", 0).Err(),
		"another key, in a script":      rdb.Eval(ctx, "return redis.call('SET', 'k', 'v')", nil).Err(),
		"another channel":               rdb.Publish(ctx, "k", "").Err(),
		"another command":               rdb.Keys(ctx, "*").Err(),
		"another command, in a script":  rdb.Eval(ctx, "return redis.call('FLUSHALL')", nil).Err(),
		"the configuration of a server": rdb.ConfigGet(ctx, "*").Err(),
		"rights":                        rdb.Do(ctx, "ACL", "WHOAMI").Err(),
	} {
		if assert.Error(t, err, name) {
			assert.Regexp(t, "permission|can't (access|run)", err.Error(), name)
		}
	}
	require.NoError(t, s.Admin().FlushAll(ctx).Err())
}

// The one code block that makes a user.
func TestDocumentedRuleIsTheLeast(t *testing.T) {
	doc, err := os.ReadFile("../../docs/promises.md")
	require.NoError(t, err)
	_, rest, found := strings.Cut(string(doc), "```\nACL SETUSER ")
	require.True(t, found)
	rule, _, _ := strings.Cut(rest, "```")
	want := redistest.Rule(redistest.User, redistest.Commands(t)...)
	got := slices.Concat([]string{"ACL", "SETUSER"}, strings.Fields(rule))
	assert.Equal(t, want, got, "docs/promises.md should say:\n%s", strings.Join(want, " "))
}
