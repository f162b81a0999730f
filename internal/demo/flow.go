// SPDX-License-Identifier: MIT

package demo

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wgroam/wgroam/internal/lab"
)

// interval is the time between two packets of a flow.
const interval = 5 * time.Millisecond

// calledPort is where a client takes packets that nobody asked for.
const calledPort = 4000

// flow is a stream of packets through the tunnel that ends at a client. Each
// carries its time.
type flow struct {
	start time.Time
	gate  sync.RWMutex // read-locked while a packet is sent

	mu       sync.Mutex
	sent     int
	last     time.Duration // when the last packet was sent
	arrivals []arrival
}

// arrival is when a packet was sent and when it arrived, since the start.
type arrival struct{ sent, got time.Duration }

// sending makes a client send, and count what a gateway echoes.
func (s *show) sending(ctx context.Context, side *side, client *lab.Client) (*flow, error) {
	conn, err := client.Dial(ctx, "udp4", lab.EchoPort)
	if err != nil {
		return nil, err
	}
	return s.flow(ctx, conn, conn), nil
}

// calling makes a program on both gateways send to a client. It is heard from the
// gateway that has the client's endpoint, a link that is up, and the virtual IP.
func (s *show) calling(ctx context.Context, side *side, client *lab.Client) (*flow, error) {
	to := netip.AddrPortFrom(client.Inner4, calledPort)
	var phone net.PacketConn
	err := client.Do(func() (err error) {
		phone, err = net.ListenPacket("udp4", to.String())
		return err
	})
	if err != nil {
		return nil, err
	}
	var from []io.Writer
	for _, g := range side.lab.Gateways {
		caller := calls{to: net.UDPAddrFromAddrPort(to)}
		lc := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
			var serr error
			// Else the standby would send on its LAN while the device is down.
			err := raw.Control(func(fd uintptr) { serr = unix.BindToDevice(int(fd), g.Device()) })
			return errors.Join(err, serr)
		}}
		err := g.Do(func() (err error) {
			caller.PacketConn, err = lc.ListenPacket(ctx, "udp4", netip.AddrPortFrom(lab.Inner4, 0).String())
			return err
		})
		if err != nil {
			phone.Close()
			return nil, err
		}
		context.AfterFunc(ctx, func() { caller.Close() })
		from = append(from, caller)
	}
	return s.flow(ctx, hears{phone}, from...), nil
}

// calls sends to one address.
type calls struct {
	net.PacketConn
	to net.Addr
}

func (c calls) Write(p []byte) (int, error) { return c.WriteTo(p, c.to) }

// hears takes packets from anybody.
type hears struct{ net.PacketConn }

func (h hears) Read(p []byte) (int, error) {
	n, _, err := h.ReadFrom(p)
	return n, err
}

// flow runs until ctx ends, when it closes at.
func (s *show) flow(ctx context.Context, at io.ReadCloser, from ...io.Writer) *flow {
	f := &flow{start: time.Now()}
	context.AfterFunc(ctx, func() { at.Close() })
	s.wg.Go(func() { f.receive(at) })
	for _, w := range from {
		// Each for itself: the socket of a gateway that is cut off fills up and blocks.
		s.wg.Go(func() { f.send(ctx, w) })
	}
	return f
}

func (f *flow) send(ctx context.Context, from io.Writer) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		f.gate.RLock()
		f.mu.Lock()
		f.sent++
		f.last = time.Since(f.start)
		packet := binary.BigEndian.AppendUint64(nil, uint64(f.last))
		f.mu.Unlock()
		_, _ = from.Write(packet) // what cannot be sent does not arrive
		f.gate.RUnlock()
	}
}

// between runs do between two packets, while none is on its way: an echo that
// comes late would make the client's WireGuard follow the gateway back to the
// address that the client has just left it for. A packet that was lost is waited
// for only so long.
func (f *flow) between(ctx context.Context, do func() error) error {
	f.gate.Lock()
	defer f.gate.Unlock()
	lost := time.After(40 * interval)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !f.settled() {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-lost:
			return do()
		case <-tick.C:
		}
	}
	return do()
}

// settled tells that the last packet has arrived.
func (f *flow) settled() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := len(f.arrivals)
	return f.sent == 0 || n > 0 && f.arrivals[n-1].sent == f.last
}

func (f *flow) receive(at io.Reader) {
	buf := make([]byte, 64)
	for {
		n, err := at.Read(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil || n != 8 {
			continue // an ICMP error of an earlier packet
		}
		got := time.Since(f.start)
		f.mu.Lock()
		f.arrivals = append(f.arrivals, arrival{time.Duration(binary.BigEndian.Uint64(buf)), got})
		f.mu.Unlock()
	}
}

// count returns how many packets were sent and how many arrived.
func (f *flow) count() (sent, arrived int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.sent, len(f.arrivals)
}

// outage returns the time from then until the first packet that was sent after cut
// arrived; ok is false while there is none.
func (f *flow) outage(then, cut time.Time) (d time.Duration, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	i := slices.IndexFunc(f.arrivals, func(a arrival) bool { return a.sent >= cut.Sub(f.start) })
	if i < 0 {
		return 0, false
	}
	return f.arrivals[i].got - then.Sub(f.start), true
}
