package guardtest_test

import (
	"testing"

	"github.com/sessionlock/sessionlock/sessionguard"
	"github.com/sessionlock/sessionlock/sessionguard/guardtest"
)

// myStore stands for a store of your own.
type myStore struct{ *sessionguard.MemoryStore }

func newMyStore() myStore { return myStore{new(sessionguard.MemoryStore)} }

// In a test of your own: every rule that a monitor relies on is a subtest.
func ExampleStoreTest() {
	_ = func(t *testing.T) { // func TestMyStore(t *testing.T)
		guardtest.StoreTest{
			New: func(*testing.T) sessionguard.Store { return newMyStore() },
		}.Run(t)
	}
}
