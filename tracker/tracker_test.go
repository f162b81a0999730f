// SPDX-License-Identifier: MIT

package tracker

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.uber.org/goleak"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/bpf"
	"github.com/wgroam/wgroam/internal/wg"
)

// TestMain closes the shared hook before it looks for goroutines.
func TestMain(m *testing.M) {
	goleak.VerifyTestMain(closing{m})
}

type closing struct{ m *testing.M }

func (c closing) Run() int {
	status := c.m.Run()
	for _, kernel := range shared {
		if err := kernel.Close(); err != nil {
			fmt.Fprintln(os.Stderr, "close the hook:", err)
			status = 1
		}
	}
	return status
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

var (
	alice = wgroam.Key{1}
	bob   = wgroam.Key{2}
	none  netip.AddrPort
)

// at is one of a few endpoints.
func at(n int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(n)}), 51820)
}

// fed is a tracker that a test feeds with events and dumps, and what it says.
// Times are milliseconds after its start.
type fed struct {
	*Tracker
	t       testing.TB
	boot    time.Duration
	wall    time.Time
	changed []wgroam.Observation
	proven  []wgroam.Observation
}

func newFed(t testing.TB, rung Rung) *fed {
	t.Helper()
	boot, err := bootTime()
	if err != nil {
		t.Fatal(err)
	}
	f := &fed{t: t, boot: boot, wall: time.Now()}
	f.Tracker = New(Config{
		Device: "wg0", Kernel: &Kernel{}, Port: &Port{}, View: wgroam.NewView(), Log: quiet(),
		Changed: func(o wgroam.Observation) { f.changed = append(f.changed, o) },
		Proven:  func(o wgroam.Observation) { f.proven = append(f.proven, o) },
	})
	f.status.Rung = rung
	f.sessions = newSessions()
	return f
}

// hooked feeds what the hook says at a time.
func (f *fed) hooked(ms int, peer wgroam.Key, from, to netip.AddrPort, cause wgroam.Cause) {
	f.event(bpf.Event{Peer: peer, Old: from, New: to, Cause: cause, Boot: f.boot + time.Duration(ms)*time.Millisecond})
}

func (f *fed) confirmed(ms int, peer wgroam.Key, at netip.AddrPort) {
	f.event(bpf.Event{Peer: peer, New: at, Confirmed: true, Boot: f.boot + time.Duration(ms)*time.Millisecond})
}

// dumped feeds a dump that began at a time.
func (f *fed) dumped(ms int, why dumpReason, peers ...wg.Peer) {
	f.t.Helper()
	d := time.Duration(ms) * time.Millisecond
	if err := f.take(wg.Device{Name: "wg0", Kernel: true, PublicKey: wgroam.Key{9}, Peers: peers}, why, f.boot+d, f.wall.Add(d)); err != nil {
		f.t.Fatal(err)
	}
}

// said is what has been said of a peer: from, to, and why.
type said struct {
	Peer     wgroam.Key
	Old, New netip.AddrPort
	Cause    wgroam.Cause
}

func say(list []wgroam.Observation) []said {
	var out []said
	for _, o := range list {
		out = append(out, said{o.Peer, o.Old, o.New, o.Cause})
	}
	return out
}

var opts = cmp.Options{cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }), cmpopts.EquateEmpty()}

