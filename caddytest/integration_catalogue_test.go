package caddytest_test

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/consul/api"

	"github.com/caddy-consul/caddy-consul/caddytest"
)

// Instances that come and go are followed, the last one too, and each change of
// state is one line in the log.
func TestInstancesComeAndGo(t *testing.T) {
	caddytest.NoLeaks(t)
	agent := caddytest.SharedAgent(t)
	name := serviceName(t)
	front := startFront(t)
	// Would a request wait for the timeout, it would not be answered in time.
	front.serve(reverseProxy(inTurn, consulSource(name, agent, "startup_timeout 5m")))

	front.awaitBackends("unknown.test")
	wantCounts(t, "a service that Consul does not know", front.answers("unknown.test", 20), map[string]int{unavailable: 20})
	empty := fmt.Sprintf(`"msg":"the service has no usable instance".*"service":"%s"`, name)
	following := fmt.Sprintf(`"msg":"following the service".*"service":"%s"`, name)
	wantLines(t, front.Logs(), 1, empty)

	a := caddytest.StartBackend(t, caddytest.Named("a"))
	b := caddytest.StartBackend(t, caddytest.Named("b"))
	agent.Register(a.Service(name))
	front.awaitBackends("a.test", "a")
	wantLines(t, front.Logs(), 1, following)
	agent.Register(b.Service(name))
	front.awaitBackends("ab.test", "a", "b")
	agent.Deregister("a")
	front.awaitBackends("b.test", "b")
	wantLines(t, front.Logs(), 1, following)
	wantLines(t, front.Logs(), 1, empty)

	agent.SetCheck("b", api.HealthCritical)
	front.awaitBackends("none.test")
	wantCounts(t, "a service without a healthy instance", front.answers("none.test", 20), map[string]int{unavailable: 20})
	wantLines(t, front.Logs(), 2, empty)

	agent.SetCheck("b", api.HealthPassing)
	front.awaitBackends("recovered.test", "b")
	wantLines(t, front.Logs(), 2, following)
	wantLines(t, front.Logs(), 2, empty)
	if got := front.service(name); got.State != "following" || got.LastError != "" || got.InstanceCount != 1 {
		t.Errorf("/consul/services: got %+v, want one instance and that the service is followed", got)
	}
}

// Each level of `health` takes the instances that it says it does.
func TestHealthLevels(t *testing.T) {
	caddytest.NoLeaks(t)
	agent := caddytest.SharedAgent(t)
	name := serviceName(t)
	startInstances(t, agent, name, "steady", "changing")
	front := startFront(t)
	var sites strings.Builder
	levels := []string{"passing", "warning", "any"}
	for _, level := range levels {
		sites.WriteString(front.site(level+".test", reverseProxy(inTurn, consulSource(name, agent, "health "+level))))
	}
	sites.WriteString(front.site("default.test", reverseProxy(inTurn, consulSource(name, agent))))
	front.Load(sites.String())

	for _, state := range []struct {
		name   string
		change func()
		takes  []string // the levels that take the instance that changes
	}{
		{"passing", func() {}, levels},
		{"warning", func() { agent.SetCheck("changing", api.HealthWarning) }, []string{"warning", "any"}},
		{"critical", func() { agent.SetCheck("changing", api.HealthCritical) }, []string{"any"}},
		{"passing again", func() { agent.SetCheck("changing", api.HealthPassing) }, levels},
		{"in maintenance", func() { agent.StartMaintenance("changing") }, nil},
		{"out of maintenance", func() { agent.EndMaintenance("changing") }, levels},
	} {
		t.Run(state.name, func(t *testing.T) {
			state.change()
			for _, level := range append(levels, "default") {
				want := []string{"steady"}
				if slices.Contains(state.takes, strings.Replace(level, "default", "passing", 1)) {
					want = append(want, "changing")
				}
				front.awaitBackends(level+".test", want...)
			}
		})
	}
}

func TestNodeMaintenance(t *testing.T) {
	agent := caddytest.SharedAgent(t)
	name := serviceName(t)
	backends := startInstances(t, agent, name, "here")
	there := caddytest.StartBackend(t, caddytest.Named("there"))
	agent.RegisterOn("other-node", "127.0.0.1", there.Service(name))
	front := startFront(t)
	front.serve(reverseProxy(inTurn, consulSource(name, agent, "health any")))
	front.awaitBackends("node.test", "here", "there")

	if err := agent.Client().Agent().EnableNodeMaintenance("a test"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = agent.Client().Agent().DisableNodeMaintenance() })
	front.awaitBackends("node.test", "there")
	before := backends["here"].Requests()
	front.answers("node.test", 20)
	if got := backends["here"].Requests(); got != before {
		t.Errorf("the instance on a node in maintenance got %d requests, want none", got-before)
	}
	if err := agent.Client().Agent().DisableNodeMaintenance(); err != nil {
		t.Fatal(err)
	}
	front.awaitBackends("node.test", "here", "there")
}

