// SPDX-License-Identifier: MIT

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/applier"
	"github.com/wgroam/wgroam/failover"
	"github.com/wgroam/wgroam/internal/config"
	"github.com/wgroam/wgroam/internal/control"
	"github.com/wgroam/wgroam/internal/events"
	"github.com/wgroam/wgroam/internal/feed"
	"github.com/wgroam/wgroam/internal/natsd"
	"github.com/wgroam/wgroam/internal/snapshot"
	"github.com/wgroam/wgroam/internal/wg"
	"github.com/wgroam/wgroam/publisher"
	"github.com/wgroam/wgroam/tracker"
)

// daemon is what all devices of a node share.
type daemon struct {
	cfg     config.Config
	log     *slog.Logger
	started time.Time
	kernel  *tracker.Kernel
	port    *tracker.Port
	events  *control.Hub
	lag     lag
	public  *events.Publisher // nil unless roams are published for other programs
	devices []*device
	fifo    *failover.FIFO // not read without a path
	serving chan struct{}  // closed when there is a server

	mu        sync.Mutex
	groups    map[string]claim // by group
	server    *natsd.Server    // nil while there is none
	serverErr error            // why there is none
}

// serveAgain is how long an address that could not be had is left alone. It may
// come with a link, or its present owner go.
const serveAgain = 2 * time.Second

// serve starts the server for the other nodes.
func (d *daemon) serve(ctx context.Context) error {
	server, err := natsd.Start(ctx, d.cfg.NATS.Listen, d.log)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.serverErr = err
	if err == nil {
		d.server = server
		close(d.serving)
	}
	return err
}

// serveLater tries until there is a server, if there is none yet.
func (d *daemon) serveLater(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-d.serving:
			return
		case <-time.After(serveAgain):
		}
		if d.serve(ctx) == nil {
			d.log.Info("serving the other nodes now", "listen", d.cfg.NATS.Listen)
		}
	}
}

func (d *daemon) shutdown() {
	if server, _ := d.natsd(); server != nil {
		server.Shutdown()
	}
}

func (d *daemon) natsd() (*natsd.Server, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.server, d.serverErr
}

// errServing ends a session that was begun without a server, when there is one.
var errServing = errors.New("there is a server for the other nodes now")

// errSameKey: two devices would take each other's records for their own.
var errSameKey = errors.New("same private key as another device of this node")

// claim is what a device holds of a group.
type claim struct {
	device string
	yield  func() // lets go of it, soon, if the group is that of former keys; or nil
}

// claim makes a group the device's, until release. Who has it for former keys
// yields to a device whose key it is.
func (d *daemon) claim(group string, c claim) (release func(), err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	other, taken := d.groups[group]
	switch {
	case taken && other.yield != nil && c.yield == nil:
		other.yield()
		return nil, fmt.Errorf("the private key is a former one of %s, which leaves its group now", other.device)
	case taken:
		return nil, fmt.Errorf("%w: %s and %s: give each its own key, or a secret_file of its own", errSameKey, other.device, c.device)
	}
	d.groups[group] = c
	return func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.groups, group)
	}, nil
}

// device is one configured WireGuard device. It outlives the links of its name.
type device struct {
	cfg     config.Device
	d       *daemon
	log     *slog.Logger
	desk    *failover.Desk
	mem     *failover.Memory
	handing handover
	elected atomic.Int64 // when keepalived's script asked last, in nanoseconds since 1970

	// found: whether the link was there when the daemon began is known, so that the next
	// one is new. Of keep and unkept, which take turns.
	found bool

	probing sync.Mutex // held while the virtual IP is tried
	asking  sync.Mutex // held while others are asked for their setups: they answer the newest question only

	mu      sync.Mutex
	current *session // nil while there is no such link
	keeper  *failover.Keeper
	left    error // why there is no keeper, where there should be one
	seen    bool  // there was one
	problem error // why there is no session, or what went wrong last
	// The memory of the group, kept while the link is away.
	group   string
	inForce feed.Keys // of that group
	former  []snapshot.Former

	// Of the session alone, from one to the next.
	table  *wgroam.Table
	clock  *wgroam.Clock
	looked time.Time // at the clock
}

