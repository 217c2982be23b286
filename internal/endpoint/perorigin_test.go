package endpoint

import (
	"sync"
	"sync/atomic"
	"testing"
)

func TestPerOriginKeepsStatesApart(t *testing.T) {
	var states PerOrigin[atomic.Uint64]
	origins := make([]*Origin, 50)
	for i := range origins {
		origins[i] = &Origin{Name: "web"}
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 100 {
				for _, o := range origins {
					states.Of(o).Add(1)
				}
			}
		})
	}
	wg.Wait()
	for i, o := range origins {
		if got := states.Of(o).Load(); got != 400 {
			t.Errorf("origin %d: got %d additions, want 400", i, got)
		}
	}
}

// Names that come from requests must not fill the memory.
func TestPerOriginIsBounded(t *testing.T) {
	var states PerOrigin[atomic.Uint64]
	for range 5 * maxOrigins {
		states.Of(&Origin{Name: "web"}).Add(1)
	}
	got := 1 // the first
	states.rest.Range(func(any, any) bool { got++; return true })
	if got > maxOrigins {
		t.Errorf("states: got %d, want at most %d", got, maxOrigins)
	}
}
