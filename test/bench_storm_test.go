// SPDX-License-Identifier: MIT

//go:build !vm

package test

import (
	"crypto/rand"
	"fmt"
	"io"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/feed"
)

// These benchmarks need neither root nor WireGuard, and an emulated machine
// would tell nothing more about them.

const stormPeers = 100_000

func randomKeys(n int) []wgroam.Key {
	keys := make([]wgroam.Key, n)
	for i := range keys {
		_, _ = rand.Read(keys[i][:]) // never fails
	}
	return keys
}

// cost is what something took of the clock and of the processors.
type cost struct{ wall, cpu time.Duration }

func measure(f func()) cost {
	used := func() time.Duration {
		var r unix.Rusage
		_ = unix.Getrusage(unix.RUSAGE_SELF, &r) // cannot fail with a valid address
		return time.Duration(r.Utime.Nano() + r.Stime.Nano())
	}
	start, before := time.Now(), used()
	f()
	return cost{time.Since(start), used() - before}
}

func costs(all []cost, f func(cost) time.Duration) []time.Duration {
	out := make([]time.Duration, len(all))
	for i, c := range all {
		out[i] = f(c)
	}
	return out
}

func row(w io.Writer, name string, all []cost) {
	wall := costs(all, func(c cost) time.Duration { return c.wall })
	cpu := quantile(costs(all, func(c cost) time.Duration { return c.cpu }), 0.5)
	fmt.Fprintf(w, "%v\t%v\t%v\t%.0f\t%.2f\t  %s\n", quantile(wall, 0.5).Round(time.Millisecond),
		quantile(wall, 0).Round(time.Millisecond), quantile(wall, 1).Round(time.Millisecond),
		stormPeers/quantile(wall, 0.5).Seconds(), float64(cpu.Microseconds())/stormPeers, name)
}

const rowHead = "median\tbest\tworst\trecords/s\tCPU us/record\t"

// BenchmarkStorm measures how long it takes until another node's table is the
// same after all peers have changed their endpoints at once.
func BenchmarkStorm(b *testing.B) {
	const rounds = 5
	keys, servers := twoServers(b)
	peers := randomKeys(stormPeers)
	from, to := twoMembers(b, keys, servers, peers)
	raw := newRawPath(b, keys, servers[0])

	var storm, bare []cost
	frames := uint64(0)
	for round := range rounds + 1 {
		sent := from.link.Counters().Sent
		c := measure(func() {
			for i, k := range peers {
				from.observe(k, netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), uint16(1024+round)))
			}
			to.holds(b, from)
		})
		n := from.link.Counters().Sent - sent
		r := measure(func() {
			// As many bytes in as many messages, but for the beats.
			msg := make([]byte, frameSize(stormPeers/int(n)))
			go func() {
				for i := range uint32(n) {
					raw.send(b, i, msg)
				}
			}()
			for i := range uint32(n) {
				if got := <-raw.got; got != i {
					b.Fatalf("message %d came as number %d", got, i)
				}
			}
		})
		if round > 0 { // the first fills the tables
			storm, bare, frames = append(storm, c), append(bare, r), frames+n
		}
	}
	counters := to.link.Counters()
	if counters.Dropped != 0 || counters.Auth != 0 {
		b.Errorf("the feed lost or refused messages: %+v", counters)
	}
	b.ReportMetric(0, "ns/op")
	wall := quantile(costs(storm, func(c cost) time.Duration { return c.wall }), 0.5)
	b.ReportMetric(stormPeers/wall.Seconds(), "records/s")
	b.Logf("%s\n%d peers change at once in one node's Table: time until another node's Table is equal. Two nodes in one process, a\n"+
		"server each, connected both ways over loopback with TLS. %d rounds after a first that fills the tables, by turns with\n"+
		"as many bytes in as many bare NATS messages (%d on average) over the same server and the same kinds of connections.\n%s",
		kernel(), stormPeers, rounds, frames/rounds, columns(func(w io.Writer) {
			fmt.Fprintln(w, rowHead)
			row(w, "wgroam", storm)
			row(w, "bare NATS", bare)
		}))
}

// BenchmarkJoin measures how long a node without any record takes to have them
// all, and what they weigh.
func BenchmarkJoin(b *testing.B) {
	const rounds = 5
	keys, servers := twoServers(b)
	peers := randomKeys(stormPeers)
	from, to := twoMembers(b, keys, servers, peers)
	for i, k := range peers {
		from.observe(k, netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 51820))
	}
	to.holds(b, from)

	heap := func() uint64 {
		runtime.GC()
		runtime.GC() // what the first one only marked for the pools
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	var join []cost
	var weights []float64
	for round := range rounds {
		before := heap()
		var late *member
		join = append(join, measure(func() {
			late = startMember(b, fmt.Sprintf("gw-%d", round), keys, nil, []string{servers[0].Addr().String(), servers[1].Addr().String()}, peers)
			late.holds(b, from)
		}))
		weights = append(weights, (float64(heap())-float64(before))/stormPeers)
		late.close()
	}
	b.ReportMetric(0, "ns/op")
	wall := quantile(costs(join, func(c cost) time.Duration { return c.wall }), 0.5)
	b.ReportMetric(wall.Seconds(), "s-median")
	b.ReportMetric(quantile(weights, 0.5), "B-live/record")
	b.Logf("%s\nA node starts with an empty Table beside two that hold %d records: time from the start of its connections (TLS on\n"+
		"loopback) until its Table is theirs; %d rounds. A record and its peer take %.0f bytes of live heap in the new node\n"+
		"(Table, View, sets of changes), for one answer of %d records a frame.\n%s",
		kernel(), stormPeers, rounds, quantile(weights, 0.5), feed.MaxRecords, columns(func(w io.Writer) {
			fmt.Fprintln(w, rowHead)
			row(w, "late joiner", join)
		}))
}
