package selection

import (
	"net/http"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-consul/caddy-consul/internal/balance"
	"github.com/caddy-consul/caddy-consul/internal/endpoint"
)

func init() {
	caddy.RegisterModule(WeightedRandom{})
}

// WeightedRandom is a policy that selects an available upstream at random, with
// a probability in proportion to its weight. The weight of an instance is what
// the upstream source takes from Consul, as a rule `Service.Weights.Passing` or
// `.Warning` by the instance's health; upstreams of other sources weigh 1. An
// instance of weight 0 gets no traffic while another has more.
//
// Use it where instances differ in capacity, or to give a new version a small
// share of the traffic. Shares are exact on average; over few requests they
// vary as chance has it. Where that is too much, use
// `consul_weighted_round_robin`.
//
// It draws by the alias method of Walker and Vose, in constant time however
// large the service is.
type WeightedRandom struct{}

// CaddyModule returns the Caddy module information.
func (WeightedRandom) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.reverse_proxy.selection_policies.consul_weighted_random",
		New: func() caddy.Module { return new(WeightedRandom) },
	}
}

// UnmarshalCaddyfile sets up the policy from Caddyfile tokens. Syntax:
//
//	lb_policy consul_weighted_random
func (p *WeightedRandom) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	return unmarshalNameOnly(d)
}

// Nominate draws an endpoint of set for this request.
func (WeightedRandom) Nominate(set *endpoint.Set, _ *http.Request) int {
	return set.Alias().Pick()
}

// Share is the endpoint's weight.
func (WeightedRandom) Share(e *endpoint.Endpoint) int { return e.Weight }

// Select returns an available upstream, or nil if there is none.
func (WeightedRandom) Select(pool reverseproxy.UpstreamPool, r *http.Request, _ http.ResponseWriter) *reverseproxy.Upstream {
	if len(pool) == 1 {
		return ifAvailable(pool[0])
	}
	var (
		memory    [poolOnStack]int
		reservoir balance.Reservoir
		choice    *reverseproxy.Upstream
	)
	weights, _ := usableWeights(memory[:0], r, pool)
	for i, w := range weights {
		if w > 0 && reservoir.Offer(w) {
			choice = pool[i]
		}
	}
	return choice
}

// Interface guards
var (
	_ reverseproxy.Selector = (*WeightedRandom)(nil)
	_ endpoint.Nominator    = (*WeightedRandom)(nil)
	_ caddyfile.Unmarshaler = (*WeightedRandom)(nil)
)
