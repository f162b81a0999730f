// SPDX-License-Identifier: MIT

package feed

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/wgroam/wgroam"
)

const (
	testNode = wgroam.NodeID(0x1122334455667788)
	testBoot = 0x0102030405060708
)

func testRecord(i int) wgroam.Record {
	r := wgroam.Record{
		Endpoint: netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, byte(113 + i>>8), byte(i)}), 51820),
		Cause:    wgroam.CauseData,
		Version:  wgroam.Version{HLC: wgroam.HLC(i + 1), Node: testNode},
	}
	binary.BigEndian.PutUint64(r.Peer[8:], uint64(i))
	return r
}

func testRecords(n int) []wgroam.Record {
	out := make([]wgroam.Record, n)
	for i := range out {
		out[i] = testRecord(i)
	}
	return out
}

func testHeader(k kind, seq uint64, recSize, count int) header {
	return header{
		Header:  Header{Node: testNode, Boot: testBoot, Seq: seq},
		kind:    k,
		recSize: uint16(recSize),
		count:   uint16(count),
	}
}

// sample is a frame of each kind, with where it belongs.
type sample struct {
	name    string
	kind    kind
	subject string
	bind    []byte
	frame   []byte
}

func samples(k Keys) []sample {
	prefix := "wgroam.v1." + k.Group() + "."
	inbox := prefix + "r." + testNode.String() + ".x"
	bind := bytes.Repeat([]byte{7}, bindSize)
	beat := Beat{Number: 1, Name: "gw-a", Time: time.Unix(1700000000, 0), Role: RoleActive, Records: 3}
	one := appendRecords(nil, testRecords(1))
	list := []sample{
		{name: "update", kind: kindUpdate, subject: prefix + "u." + testNode.String()},
		{name: "beat", kind: kindBeat, subject: prefix + "b." + testNode.String()},
		{name: "request", kind: kindRequest, subject: prefix + "q"},
		{name: "reply", kind: kindReply, subject: inbox, bind: bind},
	}
	for i, body := range [][]byte{one, appendBeat(nil, beat), appendRequest(nil, &Request{}), one} {
		s := &list[i]
		s.frame = k.seal(nil, testHeader(s.kind, 7, len(body), 1), body, s.subject, s.bind)
	}
	return list
}

func (s sample) open(k Keys, frame []byte) error {
	_, _, err := k.open(bytes.Clone(frame), s.subject, s.bind, s.kind)
	return err
}

// golden returns the frames in testdata, which another implementation has
// sealed with testKeys.
func golden(t testing.TB, k Keys) []sample {
	t.Helper()
	prefix := "wgroam.v1." + k.Group() + "."
	bind := make([]byte, bindSize)
	for i := range bind {
		bind[i] = byte(i)
	}
	list := []sample{
		{name: "update", kind: kindUpdate, subject: prefix + "u.1122334455667788"},
		{name: "beat", kind: kindBeat, subject: prefix + "b.1122334455667788"},
		{name: "request", kind: kindRequest, subject: prefix + "q"},
		{name: "reply", kind: kindReply, subject: prefix + "r.x.y", bind: bind},
	}
	for i := range list {
		var err error
		if list[i].frame, err = os.ReadFile("testdata/golden/" + list[i].name); err != nil {
			t.Fatal(err)
		}
	}
	return list
}

