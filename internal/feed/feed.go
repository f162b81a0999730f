// SPDX-License-Identifier: MIT

// Package feed carries records between the gateways of a group, over NATS.
//
// Keys are what the group shares. A Link is this node's part in the group: it
// publishes what this node has seen, hands over what the others have, and asks
// them for what it missed. All that leaves it is sealed: the bus can neither
// read nor forge, and what it loses, repeats or reorders is repaired by
// comparing digests (Link.Ask).
//
// Subjects, below wgroam.v1.<group>.:
//
//	u.<node>           updates
//	b.<node>           beats
//	q                  sync requests
//	s                  requests for setups
//	h.<node>           questions of a handover
//	r.<node>.<nonce>   replies to both
//
// so that publish and subscribe on wgroam.v1.<group>.> is all the permission
// that a node needs. <node> is a wgroam.NodeID in hexadecimal.
package feed

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/wgroam/wgroam"
)

// ErrNoLink is returned when nothing is connected that could be published on.
var ErrNoLink = errors.New("no connection to the feed")

// Config says who this node is and where the others are. Server and Peers, or
// External, or nothing at all: a node alone.
type Config struct {
	// Name is the node's name, at most MaxName bytes. wgroam.NodeIDOf(Name)
	// must be unique in the group.
	Name string
	Keys Keys
	// Server is this node's own server (natsd.Server), to which Keys has been
	// added; nil when there is none.
	Server nats.InProcessConnProvider
	// Peers are the host:port of the other nodes' servers.
	Peers []string
	// External is an existing NATS instead.
	External External
	Log      *slog.Logger
}

// Event says that a connection came up or went down. Messages were missed
// before it came up: it is the time to Ask.
type Event struct {
	// Conn is the Name of the connection in Status.
	Conn string
	Up   bool
	// Err says why it went down.
	Err error
}

// ConnStatus is the state of one connection of a Link.
type ConnStatus struct {
	// Name is "own" for this node's server, the address of another node's
	// server, or "nats" for an existing NATS.
	Name string
	// URL is where it leads, without secrets; empty for "own".
	URL       string
	Connected bool
	// Since is when Connected last changed; for a connection that never was,
	// when the Link started.
	Since time.Time
	// LastError is why it is not connected, or was not; empty when there was no
	// error yet.
	LastError string
	// Denied is which subject the server forbids and what to do about it; empty
	// when it forbids none. What is denied is tried again every few seconds.
	Denied string
}

// Link is this node's part in one group.
//
// Register what should happen with OnUpdate, OnBeat, OnRequest and OnEvent,
// then Start it. A Link is safe for concurrent use from then on.
type Link struct {
	name   string
	self   wgroam.NodeID
	boot   uint64
	keys   Keys
	prefix string
	log    *slog.Logger

	conns  []*conn
	pubTo  []*conn
	cancel context.CancelFunc
	closed atomic.Bool

	onUpdate  []func(Update)
	onBeat    []func(Beat)
	onRequest []func(*Request)
	onEvent   []func(Event)

	onSetupRequest []func(*Request)

	onQuestion []func(*Question)

	count   counters
	clash   limiter
	refused limiter
	newer   sync.Once
	denied  limiter
	slow    limiter

	// pub makes the order of sequence numbers the order on the wire.
	pub   sync.Mutex
	seq   uint64
	beats uint64
	body  []byte
	out   []byte

	asks atomic.Uint64

	heardMu sync.Mutex
	heard   map[wgroam.NodeID]*heard
	hearing chan struct{} // closed at the first beat

	questioned [bindSize]byte // the newest question's; guarded by heardMu
}

// heard is what was last heard of another node.
type heard struct {
	at      time.Time
	via     *conn
	records uint32
	silence time.Duration // as Beat.Silence
	proven  life          // the one that has answered a question of ours
	other   life          // the one that last said something and has not
}

// life is a process of a node, and the number of its newest beat.
type life struct{ boot, beat uint64 }

