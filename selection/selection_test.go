package selection_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-consul/caddy-consul/internal/endpoint"
	"github.com/caddy-consul/caddy-consul/selection"
)

// policy is what each of the policies is.
type policy interface {
	caddy.Module
	caddyfile.Unmarshaler
	endpoint.Nominator
	reverseproxy.Selector
}

// policies are all of them, by what they promise.
var policies = []struct {
	name       string
	fresh      func() policy
	isWeighted bool
	isRandom   bool
}{
	{name: "consul_round_robin", fresh: func() policy { return new(selection.RoundRobin) }},
	{name: "consul_random", fresh: func() policy { return new(selection.Random) }, isRandom: true},
	{name: "consul_weighted_random", fresh: func() policy { return new(selection.WeightedRandom) }, isWeighted: true, isRandom: true},
	{name: "consul_weighted_round_robin", fresh: func() policy { return new(selection.WeightedRoundRobin) }, isWeighted: true},
}

// provisioned makes a policy ready as Caddy does.
func provisioned(t testing.TB, fresh func() policy) policy {
	t.Helper()
	p := fresh()
	if provisioner, ok := p.(caddy.Provisioner); ok {
		if err := provisioner.Provision(caddy.Context{Context: context.Background()}); err != nil {
			t.Fatalf("provisioning the policy: got error %v, want none", err)
		}
	}
	return p
}

// newSet returns a Set of endpoints of the weights, in the order of node and ID.
func newSet(origin *endpoint.Origin, weights []int) *endpoint.Set {
	endpoints := make([]endpoint.Endpoint, len(weights))
	for i, w := range weights {
		endpoints[i] = endpoint.Endpoint{
			Dial:   fmt.Sprintf("10.0.%d.%d:80", i/256, i%256),
			Node:   fmt.Sprintf("node-%05d", i),
			ID:     "web",
			Weight: w,
		}
	}
	return endpoint.NewSet(origin, endpoints)
}

// newRequest returns a request with what Caddy's server puts into its context.
func newRequest() *http.Request {
	r := httptest.NewRequest(http.MethodGet, "http://example.com/", nil)
	return caddyhttp.PrepareRequest(r, caddy.NewReplacer(), httptest.NewRecorder(), nil)
}

// newPool returns n available upstreams of nobody's source.
func newPool(n int) reverseproxy.UpstreamPool {
	pool := make(reverseproxy.UpstreamPool, n)
	for i := range pool {
		pool[i] = &reverseproxy.Upstream{Host: new(reverseproxy.Host), Dial: fmt.Sprintf("10.1.0.%d:80", i)}
	}
	return pool
}

// offered returns a pool of the endpoints of set as a source offers them.
func offered(r *http.Request, source any, set *endpoint.Set) reverseproxy.UpstreamPool {
	index := make([]int32, set.Len())
	for i := range index {
		index[i] = int32(i)
	}
	o, _ := endpoint.OfferTo(r, source)
	pool := o.Some(set, index)
	for _, u := range pool {
		u.Host = new(reverseproxy.Host)
	}
	return pool
}

// breaker is a circuit breaker that a test opens and closes: Caddy's own way to
// let somebody else say whether an upstream is available.
type breaker struct{ isOpen atomic.Bool }

func (b *breaker) OK() bool                      { return !b.isOpen.Load() }
func (*breaker) RecordMetric(int, time.Duration) {}

// provisionBreakers provisions each upstream of pool by a handler of its own,
// and returns the breakers that make them unavailable.
func provisionBreakers(t *testing.T, pool reverseproxy.UpstreamPool) []*breaker {
	t.Helper()
	ctx, err := caddy.ProvisionContext(new(caddy.Config))
	if err != nil {
		t.Fatalf("provisioning an empty config: got error %v, want none", err)
	}
	breakers := make([]*breaker, len(pool))
	for i, u := range pool {
		breakers[i] = new(breaker)
		handler := &reverseproxy.Handler{CB: breakers[i], Upstreams: reverseproxy.UpstreamPool{u}}
		if err := handler.Provision(ctx); err != nil {
			t.Fatalf("provisioning the handler of %s: got error %v, want none", u, err)
		}
		t.Cleanup(func() {
			if err := handler.Cleanup(); err != nil {
				t.Errorf("cleaning up the handler of %s: got error %v, want none", u, err)
			}
		})
	}
	return breakers
}

// countNominations returns how often each endpoint of set is nominated.
func countNominations(p policy, set *endpoint.Set, picks int) []int {
	counts := make([]int, set.Len())
	for range picks {
		counts[p.Nominate(set, nil)]++
	}
	return counts
}

// countSelections returns how often each upstream of pool is selected.
func countSelections(t *testing.T, p policy, pool reverseproxy.UpstreamPool, r *http.Request, picks int) []int {
	t.Helper()
	place := make(map[*reverseproxy.Upstream]int, len(pool))
	for i, u := range pool {
		place[u] = i
	}
	counts := make([]int, len(pool))
	for range picks {
		u := p.Select(pool, r, nil)
		if u == nil {
			t.Fatal("got no upstream, want an available one")
		}
		counts[place[u]]++
	}
	return counts
}
