package discovery

import (
	"sync/atomic"

	"go.uber.org/zap"
)

// trouble is that of an agent whose credentials can't be read any more, so that
// it goes on with the old ones. It is told once.
type trouble struct {
	loggers loggers
	told    atomic.Pointer[error]

	suspected bool // the goroutine's own
}

// is takes note of a look at the files that failed. The first one is forgiven:
// who writes a file in place leaves it half written for a moment.
func (t *trouble) is(address string, err error) {
	if !t.suspected {
		t.suspected = true
		return
	}
	if t.told.Swap(&err) == nil {
		t.loggers.newest().Warn("the credentials for Consul can't be read any more; the old ones stay in use",
			zap.String("agent", address), zap.Error(err))
	}
}

// isOver takes note of a look at the files that found them in order.
func (t *trouble) isOver(address string) {
	t.suspected = false
	if t.told.Swap(nil) != nil {
		t.loggers.newest().Info("the credentials for Consul can be read again", zap.String("agent", address))
	}
}

// reason returns why the credentials can't be read, or nothing while they can.
func (t *trouble) reason() string {
	if err := t.told.Load(); err != nil {
		return (*err).Error()
	}
	return ""
}
