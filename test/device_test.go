// SPDX-License-Identifier: MIT

package test

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgroam/wgroam/internal/control"
	"github.com/wgroam/wgroam/internal/lab"
)

// TestDeviceLife: whatever happens to a device, the daemon follows the one that
// bears the name, and another device does not notice.
func TestDeviceLife(t *testing.T) {
	l := newLab(t, lab.Config{Gateways: []string{"a", "h"}})
	needKernel(t, l)
	a, c := l.Gateways[0], l.Clients[0]
	dir := t.TempDir()
	n := &node{gw: a, socket: filepath.Join(dir, "control.sock")}
	file := filepath.Join(dir, "wgroam.toml")
	cfg := fmt.Sprintf("[[device]]\nname = \"wg9\"\n[[device]]\nname = %q\n[control]\nsocket = %q\n", a.Device(), n.socket)
	if err := os.WriteFile(file, []byte(cfg), 0o600); err != nil {
		t.Fatal(err)
	}
	n.process = start(t, a, nil, "run", "--config", file)
	n.says("following endpoint changes")
	n.awaitDevice(a.Device()+"@", control.StateUp)
	ping(t, c)
	n.awaitRecord(c.Key(), c.Endpoint())

	ip := func(args ...string) { t.Helper(); ip(t, a, args...) }
	is := func(state string) control.DeviceStatus { t.Helper(); return n.awaitDevice("wg9@", state) }
	missing := func() {
		t.Helper()
		if d := is(control.StateMissing); d.Ifindex != 0 || d.Detector.Rung != control.RungNone {
			t.Errorf("a device that is missing: %+v", d)
		}
	}
	ports := uint16(0)
	// seen returns the status of a device whose changes are seen.
	seen := func(state string) control.DeviceStatus {
		t.Helper()
		d := is(state)
		if d.Detector.Rung != control.RungFentry {
			t.Errorf("detector: %+v", d.Detector)
		}
		key, err := wgtypes.GeneratePrivateKey()
		if err != nil {
			t.Fatal(err)
		}
		ports++
		ep := net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), ports))
		if err := a.WG().ConfigureDevice("wg9", wgtypes.Config{Peers: []wgtypes.PeerConfig{{PublicKey: key.PublicKey(), Endpoint: ep}}}); err != nil {
			t.Fatal(err)
		}
		await(t, "a change is seen", func() (bool, string) {
			now := n.devices()["wg9@"]
			return now.Events == d.Events+1 && now.Ifindex == d.Ifindex, fmt.Sprintf("%+v", now)
		})
		return n.devices()["wg9@"]
	}
	sessions := func(device string) int {
		count := 0
		for line := range strings.Lines(n.stderr.String()) {
			if strings.Contains(line, "following endpoint changes") && strings.Contains(line, "device="+device+" ") {
				count++
			}
		}
		return count
	}

	// It comes.
	ip("link", "add", "wg9", "type", "wireguard")
	setKey(t, a, "wg9")
	first := seen(control.StateDown)

	// Up, down, and with another port: the same all the time.
	ip("link", "set", "wg9", "up")
	seen(control.StateUp)
	port := 51900
	if err := a.WG().ConfigureDevice("wg9", wgtypes.Config{ListenPort: &port}); err != nil {
		t.Fatal(err)
	}
	seen(control.StateUp)
	ip("link", "set", "wg9", "down")
	if d := seen(control.StateDown); d.Ifindex != first.Ifindex || sessions("wg9") != 1 {
		t.Errorf("begun anew: %d sessions, %+v", sessions("wg9"), d)
	}

	// Renamed, and back.
	ip("link", "set", "wg9", "name", "wg9old")
	missing()
	ip("link", "set", "wg9old", "name", "wg9")
	if d := seen(control.StateDown); d.Ifindex != first.Ifindex || d.Group != first.Group {
		t.Errorf("%+v, want that of %+v", d, first)
	}

	// Another one under the name, at once.
	ip("link", "add", "wg9new", "type", "wireguard")
	setKey(t, a, "wg9new")
	ip("link", "set", "wg9", "name", "wg9old")
	ip("link", "set", "wg9new", "name", "wg9")
	await(t, "the other device is followed", func() (bool, string) {
		d := n.devices()["wg9@"]
		return d.State == control.StateDown && d.Ifindex != first.Ifindex, fmt.Sprintf("%+v", d)
	})
	if d := seen(control.StateDown); d.Group == first.Group {
		t.Errorf("the group of the other device: %+v", d)
	}

	// In another namespace, and back.
	there, here := netnsName(t, "there"), netnsName(t, "here")
	attach(t, l.Gateways[1], there)
	attach(t, a, here)
	before := n.devices()["wg9@"]
	ip("link", "set", "wg9", "netns", there)
	missing()
	ip("-n", there, "link", "set", "wg9", "netns", here)
	if d := seen(control.StateDown); d.Group != before.Group {
		t.Errorf("back: %+v, want that of %+v", d, before)
	}

	// Deleted and made again, a few times, with no look in between.
	for range 3 {
		ip("link", "del", "wg9")
		ip("link", "add", "wg9", "type", "wireguard")
		setKey(t, a, "wg9")
		last := n.devices()["wg9@"]
		await(t, "the new device is followed", func() (bool, string) {
			d := n.devices()["wg9@"]
			return d.State == control.StateDown && d.Group != before.Group && d.Peers == 0, fmt.Sprintf("%+v, before %+v", d, last)
		})
		before = seen(control.StateDown)
	}
	ip("link", "del", "wg9")
	missing()

	// The other device has seen nothing of all that.
	n.awaitRecord(c.Key(), roam(t, c, 0))
	if got := sessions(a.Device()); got != 1 {
		t.Errorf("the other device was begun %d times", got)
	}
	d := n.devices()[a.Device()+"@"]
	if d.Events != 2 || d.Lost != 0 || d.SweepRepairs != 0 || d.LastError != "" {
		t.Errorf("the other device: %+v", d)
	}
}

