package main

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/caddy-consul/caddy-consul/caddytest"
)

// stage is what the parts measure on: an agent and a backend.
type stage struct {
	t       caddytest.TB
	agent   *caddytest.Agent
	backend *backend
	dns     string // where the agent answers DNS
}

func newStage(t caddytest.TB) *stage {
	dns := caddytest.FreePort(t)
	return &stage{
		t: t,
		agent: caddytest.StartAgent(t,
			caddytest.WithHCL(fmt.Sprintf(`ports { dns = %d }`, dns)),
			// shows how many queries the agent has answered
			caddytest.WithHCL(`telemetry { prometheus_retention_time = "1h"  disable_hostname = true }`)),
		backend: startBackend(t),
		dns:     fmt.Sprintf("127.0.0.1:%d", dns),
	}
}

// opsPerTxn is how many operations a transaction of Consul may have.
const opsPerTxn = 128

// nodeOf spreads instances over nodes as an orchestrator does.
func nodeOf(i int) string { return fmt.Sprintf("node-%03d", i%100) }

// weightOf gives the instances weights from 1 to 100, without a common divisor.
func weightOf(i int) int { return 1 + i*7919%100 }

// register registers count instances of a service with a check each, instance
// i at address from+i of the backend.
func (s *stage) register(service string, from, count int) {
	s.t.Helper()
	s.registerAt(service, count, func(i int) string { return s.backend.ip(from + i) })
}

// registerAt registers instances that are at the addresses that ip returns.
func (s *stage) registerAt(service string, count int, ip func(i int) string) {
	s.t.Helper()
	var ops api.TxnOps
	for i := range count {
		ops = append(ops,
			&api.TxnOp{Service: &api.ServiceTxnOp{
				Verb: api.ServiceSet, Node: nodeOf(i),
				Service: api.AgentService{
					ID: fmt.Sprintf("%s-%d", service, i), Service: service, Address: ip(i), Port: s.backend.port,
					Tags:    []string{"http", "v1"},
					Meta:    map[string]string{"version": "1.0." + strconv.Itoa(i%10), "zone": "z" + strconv.Itoa(i%3)},
					Weights: api.AgentWeights{Passing: weightOf(i), Warning: 1},
				},
			}},
			s.check(service, i, api.HealthPassing),
		)
	}
	s.commit(ops)
}

// check is the operation that sets the check of instance i.
func (s *stage) check(service string, i int, status string) *api.TxnOp {
	id := fmt.Sprintf("%s-%d", service, i)
	return &api.TxnOp{Check: &api.CheckTxnOp{Verb: api.CheckSet, Check: api.HealthCheck{
		Node: nodeOf(i), CheckID: "check:" + id, Name: "Service '" + service + "' check",
		Status: status, ServiceID: id,
		Output: "HTTP GET http://" + s.backend.address(i) + "/health: 200 OK Output: ok",
	}}}
}

// registerNodes puts the nodes into the catalogue that instances are on.
func (s *stage) registerNodes() {
	s.t.Helper()
	var ops api.TxnOps
	for i := range 100 {
		ops = append(ops, &api.TxnOp{Node: &api.NodeTxnOp{
			Verb: api.NodeSet, Node: api.Node{Node: nodeOf(i), Address: fmt.Sprintf("10.0.0.%d", i+1)},
		}})
	}
	s.commit(ops)
}

// commit has Consul do operations, in transactions as large as it allows.
func (s *stage) commit(ops api.TxnOps) {
	s.t.Helper()
	for len(ops) > 0 {
		batch := ops[:min(opsPerTxn, len(ops))]
		ops = ops[len(batch):]
		ok, answer, _, err := s.agent.Client().Txn().Txn(batch, nil)
		if err != nil {
			s.t.Fatalf("changing Consul's catalogue: %v", err)
		}
		if !ok {
			s.t.Fatalf("changing Consul's catalogue: %s", answer.Errors[0].What)
		}
	}
}

// proxy is a Caddy of its own process that proxies everything.
type proxy struct {
	*caddytest.Caddy
	t   caddytest.TB
	url string
}

// startProxy starts a Caddy whose only site has the directives, and waits until
// it serves.
func (s *stage) startProxy(directives string) *proxy {
	s.t.Helper()
	p := s.startIdle(directives)
	caddytest.Eventually(s.t, caddytest.Patience, func() error {
		response, err := http.Get(p.url)
		if err != nil {
			return err
		}
		defer response.Body.Close()
		if response.StatusCode != http.StatusOK {
			return fmt.Errorf("Caddy answered with status %s", response.Status) //nolint:staticcheck // a name
		}
		return nil
	})
	return p
}

// startIdle starts a Caddy whose only site has the directives, and sends it no
// request.
func (s *stage) startIdle(directives string) *proxy {
	s.t.Helper()
	listen := caddytest.FreeAddress(s.t)
	_, port, _ := strings.Cut(listen, ":")
	return &proxy{
		t:   s.t,
		url: "http://" + listen + "/",
		Caddy: caddytest.StartCaddyBinary(s.t, fmt.Sprintf(
			"{\n\tauto_https off\n\tconsul {\n\t\taddress %s\n\t}\n}\nhttp://:%s {\n\tbind 127.0.0.1\n\t%s\n}\n",
			s.agent.Address(), port, strings.ReplaceAll(directives, "\n", "\n\t"))),
	}
}

// fetch returns what Caddy's admin endpoint answers.
func (p *proxy) fetch(path string) ([]byte, error) {
	response, err := http.Get(p.AdminURL() + path)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("Caddy answered with status %s: %s", response.Status, body) //nolint:staticcheck // a name
	}
	return body, err
}

// cpu returns the processor time that Caddy has taken.
func (p *proxy) cpu() time.Duration {
	return time.Duration(p.metric("process_cpu_seconds_total") * float64(time.Second))
}

// metric returns the sum of a metric of Caddy over its labels.
func (p *proxy) metric(name string) (sum float64) {
	p.t.Helper()
	found := false
	lines := bufio.NewScanner(strings.NewReader(p.Get("/metrics")))
	for lines.Scan() {
		rest, ok := strings.CutPrefix(lines.Text(), name)
		if !ok || rest == "" || rest[0] != ' ' && rest[0] != '{' {
			continue
		}
		value, err := strconv.ParseFloat(rest[strings.LastIndexByte(rest, ' ')+1:], 64)
		if err != nil {
			p.t.Fatalf("reading the metric %s: %v", name, err)
		}
		sum, found = sum+value, true
	}
	if !found {
		p.t.Fatalf("Caddy has no metric %s", name)
	}
	return sum
}
