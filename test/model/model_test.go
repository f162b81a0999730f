// SPDX-License-Identifier: MIT

// Package model lets groups of nodes live through random schedules of
// observations and faults, in virtual time and without a network.
package model

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"pgregory.net/rapid"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/applier"
	"github.com/wgroam/wgroam/internal/feed"
	"github.com/wgroam/wgroam/publisher"
)

const (
	maxSkew = 10 * time.Second
	peers   = 3
	// lastPort is where all peers are in the end.
	lastPort = 100
	// soon is how long equal tables may take after the last fault. Most are at once.
	// A node that waits in the middle of an answer gives up after 500 ms, and asks
	// again at the next beat, 250 ms later at most.
	soon = time.Second
	// settle is how long equal tables may be asked for, by beats from before.
	settle = 600 * time.Millisecond
	// noticed is how long equal tables may take after an update has shown that the one
	// before it is missing: a question and its answer, and no beat in between.
	noticed = 50 * time.Millisecond
	// quiet is for how long nothing but beats may follow.
	quiet = time.Second
)

// clocks says what the wall clocks of the nodes are like.
type clocks int

const (
	exact   clocks = iota
	skewed         // each by up to half of what is allowed, for ever
	stepped        // set ahead and back, also by an hour
)

// step is one thing that happens, some time after the one before.
type step struct {
	after time.Duration
	what  func(*group)
	text  string
}

// GoString implements fmt.GoStringer, for rapid.
func (s step) GoString() string { return fmt.Sprintf("+%v %s", s.after, s.text) }

// group is what a schedule happens to.
type group struct {
	*network
	clocks clocks
	bus    bool // one server in the middle, which a node knows to be away; else a mesh
	// live: WireGuard's sessions live on when a daemon ends, so that the next one
	// finds endpoints in the device.
	live   bool
	newest map[wgroam.Key]observed // by the time of day, which nobody knows
	errs   []string
}

// observed is the newest observation of a peer. life is nil for one that no
// daemon was there to see.
type observed struct {
	at     time.Time
	record wgroam.Record
	life   *life
}

// node is a gateway, whose daemon comes and goes.
type node struct {
	index int
	name  string
	id    wgroam.NodeID
	began time.Time    // virtual
	ahead atomic.Int64 // nanoseconds, its wall clock
	held  map[wgroam.Key]wgroam.Holding
	files [][]wgroam.Record // its snapshots, oldest first
	life  *life             // nil while the daemon is down
}

// started is a time with a monotonic reading, which virtual time has not, of whole
// milliseconds.
var started = func() time.Time {
	t := time.Now()
	return t.Add(-time.Duration(t.Nanosecond()) % time.Millisecond)
}()

// now is what the node's host says the time is. Only the wall clock is set ahead,
// and package time has no other way to make such a time.
func (n *node) now() time.Time {
	ahead := n.ahead.Load()
	t := started.Add(time.Since(n.began) + time.Duration(ahead))
	// struct{ wall uint64; ext int64; loc *Location }, where ext is the
	// monotonic reading (time/time.go).
	*(*int64)(unsafe.Add(unsafe.Pointer(&t), 8)) -= ahead
	return t
}

// life is one life of a daemon: all of it that lies between tracker and applier,
// wired as in cmd/wgroam.
type life struct {
	node      *node
	link      *link
	table     *wgroam.Table
	clock     *wgroam.Clock
	view      *wgroam.View
	merger    *applier.Merger
	end       func()
	offline   bool                        // network.mu
	questions map[*feed.Request]*question // link.mu

	// What the table must have, by the rules: link.mu.
	known map[wgroam.Key]wgroam.Record
}

// hears notes what the node is told.
func (l *life) hears(records []wgroam.Record) {
	l.link.mu.Lock()
	defer l.link.mu.Unlock()
	for _, r := range records {
		l.learns(r)
	}
}

func (l *life) learns(r wgroam.Record) {
	if r.Version.HLC.Time().Sub(l.node.now()) > maxSkew {
		return
	}
	if old, ok := l.known[r.Peer]; !ok || newer(r, old) {
		l.known[r.Peer] = r
	}
}

