// SPDX-License-Identifier: MIT

package failover

import (
	"cmp"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/wg"
)

// testKeeper returns a keeper of a link of this thread's namespace, for a device
// with peers that answer at once, and its desk.
func testKeeper(t *testing.T, dir, mode string, d *fakeDevice) (*Keeper, *Desk) {
	t.Helper()
	link, err := netlink.LinkByName("one")
	if err != nil {
		t.Fatal(err)
	}
	desk, _ := testDesk(t, dir, DeskConfig{})
	return NewKeeper(KeeperConfig{
		Device: d, Name: "one", Ifindex: link.Attrs().Index, Desk: desk, Memory: desk.cfg.Memory, Silent: mode == "silent",
		VIP:      []netip.Addr{netip.MustParseAddr("192.0.2.1")},
		Settled:  func() bool { return true },
		Told:     func() bool { return false },
		Seen:     func(wgroam.Key) time.Time { return time.Time{} },
		Behind:   func() time.Duration { return 0 },
		Progress: func(Promotion) {},
		Log:      desk.cfg.Log,
	}), desk
}

// crash is a device that works for a number of calls, and then ends the daemon.
type crash struct {
	*fakeDevice
	left int
	port int // zero for 51820
}

var errCrash = errors.New("crash")

func isCrash(r any) bool {
	err, ok := r.(error)
	return ok && errors.Is(err, errCrash)
}

func (c *crash) Device(name string) (wg.Device, error) {
	if c.left--; c.left < 0 {
		panic(errCrash)
	}
	d, err := c.fakeDevice.Device(name)
	d.Port = cmp.Or(c.port, 51820)
	return d, err
}

func (c *crash) SetKeepalives(name string, all []wg.Keepalive) error {
	if c.left--; c.left < 0 {
		panic(errCrash)
	}
	return c.fakeDevice.SetKeepalives(name, all)
}

// TestKeeperCrashes: wherever a daemon ends between two of its calls to the device, the next
// one goes on, and a device is in the end what it was in the beginning.
func TestKeeperCrashes(t *testing.T) {
	for _, mode := range []string{"down", "silent"} {
		t.Run(mode, func(t *testing.T) {
			inNamespace(t)
			link := newLink(t)
			err := netlink.LinkSetUp(link)
			addr, parseErr := netlink.ParseAddr("fd01::1/64")
			if err == nil && parseErr == nil {
				err = netlink.AddrAdd(link, addr)
			}
			if err = errors.Join(err, parseErr); err != nil {
				t.Fatal(err)
			}
			d := &fakeDevice{t: t, peers: map[wgroam.Key]*fakePeer{}}
			want := map[wgroam.Key]time.Duration{}
			for i := range 100 {
				p := &fakePeer{Peer: wg.Peer{Key: peerKey(i), Endpoint: netip.MustParseAddrPort("192.0.2.9:1"), Keepalive: time.Duration(i%3) * time.Second}, answers: time.Nanosecond}
				d.peers[p.Key], want[p.Key] = p, p.Keepalive
			}
			dir := t.TempDir()
			// run makes steps in a role until one is whole, each time with a new daemon that
			// may make one call more.
			run := func(role Role) (crashes int) {
				for left := 0; ; left++ {
					c := &crash{fakeDevice: d, left: left}
					k, desk := testKeeper(t, dir, mode, d)
					k.cfg.Device = c
					desk.mustSay(t, ByVerb, role)
					whole := func() (whole bool) {
						defer func() {
							if r := recover(); r != nil && !isCrash(r) {
								panic(r)
							}
						}()
						k.Step(t.Context())
						return true
					}()
					if whole {
						if err := k.Status().Err; err != nil {
							t.Fatal(err)
						}
						return left
					}
				}
			}
			for range 2 {
				for _, p := range d.peers {
					p.LastHandshake, p.calls = time.Time{}, nil
				}
				if n := run(Standby); n < 3 {
					t.Errorf("%d crashes on the way to a standby", n)
				}
				link, err := netlink.LinkByName("one")
				if err != nil {
					t.Fatal(err)
				}
				if up := link.Attrs().Flags&1 != 0; up != (mode == "silent") {
					t.Errorf("a standby's link is up: %v", up)
				}
				for _, p := range d.peers {
					if p.Keepalive != 0 {
						t.Errorf("a standby's peer has the interval %v", p.Keepalive)
					}
				}
				k, _ := testKeeper(t, dir, mode, d)
				if says := k.gate.says(); says != shut(51820) {
					t.Errorf("a standby's gate says %q", says)
				}

				if n := run(Active); n < 4 {
					t.Errorf("%d crashes on the way to an active", n)
				}
				for key, p := range d.peers {
					if p.Keepalive != want[key] || len(p.calls) != 1 {
						t.Errorf("an active's peer has the interval %v, want %v, and was called %d times", p.Keepalive, want[key], len(p.calls))
					}
				}
				addrs, err := netlink.AddrList(link, netlink.FAMILY_V6)
				if err != nil || len(addrs) == 0 || addrs[0].IP.String() != "fd01::1" {
					t.Errorf("an active's link has the addresses %v, error %v", addrs, err)
				}
				if says := k.gate.says(); !strings.Contains(says, "sends from 192.0.2.1") {
					t.Errorf("an active's gate says %q", says)
				}
				if k.cfg.Memory, err = OpenMemory(dir, "wg0"); err != nil || k.cfg.Memory.data.Taken != nil {
					t.Errorf("the memory of an active: %+v, error %v", k.cfg.Memory.data.Taken, err)
				}
			}
		})
	}
}

