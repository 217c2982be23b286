package discovery

import (
	"fmt"
	"math"
	"net"
	"net/http"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/consul/api"
	"go.uber.org/zap"
)

// The rules of a blocking query, each with what breaks without it. All run in
// fake time against an agent that answers by hand, since a real one gives these
// answers only when it is restored from a snapshot, overloaded or broken.

// A Consul that was restored from a snapshot counts from a lower index. Who
// goes on asking with the higher one sleeps through every change until the
// index is reached again.
func TestAnIndexThatWentBackwardsStartsAgainFromTheBeginning(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		consul := newScripted()
		w := follow(t, consul, webQuery)
		consul.nextFrom(t, "").instances(100, web("a"), web("b"))
		consul.nextFrom(t, "100").instances(50, web("a"), web("b"))
		again := consul.nextFrom(t, "")
		wantNodes(t, "while Consul is asked from the beginning", w.set.Load(), "a", "b")
		again.instances(51, web("a"), web("b"), web("c"))
		consul.nextOfTheLeader(t).instances(51, web("a"), web("b"), web("c"))
		consul.nextFrom(t, "51").instances(52, web("b"), web("c"))
		consul.nextFrom(t, "52")
		wantNodes(t, "after that", w.set.Load(), "b", "c")
	})
}

// An agent that was restarted, or another one behind the same address, may be
// at a lower index too, and a query with the old one would be held for as long
// as it may: new instances unseen, and the failure not known to be over.
func TestAfterAFaultTheQueryStartsAgainFromTheBeginning(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		consul := newScripted()
		w := follow(t, consul, webQuery)
		consul.nextFrom(t, "").instances(1000, web("a"))
		consul.nextFrom(t, "1000").refuse()
		consul.nextFrom(t, "").instances(10, web("b"))
		consul.nextOfTheLeader(t).instances(10, web("b"))
		consul.nextFrom(t, "10")
		wantNodes(t, "after the restart", w.set.Load(), "b")
		if f := w.failing.Load(); f != nil {
			t.Errorf("state after the restart: got failing with %v, want none", f.err)
		}
	})
}

// A server of Consul that was restarted tells, while it reads its log, what was so
// long ago. None of it reaches the traffic: the leader is asked, who answers when
// it knows all.
func TestWhatARestartedConsulRemembersIsConfirmed(t *testing.T) {
	for _, consistency := range []Consistency{ConsistencyDefault, ConsistencyStale} {
		t.Run(string(consistency), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				query := webQuery
				query.Consistency = consistency
				consul := newScripted()
				w := follow(t, consul, query)
				consul.nextFrom(t, "").instances(1000, web("a"), web("b"))
				consul.nextFrom(t, "1000").refuse()
				consul.nextFrom(t, "").instances(12, web("long-gone"))
				question := consul.nextOfTheLeader(t)
				wantNodes(t, "while the leader is asked", w.set.Load(), "a", "b")
				question.reply(http.StatusInternalServerError, nil, "Not ready to serve consistent reads")
				consul.nextOfTheLeader(t).instances(1001, web("b"), web("c"))
				consul.nextFrom(t, "1001")
				wantNodes(t, "when the leader knows all", w.set.Load(), "b", "c")
				if got := w.logged(zap.WarnLevel, msgFailing); got != 1 {
					t.Errorf("warnings: got %d, want 1", got)
				}
			})
		})
	}
}

// Who asks the leader anyway needs no confirmation.
func TestTheLeadersOwnWordIsBelieved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		query := webQuery
		query.Consistency = ConsistencyConsistent
		consul := newScripted()
		w := follow(t, consul, query)
		consul.nextFrom(t, "").instances(1000, web("a"))
		consul.nextFrom(t, "1000").instances(10, web("b"))
		consul.nextFrom(t, "")
		wantNodes(t, "after the index went backwards", w.set.Load(), "b")
	})
}

func TestIndex0NeitherStopsTheBlockingNorSpins(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		consul := newScripted()
		w := follow(t, consul, webQuery)
		consul.nextFrom(t, "").instances(0, web("a"))
		start, asked := time.Now(), 0
		for time.Since(start) < time.Minute {
			consul.nextFrom(t, "1").instances(0, web("a"))
			asked++
		}
		if asked > 40 {
			t.Errorf("an agent that always answers with index 0 is asked %d times in a minute, want at most 40", asked)
		}
		wantNodes(t, "meanwhile", w.set.Load(), "a")
	})
}

