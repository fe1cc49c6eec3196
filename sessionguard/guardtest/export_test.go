package guardtest

import "testing"

// Broken runs a suite and returns the names of the cases that found fault, without
// failing t.
func Broken(t *testing.T, s StoreTest) (names []string) {
	t.Helper()
	s.each(t, func(t *testing.T, c check, err error) {
		if err != nil {
			t.Logf("%v\nrule: %s", err, c.rule)
			names = append(names, c.name)
		}
	})
	return names
}

// Cases returns the names of a suite's cases.
func Cases(s StoreTest) (names []string) {
	for _, c := range s.checks() {
		names = append(names, c.name)
	}
	return names
}
