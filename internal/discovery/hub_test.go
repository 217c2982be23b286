package discovery

import (
	"context"
	"fmt"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/consul/api"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

func subscribeTo(t *testing.T, config *api.Config, query Query) (*Subscription, *observer.ObservedLogs) {
	t.Helper()
	logger, logs := observed()
	s, err := Subscribe(config, query, logger)
	if err != nil {
		t.Fatalf("subscribing: %v", err)
	}
	t.Cleanup(func() {
		if t.Failed() { // and may have ended before it was closed
			s.watcher.stop()
		}
	})
	return s, logs
}

func poolSizes() (agentCount, watcherCount int) {
	agents.Range(func(_, _ any) bool { agentCount++; return true })
	watchers.Range(func(_, _ any) bool { watcherCount++; return true })
	return agentCount, watcherCount
}

// During a reload the old config and the new one follow the same: if each asked
// for itself, a reload would cost Consul as much as a start.
func TestWhoAsksTheSameShares(t *testing.T) {
	consul := newLive(web("a"))
	server := serve(t, consul)
	goroutines := goleak.IgnoreCurrent()
	config := func() *api.Config { return &api.Config{Address: server.URL, Token: "x"} }

	before, beforeLogs := subscribeTo(t, config(), webQuery)
	before.Await(t.Context(), patience)
	wantLines := func(logs *observer.ObservedLogs, message string, want int) {
		t.Helper()
		eventually(t, func() error {
			if got := logs.FilterMessage(message).Len(); got != want {
				return fmt.Errorf("lines %q in the log: got %d, want %d", message, got, want)
			}
			return nil
		})
	}
	wantLines(beforeLogs, "following the service", 1)
	after, afterLogs := subscribeTo(t, config(), webQuery)
	if before.Set() == nil || before.Set() != after.Set() {
		t.Errorf("Sets of two who ask the same: got %p and %p, want the same one", before.Set(), after.Set())
	}
	if a, w := poolSizes(); a != 1 || w != 1 {
		t.Errorf("shared: got %d agents and %d watchers, want one of each", a, w)
	}
	consul.set()
	wantLines(afterLogs, "the service has no usable instance", 1)
	if got := beforeLogs.FilterLevelExact(zap.WarnLevel).Len(); got != 0 {
		t.Errorf("warnings in the log of the older config: got %d, want none", got)
	}

	after.Close() // as when the new config is refused
	consul.set(web("b"))
	wantLines(beforeLogs, "following the service", 2)
	wantNodes(t, "of the config that is left", before.Set(), "b")

	last := before.Set()
	before.Close()
	if a, w := poolSizes(); a != 0 || w != 0 {
		t.Errorf("after the last one has gone: got %d agents and %d watchers, want none", a, w)
	}
	wantNodes(t, "for requests of a config that has gone", before.Set(), "b")
	if before.Set() != last {
		t.Error("Set of a config that has gone: got another one, want the last")
	}
	server.CloseClientConnections()
	if err := goleak.Find(goroutines); err != nil {
		t.Errorf("goroutines after the last one has gone: %v", err)
	}
}

func TestWhatAConfigSharesOneQueryFor(t *testing.T) {
	directory := t.TempDir()
	tokenFile := filepath.Join(directory, "token")
	writeFile(t, tokenFile, []byte("x"))
	ca := newAuthority(t).file
	consul := newLive(web("a"))
	server := serve(t, consul)
	for _, tc := range []struct {
		name   string
		config func(*api.Config)
		query  func(*Query)
		agents int
	}{
		{name: "token", agents: 2, config: func(c *api.Config) { c.Token = "other" }},
		{name: "token file", agents: 2, config: func(c *api.Config) { c.TokenFile = tokenFile }},
		{name: "authority", agents: 2, config: func(c *api.Config) { c.TLSConfig.CAFile = ca }},
		{name: "server name", agents: 2, config: func(c *api.Config) { c.TLSConfig.Address = "consul" }},
		{name: "verification", agents: 2, config: func(c *api.Config) { c.TLSConfig.InsecureSkipVerify = true }},
		{name: "scheme", agents: 2, config: func(c *api.Config) { c.Scheme = "https" }},
		{name: "basic auth", agents: 2, config: func(c *api.Config) { c.HttpAuth = &api.HttpBasicAuth{Username: "u", Password: "p"} }},
		{name: "path prefix", agents: 2, config: func(c *api.Config) { c.PathPrefix = "/x" }},
		{name: "namespace", agents: 2, config: func(c *api.Config) { c.Namespace = "x" }},
		{name: "partition", agents: 2, config: func(c *api.Config) { c.Partition = "x" }},
		{name: "service", agents: 1, query: func(q *Query) { q.Service = "api" }},
		{name: "tags", agents: 1, query: func(q *Query) { q.Tags = []string{"x"} }},
		{name: "unwanted tags", agents: 1, query: func(q *Query) { q.NotTags = []string{"x"} }},
		{name: "filter", agents: 1, query: func(q *Query) { q.Filter = `Service.Port == 80` }},
		{name: "health", agents: 1, query: func(q *Query) { q.Health = HealthAny }},
		{name: "weights", agents: 1, query: func(q *Query) { q.Weighting.Equal = true }},
		{name: "default weight", agents: 1, query: func(q *Query) { q.Weighting = Weighting{MetaKey: "w", Default: 2} }},
		{name: "datacenter", agents: 1, query: func(q *Query) { q.Datacenter = "dc2" }},
		{name: "near", agents: 1, query: func(q *Query) { q.Near = "_agent" }},
		{name: "consistency", agents: 1, query: func(q *Query) { q.Consistency = ConsistencyStale }},
		{name: "wait", agents: 1, query: func(q *Query) { q.Wait = time.Minute }},
	} {
		t.Run("another "+tc.name, func(t *testing.T) {
			one, _ := subscribeTo(t, &api.Config{Address: server.URL}, webQuery)
			defer one.Close()
			config, query := &api.Config{Address: server.URL}, webQuery
			if tc.config != nil {
				tc.config(config)
			}
			if tc.query != nil {
				tc.query(&query)
			}
			other, _ := subscribeTo(t, config, query)
			defer other.Close()
			if one.watcher == other.watcher {
				t.Error("the two share a watcher, want one each")
			}
			if got, _ := poolSizes(); got != tc.agents {
				t.Errorf("agents: got %d, want %d", got, tc.agents)
			}
		})
	}
}

func TestASubscriptionThatIsRefusedLeavesNothingBehind(t *testing.T) {
	if _, err := Subscribe(&api.Config{Address: "ftp://consul"}, webQuery, zap.NewNop()); err == nil {
		t.Fatal("subscribing at a bad address: got no error, want one")
	}
	if a, w := poolSizes(); a != 0 || w != 0 {
		t.Errorf("left behind: got %d agents and %d watchers, want none", a, w)
	}
}

// Reloads come in bursts, and the last one to close meets the first to open.
func TestSubscriptionsComeAndGo(t *testing.T) {
	consul := newLive(web("a"))
	server := serve(t, consul)
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			for range 20 {
				s, err := Subscribe(&api.Config{Address: server.URL}, webQuery, zap.NewNop())
				if err != nil {
					t.Errorf("subscribing: %v", err)
					return
				}
				if got := nodesOf(s.Await(t.Context(), patience)); len(got) != 1 {
					t.Errorf("instances: got %v, want [a]", got)
				}
				s.Close()
			}
		})
	}
	group.Wait()
	if a, w := poolSizes(); a != 0 || w != 0 {
		t.Errorf("left behind: got %d agents and %d watchers, want none", a, w)
	}
}

