package caddytest

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// TB is the part of testing.TB that this package uses, so that a program that
// is not a test can use the package too; see [Run].
type TB interface {
	Helper()
	Name() string
	Context() context.Context
	Logf(format string, args ...any)
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
	Failed() bool
	Cleanup(func())
	TempDir() string
}

// Run calls f as a test would be called, and reports whether it succeeded. What
// f logs, and then its errors, are printed only if it fails. An interrupt ends f's context, and with it
// every wait of this package, so that the cleanups run.
func Run(name string, f func(t TB)) (ok bool) {
	t := newStandalone(name)
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, os.Interrupt, syscall.SIGTERM)
	defer signal.Stop(interrupted)
	done := make(chan struct{})
	go func() {
		select {
		case <-interrupted:
			t.interrupt()
		case <-done:
		}
	}()

	ended := make(chan struct{})
	go func() { // a goroutine of its own, since Fatalf ends it
		defer close(ended)
		defer t.finish()
		f(t)
	}()
	<-ended
	close(done)
	return !t.Failed()
}

// Main runs the tests of a package and ends what they shared. Call it from
// TestMain. The tests don't see the CONSUL_* variables of who runs them.
func Main(m *testing.M) {
	for _, variable := range os.Environ() {
		if name, _, _ := strings.Cut(variable, "="); isForeignSetting(name) {
			os.Unsetenv(name)
		}
	}
	t := newStandalone("shared")
	shared.open(t)
	code := m.Run()
	t.finish()
	if code == 0 && t.Failed() {
		code = 1
	}
	os.Exit(code)
}

// isForeignSetting reports whether an environment variable would change what
// Consul or Caddy do.
func isForeignSetting(name string) bool {
	return strings.HasPrefix(name, "CONSUL_") && name != consulBinaryVar ||
		strings.HasPrefix(name, "CADDY_") && name != caddyBinaryVar && name != cacheVar
}

// standalone is a TB outside a test.
type standalone struct {
	name   string
	ctx    context.Context
	cancel context.CancelFunc

	mu          sync.Mutex
	log, errors bytes.Buffer
	failed      bool
	interrupted bool
	cleanups    []func()
}

func newStandalone(name string) *standalone {
	t := &standalone{name: name}
	t.ctx, t.cancel = context.WithCancel(context.Background())
	return t
}

// finish ends t: it runs the cleanups, latest first, and tells why t has failed
// if it has.
func (t *standalone) finish() {
	t.cancel()
	for {
		t.mu.Lock()
		if len(t.cleanups) == 0 {
			t.mu.Unlock()
			break
		}
		last := len(t.cleanups) - 1
		cleanup := t.cleanups[last]
		t.cleanups = slices.Delete(t.cleanups, last, last+1)
		t.mu.Unlock()
		cleanup()
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.interrupted:
		fmt.Fprintln(os.Stderr, "interrupted")
	case t.failed:
		_, _ = t.log.WriteTo(os.Stderr)
		_, _ = t.errors.WriteTo(os.Stderr)
	}
}

func (t *standalone) interrupt() {
	t.mu.Lock()
	t.interrupted, t.failed = true, true
	t.mu.Unlock()
	t.cancel()
}

func (t *standalone) Helper() {}

func (t *standalone) Name() string { return t.name }

func (t *standalone) Context() context.Context { return t.ctx }

func (t *standalone) Logf(format string, args ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	fmt.Fprintf(&t.log, format+"\n", args...)
}

func (t *standalone) Errorf(format string, args ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	fmt.Fprintf(&t.errors, format+"\n", args...)
	t.failed = true
}

func (t *standalone) Fatalf(format string, args ...any) {
	t.Errorf(format, args...)
	runtime.Goexit()
}

func (t *standalone) Failed() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.failed
}

func (t *standalone) Cleanup(f func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.cleanups = append(t.cleanups, f)
}

func (t *standalone) TempDir() string {
	dir, err := os.MkdirTemp("", "caddytest-")
	if err != nil {
		t.Fatalf("making a temporary directory: %v", err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// shortTempDir returns a temporary directory whose path is short enough for a
// Unix socket in it, which t.TempDir does not promise.
func shortTempDir(t TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ct-")
	if err != nil {
		t.Fatalf("making a temporary directory: %v", err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// shared holds what the tests of a package share. Main ends it.
var shared sharedThings

type sharedThings struct {
	t TB

	agentOnce sync.Once
	agent     *Agent

	binaryOnce sync.Once
	binary     string
	binaryErr  error
}

func (s *sharedThings) open(t TB) { s.t = t }

// owner returns the TB that outlives the tests of the package.
func (s *sharedThings) owner(t TB) TB {
	t.Helper()
	if program, ok := t.(*standalone); ok {
		return program
	}
	if s.t == nil {
		t.Fatalf("%s uses what the tests of its package share, and nothing would end it: "+
			"add func TestMain(m *testing.M) { caddytest.Main(m) } to the package", t.Name())
	}
	return s.t
}

var _ TB = testing.TB(nil)
