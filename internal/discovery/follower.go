package discovery

import (
	"context"
	"errors"
	"io"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
)

// follower asks one question again and again, in one goroutine, and hands each
// answer on. It keeps Consul's rules for blocking queries.
//
// It outlives the config that started it, so it keeps nothing of a config but
// the loggers of those that hold it now.
type follower struct {
	agent    *agent
	question question
	subject  zap.Field // what is followed, for the log

	// read reads the body of an answer, to its end, and take uses what was read
	// last. An error says why it is no usable answer.
	read func(io.Reader) error
	take func(*answer) error

	// disturbed, if set, is called when Consul fails to answer, and when the
	// credentials have changed.
	disturbed func()

	// tide, if set, stands in for blocking while the agent has no place for one
	// more query that is held open.
	tide func() *tide

	started time.Time
	loggers loggers
	failing atomic.Pointer[failure]
	answers atomic.Uint64
	heard   atomic.Int64 // when Consul answered last, in Unix nanoseconds
	errors  errorCounts
	blocks  atomic.Bool   // a query is held open
	reached atomic.Uint64 // the index of the last answer

	// the goroutine's own
	index    uint64
	highest  uint64 // index of what was believed
	confirms bool   // the next answer is to confirm the last one, or not
	pacer    *pacer
	backoff  backoff
	client   *client // that the last question went through, at the latest
	holds    bool    // a place among the queries held open
	tideMark uint64

	stop context.CancelFunc
	done chan struct{}
}

// failure is a time in which Consul gives no usable answer.
type failure struct {
	since time.Time
	err   error
}

// start begins to follow.
func (f *follower) start() {
	f.started = time.Now()
	f.pacer = newPacer()
	f.done = make(chan struct{})
	var ctx context.Context
	ctx, f.stop = context.WithCancel(context.Background())
	go f.run(ctx)
}

// end stops following, and returns when the goroutine has ended.
func (f *follower) end() {
	f.stop()
	<-f.done
}

func (f *follower) run(ctx context.Context) {
	defer close(f.done)
	for ctx.Err() == nil {
		f.step(ctx)
	}
	if f.holds {
		f.agent.unblock()
	}
}

// step asks once and deals with the answer. A panic counts as a failure: what
// was known stays, and the follower goes on.
func (f *follower) step(ctx context.Context) {
	defer func() {
		if reason := recover(); reason != nil {
			f.loggers.newest().Error("recovered from a panic while following Consul; please report it",
				f.subject, zap.Any("panic", reason), zap.ByteString("stack", debug.Stack()))
			f.failed(ctx, &panicError{reason})
		}
	}()

	f.pacer.wait(ctx)
	f.client = f.agent.current()
	answer, err := f.ask(ctx)
	switch {
	case ctx.Err() != nil:
	case errors.Is(err, errOutdated):
		f.index = 0 // what the new credentials may see is not what the old ones saw
		f.disturb()
	case err != nil:
		f.failed(ctx, err)
	default:
		f.answered(ctx, answer)
	}
}

// ask holds a query open, or asks without blocking when the tide has turned.
func (f *follower) ask(ctx context.Context) (*answer, error) {
	if f.tide != nil && !f.holds && !f.agent.multiplexes.Load() {
		if f.holds = f.agent.block(); !f.holds {
			return f.sweep(ctx)
		}
	}
	f.blocks.Store(true)
	return f.send(ctx, f.index)
}

