// SPDX-License-Identifier: MIT

package tracker

import (
	"fmt"
	"io"
	"net/netip"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/lab"
)

// TestMatrix is the table in ARCHITECTURE.md, for the kernel that runs it: each
// kind of roam, over IPv4 and IPv6, by each rung that an implementation of
// WireGuard leaves possible. It prints how long each took from the client's doing to the
// tracker's word.
func TestMatrix(t *testing.T) {
	needRoot(t)
	var table strings.Builder
	w := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "\nWireGuard\trung\tIPv4 data\thandshake\tidle\tIPv6 data\thandshake\tidle\t")
	for _, row := range []struct {
		userspace bool
		rung      Rung
	}{
		{false, RungFentry}, {false, RungKprobe}, {false, RungPort}, {false, RungPolling},
		{true, RungFentry}, {true, RungKprobe}, {true, RungPort}, {true, RungPolling},
	} {
		implementation := "kernel"
		if row.userspace {
			implementation = "wireguard-go"
		}
		t.Run(implementation+"/"+string(row.rung), func(t *testing.T) {
			if !row.userspace {
				needKernel(t)
			}
			fmt.Fprintf(w, "%s\t%s\t", implementation, row.rung)
			matrixRow(t, w, row.userspace, row.rung)
			fmt.Fprintln(w)
		})
	}
	w.Flush()
	t.Logf("Linux %s, keepalive and so idle at most 1 s, poll interval 20 ms%s", kernelRelease(), &table)
}

// matrixRow runs the roams of one row and prints how long each took.
func matrixRow(t *testing.T, w io.Writer, userspace bool, rung Rung) {
	kernel := polled(t)
	switch rung {
	case RungFentry, RungKprobe:
		kernel = shared[rung]
	case RungPort:
		kernel = ported(t)
	}
	l := newLab(t, lab.Config{Userspace: userspace, Keepalive: time.Second})
	c := l.Clients[0]
	if userspace && (rung == RungFentry || rung == RungKprobe) {
		if l.Kernel {
			t.Fatal("the lab has not made what it was asked for")
		}
		// Not possible, and said so: what is left here is polling.
		v := startRefused(t, l.Gateways[0], kernel)
		if s := v.Status(); s.Rung != RungPolling || !strings.Contains(s.Reason, errUserspace.Error()) {
			t.Errorf("status %+v, want polling because %v", s, errUserspace)
		}
		fmt.Fprint(w, strings.Repeat("not possible\t", 6))
		return
	}
	v := start(t, l.Gateways[0], kernel)
	if err := c.Forget(); err != nil { // to begin a session that is younger than the tracker
		t.Fatal(err)
	}
	reach(t, c)
	v.awaitAt(c, c.Endpoint())
	for range 2 { // IPv4, then IPv6
		for _, roam := range []func() error{
			func() error { return c.Send(1) },
			func() error {
				if err := c.Forget(); err != nil {
					return err
				}
				return c.Send(1)
			},
			func() error { return nil }, // the next keepalive does it
		} {
			began := time.Now()
			ep, err := c.RoamPort()
			if err == nil {
				err = roam()
			}
			if err != nil {
				t.Fatal(err)
			}
			if h := v.awaitAt(c, ep); !h.Cause.Observed() {
				t.Errorf("%v came as %v", ep, h.Cause)
			}
			fmt.Fprintf(w, "%v\t", time.Since(began).Round(time.Millisecond))
			v.awaitProven(ep)
		}
		ep, err := c.RoamFamily()
		if err != nil {
			t.Fatal(err)
		}
		reach(t, c)
		v.awaitProven(ep)
	}
	v.awaitAgreement()
	if s := v.Status(); s.SweepRepairs != 0 {
		t.Errorf("status %+v", s)
	}
}

// awaitProven waits until the newest thing proven is that the peer is at ep.
func (v *live) awaitProven(ep netip.AddrPort) {
	v.t.Helper()
	await(v.t, fmt.Sprintf("it is proven that the client is at %v", ep), func() bool {
		_, proven := v.said()
		return len(proven) > 0 && proven[len(proven)-1].New == ep && proven[len(proven)-1].Cause != wgroam.CauseConfig
	})
}
