// SPDX-License-Identifier: MIT

package wgroam

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

var digestKey = [32]byte{1, 2, 3}

func tableOf(records ...Record) *Table {
	t := NewTable(digestKey)
	for _, r := range records {
		t.Merge(r)
	}
	return t
}

// contents returns what a table holds, in an order.
func contents(t *Table) []Record {
	return slices.SortedFunc(slices.Values(t.Records()), func(a, b Record) int { return slices.Compare(a.Peer[:], b.Peer[:]) })
}

// TestTableMerge: a table is the newest record per peer, and nothing else: not
// the order of arrival, the repetitions, or how the records were grouped on
// their way. Records with equal versions and different contents, which only a
// broken node makes, are no exception.
func TestTableMerge(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		records := rapid.SliceOfN(genRecord, 0, 40).Draw(t, "records")

		want := map[Key]Record{}
		for _, r := range records {
			if old, ok := want[r.Peer]; !ok || r.compare(old) > 0 {
				want[r.Peer] = r
			}
		}
		one := tableOf(records...)
		same := func(how string, got *Table) {
			t.Helper()
			if diff := cmp.Diff(contents(one), contents(got), cmpAddrPort); diff != "" {
				t.Errorf("%s (-want +got):\n%s", how, diff)
			}
			if one.Digests() != got.Digests() {
				t.Errorf("%s: equal tables with different digests", how)
			}
		}
		if got := contents(one); len(got) != len(want) || one.Len() != len(want) {
			t.Errorf("%d records of %d peers (Len %d)", len(got), len(want), one.Len())
		}
		for k, r := range want {
			if got, ok := one.Get(k); !ok || got != r {
				t.Errorf("Get(%v) = %+v, %v, want %+v", k, got, ok, r)
			}
		}

		same("commutative", tableOf(shuffled(t, records)...))
		same("idempotent", tableOf(append(slices.Clone(records), shuffled(t, records)...)...))
		for _, r := range records {
			if one.Merge(r) {
				t.Errorf("merged twice: %+v", r)
			}
		}

		// a+(b+c) is (a+b)+c, where + goes by way of a table.
		i := rapid.IntRange(0, len(records)).Draw(t, "i")
		j := rapid.IntRange(i, len(records)).Draw(t, "j")
		a, b, c := records[:i], records[i:j], records[j:]
		same("associative: a+(b+c)", tableOf(append(slices.Clone(a), tableOf(slices.Concat(b, c)...).Records()...)...))
		same("associative: (a+b)+c", tableOf(append(tableOf(slices.Concat(a, b)...).Records(), c...)...))
	})
}

var cmpAddrPort = cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })

func TestTableMergeReports(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		table := NewTable(digestKey)
		for _, r := range rapid.SliceOf(genRecord).Draw(t, "records") {
			before, _ := table.Get(r.Peer)
			won := table.Merge(r)
			after, ok := table.Get(r.Peer)
			if !ok || won != (after != before) || won != (after == r && before != r) {
				t.Fatalf("Merge(%+v) = %v: from %+v to %+v", r, won, before, after)
			}
		}
	})
}

// TestDigests: two tables have equal digests if and only if they hold the same
// records, bucket by bucket.
func TestDigests(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a := tableOf(rapid.SliceOfN(genRecord, 0, 12).Draw(t, "a")...)
		b := tableOf(rapid.SliceOfN(genRecord, 0, 12).Draw(t, "b")...)
		da, db := a.Digests(), b.Digests()
		for i := range da {
			in := func(r Record) bool { return BucketOf(r.Peer) != i }
			equal := slices.Equal(slices.DeleteFunc(contents(a), in), slices.DeleteFunc(contents(b), in))
			if equal != (da[i] == db[i]) {
				t.Errorf("bucket %d: equal records %v, digests %x and %x", i, equal, da[i], db[i])
			}
		}
		if (da == db) != (da.Sum() == db.Sum()) {
			t.Errorf("equal digests %v, sums %x and %x", da == db, da.Sum(), db.Sum())
		}
	})

	// Empty buckets are zero, whatever was there before; the key matters.
	if d := NewTable(digestKey).Digests(); d != (Digests{}) {
		t.Error("an empty table has a digest")
	}
	r := Record{Peer: Key{1}, Cause: CauseData}
	other := NewTable([32]byte{9})
	other.Merge(r)
	if tableOf(r).Digests() == other.Digests() {
		t.Error("the digest does not depend on the key")
	}
}

