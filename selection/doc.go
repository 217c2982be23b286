// Package selection is the selection policies http.reverse_proxy.selection_policies.consul_*.
package selection
