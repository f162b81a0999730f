// SPDX-License-Identifier: MIT

package bpf

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"text/tabwriter"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/wgroam/wgroam/internal/lab"
)

var families = map[string]uint16{"IPv4": unix.AF_INET, "IPv6": unix.AF_INET6}

// TestUnchangedPath: what the hook does for a packet of a peer that stays where
// it is. It calls nothing, and the number of its instructions is known.
func TestUnchangedPath(t *testing.T) {
	for name, family := range families {
		n, stores, err := unchangedPath(family)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		t.Logf("%s: %d instructions, %d of them stores", name, n, stores)
		if n > 64 {
			t.Errorf("%s: %d instructions, want at most 64: each packet pays for them", name, n)
		}
	}
}

// unchangedPath executes set_peer_endpoint, as it is before the kernel's
// offsets are put into it, on a peer whose endpoint is the one that a packet
// brings. It returns the number of instructions from entry to exit. A call, or
// anything that a comparison does not need, is an error.
func unchangedPath(family uint16) (n, stores int, err error) {
	spec, err := loadPeer()
	if err != nil {
		return 0, 0, err
	}
	at := make(map[asm.RawInstructionOffset]*asm.Instruction)
	for it := spec.Programs[peerProgSetPeerEndpoint].Instructions.Iterate(); it.Next(); {
		at[it.Offset] = it.Ins
	}

	// An address is the number of a piece of memory and an offset into it.
	// Peer and endpoint hold the family over and over, so that all that is
	// compared is equal.
	const ctx, peer, endpoint, stack = 1 << 32, 2 << 32, 3 << 32, 5 << 32
	args := binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint64(nil, peer), endpoint)
	same := bytes.Repeat(binary.LittleEndian.AppendUint16(nil, family), 64)
	memory := map[uint64][]byte{ctx >> 32: args, peer >> 32: same, endpoint >> 32: same}
	var regs [11]uint64
	regs[asm.R1], regs[asm.RFP] = ctx, stack

	for pc := asm.RawInstructionOffset(0); ; {
		ins := at[pc]
		if ins == nil {
			return 0, 0, fmt.Errorf("no instruction at %d", pc)
		}
		n++
		pc++
		op, operand := ins.OpCode, uint64(ins.Constant)
		if op.Source() == asm.RegSource {
			operand = regs[ins.Src]
		}
		wide := op.Class() == asm.ALU64Class || op.Class() == asm.JumpClass
		left := regs[ins.Dst]
		if !wide {
			left, operand = uint64(uint32(left)), uint64(uint32(operand))
		}
		switch {
		case op.Class() == asm.LdXClass && op.Mode() == asm.MemMode:
			addr := regs[ins.Src] + uint64(int64(ins.Offset))
			piece := memory[addr>>32]
			from, size := int(uint32(addr)), op.Size().Sizeof()
			if from+size > len(piece) {
				return 0, 0, fmt.Errorf("%d: %v: unexpected address", pc-1, ins)
			}
			var b [8]byte
			copy(b[:], piece[from:from+size])
			regs[ins.Dst] = binary.LittleEndian.Uint64(b[:])
		case op.Class() == asm.StXClass && op.Mode() == asm.MemMode && ins.Dst == asm.RFP:
			stores++ // that nothing is read back is seen above
		case op.Class().IsALU() && op.ALUOp() == asm.Mov:
			regs[ins.Dst] = operand
		case op.Class().IsALU() && op.ALUOp() == asm.Add:
			regs[ins.Dst] = left + operand
		case op.Class().IsJump() && op.JumpOp() == asm.Exit:
			return n, stores, nil
		case op.Class().IsJump() && (op.JumpOp() == asm.Ja ||
			op.JumpOp() == asm.JEq && left == operand || op.JumpOp() == asm.JNE && left != operand):
			pc = asm.RawInstructionOffset(int64(pc) + int64(ins.Offset))
		case op.Class().IsJump() && (op.JumpOp() == asm.JEq || op.JumpOp() == asm.JNE):
		default:
			return 0, 0, fmt.Errorf("%d: %v: not part of a comparison", pc-1, ins)
		}
	}
}

