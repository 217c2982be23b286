package endpoint_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-consul/caddy-consul/internal/endpoint"
)

// newRequest returns a request with what Caddy's server puts into its context.
func newRequest() *http.Request {
	r := httptest.NewRequest(http.MethodGet, "http://example.com/", nil)
	return caddyhttp.PrepareRequest(r, caddy.NewReplacer(), httptest.NewRecorder(), nil)
}

// attempt tells what Caddy does when it goes for an address.
func attempt(r *http.Request, hostport string) {
	r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer).Set("http.reverse_proxy.upstream.hostport", hostport)
}

func dials(pool []*reverseproxy.Upstream) []string {
	dials := make([]string, len(pool))
	for i, u := range pool {
		dials[i] = u.Dial
	}
	return dials
}

// source stands for a module: it is known by its identity. (It has a size,
// since two pointers to nothing may be equal.)
type source struct{ _ int }

func TestAnOfferIsWhatWasAskedFor(t *testing.T) {
	set := setOf(1, 2, 3)
	o := newOffer(newRequest(), new(source))
	if got, want := dials(o.One(set, 1)), []string{"10.0.0.1:2"}; !slices.Equal(got, want) {
		t.Errorf("offer of one: got %v, want %v", got, want)
	}
	pool := o.Some(set, []int32{2, 0})
	if got, want := dials(pool), []string{"10.0.0.1:3", "10.0.0.1:1"}; !slices.Equal(got, want) {
		t.Errorf("offer of some: got %v, want %v", got, want)
	}
	if o.Set() != set || !o.Is(pool) {
		t.Error("the offer does not know its Set and pool again")
	}
	if o.Is(pool[:1]) || o.Is(nil) || o.Is(reverseproxy.UpstreamPool{pool[1], pool[0]}) {
		t.Error("the offer takes another pool for its own")
	}
	var got []string
	for u, i := range o.All {
		e := set.At(i)
		if u.Dial != e.Dial {
			t.Errorf("upstream %s stands for the endpoint %s", u.Dial, e.Dial)
		}
		got = append(got, e.ID)
		if len(got) == 2 {
			break
		}
	}
	if want := []string{"web-3", "web-1"}; !slices.Equal(got, want) {
		t.Errorf("endpoints: got %v, want %v", got, want)
	}
}

// Caddy stores into upstreams: two requests that share one race, and so do two
// attempts of a request of which the first is still being read.
func TestUpstreamsAreNotShared(t *testing.T) {
	set := setOf(1)
	r1, r2, s := newRequest(), newRequest(), new(source)
	one, other := newOffer(r1, s).One(set, 0)[0], newOffer(r2, s).One(set, 0)[0]
	again := endpoint.OfferOf(r1, s).One(set, 0)[0]
	if one == other || again == other {
		t.Error("two requests share an upstream, want each its own")
	}
	if again == one {
		t.Error("two attempts share an upstream, want each its own")
	}
}

func TestOffersAreKeptBySource(t *testing.T) {
	r, a, b := newRequest(), new(source), new(source)
	if o := endpoint.OfferOf(r, a); o != nil {
		t.Errorf("before the first offer: got %v, want none", o)
	}
	offerA := newOffer(r, a)
	offerB := newOffer(r, b)
	third := newOffer(r, new(source))
	if endpoint.OfferOf(r, a) != offerA || endpoint.OfferOf(r, b) != offerB || third == offerB {
		t.Error("a source does not get its own offer back")
	}
	if o := endpoint.OfferOf(newRequest(), a); o != nil {
		t.Errorf("of another request: got %v, want none", o)
	}
}

func TestRequestsWithoutCaddysContext(t *testing.T) {
	r, s, set := httptest.NewRequest(http.MethodGet, "/", nil), new(source), setOf(1, 2)
	o := newOffer(r, s)
	pool := o.Some(set, []int32{0, 1})
	o.RememberAttempt(r)
	if got := o.Chosen(r); got != nil {
		t.Errorf("chosen: got %v, want none known", got)
	}
	if o := endpoint.OfferOf(r, s); o != nil {
		t.Errorf("offer: got %v, want it forgotten", o)
	}
	if got, want := endpoint.Weights(nil, r, pool), []int{1, 1}; !slices.Equal(got, want) {
		t.Errorf("weights: got %v, want %v", got, want)
	}
}

