package caddytest_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/caddy-consul/caddy-consul/caddytest"
)

// awaitLeftOut waits until so many instances of a service are left out, and so
// many are not.
func (f *front) awaitLeftOut(service string, leftOut, used int) {
	f.t.Helper()
	caddytest.Eventually(f.t, caddytest.Patience, func() error {
		services, err := f.followed(service)
		for _, s := range services {
			if s.NotDialable == leftOut && s.InstanceCount == used {
				return nil
			}
		}
		return fmt.Errorf("instances of %s: got %+v and error %v, want %d used and %d left out", service, services, err, used, leftOut)
	})
}

// Whoever may register instances chooses what Caddy connects to. What isn't
// plainly an address is left out and told, and nothing that is registered is
// ever taken for a placeholder.
func TestNothingRegisteredIsExpanded(t *testing.T) {
	caddytest.NoLeaks(t)
	agent := caddytest.SharedAgent(t)
	trap := caddytest.StartBackend(t, caddytest.Named("trap"))
	t.Setenv("CADDY_TEST_SECRET", "127.0.0.1")
	f := startFront(t)
	for i, tc := range []struct {
		name          string
		address, node string // the node's is only used where the service has none
		socket        string
		port          int
	}{
		{"a placeholder for an address", "{env.CADDY_TEST_SECRET}", "10.0.0.1", "", trap.Port()},
		{"a placeholder of Caddyfiles", "{$CADDY_TEST_SECRET}", "10.0.0.1", "", trap.Port()},
		{"a placeholder for the node's address", "", "{env.CADDY_TEST_SECRET}", "", trap.Port()},
		{"a placeholder of requests", "{http.request.host}", "10.0.0.1", "", trap.Port()},
		{"half a placeholder", "127.0.0.1{", "10.0.0.1", "", trap.Port()},
		{"a placeholder in a socket's path", "", "10.0.0.1", "/run/{env.CADDY_TEST_SECRET}.sock", 0},
		{"a socket's path with a mode", "", "10.0.0.1", "/run/x.sock|0222", 0},
		{"no absolute path", "", "10.0.0.1", "run/x.sock", 0},
		{"a path", "127.0.0.1/x", "10.0.0.1", "", trap.Port()},
		{"a network", "unix/127.0.0.1", "10.0.0.1", "", trap.Port()},
		{"a URL", "http://127.0.0.1", "10.0.0.1", "", trap.Port()},
		{"a user", "user@127.0.0.1", "10.0.0.1", "", trap.Port()},
		{"a port of its own", "127.0.0.1:80", "10.0.0.1", "", trap.Port()},
		{"a line break", "127.0.0.1\r\nHost: x", "10.0.0.1", "", trap.Port()},
		{"a space", "127.0.0.1 ", "10.0.0.1", "", trap.Port()},
		{"a NUL", "127.0.0.1\x00", "10.0.0.1", "", trap.Port()},
		{"a very long name", strings.Repeat("a", 100_000), "10.0.0.1", "", trap.Port()},
		{"port 0", "127.0.0.1", "10.0.0.1", "", 0},
		{"port 65536 + the trap's", "127.0.0.1", "10.0.0.1", "", 65536 + trap.Port()},
		{"port -1", "127.0.0.1", "10.0.0.1", "", -1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			service := fmt.Sprintf("hostile-%d", i)
			agent.RegisterOn(service, tc.node, caddytest.Service{Name: service, Address: tc.address, Socket: tc.socket, Port: tc.port})
			agent.WaitHealthy(service, 1)
			logs := f.Logs().FromNow()
			f.serve(reverseProxy(consulSource(service, agent)))
			f.awaitLeftOut(service, 1, 0)
			wantCounts(t, "an instance that can't be dialled", f.answers("web", 2), map[string]int{unavailable: 2})
			if line := logs.Wait(t, "instances left out because they can't be dialled"); len(line) > 1000 {
				t.Errorf("the line in the log: got %d bytes, want at most 1000", len(line))
			}
		})
	}
	if got := trap.Requests(); got != 0 {
		t.Errorf("requests to an address that stands in a placeholder: got %d, want none", got)
	}
}

