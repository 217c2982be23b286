package discovery

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-consul/caddy-consul/internal/endpoint"
)

const (
	msgCold     = "Consul has not answered yet; serving the instances that an earlier run stored"
	msgUnusable = "the instances stored by an earlier run can't be used"
	msgUnstored = "could not store the instances for a start without Consul"
)

// memoryStore is a Store that counts.
type memoryStore struct {
	mu     sync.Mutex
	values map[string][]byte
	writes int
	err    error
}

func newMemoryStore() *memoryStore { return &memoryStore{values: make(map[string][]byte)} }

func (m *memoryStore) Store(_ context.Context, key string, value []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.writes++
	if m.err == nil {
		m.values[key] = value
	}
	return m.err
}

func (m *memoryStore) Load(_ context.Context, key string) ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	value, ok := m.values[key]
	if m.err == nil && !ok {
		return nil, fs.ErrNotExist
	}
	return value, m.err
}

func (m *memoryStore) written() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.writes
}

// only returns the only stored value.
func (m *memoryStore) only(t *testing.T) (key string, value []byte) {
	t.Helper()
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.values) != 1 {
		t.Fatalf("stored values: got %d, want 1", len(m.values))
	}
	for key, value = range m.values {
	}
	return key, value
}

// silent is a Consul that takes questions and never answers.
type silent struct{}

func (silent) RoundTrip(r *http.Request) (*http.Response, error) {
	<-r.Context().Done()
	return nil, r.Context().Err()
}

// storeOf returns a store that an earlier run has left instances in.
func storeOf(t *testing.T, names ...string) *memoryStore {
	t.Helper()
	store := newMemoryStore()
	earlier := newLive()
	for _, name := range names {
		earlier.entries = append(earlier.entries, web(name))
	}
	w := follow(t, inMemory{earlier}, webQuery)
	w.keeper.use(store)
	time.Sleep(saveSoon + time.Second)
	_ = w.Destruct()
	if store.written() == 0 {
		t.Fatal("an earlier run stored nothing")
	}
	return store
}

// Storage may be a database that a fleet shares: a service that changes all the
// time must not write all the time, and one that doesn't change hardly at all.
func TestSavingIsRare(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		consul, store := newLive(web("a")), newMemoryStore()
		w := follow(t, inMemory{consul}, webQuery)
		w.keeper.use(store)
		time.Sleep(saveSoon + time.Second)
		if got := store.written(); got != 1 {
			t.Errorf("writes soon after the first answer: got %d, want 1", got)
		}
		const minutes = 10
		for i := range minutes * 60 {
			consul.set(web("a"), web(fmt.Sprint(i)))
			time.Sleep(time.Second)
		}
		most := 2 + int(minutes*time.Minute/saveEvery)
		got := store.written()
		if got > most || got < most/2 {
			t.Errorf("writes in %d minutes of a change a second: got %d, want at most %d and half as many at least", minutes, got, most)
		}
		time.Sleep(saveEvery + time.Second)
		got = store.written()
		time.Sleep(10*saveAnyway + time.Minute)
		if hourly := store.written() - got; hourly > 11 || hourly < 9 {
			t.Errorf("writes in 10 hours without a change: got %d, want 10", hourly)
		}
		_, text := store.only(t)
		if !strings.Contains(string(text), `"web-599"`) {
			t.Errorf("what is stored is not the newest: %s", text)
		}
	})
}

func TestTheStoredSetIsServedUntilConsulAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := storeOf(t, "a", "b")
		time.Sleep(time.Hour)

		consul := newScripted()
		w := follow(t, consul, webQuery)
		w.keeper.use(store)
		question := consul.next()
		time.Sleep(coldStartAfter - time.Millisecond)
		if set := w.set.Load(); set != nil {
			t.Errorf("instances before Consul is overdue: got %v, want none", nodesOf(set))
		}
		time.Sleep(2 * time.Millisecond)
		wantNodes(t, "when Consul is overdue", w.set.Load(), "a", "b")
		report := w.report()
		if !report.ColdStart || report.State != StateFailing {
			t.Errorf("report: got cold start %v and %s, want true and failing", report.ColdStart, report.State)
		}
		if failing := w.failingFor(); failing < time.Hour || failing > time.Hour+time.Minute {
			t.Errorf("stale for: got %v, want about an hour", failing)
		}
		time.Sleep(time.Second)
		question.instances(5, web("b"), web("c"))
		consul.next()
		wantNodes(t, "when Consul has answered", w.set.Load(), "b", "c")
		if report := w.report(); report.ColdStart || report.State != StateFollowing {
			t.Errorf("report when Consul has answered: got cold start %v and %s, want false and following", report.ColdStart, report.State)
		}
		if got := w.logged(zap.WarnLevel, msgCold); got != 1 {
			t.Errorf("warnings: got %d, want 1", got)
		}
		if got := w.logged(zap.InfoLevel, msgRecovered); got != 1 {
			t.Errorf("lines about the recovery: got %d, want 1", got)
		}
	})
}

