// SPDX-License-Identifier: MIT

package failover

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/wgroam/wgroam/internal/wg"
)

// TestGate: shut, nothing passes the port and all else does; open, what leaves the
// port has the source that it should, and the checksum for that.
func TestGate(t *testing.T) {
	inNamespace(t)
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	for _, a := range []string{"10.9.9.1/32", "10.9.9.2/32", "10.9.9.3/32", "fd09::1/128", "fd09::2/128"} {
		var addr *netlink.Addr
		if err == nil {
			addr, err = netlink.ParseAddr(a)
		}
		if err == nil {
			addr.Flags |= unix.IFA_F_NODAD
			err = netlink.AddrAdd(lo, addr)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	const port, other = 51820, 51821
	listen := func(port int) *net.UDPConn {
		c, err := net.ListenUDP("udp", &net.UDPAddr{Port: port})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	guarded, free := listen(port), listen(other)
	// pass sends a datagram and returns the source that it arrives with, or an
	// invalid address if the kernel says that it may not be sent, or it does not
	// arrive before one that is sent after it on a way that is always open.
	pass := func(from, to *net.UDPConn, dst string, toPort int) netip.Addr {
		t.Helper()
		addr := netip.AddrPortFrom(netip.MustParseAddr(dst), uint16(toPort))
		_, err := from.WriteToUDPAddrPort([]byte("x"), addr)
		if errors.Is(err, unix.EPERM) {
			return netip.Addr{}
		}
		if err != nil {
			t.Fatal(err)
		}
		// Over lo a datagram is there, or dropped, when it has been sent.
		buf := make([]byte, 16)
		if err := to.SetReadDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		_, src, err := to.ReadFromUDPAddrPort(buf)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return netip.Addr{}
		}
		if err != nil {
			t.Fatal(err)
		}
		return src.Addr().Unmap()
	}
	want := func(what string, got netip.Addr, want string) {
		t.Helper()
		if w, _ := netip.ParseAddr(want); got != w {
			t.Errorf("%s: arrived from %v, want %q", what, got, want)
		}
	}
	// The one's name is the beginning of the other's.
	err = netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "wg0"}, PeerName: "wg01"})
	for _, name := range []string{"wg0", "wg01"} {
		var link netlink.Link
		if err == nil {
			link, err = netlink.LinkByName(name)
		}
		if err == nil {
			err = netlink.LinkSetUp(link)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	// enters tells whether what is sent into a tunnel goes there.
	enters := func(name string) bool {
		t.Helper()
		lc := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
			var serr error
			err := raw.Control(func(fd uintptr) { serr = unix.BindToDevice(int(fd), name) })
			return errors.Join(err, serr)
		}}
		c, err := lc.ListenPacket(t.Context(), "udp4", "")
		if err == nil {
			defer c.Close()
			_, err = c.WriteTo([]byte("x"), &net.UDPAddr{IP: net.IPv4(192, 0, 2, 1), Port: other})
		}
		if err != nil && !errors.Is(err, unix.EPERM) {
			t.Fatal(err)
		}
		return err == nil
	}
	g := newGate(nil, "wg0")
	says := func(want string) {
		t.Helper()
		if got := g.says(); got != want {
			t.Errorf("the gate says %q, want %q", got, want)
		}
	}
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}

	says("")
	check(g.remove())
	want("without a gate", pass(guarded, free, "10.9.9.1", other), "10.9.9.1")
	for range 2 {
		check(g.shut(port))
		says(shut(port))
		want("out, shut", pass(guarded, free, "10.9.9.1", other), "")
		want("out, shut, IPv6", pass(guarded, free, "fd09::1", other), "")
		want("in, shut", pass(free, guarded, "10.9.9.1", port), "")
		want("in, shut, IPv6", pass(free, guarded, "fd09::1", port), "")
		want("another port", pass(free, free, "10.9.9.1", other), "10.9.9.1")
		if n := g.heard(); n != 0 {
			t.Errorf("%d packets of WireGuard are counted, and there were none", n)
		}
		for _, says := range []string{"\x01\x00\x00\x00hello", "\x04\x00\x00\x00data", "\x02\x00\x00\x00no", "\x04\x00\x01\x00no"} {
			for _, dst := range []string{"10.9.9.1", "fd09::1"} {
				if _, err := free.WriteToUDPAddrPort([]byte(says), netip.AddrPortFrom(netip.MustParseAddr(dst), port)); err != nil {
					t.Error(err)
				}
			}
		}
		if n := g.heard(); n != 4 {
			t.Errorf("%d packets of WireGuard are counted, want 4", n)
		}
		if enters("wg0") || !enters("wg01") {
			t.Error("shut, something enters the tunnel, or nothing another one")
		}

		check(g.open(nil, port))
		says(opened)
		want("out, opened", pass(guarded, free, "10.9.9.1", other), "10.9.9.1")
		want("in, opened", pass(free, guarded, "10.9.9.1", port), "10.9.9.1")
		check(g.shut(port))
		vips := []netip.Addr{netip.MustParseAddr("10.9.9.2"), netip.MustParseAddr("10.9.9.3"), netip.MustParseAddr("fd09::2")}
		for _, way := range []struct {
			open func([]netip.Addr, int) error
			says string
		}{{g.open, opened}, {g.from, from(vips, port)}} {
			check(way.open(vips, port))
			says(way.says)
			if !enters("wg0") {
				t.Error("open, nothing enters the tunnel")
			}
			sums := captureSums(t, lo.Attrs().Index)
			want("out", pass(guarded, free, "10.9.9.1", other), "10.9.9.2")
			want("out, IPv6", pass(guarded, free, "fd09::1", other), "fd09::2")
			want("out, with another VIP already", pass(guarded, free, "10.9.9.3", other), "10.9.9.3")
			want("in", pass(free, guarded, "10.9.9.1", port), "10.9.9.1")
			want("another port", pass(free, free, "10.9.9.1", other), "10.9.9.1")
			sums(5)
		}

		check(g.from(vips[:1], port))
		want("out, IPv6, with a VIP of IPv4 alone", pass(guarded, free, "fd09::1", other), "fd09::1")
	}
	// As another tool does that loads a ruleset.
	conn, err := nftables.New()
	check(err)
	conn.FlushRuleset()
	check(conn.Flush())
	says("")
	check(g.shut(port))
	check(g.remove())
	says("")
	want("without a gate", pass(guarded, free, "10.9.9.1", other), "10.9.9.1")
}

