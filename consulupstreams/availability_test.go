package consulupstreams

import (
	"fmt"
	"net/http"
	"runtime"
	"slices"
	"sync"
	"testing"
	"weak"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"github.com/hashicorp/consul/api"

	"github.com/caddy-consul/caddy-consul/internal/balance/balancetest"
)

// nominating are the policies for which less than the whole list is offered: with
// them, an instance that Caddy refuses must not be all that it is offered.
func nominating() (names []string, configs []object) {
	for _, tc := range policies {
		if tc.offered < 10 {
			names, configs = append(names, tc.name), append(configs, tc.config)
		}
	}
	return names, configs
}

func forEachNominating(t *testing.T, test func(t *testing.T, policy object)) {
	t.Helper()
	names, configs := nominating()
	for i, name := range names {
		t.Run(name, func(t *testing.T) { test(t, configs[i]) })
	}
}

func TestAnInstanceThatFailsIsAvoided(t *testing.T) {
	forEachNominating(t, func(t *testing.T, policy object) {
		consul := newFakeConsul(t)
		three := instances(3, 1)
		consul.set(three...)
		p := newProxy(t, consul, object{
			"load_balancing": balancing(policy, 0),
			"health_checks":  object{"passive": object{"fail_duration": "1h", "max_fails": 2}},
		}, nil)
		p.await(t, three...)
		p.kill(addressOf(three[1]))
		statuses := make(map[int]int)
		for range 300 {
			statuses[p.get().status]++
		}
		if statuses[http.StatusBadGateway] > 2 || statuses[http.StatusOK] < 298 {
			t.Errorf("answers with one of three dead, that is out after 2 failures: got %v, want 298 with 200 and 2 with 502", statuses)
		}
	})
}

// nineInTen has 45 of 50 instances die, and has the proxy find out.
func nineInTen(t *testing.T, policy object) (consul *fakeConsul, p *proxy, config object, alive []*api.ServiceEntry) {
	t.Helper()
	consul = newFakeConsul(t)
	fifty := instances(50, 1)
	for i, weight := range []int{1, 2, 3, 4, 10} {
		fifty[i*10].Service.Weights.Passing = weight
	}
	consul.set(fifty...)
	config = object{
		"load_balancing": balancing(policy, 0),
		"health_checks":  object{"passive": object{"fail_duration": "1h"}},
	}
	p = newProxy(t, consul, config, nil)
	p.await(t, fifty...)
	for i, e := range fifty {
		if i%10 == 0 {
			alive = append(alive, e)
		} else {
			p.kill(addressOf(e))
		}
	}
	statuses := make(map[int]int)
	for range 2000 {
		statuses[p.get().status]++
	}
	if statuses[http.StatusBadGateway] > 45 || statuses[http.StatusServiceUnavailable] > 0 {
		t.Errorf("answers while 45 of 50 die: got %v, want at most 45 with 502 and none with 503", statuses)
	}
	p.counts(nil)
	return consul, p, config, alive
}

func TestMostInstancesAreDown(t *testing.T) {
	forEachNominating(t, func(t *testing.T, policy object) {
		_, p, _, alive := nineInTen(t, policy)
		for range 2000 {
			wantStatus(t, "request with 5 of 50 alive", p.get(), http.StatusOK)
		}
		want := []int{1, 1, 1, 1, 1}
		if policy == nil || policy["policy"] == "random" || policy["policy"] == "consul_weighted_random" || policy["policy"] == "consul_weighted_round_robin" {
			want = []int{1, 2, 3, 4, 10}
		}
		// what is left keeps its shares: nobody gets those of the dead
		balancetest.CheckChiSquare(t, p.counts(addressesOf(alive)), balancetest.Ideals(want))
	})
}

// Caddy keeps the failures across a reload, but the new config's proxy has not
// seen any instance yet.
func TestAReloadWhileMostInstancesAreDown(t *testing.T) {
	forEachNominating(t, func(t *testing.T, policy object) {
		consul, before, config, _ := nineInTen(t, policy)
		statuses := make(map[int]int)
		for range 10 {
			p := newProxy(t, consul, config, nil)
			p.dead = before.dead
			for range 20 {
				statuses[p.get().status]++
			}
		}
		if len(statuses) != 1 || statuses[http.StatusOK] == 0 {
			t.Errorf("answers after reloads with 5 of 50 alive: got %v, want only 200", statuses)
		}
	})
}

// With a limit on the requests of an instance, another one is to take what is
// beyond it.
func TestFullInstancesAreAvoided(t *testing.T) {
	forEachNominating(t, func(t *testing.T, policy object) {
		consul := newFakeConsul(t)
		four := instances(4, 1)
		consul.set(four...)
		p := newProxy(t, consul, object{
			"load_balancing": balancing(policy, 0),
			"health_checks":  object{"passive": object{"unhealthy_request_count": 1}},
		}, nil)
		p.await(t, four...)
		arrived, release := make(chan string), make(chan struct{})
		p.before = func(address string, _ *http.Request) {
			select {
			case arrived <- address:
			case <-release:
			}
			<-release
		}
		var group sync.WaitGroup
		var busy []string
		for range four {
			ended := make(chan response, 1)
			group.Go(func() {
				got := p.get()
				wantStatus(t, "request while there is a free instance", got, http.StatusOK)
				ended <- got
			})
			select {
			case address := <-arrived:
				if slices.Contains(busy, address) {
					t.Errorf("request while there is a free instance: got to %s, which is full", address)
				}
				busy = append(busy, address)
			case <-ended:
			}
		}
		wantStatus(t, "request while all are full", p.get(), http.StatusServiceUnavailable)
		close(release)
		group.Wait()
		wantStatus(t, "request when all are free again", p.get(), http.StatusOK)
	})
}

