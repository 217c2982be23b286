// Package examples_test loads every example, and every config in the README, as
// its users would: adapted if it is a Caddyfile, and provisioned while Consul is
// down.
package examples_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	_ "github.com/caddyserver/caddy/v2/modules/standard"
	"go.yaml.in/yaml/v3"

	_ "github.com/caddy-consul/caddy-consul"
)

func TestExamples(t *testing.T) {
	useTestFiles(t)
	files := filesOf(t, func(path string) bool {
		return filepath.Base(path) == "Caddyfile" || filepath.Ext(path) == ".caddyfile" || filepath.Ext(path) == ".json"
	})
	for _, want := range []string{"minimal.caddyfile", "admin-api.json", "compose/Caddyfile"} {
		if !slices.Contains(files, want) {
			t.Errorf("examples: got %v, want %s among them", files, want)
		}
	}
	for _, file := range files {
		t.Run(file, func(t *testing.T) {
			content := read(t, file)
			if filepath.Ext(file) == ".json" {
				checkLoads(t, []byte(content))
				return
			}
			checkCaddyfile(t, file, content)
			if !strings.HasPrefix(content, "# ") {
				t.Errorf("the example starts with %q, want a comment that says what it is for", strings.SplitN(content, "\n", 2)[0])
			}
		})
	}
}

// The configs in the README are whole: a reader may copy any of them.
func TestReadme(t *testing.T) {
	useTestFiles(t)
	readme := read(t, "../README.md")
	blocks := regexp.MustCompile("(?ms)^```(caddyfile|json)\n(.*?)^```").FindAllStringSubmatch(readme, -1)
	if len(blocks) == 0 {
		t.Fatal("configs in the README: got none, want some")
	}
	for _, block := range blocks {
		language, content := block[1], block[2]
		name, _, _ := strings.Cut(content, "\n")
		t.Run(language+" "+name, func(t *testing.T) {
			if language == "json" {
				checkLoads(t, []byte(content))
			} else {
				checkCaddyfile(t, "README.md", content)
			}
		})
	}
}

// Files that the README links to are there.
func TestReadmeLinks(t *testing.T) {
	for _, link := range regexp.MustCompile(`\]\(([^)#:]+)\)`).FindAllStringSubmatch(read(t, "../README.md"), -1) {
		if _, err := os.Stat(filepath.Join("..", link[1])); err != nil {
			t.Errorf("link in the README: %v", err)
		}
	}
}

// What the README and the Dockerfile build is what go.mod is tested with.
func TestVersions(t *testing.T) {
	version := regexp.MustCompile(`github.com/caddyserver/caddy/v2 (v\S+)`).FindStringSubmatch(read(t, "../go.mod"))
	xcaddy := regexp.MustCompile(`github.com/caddyserver/xcaddy (v\S+)`).FindStringSubmatch(read(t, "../tools/xcaddy/go.mod"))
	if version == nil || xcaddy == nil {
		t.Fatalf("versions in go.mod: got Caddy %v and xcaddy %v, want both", version, xcaddy)
	}
	for _, file := range []string{"../README.md", "compose/Dockerfile"} {
		content := read(t, file)
		for _, want := range []string{"xcaddy build " + version[1], "xcaddy/cmd/xcaddy@" + xcaddy[1]} {
			if !strings.Contains(content, want) {
				t.Errorf("%s: got no %q in it, want it", file, want)
			}
		}
	}
}

func TestCompose(t *testing.T) {
	var compose struct {
		Services map[string]struct {
			Image       string
			Build       struct{ Context, Dockerfile string }
			Volumes     []string
			Environment map[string]string
		}
	}
	decoder := yaml.NewDecoder(strings.NewReader(read(t, "compose/compose.yaml")))
	if err := decoder.Decode(&compose); err != nil {
		t.Fatalf("reading the compose file: %v", err)
	}
	for name, service := range compose.Services {
		if service.Image == "" && service.Build.Context == "" {
			t.Errorf("service %s: got neither an image nor a build, want one", name)
		}
		for _, volume := range service.Volumes {
			source, _, _ := strings.Cut(volume, ":")
			if _, err := os.Stat(filepath.Join("compose", source)); err != nil {
				t.Errorf("volume of service %s: %v", name, err)
			}
		}
		if build := service.Build; build.Context != "" {
			if _, err := os.Stat(filepath.Join("compose", build.Context, build.Dockerfile)); err != nil {
				t.Errorf("Dockerfile of service %s: %v", name, err)
			}
		}
	}
	host, _, _ := strings.Cut(compose.Services["caddy"].Environment["CONSUL_HTTP_ADDR"], ":")
	addresses := []string{host}
	for _, address := range regexp.MustCompile(`(?m)^\s*address\s*= "(.*)"`).FindAllStringSubmatch(read(t, "compose/consul/web.hcl"), -1) {
		addresses = append(addresses, address[1])
	}
	if len(addresses) < 3 {
		t.Errorf("hosts that are named: got %v, want Consul and two instances", addresses)
	}
	for _, host := range addresses {
		if _, ok := compose.Services[host]; !ok {
			t.Errorf("host %q: got no service of that name in the compose file, want one", host)
		}
	}
}

