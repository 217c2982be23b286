// Package caddyconsul installs every module of caddy-consul into a Caddy
// binary: the upstream source http.reverse_proxy.upstreams.consul, the
// consul_* selection policies and the global consul options.
//
// Import it for its side effect, or name it in one --with of xcaddy.
package caddyconsul

import (
	_ "github.com/caddy-consul/caddy-consul/consulupstreams"
	_ "github.com/caddy-consul/caddy-consul/selection"
)
