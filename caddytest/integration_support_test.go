package caddytest_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"maps"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddy-consul/caddy-consul/caddytest"

	// what is tested
	_ "github.com/caddy-consul/caddy-consul"
)

// front is a Caddy in this process that serves in one place, and a client of it.
type front struct {
	*caddytest.Caddy
	t       testing.TB
	network string // "unix" or "tcp"
	listen  string
	client  *http.Client
}

// startFront starts Caddy on a Unix socket, which it hands over when it reloads.
func startFront(t testing.TB) *front {
	t.Helper()
	return startFrontOn(t, "unix", caddytest.FreeSocket(t))
}

func startFrontOn(t testing.TB, network, listen string) *front {
	t.Helper()
	f := &front{t: t, network: network, listen: listen}
	f.client = clientOf(t, network, listen)
	f.Caddy = caddytest.StartCaddy(t)
	return f
}

func clientOf(t testing.TB, network, address string) *http.Client {
	t.Helper()
	transport := &http.Transport{
		MaxIdleConnsPerHost: 64,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, address)
		},
	}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Timeout: caddytest.Patience, Transport: transport}
}

// serve makes Caddy run a single site, for all hosts.
func (f *front) serve(directives ...string) {
	f.t.Helper()
	f.Load(f.site("", directives...))
}

// site returns a site of a Caddyfile, for a host or, if that is empty, for all.
func (f *front) site(host string, directives ...string) string {
	address, bind := "http://"+host, "unix/"+f.listen
	if f.network == "tcp" {
		ip, port, _ := net.SplitHostPort(f.listen)
		address, bind = address+":"+port, ip
	}
	return fmt.Sprintf("%s {\nbind %s\n%s\n}\n", address, bind, strings.Join(directives, "\n"))
}

// reverseProxy returns a directive with the given options.
func reverseProxy(options ...string) string {
	return "reverse_proxy {\n" + strings.Join(options, "\n") + "\n}"
}

// consulSource returns the options that make a service of an agent the source.
func consulSource(service string, agent *caddytest.Agent, options ...string) string {
	return fmt.Sprintf("dynamic consul %s {\naddress %s\n%s\n}", service, agent.Address(), strings.Join(options, "\n"))
}

// inTurn makes all instances answer within as many requests as there are.
const inTurn = "lb_policy consul_round_robin"

// answer is what a client got.
type answer struct {
	status  int
	backend string
	header  http.Header
}

// String returns the name of the backend if it answered well, else the status.
func (a answer) String() string {
	if a.status == http.StatusOK {
		return a.backend
	}
	return fmt.Sprintf("status %d", a.status)
}

const unavailable = "status 503"

// ask sends a request. It is the end of the test if there is no answer.
func (f *front) ask(host string, prepare ...func(*http.Request)) answer {
	f.t.Helper()
	a, err := f.tryAsk(host, prepare...)
	if err != nil {
		f.t.Fatal(err)
	}
	return a
}

func (f *front) tryAsk(host string, prepare ...func(*http.Request)) (answer, error) {
	request, err := http.NewRequest(http.MethodGet, "http://"+host, nil)
	if err != nil {
		return answer{}, err
	}
	for _, change := range prepare {
		change(request)
	}
	response, err := f.client.Do(request)
	if err != nil {
		return answer{}, err
	}
	defer response.Body.Close()
	if _, err = io.Copy(io.Discard, response.Body); err != nil {
		return answer{}, err
	}
	return answer{response.StatusCode, response.Header.Get("Backend"), response.Header}, nil
}

// answers sends requests one after the other, and counts who answered.
func (f *front) answers(host string, count int, prepare ...func(*http.Request)) map[string]int {
	f.t.Helper()
	answers := make(map[string]int)
	for range count {
		answers[f.ask(host, prepare...).String()]++
	}
	return answers
}

// answersAtOnce sends requests, some at the same time, and counts who answered.
func (f *front) answersAtOnce(host string, count, workers int) map[string]int {
	f.t.Helper()
	var (
		mu      sync.Mutex
		total   = make(map[string]int)
		sent    atomic.Int64
		running sync.WaitGroup
	)
	for range workers {
		running.Go(func() {
			for sent.Add(1) <= int64(count) {
				a, err := f.tryAsk(host)
				outcome := a.String()
				if err != nil {
					outcome = err.Error()
				}
				mu.Lock()
				total[outcome]++
				mu.Unlock()
			}
		})
	}
	running.Wait()
	return total
}

// awaitBackends waits until exactly these backends answer the requests to a host
// that serves them in turn; without any, until there is none to serve them.
func (f *front) awaitBackends(host string, want ...string) {
	f.t.Helper()
	if len(want) == 0 {
		want = []string{unavailable}
	}
	slices.Sort(want)
	caddytest.Eventually(f.t, caddytest.Patience, func() error {
		got := slices.Sorted(maps.Keys(f.answers(host, 2*len(want)+1)))
		if !slices.Equal(got, want) {
			return fmt.Errorf("requests to %q are answered by %v, want %v", host, got, want)
		}
		return nil
	})
}

