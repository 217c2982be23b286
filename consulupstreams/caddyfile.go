package consulupstreams

import (
	"strconv"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddy-consul/caddy-consul/internal/discovery"
)

// UnmarshalCaddyfile sets up the source from Caddyfile tokens. Syntax:
//
//	dynamic consul [<service>] {
//	    service            <service>
//	    allow              <name or pattern> ...
//	    allow_regexp       <expression>
//	    max_services       <number>
//	    tag                [!]<tag> ...
//	    filter             <expression>
//	    health             passing|warning|any
//	    allow_cidr         <range> ...
//	    deny_cidr          <range> ...
//	    weights            consul|equal
//	    weights            meta <key> [<default>]
//	    near               <node>
//	    consistency        default|stale|consistent
//	    wait               <duration>
//	    startup_timeout    <duration>
//	    serve_stale        forever|never|<duration>
//	    keep_last_on_empty <duration>
//
//	    address    <address>
//	    token      <token>
//	    token_file <path>
//	    datacenter <name>
//	    tls {
//	        ca          <path>
//	        cert        <path>
//	        key         <path>
//	        server_name <name>
//	        min_version tls1.2|tls1.3
//	        insecure_skip_verify
//	    }
//	}
//
// The service is named once, in either place. If its name has placeholders,
// allow or allow_regexp must say which names it may expand to. The connection's
// options default to those of the global option consul. For those who come from
// other plugins, refresh is accepted without effect, and grace_period as
// serve_stale.
func (u *Upstreams) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // consume the source's name
	start := *d
	once := make(options)
	if d.NextArg() {
		u.Service = d.Val()
		once["service"] = *d
		if err := locate(d, checkServiceName(u.Service)); err != nil {
			return err
		}
		if d.NextArg() {
			return d.ArgErr()
		}
	}
	for d.NextBlock(0) {
		switch d.Val() {
		case "tag", "allow_cidr", "deny_cidr": // of which there may be several, as of allow
		case "allow":
			once["allow"] = *d
		default:
			if err := once.take(d); err != nil {
				return err
			}
		}
		if err := u.unmarshalOption(d); err != nil {
			return err
		}
	}
	if u.Service == "" {
		return start.Err(errNoService.Error())
	}
	resolved := *u
	resolved.Service = caddy.NewReplacer().ReplaceKnown(u.Service, "") // as when it is provisioned
	at := once["service"]
	if !hasPlaceholder(resolved.Service) {
		for _, needless := range []string{"max_services", "allow_regexp", "allow"} {
			if option, given := once[needless]; given {
				at = option
			}
		}
	}
	return locate(&at, resolved.checkService())
}

func (u *Upstreams) unmarshalOption(d *caddyfile.Dispenser) error {
	switch d.Val() {
	case "service":
		if err := oneArg(d, &u.Service); err != nil {
			return err
		}
		return locate(d, checkServiceName(u.Service))

	case "allow":
		patterns := d.RemainingArgs()
		if len(patterns) == 0 {
			return d.ArgErr()
		}
		u.Allow = append(u.Allow, patterns...)
		return locate(d, checkAllow(patterns))

	case "allow_regexp":
		if err := oneArg(d, &u.AllowRegexp); err != nil {
			return err
		}
		_, err := compileAllowRegexp(u.AllowRegexp)
		return locate(d, err)

	case "max_services":
		var text string
		if err := oneArg(d, &text); err != nil {
			return err
		}
		number, err := strconv.Atoi(text)
		if err != nil || number < 1 {
			return d.Errf("max_services '%s': want a number of at least 1", text)
		}
		u.MaxServices = number
		return nil

	case "tag":
		tags := d.RemainingArgs()
		if len(tags) == 0 {
			return d.ArgErr()
		}
		u.Tag = append(u.Tag, tags...)
		return locate(d, checkTags(tags))

	case "allow_cidr":
		return unmarshalRanges(d, &u.AllowCIDR)

	case "deny_cidr":
		return unmarshalRanges(d, &u.DenyCIDR)

	case "filter":
		if err := oneArg(d, &u.Filter); err != nil {
			return err
		}
		return locate(d, checkFilter(u.Filter))

	case "health":
		if err := oneArg(d, &u.Health); err != nil {
			return err
		}
		return locate(d, checkHealth(u.Health))

	case "weights":
		u.Weights = new(Weights)
		return u.Weights.unmarshal(d)

	case "near":
		return oneArg(d, &u.Near)

	case "consistency":
		if err := oneArg(d, &u.Consistency); err != nil {
			return err
		}
		return locate(d, checkConsistency(u.Consistency))

	case "wait":
		if err := positiveDuration(d, &u.Wait); err != nil {
			return err
		}
		return locate(d, checkWait(u.Wait))

	case "startup_timeout":
		return positiveDuration(d, &u.StartupTimeout)

	case "serve_stale":
		return u.unmarshalServeStale(d)

	case "keep_last_on_empty":
		return positiveDuration(d, &u.KeepLastOnEmpty)

	case "refresh":
		return positiveDuration(d, &u.Refresh)

	case "grace_period":
		zero := *d
		if zero.NextArg() && (zero.Val() == "0" || zero.Val() == "0s") && !zero.NextArg() {
			u.GracePeriod = -1 // what zero means elsewhere: not at all
			d.NextArg()
			return nil
		}
		return positiveDuration(d, &u.GracePeriod)
	}
	known, err := u.Connection.unmarshalOption(d)
	if !known {
		return d.Errf("unrecognized option '%s' of the consul source", d.Val())
	}
	return err
}

// unmarshal reads the arguments of the option weights.
func (w *Weights) unmarshal(d *caddyfile.Dispenser) error {
	args := d.RemainingArgs()
	if len(args) == 0 {
		return d.ArgErr()
	}
	w.From = args[0]
	if w.From == "meta" {
		if len(args) > 1 {
			w.Key = args[1]
		}
		if len(args) > 2 {
			weight, err := strconv.Atoi(args[2])
			if err != nil || weight < 0 || weight > discovery.MaxWeight {
				return d.Errf("weights: default '%s': want a number from 0 to %d", args[2], discovery.MaxWeight)
			}
			w.Default = &weight
		}
		if len(args) > 3 {
			return d.ArgErr()
		}
	} else if len(args) > 1 {
		return d.ArgErr()
	}
	return locate(d, w.check())
}

func (u *Upstreams) unmarshalServeStale(d *caddyfile.Dispenser) error {
	var text string
	if err := oneArg(d, &text); err != nil {
		return err
	}
	switch text {
	case "forever":
		u.ServeStale = 0
		return nil
	case "never":
		u.ServeStale = -1
		return nil
	}
	limit, err := caddy.ParseDuration(text)
	if err != nil || limit <= 0 {
		return d.Errf("serve_stale '%s': want forever, never or a positive duration such as 24h", text)
	}
	u.ServeStale = caddy.Duration(limit)
	return nil
}

// positiveDuration reads the only argument of an option, a duration.
func positiveDuration(d *caddyfile.Dispenser, field *caddy.Duration) error {
	name := d.Val()
	var text string
	if err := oneArg(d, &text); err != nil {
		return err
	}
	duration, err := caddy.ParseDuration(text)
	if err != nil || duration <= 0 {
		return d.Errf("%s '%s': want a positive duration such as 3s", name, text)
	}
	*field = caddy.Duration(duration)
	return nil
}

// Interface guard
var _ caddyfile.Unmarshaler = (*Upstreams)(nil)
