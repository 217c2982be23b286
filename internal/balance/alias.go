package balance

import (
	"math/rand/v2"
	"slices"
)

// Alias draws indices at random in proportion to their weights, in constant
// time: the alias method of A. J. Walker ("An Efficient Method for Generating
// Discrete Random Variables with General Distributions", ACM TOMS 3, 1977),
// built as M. D. Vose does ("A Linear Algorithm For Generating Random Numbers
// With a Given Distribution", IEEE TSE 17, 1991).
//
// Each index owns a column of equal height, which it shares with at most one
// other index. All heights are integers, so the shares are exact.
type Alias struct {
	columns uint64
	height  uint64

	// Index i has the part of column i that lies below own[i]; the rest
	// belongs to other[i]. Both are nil if every column has one owner, as with
	// equal weights, the usual case, which then costs no memory.
	own   []uint64
	other []int32
}

// NewAlias returns an Alias over the weights, of which there must be at least
// one. An index without a positive weight is never drawn; if no index has one,
// all are equal. The sum of the weights times their number must be less than
// 1<<63.
func NewAlias(weights []int) *Alias {
	own, total := reduced(weights)
	a := &Alias{columns: uint64(len(own)), height: total}
	if total == a.columns && !slices.Contains(own, 0) {
		return a
	}

	// In units in which a column is as high as the total weight, index i needs
	// weight × columns. Those who need less than a column wait on one stack,
	// the others on a second, which grows from the other end of the same array.
	a.own, a.other = own, make([]int32, len(own))
	stacks := make([]int32, len(own))
	small, large := 0, len(own)
	for i := range own {
		own[i] *= a.columns
		if own[i] < a.height {
			stacks[small] = int32(i)
			small++
		} else {
			large--
			stacks[large] = int32(i)
		}
	}
	for small > 0 {
		small--
		i, donor := stacks[small], stacks[large]
		a.other[i] = donor
		own[donor] -= a.height - own[i]
		if own[donor] < a.height {
			large++
			stacks[small] = donor
			small++
		}
	}
	return a
}

// Pick draws an index.
func (a *Alias) Pick() int {
	i := rand.Uint64N(a.columns)
	if a.own != nil && rand.Uint64N(a.height) >= a.own[i] {
		return int(a.other[i])
	}
	return int(i)
}
