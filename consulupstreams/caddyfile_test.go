package consulupstreams_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"flag"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	_ "github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	_ "github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-consul/caddy-consul/consulupstreams"
	_ "github.com/caddy-consul/caddy-consul/selection"
)

var update = flag.Bool("update", false, "write the JSON that the Caddyfiles in testdata/adapt are adapted to")

// divider stands between the Caddyfile and its JSON, as in Caddy's own tests.
const divider = "\n----------\n"

// Each Caddyfile in testdata/adapt is adapted to the JSON below it, which holds
// nothing that the modules would lose, and is a config that loads while Consul
// is down.
func TestAdapt(t *testing.T) {
	files, err := filepath.Glob("testdata/adapt/*.caddyfiletest")
	if err != nil || len(files) == 0 {
		t.Fatalf("Caddyfiles in testdata/adapt: got %d and error %v, want some", len(files), err)
	}
	for i, file := range files {
		if files[i], err = filepath.Abs(file); err != nil {
			t.Fatal(err)
		}
	}
	inFolderWithCredentials(t)
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".caddyfiletest"), func(t *testing.T) {
			content, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			caddyfile, want, _ := strings.Cut(string(content), divider)
			config, err := adapt(t, caddyfile)
			if err != nil {
				t.Fatalf("adapting: got error %v, want none", err)
			}
			got := indent(t, config)
			if *update {
				if err := os.WriteFile(file, []byte(caddyfile+divider+got+"\n"), 0o600); err != nil {
					t.Fatal(err)
				}
			} else if got != strings.TrimSpace(want) {
				t.Errorf("adapted config: got\n%s\nwant\n%s", got, want)
			}
			checkRoundTrip(t, config)
			if err := validate(config); err != nil {
				t.Errorf("loading the adapted config: got error %v, want none", err)
			}
		})
	}
}

// checkRoundTrip reads every part of config that is ours into its module and
// writes it again: nothing may be lost, and nothing be added.
func checkRoundTrip(t *testing.T, config []byte) {
	t.Helper()
	var tree map[string]any
	if err := json.Unmarshal(config, &tree); err != nil {
		t.Fatal(err)
	}
	count := 0
	check := func(part map[string]any, module any) {
		t.Helper()
		count++
		before, err := json.Marshal(part)
		if err != nil {
			t.Fatal(err)
		}
		if err := caddy.StrictUnmarshalJSON(before, module); err != nil {
			t.Errorf("reading %s: got error %v, want none", before, err)
			return
		}
		after, err := json.Marshal(module)
		if err != nil {
			t.Fatal(err)
		}
		var again map[string]any
		if err := json.Unmarshal(after, &again); err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(part, again) {
			t.Errorf("config after a round trip: got %s, want %s", after, before)
		}
	}
	apps, _ := tree["apps"].(map[string]any)
	if app, ok := apps["consul"].(map[string]any); ok {
		check(app, new(consulupstreams.App))
	}
	walk(tree, func(object map[string]any) {
		if object["source"] == "consul" {
			delete(object, "source")
			check(object, new(consulupstreams.Upstreams))
		}
	})
	if count == 0 {
		t.Errorf("adapted config: got no part that is ours in it: %s", config)
	}
}

// Every option of the source and of the global block is in one of the golden
// files.
func TestAdaptCoversEveryOption(t *testing.T) {
	files, err := filepath.Glob("testdata/adapt/*.caddyfiletest")
	if err != nil {
		t.Fatal(err)
	}
	sources, apps := make(map[string]bool), make(map[string]bool)
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		_, config, _ := strings.Cut(string(content), divider)
		var tree map[string]any
		if err := json.Unmarshal([]byte(config), &tree); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		walk(tree, func(object map[string]any) {
			if object["source"] == "consul" {
				collect(sources, "", object)
			}
			if app, ok := object["consul"].(map[string]any); ok {
				collect(apps, "", app)
			}
		})
	}
	for _, tc := range []struct {
		name   string
		module any
		seen   map[string]bool
	}{
		{"the source", consulupstreams.Upstreams{}, sources},
		{"the global block", consulupstreams.App{}, apps},
	} {
		for _, option := range optionsOf(reflect.TypeOf(tc.module), "") {
			if !tc.seen[option] {
				t.Errorf("option %s of %s: got no golden file with it, want one", option, tc.name)
			}
		}
	}
}

// optionsOf returns the names of the JSON fields of a module, with a dot in
// those that are nested.
func optionsOf(module reflect.Type, prefix string) (names []string) {
	for field := range module.Fields() {
		name, _, _ := strings.Cut(field.Tag.Get("json"), ",")
		inner := field.Type
		if inner.Kind() == reflect.Pointer {
			inner = inner.Elem()
		}
		switch {
		case !field.IsExported():
		case field.Anonymous:
			names = append(names, optionsOf(inner, prefix)...)
		case inner.Kind() == reflect.Struct:
			names = append(names, optionsOf(inner, prefix+name+".")...)
		default:
			names = append(names, prefix+name)
		}
	}
	return names
}

