// SPDX-License-Identifier: MIT

package bpf

import (
	"net/netip"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// The limits of uplink.bpf.c.
const (
	window          = 100 * time.Millisecond
	hintsPerSession = 4
	hints           = 100
	movesPerSession = 4
	moves           = 400
)

// most is how much may be let through in a time: twice the limit in every window,
// for that many may be on their way through on two processors when one begins.
func most(limit int, took time.Duration) int {
	return 2 * limit * (int(took/window) + 2)
}

// TestUplinkForged: what a stranger sends, who has not seen an index, does nothing
// at all.
func TestUplinkForged(t *testing.T) {
	w := newWire(t)
	w.out(far(1), response(1000, 2000))
	w.out(far(1), data(2000))
	w.in(far(1), data(1000))
	w.events()
	before := w.session(1000)
	for i := range 3000 {
		index := uint32(i)
		if index >= 1000 {
			index++ // all but that one
		}
		for _, payload := range [][]byte{
			initiation(index), initiation(1000), response(index, 1000), response(2000, 1000), response(index, index),
			message(3, 64, 1000), data(index), data(2000), message(4, 1400, index),
		} {
			w.in(far(i), payload)
		}
	}
	w.want()
	w.wantSessions(1, 1)
	if after := w.session(1000); after != before {
		t.Errorf("the session was %+v, is %+v", before, after)
	}
	if lost, suppressed := w.counters(); lost != 0 || suppressed != 0 {
		t.Errorf("%d lost, %d suppressed", lost, suppressed)
	}
	// Nor can it be made with what we send without being asked for more than an
	// address: a cookie.
	for i := range 1000 {
		w.out(far(i), message(3, 64, uint32(i)))
	}
	w.want()
	w.wantSessions(1, 1)
}

// TestUplinkReplayed: a recorded initiation, sent from elsewhere with the index of a
// live session in it, has us answer there. Data under that session is not what ends
// its handshake.
func TestUplinkReplayed(t *testing.T) {
	w := newWire(t)
	w.out(far(1), data(20)) // we began
	w.want(UplinkEvent{Kind: UplinkUnknown, Remote: 20, Addr: far(1)})
	w.out(far(6), response(11, 20))
	w.out(far(6), data(20))
	w.out(far(1), data(20))
	w.want(
		UplinkEvent{Kind: UplinkResponse, Local: 11, Remote: 20, Addr: far(6), Message: response(11, 20)[:76]},
		UplinkEvent{Kind: UplinkMoved, Remote: 20, Addr: far(6), Old: far(1)},
		UplinkEvent{Kind: UplinkMoved, Remote: 20, Addr: far(1), Old: far(6)},
	)
	// Without a move there is nothing to be seen.
	w.out(far(1), response(12, 20))
	w.out(far(1), data(20))
	w.want(UplinkEvent{Kind: UplinkResponse, Local: 12, Remote: 20, Addr: far(1), Message: response(12, 20)[:76]})
	w.wantSessions(2, 1)
}

// session reads a session by our index.
func (w *wire) session(local uint32) uplinkUplinkLocal {
	w.t.Helper()
	var s uplinkUplinkLocal
	if err := w.u.objs.Locals.Lookup(&uplinkUplinkKey{Index: local, Port: near.Port()}, &s); err != nil {
		w.t.Fatal(err)
	}
	return s
}

// unremind keeps a session from being hinted at again: this machine may be slow.
func (w *wire) unremind(local uint32) {
	w.t.Helper()
	s := w.session(local)
	s.Reminders = 0
	if err := w.u.objs.Locals.Put(&uplinkUplinkKey{Index: local, Port: near.Port()}, &s); err != nil {
		w.t.Fatal(err)
	}
}

// TestUplinkSniffed: a stranger who has seen an index can make us look at the device
// now and then, and that is all; the peer that moves meanwhile is hinted at once he
// stops, and counted while he does not.
func TestUplinkSniffed(t *testing.T) {
	w := newWire(t)
	w.out(far(1), response(1, 2))
	w.in(far(1), data(1))
	w.out(far(1), data(2))
	w.events()

	const packets = 20_000
	start := time.Now()
	got := 0
	for i := range packets {
		w.in(far(1000+i%3000), data(1))
		w.in(far(1), data(1)) // the peer, where it has always been
		if i%1000 == 999 {
			got += w.hints(1)
		}
	}
	took := time.Since(start)
	got += w.hints(1)
	if limit := most(hintsPerSession, took); got > limit {
		t.Errorf("%d hints in %v, want at most %d", got, took, limit)
	}
	_, suppressed := w.counters()
	if got+suppressed < packets {
		t.Errorf("%d hints and %d suppressed of %d packets", got, suppressed, packets)
	}
	t.Logf("%d packets in %v: %d hints, %d suppressed", 2*packets, took, got, suppressed)
	w.wantSessions(1, 1)

	// The peer moves. Nothing that he has sent hides it.
	await(t, "a hint at the peer's new address", func() bool {
		w.in(far(2), data(1))
		for _, e := range w.events() {
			if e.Kind == UplinkHint && e.Addr == far(2) {
				return true
			}
		}
		return false
	})
	// Back to where it was, which is news again, whatever was known before.
	await(t, "a hint at the peer's old address", func() bool {
		w.in(far(1), data(1))
		for _, e := range w.events() {
			if e.Kind == UplinkHint && e.Addr == far(1) {
				return true
			}
		}
		return false
	})
	// He may have been at the new address first, and the peer says no more: it
	// answers to our data there.
	w.out(far(2), data(2))
	w.want(UplinkEvent{Kind: UplinkMoved, Remote: 2, Addr: far(2), Old: far(1)})
}

// hints counts what waits to be read, all of which is to be hints for a session.
func (w *wire) hints(local uint32) (n int) {
	w.t.Helper()
	for _, e := range w.events() {
		if e.Kind != UplinkHint || e.Local != local {
			w.t.Fatalf("event %+v, want hints for %d only", e, local)
		}
		n++
	}
	return n
}

// TestUplinkAllSniffed: a stranger who has seen all indexes.
func TestUplinkAllSniffed(t *testing.T) {
	w := newWire(t)
	const sessions, rounds = 500, 20
	for i := range sessions {
		w.out(far(1), initiation(uint32(i)))
	}
	w.events()
	start := time.Now()
	got := 0
	for i := range rounds {
		for l := range sessions {
			w.in(far(1000+i), data(uint32(l)))
		}
		for _, e := range w.events() {
			if e.Kind != UplinkHint {
				t.Fatalf("event %+v", e)
			}
			got++
		}
	}
	took := time.Since(start)
	_, suppressed := w.counters()
	if limit := most(hints, took); got > limit {
		t.Errorf("%d hints in %v, want at most %d", got, took, limit)
	}
	if got+suppressed != sessions*rounds {
		t.Errorf("%d hints and %d suppressed of %d packets", got, suppressed, sessions*rounds)
	}
	w.wantSessions(sessions, 0)
	t.Logf("%d packets in %v: %d hints, %d suppressed", sessions*rounds, took, got, suppressed)
}

// TestUplinkReminders: what comes on and on from an address is hinted at three more
// times, for a packet is here before the device has seen it, and the first may have
// been a stranger's.
func TestUplinkReminders(t *testing.T) {
	w := newWire(t)
	w.out(far(1), response(1, 2))
	w.events()
	hint := UplinkEvent{Kind: UplinkHint, Local: 1, Addr: far(1)}
	check := func(after []time.Duration) {
		t.Helper()
		for _, delay := range after {
			s := w.session(1)
			if got := time.Duration(s.Remind) - uptime(t); got > delay || got < delay-patience {
				t.Errorf("the next hint in %v, want %v", got, delay)
			}
			for _, due := range []bool{false, true} {
				if s.Remind = 1 << 62; due {
					s.Remind = 0 // the time has come
				}
				s.Hints.Used = 0
				if err := w.u.objs.Locals.Put(&uplinkUplinkKey{Index: 1, Port: near.Port()}, &s); err != nil {
					t.Fatal(err)
				}
				w.in(far(1), data(1))
				if due {
					w.want(hint)
				} else {
					w.want()
				}
			}
		}
		for range 100 {
			w.in(far(1), data(1))
		}
		w.want()
	}
	times := []time.Duration{250 * time.Millisecond, 4 * time.Second, 64 * time.Second}
	w.in(far(1), data(1))
	w.want(hint)
	check(times)

	// The same address again, after another.
	for _, from := range []netip.AddrPort{far(2), far(1)} {
		await(t, "a hint", func() bool {
			w.in(from, data(1))
			return len(w.events()) > 0
		})
	}
	check(times)
}

// uptime is CLOCK_MONOTONIC, in which the programs count windows.
func uptime(t testing.TB) time.Duration {
	t.Helper()
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		t.Fatal(err)
	}
	return time.Duration(ts.Nano())
}

