package selection

import (
	"net/http"
	"slices"
	"sync/atomic"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-consul/caddy-consul/internal/balance"
	"github.com/caddy-consul/caddy-consul/internal/endpoint"
)

func init() {
	caddy.RegisterModule(new(RoundRobin))
}

// RoundRobin is a policy that selects each available upstream in turn, whatever
// its weight in Consul. Only an instance of weight 0 is left out while another
// has more.
//
// Use it where instances are alike. When instances come and go, the turn passes
// on to the one after the last that was served: it neither starts again from
// the first nor leaves anyone out. The first turn is at a random place, so that
// many proxies do not move in step. A request takes one atomic addition and no
// lock, however large the service is.
type RoundRobin struct {
	phase  uint64
	robins endpoint.PerOrigin[robin] // of nominations
	turn   atomic.Uint64             // of selections
}

// CaddyModule returns the Caddy module information.
func (*RoundRobin) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.reverse_proxy.selection_policies.consul_round_robin",
		New: func() caddy.Module { return new(RoundRobin) },
	}
}

// UnmarshalCaddyfile sets up the policy from Caddyfile tokens. Syntax:
//
//	lb_policy consul_round_robin
func (p *RoundRobin) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	return unmarshalNameOnly(d)
}

// Provision sets up the policy.
func (p *RoundRobin) Provision(caddy.Context) error {
	p.phase = balance.RandomPhase()
	return nil
}

// Nominate deals the next endpoint of set.
func (p *RoundRobin) Nominate(set *endpoint.Set, _ *http.Request) int {
	return p.robins.Of(set.Origin()).next(set, p.phase)
}

// Share is the same for every endpoint that may get traffic.
func (*RoundRobin) Share(e *endpoint.Endpoint) int { return min(e.Weight, 1) }

// Select returns an available upstream, or nil if there is none. An upstream
// that can't be used has its turn all the same: to give it to the next one
// would double the load of that.
func (p *RoundRobin) Select(pool reverseproxy.UpstreamPool, r *http.Request, _ http.ResponseWriter) *reverseproxy.Upstream {
	if len(pool) == 1 {
		return ifAvailable(pool[0])
	}
	var memory [poolOnStack]int
	weights, ok := usableWeights(memory[:0], r, pool)
	if !ok {
		return nil
	}
	size := uint64(len(pool))
	for range size {
		if i := (p.phase + p.turn.Add(1)) % size; weights[i] > 0 {
			return pool[i]
		}
	}
	// Other requests drew at the same time, and with them went all the turns
	// of those that can be used.
	return drawEqually(pool, weights)
}

// robin passes the turn round the endpoints of one origin. The zero value is
// ready.
type robin struct {
	lap atomic.Pointer[lap]
}

// lap is the turn while the Set stays the same. It keeps the Set alive, for who
// was served last must be known when the next Set comes.
type lap struct {
	set *endpoint.Set

	// turn modulo the number of eligible endpoints is the place of the one
	// that was served last.
	turn atomic.Uint64
}

// next returns the index of the endpoint of set whose turn it is. The phase is
// where the first lap starts.
func (b *robin) next(set *endpoint.Set, phase uint64) int {
	l := b.lap.Load()
	for l == nil || l.set != set {
		next := newLap(set, l, phase)
		if b.lap.CompareAndSwap(l, next) {
			l = next
			break
		}
		l = b.lap.Load()
	}
	eligible := set.Eligible()
	return int(eligible[l.turn.Add(1)%uint64(len(eligible))])
}

// newLap carries on in set where the lap before, if any, has got to.
func newLap(set *endpoint.Set, before *lap, phase uint64) *lap {
	l := &lap{set: set}
	if before == nil {
		l.turn.Store(phase % uint64(set.Len()))
		return l
	}
	places := before.set.Eligible()
	place := before.turn.Load() % uint64(len(places))
	last := before.set.At(int(places[place]))
	next := placeAfter(last, int(place), set)
	l.turn.Store(uint64(next + len(set.Eligible()) - 1))
	return l
}

// placeAfter returns the place, among the eligible of set, whose turn comes
// after last, which had lastPlace in another Set. It may be one past the end.
//
// As a rule Sets are ordered by node and ID, so the place is known even if last
// has gone. A Set in another order, as by distance, is searched for last; if it
// has gone, the next one has probably moved up to its place.
func placeAfter(last *endpoint.Endpoint, lastPlace int, set *endpoint.Set) int {
	places := set.Eligible()
	next, isThere := slices.BinarySearchFunc(places, last, func(i int32, last *endpoint.Endpoint) int {
		return set.At(int(i)).Compare(last)
	})
	if isThere {
		return next + 1
	}
	found := slices.IndexFunc(places, func(i int32) bool {
		return set.At(int(i)).Compare(last) == 0
	})
	if found >= 0 {
		return found + 1
	}
	isOrdered := slices.IsSortedFunc(places, func(i, j int32) int {
		return set.At(int(i)).Compare(set.At(int(j)))
	})
	if isOrdered {
		return next
	}
	return lastPlace
}

// Interface guards
var (
	_ caddy.Provisioner     = (*RoundRobin)(nil)
	_ reverseproxy.Selector = (*RoundRobin)(nil)
	_ endpoint.Nominator    = (*RoundRobin)(nil)
	_ caddyfile.Unmarshaler = (*RoundRobin)(nil)
)