func collect(into map[string]bool, prefix string, object map[string]any) {
	for name, value := range object {
		if inner, ok := value.(map[string]any); ok {
			collect(into, prefix+name+".", inner)
		} else {
			into[prefix+name] = true
		}
	}
}

// walk calls visit with every object in a tree of JSON.
func walk(tree any, visit func(map[string]any)) {
	switch node := tree.(type) {
	case map[string]any:
		visit(node)
		for _, child := range node {
			walk(child, visit)
		}
	case []any:
		for _, child := range node {
			walk(child, visit)
		}
	}
}

func adapt(t *testing.T, caddyfile string) ([]byte, error) {
	t.Helper()
	config, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(caddyfile), map[string]any{"filename": "Caddyfile"})
	return config, err
}

// validate loads a config as `caddy validate` does.
func validate(config []byte) error {
	var c *caddy.Config
	if err := caddy.StrictUnmarshalJSON(config, &c); err != nil {
		return err
	}
	return caddy.Validate(c)
}

func indent(t *testing.T, config []byte) string {
	t.Helper()
	var text bytes.Buffer
	if err := json.Indent(&text, config, "", "\t"); err != nil {
		t.Fatal(err)
	}
	return text.String()
}

// byThemselves keeps the environment of whoever runs the tests, and Caddy's
// storage there, out of them.
func byThemselves(t *testing.T) {
	t.Helper()
	storage := caddy.DefaultStorage.Path
	caddy.DefaultStorage.Path = t.TempDir()
	t.Cleanup(func() { caddy.DefaultStorage.Path = storage })
	for _, variable := range os.Environ() {
		if name, _, _ := strings.Cut(variable, "="); strings.HasPrefix(name, "CONSUL_") {
			t.Setenv(name, "")
		}
	}
}

// inFolderWithCredentials makes a folder with credentials the current one.
func inFolderWithCredentials(t *testing.T) {
	t.Helper()
	byThemselves(t)
	t.Chdir(t.TempDir())
	cert, key := newCertificate(t)
	_, otherKey := newCertificate(t)
	for name, content := range map[string]string{
		"ca.pem": cert, "cert.pem": cert, "key.pem": key, "other-key.pem": otherKey,
		"token": "a-token\n", "text.pem": "hello\n",
		"broken.pem": "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
	} {
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func newCertificate(t *testing.T) (certPEM, keyPEM string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true,
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert})),
		string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}))
}

// inSource returns a Caddyfile with lines in the block of a source. The first
// of them is line 4.
func inSource(lines string) string {
	return "http://example.com {\n\treverse_proxy {\n\t\tdynamic consul web {\n" + indented(lines, "\t\t\t") + "\t\t}\n\t}\n}\n"
}

// inGlobal returns a Caddyfile with lines in the global block. The first of
// them is line 3.
func inGlobal(lines string) string {
	return "{\n\tconsul {\n" + indented(lines, "\t\t") + "\t}\n}\n"
}

func indented(lines, by string) string {
	var text strings.Builder
	for line := range strings.Lines(lines) {
		text.WriteString(by + line)
	}
	return text.String() + "\n"
}

