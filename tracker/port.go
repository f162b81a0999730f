// SPDX-License-Identifier: MIT

package tracker

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/wgroam/wgroam/bpf"
	"github.com/wgroam/wgroam/internal/privilege"
	"github.com/wgroam/wgroam/internal/wg"
)

// Port shares the programs at the UDP ports of WireGuard among the trackers of
// all devices: one for every network namespace that a device has its socket in,
// attached to all links of that namespace as they come and go. They are there
// while a device needs them.
//
// The zero value is ready for use. Close it at the end.
type Port struct {
	mu     sync.Mutex
	spaces map[uint32]*space // by inode of the namespace
	lost   uint64            // in those that are closed
	closed bool
}

// portSubscriber is told of what passes one device's port, by the goroutine that
// reads the ring buffer: it must not wait for anything.
type portSubscriber struct {
	event func(bpf.UplinkEvent)
	// foreign is called instead of event for what looks like the device's own, and
	// comes from an address that is none of the namespace's.
	foreign func()
	// lost is called when events are missing.
	lost func()
	// broken is called when the program is gone for good.
	broken func(error)
}

// space is a network namespace with the program attached.
type space struct {
	ns     *wg.Space // our own; nil for that of the process
	uplink *bpf.Uplink
	stop   context.CancelFunc
	runs   sync.WaitGroup // the watchers of links and addresses, and the reader

	mu     sync.Mutex
	subs   map[uint16]*portSubscriber
	lost   uint64
	links  map[int]error       // by index: nil where the program is attached
	ours   map[netip.Addr]bool // the namespace's addresses
	broken error

	flushes flusher
	pace    pace // of looking for an address that is not known; the reader's
}

// tap is a device's place at a port.
type tap struct {
	p    *Port
	s    *space
	id   uint32
	port uint16
	// named is the namespace under the name that it was found by; nil if it is the
	// device's or the process's.
	named *wg.Space
}

var errPortClosed = errors.New("port program is closed")

// errTaken: two devices cannot have one socket; one was found by mistake, or has
// yet to let go of its old port.
var errTaken = errors.New("another device is followed at this UDP port")

// follow makes sub hear of what passes a device's UDP port from now on, on all
// links of the namespace that has the socket. home is the device's own
// namespace, and peers the number of its peers. The error wraps errNoSocket if
// there is nothing to watch yet.
func (p *Port) follow(home *wg.Space, port uint16, peers int, sub *portSubscriber) (*tap, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, errPortClosed
	}
	ns, named, err := locate(home, port)
	if err != nil {
		return nil, err
	}
	id, err := ns.Inode()
	if err != nil {
		return nil, errors.Join(err, ns.Close())
	}
	s := p.spaces[id]
	if s != nil && s.alive() != nil {
		_ = p.drop(id) // it is broken already
		s = nil
	}
	if s != nil {
		ns.Close() // known already
	} else if s, err = openSpace(ns, peers); err != nil {
		return nil, err
	}
	if p.spaces == nil {
		p.spaces = make(map[uint32]*space)
	}
	p.spaces[id] = s
	t := &tap{p: p, s: s, id: id, port: port, named: named}
	if err := s.follow(port, sub); err != nil {
		p.release(t)
		return nil, err
	}
	return t, nil
}

// release ends a space that nobody needs any more. It is called with p.mu held.
func (p *Port) release(t *tap) {
	if p.spaces[t.id] == t.s && !t.s.used() {
		_ = p.drop(t.id) // there is nothing to be done about it
	}
}

// drop ends a space. It is called with p.mu held.
func (p *Port) drop(id uint32) error {
	s := p.spaces[id]
	delete(p.spaces, id)
	err := s.close()
	p.lost += s.lost
	return err
}

// Lost returns how many events the kernel could not put into the ring buffers.
func (p *Port) Lost() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := p.lost
	for _, s := range p.spaces {
		s.mu.Lock()
		n += s.lost
		s.mu.Unlock()
	}
	return n
}

// Close detaches all programs.
func (p *Port) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	var errs []error
	for id := range p.spaces {
		errs = append(errs, p.drop(id))
	}
	return errors.Join(errs...)
}

// close is the reverse of Port.follow. No call into the subscriber begins after
// it has returned.
func (t *tap) close() error {
	t.p.mu.Lock()
	defer t.p.mu.Unlock()
	err := t.s.unfollow(t.port)
	t.p.release(t)
	return err
}

// guess reports whether the socket is in another namespace than the device,
// although one is bound to the port in the device's own.
func (t *tap) guess(home *wg.Space) (bool, error) {
	id, err := home.Inode()
	if err != nil || id == t.id {
		return false, err
	}
	return bound(home, t.port)
}

// bound reports whether the socket is still there, and so is the namespace, which we
// would keep for ever.
func (t *tap) bound() (bool, error) {
	if !t.named.Current() {
		return false, nil
	}
	return bound(t.s.ns, t.port)
}

// suppressed returns how many hints the kernel has held back, for whatever
// device.
func (t *tap) suppressed() (uint64, error) { return t.s.uplink.Suppressed() }

// unwatched returns an error for a link that the program could not be attached
// to, and that may hide something.
func (t *tap) unwatched() error {
	t.s.mu.Lock()
	defer t.s.mu.Unlock()
	for _, err := range t.s.links {
		if err != nil {
			return err
		}
	}
	return nil
}

