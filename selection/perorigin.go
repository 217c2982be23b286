package selection

import (
	"sync"
	"sync/atomic"

	"github.com/caddy-consul/caddy-consul/internal/endpoint"
)

// maxOrigins bounds how many services a policy keeps a state for. Handlers with
// placeholders in the service name may see any number of them come and go.
const maxOrigins = 1024

// perOrigin holds a state of type S for each origin that a policy has seen: the
// zero S at first. Almost every policy sees one origin only, which is found
// without a map. The zero value is ready.
type perOrigin[S any] struct {
	first atomic.Pointer[originState[S]]
	rest  sync.Map // *endpoint.Origin to *S

	mu       sync.Mutex // held to add an origin
	restSize int
}

type originState[S any] struct {
	origin *endpoint.Origin
	state  S
}

// of returns the state for origin.
func (o *perOrigin[S]) of(origin *endpoint.Origin) *S {
	if first := o.first.Load(); first != nil && first.origin == origin {
		return &first.state
	}
	if state, ok := o.rest.Load(origin); ok {
		return state.(*S)
	}
	return o.add(origin)
}

// add starts a state for origin unless another request has just done so. If
// there are too many, it forgets them: the origins that are still in use start
// again, which costs each no more than the evenness of one round.
func (o *perOrigin[S]) add(origin *endpoint.Origin) *S {
	o.mu.Lock()
	defer o.mu.Unlock()
	first := o.first.Load()
	if first == nil {
		first = &originState[S]{origin: origin}
		o.first.Store(first)
	}
	if first.origin == origin {
		return &first.state
	}
	if state, ok := o.rest.Load(origin); ok {
		return state.(*S)
	}
	if o.restSize >= maxOrigins-1 {
		o.rest.Clear()
		o.restSize = 0
	}
	state := new(S)
	o.rest.Store(origin, state)
	o.restSize++
	return state
}
