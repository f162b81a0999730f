// SPDX-License-Identifier: MIT

package wgroam

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
)

// Version orders the records of one peer: Term first, then HLC, then Node.
type Version struct {
	// Term is 0 unless the operator has an authoritative source of terms.
	Term uint32
	HLC  HLC
	Node NodeID
}

// Compare returns -1, 0 or +1.
func (v Version) Compare(o Version) int {
	return cmp.Or(
		cmp.Compare(v.Term, o.Term),
		cmp.Compare(v.HLC, o.HLC),
		cmp.Compare(v.Node, o.Node),
	)
}

// Record says: peer Peer was authenticated at Endpoint, at the time and by the
// node in Version.
type Record struct {
	Peer     Key
	Endpoint netip.AddrPort
	Cause    Cause
	Version  Version
}

// RecordSize is the length in bytes of an encoded Record. Newer versions may
// append fields; readers skip what they do not know.
const RecordSize = 72

// ErrRecord is returned for bytes that are not a record.
var ErrRecord = errors.New("malformed record")

// AppendBinary appends the wire form of r, RecordSize bytes, all integers big
// endian:
//
//	 0  peer      32 bytes
//	32  address   16 bytes, IPv4 as ::ffff:a.b.c.d
//	48  port      u16
//	50  cause     u8
//	51  reserved  u8, zero
//	52  term      u32
//	56  hlc       u64
//	64  node      u64
func (r Record) AppendBinary(b []byte) ([]byte, error) {
	addr := r.Endpoint.Addr().As16()
	b = append(b, r.Peer[:]...)
	b = append(b, addr[:]...)
	b = binary.BigEndian.AppendUint16(b, r.Endpoint.Port())
	b = append(b, byte(r.Cause), 0)
	b = binary.BigEndian.AppendUint32(b, r.Version.Term)
	b = binary.BigEndian.AppendUint64(b, uint64(r.Version.HLC))
	b = binary.BigEndian.AppendUint64(b, uint64(r.Version.Node))
	return b, nil
}

// UnmarshalBinary reads the wire form of a record from the first RecordSize
// bytes of b. It checks the shape, not whether the endpoint makes sense: see
// CheckEndpoint. The error wraps ErrRecord.
func (r *Record) UnmarshalBinary(b []byte) error {
	if len(b) < RecordSize {
		return fmt.Errorf("%w: %d bytes, want at least %d", ErrRecord, len(b), RecordSize)
	}
	cause := Cause(b[50])
	if !cause.Observed() {
		// A configured endpoint is nobody's observation.
		return fmt.Errorf("%w: %v", ErrRecord, cause)
	}
	*r = Record{
		Peer: Key(b[:32]),
		Endpoint: netip.AddrPortFrom(
			netip.AddrFrom16([16]byte(b[32:48])).Unmap(),
			binary.BigEndian.Uint16(b[48:]),
		),
		Cause: cause,
		Version: Version{
			Term: binary.BigEndian.Uint32(b[52:]),
			HLC:  HLC(binary.BigEndian.Uint64(b[56:])),
			Node: NodeID(binary.BigEndian.Uint64(b[64:])),
		},
	}
	return nil
}

// compare orders records of one peer. Versions are unique per peer in a sane
// group; the rest of the record decides if they are not, so that a merge does
// not depend on the order of arrival.
func (r Record) compare(o Record) int {
	return cmp.Or(
		r.Version.Compare(o.Version),
		r.Endpoint.Compare(o.Endpoint),
		cmp.Compare(r.Cause, o.Cause),
	)
}
