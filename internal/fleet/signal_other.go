//go:build !unix

package fleet

import (
	"os"
	"syscall"
)

var (
	sigstop, sigcont os.Signal
	ownGroup         *syscall.SysProcAttr
)

func awaitStop(int) error { return nil }
