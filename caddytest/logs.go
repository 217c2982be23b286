package caddytest

import (
	"bytes"
	"regexp"
	"strings"
	"sync"
	"time"
)

// Logs are the lines that a process has written, from some line on.
type Logs struct {
	lines *lines
	from  int
}

// lines collects what is written to it. Any number of goroutines may use it.
type lines struct {
	mu      sync.Mutex
	all     []string
	partial []byte
	grown   chan struct{} // closed, and replaced, when a line is added
}

func newLogs() *Logs { return &Logs{lines: &lines{grown: make(chan struct{})}} }

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	before := len(l.all)
	l.partial = append(l.partial, p...)
	for {
		line, rest, found := bytes.Cut(l.partial, []byte("\n"))
		if !found {
			break
		}
		l.all = append(l.all, string(line))
		l.partial = rest
	}
	if len(l.all) > before {
		close(l.grown)
		l.grown = make(chan struct{})
	}
	return len(p), nil
}

// snapshot returns the lines from index on, and a channel that is closed once
// there are more.
func (l *lines) snapshot(from int) ([]string, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all[from:len(l.all):len(l.all)], l.grown
}

// FromNow returns the Logs without the lines that there are so far.
func (l *Logs) FromNow() *Logs {
	l.lines.mu.Lock()
	defer l.lines.mu.Unlock()
	return &Logs{lines: l.lines, from: len(l.lines.all)}
}

// Lines returns the lines so far. They must not be modified.
func (l *Logs) Lines() []string {
	all, _ := l.lines.snapshot(l.from)
	return all
}

// Matching returns the lines so far that match a regular expression.
func (l *Logs) Matching(expression string) []string {
	pattern := regexp.MustCompile(expression)
	var found []string
	for _, line := range l.Lines() {
		if pattern.MatchString(line) {
			found = append(found, line)
		}
	}
	return found
}

// Count returns how many of the lines so far match a regular expression.
func (l *Logs) Count(expression string) int { return len(l.Matching(expression)) }

// Wait returns the first line that matches a regular expression: one that is
// there already, or one that comes within Patience.
func (l *Logs) Wait(t TB, expression string) string {
	t.Helper()
	pattern := regexp.MustCompile(expression)
	deadline := time.NewTimer(Patience)
	defer deadline.Stop()
	for seen := l.from; ; {
		more, grown := l.lines.snapshot(seen)
		for _, line := range more {
			if pattern.MatchString(line) {
				return line
			}
		}
		seen += len(more)
		select {
		case <-grown:
		case <-deadline.C:
			t.Fatalf("no log line matched %q within %v; the last of %d were:\n%s",
				expression, Patience, seen-l.from, l.tail(20))
		case <-t.Context().Done():
			t.Fatalf("interrupted while waiting for a log line that matches %q", expression)
		}
	}
}

// tail returns the last lines, at most count.
func (l *Logs) tail(count int) string {
	all := l.Lines()
	return strings.Join(all[max(0, len(all)-count):], "\n")
}

// printIfFailed prints the end of the logs if the test has failed.
func (l *Logs) printIfFailed(t TB, of string) {
	t.Helper()
	if t.Failed() {
		t.Logf("the end of the log of %s:\n%s", of, l.tail(200))
	}
}
