package caddytest_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/caddy-consul/caddy-consul/caddytest"
)

// leastPolicy returns the policy that SECURITY.md documents, for a service.
func leastPolicy(t *testing.T, service string) string {
	t.Helper()
	text, err := os.ReadFile("../SECURITY.md")
	if err != nil {
		t.Fatal(err)
	}
	policy := regexp.MustCompile("(?s)```hcl\n(.*?)```").FindSubmatch(text)
	if policy == nil {
		t.Fatal("SECURITY.md: got no policy in a block of hcl, want one")
	}
	return strings.ReplaceAll(string(policy[1]), `"web"`, fmt.Sprintf("%q", service))
}

// grant makes a token with a policy.
func grant(t *testing.T, agent *caddytest.Agent, rules string) *api.ACLToken {
	t.Helper()
	name := fmt.Sprintf("test-%d", time.Now().UnixNano())
	if _, _, err := agent.Client().ACL().PolicyCreate(&api.ACLPolicy{Name: name, Rules: rules}, nil); err != nil {
		t.Fatalf("making a policy: %v", err)
	}
	token, _, err := agent.Client().ACL().TokenCreate(&api.ACLToken{Policies: []*api.ACLLink{{Name: name}}}, nil)
	if err != nil {
		t.Fatalf("making a token: %v", err)
	}
	return token
}

// revoke deletes a token.
func revoke(t *testing.T, agent *caddytest.Agent, token *api.ACLToken) {
	t.Helper()
	if _, err := agent.Client().ACL().TokenDelete(token.AccessorID, nil); err != nil {
		t.Fatalf("deleting a token: %v", err)
	}
}