// TestUplinkHops: a peer that changes its address with every packet makes few
// events, and the last of its addresses is among them, whoever asks.
func TestUplinkHops(t *testing.T) {
	w := newWire(t)
	w.out(far(1), response(1, 2))
	w.out(far(1), data(2))
	w.events()
	for name, read := range map[string]func() UplinkEvent{
		"Flush": func() (last UplinkEvent) {
			for _, e := range w.events() {
				last = e
			}
			return last
		},
		"Read": func() (last UplinkEvent) {
			for last.Addr != far(4000) {
				e, _, err := w.u.Read()
				if err != nil {
					t.Fatal(err)
				}
				last = e
			}
			return last
		},
	} {
		const packets = 10_000
		start := time.Now()
		n := 0
		for i := range packets {
			w.out(far(5+i), data(2))
			if i%1000 == 999 {
				n += w.moved(2)
			}
		}
		w.out(far(4000), data(2))
		if last := read(); last.Kind != UplinkMoved || last.Remote != 2 || last.Addr != far(4000) || last.Old == last.Addr {
			t.Errorf("%s: last %+v, want that it moved to %v", name, last, far(4000))
		}
		took := time.Since(start)
		if limit := most(movesPerSession, took) + packets/1000; n > limit { // and one for each time we asked
			t.Errorf("%s: %d events in %v, want at most %d", name, n, took, limit)
		}
		t.Logf("%s: %d packets in %v: %d events", name, packets, took, n)
		w.want()
		w.wantSessions(1, 1)
	}

	// Somewhere and back is nowhere, when it is too much to be told at once.
	await(t, "a window in which that happens", func() bool {
		start := uptime(t)
		for i := range 2 * movesPerSession {
			w.out(far(10+i), data(2))
		}
		last := w.events()
		w.out(far(7), data(2))
		w.out(last[len(last)-1].Addr, data(2))
		got := w.events()
		if uptime(t)-start > window {
			return false // too slow, and the next one has begun
		}
		if len(got) > 0 {
			t.Errorf("events %+v, want none", got)
		}
		return true
	})
}