// Weights follow Consul, also when only they change, and by the instance's
// status.
func TestWeightsFollowConsul(t *testing.T) {
	agent := caddytest.SharedAgent(t)
	name := serviceName(t)
	front := startFront(t)
	services := make(map[string]caddytest.Service)
	for _, id := range []string{"a", "b", "c"} {
		services[id] = caddytest.StartBackend(t, caddytest.Named(id)).Service(name)
	}
	register := func(id string, passing, warning int, meta string) {
		s := services[id]
		s.Weights = &api.AgentWeights{Passing: passing, Warning: warning}
		s.Meta = map[string]string{"share": meta}
		agent.Register(s)
	}
	register("a", 1, 1, "5")
	register("b", 2, 1, "none")
	register("c", 3, 1, "1")

	policy := "lb_policy consul_weighted_round_robin"
	front.Load(front.site("consul.test", reverseProxy(policy, consulSource(name, agent, "health warning"))) +
		front.site("meta.test", reverseProxy(policy, consulSource(name, agent, "health warning", "weights meta share 4"))) +
		front.site("equal.test", reverseProxy(policy, consulSource(name, agent, "health warning", "weights equal"))))
	// Any lap of a fixed schedule is exact.
	wantLap := func(host string, want map[string]int) {
		t.Helper()
		total := 0
		for _, count := range want {
			total += count
		}
		caddytest.Eventually(t, caddytest.Patience, func() error {
			if got := front.answers(host, total); !maps.Equal(got, want) {
				return fmt.Errorf("%d requests to %s are answered by %v, want %v", total, host, got, want)
			}
			return nil
		})
	}
	wantLap("consul.test", map[string]int{"a": 1, "b": 2, "c": 3})
	wantLap("meta.test", map[string]int{"a": 5, "b": 4, "c": 1})
	wantLap("equal.test", map[string]int{"a": 1, "b": 1, "c": 1})

	register("a", 4, 1, "2")
	wantLap("consul.test", map[string]int{"a": 4, "b": 2, "c": 3})
	wantLap("meta.test", map[string]int{"a": 2, "b": 4, "c": 1})
	agent.SetCheck("a", api.HealthWarning)
	wantLap("consul.test", map[string]int{"a": 1, "b": 2, "c": 3})
	register("c", 1, 1, "0")
	wantLap("meta.test", map[string]int{"a": 1, "b": 2})
}

// `tag` and `filter` choose by what the catalogue says at the time.
func TestTagsAndFilters(t *testing.T) {
	agent := caddytest.SharedAgent(t)
	name := serviceName(t)
	services := make(map[string]caddytest.Service)
	for _, id := range []string{"a", "b", "c"} {
		services[id] = caddytest.StartBackend(t, caddytest.Named(id)).Service(name)
	}
	register := func(id, version string, tags ...string) {
		s := services[id]
		s.Tags, s.Meta = tags, map[string]string{"version": version}
		agent.Register(s)
	}
	register("a", "1", "v2", "blue")
	register("b", "2", "v2", "canary")
	register("c", "2", "v1", "blue")
	front := startFront(t)
	front.Load(front.site("tag.test", reverseProxy(inTurn, consulSource(name, agent, "tag v2 !canary"))) +
		front.site("tags.test", reverseProxy(inTurn, consulSource(name, agent, "tag blue", "tag v2"))) +
		front.site("filter.test", reverseProxy(inTurn, consulSource(name, agent, "filter `Service.Meta.version == \"2\"`"))) +
		front.site("both.test", reverseProxy(inTurn, consulSource(name, agent, "tag !CANARY", "filter `Service.Meta.version == \"2\"`"))))

	front.awaitBackends("tag.test", "a")
	front.awaitBackends("tags.test", "a")
	front.awaitBackends("filter.test", "b", "c")
	front.awaitBackends("both.test", "c")

	register("c", "2", "V2", "blue") // letter case does not matter to Consul
	front.awaitBackends("tag.test", "a", "c")
	front.awaitBackends("tags.test", "a", "c")
	register("a", "2", "v2", "canary")
	front.awaitBackends("tag.test", "c")
	front.awaitBackends("tags.test", "c")
	front.awaitBackends("filter.test", "a", "b", "c")
	register("c", "3", "v2", "canary", "blue")
	front.awaitBackends("tag.test")
	front.awaitBackends("both.test")
	front.awaitBackends("filter.test", "a", "b")
}