// What is wrong in the block of a source is said with the line of the option
// that is wrong, here from line 4 on.
func TestSourceErrors(t *testing.T) {
	checkErrors(t, inSource, "parsing caddyfile tokens for 'reverse_proxy': ", []badInput{
		{"speed 3", "unrecognized option 'speed' of the consul source, at Caddyfile:4"},
		{"service other", "option 'service' is already given on line 3, at Caddyfile:4"},
		{"health any\nhealth any", "option 'health' is already given on line 4, at Caddyfile:5"},
		{"filter `Service.ID == a`\nfilter `Service.ID == b`", "option 'filter' is already given on line 4, at Caddyfile:5"},
		{"weights equal\nweights consul", "option 'weights' is already given on line 4, at Caddyfile:5"},
		{"near a\nnear b", "option 'near' is already given on line 4, at Caddyfile:5"},
		{"consistency stale\nconsistency stale", "option 'consistency' is already given on line 4, at Caddyfile:5"},
		{"startup_timeout 1s\nstartup_timeout 2s", "option 'startup_timeout' is already given on line 4, at Caddyfile:5"},
		{"serve_stale 1s\nserve_stale 1s", "option 'serve_stale' is already given on line 4, at Caddyfile:5"},
		{"keep_last_on_empty 1s\nkeep_last_on_empty 1s", "option 'keep_last_on_empty' is already given on line 4, at Caddyfile:5"},
		{"refresh 1s\nrefresh 1s", "option 'refresh' is already given on line 4, at Caddyfile:5"},
		{"grace_period 1s\ngrace_period 1s", "option 'grace_period' is already given on line 4, at Caddyfile:5"},
		{"allow_regexp a\nallow_regexp b", "option 'allow_regexp' is already given on line 4, at Caddyfile:5"},
		{"max_services 1\nmax_services 2", "option 'max_services' is already given on line 4, at Caddyfile:5"},
		{"address a:1\naddress a:1", "option 'address' is already given on line 4, at Caddyfile:5"},
		{"token a\ntoken a", "option 'token' is already given on line 4, at Caddyfile:5"},
		{"token_file token\ntoken_file token", "option 'token_file' is already given on line 4, at Caddyfile:5"},
		{"datacenter a\ndatacenter b", "option 'datacenter' is already given on line 4, at Caddyfile:5"},
		{"tls\n\ntls {\n}", "option 'tls' is already given on line 4, at Caddyfile:6"},
		{"tls {\n\tca ca.pem\n\tca ca.pem\n}", "option 'ca' is already given on line 5, at Caddyfile:6"},
		{"tls {\n\tcert cert.pem\n\tcert cert.pem\n}", "option 'cert' is already given on line 5, at Caddyfile:6"},
		{"tls {\n\tkey key.pem\n\tkey key.pem\n}", "option 'key' is already given on line 5, at Caddyfile:6"},
		{"tls {\n\tserver_name a\n\tserver_name a\n}", "option 'server_name' is already given on line 5, at Caddyfile:6"},
		{"tls {\n\tinsecure_skip_verify\n\tinsecure_skip_verify\n}", "option 'insecure_skip_verify' is already given on line 5, at Caddyfile:6"},
		{"token a\nhealth any\ntoken_file token", "token_file and token (on line 4) can't be used together: remove one, at Caddyfile:6"},
		{"token_file token\ntoken a", "token and token_file (on line 4) can't be used together: remove one, at Caddyfile:5"},
		{"serve_stale forever\ngrace_period 3s", "grace_period and serve_stale (on line 4) can't be used together: remove one, at Caddyfile:5"},
		{"grace_period 3s\nserve_stale 3s", "serve_stale and grace_period (on line 4) can't be used together: remove one, at Caddyfile:5"},
		{"service", "option 'service' is already given on line 3, at Caddyfile:4"},
		{"tag", "wrong argument count or unexpected line ending after 'tag', at Caddyfile:4"},
		{"filter", "wrong argument count or unexpected line ending after 'filter', at Caddyfile:4"},
		{"health", "wrong argument count or unexpected line ending after 'health', at Caddyfile:4"},
		{"weights", "wrong argument count or unexpected line ending after 'weights', at Caddyfile:4"},
		{"near", "wrong argument count or unexpected line ending after 'near', at Caddyfile:4"},
		{"consistency", "wrong argument count or unexpected line ending after 'consistency', at Caddyfile:4"},
		{"startup_timeout", "wrong argument count or unexpected line ending after 'startup_timeout', at Caddyfile:4"},
		{"serve_stale", "wrong argument count or unexpected line ending after 'serve_stale', at Caddyfile:4"},
		{"keep_last_on_empty", "wrong argument count or unexpected line ending after 'keep_last_on_empty', at Caddyfile:4"},
		{"refresh", "wrong argument count or unexpected line ending after 'refresh', at Caddyfile:4"},
		{"grace_period", "wrong argument count or unexpected line ending after 'grace_period', at Caddyfile:4"},
		{"allow", "wrong argument count or unexpected line ending after 'allow', at Caddyfile:4"},
		{"allow_regexp", "wrong argument count or unexpected line ending after 'allow_regexp', at Caddyfile:4"},
		{"max_services", "wrong argument count or unexpected line ending after 'max_services', at Caddyfile:4"},
		{"address", "wrong argument count or unexpected line ending after 'address', at Caddyfile:4"},
		{"token", "wrong argument count or unexpected line ending after 'token', at Caddyfile:4"},
		{"token_file", "wrong argument count or unexpected line ending after 'token_file', at Caddyfile:4"},
		{"datacenter", "wrong argument count or unexpected line ending after 'datacenter', at Caddyfile:4"},
		{"tls {\n\tca\n}", "wrong argument count or unexpected line ending after 'ca', at Caddyfile:5"},
		{"tls {\n\tcert\n}", "wrong argument count or unexpected line ending after 'cert', at Caddyfile:5"},
		{"tls {\n\tkey\n}", "wrong argument count or unexpected line ending after 'key', at Caddyfile:5"},
		{"tls {\n\tserver_name\n}", "wrong argument count or unexpected line ending after 'server_name', at Caddyfile:5"},
		{"filter a == 1", "wrong argument count or unexpected line ending after '==', at Caddyfile:4"},
		{"health any passing", "wrong argument count or unexpected line ending after 'passing', at Caddyfile:4"},
		{"weights consul 5", "wrong argument count or unexpected line ending after '5', at Caddyfile:4"},
		{"weights equal 5", "wrong argument count or unexpected line ending after '5', at Caddyfile:4"},
		{"weights meta share 5 6", "wrong argument count or unexpected line ending after '6', at Caddyfile:4"},
		{"near a b", "wrong argument count or unexpected line ending after 'b', at Caddyfile:4"},
		{"consistency stale default", "wrong argument count or unexpected line ending after 'default', at Caddyfile:4"},
		{"startup_timeout 1s 2s", "wrong argument count or unexpected line ending after '2s', at Caddyfile:4"},
		{"serve_stale 1s 2s", "wrong argument count or unexpected line ending after '2s', at Caddyfile:4"},
		{"keep_last_on_empty 1s 2s", "wrong argument count or unexpected line ending after '2s', at Caddyfile:4"},
		{"refresh 1s 2s", "wrong argument count or unexpected line ending after '2s', at Caddyfile:4"},
		{"grace_period 1s 2s", "wrong argument count or unexpected line ending after '2s', at Caddyfile:4"},
		{"allow_regexp a b", "wrong argument count or unexpected line ending after 'b', at Caddyfile:4"},
		{"max_services 1 2", "wrong argument count or unexpected line ending after '2', at Caddyfile:4"},
		{"address a:1 b:1", "wrong argument count or unexpected line ending after 'b:1', at Caddyfile:4"},
		{"token a b", "wrong argument count or unexpected line ending after 'b', at Caddyfile:4"},
		{"token_file token token", "wrong argument count or unexpected line ending after 'token', at Caddyfile:4"},
		{"datacenter a b", "wrong argument count or unexpected line ending after 'b', at Caddyfile:4"},
		{"tls on", "wrong argument count or unexpected line ending after 'on', at Caddyfile:4"},
		{"tls {\n\tca ca.pem ca.pem\n}", "wrong argument count or unexpected line ending after 'ca.pem', at Caddyfile:5"},
		{"tls {\n\tcert cert.pem cert.pem\n}", "wrong argument count or unexpected line ending after 'cert.pem', at Caddyfile:5"},
		{"tls {\n\tkey key.pem key.pem\n}", "wrong argument count or unexpected line ending after 'key.pem', at Caddyfile:5"},
		{"tls {\n\tserver_name a b\n}", "wrong argument count or unexpected line ending after 'b', at Caddyfile:5"},
		{"tls {\n\tinsecure_skip_verify yes\n}", "wrong argument count or unexpected line ending after 'yes', at Caddyfile:5"},
		{"health any {\n}", "the option takes no block, at Caddyfile:4"},
		{"tag a {\n}", "the option takes no block, at Caddyfile:4"},
		{"tls {\n\tserver_name a {\n\t}\n}", "the option takes no block, at Caddyfile:5"},
		{`tag ""`, "a tag is empty, at Caddyfile:4"},
		{"tag v2 !", "a tag is empty, at Caddyfile:4"},
		{`health ""`, "option 'health' is empty, at Caddyfile:4"},
		{`address ""`, "option 'address' is empty, at Caddyfile:4"},
		{`token ""`, "option 'token' is empty, at Caddyfile:4"},
		{`weights meta ""`, "weights meta needs the key of the meta data that holds the weight, at Caddyfile:4"},
		{"filter `Service.Meta.version ==`", "filter \"Service.Meta.version ==\" is not one that Consul understands: Failed to create boolean expression evaluator: 1:24 (23): no match found, expected: \"-\", \"0\", \"\\\"\", \"`\", [ \\t\\r\\n], [1-9] or [a-zA-Z], at Caddyfile:4"},
		{"filter `Service.Colour == \"red\"`", `filter "Service.Colour == \"red\"" is not one that Consul understands: Failed to create boolean expression evaluator: Selector "Service.Colour" is not valid, at Caddyfile:4`},
		{"health good", "health 'good' is not known: want passing, warning or any, at Caddyfile:4"},
		{"consistency strong", "consistency 'strong' is not known: want default, stale or consistent, at Caddyfile:4"},
		{"weights heavy", "weights 'heavy' are not known: want consul, meta <key> or equal, at Caddyfile:4"},
		{"weights meta", "weights meta needs the key of the meta data that holds the weight, at Caddyfile:4"},
		{"weights meta share 65536", "weights: default '65536': want a number from 0 to 65535, at Caddyfile:4"},
		{"weights meta share -1", "weights: default '-1': want a number from 0 to 65535, at Caddyfile:4"},
		{"weights meta share many", "weights: default 'many': want a number from 0 to 65535, at Caddyfile:4"},
		{"startup_timeout 3", "startup_timeout '3': want a positive duration such as 3s, at Caddyfile:4"},
		{"startup_timeout 0s", "startup_timeout '0s': want a positive duration such as 3s, at Caddyfile:4"},
		{"startup_timeout -3s", "startup_timeout '-3s': want a positive duration such as 3s, at Caddyfile:4"},
		{"wait 20m", "wait '20m0s': want 1s to 10m, at Caddyfile:4"},
		{"wait 10ms", "wait '10ms': want 1s to 10m, at Caddyfile:4"},
		{"wait 1m\nwait 2m", "option 'wait' is already given on line 4, at Caddyfile:5"},
		{"serve_stale tomorrow", "serve_stale 'tomorrow': want forever, never or a positive duration such as 24h, at Caddyfile:4"},
		{"serve_stale 0", "serve_stale '0': want forever, never or a positive duration such as 24h, at Caddyfile:4"},
		{"serve_stale -1h", "serve_stale '-1h': want forever, never or a positive duration such as 24h, at Caddyfile:4"},
		{"keep_last_on_empty always", "keep_last_on_empty 'always': want a positive duration such as 3s, at Caddyfile:4"},
		{"refresh often", "refresh 'often': want a positive duration such as 3s, at Caddyfile:4"},
		{"max_services 0", "max_services '0': want a number of at least 1, at Caddyfile:4"},
		{"max_services many", "max_services 'many': want a number of at least 1, at Caddyfile:4"},
		{"allow [a", `allow "[a": want the name of a service or a pattern with * and ?, at Caddyfile:4`},
		{"allow_regexp (", "allow_regexp \"(\": error parsing regexp: missing closing ): `^(?:()$`, at Caddyfile:4"},
		{"allow web", `allow, allow_regexp and max_services need placeholders in the name of the service; "web" has none, at Caddyfile:4`},
		{"allow_regexp web", `allow, allow_regexp and max_services need placeholders in the name of the service; "web" has none, at Caddyfile:4`},
		{"max_services 3", `allow, allow_regexp and max_services need placeholders in the name of the service; "web" has none, at Caddyfile:4`},
		{"address ftp://consul:8500", `address "ftp://consul:8500" of Consul: scheme "ftp" is not known: want http, https or unix, at Caddyfile:4`},
		{"address unix://consul.sock", `address "unix://consul.sock" of Consul: want unix:// and an absolute path, at Caddyfile:4`},
		{"address `consul 1:8500`", `address "consul 1:8500" of Consul: want host:port, http://host:port, https://host:port or unix:///path, at Caddyfile:4`},
		{"address {http.request.host}:8500", "address: unrecognized placeholder {http.request.host}, at Caddyfile:4"},
		{"address {env.CONSUL_UNSET}", "address: '{env.CONSUL_UNSET}' is empty, at Caddyfile:4"},
		{"address http://", `address "http://" of Consul: want host:port, http://host:port, https://host:port or unix:///path, at Caddyfile:4`},
		{"address user@consul:8500", "the address of Consul has a user or password; CONSUL_HTTP_AUTH is the place for them, at Caddyfile:4"},
		{"address consul:port", `address "consul:port" of Consul: want host:port, http://host:port, https://host:port or unix:///path, at Caddyfile:4`},
		{"address consul:85000", `address "consul:85000" of Consul: want host:port, http://host:port, https://host:port or unix:///path, at Caddyfile:4`},
		{"address :8500", `address ":8500" of Consul: want host:port, http://host:port, https://host:port or unix:///path, at Caddyfile:4`},
		{"token {http.request.host}", "token: unrecognized placeholder {http.request.host}, at Caddyfile:4"},
		{"token_file {http.request.host}", "token_file: unrecognized placeholder {http.request.host}, at Caddyfile:4"},
		{"token_file {env.CONSUL_UNSET}", "token_file: '{env.CONSUL_UNSET}' is empty, at Caddyfile:4"},
		{"token_file missing", "token_file: can't read the file: open missing: no such file or directory, at Caddyfile:4"},
		{"datacenter {http.request.host}", "datacenter: unrecognized placeholder {http.request.host}, at Caddyfile:4"},
		{"tls {\n\tverify no\n}", "unrecognized option 'verify' of tls: want ca, cert, key, server_name, min_version or insecure_skip_verify, at Caddyfile:5"},
		{"tls {\n\tca missing.pem\n\tserver_name a\n}", "tls: ca: can't read the file: open missing.pem: no such file or directory, at Caddyfile:5"},
		{"tls {\n\tcert missing.pem\n\tkey key.pem\n}", "tls: cert: can't read the file: open missing.pem: no such file or directory, at Caddyfile:5"},
		{"tls {\n\tcert cert.pem\n\tkey missing.pem\n\tserver_name a\n}", "tls: key: can't read the file: open missing.pem: no such file or directory, at Caddyfile:6"},
		{"tls {\n\tca text.pem\n\tserver_name a\n}", "tls: ca: Error loading CA File: Couldn't parse PEM in: text.pem, at Caddyfile:5"},
		{"tls {\n\tca broken.pem\n\tserver_name a\n}", "tls: ca: Error loading CA File: Couldn't parse PEM in: broken.pem, at Caddyfile:5"},
		{"tls {\n\tca ca.pem\n\tcert cert.pem\n\tserver_name a\n}", "tls: cert: needs key as well, at Caddyfile:6"},
		{"tls {\n\tca ca.pem\n\tkey key.pem\n\tserver_name a\n}", "tls: key: needs cert as well, at Caddyfile:6"},
		{"tls {\n\tcert text.pem\n\tkey key.pem\n}", "tls: cert: tls: failed to find any PEM data in certificate input, at Caddyfile:5"},
		{"tls {\n\tcert broken.pem\n\tkey key.pem\n}", "tls: cert: x509: malformed certificate, at Caddyfile:5"},
		{"tls {\n\tcert cert.pem\n\tkey text.pem\n\tca ca.pem\n}", "tls: key: tls: failed to find any PEM data in key input, at Caddyfile:6"},
		{"tls {\n\tkey other-key.pem\n\tcert cert.pem\n}", "tls: key: tls: private key does not match public key, at Caddyfile:5"},
		{"tls {\n\tserver_name {http.request.host}\n}", "tls: server_name: unrecognized placeholder {http.request.host}, at Caddyfile:5"},
	})
}

