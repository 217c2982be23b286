package caddytest

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// Sample is the fate of one request.
type Sample struct {
	Start   time.Time     // when it was sent, or due at a fixed rate
	Latency time.Duration // from then until the answer was complete
	Status  int           // 0 if there was no answer
	Backend string        // the name of the backend that answered, if one did
	Err     error         // why there was no complete answer
}

// Failed reports whether the request got anything but a complete answer with a
// 2xx status.
func (s Sample) Failed() bool { return s.Err != nil || s.Status < 200 || s.Status > 299 }

func (s Sample) String() string {
	if s.Err != nil {
		return s.Err.Error()
	}
	return fmt.Sprintf("status %d from %q", s.Status, s.Backend)
}

// Report says what became of a number of requests.
type Report struct {
	// Samples are the requests by their Start.
	Samples []Sample

	// Repeated is how many times one was sent again, with RepeatUnread.
	Repeated int
}

// newReport returns a Report of a copy of the samples.
func newReport(samples []Sample) *Report {
	sorted := slices.Clone(samples)
	slices.SortStableFunc(sorted, func(a, b Sample) int { return a.Start.Compare(b.Start) })
	return &Report{Samples: sorted}
}

// Total returns the number of requests.
func (r *Report) Total() int { return len(r.Samples) }

// Failures returns the requests that failed.
func (r *Report) Failures() []Sample {
	var failures []Sample
	for _, sample := range r.Samples {
		if sample.Failed() {
			failures = append(failures, sample)
		}
	}
	return failures
}

// Shares returns how many requests each backend answered well.
func (r *Report) Shares() map[string]int {
	shares := make(map[string]int)
	for _, sample := range r.Samples {
		if !sample.Failed() {
			shares[sample.Backend]++
		}
	}
	return shares
}

// Between returns the part of the requests that started in [from, to). A zero
// time is no limit.
func (r *Report) Between(from, to time.Time) *Report {
	part := &Report{}
	for _, sample := range r.Samples {
		if (from.IsZero() || !sample.Start.Before(from)) && (to.IsZero() || sample.Start.Before(to)) {
			part.Samples = append(part.Samples, sample)
		}
	}
	return part
}

// First returns the first request that a backend answered.
func (r *Report) First(backend string) (Sample, bool) {
	for _, sample := range r.Samples {
		if sample.Backend == backend {
			return sample, true
		}
	}
	return Sample{}, false
}

// Last returns the last request that a backend answered.
func (r *Report) Last(backend string) (Sample, bool) {
	for _, sample := range slices.Backward(r.Samples) {
		if sample.Backend == backend {
			return sample, true
		}
	}
	return Sample{}, false
}

// Quantile returns the latency that a share q of the requests, from 0 to 1, did
// not exceed.
func (r *Report) Quantile(q float64) time.Duration {
	if len(r.Samples) == 0 {
		return 0
	}
	latencies := make([]time.Duration, len(r.Samples))
	for i, sample := range r.Samples {
		latencies[i] = sample.Latency
	}
	slices.Sort(latencies)
	return latencies[min(int(q*float64(len(latencies))), len(latencies)-1)]
}

// RequireSuccess fails the test if a request failed, or if there was none.
func (r *Report) RequireSuccess(t TB) {
	t.Helper()
	if r.Total() == 0 {
		t.Fatalf("no request was sent")
	}
	if failures := r.Failures(); len(failures) > 0 {
		t.Fatalf("%d of %d requests failed, the first of them: %v", len(failures), r.Total(), failures[:min(5, len(failures))])
	}
}

// String sums the report up in a line.
func (r *Report) String() string {
	var shares []string
	counts := r.Shares()
	for _, backend := range slices.Sorted(maps.Keys(counts)) {
		shares = append(shares, fmt.Sprintf("%s %d", backend, counts[backend]))
	}
	return fmt.Sprintf("%d requests, %d failed, p50 %v, p99 %v: %s",
		r.Total(), len(r.Failures()), r.Quantile(0.5), r.Quantile(0.99), strings.Join(shares, ", "))
}
