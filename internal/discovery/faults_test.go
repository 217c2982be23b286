package discovery

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"go.uber.org/zap"
)

// ill is a transport that asks an agent over the network, or as long as it has
// a fault of its own, gets that.
type ill struct {
	network *http.Transport
	target  string
	refuses atomic.Bool
}

func (i *ill) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.URL.Host = i.target
	if i.refuses.Load() {
		r.URL.Host = "127.0.0.1:1"
	}
	return i.network.RoundTrip(r)
}

// hijacked answers with bytes of its own making, and ends the connection.
func hijacked(answer string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			panic(err)
		}
		_, _ = io.WriteString(conn, answer)
		_ = conn.Close()
	}
}

func answering(status int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("X-Consul-Index", "999")
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}
}

// Whatever goes wrong between Consul and us, traffic goes on to where it went,
// the log has one line about it and one about its end, and a change that came
// meanwhile is seen. A real agent can't be made to have most of these faults.
func TestFaultsLeaveTheInstancesInPlace(t *testing.T) {
	oversized := listed(nil) + strings.Repeat(" ", 5000)
	for _, tc := range []struct {
		name  string
		fault http.HandlerFunc
		want  string // in the error
	}{
		{name: "connection refused", want: "refused"}, // by the transport
		{name: "connection reset", want: "reset", fault: func(w http.ResponseWriter, _ *http.Request) {
			conn, _, err := http.NewResponseController(w).Hijack()
			if err != nil {
				panic(err)
			}
			_ = conn.(*net.TCPConn).SetLinger(0)
			_ = conn.Close()
		}},
		// an agent at its limit of connections, seen through a kernel that has
		// thrown the answer away
		{name: "429 as an end of file", want: "EOF", fault: hijacked("")},
		{name: "429", want: "http_max_conns_per_client", fault: answering(429, "Your IP is issuing too many concurrent connections")},
		{name: "500", want: "rpc error", fault: answering(500, "rpc error making call: EOF")},
		{name: "500 without a leader", want: "No cluster leader", fault: answering(500, "No cluster leader")},
		{name: "503", want: "503", fault: answering(503, "")},
		{name: "504", want: "504", fault: answering(504, "<html>gateway</html>")},
		{name: "403", want: "service:read", fault: answering(403, "Permission denied: token lacks permission")},
		{name: "403 of a deleted token", want: "ACL not found", fault: answering(403, "ACL not found")},
		{name: "400", want: "see the filter", fault: answering(400, "Failed to create boolean expression evaluator")},
		{name: "404", want: "404", fault: answering(404, "")},
		{name: "204", want: "204", fault: answering(204, "")},
		{name: "truncated body", want: "reading the answer", fault: hijacked(
			"HTTP/1.1 200 OK\r\nX-Consul-Index: 9\r\nContent-Length: 900\r\n\r\n[{\"Node\":{")},
		{name: "truncated JSON", want: "the answer", fault: answering(200, `[{"Node":{"Node":"a"`)},
		{name: "truncated in a chunk", want: "reading the answer", fault: hijacked(
			"HTTP/1.1 200 OK\r\nX-Consul-Index: 9\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n[]")},
		{name: "no HTTP", want: "malformed", fault: hijacked("SSH-2.0-OpenSSH_9.9\r\n")},
		{name: "foreign JSON", want: "the answer", fault: answering(200, `{"a":1}`)},
		{name: "null", want: "no list of instances", fault: answering(200, `null`)},
		{name: "string", want: "the answer", fault: answering(200, `"x"`)},
		{name: "empty object", want: "the answer", fault: answering(200, `[{}]`)},
		{name: "null element", want: "the answer", fault: answering(200, `[null]`)},
		{name: "list of services", want: "the answer", fault: answering(200, `[{"Node":{"Node":"a","Address":"1.2.3.4"}}]`)},
		{name: "port as a string", want: "the answer", fault: answering(200, `[{"Node":{},"Service":{"Port":"80"}}]`)},
		{name: "two documents", want: "the answer", fault: answering(200, `[] []`)},
		{name: "HTML", want: "the answer", fault: answering(200, `<!doctype html><title>Sign in</title>`)},
		{name: "empty body", want: "the answer", fault: answering(200, "")},
		{name: "oversized body", want: "larger than", fault: answering(200, oversized)},
		{name: "oversized body in chunks", want: "larger than", fault: func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("X-Consul-Index", "9")
			for range 100 {
				_, _ = io.WriteString(w, strings.Repeat(" ", 100))
				_ = http.NewResponseController(w).Flush()
			}
		}},
		{name: "redirect", want: "302", fault: func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://elsewhere.invalid/", http.StatusFound)
		}},
		{name: "no index", want: "X-Consul-Index", fault: func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, listed(nil))
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			consul := newLive(web("a"), web("b"))
			server := serve(t, consul)
			transport := &ill{network: &http.Transport{}, target: server.Listener.Addr().String()}
			defer transport.network.CloseIdleConnections()
			w := followWith(t, webQuery, func(c *client) { c.http.Transport, c.limit = transport, 4000 })
			defer w.stop() // before the server, which waits for its requests
			before := firstSet(t, w.watcher)

			if tc.fault == nil {
				transport.refuses.Store(true)
				consul.fail(hijacked(""))
			} else {
				consul.fail(tc.fault)
			}
			const message = "Consul still gives no usable answer"
			eventually(t, func() error {
				if got := w.logged(zap.DebugLevel, message); got < 1 {
					return fmt.Errorf("failures after the first: got %d, want 1", got)
				}
				return nil
			})
			if w.set.Load() != before {
				t.Errorf("instances during the fault: got %v, want those from before", nodesOf(w.set.Load()))
			}
			if err := w.lastError(); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("failure: got %v, want one that says %q", err, tc.want)
			}
			if w.failingFor() <= 0 {
				t.Error("time of failing: got none, want some")
			}

			transport.refuses.Store(false)
			consul.recover()
			eventually(t, func() error {
				if err := w.lastError(); err != nil {
					return fmt.Errorf("failure after Consul has recovered without a change: got %w, want none", err)
				}
				return nil
			})
			if w.set.Load() != before {
				t.Errorf("instances after the recovery: got %v, want the same Set as before", nodesOf(w.set.Load()))
			}
			consul.set(web("a"), web("c"))
			eventually(t, func() error {
				if got := nodesOf(w.set.Load()); len(got) != 2 || got[1] != "c" {
					return fmt.Errorf("instances after a change: got %v, want [a c]", got)
				}
				return nil
			})
			if got := w.logged(zap.WarnLevel, msgFailing); got != 1 {
				t.Errorf("warnings about the fault: got %d, want 1", got)
			}
			if got := w.logged(zap.InfoLevel, msgRecovered); got != 1 {
				t.Errorf("lines about the recovery: got %d, want 1", got)
			}
		})
	}
}

// An agent that is down when Caddy starts is no different: the first answer is
// the first Set, whenever it comes.
func TestAFaultBeforeTheFirstAnswer(t *testing.T) {
	consul := newLive(web("a"))
	consul.fail(answering(500, "No cluster leader"))
	server := serve(t, consul)
	transport := &ill{network: &http.Transport{}, target: server.Listener.Addr().String()}
	defer transport.network.CloseIdleConnections()
	w := follow(t, transport, webQuery)
	defer w.stop()
	eventually(t, func() error {
		if w.lastError() == nil {
			return fmt.Errorf("failure: got none, want one")
		}
		return nil
	})
	if set := w.set.Load(); set != nil {
		t.Errorf("instances before the first answer: got %v, want none known", nodesOf(set))
	}
	consul.recover()
	wantNodes(t, "after the first answer", firstSet(t, w.watcher), "a")
}
