package caddytest_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caddy-consul/caddy-consul/caddytest"
)

// One `--with` installs all that the plugin has.
func TestXcaddyBuild(t *testing.T) {
	const module = "github.com/caddy-consul/caddy-consul"
	root, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	version := goOutput(t, "list", "-m", "-f", "{{.Version}}", "github.com/caddyserver/caddy/v2")
	binary := filepath.Join(t.TempDir(), "caddy")
	build := exec.CommandContext(t.Context(), caddytest.XcaddyBinary(t), "build", version,
		"--with", module+"="+root, "--output", binary)
	build.Dir = t.TempDir() // where it is built from must not matter
	build.Env = append(os.Environ(), "GOFLAGS=-buildvcs=false", "GOPROXY=file://"+unpublished(t, module)+","+goOutput(t, "env", "GOPROXY"))
	if output, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", build, err, output)
	}
	list, err := exec.CommandContext(t.Context(), binary, "list-modules").Output()
	if err != nil {
		t.Fatalf("caddy list-modules: %v", err)
	}
	wantModules(t, string(list))
}

// unpublished returns the folder of a module proxy which says that a module has
// no version yet. Others say it in ways that Go takes for a failure.
func unpublished(t *testing.T, module string) string {
	t.Helper()
	dir := t.TempDir()
	versions := filepath.Join(dir, module, "@v")
	if err := os.MkdirAll(versions, 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(versions, "list"), nil)
	return dir
}

func goOutput(t *testing.T, args ...string) string {
	t.Helper()
	output, err := exec.CommandContext(t.Context(), "go", args...).Output()
	if err != nil {
		t.Fatalf("go %s: %v", strings.Join(args, " "), err)
	}
	return strings.TrimSpace(string(output))
}
