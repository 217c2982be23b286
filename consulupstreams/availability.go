package consulupstreams

import (
	"net/http"
	"sync/atomic"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-consul/caddy-consul/internal/balance"
	"github.com/caddy-consul/caddy-consul/internal/endpoint"
)

// availability remembers, for one proxy, the upstream that Caddy provisioned
// last for each instance. It carries what Caddy alone knows: failures, requests
// under way, the circuit breaker. So an instance that Caddy would refuse is not
// nominated, and no request gets a 503 while another instance would serve it.
//
// A nil availability is that of a proxy that refuses nothing.
type availability struct {
	ledgers endpoint.PerOrigin[atomic.Pointer[ledger]]
}

// of returns the ledger of set.
//
// What requests note in the ledger before, while the next one is made, is lost,
// and so is what a request notes that still holds an older Set. Both only make
// an instance pass for unseen again, which costs a request a longer offer; what
// Caddy knows of the instance is kept by Caddy.
func (a *availability) of(set *endpoint.Set) *ledger {
	if a == nil {
		return nil
	}
	latest := a.ledgers.Of(set.Origin())
	for {
		before := latest.Load()
		if before != nil && before.set == set {
			return before
		}
		l := newLedger(set, before)
		if before != nil && set.IsOlderThan(before.set) {
			return l // for this request alone: the others must not go back
		}
		if latest.CompareAndSwap(before, l) {
			return l
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
	known := w.known.of(o.Set())
	for upstream, i := range o.All {
		known.remember(upstream, i, o.MayBeKept())
	}
	if _, nominated := w.source.offering.(*nominated); !nominated {
		if upstream := w.policy.Select(pool, r, rw); upstream != nil {
			return upstream
		}
	} else if upstream := w.nominee(o, pool[0]); upstream != nil {
		return upstream
	}
	return w.any(o, known)
}

// nominee returns the first one offered, or if Caddy would not use it, one of
// its alternates.
func (w *witness) nominee(o *endpoint.Offer, first *reverseproxy.Upstream) (choice *reverseproxy.Upstream) {
	if first.Available() {
		return first
	}
	var draw balance.Reservoir
	for upstream, i := range o.All {
		if upstream.Available() && draw.Offer(w.share(o.Set().At(i))) {
			choice = upstream
		}
	}
	return choice
}

// any returns an available upstream that is not among the nominees, all of
// which became unavailable while they were being nominated. One that the request
// has tried is better than none.
func (w *witness) any(o *endpoint.Offer, known *ledger) *reverseproxy.Upstream {
	var untried, tried balance.Reservoir
	choice, lastResort := -1, -1
	for i := range known.set.Len() {
		e := known.set.At(i)
		if upstream := known.upstream(i); upstream == nil || !upstream.Available() {
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
	upstream := known.upstream(choice)
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
