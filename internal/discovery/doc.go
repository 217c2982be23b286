// Package discovery follows services in Consul and publishes what it finds.
package discovery
