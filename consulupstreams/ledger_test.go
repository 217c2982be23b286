package consulupstreams

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"sync"
	"testing"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-consul/caddy-consul/internal/endpoint"
)

// Instances of a test are named for their address and ordered by it.
func instancesAt(addresses ...string) []endpoint.Endpoint {
	endpoints := make([]endpoint.Endpoint, len(addresses))
	for i, address := range addresses {
		endpoints[i] = endpoint.Endpoint{Dial: address, Node: "node-" + address, Weight: 1}
	}
	return endpoints
}

// rememberAll takes note of an upstream, of a host of its own, for each of l.
func rememberAll(l *ledger) {
	for i := range l.set.Len() {
		l.remember(&reverseproxy.Upstream{Dial: l.set.At(i).Dial, Host: new(reverseproxy.Host)}, i, true)
	}
}

// Caddy forgets a host that has had no request for long and makes it anew. What
// the old one says must not be believed then, but an upstream that would keep a
// request's memory alive must not be noted either.
func TestAHostMadeAnewIsNoticed(t *testing.T) {
	l := newLedger(endpoint.NewSet(&endpoint.Origin{}, instancesAt("a")), nil)
	rememberAll(l)
	old := l.upstream(0)
	l.remember(&reverseproxy.Upstream{Dial: "a", Host: old.Host}, 0, false)
	if got := l.upstream(0); got != old {
		t.Errorf("the same host again: got %p, want what was noted, %p", got, old)
	}
	anew := &reverseproxy.Upstream{Dial: "a", Host: new(reverseproxy.Host)}
	l.remember(anew, 0, false)
	if got := l.upstream(0); got != nil || !l.mayRefuse(0) {
		t.Errorf("another host, of an upstream that may not be kept: got %p, want nothing noted", got)
	}
	l.remember(anew, 0, true)
	if got := l.upstream(0); got != anew {
		t.Errorf("another host, of an upstream that may be kept: got %p, want %p", got, anew)
	}
}

// remembered returns the addresses of which something is known.
func remembered(t *testing.T, l *ledger) (addresses []string) {
	t.Helper()
	for i := range l.set.Len() {
		upstream := l.upstream(i)
		if upstream == nil {
			continue
		}
		if upstream.Dial != l.set.At(i).Dial {
			t.Errorf("instance %s: got what is known of %s", l.set.At(i).Dial, upstream.Dial)
		}
		addresses = append(addresses, upstream.Dial)
	}
	return addresses
}

// Whatever becomes of the service, what Caddy has been seen to make of an
// instance that stays is still known.
func TestWhatIsKnownIsCarriedOver(t *testing.T) {
	abcde := []string{"a", "b", "c", "d", "e"}
	moved := instancesAt("a", "b", "c", "d", "e")
	moved[1].Node = "node-f"
	renumbered := instancesAt("a", "b", "x", "d", "e")
	renumbered[2].Node = "node-c"
	for _, tc := range []struct {
		name          string
		before, after []endpoint.Endpoint
		want          []string
	}{
		{"the same", instancesAt(abcde...), instancesAt(abcde...), abcde},
		{"first added", instancesAt(abcde[1:]...), instancesAt(abcde...), abcde[1:]},
		{"two added between", instancesAt("a", "d", "e"), instancesAt(abcde...), []string{"a", "d", "e"}},
		{"last added", instancesAt(abcde[:4]...), instancesAt(abcde...), abcde[:4]},
		{"first removed", instancesAt(abcde...), instancesAt(abcde[1:]...), abcde[1:]},
		{"two removed between", instancesAt(abcde...), instancesAt("a", "d", "e"), []string{"a", "d", "e"}},
		{"last removed", instancesAt(abcde...), instancesAt(abcde[:4]...), abcde[:4]},
		{"added and removed", instancesAt("a", "c", "d"), instancesAt("b", "c", "e"), []string{"c"}},
		{"all replaced", instancesAt("a", "c"), instancesAt("b", "d"), nil},
		{"moved to another node", instancesAt(abcde...), []endpoint.Endpoint{moved[0], moved[2], moved[3], moved[4], moved[1]}, []string{"a", "c", "d", "e", "b"}},
		{"another address", instancesAt(abcde...), renumbered, []string{"a", "b", "d", "e"}},
		{"in another order", instancesAt(abcde...), instancesAt("d", "a", "e", "c", "b"), []string{"d", "a", "e", "c", "b"}},
		{"by distance, one removed", instancesAt("d", "a", "e", "c", "b"), instancesAt("d", "e", "c", "b"), []string{"d", "e", "c", "b"}},
		{"by distance, one added", instancesAt("d", "a", "c", "b"), instancesAt("d", "a", "e", "c", "b"), []string{"d", "a", "c", "b"}},
		{"two at one address", instancesAt("a", "b", "b", "c"), instancesAt("b", "b", "c"), []string{"b", "b", "c"}},
		{"two at one address, in another order", instancesAt("a", "b", "b", "c"), instancesAt("b", "c", "a", "b"), []string{"b", "c", "a", "b"}},
		{"empty before", nil, instancesAt("a"), nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var known availability
			origin := new(endpoint.Origin)
			before := known.of(endpoint.NewSet(origin, tc.before))
			rememberAll(before)
			after := known.of(endpoint.NewSet(origin, tc.after))
			if got := remembered(t, after); !slices.Equal(got, tc.want) {
				t.Errorf("known: got %v, want %v", got, tc.want)
			}
		})
	}
}

