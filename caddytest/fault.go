package caddytest

import (
	"context"
	"encoding/json"
	"os"
	"strings"
	"time"

	"github.com/Shopify/toxiproxy/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
)

// FaultProxy stands between Caddy and a real Consul agent, and has the faults
// that networks have. It has one at a time, and none at first.
type FaultProxy struct {
	t        TB
	proxy    *toxiproxy.Proxy
	upstream string
}

// StartFaultProxy starts a proxy to a TCP address. It ends with the test.
func StartFaultProxy(t TB, upstream string) *FaultProxy {
	t.Helper()
	zerolog.SetGlobalLevel(zerolog.Disabled) // some of it can't be given a logger
	server := toxiproxy.NewServer(toxiproxy.NewMetricsContainer(prometheus.NewRegistry()), zerolog.Nop())
	p := &FaultProxy{
		t:        t,
		proxy:    toxiproxy.NewProxy(server, "consul", FreeAddress(t), upstream),
		upstream: upstream,
	}
	p.start()
	t.Cleanup(p.proxy.Stop)
	return p
}

// Address returns where the proxy listens.
func (p *FaultProxy) Address() string { return p.proxy.Listen }

// Refuse closes all connections and accepts no new ones.
func (p *FaultProxy) Refuse() { p.proxy.Stop() }

// Reset closes all connections, and resets new ones once the client has sent
// something.
func (p *FaultProxy) Reset() { p.cut("upstream", "reset_peer", map[string]any{"timeout": 0}) }

// Swallow drops what the server sends, as a route does that leads nowhere. No
// connection ends until Heal.
func (p *FaultProxy) Swallow() { p.add("downstream", "timeout", map[string]any{"timeout": 0}) }

// Delay holds back what the server sends.
func (p *FaultProxy) Delay(latency, jitter time.Duration) {
	p.add("downstream", "latency", map[string]any{"latency": latency.Milliseconds(), "jitter": jitter.Milliseconds()})
}

// Drip lets through what the server sends at 1 KB a second, in crumbs.
func (p *FaultProxy) Drip() { p.add("downstream", "bandwidth", map[string]any{"rate": 1}) }

// Truncate closes each connection after so many bytes from the server.
func (p *FaultProxy) Truncate(after int) {
	p.cut("downstream", "limit_data", map[string]any{"bytes": after})
}

// Redirect closes all connections, and connects new ones to another address.
func (p *FaultProxy) Redirect(upstream string) {
	p.t.Helper()
	err := p.proxy.Update(&toxiproxy.Proxy{Listen: p.proxy.Listen, Upstream: upstream, Enabled: true})
	if err != nil {
		p.t.Fatalf("redirecting the fault proxy to %s: %v", upstream, err)
	}
}

// Heal ends the fault.
func (p *FaultProxy) Heal() {
	p.t.Helper()
	p.proxy.Toxics.ResetToxics(context.Background())
	if p.proxy.Upstream != p.upstream {
		p.Redirect(p.upstream)
	}
	p.start()
}

func (p *FaultProxy) start() {
	p.t.Helper()
	if p.proxy.Enabled {
		return
	}
	if err := p.proxy.Start(); err != nil {
		p.t.Fatalf("starting a fault proxy on %s: %v", p.proxy.Listen, err)
	}
}

// cut closes all connections, so that no query goes on that was sent before the
// fault, and gives new ones the fault.
func (p *FaultProxy) cut(stream, toxic string, attributes map[string]any) {
	p.t.Helper()
	p.proxy.Stop()
	p.add(stream, toxic, attributes)
	p.start()
}

func (p *FaultProxy) add(stream, toxic string, attributes map[string]any) {
	p.t.Helper()
	text, err := json.Marshal(map[string]any{"type": toxic, "stream": stream, "attributes": attributes})
	if err == nil {
		_, err = p.proxy.Toxics.AddToxicJson(strings.NewReader(string(text)))
	}
	if err != nil {
		p.t.Fatalf("giving the fault proxy the fault %s: %v", toxic, err)
	}
}

// Forget kills the agent and removes all its data.
func (a *Agent) Forget() {
	a.t.Helper()
	a.Kill()
	data := a.dataFolder()
	err := os.RemoveAll(data)
	if err == nil {
		err = os.Mkdir(data, 0o700)
	}
	if err != nil {
		a.t.Fatalf("removing the data of Consul on %s: %v", a.address, err)
	}
}
