package discovery

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"testing/synctest"

	"github.com/hashicorp/consul/api"
	"go.uber.org/zap"

	"github.com/caddy-consul/caddy-consul/internal/endpoint"
)

// instances is what an answer has to offer.
type instances struct {
	endpoints []endpoint.Endpoint
	refused   []error
}

// read reads an answer with the given entries.
func read(t *testing.T, q Query, entries ...*api.ServiceEntry) *instances {
	t.Helper()
	got, err := readBytes(&reader{query: &q}, []byte(listed(entries)))
	if err != nil {
		t.Fatalf("reading %s: got error %v, want none", listed(entries), err)
	}
	return got
}

func readBytes(r *reader, body []byte) (*instances, error) {
	elements, err := r.read(bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	r.take(elements)
	endpoints, refused := r.query.endpoints(elements)
	return &instances{endpoints, refused}, nil
}

func TestWhereAnInstanceIsDialled(t *testing.T) {
	at := func(node, service string, port int) *api.ServiceEntry {
		e := web("a")
		e.Node.Address, e.Service.Address, e.Service.Port = node, service, port
		return e
	}
	socket := func(path string) *api.ServiceEntry {
		e := web("a")
		e.Service.SocketPath, e.Service.Port, e.Service.Address = path, 0, ""
		return e
	}
	for _, tc := range []struct {
		name  string
		entry *api.ServiceEntry
		want  string // empty: refused
	}{
		{"the service's own address", at("10.0.0.1", "10.0.0.2", 80), "10.0.0.2:80"},
		{"else that of its node", at("10.0.0.1", "", 80), "10.0.0.1:80"},
		{"host name", at("", "web-1.example_x.com", 65535), "web-1.example_x.com:65535"},
		{"IPv6", at("", "2001:db8::7", 8080), "[2001:db8::7]:8080"},
		{"IPv6 of the node", at("::1", "", 8080), "[::1]:8080"},
		{"IPv6 with a zone", at("", "fe80::1%eth0", 80), "[fe80::1%eth0]:80"},
		{"socket", socket("/run/web.sock"), "unix//run/web.sock"},
		{"no address", at("", "", 80), ""},
		{"port 0", at("", "10.0.0.1", 0), ""},
		{"port -1", at("", "10.0.0.1", -1), ""},
		{"port 65536", at("", "10.0.0.1", 65536), ""},
		{"braces", at("", "{env.HOME}", 80), ""},
		{"placeholder in the node's", at("{http.request.host}", "", 80), ""},
		{"slash", at("", "unix/run", 80), ""},
		{"URL", at("", "http://10.0.0.1", 80), ""},
		{"space", at("", "10.0.0.1 ", 80), ""},
		{"line break", at("", "10.0.0.1\r\nX: y", 80), ""},
		{"NUL", at("", "10.0.0.1\x00", 80), ""},
		{"at sign", at("", "a@b", 80), ""},
		{"brackets", at("", "[::1]", 80), ""},
		{"address with a port", at("", "10.0.0.1:8080", 80), ""},
		{"host name with a port", at("", "web.test:8080", 80), ""},
		{"zone of a host name", at("", "web.test%eth0", 80), ""},
		{"foreign letters", at("", "bücher.example", 80), ""},
		{"relative socket", socket("run/web.sock"), ""},
		{"abstract socket", socket("@web"), ""},
		{"socket with a space", socket("/run/my web.sock"), ""},
		{"socket with a placeholder", socket("/run/{env.X}.sock"), ""},
		{"socket with a mode", socket("/run/web.sock|0222"), ""},
		{"socket with a line break", socket("/run/web\n.sock"), ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := read(t, webQuery, tc.entry)
			switch {
			case tc.want == "" && (len(got.endpoints) != 0 || len(got.refused) != 1):
				t.Errorf("got %v, want it refused", got.endpoints)
			case tc.want == "" && !strings.Contains(got.refused[0].Error(), `"web-a" on node "a"`):
				t.Errorf("error: got %v, want one that names the instance", got.refused[0])
			case tc.want != "" && len(got.endpoints) != 1:
				t.Errorf("got refused: %v, want %s", got.refused, tc.want)
			case tc.want != "" && got.endpoints[0].Dial != tc.want:
				t.Errorf("address: got %s, want %s", got.endpoints[0].Dial, tc.want)
			}
		})
	}
}

