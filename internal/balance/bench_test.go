package balance

import (
	"strconv"
	"sync/atomic"
	"testing"
)

var benchSizes = []int{3, 100, 1000, 5000, 10000}

// forSizes runs the benchmark over weights that have no common divisor.
func forSizes(b *testing.B, run func(b *testing.B, weights []int)) {
	for _, n := range benchSizes {
		weights := random(n, 100)
		weights[0] = 1
		b.Run("n="+strconv.Itoa(n), func(b *testing.B) {
			b.ReportAllocs()
			run(b, weights)
		})
	}
}

func BenchmarkNewAlias(b *testing.B) {
	forSizes(b, func(b *testing.B, weights []int) {
		for b.Loop() {
			NewAlias(weights)
		}
	})
}

func BenchmarkNewRotation(b *testing.B) {
	forSizes(b, func(b *testing.B, weights []int) {
		for b.Loop() {
			NewRotation(weights)
		}
	})
}

func BenchmarkAliasPick(b *testing.B) {
	forSizes(b, func(b *testing.B, weights []int) {
		a := NewAlias(weights)
		for b.Loop() {
			a.Pick()
		}
	})
}

func BenchmarkAliasPickParallel(b *testing.B) {
	forSizes(b, func(b *testing.B, weights []int) {
		a := NewAlias(weights)
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				a.Pick()
			}
		})
	})
}

func BenchmarkRotationAt(b *testing.B) {
	forSizes(b, func(b *testing.B, weights []int) {
		r, n := NewRotation(weights), RandomPhase()
		for b.Loop() {
			n++
			r.At(n)
		}
	})
}

func BenchmarkRotationAtParallel(b *testing.B) {
	forSizes(b, func(b *testing.B, weights []int) {
		r := NewRotation(weights)
		var n atomic.Uint64
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				r.At(n.Add(1))
			}
		})
	})
}

func BenchmarkDeal(b *testing.B) {
	forSizes(b, func(b *testing.B, weights []int) {
		n := RandomPhase()
		for b.Loop() {
			n++
			Deal(n, weights)
		}
	})
}

func BenchmarkReservoir(b *testing.B) {
	forSizes(b, func(b *testing.B, weights []int) {
		for b.Loop() {
			var v Reservoir
			for _, w := range weights {
				v.Offer(w)
			}
		}
	})
}
