package consulupstreams

import (
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"sync"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"github.com/hashicorp/consul/api"

	"github.com/caddy-consul/caddy-consul/internal/balance/balancetest"
)

// policies is every policy that the source knows how to serve, and what it
// offers for it out of ten instances.
var policies = []struct {
	name    string
	config  object // nil: none
	offered int
}{
	{"none", nil, 1},
	{"random", object{"policy": "random"}, 1},
	{"consul_round_robin", object{"policy": "consul_round_robin"}, 1},
	{"consul_random", object{"policy": "consul_random"}, 1},
	{"consul_weighted_random", object{"policy": "consul_weighted_random"}, 1},
	{"consul_weighted_round_robin", object{"policy": "consul_weighted_round_robin"}, 1},
	{"random_choose", object{"policy": "random_choose"}, 2},
	{"random_choose 4", object{"policy": "random_choose", "choose": 4}, 4},
	{"round_robin", object{"policy": "round_robin"}, 10},
	{"least_conn", object{"policy": "least_conn"}, 10},
	{"first", object{"policy": "first"}, 10},
	{"ip_hash", object{"policy": "ip_hash"}, 10},
	{"uri_hash", object{"policy": "uri_hash"}, 10},
	{"header with ours as its fallback", object{
		"policy": "header", "field": "X", "fallback": object{"policy": "consul_weighted_random"},
	}, 10},
	{"cookie", object{"policy": "cookie"}, 10},
}

// balancing is the load balancing config of a policy with so many retries.
func balancing(policy object, retries int) object {
	lb := object{"retries": retries}
	if policy != nil {
		lb["selection_policy"] = policy
	}
	return lb
}

// offered returns what the source offers to a fresh request.
func offered(t testing.TB, p *proxy) []*reverseproxy.Upstream {
	t.Helper()
	_, r := newRequest()
	pool, err := p.DynamicUpstreams.GetUpstreams(r)
	if err != nil {
		t.Fatalf("upstreams: got error %v, want none", err)
	}
	return pool
}

// Caddy pays for each upstream that it is offered.
func TestNoMoreIsOfferedThanThePolicyNeeds(t *testing.T) {
	for _, passive := range []bool{false, true} {
		for _, tc := range policies {
			t.Run(fmt.Sprintf("%s, passive health %t", tc.name, passive), func(t *testing.T) {
				consul := newFakeConsul(t)
				ten := instances(10, 1)
				consul.set(ten...)
				config := object{"load_balancing": balancing(tc.config, 0)}
				if passive {
					config["health_checks"] = object{"passive": object{"fail_duration": "1h"}}
				}
				p := newProxy(t, consul, config, nil)
				p.await(t, ten...)
				for range 200 { // Caddy has seen each instance then
					wantStatus(t, "request", p.get(), http.StatusOK)
				}
				for range 50 {
					if got := offered(t, p); len(got) != tc.offered {
						t.Fatalf("upstreams offered of 10: got %d, want %d", len(got), tc.offered)
					}
				}
			})
		}
	}
}

func TestBelowMultiEveryInstanceIsOffered(t *testing.T) {
	consul := newFakeConsul(t)
	web, other := instances(3, 1), instances(4, 1)
	consul.set(web...)
	consul.setService("other", other...)
	source := func(service string) object {
		return object{"source": "consul", "service": service, "address": consul.server.URL}
	}
	for _, policy := range []string{"random", "consul_round_robin", "consul_weighted_random"} {
		t.Run(policy, func(t *testing.T) {
			p := loadProxy(t, object{
				"dynamic_upstreams": object{"source": "multi", "sources": []object{source("web"), source("other")}},
				"load_balancing":    balancing(object{"policy": policy}, 0),
			})
			if got := len(offered(t, p)); got != 7 {
				t.Errorf("upstreams offered of two services with 3 and 4 instances: got %d, want 7", got)
			}
			all := append(addressesOf(web), addressesOf(other)...)
			for range 3000 {
				wantStatus(t, "request", p.get(), http.StatusOK)
			}
			counts := p.counts(all)
			if policy == "consul_round_robin" {
				if slices.Max(counts)-slices.Min(counts) > 1 {
					t.Errorf("requests of each: got %v, want equal ones", counts)
				}
				return
			}
			balancetest.CheckChiSquare(t, counts, balancetest.Ideals(slices.Repeat([]int{1}, 7)))
		})
	}
}