// sweep asks as soon as something has changed in the catalogue since it asked
// last.
func (f *follower) sweep(ctx context.Context) (*answer, error) {
	f.pacer.sweeps()
	f.blocks.Store(false)
	tide := f.tide()
	if f.index > 0 && f.failing.Load() == nil {
		tide.wait(ctx, f.tideMark, jittered(f.question.wait))
	}
	select {
	case f.agent.sweeping <- struct{}{}:
		defer func() { <-f.agent.sweeping }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	f.tideMark = tide.mark()
	return f.send(ctx, 0)
}

func (f *follower) send(ctx context.Context, index uint64) (*answer, error) {
	if f.confirms {
		return f.agent.ask(ctx, f.question.ofTheLeader(), 0, f.read)
	}
	return f.agent.ask(ctx, f.question, index, f.read)
}

// errUnconfirmed says that an answer is to be believed only if the leader says
// the same when it is asked with Consul's strongest consistency.
var errUnconfirmed = errors.New("the answer is not confirmed")

// answered hands an answer on and settles what to ask next.
func (f *follower) answered(ctx context.Context, a *answer) {
	f.answers.Add(1) // before what is made of it can be seen
	f.heard.Store(time.Now().UnixNano())
	f.reached.Store(a.index)
	a.outdated = a.index < f.highest && a.index > 0 && !f.confirms && !f.question.isOfTheLeader()
	switch err := f.take(a); {
	case errors.Is(err, errUnconfirmed):
		f.loggers.newest().Debug("Consul's answer may be out of date; asking the leader", f.subject,
			zap.Uint64("index", a.index), zap.Uint64("highest_index", f.highest))
		f.index, f.confirms = 0, true
		return
	case err != nil:
		f.failed(ctx, err)
		return
	}
	if f.highest < a.index || f.confirms {
		f.highest, f.confirms = a.index, false
	}
	f.pacer.answered(time.Duration(a.size) * costPerByte)
	if failure := f.failing.Swap(nil); failure != nil {
		f.loggers.newest().Info("Consul answers again", f.subject, zap.Duration("after", time.Since(failure.since)))
	}

	// Consul's rules for the next index: from the start if it went backwards,
	// and never 0, which would not block.
	switch {
	case a.index == 0:
		f.errors.count(kindIndex)
		f.index = 1
		pause(ctx, f.backoff.next(kindIndex))
		return
	case a.index < f.index:
		f.index = 0
	default:
		f.index = a.index
	}
	f.backoff.reset()
}

// failed pauses. It is logged once, until Consul answers again.
//
// The next query starts from the beginning: a Consul that was restarted may
// count from less than the old index and would be waited for in vain, and an
// answer at once tells that the failure is over.
func (f *follower) failed(ctx context.Context, err error) {
	f.index = 0
	kind := kindOf(err)
	f.errors.count(kind)
	since := time.Now()
	if present := f.failing.Load(); present != nil {
		since = present.since
		f.loggers.newest().Debug("Consul still gives no usable answer", f.subject, zap.Error(err))
	} else {
		f.loggers.newest().Warn("Consul gives no usable answer; what was known last stays in use", f.subject, zap.Error(err))
	}
	f.failing.Store(&failure{since, err})
	f.disturb()
	f.pauseUntilRenewed(ctx, kind)
}

// pauseUntilRenewed backs off, but not from credentials that have just been
// replaced: they may be what was wrong.
func (f *follower) pauseUntilRenewed(ctx context.Context, kind errorKind) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(f.client.life, cancel)()
	pause(ctx, f.backoff.next(kind))
	if f.client.life.Err() != nil {
		f.backoff.reset()
	}
}

func (f *follower) disturb() {
	if f.disturbed != nil {
		f.disturbed()
	}
}

// failingFor returns how long Consul has given no usable answer, or 0 while it
// does.
func (f *follower) failingFor() time.Duration {
	failure := f.failing.Load()
	if failure == nil {
		return 0
	}
	return max(time.Since(failure.since), 1)
}

// lastError returns why Consul gives no usable answer, or nil while it does.
func (f *follower) lastError() error {
	if failure := f.failing.Load(); failure != nil {
		return failure.err
	}
	return nil
}

// awaitFirst waits until first is closed, ctx ends or the follower has been
// asking for as long as timeout.
func (f *follower) awaitFirst(ctx context.Context, first <-chan struct{}, timeout time.Duration) {
	left := timeout - time.Since(f.started)
	if left <= 0 {
		return
	}
	timer := time.NewTimer(left)
	defer timer.Stop()
	select {
	case <-first:
	case <-timer.C:
	case <-ctx.Done():
	}
}

// loggers holds the loggers of the configs that use something shared. The
// newest config's gets the lines; when it goes, that of the one before does.
type loggers struct {
	mu  sync.Mutex
	all []*logSource
}

// logSource is where a config, or what stands for several, has its lines go.
type logSource struct{ logger func() *zap.Logger }

func (l *loggers) add(source *logSource) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = append(l.all, source)
}

func (l *loggers) remove(source *logSource) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if i := slices.Index(l.all, source); i >= 0 {
		l.all = slices.Delete(l.all, i, i+1)
	}
}

func (l *loggers) newest() *zap.Logger {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.all) == 0 {
		return zap.NewNop()
	}
	return l.all[len(l.all)-1].logger()
}
