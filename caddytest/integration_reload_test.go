package caddytest_test

import (
	"fmt"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/caddy-consul/caddy-consul/caddytest"
)

// 50 reloads under traffic: no request fails, Consul does not notice them where
// nothing has changed that it is asked, and nothing is left behind.
func TestReloadsUnderTraffic(t *testing.T) {
	caddytest.NoLeaks(t)
	agent := caddytest.SharedAgent(t)
	kept, changing := serviceName(t)+"-kept", serviceName(t)+"-changing"
	startInstances(t, agent, kept, "a", "b", "c")
	startInstances(t, agent, changing, "d")
	queries := startCounter(t, agent)
	front := startFront(t)
	through := "address " + queries.address
	// Caddy leaves connections to backends behind, also with static upstreams,
	// until they have been idle for so long.
	transport := "transport http {\nkeepalive 1s\n}"
	config := func(i int) string {
		policies := []string{"lb_policy consul_round_robin", "lb_policy consul_weighted_random", "lb_retries 1", ""}
		return front.site("kept.test", reverseProxy(policies[i/3%len(policies)], transport, "dynamic consul "+kept+" {\n"+through+"\n}")) +
			front.site("changing.test", reverseProxy(transport, fmt.Sprintf("dynamic consul %s {\n%s\ntag !version-%d\n}", changing, through, i/3))) +
			front.site("unrelated.test", fmt.Sprintf("respond \"config %d\"", i))
	}
	front.Load(config(0))
	front.awaitBackends("kept.test", "a", "b", "c")
	front.client.CloseIdleConnections()
	front.Load(config(1)) // which has no connection to a backend yet
	goroutines := runtime.NumGoroutine()
	before := front.service(kept)

	keptTraffic := caddytest.StartTraffic(t, "http://kept.test", caddytest.ThroughSocket(front.listen), caddytest.Workers(3), caddytest.RepeatUnread())
	changingTraffic := caddytest.StartTraffic(t, "http://changing.test", caddytest.ThroughSocket(front.listen), caddytest.Workers(1), caddytest.RepeatUnread())
	const reloads = 50
	for i := range reloads {
		front.Load(config(2 + i))
		keptTraffic.WaitMore(10)
	}
	keptReport, changingReport := keptTraffic.Stop(), changingTraffic.Stop()
	keptReport.RequireSuccess(t)
	changingReport.RequireSuccess(t)
	wantLines(t, front.Logs(), 0, "panic") // another reason for an end without an answer
	t.Logf("over %d reloads: %v; %v", reloads, keptReport, changingReport)
	for _, id := range []string{"a", "b", "c"} {
		if keptReport.Shares()[id] == 0 {
			t.Errorf("instance %s got no request: %v", id, keptReport)
		}
	}

	after := front.service(kept)
	if after.Answers != before.Answers || after.Index != before.Index {
		t.Errorf("over %d reloads, Consul answered %d queries for a source that stayed the same, want 0",
			reloads, after.Answers-before.Answers)
	}
	path := "/v1/health/service/" + kept
	if all, blocking := queries.count(path), queries.count(path+" after an index"); all != 2 || blocking != 1 {
		t.Errorf("over %d reloads, Consul was asked %d times about a source that stayed the same, %d of them to wait for a change; want 2 and 1",
			reloads, all, blocking)
	}
	if got := front.service(changing).Query; got != fmt.Sprintf("not_tag=version-%d", (reloads+1)/3) {
		t.Errorf("the source that changed is followed with %q, want the last config's query alone", got)
	}

	front.Reload() // as before the traffic: no connection to a backend
	caddytest.Eventually(t, caddytest.Patience, func() error {
		if got := runtime.NumGoroutine(); got > goroutines {
			return fmt.Errorf("there are %d goroutines after %d reloads, want at most the %d before", got, reloads, goroutines)
		}
		return nil
	})

	agent.Deregister("a")
	front.awaitBackends("kept.test", "b", "c") // it still follows
}

