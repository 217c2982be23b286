package discovery

import (
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddy-consul/caddy-consul/internal/endpoint"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m, goleak.IgnoreCurrent()) }

// patience is how long a test waits for what should take milliseconds.
const patience = 20 * time.Second

// eventually waits until check returns nil.
func eventually(t *testing.T, check func() error) {
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

// scripted is a Consul agent for which the test answers by hand, one question
// at a time. Real agents can't be made to give most of these answers.
type scripted struct{ asks chan *ask }

func newScripted() *scripted { return &scripted{make(chan *ask)} }

// ask is a request that waits for the test to answer it.
type ask struct {
	*http.Request
	at      time.Time
	replies chan *http.Response
}

func (s *scripted) RoundTrip(req *http.Request) (*http.Response, error) {
	a := &ask{req, time.Now(), make(chan *http.Response, 1)}
	select {
	case s.asks <- a:
	case <-req.Context().Done():
		return nil, req.Context().Err()
	}
	select {
	case resp := <-a.replies:
		if resp == nil {
			return nil, syscall.ECONNREFUSED
		}
		return resp, nil
	case <-req.Context().Done():
		return nil, req.Context().Err()
	}
}

func (s *scripted) next() *ask { return <-s.asks }

// nextFrom returns the next question and checks the index that it carries:
// empty if it is to be answered at once.
func (s *scripted) nextFrom(t *testing.T, index string) *ask {
	t.Helper()
	a := s.next()
	if got := a.URL.Query().Get("index"); got != index {
		t.Fatalf("index of the next question: got %q, want %q", got, index)
	}
	return a
}

// nextOfTheLeader returns the next question and checks that it asks for the
// leader's word, at once.
func (s *scripted) nextOfTheLeader(t *testing.T) *ask {
	t.Helper()
	a := s.nextFrom(t, "")
	if params := a.URL.Query(); !params.Has("consistent") || params.Has("stale") {
		t.Fatalf("the next question: got %v, want one of strongest consistency", params)
	}
	return a
}

func (a *ask) refuse() { a.replies <- nil }

func (a *ask) reply(status int, header map[string]string, body string) {
	w := httptest.NewRecorder()
	for name, value := range header {
		w.Header().Set(name, value)
	}
	w.WriteHeader(status)
	_, _ = w.WriteString(body)
	a.replies <- w.Result()
}

func (a *ask) instances(index uint64, entries ...*api.ServiceEntry) {
	a.reply(http.StatusOK, map[string]string{"X-Consul-Index": strconv.FormatUint(index, 10)}, listed(entries))
}

func (a *ask) wait(t *testing.T) time.Duration {
	t.Helper()
	wait, err := time.ParseDuration(a.URL.Query().Get("wait"))
	if err != nil {
		t.Fatalf("wait of the question: %v", err)
	}
	return wait
}

// live is a Consul agent that knows one service and answers blocking queries as
// Consul does, until it is told to fail.
type live struct {
	mu      sync.Mutex
	index   uint64
	entries []*api.ServiceEntry
	header  map[string]string
	fault   http.HandlerFunc
	changed chan struct{}
	asked   []*http.Request
}

func newLive(entries ...*api.ServiceEntry) *live {
	return &live{index: 7, entries: entries, changed: make(chan struct{})}
}

// set changes the service, and ends a fault.
func (l *live) set(entries ...*api.ServiceEntry) {
	l.update(func() {
		l.index++
		l.entries, l.fault = entries, nil
	})
}

// fail makes the agent give no better answer than that of fault.
func (l *live) fail(fault http.HandlerFunc) { l.update(func() { l.fault = fault }) }

// recover ends a fault without a change of the service.
func (l *live) recover() { l.update(func() { l.fault = nil }) }

func (l *live) update(change func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	change()
	close(l.changed)
	l.changed = make(chan struct{})
}

// questions returns the requests so far.
func (l *live) questions() []*http.Request {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.asked)
}

func (l *live) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	index, _ := strconv.ParseUint(r.URL.Query().Get("index"), 10, 64)
	l.mu.Lock()
	l.asked = append(l.asked, r)
	for l.fault == nil && index > 0 && l.index <= index {
		changed := l.changed
		l.mu.Unlock()
		select {
		case <-changed:
		case <-r.Context().Done():
			return
		}
		l.mu.Lock()
	}
	fault, now, body := l.fault, l.index, listed(l.entries)
	for name, value := range l.header {
		w.Header().Set(name, value)
	}
	l.mu.Unlock()
	if fault != nil {
		fault(w, r)
		return
	}
	w.Header().Set("X-Consul-Index", strconv.FormatUint(now, 10))
	_, _ = w.Write([]byte(body))
}