// An agent that is down says so at once: no request has to wait.
func TestTheStoredSetIsServedAtTheFirstFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := storeOf(t, "a")
		consul := newScripted()
		w := follow(t, consul, webQuery)
		w.keeper.use(store)
		consul.next().refuse()
		synctest.Wait()
		wantNodes(t, "after the first failure", w.set.Load(), "a")
	})
}

func TestAColdStartThatLastsKeepsWhatIsStored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := storeOf(t, "a")
		_, before := store.only(t)
		writes := store.written()
		w := follow(t, silent{}, webQuery)
		w.keeper.use(store)
		time.Sleep(3 * saveAnyway)
		_ = w.Destruct()
		if _, after := store.only(t); string(after) != string(before) || store.written() != writes {
			t.Errorf("a cold start has stored %s, want it to leave %s", after, before)
		}
	})
}

// The Set counts as confirmed until Consul failed, however much later it is
// stored.
func TestWhatIsStoredIsConfirmedUntilConsulFailed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		consul, store := newLive(web("a")), newMemoryStore()
		w := follow(t, inMemory{consul}, webQuery)
		w.keeper.use(store)
		time.Sleep(time.Minute)
		failed := time.Now()
		consul.fail(answering(500, ""))
		time.Sleep(3 * time.Hour)
		_ = w.Destruct()
		_, text := store.only(t)
		var value stored
		if err := json.Unmarshal(text, &value); err != nil {
			t.Fatal(err)
		}
		if age := value.Confirmed.Sub(failed).Abs(); age > time.Minute {
			t.Errorf("confirmed: got %v, want about %v, when Consul failed", value.Confirmed, failed)
		}
	})
}

// After a start without Consul, its first answer confirms what is stored, even if
// it says the same.
func TestTheFirstAnswerConfirmsWhatIsStored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := storeOf(t, "a")
		time.Sleep(time.Hour)
		consul := newScripted()
		w := follow(t, consul, webQuery)
		w.keeper.use(store)
		question := consul.next()
		time.Sleep(coldStartAfter + time.Second)
		question.instances(5, web("a"))
		consul.next()
		answered := time.Now()
		time.Sleep(saveEvery + time.Second)
		_, text := store.only(t)
		var value stored
		if err := json.Unmarshal(text, &value); err != nil {
			t.Fatal(err)
		}
		if value.Confirmed.Before(answered) {
			t.Errorf("confirmed: got %v, want %v or later, when Consul answered", value.Confirmed, answered)
		}
	})
}

// Consul may answer before the config has said where to store.
func TestAnAnswerBeforeTheStorageIsStored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, store := follow(t, inMemory{newLive(web("a"))}, webQuery), newMemoryStore()
		firstSet(t, w.watcher)
		w.keeper.use(store)
		time.Sleep(saveSoon + time.Second)
		if _, text := store.only(t); !strings.Contains(string(text), `"web-a"`) {
			t.Errorf("what is stored is %s, want the instances", text)
		}
	})
}

func TestAnEmptyServiceIsNotStored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		consul, store := newLive(web("a")), newMemoryStore()
		w := follow(t, inMemory{consul}, webQuery)
		w.keeper.use(store)
		time.Sleep(time.Minute)
		consul.set()
		time.Sleep(time.Minute)
		_ = w.Destruct()
		if _, text := store.only(t); !strings.Contains(string(text), `"web-a"`) {
			t.Errorf("after the service went, what is stored is %s, want the instances from before", text)
		}
	})
}

