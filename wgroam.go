// SPDX-License-Identifier: MIT

// Package wgroam holds what every part of wgroam agrees on: the names of
// things (Key, NodeID, Cause), what a node saw (Observation), what it tells the
// others (Record, ordered by Version), the merge of all that is known (Table)
// and what the local WireGuard device holds (View).
//
// The package is pure. It does no I/O, and time is always an argument.
package wgroam

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"
)

// Key is a peer's WireGuard public key: 32 bytes, Curve25519.
type Key [32]byte

// ParseKey reads a key in the form that wg(8) prints: 44 characters of standard
// base64.
func ParseKey(s string) (Key, error) {
	var k Key
	b, err := base64.StdEncoding.Strict().DecodeString(s)
	// The length, too: the decoder skips line ends, strict or not.
	if err != nil || len(b) != len(k) || len(s) != base64.StdEncoding.EncodedLen(len(k)) {
		return Key{}, fmt.Errorf("%q is not a WireGuard key: want 44 characters of base64", s)
	}
	copy(k[:], b)
	return k, nil
}

// String returns the key as wg(8) prints it.
func (k Key) String() string { return base64.StdEncoding.EncodeToString(k[:]) }

// MarshalText implements encoding.TextMarshaler.
func (k Key) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (k *Key) UnmarshalText(b []byte) error {
	p, err := ParseKey(string(b))
	if err != nil {
		return err
	}
	*k = p
	return nil
}

// NodeID is a gateway on the wire: the first eight bytes, big endian, of the
// SHA-256 of its name. It breaks ties between versions.
type NodeID uint64

// NodeIDOf returns the identity of the gateway called name.
func NodeIDOf(name string) NodeID {
	sum := sha256.Sum256([]byte(name))
	return NodeID(binary.BigEndian.Uint64(sum[:]))
}

// String returns 16 hexadecimal digits.
func (n NodeID) String() string { return fmt.Sprintf("%016x", uint64(n)) }

// Cause says how an endpoint came to be what it is.
type Cause uint8

// The values are part of the wire format and of the BPF event ABI (bpf/peer.h).
const (
	// CauseData is an authenticated, non-replayed transport packet.
	CauseData Cause = 1
	// CauseResponse is an authenticated handshake response.
	CauseResponse Cause = 2
	// CauseInitiation is an authenticated handshake initiation. A node without
	// timestamp state accepts a replayed old one, so it proves less than the
	// other two.
	CauseInitiation Cause = 3
	// CauseConfig is a write through netlink or UAPI: an administrator, a
	// configuration manager, or wgroam's own applier. It is never published.
	CauseConfig Cause = 4
	// CauseSnapshot is an endpoint found in a device that has completed a
	// handshake with the peer: observed at that handshake or later.
	CauseSnapshot Cause = 5
)

// String returns the word that the command line uses.
func (c Cause) String() string {
	switch c {
	case CauseData:
		return "data"
	case CauseResponse:
		return "response"
	case CauseInitiation:
		return "initiation"
	case CauseConfig:
		return "config"
	case CauseSnapshot:
		return "snapshot"
	}
	return fmt.Sprintf("cause(%d)", uint8(c))
}

// Observed reports whether the cause is evidence of where the peer is, rather
// than of what somebody configured.
func (c Cause) Observed() bool { return c != CauseConfig && c != 0 }

// Observation is a change of a peer's endpoint as the local device made it.
type Observation struct {
	Peer Key
	// Old is the endpoint before; the zero AddrPort when there was none.
	Old netip.AddrPort
	// New is the endpoint after.
	New   netip.AddrPort
	Cause Cause
	// At is when the kernel accepted the endpoint. Where it comes from a running
	// kernel it carries Go's monotonic reading, so that a step of the wall
	// clock does not reorder observations.
	At time.Time
}

// ErrEndpoint is what CheckEndpoint wraps.
var ErrEndpoint = errors.New("unusable endpoint")

// CheckEndpoint reports why ep cannot be the endpoint of a peer that another
// node could reach. The error wraps ErrEndpoint.
func CheckEndpoint(ep netip.AddrPort) error {
	a := ep.Addr()
	why := ""
	switch {
	case !a.IsValid():
		why = "no address"
	case ep.Port() == 0:
		why = "port 0"
	case a.Is4In6():
		why = "IPv4 mapped into IPv6"
	case a.IsUnspecified():
		why = "unspecified address"
	case a.IsLoopback():
		why = "loopback address"
	case a.IsMulticast(), a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		why = "multicast or broadcast address"
	case a.Is6() && a.IsLinkLocalUnicast():
		// The scope names an interface of one host. wgctrl drops it in both
		// directions as well (wglinux/parse_linux.go parseSockaddr).
		why = "IPv6 link-local address, which means nothing on another node"
	case a.Zone() != "":
		why = "IPv6 zone, which means nothing on another node"
	default:
		return nil
	}
	return fmt.Errorf("%w %v: %s", ErrEndpoint, ep, why)
}
