package consulupstreams

import (
	"net/http"
	"strings"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-consul/caddy-consul/internal/endpoint"
)

const placeholderPrefix = "http.reverse_proxy.upstreams.consul."

// addPlaceholders makes the placeholders of the request tell which instance it
// went to. They are worked out when they are asked for.
func addPlaceholders(r *http.Request, o *endpoint.Offer) {
	repl, ok := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	if !ok {
		return
	}
	repl.Map(func(key string) (any, bool) {
		field, ours := strings.CutPrefix(key, placeholderPrefix)
		if !ours {
			return nil, false
		}
		e := o.Chosen(r)
		if e == nil {
			return nil, false
		}
		return placeholder(e, field)
	})
}

func placeholder(e *endpoint.Endpoint, field string) (any, bool) {
	switch field {
	case "id":
		return e.ID, true
	case "service":
		return e.Service, true
	case "node":
		return e.Node, true
	case "datacenter":
		return e.Datacenter, true
	case "status":
		return e.Status.String(), true
	case "weight":
		return e.Weight, true
	case "tags":
		return strings.Join(e.Tags, ","), true
	}
	if key, ok := strings.CutPrefix(field, "meta."); ok {
		return e.Meta[key], true
	}
	return nil, false
}
