// SPDX-License-Identifier: MIT

package wg

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/lab"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience bounds every wait. Emulated machines are slow; none waits this long
// in health.
const patience = 30 * time.Second

func await(t testing.TB, what string, cond func() bool) {
	t.Helper()
	deadline := time.After(patience)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("%s: not after %v", what, patience)
		}
	}
}

func needRoot(t testing.TB) {
	t.Helper()
	switch {
	case os.Geteuid() == 0:
	case os.Getenv("CI") == "true":
		t.Fatal("network namespaces need root")
	default:
		t.Skip("network namespaces need root")
	}
}

// needKernel skips a test that is about kernel WireGuard where the kernel has
// none. The machine of test/vm has it, or is broken.
func needKernel(t testing.TB) {
	t.Helper()
	needRoot(t)
	if lab.KernelWireGuard() {
		return
	}
	var u unix.Utsname
	_ = unix.Uname(&u) // cannot fail with a valid address
	release := unix.ByteSliceToString(u.Release[:])
	if lab.InVM() {
		t.Fatalf("kernel %s has no WireGuard", release)
	}
	t.Skipf("kernel %s has no WireGuard", release)
}

func newLab(t testing.TB, cfg lab.Config) *lab.Lab {
	t.Helper()
	needRoot(t)
	l, err := lab.New(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// open opens a Client in a gateway's namespace.
func open(t testing.TB, gw *lab.Gateway) *Client {
	t.Helper()
	var c *Client
	err := gw.Do(func() (err error) {
		c, err = Open()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func reach(t testing.TB, c *lab.Client) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if _, err := c.Reach(ctx); err != nil {
		t.Fatal(err)
	}
}

var byValue = cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })

func endpoints(t testing.TB, c *Client, device string) map[wgroam.Key]netip.AddrPort {
	t.Helper()
	d, err := c.Device(device)
	if err != nil {
		t.Fatal(err)
	}
	out := make(map[wgroam.Key]netip.AddrPort, len(d.Peers))
	for _, p := range d.Peers {
		out[p.Key] = p.Endpoint
	}
	return out
}

func TestDevice(t *testing.T) {
	l := newLab(t, lab.Config{Clients: 3})
	gw := l.Gateways[0]
	c := open(t, gw)
	start := time.Now()
	reach(t, l.Clients[0])
	if _, err := l.Clients[1].RoamFamily(); err != nil {
		t.Fatal(err)
	}
	reach(t, l.Clients[1])

	d, err := c.Device(gw.Device())
	if err != nil {
		t.Fatal(err)
	}
	got := make(map[wgroam.Key]Peer)
	for _, p := range d.Peers {
		got[p.Key] = p
	}
	if len(got) != len(d.Peers) || len(got) != 3 {
		t.Fatalf("%d different peers of %d, want 3", len(got), len(d.Peers))
	}
	d.Peers = nil
	want := Device{Name: gw.Device(), Kernel: l.Kernel, PublicKey: l.PublicKey(), Port: lab.ListenPort}
	if diff := cmp.Diff(want, d); diff != "" {
		t.Errorf("device (-want +got):\n%s", diff)
	}
	for i, client := range l.Clients {
		p := got[client.Key()]
		if i == 2 {
			if p != (Peer{Key: client.Key()}) {
				t.Errorf("a peer that nobody heard of: %+v", p)
			}
			continue
		}
		if p.Endpoint != client.Endpoint() || p.Endpoint.Addr().Is6() != (i == 1) {
			t.Errorf("client %d is at %v, want %v", i, p.Endpoint, client.Endpoint())
		}
		// The kernel's clock for this is coarse.
		if p.LastHandshake.Before(start.Add(-50*time.Millisecond)) || p.LastHandshake.After(time.Now()) {
			t.Errorf("client %d completed a handshake at %v, between %v and now", i, p.LastHandshake, start)
		}
		if p.Received <= 0 {
			t.Errorf("client %d has sent %d bytes", i, p.Received)
		}
	}
	before := got[l.Clients[0].Key()].Received
	reach(t, l.Clients[0])
	if d, err = c.Device(gw.Device()); err != nil {
		t.Fatal(err)
	}
	for _, p := range d.Peers {
		if p.Key == l.Clients[0].Key() && p.Received <= before {
			t.Errorf("%d bytes received after another packet, %d before", p.Received, before)
		}
	}
}

func TestSetEndpoints(t *testing.T) {
	l := newLab(t, lab.Config{Clients: 3})
	gw := l.Gateways[0]
	c := open(t, gw)
	psk, err := wgtypes.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	keepalive := 17 * time.Second
	var all []wgtypes.PeerConfig
	for _, client := range l.Clients {
		all = append(all, wgtypes.PeerConfig{
			PublicKey: wgtypes.Key(client.Key()), UpdateOnly: true,
			PresharedKey: &psk, PersistentKeepaliveInterval: &keepalive,
		})
	}
	if err := gw.WG().ConfigureDevice(gw.Device(), wgtypes.Config{Peers: all}); err != nil {
		t.Fatal(err)
	}
	state := func() *wgtypes.Device {
		d, err := gw.WG().Device(gw.Device())
		if err != nil {
			t.Fatal(err)
		}
		slices.SortFunc(d.Peers, func(a, b wgtypes.Peer) int { return slices.Compare(a.PublicKey[:], b.PublicKey[:]) })
		for i := range d.Peers {
			d.Peers[i].Endpoint = nil
			d.Peers[i].TransmitBytes = 0 // keepalives to the new endpoints
		}
		return d
	}
	before := state()

	four := netip.MustParseAddrPort("192.0.2.1:1024")
	six := netip.MustParseAddrPort("[2001:db8:1::1]:65535")
	mapped := netip.MustParseAddrPort("[::ffff:192.0.2.2]:1")
	err = c.SetEndpoints(gw.Device(), []Endpoint{
		{l.Clients[0].Key(), four},
		{wgroam.Key{1, 2, 3}, four}, // the device does not have it
		{l.Clients[1].Key(), six},
		{l.Clients[2].Key(), mapped},
	})
	if err != nil {
		t.Fatal(err)
	}
	want := map[wgroam.Key]netip.AddrPort{
		l.Clients[0].Key(): four,
		l.Clients[1].Key(): six,
		l.Clients[2].Key(): netip.MustParseAddrPort("192.0.2.2:1"),
	}
	if diff := cmp.Diff(want, endpoints(t, c, gw.Device()), byValue); diff != "" {
		t.Errorf("endpoints (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(before, state()); diff != "" {
		t.Errorf("what was not to be changed (-before +after):\n%s", diff)
	}

	if err := c.SetEndpoints(gw.Device(), nil); err != nil {
		t.Errorf("no endpoints: %v", err)
	}
	// Nothing that comes in makes it this far; no panic if it did.
	if err := c.SetEndpoints(gw.Device(), []Endpoint{{Peer: l.Clients[0].Key()}}); err == nil {
		t.Error("no error for an endpoint without an address")
	}
	if diff := cmp.Diff(want, endpoints(t, c, gw.Device()), byValue); diff != "" {
		t.Errorf("endpoints after nothing (-want +got):\n%s", diff)
	}
}

func TestPrivateKey(t *testing.T) {
	l := newLab(t, lab.Config{})
	gw := l.Gateways[0]
	c := open(t, gw)
	key, err := c.PrivateKey(gw.Device())
	if err != nil {
		t.Fatal(err)
	}
	if pub := wgroam.Key(wgtypes.Key(key).PublicKey()); pub != l.PublicKey() {
		t.Errorf("private key of %v, want that of %v", pub, l.PublicKey())
	}
	if key[0]&7 != 0 || key[31]&0xc0 != 0x40 {
		t.Error("the key is not clamped")
	}

	none := wgtypes.Key{}
	if err := gw.WG().ConfigureDevice(gw.Device(), wgtypes.Config{PrivateKey: &none}); err != nil {
		t.Fatal(err)
	}
	if key, err := c.PrivateKey(gw.Device()); !errors.Is(err, ErrNoKey) || key != [32]byte{} || !strings.Contains(err.Error(), "wg set "+gw.Device()) {
		t.Errorf("without a key: error %v", err)
	}
}

func TestNoDevice(t *testing.T) {
	l := newLab(t, lab.Config{})
	gw := l.Gateways[0]
	c := open(t, gw)
	_ = gw.Do(func() error {
		// The latter is a link, but not a WireGuard device.
		for _, name := range []string{"nothing", "lan0"} {
			_, deviceErr := c.Device(name)
			_, keyErr := c.PrivateKey(name)
			setErr := c.SetEndpoints(name, []Endpoint{{l.Clients[0].Key(), netip.MustParseAddrPort("192.0.2.1:1")}})
			for what, err := range map[string]error{"Device": deviceErr, "PrivateKey": keyErr, "SetEndpoints": setErr} {
				if !errors.Is(err, ErrNoDevice) || !strings.Contains(err.Error(), name) {
					t.Errorf("%s of %s: error %v", what, name, err)
				}
			}
		}
		return nil
	})
	// The client is none the worse for it.
	if _, err := c.Device(gw.Device()); err != nil {
		t.Error(err)
	}
}

// TestPrivilege: it is the capability that counts, not the user.
func TestPrivilege(t *testing.T) {
	needKernel(t)
	l := newLab(t, lab.Config{})
	gw := l.Gateways[0]
	c := open(t, gw)
	unprivileged(t, func() {
		_, deviceErr := c.Device(gw.Device())
		_, keyErr := c.PrivateKey(gw.Device())
		setErr := c.SetEndpoints(gw.Device(), []Endpoint{{l.Clients[0].Key(), netip.MustParseAddrPort("192.0.2.1:1")}})
		for what, err := range map[string]error{"Device": deviceErr, "PrivateKey": keyErr, "SetEndpoints": setErr} {
			if !errors.Is(err, ErrPrivilege) || !strings.Contains(err.Error(), "CAP_NET_ADMIN") || !strings.Contains(err.Error(), gw.Device()) {
				t.Errorf("%s: error %v", what, err)
			}
		}
	})
	if ep := endpoints(t, c, gw.Device())[l.Clients[0].Key()]; ep.IsValid() {
		t.Errorf("the write without privileges was carried out: %v", ep)
	}
}

// unprivileged runs f on a thread without capabilities, which ends with it.
func unprivileged(t *testing.T, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData
		if err := unix.Capset(&hdr, &none[0]); err != nil {
			t.Error(err)
			return
		}
		f()
	}()
	<-done
}

func names(t *testing.T, c *Client, gw *lab.Gateway) []string {
	t.Helper()
	var got []string
	err := gw.Do(func() (err error) {
		got, err = c.Names()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func TestNames(t *testing.T) {
	l := newLab(t, lab.Config{})
	gw := l.Gateways[0]
	c := open(t, gw)
	want := []string{gw.Device()}
	if diff := cmp.Diff(want, names(t, c, gw)); diff != "" {
		t.Errorf("names (-want +got):\n%s", diff)
	}
	// An implementation in user space that has died leaves its socket behind.
	if err := os.MkdirAll("/var/run/wireguard", 0o700); err != nil {
		t.Fatal(err)
	}
	dead := filepath.Join("/var/run/wireguard", fmt.Sprintf("wgdead%d.sock", os.Getpid()))
	s, err := net.ListenUnix("unix", &net.UnixAddr{Name: dead, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	s.SetUnlinkOnClose(false)
	s.Close()
	defer os.Remove(dead)
	if diff := cmp.Diff(want, names(t, c, gw)); diff != "" {
		t.Errorf("names beside a dead socket (-want +got):\n%s", diff)
	}
	if !l.Kernel {
		return
	}
	for _, name := range []string{"b9", "a1"} {
		err := gw.Do(func() error {
			return netlink.LinkAdd(&netlink.Wireguard{LinkAttrs: netlink.LinkAttrs{Name: name}})
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff([]string{"a1", "b9", "wg0"}, names(t, c, gw)); diff != "" {
		t.Errorf("names of three devices (-want +got):\n%s", diff)
	}
}

// TestModule: the kernel module is loaded after the client was opened, and loaded
// again, with a netlink family of another number.
func TestModule(t *testing.T) {
	needKernel(t)
	modprobe(t, "-r", "wireguard")
	t.Cleanup(func() { modprobe(t, "wireguard") })
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and ends with the thread, and the namespace with it
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Error(err)
			return
		}
		c, err := Open()
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		const device = "wg0"
		gone := func(when string) {
			if _, err := c.Device(device); !errors.Is(err, ErrNoDevice) {
				t.Errorf("%s: error %v", when, err)
			}
			if names, err := c.Names(); err != nil || len(names) != 0 {
				t.Errorf("%s: names %q, error %v", when, names, err)
			}
			if err := c.SetEndpoints(device, nil); !errors.Is(err, ErrNoDevice) {
				t.Errorf("%s: error %v", when, err)
			}
		}
		gone("without the module")
		for round := range 3 {
			modprobe(t, "wireguard")
			if err := netlink.LinkAdd(&netlink.Wireguard{LinkAttrs: netlink.LinkAttrs{Name: device}}); err != nil {
				t.Error(err)
				return
			}
			// Either may be the first to notice.
			if round%2 == 0 {
				if names, err := c.Names(); err != nil || !slices.Equal(names, []string{device}) {
					t.Errorf("round %d: names %q, error %v", round, names, err)
				}
			}
			if d, err := c.Device(device); err != nil || !d.Kernel {
				t.Errorf("round %d: %+v, error %v", round, d, err)
			}
			if err := c.SetEndpoints(device, nil); err != nil {
				t.Errorf("round %d: %v", round, err)
			}
			modprobe(t, "-r", "wireguard")
			gone("with the module gone")
		}
	}()
	<-done
}

// modprobe insists: the namespaces of a test that ended keep the module busy for
// a moment.
func modprobe(t *testing.T, args ...string) {
	t.Helper()
	var out []byte
	var err error
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); <-time.After(20 * time.Millisecond) {
		if out, err = exec.Command("modprobe", args...).CombinedOutput(); err == nil {
			return
		}
	}
	t.Errorf("modprobe %v: %v: %s", args, err, out)
}

// TestManyPeers: a device with 10 000 peers is written in chunks, and read whole.
// It is the last test: the kernel takes 20 ms to remove a peer, holds its lock
// of all links meanwhile, and does so when the test is over.
func TestManyPeers(t *testing.T) {
	l := newLab(t, lab.Config{Gateways: []string{"a"}})
	gw := l.Gateways[0]
	c := open(t, gw)
	const peers = 10_000
	key := func(i int) (k wgroam.Key) {
		binary.BigEndian.PutUint32(k[:], uint32(i+1))
		return k
	}
	// A chunk at a time, for wgctrl writes more than that one by one.
	for i := 0; i < peers; i += ChunkPeers {
		var cfg wgtypes.Config
		for j := i; j < min(i+ChunkPeers, peers); j++ {
			cfg.Peers = append(cfg.Peers, wgtypes.PeerConfig{PublicKey: wgtypes.Key(key(j))})
		}
		if err := gw.WG().ConfigureDevice(gw.Device(), cfg); err != nil {
			t.Fatal(err)
		}
	}
	want := map[wgroam.Key]netip.AddrPort{l.Clients[0].Key(): {}}
	start := time.Now()
	for i := 0; i < peers; i += ChunkPeers {
		var eps []Endpoint
		for j := i; j < min(i+ChunkPeers, peers); j++ {
			addr := netip.AddrFrom4([4]byte{192, 0, byte(j >> 8), byte(j)})
			if j%2 == 1 {
				addr = netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 14: byte(j >> 8), 15: byte(j)})
			}
			ep := netip.AddrPortFrom(addr, uint16(j+1))
			eps = append(eps, Endpoint{key(j), ep})
			want[key(j)] = ep
		}
		if err := c.SetEndpoints(gw.Device(), eps); err != nil {
			t.Fatal(err)
		}
	}
	written := time.Now()
	got := endpoints(t, c, gw.Device())
	t.Logf("%d endpoints written in %v, read in %v", peers, written.Sub(start), time.Since(written))
	if diff := cmp.Diff(want, got, byValue); diff != "" {
		t.Errorf("endpoints (-want +got):\n%s", diff)
	}
}
