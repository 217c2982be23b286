package discovery

import (
	"context"
	"math/rand/v2"
	"time"
)

const (
	backoffBase = 100 * time.Millisecond
	backoffCap  = 30 * time.Second
)

// backoff spaces out attempts that fail: exponentially longer, with full
// jitter, so that a fleet that lost its Consul at one instant doesn't come back
// at one instant. See "Exponential Backoff And Jitter" in the AWS Architecture
// Blog.
type backoff struct {
	failures int
}

// ceiling is the longest that the next pause may take.
func (b *backoff) ceiling() time.Duration {
	if b.failures >= 9 { // 100 ms × 2⁹ > 30 s
		return backoffCap
	}
	return backoffBase << b.failures
}

// next counts a failure and returns how long to pause after it.
func (b *backoff) next() time.Duration {
	ceiling := b.ceiling()
	b.failures++
	return rand.N(ceiling) + time.Millisecond
}

// reset forgets the failures, after a success.
func (b *backoff) reset() { b.failures = 0 }

// pause waits for d, or until ctx ends.
func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}
