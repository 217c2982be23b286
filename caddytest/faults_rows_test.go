package caddytest_test

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/caddy-consul/caddy-consul/caddytest"
)

// Whatever goes wrong between Caddy and Consul, or in Consul, requests go on to
// the instances that are there, the log says it once, metrics and admin endpoint
// show it, and after its end changes are followed again.
func TestNoFaultOfConsulFailsARequest(t *testing.T) {
	table := newFaultTable(t)
	for _, group := range []struct {
		name  string
		play  func(*testing.T, *caddytest.Caddy, *faultTable)
		leaks bool // the fault proxy leaves goroutines behind
	}{
		{name: "network", play: playNetworkFaults, leaks: true},
		{name: "answers", play: playAnswerFaults},
		{name: "TLS", play: playTLSFaults, leaks: true},
		{name: "ACL", play: playACLFaults},
		{name: "agent", play: playAgentFaults},
		{name: "cluster", play: playClusterFaults},
	} {
		t.Run(group.name, func(t *testing.T) {
			if !group.leaks {
				caddytest.NoLeaks(t)
			}
			group.play(t, caddytest.StartCaddy(t), table)
		})
	}
	table.write(t)
}

func playNetworkFaults(t *testing.T, caddy *caddytest.Caddy, table *faultTable) {
	agent := caddytest.SharedAgent(t)
	proxy := caddytest.StartFaultProxy(t, agent.Address())
	s := newStage(t, caddy, agent, proxy.Address())
	for _, f := range []fault{
		{name: "connections refused", kind: "refused", begin: proxy.Refuse},
		{name: "connections reset", kind: "reset", begin: proxy.Reset},
		{name: "black hole: nothing comes, nothing ends", begin: func() {
			proxy.Swallow()
			s.disturb()
		}},
		{name: "latency of 300 ± 200 ms", begin: func() { proxy.Delay(300*time.Millisecond, 200*time.Millisecond) }, during: func(serviceStatus) { s.disturb() }},
		{name: "answers drip at 1 KB/s", begin: proxy.Drip, during: func(serviceStatus) { s.disturb() }},
		{name: "connections end amid the answer", kind: "reset", begin: func() {
			proxy.Truncate(700)
			s.disturb()
		}},
	} {
		f.end = proxy.Heal
		s.play(table, f)
	}
}

// answering returns a fault that gives one answer.
func answering(status int, index, body string) caddytest.Fault {
	return func(w http.ResponseWriter, _ *http.Request, _ func() []byte) {
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("X-Consul-Index", index)
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}
}

// present returns a fault that gives the true answer, at once and with an index
// of its own.
func present(index func() uint64) caddytest.Fault {
	return func(w http.ResponseWriter, r *http.Request, ask func() []byte) {
		answering(http.StatusOK, strconv.FormatUint(index(), 10), string(ask()))(w, r, ask)
	}
}

func playAnswerFaults(t *testing.T, caddy *caddytest.Caddy, table *faultTable) {
	agent := caddytest.SharedAgent(t)
	server := caddytest.StartFaultServer(t, agent)
	s := newStage(t, caddy, agent, server.Address())
	huge := "[" + strings.Repeat("Consul ", 100<<20/7)
	// All indices are lower than the agent's own: a query with a higher one would
	// be held until its wait is over when the fault has ended.
	var answers atomic.Uint64
	paced := func(before serviceStatus) {
		// what takes no time to read is paced at 25 ms
		if got, most := s.follows().Answers-before.Answers, 3*int(faultLasts/(25*time.Millisecond)); got > most {
			t.Errorf("Consul answered %d times in about %v, want at most %d", got, faultLasts, most)
		}
	}
	for _, f := range []struct {
		fault
		answer caddytest.Fault
	}{
		{fault{name: "truncated JSON", kind: "answer"}, answering(200, "9", `[{"Node":{"Node":"a","Address":"10.0.0.1"`)},
		{fault{name: "foreign JSON", kind: "answer"}, answering(200, "9", `{"status":"success","data":[]}`)},
		{fault{name: "100 MB of something else", kind: "answer"}, answering(200, "9", huge)},
		{fault{name: "429", kind: "too_many_requests"}, answering(429, "", "Your IP is issuing too many concurrent connections")},
		{fault{name: "500", kind: "server"}, answering(500, "", "rpc error making call: EOF")},
		{fault{name: "503", kind: "server"}, answering(503, "", "upstream connect error")},
		{fault{name: "403", kind: "forbidden"}, answering(403, "", "Permission denied")},
		{fault{name: "no index, as from something else", kind: "answer"}, answering(200, "", "[]")},
		{fault{name: "index goes backwards", during: paced}, present(func() uint64 { return 8 + answers.Add(1)%2 })},
		{fault{name: "index 0", kind: "index", silent: true, during: paced}, present(func() uint64 { return 0 })},
		{fault{name: "index stands still, nothing blocks", during: paced}, present(func() uint64 { return 7 })},
		{fault{name: "answers flap between one instance and all", during: paced}, func(w http.ResponseWriter, r *http.Request, ask func() []byte) {
			var all []json.RawMessage
			if err := json.Unmarshal(ask(), &all); err != nil || len(all) < 2 {
				t.Errorf("the agent itself told of %d instances, %v", len(all), err)
				return
			}
			some, _ := json.Marshal(all[:1+int(answers.Add(1)%2)*(len(all)-1)])
			answering(200, "9", string(some))(w, r, ask)
		}},
		{fault{name: "empty answers, with `keep_last_on_empty`", options: "keep_last_on_empty 1m"}, answering(200, "9", "[]")},
	} {
		f.begin, f.end = func() { server.Fail(f.answer) }, server.Heal
		s.play(table, f.fault)
	}
}