// Meta data and tags come out of placeholders as they were registered.
func TestMetaDataIsNotExpanded(t *testing.T) {
	caddytest.NoLeaks(t)
	agent := caddytest.SharedAgent(t)
	t.Setenv("CADDY_TEST_SECRET", "a-secret-of-the-proxy")
	const hostile = "{env.CADDY_TEST_SECRET} {$CADDY_TEST_SECRET} {http.request.host} {{env \"CADDY_TEST_SECRET\"}}"
	backend := caddytest.StartBackend(t)
	service := backend.Service(serviceName(t))
	service.Meta, service.Tags = map[string]string{"x": hostile}, []string{hostile}
	agent.Register(service)
	agent.WaitHealthy(service.Name, 1)
	f := startFront(t)
	f.serve(reverseProxy(consulSource(service.Name, agent),
		"header_down Meta {http.reverse_proxy.upstreams.consul.meta.x}",
		"header_down Tags {http.reverse_proxy.upstreams.consul.tags}",
		"header_up Up {http.reverse_proxy.upstreams.consul.meta.x}",
		"header_down +Replaced {http.reverse_proxy.upstreams.consul.meta.x}",
	), "header +Late {http.reverse_proxy.upstreams.consul.meta.x}")
	header := f.ask("web").header
	for _, name := range []string{"Meta", "Tags", "Replaced"} {
		if got := header.Get(name); got != hostile {
			t.Errorf("header %s: got %q, want what was registered", name, got)
		}
	}
	if got := fmt.Sprint(header); strings.Contains(got, "a-secret-of-the-proxy") {
		t.Errorf("headers: got %s, want no secret", got)
	}
}

// allow_cidr and deny_cidr bound what a registration can have Caddy connect to.
func TestRangesBoundWhatIsDialled(t *testing.T) {
	caddytest.NoLeaks(t)
	agent := caddytest.SharedAgent(t)
	service := serviceName(t)
	v4 := caddytest.StartBackend(t, caddytest.Named("v4"))
	v6 := caddytest.StartBackend(t, caddytest.Named("v6"), caddytest.OnIPv6())
	socket := caddytest.StartBackend(t, caddytest.Named("socket"), caddytest.OnSocket())
	named := v4.Service(service)
	named.ID, named.Address = "named", "localhost"
	mapped := v4.Service(service)
	mapped.ID, mapped.Address = "mapped", "::ffff:127.0.0.1"
	short := v4.Service(service)
	short.ID, short.Address = "short", "127.1"
	cloud := caddytest.Service{Name: service, ID: "cloud", Address: "169.254.169.254", Port: 80}
	all := []caddytest.Service{v4.Service(service), v6.Service(service), socket.Service(service), named, mapped, short, cloud}
	for _, s := range all {
		agent.Register(s)
	}
	agent.WaitHealthy(service, len(all))
	f := startFront(t)
	for _, tc := range []struct {
		name, options string
		want          string // the IDs of those used
	}{
		{"neither", "", "cloud mapped named short socket v4 v6"},
		{"allow IPv4", "allow_cidr 127.0.0.0/8", "mapped v4"},
		{"allow one address", "allow_cidr 127.0.0.1", "mapped v4"},
		{"allow IPv6", "allow_cidr ::1/128", "v6"},
		{"allow both", "allow_cidr 127.0.0.0/8 ::1", "mapped v4 v6"},
		{"allow twice", "allow_cidr 127.0.0.0/8\nallow_cidr ::1", "mapped v4 v6"},
		{"deny the cloud's", "deny_cidr 169.254.0.0/16", "mapped v4 v6"},
		{"deny loopback", "deny_cidr 127.0.0.0/8 ::1/128", "cloud"},
		{"deny goes before allow", "allow_cidr 0.0.0.0/0 ::/0\ndeny_cidr 127.0.0.0/8", "cloud v6"},
		{"allow what nobody has", "allow_cidr 10.0.0.0/8", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			logs := f.Logs().FromNow()
			f.serve(reverseProxy(consulSource(service, agent, tc.options)))
			want := strings.Fields(tc.want)
			f.awaitLeftOut(service, len(all)-len(want), len(want))
			got := make(map[string]bool)
			for _, instance := range f.service(service).Instances {
				got[instance.ID] = true
			}
			for _, id := range want {
				if !got[id] {
					t.Errorf("instances in use: got %v, want %s", got, tc.want)
				}
			}
			if tc.options != "" {
				logs.Wait(t, "instances left out because they can't be dialled.*may not be dialled")
			}
			f.LoadJSON("{}") // the same ranges, said otherwise, would find their watcher
		})
	}
	f.serve(reverseProxy(consulSource(service, agent, "allow_cidr 127.0.0.0/8 ::1"), inTurn))
	f.awaitBackends("web", "v4", "v6")
	if socket.Requests() != 0 {
		t.Errorf("requests to a socket under allow_cidr: got %d, want none", socket.Requests())
	}
}

