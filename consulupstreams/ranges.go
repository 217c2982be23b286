package consulupstreams

import (
	"fmt"
	"net/netip"

	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddy-consul/caddy-consul/internal/discovery"
)

// unmarshalRanges reads the arguments of allow_cidr or deny_cidr.
func unmarshalRanges(d *caddyfile.Dispenser, field *[]string) error {
	option := d.Val()
	texts := d.RemainingArgs()
	if len(texts) == 0 {
		return d.ArgErr()
	}
	*field = append(*field, texts...)
	return locate(d, checkRanges(option, texts))
}

func checkRanges(option string, texts []string) error {
	for _, text := range texts {
		if _, err := discovery.ParseRange(text); err != nil {
			return fmt.Errorf("%s %w", option, err)
		}
	}
	return nil
}

// ranges reads ranges that have been checked.
func ranges(texts []string) []netip.Prefix {
	var prefixes []netip.Prefix
	for _, text := range texts {
		prefix, _ := discovery.ParseRange(text)
		prefixes = append(prefixes, prefix)
	}
	return prefixes
}