// A look at a config, as `caddy validate` takes one, leaves no trace.
func TestAShortLifeStoresNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newMemoryStore()
		w := follow(t, inMemory{newLive(web("a"))}, webQuery)
		w.keeper.use(store)
		firstSet(t, w.watcher)
		_ = w.Destruct()
		if got := store.written(); got != 0 {
			t.Errorf("writes: got %d, want 0", got)
		}
	})
}

// A reload brings a new storage, perhaps elsewhere.
func TestTheNewestConfigsStoreIsUsed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		consul, before, after := newLive(web("a")), newMemoryStore(), newMemoryStore()
		w := follow(t, inMemory{consul}, webQuery)
		w.keeper.use(before)
		time.Sleep(time.Minute)
		w.keeper.use(after)
		w.keeper.leave(before)
		writes := before.written()
		consul.set(web("b"))
		time.Sleep(time.Minute)
		if got := before.written(); got != writes {
			t.Errorf("writes to the old config's storage: got %d more, want none", got-writes)
		}
		if _, text := after.only(t); !strings.Contains(string(text), `"web-b"`) {
			t.Errorf("the new config's storage has %s, want the new instance", text)
		}
	})
}

func TestAStorageThatFailsCostsALine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		consul, store := newLive(web("a")), newMemoryStore()
		store.err = errors.New("the disk is full")
		w := follow(t, inMemory{consul}, webQuery)
		w.keeper.use(store)
		const minutes = 10
		for i := range minutes * 60 {
			consul.set(web("a"), web(fmt.Sprint(i)))
			time.Sleep(time.Second)
		}
		wantNodes(t, "without storage", w.set.Load(), "599", "a")
		if got := w.logged(zap.WarnLevel, msgUnstored); got != 1 {
			t.Errorf("warnings in %d minutes: got %d, want 1", minutes, got)
		}
		if got, most := store.written(), 2+int(minutes*time.Minute/saveEvery); got > most {
			t.Errorf("attempts in %d minutes: got %d, want at most %d", minutes, got, most)
		}
		store.mu.Lock()
		store.err = nil
		store.mu.Unlock()
		time.Sleep(saveAnyway + time.Minute)
		if _, text := store.only(t); !strings.Contains(string(text), `"web-599"`) {
			t.Errorf("when the storage is back, it has %s, want the newest instances", text)
		}
	})
}

// stuckStore is a Store that hangs, as one on a network may.
type stuckStore struct{ *memoryStore }

func (stuckStore) Store(ctx context.Context, _ string, _ []byte) error {
	<-ctx.Done()
	return ctx.Err()
}

// A config with many services must not take minutes to end because the storage
// hangs.
func TestAStorageThatHangsHoldsUpTheEndOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const services = 20
		var all []*watcher
		first := follow(t, inMemory{newLive(web("a"))}, webQuery)
		all = append(all, first.watcher)
		for range services - 1 {
			all = append(all, newWatcher(webQuery, first.agent, func() {}, &logSource{zap.NewNop}))
		}
		store := newMemoryStore()
		for _, w := range all {
			w.keeper.use(store)
		}
		time.Sleep(time.Minute) // all have been stored
		for _, w := range all {
			w.keeper.use(stuckStore{store})
		}
		start := time.Now()
		for _, w := range slices.Backward(all) { // the first one has the agent
			_ = w.Destruct()
		}
		if took := time.Since(start); took > 2*endTimeout {
			t.Errorf("the end of %d watchers took %s, want at most %s", services, took, 2*endTimeout)
		}
	})
}

func TestTheKeyTellsWhatItIsFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		key := func(query Query) string {
			w := follow(t, silent{}, query)
			defer func() { _ = w.Destruct() }()
			return w.keeper.key()
		}
		tagged, elsewhere, odd := webQuery, webQuery, webQuery
		tagged.Tags = []string{"v2"}
		elsewhere.Datacenter = "dc2"
		odd.Service = "../../we:b%"
		keys := map[string]bool{key(webQuery): true, key(tagged): true, key(elsewhere): true}
		if len(keys) != 3 {
			t.Errorf("keys of three queries: got %v, want three", keys)
		}
		if got := key(odd); strings.Contains(strings.TrimPrefix(got, "consul/services/"), "/") || strings.ContainsAny(got, ":%") {
			t.Errorf("key: got %q, want one that is a file name", got)
		}
	})
}

