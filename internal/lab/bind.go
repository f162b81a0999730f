// SPDX-License-Identifier: MIT

package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
)

// bind is wireguard-go's way to the network: it opens the sockets in a
// namespace, whatever goroutine asks, and like the kernel answers from the
// address that a packet came to. wireguard-go's own bind sends IPv6 packets to
// wrong addresses once it has sent over IPv4
// (https://github.com/WireGuard/wireguard-go/pull/135).
type bind struct {
	ns *namespace

	mu     sync.RWMutex
	v4, v6 *net.UDPConn // nil when closed
}

var _ conn.Bind = (*bind)(nil)

func (b *bind) Open(port uint16) ([]conn.ReceiveFunc, uint16, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.v4 != nil {
		return nil, 0, conn.ErrBindAlreadyOpen
	}
	v4, err := b.listen("udp4", port, unix.IPPROTO_IP, unix.IP_PKTINFO)
	if err != nil {
		return nil, 0, err
	}
	port = uint16(v4.LocalAddr().(*net.UDPAddr).Port)
	v6, err := b.listen("udp6", port, unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO)
	if err != nil {
		v4.Close()
		return nil, 0, err
	}
	b.v4, b.v6 = v4, v6
	return []conn.ReceiveFunc{receiver(v4), receiver(v6)}, port, nil
}

// listen opens a socket that reports the local address of what it receives.
func (b *bind) listen(network string, port uint16, level, option int) (c *net.UDPConn, err error) {
	lc := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var serr error
		err := raw.Control(func(fd uintptr) { serr = unix.SetsockoptInt(int(fd), level, option, 1) })
		return errors.Join(err, serr)
	}}
	err = b.ns.do(func() error {
		pc, err := lc.ListenPacket(context.Background(), network, fmt.Sprintf(":%d", port))
		if err == nil {
			c = pc.(*net.UDPConn)
		}
		return err
	})
	return c, err
}

func receiver(c *net.UDPConn) conn.ReceiveFunc {
	oob := make([]byte, 128)
	return func(packets [][]byte, sizes []int, eps []conn.Endpoint) (int, error) {
		n, oobn, _, from, err := c.ReadMsgUDPAddrPort(packets[0], oob)
		if err != nil {
			return 0, err
		}
		ep := &endpoint{dst: netip.AddrPortFrom(from.Addr().Unmap(), from.Port())}
		src := slices.Clone(oob[:oobn])
		ep.src.Store(&src)
		sizes[0], eps[0] = n, ep
		return 1, nil
	}
}

func (b *bind) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.v4 == nil {
		return nil
	}
	err := errors.Join(b.v4.Close(), b.v6.Close())
	b.v4, b.v6 = nil, nil
	return err
}

func (b *bind) SetMark(mark uint32) error {
	b.mu.RLock()
	defer b.mu.RUnlock()
	if b.v4 == nil {
		return nil
	}
	var errs []error
	for _, c := range []*net.UDPConn{b.v4, b.v6} {
		raw, err := c.SyscallConn()
		if err != nil {
			return err
		}
		errs = append(errs, raw.Control(func(fd uintptr) {
			errs = append(errs, unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, int(mark)))
		}))
	}
	return errors.Join(errs...)
}

func (b *bind) Send(packets [][]byte, to conn.Endpoint) error {
	ep, ok := to.(*endpoint)
	if !ok {
		return conn.ErrWrongEndpointType
	}
	b.mu.RLock()
	c := b.v4
	if ep.dst.Addr().Is6() {
		c = b.v6
	}
	b.mu.RUnlock()
	if c == nil {
		return net.ErrClosed
	}
	for _, p := range packets {
		var src []byte
		if s := ep.src.Load(); s != nil {
			src = *s
		}
		_, _, err := c.WriteMsgUDPAddrPort(p, src, ep.dst)
		if src != nil && err != nil {
			// The address may no longer be ours. The kernel's WireGuard then lets routing
			// choose, too (drivers/net/wireguard/socket.c send4 and send6).
			ep.ClearSrc()
			_, _, err = c.WriteMsgUDPAddrPort(p, nil, ep.dst)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (b *bind) ParseEndpoint(s string) (conn.Endpoint, error) {
	dst, err := netip.ParseAddrPort(s)
	if err != nil {
		return nil, err
	}
	return &endpoint{dst: netip.AddrPortFrom(dst.Addr().Unmap(), dst.Port())}, nil
}

func (b *bind) BatchSize() int { return 1 }

// batchBind is wireguard-go's own bind, with its sockets in a namespace.
type batchBind struct {
	conn.Bind
	ns *namespace
}

func (b *batchBind) Open(port uint16) (receive []conn.ReceiveFunc, actual uint16, err error) {
	err = b.ns.do(func() (err error) {
		receive, actual, err = b.Bind.Open(port)
		return err
	})
	return receive, actual, err
}

// endpoint is a peer's address and, from a received packet, our own: a PKTINFO
// control message, which says the same thing when it is sent.
type endpoint struct {
	dst netip.AddrPort
	src atomic.Pointer[[]byte]
}

func (e *endpoint) ClearSrc()           { e.src.Store(nil) }
func (e *endpoint) DstToString() string { return e.dst.String() }
func (e *endpoint) DstIP() netip.Addr   { return e.dst.Addr() }
func (e *endpoint) DstToBytes() []byte  { b, _ := e.dst.MarshalBinary(); return b }
func (e *endpoint) SrcToString() string { return "" } // wireguard-go never asks
func (e *endpoint) SrcIP() netip.Addr   { return netip.Addr{} }
