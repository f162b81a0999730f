// SPDX-License-Identifier: MIT

package wgroam

import "sync"

// Changes is the set of peers that a consumer has yet to look at, oldest first.
// A peer that changes again while it waits stays one entry: churn coalesces,
// and memory is bounded by the number of peers.
//
// A Changes is safe for concurrent use.
type Changes struct {
	ready chan struct{}

	mu      sync.Mutex
	waiting map[Key]struct{}
	order   []Key
}

// NewChanges returns an empty set.
func NewChanges() *Changes {
	return &Changes{ready: make(chan struct{}, 1), waiting: make(map[Key]struct{})}
}

// Mark adds a peer.
func (c *Changes) Mark(k Key) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.waiting[k]; ok {
		return
	}
	c.waiting[k] = struct{}{}
	c.order = append(c.order, k)
	c.signal()
}

// Ready returns a channel that delivers after peers have been marked. One
// delivery may stand for many peers; call Take until it returns none.
func (c *Changes) Ready() <-chan struct{} { return c.ready }

// Take removes and returns at most limit peers. When more remain, Ready
// delivers again.
func (c *Changes) Take(limit int) []Key {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := min(limit, len(c.order))
	out := make([]Key, n)
	copy(out, c.order)
	for _, k := range out {
		delete(c.waiting, k)
	}
	c.order = c.order[n:]
	if len(c.order) == 0 {
		// Let go of what a storm has made them.
		c.order, c.waiting = nil, make(map[Key]struct{})
	} else {
		c.signal()
	}
	return out
}

// Len returns the number of waiting peers.
func (c *Changes) Len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.order)
}

func (c *Changes) signal() {
	select {
	case c.ready <- struct{}{}:
	default:
	}
}
