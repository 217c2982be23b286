package balance

import (
	"math/rand/v2"
	"slices"
)

// distributions are the weights over which every implementation is tried.
var distributions = []struct {
	name    string
	weights []int
}{
	{"single", []int{7}},
	{"two equal", []int{1, 1}},
	{"1:2:3", []int{1, 2, 3}},
	{"5:1:1, nginx's example", []int{5, 1, 1}},
	{"common divisor", []int{300, 600, 900}},
	{"zeros between", []int{0, 4, 0, 0, 3, 2, 0}},
	{"equal between zeros", []int{0, 10, 0, 10, 10, 0}},
	{"one among zeros", []int{0, 0, 9, 0}},
	{"nothing but zeros", []int{0, 0, 0}},
	{"negative", []int{-5, 2, 1}},
	{"equal 3", equal(3, 10)},
	{"equal 100", equal(100, 1)},
	{"equal 1,000", equal(1000, 65535)},
	{"equal 5,000", equal(5000, 1)},
	{"1,000 and 99 of 1", slices.Insert(equal(99, 1), 0, 1000)},
	{"65,535 and 99 of 1", slices.Insert(equal(99, 1), 50, 65535)},
	{"65,535 and 4,999 of 1", slices.Insert(equal(4999, 1), 0, 65535)},
	{"all but one 65,535", slices.Insert(equal(9, 65535), 4, 1)},
	{"primes", []int{2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71}},
	{"large primes", []int{65521, 65519, 65497, 65479, 65449, 65447, 65437, 65423}},
	{"powers of two", powers(2, 16)},
	{"Fibonacci", []int{1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987, 1597, 2584, 4181, 6765, 10946, 17711, 28657, 46368}},
	{"1 to 100", upTo(100)},
	{"1 to 1,000", upTo(1000)},
	{"4 classes of 250", slices.Concat(equal(250, 1), equal(250, 10), equal(250, 100), equal(250, 1000))},
	{"random of total 4,095", randomOfTotal(100, 4095)},
	{"random of total 4,096", randomOfTotal(100, 4096)},
	{"random of total 4,097", randomOfTotal(100, 4097)},
	{"random up to 65,535", random(1000, 65535)},
	{"random up to 10", random(5000, 10)},
}

func equal(n, weight int) []int { return slices.Repeat([]int{weight}, n) }

func upTo(n int) []int {
	weights := make([]int, n)
	for i := range weights {
		weights[i] = i + 1
	}
	return weights
}

func powers(base, n int) []int {
	weights := make([]int, n)
	for i, w := 0, 1; i < n; i, w = i+1, w*base {
		weights[i] = w
	}
	return weights
}

func random(n, maximum int) []int {
	weights := make([]int, n)
	for i := range weights {
		weights[i] = rand.IntN(maximum + 1)
	}
	return weights
}

// randomOfTotal throws total balls at n weights, of which the first has an
// edge. It starts at 1, so the divisor of the weights is 1.
func randomOfTotal(n, total int) []int {
	weights := equal(n, 0)
	weights[n-1] = 1
	for range total - 1 {
		weights[min(rand.IntN(n), rand.IntN(n))]++
	}
	return weights
}
