//go:build !linux

package main

// processes is what is asked of the kernel where it has a /proc.
type processes struct {
	live    []string
	zombies int
	reaped  string
}

// children: which processes live is not checked on this system.
func children() (p processes, known bool, err error) { return p, false, nil }
