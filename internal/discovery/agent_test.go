package discovery

import (
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/consul/api"
)

// quiet swallows what Go's server says of connections that a test breaks.
var quiet = log.New(io.Discard, "", 0)

// lastQuestion returns the newest request that consul has got with a token.
func lastQuestion(consul *live) *http.Request {
	questions := consul.questions()
	if len(questions) == 0 {
		return nil
	}
	return questions[len(questions)-1]
}

func awaitToken(t *testing.T, consul *live, want string) *http.Request {
	t.Helper()
	var last *http.Request
	eventually(t, func() error {
		last = lastQuestion(consul)
		if last == nil {
			return fmt.Errorf("got no question, want one with the token %q", want)
		}
		if got := last.Header.Get("X-Consul-Token"); got != want {
			return fmt.Errorf("token of the last question: got %q, want %q", got, want)
		}
		return nil
	})
	return last
}

// A token file is replaced by whoever renews the token: an editor, Vault's
// agent, Nomad, Kubernetes. The query that is held open goes by the old token,
// and Consul would hold it for minutes.
func TestATokenFileIsFollowed(t *testing.T) {
	write := func(t *testing.T, name, token string) {
		t.Helper()
		writeFile(t, name, []byte(token+"\n"))
	}
	for _, tc := range []struct {
		name    string
		replace func(t *testing.T, file, token string)
	}{
		{"written in place", write},
		{"renamed over", func(t *testing.T, file, token string) {
			t.Helper()
			write(t, file+".new", token)
			if err := os.Rename(file+".new", file); err != nil {
				t.Fatal(err)
			}
		}},
		{"removed for a while", func(t *testing.T, file, token string) {
			t.Helper()
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
			write(t, file, token)
		}},
		{"symbolic link swapped", func(t *testing.T, file, token string) { // as Kubernetes does
			t.Helper()
			write(t, file+".target", token)
			if err := os.Symlink(file+".target", file+".link"); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(file+".link", file); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			consul := newLive(web("a"))
			server := serve(t, consul)
			file := filepath.Join(t.TempDir(), "token")
			write(t, file, "old-token")
			logger, logs := observed()
			s, err := Subscribe(&api.Config{Address: server.URL, TokenFile: file}, webQuery, logger)
			if err != nil {
				t.Fatalf("subscribing: %v", err)
			}
			defer s.Close()
			wantNodes(t, "by the old token", s.Await(t.Context(), patience), "a")
			eventually(t, func() error {
				if r := lastQuestion(consul); r.URL.Query().Get("index") != "7" {
					return fmt.Errorf("last question: got %s, want one that is held open", r.URL)
				}
				return nil
			})
			held := awaitToken(t, consul, "old-token")

			tc.replace(t, file, "new-token")
			eventually(t, func() error {
				if held.Context().Err() == nil {
					return fmt.Errorf("the question with the old token is still held open, want it given up")
				}
				return nil
			})
			awaitToken(t, consul, "new-token")
			questions := consul.questions()
			for i, q := range questions[1:] {
				was, is := questions[i].Header.Get("X-Consul-Token"), q.Header.Get("X-Consul-Token")
				if was != is && q.URL.Query().Get("index") != "" {
					t.Errorf("first question with the new token: got %s, want one from the beginning", q.URL)
				}
			}
			wantNodes(t, "by the new token", s.Set(), "a")
			if got := logs.FilterMessage(msgFailing).Len(); got != 0 {
				t.Errorf("warnings: got %d, want none", got)
			}
		})
	}
}

// A user is promised that a new token is used within a second.
func TestCredentialsAreLookedAtOftenEnough(t *testing.T) {
	if credentialsPoll > 500*time.Millisecond {
		t.Errorf("the files are looked at every %s, want every 500 ms at least", credentialsPoll)
	}
}

