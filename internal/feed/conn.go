// SPDX-License-Identifier: MIT

package feed

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
)

const (
	dialTimeout = 2 * time.Second
	// dialBeside is how soon a connection that is not made yet is tried a second time beside
	// the first. Of the first, what was lost on the way is sent again after a second only
	// (net/tcp.h, TCP_TIMEOUT_INIT), which would be how long we notice too late that a
	// network has been mended.
	dialBeside    = 250 * time.Millisecond
	reconnectWait = 100 * time.Millisecond
	jitter        = 50 * time.Millisecond
	// A subscription that reaches its limit drops what is newest.
	pendingBytes = 64 << 20
	// deniedWait is how long a connection stays as it is on which the server
	// forbids a subject, and deniedJitter how much longer at most. Permissions may
	// come with the credentials, which are read when it connects.
	deniedWait   = 5 * time.Second
	deniedJitter = 5 * time.Second
	// deniedFor is how long a new connection must be without complaint for the
	// last one's to be forgotten: a few beats.
	deniedFor = 2 * time.Second
)

// conn is one connection of a Link. It is dialled until the Link is closed.
type conn struct {
	l    *Link
	name string
	opts nats.Options
	tls  *tls.Config // nil: nats.go does what the URL asks for

	// nats.go holds its lock while it dials, so its own idea of being connected
	// may block for as long as that takes. This one never does.
	up atomic.Bool
	nc atomic.Pointer[nats.Conn] // set before up is

	// turn makes one change of state at a time, callbacks included.
	turn       sync.Mutex
	subscribed bool

	mu      sync.Mutex
	status  ConnStatus
	logged  trouble
	raw     net.Conn
	closing bool
	denied  time.Time   // when the server last forbade a subject
	anew    *time.Timer // connects anew because of that; nil while it need not
	forced  bool        // it does just now

	started sync.WaitGroup // the goroutine that connects first
	running sync.WaitGroup // subscriptions
	closed  chan struct{}
}

// trouble is the kind of failure that was last logged.
type trouble int

const (
	troubleNone trouble = iota
	troubleReach
	troubleRefused
)

func (l *Link) newConn(name, url string, opts nats.Options) *conn {
	c := &conn{
		l: l, name: name, opts: opts,
		status: ConnStatus{Name: name, URL: url},
		closed: make(chan struct{}),
	}
	o := &c.opts
	if len(o.Servers) == 0 {
		o.Url = url
	}
	o.NoEcho = true
	keepUp(o, l.name)
	o.ConnectedCB = func(*nats.Conn) { c.connected(false) }
	o.ReconnectedCB = func(*nats.Conn) { c.connected(true) }
	o.DisconnectedErrCB = func(_ *nats.Conn, err error) { c.disconnected(err) }
	o.ReconnectErrCB = func(_ *nats.Conn, err error) { c.failed(err) }
	o.AsyncErrorCB = c.asyncError
	o.ClosedCB = func(*nats.Conn) { close(c.closed) }
	o.CustomReconnectDelayCB = func(int) time.Duration {
		// A server that refuses us after the connection is made shows up
		// nowhere else.
		if nc := c.nc.Load(); nc != nil {
			if err := nc.LastError(); err != nil {
				c.failed(err)
			}
		}
		return pause()
	}
	l.conns = append(l.conns, c)
	return c
}

// keepUp has the connection of a node made again and again, for ever.
func keepUp(o *nats.Options, node string) {
	o.Name = "wgroam " + node
	o.AllowReconnect = true
	o.MaxReconnect = -1
	o.RetryOnFailedConnect = true
	o.IgnoreAuthErrorAbort = true
	// Nothing is kept for later: whoever publishes knows what is still true by
	// then.
	o.ReconnectBufSize = -1
	o.Timeout = dialTimeout
	o.FlusherTimeout = dialTimeout
	// A break is noticed before TCP waits for longer than a second to try again, which is from
	// the fourth attempt on (0.2, 0.4, 0.8, 1.6 s).
	o.PingInterval = 500 * time.Millisecond
	o.MaxPingsOut = 2
	// The dialler looks up names, within its timeout.
	o.SkipHostLookup = true
	o.CustomReconnectDelayCB = func(int) time.Duration { return pause() }
}

