// Package consulupstreams is the upstream source
// http.reverse_proxy.upstreams.consul: it gives Caddy's reverse proxy the
// healthy instances of a Consul service.
//
// It owns the configuration, what a request is offered, and the modules' lives
// within Caddy. How Consul is followed is package discovery's; how instances
// are chosen is the selection policies', which it meets in package endpoint
// without knowing them.
package consulupstreams