// newer is the order that all agree on. Two records can have one version where a
// first dump shows the handshake that was seen before.
func newer(r, old wgroam.Record) bool {
	return cmp.Or(
		r.Version.Compare(old.Version), r.Endpoint.Compare(old.Endpoint), cmp.Compare(r.Cause, old.Cause),
	) > 0
}

func key(peer int) wgroam.Key { return wgroam.Key{0, byte(peer % 2), byte(peer)} } // some share a bucket

// start starts the daemon of a node, with one of its snapshots, or none (-1).
func (g *group) start(n *node, file int) {
	l := &life{
		node: n, table: wgroam.NewTable([32]byte{1}), clock: wgroam.NewClock(maxSkew), view: wgroam.NewView(),
		questions: make(map[*feed.Request]*question), known: make(map[wgroam.Key]wgroam.Record),
	}
	l.link = &link{w: g.network, node: n, life: l, boot: uint64(n.now().UnixNano())}
	log := slog.New(slog.DiscardHandler)
	l.merger = applier.NewMerger(applier.MergerConfig{
		Self: n.id, Table: l.table, Clock: l.clock, View: l.view, Feed: l.link, Now: n.now, Log: log,
	})
	pub := publisher.New(publisher.Config{
		Link: l.link, Table: l.table, Role: func() feed.Role { return feed.RoleAlways }, Log: log,
	})
	for peer := range peers {
		held, ok := n.held[key(peer)]
		if !g.live {
			held = wgroam.Holding{}
		} else if ok {
			// As tracker and cmd/wgroam do with what the first dump shows.
			held.Cause = wgroam.CauseSnapshot
			if now := n.now(); held.At.After(now) {
				held.At = now
			}
			r := wgroam.Record{
				Peer: key(peer), Endpoint: held.Endpoint, Cause: held.Cause,
				Version: wgroam.Version{HLC: wgroam.HLCAt(held.At), Node: n.id},
			}
			_ = l.clock.Merge(r.Version.HLC, n.now())
			l.table.Merge(r)
			l.learns(r)
		}
		l.view.Set(key(peer), held)
	}
	if len(n.files) > 0 && file >= 0 {
		records := n.files[file%len(n.files)]
		l.hears(records)
		l.merger.Restore(records)
	}
	g.change(func() { n.life = l })
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { l.merger.Run(ctx) })
	running.Go(func() { _ = pub.Run(ctx) }) // always nil
	running.Go(func() { l.watchClock(ctx) })
	l.end = func() { cancel(); running.Wait() }
	g.connected(n)
}

// watchClock takes back what a wall clock that was ahead stamped, as cmd/wgroam does.
func (l *life) watchClock(ctx context.Context) {
	tick := time.NewTicker(250 * time.Millisecond)
	defer tick.Stop()
	for last := l.node.now(); ; {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := l.node.now()
		step := wgroam.SetBack(last, now)
		last = now
		if limit := l.clock.Limit(now); l.clock.Ahead(now) || l.table.Newest() > limit {
			l.table.Rewind(l.node.id, limit, step, now)
			l.clock.Rewind(now)
		}
	}
}

// connected tells a node that a connection is up again.
func (g *group) connected(n *node) {
	if n.life != nil && n.life.link.up() {
		n.life.link.onEvent(feed.Event{Up: true})
		n.life.merger.Up()
	}
}

// stop ends a daemon: by a crash, or in peace.
func (g *group) stop(n *node, crash bool) {
	l := n.life
	if l == nil {
		return
	}
	for peer := range peers {
		// The applier had written what the table has.
		if r, ok := l.table.Get(key(peer)); ok {
			held := n.held[key(peer)]
			if held.At.IsZero() {
				continue // no session with this node
			}
			held.Endpoint = r.Endpoint
			n.held[key(peer)] = held
		}
	}
	if crash {
		g.change(func() { n.life = nil })
	}
	l.end()
	if !crash {
		n.files = append(n.files, l.table.Records())
	}
	g.change(func() { n.life = nil })
}

