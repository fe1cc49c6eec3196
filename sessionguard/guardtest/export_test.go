package guardtest

import (
	"testing"

	"github.com/sessionlock/sessionlock/internal/suite"
)

// Broken runs a suite and returns the names of the cases that found fault, without
// failing t.
func Broken(t *testing.T, s StoreTest) (names []string) {
	t.Helper()
	return suite.Broken(t, s.In, s.cases())
}

// Cases returns the names of a suite's cases.
func Cases(s StoreTest) (names []string) { return suite.Names(s.cases()) }
