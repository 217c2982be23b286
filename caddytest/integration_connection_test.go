package caddytest_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/caddy-consul/caddy-consul/caddytest"
)

// failing is the log line that says that Consul can't be asked.
const failing = `"msg":"Consul gives no usable answer; what was known last stays in use".*"service":"web"`

// Every kind of connection can be configured in the source, in the global block
// and by Consul's own environment variables.
func TestConnections(t *testing.T) {
	plain := caddytest.SharedAgent(t)
	onSocket := caddytest.StartAgent(t, caddytest.WithUnixSocket())
	withTLS := caddytest.StartAgent(t, caddytest.WithTLS())
	withACLs := caddytest.StartAgent(t, caddytest.WithACLs())
	backend := caddytest.StartBackend(t, caddytest.Named("web"))
	for _, agent := range []*caddytest.Agent{plain, onSocket, withTLS, withACLs} {
		agent.Register(backend.Service("web"))
		agent.WaitHealthy("web", 1)
	}
	pair := withTLS.CA().Issue(t, "caddy")
	withOptions := "tls {\nca " + withTLS.CA().File + "\ncert " + pair.Cert + "\nkey " + pair.Key + "\n}"
	tlsEnv := func(address string) map[string]string {
		return map[string]string{
			"CONSUL_HTTP_ADDR": address, "CONSUL_HTTP_SSL": "true", "CONSUL_CACERT": withTLS.CA().File,
			"CONSUL_CLIENT_CERT": pair.Cert, "CONSUL_CLIENT_KEY": pair.Key,
		}
	}
	tokenFile := filepath.Join(t.TempDir(), "token")
	write(t, tokenFile, []byte(readingToken(t, withACLs, "web")+"\n"))
	t.Setenv("TEST_TOKEN", readingToken(t, withACLs, "web"))

	front := startFront(t)
	for _, c := range []struct {
		name        string
		options     string
		environment map[string]string
	}{
		{"host and port", "address " + plain.Address(), map[string]string{"CONSUL_HTTP_ADDR": plain.Address()}},
		{"URL", "address http://" + plain.Address(), map[string]string{"CONSUL_HTTP_ADDR": "http://" + plain.Address()}},
		{"Unix socket", "address " + onSocket.Address(), map[string]string{"CONSUL_HTTP_ADDR": onSocket.Address()}},
		{"TLS", "address " + withTLS.Address() + "\n" + withOptions, tlsEnv(withTLS.Address())},
		{"TLS at a URL", "address https://" + withTLS.Address() + "\n" + withOptions, tlsEnv("https://" + withTLS.Address())},
		{
			"token", "address " + withACLs.Address() + "\ntoken {env.TEST_TOKEN}",
			map[string]string{"CONSUL_HTTP_ADDR": withACLs.Address(), "CONSUL_HTTP_TOKEN": os.Getenv("TEST_TOKEN")},
		},
		{
			"file with a token", "address " + withACLs.Address() + "\ntoken_file " + tokenFile,
			map[string]string{"CONSUL_HTTP_ADDR": withACLs.Address(), "CONSUL_HTTP_TOKEN_FILE": tokenFile},
		},
	} {
		site := front.site("", reverseProxy("dynamic consul web"))
		for _, way := range []struct {
			name        string
			caddyfile   string
			environment map[string]string
		}{
			{"source", front.site("", reverseProxy("dynamic consul web {\n"+c.options+"\n}")), nil},
			{"global block", "{\nconsul {\n" + c.options + "\n}\n}\n" + site, nil},
			{"environment", site, c.environment},
		} {
			t.Run(c.name+" from the "+way.name, func(t *testing.T) {
				for name, value := range way.environment {
					t.Setenv(name, value)
				}
				front.Load(way.caddyfile)
				front.awaitBackends("web.test", "web")
				front.serve(`respond "nothing"`) // nothing of it is shared with the next
			})
		}
	}
	wantLines(t, front.Logs(), 0, failing)
	for _, secret := range []string{os.Getenv("TEST_TOKEN"), strings.TrimSpace(string(read(t, tokenFile)))} {
		wantLines(t, front.Logs(), 0, secret)
	}
}

// What is nearer to the source goes before what is further.
func TestNearerSettingsWin(t *testing.T) {
	agent := caddytest.SharedAgent(t)
	name := serviceName(t)
	startInstances(t, agent, name, "web")
	dead := caddytest.FreeAddress(t)
	global := func(address string) string { return "{\nconsul {\naddress " + address + "\n}\n}\n" }
	front := startFront(t)

	t.Setenv("CONSUL_HTTP_ADDR", dead)
	front.Load(global(agent.Address()) + front.site("", reverseProxy("dynamic consul "+name)))
	front.awaitBackends("global.test", "web")
	front.Load(global(dead) + front.site("", reverseProxy(consulSource(name, agent))))
	front.awaitBackends("source.test", "web")
	t.Setenv("CONSUL_HTTP_ADDR", agent.Address())
	front.Load(front.site("", reverseProxy("dynamic consul "+name)))
	front.awaitBackends("environment.test", "web")
}

