package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/caddy-consul/caddy-consul/caddytest"
)

// maxDNS is how many addresses fit into one answer of DNS over TCP, roughly.
const maxDNS = 3000

// contender is a way to configure the proxy.
type contender struct {
	name string // in the table
	line string // in the chart, if it is to be there
	// directives returns the site of the Caddyfile for n instances, or "" if it
	// is not possible.
	directives func(s *stage, n int) string
}

const (
	static = "3 static upstreams"
	asMany = "static upstreams, `lb_policy round_robin`"
)

var contenders = []contender{
	{name: static, line: static, directives: func(s *stage, _ int) string { return statics(s, 3, "") }},
	{name: "static upstreams", directives: func(s *stage, n int) string { return statics(s, n, "") }},
	{name: asMany, line: "as many static (round_robin)", directives: func(s *stage, n int) string {
		return statics(s, n, "round_robin")
	}},
	{name: "`dynamic a`", line: "dynamic a", directives: func(s *stage, n int) string {
		if n > maxDNS {
			return ""
		}
		return fmt.Sprintf("reverse_proxy {\n\tdynamic a {\n\t\tname %s.service.consul\n\t\tport %d\n\t\tresolvers tcp/%s\n\t}\n}",
			serviceOf(n), s.backend.port, s.dns)
	}},
	{name: "`dynamic consul`, `lb_policy round_robin`", line: "dynamic consul (round_robin: whole list)", directives: following(serviceOf, "round_robin")},
	{name: "`dynamic consul`", line: "dynamic consul", directives: following(serviceOf, "")},
	{name: "`dynamic consul`, instances on 3 addresses", directives: following(crowdedServiceOf, "")},
	{name: "`lb_policy consul_round_robin`", directives: following(serviceOf, "consul_round_robin")},
	{name: "`lb_policy consul_random`", directives: following(serviceOf, "consul_random")},
	{name: "`lb_policy consul_weighted_random`", directives: following(serviceOf, "consul_weighted_random")},
	{name: "`lb_policy consul_weighted_round_robin`", line: "… (consul_weighted_round_robin)", directives: following(serviceOf, "consul_weighted_round_robin")},
}

// serviceOf names the service of n instances.
func serviceOf(n int) string { return fmt.Sprintf("web-%d", n) }

// crowdedServiceOf names the service of n instances that share the addresses of
// the three static upstreams.
func crowdedServiceOf(n int) string { return fmt.Sprintf("crowd-%d", n) }

func statics(s *stage, n int, policy string) string {
	directives := "reverse_proxy {\n"
	for i := range n {
		directives += "\tto " + s.backend.address(i) + "\n"
	}
	return directives + balancing(policy) + "}"
}

func following(service func(n int) string, policy string) func(*stage, int) string {
	return func(_ *stage, n int) string {
		return "reverse_proxy {\n\tdynamic consul " + service(n) + "\n" + balancing(policy) + "}"
	}
}

func balancing(policy string) string {
	if policy == "" {
		return ""
	}
	return "\tlb_policy " + policy + "\n"
}

// sample is one measurement of a contender.
type sample struct {
	load
	CPU      time.Duration // of Caddy, for one request
	Segments float64       // of TCP, for one request; 0 if that isn't known
}

// requestsResult holds the samples of the contenders, by round.
type requestsResult struct {
	Generator string
	Samples   map[string][]sample // by the name of the contender
}

// measureRequests measures what a proxy can do, for each size in turn. The
// contenders of a size, each a Caddy of its own, take short turns for many
// rounds, so that what is compared was measured under the same conditions.
func measureRequests(t caddytest.TB, settings *settings, r *results) {
	generator := newGenerator(t)
	s := newStage(t)
	s.registerNodes()
	for _, n := range settings.sizes {
		s.register(serviceOf(n), 0, n)
		s.registerAt(crowdedServiceOf(n), n, func(i int) string { return s.backend.ip(i % 3) })
		s.agent.WaitHealthy(crowdedServiceOf(n), n)
		r.Requests[n] = s.compare(generator, n, settings)
	}
}

