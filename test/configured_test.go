// SPDX-License-Identifier: MIT

package test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

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
	name := gw.Device()
	await(t, name+" is quiet", func() (bool, string) {
		up := strings.Contains(at(t, gw, "ip", "-o", "link", "show", "dev", name), ",UP")
		conf := at(t, gw, "wg", "show", name, "persistent-keepalive")
		return up == (mode == "silent") && strings.Count(conf, "\toff") == strings.Count(conf, "\n"), fmt.Sprintf("up %v, %s", up, conf)
	})
}
