package selection

import "github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

// unmarshalNameOnly reads a policy that has no options.
func unmarshalNameOnly(d *caddyfile.Dispenser) error {
	d.Next() // consume policy name
	name := d.Val()
	if d.NextArg() {
		return d.ArgErr()
	}
	if d.Next() {
		return d.Errf("%s takes no block", name)
	}
	return nil
}