// Errors in ranges name the place.
func TestRangesThatAreWrong(t *testing.T) {
	f := startFront(t)
	for _, option := range []string{
		"allow_cidr", "deny_cidr", "allow_cidr ten", "deny_cidr 10.0.0.0/33", "allow_cidr 10.0.0.0/8 300.0.0.0/8",
		"deny_cidr ::ffff:10.0.0.0/104", "allow_cidr fe80::1%eth0", "deny_cidr \"\"", "allow_cidr {env.HOME}", "allow_cidr 10.0.0.0/8 {\n}",
	} {
		_, err := f.Adapt(f.site("", reverseProxy("dynamic consul web {\n"+option+"\n}")))
		if err == nil || !strings.Contains(err.Error(), "Caddyfile:5") {
			t.Errorf("%s: got error %v, want one that names line 5", option, err)
		}
	}
	err := f.TryLoadJSON(`{"apps": {"http": {"servers": {"s": {"listen": ["unix//` + f.listen + `"], "routes": [{"handle": [` +
		`{"handler": "reverse_proxy", "dynamic_upstreams": {"source": "consul", "service": "web", "deny_cidr": ["ten"]}}]}]}}}}}`)
	if err == nil || !strings.Contains(err.Error(), "deny_cidr 'ten'") {
		t.Errorf("loading JSON: got error %v, want one that names deny_cidr", err)
	}
}

// fakeConsul answers every query about a service with the same text.
func fakeConsul(t *testing.T, body func() string) *httptest.Server {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Has("index") {
			<-r.Context().Done()
			return
		}
		w.Header().Set("X-Consul-Index", "1")
		_, _ = w.Write([]byte(body()))
	}))
	t.Cleanup(server.Close)
	return server
}