func TestAnAnswerWithoutAUsableIndexIsAFault(t *testing.T) {
	for _, index := range []string{"", "abc", "-1", "1.5", "0x10", "18446744073709551616"} {
		t.Run(strconv.Quote(index), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				consul := newScripted()
				w := follow(t, consul, webQuery)
				consul.next().instances(9, web("a"))
				header := map[string]string{"X-Consul-Index": index}
				if index == "" {
					header = nil
				}
				for range 3 {
					consul.next().reply(http.StatusOK, header, listed([]*api.ServiceEntry{web("b")}))
				}
				consul.next()
				wantNodes(t, "after the answers without an index", w.set.Load(), "a")
				if f := w.failing.Load(); f == nil || !strings.Contains(f.err.Error(), "X-Consul-Index") {
					t.Errorf("failure: got %v, want one that names X-Consul-Index", f)
				}
				if got := w.logged(zap.WarnLevel, msgFailing); got != 1 {
					t.Errorf("warnings: got %d, want 1", got)
				}
			})
		})
	}
}

// The policies carry their position by the identity of the Set, and every new
// one costs building its tables.
func TestAnAnswerThatSaysTheSamePublishesNothing(t *testing.T) {
	a, b := web("a"), web("b")
	a.Service.Tags, a.Service.Meta = []string{"v1"}, map[string]string{"zone": "z", "rack": "r"}
	other := func(change func(*api.ServiceEntry)) *api.ServiceEntry {
		copied := web("a")
		copied.Service.Tags, copied.Service.Meta = []string{"v1"}, map[string]string{"rack": "r", "zone": "z"}
		change(copied)
		return copied
	}
	for _, tc := range []struct {
		name   string
		answer []*api.ServiceEntry
		isNew  bool
	}{
		{name: "a wake-up without a change", answer: []*api.ServiceEntry{a, b}},
		{name: "another order", answer: []*api.ServiceEntry{b, a}},
		{name: "another output of a check", answer: []*api.ServiceEntry{other(func(e *api.ServiceEntry) {
			e.Checks[0].Output = "took 3 ms"
		}), b}},
		{name: "another address", isNew: true, answer: []*api.ServiceEntry{other(func(e *api.ServiceEntry) { e.Service.Address = "x" }), b}},
		{name: "another port", isNew: true, answer: []*api.ServiceEntry{other(func(e *api.ServiceEntry) { e.Service.Port = 81 }), b}},
		{name: "another weight", isNew: true, answer: []*api.ServiceEntry{other(func(e *api.ServiceEntry) { e.Service.Weights.Passing = 2 }), b}},
		{name: "another tag", isNew: true, answer: []*api.ServiceEntry{other(func(e *api.ServiceEntry) { e.Service.Tags[0] = "v2" }), b}},
		{name: "other meta data", isNew: true, answer: []*api.ServiceEntry{other(func(e *api.ServiceEntry) { e.Service.Meta["zone"] = "y" }), b}},
		{name: "an instance more", isNew: true, answer: []*api.ServiceEntry{a, b, web("c")}},
		{name: "an instance less", isNew: true, answer: []*api.ServiceEntry{a}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				consul := newScripted()
				w := follow(t, consul, webQuery)
				consul.next().instances(1, a, b)
				question := consul.next()
				before := w.set.Load()
				question.instances(2, tc.answer...)
				consul.nextFrom(t, "2")
				if got := w.set.Load() != before; got != tc.isNew {
					t.Errorf("published a new Set: got %t, want %t", got, tc.isNew)
				}
			})
		})
	}
}

