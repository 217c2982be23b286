package caddytest

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/hashicorp/consul/api"
)

// ManagementToken is the token that may do everything on an agent WithACLs.
const ManagementToken = "00000000-0000-0000-0000-00000000c0de"

// Agent is a real Consul agent: a server of its own, in development mode.
type Agent struct {
	t TB
	*agentProcess
}

// agentProcess is what several tests can share of an Agent.
type agentProcess struct {
	binary   string
	args     []string
	address  string
	ca       *CA
	client   *api.Client
	logs     *Logs
	process  *process // replaced by Restart
	isShared bool
}

// AgentOption is an option of StartAgent.
type AgentOption func(*agentSettings)

type agentSettings struct {
	ip               string
	acls, tls, unix  bool
	durable          bool
	node, datacenter string
	extra            []string
}

// WithIP makes the agent listen on another loopback address, say 127.0.0.2.
func WithIP(ip string) AgentOption { return func(s *agentSettings) { s.ip = ip } }

// WithACLs makes the agent refuse what no token allows. Its Client uses the
// ManagementToken.
func WithACLs() AgentOption { return func(s *agentSettings) { s.acls = true } }

// WithTLS makes the agent speak HTTPS alone, to clients with a certificate of
// its CA alone.
func WithTLS() AgentOption { return func(s *agentSettings) { s.tls = true } }

// WithUnixSocket makes the agent serve its HTTP API on a Unix socket alone.
func WithUnixSocket() AgentOption { return func(s *agentSettings) { s.unix = true } }

// WithNode names the agent's node; the default is "node-1".
func WithNode(name string) AgentOption { return func(s *agentSettings) { s.node = name } }

// WithDatacenter names the agent's datacentre; the default is "dc1".
func WithDatacenter(name string) AgentOption { return func(s *agentSettings) { s.datacenter = name } }

// WithDisk makes the agent keep Consul's state on disk, so that its index goes
// on after a Restart. Without it the agent registers its services again after
// a Restart, but everything else is gone and the index starts over.
func WithDisk() AgentOption { return func(s *agentSettings) { s.durable = true } }

// WithHCL adds settings in Consul's configuration language, which win over the
// harness's own.
func WithHCL(settings string) AgentOption {
	return func(s *agentSettings) { s.extra = append(s.extra, settings) }
}

// StartAgent starts a Consul agent on free ports and waits until it has a leader
// and takes registrations. It ends with the test.
func StartAgent(t TB, options ...AgentOption) *Agent {
	t.Helper()
	settings := &agentSettings{ip: "127.0.0.1", node: "node-1", datacenter: "dc1"}
	for _, option := range options {
		option(settings)
	}
	dir := shortTempDir(t)
	a := &Agent{t: t, agentProcess: &agentProcess{binary: ConsulBinary(t), logs: newLogs()}}
	a.configure(dir, settings)
	t.Cleanup(func() {
		if err := a.process.stop(); err != nil {
			t.Errorf("%v", err)
		}
		a.logs.printIfFailed(t, "Consul on "+a.address)
	})
	a.start()
	return a
}

// SharedAgent returns an agent that all tests of the package share, without
// ACLs or TLS. It is started on first use and ended by Main. What a test
// registers through its own *Agent is gone after the test.
func SharedAgent(t TB) *Agent {
	t.Helper()
	owner := shared.owner(t)
	shared.agentOnce.Do(func() {
		agent := StartAgent(owner)
		agent.isShared = true
		shared.agent = agent
	})
	if shared.agent == nil {
		t.Fatalf("the agent that the tests of this package share could not be started")
	}
	logs := shared.agent.logs.FromNow()
	t.Cleanup(func() { logs.printIfFailed(t, "Consul on "+shared.agent.address) })
	return &Agent{t: t, agentProcess: shared.agent.agentProcess}
}