// Who writes a file in place leaves it empty or cut off for a moment. An empty
// token is no token: Consul would answer with what anonymous users may see.
func TestHalfWrittenCredentialsAreNotUsed(t *testing.T) {
	ca := newAuthority(t)
	whole, key := ca.issue(t, "caddy.test")
	wholeAuthority, err := os.ReadFile(ca.file)
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name    string
		file    func(*api.Config) string
		content []byte
	}{
		{"empty token", func(c *api.Config) string { return c.TokenFile }, nil},
		{"token of white space", func(c *api.Config) string { return c.TokenFile }, []byte(" \n")},
		{"empty certificate", func(c *api.Config) string { return c.TLSConfig.CertFile }, nil},
		{"certificate cut off", func(c *api.Config) string { return c.TLSConfig.CertFile }, whole[:len(whole)/2]},
		{"key cut off", func(c *api.Config) string { return c.TLSConfig.KeyFile }, key[:len(key)/2]},
		{"key of another certificate", func(c *api.Config) string { return c.TLSConfig.KeyFile }, func() []byte {
			_, other := ca.issue(t, "caddy.test")
			return other
		}()},
		{"authority cut off", func(c *api.Config) string { return c.TLSConfig.CAFile }, wholeAuthority[:len(wholeAuthority)/2]},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { // the files are real, the time between looks is not
				directory := t.TempDir()
				in := func(name string) string { return filepath.Join(directory, name) }
				config := &api.Config{
					Address: "https://consul.test", TokenFile: in("token"),
					TLSConfig: api.TLSConfig{CAFile: in("ca"), CertFile: in("cert"), KeyFile: in("key")},
				}
				restore := func() {
					writeFile(t, in("token"), []byte("token"))
					writeFile(t, in("ca"), wholeAuthority)
					writeFile(t, in("cert"), whole)
					writeFile(t, in("key"), key)
				}
				restore()
				a, err := newAgent(config)
				if err != nil {
					t.Fatalf("making an agent: %v", err)
				}
				defer func() { _ = a.Destruct() }()
				before := a.current()
				writeFile(t, tc.file(config), tc.content)
				time.Sleep(10 * credentialsPoll)
				synctest.Wait()
				if a.current() != before {
					t.Error("half-written credentials are used, want the old ones kept")
				}
				if err := before.life.Err(); err != nil {
					t.Errorf("queries under way: got %v, want them to go on", err)
				}
				restore()
				writeFile(t, in("token"), []byte("renewed"))
				time.Sleep(2 * credentialsPoll)
				synctest.Wait()
				if got := a.current().token; got != "renewed" {
					t.Errorf("token after the files are whole again: got %q, want the renewed one", got)
				}
			})
		})
	}
}

func TestAnEmptyTokenFileIsRefused(t *testing.T) {
	file := filepath.Join(t.TempDir(), "token")
	writeFile(t, file, []byte("\n"))
	if err := CheckConnection(&api.Config{Address: "localhost:8500", TokenFile: file}); err == nil {
		t.Error("token_file without a token: got no error, want one")
	}
}

func TestTLSFilesAreFollowed(t *testing.T) {
	ca := newAuthority(t)
	consul := newLive(web("a"))
	server := ca.serveTLS(t, consul)
	defer server.Close()
	directory := t.TempDir()
	certFile, keyFile := filepath.Join(directory, "cert.pem"), filepath.Join(directory, "key.pem")
	install := func(name string) {
		cert, key := ca.issue(t, name)
		writeFile(t, certFile, cert)
		writeFile(t, keyFile, key)
	}
	install("first.test")
	logger, _ := observed()
	s, err := Subscribe(&api.Config{
		Address: server.URL, TLSConfig: api.TLSConfig{Address: "consul.test", CAFile: ca.file, CertFile: certFile, KeyFile: keyFile},
	}, webQuery, logger)
	if err != nil {
		t.Fatalf("subscribing: %v", err)
	}
	defer s.Close()
	s.Await(t.Context(), patience)
	install("second.test")
	eventually(t, func() error {
		r := lastQuestion(consul)
		if r == nil {
			return fmt.Errorf("got no question, want one")
		}
		if got := r.TLS.PeerCertificates[0].Subject.CommonName; got != "second.test" {
			return fmt.Errorf("certificate shown to Consul: got that of %s, want that of second.test", got)
		}
		return nil
	})
}
