package selection_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/caddy-consul/caddy-consul/internal/endpoint"
	"github.com/caddy-consul/caddy-consul/selection"
)

// setOf returns a Set of instances named by the fields of names; one with a
// trailing "!" has weight 0.
func setOf(origin *endpoint.Origin, names string) *endpoint.Set {
	var endpoints []endpoint.Endpoint
	for _, name := range strings.Fields(names) {
		name, isDrained := strings.CutSuffix(name, "!")
		e := endpoint.Endpoint{Dial: name + ":80", Node: "node", ID: name, Weight: 1}
		if isDrained {
			e.Weight = 0
		}
		endpoints = append(endpoints, e)
	}
	return endpoint.NewSet(origin, endpoints)
}

// nominees returns the names of the next n nominees of set.
func nominees(p endpoint.Nominator, set *endpoint.Set, n int) []string {
	names := make([]string, n)
	for i := range names {
		names[i] = set.At(p.Nominate(set, nil)).ID
	}
	return names
}

// serveUntil nominates from set until the one of the name has been served.
func serveUntil(t *testing.T, p endpoint.Nominator, set *endpoint.Set, name string) {
	t.Helper()
	for range set.Len() {
		if nominees(p, set, 1)[0] == name {
			return
		}
	}
	t.Fatalf("a whole round of nominees: got none of name %s, want one", name)
}

func TestRoundRobinCarriesOnWhenTheSetChanges(t *testing.T) {
	tests := []struct {
		name   string
		before string
		last   string // the one that is served last before the change
		after  string
		want   string // those that are served next
	}{
		{"the same again", "a b c d", "b", "a b c d", "c d a b c"},
		{"one comes in before", "b c d", "c", "a b c d", "d a b c"},
		{"one comes in right after", "a b d", "b", "a b c d", "c d a b"},
		{"one comes in at the end", "a b c", "c", "a b c d", "d a b c"},
		{"one goes before", "a b c d", "c", "b c d", "d b c d"},
		{"the last served goes", "a b c d", "b", "a c d", "c d a c"},
		{"the last served goes from the end", "a b c", "c", "a b", "a b a"},
		{"the next goes", "a b c d", "b", "a b d", "d a b"},
		{"shrinks to one before", "a b c d e", "d", "b", "b b"},
		{"shrinks to the last served", "a b c d e", "d", "d", "d d"},
		{"grows from one", "c", "c", "a b c d e", "d e a b c"},
		{"all are replaced", "a b c", "b", "x y z", "x y z x"},
		{"the next is drained", "a b c d", "b", "a b c! d", "d a b d"},
		{"the last served is drained", "a b c d", "b", "a b! c d", "c d a c"},
		{"all are drained", "a b c", "a", "a! b! c!", "b c a"},
		{"the order turns round", "a b c d", "b", "d c b a", "a d c b"},
		{"out of order, the last served goes", "d b c a", "b", "d c a", "c a d"},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			p, origin := new(selection.RoundRobin), new(endpoint.Origin)
			serveUntil(t, p, setOf(origin, tc.before), tc.last)
			want := strings.Fields(tc.want)
			got := nominees(p, setOf(origin, tc.after), len(want))
			if !slices.Equal(got, want) {
				t.Errorf("nominees after %s: got %v, want %v", tc.last, got, want)
			}
		})
	}
}

// Of two instances that were both there all the time, neither may ever be more
// than one pick ahead, however often others come and go.
func TestRoundRobinSharesStayEqualWhileOthersComeAndGo(t *testing.T) {
	phases := []string{"b e h", "a b e h", "b c d e h", "b e g h", "b e h i", "b e h! z", "b e h"}
	p, origin := new(selection.RoundRobin), new(endpoint.Origin)
	counts := map[string]int{}
	for n := range 2_000 {
		set := setOf(origin, phases[n%len(phases)])
		for _, name := range nominees(p, set, n%5) {
			counts[name]++
			if ahead := counts["b"] - counts["e"]; ahead < -1 || ahead > 1 {
				t.Fatalf("Set %d: got b %d and e %d times, want within 1", n, counts["b"], counts["e"])
			}
		}
	}
	if counts["b"] == 0 {
		t.Error("b: got no picks, want some")
	}
}

func TestRoundRobinStartsAnywhere(t *testing.T) {
	weights := slices.Repeat([]int{1}, 1000)
	set := newSet(new(endpoint.Origin), weights)
	starts := map[int]bool{}
	for range 20 {
		p := provisioned(t, func() policy { return new(selection.RoundRobin) })
		starts[p.Nominate(set, nil)] = true
	}
	if len(starts) < 10 {
		t.Errorf("first nominees of 20 policies: got %d different ones, want almost 20", len(starts))
	}
}
