package caddytest_test

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
	"log"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/caddy-consul/caddy-consul/caddytest"
)

// tlsBlock returns the option tls.
func tlsBlock(options ...string) string { return "tls {\n" + strings.Join(options, "\n") + "\n}" }

// showing returns the options that show a certificate to the agent.
func showing(pair caddytest.KeyPair) []string {
	return []string{"cert " + pair.Cert, "key " + pair.Key}
}

// An agent that speaks HTTPS alone, to clients with a certificate of its own
// authority alone.
func TestTLSWithARealAgent(t *testing.T) {
	caddytest.NoLeaks(t)
	agent := caddytest.StartAgent(t, caddytest.WithTLS())
	startInstances(t, agent, "web", "a")
	own := agent.CA().Issue(t, "caddy")
	foreign := caddytest.NewCA(t)
	stranger := foreign.Issue(t, "stranger")
	folder := t.TempDir()
	bundle := write(t, filepath.Join(folder, "bundle.pem"), append(read(t, foreign.File), read(t, agent.CA().File)...))

	// a folder as Kubernetes mounts it: links into a folder behind a link
	mounted := t.TempDir()
	if err := os.Mkdir(filepath.Join(mounted, "..1"), 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(mounted, "..1", "ca.pem"), read(t, agent.CA().File))
	write(t, filepath.Join(mounted, "..1", "other.pem"), read(t, foreign.File))
	link(t, "..1", filepath.Join(mounted, "..data"))
	link(t, "..data/ca.pem", filepath.Join(mounted, "ca.pem"))
	link(t, "..data/other.pem", filepath.Join(mounted, "other.pem"))

	f := startFront(t)
	ca := "ca " + agent.CA().File
	for _, tc := range []struct {
		name string
		tls  []string
		env  map[string]string
		want string // in the error; none if empty
	}{
		{name: "certificates both ways", tls: append(showing(own), ca)},
		{name: "the agent's name", tls: append(showing(own), ca, "server_name server.dc1.consul")},
		{name: "a bundle of authorities", tls: append(showing(own), "ca "+bundle)},
		{name: "a folder of authorities", tls: append(showing(own), "ca "+mounted)},
		{name: "TLS 1.3", tls: append(showing(own), ca, "min_version tls1.3")},
		{name: "not verified", tls: append(showing(own), "insecure_skip_verify")},
		{name: "all from the environment", env: map[string]string{
			"CONSUL_HTTP_SSL": "true", "CONSUL_CACERT": agent.CA().File, "CONSUL_CLIENT_CERT": own.Cert, "CONSUL_CLIENT_KEY": own.Key,
		}},
		{name: "a folder from the environment", tls: showing(own), env: map[string]string{"CONSUL_CAPATH": mounted}},
		{name: "ca instead of the environment's", tls: append(showing(own), "ca "+mounted), env: map[string]string{"CONSUL_CACERT": foreign.File}},
		{name: "no certificate to show", tls: []string{ca}, want: "tls: certificate required"},
		{name: "a certificate of a foreign authority", tls: append(showing(stranger), ca), want: "tls: unknown certificate authority"},
		{name: "another authority", tls: append(showing(own), "ca "+foreign.File), want: "certificate signed by unknown authority"},
		{name: "the system's authorities", tls: showing(own), want: "certificate signed by unknown authority"},
		{name: "wrong server_name", tls: append(showing(own), ca, "server_name db.example.com"), want: "certificate is valid for localhost, server.dc1.consul, not db.example.com"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for name, value := range tc.env {
				t.Setenv(name, value)
			}
			logs := f.Logs().FromNow()
			option := ""
			if tc.tls != nil {
				option = tlsBlock(tc.tls...)
			}
			f.serve(reverseProxy(consulSource("web", agent, option, "startup_timeout 1s"), inTurn))
			if tc.want == "" {
				f.awaitBackends("web", "a")
			} else {
				f.awaitState("web", "failing", tc.want)
			}
			warned := 0
			if tc.name == "not verified" {
				warned = 1
			}
			wantLines(t, logs, warned, `"level":"warn".*insecure_skip_verify is on`)
			f.LoadJSON("{}") // gives the connection up
		})
	}
}

// $CONSUL_HTTP_SSL_VERIFY turns verification off as well, and is told as well.
func TestInsecureByTheEnvironmentWarns(t *testing.T) {
	caddytest.NoLeaks(t)
	t.Setenv("CONSUL_HTTP_SSL_VERIFY", "false")
	f := startFront(t)
	f.serve(reverseProxy(consulSource("web", caddytest.SharedAgent(t))))
	f.Logs().Wait(t, `"level":"warn".*insecure_skip_verify is on`)
}

// certificateAt makes a certificate that is signed by itself, of which from and
// until are the lifetime.
func certificateAt(t *testing.T, cert, key string, from, until time.Time, hosts ...string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "consul"},
		NotBefore: from, NotAfter: until, DNSNames: hosts, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	write(t, cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	write(t, key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret}))
}

