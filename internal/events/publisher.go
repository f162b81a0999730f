// SPDX-License-Identifier: MIT

package events

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/control"
	"github.com/wgroam/wgroam/internal/feed"
)

// queued is how many events wait for a connection. An event is about 300 bytes.
const queued = 1024

// lastWords is how long the end waits until the server has what was published.
const lastWords = 500 * time.Millisecond

// settled is how long it takes at most to hear that an event is refused.
const settled = 2 * time.Second

// again is how long a credentials file that is missing is left alone.
const again = 2 * time.Second

// Config says who publishes, and where.
type Config struct {
	Node   string // its name
	NATS   feed.External
	Redact bool // put Redacted in the place of endpoints
	Log    *slog.Logger
}

// Publisher publishes events. It is safe for concurrent use.
type Publisher struct {
	cfg   Config
	life  string // of this process, in message ids
	queue chan item
	up    chan struct{} // the connection has come up

	closed chan struct{} // by the last callback of the connection

	sent, dropped atomic.Uint64

	mu     sync.Mutex
	seq    uint64
	status control.Connection
	logged bool      // that it is not connected
	denied bool      // logged that the server refuses events
	well   time.Time // of the first event since the last refused one; zero before
	ending bool
}

// New returns a Publisher. Nothing is published before Run.
func New(cfg Config) *Publisher {
	now := time.Now()
	return &Publisher{
		cfg:    cfg,
		life:   fmt.Sprintf("%v-%x", wgroam.NodeIDOf(cfg.Node), now.UnixNano()),
		queue:  make(chan item, queued),
		up:     make(chan struct{}, 1),
		closed: make(chan struct{}),
		status: control.Connection{Name: "nats", Since: now},
	}
}

// Publish has an event of a device of the group published. It does not wait for
// anything: when too many wait already, the event is dropped, and counted.
func (p *Publisher) Publish(keys feed.Keys, e control.Event) {
	p.mu.Lock()
	defer p.mu.Unlock()
	// Counted in any case: a number that is missing tells the reader.
	p.seq++
	select {
	case p.queue <- item{keys, e, p.seq}:
	default:
		p.dropped.Add(1)
	}
}

// Status returns the state of the connection, and what became of the events.
func (p *Publisher) Status() control.EventsStatus {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.status.Connected && p.denied && !p.well.IsZero() && time.Since(p.well) > settled {
		p.denied, p.status.Error = false, ""
	}
	return control.EventsStatus{
		Connection: p.status, Redact: p.cfg.Redact,
		Sent: p.sent.Load(), Dropped: p.dropped.Load(), Waiting: len(p.queue),
	}
}

// Run connects, and publishes until ctx ends.
func (p *Publisher) Run(ctx context.Context) {
	nc, err := p.connect(ctx)
	for err != nil { // a file cannot be read, all else nats.go tries again
		p.disconnected(err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(again):
		}
		nc, err = p.connect(ctx)
	}
	defer func() {
		p.mu.Lock()
		p.ending = true
		p.mu.Unlock()
		nc.Close()
		<-p.closed // no callback runs any more
	}()
	// Before it is connected for the first time, nats.go does not know that the server
	// takes headers.
	if !p.await(ctx) {
		return
	}
	for {
		select {
		case <-ctx.Done():
			if nc.IsConnected() {
				_ = nc.FlushTimeout(lastWords) // what is lost is lost
			}
			return
		case i := <-p.queue:
			if !p.send(ctx, nc, i) {
				return
			}
		}
	}
}

// send publishes one event, and reports false if ctx ends before.
func (p *Publisher) send(ctx context.Context, nc *nats.Conn, i item) bool {
	m, err := p.message(i)
	for err == nil {
		if err = nc.PublishMsg(m); err == nil {
			p.accepted()
			return true
		}
		if !errors.Is(err, nats.ErrReconnectBufExceeded) {
			break
		}
		if !p.await(ctx) {
			return false
		}
		err = nil
	}
	p.refused(err)
	return true
}

// await waits until the connection comes up, and reports false if ctx ends before.
func (p *Publisher) await(ctx context.Context) bool {
	select {
	case <-p.up:
		return true
	case <-ctx.Done():
		return false
	}
}

func (p *Publisher) connect(ctx context.Context) (*nats.Conn, error) {
	o, urls, err := p.cfg.NATS.Options(ctx, p.cfg.Node)
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	p.status.Name = urls
	p.mu.Unlock()
	o.ConnectedCB = p.connected
	o.ReconnectedCB = p.connected
	o.DisconnectedErrCB = func(_ *nats.Conn, err error) { p.disconnected(err) }
	o.ClosedCB = func(*nats.Conn) { close(p.closed) }
	o.ReconnectErrCB = func(_ *nats.Conn, err error) { p.disconnected(err) }
	o.AsyncErrorCB = func(_ *nats.Conn, _ *nats.Subscription, err error) {
		if errors.Is(err, nats.ErrPermissionViolation) {
			p.refused(err)
		} else {
			p.disconnected(err) // such as a password that is not good any more
		}
	}
	return o.Connect()
}

func (p *Publisher) connected(*nats.Conn) {
	p.mu.Lock()
	p.status.Connected, p.status.Since, p.status.Error = true, time.Now(), ""
	p.logged, p.denied = false, false
	name := p.status.Name
	p.mu.Unlock()
	p.cfg.Log.Info("publishing roams for other programs", "url", name)
	select {
	case p.up <- struct{}{}:
	default:
	}
}

// disconnected notes that there is no connection, and says so once.
func (p *Publisher) disconnected(err error) {
	if err == nil {
		err = errors.New("closed by the other end")
	}
	p.mu.Lock()
	if p.status.Connected {
		p.status.Connected, p.status.Since = false, time.Now()
	}
	p.status.Error = err.Error()
	quiet, name := p.logged || p.ending, p.status.Name
	p.logged = true
	p.mu.Unlock()
	if !quiet {
		p.cfg.Log.Warn("no connection to publish roams on, trying again", "url", name, "err", err)
	}
}

// accepted notes an event that the server has, and may refuse yet.
func (p *Publisher) accepted() {
	p.sent.Add(1)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.well.IsZero() {
		p.well = time.Now()
	}
}

// refused notes an event that the server does not take.
func (p *Publisher) refused(err error) {
	p.dropped.Add(1)
	p.mu.Lock()
	p.status.Error, p.well = err.Error(), time.Time{}
	quiet, name := p.denied, p.status.Name
	p.denied = true
	p.mu.Unlock()
	if quiet {
		return
	}
	args := []any{"url", name, "err", err}
	if errors.Is(err, nats.ErrPermissionViolation) {
		args = append(args, "remedy", "allow publish on wgroam.events.>")
	}
	p.cfg.Log.Error("roams are refused by the NATS for other programs; the counters have the rest", args...)
}
