package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
)

// Where the figures are kept and shown, from the root of the checkout.
const (
	measuredFile = "bench/out/results.json"
	reportFile   = "bench/RESULTS.md"
	chartFile    = "bench/speed.svg"
)

// results are the newest figures of each part.
type results struct {
	Requests map[int]*requestsResult // by the number of instances
	Micro    []microResult
	Updates  *updatesResult
	Services *servicesResult
	Names    *namesResult
}

// loadResults returns what earlier runs have measured, so that a run of one
// part replaces that part alone.
func loadResults() (*results, error) {
	r := &results{Requests: make(map[int]*requestsResult)}
	text, err := os.ReadFile(measuredFile)
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	if err == nil {
		err = json.Unmarshal(text, r)
	}
	if err != nil {
		return nil, fmt.Errorf("reading the figures of earlier runs (remove the file to start again): %s: %w", measuredFile, err)
	}
	return r, nil
}

// save keeps the figures, and writes the report and the chart.
func (r *results) save() error {
	text, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return err
	}
	var report strings.Builder
	r.write(&report, partNames())
	if err := os.MkdirAll(filepath.Dir(measuredFile), 0o755); err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(measuredFile, text, 0o644),
		os.WriteFile(reportFile, []byte(report.String()), 0o644),
		os.WriteFile(chartFile, []byte(r.chart()), 0o644),
	)
}

// write writes the report of some parts in Markdown.
func (r *results) write(w io.Writer, names []string) {
	section := func(part, text string) {
		if slices.Contains(names, part) && text != "" {
			fmt.Fprint(w, text)
		}
	}
	fmt.Fprintf(w, "# Results of `make bench`\n\n%s\n", conditions())
	section("requests", r.requestsSection())
	section("micro", microSection(r.Micro))
	if r.Updates != nil {
		section("updates", r.Updates.section())
	}
	if r.Services != nil {
		section("services", r.Services.section())
	}
	if r.Names != nil {
		section("names", r.Names.section())
	}
}

// conditions says what was measured on.
func conditions() string {
	text := fmt.Sprintf("%d cores, %s/%s, %s", runtime.NumCPU(), runtime.GOOS, runtime.GOARCH, runtime.Version())
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, module := range info.Deps {
			if module.Path == "github.com/caddyserver/caddy/v2" {
				text += ", Caddy " + module.Version
			}
		}
	}
	return text + ". Caddy, the Consul agent, the backends and the load generator share the cores, over loopback.\n"
}

func (r *results) requestsSection() string {
	if len(r.Requests) == 0 {
		return ""
	}
	sizes := slices.Sorted(maps.Keys(r.Requests))
	first := r.Requests[sizes[0]]
	var b strings.Builder
	fmt.Fprintf(&b, `
## Requests

Requests per second, and latency, with %d connections that each wait for their answer (%s). Medians over rounds in which the contenders, each a Caddy of its own, take turns; a ratio is the median of the rounds' ratios. Every instance has an address of its own.

- %s: the reference.
- static upstreams: as many of them as there are instances. Without a policy Caddy looks at all of them, with `+"`round_robin`"+` at one: what is left then is the price of connections to so many addresses.
- `+"`dynamic a`"+`: Caddy's own source, from the DNS of the same Consul agent. It gives the whole list, if asked to resolve over TCP: an answer over UDP has room for some 75 instances, one over TCP for some 4,000.
- `+"`dynamic consul` with `lb_policy round_robin`"+`: a policy of Caddy's that needs the whole list, and gets it: what any source costs that gives the whole list.
- `+"`dynamic consul`"+`: this plugin without a policy; the last four, with one of its own. Each instance has an address of its own, but for the row in which all share the reference's three: what that one costs more than the reference is this plugin.

"Of as many" is the ratio to as many static upstreams with `+"`round_robin`"+`, and "segments" what the machine sends over TCP for a request. A request and its answer, from the load to Caddy and from there to the backend, are 4 segments, each of which acknowledges the one before. A connection that then rests for longer than some 40 ms, as one of many does, sends that acknowledgement by itself: 5.

`, connections, first.Generator, static)
	b.WriteString("![Requests per second, in % of three static upstreams, by the number of instances](speed.svg)\n")
	for _, n := range sizes {
		fmt.Fprintf(&b, "\n%s", r.Requests[n].table(n))
	}
	return b.String()
}
