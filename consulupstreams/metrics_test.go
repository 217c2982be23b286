package consulupstreams

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/hashicorp/consul/api"
	"github.com/prometheus/client_golang/prometheus"
)

// gather returns the metrics, by their names and labels as Prometheus writes
// them but for the agent.
func gather(t *testing.T, registry *prometheus.Registry) map[string]float64 {
	t.Helper()
	families, err := registry.Gather()
	if err != nil {
		t.Fatalf("gathering metrics: %v", err)
	}
	values := make(map[string]float64)
	for _, family := range families {
		for _, m := range family.GetMetric() {
			var labels []string
			for _, label := range m.GetLabel() {
				if label.GetName() != "agent" {
					labels = append(labels, fmt.Sprintf("%s=%q", label.GetName(), label.GetValue()))
				}
			}
			values[family.GetName()+"{"+strings.Join(labels, ",")+"}"] = m.GetGauge().GetValue() + m.GetCounter().GetValue()
		}
	}
	return values
}

// newRegistry returns a registry as a new config has one, but one that checks
// all it is given.
func newRegistry() *prometheus.Registry {
	registry := prometheus.NewPedanticRegistry()
	showMetrics(registry)
	return registry
}

func wantMetrics(t *testing.T, got, want map[string]float64) {
	t.Helper()
	for name, value := range want {
		if v, ok := got[name]; !ok || v != value {
			t.Errorf("%s: got %v (there: %v), want %v", name, v, ok, value)
		}
	}
}

func TestMetricsTellWhatIsFollowed(t *testing.T) {
	registry := newRegistry()
	consul := newFakeConsul(t)
	first, warning, undialable := instance(1), instance(1), instance(1)
	warning.Checks[0].Status = api.HealthWarning
	undialable.Service.Port = 0
	consul.set(first, warning, undialable)
	p := newProxy(t, consul, nil, object{"health": "warning", "token": secretToken})
	p.await(t, first, warning)

	const labels = `query="health=warning",service="web"`
	eventually(t, func() error {
		if got := gather(t, registry)[`caddy_consul_answers_total{`+labels+`}`]; got != 1 {
			return fmt.Errorf("answers: got %v, want 1", got)
		}
		return nil
	})
	got := gather(t, registry)
	wantMetrics(t, got, map[string]float64{
		`caddy_consul_instances{` + labels + `,status="passing"}`:  1,
		`caddy_consul_instances{` + labels + `,status="warning"}`:  1,
		`caddy_consul_instances{` + labels + `,status="critical"}`: 0,
		`caddy_consul_state{` + labels + `,state="following"}`:     1,
		`caddy_consul_state{` + labels + `,state="starting"}`:      0,
		`caddy_consul_state{` + labels + `,state="failing"}`:       0,
		`caddy_consul_stale_seconds{` + labels + `}`:               0,
		`caddy_consul_cold_start{` + labels + `}`:                  0,
		`caddy_consul_changes_total{` + labels + `}`:               1,
		`caddy_consul_instances_refused{` + labels + `}`:           1,
	})
	for _, name := range []string{"index", "last_answer_timestamp_seconds", "last_change_timestamp_seconds"} {
		if got["caddy_consul_"+name+"{"+labels+"}"] <= 0 {
			t.Errorf("caddy_consul_%s: got nothing, want something", name)
		}
	}

	consul.setDown(true)
	eventually(t, func() error {
		got := gather(t, registry)
		if got[`caddy_consul_errors_total{kind="server",`+labels+`}`] == 0 || got[`caddy_consul_state{`+labels+`,state="failing"}`] != 1 ||
			got[`caddy_consul_stale_seconds{`+labels+`}`] <= 0 {
			return fmt.Errorf("metrics while Consul is down: got %v, want failing, stale, errors of kind server", got)
		}
		return nil
	})
	for name := range gather(t, registry) {
		if strings.Contains(name, secretToken) {
			t.Errorf("the token is in %s", name)
		}
	}
}

