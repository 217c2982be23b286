package main

import (
	"fmt"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/caddy-consul/caddy-consul/caddytest"
)

const (
	manyServices   = 1000
	instancesEach  = 5
	changedAtOnce  = 20
	changeRounds   = 5
	idleDuration   = 30 * time.Second
	memorySettling = 5 * time.Second
)

// servicesResult is what it takes to follow many services on one agent.
type servicesResult struct {
	Memory         map[string]footprint // by what Caddy is
	FirstAnswers   time.Duration        // from the start until all are there
	Blocking       int                  // services followed by a query that is held open
	Lags           []lag
	Refused        int // queries that the agent has answered with 429
	Idle           float64
	PerChange      float64 // queries for a change of one service
	IdleCPU        time.Duration
	CPUPerChange   time.Duration
	ChangesCounted int
}

// footprint is the memory of a process, in bytes.
type footprint struct{ Resident, Heap float64 }

// lag is how long a change took to be published.
type lag struct {
	Blocking bool
	Took     time.Duration
}

// The Caddys whose memory is compared.
const (
	noHandler     = "Caddy with one site that answers itself"
	staticHandler = "Caddy with as many handlers, of static upstreams"
	ourHandlers   = "Caddy that follows all services"
)

func nameOf(i int) string { return fmt.Sprintf("svc-%03d", i) }

// registerMany puts many services into the catalogue.
func (s *stage) registerMany() {
	s.t.Helper()
	s.registerNodes()
	for i := range manyServices {
		s.register(nameOf(i), i*instancesEach, instancesEach)
	}
	s.agent.WaitHealthy(nameOf(manyServices-1), instancesEach)
}

func measureServices(t caddytest.TB, _ *settings, r *results) {
	s := newStage(t)
	s.registerMany()
	result := &servicesResult{Memory: make(map[string]footprint)}

	idle := s.startIdle("respond ok")
	result.Memory[noHandler] = idle.footprint()
	idle.Stop()
	handlers := s.startIdle(manyHandlers(func(i int) string { return "reverse_proxy " + s.backend.address(i) }))
	result.Memory[staticHandler] = handlers.footprint()
	handlers.Stop()

	start := time.Now()
	p := s.startIdle(manyHandlers(func(i int) string { return "reverse_proxy {\n\t\tdynamic consul " + nameOf(i) + "\n\t}" }))
	p.waitForAll(instancesEach)
	result.FirstAnswers = time.Since(start)
	result.Memory[ourHandlers] = p.footprint()

	queries, cpu := s.queries(), p.cpu()
	caddytest.Pause(t, idleDuration)
	result.Idle = float64(s.queries()-queries) / idleDuration.Minutes()
	result.IdleCPU = time.Duration(float64(p.cpu()-cpu) / idleDuration.Minutes())

	for round := range changeRounds {
		lags := p.changeSome(s, round)
		for _, l := range lags {
			progress("round %d: published after %v (blocking: %v)", round+1, l.Took, l.Blocking)
		}
		result.Lags = append(result.Lags, lags...)
	}

	caddytest.Pause(t, 2*time.Second)
	queries, cpu = s.queries(), p.cpu()
	for round := range changeRounds { // one at a time, far enough apart to be told apart
		s.setCheck(nameOf(manyServices-1-round), 0, false)
		caddytest.Pause(t, 3*time.Second)
	}
	result.PerChange = float64(s.queries()-queries) / changeRounds
	result.CPUPerChange = (p.cpu() - cpu) / changeRounds

	for _, status := range p.statuses("") {
		if status.Blocking {
			result.Blocking++
		}
		for _, count := range status.Errors {
			result.Refused += count
		}
	}
	r.Services = result
}

// manyHandlers is a site with a handler for each of the services.
func manyHandlers(directive func(i int) string) string {
	var b strings.Builder
	for i := range manyServices {
		fmt.Fprintf(&b, "handle /%s/* {\n\t%s\n}\n", nameOf(i), directive(i))
	}
	b.WriteString("respond ok\n")
	return b.String()
}

// waitForAll waits until every service is known to have count instances.
func (p *proxy) waitForAll(count int) {
	p.t.Helper()
	caddytest.Eventually(p.t, 2*caddytest.Patience, func() error {
		known := 0
		for _, status := range p.statuses("") {
			if len(status.Instances) == count {
				known++
			}
		}
		if known < manyServices {
			return fmt.Errorf("Caddy knows %d of %d services", known, manyServices) //nolint:staticcheck // a name
		}
		return nil
	})
}

