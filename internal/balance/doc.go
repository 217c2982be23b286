// Package balance holds the algorithms that share picks out among weighted
// choices. They are pure: they know indices and weights, and neither Caddy nor
// Consul. Everything here is immutable once built; counters are the caller's.
package balance