// New makes a Link. It does no I/O but to read the files that the
// configuration names.
func New(cfg Config) (*Link, error) {
	if cfg.Name == "" || len(cfg.Name) > MaxName {
		return nil, fmt.Errorf("node name %q: want 1 to %d bytes", cfg.Name, MaxName)
	}
	l := &Link{
		name:    cfg.Name,
		self:    wgroam.NodeIDOf(cfg.Name),
		boot:    uint64(time.Now().UnixNano()),
		keys:    cfg.Keys,
		prefix:  strings.TrimSuffix(cfg.Keys.Subjects(), ">"),
		log:     cfg.Log,
		heard:   make(map[wgroam.NodeID]*heard),
		hearing: make(chan struct{}),
	}
	switch {
	case cfg.External.empty():
	case cfg.Server != nil || len(cfg.Peers) > 0:
		return nil, errors.New("nats: listen and peers are for nodes without an existing NATS: remove them, or url and context")
	default:
		opts, urls, err := cfg.External.options()
		if err != nil {
			return nil, err
		}
		l.newConn("nats", urls, opts)
		l.pubTo = l.conns
	}
	if cfg.Server != nil {
		c := l.newConn("own", "", nats.GetDefaultOptions())
		c.opts.InProcessServer = cfg.Server
		c.opts.User = cfg.Keys.Group()
		l.pubTo = l.conns
	}
	for i, addr := range cfg.Peers {
		if slices.Contains(cfg.Peers[:i], addr) {
			continue
		}
		if _, _, err := net.SplitHostPort(addr); err != nil {
			return nil, fmt.Errorf("nats peer %q: want host:port: %w", addr, err)
		}
		c := l.newConn(addr, "nats://"+addr, nats.GetDefaultOptions())
		// The server may offer addresses that do not lead here from outside.
		c.opts.IgnoreDiscoveredServers = true
		c.tls = cfg.Keys.TLS()
		c.opts.Secure = true
		if cfg.Server == nil {
			l.pubTo = l.conns
		}
	}
	return l, nil
}

// Self returns this node's identity in the group.
func (l *Link) Self() wgroam.NodeID { return l.self }

// Subjects returns what Keys.Subjects does for the group.
func (l *Link) Subjects() string { return l.keys.Subjects() }

// Name returns this node's name.
func (l *Link) Name() string { return l.name }

// OnUpdate registers a callback for the records of other nodes. The callee owns
// the slice.
//
// This and all other callbacks are called from the goroutines that read the
// connections, of several at once, and not after Close has returned. A callback
// must not block: what comes in while it does is queued up to 64 MB, and what
// does not fit in is lost until the next Ask. The messages of one node arrive
// in order on each connection; two connections may both deliver one message. A
// node never gets its own messages.
//
// Callbacks must be registered before Start.
func (l *Link) OnUpdate(f func(Update)) { l.onUpdate = append(l.onUpdate, f) }

// OnBeat registers a callback for the beats of other nodes; see OnUpdate.
func (l *Link) OnBeat(f func(Beat)) { l.onBeat = append(l.onBeat, f) }

// OnRequest registers a callback for sync requests that are meant for this
// node; see OnUpdate. They are to be answered with Answer.
func (l *Link) OnRequest(f func(*Request)) { l.onRequest = append(l.onRequest, f) }

// OnEvent registers a callback for connections that come up or go down; see
// OnUpdate.
func (l *Link) OnEvent(f func(Event)) { l.onEvent = append(l.onEvent, f) }

// Start connects, in the background and for as long as it takes: what cannot be
// reached is tried again until Close. The caller must Close the Link.
func (l *Link) Start() {
	ctx, cancel := context.WithCancel(context.Background())
	l.cancel = cancel
	for _, c := range l.conns {
		c.start(ctx)
	}
}

// Close disconnects and waits until no callback runs any more. What has been
// published just before may be lost; see Flush.
func (l *Link) Close() {
	if l.closed.Swap(true) || l.cancel == nil {
		return
	}
	l.cancel()
	for _, c := range l.conns {
		c.close()
	}
}

// Status returns the state of every connection, in the order of the
// configuration. It never blocks on the network.
func (l *Link) Status() []ConnStatus {
	out := make([]ConnStatus, len(l.conns))
	for i, c := range l.conns {
		out[i] = c.state()
	}
	return out
}

// Publish sends records to the other nodes, at most MaxRecords at once. It
// returns ErrNoLink when nothing is connected, and keeps nothing: publish the
// then newest records after the next Event that is Up. A nil error does not
// mean that anybody got them.
func (l *Link) Publish(records []wgroam.Record) error {
	if len(records) == 0 || len(records) > MaxRecords {
		return fmt.Errorf("publish %d records: want 1 to %d", len(records), MaxRecords)
	}
	l.pub.Lock()
	defer l.pub.Unlock()
	l.body = appendRecords(l.body[:0], records)
	h := l.header(kindUpdate, l.seq+1, wgroam.RecordSize, len(records))
	if err := l.publish(l.subject('u', l.self), h); err != nil {
		return err
	}
	l.seq++
	l.count.sentRecords.Add(uint64(len(records)))
	return nil
}

