package consulupstreams

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	_ "github.com/caddyserver/caddy/v2/modules/filestorage"
	"github.com/hashicorp/consul/api"

	"github.com/caddy-consul/caddy-consul/internal/endpoint"
	_ "github.com/caddy-consul/caddy-consul/selection"
)

// patience is how long a test waits for what should take milliseconds.
const patience = 20 * time.Second

func eventually(t testing.TB, check func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("still so after %s: %v", patience, err)
		}
		<-tick.C
	}
}

// fakeConsul answers blocking queries about any service as Consul does, until it
// is told to fail. The real one can't be made to fail at will.
type fakeConsul struct {
	server *httptest.Server

	mu       sync.Mutex
	index    uint64
	services map[string][]*api.ServiceEntry
	isDown   bool
	isMute   bool // keeps questions without an answer
	changed  chan struct{}
}

func newFakeConsul(t testing.TB) *fakeConsul {
	t.Helper()
	c := &fakeConsul{index: 1, services: make(map[string][]*api.ServiceEntry), changed: make(chan struct{})}
	c.server = httptest.NewServer(c)
	t.Cleanup(func() {
		c.server.CloseClientConnections()
		c.server.Close()
	})
	return c
}

func (c *fakeConsul) update(change func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	change()
	close(c.changed)
	c.changed = make(chan struct{})
}

// set changes the instances of the service web.
func (c *fakeConsul) set(entries ...*api.ServiceEntry) { c.setService("web", entries...) }

func (c *fakeConsul) setService(service string, entries ...*api.ServiceEntry) {
	c.update(func() {
		c.index++
		c.services[service] = entries
	})
}

func (c *fakeConsul) setDown(isDown bool) { c.update(func() { c.isDown = isDown }) }
func (c *fakeConsul) setMute(isMute bool) { c.update(func() { c.isMute = isMute }) }

func (c *fakeConsul) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	index, _ := strconv.ParseUint(r.URL.Query().Get("index"), 10, 64)
	c.mu.Lock()
	for c.isMute || !c.isDown && c.index <= index {
		changed := c.changed
		c.mu.Unlock()
		select {
		case <-changed:
		case <-r.Context().Done():
			return
		}
		c.mu.Lock()
	}
	defer c.mu.Unlock()
	if c.isDown {
		http.Error(w, "No cluster leader", http.StatusInternalServerError)
		return
	}
	entries := c.services[strings.TrimPrefix(r.URL.Path, "/v1/health/service/")]
	if entries == nil {
		entries = []*api.ServiceEntry{}
	}
	w.Header().Set("X-Consul-Index", strconv.FormatUint(c.index, 10))
	_ = json.NewEncoder(w).Encode(entries)
}

// Caddy keeps failures by address for the whole process, so each test has
// addresses of its own.
var addresses atomic.Uint32

// instance returns a healthy instance of the weight, at an address of its own.
func instance(weight int) *api.ServiceEntry {
	n := addresses.Add(1)
	return instanceAt(fmt.Sprintf("10.%d.%d.%d:80", n>>16&255, n>>8&255, n&255), weight)
}

func instanceAt(address string, weight int) *api.ServiceEntry {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		panic(err)
	}
	number, _ := strconv.Atoi(port)
	return &api.ServiceEntry{
		Node: &api.Node{Node: "node-" + address, Address: host, Datacenter: "dc1"},
		Service: &api.AgentService{
			ID: "web-" + address, Service: "web", Address: host, Port: number,
			Weights: api.AgentWeights{Passing: weight, Warning: 1},
		},
		Checks: api.HealthChecks{{CheckID: "serfHealth", Status: api.HealthPassing}},
	}
}

func instances(n, weight int) []*api.ServiceEntry {
	entries := make([]*api.ServiceEntry, n)
	for i := range entries {
		entries[i] = instance(weight)
	}
	return entries
}

func addressOf(e *api.ServiceEntry) string {
	return net.JoinHostPort(e.Service.Address, strconv.Itoa(e.Service.Port))
}

func addressesOf(entries []*api.ServiceEntry) []string {
	list := make([]string, len(entries))
	for i, e := range entries {
		list[i] = addressOf(e)
	}
	return list
}

// backends stand for all instances, at whatever address. An instance is what
// Caddy was about to dial.
type backends struct {
	mu       sync.Mutex
	dead     map[string]bool
	hits     map[string]int
	attempts map[string][]string // by the request's header Id

	// before, if set, is called with each attempt.
	before func(address string, r *http.Request)
}

