// SPDX-License-Identifier: MIT

package wgroam

import (
	"sync"
	"time"
)

// Waits notes since when peers have been waiting for something, to tell how long
// it took. It is as large as what waits.
//
// A Waits is safe for concurrent use.
type Waits struct {
	mu    sync.Mutex
	since map[Key]time.Time
}

// NewWaits returns a Waits for which nobody waits.
func NewWaits() *Waits { return &Waits{since: make(map[Key]time.Time)} }

// Begin notes that a peer waits from now on, unless it does already.
func (w *Waits) Begin(k Key, now time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, ok := w.since[k]; !ok {
		w.since[k] = now
	}
}

// End notes that a peer waits no more, and returns how long it has; ok is false
// if it has not.
func (w *Waits) End(k Key, now time.Time) (waited time.Duration, ok bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	since, ok := w.since[k]
	if !ok {
		return 0, false
	}
	delete(w.since, k)
	return now.Sub(since), true
}
