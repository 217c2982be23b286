// Package endpoint is the vocabulary that the parts of caddy-consul share: an
// [Endpoint] is one instance of a service as it can be dialled, a [Set] is an
// immutable snapshot of a service, and an [Offer] is what one request was
// offered from it.
//
// It owns no goroutine, asks nothing of Consul and reads no configuration. The
// upstream source and the selection policies, which do not import each other,
// meet here.
package endpoint

import (
	"cmp"
	"strings"
)

// Status is the health of an instance: the worst of its checks, as Consul
// aggregates them.
type Status uint8

// The statuses of an instance, from best to worst.
const (
	Passing Status = iota
	Warning
	Critical
	Maintenance
)

// String returns Consul's name of the status.
func (s Status) String() string {
	switch s {
	case Passing:
		return "passing"
	case Warning:
		return "warning"
	case Critical:
		return "critical"
	default:
		return "maintenance"
	}
}

// Endpoint is one instance of a service. It must not be modified once it is
// part of a Set.
type Endpoint struct {
	// Dial is the Caddy network address of the instance: "10.0.0.7:8080",
	// "[2001:db8::7]:8080" or "unix//run/web.sock".
	Dial string

	// Weight is the share of traffic that the instance is to get, relative to
	// the others. 0 means none while another instance has more.
	Weight int

	// Status is the worst status of the instance's checks.
	Status Status

	// Service, ID, Node and Datacenter name the instance in Consul's catalogue.
	Service, ID, Node, Datacenter string

	// Tags and Meta are the service's own.
	Tags []string
	Meta map[string]string
}

// Compare orders endpoints as those of a Set are by default: by node and ID, so
// that one that doesn't change keeps its place among the others.
func (e *Endpoint) Compare(other *Endpoint) int {
	return cmp.Or(strings.Compare(e.Node, other.Node), strings.Compare(e.ID, other.ID))
}

// IsDialledAs reports whether hostport, which is the value of Caddy's
// placeholder {http.reverse_proxy.upstream.hostport}, is the address of e.
func (e *Endpoint) IsDialledAs(hostport string) bool {
	if e.Dial == hostport {
		return true
	}
	path, isUnix := strings.CutPrefix(e.Dial, "unix/")
	return isUnix && path == hostport
}
