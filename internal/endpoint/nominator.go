package endpoint

import "net/http"

// Nominator is a selection policy that can choose from a Set before Caddy has
// seen its upstreams, at a cost that does not grow with the Set. The source
// asks it for a nominee and gives Caddy that one alone.
type Nominator interface {
	// Nominate draws the index of an endpoint of set, which is not empty.
	// Every call is a new draw: the source draws again when it can't use the
	// nominee, so that the shares of the rest stay in proportion.
	Nominate(set *Set, r *http.Request) int

	// Share is the share of traffic that the policy means e to have, relative
	// to the other endpoints. The source draws by it when too few endpoints are
	// usable for Nominate to hit one.
	Share(e *Endpoint) int
}
