// SPDX-License-Identifier: MIT

package test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wgroam/wgroam/internal/lab"
)

// TestTrafficIsNoEvent: a million data packets of a peer that stays where it is
// are not worth a word.
func TestTrafficIsNoEvent(t *testing.T) {
	l := newLab(t, lab.Config{})
	needKernel(t, l)
	a, c := l.Gateways[0], l.Clients[0]
	ping(t, c)
	w := watch(t, a)
	w.says("following endpoint changes")

	const packets = 1_000_000
	conn, err := c.Dial(t.Context(), "udp4", lab.DiscardPort)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	began := time.Now()
	base := received(t, a)
	// An inner datagram of 16 bytes is a packet of 80: 28 bytes of headers, padded
	// to 48, and 32 of WireGuard (messages.h, message_data_len). Each is one call
	// of the hook. The kernel cuts what is written into so many (udp(7),
	// UDP_SEGMENT), because an emulated system call costs as much as a packet.
	const payload, size, segments = 16, 80, 64
	segment(t, conn, payload)
	for arrived := int64(0); arrived < packets; {
		for range 16 {
			// A full queue is not a failure: what counts is what arrives.
			_, _ = conn.Write(make([]byte, segments*payload))
		}
		arrived = (received(t, a) - base) / size
		if time.Since(began) > 10*time.Minute {
			t.Fatalf("only %d packets in %v", arrived, time.Since(began))
		}
	}
	t.Logf("%d packets in %v", packets, time.Since(began).Round(time.Millisecond))

	// A roam comes after all of them.
	ep := roam(t, c, 0)
	w.find(c.Key(), ep, 0)
	if events := w.seen(); len(events) != 1 {
		t.Errorf("%d events for %d packets and one roam: %+v", len(events), packets, events)
	}
}

// segment makes the kernel cut what is written to a UDP socket into datagrams.
func segment(t testing.TB, conn net.Conn, payload int) {
	t.Helper()
	raw, err := conn.(*net.UDPConn).SyscallConn()
	if err == nil {
		var serr error
		err = raw.Control(func(fd uintptr) { serr = unix.SetsockoptInt(int(fd), unix.SOL_UDP, unix.UDP_SEGMENT, payload) })
		err = errors.Join(err, serr)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// received returns how many bytes the only peer has sent.
func received(t testing.TB, gw *lab.Gateway) int64 {
	t.Helper()
	peers, err := gw.Peers()
	if err != nil {
		t.Fatal(err)
	}
	return peers[0].ReceiveBytes
}

// TestAgainstScript measures wgroam beside what people do today: a script that
// looks at the active every second and sets on the standby what has changed.
func TestAgainstScript(t *testing.T) {
	l := newLab(t, lab.Config{Clients: 5})
	needKernel(t, l)
	a, h := l.Gateways[0], l.Gateways[1]
	atA, atH := watch(t, a), watch(t, h)
	atA.says("following endpoint changes")
	atH.says("following endpoint changes")
	for _, c := range l.Clients {
		ping(t, c)
	}

	// measure roams every client n times, and returns how long each took from
	// the active's kernel to the standby's, by the kernel hooks on both.
	measure := func(n int) []time.Duration {
		var took []time.Duration
		for i := range n * len(l.Clients) {
			c := l.Clients[i%len(l.Clients)]
			skipA, skipH := len(atA.seen()), len(atH.seen())
			ep := roam(t, c, i)
			seen := atA.find(c.Key(), ep, skipA)
			took = append(took, atH.find(c.Key(), ep, skipH).Time.Sub(seen.Time))
		}
		slices.Sort(took)
		return took
	}

	nodes := startMesh(t, l)
	with := measure(8)
	for _, n := range nodes {
		n.stop()
	}
	ctx, cancel := context.WithCancel(t.Context())
	scriptEnded := make(chan error, 1)
	go func() { scriptEnded <- script(ctx, a, h) }()
	without := measure(4)
	cancel()
	if err := <-scriptEnded; err != nil {
		t.Error(err)
	}

	t.Logf("authenticated by the active's kernel -> written in the standby's device (times of the kernel hooks, one clock):")
	t.Logf("  wgroam                            %3d roams: median %v, p99 %v", len(with), percentile(with, 50), percentile(with, 99))
	t.Logf("  wg show every second, then wg set %3d roams: median %v, p99 %v", len(without), percentile(without, 50), percentile(without, 99))
}

// script is the usual script, around wg(8).
func script(ctx context.Context, from, to *lab.Gateway) error {
	known := make(map[string]string)
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		out, err := wgTool(from, "show", from.Device(), "endpoints")
		if err != nil {
			return err
		}
		for line := range strings.Lines(out) {
			key, ep, ok := strings.Cut(strings.TrimSpace(line), "\t")
			if _, err := netip.ParseAddrPort(ep); !ok || err != nil || known[key] == ep {
				continue
			}
			if _, err := wgTool(to, "set", to.Device(), "peer", key, "endpoint", ep); err != nil {
				return err
			}
			known[key] = ep
		}
	}
}

// wgTool runs wg(8) in a gateway's namespace.
func wgTool(gw *lab.Gateway, args ...string) (string, error) {
	var out strings.Builder
	cmd := exec.Command("wg", args...)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := gw.Start(cmd); err != nil {
		return "", err
	}
	if err := cmd.Wait(); err != nil {
		return "", fmt.Errorf("wg %s: %w: %s", strings.Join(args, " "), err, &out)
	}
	return out.String(), nil
}
