package caddytest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
)

// Cluster is a number of real Consul servers that elect a leader. Servers can be
// killed, and cut off from the others.
//
// The servers know each other by addresses at which the cluster's gates listen,
// and the gates let through what comes from servers that are not cut off.
type Cluster struct {
	// Agents are the servers.
	Agents []*Agent

	t     TB
	gates []*gate
}

// StartCluster starts a cluster of servers that keep their state on disk, and
// waits until all of them are of use. It ends with the test. The servers listen
// on 127.0.0.11 and so on, the gates on 127.0.1.11 and so on.
func StartCluster(t TB, size int) *Cluster {
	t.Helper()
	c := &Cluster{t: t}
	ports := make([]struct{ server, serf int }, size)
	join := make([]string, size)
	for i := range size {
		ports[i].server, ports[i].serf = FreePort(t), FreePort(t)
		join[i] = fmt.Sprintf("127.0.1.%d:%d", 11+i, ports[i].serf)
	}
	members, err := json.Marshal(join)
	if err != nil {
		t.Fatalf("encoding the members of a cluster: %v", err)
	}
	for i := range size { // all, before the first one looks at the others
		c.gates = append(c.gates, &gate{inner: fmt.Sprintf("127.0.0.%d", 11+i), cluster: c})
	}
	for i, gate := range c.gates {
		inner, outer := gate.inner, fmt.Sprintf("127.0.1.%d", 11+i)
		gate.open(t, outer, ports[i].server, ports[i].serf)

		settings := &agentSettings{ip: inner, node: fmt.Sprintf("server-%d", i+1), datacenter: "dc1", durable: true}
		settings.extra = []string{fmt.Sprintf(
			"bootstrap_expect = %d\nadvertise_addr = %q\nretry_join = %s\nretry_interval = \"1s\"\nports { server = %d serf_lan = %d }\n",
			size, outer, members, ports[i].server, ports[i].serf)}
		a := &Agent{t: t, agentProcess: &agentProcess{binary: ConsulBinary(t), logs: newLogs()}}
		a.configure(shortTempDir(t), settings)
		cmd := exec.Command(a.binary, a.args...)
		cmd.Env = cleanEnvironment()
		if a.process, err = startProcess("Consul on "+a.address, cmd, a.logs); err != nil {
			t.Fatalf("%v", err)
		}
		t.Cleanup(func() {
			if err := a.process.stop(); err != nil {
				t.Errorf("%v", err)
			}
			a.logs.printIfFailed(t, "Consul on "+a.address)
		})
		c.Agents = append(c.Agents, a)
	}
	for _, a := range c.Agents {
		a.WaitReady()
	}
	return c
}

// Leader waits until one of the servers leads, other than the given ones, and
// returns it.
func (c *Cluster) Leader(except ...*Agent) *Agent {
	c.t.Helper()
	var leader *Agent
	Eventually(c.t, Patience, func() error {
		for _, a := range c.Agents {
			if !slices.Contains(except, a) && a.leads() {
				leader = a
				return nil
			}
		}
		return errors.New("no server of the cluster leads")
	})
	return leader
}

// leads reports whether a server is the leader in its own eyes.
func (a *Agent) leads() bool {
	if a.process.hasEnded() != nil {
		return false
	}
	self, err := a.client.Agent().Self()
	if err != nil {
		return false
	}
	stats, _ := self["Stats"]["consul"].(map[string]any)
	return stats["leader"] == "true"
}

// Followers returns the servers that don't lead.
func (c *Cluster) Followers() []*Agent {
	c.t.Helper()
	leader := c.Leader()
	var followers []*Agent
	for _, a := range c.Agents {
		if a != leader {
			followers = append(followers, a)
		}
	}
	return followers
}

// Settle waits until all servers follow one leader, and sees to it that it is
// another one than a.
func (c *Cluster) Settle(a *Agent) {
	c.t.Helper()
	for _, server := range c.Agents {
		server.WaitReady()
	}
	Eventually(c.t, Patience, func() error {
		if c.Leader() != a {
			return nil
		}
		_, err := a.client.Operator().RaftLeaderTransfer("", nil)
		return fmt.Errorf("the leader is still the agent on %s (%v)", a.address, err)
	})
}

// Isolate cuts a server off from the others, without a word to either side: its
// RPC, Raft and gossip go nowhere. Its HTTP API goes on. (What Serf sends over
// TCP doesn't tell which server it comes from. It passes, but for the isolated
// one's own gate.)
func (c *Cluster) Isolate(a *Agent) { c.gateOf(a).isolated.Store(true) }

// Rejoin ends Isolate.
func (c *Cluster) Rejoin(a *Agent) {
	c.gateOf(a).isolated.Store(false)
	for _, g := range c.gates {
		g.closeBroken()
	}
}