// Instances are dialled where Consul says that they are, however it says it.
func TestAddressesOfInstances(t *testing.T) {
	agent := caddytest.SharedAgent(t)
	name := serviceName(t)
	front := startFront(t)
	front.serve(reverseProxy(inTurn, consulSource(name, agent)))

	start := func(id string, options ...caddytest.BackendOption) caddytest.Service {
		return caddytest.StartBackend(t, append(options, caddytest.Named(id))...).Service(name)
	}
	agent.Register(start("its-own"))
	ofAgent := start("of-the-agents-node")
	ofAgent.Address = ""
	agent.Register(ofAgent)
	ofNode := start("of-its-node")
	ofNode.Address = ""
	agent.RegisterOn("node-of-it", "127.0.0.1", ofNode)
	agent.RegisterOn("node-elsewhere", "192.0.2.1", start("not-of-its-node"))
	agent.Register(start("ipv6", caddytest.OnIPv6()))
	ofIPv6Node := start("ipv6-of-its-node", caddytest.OnIPv6())
	ofIPv6Node.Address = ""
	agent.RegisterOn("node-with-ipv6", "::1", ofIPv6Node)
	agent.Register(start("socket", caddytest.OnSocket()))
	want := []string{"its-own", "of-the-agents-node", "of-its-node", "not-of-its-node", "ipv6", "ipv6-of-its-node", "socket"}
	front.awaitBackends("addresses.test", want...)

	// What can't be dialled is left out, told, and harms nobody else.
	bad := start("bad")
	bad.Address = "{env.HOME}"
	agent.RegisterOn("node-of-it", "127.0.0.1", bad)
	front.Logs().Wait(t, fmt.Sprintf(`"msg":"instances left out because they can't be dialled".*"service":"%s"`, name))
	front.awaitBackends("addresses.test", want...)
	if got := front.service(name); got.NotDialable != 1 || got.InstanceCount != len(want) {
		t.Errorf("/consul/services: got %d instances and %d that can't be dialled, want %d and 1",
			got.InstanceCount, got.NotDialable, len(want))
	}
}

func TestTwoServices(t *testing.T) {
	agent := caddytest.SharedAgent(t)
	one, two := serviceName(t)+"-one", serviceName(t)+"-two"
	startInstances(t, agent, one, "one-a", "one-b")
	startInstances(t, agent, two, "two-a")
	front := startFront(t)
	front.Load(front.site("one.test", reverseProxy(inTurn, consulSource(one, agent))) +
		front.site("two.test", reverseProxy(inTurn, consulSource(two, agent))) +
		front.site("again.test", reverseProxy(inTurn, consulSource(one, agent))))
	front.awaitBackends("one.test", "one-a", "one-b")
	front.awaitBackends("two.test", "two-a")
	front.awaitBackends("again.test", "one-a", "one-b")
	agent.Deregister("two-a")
	front.awaitBackends("two.test")
	wantCounts(t, "the other service", front.answers("one.test", 10), map[string]int{"one-a": 5, "one-b": 5})
	if got := front.service(one); got.Answers != 1 {
		t.Errorf("two sites with one service: Consul answered %d queries for it, want 1", got.Answers)
	}
}

// Every consistency mode, and the order by distance, work with a real agent.
func TestConsistencyAndNear(t *testing.T) {
	agent := caddytest.SharedAgent(t)
	name := serviceName(t)
	startInstances(t, agent, name, "a", "b")
	front := startFront(t)
	options := []string{"consistency default", "consistency stale", "consistency consistent", "near _agent"}
	var sites strings.Builder
	for i, option := range options {
		sites.WriteString(front.site(fmt.Sprintf("%d.test", i), reverseProxy(inTurn, consulSource(name, agent, option))))
	}
	front.Load(sites.String())
	for i := range options {
		front.awaitBackends(fmt.Sprintf("%d.test", i), "a", "b")
	}
	agent.Deregister("a")
	for i := range options {
		front.awaitBackends(fmt.Sprintf("%d.test", i), "b")
	}
	for _, service := range front.services(name) {
		if service.State != "following" || len(service.Errors) > 0 {
			t.Errorf("the query %q: state %s with errors %v, want none", service.Query, service.State, service.Errors)
		}
	}
}