func TestSharesFollowTheWeights(t *testing.T) {
	weights := []int{1, 2, 5, 0, 12}
	equal := []int{1, 1, 1, 0, 1}
	for _, tc := range []struct {
		policy string
		want   []int
	}{{"", weights}, {"random", weights}, {"consul_weighted_random", weights}, {"consul_weighted_round_robin", weights}, {"consul_random", equal}, {"consul_round_robin", equal}, {"random_choose", equal}} {
		for _, passive := range []bool{false, true} {
			t.Run(fmt.Sprintf("policy %q, passive health %t", tc.policy, passive), func(t *testing.T) {
				consul := newFakeConsul(t)
				var entries []*api.ServiceEntry
				for _, weight := range weights {
					entries = append(entries, instance(weight))
				}
				consul.set(entries...)
				config := object{}
				if tc.policy != "" {
					config["load_balancing"] = balancing(object{"policy": tc.policy}, 0)
				}
				if passive {
					config["health_checks"] = object{"passive": object{"fail_duration": "1h"}}
				}
				p := newProxy(t, consul, config, nil)
				p.await(t, entries...)
				for range 2000 {
					wantStatus(t, "request", p.get(), http.StatusOK)
				}
				balancetest.CheckChiSquare(t, p.counts(addressesOf(entries)), balancetest.Ideals(tc.want))
			})
		}
	}
}

// An instance that is drained by its weight serves when there is nothing else.
func TestInstancesWithoutAWeightAreTheLastResort(t *testing.T) {
	for _, tc := range policies {
		t.Run(tc.name, func(t *testing.T) {
			consul := newFakeConsul(t)
			pair := []*api.ServiceEntry{instance(0), instance(0)}
			consul.set(pair...)
			p := newProxy(t, consul, object{"load_balancing": balancing(tc.config, 0)}, nil)
			p.await(t, pair...)
			wantStatus(t, "request for a service without any weight", p.get(), http.StatusOK)
		})
	}
}

// Nothing in Caddy keeps a retry from going to the instance that has just
// failed.
func TestARetryGoesToAnotherInstance(t *testing.T) {
	for _, passive := range []bool{false, true} {
		for _, tc := range policies {
			t.Run(fmt.Sprintf("%s, passive health %t", tc.name, passive), func(t *testing.T) {
				consul := newFakeConsul(t)
				three := instances(3, 1)
				consul.set(three...)
				config := object{"load_balancing": balancing(tc.config, 2)}
				if passive { // that never strikes
					config["health_checks"] = object{"passive": object{"fail_duration": "1h", "max_fails": 1_000_000}}
				}
				p := newProxy(t, consul, config, nil)
				p.await(t, three...)
				p.kill(addressOf(three[0]), addressOf(three[1]))
				for i := range 200 {
					id := strconv.Itoa(i)
					wantStatus(t, "request with one of three alive", p.getWith(http.Header{"Id": {id}}), http.StatusOK)
					tried := p.attempts[id]
					if slices.Sort(tried); len(slices.Compact(slices.Clone(tried))) != len(tried) {
						t.Fatalf("attempts: got %v, want each instance at most once", tried)
					}
				}
			})
		}
	}
}

// When every instance has been tried, an earlier one is better than none.
func TestRetriesBeyondTheInstances(t *testing.T) {
	for _, tc := range policies {
		t.Run(tc.name, func(t *testing.T) {
			consul := newFakeConsul(t)
			pair := instances(2, 1)
			consul.set(pair...)
			p := newProxy(t, consul, object{"load_balancing": balancing(tc.config, 5)}, nil)
			p.await(t, pair...)
			p.kill(addressesOf(pair)...)
			wantStatus(t, "request with all dead", p.getWith(http.Header{"Id": {"x"}}), http.StatusBadGateway)
			if got := len(p.attempts["x"]); got != 6 {
				t.Errorf("attempts: got %d, want 6", got)
			}
		})
	}
}

