// SPDX-License-Identifier: MIT

package test

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/lab"
)

// same fails unless the devices of all gateways hold the same endpoints.
func same(t testing.TB, l *lab.Lab) {
	t.Helper()
	want, err := l.Gateways[0].Endpoints()
	if err != nil {
		t.Fatal(err)
	}
	for _, gw := range l.Gateways[1:] {
		got, err := gw.Endpoints()
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
			t.Fatalf("%s differs from %s (-%s +%s):\n%s", gw.Name, l.Gateways[0].Name, l.Gateways[0].Name, gw.Name, diff)
		}
	}
}

// percentile returns the p-th percentile, 0 to 100, of a sorted list.
func percentile(sorted []time.Duration, p int) time.Duration {
	return sorted[(len(sorted)-1)*p/100]
}

// TestRoams is the main job: peers roam at the active, and the standby's device
// follows each time.
func TestRoams(t *testing.T) {
	l := newLab(t, lab.Config{Clients: 20})
	a, h := l.Gateways[0], l.Gateways[1]
	nodes := startMesh(t, l)

	var atA, atH *watcher
	if l.Kernel {
		atA, atH = watch(t, a), watch(t, h)
		atA.says("following endpoint changes")
		atH.says("following endpoint changes")
	}
	for _, c := range l.Clients {
		ping(t, c)
		awaitEndpoint(t, h, c, c.Endpoint())
	}
	same(t, l)

	type step struct {
		peer wgroam.Key
		ep   netip.AddrPort
	}
	var steps []step
	for _, c := range l.Clients {
		steps = append(steps, step{c.Key(), c.Endpoint()})
	}
	const roams = 100
	for i := range roams {
		c := l.Clients[i%len(l.Clients)]
		ep := roam(t, c, i)
		awaitEndpoint(t, h, c, ep)
		same(t, l)
		steps = append(steps, step{c.Key(), ep})
	}

	for _, n := range nodes {
		s := n.status()
		if s.SweepRepairs != 0 || s.Lost != 0 || s.ApplyErrors != 0 {
			t.Errorf("%s: %+v", n.gw.Name, s)
		}
		t.Logf("%s: detector %s, %d changes, %d resyncs, %d applied", n.gw.Name, s.Detector.Rung, s.Events, s.Resyncs, s.Applied)
	}
	if !l.Kernel {
		return
	}

	// All of them, none twice, none false: the active's events are the steps.
	atA.find(steps[len(steps)-1].peer, steps[len(steps)-1].ep, 0)
	var got []step
	for _, e := range atA.seen() {
		if e.Cause == "config" {
			t.Errorf("the active's device was configured: %+v", e)
		}
		got = append(got, step{e.Peer, e.New})
	}
	if diff := cmp.Diff(steps, got, cmp.Comparer(func(a, b step) bool { return a == b })); diff != "" {
		t.Errorf("watch on the active (-want +got):\n%s", diff)
	}
	// The standby's device was only ever configured, once per step.
	var took []time.Duration
	for i, s := range steps {
		e := atH.find(s.peer, s.ep, 0)
		if e.Cause != "config" {
			t.Errorf("the standby's device learned by itself: %+v", e)
		}
		took = append(took, e.Time.Sub(atA.seen()[i].Time))
	}
	if n := len(atH.seen()); n != len(steps) {
		t.Errorf("the standby's device changed %d times, want %d", n, len(steps))
	}
	slices.Sort(took)
	t.Logf("authenticated by the active's kernel -> written in the standby's device, %d roams, times of both kernel hooks on one clock: median %v, p99 %v",
		len(took), percentile(took, 50), percentile(took, 99))
}

// TestConfigStays: what an administrator configures is shown, and is nobody
// else's business.
func TestConfigStays(t *testing.T) {
	l := newLab(t, lab.Config{})
	needKernel(t, l)
	a, h, c := l.Gateways[0], l.Gateways[1], l.Clients[0]
	nodes := startMesh(t, l)
	ping(t, c)
	real := c.Endpoint()
	awaitEndpoint(t, h, c, real)

	w := watch(t, a)
	w.says("following endpoint changes")
	admin := netip.MustParseAddrPort("192.0.2.99:4242")
	setEndpoint(t, a, c.Key(), admin)
	if e := w.find(c.Key(), admin, 0); e.Cause != "config" || e.Old != real {
		t.Errorf("watch shows %+v, want cause config, old %v", e, real)
	}

	// A later roam of another kind proves that everything before has arrived.
	sent := nodes[0].status().Feed.Sent
	ep := roam(t, c, 0)
	awaitEndpoint(t, h, c, ep)
	for _, e := range w.seen() {
		if e.New == admin && e.Cause != "config" {
			t.Errorf("configured endpoint came as %+v", e)
		}
	}
	if s := nodes[0].status(); s.Feed.Sent != sent+1 {
		t.Errorf("the active published %d records for one roam", s.Feed.Sent-sent)
	}
	if s := nodes[1].status(); s.Feed.Sent != 0 {
		t.Errorf("the standby published %d records of its own applier's writes", s.Feed.Sent)
	}
}

