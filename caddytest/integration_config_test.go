package caddytest_test

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-consul/caddy-consul/caddytest"
)

// modules are what this plugin adds to Caddy.
var modules = []string{
	"admin.api.consul",
	"consul",
	"http.reverse_proxy.selection_policies.consul_random",
	"http.reverse_proxy.selection_policies.consul_round_robin",
	"http.reverse_proxy.selection_policies.consul_weighted_random",
	"http.reverse_proxy.selection_policies.consul_weighted_round_robin",
	"http.reverse_proxy.upstreams.consul",
}

func TestListModules(t *testing.T) {
	result := caddytest.RunCaddy(t, "list-modules")
	if result.Code != 0 {
		t.Fatalf("caddy list-modules: got %+v, want exit status 0", result)
	}
	wantModules(t, result.Stdout)
}

// wantModules fails the test unless a list of modules has ours.
func wantModules(t *testing.T, list string) {
	t.Helper()
	for _, module := range modules {
		if _, err := caddy.GetModule(module); err != nil {
			t.Errorf("%v: this test knows a module that there is not", err)
		}
	}
	lines := strings.Split(list, "\n")
	for _, module := range caddy.Modules() {
		if strings.Contains(module, "consul") && (!slices.Contains(lines, module) || !slices.Contains(modules, module)) {
			t.Errorf("caddy list-modules: got no line %s, want it; want %v", module, modules)
		}
	}
}

// A config is valid whether or not Consul can be reached.
func TestValidateWithConsulDown(t *testing.T) {
	down := caddytest.FreeAddress(t)
	for name, source := range map[string]string{
		"a service":            "dynamic consul web {\naddress " + down + "\n}",
		"all kinds of options": "dynamic consul web {\naddress " + down + "\ntoken secret\ntag v2 !canary\nfilter `Service.Meta.version == \"2\"`\nhealth warning\nweights meta share 3\nnear _agent\nconsistency stale\nstartup_timeout 1s\nserve_stale 24h\nkeep_last_on_empty 10s\ndatacenter dc2\n}\nlb_policy consul_weighted_round_robin",
		"services by request":  "dynamic consul {http.request.host.labels.2} {\naddress " + down + "\nallow web-*\n}",
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "Caddyfile")
			write(t, file, []byte("http://localhost {\n"+reverseProxy(source)+"\n}\n"))
			if result := caddytest.RunCaddy(t, "validate", "--config", file); result.Code != 0 {
				t.Errorf("caddy validate: got exit status %d, want 0:\n%s", result.Code, result.Stderr)
			}
		})
	}
}

// What is wrong with a config is said with its file and line.
func TestValidateNamesTheLine(t *testing.T) {
	dir := t.TempDir()
	notPEM := filepath.Join(dir, "not-pem")
	write(t, notPEM, []byte("nothing of a certificate"))
	for _, c := range []struct {
		name    string
		options string // the first is on line 4
		line    int
		want    string
	}{
		{"unknown option", "tag v2\nno_such_option x", 5, "no_such_option"},
		{"doubled option", "health passing\ntag v2\nhealth passing", 6, "health"},
		{"no service", "", 3, "service"},
		{"bad duration", "startup_timeout soon", 4, "soon"},
		{"negative duration", "serve_stale -1s", 4, "-1s"},
		{"unreadable certificate", "tls {\nca " + dir + "/none\n}", 5, "none"},
		{"invalid certificate", "tls {\nserver_name a\nca " + notPEM + "\n}", 6, "ca"},
		{"token and token_file", "token secret\ntoken_file " + notPEM, 5, "token_file"},
		{"bad filter", "filter `Service.Meta.version ==`", 4, "filter"},
		{"unknown field in a filter", "filter `Service.NoSuchField == 1`", 4, "filter"},
		{"weight out of range", "weights meta share 70000", 4, "70000"},
		{"unknown weights", "weights heavy", 4, "heavy"},
		{"unknown health", "health good", 4, "good"},
		{"unknown consistency", "consistency strong", 4, "strong"},
		{"bad address", "address ftp://127.0.0.1", 4, "ftp"},
		{"surplus argument", "near _agent node", 4, "argument"},
	} {
		t.Run(c.name, func(t *testing.T) {
			service := " web"
			if c.name == "no service" {
				service = ""
			}
			file := filepath.Join(t.TempDir(), "Caddyfile")
			write(t, file, []byte("http://localhost {\nreverse_proxy {\ndynamic consul"+service+" {\n"+c.options+"\n}\n}\n}\n"))
			result := caddytest.RunCaddy(t, "validate", "--config", file)
			at := fmt.Sprintf("%s:%d", file, c.line)
			if result.Code == 0 || !strings.Contains(result.Stderr, at) || !strings.Contains(result.Stderr, c.want) {
				t.Errorf("caddy validate: got exit status %d, want another than 0, %q and %q:\n%s", result.Code, at, c.want, result.Stderr)
			}
			if strings.Contains(result.Stderr, "secret") {
				t.Errorf("caddy validate repeats the token:\n%s", result.Stderr)
			}
		})
	}
}

// `caddy adapt` shows what `caddy run` runs.
func TestAdaptAndRun(t *testing.T) {
	agent := caddytest.SharedAgent(t)
	name := serviceName(t)
	startInstances(t, agent, name, "a")
	address := caddytest.FreeAddress(t)
	caddyfile := fmt.Sprintf("{\nconsul {\naddress %s\n}\n}\nhttp://%s {\n%s\n}\n",
		agent.Address(), address, reverseProxy("dynamic consul "+name+" {\ntag !canary\n}", "lb_policy consul_round_robin"))
	file := filepath.Join(t.TempDir(), "Caddyfile")
	write(t, file, []byte(caddyfile))
	result := caddytest.RunCaddy(t, "adapt", "--config", file, "--validate")
	if result.Code != 0 {
		t.Fatalf("caddy adapt: got %+v, want exit status 0", result)
	}
	wantConfig := func(command, config string) {
		t.Helper()
		for _, want := range []string{
			fmt.Sprintf(`"consul":{"address":"%s"}`, agent.Address()),
			fmt.Sprintf(`"dynamic_upstreams":{"service":"%s","source":"consul","tag":["!canary"]}`, name),
			`"selection_policy":{"policy":"consul_round_robin"}`,
		} {
			if !strings.Contains(config, want) {
				t.Errorf("caddy %s: got the config %s, want %s in it", command, config, want)
			}
		}
	}
	wantConfig("adapt", result.Stdout)

	binary := caddytest.StartCaddyBinary(t, caddyfile)
	traffic := caddytest.StartTraffic(t, "http://"+address, caddytest.Workers(1))
	traffic.WaitMore(10)
	traffic.Stop().RequireSuccess(t)
	wantConfig("run", binary.Get("/config/"))
}
