// SPDX-License-Identifier: MIT

package applier

import (
	"context"
	"fmt"
	"iter"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/feed"
)

const (
	// proveEvery is how soon a node is asked again whose beats may be recordings. It
	// doubles with every time that there is no answer, but for proveMost: nothing
	// else is asked meanwhile.
	proveEvery = time.Second
	proveMost  = 8 * time.Second
	// stalled is for how long a node that is asked may say nothing before the next one is
	// asked beside it. All at once would tell a node that joins the same things.
	stalled = 50 * time.Millisecond
	// churnSync is how often tables that never stand still are compared. Gaps
	// are noticed at once in any case.
	churnSync = 5 * time.Second
	// futileFor is how long an answer that had nothing new is believed: what
	// was refused may be welcome later, such as a record from the future.
	futileFor = 5 * time.Second
	// skewAlarm is the difference between two clocks that is worth a warning.
	// WireGuard peers ignore handshakes from a clock that is behind.
	skewAlarm = time.Second
	// futureFor is how long after the last record from the future it is still
	// worth an alarm. While a node has any, it is asked more often than that.
	futureFor = 6 * futileFor
	// agedSyncs is how many answers in a row with records that are too old are no
	// accident: nodes that keep records equally long forget them together.
	agedSyncs = 3
	// failedLines is how often there is a line at most of a node that fails to answer.
	failedLines = time.Minute
	// forgetAfter is how long a node must be silent to be forgotten.
	forgetAfter = 24 * time.Hour
	// calmCheck is how often it is looked whether an alarm is over.
	calmCheck = time.Second
	// sessionLife is how long a WireGuard session can be used without a new
	// handshake (messages.h, REJECT_AFTER_TIME).
	sessionLife = 180 * time.Second
	// spareRecords is how many records are kept of peers that the device does
	// not have, on top of twice the peers that it has.
	spareRecords = 10_000
)

// Asker is the part of feed.Link that a Merger calls.
type Asker interface {
	Ask(ctx context.Context, node wgroam.NodeID, have *wgroam.Digests) iter.Seq2[feed.Update, error]
}

// MergerConfig describes a Merger.
type MergerConfig struct {
	Self  wgroam.NodeID
	Table *wgroam.Table
	Clock *wgroam.Clock
	View  *wgroam.View
	Feed  Asker
	// VIP are our own virtual addresses: nobody's endpoint.
	VIP []netip.Addr
	// Merged, if set, is told how long the records of an update took from the
	// connection into the Table. It must not block.
	Merged func(time.Duration)
	// Now is the clock of this host; nil is time.Now.
	Now func() time.Time
	Log *slog.Logger
}

// NodeState says how a node's table stands to ours.
type NodeState string

// The states of a node.
const (
	NodeSynced  NodeState = "synced"
	NodeSyncing NodeState = "syncing"
	NodeStale   NodeState = "stale" // silent
)

// Node is another node of the group.
type Node struct {
	ID      wgroam.NodeID
	Name    string
	Role    feed.Role
	State   NodeState
	Heard   time.Time
	Skew    time.Duration // its clock minus ours
	Records int
}

// Counters are what a Merger has counted.
type Counters struct {
	// Gaps: updates that were missing when the next one, or a beat, came.
	Gaps uint64
	// Syncs were answered in full, SyncErrors were not; Synced records were in
	// the answers.
	Syncs, SyncErrors, Synced uint64
}

// Merger takes the records of other nodes into the Table.
//
// What goes missing on the way is noticed by its sequence number, or by digests
// that differ, and asked for.
type Merger struct {
	cfg  MergerConfig
	kick chan struct{}

	mu      sync.Mutex
	nodes   map[wgroam.NodeID]*node
	wanted  uint64 // counts the wishes to ask
	refused map[string]uint64
	counted Counters
	future  error     // says what was refused last for its stamp; nil when that is long ago
	futured time.Time // when
}

