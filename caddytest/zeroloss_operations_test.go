package caddytest_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/caddy-consul/caddy-consul/caddytest"
)

// The environment variables of the tests of operations under load. `make soak`
// sets them.
const (
	lossRequestsVar = "LOSS_REQUESTS" // how many requests each operation takes at least
	lossRateVar     = "LOSS_RATE"     // how many there are a second
)

const (
	lossRequests = 2500
	lossRate     = 250
)

// recommended is what the README recommends.
const recommended = `
	lb_policy consul_weighted_round_robin
	lb_retries 2
	fail_duration 10s`

// operation is something that is done again and again under load.
type operation struct {
	t       *testing.T
	caddy   *caddytest.Caddy
	agent   *caddytest.Agent
	service string
	socket  string

	backends []*caddytest.Backend
	requests int
	rate     int
}

func newOperation(t *testing.T, agent *caddytest.Agent, backends int) *operation {
	t.Helper()
	o := &operation{
		t: t, agent: agent, service: "loss-" + fmt.Sprint(caddytest.FreePort(t)),
		requests: numberFromEnv(t, lossRequestsVar, lossRequests), rate: numberFromEnv(t, lossRateVar, lossRate),
	}
	for range backends {
		backend := caddytest.StartBackend(t)
		o.backends = append(o.backends, backend)
		agent.Register(backend.Service(o.service))
	}
	agent.WaitHealthy(o.service, backends)
	return o
}

// serve starts Caddy with these options of the proxy and of the source. It
// listens on a Unix socket, which Caddy hands over when it reloads.
func (o *operation) serve(proxy, source string) {
	o.t.Helper()
	o.caddy = caddytest.StartCaddy(o.t)
	o.socket = caddytest.FreeSocket(o.t)
	o.caddy.Load(o.config(proxy, source))
	o.awaitInstances(len(o.backends))
}

func (o *operation) config(proxy, source string) string {
	return fmt.Sprintf(`
	{
		log {
			exclude admin.api
		}
	}
	http://loss.test {
		bind unix/%s
		reverse_proxy {
			%s
			dynamic consul %s {
				address %s
				%s
			}
		}
	}`, o.socket, proxy, o.service, o.agent.Address(), source)
}

// awaitInstances waits until Caddy knows of so many instances.
func (o *operation) awaitInstances(count int) {
	o.t.Helper()
	caddytest.Eventually(o.t, 2*caddytest.Patience, func() error {
		for _, shown := range followings(o.t, o.caddy, o.service) {
			if shown.InstanceCount != count {
				return fmt.Errorf("Caddy knows %d instances (%s, %s), want %d", shown.InstanceCount, shown.State, shown.LastError, count)
			}
		}
		return nil
	})
}

// received returns how many requests the backends have got.
func (o *operation) received() (count int) {
	for _, backend := range o.backends {
		count += backend.Requests()
	}
	return count
}

// underLoad does something again and again until there have been enough
// requests, none of which may fail.
func (o *operation) underLoad(do func(round int), options ...caddytest.TrafficOption) {
	o.t.Helper()
	before := o.received()
	options = append(options, caddytest.ThroughSocket(o.socket), caddytest.Rate(float64(o.rate)))
	traffic := caddytest.StartTraffic(o.t, "http://loss.test", options...)
	enough := time.Now().Add(time.Duration(float64(o.requests) / float64(o.rate) * float64(time.Second)))
	rounds := 0
	for ; rounds == 0 || time.Now().Before(enough); rounds++ {
		do(rounds)
	}
	report := traffic.Stop()
	o.t.Logf("%d rounds: %d requests, %d failed, %d sent again, p50 %v, p99 %v, max %v", rounds, report.Total(), len(report.Failures()), report.Repeated,
		report.Quantile(0.5), report.Quantile(0.99), report.Quantile(1))
	report.RequireSuccess(o.t)
	if received := o.received() - before; report.Repeated > 0 && received > report.Total() {
		o.t.Errorf("%d requests were sent again, of which Caddy had passed on up to %d, want 0", report.Repeated, received-report.Total())
	}
	if report.Total() < o.requests*9/10 {
		o.t.Errorf("requests: got %d, want about %d", report.Total(), o.requests)
	}
}

// An instance that leaves first, then finishes what it has begun, costs nothing,
// without any retry.
func TestRollingDeployLosesNothing(t *testing.T) {
	caddytest.NoLeaks(t)
	o := newOperation(t, caddytest.SharedAgent(t), 4)
	o.serve("lb_policy consul_weighted_round_robin", "")
	o.underLoad(func(round int) {
		backend := o.backends[round%len(o.backends)]
		maintenance := round/len(o.backends)%2 == 0
		if maintenance {
			o.agent.StartMaintenance(backend.Name())
		} else {
			o.agent.Deregister(backend.Name())
		}
		o.awaitInstances(len(o.backends) - 1)
		caddytest.Pause(t, 50*time.Millisecond) // to drain
		backend.Stop()
		backend.Start()
		if maintenance {
			o.agent.EndMaintenance(backend.Name())
		} else {
			o.agent.Register(backend.Service(o.service))
		}
		o.awaitInstances(len(o.backends))
	})
}

