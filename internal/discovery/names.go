package discovery

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
)

// names follows which services there are, so that a name that comes with a
// request is known to be none without asking Consul.
type names struct {
	follower
	present atomic.Pointer[map[string]struct{}] // in lower case, as Consul compares them
	first   chan struct{}                       // closed with the first answer

	// the goroutine's own
	body bytes.Buffer // of the last answer that was read
	last bodyDigest   // of the last one that was taken
}

func newNames(agent *agent, datacenter string, consistency Consistency, wait time.Duration, log *logSource) *names {
	n := &names{first: make(chan struct{})}
	n.follower = follower{
		agent:    agent,
		question: newQuestion("/v1/catalog/services", datacenter, consistency, wait),
		subject:  zap.String("catalog", "services"),
		read:     n.read,
		take:     n.take,
	}
	n.loggers.add(log)
	n.start()
	return n
}

func (n *names) read(body io.Reader) error {
	n.body.Reset()
	_, err := n.body.ReadFrom(body)
	return err
}

func (n *names) take(a *answer) error {
	digest := bodyDigest{n.body.Len(), hashOf(n.body.Bytes()), a.filtered}
	if digest == n.last {
		return nil
	}
	if a.outdated {
		return errUnconfirmed
	}
	var services map[string]json.RawMessage
	if err := json.Unmarshal(n.body.Bytes(), &services); err != nil {
		return &answerError{fmt.Errorf("decoding the list of services of %d bytes: %w", n.body.Len(), err)}
	}
	if services == nil {
		return &answerError{errors.New("the answer is no list of services")}
	}
	if old := n.present.Load(); len(services) == 0 && a.filtered && old != nil && len(*old) > 0 {
		return errRightsLost
	}
	present := make(map[string]struct{}, len(services))
	for name := range services {
		present[strings.ToLower(name)] = struct{}{}
	}
	if n.present.Swap(&present) == nil {
		close(n.first)
	}
	n.last = digest
	return nil
}

// has reports whether there is a service of that name, which is in lower case.
func (n *names) has(name string) bool {
	present := n.present.Load()
	if present == nil {
		return false
	}
	_, ok := (*present)[name]
	return ok
}

// bodyDigest tells whether an answer repeats the one before, which then need
// not be read again.
type bodyDigest struct {
	size     int
	sum      uint64
	filtered bool
}
