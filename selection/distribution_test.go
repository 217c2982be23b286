package selection_test

import (
	"math"
	"slices"
	"sync"
	"testing"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-consul/caddy-consul/internal/balance/balancetest"
	"github.com/caddy-consul/caddy-consul/internal/endpoint"
)

// expectedWeights returns the weights that a policy goes by, given Consul's.
func expectedWeights(weights []int, isWeighted bool) []int {
	if isWeighted {
		return weights
	}
	equal := make([]int, len(weights))
	for i, w := range weights {
		equal[i] = min(w, 1)
	}
	return equal
}

// checkShares fails the test if the counts are not in proportion to weights: by
// chance for a random policy, else to within 4 picks.
func checkShares(t *testing.T, counts, weights []int, isRandom bool) {
	t.Helper()
	ideals := balancetest.Ideals(weights)
	if isRandom {
		balancetest.CheckChiSquare(t, counts, ideals)
		return
	}
	picks := 0
	for _, c := range counts {
		picks += c
	}
	for i, got := range counts {
		want := ideals[i] * float64(picks)
		if math.Abs(float64(got)-want) > 4 {
			t.Errorf("upstream %d of weight %d: got %d of %d picks, want %.1f within 4", i, weights[i], got, picks, want)
		}
		if want == 0 && got > 0 {
			t.Errorf("upstream %d of weight %d: got %d picks, want none", i, weights[i], got)
		}
	}
}

var weightings = []struct {
	name    string
	weights []int
}{
	{"one", []int{3}},
	{"1:2:3", []int{1, 2, 3}},
	{"weight 0 gets nothing", []int{0, 2, 0, 5, 0}},
	{"nothing but weight 0", []int{0, 0, 0}},
	{"1,000 and 99 of 1", slices.Insert(slices.Repeat([]int{1}, 99), 0, 1000)},
	{"equal", slices.Repeat([]int{10}, 7)},
	{"large", []int{65535, 65521, 3, 4099, 12345}},
}

func TestNominationsFollowTheWeights(t *testing.T) {
	for _, pc := range policies {
		for _, tc := range weightings {
			t.Run(pc.name+"/"+tc.name, func(t *testing.T) {
				set := newSet(new(endpoint.Origin), tc.weights)
				counts := countNominations(provisioned(t, pc.fresh), set, 100_000)
				checkShares(t, counts, expectedWeights(tc.weights, pc.isWeighted), pc.isRandom)
			})
		}
	}
}

// What the source draws by in a policy's place must be what the policy goes by.
func TestSharesAreThoseOfTheNominations(t *testing.T) {
	for _, pc := range policies {
		t.Run(pc.name, func(t *testing.T) {
			p := provisioned(t, pc.fresh)
			weights := []int{0, 1, 3, 65535}
			for i, want := range expectedWeights(weights, pc.isWeighted) {
				if got := p.Share(&endpoint.Endpoint{Weight: weights[i]}); got != want {
					t.Errorf("share at weight %d: got %d, want %d", weights[i], got, want)
				}
			}
		})
	}
}

// A service with a placeholder in its name has many origins. If they shared a
// counter, two that are asked for by turns would each get every other turn: of
// two instances always the same.
func TestNominationsOfOriginsByTurns(t *testing.T) {
	for _, pc := range policies {
		t.Run(pc.name, func(t *testing.T) {
			p := provisioned(t, pc.fresh)
			weights := []int{1, 1}
			sets := []*endpoint.Set{
				newSet(new(endpoint.Origin), weights),
				newSet(new(endpoint.Origin), weights),
				newSet(new(endpoint.Origin), weights),
				newSet(new(endpoint.Origin), weights),
			}
			counts := make([][]int, len(sets))
			for i := range sets {
				counts[i] = make([]int, len(weights))
			}
			for range 10_000 {
				for i, set := range sets {
					counts[i][p.Nominate(set, nil)]++
				}
			}
			for i := range sets {
				checkShares(t, counts[i], weights, pc.isRandom)
			}
		})
	}
}

func TestConcurrentNominationsKeepTheShares(t *testing.T) {
	const workers, picksEach = 4, 6_000
	for _, pc := range policies {
		t.Run(pc.name, func(t *testing.T) {
			p := provisioned(t, pc.fresh)
			weights := []int{1, 2, 3, 0, 6}
			set := newSet(new(endpoint.Origin), weights)
			counts := make([][]int, workers)
			var wg sync.WaitGroup
			for w := range workers {
				wg.Go(func() { counts[w] = countNominations(p, set, picksEach) })
			}
			wg.Wait()
			checkShares(t, sum(counts), expectedWeights(weights, pc.isWeighted), pc.isRandom)
		})
	}
}

// Sets change while requests nominate from the old and the new.
func TestConcurrentNominationsOverChangingSets(t *testing.T) {
	for _, pc := range policies {
		t.Run(pc.name, func(t *testing.T) {
			p := provisioned(t, pc.fresh)
			origins := []*endpoint.Origin{new(endpoint.Origin), new(endpoint.Origin)}
			var wg sync.WaitGroup
			for w := range 4 {
				wg.Go(func() {
					for n := range 500 {
						set := newSet(origins[n%len(origins)], slices.Repeat([]int{1}, 1+(n+w)%5))
						for range 5 {
							if i := p.Nominate(set, nil); i < 0 || i >= set.Len() {
								t.Errorf("nominee: got index %d, want one below %d", i, set.Len())
							}
						}
					}
				})
			}
			wg.Wait()
		})
	}
}