// TestDiffering: what two tables say of each other is enough to make them
// equal, and is no more than the buckets in which they differ.
func TestDiffering(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		common := rapid.SliceOfN(genRecord, 0, 20).Draw(t, "common")
		a := tableOf(append(rapid.SliceOfN(genRecord, 0, 6).Draw(t, "a"), common...)...)
		b := tableOf(append(rapid.SliceOfN(genRecord, 0, 6).Draw(t, "b"), common...)...)
		want := tableOf(append(a.Records(), b.Records()...)...)

		da, db := a.Digests(), b.Digests()
		fromA, fromB := a.Differing(&db), b.Differing(&da)
		for _, r := range append(slices.Clone(fromA), fromB...) {
			if i := BucketOf(r.Peer); da[i] == db[i] {
				t.Errorf("bucket %d is equal on both sides, and %+v is sent", i, r)
			}
		}
		for _, r := range fromA {
			b.Merge(r)
		}
		for _, r := range fromB {
			a.Merge(r)
		}
		for name, got := range map[string]*Table{"a": a, "b": b} {
			if diff := cmp.Diff(contents(want), contents(got), cmpAddrPort); diff != "" {
				t.Errorf("%s (-want +got):\n%s", name, diff)
			}
		}
		da = a.Digests()
		if rest := b.Differing(&da); rest != nil {
			t.Errorf("still different: %+v", rest)
		}
	})
}

