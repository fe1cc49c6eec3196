package sessionlocktest

import (
	"testing"

	"github.com/sessionlock/sessionlock/internal/suite"
)

// Broken runs a suite and returns the names of the cases that found fault,
// without failing t.
func Broken(t *testing.T, s interface{ cases() []suite.Case }) (names []string) {
	t.Helper()
	var in suite.In
	switch s := s.(type) {
	case CacheTest:
		in = s.In
	case LockerTest:
		in = s.In
	}
	return suite.Broken(t, in, s.cases())
}

// Cases returns the names of a suite's cases.
func Cases(s interface{ cases() []suite.Case }) (names []string) { return suite.Names(s.cases()) }