// openSpace attaches the program to the links of a namespace, which it takes
// over.
func openSpace(ns *wg.Space, peers int) (*space, error) {
	var uplink *bpf.Uplink
	err := privilege.With(func() (err error) {
		uplink, err = bpf.OpenUplink(peers)
		return err
	})
	if err != nil {
		return nil, errors.Join(err, ns.Close())
	}
	ctx, stop := context.WithCancel(context.Background())
	s := &space{
		ns: ns, uplink: uplink, stop: stop, pace: pace{least: lookAgain, most: dumpRest},
		subs: make(map[uint16]*portSubscriber), links: make(map[int]error),
	}
	s.runs.Go(s.read)
	// Addresses first, so that the first event finds them.
	err = s.watch(ctx, wg.WatchAddrs, s.addresses)
	if err == nil {
		err = s.watch(ctx, wg.WatchLinks, s.attach)
	}
	if err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

// watch keeps looking in the namespace, on a thread there, until ctx ends. It returns
// the error of the first look.
func (s *space) watch(ctx context.Context, watch func(context.Context, func()) error, look func() error) error {
	looked := make(chan error, 1)
	say := func(err error) {
		select {
		case looked <- err:
		default:
		}
	}
	s.runs.Go(func() {
		err := s.ns.Do(func() error {
			return watch(ctx, func() { say(look()) })
		})
		if err != nil {
			s.breaks(err)
		}
		say(err)
	})
	return <-looked
}

// addresses notes which addresses the namespace has. It runs on a thread there.
func (s *space) addresses() error {
	list, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	// They may change meanwhile, which wakes us again.
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return fmt.Errorf("list addresses: %w", err)
	}
	ours := make(map[netip.Addr]bool, len(list))
	for _, a := range list {
		if addr, ok := netip.AddrFromSlice(a.IP); ok {
			ours[addr.Unmap()] = true
		}
	}
	s.mu.Lock()
	s.ours = ours
	s.mu.Unlock()
	return nil
}

// lookAgain is how often an address that is not known is looked for: it may be so new
// that we have yet to be told of it.
const lookAgain = 100 * time.Millisecond

// own reports whether an event is of a packet of this namespace. A guest on a macvlan
// or ipvlan above one of its links can send what looks like that, to the port's
// programs, from its own address.
func (s *space) own(e bpf.UplinkEvent) bool {
	known := func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.ours[e.Near]
	}
	if e.Kind == bpf.UplinkHint || known() {
		return true
	}
	began := time.Now()
	if s.pace.rest(began) > 0 || s.ns.Do(s.addresses) != nil {
		return false
	}
	s.pace.did(began, time.Now())
	return known()
}

// attach attaches the program to links that are new, and lets go of those that
// have gone. It runs on a thread in the namespace.
func (s *space) attach() error {
	links, err := wg.Links()
	if err != nil {
		return err // as when they change meanwhile; that wakes us again
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	present := make(map[int]bool, len(links))
	for _, l := range links {
		// Each time: somebody else may have removed it.
		err := privilege.With(func() error { return s.uplink.Attach(l.Ifindex) })
		if errors.Is(err, unix.ENODEV) {
			continue // gone again
		}
		present[l.Ifindex] = true
		if err != nil {
			err = fmt.Errorf("link %s: %w", l.Name, err)
		}
		s.links[l.Ifindex] = err
	}
	for i := range s.links {
		if !present[i] {
			_ = s.uplink.Detach(i) // it is gone
			delete(s.links, i)
		}
	}
	return nil
}

func (s *space) follow(port uint16, sub *portSubscriber) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.broken != nil {
		return s.broken
	}
	if s.subs[port] != nil {
		return fmt.Errorf("%w: %d", errTaken, port)
	}
	// Before the kernel knows of the port, so that no event finds nobody.
	s.subs[port] = sub
	if err := s.uplink.Follow(port); err != nil {
		delete(s.subs, port)
		return err
	}
	return nil
}

func (s *space) unfollow(port uint16) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.subs, port)
	if s.broken != nil {
		return nil
	}
	return s.uplink.Unfollow(port)
}

func (s *space) used() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.subs) > 0
}

func (s *space) alive() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.broken
}

// read hands out events until the program is closed.
func (s *space) read() {
	for {
		e, _, err := s.uplink.Read()
		flushed, _ := errors.AsType[*bpf.FlushedError](err)
		own := err == nil && s.own(e)
		s.mu.Lock()
		sub := s.subs[e.Port]
		switch {
		case errors.Is(err, bpf.ErrClosed):
			s.flushes.end()
			s.mu.Unlock()
			return
		case flushed != nil:
			s.flushes.reach(flushed.Number)
			err = nil
		case err != nil || sub == nil:
		case own:
			sub.event(e)
		default:
			sub.foreign()
		}
		if err == nil {
			err = s.count()
		}
		s.mu.Unlock()
		if err != nil {
			s.breaks(err)
			return
		}
	}
}

// count looks for events that found the ring buffer full.
func (s *space) count() error {
	lost, err := s.uplink.Lost()
	if err != nil || lost == s.lost {
		return err
	}
	s.lost = lost
	for _, sub := range s.subs {
		sub.lost()
	}
	return nil
}

// breaks tells everybody that it is over.
func (s *space) breaks(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.flushes.end()
	if s.broken != nil {
		return
	}
	s.broken = err
	for _, sub := range s.subs {
		sub.broken(err)
	}
	clear(s.subs)
}

func (s *space) close() error {
	s.mu.Lock()
	if s.broken == nil {
		s.broken = errPortClosed
	}
	s.mu.Unlock()
	s.stop()
	err := s.uplink.Close()
	s.runs.Wait()
	return errors.Join(err, s.ns.Close())
}

// barrier reports whether all events that were in the ring buffer at the time of
// the call have been handed out. It waits for that, if not for long.
func (t *tap) barrier(ctx context.Context) (done bool, err error) {
	return t.s.flushes.wait(ctx, t.s.uplink.Flush)
}
