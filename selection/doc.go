// Package selection is the selection policies
// http.reverse_proxy.selection_policies.consul_*.
//
// Each chooses in two ways. A source of upstreams that shares this module's
// vocabulary lets it nominate one endpoint out of a Set, at a cost that does
// not grow with the Set. Any other pool, of static upstreams, of a foreign
// source or of several sources mixed, goes through Select as in every policy.
//
// It owns the counters of the policies, which outlive the Sets, and their
// configuration. It knows nothing of Consul: weights reach it in a Set.
package selection
