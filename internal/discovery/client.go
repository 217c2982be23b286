package discovery

import (
	"cmp"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"
)

// answerLimit bounds the size of an answer. 5,000 instances with a check each
// are 13.5 MB.
const answerLimit = 256 << 20

// reasonLimit bounds what is told of an answer other than 200.
const reasonLimit = 300

// errOutdated ends the queries of a client whose credentials were replaced.
var errOutdated = errors.New("the credentials of the query were replaced")

// client asks a Consul agent with one set of credentials.
//
// Configuration, environment and TLS are the official client's. The request is
// our own: the official one ignores an index that it can't parse, puts no bound
// on an answer, follows redirects with the token in hand, and decodes all of an
// answer of which we use a fifth.
type client struct {
	http  *http.Client
	base  string // scheme, host and path prefix
	token string
	auth  *api.HttpBasicAuth
	limit int64 // on the size of an answer

	life context.Context // ends, with the reason, when the client is closed
	end  context.CancelCauseFunc
}

// newClient reads the credentials of config.
func newClient(config *api.Config) (*client, error) {
	base, socket, err := baseURL(config)
	if err != nil {
		return nil, err
	}
	tlsConfig, err := newTLSConfig(config)
	if err != nil {
		return nil, fmt.Errorf("loading the TLS files for Consul at %s: %w", base, err)
	}
	token := config.Token
	if config.TokenFile != "" {
		content, err := os.ReadFile(config.TokenFile)
		if err != nil {
			return nil, fmt.Errorf("reading the token for Consul at %s: %w", base, err)
		}
		if token = strings.TrimSpace(string(content)); token == "" { // half written, or by mistake: Consul would take us for anonymous
			return nil, fmt.Errorf("reading the token for Consul at %s: the file %s is empty", base, config.TokenFile)
		}
		if strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r == 0x7f }) { // not to be repeated in the log
			return nil, fmt.Errorf("reading the token for Consul at %s: the file %s holds more than a token", base, config.TokenFile)
		}
	}
	dialer := &net.Dialer{
		Timeout: 5 * time.Second,
		KeepAliveConfig: net.KeepAliveConfig{ // notice within half a minute that the agent's machine has gone
			Enable: true, Idle: 10 * time.Second, Interval: 5 * time.Second, Count: 4,
		},
	}
	transport := &http.Transport{
		Proxy:               http.ProxyFromEnvironment,
		DialContext:         dialer.DialContext,
		TLSClientConfig:     tlsConfig,
		TLSHandshakeTimeout: 10 * time.Second,
		ForceAttemptHTTP2:   true, // over TLS all watchers share one connection
		MaxIdleConnsPerHost: 64,
		IdleConnTimeout:     90 * time.Second,
		DisableCompression:  true, // the agent is near; compressing costs it more than sending
	}
	if socket != "" {
		transport.Proxy = nil
		transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", socket)
		}
	}
	c := &client{
		http: &http.Client{
			Transport: transport,
			// a redirect could carry the token elsewhere
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		base:  base,
		token: token,
		auth:  config.HttpAuth,
		limit: answerLimit,
	}
	c.life, c.end = context.WithCancelCause(context.Background())
	return c, nil
}

// close ends the queries under way, for the given reason.
func (c *client) close(reason error) {
	c.end(reason)
	c.http.CloseIdleConnections()
}

// baseURL splits the address of config into what requests are sent to and, if
// the agent listens on one, the path of the unix socket.
func baseURL(config *api.Config) (base, socket string, err error) {
	scheme, address, hasScheme := strings.Cut(config.Address, "://")
	if !hasScheme {
		scheme, address = cmp.Or(config.Scheme, "http"), config.Address
	}
	if isPath := scheme == "unix" && strings.HasPrefix(address, "/"); strings.Contains(config.Address, "@") && !isPath { // not to be repeated in the log
		return "", "", errors.New("the address of Consul has a user or password; CONSUL_HTTP_AUTH is the place for them")
	}
	switch scheme {
	case "unix":
		if !strings.HasPrefix(address, "/") {
			return "", "", fmt.Errorf("address %q of Consul: want unix:// and an absolute path", config.Address)
		}
		return "http://localhost", address, nil
	case "http":
		if config.Scheme == "https" { // asked for by tls or CONSUL_HTTP_SSL
			scheme = "https"
		}
	case "https":
	default:
		return "", "", fmt.Errorf("address %q of Consul: scheme %q is not known: want http, https or unix", config.Address, scheme)
	}
	u, err := url.Parse(scheme + "://" + address)
	if err != nil || u.Hostname() == "" || u.RawQuery != "" || u.Fragment != "" || !isPort(u.Port()) || strings.ContainsAny(address, "{} ") {
		return "", "", fmt.Errorf("address %q of Consul: want host:port, http://host:port, https://host:port or unix:///path", config.Address)
	}
	if u.Port() == "" && !hasScheme {
		u.Host = net.JoinHostPort(u.Hostname(), "8500")
	}
	return strings.TrimSuffix(u.String()+config.PathPrefix, "/"), "", nil
}

// isPort reports whether a URL may have that port. It may have none.
func isPort(text string) bool {
	port, err := strconv.ParseUint(text, 10, 16)
	return text == "" || err == nil && port > 0
}

