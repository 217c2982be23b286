package balance

import (
	"cmp"
	"math/bits"
	"math/rand/v2"
	"slices"
)

// maxSlots is the length of the longest schedule that is written out. It
// bounds the memory of a Rotation to 16 KB where the weights are few and odd.
const maxSlots = 4096

// Rotation deals indices out in turn, in proportion to their weights and as
// evenly as can be: pick n is a function of n alone, so any number of
// goroutines share one by sharing an atomic counter. Over as many consecutive
// picks as the total weight, divided by the greatest common divisor of the
// weights, each index gets its weight exactly.
//
// While that total is small the turns are written out in advance, and no index
// is ever as far as 1 from its ideal number of picks, counted from the start
// of a cycle. Otherwise a tree of forks finds whose turn pick n is among the
// different weights, in some log2 of their number of steps, and the indices of
// one weight take turns. Then no index is further than 3.36 from its ideal
// number of picks over any stretch, of whatever length.
type Rotation struct {
	total uint64

	// slots is one cycle. It is nil if there is a tree, and also if every
	// index has the same weight, when pick n is n mod total.
	slots []int32

	forks  []fork
	groups []group
}

// NewRotation returns a Rotation over the weights, of which there must be at
// least one. An index without a positive weight is never dealt; if no index
// has one, all are equal. The sum of the weights must be less than 1<<62.
func NewRotation(weights []int) *Rotation {
	shares, total := reduced(weights)
	indices := make([]int32, 0, len(shares))
	for i, s := range shares {
		if s > 0 {
			indices = append(indices, int32(i))
		}
	}
	r := &Rotation{total: total}
	areEqual := total == uint64(len(indices))
	switch {
	case areEqual && len(indices) == len(shares):
	case areEqual:
		r.slots = indices
	case total <= maxSlots:
		r.slots = newSchedule(indices, shares, total)
	default:
		r.groups = newGroups(indices, shares)
		r.forks = newForks(r.groups)
	}
	return r
}

// At returns pick n.
func (r *Rotation) At(n uint64) int {
	n %= r.total
	switch {
	case r.slots != nil:
		return int(r.slots[n])
	case r.forks != nil:
		g, rank := descend(r.forks, n)
		return r.groups[g].pick(rank)
	default:
		return int(n)
	}
}

// RandomPhase returns a random value at which to start a counter of picks,
// since many processes that started at the same value would move in step. It
// leaves the counter room never to wrap.
func RandomPhase() uint64 { return rand.Uint64() >> 1 }

// newSchedule writes out one cycle in which, after every pick, each index is
// less than 1 away from its ideal number of picks. To be so, pick j of an index
// of weight w has to fall into slots ⌊j·total/w⌋ to ⌈(j+1)·total/w⌉-1. Of the
// indices whose window is open, the one whose window closes first goes first,
// which misses none (R. Tijdeman, "The chairman assignment problem", Discrete
// Mathematics 32, 1980; S. K. Baruah et al., "Proportionate Progress",
// Algorithmica 15, 1996).
func newSchedule(indices []int32, shares []uint64, total uint64) []int32 {
	slots := make([]int32, total)

	// opening[t] is the first, and next[i] the following, of the list of the
	// indices whose window opens at slot t.
	const none = -1
	opening := slices.Repeat([]int32{none}, int(total)+1)
	next := make([]int32, len(shares))
	for _, i := range slices.Backward(indices) {
		next[i], opening[0] = opening[0], i
	}

	dealt := make([]uint64, len(shares))
	var open deadlines
	for t := range slots {
		for i := opening[t]; i != none; i = next[i] {
			closing := ((dealt[i]+1)*total + shares[i] - 1) / shares[i]
			open.push(deadline{closing, i})
		}
		i := open.pop().index
		slots[t] = i
		dealt[i]++
		if dealt[i] < shares[i] {
			opens := max(int(dealt[i]*total/shares[i]), t+1)
			next[i], opening[opens] = opening[opens], i
		}
	}
	return slots
}

// deadline is the slot before which an index must have its next pick.
type deadline struct {
	slot  uint64
	index int32
}

func (d deadline) isBefore(e deadline) bool {
	return d.slot < e.slot || d.slot == e.slot && d.index < e.index
}

// deadlines is a binary heap, the earliest on top.
type deadlines []deadline

func (h *deadlines) push(d deadline) {
	*h = append(*h, d)
	s := *h
	for at := len(s) - 1; at > 0; {
		parent := (at - 1) / 2
		if !s[at].isBefore(s[parent]) {
			break
		}
		s[at], s[parent] = s[parent], s[at]
		at = parent
	}
}

