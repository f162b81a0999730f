// SPDX-License-Identifier: MIT

package bpf

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// next is TCX_NEXT, as the kernel returns it.
const next = 0xffffffff

// near is where the device of most tests has its socket.
var (
	near  = netip.MustParseAddrPort("198.51.100.1:51820")
	near6 = netip.MustParseAddrPort("[2001:db8::1]:51820")
)

// far is an address of a peer.
func far(n int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, byte(n >> 8), byte(n)}), uint16(1000+n))
}

func far6(n int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 1, 14: byte(n >> 8), 15: byte(n)}), uint16(1000+n))
}

// frame is a UDP datagram on its way, for those who want it to look odd.
type frame struct {
	src, dst netip.AddrPort
	payload  []byte

	bare     bool     // without an Ethernet header
	tags     []uint16 // ethertypes of VLAN tags in the frame
	options  int      // bytes of IPv4 options
	fragment uint16   // the IPv4 header's flags and offset, or those of an IPv6 fragment header
	headers  []byte   // types of IPv6 extension headers, of which each is as long as its place in the list
	size     int      // what the UDP header says, if not 0
	protocol byte     // if not 0
}

func (f frame) bytes() []byte {
	udp := binary.BigEndian.AppendUint16(nil, f.src.Port())
	udp = binary.BigEndian.AppendUint16(udp, f.dst.Port())
	size := 8 + len(f.payload)
	if f.size != 0 {
		size = f.size
	}
	udp = binary.BigEndian.AppendUint16(udp, uint16(size))
	udp = append(udp, 0, 0)
	udp = append(udp, f.payload...)
	protocol := byte(17)
	if f.protocol != 0 {
		protocol = f.protocol
	}

	var b []byte
	ethertype := uint16(0x0800)
	if f.src.Addr().Is6() {
		ethertype = 0x86dd
	}
	if !f.bare {
		b = append(b, 2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2)
		for i, tag := range f.tags {
			b = binary.BigEndian.AppendUint16(b, tag)
			b = binary.BigEndian.AppendUint16(b, uint16(100+i))
		}
		b = binary.BigEndian.AppendUint16(b, ethertype)
	}
	if ethertype == 0x0800 {
		b = append(b, byte(0x45+f.options/4), 0)
		b = binary.BigEndian.AppendUint16(b, uint16(20+f.options+len(udp)))
		b = append(b, 0, 1)
		b = binary.BigEndian.AppendUint16(b, f.fragment)
		b = append(b, 64, protocol, 0, 0)
		b = append(b, f.src.Addr().AsSlice()...)
		b = append(b, f.dst.Addr().AsSlice()...)
		for range f.options {
			b = append(b, 1) // no operation
		}
		header := b[len(b)-20-f.options:]
		var sum uint32
		for i := 0; i < len(header); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(header[i:]))
		}
		for sum > 0xffff {
			sum = sum>>16 + sum&0xffff
		}
		binary.BigEndian.PutUint16(header[10:], ^uint16(sum))
		return append(b, udp...)
	}
	var ext []byte
	for i, h := range f.headers {
		next := protocol
		if i+1 < len(f.headers) {
			next = f.headers[i+1]
		}
		switch h {
		case 44:
			ext = append(ext, next, 0)
			ext = binary.BigEndian.AppendUint16(ext, f.fragment)
			ext = append(ext, 0, 0, 0, 1)
		case 51:
			ext = append(ext, next, byte(i+1))
			ext = append(ext, make([]byte, 4*(i+3)-2)...)
		default:
			ext = append(ext, next, byte(i))
			ext = append(ext, make([]byte, 8*(i+1)-2)...)
		}
	}
	first := protocol
	if len(f.headers) > 0 {
		first = f.headers[0]
	}
	b = append(b, 0x60, 0, 0, 0)
	b = binary.BigEndian.AppendUint16(b, uint16(len(ext)+len(udp)))
	b = append(b, first, 64)
	b = append(b, f.src.Addr().AsSlice()...)
	b = append(b, f.dst.Addr().AsSlice()...)
	return append(append(b, ext...), udp...)
}

// message is a WireGuard message with recognisable contents.
func message(kind, size int, index ...uint32) []byte {
	b := make([]byte, size)
	for i := range b {
		b[i] = byte(i)
	}
	binary.LittleEndian.PutUint32(b, uint32(kind))
	for i, x := range index {
		binary.LittleEndian.PutUint32(b[4+4*i:], x)
	}
	return b
}

func initiation(local uint32) []byte       { return message(1, 148, local) }
func response(local, remote uint32) []byte { return message(2, 92, local, remote) }
func data(receiver uint32) []byte          { return message(4, 32, receiver) }

// wire is an Uplink that is attached to nothing: its programs run on packets that
// the test makes.
type wire struct {
	t testing.TB
	u *Uplink
}

func newWire(t testing.TB) *wire {
	t.Helper()
	w := &wire{t, openUplink(t, 1)}
	if err := w.u.Follow(near.Port()); err != nil {
		t.Fatal(err)
	}
	return w
}

func openUplink(t testing.TB, peers int) *Uplink {
	t.Helper()
	needRoot(t)
	u, err := OpenUplink(peers)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := u.Close(); err != nil {
			t.Error(err)
		}
	})
	return u
}

// pass runs a program on a packet, which is to go on.
func (w *wire) pass(prog *ebpf.Program, packet []byte, context any) {
	w.t.Helper()
	verdict, err := prog.Run(&ebpf.RunOptions{Data: packet, Context: context})
	if err != nil {
		w.t.Fatalf("%v on %d bytes: %v", prog, len(packet), err)
	}
	if verdict != next {
		w.t.Fatalf("%v: verdict %#x, want that the next program decides", prog, verdict)
	}
}

