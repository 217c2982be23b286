package caddytest_test

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/caddy-consul/caddy-consul/caddytest"

	// what is tested
	_ "github.com/caddy-consul/caddy-consul"
)

// The environment variables of the fault suite.
const (
	// faultTableVar names the file that the results are written to, as a table
	// in Markdown.
	faultTableVar = "FAULT_TABLE"

	// faultRepeatVar says how often each fault is repeated, for the quantiles.
	// The default is once.
	faultRepeatVar = "FAULT_REPEAT"
)

const (
	// faultRate is the number of requests a second during the faults.
	faultRate = 200

	// faultLasts is how long a fault lasts after it has been noticed, and all
	// in all where it can't be noticed.
	faultLasts = time.Second
)

// The lines that the source logs when Consul fails and when it is back.
const (
	lineFailing  = `"msg":"Consul gives no usable answer; what was known last stays in use"`
	lineAnswered = `"msg":"Consul answers again"`
)

// stage is where faults are played: Caddy in this process, a real agent, and a
// service of two instances and one more that comes and goes.
type stage struct {
	t       *testing.T
	caddy   *caddytest.Caddy
	agent   *caddytest.Agent // where instances are registered
	address string           // where Caddy asks, through whatever has the faults
	service string
	options string // of the source
	listen  string

	instances []caddytest.Service
	spare     *caddytest.Backend
}

func newStage(t *testing.T, caddy *caddytest.Caddy, agent *caddytest.Agent, address string) *stage {
	t.Helper()
	s := &stage{
		t: t, caddy: caddy, agent: agent, address: address, listen: caddytest.FreeAddress(t),
		service: "faults-" + strconv.Itoa(caddytest.FreePort(t)),
	}
	s.spare = caddytest.StartBackend(t, caddytest.Named(s.service+"-spare"))
	for i := range 2 {
		backend := caddytest.StartBackend(t, caddytest.Named(fmt.Sprintf("%s-%d", s.service, i)))
		s.instances = append(s.instances, backend.Service(s.service))
		agent.Register(s.instances[i])
	}
	agent.WaitHealthy(s.service, 2)
	return s
}

// open makes Caddy serve the service.
func (s *stage) open() {
	s.t.Helper()
	s.caddy.Load(fmt.Sprintf(`
	{
		metrics
		log {
			exclude admin.api
		}
	}
	http://%s {
		reverse_proxy {
			dynamic consul %s {
				address %s
				%s
			}
		}
	}`, s.listen, s.service, s.address, s.options))
	s.awaitInstances(2)
}

// disturb makes changes that have to go through the fault.
func (s *stage) disturb() {
	s.agent.Register(s.spare.Service(s.service))
	s.agent.Deregister(s.spare.Name())
}

func (s *stage) follows() serviceStatus {
	s.t.Helper()
	return follows(s.t, s.caddy, s.service)
}

// awaitInstances waits until Caddy has learnt from Consul that there are so many
// instances.
func (s *stage) awaitInstances(count int) {
	s.t.Helper()
	caddytest.Eventually(s.t, 2*caddytest.Patience, func() error {
		shown := s.follows()
		if shown.InstanceCount != count || shown.State != "following" {
			return fmt.Errorf("Caddy is %s with %d instances (%s), want following with %d",
				shown.State, shown.InstanceCount, cmp.Or(shown.LastError, "no error"), count)
		}
		return nil
	})
}

// awaitFailing waits until Caddy shows a new error of a kind and that it fails.
func (s *stage) awaitFailing(kind string, before serviceStatus) {
	s.t.Helper()
	caddytest.Eventually(s.t, caddytest.Patience, func() error {
		shown := s.follows()
		switch {
		case shown.Errors[kind] <= before.Errors[kind]:
			return fmt.Errorf("errors of kind %s: got %d, want more than %d; all: %v", kind, shown.Errors[kind], before.Errors[kind], shown.Errors)
		case shown.State != "failing":
			return fmt.Errorf("state: got %s, want failing", shown.State)
		}
		return nil
	})
}

// metric returns the value of a metric of the service with a label, 0 if there
// is none.
func metric(t caddytest.TB, caddy *caddytest.Caddy, name, service, label string) float64 {
	t.Helper()
	pattern := regexp.MustCompile(`(?m)^` + name + `\{[^}]*` + regexp.QuoteMeta(label) + `[^}]*service="` + service + `"[^}]*\} (\S+)$`)
	if !strings.Contains(label, "kind=") { // labels come in the order of the alphabet
		pattern = regexp.MustCompile(`(?m)^` + name + `\{[^}]*service="` + service + `"[^}]*` + regexp.QuoteMeta(label) + `[^}]*\} (\S+)$`)
	}
	found := pattern.FindStringSubmatch(caddy.Get("/metrics"))
	if found == nil {
		return 0
	}
	value, err := strconv.ParseFloat(found[1], 64)
	if err != nil {
		t.Fatalf("the metric %s has the value %q: %v", name, found[1], err)
	}
	return value
}

// fault is a row of the table.
type fault struct {
	name    string
	options string // of the source, more than the plain one

	// begin makes the fault, and end returns when it is over. Consul itself is
	// of use again then.
	begin, end func()

	// kind is that of the errors by which the fault shows in the metric
	// caddy_consul_errors_total and in the admin endpoint. A fault without a kind
	// is none that can be told from slow or true answers.
	kind string

	// silent is a fault that has a kind but leaves answers that can be used, so
	// there is nothing to log.
	silent bool

	// unsure is a fault that the query which is held open may notice or not, as
	// Consul's servers do.
	unsure bool

	// during checks more, while the fault lasts.
	during func(before serviceStatus)

	// change makes a change in Consul and undo undoes it. By default the spare
	// instance is registered.
	change, undo func()
}

