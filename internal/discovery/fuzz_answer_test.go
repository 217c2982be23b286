package discovery

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/hashicorp/consul/api"

	"github.com/caddy-consul/caddy-consul/internal/endpoint"
)

// fuzzQuery asks for as much as a query can.
var fuzzQuery = Query{
	Service: "web", Health: HealthAny, NotTags: []string{"old"}, Wait: time.Minute,
	Weighting: Weighting{MetaKey: "share", Default: 7},
}

// readWhole reads an answer as encoding/json does, in one go.
func readWhole(query *Query, body []byte) (endpoints []endpoint.Endpoint, refused int, err error) {
	var all []instance
	if err := json.Unmarshal(body, &all); err != nil {
		return nil, 0, err
	}
	if all == nil {
		return nil, 0, errors.New("null")
	}
	for i := range all {
		if all[i].Node == nil || all[i].Service == nil {
			return nil, 0, errors.New("no instance")
		}
		e, wanted, err := query.endpoint(&all[i])
		switch {
		case err != nil:
			refused++
		case wanted:
			endpoints = append(endpoints, e)
		}
	}
	slices.SortStableFunc(endpoints, func(a, b endpoint.Endpoint) int { return a.Compare(&b) })
	return endpoints, refused, nil
}

// checkEndpoints fails the test if one of the endpoints could do harm.
func checkEndpoints(t *testing.T, query *Query, endpoints []endpoint.Endpoint) {
	t.Helper()
	for i := range endpoints {
		e := &endpoints[i]
		if got := caddy.NewReplacer().ReplaceAll(e.Dial, ""); got != e.Dial || strings.ContainsAny(e.Dial, "{}") {
			t.Errorf("address %q: Caddy would make %q of it, want it kept", e.Dial, got)
		}
		checkDialled(t, e.Dial)
		if e.Weight < 0 || e.Weight > MaxWeight {
			t.Errorf("weight: got %d, want 0 to %d", e.Weight, MaxWeight)
		}
		if !query.Health.isMetBy(e.Status) {
			t.Errorf("status: got %s, want one that the query asks for", e.Status)
		}
	}
	set := endpoint.NewSet(new(endpoint.Origin), endpoints)
	if set.Len() != len(endpoints) {
		t.Errorf("Set: got %d endpoints, want %d", set.Len(), len(endpoints))
	}
}

// checkDialled fails the test if Caddy would not dial exactly that address.
func checkDialled(t *testing.T, dial string) {
	t.Helper()
	address, err := caddy.ParseNetworkAddress(dial)
	if err != nil {
		t.Errorf("address %q: Caddy refuses it (%v), want it left out", dial, err)
		return
	}
	if path, isUnix := strings.CutPrefix(dial, "unix/"); isUnix {
		if address.Network != "unix" || address.Host != path {
			t.Errorf("address %q: Caddy takes it for %+v", dial, address)
		}
		return
	}
	host, port, err := net.SplitHostPort(dial)
	number, _ := strconv.Atoi(port)
	if err != nil || address.Network != "tcp" || address.PortRangeSize() != 1 || address.StartPort != uint(number) || number == 0 ||
		strings.Trim(address.Host, "[]") != host {
		t.Errorf("address %q: Caddy takes it for %+v", dial, address)
	}
}

const oneInstance = `{"Node":{"Node":"a","Address":"10.0.0.1","Datacenter":"dc1"},` +
	`"Service":{"ID":"web-a","Service":"web","Address":"","Port":80,"Tags":["v2"],"Meta":{"share":"3"},"Weights":{"Passing":5,"Warning":1}},` +
	`"Checks":[{"CheckID":"c","Status":"passing"}]}`