// TestLinkChanges: a device that goes down and up, and to another port, is
// followed on.
func TestLinkChanges(t *testing.T) {
	l := newLab(t, lab.Config{})
	a, h, c := l.Gateways[0], l.Gateways[1], l.Clients[0]
	nodes := startMesh(t, l)
	n, which := nodes[0], a.Device()+"@"
	ping(t, c)
	awaitEndpoint(t, h, c, roam(t, c, 0))

	for range 2 {
		if err := a.LinkDown(); err != nil {
			t.Fatal(err)
		}
		n.awaitDevice(which, control.StateDown)
		if err := a.LinkUp(); err != nil {
			t.Fatal(err)
		}
		n.awaitDevice(which, control.StateUp)
		if err := c.Forget(); err != nil {
			t.Fatal(err)
		}
		ping(t, c)
		awaitEndpoint(t, h, c, roam(t, c, 0))
	}

	port, every, never := lab.ListenPort+1, time.Second, time.Duration(0)
	if err := a.WG().ConfigureDevice(a.Device(), wgtypes.Config{ListenPort: &port}); err != nil {
		t.Fatal(err)
	}
	// The client learns of it from the gateway's packet.
	for _, interval := range []*time.Duration{&every, &never} {
		if err := a.WG().ConfigureDevice(a.Device(), wgtypes.Config{Peers: []wgtypes.PeerConfig{{
			PublicKey: wgtypes.Key(c.Key()), UpdateOnly: true, PersistentKeepaliveInterval: interval,
		}}}); err != nil {
			t.Fatal(err)
		}
	}
	ping(t, c)
	for range 3 {
		awaitEndpoint(t, h, c, roam(t, c, 0))
	}
	if d := n.status(); d.SweepRepairs != 0 || d.LastError != "" {
		t.Errorf("status: %+v", d)
	}
}
