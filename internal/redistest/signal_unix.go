//go:build unix

package redistest

import (
	"os"
	"syscall"
)

var sigstop, sigcont os.Signal = syscall.SIGSTOP, syscall.SIGCONT
