package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/caddy-consul/caddy-consul/caddytest"
)

// connections is how many clients wait for their answers at once.
const connections = 32

// load is what the load generator has seen.
type load struct {
	Rate     float64 // answers per second
	P50, P99 time.Duration
	Failures int
}

// generator sends as many requests as a number of clients can that each wait
// for their answer. It is a process of its own.
type generator interface {
	// load sends GET requests to a URL, for each of the hosts in turn, if any.
	load(t caddytest.TB, url string, hosts []string, duration time.Duration) load
	name() string
}

// newGenerator returns wrk if it is on PATH, else vegeta, which is built.
func newGenerator(t caddytest.TB) generator {
	if path, err := exec.LookPath("wrk"); err == nil {
		return wrk{path}
	}
	return newVegeta(t)
}

// run runs a program in the root of the checkout and returns what it prints.
func run(t caddytest.TB, stdin []byte, program string, args ...string) string {
	t.Helper()
	return start(t, stdin, program, args...)()
}

// start starts a program in the root of the checkout. The function that it
// returns waits for its end and returns what it has printed.
func start(t caddytest.TB, stdin []byte, program string, args ...string) (wait func() string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), program, args...)
	cmd.Stdin = bytes.NewReader(stdin)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Start()
	return func() string {
		t.Helper()
		if err == nil {
			err = cmd.Wait()
		}
		if err != nil {
			t.Fatalf("running %s %s: %v\n%s", program, strings.Join(args, " "), err, stderr.Bytes())
		}
		return stdout.String()
	}
}

// wrk is https://github.com/wg/wrk.
type wrk struct{ path string }

func (wrk) name() string { return "wrk" }

func (w wrk) load(t caddytest.TB, url string, hosts []string, duration time.Duration) load {
	t.Helper()
	args := []string{
		"--threads", "1", "--connections", strconv.Itoa(connections), "--latency",
		"--duration", strconv.Itoa(int(duration.Round(time.Second).Seconds())) + "s",
	}
	if len(hosts) > 0 {
		script := filepath.Join(t.TempDir(), "hosts.lua")
		if err := os.WriteFile(script, []byte(hostsScript(hosts)), 0o600); err != nil {
			t.Fatalf("writing a script for wrk: %v", err)
		}
		args = append(args, "--script", script)
	}
	output := run(t, nil, w.path, append(args, url)...)
	result, err := parseWrk(output)
	if err != nil {
		t.Fatalf("reading what wrk printed: %v\n%s", err, output)
	}
	return result
}

func hostsScript(hosts []string) string {
	quoted := make([]string, len(hosts))
	for i, host := range hosts {
		quoted[i] = strconv.Quote(host)
	}
	return "local hosts = {" + strings.Join(quoted, ",") + `}
local requests, at = {}, 0
init = function()
	for i, host in ipairs(hosts) do
		wrk.headers["Host"] = host
		requests[i] = wrk.format()
	end
end
request = function()
	at = at % #requests + 1
	return requests[at]
end
`
}

var (
	wrkRate    = regexp.MustCompile(`Requests/sec:\s+([\d.]+)`)
	wrkP50     = regexp.MustCompile(`(?m)^\s+50%\s+(\S+)$`)
	wrkP99     = regexp.MustCompile(`(?m)^\s+99%\s+(\S+)$`)
	wrkNot2xx  = regexp.MustCompile(`Non-2xx or 3xx responses: (\d+)`)
	wrkSockets = regexp.MustCompile(`Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)`)
)

func parseWrk(output string) (l load, err error) {
	find := func(expression *regexp.Regexp) string {
		match := expression.FindStringSubmatch(output)
		if match == nil {
			if err == nil {
				err = fmt.Errorf("%s is missing", expression)
			}
			return ""
		}
		return match[1]
	}
	rate, p50, p99 := find(wrkRate), find(wrkP50), find(wrkP99)
	if err != nil {
		return l, err
	}
	if l.Rate, err = strconv.ParseFloat(rate, 64); err != nil {
		return l, err
	}
	if l.P50, err = time.ParseDuration(p50); err != nil {
		return l, err
	}
	if l.P99, err = time.ParseDuration(p99); err != nil {
		return l, err
	}
	for _, expression := range []*regexp.Regexp{wrkNot2xx, wrkSockets} {
		for _, match := range expression.FindAllStringSubmatch(output, -1) {
			for _, count := range match[1:] {
				n, _ := strconv.Atoi(count)
				l.Failures += n
			}
		}
	}
	return l, nil
}

// vegeta is https://github.com/tsenart/vegeta.
type vegeta struct{ path string }

// newVegeta builds vegeta.
func newVegeta(t caddytest.TB) vegeta {
	t.Helper()
	binary := filepath.Join(t.TempDir(), "vegeta")
	run(t, nil, "go", "build", "-modfile=tools/vegeta/go.mod", "-o", binary, "github.com/tsenart/vegeta/v12")
	return vegeta{binary}
}

func (vegeta) name() string { return "vegeta" }

func (v vegeta) load(t caddytest.TB, url string, hosts []string, duration time.Duration) load {
	t.Helper()
	workers := strconv.Itoa(connections)
	return v.attack(t, url, hosts, "-rate", "0", "-workers", workers, "-max-workers", workers,
		"-connections", workers, "-duration", duration.String())()
}

// steady starts to send requests at a steady rate, whatever becomes of them.
func (v vegeta) steady(t caddytest.TB, url string, rate int, duration time.Duration) (wait func() load) {
	t.Helper()
	return v.attack(t, url, nil, "-rate", strconv.Itoa(rate)+"/s", "-duration", duration.String())
}

func (v vegeta) attack(t caddytest.TB, url string, hosts []string, options ...string) (wait func() load) {
	t.Helper()
	var targets strings.Builder
	for _, host := range hosts {
		fmt.Fprintf(&targets, "GET %s\nHost: %s\n\n", url, host)
	}
	if len(hosts) == 0 {
		fmt.Fprintf(&targets, "GET %s\n", url)
	}
	samples := filepath.Join(t.TempDir(), "samples")
	ended := start(t, []byte(targets.String()), v.path, append([]string{"attack", "-output", samples}, options...)...)
	return func() load {
		t.Helper()
		ended()
		return v.report(t, samples)
	}
}

func (v vegeta) report(t caddytest.TB, samples string) load {
	t.Helper()
	var report struct {
		Throughput float64
		Requests   int
		Success    float64
		Latencies  struct {
			P50 time.Duration `json:"50th"`
			P99 time.Duration `json:"99th"`
		}
	}
	if err := json.Unmarshal([]byte(run(t, nil, v.path, "report", "-type", "json", samples)), &report); err != nil {
		t.Fatalf("reading the report of vegeta: %v", err)
	}
	return load{
		Rate: report.Throughput, P50: report.Latencies.P50, P99: report.Latencies.P99,
		Failures: report.Requests - int(report.Success*float64(report.Requests)+0.5),
	}
}