// TestGolden: what changes here breaks the wire.
func TestGolden(t *testing.T) {
	k := testKeys(t)
	record := wgroam.Record{
		Endpoint: netip.MustParseAddrPort("203.0.113.7:51820"),
		Cause:    wgroam.CauseData,
		Version:  wgroam.Version{HLC: 0x0001020304050607, Node: testNode},
	}
	for i := range record.Peer {
		record.Peer[i] = byte(i)
	}
	beat := Beat{
		Header: Header{testNode, testBoot, 7}, Number: 41, Interval: 500 * time.Millisecond,
		Name: "gw-a", Time: time.Unix(1700000000, 0),
		Role: RoleStandby, Digest: 0xdeadbeefcafef00d, Records: 10000, MinVersion: 1, MaxVersion: 1,
	}
	request := Request{Header: Header{testNode, testBoot, 2}, asked: testNode}
	for i := range request.bind {
		request.bind[i] = byte(i)
	}
	for i := range request.Have {
		request.Have[i] = uint64(i)
	}
	last := testHeader(kindReply, 3, 72, 1)
	last.flags = flagLast
	want := map[string]header{
		"update":  testHeader(kindUpdate, 7, 80, 1), // of a later version, with 8 bytes more
		"beat":    testHeader(kindBeat, 7, 100, 1),
		"request": testHeader(kindRequest, 2, 8216, 1),
		"reply":   last,
	}
	for _, s := range golden(t, k) {
		t.Run(s.name, func(t *testing.T) {
			h, body, err := k.open(s.frame, s.subject, s.bind, s.kind)
			if err != nil {
				t.Fatal(err)
			}
			if h != want[s.name] {
				t.Errorf("header %+v, want %+v", h, want[s.name])
			}
			switch s.kind {
			case kindUpdate, kindReply:
				got, bad, err := decodeRecords(h, body)
				if err != nil || bad != 0 || len(got) != 1 || got[0] != record {
					t.Errorf("got %+v, %d, %v", got, bad, err)
				}
			case kindBeat:
				if got, err := decodeBeat(h, body); err != nil || got != beat {
					t.Errorf("got %+v, %v, want %+v", got, err, beat)
				}
				if !bytes.Equal(appendBeat(nil, beat), body) {
					t.Error("encodes to something else")
				}
			case kindRequest:
				if got, err := decodeRequest(h, body); err != nil || *got != request {
					t.Errorf("got %v, %v", got, err)
				}
				if !bytes.Equal(appendRequest(nil, &request), body) {
					t.Error("encodes to something else")
				}
			}
		})
	}
}

func TestRoundTrip(t *testing.T) {
	k := testKeys(t)
	subject := "wgroam.v1." + k.Group() + ".u." + testNode.String()
	for _, n := range []int{1, 2, MaxRecords, 3 * MaxRecords} {
		records := testRecords(n)
		frame := k.seal(nil, testHeader(kindUpdate, 9, wgroam.RecordSize, n), appendRecords(nil, records), subject, nil)
		if want := minFrame + n*wgroam.RecordSize; len(frame) != want {
			t.Errorf("%d records in %d bytes, want %d", n, len(frame), want)
		}
		h, body, err := k.open(frame, subject, nil, kindUpdate)
		if err != nil {
			t.Fatal(err)
		}
		got, bad, err := decodeRecords(h, body)
		if err != nil || bad != 0 {
			t.Fatal(bad, err)
		}
		if diff := cmp.Diff(records, got, cmp.Comparer(func(a, b wgroam.Record) bool { return a == b })); diff != "" {
			t.Errorf("(-want +got)\n%s", diff)
		}
	}
}

func TestBodies(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := Beat{
			Header:     Header{testNode, testBoot, rapid.Uint64().Draw(t, "seq")},
			Number:     rapid.Uint64().Draw(t, "number"),
			Interval:   time.Duration(rapid.Uint32().Draw(t, "interval")) * time.Millisecond,
			Name:       rapid.StringN(0, -1, MaxName).Draw(t, "name"),
			Time:       time.Unix(0, rapid.Int64().Draw(t, "time")),
			Role:       Role(rapid.Byte().Draw(t, "role")),
			Digest:     rapid.Uint64().Draw(t, "digest"),
			Records:    rapid.Uint32().Draw(t, "records"),
			MinVersion: version, MaxVersion: version,
		}
		body := appendBeat(nil, want)
		if len(body) != beatSize {
			t.Fatalf("%d bytes, want %d", len(body), beatSize)
		}
		more := rapid.IntRange(0, 9).Draw(t, "more")
		body = append(body, make([]byte, more)...)
		got, err := decodeBeat(testHeader(kindBeat, want.Seq, beatSize+more, 1), body)
		if err != nil || got != want {
			t.Fatalf("got %+v, %v, want %+v", got, err, want)
		}
	})
	rapid.Check(t, func(t *rapid.T) {
		want := &Request{Header: Header{testNode, testBoot, 1}, asked: wgroam.NodeID(rapid.Uint64().Draw(t, "asked"))}
		copy(want.bind[:], rapid.SliceOfN(rapid.Byte(), bindSize, bindSize).Draw(t, "bind"))
		want.Have[rapid.IntRange(0, wgroam.Buckets-1).Draw(t, "bucket")] = rapid.Uint64().Draw(t, "digest")
		got, err := decodeRequest(testHeader(kindRequest, 1, requestSize, 1), appendRequest(nil, want))
		if err != nil || *got != *want {
			t.Fatalf("got %+v, %v", got, err)
		}
	})
}