// where names a device for people: wg0, or wg0@blue in the namespace blue.
func where(device, netns string) string {
	if netns == "" {
		return device
	}
	return device + "@" + netns
}

// session is one life of a link.
type session struct {
	space     *wg.Space // nil for the daemon's own
	link      wg.Link
	netns     uint32 // inode of the namespace
	reader    *wg.Client
	table     *wgroam.Table
	clock     *wgroam.Clock
	view      *wgroam.View
	feed      *feed.Link
	tracker   *tracker.Tracker
	applier   *applier.Applier
	merger    *applier.Merger
	state     *snapshot.File
	setups    *setupReader
	former    []*member
	publisher *publisher.Publisher
}

func (d *device) absent(err error) {
	d.mu.Lock()
	d.problem = err
	d.mu.Unlock()
	d.log.Warn("the device is not served; trying again", "err", err)
}

// session runs the device while the link lasts.
func (d *device) session(ctx context.Context, space *wg.Space, link wg.Link) error {
	netns, err := space.Inode()
	if err != nil {
		return err
	}
	reader, err := space.Open()
	if err != nil {
		return err
	}
	defer reader.Close()
	keys, former, err := d.keys(reader)
	if err != nil {
		return err
	}
	defer d.lastLook(ctx, reader)
	release, err := d.d.claim(keys.Group(), claim{device: where(d.cfg.Name, d.cfg.Netns)})
	if err != nil {
		return err
	}
	defer release()

	server, _ := d.d.natsd()
	s := &session{space: space, link: link, netns: netns, reader: reader}
	if err := d.wire(s, keys, server); err != nil {
		return err
	}
	if server != nil {
		defer server.RemoveGroup(keys)
	}
	unlock, err := s.state.Lock()
	if err != nil {
		return err
	}
	defer unlock()
	defer s.leave()
	for _, k := range former {
		if err := d.join(s, k, server); err != nil {
			return err
		}
	}
	// The applier writes through a client of its own, so that it does not wait
	// for a dump.
	writer, err := space.Open()
	if err != nil {
		return err
	}
	defer writer.Close()
	s.applier = applier.New(applier.Config{
		Name: link.Name, Device: writer, Table: s.table, View: s.view, Log: placeLog(d.d.log, d.cfg.Netns),
		Written: d.d.lag.stage(d.cfg, stageApplied), Missing: s.tracker.Refresh,
	})
	s.publisher = publisher.New(publisher.Config{
		Table: s.table, Link: s.feed, Role: d.feedRole, Beat: d.d.cfg.NATS.Heartbeat, Log: d.log,
		Sent: d.d.lag.stage(d.cfg, stageSent),
	})
	comparer, err := space.Open()
	if err != nil {
		return err
	}
	defer comparer.Close()
	s.setups = &setupReader{client: comparer, name: link.Name, key: keys.SetupKey()}
	setups := publisher.NewSetups(s.feed, s.setups.setups, d.log)
	g, ctx := errgroup.WithContext(ctx)
	if err := s.tracker.Start(); err != nil {
		g.Go(func() error { return err }) // which ends ctx
		return g.Wait()
	}
	// After the tracker: sessions that have lived on know better.
	s.restore(d.log)
	d.handOver(s)
	for _, m := range s.former {
		m.restore(d)
	}
	defer s.state.Close() // when nothing changes the table any more
	questions := make(chan *feed.Question, maxTickets)
	s.feed.OnQuestion(func(q *feed.Question) {
		select {
		case questions <- q:
		default: // who asks so often can ask again
		}
	})
	s.feed.Start()
	defer s.feed.Close()

	d.mu.Lock()
	d.current, d.seen, d.problem = s, true, nil
	d.mu.Unlock()
	defer func() {
		d.mu.Lock()
		d.current = nil
		d.mu.Unlock()
	}()

	g.Go(func() error { return s.tracker.Run(ctx) })
	g.Go(func() error { s.applier.Run(ctx); return nil })
	g.Go(func() error { s.merger.Run(ctx); return nil })
	g.Go(func() error { d.watchClock(ctx, s); return nil })
	g.Go(func() error { d.answer(ctx, s, questions); return nil })
	g.Go(func() error { d.settleOffer(ctx, s); return nil })
	g.Go(func() error { return s.publisher.Run(ctx) })
	g.Go(func() error { setups.Run(ctx); return nil })
	g.Go(func() error { s.state.Run(ctx); return nil })
	for _, m := range s.former {
		g.Go(func() error {
			m.run(ctx, s.table, d.log)
			d.rekeyed(keys, time.Now()) // the keys may have had their time
			return nil
		})
	}
	if server == nil {
		g.Go(func() error {
			select {
			case <-ctx.Done():
				return nil
			case <-d.d.serving:
				return errServing
			}
		})
	}
	return g.Wait()
}

