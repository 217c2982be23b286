package caddytest_test

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/caddy-consul/caddy-consul/caddytest"
)

// canary is a token that must not turn up where it has no business.
const canary = "00000000-c0de-4bad-cafe-0000000canary"

// coldStart is a Caddy that is started again and again, as a binary, with the
// same home folder.
type coldStart struct {
	t       *testing.T
	agent   *caddytest.Agent
	home    string
	listen  string
	service string
	options string
}

func newColdStart(t *testing.T, agent *caddytest.Agent) *coldStart {
	t.Helper()
	return &coldStart{
		t: t, agent: agent, home: t.TempDir(), listen: caddytest.FreeAddress(t), service: "cold",
		options: "token " + canary,
	}
}

// start starts Caddy.
func (c *coldStart) start() *caddytest.Caddy {
	c.t.Helper()
	return caddytest.StartCaddyBinary(c.t, fmt.Sprintf(`
	{
		metrics
		log {
			exclude admin.api
		}
	}
	http://%s {
		reverse_proxy {
			dynamic consul %s {
				address %s
				%s
			}
		}
	}`, c.listen, c.service, c.agent.Address(), c.options), caddytest.WithHome(c.home))
}

// storeSet has Caddy store what Consul tells.
func (c *coldStart) storeSet(instances int) {
	c.t.Helper()
	caddy := c.start()
	caddytest.Eventually(c.t, caddytest.Patience, func() error {
		if shown := follows(c.t, caddy, c.service); shown.InstanceCount != instances {
			return fmt.Errorf("instances: got %d, want %d", shown.InstanceCount, instances)
		}
		if _, err := c.find(); err != nil {
			return err
		}
		return nil
	})
	caddy.Stop()
}

// find returns the path of the stored Set, if there is one.
func (c *coldStart) find() (string, error) {
	files, err := filepath.Glob(filepath.Join(c.home, "data", "caddy", "consul", "services", "*.json"))
	if err == nil && len(files) != 1 {
		err = fmt.Errorf("stored Sets: got %q, want one", files)
	}
	return strings.Join(files, " "), err
}

// stored returns the path of the stored Set.
func (c *coldStart) stored() string {
	c.t.Helper()
	file, err := c.find()
	if err != nil {
		c.t.Fatal(err)
	}
	return file
}

// firstAnswer sends requests until one is answered well, and returns how long
// that took.
func (c *coldStart) firstAnswer() (took time.Duration) {
	c.t.Helper()
	start := time.Now()
	traffic := caddytest.StartTraffic(c.t, "http://"+c.listen, caddytest.Workers(1))
	caddytest.Eventually(c.t, caddytest.Patience, func() error {
		for _, sample := range traffic.Report().Samples {
			if !sample.Failed() {
				took = sample.Start.Add(sample.Latency).Sub(start)
				return nil
			}
		}
		return fmt.Errorf("no request was answered well")
	})
	traffic.Stop()
	return took
}

// wantUnavailable fails the test if a request gets anything but a 503.
func (c *coldStart) wantUnavailable(when string) {
	c.t.Helper()
	traffic := caddytest.StartTraffic(c.t, "http://"+c.listen, caddytest.Workers(1))
	traffic.WaitMore(5)
	for _, sample := range traffic.Stop().Samples {
		if sample.Status != 503 {
			c.t.Errorf("%s, a request got %v, want status 503", when, sample)
		}
	}
}

