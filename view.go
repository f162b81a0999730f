// SPDX-License-Identifier: MIT

package wgroam

import (
	"maps"
	"net/netip"
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
	peers   map[Key]Holding
	watcher *Changes
}

// NewView returns an empty View.
func NewView() *View { return &View{peers: make(map[Key]Holding)} }

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
	before, known = v.peers[k]
	if known && before == h {
		return before, known
	}
	v.peers[k] = h
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
	h, ok = v.peers[k]
	return h, ok
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
	return maps.Clone(v.peers)
}
