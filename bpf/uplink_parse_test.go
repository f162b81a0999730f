// SPDX-License-Identifier: MIT

package bpf

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// reverse is a frame on its way back.
func (f frame) reverse(payload []byte) frame {
	f.src, f.dst, f.payload = f.dst, f.src, payload
	return f
}

// shapes are all the ways in which a message may be wrapped, from us to a peer.
func shapes() map[string]frame {
	v4 := frame{src: near, dst: far(1)}
	v6 := frame{src: near6, dst: far6(1)}
	with := func(f frame, change func(*frame)) frame {
		change(&f)
		return f
	}
	headers := func(fragment uint16, types ...byte) frame {
		return with(v6, func(f *frame) { f.headers, f.fragment = types, fragment })
	}
	return map[string]frame{
		"IPv4":                    v4,
		"IPv6":                    v6,
		"no Ethernet, IPv4":       with(v4, func(f *frame) { f.bare = true }),
		"no Ethernet, IPv6":       with(v6, func(f *frame) { f.bare = true }),
		"802.1Q":                  with(v4, func(f *frame) { f.tags = []uint16{unix.ETH_P_8021Q} }),
		"802.1ad":                 with(v6, func(f *frame) { f.tags = []uint16{unix.ETH_P_8021AD} }),
		"two tags":                with(v4, func(f *frame) { f.tags = []uint16{unix.ETH_P_8021AD, unix.ETH_P_8021Q} }),
		"one option":              with(v4, func(f *frame) { f.options = 4 }),
		"all the options":         with(v4, func(f *frame) { f.options = 40 }),
		"not to be fragmented":    with(v4, func(f *frame) { f.fragment = 0x4000 }),
		"hop by hop":              headers(0, 0),
		"routing":                 headers(0, 43),
		"destination":             headers(0, 60),
		"authentication":          headers(0, 51),
		"fragment of its own":     headers(0, 44),
		"every extension header":  headers(0, 0, 60, 43, 44, 51),
		"seven extension headers": headers(0, 0, 60, 43, 60, 51, 60, 60),
		"tag and extension header": with(headers(0, 0, 60), func(f *frame) {
			f.tags = []uint16{unix.ETH_P_8021Q, unix.ETH_P_8021Q}
		}),
	}
}

// fragments are those that have the header.
func fragments() map[string]frame {
	v4 := frame{src: near, dst: far(1), fragment: 0x2000}
	v6 := frame{src: near6, dst: far6(1), headers: []byte{44}, fragment: 1}
	return map[string]frame{"IPv4": v4, "IPv6": v6}
}

// programs are the two for a frame.
func (w *wire) programs(f frame) (in, out *ebpf.Program) {
	if f.bare {
		return w.u.objs.UplinkIngressIp, w.u.objs.UplinkEgressIp
	}
	return w.u.objs.UplinkIngress, w.u.objs.UplinkEgress
}

// reset forgets all sessions.
func (w *wire) reset() {
	w.t.Helper()
	w.events()
	for _, m := range []*ebpf.Map{w.u.objs.Locals, w.u.objs.Remotes, w.u.objs.Late} {
		var key uplinkUplinkKey
		for m.NextKey(nil, &key) == nil {
			if err := m.Delete(&key); err != nil {
				w.t.Fatal(err)
			}
		}
	}
	if err := w.u.objs.AllHints.Set(uplinkWindow{}); err != nil {
		w.t.Fatal(err)
	}
	if err := w.u.objs.AllMoves.Set(uplinkWindow{}); err != nil {
		w.t.Fatal(err)
	}
}

// uplinkWindow is struct uplink_window.
type uplinkWindow struct {
	Began     uint64
	Used, Pad uint32
}

// TestUplinkParse: a message is found in whatever it is wrapped in.
func TestUplinkParse(t *testing.T) {
	w := newWire(t)
	all := shapes()
	for name, f := range fragments() {
		all["first fragment, "+name] = f
	}
	for name, f := range all {
		t.Run(name, func(t *testing.T) {
			w := &wire{t, w.u}
			w.reset()
			in, out := w.programs(f)
			for _, payload := range [][]byte{initiation(3), response(1, 2), data(2), message(4, 1400, 4)} {
				f.payload = payload
				w.pass(out, f.bytes(), nil)
			}
			w.pass(in, f.reverse(data(1)).bytes(), nil)
			w.want(
				UplinkEvent{Kind: UplinkInitiation, Local: 3, Addr: f.dst, Message: initiation(3)[:132]},
				UplinkEvent{Kind: UplinkResponse, Local: 1, Remote: 2, Addr: f.dst, Message: response(1, 2)[:76]},
				UplinkEvent{Kind: UplinkConfirmed, Remote: 2, Addr: f.dst},
				UplinkEvent{Kind: UplinkUnknown, Remote: 4, Addr: f.dst},
				UplinkEvent{Kind: UplinkHint, Local: 1, Addr: f.dst},
			)
			w.wantSessions(2, 2)
		})
	}
}

