package caddytest

import (
	"io"
	"sync"

	"github.com/caddyserver/caddy/v2"
)

// memoryLogName is the name of the log writer, a Caddy module, by which the
// Caddy in this process logs to its Logs.
const memoryLogName = "caddytest"

func init() { caddy.RegisterModule(memoryLogWriter{}) }

// memoryLog is where the writer writes to: the Logs of the Caddy that was
// started last in this process.
var memoryLog memoryLogTarget

type memoryLogTarget struct {
	mu   sync.RWMutex
	logs *Logs
}

func (m *memoryLogTarget) use(logs *Logs) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.logs = logs
}

func (m *memoryLogTarget) Write(p []byte) (int, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.logs.lines.Write(p)
}

type memoryLogWriter struct{}

func (memoryLogWriter) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "caddy.logging.writers." + memoryLogName,
		New: func() caddy.Module { return new(memoryLogWriter) },
	}
}

func (memoryLogWriter) String() string    { return memoryLogName }
func (memoryLogWriter) WriterKey() string { return memoryLogName }

func (memoryLogWriter) OpenWriter() (io.WriteCloser, error) { return memoryLogWriter{}, nil }

func (memoryLogWriter) Write(p []byte) (int, error) { return memoryLog.Write(p) }
func (memoryLogWriter) Close() error                { return nil }

var _ caddy.WriterOpener = memoryLogWriter{}
