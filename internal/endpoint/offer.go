package endpoint

import (
	"net/http"
	"slices"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// offersVar is the request variable that holds the request's first Offer; the
// others, of further sources, hang on it.
const offersVar = "consul_upstreams.offers"

// maxTried bounds what a request that is retried for long remembers.
const maxTried = 64

// Offer is what a source offered to one request in its latest attempt. It
// belongs to that request's goroutine.
//
// Caddy stores into each upstream when it provisions it, so their memory is the
// request's own; afterwards an upstream is only read.
type Offer struct {
	source any
	set    *Set
	next   *Offer
	rest   *rest // nil for most requests, which get one upstream at their only attempt

	// a pool of one
	onePool  [1]*reverseproxy.Upstream
	oneIndex [1]int32
	upstream reverseproxy.Upstream
}

// rest is what only some offers have.
type rest struct {
	pool  []*reverseproxy.Upstream // nil if it is one
	index []int32
	tried []string
}

// isSome reports whether the offer is not a pool of one.
func (o *Offer) isSome() bool { return o.rest != nil && o.rest.pool != nil }

// pool returns what was offered.
func (o *Offer) pool() []*reverseproxy.Upstream {
	switch {
	case o.isSome():
		return o.rest.pool
	case o.onePool[0] != nil:
		return o.onePool[:]
	}
	return nil
}

// index returns the indices in the Set of what was offered.
func (o *Offer) index() []int32 {
	if o.isSome() {
		return o.rest.index
	}
	return o.oneIndex[:len(o.pool())]
}

func (o *Offer) tried() []string {
	if o.rest == nil {
		return nil
	}
	return o.rest.tried
}

// withRest returns the rest, which there is from then on.
func (o *Offer) withRest() *rest {
	if o.rest == nil {
		o.rest = new(rest)
	}
	return o.rest
}

// OfferOf returns what the source has offered to this request so far, or nil.
// The source is compared by identity.
func OfferOf(r *http.Request, source any) *Offer {
	for o := firstOffer(r); o != nil; o = o.next {
		if o.source == source {
			return o
		}
	}
	return nil
}

// OfferTo returns the offer of a source to this request, which is new on the
// first attempt. Where the request has no variables, as in bare unit tests, it
// always is.
func OfferTo(r *http.Request, source any) (o *Offer, isNew bool) {
	vars, _ := r.Context().Value(caddyhttp.VarsCtxKey).(map[string]any)
	var last *Offer
	for o, _ = vars[offersVar].(*Offer); o != nil; o = o.next {
		if o.source == source {
			return o, false
		}
		last = o
	}
	o = &Offer{source: source}
	switch {
	case last != nil:
		last.next = o
	case vars != nil:
		vars[offersVar] = o
	}
	return o, true
}

func firstOffer(r *http.Request) *Offer {
	first, _ := caddyhttp.GetVar(r.Context(), offersVar).(*Offer)
	return first
}

// One makes endpoint i of set the whole offer.
func (o *Offer) One(set *Set, i int) []*reverseproxy.Upstream {
	upstream := &o.upstream
	if o.set != nil { // a retry: Caddy may still read what it got first
		upstream = new(reverseproxy.Upstream)
	}
	upstream.Dial = set.dials[i]
	o.set, o.onePool[0], o.oneIndex[0] = set, upstream, int32(i)
	if o.rest != nil {
		o.rest.pool, o.rest.index = nil, nil
	}
	return o.onePool[:]
}

// Some makes the endpoints of set at index the offer, which takes index over.
// Unlike that of One, its upstreams may be kept beyond the request: the Offer
// and the Set are not kept with them.
func (o *Offer) Some(set *Set, index []int32) []*reverseproxy.Upstream {
	block := make([]reverseproxy.Upstream, len(index))
	pool := make([]*reverseproxy.Upstream, len(index))
	for i, at := range index {
		block[i].Dial = set.dials[at]
		pool[i] = &block[i]
	}
	o.set = set
	rest := o.withRest()
	rest.pool, rest.index = pool, index
	return pool
}

// Add makes endpoint i of the last offer's Set part of it, as an upstream that
// Caddy has provisioned already.
func (o *Offer) Add(upstream *reverseproxy.Upstream, i int) {
	pool, index := append(slices.Clip(o.pool()), upstream), append(slices.Clip(o.index()), int32(i))
	rest := o.withRest()
	rest.pool, rest.index = pool, index
}

// MayBeKept reports whether the upstreams offered last may be kept beyond the
// request.
func (o *Offer) MayBeKept() bool { return o.isSome() }

// Set returns the Set that the last offer was made from.
func (o *Offer) Set() *Set { return o.set }

// Is reports whether pool is what was offered last.
func (o *Offer) Is(pool []*reverseproxy.Upstream) bool {
	offered := o.pool()
	return len(pool) > 0 && len(pool) == len(offered) && pool[0] == offered[0]
}

// All calls yield with each upstream offered last and the index of its endpoint.
func (o *Offer) All(yield func(u *reverseproxy.Upstream, i int) bool) {
	index := o.index()
	for at, u := range o.pool() {
		if !yield(u, int(index[at])) {
			return
		}
	}
}

// RememberAttempt takes note of the upstream that the last attempt went to.
// Caddy names it in a placeholder, whichever policy chose it.
func (o *Offer) RememberAttempt(r *http.Request) {
	if e := o.Chosen(r); e != nil && !o.HasTried(e) && len(o.tried()) < maxTried {
		rest := o.withRest()
		rest.tried = append(rest.tried, e.Dial)
	}
}

// HasTried reports whether an earlier attempt of this request went to e.
func (o *Offer) HasTried(e *Endpoint) bool {
	// most requests have tried none, and then e, which is far from a processor's
	// cache, is not looked at
	return o.rest != nil && slices.Contains(o.rest.tried, e.Dial)
}

// Chosen returns the endpoint of the last offer that Caddy went for, or nil.
func (o *Offer) Chosen(r *http.Request) *Endpoint {
	repl, ok := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	if !ok {
		return nil
	}
	value, _ := repl.Get("http.reverse_proxy.upstream.hostport")
	hostport, _ := value.(string)
	if hostport == "" {
		return nil
	}
	for _, at := range o.index() {
		if e := o.set.At(int(at)); e.IsDialledAs(hostport) {
			return e
		}
	}
	return nil
}

// Weights appends to dst the weight of each upstream in pool: that of its
// endpoint if a source has just offered it to this request, else 1. Sources
// are recognised by the identity of their upstreams, which must be in the pool
// in the order of the offer, so the cost is that of one walk over the pool.
func Weights(dst []int, r *http.Request, pool reverseproxy.UpstreamPool) []int {
	var (
		first   = firstOffer(r)
		offer   *Offer
		offered []*reverseproxy.Upstream
		at      int
	)
	for _, u := range pool {
		if at >= len(offered) || offered[at] != u {
			start := startingWith(first, u)
			if start == nil {
				dst = append(dst, 1)
				continue
			}
			offer, offered, at = start, start.pool(), 0
		}
		dst = append(dst, offer.set.At(int(offer.index()[at])).Weight)
		at++
	}
	return dst
}

// startingWith returns the offer, of those that begin with first, whose first
// upstream is u, or nil.
func startingWith(first *Offer, u *reverseproxy.Upstream) *Offer {
	for o := first; o != nil; o = o.next {
		if pool := o.pool(); len(pool) > 0 && pool[0] == u {
			return o
		}
	}
	return nil
}
