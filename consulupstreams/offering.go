package consulupstreams

import (
	"math/rand/v2"
	"net/http"
	"slices"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-consul/caddy-consul/internal/balance"
	"github.com/caddy-consul/caddy-consul/internal/endpoint"
)

// maxDraws is how often a nominee that can't be used is drawn again before all
// endpoints are looked at. Drawing again keeps the shares of the rest in
// proportion.
const maxDraws = 16

// offering settles which of a Set's endpoints Caddy gets for a request. The
// proxy pays for each one that it gets, so the fewer the better.
type offering interface {
	offer(set *endpoint.Set, o *endpoint.Offer, r *http.Request) []*reverseproxy.Upstream
}

// offeringFor chooses the offering that suits the proxy's selection policy:
//
//   - a policy of ours nominates;
//   - without a policy, and with Caddy's random, we draw by weight ourselves;
//   - random_choose gets a sample of the size that it chooses from;
//   - every other policy gets the whole list, because it needs it.
//
// Where we nominate, a witness is put before the policy: it sees what Caddy
// makes of the nominees.
func offeringFor(proxy *reverseproxy.Handler, source *Upstreams) offering {
	if proxy.LoadBalancing == nil {
		proxy.LoadBalancing = new(reverseproxy.LoadBalancing)
	}
	lb := proxy.LoadBalancing
	known := &availability{}
	if proxy.CB == nil && (proxy.HealthChecks == nil || proxy.HealthChecks.Passive == nil) {
		known = nil // nothing can make an upstream unavailable
	}
	witness := func(policy reverseproxy.Selector) {
		if known != nil {
			lb.SelectionPolicy = &witness{policy: policy, source: source, known: known}
		}
	}
	switch policy := lb.SelectionPolicy.(type) {
	case nil:
		witness(reverseproxy.RandomSelection{})
		return &nominated{by: weightedRandom{}, known: known}
	case reverseproxy.RandomSelection, *reverseproxy.RandomSelection:
		witness(policy)
		return &nominated{by: weightedRandom{}, known: known}
	case endpoint.Nominator:
		witness(policy.(reverseproxy.Selector))
		return &nominated{by: policy, known: known}
	case *reverseproxy.RandomChoiceSelection:
		witness(policy)
		return &sampled{size: policy.Choose, known: known}
	default:
		return whole{}
	}
}

// GetUpstreams returns the upstreams that the request may go to.
func (u *Upstreams) GetUpstreams(r *http.Request) ([]*reverseproxy.Upstream, error) {
	set, err := u.instances(r)
	if err != nil {
		if u.hasFallback {
			return nil, err // makes Caddy use the static upstreams
		}
		return nil, nil
	}
	o, isNew := endpoint.OfferTo(r, u)
	if isNew {
		addPlaceholders(r, o)
	} else {
		o.RememberAttempt(r) // Caddy tries again
	}
	return u.offering.offer(set, o, r), nil
}

// weightedRandom nominates endpoints at random in proportion to their weights.
type weightedRandom struct{}

func (weightedRandom) Nominate(set *endpoint.Set, _ *http.Request) int { return set.Alias().Pick() }

func (weightedRandom) Share(e *endpoint.Endpoint) int { return e.Weight }

// whole offers every endpoint.
type whole struct{}

func (whole) offer(set *endpoint.Set, o *endpoint.Offer, _ *http.Request) []*reverseproxy.Upstream {
	index := make([]int32, 0, set.Len())
	if othersAreAvailable(o) {
		for _, at := range set.Eligible() {
			if !o.HasTried(set.At(int(at))) {
				index = append(index, at)
			}
		}
	}
	if len(index) == 0 {
		index = append(index, set.Eligible()...)
	}
	return o.Some(set, index)
}

// othersAreAvailable reports whether, of what the request was offered last,
// something is left that it has not tried and that Caddy would use. It is so
// before the first attempt too.
func othersAreAvailable(o *endpoint.Offer) bool {
	first := true
	for upstream, i := range o.All {
		first = false
		if !o.HasTried(o.Set().At(i)) && upstream.Available() {
			return true
		}
	}
	return first
}

// nominated offers the endpoint that a policy nominates.
type nominated struct {
	by    endpoint.Nominator
	known *availability // nil if nothing can make an upstream unavailable
}

func (n *nominated) offer(set *endpoint.Set, o *endpoint.Offer, r *http.Request) []*reverseproxy.Upstream {
	known := n.known.of(set)
	nominee := n.draw(set, known, o, r)
	if known.mayRefuse(nominee) {
		return o.Some(set, known.withUnseen([]int32{int32(nominee)}, o))
	}
	return o.One(set, nominee)
}

// draw returns a nominee that this request hasn't tried and that Caddy would
// use, as far as is known.
func (n *nominated) draw(set *endpoint.Set, known *ledger, o *endpoint.Offer, r *http.Request) int {
	usable := func(i int) bool { return !o.HasTried(set.At(i)) && known.isAvailable(i) }
	for range maxDraws {
		if nominee := n.by.Nominate(set, r); usable(nominee) {
			return nominee
		}
	}
	if nominee, ok := n.scan(set, usable); ok {
		return nominee
	}
	if nominee, ok := n.scan(set, known.isAvailable); ok {
		return nominee
	}
	return n.by.Nominate(set, r)
}

// scan draws among all endpoints that are usable, in proportion.
func (n *nominated) scan(set *endpoint.Set, usable func(i int) bool) (nominee int, ok bool) {
	var draw balance.Reservoir
	for i := range set.Len() {
		if usable(i) && draw.Offer(n.by.Share(set.At(i))) {
			nominee, ok = i, true
		}
	}
	return nominee, ok
}

// sampled offers a uniform sample, for a policy that chooses from one.
type sampled struct {
	size  int
	known *availability
}

func (s *sampled) offer(set *endpoint.Set, o *endpoint.Offer, _ *http.Request) []*reverseproxy.Upstream {
	known := s.known.of(set)
	eligible := set.Eligible()
	usable := func(at int32) bool { return !o.HasTried(set.At(int(at))) && known.isAvailable(int(at)) }
	index := make([]int32, 0, s.size)
	if len(eligible) > s.size {
		for range maxDraws * s.size {
			at := eligible[rand.IntN(len(eligible))]
			if !slices.Contains(index, at) && usable(at) {
				if index = append(index, at); len(index) == s.size {
					return o.Some(set, known.withUnseen(index, o))
				}
			}
		}
	}
	index = index[:0]
	for _, at := range eligible {
		if usable(at) {
			index = append(index, at)
		}
	}
	if len(index) == 0 {
		index = append(index, eligible...)
	}
	// the policy prefers the first one of those that are idle
	rand.Shuffle(len(index), func(i, j int) { index[i], index[j] = index[j], index[i] })
	return o.Some(set, known.withUnseen(index[:min(s.size, len(index))], o))
}
