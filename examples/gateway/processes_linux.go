package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// processes is what the kernel knows of the children of this process.
type processes struct {
	live    []string // their ids, in order
	zombies int      // ended, and nobody has asked how
	reaped  string   // page faults of all that have ended: it moves with each of them
}

// children asks the kernel; known is false where that cannot be done.
func children() (p processes, known bool, err error) {
	self := strconv.Itoa(os.Getpid())
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return p, true, err
	}
	for _, path := range stats {
		b, err := os.ReadFile(path) //nolint:gosec // of the kernel
		if err != nil {
			continue // it has just ended
		}
		// pid (name) state ppid …; a name may hold anything, parentheses too.
		name := strings.LastIndexByte(string(b), ')')
		fields := strings.Fields(string(b[name+1:]))
		if len(fields) < 9 {
			return p, true, fmt.Errorf("%s has %d fields", path, len(fields))
		}
		pid := filepath.Base(filepath.Dir(path))
		switch {
		case pid == self:
			p.reaped = fields[8] // cminflt
		case fields[1] != self:
		case fields[0] == "Z" || fields[0] == "X":
			p.zombies++
		default:
			p.live = append(p.live, pid)
		}
	}
	slices.Sort(p.live)
	return p, true, nil
}
