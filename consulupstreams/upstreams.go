package consulupstreams

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-bexpr"
	"go.uber.org/zap"

	"github.com/caddy-consul/caddy-consul/internal/discovery"
)

func init() {
	caddy.RegisterModule(Upstreams{})
}

const (
	defaultStartupTimeout = 3 * time.Second

	// defaultWait is Consul's own default.
	defaultWait = 5 * time.Minute

	// maxWait is what Consul holds a query at most.
	maxWait = 10 * time.Minute
)

// Upstreams provides upstreams from a service in Consul's catalogue. It follows
// the service's health with a blocking query, so that a change reaches the
// proxy within milliseconds, and serves each request from memory: no request
// waits for Consul once a first answer is there. While Consul can't be reached,
// the instances known last are served.
//
// Traffic is shared in proportion to the weights that the instances have in
// Consul, unless a load balancing policy that knows no weights is configured.
// With the `consul_*` policies, with `random`, `random_choose` and without any
// policy, the cost of a request does not grow with the number of instances.
//
// Sources that ask the same of the same Consul share one query, and keep it
// when the config is reloaded.
//
// These placeholders tell, once an upstream is chosen, which instance it is:
//
// Placeholder | Description
// ------------|-------------
// `{http.reverse_proxy.upstreams.consul.id}` | The ID of the service instance
// `{http.reverse_proxy.upstreams.consul.service}` | The name of the service
// `{http.reverse_proxy.upstreams.consul.node}` | The node that the instance is registered on
// `{http.reverse_proxy.upstreams.consul.datacenter}` | The datacenter of the node
// `{http.reverse_proxy.upstreams.consul.status}` | `passing`, `warning` or `critical`
// `{http.reverse_proxy.upstreams.consul.weight}` | The instance's weight
// `{http.reverse_proxy.upstreams.consul.tags}` | The tags of the instance, joined with commas
// `{http.reverse_proxy.upstreams.consul.meta.*}` | The instance's meta data, by key
type Upstreams struct {
	// The name of the service in Consul. Required.
	//
	// Placeholders of the request may be used, such as
	// `{http.request.host.labels.2}`; then `allow` or `allow_regexp` is required.
	// A service is followed from the first request for it on, and until there
	// has been none for 10 minutes. Names that no service has are refused from
	// memory, without asking Consul.
	Service string `json:"service,omitempty"`

	// The names that a `service` with placeholders may expand to. `*` stands for
	// any run of characters, `?` for one. Letter case does not matter. It is a
	// wall between what clients send and the services that are not for them.
	Allow []string `json:"allow,omitempty"`

	// A regular expression, in Go's syntax, that matches names which a `service`
	// with placeholders may expand to, as a whole, in lower case.
	AllowRegexp string `json:"allow_regexp,omitempty"`

	// How many services are followed at once, if `service` has placeholders. When
	// one more is asked for, the one used least recently makes room. Default:
	// `100`.
	MaxServices int `json:"max_services,omitempty"`

	// Tags that an instance must have; with a leading `!`, tags that it must not
	// have. Letter case does not matter. Default: any instance.
	Tag []string `json:"tag,omitempty"`

	// An expression in [Consul's filter
	// language](https://developer.hashicorp.com/consul/api-docs/features/filtering)
	// that an instance must match, such as `Service.Meta.version == "2"`.
	// Default: any instance.
	Filter string `json:"filter,omitempty"`

	// How healthy an instance must be: `passing` if all its checks must pass,
	// `warning` if checks in a warning state will do, `any` for every instance
	// that isn't in maintenance mode. Default: `passing`.
	Health string `json:"health,omitempty"`

	// The ranges of addresses, in CIDR notation, that an instance's must be in one
	// of. It bounds what a registration in Consul, by whoever may make one, can
	// have Caddy connect to. With `allow_cidr` or `deny_cidr`, only IP addresses
	// are dialled: an instance with a host name or a unix socket is left out.
	// Default: any address.
	AllowCIDR []string `json:"allow_cidr,omitempty"`

	// The ranges of addresses, in CIDR notation, that an instance's must not be
	// in, such as `169.254.0.0/16`. It goes before `allow_cidr`. Default: none.
	DenyCIDR []string `json:"deny_cidr,omitempty"`

	// Where the weights of the instances come from. Default: their weights in
	// Consul.
	Weights *Weights `json:"weights,omitempty"`

	// The node to sort instances by, nearest first, by the round-trip time that
	// Consul estimates; `_agent` is the agent that is asked. The order matters
	// to policies such as `first`. Consul serves such queries less cheaply.
	// Default: no sorting.
	Near string `json:"near,omitempty"`

	// The consistency mode of the queries: `default`, `stale` (any server
	// answers, even one without a leader) or `consistent` (the leader first
	// asks a quorum). Default: `default`.
	Consistency string `json:"consistency,omitempty"`

	// How long Consul is asked to hold a query while nothing changes, from `1s`
	// to `10m`. A connection to Consul that dies without a trace is noticed after
	// this time at the latest, so less is safer and costs Consul more queries.
	// Default: `5m`.
	Wait caddy.Duration `json:"wait,omitempty"`

	// How long requests wait for Consul's first answer, counted from when the
	// service began to be followed; after that they are refused at once until
	// it comes. Default: `3s`.
	StartupTimeout caddy.Duration `json:"startup_timeout,omitempty"`

	// For how long the instances known last are served while Consul can't be
	// reached. Negative: not at all. Default: for ever.
	ServeStale caddy.Duration `json:"serve_stale,omitempty"`

	// For how long an answer without a usable instance is not believed, if there
	// were some before; meanwhile those are served. It protects from a catalogue
	// that is wiped by mistake, at the price of errors when a service really
	// goes. Default: an empty answer is believed at once.
	KeepLastOnEmpty caddy.Duration `json:"keep_last_on_empty,omitempty"`

	// Accepted for those who come from other plugins, without effect: changes
	// are followed as they happen.
	Refresh caddy.Duration `json:"refresh,omitempty"`

	// Another name of `serve_stale`, for those who come from other plugins.
	GracePeriod caddy.Duration `json:"grace_period,omitempty"`

	Connection

	follow      following
	offering    offering
	hasFallback bool // the proxy has static upstreams
}