func (c *Cluster) gateOf(a *Agent) *gate {
	c.t.Helper()
	for i := range c.Agents {
		if c.Agents[i] == a {
			return c.gates[i]
		}
	}
	c.t.Fatalf("the agent on %s is none of the cluster", a.address)
	return nil
}

// separates reports whether what comes from an address must not reach g.
func (c *Cluster) separates(from net.Addr, g *gate) bool {
	if g.isolated.Load() {
		return true
	}
	host, _, _ := net.SplitHostPort(from.String())
	for _, other := range c.gates {
		if other.inner == host && other.isolated.Load() {
			return true
		}
	}
	return false
}

// gate is what the other servers of a cluster reach one by.
type gate struct {
	cluster  *Cluster
	inner    string // the address that the server listens on
	isolated atomic.Bool

	mu     sync.Mutex
	closed bool
	conns  map[*gated]struct{}
	work   sync.WaitGroup
}

// gated is a connection through a gate.
type gated struct {
	outside, inside net.Conn
	broken          atomic.Bool // something of it was lost
}

func (g *gate) open(t TB, outer string, serverPort, serfPort int) {
	t.Helper()
	g.conns = make(map[*gated]struct{})
	var closers []io.Closer
	for _, port := range []int{serverPort, serfPort} {
		listener, err := net.Listen("tcp", fmt.Sprintf("%s:%d", outer, port))
		if err != nil {
			t.Fatalf("opening a cluster's gate: %v", err)
		}
		closers = append(closers, listener)
		g.work.Go(func() { g.accept(listener, fmt.Sprintf("%s:%d", g.inner, port)) })
	}
	packets, err := net.ListenPacket("udp", fmt.Sprintf("%s:%d", outer, serfPort))
	if err != nil {
		t.Fatalf("opening a cluster's gate: %v", err)
	}
	closers = append(closers, packets)
	g.work.Go(func() { g.relayPackets(packets, fmt.Sprintf("%s:%d", g.inner, serfPort)) })
	t.Cleanup(func() {
		for _, closer := range closers {
			_ = closer.Close()
		}
		g.mu.Lock()
		g.closed = true
		for conn := range g.conns {
			conn.close()
		}
		g.mu.Unlock()
		g.work.Wait()
	})
}

func (g *gate) accept(listener net.Listener, inner string) {
	for {
		outside, err := listener.Accept()
		if err != nil {
			return
		}
		g.work.Go(func() { g.connect(outside, inner) })
	}
}

func (g *gate) connect(outside net.Conn, inner string) {
	inside, err := net.Dial("tcp", inner)
	if err != nil {
		_ = outside.Close()
		return
	}
	conn := &gated{outside: outside, inside: inside}
	g.mu.Lock()
	if g.closed {
		conn.close()
	}
	g.conns[conn] = struct{}{}
	g.mu.Unlock()
	var both sync.WaitGroup
	both.Go(func() { g.relay(conn, outside, inside) })
	both.Go(func() { g.relay(conn, inside, outside) })
	both.Wait()
	g.mu.Lock()
	delete(g.conns, conn)
	g.mu.Unlock()
}

// relay copies one direction of a connection, and while it is cut swallows it.
func (g *gate) relay(conn *gated, from, to net.Conn) {
	defer conn.close()
	buffer := make([]byte, 32<<10)
	for {
		n, err := from.Read(buffer)
		if err != nil {
			return
		}
		if conn.broken.Load() || g.cluster.separates(conn.outside.RemoteAddr(), g) {
			conn.broken.Store(true)
			continue
		}
		if _, err := to.Write(buffer[:n]); err != nil {
			return
		}
	}
}

// relayPackets relays one way only: who answers a packet of Serf's does so to
// the address that is in it.
func (g *gate) relayPackets(packets net.PacketConn, inner string) {
	to, err := net.ResolveUDPAddr("udp", inner)
	if err != nil {
		return
	}
	buffer := make([]byte, 64<<10)
	for {
		n, from, err := packets.ReadFrom(buffer)
		if err != nil {
			return
		}
		if !g.cluster.separates(from, g) {
			_, _ = packets.WriteTo(buffer[:n], to)
		}
	}
}

// closeBroken closes the connections that have lost something.
func (g *gate) closeBroken() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for conn := range g.conns {
		if conn.broken.Load() {
			conn.close()
		}
	}
}

func (c *gated) close() {
	_ = c.outside.Close()
	_ = c.inside.Close()
}

// WaitReady waits until the agent has a leader and takes registrations.
func (a *Agent) WaitReady() {
	a.t.Helper()
	Eventually(a.t, Patience, func() error {
		if err := a.process.hasEnded(); err != nil {
			a.t.Fatalf("%v; its log:\n%s", err, a.logs.tail(20))
		}
		return a.ready()
	})
}

// dataFolder returns where the agent keeps its data.
func (a *Agent) dataFolder() string {
	for i, arg := range a.args {
		if arg == "-config-file" {
			return strings.TrimSuffix(a.args[i+1], "0.hcl") + "data"
		}
	}
	return ""
}
