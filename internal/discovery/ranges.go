package discovery

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
)

// Ranges says which addresses may be dialled, whatever is registered. With
// either list, only IP addresses may: what a host name stands for is known when
// it is dialled, and not before, and a unix socket has no address.
type Ranges struct {
	// Allow holds the ranges that an address must be in one of, if there are any.
	Allow []netip.Prefix `json:",omitempty"`

	// Deny holds the ranges that an address must not be in. It goes before Allow.
	Deny []netip.Prefix `json:",omitempty"`
}

// ParseRange reads a range of addresses in CIDR notation, or a single address.
func ParseRange(text string) (netip.Prefix, error) {
	prefix, err := netip.ParsePrefix(text)
	if address, addressErr := netip.ParseAddr(text); addressErr == nil && address.Zone() == "" {
		prefix, err = netip.PrefixFrom(address, address.BitLen()), nil
	}
	if err != nil || prefix.Addr().Is4In6() { // addresses are compared without that prefix
		return netip.Prefix{}, fmt.Errorf("'%s': want a range such as 10.0.0.0/8 or fd00::/8, or an IP address", text)
	}
	return prefix.Masked(), nil
}

// check reports why dial, a Caddy network address, may not be dialled.
func (r *Ranges) check(dial string) error {
	if len(r.Allow) == 0 && len(r.Deny) == 0 {
		return nil
	}
	host, _, err := net.SplitHostPort(dial)
	if err != nil {
		host = dial
	}
	address, err := netip.ParseAddr(host)
	if err != nil {
		return fmt.Errorf("%.100q may not be dialled: with allow_cidr or deny_cidr, only IP addresses may", host)
	}
	address = address.Unmap().WithZone("") // a range holds neither the mapped form nor zones
	if address.IsUnspecified() {           // the system takes it for this machine
		return fmt.Errorf("address %s may not be dialled: it is nobody's", address)
	}
	for _, denied := range r.Deny {
		if denied.Contains(address) {
			return fmt.Errorf("address %s may not be dialled: it is in %s of deny_cidr", address, denied)
		}
	}
	for _, allowed := range r.Allow {
		if allowed.Contains(address) {
			return nil
		}
	}
	if len(r.Allow) > 0 {
		return fmt.Errorf("address %s may not be dialled: it is not in allow_cidr", address)
	}
	return nil
}

// inWords says what the ranges are.
func inWords(prefixes []netip.Prefix) string {
	words := make([]string, len(prefixes))
	for i, prefix := range prefixes {
		words[i] = prefix.String()
	}
	return strings.Join(words, ",")
}
