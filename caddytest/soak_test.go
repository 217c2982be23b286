package caddytest_test

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/caddy-consul/caddy-consul/caddytest"
)

// The environment variables of the soak test. `make soak` sets them.
const (
	soakDurationVar = "SOAK_DURATION" // how long it takes; the default is soakDuration
	soakSeedVar     = "SOAK_SEED"     // what makes its script; by default a new one, which is printed
	soakRateVar     = "SOAK_RATE"     // how many requests there are a second
)

const (
	soakDuration = time.Minute
	soakRate     = 150

	// soakInstances is how many instances there are, of which soakLeast stay
	// healthy and reachable at any time.
	soakInstances = 8
	soakLeast     = 4
)

// Whatever happens in Consul, to it, and to Caddy's config, no request fails and
// nothing grows.
func TestSoak(t *testing.T) {
	duration, seed := soakDuration, uint64(time.Now().UnixNano())
	if text := os.Getenv(soakDurationVar); text != "" {
		var err error
		if duration, err = time.ParseDuration(text); err != nil {
			t.Fatalf("%s: %v", soakDurationVar, err)
		}
	}
	seed = uint64(numberFromEnv(t, soakSeedVar, int(seed%1_000_000)+1))
	t.Logf("%s=%d %s=%v", soakSeedVar, seed, soakDurationVar, duration)

	s := newSoak(t, seed)
	s.load(0)
	s.awaitSet()
	traffic := startSteadyLoad(t, s.listen, numberFromEnv(t, soakRateVar, soakRate))
	start := time.Now()
	var warm footprint
	for warm.goroutines == 0 || time.Since(start) < duration {
		if warm.goroutines == 0 && time.Since(start) > duration/5 {
			warm = s.footprint()
			t.Logf("after %v, %d steps: %v", time.Since(start).Round(time.Second), s.steps, warm)
		}
		s.step()
	}
	end := s.footprint()
	sent, failures := traffic.stop()
	t.Logf("after %v, %d steps: %v", time.Since(start).Round(time.Second), s.steps, end)
	t.Logf("%d requests, %d failed; steps: %s", sent, len(failures), s.counts())
	if len(failures) > 0 {
		t.Errorf("%d of %d requests failed, first %v; the script's last steps by then: %v",
			len(failures), sent, failures[0], s.before(failures[0].Start))
	}
	end.compare(t, warm)
}

// soak is the stage and the script.
type soak struct {
	t       *testing.T
	random  *rand.Rand
	agent   *caddytest.Agent
	proxy   *caddytest.FaultProxy
	caddy   *caddytest.Caddy
	listen  string
	service string

	backends   []*caddytest.Backend
	registered []bool // in Consul
	status     []string
	killed     []time.Time // when last
	configs    int

	steps int
	diary []entry
}

// entry is a step of the script.
type entry struct {
	at   time.Time
	what string
}

func newSoak(t *testing.T, seed uint64) *soak {
	t.Helper()
	s := &soak{
		t: t, random: rand.New(rand.NewPCG(seed, 0)), listen: caddytest.FreeSocket(t), service: "soak",
		agent:      caddytest.StartAgent(t, caddytest.WithDisk()),
		registered: make([]bool, soakInstances),
		status:     make([]string, soakInstances),
		killed:     make([]time.Time, soakInstances),
	}
	s.proxy = caddytest.StartFaultProxy(t, s.agent.Address())
	for i := range soakInstances {
		s.backends = append(s.backends, caddytest.StartBackend(t, caddytest.Named(fmt.Sprintf("soak-%d", i))))
		s.register(i)
	}
	s.agent.WaitHealthy(s.service, soakInstances)
	s.caddy = caddytest.StartCaddy(t)
	return s
}

func (s *soak) register(i int) {
	instance := s.backends[i].Service(s.service)
	instance.Weights = &api.AgentWeights{Passing: 1 + s.random.IntN(10), Warning: 1}
	s.agent.Register(instance)
	s.registered[i], s.status[i] = true, api.HealthPassing
}

// load makes Caddy run the n-th config. All of them follow the service, some of
// them another one.
//
// A reload leaves the connections idle that were in use during it: Caddy closes
// them when keepalive is over, which is 2 minutes by default.
func (s *soak) load(n int) {
	s.t.Helper()
	policies := []string{"consul_weighted_round_robin", "consul_random", "consul_weighted_random", "consul_round_robin", "random", "least_conn"}
	more := ""
	if n%3 == 1 {
		more = fmt.Sprintf("http://more.test {\nbind unix/%s\nreverse_proxy {\ndynamic consul more {\naddress %s\nwait %dm\n}\n}\n}\n",
			s.listen, s.proxy.Address(), 1+n%5)
	}
	s.caddy.Load(fmt.Sprintf(`
	{
		metrics
		log {
			level ERROR
		}
	}
	http://soak.test {
		bind unix/%s
		reverse_proxy {
			dynamic consul %s {
				address %s
				health %s
			}
			lb_policy %s
			lb_retries 2
			fail_duration 5s
			transport http {
				keepalive 1s
			}
		}
	}
	%s`, s.listen, s.service, s.proxy.Address(), []string{"passing", "warning"}[n%2], policies[n%len(policies)], more))
}

