// SPDX-License-Identifier: MIT

//go:build !vm

package test

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/wgroam/wgroam/internal/lab"
)

// networkd starts systemd-networkd for a gateway, which configures the device that the
// files in dir are about.
func networkd(t testing.TB, gw *lab.Gateway, dir string) *process {
	t.Helper()
	// With a /sys that cannot be written to it does not wait for udev, which does not know the
	// namespace.
	return startCommand(t, gw, exec.Command("unshare", "--mount", "sh", "-euc", `
		mount -t sysfs -o ro sysfs /sys
		mkdir -p /run/systemd
		mount -t tmpfs tmpfs /run/systemd
		mkdir /run/systemd/network
		cp "$0"/*.network /run/systemd/network/
		exec /lib/systemd/systemd-networkd`, dir))
}

// TestNetworkd: nothing leaves a standby whose device systemd-networkd sets up again, with
// the daemon and without; and the new active has all that networkd gave its device.
func TestNetworkd(t *testing.T) {
	for _, mode := range []string{"down", "silent"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			underNetworkd(t, mode)
		})
	}
}

func underNetworkd(t *testing.T, mode string) {
	l := newLab(t, lab.Config{OwnSource: true})
	a, h := l.Gateways[0], l.Gateways[1]
	// Its port is that of networkd's device.
	must(t, h.LinkDown())
	name := fmt.Sprintf("wgd%s%d", mode[:1], os.Getpid())
	dir := t.TempDir()
	// As networkd makes it from a .netdev file, which it cannot without WireGuard in the kernel.
	conf := quickConf(t, dir, name, a, "Table = off", "10.77.0.0/16, fd77::/16")
	must(t, os.WriteFile(filepath.Join(dir, "wg.network"), fmt.Appendf(nil, `[Match]
Name=%s
[Network]
Address=10.77.0.1/24
Address=fd77::1/64
[Route]
Destination=10.77.128.0/17
[Route]
Destination=fd77:1::/32
`, name), 0o644))
	target := netip.MustParseAddr("10.77.0.9")
	wire := capturePackets(t, h)
	at(t, h, "wg-quick", "up", conf)
	d := networkd(t, h, dir)
	await(t, "without wgroam it speaks", func() (bool, string) { return len(wire.take()) > 0, "" })
	dumps := func() string { return anew.ReplaceAllString(dumpsOfDevice(t, h, name), "") }
	var before string
	await(t, "networkd is done", func() (bool, string) {
		before = dumps()
		done := !strings.Contains(before, "tentative")
		for _, has := range []string{"10.77.0.1", "fd77::1", "10.77.128.0/17", "fd77:1::/32"} {
			done = done && strings.Contains(before, has)
		}
		return done, before
	})

	n := startFor(t, h, dir, name, mode)
	wire.take()
	again := func() {
		t.Helper()
		d.stop()
		d = networkd(t, h, dir)
		d.says(name + ": Gained carrier")
		speak(t, h, target)
	}
	for range 2 {
		again()
		awaitQuietDevice(t, h, name, mode)
	}
	wire.none(mode + ", beneath the daemon")
	n.kill()
	again()
	wire.none(mode + ", without the daemon")
	n.run()
	n.awaitState("quiet")
	awaitQuietDevice(t, h, name, mode)
	wire.none(mode + ", with the next daemon")

	must(t, l.MoveVIP(h))
	n.awaitState("open")
	await(t, "the device has all that it had", func() (bool, string) {
		diff := cmp.Diff(before, dumps())
		return diff == "", diff
	})
	wire.fromVIP(mode)
	n.stop()
	d.stop()
	at(t, h, "wg-quick", "down", conf)
}
