// SPDX-License-Identifier: MIT

package failover

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/wg"
)

// TestMemoryFull: nothing is taken from a device while that cannot be written,
// however often it is tried; and it is written as soon as it can be.
func TestMemoryFull(t *testing.T) {
	inNamespace(t)
	d := upLink(t)
	dir := filepath.Join(t.TempDir(), "state")
	k, desk := testKeeper(t, dir, "down", d)
	k.cfg.Device = &crash{fakeDevice: d, left: 1000}
	if err := os.WriteFile(dir, nil, 0o600); err != nil { // in the place of the directory
		t.Fatal(err)
	}
	if err := desk.Say(ByVerb, Standby); err == nil {
		t.Error("a word was kept")
	}
	for range 3 {
		k.Step(t.Context())
		if err := k.Status().Err; err == nil || !strings.Contains(err.Error(), "state.dir") {
			t.Errorf("without a memory: %v", err)
		}
		if !isUp(t) || d.peers[peerKey(0)].Keepalive == 0 {
			t.Error("something was taken")
		}
		if says := k.gate.says(); says != shut(51820) {
			t.Errorf("the gate says %q", says)
		}
	}
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	k.Step(t.Context())
	if err := k.Status().Err; err != nil {
		t.Error(err)
	}
	if isUp(t) || d.peers[peerKey(0)].Keepalive != 0 {
		t.Error("the device is not quiet")
	}
	m, err := OpenMemory(dir, "wg0")
	if err != nil || m.data.Words.Verb != Standby || !m.data.Gate || m.data.Taken == nil || m.data.Taken.Keepalives[peerKey(0)] != time.Minute {
		t.Errorf("the file has %+v, error %v", m.data, err)
	}
}

// TestMemoryPorts: the ports that were shut are known when the host has restarted, and
// shut before there is a device; and those that a device had before are forgotten.
func TestMemoryPorts(t *testing.T) {
	inNamespace(t)
	d := upLink(t)
	dir := t.TempDir()
	k, desk := testKeeper(t, dir, "down", d)
	c := &crash{fakeDevice: d, left: 1000}
	k.cfg.Device = c
	desk.mustSay(t, ByVerb, Standby)
	step := func(port int, want ...int) {
		t.Helper()
		c.port = port
		k.dumped = time.Time{} // as after dumpEvery
		k.Step(t.Context())
		if err := k.Status().Err; err != nil {
			t.Fatal(err)
		}
		if says := k.gate.says(); says != shut(want...) {
			t.Errorf("the gate says %q, want %q", says, shut(want...))
		}
	}
	step(51820, 51820)
	step(40000, 40000, 51820)
	step(51820, 51820, 40000)
	step(40001, 40001, 51820, 40000)
	step(51820, 51820, 40001, 40000)
	step(40002, 40002, 51820, 40001, 40000)
	step(51820, 51820, 40002, 40001, 40000)
	step(40003, 40003, 51820, 40002, 40001)
	step(51820, 51820, 40003, 40002, 40001)
	k.moved = k.moved.Add(-forgetPorts)
	step(51820, 51820)
	step(40000, 40000, 51820)

	path := filepath.Join(dir, "failover-wg0.json")
	text, err := os.ReadFile(path)
	if err == nil {
		err = os.WriteFile(path, bytes.ReplaceAll(text, []byte(k.cfg.Memory.boot), []byte("another")), 0o600)
	}
	if err = errors.Join(err, k.gate.remove()); err != nil {
		t.Fatal(err)
	}
	m, err := OpenMemory(dir, "wg0")
	if err == nil {
		err = ShutAhead(nil, "one", m)
	}
	if says := k.gate.says(); err != nil || says != shut(40000, 51820) {
		t.Errorf("ahead: the gate says %q, error %v", says, err)
	}
	if m.data.Words.Verb != "" || m.data.Taken != nil {
		t.Errorf("another boot's memory: %+v", m.data)
	}
}

// TestMemorySync: a port is on the disk when it is shut; the rest gets there without
// anybody waiting.
func TestMemorySync(t *testing.T) {
	m, err := OpenMemory(t.TempDir(), "wg0")
	if err != nil {
		t.Fatal(err)
	}
	unsynced := func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		return m.unsynced || m.syncing
	}
	if err := m.keepGate([]int{51820}); err != nil || unsynced() {
		t.Errorf("a port: error %v, unsynced %v", err, unsynced())
	}
	if err := errors.Join(m.keepTaken(&taken{}), m.noGate(), m.keepGate([]int{51820})); err != nil || !unsynced() {
		t.Errorf("the rest: error %v, unsynced %v", err, unsynced())
	}
	if err := m.flush(); err != nil {
		t.Error(err)
	}
	for end := time.Now().Add(30 * time.Second); unsynced(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it does not get to the disk")
		}
	}
	if err := os.Remove(m.path); err != nil {
		t.Fatal(err)
	}
	if err := m.keepGate([]int{51821}); err != nil {
		t.Error(err)
	}
	if m, err := OpenMemory(filepath.Dir(m.path), "wg0"); err != nil || !slices.Equal(m.ports(), []int{51821}) || m.data.Taken == nil {
		t.Errorf("the file has %+v, error %v", m.data, err)
	}
}

