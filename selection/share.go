package selection

import "github.com/caddy-consul/caddy-consul/internal/endpoint"

// Share is the same for every endpoint that may get traffic.
func (Random) Share(e *endpoint.Endpoint) int { return min(e.Weight, 1) }

// Share is the same for every endpoint that may get traffic.
func (*RoundRobin) Share(e *endpoint.Endpoint) int { return min(e.Weight, 1) }

// Share is the endpoint's weight.
func (WeightedRandom) Share(e *endpoint.Endpoint) int { return e.Weight }

// Share is the endpoint's weight.
func (*WeightedRoundRobin) Share(e *endpoint.Endpoint) int { return e.Weight }
