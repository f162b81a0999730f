// SPDX-License-Identifier: MIT

//go:build selftest

package bpf

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf/btf"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/wgroam/wgroam"
)

// TestSelftest runs the kernel's own test of WireGuard, with the hook attached:
// netns.sh of tools/testing/selftests/wireguard, which "make selftest" takes from
// Debian's kernel sources. It makes devices in three namespaces, moves them
// around, roams, and puts WireGuard into WireGuard. The script has to come to
// its end, and the hook has to report every change of an endpoint: as a kprobe
// in the traces of the kernel sees them, which shares nothing with the hook.
func TestSelftest(t *testing.T) {
	needWireGuard(t)
	hook := sharedHook(t)
	traces := traceEndpoints(t)
	// The script ends with counting what has been created and destroyed, in the kernel's log.
	write(t, "/sys/kernel/debug/dynamic_debug/control", "module wireguard +p")
	runSelftest(t, hook)

	events, err := readAll(hook)
	if err != nil {
		t.Fatal(err)
	}
	if lost, err := hook.Lost(); lost != 0 || err != nil {
		t.Errorf("%d events lost, %v", lost, err)
	}
	got := make(map[uint64][]change)
	for _, e := range events {
		if e.Confirmed {
			continue
		}
		c := change{Device: e.Device, Peer: e.Peer, Old: e.Old, New: e.New, Cause: e.Cause.String()}
		if e.Cause == wgroam.CauseInitiation || e.Cause == wgroam.CauseResponse {
			c.Cause = "handshake" // the kprobe cannot tell
		}
		got[e.InternalID] = append(got[e.InternalID], c)
	}
	want := traces()
	if diff := cmp.Diff(want, got, opts); diff != "" {
		t.Errorf("endpoint changes of each peer (-trace +hook):\n%s", diff)
	}

	causes, moves := make(map[string]int), 0
	for _, changes := range want {
		for _, c := range changes {
			causes[c.Cause]++
			if c.Old.IsValid() && c.Cause != wgroam.CauseConfig.String() {
				moves++
			}
		}
	}
	t.Logf("%d peers, changes by cause %v, %d of them roams", len(want), causes, moves)
	// What the script says that it tests, at the least.
	if moves < 10 {
		t.Errorf("%d roams: the test has lost its object", moves)
	}
}

// change is one change of a peer's endpoint.
type change struct {
	Device   Device
	Peer     wgroam.Key
	Old, New netip.AddrPort
	Cause    string
}

