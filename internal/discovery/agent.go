package discovery

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/consul/api"
)

const (
	// answerSlack is what a query may take beyond the time that Consul was
	// asked to hold it: connecting, and reading a large answer.
	answerSlack = 15 * time.Second

	// maxBlocked bounds the queries held open at an agent that speaks HTTP/1.1,
	// each of which holds a connection. The agent allows 200 connections to all
	// that runs at one address (limits.http_max_conns_per_client).
	maxBlocked = 64

	// maxSweeping bounds the short queries that are under way at once instead.
	maxSweeping = 4

	// credentialsPoll is how often the files with a token, keys and
	// certificates are looked at. Polling follows renames and swapped symbolic
	// links alike, on every file system.
	credentialsPoll = 500 * time.Millisecond
)

// agent is a connection to one Consul agent, shared by the watchers that ask
// it. Its credentials follow their files.
type agent struct {
	config *api.Config // as configured: the names of files, not what is in them

	multiplexes atomic.Bool  // one connection carries many queries
	blocked     atomic.Int64 // queries held open, if it doesn't
	sweeping    chan struct{}
	storeFailed atomic.Int64 // when a service's instances could not be stored, in Unix nanoseconds; 0 since they could

	mu     sync.Mutex
	client *client
	tides  map[tideKey]*tide

	seen [sha256.Size]byte // digest of the credential files that client was made of
	stop context.CancelFunc
	done chan struct{}

	trouble trouble
}

// CheckConnection reports why config can't be a connection to a Consul agent: an
// address that can't be understood, a file of it that can't be read. It does
// not ask the agent.
func CheckConnection(config *api.Config) error {
	client, err := newClient(config)
	if err != nil {
		return err
	}
	client.close(nil)
	return nil
}

// newAgent returns a connection to the agent of config. It does not connect
// before the first query.
func newAgent(config *api.Config) (*agent, error) {
	a := &agent{
		config:   config,
		sweeping: make(chan struct{}, maxSweeping),
		tides:    make(map[tideKey]*tide),
		seen:     digest(config),
		done:     make(chan struct{}),
	}
	var err error
	if a.client, err = newClient(config); err != nil {
		return nil, err
	}
	var ctx context.Context
	ctx, a.stop = context.WithCancel(context.Background())
	if len(credentialFiles(config)) == 0 {
		close(a.done)
		return a, nil
	}
	go a.followCredentials(ctx)
	return a, nil
}

// Destruct ends the agent. The pool calls it when no watcher is left.
func (a *agent) Destruct() error {
	for _, t := range a.tides { // no watcher is left to start one
		t.end()
	}
	a.stop()
	<-a.done
	a.current().close(context.Canceled)
	return nil
}

func (a *agent) current() *client {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.client
}

// followCredentials replaces the client when a file with credentials changes.
// While the files can't be used, as when they are half written, the old client
// stays, and if that lasts, it is told.
func (a *agent) followCredentials(ctx context.Context) {
	defer close(a.done)
	tick := time.NewTicker(credentialsPoll)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		seen := digest(a.config)
		if seen == a.seen {
			a.trouble.isOver(a.config.Address)
			continue
		}
		fresh, err := newClient(a.config)
		if err != nil {
			a.trouble.is(a.config.Address, err)
			continue
		}
		a.trouble.isOver(a.config.Address)
		a.mu.Lock()
		old := a.client
		a.client, a.seen = fresh, seen
		a.mu.Unlock()
		old.close(errOutdated)
	}
}

// ask sends a query, the answer to which read reads. With an index it blocks
// until Consul has something newer or the wait is over.
func (a *agent) ask(ctx context.Context, q question, index uint64, read func(io.Reader) error) (*answer, error) {
	limit := answerSlack
	params := maps.Clone(q.params)
	if a.config.Namespace != "" {
		params.Set("ns", a.config.Namespace)
	}
	if a.config.Partition != "" {
		params.Set("partition", a.config.Partition)
	}
	if index > 0 {
		wait := jittered(q.wait)
		params.Set("index", strconv.FormatUint(index, 10))
		params.Set("wait", strconv.FormatInt(wait.Milliseconds(), 10)+"ms")
		limit += wait * 17 / 16 // Consul may add a sixteenth
	}
	ctx, cancel := context.WithTimeoutCause(ctx, limit,
		&timeoutError{fmt.Sprintf("no answer within %s", limit.Round(time.Second))})
	defer cancel()
	answer, err := a.current().get(ctx, q.path, params, read)
	if err == nil && answer.shared {
		a.multiplexes.Store(true)
	}
	return answer, err
}

// jittered shortens a wait by up to a tenth, so that a fleet that asked in step
// doesn't go on so.
func jittered(wait time.Duration) time.Duration {
	return wait - rand.N(wait/10+1)
}

// block takes one of the places for queries that are held open, if one is free.
// Give it back with unblock.
func (a *agent) block() bool {
	if a.blocked.Add(1) <= maxBlocked {
		return true
	}
	a.blocked.Add(-1)
	return false
}

// unblock gives a place back.
func (a *agent) unblock() { a.blocked.Add(-1) }

// tide returns the tide of a datacenter, which it starts if need be.
func (a *agent) tide(datacenter string, consistency Consistency, wait time.Duration) *tide {
	key := tideKey{datacenter, consistency}
	a.mu.Lock()
	defer a.mu.Unlock()
	t := a.tides[key]
	if t == nil {
		t = newTide(a, key, wait)
		a.tides[key] = t
	}
	return t
}

// digest tells whether what the credential files hold has changed. A file that
// can't be read counts as empty.
func digest(config *api.Config) [sha256.Size]byte {
	sum := sha256.New()
	for _, name := range credentialFiles(config) {
		content, _ := os.ReadFile(name)
		fmt.Fprintf(sum, "%s %d ", name, len(content))
		sum.Write(content)
	}
	return [sha256.Size]byte(sum.Sum(nil))
}

// credentialFiles are the files that make up the credentials of config.
func credentialFiles(config *api.Config) []string {
	tls := config.TLSConfig
	files := make([]string, 0, 4)
	for _, name := range []string{config.TokenFile, tls.CAFile, tls.CertFile, tls.KeyFile} {
		if name != "" {
			files = append(files, name)
		}
	}
	if tls.CAPath != "" {
		bundle, _ := filepath.Glob(filepath.Join(tls.CAPath, "*"))
		files = append(files, bundle...)
	}
	return files
}