func playTLSFaults(t *testing.T, caddy *caddytest.Caddy, table *faultTable) {
	agent := caddytest.StartAgent(t, caddytest.WithTLS())
	proxy := caddytest.StartFaultProxy(t, agent.Address())
	s := newStage(t, caddy, agent, proxy.Address())
	impostor := httptest.NewTLSServer(nil)
	t.Cleanup(impostor.Close)
	own := agent.CA().Issue(t, "caddy")
	tls := fmt.Sprintf("tls {\nca %s\ncert %s\nkey %s\n}", agent.CA().File, own.Cert, own.Key)
	for _, f := range []fault{
		{
			name: "no TLS at the other end", kind: "tls",
			begin: func() { proxy.Redirect(caddytest.SharedAgent(t).Address()) },
		},
		{
			name: "certificate of another authority", kind: "tls",
			begin: func() { proxy.Redirect(impostor.Listener.Addr().String()) },
		},
		{name: "connections refused, over HTTP/2", kind: "refused", begin: proxy.Refuse},
	} {
		f.end, f.options = proxy.Heal, tls
		s.play(table, f)
	}
}

func playACLFaults(t *testing.T, caddy *caddytest.Caddy, table *faultTable) {
	agent := caddytest.StartAgent(t, caddytest.WithACLs())
	acl := agent.Client().ACL()
	s := newStage(t, caddy, agent, agent.Address())
	policy := &api.ACLPolicy{Name: "caddy", Rules: `service_prefix "" { policy = "read" } node_prefix "" { policy = "read" }`}
	var err error
	if policy, _, err = acl.PolicyCreate(policy, nil); err != nil {
		t.Fatal(err)
	}
	const secret = "c0dec0de-0000-4000-8000-0000000000ca"
	create := func() string {
		token, _, err := acl.TokenCreate(&api.ACLToken{SecretID: secret, Policies: []*api.ACLLink{{ID: policy.ID}}}, nil)
		if err != nil {
			t.Fatal(err)
		}
		return token.AccessorID
	}
	setRules := func(rules string) {
		changed := *policy
		changed.Rules = rules
		if _, _, err := acl.PolicyUpdate(&changed, nil); err != nil {
			t.Fatal(err)
		}
	}
	accessor := create()
	for _, f := range []fault{
		{
			name: "token loses its rights", kind: "rights",
			begin: func() { setRules(`key_prefix "" { policy = "read" }`) },
			end:   func() { setRules(policy.Rules) },
		},
		{
			name: "token deleted", kind: "forbidden",
			begin: func() {
				if _, err := acl.TokenDelete(accessor, nil); err != nil {
					t.Fatal(err)
				}
			},
			end: func() { accessor = create() },
		},
	} {
		// Consul lets a query that it holds open see its lost rights at its end.
		f.options = "wait 1s\ntoken " + secret
		s.play(table, f)
	}
}

