package caddytest

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// stopGrace is what a process gets to end by itself after a SIGTERM.
const stopGrace = 10 * time.Second

// process is a child process, the leader of a process group of its own.
type process struct {
	name string
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
	err  error         // why, once done is closed
}

// startProcess starts cmd with its output going to logs. The caller must see to
// its end.
func startProcess(name string, cmd *exec.Cmd, logs *Logs) (*process, error) {
	p := &process{name: name, cmd: cmd, done: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = logs.lines, logs.lines
	cmd.WaitDelay = time.Second // for a grandchild that keeps the output open
	cmd.SysProcAttr = processAttributes()

	started := make(chan error, 1)
	go func() {
		// The kernel ends the child when the thread that started it ends, so
		// that thread has to last as long.
		runtime.LockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			p.err = cmd.Wait()
			close(p.done)
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("starting %s (%s): %w", name, strings.Join(cmd.Args, " "), err)
	}
	return p, nil
}

// hasEnded returns a reason if the process has ended.
func (p *process) hasEnded() error {
	select {
	case <-p.done:
		return fmt.Errorf("%s has ended: %w", p.name, cmp.Or(p.err, errors.New("exit status 0")))
	default:
		return nil
	}
}

// signal sends sig to the process group, unless the process has ended.
func (p *process) signal(sig syscall.Signal) error {
	if p.hasEnded() != nil {
		return nil
	}
	if err := syscall.Kill(-p.cmd.Process.Pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("sending %v to %s (process %d): %w", sig, p.name, p.cmd.Process.Pid, err)
	}
	return nil
}

// stop asks the process to end, makes it if it doesn't, and waits for it.
func (p *process) stop() error {
	err := p.signal(syscall.SIGTERM)
	_ = p.signal(syscall.SIGCONT) // one that is paused could not end
	grace := time.NewTimer(stopGrace)
	defer grace.Stop()
	select {
	case <-p.done:
		return err
	case <-grace.C:
		_ = p.kill()
		return fmt.Errorf("%s (process %d) had not ended %v after SIGTERM, and was killed",
			p.name, p.cmd.Process.Pid, stopGrace)
	}
}

// kill ends the process at once and waits for it.
func (p *process) kill() error {
	if err := p.signal(syscall.SIGKILL); err != nil {
		return err
	}
	<-p.done
	return nil
}

// cleanEnvironment returns the environment of this process without what would
// change the behaviour of Consul or Caddy, and with the given additions.
func cleanEnvironment(additions ...string) []string {
	var env []string
	for _, variable := range os.Environ() {
		name, _, _ := strings.Cut(variable, "=")
		if !isForeignSetting(name) && !strings.HasPrefix(name, "XDG_") {
			env = append(env, variable)
		}
	}
	return append(env, additions...)
}