// TestProbeLeft: what a daemon that was killed in the middle of a probe has left goes with
// the next one, and with the release.
func TestProbeLeft(t *testing.T) {
	inNamespace(t)
	d := upLink(t)
	for what, ends := range map[string]func(*Keeper){
		"Release": func(k *Keeper) {
			if err := k.Release(); err != nil {
				t.Error(err)
			}
		},
		"Run": func(k *Keeper) {
			ended, cancel := context.WithCancel(t.Context())
			cancel()
			k.Run(ended)
		},
	} {
		k, _ := testKeeper(t, t.TempDir(), "down", d)
		probe := probeGate(nil, "one")
		if err := probe.from(k.cfg.VIP, 40000); err != nil {
			t.Fatal(err)
		}
		ends(k)
		if says := probe.says(); says != "" {
			t.Errorf("%s: it says %q", what, says)
		}
	}
}

// TestMemoryCopies: what is kept does not change with what the keeper has.
func TestMemoryCopies(t *testing.T) {
	m, err := OpenMemory(t.TempDir(), "wg0")
	if err != nil {
		t.Fatal(err)
	}
	taken := &taken{iface: iface{Ifindex: 1}, Keepalives: map[wgroam.Key]time.Duration{}}
	if err := m.keepTaken(taken); err != nil {
		t.Fatal(err)
	}
	var w sync.WaitGroup
	w.Go(func() {
		if err := m.keepWords(Active, ""); err != nil {
			t.Error(err)
		}
	})
	taken.Keepalives[peerKey(1)], taken.Called = time.Second, true
	w.Wait()
	if now := m.taken(iface{Ifindex: 1}); now.Called || len(now.Keepalives) > 0 {
		t.Errorf("kept: %+v", now)
	}
}

// TestMemoryOf: what was taken from an interface is not given to another that has its
// index, or its place in another namespace; a file that does not say the namespace is
// believed.
func TestMemoryOf(t *testing.T) {
	m, err := OpenMemory(t.TempDir(), "wg0")
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		kept, of iface
		same     bool
	}{
		{iface{7, 70}, iface{7, 70}, true},
		{iface{7, 70}, iface{8, 70}, false},
		{iface{7, 70}, iface{7, 71}, false},
		{iface{7, 0}, iface{7, 70}, true},
		{iface{7, 70}, iface{7, 0}, true},
		{iface{7, 0}, iface{8, 0}, false},
	} {
		if err := m.keepTaken(&taken{iface: tt.kept}); err != nil {
			t.Fatal(err)
		}
		if got := m.taken(tt.of); (got != nil) != tt.same {
			t.Errorf("of %+v, what was taken from %+v: %+v", tt.of, tt.kept, got)
		}
	}
}

// TestOtherNamespace: a standby's link that was deleted with its namespace, and made
// again in another with the same index, does not get what the first one had.
func TestOtherNamespace(t *testing.T) {
	inNamespace(t)
	d := upLink(t)
	dir := t.TempDir()
	k, desk := testKeeper(t, dir, "down", d)
	k.cfg.Device = &crash{fakeDevice: d, left: 1000}
	desk.mustSay(t, ByVerb, Standby)
	k.Step(t.Context())
	if err := k.Status().Err; err != nil || isUp(t) {
		t.Fatalf("not quiet: error %v", err)
	}
	before := k.of

	inNamespace(t)
	d = upLink(t)
	d.peers[peerKey(0)].Keepalive = 0 // and not a minute
	k, desk = testKeeper(t, dir, "down", d)
	k.cfg.Device = &crash{fakeDevice: d, left: 1000}
	if k.of.Ifindex != before.Ifindex {
		t.Fatalf("the links are %+v and %+v: the test wants them to have the same index", before, k.of)
	}
	if k.of == before {
		t.Skip("the kernel gives namespaces no cookie")
	}
	desk.mustSay(t, ByVerb, Active)
	k.Step(t.Context())
	if i := d.peers[peerKey(0)].Keepalive; i != 0 || k.Status().Err != nil {
		t.Errorf("the keepalive is %v, error %v", i, k.Status().Err)
	}
}

// TestMemoryWithoutBoot: what could be of another boot is neither believed nor
// written.
func TestMemoryWithoutBoot(t *testing.T) {
	m := &Memory{path: filepath.Join(t.TempDir(), "file")}
	if err := m.keepTaken(&taken{}); err == nil || !strings.Contains(err.Error(), "boot_id") {
		t.Errorf("error %v", err)
	}
	if _, err := os.Stat(m.path); err == nil {
		t.Error("it was written")
	}
}

