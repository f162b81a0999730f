// SPDX-License-Identifier: MIT

// Package bpf loads wgroam's BPF programs and speaks their ABI. It is the only
// package that imports github.com/cilium/ebpf.
package bpf

import (
	"crypto/sha256"
	_ "embed"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"

	"github.com/wgroam/wgroam"
)

// Errors of Attach, for errors.Is.
var (
	// ErrPrivilege: a capability is missing. The message names it.
	ErrPrivilege = errors.New("missing privilege")
	// ErrNoModule: WireGuard is not in the kernel, now. It may be loaded later.
	ErrNoModule = errors.New("no WireGuard in the running kernel")
	// ErrUnsupported: this kernel cannot carry the hook.
	ErrUnsupported = errors.New("not supported by this kernel")
)

// Errors of Read, for errors.Is.
var (
	// ErrClosed: the hook has been closed.
	ErrClosed = ringbuf.ErrClosed
	// ErrFlushed: all events from before the call of Flush have been read.
	ErrFlushed = ringbuf.ErrFlushed
)

// Device names a WireGuard device on this host: the index of its link and the
// inode number of its network namespace (as in /proc/self/ns/net).
type Device struct {
	Ifindex uint32
	Netns   uint32
}

// Event is one change of a peer's endpoint, or the confirmation of one.
type Event struct {
	Device Device
	// InternalID names the peer within the life of the kernel module.
	InternalID uint64
	// Boot is CLOCK_BOOTTIME when the kernel accepted the endpoint.
	Boot time.Duration

	Peer     wgroam.Key
	Old, New netip.AddrPort
	Cause    wgroam.Cause
	// Confirmed: nothing has changed; a handshake has been completed, with the
	// peer at New. Old and Cause are not set.
	Confirmed bool
}

// causeConfirmed is CAUSE_CONFIRMED in peer.h.
const causeConfirmed = 0x80

// Hook is the attached kernel hook: an fentry program on
// wg_socket_set_peer_endpoint. While it lives it pins the wireguard module.
//
// One goroutine may Read; all other methods are safe for concurrent use.
type Hook struct {
	objs   peerObjects
	links  []link.Link
	reader *ringbuf.Reader
	record ringbuf.Record
}

// Attach loads the program and attaches it. It reports events only of devices
// that are named to Follow. peers is the number of peers expected on all of
// them; it sizes the map that keeps the newest event of each.
//
// The error wraps ErrPrivilege, ErrNoModule or ErrUnsupported where the reason
// is one of these.
func Attach(peers int) (*Hook, error) {
	spec, err := loadPeer()
	if err != nil {
		return nil, fmt.Errorf("read embedded BPF object: %w", err)
	}
	// Twice the peers, because LRU maps begin to evict before they are full.
	spec.Maps[peerMapLatest].MaxEntries = uint32(min(max(2*peers, 4096), 1<<21))

	h := &Hook{}
	if err := h.load(spec); err != nil {
		_ = h.Close() // the reason for failing is the one to report
		return nil, explain(err)
	}
	return h, nil
}

func (h *Hook) load(spec *ebpf.CollectionSpec) error {
	if err := spec.LoadAndAssign(&h.objs, nil); err != nil {
		return fmt.Errorf("load: %w", err)
	}
	var err error
	if h.reader, err = ringbuf.NewReader(h.objs.Events); err != nil {
		return fmt.Errorf("open ring buffer: %w", err)
	}
	// The helpers of the handshake first, so that no cause is missed.
	for _, prog := range []*ebpf.Program{
		h.objs.HandshakeEnter, h.objs.HandshakeExit, h.objs.HandshakeComplete, h.objs.SetPeerEndpoint,
	} {
		l, err := link.AttachTracing(link.TracingOptions{Program: prog})
		if err != nil {
			return fmt.Errorf("attach %v: %w", prog, err)
		}
		h.links = append(h.links, l)
	}
	return nil
}