// wantCounts fails the test if the answers are not these.
func wantCounts(t testing.TB, of string, got, want map[string]int) {
	t.Helper()
	if !maps.Equal(got, want) {
		t.Errorf("%s: answered by %v, want %v", of, got, want)
	}
}

// serviceStatus is what the admin endpoint tells of a followed service.
type serviceStatus struct {
	Service, Query, Agent, State string
	LastError                    string     `json:"last_error"`
	FailingSince                 *time.Time `json:"failing_since"`
	ColdStart                    bool       `json:"cold_start"`
	Index                        uint64
	Answers, Changes             int
	Errors                       map[string]int
	NotDialable                  int `json:"not_dialable"`
	InstanceCount                int `json:"instance_count"`
	Instances                    []struct {
		ID, Node, Datacenter, Dial, Status string
		Weight                             int
	}
}

// followings returns what the admin endpoint tells of a service, once for each
// different query, or of all services if it has no name.
func followings(t testing.TB, caddy *caddytest.Caddy, service string) []serviceStatus {
	t.Helper()
	var services []serviceStatus
	text := caddy.Get("/consul/services?service=" + url.QueryEscape(service))
	if err := json.Unmarshal([]byte(text), &services); err != nil {
		t.Fatalf("reading what /consul/services tells: %v in %s", err, text)
	}
	return services
}

// follows returns what the admin endpoint tells of a service that is followed
// with one query.
func follows(t testing.TB, caddy *caddytest.Caddy, service string) serviceStatus {
	t.Helper()
	services := followings(t, caddy, service)
	if len(services) != 1 {
		t.Fatalf("/consul/services tells of %d queries for %s, want 1: %+v", len(services), service, services)
	}
	return services[0]
}

func (f *front) services(service string) []serviceStatus {
	f.t.Helper()
	return followings(f.t, f.Caddy, service)
}

func (f *front) service(service string) serviceStatus {
	f.t.Helper()
	return follows(f.t, f.Caddy, service)
}

// serviceName returns a name for a service that no other test uses, and that is
// good for DNS too.
func serviceName(t testing.TB) string {
	name := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return '-'
	}, strings.ToLower(strings.TrimPrefix(t.Name(), "Test")))
	return name[:min(len(name), 60)]
}

// startInstances starts backends of these names and registers them as instances
// of a service. It returns when Consul tells of them.
func startInstances(t testing.TB, agent *caddytest.Agent, service string, names ...string) map[string]*caddytest.Backend {
	t.Helper()
	backends := make(map[string]*caddytest.Backend)
	for _, name := range names {
		backends[name] = caddytest.StartBackend(t, caddytest.Named(name))
		agent.Register(backends[name].Service(service))
	}
	agent.WaitHealthy(service, len(names))
	return backends
}

// wantLines fails the test unless exactly so many log lines match.
func wantLines(t testing.TB, logs *caddytest.Logs, want int, expression string) {
	t.Helper()
	if lines := logs.Matching(expression); len(lines) != want {
		t.Errorf("log lines that match %q: got %d, want %d:\n%s", expression, len(lines), want, strings.Join(lines, "\n"))
	}
}

// counter is a proxy in front of an agent that counts the queries.
type counter struct {
	address string

	mu      sync.Mutex
	queries []string // the path and, of blocking ones, " after an index"
}

func startCounter(t testing.TB, agent *caddytest.Agent) *counter {
	t.Helper()
	listener, err := net.Listen("tcp", caddytest.FreeAddress(t))
	if err != nil {
		t.Fatal(err)
	}
	transport := new(http.Transport)
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: agent.Address()})
	proxy.Transport = transport
	proxy.ErrorLog = log.New(io.Discard, "", 0) // queries that are given up
	c := &counter{address: listener.Addr().String()}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		query := r.URL.Path
		if r.URL.Query().Has("index") {
			query += " after an index"
		}
		c.mu.Lock()
		c.queries = append(c.queries, query)
		c.mu.Unlock()
		defer func() { _ = recover() }() // how the proxy ends answers that break off
		proxy.ServeHTTP(w, r)
	})}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = server.Serve(listener)
	}()
	t.Cleanup(func() {
		server.Close()
		<-served
		transport.CloseIdleConnections()
	})
	return c
}

// count returns how many queries there were whose path contains a text.
func (c *counter) count(text string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	count := 0
	for _, query := range c.queries {
		if strings.Contains(query, text) {
			count++
		}
	}
	return count
}

// within fails the test if f takes longer than limit.
func within(t testing.TB, limit time.Duration, what string, f func()) {
	t.Helper()
	start := time.Now()
	f()
	if took := time.Since(start); took > limit {
		t.Errorf("%s took %v, want at most %v", what, took, limit)
	}
}

// read returns what a file holds.
func read(t testing.TB, file string) []byte {
	t.Helper()
	content, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return content
}

// write replaces a file at once, as who renames a new one over it, and returns
// its name.
func write(t testing.TB, file string, content []byte) string {
	t.Helper()
	err := os.WriteFile(file+".new", content, 0o600)
	if err == nil {
		err = os.Rename(file+".new", file)
	}
	if err != nil {
		t.Fatal(err)
	}
	return file
}
