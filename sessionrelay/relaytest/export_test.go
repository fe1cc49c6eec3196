package relaytest

import (
	"testing"

	"github.com/sessionlock/sessionlock/internal/suite"
)

// Broken runs s and returns the names of the cases that found fault, without failing t.
func Broken(t *testing.T, s StoreTest) (names []string) {
	t.Helper()
	return suite.Broken(t, s.In, s.cases())
}

// Only runs the case name of s.
func Only(t *testing.T, s StoreTest, name string) error {
	t.Helper()
	for _, c := range s.cases() {
		if c.Name == name {
			return c.Run(t)
		}
	}
	t.Fatalf("no case %s", name)
	return nil
}

// Cases returns the names of the cases.
func Cases(s StoreTest) (names []string) { return suite.Names(s.cases()) }