func (b *backends) RoundTrip(r *http.Request) (*http.Response, error) {
	dial, ok := reverseproxy.GetDialInfo(r.Context())
	if !ok {
		return nil, errors.New("no dial info")
	}
	if b.before != nil {
		b.before(dial.Address, r)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if id := r.Header.Get("Id"); id != "" {
		b.attempts[id] = append(b.attempts[id], dial.Address)
	}
	if b.dead[dial.Address] {
		return nil, errors.New("connection refused")
	}
	b.hits[dial.Address]++
	return &http.Response{
		StatusCode: http.StatusOK, Status: "200 OK", Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: http.Header{"Served-By": {dial.Address}}, Body: io.NopCloser(strings.NewReader("ok")), Request: r,
	}, nil
}

func (b *backends) kill(addresses ...string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, address := range addresses {
		b.dead[address] = true
	}
}

// counts returns how many requests each of the addresses has served, and forgets
// them.
func (b *backends) counts(addresses []string) []int {
	b.mu.Lock()
	defer b.mu.Unlock()
	counts := make([]int, len(addresses))
	for i, address := range addresses {
		counts[i] = b.hits[address]
	}
	b.hits = make(map[string]int)
	return counts
}

// proxy is Caddy's reverse proxy with our source, provisioned by Caddy.
type proxy struct {
	*reverseproxy.Handler
	*backends
	source *Upstreams
}

// object is JSON.
type object map[string]any

// newProxy loads a reverse_proxy of the given config whose source follows the
// service web, with the given options.
func newProxy(t testing.TB, consul *fakeConsul, config, source object) *proxy {
	t.Helper()
	options := object{"source": "consul", "service": "web", "address": consul.server.URL}
	for name, value := range source {
		options[name] = value
	}
	complete := object{"dynamic_upstreams": options}
	for name, value := range config {
		complete[name] = value
	}
	p := loadProxy(t, complete)
	p.source = p.DynamicUpstreams.(*Upstreams)
	return p
}

func loadProxy(t testing.TB, config object) *proxy {
	t.Helper()
	var caddyConfig caddy.Config
	text, err := json.Marshal(object{
		"admin":   object{"disabled": true},
		"storage": object{"module": "file_system", "root": t.TempDir()},
		"logging": object{"logs": object{"default": object{"level": "PANIC"}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &caddyConfig); err != nil {
		t.Fatal(err)
	}
	base, err := caddy.ProvisionContext(&caddyConfig)
	if err != nil {
		t.Fatalf("provisioning Caddy: %v", err)
	}
	ctx, cancel := caddy.NewContext(base)
	t.Cleanup(cancel)
	text, err = json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	module, err := ctx.LoadModuleByID("http.handlers.reverse_proxy", text)
	if err != nil {
		t.Fatalf("loading the proxy: %v", err)
	}
	p := &proxy{Handler: module.(*reverseproxy.Handler), backends: &backends{
		dead: make(map[string]bool), hits: make(map[string]int), attempts: make(map[string][]string),
	}}
	p.Transport = p.backends
	return p
}

// set returns the Set that the source serves from.
func (p *proxy) set() *endpoint.Set {
	subscription, err := p.source.follow.of(nil)
	if err != nil || subscription == nil {
		return nil
	}
	return subscription.Set()
}

// await waits until the source knows just the given instances.
func (p *proxy) await(t testing.TB, entries ...*api.ServiceEntry) {
	t.Helper()
	want := addressesOf(entries)
	slices.Sort(want)
	eventually(t, func() error {
		set := p.set()
		if set == nil {
			return errors.New("instances: got none known yet")
		}
		got := make([]string, set.Len())
		for i := range got {
			got[i] = set.At(i).Dial
		}
		slices.Sort(got)
		if !slices.Equal(got, want) {
			return fmt.Errorf("instances: got %v, want %v", got, want)
		}
		return nil
	})
}

func newRequest() (*httptest.ResponseRecorder, *http.Request) {
	w := httptest.NewRecorder()
	r := httptest.NewRequest(http.MethodGet, "http://example.com/", nil)
	return w, caddyhttp.PrepareRequest(r, caddy.NewReplacer(), w, &caddyhttp.Server{})
}

// response is what a client got.
type response struct {
	status   int
	servedBy string
	header   http.Header
	err      error
}

func (p *proxy) get() response { return p.getWith(nil) }

func (p *proxy) getWith(header http.Header) response {
	w, r := newRequest()
	for name, values := range header {
		r.Header[name] = values
	}
	err := p.ServeHTTP(w, r, caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error { return nil }))
	status := w.Code
	var handlerError caddyhttp.HandlerError
	if errors.As(err, &handlerError) {
		status = handlerError.StatusCode
	} else if err != nil {
		status = http.StatusInternalServerError
	}
	return response{status, w.Header().Get("Served-By"), w.Header(), err}
}

func wantStatus(t testing.TB, when string, got response, want int) {
	t.Helper()
	if got.status != want {
		t.Errorf("%s: got %d (%v), want %d", when, got.status, got.err, want)
	}
}

func TestStaticUpstreamsServeWhileThereIsNoInstance(t *testing.T) {
	const static = "192.0.2.1:80"
	fallback := object{"upstreams": []object{{"dial": static}}}
	t.Run("no answer yet", func(t *testing.T) {
		consul := newFakeConsul(t)
		consul.setMute(true)
		p := newProxy(t, consul, fallback, object{"startup_timeout": "20ms"})
		if got := p.get().servedBy; got != static {
			t.Errorf("served by: got %q, want the static upstream", got)
		}
	})
	t.Run("Consul down", func(t *testing.T) {
		consul := newFakeConsul(t)
		consul.setDown(true)
		p := newProxy(t, consul, fallback, object{"startup_timeout": "20ms"})
		if got := p.get().servedBy; got != static {
			t.Errorf("served by: got %q, want the static upstream", got)
		}
	})
	t.Run("no instance, then one, then none", func(t *testing.T) {
		consul := newFakeConsul(t)
		p := newProxy(t, consul, fallback, nil)
		p.await(t)
		if got := p.get().servedBy; got != static {
			t.Errorf("served by: got %q, want the static upstream", got)
		}
		one := instance(1)
		consul.set(one)
		p.await(t, one)
		if got := p.get().servedBy; got != addressOf(one) {
			t.Errorf("served by: got %q, want the instance %s", got, addressOf(one))
		}
		consul.set()
		p.await(t)
		if got := p.get().servedBy; got != static {
			t.Errorf("served by: got %q, want the static upstream", got)
		}
	})
}

func TestWithoutAnInstanceRequestsAreRefused(t *testing.T) {
	consul := newFakeConsul(t)
	p := newProxy(t, consul, nil, nil)
	p.await(t)
	wantStatus(t, "request for a service without instances", p.get(), http.StatusServiceUnavailable)
}

func TestARequestBeforeTheFirstAnswer(t *testing.T) {
	t.Run("waits for it", func(t *testing.T) {
		consul := newFakeConsul(t)
		one := instance(1)
		consul.set(one)
		consul.setMute(true)
		p := newProxy(t, consul, nil, object{"startup_timeout": "20s"})
		answered := make(chan response, 1)
		go func() { answered <- p.get() }()
		consul.setMute(false)
		wantStatus(t, "request that came before the first answer", <-answered, http.StatusOK)
	})
	t.Run("does not wait for ever", func(t *testing.T) {
		consul := newFakeConsul(t)
		consul.setMute(true)
		p := newProxy(t, consul, nil, object{"startup_timeout": "50ms"})
		wantStatus(t, "request without an answer", p.get(), http.StatusServiceUnavailable)

		// the time counts from the start of following
		p.source.StartupTimeout = caddy.Duration(time.Nanosecond)
		start := time.Now()
		wantStatus(t, "request after the time is over", p.get(), http.StatusServiceUnavailable)
		if got := time.Since(start); got > time.Second {
			t.Errorf("request after the time is over: refused after %s, want at once", got)
		}
	})
}

func TestServeStale(t *testing.T) {
	start := func(t *testing.T, limit any) (*fakeConsul, *proxy) {
		t.Helper()
		consul := newFakeConsul(t)
		one := instance(1)
		consul.set(one)
		source := object{}
		if limit != nil {
			source["serve_stale"] = limit
		}
		p := newProxy(t, consul, nil, source)
		p.await(t, one)
		wantStatus(t, "while Consul answers", p.get(), http.StatusOK)
		consul.setDown(true)
		eventually(t, func() error {
			if subscription, _ := p.source.follow.of(nil); subscription.FailingFor() == 0 {
				return errors.New("Consul is down, and not known to be")
			}
			return nil
		})
		return consul, p
	}
	refused := func(t *testing.T, p *proxy) {
		t.Helper()
		eventually(t, func() error {
			if got := p.get().status; got != http.StatusServiceUnavailable {
				return fmt.Errorf("while Consul is down: got %d, want 503", got)
			}
			return nil
		})
	}
	t.Run("for ever", func(t *testing.T) {
		_, p := start(t, nil)
		for range 10 {
			wantStatus(t, "while Consul is down", p.get(), http.StatusOK)
		}
	})
	// The service does not change meanwhile, so only that Consul answers again
	// tells that the instances are right.
	t.Run("never", func(t *testing.T) {
		consul, p := start(t, -1)
		refused(t, p)
		consul.setDown(false)
		eventually(t, func() error {
			if got := p.get().status; got != http.StatusOK {
				return fmt.Errorf("when Consul answers again: got %d, want 200", got)
			}
			return nil
		})
	})
	t.Run("for long", func(t *testing.T) {
		_, p := start(t, "1h")
		wantStatus(t, "while Consul has been down for a moment", p.get(), http.StatusOK)
	})
	t.Run("for a moment", func(t *testing.T) {
		_, p := start(t, "30ms")
		refused(t, p)
	})
}

func TestPlaceholders(t *testing.T) {
	consul := newFakeConsul(t)
	one := instance(7)
	one.Service.Tags = []string{"v2", "canary"}
	one.Service.Meta = map[string]string{"version": "2", "dotted.key": "x"}
	consul.set(one)
	fields := []string{"id", "service", "node", "datacenter", "status", "weight", "tags", "meta.version", "meta.dotted.key", "meta.missing"}
	want := []string{one.Service.ID, "web", one.Node.Node, "dc1", "passing", "7", "v2,canary", "2", "x", ""}
	for _, where := range []string{"request", "response"} {
		t.Run(where, func(t *testing.T) {
			set := object{}
			for i, field := range fields {
				set[fmt.Sprintf("X-%d", i)] = []string{"<{http.reverse_proxy.upstreams.consul." + field + "}>"}
			}
			p := newProxy(t, consul, object{"headers": object{where: object{"set": set}}}, nil)
			p.await(t, one)
			var sent http.Header
			p.before = func(_ string, r *http.Request) { sent = r.Header.Clone() }
			got := p.get()
			wantStatus(t, "request", got, http.StatusOK)
			if where == "response" {
				sent = got.header
			}
			for i, field := range fields {
				if got := sent.Get(fmt.Sprintf("X-%d", i)); got != "<"+want[i]+">" {
					t.Errorf("placeholder %s: got %q, want %q", field, got, "<"+want[i]+">")
				}
			}
		})
	}
}

// After a retry the placeholders are about the instance that served.
func TestPlaceholdersAfterARetry(t *testing.T) {
	for _, policy := range []string{"", "consul_round_robin", "random_choose", "first"} {
		t.Run(policy, func(t *testing.T) {
			consul := newFakeConsul(t)
			pair := instances(2, 1)
			consul.set(pair...)
			lb := object{"retries": 1}
			if policy != "" {
				lb["selection_policy"] = object{"policy": policy}
			}
			p := newProxy(t, consul, object{
				"load_balancing": lb,
				"headers":        object{"request": object{"set": object{"Instance": []string{"{http.reverse_proxy.upstreams.consul.id}"}}}},
			}, nil)
			p.await(t, pair...)
			p.kill(addressOf(pair[0]))
			p.before = func(address string, r *http.Request) {
				if got := r.Header["Instance"]; !slices.Equal(got, []string{"web-" + address}) {
					t.Errorf("instance that %s is told to be: got %q, want web-%s", address, got, address)
				}
			}
			for range 20 {
				wantStatus(t, "request", p.get(), http.StatusOK)
			}
		})
	}
}

func TestCleanupMayFollowAFailedProvision(t *testing.T) {
	if err := new(Upstreams).Cleanup(); err != nil {
		t.Errorf("cleaning up what was never provisioned: got error %v, want none", err)
	}
}

// Requests of the old config may still be retried after a reload.
func TestRequestsAfterCleanup(t *testing.T) {
	consul := newFakeConsul(t)
	one := instance(1)
	consul.set(one)
	p := newProxy(t, consul, nil, nil)
	p.await(t, one)
	if err := p.source.Cleanup(); err != nil {
		t.Fatalf("cleaning up: got error %v, want none", err)
	}
	wantStatus(t, "request of a config that has gone", p.get(), http.StatusOK)
}