// want compares all that has been said since the last call.
func (f *fed) want(changed, proven []said) {
	f.t.Helper()
	if diff := cmp.Diff(changed, say(f.changed), opts); diff != "" {
		f.t.Errorf("changed (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(proven, say(f.proven), opts); diff != "" {
		f.t.Errorf("proven (-want +got):\n%s", diff)
	}
	f.changed, f.proven = nil, nil
}

// wantsDump reports, once, whether the tracker wants to read the device.
func (f *fed) wantsDump() bool {
	select {
	case <-f.resync:
		return true
	default:
		return false
	}
}

func (f *fed) holds(peer wgroam.Key, ep netip.AddrPort, cause wgroam.Cause) {
	f.t.Helper()
	h, ok := f.cfg.View.Get(peer)
	if !ok || h.Endpoint != ep || h.Cause != cause {
		f.t.Errorf("the view has %+v (%v), want %v by %v", h, ok, ep, cause)
	}
}

func TestEvents(t *testing.T) {
	f := newFed(t, RungFentry)
	f.dumped(0, dumpStart, wg.Peer{Key: alice})
	f.hooked(10, alice, none, at(1), wgroam.CauseData)
	f.hooked(20, alice, at(1), at(2), wgroam.CauseResponse)
	f.hooked(30, alice, at(2), at(3), wgroam.CauseConfig)
	f.hooked(40, bob, at(8), at(9), wgroam.CauseData) // added since the dump
	all := []said{
		{alice, none, at(1), wgroam.CauseData}, {alice, at(1), at(2), wgroam.CauseResponse},
		{alice, at(2), at(3), wgroam.CauseConfig}, {bob, at(8), at(9), wgroam.CauseData},
	}
	for i, o := range f.changed {
		want := f.wall.Add(time.Duration(10*i+10) * time.Millisecond)
		if d := o.At.Sub(want).Abs(); d > time.Second { // two clocks are read, one after the other
			t.Errorf("observation %d is of %v, want %v", i, o.At, want)
		}
	}
	f.want(all, []said{all[0], all[1], all[3]})
	f.holds(alice, at(3), wgroam.CauseConfig)
	f.holds(bob, at(9), wgroam.CauseData)
	if f.wantsDump() {
		t.Error("wants a dump although all is in order")
	}
	if s := f.Status(); s.Events != 4 || s.Resyncs != 0 {
		t.Errorf("status %+v", s)
	}
}

// TestDisorder: what the hook says can come twice, late, or with a gap.
func TestDisorder(t *testing.T) {
	first := said{alice, none, at(1), wgroam.CauseData}
	tests := map[string]struct {
		feed func(*fed)
		want []said // after the first
		ep   netip.AddrPort
	}{
		"the same again": {
			feed: func(f *fed) { f.hooked(10, alice, none, at(1), wgroam.CauseData) },
			ep:   at(1),
		},
		"an older one": {
			feed: func(f *fed) { f.hooked(5, alice, none, at(7), wgroam.CauseData) },
			ep:   at(1),
		},
		"another one of the same time": {
			feed: func(f *fed) { f.hooked(10, alice, none, at(7), wgroam.CauseData) },
			ep:   at(1),
		},
		"one does not follow": {
			feed: func(f *fed) { f.hooked(20, alice, at(5), at(6), wgroam.CauseData) },
			want: []said{{alice, at(1), at(6), wgroam.CauseData}},
			ep:   at(6),
		},
		"two packets from the same new place": {
			feed: func(f *fed) {
				f.hooked(20, alice, at(1), at(2), wgroam.CauseData)
				f.hooked(21, alice, at(1), at(2), wgroam.CauseData)
			},
			want: []said{{alice, at(1), at(2), wgroam.CauseData}},
			ep:   at(2),
		},
		"there and back": {
			feed: func(f *fed) {
				f.hooked(20, alice, at(1), at(2), wgroam.CauseData)
				f.hooked(21, alice, at(2), at(1), wgroam.CauseData)
			},
			want: []said{{alice, at(1), at(2), wgroam.CauseData}, {alice, at(2), at(1), wgroam.CauseData}},
			ep:   at(1),
		},
		"another scope of the same address": {
			feed: func(f *fed) { f.hooked(20, alice, at(1), at(1), wgroam.CauseData) },
			ep:   at(1),
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			f := newFed(t, RungFentry)
			f.dumped(0, dumpStart, wg.Peer{Key: alice})
			f.hooked(10, alice, none, at(1), wgroam.CauseData)
			test.feed(f)
			want := append([]said{first}, test.want...)
			f.want(want, want)
			f.holds(alice, test.ep, wgroam.CauseData)
			if f.wantsDump() {
				t.Error("wants a dump, and has yet to hear where the peer has settled")
			}
			for at, dump := range map[netip.AddrPort]bool{test.ep: false, at(99): true} {
				f.settled(bpf.Event{Peer: alice}, at, true)
				if got := f.wantsDump(); got != dump {
					t.Errorf("settled at %v: wants a dump: %v, want %v", at, got, dump)
				}
			}
			f.settled(bpf.Event{Peer: alice}, test.ep, false)
			if !f.wantsDump() {
				t.Error("settled who knows where: wants no dump")
			}
		})
	}
}

