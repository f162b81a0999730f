// SPDX-License-Identifier: MIT

package bpf

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/ringbuf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// UplinkKind says what an UplinkEvent is about. The values are those of
// uplink.h.
type UplinkKind uint8

const (
	// UplinkInitiation is a handshake initiation that left for Addr. Local and
	// Message are set.
	UplinkInitiation UplinkKind = 1
	// UplinkResponse is a handshake response that left for Addr. Local, Remote and
	// Message are set. The initiation may have been an old one that somebody
	// repeated: it is proof when data follows (UplinkConfirmed, UplinkMoved).
	UplinkResponse UplinkKind = 2
	// UplinkMoved is data under Remote that leaves for Addr, and not for Old any
	// more.
	UplinkMoved UplinkKind = 3
	// UplinkUnknown is data under Remote that leaves for Addr. The session is older
	// than the program, or the peer has answered our initiation.
	UplinkUnknown UplinkKind = 4
	// UplinkHint is something that came in under Local from Addr and may be data:
	// the first of a session, or from another address than before. It may be
	// forged, and WireGuard has not seen it yet: reason to ask the device where its
	// peer is, a little later and once more. The same is hinted at again after 250
	// ms, 4 s and 64 s if more of it comes. The numbers are bounded, see Suppressed.
	UplinkHint UplinkKind = 5
	// UplinkConfirmed is the first data under Remote after an UplinkResponse, for
	// the same Addr. WireGuard sends it when the peer has proven that it
	// holds the keys of the session.
	UplinkConfirmed UplinkKind = 6
)

func (k UplinkKind) String() string {
	switch k {
	case UplinkInitiation:
		return "initiation"
	case UplinkResponse:
		return "response"
	case UplinkMoved:
		return "moved"
	case UplinkUnknown:
		return "unknown"
	case UplinkHint:
		return "hint"
	case UplinkConfirmed:
		return "confirmed"
	default:
		return fmt.Sprintf("UplinkKind(%d)", uint8(k))
	}
}

// UplinkEvent is something that a WireGuard device sent, or a hint at what it
// received.
type UplinkEvent struct {
	Kind UplinkKind
	// Port is the device's UDP port.
	Port uint16
	// Boot is CLOCK_BOOTTIME of the packet; of an event that the limits held back,
	// the time when they let it go.
	Boot time.Duration
	// Local is our index of the session, read as little endian.
	Local uint32
	// Remote is the peer's index of the session, read as little endian.
	Remote uint32
	// Addr is the destination, or the source of a hint. A link-local address is
	// without its zone.
	Addr netip.AddrPort
	// Old is the destination that was reported before, for UplinkMoved only.
	Old netip.AddrPort
	// Near is our address, as it is in the packet; of a hint it is the zero Addr. That
	// of another host is on a packet which only looks like ours: a guest's on a macvlan
	// above the link.
	Near netip.Addr
	// Message is the handshake up to and including mac1, 132 bytes of an initiation
	// or 76 of a response. It is valid until the next Read.
	Message []byte
}

// Uplink is the UDP-port program of one network namespace: it watches what
// WireGuard devices with a socket there send and receive, whoever implements
// them. It changes and holds up nothing, and other programs on the same links see
// the packets before and after it.
//
// One goroutine may Read; all other methods are safe for concurrent use.
type Uplink struct {
	objs   uplinkObjects
	reader *ring

	// Of Read alone.
	record  ringbuf.Record
	late    []UplinkEvent // to be returned next
	flushed error         // and then this
	seen    uint64        // of moves_late
	busy    time.Time     // since when there has always been an event to read; zero if there has not

	mu     sync.Mutex
	closed bool
	ports  [1 << 16 / 64]uint64
	links  map[int]attachment
	nl     *netlink.Handle
	clsact bool // even where the kernel has tcx
}

// attachment is the two programs on a link.
type attachment interface {
	// attached reports whether they are still there, on the link that has the index
	// now. An error says nothing of that.
	attached(ifindex int) (bool, error)
	// detach removes them. It is no error that they, or the link, are gone.
	detach() error
}

// OpenUplink loads the programs; nothing is attached yet. peers is the number of
// peers expected on all devices; it sizes the maps of sessions.
//
// The error wraps ErrPrivilege or ErrUnsupported where the reason is one of these.
func OpenUplink(peers int) (*Uplink, error) {
	spec, err := loadUplink()
	if err != nil {
		return nil, fmt.Errorf("read embedded BPF object: %w", err)
	}
	// WireGuard keeps three key pairs of a peer. Twice as many, because LRU maps begin
	// to evict before they are full.
	for _, name := range []string{uplinkMapLocals, uplinkMapRemotes, uplinkMapLate} {
		spec.Maps[name].MaxEntries = uint32(min(max(2*3*peers, 4096), 1<<22))
	}

	u := &Uplink{links: make(map[int]attachment)}
	if err := u.load(spec); err != nil {
		_ = u.Close() // the reason for failing is the one to report
		return nil, explainUplink(err)
	}
	return u, nil
}

