// SPDX-License-Identifier: MIT

package failover

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wgroam/wgroam/internal/wg"
)

// ErrNotTried is returned by ProbeSource when it could not be tried: that proves
// nothing.
var ErrNotTried = errors.New("could not be tried")

// probeWithin is how long a packet over the loopback may take.
const probeWithin = 500 * time.Millisecond

// ProbeSource proves that this host can send from a virtual IP, whether it has it or not,
// without sending anything to anybody: two datagrams go over the loopback of the device's
// network namespace, through the same rule that WireGuard's packets go through on an
// active (gate.from), between the other rules of this host, and have to arrive with the
// virtual IP for their source. The sum of one is left to the link, as WireGuard does it
// (ip_tunnel_core.h, udp_tunnel_xmit_skb); that of the other is made before the rule, and
// the kernel looks whether it is still right when it arrives.
//
// At one time, it may be called once for a device. The error wraps ErrNotTried, or says
// what is wrong.
func ProbeSource(space *wg.Space, device string, vip netip.Addr) error {
	network, lo := "udp4", netip.AddrFrom4([4]byte{127, 0, 0, 1})
	if vip.Is6() {
		network, lo = "udp6", netip.IPv6Loopback()
	}
	var to, from *net.UDPConn
	err := space.Do(func() (err error) {
		if to, err = net.ListenUDP(network, net.UDPAddrFromAddrPort(netip.AddrPortFrom(lo, 0))); err != nil {
			return err
		}
		// On all addresses, so that nobody else has the port.
		from, err = net.ListenUDP(network, nil)
		return err
	})
	if to != nil {
		defer to.Close()
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrNotTried, err)
	}
	defer from.Close()
	port := from.LocalAddr().(*net.UDPAddr).Port
	g := probeGate(space, device)
	if err := g.from([]netip.Addr{vip}, port); err != nil {
		return err
	}
	err = probe(from, to, netip.AddrPortFrom(vip, uint16(port)))
	return errors.Join(err, g.remove())
}

func probeGate(space *wg.Space, device string) *gate {
	g := newGate(space, device)
	g.table.Name = "wgroam.probe." + device // which no device's gate has for its name
	return g
}

// dropProbe removes what a daemon that was killed in the middle of ProbeSource has left.
func dropProbe(space *wg.Space, device string) error {
	if g := probeGate(space, device); g.says() != "" {
		return g.remove()
	}
	return nil
}

// probe sends over the loopback what has to arrive from an address.
func probe(from, to *net.UDPConn, want netip.AddrPort) error {
	dst := to.LocalAddr().(*net.UDPAddr).AddrPort()
	mark := make([]byte, 16)
	_, _ = rand.Read(mark) // never fails
	for _, byHost := range []bool{false, true} {
		if err := sendProbe(from, dst, mark, byHost); err != nil {
			if errors.Is(err, unix.EPERM) {
				return fmt.Errorf("a rule of this host forbids to send from %v: %w", want.Addr(), err)
			}
			return fmt.Errorf("%w: send over the loopback: %w", ErrNotTried, err)
		}
		_ = to.SetReadDeadline(time.Now().Add(probeWithin)) // of an open socket
		buf := make([]byte, 2*len(mark))
		for {
			n, src, err := to.ReadFromUDPAddrPort(buf)
			switch {
			case errors.Is(err, os.ErrDeadlineExceeded):
				return fmt.Errorf("what is sent from %v does not arrive over the loopback: another rule of this host drops it, or its checksum is wrong", want.Addr())
			case err != nil:
				return fmt.Errorf("%w: %w", ErrNotTried, err)
			case !slices.Equal(buf[:n], mark):
				continue // a stranger's
			case netip.AddrPortFrom(src.Addr().Unmap(), src.Port()) != want:
				return fmt.Errorf("what should be sent from %v is sent from %v", want.Addr(), src.Addr())
			}
			break
		}
	}
	return nil
}

// sendProbe sends a datagram, whose sum is made by the host, or left to the link.
func sendProbe(from *net.UDPConn, dst netip.AddrPort, mark []byte, byHost bool) error {
	if !byHost {
		_, err := from.WriteToUDPAddrPort(mark, dst)
		return err
	}
	raw, err := from.SyscallConn()
	if err != nil {
		return err
	}
	var to unix.Sockaddr = &unix.SockaddrInet4{Port: int(dst.Port()), Addr: [4]byte{127, 0, 0, 1}}
	if dst.Addr().Is6() {
		to = &unix.SockaddrInet6{Port: int(dst.Port()), Addr: dst.Addr().As16()}
	}
	// With MSG_MORE the sum is not left to the link (ip_output.c, __ip_append_data).
	var sent error
	err = raw.Control(func(fd uintptr) {
		if sent = unix.Sendto(int(fd), mark[:8], unix.MSG_MORE, to); sent == nil {
			sent = unix.Sendto(int(fd), mark[8:], 0, to)
		}
	})
	return errors.Join(err, sent)
}

// Missing returns the addresses that are not on a link of the space, or cannot be used.
func Missing(ctx context.Context, space *wg.Space, vips []netip.Addr) (missing []netip.Addr, err error) {
	err = space.Do(func() error {
		for _, vip := range vips {
			has, err := hasOne(ctx, []netip.Addr{vip}, addresses)
			if err != nil {
				return err
			}
			if !has {
				missing = append(missing, vip)
			}
		}
		return nil
	})
	return missing, err
}

// CallTime estimates how long it takes a promotion until the last of so many peers is
// called, if a dump of the device takes as long as given, and peers answer within a round
// trip. told is as KeeperConfig.Told.
func CallTime(peers int, kernel, told bool, dump, rtt time.Duration) time.Duration {
	window := userWindow
	if kernel {
		window = kernelWindow
	}
	// The last window waits for nobody.
	rounds := max(0, (peers-1)/window)
	if told {
		return time.Duration(rounds) * rtt
	}
	return time.Duration(rounds) * (dump + max(lookAgain, dump, rtt))
}
