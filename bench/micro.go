package main

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/caddy-consul/caddy-consul/caddytest"
)

// microBenchmarks are the Go benchmarks that the report shows. Each has a
// sub-benchmark n=… for every size.
var microBenchmarks = []struct {
	title, pkg, pattern string
	cpus                string
}{
	{"`GetUpstreams` and `Select`, for each policy", "./consulupstreams", "^BenchmarkChoose(WithPassiveHealth)?$", "1"},
	{"The same on one and two cores", "./consulupstreams", "^BenchmarkChooseInParallel$", "1,2"},
	{"A policy's nomination", "./selection", "^BenchmarkNominate$", "1"},
	{"From the bytes of an answer to the published Set, and encoding/json alone", "./internal/discovery", "^Benchmark(FirstAnswer|Flap|SameAnswer|DecodeWhole)$", "1"},
	{"Building a Set", "./internal/endpoint", "^BenchmarkNewSet$", "1"},
}

// microRuns is how often each of them is run.
const microRuns = 5

// microResult holds the figures of one group of Go benchmarks.
type microResult struct {
	Title string
	Runs  []microRun
}

// microRun is a line that `go test -bench` prints.
type microRun struct {
	Name   string
	N      int
	Time   time.Duration // with a fraction lost below a nanosecond
	Bytes  int
	Allocs int
}

func measureMicro(t caddytest.TB, _ *settings, r *results) {
	r.Micro = nil
	for _, group := range microBenchmarks {
		output := run(t, nil, "go", "test", "-run", "^$", "-bench", group.pattern, "-benchmem", "-cpu", group.cpus,
			"-count", strconv.Itoa(microRuns), "-benchtime", "100ms", group.pkg)
		result := microResult{Title: group.title}
		for line := range strings.Lines(output) {
			if run, ok := parseMicro(line); ok {
				result.Runs = append(result.Runs, run)
			}
		}
		if len(result.Runs) == 0 {
			t.Fatalf("go test -bench %s %s ran no benchmark:\n%s", group.pattern, group.pkg, output)
		}
		r.Micro = append(r.Micro, result)
	}
}

var microLine = regexp.MustCompile(`^Benchmark(\S+)/n=(\d+)(-\d+)?\s+\d+\s+([\d.]+) ns/op.*?\s(\d+) B/op\s+(\d+) allocs/op`)

func parseMicro(line string) (run microRun, ok bool) {
	match := microLine.FindStringSubmatch(line)
	if match == nil {
		return run, false
	}
	run.Name = match[1]
	if cores, several := strings.CutPrefix(match[3], "-"); several {
		run.Name += ", " + cores + " cores"
	}
	run.N, _ = strconv.Atoi(match[2])
	nanoseconds, _ := strconv.ParseFloat(match[4], 64)
	run.Time = time.Duration(nanoseconds + 0.5)
	run.Bytes, _ = strconv.Atoi(match[5])
	run.Allocs, _ = strconv.Atoi(match[6])
	return run, true
}

func microSection(groups []microResult) string {
	if len(groups) == 0 {
		return ""
	}
	var b strings.Builder
	b.WriteString("\n## Parts\n\nGo benchmarks, by the number of instances: medians of the time of one operation, and its allocations.\n")
	for _, group := range groups {
		fmt.Fprintf(&b, "\n%s", group.table())
	}
	return b.String()
}

func (m microResult) table() string {
	runs := make(map[string]map[int][]microRun)
	sizes := make(map[int]bool)
	var names []string
	for _, run := range m.Runs {
		if runs[run.Name] == nil {
			runs[run.Name] = make(map[int][]microRun)
			names = append(names, run.Name)
		}
		runs[run.Name][run.N] = append(runs[run.Name][run.N], run)
		sizes[run.N] = true
	}
	var b strings.Builder
	fmt.Fprintf(&b, "| %s |", m.Title)
	for _, n := range slices.Sorted(maps.Keys(sizes)) {
		fmt.Fprintf(&b, " %s |", grouped(n))
	}
	fmt.Fprintf(&b, "\n| --- |%s\n", strings.Repeat(" ---: |", len(sizes)))
	for _, name := range names {
		fmt.Fprintf(&b, "| %s |", name)
		for _, n := range slices.Sorted(maps.Keys(sizes)) {
			b.WriteString(" " + microCell(runs[name][n]) + " |")
		}
		b.WriteString("\n")
	}
	return b.String()
}

// microCell writes the medians of some runs as "250 ns, 3 allocs".
func microCell(runs []microRun) string {
	if len(runs) == 0 {
		return ""
	}
	took := time.Duration(medianOf(runs, func(r microRun) float64 { return float64(r.Time) }))
	allocs := int(medianOf(runs, func(r microRun) float64 { return float64(r.Allocs) }))
	return fmt.Sprintf("%s, %s", brief(took), grouped(allocs))
}

// brief writes a duration with three digits.
func brief(d time.Duration) string {
	switch {
	case d < time.Microsecond:
		return fmt.Sprintf("%d ns", d)
	case d < time.Millisecond:
		return microseconds(float64(d))
	default:
		return milliseconds(float64(d))
	}
}
