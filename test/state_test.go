// SPDX-License-Identifier: MIT

package test

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/control"
	"github.com/wgroam/wgroam/internal/feed"
	"github.com/wgroam/wgroam/internal/lab"
)

// checkFeed runs what keepalived runs, and returns its exit status and what it said.
func checkFeed(t testing.TB, socket string) (status int, stderr string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), binary(t), "check", "--feed", "--socket", socket)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		status = exit.ExitCode()
	} else if err != nil {
		t.Fatal(err)
	}
	if out.Len() > 0 || (status == 0) != (errs.Len() == 0) {
		t.Errorf("exit status %d with %q on standard output and %q on standard error", status, &out, &errs)
	}
	return status, errs.String()
}

// TestInStep: check --feed tells keepalived whether a node's table is that of the
// group.
func TestInStep(t *testing.T) {
	l := newLab(t, lab.Config{})
	nodes := startMesh(t, l)
	a, h := nodes[0], nodes[1]
	want := func(what string, status int, reason string) {
		t.Helper()
		await(t, what, func() (bool, string) {
			got, why := checkFeed(t, a.socket)
			return got == status && strings.Contains(why, reason), fmt.Sprintf("exit status %d: %s", got, why)
		})
	}
	want("both are in step", 0, "")
	began := time.Now()
	const times = 10
	for range times {
		checkFeed(t, a.socket)
	}
	t.Logf("check --feed: %v, mean of %d", (time.Since(began) / times).Round(100*time.Microsecond), times)

	signal := func(p *process, s syscall.Signal) {
		t.Helper()
		if err := p.cmd.Process.Signal(s); err != nil {
			t.Fatal(err)
		}
	}
	signal(h.process, syscall.SIGSTOP)
	want("the other one hangs", 1, "node gw-"+h.gw.Name+" is stale ")
	signal(h.process, syscall.SIGCONT)
	want("the other one goes on", 0, "")
	a.stop()
	want("the daemon is dead", 1, "no daemon answers")
}

// TestLatePeer: a record of a peer that the device does not have waits, and is
// applied when configuration management adds the peer, also when it had it before.
func TestLatePeer(t *testing.T) {
	remove := func(t testing.TB, gw *lab.Gateway, peer wgtypes.Key) {
		t.Helper()
		err := gw.WG().ConfigureDevice(gw.Device(), wgtypes.Config{Peers: []wgtypes.PeerConfig{{PublicKey: peer, Remove: true}}})
		if err != nil {
			t.Fatal(err)
		}
	}
	add := func(t testing.TB, gw *lab.Gateway, peer wgtypes.Key) {
		t.Helper()
		if err := gw.WG().ConfigureDevice(gw.Device(), wgtypes.Config{Peers: []wgtypes.PeerConfig{{PublicKey: peer}}}); err != nil {
			t.Fatal(err)
		}
	}
	waiting := func(n *node, want int) {
		t.Helper()
		await(t, fmt.Sprintf("%d records wait", want), func() (bool, string) {
			s := n.status()
			return s.Records == 1 && s.Waiting == want, fmt.Sprintf("%+v", s)
		})
	}
	l := newLab(t, lab.Config{})
	a, h, c := l.Gateways[0], l.Gateways[1], l.Clients[0]
	peer := wgtypes.Key(c.Key())
	remove(t, h, peer)
	nodes := startMesh(t, l)
	ping(t, c)
	waiting(nodes[1], 1)
	ep := roam(t, c, 0)
	awaitEndpoint(t, a, c, ep)

	// The sweep, which would find it as well, comes five minutes after the start.
	began := time.Now()
	add(t, h, peer)
	awaitEndpoint(t, h, c, ep)
	t.Logf("%s: applied %v after the peer was added", nodes[1].status().Detector.Rung, time.Since(began).Round(time.Millisecond))
	waiting(nodes[1], 0)

	// Gone, and back.
	nodes[1].stop()
	dir := t.TempDir()
	nodes[1] = startNode(t, h, dir, strings.Replace(config(h, dir, a), "[nats]", "sweep_interval = \"1s\"\n[nats]", 1))
	awaitEndpoint(t, h, c, ep)
	remove(t, h, peer)
	waiting(nodes[1], 1)
	ep = roam(t, c, 1)
	awaitEndpoint(t, a, c, ep)
	add(t, h, peer)
	awaitEndpoint(t, h, c, ep)
}

