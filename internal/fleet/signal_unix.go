//go:build unix

package fleet

import (
	"os"
	"syscall"
)

var sigstop, sigcont os.Signal = syscall.SIGSTOP, syscall.SIGCONT

// ownGroup keeps a stopped worker from outliving a test binary that dies without
// its cleanups, at a timeout for instance: a process group that loses its parent
// while a member is stopped is ended by the kernel (SIGHUP). Workers that run
// see the end of their input.
var ownGroup = &syscall.SysProcAttr{Setpgid: true}