// Consul's own jitter is added by the agent only without the streaming backend,
// and a fleet of proxies started at one time would ask at one time for ever.
// Consul refuses to wait for longer than 10 minutes.
func TestTheWaitIsJittered(t *testing.T) {
	for _, wait := range []time.Duration{10 * time.Second, 5 * time.Minute, 10 * time.Minute} {
		t.Run(wait.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				consul := newScripted()
				query := webQuery
				query.Wait = wait
				follow(t, consul, query)
				consul.next().instances(1)
				shortest, longest := wait, time.Duration(0)
				for i := range 300 {
					question := consul.next()
					got := question.wait(t)
					shortest, longest = min(shortest, got), max(longest, got)
					question.instances(uint64(2 + i))
				}
				if shortest < wait*9/10-time.Millisecond || longest > wait {
					t.Errorf("wait: got %s to %s, want within %s to %s", shortest, longest, wait*9/10, wait)
				}
				if spread := longest - shortest; spread < wait/20 {
					t.Errorf("wait: got %s to %s, want them spread over a tenth of %s", shortest, longest, wait)
				}
			})
		})
	}
}

// The official client has no deadline of its own: an agent whose machine hangs
// would be waited for without end. Consul may add a sixteenth to the wait.
func TestAQueryIsGivenUpWhenConsulIsLongOverdue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		consul := newScripted()
		w := follow(t, consul, webQuery)

		unanswered := consul.nextFrom(t, "")
		again := consul.nextFrom(t, "")
		if got := again.at.Sub(unanswered.at); got < answerSlack || got > answerSlack+200*time.Millisecond {
			t.Errorf("the first question is asked again after %s, want %s and a short pause", got, answerSlack)
		}
		again.instances(1, web("a"))

		unanswered = consul.nextFrom(t, "1")
		deadline := unanswered.wait(t)*17/16 + answerSlack
		again = consul.next()
		if got := again.at.Sub(unanswered.at); got < deadline || got > deadline+200*time.Millisecond {
			t.Errorf("a question that Consul may hold for %s is given up after %s, want %s", unanswered.wait(t), got, deadline)
		}
		if f := w.failing.Load(); f == nil || !strings.Contains(f.err.Error(), "no answer within") {
			t.Errorf("failure: got %v, want one that says how long there was no answer", f)
		}
		wantNodes(t, "meanwhile", w.set.Load(), "a")
	})
}

func TestAnAnswerAtTheEndOfTheWaitIsInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		consul := newScripted()
		w := follow(t, consul, webQuery)
		consul.next().instances(1, web("a"))
		question := consul.next()
		time.Sleep(question.wait(t) * 17 / 16) // fake time
		question.instances(1, web("a"))
		consul.nextFrom(t, "1")
		if f := w.failing.Load(); f != nil {
			t.Errorf("state: got failing with %v, want none", f.err)
		}
	})
}

func TestFailuresAreSpacedOutAndOneSuccessForgetsThem(t *testing.T) {
	for _, c := range []struct {
		name        string
		fail        func(*ask)
		most        time.Duration
		least, many int // questions in an hour
	}{
		{"nobody listens", (*ask).refuse, refusedCap, 1000, 2000},
		{"overloaded", func(a *ask) { a.reply(http.StatusInternalServerError, nil, "no leader") }, backoffCap, 120, 500},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				consul := newScripted()
				follow(t, consul, webQuery)
				last := consul.next()
				var longest time.Duration
				start, asked := time.Now(), 0
				for time.Since(start) < time.Hour {
					c.fail(last)
					next := consul.next()
					longest = max(longest, next.at.Sub(last.at))
					last = next
					asked++
				}
				if longest > c.most+10*time.Millisecond || longest < c.most/2 {
					t.Errorf("longest pause in an hour of failures: got %s, want up to %s", longest, c.most)
				}
				if asked < c.least || asked > c.many {
					t.Errorf("questions in an hour of failures: got %d, want %d to %d", asked, c.least, c.many)
				}
				last.instances(1, web("a"))
				fails := consul.next()
				c.fail(fails)
				if got := consul.next().at.Sub(fails.at); got > backoffBase+paceMin+time.Millisecond {
					t.Errorf("first pause after a success: got %s, want at most %s", got, backoffBase)
				}
			})
		})
	}
}

