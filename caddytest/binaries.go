package caddytest

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// The environment variables that choose binaries.
const (
	consulBinaryVar = "CONSUL_BIN" // this Consul
	caddyBinaryVar  = "CADDY_BIN"  // this Caddy, instead of building cmd/caddy
	cacheVar        = "CADDY_CONSUL_CACHE"
)

// ConsulBinary returns the path of a Consul of at least version 1.18:
// $CONSUL_BIN, the one on PATH, or the one that `make consul` has built.
func ConsulBinary(t TB) string {
	t.Helper()
	script := filepath.Join(moduleRoot(t), "tools", "build.sh")
	var stderr bytes.Buffer
	find := exec.CommandContext(t.Context(), "sh", script, "--find", "consul")
	find.Stderr = &stderr
	stdout, err := find.Output()
	if err != nil {
		t.Fatalf("there is no Consul binary to test with: run `make consul` (once, about 7 minutes), "+
			"or put a consul of version 1.18 or later on PATH. %s", bytes.TrimSpace(stderr.Bytes()))
	}
	return strings.TrimSpace(string(stdout))
}

// XcaddyBinary returns the path of xcaddy at the version that tools/xcaddy pins.
// It builds it if need be, which takes seconds.
func XcaddyBinary(t TB) string {
	t.Helper()
	script := filepath.Join(moduleRoot(t), "tools", "build.sh")
	var stderr bytes.Buffer
	build := exec.CommandContext(t.Context(), "sh", script, "xcaddy")
	build.Stderr = &stderr
	stdout, err := build.Output()
	if err != nil {
		t.Fatalf("building xcaddy (tools/build.sh xcaddy): %v\n%s", err, stderr.Bytes())
	}
	return strings.TrimSpace(string(stdout))
}

// CaddyBinary returns the path of Caddy with this plugin: $CADDY_BIN, or
// cmd/caddy, built once for all tests of the package.
func CaddyBinary(t TB) string {
	t.Helper()
	if binary := os.Getenv(caddyBinaryVar); binary != "" {
		absolute, err := filepath.Abs(binary)
		if err != nil {
			t.Fatalf("%s=%s: %v", caddyBinaryVar, binary, err)
		}
		return absolute
	}
	owner := shared.owner(t)
	shared.binaryOnce.Do(func() {
		shared.binary = filepath.Join(owner.TempDir(), "caddy")
		shared.binaryErr = buildCaddy(moduleRoot(t), shared.binary)
	})
	if shared.binaryErr != nil {
		t.Fatalf("%v", shared.binaryErr)
	}
	return shared.binary
}

func buildCaddy(root, binary string) error {
	build := exec.Command("go", "build", "-o", binary, "./cmd/caddy")
	build.Dir = root
	if output, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("building Caddy with this plugin (go build ./cmd/caddy): %w\n%s", err, output)
	}
	return nil
}

// Result is what a finished command left behind.
type Result struct {
	Stdout, Stderr string
	Code           int // the exit status
}

// RunCaddy runs the Caddy binary to its end, with an empty home folder.
func RunCaddy(t TB, args ...string) Result {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(t.Context(), CaddyBinary(t), args...)
	cmd.Env = cleanEnvironment(homeIn(t.TempDir())...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatalf("running caddy %s: %v", strings.Join(args, " "), err)
	}
	return Result{Stdout: stdout.String(), Stderr: stderr.String(), Code: cmd.ProcessState.ExitCode()}
}

// homeIn returns the variables that make dir the place of a program's settings
// and data.
func homeIn(dir string) []string {
	return []string{
		"HOME=" + dir,
		"XDG_CONFIG_HOME=" + filepath.Join(dir, "config"),
		"XDG_DATA_HOME=" + filepath.Join(dir, "data"),
	}
}

// moduleRoot returns the root folder of the checkout.
func moduleRoot(t TB) string {
	t.Helper()
	stdout, err := exec.CommandContext(t.Context(), "go", "env", "GOMOD").Output()
	gomod := strings.TrimSpace(string(stdout))
	if err != nil || gomod == "" || gomod == os.DevNull {
		t.Fatalf("finding the checkout of caddy-consul: `go env GOMOD` returned %q, %v: run this inside the checkout", gomod, err)
	}
	return filepath.Dir(gomod)
}