// A service of another datacenter is reached through the agent of this one.
func TestDatacenter(t *testing.T) {
	wan := func() (string, int) {
		port := caddytest.FreePort(t)
		return fmt.Sprintf("ports { serf_wan = %d }", port), port
	}
	here, _ := wan()
	there, port := wan()
	near := caddytest.StartAgent(t, caddytest.WithHCL(here))
	far := caddytest.StartAgent(t, caddytest.WithDatacenter("dc2"), caddytest.WithNode("far-node"), caddytest.WithHCL(there))
	startInstances(t, near, "web", "near")
	startInstances(t, far, "web", "far")
	front := startFront(t)
	front.Load(fmt.Sprintf("{\nconsul {\naddress %s\ndatacenter dc2\n}\n}\n", near.Address()) +
		front.site("near.test", reverseProxy(inTurn, consulSource("web", near, "datacenter dc1"))) +
		front.site("far.test", reverseProxy(inTurn, consulSource("web", near, "datacenter dc2"))) +
		front.site("global.test", reverseProxy(inTurn, "dynamic consul web")))
	front.awaitBackends("near.test", "near")
	front.awaitBackends("far.test") // nobody has told this datacenter of the other

	if err := near.Client().Agent().Join(fmt.Sprintf("127.0.0.1:%d", port), true); err != nil {
		t.Fatal(err)
	}
	front.awaitBackends("far.test", "far")
	front.awaitBackends("global.test", "far")
	front.awaitBackends("near.test", "near")
	another := caddytest.StartBackend(t, caddytest.Named("another"))
	far.Register(another.Service("web"))
	front.awaitBackends("far.test", "far", "another")
	for _, service := range front.services("web") {
		for _, instance := range service.Instances {
			if isNear := instance.Datacenter == "dc1"; isNear != (instance.ID == "near") {
				t.Errorf("/consul/services: instance %s is said to be in %q", instance.ID, instance.Datacenter)
			}
		}
	}
}

// The admin endpoint and the metrics tell what is known about a service.
func TestAdminAndMetrics(t *testing.T) {
	agent := caddytest.SharedAgent(t)
	name := serviceName(t)
	a := caddytest.StartBackend(t, caddytest.Named("a"))
	b := caddytest.StartBackend(t, caddytest.Named("b"))
	service := a.Service(name)
	service.Weights = &api.AgentWeights{Passing: 7, Warning: 2}
	agent.Register(service)
	service = b.Service(name)
	service.Weights = &api.AgentWeights{Passing: 5, Warning: 3}
	agent.Register(service)
	agent.SetCheck("b", api.HealthWarning)
	front := startFront(t)
	front.serve(reverseProxy(inTurn, consulSource(name, agent, "health warning")))
	front.awaitBackends("admin.test", "a", "b")

	caddytest.Eventually(t, caddytest.Patience, func() error { // the instances are there a moment before
		if front.service(name).Answers == 0 {
			return errors.New("/consul/services: got no answer of Consul counted, want one")
		}
		return nil
	})
	got := front.service(name)
	if got.State != "following" || got.Agent != agent.Address() || got.Index == 0 || got.Answers == 0 || got.InstanceCount != 2 {
		t.Errorf("/consul/services: got %+v, want 2 instances, followed at %s", got, agent.Address())
	}
	wantInstances := fmt.Sprintf("[{ID:a Node:node-1 Datacenter:dc1 Dial:%s Status:passing Weight:7} "+
		"{ID:b Node:node-1 Datacenter:dc1 Dial:%s Status:warning Weight:3}]", a.Address(), b.Address())
	if instances := fmt.Sprintf("%+v", got.Instances); instances != wantInstances {
		t.Errorf("/consul/services: got instances\n%s\nwant\n%s", instances, wantInstances)
	}

	metrics := front.Get("/metrics")
	for _, want := range []string{
		`caddy_consul_instances{%s,status="passing"} 1`,
		`caddy_consul_instances{%s,status="warning"} 1`,
		`caddy_consul_instances{%s,status="critical"} 0`,
		`caddy_consul_state{%s,state="following"} 1`,
		`caddy_consul_stale_seconds{%s} 0`,
	} {
		labels := fmt.Sprintf(`agent="%s",query="health=warning",service="%s"`, agent.Address(), name)
		if want = fmt.Sprintf(want, labels); !strings.Contains(metrics, want+"\n") {
			t.Errorf("/metrics: got no line %s, want it; the lines of ours are\n%s", want, linesWith(metrics, name))
		}
	}
	agent.SetCheck("b", api.HealthCritical)
	front.awaitBackends("admin.test", "a")
	if metrics := front.Get("/metrics"); !strings.Contains(metrics, `status="warning"} 0`) {
		t.Errorf("/metrics after the change: got\n%s\nwant no instance in a warning state", linesWith(metrics, name))
	}
	front.serve(`respond "nothing to proxy"`)
	if text := front.Get("/metrics"); strings.Contains(text, name) {
		t.Errorf("/metrics: got\n%s\nwant nothing about a service that is followed no more", linesWith(text, name))
	}
}

func linesWith(text, part string) string {
	var lines []string
	for line := range strings.Lines(text) {
		if strings.Contains(line, part) {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "")
}
