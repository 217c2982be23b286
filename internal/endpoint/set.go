package endpoint

import (
	"sync/atomic"

	"github.com/caddy-consul/caddy-consul/internal/balance"
)

// Origin is the identity of a query: every Set made of its successive answers
// points to the same Origin, so that a policy can carry its position from one
// Set to the next.
type Origin struct {
	// Name says for logs and errors what the query asks for.
	Name string

	answers atomic.Uint64
}

// Set is an immutable snapshot of the instances of a service, in a stable
// order, with all that the policies need computed in advance. Any number of
// goroutines may read it.
type Set struct {
	origin    *Origin
	number    uint64 // among the Sets of the origin
	endpoints []Endpoint
	dials     []string // of the endpoints: small enough to be at hand in a processor's cache
	eligible  []int32
	alias     *balance.Alias
	rotation  *balance.Rotation
}

// NewSet returns a Set of the endpoints, which it takes over: the caller must
// not touch them again.
func NewSet(origin *Origin, endpoints []Endpoint) *Set {
	s := &Set{origin: origin, number: origin.answers.Add(1), endpoints: endpoints}
	if len(endpoints) == 0 {
		return s
	}
	weights := make([]int, len(endpoints))
	s.dials = make([]string, len(endpoints))
	s.eligible = make([]int32, 0, len(endpoints))
	for i := range endpoints {
		s.dials[i] = endpoints[i].Dial
		if endpoints[i].Weight > 0 {
			weights[i] = endpoints[i].Weight
			s.eligible = append(s.eligible, int32(i))
		}
	}
	if len(s.eligible) == 0 { // no instance has a weight: all are equal
		for i := range endpoints {
			weights[i] = 1
			s.eligible = append(s.eligible, int32(i))
		}
	}
	s.alias = balance.NewAlias(weights)
	s.rotation = balance.NewRotation(weights)
	return s
}

// Origin returns the identity of the query that s answers.
func (s *Set) Origin() *Origin { return s.origin }

// IsOlderThan reports whether s was made before another Set of the same Origin,
// as is the one that a request still holds while the next has already come.
func (s *Set) IsOlderThan(other *Set) bool { return s.number < other.number }

// Len returns the number of endpoints.
func (s *Set) Len() int { return len(s.endpoints) }

// At returns endpoint i. It must not be modified.
func (s *Set) At(i int) *Endpoint { return &s.endpoints[i] }

// Eligible returns the indices of the endpoints that may get traffic, in
// ascending order: those with a weight, or all if none has one. The slice must
// not be modified.
func (s *Set) Eligible() []int32 { return s.eligible }

// Alias draws endpoints at random in proportion to their weights. It is nil in
// an empty Set.
func (s *Set) Alias() *balance.Alias { return s.alias }

// Rotation deals endpoints out in turn in proportion to their weights. It is
// nil in an empty Set.
func (s *Set) Rotation() *balance.Rotation { return s.rotation }