// Beat sends a sign of life. Of b, the caller gives Time, Interval, Role, Digest
// and Records. It returns ErrNoLink when nothing is connected.
func (l *Link) Beat(b Beat) error {
	b.Name = l.name
	l.pub.Lock()
	defer l.pub.Unlock()
	l.beats++
	b.Number = l.beats
	l.body = appendBeat(l.body[:0], b)
	return l.publish(l.subject('b', l.self), l.header(kindBeat, l.seq, beatSize, 1))
}

func (l *Link) header(k kind, seq uint64, recSize, count int) header {
	return header{
		Header:  Header{Node: l.self, Boot: l.boot, Seq: seq},
		kind:    k,
		recSize: uint16(recSize),
		count:   uint16(count),
	}
}

// publish seals l.body and sends it on every connection that is for publishing.
func (l *Link) publish(subject string, h header) error {
	err := ErrNoLink
	sealed := false
	for _, c := range l.pubTo {
		if !c.up.Load() {
			continue
		}
		if !sealed {
			l.out = l.keys.seal(l.out[:0], h, l.body, subject, nil)
			sealed = true
		}
		e := c.publish(subject, l.out)
		switch {
		case e == nil:
			err = nil
		case err != nil:
			err = fmt.Errorf("publish on %s: %w", c.name, e)
		}
	}
	if err == nil {
		l.count.sent.Add(1)
	}
	return err
}

// Answer sends records to the node that asked: what wgroam.Table.Differing
// returns for its digests. It stops early when ctx ends, and returns how many it sent.
func (l *Link) Answer(ctx context.Context, r *Request, records []wgroam.Record) (sent int, err error) {
	h := l.header(kindReply, 0, wgroam.RecordSize, 0)
	var body, out []byte
	for h.flags&flagLast == 0 {
		chunk := records[:min(len(records), MaxRecords)]
		records = records[len(chunk):]
		if len(records) == 0 {
			h.flags |= flagLast
		}
		h.Seq++
		h.count = uint16(len(chunk))
		body = appendRecords(body[:0], chunk)
		if out, err = l.reply(ctx, r, h, body, out); err != nil {
			return sent, err
		}
		sent += len(chunk)
	}
	return sent, nil
}

// reply sends one chunk of an answer, unless ctx has ended. It makes the frame in
// buf, and returns that for the next one.
func (l *Link) reply(ctx context.Context, r *Request, h header, body, buf []byte) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return buf, err
	}
	buf = l.keys.seal(buf[:0], h, body, r.inbox, r.bind[:])
	if !r.via.up.Load() {
		return buf, fmt.Errorf("answer %v: %w: %s", r.Node, ErrNoLink, r.via.name)
	}
	if err := r.via.publish(r.inbox, buf); err != nil {
		return buf, fmt.Errorf("answer %v: %w", r.Node, err)
	}
	return buf, nil
}

// Flush waits until all that was published has reached a server, or ctx ends.
func (l *Link) Flush(ctx context.Context) error {
	var err error
	for _, c := range l.pubTo {
		if c.up.Load() {
			err = errors.Join(err, c.nc.Load().FlushWithContext(ctx))
		}
	}
	return err
}

func (l *Link) subject(what byte, n wgroam.NodeID) string {
	return l.prefix + string(what) + "." + n.String()
}

// receive handles a message on u.<node>, b.<node> or h.<node>.
func (l *Link) receive(c *conn, m *nats.Msg) {
	what, node, ok := strings.Cut(strings.TrimPrefix(m.Subject, l.prefix), ".")
	want := kind(0)
	switch {
	case !ok:
	case what == "u":
		want = kindUpdate
	case what == "b":
		want = kindBeat
	case what == "h":
		want = kindQuestion
	}
	h, body, err := l.keys.open(m.Data, m.Subject, nil, want)
	if err != nil {
		l.refuse(c, m.Subject, err)
		return
	}
	if h.Node.String() != node {
		l.refuse(c, m.Subject, errMalformed)
		return
	}
	if l.isOwn(h.Header) {
		return
	}
	switch want {
	case kindUpdate:
		l.receiveUpdate(c, m.Subject, h, body)
		return
	case kindQuestion:
		l.receiveQuestion(c, m.Subject, h, body)
		return
	}
	b, err := decodeBeat(h, body)
	if err != nil {
		l.refuse(c, m.Subject, err)
		return
	}
	if !l.hear(c, &b) {
		// Not worth a line: two connections may both bring a beat.
		l.count.refused[errOld].Add(1)
		return
	}
	l.count.beats.Add(1)
	for _, f := range l.onBeat {
		f(b)
	}
}