func TestTableNotify(t *testing.T) {
	table := NewTable(digestKey)
	record := func(peer byte, hlc HLC, node NodeID) Record {
		return Record{Peer: Key{peer}, Cause: CauseData, Version: Version{HLC: hlc, Node: node}}
	}
	table.Merge(record(1, 1, 1)) // before anybody listens
	all, foreign := NewChanges(), NewChanges()
	table.Notify(all, nil)
	table.Notify(foreign, func(r Record) bool { return r.Version.Node != 1 })

	table.Merge(record(2, 5, 1))
	table.Merge(record(3, 5, 2))
	table.Merge(record(2, 4, 2)) // does not win
	table.Merge(record(1, 2, 2))
	table.Merge(record(3, 6, 2))
	for name, tt := range map[string]struct {
		changes *Changes
		want    []Key
	}{
		"all":     {all, []Key{{2}, {3}, {1}}},
		"foreign": {foreign, []Key{{3}, {1}}},
	} {
		if diff := cmp.Diff(tt.want, tt.changes.Take(9)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

func TestBucketOf(t *testing.T) {
	seen := map[int]int{}
	for i := range 65536 {
		b := BucketOf(Key{0: byte(i >> 8), 1: byte(i)})
		if b < 0 || b >= Buckets {
			t.Fatalf("bucket %d", b)
		}
		seen[b]++
	}
	for b, n := range seen {
		if n != 64 {
			t.Errorf("bucket %d has %d of 65536 prefixes, want 64", b, n)
		}
	}
}

// TestTableConcurrently is for the race detector.
func TestTableConcurrently(t *testing.T) {
	table, changes := NewTable(digestKey), NewChanges()
	table.Notify(changes, nil)
	var wg sync.WaitGroup
	for node := range 4 {
		wg.Go(func() {
			for i := range 1000 {
				table.Merge(Record{Peer: Key{byte(i)}, Cause: CauseData, Version: Version{HLC: HLC(i), Node: NodeID(node)}})
			}
		})
		wg.Go(func() {
			for range 100 {
				d := table.Digests()
				table.Differing(&d)
				table.Differing(&Digests{})
				table.Get(Key{byte(node)})
				table.Len()
			}
		})
	}
	wg.Wait()
	for _, r := range contents(table) {
		if want := (Version{HLC: HLC(r.Peer[0]) + 256*((999-HLC(r.Peer[0]))/256), Node: 3}); r.Version != want {
			t.Errorf("peer %d: %+v, want %+v", r.Peer[0], r.Version, want)
		}
	}
	if changes.Len() != 256 {
		t.Errorf("%d peers have changed", changes.Len())
	}
}

func manyRecords(n int) []Record {
	records := make([]Record, n)
	for i := range records {
		r := &records[i]
		binary.BigEndian.PutUint64(r.Peer[:], uint64(i)*0x9e3779b97f4a7c15) // spread over the buckets
		r.Endpoint = netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 51820)
		r.Cause = CauseData
		r.Version = Version{HLC: HLC(i), Node: 1}
	}
	return records
}

// BenchmarkTableMemory reports the heap that a table takes, per peer, map and
// all. It depends on how full the map is: 60 000 is the worst that there is in
// this range, just after the map has grown.
func BenchmarkTableMemory(b *testing.B) {
	for _, n := range []int{1000, 10_000, 60_000, 100_000} {
		b.Run(fmt.Sprintf("peers=%d", n), func(b *testing.B) {
			records := manyRecords(n)
			var per float64
			for b.Loop() {
				before := heap()
				table := tableOf(records...)
				per = float64(heap()-before) / float64(n)
				runtime.KeepAlive(table)
			}
			b.ReportMetric(per, "bytes/peer")
		})
	}
}

func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// TestMemory: a peer takes no more than 200 bytes, in the Table and the View together, where 100 000 have them.
func TestMemory(t *testing.T) {
	const n, limit = 100_000, 200
	records := manyRecords(n)
	before := heap()
	table, view := tableOf(records...), NewView()
	for _, r := range records {
		view.Set(r.Peer, Holding{Endpoint: r.Endpoint, Cause: r.Cause, At: time.Now()})
	}
	per := (heap() - before) / n
	runtime.KeepAlive(table)
	runtime.KeepAlive(view)
	runtime.KeepAlive(records)
	t.Logf("%d bytes per peer", per)
	if per > limit {
		t.Errorf("%d bytes per peer, want at most %d", per, limit)
	}
}

func BenchmarkTableMerge(b *testing.B) {
	records := manyRecords(100_000)
	table := tableOf(records...)
	i := 0
	for b.Loop() {
		r := records[i%len(records)]
		r.Version.HLC += HLC(i + 1)
		table.Merge(r)
		i++
	}
}

func BenchmarkTableDiffering(b *testing.B) {
	records := manyRecords(100_000)
	table := tableOf(records...)
	digests := tableOf(records[1:]...).Digests()
	for b.Loop() {
		if n := len(table.Differing(&digests)); n == 0 || n > 1000 {
			b.Fatal(n)
		}
	}
}

// TestTableRevise: a revised table is the same as one that never knew better.
func TestTableRevise(t *testing.T) {
	got, want := NewTable([32]byte{1}), NewTable([32]byte{1})
	changes := NewChanges()
	record := func(n byte, hlc HLC) Record {
		return Record{
			Peer: Key{n, n}, Endpoint: netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, n}), 1),
			Cause: CauseData, Version: Version{HLC: hlc, Node: 1},
		}
	}
	for n := range byte(9) {
		got.Merge(record(n, 1000+HLC(n)))
		switch n % 3 {
		case 0:
			want.Merge(record(n, HLC(n)))
		case 1:
			want.Merge(record(n, 1000+HLC(n)))
		}
	}
	got.Notify(changes, nil)
	got.Revise(func(r Record) (Record, bool) {
		switch r.Peer[0] % 3 {
		case 0:
			r.Version.HLC -= 1000
			return r, true
		case 1:
			return Record{}, false
		}
		return Record{Peer: r.Peer}, true
	})
	if got.Digests() != want.Digests() || got.Len() != want.Len() {
		t.Errorf("%d records, want %d: %v", got.Len(), want.Len(), got.Records())
	}
	if n := changes.Len(); n != 3 {
		t.Errorf("%d peers marked, want 3", n)
	}
	if !got.Merge(record(0, 1)) {
		t.Error("an older record still wins")
	}
}

