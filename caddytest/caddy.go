package caddytest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"github.com/caddyserver/caddy/v2"

	// the Caddyfile and Caddy's own modules
	_ "github.com/caddyserver/caddy/v2/modules/standard"
)

// Caddy is a running Caddy with an admin endpoint of its own on loopback.
// Configs are loaded through that endpoint, as users do.
type Caddy struct {
	t      TB
	admin  string // the URL of the admin endpoint, without a slash at the end
	client *http.Client
	logs   *Logs
	home   string
	config []byte // what was loaded last

	process *process // nil if it runs in this process
	stop    func() error
	stopped sync.Once
}

// CaddyOption is an option of StartCaddy and StartCaddyBinary.
type CaddyOption func(*Caddy)

// WithHome keeps Caddy's settings and data in a folder that outlives it.
func WithHome(dir string) CaddyOption { return func(c *Caddy) { c.home = dir } }

// inProcess is held by the Caddy that runs in this process: there can be only
// one, since Caddy's state is global.
var inProcess sync.Mutex

// StartCaddy starts Caddy in this process, without a config. It ends with the
// test. The modules are those that the test binary imports.
//
// Logs of level INFO and above, or those that the config's default log lets
// through, go to Logs.
func StartCaddy(t TB, options ...CaddyOption) *Caddy {
	t.Helper()
	if !inProcess.TryLock() {
		t.Fatalf("a Caddy runs in this process already, and there can be only one: stop it first, or use StartCaddyBinary")
	}
	c := newCaddy(t, options)
	release := c.takeOverProcess()
	c.stop = func() error {
		defer inProcess.Unlock()
		defer release()
		return c.stopInProcess()
	}
	c.cleanUp()
	if err := caddy.Load(c.withLogs([]byte(`{}`)), true); err != nil {
		t.Fatalf("starting Caddy: %v", err)
	}
	return c
}

// StartCaddyBinary starts the Caddy binary as `caddy run` with a Caddyfile, and
// waits until it serves it. It ends with the test.
func StartCaddyBinary(t TB, caddyfile string, options ...CaddyOption) *Caddy {
	t.Helper()
	c := newCaddy(t, options)
	file := filepath.Join(t.TempDir(), "Caddyfile")
	if err := os.WriteFile(file, []byte(caddyfile), 0o600); err != nil {
		t.Fatalf("writing a Caddyfile: %v", err)
	}
	cmd := exec.Command(CaddyBinary(t), "run", "--config", file, "--adapter", "caddyfile")
	cmd.Env = cleanEnvironment(append(homeIn(c.home), "CADDY_ADMIN="+c.adminAddress())...)
	var err error
	if c.process, err = startProcess("Caddy", cmd, c.logs); err != nil {
		t.Fatalf("%v", err)
	}
	c.stop = c.process.stop
	c.cleanUp()
	Eventually(t, Patience, func() error {
		if err := c.process.hasEnded(); err != nil {
			t.Fatalf("%v; its log:\n%s", err, c.logs.tail(20))
		}
		config, err := c.ask(http.MethodGet, "/config/", "", nil)
		if err == nil && string(bytes.TrimSpace(config)) == "null" {
			err = errors.New("no config is running yet")
		}
		return err
	})
	return c
}

func newCaddy(t TB, options []CaddyOption) *Caddy {
	t.Helper()
	c := &Caddy{
		t:     t,
		admin: "http://" + FreeAddress(t),
		// without keep-alive, since Caddy replaces the endpoint at each load
		client: &http.Client{Timeout: Patience, Transport: &http.Transport{DisableKeepAlives: true}},
		logs:   newLogs(),
	}
	for _, option := range options {
		option(c)
	}
	if c.home == "" {
		c.home = t.TempDir()
	}
	return c
}

func (c *Caddy) adminAddress() string { return strings.TrimPrefix(c.admin, "http://") }

func (c *Caddy) cleanUp() {
	c.t.Cleanup(func() {
		c.Stop()
		c.logs.printIfFailed(c.t, "Caddy")
	})
}

// takeOverProcess points Caddy's global settings to c, and returns what undoes
// that.
func (c *Caddy) takeOverProcess() (release func()) {
	restore := []func(){
		set(&caddy.DefaultAdminListen, c.adminAddress()),
		set(&caddy.DefaultStorage.Path, filepath.Join(c.home, "data", "caddy")),
		set(&caddy.ConfigAutosavePath, filepath.Join(c.home, "config", "caddy", "autosave.json")),
	}
	for _, variable := range homeIn(c.home) {
		if name, value, _ := strings.Cut(variable, "="); name != "HOME" {
			restore = append(restore, setenv(name, value))
		}
	}
	memoryLog.use(c.logs)
	return func() {
		for _, undo := range restore {
			undo()
		}
	}
}

func set[T any](variable *T, value T) (undo func()) {
	before := *variable
	*variable = value
	return func() { *variable = before }
}

func setenv(name, value string) (undo func()) {
	before, found := os.LookupEnv(name)
	os.Setenv(name, value)
	if !found {
		return func() { os.Unsetenv(name) }
	}
	return func() { os.Setenv(name, before) }
}

func (c *Caddy) stopInProcess() error {
	// caddy.Stop leaves the admin endpoint open; a config without one closes it
	if err := caddy.Load(c.withLogs([]byte(`{"admin": {"disabled": true}}`)), true); err != nil {
		return fmt.Errorf("closing Caddy's admin endpoint: %w", err)
	}
	if err := caddy.Stop(); err != nil {
		return fmt.Errorf("stopping Caddy: %w", err)
	}
	return nil
}

