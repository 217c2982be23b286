package selection_test

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	_ "github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
)

// adapt returns the JSON of a site whose proxy has the lb_policy.
func adapt(t *testing.T, lbPolicy string) (string, error) {
	t.Helper()
	body := "http://example.com {\n\treverse_proxy 10.0.0.1:80 {\n\t\tlb_policy " + lbPolicy + "\n\t}\n}\n"
	config, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(body), map[string]any{"filename": "site.caddy"})
	return string(config), err
}

func TestCaddyfile(t *testing.T) {
	for _, pc := range policies {
		t.Run(pc.name, func(t *testing.T) {
			got, err := adapt(t, pc.name)
			if err != nil {
				t.Fatalf("adapting: got error %v, want none", err)
			}
			if want := `"selection_policy":{"policy":"` + pc.name + `"}`; !strings.Contains(got, want) {
				t.Errorf("adapted config: got %s, want %s in it", got, want)
			}
		})
	}
}

func TestCaddyfileErrors(t *testing.T) {
	tests := []struct {
		name    string
		options string
		want    string
	}{
		{"argument", "5", "wrong argument count"},
		{"block", "{\n\t\t\tweight 5\n\t\t}", "takes no block"},
	}
	for _, pc := range policies {
		for _, tc := range tests {
			t.Run(pc.name+"/"+tc.name, func(t *testing.T) {
				_, err := adapt(t, pc.name+" "+tc.options)
				if err == nil {
					t.Fatal("adapting: got no error, want one")
				}
				for _, want := range []string{strings.ToLower(tc.want), "site.caddy:3"} {
					if !strings.Contains(strings.ToLower(err.Error()), want) {
						t.Errorf("error: got %q, want %q in it", err, want)
					}
				}
			})
		}
	}
}

func TestModules(t *testing.T) {
	for _, pc := range policies {
		t.Run(pc.name, func(t *testing.T) {
			info, err := caddy.GetModule("http.reverse_proxy.selection_policies." + pc.name)
			if err != nil {
				t.Fatalf("registered module: got error %v, want none", err)
			}
			module := info.New()
			if _, ok := module.(policy); !ok {
				t.Errorf("registered module: got %T, want a policy", module)
			}
			config, err := json.Marshal(module)
			if err != nil || string(config) != "{}" {
				t.Errorf("config as JSON: got %s and error %v, want {}", config, err)
			}
		})
	}
}