// The same goes for the global block, here from line 3 on.
func TestGlobalErrors(t *testing.T) {
	checkErrors(t, inGlobal, "parsing caddyfile tokens for 'consul': ", []badInput{
		{"service web", "unrecognized consul option 'service': want address, token, token_file, datacenter or tls, at Caddyfile:3"},
		{"address a:1\naddress a:1", "option 'address' is already given on line 3, at Caddyfile:4"},
		{"token a\ntoken a", "option 'token' is already given on line 3, at Caddyfile:4"},
		{"token_file token\ntoken_file token", "option 'token_file' is already given on line 3, at Caddyfile:4"},
		{"datacenter a\ndatacenter b", "option 'datacenter' is already given on line 3, at Caddyfile:4"},
		{"tls\ntls", "option 'tls' is already given on line 3, at Caddyfile:4"},
		{"token a\ntoken_file token", "token_file and token (on line 3) can't be used together: remove one, at Caddyfile:4"},
		{"token_file token\ntoken a", "token and token_file (on line 3) can't be used together: remove one, at Caddyfile:4"},
		{"address", "wrong argument count or unexpected line ending after 'address', at Caddyfile:3"},
		{"address a:1 b:1", "wrong argument count or unexpected line ending after 'b:1', at Caddyfile:3"},
		{"token", "wrong argument count or unexpected line ending after 'token', at Caddyfile:3"},
		{"token a b", "wrong argument count or unexpected line ending after 'b', at Caddyfile:3"},
		{"token_file", "wrong argument count or unexpected line ending after 'token_file', at Caddyfile:3"},
		{"token_file token token", "wrong argument count or unexpected line ending after 'token', at Caddyfile:3"},
		{"datacenter", "wrong argument count or unexpected line ending after 'datacenter', at Caddyfile:3"},
		{"datacenter a b", "wrong argument count or unexpected line ending after 'b', at Caddyfile:3"},
		{"tls on", "wrong argument count or unexpected line ending after 'on', at Caddyfile:3"},
		{"datacenter a {\n}", "the option takes no block, at Caddyfile:3"},
		{"address ftp://consul:8500", `address "ftp://consul:8500" of Consul: scheme "ftp" is not known: want http, https or unix, at Caddyfile:3`},
		{"token_file missing", "token_file: can't read the file: open missing: no such file or directory, at Caddyfile:3"},
		{"datacenter {http.request.host}", "datacenter: unrecognized placeholder {http.request.host}, at Caddyfile:3"},
		{"tls {\n\tca text.pem\n}", "tls: ca: Error loading CA File: Couldn't parse PEM in: text.pem, at Caddyfile:4"},
		{"tls {\n\tca ca.pem\n\tcert cert.pem\n\tserver_name a\n}", "tls: cert: needs key as well, at Caddyfile:5"},
	})
}

