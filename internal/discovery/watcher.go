package discovery

import (
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-consul/caddy-consul/internal/endpoint"
)

// watcher follows a service and publishes a Set whenever the answer differs.
type watcher struct {
	follower
	query   Query
	origin  *endpoint.Origin
	release func() // gives the agent back
	keeper  keeper

	set     atomic.Pointer[endpoint.Set]
	first   chan struct{} // closed with the first Set
	cold    atomic.Bool   // the Set is one stored by an earlier run
	changes atomic.Uint64
	changed atomic.Int64 // when the Set changed last, in Unix nanoseconds

	undialable atomic.Int64 // instances left out because they can't be dialled

	// the goroutine's own
	reader   reader
	elements []*element // of the last answer that was read
	filtered bool       // the last answer that was taken was

	mu        sync.Mutex          // held to publish
	endpoints []endpoint.Endpoint // of the present Set
	emptiness *time.Timer         // runs while an empty answer is distrusted
}

// newWatcher begins to follow a service. It is told where its first lines go,
// since it may fail before whoever made it has a hold on it.
func newWatcher(query Query, agent *agent, release func(), log *logSource) *watcher {
	w := &watcher{
		query:   query,
		origin:  &endpoint.Origin{Name: query.Service},
		release: release,
		first:   make(chan struct{}),
		reader:  reader{query: &query},
	}
	w.keeper.watcher = w
	w.follower = follower{
		agent:     agent,
		question:  query.question(),
		subject:   zap.String("service", query.Service),
		read:      w.read,
		take:      w.take,
		tide:      func() *tide { return agent.tide(query.Datacenter, query.Consistency, query.Wait) },
		disturbed: w.keeper.serveStored,
	}
	w.loggers.add(log)
	w.start()
	return w
}

// Destruct ends the watcher. The pool calls it when the last subscription is
// closed.
func (w *watcher) Destruct() error {
	w.end()
	w.mu.Lock()
	if w.emptiness != nil {
		w.emptiness.Stop()
	}
	w.mu.Unlock()
	w.keeper.end()
	w.release()
	return nil
}

// errRightsLost says that emptiness is no news about the service.
var errRightsLost = errors.New("the answer is empty because the token may no longer see the service: " + rightsNeeded)

const rightsNeeded = "it needs service:read on the service and node:read on its nodes"

func (w *watcher) read(body io.Reader) (err error) {
	w.elements, err = w.reader.read(body)
	return err
}

// take publishes what is new in an answer.
//
// A server of Consul that was restarted answers while it still reads its log, and
// tells what was so long ago: instances that are gone, and none of those that
// came since. Its index gives it away.
func (w *watcher) take(a *answer) error {
	elements := w.elements
	w.elements = nil
	if w.reader.repeats(elements) && a.filtered == w.filtered {
		return nil
	}
	if a.outdated {
		return errUnconfirmed
	}
	if len(elements) == 0 && w.hasEndpoints() {
		switch {
		case a.filtered:
			return errRightsLost
		case a.streamed: // Consul's streaming backend doesn't say that rights were lost
			return errUnconfirmed
		}
	}
	if len(elements) == 0 && a.filtered && w.set.Load() == nil {
		w.loggers.newest().Warn("the token may see no instance of the service, if there are any: "+rightsNeeded, w.subject)
	}
	endpoints, refused := w.query.endpoints(elements)
	w.publish(endpoints)
	w.reportRefused(refused)
	w.reader.take(elements)
	w.filtered = a.filtered
	return nil
}

func (w *watcher) hasEndpoints() bool {
	set := w.set.Load()
	return set != nil && set.Len() > 0
}

// publish makes a Set of the endpoints that Consul reports, unless the present
// one says the same, or emptiness is not to be believed yet.
func (w *watcher) publish(endpoints []endpoint.Endpoint) {
	w.mu.Lock()
	defer w.mu.Unlock()
	wasCold := w.cold.Swap(false)
	if len(endpoints) == 0 && w.query.KeepLastOnEmpty > 0 && w.hasEndpoints() {
		if w.emptiness == nil {
			w.loggers.newest().Warn("Consul reports no usable instance any more; serving the ones known last for a while",
				w.subject, zap.Duration("keep_last_on_empty", w.query.KeepLastOnEmpty))
			w.emptiness = time.AfterFunc(w.query.KeepLastOnEmpty, w.believeEmptiness)
		}
		return
	}
	if w.emptiness != nil {
		w.emptiness.Stop()
		w.emptiness = nil
	}
	isNew := w.set.Load() == nil || !sameEndpoints(w.endpoints, endpoints)
	if isNew {
		w.replace(endpoints)
	}
	if isNew || wasCold { // what is stored is confirmed now
		w.keeper.changed()
	}
}

// believeEmptiness publishes an empty answer that has not been taken back.
func (w *watcher) believeEmptiness() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.emptiness != nil {
		w.emptiness = nil
		w.replace(nil)
	}
}

// replace makes the endpoints the present Set. The caller holds mu.
func (w *watcher) replace(endpoints []endpoint.Endpoint) {
	old := w.set.Load()
	w.endpoints = endpoints
	w.set.Store(endpoint.NewSet(w.origin, endpoints))
	w.changes.Add(1)
	w.changed.Store(time.Now().UnixNano())
	if old == nil {
		close(w.first)
	}
	switch {
	case len(endpoints) == 0:
		w.loggers.newest().Warn("the service has no usable instance",
			w.subject, zap.String("health", string(w.query.Health)))
	case (old == nil || old.Len() == 0) && !w.cold.Load():
		w.loggers.newest().Info("following the service", w.subject, zap.Int("instances", len(endpoints)))
	}
}

// reportRefused logs instances that can't be dialled, when their number
// changes.
func (w *watcher) reportRefused(refused []error) {
	if w.undialable.Swap(int64(len(refused))) == int64(len(refused)) {
		return
	}
	if len(refused) > 0 {
		w.loggers.newest().Warn("instances left out because they can't be dialled",
			w.subject, zap.Int("instances", len(refused)), zap.Error(refused[0]))
	}
}
