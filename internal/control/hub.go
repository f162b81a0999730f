// SPDX-License-Identifier: MIT

package control

import "sync"

// queued is how many events wait for one watch client. A client that falls
// further behind is told how many it has missed.
const queued = 1024

// Hub hands events, and the progress of promotions, to the watch clients. Publish never waits for any of them.
//
// A Hub is safe for concurrent use.
type Hub struct {
	mu      sync.Mutex
	readers map[*reader]struct{}
}

// NewHub returns a Hub without clients.
func NewHub() *Hub { return &Hub{readers: make(map[*reader]struct{})} }

// Publish hands e to all clients that watch now.
func (h *Hub) Publish(e Event) { h.publish(e, false) }

// Progress hands p to the clients that have asked for promotions as well.
func (h *Hub) Progress(p Progress) { h.publish(p, true) }

func (h *Hub) publish(line any, promotion bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for r := range h.readers {
		if r.promotions || !promotion {
			r.add(line)
		}
	}
}

// subscribe returns a reader of all events from now on, until unsubscribe, and of
// promotions, if it is to hear of them.
func (h *Hub) subscribe(promotions bool) *reader {
	r := &reader{ready: make(chan struct{}, 1), promotions: promotions}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.readers[r] = struct{}{}
	return r
}

func (h *Hub) unsubscribe(r *reader) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.readers, r)
}

// reader is the queue of one client.
type reader struct {
	ready      chan struct{} // delivers when there is something to take
	promotions bool

	mu     sync.Mutex
	lines  []any // an Event or a Progress each
	missed uint64
}

func (r *reader) add(line any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.lines) < queued {
		r.lines = append(r.lines, line)
	} else {
		r.missed++
	}
	select {
	case r.ready <- struct{}{}:
	default:
	}
}

// take empties the queue. The missed lines came after the returned ones, and
// before all that take will return later.
func (r *reader) take() (lines []any, missed uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	lines, missed = r.lines, r.missed
	r.lines, r.missed = nil, 0
	return lines, missed
}
