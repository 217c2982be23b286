package caddytest_test

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/caddy-consul/caddy-consul/caddytest"
)

func TestMain(m *testing.M) { caddytest.Main(m) }

// instances returns what an agent tells of a service's healthy instances.
func instances(t *testing.T, agent *caddytest.Agent, service string) []*api.ServiceEntry {
	t.Helper()
	entries, _, err := agent.Client().Health().Service(service, "", true, nil)
	if err != nil {
		t.Fatal(err)
	}
	return entries
}

func TestAgentTellsOfRegistrations(t *testing.T) {
	caddytest.NoLeaks(t)
	agent := caddytest.SharedAgent(t)
	agent.Register(caddytest.Service{
		Name: "told", ID: "told-1", Address: "127.0.0.9", Port: 99,
		Tags: []string{"v2"}, Weights: &api.AgentWeights{Passing: 7, Warning: 2},
	})
	agent.RegisterOn("elsewhere", "127.0.0.8", caddytest.Service{Name: "told", ID: "told-2", Port: 98})
	agent.WaitHealthy("told", 2)

	agent.SetCheck("told-1", api.HealthCritical)
	agent.WaitHealthy("told", 1)
	if got := instances(t, agent, "told")[0]; got.Node.Node != "elsewhere" {
		t.Errorf("the instance that is left is on node %q, want elsewhere", got.Node.Node)
	}
	agent.DeregisterOn("elsewhere", "told-2")
	agent.SetCheck("told-1", api.HealthPassing)
	agent.WaitHealthy("told", 1)
	if got := instances(t, agent, "told")[0].Service; got.Weights.Passing != 7 || got.Tags[0] != "v2" {
		t.Errorf("the instance has weights %+v and tags %q, want passing 7 and v2", got.Weights, got.Tags)
	}

	agent.StartMaintenance("told-1")
	agent.WaitHealthy("told", 0)
	agent.EndMaintenance("told-1")
	agent.WaitHealthy("told", 1)
	agent.Deregister("told-1")
	agent.WaitHealthy("told", 0)
}

func TestAgentIsReachedOnlyAsConfigured(t *testing.T) {
	for _, c := range []struct {
		name    string
		options []caddytest.AgentOption
		address string
		refuses func(*caddytest.Agent) *api.Config
	}{
		{
			"ACLs",
			[]caddytest.AgentOption{caddytest.WithACLs()},
			"127.0.0.1:",
			func(a *caddytest.Agent) *api.Config { return &api.Config{Address: a.Address()} },
		},
		{
			"TLS",
			[]caddytest.AgentOption{caddytest.WithTLS()},
			"127.0.0.1:",
			func(a *caddytest.Agent) *api.Config {
				return &api.Config{Address: a.Address(), Scheme: "https", TLSConfig: api.TLSConfig{CAFile: a.CA().File}}
			},
		},
		{"Unix socket", []caddytest.AgentOption{caddytest.WithUnixSocket()}, "unix:///", nil},
		{"another address, and a disk", []caddytest.AgentOption{caddytest.WithIP("127.0.0.3"), caddytest.WithDisk()}, "127.0.0.3:", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			agent := caddytest.StartAgent(t, c.options...)
			if !strings.HasPrefix(agent.Address(), c.address) {
				t.Errorf("the agent is at %s, want it to begin with %s", agent.Address(), c.address)
			}
			agent.Register(caddytest.Service{Name: "web", Port: 80})
			agent.WaitHealthy("web", 1)
			if c.refuses == nil {
				return
			}
			stranger, err := api.NewClient(c.refuses(agent))
			if err != nil {
				t.Fatal(err)
			}
			if got, _, err := stranger.Health().Service("web", "", true, nil); err == nil && len(got) > 0 {
				t.Errorf("the agent told a stranger of %d instances", len(got))
			}
		})
	}
}

func TestAgentComesBackAsItWas(t *testing.T) {
	caddytest.NoLeaks(t)
	agent := caddytest.StartAgent(t)
	agent.Register(caddytest.Service{Name: "web", Port: 80})
	agent.WaitHealthy("web", 1)

	agent.Pause() // returns when the agent no longer answers
	agent.Resume()
	agent.WaitHealthy("web", 1)

	agent.Kill()
	if _, err := agent.Client().Status().Leader(); err == nil {
		t.Error("the agent answered after it was killed")
	}
	agent.Restart()
	agent.WaitHealthy("web", 1)
}

