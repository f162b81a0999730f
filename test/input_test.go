// SPDX-License-Identifier: MIT

package test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/wgroam/wgroam/internal/control"
	"github.com/wgroam/wgroam/internal/lab"
)

// TestUsage: exit status and words of wrong command lines and configurations.
func TestUsage(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	nobody := filepath.Join(dir, "no.sock")
	for name, c := range map[string]struct {
		args   []string
		status int
		says   []string
	}{
		"nothing":        {nil, 2, []string{"usage: wgroam VERB", "run", "watch", "status", "peers", "check", "shut", "demo", "version"}},
		"help":           {[]string{"help"}, 0, nil},
		"unknown verb":   {[]string{"walk"}, 2, []string{`unknown verb "walk"`}},
		"unknown flag":   {[]string{"run", "--frob"}, 2, []string{"-frob"}},
		"leftover":       {[]string{"status", "please"}, 2, []string{`unexpected argument "please"`}},
		"run what":       {[]string{"run"}, 2, []string{"--config", "--device"}},
		"run both":       {[]string{"run", "--config", "x", "--device", "y"}, 2, []string{"--config", "--device"}},
		"no config":      {[]string{"run", "--config", filepath.Join(dir, "none.toml")}, 1, []string{"none.toml", "--device"}},
		"unknown key":    {[]string{"run", "--config", file("key.toml", "nodes = \"a\"\n[[device]]\nname = \"wg0\"\n")}, 1, []string{"key.toml", "nodes", "node"}},
		"bad role":       {[]string{"run", "--config", file("role.toml", "[[device]]\nname = \"wg0\"\nrole = \"boss\"\n")}, 1, []string{"boss", "active", "standby"}},
		"no TOML":        {[]string{"run", "--config", file("toml.toml", "node = = 1")}, 1, []string{"toml.toml"}},
		"bad device":     {[]string{"run", "--device", "a/b"}, 1, []string{"a/b"}},
		"watch nothing":  {[]string{"watch", "--device", "nosuch0", "--socket", nobody}, 1, []string{"nosuch0"}},
		"status, nobody": {[]string{"status", "--socket", nobody}, 1, []string{nobody, "wgroam run"}},
		"peers, nobody":  {[]string{"peers", "--json", "--socket", nobody}, 1, []string{nobody, "wgroam run"}},
		"role of nobody": {[]string{"role", "boss", "--socket", nobody}, 2, []string{`"boss" is not a role to set`}},
		"feed of nobody": {[]string{"check", "--feed", "--config", filepath.Join(dir, "none.toml")}, 1, []string{"none.toml"}},
		"check please":   {[]string{"check", "please"}, 2, []string{`unexpected argument "please"`}},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), binary(t), c.args...)
			var stdout, stderr bytes.Buffer
			cmd.Stdout, cmd.Stderr = &stdout, &stderr
			err := cmd.Run()
			if _, ended := errors.AsType[*exec.ExitError](err); err != nil && !ended {
				t.Fatal(err)
			}
			if got := cmd.ProcessState.ExitCode(); got != c.status {
				t.Errorf("exit status %d, want %d", got, c.status)
			}
			if c.status != 0 && stdout.Len() > 0 {
				t.Errorf("talk on stdout: %q", &stdout)
			}
			for _, s := range c.says {
				if !strings.Contains(stderr.String(), s) {
					t.Errorf("stderr lacks %q:\n%s", s, &stderr)
				}
			}
		})
	}
}

// TestDeviceComesAndGoes: a daemon waits for a device that is missing, and for
// one that went away.
func TestDeviceComesAndGoes(t *testing.T) {
	l := newLab(t, lab.Config{})
	needKernel(t, l)
	a := l.Gateways[0]
	dir := t.TempDir()
	n := &node{gw: a, socket: filepath.Join(dir, "control.sock")}
	file := filepath.Join(dir, "wgroam.toml")
	cfg := fmt.Sprintf("[[device]]\nname = \"wg9\"\n[control]\nsocket = %q\n", n.socket)
	if err := os.WriteFile(file, []byte(cfg), 0o600); err != nil {
		t.Fatal(err)
	}
	n.process = start(t, a, nil, "run", "--config", file)
	n.says("wg9")
	if s := n.status(); s.State != control.StateWaiting || !strings.Contains(s.LastError, "wg9") {
		t.Errorf("status without a device: %+v", s)
	}
	state := func(want string) func() (bool, string) {
		return func() (bool, string) {
			s := n.status()
			return s.State == want, fmt.Sprintf("%+v", s)
		}
	}
	for range 2 {
		link := &netlink.Wireguard{LinkAttrs: netlink.LinkAttrs{Name: "wg9"}}
		if err := a.Do(func() error { return netlink.LinkAdd(link) }); err != nil {
			t.Fatal(err)
		}
		// A device without a key belongs to no group yet.
		await(t, "says that there is no key", func() (bool, string) {
			s := n.status()
			return strings.Contains(s.LastError, "private-key"), s.LastError
		})
		setKey(t, a, "wg9")
		await(t, "device is followed", state(control.StateDown))
		if s := n.status(); s.Detector.Rung != control.RungFentry || s.Detector.Reason != "" {
			t.Errorf("detector: %+v", s.Detector)
		}
		if err := a.Do(func() error { return netlink.LinkDel(link) }); err != nil {
			t.Fatal(err)
		}
		await(t, "device is missed", state(control.StateMissing))
	}
}

