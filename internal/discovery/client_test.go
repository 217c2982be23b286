package discovery

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"
)

func TestAddressesOfConsul(t *testing.T) {
	for _, tc := range []struct {
		name         string
		config       api.Config
		base, socket string
	}{
		{name: "host", config: api.Config{Address: "consul.internal"}, base: "http://consul.internal:8500"},
		{name: "host and port", config: api.Config{Address: "localhost:8501"}, base: "http://localhost:8501"},
		{name: "IPv4", config: api.Config{Address: "127.0.0.1:8500"}, base: "http://127.0.0.1:8500"},
		{name: "IPv6", config: api.Config{Address: "[::1]"}, base: "http://[::1]:8500"},
		{name: "IPv6 and port", config: api.Config{Address: "[2001:db8::1]:8501"}, base: "http://[2001:db8::1]:8501"},
		{name: "http", config: api.Config{Address: "http://consul:8500"}, base: "http://consul:8500"},
		{name: "http without a port", config: api.Config{Address: "http://consul"}, base: "http://consul"},
		{name: "https", config: api.Config{Address: "https://consul:8501"}, base: "https://consul:8501"},
		{name: "https without a port", config: api.Config{Address: "https://consul"}, base: "https://consul"},
		{name: "TLS asked for", config: api.Config{Address: "consul:8501", Scheme: "https"}, base: "https://consul:8501"},
		{name: "TLS asked for and http", config: api.Config{Address: "http://consul:8501", Scheme: "https"}, base: "https://consul:8501"},
		{name: "path prefix", config: api.Config{Address: "consul:8500", PathPrefix: "/consul"}, base: "http://consul:8500/consul"},
		{name: "path in the address", config: api.Config{Address: "https://proxy/consul/"}, base: "https://proxy/consul"},
		{name: "unix socket", config: api.Config{Address: "unix:///run/consul.sock"}, base: "http://localhost", socket: "/run/consul.sock"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			base, socket, err := baseURL(&tc.config)
			if err != nil || base != tc.base || socket != tc.socket {
				t.Errorf("address %q: got %q, %q, error %v, want %q, %q", tc.config.Address, base, socket, err, tc.base, tc.socket)
			}
		})
	}
}

func TestAddressesThatAreRefused(t *testing.T) {
	for _, address := range []string{
		"", ":8500", "http://", "http://:8500", "consul:85o0", "consul:-1", "consul:99999", "consul:0", "::1", "::1:8500", "2001:db8::1",
		"a b:8500", "{env.CONSUL}", "ftp://consul", "consul://consul:8500", "tcp://consul:8500",
		"unix://run/consul.sock", "unix://", "http://consul?x=y", "http://consul#x", "http://user:hunter2@consul:8500", "http://consul\r\n:8500",
	} {
		t.Run(address, func(t *testing.T) {
			err := CheckConnection(&api.Config{Address: address})
			if err == nil {
				t.Fatalf("address %q: got no error, want one", address)
			}
			if strings.Contains(err.Error(), "hunter2") {
				t.Errorf("error: got %q, want one without the password", err)
			}
		})
	}
}

// token is what no error and no line of the log may contain.
const token = "d5f7a2c0-5ec2-e700-0000-c0ffee000001"

// A proxy or a debugging handler in front of Consul may answer with the request
// that it got.
func TestNoErrorTellsASecret(t *testing.T) {
	const password = "hunter2-hunter2"
	secrets := []string{token, token[:18], password, password[:10]}
	for _, tc := range []struct {
		name    string
		handler func(http.ResponseWriter, *http.Request)
	}{
		{"echoed in a 403", func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusForbidden)
			_, _ = fmt.Fprintf(w, "token %s of user:%s is unknown", r.Header.Get("X-Consul-Token"), passwordOf(r))
		}},
		{"cut off at the end of what is logged", func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusInternalServerError)
			_, _ = io.WriteString(w, strings.Repeat("x", 300-20)+r.Header.Get("X-Consul-Token"))
		}},
		{"password cut off at the end of what is logged", func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusInternalServerError)
			_, _ = io.WriteString(w, strings.Repeat("x", 300-12)+passwordOf(r))
		}},
		{"basic auth as it was sent", func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusInternalServerError)
			_, _ = io.WriteString(w, r.Header.Get("Authorization"))
		}},
		{"in the index", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("X-Consul-Index", r.Header.Get("X-Consul-Token"))
		}},
		{"in a redirect", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "/login?token="+r.Header.Get("X-Consul-Token"), http.StatusFound)
		}},
		{"instead of JSON", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("X-Consul-Index", "1")
			_, _ = fmt.Fprintf(w, "%q", r.Header.Get("X-Consul-Token"))
		}},
		{"no answer", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			server := serve(t, http.HandlerFunc(tc.handler))
			logger, logs := observed()
			s, err := Subscribe(&api.Config{
				Address: server.URL, Token: token, HttpAuth: &api.HttpBasicAuth{Username: "user", Password: password},
			}, webQuery, logger)
			if err != nil {
				t.Fatalf("subscribing: %v", err)
			}
			defer s.Close()
			eventually(t, func() error {
				if s.LastError() == nil {
					return fmt.Errorf("failure: got none, want one")
				}
				return nil
			})
			text := s.LastError().Error()
			for _, line := range logs.All() {
				text += fmt.Sprintf("\n%s %v", line.Message, line.ContextMap())
			}
			for _, secret := range append(secrets, basicAuth("user", password)) {
				if strings.Contains(text, secret) {
					t.Errorf("errors and log: got %q, want them without %q", text, secret)
				}
			}
		})
	}
}