func (u *Uplink) load(spec *ebpf.CollectionSpec) error {
	if err := spec.LoadAndAssign(&u.objs, nil); err != nil {
		return fmt.Errorf("load: %w", err)
	}
	var err error
	if u.reader, err = openRing(u.objs.Events); err != nil {
		return err
	}
	return nil
}

// Close detaches the programs from all links. A blocked Read returns ErrClosed.
func (u *Uplink) Close() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.closed = true
	var errs []error
	for ifindex := range u.links {
		errs = append(errs, u.detach(ifindex))
	}
	if u.nl != nil {
		u.nl.Close()
		u.nl = nil
	}
	if u.reader != nil {
		errs = append(errs, u.reader.Close())
	}
	errs = append(errs, u.objs.Close())
	return errors.Join(errs...)
}

// Attach attaches the programs to both directions of a link of the calling
// thread's network namespace, which is the same for all calls: by tcx before all
// other programs, or by clsact where the kernel has no tcx. Attaching twice is no
// error; a link that has lost the programs gets them again.
//
// The error wraps ErrPrivilege, ErrUnsupported, or unix.ENODEV if there is no such
// link.
func (u *Uplink) Attach(ifindex int) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closed {
		return fmt.Errorf("attach to link %d: %w", ifindex, ErrClosed)
	}
	if a := u.links[ifindex]; a != nil {
		ok, err := a.attached(ifindex)
		if err != nil {
			return fmt.Errorf("look for the programs on link %d: %w", ifindex, err)
		}
		if ok {
			return nil
		}
		_ = u.detach(ifindex) // what is left of it
	}
	a, err := u.attach(ifindex)
	if err != nil {
		return fmt.Errorf("attach to link %d: %w", ifindex, explainUplink(err))
	}
	u.links[ifindex] = a
	return nil
}

func (u *Uplink) attach(ifindex int) (attachment, error) {
	if u.nl == nil {
		nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return nil, fmt.Errorf("open netlink: %w", err)
		}
		u.nl = nl
	}
	l, err := u.nl.LinkByIndex(ifindex)
	if _, gone := errors.AsType[netlink.LinkNotFoundError](err); gone {
		return nil, unix.ENODEV
	}
	if err != nil {
		return nil, err
	}
	in, out := u.objs.UplinkIngress, u.objs.UplinkEgress
	switch l.Attrs().EncapType {
	case "ether", "loopback":
	case "none", "ppp", "rawip", "ipip", "tunnel6", "sit", "gre", "gre6":
		in, out = u.objs.UplinkIngressIp, u.objs.UplinkEgressIp
	default:
		return nil, fmt.Errorf("its packets begin with %q, which wgroam cannot read: %w", l.Attrs().EncapType, ebpf.ErrNotSupported)
	}
	if !u.clsact {
		a, err := attachTCX(ifindex, in, out)
		if !errors.Is(err, ebpf.ErrNotSupported) {
			return a, err
		}
	}
	return attachClsact(u.nl, ifindex, in, out)
}

// Detach forgets a link. It is no error if it was not attached to, or is gone.
func (u *Uplink) Detach(ifindex int) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.detach(ifindex)
}

func (u *Uplink) detach(ifindex int) error {
	a := u.links[ifindex]
	if a == nil {
		return nil
	}
	delete(u.links, ifindex)
	if err := a.detach(); err != nil {
		return fmt.Errorf("detach from link %d: %w", ifindex, err)
	}
	return nil
}

// tcx is a link in the kernel's sense for each direction, which goes with its file
// descriptor.
type tcx []link.Link

var tcxWays = []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress}

func attachTCX(ifindex int, in, out *ebpf.Program) (attachment, error) {
	var t tcx
	for i, prog := range []*ebpf.Program{in, out} {
		l, err := link.AttachTCX(link.TCXOptions{
			Program: prog, Attach: tcxWays[i], Interface: ifindex,
			// Before all others, for what they drop or redirect goes no further.
			Anchor: link.Head(),
		})
		if err != nil {
			_ = t.detach() // the reason for failing is the one to report
			return nil, err
		}
		t = append(t, l)
	}
	return t, nil
}