// observe is what happens when the kernel of a node accepts a packet from a new
// place; late is how long it takes the daemon to see that.
func (g *group) observe(n *node, peer int, port uint16, handshake bool, late time.Duration) {
	k := key(peer)
	ep := netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(n.index + 1)}), port)
	at := n.now().Add(-late)
	held := n.held[k]
	if held.Endpoint = ep; handshake || held.At.IsZero() {
		held.At = at.Round(0) // the kernel tells of the wall clock only
	}
	n.held[k] = held
	l := n.life
	if l == nil {
		g.newest[k] = observed{at: time.Now()}
		return
	}
	l.view.Set(k, wgroam.Holding{Endpoint: ep, Cause: wgroam.CauseData, At: at})
	before, _ := l.table.Get(k)
	r := wgroam.Record{
		Peer: k, Endpoint: ep, Cause: wgroam.CauseData,
		Version: wgroam.Version{HLC: l.clock.Stamp(at), Node: n.id},
	}
	l.link.mu.Lock()
	l.learns(r)
	l.link.mu.Unlock()
	l.table.Merge(r)
	if late == 0 && r.Version.Compare(before.Version) <= 0 && g.clocks != stepped {
		g.fails("%+v, made in the knowledge of %+v, does not supersede it", r, before)
	}
	if g.clocks == exact && late == 0 {
		if last := g.newest[k]; r.Version.Compare(last.record.Version) <= 0 {
			g.fails("%+v is older than %+v, which was made before", r, last.record)
		}
	}
	g.newest[k] = observed{at: at, record: r, life: l}
}

func (g *group) fails(format string, args ...any) {
	g.errs = append(g.errs, fmt.Sprintf(format, args...))
}

