package main

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/url"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/caddy-consul/caddy-consul/caddytest"
)

const (
	floodInstances = 5000
	floodRate      = 100  // changes per second
	steadyRate     = 1000 // requests per second, whatever the latency
	floodDuration  = 10 * time.Second
	floodRounds    = 5
	followingPause = 300 * time.Millisecond
)

// updatesResult holds the same comparison twice.
type updatesResult struct {
	Shared *updatesComparison // all processes share the cores
	Apart  *updatesComparison // the agent has a core of its own, if that can be had
}

// updatesComparison compares a proxy whose service changes all the time with the
// same proxy while nothing changes, and with one of static upstreams beside
// which another process follows the same changes.
type updatesComparison struct {
	Quiet, Flood, Beside []period
	Published            []time.Duration // from the last change of a flood
}

// period is what was measured over some time.
type period struct {
	Duration time.Duration
	P50, P99 time.Duration
	CPU      time.Duration // of Caddy
	Written  int           // changes in Consul
	Answers  int           // of Consul, read by Caddy
	Sets     int           // published
}

func measureUpdates(t caddytest.TB, settings *settings, r *results) {
	r.Updates = &updatesResult{Shared: compareUpdates(t, settings, func(*caddytest.Agent) {})}
	if !canPin() {
		progress("without taskset or a second core, the agent can't be given one of its own")
		return
	}
	self, cores := os.Getpid(), runtime.NumCPU()
	pin(t, self, 0, cores-2) // and all that it starts
	r.Updates.Apart = compareUpdates(t, settings, func(agent *caddytest.Agent) { pin(t, agent.PID(), cores-1, cores-1) })
	pin(t, self, 0, cores-1)
}

// canPin reports whether processes can be told which cores to run on.
func canPin() bool {
	_, err := exec.LookPath("taskset")
	return err == nil && runtime.NumCPU() > 1
}

// pin has a process run on some cores only.
func pin(t caddytest.TB, pid, first, last int) {
	t.Helper()
	run(t, nil, "taskset", "--all-tasks", "--pid", "--cpu-list", fmt.Sprintf("%d-%d", first, last), strconv.Itoa(pid))
}

// compareUpdates compares on a stage of its own, whose agent place puts in its
// place.
func compareUpdates(t caddytest.TB, settings *settings, place func(*caddytest.Agent)) *updatesComparison {
	t.Helper()
	result := new(updatesComparison)
	ok := caddytest.Run("updates", func(t caddytest.TB) {
		s := newStage(t)
		place(s.agent)
		s.registerNodes()
		service := serviceOf(floodInstances)
		s.register(service, 0, floodInstances)
		s.agent.WaitHealthy(service, floodInstances)
		ours := s.startProxy("reverse_proxy {\n\tdynamic consul " + service + "\n}")
		other := s.startProxy(statics(s, 3, ""))
		generator := newVegeta(t)
		generator.load(t, ours.url, nil, settings.warmUp) // opens the connections
		generator.load(t, other.url, nil, settings.warmUp)
		for round := range floodRounds {
			result.measure(s, service, ours, other, generator)
			progress("round %d: %s", round+1, result.latest())
		}
	})
	if !ok {
		t.Fatalf("measuring updates failed")
	}
	return result
}

// measure measures one round.
func (c *updatesComparison) measure(s *stage, service string, ours, other *proxy, generator vegeta) {
	s.t.Helper()
	quiet := ours.observe(generator, func() { caddytest.Pause(s.t, floodDuration) })
	flood, published := ours.observeFlood(generator, s, service)
	var beside period
	s.whileFollowing(service, func() {
		beside = other.observe(generator, func() { s.flood(service) })
	})
	c.Quiet, c.Flood, c.Beside = append(c.Quiet, quiet), append(c.Flood, flood), append(c.Beside, beside)
	c.Published = append(c.Published, published)
}

