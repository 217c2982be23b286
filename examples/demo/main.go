// Command demo shows Caddy following a real Consul: it runs a Consul agent, a
// few backends and Caddy with this plugin, sends steady traffic, and tells what
// each change in Consul does to it. It succeeds only if no request fails and
// the traffic is split by the weights in Consul.
//
// Run it with `make demo`.
package main

import (
	"fmt"
	"os"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/caddy-consul/caddy-consul/caddytest"
)

const (
	perSecond = 1000 // requests

	// how long each part watches the traffic
	watch = 1200 * time.Millisecond
)

func main() {
	if !caddytest.Run("demo", demo) {
		fmt.Println("\nThe demo failed; what went wrong is above.")
		os.Exit(1)
	}
}

func demo(t caddytest.TB) {
	fmt.Println("Starting Consul, three backends and Caddy ...")
	s := newStage(t)
	s.add(s.start("red"), 1)
	s.add(s.start("green"), 2)
	s.add(s.start("blue"), 3)
	s.sendTraffic()

	threeInstances(s)
	oneLeaves(s)
	oneJoins(s)
	weightChanges(s)
	checkFails(s)
	consulDies(s)
	s.sumUp()
}

func threeInstances(s *stage) {
	s.title("Three instances, with the weights 1, 2 and 3 in Consul")
	from := time.Now()
	caddytest.Pause(s.t, watch)
	s.showTraffic(from)
	s.showSplit(from)
}

func oneLeaves(s *stage) {
	s.title("blue leaves: it is deregistered, and stopped when its requests have ended")
	blue := s.find("blue")
	left := time.Now()
	s.remove(blue)
	s.waitSilent(blue)
	blue.Stop()
	caddytest.Pause(s.t, watch)
	s.showTraffic(left)
	s.showSplit(s.showLast(blue, left, time.Now(), "it was deregistered"))
}

func oneJoins(s *stage) {
	s.title("yellow joins, with the weight 3")
	yellow := s.start("yellow")
	joined := time.Now()
	s.add(yellow, 3)
	s.waitBusy(yellow, 0)
	caddytest.Pause(s.t, watch)
	s.showTraffic(joined)
	s.showSplit(s.showFirst(yellow, joined, "it was registered"))
}

func weightChanges(s *stage) {
	s.title("The weight of red changes from 1 to 5")
	red := s.find("red")
	changed := time.Now()
	s.add(red.Backend, 5)
	caddytest.Pause(s.t, silence+watch)
	s.showTraffic(changed)
	s.showSplit(changed.Add(silence))
}

func checkFails(s *stage) {
	s.title(fmt.Sprintf("The health check of green fails, and passes again after %v", watch))
	green := s.find("green")
	failed := time.Now()
	s.agent.SetCheck(green.Name(), api.HealthCritical)
	s.waitSilent(green)
	caddytest.Pause(s.t, watch)

	passed, before := time.Now(), green.Requests()
	s.agent.SetCheck(green.Name(), api.HealthPassing)
	s.waitBusy(green.Backend, before)
	caddytest.Pause(s.t, watch)
	s.showTraffic(failed)
	s.showLast(green, failed, passed, "its check failed")
	s.showSplit(s.showFirst(green.Backend, passed, "its check passed"))
}

func consulDies(s *stage) {
	s.title(fmt.Sprintf("Consul is killed, and started again after %v; then blue comes back", watch))
	killed := time.Now()
	s.agent.Kill()
	caddytest.Pause(s.t, watch)
	s.agent.Restart()
	fmt.Printf("  Consul was gone for %.1f s.\n", time.Since(killed).Seconds())

	blue := s.start("blue")
	joined := time.Now()
	s.add(blue, 2)
	s.waitBusy(blue, 0)
	caddytest.Pause(s.t, watch)
	s.showTraffic(killed)
	s.showSplit(s.showFirst(blue, joined, "it was registered"))
}
