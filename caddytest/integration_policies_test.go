package caddytest_test

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/caddy-consul/caddy-consul/caddytest"
)

// nominating are the policies with which Caddy gets what the source nominates.
var nominating = []string{
	"", "lb_policy random", "lb_policy random_choose 2",
	"lb_policy consul_round_robin", "lb_policy consul_random",
	"lb_policy consul_weighted_round_robin", "lb_policy consul_weighted_random",
}

// listing are policies with which Caddy gets the whole list.
var listing = []string{
	"lb_policy round_robin", "lb_policy least_conn", "lb_policy first", "lb_policy ip_hash", "lb_policy uri_hash",
	"lb_policy header X-User", "lb_policy cookie",
}

// policyName is how a test calls one of these.
func policyName(policy string) string {
	return strings.Join(strings.Fields(cmp.Or(policy, "lb_policy none"))[1:], " ")
}

// startWeighted registers instances a, b and c with the weights 1, 2 and 3.
func startWeighted(t testing.TB, agent *caddytest.Agent, service string) map[string]*caddytest.Backend {
	t.Helper()
	backends := make(map[string]*caddytest.Backend)
	for i, id := range []string{"a", "b", "c"} {
		backends[id] = caddytest.StartBackend(t, caddytest.Named(id))
		s := backends[id].Service(service)
		s.Weights = &api.AgentWeights{Passing: i + 1, Warning: 1}
		agent.Register(s)
	}
	agent.WaitHealthy(service, len(backends))
	return backends
}

// The weights of startWeighted, as shares.
var weights, equal = map[string]int{"a": 1, "b": 2, "c": 3}, map[string]int{"a": 1, "b": 1, "c": 1}

// drift returns how far the answers are from the shares, in requests: that of the
// farthest of any backend. An answer of anyone else is infinitely far.
func drift(answers, shares map[string]int) float64 {
	var farthest float64
	for backend, ideal := range ideals(answers, shares) {
		if ideal == 0 {
			return math.Inf(1)
		}
		farthest = max(farthest, math.Abs(float64(answers[backend])-ideal))
	}
	return farthest
}

// chiSquare returns by how much the answers differ from the shares beyond what
// chance makes likely. With three backends, it is above 27.6 once in a million
// times.
func chiSquare(answers, shares map[string]int) float64 {
	var sum float64
	for backend, ideal := range ideals(answers, shares) {
		sum += math.Pow(float64(answers[backend])-ideal, 2) / ideal
	}
	return sum
}

const chiSquareLimit = 27.6

// ideals returns how many answers each backend should have given.
func ideals(answers, shares map[string]int) map[string]float64 {
	count, total := 0, 0
	for _, n := range answers {
		count += n
	}
	for _, share := range shares {
		total += share
	}
	ideals := make(map[string]float64)
	for backend := range answers {
		ideals[backend] = 0 // of who has no share
	}
	for backend, share := range shares {
		ideals[backend] = float64(count) * float64(share) / float64(total)
	}
	return ideals
}

// Each policy gives the shares that it promises, over every kind of source.
func TestShares(t *testing.T) {
	agent := caddytest.SharedAgent(t)
	name := serviceName(t)
	backends := startWeighted(t, agent, name)
	static := ""
	for _, id := range []string{"a", "b", "c"} {
		static += " " + backends[id].Address()
	}
	front := startFront(t)
	cases := []struct {
		name   string
		policy string
		proxy  string // Consul by default
		shares map[string]int
		exact  float64 // how far the shares may be off, if they are no matter of chance
	}{
		{"weighted round robin", "lb_policy consul_weighted_round_robin", "", weights, 4},
		{"weighted random", "lb_policy consul_weighted_random", "", weights, 0},
		{"no policy", "", "", weights, 0},
		{"Caddy's random", "lb_policy random", "", weights, 0},
		{"round robin", "lb_policy consul_round_robin", "", equal, 1},
		{"random", "lb_policy consul_random", "", equal, 0},
		{"Caddy's round robin", "lb_policy round_robin", "", equal, 1},
		{"weighted round robin of static upstreams", "lb_policy consul_weighted_round_robin", static, equal, 4},
		{"weighted random of static upstreams", "lb_policy consul_weighted_random", static, equal, 0},
		{"round robin of static upstreams", "lb_policy consul_round_robin", static, equal, 1},
		{"random of static upstreams", "lb_policy consul_random", static, equal, 0},
	}
	var sites strings.Builder
	for i, c := range cases {
		options := []string{c.policy}
		if c.proxy == "" {
			options = append(options, consulSource(name, agent))
		}
		sites.WriteString(front.site(fmt.Sprintf("%d.test", i), strings.Replace(reverseProxy(options...), "reverse_proxy", "reverse_proxy"+c.proxy, 1)))
	}
	front.Load(sites.String())
	for i, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			answers := front.answersAtOnce(fmt.Sprintf("%d.test", i), 1200, 4)
			if c.exact > 0 {
				if got := drift(answers, c.shares); got > c.exact {
					t.Errorf("answered by %v: %.1f from shares of %v, want at most %.0f", answers, got, c.shares, c.exact)
				}
			} else if got := chiSquare(answers, c.shares); got > chiSquareLimit {
				t.Errorf("answered by %v: chi-square %.1f with shares of %v, want at most %.1f", answers, got, c.shares, chiSquareLimit)
			}
		})
	}
}

