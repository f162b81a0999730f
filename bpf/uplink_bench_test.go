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
	// A session each over IPv4 and IPv6: confirmed, and hinted at.
	v4, v6 := frame{src: near, dst: far(1)}, frame{src: near6, dst: far6(1)}
	packet := func(f frame, payload []byte) frame { f.payload = payload; return f }
	back := func(f frame) frame { f.src, f.dst = f.dst, f.src; return f }
	for i, f := range []frame{v4, v6} {
		local, remote := uint32(1+10*i), uint32(2+10*i)
		w.pass(out, packet(f, response(local, remote)).bytes(), nil)
		w.pass(out, packet(f, data(remote)).bytes(), nil)
		w.pass(in, packet(back(f), data(local)).bytes(), nil)
	}
	settle := func(local, reminders uint32) func() {
		return func() {
			key := uplinkUplinkKey{Index: local, Port: near.Port()}
			var session uplinkUplinkLocal
			if err := w.u.objs.Locals.Lookup(&key, &session); err != nil {
				b.Fatal(err)
			}
			session.Reminders, session.Remind = reminders, 1<<62
			if err := w.u.objs.Locals.Put(&key, &session); err != nil {
				b.Fatal(err)
			}
		}
	}
	big := func(index uint32) []byte { return message(4, 1400, index) }
	others, tcp := packet(v4, big(2)), packet(v4, big(2))
	others.src, tcp.protocol = far(9), 6
	variants := []struct {
		name   string
		prog   *ebpf.Program
		packet frame
		before func()
	}{
		{"empty program", empty, packet(v4, big(2)), nil},
		{"TCP", out, tcp, nil},
		{"UDP of others", out, others, nil},
		{"data out", out, packet(v4, big(2)), nil},
		{"data out, IPv6", out, packet(v6, big(12)), nil},
		{"data in", in, packet(back(v4), big(1)), settle(1, 0)},
		{"data in, IPv6", in, packet(back(v6), big(11)), settle(11, 0)},
		{"data in, reminders to come", in, packet(back(v4), big(1)), settle(1, 1)},
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
	b.ReportMetric(quantile(differences(ns[3], ns[0]), 0.5), "ns-out")
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
	// A response, its confirmation, and a hint, of each session.
	if n := len(w.events()); n > 6 {
		b.Errorf("%d events: that was another path", n)
	}
}
