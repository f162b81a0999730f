// SPDX-License-Identifier: MIT

package tracker

import (
	"net/netip"

	"github.com/wgroam/wgroam"
)

// places finds the peers that are known to be at an endpoint, each the first of a
// list.
type places map[netip.AddrPort]*peer

// move notes where a peer is now. The zero AddrPort is nowhere.
func (m places) move(p *peer, to netip.AddrPort) {
	if p.endpoint == to {
		return
	}
	if p.next != nil {
		p.next.prev = p.prev
	}
	switch {
	case p.prev != nil:
		p.prev.next = p.next
	case p.next != nil:
		m[p.endpoint] = p.next
	default:
		delete(m, p.endpoint)
	}
	p.endpoint, p.prev, p.next = to, nil, nil
	if !to.IsValid() {
		return
	}
	if p.next = m[to]; p.next != nil {
		p.next.prev = p
	}
	m[to] = p
}

// only returns the peer that is at addr, if there is no other.
func (m places) only(addr netip.AddrPort) (k wgroam.Key, ok bool) {
	p := m[addr]
	if p == nil || p.next != nil {
		return wgroam.Key{}, false
	}
	return p.key, true
}

// others reports whether another peer than k is at addr.
func (m places) others(k wgroam.Key, addr netip.AddrPort) bool {
	p := m[addr]
	return p != nil && (p.key != k || p.next != nil)
}