// No instance is ever more than 4 requests from its share.
func TestWeightedRoundRobinIsSmooth(t *testing.T) {
	agent := caddytest.SharedAgent(t)
	name := serviceName(t)
	startWeighted(t, agent, name)
	front := startFront(t)
	front.serve(reverseProxy("lb_policy consul_weighted_round_robin", consulSource(name, agent)))
	answers := make(map[string]int)
	var farthest float64
	for range 12_000 {
		answers[front.ask("smooth.test").String()]++
		farthest = max(farthest, drift(answers, weights))
	}
	if farthest > 4 {
		t.Errorf("over %v answers, an instance was %.1f requests from its share, want at most 4", answers, farthest)
	}
	if got := drift(answers, weights); got > 0 { // 2,000 whole laps
		t.Errorf("answered by %v, want exactly 1 to 2 to 3", answers)
	}
}

// Our policies work with Consul's DNS, and weigh a mixture of sources.
func TestSourcesTogether(t *testing.T) {
	dns := caddytest.FreePort(t)
	agent := caddytest.StartAgent(t, caddytest.WithHCL(fmt.Sprintf("ports { dns = %d }", dns)))
	startWeighted(t, agent, "web")
	startInstances(t, agent, "api", "d")
	port := caddytest.FreePort(t)
	for _, host := range []string{"127.0.0.2", "127.0.0.3"} {
		backend := caddytest.StartBackend(t, caddytest.Named("at-"+host), caddytest.At(fmt.Sprintf("%s:%d", host, port)))
		agent.Register(backend.Service("flat"))
	}
	agent.WaitHealthy("flat", 2)
	front := startFront(t)
	resolvers := fmt.Sprintf("{\nresolvers 127.0.0.1:%d\n}", dns)
	transport := "transport http " + resolvers
	srv := "srv web.service.consul " + resolvers
	a := fmt.Sprintf("a flat.service.consul %d %s", port, resolvers)
	consul := func(service string) string {
		return "consul " + service + " {\naddress " + agent.Address() + "\n}"
	}
	flat := map[string]int{"at-127.0.0.2": 1, "at-127.0.0.3": 1}
	cases := []struct {
		name   string
		source string
		shares map[string]int // by the policies that weigh
		counts map[string]int // by those that don't
	}{
		{"srv", srv, equal, equal},
		{"a", a, flat, flat},
		{"one service in multi", "multi {\n" + consul("web") + "\n}", weights, equal},
		{
			"two services in multi", "multi {\n" + consul("web") + "\n" + consul("api") + "\n}",
			map[string]int{"a": 1, "b": 2, "c": 3, "d": 1},
			map[string]int{"a": 1, "b": 1, "c": 1, "d": 1},
		},
		{
			"a service and DNS in multi", "multi {\n" + consul("api") + "\n" + srv + "\n}",
			map[string]int{"a": 1, "b": 1, "c": 1, "d": 1},
			map[string]int{"a": 1, "b": 1, "c": 1, "d": 1},
		},
		{
			"a weighted service and DNS in multi", "multi {\n" + a + "\n" + consul("web") + "\n}",
			map[string]int{"a": 1, "b": 2, "c": 3, "at-127.0.0.2": 1, "at-127.0.0.3": 1},
			map[string]int{"a": 1, "b": 1, "c": 1, "at-127.0.0.2": 1, "at-127.0.0.3": 1},
		},
	}
	var sites strings.Builder
	for i, c := range cases {
		for _, policy := range []string{"consul_weighted_round_robin", "consul_weighted_random", "consul_round_robin", "consul_random"} {
			sites.WriteString(front.site(fmt.Sprintf("%s.%d.test", policy, i),
				reverseProxy("lb_policy "+policy, transport, "dynamic "+c.source)))
		}
	}
	front.Load(sites.String())
	for i, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			for policy, shares := range map[string]map[string]int{
				"consul_weighted_round_robin": c.shares, "consul_round_robin": c.counts,
			} {
				answers := front.answers(fmt.Sprintf("%s.%d.test", policy, i), 240)
				if got := drift(answers, shares); got > 4 {
					t.Errorf("%s: answered by %v: %.1f from shares of %v, want at most 4", policy, answers, got, shares)
				}
			}
			for policy, shares := range map[string]map[string]int{
				"consul_weighted_random": c.shares, "consul_random": c.counts,
			} {
				answers := front.answers(fmt.Sprintf("%s.%d.test", policy, i), 240)
				if got := chiSquare(answers, shares); got > chiSquareLimit+10 { // of up to five backends
					t.Errorf("%s: answered by %v: chi-square %.1f with shares of %v, want at most %.1f",
						policy, answers, got, shares, chiSquareLimit+10)
				}
			}
		})
	}
}

