package consulupstreams

import (
	"encoding/json"
	"fmt"
	"net/http"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-consul/caddy-consul/internal/discovery"
	"github.com/caddy-consul/caddy-consul/internal/endpoint"
)

func init() {
	caddy.RegisterModule(adminAPI{})
}

// adminAPI is a module that provides the /consul/services endpoint of the Caddy
// admin API: which services are followed, how well, and where requests go.
type adminAPI struct{}

// CaddyModule returns the Caddy module information.
func (adminAPI) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "admin.api.consul",
		New: func() caddy.Module { return new(adminAPI) },
	}
}

// Routes returns the route of the endpoint.
func (a adminAPI) Routes() []caddy.AdminRoute {
	return []caddy.AdminRoute{{
		Pattern: "/consul/services",
		Handler: caddy.AdminHandlerFunc(a.serveServices),
	}}
}

// serviceStatus is a followed service, as the endpoint shows it.
type serviceStatus struct {
	Service       string            `json:"service"`
	Query         string            `json:"query,omitempty"`
	Agent         string            `json:"agent"`
	State         discovery.State   `json:"state"`
	FailingSince  *time.Time        `json:"failing_since,omitempty"`
	LastError     string            `json:"last_error,omitempty"`
	Credentials   string            `json:"credentials_error,omitempty"`
	LastAnswer    *time.Time        `json:"last_answer,omitempty"`
	LastChange    *time.Time        `json:"last_change,omitempty"`
	AgeSeconds    float64           `json:"age_seconds"`
	ColdStart     bool              `json:"cold_start,omitempty"`
	Blocking      bool              `json:"blocking"`
	Index         uint64            `json:"index"`
	Answers       uint64            `json:"answers"`
	Changes       uint64            `json:"changes"`
	Errors        map[string]uint64 `json:"errors,omitempty"`
	NotDialable   int               `json:"not_dialable,omitempty"`
	InstanceCount int               `json:"instance_count"`
	Instances     []instanceStatus  `json:"instances"`
}

type instanceStatus struct {
	ID         string `json:"id"`
	Node       string `json:"node"`
	Datacenter string `json:"datacenter,omitempty"`
	Dial       string `json:"dial"`
	Status     string `json:"status"`
	Weight     int    `json:"weight"`
}

// serveServices lists the followed services; with the parameter service, those
// of that name.
func (adminAPI) serveServices(w http.ResponseWriter, r *http.Request) error {
	if r.Method != http.MethodGet {
		return caddy.APIError{HTTPStatus: http.StatusMethodNotAllowed, Err: fmt.Errorf("method %s is not allowed: use GET", r.Method)}
	}
	only := r.URL.Query().Get("service")
	statuses := []serviceStatus{}
	for _, report := range discovery.Reports() {
		if only == "" || only == report.Service {
			statuses = append(statuses, newServiceStatus(report))
		}
	}
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(statuses); err != nil {
		return caddy.APIError{HTTPStatus: http.StatusInternalServerError, Err: err}
	}
	return nil
}

func newServiceStatus(r discovery.Report) serviceStatus {
	status := serviceStatus{
		Service:      r.Service,
		Query:        r.Query,
		Agent:        r.Agent,
		State:        r.State,
		FailingSince: unlessZero(r.FailingSince),
		LastError:    r.LastError,
		Credentials:  r.Credentials,
		LastAnswer:   unlessZero(r.Answered),
		LastChange:   unlessZero(r.Changed),
		AgeSeconds:   ageOf(r).Seconds(),
		ColdStart:    r.ColdStart,
		Blocking:     r.Blocking,
		Index:        r.Index,
		Answers:      r.Answers,
		Changes:      r.Changes,
		Errors:       r.Errors,
		NotDialable:  r.Refused,
		Instances:    []instanceStatus{},
	}
	if r.Set == nil {
		return status
	}
	status.InstanceCount = r.Set.Len()
	for i := range r.Set.Len() {
		status.Instances = append(status.Instances, newInstanceStatus(r.Set.At(i)))
	}
	return status
}

func newInstanceStatus(e *endpoint.Endpoint) instanceStatus {
	return instanceStatus{
		ID: e.ID, Node: e.Node, Datacenter: e.Datacenter, Dial: e.Dial, Status: e.Status.String(), Weight: e.Weight,
	}
}

// ageOf is how long ago Consul was known to stand by the Set: 0 while it answers.
func ageOf(r discovery.Report) time.Duration {
	if r.FailingSince.IsZero() {
		return 0
	}
	return time.Since(r.FailingSince)
}

func unlessZero(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

// Interface guard
var _ caddy.AdminRouter = (*adminAPI)(nil)
