package balance

import "math/rand/v2"

// Reservoir draws one of the items that it is offered one after the other, at
// random in proportion to their weights, without knowing how many are to come:
// reservoir sampling of one item (M. T. Chao, "A general purpose unequal
// probability sampling plan", Biometrika 69, 1982). It is for choices among
// what is usable at the moment, for which nothing can be computed in advance.
//
// The zero value is ready. A Reservoir belongs to one goroutine.
type Reservoir struct {
	total      uint64 // weight of the items offered so far
	lastResort uint64 // number of items without a weight offered so far
}

// Offer reports whether the item becomes the choice, in place of the one
// before. Items without a positive weight are a last resort: equal among
// themselves, and chosen only while no item with a weight has been offered.
func (v *Reservoir) Offer(weight int) bool {
	if weight > 0 {
		v.total += uint64(weight)
		return rand.Uint64N(v.total) < uint64(weight)
	}
	if v.total > 0 {
		return false
	}
	v.lastResort++
	return rand.Uint64N(v.lastResort) == 0
}
