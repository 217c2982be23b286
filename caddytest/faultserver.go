package caddytest

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"sync"
)

// FaultServer stands before a real Consul agent and relays, except while it has
// a fault: then it answers as no real agent can be made to. Whatever a real
// agent, or a network, can be made to do is not its business.
type FaultServer struct {
	t      TB
	agent  *Agent
	server *http.Server
	listen string
	relay  *httputil.ReverseProxy

	mu       sync.Mutex
	fault    Fault
	present  context.Context // ends when the fault begins or ends
	overturn context.CancelFunc
}

// Fault answers a query in an agent's stead. The function ask returns what the
// agent itself answers, without blocking.
type Fault func(w http.ResponseWriter, r *http.Request, ask func() []byte)

// StartFaultServer starts a server before an agent. It ends with the test.
func StartFaultServer(t TB, agent *Agent) *FaultServer {
	t.Helper()
	s := &FaultServer{t: t, agent: agent, listen: FreeAddress(t)}
	s.present, s.overturn = context.WithCancel(context.Background())
	transport := &http.Transport{DisableKeepAlives: true, DisableCompression: true}
	s.relay = &httputil.ReverseProxy{
		Transport:    transport,
		Rewrite:      func(r *httputil.ProxyRequest) { r.SetURL(&url.URL{Scheme: "http", Host: agent.Address()}) },
		ErrorHandler: s.failed,
	}
	listener, err := net.Listen("tcp", s.listen)
	if err != nil {
		t.Fatalf("starting a fault server: %v", err)
	}
	s.server = &http.Server{Handler: s}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = s.server.Serve(listener)
	}()
	t.Cleanup(func() {
		s.set(nil)
		_ = s.server.Close()
		<-served
	})
	return s
}

// Address returns where the server listens.
func (s *FaultServer) Address() string { return s.listen }

// Fail begins a fault. Queries that are held open get it at once.
func (s *FaultServer) Fail(fault Fault) { s.set(fault) }

// Heal ends the fault.
func (s *FaultServer) Heal() { s.set(nil) }

func (s *FaultServer) set(fault Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault = fault
	s.overturn()
	s.present, s.overturn = context.WithCancel(context.Background())
}

func (s *FaultServer) now() (Fault, context.Context) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.fault, s.present
}

// ServeHTTP answers a query.
func (s *FaultServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	fault, present := s.now()
	if fault != nil {
		fault(w, r, func() []byte { return s.ask(r) })
		return
	}
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	defer context.AfterFunc(present, cancel)()
	s.relay.ServeHTTP(w, r.WithContext(ctx))
}

// failed answers a query that could not be relayed, or that was held open when
// the fault began.
func (s *FaultServer) failed(w http.ResponseWriter, r *http.Request, err error) {
	if fault, _ := s.now(); fault != nil {
		fault(w, r, func() []byte { return s.ask(r) })
		return
	}
	http.Error(w, err.Error(), http.StatusBadGateway)
}

// ask returns what the agent answers to r, without blocking.
func (s *FaultServer) ask(r *http.Request) []byte {
	params := r.URL.Query()
	params.Del("index")
	params.Del("wait")
	body, err := fetch(fmt.Sprintf("http://%s%s?%s", s.agent.Address(), r.URL.Path, params.Encode()))
	if err != nil {
		s.t.Errorf("asking the agent behind a fault server: %v", err)
	}
	return body
}

func fetch(url string) ([]byte, error) {
	client := &http.Client{Timeout: Patience, Transport: &http.Transport{DisableKeepAlives: true}}
	response, err := client.Get(url)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	return io.ReadAll(response.Body)
}
