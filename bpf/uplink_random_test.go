// SPDX-License-Identifier: MIT

package bpf

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/wgroam/wgroam/internal/lab"
)

// found is what there is to know of a packet.
type found struct {
	kind  byte // the message's type
	index [2]uint32
	peer  netip.AddrPort
}

// parsePacket reads a packet as the programs do, in another way: it is what they are
// compared with. ok is that the packet is a message from or to the device's port.
func parsePacket(b []byte, bare, out bool) (f found, ok bool) {
	ethertype := uint16(0x86dd)
	if bare {
		if len(b) > 0 && b[0]>>4 == 4 {
			ethertype = 0x0800
		}
	} else {
		tags := 0
		for b = b[min(12, len(b)):]; ; tags++ {
			if len(b) < 2 {
				return f, false
			}
			ethertype, b = binary.BigEndian.Uint16(b), b[2:]
			if ethertype != 0x8100 && ethertype != 0x88a8 || tags == 2 {
				break
			}
			if len(b) < 2 {
				return f, false
			}
			b = b[2:]
		}
	}

	var src, dst netip.Addr
	first := false // of several fragments
	switch {
	case ethertype == 0x0800 && len(b) >= 20 && b[0] >= 0x45 && b[0] <= 0x4f:
		flags, header := binary.BigEndian.Uint16(b[6:]), int(b[0]&15)*4
		if b[9] != 17 || flags&0x1fff != 0 || len(b) < header {
			return f, false
		}
		first = flags&0x2000 != 0
		src, dst = netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:]))
		b = b[header:]
	case ethertype == 0x86dd && len(b) >= 40 && b[0]>>4 == 6:
		src, dst = netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:]))
		next := b[6]
		b = b[40:]
		for n := 0; next != 17; n++ {
			if n == 7 || len(b) < 4 {
				return f, false
			}
			size := (int(b[1]) + 1) * 8
			switch next {
			case 0, 43, 60:
			case 51:
				size = (int(b[1]) + 2) * 4
			case 44:
				fragment := binary.BigEndian.Uint16(b[2:])
				if fragment&0xfff8 != 0 {
					return f, false
				}
				first = first || fragment&1 != 0
				size = 8
			default:
				return f, false
			}
			if len(b) < size {
				return f, false
			}
			next, b = b[0], b[size:]
		}
	default:
		return f, false
	}

	if len(b) < 20 {
		return f, false
	}
	size := int(binary.BigEndian.Uint16(b[4:])) - 8
	from, to := binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
	b = b[8:]
	ours := to
	f.peer = netip.AddrPortFrom(src, from)
	if out {
		ours = from
		f.peer = netip.AddrPortFrom(dst, to)
	}
	if ours != near.Port() || !first && len(b) < size {
		return f, false
	}
	f.kind = b[0]
	f.index = [2]uint32{binary.LittleEndian.Uint32(b[4:]), binary.LittleEndian.Uint32(b[8:])}
	switch binary.LittleEndian.Uint32(b) {
	case 1:
		return f, size == 148 && len(b) >= 132
	case 2:
		return f, size == 92 && len(b) >= 76
	case 4:
		return f, size >= 32
	}
	return f, false
}

// runner runs a program on many packets, without what a general way to do so costs.
type runner struct {
	attr struct {
		prog, verdict, sizeIn, sizeOut uint32
		in, out                        uint64
		_                              [48]byte
	}
	buf    [512]byte
	pinned runtime.Pinner
}

func newRunner() *runner {
	r := &runner{}
	r.pinned.Pin(r)
	return r
}

func (r *runner) run(prog *ebpf.Program, packet []byte) (verdict uint32, err error) {
	r.attr.prog, r.attr.sizeIn = uint32(prog.FD()), uint32(copy(r.buf[:], packet))
	r.attr.sizeOut = 0 // the kernel has written to it
	r.attr.in = uint64(uintptr(unsafe.Pointer(&r.buf)))
	const progTestRun = 10 // BPF_PROG_TEST_RUN
	if _, _, errno := unix.Syscall(unix.SYS_BPF, progTestRun, uintptr(unsafe.Pointer(&r.attr)), unsafe.Sizeof(r.attr)); errno != 0 {
		return 0, errno
	}
	return r.attr.verdict, nil
}

// mutate makes something else of a packet, often something that is nearly right.
func mutate(rng *rand.Rand, b []byte) []byte {
	for range rng.IntN(4) {
		at := rng.IntN(len(b))
		switch rng.IntN(6) {
		case 0:
			b[at] ^= 1 << rng.IntN(8)
		case 1:
			b[at] = byte(rng.Uint32())
		case 2:
			b[at] = []byte{0, 1, 2, 3, 4, 6, 8, 17, 43, 44, 51, 60, 0x45, 0x60, 0x81, 0xff}[rng.IntN(16)]
		case 3: // in the headers
			b[rng.IntN(min(60, len(b)))] ^= 1 << rng.IntN(8)
		case 4:
			b = b[:max(14, at)]
		case 5:
			b = slices.Insert(b, at, byte(rng.Uint32()))
		}
	}
	return b
}