func TestCaddyfileErrors(t *testing.T) {
	asItIs := func(caddyfile string) string { return caddyfile }
	checkErrors(t, asItIs, "parsing caddyfile tokens for ", []badInput{
		{"http://example.com {\n\treverse_proxy {\n\t\tdynamic consul\n\t}\n}\n", "'reverse_proxy': the name of a service is missing: write dynamic consul <service>, at Caddyfile:3"},
		{"http://example.com {\n\treverse_proxy {\n\t\tdynamic consul {\n\t\t\ttag v2\n\t\t}\n\t}\n}\n", "'reverse_proxy': the name of a service is missing: write dynamic consul <service>, at Caddyfile:3"},
		{"http://example.com {\n\treverse_proxy {\n\t\tdynamic consul web other\n\t}\n}\n", "'reverse_proxy': wrong argument count or unexpected line ending after 'other', at Caddyfile:3"},
		{"http://example.com {\n\treverse_proxy {\n\t\tdynamic consul {\n\t\t\tservice web\n\t\t\tservice web\n\t\t}\n\t}\n}\n", "'reverse_proxy': option 'service' is already given on line 4, at Caddyfile:5"},
		{"http://example.com {\n\treverse_proxy {\n\t\tdynamic consul \"\"\n\t}\n}\n", `'reverse_proxy': service name "": want 1 to 253 characters without spaces, slashes and other special characters, at Caddyfile:3`},
		{"http://example.com {\n\treverse_proxy {\n\t\tdynamic consul web/v2\n\t}\n}\n", `'reverse_proxy': service name "web/v2": want 1 to 253 characters without spaces, slashes and other special characters, at Caddyfile:3`},
		{"http://example.com {\n\treverse_proxy {\n\t\tdynamic consul {labels.2}\n\t}\n}\n", `'reverse_proxy': service "{http.request.host.labels.2}" has placeholders, so allow or allow_regexp must say which names it may expand to, at Caddyfile:3`},
		{"http://example.com {\n\treverse_proxy {\n\t\tdynamic multi {\n\t\t\tconsul web {\n\t\t\t\thealth good\n\t\t\t}\n\t\t}\n\t}\n}\n", "'reverse_proxy': health 'good' is not known: want passing, warning or any, at Caddyfile:5"},
		{"{\n\tconsul {\n\t}\n\tconsul {\n\t}\n}\n", "'consul': the global option consul is already given, at Caddyfile:4"},
		{"{\n\tconsul agent\n}\n", "'consul': wrong argument count or unexpected line ending after 'agent', at Caddyfile:2"},
	})
}