func TestTruncated(t *testing.T) {
	k := testKeys(t)
	for _, s := range samples(k) {
		for n := range len(s.frame) {
			err, want := s.open(k, s.frame[:n]), errAuth
			if n < minFrame {
				want = errShort
			}
			if !errors.Is(err, want) {
				t.Fatalf("%s cut to %d of %d bytes: got %v, want %v", s.name, n, len(s.frame), err, want)
			}
		}
		if err := s.open(k, append(bytes.Clone(s.frame), 0)); !errors.Is(err, errAuth) {
			t.Errorf("%s with a byte too many: got %v, want %v", s.name, err, errAuth)
		}
	}
}

func TestBitFlips(t *testing.T) {
	k := testKeys(t)
	for _, s := range samples(k) {
		if err := s.open(k, s.frame); err != nil {
			t.Fatal(s.name, err)
		}
		for bit := range 8 * len(s.frame) {
			frame := bytes.Clone(s.frame)
			frame[bit/8] ^= 1 << (bit % 8)
			want := errAuth
			switch at := bit / 8; {
			case at == 0:
				want = errVersion
			case at == 1:
				want = errType
			case at >= 4 && at < 8:
				want = errKeyID
			}
			if err := s.open(k, frame); !errors.Is(err, want) {
				t.Fatalf("%s with bit %d of byte %d flipped: got %v, want %v", s.name, bit%8, bit/8, err, want)
			}
		}
	}
}

// TestMoved takes frames to where they do not belong.
func TestMoved(t *testing.T) {
	k := testKeys(t)
	other := derive(t, [32]byte{1}, nil)
	list := samples(k)
	for _, s := range list {
		for _, at := range list {
			if at.name == s.name {
				continue
			}
			// As what it is, in the other's place.
			if _, _, err := k.open(bytes.Clone(s.frame), at.subject, at.bind, s.kind); !errors.Is(err, errAuth) {
				t.Errorf("%s on the subject of %s: got %v, want %v", s.name, at.name, err, errAuth)
			}
			// As the other.
			if err := at.open(k, s.frame); !errors.Is(err, errType) {
				t.Errorf("%s as %s: got %v, want %v", s.name, at.name, err, errType)
			}
			frame := bytes.Clone(s.frame)
			frame[1] = byte(at.kind)
			if err := at.open(k, frame); !errors.Is(err, errAuth) {
				t.Errorf("%s made into %s: got %v, want %v", s.name, at.name, err, errAuth)
			}
		}
		if err := s.open(other, s.frame); !errors.Is(err, errKeyID) {
			t.Errorf("%s in another group: got %v, want %v", s.name, err, errKeyID)
		}
		frame := bytes.Clone(s.frame)
		copy(frame[4:8], []byte{byte(other.s().kid >> 24), byte(other.s().kid >> 16), byte(other.s().kid >> 8), byte(other.s().kid)})
		if err := s.open(other, frame); !errors.Is(err, errAuth) {
			t.Errorf("%s in another group with its key id: got %v, want %v", s.name, err, errAuth)
		}
		moved := s
		moved.subject += "x"
		if err := moved.open(k, s.frame); !errors.Is(err, errAuth) {
			t.Errorf("%s of another writer: got %v, want %v", s.name, err, errAuth)
		}
		moved = s
		moved.bind = append(slices.Clone(s.bind), 1)
		if err := moved.open(k, s.frame); !errors.Is(err, errAuth) {
			t.Errorf("%s for another request: got %v, want %v", s.name, err, errAuth)
		}
	}
}