func TestColdStartServesTheStoredInstances(t *testing.T) {
	agent := caddytest.StartAgent(t, caddytest.WithDisk())
	c := newColdStart(t, agent)
	backends := make([]*caddytest.Backend, 2)
	for i := range backends {
		backends[i] = caddytest.StartBackend(t)
		agent.Register(backends[i].Service(c.service))
	}
	agent.WaitHealthy(c.service, 2)
	c.storeSet(2)
	agent.Kill()
	stopped := time.Now()

	caddy := c.start()
	if took := c.firstAnswer(); took > time.Second {
		t.Errorf("the first answer came %v after Caddy had loaded its config, want at most 1s", took)
	} else {
		t.Logf("the first answer came %v after Caddy had loaded its config", took.Round(time.Millisecond))
	}
	traffic := caddytest.StartTraffic(t, "http://"+c.listen, caddytest.Rate(faultRate))
	traffic.WaitMore(faultRate)
	shown := follows(t, caddy, c.service)
	if shown.State != "failing" || !shown.ColdStart || shown.InstanceCount != 2 {
		t.Errorf("without Consul: got state %s, cold start %v, %d instances, want failing, true, 2", shown.State, shown.ColdStart, shown.InstanceCount)
	}
	if shown.FailingSince == nil || shown.FailingSince.After(stopped.Add(time.Second)) {
		t.Errorf("stale since %v, want when Consul was last heard, before %v", shown.FailingSince, stopped)
	}
	if got := metric(t, caddy, "caddy_consul_cold_start", c.service, ""); got != 1 {
		t.Errorf("caddy_consul_cold_start: got %v, want 1", got)
	}
	if got := metric(t, caddy, "caddy_consul_stale_seconds", c.service, ""); got <= 0 {
		t.Errorf("caddy_consul_stale_seconds: got %v, want more than 0", got)
	}
	if got := caddy.Logs().Count("serving the instances that an earlier run stored"); got != 1 {
		t.Errorf("log lines about the cold start: got %d, want 1", got)
	}

	agent.Restart()
	over := time.Now()
	third := caddytest.StartBackend(t)
	agent.Register(third.Service(c.service))
	caddytest.Eventually(t, 2*caddytest.Patience, func() error {
		shown := follows(t, caddy, c.service)
		if shown.InstanceCount != 3 || shown.ColdStart || shown.State != "following" {
			return fmt.Errorf("when Consul is back: got %d instances, cold start %v, %s, want 3, false, following",
				shown.InstanceCount, shown.ColdStart, shown.State)
		}
		return nil
	})
	t.Logf("current %v after Consul was back", time.Since(over).Round(time.Millisecond))
	if got := metric(t, caddy, "caddy_consul_cold_start", c.service, ""); got != 0 {
		t.Errorf("caddy_consul_cold_start when Consul is back: got %v, want 0", got)
	}
	traffic.WaitMore(faultRate / 10)
	traffic.Stop().RequireSuccess(t)
	caddy.Stop()
	c.wantNoSecret()
}

// wantNoSecret fails the test if the token is in anything that the plugin has
// stored.
func (c *coldStart) wantNoSecret() {
	c.t.Helper()
	folder := filepath.Join(c.home, "data", "caddy", "consul")
	err := filepath.WalkDir(folder, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		text, err := os.ReadFile(path)
		if strings.Contains(string(text), canary) || strings.Contains(path, canary) {
			c.t.Errorf("the token is in %s", path)
		}
		return err
	})
	if err != nil {
		c.t.Errorf("looking for the token in %s: %v", folder, err)
	}
}