// A token that loses its rights gets the answer of a service without instances:
// the traffic would end though all instances are well.
func TestEmptinessForLackOfRightsKeepsTheInstances(t *testing.T) {
	filtered := func(index string) map[string]string {
		return map[string]string{"X-Consul-Index": index, "X-Consul-Results-Filtered-By-ACLs": "true"}
	}
	synctest.Test(t, func(t *testing.T) {
		consul := newScripted()
		w := follow(t, consul, webQuery)
		consul.next().instances(1, web("a"))
		consul.next().reply(http.StatusOK, filtered("2"), "[]")
		consul.next().reply(http.StatusOK, filtered("2"), "[]")
		question := consul.next()
		wantNodes(t, "without rights", w.set.Load(), "a")
		if f := w.failing.Load(); f == nil || !strings.Contains(f.err.Error(), "service:read") {
			t.Errorf("failure: got %v, want one that names the missing right", f)
		}
		question.instances(3, web("b"))
		consul.next()
		wantNodes(t, "with rights again", w.set.Load(), "b")
		if got := w.logged(zap.WarnLevel, msgFailing); got != 1 {
			t.Errorf("warnings: got %d, want 1", got)
		}
		if got := w.logged(zap.InfoLevel, msgRecovered); got != 1 {
			t.Errorf("lines about the recovery: got %d, want 1", got)
		}
	})
}

func TestTrueEmptinessIsHonoured(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		consul := newScripted()
		w := follow(t, consul, webQuery)
		consul.next().instances(1, web("a"))
		consul.next().instances(2)
		question := consul.next()
		wantNodes(t, "after the last one has gone", w.set.Load())
		if f := w.failing.Load(); f != nil {
			t.Errorf("state: got failing with %v, want none", f.err)
		}
		question.instances(3, web("b"))
		consul.next()
		wantNodes(t, "when another has come", w.set.Load(), "b")
	})
}

// A partial view is one: Consul also sets the header when it has left out a
// part of the answer only.
func TestAnAnswerThatIsFilteredInPartIsFollowed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		consul := newScripted()
		w := follow(t, consul, webQuery)
		consul.next().instances(1, web("a"), web("b"))
		consul.next().reply(http.StatusOK,
			map[string]string{"X-Consul-Index": "2", "X-Consul-Results-Filtered-By-ACLs": "true"},
			listed([]*api.ServiceEntry{web("b")}))
		consul.next()
		wantNodes(t, "of a partial view", w.set.Load(), "b")
	})
}

// panicking is a transport with a bug that shows once.
type panicking struct {
	http.RoundTripper
	once *atomic.Bool
}

func (p panicking) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.Query().Get("index") == "13" && !p.once.Swap(true) {
		panic("injected")
	}
	return p.RoundTripper.RoundTrip(r)
}

func TestAPanicCostsNothingButALine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		consul := newScripted()
		w := follow(t, panicking{consul, new(atomic.Bool)}, webQuery)
		consul.nextFrom(t, "").instances(13, web("a"))
		question := consul.nextFrom(t, "")
		wantNodes(t, "after a panic", w.set.Load(), "a")
		if got := w.logged(zap.ErrorLevel, msgPanic); got != 1 {
			t.Errorf("lines about the panic: got %d, want 1", got)
		}
		question.instances(14, web("b"))
		consul.nextFrom(t, "14")
		wantNodes(t, "when it is over", w.set.Load(), "b")
	})
}

// With the streaming backend these headers say nothing about the answer.
func TestKnownLeaderAndLastContactDecideNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		consul := newScripted()
		w := follow(t, consul, webQuery)
		consul.next().reply(http.StatusOK,
			map[string]string{"X-Consul-Index": "4", "X-Consul-Knownleader": "false", "X-Consul-Lastcontact": "0"},
			listed([]*api.ServiceEntry{web("a")}))
		consul.nextFrom(t, "4")
		wantNodes(t, "from an agent that knows no leader", w.set.Load(), "a")
		if f := w.failing.Load(); f != nil {
			t.Errorf("state: got failing with %v, want none", f.err)
		}
	})
}

