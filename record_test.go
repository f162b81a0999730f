// SPDX-License-Identifier: MIT

package wgroam

import (
	"bytes"
	"encoding/hex"
	"errors"
	"math"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// genAnyRecord draws from all records that the wire can carry.
var genAnyRecord = rapid.Custom(func(t *rapid.T) Record {
	var ip [16]byte
	copy(ip[:], rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "ip"))
	addr := netip.AddrFrom16(ip).Unmap()
	if rapid.Bool().Draw(t, "ipv4") {
		addr = netip.AddrFrom4([4]byte(ip[:4]))
	}
	return Record{
		Peer:     genKey.Draw(t, "peer"),
		Endpoint: netip.AddrPortFrom(addr, rapid.Uint16().Draw(t, "port")),
		Cause:    rapid.Map(rapid.Uint8Range(5, math.MaxUint8), func(c uint8) Cause { return Cause(c) }).Draw(t, "cause"),
		Version: Version{
			Term: rapid.Uint32().Draw(t, "term"),
			HLC:  HLC(rapid.Uint64().Draw(t, "hlc")),
			Node: NodeID(rapid.Uint64().Draw(t, "node")),
		},
	}
})

func encoded(r Record) []byte {
	b, err := r.AppendBinary(nil)
	if err != nil {
		panic(err)
	}
	return b
}

// TestRecordWire pins the wire format, which nodes of different versions share.
func TestRecordWire(t *testing.T) {
	r := Record{
		Peer:     Key{0: 0xa0, 31: 0xa1},
		Endpoint: netip.MustParseAddrPort("198.51.100.7:51820"),
		Cause:    CauseResponse,
		Version:  Version{Term: 0x01020304, HLC: 0x1112131415161718, Node: 0x2122232425262728},
	}
	want := "a0" + strings.Repeat("00", 30) + "a1" +
		"00000000000000000000ffff" + "c6336407" + "ca6c" + "02" + "00" +
		"01020304" + "1112131415161718" + "2122232425262728"
	if diff := cmp.Diff(want, hex.EncodeToString(encoded(r))); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	r.Endpoint = netip.MustParseAddrPort("[2001:db8::7]:51820")
	want = strings.Replace(want, "00000000000000000000ffffc6336407", "20010db8000000000000000000000007", 1)
	if diff := cmp.Diff(want, hex.EncodeToString(encoded(r))); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestRecordRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := rapid.OneOf(genRecord, genAnyRecord).Draw(t, "record")
		head := rapid.SliceOf(rapid.Byte()).Draw(t, "head")
		b, err := want.AppendBinary(head)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(b[:len(head)], head) || len(b) != len(head)+RecordSize {
			t.Fatalf("%d bytes appended to %d", len(b)-len(head), len(head))
		}
		b = b[len(head):]
		var got Record
		if err := got.UnmarshalBinary(b); err != nil || got != want {
			t.Fatalf("got %+v, %v, want %+v", got, err, want)
		}

		// A newer version's record: longer, and with the reserved byte in use.
		newer := append(bytes.Clone(b), rapid.SliceOf(rapid.Byte()).Draw(t, "tail")...)
		newer[51] = rapid.Byte().Draw(t, "reserved")
		if err := got.UnmarshalBinary(newer); err != nil || got != want {
			t.Fatalf("from a newer version: got %+v, %v, want %+v", got, err, want)
		}
	})
}

func TestRecordRefuses(t *testing.T) {
	good := encoded(Record{Peer: Key{1}, Endpoint: netip.MustParseAddrPort("198.51.100.7:51820"), Cause: CauseData})
	for n := range RecordSize {
		refused(t, good[:n])
	}
	for _, c := range []Cause{0, CauseConfig} {
		bad := bytes.Clone(good)
		bad[50] = byte(c)
		refused(t, bad)
	}
}

func refused(t *testing.T, b []byte) {
	t.Helper()
	before := Record{Peer: Key{9}}
	r := before
	if err := r.UnmarshalBinary(b); !errors.Is(err, ErrRecord) || r != before {
		t.Errorf("%x: %v, %+v", b, err, r)
	}
}

func FuzzRecord(f *testing.F) {
	f.Add(encoded(Record{Peer: Key{1}, Endpoint: netip.MustParseAddrPort("198.51.100.7:51820"), Cause: CauseData}))
	f.Add(append(encoded(Record{Endpoint: netip.MustParseAddrPort("[2001:db8::7]:1"), Cause: 200}), "more"...))
	f.Add(make([]byte, RecordSize))
	f.Fuzz(func(t *testing.T, b []byte) {
		var r Record
		if err := r.UnmarshalBinary(b); err != nil {
			refused(t, b)
			return
		}
		if r.Endpoint.Addr().Is4In6() || r.Endpoint.Addr().Zone() != "" {
			t.Errorf("endpoint %v has two spellings", r.Endpoint)
		}
		want := bytes.Clone(b[:RecordSize])
		want[51] = 0
		if got := encoded(r); !bytes.Equal(got, want) {
			t.Errorf("got  %x\nwant %x", got, want)
		}
		_ = CheckEndpoint(r.Endpoint)
	})
}

func TestVersionCompare(t *testing.T) {
	// In ascending order.
	versions := []Version{
		{}, {Node: 1}, {HLC: 1}, {HLC: 1, Node: math.MaxUint64}, {HLC: math.MaxUint64},
		{Term: 1}, {Term: 1, HLC: 1}, {Term: math.MaxUint32, HLC: math.MaxUint64, Node: math.MaxUint64},
	}
	for i, a := range versions {
		for j, b := range versions {
			want := 0
			if i < j {
				want = -1
			} else if i > j {
				want = 1
			}
			if got := a.Compare(b); got != want {
				t.Errorf("%+v against %+v: %d, want %d", a, b, got, want)
			}
		}
	}
}
