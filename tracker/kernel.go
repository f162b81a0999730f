// SPDX-License-Identifier: MIT

package tracker

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wgroam/wgroam/bpf"
	"github.com/wgroam/wgroam/internal/privilege"
)

// Kernel shares one kernel hook among the trackers of all devices. The hook is
// attached when the first device wants it, and again whenever the last attempt
// failed: a module that was not there may have been loaded since. It is closed
// when no device wants it any more, because fentry keeps the module from being
// unloaded.
//
// The zero value is ready for use. Close it at the end.
type Kernel struct {
	attach func(peers int) (*bpf.Hook, error) // bpf.Attach; tests have others

	mu      sync.Mutex
	hook    *bpf.Hook
	subs    map[bpf.Device]*subscriber
	looks   looks
	was     counts    // of the hook
	past    counts    // of those before it
	check   time.Time // when to ask for what makes no event
	owed    bool      // events were lost, and have not been recovered
	flushes *flusher  // of the hook
	reader  sync.WaitGroup
	closed  bool
}

// counts are what the kernel has counted.
type counts struct {
	lost, limited, silent uint64
}

// subscriber is told of one device's events, by the goroutine that reads the
// ring buffer: it must not wait for anything.
type subscriber struct {
	// event reports whether it was news.
	event func(bpf.Event) bool
	// settled is called when a peer has stood still for a while since its last
	// event, with where the device has it; ok is false if that is not known.
	settled func(last bpf.Event, at netip.AddrPort, ok bool)
	// lost is called when events are missing: for the first time since the newest
	// of each peer were delivered again, by event, or once more.
	lost func(first bool)
	// silent is called when there may be something that makes no event: a new peer or
	// private key, or a packet for which the hook was not run.
	silent func()
	// broken is called when the hook is gone for good.
	broken func(error)
}

var (
	errKernelClosed = errors.New("kernel hook is closed")
	errReloaded     = errors.New("the wireguard module was unloaded")
)

// follow makes s hear of a device's events from now on. peers is the number of
// peers that the device has. fallback is why the hook is not as good as it could
// be; nil if it is.
func (k *Kernel) follow(d bpf.Device, peers int, s *subscriber) (fallback, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed {
		return nil, errKernelClosed
	}
	if k.hook != nil && k.hook.Stale() {
		// Whoever follows has a device that went with the module, and has yet to
		// notice.
		k.fail(errReloaded)
	}
	if k.hook == nil {
		attach := k.attach
		if attach == nil {
			attach = bpf.Attach
		}
		var hook *bpf.Hook
		err := privilege.With(func() (err error) {
			hook, err = attach(peers)
			return err
		})
		if err != nil {
			return nil, err
		}
		k.hook, k.owed, k.subs = hook, false, make(map[bpf.Device]*subscriber)
		k.looks = looks{pace: pace{most: looksRest}, newest: make(map[uint64]bpf.Event)}
		k.flushes = &flusher{}
		k.reader.Go(func() { k.read(hook) })
	}
	// Before the kernel knows of the device, so that no event finds nobody.
	k.subs[d] = s
	if err := k.hook.Follow(d); err != nil {
		_ = k.drop(d) // the reason for failing is the one to report
		return nil, err
	}
	return k.hook.Fallback, nil
}

// unfollow is the reverse of follow. No call into the subscriber begins after it
// has returned.
func (k *Kernel) unfollow(d bpf.Device) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.subs[d] == nil {
		return nil // the hook has failed
	}
	return k.drop(d)
}

// drop forgets a subscriber, and the hook with the last. It is called with k.mu
// held.
func (k *Kernel) drop(d bpf.Device) error {
	delete(k.subs, d)
	if len(k.subs) == 0 {
		return k.release().Close()
	}
	return k.hook.Unfollow(d)
}

// release lets go of the hook, which the caller closes. It is called with k.mu
// held.
func (k *Kernel) release() *bpf.Hook {
	hook := k.hook
	k.past = k.counts()
	k.flushes.end()
	k.hook, k.subs, k.was, k.flushes = nil, nil, counts{}, nil
	return hook
}

// fail tells everybody that the hook is gone. It is called with k.mu held.
func (k *Kernel) fail(err error) {
	for _, s := range k.subs {
		s.broken(err)
	}
	_ = k.release().Close() // broken already
}

// idle is how long the hook is left alone that says nothing: it may have been
// skipped.
const idle = time.Second