// The reader, which decodes what it has not seen before, says the same as
// encoding/json does of the whole, at the first sight of an answer and after
// another one.
func FuzzAnswer(f *testing.F) {
	for _, seed := range []string{
		"", "[]", " [ ] ", "null", "{}", "[{}]", "[null]", "[1]", "[[]]", `["a"]`, "[" + oneInstance + "]",
		"[" + oneInstance + "," + oneInstance + "]", "[" + oneInstance + ",]", "[," + oneInstance + "]", "[" + oneInstance + " " + oneInstance + "]",
		"[" + oneInstance + "]]", "[" + oneInstance, "[" + oneInstance + "}]", "\ufeff[]", "[\v]", "[\u00a0]", "[{\"Node\":\"\\\"}]\"}]", `[{"a":"\\"}]`, `[{"a":"]"}]`,
		strings.Replace("["+oneInstance+"]", "10.0.0.1", "{env.HOME}", 1),
		strings.Replace("["+oneInstance+"]", ":80,", ":65536,", 1),
		strings.Replace("["+oneInstance+"]", ":80,", ":8e1,", 1),
		strings.Replace("["+oneInstance+"]", `"share":"3"`, `"share":" 99999999999999999999"`, 1),
		strings.Replace("["+oneInstance+"]", `"Address":"",`, `"Address":"::1","SocketPath":"/run/x.sock",`, 1),
		strings.Replace("["+oneInstance+"]", `"Passing":5`, `"Passing":-5`, 1),
		"[" + strings.Repeat(`{"a":`, 200) + "1" + strings.Repeat("}", 200) + "]",
		"[" + strings.Repeat(`[`, 200) + strings.Repeat("]", 200) + "]",
	} {
		f.Add([]byte(seed), []byte("["+oneInstance+"]"))
		f.Add([]byte("["+oneInstance+"]"), []byte(seed))
	}
	f.Fuzz(func(t *testing.T, before, body []byte) {
		if bytes.Count(body, []byte("["))+bytes.Count(body, []byte("{")) > 5000 {
			return // encoding/json counts the list as a level of its own
		}
		query := fuzzQuery
		r := reader{query: &query}
		_, _ = readBytes(&r, before)
		got, err := readBytes(&r, body)
		endpoints, refused, wholeErr := readWhole(&query, body)
		if (err == nil) != (wholeErr == nil) {
			t.Fatalf("reading %q: got error %v, want as of the whole: %v", body, err, wholeErr)
		}
		if err != nil {
			return
		}
		if len(got.endpoints) != len(endpoints) || len(endpoints) > 0 && !reflect.DeepEqual(got.endpoints, endpoints) || len(got.refused) != refused {
			t.Fatalf("reading %q: got %+v, want %+v and %d refused", body, got, endpoints, refused)
		}
		checkEndpoints(t, &query, got.endpoints)
		for _, err := range got.refused {
			if len(err.Error()) > 2000 {
				t.Errorf("an error: got %d bytes, want few", len(err.Error()))
			}
		}
	})
}

// The list of services is either understood or an error.
func FuzzNames(f *testing.F) {
	for _, seed := range []string{"", "{}", "null", "[]", `{"web":[]}`, `{"WEB":null,"web":["a"]}`, `{"\u212a":[]}`, `{"a":`, "\xff"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		n := &names{first: make(chan struct{})}
		err := n.read(bytes.NewReader(body))
		if err == nil {
			err = n.take(&answer{index: 1})
		}
		var services map[string]any
		decoder := json.NewDecoder(bytes.NewReader(body))
		decoder.UseNumber() // one too large for a float is one
		isOne := json.Valid(body) && decoder.Decode(&services) == nil && services != nil
		if (err == nil) != isOne {
			t.Fatalf("reading %q: got error %v, want one: %t", body, err, !isOne)
		}
		for name := range services {
			if err == nil && !n.has(strings.ToLower(name)) {
				t.Errorf("service %q of %q: got none, want one", name, body)
			}
		}
	})
}