type badInput struct{ lines, want string }

// checkErrors adapts Caddyfiles and compares the whole text of the errors,
// which all start with prefix.
func checkErrors(t *testing.T, wrap func(lines string) string, prefix string, cases []badInput) {
	t.Helper()
	inFolderWithCredentials(t)
	for _, tc := range cases {
		t.Run(tc.lines, func(t *testing.T) {
			_, err := adapt(t, wrap(tc.lines))
			if err == nil {
				t.Fatalf("adapting: got no error, want %q", tc.want)
			}
			if got := strings.TrimPrefix(err.Error(), prefix); got != tc.want {
				t.Errorf("error:\n got %s\nwant %s", got, tc.want)
			}
		})
	}
}

// What is wrong in a config of JSON is said when it is loaded, with the name of
// the option.
func TestJSONErrors(t *testing.T) {
	inFolderWithCredentials(t)
	for _, tc := range []struct{ name, source, app, want string }{
		{"unknown option", `"service": "web", "speed": 3`, ``, `unknown field "speed"`},
		{"no service", `"tag": ["v2"]`, ``, "the name of a service is missing"},
		{"service name", `"service": "web/v2"`, ``, `service name "web/v2"`},
		{"placeholders without a wall", `"service": "{http.request.host}"`, ``, "allow or allow_regexp must say which names"},
		{"needless allow", `"service": "web", "allow": ["web"]`, ``, "allow, allow_regexp and max_services need placeholders"},
		{"allow", `"service": "{http.request.host}", "allow": ["[a"]`, ``, `allow "[a"`},
		{"allow_regexp", `"service": "{http.request.host}", "allow_regexp": "("`, ``, `allow_regexp "("`},
		{"max_services", `"service": "{http.request.host}", "allow": ["web"], "max_services": -1`, ``, "max_services -1"},
		{"tag", `"service": "web", "tag": ["v2", "!"]`, ``, "a tag is empty"},
		{"filter that can't be parsed", `"service": "web", "filter": "Service.ID =="`, ``, `filter "Service.ID =="`},
		{"filter on a field that isn't there", `"service": "web", "filter": "Colour == red"`, ``, `filter "Colour == red"`},
		{"health", `"service": "web", "health": "good"`, ``, "health 'good'"},
		{"weights", `"service": "web", "weights": {"from": "heavy"}`, ``, "weights 'heavy'"},
		{"weights without a key", `"service": "web", "weights": {"from": "meta"}`, ``, "weights meta needs the key"},
		{"needless key of weights", `"service": "web", "weights": {"key": "share"}`, ``, "weights: a key or a default goes with meta only"},
		{"weight too large", `"service": "web", "weights": {"from": "meta", "key": "share", "default": 65536}`, ``, "weights: the default 65536"},
		{"weight below 0", `"service": "web", "weights": {"from": "meta", "key": "share", "default": -1}`, ``, "weights: the default -1"},
		{"weight of text", `"service": "web", "weights": {"from": "meta", "key": "share", "default": "many"}`, ``, "weights.default"},
		{"consistency", `"service": "web", "consistency": "strong"`, ``, "consistency 'strong'"},
		{"duration below 0", `"service": "web", "startup_timeout": "-3s"`, ``, "startup_timeout must not be negative"},
		{"another duration below 0", `"service": "web", "keep_last_on_empty": "-3s"`, ``, "keep_last_on_empty must not be negative"},
		{"duration", `"service": "web", "startup_timeout": "soon"`, ``, `"soon"`}, // in Caddy's words, without the option
		{"both names of serve_stale", `"service": "web", "serve_stale": "3s", "grace_period": "3s"`, ``, "grace_period is another name of serve_stale"},
		{"address", `"service": "web", "address": "ftp://consul:8500"`, ``, `address "ftp://consul:8500"`},
		{"address with a placeholder of requests", `"service": "web", "address": "{http.request.host}"`, ``, "address: unrecognized placeholder"},
		{"both tokens", `"service": "web", "token": "a", "token_file": "token"`, ``, "token and token_file can't be used together"},
		{"token_file", `"service": "web", "token_file": "missing"`, ``, "token_file: can't read the file: open missing"},
		{"datacenter", `"service": "web", "datacenter": "{http.request.host}"`, ``, "datacenter: unrecognized placeholder"},
		{"ca that isn't there", `"service": "web", "tls": {"ca": "missing.pem"}`, ``, "tls: ca: can't read the file: open missing.pem"},
		{"ca that is none", `"service": "web", "tls": {"ca": "text.pem"}`, ``, "tls: ca: Error loading CA File"},
		{"cert without key", `"service": "web", "tls": {"cert": "cert.pem"}`, ``, "tls: cert: needs key as well"},
		{"key without cert", `"service": "web", "tls": {"key": "key.pem"}`, ``, "tls: key: needs cert as well"},
		{"cert that is none", `"service": "web", "tls": {"cert": "text.pem", "key": "key.pem"}`, ``, "tls: cert: tls: failed to find any PEM data"},
		{"key of another cert", `"service": "web", "tls": {"cert": "cert.pem", "key": "other-key.pem"}`, ``, "tls: key: tls: private key does not match"},
		{"unknown global option", `"service": "web"`, `"service": "web"`, `unknown field "service"`},
		{"global address", `"service": "web"`, `"address": "consul:port"`, `address "consul:port"`},
		{"both global tokens", `"service": "web"`, `"token": "a", "token_file": "token"`, "token and token_file can't be used together"},
		{"global token_file", `"service": "web"`, `"token_file": "missing"`, "token_file: can't read the file: open missing"},
		{"global ca", `"service": "web"`, `"tls": {"ca": "missing.pem"}`, "tls: ca: can't read the file: open missing.pem"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := validate([]byte(jsonConfig(tc.source, tc.app)))
			if err == nil {
				t.Fatalf("loading: got no error, want %q in one", tc.want)
			}
			if !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error: got %s, want %q in it", err, tc.want)
			}
		})
	}
}