func passwordOf(r *http.Request) string {
	_, password, _ := r.BasicAuth()
	return password
}

func basicAuth(user, password string) string {
	r := &http.Request{Header: make(http.Header)}
	r.SetBasicAuth(user, password)
	return strings.TrimPrefix(r.Header.Get("Authorization"), "Basic ")
}

// The official client follows redirects, and takes the token along.
func TestARedirectDoesNotGetTheToken(t *testing.T) {
	visited := make(chan *http.Request, 10)
	elsewhere := serve(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { visited <- r }))
	for _, status := range []int{301, 302, 303, 307, 308} {
		server := httptest.NewServer(http.RedirectHandler(elsewhere.URL, status))
		c := newTestClient(t, &api.Config{Address: server.URL, Token: token})
		if _, err := c.get(t.Context(), "/v1/health/service/web", nil, discard); err == nil {
			t.Errorf("redirect with %d: got no error, want one", status)
		}
		server.Close()
	}
	select {
	case r := <-visited:
		t.Errorf("target of the redirect: got a request with %v, want none", r.Header)
	default:
	}
}

func newTestClient(t *testing.T, config *api.Config) *client {
	t.Helper()
	c, err := newClient(config)
	if err != nil {
		t.Fatalf("making a client: %v", err)
	}
	t.Cleanup(func() { c.close(nil) })
	return c
}

func TestCredentialsAreSent(t *testing.T) {
	t.Setenv("CONSUL_HTTP_AUTH", "user:pass:word")
	t.Setenv("CONSUL_HTTP_TOKEN", token)
	got := make(chan *http.Request, 1)
	server := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got <- r
		w.Header().Set("X-Consul-Index", "1")
		_, _ = io.WriteString(w, "[]")
	}))
	config := api.DefaultConfig()
	config.Address = server.URL
	if _, err := newTestClient(t, config).get(t.Context(), "/v1/health/service/web", nil, discard); err != nil {
		t.Fatalf("asking: got error %v, want none", err)
	}
	r := <-got
	user, password, _ := r.BasicAuth()
	if user != "user" || password != "pass:word" {
		t.Errorf("CONSUL_HTTP_AUTH: got user %q with password %q, want user with pass:word", user, password)
	}
	if got := r.Header.Get("X-Consul-Token"); got != token {
		t.Errorf("CONSUL_HTTP_TOKEN: got %q, want %q", got, token)
	}
	if strings.Contains(r.URL.String(), token) {
		t.Errorf("URL of the question: got %s, want it without the token", r.URL)
	}
}

func TestAnAgentOnAUnixSocket(t *testing.T) {
	t.Setenv("HTTP_PROXY", "http://127.0.0.1:1")
	path := filepath.Join(t.TempDir(), "consul.sock")
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatalf("listening: %v", err)
	}
	server := &httptest.Server{Listener: listener, Config: &http.Server{Handler: newLive(web("a"))}} //nolint:gosec // on loopback
	server.Start()
	defer server.Close()
	logger, _ := observed()
	s, err := Subscribe(&api.Config{Address: "unix://" + path}, webQuery, logger)
	if err != nil {
		t.Fatalf("subscribing: %v", err)
	}
	defer s.Close()
	wantNodes(t, "of an agent on a socket", s.Await(t.Context(), patience), "a")
}

// authority is a certificate authority of a test's own.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	file string
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatalf("generating a key: %v", err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Test CA"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatalf("creating the authority: %v", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatalf("reading the authority: %v", err)
	}
	a := &authority{cert: cert, key: key, file: filepath.Join(t.TempDir(), "ca.pem")}
	writeFile(t, a.file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	return a
}

// issue returns the PEM texts of a certificate for the name, and of its key.
func (a *authority) issue(t *testing.T, name string) (cert, key []byte) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatalf("generating a key: %v", err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, &private.PublicKey, a.key)
	if err != nil {
		t.Fatalf("creating a certificate: %v", err)
	}
	secret, err := x509.MarshalECPrivateKey(private)
	if err != nil {
		t.Fatalf("marshalling a key: %v", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: secret})
}

