package caddytest

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
)

// HandedSocket is a listening TCP socket that outlives the servers it is handed
// to, as systemd's socket units do: connections that come while none of them
// runs wait in its queue.
type HandedSocket struct {
	t       TB
	address string
	file    *os.File
}

// OpenHandedSocket opens a socket on loopback. It is closed with the test.
func OpenHandedSocket(t TB) *HandedSocket {
	t.Helper()
	listener, err := net.Listen("tcp", FreeAddress(t))
	if err != nil {
		t.Fatalf("opening a socket to hand over: %v", err)
	}
	defer listener.Close() // the file is a socket of its own
	file, err := listener.(*net.TCPListener).File()
	if err != nil {
		t.Fatalf("opening a socket to hand over: %v", err)
	}
	t.Cleanup(func() { _ = file.Close() })
	return &HandedSocket{t: t, address: listener.Addr().String(), file: file}
}

// Address returns where the socket listens.
func (s *HandedSocket) Address() string { return s.address }

// StartCaddyBinary is the function of that name, with the socket handed over as
// file descriptor 3: a Caddyfile serves it with `bind fd/3`.
func (s *HandedSocket) StartCaddyBinary(caddyfile string, options ...CaddyOption) *Caddy {
	s.t.Helper()
	c := newCaddy(s.t, options)
	file := filepath.Join(s.t.TempDir(), "Caddyfile")
	if err := os.WriteFile(file, []byte(caddyfile), 0o600); err != nil {
		s.t.Fatalf("writing a Caddyfile: %v", err)
	}
	cmd := exec.Command(CaddyBinary(s.t), "run", "--config", file, "--adapter", "caddyfile")
	cmd.Env = cleanEnvironment(append(homeIn(c.home), "CADDY_ADMIN="+c.adminAddress())...)
	cmd.ExtraFiles = []*os.File{s.file}
	var err error
	if c.process, err = startProcess("Caddy", cmd, c.logs); err != nil {
		s.t.Fatalf("%v", err)
	}
	c.stop = c.process.stop
	c.cleanUp()
	return c
}
