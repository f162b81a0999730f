// SPDX-License-Identifier: MIT

package tracker

import (
	"context"
	"math"
	"sync"
	"time"
)

// barrierWait is how long a barrier waits. So much may come in that there is
// always more to read.
const barrierWait = 500 * time.Millisecond

// flusher lets others wait until a ring buffer has been emptied. Each flush has a
// number, so that none is taken for one that was asked for later.
//
// The zero value is ready for use.
type flusher struct {
	mu      sync.Mutex
	reached uint64
	grown   chan struct{} // closed when reached grows; nil while nobody waits
}

// reach notes that the flush with a number, and those before it, are done.
func (f *flusher) reach(number uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.reached = max(f.reached, number)
	if f.grown != nil {
		close(f.grown)
		f.grown = nil
	}
}

// end lets everybody go, now and in future: there will be nothing more to read.
func (f *flusher) end() { f.reach(math.MaxUint64) }

// wait reports whether a flush is done, which returns its number. It does not wait
// for long.
func (f *flusher) wait(ctx context.Context, flush func() (uint64, error)) (done bool, err error) {
	number, err := flush()
	timeout := time.NewTimer(barrierWait)
	defer timeout.Stop()
	for {
		f.mu.Lock()
		if f.reached == math.MaxUint64 {
			err = nil // of what has been closed
		}
		if err != nil || f.reached >= number {
			f.mu.Unlock()
			return err == nil, err
		}
		if f.grown == nil {
			f.grown = make(chan struct{})
		}
		grown := f.grown
		f.mu.Unlock()
		select {
		case <-grown:
		case <-timeout.C:
			return false, nil
		case <-ctx.Done():
			return false, nil
		}
	}
}