// What is known of one service says nothing of another.
func TestWhatIsKnownIsKeptByService(t *testing.T) {
	var known availability
	sets := make([]*endpoint.Set, 3)
	for i := range sets {
		sets[i] = endpoint.NewSet(new(endpoint.Origin), instancesAt("a", "b"))
	}
	rememberAll(known.of(sets[0]))
	rememberAll(known.of(sets[2]))
	for i, want := range [][]string{{"a", "b"}, nil, {"a", "b"}} {
		if got := remembered(t, known.of(sets[i])); !slices.Equal(got, want) {
			t.Errorf("known of service %d: got %v, want %v", i, got, want)
		}
	}
}

// Late requests find what is known, and change nothing for the others.
func TestALateRequestKnowsWhatTheOthersKnow(t *testing.T) {
	var known availability
	origin := new(endpoint.Origin)
	old, latest := endpoint.NewSet(origin, instancesAt("a", "b", "c")), endpoint.NewSet(origin, instancesAt("b", "c", "d"))
	present := known.of(latest)
	rememberAll(present)
	late := known.of(old)
	if got, want := remembered(t, late), []string{"b", "c"}; !slices.Equal(got, want) {
		t.Errorf("known to a late request: got %v, want %v", got, want)
	}
	rememberAll(late)
	if known.of(latest) != present {
		t.Error("a late request has made the others start again, want them left alone")
	}
}

// For the race detector: requests of several Sets, all of which know and learn.
func TestLedgersWhileTheServiceChanges(t *testing.T) {
	var known availability
	origin := new(endpoint.Origin)
	sets := make([]*endpoint.Set, 50)
	for i := range sets {
		addresses := make([]string, 20)
		for k := range addresses {
			addresses[k] = strconv.Itoa(1000 + i + k)
		}
		sets[i] = endpoint.NewSet(origin, instancesAt(addresses...))
	}
	rememberAll(known.of(sets[0]))
	var group sync.WaitGroup
	for range 4 {
		group.Go(func() {
			for i := range sets {
				for _, set := range sets[max(i-2, 0) : i+1] {
					l := known.of(set)
					rememberAll(l)
					if got := remembered(t, l); len(got) != set.Len() {
						t.Errorf("known of %d instances that have been seen: got %d, want all", set.Len(), len(got))
					}
				}
			}
		})
	}
	group.Wait()
	last := sets[len(sets)-1]
	if got := remembered(t, known.of(last)); len(got) != last.Len() {
		t.Errorf("known of the last %d instances: got %d, want all", last.Len(), len(got))
	}
}

// The request that is the first to see a change pays for it.
func BenchmarkCarryOver(b *testing.B) {
	for _, bc := range []struct {
		name   string
		change func(addresses []string) []string
	}{
		{"one removed", func(addresses []string) []string {
			return slices.Delete(addresses, len(addresses)/2, len(addresses)/2+1)
		}},
		{"in another order", func(addresses []string) []string {
			rand.Shuffle(len(addresses), func(i, j int) { addresses[i], addresses[j] = addresses[j], addresses[i] })
			return addresses
		}},
	} {
		for _, n := range []int{100, 5000, 10000} {
			b.Run(fmt.Sprintf("%s/n=%d", bc.name, n), func(b *testing.B) {
				addresses := make([]string, n)
				for i := range addresses {
					addresses[i] = fmt.Sprintf("10.1.%03d.%03d:80", i/250, i%250)
				}
				origin := new(endpoint.Origin)
				before := newLedger(endpoint.NewSet(origin, instancesAt(addresses...)), nil)
				rememberAll(before)
				after := endpoint.NewSet(origin, instancesAt(bc.change(addresses)...))
				b.ReportAllocs()
				for b.Loop() {
					newLedger(after, before)
				}
			})
		}
	}
}
