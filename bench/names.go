package main

import (
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/caddy-consul/caddy-consul/caddytest"
)

// namesResult is what a name that comes with the request costs.
type namesResult struct {
	Generator      string
	Cold           []time.Duration // latencies of the first request for each name
	Fixed, OneName []sample        // a fixed name, and one name by placeholder
	AllNames       []sample        // all names in turn
	FixedAll       []sample        // a fixed name that has as many instances as all those have
}

// allInOne is a service of all the addresses that the many services have.
const allInOne = "svc-all"

func hostOf(i int) string { return nameOf(i) + ".example.com" }

func measureNames(t caddytest.TB, settings *settings, r *results) {
	generator := newGenerator(t)
	s := newStage(t)
	s.registerMany()
	hosts := make([]string, manyServices)
	for i := range hosts {
		hosts[i] = hostOf(i)
	}
	named := s.startIdle(fmt.Sprintf(
		"reverse_proxy {\n\tdynamic consul {http.request.host.labels.2} {\n\t\tallow svc-*\n\t\tmax_services %d\n\t}\n}", manyServices))
	fixed := s.startProxy("reverse_proxy {\n\tdynamic consul " + nameOf(0) + "\n}")
	s.register(allInOne, 0, manyServices*instancesEach)
	fixedAll := s.startProxy("reverse_proxy {\n\tdynamic consul " + allInOne + "\n}")

	result := &namesResult{Generator: generator.name()}
	for _, host := range hosts {
		result.Cold = append(result.Cold, named.first(host))
	}
	slices.Sort(result.Cold)
	progress("first requests: p50 %v, p99 %v, worst %v", quantile(result.Cold, 0.5), quantile(result.Cold, 0.99), quantile(result.Cold, 1))

	for _, p := range []*proxy{named, fixed, fixedAll} {
		generator.load(t, p.url, hosts, settings.warmUp)
	}
	one := hosts[:1]
	for range settings.rounds {
		result.Fixed = append(result.Fixed, fixed.sample(generator, one, settings.duration))
		result.OneName = append(result.OneName, named.sample(generator, one, settings.duration))
		result.FixedAll = append(result.FixedAll, fixedAll.sample(generator, hosts, settings.duration))
		result.AllNames = append(result.AllNames, named.sample(generator, hosts, settings.duration))
	}
	r.Names = result
}

// first sends a request for a host, and returns how long it took.
func (p *proxy) first(host string) time.Duration {
	p.t.Helper()
	request, err := http.NewRequest(http.MethodGet, p.url, nil)
	if err != nil {
		p.t.Fatalf("making a request: %v", err)
	}
	request.Host = host
	start := time.Now()
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		p.t.Fatalf("sending the first request for %s: %v", host, err)
	}
	defer response.Body.Close()
	readAll(p.t, response.Body)
	took := time.Since(start)
	if response.StatusCode != http.StatusOK {
		p.t.Fatalf("the first request for %s was answered with status %s", host, response.Status)
	}
	return took
}

func readAll(t caddytest.TB, body io.Reader) string {
	t.Helper()
	text, err := io.ReadAll(body)
	if err != nil {
		t.Fatalf("reading an answer: %v", err)
	}
	return string(text)
}

// quantile returns the value that a share q of the sorted values don't exceed.
func quantile(sorted []time.Duration, q float64) time.Duration {
	return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]
}

func (n *namesResult) section() string {
	var b strings.Builder
	fmt.Fprintf(&b, "\n## Names that come with the request\n\n`dynamic consul {http.request.host.labels.2}` over %s services of %d instances each. The first request for a name that is not followed yet takes %s (p50), %s (p99), %s at worst.\n\n",
		grouped(manyServices), instancesEach,
		milliseconds(nanoseconds(quantile(n.Cold, 0.5))), milliseconds(nanoseconds(quantile(n.Cold, 0.99))), milliseconds(nanoseconds(quantile(n.Cold, 1))))
	b.WriteString("| warm | requests/s | of fixed | p50 | p99 | CPU per request | of fixed |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n")
	row := func(name string, samples, reference []sample) {
		fmt.Fprintf(&b, "| %s | %s | %.2f | %s |\n", name,
			grouped(int(medianOf(samples, sample.rate))), medianRatio(samples, reference, sample.rate), price(samples, reference))
	}
	row("a fixed name", n.Fixed, n.Fixed)
	row("a name from the request, always the same", n.OneName, n.Fixed)
	row(fmt.Sprintf("a fixed name of %s instances", grouped(manyServices*instancesEach)), n.FixedAll, n.FixedAll)
	row(fmt.Sprintf("%s names from the request in turn, of as many instances in all", grouped(manyServices)), n.AllNames, n.FixedAll)
	return b.String()
}
