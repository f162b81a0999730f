// SPDX-License-Identifier: MIT

package test

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/bpf"
	"github.com/wgroam/wgroam/internal/lab"
	"github.com/wgroam/wgroam/internal/wg"
)

// quantile returns the q-th quantile, 0 to 1.
func quantile[T ~int64 | ~float64](values []T, q float64) T {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[int(q*float64(len(sorted)-1)+0.5)]
}

// columns aligns what f prints: cells end with a tab, rows with a line feed.
func columns(f func(w io.Writer)) string {
	var out strings.Builder
	w := tabwriter.NewWriter(&out, 0, 0, 2, ' ', tabwriter.AlignRight)
	f(w)
	w.Flush()
	return out.String()
}

func kernel() string {
	var u unix.Utsname
	_ = unix.Uname(&u) // cannot fail with a valid address
	return "Linux " + unix.ByteSliceToString(u.Release[:])
}

// benchLab returns a lab with kernel WireGuard.
func benchLab(b *testing.B, cfg lab.Config) *lab.Lab {
	b.Helper()
	if !lab.KernelWireGuard() {
		b.Skip("the kernel has no WireGuard, or this is not root")
	}
	return newLab(b, cfg)
}

// deviceOf returns how the kernel hook names a gateway's device.
func deviceOf(b *testing.B, gw *lab.Gateway) bpf.Device {
	b.Helper()
	var d bpf.Device
	err := gw.Do(func() error {
		netns, err := wg.Netns()
		if err != nil {
			return err
		}
		link, err := wg.LinkByName(gw.Device())
		d = bpf.Device{Ifindex: uint32(link.Ifindex), Netns: netns}
		return err
	})
	if err != nil {
		b.Fatal(err)
	}
	return d
}

// BenchmarkThroughput measures the same transfer with and without the hook.
func BenchmarkThroughput(b *testing.B) {
	l := benchLab(b, lab.Config{})
	gw, c := l.Gateways[0], l.Clients[0]
	ping(b, c)

	var listener net.Listener
	const port = 5001
	if err := gw.Do(func() (err error) {
		listener, err = net.Listen("tcp4", fmt.Sprintf(":%d", port))
		return err
	}); err != nil {
		b.Fatal(err)
	}
	defer listener.Close()
	ctx, cancel := context.WithTimeout(b.Context(), patience)
	defer cancel()
	tx, err := c.Dial(ctx, "tcp4", port)
	if err != nil {
		b.Fatal(err)
	}
	defer tx.Close()
	rx, err := listener.Accept()
	if err != nil {
		b.Fatal(err)
	}
	defer rx.Close()

	// The sender goes on between the measurements.
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		buf := make([]byte, 64<<10)
		for {
			if _, err := tx.Write(buf); err != nil {
				return
			}
		}
	}()
	defer func() { rx.Close(); tx.Close(); <-sent }()
	buf := make([]byte, 256<<10)
	rate := func(d time.Duration) float64 { // bytes a second
		start := time.Now()
		n := 0
		for time.Since(start) < d {
			got, err := rx.Read(buf)
			if err != nil {
				b.Fatal(err)
			}
			n += got
		}
		return float64(n) / time.Since(start).Seconds()
	}

	const rounds, stint, settle = 5, 3 * time.Second, 300 * time.Millisecond
	rate(2 * time.Second) // until TCP has found its speed
	var rates [2][]float64
	var ratios []float64
	for round := range rounds {
		var got [2]float64
		for i := range got {
			with := (i + round) % 2 // who begins takes turns, too
			if with == 1 {
				hook, err := bpf.Attach(1)
				if err == nil {
					err = hook.Follow(deviceOf(b, gw))
				}
				if err != nil {
					b.Fatal(err)
				}
				rate(settle)
				got[with] = rate(stint)
				if err := hook.Close(); err != nil {
					b.Fatal(err)
				}
			} else {
				rate(settle)
				got[with] = rate(stint)
			}
		}
		rates[0], rates[1] = append(rates[0], got[0]), append(rates[1], got[1])
		ratios = append(ratios, got[1]/got[0])
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(quantile(rates[1], 0.5)/1e6, "MB/s")
	b.ReportMetric(quantile(ratios, 0.5), "ratio")
	b.Logf("%s\nTCP, one connection, client to gateway through kernel WireGuard; %d rounds of %v without and %v with the hook,\n"+
		"attached and following the gateway's device; who begins takes turns. Client and gateway share the kernel: the\n"+
		"hook runs for the acknowledgements at the client as well. Ratio: with / without, median of the rounds.\n%s",
		kernel(), rounds, stint, stint, columns(func(w io.Writer) {
			fmt.Fprintln(w, "MB/s without\twith\tratio\tlowest\thighest\t")
			fmt.Fprintf(w, "%.2f\t%.2f\t%.3f\t%.3f\t%.3f\t\n", quantile(rates[0], 0.5)/1e6, quantile(rates[1], 0.5)/1e6,
				quantile(ratios, 0.5), slices.Min(ratios), slices.Max(ratios))
		}))
}

// change is an endpoint that a gateway's device has come by.
type change struct {
	device   bpf.Device
	peer     wgroam.Key
	endpoint netip.AddrPort
}

// recorder hears of both devices' changes from one kernel hook of its own: their
// times are the kernel's, on one clock, and nothing has to be started beside
// the daemons.
type recorder struct {
	b      *testing.B
	hook   *bpf.Hook
	events chan bpf.Event
	times  map[change]time.Duration // CLOCK_BOOTTIME
}

