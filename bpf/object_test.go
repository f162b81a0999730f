// SPDX-License-Identifier: MIT

package bpf

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/wgroam/wgroam"
)

// eachObject runs a test of an object for each that peer.bpf.c is compiled to.
func eachObject(t *testing.T, test func(*testing.T, *ebpf.CollectionSpec)) {
	for name, load := range map[string]func() (*ebpf.CollectionSpec, error){"peer": loadPeer, "kprobe": loadKprobe} {
		t.Run(name, func(t *testing.T) {
			spec, err := load()
			if err != nil {
				t.Fatal(err)
			}
			test(t, spec)
		})
	}
}

// TestABI: the C structs of the embedded object and the Go structs that read
// them have the same members, at the same places.
func TestABI(t *testing.T) { eachObject(t, objectABI) }

func objectABI(t *testing.T, spec *ebpf.CollectionSpec) {
	type member struct {
		name         string
		offset, size int
	}
	for name, goType := range map[string]reflect.Type{
		"peer_event":    reflect.TypeFor[peerPeerEvent](),
		"peer_state":    reflect.TypeFor[peerPeerState](),
		"peer_endpoint": reflect.TypeFor[peerPeerEndpoint](),
		"device_id":     reflect.TypeFor[peerDeviceId](),
	} {
		var c *btf.Struct
		if err := spec.Types.TypeByName(name, &c); err != nil {
			t.Errorf("struct %s: %v", name, err)
			continue
		}
		if int(c.Size) != int(goType.Size()) {
			t.Errorf("struct %s has %d bytes in C, %d in Go", name, c.Size, goType.Size())
		}
		var want, got []member
		for _, m := range c.Members {
			size, err := btf.Sizeof(m.Type)
			if err != nil {
				t.Fatal(err)
			}
			want = append(want, member{strings.ReplaceAll(m.Name, "_", ""), int(m.Offset.Bytes()), size})
		}
		for f := range goType.Fields() {
			if f.Name != "_" {
				got = append(got, member{strings.ToLower(f.Name), int(f.Offset), int(f.Type.Size())})
			}
		}
		if diff := cmp.Diff(want, got, cmp.AllowUnexported(member{})); diff != "" {
			t.Errorf("struct %s (-C +Go):\n%s", name, diff)
		}
	}

	for name, want := range map[string][2]uint32{
		peerMapDevices: {uint32(unsafe.Sizeof(peerDeviceId{})), 1},
		peerMapLatest:  {8, uint32(unsafe.Sizeof(peerPeerState{}))},
	} {
		if m := spec.Maps[name]; m.KeySize != want[0] || m.ValueSize != want[1] {
			t.Errorf("map %s: key of %d bytes, value of %d, want %v", name, m.KeySize, m.ValueSize, want)
		}
	}
}

// TestSecrets: of a peer's keys, the program knows the place of the public one
// only.
func TestSecrets(t *testing.T) { eachObject(t, objectSecrets) }

func objectSecrets(t *testing.T, spec *ebpf.CollectionSpec) {
	for name, want := range map[string][]string{
		"noise_handshake": {"remote_static"},
		"wg_peer":         {"device", "endpoint", "handshake", "internal_id"},
		"wg_device":       {"dev"},
		"cookie_checker":  {"device"},
	} {
		var s *btf.Struct
		if err := spec.Types.TypeByName(name, &s); err != nil {
			t.Errorf("struct %s: %v", name, err)
			continue
		}
		var got []string
		for _, m := range s.Members {
			got = append(got, m.Name)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("struct %s (-want +got):\n%s", name, diff)
		}
	}
}

// sample is an event as the kernel writes it.
func sample() []byte {
	b := binary.NativeEndian.AppendUint64(nil, 77)
	b = binary.NativeEndian.AppendUint64(b, 123456789)
	for i := range 32 {
		b = append(b, byte(i))
	}
	b = append(b, 192, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0) // address
	b = append(b, 0, 0, 0, 0)                                       // scope
	b = append(b, 0x12, 0x34)                                       // port
	b = binary.NativeEndian.AppendUint16(b, unix.AF_INET)
	b = append(b, 0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9)
	b = binary.NativeEndian.AppendUint32(b, 3)
	b = append(b, 0xca, 0x6c)
	b = binary.NativeEndian.AppendUint16(b, unix.AF_INET6)
	b = binary.NativeEndian.AppendUint32(b, 5)
	b = binary.NativeEndian.AppendUint32(b, 0xf0000001)
	return append(b, 2, 0, 0, 0, 0, 0, 0, 0)
}