// A config that can't be loaded, whatever for, leaves everything as it was.
func TestFailedReload(t *testing.T) {
	caddytest.NoLeaks(t)
	agent := caddytest.SharedAgent(t)
	name := serviceName(t)
	startInstances(t, agent, name, "a")
	startInstances(t, agent, name+"-new", "n")
	queries := startCounter(t, agent)
	// Over a Unix socket, Caddy could not load anything after this.
	front := startFrontOn(t, "tcp", caddytest.FreeAddress(t))
	dir := t.TempDir()
	liveLog, deadLog := filepath.Join(dir, "live.log"), filepath.Join(dir, "dead.log")
	source := func(service string) string {
		return reverseProxy("dynamic consul " + service + " {\naddress " + queries.address + "\n}")
	}
	logTo := func(file string) string { return "{\nlog {\noutput file " + file + " {\nroll_disabled\n}\n}\n}\n" }
	front.Load(logTo(liveLog) + front.site("", source(name)))
	front.awaitBackends("live.test", "a")
	before := front.service(name)

	other := func(site string) string {
		return logTo(deadLog) + front.site("new.test", source(name+"-new")) + front.site("", source(name)) + site
	}
	traffic := caddytest.StartTraffic(t, "http://"+front.listen, caddytest.Workers(2), caddytest.RepeatUnread())
	for _, c := range []struct {
		name string
		load func() error
	}{
		{"that can't listen", func() error {
			return front.TryLoad(other("http://elsewhere.test {\nbind unix//no/such/folder/socket\n}\n"))
		}},
		{"with a source that is not valid", func() error {
			config, err := front.Adapt(other(front.site("bad.test", source("bad"))))
			if err != nil {
				return fmt.Errorf("adapting: %w", err)
			}
			return front.TryLoadJSON(strings.Replace(config, `"service":"bad"`, `"service":"bad","filter":"=="`, 1))
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			for range 3 {
				if err := c.load(); err == nil || strings.Contains(err.Error(), "adapting") {
					t.Fatalf("loading a config %s: got error %v, want one", c.name, err)
				}
				traffic.WaitMore(10)
			}
		})
	}
	traffic.Stop().RequireSuccess(t)
	wantLines(t, front.Logs(), 0, "panic")

	if after := front.service(name); after.Answers != before.Answers || after.State != "following" {
		t.Errorf("after failed reloads: got %+v, want no more answers than in %+v", after, before)
	}
	if got := front.services(name + "-new"); len(got) != 0 {
		t.Errorf("after failed reloads, a service is followed that only they have: %+v", got)
	}
	if got := queries.count("/v1/health/service/" + name + " after an index"); got != 1 {
		t.Errorf("over failed reloads, Consul was asked %d times to wait for a change of the service, want once", got)
	}

	empty := fmt.Sprintf(`"msg":"the service has no usable instance","service":"%s"`, name)
	agent.Deregister("a")
	front.awaitBackends("live.test")
	awaitText(t, liveLog, empty)
	if text := string(read(t, deadLog)); strings.Contains(text, empty) {
		t.Errorf("the log of a config that was not loaded got\n%s", text)
	}

	// After a reload that works, the lines go to the new config's log alone.
	nextLog := filepath.Join(dir, "next.log")
	front.Load(logTo(nextLog) + front.site("", source(name)))
	back := caddytest.StartBackend(t, caddytest.Named("back"))
	agent.Register(back.Service(name))
	front.awaitBackends("next.test", "back")
	following := fmt.Sprintf(`"msg":"following the service","service":"%s"`, name)
	awaitText(t, nextLog, following)
	if got := strings.Count(string(read(t, liveLog)), following); got != 1 {
		t.Errorf("the first config's log: got %d lines on following the service, want only the first of both", got)
	}
}

// awaitText waits until a file holds a text.
func awaitText(t *testing.T, file, want string) {
	t.Helper()
	caddytest.Eventually(t, caddytest.Patience, func() error {
		if text := string(read(t, file)); !strings.Contains(text, want) {
			return fmt.Errorf("%s: got\n%s\nwant %s in it", file, text, want)
		}
		return nil
	})
}
