package endpoint_test

import (
	"fmt"
	"strconv"
	"testing"

	"github.com/caddy-consul/caddy-consul/internal/endpoint"
)

func BenchmarkNewSet(b *testing.B) {
	for _, n := range []int{3, 100, 1000, 5000, 10000} {
		b.Run("n="+strconv.Itoa(n), func(b *testing.B) {
			origin := new(endpoint.Origin)
			endpoints := make([]endpoint.Endpoint, n)
			for i := range endpoints {
				endpoints[i] = endpoint.Endpoint{Dial: fmt.Sprintf("10.1.%d.%d:80", i/250, 1+i%250), Weight: 1 + i*7919%100}
			}
			b.ReportAllocs()
			for b.Loop() {
				endpoint.NewSet(origin, endpoints)
			}
		})
	}
}