// What storage holds is trusted no more than what Consul says.
func FuzzStored(f *testing.F) {
	query := fuzzQuery
	whole, err := json.Marshal(stored{Version: storedVersion, Query: query.key(), Confirmed: time.Unix(1e9, 0).UTC(), Endpoints: []endpoint.Endpoint{
		{Dial: "10.0.0.1:80", Weight: 3, Service: "web", ID: "a", Node: "n", Tags: []string{"v2"}, Meta: map[string]string{"a": "b"}},
		{Dial: "unix//run/x.sock", Weight: 3, Status: endpoint.Critical},
	}})
	if err != nil {
		f.Fatal(err)
	}
	for _, change := range [][2]string{
		{"", ""},
		{`"Weight":3`, `"Weight":-3`},
		{`"Weight":3`, `"Weight":99999999`},
		{`"Status":0`, `"Status":3`},
		{`"Status":0`, `"Status":255`},
		{`"Status":0`, `"Status":256`},
		{"10.0.0.1:80", "{env.HOME}:80"},
		{"10.0.0.1:80", "10.0.0.1:0"},
		{"10.0.0.1:80", "10.0.0.1:80-90"},
		{"unix//run/x.sock", "unix//run/x.sock|0222"},
		{"2001-09-09", "9999-09-09"},
		{`"version":1`, `"version":2`},
		{`"endpoints":[`, `"endpoints":[null,`},
	} {
		f.Add([]byte(strings.Replace(string(whole), change[0], change[1], 1)))
	}
	f.Add([]byte(""))
	f.Add([]byte("null"))
	f.Fuzz(func(t *testing.T, text []byte) {
		value, err := parseStored(text, &query)
		if err != nil {
			return
		}
		if value.Query != query.key() || value.Version != storedVersion || value.Confirmed.After(time.Now()) {
			t.Errorf("stored Set: got %+v, want one of the query, of the past", value)
		}
		checkEndpoints(t, &query, value.Endpoints)
	})
}

// What an instance's meta data says of its weight is a weight or has none.
func FuzzWeight(f *testing.F) {
	for _, text := range []string{"", "0", "1", " 7 ", "-1", "65535", "65536", "1e3", "0x10", "+5", "1_000", "٣", "9223372036854775808", "\x00"} {
		f.Add(text, 7, 3, -1)
	}
	f.Fuzz(func(t *testing.T, text string, fallback, passing, warning int) {
		fallback = min(max(fallback, 0), MaxWeight) // as is checked when it is configured
		body, err := json.Marshal([]map[string]any{{
			"Node":    map[string]any{"Node": "a", "Address": "10.0.0.1"},
			"Service": map[string]any{"Port": 80, "Meta": map[string]string{"share": text}, "Weights": map[string]int{"Passing": passing, "Warning": warning}},
		}})
		if err != nil {
			t.Fatal(err)
		}
		for _, weighting := range []Weighting{{MetaKey: "share", Default: fallback}, {}, {Equal: true}} {
			query := Query{Health: HealthAny, Weighting: weighting}
			got, err := readBytes(&reader{query: &query}, body)
			if err != nil || len(got.endpoints) != 1 {
				t.Fatalf("reading %s: got %+v and error %v, want an instance", body, got, err)
			}
			weight := got.endpoints[0].Weight
			if weight < 0 || weight > MaxWeight {
				t.Errorf("weight %q, by %+v: got %d, want 0 to %d", text, weighting, weight, MaxWeight)
			}
			if number, err := strconv.Atoi(strings.TrimSpace(text)); weighting.MetaKey != "" && err != nil && weight != fallback {
				t.Errorf("weight %q: got %d, want the default %d; it is the number %d", text, weight, fallback, number)
			}
			endpoint.NewSet(new(endpoint.Origin), got.endpoints)
		}
	})
}

// An address of Consul is understood as a URL on one host, or refused, and a
// password in it isn't repeated.
func FuzzAddress(f *testing.F) {
	for _, seed := range []string{
		"", "localhost", "localhost:8500", "http://localhost:8500", "https://[::1]:8501/prefix", "unix:///run/consul.sock", "unix://run", "ftp://x",
		"http://user:hunter2@host", "user:hunter2@host:1", "https://host?token=hunter2", "host:0", "host:65536", "http://host/%zz", "http://{env.X}", "http://h ost",
		"http://host#f", "://", "http://", "http:///x", "//host", "::1", "[::1]", "http://host\r\nX: y", "http://host%00", "HTTP://host",
	} {
		f.Add(seed, "", "")
		f.Add(seed, "https", "/v2")
	}
	f.Fuzz(func(t *testing.T, address, scheme, prefix string) {
		config := &api.Config{Address: address, Scheme: scheme, PathPrefix: prefix}
		base, socket, err := baseURL(config)
		if err != nil {
			if strings.Contains(address, "@") && strings.Contains(err.Error(), "hunter2") {
				t.Errorf("error of %q: got %v, want one without the password", address, err)
			}
			return
		}
		if socket == "" && !strings.HasPrefix(base, "http://") && !strings.HasPrefix(base, "https://") {
			t.Errorf("address %q: got %q, want an HTTP URL", address, base)
		}
		if socket != "" && (!strings.HasPrefix(socket, "/") || base != "http://localhost") {
			t.Errorf("address %q: got %q and the socket %q", address, base, socket)
		}
		if strings.ContainsAny(base, "{} ") && prefix == "" {
			t.Errorf("address %q: got %q, want no placeholder in it", address, base)
		}
	})
}

