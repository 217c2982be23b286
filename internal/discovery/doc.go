// Package discovery follows services in Consul and publishes what it finds as
// immutable Sets of endpoints.
//
// A watcher owns one query on one Consul agent, in one goroutine: it holds a
// blocking query open, and publishes a Set when the answer differs. Watchers
// are shared: whoever asks the same of the same agent gets a [Subscription] to
// the same watcher, across config reloads too. An agent is a connection to
// Consul with its credentials, shared in the same way by the watchers.
//
// The package knows Consul's HTTP API and its rules for blocking queries. It
// knows nothing of HTTP requests to be proxied, of upstreams or of policies.
package discovery