// TestUnreasonable opens frames of a member that does not know what it does.
func TestUnreasonable(t *testing.T) {
	k := testKeys(t)
	open := func(h header, body []byte) (header, []byte, error) {
		return k.open(k.seal(nil, h, body, "s", nil), "s", nil, h.kind)
	}
	for name, tc := range map[string]struct {
		h    header
		body int
	}{
		"more counted than there": {testHeader(kindUpdate, 1, 72, 2), 72},
		"less counted than there": {testHeader(kindUpdate, 1, 72, 1), 144},
		"empty, but with a count": {testHeader(kindUpdate, 1, 72, 1), 0},
	} {
		if _, _, err := open(tc.h, make([]byte, tc.body)); !errors.Is(err, errMalformed) {
			t.Errorf("%s: got %v, want %v", name, err, errMalformed)
		}
	}
	if h, body, err := open(testHeader(kindUpdate, 1, 0, 0xffff), nil); err == nil {
		if _, _, err := decodeRecords(h, body); !errors.Is(err, errMalformed) {
			t.Errorf("many empty records: got %v", err)
		}
	}
	for _, size := range []int{0, 1, wgroam.RecordSize - 1} {
		h, body, err := open(testHeader(kindUpdate, 1, size, 2), make([]byte, 2*size))
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := decodeRecords(h, body); !errors.Is(err, errMalformed) {
			t.Errorf("records of %d bytes: got %v, want %v", size, err, errMalformed)
		}
	}
	body := appendRecords(nil, testRecords(3))
	body[wgroam.RecordSize+50] = byte(wgroam.CauseConfig)
	if got, bad, err := decodeRecords(testHeader(kindUpdate, 1, wgroam.RecordSize, 3), body); err != nil || bad != 1 || len(got) != 2 {
		t.Errorf("one bad record of three: got %d good, %d bad, %v", len(got), bad, err)
	}
	beat := appendBeat(nil, Beat{Name: "gw-a"})
	beat[35] = MaxName + 1
	if _, err := decodeBeat(testHeader(kindBeat, 1, beatSize, 1), beat); !errors.Is(err, errMalformed) {
		t.Errorf("beat with too long a name: got %v", err)
	}
	beat[35], beat[36] = 1, 0xff
	if _, err := decodeBeat(testHeader(kindBeat, 1, beatSize, 1), beat); !errors.Is(err, errMalformed) {
		t.Errorf("beat with a name that is no text: got %v", err)
	}
}

func TestRoleNames(t *testing.T) {
	for r, want := range map[Role]string{
		RoleUnknown: "unknown", RoleActive: "active", RoleStandby: "standby", RoleAlways: "always", 9: "role(9)",
	} {
		if r.String() != want {
			t.Errorf("got %q, want %q", r, want)
		}
	}
}

func FuzzOpen(f *testing.F) {
	k := testKeys(f)
	list := golden(f, k)
	for i, s := range list {
		f.Add(s.frame, i)
		f.Add(s.frame[:minFrame], i)
	}
	f.Fuzz(func(t *testing.T, frame []byte, i int) {
		s := list[uint(i)%uint(len(list))]
		genuine := bytes.Equal(frame, s.frame)
		if err := s.open(k, frame); (err == nil) != genuine {
			t.Errorf("got %v; genuine: %v", err, genuine)
		}
	})
}