func TestChosen(t *testing.T) {
	endpoints := []endpoint.Endpoint{
		{Dial: "10.0.0.1:80"}, {Dial: "[2001:db8::7]:80"}, {Dial: "unix//run/web.sock"}, {Dial: "web.test:80"},
	}
	set := endpoint.NewSet(&endpoint.Origin{}, endpoints)
	for at, hostport := range []string{"10.0.0.1:80", "[2001:db8::7]:80", "/run/web.sock", "web.test:80"} {
		t.Run(hostport, func(t *testing.T) {
			r := newRequest()
			o := newOffer(r, new(source))
			o.Some(set, []int32{0, 1, 2, 3})
			if got := o.Chosen(r); got != nil {
				t.Errorf("before Caddy has chosen: got %v, want none", got)
			}
			attempt(r, hostport)
			if got := o.Chosen(r); got != set.At(at) {
				t.Errorf("chosen: got %v, want %v", got, set.At(at))
			}
			o.One(set, (at+1)%set.Len())
			if got := o.Chosen(r); got != nil {
				t.Errorf("chosen of an offer without it: got %v, want none", got)
			}
		})
	}
	t.Run("a static upstream", func(t *testing.T) {
		r := newRequest()
		o := newOffer(r, new(source))
		o.Some(set, []int32{0, 1})
		attempt(r, "192.0.2.1:80")
		if got := o.Chosen(r); got != nil {
			t.Errorf("chosen: got %v, want none of ours", got)
		}
	})
}

// The address that Caddy puts into the placeholder is what it makes of Dial.
func TestCaddysPlaceholderIsRecognised(t *testing.T) {
	for _, dial := range []string{"10.0.0.1:80", "[2001:db8::7]:80", "[fe80::1%eth0]:80", "unix//run/web.sock", "web.test:80", "WEB.test:80"} {
		t.Run(dial, func(t *testing.T) {
			address, err := caddy.ParseNetworkAddress(dial)
			if err != nil {
				t.Fatalf("Caddy can't parse the address: %v", err)
			}
			e := &endpoint.Endpoint{Dial: dial}
			if hostport := address.JoinHostPort(0); !e.IsDialledAs(hostport) {
				t.Errorf("endpoint %s is not recognised as %s", dial, hostport)
			}
		})
	}
	e := &endpoint.Endpoint{Dial: "10.0.0.1:80"}
	for _, other := range []string{"", "10.0.0.1:8", "10.0.0.1:800", "/10.0.0.1:80"} {
		if e.IsDialledAs(other) {
			t.Errorf("endpoint %s is taken for %q", e.Dial, other)
		}
	}
}

func TestAttemptsAreRemembered(t *testing.T) {
	set := setOf(1, 1, 1)
	r := newRequest()
	o := newOffer(r, new(source))
	tried := func() (tried []string) {
		for i := range set.Len() {
			if o.HasTried(set.At(i)) {
				tried = append(tried, set.At(i).ID)
			}
		}
		return tried
	}
	o.Some(set, []int32{0, 1})
	o.RememberAttempt(r)
	if got := tried(); len(got) != 0 {
		t.Errorf("tried before the first attempt: got %v, want none", got)
	}
	attempt(r, "10.0.0.1:2")
	for range 3 { // Caddy names the same when it finds no upstream
		o.RememberAttempt(r)
	}
	o.One(set, 0)
	attempt(r, "10.0.0.1:1")
	o.RememberAttempt(r)
	if got, want := tried(), []string{"web-1", "web-2"}; !slices.Equal(got, want) {
		t.Errorf("tried: got %v, want %v", got, want)
	}
	// the Set changes between attempts: what was tried is known by its address
	if other := setOf(1, 1, 1); !o.HasTried(other.At(0)) || o.HasTried(other.At(2)) {
		t.Error("tried in another Set: got others, want the same addresses")
	}
}

// A long-lived request with lb_try_duration must not collect addresses for ever.
func TestMemoryOfAttemptsIsBounded(t *testing.T) {
	const attempts = 1000
	set := setOf(make([]int, attempts)...)
	r := newRequest()
	o := newOffer(r, new(source))
	for i := range attempts {
		o.One(set, i)
		attempt(r, set.At(i).Dial)
		o.RememberAttempt(r)
	}
	count := 0
	for i := range attempts {
		if o.HasTried(set.At(i)) {
			count++
		}
	}
	if count == 0 || count > 100 {
		t.Errorf("addresses remembered after %d attempts: got %d, want some, and at most 100", attempts, count)
	}
}

