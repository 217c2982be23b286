package consulupstreams

import (
	"errors"
	"fmt"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/caddy-consul/caddy-consul/internal/discovery"
	"github.com/caddy-consul/caddy-consul/internal/endpoint"
)

// showMetrics adds our metrics to Caddy's registry, which is new with each
// config.
func showMetrics(registry *prometheus.Registry) {
	if err := registry.Register(metrics); err != nil && !errors.As(err, new(prometheus.AlreadyRegisteredError)) {
		panic(err) // two metrics of ours have one name
	}
}

// metrics tells what the watchers report, at the time it is asked. There is
// nothing to keep in step, and what is followed no more is shown no more. Its
// labels are bounded by the number of watchers.
var metrics = newCollector()

type collector struct {
	instances, state, stale, coldStart, index, lastAnswer, lastChange, answers, changes, errors, refused *prometheus.Desc
}

func newCollector() *collector {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("caddy_consul_"+name, help, append([]string{"service", "query", "agent"}, labels...), nil)
	}
	return &collector{
		instances:  desc("instances", "Usable instances of the service.", "status"),
		state:      desc("state", "What the watcher is doing: 1 for the state that it is in.", "state"),
		stale:      desc("stale_seconds", "For how long Consul has not stood by the instances in use: 0 while it answers."),
		coldStart:  desc("cold_start", "1 while the instances in use are those that an earlier run stored."),
		index:      desc("index", "The index of Consul's last answer."),
		lastAnswer: desc("last_answer_timestamp_seconds", "When Consul answered last."),
		lastChange: desc("last_change_timestamp_seconds", "When the instances changed last."),
		answers:    desc("answers_total", "Answers of Consul."),
		changes:    desc("changes_total", "Answers that changed the instances."),
		errors:     desc("errors_total", "Queries that got no usable answer.", "kind"),
		refused:    desc("instances_refused", "Instances left out because they can't be dialled."),
	}
}

// Describe sends the descriptions of all metrics.
func (c *collector) Describe(descs chan<- *prometheus.Desc) {
	for _, desc := range []*prometheus.Desc{
		c.instances, c.state, c.stale, c.coldStart, c.index, c.lastAnswer, c.lastChange, c.answers, c.changes, c.errors, c.refused,
	} {
		descs <- desc
	}
}

// Collect sends the metrics of all watchers.
func (c *collector) Collect(sent chan<- prometheus.Metric) {
	seen := make(map[[3]string]int)
	for _, r := range discovery.Reports() {
		// watchers may differ in what no label shows, such as the token
		name := [3]string{r.Service, r.Query, r.Agent}
		if seen[name]++; seen[name] > 1 {
			r.Query = fmt.Sprintf("%s (%d)", r.Query, seen[name])
		}
		send := func(desc *prometheus.Desc, kind prometheus.ValueType, value float64, labels ...string) {
			sent <- prometheus.MustNewConstMetric(desc, kind, value, append([]string{r.Service, r.Query, r.Agent}, labels...)...)
		}
		for status, count := range countByStatus(r.Set) {
			send(c.instances, prometheus.GaugeValue, float64(count), endpoint.Status(status).String())
		}
		for _, state := range discovery.States {
			send(c.state, prometheus.GaugeValue, oneIf(state == r.State), string(state))
		}
		send(c.stale, prometheus.GaugeValue, ageOf(r).Seconds())
		send(c.coldStart, prometheus.GaugeValue, oneIf(r.ColdStart))
		send(c.index, prometheus.GaugeValue, float64(r.Index))
		if !r.Answered.IsZero() {
			send(c.lastAnswer, prometheus.GaugeValue, float64(r.Answered.UnixMilli())/1e3)
		}
		if !r.Changed.IsZero() {
			send(c.lastChange, prometheus.GaugeValue, float64(r.Changed.UnixMilli())/1e3)
		}
		send(c.answers, prometheus.CounterValue, float64(r.Answers))
		send(c.changes, prometheus.CounterValue, float64(r.Changes))
		for kind, count := range r.Errors {
			send(c.errors, prometheus.CounterValue, float64(count), kind)
		}
		send(c.refused, prometheus.GaugeValue, float64(r.Refused))
	}
}

// countByStatus counts the instances that are passing, warning and critical.
func countByStatus(set *endpoint.Set) (counts [endpoint.Maintenance]int) {
	if set == nil {
		return counts
	}
	for i := range set.Len() {
		counts[set.At(i).Status]++
	}
	return counts
}

func oneIf(is bool) float64 {
	if is {
		return 1
	}
	return 0
}