// A certificate of the agent that has expired, isn't valid yet or is another
// host's is refused, and the error says which of these it is.
func TestCertificatesOfTheAgentThatAreRefused(t *testing.T) {
	caddytest.NoLeaks(t)
	agent := caddytest.StartAgent(t, caddytest.WithTLS())
	startInstances(t, agent, "web", "a")
	own := agent.CA().Issue(t, "caddy")
	folder := filepath.Dir(agent.CA().File) // where the agent's own files are
	cert, key := filepath.Join(folder, "consul.pem"), filepath.Join(folder, "consul-key.pem")
	f := startFront(t)
	now := time.Now()
	for _, tc := range []struct {
		name        string
		from, until time.Time
		host        string
		want        string
	}{
		{"good", now.Add(-time.Hour), now.Add(time.Hour), "localhost", ""},
		{"expired", now.Add(-2 * time.Hour), now.Add(-time.Hour), "localhost", "certificate has expired or is not yet valid: current time"},
		{"not yet valid", now.Add(time.Hour), now.Add(2 * time.Hour), "localhost", "is before"},
		{"of another host", now.Add(-time.Hour), now.Add(time.Hour), "db.example.com", "certificate is valid for db.example.com, not localhost"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			certificateAt(t, cert, key, tc.from, tc.until, tc.host)
			trusted := write(t, filepath.Join(t.TempDir(), "ca.pem"), read(t, cert))
			reloadCertificates(t, agent, trusted, own)
			source := consulSource("web", agent, tlsBlock(append(showing(own), "ca "+trusted, "server_name localhost")...), "startup_timeout 1s")
			f.serve(reverseProxy(source, inTurn))
			if tc.want == "" {
				f.awaitBackends("web", "a")
			} else {
				f.awaitState("web", "failing", tc.want)
				f.Logs().Wait(t, "Consul gives no usable answer.*"+tc.want)
			}
			f.LoadJSON("{}")
		})
	}
}

// reloadCertificates makes the agent read its files again, whatever certificate
// it shows now, and returns when it shows the one in file.
func reloadCertificates(t *testing.T, agent *caddytest.Agent, file string, own caddytest.KeyPair) {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(own.Cert, own.Key)
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{
		InsecureSkipVerify: true, Certificates: []tls.Certificate{pair}, //nolint:gosec // the harness's own agent
	}}
	client := &http.Client{Transport: transport}
	block, _ := pem.Decode(read(t, file))
	caddytest.Eventually(t, caddytest.Patience, func() error {
		request, err := http.NewRequest(http.MethodPut, "https://"+agent.Address()+"/v1/agent/reload", nil)
		if err != nil {
			return err
		}
		response, err := client.Do(request)
		if err != nil {
			return err
		}
		response.Body.Close()
		if got := response.TLS.PeerCertificates[0].Raw; string(got) != string(block.Bytes) {
			return fmt.Errorf("the agent still shows its old certificate")
		}
		return nil
	})
}

// The certificates that we show and trust are replaced while we run: the new
// ones are in use within a second, without a reload.
func TestCertificateFilesThatRotate(t *testing.T) {
	caddytest.NoLeaks(t)
	agent := caddytest.StartAgent(t, caddytest.WithTLS())
	startInstances(t, agent, "web", "a")
	own, foreign := agent.CA().Issue(t, "caddy"), caddytest.NewCA(t)
	stranger := foreign.Issue(t, "stranger")
	folder := t.TempDir()
	cert, key, ca := filepath.Join(folder, "cert.pem"), filepath.Join(folder, "key.pem"), filepath.Join(folder, "ca.pem")
	show := func(pair caddytest.KeyPair) {
		write(t, cert, read(t, pair.Cert))
		write(t, key, read(t, pair.Key))
	}
	show(own)
	write(t, ca, read(t, agent.CA().File))

	f := startFront(t)
	f.serve(reverseProxy(consulSource("web", agent, tlsBlock("ca "+ca, "cert "+cert, "key "+key)), inTurn))
	f.awaitBackends("web", "a")
	traffic := caddytest.StartTraffic(t, "http://web", caddytest.ThroughSocket(f.listen), caddytest.Workers(2))
	for _, change := range []struct {
		name, state, lastError string
		apply                  func()
	}{
		{"a certificate of a foreign authority", "failing", "unknown certificate authority", func() { show(stranger) }},
		{"a new certificate", "following", "", func() { show(agent.CA().Issue(t, "renewed")) }},
		{"a foreign authority to trust", "failing", "signed by unknown authority", func() { write(t, ca, read(t, foreign.File)) }},
		{"the right one beside it", "following", "", func() {
			write(t, ca, append(read(t, foreign.File), read(t, agent.CA().File)...))
		}},
	} {
		start := time.Now()
		change.apply()
		f.awaitState("web", change.state, change.lastError)

		t.Logf("%s: noticed after %s", change.name, time.Since(start).Round(time.Millisecond))
		traffic.WaitMore(10)
	}
	f.awaitBackends("web", "a")
	traffic.Stop().RequireSuccess(t)
}

// Old versions of TLS are refused by both ends' names for it.
func TestMinimumVersionOfTLS(t *testing.T) {
	caddytest.NoLeaks(t)
	f := startFront(t)
	for _, tc := range []struct {
		name   string
		speaks uint16 // at the most
		option string
		want   string
	}{
		{"1.2 by default", tls.VersionTLS12, "insecure_skip_verify", ""},
		{"1.1 by default", tls.VersionTLS11, "insecure_skip_verify", "protocol version not supported"},
		{"1.2 with min_version tls1.2", tls.VersionTLS12, "min_version tls1.2\ninsecure_skip_verify", ""},
		{"1.2 with min_version tls1.3", tls.VersionTLS12, "min_version tls1.3\ninsecure_skip_verify", "protocol version not supported"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("X-Consul-Index", "1")
				if r.URL.Query().Has("index") {
					<-r.Context().Done()
				}
				_, _ = io.WriteString(w, "[]")
			}))
			server.TLS = &tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: tc.speaks} //nolint:gosec // what is refused
			server.Config.ErrorLog = log.New(io.Discard, "", 0)
			server.StartTLS()
			defer server.Close()
			f.serve(reverseProxy("dynamic consul web {\naddress " + server.URL + "\n" + tlsBlock(tc.option) + "\n}"))
			if tc.want == "" {
				f.awaitState("web", "following", "")
			} else {
				f.awaitState("web", "failing", tc.want)
			}
			f.LoadJSON("{}")
		})
	}
}
