//go:build !race

package entry_test

// slower divides the bounds of explorations.
const slower = 1