// node is what is remembered of another node.
type node struct {
	boot, seq uint64        // of the newest update, in the life that last proved itself
	doubted   bool          // there was a line about beats that nobody answers for
	unproven  uint64        // newest boot of those
	prove     time.Duration // how soon to ask for an answer again
	beat      feed.Beat
	heard     time.Time // its last sign of life
	seen      time.Time // anything that came in its name
	failed    time.Time // the last line about a sync with it that failed
	ours      uint64    // sum of our digests at the last beat
	differs   time.Time // since when the digests differ; zero when equal
	suspect   bool      // something was missed: compare at the next beat
	want      uint64    // ask it, after those with less; zero: do not
	asking    bool
	asked     time.Time
	askedAt   uint64 // the digest of its beat then
	// The digests around an answer that had nothing new: while they stay the
	// same, asking again gives the same answer.
	futile [2]uint64
	// Or until this host's clock shows that time, when what was refused in it as
	// from the future is so no more; zero for an answer without such.
	welcome time.Time
	aged    int // answers in a row with records that are too old

	skews  [16]time.Duration // of the newest beats, in no order
	beats  int
	skewed bool
}

// skew is the difference between the other node's clock and ours. What a beat
// shows is less by the time that it took, so the largest is the best.
func (n *node) skew() time.Duration {
	if n.beats == 0 {
		return 0
	}
	return slices.Max(n.skews[:min(n.beats, len(n.skews))])
}

// NewMerger returns a Merger. Update, Beat and Up are to be registered with the
// feed, and Run to be called.
func NewMerger(cfg MergerConfig) *Merger {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Merger{
		cfg:     cfg,
		kick:    make(chan struct{}, 1),
		nodes:   make(map[wgroam.NodeID]*node),
		refused: make(map[string]uint64),
	}
}

// Update takes an update of another node. It does not block.
func (m *Merger) Update(u feed.Update) {
	came := time.Now()
	for _, r := range u.Records {
		m.merge(r, m.cfg.Now())
	}
	if m.cfg.Merged != nil {
		m.cfg.Merged(time.Since(came))
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	n := m.node(u.Node)
	if u.Boot != n.boot {
		return // another count; the next beat says which is the present one
	}
	if u.Seq > n.seq+1 {
		m.counted.Gaps += u.Seq - n.seq - 1
		m.ask(n)
	}
	n.seq = max(n.seq, u.Seq)
}

// Restore takes the records that this node had when it ended.
func (m *Merger) Restore(records []wgroam.Record) {
	now := m.cfg.Now()
	for _, r := range records {
		m.merge(r, now)
	}
}

// Beat takes a beat of another node. It does not block.
func (m *Merger) Beat(b feed.Beat) {
	digests := m.cfg.Table.Digests()
	ours, now := digests.Sum(), m.cfg.Now()

	m.mu.Lock()
	defer m.mu.Unlock()
	n := m.node(b.Node)
	if b.Unproven {
		// No sign of life, but its answer will be one.
		if b.Boot > n.unproven {
			n.unproven, n.prove = b.Boot, 0
		}
		if now.Sub(n.asked) > n.prove {
			m.ask(n)
		}
		return
	}
	if b.Boot != n.boot {
		// New to us, or restarted.
		n.boot, n.seq, n.suspect, n.doubted = b.Boot, b.Seq, true, false
	}
	still := n.beat.Digest == b.Digest && n.ours == ours
	n.beat, n.heard, n.ours = b, now, ours
	n.skews[n.beats%len(n.skews)] = b.Time.Sub(now)
	n.beats++
	m.warnSkew(n)
	if b.Seq > n.seq {
		// The last updates before the beat are missing.
		m.counted.Gaps += b.Seq - n.seq
		n.seq, n.suspect = b.Seq, true
	}
	if b.Digest == ours {
		n.differs, n.suspect, n.aged = time.Time{}, false, 0
		return
	}
	if n.differs.IsZero() {
		n.differs = now
	}
	if n.futile == [2]uint64{ours, b.Digest} && now.Sub(n.asked) < futileFor &&
		(n.welcome.IsZero() || now.Before(n.welcome)) {
		return
	}
	// Digests of tables in motion always differ. They mean something when
	// neither has moved since the last beat, or when it goes on for long.
	if n.suspect || still || (now.Sub(n.differs) > churnSync && now.Sub(n.asked) > churnSync) {
		m.ask(n)
	}
}

// Up notes that a connection came up: messages of any node may have been missed.
func (m *Merger) Up() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, n := range m.nodes {
		n.suspect = true
	}
}

// node returns the entry of a message's sender. m.mu is held.
func (m *Merger) node(id wgroam.NodeID) *node {
	n := m.nodes[id]
	if n == nil {
		n = &node{}
		m.nodes[id] = n
	}
	n.seen = m.cfg.Now()
	return n
}

