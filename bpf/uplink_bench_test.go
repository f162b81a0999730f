// SPDX-License-Identifier: MIT

package bpf

import (
	"fmt"
	"io"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
)

// BenchmarkUplink measures what the UDP-port program adds to a packet, by running
// it on one again and again.
func BenchmarkUplink(b *testing.B) {
	w := newWire(b)
	empty, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SchedCLS, License: "Dual MIT/GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()},
	})
	if err != nil {
		b.Fatal(err)
	}
	defer empty.Close()

	in, out := w.u.objs.UplinkIngress, w.u.objs.UplinkEgress
	to := far(1)
	w.out(to, response(1, 2))
	w.out(to, data(2)) // confirmed
	w.in(to, data(1))  // and hinted at
	var session uplinkUplinkLocal
	key := uplinkUplinkKey{Index: 1, Port: near.Port()}
	if err := w.u.objs.Locals.Lookup(&key, &session); err != nil {
		b.Fatal(err)
	}
	settle := func(reminders uint32) func() {
		return func() {
			session.Reminders, session.Remind = reminders, 1<<62
			if err := w.u.objs.Locals.Put(&key, &session); err != nil {
				b.Fatal(err)
			}
		}
	}
	big := message(4, 1400, 2)
	foreign := frame{src: near, dst: to, payload: big}
	foreign.src = far(9)
	variants := []struct {
		name   string
		prog   *ebpf.Program
		packet frame
		before func()
	}{
		{"empty program", empty, frame{src: near, dst: to, payload: big}, nil},
		{"TCP", out, frame{src: near, dst: to, payload: big, protocol: 6}, nil},
		{"UDP of others", out, foreign, nil},
		{"the same, IPv6", out, frame{src: far6(9), dst: far6(1), payload: big}, nil},
		{"data out", out, frame{src: near, dst: to, payload: big}, nil},
		{"data in", in, frame{src: to, dst: near, payload: message(4, 1400, 1)}, settle(0)},
		{"data in, reminders to come", in, frame{src: to, dst: near, payload: message(4, 1400, 1)}, settle(1)},
	}
	const rounds, packets = 20, 200_000
	ns := make([][]float64, len(variants))
	for range rounds {
		for i, v := range variants {
			if v.before != nil {
				v.before()
			}
			_, took, err := v.prog.Benchmark(v.packet.bytes(), packets, nil)
			if err != nil {
				b.Fatal(err)
			}
			ns[i] = append(ns[i], float64(took)/float64(time.Nanosecond))
		}
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(quantile(differences(ns[4], ns[0]), 0.5), "ns-out")
	b.ReportMetric(quantile(differences(ns[5], ns[0]), 0.5), "ns-in")
	b.Logf("%s, BPF_PROG_TEST_RUN, packets of 1400 bytes, %d rounds of %d by turns, each against the same round of the empty program.\n%s",
		kernel(), rounds, packets, columns(func(out io.Writer) {
			fmt.Fprintln(out, "ns/packet\tadded ns\tits quartiles\t  packet")
			for i, v := range variants {
				added := differences(ns[i], ns[0])
				fmt.Fprintf(out, "%.0f\t%+.0f\t%+.0f to %+.0f\t  %s\n", quantile(ns[i], 0.5),
					quantile(added, 0.5), quantile(added, 0.25), quantile(added, 0.75), v.name)
			}
		}))
	// A response, its confirmation, and a hint.
	if n := len(w.events()); n > 3 {
		b.Errorf("%d events: that was another path", n)
	}
}