func FuzzRecords(f *testing.F) {
	f.Add(appendRecords(nil, testRecords(2)), uint16(wgroam.RecordSize))
	f.Add(make([]byte, 160), uint16(80))
	f.Fuzz(func(t *testing.T, body []byte, size uint16) {
		if size == 0 || len(body)%int(size) != 0 || len(body)/int(size) > 0xffff {
			return // open does not let it pass
		}
		n := len(body) / int(size)
		got, bad, err := decodeRecords(testHeader(kindUpdate, 1, int(size), n), body)
		if err == nil && len(got)+bad != n {
			t.Fatalf("%d good and %d bad of %d", len(got), bad, n)
		}
		for _, r := range got {
			var again wgroam.Record
			if b, err := r.AppendBinary(nil); err != nil || again.UnmarshalBinary(b) != nil || again != r {
				t.Errorf("%+v does not survive a second trip", r)
			}
		}
	})
}

func FuzzBeat(f *testing.F) {
	f.Add(appendBeat(nil, Beat{Name: "gw-a", Time: time.Unix(1, 2)}), uint16(1))
	f.Fuzz(func(t *testing.T, body []byte, count uint16) {
		b, err := decodeBeat(testHeader(kindBeat, 1, len(body), int(count)), body)
		if err == nil && len(b.Name) > MaxName {
			t.Errorf("name of %d bytes", len(b.Name))
		}
	})
}

func FuzzRequest(f *testing.F) {
	f.Add(appendRequest(nil, &Request{asked: testNode}), uint16(1))
	f.Fuzz(func(t *testing.T, body []byte, count uint16) {
		r, err := decodeRequest(testHeader(kindRequest, 1, len(body), int(count)), body)
		if err == nil && !bytes.Equal(appendRequest(nil, r), body[:requestSize]) {
			t.Error("does not encode to what it was")
		}
	})
}

func FuzzQuestion(f *testing.F) {
	f.Add(appendQuestion(nil, &Question{Step: StepTake, Wanted: true, Ticket: Ticket{1}, Digest: 2}, testNode), uint16(1))
	f.Fuzz(func(t *testing.T, body []byte, count uint16) {
		q, asked, err := decodeQuestion(testHeader(kindQuestion, 1, len(body), int(count)), body)
		if err == nil && body[25] < 2 && !bytes.Equal(appendQuestion(nil, q, asked), body[:questionSize]) {
			t.Error("does not encode to what it was")
		}
	})
}

func FuzzReplied(f *testing.F) {
	f.Add(appendReply(nil, Reply{Verdict: Agreed, By: "verb", Ticket: Ticket{1}, Reason: strings.Repeat("ü", maxReason)}), uint16(1))
	f.Fuzz(func(t *testing.T, body []byte, count uint16) {
		h := testHeader(kindReplied, 1, len(body), int(count))
		r, err := decodeReply(h, body)
		if err != nil {
			return
		}
		h.recSize = replySize
		if again, err := decodeReply(h, appendReply(nil, r)); err != nil || again != r {
			t.Errorf("%+v became %+v, %v", r, again, err)
		}
	})
}

func BenchmarkSeal(b *testing.B) {
	k := testKeys(b)
	for _, n := range []int{1, MaxRecords} {
		b.Run(fmt.Sprintf("records=%d", n), func(b *testing.B) {
			records := testRecords(n)
			subject := "wgroam.v1." + k.Group() + ".u." + testNode.String()
			var body, out []byte
			b.ReportAllocs()
			for b.Loop() {
				body = appendRecords(body[:0], records)
				out = k.seal(out[:0], testHeader(kindUpdate, 1, wgroam.RecordSize, n), body, subject, nil)
			}
		})
	}
}

func BenchmarkOpen(b *testing.B) {
	k := testKeys(b)
	for _, n := range []int{1, MaxRecords} {
		b.Run(fmt.Sprintf("records=%d", n), func(b *testing.B) {
			subject := "wgroam.v1." + k.Group() + ".u." + testNode.String()
			frame := k.seal(nil, testHeader(kindUpdate, 1, wgroam.RecordSize, n), appendRecords(nil, testRecords(n)), subject, nil)
			work := make([]byte, len(frame))
			b.ReportAllocs()
			for b.Loop() {
				copy(work, frame)
				h, body, err := k.open(work, subject, nil, kindUpdate)
				if err != nil {
					b.Fatal(err)
				}
				if _, _, err := decodeRecords(h, body); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