func setEndpoint(t testing.TB, gw *lab.Gateway, peer wgroam.Key, ep netip.AddrPort) {
	t.Helper()
	err := gw.WG().ConfigureDevice(gw.Device(), wgtypes.Config{Peers: []wgtypes.PeerConfig{{
		PublicKey: wgtypes.Key(peer), UpdateOnly: true, Endpoint: net.UDPAddrFromAddrPort(ep),
	}}})
	if err != nil {
		t.Fatal(err)
	}
}

// setKey gives a device a private key of its own.
func setKey(t testing.TB, gw *lab.Gateway, device string) {
	t.Helper()
	key, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	if err := gw.WG().ConfigureDevice(device, wgtypes.Config{PrivateKey: &key}); err != nil {
		t.Fatal(err)
	}
}

// moduleUsers returns the reference count of the wireguard module; attached
// programs hold one. Zero where there is no module.
func moduleUsers(t testing.TB, l *lab.Lab) int {
	t.Helper()
	if !l.Kernel {
		return 0
	}
	b, err := os.ReadFile("/sys/module/wireguard/refcnt")
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// bpfPins lists what is pinned in the BPF file system.
func bpfPins(t testing.TB) []string {
	t.Helper()
	var pins []string
	err := filepath.WalkDir("/sys/fs/bpf", func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // not mounted: nothing can be pinned
		}
		if err == nil && !d.IsDir() {
			pins = append(pins, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return pins
}

// TestLateAndRestarted: a standby that comes late has the table, and has it
// again after a restart.
func TestLateAndRestarted(t *testing.T) {
	l := newLab(t, lab.Config{Clients: 20})
	a, h := l.Gateways[0], l.Gateways[1]
	dirA, dirH := t.TempDir(), t.TempDir()
	nodeA := startNode(t, a, dirA, config(a, dirA, h))
	for i, c := range l.Clients {
		ping(t, c)
		ep := roam(t, c, i)
		awaitEndpoint(t, a, c, ep)
	}
	await(t, "the active has seen all", func() (bool, string) {
		s := nodeA.status()
		return s.Records == len(l.Clients), fmt.Sprintf("%+v", s)
	})

	late := startNode(t, h, dirH, config(h, dirH, a))
	for _, c := range l.Clients {
		awaitEndpoint(t, h, c, c.Endpoint())
	}
	same(t, l)

	if took := late.stop(); took > soon() {
		t.Errorf("the daemon took %v to stop", took)
	}
	for i, c := range l.Clients {
		ep := roam(t, c, i+1)
		awaitEndpoint(t, a, c, ep)
	}
	again := startNode(t, h, dirH, config(h, dirH, a))
	for _, c := range l.Clients {
		awaitEndpoint(t, h, c, c.Endpoint())
	}
	same(t, l)
	again.awaitNodes(1)
	if s := again.status(); s.Records != len(l.Clients) || s.Feed.Sent != 0 {
		t.Errorf("the late standby: %+v", s)
	}

	// The active's daemon restarts on live sessions and knows what it knew.
	nodeA.stop()
	for i, c := range l.Clients {
		ep := roam(t, c, i)
		awaitEndpoint(t, a, c, ep)
	}
	nodeA = startNode(t, a, dirA, config(a, dirA, h))
	for _, c := range l.Clients {
		awaitEndpoint(t, h, c, c.Endpoint())
	}
	same(t, l)
	nodeA.awaitNodes(1)
}

// soon is how long wgroam may take to end. An emulated kernel needs 0.7 to 0.9 s by itself
// to let go of the last hook.
func soon() time.Duration {
	if lab.InVM() {
		return 3 * time.Second
	}
	return time.Second
}

// TestStop: SIGTERM ends the daemon within a second, and it takes its programs
// with it.
func TestStop(t *testing.T) {
	l := newLab(t, lab.Config{})
	before := moduleUsers(t, l)
	nodes := startMesh(t, l)
	if l.Kernel && moduleUsers(t, l) <= before {
		t.Errorf("wireguard has %d users with the hooks attached, %d without", moduleUsers(t, l), before)
	}
	for _, n := range nodes {
		if took := n.stop(); took > soon() {
			t.Errorf("%s: took %v to stop, want %v at most", n.gw.Name, took, soon())
		}
		if n.err != nil {
			t.Errorf("%s: %v", n.gw.Name, n.err)
		}
	}
	// The kernel lets go of a program in the background.
	await(t, "the hooks are gone", func() (bool, string) {
		n := moduleUsers(t, l)
		return n == before, fmt.Sprintf("wireguard has %d users, %d before", n, before)
	})
	for _, p := range bpfPins(t) {
		t.Errorf("pinned object left behind: %s", p)
	}
}
