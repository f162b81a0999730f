// SPDX-License-Identifier: MIT

package bpf

import (
	"encoding/binary"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf/btf"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// TestUplinkABI: the C structs of the embedded object and the Go structs that read
// them have the same members, at the same places.
func TestUplinkABI(t *testing.T) {
	spec, err := loadUplink()
	if err != nil {
		t.Fatal(err)
	}
	checkABI(t, spec.Types, map[string]reflect.Type{
		"uplink_event":   reflect.TypeFor[uplinkUplinkEvent](),
		"uplink_address": reflect.TypeFor[uplinkUplinkAddress](),
		"uplink_key":     reflect.TypeFor[uplinkUplinkKey](),
		"uplink_local":   reflect.TypeFor[uplinkUplinkLocal](),
		"uplink_remote":  reflect.TypeFor[uplinkUplinkRemote](),
		"uplink_late":    reflect.TypeFor[uplinkUplinkLate](),
	})
	for name, size := range map[string]uintptr{
		uplinkMapLocals:  unsafe.Sizeof(uplinkUplinkLocal{}),
		uplinkMapRemotes: unsafe.Sizeof(uplinkUplinkRemote{}),
		uplinkMapLate:    unsafe.Sizeof(uplinkUplinkLate{}),
	} {
		key := uint32(unsafe.Sizeof(uplinkUplinkKey{}))
		if m := spec.Maps[name]; m.KeySize != key || m.ValueSize != uint32(size) {
			t.Errorf("map %s: key of %d bytes, value of %d, want %d and %d", name, m.KeySize, m.ValueSize, key, size)
		}
	}
	for kind := UplinkInitiation; kind <= UplinkConfirmed; kind++ {
		if kind.String() == (kind+100).String() || kind.String() == "" {
			t.Errorf("kind %d has no name", kind)
		}
	}
}

// checkABI compares C structs with Go structs.
func checkABI(t *testing.T, types *btf.Spec, goTypes map[string]reflect.Type) {
	t.Helper()
	type member struct {
		name         string
		offset, size int
	}
	for name, goType := range goTypes {
		var c *btf.Struct
		if err := types.TypeByName(name, &c); err != nil {
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
}

// uplinkSample is an event as the kernel writes it.
func uplinkSample(kind UplinkKind) []byte {
	b := binary.NativeEndian.AppendUint64(nil, 123456789)
	b = append(b, 192, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x12, 0x34)
	b = binary.NativeEndian.AppendUint16(b, unix.AF_INET)
	b = append(b, 0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9, 0xca, 0x6c)
	b = binary.NativeEndian.AppendUint16(b, unix.AF_INET6)
	b = append(b, 192, 0, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
	b = binary.NativeEndian.AppendUint32(b, 5)
	b = binary.NativeEndian.AppendUint32(b, 6)
	b = binary.NativeEndian.AppendUint16(b, 51820)
	b = append(b, byte(kind), 0)
	for i := range messageSize(kind) {
		b = append(b, byte(i))
	}
	return b
}

func TestUplinkDecode(t *testing.T) {
	for kind := UplinkInitiation; kind <= UplinkConfirmed; kind++ {
		raw, err := decodeUplink(uplinkSample(kind))
		if err != nil {
			t.Fatal(err)
		}
		want := UplinkEvent{
			Kind: kind, Port: 51820, Boot: 123456789 * time.Nanosecond, Local: 5, Remote: 6,
			Addr: netip.MustParseAddrPort("192.0.2.1:4660"), Old: netip.MustParseAddrPort("[fe80::9]:51820"),
		}
		if kind != UplinkHint {
			want.Near = netip.MustParseAddr("192.0.2.2")
		}
		for i := range map[UplinkKind]int{UplinkInitiation: 132, UplinkResponse: 76}[kind] {
			want.Message = append(want.Message, byte(i))
		}
		if diff := cmp.Diff(want, raw.event(), uplinkOpts); diff != "" || raw.event().Boot != want.Boot {
			t.Errorf("event (-want +got):\n%s", diff)
		}
		// A newer program may say more; less is an error.
		if _, err := decodeUplink(append(uplinkSample(kind), make([]byte, 200)...)); err != nil {
			t.Error(err)
		}
		for n := range len(uplinkSample(kind)) {
			if _, err := decodeUplink(uplinkSample(kind)[:n]); err == nil {
				t.Fatalf("%v: no error for %d bytes", kind, n)
			}
		}
	}
	for _, kind := range []UplinkKind{0, UplinkConfirmed + 1, 255} {
		if _, err := decodeUplink(uplinkSample(kind)); err == nil {
			t.Errorf("no error for %v", kind)
		}
	}
}

func FuzzDecodeUplink(f *testing.F) {
	for kind := range UplinkConfirmed + 2 {
		f.Add(uplinkSample(kind))
	}
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		raw, err := decodeUplink(b)
		if len(b) < uplinkHeader && err == nil {
			t.Fatalf("no error for %d bytes", len(b))
		}
		if err != nil {
			return
		}
		e := raw.event()
		if e.Kind < UplinkInitiation || e.Kind > UplinkConfirmed || len(e.Message) != messageSize(e.Kind) || len(b) < uplinkHeader+len(e.Message) {
			t.Errorf("%v with a message of %d bytes, of %d", e.Kind, len(e.Message), len(b))
		}
		for _, ep := range []netip.AddrPort{e.Addr, e.Old} {
			if !ep.IsValid() && ep != (netip.AddrPort{}) {
				t.Errorf("address %v: neither valid nor zero", ep)
			}
		}
	})
}
