package discovery

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"syscall"
)

// errorKind sorts what goes wrong with queries into the few kinds that an
// operator deals with differently.
type errorKind int

const (
	kindOther errorKind = iota
	kindRefused
	kindReset
	kindTimeout
	kindTLS
	kindForbidden
	kindTooMany
	kindServer
	kindStatus
	kindAnswer
	kindIndex
	kindRights
	kindPanic
	numKinds
)

// String returns the name of the kind, as metrics and the admin API show it.
func (k errorKind) String() string {
	return [numKinds]string{
		"other", "refused", "reset", "timeout", "tls", "forbidden", "too_many_requests", "server", "status",
		"answer", "index", "rights", "panic",
	}[k]
}

// answerError is an answer that isn't what Consul says about a service.
type answerError struct{ err error }

func (e *answerError) Error() string { return e.err.Error() }
func (e *answerError) Unwrap() error { return e.err }

// timeoutError is an answer that didn't come in time.
type timeoutError struct{ text string }

func (e *timeoutError) Error() string { return e.text }
func (e *timeoutError) Timeout() bool { return true }

// panicError is a panic of ours.
type panicError struct{ reason any }

func (e *panicError) Error() string { return fmt.Sprintf("panic: %v", e.reason) }

func kindOf(err error) errorKind {
	var (
		status    *StatusError
		answer    *answerError
		panicked  *panicError
		timeout   interface{ Timeout() bool }
		dns       *net.DNSError
		record    tls.RecordHeaderError
		alert     tls.AlertError
		remote    *net.OpError
		verify    *tls.CertificateVerificationError
		authority x509.UnknownAuthorityError
	)
	switch {
	case errors.As(err, &status):
		switch {
		case status.Code == http.StatusForbidden || status.Code == http.StatusUnauthorized:
			return kindForbidden
		case status.Code == http.StatusTooManyRequests:
			return kindTooMany
		case status.Code >= 500:
			return kindServer
		}
		return kindStatus
	case errors.Is(err, errRightsLost):
		return kindRights
	case errors.As(err, &answer):
		return kindAnswer
	case errors.As(err, &panicked):
		return kindPanic
	case errors.As(err, &record), errors.As(err, &alert), errors.As(err, &verify), errors.As(err, &authority),
		errors.As(err, &remote) && remote.Op == opRemote, errors.Is(err, http.ErrSchemeMismatch):
		return kindTLS
	case errors.Is(err, syscall.ECONNREFUSED),
		errors.As(err, &remote) && remote.Op == "dial" && errors.Is(err, syscall.ENOENT): // no Unix socket
		return kindRefused
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE),
		errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return kindReset
	case errors.Is(err, context.DeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		return kindTimeout
	case errors.As(err, &dns):
		return kindOther
	}
	return kindOther
}

// errorCounts counts errors by kind.
type errorCounts [numKinds]atomic.Uint64

func (c *errorCounts) count(kind errorKind) { c[kind].Add(1) }

// byKind returns the counts of the kinds that have occurred.
func (c *errorCounts) byKind() map[string]uint64 {
	counts := make(map[string]uint64)
	for kind := range c {
		if n := c[kind].Load(); n > 0 {
			counts[errorKind(kind).String()] = n
		}
	}
	return counts
}
