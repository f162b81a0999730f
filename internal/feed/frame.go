// SPDX-License-Identifier: MIT

package feed

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"sync"
	"time"
	"unicode/utf8"

	"golang.org/x/crypto/chacha20poly1305"

	"github.com/wgroam/wgroam"
)

// A frame is what one message on the bus carries. All integers are big endian.
//
//	 0  version      u8, 1
//	 1  type         u8, see kind
//	 2  flags        u16, bit 0: last chunk of a reply
//	 4  key id       u32
//	 8  record size  u16
//	10  count        u16
//	12  node         u64, who sent it
//	20  boot         u64, when that node's process started, Unix ns
//	28  seq          u64, see Header
//	36  nonce        24 bytes, random
//	60  body         count records of record size, sealed with XChaCha20-Poly1305
//	    tag          16 bytes
//
// The first 36 bytes, the subject the frame is published on, and in a
// reply the nonce of the request are authenticated with it, so that nothing can
// be moved between groups, kinds, writers or requests. Newer versions may
// append fields to a record; readers skip what they do not know.
const (
	version    = 1
	headerSize = 36
	nonceSize  = chacha20poly1305.NonceSizeX
	minFrame   = headerSize + nonceSize + chacha20poly1305.Overhead
)

// MaxRecords is the most records that are published in one frame. Readers take
// more.
//
// It is not 200: when chacha20poly1305 (golang.org/x/crypto v0.58.0,
// chacha20poly1305_amd64.s) opens 64 bytes more than a multiple of 512, as 200
// records are, it returns without VZEROUPPER, and SHA-256 in hardware, with
// which the table hashes each of the records next, takes 40 times as long.
const MaxRecords = 192

type kind uint8

const (
	kindUpdate  kind = 1
	kindBeat    kind = 2
	kindRequest kind = 3
	kindReply   kind = 4

	kindSetupRequest kind = 5 // as kindRequest, with the digests of setups
	kindSetupReply   kind = 6
	// Of a handover.
	kindQuestion kind = 7
	kindReplied  kind = 8
)

const flagLast = 1 << 0

// Header says which node sent a message, and where in its stream it belongs.
type Header struct {
	Node wgroam.NodeID
	// Boot is when the sender's process started, Unix nanoseconds: it tells a
	// restarted node from its former self.
	Boot uint64
	// Seq of an update counts the updates of that boot, from 1. That of a beat
	// is the Seq of the last update before it, 0 when there was none. That of a
	// request counts the requests of that boot, from 1. That of a reply counts
	// its chunks, from 1.
	Seq uint64
}

type header struct {
	Header
	kind    kind
	flags   uint16
	recSize uint16
	count   uint16
}

// Update is a handful of records from one node.
type Update struct {
	Header
	Records []wgroam.Record
}

// Role is what a node says it is.
type Role uint8

// The values are part of the wire format.
const (
	RoleUnknown Role = 0
	RoleActive  Role = 1
	RoleStandby Role = 2
	// RoleAlways is a node without roles: anycast, ECMP.
	RoleAlways Role = 3
)

// String returns the word that the configuration uses.
func (r Role) String() string {
	switch r {
	case RoleUnknown:
		return "unknown"
	case RoleActive:
		return "active"
	case RoleStandby:
		return "standby"
	case RoleAlways:
		return "always"
	}
	return fmt.Sprintf("role(%d)", uint8(r))
}

// Beat is a node's sign of life.
type Beat struct {
	Header
	// Number counts the beats of that boot, from 1. A Link hands over none that
	// is not newer than the last.
	Number uint64
	// Interval is the time to the next beat; zero is DefaultInterval.
	Interval time.Duration
	Name     string
	// Time is the sender's wall clock when it sent the beat.
	Time time.Time
	Role Role
	// Digest is the sum of the sender's table digests (wgroam.Digests.Sum), and
	// Records the number of records in it.
	Digest  uint64
	Records uint32
	// MinVersion and MaxVersion bound the frame versions that the sender reads.
	MinVersion, MaxVersion uint8

	// Unproven says that the node has not answered a question of ours since it
	// started, as Header.Boot has it. The beat can be a recording of a node that
	// is dead; Ask it to know. It is not sent.
	Unproven bool
}