func TestDecode(t *testing.T) {
	raw, err := decode(sample())
	if err != nil {
		t.Fatal(err)
	}
	want := Event{
		Device: Device{Ifindex: 5, Netns: 0xf0000001}, InternalID: 77, Boot: 123456789 * time.Nanosecond,
		Old: netip.MustParseAddrPort("192.0.2.1:4660"), New: netip.MustParseAddrPort("[fe80::9]:51820"),
		Cause: wgroam.CauseResponse,
	}
	for i := range want.Peer {
		want.Peer[i] = byte(i)
	}
	if got := raw.event(); got != want {
		t.Errorf("event (-want +got):\n%s", cmp.Diff(want, got, opts))
	}
	// No endpoint, and a family that nobody knows.
	none := sample()
	clear(none[48:72])
	binary.NativeEndian.PutUint16(none[94:], 77)
	if raw, err = decode(none); err != nil || raw.event().Old.IsValid() || raw.event().New.IsValid() {
		t.Errorf("event %+v, error %v", raw.event(), err)
	}
	// The end of a handshake is no cause.
	end := sample()
	end[104] = 0x80
	if raw, err = decode(end); err != nil || raw.event().Cause != 0 || !raw.event().Confirmed {
		t.Errorf("event %+v, error %v", raw.event(), err)
	}
	// A newer program may say more; less is an error.
	if _, err := decode(append(sample(), 1, 2, 3)); err != nil {
		t.Error(err)
	}
	for n := range len(sample()) {
		if _, err := decode(sample()[:n]); err == nil {
			t.Fatalf("no error for %d bytes", n)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(sample())
	f.Add([]byte{})
	f.Add(make([]byte, 112))
	f.Fuzz(func(t *testing.T, b []byte) {
		raw, err := decode(b)
		if (err == nil) != (len(b) >= len(sample())) {
			t.Fatalf("%d bytes: error %v", len(b), err)
		}
		if err != nil {
			return
		}
		e := raw.event()
		for _, ep := range []netip.AddrPort{e.Old, e.New} {
			if !ep.IsValid() && ep != (netip.AddrPort{}) {
				t.Errorf("endpoint %v: neither valid nor zero", ep)
			}
		}
		if e.Confirmed && e.Cause != 0 {
			t.Errorf("a confirmation with cause %v", e.Cause)
		}
	})
}

func TestObjectHashes(t *testing.T) {
	hashes := ObjectHashes()
	objects := map[string]string{"peer": "peer_bpfel.o", "kprobe": "kprobe_x86_bpfel.o", "uplink": "uplink_bpfel.o"}
	if runtime.GOARCH == "arm64" {
		objects["kprobe"] = "kprobe_arm64_bpfel.o"
	}
	if len(hashes) != len(objects) {
		t.Errorf("objects %v", hashes)
	}
	embedded := map[string][]byte{"peer": _PeerBytes, "kprobe": _KprobeBytes, "uplink": _UplinkBytes}
	for name, file := range objects {
		object, err := os.ReadFile(file)
		if errors.Is(err, os.ErrNotExist) {
			object, err = embedded[name], nil // the machine of test/vm has no sources
		}
		if err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(object)
		if want := hex.EncodeToString(sum[:]); hashes[name] != want {
			t.Errorf("%s: hash %s, want %s", name, hashes[name], want)
		}
	}
}

// unprivileged runs f on a thread that has only these capabilities, and ends
// with it.
func unprivileged(t *testing.T, caps []int, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var data [2]unix.CapUserData
		for _, c := range caps {
			data[c/32].Effective |= 1 << (c % 32)
			data[c/32].Permitted |= 1 << (c % 32)
		}
		if err := unix.Capset(&hdr, &data[0]); err != nil {
			t.Error(err)
			return
		}
		f()
	}()
	<-done
}

// TestAttachPrivileges: what is missing is named, whatever the kernel calls it.
func TestAttachPrivileges(t *testing.T) {
	needRoot(t)
	for _, test := range []struct {
		have    []int
		missing string
	}{
		{nil, "CAP_BPF, CAP_PERFMON, CAP_SYS_ADMIN"},
		{[]int{unix.CAP_NET_ADMIN}, "CAP_BPF, CAP_PERFMON, CAP_SYS_ADMIN"},
		{[]int{unix.CAP_BPF, unix.CAP_PERFMON}, "CAP_SYS_ADMIN"},
	} {
		t.Run("without "+test.missing, func(t *testing.T) {
			unprivileged(t, test.have, func() {
				hook, err := Attach(1)
				if err == nil {
					hook.Close()
				}
				if !errors.Is(err, ErrPrivilege) || !strings.Contains(fmt.Sprint(err), "needs "+test.missing+":") {
					t.Errorf("Attach: %v, want %v and %s", err, ErrPrivilege, test.missing)
				}
			})
		})
	}
}

// TestExplain: an error of the kernel or the library becomes a reason, by what is
// so on this host.
func TestExplain(t *testing.T) {
	needRoot(t)
	if !exists("/sys/kernel/btf/vmlinux") {
		t.Skipf("%s has no BTF", kernel())
	}
	cause := fmt.Errorf("load: %w", ebpf.ErrNotSupported)
	for name, test := range map[string]struct {
		err           error
		with, without error // a WireGuard module
	}{
		"library": {cause, ErrUnsupported, ErrNoModule},
		"arch":    {fmt.Errorf("attach: %w", errNotSupp), ErrUnsupported, ErrNoModule},
		"other":   {unix.ENOMEM, unix.ENOMEM, ErrNoModule},
	} {
		want := test.without
		if exists("/sys/module/wireguard") {
			want = test.with
		}
		got := explain(test.err, "something")
		if !errors.Is(got, want) || !errors.Is(got, test.err) {
			t.Errorf("%s: %v, want %v", name, got, want)
		}
		reasons := 0
		for _, reason := range []error{ErrPrivilege, ErrNoModule, ErrUnsupported} {
			if errors.Is(got, reason) {
				reasons++
			}
		}
		if reasons > 1 {
			t.Errorf("%s: %v is for %d reasons", name, got, reasons)
		}
	}
	if !exists("/sys/module/wireguard") {
		if _, err := Attach(1); !errors.Is(err, ErrNoModule) {
			t.Errorf("Attach: %v, want %v", err, ErrNoModule)
		}
	}
	unprivileged(t, nil, func() {
		if err := explain(cause, "something"); !errors.Is(err, ErrPrivilege) {
			t.Errorf("without privileges: %v, want %v", err, ErrPrivilege)
		}
	})
}