func (t tcx) attached(ifindex int) (bool, error) {
	for i, l := range t {
		info, err := l.Info()
		if err != nil {
			return false, err
		}
		// The index is 0 when the device has gone (tcx.c, tcx_link_fill_info).
		if info.TCX() == nil || info.TCX().Ifindex == 0 {
			return false, nil
		}
		// Or another namespace has it now, and there is a new link here.
		there, err := link.QueryPrograms(link.QueryOptions{Target: ifindex, Attach: tcxWays[i]})
		if errors.Is(err, unix.ENODEV) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		if !slices.ContainsFunc(there.Programs, func(p link.AttachedProgram) bool {
			id, ok := p.LinkID()
			return ok && id == info.ID
		}) {
			return false, nil
		}
	}
	return true, nil
}

func (t tcx) detach() error {
	var errs []error
	for _, l := range t {
		errs = append(errs, l.Close())
	}
	return errors.Join(errs...)
}

// Follow makes the kernel report the packets from and to a device's UDP port.
func (u *Uplink) Follow(port uint16) error {
	return u.setPort(port, true)
}

// Unfollow is the reverse of Follow. It is no error if the port was not followed.
func (u *Uplink) Unfollow(port uint16) error {
	return u.setPort(port, false)
}

func (u *Uplink) setPort(port uint16, on bool) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	// All of it, in the memory where the programs read it. What does not differ
	// does not change under them.
	word, bit := &u.ports[port/64], uint64(1)<<(port%64)
	*word &^= bit
	if on {
		*word |= bit
	}
	if u.closed {
		return fmt.Errorf("follow UDP port %d: %w", port, ErrClosed)
	}
	if err := u.objs.Ports.Set(&u.ports); err != nil {
		return fmt.Errorf("follow UDP port %d: %w", port, err)
	}
	return nil
}

// lateness is when to look for changes that the limits held back: after the window
// in which they let no more through (uplink.bpf.c), and what may be under way.
const lateness = 200 * time.Millisecond

// Read returns the next event, waiting for one if need be. drained reports that
// no more were waiting behind it: the time to look at Lost and Suppressed. After
// Close the error is ErrClosed.
//
// Of a session that moves on and on, and of many that move at once, some changes
// are held back. The last address of each is returned nevertheless, once there has
// been nothing else to read for a fifth of a second, or something else all the time for as
// long; and so it is if the ring buffer was full.
func (u *Uplink) Read() (e UplinkEvent, drained bool, err error) {
	for {
		if len(u.late) > 0 {
			e, u.late = u.late[0], u.late[1:]
			return e, len(u.late) == 0 && u.record.Remaining == 0, nil
		}
		if err := u.flushed; err != nil {
			u.flushed = nil
			return UplinkEvent{}, false, err
		}
		err := u.reader.ReadInto(&u.record)
		switch {
		case err == nil:
			raw, err := decodeUplink(u.record.RawSample)
			if err != nil {
				return UplinkEvent{}, false, err
			}
			// Nothing is held back without an event before it. There may always be
			// another one to read.
			now := time.Now()
			u.reader.SetDeadline(now.Add(lateness))
			if u.busy.IsZero() {
				u.busy = now
			}
			if now.Sub(u.busy) > lateness {
				if err := u.collect(); err != nil {
					return UplinkEvent{}, false, err
				}
			}
			// Not AvailableBytes, which looks at memory that Close has given back.
			return raw.event(), len(u.late) == 0 && u.record.Remaining == 0, nil
		case errors.Is(err, ErrFlushed):
			u.flushed = err
		case errors.Is(err, os.ErrDeadlineExceeded):
			u.reader.SetDeadline(time.Time{})
		default:
			return UplinkEvent{}, false, err
		}
		u.record.Remaining = 0
		if err := u.collect(); err != nil {
			return UplinkEvent{}, false, err
		}
	}
}

