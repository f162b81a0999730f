// SPDX-License-Identifier: MIT

// Package tracker finds out what one WireGuard device of this node knows of its
// peers' endpoints, and how it came to know it.
//
// A Tracker uses the best source that works for its device, its rung of the
// ladder: the kernel hook, the UDP port, or else polling. All end in the same
// place, and a dump of the device stands behind each: at the start, after events
// were lost, where the device is not as the events say, and every few minutes to
// prove that nothing was missed.
package tracker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/bpf"
	"github.com/wgroam/wgroam/internal/wg"
)

// ErrRekeyed is returned by Run when the device's key pair has changed, and
// with it the group that the device belongs to.
var ErrRekeyed = errors.New("device has a new private key")

// resyncDelay is how long after a suspicious event the device is dumped. It
// lets the rest of a burst arrive. What a hostile peer can cause is bounded
// further by pace: a dump of many peers takes its time.
const resyncDelay = 200 * time.Millisecond

// dumpRest is more than the rest after a dump of 100 000 peers.
const dumpRest = 10 * time.Second

// settle is how long a change may take from where it is announced, by the hook
// or by the applier, until a dump shows it. It takes less than a microsecond,
// unless the processor is a virtual one and its host has other things to do. It
// is shorter than resyncDelay, or a dump could come too early to explain
// anything.
const settle = 100 * time.Millisecond

// Config describes a Tracker.
type Config struct {
	Device  string
	Ifindex int
	// Netns is the inode of the device's network namespace.
	Netns uint32
	// Space is that namespace, to look for the device's UDP socket in; nil for the
	// process's.
	Space  *wg.Space
	Kernel *Kernel
	Port   *Port
	WG     *wg.Client
	// View is kept equal to the device.
	View *wgroam.View
	// Changed is called for every change of an endpoint, in order per peer. The
	// View has the change already.
	Changed func(wgroam.Observation)
	// Proven is called for an observation that is evidence of where the peer is:
	// with most causes right after Changed. A handshake initiation can be a
	// replay, on a node that has not heard of the peer before, and is proven
	// when the handshake has been completed.
	Proven func(wgroam.Observation)
	// Alive, if set, is called in every dump for each peer that has an endpoint and
	// has ever completed a handshake, with the time of the last one.
	Alive func(peer wgroam.Key, at netip.AddrPort, handshake time.Time)
	// Completed, if set, is called when a peer has a new session, on the rungs of
	// which Rung.Completes is true. At the UDP port a peer that can hear the traffic of
	// another can bring it about in the other's name.
	//
	// None of these functions may wait for anything.
	Completed func(peer wgroam.Key)
	// Poll is the interval of the polling rung.
	Poll time.Duration
	// Sweep is the interval of the safety net.
	Sweep time.Duration
	Log   *slog.Logger
}

// Status is what a Tracker can tell of itself.
type Status struct {
	Rung Rung
	// Reason says why it is not a better rung; empty on the best.
	Reason string
	// Events counts changes of endpoints.
	Events uint64
	// Resyncs counts dumps that were asked for: at the UDP port mostly by hints,
	// else because events were lost or not what the device did, peers were new, or
	// some were missing in the one before.
	Resyncs uint64
	// SweepRepairs counts peers whose endpoint only the sweep got right. It
	// stays zero unless something is wrong.
	SweepRepairs uint64
}

// Tracker follows one device.
type Tracker struct {
	cfg    Config
	resync chan struct{}    // a dump is wanted
	asked  chan chan<- bool // by Sync
	broken chan struct{}    // the rung broke
	pace   pace             // of dumps; Start's and Run's
	ladder ladder           // Start's and Run's

	mu     sync.Mutex
	status Status
	key    wgroam.Key
	peers  map[wgroam.Key]*peer
	places places
	dumped time.Duration // CLOCK_BOOTTIME, when the newest dump began
	// hookErr is why the hook broke, until Run has heard of it.
	hookErr error

	// On the rung port.
	since    time.Time // when we came there
	sessions *sessions
	unnamed  []bpf.UplinkEvent // handshakes of peers that are not known yet
	strays   hints             // under indexes that have no name
	hinted   time.Duration     // CLOCK_BOOTTIME of the newest hint that wants a dump
	blind    bool              // the program does not see all of the device's packets
	deaf     time.Duration     // CLOCK_BOOTTIME until which what has not been heard may yet have been said
}

