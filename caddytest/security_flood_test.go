package caddytest_test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-consul/caddy-consul/caddytest"
)

// floodVar says how many requests a flood has. The measured run has 1,000,000:
//
//	FLOOD_REQUESTS=1000000 make test PKG=./caddytest RACE= TEST='-run AFloodOfNames -v'
const floodVar = "FLOOD_REQUESTS"

func floodSize(t *testing.T) (count int, measured bool) {
	t.Helper()
	text := os.Getenv(floodVar)
	if text == "" {
		return 20_000, false
	}
	count, err := strconv.Atoi(text)
	if err != nil {
		t.Fatalf("%s: %v", floodVar, err)
	}
	return count, true
}

// hostileHosts are names that might do more than miss.
var hostileHosts = []string{
	"{env.HOME}", "{http.request.host}", "{$HOME}", "..", ".", "%2e%2e", "a%2f..%2fb", "*", "?", "[a-z]", "a&dc=dc2", "a?token=x", "a#b",
	"flood-a.", "FLOOD-B.example", "xn--bcher-kva", "127.0.0.1:8500", "[::1]", "consul/../../kv", strings.Repeat("a", 10_000),
}

// hostFor returns the name that request i of a flood asks for.
func hostFor(i int, random *rand.Rand) string {
	if i%20 == 0 {
		return hostileHosts[i/20%len(hostileHosts)]
	}
	return "x" + strconv.FormatUint(random.Uint64(), 36)
}

// flood sends requests with random names for hosts to a path, as fast as so many
// connections can, or at a rate if that is positive, and counts the answers.
func (f *front) flood(path string, count, connections int, rate float64, stop <-chan struct{}) map[int]int {
	f.t.Helper()
	answers := make(map[int]int)
	var mu sync.Mutex
	var floods sync.WaitGroup
	for c := range connections {
		floods.Go(func() {
			own, err := f.floodThrough(path, count/connections, uint64(c), rate/float64(connections), stop)
			if err != nil {
				f.t.Errorf("a flood broke off: %v", err)
			}
			mu.Lock()
			defer mu.Unlock()
			for status, n := range own {
				answers[status] += n
			}
		})
	}
	floods.Wait()
	return answers
}

func (f *front) floodThrough(path string, count int, seed uint64, rate float64, stop <-chan struct{}) (map[int]int, error) {
	answers := make(map[int]int)
	random := rand.New(rand.NewPCG(seed, uint64(count))) //nolint:gosec // names to miss with
	var conn net.Conn
	var reader *bufio.Reader
	defer func() {
		if conn != nil {
			conn.Close()
		}
	}()
	start := time.Now()
	for i := range count {
		select {
		case <-stop:
			return answers, nil
		default:
		}
		if rate > 0 {
			time.Sleep(time.Until(start.Add(time.Duration(float64(i) / rate * float64(time.Second))))) // the rate of the flood
		}
		if conn == nil {
			var err error
			if conn, err = net.Dial("unix", f.listen); err != nil {
				return answers, err
			}
			reader = bufio.NewReader(conn)
		}
		if _, err := io.WriteString(conn, "GET "+path+" HTTP/1.1\r\nHost: "+hostFor(i, random)+"\r\n\r\n"); err != nil {
			return answers, err
		}
		response, err := http.ReadResponse(reader, nil)
		if err != nil {
			return answers, err
		}
		_, err = io.Copy(io.Discard, response.Body)
		response.Body.Close()
		if err != nil {
			return answers, err
		}
		answers[response.StatusCode]++
		if response.Close { // for a host that can't be one
			conn.Close()
			conn = nil
		}
	}
	return answers, nil
}

// floodTrace is what a flood must not make grow.
type floodTrace struct {
	heapMB     uint64
	goroutines int
	files      int // connections too
	followed   int
	queries    int
}

func (f *front) trace(c *counter) floodTrace {
	f.t.Helper()
	var followed []json.RawMessage
	if err := json.Unmarshal([]byte(f.Get("/consul/services")), &followed); err != nil {
		f.t.Fatal(err)
	}
	return floodTrace{heapMB(), runtime.NumGoroutine(), openFiles(), len(followed), c.count("")}
}