// TestProof: a handshake initiation is evidence when the handshake has been
// completed, or when a packet that cannot be a replay came from the same place.
func TestProof(t *testing.T) {
	moved := said{alice, at(1), at(2), wgroam.CauseInitiation}
	tests := map[string]struct {
		feed    func(*fed)
		changed []said // after the move
		proven  []said
	}{
		"no end": {feed: func(*fed) {}},
		"the end": {
			feed:   func(f *fed) { f.confirmed(20, alice, at(2)) },
			proven: []said{moved},
		},
		"the end, twice": {
			feed:   func(f *fed) { f.confirmed(20, alice, at(2)); f.confirmed(30, alice, at(2)) },
			proven: []said{moved},
		},
		"the end of another handshake": {feed: func(f *fed) { f.confirmed(20, alice, at(1)) }},
		"the end of another peer's":    {feed: func(f *fed) { f.confirmed(20, bob, at(2)) }},
		"the peer is elsewhere": {
			feed: func(f *fed) {
				f.hooked(20, alice, at(2), at(3), wgroam.CauseData)
				f.confirmed(30, alice, at(3))
				f.confirmed(40, alice, at(2))
			},
			changed: []said{{alice, at(2), at(3), wgroam.CauseData}},
			proven:  []said{{alice, at(2), at(3), wgroam.CauseData}},
		},
		"somebody configures another endpoint": {
			feed: func(f *fed) {
				f.hooked(20, alice, at(2), at(3), wgroam.CauseConfig)
				f.confirmed(30, alice, at(2))
			},
			changed: []said{{alice, at(2), at(3), wgroam.CauseConfig}},
		},
		"a data packet from there ran beside it": {
			feed:   func(f *fed) { f.hooked(11, alice, at(1), at(2), wgroam.CauseData) },
			proven: []said{moved},
		},
		"the applier wrote the same beside it": {
			feed: func(f *fed) { f.hooked(11, alice, at(1), at(2), wgroam.CauseConfig) },
		},
		"a dump shows the end": {
			feed: func(f *fed) {
				f.dumped(500, dumpResync, wg.Peer{Key: alice, Endpoint: at(2), LastHandshake: f.wall.Add(20 * time.Millisecond)})
			},
			proven: []said{moved},
		},
		"a dump shows an older handshake": {
			feed: func(f *fed) {
				f.dumped(500, dumpResync, wg.Peer{Key: alice, Endpoint: at(2), LastHandshake: f.wall.Add(-time.Second)})
			},
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			f := newFed(t, RungFentry)
			f.dumped(0, dumpStart, wg.Peer{Key: alice, Endpoint: at(1)})
			f.hooked(10, alice, at(1), at(2), wgroam.CauseInitiation)
			f.want([]said{moved}, nil)
			test.feed(f)
			f.want(test.changed, test.proven)
		})
	}
}

// TestLateProof: the end of a handshake is told, and the beginning was held back.
func TestLateProof(t *testing.T) {
	moved := said{alice, at(1), at(2), wgroam.CauseInitiation}
	for name, test := range map[string]struct {
		ms     int // of the end
		at     netip.AddrPort
		proven []said
	}{
		"its end":          {20, at(2), []said{moved}},
		"one before":       {9, at(2), nil},
		"one at elsewhere": {20, at(3), nil},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFed(t, RungFentry)
			f.dumped(0, dumpStart, wg.Peer{Key: alice, Endpoint: at(1)})
			f.confirmed(test.ms, alice, test.at)
			f.hooked(10, alice, at(1), at(2), wgroam.CauseInitiation)
			f.want([]said{moved}, test.proven)
			if f.wantsDump() {
				t.Error("wants a dump")
			}
		})
	}
	f := newFed(t, RungFentry)
	f.confirmed(10, bob, at(1))
	if !f.wantsDump() {
		t.Error("a peer that nothing was heard of is no reason for a dump")
	}
}

// TestStartOn: what is found in a device at the start.
func TestStartOn(t *testing.T) {
	for _, rung := range []Rung{RungFentry, RungPolling} {
		t.Run(string(rung), func(t *testing.T) {
			f := newFed(t, rung)
			seen := f.wall.Add(-time.Minute)
			f.dumped(0, dumpStart,
				wg.Peer{Key: alice, Endpoint: at(1), LastHandshake: seen, Received: 500},
				wg.Peer{Key: bob, Endpoint: at(2)},
				wg.Peer{Key: wgroam.Key{3}},
			)
			if len(f.proven) == 1 && !f.proven[0].At.Equal(seen) {
				t.Errorf("observed at %v, want the handshake's %v", f.proven[0].At, seen)
			}
			live := []said{{alice, none, at(1), wgroam.CauseSnapshot}}
			f.want(live, live)
			f.holds(alice, at(1), wgroam.CauseSnapshot)
			f.holds(bob, at(2), wgroam.CauseConfig)
			f.holds(wgroam.Key{3}, none, 0)
			if s := f.Status(); s.Events != 0 || s.Resyncs != 0 {
				t.Errorf("status %+v", s)
			}
		})
	}
}

