package discovery

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"github.com/caddy-consul/caddy-consul/internal/endpoint"
)

// State is what a watcher is doing.
type State string

// The states of a watcher.
const (
	// StateStarting waits for the first answer.
	StateStarting State = "starting"

	// StateFollowing is up to date.
	StateFollowing State = "following"

	// StateFailing gets no usable answer. What was known last stays in use.
	StateFailing State = "failing"
)

// States are all there are.
var States = []State{StateStarting, StateFollowing, StateFailing}

// Report is what a watcher can say of itself. It has no secret in it.
type Report struct {
	Agent   string // where Consul is asked
	Service string
	Query   string // what else is asked for, empty for the plain service

	State        State
	FailingSince time.Time // zero while Consul answers
	LastError    string
	Credentials  string    // why they can't be read any more; empty while they can
	Answered     time.Time // when Consul answered last; zero before
	Changed      time.Time // when the Set changed last; zero before the first
	ColdStart    bool      // the Set is one stored by an earlier run
	Blocking     bool      // a query is held open, rather than sent when the tide turns

	Index   uint64
	Answers uint64
	Changes uint64
	Refused int               // instances that can't be dialled
	Errors  map[string]uint64 // by kind

	Set *endpoint.Set // nil before the first answer
}

// Reports returns what all watchers of the process say, in a stable order.
func Reports() []Report {
	var reports []Report
	watchers.Range(func(_, value any) bool {
		reports = append(reports, value.(*watcher).report())
		return true
	})
	slices.SortFunc(reports, func(a, b Report) int {
		return cmp.Or(strings.Compare(a.Service, b.Service), strings.Compare(a.Query, b.Query), strings.Compare(a.Agent, b.Agent))
	})
	return reports
}

func (w *watcher) report() Report {
	r := Report{
		Agent:       w.agent.config.Address,
		Service:     w.query.Service,
		Query:       w.query.details(),
		State:       StateFollowing,
		Credentials: w.agent.trouble.reason(),
		Answered:    timeOf(w.heard.Load()),
		Changed:     timeOf(w.changed.Load()),
		ColdStart:   w.cold.Load(),
		Blocking:    w.blocks.Load(),
		Index:       w.reached.Load(),
		Answers:     w.answers.Load(),
		Changes:     w.changes.Load(),
		Refused:     int(w.undialable.Load()),
		Errors:      w.errors.byKind(),
		Set:         w.set.Load(),
	}
	if failure := w.failing.Load(); failure != nil {
		r.State, r.FailingSince, r.LastError = StateFailing, failure.since, failure.err.Error()
	} else if r.Set == nil {
		r.State = StateStarting
	}
	return r
}

func timeOf(nanoseconds int64) time.Time {
	if nanoseconds == 0 {
		return time.Time{}
	}
	return time.Unix(0, nanoseconds)
}