// A deployment replaces instances while requests are under way.
func TestTheServiceChangesBetweenAttempts(t *testing.T) {
	for _, tc := range policies {
		t.Run(tc.name, func(t *testing.T) {
			consul := newFakeConsul(t)
			before, after := instances(3, 1), instances(2, 1)
			consul.set(before...)
			p := newProxy(t, consul, object{"load_balancing": balancing(tc.config, 1)}, nil)
			p.await(t, before...)
			p.kill(addressesOf(before)...)
			var once sync.Once
			p.before = func(string, *http.Request) {
				once.Do(func() {
					consul.set(after...)
					p.await(t, after...)
				})
			}
			got := p.get()
			wantStatus(t, "request whose service changes after its first attempt", got, http.StatusOK)
			if !slices.Contains(addressesOf(after), got.servedBy) {
				t.Errorf("served by: got %s, want one of the new instances", got.servedBy)
			}
		})
	}
}

// All at once, for the race detector above all: requests, retries, changes,
// instances that die, and a second proxy to the same instances.
func TestRequestsWhileTheServiceChanges(t *testing.T) {
	for _, tc := range policies {
		t.Run(tc.name, func(t *testing.T) {
			consul := newFakeConsul(t)
			all := instances(12, 1)
			consul.set(all[:6]...)
			config := object{
				"load_balancing": balancing(tc.config, 3),
				"health_checks":  object{"passive": object{"fail_duration": "20ms", "max_fails": 1}},
			}
			p, second := newProxy(t, consul, config, nil), newProxy(t, consul, config, nil)
			p.await(t, all[:6]...)
			p.kill(addressOf(all[5]))
			var group sync.WaitGroup
			for range 4 {
				group.Go(func() {
					for range 100 {
						wantStatus(t, "request", p.get(), http.StatusOK)
						wantStatus(t, "request to the second proxy", second.get(), http.StatusOK)
					}
				})
			}
			for i := range 30 {
				consul.set(all[i%6 : i%6+6]...)
			}
			group.Wait()
		})
	}
}

// Real instances, one of them on a Unix socket and two of them gone.
func TestRealInstances(t *testing.T) {
	consul := newFakeConsul(t)
	var entries []*api.ServiceEntry
	for range 3 {
		backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, _ = fmt.Fprint(w, r.Header.Get("Instance"))
		}))
		defer backend.Close()
		entries = append(entries, instanceAt(backend.Listener.Addr().String(), 1))
		if len(entries) > 1 {
			backend.Close()
		}
	}
	socket := t.TempDir() + "/web.sock"
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := &httptest.Server{Listener: listener, Config: &http.Server{ //nolint:gosec // of a test
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = fmt.Fprint(w, r.Header.Get("Instance")) }),
	}}
	server.Start()
	defer server.Close()
	entries = append(entries, instance(1))
	entries[3].Service.SocketPath, entries[3].Service.ID = socket, "on-a-socket"
	consul.set(entries...)
	p := newProxy(t, consul, object{
		"load_balancing": balancing(nil, 2),
		"headers":        object{"request": object{"set": object{"Instance": []string{"{http.reverse_proxy.upstreams.consul.id}"}}}},
	}, nil)
	p.Transport = &reverseproxy.HTTPTransport{}
	ctx, cancel := caddy.NewContext(caddy.Context{Context: t.Context()})
	defer cancel()
	if err := p.Transport.(*reverseproxy.HTTPTransport).Provision(ctx); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		if set := p.set(); set == nil || set.Len() != 4 {
			return fmt.Errorf("instances: got %v, want 4", set)
		}
		return nil
	})
	served := make(map[string]int)
	for range 60 {
		w, r := newRequest()
		if err := p.ServeHTTP(w, r, nil); err != nil {
			t.Fatalf("request with two of four alive: got error %v, want none", err)
		}
		served[w.Body.String()]++
	}
	if len(served) != 2 || served["on-a-socket"] == 0 || served[entries[0].Service.ID] == 0 {
		t.Errorf("instances that served: got %v, want the one on a socket and %s", served, entries[0].Service.ID)
	}
}

// A test of some other plugin may call the source with a bare request.
func TestABareRequest(t *testing.T) {
	for _, tc := range policies {
		t.Run(tc.name, func(t *testing.T) {
			consul := newFakeConsul(t)
			pair := instances(2, 1)
			consul.set(pair...)
			p := newProxy(t, consul, object{"load_balancing": balancing(tc.config, 0)}, nil)
			p.await(t, pair...)
			r := httptest.NewRequest(http.MethodGet, "/", nil)
			pool, err := p.DynamicUpstreams.GetUpstreams(r)
			if err != nil || len(pool) == 0 {
				t.Errorf("got %v, error %v, want upstreams", pool, err)
			}
		})
	}
}

