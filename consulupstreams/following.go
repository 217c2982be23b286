package consulupstreams

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"path"
	"regexp"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/hashicorp/consul/api"
	"go.uber.org/zap"

	"github.com/caddy-consul/caddy-consul/internal/discovery"
	"github.com/caddy-consul/caddy-consul/internal/endpoint"
)

const (
	defaultMaxServices = 100

	// maxNameLength is that of a DNS name, which a service's name has to fit in.
	maxNameLength = 253
)

// following finds the subscription to the service that a request is for.
type following interface {
	// of returns nil if Consul is known to have no such service, or has not
	// said so in time.
	of(r *http.Request) (*discovery.Subscription, error)
	KeepIn(store discovery.Store)
	Close()
}

// startFollowing follows the service, or if its name comes with requests, opens
// the directory of those that may be asked for.
func (u *Upstreams) startFollowing(config *api.Config, logger *zap.Logger) (following, error) {
	if !hasPlaceholder(u.Service) {
		subscription, err := discovery.Subscribe(config, u.query(), logger)
		if err != nil {
			return nil, err
		}
		return fixedService{subscription}, nil
	}
	limit := u.MaxServices
	if limit == 0 {
		limit = defaultMaxServices
	}
	query := u.query()
	query.Service = ""
	allowed, err := newAllowList(u.Allow, u.AllowRegexp)
	if err != nil {
		return nil, err
	}
	directory, err := discovery.OpenDirectory(config, query, limit, logger)
	if err != nil {
		return nil, err
	}
	return &namedService{
		Directory: directory, template: u.Service, allowed: allowed, timeout: time.Duration(u.StartupTimeout),
	}, nil
}

// fixedService is the one service of the config.
type fixedService struct{ *discovery.Subscription }

func (f fixedService) of(*http.Request) (*discovery.Subscription, error) { return f.Subscription, nil }

// namedService is the service that the request names.
type namedService struct {
	*discovery.Directory
	template string
	allowed  *allowList
	timeout  time.Duration
}

var errNotAllowed = errors.New("the request names a service that is not allowed")

func (n *namedService) of(r *http.Request) (*discovery.Subscription, error) {
	repl, ok := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	if !ok {
		return nil, errors.New("the request has no placeholders to name a service with")
	}
	name := repl.ReplaceAll(n.template, "")
	if !n.allowed.has(name) {
		return nil, errNotAllowed
	}
	subscription, err := n.Service(r.Context(), name, n.timeout)
	if subscription == nil && err == nil {
		err = n.LastError()
	}
	return subscription, err
}

// instances returns the Set to serve the request from, or why there is none.
func (u *Upstreams) instances(r *http.Request) (*endpoint.Set, error) {
	subscription, err := u.follow.of(r)
	if err != nil {
		return nil, err
	}
	if subscription == nil {
		return nil, errors.New("Consul knows no service of the name that the request has")
	}
	return u.servable(r.Context(), subscription)
}

// servable returns the Set of a subscription unless there is a reason against
// serving it.
func (u *Upstreams) servable(ctx context.Context, subscription *discovery.Subscription) (*endpoint.Set, error) {
	set := subscription.Await(ctx, time.Duration(u.StartupTimeout))
	if set == nil {
		if err := subscription.LastError(); err != nil {
			return nil, err
		}
		return nil, fmt.Errorf("Consul has not answered yet about the service %q", u.Service)
	}
	if limit := time.Duration(u.ServeStale); limit != 0 {
		if failing := subscription.FailingFor(); failing > max(limit, 0) {
			return nil, fmt.Errorf("the instances of the service %q have been stale for %s, longer than serve_stale allows",
				u.Service, failing.Round(time.Second))
		}
	}
	if set.Len() == 0 {
		return nil, fmt.Errorf("the service %q has no usable instance", u.Service)
	}
	return set, nil
}

func hasPlaceholder(name string) bool { return strings.ContainsAny(name, "{}") }

// checkService reports what is wrong with the name of the service, and with what
// it may expand to.
func (u *Upstreams) checkService() error {
	if err := checkServiceName(u.Service); err != nil {
		return err
	}
	dynamic, guarded := hasPlaceholder(u.Service), len(u.Allow) > 0 || u.AllowRegexp != ""
	switch {
	case dynamic && !guarded:
		return fmt.Errorf("service %q has placeholders, so allow or allow_regexp must say which names it may expand to", u.Service)
	case !dynamic && (guarded || u.MaxServices != 0):
		return fmt.Errorf("allow, allow_regexp and max_services need placeholders in the name of the service; %q has none", u.Service)
	case u.MaxServices < 0:
		return fmt.Errorf("max_services %d: want a number of at least 1", u.MaxServices)
	}
	_, err := newAllowList(u.Allow, u.AllowRegexp)
	return err
}

// checkServiceName reports what is wrong with a name, which may have
// placeholders.
func checkServiceName(name string) error {
	if hasPlaceholder(name) {
		return nil
	}
	if !isServiceName(name) {
		return fmt.Errorf("service name %q: want 1 to %d characters without spaces, slashes and other special characters", name, maxNameLength)
	}
	return nil
}

func isServiceName(name string) bool {
	return strings.Trim(name, ".") != "" && len(name) <= maxNameLength && !strings.ContainsFunc(name, func(r rune) bool {
		return r <= ' ' || r == 0x7f || strings.ContainsRune("/\\?#%{}", r)
	})
}

// allowList says which names requests may ask for.
type allowList struct {
	names    map[string]bool
	patterns []string
	regexp   *regexp.Regexp
}

func newAllowList(names []string, expression string) (*allowList, error) {
	if err := checkAllow(names); err != nil {
		return nil, err
	}
	list := &allowList{names: make(map[string]bool)}
	for _, name := range names {
		if name = strings.ToLower(name); strings.ContainsAny(name, "*?[") {
			list.patterns = append(list.patterns, name)
		} else {
			list.names[name] = true
		}
	}
	if expression == "" {
		return list, nil
	}
	var err error
	list.regexp, err = compileAllowRegexp(expression)
	return list, err
}

// checkAllow reports a pattern that can't be understood.
func checkAllow(patterns []string) error {
	for _, pattern := range patterns {
		if _, err := path.Match(pattern, ""); err != nil || pattern == "" {
			return fmt.Errorf("allow %q: want the name of a service or a pattern with * and ?", pattern)
		}
	}
	return nil
}

func compileAllowRegexp(expression string) (*regexp.Regexp, error) {
	compiled, err := regexp.Compile("^(?:" + expression + ")$")
	if err == nil { // by itself too, lest it close our parenthesis and escape the anchors
		_, err = regexp.Compile(expression)
	}
	if err != nil {
		return nil, fmt.Errorf("allow_regexp %q: %w", expression, err)
	}
	return compiled, nil
}

// has reports whether requests may ask for name.
func (l *allowList) has(name string) bool {
	if !isServiceName(name) {
		return false
	}
	name = strings.ToLower(name)
	if l.names[name] {
		return true
	}
	for _, pattern := range l.patterns {
		if ok, _ := path.Match(pattern, name); ok {
			return true
		}
	}
	return l.regexp != nil && l.regexp.MatchString(name)
}
