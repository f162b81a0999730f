// SPDX-License-Identifier: MIT

package bpf

import (
	"errors"
	"net"
	"net/netip"
	"runtime"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// enter moves the test to a network namespace of its own, which ends with it. Its
// loopback is up.
func enter(t testing.TB) {
	t.Helper()
	needRoot(t)
	runtime.LockOSThread()
	home, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		defer home.Close()
		if err := netns.Set(home); err != nil {
			t.Error(err) // and the thread stays locked, and ends with the goroutine
			return
		}
		runtime.UnlockOSThread()
	})
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	if err := netlink.LinkSetUp(linkOf(t, "lo")); err != nil {
		t.Fatal(err)
	}
}

func linkOf(t testing.TB, name string) netlink.Link {
	t.Helper()
	l, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// hooks runs a test with each way to attach that the kernel has.
func hooks(t *testing.T, test func(t *testing.T, open func() *Uplink)) {
	needRoot(t)
	for _, name := range []string{"tcx", "clsact"} {
		t.Run(name, func(t *testing.T) {
			if name == "tcx" && !haveTCX(t) {
				t.Skipf("%s has no tcx", kernel())
			}
			enter(t)
			test(t, func() *Uplink {
				u := openUplink(t, 1)
				u.clsact = name == "clsact"
				if err := u.Follow(near.Port()); err != nil {
					t.Fatal(err)
				}
				return u
			})
		})
	}
}

func haveTCX(t testing.TB) bool {
	t.Helper()
	u := openUplink(t, 1)
	a, err := attachTCX(1, u.objs.UplinkIngress, u.objs.UplinkEgress)
	if err != nil {
		if !errors.Is(err, ebpf.ErrNotSupported) {
			t.Fatal(err)
		}
		return false
	}
	if err := a.detach(); err != nil {
		t.Fatal(err)
	}
	return true
}

// sender is a socket at the device's port, and one of a peer, both on loopback.
type sender struct {
	t          testing.TB
	near, peer *net.UDPConn
}

func newSender(t testing.TB) *sender {
	t.Helper()
	s := &sender{t: t}
	for _, c := range []struct {
		conn **net.UDPConn
		addr netip.AddrPort
	}{{&s.near, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), near.Port())}, {&s.peer, netip.MustParseAddrPort("127.0.0.2:7")}} {
		conn, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(c.addr))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		*c.conn = conn
	}
	return s
}

// out and in send a message to and from the peer, and wait for it.
func (s *sender) out(payload []byte) { s.send(s.near, s.peer, payload) }
func (s *sender) in(payload []byte)  { s.send(s.peer, s.near, payload) }

func (s *sender) send(from, to *net.UDPConn, payload []byte) {
	s.t.Helper()
	if _, err := from.WriteTo(payload, to.LocalAddr()); err != nil {
		s.t.Fatal(err)
	}
	if _, _, err := to.ReadFrom(make([]byte, 1<<16)); err != nil {
		s.t.Fatal(err)
	}
}

// TestUplinkAttach: both directions, once, until Detach.
func TestUplinkAttach(t *testing.T) {
	hooks(t, func(t *testing.T, open func() *Uplink) {
		u := open()
		w, s := &wire{t, u}, newSender(t)
		peer := s.peer.LocalAddr().(*net.UDPAddr).AddrPort()
		for i := range uint32(2) {
			l, r := 10+i, 20+i
			for range 2 {
				if err := u.Attach(1); err != nil {
					t.Fatal(err)
				}
			}
			s.out(response(l, r))
			s.in(data(l))
			s.out(data(r))
			w.want(
				UplinkEvent{Kind: UplinkResponse, Local: l, Remote: r, Addr: peer, Message: response(l, r)[:76]},
				UplinkEvent{Kind: UplinkHint, Local: l, Addr: peer},
				UplinkEvent{Kind: UplinkConfirmed, Remote: r, Addr: peer},
			)
			for range 2 {
				if err := u.Detach(1); err != nil {
					t.Fatal(err)
				}
			}
			s.out(data(30))
			w.want()
		}
		if err := u.Attach(4711); !errors.Is(err, unix.ENODEV) {
			t.Errorf("Attach to no link: %v, want %v", err, unix.ENODEV)
		}
	})
}