// withLogs makes the default log of a config go to Logs, unless it says where
// to. What is no valid config is left to Caddy to refuse.
func (c *Caddy) withLogs(config []byte) []byte {
	if c.process != nil {
		return config
	}
	var fields map[string]any
	if err := json.Unmarshal(config, &fields); err != nil || fields == nil {
		return config
	}
	log, ok := dig(fields, "logging", "logs", "default")
	if !ok {
		return config
	}
	if _, hasWriter := log["writer"]; !hasWriter {
		log["writer"] = map[string]any{"output": memoryLogName}
	}
	withLogs, err := json.Marshal(fields)
	if err != nil {
		return config
	}
	return withLogs
}

// dig returns the object at a path, which it makes where it is missing; not ok
// if something else is there.
func dig(object map[string]any, path ...string) (_ map[string]any, ok bool) {
	for _, key := range path {
		if object[key] == nil {
			object[key] = map[string]any{}
		}
		if object, ok = object[key].(map[string]any); !ok {
			return nil, false
		}
	}
	return object, true
}

// Stop ends Caddy. The test's end does it too.
func (c *Caddy) Stop() {
	c.t.Helper()
	c.stopped.Do(func() {
		if err := c.stop(); err != nil {
			c.t.Errorf("%v", err)
		}
	})
}

// Logs returns what Caddy has logged.
func (c *Caddy) Logs() *Logs { return c.logs }

// Load makes Caddy run a Caddyfile.
func (c *Caddy) Load(caddyfile string) {
	c.t.Helper()
	if err := c.TryLoad(caddyfile); err != nil {
		c.t.Fatalf("%v", err)
	}
}

// LoadJSON makes Caddy run a JSON config.
func (c *Caddy) LoadJSON(config string) {
	c.t.Helper()
	if err := c.TryLoadJSON(config); err != nil {
		c.t.Fatalf("%v", err)
	}
}

// TryLoad is Load that returns Caddy's objection.
func (c *Caddy) TryLoad(caddyfile string) error {
	c.t.Helper()
	// Adapted first, since the harness adds a log, and a line in front of the
	// Caddyfile would shift the line numbers in errors.
	config, err := c.Adapt(caddyfile)
	if err != nil {
		return err
	}
	return c.TryLoadJSON(config)
}

// TryLoadJSON is LoadJSON that returns Caddy's objection.
func (c *Caddy) TryLoadJSON(config string) error {
	c.t.Helper()
	body := c.withLogs([]byte(config))
	if err := c.load(body); err != nil {
		return err
	}
	c.config = body
	return nil
}

// Reload makes Caddy run the last config again, as a new one.
func (c *Caddy) Reload() {
	c.t.Helper()
	if c.config == nil {
		c.t.Fatalf("there is no config to reload: load one first")
	}
	if err := c.load(c.config); err != nil {
		c.t.Fatalf("%v", err)
	}
}

func (c *Caddy) load(config []byte) error {
	_, err := c.ask(http.MethodPost, "/load", "application/json", config)
	return err
}

// Adapt returns the JSON config that Caddy makes of a Caddyfile, or its
// objection.
func (c *Caddy) Adapt(caddyfile string) (string, error) {
	c.t.Helper()
	answer, err := c.ask(http.MethodPost, "/adapt", "text/caddyfile", []byte(caddyfile))
	if err != nil {
		return "", err
	}
	var adapted struct {
		Result json.RawMessage `json:"result"`
	}
	if err := json.Unmarshal(answer, &adapted); err != nil {
		return "", fmt.Errorf("reading what Caddy's admin endpoint answered to POST /adapt: %w", err)
	}
	return string(adapted.Result), nil
}

// Get returns what the admin endpoint answers to a GET request, say for
// "/reverse_proxy/upstreams" or "/metrics".
func (c *Caddy) Get(path string) string {
	c.t.Helper()
	answer, err := c.ask(http.MethodGet, path, "", nil)
	if err != nil {
		c.t.Fatalf("%v", err)
	}
	return string(answer)
}

// AdminURL returns the URL of the admin endpoint.
func (c *Caddy) AdminURL() string { return c.admin }

// ask sends a request to the admin endpoint. An answer that is no success is an
// error that holds Caddy's words.
//
// A request can meet the endpoint of the last config while it shuts down, which
// then closes the connection without reading the request.
func (c *Caddy) ask(method, path, contentType string, body []byte) ([]byte, error) {
	answer, err := c.askOnce(method, path, contentType, body)
	for attempt := 1; attempt < 3 && isUnanswered(err); attempt++ {
		answer, err = c.askOnce(method, path, contentType, body)
	}
	return answer, err
}

func isUnanswered(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET)
}

func (c *Caddy) askOnce(method, path, contentType string, body []byte) ([]byte, error) {
	request, err := http.NewRequest(method, c.admin+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	if contentType != "" {
		request.Header.Set("Content-Type", contentType)
		request.Header.Set("Cache-Control", "must-revalidate") // the same config is a new one
	}
	response, err := c.client.Do(request)
	if err != nil {
		return nil, fmt.Errorf("asking Caddy's admin endpoint: %w", err)
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	if err != nil {
		return nil, fmt.Errorf("reading the answer of Caddy's admin endpoint to %s %s: %w", method, path, err)
	}
	if response.StatusCode != http.StatusOK {
		return nil, objection(response.StatusCode, answer)
	}
	return answer, nil
}

func objection(status int, answer []byte) error {
	var refusal struct {
		Error string `json:"error"`
	}
	if err := json.Unmarshal(answer, &refusal); err != nil || refusal.Error == "" {
		return fmt.Errorf("Caddy's admin endpoint answered with status %d: %s", status, bytes.TrimSpace(answer))
	}
	return errors.New(refusal.Error)
}