// TestUplinkBusy: what was held back is told although there is always something else to
// read.
func TestUplinkBusy(t *testing.T) {
	w := newWire(t)
	w.out(far(1), data(2))
	for i := range 4 * movesPerSession {
		w.out(far(5+i), data(2))
	}
	w.out(far(4000), data(2))
	start := time.Now()
	for i := uint32(0); time.Since(start) < 50*lateness; i++ {
		w.out(far(1), initiation(100+i))
		e, _, err := w.u.Read()
		if err != nil {
			t.Fatal(err)
		}
		if e.Kind == UplinkMoved && e.Addr == far(4000) {
			return
		}
	}
	t.Errorf("the last address has not been told in %v", time.Since(start))
}

func (w *wire) moved(remote uint32) (n int) {
	w.t.Helper()
	for _, e := range w.events() {
		if e.Kind != UplinkMoved || e.Remote != remote {
			w.t.Fatalf("event %+v, want that %d moved", e, remote)
		}
		n++
	}
	return n
}

// TestUplinkMany: more sessions begin, and move, at once than are let through. All
// are reported, most of them a little later.
func TestUplinkMany(t *testing.T) {
	w := newWire(t)
	const sessions = 2000
	for _, to := range []netip.AddrPort{far(1), far(2)} {
		for r := range sessions {
			w.out(to, data(uint32(r)))
		}
		kind := UplinkUnknown
		if to == far(2) {
			kind = UplinkMoved
		}
		seen := make(map[uint32]bool)
		for len(seen) < sessions {
			e, _, err := w.u.Read()
			if err != nil {
				t.Fatal(err)
			}
			if e.Kind != kind || e.Addr != to || seen[e.Remote] || (kind == UplinkMoved) != (e.Old == far(1)) {
				t.Fatalf("event %+v (seen: %v), want %v to %v", e, seen[e.Remote], kind, to)
			}
			seen[e.Remote] = true
		}
		w.want()
		w.wantSessions(0, sessions)
	}
	if lost, _ := w.counters(); lost != 0 {
		t.Errorf("%d lost", lost)
	}
	var late uint64
	if err := w.u.objs.MovesLate.Get(&late); err != nil || late == 0 {
		t.Errorf("%d events were late, error %v: too few sessions for the limit of %d", late, err, moves)
	}
}

