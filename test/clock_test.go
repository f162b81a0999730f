// SPDX-License-Identifier: MIT

package test

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgroam/wgroam/internal/control"
	"github.com/wgroam/wgroam/internal/lab"
)

// setClock sets the wall clock ahead by so much, or back.
func setClock(t testing.TB, by time.Duration) {
	t.Helper()
	ts := unix.NsecToTimespec(time.Now().Add(by).UnixNano())
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts); err != nil {
		t.Fatal(err)
	}
}

// TestClockSteps: a clock that is set ahead by an hour, or back, keeps no roam
// from the others, and what was stamped meanwhile does not stand in the way.
func TestClockSteps(t *testing.T) {
	if !lab.InVM() {
		t.Skip("this kernel has one wall clock, and it is this machine's")
	}
	l := newLab(t, lab.Config{Clients: 2})
	a, h, c, quiet := l.Gateways[0], l.Gateways[1], l.Clients[0], l.Clients[1]
	nodes := startMesh(t, l)
	ping(t, c)
	ping(t, quiet)
	off := time.Duration(0)
	t.Cleanup(func() { setClock(t, -off) })
	for i, by := range []time.Duration{time.Hour, -time.Hour, -30 * time.Second, 30 * time.Second, -time.Hour, time.Hour} {
		setClock(t, by)
		off += by
		ep := roam(t, c, i%2)
		awaitEndpoint(t, h, c, ep)
		awaitEndpoint(t, a, c, ep)
	}
	// Peers that stayed where they were are known as well as before.
	awaitEndpoint(t, h, quiet, quiet.Endpoint())
	for _, n := range nodes {
		n.awaitNodes(1)
		s := n.status()
		t.Logf("%s: refused %v", n.gw.Name, s.Feed.Refused)
	}
	same(t, l)
}

// clockLine returns what check says of a node's clock, after so many beats of another one
// that those before them do not count any more.
func clockLine(n *node, other *later) control.Finding {
	n.t.Helper()
	for range 20 {
		other.beat()
	}
	checks := n.check().Checks
	i := slices.IndexFunc(checks, func(f control.Finding) bool { return f.Check == "clock" })
	if i < 0 {
		return control.Finding{}
	}
	return checks[i]
}

// awaitBehind waits until check says that a node's clock is behind another's by 20
// seconds.
func awaitBehind(n *node, other *later) {
	n.t.Helper()
	await(n.t, "check says that the clock is behind", func() (bool, string) {
		f := clockLine(n, other)
		var seconds float64
		_, err := fmt.Sscanf(f.Detail, "%f s behind", &seconds)
		return f.State == control.CheckFail && err == nil && seconds > 19 && seconds <= 20, fmt.Sprintf("%+v", f)
	})
}

func awaitAgree(n *node, other *later) {
	n.t.Helper()
	await(n.t, "check says that the clocks agree", func() (bool, string) {
		f := clockLine(n, other)
		return f.State == control.CheckOK, fmt.Sprintf("%+v", f)
	})
}

// startBehind starts a daemon on the second gateway, and another node that has a clock of
// its own and no daemon.
func startBehind(t *testing.T, l *lab.Lab) (*node, *later) {
	t.Helper()
	h := l.Gateways[1]
	url, nc := startBus(t, l.Gateways[0])
	dir := t.TempDir()
	cfg := strings.Replace(onBus(h, dir, url), "[nats]", fmt.Sprintf("role = \"auto\"\nvip = [%q, %q]\n[nats]", lab.VIP4, lab.VIP6), 1)
	n := startNode(t, h, dir, cfg)
	dev, err := h.WG().Device(h.Device())
	if err != nil {
		t.Fatal(err)
	}
	return n, startLater(t, nc, dev.PrivateKey)
}

