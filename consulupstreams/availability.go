package consulupstreams

import (
	"net/http"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-consul/caddy-consul/internal/balance"
	"github.com/caddy-consul/caddy-consul/internal/endpoint"
)

// availability remembers, for one proxy, the upstream that Caddy provisioned
// last for each address. It carries what Caddy alone knows: failures, requests
// under way, the circuit breaker. So an instance that Caddy would refuse is not
// nominated, and no request gets a 503 while another instance would serve it.
//
// An upstream is remembered after Caddy has stored into it, and is only read
// from then on.
//
// A nil availability is that of a proxy that refuses nothing.
type availability struct {
	upstreams sync.Map // dial address → *reverseproxy.Upstream
	count     atomic.Int64
}

// isAvailable reports whether Caddy would use e, as far as is known.
func (a *availability) isAvailable(e *endpoint.Endpoint) bool {
	if a == nil {
		return true
	}
	upstream := a.upstream(e)
	return upstream == nil || upstream.Available()
}

// mayRefuse reports whether Caddy has not been seen to make anything of e.
func (a *availability) mayRefuse(e *endpoint.Endpoint) bool {
	return a != nil && a.upstream(e) == nil
}

func (a *availability) upstream(e *endpoint.Endpoint) *reverseproxy.Upstream {
	value, _ := a.upstreams.Load(e.Dial)
	upstream, _ := value.(*reverseproxy.Upstream)
	return upstream
}

// withUnseen adds to index, if one of it is unseen, all others that are: Caddy may
// refuse any number of them, as after a reload, and only it knows. It has seen
// them all then, so each costs this once.
func (a *availability) withUnseen(index []int32, set *endpoint.Set, o *endpoint.Offer) []int32 {
	if !slices.ContainsFunc(index, func(at int32) bool { return a.mayRefuse(set.At(int(at))) }) {
		return index
	}
	chosen := index
	for _, at := range set.Eligible() {
		e := set.At(int(at))
		if a.mayRefuse(e) && !o.HasTried(e) && !slices.Contains(chosen, at) {
			index = append(index, at)
		}
	}
	return index
}

// remember takes note of an upstream of e that Caddy has provisioned.
func (a *availability) remember(upstream *reverseproxy.Upstream, e *endpoint.Endpoint, set *endpoint.Set) {
	present := a.upstream(e)
	if present != nil && present.Host == upstream.Host {
		return
	}
	if _, replaced := a.upstreams.Swap(e.Dial, upstream); !replaced {
		if a.count.Add(1) > 2*int64(set.Len())+64 {
			a.forgetAllBut(set)
		}
	}
}

// forgetAllBut drops what has left the service, so that the memory follows its
// size.
func (a *availability) forgetAllBut(set *endpoint.Set) {
	present := make(map[string]bool, set.Len())
	for i := range set.Len() {
		present[set.At(i).Dial] = true
	}
	for dial := range a.upstreams.Range {
		if !present[dial.(string)] {
			if _, loaded := a.upstreams.LoadAndDelete(dial); loaded {
				a.count.Add(-1)
			}
		}
	}
}

// witness stands before a proxy's selection policy where the source has
// nominated already. It sees what Caddy makes of the nominees and takes the
// first one that Caddy would use. Pools that the source has not made, such as
// the static upstreams, are the policy's.
type witness struct {
	policy reverseproxy.Selector
	source *Upstreams
	known  *availability
}

// Select returns an available upstream, if there is one.
func (w *witness) Select(pool reverseproxy.UpstreamPool, r *http.Request, rw http.ResponseWriter) *reverseproxy.Upstream {
	o := endpoint.OfferOf(r, w.source)
	if o == nil || !o.Is(pool) {
		return w.policy.Select(pool, r, rw)
	}
	for upstream, e := range o.All {
		w.known.remember(upstream, e, o.Set())
	}
	if _, nominated := w.source.offering.(*nominated); !nominated {
		if upstream := w.policy.Select(pool, r, rw); upstream != nil {
			return upstream
		}
	} else if upstream := w.nominee(o, pool[0]); upstream != nil {
		return upstream
	}
	return w.any(o)
}

// nominee returns the first one offered, or if Caddy would not use it, one of
// its alternates.
func (w *witness) nominee(o *endpoint.Offer, first *reverseproxy.Upstream) (choice *reverseproxy.Upstream) {
	if first.Available() {
		return first
	}
	var draw balance.Reservoir
	for upstream, e := range o.All {
		if upstream.Available() && draw.Offer(w.share(e)) {
			choice = upstream
		}
	}
	return choice
}

// any returns an available upstream that is not among the nominees, all of
// which became unavailable while they were being nominated. One that the request
// has tried is better than none.
func (w *witness) any(o *endpoint.Offer) *reverseproxy.Upstream {
	set := o.Set()
	var untried, tried balance.Reservoir
	choice, lastResort := -1, -1
	for i := range set.Len() {
		e := set.At(i)
		if upstream := w.known.upstream(e); upstream == nil || !upstream.Available() {
			continue
		}
		switch {
		case o.HasTried(e):
			if tried.Offer(w.share(e)) {
				lastResort = i
			}
		case untried.Offer(w.share(e)):
			choice = i
		}
	}
	if choice < 0 {
		choice = lastResort
	}
	if choice < 0 {
		return nil
	}
	upstream := w.known.upstream(set.At(choice))
	o.Add(upstream, choice)
	return upstream
}

// share is the share of traffic that an endpoint is to get.
func (w *witness) share(e *endpoint.Endpoint) int {
	if n, ok := w.source.offering.(*nominated); ok {
		return n.by.Share(e)
	}
	return 1
}

// Interface guard
var _ reverseproxy.Selector = (*witness)(nil)
