// SPDX-License-Identifier: MIT

package test

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"

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
