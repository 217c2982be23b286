package discovery

import (
	"encoding/json"
	"maps"
	"net/url"
	"strings"
	"time"
)

// Health says how healthy an instance must be to be used.
type Health string

// The levels of health.
const (
	// HealthPassing takes instances whose checks all pass.
	HealthPassing Health = "passing"

	// HealthWarning takes instances in a warning state too.
	HealthWarning Health = "warning"

	// HealthAny takes every instance that isn't in maintenance mode.
	HealthAny Health = "any"
)

// Consistency is the consistency mode of a query, as Consul defines it.
type Consistency string

// The consistency modes.
const (
	ConsistencyDefault    Consistency = "default"
	ConsistencyStale      Consistency = "stale"
	ConsistencyConsistent Consistency = "consistent"
)

// Weighting says where the weight of an instance comes from.
type Weighting struct {
	// MetaKey names the key of the service's meta data that holds the weight.
	MetaKey string

	// Default is the weight where the meta data has none, or no usable one.
	Default int

	// Equal gives every instance the weight 1.
	Equal bool
}

// MaxWeight is the largest weight of an instance, as in Consul.
const MaxWeight = 65535

// Query is a question about one service. Whatever changes the answer is part
// of it.
type Query struct {
	Service     string
	Tags        []string // all of these
	NotTags     []string // none of these
	Filter      string   // an expression in Consul's filter language
	Health      Health
	Weighting   Weighting
	Datacenter  string // empty: the agent's own
	Near        string
	Consistency Consistency
	Ranges      Ranges // what of it may be dialled

	// KeepLastOnEmpty is for how long an answer without a usable instance is not
	// believed, if there were some before.
	KeepLastOnEmpty time.Duration

	// Wait is how long Consul is to hold a blocking query. At most 10 minutes.
	Wait time.Duration
}

// key tells one query from another.
func (q *Query) key() string {
	text, err := json.Marshal(q)
	if err != nil {
		panic(err) // strings and numbers can always be marshalled
	}
	return string(text)
}

// details says in a few words what the query asks for beyond the service.
func (q *Query) details() string {
	var parts []string
	add := func(name, value string) {
		if value != "" {
			parts = append(parts, name+"="+value)
		}
	}
	add("datacenter", q.Datacenter)
	add("tag", strings.Join(q.Tags, ","))
	add("not_tag", strings.Join(q.NotTags, ","))
	add("filter", q.Filter)
	if q.Health != "" && q.Health != HealthPassing {
		add("health", string(q.Health))
	}
	switch {
	case q.Weighting.Equal:
		add("weights", "equal")
	case q.Weighting.MetaKey != "":
		add("weights", "meta "+q.Weighting.MetaKey)
	}
	add("near", q.Near)
	if q.Consistency != "" && q.Consistency != ConsistencyDefault {
		add("consistency", string(q.Consistency))
	}
	add("allow_cidr", inWords(q.Ranges.Allow))
	add("deny_cidr", inWords(q.Ranges.Deny))
	if q.KeepLastOnEmpty > 0 {
		add("keep_last_on_empty", q.KeepLastOnEmpty.String())
	}
	return strings.Join(parts, " ")
}

// question is a query as Consul's HTTP API takes it.
type question struct {
	path   string
	params url.Values
	wait   time.Duration // how long Consul is to hold it, if it blocks
}

// newQuestion starts the question for a path of the API.
func newQuestion(path, datacenter string, consistency Consistency, wait time.Duration) question {
	params := url.Values{}
	if datacenter != "" {
		params.Set("dc", datacenter)
	}
	switch consistency {
	case ConsistencyStale, ConsistencyConsistent:
		params.Set(string(consistency), "")
	}
	return question{path, params, wait}
}

// ofTheLeader is the same question with Consul's strongest consistency: the
// leader answers, after it has made sure that it is one and knows all.
func (q question) ofTheLeader() question {
	q.params = maps.Clone(q.params)
	q.params.Del(string(ConsistencyStale))
	q.params.Set(string(ConsistencyConsistent), "")
	return q
}

func (q question) isOfTheLeader() bool { return q.params.Has(string(ConsistencyConsistent)) }

// question is what the query asks of Consul.
func (q *Query) question() question {
	question := newQuestion("/v1/health/service/"+url.PathEscape(q.Service), q.Datacenter, q.Consistency, q.Wait)
	params := question.params
	if q.Health == HealthPassing {
		params.Set("passing", "1")
	}
	for _, tag := range q.Tags {
		params.Add("tag", tag)
	}
	if q.Filter != "" {
		params.Set("filter", q.Filter)
	}
	if q.Near != "" {
		params.Set("near", q.Near)
	}
	return question
}

// excludes reports whether an instance with these tags is unwanted. Consul
// compares tags without regard to case; so do we.
func (q *Query) excludes(tags []string) bool {
	for _, unwanted := range q.NotTags {
		for _, tag := range tags {
			if strings.EqualFold(tag, unwanted) {
				return true
			}
		}
	}
	return false
}
