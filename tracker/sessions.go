// SPDX-License-Identifier: MIT

package tracker

import "github.com/wgroam/wgroam"

// keep is how many indexes of a peer are remembered, ours and its own each.
// WireGuard has three sessions of a peer at most, and a handshake under way
// (noise.h, struct noise_keypairs).
const keep = 4

// sessions knows which peers the indexes in the clear text of WireGuard's
// packets stand for, of one device.
type sessions struct {
	local  map[uint32]wgroam.Key // our index, under which the peer sends
	remote map[uint32]wgroam.Key // the peer's index, under which we send
	peers  map[wgroam.Key]*indexes
}

// indexes are a peer's, the newest first.
type indexes struct{ local, remote []uint32 }

func newSessions() *sessions {
	return &sessions{
		local:  make(map[uint32]wgroam.Key),
		remote: make(map[uint32]wgroam.Key),
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
	x := s.of(k)
	var news bool
	x.local, news = add(s.local, x.local, k, index)
	return news
}

// addRemote notes that we send to a peer under an index.
func (s *sessions) addRemote(k wgroam.Key, index uint32) bool {
	x := s.of(k)
	var news bool
	x.remote, news = add(s.remote, x.remote, k, index)
	return news
}

func add(names map[uint32]wgroam.Key, list []uint32, k wgroam.Key, index uint32) ([]uint32, bool) {
	if owner, ok := names[index]; ok && owner == k {
		return list, false
	}
	if len(list) == keep {
		if last := list[keep-1]; names[last] == k {
			delete(names, last)
		}
		list = list[:keep-1]
	}
	// An index that was another's stays in that one's list, where it does no harm.
	names[index] = k
	return append([]uint32{index}, list...), true
}

// newestLocal reports whether an index is the one that we gave the peer last.
func (s *sessions) newestLocal(k wgroam.Key, index uint32) bool {
	x := s.peers[k]
	return x != nil && len(x.local) > 0 && x.local[0] == index
}

// newestRemote reports whether an index is the one that the peer gave us last.
func (s *sessions) newestRemote(k wgroam.Key, index uint32) bool {
	x := s.peers[k]
	return x != nil && len(x.remote) > 0 && x.remote[0] == index
}

// forget forgets a peer.
func (s *sessions) forget(k wgroam.Key) {
	x := s.peers[k]
	if x == nil {
		return
	}
	drop(s.local, x.local, k)
	drop(s.remote, x.remote, k)
	delete(s.peers, k)
}

func drop(names map[uint32]wgroam.Key, list []uint32, k wgroam.Key) {
	for _, index := range list {
		if names[index] == k {
			delete(names, index)
		}
	}
}
