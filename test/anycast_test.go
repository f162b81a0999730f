// SPDX-License-Identifier: MIT

//go:build !vm

package test

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wgroam/wgroam/internal/lab"
)

// TestAnycast does what contrib/anycast/README.md says: the gateways have one address
// and no role, and whichever of them the network leads the peers to knows where they
// are. What it sends to them arrives at once, from that address, and they stay on it.
func TestAnycast(t *testing.T) {
	l := newLab(t, lab.Config{Clients: 4})
	must(t, l.RouteVIP(l.Gateways[0]))
	for _, gw := range l.Gateways {
		dir := t.TempDir()
		startNode(t, gw, dir, roleConfig(gw, dir, `role = "always"`, "", others(l, gw)...)).awaitRole("always", "config")
	}
	for _, c := range l.Clients {
		ping(t, c)
	}
	a, h := l.Gateways[0], l.Gateways[1]
	flip := func(from, to *lab.Gateway) {
		t.Helper()
		for i, c := range l.Clients {
			awaitEndpoint(t, to, c, roam(t, c, i))
		}
		must(t, l.RouteVIP(to))
	}

	flip(a, h)
	var arrived, answered []time.Duration
	for _, c := range l.Clients {
		arrived = append(arrived, push(t, h, c))
		rtt, err := c.Reach(t.Context())
		must(t, err)
		answered = append(answered, rtt)
		isOnVIP(t, c)
	}
	t.Logf("from a to h: a packet of the gateway arrives after %v, and is answered after %v", arrived, answered)
	// A client that had to find out by itself would take 15 s.
	if slices.Max(answered) > 10*time.Second {
		t.Errorf("a client has had to find out by itself")
	}

	// a has the sessions of before, which the clients do not use any more.
	flip(h, a)
	back := make([]time.Duration, len(l.Clients))
	var wg sync.WaitGroup
	for i, c := range l.Clients {
		wg.Go(func() {
			// WireGuard looks after 15 s, and then every 5.
			ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
			defer cancel()
			var err error
			if back[i], err = c.Reach(ctx); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	t.Logf("from h back to a: the clients are answered after %v", back)
	for _, c := range l.Clients {
		isOnVIP(t, c)
	}
}

// push sends a client a datagram through the tunnel, every 10 ms until one has
// arrived, and returns how long that took.
func push(t testing.TB, from *lab.Gateway, to *lab.Client) time.Duration {
	t.Helper()
	lc := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var serr error
		err := raw.Control(func(fd uintptr) { serr = unix.BindToDevice(int(fd), to.Device()) })
		return errors.Join(err, serr)
	}}
	var rx net.PacketConn
	must(t, to.Do(func() (err error) {
		rx, err = lc.ListenPacket(t.Context(), "udp4", netip.AddrPortFrom(to.Inner4, 0).String())
		return err
	}))
	defer rx.Close()
	var tx net.Conn
	must(t, from.Do(func() (err error) {
		tx, err = net.Dial("udp4", rx.LocalAddr().String())
		return err
	}))
	defer tx.Close()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	began := time.Now()
	for ctx.Err() == nil {
		_, err := tx.Write([]byte("wgroam"))
		must(t, err)
		must(t, rx.SetReadDeadline(time.Now().Add(10*time.Millisecond)))
		if _, _, err := rx.ReadFrom(make([]byte, 64)); err == nil {
			return time.Since(began)
		}
	}
	t.Fatalf("nothing from %s arrives in %v", from.Name, patience)
	return 0
}

// isOnVIP fails unless a client talks to the virtual IP, and not to the own address
// of a gateway.
func isOnVIP(t testing.TB, c *lab.Client) {
	t.Helper()
	at, err := c.Remote()
	must(t, err)
	if !slices.Contains([]netip.AddrPort{netip.AddrPortFrom(lab.VIP4, lab.ListenPort), netip.AddrPortFrom(lab.VIP6, lab.ListenPort)}, at) {
		t.Errorf("the client has roamed to %v", at)
	}
}