// TestDump: what a dump says against what the hook has said.
func TestDump(t *testing.T) {
	tests := map[string]struct {
		feed    func(*fed)
		changed []said
		ep      netip.AddrPort
		cause   wgroam.Cause
		repairs uint64
	}{
		"nothing new": {
			feed: func(f *fed) { f.dumped(1000, dumpSweep, wg.Peer{Key: alice, Endpoint: at(1)}) },
			ep:   at(1), cause: wgroam.CauseData,
		},
		"an event came while the device was read": {
			feed: func(f *fed) {
				f.hooked(1001, alice, at(1), at(2), wgroam.CauseData)
				f.dumped(1000, dumpSweep, wg.Peer{Key: alice, Endpoint: at(1)})
			},
			changed: []said{{alice, at(1), at(2), wgroam.CauseData}},
			ep:      at(2), cause: wgroam.CauseData,
		},
		"the hook has spoken, the kernel has yet to write": {
			feed: func(f *fed) {
				f.hooked(999, alice, at(1), at(2), wgroam.CauseData)
				f.dumped(1000, dumpSweep, wg.Peer{Key: alice, Endpoint: at(1)})
			},
			changed: []said{{alice, at(1), at(2), wgroam.CauseData}},
			ep:      at(2), cause: wgroam.CauseData,
		},
		"an event is missing": {
			feed: func(f *fed) {
				f.dumped(1000, dumpResync, wg.Peer{Key: alice, Endpoint: at(2), LastHandshake: f.wall, Received: 7})
			},
			changed: []said{{alice, at(1), at(2), wgroam.CauseData}},
			ep:      at(2), cause: wgroam.CauseData,
		},
		"an event is missing, and nothing says so": {
			feed: func(f *fed) {
				f.dumped(1000, dumpSweep, wg.Peer{Key: alice, Endpoint: at(2), LastHandshake: f.wall, Received: 7})
			},
			changed: []said{{alice, at(1), at(2), wgroam.CauseData}},
			ep:      at(2), cause: wgroam.CauseData, repairs: 1,
		},
		"an event is missing, and the sweep comes before the dump that is wanted": {
			feed: func(f *fed) {
				f.hooked(500, alice, at(1), at(3), wgroam.CauseData)
				f.settled(bpf.Event{Peer: alice}, at(2), true)
				f.dumped(1000, dumpSweep, wg.Peer{Key: alice, Endpoint: at(2), LastHandshake: f.wall, Received: 7})
			},
			changed: []said{{alice, at(1), at(3), wgroam.CauseData}, {alice, at(3), at(2), wgroam.CauseData}},
			ep:      at(2), cause: wgroam.CauseData,
		},
		"a peer that has not said a word": {
			feed:    func(f *fed) { f.dumped(1000, dumpResync, wg.Peer{Key: alice, Endpoint: at(2)}) },
			changed: []said{{alice, at(1), at(2), wgroam.CauseConfig}},
			ep:      at(2), cause: wgroam.CauseConfig,
		},
		"removed and added again": {
			feed: func(f *fed) { f.dumped(1000, dumpSweep, wg.Peer{Key: alice}) },
			ep:   none,
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			f := newFed(t, RungFentry)
			f.dumped(0, dumpStart, wg.Peer{Key: alice})
			f.hooked(10, alice, none, at(1), wgroam.CauseData)
			f.changed, f.proven = nil, nil
			test.feed(f)
			var proven []said
			for _, s := range test.changed {
				if s.Cause.Observed() {
					proven = append(proven, s)
				}
			}
			f.want(test.changed, proven)
			f.holds(alice, test.ep, test.cause)
			if got := f.Status().SweepRepairs; got != test.repairs {
				t.Errorf("%d repairs, want %d", got, test.repairs)
			}
		})
	}
}