// Two requests may be nominated the same instance before either has gone to it.
func TestNoRequestIsRefusedWhileAnInstanceIsFree(t *testing.T) {
	forEachNominating(t, func(t *testing.T, policy object) {
		consul := newFakeConsul(t)
		eight := instances(8, 1)
		consul.set(eight...)
		p := newProxy(t, consul, object{
			"load_balancing": balancing(policy, 0),
			"health_checks":  object{"passive": object{"unhealthy_request_count": 1}},
			"headers":        object{"request": object{"set": object{"Instance": []string{"{http.reverse_proxy.upstreams.consul.id}"}}}},
		}, nil)
		p.await(t, eight...)
		p.before = func(address string, r *http.Request) {
			if got := r.Header["Instance"]; !slices.Equal(got, []string{"web-" + address}) {
				t.Errorf("instance that %s is told to be: got %q, want web-%s", address, got, address)
			}
		}
		var group sync.WaitGroup
		for range 4 { // half of what there is room for
			group.Go(func() {
				for range 300 {
					wantStatus(t, "request with half of the instances free", p.get(), http.StatusOK)
				}
			})
		}
		group.Wait()
	})
}

// knownOf is what the proxy remembers of its instances.
func knownOf(p *proxy) *ledger {
	switch o := p.source.offering.(type) {
	case *nominated:
		return o.known.of(p.set())
	case *sampled:
		return o.known.of(p.set())
	}
	return nil
}

func TestMemoryOfAvailabilityFollowsTheService(t *testing.T) {
	forEachNominating(t, func(t *testing.T, policy object) {
		consul := newFakeConsul(t)
		config := object{
			"load_balancing": balancing(policy, 0),
			"health_checks":  object{"passive": object{"fail_duration": "1h"}},
		}
		consul.set(instance(1))
		p := newProxy(t, consul, config, nil)
		const size, deployments = 20, 30
		var remembered []weak.Pointer[reverseproxy.Upstream]
		for range deployments {
			entries := instances(size, 1)
			consul.set(entries...)
			p.await(t, entries...)
			for range 10 * size {
				wantStatus(t, "request", p.get(), http.StatusOK)
			}
			for i := range size {
				if upstream := knownOf(p).upstream(i); upstream != nil {
					remembered = append(remembered, weak.Make(upstream))
				}
			}
		}
		if len(remembered) < deployments*size*9/10 {
			t.Errorf("instances remembered at any time: got %d, want almost all of %d", len(remembered), deployments*size)
		}
		runtime.GC()
		count := 0
		for _, upstream := range remembered {
			if upstream.Value() != nil {
				count++
			}
		}
		if count > 3*size {
			t.Errorf("instances remembered of a service with %d, after %d deployments: got %d, want at most %d", size, deployments, count, 3*size)
		}
		runtime.KeepAlive(p)
	})
}

// A request may be between its offer and its choice when the service changes,
// even twice.
func TestARequestThatIsLate(t *testing.T) {
	forEachNominating(t, func(t *testing.T, policy object) {
		consul := newFakeConsul(t)
		all := instances(6, 1)
		consul.set(all[:4]...)
		p := newProxy(t, consul, object{
			"load_balancing": balancing(policy, 0),
			"health_checks":  object{"passive": object{"fail_duration": "1h"}},
		}, nil)
		p.await(t, all[:4]...)
		serve := func() {
			t.Helper()
			for range 100 { // Caddy has seen each instance then
				wantStatus(t, "request", p.get(), http.StatusOK)
			}
		}
		serve()
		_, late := newRequest()
		pool, err := p.source.GetUpstreams(late)
		if err != nil {
			t.Fatalf("upstreams: got error %v, want none", err)
		}
		for i := range 2 {
			now := all[i+1 : i+5]
			consul.set(now...)
			p.await(t, now...)
			serve()
		}
		offeredBefore := len(offered(t, p))
		for _, upstream := range pool {
			upstream.Host = new(reverseproxy.Host)
		}
		if got := p.LoadBalancing.SelectionPolicy.Select(pool, late, nil); got == nil {
			t.Error("late request: got no upstream, want one of those that it was offered")
		}
		for range 50 {
			if got := len(offered(t, p)); got != offeredBefore {
				t.Fatalf("upstreams offered after a late request: got %d, want %d as before", got, offeredBefore)
			}
		}
	})
}

// An instance whose failures are forgotten gets its share again.
func TestARecoveredInstanceServesAgain(t *testing.T) {
	forEachNominating(t, func(t *testing.T, policy object) {
		consul := newFakeConsul(t)
		pair := instances(2, 1)
		consul.set(pair...)
		p := newProxy(t, consul, object{
			"load_balancing": balancing(policy, 0),
			"health_checks":  object{"passive": object{"fail_duration": "50ms"}},
		}, nil)
		p.await(t, pair...)
		p.kill(addressOf(pair[0]))
		eventually(t, func() error {
			if got := p.get().status; got == http.StatusOK {
				return fmt.Errorf("got %d, want a failure", got)
			}
			return nil
		})
		p.mu.Lock()
		clear(p.dead)
		p.mu.Unlock()
		eventually(t, func() error {
			if got := p.get(); got.servedBy != addressOf(pair[0]) {
				return fmt.Errorf("served by: got %s, want %s, which has recovered", got.servedBy, addressOf(pair[0]))
			}
			return nil
		})
	})
}