// Caddy's own policies do with our source what they do with others.
func TestPoliciesOfCaddy(t *testing.T) {
	agent := caddytest.SharedAgent(t)
	name := serviceName(t)
	backends := startInstances(t, agent, name, "a", "b", "c")
	front := startFront(t)
	var sites strings.Builder
	for _, policy := range append([]string{"lb_policy random_choose 2"}, listing...) {
		host := strings.ReplaceAll(strings.Fields(policy)[1], "_", "-") + ".test"
		sites.WriteString(front.site(host, reverseProxy(policy, consulSource(name, agent))))
	}
	front.Load(sites.String())

	t.Run("first", func(t *testing.T) {
		wantCounts(t, "requests", front.answers("first.test", 20), map[string]int{"a": 20})
	})
	t.Run("ip_hash", func(t *testing.T) {
		if got := front.answers("ip-hash.test", 20); len(got) != 1 {
			t.Errorf("one client: answered by %v, want one backend", got)
		}
	})
	t.Run("header", func(t *testing.T) {
		all := make(map[string]int)
		for user := range 30 {
			got := front.answers("header.test", 3, func(r *http.Request) { r.Header.Set("X-User", fmt.Sprint(user)) })
			if len(got) != 1 {
				t.Errorf("one user: answered by %v, want one backend", got)
			}
			maps.Copy(all, got)
		}
		if len(all) != 3 {
			t.Errorf("30 users: answered by %v, want all backends", all)
		}
	})
	t.Run("cookie", func(t *testing.T) {
		all := make(map[string]int)
		for range 30 {
			first := front.ask("cookie.test")
			cookie := first.header.Get("Set-Cookie")
			got := front.answers("cookie.test", 3, func(r *http.Request) { r.Header.Set("Cookie", cookie) })
			if cookie == "" || got[first.backend] != 3 {
				t.Errorf("one client: answered by %s, with the cookie %q, and then by %v", first, cookie, got)
			}
			all[first.backend]++
		}
		if len(all) != 3 {
			t.Errorf("30 clients: answered by %v, want all backends", all)
		}
	})
	t.Run("random_choose", func(t *testing.T) {
		if got := front.answers("random-choose.test", 60); len(got) != 3 {
			t.Errorf("requests: answered by %v, want all backends", got)
		}
	})
	// Last, for it leaves a slow backend behind.
	t.Run("least_conn", func(t *testing.T) {
		backends["a"].SetDelay(50 * time.Millisecond)
		got := front.answersAtOnce("least-conn.test", 300, 4)
		if got["a"]+got["b"]+got["c"] != 300 || got["a"] >= 50 {
			t.Errorf("answered by %v, want all requests answered, and few by a, which is slow", got)
		}
	})
}