// TestUplinkLost: nobody reads while more happens than the ring buffer holds. It is
// counted, and where a session went is not forgotten.
func TestUplinkLost(t *testing.T) {
	w := newWire(t)
	w.out(far(1), data(1))
	w.events()
	const handshakes = 6000
	for i := range handshakes {
		w.out(far(1), initiation(uint32(i)))
	}
	lost, _ := w.counters()
	if lost == 0 {
		t.Fatal("lost no events: the storm was too small")
	}
	// There may be room for something shorter.
	const sessions = 10
	for i := range sessions {
		w.out(far(2), data(uint32(1+i)))
	}
	if n, _ := w.counters(); n < lost+sessions/2 {
		t.Errorf("lost %d events, %d before and most of %d more", n, lost, sessions)
	}
	var end unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &end); err != nil {
		t.Fatal(err)
	}
	initiations, sawDrained := 0, false
	var rest []UplinkEvent
	for len(rest) < sessions {
		e, drained, err := w.u.Read()
		if err != nil {
			t.Fatal(err)
		}
		// Of the ring buffer's own events: what was held back has the time when it was
		// collected, and comes in between where reading takes long.
		sawDrained = sawDrained || drained && e.Boot <= time.Duration(end.Nano())
		if e.Kind == UplinkInitiation {
			initiations++
			continue
		}
		rest = append(rest, e)
	}
	if !sawDrained {
		t.Error("nothing said that no more were waiting in the ring buffer")
	}
	if initiations+lost != handshakes {
		t.Errorf("%d read and %d lost of %d", initiations, lost, handshakes)
	}
	for _, e := range rest {
		switch {
		case e.Remote == 1 && e.Kind == UplinkMoved && e.Addr == far(2) && e.Old == far(1):
		case e.Remote > 1 && e.Remote <= sessions && e.Kind == UplinkUnknown && e.Addr == far(2):
		default:
			t.Errorf("event %+v", e)
		}
	}
	w.want()
	w.out(far(3), data(1))
	w.want(UplinkEvent{Kind: UplinkMoved, Remote: 1, Addr: far(3), Old: far(2)})
	t.Logf("the ring buffer holds %d initiations", initiations)
}

// TestUplinkCPUs: packets of one session pass on all processors at once. What is
// let through is bounded, and nothing is torn: the last word is where it went last.
func TestUplinkCPUs(t *testing.T) {
	w := newWire(t)
	w.out(far(1), response(1, 2))
	w.out(far(1), data(2))
	w.events()
	start := time.Now()
	var all sync.WaitGroup
	for cpu := range runtime.NumCPU() {
		all.Go(func() {
			for i := range 3000 {
				to := far(10 + cpu + i%2*100)
				for _, run := range []struct {
					prog   *ebpf.Program
					packet frame
				}{
					{w.u.objs.UplinkEgress, frame{src: near, dst: to, payload: data(2)}},
					{w.u.objs.UplinkIngress, frame{src: to, dst: near, payload: data(1)}},
				} {
					if verdict, err := run.prog.Run(&ebpf.RunOptions{Data: run.packet.bytes()}); err != nil || verdict != next {
						t.Errorf("verdict %#x, error %v", verdict, err)
					}
				}
			}
		})
	}
	all.Wait()
	n := len(w.events())
	took := time.Since(start)
	if limit := most(movesPerSession+hintsPerSession, took) + 1; n > limit {
		t.Errorf("%d events in %v, want at most %d", n, took, limit)
	}
	w.out(far(9), data(2))
	await(t, "the last address", func() bool {
		for _, e := range w.events() {
			if e.Kind == UplinkMoved && e.Addr == far(9) {
				return true
			}
		}
		w.out(far(8), data(2)) // a torn address may have been this one
		w.out(far(9), data(2))
		return false
	})
}

// TestUplinkSizes: room for three key pairs of every peer, twice; and when there are
// more sessions than room, the newest are known.
func TestUplinkSizes(t *testing.T) {
	for peers, want := range map[int]uint32{0: 4096, 1: 4096, 10_000: 60_000} {
		u := openUplink(t, peers)
		for _, m := range []*ebpf.Map{u.objs.Locals, u.objs.Remotes, u.objs.Late} {
			if m.MaxEntries() != want {
				t.Errorf("%d peers: %v has room for %d, want %d", peers, m, m.MaxEntries(), want)
			}
		}
	}

	w := newWire(t)
	for i := range uint32(10_000) {
		w.out(far(1), response(i, i))
		if i%1000 == 999 {
			w.events()
		}
	}
	if locals, remotes, _ := w.sessions(); locals > 4096 || remotes > 4096 || locals < 2048 || remotes < 2048 {
		t.Errorf("%d local and %d remote sessions", locals, remotes)
	}
	w.in(far(1), data(9999))
	w.want(UplinkEvent{Kind: UplinkHint, Local: 9999, Addr: far(1)})
}