// footprint returns the memory that Caddy holds once it has come to rest.
func (p *proxy) footprint() footprint {
	p.t.Helper()
	caddytest.Pause(p.t, memorySettling)
	// asking for this profile collects garbage; the second time, what the first
	// has left to finalizers
	for range 2 {
		p.Get("/debug/pprof/heap?gc=1")
	}
	caddytest.Pause(p.t, memorySettling)
	return footprint{p.metric("process_resident_memory_bytes"), p.metric("go_memstats_heap_alloc_bytes")}
}

// changeSome changes some of the services at once and returns how long each
// took to be published.
func (p *proxy) changeSome(s *stage, round int) (lags []lag) {
	p.t.Helper()
	last := make(map[string]change)
	for i := range changedAtOnce {
		// spread over all, so that some are followed by queries that are held
		// open and some are not
		service := nameOf((i*manyServices/changedAtOnce + round) % manyServices)
		s.setCheck(service, instancesEach-1, false)
		last[service] = change{fmt.Sprintf("%s-%d", service, instancesEach-1), false, time.Now()}
	}
	caddytest.Eventually(p.t, caddytest.Patience, func() error {
		lags = lags[:0]
		for _, status := range p.statuses("") {
			changed, ok := last[status.Service]
			switch {
			case !ok:
			case status.has(changed.instance):
				return fmt.Errorf("Caddy has not published the change of %s", changed.instance) //nolint:staticcheck // a name
			default:
				lags = append(lags, lag{status.Blocking, max(0, status.LastChange.Sub(changed.at))})
			}
		}
		return nil
	})
	return lags
}

var answeredQueries = regexp.MustCompile(`(?m)^consul_api_http_count\{method="GET",path="(v1_health_[^"]*|v1_catalog_[^"]*)"\} (\d+)`)

// queries returns how many queries about services the agent has answered.
func (s *stage) queries() (count int) {
	s.t.Helper()
	response, err := http.Get("http://" + s.agent.Address() + "/v1/agent/metrics?format=prometheus")
	if err != nil {
		s.t.Fatalf("reading the metrics of Consul: %v", err)
	}
	defer response.Body.Close()
	text := readAll(s.t, response.Body)
	for _, match := range answeredQueries.FindAllStringSubmatch(text, -1) {
		n, _ := strconv.Atoi(match[2])
		count += n
	}
	return count
}

func (r *servicesResult) section() string {
	var b strings.Builder
	fmt.Fprintf(&b, "\n## Many services\n\n%s services of %d instances each, on one Consul agent with its default limits, one handler each.\n\n",
		grouped(manyServices), instancesEach)
	b.WriteString("| memory | resident | of that, live heap |\n| --- | ---: | ---: |\n")
	for _, name := range []string{noHandler, staticHandler, ourHandlers} {
		f := r.Memory[name]
		fmt.Fprintf(&b, "| %s | %s | %s |\n", name, megabytes(f.Resident), megabytes(f.Heap))
	}
	fmt.Fprintf(&b, "\nAll first answers were there %.1f s after the start of Caddy. %d services are followed by a query that is held open, the others by the tide. %d queries failed.\n",
		r.FirstAnswers.Seconds(), r.Blocking, r.Refused)
	fmt.Fprintf(&b, "\n| a change is published after | median | worst |\n| --- | ---: | ---: |\n")
	for _, blocking := range []bool{true, false} {
		var took []time.Duration
		for _, l := range r.Lags {
			if l.Blocking == blocking {
				took = append(took, l.Took)
			}
		}
		name := "followed by the tide"
		if blocking {
			name = "followed by a query held open"
		}
		fmt.Fprintf(&b, "| %s (%d changes, %d services at once) | %s | %s |\n", name, len(took), changedAtOnce,
			milliseconds(medianOf(took, nanoseconds)), milliseconds(worst(took)))
	}
	fmt.Fprintf(&b, "\nWhile nothing changes, the agent answers %.0f queries a minute (then one more for each query held, every %d minutes), and Caddy takes %s of processor time a minute. A change of one service makes %.0f queries, which take %s of Caddy's processor time.\n",
		r.Idle, 5, milliseconds(nanoseconds(r.IdleCPU)), r.PerChange, milliseconds(nanoseconds(r.CPUPerChange)))
	return b.String()
}
