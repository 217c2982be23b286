package caddytest

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"
)

const (
	// requestTimeout ends a request that gets no answer, which then has failed.
	requestTimeout = 30 * time.Second

	// maxUnderWay is how many requests are under way at most: more is more than
	// the machine can do, which is not what is tested.
	maxUnderWay = 256
)

// Traffic sends requests in the background until it is stopped.
type Traffic struct {
	t       TB
	url     string
	workers int
	rate    float64
	prepare []func(*http.Request)
	repeat  bool
	dial    func(ctx context.Context, network, address string) (net.Conn, error)

	client    *http.Client
	repeating *Repeating // nil if no request is repeated
	stop      chan struct{}
	once      sync.Once
	ended     sync.WaitGroup

	mu      sync.Mutex
	samples []Sample
}

// TrafficOption is an option of StartTraffic.
type TrafficOption func(*Traffic)

// Workers sends as much as n clients can that each wait for their answer before
// they send the next request. The default is 4.
func Workers(n int) TrafficOption { return func(tr *Traffic) { tr.workers = n } }

// Rate sends perSecond requests, whether or not the earlier ones have been
// answered, unless 256 of them have not. Latency then counts from when a request
// was due.
func Rate(perSecond float64) TrafficOption { return func(tr *Traffic) { tr.rate = perSecond } }

// EachRequest changes every request before it is sent.
func EachRequest(prepare func(*http.Request)) TrafficOption {
	return func(tr *Traffic) { tr.prepare = append(tr.prepare, prepare) }
}

// ThroughSocket connects to a Unix socket, whatever host the URL names.
//
// Use it where Caddy reloads under traffic and no request may fail: Caddy hands
// a Unix socket over to the new config, but opens a second TCP socket on the
// same port, and Linux resets the connections that the first has not accepted
// when it closes. That costs a request in some thousands, with any config.
func ThroughSocket(path string) TrafficOption {
	return func(tr *Traffic) {
		tr.dial = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		}
	}
}

// RepeatUnread sends requests again that Caddy has closed the connection on
// without reading them, see [Repeating].
func RepeatUnread() TrafficOption { return func(tr *Traffic) { tr.repeat = true } }

// StartTraffic starts to send GET requests to a URL.
func StartTraffic(t TB, url string, options ...TrafficOption) *Traffic {
	t.Helper()
	tr := &Traffic{t: t, url: url, workers: 4, stop: make(chan struct{})}
	for _, option := range options {
		option(tr)
	}
	var transport http.RoundTripper = &http.Transport{
		MaxIdleConns:        1024,
		MaxIdleConnsPerHost: 1024,
		DisableCompression:  true,
		DialContext:         tr.dial,
	}
	if tr.repeat {
		tr.repeating = &Repeating{RoundTripper: transport}
		transport = tr.repeating
	}
	tr.client = &http.Client{
		Timeout:   requestTimeout,
		Transport: transport,
		// a redirect is an answer like any other
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	if _, err := http.NewRequest(http.MethodGet, url, nil); err != nil {
		t.Fatalf("sending traffic to %q: %v", url, err)
	}
	if tr.rate > 0 {
		tr.ended.Go(tr.sendAtRate)
	} else {
		for range tr.workers {
			tr.ended.Go(tr.sendInTurn)
		}
	}
	t.Cleanup(func() { tr.Stop() })
	return tr
}

// Stop ends the traffic, waits for the answers that are due, and returns what
// became of all requests.
func (tr *Traffic) Stop() *Report {
	tr.once.Do(func() {
		close(tr.stop)
		tr.ended.Wait()
		tr.client.CloseIdleConnections()
	})
	return tr.Report()
}

// Report returns what became of the requests that have been answered so far.
func (tr *Traffic) Report() *Report {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	report := newReport(tr.samples)
	if tr.repeating != nil {
		report.Repeated = tr.repeating.Repeated()
	}
	return report
}

// WaitMore waits until count more requests have been answered.
func (tr *Traffic) WaitMore(count int) {
	tr.t.Helper()
	want := tr.answered() + count
	Eventually(tr.t, Patience, func() error {
		if got := tr.answered(); got < want {
			return fmt.Errorf("%d of %d more requests to %s have been answered", got-want+count, count, tr.url)
		}
		return nil
	})
}

func (tr *Traffic) answered() int {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	return len(tr.samples)
}

func (tr *Traffic) sendInTurn() {
	for {
		select {
		case <-tr.stop:
			return
		default:
			tr.send(time.Now())
		}
	}
}

func (tr *Traffic) sendAtRate() {
	interval := time.Duration(float64(time.Second) / tr.rate)
	timer := time.NewTimer(0)
	defer timer.Stop()
	underWay := make(chan struct{}, maxUnderWay)
	for due := time.Now(); ; due = due.Add(interval) {
		timer.Reset(time.Until(due))
		select {
		case <-tr.stop:
			return
		case <-timer.C:
		}
		select {
		case <-tr.stop:
			return
		case underWay <- struct{}{}:
			tr.ended.Go(func() {
				tr.send(due)
				<-underWay
			})
		}
	}
}

// send sends one request, which was due at start, and records its fate.
func (tr *Traffic) send(start time.Time) {
	sample := tr.ask()
	sample.Start, sample.Latency = start, time.Since(start)
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.samples = append(tr.samples, sample)
}

func (tr *Traffic) ask() Sample {
	request, err := http.NewRequest(http.MethodGet, tr.url, nil)
	if err != nil {
		return Sample{Err: err}
	}
	for _, prepare := range tr.prepare {
		prepare(request)
	}
	response, err := tr.client.Do(request)
	if err != nil {
		return Sample{Err: err}
	}
	defer response.Body.Close()
	_, err = io.Copy(io.Discard, response.Body)
	return Sample{Err: err, Status: response.StatusCode, Backend: response.Header.Get(backendHeader)}
}