// Close detaches the programs. A blocked Read returns ErrClosed.
func (h *Hook) Close() error {
	var errs []error
	for _, l := range h.links {
		errs = append(errs, l.Close())
	}
	if h.reader != nil {
		errs = append(errs, h.reader.Close())
	}
	errs = append(errs, h.objs.Close())
	return errors.Join(errs...)
}

// Follow makes the kernel report the changes of a device.
func (h *Hook) Follow(d Device) error {
	if err := h.objs.Devices.Put(peerDeviceId{Ifindex: d.Ifindex, Netns: d.Netns}, uint8(1)); err != nil {
		return fmt.Errorf("follow device %d: %w", d.Ifindex, err)
	}
	return nil
}

// Unfollow is the reverse of Follow. It is no error if the device was not
// followed.
func (h *Hook) Unfollow(d Device) error {
	err := h.objs.Devices.Delete(peerDeviceId{Ifindex: d.Ifindex, Netns: d.Netns})
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("unfollow device %d: %w", d.Ifindex, err)
	}
	return nil
}

// Read returns the next event, waiting for one if need be. drained reports that
// no more were waiting behind it: the time to look at Lost. After Close the
// error is ErrClosed.
func (h *Hook) Read() (e Event, drained bool, err error) {
	if err := h.reader.ReadInto(&h.record); err != nil {
		return Event{}, false, err
	}
	raw, err := decode(h.record.RawSample)
	if err != nil {
		return Event{}, false, err
	}
	// Not AvailableBytes, which looks at memory that Close has given back.
	return raw.event(), h.record.Remaining == 0, nil
}

// Flush makes Read return all events that are waiting, and then ErrFlushed once.
func (h *Hook) Flush() error {
	if err := h.reader.Flush(); err != nil {
		return fmt.Errorf("flush ring buffer: %w", err)
	}
	return nil
}

// Lost returns how many events found the ring buffer full since Attach.
func (h *Hook) Lost() (uint64, error) {
	var n uint64
	if err := h.objs.EventsLost.Get(&n); err != nil {
		return 0, fmt.Errorf("read lost counter: %w", err)
	}
	return n, nil
}

// Latest returns the newest event of every peer that changed since Attach, in
// no particular order, but for the least recently changed beyond the map's
// size.
func (h *Hook) Latest() ([]Event, error) {
	var (
		id  uint64
		raw peerPeerEvent
		out []Event
	)
	it := h.objs.Latest.Iterate()
	for it.Next(&id, &raw) {
		out = append(out, raw.event())
	}
	// A storm may keep moving entries under the iterator. What it skips is in
	// the ring buffer again.
	if err := it.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		return nil, fmt.Errorf("read latest events: %w", err)
	}
	return out, nil
}

// decode checks the size; the kernel is the only writer.
func decode(sample []byte) (*peerPeerEvent, error) {
	var raw peerPeerEvent
	if len(sample) < int(unsafe.Sizeof(raw)) {
		return nil, fmt.Errorf("event of %d bytes, want %d: program and binary do not match", len(sample), unsafe.Sizeof(raw))
	}
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&raw)), unsafe.Sizeof(raw)), sample)
	return &raw, nil
}

func (r *peerPeerEvent) event() Event {
	e := Event{
		Device:     Device{Ifindex: r.Ifindex, Netns: r.Netns},
		InternalID: r.InternalId,
		Boot:       time.Duration(r.BootNs),
		Peer:       r.PublicKey,
		Old:        r.OldEndpoint.addrPort(),
		New:        r.NewEndpoint.addrPort(),
		Cause:      wgroam.Cause(r.Cause),
	}
	if r.Cause == causeConfirmed {
		e.Cause, e.Confirmed = 0, true
	}
	return e
}