// compare measures the contenders for n instances.
func (s *stage) compare(generator generator, n int, settings *settings) *requestsResult {
	s.t.Helper()
	var names []string
	proxies := make(map[string]*proxy)
	for _, c := range contenders {
		if directives := c.directives(s, n); directives != "" {
			p := s.startProxy(directives)
			defer p.Stop()
			generator.load(s.t, p.url, nil, settings.warmUp)
			names, proxies[c.name] = append(names, c.name), p
		}
	}
	result := &requestsResult{Generator: generator.name(), Samples: make(map[string][]sample)}
	for round := range settings.rounds {
		for i := range names {
			name := names[(i+round)%len(names)]
			measured := proxies[name].sample(generator, nil, settings.duration)
			if measured.Failures > 0 {
				s.t.Errorf("%d instances, %s: %d requests failed", n, name, measured.Failures)
			}
			result.Samples[name] = append(result.Samples[name], measured)
		}
	}
	if settings.profiles != "" {
		for i, name := range names {
			wait := proxies[name].profile(filepath.Join(settings.profiles, fmt.Sprintf("%d-%d.prof", n, i)))
			generator.load(s.t, proxies[name].url, nil, profileDuration)
			wait()
		}
	}
	progress("%d instances:\n%s", n, result.table(n))
	return result
}

const profileDuration = 5 * time.Second

// profile has Caddy write a CPU profile to a file, and returns what waits for
// it.
func (p *proxy) profile(file string) (wait func()) {
	done := make(chan error, 1)
	go func() {
		profile, err := p.fetch(fmt.Sprintf("/debug/pprof/profile?seconds=%.0f", profileDuration.Seconds()))
		if err == nil {
			err = os.WriteFile(file, profile, 0o644)
		}
		done <- err
	}()
	return func() {
		p.t.Helper()
		if err := <-done; err != nil {
			p.t.Fatalf("taking a profile of Caddy: %v", err)
		}
	}
}

// sample measures a warm proxy.
func (p *proxy) sample(generator generator, hosts []string, duration time.Duration) sample {
	cpu, segments := p.cpu(), tcpSegments()
	measured := generator.load(p.t, p.url, hosts, duration)
	cpu, segments = p.cpu()-cpu, tcpSegments()-segments
	requests := measured.Rate * duration.Seconds()
	return sample{measured, time.Duration(float64(cpu) / requests), segments / requests}
}

// tcpSegments returns how many segments the machine has sent over TCP, or 0 where
// it doesn't say.
func tcpSegments() float64 {
	text, err := os.ReadFile("/proc/net/snmp")
	if err != nil {
		return 0
	}
	var names []string
	for line := range strings.Lines(string(text)) {
		if !strings.HasPrefix(line, "Tcp:") {
			continue
		}
		fields := strings.Fields(line)
		if names == nil {
			names = fields
			continue
		}
		if at := slices.Index(names, "OutSegs"); at >= 0 && at < len(fields) {
			count, _ := strconv.ParseFloat(fields[at], 64)
			return count
		}
	}
	return 0
}

// table compares the contenders for n instances.
func (q *requestsResult) table(n int) string {
	var b strings.Builder
	fmt.Fprintf(&b, "| %s instances, %d rounds | requests/s | of 3 static | of as many | p50 | p99 | CPU per request | of 3 static | segments |\n",
		grouped(n), len(q.Samples[static]))
	b.WriteString("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n")
	for _, c := range contenders {
		samples := q.Samples[c.name]
		if len(samples) == 0 {
			continue
		}
		reference := q.Samples[static]
		fmt.Fprintf(&b, "| %s | %s | %.2f | %.2f | %s | %.1f |\n", c.name,
			grouped(int(medianOf(samples, sample.rate))), medianRatio(samples, reference, sample.rate), medianRatio(samples, q.Samples[asMany], sample.rate),
			price(samples, reference), medianOf(samples, sample.segments))
	}
	return b.String()
}

// price is what a request takes, as cells of a table: p50, p99, processor time and
// that in proportion to the reference's.
func price(samples, reference []sample) string {
	return fmt.Sprintf("%s | %s | %s | %.2f",
		milliseconds(medianOf(samples, sample.p50)), milliseconds(medianOf(samples, sample.p99)),
		microseconds(medianOf(samples, sample.cpu)), medianRatio(samples, reference, sample.cpu))
}

func (s sample) rate() float64 { return s.Rate }
func (s sample) p50() float64  { return float64(s.P50) }
func (s sample) p99() float64  { return float64(s.P99) }
func (s sample) cpu() float64  { return float64(s.CPU) }

func (s sample) segments() float64 { return s.Segments }