// TestPeersComeAndGo: a peer that is added while the device is being read is not
// in the dump, and a dump that is interrupted lacks peers that are there.
func TestPeersComeAndGo(t *testing.T) {
	f := newFed(t, RungFentry)
	a := wg.Peer{Key: alice, Endpoint: at(1), LastHandshake: f.wall, Received: 1}
	b := wg.Peer{Key: bob, Endpoint: at(2), LastHandshake: f.wall, Received: 1}
	f.dumped(0, dumpStart, a)
	f.changed, f.proven = nil, nil

	f.hooked(1001, bob, none, at(2), wgroam.CauseData)
	f.dumped(1000, dumpSweep, a)
	f.holds(bob, at(2), wgroam.CauseData)
	news := []said{{bob, none, at(2), wgroam.CauseData}}
	f.want(news, news)
	if f.wantsDump() {
		t.Error("wants a dump although nothing is missing")
	}

	// The kernel ends a dump at a peer that was removed meanwhile (netlink.c,
	// wg_get_device_dump).
	f.dumped(2000, dumpSweep, a)
	f.holds(bob, at(2), wgroam.CauseData)
	if !f.wantsDump() {
		t.Error("believes a single dump that lacks a peer")
	}
	f.dumped(2200, dumpResync, a, b)
	f.want(nil, nil)
	f.holds(bob, at(2), wgroam.CauseData)

	// Gone.
	f.dumped(3000, dumpSweep, a)
	f.dumped(3200, dumpResync, a)
	if _, ok := f.cfg.View.Get(bob); ok {
		t.Error("the view has a peer that is gone")
	}
	f.want(nil, nil)

	// And here again, where it was.
	f.hooked(4000, bob, none, at(2), wgroam.CauseConfig)
	again := []said{{bob, none, at(2), wgroam.CauseConfig}}
	f.want(again, nil)
}

// TestOldNewest: after a loss, the newest event of each peer is delivered again,
// also of those that are gone, and of what has the key of a peer but is older.
func TestOldNewest(t *testing.T) {
	f := newFed(t, RungFentry)
	f.dumped(1000, dumpStart, wg.Peer{Key: alice, Endpoint: at(1)})
	f.event(bpf.Event{Peer: bob, New: at(2), Cause: wgroam.CauseData, Boot: f.boot})
	f.event(bpf.Event{Peer: alice, Old: at(1), New: at(2), Cause: wgroam.CauseData, Boot: f.boot})
	f.want(nil, nil)
	f.holds(alice, at(1), wgroam.CauseConfig)
	if _, ok := f.cfg.View.Get(bob); ok {
		t.Error("the view has a peer that is gone")
	}
	// What was lost is news.
	f.event(bpf.Event{Peer: alice, Old: at(1), New: at(3), Cause: wgroam.CauseData, Boot: f.boot + 2*time.Second})
	news := []said{{alice, at(1), at(3), wgroam.CauseData}}
	f.want(news, news)
}

