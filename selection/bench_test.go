package selection_test

import (
	"strconv"
	"testing"

	"github.com/caddy-consul/caddy-consul/internal/endpoint"
)

var benchSizes = []int{3, 100, 1000, 5000, 10000}

// benchWeights returns n weights that have no common divisor.
func benchWeights(n int) []int {
	weights := make([]int, n)
	for i := range weights {
		weights[i] = 1 + i*7919%100
	}
	return weights
}

func BenchmarkNominate(b *testing.B) {
	for _, pc := range policies {
		for _, n := range benchSizes {
			b.Run(pc.name+"/n="+strconv.Itoa(n), func(b *testing.B) {
				p := provisioned(b, pc.fresh)
				set := newSet(new(endpoint.Origin), benchWeights(n))
				b.ReportAllocs()
				b.RunParallel(func(pb *testing.PB) {
					for pb.Next() {
						p.Nominate(set, nil)
					}
				})
			})
		}
	}
}

func BenchmarkNominateOfTwoOrigins(b *testing.B) {
	for _, pc := range policies {
		b.Run(pc.name, func(b *testing.B) {
			p := provisioned(b, pc.fresh)
			p.Nominate(newSet(new(endpoint.Origin), benchWeights(3)), nil)
			set := newSet(new(endpoint.Origin), benchWeights(100))
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					p.Nominate(set, nil)
				}
			})
		})
	}
}

func BenchmarkSelect(b *testing.B) {
	for _, pc := range policies {
		for _, n := range benchSizes {
			b.Run(pc.name+"/n="+strconv.Itoa(n), func(b *testing.B) {
				p := provisioned(b, pc.fresh)
				pool := newPool(n)
				b.ReportAllocs()
				b.RunParallel(func(pb *testing.PB) {
					r := newRequest()
					for pb.Next() {
						p.Select(pool, r, nil)
					}
				})
			})
		}
	}
}
