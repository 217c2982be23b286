package endpoint

import (
	"sync"
	"sync/atomic"
)

// maxOrigins bounds how many services a proxy keeps a state for. Handlers with
// placeholders in the service name may see any number of them come and go.
const maxOrigins = 1024

// PerOrigin holds a state of type S for each origin that a proxy has seen: the
// zero S at first. Almost every proxy sees one origin only, which is found
// without a map. The zero value is ready, and any number of goroutines may use
// it.
//
// S must be something that an origin can lose, as a turn is: if there are too
// many origins, their states are forgotten.
type PerOrigin[S any] struct {
	first atomic.Pointer[originState[S]]
	rest  sync.Map // *Origin to *S

	mu       sync.Mutex // held to add an origin
	restSize int
}

type originState[S any] struct {
	origin *Origin
	state  S
}

// Of returns the state for origin.
func (o *PerOrigin[S]) Of(origin *Origin) *S {
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
// again.
func (o *PerOrigin[S]) add(origin *Origin) *S {
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
