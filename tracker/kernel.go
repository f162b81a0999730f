// SPDX-License-Identifier: MIT

package tracker

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wgroam/wgroam/bpf"
	"github.com/wgroam/wgroam/internal/privilege"
)

// Kernel shares one kernel hook among the trackers of all devices. The hook is
// attached when the first device wants it, and again whenever the last attempt
// failed: a module that was not there may have been loaded since.
//
// The zero value is ready for use. Close it at the end.
type Kernel struct {
	mu      sync.Mutex
	hook    *bpf.Hook
	subs    map[bpf.Device]*subscriber
	lost    uint64
	owed    bool          // events were lost, and have not been recovered
	flushed chan struct{} // closed when the ring buffer has been emptied
	reader  sync.WaitGroup
	closed  bool

	barriers sync.Mutex // one at a time
}

// subscriber is told of one device's events, by the goroutine that reads the
// ring buffer: it must not wait for anything.
type subscriber struct {
	event func(bpf.Event)
	// lost is called when events are missing: for the first time since the newest
	// of each peer were delivered again, by event, or once more.
	lost func(first bool)
	// broken is called when the hook is gone for good.
	broken func(error)
}

var errKernelClosed = errors.New("kernel hook is closed")

// follow makes s hear of a device's events from now on. peers is the number of
// peers that the device has.
func (k *Kernel) follow(d bpf.Device, peers int, s *subscriber) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed {
		return errKernelClosed
	}
	if k.hook == nil {
		var hook *bpf.Hook
		err := privilege.With(func() (err error) {
			hook, err = bpf.Attach(peers)
			return err
		})
		if err != nil {
			return err
		}
		k.hook, k.lost, k.owed, k.subs = hook, 0, false, make(map[bpf.Device]*subscriber)
		k.reader.Go(func() { k.read(hook) })
	}
	// Before the kernel knows of the device, so that no event finds nobody.
	k.subs[d] = s
	if err := k.hook.Follow(d); err != nil {
		delete(k.subs, d)
		return err
	}
	return nil
}

// unfollow is the reverse of follow. No call into the subscriber begins after it
// has returned.
func (k *Kernel) unfollow(d bpf.Device) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.subs, d)
	if k.hook == nil {
		return nil
	}
	return k.hook.Unfollow(d)
}

// read hands out events until the hook is closed.
func (k *Kernel) read(hook *bpf.Hook) {
	for {
		e, drained, err := hook.Read()
		k.mu.Lock()
		switch {
		case errors.Is(err, bpf.ErrClosed), k.hook != hook: // by Close, or about to be
			k.releaseBarrier()
			k.mu.Unlock()
			return
		case errors.Is(err, bpf.ErrFlushed):
			k.releaseBarrier()
			err = nil
		case err == nil:
			if s := k.subs[e.Device]; s != nil {
				s.event(e)
			}
			err = k.recover(hook, drained)
		}
		if err != nil {
			for _, s := range k.subs {
				s.broken(err)
			}
			k.hook, k.subs = nil, nil
			k.releaseBarrier()
			k.mu.Unlock()
			_ = hook.Close() // broken already
			return
		}
		k.mu.Unlock()
	}
}

// recover looks for events that found the ring buffer full. When that has been
// drained, it delivers the newest of every peer instead.
func (k *Kernel) recover(hook *bpf.Hook, drained bool) error {
	lost, err := hook.Lost()
	if err != nil {
		return err
	}
	if lost != k.lost {
		for _, s := range k.subs {
			s.lost(!k.owed)
		}
		k.lost, k.owed = lost, true
	}
	if !k.owed || !drained {
		return nil
	}
	k.owed = false
	latest, err := hook.Latest()
	if err != nil {
		return err
	}
	for _, e := range latest {
		if s := k.subs[e.Device]; s != nil {
			s.event(e)
		}
	}
	return nil
}

// barrierWait is how long a barrier waits. So much may come in that there is
// always more to read.
const barrierWait = 500 * time.Millisecond

// barrier reports whether all events that were in the ring buffer at the time of
// the call have been handed out. It waits for that, if not for long.
func (k *Kernel) barrier(ctx context.Context) (done bool, err error) {
	k.barriers.Lock()
	defer k.barriers.Unlock()
	k.mu.Lock()
	hook := k.hook
	if hook == nil {
		k.mu.Unlock()
		return true, nil
	}
	flushed := make(chan struct{})
	k.flushed = flushed
	k.mu.Unlock()
	if err := hook.Flush(); err != nil {
		return false, err
	}
	select {
	case <-flushed:
		return true, nil
	case <-time.After(barrierWait):
	case <-ctx.Done():
	}
	return false, nil
}

// releaseBarrier is called with k.mu held.
func (k *Kernel) releaseBarrier() {
	if k.flushed != nil {
		close(k.flushed)
		k.flushed = nil
	}
}

// Lost returns how many events the kernel could not put into the ring buffer.
func (k *Kernel) Lost() uint64 {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.lost
}

// Close detaches the hook.
func (k *Kernel) Close() error {
	k.mu.Lock()
	hook := k.hook
	k.hook, k.subs, k.closed = nil, nil, true
	k.mu.Unlock()
	var err error
	if hook != nil {
		err = hook.Close()
	}
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
