package main

import (
	"testing"
	"time"
)

func TestWhatWrkPrints(t *testing.T) {
	const output = `Running 1s test @ http://127.0.0.1:8080/
  1 threads and 32 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     1.81ms    1.39ms  15.99ms   86.72%
    Req/Sec    16.71k     1.60k   18.30k    80.00%
  Latency Distribution
     50%    1.57ms
     75%  981.00us
     90%    3.47ms
     99%    7.21ms
  16680 requests in 1.00s, 2.45MB read
  Socket errors: connect 0, read 2, write 0, timeout 1
  Non-2xx or 3xx responses: 12
Requests/sec:  16674.21
Transfer/sec:      2.45MB
`
	got, err := parseWrk(output)
	want := load{Rate: 16674.21, P50: 1570 * time.Microsecond, P99: 7210 * time.Microsecond, Failures: 15}
	if err != nil || got != want {
		t.Errorf("got %+v, error %v, want %+v", got, err, want)
	}
	if _, err := parseWrk("unable to connect"); err == nil {
		t.Error("an output without figures: got no error, want one")
	}
}

func TestWhatGoTestPrints(t *testing.T) {
	tests := []struct {
		line   string
		want   microRun
		wantOK bool
	}{
		{
			"BenchmarkFlap/n=5000    \t      54\t  11617145 ns/op\t 777.66 MB/s\t 1608992 B/op\t      71 allocs/op",
			microRun{"Flap", 5000, 11617145, 1608992, 71},
			true,
		},
		{
			"BenchmarkChoose/consul_random/n=3-2  \t 934252\t 251.6 ns/op\t 264 B/op\t 3 allocs/op",
			microRun{"Choose/consul_random, 2 cores", 3, 252, 264, 3},
			true,
		},
		{"BenchmarkServe-2  \t 934252\t 251.6 ns/op\t 264 B/op\t 3 allocs/op", microRun{}, false},
		{"ok  \texample.com/x\t1.2s", microRun{}, false},
	}
	for _, tc := range tests {
		if got, ok := parseMicro(tc.line); got != tc.want || ok != tc.wantOK {
			t.Errorf("%q: got %+v and %v, want %+v and %v", tc.line, got, ok, tc.want, tc.wantOK)
		}
	}
}

func TestMediansAndRatios(t *testing.T) {
	itself := func(f float64) float64 { return f }
	if got := median([]float64{9, 1, 4, 2}); got != 3 {
		t.Errorf("median: got %v, want 3", got)
	}
	// a round in which everything was slow changes no ratio
	if got := medianRatio([]float64{8, 2, 8}, []float64{10, 2.5, 10}, itself); got != 0.8 {
		t.Errorf("ratio: got %v, want 0.8", got)
	}
	if got := grouped(1234567); got != "1,234,567" {
		t.Errorf("grouped: got %q, want 1,234,567", got)
	}
}