func writeSecret(t *testing.T, file, secret string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(secret+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
}

// awaitState waits until the admin endpoint says so of a service, and that of
// its last error.
func (f *front) awaitState(service, state, lastError string) {
	f.t.Helper()
	caddytest.Eventually(f.t, caddytest.Patience, func() error {
		services, err := f.followed(service)
		for _, s := range services {
			if s.State == state && strings.Contains(s.LastError, lastError) {
				return nil
			}
		}
		return fmt.Errorf("state of %s: got %+v and error %v, want %s with %q", service, services, err, state, lastError)
	})
}

// followed returns what the admin endpoint tells of a service. It fails while
// Caddy replaces the endpoint, as it does with each config.
func (f *front) followed(service string) ([]serviceStatus, error) {
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	response, err := client.Get(f.AdminURL() + "/consul/services?service=" + service)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	var services []serviceStatus
	err = json.NewDecoder(response.Body).Decode(&services)
	return services, err
}

// The documented policy is enough for all that the source does, and none of its
// rules is idle.
func TestTheLeastPolicySuffices(t *testing.T) {
	caddytest.NoLeaks(t)
	agent := caddytest.StartAgent(t, caddytest.WithACLs())
	startInstances(t, agent, "web", "a")
	startInstances(t, agent, "other", "not-for-us")
	f := startFront(t)
	for _, tc := range []struct {
		name, policy, source string
		want                 string
	}{
		{"as documented", leastPolicy(t, "web"), consulSource("web", agent), "a"},
		{"nearest first", leastPolicy(t, "web"), consulSource("web", agent, "near _agent"), "a"},
		{"consistent", leastPolicy(t, "web"), consulSource("web", agent, "consistency consistent"), "a"},
		{"a filter", leastPolicy(t, "web"), consulSource("web", agent, "filter `Service.Port != 0`"), "a"},
		{"named by the request", leastPolicy(t, "web"), consulSource("{http.request.host}", agent, "allow *"), "a"},
		{"by prefix", `service_prefix "w" { policy = "read" } node_prefix "" { policy = "read" }`, consulSource("web", agent), "a"},
		{"only some nodes", `service "web" { policy = "read" } node "node-1" { policy = "read" }`, consulSource("web", agent), "a"},
		{"of another service", leastPolicy(t, "other"), consulSource("web", agent), unavailable},
		{"without nodes", `service "web" { policy = "read" }`, consulSource("web", agent), unavailable},
		{"without services", `node_prefix "" { policy = "read" }`, consulSource("web", agent), unavailable},
		{"named by the request, without services", `node_prefix "" { policy = "read" }`, consulSource("{http.request.host}", agent, "allow *"), unavailable},
	} {
		t.Run(tc.name, func(t *testing.T) {
			token := grant(t, agent, tc.policy)
			source := strings.Replace(tc.source, "\n", "\nstartup_timeout 1s\ntoken "+token.SecretID+"\n", 1)
			f.serve(reverseProxy(source))
			if tc.want == unavailable { // which it may be for a moment in any case
				f.ask("web") // begins to follow what requests name
				f.awaitLogged("needs service:read on the service and node:read on its nodes")
			}
			caddytest.Eventually(t, caddytest.Patience, func() error {
				if got := f.ask("web").String(); got != tc.want {
					return fmt.Errorf("a request: got %s, want %s", got, tc.want)
				}
				return nil
			})
			if got := f.ask("other").String(); got == "not-for-us" {
				t.Errorf("a service that the token may not read: got %s, want no answer of it", got)
			}
		})
	}
}

// awaitLogged waits until the log tells of something.
func (f *front) awaitLogged(text string) {
	f.t.Helper()
	f.Logs().Wait(f.t, regexp.QuoteMeta(text))
}

// A token comes too late, is wrong, is revoked and restored. What was known
// stays in use, and each time somebody is told why.
func TestTheLifeOfAToken(t *testing.T) {
	caddytest.NoLeaks(t)
	agent := caddytest.StartAgent(t, caddytest.WithACLs())
	startInstances(t, agent, "web", "a")
	file := filepath.Join(t.TempDir(), "token")
	token := grant(t, agent, leastPolicy(t, "web"))

	f := startFront(t)
	writeSecret(t, file, "0badc0de-0000-0000-0000-000000000000")
	f.serve(reverseProxy(consulSource("web", agent, "token_file "+file, "startup_timeout 1s"), inTurn))
	f.awaitState("web", "failing", "ACL not found")
	wantCounts(t, "with a wrong token", f.answers("web", 2), map[string]int{unavailable: 2})

	writeSecret(t, file, token.SecretID)
	f.awaitBackends("web", "a")
	traffic := caddytest.StartTraffic(t, "http://web", caddytest.ThroughSocket(f.listen), caddytest.Workers(2))
	traffic.WaitMore(10)

	revoke(t, agent, token)
	b := caddytest.StartBackend(t, caddytest.Named("b"))
	agent.Register(b.Service("web")) // Consul looks at tokens again when something changes
	f.awaitState("web", "failing", "ACL not found")
	wantCounts(t, "with a revoked token", f.answers("web", 4), map[string]int{"a": 4})
	traffic.WaitMore(10)

	writeSecret(t, file, grant(t, agent, leastPolicy(t, "web")).SecretID)
	f.awaitState("web", "following", "")
	f.awaitBackends("web", "a", "b")

	// Rights that are taken away look like a service without instances.
	blind := grant(t, agent, leastPolicy(t, "other"))
	writeSecret(t, file, blind.SecretID)
	f.awaitState("web", "failing", "the token may no longer see the service")
	f.awaitBackends("web", "a", "b")
	policy := blind.Policies[0]
	if _, _, err := agent.Client().ACL().PolicyUpdate(&api.ACLPolicy{
		ID: policy.ID, Name: policy.Name, Rules: leastPolicy(t, "web"),
	}, nil); err != nil {
		t.Fatal(err)
	}
	f.awaitState("web", "following", "")
	traffic.WaitMore(10)
	traffic.Stop().RequireSuccess(t)
}

// whoever renews a token replaces its file in one of these ways.
func TestATokenFileThatRotates(t *testing.T) {
	caddytest.NoLeaks(t)
	agent := caddytest.StartAgent(t, caddytest.WithACLs())
	f := startFront(t)
	for _, tc := range []struct {
		name    string
		replace func(t *testing.T, folder, token string)
	}{
		{"rewritten", func(t *testing.T, folder, token string) {
			t.Helper()
			writeSecret(t, filepath.Join(folder, "token"), token)
		}},
		{"renamed over", func(t *testing.T, folder, token string) {
			t.Helper()
			writeSecret(t, filepath.Join(folder, "token.tmp"), token)
			rename(t, filepath.Join(folder, "token.tmp"), filepath.Join(folder, "token"))
		}},
		{"folder swapped behind a link", func(t *testing.T, folder, token string) { // as Kubernetes does
			t.Helper()
			version, err := os.MkdirTemp(folder, "..")
			if err != nil {
				t.Fatal(err)
			}
			writeSecret(t, filepath.Join(version, "token"), token)
			link(t, filepath.Base(version), filepath.Join(folder, "..data_tmp"))
			rename(t, filepath.Join(folder, "..data_tmp"), filepath.Join(folder, "..data"))
			if _, err := os.Lstat(filepath.Join(folder, "token")); err != nil {
				link(t, "..data/token", filepath.Join(folder, "token"))
			}
		}},
	} {
		for _, byEnvironment := range []bool{false, true} {
			name, option := tc.name, "token_file %s"
			if byEnvironment {
				name, option = tc.name+", CONSUL_HTTP_TOKEN_FILE", "startup_timeout 3s # %s"
			}
			t.Run(name, func(t *testing.T) {
				service, folder := serviceName(t), t.TempDir()
				if byEnvironment {
					t.Setenv("CONSUL_HTTP_TOKEN_FILE", filepath.Join(folder, "token"))
				}
				old := grant(t, agent, leastPolicy(t, service))
				tc.replace(t, folder, old.SecretID)
				startInstances(t, agent, service, "a")
				defer agent.Deregister("a")
				defer agent.Deregister("b")
				f.serve(reverseProxy(consulSource(service, agent, fmt.Sprintf(option, filepath.Join(folder, "token"))), inTurn))
				f.awaitBackends("web", "a")
				logs := f.Logs().FromNow()

				fresh := grant(t, agent, leastPolicy(t, service))
				startInstancesOnly(t, agent, service, "b", func() {
					revoke(t, agent, old)
					tc.replace(t, folder, fresh.SecretID)
				})
				start := time.Now()
				f.awaitBackends("web", "a", "b")
				f.awaitState(service, "following", "")
				t.Logf("the new token told of the new instance after %s", time.Since(start).Round(time.Millisecond))
				if took := time.Since(start); took > 3*time.Second { // 1 s is promised, to a machine that isn't as busy
					t.Errorf("a new token: used after %s, want at most 1 s", took)
				}
				wantLines(t, logs, 0, "panic|can't be read")
			})
		}
	}
}

// startInstancesOnly registers an instance after something has been done.
func startInstancesOnly(t *testing.T, agent *caddytest.Agent, service, name string, first func()) {
	t.Helper()
	backend := caddytest.StartBackend(t, caddytest.Named(name))
	first()
	agent.Register(backend.Service(service))
}

func rename(t *testing.T, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}

func link(t *testing.T, to, name string) {
	t.Helper()
	if err := os.Symlink(to, name); err != nil {
		t.Fatal(err)
	}
}

// Credentials that can't be read any more are told once, in the log and in the
// state; the old ones stay in use.
func TestCredentialsThatCannotBeReadAnyMore(t *testing.T) {
	caddytest.NoLeaks(t)
	agent := caddytest.StartAgent(t, caddytest.WithACLs())
	startInstances(t, agent, "web", "a")
	token := grant(t, agent, leastPolicy(t, "web"))
	file := filepath.Join(t.TempDir(), "token")
	const lost, found = "the credentials for Consul can't be read any more", "the credentials for Consul can be read again"

	f := startFront(t)
	writeSecret(t, file, token.SecretID)
	f.serve(reverseProxy(consulSource("web", agent, "token_file "+file), inTurn))
	f.awaitBackends("web", "a")
	for _, tc := range []struct {
		name, reason string
		spoil        func()
	}{
		{"removed", "no such file", func() { os.Remove(file) }},
		{"emptied", "is empty", func() { writeSecret(t, file, "") }},
		{"more than a token in it", "holds more than a token", func() { writeSecret(t, file, "SecretID: "+token.SecretID) }},
		{"a folder in its place", "is a directory", func() {
			os.Remove(file)
			if err := os.Mkdir(file, 0o700); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			logs := f.Logs().FromNow()
			tc.spoil()
			if line := logs.Wait(t, lost); !strings.Contains(line, tc.reason) || strings.Contains(line, token.SecretID) {
				t.Errorf("the line in the log: got %s, want one that says %q and no token", line, tc.reason)
			}
			if got := f.credentialsError("web"); !strings.Contains(got, tc.reason) || strings.Contains(got, token.SecretID) {
				t.Errorf("credentials_error: got %q, want one that says %q and no token", got, tc.reason)
			}
			wantCounts(t, "with the old token", f.answers("web", 2), map[string]int{"a": 2})

			os.Remove(file)
			writeSecret(t, file, token.SecretID)
			logs.Wait(t, found)
			if got := f.credentialsError("web"); got != "" {
				t.Errorf("credentials_error when the file is back: got %q, want none", got)
			}
			wantLines(t, logs, 1, lost)
			wantLines(t, logs, 1, found)
		})
	}
}

func (f *front) credentialsError(service string) string {
	f.t.Helper()
	var services []struct {
		Error string `json:"credentials_error"`
	}
	if err := json.Unmarshal([]byte(f.Get("/consul/services?service="+service)), &services); err != nil || len(services) != 1 {
		f.t.Fatalf("/consul/services: got %d services and error %v, want 1", len(services), err)
	}
	return services[0].Error
}
