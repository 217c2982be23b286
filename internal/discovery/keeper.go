package discovery

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-consul/caddy-consul/internal/endpoint"
)

const (
	// coldStartAfter is how long Consul has for its first answer before a Set
	// stored by an earlier run is served.
	coldStartAfter = 500 * time.Millisecond

	// Saving is rare: soon after a first change, then at most so often, and now
	// and then to say that the Set was still right.
	saveSoon    = 2 * time.Second
	saveEvery   = 30 * time.Second
	saveAnyway  = time.Hour
	saveTimeout = 10 * time.Second

	// At its end a watcher saves for the last time. A config waits for the ends of
	// all its watchers, one by one, so a storage that hangs must not cost each of
	// them its time.
	endTimeout    = 2 * time.Second
	distrustStore = time.Minute

	storedVersion = 1
	storedLimit   = 64 << 20
)

// Store keeps what should outlast the process. Caddy's storage is one.
type Store interface {
	Store(ctx context.Context, key string, value []byte) error
	Load(ctx context.Context, key string) ([]byte, error)
}

// keeper keeps a watcher's Set in storage, and gives the watcher the one of an
// earlier run to start with when Consul doesn't answer.
type keeper struct {
	watcher *watcher

	mu     sync.Mutex
	stores []Store // of the configs that hold the watcher, the newest last
	timer  *time.Timer
	due    time.Time // when timer fires
	saved  time.Time // when it was last tried
	ended  bool
	work   sync.WaitGroup
	told   string // what the log was last told to be wrong
}

// stored is the format in storage. It has no secret in it.
type stored struct {
	Version   int                 `json:"version"`
	Query     string              `json:"query"`
	Confirmed time.Time           `json:"confirmed"` // when Consul last said so
	Endpoints []endpoint.Endpoint `json:"endpoints"`
}

// use has the keeper work with the store of a config.
func (k *keeper) use(store Store) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.stores = append(k.stores, store)
	switch {
	case k.timer != nil:
	case k.watcher.set.Load() == nil:
		k.schedule(time.Until(k.watcher.started.Add(coldStartAfter)))
	case k.saved.IsZero(): // Consul was quicker
		k.schedule(saveSoon)
	}
}

// leave ends the use of a store.
func (k *keeper) leave(store Store) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if i := slices.Index(k.stores, store); i >= 0 {
		k.stores = slices.Delete(k.stores, i, i+1)
	}
}

// changed takes note that there is a new Set.
func (k *keeper) changed() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.stores) > 0 {
		k.schedule(max(saveSoon, time.Until(k.saved.Add(saveEvery))))
	}
}

// schedule sees to it that there is something to do after delay at the latest.
// The caller holds mu.
func (k *keeper) schedule(delay time.Duration) {
	due := time.Now().Add(delay)
	if k.ended || k.timer != nil && k.due.Before(due) {
		return
	}
	if k.timer != nil && k.timer.Stop() {
		k.work.Done()
	}
	k.due = due
	k.work.Add(1)
	k.timer = time.AfterFunc(delay, func() {
		defer k.work.Done()
		k.act()
	})
}

// act serves the stored Set if there is none yet, else it stores the present
// one.
func (k *keeper) act() {
	k.mu.Lock()
	k.timer = nil
	k.mu.Unlock()
	if k.watcher.set.Load() == nil {
		k.serveStored()
		return
	}
	k.save(saveTimeout)
	k.mu.Lock()
	defer k.mu.Unlock()
	k.schedule(saveAnyway)
}

// end saves what has not been saved yet, and returns when nothing is under way.
func (k *keeper) end() {
	k.mu.Lock()
	k.ended = true
	if k.timer != nil && k.timer.Stop() {
		k.work.Done()
	}
	k.mu.Unlock()
	k.work.Wait()
	if time.Since(k.watcher.started) <= saveSoon {
		return // it was but a look, as caddy validate takes
	}
	if failed := k.watcher.agent.storeFailed.Load(); failed == 0 || time.Since(time.Unix(0, failed)) > distrustStore {
		k.save(endTimeout)
	}
}

func (k *keeper) store() Store {
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.stores) == 0 {
		return nil
	}
	return k.stores[len(k.stores)-1]
}