// TestReadOnlyState: where the state cannot be kept, the daemon says so, and goes on.
func TestReadOnlyState(t *testing.T) {
	l := newLab(t, lab.Config{})
	a, h, c := l.Gateways[0], l.Gateways[1], l.Clients[0]
	state := t.TempDir()
	if err := unix.Mount("tmpfs", state, "tmpfs", unix.MS_RDONLY, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(state, 0); err != nil {
			t.Error(err)
		}
	})
	var nodes []*node
	for _, gw := range l.Gateways {
		dir := t.TempDir()
		cfg := config(gw, dir, others(l, gw)...)
		nodes = append(nodes, startNode(t, gw, dir, strings.Replace(cfg, fmt.Sprintf("dir = %q", dir), fmt.Sprintf("dir = %q", state), 1)))
	}
	for _, n := range nodes {
		n.awaitNodes(1)
	}
	ping(t, c)
	for i := range 3 {
		awaitEndpoint(t, h, c, roam(t, c, i))
	}
	for _, n := range nodes {
		await(t, n.gw.Name+" says that its state is not kept", func() (bool, string) {
			s := n.status()
			return strings.Contains(s.Snapshot.Error, "read-only file system") && s.Snapshot.Errors > 0 && s.Snapshot.Writes == 0 &&
				strings.Contains(s.LastError, s.Snapshot.Error), fmt.Sprintf("%+v", s)
		})
		if said := strings.Count(n.stderr.String(), "in memory only"); said != 1 {
			t.Errorf("%s said so %d times", n.gw.Name, said)
		}
	}
	awaitEndpoint(t, a, c, c.Endpoint())
}

// TestAgeing: what is older than the newest record by more than max_age is forgotten by all
// nodes, and comes back neither from a snapshot nor from the bus. A client that goes on is not.
func TestAgeing(t *testing.T) {
	if lab.InVM() {
		t.Skip("nothing here depends on the kernel, and this one is emulated")
	}
	l := newLab(t, lab.Config{Gateways: []string{"a", "h", "bus"}})
	ns, nc := runServer(t, l.Gateways[2])
	t.Cleanup(func() { nc.Close(); ns.Shutdown(); ns.WaitForShutdown() })
	var nodes []*node
	for _, gw := range l.Gateways[:2] {
		dir := t.TempDir()
		// So that a record of soon makes others old now.
		cfg := onBus(gw, dir, "nats://"+ns.Addr().String()) + "[feed]\nmax_age = \"1h\"\nmax_skew = \"25m\"\n"
		nodes = append(nodes, startNode(t, gw, dir, cfg))
	}
	for _, n := range nodes {
		n.awaitNodes(1)
	}
	c := l.Clients[0]
	ping(t, c)

	dev, err := l.Gateways[0].WG().Device(l.Gateways[0].Device())
	if err != nil {
		t.Fatal(err)
	}
	keys, err := feed.Derive(dev.PrivateKey, nil)
	if err != nil {
		t.Fatal(err)
	}
	link, err := feed.New(feed.Config{Name: "gw-z", Keys: keys, Server: ns, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	link.Start()
	t.Cleanup(link.Close)
	says := func(peer byte, ago time.Duration) {
		t.Helper()
		r := wgroam.Record{
			Peer: wgroam.Key{peer}, Endpoint: netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, 100, peer}), 1), Cause: wgroam.CauseData,
			Version: wgroam.Version{HLC: wgroam.HLCAt(time.Now().Add(-ago)), Node: link.Self()},
		}
		await(t, "published", func() (bool, string) {
			err := link.Publish([]wgroam.Record{r})
			return err == nil, fmt.Sprint(err)
		})
	}
	has := func(n *node, want int) {
		t.Helper()
		await(t, fmt.Sprintf("%s has %d records", n.gw.Name, want), func() (bool, string) {
			got := n.status().Records
			return got == want, fmt.Sprint(got)
		})
	}
	const old, kept, soon = 1, 2, 3
	says(old, 50*time.Minute)
	says(kept, 30*time.Minute)
	for _, n := range nodes {
		has(n, 3)
	}
	nodes[1].stop() // with all of them in its snapshot
	says(soon, -20*time.Minute)
	await(t, "the newest in the table", func() (bool, string) {
		return slices.ContainsFunc(nodes[0].peers(), func(p control.Peer) bool { return p.Peer == wgroam.Key{soon} }), "not yet"
	})
	has(nodes[0], 3)
	cfg, err := os.ReadFile(nodes[1].file)
	if err != nil {
		t.Fatal(err)
	}
	nodes[1] = startNode(t, nodes[1].gw, filepath.Dir(nodes[1].file), string(cfg))
	for _, n := range nodes {
		n.awaitNodes(1)
	}
	refused := nodes[0].status().Feed.Refused["aged"]
	says(old, 50*time.Minute)
	await(t, "the old record refused", func() (bool, string) {
		got := nodes[0].status().Feed.Refused["aged"]
		return got > refused, fmt.Sprint(got)
	})
	for _, n := range nodes {
		n.awaitNodes(1)
		got := make(map[wgroam.Key]bool)
		for _, p := range n.peers() {
			got[p.Peer] = p.Endpoint.IsValid()
		}
		want := map[wgroam.Key]bool{{kept}: true, {soon}: true, c.Key(): true}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: peers (-want +got)\n%s", n.gw.Name, diff)
		}
	}
	awaitEndpoint(t, l.Gateways[1], c, roam(t, c, 0))
}