// wire makes the parts of a session that need each other.
func (d *device) wire(s *session, keys feed.Keys, server *natsd.Server) error {
	// A table of its own for every session, because nobody takes leave of a
	// table; what the group knows goes from one to the next.
	table := wgroam.NewTable(keys.DigestKey())
	table.KeepFor(d.d.cfg.MaxAge)
	s.state = snapshot.New(snapshot.Config{Dir: d.d.cfg.StateDir, Keys: keys, Table: table, Log: d.log})
	if d.clock == nil {
		d.clock = wgroam.NewClock(d.d.cfg.MaxSkew)
	}
	s.table, s.clock, s.view = table, d.clock, wgroam.NewView()

	var err error
	if s.feed, s.merger, err = d.connect(s, keys, table, server); err != nil {
		return err
	}
	reached := d.d.lag.stage(d.cfg, stageUser)
	s.tracker = tracker.New(tracker.Config{
		Device: s.link.Name, Ifindex: s.link.Ifindex, Netns: s.netns, Space: s.space,
		Kernel: d.d.kernel, Port: d.d.port, WG: s.reader, View: s.view,
		Changed: func(o wgroam.Observation) {
			if isChange(o) {
				now := time.Now()
				reached(now.Sub(o.At))
				d.d.events.Publish(d.event(o, now))
			}
		},
		Proven: func(o wgroam.Observation) {
			d.record(s, o)
			if d.d.public != nil && isChange(o) {
				d.d.public.Publish(keys, d.event(o, time.Now()))
			}
		},
		Alive: func(peer wgroam.Key, at netip.AddrPort, handshake time.Time) {
			s.renew(peer, at, handshake, d.d.cfg.MaxAge/2)
		},
		Completed: d.completed,
		Poll:      d.cfg.PollInterval, Sweep: d.cfg.SweepInterval, Log: d.log,
	})
	return nil
}

// connect makes this node's part in the group of some keys, with its table.
func (d *device) connect(s *session, keys feed.Keys, table *wgroam.Table, server *natsd.Server) (*feed.Link, *applier.Merger, error) {
	n := d.d.cfg.NATS
	fc := feed.Config{
		Name: d.d.cfg.Node, Keys: keys, Peers: n.Peers,
		External: feed.External(n.External), Log: d.log,
	}
	if server != nil {
		server.AddGroup(keys)
		fc.Server = server
	}
	link, err := feed.New(fc)
	if err != nil {
		return nil, nil, err
	}
	merger := applier.NewMerger(applier.MergerConfig{
		Self: link.Self(), Table: table, Clock: s.clock, View: s.view, Feed: link,
		VIP: d.cfg.VIP, Log: d.log,
		Merged: d.d.lag.stage(d.cfg, stageMerged),
	})
	link.OnUpdate(merger.Update)
	link.OnBeat(merger.Beat)
	link.OnEvent(func(e feed.Event) {
		if e.Up {
			merger.Up()
		}
	})
	return link, merger, nil
}

