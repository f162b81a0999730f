// SPDX-License-Identifier: MIT

package test

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"log/slog"
	"math"
	mathrand "math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/bpf"
	"github.com/wgroam/wgroam/internal/feed"
	"github.com/wgroam/wgroam/internal/lab"
	"github.com/wgroam/wgroam/internal/natsd"
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

// change is an endpoint that a gateway's device has come by.
type change struct {
	device   bpf.Device
	peer     wgroam.Key
	endpoint netip.AddrPort
}

// hookRecorder hears of changes from a kernel hook of its own: their times are
// the kernel's, on one clock, and no other process has to be awake while the
// daemons work.
type hookRecorder struct {
	b      *testing.B
	hook   *bpf.Hook
	events chan bpf.Event
	times  map[change]time.Duration // CLOCK_BOOTTIME
}

func recordHook(b *testing.B, gateways ...*lab.Gateway) *hookRecorder {
	b.Helper()
	r := &hookRecorder{b: b, events: make(chan bpf.Event, 1<<10), times: make(map[change]time.Duration)}
	var err error
	if r.hook, err = bpf.Attach(1 << 14); err != nil {
		b.Fatal(err)
	}
	for _, gw := range gateways {
		if err := r.hook.Follow(deviceOf(b, gw)); err != nil {
			b.Fatal(err)
		}
	}
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			e, _, err := r.hook.Read()
			if err != nil {
				return
			}
			select {
			case r.events <- e:
			case <-stop:
				return
			}
		}
	}()
	b.Cleanup(func() {
		close(stop)
		if err := r.hook.Close(); err != nil {
			b.Error(err)
		}
		<-done
	})
	return r
}