// serve puts a handler on the network. It outlives the test's other cleanups,
// and waits for nobody.
func serve(t *testing.T, handler http.Handler) *httptest.Server {
	t.Helper()
	server := httptest.NewServer(handler)
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
	return server
}

// inMemory asks a handler without a network, for tests in fake time.
type inMemory struct{ http.Handler }

func (m inMemory) RoundTrip(r *http.Request) (*http.Response, error) {
	w := httptest.NewRecorder()
	m.ServeHTTP(w, r)
	if err := r.Context().Err(); err != nil {
		return nil, err
	}
	return w.Result(), nil
}

// web returns a healthy instance, of the given name on a node of the same name.
func web(name string) *api.ServiceEntry {
	return &api.ServiceEntry{
		Node: &api.Node{Node: name, Address: "10.0.0.1", Datacenter: "dc1"},
		Service: &api.AgentService{
			ID: "web-" + name, Service: "web", Address: name + ".test", Port: 80,
			Weights: api.AgentWeights{Passing: 1, Warning: 1},
		},
		Checks: api.HealthChecks{{CheckID: "serfHealth", Status: api.HealthPassing}},
	}
}

func listed(entries []*api.ServiceEntry) string {
	if len(entries) == 0 {
		return "[]"
	}
	text, err := json.Marshal(entries)
	if err != nil {
		panic(err)
	}
	return string(text)
}

func nodesOf(set *endpoint.Set) []string {
	if set == nil {
		return nil
	}
	nodes := make([]string, set.Len())
	for i := range nodes {
		nodes[i] = set.At(i).Node
	}
	return nodes
}

func wantNodes(t *testing.T, when string, set *endpoint.Set, want ...string) {
	t.Helper()
	if got := nodesOf(set); !slices.Equal(got, want) {
		t.Errorf("instances %s: got %v, want %v", when, got, want)
	}
}

var webQuery = Query{Service: "web", Health: HealthPassing, Wait: 5 * time.Minute}

// followed is a watcher under test.
type followed struct {
	*watcher
	logs *observer.ObservedLogs
}

// follow starts a watcher that asks through the given transport.
func follow(t *testing.T, transport http.RoundTripper, query Query) followed {
	t.Helper()
	return followWith(t, query, func(c *client) { c.http.Transport = transport })
}

func followWith(t *testing.T, query Query, prepare func(*client)) followed {
	t.Helper()
	agent, err := newAgent(&api.Config{Address: "consul.test:8500"})
	if err != nil {
		t.Fatalf("making an agent: %v", err)
	}
	prepare(agent.client)
	logger, logs := observed()
	log := &logSource{func() *zap.Logger { return logger }}
	w := newWatcher(query, agent, func() { _ = agent.Destruct() }, log)
	t.Cleanup(func() { _ = w.Destruct() })
	return followed{w, logs}
}

func observed() (*zap.Logger, *observer.ObservedLogs) {
	core, logs := observer.New(zapcore.DebugLevel)
	return zap.New(core), logs
}

// logged counts the lines of at least the level that have the message.
func (f followed) logged(level zapcore.Level, message string) int {
	return f.logs.Filter(func(e observer.LoggedEntry) bool {
		return e.Level >= level && e.Message == message
	}).Len()
}

const (
	msgFailing   = "Consul gives no usable answer; what was known last stays in use"
	msgRecovered = "Consul answers again"
	msgPanic     = "recovered from a panic while following Consul; please report it"
	msgRefused   = "instances left out because they can't be dialled"
)

// firstSet waits for the first Set.
func firstSet(t *testing.T, w *watcher) *endpoint.Set {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	select {
	case <-w.first:
		return w.set.Load()
	case <-ctx.Done():
		t.Fatalf("got no first answer within %s, want one", patience)
		return nil
	}
}