// TestPolling: what one dump after the other says.
func TestPolling(t *testing.T) {
	peer := func(ep netip.AddrPort, received int64) wg.Peer {
		return wg.Peer{Key: alice, Endpoint: ep, LastHandshake: time.Now().Add(-time.Minute), Received: received}
	}
	// note is what the applier does before it writes.
	note := func(f *fed, ms int, ep netip.AddrPort) {
		f.cfg.View.Set(alice, wgroam.Holding{
			Endpoint: ep, Cause: wgroam.CauseConfig, At: f.wall.Add(time.Duration(ms) * time.Millisecond),
		})
	}
	tests := map[string]struct {
		feed    func(*fed)
		changed []said
		ep      netip.AddrPort
		cause   wgroam.Cause
	}{
		"a roam": {
			feed:    func(f *fed) { f.dumped(1000, dumpPoll, peer(at(2), 200)) },
			changed: []said{{alice, at(1), at(2), wgroam.CauseData}},
			ep:      at(2), cause: wgroam.CauseData,
		},
		"a roam whose bytes are yet to be counted": {
			feed: func(f *fed) {
				f.dumped(1000, dumpPoll, peer(at(2), 100))
				f.dumped(2000, dumpPoll, peer(at(2), 200))
			},
			changed: []said{{alice, at(1), at(2), wgroam.CauseData}},
			ep:      at(2), cause: wgroam.CauseData,
		},
		"a roam whose bytes were counted before the endpoint was read": {
			feed: func(f *fed) {
				f.dumped(1000, dumpPoll, peer(at(1), 200))
				f.dumped(2000, dumpPoll, peer(at(2), 200))
			},
			changed: []said{{alice, at(1), at(2), wgroam.CauseData}},
			ep:      at(2), cause: wgroam.CauseData,
		},
		"a roam of a peer that was removed and added again": {
			feed:    func(f *fed) { f.dumped(1000, dumpPoll, peer(at(2), 50)) },
			changed: []said{{alice, at(1), at(2), wgroam.CauseData}},
			ep:      at(2), cause: wgroam.CauseData,
		},
		"configuration long after the peer spoke": {
			feed: func(f *fed) {
				f.dumped(1000, dumpPoll, peer(at(1), 200))
				f.dumped(2000, dumpPoll, peer(at(1), 200))
				f.dumped(3000, dumpPoll, peer(at(2), 200))
				f.dumped(4000, dumpPoll, peer(at(2), 200))
			},
			changed: []said{{alice, at(1), at(2), wgroam.CauseConfig}},
			ep:      at(2), cause: wgroam.CauseConfig,
		},
		"configuration": {
			feed: func(f *fed) {
				f.dumped(1000, dumpPoll, peer(at(2), 100))
				f.dumped(2000, dumpPoll, peer(at(2), 100))
			},
			changed: []said{{alice, at(1), at(2), wgroam.CauseConfig}},
			ep:      at(2), cause: wgroam.CauseConfig,
		},
		"the applier's write": {
			feed: func(f *fed) {
				note(f, 900, at(2))
				f.dumped(1000, dumpPoll, peer(at(2), 200))
				f.dumped(2000, dumpPoll, peer(at(2), 300))
			},
			ep: at(2), cause: wgroam.CauseConfig,
		},
		"the applier's write while the device is read": {
			feed: func(f *fed) {
				note(f, 1001, at(2))
				f.dumped(1000, dumpPoll, peer(at(1), 200))
				f.dumped(2000, dumpPoll, peer(at(2), 300))
			},
			ep: at(2), cause: wgroam.CauseConfig,
		},
		"the applier writes twice while the device is read": {
			feed: func(f *fed) {
				note(f, 1001, at(2))
				note(f, 1002, at(3))
				f.dumped(1000, dumpPoll, peer(at(2), 200))
				f.dumped(2000, dumpPoll, peer(at(3), 300))
			},
			ep: at(3), cause: wgroam.CauseConfig,
		},
		"the applier's write, and a roam at once": {
			feed: func(f *fed) {
				note(f, 990, at(2))
				f.dumped(1000, dumpPoll, peer(at(3), 200))
				f.dumped(2000, dumpPoll, peer(at(3), 200))
			},
			changed: []said{{alice, at(1), at(3), wgroam.CauseData}},
			ep:      at(3), cause: wgroam.CauseData,
		},
		"the applier has yet to write": {
			feed: func(f *fed) {
				note(f, 999, at(2))
				f.dumped(1000, dumpPoll, peer(at(1), 200))
				f.dumped(2000, dumpPoll, peer(at(2), 300))
			},
			ep: at(2), cause: wgroam.CauseConfig,
		},
		"the applier's write, and the peer comes back": {
			feed: func(f *fed) {
				note(f, 300, at(2))
				f.dumped(1000, dumpPoll, peer(at(1), 200))
			},
			changed: []said{{alice, at(2), at(1), wgroam.CauseData}},
			ep:      at(1), cause: wgroam.CauseData,
		},
		"the applier's write was of no effect": {
			feed: func(f *fed) {
				note(f, 300, at(2))
				f.dumped(1000, dumpPoll, peer(at(1), 100))
			},
			ep: at(1), cause: wgroam.CauseConfig,
		},
		"the applier's write, and a roam": {
			feed: func(f *fed) {
				note(f, 300, at(2))
				f.dumped(1000, dumpPoll, peer(at(3), 200))
			},
			changed: []said{{alice, at(1), at(3), wgroam.CauseData}},
			ep:      at(3), cause: wgroam.CauseData,
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			f := newFed(t, RungPolling)
			f.dumped(0, dumpStart, peer(at(1), 100))
			f.changed, f.proven = nil, nil
			test.feed(f)
			var proven []said
			for _, s := range test.changed {
				if s.Cause.Observed() {
					proven = append(proven, s)
				}
			}
			f.want(test.changed, proven)
			f.holds(alice, test.ep, test.cause)
			if s := f.Status(); s.SweepRepairs != 0 {
				t.Errorf("polling counts %d repairs", s.SweepRepairs)
			}
		})
	}
}