// Each config has a registry of its own, and may have sources whose labels can't
// tell them apart. A pedantic registry objects to what Prometheus would drop.
func TestMetricsOutliveReloads(t *testing.T) {
	consul := newFakeConsul(t)
	one := instance(1)
	consul.set(one)
	var registries []*prometheus.Registry
	for i := range 3 { // the old config's sources live on, as under a reload
		registry := newRegistry()
		showMetrics(registry) // as each source of a config does
		registries = append(registries, registry)
		for _, token := range []string{"", "a", "b"} {
			p := newProxy(t, consul, nil, object{"token": token})
			p.await(t, one)
		}
		for _, registry := range registries {
			got := gather(t, registry)
			var watchers []string
			for name := range got {
				if strings.HasPrefix(name, "caddy_consul_index{") {
					watchers = append(watchers, name)
				}
			}
			slices.Sort(watchers)
			want := []string{
				`caddy_consul_index{query=" (2)",service="web"}`, `caddy_consul_index{query=" (3)",service="web"}`,
				`caddy_consul_index{query="",service="web"}`,
			}
			if !slices.Equal(watchers, want) {
				t.Errorf("watchers in the metrics after %d reloads: got %v, want %v", i, watchers, want)
			}
		}
	}
}

func TestMetricsGoWithTheirService(t *testing.T) {
	registry := newRegistry()
	consul := newFakeConsul(t)
	t.Run("while it is followed", func(t *testing.T) {
		newProxy(t, consul, nil, nil)
		if got := gather(t, registry); len(got) == 0 {
			t.Error("metrics: got none, want some")
		}
	})
	if got := gather(t, registry); len(got) != 0 {
		t.Errorf("metrics of what is followed no more: got %v, want none", got)
	}
}

// The labels of a service have fixed values, whatever Consul answers.
func TestMetricsAreBounded(t *testing.T) {
	registry := newRegistry()
	consul := newFakeConsul(t)
	many := instances(50, 1)
	for i, e := range many {
		e.Service.Tags, e.Service.Meta = []string{fmt.Sprint("tag", i)}, map[string]string{"k": fmt.Sprint(i)}
	}
	consul.set(many...)
	p := newProxy(t, consul, nil, nil)
	p.await(t, many...)
	const most = 3 /* statuses */ + 3 /* states */ + 13 /* kinds */ + 8 /* others */
	if got := len(gather(t, registry)); got > most {
		t.Errorf("time series of a service with 50 instances: got %d, want at most %d", got, most)
	}
}

// panickingLog is a log that panics when the source has something to say about
// a first answer: a panic in the watcher's goroutine.
type panickingLog struct{}

func init() { caddy.RegisterModule(panickingLog{}) }

func (panickingLog) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "caddy.logging.writers.panicking", New: func() caddy.Module { return new(panickingLog) }}
}

func (panickingLog) String() string                      { return "panicking" }
func (panickingLog) WriterKey() string                   { return "panicking" }
func (panickingLog) OpenWriter() (io.WriteCloser, error) { return panickingLog{}, nil }
func (panickingLog) Close() error                        { return nil }
func (panickingLog) Write(line []byte) (n int, err error) {
	if strings.Contains(string(line), "following the service") {
		panic("injected")
	}
	return len(line), nil
}

func TestAPanicIsCounted(t *testing.T) {
	registry := newRegistry()
	consul := newFakeConsul(t)
	one := instance(1)
	consul.set(one)
	var config caddy.Config
	text, err := json.Marshal(object{
		"admin":   object{"disabled": true},
		"storage": object{"module": "file_system", "root": t.TempDir()},
		"logging": object{"logs": object{"default": object{"writer": object{"output": "panicking"}}}},
	})
	if err == nil {
		err = json.Unmarshal(text, &config)
	}
	if err != nil {
		t.Fatal(err)
	}
	base, err := caddy.ProvisionContext(&config)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := caddy.NewContext(base)
	defer cancel()
	source, err := json.Marshal(object{"service": "web", "address": consul.server.URL})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ctx.LoadModuleByID("http.reverse_proxy.upstreams.consul", source); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		got := gather(t, registry)
		if got[`caddy_consul_errors_total{kind="panic",query="",service="web"}`] == 0 ||
			got[`caddy_consul_instances{query="",service="web",status="passing"}`] != 1 ||
			got[`caddy_consul_state{query="",service="web",state="following"}`] != 1 {
			return fmt.Errorf("after a panic: got %v, want it counted, and the service followed", got)
		}
		return nil
	})
}

// Interface guard
var _ caddy.WriterOpener = panickingLog{}
