package exampletest_test

import (
	"regexp"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/internal/exampletest"
)

// This package has one example, of one of its names.
func TestNamesWithoutAnExampleAreMissing(t *testing.T) {
	names, err := exampletest.Missing(regexp.MustCompile(`^$`))
	require.NoError(t, err)
	assert.Equal(t, []string{"ReachAll"}, names)
	names, err = exampletest.Missing(regexp.MustCompile(`^Reach`))
	require.NoError(t, err)
	assert.Empty(t, names)
}

func ExampleMissing() {
	_, _ = exampletest.Missing(regexp.MustCompile(`^(String|Error|Unwrap)$`))
	// Output:
}