// A flood of names that no service has costs Consul nothing and leaves nothing
// behind, and those who ask for services don't notice more of it than of one
// that Caddy answers by itself.
func TestAFloodOfNames(t *testing.T) {
	caddytest.NoLeaks(t)
	count, measured := floodSize(t)
	agent := caddytest.SharedAgent(t)
	for _, name := range []string{"a", "b", "c"} {
		startInstances(t, agent, "flood-"+name, "flood-"+name)
	}
	c := startCounter(t, agent)
	f := startFront(t)
	// Caddy logs each request that it answers with an error, which is memory here
	f.Load("{\nlog {\nexclude http.log.error\n}\n}\n" + f.site("", "respond /plain 503",
		reverseProxy("dynamic consul {http.request.host} {\naddress "+c.address+"\nallow *\nmax_services 10\n}")))
	for _, name := range []string{"flood-a", "flood-b", "flood-c"} {
		f.awaitBackends(name, name)
	}
	f.flood("/", 1000, 4, 0, nil) // the buffers of Caddy's
	f.flood("/plain", 1000, 4, 0, nil)

	before := f.trace(c)
	start := time.Now()
	answers := f.flood("/", count, 8, 0, nil)
	took := time.Since(start)
	after := f.trace(c)
	t.Logf("%d requests in %s (%.0f/s): %v", count, took.Round(time.Millisecond), float64(count)/took.Seconds(), answers)
	t.Logf("before: %+v", before)
	t.Logf("after:  %+v", after)
	if answers[http.StatusOK] != 0 || answers[http.StatusServiceUnavailable] < count*9/10 {
		t.Errorf("answers: got %v, want almost all of status 503 and none of 200", answers)
	}
	if after.heapMB > before.heapMB+8 {
		t.Errorf("memory: got %d MB after the flood, want not many more than the %d MB before", after.heapMB, before.heapMB)
	}
	if after.goroutines > before.goroutines+10 {
		t.Errorf("goroutines: got %d after the flood, want no more than the %d before", after.goroutines, before.goroutines)
	}
	if after.files > before.files+10 {
		t.Errorf("open files and connections: got %d after the flood, want no more than the %d before", after.files, before.files)
	}
	if after.followed != 3 {
		t.Errorf("services followed: got %d, want the 3 that there are", after.followed)
	}
	if after.queries > before.queries+5 {
		t.Errorf("queries to Consul: got %d in the flood, want about none", after.queries-before.queries)
	}
	for _, name := range []string{"flood-a", "flood-b", "flood-c"} {
		f.awaitBackends(name, name)
	}
	wantLines(t, f.Logs(), 0, "panic")

	if measured {
		f.compareFloods()
	}
}

// compareFloods measures what requests for a service notice of a flood of names,
// beside one of the same rate that Caddy answers by itself.
func (f *front) compareFloods() {
	t := f.t
	const rate = 3000
	medians := make(map[string][]time.Duration)
	for range 5 {
		for _, path := range []string{"", "/plain", "/"} {
			stop, flooding := make(chan struct{}), sync.WaitGroup{}
			if path != "" {
				flooding.Go(func() { f.flood(path, 10*rate, 4, rate, stop) })
			}
			traffic := caddytest.StartTraffic(t, "http://flood-a", caddytest.ThroughSocket(f.listen), caddytest.Workers(1))
			caddytest.Pause(t, 2*time.Second)
			report := traffic.Stop()
			close(stop)
			flooding.Wait()
			report.RequireSuccess(t)
			medians[path] = append(medians[path], report.Quantile(0.5))
		}
	}
	middle := func(path string) time.Duration {
		slices.Sort(medians[path])
		return medians[path][len(medians[path])/2]
	}
	t.Logf("a request for a service, median: %s without a flood, %s in one of %d/s that Caddy answers by itself, %s in one of names",
		middle(""), middle("/plain"), rate, middle("/"))
	if limit := middle("/plain") * 11 / 10; middle("/") > limit {
		t.Errorf("a request for a service in a flood of names: took %s, want at most %s", middle("/"), limit)
	}
}

// More services are asked for than may be followed: no more are followed, each
// request is still answered, and in the end nothing is left.
func TestMoreServicesThanMayBeFollowed(t *testing.T) {
	caddytest.NoLeaks(t)
	agent := caddytest.SharedAgent(t)
	backend := caddytest.StartBackend(t, caddytest.Named("all"))
	const services, limit = 30, 5
	for i := range services {
		service := backend.Service(fmt.Sprintf("many-%d", i))
		service.ID = service.Name
		agent.Register(service)
	}
	agent.WaitHealthy(fmt.Sprintf("many-%d", services-1), 1)
	f := startFront(t)
	f.serve(reverseProxy(fmt.Sprintf("dynamic consul {http.request.host} {\naddress %s\nallow many-*\nmax_services %d\n}", agent.Address(), limit)))
	f.awaitBackends("many-0", "all")
	goroutines := runtime.NumGoroutine()
	random := rand.New(rand.NewPCG(1, 2)) //nolint:gosec // a service among many
	for range 300 {
		host := fmt.Sprintf("many-%d", random.IntN(services))
		if got := f.ask(host).String(); got != "all" {
			t.Fatalf("a request to %s: got %s, want an answer", host, got)
		}
		followed := strings.Count(f.Get("/consul/services"), `"service":`)
		if followed > limit {
			t.Fatalf("services followed: got %d, want at most %d", followed, limit)
		}
	}
	caddytest.Eventually(t, caddytest.Patience, func() error {
		const idle = 64 // connections to Consul, of two goroutines each
		if now := runtime.NumGoroutine(); now > goroutines+2*idle+4*limit {
			return fmt.Errorf("goroutines: got %d, want not many more than the %d before", now, goroutines)
		}
		return nil
	})
}