// read hands out events until the hook is closed.
func (k *Kernel) read(hook *bpf.Hook) {
	for wake := time.Now().Add(idle); ; {
		hook.SetDeadline(wake)
		e, drained, err := hook.Read()
		flushed, _ := errors.AsType[*bpf.FlushedError](err)
		k.mu.Lock()
		switch {
		case errors.Is(err, bpf.ErrClosed), k.hook != hook: // by Close, or about to be
			k.mu.Unlock()
			return
		case flushed != nil:
			err = k.looks.flush(hook, k.deliver)
			k.flushes.reach(flushed.Number)
			drained = true
		case errors.Is(err, bpf.ErrDeadline):
			drained, err = true, nil
		case err == nil:
			if k.deliver(e) {
				k.looks.event(e)
			}
		}
		if err == nil {
			wake, err = k.look(hook, drained)
		}
		if err != nil {
			k.fail(err)
			k.mu.Unlock()
			return
		}
		k.mu.Unlock()
	}
}

// deliver reports whether an event was news.
func (k *Kernel) deliver(e bpf.Event) bool {
	s := k.subs[e.Device]
	return s != nil && s.event(e)
}

// look looks at what the ring buffer does not say: what did not fit, what was
// held back, and what the hook has not seen. wake is when to look again.
func (k *Kernel) look(hook *bpf.Hook, drained bool) (wake time.Time, err error) {
	now := time.Now()
	if err := k.count(hook, now); err != nil {
		return now, err
	}
	boot, err := bootTime()
	if err != nil {
		return now, err
	}
	wake = now.Add(idle)
	due, ok := k.looks.next()
	if !ok {
		return wake, nil
	}
	if rest := max(due-boot, k.looks.pace.rest(now)); rest > 0 {
		return now.Add(min(rest, idle)), nil
	}
	// After what waits in the ring buffer, which is older; if there is no end to
	// that, before it.
	if !drained && boot-due < bpf.Window {
		return wake, nil
	}
	err = k.looks.pass(boot, hook, k.deliver, func(last bpf.Event, at netip.AddrPort, ok bool) {
		if s := k.subs[last.Device]; s != nil {
			s.settled(last, at, ok)
		}
	})
	k.owed = k.owed && k.looks.all
	k.looks.pace.did(now, time.Now())
	return now, err
}

// count reads the hook's counters, and tells when they have grown.
func (k *Kernel) count(hook *bpf.Hook, now time.Time) error {
	lost, err := hook.Lost()
	if err != nil {
		return err
	}
	limited, err := hook.Limited()
	if err != nil {
		return err
	}
	was := k.was
	silent := was.silent
	if now.After(k.check) { // it takes a few system calls
		k.check = now.Add(idle)
		missed, err := hook.Missed()
		if err != nil {
			return err
		}
		configured, err := hook.Configured()
		if err != nil {
			return err
		}
		silent = missed + configured
	}
	k.was = counts{lost: lost, limited: limited.Peer + limited.All, silent: silent}
	if lost != was.lost {
		for _, s := range k.subs {
			s.lost(!k.owed)
		}
		k.owed, k.looks.all = true, true
	}
	if silent != was.silent {
		for _, s := range k.subs {
			s.silent()
		}
	}
	return nil
}

// barrier reports whether all events that were in the ring buffer at the time of
// the call have been handed out. It waits for that, if not for long.
func (k *Kernel) barrier(ctx context.Context) (done bool, err error) {
	k.mu.Lock()
	hook, flushes := k.hook, k.flushes
	k.mu.Unlock()
	if hook == nil {
		return true, nil
	}
	return flushes.wait(ctx, hook.Flush)
}

// Lost returns how many events the kernel could not put into the ring buffer.
func (k *Kernel) Lost() uint64 {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.counts().lost
}

// Limited returns how many events the kernel held back, because a peer, or all
// together, changed too often.
func (k *Kernel) Limited() uint64 {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.counts().limited
}

// counts is called with k.mu held.
func (k *Kernel) counts() counts {
	return counts{k.past.lost + k.was.lost, k.past.limited + k.was.limited, k.past.silent + k.was.silent}
}

// Close detaches the hook.
func (k *Kernel) Close() error {
	k.mu.Lock()
	var err error
	if k.hook != nil {
		err = k.release().Close()
	}
	k.closed = true
	k.mu.Unlock()
	k.reader.Wait()
	return err
}

// bootTime reads the clock that the kernel hook stamps events with.
func bootTime() (time.Duration, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0, fmt.Errorf("read CLOCK_BOOTTIME: %w", err)
	}
	return time.Duration(ts.Nano()), nil
}
