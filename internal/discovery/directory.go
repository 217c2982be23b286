package discovery

import (
	"context"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/hashicorp/consul/api"
	"go.uber.org/zap"
)

const (
	// idleAfter is how long a service of a directory is followed without a
	// request for it.
	idleAfter = 10 * time.Minute

	// usedGrain is how exactly the last use of a service is known. It keeps
	// requests from writing to the same memory all the time.
	usedGrain = int64(time.Second)
)

// Directory follows services whose names come with requests: each from the
// first request for it on, as long as there are requests for it. At most so many
// are followed at once; then the one that was used least recently makes room.
//
// A name that no service has costs a look into a map, and Consul nothing.
type Directory struct {
	key       directoryKey
	directory *directory
	log       *logSource
}

type directoryKey struct {
	watcherKey // of the query without a service
	limit      int
}

var directories = caddy.NewUsagePool()

// directory is what Directories of the same query and config share.
type directory struct {
	config  *api.Config
	query   Query
	limit   int
	names   *names
	release func()
	loggers loggers
	store   atomic.Pointer[Store] // of the newest config that has one

	services sync.Map // name → *service

	mu    sync.Mutex // held to add and to end services
	count int

	stop context.CancelFunc
	done chan struct{}
}

type service struct {
	subscription *Subscription
	used         atomic.Int64 // Unix nanoseconds
}

// OpenDirectory returns a directory whose services are followed as query says;
// the name of the service is left out of it. Like Subscribe it does not wait for
// Consul.
func OpenDirectory(config *api.Config, query Query, limit int, logger *zap.Logger) (*Directory, error) {
	key := directoryKey{watcherKey{keyOf(config), query.key()}, limit}
	log := &logSource{func() *zap.Logger { return logger }}
	value, loaded, err := directories.LoadOrNew(key, func() (caddy.Destructor, error) {
		agent, release, err := connect(config)
		if err != nil {
			return nil, err
		}
		ctx, stop := context.WithCancel(context.Background())
		d := &directory{
			config: config, query: query, limit: limit, release: release, stop: stop, done: make(chan struct{}),
		}
		d.loggers.add(log)
		d.names = newNames(agent, query.Datacenter, query.Consistency, query.Wait, &logSource{d.loggers.newest})
		go d.endIdle(ctx)
		return d, nil
	})
	if err != nil {
		return nil, err
	}
	d := &Directory{key, value.(*directory), log}
	if loaded {
		d.directory.loggers.add(log)
	}
	d.directory.names.agent.trouble.loggers.add(d.log)
	return d, nil
}

// KeepIn has the Sets of services that are asked for from now on kept in store.
func (d *Directory) KeepIn(store Store) { d.directory.store.Store(&store) }

// Close gives the directory back.
func (d *Directory) Close() {
	d.directory.loggers.remove(d.log)
	d.directory.names.agent.trouble.loggers.remove(d.log)
	_, _ = directories.Delete(d.key)
}

// Destruct ends the directory and its services. The pool calls it.
func (d *directory) Destruct() error {
	d.stop()
	<-d.done
	d.names.end()
	d.endIf(func(*service) bool { return true })
	d.release()
	return nil
}

// Service returns the subscription to a service, which stays the directory's:
// the caller must not close it. It is nil if Consul has no such service, or has
// not said so within timeout of being asked first.
func (d *Directory) Service(ctx context.Context, name string, timeout time.Duration) (*Subscription, error) {
	name = strings.ToLower(name)
	dir := d.directory
	if value, ok := dir.services.Load(name); ok {
		s := value.(*service)
		if now := time.Now().UnixNano(); now-s.used.Load() > usedGrain {
			s.used.Store(now)
		}
		return s.subscription, nil
	}
	if dir.names.present.Load() == nil {
		dir.names.awaitFirst(ctx, dir.names.first, timeout)
	}
	if !dir.names.has(name) {
		return nil, nil
	}
	return dir.add(name)
}

// LastError returns why Consul doesn't say which services there are, or nil
// while it does.
func (d *Directory) LastError() error { return d.directory.names.lastError() }

// add begins to follow a service.
func (d *directory) add(name string) (*Subscription, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if value, ok := d.services.Load(name); ok {
		return value.(*service).subscription, nil
	}
	query := d.query
	query.Service = name
	subscription, err := subscribe(d.config, query, d.loggers.newest)
	if err != nil {
		return nil, err
	}
	if store := d.store.Load(); store != nil {
		subscription.KeepIn(*store)
	}
	if d.count >= d.limit {
		d.endLeastUsed()
	}
	s := &service{subscription: subscription}
	s.used.Store(time.Now().UnixNano())
	d.services.Store(name, s)
	d.count++
	return subscription, nil
}

// endLeastUsed makes room for one more service.
func (d *directory) endLeastUsed() {
	var name any
	var least *service
	for key, value := range d.services.Range {
		if s := value.(*service); least == nil || s.used.Load() < least.used.Load() {
			name, least = key, s
		}
	}
	if least != nil {
		d.endService(name, least)
	}
}

// endService stops following a service. Requests that are using it go on with
// the Set that they have.
func (d *directory) endService(name any, s *service) {
	d.services.Delete(name)
	d.count--
	s.subscription.Close()
}

// endIdle ends services that nobody asks for any more.
func (d *directory) endIdle(ctx context.Context) {
	defer close(d.done)
	tick := time.NewTicker(idleAfter / 4)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			oldest := time.Now().Add(-idleAfter).UnixNano()
			d.endIf(func(s *service) bool { return s.used.Load() < oldest })
		}
	}
}

func (d *directory) endIf(unwanted func(*service) bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for name, value := range d.services.Range {
		if s := value.(*service); unwanted(s) {
			d.endService(name, s)
		}
	}
}
