package balance

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/caddy-consul/caddy-consul/internal/balance/balancetest"
)

// phases are the values of the counter at which the tests start.
func phases() []uint64 {
	return []uint64{0, 1<<32 - 25_000, RandomPhase(), math.MaxUint64 - 50_000}
}

// A deterministic rotation must never be more than 4 picks from ideal for any
// index over any 50,000 picks. gRPC's static stride drifts by 74 over the
// weights 1000 and 99 × 1, an earliest-deadline queue that starts all indices
// at once by 90.
func TestRotationStaysNearIdeal(t *testing.T) {
	for _, tc := range distributions {
		t.Run(tc.name, func(t *testing.T) {
			r := NewRotation(tc.weights)
			for _, start := range phases() {
				got := balancetest.MeasureDrift(r.At, balancetest.Ideals(tc.weights), start, 50_000)
				if got.InAnyRange > 3.36 {
					t.Errorf("from pick %d: got a drift of %.3f, want at most 3.36", start, got.InAnyRange)
				}
			}
		})
	}
}

func TestRotationOfSmallTotalStaysWithinOne(t *testing.T) {
	for _, tc := range distributions {
		shares, total := reduced(tc.weights)
		if total > 4096 && slices.Max(shares) > 1 {
			continue
		}
		t.Run(tc.name, func(t *testing.T) {
			r := NewRotation(tc.weights)
			start := total * (RandomPhase() / total)
			got := balancetest.MeasureDrift(r.At, balancetest.Ideals(tc.weights), start, 3*int(total))
			if got.FromStart > 1 {
				t.Errorf("got a drift of %.6f within a cycle, want at most 1", got.FromStart)
			}
		})
	}
}

func TestRotationIsExactOverAnyCycle(t *testing.T) {
	for _, tc := range distributions {
		shares, total := reduced(tc.weights)
		if total > 100_000 {
			continue
		}
		t.Run(tc.name, func(t *testing.T) {
			r := NewRotation(tc.weights)
			counts := make([]uint64, len(shares))
			start := rand.Uint64N(1 << 62)
			for k := range total {
				counts[r.At(start+k)]++
			}
			for i, want := range shares {
				if counts[i] != want {
					t.Fatalf("index %d over %d picks: got %d, want %d", i, total, counts[i], want)
				}
			}
		})
	}
}

// With equal weights a rotation is plain round robin.
func TestRotationOfEqualWeightsGoesInOrder(t *testing.T) {
	tests := []struct {
		name    string
		weights []int
		want    []int
	}{
		{"three", []int{5, 5, 5}, []int{0, 1, 2, 0, 1, 2}},
		{"zeros between", []int{0, 5, 0, 5, 5}, []int{1, 3, 4, 1, 3, 4}},
		{"one", []int{5}, []int{0, 0}},
		{"nothing but zeros", []int{0, 0}, []int{0, 1, 0, 1}},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			r := NewRotation(tc.weights)
			for n, want := range tc.want {
				if got := r.At(uint64(n)); got != want {
					t.Errorf("pick %d: got index %d, want %d", n, got, want)
				}
			}
		})
	}
}

// The heaviest index must not get its picks in a row. Over 5:1:1 nginx has 4 in
// a row, from one cycle to the next; 3 is the least that there can be.
func TestRotationIsSmooth(t *testing.T) {
	r := NewRotation([]int{5, 1, 1})
	longest, inRow := 0, 0
	for n := range uint64(3 * 7) {
		inRow++
		if r.At(n) != 0 {
			inRow = 0
		}
		longest = max(longest, inRow)
	}
	if longest > 3 {
		t.Errorf("heaviest of 5:1:1: got %d picks in a row, want at most 3", longest)
	}
}

func TestDealStaysNearIdeal(t *testing.T) {
	for _, tc := range distributions {
		if len(tc.weights) > 100 || slices.Max(tc.weights) <= 0 {
			continue
		}
		t.Run(tc.name, func(t *testing.T) {
			deal := func(n uint64) int { return Deal(n, tc.weights) }
			got := balancetest.MeasureDrift(deal, balancetest.Ideals(tc.weights), RandomPhase(), 50_000)
			if got.InAnyRange > 4 {
				t.Errorf("got a drift of %.3f, want at most 4", got.InAnyRange)
			}
		})
	}
}

func TestDealOfNothing(t *testing.T) {
	for _, weights := range [][]int{nil, {0}, {0, -1}} {
		if got := Deal(3, weights); got != -1 {
			t.Errorf("Deal over %v: got index %d, want -1", weights, got)
		}
	}
}
