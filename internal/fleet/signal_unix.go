//go:build unix

package fleet

import (
	"errors"
	"os"
	"syscall"
	"time"
)

var sigstop, sigcont os.Signal = syscall.SIGSTOP, syscall.SIGCONT

// ownGroup keeps a stopped worker from outliving a test binary that dies without
// its cleanups, at a timeout for instance: a process group that loses its parent
// while a member is stopped is ended by the kernel (SIGHUP). Workers that run
// see the end of their input.
var ownGroup = &syscall.SysProcAttr{Setpgid: true}

// awaitStop returns when every thread of a child has stopped, as a signal only
// asks for that. It consumes the news of a stop, so it is for one stop each.
func awaitStop(pid int) error {
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		var status syscall.WaitStatus
		got, err := syscall.Wait4(pid, &status, syscall.WUNTRACED|syscall.WNOHANG, nil)
		if err != nil && !errors.Is(err, syscall.EINTR) {
			return err
		}
		if got == pid {
			return nil // stopped, or dead
		}
	}
	return errors.New("process does not stop")
}