// TestUplinkForeign: what is not a message of ours, or not quite, leaves nothing
// behind.
func TestUplinkForeign(t *testing.T) {
	w := newWire(t)
	v4 := func(payload []byte) frame { return frame{src: near, dst: far(1), payload: payload} }
	v6 := func(payload []byte, types ...byte) frame {
		return frame{src: near6, dst: far6(1), payload: payload, headers: types}
	}
	with := func(f frame, change func(*frame)) []byte {
		change(&f)
		return f.bytes()
	}
	patch := func(f frame, at int, b ...byte) []byte {
		p := f.bytes()
		copy(p[at:], b)
		return p
	}
	const ip = 14 // where it begins
	for name, packet := range map[string][]byte{
		"no message":                          v4(nil).bytes(),
		"a byte":                              v4([]byte{4}).bytes(),
		"half a header":                       v4(data(2)[:11]).bytes(),
		"cookie":                              v4(message(3, 64, 2)).bytes(),
		"type 0":                              v4(message(0, 148, 2)).bytes(),
		"type 5":                              v4(message(5, 148, 2)).bytes(),
		"reserved byte":                       v4(message(4|1<<8, 32, 2)).bytes(),
		"last reserved byte":                  v4(message(4|1<<24, 32, 2)).bytes(),
		"short data":                          v4(message(4, 31, 2)).bytes(),
		"short initiation":                    v4(message(1, 147, 2)).bytes(),
		"long initiation":                     v4(message(1, 149, 2)).bytes(),
		"two initiations":                     v4(append(initiation(2), initiation(3)...)).bytes(),
		"short response":                      v4(message(2, 91, 1, 2)).bytes(),
		"long response":                       v4(message(2, 93, 1, 2)).bytes(),
		"initiation as long as a response":    v4(message(1, 92, 1, 2)).bytes(),
		"other port":                          with(v4(data(2)), func(f *frame) { f.src = netip.AddrPortFrom(near.Addr(), near.Port()+1) }),
		"port 0":                              with(v4(data(2)), func(f *frame) { f.src = netip.AddrPortFrom(near.Addr(), 0) }),
		"TCP":                                 with(v4(data(2)), func(f *frame) { f.protocol = 6 }),
		"TCP, IPv6":                           with(v6(data(2)), func(f *frame) { f.protocol = 6 }),
		"TCP, after a header":                 with(v6(data(2), 0), func(f *frame) { f.protocol = 6 }),
		"no next header":                      with(v6(data(2), 60), func(f *frame) { f.protocol = 59 }),
		"UDP-Lite":                            with(v4(data(2)), func(f *frame) { f.protocol = 136 }),
		"second fragment":                     with(v4(data(2)), func(f *frame) { f.fragment = 1 }),
		"fragment in between":                 with(v4(data(2)), func(f *frame) { f.fragment = 0x3fff }),
		"second fragment, IPv6":               with(v6(data(2), 44), func(f *frame) { f.fragment = 8 }),
		"eight headers":                       v6(data(2), 60, 60, 60, 60, 60, 60, 60, 60).bytes(),
		"ESP":                                 v6(data(2), 50).bytes(),
		"three tags":                          with(v4(data(2)), func(f *frame) { f.tags = []uint16{0x8100, 0x8100, 0x8100} }),
		"ARP":                                 patch(v4(data(2)), 12, 0x08, 0x06),
		"PPPoE":                               patch(v4(data(2)), 12, 0x88, 0x64),
		"IPv6 in name":                        patch(v4(data(2)), 12, 0x86, 0xdd),
		"IPv4 in name":                        patch(v6(data(2)), 12, 0x08, 0x00),
		"version 5":                           patch(v4(data(2)), ip, 0x55),
		"header of 16 bytes":                  patch(v4(data(2)), ip, 0x44),
		"header of nothing":                   patch(v4(data(2)), ip, 0x40),
		"header beyond the end":               patch(v4(data(2)), ip, 0x4f),
		"UDP length 0":                        patch(v4(data(2)), ip+24, 0, 0),
		"UDP length 7":                        with(v4(data(2)), func(f *frame) { f.size = 7 }),
		"UDP length 8":                        with(v4(data(2)), func(f *frame) { f.size = 8 }),
		"UDP length one less":                 with(v4(data(2)), func(f *frame) { f.size = 39 }),
		"UDP length one more":                 with(v4(data(2)), func(f *frame) { f.size = 41 }),
		"UDP length 65535":                    with(v4(data(2)), func(f *frame) { f.size = 65535 }),
		"response, longer than the packet":    with(v4(response(1, 2)[:91]), func(f *frame) { f.size = 100 }),
		"response, not in the first fragment": with(v4(response(1, 2)[:70]), func(f *frame) { f.size, f.fragment = 100, 0x2000 }),
	} {
		t.Run(name, func(t *testing.T) {
			w := &wire{t, w.u}
			w.reset()
			w.pass(w.u.objs.UplinkEgress, packet, nil)
			w.want()
			w.wantSessions(0, 0)
		})
	}

	// A packet of another host that we forward, from the same port.
	w.reset()
	w.pass(w.u.objs.UplinkEgress, v4(response(1, 2)).bytes(), skbContext{IngressIfindex: 1})
	w.pass(w.u.objs.UplinkEgress, v4(data(2)).bytes(), skbContext{IngressIfindex: 1})
	w.want()
	w.wantSessions(0, 0)
}

