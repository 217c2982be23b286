package caddytest

import (
	"context"
	"fmt"
	"time"
)

// Patience is how long this package waits for what should take milliseconds,
// before it fails the test. It is long, since a busy machine must not fail it.
const Patience = 30 * time.Second

// tick is the pause between two looks at a thing that can't notify.
const tick = 2 * time.Millisecond

// Eventually waits until check returns nil, and fails the test with check's
// last error if that takes longer than within.
func Eventually(t TB, within time.Duration, check func() error) {
	t.Helper()
	if err := poll(t.Context(), within, check); err != nil {
		t.Fatalf("%v", err)
	}
}

func poll(ctx context.Context, within time.Duration, check func() error) error {
	deadline := time.NewTimer(within)
	defer deadline.Stop()
	ticker := time.NewTicker(tick)
	defer ticker.Stop()
	for {
		err := check()
		if err == nil {
			return nil
		}
		select {
		case <-ticker.C:
		case <-deadline.C:
			return fmt.Errorf("still so after %v: %w", within, err)
		case <-ctx.Done():
			return fmt.Errorf("interrupted while waiting: %w", err)
		}
	}
}

// Pause lets d pass, for what is an amount of time by its nature: a measured
// period of traffic, never a wait for something to happen.
func Pause(t TB, d time.Duration) {
	t.Helper()
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-t.Context().Done():
		t.Fatalf("interrupted")
	}
}