// latest tells of the latest round.
func (c *updatesComparison) latest() string {
	i := len(c.Quiet) - 1
	quiet, flood, beside := c.Quiet[i], c.Flood[i], c.Beside[i]
	return fmt.Sprintf("p99 quiet %v, flood %v, beside %v; %d changes written, %d answers, %d Sets, processor time %v against %v; last change published after %v",
		quiet.P99, flood.P99, beside.P99, flood.Written, flood.Answers, flood.Sets, flood.CPU, quiet.CPU, c.Published[i])
}

// observeFlood measures the proxy while its service changes all the time, and
// how long after the last change that was published.
func (p *proxy) observeFlood(generator vegeta, s *stage, service string) (flood period, published time.Duration) {
	p.t.Helper()
	before := p.status(service)
	var written int
	flood = p.observe(generator, func() { written = s.flood(service) })
	setFirst := func(passing bool) time.Duration {
		s.setCheck(service, 0, passing)
		return p.lag(service, change{service + "-0", passing, time.Now()})
	}
	published = setFirst(false) // hard on the heels of the others
	setFirst(true)
	after := p.status(service)
	flood.Written, flood.Answers, flood.Sets = written, after.Answers-before.Answers, after.Changes-before.Changes
	return flood, published
}

// observe measures the proxy under steady traffic while something happens.
func (p *proxy) observe(generator vegeta, happens func()) period {
	p.t.Helper()
	cpu, start := p.cpu(), time.Now()
	traffic := generator.steady(p.t, p.url, steadyRate, floodDuration)
	happens()
	load := traffic()
	if load.Failures > 0 {
		p.t.Fatalf("%d requests failed", load.Failures)
	}
	return period{
		Duration: time.Since(start),
		P50:      load.P50,
		P99:      load.P99,
		CPU:      p.cpu() - cpu,
	}
}

// whileFollowing calls f while this process asks the agent for the instances of
// a service about as often as Caddy does.
func (s *stage) whileFollowing(service string, f func()) {
	s.t.Helper()
	ctx, stop := context.WithCancel(s.t.Context())
	var ended sync.WaitGroup
	ended.Go(func() {
		options := (&api.QueryOptions{}).WithContext(ctx)
		for ctx.Err() == nil {
			meta, err := s.agent.Client().Raw().Query("/v1/health/service/"+service, new(json.RawMessage), options)
			if err == nil {
				options.WaitIndex = meta.LastIndex
			}
			caddytest.Pause(s.t, followingPause)
		}
	})
	f()
	stop()
	ended.Wait()
}

// change is a change of the check of an instance.
type change struct {
	instance string
	passing  bool
	at       time.Time // when Consul had taken it
}

// flood changes checks of the service for a while at a steady rate: an instance
// fails, then it passes again.
func (s *stage) flood(service string) (written int) {
	s.t.Helper()
	const writers = 4
	var (
		mu    sync.Mutex
		ended sync.WaitGroup
		stop  = time.Now().Add(floodDuration)
	)
	for writer := range writers {
		ended.Go(func() {
			tick := time.NewTicker(writers * time.Second / floodRate)
			defer tick.Stop()
			i, passing := 0, true
			for now := range tick.C {
				if passing && now.After(stop) {
					return
				}
				if passing {
					i = rand.IntN(floodInstances/writers)*writers + writer //nolint:gosec // no secret
				}
				passing = !passing
				s.setCheck(service, i, passing)
				mu.Lock()
				written++
				mu.Unlock()
			}
		})
	}
	ended.Wait()
	return written
}

func (s *stage) setCheck(service string, i int, passing bool) {
	s.t.Helper()
	status := api.HealthPassing
	if !passing {
		status = api.HealthCritical
	}
	s.commit(api.TxnOps{s.check(service, i, status)})
}

// serviceStatus is what Caddy says of a service that it follows.
type serviceStatus struct {
	Service    string         `json:"service"`
	LastChange time.Time      `json:"last_change"`
	Blocking   bool           `json:"blocking"`
	Answers    int            `json:"answers"`
	Changes    int            `json:"changes"`
	Errors     map[string]int `json:"errors"`
	Instances  []struct {
		ID string `json:"id"`
	} `json:"instances"`
}

