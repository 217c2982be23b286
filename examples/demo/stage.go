package main

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/caddy-consul/caddy-consul/caddytest"
)

const (
	service = "web"

	// an instance without a request for so long gets none any more
	silence = 200 * time.Millisecond

	// how far a share may be from what the weights say
	tolerance = 0.02
)

// stage is all that runs, and what the demo knows about it.
type stage struct {
	t         caddytest.TB
	agent     *caddytest.Agent
	traffic   *caddytest.Traffic
	instances []*instance // those in Consul
	parts     int
}

// instance is a backend with its weight in Consul.
type instance struct {
	*caddytest.Backend
	weight int
}

func newStage(t caddytest.TB) *stage {
	return &stage{t: t, agent: caddytest.StartAgent(t, caddytest.WithDisk())}
}

// start starts a backend that Consul doesn't know yet.
func (s *stage) start(name string) *caddytest.Backend {
	return caddytest.StartBackend(s.t, caddytest.Named(name))
}

// add registers a backend as an instance of the service, or changes its weight.
func (s *stage) add(backend *caddytest.Backend, weight int) {
	registration := backend.Service(service)
	registration.Weights = &api.AgentWeights{Passing: weight, Warning: 1}
	s.agent.Register(registration)
	if i := s.indexOf(backend.Name()); i >= 0 {
		s.instances[i].weight = weight
		return
	}
	s.instances = append(s.instances, &instance{backend, weight})
}

// remove deregisters an instance, whose backend goes on.
func (s *stage) remove(i *instance) {
	s.agent.Deregister(i.Name())
	at := s.indexOf(i.Name())
	s.instances = slices.Delete(s.instances, at, at+1)
}

func (s *stage) find(name string) *instance {
	at := s.indexOf(name)
	if at < 0 {
		s.t.Fatalf("%s is not registered", name)
	}
	return s.instances[at]
}

func (s *stage) indexOf(name string) int {
	return slices.IndexFunc(s.instances, func(i *instance) bool { return i.Name() == name })
}

// sendTraffic starts Caddy and the traffic.
func (s *stage) sendTraffic() {
	s.agent.WaitHealthy(service, len(s.instances))
	listen := caddytest.FreeAddress(s.t)
	caddyfile := fmt.Sprintf(`http://%s {
    bind 127.0.0.1
    reverse_proxy {
        dynamic consul %s {
            address %s
        }
        lb_policy consul_weighted_round_robin
        lb_retries 2
    }
}
`, listen, service, s.agent.Address())
	fmt.Printf("Caddy runs with this Caddyfile:\n\n%s\n", caddyfile)
	caddytest.StartCaddyBinary(s.t, caddyfile)
	fmt.Printf("%d requests per second are sent to it from now on.\n", perSecond)
	s.traffic = caddytest.StartTraffic(s.t, "http://"+listen, caddytest.Rate(perSecond))
}

// waitSilent waits until an instance gets no more requests.
func (s *stage) waitSilent(i *instance) {
	seen, since := i.Requests(), time.Now()
	caddytest.Eventually(s.t, caddytest.Patience, func() error {
		if now := i.Requests(); now != seen {
			seen, since = now, time.Now()
		}
		if time.Since(since) < silence {
			return fmt.Errorf("%s still gets requests", i.Name())
		}
		return nil
	})
}

// waitBusy waits until a backend has got more requests than before.
func (s *stage) waitBusy(backend *caddytest.Backend, before int) {
	caddytest.Eventually(s.t, caddytest.Patience, func() error {
		if backend.Requests() == before {
			return fmt.Errorf("%s gets no request", backend.Name())
		}
		return nil
	})
}

func (s *stage) title(text string) {
	s.parts++
	fmt.Printf("\n%d. %s\n", s.parts, text)
}

// showTraffic says what became of the requests since a time.
func (s *stage) showTraffic(from time.Time) {
	fmt.Printf("  %s\n", count(s.traffic.Report().Between(from, time.Time{})))
}

// showFirst says when a backend got its first request after a change, and
// returns that time.
func (s *stage) showFirst(backend *caddytest.Backend, change time.Time, what string) time.Time {
	first, ok := s.traffic.Report().Between(change, time.Time{}).First(backend.Name())
	if !ok {
		s.t.Fatalf("%s got no request after %s", backend.Name(), what)
	}
	fmt.Printf("  %s got its first request %s after %s.\n", backend.Name(), milliseconds(first.Start.Sub(change)), what)
	return first.Start
}

// showLast says when an instance got its last request between a change and
// another time, and returns that time.
func (s *stage) showLast(i *instance, change, until time.Time, what string) time.Time {
	last, ok := s.traffic.Report().Between(change, until).Last(i.Name())
	if !ok {
		fmt.Printf("  %s got no request after %s.\n", i.Name(), what)
		return change
	}
	fmt.Printf("  %s got its last request %s after %s.\n", i.Name(), milliseconds(last.Start.Sub(change)), what)
	return last.Start
}

// showSplit shows how the requests after a time were split, and fails the demo
// if that isn't what the weights say.
func (s *stage) showSplit(after time.Time) {
	shares := s.traffic.Report().Between(after.Add(time.Nanosecond), time.Time{}).Shares()
	requests, weights := 0, 0
	for name, n := range shares {
		requests += n
		if s.indexOf(name) < 0 {
			s.t.Errorf("part %d: %s got %d requests, but is not registered any more", s.parts, name, n)
		}
	}
	for _, i := range s.instances {
		weights += i.weight
	}

	fmt.Println("  From then on the requests were split like this:")
	for _, i := range s.instances {
		got := float64(shares[i.Name()]) / float64(max(requests, 1))
		want := float64(i.weight) / float64(weights)
		fmt.Printf("    %-6s  weight %d  %5.1f %%, due %5.1f %%  %s\n",
			i.Name(), i.weight, got*100, want*100, strings.Repeat("#", int(math.Round(got*60))))
		if math.Abs(got-want) > tolerance {
			s.t.Errorf("part %d: %s got %.1f %% of %d requests, but %.1f %% were due by its weight",
				s.parts, i.Name(), got*100, requests, want*100)
		}
	}
}

// sumUp ends the traffic and fails the demo if a request has failed.
func (s *stage) sumUp() {
	report := s.traffic.Stop()
	fmt.Printf("\nIn all: %s. Half of the answers took at most %s, 99 of 100 at most %s.\n",
		count(report), milliseconds(report.Quantile(0.5)), milliseconds(report.Quantile(0.99)))
	report.RequireSuccess(s.t)
	if !s.t.Failed() {
		fmt.Println("No request failed, and each instance got the share that its weight says.")
	}
}

func count(report *caddytest.Report) string {
	return fmt.Sprintf("%d requests, %d failed", report.Total(), len(report.Failures()))
}

func milliseconds(d time.Duration) string {
	return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond))
}
