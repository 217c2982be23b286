package consulupstreams

import (
	"encoding/json"
	"net/url"
	"path"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

// optionSeeds are options of a source and of the global block.
var optionSeeds = []string{
	"", "tag v2 !canary", "tag \"\"", "filter `Service.ID == \"a\"`", "filter `a ==`", "health any", "health good", "weights meta share 5",
	"weights meta share 65536", "weights equal 3", "near _agent", "consistency stale", "startup_timeout 3s", "startup_timeout -3s",
	"startup_timeout 9999999999h", "serve_stale forever", "serve_stale never", "serve_stale 1d", "keep_last_on_empty 1s", "refresh 1s",
	"grace_period 1s", "grace_period 1s\nserve_stale never", "allow a b*", "allow [", "allow_regexp a|b", "allow_regexp )(", "allow_regexp a)|(b",
	"allow_regexp (?m)^a$", "max_services 0", "max_services 99999999999999999999", "allow_cidr 10.0.0.0/8", "deny_cidr 1", "allow_cidr ::1/129",
	"address localhost:8500", "address http://a:b@c", "address {env.HOME}", "address {http.request.host}", "token x", "token {file.missing}",
	"token_file missing", "datacenter dc1", "tls", "tls {\n\tca missing\n\tserver_name x\n\tmin_version tls1.3\n}", "tls {\n\tmin_version ssl3\n}",
	"tls {\n\tinsecure_skip_verify\n}", "tls {", "}", "{", "{}", "tag {\n}", "health any {\n\thealth any\n}", "service b", "service {x}", "unknown",
	"health any\nhealth any", "token a\ntoken_file b", "# nothing", "tag \"a\nb\"", "tag <<END\na\nEND", "wait 1s",
}

// dispense returns what the Caddyfile module reads of a source, as Caddy does.
func dispense(text string) (*caddyfile.Dispenser, error) {
	tokens, err := caddyfile.Tokenize([]byte(text), "Caddyfile")
	return caddyfile.NewDispenser(tokens), err
}

var position = regexp.MustCompile(`, at Caddyfile:\d+$|^Caddyfile:\d+ - Error during parsing: |wrong argument count .* at Caddyfile:\d+$`)

// Whatever stands in the block of a source is understood, or is an error that
// says where. What is understood survives being written as JSON.
func FuzzSource(f *testing.F) {
	for _, service := range []string{"web", "{http.request.host}", "", "a/b", "{env.HOME}"} {
		for _, options := range optionSeeds {
			f.Add(service, options)
		}
	}
	f.Fuzz(func(t *testing.T, service, options string) {
		d, err := dispense("consul " + service + " {\n" + options + "\n}\n")
		if err != nil {
			return
		}
		u := new(Upstreams)
		if err := u.UnmarshalCaddyfile(d); err != nil {
			if !position.MatchString(err.Error()) {
				t.Errorf("consul %q with %q: got error %q, want one that says where", service, options, err)
			}
			return
		}
		text, err := json.Marshal(u)
		if err != nil {
			t.Fatalf("consul %q with %q: can't be written as JSON: %v", service, options, err)
		}
		var again Upstreams
		if err := caddy.StrictUnmarshalJSON(text, &again); err != nil {
			t.Fatalf("reading %s: got error %v, want none", text, err)
		}
		if textAgain, err := json.Marshal(again); err != nil || string(textAgain) != string(text) {
			t.Errorf("config after a round trip: got %s, want %s", textAgain, text)
		}
		again.Service = caddy.NewReplacer().ReplaceKnown(again.Service, "") // as when it is provisioned
		if err := again.check(); err != nil {
			t.Errorf("consul %q with %q: loads with error %v, want it refused with a position", service, options, err)
		}
		_ = again.query()
	})
}

// The same goes for the global block.
func FuzzGlobal(f *testing.F) {
	for _, options := range optionSeeds {
		f.Add(options)
	}
	f.Fuzz(func(t *testing.T, options string) {
		d, err := dispense("consul {\n" + options + "\n}\n")
		if err != nil {
			return
		}
		app := new(App)
		if err := app.UnmarshalCaddyfile(d); err != nil {
			if !position.MatchString(err.Error()) {
				t.Errorf("consul with %q: got error %q, want one that says where", options, err)
			}
			return
		}
		text, err := json.Marshal(app)
		if err != nil {
			t.Fatalf("consul with %q: can't be written as JSON: %v", options, err)
		}
		var again App
		if err := caddy.StrictUnmarshalJSON(text, &again); err != nil || !reflect.DeepEqual(app, &again) && strings.ToValidUTF8(options, "") == options {
			t.Errorf("config after a round trip: got %+v and error %v, want %+v", again, err, app)
		}
	})
}

// A name that requests may ask for is one that the list says, as a whole, and
// one that stays where it is put in the path of a URL.
func FuzzAllowList(f *testing.F) {
	for _, seed := range [][3]string{
		{"web", "", "web"},
		{"web", "", "WEB"},
		{"web-*", "", "web-a"},
		{"*", "", "a/b"},
		{"*", "", ".."},
		{"*", "", "a?token=b"},
		{"*", "", "{env.HOME}"},
		{"*", "", "a%2fb"},
		{"*", "", "\xff"},
		{"*", "", "\u212a"},
		{"?", "", "é"},
		{"[a-c]", "", "b"},
		{"[^a]", "", "/"},
		{"x", "team-[a-z]+", "team-a"},
		{"x", "a)|(b", "bad"},
		{"x", "(?i)A", "a"},
		{"x", "(?m)^a$", "a\nb"},
		{"x", "(?s).*", "a\x00"},
		{"x", "", strings.Repeat("a", 254)},
	} {
		f.Add(seed[0], seed[1], seed[2])
	}
	f.Fuzz(func(t *testing.T, pattern, expression, name string) {
		list, err := newAllowList([]string{pattern}, expression)
		if err != nil || !list.has(name) {
			return
		}
		lower := strings.ToLower(name)
		matches, _ := path.Match(strings.ToLower(pattern), lower)
		matches = matches || strings.ToLower(pattern) == lower
		if !matches && expression != "" {
			whole, err := regexp.Compile(`\A(?:` + expression + `)\z`)
			matches = err == nil && whole.MatchString(lower)
			if _, err := regexp.Compile(expression); err != nil {
				t.Errorf("allow_regexp %q: got a list, want an error: %v", expression, err)
			}
		}
		if !matches {
			t.Errorf("name %q: got allowed by %q and %q, want not", name, pattern, expression)
		}
		request, err := url.Parse("http://consul/v1/health/service/" + url.PathEscape(lower) + "?passing=1")
		if err != nil || path.Clean(request.EscapedPath()) != request.EscapedPath() || path.Base(request.Path) != lower ||
			request.RawQuery != "passing=1" || strings.Count(request.Path, "/") != 4 {
			t.Errorf("name %q: got the URL %v and error %v, want it to be the last part of the path", name, request, err)
		}
	})
}