// drawStep draws one step for so many nodes.
func drawStep(c clocks, nodes int) *rapid.Generator[step] {
	type choice struct {
		weight int
		draw   func(t *rapid.T) (string, func(*group))
	}
	draw := func(t *rapid.T, name string, least, most int) int { return rapid.IntRange(least, most).Draw(t, name) }
	onNode := func(name string, f func(*group, *node)) func(*rapid.T) (string, func(*group)) {
		return func(t *rapid.T) (string, func(*group)) {
			i := draw(t, "node", 0, nodes-1)
			return fmt.Sprintf("%s: gw-%d", name, i), func(g *group) { f(g, g.nodes[i]) }
		}
	}
	choices := []choice{
		{12, func(t *rapid.T) (string, func(*group)) {
			i, peer, port := draw(t, "node", 0, nodes-1), draw(t, "peer", 0, peers-1), draw(t, "port", 1, 9)
			handshake, late := rapid.Bool().Draw(t, "handshake"), 0
			if c != exact && draw(t, "is late", 0, 4) == 0 {
				late = draw(t, "late", 1, 300)
			}
			return fmt.Sprintf("gw-%d sees peer %d at port %d (handshake %v, %d ms late)", i, peer, port, handshake, late),
				func(g *group) {
					g.observe(g.nodes[i], peer, uint16(port), handshake, time.Duration(late)*time.Millisecond)
				}
		}},
		{3, func(t *rapid.T) (string, func(*group)) {
			loss, doubles, delay := draw(t, "loss", 0, 60), draw(t, "doubles", 0, 40), draw(t, "delay", 0, 600)
			return fmt.Sprintf("weather: %d%% lost, %d%% doubled, up to %d ms late", loss, doubles, delay), func(g *group) {
				g.change(func() { g.lossPercent, g.doubles, g.delay = loss, doubles, time.Duration(delay)*time.Millisecond })
			}
		}},
		{2, func(t *rapid.T) (string, func(*group)) {
			from, to, both := draw(t, "from", 0, nodes-1), draw(t, "to", 0, nodes-1), rapid.Bool().Draw(t, "both")
			return fmt.Sprintf("black hole from gw-%d to gw-%d, both ways %v", from, to, both), func(g *group) {
				g.change(func() { g.cut[from][to] = true; g.cut[to][from] = g.cut[to][from] || both })
			}
		}},
		{1, func(*rapid.T) (string, func(*group)) {
			return "all black holes end, unnoticed", func(g *group) { g.mend() }
		}},
		{1, func(*rapid.T) (string, func(*group)) {
			return "all black holes end, and connections come up", func(g *group) {
				g.mend()
				for _, n := range g.nodes {
					g.connected(n)
				}
			}
		}},
		{2, onNode("disconnected", func(g *group, n *node) { g.disconnect(n, true) })},
		{2, onNode("connected", func(g *group, n *node) { g.disconnect(n, false); g.connected(n) })},
		{2, onNode("killed", func(g *group, n *node) { g.stop(n, true) })},
		{1, onNode("stopped", func(g *group, n *node) { g.stop(n, false) })},
		{1, onNode("snapshot", func(_ *group, n *node) {
			if n.life != nil {
				n.files = append(n.files, n.life.table.Records())
			}
		})},
		{4, func(t *rapid.T) (string, func(*group)) {
			i, file := draw(t, "node", 0, nodes-1), draw(t, "file", -1, 3)
			return fmt.Sprintf("gw-%d started with snapshot %d", i, file), func(g *group) {
				if n := g.nodes[i]; n.life == nil {
					g.start(n, file)
				}
			}
		}},
		{2, func(t *rapid.T) (string, func(*group)) {
			which, i := draw(t, "which", 0, 99), draw(t, "node", 0, nodes-1)
			return fmt.Sprintf("message %d again, to gw-%d", which, i), func(g *group) { g.replay(which, i) }
		}},
		{1, func(t *rapid.T) (string, func(*group)) {
			i, n := draw(t, "node", 0, nodes-1), draw(t, "messages", 1, 20)
			return fmt.Sprintf("gw-%d loses the next %d messages", i, n), func(g *group) { g.change(func() { g.deaf[i] = n }) }
		}},
		{1, func(t *rapid.T) (string, func(*group)) {
			i, peer, there := draw(t, "node", 0, nodes-1), draw(t, "peer", 0, peers-1), rapid.Bool().Draw(t, "there")
			return fmt.Sprintf("peer %d in gw-%d's device: %v", peer, i, there), func(g *group) {
				n := g.nodes[i]
				delete(n.held, key(peer))
				if n.life == nil {
					return
				}
				n.life.view.Keep(func(k wgroam.Key) bool { return k != key(peer) })
				if there {
					n.life.view.Set(key(peer), wgroam.Holding{})
				}
			}
		}},
	}
	if c == stepped {
		choices = append(choices, choice{4, func(t *rapid.T) (string, func(*group)) {
			i := draw(t, "node", 0, nodes-1)
			ahead := rapid.SampledFrom([]int{-3600, -30, -5, 0, 0, 5, 30, 3600}).Draw(t, "ahead")
			return fmt.Sprintf("gw-%d's clock set %d s ahead", i, ahead), func(g *group) { g.nodes[i].ahead.Store(int64(time.Duration(ahead) * time.Second)) }
		}})
	}
	total := 0
	for _, c := range choices {
		total += c.weight
	}
	return rapid.Custom(func(t *rapid.T) step {
		s := step{after: time.Duration(draw(t, "ms", 1, 200)) * time.Millisecond}
		n := draw(t, "what", 0, total-1)
		for _, c := range choices {
			if n -= c.weight; n < 0 {
				s.text, s.what = c.draw(t)
				break
			}
		}
		return s
	})
}

// change does what messages under way must not see half of.
func (w *network) change(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f()
}

func (g *group) mend() {
	g.change(func() {
		for i := range g.cut {
			clear(g.cut[i])
		}
	})
}

func (g *group) disconnect(n *node, yes bool) {
	g.change(func() {
		switch {
		case n.life == nil:
		case g.bus:
			n.life.offline = yes
		default:
			for i := range g.nodes {
				g.cut[i][n.index], g.cut[n.index][i] = yes, yes
			}
		}
	})
	if n.life != nil && yes {
		n.life.link.onEvent(feed.Event{})
	}
}

// replay says an old message again.
func (g *group) replay(which, to int) {
	g.change(func() {
		if len(g.old) == 0 {
			return
		}
		if m := g.old[which%len(g.old)]; m.from != to {
			m.to = to
			g.arrives(m, time.Millisecond)
		}
	})
}