// pause returns how long to wait before the next attempt to connect.
func pause() time.Duration { return reconnectWait + rand.N(jitter) }

// dialer implements nats.CustomDialer.
type dialer struct {
	dial func(network, addr string) (net.Conn, error)
	tls  bool
}

func (d dialer) Dial(network, addr string) (net.Conn, error) { return d.dial(network, addr) }

// SkipTLSHandshake tells nats.go that Dial does it.
func (d dialer) SkipTLSHandshake() bool { return d.tls }

// dial makes the TCP connection, and on top of it the TLS between members.
func (c *conn) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	raw, err := dialBesides(ctx, network, addr)
	if err != nil {
		// Noted here, because nats.go makes nothing of a first refused one.
		err = fmt.Errorf("%w: %w", errUnreachable, err)
		c.failed(err)
		return nil, err
	}
	c.mu.Lock()
	c.raw = raw
	closing := c.closing
	c.mu.Unlock()
	if closing {
		_ = raw.Close()
		return nil, net.ErrClosed
	}
	if c.tls == nil {
		return raw, nil
	}
	t := tls.Client(raw, c.tls)
	if err := t.HandshakeContext(ctx); err != nil {
		_ = raw.Close()
		return nil, explain(err)
	}
	return t, nil
}

// dialBesides tries again and again, beside what it has begun, until one attempt is
// through or has failed.
func dialBesides(ctx context.Context, network, addr string) (net.Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		conn net.Conn
		err  error
	}
	first, done := make(chan result), make(chan struct{})
	defer close(done)
	tick := time.NewTicker(dialBeside)
	defer tick.Stop()
	for {
		go func() {
			var d net.Dialer
			conn, err := d.DialContext(ctx, network, addr)
			select {
			case first <- result{conn, err}:
			case <-done:
				if err == nil {
					_ = conn.Close()
				}
			}
		}()
		select {
		case r := <-first:
			return r.conn, r.err
		case <-tick.C:
		}
	}
}

func (c *conn) start(ctx context.Context) {
	c.mu.Lock()
	c.status.Since = time.Now()
	c.mu.Unlock()
	if c.opts.InProcessServer == nil {
		c.opts.CustomDialer = dialer{
			dial: func(network, addr string) (net.Conn, error) { return c.dial(ctx, network, addr) },
			tls:  c.tls != nil,
		}
	}
	// The first attempt is made by whoever calls Connect.
	c.started.Go(func() {
		nc, err := c.opts.Connect()
		if err != nil { // the options are wrong, all else is retried
			c.failed(err)
			close(c.closed)
			return
		}
		c.nc.Store(nc)
		c.subscribe(nc)
		if nc.IsConnected() {
			c.connected(false)
		}
	})
}

// close disconnects, and returns when no callback runs any more. The dialler's
// context has ended.
func (c *conn) close() {
	c.mu.Lock()
	c.closing = true
	if c.raw != nil {
		// Or nats.go waits for the other end, under its lock.
		_ = c.raw.Close()
	}
	c.mu.Unlock()
	c.started.Wait()
	c.mu.Lock()
	if c.anew != nil {
		c.anew.Stop()
	}
	c.mu.Unlock()
	if nc := c.nc.Load(); nc != nil {
		nc.Close()
	}
	<-c.closed
	c.running.Wait()
}