// copies is how many programs a benchmark attaches to the same function, to see
// what one costs that is too cheap to be seen. The kernel allows 38 on amd64
// (BPF_MAX_TRAMP_LINKS).
const copies = 32

// BenchmarkHook measures what the hook adds to packets that change nothing.
func BenchmarkHook(b *testing.B) {
	if !lab.KernelWireGuard() {
		b.Skip("the kernel has no WireGuard, or this is not root")
	}
	l, err := lab.New(b.Context(), lab.Config{})
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	gw, c := l.Gateways[0], l.Clients[0]
	ctx, cancel := context.WithTimeout(b.Context(), patience)
	defer cancel()
	if _, err := c.Reach(ctx); err != nil {
		b.Fatal(err)
	}

	hook, err := Attach(1)
	if err != nil {
		b.Fatal(err)
	}
	defer hook.Close()
	// The program on the way of data packets comes and goes; the others stay.
	last := len(hook.links) - 1
	if err := hook.links[last].Close(); err != nil {
		b.Fatal(err)
	}
	hook.links = hook.links[:last]
	hooks, empties := []*ebpf.Program{hook.objs.SetPeerEndpoint}, loadEmpty(b, copies)
	hooks = append(hooks, loadCopies(b, hook, copies-1)...)
	second, err := AttachKprobe(1)
	if err != nil {
		b.Fatal(err)
	}
	defer second.Close()
	last = len(second.links) - 1
	if err := second.links[last].Close(); err != nil {
		b.Fatal(err)
	}
	second.links = second.links[:last]

	dev := deviceOf(b, gw, gw.Device())
	nothing := variant{"nothing attached", nil, hook.Unfollow}
	empty := variant{"empty program", empties[:1], hook.Unfollow}
	followed := variant{"hook, device followed", hooks[:1], hook.Follow}
	emptyKprobe := variant{"empty kprobe program", []*ebpf.Program{loadEmptyKprobe(b)}, hook.Unfollow}
	kprobe := variant{"hook by kprobe, followed", []*ebpf.Program{second.objs.SetPeerEndpoint}, second.Follow}
	single := []variant{nothing, empty, {"hook, device not followed", hooks[:1], hook.Unfollow}, followed, emptyKprobe, kprobe}
	many := []variant{
		nothing,
		{fmt.Sprintf("%d empty programs", copies), empties, hook.Unfollow},
		{fmt.Sprintf("%d hooks, device followed", copies), hooks, hook.Follow},
	}

	s, err := lab.NewStream(b.Context(), c, gw)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(s.Close)
	push(b, s, 5000, small) // warm up
	b.Run("packets", func(b *testing.B) {
		const rounds, packets = 30, 1_000
		ns := compare(b, dev, single, rounds, func() float64 { return push(b, s, packets, small) })
		b.ReportMetric(quantile(ns[3], 0.5), "ns/packet")
		b.ReportMetric(quantile(ratios(ns[3], ns[0]), 0.5), "ratio")
		b.Logf("%s: %s; datagrams of %d bytes, %d rounds of %d.\n%s\n%s",
			kernel(), pushMethod, small, rounds, packets, roundsMethod, packetTable(single, ns))
	})
	for _, size := range []int{small, full} {
		b.Run(fmt.Sprintf("packets/%dx/%d-bytes", copies, size), func(b *testing.B) {
			const rounds, packets = 20, 1_000
			ns := compare(b, dev, many, rounds, func() float64 { return push(b, s, packets, size) })
			one := func(i int) float64 { return quantile(differences(ns[i], ns[0]), 0.5) / copies }
			loss := 100 * one(2) / quantile(ns[0], 0.5)
			b.ReportMetric(one(2), "ns-added/hook")
			b.ReportMetric(one(1), "ns-added/empty")
			b.ReportMetric(loss, "%loss/hook")
			b.Logf("%s: datagrams of %d bytes\nThe same with %d programs on one function, so that what they add can be told from noise; %d rounds of %d packets.\n%s"+
				"A %d-th of what is added: %.0f ns for an empty program, %.0f ns for the hook, which is %.2f %% of a packet's %.0f ns.",
				kernel(), size, copies, rounds, packets, packetTable(many, ns), copies, one(1), one(2), loss, quantile(ns[0], 0.5))
		})
	}
	for _, family := range []string{"IPv4", "IPv6"} {
		b.Run("own-time/"+family, func(b *testing.B) { ownTime(b, s, dev, []variant{empty, followed, emptyKprobe, kprobe}, family) })
		if _, err := c.RoamFamily(); err != nil {
			b.Fatal(err)
		}
		push(b, s, 100, small)
	}
}