func TestNominateDoesNotAllocate(t *testing.T) {
	for _, pc := range policies {
		t.Run(pc.name, func(t *testing.T) {
			p := provisioned(t, pc.fresh)
			sets := []*endpoint.Set{
				newSet(&endpoint.Origin{Name: "first"}, []int{1, 2, 3}),
				newSet(&endpoint.Origin{Name: "second"}, []int{1, 2, 3}),
			}
			got := testing.AllocsPerRun(100, func() {
				for _, set := range sets {
					p.Nominate(set, nil)
				}
			})
			if got != 0 {
				t.Errorf("nominations: got %v allocations, want none", got)
			}
		})
	}
}

func TestSelectionsFromAForeignPoolAreEqual(t *testing.T) {
	for _, pc := range policies {
		t.Run(pc.name, func(t *testing.T) {
			counts := countSelections(t, provisioned(t, pc.fresh), newPool(7), newRequest(), 30_000)
			checkShares(t, counts, slices.Repeat([]int{1}, 7), pc.isRandom)
		})
	}
}

func TestSelectionsFromAnOfferFollowTheWeights(t *testing.T) {
	for _, pc := range policies {
		for _, tc := range weightings {
			t.Run(pc.name+"/"+tc.name, func(t *testing.T) {
				r := newRequest()
				pool := offered(r, "source", newSet(new(endpoint.Origin), tc.weights))
				counts := countSelections(t, provisioned(t, pc.fresh), pool, r, 100_000/len(pool))
				checkShares(t, counts, expectedWeights(tc.weights, pc.isWeighted), pc.isRandom)
			})
		}
	}
}

// Caddy's `multi` mixes the upstreams of several sources, of which some may be
// foreign.
func TestSelectionsFromSeveralSources(t *testing.T) {
	for _, pc := range policies {
		t.Run(pc.name, func(t *testing.T) {
			r := newRequest()
			pool := slices.Concat(
				offered(r, "first", newSet(new(endpoint.Origin), []int{4, 0, 2})),
				newPool(2),
				offered(r, "second", newSet(new(endpoint.Origin), []int{3})),
			)
			counts := countSelections(t, provisioned(t, pc.fresh), pool, r, 30_000)
			checkShares(t, counts, expectedWeights([]int{4, 0, 2, 1, 1, 3}, pc.isWeighted), pc.isRandom)
		})
	}
}

// The next one in turn must not inherit the load of one that is down.
func TestSelectionsLeaveOutTheUnavailable(t *testing.T) {
	for _, pc := range policies {
		t.Run(pc.name, func(t *testing.T) {
			pool := newPool(5)
			breakers := provisionBreakers(t, pool)
			p := provisioned(t, pc.fresh)
			r := newRequest()
			for _, open := range []map[int]int{{2: 1}, {0: 1, 1: 1, 4: 1}, {}} {
				want := slices.Repeat([]int{1}, len(pool))
				for i, b := range breakers {
					b.isOpen.Store(open[i] == 1)
					want[i] -= open[i]
				}
				counts := countSelections(t, p, pool, r, 20_000)
				checkShares(t, counts, want, pc.isRandom)
			}
		})
	}
}

// An instance of weight 0 is the last resort, not dead.
func TestSelectionsFallBackToWeightZero(t *testing.T) {
	for _, pc := range policies {
		t.Run(pc.name, func(t *testing.T) {
			r := newRequest()
			pool := offered(r, "source", newSet(new(endpoint.Origin), []int{0, 5, 0}))
			provisionBreakers(t, pool)[1].isOpen.Store(true)
			counts := countSelections(t, provisioned(t, pc.fresh), pool, r, 10_000)
			checkShares(t, counts, []int{1, 0, 1}, pc.isRandom)
		})
	}
}

func TestSelectionsFromNothing(t *testing.T) {
	down := newPool(2)
	for _, b := range provisionBreakers(t, down) {
		b.isOpen.Store(true)
	}
	tests := []struct {
		name string
		pool reverseproxy.UpstreamPool
	}{
		{"nil", nil},
		{"empty", reverseproxy.UpstreamPool{}},
		{"none available", down},
	}
	for _, pc := range policies {
		for _, tc := range tests {
			t.Run(pc.name+"/"+tc.name, func(t *testing.T) {
				if got := provisioned(t, pc.fresh).Select(tc.pool, newRequest(), nil); got != nil {
					t.Errorf("selection: got %s, want none", got)
				}
			})
		}
	}
}

// While one of two is down, a request may find that others have taken all the
// turns of the one that is up: Caddy's round robin then selects none.
func TestConcurrentSelectionsFindTheOneThatIsUp(t *testing.T) {
	pool := newPool(2)
	provisionBreakers(t, pool)[0].isOpen.Store(true)
	for _, pc := range policies {
		t.Run(pc.name, func(t *testing.T) {
			p := provisioned(t, pc.fresh)
			var wg sync.WaitGroup
			for range 4 {
				wg.Go(func() {
					r := newRequest()
					for range 10_000 {
						if got := p.Select(pool, r, nil); got != pool[1] {
							t.Errorf("selection: got %v, want %s", got, pool[1])
							return
						}
					}
				})
			}
			wg.Wait()
		})
	}
}

func sum(counts [][]int) []int {
	total := make([]int, len(counts[0]))
	for _, c := range counts {
		for i := range c {
			total[i] += c[i]
		}
	}
	return total
}