// A range of addresses holds what it says and nothing else.
func FuzzRanges(f *testing.F) {
	for _, seed := range [][2]string{
		{"10.0.0.0/8", "10.1.2.3:80"},
		{"::1", "[::1]:80"},
		{"169.254.0.0/16", "[::ffff:169.254.169.254]:80"},
		{"fe80::/10", "[fe80::1%eth0]:80"},
		{"0.0.0.0/0", "localhost:80"},
		{"0.0.0.0/0", "unix//run/x.sock"},
		{"0.0.0.0/0", "0.0.0.0:80"},
		{"::ffff:0:0/96", "10.0.0.1:80"},
		{"10.0.0.0/33", "127.1:80"},
		{"127.0.0.0/8", "0x7f.1:80"},
		{"127.0.0.0/8", "2130706433:80"},
	} {
		f.Add(seed[0], seed[1])
	}
	f.Fuzz(func(t *testing.T, text, dial string) {
		prefix, err := ParseRange(text)
		if err != nil {
			return
		}
		again, err := ParseRange(prefix.String())
		if err != nil || again != prefix {
			t.Fatalf("range %q: got %s, which is read as %s with error %v", text, prefix, again, err)
		}
		allowed, denied := Ranges{Allow: inRange(prefix)}, Ranges{Deny: inRange(prefix)}
		if allowed.check(dial) == nil && denied.check(dial) == nil {
			t.Errorf("%q with %s allowed, and with it denied: got yes twice", dial, prefix)
		}
		if both := (Ranges{Allow: inRange(prefix), Deny: inRange(prefix)}); both.check(dial) == nil {
			t.Errorf("%q with %s allowed and denied: got yes, want no", dial, prefix)
		}
		host, _, err := net.SplitHostPort(dial)
		if allowed.check(dial) != nil || checkDial(dial) != nil {
			return
		}
		if ip := net.ParseIP(strings.Split(host, "%")[0]); err != nil || ip == nil || !contains(prefix.String(), ip) {
			t.Errorf("%q is allowed by %s, though it is not in it", dial, prefix)
		}
	})
}

// contains reports whether a range holds an address, by another implementation.
func contains(text string, ip net.IP) bool {
	_, network, err := net.ParseCIDR(text)
	return err == nil && network.Contains(ip)
}

func inRange[T any](prefix T) []T { return []T{prefix} }

// Errors about addresses of any length are short.
func TestErrorsAboutAddressesAreShort(t *testing.T) {
	long := strings.Repeat("{", 1<<20)
	query := Query{Health: HealthAny}
	for _, body := range []string{
		fmt.Sprintf(`[{"Node":{"Node":%q},"Service":{"ID":%q,"Address":%q,"Port":1}}]`, long, long, long),
		fmt.Sprintf(`[{"Node":{"Node":%q},"Service":{"ID":%q,"SocketPath":%q}}]`, long, long, "/"+long),
	} {
		got, err := readBytes(&reader{query: &query}, []byte(body))
		if err != nil || len(got.refused) != 1 {
			t.Fatalf("reading a long instance: got %+v and error %v, want it refused", got, err)
		}
		if length := len(got.refused[0].Error()); length > 1000 {
			t.Errorf("error: got %d bytes, want at most 1000", length)
		}
	}
}
