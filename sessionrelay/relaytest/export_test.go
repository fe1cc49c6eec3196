package relaytest

import "testing"

// Broken runs s and returns the names of the cases that found fault, without failing t.
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

// Only returns s with no other case than name.
func Only(t *testing.T, s StoreTest, name string) error {
	t.Helper()
	for _, c := range s.checks() {
		if c.name == name {
			return s.try(t, c)
		}
	}
	t.Fatalf("no case %s", name)
	return nil
}

// Cases returns the names of the cases.
func Cases(s StoreTest) (names []string) {
	for _, c := range s.checks() {
		names = append(names, c.name)
	}
	return names
}