// TestSchedules: whatever happens to a group, soon after the last fault all its
// tables are equal, to the newest observation that a living node has made or
// heard of, and nobody says any more than beats.
//
// What a seed repeats is the schedule. Goroutines that wake in the same instant
// may take turns in another order.
func TestSchedules(t *testing.T) {
	for _, c := range []struct {
		name   string
		clocks clocks
		bus    bool
		live   bool
	}{
		{"mesh", exact, false, false},
		{"bus", exact, true, false},
		{"mesh, sessions live on", exact, false, true},
		{"bus, sessions live on", exact, true, true},
		{"mesh, clocks differ", skewed, false, false},
		{"bus, clocks differ", skewed, true, false},
		{"mesh, clocks are set", stepped, false, false},
		{"bus, clocks are set", stepped, true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			var (
				mu      sync.Mutex
				slowest time.Duration
				runs    int
			)
			rapid.Check(t, func(rt *rapid.T) {
				nodes := rapid.IntRange(2, 4).Draw(rt, "nodes")
				steps := rapid.SliceOfN(drawStep(c.clocks, nodes), 4, 40).Draw(rt, "steps")
				seed := rapid.Uint64().Draw(rt, "seed of the network")
				skews := make([]time.Duration, nodes)
				if c.clocks == skewed {
					for i := range skews {
						skews[i] = time.Duration(rapid.IntRange(-4900, 4900).Draw(rt, "skew")) * time.Millisecond
					}
				}
				var g *group
				var took time.Duration
				synctest.Test(t, func(*testing.T) {
					g = &group{network: newNetwork(seed, nodes), clocks: c.clocks, bus: c.bus, live: c.live, newest: make(map[wgroam.Key]observed)}
					took = g.run(steps, skews)
				})
				if len(g.errs) > 0 {
					rt.Fatalf("%s\n%s", strings.Join(g.errs, "\n"), strings.Join(g.trace, "\n"))
				}
				mu.Lock()
				defer mu.Unlock()
				slowest, runs = max(slowest, took), runs+1
			})
			t.Logf("%d schedules; equal tables %v after the last fault at most, in virtual time", runs, slowest)
		})
	}
}

// run lets a schedule happen, mends everything, and looks.
func (g *group) run(steps []step, skews []time.Duration) (took time.Duration) {
	for i, skew := range skews {
		name := fmt.Sprint("gw-", i)
		g.nodes = append(g.nodes, &node{
			index: i, name: name, id: wgroam.NodeIDOf(name), began: g.began, held: make(map[wgroam.Key]wgroam.Holding),
		})
		g.nodes[i].ahead.Store(int64(skew))
	}
	for _, n := range g.nodes {
		// Not all at one moment, as everything else.
		time.Sleep(7 * time.Millisecond)
		g.start(n, -1)
	}
	defer func() {
		for _, n := range g.nodes {
			g.stop(n, true)
		}
	}()
	for _, s := range steps {
		time.Sleep(s.after)
		synctest.Wait()
		g.says("%s", s.text)
		s.what(g)
		if len(g.errs) > 0 {
			return 0
		}
	}
	synctest.Wait()

	// All that is under way is lost, and then nothing any more.
	g.says("everything is mended")
	g.change(func() {
		g.epoch++
		g.lossPercent, g.doubles, g.delay = 0, 0, 0
		clear(g.deaf)
		for i := range g.nodes {
			for j := range g.nodes {
				g.cut[i][j] = true
			}
		}
	})
	if g.clocks == stepped {
		for _, n := range g.nodes {
			n.ahead.Store(0)
		}
		time.Sleep(time.Second) // or the truth is not known yet
	}
	for _, n := range g.nodes {
		if n.life == nil {
			time.Sleep(time.Millisecond)
			g.start(n, 0)
		}
	}
	synctest.Wait()
	want := g.truth()
	g.mend()
	g.change(func() {
		for _, n := range g.nodes {
			n.life.offline = false
		}
	})
	for _, n := range g.nodes {
		g.connected(n)
	}
	if g.live {
		// What a device knows better than a record that comes back is a record more.
		want = nil
	}
	took = g.converges(want)
	g.truth()
	if len(g.errs) > 0 {
		return took
	}

	// And it goes on as ever: the newest observation wins, and is said once.
	time.Sleep(settle)
	var before, after [kinds]int
	g.change(func() { before = g.sent })
	for peer := range peers {
		time.Sleep(2 * time.Millisecond)
		g.observe(g.nodes[peer%len(g.nodes)], peer, lastPort, true, 0)
	}
	want = g.truth()
	for k, r := range want {
		if r.Endpoint.Port() != lastPort {
			g.fails("peer %v was last seen at port %d, but %v is the newest record", k[2], lastPort, r)
		}
	}
	took = max(took, g.converges(want))
	g.change(func() { after = g.sent })
	if n := after[update] - before[update]; n > peers*(len(g.nodes)-1) {
		g.fails("%d updates about %d observations", n, peers)
	}

	// What is lost is missed as soon as something else arrives.
	for peer, lost := range []bool{true, false} {
		g.change(func() { g.lossUpdates = lost })
		g.observe(g.nodes[0], peer, lastPort+1, true, 0)
		time.Sleep(2 * time.Millisecond)
	}
	if took := g.converges(g.truth()); took > noticed && len(g.errs) == 0 {
		g.fails("a lost update came %v after the next one", took)
	}

	time.Sleep(settle)
	g.change(func() { before = g.sent })
	time.Sleep(quiet)
	g.change(func() { after = g.sent })
	for _, k := range []kind{update, request, reply} {
		if n := after[k] - before[k]; n > 0 && len(g.errs) == 0 {
			g.fails("after the tables were equal, %d more of kind %d", n, k)
		}
	}
	return took
}

