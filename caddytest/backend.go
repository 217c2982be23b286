package caddytest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// backendHeader is the response header in which a backend tells its name.
const backendHeader = "Backend"

// Backend is a real HTTP server on loopback that answers every request with its
// own name.
type Backend struct {
	t       TB
	name    string
	network string // "tcp" or "unix"
	address string

	mu     sync.Mutex
	server *http.Server // nil while it is down

	requests atomic.Int64
	status   atomic.Int64
	delay    atomic.Int64 // time.Duration
}

// BackendOption is an option of StartBackend.
type BackendOption func(TB, *Backend)

// Named names the backend. The default is the last part of its address.
func Named(name string) BackendOption { return func(_ TB, b *Backend) { b.name = name } }

// OnIPv6 makes the backend listen on [::1] instead of 127.0.0.1.
func OnIPv6() BackendOption {
	return func(t TB, b *Backend) { b.address = fmt.Sprintf("[::1]:%d", FreePort(t)) }
}

// At makes the backend listen at a host and port of the caller's choice.
func At(address string) BackendOption { return func(_ TB, b *Backend) { b.address = address } }

// OnSocket makes the backend listen on a Unix socket.
func OnSocket() BackendOption {
	return func(t TB, b *Backend) {
		b.network, b.address = "unix", FreeSocket(t)
	}
}

// StartBackend starts a backend. It ends with the test.
func StartBackend(t TB, options ...BackendOption) *Backend {
	t.Helper()
	b := &Backend{t: t, network: "tcp"}
	b.status.Store(http.StatusOK)
	for _, option := range options {
		option(t, b)
	}
	if b.address == "" {
		b.address = FreeAddress(t)
	}
	if b.name == "" {
		b.name = "backend-" + strconv.Itoa(b.Port())
	}
	b.Start()
	t.Cleanup(b.Kill)
	return b
}

// Name returns the name that the backend answers with.
func (b *Backend) Name() string { return b.name }

// Address returns where the backend listens: host and port, or the path of a
// Unix socket.
func (b *Backend) Address() string { return b.address }

// Port returns the port that the backend listens on, 0 on a Unix socket.
func (b *Backend) Port() int {
	_, port, err := net.SplitHostPort(b.address)
	if err != nil {
		return 0
	}
	number, _ := strconv.Atoi(port)
	return number
}

// Service returns the backend as an instance of a service, with the backend's
// name as its ID, for Agent.Register.
func (b *Backend) Service(name string) Service {
	if b.network == "unix" {
		return Service{Name: name, ID: b.name, Socket: b.address}
	}
	host, _, _ := net.SplitHostPort(b.address)
	return Service{Name: name, ID: b.name, Address: host, Port: b.Port()}
}

// Requests returns how many requests the backend has begun to answer.
func (b *Backend) Requests() int { return int(b.requests.Load()) }

// SetStatus makes the backend answer with a status code, from now on.
func (b *Backend) SetStatus(code int) { b.status.Store(int64(code)) }

// SetDelay makes the backend wait before each answer, from now on.
func (b *Backend) SetDelay(d time.Duration) { b.delay.Store(int64(d)) }

// Start makes a backend that is down listen again, on the same address.
func (b *Backend) Start() {
	b.t.Helper()
	listener, err := net.Listen(b.network, b.address)
	if err != nil {
		b.t.Fatalf("starting backend %s: %v", b.name, err)
	}
	server := &http.Server{Handler: http.HandlerFunc(b.answer)}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.server = server
	go func() {
		if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			b.t.Errorf("backend %s stopped serving: %v", b.name, err)
		}
	}()
}

func (b *Backend) answer(w http.ResponseWriter, r *http.Request) {
	b.requests.Add(1)
	if delay := time.Duration(b.delay.Load()); delay > 0 {
		timer := time.NewTimer(delay)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-r.Context().Done():
			return
		}
	}
	w.Header().Set(backendHeader, b.name)
	w.WriteHeader(int(b.status.Load()))
	fmt.Fprintln(w, b.name)
}

// Stop ends the backend as a well-behaved service does: it takes no new
// connections and finishes the requests it has.
func (b *Backend) Stop() {
	b.t.Helper()
	server := b.takeServer()
	if server == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	if err := server.Shutdown(ctx); err != nil {
		b.t.Errorf("backend %s had requests open %v after it was stopped: %v", b.name, Patience, err)
	}
}

// Kill ends the backend at once: its connections break.
func (b *Backend) Kill() {
	if server := b.takeServer(); server != nil {
		_ = server.Close()
	}
}

func (b *Backend) takeServer() *http.Server {
	b.mu.Lock()
	defer b.mu.Unlock()
	server := b.server
	b.server = nil
	return server
}
