package discovery

import (
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/hashicorp/consul/api"

	"github.com/caddy-consul/caddy-consul/internal/endpoint"
)

// instance is what is used of an element of Consul's answer about a service.
type instance struct {
	Node *struct {
		Node       string
		Address    string
		Datacenter string
	}
	Service *struct {
		ID         string
		Service    string
		Address    string
		Port       int
		SocketPath string
		Tags       []string
		Meta       map[string]string
		Weights    *struct{ Passing, Warning int }
	}
	Checks []struct {
		CheckID string
		Status  string
	}
}

// status aggregates the checks of the instance as Consul does.
func (in *instance) status() endpoint.Status {
	worst := endpoint.Passing
	for _, check := range in.Checks {
		status := endpoint.Passing
		switch {
		case check.CheckID == api.NodeMaint || strings.HasPrefix(check.CheckID, api.ServiceMaintPrefix):
			status = endpoint.Maintenance
		case check.Status == api.HealthWarning:
			status = endpoint.Warning
		case check.Status != api.HealthPassing:
			status = endpoint.Critical
		}
		worst = max(worst, status)
	}
	return worst
}

// isMetBy reports whether an instance with that status is healthy enough.
func (h Health) isMetBy(status endpoint.Status) bool {
	switch h {
	case HealthAny:
		return status < endpoint.Maintenance
	case HealthWarning:
		return status <= endpoint.Warning
	default:
		return status == endpoint.Passing
	}
}

// weight is the instance's share of traffic.
func (w Weighting) weight(in *instance, status endpoint.Status) int {
	switch {
	case w.Equal:
		return 1
	case w.MetaKey != "":
		weight, err := strconv.Atoi(strings.TrimSpace(in.Service.Meta[w.MetaKey]))
		if err != nil || weight < 0 {
			return w.Default
		}
		return min(weight, MaxWeight)
	case in.Service.Weights == nil:
		return 1
	case status == endpoint.Warning:
		return min(max(in.Service.Weights.Warning, 0), MaxWeight)
	default:
		return min(max(in.Service.Weights.Passing, 0), MaxWeight)
	}
}

// endpoint turns an instance into the endpoint to be dialled. It is not wanted
// if the query does not ask for it; an error says why it can't be dialled.
func (q *Query) endpoint(in *instance) (e endpoint.Endpoint, wanted bool, err error) {
	status := in.status()
	if !q.Health.isMetBy(status) || q.excludes(in.Service.Tags) {
		return e, false, nil
	}
	dial, err := in.dialAddress()
	if err == nil {
		err = q.Ranges.check(dial)
	}
	if err != nil {
		return e, true, fmt.Errorf("instance %.100q on node %.100q: %w", in.Service.ID, in.Node.Node, err)
	}
	return endpoint.Endpoint{
		Dial:       dial,
		Weight:     q.Weighting.weight(in, status),
		Status:     status,
		Service:    in.Service.Service,
		ID:         in.Service.ID,
		Node:       in.Node.Node,
		Datacenter: in.Node.Datacenter,
		Tags:       in.Service.Tags,
		Meta:       in.Service.Meta,
	}, true, nil
}

// inOrder returns endpoints in a stable order: one that doesn't change keeps its
// place. With near, Consul's order stays, for it says which is nearest.
func (q *Query) inOrder(endpoints []*endpoint.Endpoint) []endpoint.Endpoint {
	if q.Near == "" && !slices.IsSortedFunc(endpoints, (*endpoint.Endpoint).Compare) {
		slices.SortStableFunc(endpoints, (*endpoint.Endpoint).Compare)
	}
	ordered := make([]endpoint.Endpoint, len(endpoints))
	for i, e := range endpoints {
		ordered[i] = *e
	}
	return ordered
}

// dialAddress is the Caddy network address of the instance: the service's own
// address, else its node's.
//
// Caddy expands placeholders in a dial address and reads slashes, spaces and
// port ranges in it, so what isn't plainly a host and a port is refused.
func (in *instance) dialAddress() (string, error) {
	if path := in.Service.SocketPath; path != "" {
		dial := "unix/" + path
		return dial, checkDial(dial)
	}
	host := in.Service.Address
	if host == "" {
		host = in.Node.Address
	}
	dial := net.JoinHostPort(host, strconv.Itoa(in.Service.Port))
	return dial, checkDial(dial)
}

const (
	maxHostLength = 253 // of a DNS name
	maxSocketPath = 107 // on Linux, with a NUL after it
)

// checkDial refuses what Caddy would not dial as it stands.
func checkDial(dial string) error {
	if path, isUnix := strings.CutPrefix(dial, "unix/"); isUnix {
		if !strings.HasPrefix(path, "/") || len(path) > maxSocketPath || strings.ContainsFunc(path, isUnsafeInPath) {
			return fmt.Errorf("socket path %.120q can't be dialled: want an absolute path of at most %d bytes without spaces, braces or bars", path, maxSocketPath)
		}
		return nil
	}
	host, port, err := net.SplitHostPort(dial)
	if err != nil || !isHost(host) {
		return fmt.Errorf("address %.100q can't be dialled: want an IP address or a host name", host)
	}
	if number, err := strconv.Atoi(port); err != nil || number < 1 || number > 65535 {
		return fmt.Errorf("port %s can't be dialled: want 1 to 65535", port)
	}
	return nil
}

// isHost reports whether text is an IP address or could be a host name.
func isHost(text string) bool {
	if strings.ContainsAny(text, ":%") { // an IPv6 address, or a mistake such as host:port
		_, err := netip.ParseAddr(text)
		return err == nil && !strings.ContainsFunc(text, isUnsafeInHost)
	}
	return text != "" && len(text) <= maxHostLength && !strings.ContainsFunc(text, isUnsafeInHost)
}

func isUnsafeInHost(r rune) bool {
	switch {
	case r >= '0' && r <= '9', r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z':
		return false
	}
	return !strings.ContainsRune(".-_:%", r)
}

func isUnsafeInPath(r rune) bool {
	return r <= ' ' || r == 0x7f || strings.ContainsRune("{}|", r)
}

// sameEndpoints reports whether two answers mean the same.
func sameEndpoints(a, b []endpoint.Endpoint) bool {
	return slices.EqualFunc(a, b, func(a, b endpoint.Endpoint) bool {
		return a.Dial == b.Dial && a.Weight == b.Weight && a.Status == b.Status &&
			a.Service == b.Service && a.ID == b.ID && a.Node == b.Node && a.Datacenter == b.Datacenter &&
			slices.Equal(a.Tags, b.Tags) && maps.Equal(a.Meta, b.Meta)
	})
}
