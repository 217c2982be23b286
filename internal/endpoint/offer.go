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
	pool   []*reverseproxy.Upstream
	index  []int32 // pool[i] stands for set.At(index[i])
	tried  []string
	next   *Offer

	// the memory of a pool of one, which is what most requests get
	onePool  [1]*reverseproxy.Upstream
	oneIndex [1]int32
	upstream reverseproxy.Upstream
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

// One makes endpoint i of set the whole offer. Its upstream must not be kept
// beyond the request, for the Offer and the Set would be kept with it.
func (o *Offer) One(set *Set, i int) []*reverseproxy.Upstream {
	if o.pool != nil { // a retry: Caddy may still read what it got first
		return o.OneToKeep(set, i)
	}
	o.upstream.Dial = set.At(i).Dial
	return o.one(set, i, &o.upstream)
}

// OneToKeep makes endpoint i of set the whole offer. Its upstream may be kept.
func (o *Offer) OneToKeep(set *Set, i int) []*reverseproxy.Upstream {
	return o.one(set, i, &reverseproxy.Upstream{Dial: set.At(i).Dial})
}

func (o *Offer) one(set *Set, i int, upstream *reverseproxy.Upstream) []*reverseproxy.Upstream {
	o.onePool[0], o.oneIndex[0] = upstream, int32(i)
	o.set, o.pool, o.index = set, o.onePool[:], o.oneIndex[:]
	return o.pool
}

// Some makes the endpoints of set at index the offer, which takes index over.
func (o *Offer) Some(set *Set, index []int32) []*reverseproxy.Upstream {
	block := make([]reverseproxy.Upstream, len(index))
	o.set, o.index = set, index
	o.pool = make([]*reverseproxy.Upstream, len(index))
	for i, at := range index {
		block[i].Dial = set.At(int(at)).Dial
		o.pool[i] = &block[i]
	}
	return o.pool
}

// Add makes endpoint i of the last offer's Set part of it, as an upstream that
// Caddy has provisioned already.
func (o *Offer) Add(upstream *reverseproxy.Upstream, i int) {
	o.pool = append(slices.Clip(o.pool), upstream)
	o.index = append(slices.Clip(o.index), int32(i))
}

// Set returns the Set that the last offer was made from.
func (o *Offer) Set() *Set { return o.set }

// Is reports whether pool is what was offered last.
func (o *Offer) Is(pool []*reverseproxy.Upstream) bool {
	return len(pool) > 0 && len(pool) == len(o.pool) && pool[0] == o.pool[0]
}

// All calls yield with each upstream offered last and the index of its endpoint.
func (o *Offer) All(yield func(u *reverseproxy.Upstream, i int) bool) {
	for at, u := range o.pool {
		if !yield(u, int(o.index[at])) {
			return
		}
	}
}

// RememberAttempt takes note of the upstream that the last attempt went to.
// Caddy names it in a placeholder, whichever policy chose it.
func (o *Offer) RememberAttempt(r *http.Request) {
	if e := o.Chosen(r); e != nil && !slices.Contains(o.tried, e.Dial) && len(o.tried) < maxTried {
		o.tried = append(o.tried, e.Dial)
	}
}

// HasTried reports whether an earlier attempt of this request went to e.
func (o *Offer) HasTried(e *Endpoint) bool {
	return len(o.tried) > 0 && slices.Contains(o.tried, e.Dial)
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
	for _, at := range o.index {
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
	first := firstOffer(r)
	offer, at := first, 0
	for _, u := range pool {
		if offer == nil || at >= len(offer.pool) || offer.pool[at] != u {
			start := startingWith(first, u)
			if start == nil {
				dst = append(dst, 1)
				continue
			}
			offer, at = start, 0
		}
		dst = append(dst, offer.set.At(int(offer.index[at])).Weight)
		at++
	}
	return dst
}

// startingWith returns the offer, of those that begin with first, whose first
// upstream is u, or nil.
func startingWith(first *Offer, u *reverseproxy.Upstream) *Offer {
	for o := first; o != nil; o = o.next {
		if len(o.pool) > 0 && o.pool[0] == u {
			return o
		}
	}
	return nil
}
