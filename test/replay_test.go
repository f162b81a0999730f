// SPDX-License-Identifier: MIT

package test

import (
	be "encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/lab"
)

// TestReplayedInitiation: a node that has not heard of a peer before accepts a
// recording of an old handshake initiation, from wherever it comes. Its own
// kernel is misled by that, and nobody else's.
func TestReplayedInitiation(t *testing.T) {
	l := newLab(t, lab.Config{})
	needKernel(t, l)
	a, h, c := l.Gateways[0], l.Gateways[1], l.Clients[0]
	record := tapInitiation(t, a)
	startMesh(t, l)
	ping(t, c)
	initiation := record()
	real := roam(t, c, 0)
	awaitEndpoint(t, h, c, real)

	// The peer is taken away and given back, as by configuration management: the
	// time of its last handshake is forgotten (peer.c, wg_peer_create).
	peers, err := a.Peers()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []wgtypes.PeerConfig{
		{PublicKey: peers[0].PublicKey, Remove: true},
		{PublicKey: peers[0].PublicKey, AllowedIPs: peers[0].AllowedIPs},
	} {
		if err := a.WG().ConfigureDevice(a.Device(), wgtypes.Config{Peers: []wgtypes.PeerConfig{p}}); err != nil {
			t.Fatal(err)
		}
	}
	atA, atH := watch(t, a), watch(t, h)
	atA.says("following endpoint changes")
	atH.says("following endpoint changes")

	forged := netip.AddrPortFrom(h.Addr4, 5555)
	sendFrom(t, h, forged, netip.AddrPortFrom(lab.VIP4, lab.ListenPort), initiation)
	if e := atA.find(c.Key(), forged, 0); e.Cause != wgroam.CauseInitiation.String() {
		t.Errorf("the replay came as %+v", e)
	}

	// A genuine handshake is confirmed, and all that came before it has arrived.
	if _, err := c.RoamPort(); err != nil {
		t.Fatal(err)
	}
	if err := c.Forget(); err != nil {
		t.Fatal(err)
	}
	ping(t, c)
	awaitEndpoint(t, h, c, c.Endpoint())
	for _, e := range atH.seen() {
		if e.New == forged {
			t.Errorf("the standby was misled: %+v", e)
		}
	}
	awaitEndpoint(t, a, c, c.Endpoint())
}

// TestReplayAtStandby: the same recording, sent to a standby whose link is up
// and which has never heard of the peer, does not stay.
func TestReplayAtStandby(t *testing.T) {
	l := newLab(t, lab.Config{})
	needKernel(t, l)
	a, h, c := l.Gateways[0], l.Gateways[1], l.Clients[0]
	record := tapInitiation(t, a)
	nodes := startMesh(t, l)
	ping(t, c)
	initiation := record()
	real := c.Endpoint()
	awaitEndpoint(t, h, c, real)

	atH := watch(t, h)
	atH.says("following endpoint changes")
	forged := netip.AddrPortFrom(a.Addr4, 5555)
	sendFrom(t, a, forged, netip.AddrPortFrom(h.Addr4, lab.ListenPort), initiation)
	if e := atH.find(c.Key(), forged, 0); e.Cause != wgroam.CauseInitiation.String() {
		t.Errorf("the replay came as %+v", e)
	}
	awaitEndpoint(t, h, c, real)
	if s := nodes[1].status(); s.Feed.Sent != 0 {
		t.Errorf("the standby published %d records of a replay", s.Feed.Sent)
	}
}

// tapInitiation records the first handshake initiation that reaches a gateway.
// The function that it returns waits for it.
func tapInitiation(t testing.TB, gw *lab.Gateway) func() []byte {
	t.Helper()
	tap := openTap(t, gw, unix.ETH_P_IP)
	return func() []byte {
		if err := tap.SetReadDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		const ip, udp, size = 20, 8, 148 // headers, and messages.h message_handshake_initiation
		for buf := make([]byte, 1<<16); ; {
			n, err := tap.Read(buf)
			if err != nil {
				t.Fatal(errors.Join(errors.New("no handshake initiation"), err))
			}
			p := buf[:n]
			if n == ip+udp+size && p[0] == 0x45 && p[9] == unix.IPPROTO_UDP &&
				be.BigEndian.Uint16(p[ip+2:]) == lab.ListenPort && p[ip+udp] == 1 {
				return append([]byte(nil), p[ip+udp:]...)
			}
		}
	}
}

// openTap opens a socket that reads, from their IP headers on, the packets of a
// protocol that a gateway receives; with ETH_P_ALL also those that it sends.
func openTap(t testing.TB, gw *lab.Gateway, proto uint16) (tap *os.File) {
	t.Helper()
	err := gw.Do(func() error {
		// Network byte order, as the kernel wants it here.
		proto := be.NativeEndian.Uint16(be.BigEndian.AppendUint16(nil, proto))
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, int(proto))
		if err == nil {
			tap = os.NewFile(uintptr(fd), "tap")
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tap.Close() })
	return tap
}

// sendFrom sends a datagram from a gateway's own address.
func sendFrom(t testing.TB, gw *lab.Gateway, from, to netip.AddrPort, payload []byte) {
	t.Helper()
	err := gw.Do(func() error {
		conn, err := net.DialUDP("udp4", net.UDPAddrFromAddrPort(from), net.UDPAddrFromAddrPort(to))
		if err != nil {
			return err
		}
		defer conn.Close()
		_, err = conn.Write(payload)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}
