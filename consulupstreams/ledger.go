package consulupstreams

import (
	"slices"
	"sync/atomic"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-consul/caddy-consul/internal/endpoint"
)

// ledger is what is remembered of a Set's instances, by index: at 10,000
// instances a lookup by address would be most of what a request costs. So each
// of two instances at one address is noted by itself.
//
// An upstream is noted after Caddy has stored into it, and is only read from
// then on.
//
// A nil ledger is that of a proxy that refuses nothing.
type ledger struct {
	set       *endpoint.Set
	upstreams []atomic.Pointer[reverseproxy.Upstream]
}

// newLedger returns a ledger of set with what the one before, if any, says of
// the same addresses.
func newLedger(set *endpoint.Set, before *ledger) *ledger {
	l := &ledger{set: set, upstreams: make([]atomic.Pointer[reverseproxy.Upstream], set.Len())}
	if before != nil {
		l.carryOver(before)
	}
	return l
}

// carryOver walks both Sets in step, in the order that they normally have. What
// is out of step, as after a move or where Sets are ordered by distance, is
// looked up.
func (l *ledger) carryOver(before *ledger) {
	var left []*reverseproxy.Upstream
	i := 0
	for j := range before.upstreams {
		old := before.set.At(j)
		for i < l.set.Len() && l.set.At(i).Dial != old.Dial && l.set.At(i).Compare(old) < 0 {
			i++
		}
		upstream := before.upstream(j)
		switch {
		case i < l.set.Len() && l.set.At(i).Dial == old.Dial:
			l.upstreams[i].Store(upstream)
			i++
		case upstream != nil:
			left = append(left, upstream)
		}
	}
	if len(left) > 0 {
		l.lookUp(left)
	}
}

// lookUp notes the upstreams for the instances at their addresses of which
// nothing is known yet.
func (l *ledger) lookUp(upstreams []*reverseproxy.Upstream) {
	byDial := make(map[string]*reverseproxy.Upstream, len(upstreams))
	for _, upstream := range upstreams {
		byDial[upstream.Dial] = upstream
	}
	for i := range l.upstreams {
		if l.mayRefuse(i) {
			l.upstreams[i].Store(byDial[l.set.At(i).Dial])
		}
	}
}

func (l *ledger) upstream(i int) *reverseproxy.Upstream { return l.upstreams[i].Load() }

// isAvailable reports whether Caddy would use endpoint i, as far as is known.
func (l *ledger) isAvailable(i int) bool {
	if l == nil {
		return true
	}
	upstream := l.upstream(i)
	return upstream == nil || upstream.Available()
}

// mayRefuse reports whether Caddy has not been seen to make anything of endpoint i.
func (l *ledger) mayRefuse(i int) bool { return l != nil && l.upstream(i) == nil }

// withUnseen adds to index, if one of it is unseen, all others that are: Caddy may
// refuse any number of them, as after a reload, and only it knows. It has seen
// them all then, so each costs this once.
func (l *ledger) withUnseen(index []int32, o *endpoint.Offer) []int32 {
	if !slices.ContainsFunc(index, func(at int32) bool { return l.mayRefuse(int(at)) }) {
		return index
	}
	chosen := index
	for _, at := range l.set.Eligible() {
		if l.mayRefuse(int(at)) && !o.HasTried(l.set.At(int(at))) && !slices.Contains(chosen, at) {
			index = append(index, at)
		}
	}
	return index
}

// remember takes note of an upstream of endpoint i that Caddy has provisioned. If
// it says anything new but may not be kept, the endpoint is unseen again, and the
// next request that it is nominated for gets one that may.
func (l *ledger) remember(upstream *reverseproxy.Upstream, i int, mayBeKept bool) {
	if present := l.upstream(i); present != nil && present.Host == upstream.Host {
		return
	}
	if !mayBeKept {
		upstream = nil
	}
	l.upstreams[i].Store(upstream)
}