// TestNoBTF: on a kernel without BTF the UDP port is watched, and the status says
// why.
func TestNoBTF(t *testing.T) {
	l := newLab(t, lab.Config{})
	needKernel(t, l)
	a, h, c := l.Gateways[0], l.Gateways[1], l.Clients[0]
	dirA, dirH := t.TempDir(), t.TempDir()
	startNode(t, h, dirH, config(h, dirH, a))

	file := filepath.Join(dirA, "wgroam.toml")
	if err := os.WriteFile(file, []byte(config(a, dirA, h)), 0o600); err != nil {
		t.Fatal(err)
	}
	// A mount namespace in which the kernel's BTF is not to be seen.
	p := &process{t: t, exited: make(chan struct{})}
	p.cmd = exec.Command("sh", "-c", `mount -t tmpfs none /sys/kernel/btf && exec "$0" "$@"`, binary(t), "run", "--config", file)
	p.cmd.Stderr = &p.stderr
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Unshareflags: unix.CLONE_NEWNS}
	if err := a.Start(p.cmd); err != nil {
		t.Fatal(err)
	}
	go func() { p.err = p.cmd.Wait(); close(p.exited) }()
	t.Cleanup(func() { p.stop() })
	p.says("following endpoint changes")

	n := &node{process: p, gw: a, socket: filepath.Join(dirA, "control.sock")}
	n.awaitRung(control.RungPort, "BTF")
	ping(t, c)
	awaitEndpoint(t, h, c, c.Endpoint())
	for i := range 6 {
		awaitEndpoint(t, h, c, roam(t, c, i))
	}
}

// TestPortInUse: a node that cannot serve the others goes on through their
// servers.
func TestPortInUse(t *testing.T) {
	l := newLab(t, lab.Config{})
	a, h, c := l.Gateways[0], l.Gateways[1], l.Clients[0]
	addr := netip.AddrPortFrom(a.Addr4, 4950).String()
	var squatter net.Listener
	if err := a.Do(func() (err error) {
		squatter, err = net.Listen("tcp", addr)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer squatter.Close()
	dirA, dirH := t.TempDir(), t.TempDir()
	startNode(t, h, dirH, config(h, dirH, a))
	n := startNode(t, a, dirA, config(a, dirA, h))
	n.says(addr)
	if s := n.status(); !strings.Contains(s.LastError, addr) || !strings.Contains(s.LastError, "another program") {
		t.Errorf("status: %+v", s)
	}
	n.awaitNodes(1)
	ping(t, c)
	awaitEndpoint(t, h, c, c.Endpoint())
	awaitEndpoint(t, h, c, roam(t, c, 0))

	// The address is taken as soon as it can be had.
	squatter.Close()
	n.says("serving the other nodes now")
	await(t, "its own server", func() (bool, string) {
		s := n.status()
		return s.LastError == "" && len(s.Feed.Connections) == 2, fmt.Sprintf("%+v", s)
	})
	n.awaitNodes(1)
	awaitEndpoint(t, h, c, roam(t, c, 1))
}

// TestBadDevice: one device that cannot be served is no reason to leave the
// other alone.
func TestBadDevice(t *testing.T) {
	l := newLab(t, lab.Config{Gateways: []string{"a"}})
	a, c := l.Gateways[0], l.Clients[0]
	// A link that is no WireGuard device, with the socket of an implementation
	// that has died.
	const dead = "wgdead0"
	if err := a.Do(func() error {
		return netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: dead}})
	}); err != nil {
		t.Fatal(err)
	}
	socket := "/var/run/wireguard/" + dead + ".sock"
	if err := os.MkdirAll(filepath.Dir(socket), 0o755); err != nil {
		t.Fatal(err)
	}
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	listener.SetUnlinkOnClose(false)
	listener.Close()
	t.Cleanup(func() { os.Remove(socket) })

	dir := t.TempDir()
	cfg := config(a, dir) + fmt.Sprintf("[[device]]\nname = %q\n", dead)
	n := startNode(t, a, dir, cfg)
	n.says(dead)
	ping(t, c)
	await(t, "the other device is served", func() (bool, string) {
		var s control.Status
		if err := control.Get(t.Context(), n.socket, control.VerbStatus, &s); err != nil {
			t.Fatal(err)
		}
		for _, d := range s.Devices {
			if d.Name == a.Device() {
				return d.Records == 1, fmt.Sprintf("%+v", s)
			}
		}
		return false, fmt.Sprintf("%+v", s)
	})
}