// peer is what the tracker remembers of a peer, to put events and dumps into
// one order.
type peer struct {
	key        wgroam.Key
	endpoint   netip.AddrPort // changed by places alone
	prev, next *peer          // of those at the same endpoint
	boot       time.Duration  // of the newest event
	// pending is the newest observation while it is not proven; nil if it is.
	pending *wgroam.Observation
	// confirmed is the newest end of a handshake, and where the peer was then. The
	// event of its beginning can come later, when it was held back.
	confirmed   time.Duration
	confirmedAt netip.AddrPort
	received    int64 // bytes, in the newest dump
	earlier     int64 // and in the one before
	// begun is where a dump showed the peer, with packets of its, before it had
	// completed any handshake.
	begun   netip.AddrPort
	missing bool // in the newest dump
	// Without the hook: an endpoint that nothing explains yet, and CLOCK_BOOTTIME of the
	// first dump that showed it.
	unexplained   netip.AddrPort
	unexplainedAt time.Duration

	// On the rung port.
	mac1  mac1 // made when it is needed
	hints hints
	heard bool // there was a hint of the newest session
	// since is CLOCK_BOOTTIME from which on the endpoint is known. Hints from before
	// that explain no change of it.
	since time.Duration
	// told says that an event has told what the bytes of the next dump brought.
	told bool
}

// New returns a Tracker. Nothing happens before Start.
func New(cfg Config) *Tracker {
	return &Tracker{
		cfg:    cfg,
		resync: make(chan struct{}, 1),
		asked:  make(chan chan<- bool),
		broken: make(chan struct{}, 1),
		pace:   pace{least: resyncDelay, most: dumpRest},
		status: Status{Rung: RungNone},
		peers:  make(map[wgroam.Key]*peer),
		places: make(places),
	}
}

// add is called with t.mu held.
func (t *Tracker) add(k wgroam.Key) *peer {
	p := &peer{key: k}
	t.peers[k] = p
	return p
}

// Status returns a copy of the current status.
func (t *Tracker) Status() Status {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.status
}

// Start chooses a rung and fills the View. The hook is attached before the
// device is dumped, so that nothing falls between. The error wraps those of
// wg.Client.Device. After success, Run must be called.
func (t *Tracker) Start() error {
	// How many peers, and is the kernel the one to ask?
	d, err := t.cfg.WG.Device(t.cfg.Device)
	if err != nil {
		return err
	}
	t.ladder.saw(d)
	t.climb()
	if err := t.dump(context.Background(), dumpStart); err != nil {
		_ = t.leave() // the reason for failing is the one to report
		return err
	}
	return nil
}

func (t *Tracker) id() bpf.Device {
	return bpf.Device{Ifindex: uint32(t.cfg.Ifindex), Netns: t.cfg.Netns}
}

// Run follows the device until ctx ends, when it returns nil, or until the device
// is gone or has another key: the error then wraps wg.ErrNoDevice or is
// ErrRekeyed.
func (t *Tracker) Run(ctx context.Context) (err error) {
	defer func() { err = errors.Join(err, t.leave()) }()

	every, regular := t.interval()
	tick := time.NewTicker(every)
	defer tick.Stop()
	climb := time.NewTicker(t.cfg.Sweep)
	defer climb.Stop()
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	var due <-chan time.Time // the dump that is wanted; nil when none is
	for {
		resync := t.resync
		if due != nil {
			resync = nil
		}
		var err error
		select {
		case <-ctx.Done():
			return nil
		case <-t.broken:
			if t.fall() {
				err = t.dump(ctx, dumpResync)
			}
		case <-tick.C:
			why := regular
			if due != nil {
				why = dumpResync // the one that is wanted would have found it, too
			}
			err = t.dump(ctx, why)
		case <-climb.C:
			if t.climb() {
				err = t.dump(ctx, dumpResync)
			}
		case <-look.C:
			err = t.look(ctx)
		case answer := <-t.asked:
			var all bool
			all, err = t.catchUp(ctx, due != nil)
			answer <- all
		case <-resync:
			due = time.After(max(t.patience(), t.pace.rest(time.Now())))
		case <-due:
			due = nil
			err = t.dump(ctx, dumpResync)
		}
		switch {
		case errors.Is(err, wg.ErrNoDevice), errors.Is(err, ErrRekeyed):
			return err
		case err != nil:
			// The next dump may succeed; the rung goes on meanwhile.
			t.cfg.Log.Error("cannot read device", "err", err)
		}
		if now, why := t.interval(); now != every {
			every, regular = now, why
			tick.Reset(every)
		}
	}
}

