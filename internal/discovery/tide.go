package discovery

import (
	"context"
	"io"
	"sync"
	"time"

	"go.uber.org/zap"
)

// tide tells the followers that have no query open when something has changed
// in the catalogue of a datacenter. Three queries, held open for all of them,
// tell it: they return when a node, an instance or a check changes. A filter
// that nothing matches keeps their answers empty.
//
// So 1,000 services cost Consul nothing while nothing changes, and one short
// query each when something does.
type tide struct {
	followers [3]*follower

	mu     sync.Mutex
	count  uint64
	turned chan struct{} // closed at the next turn
}

type tideKey struct {
	datacenter  string
	consistency Consistency
}

func newTide(a *agent, key tideKey, wait time.Duration) *tide {
	t := &tide{turned: make(chan struct{})}
	for i, q := range []struct{ path, filter string }{
		{"/v1/catalog/nodes", `Node == ""`},
		{"/v1/catalog/services", `ServiceName == ""`},
		{"/v1/health/state/any", `CheckID == ""`},
	} {
		question := newQuestion(q.path, key.datacenter, key.consistency, wait)
		question.params.Set("filter", q.filter)
		last := uint64(0)
		t.followers[i] = &follower{
			agent:    a,
			question: question,
			subject:  zap.String("signal", q.path),
			read:     discard, // the index says it all
			take: func(a *answer) error {
				if a.index != last {
					last = a.index
					t.turn()
				}
				return nil
			},
			disturbed: t.turn, // those who wait find out for themselves
		}
		t.followers[i].start()
	}
	return t
}

// end stops the tide.
func (t *tide) end() {
	for _, f := range t.followers {
		f.end()
	}
}

// turn wakes all that wait.
func (t *tide) turn() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.count++
	close(t.turned)
	t.turned = make(chan struct{})
}

// mark returns a mark of the present, to wait from.
func (t *tide) mark() uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.count
}

// wait returns once the tide has turned since mark, ctx ends or limit is over.
func (t *tide) wait(ctx context.Context, mark uint64, limit time.Duration) {
	t.mu.Lock()
	count, turned := t.count, t.turned
	t.mu.Unlock()
	if count != mark {
		return
	}
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-turned:
	case <-timer.C:
	case <-ctx.Done():
	}
}

// discard reads the body of an answer and keeps nothing of it.
func discard(body io.Reader) error {
	_, err := io.Copy(io.Discard, body)
	return err
}