// wait returns when the kernel of a device took an endpoint.
func (r *hookRecorder) wait(c change) time.Duration {
	r.b.Helper()
	timeout := time.After(2 * patience)
	for {
		if at, ok := r.times[c]; ok {
			delete(r.times, c) // a peer may come back to where it was
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

// addPeers configures so many more peers, which stay silent, on the gateways.
// It returns their keys.
func addPeers(b *testing.B, n int, gateways ...*lab.Gateway) []wgroam.Key {
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
		for _, gw := range gateways {
			if err := gw.WG().ConfigureDevice(gw.Device(), cfg); err != nil {
				b.Fatal(err)
			}
		}
	}
	return keys
}

// latencies are those of one way to do something.
type latencies struct {
	name string
	took []time.Duration
}

// plot prints them as numbers and on a logarithmic scale: from the median, *,
// to the 99th percentile.
func plot(all ...latencies) string {
	return columns(func(w io.Writer) {
		fmt.Fprintln(w, "p50\tp90\tp99\tworst\t \t")
		for _, l := range all {
			q := func(q float64) time.Duration { return quantile(l.took, q).Round(10 * time.Microsecond) }
			fmt.Fprintf(w, "%v\t%v\t%v\t%v\t%s\t|%s|\n", q(0.5), q(0.9), q(0.99), q(1), l.name, bar(quantile(l.took, 0.5), quantile(l.took, 0.99)))
		}
		fmt.Fprintf(w, "\t\t\t\t\t %s\n", barScale)
	})
}

// The scale of bar.
const (
	barFrom   = 10 * time.Microsecond
	barWidth  = 49 // two columns more than six decades of eight
	barScale  = "10us    100us   1ms     10ms    100ms   1s      10s"
	barDecade = 8
)

// bar draws a median and a 99th percentile.
func bar(median, p99 time.Duration) string {
	at := func(d time.Duration) int {
		return max(0, min(barWidth-1, int(barDecade*math.Log10(float64(d)/float64(barFrom)))))
	}
	line := []byte(strings.Repeat(" ", barWidth))
	for i := at(median); i <= at(p99); i++ {
		line[i] = '-'
	}
	line[at(median)] = '*'
	return string(line)
}

// BenchmarkLatency measures the time from a packet, authenticated by the
// active's kernel, to the new endpoint in the standby's device: by wgroam, by
// the script that people use, and by wgroam where it has to poll.
func BenchmarkLatency(b *testing.B) {
	for _, peers := range sizes {
		b.Run(fmt.Sprintf("peers=%d", peers), func(b *testing.B) { latency(b, peers) })
	}
}

// sizes are the numbers of peers in a device.
var sizes = []int{10, 1_000, 10_000}

func latency(b *testing.B, peers int) {
	const clients, roams = 10, 100
	l := benchLab(b, lab.Config{Clients: clients})
	a, h := l.Gateways[0], l.Gateways[1]
	addPeers(b, peers-clients, a, h)
	rec := recordHook(b, a, h)
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
		seen(c, c.Endpoint())
	}
	for i := range roams {
		c := l.Clients[i%clients]
		hook.took = append(hook.took, seen(c, roam(b, c, i)))
	}
	for _, n := range nodes {
		if s := n.status(); s.Lost != 0 || s.SweepRepairs != 0 || s.ApplyErrors != 0 {
			b.Errorf("%s: %+v", n.gw.Name, s)
		}
		n.stop()
	}

	// What polls does not see one roam after the other: each client roams once
	// in about two intervals.
	polled := func(name string) latencies {
		out := latencies{name: name}
		for i := range roams / clients {
			eps := make([]netip.AddrPort, clients)
			for j, c := range l.Clients {
				<-time.After(mathrand.N(2 * 2 * time.Second / clients))
				eps[j] = roam(b, c, i+j)
			}
			for j, c := range l.Clients {
				out.took = append(out.took, seen(c, eps[j]))
			}
		}
		return out
	}
	ctx, cancel := context.WithCancel(b.Context())
	ended := make(chan error, 1)
	go func() { ended <- script(ctx, a, h) }()
	scripted := polled("wg show, wg set")
	cancel()
	if err := <-ended; err != nil {
		b.Error(err)
	}
	nodes = startPolling(b, a, h)
	poll := polled("wgroam, polling")
	for _, n := range nodes {
		n.stop()
	}

	b.ReportMetric(0, "ns/op")
	b.ReportMetric(quantile(hook.took, 0.5).Seconds()*1e3, "ms-p50")
	b.ReportMetric(quantile(hook.took, 0.99).Seconds()*1e3, "ms-p99")
	b.ReportMetric(quantile(scripted.took, 0.5).Seconds()/quantile(hook.took, 0.5).Seconds(), "script/wgroam")
	b.Logf("%s, %d peers in both devices: %d clients roam %d times in all for each row, the other peers are silent\n"+
		"From the packet, authenticated by the active's kernel, to the endpoint in the standby's device; both times are the\n"+
		"kernel hook's, on one clock. Everything runs in this machine. The script runs wg(8) every second, and does not\n"+
		"have to log in to the other gateway; wgroam, polling also reads the device every second.\n%s",
		kernel(), peers, clients, roams, plot(hook, poll, scripted))
}

// startPolling starts a mesh whose first gateway has to poll, every second.
func startPolling(b *testing.B, a, h *lab.Gateway) []*node {
	b.Helper()
	dirA, dirH := b.TempDir(), b.TempDir()
	nodeH := startNode(b, h, dirH, config(h, dirH, a))

	nodeA := &node{gw: a, socket: filepath.Join(dirA, "control.sock"), file: filepath.Join(dirA, "wgroam.toml")}
	cfg := strings.Replace(config(a, dirA, h), `poll_interval = "20ms"`, `poll_interval = "1s"`, 1)
	if err := os.WriteFile(nodeA.file, []byte(cfg), 0o600); err != nil {
		b.Fatal(err)
	}
	nodeA.process = confined(b, a, confinement{Caps: forPolling}, "run", "--config", nodeA.file)
	nodeA.says("following endpoint changes by polling")
	nodeA.awaitNodes(1)
	nodeH.awaitNodes(1)
	return []*node{nodeA, nodeH}
}

// BenchmarkPeers measures what peers cost a daemon: its memory, and how long
// it takes to write the endpoints of all of them into the device.
func BenchmarkPeers(b *testing.B) {
	var all []burden
	sizes := append(slices.Clip(sizes), 100_000)
	for _, peers := range sizes {
		b.Run(fmt.Sprintf("peers=%d", peers), func(b *testing.B) {
			all = append(all, carry(b, peers))
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(all[len(all)-1].full.all/1e6, "MB-resident")
			b.ReportMetric(all[len(all)-1].rate(), "peers/s")
			if len(all) == len(sizes) {
				b.Logf("%s\n%s", kernel(), burdens(all)) // testing prints ten lines, no more
			}
		})
	}
}

// burden is what so many peers cost.
type burden struct {
	peers      int
	idle, full weight
	storm      time.Duration
}

func (c burden) rate() float64 { return float64(c.peers) / c.storm.Seconds() }

func burdens(all []burden) string {
	least, most := all[0], all[len(all)-1]
	each := func(f func(burden) float64) float64 { return (f(most) - f(least)) / float64(most.peers-least.peers) }
	return fmt.Sprintf("A daemon's VmRSS, and RssAnon, which leaves out the program file and the ring buffer: as configured, and when another\n"+
		"node has seen every peer. Storm: from the first of its records in its Table to the last endpoint in our device.\n%s"+
		"A peer without record takes %.0f bytes, with one %.0f (anonymous, from the difference of %d and %d peers).",
		columns(func(w io.Writer) {
			fmt.Fprintln(w, "peers\tresident\tanonymous\twith records\tanonymous\tstorm\tpeers/s\t")
			for _, c := range all {
				fmt.Fprintf(w, "%d\t%.1f MB\t%.1f MB\t%.1f MB\t%.1f MB\t%v\t%.0f\t\n", c.peers, c.idle.all/1e6, c.idle.anonymous/1e6,
					c.full.all/1e6, c.full.anonymous/1e6, c.storm.Round(time.Millisecond), c.rate())
			}
		}), each(func(c burden) float64 { return c.idle.anonymous }), each(func(c burden) float64 { return c.full.anonymous }),
		least.peers, most.peers)
}

func carry(b *testing.B, peers int) burden {
	l := benchLab(b, lab.Config{Gateways: []string{"h", "x"}})
	h, x := l.Gateways[0], l.Gateways[1]
	silent := addPeers(b, peers, h)
	rec := recordHook(b, h)

	// The other node lives in this process. Only its server has to be in the
	// namespace: the daemon connects to it.
	d, err := x.WG().Device(x.Device())
	if err != nil {
		b.Fatal(err)
	}
	keys, err := feed.Derive(d.PrivateKey, nil)
	if err != nil {
		b.Fatal(err)
	}
	var server *natsd.Server
	if err := x.Do(func() (err error) {
		server, err = natsd.Start(b.Context(), netip.AddrPortFrom(x.Addr4, 4950).String(), slog.New(slog.DiscardHandler))
		return err
	}); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(server.Shutdown)
	server.AddGroup(keys)
	other := startMember(b, "gw-x", keys, server, nil, silent)
	dir := b.TempDir()
	node := startNode(b, h, dir, config(h, dir, x))
	node.awaitNodes(1)

	out := burden{peers: peers, idle: weigh(b, node.process)}
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		b.Fatal(err)
	}
	start := time.Duration(now.Nano())
	ep := netip.MustParseAddrPort("192.0.2.1:51820")
	go func() {
		for _, k := range silent {
			other.observe(k, ep)
		}
	}()
	// In the longest storm this process may miss an event, which is no reason to
	// wait for it for ever.
	look, deadline := time.NewTicker(5*time.Second), time.Now().Add(5*time.Minute)
	defer look.Stop()
	for written := 0; written < peers; {
		select {
		case e := <-rec.events:
			if e.New == ep {
				written, out.storm = written+1, e.Boot-start
			}
		case <-look.C:
			if s := node.status(); s.Applied == uint64(peers) {
				written = peers
			} else if time.Now().After(deadline) {
				b.Fatalf("%d of %d endpoints written: %+v", written, peers, s)
			}
		}
	}
	out.full = weigh(b, node.process)
	if s := node.status(); s.ApplyErrors != 0 || s.Records != peers {
		b.Errorf("%+v", s)
	}
	node.stop()
	return out
}

// weight is the resident memory of a daemon, in bytes.
type weight struct{ all, anonymous float64 }

func weigh(b *testing.B, p *process) weight {
	b.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		b.Fatal(err)
	}
	field := func(name string) float64 {
		for line := range strings.Lines(string(text)) {
			if rest, ok := strings.CutPrefix(line, name+":"); ok {
				n, err := strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(rest), " kB"))
				if err != nil {
					b.Fatal(err)
				}
				return float64(n) * 1024
			}
		}
		b.Fatalf("no %s in %s", name, text)
		return 0
	}
	return weight{field("VmRSS"), field("RssAnon")}
}