// answer is what Consul said, but for the body, which has been read.
type answer struct {
	size     int64 // of the body
	index    uint64
	filtered bool // Consul left out what the token may not see
	shared   bool // it came over a connection that carries many queries at once

	// streamed: it comes from a view that the agent keeps for blocking queries,
	// and filtered says nothing.
	streamed bool

	// outdated: its index is lower than that of an answer before, and it is not
	// the leader's word.
	outdated bool
}

// get sends a query and has read read the body of the answer to it. An error
// names what was asked, of whom and what came back, and no secret.
func (c *client) get(ctx context.Context, path string, params url.Values, read func(io.Reader) error) (*answer, error) {
	ctx, giveUp := context.WithCancelCause(ctx)
	defer giveUp(nil)
	defer context.AfterFunc(c.life, func() { giveUp(context.Cause(c.life)) })()

	a, err := c.exchange(ctx, path, params, read)
	if err == nil {
		return a, nil
	}
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	var urlError *url.Error // repeats the address
	if errors.As(err, &urlError) {
		err = urlError.Err
	}
	return nil, fmt.Errorf("asking Consul at %s for %s: %w", c.base, path, c.tellable(err))
}

// tellable returns err, or its text if that repeats a secret, as what Go says of
// a malformed header does.
func (c *client) tellable(err error) error {
	if text := err.Error(); c.withoutSecrets(text) != text {
		return errors.New(c.withoutSecrets(text))
	}
	return err
}

func (c *client) exchange(ctx context.Context, path string, params url.Values, read func(io.Reader) error) (*answer, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.base+path+"?"+params.Encode(), nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/json")
	if c.token != "" {
		req.Header.Set("X-Consul-Token", c.token)
	}
	if c.auth != nil {
		req.SetBasicAuth(c.auth.Username, c.auth.Password)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, cmp.Or(c.refusal(ctx, err), err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 10*reasonLimit)) // more, lest a secret be cut in two
		reason := c.withoutSecrets(strings.TrimSpace(string(text)))
		return nil, &StatusError{resp.StatusCode, reason[:min(len(reason), reasonLimit)]}
	}
	index, err := strconv.ParseUint(resp.Header.Get("X-Consul-Index"), 10, 64)
	if err != nil {
		return nil, &answerError{fmt.Errorf("the answer has no valid X-Consul-Index header (%q): is it a Consul agent?",
			c.withoutSecrets(resp.Header.Get("X-Consul-Index")))}
	}
	size, err := c.readBody(resp.Body, read)
	if err != nil {
		return nil, err
	}
	return &answer{
		size:     size,
		index:    index,
		filtered: resp.Header.Get("X-Consul-Results-Filtered-By-ACLs") == "true",
		streamed: resp.Header.Get("X-Consul-Query-Backend") == "streaming" && params.Has("index"),
		shared:   resp.ProtoMajor >= 2,
	}, nil
}

// withoutSecrets keeps a proxy between us and Consul from echoing what it got
// into our log.
func (c *client) withoutSecrets(text string) string {
	secrets := []string{c.token}
	if c.auth != nil {
		secrets = append(secrets, c.auth.Password,
			base64.StdEncoding.EncodeToString([]byte(c.auth.Username+":"+c.auth.Password)))
	}
	for _, secret := range secrets {
		if secret != "" {
			text = strings.ReplaceAll(text, secret, "(secret)")
		}
	}
	return text
}

// readBody has read read a body, to its end, and returns its size.
func (c *client) readBody(body io.Reader, read func(io.Reader) error) (size int64, err error) {
	source := &source{Reader: body}
	limited := io.LimitedReader{R: source, N: c.limit + 1}
	err = read(&limited)
	size = c.limit + 1 - limited.N
	switch {
	case limited.N == 0:
		return 0, &answerError{fmt.Errorf("the answer is larger than %d bytes", c.limit)}
	case source.err != nil:
		return 0, fmt.Errorf("reading the answer after %d bytes: %w", size, source.err)
	case err != nil:
		return 0, &answerError{err}
	}
	return size, nil
}

// source tells an answer that can't be read from one that can't be understood.
type source struct {
	io.Reader
	err error // why it ended early
}

func (s *source) Read(p []byte) (n int, err error) {
	n, err = s.Reader.Read(p)
	if err != nil && err != io.EOF { //nolint:errorlint // a Reader returns it as it is
		s.err = err
	}
	return n, err
}

// StatusError is an answer of Consul other than 200.
type StatusError struct {
	Code int
	Text string
}

func (e *StatusError) Error() string {
	return fmt.Sprintf("it answered %d %s: %q%s", e.Code, http.StatusText(e.Code), e.Text, e.advice())
}

// advice says what to do about the status.
func (e *StatusError) advice() string {
	switch e.Code {
	case http.StatusForbidden:
		return " (the token: " + rightsNeeded + ")"
	case http.StatusTooManyRequests:
		return " (see limits.http_max_conns_per_client in the agent's configuration)"
	case http.StatusBadRequest:
		return " (see the filter and the datacenter of the source)"
	}
	return ""
}