const (
	// DefaultInterval is the time between beats.
	DefaultInterval = 250 * time.Millisecond
	// MaxInterval is the most that a node may take.
	MaxInterval = 10 * time.Second
)

// Silence is how long the sender may be silent after the beat before it counts
// as gone.
func (b Beat) Silence() time.Duration {
	const beats, least = 4, time.Second // a busy host is not a dead one
	return max(least, beats*min(b.Interval, MaxInterval))
}

// MaxName is the longest node name, in bytes of UTF-8.
const MaxName = 64

const (
	beatSize    = 36 + MaxName
	bindSize    = 16
	requestSize = bindSize + 8 + 8*wgroam.Buckets
)

// seal appends a frame to dst. The body must not overlap dst.
func (k Keys) seal(dst []byte, h header, body []byte, subject string, bind []byte) []byte {
	start := len(dst)
	dst = append(dst, version, byte(h.kind))
	dst = binary.BigEndian.AppendUint16(dst, h.flags)
	dst = binary.BigEndian.AppendUint32(dst, k.s().kid)
	dst = binary.BigEndian.AppendUint16(dst, h.recSize)
	dst = binary.BigEndian.AppendUint16(dst, h.count)
	dst = binary.BigEndian.AppendUint64(dst, uint64(h.Node))
	dst = binary.BigEndian.AppendUint64(dst, h.Boot)
	dst = binary.BigEndian.AppendUint64(dst, h.Seq)
	ad := getAD(dst[start:], subject, bind)
	defer adPool.Put(ad)
	dst = append(dst, make([]byte, nonceSize)...)
	nonce := dst[len(dst)-nonceSize:]
	_, _ = rand.Read(nonce) // never fails
	return k.s().aead.Seal(dst, nonce, body, *ad)
}

// open checks a frame that came in on subject and returns its header and body.
// The body is decrypted in place: frame is overwritten.
func (k Keys) open(frame []byte, subject string, bind []byte, want ...kind) (header, []byte, error) {
	if len(frame) < minFrame {
		return header{}, nil, errShort
	}
	if frame[0] != version {
		return header{}, nil, errVersion
	}
	be := binary.BigEndian
	h := header{
		kind:    kind(frame[1]),
		flags:   be.Uint16(frame[2:]),
		recSize: be.Uint16(frame[8:]),
		count:   be.Uint16(frame[10:]),
		Header: Header{
			Node: wgroam.NodeID(be.Uint64(frame[12:])),
			Boot: be.Uint64(frame[20:]),
			Seq:  be.Uint64(frame[28:]),
		},
	}
	known := false
	for _, w := range want {
		known = known || h.kind == w
	}
	if !known {
		return header{}, nil, errType
	}
	if be.Uint32(frame[4:]) != k.s().kid {
		return header{}, nil, errKeyID
	}
	ad := getAD(frame[:headerSize], subject, bind)
	defer adPool.Put(ad)
	sealed := frame[headerSize+nonceSize:]
	body, err := k.s().aead.Open(sealed[:0], frame[headerSize:headerSize+nonceSize], sealed, *ad)
	if err != nil {
		return header{}, nil, errAuth
	}
	if len(body) != int(h.count)*int(h.recSize) {
		return header{}, nil, errMalformed
	}
	return h, body, nil
}

// The associated data must be one slice, and a slice that goes through an
// interface is on the heap.
var adPool = sync.Pool{New: func() any { return new([]byte) }}

func getAD(header []byte, subject string, bind []byte) *[]byte {
	ad := adPool.Get().(*[]byte)
	*ad = append(append(append((*ad)[:0], header...), subject...), bind...)
	return ad
}

func appendRecords(dst []byte, records []wgroam.Record) []byte {
	for _, r := range records {
		dst, _ = r.AppendBinary(dst) // never fails
	}
	return dst
}

