// SPDX-License-Identifier: MIT

package wgroam

import (
	"bytes"
	"cmp"
	"math/bits"
	"slices"
)

// Setup says how a device is configured for a peer, in hashes under a key that only
// the group has, and in which the peer is mixed: equal hashes are equal settings, and
// nothing else is to be learned from them.
type Setup struct {
	Peer         Key
	AllowedIPs   uint64
	PresharedKey uint64
}

// hash is what the peer adds to the digest of its bucket. The two are independent, so
// it is as good a hash as each.
func (s Setup) hash() uint64 { return s.AllowedIPs ^ s.PresharedKey }

// Setups is how a device is configured for all its peers. It does not change.
type Setups struct {
	Port    int     // that the device listens on
	list    []Setup // by peer
	digests Digests
}

// NewSetups returns the Setups of a device that listens on a port, and of distinct peers, in
// any order. It takes the slice.
func NewSetups(port int, list []Setup) Setups {
	slices.SortFunc(list, bySetupPeer)
	s := Setups{Port: port, list: list}
	for _, p := range list {
		s.digests[BucketOf(p.Peer)] ^= p.hash()
	}
	return s
}

func bySetupPeer(a, b Setup) int { return bytes.Compare(a.Peer[:], b.Peer[:]) }

// Len returns the number of peers.
func (s *Setups) Len() int { return len(s.list) }

// Digests returns a digest for each bucket of peers; see BucketOf.
func (s *Setups) Digests() Digests { return s.digests }

// BucketSet is a set of buckets.
type BucketSet [Buckets / 8]byte

// Has reports whether a bucket is in the set.
func (b *BucketSet) Has(bucket int) bool { return b[bucket/8]&(1<<(bucket%8)) != 0 }

// Add adds a bucket.
func (b *BucketSet) Add(bucket int) { b[bucket/8] |= 1 << (bucket % 8) }

// Len returns the number of buckets in the set.
func (b *BucketSet) Len() (n int) {
	for _, v := range b {
		n += bits.OnesCount8(v)
	}
	return n
}

// SetupDiff is what a device has in buckets in which another one differs.
type SetupDiff struct {
	Port      int       // that the device listens on; 0 if it does not say
	Peers     int       // in the device
	Differing int       // buckets that differ
	Told      BucketSet // those of them that Setups has
	Setups    []Setup
}

// Differing returns whole buckets whose digest is not the one in theirs, as many as
// have no more than most peers together.
func (s *Setups) Differing(theirs *Digests, most int) SetupDiff {
	var sizes [Buckets]int
	for _, p := range s.list {
		sizes[BucketOf(p.Peer)]++
	}
	d := SetupDiff{Port: s.Port, Peers: len(s.list)}
	for b, digest := range s.digests {
		if digest == theirs[b] {
			continue
		}
		d.Differing++
		if most -= sizes[b]; most >= 0 {
			d.Told.Add(b)
		}
	}
	for _, p := range s.list {
		if d.Told.Has(BucketOf(p.Peer)) {
			d.Setups = append(d.Setups, p)
		}
	}
	return d
}

// Drift is in what two devices differ about a peer.
type Drift string

// The values of Drift.
const (
	DriftMissingHere  Drift = "missing here"
	DriftMissingThere Drift = "missing there"
	DriftAllowedIPs   Drift = "allowed-ips"
	DriftPresharedKey Drift = "preshared-key"
)

// Drifted is one peer of which two devices differ.
type Drifted struct {
	Peer Key
	What Drift
}

// Compare returns in what this device differs from another one, by peer, as far as
// theirs tells.
func (s *Setups) Compare(theirs SetupDiff) []Drifted {
	there := make(map[Key]Setup, len(theirs.Setups))
	for _, p := range theirs.Setups {
		there[p.Peer] = p
	}
	var out []Drifted
	for _, here := range s.list {
		other, ok := there[here.Peer]
		delete(there, here.Peer)
		switch {
		case !theirs.Told.Has(BucketOf(here.Peer)):
			continue
		case !ok:
			out = append(out, Drifted{here.Peer, DriftMissingThere})
			continue
		}
		if here.AllowedIPs != other.AllowedIPs {
			out = append(out, Drifted{here.Peer, DriftAllowedIPs})
		}
		if here.PresharedKey != other.PresharedKey {
			out = append(out, Drifted{here.Peer, DriftPresharedKey})
		}
	}
	for peer := range there {
		out = append(out, Drifted{peer, DriftMissingHere})
	}
	slices.SortFunc(out, func(a, b Drifted) int {
		return cmp.Or(bytes.Compare(a.Peer[:], b.Peer[:]), cmp.Compare(a.What, b.What))
	})
	return out
}