// One bad registration must not take the service down, and who made it must be
// able to find out.
func TestInstancesThatCannotBeDialledAreToldOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		consul := newScripted()
		w := follow(t, consul, webQuery)
		bad := web("bad")
		bad.Service.Port = 0
		consul.next().instances(1, web("a"), bad)
		consul.next().instances(2, web("a"), web("b"), bad)
		question := consul.next()
		wantNodes(t, "beside a bad one", w.set.Load(), "a", "b")
		if got := w.logged(zap.WarnLevel, msgRefused); got != 1 {
			t.Errorf("warnings: got %d, want 1", got)
		}
		question.instances(3, bad)
		consul.next()
		wantNodes(t, "when only the bad one is left", w.set.Load())
	})
}

func withChecks(name string, checks ...string) *api.ServiceEntry {
	e := web(name)
	e.Checks = nil
	for i, status := range checks {
		check := &api.HealthCheck{CheckID: fmt.Sprintf("check-%d", i), Status: status}
		switch status {
		case "node maintenance":
			check.CheckID, check.Status = api.NodeMaint, api.HealthCritical
		case "service maintenance":
			check.CheckID, check.Status = api.ServiceMaintPrefix+"web-"+name, api.HealthCritical
		}
		e.Checks = append(e.Checks, check)
	}
	return e
}

func TestStatusIsTheWorstOfTheChecks(t *testing.T) {
	for _, tc := range []struct {
		checks []string
		want   endpoint.Status
	}{
		{nil, endpoint.Passing},
		{[]string{"passing"}, endpoint.Passing},
		{[]string{"passing", "warning", "passing"}, endpoint.Warning},
		{[]string{"critical", "warning"}, endpoint.Critical},
		{[]string{"warning", "critical", "passing"}, endpoint.Critical},
		{[]string{"no such status"}, endpoint.Critical},
		{[]string{"node maintenance"}, endpoint.Maintenance},
		{[]string{"critical", "service maintenance", "passing"}, endpoint.Maintenance},
	} {
		t.Run(strings.Join(tc.checks, ","), func(t *testing.T) {
			text, _ := json.Marshal(withChecks("a", tc.checks...))
			var in instance
			if err := json.Unmarshal(text, &in); err != nil {
				t.Fatal(err)
			}
			got := in.status()
			if got != tc.want {
				t.Errorf("status: got %s, want %s", got, tc.want)
			}
			// the official client's idea of it
			official := withChecks("a", tc.checks...).Checks.AggregatedStatus()
			if official != "" && official != got.String() {
				t.Errorf("status: got %s, want %s, which the official client aggregates", got, official)
			}
		})
	}
}

func TestHealthLevels(t *testing.T) {
	all := []*api.ServiceEntry{
		withChecks("passing", "passing"), withChecks("warning", "warning"), withChecks("critical", "critical"),
		withChecks("node-maintenance", "node maintenance"), withChecks("maintenance", "passing", "service maintenance"),
	}
	for health, want := range map[Health][]string{
		HealthPassing: {"passing"},
		HealthWarning: {"passing", "warning"},
		HealthAny:     {"critical", "passing", "warning"},
	} {
		t.Run(string(health), func(t *testing.T) {
			query := Query{Service: "web", Health: health}
			wantNodes(t, "", endpoint.NewSet(new(endpoint.Origin), read(t, query, all...).endpoints), want...)
		})
	}
}