func (c *conn) subscribe(nc *nats.Conn) {
	// One subscription for updates and beats, so that a beat does not overtake
	// the update it speaks of.
	for subject, f := range map[string]func(*conn, *nats.Msg){
		c.l.prefix + "*.*": c.l.receive,
		c.l.prefix + "q":   c.l.receiveRequest,
		c.l.prefix + "s":   c.l.receiveSetupRequest,
	} {
		sub, err := nc.Subscribe(subject, func(m *nats.Msg) {
			c.l.count.receivedFrame(m.Data)
			f(c, m)
		})
		if err != nil { // closed
			return
		}
		c.running.Add(1)
		sub.SetClosedHandler(func(string) { c.running.Done() })
		_ = sub.SetPendingLimits(-1, pendingBytes)
	}
	c.turn.Lock()
	c.subscribed = true
	c.turn.Unlock()
}

// publish sends a frame on this connection.
func (c *conn) publish(subject string, frame []byte) error {
	err := c.nc.Load().Publish(subject, frame)
	if err == nil {
		c.l.count.sentFrame(frame)
	}
	return err
}

func (c *conn) state() ConnStatus {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.status.Connected && c.denied.Before(c.status.Since) && time.Since(c.status.Since) > deniedFor {
		c.status.Denied = ""
	}
	return c.status
}

// connected notes that the connection is up, for the first time or again.
func (c *conn) connected(again bool) {
	c.turn.Lock()
	defer c.turn.Unlock()
	if !c.subscribed {
		return // whoever subscribes looks again
	}
	if c.up.Load() && !again {
		return // whoever subscribed was first
	}
	// The subscriptions have been sent; wait until the server has them, or what is
	// asked for now may be followed by something that is missed. If it does not
	// answer, the next beat tells.
	_ = c.nc.Load().FlushTimeout(dialTimeout)
	c.mu.Lock()
	closing := c.closing
	if !closing && !c.status.Connected {
		c.status.Connected, c.status.Since = true, time.Now()
	}
	c.logged = troubleNone
	forced := c.forced
	c.forced = false
	was := closing || c.up.Swap(true) // before anybody reads that it is connected
	c.mu.Unlock()
	if closing {
		return
	}
	if !was && !forced {
		c.l.log.Info("feed connected", "conn", c.name)
	}
	// A break so short that it went unseen is a break.
	c.l.emit(Event{Conn: c.name, Up: true})
}

func (c *conn) disconnected(err error) {
	if err == nil {
		err = errors.New("closed by the other end")
	}
	c.turn.Lock()
	defer c.turn.Unlock()
	if !c.up.Swap(false) {
		return
	}
	c.mu.Lock()
	closing, forced := c.closing, c.forced
	if forced {
		err = errAnew
	}
	c.status.Connected, c.status.Since, c.status.LastError = false, time.Now(), err.Error()
	if !forced { // which is no line, but its failure would be
		c.logged = troubleReach
	}
	c.mu.Unlock()
	if closing {
		return
	}
	if !forced {
		c.l.log.Warn("feed connection lost, trying again", "conn", c.name, "err", err)
	}
	c.l.emit(Event{Conn: c.name, Err: err})
}

var (
	errUnreachable = errors.New("unreachable")
	errAnew        = errors.New("connecting anew, because the server forbids a subject")
)

// failed notes a failed attempt. It is logged when the kind of failure is not
// the one logged last: a node that is gone for a day is one line.
func (c *conn) failed(err error) {
	if errors.Is(err, nats.ErrNoServers) {
		return // dial has said it better
	}
	err = c.advise(err)
	kind := troubleRefused
	if errors.Is(err, errUnreachable) {
		kind = troubleReach
	}
	c.mu.Lock()
	c.status.LastError = err.Error()
	// While it is up, the news of the break is still on its way, and is the line.
	quiet := c.closing || c.logged == kind || c.up.Load()
	c.logged = kind
	c.mu.Unlock()
	if !quiet {
		c.l.log.Warn("cannot connect to the feed, trying again", "conn", c.name, "err", err)
	}
}