func (h *deadlines) pop() deadline {
	s := *h
	top, last := s[0], len(s)-1
	s[0] = s[last]
	s = s[:last]
	*h = s
	for at := 0; ; {
		child := 2*at + 1
		if child >= len(s) {
			return top
		}
		if child+1 < len(s) && s[child+1].isBefore(s[child]) {
			child++
		}
		if !s[child].isBefore(s[at]) {
			return top
		}
		s[at], s[child] = s[child], s[at]
		at = child
	}
}

// group is the indices that have the same weight.
type group struct {
	share   uint64 // of each
	members []int32
}

// newGroups groups the indices by share, each group in ascending order.
func newGroups(indices []int32, shares []uint64) (groups []group) {
	places := make(map[uint64]int)
	var sizes []int
	for _, i := range indices {
		g, ok := places[shares[i]]
		if !ok {
			g = len(groups)
			places[shares[i]] = g
			groups, sizes = append(groups, group{share: shares[i]}), append(sizes, 0)
		}
		sizes[g]++
	}
	memory := make([]int32, len(indices)) // of all members at once
	for g, size := range sizes {
		groups[g].members, memory = memory[:0:size], memory[size:]
	}
	for _, i := range indices {
		g := &groups[places[shares[i]]]
		g.members = append(g.members, i)
	}
	return groups
}

// weight is that of all members together.
func (g *group) weight() uint64 { return g.share * uint64(len(g.members)) }

// pick returns the index that has the group's pick n. So a member of a group of
// several is less than 1 off its share of the group's picks, and inherits a half
// at most of what the group is off.
func (g *group) pick(n uint64) int { return int(g.members[n%uint64(len(g.members))]) }

// fork is an inner node of a tree whose leaves are groups. It deals the picks
// that reach it out to two sides as Bresenham's line does: of its first k
// picks, k × slope go left, rounded. Thus each pick knows its rank on its side,
// and that is its rank at the next fork.
//
// Over any stretch a fork is less than 1 off for either side, of which a leaf
// below inherits its share: in all less than the sum, over the nodes from the
// leaf up to the root's child, of the leaf's weight by the node's. In a Huffman
// tree these nodes grow at least as the Fibonacci numbers do, so the sum is
// less than that of their reciprocals, 3.36; and no tree is a shorter way to
// the picks, since the heaviest leaves are next to the root.
type fork struct {
	slope       uint64 // the left side's share, as a fraction of 1<<64
	left, right int32  // a fork, or the complement of a group
}

// newForks returns a Huffman tree over the groups, by weight, the root last.
// There must be at least two.
func newForks(groups []group) []fork {
	leaves := make([]int32, len(groups))
	for g := range groups {
		leaves[g] = int32(g)
	}
	slices.SortStableFunc(leaves, func(a, b int32) int {
		return cmp.Compare(groups[a].weight(), groups[b].weight())
	})
	size := len(leaves) - 1
	forks := make([]fork, 0, size)
	weights := make([]uint64, 0, size) // of the forks: ascending, as the leaves are
	joined := 0
	lightest := func() (node int32, weight uint64) {
		if len(leaves) > 0 && (joined == len(forks) || groups[leaves[0]].weight() <= weights[joined]) {
			leaf := leaves[0]
			leaves = leaves[1:]
			return ^leaf, groups[leaf].weight()
		}
		joined++
		return int32(joined - 1), weights[joined-1]
	}
	for len(forks) < size {
		left, leftWeight := lightest()
		right, rightWeight := lightest()
		slope, _ := bits.Div64(leftWeight, 0, leftWeight+rightWeight)
		forks = append(forks, fork{slope, left, right})
		weights = append(weights, leftWeight+rightWeight)
	}
	return forks
}

// descend returns the group that pick n arrives at, and its rank there. The
// slopes are rounded down by less than 1<<-64, which the rounding of k × slope
// to the nearest integer makes up for: over a whole cycle each side gets its
// weight exactly.
func descend(forks []fork, n uint64) (leaf int, rank uint64) {
	node := int32(len(forks) - 1)
	for node >= 0 {
		f := &forks[node]
		rank, fraction := bits.Mul64(n, f.slope)
		fraction, up := bits.Add64(fraction, 1<<63, 0)
		rank += up
		_, isLeft := bits.Add64(fraction, f.slope, 0)
		left := -isLeft // all ones or none: which side it is can't be predicted, so a branch would cost more
		n = rank&left | (n-rank)&^left
		node = f.left&int32(left) | f.right&^int32(left)
	}
	return int(^node), n
}
