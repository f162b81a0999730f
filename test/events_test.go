// SPDX-License-Identifier: MIT

package test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/wgroam/wgroam/internal/control"
	"github.com/wgroam/wgroam/internal/events"
	"github.com/wgroam/wgroam/internal/lab"
)

// withEvents returns a configuration of gw that publishes its roams on url.
func withEvents(gw *lab.Gateway, dir, url, more string, others ...*lab.Gateway) string {
	return config(gw, dir, others...) + fmt.Sprintf("[events]\nenabled = true\nurl = %q\n%s\n", url, more)
}

// published returns the events among messages.
func published(t testing.TB, msgs []*nats.Msg) []events.Event {
	t.Helper()
	var out []events.Event
	for _, m := range msgs {
		var e events.Event
		dec := json.NewDecoder(bytes.NewReader(m.Data))
		dec.DisallowUnknownFields()
		if err := dec.Decode(&e); err != nil {
			t.Fatalf("%s: %v", m.Data, err)
		}
		if want := events.Subject(e.Group, e.Device); m.Subject != want {
			t.Errorf("%s came on %s, want %s", m.Data, m.Subject, want)
		}
		out = append(out, e)
	}
	return out
}

func (n *node) eventsStatus() control.EventsStatus {
	n.t.Helper()
	s := n.whole()
	if s.Events == nil {
		n.t.Fatal("the status has no events")
	}
	return *s.Events
}

// TestEvents: other programs hear of each roam once, from the node that saw it, and of
// nothing else; and the nodes do not notice when nobody takes the events.
func TestEvents(t *testing.T) {
	l := newLab(t, lab.Config{})
	a, h, c := l.Gateways[0], l.Gateways[1], l.Clients[0]
	url, nc, stop := runBus(t, a)
	var rec recorder
	if _, err := nc.Subscribe("wgroam.>", rec.add); err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	dirA, dirH := t.TempDir(), t.TempDir()
	nodeA := startNode(t, a, dirA, withEvents(a, dirA, url, "", h))
	nodeH := startNode(t, h, dirH, withEvents(h, dirH, url, "", a))
	for _, n := range []*node{nodeA, nodeH} {
		n.awaitNodes(1)
		n.says("publishing roams for other programs")
	}

	ping(t, c)
	want := []netip.AddrPort{c.Endpoint()}
	awaitEndpoint(t, h, c, c.Endpoint())
	for i := range 5 {
		ep := roam(t, c, i)
		awaitEndpoint(t, h, c, ep)
		want = append(want, ep)
	}
	if l.Kernel { // without the hook, who did it can be a guess
		setEndpoint(t, a, c.Key(), netip.MustParseAddrPort("192.0.2.99:4242"))
	}
	ep := roam(t, c, 1)
	awaitEndpoint(t, h, c, ep)
	want = append(want, ep)

	var got []events.Event
	await(t, "the last roam is published", func() (bool, string) {
		got = published(t, rec.all())
		return len(got) > 0 && got[len(got)-1].New == ep.String(), fmt.Sprintf("%+v", got)
	})
	group := nodeA.status().Group
	for i, e := range got {
		if i < len(want) && e.New != want[i].String() {
			t.Errorf("event %d is of a roam to %s, want %v", i, e.New, want[i])
		}
		if e.V != events.Schema || e.Node != "gw-"+a.Name || e.Group != group || e.Device != a.Device() || e.Peer != c.Key() {
			t.Errorf("%+v", e)
		}
		if e.Cause == "config" || e.Cause == "snapshot" || time.Since(e.Time) > patience || e.LatencyUS < 0 {
			t.Errorf("%+v", e)
		}
		if i > 0 && i < 6 && e.Old != got[i-1].New {
			t.Errorf("event %d comes from %s, after one to %s", i, e.Old, got[i-1].New)
		}
	}
	if len(got) != len(want) {
		t.Errorf("%d events for %d roams", len(got), len(want))
	}
	if s := nodeH.eventsStatus(); s.Sent != 0 || s.Dropped != 0 || !s.Connected {
		t.Errorf("the node that only follows: %+v", s)
	}

	// Nobody is there to take them.
	stop()
	await(t, "the connection is gone", func() (bool, string) {
		s := nodeA.eventsStatus()
		return !s.Connected, fmt.Sprintf("%+v", s)
	})
	awaitEndpoint(t, h, c, roam(t, c, 0))
	await(t, "an event waits", func() (bool, string) {
		s := nodeA.eventsStatus()
		return s.Sent == uint64(len(want)) && s.Error != "", fmt.Sprintf("%+v", s)
	})
	_, nc, stop = runBus(t, a)
	defer func() { stop() }()
	await(t, "the event that waited is published", func() (bool, string) {
		s := nodeA.eventsStatus()
		return s.Connected && s.Sent == uint64(len(want))+1 && s.Dropped == 0, fmt.Sprintf("%+v", s)
	})

	// Addresses that are not to be read.
	nodeA.stop()
	var redacted recorder
	if _, err := nc.Subscribe("wgroam.events.>", redacted.add); err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	nodeA = startNode(t, a, dirA, withEvents(a, dirA, url, "redact = true", h))
	nodeA.says("publishing roams for other programs")
	for i := range 3 {
		ep = roam(t, c, i)
		awaitEndpoint(t, h, c, ep)
	}
	await(t, "three roams are published", func() (bool, string) {
		got = published(t, redacted.all())
		return len(got) >= 3, fmt.Sprintf("%+v", got)
	})
	for _, e := range got {
		if !strings.HasPrefix(e.New, "~") || !strings.HasPrefix(e.Old, "~") {
			t.Errorf("an address is to be read: %+v", e)
		}
	}
	if len(got) != 3 || !strings.HasSuffix(got[2].New, fmt.Sprintf(":%d", ep.Port())) || got[1].Old != got[0].New {
		t.Errorf("%+v", got)
	}
}
