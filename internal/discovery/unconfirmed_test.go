package discovery

import (
	"errors"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"

	"go.uber.org/zap"
)

// Consul's streaming backend answers blocking queries from a view that it keeps
// for the token. When the token loses its rights that view is empty, and says
// nothing of ACLs: only a query for the leader's own word tells the one emptiness from
// the other.
func TestEmptinessOfAViewIsConfirmed(t *testing.T) {
	streamed := func(index string) map[string]string {
		return map[string]string{"X-Consul-Index": index, "X-Consul-Query-Backend": "streaming"}
	}
	for _, tc := range []struct {
		name    string
		confirm map[string]string
		want    []string
		failing bool
	}{
		{
			name: "rights were lost", want: []string{"a"}, failing: true,
			confirm: map[string]string{"X-Consul-Index": "2", "X-Consul-Results-Filtered-By-ACLs": "true"},
		},
		{
			name:    "the last instance has gone",
			confirm: map[string]string{"X-Consul-Index": "2", "X-Consul-Query-Backend": "blocking-query"},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				consul := newScripted()
				w := follow(t, consul, webQuery)
				consul.nextFrom(t, "").instances(1, web("a"))
				consul.nextFrom(t, "1").reply(http.StatusOK, streamed("1"), "[]")
				question := consul.nextOfTheLeader(t)
				wantNodes(t, "before the confirmation", w.set.Load(), "a")
				question.reply(http.StatusOK, tc.confirm, "[]")
				consul.next()
				wantNodes(t, "after the confirmation", w.set.Load(), tc.want...)
				if got := w.failing.Load() != nil; got != tc.failing {
					t.Errorf("failing: got %v, want %v", got, tc.failing)
				}
				want := map[bool]int{true: 1}[tc.failing]
				if got := w.logged(zap.WarnLevel, msgFailing); got != want {
					t.Errorf("warnings: got %d, want %d", got, want)
				}
			})
		})
	}
}

// A view that was empty before is no news.
func TestEmptinessThatWasThereBeforeIsNotConfirmed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		consul := newScripted()
		follow(t, consul, webQuery)
		consul.nextFrom(t, "").instances(1)
		consul.nextFrom(t, "1").reply(http.StatusOK,
			map[string]string{"X-Consul-Index": "1", "X-Consul-Query-Backend": "streaming"}, "[]")
		consul.nextFrom(t, "1")
	})
}

// The names that requests may use do not go when a restarted Consul has yet to
// read of them.
func TestAnOutdatedListOfServicesIsNotBelieved(t *testing.T) {
	n := &names{first: make(chan struct{})}
	list := func(text string, a *answer) error {
		if err := n.read(strings.NewReader(text)); err != nil {
			t.Fatal(err)
		}
		return n.take(a)
	}
	if err := list(`{"web":[]}`, &answer{index: 9}); err != nil {
		t.Fatal(err)
	}
	if err := list(`{"old":[]}`, &answer{index: 3, outdated: true}); !errors.Is(err, errUnconfirmed) {
		t.Errorf("an outdated list: got error %v, want that it is unconfirmed", err)
	}
	if !n.has("web") || n.has("old") {
		t.Errorf("after an outdated list: got web %t and old %t, want true and false", n.has("web"), n.has("old"))
	}
}