// TestGateLeft: a gate that a daemon without memory has left shut is opened where
// there is no role.
func TestGateLeft(t *testing.T) {
	inNamespace(t)
	k, desk := testKeeper(t, t.TempDir(), "down", upLink(t))
	if err := k.gate.shut(51820); err != nil {
		t.Fatal(err)
	}
	desk.words.Config = Always
	k.Step(t.Context())
	if says := k.gate.says(); says != "" || k.Status().Err != nil {
		t.Errorf("the gate says %q, error %v", says, k.Status().Err)
	}
}

// TestFoundDown: of a link that is down, and not by us, nobody knows what it had;
// it is a fault until somebody sets it up.
func TestFoundDown(t *testing.T) {
	for _, mode := range []string{"down", "silent"} {
		t.Run(mode, func(t *testing.T) {
			inNamespace(t)
			d := upLink(t)
			dir := t.TempDir()
			k, desk := testKeeper(t, dir, mode, d)
			index := k.cfg.Ifindex
			set := func(up bool) {
				t.Helper()
				if err := setLink(index, up); err != nil {
					t.Fatal(err)
				}
			}
			// step makes a step of a new daemon, or the next of the last one.
			step := func(role Role, restart, fault bool) {
				t.Helper()
				if restart {
					k, desk = testKeeper(t, dir, mode, d)
					k.cfg.Device = &crash{fakeDevice: d, left: 1000}
				}
				desk.mustSay(t, ByVerb, role)
				k.dumped = time.Time{} // as after dumpEvery
				k.Step(t.Context())
				if raised := !k.raised.IsZero() && k.role == Standby && isUp(t); raised {
					if k.cfg.Memory.taken(k.of) != nil && !k.cfg.Memory.taken(k.of).Down {
						t.Error("a link that has just been set up was not left alone")
					}
					k.raised = k.raised.Add(-raisedFor)
					k.Step(t.Context())
				}
				if err := k.Status().Err; errors.Is(err, errDown) != fault || !fault && err != nil {
					t.Errorf("%s: error %v", role, err)
				}
			}
			set(false)
			step(Active, true, true)
			set(true)
			step(Active, false, false)
			set(false)
			for _, restart := range []bool{true, false, true} {
				step(Standby, restart, true)
				if isUp(t) {
					t.Error("the link was set up")
				}
			}
			set(true)
			step(Standby, false, false)
			step(Standby, true, false)
			if isUp(t) != (mode == "silent") {
				t.Error("the device is not quiet")
			}
			d.peers[peerKey(0)].LastHandshake = time.Now().Add(time.Hour) // has answered
			step(Active, false, false)
			if !isUp(t) {
				t.Error("the link of an active is down")
			}
		})
	}
}

// upLink makes the link of testKeeper in this thread's namespace, and sets it up;
// the device has one peer, with an interval.
func upLink(t *testing.T) *fakeDevice {
	t.Helper()
	if err := netlink.LinkSetUp(newLink(t)); err != nil {
		t.Fatal(err)
	}
	return &fakeDevice{t: t, peers: map[wgroam.Key]*fakePeer{
		peerKey(0): {Peer: wg.Peer{Key: peerKey(0), Keepalive: time.Minute}},
	}}
}

func isUp(t *testing.T) bool {
	t.Helper()
	link, err := wg.LinkByName("one")
	if err != nil {
		t.Fatal(err)
	}
	return link.Up
}

func (m *Memory) keepWords(verb, vrrp Role) error {
	m.note(verb, vrrp)
	return m.write()
}

// TestHangingDisk: a standby is one, and is shut, also while nothing can be written.
func TestHangingDisk(t *testing.T) {
	inNamespace(t)
	space, err := wg.OpenSpace("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer space.Close()
	dir := t.TempDir()
	d, _ := testDesk(t, dir, DeskConfig{})
	d.mustSay(t, ByVerb, Active)
	// To open it for writing takes until somebody reads.
	disk := filepath.Join(dir, "failover-wg0.json.new")
	if err := unix.Mkfifo(disk, 0o600); err != nil {
		t.Fatal(err)
	}
	written := make(chan error, 2)
	go func() { written <- d.Say(ByVerb, Standby) }()
	g := newGate(space, "wg0")
	go func() { written <- shutPorts(g, d.cfg.Memory, []int{51820}) }()
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) {
		role, _, _ := d.Role()
		if role == Standby && g.says() == shut(51820) {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("the role is %s, the gate says %q", role, g.says())
		}
	}
	select {
	case err := <-written:
		t.Errorf("it was written: %v", err)
	default:
	}
	// It works again.
	go func() {
		if r, err := os.Open(disk); err == nil {
			_, _ = io.Copy(io.Discard, r)
			r.Close()
		}
	}()
	for range 2 {
		<-written // what became of what went into the FIFO does not matter
	}
	if err := os.Remove(disk); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	if err := errors.Join(d.cfg.Memory.keepGate([]int{51821}), d.cfg.Memory.flush()); err != nil {
		t.Fatal(err)
	}
	m, err := OpenMemory(dir, "wg0")
	if err != nil || m.data.Words.Verb != Standby || !m.data.Gate {
		t.Errorf("remembered: %+v, error %v", m.data, err)
	}
}