// observed is a device that tells of each time that it is read.
type observed struct {
	*fakeDevice
	read func()
}

func (o *observed) Device(name string) (wg.Device, error) {
	o.read()
	d, err := o.fakeDevice.Device(name)
	d.Port = 51820
	return d, err
}

// newLink makes the link of a test's device; it is down.
func newLink(t *testing.T) netlink.Link {
	t.Helper()
	err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "one"}, PeerName: "two"})
	link, linkErr := netlink.LinkByName("one")
	if err = errors.Join(err, linkErr); err != nil {
		t.Fatal(err)
	}
	return link
}

// TestKeeperRaised: a standby's device that is just being set up may be promoted before
// anything was taken from it, and keeps its intervals.
func TestKeeperRaised(t *testing.T) {
	for _, mode := range []string{"down", "silent"} {
		t.Run(mode, func(t *testing.T) {
			inNamespace(t)
			link := newLink(t)
			d := &fakeDevice{t: t, peers: map[wgroam.Key]*fakePeer{}}
			k, desk := testKeeper(t, t.TempDir(), mode, d)
			k.cfg.Device = &crash{fakeDevice: d, left: 1000}
			desk.mustSay(t, ByVerb, Standby)
			k.Step(t.Context())
			d.peers[peerKey(1)] = &fakePeer{
				Peer:    wg.Peer{Key: peerKey(1), Endpoint: netip.MustParseAddrPort("192.0.2.9:1"), Keepalive: 25 * time.Second},
				answers: time.Nanosecond,
			}
			if err := netlink.LinkSetUp(link); err != nil {
				t.Fatal(err)
			}
			k.Step(t.Context())
			if got := d.peers[peerKey(1)].Keepalive; got == 0 {
				t.Fatal("something was taken from a link that was set up this moment")
			}
			desk.mustSay(t, ByVerb, Active)
			d.peers[peerKey(1)].LastHandshake = time.Now().Add(time.Minute) // by the interval that it has
			k.Step(t.Context())
			if got := d.peers[peerKey(1)].Keepalive; got != 25*time.Second {
				t.Errorf("the interval is %v, want 25s", got)
			}
		})
	}
}

// TestKeeperPatience: who sets a standby's link up has more time while it gets more.
func TestKeeperPatience(t *testing.T) {
	inNamespace(t)
	link := newLink(t)
	d := &fakeDevice{t: t, peers: map[wgroam.Key]*fakePeer{}}
	k, desk := testKeeper(t, t.TempDir(), "down", d)
	k.cfg.Device = &crash{fakeDevice: d, left: 1000}
	desk.mustSay(t, ByVerb, Standby)
	k.Step(t.Context())
	if err := netlink.LinkSetUp(link); err != nil {
		t.Fatal(err)
	}
	k.Step(t.Context())
	for i, more := range []bool{true, false} {
		if more {
			addr, err := netlink.ParseAddr("fd01::1/64") // IPv4 stays anyway
			if err = errors.Join(err, netlink.AddrAdd(link, addr)); err != nil {
				t.Fatal(err)
			}
		}
		before := time.Now().Add(-raisedFor / 2)
		k.raised = before
		k.Step(t.Context())
		if got := k.raised.After(before); got != more {
			t.Errorf("%d: more time %v, want %v", i, got, more)
		}
	}
	k.raised = time.Now().Add(-raisedFor)
	k.Step(t.Context())
	if isUp(t) {
		t.Error("the link is up")
	}
}

// TestKeeperTends: what happens to the gate during a promotion is noticed before its end.
func TestKeeperTends(t *testing.T) {
	inNamespace(t)
	link := newLink(t)
	d := &fakeDevice{t: t, peers: map[wgroam.Key]*fakePeer{
		peerKey(1): {Peer: wg.Peer{Key: peerKey(1), Endpoint: netip.MustParseAddrPort("192.0.2.9:1")}}, // silent
	}}
	k, desk := testKeeper(t, t.TempDir(), "silent", d)
	var said []string // once the rules are gone
	reads := 0
	k.cfg.Device = &observed{d, func() {
		if said != nil {
			said = append(said, k.gate.says())
		}
		if reads++; reads == 5 && k.role == Active {
			if err := k.gate.remove(); err != nil {
				t.Error(err)
			}
			said = []string{}
		}
	}}
	if err := netlink.LinkSetUp(link); err != nil {
		t.Fatal(err)
	}
	desk.mustSay(t, ByVerb, Standby)
	k.Step(t.Context())
	desk.mustSay(t, ByVerb, Active)
	reads = 0
	k.Step(t.Context())
	want := from(k.cfg.VIP, 51820)
	if !slices.Contains(said, want) {
		t.Errorf("after the rules were gone the gate never said %q while the peer was called", want)
	}
}
