// Package balance holds the algorithms that share picks out among weighted
// choices. They are pure: they know indices and weights, and neither Caddy nor
// Consul. What is built once is immutable; counters are the caller's, and so is
// a [Reservoir], which lives for one choice.
package balance