func playAgentFaults(t *testing.T, caddy *caddytest.Caddy, table *faultTable) {
	agent := caddytest.StartAgent(t, caddytest.WithDisk())
	s := newStage(t, caddy, agent, agent.Address())
	s.play(table, fault{
		name: "agent suspended (SIGSTOP)", begin: agent.Pause, end: func() {
			agent.Resume()
			agent.WaitReady()
		},
	})
	s.play(table, fault{
		name: "agent killed (SIGKILL), restarted with its data", kind: "refused",
		begin: agent.Kill, end: agent.Restart,
	})
	// A restarted agent takes what it checks itself for critical until it has
	// checked again, which may be all instances of a service.
	checked := newStage(t, caddy, agent, agent.Address())
	for _, instance := range checked.instances {
		checkByHTTP(t, agent, instance, 2*time.Second)
	}
	agent.WaitHealthy(checked.service, 2)
	checked.play(table, fault{
		name: "the same, with HTTP checks by that agent, with `keep_last_on_empty`", kind: "refused",
		options: "keep_last_on_empty 1m", begin: agent.Kill, end: func() {
			agent.Restart()
			agent.WaitHealthy(checked.service, 2)
		},
	})
	s.play(table, fault{
		name: "agent killed, restarted without its data, with `keep_last_on_empty`", kind: "refused",
		options: "keep_last_on_empty 1m",
		begin:   agent.Forget, end: func() {
			agent.Restart()
			for _, instance := range s.instances {
				agent.Register(instance)
			}
		},
	})
}

// checkByHTTP registers an instance again, with a check that the agent makes.
func checkByHTTP(t *testing.T, agent *caddytest.Agent, s caddytest.Service, interval time.Duration) {
	t.Helper()
	err := agent.Client().Agent().ServiceRegisterOpts(&api.AgentServiceRegistration{
		ID: s.ID, Name: s.Name, Address: s.Address, Port: s.Port,
		Check: &api.AgentServiceCheck{
			HTTP: fmt.Sprintf("http://%s:%d", s.Address, s.Port), Interval: interval.String(), Status: api.HealthPassing,
		},
	}, api.ServiceRegisterOpts{ReplaceExistingChecks: true})
	if err != nil {
		t.Fatalf("registering %s with an HTTP check: %v", s.ID, err)
	}
}

func playClusterFaults(t *testing.T, caddy *caddytest.Caddy, table *faultTable) {
	cluster := caddytest.StartCluster(t, 3)
	asked := cluster.Followers()[0]
	s := newStage(t, caddy, asked, asked.Address())
	var down []*caddytest.Agent
	var other *caddytest.Agent
	s.play(table, fault{
		name: "leader killed", unsure: true,
		begin: func() {
			down = []*caddytest.Agent{cluster.Leader()}
			down[0].Kill()
		},
		end: func() { asked.WaitReady() },
		undo: func() {
			s.agent.Deregister(s.spare.Name())
			down[0].Restart()
			cluster.Settle(asked)
		},
	})
	s.play(table, fault{
		name: "quorum lost and regained", unsure: true,
		begin: func() {
			down = nil
			for _, a := range cluster.Agents {
				if a != asked {
					a.Kill()
					down = append(down, a)
				}
			}
		},
		end: func() {
			for _, a := range down {
				a.Restart()
			}
			asked.WaitReady()
		},
		undo: func() {
			s.agent.Deregister(s.spare.Name())
			cluster.Settle(asked)
		},
	})
	s.play(table, fault{
		name: "agent cut off from the other servers", unsure: true,
		begin: func() {
			cluster.Isolate(asked)
			other = cluster.Leader(asked)
			other.Register(s.spare.Service(s.service))
		},
		end: func() {
			cluster.Rejoin(asked)
			asked.WaitReady()
			s.awaitHealthy(asked, 3*caddytest.Patience, s.instances[0].ID, s.instances[1].ID, s.spare.Name()) // Serf takes its time
		},
		during: func(serviceStatus) {
			s.awaitHealthy(other, caddytest.Patience, s.spare.Name()) // the others are on a node that doesn't answer it
			if got := s.follows().InstanceCount; got != 2 {
				t.Errorf("instances known while the agent is cut off: got %d, want 2", got)
			}
		},
		change: func() {}, // it was made elsewhere meanwhile
		undo: func() {
			other.Deregister(s.spare.Name())
			cluster.Settle(asked)
		},
	})
}

// awaitHealthy waits until an agent tells that these instances are healthy, and
// perhaps others.
func (s *stage) awaitHealthy(agent *caddytest.Agent, patience time.Duration, ids ...string) {
	s.t.Helper()
	caddytest.Eventually(s.t, patience, func() error {
		healthy, _, err := agent.Client().Health().Service(s.service, "", true, nil)
		if err != nil {
			return err
		}
		for _, id := range ids {
			if !slices.ContainsFunc(healthy, func(e *api.ServiceEntry) bool { return e.Service.ID == id }) {
				return fmt.Errorf("instance %s is not among the %d healthy ones", id, len(healthy))
			}
		}
		return nil
	})
}
