// Package caddytest runs real Caddy against real Consul agents.
//
// It starts Consul agents, backends and Caddy (in this process, or as the built
// binary), sends traffic and reports what became of it. Everything listens on
// loopback, every process that it started is ended by its process ID when the
// test ends, and its log is printed if the test failed. Nothing is skipped: a
// missing Consul binary fails the test and says how to get one.
//
// A test package that uses [SharedAgent] or [CaddyBinary] hands its TestMain
// over to [Main]. A program that is not a test, such as the demo, uses [Run].
//
// The package doesn't import the plugin, so that the plugin's own packages may
// use it in their tests: who calls [StartCaddy] imports
// github.com/caddy-consul/caddy-consul for its side effect. It needs a Unix.
package caddytest
