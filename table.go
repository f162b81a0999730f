// SPDX-License-Identifier: MIT

package wgroam

import (
	"crypto/sha256"
	"encoding/binary"
	"net/netip"
	"sync"
	"time"
)

// Buckets is the number of digest buckets of a Table.
const Buckets = 1024

// Digests holds one value per bucket: the XOR of a keyed 64-bit hash of every
// record in it. Two tables with equal digests hold the same records.
type Digests [Buckets]uint64

// Sum folds all buckets into one value.
func (d *Digests) Sum() uint64 {
	var b [8 * Buckets]byte
	for i, v := range d {
		binary.BigEndian.PutUint64(b[8*i:], v)
	}
	sum := sha256.Sum256(b[:])
	return binary.BigEndian.Uint64(sum[:])
}

// BucketOf returns the bucket of a peer.
func BucketOf(k Key) int {
	return int(binary.BigEndian.Uint16(k[:])) % Buckets
}

// entry is a Record without the peer, which is the key of the map, and without
// padding and pointers: some 40 % of the memory of a large table.
type entry struct {
	addr  [16]byte // as on the wire
	port  uint16
	cause Cause
	term  uint32
	hlc   HLC
	node  NodeID
}

func entryOf(r Record) entry {
	return entry{
		addr: r.Endpoint.Addr().As16(), port: r.Endpoint.Port(), cause: r.Cause,
		term: r.Version.Term, hlc: r.Version.HLC, node: r.Version.Node,
	}
}

func (e entry) record(peer Key) Record {
	return Record{
		Peer:     peer,
		Endpoint: netip.AddrPortFrom(netip.AddrFrom16(e.addr).Unmap(), e.port),
		Cause:    e.cause,
		Version:  Version{Term: e.term, HLC: e.hlc, Node: e.node},
	}
}

// Table is the merge of all records: per peer, the newest wins. Merging is
// commutative, associative and idempotent, so nodes that have seen the same
// records hold the same table, in whatever order and however often they came.
//
// A Table is safe for concurrent use.
type Table struct {
	digestKey [32]byte

	mu       sync.Mutex
	peers    map[Key]entry
	digests  Digests
	watchers []tableWatcher
	maxAge   time.Duration // zero: records are kept for ever
	newest   HLC
	horizon  HLC // no older record is kept
}

type tableWatcher struct {
	changes *Changes
	want    func(Record) bool
}

// NewTable returns an empty Table. The key makes digests unpredictable to
// whoever can choose the contents of a record, such as a roaming peer.
func NewTable(digestKey [32]byte) *Table {
	return &Table{digestKey: digestKey, peers: make(map[Key]entry)}
}

// ageSteps is in how many steps a record ages: each takes a walk through the table.
const ageSteps = 32

// KeepFor makes the Table forget, and refuse, records that are older than its
// newest one by more than age and a 32nd. It goes by HLC, for records without
// terms.
//
// What is too old follows from the records alone, and from no clock: tables that
// have seen the same records forget the same, and what one of them has forgotten
// does not come back from another that is about to.
func (t *Table) KeepFor(age time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.maxAge = age
	t.forget()
}

// Horizon is the stamp below which records are refused.
func (t *Table) Horizon() HLC {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.horizon
}

// forget moves the horizon to where the newest record puts it. t.mu is held.
func (t *Table) forget() {
	if t.maxAge == 0 {
		return
	}
	newest := t.newest.Time().UnixMilli()
	newest -= newest % max(1, t.maxAge.Milliseconds()/ageSteps)
	horizon := HLCAt(time.UnixMilli(newest).Add(-t.maxAge))
	if horizon <= t.horizon {
		return
	}
	t.horizon = horizon
	for k, e := range t.peers {
		if e.hlc < horizon {
			t.digest(e.record(k))
			delete(t.peers, k)
		}
	}
}

// Notify marks the peers of all records that win from now on, and that want
// accepts, in c. A nil want accepts all.
func (t *Table) Notify(c *Changes, want func(Record) bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.watchers = append(t.watchers, tableWatcher{c, want})
}