// explain says in words what a failed handshake between nodes means.
func explain(err error) error {
	switch {
	case strings.Contains(err.Error(), "unrecognized name"):
		// crypto/tls exports no type for an alert that it received.
		return errors.New("the other node does not know this group: its device has another private key (or another secret), or is not up yet")
	case errors.Is(err, io.EOF), errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("no TLS there, so probably no node: %w", err)
	}
	return fmt.Errorf("TLS: %w", err)
}

// advise says what to do when an existing NATS does not let us in.
func (c *conn) advise(err error) error {
	if c.tls != nil || c.opts.InProcessServer != nil {
		return err
	}
	var (
		remedy    string
		authority x509.UnknownAuthorityError
	)
	switch {
	case errors.Is(err, nats.ErrAuthExpired), errors.Is(err, nats.ErrAccountAuthExpired):
		remedy = "get new credentials and put them in place of the old file, which is read at every attempt"
	case errors.Is(err, nats.ErrAuthRevoked):
		remedy = "these credentials have been revoked: get new ones and put them in place of the old file"
	case errors.Is(err, nats.ErrAuthorization):
		remedy = "the server does not know these credentials, or they have expired: correct user and password in url, creds, nkey or the context"
	case errors.Is(err, nats.ErrSecureConnWanted):
		remedy = "the server has no TLS: write nats:// in place of tls:// in url, and remove [nats.tls]"
	case errors.As(err, &authority):
		remedy = "set tls.ca to the file of the authority that signed the server's certificate"
	// crypto/tls exports no type for an alert, and the alert may be overtaken.
	case strings.Contains(err.Error(), "closed by remote after TLS handshake"),
		strings.Contains(err.Error(), "remote error: tls: certificate required"),
		strings.Contains(err.Error(), "remote error: tls: bad certificate"),
		strings.Contains(err.Error(), "remote error: tls: unknown certificate authority"):
		remedy = "the server wants a client certificate that it can verify: set tls.cert and tls.key to one"
	default:
		return err
	}
	return fmt.Errorf("%w: %s", err, remedy)
}

func (c *conn) asyncError(nc *nats.Conn, sub *nats.Subscription, err error) {
	if errors.Is(err, nats.ErrSlowConsumer) {
		c.l.count.dropped.Add(1)
		if c.l.slow.allow(time.Now()) {
			c.l.log.Warn("messages on the feed were lost because this node is too slow; they are asked for again", "conn", c.name)
		}
		return
	}
	if errors.Is(err, nats.ErrPermissionViolation) {
		c.forbidden(nc, err)
		return
	}
	err = c.advise(err)
	c.mu.Lock()
	c.status.LastError = err.Error()
	closing := c.closing
	c.mu.Unlock()
	if closing || !c.l.denied.allow(time.Now()) {
		return
	}
	args := []any{"conn", c.name, "err", err}
	if sub != nil {
		args = append(args, "subject", sub.Subject)
	}
	c.l.log.Error("feed error", args...)
}

// forbidden notes that the server forbids a subject. It has no subscription to
// it then, and gives none when that changes, so after a while we connect anew.
func (c *conn) forbidden(nc *nats.Conn, err error) {
	err = fmt.Errorf("%w: allow publish and subscribe on %s", err, c.l.keys.Subjects())
	c.mu.Lock()
	closing := c.closing
	c.status.Denied, c.denied = err.Error(), time.Now()
	if c.anew == nil && !closing {
		c.anew = time.AfterFunc(deniedWait+rand.N(deniedJitter), func() {
			c.mu.Lock()
			c.anew, c.forced = nil, !c.closing && c.status.Connected
			forced := c.forced
			c.mu.Unlock()
			if forced {
				_ = nc.ForceReconnect() // closed
			}
		})
	}
	c.mu.Unlock()
	if !closing && c.l.denied.allow(time.Now()) {
		c.l.log.Error("the server forbids a part of the feed; trying again", "conn", c.name, "err", err)
	}
}
