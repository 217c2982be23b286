package main

import (
	"fmt"
	"slices"
	"strconv"
	"time"
)

// median returns the middle one of some figures, or 0 if there is none.
func median(figures []float64) float64 {
	if len(figures) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(figures))
	middle := len(sorted) / 2
	if len(sorted)%2 == 0 {
		return (sorted[middle-1] + sorted[middle]) / 2
	}
	return sorted[middle]
}

// medianOf returns the median of one figure of some things.
func medianOf[T any](all []T, figure func(T) float64) float64 {
	figures := make([]float64, len(all))
	for i, one := range all {
		figures[i] = figure(one)
	}
	return median(figures)
}

// medianRatio returns the median, over the rounds, of a figure by that of the
// reference in the same round.
func medianRatio[T any](all, reference []T, figure func(T) float64) float64 {
	var ratios []float64
	for i := range min(len(all), len(reference)) {
		if by := figure(reference[i]); by != 0 {
			ratios = append(ratios, figure(all[i])/by)
		}
	}
	return median(ratios)
}

// grouped writes 12345 as 12,345.
func grouped(n int) string {
	text := strconv.Itoa(n)
	for at := len(text) - 3; at > 0; at -= 3 {
		text = text[:at] + "," + text[at:]
	}
	return text
}

// milliseconds writes nanoseconds as "1.23 ms".
func milliseconds(nanoseconds float64) string {
	return digits(nanoseconds/float64(time.Millisecond)) + " ms"
}

// microseconds writes nanoseconds as "12.3 µs".
func microseconds(nanoseconds float64) string {
	return digits(nanoseconds/float64(time.Microsecond)) + " µs"
}

// digits writes a figure with three digits, or with as many as it has before
// the point.
func digits(figure float64) string {
	switch {
	case figure >= 100:
		return grouped(int(figure + 0.5))
	case figure >= 10:
		return fmt.Sprintf("%.1f", figure)
	default:
		return fmt.Sprintf("%.2f", figure)
	}
}

// megabytes writes bytes as "12.3 MB".
func megabytes(bytes float64) string { return fmt.Sprintf("%.1f MB", bytes/(1<<20)) }