// Merge adds r and reports whether it replaced what was known.
func (t *Table) Merge(r Record) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if r.Version.HLC < t.horizon {
		return false
	}
	old, known := t.peers[r.Peer]
	if known {
		before := old.record(r.Peer)
		if r.compare(before) <= 0 {
			return false
		}
		t.digest(before)
	}
	t.digest(r)
	t.peers[r.Peer] = entryOf(r)
	t.notify(r)
	t.newest = max(t.newest, r.Version.HLC)
	t.forget()
	return true
}

// notify is called with t.mu held.
func (t *Table) notify(r Record) {
	for _, w := range t.watchers {
		if w.want == nil || w.want(r) {
			w.changes.Mark(r.Peer)
		}
	}
}

// Revise replaces every record for which change returns true by the one that it
// returns, whose peer is the same, or forgets it if that has no endpoint. It is
// not a merge: what others know does not change.
func (t *Table) Revise(change func(Record) (Record, bool)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for k, old := range t.peers {
		before := old.record(k)
		r, ok := change(before)
		if !ok {
			continue
		}
		t.digest(before)
		if !r.Endpoint.IsValid() {
			delete(t.peers, k)
			continue
		}
		t.digest(r)
		t.peers[k] = entryOf(r)
		t.notify(r)
	}
	// The newest record may be an older one now.
	t.newest, t.horizon = 0, 0
	for _, e := range t.peers {
		t.newest = max(t.newest, e.hlc)
	}
	t.forget()
}

// Rewind takes back what is stamped later than limit, because the wall clock was
// ahead and has been set back by step, to now. The others have refused it, and would
// go on to; here it would win over all that is seen until the clock is there again. The
// observations of self stay, with the times that the clock should have shown, for
// nobody else may have them.
//
// If the clock was set ahead and back since the last look, step is too small for
// what was stamped in between. That is dated now, too late by no more than the time
// between two looks.
func (t *Table) Rewind(self NodeID, limit HLC, step time.Duration, now time.Time) {
	t.Revise(func(r Record) (Record, bool) {
		switch {
		case r.Version.HLC <= limit:
			return r, false
		case r.Version.Node != self:
			return Record{Peer: r.Peer}, true
		}
		r.Version.HLC = min(HLCAt(r.Version.HLC.Time().Add(-step)), HLCAt(now))
		return r, true
	})
}

// Newest is the newest stamp of all records, zero if there is none.
func (t *Table) Newest() HLC {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.newest
}

// digest puts r into the digest of its bucket, or takes it out: a hash that is
// made anew is one that need not be kept for each record.
func (t *Table) digest(r Record) {
	var buf [32 + RecordSize]byte
	b, _ := r.AppendBinary(append(buf[:0], t.digestKey[:]...))
	sum := sha256.Sum256(b)
	t.digests[BucketOf(r.Peer)] ^= binary.BigEndian.Uint64(sum[:])
}

// Get returns the newest record of a peer.
func (t *Table) Get(k Key) (Record, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	e, ok := t.peers[k]
	if !ok {
		return Record{}, false
	}
	return e.record(k), true
}

// Len returns the number of peers.
func (t *Table) Len() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.peers)
}

// Digests returns the digest of every bucket.
func (t *Table) Digests() Digests {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.digests
}

// Differing returns the records of all buckets whose digest is not the one in
// theirs: what the other side lacks, and what happens to share a bucket with
// it. The order is unspecified.
func (t *Table) Differing(theirs *Digests) []Record {
	t.mu.Lock()
	defer t.mu.Unlock()
	buckets := 0
	for b, d := range t.digests {
		if d != theirs[b] {
			buckets++
		}
	}
	if buckets == 0 {
		return nil
	}
	out := make([]Record, 0, 1+len(t.peers)*buckets/Buckets)
	for k, e := range t.peers {
		if b := BucketOf(k); t.digests[b] != theirs[b] {
			out = append(out, e.record(k))
		}
	}
	return out
}

// Records returns all records in no particular order.
func (t *Table) Records() []Record {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make([]Record, 0, len(t.peers))
	for k, e := range t.peers {
		out = append(out, e.record(k))
	}
	return out
}