func (s *serviceStatus) has(instance string) bool {
	for _, i := range s.Instances {
		if i.ID == instance {
			return true
		}
	}
	return false
}

func (p *proxy) status(service string) *serviceStatus {
	p.t.Helper()
	all := p.statuses("?service=" + url.QueryEscape(service))
	if len(all) != 1 {
		p.t.Fatalf("Caddy follows %d services %s, want 1", len(all), service)
	}
	return all[0]
}

func (p *proxy) statuses(query string) (all []*serviceStatus) {
	p.t.Helper()
	if err := json.Unmarshal([]byte(p.Get("/consul/services"+query)), &all); err != nil {
		p.t.Fatalf("reading what Caddy says of the services that it follows: %v", err)
	}
	return all
}

// lag returns how long after a change the Set was published that shows it.
func (p *proxy) lag(service string, last change) (lag time.Duration) {
	p.t.Helper()
	caddytest.Eventually(p.t, caddytest.Patience, func() error {
		status := p.status(service)
		if status.has(last.instance) != last.passing {
			return fmt.Errorf("Caddy has not published the change of %s", last.instance) //nolint:staticcheck // a name
		}
		lag = max(0, status.LastChange.Sub(last.at))
		return nil
	})
	return lag
}

func (p period) p99() float64 { return float64(p.P99) }
func (p period) p50() float64 { return float64(p.P50) }

// load is the share of one core.
func (p period) load() float64 { return p.CPU.Seconds() / p.Duration.Seconds() * 100 }

func (p period) perSecond(n int) float64 { return float64(n) / p.Duration.Seconds() }

func (u *updatesResult) section() string {
	var b strings.Builder
	fmt.Fprintf(&b, "\n## Updates\n\nA service of %s instances, of which %d change their health in a second, under %s requests/s. Medians of %d rounds of %v each.\n",
		grouped(floodInstances), floodRate, grouped(steadyRate), len(u.Shared.Flood), floodDuration)
	u.Shared.write(&b, "all on the same cores")
	if u.Apart != nil {
		u.Apart.write(&b, "the agent on a core of its own")
	}
	return b.String()
}

func (c *updatesComparison) write(b *strings.Builder, title string) {
	fmt.Fprintf(b, "\n| %s | quiet | changing | 3 static upstreams, another process follows |\n| --- | ---: | ---: | ---: |\n", title)
	line := func(name string, figure func(period) float64, write func(float64) string) {
		fmt.Fprintf(b, "| %s | %s | %s | %s |\n", name,
			write(medianOf(c.Quiet, figure)), write(medianOf(c.Flood, figure)), write(medianOf(c.Beside, figure)))
	}
	plain := func(f float64) string { return fmt.Sprintf("%.1f", f) }
	line("latency, p50", period.p50, milliseconds)
	line("latency, p99", period.p99, milliseconds)
	fmt.Fprintf(b, "| p99, of the quiet one | 1.00 | %.2f | %.2f |\n",
		medianRatio(c.Flood, c.Quiet, period.p99), medianRatio(c.Beside, c.Quiet, period.p99))
	line("processor time of Caddy, % of a core", period.load, plain)
	fmt.Fprintf(b, "\nFollowing the changes takes %.1f %% of a core. In each second %.0f changes were written, %.1f answers read and %.1f Sets published. The last change of a flood was published after %s (worst %s).\n",
		medianOf(c.Flood, period.load)-medianOf(c.Quiet, period.load),
		medianOf(c.Flood, func(p period) float64 { return p.perSecond(p.Written) }),
		medianOf(c.Flood, func(p period) float64 { return p.perSecond(p.Answers) }),
		medianOf(c.Flood, func(p period) float64 { return p.perSecond(p.Sets) }),
		milliseconds(medianOf(c.Published, nanoseconds)), milliseconds(worst(c.Published)))
}

func nanoseconds(d time.Duration) float64 { return float64(d) }

func worst(all []time.Duration) float64 {
	most := time.Duration(0)
	for _, d := range all {
		most = max(most, d)
	}
	return float64(most)
}
