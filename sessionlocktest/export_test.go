package sessionlocktest

import "testing"

// Broken runs a suite and returns the names of the cases that found fault,
// without failing t.
func Broken(t *testing.T, suite interface{ checks() []check }) (names []string) {
	t.Helper()
	var in bubble
	switch s := suite.(type) {
	case CacheTest:
		in = s.In
	case LockerTest:
		in = s.In
	}
	in.each(t, suite.checks(), func(t *testing.T, c check, err error) {
		if err != nil {
			t.Logf("%v\nrule: %s", err, c.rule)
			names = append(names, c.name)
		}
	})
	return names
}

// Cases returns the names of a suite's cases.
func Cases(suite interface{ checks() []check }) (names []string) {
	for _, c := range suite.checks() {
		names = append(names, c.name)
	}
	return names
}
