// SPDX-License-Identifier: MIT

package tracker

import (
	"slices"

	"github.com/wgroam/wgroam"
)

// keep is how many indexes of a peer are remembered, ours and its own each.
// WireGuard has three sessions of a peer at most, and a handshake under way
// (noise.h, struct noise_keypairs).
const keep = 4

// sessions knows which peers the indexes in the clear text of WireGuard's
// packets stand for, of one device.
//
// Indexes of ours are unique: one that comes again was given up before. Those of
// the peers are their own choice, and one may choose what another has. Then it
// stands for nobody, until none of them has it.
type sessions struct {
	local  map[uint32]wgroam.Key // our index, under which the peer sends
	remote map[uint32]wgroam.Key // the peer's index, under which we send
	shared map[uint32]int        // indexes that several peers have had, and how many have them
	peers  map[wgroam.Key]*indexes
}

// indexes are a peer's, the newest first.
type indexes struct{ local, remote []uint32 }

func newSessions() *sessions {
	return &sessions{
		local:  make(map[uint32]wgroam.Key),
		remote: make(map[uint32]wgroam.Key),
		shared: make(map[uint32]int),
		peers:  make(map[wgroam.Key]*indexes),
	}
}

func (s *sessions) of(k wgroam.Key) *indexes {
	x := s.peers[k]
	if x == nil {
		x = &indexes{}
		s.peers[k] = x
	}
	return x
}

// addLocal notes that we told a peer to send under an index. It reports whether
// that is news.
func (s *sessions) addLocal(k wgroam.Key, index uint32) bool {
	if owner, ok := s.local[index]; ok && owner == k {
		return false
	}
	x := s.of(k)
	var old uint32
	var dropped bool
	if x.local, old, dropped = push(x.local, index); dropped {
		s.dropLocal(k, old)
	}
	// An index that was another's stays in that one's list, where it does no harm.
	s.local[index] = k
	return true
}

// addRemote notes that we send to a peer under an index. If another peer has it,
// too, it is nobody's.
func (s *sessions) addRemote(k wgroam.Key, index uint32) {
	x := s.of(k)
	if slices.Contains(x.remote, index) {
		return
	}
	var old uint32
	var dropped bool
	if x.remote, old, dropped = push(x.remote, index); dropped {
		s.dropRemote(old)
	}
	switch _, taken := s.remote[index]; {
	case taken:
		delete(s.remote, index)
		s.shared[index] = 2
	case s.shared[index] > 0:
		s.shared[index]++
	default:
		s.remote[index] = k
	}
}

// push puts an index in front of a list, which may drop its last one.
func push(list []uint32, index uint32) (_ []uint32, old uint32, dropped bool) {
	if len(list) == keep {
		old, dropped = list[keep-1], true
		list = list[:keep-1]
	}
	return append([]uint32{index}, list...), old, dropped
}

// newestLocal reports whether an index is the one that we gave the peer last.
func (s *sessions) newestLocal(k wgroam.Key, index uint32) bool {
	x := s.peers[k]
	return x != nil && len(x.local) > 0 && x.local[0] == index
}

// forget forgets a peer.
func (s *sessions) forget(k wgroam.Key) {
	x := s.peers[k]
	if x == nil {
		return
	}
	for _, index := range x.local {
		s.dropLocal(k, index)
	}
	for _, index := range x.remote {
		s.dropRemote(index)
	}
	delete(s.peers, k)
}

func (s *sessions) dropLocal(k wgroam.Key, index uint32) {
	if s.local[index] == k {
		delete(s.local, index)
	}
}

// dropRemote is called for a peer that has the index.
func (s *sessions) dropRemote(index uint32) {
	switch n := s.shared[index]; {
	case n > 1:
		s.shared[index]--
	case n == 1:
		delete(s.shared, index)
	default:
		delete(s.remote, index)
	}
}