// TestUplinkRandom: ten million packets, most of which are not quite right. Every one
// passes, every event is of a packet that a second reader understands in the same
// way, and so is every handshake; what comes in makes no state.
func TestUplinkRandom(t *testing.T) {
	packets := 10_000_000
	if lab.InVM() {
		packets = 50_000 // QEMU emulates the processor, which makes it fifty times slower
	}
	cpus := runtime.NumCPU()
	var all sync.WaitGroup
	for cpu := range cpus {
		w := newWire(t)
		all.Go(func() { w.random(rand.New(rand.NewPCG(1, uint64(cpu))), packets/cpus) })
	}
	all.Wait()
}

func (w *wire) random(rng *rand.Rand, packets int) {
	const batch = 1000
	type shape struct {
		prog      *ebpf.Program
		bare, out bool
		packet    []byte
		sender    int // where the handshake's own index is, or 0
	}
	var outgoing, incoming []shape
	for _, f := range shapes() {
		in, out := w.programs(f)
		for _, payload := range [][]byte{initiation(3), response(1, 2), data(2), message(3, 64, 1), message(4, 200, 4)} {
			f.payload = payload
			o := shape{out, f.bare, true, f.bytes(), 0}
			if payload[0] < 3 {
				o.sender = len(o.packet) - len(payload) + 4
			}
			outgoing = append(outgoing, o)
			incoming = append(incoming, shape{in, f.bare, false, f.reverse(payload).bytes(), 0})
		}
	}
	runner := newRunner()
	defer runner.pinned.Unpin()
	buf := make([]byte, 0, 512)
	handshakes, changes, hints, refused := 0, 0, 0, 0
	// Of 600 000 random indexes some come twice, and the second time within 100 ms they
	// are taken for the same packet at another link.
	used := make(map[uint32]bool)
	for n := 0; n < packets; n += batch {
		choice := outgoing
		if n/batch%2 == 1 {
			choice = incoming
			// The sessions of which they are, which may have been forgotten.
			for _, index := range []uint32{2, 4} {
				if _, err := runner.run(w.u.objs.UplinkEgress, frame{src: near, dst: far(1), payload: initiation(index)}.bytes()); err != nil {
					w.t.Error(err)
					return
				}
			}
			if _, err := readUplink(w.u); err != nil {
				w.t.Error(err)
				return
			}
		}
		var before [2]int
		if n%(100*batch) == batch { // it takes a while
			before[0], before[1], _ = w.sessions()
		}
		expect := make(map[found]bool)
		begun := make(map[uint32]bool)
		for range batch {
			s := choice[rng.IntN(len(choice))]
			packet := append(buf, s.packet...)
			if s.sender > 0 {
				binary.LittleEndian.PutUint32(packet[s.sender:], rng.Uint32())
			}
			packet = mutate(rng, packet)
			f, ok := parsePacket(packet, s.bare, s.out)
			verdict, err := runner.run(s.prog, packet)
			if errors.Is(err, unix.EINVAL) { // too short for a kernel that checks
				refused++
				continue
			}
			if err != nil || verdict != next {
				w.t.Errorf("%x: verdict %#x, error %v", packet, verdict, err)
				return
			}
			if ok {
				expect[f] = true
				if f.kind != 4 {
					begun[f.index[0]] = !used[f.index[0]]
					used[f.index[0]] = true
				}
			}
		}
		got, err := readUplink(w.u)
		if err != nil {
			w.t.Error(err)
			return
		}
		for _, e := range got {
			f := found{peer: e.Addr}
			switch e.Kind {
			case UplinkInitiation, UplinkResponse:
				f.kind = byte(e.Kind)
				f.index = [2]uint32{e.Local, binary.LittleEndian.Uint32(e.Message[8:])}
				handshakes++
			case UplinkHint:
				f.kind, f.index[0] = 4, e.Local
				hints++
			default:
				f.kind, f.index[0] = 4, e.Remote
				changes++
			}
			known := expect[f]
			if f.kind == 4 {
				known = false
				for x := range expect {
					known = known || x.kind == 4 && x.index[0] == f.index[0] && x.peer == f.peer
				}
			}
			if !known || (e.Kind == UplinkHint) == choice[0].out {
				w.t.Errorf("event %+v of no packet", e)
				return
			}
			if e.Kind == UplinkInitiation || e.Kind == UplinkResponse {
				delete(begun, e.Local)
			}
		}
		if choice[0].out {
			for index, first := range begun {
				if first {
					w.t.Errorf("no event of the handshake with index %#x", index)
					return
				}
			}
		} else if before[0] > 0 {
			if locals, remotes, _ := w.sessions(); locals > before[0] || remotes > before[1] {
				w.t.Errorf("%d local and %d remote sessions, before what came in %v", locals, remotes, before)
				return
			}
		}
	}
	if lost, _ := w.counters(); lost != 0 || handshakes == 0 || changes == 0 || hints == 0 {
		w.t.Errorf("%d lost, %d handshakes, %d changes, %d hints", lost, handshakes, changes, hints)
	}
	w.t.Logf("%d packets: %d handshakes, %d changes and %d hints reported, %d packets too short for the kernel", packets, handshakes, changes, hints, refused)
}
