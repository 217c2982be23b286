package caddytest_test

import (
	"encoding/base64"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-consul/caddy-consul/caddytest"
)

// Secrets that are given to Caddy in each of the ways that there are.
const (
	secretLiteral  = "canary-literal-00000000-1111"
	secretEnv      = "canary-env-00000000-2222"
	secretFile     = "canary-file-00000000-3333"
	secretReplaced = "canary-replaced-00000000-4444"
	secretPassword = "canary-password-00000000-5555"
)

// canaries are the secrets, in the forms in which they might be seen.
func canaries() []string {
	canaries := []string{
		secretLiteral, secretEnv, secretFile, secretReplaced, secretPassword, caddytest.ManagementToken,
		base64.StdEncoding.EncodeToString([]byte("user:" + secretPassword)),
	}
	for _, canary := range canaries[:6] {
		canaries = append(canaries, base64.StdEncoding.EncodeToString([]byte(canary)), url.QueryEscape(canary))
	}
	return canaries
}

// places are texts in which no canary may be.
type places struct {
	t     *testing.T
	count int
}

// search fails the test if a canary is in text, but for those that are excused.
func (p *places) search(where, text string, excused ...string) {
	p.t.Helper()
	p.count++
	for _, canary := range canaries() {
		at := strings.Index(text, canary)
		if at < 0 || slices.Contains(excused, canary) {
			continue
		}
		p.t.Errorf("%s: got the secret %q in it: …%s…, which begins %s", where, canary, text[max(0, at-400):min(len(text), at+100)], text[:min(len(text), 100)])
	}
}

// echoes returns the addresses of servers that repeat what they are sent, each
// in another part of what they answer.
func echoes(t *testing.T) map[string]string {
	t.Helper()
	everything := func(r *http.Request) string {
		var text strings.Builder
		_ = r.Header.Write(&text)
		return r.URL.String() + "\n" + text.String()
	}
	addresses := make(map[string]string)
	for name, handler := range map[string]http.HandlerFunc{
		"403 with the request as text": func(w http.ResponseWriter, r *http.Request) {
			http.Error(w, everything(r), http.StatusForbidden)
		},
		"500 with the request as text": func(w http.ResponseWriter, r *http.Request) {
			http.Error(w, everything(r), http.StatusInternalServerError)
		},
		"200 with the request as text": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("X-Consul-Index", "1")
			_, _ = io.WriteString(w, everything(r))
		},
		"200 with the request as JSON": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("X-Consul-Index", "1")
			fmt.Fprintf(w, "[{%q: 1}]", everything(r))
		},
		"the token for an index": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("X-Consul-Index", r.Header.Get("X-Consul-Token")+r.Header.Get("Authorization"))
		},
		"a redirect with the token": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://127.0.0.1:1/"+r.Header.Get("X-Consul-Token"), http.StatusFound)
		},
	} {
		server := httptest.NewUnstartedServer(handler)
		server.Config.ErrorLog = log.New(io.Discard, "", 0)
		server.Start()
		t.Cleanup(server.Close)
		addresses[name] = server.Listener.Addr().String()
	}
	for name, prefix := range map[string]string{
		"the request as it is":      "",
		"the request as headers":    "HTTP/1.1 200 OK\r\n: ",
		"the request as a header":   "HTTP/1.1 200 OK\r\nX-Consul-Index 1 ",
		"the request as the status": "HTTP/1.1 ",
	} {
		addresses[name] = echoSocket(t, prefix)
	}
	return addresses
}

// echoSocket serves a prefix and then the headers of the request, each as it
// came, on its own line.
func echoSocket(t *testing.T, prefix string) string {
	t.Helper()
	listener, err := net.Listen("tcp", caddytest.FreeAddress(t))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			request := make([]byte, 4096)
			n, _ := conn.Read(request)
			if prefix != "" {
				_, rest, _ := strings.Cut(string(request[:n]), "X-Consul-Token: ")
				_, _ = io.WriteString(conn, prefix+strings.NewReplacer("\r\n", " ").Replace(rest)+"\r\n\r\n")
			} else {
				_, _ = conn.Write(request[:n])
			}
			conn.Close()
		}
	}()
	t.Cleanup(func() {
		listener.Close()
		<-done
	})
	return listener.Addr().String()
}