func TestWeights(t *testing.T) {
	weighted := func(passing, warning int, status string) *api.ServiceEntry {
		e := withChecks("a", status)
		e.Service.Weights = api.AgentWeights{Passing: passing, Warning: warning}
		return e
	}
	meta := func(value string) *api.ServiceEntry {
		e := weighted(7, 7, "passing")
		e.Service.Meta = map[string]string{"w": value, "other": "9"}
		return e
	}
	fromMeta := Weighting{MetaKey: "w", Default: 5}
	for _, tc := range []struct {
		name   string
		from   Weighting
		entry  *api.ServiceEntry
		weight int
	}{
		{"passing", Weighting{}, weighted(10, 3, "passing"), 10},
		{"warning", Weighting{}, weighted(10, 3, "warning"), 3},
		{"warning without a weight", Weighting{}, weighted(10, 0, "warning"), 0},
		{"none", Weighting{}, weighted(0, 0, "passing"), 0},
		{"negative", Weighting{}, weighted(-1, 1, "passing"), 0},
		{"too large", Weighting{}, weighted(1_000_000, 1, "passing"), MaxWeight},
		{"equal", Weighting{Equal: true}, weighted(10, 3, "passing"), 1},
		{"equal, of none", Weighting{Equal: true}, weighted(0, 0, "passing"), 1},
		{"meta", fromMeta, meta("42"), 42},
		{"meta with spaces", fromMeta, meta(" 42 "), 42},
		{"meta 0", fromMeta, meta("0"), 0},
		{"meta too large", fromMeta, meta("65536"), MaxWeight},
		{"meta negative", fromMeta, meta("-1"), 5},
		{"meta not a number", fromMeta, meta("heavy"), 5},
		{"meta a fraction", fromMeta, meta("1.5"), 5},
		{"meta missing", fromMeta, weighted(7, 7, "passing"), 5},
		{"meta beyond all numbers", fromMeta, meta("99999999999999999999"), 5},
	} {
		t.Run(tc.name, func(t *testing.T) {
			query := Query{Service: "web", Health: HealthWarning, Weighting: tc.from}
			got := read(t, query, tc.entry).endpoints
			if len(got) != 1 || got[0].Weight != tc.weight {
				t.Errorf("got %+v, want the weight %d", got, tc.weight)
			}
		})
	}
	t.Run("older agents tell none", func(t *testing.T) {
		got, err := readBytes(&reader{query: &webQuery}, []byte(`[{"Node":{"Node":"a","Address":"10.0.0.1"},"Service":{"ID":"a","Port":80}}]`))
		if err != nil || len(got.endpoints) != 1 || got.endpoints[0].Weight != 1 {
			t.Errorf("got %+v, error %v, want the weight 1", got, err)
		}
	})
}

func TestUnwantedTags(t *testing.T) {
	tagged := func(name string, tags ...string) *api.ServiceEntry {
		e := web(name)
		e.Service.Tags = tags
		return e
	}
	query := Query{Service: "web", Health: HealthPassing, NotTags: []string{"canary", "Old"}}
	got := read(t, query, tagged("a"), tagged("b", "v2"), tagged("c", "v2", "CANARY"), tagged("d", "old"), tagged("e", "canary2"))
	wantNodes(t, "without the tags canary and Old", endpoint.NewSet(new(endpoint.Origin), got.endpoints), "a", "b", "e")
}

// Instances keep their places, on which rotations and hashes rest, whatever
// order Consul answers in.
func TestInstancesAreInAStableOrder(t *testing.T) {
	second := web("b")
	second.Service.ID = "web-a"
	first := []*api.ServiceEntry{web("c"), web("b"), second, web("a")}
	wanted := []string{"a/web-a", "b/web-a", "b/web-b", "c/web-c"}
	order := func(query Query, entries ...*api.ServiceEntry) []string {
		var got []string
		for _, e := range read(t, query, entries...).endpoints {
			got = append(got, e.Node+"/"+e.ID)
		}
		return got
	}
	if got := order(webQuery, first...); !slices.Equal(got, wanted) {
		t.Errorf("order: got %v, want %v", got, wanted)
	}
	slices.Reverse(first)
	if got := order(webQuery, first...); !slices.Equal(got, wanted) {
		t.Errorf("order of an answer in another one: got %v, want %v", got, wanted)
	}
	near := webQuery
	near.Near = "_agent"
	if got, want := order(near, first...), []string{"a/web-a", "b/web-a", "b/web-b", "c/web-c"}; !slices.Equal(got, want) {
		t.Errorf("order by distance: got %v, want Consul's, %v", got, want)
	}
	slices.Reverse(first)
	if got, want := order(near, first...), []string{"c/web-c", "b/web-b", "b/web-a", "a/web-a"}; !slices.Equal(got, want) {
		t.Errorf("order by distance: got %v, want Consul's, %v", got, want)
	}
}