// decodeRecords reads a body of records. Those that are no records are left
// out, and counted in bad: they must not keep the others from arriving.
func decodeRecords(h header, body []byte) (records []wgroam.Record, bad int, err error) {
	if h.count == 0 {
		return nil, 0, nil
	}
	if h.recSize < wgroam.RecordSize {
		return nil, 0, errMalformed
	}
	records = make([]wgroam.Record, 0, h.count)
	for b := body; len(b) > 0; b = b[h.recSize:] {
		var r wgroam.Record
		if r.UnmarshalBinary(b) != nil {
			bad++
			continue
		}
		records = append(records, r)
	}
	return records, bad, nil
}

// appendBeat appends the body of a beat:
//
//	 0  time      u64, Unix ns
//	 8  number    u64
//	16  digest    u64
//	24  records   u32
//	28  interval  u32, ms
//	32  role      u8
//	33  min, max  u8, u8, frame versions
//	35  name      u8 length, then 64 bytes padded with zeros
func appendBeat(dst []byte, b Beat) []byte {
	dst = binary.BigEndian.AppendUint64(dst, uint64(b.Time.UnixNano()))
	dst = binary.BigEndian.AppendUint64(dst, b.Number)
	dst = binary.BigEndian.AppendUint64(dst, b.Digest)
	dst = binary.BigEndian.AppendUint32(dst, b.Records)
	dst = binary.BigEndian.AppendUint32(dst, uint32(b.Interval.Milliseconds()))
	dst = append(dst, byte(b.Role), version, version, byte(len(b.Name)))
	var name [MaxName]byte
	copy(name[:], b.Name)
	return append(dst, name[:]...)
}

func decodeBeat(h header, body []byte) (Beat, error) {
	if h.count != 1 || len(body) < beatSize {
		return Beat{}, errMalformed
	}
	n := int(body[35])
	if n > MaxName || !utf8.Valid(body[36:36+n]) {
		return Beat{}, errMalformed
	}
	be := binary.BigEndian
	return Beat{
		Header:     h.Header,
		Number:     be.Uint64(body[8:]),
		Interval:   time.Duration(be.Uint32(body[28:])) * time.Millisecond,
		Name:       string(body[36 : 36+n]),
		Time:       time.Unix(0, int64(be.Uint64(body))),
		Role:       Role(body[32]),
		Digest:     be.Uint64(body[16:]),
		Records:    be.Uint32(body[24:]),
		MinVersion: body[33],
		MaxVersion: body[34],
	}, nil
}

// Request is another node's wish to know what we have and it has not: in the table,
// or of the setups.
type Request struct {
	Header
	// Have are the digests of the node that asks.
	Have wgroam.Digests
	// Unproven is as in Beat: it can be a recording.
	Unproven bool

	bind  [bindSize]byte
	asked wgroam.NodeID // zero: whoever hears it
	inbox string        // the subject of the answer
	via   *conn
}

// appendRequest appends the body of a request:
//
//	 0  nonce    16 bytes, random: the reply is sealed with it, and names its
//	             subject with it
//	16  node     u64, who is asked; zero: whoever hears it
//	24  digests  1024 of u64
func appendRequest(dst []byte, r *Request) []byte {
	dst = append(dst, r.bind[:]...)
	dst = binary.BigEndian.AppendUint64(dst, uint64(r.asked))
	for _, d := range r.Have {
		dst = binary.BigEndian.AppendUint64(dst, d)
	}
	return dst
}

func decodeRequest(h header, body []byte) (*Request, error) {
	if h.count != 1 || len(body) < requestSize {
		return nil, errMalformed
	}
	r := &Request{
		Header: h.Header,
		bind:   [bindSize]byte(body),
		asked:  wgroam.NodeID(binary.BigEndian.Uint64(body[bindSize:])),
	}
	for i := range r.Have {
		r.Have[i] = binary.BigEndian.Uint64(body[bindSize+8+8*i:])
	}
	return r, nil
}