// healthy returns how many instances serve, but for one.
func (s *soak) healthyBut(one int) (count int) {
	for i := range s.backends {
		if i != one && s.registered[i] && s.status[i] == api.HealthPassing && time.Since(s.killed[i]) > 8*time.Second {
			count++
		}
	}
	return count
}

// awaitSet waits until Caddy knows what Consul knows.
func (s *soak) awaitSet() {
	s.t.Helper()
	caddytest.Eventually(s.t, 2*caddytest.Patience, func() error {
		shown := followings(s.t, s.caddy, s.service)
		want := 0
		for i := range s.backends {
			usable := s.status[i] == api.HealthPassing || s.status[i] == api.HealthWarning && s.configs%2 == 1
			if s.registered[i] && usable {
				want++
			}
		}
		for _, following := range shown {
			if following.State != "following" || following.InstanceCount != want {
				return fmt.Errorf("Caddy is %s with %d instances (%s), want following with %d",
					following.State, following.InstanceCount, following.LastError, want)
			}
		}
		return nil
	})
}

// step does something at random, and waits until Caddy has followed.
func (s *soak) step() {
	i := s.random.IntN(len(s.backends))
	kinds := []string{"come", "go", "go", "come", "flap", "flap", "warn", "maintain", "die", "fault", "fault", "restart", "reload", "reload"}
	what := kinds[s.random.IntN(len(kinds))]
	long := time.Duration(50+s.random.IntN(400)) * time.Millisecond
	s.steps++
	note := func(format string, args ...any) {
		s.diary = append(s.diary, entry{time.Now(), what + " " + fmt.Sprintf(format, args...)})
	}
	enough := s.healthyBut(i) >= soakLeast
	switch what {
	case "come":
		if !s.registered[i] {
			note("%d", i)
			s.backends[i].Start()
			s.register(i)
		}
	case "go":
		if s.registered[i] && enough {
			note("%d", i)
			s.agent.Deregister(s.backends[i].Name())
			s.registered[i] = false
			s.awaitSet()
			caddytest.Pause(s.t, 50*time.Millisecond) // to drain
			s.backends[i].Stop()
		}
	case "flap", "warn":
		if s.registered[i] && enough {
			status := map[string]string{"flap": api.HealthCritical, "warn": api.HealthWarning}[what]
			note("%d", i)
			s.agent.SetCheck(s.backends[i].Name(), status)
			s.status[i] = status
			s.awaitSet()
			s.agent.SetCheck(s.backends[i].Name(), api.HealthPassing)
			s.status[i] = api.HealthPassing
		}
	case "maintain":
		if s.registered[i] && enough {
			note("%d", i)
			s.agent.StartMaintenance(s.backends[i].Name())
			s.registered[i] = false
			s.awaitSet()
			s.agent.EndMaintenance(s.backends[i].Name())
			s.registered[i] = true
		}
	case "die":
		if s.registered[i] && enough {
			note("%d for %v", i, long)
			s.backends[i].Kill()
			s.killed[i] = time.Now()
			caddytest.Pause(s.t, long)
			s.backends[i].Start()
		}
	case "fault":
		name, begin := s.fault()
		note("%s for %v", name, long)
		begin()
		caddytest.Pause(s.t, long)
		s.proxy.Heal()
	case "restart":
		note("")
		s.agent.Kill()
		s.agent.Restart()
	case "reload":
		s.configs++
		note("%d", s.configs)
		s.load(s.configs)
	}
	s.awaitSet()
}

func (s *soak) fault() (name string, begin func()) {
	switch s.random.IntN(6) {
	case 0:
		return "refuse", s.proxy.Refuse
	case 1:
		return "reset", s.proxy.Reset
	case 2:
		return "swallow", s.proxy.Swallow
	case 3:
		return "drip", s.proxy.Drip
	case 4:
		return "truncate", func() { s.proxy.Truncate(500) }
	default:
		return "delay", func() { s.proxy.Delay(200*time.Millisecond, 100*time.Millisecond) }
	}
}

// before returns the last steps before a time.
func (s *soak) before(at time.Time) (steps []string) {
	for _, e := range s.diary {
		if !e.at.After(at) {
			steps = append(steps, fmt.Sprintf("%s, %v before", e.what, at.Sub(e.at).Round(time.Millisecond)))
		}
	}
	return steps[max(0, len(steps)-8):]
}