func writeFile(t *testing.T, name string, content []byte) {
	t.Helper()
	if err := os.WriteFile(name, content, 0o600); err != nil {
		t.Fatalf("writing a file: %v", err)
	}
}

// serveTLS serves a handler to whoever shows a certificate of the authority.
func (a *authority) serveTLS(t *testing.T, handler http.Handler) *httptest.Server {
	t.Helper()
	pair, err := tls.X509KeyPair(a.issue(t, "consul.test"))
	if err != nil {
		t.Fatalf("making a pair: %v", err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	server := httptest.NewUnstartedServer(handler)
	server.EnableHTTP2 = true
	server.Config.ErrorLog = quiet
	server.TLS = &tls.Config{
		Certificates: []tls.Certificate{pair}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert,
		MinVersion: tls.VersionTLS12,
	}
	server.StartTLS()
	return server
}

func TestTLS(t *testing.T) {
	ca, foreign := newAuthority(t), newAuthority(t)
	server := ca.serveTLS(t, newLive(web("a")))
	defer server.Close()
	directory := t.TempDir()
	certFile, keyFile := filepath.Join(directory, "cert.pem"), filepath.Join(directory, "key.pem")
	cert, key := ca.issue(t, "caddy.test")
	writeFile(t, certFile, cert)
	writeFile(t, keyFile, key)
	address := server.Listener.Addr().String()

	for _, tc := range []struct {
		name string
		tls  api.TLSConfig
		want string // in the error
	}{
		{name: "trusted", tls: api.TLSConfig{Address: "consul.test", CAFile: ca.file, CertFile: certFile, KeyFile: keyFile}},
		{name: "not verified", tls: api.TLSConfig{InsecureSkipVerify: true, CertFile: certFile, KeyFile: keyFile}},
		{name: "wrong host", want: "doesn't contain any IP SANs", tls: api.TLSConfig{CAFile: ca.file, CertFile: certFile, KeyFile: keyFile}},
		{name: "wrong name", want: "valid for consul.test, not other.test", tls: api.TLSConfig{
			Address: "other.test", CAFile: ca.file, CertFile: certFile, KeyFile: keyFile,
		}},
		{name: "foreign authority", want: "unknown authority", tls: api.TLSConfig{
			Address: "consul.test", CAFile: foreign.file, CertFile: certFile, KeyFile: keyFile,
		}},
		{name: "no certificate to show", want: "certificate required", tls: api.TLSConfig{Address: "consul.test", CAFile: ca.file}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			logger, _ := observed()
			s, err := Subscribe(&api.Config{Address: address, Scheme: "https", TLSConfig: tc.tls, Token: token}, webQuery, logger)
			if err != nil {
				t.Fatalf("subscribing: %v", err)
			}
			defer s.Close()
			if tc.want == "" {
				wantNodes(t, "over TLS", s.Await(t.Context(), patience), "a")
				return
			}
			eventually(t, func() error {
				if err := s.LastError(); err == nil || !strings.Contains(err.Error(), tc.want) {
					return fmt.Errorf("failure: got %w, want one that says %q", err, tc.want)
				}
				return nil
			})
		})
	}
}

func TestTLSToAnAgentWithout(t *testing.T) {
	server := serve(t, newLive(web("a")))
	server.Config.ErrorLog = quiet
	address := strings.TrimPrefix(server.URL, "http://")
	if _, err := newTestClient(t, &api.Config{Address: address, Scheme: "https"}).get(t.Context(), "/v1", nil, discard); err == nil ||
		!strings.Contains(err.Error(), "HTTP response to HTTPS client") {
		t.Errorf("error: got %v, want one that says that the agent speaks plain HTTP", err)
	}
}

func TestFilesThatCannotBeUsedAreNamed(t *testing.T) {
	directory := t.TempDir()
	garbage, missing := filepath.Join(directory, "garbage.pem"), filepath.Join(directory, "missing.pem")
	writeFile(t, garbage, []byte("-----BEGIN CERT"))
	for _, tc := range []struct {
		name   string
		config api.Config
	}{
		{"missing token", api.Config{TokenFile: missing}},
		{"missing authority", api.Config{TLSConfig: api.TLSConfig{CAFile: missing}}},
		{"garbage for an authority", api.Config{TLSConfig: api.TLSConfig{CAFile: garbage}}},
		{"missing certificate", api.Config{TLSConfig: api.TLSConfig{CertFile: missing, KeyFile: garbage}}},
		{"garbage for a certificate", api.Config{TLSConfig: api.TLSConfig{CertFile: garbage, KeyFile: garbage}}},
		{"certificate without a key", api.Config{TLSConfig: api.TLSConfig{CertFile: garbage}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tc.config.Address = "localhost:8500"
			if err := CheckConnection(&tc.config); err == nil {
				t.Error("got no error, want one")
			}
		})
	}
}