// TestUnreachableNode: a node that is not there is shown, and holds up nobody.
func TestUnreachableNode(t *testing.T) {
	l := newLab(t, lab.Config{Gateways: []string{"a", "h", "x"}})
	a, h, x, c := l.Gateways[0], l.Gateways[1], l.Gateways[2], l.Clients[0]
	if err := x.Kill(); err != nil {
		t.Fatal(err)
	}
	nodes := make([]*node, 2)
	for i, gw := range []*lab.Gateway{a, h} {
		dir := t.TempDir()
		nodes[i] = startNode(t, gw, dir, config(gw, dir, others(l, gw)...))
	}
	nodes[0].awaitNodes(1)
	ping(t, c)
	awaitEndpoint(t, h, c, roam(t, c, 0))
	await(t, "status names the node that is away", func() (bool, string) {
		s := nodes[0].status()
		for _, conn := range s.Feed.Connections {
			if conn.Name == netip.AddrPortFrom(x.Addr4, 4950).String() {
				return !conn.Connected && conn.Error != "", fmt.Sprintf("%+v", conn)
			}
		}
		return false, fmt.Sprintf("%+v", s.Feed)
	})
	if err := x.Revive(); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	startNode(t, x, dir, config(x, dir, a, h)).awaitNodes(2)
	awaitEndpoint(t, x, c, c.Endpoint())
}

// TestOneDevice: a device name is all the configuration it takes, and one daemon
// is enough for a socket.
func TestOneDevice(t *testing.T) {
	l := newLab(t, lab.Config{})
	a, c := l.Gateways[0], l.Clients[0]
	const socket = "/run/wgroam/control.sock" // the default is the point
	if control.Get(t.Context(), socket, control.VerbStatus, new(control.Status)) == nil {
		t.Fatalf("a wgroam runs on this machine: stop it first (%s)", socket)
	}
	p := start(t, a, nil, "run", "--device", a.Device())
	p.says("following endpoint changes")
	n := &node{process: p, gw: a, socket: socket}
	ping(t, c)
	await(t, "the peer is known", func() (bool, string) {
		s := n.status()
		return s.Records == 1 && s.Feed.Mode == control.FeedNone, fmt.Sprintf("%+v", s)
	})
	second := start(t, a, nil, "run", "--device", a.Device())
	second.says("another wgroam")
	<-second.exited
	if second.err == nil {
		t.Error("a second daemon on one socket ended well")
	}
	// The verbs find it without being told where.
	for _, args := range [][]string{{"status"}, {"status", "--json"}, {"peers"}, {"peers", "--json"}} {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		out, err := exec.CommandContext(ctx, binary(t), args...).Output()
		cancel()
		if err != nil || !strings.Contains(string(out), a.Device()) {
			t.Errorf("%v: %v: %s", args, err, out)
		}
	}
}

// TestWatchDaemon: watch through a daemon shows what a watch of its own shows.
func TestWatchDaemon(t *testing.T) {
	l := newLab(t, lab.Config{})
	a, c := l.Gateways[0], l.Clients[0]
	dir := t.TempDir()
	n := startNode(t, a, dir, config(a, dir))
	w := watch(t, a, "--socket", n.socket)
	w.says("watching through the daemon")
	ping(t, c)
	w.find(c.Key(), c.Endpoint(), 0)
	old := c.Endpoint()
	for i := range 3 {
		ep := roam(t, c, i)
		e := w.find(c.Key(), ep, i+1)
		if e.Old != old || e.Device != a.Device() || e.LatencyUS < 0 || e.Time.IsZero() || e.Cause == "config" {
			t.Errorf("roam %d from %v to %v: %+v", i, old, ep, e)
		}
		old = ep
	}
	if took := w.stop(); took > soon() || w.err != nil {
		t.Errorf("watch took %v to stop: %v", took, w.err)
	}
	alone := watch(t, a, "--socket", "/nonexistent")
	alone.says("following endpoint changes")
	if took := alone.stop(); took > soon() || alone.err != nil {
		t.Errorf("watch took %v to stop: %v", took, alone.err)
	}
}
