package balance

import (
	"testing"

	"github.com/caddy-consul/caddy-consul/internal/balance/balancetest"
)

// draw counts what pick returns.
func draw(draws, n int, pick func() int) []int {
	counts := make([]int, n)
	for range draws {
		counts[pick()]++
	}
	return counts
}

func TestAliasIsProportional(t *testing.T) {
	for _, tc := range distributions {
		t.Run(tc.name, func(t *testing.T) {
			a := NewAlias(tc.weights)
			balancetest.CheckChiSquare(t, draw(100_000, len(tc.weights), a.Pick), balancetest.Ideals(tc.weights))
		})
	}
}

// The columns must hold each index's share exactly: no sample is large enough
// to show the rare error of one built with floating point.
func TestAliasColumnsAreExact(t *testing.T) {
	for _, tc := range distributions {
		t.Run(tc.name, func(t *testing.T) {
			a := NewAlias(tc.weights)
			if a.own == nil {
				t.Skip("one owner for each column")
			}
			shares, _ := reduced(tc.weights)
			got := make([]uint64, len(shares))
			for i, own := range a.own {
				got[i] += own
				got[a.other[i]] += a.height - own
			}
			for i, s := range shares {
				if want := s * a.columns; got[i] != want {
					t.Errorf("index %d: got a share of %d, want %d", i, got[i], want)
				}
			}
		})
	}
}

func TestReservoirIsProportional(t *testing.T) {
	for _, tc := range distributions {
		if len(tc.weights) > 100 {
			continue // its time is linear in the number of weights
		}
		t.Run(tc.name, func(t *testing.T) {
			counts := draw(10_000, len(tc.weights), func() (choice int) {
				var v Reservoir
				for i, w := range tc.weights {
					if v.Offer(w) {
						choice = i
					}
				}
				return choice
			})
			balancetest.CheckChiSquare(t, counts, balancetest.Ideals(tc.weights))
		})
	}
}

func TestReservoirTakesTheFirst(t *testing.T) {
	tests := []struct {
		name    string
		weights []int
	}{
		{"a weight", []int{3}},
		{"no weight", []int{0}},
		{"a weight after none", []int{0, -1, 2}},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			var v Reservoir
			got := false
			for _, w := range tc.weights {
				got = v.Offer(w)
			}
			if !got {
				t.Errorf("last of %v: got no choice, want the choice", tc.weights)
			}
		})
	}
}