// restore takes over what this node knew when it ended.
func (s *session) restore(log *slog.Logger) {
	records, err := s.state.Read()
	if err != nil {
		log.Error("starting without the snapshot; the other nodes may know", "err", err)
		return
	}
	s.merger.Restore(records)
	if len(records) > 0 {
		log.Info("read the snapshot", "records", len(records))
	}
}

// handOver gives a session what the one before it knew. To the session it is like a
// snapshot: peers may have roamed meanwhile. Under new keys there is no file yet that
// has it.
func (d *device) handOver(s *session) {
	if d.table != nil {
		d.rewind(s.feed.Self(), time.Now(), d.table)
		s.merger.Restore(d.table.Records())
	}
	d.table = s.table
}

// record turns what the local device has learned into a record for the others.
func (d *device) record(s *session, o wgroam.Observation) {
	if isChange(o) {
		d.desk.Heard(o.At)
	}
	if err := wgroam.CheckEndpoint(o.New); err != nil {
		d.log.Warn("an endpoint that other nodes cannot use stays here", "peer", o.Peer, "err", err)
		return
	}
	var hlc wgroam.HLC
	if now := time.Now(); o.Cause == wgroam.CauseSnapshot {
		// The clock may have been set back since the handshake.
		hlc = min(wgroam.HLCAt(o.At), wgroam.HLCAt(now))
		_ = s.clock.Merge(hlc, now) // not ahead
	} else {
		hlc = s.clock.Stamp(o.At)
	}
	s.table.Merge(wgroam.Record{
		Peer: o.Peer, Endpoint: o.New, Cause: o.Cause,
		Version: wgroam.Version{HLC: hlc, Node: s.feed.Self()},
	})
}

// clockCheck is how soon it is noticed that the wall clock has been set back.
const clockCheck = 250 * time.Millisecond

// watchClock looks whether the wall clock has been set back, until ctx ends.
func (d *device) watchClock(ctx context.Context, s *session) {
	tick := time.NewTicker(clockCheck)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		tables := []*wgroam.Table{s.table}
		for _, m := range s.members() {
			tables = append(tables, m.table)
		}
		d.rewind(s.feed.Self(), time.Now(), tables...)
	}
}

// rewind takes back what was seen with a wall clock that was ahead, in all tables at
// once, for they share the clock. It goes by the tables as well as by the clock: what
// was stamped before, and came into a table after, is found the next time.
func (d *device) rewind(self wgroam.NodeID, now time.Time, tables ...*wgroam.Table) {
	step := wgroam.SetBack(d.looked, now)
	d.looked = now
	limit := d.clock.Limit(now)
	if !d.clock.Ahead(now) && !slices.ContainsFunc(tables, func(t *wgroam.Table) bool { return t.Newest() > limit }) {
		return
	}
	// The clock last: until then, what is seen wins in the tables.
	for _, t := range tables {
		t.Rewind(self, limit, step, now)
	}
	d.clock.Rewind(now)
	d.log.Warn("this host's clock has been set back; what it saw while ahead is dated back, too", "by", step.Round(time.Millisecond))
}

// event returns an observation that reached us at the time seen as others get it.
func (d *device) event(o wgroam.Observation, seen time.Time) control.Event {
	e := control.NewEvent(d.cfg.Name, o, seen)
	e.Netns = d.cfg.Netns
	return e
}

// renew gives the record of a peer that still is where it was the time of its last
// handshake, when it is older than that by so much. Or it would be forgotten for
// its age while the peer is alive.
func (s *session) renew(peer wgroam.Key, at netip.AddrPort, handshake time.Time, after time.Duration) {
	r, ok := s.table.Get(peer)
	if !ok || r.Endpoint != at || handshake.Sub(r.Version.HLC.Time()) < after || handshake.After(time.Now()) {
		return
	}
	r.Version.HLC, r.Version.Node = wgroam.HLCAt(handshake), s.feed.Self()
	s.table.Merge(r)
}

// isChange tells news from what was there when we came.
func isChange(o wgroam.Observation) bool {
	return o.Cause != wgroam.CauseSnapshot
}
