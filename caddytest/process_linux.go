package caddytest

import "syscall"

// processAttributes gives a child a process group of its own and ends it with
// this process.
func processAttributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}
