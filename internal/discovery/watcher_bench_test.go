package discovery

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"testing"

	"github.com/hashicorp/consul/api"

	"github.com/caddy-consul/caddy-consul/internal/endpoint"
)

var benchSizes = []int{3, 100, 1000, 5000, 10000}

// benchInstance returns an instance that is as long in JSON as one of Consul's
// answers: some 1.8 KB, with the node's check and its own.
func benchInstance(i int) *api.ServiceEntry {
	node, id := "node-"+strconv.Itoa(i%100), "web-"+strconv.Itoa(i)
	address := fmt.Sprintf("10.1.%d.%d", i/250, 1+i%250)
	definition := api.HealthCheckDefinition{HTTP: "http://" + address + ":8080/health", Method: "GET"}
	return &api.ServiceEntry{
		Node: &api.Node{
			ID: "8b1d1e4c-0f4c-4b8e-9c50-0e2f0d7f7a11", Node: node, Address: "10.0.0." + strconv.Itoa(i%100), Datacenter: "dc1",
			TaggedAddresses: map[string]string{"lan": "10.0.0.1", "wan": "10.0.0.1", "lan_ipv4": "10.0.0.1", "wan_ipv4": "10.0.0.1"},
			Meta:            map[string]string{"consul-network-segment": "", "consul-version": "1.22.7"},
			CreateIndex:     13, ModifyIndex: 15,
		},
		Service: &api.AgentService{
			ID: id, Service: "web", Address: address, Port: 8080, Datacenter: "dc1",
			Tags: []string{"http", "v1", "production"}, Meta: map[string]string{"version": "1.0." + strconv.Itoa(i%10), "zone": "a"},
			TaggedAddresses: map[string]api.ServiceAddress{"lan_ipv4": {Address: address, Port: 8080}, "wan_ipv4": {Address: address, Port: 8080}},
			Weights:         api.AgentWeights{Passing: 1 + i*7919%100, Warning: 1},
			CreateIndex:     uint64(100 + i), ModifyIndex: uint64(100 + i),
		},
		Checks: api.HealthChecks{
			{Node: node, CheckID: "serfHealth", Name: "Serf Health Status", Status: api.HealthPassing, Output: "Agent alive and reachable"},
			{
				Node: node, CheckID: "service:" + id, Name: "Service 'web' check", Status: api.HealthPassing, ServiceID: id, ServiceName: "web",
				ServiceTags: []string{"http", "v1", "production"}, Output: "HTTP GET http://" + address + ":8080/health: 200 OK Output: ok",
				Type: "http", Definition: definition,
			},
		},
	}
}

// benchAnswers returns an answer with n instances, and the one that comes when
// the one in the middle is critical.
func benchAnswers(b *testing.B, n int) (all, withoutOne []byte) {
	b.Helper()
	entries := make([]*api.ServiceEntry, n)
	for i := range entries {
		entries[i] = benchInstance(i)
	}
	all = benchJSON(b, entries)
	return all, benchJSON(b, slices.Delete(entries, n/2, n/2+1))
}

func benchJSON(b *testing.B, value any) []byte {
	b.Helper()
	text, err := json.Marshal(value)
	if err != nil {
		b.Fatal(err)
	}
	return text
}

// newBenchWatcher returns a watcher that asks nobody.
func newBenchWatcher() *watcher {
	query := &Query{Service: "web", Health: HealthPassing}
	w := &watcher{
		query:  *query,
		origin: &endpoint.Origin{Name: "web"},
		first:  make(chan struct{}),
		reader: reader{query: query},
	}
	w.keeper.watcher = w
	return w
}

func (w *watcher) benchTake(b *testing.B, body []byte) {
	b.Helper()
	if err := w.read(bytes.NewReader(body)); err != nil {
		b.Fatal(err)
	}
	if err := w.take(&answer{}); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkFirstAnswer is what it takes from the bytes of an answer to a Set
// while nothing is known.
func BenchmarkFirstAnswer(b *testing.B) {
	for _, n := range benchSizes {
		b.Run("n="+strconv.Itoa(n), func(b *testing.B) {
			all, _ := benchAnswers(b, n)
			b.ReportAllocs()
			b.SetBytes(int64(len(all)))
			for b.Loop() {
				newBenchWatcher().benchTake(b, all)
			}
		})
	}
}

// BenchmarkFlap is what it takes from the bytes of an answer to a Set when one
// of the instances has gone, or is back.
func BenchmarkFlap(b *testing.B) {
	for _, n := range benchSizes {
		b.Run("n="+strconv.Itoa(n), func(b *testing.B) {
			all, withoutOne := benchAnswers(b, n)
			w := newBenchWatcher()
			w.benchTake(b, all)
			b.ReportAllocs()
			b.SetBytes(int64(len(all)))
			for b.Loop() {
				w.benchTake(b, withoutOne)
				all, withoutOne = withoutOne, all
			}
		})
	}
}

// BenchmarkSameAnswer is what an answer takes that says nothing new.
func BenchmarkSameAnswer(b *testing.B) {
	for _, n := range benchSizes {
		b.Run("n="+strconv.Itoa(n), func(b *testing.B) {
			all, _ := benchAnswers(b, n)
			w := newBenchWatcher()
			w.benchTake(b, all)
			b.ReportAllocs()
			b.SetBytes(int64(len(all)))
			for b.Loop() {
				w.benchTake(b, all)
			}
		})
	}
}

// BenchmarkDecodeWhole is what Go's own decoder and the official client's types
// take for the same answer: what BenchmarkFirstAnswer is to be compared with.
func BenchmarkDecodeWhole(b *testing.B) {
	for _, n := range benchSizes {
		b.Run("n="+strconv.Itoa(n), func(b *testing.B) {
			all, _ := benchAnswers(b, n)
			b.ReportAllocs()
			b.SetBytes(int64(len(all)))
			for b.Loop() {
				var entries []*api.ServiceEntry
				if err := json.Unmarshal(all, &entries); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