// A token of the source's own goes before all that the environment says of tokens.
func TestItsOwnTokenGoesBeforeTheEnvironments(t *testing.T) {
	agent := caddytest.StartAgent(t, caddytest.WithACLs())
	startInstances(t, agent, "web", "web")
	wrong := filepath.Join(t.TempDir(), "wrong")
	write(t, wrong, []byte("00000000-0000-4000-8000-000000000bad"))
	right := filepath.Join(t.TempDir(), "right")
	write(t, right, []byte(readingToken(t, agent, "web")))
	t.Setenv("CONSUL_HTTP_TOKEN", strings.TrimSpace(string(read(t, wrong))))
	t.Setenv("CONSUL_HTTP_TOKEN_FILE", wrong)
	front := startFront(t)
	for _, option := range []string{"token " + strings.TrimSpace(string(read(t, right))), "token_file " + right} {
		front.Load(front.site("", reverseProxy(consulSource("web", agent, option))))
		front.awaitBackends("web.test", "web")
		front.serve(`respond "nothing"`) // nothing of it is shared with the next
	}
	wantLines(t, front.Logs(), 0, failing)
}

// JSON says the same as a Caddyfile does.
func TestConnectionInJSON(t *testing.T) {
	agent := caddytest.StartAgent(t, caddytest.WithTLS())
	startInstances(t, agent, "web", "web")
	pair := agent.CA().Issue(t, "caddy")
	front := startFront(t)
	connection := fmt.Sprintf(`"address": %q, "tls": {"ca": %q, "cert": %q, "key": %q}`,
		agent.Address(), agent.CA().File, pair.Cert, pair.Key)
	config := func(ofSource, ofApp string) string {
		return fmt.Sprintf(`{"apps": {"consul": {%s}, "http": {"servers": {"web": {
			"listen": ["unix/%s"],
			"routes": [{"handle": [{
				"handler": "reverse_proxy",
				"dynamic_upstreams": {"source": "consul", "service": "web" %s},
				"load_balancing": {"selection_policy": {"policy": "consul_round_robin"}}
			}]}]
		}}}}}`, ofApp, front.listen, ofSource)
	}
	front.LoadJSON(config(", "+connection, ""))
	front.awaitBackends("source.test", "web")
	front.LoadJSON(config("", connection))
	front.awaitBackends("app.test", "web")

	var running map[string]any
	if err := json.Unmarshal([]byte(front.Get("/config/apps/consul")), &running); err != nil || running["address"] != agent.Address() {
		t.Errorf("the running config of the consul app: got %v, %v, want the address that was loaded", running, err)
	}
}

// An agent that asks for a certificate does not answer who has none, and an
// agent of another authority is not asked. Both are told once.
func TestUntrustedConnection(t *testing.T) {
	agent := caddytest.StartAgent(t, caddytest.WithTLS())
	startInstances(t, agent, "web", "web")
	own := agent.CA().Issue(t, "caddy")
	front := startFront(t)
	for _, c := range []struct {
		name string
		tls  string
		want string
	}{
		{"no certificate", "ca " + agent.CA().File, "certificate required"},
		{
			"another authority", "ca " + caddytest.NewCA(t).File + "\ncert " + own.Cert + "\nkey " + own.Key,
			"certificate signed by unknown authority",
		},
		{"another name", "ca " + agent.CA().File + "\ncert " + own.Cert + "\nkey " + own.Key + "\nserver_name example.com", "example.com"},
	} {
		t.Run(c.name, func(t *testing.T) {
			logs := front.Logs().FromNow()
			front.serve(reverseProxy(consulSource("web", agent, "startup_timeout 10ms", "tls {\n"+c.tls+"\n}")))
			logs.Wait(t, failing+".*"+c.want)
			front.awaitBackends("untrusted.test")
			caddytest.Eventually(t, caddytest.Patience, func() error {
				if got := front.service("web").Errors["tls"]; got < 3 {
					return fmt.Errorf("/consul/services tells of %d failures of TLS, want several", got)
				}
				return nil
			})
			wantLines(t, logs, 1, failing)
		})
	}
}

// The token's file is read again when it changes; a token that Consul refuses is
// told once; a token that loses its rights empties no service.
func TestTokens(t *testing.T) {
	agent := caddytest.StartAgent(t, caddytest.WithACLs())
	startInstances(t, agent, "web", "web")
	tokenFile := filepath.Join(t.TempDir(), "token")
	write(t, tokenFile, []byte("11111111-1111-1111-1111-111111111111"))
	front := startFront(t)
	front.serve(reverseProxy(consulSource("web", agent, "token_file "+tokenFile, "startup_timeout 10ms")))
	front.Logs().Wait(t, failing+".*403")
	front.awaitBackends("refused.test")

	good := readingToken(t, agent, "web")
	write(t, tokenFile, []byte(good))
	front.awaitBackends("good.test", "web")
	front.Logs().Wait(t, `"msg":"Consul answers again".*"service":"web"`)
	wantLines(t, front.Logs(), 1, failing)

	logs := front.Logs().FromNow()
	write(t, tokenFile, []byte(readingToken(t, agent, "other")))
	logs.Wait(t, failing+".*no longer see the service")
	wantCounts(t, "a service that the token may no longer see", front.answers("lost.test", 10), map[string]int{"web": 10})
	write(t, tokenFile, []byte(good))
	logs.Wait(t, `"msg":"Consul answers again"`)
	wantLines(t, logs, 1, failing)
	wantLines(t, front.Logs(), 0, good)
}