// No secret is ever seen outside of the requests to Consul: not in the log, debug
// lines included, nor in an error, the admin endpoints, metrics, the storage, or
// what clients get. Only Caddy's own config shows a token that was written into
// it, as does a line that Caddy writes of it at debug level.
func TestSecretsStaySecret(t *testing.T) {
	caddytest.NoLeaks(t)
	agent := caddytest.StartAgent(t, caddytest.WithACLs())
	startInstances(t, agent, "web", "a")
	file := filepath.Join(t.TempDir(), "token")
	writeSecret(t, file, secretFile)
	replaced := filepath.Join(t.TempDir(), "replaced")
	writeSecret(t, replaced, secretReplaced)
	t.Setenv("CADDY_TEST_TOKEN", secretEnv)
	t.Setenv("CONSUL_HTTP_AUTH", "user:"+secretPassword)

	f := startFront(t)
	storage := caddy.DefaultStorage.Path
	inPlaces := &places{t: t}

	tokens := map[string]string{
		"token " + secretLiteral:              secretLiteral,
		"token {env.CADDY_TEST_TOKEN}":        "",
		"token {file." + replaced + "}":       "",
		"token_file " + file:                  "",
		"token " + caddytest.ManagementToken:  caddytest.ManagementToken, // one that works
		"token_file " + managementFile(t):     "",
		"token {env.CADDY_TEST_TOKEN_UNSET}X": "",
	}
	addresses := echoes(t)
	addresses["a real agent"] = agent.Address()
	addresses["HTTPS to an agent without it"] = "https://" + agent.Address()
	addresses["nobody"] = caddytest.FreeAddress(t)
	for where, address := range addresses {
		for token, shown := range tokens {
			source := "dynamic consul web {\naddress " + address + "\n" + token + "\nstartup_timeout 10ms\n}"
			text := "{\ndebug\nmetrics\n}\n" + f.site("", reverseProxy(source))
			config, err := f.Adapt(text)
			if err != nil {
				t.Fatalf("%s, %s: %v", where, token, err)
			}
			inPlaces.search("the adapted config", config, shown)
			logs := f.Logs().FromNow()
			f.LoadJSON(config)
			logs.Wait(t, "following the service|Consul gives no usable answer")
			header := f.ask("web").header
			inPlaces.search("the answer to a client", fmt.Sprint(header))
			inPlaces.search("/consul/services", f.Get("/consul/services"))
			inPlaces.search("/metrics", f.Get("/metrics"))
			inPlaces.search("/config/", f.Get("/config/"), shown)
		}
	}
	f.serve(reverseProxy(consulSource("web", agent, "token_file "+managementFile(t))))
	stored := filepath.Join(storage, "consul", "services", "*")
	caddytest.Eventually(t, caddytest.Patience, func() error {
		if names, _ := filepath.Glob(stored); len(names) == 0 {
			return fmt.Errorf("stored Sets: got none to search in %s, want one", stored)
		}
		return nil
	})
	f.LoadJSON("{}")

	// Mistakes, of which the error must not repeat a secret.
	for _, options := range []string{
		"address http://user:" + secretPassword + "@127.0.0.1:8500",
		"token " + secretLiteral + "\ntoken_file " + file,
		"token_file " + file + "\ntoken " + secretLiteral,
		"token " + secretLiteral + "\ntoken " + secretLiteral,
		"token_file " + write(t, filepath.Join(t.TempDir(), "json"), []byte(`{"SecretID": "`+secretFile+`", "x": 1}`)),
		"tls {\nca " + file + "\n}",
		"tls {\ncert " + file + "\nkey " + file + "\n}",
		"token " + secretLiteral + "\nunknown",
		"token {file." + replaced + "} {\n}",
	} {
		err := f.TryLoad(f.site("", reverseProxy("dynamic consul web {\n"+options+"\n}")))
		if err == nil {
			t.Errorf("%s: got no error, want one", options)
			continue
		}
		inPlaces.search("the error of "+options, err.Error())
	}

	for _, line := range f.Logs().Lines() {
		var excused []string
		if strings.Contains(line, `"logger":"http.auto_https","msg":"adjusted config"`) { // Caddy's config, by Caddy, if it is to debug
			excused = []string{secretLiteral, caddytest.ManagementToken}
		}
		inPlaces.search("the log", line, excused...)
	}
	autosaved, err := os.ReadFile(caddy.ConfigAutosavePath) // Caddy's config once more
	if err != nil {
		t.Error(err)
	}
	inPlaces.search(caddy.ConfigAutosavePath, string(autosaved), secretLiteral, caddytest.ManagementToken)
	err = filepath.WalkDir(storage, func(name string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		content, err := os.ReadFile(name)
		inPlaces.search(name, string(content))
		return err
	})
	if err != nil {
		t.Error(err)
	}
	t.Logf("searched %d places for %d canaries", inPlaces.count, len(canaries()))
}

func managementFile(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "management")
	writeSecret(t, file, caddytest.ManagementToken)
	return file
}

// Placeholders of secrets are resolved when a config is loaded and not kept in
// it: a reload sees the new value.
func TestPlaceholdersOfTokensAreNotBakedIn(t *testing.T) {
	caddytest.NoLeaks(t)
	tokens := make(chan string, 1)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case tokens <- r.Header.Get("X-Consul-Token"):
		case <-r.Context().Done():
		}
		http.Error(w, "no leader", http.StatusInternalServerError)
	}))
	defer server.Close()
	awaitToken := func(want string) {
		t.Helper()
		caddytest.Eventually(t, caddytest.Patience, func() error {
			if got := <-tokens; got != want {
				return fmt.Errorf("token sent to Consul: got %q, want %q", got, want)
			}
			return nil
		})
	}
	file := filepath.Join(t.TempDir(), "token")
	f := startFront(t)
	for _, tc := range []struct {
		name, option string
		set          func(value string)
	}{
		{"env", "token {env.CADDY_TEST_TOKEN}", func(value string) { t.Setenv("CADDY_TEST_TOKEN", value) }},
		{"file", "token {file." + file + "}", func(value string) { writeSecret(t, file, value) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tc.set("first")
			f.serve(reverseProxy("dynamic consul web {\naddress " + server.URL + "\n" + tc.option + "\n}"))
			awaitToken("first")
			if config := f.Get("/config/"); !strings.Contains(config, strings.TrimPrefix(tc.option, "token ")) || strings.Contains(config, "first") {
				t.Errorf("/config/: got %s, want the placeholder in it and not the token", config)
			}
			tc.set("second")
			f.Reload()
			awaitToken("second")
			f.LoadJSON("{}")
		})
	}
}