func record(b *testing.B, gateways ...*lab.Gateway) *recorder {
	b.Helper()
	r := &recorder{b: b, events: make(chan bpf.Event, 1<<16), times: make(map[change]time.Duration)}
	var err error
	if r.hook, err = bpf.Attach(1 << 14); err != nil {
		b.Fatal(err)
	}
	for _, gw := range gateways {
		if err := r.hook.Follow(deviceOf(b, gw)); err != nil {
			b.Fatal(err)
		}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			e, _, err := r.hook.Read()
			if err != nil {
				return
			}
			select {
			case r.events <- e:
			default: // wait will say what is missing
			}
		}
	}()
	b.Cleanup(func() {
		if err := r.hook.Close(); err != nil {
			b.Error(err)
		}
		<-done
	})
	return r
}

// wait returns when the kernel of a device took an endpoint.
func (r *recorder) wait(c change) time.Duration {
	r.b.Helper()
	timeout := time.After(2 * patience)
	for {
		if at, ok := r.times[c]; ok {
			return at
		}
		select {
		case e := <-r.events:
			r.times[change{e.Device, e.Peer, e.New}] = e.Boot
		case <-timeout:
			r.b.Fatalf("no sign of %+v", c)
		}
	}
}

// addPeers configures so many more peers, which stay silent, on all gateways.
// It returns their keys.
func addPeers(b *testing.B, l *lab.Lab, n int) []wgroam.Key {
	b.Helper()
	keys := make([]wgroam.Key, n)
	for i := range keys {
		_, _ = rand.Read(keys[i][:]) // never fails
	}
	for chunk := range slices.Chunk(keys, wg.ChunkPeers) {
		var cfg wgtypes.Config
		for _, k := range chunk {
			cfg.Peers = append(cfg.Peers, wgtypes.PeerConfig{PublicKey: wgtypes.Key(k)})
		}
		for _, gw := range l.Gateways {
			if err := gw.WG().ConfigureDevice(gw.Device(), cfg); err != nil {
				b.Fatal(err)
			}
		}
	}
	return keys
}

// latencies are those of one way to keep the standby informed.
type latencies struct {
	name string
	took []time.Duration
}

// BenchmarkLatency measures the time from a packet, authenticated by the
// active's kernel, to the new endpoint in the standby's device: by wgroam, by
// the script that people use, and by wgroam where it has to poll.
func BenchmarkLatency(b *testing.B) {
	for _, peers := range []int{10, 1_000, 10_000} {
		b.Run(fmt.Sprintf("peers=%d", peers), func(b *testing.B) { latency(b, peers) })
	}
}

func latency(b *testing.B, peers int) {
	const clients, roams = 10, 100
	l := benchLab(b, lab.Config{Clients: clients})
	a, h := l.Gateways[0], l.Gateways[1]
	addPeers(b, l, peers-clients)
	rec := record(b, a, h)
	atA, atH := deviceOf(b, a), deviceOf(b, h)
	for _, c := range l.Clients {
		ping(b, c)
	}
	seen := func(c *lab.Client, ep netip.AddrPort) time.Duration {
		return rec.wait(change{atH, c.Key(), ep}) - rec.wait(change{atA, c.Key(), ep})
	}

	// One roam after the other.
	hook := latencies{name: "wgroam"}
	nodes := startMesh(b, l)
	for _, c := range l.Clients {
		rec.wait(change{atH, c.Key(), c.Endpoint()})
	}
	var memory []int
	for i := range roams {
		c := l.Clients[i%clients]
		hook.took = append(hook.took, seen(c, roam(b, c, i)))
	}
	for _, n := range nodes {
		if s := n.status(); s.Lost != 0 || s.SweepRepairs != 0 || s.ApplyErrors != 0 {
			b.Errorf("%s: %+v", n.gw.Name, s)
		}
		memory = append(memory, resident(b, n.process))
		n.stop()
	}

	// What polls does not see one roam after the other: all clients roam at some
	// time of an interval.
	polled := func(name string) latencies {
		out := latencies{name: name}
		for i := range roams / clients {
			eps := make([]netip.AddrPort, clients)
			for j, c := range l.Clients {
				<-time.After(mathrand.N(2 * time.Second / clients))
				eps[j] = roam(b, c, i+j)
			}
			for j, c := range l.Clients {
				out.took = append(out.took, seen(c, eps[j]))
			}
		}
		return out
	}
	p := startScript(b, a, h)
	script := polled("wg show, wg set")
	p.stop()

	dirA, dirH := b.TempDir(), b.TempDir()
	every := strings.NewReplacer(`"20ms"`, `"1s"`)
	nodeH := startNode(b, h, dirH, every.Replace(config(h, dirH, a)))
	nodeA := startPolling(b, a, dirA, every.Replace(config(a, dirA, h)))
	nodeH.awaitNodes(1)
	nodeA.awaitNodes(1)
	poll := polled("wgroam, polling")
	nodeA.stop()
	nodeH.stop()

	b.ReportMetric(0, "ns/op")
	b.ReportMetric(quantile(hook.took, 0.5).Seconds()*1e3, "ms-p50")
	b.ReportMetric(quantile(hook.took, 0.99).Seconds()*1e3, "ms-p99")
	b.ReportMetric(float64(memory[0]), "B-resident")
	b.Logf("%s, %d peers, of which %d roam %d times in all and the others are silent\n%s\n%s",
		kernel(), peers, clients, roams, latencyMethod, plot(hook, poll, script))
}