// save stores the present Set. An empty one is not worth starting with, and a
// stored one not worth storing again.
func (k *keeper) save(timeout time.Duration) {
	w := k.watcher
	store, set := k.store(), w.set.Load()
	if store == nil || set == nil || set.Len() == 0 || w.cold.Load() {
		return
	}
	confirmed := time.Now()
	if failure := w.failing.Load(); failure != nil {
		confirmed = failure.since
	}
	value := stored{Version: storedVersion, Query: w.query.key(), Confirmed: confirmed.UTC()}
	for i := range set.Len() {
		value.Endpoints = append(value.Endpoints, *set.At(i))
	}
	text, err := json.Marshal(value)
	if err == nil {
		ctx, cancel := context.WithTimeout(context.Background(), timeout)
		defer cancel()
		err = store.Store(ctx, k.key(), text)
	}
	if err != nil {
		w.agent.storeFailed.Store(time.Now().UnixNano())
	} else {
		w.agent.storeFailed.Store(0)
	}
	k.mu.Lock()
	k.saved = time.Now()
	k.mu.Unlock()
	if k.isNews(err) {
		w.loggers.newest().Warn("could not store the instances for a start without Consul", w.subject, zap.Error(err))
	}
}

// serveStored gives the watcher the Set of an earlier run, unless it has one.
func (k *keeper) serveStored() {
	w := k.watcher
	store := k.store()
	if store == nil || w.set.Load() != nil {
		return
	}
	value, err := k.load(store)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	if err != nil {
		if k.isNews(err) {
			w.loggers.newest().Warn("the instances stored by an earlier run can't be used", w.subject, zap.Error(err))
		}
		return
	}
	w.serveCold(value.Endpoints, value.Confirmed)
}

// isNews reports whether err is one, and other than the last.
func (k *keeper) isNews(err error) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	last := k.told
	k.told = ""
	if err != nil {
		k.told = err.Error()
	}
	return k.told != "" && k.told != last
}

// serveCold publishes endpoints of an earlier run, which count as stale since
// Consul last confirmed them.
func (w *watcher) serveCold(endpoints []endpoint.Endpoint, confirmed time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.set.Load() != nil {
		return
	}
	w.cold.Store(true)
	err := errNotHeard
	if failure := w.failing.Load(); failure != nil {
		err = failure.err
	}
	w.failing.Store(&failure{confirmed, err})
	w.loggers.newest().Warn("Consul has not answered yet; serving the instances that an earlier run stored",
		w.subject, zap.Int("instances", len(endpoints)), zap.Time("confirmed", confirmed))
	w.replace(endpoints)
}

var errNotHeard = errors.New("Consul has not answered yet")

func (k *keeper) load(store Store) (*stored, error) {
	ctx, cancel := context.WithTimeout(context.Background(), saveTimeout)
	defer cancel()
	text, err := store.Load(ctx, k.key())
	if err != nil {
		return nil, err
	}
	return parseStored(text, &k.watcher.query)
}

// parseStored reads what was stored for query. It trusts nothing: whoever can
// write to the storage must not choose what is dialled beyond what Consul could.
func parseStored(text []byte, query *Query) (*stored, error) {
	if len(text) > storedLimit {
		return nil, fmt.Errorf("%d bytes are too many", len(text))
	}
	var value stored
	if err := json.Unmarshal(text, &value); err != nil {
		return nil, err
	}
	if value.Version != storedVersion {
		return nil, fmt.Errorf("version %d is not known", value.Version)
	}
	if value.Query != query.key() {
		return nil, errors.New("they were stored for another query")
	}
	endpoints := make([]*endpoint.Endpoint, len(value.Endpoints))
	for i := range value.Endpoints {
		e := &value.Endpoints[i]
		endpoints[i] = e
		if err := cmp.Or(checkDial(e.Dial), query.Ranges.check(e.Dial)); err != nil {
			return nil, err
		}
		if !query.Health.isMetBy(e.Status) {
			return nil, fmt.Errorf("instance %.100q is not as healthy as the query asks for", e.ID)
		}
		e.Weight = min(max(e.Weight, 0), MaxWeight)
	}
	if now := time.Now(); value.Confirmed.After(now) {
		value.Confirmed = now
	}
	value.Endpoints = query.inOrder(endpoints)
	return &value, nil
}

// key is where the Set is stored. It tells apart what the same service is to
// different Consuls and queries.
func (k *keeper) key() string {
	w := k.watcher
	config := w.agent.config
	token := sha256.Sum256([]byte(config.Token)) // another token may see other instances
	sum := sha256.Sum256([]byte(strings.Join([]string{
		config.Address, config.Namespace, config.Partition, string(token[:]), config.TokenFile, w.query.key(),
	}, "\n")))
	name := strings.Map(func(r rune) rune {
		if isUnsafeInHost(r) || r == ':' || r == '%' {
			return '_'
		}
		return r
	}, w.query.Service)
	return "consul/services/" + name + "-" + hex.EncodeToString(sum[:8]) + ".json"
}