// Caddy may go for an upstream that it was offered in an earlier request.
func TestAnOfferIsAddedTo(t *testing.T) {
	set := setOf(1, 1, 1)
	r := newRequest()
	o := newOffer(r, new(source))
	pool := o.One(set, 1)
	o.Add(&reverseproxy.Upstream{Dial: set.At(2).Dial}, 2)
	attempt(r, set.At(2).Dial)
	if got := o.Chosen(r); got != set.At(2) {
		t.Errorf("chosen: got %v, want %v", got, set.At(2))
	}
	if o.RememberAttempt(r); !o.HasTried(set.At(2)) || o.HasTried(set.At(1)) {
		t.Error("tried: got others, want the one that was added")
	}
	if got, want := dials(pool), []string{set.At(1).Dial}; !slices.Equal(got, want) {
		t.Errorf("what Caddy was offered: got %v, want %v", got, want)
	}
}

func foreign(n int) reverseproxy.UpstreamPool {
	pool := make(reverseproxy.UpstreamPool, n)
	for i := range pool {
		pool[i] = &reverseproxy.Upstream{Dial: fmt.Sprintf("192.0.2.1:%d", i)}
	}
	return pool
}

// `dynamic multi` joins the pools of its sources.
func TestWeightsOfAPool(t *testing.T) {
	a, b := setOf(5, 6, 7), setOf(50, 60)
	static := foreign(2)
	join := slices.Concat[reverseproxy.UpstreamPool]
	for _, tc := range []struct {
		name string
		pool func(a, b reverseproxy.UpstreamPool) reverseproxy.UpstreamPool
		want []int
	}{
		{"a source's own", func(a, _ reverseproxy.UpstreamPool) reverseproxy.UpstreamPool { return a }, []int{7, 5}},
		{"the other source's", func(_, b reverseproxy.UpstreamPool) reverseproxy.UpstreamPool { return b }, []int{50, 60}},
		{"both", func(a, b reverseproxy.UpstreamPool) reverseproxy.UpstreamPool { return join(a, b) }, []int{7, 5, 50, 60}},
		{"both, the other way round", func(a, b reverseproxy.UpstreamPool) reverseproxy.UpstreamPool { return join(b, a) }, []int{50, 60, 7, 5}},
		{"static ones between", func(a, b reverseproxy.UpstreamPool) reverseproxy.UpstreamPool {
			return join(static[:1], a, static[1:], b)
		}, []int{1, 7, 5, 1, 50, 60}},
		{"static ones alone", func(_, _ reverseproxy.UpstreamPool) reverseproxy.UpstreamPool { return static }, []int{1, 1}},
		{"none", func(_, _ reverseproxy.UpstreamPool) reverseproxy.UpstreamPool { return nil }, nil},
		{"with gaps", func(_, b reverseproxy.UpstreamPool) reverseproxy.UpstreamPool {
			return reverseproxy.UpstreamPool{b[0], static[0], b[1]}
		}, []int{50, 1, 60}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRequest()
			poolA := newOffer(r, new(source)).Some(a, []int32{2, 0})
			poolB := newOffer(r, new(source)).Some(b, []int32{0, 1})
			if got := endpoint.Weights(nil, r, tc.pool(poolA, poolB)); !slices.Equal(got, tc.want) {
				t.Errorf("weights: got %v, want %v", got, tc.want)
			}
		})
	}
}

// On a retry a source may offer anew while another stays as it was; the upstreams
// of the attempt before are nobody's any more.
func TestWeightsAfterARetry(t *testing.T) {
	r, set := newRequest(), setOf(5, 6, 7)
	a, b := newOffer(r, new(source)), newOffer(r, new(source))
	old := a.Some(set, []int32{0, 1, 2})
	poolB := b.One(setOf(9), 0)
	fresh := a.One(set, 1)
	pool := slices.Concat[reverseproxy.UpstreamPool](fresh, poolB)
	if got, want := endpoint.Weights(nil, r, pool), []int{6, 9}; !slices.Equal(got, want) {
		t.Errorf("weights of the new pool: got %v, want %v", got, want)
	}
	if got, want := endpoint.Weights(nil, r, old), []int{1, 1, 1}; !slices.Equal(got, want) {
		t.Errorf("weights of the pool before: got %v, want %v", got, want)
	}
}

func TestWeightsAreAppended(t *testing.T) {
	r := newRequest()
	pool := newOffer(r, new(source)).One(setOf(5), 0)
	if got, want := endpoint.Weights([]int{3}, r, pool), []int{3, 5}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func newOffer(r *http.Request, source any) *endpoint.Offer {
	o, _ := endpoint.OfferTo(r, source)
	return o
}