// configure writes the agent's configuration into dir.
func (a *Agent) configure(dir string, s *agentSettings) {
	t := a.t
	t.Helper()
	data := filepath.Join(dir, "data")
	if err := os.Mkdir(data, 0o700); err != nil {
		t.Fatalf("making Consul's data folder: %v", err)
	}
	port := FreePort(t)
	ports := map[string]any{
		"http": port, "https": -1, "dns": -1, "grpc": -1, "grpc_tls": -1,
		"server": FreePort(t), "serf_lan": FreePort(t), "serf_wan": -1,
	}
	config := map[string]any{
		"data_dir":              data,
		"bind_addr":             s.ip,
		"node_name":             s.node,
		"datacenter":            s.datacenter,
		"log_level":             "INFO",
		"ports":                 ports,
		"connect":               map[string]any{"enabled": false},
		"peering":               map[string]any{"enabled": false},
		"ui_config":             map[string]any{"enabled": false},
		"performance":           map[string]any{"raft_multiplier": 1},
		"leave_on_terminate":    false, // a restart is no departure
		"disable_update_check":  true,
		"check_update_interval": "0s", // every output of a check counts
	}
	client := &api.Config{Address: net.JoinHostPort(s.ip, fmt.Sprint(port)), Scheme: "http"}
	config["client_addr"] = s.ip

	if s.unix {
		socket := "unix://" + filepath.Join(dir, "http.sock")
		config["addresses"] = map[string]any{"http": socket}
		client.Address = socket
	}
	if s.tls {
		a.ca = NewCA(t)
		server := a.ca.Issue(t, "consul", "localhost", s.ip, "server."+s.datacenter+".consul")
		ports["http"], ports["https"] = -1, port
		config["tls"] = map[string]any{"https": map[string]any{
			"ca_file": a.ca.File, "cert_file": server.Cert, "key_file": server.Key, "verify_incoming": true,
		}}
		own := a.ca.Issue(t, "caddytest")
		client.Scheme = "https"
		client.TLSConfig = api.TLSConfig{CAFile: a.ca.File, CertFile: own.Cert, KeyFile: own.Key}
	}
	if s.acls {
		config["primary_datacenter"] = s.datacenter
		config["acl"] = map[string]any{
			"enabled":        true,
			"default_policy": "deny",
			"tokens":         map[string]any{"initial_management": ManagementToken, "agent": ManagementToken},
		}
		client.Token = ManagementToken
	}

	a.args = []string{"agent"}
	if s.durable {
		config["server"], config["bootstrap_expect"] = true, 1
	} else {
		a.args = append(a.args, "-dev")
	}
	text, err := json.MarshalIndent(config, "", "  ")
	if err != nil {
		t.Fatalf("encoding Consul's configuration: %v", err)
	}
	for i, settings := range append([]string{string(text)}, s.extra...) {
		file := filepath.Join(dir, fmt.Sprintf("%d.hcl", i))
		if err := os.WriteFile(file, []byte(settings), 0o600); err != nil {
			t.Fatalf("writing Consul's configuration: %v", err)
		}
		a.args = append(a.args, "-config-file", file)
	}

	a.address = client.Address
	client.Transport = &http.Transport{DisableKeepAlives: true}
	if a.client, err = api.NewClient(client); err != nil {
		t.Fatalf("making a client for Consul on %s: %v", a.address, err)
	}
}

// start starts the process and waits until the agent is of use.
func (a *Agent) start() {
	t := a.t
	t.Helper()
	cmd := exec.Command(a.binary, a.args...)
	cmd.Env = cleanEnvironment()
	var err error
	if a.process, err = startProcess("Consul on "+a.address, cmd, a.logs); err != nil {
		t.Fatalf("%v", err)
	}
	Eventually(t, Patience, func() error {
		if err := a.process.hasEnded(); err != nil {
			t.Fatalf("%v; its log:\n%s", err, a.logs.tail(20))
		}
		return a.ready()
	})
}