// runSelftest runs the script, unmodified, and follows all devices that it makes.
func runSelftest(t *testing.T, hook *Hook) {
	t.Helper()
	ip, err := exec.LookPath("ip")
	if err != nil {
		t.Fatal(err)
	}
	// An ip before the real one on the PATH, which has the hook follow the devices of a
	// namespace before anything is in it. Nothing of ours may be in there: it would outlive the script's end of it.
	dir := t.TempDir()
	ask, answer := filepath.Join(dir, "ask"), filepath.Join(dir, "answer")
	for _, name := range []string{ask, answer} {
		if err := unix.Mkfifo(name, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(t, filepath.Join(dir, "ip"), fmt.Sprintf(`#!/bin/bash
[[ "$1 $2" == "netns add" ]] || exec %[1]s "$@"
%[1]s "$@" && echo "$3" >%[2]s && read -r <%[3]s
`, ip, ask, answer))

	// Both for reading and writing, so that no end waits for the other to open.
	asked, err := os.OpenFile(ask, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	answers, err := os.OpenFile(answer, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer answers.Close()
	followed := make(chan error, 1)
	go func() {
		names := bufio.NewScanner(asked)
		var err error
		for names.Scan() {
			err = errors.Join(err, followAll(hook, names.Text()))
			fmt.Fprintln(answers)
		}
		followed <- err
	}()

	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
	defer cancel()
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, "bash", "/root/netns.sh")
	cmd.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"))
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.WaitDelay = time.Second // its servers hold the pipe
	began := time.Now()
	err = cmd.Run()
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if err != nil || !strings.Contains(out.String(), "Objects that were created were also destroyed.") {
		t.Errorf("netns.sh: %v, after %v; the end of its output:\n%s",
			err, time.Since(began), strings.Join(lines[max(0, len(lines)-60):], "\n"))
	}
	t.Logf("netns.sh took %v", time.Since(began).Round(time.Second))
	asked.Close()
	if err := <-followed; err != nil {
		t.Error(err)
	}
}

// followAll follows each device that a namespace may come to have. The numbers
// of links begin with 1, and a device that moves there takes its own along, or
// gets the next (net/core/dev.c, dev_change_net_namespace).
func followAll(hook *Hook, namespace string) error {
	var st unix.Stat_t
	if err := unix.Stat("/run/netns/"+namespace, &st); err != nil {
		return fmt.Errorf("identify namespace %s: %w", namespace, err)
	}
	for ifindex := range uint32(64) {
		if err := hook.Follow(Device{Ifindex: ifindex + 1, Netns: uint32(st.Ino)}); err != nil {
			return err
		}
	}
	return nil
}

// traceEndpoints makes the kernel write a line for every endpoint that
// WireGuard writes. The returned function reads them.
//
// wg_socket_set_peer_endpoint() ends with write_unlock_bh(&peer->endpoint_lock) if, as
// the kernel itself sees it, the endpoint differs, be it by the local address
// only. That is a jump (socket.c:296, on amd64), so that the return address on
// top of the stack is that of the caller and shows what brought the endpoint. wg_socket_clear_peer_endpoint_src() is
// the only other user of the lock. It is a kprobe of the kernel's tracing, not of BPF, with the places of the fields
// by their names in BTF.
func traceEndpoints(t *testing.T) func() map[uint64][]change {
	t.Helper()
	kernel, err := btf.LoadKernelSpec()
	if err != nil {
		t.Fatal(err)
	}
	module, err := btf.LoadKernelModuleSpec("wireguard")
	if err != nil {
		t.Fatal(err)
	}
	at := func(name string, path ...string) int {
		if strings.HasPrefix(name, "wg_") {
			return fieldOffset(t, module, name, path...)
		}
		return fieldOffset(t, kernel, name, path...)
	}
	peer := -at("wg_peer", "endpoint_lock") // the argument points there
	endpoint := peer + at("wg_peer", "endpoint")
	key := peer + at("wg_peer", "handshake", "remote_static")
	dev := fmt.Sprintf("+%d(%+d(%%di))", at("wg_device", "dev"), peer+at("wg_peer", "device"))
	probe := fmt.Sprintf("p:wgroam/endpoint _raw_write_unlock_bh caller=$stack0:symbol id=%+d(%%di):u64"+
		" ifindex=+%d(%s):u32 netns=+%d(+%d(%s)):u32", peer+at("wg_peer", "internal_id"),
		at("net_device", "ifindex"), dev, at("net", "ns", "inum"), at("net_device", "nd_net", "net"), dev)
	for i := range 4 {
		probe += fmt.Sprintf(" key%d=%+d(%%di):u64", i, key+8*i)
	}
	for i := range 3 { // family, port, address of IPv4 or flow; address of IPv6
		probe += fmt.Sprintf(" ep%d=%+d(%%di):u64", i, endpoint+8*i)
	}

	const tracing = "/sys/kernel/tracing/"
	write(t, tracing+"buffer_size_kb", "16384")
	write(t, tracing+"kprobe_events", probe)
	write(t, tracing+"events/wgroam/endpoint/enable", "1")
	return func() map[uint64][]change {
		t.Helper()
		write(t, tracing+"events/wgroam/endpoint/enable", "0")
		out := make(map[uint64][]change)
		for line := range strings.Lines(read(t, tracing+"trace")) {
			if n, ok := strings.CutPrefix(line, "# entries-in-buffer/entries-written: "); ok {
				n, _, _ := strings.Cut(n, " ")
				if kept, written, _ := strings.Cut(n, "/"); kept != written {
					t.Fatalf("the kernel's buffer kept %s traces of %s", kept, written)
				}
			}
			if !strings.Contains(line, " caller=") || !strings.Contains(line, " [wireguard] ") {
				continue // somebody else's lock
			}
			id, c := parseTrace(t, line)
			changes := out[id]
			if len(changes) > 0 {
				c.Old = changes[len(changes)-1].New
			}
			if c.Old != c.New { // else another local address
				out[id] = append(changes, c)
			}
		}
		for field := range strings.Lines(read(t, tracing+"kprobe_profile")) {
			if f := strings.Fields(field); f[len(f)-1] != "0" {
				t.Errorf("the kprobe was left out: event, hits, misses: %q", f)
			}
		}
		write(t, tracing+"kprobe_events", "")
		return out
	}
}

// parseTrace reads a line of the kprobe: the peer's internal id, and its state.
func parseTrace(t *testing.T, line string) (uint64, change) {
	t.Helper()
	num := make(map[string]uint64)
	var c change
	for field := range strings.FieldsSeq(line) {
		name, value, ok := strings.Cut(field, "=")
		if !ok {
			continue
		}
		if name == "caller" {
			function, _, _ := strings.Cut(value, "+")
			c.Cause = map[string]string{
				"wg_packet_rx_poll":                    wgroam.CauseData.String(),
				"wg_socket_set_peer_endpoint_from_skb": "handshake",
				"set_peer":                             wgroam.CauseConfig.String(),
			}[function]
			continue
		}
		n, err := strconv.ParseUint(value, 10, 64)
		if err != nil {
			t.Fatalf("trace %q: %v", line, err)
		}
		num[name] = n
	}
	c.Device = Device{Ifindex: uint32(num["ifindex"]), Netns: uint32(num["netns"])}
	for i := range 4 {
		binary.NativeEndian.PutUint64(c.Peer[8*i:], num[fmt.Sprintf("key%d", i)])
	}
	var sockaddr [24]byte
	for i := range 3 {
		binary.NativeEndian.PutUint64(sockaddr[8*i:], num[fmt.Sprintf("ep%d", i)])
	}
	port := binary.BigEndian.Uint16(sockaddr[2:])
	switch family := binary.NativeEndian.Uint16(sockaddr[:]); family {
	case unix.AF_INET:
		c.New = netip.AddrPortFrom(netip.AddrFrom4([4]byte(sockaddr[4:])), port)
	case unix.AF_INET6:
		c.New = netip.AddrPortFrom(netip.AddrFrom16([16]byte(sockaddr[8:])), port)
	}
	return num["id"], c
}

// fieldOffset returns the place of a field in a struct, in bytes.
func fieldOffset(t *testing.T, spec *btf.Spec, name string, path ...string) int {
	t.Helper()
	var s *btf.Struct
	if err := spec.TypeByName(name, &s); err != nil {
		t.Fatalf("struct %s: %v", name, err)
	}
	offset := 0
	for _, field := range path {
		i := slices.IndexFunc(s.Members, func(m btf.Member) bool { return m.Name == field })
		if i < 0 {
			t.Fatalf("struct %s has no field %s of %v", name, field, path)
		}
		offset += int(s.Members[i].Offset.Bytes())
		s, _ = btf.UnderlyingType(s.Members[i].Type).(*btf.Struct)
	}
	return offset
}

func write(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(text), 0o700); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
