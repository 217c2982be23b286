// Package consulupstreams is the upstream source http.reverse_proxy.upstreams.consul.
package consulupstreams