// A retry goes to another instance than the one that failed, with any policy:
// with one dead instance of two, one retry is enough for every request.
func TestRetryGoesToAnotherInstance(t *testing.T) {
	agent := caddytest.SharedAgent(t)
	name := serviceName(t)
	backends := startInstances(t, agent, name, "alive", "dead")
	backends["dead"].Stop()
	front := startFront(t)
	policies := slices.Concat(nominating, listing)
	var sites strings.Builder
	for i, policy := range policies {
		sites.WriteString(front.site(fmt.Sprintf("%d.test", i), reverseProxy(policy, "lb_retries 1", consulSource(name, agent))) +
			front.site(fmt.Sprintf("multi-%d.test", i), reverseProxy(policy, "lb_retries 1", "dynamic multi {\nconsul "+name+" {\naddress "+agent.Address()+"\n}\n}")))
	}
	front.Load(sites.String())
	for i, policy := range policies {
		t.Run(policyName(policy), func(t *testing.T) {
			wantCounts(t, "requests", front.answers(fmt.Sprintf("%d.test", i), 40), map[string]int{"alive": 40})
			wantCounts(t, "requests, with the source in multi",
				front.answers(fmt.Sprintf("multi-%d.test", i), 40), map[string]int{"alive": 40})
		})
	}
}

// Passive health takes an instance out that Consul holds healthy, at the price of
// one request, and takes it in again.
func TestPassiveHealth(t *testing.T) {
	agent := caddytest.SharedAgent(t)
	front := startFront(t)
	for _, policy := range slices.Concat(nominating, []string{"lb_policy round_robin", "lb_policy first"}) {
		t.Run(policyName(policy), func(t *testing.T) {
			name := serviceName(t)
			backends := startInstances(t, agent, name, "a", "b", "c")
			front.serve(reverseProxy(policy, "fail_duration 5m", "unhealthy_status 500", consulSource(name, agent)))
			backends["a"].SetStatus(http.StatusInternalServerError)
			got := front.answers("passive.test", 90)
			if got["status 500"] > 1 || got["b"]+got["c"]+got["status 500"] != 90 {
				t.Errorf("answered by %v, want b and c after at most one failure", got)
			}
			if policy != "lb_policy first" && (got["b"] < 20 || got["c"] < 20) {
				t.Errorf("answered by %v, want both of the others to take over", got)
			}
			backends["b"].Stop()
			got = front.answers("passive.test", 60)
			if got["status 502"] > 1 || got["c"]+got["status 502"] != 60 {
				t.Errorf("answered by %v after a second one went down, want c after at most one failure", got)
			}
		})
	}
	t.Run("recovery", func(t *testing.T) {
		name := serviceName(t)
		backends := startInstances(t, agent, name, "a", "b")
		front.serve(reverseProxy("lb_policy consul_weighted_round_robin", "fail_duration 300ms", "unhealthy_status 500", consulSource(name, agent)))
		backends["a"].SetStatus(http.StatusInternalServerError)
		front.awaitBackends("passive.test", "b")
		backends["a"].SetStatus(http.StatusOK)
		front.awaitBackends("passive.test", "a", "b")
	})
	t.Run("all down", func(t *testing.T) {
		name := serviceName(t)
		backends := startInstances(t, agent, name, "a", "b")
		front.serve(reverseProxy("fail_duration 5m", "unhealthy_status 500", consulSource(name, agent)))
		for _, backend := range backends {
			backend.SetStatus(http.StatusInternalServerError)
		}
		front.awaitBackends("passive.test")
	})
	t.Run("unhealthy_request_count", func(t *testing.T) {
		name := serviceName(t)
		backends := startInstances(t, agent, name, "a", "b", "c", "d", "e")
		front.serve(reverseProxy("unhealthy_request_count 1", consulSource(name, agent)))
		for _, backend := range backends {
			backend.SetDelay(5 * time.Millisecond)
		}
		// Two clients, and what Caddy has not finished with, are fewer than five.
		if got := front.answersAtOnce("passive.test", 200, 2); got[unavailable] > 0 || len(got) != 5 {
			t.Errorf("answered by %v, want all instances and no refusal", got)
		}
	})
}