// silent reports whether there should have been a beat.
func (n *node) silent(now time.Time) bool { return now.Sub(n.heard) > n.beat.Silence() }

func (m *Merger) ask(n *node) {
	if n.want == 0 {
		m.wanted++
		n.want = m.wanted
	}
	m.again()
}

// again has Run look for a node to ask.
func (m *Merger) again() {
	select {
	case m.kick <- struct{}{}:
	default:
	}
}

func (m *Merger) warnSkew(n *node) {
	skew := n.skew()
	bad := skew.Abs() > skewAlarm
	if bad && !n.skewed {
		m.cfg.Log.Warn("clocks differ: keep both nodes on NTP, or handshakes after a failover are ignored for that long",
			"node", n.beat.Name, "ahead", skew.Round(time.Millisecond))
	}
	n.skewed = bad
}

// merge takes one record into the Table, if it makes sense. Of one from the
// future it returns when it is so no more.
func (m *Merger) merge(r wgroam.Record, now time.Time) (welcome time.Time) {
	err := wgroam.CheckEndpoint(r.Endpoint)
	if err != nil || slices.Contains(m.cfg.VIP, r.Endpoint.Addr()) {
		m.refuse("endpoint")
		return welcome
	}
	if r.Version.HLC < m.cfg.Table.Horizon() {
		m.refuse("aged")
		return welcome
	}
	held, ours := m.cfg.View.Get(r.Peer)
	if !ours && m.cfg.Table.Len() >= spareRecords+2*m.cfg.View.Len() {
		if _, known := m.cfg.Table.Get(r.Peer); !known {
			m.refuse("full")
			return welcome
		}
	}
	if err := m.cfg.Clock.Merge(r.Version.HLC, now); err != nil {
		m.refuse("skew")
		m.fromFuture(r, err, now)
		return r.Version.HLC.Time().Add(-m.cfg.Clock.MaxSkew())
	}
	if r.Version.Node == m.cfg.Self && ours && held.Cause == wgroam.CauseSnapshot &&
		held.Endpoint != r.Endpoint && now.Sub(held.At) < sessionLife {
		if current, _ := m.cfg.Table.Get(r.Peer); r.Version.Compare(current.Version) > 0 {
			// Our own record from before a restart comes back. The session has
			// lived on in the kernel since, and so knows better; but not better than
			// who has seen the peer since.
			r.Endpoint, r.Cause = held.Endpoint, held.Cause
			r.Version.HLC = max(r.Version.HLC+1, min(wgroam.HLCAt(held.At), wgroam.HLCAt(now)))
		}
	}
	m.cfg.Table.Merge(r)
	return welcome
}

// fromFuture raises the alarm about records from the future.
func (m *Merger) fromFuture(r wgroam.Record, err error, now time.Time) {
	name := m.NameOf(r.Version.Node)
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.future == nil {
		m.cfg.Log.Error("refusing records from the future: keep all nodes on NTP", "node", name, "err", err)
	}
	m.future, m.futured = fmt.Errorf("refusing records of node %s: %w", name, err), now
}

// Future returns why records of the last half minute were refused for their
// stamps, nil if none were. It wraps wgroam.ErrSkew.
func (m *Merger) Future() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.future
}

// calm ends the alarm about records from the future.
func (m *Merger) calm(now time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.future != nil && now.Sub(m.futured) > futureFor {
		m.future = nil
		m.cfg.Log.Info("no more records from the future")
	}
}

// forget forgets nodes that have long been silent.
func (m *Merger) forget(now time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	maps.DeleteFunc(m.nodes, func(_ wgroam.NodeID, n *node) bool {
		return n.want == 0 && !n.asking && now.Sub(n.seen) > forgetAfter
	})
}

// refuse counts a refused record.
func (m *Merger) refuse(why string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.refused[why]++
}

// Run asks other nodes for what is missing, until ctx ends.
func (m *Merger) Run(ctx context.Context) {
	var asking sync.WaitGroup
	defer asking.Wait()
	tick := time.NewTicker(calmCheck)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			m.calm(m.cfg.Now())
			m.forget(m.cfg.Now())
			continue
		case <-m.kick:
		}
		// One at a time, or nodes that do not answer keep this from all else.
		id := m.next()
		if id == 0 {
			continue
		}
		m.again()
		heard, done := make(chan struct{}, 1), make(chan struct{})
		asking.Go(func() {
			defer close(done)
			m.sync(ctx, id, heard)
			m.again() // it may have been wished for meanwhile
		})
		for silent := time.After(stalled); silent != nil; {
			select {
			case <-heard:
				silent = time.After(stalled)
			case <-done:
				silent = nil
			case <-silent:
				silent = nil
			}
		}
	}
}

