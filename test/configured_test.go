// SPDX-License-Identifier: MIT

package test

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgroam/wgroam/internal/lab"
)

// at runs a command in a gateway's namespace and returns what it prints.
func at(t testing.TB, gw *lab.Gateway, args ...string) string {
	t.Helper()
	var out []byte
	err := gw.Do(func() (err error) {
		out, err = exec.Command(args[0], args[1:]...).Output()
		return err
	})
	if err != nil {
		if exit, ok := errors.AsType[*exec.ExitError](err); ok {
			err = fmt.Errorf("%w: %s", err, exit.Stderr)
		}
		t.Fatalf("%v: %v", args, err)
	}
	return string(out)
}

// speak sends a datagram into the tunnel, which WireGuard wants a handshake for.
func speak(t testing.TB, gw *lab.Gateway, to netip.Addr) {
	t.Helper()
	err := gw.Do(func() error {
		c, err := net.Dial("udp", netip.AddrPortFrom(to, lab.EchoPort).String())
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte("x"))
		return err
	})
	// The gate shuts the tunnel as well.
	if err != nil && !errors.Is(err, unix.ENETUNREACH) && !errors.Is(err, unix.EPERM) {
		t.Fatal(err)
	}
}

// TestConfigured: nothing leaves a standby when its device is given a configuration
// with keepalives by wg(8), or set up; and that is what the device has when it is
// promoted.
func TestConfigured(t *testing.T) {
	for _, mode := range []string{"down", "silent"} {
		l := newLab(t, lab.Config{Clients: 3, OwnSource: true})
		h := l.Gateways[1]
		wire := capturePackets(t, h)
		_, n := startPair(t, l, mode)
		n.awaitState("quiet")
		for _, c := range l.Clients {
			ping(t, c)
			awaitEndpoint(t, h, c, c.Endpoint())
		}
		wire.none(mode + ", before")
		conf := filepath.Join(t.TempDir(), "conf")
		text := strings.ReplaceAll(at(t, h, "wg", "showconf", h.Device()), "[Peer]\n", "[Peer]\nPersistentKeepalive = 1\n")
		if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, args := range [][]string{
			{"wg", "syncconf", h.Device(), conf},
			{"wg", "setconf", h.Device(), conf},
			{"ip", "link", "set", h.Device(), "up"},
			{"wg", "addconf", h.Device(), conf},
			{"ip", "link", "set", h.Device(), "down"},
			{"ip", "link", "set", h.Device(), "up"},
		} {
			at(t, h, args...)
			for _, c := range l.Clients {
				speak(t, h, c.Inner4)
			}
		}
		awaitQuiet(t, h, mode)
		wire.none(mode + ", after")

		if err := l.MoveVIP(h); err != nil {
			t.Fatal(err)
		}
		n.awaitState("open")
		for _, c := range l.Clients {
			reach(t, c)
		}
		wire.fromVIP(mode)
		for k, i := range settingsOf(t, h).Keepalives {
			if i != time.Second {
				t.Errorf("%s: peer %v has a keepalive of %v", mode, k, i)
			}
		}
	}
}

// awaitQuiet waits until the gateway's device is that of a standby.
func awaitQuiet(t testing.TB, gw *lab.Gateway, mode string) {
	t.Helper()
	awaitQuietDevice(t, gw, gw.Device(), mode)
}

func awaitQuietDevice(t testing.TB, gw *lab.Gateway, name, mode string) {
	t.Helper()
	await(t, name+" is quiet", func() (bool, string) {
		up := strings.Contains(at(t, gw, "ip", "-o", "link", "show", "dev", name), ",UP")
		conf := at(t, gw, "wg", "show", name, "persistent-keepalive")
		return up == (mode == "silent") && strings.Count(conf, "\toff") == strings.Count(conf, "\n"), fmt.Sprintf("up %v, %s", up, conf)
	})
}

// anew matches what another device has of its own in dumpsOfDevice: its index, and the
// link-local address that the kernel draws.
var anew = regexp.MustCompile(`"ifindex":\d+,|"local":"fe80:[^"]*"`)

// TestQuick: nothing leaves a standby whose device wg-quick takes down and sets up
// again, be it beneath the daemon or while that is dead; and what wg-quick has made,
// a default route in a table of its own, with rules, is there when it is promoted.
func TestQuick(t *testing.T) {
	if lab.InVM() {
		t.Skip("nothing here depends on the kernel, and this one is emulated")
	}
	for _, mode := range []string{"down", "silent"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			quick(t, mode)
		})
	}
}

