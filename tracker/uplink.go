// SPDX-License-Identifier: MIT

package tracker

import (
	"net/netip"
	"slices"
	"time"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/bpf"
)

// What a device sends is the proof: handshakes and data leave only for an
// endpoint that has been authenticated, or configured. What it receives is not:
// anybody can send it. So an ingress packet from a new place is only a hint, a
// reason to ask the device.

const (
	// hintDelay is how long after a hint the device is dumped, if that was not
	// done just before. WireGuard has yet to decrypt the packet that the hint is
	// of.
	hintDelay = 10 * time.Millisecond
	// late is how long WireGuard may take with a packet. It is shorter than
	// resyncDelay, the least that lies between two dumps, so that the second one
	// after a hint is late enough.
	late = 100 * time.Millisecond
	// hintLife is how long a hint explains a change that is found later.
	hintLife = 10 * time.Second
	// behind is the age of events from which on thousands of peers are not tried
	// one by one: the dump, which a storm causes anyway, shows who has moved.
	behind = 500 * time.Millisecond
	// maxUnnamed bounds the messages to peers that the newest dump did not have.
	maxUnnamed = 16
)

// hint is a packet that nobody has authenticated.
type hint struct {
	from netip.AddrPort
	boot time.Duration
}

// hints are the newest of a peer, each from another place, the newest first.
type hints struct {
	list [4]hint
	// full is CLOCK_BOOTTIME until which there may have been others.
	full time.Duration
}

func (l *hints) add(h hint) {
	i := slices.IndexFunc(l.list[:], func(old hint) bool { return old.from == h.from })
	if i < 0 {
		i = len(l.list) - 1
		if l.list[i].boot != 0 && h.boot-l.list[i].boot < hintLife {
			l.full = h.boot + hintLife
		}
	}
	copy(l.list[1:i+1], l.list[:i])
	l.list[0] = h
}

// from returns when there was a hint from a place within the time before now
// that a hint is good for.
func (l *hints) from(ep netip.AddrPort, now time.Duration) (boot time.Duration, ok bool) {
	for _, h := range l.list {
		if h.boot != 0 && h.from == ep && now-h.boot < hintLife {
			return h.boot, true
		}
	}
	return 0, false
}