// TestGateOfMany: what the gate says fits in, however many addresses there are.
func TestGateOfMany(t *testing.T) {
	inNamespace(t)
	g := newGate(nil, "wg0")
	var vips []netip.Addr
	for i := range 16 { // as many as the configuration can have
		vips = append(vips, netip.AddrFrom16([16]byte{0: 0xfd, 8: 1, 15: byte(i)}))
		says := from(vips, 51820)
		if err := g.from(vips, 51820); err != nil || g.says() != says {
			t.Fatalf("%d addresses: error %v, the gate says %q, want %q", len(vips), err, g.says(), says)
		}
	}
}

// TestGateWatch: who watches the rules hears of it when another tool flushes them.
func TestGateWatch(t *testing.T) {
	inNamespace(t)
	g := newGate(nil, "wg0")
	if err := g.shut(51820); err != nil {
		t.Fatal(err)
	}
	woken := make(chan struct{}, 1)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	space, err := wg.OpenSpace("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer space.Close()
	go func() { ended <- newGate(space, "wg0").watch(ctx, func() { woken <- struct{}{} }) }()
	hear := func(what string) {
		t.Helper()
		select {
		case <-woken:
		case err := <-ended:
			t.Fatalf("%s: the watch has ended: %v", what, err)
		case <-time.After(20 * time.Second):
			t.Fatalf("%s: nothing was heard", what)
		}
	}
	hear("at the start")
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	conn.FlushRuleset()
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
	hear("after a flush")
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("in the end: %v", err)
	}
}

// captureSums captures what goes over a link; the function that it returns checks
// the checksums of so many datagrams. What is not computed yet, because the link
// can do it, has the sum of the pseudo header (net/ipv4/udp.c, udp_set_csum).
func captureSums(t *testing.T, ifindex int) func(count int) {
	t.Helper()
	all := int(binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, unix.ETH_P_ALL)))
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, all)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: uint16(all), Ifindex: ifindex})
	}
	if err != nil {
		t.Fatal(err)
	}
	return func(count int) {
		t.Helper()
		defer unix.Close(fd)
		seen := 0
		for {
			b := make([]byte, 2048)
			n, from, err := unix.Recvfrom(fd, b, 0)
			if errors.Is(err, unix.EAGAIN) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			if ll, ok := from.(*unix.SockaddrLinklayer); !ok || ll.Pkttype != unix.PACKET_OUTGOING {
				continue
			}
			b = b[:n]
			var pseudo, udp []byte
			switch b[0] >> 4 {
			case 4:
				if sum(b[:20]) != 0xffff {
					t.Errorf("a wrong checksum in the IPv4 header %x", b[:20])
				}
				pseudo, udp = b[12:20], b[20:]
			case 6:
				pseudo, udp = b[8:40], b[40:]
			}
			seen++
			pseudo = binary.BigEndian.AppendUint32(append([]byte{0, unix.IPPROTO_UDP}, pseudo...), uint32(len(udp)))
			partial, whole := sum(pseudo) == binary.BigEndian.Uint16(udp[6:]), sum(append(pseudo, udp...)) == 0xffff
			if !partial && !whole {
				t.Errorf("a wrong checksum in %x", b)
			}
		}
		if seen != count {
			t.Errorf("%d datagrams captured, want %d", seen, count)
		}
	}
}

// sum is the sum that Internet checksums are the complement of.
func sum(b []byte) uint16 {
	var s uint32
	if len(b)%2 == 1 {
		b = append(append([]byte{}, b...), 0)
	}
	for ; len(b) > 0; b = b[2:] {
		s += uint32(binary.BigEndian.Uint16(b))
	}
	for s > 0xffff {
		s = s&0xffff + s>>16
	}
	return uint16(s)
}
