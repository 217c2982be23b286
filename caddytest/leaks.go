package caddytest

import (
	"context"

	"go.uber.org/goleak"
)

// Goroutines remembers which goroutines there were.
type Goroutines struct{ options []goleak.Option }

// SnapshotGoroutines remembers the goroutines that there are now.
func SnapshotGoroutines() *Goroutines {
	return &Goroutines{options: []goleak.Option{
		goleak.IgnoreCurrent(),
		// certmagic's, which notices within 5 seconds that its lock is released
		goleak.IgnoreAnyFunction("github.com/caddyserver/certmagic.keepLockfileFresh"),
		// Caddy's, one in each process, since the first dynamic upstream
		goleak.IgnoreAnyFunction("github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy.(*Upstream).fillDynamicHost.func1.1"),
		// one for each child process of this package, until the process ends
		goleak.IgnoreAnyFunction("github.com/caddy-consul/caddy-consul/caddytest.startProcess.func1"),
		goleak.IgnoreAnyFunction("os/exec.(*Cmd).Start.func2"),
	}}
}

// Check fails the test if there are goroutines that the snapshot has not, and
// that don't end within Patience.
func (g *Goroutines) Check(t TB) {
	t.Helper()
	// not t.Context(), which has ended when cleanups run
	if err := poll(context.Background(), Patience, func() error { return goleak.Find(g.options...) }); err != nil {
		t.Errorf("%v", err)
	}
}

// NoLeaks fails the test if it leaves goroutines behind. Call it first in a
// test, and it looks last, after all cleanups.
func NoLeaks(t TB) {
	t.Helper()
	before := SnapshotGoroutines()
	t.Cleanup(func() {
		t.Helper()
		before.Check(t)
	})
}
