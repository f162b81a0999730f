// SPDX-License-Identifier: MIT

package tracker

import (
	"net/netip"
	"time"

	"github.com/wgroam/wgroam/bpf"
)

// looksRest is how long the last word of a peer may wait, at most, because others gave
// much to look at. There are no more than the map of the hook holds.
const looksRest = time.Second

// looks sees to it that the last word is heard of every peer that has changed.
// The hook reports so many changes in a time and holds back the rest, and what
// it reports can differ from what the kernel then does, when two CPUs have a
// packet of the peer. So a window after an event the peer is looked at: first
// whether it has moved on, and when it stands still whether the device agrees.
type looks struct {
	pace  pace
	queue []lookAt // in order of due
	// newest is the newest event known of each peer in the queue.
	newest map[uint64]bpf.Event
	// all: look at every peer that has changed since the hook was attached,
	// because events were lost.
	all bool
	// seen is what had been held back when all were looked at last.
	seen bpf.Limited
}

type lookAt struct {
	id  uint64
	due time.Duration // CLOCK_BOOTTIME
}

// source is where looks looks: a bpf.Hook.
type source interface {
	Limited() (bpf.Limited, error)
	Latest() ([]bpf.Event, error)
	Newest(id uint64) (bpf.Event, bool, error)
	Look(id uint64) (netip.AddrPort, bool, error)
}

// event notes an event that has been delivered.
func (l *looks) event(e bpf.Event) {
	if e.Confirmed {
		return // no change
	}
	newest, queued := l.newest[e.InternalID]
	if !queued {
		l.queue = append(l.queue, lookAt{e.InternalID, e.Boot + bpf.Window})
	}
	if e.Boot >= newest.Boot {
		l.newest[e.InternalID] = e
	}
}

// next returns when the next look is due. ok is false if none is.
func (l *looks) next() (due time.Duration, ok bool) {
	switch {
	case l.all:
		return 0, true
	case len(l.queue) > 0:
		return l.queue[0].due, true
	}
	return 0, false
}

// flush delivers all that the hook has held back until now. deliver reports
// whether an event was news.
func (l *looks) flush(from source, deliver func(bpf.Event) bool) error {
	now, err := from.Limited()
	if err != nil || !l.all && now == l.seen {
		return err
	}
	// Held back after this, it will make another difference.
	l.seen, l.all = now, false
	latest, err := from.Latest()
	if err != nil {
		return err
	}
	for _, e := range latest {
		if deliver(e) {
			l.event(e)
		}
	}
	return nil
}

// pass looks at all whose time has come. settled is told where the device has
// the peer of an event that was the last of it; ok is false if it does not say.
func (l *looks) pass(now time.Duration, from source, deliver func(bpf.Event) bool,
	settled func(last bpf.Event, at netip.AddrPort, ok bool),
) error {
	limited, err := from.Limited()
	if err != nil {
		return err
	}
	// Many peers have an event in the window in which others have none, so the
	// time has come.
	if l.all || limited.All != l.seen.All {
		if err := l.flush(from, deliver); err != nil {
			return err
		}
	}
	for len(l.queue) > 0 && l.queue[0].due <= now {
		id := l.queue[0].id
		l.queue = l.queue[1:]
		// In this order: the program speaks before the kernel writes, so what the
		// device has is in the events by now.
		at, ok, err := from.Look(id)
		if err != nil {
			return err
		}
		e, known, err := from.Newest(id)
		if err != nil {
			return err
		}
		last := l.newest[id]
		switch {
		case known && e.Boot > last.Boot:
			deliver(e)
			l.newest[id] = e
			l.queue = append(l.queue, lookAt{id, now + bpf.Window})
		case last.Boot+bpf.Window > now:
			l.queue = append(l.queue, lookAt{id, now + bpf.Window})
		default:
			delete(l.newest, id)
			settled(last, at, ok && known)
		}
	}
	return nil
}