// What is enormous is bounded, and used or told, and neither panics nor stays.
func TestEnormousAnswers(t *testing.T) {
	caddytest.NoLeaks(t)
	f := startFront(t)
	instance := func(i int, address, more string) string {
		return fmt.Sprintf(`{"Node":{"Node":"n%d","Address":"127.0.0.1"},"Service":{"ID":"i%d","Service":"web","Address":%q,"Port":80%s},"Checks":[]}`,
			i, i, address, more)
	}
	megabyte := strings.Repeat("m", 1<<20)
	for _, tc := range []struct {
		name          string
		body          func() string
		used, leftOut int
		lastError     string
	}{
		{"100,000 instances", func() string {
			var body strings.Builder
			body.WriteByte('[')
			for i := range 100_000 {
				if i > 0 {
					body.WriteByte(',')
				}
				body.WriteString(instance(i, fmt.Sprintf("10.%d.%d.%d", i>>16, i>>8&255, i&255), ""))
			}
			body.WriteByte(']')
			return body.String()
		}, 100_000, 0, ""},
		{"100,000 instances that can't be dialled", func() string {
			return "[" + strings.Repeat(instance(0, "{env.HOME}", "")+",", 99_999) + instance(0, "{env.HOME}", "") + "]"
		}, 0, 100_000, ""},
		{"megabytes of meta data and tags", func() string {
			more := fmt.Sprintf(`,"Meta":{"x":%q},"Tags":[%q,"{env.HOME}"]`, megabyte, megabyte)
			return "[" + instance(0, "127.0.0.1", more) + "," + instance(1, "127.0.0.2", more) + "]"
		}, 2, 0, ""},
		{"a megabyte of address", func() string { return "[" + instance(0, megabyte, "") + "]" }, 0, 1, ""},
		{"a megabyte of ID", func() string {
			return strings.Replace("["+instance(0, "{}", "")+"]", `"i0"`, `"`+megabyte+`"`, 1)
		}, 0, 1, ""},
		{"a megabyte of brackets", func() string { return strings.Repeat("[", 1<<20) }, 0, 0, "no list of instances"},
		{"nesting in an instance", func() string {
			return `[{"Node":` + strings.Repeat("[", 1<<20) + strings.Repeat("]", 1<<20) + `}]`
		}, 0, 0, "exceeded max depth"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			logs := f.Logs().FromNow()
			consul := fakeConsul(t, tc.body)
			f.serve(reverseProxy("dynamic consul web {\naddress " + consul.URL + "\n}"))
			switch {
			case tc.lastError != "":
				f.awaitState("web", "failing", tc.lastError)
			case tc.leftOut > 0:
				logs.Wait(t, fmt.Sprintf(`instances left out .*"instances":%d\b`, tc.leftOut))
			default:
				logs.Wait(t, fmt.Sprintf(`following the service.*"instances":%d\b`, tc.used))
			}
			longest := 0
			for _, line := range logs.Lines() {
				longest = max(longest, len(line))
			}
			if longest > 2000 {
				t.Errorf("the longest line in the log: got %d bytes, want at most 2000", longest)
			}
			f.LoadJSON("{}")
		})
	}
	caddytest.Eventually(t, caddytest.Patience, func() error {
		if heap := heapMB(); heap > 300 {
			return fmt.Errorf("memory in use after all that: got %d MB, want at most 300", heap)
		}
		return nil
	})
	wantLines(t, f.Logs(), 0, "panic")
}

// heapMB returns the memory in use.
func heapMB() uint64 {
	runtime.GC()
	runtime.GC() // what a sync.Pool holds goes with the second
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	return stats.HeapAlloc >> 20
}

// An agent that isn't one, or lies about its index, is asked no more often than
// the backoff allows.
func TestAgentsThatAreNone(t *testing.T) {
	caddytest.NoLeaks(t)
	f := startFront(t)
	for _, tc := range []struct{ name, body, lastError string }{
		{"HTML", "<html></html>", "no list of instances"},
		{"null", "null", "no list of instances"},
		{"an object", `{"a":1}`, "no list of instances"},
		{"a list of numbers", "[1,2]", "no list of instances"},
		{"a list of objects of another kind", `[{"id":1}]`, "is it a Consul agent?"},
		{"nothing", "", "no list of instances"},
		{"cut off", `[{"Node":{"Node":"a"}`, "no list of instances"},
		{"an instance whose port is text", `[{"Node":{},"Service":{"Port":"80"}}]`, "cannot unmarshal"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var asked atomic.Int64
			consul := fakeConsul(t, func() string {
				asked.Add(1)
				return tc.body
			})
			f.serve(reverseProxy("dynamic consul web {\naddress " + consul.URL + "\n}"))
			f.awaitState("web", "failing", tc.lastError)
			if got := asked.Load(); got > 10 {
				t.Errorf("queries: got %d, want few", got)
			}
			f.LoadJSON("{}")
		})
	}
	var services []json.RawMessage
	if err := json.Unmarshal([]byte(f.Get("/consul/services")), &services); err != nil || len(services) != 0 {
		t.Errorf("services followed in the end: got %d and error %v, want none", len(services), err)
	}
}
