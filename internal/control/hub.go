// SPDX-License-Identifier: MIT

package control

import "sync"

// queued is how many events wait for one watch client. A client that falls
// further behind is told how many it has missed.
const queued = 1024

// Hub hands events to the watch clients. Publish never waits for any of them.
//
// A Hub is safe for concurrent use.
type Hub struct {
	mu      sync.Mutex
	readers map[*reader]struct{}
}

// NewHub returns a Hub without clients.
func NewHub() *Hub { return &Hub{readers: make(map[*reader]struct{})} }

// Publish hands e to all clients that watch now.
func (h *Hub) Publish(e Event) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for r := range h.readers {
		r.add(e)
	}
}

// subscribe returns a reader of all events from now on, until unsubscribe.
func (h *Hub) subscribe() *reader {
	r := &reader{ready: make(chan struct{}, 1)}
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
	ready chan struct{} // delivers when there is something to take

	mu     sync.Mutex
	events []Event
	missed uint64
}

func (r *reader) add(e Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.events) < queued {
		r.events = append(r.events, e)
	} else {
		r.missed++
	}
	select {
	case r.ready <- struct{}{}:
	default:
	}
}

// take empties the queue. The missed events came after the returned ones, and
// before all that take will return later.
func (r *reader) take() (events []Event, missed uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	events, missed = r.events, r.missed
	r.events, r.missed = nil, 0
	return events, missed
}