// loadEmpty loads programs that return at once: what any program costs.
func loadEmpty(b *testing.B, n int) []*ebpf.Program {
	b.Helper()
	var out []*ebpf.Program
	for range n {
		prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
			Name: "empty", Type: ebpf.Tracing, AttachType: ebpf.AttachTraceFEntry,
			AttachTo:     "wg_socket_set_peer_endpoint",
			Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
			License:      "Dual MIT/GPL",
		})
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { prog.Close() })
		out = append(out, prog)
	}
	return out
}

// loadEmptyKprobe loads what any kprobe costs.
func loadEmptyKprobe(b *testing.B) *ebpf.Program {
	b.Helper()
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "empty", Type: ebpf.Kprobe, License: "Dual MIT/GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
	})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { prog.Close() })
	return prog
}

// loadCopies loads the hook's program again, with its maps: the kernel does not
// attach one program twice.
func loadCopies(b *testing.B, hook *Hook, n int) []*ebpf.Program {
	b.Helper()
	var out []*ebpf.Program
	for range n {
		spec, err := loadPeer()
		if err != nil {
			b.Fatal(err)
		}
		var objs struct {
			SetPeerEndpoint *ebpf.Program `ebpf:"set_peer_endpoint"`
		}
		spec.Maps[peerMapLatest].MaxEntries = hook.objs.Latest.MaxEntries() // Attach sets it
		err = spec.LoadAndAssign(&objs, &ebpf.CollectionOptions{MapReplacements: map[string]*ebpf.Map{
			peerMapDevices: hook.objs.Devices, peerMapLatest: hook.objs.Latest,
			peerMapEvents: hook.objs.Events, peerMapHandshakes: hook.objs.Handshakes,
		}})
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { objs.SetPeerEndpoint.Close() })
		out = append(out, objs.SetPeerEndpoint)
	}
	return out
}

// variant is what can be on the way of a data packet.
type variant struct {
	name   string
	progs  []*ebpf.Program
	follow func(Device) error
}

func (v variant) attach(b *testing.B, dev Device) (detach func()) {
	b.Helper()
	if err := v.follow(dev); err != nil {
		b.Fatal(err)
	}
	var links []link.Link
	for _, prog := range v.progs {
		var (
			l   link.Link
			err error
		)
		if prog.Type() == ebpf.Kprobe {
			l, err = link.Kprobe("wg_socket_set_peer_endpoint", prog, nil)
		} else {
			l, err = link.AttachTracing(link.TracingOptions{Program: prog})
		}
		if err != nil {
			b.Fatal(err)
		}
		links = append(links, l)
	}
	return func() {
		for _, l := range links {
			if err := l.Close(); err != nil {
				b.Fatal(err)
			}
		}
	}
}

// roundsMethod is short: what a benchmark logs is cut off at the tenth line.
const roundsMethod = "By turns, every other round in reverse; ratio and added time are medians of the rounds, each against its own with nothing attached."

// compare does the same work with every variant in turn. It returns what work
// returned, by variant and round. Nothing is under way while programs come and
// go: a processor that QEMU 7.2 emulates may run into the breakpoint by which
// the kernel changes the function after the kernel has removed it, and panic.
func compare(b *testing.B, dev Device, variants []variant, rounds int, work func() float64) [][]float64 {
	b.Helper()
	b.ReportMetric(0, "ns/op")
	out := make([][]float64, len(variants))
	for round := range rounds {
		for i := range variants {
			if round%2 == 1 {
				i = len(variants) - 1 - i
			}
			detach := variants[i].attach(b, dev)
			out[i] = append(out[i], work())
			detach()
		}
	}
	return out
}

func ratios(values, base []float64) []float64 {
	out := make([]float64, len(values))
	for i := range values {
		out[i] = values[i] / base[i]
	}
	return out
}

