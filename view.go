// SPDX-License-Identifier: MIT

package wgroam

import (
	"math"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// Holding is what the local device holds for one peer.
type Holding struct {
	// Endpoint is the zero AddrPort when the device has none.
	Endpoint netip.AddrPort
	// Cause says how the device came by the endpoint; zero when it has none.
	Cause Cause
	// At is when it did; see Observation.
	At time.Time
}

// View is what is known of the local device: which peers it has and with which
// endpoints. The tracker writes it; the applier compares it with the Table.
//
// A View is safe for concurrent use.
type View struct {
	mu      sync.Mutex
	peers   map[Key]packed
	zones   []string  // of link-local addresses: as many as the host has links
	epoch   time.Time // from which each At is counted, by the wall clock of the last one
	watcher *Changes
}

// packed is a Holding in half the memory.
type packed struct {
	addr  [16]byte
	port  uint16
	bits  uint8 // of the address; 0 for none
	cause Cause
	zone  uint32 // its place in View.zones, from 1; 0 for none
	at    int64  // nanoseconds since View.epoch; never for the zero time
}

const never = math.MinInt64

// NewView returns an empty View.
func NewView() *View { return &View{peers: make(map[Key]packed)} }

// pack is called with v.mu held.
func (v *View) pack(h Holding) packed {
	a := h.Endpoint.Addr()
	p := packed{port: h.Endpoint.Port(), bits: uint8(a.BitLen()), cause: h.Cause, at: never}
	if a.IsValid() {
		p.addr = a.As16()
	}
	if zone := a.Zone(); zone != "" {
		i := slices.Index(v.zones, zone)
		if i < 0 {
			i = len(v.zones)
			v.zones = append(v.zones, zone)
		}
		p.zone = uint32(i) + 1
	}
	if !h.At.IsZero() {
		if v.epoch.IsZero() {
			v.epoch = h.At
		}
		since := h.At.Sub(v.epoch)
		if monotonic := h.At != h.At.Round(0); monotonic {
			v.epoch = h.At.Add(-since)
		}
		p.at = int64(since)
	}
	return p
}

// unpack is called with v.mu held.
func (v *View) unpack(p packed) Holding {
	h := Holding{Cause: p.cause}
	if p.bits != 0 {
		a := netip.AddrFrom16(p.addr)
		if p.bits == 32 {
			a = a.Unmap()
		}
		if p.zone != 0 {
			a = a.WithZone(v.zones[p.zone-1])
		}
		h.Endpoint = netip.AddrPortFrom(a, p.port)
	}
	if p.at != never {
		h.At = v.epoch.Add(time.Duration(p.at))
	}
	return h
}

// Notify marks the peers that change, or go, from now on in c.
func (v *View) Notify(c *Changes) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.watcher = c
}

// Set notes what the device holds for a peer and returns what was known before.
// known is false for a peer that the view did not have.
func (v *View) Set(k Key, h Holding) (before Holding, known bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	old, known := v.peers[k]
	if known {
		before = v.unpack(old)
	}
	p := v.pack(h)
	if known && old == p {
		return before, known
	}
	v.peers[k] = p
	if v.watcher != nil {
		v.watcher.Mark(k)
	}
	return before, known
}

// Keep forgets all peers for which keep returns false: the device has lost them.
func (v *View) Keep(keep func(Key) bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for k := range v.peers {
		if !keep(k) {
			delete(v.peers, k)
			if v.watcher != nil {
				v.watcher.Mark(k)
			}
		}
	}
}

// Get returns what the device holds for a peer; ok is false when it does not
// have the peer.
func (v *View) Get(k Key) (h Holding, ok bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	p, ok := v.peers[k]
	if !ok {
		return Holding{}, false
	}
	return v.unpack(p), true
}

// Len returns the number of peers.
func (v *View) Len() int {
	v.mu.Lock()
	defer v.mu.Unlock()
	return len(v.peers)
}

// Peers returns a copy of the view.
func (v *View) Peers() map[Key]Holding {
	v.mu.Lock()
	defer v.mu.Unlock()
	out := make(map[Key]Holding, len(v.peers))
	for k, p := range v.peers {
		out[k] = v.unpack(p)
	}
	return out
}