func (l *Link) receiveUpdate(c *conn, subject string, h header, body []byte) {
	records, bad, err := decodeRecords(h, body)
	if err == nil && len(records)+bad == 0 {
		err = errMalformed
	}
	if err != nil {
		l.refuse(c, subject, err)
		return
	}
	for range bad {
		l.refuse(c, subject, errMalformed)
	}
	l.count.updates.Add(1)
	l.count.records.Add(uint64(len(records)))
	for _, f := range l.onUpdate {
		f(Update{Header: h.Header, Records: records})
	}
}

// inbox returns the subject for the answer to a request.
func (l *Link) inbox(node wgroam.NodeID, bind [bindSize]byte) string {
	return l.prefix + "r." + node.String() + "." + hex.EncodeToString(bind[:])
}

// receiveRequest handles a message on q.
func (l *Link) receiveRequest(c *conn, m *nats.Msg) { l.request(c, m, kindRequest, l.onRequest) }

// receiveSetupRequest handles a message on s.
func (l *Link) receiveSetupRequest(c *conn, m *nats.Msg) {
	l.request(c, m, kindSetupRequest, l.onSetupRequest)
}

func (l *Link) request(c *conn, m *nats.Msg, want kind, to []func(*Request)) {
	h, body, err := l.keys.open(m.Data, m.Subject, nil, want)
	if err != nil {
		l.refuse(c, m.Subject, err)
		return
	}
	if l.isOwn(h.Header) {
		return
	}
	r, err := decodeRequest(h, body)
	if err != nil {
		l.refuse(c, m.Subject, err)
		return
	}
	if r.asked != 0 && r.asked != l.self {
		return
	}
	// Not the reply subject of the message: nobody may make us publish
	// elsewhere.
	r.inbox, r.via = l.inbox(h.Node, r.bind), c
	r.Unproven = !l.isProven(h.Header)
	l.count.requests.Add(1)
	for _, f := range to {
		f(r)
	}
}

// isOwn recognises our own messages, and those of another node that goes by our
// name.
func (l *Link) isOwn(h Header) bool {
	if h.Node != l.self {
		return false
	}
	if h.Boot == l.boot {
		l.count.refused[errEcho].Add(1)
		return true
	}
	l.count.refused[errName].Add(1)
	if l.clash.allow(time.Now()) {
		l.log.Error("another node calls itself "+strconv.Quote(l.name)+": give each node its own name (node = ...)",
			"group", l.keys.Group(), "started", time.Unix(0, int64(h.Boot)))
	}
	return true
}

func (l *Link) refuse(c *conn, subject string, err error) {
	why, ok := errors.AsType[refusal](err)
	if !ok {
		why = errMalformed
	}
	l.count.refused[why].Add(1)
	if why == errVersion {
		l.newer.Do(func() {
			l.log.Error("a node of the group runs a later version of wgroam, whose frames this one cannot read: upgrade this one, too", "conn", c.name, "subject", subject)
		})
	}
	if l.refused.allow(time.Now()) {
		l.log.Warn("refused a message on the feed; the counters have the rest", "conn", c.name, "subject", subject, "reason", why)
	}
}

func (l *Link) emit(e Event) {
	for _, f := range l.onEvent {
		f(e)
	}
}

// limiter permits one log line a minute.
type limiter struct {
	mu   sync.Mutex
	next time.Time
}

func (l *limiter) allow(now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if now.Before(l.next) {
		return false
	}
	l.next = now.Add(time.Minute)
	return true
}

// parseURL takes a URL without a scheme for nats, as nats.go does.
func parseURL(s string) (*url.URL, error) {
	if !strings.Contains(s, "://") {
		s = "nats://" + s
	}
	return url.Parse(s)
}

// redact removes what is secret in a list of URLs.
func redact(urls string) string {
	list := strings.Split(urls, ",")
	for i, s := range list {
		s = strings.TrimSpace(s)
		u, err := parseURL(s)
		switch at := strings.LastIndexByte(s, '@'); {
		case err != nil && at < 0:
			s = "(no URL)" // perhaps half of one, with a comma in the password
		case err != nil:
			s = s[at+1:]
		case u.User != nil:
			u.User = nil
			s = u.String()
		}
		list[i] = s
	}
	return strings.Join(list, ",")
}
