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
	"sync"
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
	// ErrFlushed: all events from before a call of Flush have been read, see
	// FlushedError.
	ErrFlushed = ringbuf.ErrFlushed
	// ErrDeadline: no event came before the deadline.
	ErrDeadline = os.ErrDeadlineExceeded
)

// Window is the time in which the kernel reports only a few changes of a peer,
// and so many of all peers. That of an event ends no later than Window after it;
// then Newest has what the event was followed by.
const Window = 100 * time.Millisecond // LIMIT_WINDOW_NS in peer.h

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

// Hook is the attached kernel hook: a program on wg_socket_set_peer_endpoint,
// and its helpers. With fentry it pins the wireguard module while it lives; with
// kprobes it dies silently when the module is unloaded: see Stale.
//
// One goroutine may Read and SetDeadline; all other methods are safe for
// concurrent use.
type Hook struct {
	// Fallback is why the programs are attached by kprobes; nil if they are by
	// fentry, which costs less and misses less.
	Fallback error

	objs   peerObjects // also of the kprobe object, which has the same source
	links  []link.Link
	reader *ring
	record ringbuf.Record
	module uint64 // see loadedModule

	looking sync.Mutex
}

// Attach loads the programs and attaches them: by fentry, or where the kernel
// cannot do that by kprobes. It reports events only of devices that are named to
// Follow. peers is the number of peers expected on all of them; it sizes the map
// that keeps the newest event of each.
//
// The error wraps ErrPrivilege, ErrNoModule or ErrUnsupported where the reason
// is one of these.
func Attach(peers int) (*Hook, error) {
	h, err := attach(peers, loadPeer, (*Hook).attachFentry,
		"fentry on a function of WireGuard needs BTF of modules (Linux 5.12) and, on arm64, Linux 6.4")
	if err == nil || errors.Is(err, ErrPrivilege) || errors.Is(err, ErrNoModule) {
		return h, err
	}
	h, second := AttachKprobe(peers)
	switch {
	case second == nil:
	case second.Error() == err.Error():
		return nil, err // what keeps out both
	default:
		return nil, fmt.Errorf("%w; by kprobe: %w", err, second)
	}
	h.Fallback = err
	return h, nil
}

// AttachKprobe is Attach without fentry.
func AttachKprobe(peers int) (*Hook, error) {
	h, err := attach(peers, loadKprobe, (*Hook).attachKprobes,
		"a kprobe on a function of WireGuard needs CONFIG_KPROBE_EVENTS, and BTF of modules (Linux 5.12)")
	if err != nil {
		return nil, err
	}
	h.Fallback = errors.New("fentry was not tried")
	return h, nil
}

func attach(peers int, read func() (*ebpf.CollectionSpec, error), links func(*Hook) error, needs string) (*Hook, error) {
	spec, err := read()
	if err != nil {
		return nil, fmt.Errorf("read embedded BPF object: %w", err)
	}
	// Twice the peers, because LRU maps begin to evict before they are full.
	spec.Maps[peerMapLatest].MaxEntries = uint32(min(max(2*peers, 4096), 1<<21))

	h := &Hook{module: loadedModule()}
	if err := h.load(spec, links); err != nil {
		_ = h.Close() // the reason for failing is the one to report
		return nil, explain(err, needs)
	}
	return h, nil
}

func (h *Hook) load(spec *ebpf.CollectionSpec, links func(*Hook) error) error {
	if err := spec.LoadAndAssign(&h.objs, nil); err != nil {
		return fmt.Errorf("load: %w", err)
	}
	var err error
	if h.reader, err = openRing(h.objs.Events); err != nil {
		return err
	}
	if err := links(h); err != nil {
		return err
	}
	_, _, err = h.Look(0) // of no peer: if it works, it always does
	return err
}

// probe is a program, and where in WireGuard it is attached.
type probe struct {
	prog     *ebpf.Program
	symbol   string
	atReturn bool
}

// probes returns all of them. The helpers of the handshake come first, so that no
// cause is missed.
func (h *Hook) probes() []probe {
	return []probe{
		{h.objs.HandshakeEnter, "wg_socket_set_peer_endpoint_from_skb", false},
		{h.objs.HandshakeExit, "wg_socket_set_peer_endpoint_from_skb", true},
		{h.objs.HandshakeComplete, "wg_timers_handshake_complete", false},
		{h.objs.PeerCreated, "wg_peer_create", false},
		{h.objs.KeyChanged, "wg_cookie_checker_precompute_device_keys", false},
		{h.objs.SetPeerEndpoint, "wg_socket_set_peer_endpoint", false},
	}
}

// attachFentry needs no symbols: they are in the programs.
func (h *Hook) attachFentry() error {
	return h.attachBy(func(p probe) (link.Link, error) {
		return link.AttachTracing(link.TracingOptions{Program: p.prog})
	})
}

func (h *Hook) attachKprobes() error {
	return h.attachBy(func(p probe) (link.Link, error) {
		if p.atReturn {
			return link.Kretprobe(p.symbol, p.prog, nil)
		}
		return link.Kprobe(p.symbol, p.prog, nil)
	})
}

func (h *Hook) attachBy(attach func(probe) (link.Link, error)) error {
	for _, p := range h.probes() {
		l, err := attach(p)
		if err != nil {
			return fmt.Errorf("attach %v: %w", p.prog, err)
		}
		h.links = append(h.links, l)
	}
	return nil
}

