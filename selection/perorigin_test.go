package selection

import (
	"sync"
	"sync/atomic"
	"testing"

	"github.com/caddy-consul/caddy-consul/internal/endpoint"
)

func TestPerOriginKeepsStatesApart(t *testing.T) {
	var states perOrigin[atomic.Uint64]
	origins := make([]*endpoint.Origin, 50)
	for i := range origins {
		origins[i] = &endpoint.Origin{Name: "web"}
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 100 {
				for _, o := range origins {
					states.of(o).Add(1)
				}
			}
		})
	}
	wg.Wait()
	for i, o := range origins {
		if got := states.of(o).Load(); got != 400 {
			t.Errorf("origin %d: got %d additions, want 400", i, got)
		}
	}
}

// Names that come from requests must not fill the memory.
func TestPerOriginIsBounded(t *testing.T) {
	var states perOrigin[atomic.Uint64]
	for range 5 * maxOrigins {
		states.of(&endpoint.Origin{Name: "web"}).Add(1)
	}
	got := 1 // the first
	states.rest.Range(func(any, any) bool { got++; return true })
	if got > maxOrigins {
		t.Errorf("states: got %d, want at most %d", got, maxOrigins)
	}
}
