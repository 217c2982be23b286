//go:build unix && !linux

package caddytest

import "syscall"

// processAttributes gives a child a process group of its own.
func processAttributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true}
}
