package endpoint_test

import (
	"fmt"
	"slices"
	"testing"

	"github.com/caddy-consul/caddy-consul/internal/endpoint"
)

// setOf returns a Set of instances with the given weights, at 10.0.0.1:1,
// 10.0.0.1:2 and so on.
func setOf(weights ...int) *endpoint.Set {
	endpoints := make([]endpoint.Endpoint, len(weights))
	for i, weight := range weights {
		endpoints[i] = endpoint.Endpoint{Dial: fmt.Sprintf("10.0.0.1:%d", i+1), ID: fmt.Sprintf("web-%d", i+1), Weight: weight}
	}
	return endpoint.NewSet(&endpoint.Origin{Name: "web"}, endpoints)
}

func TestInstancesWithoutAWeightGetNoTrafficWhileAnotherHasOne(t *testing.T) {
	for _, tc := range []struct {
		name     string
		weights  []int
		eligible []int32
	}{
		{"all have one", []int{1, 2, 3}, []int32{0, 1, 2}},
		{"one has none", []int{1, 0, 3}, []int32{0, 2}},
		{"one has one", []int{0, 0, 3, 0}, []int32{2}},
		{"negative is none", []int{-5, 1}, []int32{1}},
		{"none has one", []int{0, 0}, []int32{0, 1}},
		{"single without", []int{0}, []int32{0}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			set := setOf(tc.weights...)
			if got := set.Eligible(); !slices.Equal(got, tc.eligible) {
				t.Errorf("eligible of the weights %v: got %v, want %v", tc.weights, got, tc.eligible)
			}
			for range 1000 {
				if got := int32(set.Alias().Pick()); !slices.Contains(tc.eligible, got) {
					t.Fatalf("drawn of the weights %v: got %d, want one of %v", tc.weights, got, tc.eligible)
				}
			}
		})
	}
}

func TestAnEmptySet(t *testing.T) {
	set := setOf()
	if set.Len() != 0 || len(set.Eligible()) != 0 || set.Alias() != nil || set.Rotation() != nil {
		t.Errorf("empty Set: got %d endpoints, %v eligible, want nothing", set.Len(), set.Eligible())
	}
}

func TestStatusNames(t *testing.T) {
	for status, want := range map[endpoint.Status]string{
		endpoint.Passing: "passing", endpoint.Warning: "warning", endpoint.Critical: "critical", endpoint.Maintenance: "maintenance",
	} {
		if got := status.String(); got != want {
			t.Errorf("status: got %q, want %q", got, want)
		}
	}
}

// A request that still holds the Set before must not pass for one with news.
func TestSetsAreOrderedByAge(t *testing.T) {
	origin := new(endpoint.Origin)
	before, after := endpoint.NewSet(origin, nil), endpoint.NewSet(origin, nil)
	if !before.IsOlderThan(after) || after.IsOlderThan(before) || after.IsOlderThan(after) {
		t.Error("of two Sets: got another one for the older, want the one that was made first")
	}
}
