package selection

import (
	"math/rand/v2"
	"net/http"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-consul/caddy-consul/internal/balance"
	"github.com/caddy-consul/caddy-consul/internal/endpoint"
)

func init() {
	caddy.RegisterModule(Random{})
}

// Random is a policy that selects an available upstream at random, each with
// the same probability, whatever its weight in Consul. Only an instance of
// weight 0 is left out while another has more.
//
// Use it where instances are alike and many proxies share them: it keeps no
// state that could bring proxies into step.
type Random struct{}

// CaddyModule returns the Caddy module information.
func (Random) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.reverse_proxy.selection_policies.consul_random",
		New: func() caddy.Module { return new(Random) },
	}
}

// UnmarshalCaddyfile sets up the policy from Caddyfile tokens. Syntax:
//
//	lb_policy consul_random
func (p *Random) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	return unmarshalNameOnly(d)
}

// Nominate draws an endpoint of set for this request.
func (Random) Nominate(set *endpoint.Set, _ *http.Request) int {
	eligible := set.Eligible()
	return int(eligible[rand.IntN(len(eligible))])
}

// Share is the same for every endpoint that may get traffic.
func (Random) Share(e *endpoint.Endpoint) int { return min(e.Weight, 1) }

// Select returns an available upstream, or nil if there is none.
func (Random) Select(pool reverseproxy.UpstreamPool, r *http.Request, _ http.ResponseWriter) *reverseproxy.Upstream {
	if len(pool) == 1 {
		return ifAvailable(pool[0])
	}
	var memory [poolOnStack]int
	weights, _ := usableWeights(memory[:0], r, pool)
	return drawEqually(pool, weights)
}

// drawEqually returns one of the upstreams that have a weight, or nil.
func drawEqually(pool reverseproxy.UpstreamPool, weights []int) *reverseproxy.Upstream {
	var (
		reservoir balance.Reservoir
		choice    *reverseproxy.Upstream
	)
	for i, w := range weights {
		if w > 0 && reservoir.Offer(1) {
			choice = pool[i]
		}
	}
	return choice
}

// Interface guards
var (
	_ reverseproxy.Selector = (*Random)(nil)
	_ endpoint.Nominator    = (*Random)(nil)
	_ caddyfile.Unmarshaler = (*Random)(nil)
)