// truth returns what all tables have to become: the newest of what each living
// node knows, which has to be the newest of what it was told.
func (g *group) truth() map[wgroam.Key]wgroam.Record {
	synctest.Wait() // a node may be just about to merge what it has been told
	want := make(map[wgroam.Key]wgroam.Record)
	for _, n := range g.nodes {
		got := contents(n.life.table)
		n.life.link.mu.Lock()
		known := maps.Clone(n.life.known)
		n.life.link.mu.Unlock()
		// Where a clock is set, and where a device knows better than what is
		// restored, a node changes what it was told.
		if g.clocks != stepped && !g.live && !equal(got, known) {
			g.fails("%s has\n%swas told\n%s", n.name, list(got), list(known))
		}
		for k, r := range got {
			if old, ok := want[k]; !ok || newer(r, old) {
				want[k] = r
			}
		}
	}
	if g.clocks == exact {
		for k, last := range g.newest {
			if last.life != nil && last.life == last.life.node.life && want[k].Endpoint != last.record.Endpoint {
				g.fails("peer %v was last seen at %v, but %v is the newest record", k[2], last.record.Endpoint, want[k])
			}
		}
	}
	return want
}

// converges waits until all tables are what they have to be; nil is the same.
func (g *group) converges(want map[wgroam.Key]wgroam.Record) time.Duration {
	began := time.Now()
	for {
		time.Sleep(25 * time.Millisecond)
		synctest.Wait()
		want := want
		if want == nil {
			want = contents(g.nodes[0].life.table)
		}
		i := slices.IndexFunc(g.nodes, func(n *node) bool { return !equal(contents(n.life.table), want) })
		took := time.Since(began)
		if i < 0 {
			return took
		}
		if took > soon {
			g.fails("after %v, %s has\n%swant\n%s", took, g.nodes[i].name, list(contents(g.nodes[i].life.table)), list(want))
			return took
		}
	}
}

func contents(t *wgroam.Table) map[wgroam.Key]wgroam.Record {
	out := make(map[wgroam.Key]wgroam.Record)
	for _, r := range t.Records() {
		out[r.Peer] = r
	}
	return out
}

func equal(a, b map[wgroam.Key]wgroam.Record) bool {
	if len(a) != len(b) {
		return false
	}
	for k, r := range a {
		if b[k] != r {
			return false
		}
	}
	return true
}

func list(records map[wgroam.Key]wgroam.Record) string {
	var out strings.Builder
	for peer := range peers {
		if r, ok := records[key(peer)]; ok {
			fmt.Fprintf(&out, "\tpeer %d at %v, %v, %v by %v\n", peer, r.Endpoint, r.Cause, uint64(r.Version.HLC), r.Version.Node)
		}
	}
	return out.String()
}
