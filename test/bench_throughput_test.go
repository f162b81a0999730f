// SPDX-License-Identifier: MIT

package test

import (
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/wgroam/wgroam/internal/control"
	"github.com/wgroam/wgroam/internal/lab"
)

// BenchmarkThroughput compares what goes through a gateway without and with a
// daemon, by whatever rung follows the device: kernel WireGuard where the
// kernel has it, and wireguard-go.
func BenchmarkThroughput(b *testing.B) {
	b.Run("kernel", func(b *testing.B) {
		if !lab.KernelWireGuard() {
			b.Skip("the kernel has no WireGuard, or this is not root")
		}
		throughput(b, lab.Config{}, 40, 400)
	})
	b.Run("wireguard-go", func(b *testing.B) {
		packets := 40_000
		if lab.KernelWireGuard() {
			packets = 400 // the machine is emulated
		}
		throughput(b, lab.Config{Userspace: true}, 10, packets)
	})
}

func throughput(b *testing.B, cfg lab.Config, rounds, packets int) {
	const turns, size = 5, 1392 // fills the tunnel's MTU of 1420
	l := newLab(b, cfg)
	gw := l.Gateways[0]
	ping(b, l.Clients[0])
	stream, err := lab.NewStream(b.Context(), l.Clients[0], gw)
	if err != nil {
		b.Fatal(err)
	}
	defer stream.Close()
	push := func() float64 { // MB/s
		took, err := stream.Push(packets, size)
		if err != nil {
			b.Fatal(err)
		}
		return float64(packets*size) / took.Seconds() / 1e6
	}
	push() // warm up

	// Starting a daemon takes longer than a measurement, so each start counts for
	// several, in the order without, with, with, without.
	var mb [2][]float64
	rung := ""
	take := func(with int) {
		if with == 1 {
			dir := b.TempDir()
			// The default: a session that is older than the program at the port is polled.
			n := startNode(b, gw, dir, strings.Replace(config(gw, dir), `poll_interval = "20ms"`, `poll_interval = "1s"`, 1))
			await(b, "the device is followed", func() (bool, string) {
				rung = n.status().Detector.Rung
				return rung != control.RungNone, rung
			})
			defer n.stop()
		}
		push()
		for range turns {
			mb[with] = append(mb[with], push())
		}
	}
	b.ReportMetric(0, "ns/op")
	var ratios []float64 // of each round, so that what else the machine does matters less
	for range rounds {
		var from [2]int
		for i := range mb {
			from[i] = len(mb[i])
		}
		for _, with := range []int{0, 1, 1, 0} {
			take(with)
		}
		ratios = append(ratios, quantile(mb[1][from[1]:], 0.5)/quantile(mb[0][from[0]:], 0.5))
	}
	b.ReportMetric(quantile(mb[1], 0.5), "MB/s")
	b.ReportMetric(quantile(ratios, 0.5), "ratio")
	b.Logf("%s\nUDP from a client to a gateway through the tunnel, datagrams of %d bytes, 64 under way; client and gateway share the machine.\n"+
		"%d rounds of four blocks of %d x %d datagrams: without a daemon at the gateway, with one (%s), with, without.\n%s"+
		"with/without, medians of a round: median %.3f, quartiles %.3f to %.3f",
		kernel(), size, rounds, turns, packets, rung,
		columns(func(w io.Writer) {
			fmt.Fprintln(w, "\tMB/s, median\tquartiles\t")
			for i, name := range []string{"without", "with"} {
				fmt.Fprintf(w, "%s\t%.1f\t%.1f to %.1f\t\n", name, quantile(mb[i], 0.5), quantile(mb[i], 0.25), quantile(mb[i], 0.75))
			}
		}), quantile(ratios, 0.5), quantile(ratios, 0.25), quantile(ratios, 0.75))
}
