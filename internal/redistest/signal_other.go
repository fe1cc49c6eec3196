//go:build !unix

package redistest

import "os"

var sigstop, sigcont os.Signal