// skbContext is the part of struct __sk_buff that a test may set.
type skbContext struct {
	_              [9]uint32 // len to priority
	IngressIfindex uint32
	_              [31]uint32 // ifindex to wire_len
	GSOSegs        uint32
	_              [2]uint32 // sk
	GSOSize        uint32
	_              [3]uint32
}

// TestUplinkTruncated: a packet may end anywhere.
func TestUplinkTruncated(t *testing.T) {
	w := newWire(t)
	w.out(far(1), response(7, 8))
	w.events()
	for name, f := range shapes() {
		in, out := w.programs(f)
		for _, payload := range [][]byte{initiation(3), response(1, 2), data(2), message(4, 200, 4)} {
			f.payload = payload
			packet := f.bytes()
			for n := range len(packet) {
				w.cut(out, packet[:n])
			}
			packet = f.reverse(message(4, len(payload), 7)).bytes()
			for n := range len(packet) {
				w.cut(in, packet[:n])
			}
		}
		w.want()
		if w.wantSessions(1, 1); t.Failed() {
			t.Fatalf("that was %s", name)
		}
	}
}

// cut runs a program on a packet that may be shorter than the kernel lets a test
// try: such packets come from no driver.
func (w *wire) cut(prog *ebpf.Program, packet []byte) {
	w.t.Helper()
	verdict, err := prog.Run(&ebpf.RunOptions{Data: packet})
	if len(packet) < 14+40 && errors.Is(err, unix.EINVAL) {
		return
	}
	if err != nil || verdict != next {
		w.t.Fatalf("%v on %d bytes: verdict %#x, error %v", prog, len(packet), verdict, err)
	}
}

// TestUplinkSegments: several packets in one, before the card or the kernel takes
// them apart, or after it has put them together.
func TestUplinkSegments(t *testing.T) {
	w := newWire(t)
	one := message(4, 1400, 2)
	many := append(append(append([]byte{}, one...), one...), data(2)...)
	f := frame{src: near, dst: far(1), payload: many}
	segments := skbContext{GSOSegs: 3, GSOSize: 1400}
	w.pass(w.u.objs.UplinkEgress, f.bytes(), segments)
	w.want(UplinkEvent{Kind: UplinkUnknown, Remote: 2, Addr: far(1)})
	w.out(far(1), initiation(1))
	w.events()
	for i := 0; i < len(many); i += 1400 {
		binary.LittleEndian.PutUint32(many[i+4:], 1)
	}
	w.pass(w.u.objs.UplinkIngress, f.reverse(many).bytes(), segments)
	w.want(UplinkEvent{Kind: UplinkHint, Local: 1, Addr: far(1)})
	w.wantSessions(1, 1)
}

// TestUplinkNear: each event of what we send says from which address, also one that
// was held back, and after the IP version has changed.
func TestUplinkNear(t *testing.T) {
	w := newWire(t)
	for name, f := range shapes() {
		t.Run(name, func(t *testing.T) {
			w := &wire{t, w.u}
			w.reset()
			in, out := w.programs(f)
			pass := func(f frame, payload []byte) {
				f.payload = payload
				w.pass(out, f.bytes(), nil)
			}
			pass(f, initiation(3))
			pass(f, response(1, 2))
			pass(f, data(2))
			w.pass(in, f.reverse(data(1)).bytes(), nil)
			// From the other version, and back, more often than is let through.
			other := frame{src: near6, dst: far6(7), bare: f.bare}
			if f.src == near6 {
				other.src, other.dst = near, far(7)
			}
			for range 10 * movesPerSession {
				pass(other, data(2))
				pass(f, data(2))
			}
			pass(other, data(2))
			events := w.events()
			for _, e := range events {
				want := f.src.Addr()
				switch {
				case e.Kind == UplinkHint:
					want = netip.Addr{}
				case e.Addr == other.dst:
					want = other.src.Addr()
				}
				if e.Near != want {
					t.Errorf("event %+v from %v, want %v", e, e.Near, want)
				}
			}
			if last := events[len(events)-1]; last.Addr != other.dst || len(events) < 6 {
				t.Errorf("%d events, the last %+v", len(events), last)
			}
		})
	}
}
