// SPDX-License-Identifier: MIT

//go:build !vm

package test

import (
	"crypto/rand"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/feed"
	"github.com/wgroam/wgroam/internal/snapshot"
)

// These benchmarks need neither root nor WireGuard, and an emulated machine
// would tell nothing more about them.

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
	kv := newKVPath(b)

	var storm, bare, watched []cost
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
		records := from.table.Records()
		w := measure(func() {
			go func() {
				for _, r := range records {
					kv.put(b, r)
				}
			}()
			for range records {
				<-kv.updates
			}
			<-kv.js.PublishAsyncComplete()
		})
		if round > 0 { // the first fills the tables
			storm, bare, watched, frames = append(storm, c), append(bare, r), append(watched, w), frames+n
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
		"as many bytes in as many bare NATS messages (%d on average) over the same server and the same kinds of connections,\n"+
		"and with as many puts into a JetStream key-value bucket in memory, until a watcher over loopback without TLS has them.\n%s",
		kernel(), stormPeers, rounds, frames/rounds, columns(func(w io.Writer) {
			fmt.Fprintln(w, rowHead)
			row(w, "wgroam", storm)
			row(w, "bare NATS", bare)
			row(w, "JetStream KV", watched)
		}))
}

// heap returns the bytes of live objects.
func heap() float64 {
	runtime.GC()
	runtime.GC() // what the first one only marked for the pools
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc)
}

// BenchmarkJoin measures how long a node without any record takes to have them
// all, and one that was away for a moment, and what they weigh.
func BenchmarkJoin(b *testing.B) {
	const rounds, stale = 5, 50
	keys, servers := twoServers(b)
	peers := randomKeys(stormPeers)
	from, to := twoMembers(b, keys, servers, peers)
	kv := newKVPath(b)
	for i, k := range peers {
		from.observe(k, netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 51820))
	}
	to.holds(b, from)
	old := from.table.Records()
	for i, r := range old {
		kv.put(b, r)
		if i < stale {
			from.observe(r.Peer, netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}), 51820))
		}
	}
	for range old {
		<-kv.updates
	}
	to.holds(b, from)

	var join, rejoin, watched []cost
	var weights []float64
	both := []string{servers[0].Addr().String(), servers[1].Addr().String()}
	for round := range rounds {
		before := heap()
		var late *member
		join = append(join, measure(func() {
			late = startMember(b, fmt.Sprintf("gw-%d", round), keys, nil, both, peers)
			late.holds(b, from)
		}))
		weights = append(weights, (heap()-before)/stormPeers)
		late.close()

		// What it knew is in its Table before its connections start, with which startMember ends.
		again := startMember(b, fmt.Sprintf("gw-again-%d", round), keys, nil, both, peers, old...)
		rejoin = append(rejoin, measure(func() { again.holds(b, from) }))
		again.close()

		watched = append(watched, measure(func() {
			updates, end := kv.watch(b)
			for range old {
				<-updates
			}
			end()
		}))
	}
	b.ReportMetric(0, "ns/op")
	wall := func(c cost) time.Duration { return c.wall }
	b.ReportMetric(quantile(costs(join, wall), 0.5).Seconds(), "s-join")
	b.ReportMetric(quantile(costs(rejoin, wall), 0.5).Seconds(), "s-rejoin")
	b.ReportMetric(quantile(weights, 0.5), "B-live/record")
	b.Logf("%s\nA node starts with an empty Table beside two that hold %d records: time from the start of its connections (TLS on\n"+
		"loopback) until its Table is theirs; and one whose Table differs from theirs in %d records; %d rounds, by turns with a\n"+
		"watcher that starts on a JetStream key-value bucket in memory with as many keys, over loopback without TLS; it gets all\n"+
		"of them in either case. A record takes, with its peer, %.0f bytes of live heap in the new node, after an answer of\n"+
		"%d records a frame.\n%s",
		kernel(), stormPeers, stale, rounds, quantile(weights, 0.5), feed.MaxRecords, columns(func(w io.Writer) {
			fmt.Fprintln(w, rowHead)
			row(w, "late joiner", join)
			row(w, "rejoin", rejoin)
			row(w, "JetStream KV", watched)
		}))
}

// BenchmarkSnapshot measures what the file of a table takes.
func BenchmarkSnapshot(b *testing.B) {
	const rounds = 5
	keys, err := feed.Derive([32]byte{8}, nil)
	if err != nil {
		b.Fatal(err)
	}
	peers := randomKeys(stormPeers)
	dir := b.TempDir()
	var write, load []cost
	size := int64(0)
	for range rounds {
		cfg := snapshot.Config{Dir: dir, Keys: keys, Table: wgroam.NewTable(keys.DigestKey()), Log: slog.New(slog.DiscardHandler)}
		f := snapshot.New(cfg)
		for i, k := range peers {
			cfg.Table.Merge(wgroam.Record{
				Peer: k, Cause: wgroam.CauseData, Version: wgroam.Version{HLC: wgroam.HLCAt(time.Now()), Node: 1},
				Endpoint: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 51820),
			})
		}
		write = append(write, measure(f.Close)) // as at the end of the daemon
		if s := f.Status(); s.Err != nil || s.Records != stormPeers {
			b.Fatalf("%+v", s)
		}
		info, err := os.Stat(f.Status().Path)
		if err != nil {
			b.Fatal(err)
		}
		size = info.Size()
		cfg.Table = wgroam.NewTable(keys.DigestKey())
		load = append(load, measure(func() {
			records, err := snapshot.New(cfg).Read()
			if err != nil || len(records) != stormPeers {
				b.Fatalf("%d records, %v", len(records), err)
			}
			for _, r := range records {
				cfg.Table.Merge(r)
			}
		}))
	}
	b.ReportMetric(0, "ns/op")
	b.Logf("%s\nThe snapshot of %d records, %d bytes: written with fsync and rename, and read into an empty Table; %d rounds.\n%s",
		kernel(), stormPeers, size, rounds, columns(func(w io.Writer) {
			fmt.Fprintln(w, rowHead)
			row(w, "write", write)
			row(w, "load", load)
		}))
}