func differences(values, base []float64) []float64 {
	out := make([]float64, len(values))
	for i := range values {
		out[i] = values[i] - base[i]
	}
	return out
}

func packetTable(variants []variant, ns [][]float64) string {
	return columns(func(w io.Writer) {
		fmt.Fprintln(w, "packets/s\tns/packet\tfastest tenth\tadded ns\tratio\tits quartiles\t  variant")
		for i, v := range variants {
			r := ratios(ns[i], ns[0])
			fmt.Fprintf(w, "%.0f\t%.0f\t%.0f\t%+.0f\t%.3f\t%.3f to %.3f\t  %s\n",
				1e9/quantile(ns[i], 0.5), quantile(ns[i], 0.5), quantile(ns[i], 0.1), quantile(differences(ns[i], ns[0]), 0.5),
				quantile(r, 0.5), quantile(r, 0.25), quantile(r, 0.75), v.name)
		}
	})
}

const (
	small      = 64
	full       = 1392 // fills the tunnel's MTU of 1420
	pushMethod = "UDP, client to gateway through kernel WireGuard, a window of 64 under way"
)

// push returns how many nanoseconds each of n datagrams took.
func push(b *testing.B, s *lab.Stream, n, size int) float64 {
	b.Helper()
	took, err := s.Push(n, size)
	if err != nil {
		b.Fatal(err)
	}
	return float64(took.Nanoseconds()) / float64(n)
}

// ownTime reads the kernel's account of the programs' own time.
func ownTime(b *testing.B, s *lab.Stream, dev Device, variants []variant, family string) {
	const rounds, packets = 20, 1_000
	stats, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	if err != nil {
		b.Fatal(err)
	}
	defer stats.Close()
	read := func(prog *ebpf.Program) *ebpf.ProgramStats {
		st, err := prog.Stats()
		if err != nil {
			b.Fatal(err)
		}
		return st
	}
	ns := make([][]float64, len(variants))
	for range rounds {
		for i, v := range variants {
			before := read(v.progs[0])
			detach := v.attach(b, dev)
			push(b, s, packets, small)
			detach()
			after := read(v.progs[0])
			runs := after.RunCount - before.RunCount
			if runs < packets || runs > packets+packets/10 {
				b.Fatalf("%s ran %d times for %d packets", v.name, runs, packets)
			}
			ns[i] = append(ns[i], float64((after.Runtime-before.Runtime).Nanoseconds())/float64(runs))
		}
	}
	net := quantile(differences(ns[1], ns[0]), 0.5)
	n, stores, err := unchangedPath(families[family])
	if err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(quantile(ns[1], 0.5), "ns/run")
	b.ReportMetric(net, "ns/run-net")
	b.ReportMetric(float64(n), "insns/run")
	b.Logf("%s\nrun_time_ns / run_cnt of the programs under kernel.bpf_stats_enabled, a run for each packet, none of which changes\n"+
		"anything; %s outside, %d rounds of %d packets for each program by turns. Both include the reading of the clock; hook\n"+
		"less empty, median of the rounds: %.0f ns. BPF instructions of a run, by walking the object file: %d, of them %d stores.\n%s",
		kernel(), family, rounds, packets, net, n, stores, columns(func(w io.Writer) {
			fmt.Fprintln(w, "ns/run\tquartiles\t  program")
			for i, v := range variants {
				fmt.Fprintf(w, "%.0f\t%.0f to %.0f\t  %s\n", quantile(ns[i], 0.5), quantile(ns[i], 0.25), quantile(ns[i], 0.75), v.name)
			}
		}))
}

func kernel() string {
	var u unix.Utsname
	_ = unix.Uname(&u) // cannot fail with a valid address
	return "Linux " + unix.ByteSliceToString(u.Release[:])
}

// quantile returns the q-th quantile, 0 to 1.
func quantile(values []float64, q float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[int(q*float64(len(sorted)-1)+0.5)]
}

// columns aligns what f prints: cells end with a tab, rows with a line feed.
func columns(f func(w io.Writer)) string {
	var out strings.Builder
	w := tabwriter.NewWriter(&out, 0, 0, 2, ' ', tabwriter.AlignRight)
	f(w)
	w.Flush()
	return out.String()
}