// Weights says where the weights of the instances come from.
type Weights struct {
	// `consul` for the weights registered with the instance, by its status;
	// `meta` for a key of its meta data; `equal` for none. Default: `consul`.
	From string `json:"from,omitempty"`

	// The key of the meta data that holds the weight, from 0 to 65535, if from
	// is `meta`.
	Key string `json:"key,omitempty"`

	// The weight of an instance whose meta data has no usable one, from 0 to
	// 65535. Default: 1.
	Default *int `json:"default,omitempty"`
}

// CaddyModule returns the Caddy module information.
func (Upstreams) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.reverse_proxy.upstreams.consul",
		New: func() caddy.Module { return new(Upstreams) },
	}
}

// Provision starts to follow the service, or joins those who do. It does not
// wait for Consul.
func (u *Upstreams) Provision(ctx caddy.Context) error {
	app, err := ctx.AppIfConfigured("consul")
	switch {
	case err == nil:
		u.Connection = u.Connection.orElse(app.(*App).Connection)
	case !errors.Is(err, caddy.ErrNotConfigured):
		return err
	}
	if u.Refresh != 0 {
		ctx.Logger().Warn("refresh has no effect: changes in Consul are followed as they happen; remove it",
			zap.String("service", u.Service))
	}
	if u.GracePeriod != 0 && u.ServeStale == 0 {
		u.ServeStale, u.GracePeriod = u.GracePeriod, 0
	}
	if u.Wait == 0 {
		u.Wait = caddy.Duration(defaultWait)
	}
	if u.StartupTimeout == 0 {
		u.StartupTimeout = caddy.Duration(defaultStartupTimeout)
	}
	u.Service = caddy.NewReplacer().ReplaceKnown(u.Service, "") // {env.*}; the request's stay
	if err := u.check(); err != nil {
		return err
	}
	config, err := u.resolve()
	if err != nil {
		return err
	}
	if config.TLSConfig.InsecureSkipVerify { // by $CONSUL_HTTP_SSL_VERIFY too
		ctx.Logger().Warn("insecure_skip_verify is on: Consul's certificate is not verified",
			zap.String("service", u.Service))
	}
	if u.follow, err = u.startFollowing(config, ctx.Logger()); err != nil {
		return err
	}
	u.follow.KeepIn(ctx.Storage())
	showMetrics(ctx.GetMetricsRegistry())
	u.join(ctx)
	return nil
}

// join finds the proxy that u is the source of, and settles how requests are
// offered upstreams.
func (u *Upstreams) join(ctx caddy.Context) {
	ancestors := ctx.Modules()
	var proxy *reverseproxy.Handler
	if len(ancestors) > 1 { // the last one is u itself
		proxy, _ = ancestors[len(ancestors)-2].(*reverseproxy.Handler)
	}
	if proxy == nil { // under another source, which needs the whole list
		u.offering = whole{}
		return
	}
	u.hasFallback = len(proxy.Upstreams) > 0
	u.offering = offeringFor(proxy, u)
}

// Validate refuses a config that can't work, whatever Consul does.
func (u *Upstreams) Validate() error { return u.check() }

// Cleanup stops following the service, unless another config or source still
// needs it. Requests of the old config may go on being served.
func (u *Upstreams) Cleanup() error {
	if u.follow != nil {
		u.follow.Close()
	}
	return nil
}