func TestNomad(t *testing.T) {
	job := read(t, "nomad.hcl")
	for _, pair := range []string{"{}", "[]", "()"} {
		opened, closed := strings.Count(job, pair[:1]), strings.Count(job, pair[1:])
		if opened != closed {
			t.Errorf("brackets %s: got %d opened and %d closed, want as many", pair, opened, closed)
		}
	}
	embedded := regexp.MustCompile(`(?ms)<<EOH\n(.*?)^EOH$`).FindStringSubmatch(job)
	if embedded == nil {
		t.Fatal("the job holds no Caddyfile, want one")
	}
	for _, marker := range []string{"{{", "${"} {
		if strings.Contains(embedded[1], marker) {
			t.Errorf("the Caddyfile in the job holds %q, which Nomad would expand", marker)
		}
	}
	checkCaddyfile(t, "nomad.hcl", embedded[1])
}

// checkCaddyfile adapts and loads a Caddyfile, which must be formatted too.
func checkCaddyfile(t *testing.T, name, content string) {
	t.Helper()
	config, warnings, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(content), map[string]any{"filename": name})
	if err != nil {
		t.Fatalf("adapting: got error %v, want none", err)
	}
	if len(warnings) > 0 {
		t.Errorf("adapting: got warnings %v, want none", warnings)
	}
	checkLoads(t, config)
}

// checkLoads loads a config as `caddy validate` does.
func checkLoads(t *testing.T, config []byte) {
	t.Helper()
	if !bytes.Contains(config, []byte(`"consul"`)) {
		t.Errorf("config: got no source or app called consul in it: %s", config)
	}
	var c *caddy.Config
	if err := caddy.StrictUnmarshalJSON(caddy.RemoveMetaFields(config), &c); err != nil {
		t.Fatalf("reading the config: %v", err)
	}
	if err := caddy.Validate(c); err != nil {
		t.Errorf("loading: got error %v, want none", err)
	}
}

// filesOf returns the paths of the files that are wanted, with slashes.
func filesOf(t *testing.T, wanted func(path string) bool) (files []string) {
	t.Helper()
	err := filepath.WalkDir(".", func(path string, entry fs.DirEntry, err error) error {
		if err == nil && !entry.IsDir() && wanted(path) {
			files = append(files, filepath.ToSlash(path))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func read(t *testing.T, file string) string {
	t.Helper()
	content, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

// useTestFiles puts files in the place of those that an example names, and
// keeps the environment of whoever runs the tests, and Caddy's storage there, out
// of them. Nothing listens where Consul is looked for.
func useTestFiles(t *testing.T) {
	t.Helper()
	storage := caddy.DefaultStorage.Path
	caddy.DefaultStorage.Path = t.TempDir()
	t.Cleanup(func() { caddy.DefaultStorage.Path = storage })
	for _, variable := range os.Environ() {
		if name, _, _ := strings.Cut(variable, "="); strings.HasPrefix(name, "CONSUL_") {
			t.Setenv(name, "")
		}
	}
	dir := t.TempDir()
	cert, key := newCertificate(t)
	for variable, content := range map[string]string{
		"CONSUL_CA": cert, "CONSUL_CERT": cert, "CONSUL_KEY": key, "CONSUL_TOKEN_FILE": "a-token\n",
	} {
		path := filepath.Join(dir, variable)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		t.Setenv(variable, path)
	}
	t.Setenv("CONSUL_ADDRESS", "127.0.0.1:1")
	t.Setenv("CONSUL_HTTP_ADDR", "127.0.0.1:1")
}

func newCertificate(t *testing.T) (certPEM, keyPEM string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
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