// counts returns how often there was which kind of step.
func (s *soak) counts() string {
	counts := make(map[string]int)
	for _, e := range s.diary {
		kind, _, _ := strings.Cut(e.what, " ")
		counts[kind]++
	}
	return fmt.Sprint(counts)
}

// footprint is what must not grow.
type footprint struct {
	goroutines, files, watchers int
	heap                        uint64
	origins                     map[string]int // of the goroutines
}

// footprint measures in a state that the script comes back to: all instances
// there, the first config, no fault.
func (s *soak) footprint() footprint {
	s.t.Helper()
	for i := range s.backends {
		if !s.registered[i] {
			s.backends[i].Start()
			s.register(i)
		}
	}
	s.configs = (s.configs/30 + 1) * 30
	s.load(s.configs)
	s.awaitSet()
	var least footprint
	for range 40 { // connections come and go
		caddytest.Pause(s.t, 50*time.Millisecond)
		runtime.GC()
		var memory runtime.MemStats
		runtime.ReadMemStats(&memory)
		now := footprint{files: openFiles(), watchers: len(followings(s.t, s.caddy, "")), heap: memory.HeapAlloc}
		now.goroutines, now.origins = ownGoroutines()
		if least.goroutines == 0 || now.goroutines < least.goroutines {
			least = now
		}
	}
	return least
}

// openFiles counts the open files and connections, on Linux; elsewhere there are
// none to see.
func openFiles() int {
	files, _ := os.ReadDir("/proc/self/fd")
	return len(files)
}

// ownGoroutines counts the goroutines, all and by what created them, but for
// those of the fault proxy, which leaves some behind.
func ownGoroutines() (count int, origins map[string]int) {
	stacks := make([]byte, 16<<20)
	stacks = stacks[:runtime.Stack(stacks, true)]
	origins = make(map[string]int)
	for stack := range strings.SplitSeq(string(stacks), "\n\n") {
		if strings.Contains(stack, "Shopify/toxiproxy") {
			continue
		}
		_, origin, _ := strings.Cut(stack, "created by ")
		origin, _, _ = strings.Cut(origin, " in goroutine")
		origins[origin]++
		count++
	}
	return count, origins
}

func (f footprint) String() string {
	return fmt.Sprintf("%d goroutines, %d files, %d watchers, %.1f MB of heap", f.goroutines, f.files, f.watchers, float64(f.heap)/(1<<20))
}

// compare fails the test if there is more than there was, but for what
// fluctuates with the traffic.
func (f footprint) compare(t *testing.T, before footprint) {
	t.Helper()
	const slack = 30
	if f.goroutines > before.goroutines+slack || f.files > before.files+slack || f.watchers != before.watchers ||
		f.heap > before.heap+before.heap/4+8<<20 {
		t.Errorf("there is growth: %v, and earlier %v", f, before)
		for origin, count := range f.origins {
			if count > before.origins[origin] {
				t.Errorf("goroutines by %s: %d, and earlier %d", origin, count, before.origins[origin])
			}
		}
	}
}

// steadyLoad sends requests at a rate. It keeps nothing of those that succeed,
// so that it doesn't grow.
type steadyLoad struct {
	client *http.Client
	done   chan struct{}
	work   sync.WaitGroup

	mu       sync.Mutex
	sent     int
	failures []caddytest.Sample
}

func startSteadyLoad(t *testing.T, socket string, rate int) *steadyLoad {
	t.Helper()
	l := &steadyLoad{done: make(chan struct{})}
	l.client = &http.Client{Timeout: caddytest.Patience, Transport: &caddytest.Repeating{RoundTripper: &http.Transport{
		MaxIdleConnsPerHost: 64,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}}}
	l.work.Go(func() {
		tick := time.NewTicker(time.Second / time.Duration(rate))
		defer tick.Stop()
		for {
			select {
			case <-l.done:
				return
			case <-tick.C:
				l.work.Go(l.send)
			}
		}
	})
	t.Cleanup(func() { l.stop() })
	return l
}

func (l *steadyLoad) send() {
	sample := caddytest.Sample{Start: time.Now()}
	response, err := l.client.Get("http://soak.test")
	if err == nil {
		_, err = io.Copy(io.Discard, response.Body)
		response.Body.Close()
		sample.Status, sample.Backend = response.StatusCode, response.Header.Get("Backend")
	}
	sample.Err, sample.Latency = err, time.Since(sample.Start)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sent++
	if sample.Failed() {
		l.failures = append(l.failures, sample)
	}
}

// stop ends the load and returns how many requests there were, and the failed
// ones.
func (l *steadyLoad) stop() (sent int, failures []caddytest.Sample) {
	select {
	case <-l.done:
	default:
		close(l.done)
	}
	l.work.Wait()
	l.client.CloseIdleConnections()
	slices.SortFunc(l.failures, func(a, b caddytest.Sample) int { return cmp.Compare(a.Start.UnixNano(), b.Start.UnixNano()) })
	return l.sent, l.failures
}
