package discovery

import (
	"context"
	"time"

	"golang.org/x/time/rate"
)

const (
	// paceMin lets a small service follow each change of its own at once and
	// still bounds what a flood of them, or a Consul that answers without
	// blocking, can cost.
	paceMin = 25 * time.Millisecond

	// sweepPace is the least time between the queries of a follower that has
	// none open. With 1,000 of them in a busy catalogue that's what the agent
	// has to bear.
	sweepPace = time.Second

	// paceMax keeps the last of a flood of changes from waiting for long.
	paceMax = 1500 * time.Millisecond

	// paceShare is the inverse of the share of one core that answers may cost
	// while they come in without a break, the agent's work and ours together.
	paceShare = 10

	// costPerByte is what an answer costs, which is next to nothing here and the
	// agent 210 ms for 13.5 MB. It does it before it sends the first byte, so
	// its time can't be told from the time that the query blocks.
	costPerByte = 15 * time.Nanosecond
)

// pacer holds back the next query while answers come in faster than they are
// worth reading. It is a token bucket of two: a change, and the next one hard
// on its heels, are followed at once. What is missed meanwhile is in the next
// answer, for a blocking query returns the newest state.
type pacer struct {
	limiter *rate.Limiter
	least   time.Duration
}

func newPacer() *pacer {
	return &pacer{rate.NewLimiter(rate.Every(paceMin), 2), paceMin}
}

// sweeps slows the pace down to that of a query which is one of very many.
func (p *pacer) sweeps() {
	p.least = sweepPace
	p.limiter.SetBurst(1)
}

// answered says what the last answer cost.
func (p *pacer) answered(cost time.Duration) {
	p.limiter.SetLimit(rate.Every(min(max(paceShare*cost, p.least), paceMax)))
}

// wait returns when the next query may be sent, or ctx ends.
func (p *pacer) wait(ctx context.Context) {
	_ = p.limiter.Wait(ctx) // it fails when ctx ends, which the caller sees for itself
}