// ready returns nil once the agent has a leader, its health endpoint answers and
// it has registered its own node, before which it would put off registrations.
func (a *Agent) ready() error {
	self, err := a.client.Agent().NodeName()
	if err != nil {
		return fmt.Errorf("the agent on %s does not answer: %w", a.address, err)
	}
	instances, meta, err := a.client.Health().Service("consul", "", true, nil)
	if err != nil {
		return fmt.Errorf("the agent on %s does not tell health: %w", a.address, err)
	}
	if !meta.KnownLeader || len(instances) == 0 {
		return fmt.Errorf("the agent on %s has no leader", a.address)
	}
	node, _, err := a.client.Catalog().Node(self, nil)
	if err != nil {
		return fmt.Errorf("the agent on %s does not tell about its node: %w", a.address, err)
	}
	if node == nil || node.Node.TaggedAddresses["lan"] == "" {
		return fmt.Errorf("the agent on %s has not registered its own node", a.address)
	}
	return nil
}

// Address returns where the agent serves its HTTP API, as the option `address`
// takes it: "127.0.0.1:8500" or "unix:///tmp/http.sock".
func (a *Agent) Address() string { return a.address }

// Client returns a client of the agent that may do everything. It opens a
// connection for each request, so that it leaves no goroutine behind.
func (a *Agent) Client() *api.Client { return a.client }

// CA returns the authority of the certificates of an agent WithTLS.
func (a *Agent) CA() *CA { return a.ca }

// PID returns the number of the agent's process.
func (a *Agent) PID() int { return a.process.cmd.Process.Pid }

// Logs returns what the agent has logged.
func (a *Agent) Logs() *Logs { return a.logs }

// Pause stops the agent without closing a connection, as a machine does that has
// been suspended.
func (a *Agent) Pause() {
	a.t.Helper()
	a.send(syscall.SIGSTOP)
	Eventually(a.t, Patience, func() error { // its threads don't stop all at once
		ctx, cancel := context.WithTimeout(a.t.Context(), 100*time.Millisecond)
		defer cancel()
		_, err := a.client.Status().LeaderWithQueryOptions(new(api.QueryOptions).WithContext(ctx))
		if err == nil {
			return fmt.Errorf("the agent on %s goes on answering after SIGSTOP", a.address)
		}
		return nil
	})
}

// Resume lets a paused agent go on.
func (a *Agent) Resume() {
	a.t.Helper()
	a.send(syscall.SIGCONT)
}

func (a *Agent) send(sig syscall.Signal) {
	a.t.Helper()
	err := a.process.hasEnded()
	if err == nil {
		err = a.process.signal(sig)
	}
	if err != nil {
		a.t.Fatalf("%v", err)
	}
}

// Kill ends the agent at once, without a goodbye.
func (a *Agent) Kill() {
	a.t.Helper()
	if err := a.process.kill(); err != nil {
		a.t.Fatalf("%v", err)
	}
}

// Restart starts the agent again, on the same address and with the same data,
// after stopping it if it runs, and waits as StartAgent does.
func (a *Agent) Restart() {
	a.t.Helper()
	if err := a.process.stop(); err != nil {
		a.t.Fatalf("%v", err)
	}
	a.start()
}

// Service is an instance of a service. Only the name is needed.
type Service struct {
	Name    string
	ID      string // the name by default
	Address string // the node's by default
	Port    int
	Socket  string // the path of a Unix socket, instead of Address and Port
	Tags    []string
	Meta    map[string]string
	Weights *api.AgentWeights // 1 by default
	Status  string            // of its check; passing by default
}

func (s Service) id() string {
	if s.ID != "" {
		return s.ID
	}
	return s.Name
}

// Register registers an instance with one check, whose status only SetCheck
// changes. Registering an ID again changes the instance and sets the check to
// the given status.
func (a *Agent) Register(s Service) {
	t := a.t
	t.Helper()
	status := s.Status
	if status == "" {
		status = api.HealthPassing
	}
	err := a.client.Agent().ServiceRegister(&api.AgentServiceRegistration{
		ID: s.id(), Name: s.Name, Address: s.Address, Port: s.Port, SocketPath: s.Socket,
		Tags: s.Tags, Meta: s.Meta, Weights: s.Weights,
		Check: &api.AgentServiceCheck{CheckID: checkID(s.id()), TTL: "24h", Status: status},
	})
	if err != nil {
		t.Fatalf("registering %s at Consul on %s: %v", s.id(), a.address, err)
	}
	a.SetCheck(s.id(), status) // no change, but Consul remembers only such a status over a restart
	if a.isShared {
		t.Cleanup(func() { _ = a.client.Agent().ServiceDeregister(s.id()) })
	}
}