func (w *wire) out(to netip.AddrPort, payload []byte) {
	w.t.Helper()
	w.pass(w.u.objs.UplinkEgress, frame{src: near, dst: to, payload: payload}.bytes(), nil)
}

func (w *wire) in(from netip.AddrPort, payload []byte) {
	w.t.Helper()
	w.pass(w.u.objs.UplinkIngress, frame{src: from, dst: near, payload: payload}.bytes(), nil)
}

// events returns what waits in the ring buffer, and what was held back.
func (w *wire) events() []UplinkEvent {
	w.t.Helper()
	got, err := readUplink(w.u)
	if err != nil {
		w.t.Fatal(err)
	}
	return got
}

func readUplink(u *Uplink) ([]UplinkEvent, error) {
	if _, err := u.Flush(); err != nil {
		return nil, err
	}
	var out []UplinkEvent
	for {
		e, _, err := u.Read()
		if errors.Is(err, ErrFlushed) {
			return out, nil
		}
		if err != nil {
			return out, err
		}
		e.Message = slices.Clone(e.Message)
		out = append(out, e)
	}
}

var uplinkOpts = cmp.Options{
	cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }),
	cmpopts.IgnoreFields(UplinkEvent{}, "Boot", "Near"),
	cmpopts.EquateEmpty(),
}

// want compares what has happened with what should have.
func (w *wire) want(events ...UplinkEvent) {
	w.t.Helper()
	got := w.events()
	for i := range events {
		if events[i].Port == 0 {
			events[i].Port = near.Port()
		}
	}
	if diff := cmp.Diff(events, got, uplinkOpts); diff != "" {
		w.t.Errorf("events (-want +got):\n%s", diff)
	}
	now := bootTime(w.t)
	for i, e := range got {
		if e.Boot > now || e.Boot < now-patience {
			w.t.Errorf("event %d: time %v, now %v", i, e.Boot, now)
		}
	}
}

// sessions counts what the maps hold.
func (w *wire) sessions() (locals, remotes, late int) {
	w.t.Helper()
	count := func(m *ebpf.Map) (n int) {
		var key uplinkUplinkKey
		var value []byte
		it := m.Iterate()
		for it.Next(&key, &value) {
			n++
		}
		if err := it.Err(); err != nil {
			w.t.Fatal(err)
		}
		return n
	}
	return count(w.u.objs.Locals), count(w.u.objs.Remotes), count(w.u.objs.Late)
}

func (w *wire) wantSessions(locals, remotes int) {
	w.t.Helper()
	if l, r, late := w.sessions(); l != locals || r != remotes || late != 0 {
		w.t.Errorf("%d local and %d remote sessions, %d late, want %d, %d and none", l, r, late, locals, remotes)
	}
}

func (w *wire) counters() (lost, suppressed int) {
	w.t.Helper()
	l, err := w.u.Lost()
	s, e := w.u.Suppressed()
	if err := errors.Join(err, e); err != nil {
		w.t.Fatal(err)
	}
	return int(l), int(s)
}

// TestUplinkSessions: a day in the life of two sessions, one begun by each side.
func TestUplinkSessions(t *testing.T) {
	w := newWire(t)

	// The peer begins; data confirms it.
	w.out(far(1), response(10, 20))
	w.want(UplinkEvent{Kind: UplinkResponse, Local: 10, Remote: 20, Addr: far(1), Message: response(10, 20)[:76]})
	w.in(far(1), data(10))
	w.want(UplinkEvent{Kind: UplinkHint, Local: 10, Addr: far(1)})
	w.out(far(1), data(20))
	w.want(UplinkEvent{Kind: UplinkConfirmed, Remote: 20, Addr: far(1)})
	w.unremind(10)
	for range 10 {
		w.in(far(1), data(10))
		w.out(far(1), data(20))
	}
	w.want()

	// It moves.
	w.in(far(2), data(10))
	w.want(UplinkEvent{Kind: UplinkHint, Local: 10, Addr: far(2)})
	w.out(far(1), data(20)) // a packet that was under way
	w.want()
	w.out(far(2), data(20))
	w.want(UplinkEvent{Kind: UplinkMoved, Remote: 20, Addr: far(2), Old: far(1)})
	w.unremind(10)
	w.in(far(2), data(10))
	w.out(far(2), data(20))
	w.want()
	w.wantSessions(1, 1)

	// We begin.
	w.out(far(3), initiation(11))
	w.want(UplinkEvent{Kind: UplinkInitiation, Local: 11, Addr: far(3), Message: initiation(11)[:132]})
	w.in(far(3), response(21, 11))
	w.want()
	w.out(far(3), data(21))
	w.want(UplinkEvent{Kind: UplinkUnknown, Remote: 21, Addr: far(3)})
	w.in(far(3), data(11))
	w.want(UplinkEvent{Kind: UplinkHint, Local: 11, Addr: far(3)})

	// A response to where the peer was before, and data elsewhere.
	w.out(far(3), response(12, 22))
	w.out(far(4), data(22))
	w.out(far(4), data(22))
	w.want(
		UplinkEvent{Kind: UplinkResponse, Local: 12, Remote: 22, Addr: far(3), Message: response(12, 22)[:76]},
		UplinkEvent{Kind: UplinkMoved, Remote: 22, Addr: far(4), Old: far(3)},
	)
	w.wantSessions(3, 3)
	if lost, suppressed := w.counters(); lost != 0 || suppressed != 0 {
		t.Errorf("%d lost, %d suppressed", lost, suppressed)
	}
}
