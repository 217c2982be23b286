// Package balancetest judges sequences of picks, for the tests of those who
// make them.
package balancetest

import (
	"math"
	"testing"
)

// Ideals returns the share of all picks that each index is to get.
func Ideals(weights []int) []float64 {
	total := 0
	for _, w := range weights {
		total += max(w, 0)
	}
	ideals := make([]float64, len(weights))
	for i, w := range weights {
		if total > 0 {
			ideals[i] = float64(max(w, 0)) / float64(total)
		} else {
			ideals[i] = 1 / float64(len(weights))
		}
	}
	return ideals
}

// CheckChiSquare fails the test if the counts are not what independent draws
// of the given shares give, by Pearson's test, with a p-value below 1e-6. The
// quantile is Wilson and Hilferty's approximation, good to a percent where
// there are at least some five picks for each index.
func CheckChiSquare(t testing.TB, counts []int, ideals []float64) {
	t.Helper()
	picks := 0
	for _, c := range counts {
		picks += c
	}
	// indices too rare for the test are taken together
	var statistic, rareCount, rareIdeal float64
	categories := 0
	add := func(count, ideal float64) {
		statistic += (count - ideal) * (count - ideal) / ideal
		categories++
	}
	for i, c := range counts {
		ideal := ideals[i] * float64(picks)
		switch {
		case ideals[i] == 0 && c > 0:
			t.Errorf("index %d, which has no share: got %d picks, want none", i, c)
		case ideal < 8:
			rareCount += float64(c)
			rareIdeal += ideal
		default:
			add(float64(c), ideal)
		}
	}
	if rareIdeal >= 8 {
		add(rareCount, rareIdeal)
	}
	if categories < 2 {
		return
	}
	const z = 4.7534 // of the normal distribution, for p = 1e-6
	freedom := float64(categories - 1)
	limit := freedom * math.Pow(1-2/(9*freedom)+z*math.Sqrt(2/(9*freedom)), 3)
	if statistic > limit {
		t.Errorf("over %d picks: got chi-square %.1f, want at most %.1f with %d categories", picks, statistic, limit, categories)
	}
}

// Drift is how far the picks of a sequence are from ideal.
type Drift struct {
	FromStart  float64 // after any number of picks
	InAnyRange float64 // over any range of picks
}

// MeasureDrift takes picks number start, start+1, … An index's deviation rises
// at its own picks and falls evenly between them, so it is enough to look just
// before and after each. Over a range the deviation is the difference of those
// at its ends, so over no range is it more than the span of all.
func MeasureDrift(at func(uint64) int, ideals []float64, start uint64, picks int) Drift {
	counts := make([]int, len(ideals))
	lowest := make([]float64, len(ideals))
	highest := make([]float64, len(ideals))
	look := func(i, after int) {
		deviation := float64(counts[i]) - float64(after)*ideals[i]
		lowest[i] = min(lowest[i], deviation)
		highest[i] = max(highest[i], deviation)
	}
	for k := range picks {
		i := at(start + uint64(k))
		look(i, k)
		counts[i]++
		look(i, k+1)
	}
	var d Drift
	for i := range ideals {
		look(i, picks)
		d.FromStart = max(d.FromStart, highest[i], -lowest[i])
		d.InAnyRange = max(d.InAnyRange, highest[i]-lowest[i])
	}
	return d
}