// collect makes events of the changes that were held back.
func (u *Uplink) collect() error {
	u.busy = time.Time{}
	var n uint64
	if err := u.objs.MovesLate.Get(&n); err != nil {
		return fmt.Errorf("read counter of late events: %w", err)
	}
	if n == u.seen {
		return nil
	}
	u.seen = n
	// There may be more by then.
	u.reader.SetDeadline(time.Now().Add(lateness))

	var (
		keys   [256]uplinkUplinkKey
		values [256]uplinkUplinkLate
		cursor ebpf.MapBatchCursor
		now    unix.Timespec
	)
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &now) // cannot fail with a valid address
	for {
		count, err := u.objs.Late.BatchLookupAndDelete(&cursor, keys[:], values[:], nil)
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("read late events: %w", err)
		}
		for i := range count {
			var remote uplinkUplinkRemote
			// After the entry in late is gone: a later change makes it anew.
			if e := u.objs.Remotes.Lookup(&keys[i], &remote); errors.Is(e, ebpf.ErrKeyNotExist) {
				continue // forgotten, and unknown when it is used again
			} else if e != nil {
				return fmt.Errorf("read late event: %w", e)
			}
			e := UplinkEvent{
				Kind:   UplinkKind(values[i].Kind),
				Port:   keys[i].Port,
				Boot:   time.Duration(now.Nano()),
				Remote: keys[i].Index,
				Addr:   remote.Addr.addrPort(),
				Old:    values[i].Old.addrPort(),
				Near:   nearAddr(remote.Near, remote.Addr.Family),
			}
			if e.Kind == UplinkMoved && e.Old == e.Addr {
				continue // and back again
			}
			u.late = append(u.late, e)
		}
		if err != nil {
			return nil
		}
	}
}

// Flush makes Read return all events that are waiting, and then a FlushedError with
// at least this number.
func (u *Uplink) Flush() (uint64, error) { return u.reader.Flush() }

// Lost returns how many events found the ring buffer full since OpenUplink. Of the
// handshakes and hints among them nothing is left; changes are returned later.
func (u *Uplink) Lost() (uint64, error) {
	return counter(u.objs.EventsLost)
}

// Suppressed returns how many packets since OpenUplink would have been hints, were
// these not limited to some 40 in a second for a session and 1000 for all of them. If
// it has grown and no hint follows, the newest may be among them: reason to ask the
// device as well.
func (u *Uplink) Suppressed() (uint64, error) {
	return counter(u.objs.HintsSuppressed)
}

func counter(v *ebpf.Variable) (uint64, error) {
	var n uint64
	if err := v.Get(&n); err != nil {
		return 0, fmt.Errorf("read counter: %w", err)
	}
	return n, nil
}

// uplinkHeader is the size of an event without a message.
const uplinkHeader = int(unsafe.Offsetof(uplinkUplinkEvent{}.Message))

// messageSize returns how much of a handshake an event of this kind has.
func messageSize(kind UplinkKind) int {
	switch kind {
	case UplinkInitiation:
		return 132 // INITIATION_MAC1 in uplink.h
	case UplinkResponse:
		return 76
	default:
		return 0
	}
}

// decodeUplink checks kind and size; the kernel is the only writer.
func decodeUplink(sample []byte) (*uplinkUplinkEvent, error) {
	var raw uplinkUplinkEvent
	n := copy(unsafe.Slice((*byte)(unsafe.Pointer(&raw)), unsafe.Sizeof(raw)), sample)
	want := uplinkHeader + messageSize(UplinkKind(raw.Kind))
	if n < want || raw.Kind == 0 || UplinkKind(raw.Kind) > UplinkConfirmed {
		return nil, fmt.Errorf("event of kind %d with %d bytes: program and binary do not match", raw.Kind, n)
	}
	return &raw, nil
}

func (r *uplinkUplinkEvent) event() UplinkEvent {
	e := UplinkEvent{
		Kind:   UplinkKind(r.Kind),
		Port:   r.Port,
		Boot:   time.Duration(r.BootNs),
		Local:  r.Local,
		Remote: r.Remote,
		Addr:   r.Addr.addrPort(),
		Old:    r.Old.addrPort(),
	}
	if e.Kind != UplinkHint {
		e.Near = nearAddr(r.Near, r.Addr.Family)
	}
	if n := messageSize(e.Kind); n > 0 {
		e.Message = r.Message[:n]
	}
	return e
}

func (a *uplinkUplinkAddress) addrPort() netip.AddrPort {
	ep := peerPeerEndpoint{Addr: a.Addr, Port: a.Port, Family: a.Family}
	return ep.addrPort()
}

func nearAddr(addr [16]uint8, family uint16) netip.Addr {
	return (&uplinkUplinkAddress{Addr: addr, Family: family}).addrPort().Addr()
}

// explainUplink finds the reason behind an error of loading or attaching.
func explainUplink(err error) error {
	// The verifier lets nobody without CAP_PERFMON compute where in a packet to read.
	if missing := missingCaps(unix.CAP_BPF, unix.CAP_PERFMON, unix.CAP_NET_ADMIN); missing != "" {
		return &attachError{ErrPrivilege, "the UDP-port program needs " + missing + ": run as root or grant it", err}
	}
	if errors.Is(err, ebpf.ErrNotSupported) || errors.Is(err, errNoTC) {
		return &attachError{ErrUnsupported, err.Error(), err}
	}
	return err
}