var benchSizes = []int{3, 10, 100, 1000, 10000}

// benchPolicies are those for which the source nominates.
var benchPolicies = []string{"none", "consul_round_robin", "consul_random", "consul_weighted_random", "consul_weighted_round_robin"}

// benchProxy returns a proxy whose service has n instances of various weights.
func benchProxy(b *testing.B, policy string, n int, passive bool) *proxy {
	b.Helper()
	consul := newFakeConsul(b)
	entries := make([]*api.ServiceEntry, n)
	for i := range entries {
		entries[i] = instance(1 + i*7919%100)
	}
	consul.set(entries...)
	config := object{}
	if policy != "none" {
		config["load_balancing"] = balancing(object{"policy": policy}, 0)
	}
	if passive {
		config["health_checks"] = object{"passive": object{"fail_duration": "1h"}}
	}
	p := newProxy(b, consul, config, nil)
	p.await(b, entries...)
	return p
}

// recycled is a request that is made as new without an allocation.
type recycled struct {
	*http.Request
	vars  map[string]any
	repl  *caddy.Replacer
	fresh caddy.Replacer
}

func newRecycled() *recycled {
	_, r := newRequest()
	repl := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	return &recycled{r, r.Context().Value(caddyhttp.VarsCtxKey).(map[string]any), repl, *repl}
}

// renew makes the request forget what it was offered.
func (r *recycled) renew() {
	clear(r.vars)
	*r.repl = r.fresh // of which nobody has a copy that outlives the loop
}

// choose does what Caddy does to choose an upstream, without what it would do
// with any source's.
func choose(p *proxy, r *http.Request) *reverseproxy.Upstream {
	pool, err := p.source.GetUpstreams(r)
	if err != nil {
		panic(err)
	}
	for _, u := range pool {
		u.Host = sharedHost
	}
	return p.LoadBalancing.SelectionPolicy.Select(pool, r, nil)
}

var sharedHost = new(reverseproxy.Host)

func BenchmarkChoose(b *testing.B) {
	for _, policy := range benchPolicies {
		for _, n := range benchSizes {
			b.Run(fmt.Sprintf("%s/n=%d", policy, n), func(b *testing.B) {
				p := benchProxy(b, policy, n, false)
				r := newRecycled()
				b.ReportAllocs()
				for b.Loop() {
					r.renew()
					if choose(p, r.Request) == nil {
						b.Fatal("got no upstream")
					}
				}
			})
		}
	}
}

func BenchmarkChooseInParallel(b *testing.B) {
	for _, policy := range benchPolicies {
		for _, n := range benchSizes {
			b.Run(fmt.Sprintf("%s/n=%d", policy, n), func(b *testing.B) {
				p := benchProxy(b, policy, n, false)
				b.ReportAllocs()
				b.ResetTimer()
				b.RunParallel(func(pb *testing.PB) {
					r := newRecycled()
					for pb.Next() {
						r.renew()
						if choose(p, r.Request) == nil {
							b.Error("got no upstream")
						}
					}
				})
			})
		}
	}
}

func BenchmarkChooseWithPassiveHealth(b *testing.B) {
	for _, policy := range benchPolicies {
		for _, n := range benchSizes {
			b.Run(fmt.Sprintf("%s/n=%d", policy, n), func(b *testing.B) {
				p := benchProxy(b, policy, n, true)
				r := newRecycled()
				b.ReportAllocs()
				for b.Loop() {
					r.renew()
					if choose(p, r.Request) == nil {
						b.Fatal("got no upstream")
					}
				}
			})
		}
	}
}

// BenchmarkServe is the whole of Caddy's proxy without the network.
func BenchmarkServe(b *testing.B) {
	for _, n := range []int{3, 1000, 10000} {
		b.Run("n="+strconv.Itoa(n), func(b *testing.B) {
			p := benchProxy(b, "none", n, false)
			b.ReportAllocs()
			for b.Loop() {
				if got := p.get(); got.status != http.StatusOK {
					b.Fatal(got.err)
				}
			}
		})
	}
}
