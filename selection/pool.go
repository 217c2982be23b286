package selection

import (
	"net/http"
	"slices"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-consul/caddy-consul/internal/endpoint"
)

// poolOnStack is the size of the largest pool whose weights cost no allocation.
const poolOnStack = 128

// usableWeights appends to dst what each upstream of pool counts for at the
// moment: its weight if it is available, else 0. If all that are available
// weigh 0, each of them counts for 1. It reports whether any counts.
func usableWeights(dst []int, r *http.Request, pool reverseproxy.UpstreamPool) (weights []int, ok bool) {
	weights = endpoint.Weights(slices.Grow(dst, len(pool)), r, pool)
	for i, u := range pool {
		if weights[i] > 0 && u.Available() {
			ok = true
		} else {
			weights[i] = 0
		}
	}
	if ok {
		return weights, true
	}
	for i, u := range pool {
		if u.Available() {
			weights[i] = 1
			ok = true
		}
	}
	return weights, ok
}

// ifAvailable returns an upstream that is the only one, or nil. It is what a
// policy is asked for as a rule, when the source has nominated.
func ifAvailable(only *reverseproxy.Upstream) *reverseproxy.Upstream {
	if only.Available() {
		return only
	}
	return nil
}