// A source says itself who it is, or is who the global block says, or else who
// the environment says. It never mixes them: a token of its own replaces a
// token_file from elsewhere, whatever is wrong with that.
func TestCredentialsInherit(t *testing.T) {
	for _, tc := range []struct{ name, environment, global, source, want string }{
		{"environment", "missing-file", "", `token own`, "own"},
		{"environment, global", "missing-file", `token everybody`, "", "everybody"},
		{"global token", "", `token everybody`, "", "everybody"},
		{"global token_file", "", `token_file token`, "", "a-token"},
		{"own token, global token_file", "", `token_file token`, `token own`, "own"},
		{"own token_file, global token", "", `token everybody`, `token_file token`, "a-token"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			inFolderWithCredentials(t)
			t.Setenv("CONSUL_HTTP_TOKEN_FILE", tc.environment)
			got := make(chan string, 100)
			consul := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				got <- r.Header.Get("X-Consul-Token")
				http.Error(w, "no leader", http.StatusInternalServerError)
			}))
			defer consul.Close()
			config, err := adapt(t, "{\n\tadmin off\n\tpersist_config off\n\tconsul {\n\t\taddress "+consul.URL+"\n\t\t"+tc.global+"\n\t}\n}\n\n"+
				"http://127.0.0.1:0 {\n\treverse_proxy {\n\t\tdynamic consul web {\n\t\t\t"+tc.source+"\n\t\t}\n\t}\n}\n")
			if err != nil {
				t.Fatalf("adapting: got error %v, want none", err)
			}
			if err := caddy.Load(config, true); err != nil {
				t.Fatalf("loading: got error %v, want none", err)
			}
			defer caddy.Stop()
			select {
			case token := <-got:
				if token != tc.want {
					t.Errorf("token sent to Consul: got %q, want %q", token, tc.want)
				}
			case <-time.After(10 * time.Second):
				t.Error("query to Consul: got none within 10 seconds, want one")
			}
		})
	}
}

// jsonConfig returns a config with a source, and the app if any.
func jsonConfig(source, app string) string {
	if app != "" {
		app = `, "consul": {` + app + `}`
	}
	return `{"apps": {"http": {"servers": {"s": {"listen": ["127.0.0.1:0"], "routes": [{"handle": [` +
		`{"handler": "reverse_proxy", "dynamic_upstreams": {"source": "consul", ` + source + `}}]}]}}}` + app + `}}`
}