// TestTableRewind: what was seen while the clock was an hour ahead does not stand in
// the way when it has been set right.
func TestTableRewind(t *testing.T) {
	const self, other = 1, 2
	table := NewTable(digestKey)
	now := time.UnixMilli(1_700_000_000_000)
	ahead, limit := now.Add(time.Hour), HLCAt(now.Add(10*time.Second))
	seen := func(peer byte, node NodeID, when time.Time) {
		table.Merge(Record{
			Peer: Key{peer}, Endpoint: netip.MustParseAddrPort("198.51.100.7:1"), Cause: CauseData,
			Version: Version{HLC: HLCAt(when), Node: node},
		})
	}
	check := func(peer byte, want time.Time) {
		t.Helper()
		if r, ok := table.Get(Key{peer}); !ok || r.Version.HLC != HLCAt(want) {
			t.Errorf("peer %d: %+v, %v; want it of %v", peer, r, ok, want)
		}
	}
	seen(1, self, ahead.Add(-time.Minute))
	seen(2, other, ahead)
	seen(3, other, now)
	table.Rewind(self, limit, time.Hour, now)
	check(1, now.Add(-time.Minute))
	if r, ok := table.Get(Key{2}); ok {
		t.Errorf("another's from the future is still there: %+v", r)
	}
	check(3, now)
	// Set ahead and back again between two looks, which saw less of a step.
	seen(4, self, ahead)
	if table.Newest() != HLCAt(ahead) {
		t.Errorf("newest is %v, want %v", table.Newest().Time(), ahead)
	}
	table.Rewind(self, limit, 59*time.Minute, now)
	check(4, now)
	// The peer has been seen elsewhere since.
	seen(1, other, now.Add(-time.Second))
	check(1, now.Add(-time.Second))
	if table.Newest() > limit {
		t.Errorf("the newest stamp is still ahead: %v", table.Newest().Time())
	}
}

// TestTableAges: what is too old follows from the records that a table has seen, in
// whatever order, and nothing that is younger is forgotten.
func TestTableAges(t *testing.T) {
	const age = 320 * time.Millisecond
	tableOf := func(records ...Record) *Table {
		t := NewTable(digestKey)
		t.KeepFor(age)
		for _, r := range records {
			t.Merge(r)
		}
		return t
	}
	rapid.Check(t, func(t *rapid.T) {
		records := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) Record {
			r := genRecord.Draw(t, "record")
			r.Version.Term = 0
			r.Version.HLC = HLCAt(time.UnixMilli(10_000 + rapid.Int64Range(0, 1000).Draw(t, "ms")))
			return r
		}), 1, 40).Draw(t, "records")
		newest := slices.MaxFunc(records, func(a, b Record) int { return a.Version.Compare(b.Version) }).Version.HLC.Time()

		one := tableOf(records...)
		for _, r := range records {
			old := newest.Sub(r.Version.HLC.Time())
			got, ok := one.Get(r.Peer)
			switch {
			case !ok && old <= age:
				t.Errorf("%v old, and forgotten: %+v", old, r)
			case ok && newest.Sub(got.Version.HLC.Time()) > age+age/ageSteps:
				t.Errorf("%v old, and kept: %+v", newest.Sub(got.Version.HLC.Time()), got)
			}
			if one.Merge(r) {
				t.Errorf("merged twice: %+v", r)
			}
		}
		i := rapid.IntRange(0, len(records)).Draw(t, "i")
		a, b := tableOf(records[:i]...), tableOf(records[i:]...)
		late := NewTable(digestKey)
		for _, r := range records {
			late.Merge(r)
		}
		late.KeepFor(age)
		for how, got := range map[string]*Table{
			"shuffled":         tableOf(shuffled(t, records)...),
			"by way of tables": tableOf(append(a.Records(), b.Records()...)...),
			"all at once":      late,
		} {
			if diff := cmp.Diff(contents(one), contents(got), cmpAddrPort); diff != "" || one.Digests() != got.Digests() {
				t.Errorf("%s (-want +got):\n%s", how, diff)
			}
		}
	})
}

// TestTableAgesBack: when the newest record turns out to be from a clock that was
// ahead, older ones are welcome again.
func TestTableAgesBack(t *testing.T) {
	table := NewTable(digestKey)
	table.KeepFor(time.Hour)
	start := time.UnixMilli(1_700_000_000_000)
	seen := func(peer byte, after time.Duration) Record {
		return Record{
			Peer: Key{peer}, Endpoint: netip.MustParseAddrPort("198.51.100.7:1"), Cause: CauseData,
			Version: Version{HLC: HLCAt(start.Add(after)), Node: 1},
		}
	}
	table.Merge(seen(1, 0))
	table.Merge(seen(2, 100*time.Hour))
	if table.Len() != 1 || table.Merge(seen(1, 0)) {
		t.Fatalf("%d records, want the newest alone", table.Len())
	}
	table.Revise(func(Record) (Record, bool) { return seen(2, 0), true })
	if !table.Merge(seen(1, 0)) || table.Len() != 2 {
		t.Errorf("%d records, want both", table.Len())
	}
}
