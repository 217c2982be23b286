package balance

import "math/bits"

// Deal returns pick n of a rotation over the weights without computing
// anything in advance, in time linear in their number: it is for weights that
// may be others at the next pick, where a [Rotation] would not pay. Indices
// without a positive weight are not dealt; if there is no other, it returns -1.
//
// It deals as the forks of a Rotation do, in a tree that is found on the way
// down: each fork cuts what is left where the weights of the two sides are
// nearest. While the weights stay the same, the drift over any stretch stays
// below 4: a search for the worst weights found 3.76.
func Deal(n uint64, weights []int) int {
	var total uint64
	for _, w := range weights {
		total += uint64(max(w, 0))
	}
	if total == 0 {
		return -1
	}
	first, end := 0, len(weights)
	n %= total
	for end-first > 1 {
		middle, left := halve(weights[first:end], total)
		rank := linePoint(n, left, total)
		if linePoint(n+1, left, total) > rank {
			n, total, end = rank, left, first+middle
		} else {
			n, total, first = n-rank, total-left, first+middle
		}
	}
	return first
}

// halve returns where to cut the weights, of which there are at least two, in
// two parts that weigh as nearly the same as can be, and what the left weighs.
func halve(weights []int, total uint64) (middle int, left uint64) {
	for middle < len(weights)-1 {
		w := uint64(max(weights[middle], 0))
		if middle > 0 && left+w > total-left {
			// the middle of the total is nearer to this item's start than to its end
			break
		}
		left += w
		middle++
	}
	return middle, left
}

// linePoint returns x × rise / run, rounded.
func linePoint(x, rise, run uint64) uint64 {
	high, low := bits.Mul64(x, rise)
	low, carry := bits.Add64(low, run/2, 0)
	quotient, _ := bits.Div64(high+carry, low, run)
	return quotient
}