// loadedModule is a number of the wireguard module that is another one when it
// has been loaded again; 0 without one. It is the inode of its directory, which
// sysfs numbers one after the other (fs/kernfs/dir.c, __kernfs_new_node).
func loadedModule() uint64 {
	var st unix.Stat_t
	if unix.Stat("/sys/module/wireguard", &st) != nil {
		return 0
	}
	return st.Ino
}

// Stale reports whether the module that the programs are attached to has been
// unloaded: they report nothing of the one that is loaded now, if any.
func (h *Hook) Stale() bool { return h.module != loadedModule() }

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
// error is ErrClosed; after the deadline, when no events are waiting, it is
// ErrDeadline.
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

// Flush makes Read return all events that are waiting, and then a FlushedError with
// at least this number.
func (h *Hook) Flush() (uint64, error) { return h.reader.Flush() }

// SetDeadline sets when Read gives up waiting. It does not end one that waits.
func (h *Hook) SetDeadline(t time.Time) { h.reader.SetDeadline(t) }

// Lost returns how many events found the ring buffer full since Attach.
func (h *Hook) Lost() (uint64, error) {
	var n uint64
	if err := h.objs.EventsLost.Get(&n); err != nil {
		return 0, fmt.Errorf("read lost counter: %w", err)
	}
	return n, nil
}

// Limited counts changes that were not reported because there were too many in
// their Window: of their peer, or of all peers.
type Limited struct{ Peer, All uint64 }

// Limited returns how many changes were held back since Attach.
func (h *Hook) Limited() (l Limited, err error) {
	if err := errors.Join(h.objs.EventsLimited.Get(&l.Peer), h.objs.EventsLimitedAll.Get(&l.All)); err != nil {
		return Limited{}, fmt.Errorf("read limited counters: %w", err)
	}
	return l, nil
}

// Missed returns how often one of the programs was not run, because it, or with
// kprobes any other kprobe program, was running on the same CPU. With kprobes the
// kernel counts it since Linux 6.7.
func (h *Hook) Missed() (uint64, error) {
	var n uint64
	for _, p := range h.probes() {
		stats, err := p.prog.Stats()
		if err != nil {
			return 0, fmt.Errorf("read missed counter: %w", err)
		}
		n += stats.RecursionMisses
	}
	return n, nil
}

// Configured returns how often a device that is followed was given a peer or another
// private key since Attach. There are no events of that.
func (h *Hook) Configured() (uint64, error) {
	var n uint64
	if err := h.objs.Configured.Get(&n); err != nil {
		return 0, fmt.Errorf("read counter of configurations: %w", err)
	}
	return n, nil
}

// Newest returns the newest event of a peer, reported or not. ok is false if it
// has not changed since Attach, or so many others have since that it was
// forgotten.
func (h *Hook) Newest(internalID uint64) (e Event, ok bool, err error) {
	var state peerPeerState
	err = h.objs.Latest.Lookup(internalID, &state)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return Event{}, false, nil
	}
	if err != nil {
		return Event{}, false, fmt.Errorf("read newest event: %w", err)
	}
	return state.Event.event(), true, nil
}

// Latest returns the newest event of every peer that changed since Attach, in
// no particular order, but for the least recently changed beyond the map's
// size.
func (h *Hook) Latest() ([]Event, error) {
	const batch = 1024 // holds any bucket of the map
	var (
		out    []Event
		cursor ebpf.MapBatchCursor
		ids    = make([]uint64, batch)
		states = make([]peerPeerState, batch)
	)
	// Bucket by bucket, each under its lock: a change that moves an entry to the
	// front of its bucket cannot hide another, as from an iterator.
	for {
		n, err := h.objs.Latest.BatchLookup(&cursor, ids, states, nil)
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil, fmt.Errorf("read latest events: %w", err)
		}
		for i := range states[:n] {
			out = append(out, states[i].Event.event())
		}
		if err != nil {
			return out, nil // that was all
		}
	}
}

// Look returns where the device has a peer at this moment. ok is false if the
// peer is gone, or Newest has nothing of it.
func (h *Hook) Look(internalID uint64) (ep netip.AddrPort, ok bool, err error) {
	h.looking.Lock()
	defer h.looking.Unlock()
	found, err := h.objs.Look.Run(&ebpf.RunOptions{Context: internalID})
	if err != nil {
		return netip.AddrPort{}, false, fmt.Errorf("look at a peer: %w", err)
	}
	var raw peerPeerEndpoint
	if err := h.objs.Looked.Get(&raw); err != nil {
		return netip.AddrPort{}, false, fmt.Errorf("look at a peer: %w", err)
	}
	return raw.addrPort(), found == 1, nil
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
	out := make(map[string]string)
	for name, object := range map[string][]byte{"peer": _PeerBytes, "kprobe": _KprobeBytes, "uplink": _UplinkBytes} {
		sum := sha256.Sum256(object)
		out[name] = hex.EncodeToString(sum[:])
	}
	return out
}

// explain finds the reason behind an error of loading or attaching. The kernel
// and the library report several different ones as "not found" or "not
// supported". needs is what else the kernel must have.
func explain(err error, needs string) error {
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
		return &attachError{ErrUnsupported, needs, err}
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
