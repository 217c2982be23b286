package discovery

import (
	"errors"
	"hash/maphash"
	"sync/atomic"

	"go.uber.org/zap"

	"github.com/caddy-consul/caddy-consul/internal/endpoint"
)

// watcher follows a service and publishes a Set whenever the answer differs.
type watcher struct {
	follower
	query   Query
	origin  *endpoint.Origin
	release func() // gives the agent back

	set   atomic.Pointer[endpoint.Set]
	first chan struct{} // closed with the first Set

	// the goroutine's own
	endpoints []endpoint.Endpoint // of the present Set
	refused   int
	last      bodyDigest
	reader    reader
}

func newWatcher(query Query, agent *agent, release func()) *watcher {
	w := &watcher{
		query:   query,
		origin:  &endpoint.Origin{Name: query.Service},
		release: release,
		first:   make(chan struct{}),
		reader:  reader{query: &query},
	}
	w.follower = follower{
		agent:    agent,
		question: query.question(),
		subject:  zap.String("service", query.Service),
		take:     w.take,
		tide:     func() *tide { return agent.tide(query.Datacenter, query.Consistency, query.Wait) },
	}
	w.start()
	return w
}

// Destruct ends the watcher. The pool calls it when the last subscription is
// closed.
func (w *watcher) Destruct() error {
	w.end()
	w.release()
	return nil
}

// errRightsLost says that emptiness is no news about the service.
var errRightsLost = errors.New("the answer is empty because the token may no longer see the service: " +
	"it needs service:read on the service and node:read on its nodes")

// take publishes what is new in an answer.
func (w *watcher) take(a *answer) error {
	digest := digestOf(a)
	if digest == w.last {
		return nil
	}
	instances, err := w.reader.read(a.body)
	if err != nil {
		return err
	}
	endpoints, refused := instances.endpoints, instances.refused
	if instances.count == 0 && a.filtered && len(w.endpoints) > 0 {
		return errRightsLost
	}
	w.publish(endpoints)
	w.reportRefused(refused)
	w.last = digest
	return nil
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
		w.loggers.newest().Warn("the service has no usable instance",
			w.subject, zap.String("health", string(w.query.Health)))
	case old == nil || old.Len() == 0:
		w.loggers.newest().Info("following the service", w.subject, zap.Int("instances", len(endpoints)))
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
		w.loggers.newest().Warn("instances left out because they can't be dialled",
			w.subject, zap.Int("instances", len(refused)), zap.Error(refused[0]))
	}
}

// bodyDigest tells whether an answer repeats the one before, which then need
// not be read again.
type bodyDigest struct {
	size     int
	sum      uint64
	filtered bool
}

var digestSeed = maphash.MakeSeed()

func digestOf(a *answer) bodyDigest {
	return bodyDigest{len(a.body), maphash.Bytes(digestSeed, a.body), a.filtered}
}