// What is stored is only ever a hint: whatever is wrong with it, Caddy runs, and
// says so once.
func TestColdStartIgnoresWhatItCanNotUse(t *testing.T) {
	agent := caddytest.StartAgent(t, caddytest.WithDisk())
	c := newColdStart(t, agent)
	c.options += "\nstartup_timeout 1s"
	agent.Register(caddytest.StartBackend(t).Service(c.service))
	agent.WaitHealthy(c.service, 1)
	c.storeSet(1)
	agent.Kill()
	good, err := os.ReadFile(c.stored())
	if err != nil {
		t.Fatal(err)
	}
	edit := func(change func(map[string]any)) string {
		var fields map[string]any
		if err := json.Unmarshal(good, &fields); err != nil {
			t.Fatal(err)
		}
		change(fields)
		text, err := json.Marshal(fields)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	for _, row := range []struct{ name, content string }{
		{"empty", ""},
		{"half", string(good[:len(good)/2])},
		{"noise", "\x00\xff\x17"},
		{"foreign", `{"instances": ["10.0.0.1:80"]}`},
		{"another version", edit(func(f map[string]any) { f["version"] = 99 })},
		{"another query", edit(func(f map[string]any) { f["query"] = "{}" })},
		{"an address that Consul could not give", edit(func(f map[string]any) {
			f["endpoints"].([]any)[0].(map[string]any)["Dial"] = "{env.HOME}:80"
		})},
	} {
		t.Run(row.name, func(t *testing.T) {
			c := *c
			c.t = t
			if err := os.WriteFile(c.stored(), []byte(row.content), 0o600); err != nil {
				t.Fatal(err)
			}
			caddy := c.start()
			caddy.Logs().Wait(t, `"level":"warn".*the instances stored by an earlier run can't be used`)
			c.wantUnavailable("with nothing that can be used")
			if shown := follows(t, caddy, c.service); shown.ColdStart || shown.InstanceCount != 0 {
				t.Errorf("got cold start %v with %d instances, want none", shown.ColdStart, shown.InstanceCount)
			}
			caddy.Stop()
			if left, _ := os.ReadFile(c.stored()); string(left) != row.content {
				t.Errorf("what can't be used was overwritten with %s", left)
			}
		})
	}
}

// The instances are as stale as Consul's last word about them, not as the
// process.
func TestServeStaleCountsFromBeforeTheColdStart(t *testing.T) {
	agent := caddytest.StartAgent(t, caddytest.WithDisk())
	c := newColdStart(t, agent)
	c.options += "\nserve_stale 1h"
	agent.Register(caddytest.StartBackend(t).Service(c.service))
	agent.WaitHealthy(c.service, 1)
	c.storeSet(1)
	agent.Kill()

	caddy := c.start()
	c.firstAnswer()
	caddy.Stop()

	var fields map[string]any
	text, err := os.ReadFile(c.stored())
	if err == nil {
		err = json.Unmarshal(text, &fields)
	}
	if err != nil {
		t.Fatal(err)
	}
	fields["confirmed"] = time.Now().Add(-2 * time.Hour)
	if text, err = json.Marshal(fields); err == nil {
		err = os.WriteFile(c.stored(), text, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	caddy = c.start()
	caddy.Logs().Wait(t, "serving the instances that an earlier run stored")
	c.wantUnavailable("two hours after Consul's last word, with serve_stale 1h")
}

// A service that goes at once is kept for a while, in case it was a mistake.
func TestKeepLastOnEmptyDistrustsForAWhile(t *testing.T) {
	caddytest.NoLeaks(t)
	agent := caddytest.SharedAgent(t)
	caddy := caddytest.StartCaddy(t)
	s := newStage(t, caddy, agent, agent.Address())
	const patience = 2 * time.Second
	s.options = fmt.Sprintf("keep_last_on_empty %v", patience)
	s.open()
	logs := caddy.Logs().FromNow()
	traffic := caddytest.StartTraffic(t, "http://"+s.listen, caddytest.Rate(faultRate))
	deregister := func() {
		for _, instance := range s.instances {
			agent.Deregister(instance.ID)
		}
	}

	deregister()
	logs.Wait(t, "Consul reports no usable instance any more; serving the ones known last for a while")
	traffic.WaitMore(faultRate / 2)
	for _, instance := range s.instances {
		agent.Register(instance)
	}
	s.awaitInstances(2)
	caddytest.Pause(t, patience) // what was started is not ended by the clock
	traffic.Stop().RequireSuccess(t)

	gone := time.Now()
	deregister()
	caddytest.Eventually(t, caddytest.Patience, func() error {
		if count := s.follows().InstanceCount; count != 0 {
			return fmt.Errorf("instances: got %d, want 0", count)
		}
		return nil
	})
	if kept := time.Since(gone); kept < patience {
		t.Errorf("an empty answer was believed after %v, want %v", kept, patience)
	}
	traffic = caddytest.StartTraffic(t, "http://"+s.listen, caddytest.Workers(1))
	traffic.WaitMore(5)
	if report := traffic.Stop(); len(report.Failures()) != report.Total() {
		t.Errorf("requests to a service that is gone: %v", report)
	}
	agent.Register(s.instances[0])
	s.awaitInstances(1)
	traffic = caddytest.StartTraffic(t, "http://"+s.listen, caddytest.Workers(1))
	traffic.WaitMore(5)
	traffic.Stop().RequireSuccess(t)
}
