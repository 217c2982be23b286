package consulupstreams

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/hashicorp/consul/api"
)

// secretToken must turn up nowhere.
const secretToken = "5ecre700-0000-4000-8000-00000canary0"

// shown returns what the endpoint answers to a query.
func shown(t *testing.T, query string) (text string, services []serviceStatus) {
	t.Helper()
	w := httptest.NewRecorder()
	r := httptest.NewRequest(http.MethodGet, "/consul/services"+query, nil)
	if err := new(adminAPI).serveServices(w, r); err != nil {
		t.Fatalf("GET /consul/services%s: %v", query, err)
	}
	if got := w.Header().Get("Content-Type"); got != "application/json" {
		t.Errorf("content type: got %q, want application/json", got)
	}
	text = w.Body.String()
	if err := json.Unmarshal([]byte(text), &services); err != nil {
		t.Fatalf("reading %s: %v", text, err)
	}
	return text, services
}

// shownOnce returns what the endpoint shows of a service that is followed once.
func shownOnce(t *testing.T, service string) serviceStatus {
	t.Helper()
	_, services := shown(t, "?service="+service)
	if len(services) != 1 {
		t.Fatalf("entries for %s: got %d, want 1", service, len(services))
	}
	return services[0]
}

func TestTheEndpointShowsAService(t *testing.T) {
	consul := newFakeConsul(t)
	heavy, warning := instance(7), instance(9)
	warning.Checks[0].Status = api.HealthWarning
	consul.set(heavy, warning)
	p := newProxy(t, consul, nil, object{"health": "warning", "tag": []string{"!canary"}, "token": secretToken})
	p.await(t, heavy, warning)

	var got serviceStatus
	eventually(t, func() error {
		if got = shownOnce(t, "web"); got.LastAnswer == nil {
			return errors.New("last answer: got none")
		}
		return nil
	})
	if got.Service != "web" || got.State != "following" || got.Agent != consul.server.URL || got.InstanceCount != 2 || !got.Blocking {
		t.Errorf("entry: got %+v, want web, following, 2 instances, blocking, at %s", got, consul.server.URL)
	}
	for _, part := range []string{"health=warning", "not_tag=canary"} {
		if !strings.Contains(got.Query, part) {
			t.Errorf("query: got %q, want %q in it", got.Query, part)
		}
	}
	if got.AgeSeconds != 0 || got.FailingSince != nil || got.LastError != "" || got.ColdStart || len(got.Errors) != 0 {
		t.Errorf("entry while Consul answers: got %+v, want no sign of a failure", got)
	}
	if got.Index == 0 || got.Answers != 1 || got.Changes != 1 || time.Since(*got.LastAnswer) > time.Minute || got.LastChange == nil {
		t.Errorf("counts: got %+v, want an index, 1 answer and 1 change just now", got)
	}
	for _, i := range got.Instances {
		want := instanceStatus{heavy.Service.ID, heavy.Node.Node, "dc1", addressOf(heavy), "passing", 7}
		if i.ID == warning.Service.ID {
			want = instanceStatus{warning.Service.ID, warning.Node.Node, "dc1", addressOf(warning), "warning", 1}
		}
		if i != want {
			t.Errorf("instance: got %+v, want %+v", i, want)
		}
	}
}

func TestTheEndpointShowsAFailure(t *testing.T) {
	consul := newFakeConsul(t)
	one := instance(1)
	consul.set(one)
	p := newProxy(t, consul, nil, object{"token": secretToken})
	p.await(t, one)
	consul.setDown(true)
	eventually(t, func() error {
		got := shownOnce(t, "web")
		if got.State != "failing" || got.Errors["server"] == 0 || got.AgeSeconds <= 0 || got.FailingSince == nil ||
			!strings.Contains(got.LastError, "No cluster leader") || got.InstanceCount != 1 {
			return fmt.Errorf("entry: got %+v, want failing with 1 instance, an age and an error of kind server", got)
		}
		return nil
	})
	if text, _ := shown(t, ""); strings.Contains(text, secretToken) {
		t.Errorf("the token is in %s", text)
	}
	consul.setDown(false)
	eventually(t, func() error {
		if got := shownOnce(t, "web"); got.State != "following" || got.AgeSeconds != 0 || got.LastError != "" || got.Errors["server"] == 0 {
			return fmt.Errorf("entry after the failure: got %+v, want following, no age, and the count of errors", got)
		}
		return nil
	})
}

func TestTheEndpointShowsWhatIsAskedFor(t *testing.T) {
	if text, services := shown(t, ""); len(services) != 0 || strings.TrimSpace(text) != "[]" {
		t.Errorf("without a service: got %s, want []", text)
	}
	consul := newFakeConsul(t)
	newProxy(t, consul, nil, nil)
	newProxy(t, consul, nil, object{"tag": []string{"v2"}})
	newProxy(t, consul, nil, object{"service": "api"})
	for query, want := range map[string]int{"": 3, "?service=web": 2, "?service=api": 1, "?service=other": 0} {
		if _, services := shown(t, query); len(services) != want {
			t.Errorf("GET /consul/services%s: got %d entries, want %d", query, len(services), want)
		}
	}
}

func TestTheEndpointIsReadOnly(t *testing.T) {
	routes := new(adminAPI).Routes()
	if len(routes) != 1 || routes[0].Pattern != "/consul/services" {
		t.Fatalf("routes: got %+v, want /consul/services", routes)
	}
	for _, method := range []string{http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete} {
		err := routes[0].Handler.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(method, "/consul/services", nil))
		var apiError caddy.APIError
		if !errors.As(err, &apiError) || apiError.HTTPStatus != http.StatusMethodNotAllowed {
			t.Errorf("%s: got %v, want status 405", method, err)
		}
	}
}