// A deployment changes a service hundreds of times in a second. The first
// change is to be seen at once, and the last one soon, at a bounded cost.
func TestAFloodOfChangesIsCoalesced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		consul := newLive(web("start"))
		w := follow(t, inMemory{consul}, webQuery)
		firstSet(t, w.watcher)
		time.Sleep(time.Minute) // fake time: the service is quiet
		before := len(consul.questions())

		consul.set(web("first"))
		synctest.Wait()
		wantNodes(t, "at once after the first change", w.set.Load(), "first")
		for i := range 1000 {
			time.Sleep(time.Millisecond)
			consul.set(web(fmt.Sprintf("flood-%d", i)))
		}
		if got, most := len(consul.questions())-before, 3+int(time.Second/paceMin); got > most {
			t.Errorf("questions in a second with 1000 changes: got %d, want at most %d", got, most)
		}
		time.Sleep(paceMin)
		synctest.Wait()
		wantNodes(t, "soon after the last change", w.set.Load(), "flood-999")
	})
}

func TestThePaceFollowsWhatAnswersCost(t *testing.T) {
	for _, tc := range []struct {
		cost, want time.Duration
	}{
		{0, paceMin},
		{time.Millisecond, paceMin},
		{20 * time.Millisecond, 200 * time.Millisecond},
		{140 * time.Millisecond, 1400 * time.Millisecond}, // 5,000 instances
		{10 * time.Second, paceMax},
	} {
		t.Run(tc.cost.String(), func(t *testing.T) {
			p := newPacer()
			p.answered(tc.cost)
			if got := 1 / float64(p.limiter.Limit()); math.Abs(got-tc.want.Seconds()) > 1e-6 {
				t.Errorf("pause between answers that cost %s: got %.3f s, want %s", tc.cost, got, tc.want)
			}
		})
	}
}

func TestBackoff(t *testing.T) {
	for kind, want := range map[errorKind][]time.Duration{
		kindServer:  {100, 200, 400, 800, 1600, 3200, 6400, 12800, 25600, 30000, 30000, 30000},
		kindRefused: {100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000, 5000},
	} {
		var b backoff
		for i, ceiling := range want {
			ceiling *= time.Millisecond
			if got := b.ceiling(kind); got != ceiling {
				t.Errorf("%s: longest pause after failure %d: got %s, want %s", kind, i+1, got, ceiling)
			}
			if got := b.next(kind); got <= 0 || got > ceiling+time.Millisecond {
				t.Errorf("%s: pause after failure %d: got %s, want at most %s", kind, i+1, got, ceiling)
			}
		}
		for range 1000 {
			b.next(kind)
		}
		longestOfAll := want[len(want)-1] * time.Millisecond
		if got := b.ceiling(kind); got != longestOfAll {
			t.Errorf("%s: longest pause after 1000 failures: got %s, want %s", kind, got, longestOfAll)
		}
		shortest, longest := longestOfAll, time.Duration(0)
		for range 1000 {
			pause := b.next(kind)
			shortest, longest = min(shortest, pause), max(longest, pause)
		}
		if shortest > longestOfAll/20 || longest < longestOfAll*19/20 {
			t.Errorf("%s: 1000 pauses: got %s to %s, want full jitter up to %s", kind, shortest, longest, longestOfAll)
		}
		b.reset()
		if got := b.ceiling(kind); got != backoffBase {
			t.Errorf("%s: longest pause after a success: got %s, want %s", kind, got, backoffBase)
		}
	}
}

func TestAWatcherEndsAtOnce(t *testing.T) {
	for _, tc := range []struct {
		name string
		wait func(*scripted)
	}{
		{"while Consul holds the question", func(s *scripted) { s.next() }},
		{"while it pauses after a failure", func(s *scripted) {
			for range 8 {
				s.next().refuse()
			}
		}},
		{"before its first question", func(*scripted) {}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				consul := newScripted()
				w := follow(t, consul, webQuery)
				tc.wait(consul)
				start := time.Now()
				w.stop()
				<-w.done
				if got := time.Since(start); got != 0 {
					t.Errorf("the watcher ended after %s, want at once", got)
				}
			})
		})
	}
}

// A Unix socket that is not there is the same as a port where nobody listens.
func TestNoSocketIsARefusal(t *testing.T) {
	_, err := net.Dial("unix", filepath.Join(t.TempDir(), "consul.sock"))
	if got := kindOf(err); got != kindRefused {
		t.Errorf("%v: got kind %s, want %s", err, got, kindRefused)
	}
}
