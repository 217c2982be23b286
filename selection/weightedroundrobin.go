package selection

import (
	"net/http"
	"sync/atomic"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-consul/caddy-consul/internal/balance"
	"github.com/caddy-consul/caddy-consul/internal/endpoint"
)

func init() {
	caddy.RegisterModule(new(WeightedRoundRobin))
}

// WeightedRoundRobin is a policy that selects the available upstreams in turn,
// each as often as its weight demands and spread as evenly as can be. The
// weight of an instance is what the upstream source takes from Consul, as a
// rule `Service.Weights.Passing` or `.Warning` by the instance's health;
// upstreams of other sources weigh 1. An instance of weight 0 gets no traffic
// while another has more.
//
// Use it where instances differ in capacity and shares should be right at any
// time, not only on average: while the service does not change, no instance
// gets 4 requests more or fewer than its share, over any number of requests.
// The first turn is at a random place, so that many proxies do not move in
// step.
//
// Short cycles, of a total weight of up to 4,096 after division by the greatest
// common divisor, follow a schedule made in advance (Tijdeman's chairman
// assignment); longer ones a Huffman tree of the different weights, each fork of
// which deals its turns out as Bresenham's line does, and the instances of one
// weight take turns. A request takes one atomic addition and no lock.
type WeightedRoundRobin struct {
	phase uint64
	turns endpoint.PerOrigin[atomic.Uint64] // of nominations
	turn  atomic.Uint64                     // of selections
}

// CaddyModule returns the Caddy module information.
func (*WeightedRoundRobin) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.reverse_proxy.selection_policies.consul_weighted_round_robin",
		New: func() caddy.Module { return new(WeightedRoundRobin) },
	}
}

// UnmarshalCaddyfile sets up the policy from Caddyfile tokens. Syntax:
//
//	lb_policy consul_weighted_round_robin
func (p *WeightedRoundRobin) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	return unmarshalNameOnly(d)
}

// Provision sets up the policy.
func (p *WeightedRoundRobin) Provision(caddy.Context) error {
	p.phase = balance.RandomPhase()
	return nil
}

// Nominate deals the next endpoint of set. Each service has its own counter:
// if two that are asked for by turns shared one, each would see only every
// other of its turns.
func (p *WeightedRoundRobin) Nominate(set *endpoint.Set, _ *http.Request) int {
	return set.Rotation().At(p.phase + p.turns.Of(set.Origin()).Add(1))
}

// Share is the endpoint's weight.
func (*WeightedRoundRobin) Share(e *endpoint.Endpoint) int { return e.Weight }

// Select returns an available upstream, or nil if there is none.
func (p *WeightedRoundRobin) Select(pool reverseproxy.UpstreamPool, r *http.Request, _ http.ResponseWriter) *reverseproxy.Upstream {
	if len(pool) == 1 {
		return ifAvailable(pool[0])
	}
	var memory [poolOnStack]int
	weights, ok := usableWeights(memory[:0], r, pool)
	if !ok {
		return nil
	}
	return pool[balance.Deal(p.phase+p.turn.Add(1), weights)]
}

// Interface guards
var (
	_ caddy.Provisioner     = (*WeightedRoundRobin)(nil)
	_ reverseproxy.Selector = (*WeightedRoundRobin)(nil)
	_ endpoint.Nominator    = (*WeightedRoundRobin)(nil)
	_ caddyfile.Unmarshaler = (*WeightedRoundRobin)(nil)
)
