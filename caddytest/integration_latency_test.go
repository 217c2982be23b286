package caddytest_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/caddy-consul/caddy-consul/caddytest"
)

// BenchmarkChangeToTraffic measures, on a real agent, the time from the start of
// a registration to the first answer of the new instance through Caddy, and from
// the start of a deregistration to its last answer, beside what a bare blocking
// query needs to tell of the same changes. Run it with -benchtime 100x.
func BenchmarkChangeToTraffic(b *testing.B) {
	const (
		spacing = 120 * time.Millisecond
		rate    = 2000 // every other request goes to the new instance
	)
	agent := caddytest.StartAgent(b)
	startInstances(b, agent, "web", "steady")
	fresh := caddytest.StartBackend(b, caddytest.Named("new"))
	front := startFront(b)
	front.serve(reverseProxy(inTurn, consulSource("web", agent)))
	front.awaitBackends("web.test", "steady")
	traffic := caddytest.StartTraffic(b, "http://web.test", caddytest.ThroughSocket(front.listen), caddytest.Rate(rate))
	bare := startBareQuery(b, agent, "web", "new")
	services := agent.Client().Agent()

	var registered, deregistered []time.Time
	change := func(isThere bool, apply func() error) time.Time {
		start := time.Now()
		if err := apply(); err != nil {
			b.Fatal(err)
		}
		bare.await(isThere)
		caddytest.Pause(b, spacing-time.Since(start))
		return start
	}
	for b.Loop() {
		registered = append(registered, change(true, func() error {
			return services.ServiceRegister(&api.AgentServiceRegistration{ID: "new", Name: "web", Address: "127.0.0.1", Port: fresh.Port()})
		}))
		deregistered = append(deregistered, change(false, func() error { return services.ServiceDeregister("new") }))
	}
	report := traffic.Stop()
	report.RequireSuccess(b)

	var firsts, lasts []time.Duration
	for i, start := range registered {
		end := deregistered[i]
		next := time.Now()
		if i+1 < len(registered) {
			next = registered[i+1]
		}
		first, ok := report.Between(start, end).First("new")
		if !ok {
			b.Fatalf("registration %d: no request reached the new instance within %v", i, end.Sub(start))
		}
		firsts = append(firsts, first.Start.Add(first.Latency).Sub(start))
		last := time.Duration(0)
		if sample, ok := report.Between(end, next).Last("new"); ok {
			last = sample.Start.Add(sample.Latency).Sub(end)
		}
		lasts = append(lasts, last)
	}
	reportQuantiles(b, "register", firsts)
	reportQuantiles(b, "register-bare", bare.delays(true, registered))
	reportQuantiles(b, "deregister", lasts)
	reportQuantiles(b, "deregister-bare", bare.delays(false, deregistered))
	b.ReportMetric(0, "ns/op") // which is the spacing
}

// bareQuery is a blocking query and no more, with the official client.
type bareQuery struct {
	t       testing.TB
	mu      sync.Mutex
	answers []bareAnswer
}

type bareAnswer struct {
	at      time.Time
	isThere bool
}

func startBareQuery(t testing.TB, agent *caddytest.Agent, service, id string) *bareQuery {
	t.Helper()
	client, err := api.NewClient(&api.Config{Address: agent.Address()})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	q := &bareQuery{t: t}
	done := make(chan struct{})
	go func() {
		defer close(done)
		index := uint64(0)
		for {
			options := (&api.QueryOptions{WaitIndex: index, WaitTime: time.Minute}).WithContext(ctx)
			entries, meta, err := client.Health().Service(service, "", true, options)
			at := time.Now()
			if ctx.Err() != nil {
				return
			}
			if err != nil {
				t.Errorf("the bare blocking query: %v", err)
				return
			}
			index = meta.LastIndex
			isThere := slices.ContainsFunc(entries, func(e *api.ServiceEntry) bool { return e.Service.ID == id })
			q.mu.Lock()
			q.answers = append(q.answers, bareAnswer{at, isThere})
			q.mu.Unlock()
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return q
}

// await waits until the last answer says whether the instance is there.
func (q *bareQuery) await(isThere bool) {
	q.t.Helper()
	caddytest.Eventually(q.t, caddytest.Patience, func() error {
		q.mu.Lock()
		defer q.mu.Unlock()
		if len(q.answers) == 0 || q.answers[len(q.answers)-1].isThere != isThere {
			return fmt.Errorf("a bare blocking query has not told of the change")
		}
		return nil
	})
}

// delays returns how long after each of the changes the query told of it.
func (q *bareQuery) delays(isThere bool, changes []time.Time) []time.Duration {
	q.mu.Lock()
	defer q.mu.Unlock()
	var delays []time.Duration
	for _, change := range changes {
		i := slices.IndexFunc(q.answers, func(a bareAnswer) bool { return a.at.After(change) && a.isThere == isThere })
		delays = append(delays, q.answers[i].at.Sub(change))
	}
	return delays
}

func reportQuantiles(b *testing.B, name string, delays []time.Duration) {
	slices.Sort(delays)
	for _, q := range []float64{0.5, 0.99} {
		at := min(int(q*float64(len(delays))), len(delays)-1)
		b.ReportMetric(float64(delays[at].Microseconds())/1000, fmt.Sprintf("%s-p%.0f-ms", name, q*100))
	}
}

// BenchmarkShares sends requests to instances with the weights 1, 2 and 3, and
// reports how far the answers are from what the policy promises: the farthest
// that any instance was from its share at any time, in requests, or the
// chi-square of all, of which chance gives 9.2 once in a hundred times. Run it
// with -benchtime 100000x.
func BenchmarkShares(b *testing.B) {
	agent := caddytest.StartAgent(b)
	for _, c := range []struct {
		policy string
		shares map[string]int
	}{
		{"lb_policy consul_weighted_round_robin", weights},
		{"lb_policy consul_weighted_random", weights},
		{"", weights},
		{"lb_policy consul_round_robin", equal},
		{"lb_policy consul_random", equal},
	} {
		b.Run(policyName(c.policy), func(b *testing.B) {
			name := serviceName(b)
			startWeighted(b, agent, name)
			front := startFront(b)
			front.serve(reverseProxy(c.policy, consulSource(name, agent)))
			front.awaitBackends("shares.test", "a", "b", "c")
			answers := make(map[string]int)
			var farthest float64
			for b.Loop() {
				answers[front.ask("shares.test").String()]++
				farthest = max(farthest, drift(answers, c.shares))
			}
			if strings.Contains(c.policy, "round_robin") {
				b.ReportMetric(farthest, "farthest")
			} else {
				b.ReportMetric(chiSquare(answers, c.shares), "chi-square")
			}
			b.Logf("%v", answers)
		})
	}
}