// A second config that comes while Consul is down must not make requests wait
// once more.
func TestAwaitCountsFromTheStartOfFollowing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		consul := newScripted()
		w := follow(t, consul, webQuery)
		s := &Subscription{watcher: w.watcher}
		elapsed := func(timeout time.Duration) time.Duration {
			start := time.Now()
			if set := s.Await(t.Context(), timeout); set != nil {
				t.Fatalf("before the first answer: got %v, want none known", nodesOf(set))
			}
			return time.Since(start)
		}
		if got := elapsed(3 * time.Second); got != 3*time.Second {
			t.Errorf("first request: waited %s, want 3 s", got)
		}
		if got := elapsed(3 * time.Second); got != 0 {
			t.Errorf("request after the time is over: waited %s, want it refused at once", got)
		}
		if got := elapsed(5 * time.Second); got != 2*time.Second {
			t.Errorf("request of a more patient source: waited %s, want the 2 s that are left of its 5 s", got)
		}

		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start := time.Now()
		s.Await(ctx, time.Minute)
		if got := time.Since(start); got != time.Second {
			t.Errorf("request whose client has gone: waited %s, want 1 s", got)
		}

		question := consul.next()
		time.AfterFunc(2*time.Second, func() { question.instances(1, web("a")) })
		start = time.Now()
		wantNodes(t, "of a request that waited", s.Await(t.Context(), time.Minute), "a")
		if got := time.Since(start); got != 2*time.Second {
			t.Errorf("request that comes before the first answer: waited %s, want the 2 s until it came", got)
		}
	})
}

func TestFailingForCountsFromTheFirstFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		consul := newScripted()
		w := follow(t, consul, webQuery)
		s := &Subscription{watcher: w.watcher}
		consul.next().instances(1, web("a"))
		question := consul.next()
		if got := s.FailingFor(); got != 0 {
			t.Errorf("while Consul answers: got %s, want 0", got)
		}
		question.refuse()
		synctest.Wait()
		if got := s.FailingFor(); got <= 0 {
			t.Errorf("at the first failure: got %s, want more than 0", got)
		}
		start := time.Now()
		for time.Since(start) < time.Hour {
			consul.next().refuse()
		}
		if got := s.FailingFor(); got < time.Hour || got > time.Hour+time.Minute {
			t.Errorf("after an hour of failures: got %s, want an hour", got)
		}
		consul.next().instances(1, web("a"))
		consul.next()
		if got := s.FailingFor(); got != 0 {
			t.Errorf("after the recovery: got %s, want 0", got)
		}
	})
}

// The line about a fault comes once. An agent that refuses connections may do
// so before Subscribe returns.
func TestTheFirstFailureIsLogged(t *testing.T) {
	for range 200 {
		s, logs := subscribeTo(t, &api.Config{Address: "127.0.0.1:1"}, webQuery)
		eventually(t, func() error {
			if s.LastError() == nil {
				return fmt.Errorf("failure: got none, want one")
			}
			return nil
		})
		s.Close()
		if got := logs.FilterLevelExact(zap.WarnLevel).Len(); got != 1 {
			t.Fatalf("warnings about an agent that is down: got %d, want 1", got)
		}
	}
}
