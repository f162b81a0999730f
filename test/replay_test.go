// SPDX-License-Identifier: MIT

package test

import (
	be "encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/control"
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

// TestReplayAtPromotion: a recorded initiation, replayed at the standby and then at
// the node that has just taken over, which has heard of no peer and believes it, ends
// with the genuine endpoint on both.
func TestReplayAtPromotion(t *testing.T) {
	for _, mode := range []string{"down", "silent"} {
		t.Run(mode, func(t *testing.T) {
			l := newLab(t, lab.Config{})
			a, h, c := l.Gateways[0], l.Gateways[1], l.Clients[0]
			record := tapInitiation(t, a)
			na, nh := startPair(t, l, mode)
			na.awaitState("open")
			nh.awaitState("quiet")
			ping(t, c)
			initiation := record()
			real := roam(t, c, 1)
			awaitEndpoint(t, h, c, real)
			wire := capturePackets(t, h)
			atH := watch(t, h, "--socket", nh.socket)
			atH.says("watching through the daemon")

			forged := netip.AddrPortFrom(a.Addr4, 5555)
			sendFrom(t, a, forged, netip.AddrPortFrom(h.Addr4, lab.ListenPort), initiation)
			if err := l.MoveVIP(h); err != nil {
				t.Fatal(err)
			}
			await(t, "the peer has answered the new active", func() (bool, string) {
				p := nh.status().Failover.Promotion
				return p != nil && p.Answered == 1, fmt.Sprintf("%+v", p)
			})
			// From the address that the node took over, which the forger does not have.
			for _, e := range atH.seen() {
				if e.New == forged {
					t.Errorf("the replay at the standby moved the peer: %+v", e)
				}
			}
			for _, p := range wire.take() {
				if p.from != lab.VIP4 && p.from != lab.VIP6 {
					t.Errorf("the standby answered from %v", p.from)
				}
			}
			sendFrom(t, a, forged, netip.AddrPortFrom(lab.VIP4, lab.ListenPort), initiation)
			if e := atH.find(c.Key(), forged, 0); e.Cause != wgroam.CauseInitiation.String() {
				t.Errorf("the replay came as %+v", e)
			}
			// The client says nothing that would take it back.
			nh.says("took back an endpoint")
			awaitEndpoint(t, h, c, real)
			awaitEndpoint(t, a, c, real)
			for _, n := range []*node{na, nh} {
				n.awaitTable(c, real)
			}
			if n := nh.status().Undone; n != 1 {
				t.Errorf("%d endpoints undone, want 1", n)
			}
			ping(t, c)
		})
	}
}

// awaitTable waits until a node's table has a client there, and the device does.
func (n *node) awaitTable(c *lab.Client, ep netip.AddrPort) {
	n.t.Helper()
	await(n.t, fmt.Sprintf("%s knows %v", n.gw.Name, ep), func() (bool, string) {
		var peers control.Peers
		if err := control.Get(n.t.Context(), n.socket, control.VerbPeers, &peers); err != nil {
			n.t.Fatal(err)
		}
		for _, p := range peers.Peers {
			if p.Peer == c.Key() && p.Endpoint == ep && p.Held == ep && p.Applied == control.AppliedYes {
				return true, ""
			}
		}
		return false, fmt.Sprintf("%+v", peers)
	})
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