func TestTrafficIsCounted(t *testing.T) {
	caddytest.NoLeaks(t)
	for _, c := range []struct {
		name   string
		option caddytest.TrafficOption
	}{{"workers", caddytest.Workers(3)}, {"rate", caddytest.Rate(500)}} {
		t.Run(c.name, func(t *testing.T) {
			backend := caddytest.StartBackend(t, caddytest.Named("alone"))
			traffic := caddytest.StartTraffic(t, "http://"+backend.Address(), c.option)
			traffic.WaitMore(20)
			backend.SetStatus(http.StatusTeapot)
			traffic.WaitMore(20)
			backend.SetStatus(http.StatusOK)
			backend.Stop()
			traffic.WaitMore(20)
			backend.Start()
			traffic.WaitMore(20)
			report := traffic.Stop()

			if got := report.Shares()["alone"]; got < 40-6 || got > report.Total()-40+6 {
				t.Errorf("of %d requests, %d were answered well: %v", report.Total(), got, report)
			}
			var teapots, refused int
			for _, failure := range report.Failures() {
				if failure.Err != nil {
					refused++
				} else if failure.Status == http.StatusTeapot {
					teapots++
				}
			}
			if teapots == 0 || refused == 0 || teapots+refused != len(report.Failures()) {
				t.Errorf("%d failures, %d of them with the backend's status and %d because it was down",
					len(report.Failures()), teapots, refused)
			}
			if first, ok := report.First("alone"); !ok || first.Latency <= 0 || report.Quantile(1) < first.Latency {
				t.Errorf("the first sample is %+v, %v", first, ok)
			}
			if rest := report.Between(report.Samples[1].Start, time.Time{}); rest.Total() != report.Total()-1 {
				t.Errorf("%d of %d requests came after the first", rest.Total(), report.Total())
			}
		})
	}
}

// staticProxy is a Caddyfile that needs no plugin.
func staticProxy(site, listen string, upstreams ...string) string {
	return fmt.Sprintf("http://%s {\n\tbind %s\n\treverse_proxy %s\n}\n", site, listen, strings.Join(upstreams, " "))
}

func TestCaddyServesWhatIsLoaded(t *testing.T) {
	caddytest.NoLeaks(t)
	tcp := caddytest.StartBackend(t, caddytest.Named("tcp"))
	socket := caddytest.StartBackend(t, caddytest.Named("socket"), caddytest.OnSocket())
	ipv6 := caddytest.StartBackend(t, caddytest.Named("ipv6"), caddytest.OnIPv6())

	caddy := caddytest.StartCaddy(t)
	listen := caddytest.FreeSocket(t)
	caddy.Load(staticProxy("localhost", "unix/"+listen, tcp.Address(), "unix/"+socket.Address(), ipv6.Address()))
	traffic := caddytest.StartTraffic(t, "http://localhost", caddytest.ThroughSocket(listen))
	traffic.WaitMore(100)

	logs := caddy.Logs().FromNow()
	caddy.Reload()
	logs.Wait(t, `"msg":"load complete"`)
	traffic.WaitMore(100)
	report := traffic.Stop()
	report.RequireSuccess(t)
	for _, backend := range []*caddytest.Backend{tcp, socket, ipv6} {
		if report.Shares()[backend.Name()] == 0 || backend.Requests() == 0 {
			t.Errorf("backend %s got no request: %v", backend.Name(), report)
		}
	}

	err := caddy.TryLoad("http://localhost {\n\treverse_proxy {\n\t\tno_such_option\n\t}\n}\n")
	if err == nil || !strings.Contains(err.Error(), "Caddyfile:3") {
		t.Errorf("loading a Caddyfile with a mistake on its third line returned %v", err)
	}
	if config := caddy.Get("/config/"); !strings.Contains(config, "reverse_proxy") {
		t.Errorf("after a failed load Caddy runs %s", config)
	}
}

func TestCaddyBinaryServesAndObjects(t *testing.T) {
	backend := caddytest.StartBackend(t)
	listen := caddytest.FreeAddress(t)
	caddy := caddytest.StartCaddyBinary(t, staticProxy(listen, "127.0.0.1", backend.Address()))
	traffic := caddytest.StartTraffic(t, "http://"+listen)
	traffic.WaitMore(10)
	traffic.Stop().RequireSuccess(t)
	caddy.Stop()

	result := caddytest.RunCaddy(t, "validate", "--config", "no-such-file")
	if result.Code == 0 || !strings.Contains(result.Stderr, "no-such-file") {
		t.Errorf("validating a missing file returned %+v", result)
	}
}