// TestRekeyedDump: a device with another key is another group's. One that gets
// its first key is not.
// TestPollingReplay: a handshake that is not completed is no reason, however long
// it stays so.
func TestPollingReplay(t *testing.T) {
	for _, rung := range []Rung{RungFentry, RungPort, RungPolling} {
		f := newFed(t, rung)
		seen := func(ep int, received int64, handshake time.Time) wg.Peer {
			return wg.Peer{Key: alice, Endpoint: at(ep), Received: received, LastHandshake: handshake}
		}
		f.dumped(0, dumpStart, seen(1, 0, time.Time{}))
		for ms := 1000; ms < 5000; ms += 1000 {
			f.dumped(ms, dumpResync, seen(2, 148, time.Time{}))
		}
		f.want(nil, nil)
		f.dumped(5000, dumpResync, seen(2, 148, f.wall.Add(4500*time.Millisecond)))
		f.dumped(6000, dumpResync, seen(2, 148, f.wall.Add(4500*time.Millisecond)))
		roam := []said{{alice, at(1), at(2), wgroam.CauseData}}
		f.want(roam, roam)
	}
}

func TestRekeyedDump(t *testing.T) {
	f := newFed(t, RungPolling)
	for _, key := range []wgroam.Key{{}, {1}, {1}} {
		if err := f.take(wg.Device{PublicKey: key}, dumpSweep, f.boot, f.wall); err != nil {
			t.Errorf("key %v: %v", key, err)
		}
	}
	for _, key := range []wgroam.Key{{}, {2}} {
		if err := f.take(wg.Device{PublicKey: key}, dumpSweep, f.boot, f.wall); !errors.Is(err, ErrRekeyed) {
			t.Errorf("key %v: %v, want %v", key, err, ErrRekeyed)
		}
	}
}

// TestKernelUnused: a Kernel that nobody has used.
func TestKernelUnused(t *testing.T) {
	var k Kernel
	if done, err := k.barrier(t.Context()); !done || err != nil {
		t.Errorf("barrier: %v, %v", done, err)
	}
	if err := k.unfollow(bpf.Device{}); err != nil {
		t.Error(err)
	}
	for range 2 {
		if err := k.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := k.follow(bpf.Device{}, 1, &subscriber{}); !errors.Is(err, errKernelClosed) {
		t.Errorf("follow on a closed Kernel: %v", err)
	}
	if lost, limited := k.Lost(), k.Limited(); lost != 0 || limited != 0 {
		t.Errorf("lost %d, limited %d", lost, limited)
	}
}

// TestReplayNotCompleted: the bytes of a replayed initiation, which no handshake
// followed, do not explain what an administrator configures later.
func TestReplayNotCompleted(t *testing.T) {
	f := newFed(t, RungFentry)
	f.dumped(0, dumpStart, wg.Peer{Key: alice})
	f.dumped(1000, dumpSweep, wg.Peer{Key: alice, Endpoint: at(2), Received: 148})
	f.want(nil, nil)
	f.dumped(2000, dumpSweep, wg.Peer{
		Key: alice, Endpoint: at(3), Received: 148, LastHandshake: f.wall.Add(1500 * time.Millisecond),
	})
	f.want([]said{{alice, none, at(3), wgroam.CauseConfig}}, nil)
}

// TestFall: the news that a rung broke may come when we are on another.
func TestFall(t *testing.T) {
	gone := errors.New("gone")
	for _, rung := range []Rung{RungPort, RungPolling} {
		f := newFed(t, rung)
		f.hookBreaks(gone)
		<-f.broken
		if f.fall() || f.Status().Rung != rung || f.ladder.hookErr != nil {
			t.Errorf("the hook broke: %+v", f.Status())
		}
	}
	f := newFed(t, RungFentry)
	f.wakeBroken() // a port that was left
	<-f.broken
	if f.fall() || f.Status().Rung != RungFentry {
		t.Errorf("the port broke: %+v", f.Status())
	}
	f.hookBreaks(gone)
	<-f.broken
	if s := f.Status(); !f.fall() || f.Status().Rung != RungPolling || !errors.Is(f.ladder.hookErr, gone) {
		t.Errorf("the hook broke: was %+v, is %+v", s, f.Status())
	}
}