// next returns the node that has waited longest to be asked, or zero.
func (m *Merger) next() wgroam.NodeID {
	m.mu.Lock()
	defer m.mu.Unlock()
	var first wgroam.NodeID
	for id, n := range m.nodes {
		if n.want != 0 && !n.asking && (first == 0 || n.want < m.nodes[first].want) {
			first = id
		}
	}
	if first != 0 {
		n := m.nodes[first]
		n.want, n.suspect, n.asking, n.asked, n.askedAt = 0, false, true, m.cfg.Now(), n.beat.Digest
	}
	return first
}

// sync asks a node, and signals in heard when it has said something.
func (m *Merger) sync(ctx context.Context, id wgroam.NodeID, heard chan<- struct{}) {
	have := m.cfg.Table.Digests()
	var (
		got     int
		err     error
		welcome time.Time
		aged    bool
	)
	for u, e := range m.cfg.Feed.Ask(ctx, id, &have) {
		if e != nil {
			err = e
			break
		}
		select {
		case heard <- struct{}{}:
		default:
		}
		for _, r := range u.Records {
			aged = aged || r.Version.HLC < m.cfg.Table.Horizon()
			if at := m.merge(r, m.cfg.Now()); welcome.IsZero() || !at.IsZero() && at.Before(welcome) {
				welcome = at
			}
		}
		got += len(u.Records)
	}
	now := m.cfg.Table.Digests()

	m.mu.Lock()
	defer m.mu.Unlock()
	n := m.nodes[id]
	n.asking = false
	m.counted.Synced += uint64(got)
	if err != nil {
		m.counted.SyncErrors++
		n.suspect = true // again at its next beat
		n.prove = min(max(2*n.prove, proveEvery), proveMost)
		switch {
		case ctx.Err() != nil:
		case !n.silent(m.cfg.Now()):
			if !n.failed.IsZero() && m.cfg.Now().Sub(n.failed) < failedLines {
				break
			}
			n.failed = m.cfg.Now()
			m.cfg.Log.Warn("sync failed; trying again", "node", n.beat.Name, "err", err)
		case !n.doubted:
			n.doubted = true
			m.cfg.Log.Warn("heartbeats of a node that does not answer are recordings, or our questions do not reach it", "node", id, "err", err)
		}
		return
	}
	m.counted.Syncs++
	n.prove = proveEvery
	switch {
	case !aged:
		n.aged = 0
	case n.aged < agedSyncs:
		if n.aged++; n.aged == agedSyncs {
			m.cfg.Log.Warn("a node keeps records that are too old for this one: set feed.max_age to the same on all nodes", "node", n.beat.Name)
		}
	}
	if now == have {
		n.futile, n.welcome = [2]uint64{now.Sum(), n.askedAt}, welcome
	}
	m.cfg.Log.Debug("synced", "node", n.beat.Name, "records", got)
}

// Nodes returns the other nodes of the group, by identity.
func (m *Merger) Nodes() []Node {
	now := m.cfg.Now()
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []Node
	for _, id := range slices.Sorted(maps.Keys(m.nodes)) {
		n := m.nodes[id]
		if n.heard.IsZero() {
			continue // perhaps dead
		}
		state := NodeSynced
		switch {
		case n.silent(now):
			state = NodeStale
		case n.asking, n.want != 0, n.suspect, !n.differs.IsZero():
			state = NodeSyncing
		}
		out = append(out, Node{
			ID: id, Name: n.beat.Name, Role: n.beat.Role, State: state,
			Heard: n.heard, Skew: n.skew(), Records: int(n.beat.Records),
		})
	}
	return out
}

// NameOf returns the name of a node, or its identity while the name is unknown.
func (m *Merger) NameOf(id wgroam.NodeID) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if n := m.nodes[id]; n != nil && n.beat.Name != "" {
		return n.beat.Name
	}
	return id.String()
}

// Counters returns what has been counted so far.
func (m *Merger) Counters() Counters {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.counted
}

// Refused returns how many records were refused, by reason: aged,
// endpoint, full, skew.
func (m *Merger) Refused() map[string]uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.refused)
}
