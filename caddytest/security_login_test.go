package caddytest_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/caddy-consul/caddy-consul/caddytest"
)

// signed returns a JSON web token.
func signed(t *testing.T, key *ecdsa.PrivateKey, claims map[string]any) string {
	t.Helper()
	encode := func(part any) string {
		text, err := json.Marshal(part)
		if err != nil {
			t.Fatal(err)
		}
		return base64.RawURLEncoding.EncodeToString(text)
	}
	text := encode(map[string]string{"alg": "ES256", "typ": "JWT"}) + "." + encode(claims)
	digest := sha256.Sum256([]byte(text))
	r, s, err := ecdsa.Sign(rand.Reader, key, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	signature := make([]byte, 64)
	r.FillBytes(signature[:32])
	s.FillBytes(signature[32:])
	return text + "." + base64.RawURLEncoding.EncodeToString(signature)
}

// `consul login` writes the token file, as SECURITY.md says, and is run again
// before the token expires. Caddy goes on without a reload.
func TestLoginThroughAnAuthMethod(t *testing.T) {
	caddytest.NoLeaks(t)
	agent := caddytest.StartAgent(t, caddytest.WithACLs())
	acl := agent.Client().ACL()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := acl.PolicyCreate(&api.ACLPolicy{Name: "caddy", Rules: leastPolicy(t, "web")}, nil); err != nil {
		t.Fatal(err)
	}
	if _, _, err := acl.RoleCreate(&api.ACLRole{Name: "caddy", Policies: []*api.ACLLink{{Name: "caddy"}}}, nil); err != nil {
		t.Fatal(err)
	}
	if _, _, err := acl.AuthMethodCreate(&api.ACLAuthMethod{
		Name: "proxies", Type: "jwt", MaxTokenTTL: time.Hour,
		Config: map[string]any{
			"JWTValidationPubKeys": []string{string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public}))},
			"JWTSupportedAlgs":     []string{"ES256"},
			"ClaimMappings":        map[string]string{"sub": "name"},
		},
	}, nil); err != nil {
		t.Fatal(err)
	}
	if _, _, err := acl.BindingRuleCreate(&api.ACLBindingRule{
		AuthMethod: "proxies", BindType: api.BindingRuleBindTypeRole, BindName: "caddy", Selector: "value.name==caddy",
	}, nil); err != nil {
		t.Fatal(err)
	}

	folder := t.TempDir()
	bearer, sink := filepath.Join(folder, "jwt"), filepath.Join(folder, "token")
	login := func() {
		t.Helper()
		now := time.Now()
		writeSecret(t, bearer, signed(t, key, map[string]any{"sub": "caddy", "iat": now.Unix(), "exp": now.Add(time.Hour).Unix()}))
		output, err := exec.Command(caddytest.ConsulBinary(t), "login", "-http-addr", agent.Address(), "-method", "proxies",
			"-bearer-token-file", bearer, "-token-sink-file", sink).CombinedOutput()
		if err != nil {
			t.Fatalf("consul login: %v: %s", err, output)
		}
	}
	startInstances(t, agent, "web", "a")
	login()
	f := startFront(t)
	f.serve(reverseProxy(consulSource("web", agent, "token_file "+sink), inTurn))
	f.awaitBackends("web", "a")
	traffic := caddytest.StartTraffic(t, "http://web", caddytest.ThroughSocket(f.listen), caddytest.Workers(2))

	tokens, _, err := acl.TokenList(nil)
	if err != nil {
		t.Fatal(err)
	}
	login()
	for _, token := range tokens { // the old one expires
		if token.AuthMethod == "proxies" {
			if _, err := acl.TokenDelete(token.AccessorID, nil); err != nil {
				t.Fatal(err)
			}
		}
	}
	agent.Register(caddytest.StartBackend(t, caddytest.Named("b")).Service("web"))
	f.awaitBackends("web", "a", "b")
	traffic.Stop().RequireSuccess(t)
}
