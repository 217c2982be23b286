package discovery

import (
	"context"
	"math/rand/v2"
	"time"
)

const (
	backoffBase = 100 * time.Millisecond
	backoffCap  = 30 * time.Second

	// refusedCap is the cap where nobody listens: to ask costs neither side
	// anything, and an agent that is restarted is soon back.
	refusedCap = 5 * time.Second
)

// backoff spaces out attempts that fail: exponentially longer, with full
// jitter, so that a fleet that lost its Consul at one instant doesn't come back
// at one instant. See "Exponential Backoff And Jitter" in the AWS Architecture
// Blog.
type backoff struct {
	failures int
}

// ceiling is the longest that the pause after a failure of a kind may take.
func (b *backoff) ceiling(kind errorKind) time.Duration {
	longest := backoffCap
	if kind == kindRefused {
		longest = refusedCap
	}
	if b.failures >= 9 { // 100 ms × 2⁹ > 30 s
		return longest
	}
	return min(backoffBase<<b.failures, longest)
}

// next counts a failure of a kind and returns how long to pause after it.
func (b *backoff) next(kind errorKind) time.Duration {
	ceiling := b.ceiling(kind)
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