// quickConf writes a configuration for wg-quick: of a device with a peer at a gateway, where
// nobody answers.
func quickConf(t testing.TB, dir, name string, at *lab.Gateway, device, allowed string) string {
	t.Helper()
	own, err := wgtypes.GeneratePrivateKey()
	must(t, err)
	peer, err := wgtypes.GeneratePrivateKey()
	must(t, err)
	file := filepath.Join(dir, name+".conf")
	must(t, os.WriteFile(file, fmt.Appendf(nil, `[Interface]
PrivateKey = %s
ListenPort = %d
%s
[Peer]
PublicKey = %s
AllowedIPs = %s
Endpoint = %s
PersistentKeepalive = 1
`, own, lab.ListenPort, device, peer.PublicKey(), allowed, netip.AddrPortFrom(at.Addr4, 7)), 0o600))
	return file
}

// startFor starts a daemon for another device of a gateway, which the virtual IP gives the
// role, and waits until it has made it that of a standby.
func startFor(t testing.TB, gw *lab.Gateway, dir, name, mode string) *node {
	t.Helper()
	cfg := roleConfig(gw, dir, fmt.Sprintf("role = \"auto\"\nstandby = %q\nvip = [%q]", mode, lab.VIP4), "")
	n := startNode(t, gw, dir, strings.Replace(cfg, fmt.Sprintf("name = %q", gw.Device()), fmt.Sprintf("name = %q", name), 1))
	n.awaitState("quiet")
	awaitQuietDevice(t, gw, name, mode)
	return n
}

func quick(t *testing.T, mode string) {
	l := newLab(t, lab.Config{OwnSource: true})
	a, h := l.Gateways[0], l.Gateways[1]
	// Its port is that of wg-quick's device.
	if err := h.LinkDown(); err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprintf("wgq%s%d", mode[:1], os.Getpid())
	dir := t.TempDir()
	conf := quickConf(t, dir, name, a, "Address = 10.77.0.1/24, fd77::1/64", "0.0.0.0/0, ::/0")
	target := netip.MustParseAddr("10.77.0.9")
	again := func() {
		t.Helper()
		at(t, h, "wg-quick", "down", conf)
		at(t, h, "wg-quick", "up", conf)
		speak(t, h, target)
	}
	wire := capturePackets(t, h)
	at(t, h, "wg-quick", "up", conf)
	await(t, "without wgroam it speaks", func() (bool, string) { return len(wire.take()) > 0, "" })
	dumps := func() string { return anew.ReplaceAllString(dumpsOfDevice(t, h, name), "") }
	before := dumps()

	n := startFor(t, h, dir, name, mode)
	wire.take()
	for range 2 {
		again()
		awaitQuietDevice(t, h, name, mode)
	}
	wire.none(mode + ", beneath the daemon")
	n.kill()
	again()
	again()
	wire.none(mode + ", without the daemon")
	n.run()
	awaitQuietDevice(t, h, name, mode)
	n.awaitState("quiet")
	wire.none(mode + ", with the next daemon")
	// As after the host was started: neither device nor rules are there.
	n.stop()
	at(t, h, "wg-quick", "down", conf)
	at(t, h, "nft", "flush", "ruleset")
	n.process = start(t, h, nil, "run", "--config", n.file)
	await(t, "the port is shut", func() (bool, string) {
		rules := at(t, h, "nft", "list", "ruleset")
		return strings.Contains(rules, fmt.Sprintf("udp sport %d drop", lab.ListenPort)), rules
	})
	at(t, h, "wg-quick", "up", conf)
	speak(t, h, target)
	awaitQuietDevice(t, h, name, mode)
	n.awaitState("quiet")
	wire.none(mode + ", made after the daemon began")

	// And before it begins.
	n.stop()
	at(t, h, "wg-quick", "down", conf)
	at(t, h, "nft", "flush", "ruleset")
	shut := func(want string) {
		t.Helper()
		if out := at(t, h, binary(t), "shut", "--config", n.file); out != want {
			t.Errorf("wgroam shut says %q, want %q", out, want)
		}
	}
	shut("") // it was this boot in which the daemon ran
	memory := filepath.Join(dir, "failover-"+name+".json")
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	must(t, err)
	said, err := os.ReadFile(memory)
	must(t, err)
	must(t, os.WriteFile(memory, bytes.Replace(said, bytes.TrimSpace(boot), []byte("another"), 1), 0o600))
	shut(name + " is quiet until wgroam runs\n")
	at(t, h, "wg-quick", "up", conf)
	speak(t, h, target)
	n.process = start(t, h, nil, "run", "--config", n.file)
	awaitQuietDevice(t, h, name, mode)
	n.awaitState("quiet")
	speak(t, h, target)
	wire.none(mode + ", made before the daemon began")

	if err := l.MoveVIP(h); err != nil {
		t.Fatal(err)
	}
	n.awaitState("open")
	if diff := cmp.Diff(before, dumps()); diff != "" {
		t.Errorf("%s (-before +after):\n%s", mode, diff)
	}
	wire.fromVIP(mode)
	n.stop()
	at(t, h, "wg-quick", "down", conf)
}