// event takes an event of the kernel hook, and reports whether it was the newest
// of its peer. Events may be missing before it, which were held back, and two
// packets of a peer on two CPUs can be told in the wrong order, or one of them not
// at all: the program runs before the kernel takes the peer's lock. So it is
// believed for now, and settled tells where the kernel went.
func (t *Tracker) event(e bpf.Event) (news bool) {
	now := time.Now()
	boot, err := bootTime()
	if err != nil {
		boot = e.Boot
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if e.Confirmed {
		t.completed(e.Peer)
	}
	if e.Boot < t.dumped-settle {
		// Out of the map, where those that are gone are never deleted, or so late
		// that a dump has overtaken it.
		return false
	}
	p := t.peers[e.Peer]
	if e.Confirmed {
		switch {
		case p == nil:
			// Added, and held back all the time since.
			t.wantDump()
		case p.pending != nil && p.pending.New == e.New:
			t.prove(p)
		default:
			p.confirmed, p.confirmedAt = e.Boot, e.New
		}
		return false
	}
	if p == nil {
		p = t.add(e.Peer)
		t.places.move(p, e.Old)
	}
	if e.Boot <= p.boot {
		// Known from the map already, or two CPUs put theirs into the ring in the
		// other order.
		return false
	}
	p.boot = e.Boot
	if e.New == p.endpoint {
		// The other one of two packets that brought the same news. It proves
		// them if it cannot be a replay.
		if p.pending != nil && e.Cause.Observed() && e.Cause != wgroam.CauseInitiation {
			t.prove(p)
		}
		return true
	}
	old := p.endpoint
	t.places.move(p, e.New)
	t.status.Events++
	t.tell(p, wgroam.Observation{
		Peer: e.Peer, Old: old, New: e.New, Cause: e.Cause,
		At: now.Add(e.Boot - boot),
	})
	if p.pending != nil && p.confirmedAt == e.New && p.confirmed > e.Boot {
		t.prove(p)
	}
	return true
}

func (t *Tracker) completed(peer wgroam.Key) {
	if t.cfg.Completed != nil {
		t.cfg.Completed(peer)
	}
}

// settled notes where the device has a peer that has stood still for a while
// since its last event.
func (t *Tracker) settled(last bpf.Event, at netip.AddrPort, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if p := t.peers[last.Peer]; !ok || p == nil || p.endpoint != at {
		t.wantDump()
	}
}

// lost notes that events are missing, for the first time since the newest of
// each peer have been recovered, or once more.
func (t *Tracker) lost(first bool) {
	// It has what cannot be recovered, such as confirmations.
	t.wantDump()
	if !first {
		return
	}
	t.cfg.Log.Warn("the kernel had more endpoint changes than the ring buffer could hold; taking the newest of each peer")
}

// hookBreaks notes that the hook does not work any more.
func (t *Tracker) hookBreaks(err error) {
	t.mu.Lock()
	t.hookErr = err
	t.mu.Unlock()
	t.wakeBroken()
}

// wakeBroken has Run look for a rung that broke.
func (t *Tracker) wakeBroken() {
	select {
	case t.broken <- struct{}{}:
	default:
	}
}

// Refresh asks for a dump of the device, as soon as the others leave time for it:
// without the hook, nothing tells of peers that are added without an endpoint.
func (t *Tracker) Refresh() { t.wantDump() }

// Sync waits until all is told that the device had accepted before the call, as far as
// it can be known by now. It reports whether that is all: at the UDP port it is told of a
// packet that the device may have yet to take. Run must be running, or Sync waits for ctx.
func (t *Tracker) Sync(ctx context.Context) (all bool) {
	answer := make(chan bool, 1)
	select {
	case t.asked <- answer:
	case <-ctx.Done():
		return false
	}
	select {
	case all = <-answer:
	case <-ctx.Done():
	}
	return all
}

// catchUp is Sync for Run. due tells whether a dump waits for its time.
func (t *Tracker) catchUp(ctx context.Context, due bool) (all bool, err error) {
	done, err := t.barrier(ctx)
	if err != nil || hooked(t.Status().Rung) {
		return done, err
	}
	t.mu.Lock()
	wanted := due || len(t.resync) > 0 || t.hinted > t.dumped-late
	t.mu.Unlock()
	if _, why := t.interval(); !wanted && why != dumpPoll {
		return done, nil
	}
	if err := t.dump(ctx, dumpResync); err != nil {
		return false, err
	}
	return done && len(t.resync) == 0, nil
}

func (t *Tracker) wantDump() {
	select {
	case t.resync <- struct{}{}:
	default:
	}
}

// tell is called with t.mu held, so that dumps and events of a peer are told in
// the order in which they were put.
func (t *Tracker) tell(p *peer, o wgroam.Observation) {
	t.cfg.View.Set(o.Peer, wgroam.Holding{Endpoint: o.New, Cause: o.Cause, At: o.At})
	t.cfg.Changed(o)
	p.drop()
	switch {
	case o.Cause == wgroam.CauseInitiation:
		p.pending = &o
	case o.Cause.Observed():
		t.cfg.Proven(o)
	}
}

// drop forgets what was not proven. Nor is it proven then that the newest session has
// been completed: the peer may use the one before, of which hints were heard or not.
func (p *peer) drop() {
	if p.pending != nil {
		p.pending, p.heard = nil, false
	}
}

func (t *Tracker) prove(p *peer) {
	o := *p.pending
	p.pending = nil
	t.cfg.Proven(o)
}

type dumpReason int

const (
	dumpStart dumpReason = iota
	dumpResync
	dumpPoll
	dumpSweep
)

// dump reads the device, and all events from before that.
func (t *Tracker) dump(ctx context.Context, why dumpReason) error {
	suppressed, err := t.suppressed()
	if err != nil {
		return err
	}
	start, err := bootTime()
	if err != nil {
		return err
	}
	now := time.Now()
	d, err := t.cfg.WG.Device(t.cfg.Device)
	t.pace.did(now, time.Now())
	if err != nil {
		return err
	}
	// An event from before the dump that still waits would look like a miss.
	done, err := t.barrier(ctx)
	if err != nil {
		return err
	}
	if !done && why == dumpSweep {
		why = dumpResync
	}
	t.ladder.saw(d)
	t.hush(suppressed)
	// The device may have another port since the program was told of one.
	tap := t.ladder.tap
	blind := tap == nil || tap.port != t.ladder.port || tap.unwatched() != nil
	t.mu.Lock()
	t.blind = blind
	t.mu.Unlock()
	return t.take(d, why, start, now)
}

// take takes over what differs in a dump, which began at start and now.
func (t *Tracker) take(d wg.Device, why dumpReason, start time.Duration, now time.Time) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.key == (wgroam.Key{}) {
		t.key = d.PublicKey
	}
	if t.key != d.PublicKey {
		return fmt.Errorf("%w: %s", ErrRekeyed, t.cfg.Device)
	}
	if why == dumpResync {
		t.status.Resyncs++
	}
	t.dumped = max(t.dumped, start)
	onPort := t.status.Rung == RungPort
	// The View is the first to know of the applier's writes.
	unhooked := onPort || t.status.Rung == RungPolling
	// later: what the next dump will know.
	later := onPort && t.hinted > start-late
	present := make(map[wgroam.Key]bool, len(d.Peers))
	for _, dp := range d.Peers {
		present[dp.Key] = true
		if t.cfg.Alive != nil && dp.Endpoint.IsValid() && !dp.LastHandshake.IsZero() {
			t.cfg.Alive(dp.Key, dp.Endpoint, dp.LastHandshake)
		}
		p, known := t.peers[dp.Key]
		if !known {
			p = t.add(dp.Key)
		}
		if dp.Received < p.received {
			p.received, p.earlier = 0, 0 // removed and added again
		}
		spoke := dp.Received > p.received
		if p.pending != nil && p.pending.New == dp.Endpoint && dp.LastHandshake.After(p.pending.At) {
			// The confirmation was lost.
			t.prove(p)
		}
		if known && (p.boot >= start || !onPort && p.boot >= start-settle) {
			// An event came while the device was being read, or so shortly
			// before that the kernel may not have acted on it: it is newer.
			p.earlier, p.received = p.received, dp.Received
			continue
		}
		held, seen := t.cfg.View.Get(dp.Key)
		moved := dp.Endpoint != p.endpoint || !seen
		begun := dp.Endpoint.IsValid() && dp.Endpoint == p.begun
		if moved && (spoke || begun) && dp.LastHandshake.IsZero() && held.Endpoint != dp.Endpoint {
			// In the middle of the first handshake, or of one that was replayed
			// and will not be completed. The next dump knows. The bytes explain nothing
			// else.
			p.begun, p.earlier, p.received = dp.Endpoint, dp.Received, dp.Received
			if !seen {
				t.cfg.View.Set(dp.Key, wgroam.Holding{})
			}
			if why == dumpStart {
				t.wantDump()
			}
			continue
		}
		received, earlier := p.received, p.earlier
		p.earlier, p.received = p.received, dp.Received
		if !known {
			p.earlier = dp.Received // there is no dump before the first
		}
		if seen && held.Endpoint == dp.Endpoint {
			// Nothing new, or what the applier has just written: with polling,
			// the View is the first to know.
			if moved {
				p.since = start
			}
			if p.told {
				p.earlier, p.told = p.received, false
			}
			p.unexplained = netip.AddrPort{}
			if p.pending != nil && p.pending.New != dp.Endpoint {
				p.drop()
			}
			t.places.move(p, dp.Endpoint)
			continue
		}
		if seen && (!moved || unhooked) && held.Cause == wgroam.CauseConfig && now.Sub(held.At) < settle {
			// The applier has announced a write, maybe since the dump. The next
			// dump knows, and what the peer has said may explain it.
			later = true
			if moved {
				p.received, p.earlier = received, earlier
			}
			continue
		}
		if seen && !moved {
			if spoke && unhooked && !dp.LastHandshake.IsZero() {
				// The write has happened, and the peer has spoken from its old
				// place since.
				t.status.Events++
				t.tell(p, wgroam.Observation{
					Peer: dp.Key, Old: held.Endpoint, New: dp.Endpoint, Cause: wgroam.CauseData, At: now,
				})
				continue
			}
			// The View knows of a write that has not happened.
			t.cfg.View.Set(dp.Key, wgroam.Holding{Endpoint: dp.Endpoint, Cause: wgroam.CauseConfig, At: now})
			continue
		}
		if unhooked {
			// wireguard-go tells the endpoint before it counts the bytes (device/uapi.go,
			// IpcGetOperation), so that the last dump may have had those of
			// the packet that brought this endpoint.
			spoke = dp.Received > earlier
		}
		spoke = spoke || begun
		at, since := now, start
		if onPort && known {
			spoke, since = t.explained(p, dp.Endpoint, spoke, start)
			at = now.Add(since - start)
		}
		if unhooked && why != dumpStart && !spoke {
			// WireGuard takes the endpoint of a packet before it counts its bytes
			// (receive.c, wg_packet_consume_data_done), or answers a handshake. A later
			// dump knows; the next one may be too soon.
			if p.unexplained != dp.Endpoint {
				p.unexplained, p.unexplainedAt = dp.Endpoint, start
			}
			if start-p.unexplainedAt < late {
				later = true
				continue
			}
		}
		o := wgroam.Observation{Peer: dp.Key, Old: p.endpoint, New: dp.Endpoint}
		t.places.move(p, dp.Endpoint)
		p.since, p.begun, p.unexplained, p.told = since, netip.AddrPort{}, netip.AddrPort{}, false
		switch {
		case !dp.Endpoint.IsValid():
			// A peer without an endpoint: new, or removed and added again.
			t.cfg.View.Set(dp.Key, wgroam.Holding{})
			continue
		case !known && !dp.LastHandshake.IsZero():
			// A peer that has completed a handshake was there at that time, if
			// not later; a restart on live sessions loses nothing.
			o.Cause, o.At = wgroam.CauseSnapshot, dp.LastHandshake
		case spoke:
			// Its packets arrived since the last dump, and the endpoint is
			// another: they brought it, and no other.
			o.Cause, o.At = wgroam.CauseData, at
			p.earlier = p.received
		default:
			o.Cause, o.At = wgroam.CauseConfig, now
		}
		if why == dumpStart && o.Cause == wgroam.CauseConfig {
			// It was there before us: not a change, nor an observation.
			t.cfg.View.Set(dp.Key, wgroam.Holding{Endpoint: o.New, Cause: o.Cause, At: now})
			continue
		}
		if known {
			t.status.Events++
			// A dump that is wanted would have found it, too.
			if why == dumpSweep && (!onPort || o.Cause.Observed()) && len(t.resync) == 0 {
				t.status.SweepRepairs++
			}
		}
		t.tell(p, o)
	}
	for k, p := range t.peers {
		switch {
		case present[k]:
			p.missing = false
		case p.boot >= start:
			// Added meanwhile.
		case !p.missing:
			// Gone, or behind a peer that was removed during the dump: the kernel
			// ends it there (netlink.c, wg_get_device_dump), and wgctrl does not
			// say so. The next dump knows.
			p.missing = true
			t.wantDump()
		default:
			t.places.move(p, netip.AddrPort{})
			delete(t.peers, k)
			if onPort {
				t.sessions.forget(k)
			}
		}
	}
	if onPort {
		t.nameAgain()
	}
	if onPort && later {
		t.wantDump()
	}
	t.cfg.View.Keep(func(k wgroam.Key) bool { return t.peers[k] != nil })
	return nil
}
