package caddytest_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/hashicorp/consul/api"

	"github.com/caddy-consul/caddy-consul/caddytest"
)

// A server of Consul that was restarted answers while it still reads its log, so
// it tells of instances that are long gone, and not of those that came since.
// None of that is served.
func TestWhatARestartedConsulRemembersIsNotServed(t *testing.T) {
	caddytest.NoLeaks(t)
	agent := caddytest.StartAgent(t, caddytest.WithDisk())
	backend := caddytest.StartBackend(t, caddytest.Named("live"))
	const services, deploys, restarts = 20, 60, 2
	h := history{t, agent}
	h.do(&api.TxnOp{Node: &api.NodeTxnOp{Verb: api.NodeSet, Node: api.Node{Node: "elsewhere", Address: "127.0.0.1"}}})
	for deploy := range deploys {
		for i := range services {
			h.register(i, "gone", 1+deploy) // ports where nobody listens
		}
	}
	for i := range services {
		h.register(i, "live", backend.Port())
		h.deregister(i, "gone")
	}

	f := startFront(t)
	var sites strings.Builder
	for i := range services {
		sites.WriteString(f.site(fmt.Sprintf("replay-%d.test", i), reverseProxy(consulSource(fmt.Sprintf("replay-%d", i), agent))))
	}
	f.Load(sites.String())
	changes := func() (count int, err error) {
		all, err := f.followed("")
		for _, s := range all {
			if s.State != "following" || s.InstanceCount != 1 {
				err = fmt.Errorf("%s is %s with %d instances (%s), want following with 1", s.Service, s.State, s.InstanceCount, s.LastError)
			}
			count += s.Changes
		}
		if err == nil && len(all) != services {
			err = fmt.Errorf("services followed: got %d, want %d", len(all), services)
		}
		return count, err
	}
	var before int
	caddytest.Eventually(t, caddytest.Patience, func() (err error) {
		before, err = changes()
		return err
	})
	traffic := caddytest.StartTraffic(t, "http://replay-0.test", caddytest.ThroughSocket(f.listen), caddytest.Rate(faultRate))
	for range restarts {
		agent.Kill()
		agent.Restart()
		caddytest.Eventually(t, 2*caddytest.Patience, func() error {
			_, err := changes()
			return err
		})
	}
	traffic.Stop().RequireSuccess(t)
	if after, _ := changes(); after != before {
		t.Errorf("in %d restarts of Consul, %d changes were published of %d services that did not change, want none", restarts, after-before, services)
	}
}

// history writes to Consul's log.
type history struct {
	t     *testing.T
	agent *caddytest.Agent
}

func (h *history) do(ops ...*api.TxnOp) {
	h.t.Helper()
	ok, answer, _, err := h.agent.Client().Txn().Txn(ops, nil)
	if err != nil || !ok {
		h.t.Fatalf("writing to Consul: %v, %+v", err, answer)
	}
}

// register registers an instance of service i.
func (h *history) register(i int, id string, port int) {
	h.t.Helper()
	service := api.AgentService{ID: fmt.Sprintf("%s-%d", id, i), Service: fmt.Sprintf("replay-%d", i), Address: "127.0.0.1", Port: port}
	h.do(&api.TxnOp{Service: &api.ServiceTxnOp{Verb: api.ServiceSet, Node: "elsewhere", Service: service}})
}

func (h *history) deregister(i int, id string) {
	h.t.Helper()
	_, err := h.agent.Client().Catalog().Deregister(&api.CatalogDeregistration{Node: "elsewhere", ServiceID: fmt.Sprintf("%s-%d", id, i)}, nil)
	if err != nil {
		h.t.Fatalf("deregistering from Consul: %v", err)
	}
}
