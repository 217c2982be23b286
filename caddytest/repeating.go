package caddytest

import (
	"errors"
	"io"
	"net/http"
	"sync/atomic"
	"syscall"
)

// Repeating sends a request again if the connection ends before an answer has
// begun, as browsers do. It is for requests without a body.
//
// Use it where Caddy reloads under traffic and no request may fail. A server of
// net/http that shuts down, as that of the old config does, closes connections
// that it has just accepted without reading a request from them (conn.serve).
// With any handler, and the more so the busier the machine is, that costs a
// request in some hundreds while configs are loaded, none of which has reached
// the handler. Count what the backends got to be sure of the latter.
type Repeating struct {
	http.RoundTripper
	repeated atomic.Int64
}

// maxRepeats is how often a request is repeated at most.
const maxRepeats = 5

// RoundTrip sends a request, and again if need be.
func (r *Repeating) RoundTrip(request *http.Request) (response *http.Response, err error) {
	for range 1 + maxRepeats {
		response, err = r.RoundTripper.RoundTrip(request)
		if !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
			break
		}
		r.repeated.Add(1)
	}
	return response, err
}

// CloseIdleConnections closes the connections that are not in use.
func (r *Repeating) CloseIdleConnections() {
	if transport, ok := r.RoundTripper.(interface{ CloseIdleConnections() }); ok {
		transport.CloseIdleConnections()
	}
}

// Repeated returns how many times a request was sent again.
func (r *Repeating) Repeated() int { return int(r.repeated.Load()) }
