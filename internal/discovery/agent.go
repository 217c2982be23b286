package discovery

import (
	"context"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/hashicorp/consul/api"
)

const (
	// answerSlack is what a query may take beyond the time that Consul was
	// asked to hold it: connecting, and reading a large answer.
	answerSlack = 15 * time.Second

	// credentialsPoll is how often the files with a token, keys and
	// certificates are looked at. Polling follows renames and swapped symbolic
	// links alike, on every file system.
	credentialsPoll = 500 * time.Millisecond
)

// agent is a connection to one Consul agent, shared by the watchers that ask
// it. Its credentials follow their files.
type agent struct {
	config *api.Config // as configured: the names of files, not what is in them

	mu     sync.Mutex
	client *client

	seen [sha256.Size]byte // digest of the credential files that client was made of
	stop context.CancelFunc
	done chan struct{}
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
	a := &agent{config: config, seen: digest(config), done: make(chan struct{})}
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
// stays.
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
			continue
		}
		fresh, err := newClient(a.config)
		if err != nil {
			continue
		}
		a.mu.Lock()
		old := a.client
		a.client, a.seen = fresh, seen
		a.mu.Unlock()
		old.close(errOutdated)
	}
}

// health asks for the service of q. With an index it blocks until Consul has
// something newer or the wait is over.
func (a *agent) health(ctx context.Context, q *Query, index uint64) (*answer, error) {
	path, params := q.path()
	limit := answerSlack
	if index > 0 {
		wait := q.Wait - rand.N(q.Wait/10+1) //nolint:gosec // keeps a fleet from asking in step
		params.Set("index", strconv.FormatUint(index, 10))
		params.Set("wait", strconv.FormatInt(wait.Milliseconds(), 10)+"ms")
		limit += wait * 17 / 16 // Consul may add a sixteenth
	}
	ctx, cancel := context.WithTimeoutCause(ctx, limit,
		fmt.Errorf("no answer within %s", limit.Round(time.Second)))
	defer cancel()
	return a.current().get(ctx, path, params)
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
