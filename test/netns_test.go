// SPDX-License-Identifier: MIT

package test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/control"
	"github.com/wgroam/wgroam/internal/lab"
	"github.com/wgroam/wgroam/internal/wg"
)

// netnsName returns the name of a namespace that is this test's own, and is not
// there after it.
func netnsName(t testing.TB, suffix string) string {
	name := fmt.Sprintf("wgroam-test-%d-%s", os.Getpid(), suffix)
	t.Cleanup(func() { unname(t, name) })
	return name
}

// attach gives a gateway's namespace a name. See ip netns attach, which wants a
// process.
func attach(t testing.TB, gw *lab.Gateway, name string) {
	t.Helper()
	path := filepath.Join("/run/netns", name)
	err := os.MkdirAll("/run/netns", 0o755)
	if err == nil {
		err = os.WriteFile(path, nil, 0o444)
	}
	if err == nil {
		err = unix.Mount(gw.NetNS(), path, "", unix.MS_BIND, "")
	}
	if err != nil {
		t.Fatal(err)
	}
}

// unname is ip netns del, of a name that may not be there.
func unname(t testing.TB, name string) {
	t.Helper()
	path := filepath.Join("/run/netns", name)
	_ = unix.Unmount(path, unix.MNT_DETACH)
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

// ip runs ip(8) in a gateway's namespace.
func ip(t testing.TB, gw *lab.Gateway, args ...string) {
	t.Helper()
	if err := gw.Do(func() error {
		out, err := exec.Command("ip", args...).CombinedOutput()
		if err != nil {
			err = fmt.Errorf("ip %s: %w: %s", strings.Join(args, " "), err, out)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
}

// devices returns the status of all devices of a node, by where they are.
func (n *node) devices() map[string]control.DeviceStatus {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var s control.Status
	if err := control.Get(ctx, n.socket, control.VerbStatus, &s); err != nil {
		n.t.Fatal(err)
	}
	all := make(map[string]control.DeviceStatus, len(s.Devices))
	for _, d := range s.Devices {
		all[d.Name+"@"+d.Netns] = d
	}
	return all
}

// awaitDevice waits until a device, name@netns, is in that state.
func (n *node) awaitDevice(which, state string) control.DeviceStatus {
	n.t.Helper()
	var d control.DeviceStatus
	await(n.t, which+" is "+state, func() (bool, string) {
		d = n.devices()[which]
		return d.State == state, fmt.Sprintf("%+v", d)
	})
	return d
}

// awaitRecord waits until the node has seen a peer at ep itself.
func (n *node) awaitRecord(peer wgroam.Key, ep netip.AddrPort) {
	n.t.Helper()
	await(n.t, fmt.Sprintf("a record of %v at %v", peer, ep), func() (bool, string) {
		all := n.peers()
		return slices.ContainsFunc(all, func(p control.Peer) bool {
			return p.Peer == peer && p.Endpoint == ep && p.Held == ep
		}), fmt.Sprintf("%+v", all)
	})
}

// peers asks the node for all peers.
func (n *node) peers() []control.Peer {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var all control.Peers
	if err := control.Get(ctx, n.socket, control.VerbPeers, &all); err != nil {
		n.t.Fatal(err)
	}
	return all.Peers
}

// TestOtherNetns: a daemon follows a device of another network namespace, and
// writes to it, while it talks to the others from its own.
func TestOtherNetns(t *testing.T) {
	l := newLab(t, lab.Config{Gateways: []string{"a", "h", "x"}, Clients: 2})
	a, h, x, c := l.Gateways[0], l.Gateways[1], l.Gateways[2], l.Clients[0]
	blue := netnsName(t, "blue")
	attach(t, a, blue)

	dirX, dirH := t.TempDir(), t.TempDir()
	cfg := strings.Replace(config(x, dirX, h), fmt.Sprintf("name = %q\n", x.Device()), fmt.Sprintf("name = %q\nnetns = %q\n", a.Device(), blue), 1)
	if l.Kernel {
		// One of the same name, here.
		setKey(t, x, x.Device())
		cfg += fmt.Sprintf("[[device]]\nname = %q\n", x.Device())
	}
	cfg += "[metrics]\nlisten = \"127.0.0.1:9586\"\n"
	far := startNode(t, x, dirX, cfg)
	near := startNode(t, h, dirH, config(h, dirH, x))
	near.awaitNodes(1)
	which := a.Device() + "@" + blue
	d := far.awaitDevice(which, control.StateUp)
	if rung := d.Detector.Rung; l.Kernel && rung != control.RungFentry {
		t.Errorf("detector: %+v", d.Detector)
	}
	if out := far.stderr.String(); !strings.Contains(out, "netns="+blue) {
		t.Errorf("the log does not say where:\n%s", out)
	}
	// From there, and from where the daemon is: the same unless that has one of the
	// same name.
	w, home := watch(t, a, "--socket", far.socket), watch(t, x, "--socket", far.socket, "--device", a.Device())
	w.says("watching through the daemon")
	home.says("watching through the daemon")

	ping(t, c)
	awaitEndpoint(t, h, c, c.Endpoint())
	for i := range 6 {
		ep := roam(t, c, i)
		awaitEndpoint(t, h, c, ep)
		if e := w.find(c.Key(), ep, i); e.Device != a.Device() || e.Netns != blue {
			t.Errorf("roam %d: %+v", i, e)
		}
		if !l.Kernel {
			home.find(c.Key(), ep, i)
		}
	}
	// And the other way round.
	if err := l.MoveVIP(h); err != nil {
		t.Fatal(err)
	}
	ping(t, l.Clients[1])
	awaitEndpoint(t, a, l.Clients[1], l.Clients[1].Endpoint())
	for i := range 3 {
		awaitEndpoint(t, a, l.Clients[1], roam(t, l.Clients[1], i))
	}

	all := far.devices()
	if d := all[which]; d.SweepRepairs != 0 || d.ApplyErrors != 0 || d.Applied == 0 || d.Ifindex == 0 || d.LastError != "" {
		t.Errorf("status: %+v", d)
	}
	if l.Kernel {
		if d := all[x.Device()+"@"]; d.State != control.StateUp || d.Events != 0 || d.Group == all[which].Group {
			t.Errorf("the device of the same name: %+v", d)
		}
		if events := home.seen(); len(events) != 0 {
			t.Errorf("in the daemon's namespace, events of the device of the same name elsewhere: %+v", events)
		}
	}
	run := func(args ...string) string {
		out, err := exec.Command(binary(t), append(args, "--socket", far.socket)...).Output()
		if err != nil {
			t.Errorf("%v: %v", args, err)
		}
		return string(out)
	}
	for _, verb := range []string{"status", "peers"} {
		if out := run(verb); !strings.Contains(out, which) {
			t.Errorf("%s does not show %s:\n%s", verb, which, out)
		}
	}
	var peers control.Peers
	if err := json.Unmarshal([]byte(run("peers", "--json")), &peers); err != nil {
		t.Fatal(err)
	}
	there := 0
	for _, p := range peers.Peers {
		if p.Netns == blue {
			there++
		}
	}
	if there != len(l.Clients) {
		t.Errorf("%d peers in %s, want %d: %+v", there, blue, len(l.Clients), peers)
	}
	if body, _ := scrape(t, x, "127.0.0.1:9586"); !strings.Contains(body, fmt.Sprintf("wgroam_records{device=%q,netns=%q} 2\n", a.Device(), blue)) {
		t.Errorf("metrics:\n%s", body)
	}
}

// TestNetnsComesAndGoes: a daemon waits for a namespace, follows what is under its
// name, and does not keep it alive.
func TestNetnsComesAndGoes(t *testing.T) {
	l := newLab(t, lab.Config{Gateways: []string{"a", "h", "x"}})
	a, h, x, c := l.Gateways[0], l.Gateways[1], l.Gateways[2], l.Clients[0]
	blue := netnsName(t, "blue")
	dir := t.TempDir()
	n := &node{gw: x, socket: filepath.Join(dir, "control.sock")}
	file := filepath.Join(dir, "wgroam.toml")
	cfg := fmt.Sprintf("[[device]]\nname = %q\nnetns = %q\npoll_interval = \"20ms\"\n[control]\nsocket = %q\n", a.Device(), blue, n.socket)
	if err := os.WriteFile(file, []byte(cfg), 0o600); err != nil {
		t.Fatal(err)
	}
	n.process = start(t, x, nil, "run", "--config", file)
	n.says("ip netns add " + blue)
	which := a.Device() + "@" + blue
	if d := n.awaitDevice(which, control.StateWaiting); !strings.Contains(d.LastError, blue) {
		t.Errorf("status without a namespace: %+v", d)
	}
	seen := func(ep netip.AddrPort) {
		t.Helper()
		n.awaitRecord(c.Key(), ep)
	}
	following := func(times int) {
		t.Helper()
		await(t, "the device is followed", func() (bool, string) {
			out := n.stderr.String()
			return strings.Count(out, "following endpoint changes") == times, out
		})
	}

	ping(t, c)
	attach(t, a, blue)
	n.awaitDevice(which, control.StateUp)
	seen(roam(t, c, 0))
	following(1)

	missing := func() {
		t.Helper()
		await(t, "the namespace is missed", func() (bool, string) {
			d := n.devices()[which]
			return d.State == control.StateMissing && d.Ifindex == 0 && strings.Contains(d.LastError, blue), fmt.Sprintf("%+v", d)
		})
	}
	unname(t, blue)
	missing()
	roam(t, c, 1)
	attach(t, a, blue)
	n.awaitDevice(which, control.StateUp)
	following(2)
	seen(roam(t, c, 2))
	if !l.Kernel {
		return // h's device has another name
	}

	// Another namespace, between two looks.
	unname(t, blue)
	attach(t, h, blue)
	// Dead, or it would call the client and keep it.
	if err := errors.Join(a.Kill(), l.MoveVIP(h)); err != nil {
		t.Fatal(err)
	}
	following(3)
	ping(t, c)
	seen(roam(t, c, 0))
	awaitEndpoint(t, h, c, c.Endpoint())

	// One of its own, which ends with its name.
	unname(t, blue)
	missing()
	for range 2 {
		ip(t, x, "netns", "add", blue)
		ip(t, x, "-n", blue, "link", "add", a.Device(), "type", "wireguard")
		ip(t, x, "link", "add", "outside", "type", "veth", "peer", "name", "inside", "netns", blue)
		inside(t, blue, func() error { return setPrivateKey(a.Device()) })
		n.awaitDevice(which, control.StateDown)
		ip(t, x, "netns", "del", blue)
		missing()
		await(t, "the namespace has ended", func() (bool, string) {
			err := x.Do(func() error { _, err := wg.LinkByName("outside"); return err })
			return errors.Is(err, wg.ErrNoDevice), fmt.Sprint(err)
		})
	}
	if said := strings.Count(n.stderr.String(), "no such network namespace"); said != 5 {
		t.Errorf("said %d times that there is no namespace, want once for each of 5:\n%s", said, &n.stderr)
	}
}

// TestNoDescriptor: a daemon that has no file descriptor left to watch links with
// says so, and goes on when it has.
func TestNoDescriptor(t *testing.T) {
	l := newLab(t, lab.Config{Gateways: []string{"a", "x"}})
	a, x, c := l.Gateways[0], l.Gateways[1], l.Clients[0]
	blue := netnsName(t, "blue")
	dir := t.TempDir()
	n := &node{gw: x, socket: filepath.Join(dir, "control.sock")}
	file := filepath.Join(dir, "wgroam.toml")
	cfg := fmt.Sprintf("[[device]]\nname = %q\nnetns = %q\n[control]\nsocket = %q\n", a.Device(), blue, n.socket)
	if err := os.WriteFile(file, []byte(cfg), 0o600); err != nil {
		t.Fatal(err)
	}
	n.process = start(t, x, nil, "run", "--config", file)
	n.says("ip netns add " + blue)

	// One, for the namespace. Nobody asks the daemon anything meanwhile.
	var before unix.Rlimit
	limit, pid := uint64(0), n.cmd.Process.Pid
	for free := 0; free < 1; limit++ {
		if _, err := os.Lstat(fmt.Sprintf("/proc/%d/fd/%d", pid, limit)); err != nil {
			free++
		}
	}
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &before); err != nil {
		t.Fatal(err)
	}
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: limit, Max: before.Max}, nil); err != nil {
		t.Fatal(err)
	}
	attach(t, a, blue)
	n.says("cannot watch links")
	n.says(unix.EMFILE.Error())
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &before, nil); err != nil {
		t.Fatal(err)
	}
	n.awaitDevice(a.Device()+"@"+blue, control.StateUp)
	ping(t, c)
	n.awaitRecord(c.Key(), c.Endpoint())
}

// inside runs f in the namespace of that name.
func inside(t testing.TB, name string, f func() error) {
	t.Helper()
	s, err := wg.OpenSpace(name)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.Do(f); err != nil {
		t.Fatal(err)
	}
}

// setPrivateKey gives a device of the calling thread's namespace a key of its own.
func setPrivateKey(device string) error {
	key, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		return err
	}
	c, err := wgctrl.New()
	if err != nil {
		return err
	}
	defer c.Close()
	return c.ConfigureDevice(device, wgtypes.Config{PrivateKey: &key})
}