func TestWhatAnEndpointTells(t *testing.T) {
	e := web("a")
	e.Service.Tags = []string{"v1", "Canary"}
	e.Service.Meta = map[string]string{"zone": "z1"}
	got := read(t, webQuery, e).endpoints[0]
	want := endpoint.Endpoint{
		Dial: "a.test:80", Weight: 1, Status: endpoint.Passing, Service: "web", ID: "web-a", Node: "a", Datacenter: "dc1",
		Tags: []string{"v1", "Canary"}, Meta: map[string]string{"zone": "z1"},
	}
	if fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestWhatConsulIsAsked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		consul := newScripted()
		query := Query{
			Service: "web api", Tags: []string{"v1", "b&c"}, NotTags: []string{"x"}, Filter: `Service.Meta.version == "2"`,
			Health: HealthPassing, Datacenter: "dc2", Near: "_agent", Consistency: ConsistencyStale, Wait: webQuery.Wait,
		}
		follow(t, consul, query)
		question := consul.next()
		const want = "http://consul.test:8500/v1/health/service/web%20api?dc=dc2&filter=Service.Meta.version+%3D%3D+%222%22&near=_agent&passing=1&stale=&tag=v1&tag=b%26c"
		if got := question.URL.String(); got != want || question.Method != http.MethodGet {
			t.Errorf("question: got %s %s, want GET %s", question.Method, got, want)
		}
		question.instances(1)
		question = consul.next()
		if got := question.URL.Query(); got.Get("index") != "1" || got.Get("wait") == "" || got.Get("dc") != "dc2" {
			t.Errorf("question that blocks: got %s, want the same with an index and a wait", question.URL)
		}
		question.instances(1)
		if got := consul.next().URL.Query()["index"]; len(got) != 1 {
			t.Errorf("next question: got the indices %v, want one", got)
		}
	})
}

// The reader decodes only what it has not seen, and finds the elements by
// itself. It must not differ from the standard decoder.
func TestReadingInPartIsReadingInWhole(t *testing.T) {
	for _, text := range []string{
		`[]`, ` [ ] `, "\n[\t]\r\n", `[{}]`, `null`, `{}`, `""`, `1`, ``, ` `, `[`, `]`, `][`, `[}`, `[{]`, `[{}`, `{}]`, `[]]`, `[[]]`,
		`[{},]`, `[,{}]`, `[,]`, `[{}{}]`, `[{},,{}]`, `[{} {}]`, `[{},{}]`, `[ {} , {} ]`, `[null]`, `[{},null]`, `[1]`, `["x"]`, `[[{}]]`,
		`[{"a":"]"}]`, `[{"a":"}"}]`, `[{"a":"{"}]`, `[{"a":"\""}]`, `[{"a":"\\"}]`, `[{"a":"\\\""}]`, `[{"a":"\\\\"},{"b":"\\\"}"}]`,
		`[{"a":"\"}]`, `[{"a":"x}]`, `[{"a":[1,{"b":[{}]}]}]`, `[{"a":[}]}]`, `[{"a":{]}]`, `[{"a":1}] []`, `[]x`, `x[]`, "\ufeff[]",
		`[{"a":1}` + "\x00" + `]`, "\u00a0[]", "[]\u0085", "\v[]", `[{"a":1}` + "\u00a0]", `[{"a":tru}]`, `[{a:1}]`, `[{"a":1,}]`, `[{"a":01}]`,
	} {
		t.Run(text, func(t *testing.T) { compareReading(t, text) })
	}
}

func FuzzReadingInPartIsReadingInWhole(f *testing.F) {
	f.Add(listed([]*api.ServiceEntry{web("a"), web("b")}))
	f.Add(`[{"Node":{"Node":"a\\\"}"},"Service":{"ID":"]"}},{}]`)
	f.Fuzz(func(t *testing.T, text string) { compareReading(t, text) })
}

func compareReading(t *testing.T, text string) {
	t.Helper()
	var whole []json.RawMessage
	wholeErr := json.Unmarshal([]byte(text), &whole)
	if wholeErr == nil && whole == nil {
		wholeErr = errNoList
	}
	for _, element := range whole {
		if element[0] != '{' {
			wholeErr = errNoList
		}
	}
	for name, w := range map[string]*window{
		"at once":                {text: strings.NewReader(text), buffer: make([]byte, windowSize)},
		"in a window that grows": {text: strings.NewReader(text), buffer: make([]byte, 1)},
		"byte by byte":           {text: iotest.OneByteReader(strings.NewReader(text)), buffer: make([]byte, windowSize)},
		"with its end":           {text: iotest.DataErrReader(strings.NewReader(text)), buffer: make([]byte, 16)},
	} {
		compareParts(t, name, w, whole, wholeErr)
	}
}