// storedText returns the text of a stored Set, changed.
func storedText(t *testing.T, change func(*stored)) []byte {
	t.Helper()
	value := stored{Version: storedVersion, Query: webQuery.key(), Confirmed: time.Now(), Endpoints: []endpoint.Endpoint{
		{Dial: "10.0.0.1:80", Weight: 1, ID: "web-a", Node: "a", Service: "web"},
	}}
	change(&value)
	text, err := json.Marshal(value)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func dialling(address string) func(*stored) {
	return func(s *stored) { s.Endpoints[0].Dial = address }
}

func TestWhatCanNotBeUsedIsIgnored(t *testing.T) {
	for _, tc := range []struct {
		name string
		text []byte
	}{
		{"empty", nil},
		{"noise", []byte("\x00\x01")},
		{"half", storedText(t, func(*stored) {})[:40]},
		{"a list", []byte("[]")},
		{"null", []byte("null")},
		{"foreign", []byte(`{"services": []}`)},
		{"another version", storedText(t, func(s *stored) { s.Version++ })},
		{"another query", storedText(t, func(s *stored) { s.Query = "{}" })},
		{"no address", storedText(t, dialling(""))},
		{"a placeholder", storedText(t, dialling("{env.SECRET}:80"))},
		{"no port", storedText(t, dialling("10.0.0.1"))},
		{"port 0", storedText(t, dialling("10.0.0.1:0"))},
		{"not as healthy as asked for", storedText(t, func(s *stored) { s.Endpoints[0].Status = endpoint.Critical })},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := newMemoryStore()
				w := follow(t, silent{}, webQuery)
				store.values[w.keeper.key()] = tc.text
				w.keeper.use(store)
				time.Sleep(2 * coldStartAfter)
				if set := w.set.Load(); set != nil {
					t.Errorf("instances: got %v, want none", nodesOf(set))
				}
				if got := w.logged(zap.WarnLevel, msgUnusable); got != 1 {
					t.Errorf("warnings: got %d, want 1", got)
				}
			})
		})
	}
}

// refusing is a Consul that is down.
type refusing struct{}

func (refusing) RoundTrip(*http.Request) (*http.Response, error) {
	return nil, errors.New("connection refused")
}

// Each failure of Consul has the keeper look again, since storage may be away
// too, but what it finds is told once.
func TestWhatCanNotBeUsedIsToldOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newMemoryStore()
		w := follow(t, refusing{}, webQuery)
		store.values[w.keeper.key()] = []byte("noise")
		w.keeper.use(store)
		time.Sleep(10 * time.Minute)
		if got := w.logged(zap.WarnLevel, msgUnusable); got != 1 {
			t.Errorf("warnings in 10 minutes without Consul: got %d, want 1", got)
		}
		store.mu.Lock()
		store.values[w.keeper.key()] = storedText(t, func(*stored) {})
		store.mu.Unlock()
		time.Sleep(time.Minute)
		wantNodes(t, "when storage has them", w.set.Load(), "a")
	})
}

// Statuses index what counts them.
func TestAStoredStatusMustExist(t *testing.T) {
	query := webQuery
	query.Health = HealthAny
	for status, wanted := range map[endpoint.Status]bool{endpoint.Critical: true, endpoint.Maintenance: false, 200: false} {
		text := storedText(t, func(s *stored) { s.Query, s.Endpoints[0].Status = query.key(), status })
		if _, err := parseStored(text, &query); (err == nil) != wanted {
			t.Errorf("status %d: got error %v, want it to be accepted: %v", status, err, wanted)
		}
	}
}

func FuzzParseStored(f *testing.F) {
	f.Add([]byte(`{"version":1,"query":"x","endpoints":[{"Dial":"10.0.0.1:80"}]}`))
	f.Add([]byte(`{"version":1}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		value, err := parseStored(text, &webQuery)
		if err != nil {
			return
		}
		for _, e := range value.Endpoints {
			if err := checkDial(e.Dial); err != nil || e.Weight < 0 || e.Weight > MaxWeight {
				t.Errorf("accepted %q with weight %d, %v", e.Dial, e.Weight, err)
			}
		}
		endpoint.NewSet(&endpoint.Origin{}, value.Endpoints)
	})
}