// An instance that dies unnoticed by Consul costs nothing with what the README
// recommends. One at a time, and no more in the time of fail_duration than
// leaves others.
func TestInstancesThatDieLoseNothing(t *testing.T) {
	caddytest.NoLeaks(t)
	o := newOperation(t, caddytest.SharedAgent(t), 4)
	o.serve(recommended, "")
	o.underLoad(func(round int) {
		backend := o.backends[round%len(o.backends)]
		backend.Kill()
		caddytest.Pause(t, 500*time.Millisecond)
		backend.Start()
		caddytest.Pause(t, 4*time.Second)
	})
}

func TestFiftyReloadsLoseNothing(t *testing.T) {
	caddytest.NoLeaks(t)
	o := newOperation(t, caddytest.SharedAgent(t), 4)
	o.serve(recommended, "")
	const reloads = 50
	pause := time.Duration(float64(o.requests) / float64(o.rate) / reloads * float64(time.Second))
	proxies := []string{recommended, "lb_policy random", "lb_policy consul_random\nlb_retries 1", "lb_policy least_conn", ""}
	sources := []string{"", "health any", "health warning\nkeep_last_on_empty 10s", "serve_stale 1h", "tag !canary", "wait 1m"}
	o.underLoad(func(round int) {
		if round > 0 {
			caddytest.Pause(t, pause)
			return
		}
		for i := range reloads {
			start := time.Now()
			o.caddy.Load(o.config(proxies[i%len(proxies)], sources[i%len(sources)]))
			if left := pause - time.Since(start); left > 0 {
				caddytest.Pause(t, left)
			}
		}
	}, caddytest.RepeatUnread())
}

func TestAgentRestartsLoseNothing(t *testing.T) {
	caddytest.NoLeaks(t)
	o := newOperation(t, caddytest.StartAgent(t, caddytest.WithDisk()), 4)
	o.serve("", "")
	o.underLoad(func(int) {
		o.agent.Kill()
		o.agent.Restart()
		o.awaitFollowing()
	})
}

func TestLeaderFailoversLoseNothing(t *testing.T) {
	caddytest.NoLeaks(t)
	cluster := caddytest.StartCluster(t, 3)
	asked := cluster.Followers()[0]
	o := newOperation(t, asked, 4)
	o.serve("", "")
	o.underLoad(func(int) {
		leader := cluster.Leader()
		leader.Kill()
		cluster.Leader(leader)
		leader.Restart()
		for _, server := range cluster.Agents {
			server.WaitReady()
		}
		o.awaitFollowing()
	})
}

func (o *operation) awaitFollowing() {
	o.t.Helper()
	caddytest.Eventually(o.t, 2*caddytest.Patience, func() error {
		if shown := follows(o.t, o.caddy, o.service); shown.State != "following" {
			return fmt.Errorf("Caddy is %s (%s), want following", shown.State, shown.LastError)
		}
		return nil
	})
}

// Caddy that is stopped and started again refuses what comes meanwhile, unless
// its socket outlives it: then that waits. What Consul tells comes from storage
// at once, or from Consul soon after.
func TestUpgradeLosesNothingBehindASocketThatStays(t *testing.T) {
	o := newOperation(t, caddytest.SharedAgent(t), 4)
	home := t.TempDir()
	config := func(site string) string {
		return fmt.Sprintf("%s\nreverse_proxy {\n%s\ndynamic consul %s {\naddress %s\n}\n}\n}", site, recommended, o.service, o.agent.Address())
	}
	t.Run("its own socket", func(t *testing.T) {
		listen := caddytest.FreeAddress(t)
		start := func() *caddytest.Caddy {
			return caddytest.StartCaddyBinary(t, config("http://"+listen+" {"), caddytest.WithHome(home))
		}
		caddy := start()
		traffic := caddytest.StartTraffic(t, "http://"+listen, caddytest.Rate(float64(o.rate)))
		traffic.WaitMore(o.rate)
		from := time.Now()
		caddy.Stop()
		start()
		traffic.WaitMore(o.rate)
		report := traffic.Stop()
		failures := report.Failures()
		for _, failure := range failures {
			if failure.Start.Before(from.Add(-time.Second)) || failure.Status != 0 {
				t.Errorf("a request failed other than by a refused connection: %v", failure)
			}
		}
		if len(failures) > 0 {
			t.Logf("stop and start: %d of %d requests failed, over %v", len(failures), report.Total(),
				failures[len(failures)-1].Start.Sub(failures[0].Start).Round(time.Millisecond))
		}
	})
	t.Run("handed socket", func(t *testing.T) {
		socket := caddytest.OpenHandedSocket(t)
		start := func() *caddytest.Caddy {
			return socket.StartCaddyBinary(config("http://"+strings.Split(socket.Address(), ":")[0]+" {\nbind fd/3"), caddytest.WithHome(home))
		}
		caddy := start()
		traffic := caddytest.StartTraffic(t, "http://"+socket.Address(), caddytest.Rate(float64(o.rate)))
		traffic.WaitMore(o.rate)
		upgrades := 0
		for traffic.Report().Total() < o.requests-o.rate {
			caddy.Stop()
			caddy = start()
			upgrades++
			traffic.WaitMore(2 * o.rate)
		}
		report := traffic.Stop()
		t.Logf("%d upgrades: %d requests, %d failed, p99 %v, max %v", upgrades, report.Total(), len(report.Failures()),
			report.Quantile(0.99), report.Quantile(1))
		report.RequireSuccess(t)
	})
}