func TestPlaceholders(t *testing.T) {
	agent := caddytest.SharedAgent(t)
	name := serviceName(t)
	for i, id := range []string{"a", "b"} {
		service := caddytest.StartBackend(t, caddytest.Named(id)).Service(name)
		service.Tags = []string{"v2", "zone-" + id}
		service.Meta = map[string]string{"version": "2." + id}
		service.Weights = &api.AgentWeights{Passing: 3 + i, Warning: 1}
		if id == "b" {
			agent.RegisterOn("node-of-b", "127.0.0.1", service)
		} else {
			agent.Register(service)
		}
	}
	agent.WaitHealthy(name, 2)
	front := startFront(t)
	fields := []string{"id", "service", "node", "datacenter", "status", "weight", "tags", "meta.version", "meta.none"}
	options := []string{inTurn}
	for _, field := range fields {
		options = append(options, fmt.Sprintf("header_down +X-Of-Instance \"%s={http.reverse_proxy.upstreams.consul.%s}\"", field, field))
	}
	front.Load(front.site("nominated.test", reverseProxy(append(options, consulSource(name, agent))...)) +
		front.site("listed.test", reverseProxy(append(options, "dynamic multi {\nconsul "+name+" {\naddress "+agent.Address()+"\n}\n}")...)))
	for _, host := range []string{"nominated.test", "listed.test"} {
		front.awaitBackends(host, "a", "b")
		for range 4 {
			got := front.ask(host)
			node, weight := "node-1", 3
			if got.backend == "b" {
				node, weight = "node-of-b", 4
			}
			want := []string{
				"id=" + got.backend, "service=" + name, "node=" + node, "datacenter=dc1", "status=passing",
				fmt.Sprintf("weight=%d", weight), "tags=v2,zone-" + got.backend, "meta.version=2." + got.backend, "meta.none=",
			}
			if told := got.header.Values("X-Of-Instance"); !slices.Equal(told, want) {
				t.Errorf("%s, answered by %s: placeholders are %q, want %q", host, got.backend, told, want)
			}
		}
	}
}

// The request names the service: what is allowed and there is served, the rest
// is refused without asking Consul.
func TestServicesNamedByRequests(t *testing.T) {
	caddytest.NoLeaks(t)
	agent := caddytest.SharedAgent(t)
	prefix := serviceName(t)
	queries := startCounter(t, agent)
	startInstances(t, agent, prefix+"-web", "web-a", "web-b")
	startInstances(t, agent, prefix+"-api", "api-a")
	startInstances(t, agent, "internal-"+prefix, "internal-a")
	front := startFront(t)
	front.serve(reverseProxy(inTurn, fmt.Sprintf("dynamic consul {http.request.host.labels.1} {\naddress %s\nallow %s-*\n}", queries.address, prefix)))

	front.awaitBackends(prefix+"-web.test", "web-a", "web-b")
	front.awaitBackends(strings.ToUpper(prefix)+"-API.test", "api-a")
	caddytest.Eventually(t, caddytest.Patience, func() error { // the next query comes a moment after an answer
		for _, path := range []string{"/v1/catalog/services", "/v1/health/service/" + prefix + "-web", "/v1/health/service/" + prefix + "-api"} {
			if queries.count(path+" after an index") == 0 {
				return fmt.Errorf("no query for %s is held open", path)
			}
		}
		return nil
	})
	before := queries.count("")
	wantCounts(t, "a service that is not allowed", front.answers("internal-"+prefix+".test", 20), map[string]int{unavailable: 20})
	for i := range 50 {
		host := fmt.Sprintf("%s-unknown-%d.test", prefix, i)
		wantCounts(t, "an unknown service", front.answers(host, 1), map[string]int{unavailable: 1})
	}
	wantCounts(t, "no service", front.answers("localhost", 1), map[string]int{unavailable: 1})
	if got := queries.count("") - before; got != 0 {
		t.Errorf("71 requests for what is not allowed or unknown: Consul was asked %d times, want not at all", got)
	}
	if got := queries.count("/v1/health/service/internal"); got != 0 {
		t.Errorf("Consul was asked %d times about a service that is not allowed, want never", got)
	}

	wantCounts(t, "a service before it is registered", front.answers(prefix+"-new.test", 1), map[string]int{unavailable: 1})
	fresh := caddytest.StartBackend(t, caddytest.Named("new-a"))
	agent.Register(fresh.Service(prefix + "-new"))
	start := time.Now()
	front.awaitBackends(prefix+"-new.test", "new-a")
	if took := time.Since(start); took > time.Second {
		t.Errorf("a service was served %v after it was registered, want within a second", took)
	}
	wantLines(t, front.Logs(), 1, fmt.Sprintf(`"msg":"following the service".*"service":"%s-new"`, prefix))
}