// play plays a fault as often as is asked for, and adds its row to the table.
func (s *stage) play(table *faultTable, f fault) {
	s.t.Helper()
	outer := s.t
	defer func() { s.t = outer }()
	if !s.t.Run(f.name, func(t *testing.T) {
		s.t = t
		s.options = f.options
		if f.change == nil {
			f.change = func() { s.agent.Register(s.spare.Service(s.service)) }
		}
		if f.undo == nil {
			f.undo = func() { s.agent.Deregister(s.spare.Name()) }
		}
		s.open()
		logs := s.caddy.Logs().FromNow()
		traffic := caddytest.StartTraffic(t, "http://"+s.listen, caddytest.Rate(faultRate))
		traffic.WaitMore(faultRate / 10)

		before := s.follows()
		var recoveries []time.Duration
		for range table.repeat {
			recoveries = append(recoveries, s.playOnce(f, traffic))
		}
		report := traffic.Stop()
		report.RequireSuccess(t)
		failed, answered := logs.Count(lineFailing), logs.Count(lineAnswered)
		if f.unsure && failed > table.repeat || !f.unsure && failed != table.expectedLines(f) || answered != failed {
			t.Errorf("the log has %d lines about the fault and %d about its end, want %d and as many",
				failed, answered, table.expectedLines(f))
		}
		table.add(f, report, recoveries, before, s.follows())
	}) {
		outer.FailNow() // what comes next would begin with a fault
	}
}

// expectedLines returns how many log lines there are about a fault.
func (table *faultTable) expectedLines(f fault) int {
	if f.silent || f.kind == "" {
		return 0
	}
	return table.repeat
}

func (s *stage) playOnce(f fault, traffic *caddytest.Traffic) (recovery time.Duration) {
	t := s.t
	t.Helper()
	before := s.follows()
	f.begin()
	if f.kind != "" && !f.silent {
		s.awaitFailing(f.kind, before)
		if value := metric(t, s.caddy, "caddy_consul_state", s.service, `state="failing"`); value != 1 {
			t.Errorf(`caddy_consul_state{state="failing"}: got %v, want 1`, value)
		}
		if value := metric(t, s.caddy, "caddy_consul_stale_seconds", s.service, ""); value <= 0 {
			t.Errorf("caddy_consul_stale_seconds: got %v, want more than 0", value)
		}
	}
	caddytest.Pause(t, faultLasts)
	traffic.WaitMore(faultRate / 10)
	if f.kind != "" {
		if value := metric(t, s.caddy, "caddy_consul_errors_total", s.service, `kind="`+f.kind+`"`); value <= float64(before.Errors[f.kind]) {
			t.Errorf("caddy_consul_errors_total{kind=%q}: got %v, want more than %d", f.kind, value, before.Errors[f.kind])
		}
	}
	if f.during != nil {
		f.during(before)
	}
	f.end()
	over := time.Now()
	f.change()
	s.awaitInstances(3)
	recovery = time.Since(over)
	f.undo()
	s.awaitInstances(2)
	return recovery
}

// faultTable collects the results.
type faultTable struct {
	repeat int
	rows   []string
}

func newFaultTable(t *testing.T) *faultTable {
	t.Helper()
	return &faultTable{repeat: numberFromEnv(t, faultRepeatVar, 1)}
}

// numberFromEnv returns a number of at least 1 from an environment variable.
func numberFromEnv(t testing.TB, name string, otherwise int) int {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	number, err := strconv.Atoi(text)
	if err == nil && number < 1 {
		err = errors.New("want at least 1")
	}
	if err != nil {
		t.Fatalf("%s=%s: %v", name, text, err)
	}
	return number
}

func (table *faultTable) add(f fault, report *caddytest.Report, recoveries []time.Duration, before, after serviceStatus) {
	var kinds []string
	for kind, count := range after.Errors {
		if count > before.Errors[kind] {
			kinds = append(kinds, "`"+kind+"`")
		}
	}
	slices.Sort(kinds)
	shown := cmp.Or(strings.Join(kinds, ", "), "none")
	slices.Sort(recoveries)
	table.rows = append(table.rows, fmt.Sprintf("| %s | %d | %d | %s | %s | %s |",
		f.name, report.Total(), len(report.Failures()), shown,
		inMilliseconds(recoveries[len(recoveries)/2]), inMilliseconds(recoveries[min(len(recoveries)*99/100, len(recoveries)-1)])))
}

func inMilliseconds(d time.Duration) string { return fmt.Sprintf("%.0f ms", d.Seconds()*1000) }

// write writes the table to the file that is asked for, if any.
func (table *faultTable) write(t *testing.T) {
	t.Helper()
	name := os.Getenv(faultTableVar)
	if name == "" {
		return
	}
	text := fmt.Sprintf("| Fault (of %v, %d times, at %d requests a second) | Requests | Failed | `kind` of `caddy_consul_errors_total` | Recovery p50 | p99 |\n"+
		"| --- | ---: | ---: | --- | ---: | ---: |\n%s\n", faultLasts, table.repeat, faultRate, strings.Join(table.rows, "\n"))
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Errorf("writing the table of faults: %v", err)
	}
}