// While Consul is down when a config is loaded, requests wait for it no longer
// than they have to, static upstreams serve meanwhile, and its coming up is all
// that is needed.
func TestConsulDownAtLoad(t *testing.T) {
	caddytest.NoLeaks(t)
	agent := caddytest.StartAgent(t)
	startInstances(t, agent, "web", "web")
	agent.Kill()
	static := caddytest.StartBackend(t, caddytest.Named("static"))
	front := startFront(t)
	const timeout = 2 * time.Second
	source := consulSource("web", agent, "startup_timeout "+timeout.String())
	loaded := time.Now()
	front.Load(front.site("plain.test", reverseProxy(source)) +
		front.site("fallback.test", strings.Replace(reverseProxy(source), "reverse_proxy", "reverse_proxy "+static.Address(), 1)))

	if got := front.ask("plain.test"); got.status != http.StatusServiceUnavailable {
		t.Errorf("a request while Consul is down: answered by %s, want %s", got, unavailable)
	}
	if waited := time.Since(loaded); waited < timeout {
		t.Errorf("the first request was refused %v after the config was loaded, want it to wait %v for Consul", waited, timeout)
	}
	within(t, timeout, "answering 50 more requests", func() {
		wantCounts(t, "requests while Consul is down", front.answers("plain.test", 25), map[string]int{unavailable: 25})
		wantCounts(t, "requests to static upstreams", front.answers("fallback.test", 25), map[string]int{"static": 25})
	})
	if got := front.service("web"); got.State != "failing" || got.Errors["refused"] == 0 || got.LastError == "" {
		t.Errorf("/consul/services: got %+v, want it to fail since connections are refused", got)
	}
	wantLines(t, front.Logs(), 1, failing)

	agent.Restart()
	front.awaitBackends("plain.test", "web")
	front.awaitBackends("fallback.test", "web")
	wantLines(t, front.Logs(), 1, `"msg":"Consul answers again".*"service":"web"`)
}

// Consul's end is no end of service. One that has forgotten its catalogue when
// it comes back is not believed at once if keep_last_on_empty says so.
func TestConsulGoesDownAndComesBack(t *testing.T) {
	for _, c := range []struct {
		name    string
		agent   []caddytest.AgentOption
		options []string
	}{
		{"with its catalogue", []caddytest.AgentOption{caddytest.WithDisk()}, nil},
		{"without its catalogue", nil, []string{"keep_last_on_empty 1m"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			agent := caddytest.StartAgent(t, c.agent...)
			startInstances(t, agent, "web", "a", "b")
			front := startFront(t)
			front.serve(reverseProxy(inTurn, consulSource("web", agent, c.options...)))
			front.awaitBackends("up.test", "a", "b")
			traffic := caddytest.StartTraffic(t, "http://web.test", caddytest.ThroughSocket(front.listen), caddytest.Workers(2))
			agent.Kill()
			front.Logs().Wait(t, failing)
			traffic.WaitMore(200)
			agent.Restart()
			front.Logs().Wait(t, `"msg":"Consul answers again".*"service":"web"`)
			agent.WaitHealthy("web", 2)
			traffic.WaitMore(200)
			report := traffic.Stop()
			report.RequireSuccess(t)
			if got := slices.Sorted(maps.Keys(report.Shares())); !slices.Equal(got, []string{"a", "b"}) {
				t.Errorf("answered by %v, want a and b", got)
			}
			wantLines(t, front.Logs(), 1, failing)
			agent.Deregister("a")
			front.awaitBackends("up.test", "b")
		})
	}
}

// readingToken returns a new token that may do what the documentation asks for
// to follow a service, and no more.
func readingToken(t *testing.T, agent *caddytest.Agent, service string) string {
	t.Helper()
	acl := agent.Client().ACL()
	policy, _, err := acl.PolicyCreate(&api.ACLPolicy{
		Name:  fmt.Sprintf("read-%s-%d", service, time.Now().UnixNano()),
		Rules: fmt.Sprintf("service %q { policy = \"read\" }\nnode_prefix \"\" { policy = \"read\" }", service),
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	token, _, err := acl.TokenCreate(&api.ACLToken{Policies: []*api.ACLLink{{ID: policy.ID}}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return token.SecretID
}
