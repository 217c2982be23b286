package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strconv"

	"github.com/caddy-consul/caddy-consul/caddytest"
)

// maxInstances is how many distinct loopback addresses there are to listen on.
const maxInstances = 200 * 250

// backendProcesses is how many processes a backend is. Each may hold a limited
// number of connections open.
const backendProcesses = 4

// backend answers each request with one line, in processes of its own and on
// every loopback address at once: thousands of instances to the proxy, which
// dials each by an address of its own.
type backend struct {
	port int
}

// startBackend starts a backend. It ends with t, and with this process.
func startBackend(t caddytest.TB) *backend {
	t.Helper()
	b := &backend{port: caddytest.FreePort(t)}
	listener, err := net.Listen("tcp", net.JoinHostPort("", strconv.Itoa(b.port)))
	if err != nil {
		t.Fatalf("starting the backend: %v", err)
	}
	defer listener.Close()
	socket, err := listener.(*net.TCPListener).File()
	if err != nil {
		t.Fatalf("starting the backend: %v", err)
	}
	defer socket.Close()
	for range backendProcesses {
		startBackendProcess(t, socket)
	}
	return b
}

func startBackendProcess(t caddytest.TB, socket *os.File) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatalf("finding the program to run as a backend: %v", err)
	}
	cmd := exec.Command(self, "-backend")
	cmd.ExtraFiles = []*os.File{socket}
	cmd.Stderr = os.Stderr
	life, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatalf("starting the backend: %v", err)
	}
	t.Cleanup(func() {
		_ = life.Close()
		_ = cmd.Wait()
	})
}

// ip returns the loopback address of instance i.
func (b *backend) ip(i int) string { return fmt.Sprintf("127.%d.%d.1", 1+i/250, 1+i%250) }

// address returns the dial address of instance i.
func (b *backend) address(i int) string { return net.JoinHostPort(b.ip(i), strconv.Itoa(b.port)) }

const reply = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 3\r\n\r\nok\n"

// serveBackend is a process of the backend. It listens on the first file that
// it was given, ends with its standard input, and does as little as it can, for
// what it costs is not the proxy's.
func serveBackend() error {
	listener, err := net.FileListener(os.NewFile(3, "listener"))
	if err != nil {
		return err
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin) // until the parent has gone
		_ = listener.Close()
	}()
	for {
		connection, err := listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return err
		}
		go answer(connection)
	}
}

func answer(connection net.Conn) {
	defer connection.Close()
	if !connection.RemoteAddr().(*net.TCPAddr).IP.IsLoopback() {
		return
	}
	reader := bufio.NewReader(connection)
	for {
		request, err := http.ReadRequest(reader)
		if err != nil {
			return
		}
		_, _ = io.Copy(io.Discard, request.Body)
		if _, err := io.WriteString(connection, reply); err != nil {
			return
		}
	}
}