// compareParts reads a window in part and compares that with the whole.
func compareParts(t *testing.T, name string, w *window, whole []json.RawMessage, wholeErr error) {
	t.Helper()
	var parts []string
	partsErr := w.readList(func() error {
		raw, err := w.object()
		if err == nil && !json.Valid(raw) {
			err = errNoList
		}
		parts = append(parts, string(raw))
		w.skip(len(raw))
		return err
	})
	if (wholeErr == nil) != (partsErr == nil) {
		t.Fatalf("reading %s: got error %v, want error %v", name, partsErr, wholeErr)
	}
	if wholeErr != nil {
		return
	}
	if len(parts) != len(whole) {
		t.Fatalf("reading %s: got the elements %q, want %d", name, parts, len(whole))
	}
	for i, part := range parts {
		if part != string(whole[i]) {
			t.Errorf("element %d, read %s: got %q, want %q", i, name, part, whole[i])
		}
	}
}

// An answer that shares much with the one before, in whatever order, is read as
// if it were the first.
func TestReadingIsTheSameAfterAnyAnswer(t *testing.T) {
	const variants = 40
	var texts [variants]string
	for i := range texts {
		e := web(fmt.Sprintf("n%02d", i%20))
		e.Service.Weights.Passing = 1 + i
		e.Service.Meta = map[string]string{"x": strings.Repeat("y", rand.IntN(3))} // some are as long as others
		texts[i] = strings.Trim(listed([]*api.ServiceEntry{e}), "[]\n")
	}
	r := reader{query: &webQuery}
	var answer []string
	for range 2000 {
		for range rand.IntN(4) { // some come, change, go or move
			switch at := rand.IntN(len(answer) + 1); rand.IntN(4) {
			case 0:
				answer = slices.Insert(answer, at, texts[rand.IntN(variants)])
			case 1:
				answer = slices.Delete(answer, at, min(at+rand.IntN(7), len(answer)))
			case 2:
				if at < len(answer) {
					answer[at] = texts[rand.IntN(variants)]
				}
			default:
				answer = append(slices.Clone(answer[at:]), answer[:at]...)
			}
		}
		body := "[" + strings.Join(answer, ",") + "]"
		got, err := readBytes(&r, []byte(body))
		if err != nil {
			t.Fatalf("reading %s: got error %v, want none", body, err)
		}
		want, _ := readBytes(&reader{query: &webQuery}, []byte(body))
		if !sameEndpoints(got.endpoints, want.endpoints) || len(got.endpoints) != len(answer) {
			t.Fatalf("reading %s: got %v, want %v", body, got.endpoints, want.endpoints)
		}
	}
}

// What is longer than the memory that is kept for reading is read all the same.
func TestALongElementIsRead(t *testing.T) {
	long := web("a")
	long.Service.Meta = map[string]string{"long": strings.Repeat("x", 3*maxWindow)}
	for range 2 {
		got := read(t, webQuery, web("0"), long, web("b"))
		if len(got.endpoints) != 3 || len(got.endpoints[1].Meta["long"]) != 3*maxWindow {
			t.Fatalf("got %d instances, want 3, the second one with all of its meta data", len(got.endpoints))
		}
	}
}

// A Set is read by requests long after the answer that it was made of, whose
// memory serves for the next.
func TestASetDoesNotChangeWithLaterAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		consul := newScripted()
		w := follow(t, consul, webQuery)
		described := func(name string) *api.ServiceEntry {
			e := web(name)
			e.Service.Tags, e.Service.Meta = []string{name}, map[string]string{name: name}
			return e
		}
		consul.next().instances(1, described("aa"), described("bb"))
		question := consul.next()
		set := w.set.Load()
		before := fmt.Sprintf("%+v %+v", *set.At(0), *set.At(1))
		for i := range 20 {
			name := string(rune('c' + i))
			question.instances(uint64(2+i), described(name+name), described(name+"z"))
			question = consul.next()
		}
		if after := fmt.Sprintf("%+v %+v", *set.At(0), *set.At(1)); after != before {
			t.Errorf("instances of an old Set: got %s, want %s", after, before)
		}
	})
}