func (e *peerPeerEndpoint) addrPort() netip.AddrPort {
	var addr netip.Addr
	switch e.Family {
	case unix.AF_INET:
		addr = netip.AddrFrom4([4]byte(e.Addr[:4]))
	case unix.AF_INET6:
		// Without the scope, which a dump through wgctrl does not have either.
		addr = netip.AddrFrom16(e.Addr)
	default:
		return netip.AddrPort{}
	}
	var port [2]byte
	binary.NativeEndian.PutUint16(port[:], e.Port) // back to the bytes of the network
	return netip.AddrPortFrom(addr, binary.BigEndian.Uint16(port[:]))
}

// ObjectHashes returns the hexadecimal SHA-256 of every embedded BPF object, by
// name.
func ObjectHashes() map[string]string {
	hash := func(object []byte) string {
		sum := sha256.Sum256(object)
		return hex.EncodeToString(sum[:])
	}
	return map[string]string{"peer": hash(_PeerBytes), "uplink": hash(_UplinkBytes)}
}

// explain finds the reason behind an error of loading or attaching. The kernel
// and the library report several different ones as "not found" or "not
// supported".
func explain(err error) error {
	// The ids of BTF objects can be listed with CAP_SYS_ADMIN only, and without
	// them a function of a module is "not found" (cilium/ebpf prog.go).
	if missing := missingCaps(unix.CAP_BPF, unix.CAP_PERFMON, unix.CAP_SYS_ADMIN); missing != "" {
		return &attachError{ErrPrivilege, "the kernel hook needs " + missing + ": run as root or grant it", err}
	}
	if !exists("/sys/kernel/btf/vmlinux") {
		return &attachError{ErrUnsupported, "it has no BTF (CONFIG_DEBUG_INFO_BTF)", err}
	}
	// Both a module and built-in code show here (module/main.c, kernel/params.c),
	// the latter because WireGuard has a module version.
	if !exists("/sys/module/wireguard") {
		return &attachError{ErrNoModule, "load it (modprobe wireguard) if this host uses kernel WireGuard", err}
	}
	if errors.Is(err, ebpf.ErrNotSupported) || errors.Is(err, errNotSupp) {
		return &attachError{ErrUnsupported, "fentry on a function of WireGuard needs BTF of modules (Linux 5.11) and, on arm64, Linux 6.4", err}
	}
	return err
}

// attachError is the reason for an error, in the place of what the library and
// the kernel made of it. That is to be had by errors.As.
type attachError struct {
	kind  error
	text  string
	cause error
}

func (e *attachError) Error() string   { return e.kind.Error() + ": " + e.text }
func (e *attachError) Unwrap() []error { return []error{e.kind, e.cause} }

// errNotSupp is ENOTSUPP, which the kernel keeps to itself but returns from
// trampolines that an architecture lacks. It has no name in user space.
const errNotSupp = syscall.Errno(524)

func exists(path string) bool {
	_, err := os.Stat(path)
	return !errors.Is(err, fs.ErrNotExist)
}

var capNames = map[int]string{
	unix.CAP_BPF:       "CAP_BPF",
	unix.CAP_NET_ADMIN: "CAP_NET_ADMIN",
	unix.CAP_PERFMON:   "CAP_PERFMON",
	unix.CAP_SYS_ADMIN: "CAP_SYS_ADMIN",
}

// missingCaps returns the names of those capabilities that this thread does not
// have, separated by commas.
func missingCaps(want ...int) string {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return ""
	}
	have := func(c int) bool { return data[c/32].Effective&(1<<(c%32)) != 0 }
	var missing []string
	for _, c := range want {
		// The kernel takes CAP_SYS_ADMIN for these two (linux/capability.h,
		// bpf_capable and perfmon_capable).
		implied := (c == unix.CAP_BPF || c == unix.CAP_PERFMON) && have(unix.CAP_SYS_ADMIN)
		if !have(c) && !implied {
			missing = append(missing, capNames[c])
		}
	}
	return strings.Join(missing, ", ")
}