// Deregister removes an instance.
func (a *Agent) Deregister(id string) {
	a.t.Helper()
	if err := a.client.Agent().ServiceDeregister(id); err != nil {
		a.t.Fatalf("deregistering %s at Consul on %s: %v", id, a.address, err)
	}
}

// SetCheck sets the status of an instance's check: passing, warning or critical.
func (a *Agent) SetCheck(id, status string) {
	a.t.Helper()
	if err := a.client.Agent().UpdateTTL(checkID(id), "", status); err != nil {
		a.t.Fatalf("setting the check of %s to %s at Consul on %s: %v", id, status, a.address, err)
	}
}

func checkID(serviceID string) string { return "check:" + serviceID }

// StartMaintenance puts an instance into maintenance mode.
func (a *Agent) StartMaintenance(id string) {
	a.t.Helper()
	if err := a.client.Agent().EnableServiceMaintenance(id, "a test"); err != nil {
		a.t.Fatalf("putting %s into maintenance at Consul on %s: %v", id, a.address, err)
	}
}

// EndMaintenance ends the maintenance mode of an instance.
func (a *Agent) EndMaintenance(id string) {
	a.t.Helper()
	if err := a.client.Agent().DisableServiceMaintenance(id); err != nil {
		a.t.Fatalf("ending the maintenance of %s at Consul on %s: %v", id, a.address, err)
	}
}

// RegisterOn puts an instance into the catalogue under another node, one that no
// agent of its own runs on, with the address of that node.
func (a *Agent) RegisterOn(node, nodeAddress string, s Service) {
	t := a.t
	t.Helper()
	status := s.Status
	if status == "" {
		status = api.HealthPassing
	}
	service := &api.AgentService{
		ID: s.id(), Service: s.Name, Address: s.Address, Port: s.Port, SocketPath: s.Socket,
		Tags: s.Tags, Meta: s.Meta,
	}
	if s.Weights != nil {
		service.Weights = *s.Weights
	}
	_, err := a.client.Catalog().Register(&api.CatalogRegistration{
		Node: node, Address: nodeAddress, Service: service,
		Check: &api.AgentCheck{
			Node: node, CheckID: checkID(s.id()), Name: "Service '" + s.Name + "' check",
			Status: status, ServiceID: s.id(),
		},
	}, nil)
	if err != nil {
		t.Fatalf("registering %s on node %s at Consul on %s: %v", s.id(), node, a.address, err)
	}
	if a.isShared {
		t.Cleanup(func() {
			_, _ = a.client.Catalog().Deregister(&api.CatalogDeregistration{Node: node, ServiceID: s.id()}, nil)
		})
	}
}

// DeregisterOn removes an instance that RegisterOn has put into the catalogue.
func (a *Agent) DeregisterOn(node, id string) {
	a.t.Helper()
	if _, err := a.client.Catalog().Deregister(&api.CatalogDeregistration{Node: node, ServiceID: id}, nil); err != nil {
		a.t.Fatalf("deregistering %s on node %s at Consul on %s: %v", id, node, a.address, err)
	}
}

// WaitHealthy waits until Consul itself tells of exactly count healthy instances
// of a service.
func (a *Agent) WaitHealthy(service string, count int) {
	a.t.Helper()
	Eventually(a.t, Patience, func() error {
		instances, _, err := a.client.Health().Service(service, "", true, nil)
		if err != nil {
			return fmt.Errorf("asking Consul on %s for the instances of %s: %w", a.address, service, err)
		}
		if len(instances) != count {
			return fmt.Errorf("the agent on %s tells of %d healthy instances of %s, want %d", a.address, len(instances), service, count)
		}
		return nil
	})
}