// check reports what is wrong with the config.
func (u *Upstreams) check() error {
	switch {
	case u.Service == "":
		return errNoService
	case u.GracePeriod != 0 && u.ServeStale != 0:
		return errors.New("grace_period is another name of serve_stale: remove one")
	case u.StartupTimeout < 0:
		return errors.New("startup_timeout must not be negative")
	case u.KeepLastOnEmpty < 0:
		return errors.New("keep_last_on_empty must not be negative")
	}
	return errors.Join(
		u.checkService(), checkTags(u.Tag), checkFilter(u.Filter), checkHealth(u.Health),
		checkRanges("allow_cidr", u.AllowCIDR), checkRanges("deny_cidr", u.DenyCIDR),
		u.Weights.check(), checkConsistency(u.Consistency), checkWait(u.Wait),
	)
}

var errNoService = errors.New("the name of a service is missing: write dynamic consul <service>")

func checkTags(tags []string) error {
	for _, tag := range tags {
		if strings.TrimPrefix(tag, "!") == "" {
			return errors.New("a tag is empty")
		}
	}
	return nil
}

// checkFilter parses a filter as Consul does, and checks that it asks for
// fields that there are.
func checkFilter(filter string) error {
	if filter == "" {
		return nil
	}
	if _, err := bexpr.CreateFilter(filter, nil, []*api.ServiceEntry(nil)); err != nil {
		return fmt.Errorf("filter %q is not one that Consul understands: %w", filter, err)
	}
	return nil
}

func checkHealth(health string) error {
	switch discovery.Health(health) {
	case "", discovery.HealthPassing, discovery.HealthWarning, discovery.HealthAny:
		return nil
	}
	return fmt.Errorf("health '%s' is not known: want passing, warning or any", health)
}

func checkConsistency(mode string) error {
	switch discovery.Consistency(mode) {
	case "", discovery.ConsistencyDefault, discovery.ConsistencyStale, discovery.ConsistencyConsistent:
		return nil
	}
	return fmt.Errorf("consistency '%s' is not known: want default, stale or consistent", mode)
}

func checkWait(wait caddy.Duration) error {
	if wait == 0 || time.Duration(wait) >= time.Second && time.Duration(wait) <= maxWait {
		return nil
	}
	return fmt.Errorf("wait '%s': want 1s to 10m", time.Duration(wait))
}

func (w *Weights) check() error {
	if w == nil {
		return nil
	}
	switch w.From {
	case "", "consul", "equal":
		if w.Key != "" || w.Default != nil {
			return errors.New("weights: a key or a default goes with meta only")
		}
	case "meta":
		if w.Key == "" {
			return errors.New("weights meta needs the key of the meta data that holds the weight")
		}
		if w.Default != nil && (*w.Default < 0 || *w.Default > discovery.MaxWeight) {
			return fmt.Errorf("weights: the default %d is out of range: want 0 to %d", *w.Default, discovery.MaxWeight)
		}
	default:
		return fmt.Errorf("weights '%s' are not known: want consul, meta <key> or equal", w.From)
	}
	return nil
}

// query is the config as a question to Consul.
func (u *Upstreams) query() discovery.Query {
	q := discovery.Query{
		Service:     u.Service,
		Filter:      u.Filter,
		Health:      discovery.Health(u.Health),
		Datacenter:  caddy.NewReplacer().ReplaceAll(u.Datacenter, ""),
		Near:        u.Near,
		Consistency: discovery.Consistency(u.Consistency),
		Wait:        time.Duration(u.Wait),

		KeepLastOnEmpty: time.Duration(u.KeepLastOnEmpty),
		Ranges:          discovery.Ranges{Allow: ranges(u.AllowCIDR), Deny: ranges(u.DenyCIDR)},
	}
	if q.Health == "" {
		q.Health = discovery.HealthPassing
	}
	if q.Consistency == "" {
		q.Consistency = discovery.ConsistencyDefault
	}
	for _, tag := range u.Tag {
		if unwanted, isNot := strings.CutPrefix(tag, "!"); isNot {
			q.NotTags = append(q.NotTags, unwanted)
		} else {
			q.Tags = append(q.Tags, tag)
		}
	}
	if u.Weights != nil {
		q.Weighting = u.Weights.weighting()
	}
	return q
}

// weighting is w as part of a query.
func (w *Weights) weighting() discovery.Weighting {
	switch w.From {
	case "equal":
		return discovery.Weighting{Equal: true}
	case "meta":
		weighting := discovery.Weighting{MetaKey: w.Key, Default: 1}
		if w.Default != nil {
			weighting.Default = *w.Default
		}
		return weighting
	}
	return discovery.Weighting{}
}

// Interface guards
var (
	_ caddy.Provisioner           = (*Upstreams)(nil)
	_ caddy.Validator             = (*Upstreams)(nil)
	_ caddy.CleanerUpper          = (*Upstreams)(nil)
	_ reverseproxy.UpstreamSource = (*Upstreams)(nil)
)
