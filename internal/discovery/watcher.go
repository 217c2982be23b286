package discovery

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-consul/caddy-consul/internal/endpoint"
)

// watcher follows one query and publishes a Set whenever the answer differs. It
// outlives the config that started it, so it keeps nothing of a config but the
// loggers of those that hold it now.
type watcher struct {
	query   Query
	agent   *agent
	release func() // gives the agent back
	origin  *endpoint.Origin
	started time.Time

	// written by the watcher's goroutine, read by any
	set     atomic.Pointer[endpoint.Set]
	failing atomic.Pointer[failure]
	first   chan struct{} // closed with the first Set

	// the goroutine's own
	endpoints []endpoint.Endpoint
	index     uint64
	pacer     *pacer
	backoff   backoff
	refused   int

	mu      sync.Mutex
	loggers []*subscriberLog // of the subscriptions, the newest last

	stop context.CancelFunc
	done chan struct{}
}

// failure is a time in which Consul gives no usable answer.
type failure struct {
	since time.Time
	err   error
}

type subscriberLog struct{ logger *zap.Logger }

func newWatcher(query Query, agent *agent, release func()) *watcher {
	ctx, stop := context.WithCancel(context.Background())
	w := &watcher{
		query:   query,
		agent:   agent,
		release: release,
		origin:  &endpoint.Origin{Name: query.Service},
		started: time.Now(),
		first:   make(chan struct{}),
		pacer:   newPacer(),
		stop:    stop,
		done:    make(chan struct{}),
	}
	go w.run(ctx)
	return w
}

// Destruct ends the watcher. The pool calls it when the last subscription is
// closed.
func (w *watcher) Destruct() error {
	w.stop()
	<-w.done
	w.release()
	return nil
}

func (w *watcher) run(ctx context.Context) {
	defer close(w.done)
	for ctx.Err() == nil {
		w.step(ctx)
	}
}

// step asks once and deals with the answer. A panic counts as a failure: the
// Set stays, and the watcher goes on.
func (w *watcher) step(ctx context.Context) {
	defer func() {
		if reason := recover(); reason != nil {
			w.log().Error("recovered from a panic while following a service; please report it",
				zap.String("service", w.query.Service), zap.Any("panic", reason), zap.ByteString("stack", debug.Stack()))
			w.index = 0
			w.failed(ctx, fmt.Errorf("panic: %v", reason))
		}
	}()

	w.pacer.wait(ctx)
	answer, err := w.agent.health(ctx, &w.query, w.index)
	switch {
	case ctx.Err() != nil:
	case errors.Is(err, errOutdated):
		w.index = 0 // what the new credentials may see is not what the old ones saw
	case err != nil:
		w.failed(ctx, err)
	default:
		w.answered(ctx, answer)
	}
}

// answered publishes what is new in an answer.
func (w *watcher) answered(ctx context.Context, a *answer) {
	start := time.Now()
	endpoints, refused := w.query.endpoints(a.instances)
	if len(a.instances) == 0 && a.filtered && len(w.endpoints) > 0 {
		w.failed(ctx, errors.New("the token has lost the right to see the service: it needs service:read on the service and node:read on its nodes"))
		return
	}
	w.publish(endpoints)
	w.reportRefused(refused)
	w.pacer.answered(a.cost + time.Since(start))

	w.recovered()

	// Consul's rules for the next index: from the start if it went backwards,
	// and never 0, which would not block.
	switch {
	case a.index == 0:
		w.index = 1
		pause(ctx, w.backoff.next())
		return
	case a.index < w.index:
		w.index = 0
	default:
		w.index = a.index
	}
	w.backoff.reset()
}

// publish makes a Set of the endpoints, unless the present one says the same.
func (w *watcher) publish(endpoints []endpoint.Endpoint) {
	old := w.set.Load()
	if old != nil && sameEndpoints(w.endpoints, endpoints) {
		return
	}
	w.endpoints = endpoints
	w.set.Store(endpoint.NewSet(w.origin, endpoints))
	if old == nil {
		close(w.first)
	}
	switch {
	case len(endpoints) == 0:
		w.log().Warn("the service has no usable instance",
			zap.String("service", w.query.Service), zap.String("health", string(w.query.Health)))
	case old == nil || old.Len() == 0:
		w.log().Info("following the service",
			zap.String("service", w.query.Service), zap.Int("instances", len(endpoints)))
	}
}

// reportRefused logs instances that can't be dialled, when their number
// changes.
func (w *watcher) reportRefused(refused []error) {
	if len(refused) == w.refused {
		return
	}
	w.refused = len(refused)
	if len(refused) > 0 {
		w.log().Warn("instances left out because they can't be dialled",
			zap.String("service", w.query.Service), zap.Int("instances", len(refused)), zap.Error(refused[0]))
	}
}

// failed keeps the Set and pauses. It is logged once, until Consul answers
// again.
func (w *watcher) failed(ctx context.Context, err error) {
	since := time.Now()
	if present := w.failing.Load(); present != nil {
		since = present.since
		w.log().Debug("Consul still gives no usable answer", zap.String("service", w.query.Service), zap.Error(err))
	} else {
		instances := 0
		if set := w.set.Load(); set != nil {
			instances = set.Len()
		}
		w.log().Warn("Consul gives no usable answer; serving the instances known last",
			zap.String("service", w.query.Service), zap.Int("instances", instances), zap.Error(err))
	}
	w.failing.Store(&failure{since, err})
	pause(ctx, w.backoff.next())
}

// recovered ends a failure.
func (w *watcher) recovered() {
	if f := w.failing.Swap(nil); f != nil {
		w.log().Info("Consul answers again",
			zap.String("service", w.query.Service), zap.Duration("after", time.Since(f.since)))
	}
}

// log returns the logger of the newest config that holds the watcher.
func (w *watcher) log() *zap.Logger {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.loggers) == 0 {
		return zap.NewNop()
	}
	return w.loggers[len(w.loggers)-1].logger
}