// TestCheckClock: a standby whose clock is behind is not ready, and says by how much,
// until the clocks agree.
func TestCheckClock(t *testing.T) {
	if lab.InVM() {
		t.Skip("nothing here depends on the kernel, and this one is emulated")
	}
	l := newLab(t, lab.Config{})
	n, other := startBehind(t, l)
	seen := observed(t, l.Clients[0], netip.MustParseAddrPort("198.51.100.7:7001"), other.id())
	other.answer.Store(&seen)
	other.ahead = 20 * time.Second
	awaitBehind(n, other)
	if s := n.status(); s.ClockBehindMS < 19_000 || s.ClockBehindMS > 20_000 || !strings.Contains(s.LastError, "behind") {
		t.Errorf("the status says %d ms, %q", s.ClockBehindMS, s.LastError)
	}
	other.ahead = 0
	awaitAgree(n, other)
	if s := n.status(); s.ClockBehindMS > 1000 || strings.Contains(s.LastError, "behind") {
		t.Errorf("the status still says %d ms, %q", s.ClockBehindMS, s.LastError)
	}
}

// TestClockBehind: check on a standby whose clock is behind says by how much, the peers
// ignore it for that long, and do not when the clock has been corrected. The kernel of
// the test has one clock, so that the active, whose handshakes are from the future, is
// there in the feed and by its device, and has no daemon.
func TestClockBehind(t *testing.T) {
	if !lab.InVM() {
		t.Skip("this kernel has one wall clock, and it is this machine's")
	}
	const behind = 20 * time.Second
	l := newLab(t, lab.Config{})
	a, h, c := l.Gateways[0], l.Gateways[1], l.Clients[0]
	n, active := startBehind(t, l)

	off := time.Duration(0)
	t.Cleanup(func() { setClock(t, -off) })
	set := func(by time.Duration) {
		setClock(t, by)
		off += by
		active.ahead -= by
	}
	ping(t, c)
	// A handshake that the active begins, of a session that it has not yet: the peer
	// keeps its time.
	set(behind)
	if err := errors.Join(a.LinkDown(), a.LinkUp()); err != nil {
		t.Fatal(err)
	}
	began, keepalive := time.Now(), 25*time.Second
	configure(t, a, wgtypes.PeerConfig{PublicKey: wgtypes.Key(c.Key()), UpdateOnly: true, PersistentKeepaliveInterval: &keepalive})
	await(t, "the active calls the peer", func() (bool, string) {
		peers, err := a.Peers()
		if err != nil {
			t.Fatal(err)
		}
		return peers[0].LastHandshakeTime.After(began), peers[0].LastHandshakeTime.String()
	})
	set(-behind)
	active.ahead = behind
	seen := observed(t, c, c.Endpoint(), active.id())
	active.answer.Store(&seen)
	awaitBehind(n, active)
	awaitEndpoint(t, h, c, c.Endpoint())

	if err := a.LinkDown(); err != nil { // it dies
		t.Fatal(err)
	}
	var last time.Time
	promote := func() control.Promotion {
		t.Helper()
		if err := l.MoveVIP(h); err != nil {
			t.Fatal(err)
		}
		var p *control.Promotion
		await(t, "the promotion has ended", func() (bool, string) {
			p = n.status().Failover.Promotion
			return p != nil && p.Began != last && !p.Ended.IsZero(), fmt.Sprintf("%+v", p)
		})
		last = p.Began
		return *p
	}
	if p := promote(); p.Called != 1 || p.Answered != 0 {
		t.Errorf("behind: %+v, want that the peer ignores the call", p)
	}
	if err := l.MoveVIP(a); err != nil {
		t.Fatal(err)
	}
	n.awaitState("quiet")

	set(behind)
	awaitAgree(n, active)
	p := promote()
	if p.Answered != 1 {
		t.Errorf("corrected: %+v, want an answer", p)
	}
	// WireGuard repeats a call after 5 seconds; it was the first that was answered.
	if p.P50MS >= 5000 {
		t.Errorf("corrected: %+v, want an answer to the first call", p)
	}
	t.Logf("corrected: the peer had a session %d ms after the promotion began", p.P50MS)
}