// uplinkEvent takes an event of the program at the UDP port.
func (t *Tracker) uplinkEvent(e bpf.UplinkEvent) {
	now := time.Now()
	boot, err := bootTime()
	if err != nil {
		boot = e.Boot
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.sent(e, now.Add(e.Boot-boot), boot-e.Boot)
}

// sent is called with t.mu held, for an event that happened at a time, and age ago.
func (t *Tracker) sent(e bpf.UplinkEvent, at time.Time, age time.Duration) {
	switch e.Kind {
	case bpf.UplinkInitiation, bpf.UplinkResponse:
		k, ok := t.nameOf(e.Message, e.Addr, age < behind)
		if !ok {
			// To a peer that has been added since the newest dump, or we are behind.
			if len(t.unnamed) < maxUnnamed {
				e.Message = slices.Clone(e.Message)
				t.unnamed = append(t.unnamed, e)
			}
			t.wantDump()
			return
		}
		if t.sessions.addLocal(k, e.Local) {
			t.peers[k].heard = false
		}
		if e.Kind == bpf.UplinkInitiation {
			t.expect(k, e.Addr)
			return
		}
		t.sessions.addRemote(k, e.Remote)
		t.went(k, e, wgroam.CauseInitiation, at)
	case bpf.UplinkUnknown:
		// Of a session that is older than we are, or that a peer has agreed to.
		k, ok := t.ownerOf(e.Remote, e.Addr)
		if !ok || t.peers[k] == nil {
			t.wantDump()
			return
		}
		t.sessions.addRemote(k, e.Remote)
		t.completed(k)
		t.expect(k, e.Addr)
	case bpf.UplinkMoved:
		k, ok := t.ownerOf(e.Remote, e.Old)
		p := t.peers[k]
		if !ok || p == nil {
			t.wantDump()
			return
		}
		t.sessions.addRemote(k, e.Remote)
		if t.places.others(k, e.Addr) {
			// Who is there may have chosen the same index, in an answer to us.
			if other, ok := t.places.only(e.Addr); ok {
				t.sessions.addRemote(other, e.Remote)
			}
			t.wantDump()
			return
		}
		if boot, hinted := p.hints.from(e.Addr, e.Boot); hinted && boot > p.since && p.pending == nil {
			t.went(k, e, wgroam.CauseData, at)
			if p.endpoint == e.Addr {
				p.since = boot
			}
			return
		}
		t.expect(k, e.Addr)
	case bpf.UplinkConfirmed:
		// WireGuard sends nothing under a response's session before it has had an
		// answer under it, and with that the end of the handshake. Under another that
		// has the same index it may, and the peers choose those: so the time of the
		// handshake in a dump is to say it.
		k, ok := t.sessions.remote[e.Remote]
		if ok {
			t.completed(k)
		}
		if p := t.peers[k]; !ok || p == nil || p.pending != nil {
			t.wantDump()
			return
		}
		t.expect(k, e.Addr)
	case bpf.UplinkHint:
		k, ok := t.sessions.local[e.Local]
		p := t.peers[k]
		if !ok || p == nil {
			// The handshake was lost, or is of a peer that is not known yet.
			t.strays.add(hint{e.Addr, e.Boot})
			t.hinted = e.Boot
			t.wantDump()
			return
		}
		if t.sessions.newestLocal(k, e.Local) {
			p.heard = true
		}
		p.hints.add(hint{e.Addr, e.Boot})
		if held, _ := t.cfg.View.Get(k); held.Endpoint != e.Addr || p.pending != nil {
			t.hinted = e.Boot
			t.wantDump()
		}
	}
}

// nameOf returns the peer that a handshake message to addr was made for: one that
// is known to be there or, with all, any. To try a peer takes a microsecond.
func (t *Tracker) nameOf(message []byte, addr netip.AddrPort, all bool) (wgroam.Key, bool) {
	made := func(p *peer) bool {
		if p.mac1.h == nil {
			p.mac1 = newMAC1(p.key)
		}
		return p.mac1.made(message)
	}
	for p := t.places[addr]; p != nil; p = p.next {
		if made(p) {
			return p.key, true
		}
	}
	if !all {
		return wgroam.Key{}, false
	}
	for k, p := range t.peers {
		if p.endpoint != addr && made(p) {
			return k, true
		}
	}
	return wgroam.Key{}, false
}

// ownerOf returns the peer that has an index, or if none is known to have it the
// only one that was at an address. ok is false if it is not clear which one that is.
func (t *Tracker) ownerOf(remote uint32, was netip.AddrPort) (k wgroam.Key, ok bool) {
	if t.sessions.shared[remote] > 0 {
		return wgroam.Key{}, false
	}
	if k, ok = t.sessions.remote[remote]; ok {
		return k, true
	}
	return t.places.only(was)
}

// expect has the device read unless it is known to have an endpoint.
func (t *Tracker) expect(k wgroam.Key, addr netip.AddrPort) {
	if held, _ := t.cfg.View.Get(k); held.Endpoint != addr {
		t.wantDump()
	} else {
		t.places.move(t.peers[k], addr) // what the applier has written, maybe
	}
}

// went takes over that the device has sent to a peer at e.Addr, and why.
func (t *Tracker) went(k wgroam.Key, e bpf.UplinkEvent, cause wgroam.Cause, at time.Time) {
	p := t.peers[k]
	held, _ := t.cfg.View.Get(k)
	if e.Boot <= p.boot || e.Boot < t.dumped {
		// A dump has overtaken it, or it took long on its way through another
		// link.
		if held.Endpoint != e.Addr {
			t.wantDump()
		}
		return
	}
	p.boot = e.Boot
	t.places.move(p, e.Addr)
	if held.Endpoint == e.Addr {
		if p.pending != nil && p.pending.New == e.Addr {
			p.pending.At = at // of the newest handshake that is to be completed
		}
		return
	}
	if held.Cause == wgroam.CauseConfig && at.Sub(held.At) < settle {
		// The applier has announced a write, which may come after this.
		t.wantDump()
	}
	t.status.Events++
	p.told = true
	t.tell(p, wgroam.Observation{Peer: k, Old: held.Endpoint, New: e.Addr, Cause: cause, At: at})
}

// uplinkLost notes that events are missing.
func (t *Tracker) uplinkLost() {
	t.mu.Lock()
	t.missed()
	t.mu.Unlock()
	t.wantDump()
}

// missed is called with t.mu held when hints or other events are missing.
func (t *Tracker) missed() {
	if now, err := bootTime(); err == nil {
		t.deaf = now + hintLife
	}
}

// explained reports whether a peer's packets can have brought the endpoint of a
// dump that began at start, and since when that is known. If there was no hint, it
// was configured; but if there cannot have been one, it is enough that the peer
// spoke: when hints are missing or were never had of its session, when one from there
// had no name, or when it was there before, for then it is not hinted at again.
func (t *Tracker) explained(p *peer, ep netip.AddrPort, spoke bool, start time.Duration) (yes bool, since time.Duration) {
	if boot, ok := p.hints.from(ep, start); ok && boot > p.since {
		return true, min(boot, start)
	}
	_, stray := t.strays.from(ep, start)
	if stray || t.blind || start < t.deaf || start < max(p.hints.full, t.strays.full) || !p.heard || p.pending != nil || p.hints.list[0].from == ep {
		return spoke, start
	}
	return false, start
}

// nameAgain looks again at handshakes with peers that may have become known.
func (t *Tracker) nameAgain() {
	again := t.unnamed
	t.unnamed = nil
	for _, e := range again {
		if k, ok := t.nameOf(e.Message, e.Addr, true); ok {
			if t.sessions.addLocal(k, e.Local) {
				t.peers[k].heard = false
			}
			if e.Kind == bpf.UplinkResponse {
				t.sessions.addRemote(k, e.Remote)
			}
		}
	}
}

// patience is how long a dump that is wanted waits at least.
func (t *Tracker) patience() time.Duration {
	if t.ladder.tap == nil {
		return resyncDelay
	}
	return hintDelay
}

func (t *Tracker) suppressed() (uint64, error) {
	if t.ladder.tap == nil {
		return 0, nil
	}
	return t.ladder.tap.suppressed()
}

// hush compares how many hints were suppressed before a dump with the number
// before the one that preceded it. There will be another dump until it stands
// still, so that one is late enough for all of them.
func (t *Tracker) hush(suppressed uint64) {
	if suppressed == t.ladder.suppressed {
		return
	}
	t.ladder.suppressed = suppressed
	t.mu.Lock()
	t.missed()
	t.mu.Unlock()
	t.wantDump()
}

// listen has the device read if hints were suppressed since the newest dump. The
// kernel tells nobody: others may have used up what the devices have together.
func (t *Tracker) listen() error {
	suppressed, err := t.suppressed()
	if err == nil && suppressed != t.ladder.suppressed {
		t.wantDump()
	}
	return err
}
