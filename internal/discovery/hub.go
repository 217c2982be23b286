package discovery

import (
	"context"
	"crypto/sha256"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/hashicorp/consul/api"
	"go.uber.org/zap"

	"github.com/caddy-consul/caddy-consul/internal/endpoint"
)

// The pools outlive configs: a reload finds its watchers and their Sets in
// them, and a connection is given up when no watcher needs it.
var (
	agents   = caddy.NewUsagePool()
	watchers = caddy.NewUsagePool()
)

// agentKey tells one connection from another. It holds secrets as digests.
type agentKey struct {
	scheme, address, prefix, namespace, partition string
	token, auth                                   [sha256.Size]byte
	tokenFile                                     string
	serverName, caFile, caPath, certFile, keyFile string
	insecure                                      bool
	oldestTLS                                     uint16
}

func keyOf(config *api.Config) agentKey {
	tls := config.TLSConfig
	key := agentKey{
		scheme: config.Scheme, address: config.Address, prefix: config.PathPrefix,
		namespace: config.Namespace, partition: config.Partition,
		token: sha256.Sum256([]byte(config.Token)), tokenFile: config.TokenFile,
		serverName: tls.Address, caFile: tls.CAFile, caPath: tls.CAPath,
		certFile: tls.CertFile, keyFile: tls.KeyFile, insecure: tls.InsecureSkipVerify,
		oldestTLS: oldestTLS(config),
	}
	if auth := config.HttpAuth; auth != nil {
		key.auth = sha256.Sum256([]byte(auth.Username + "\x00" + auth.Password))
	}
	return key
}

// watcherKey tells one watcher from another.
type watcherKey struct {
	agent agentKey
	query string
}

// Subscription is a hold on a watcher.
type Subscription struct {
	key     watcherKey
	watcher *watcher
	log     *logSource
	store   Store
	close   sync.Once
}

// Subscribe follows query on the agent of config. It does not wait for Consul:
// an error means that config can't be used. Close ends the subscription, and
// with the last one of the same query and config the following.
func Subscribe(config *api.Config, query Query, logger *zap.Logger) (*Subscription, error) {
	return subscribe(config, query, func() *zap.Logger { return logger })
}

func subscribe(config *api.Config, query Query, logger func() *zap.Logger) (*Subscription, error) {
	key := watcherKey{keyOf(config), query.key()}
	log := &logSource{logger}
	value, loaded, err := watchers.LoadOrNew(key, func() (caddy.Destructor, error) {
		agent, release, err := connect(config)
		if err != nil {
			return nil, err
		}
		return newWatcher(query, agent, release, log), nil
	})
	if err != nil {
		return nil, err
	}
	s := &Subscription{key: key, watcher: value.(*watcher), log: log}
	if loaded {
		s.watcher.loggers.add(log)
	}
	s.watcher.agent.trouble.loggers.add(s.log)
	return s, nil
}

// connect returns the connection of config, shared with all who ask for the
// same, and what gives it back.
func connect(config *api.Config) (*agent, func(), error) {
	key := keyOf(config)
	value, _, err := agents.LoadOrNew(key, func() (caddy.Destructor, error) { return newAgent(config) })
	if err != nil {
		return nil, nil, err
	}
	return value.(*agent), func() { _, _ = agents.Delete(key) }, nil
}

// KeepIn has the Set kept in store, so that a process that starts while Consul
// can't be reached has one to start with.
func (s *Subscription) KeepIn(store Store) {
	s.store = store
	s.watcher.keeper.use(store)
}

// Close ends the subscription. Its Sets stay readable.
func (s *Subscription) Close() { s.close.Do(s.end) }

func (s *Subscription) end() {
	_, _ = watchers.Delete(s.key)
	s.watcher.loggers.remove(s.log)
	s.watcher.agent.trouble.loggers.remove(s.log)
	if s.store != nil {
		s.watcher.keeper.leave(s.store)
	}
}

// Set returns the newest Set, or nil before the first answer.
func (s *Subscription) Set() *endpoint.Set { return s.watcher.set.Load() }

// Await returns the newest Set. Before the first answer it waits for it until
// ctx ends or the watcher has been asking for as long as timeout; then it
// returns nil.
func (s *Subscription) Await(ctx context.Context, timeout time.Duration) *endpoint.Set {
	if set := s.Set(); set != nil {
		return set
	}
	s.watcher.awaitFirst(ctx, s.watcher.first, timeout)
	return s.Set()
}

// FailingFor returns how long Consul has given no usable answer. It is 0 while
// Consul answers.
func (s *Subscription) FailingFor() time.Duration { return s.watcher.failingFor() }

// LastError returns why Consul gives no usable answer, or nil while it does.
func (s *Subscription) LastError() error { return s.watcher.lastError() }
