// SPDX-License-Identifier: MIT

package bpf

import (
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
)

// FlushedError is what Read returns after a Flush: all events from before the call
// have been read that returned Number, and from before those with a smaller one.
type FlushedError struct{ Number uint64 }

func (e *FlushedError) Error() string { return fmt.Sprintf("flush %d: no more events", e.Number) }
func (e *FlushedError) Unwrap() error { return ringbuf.ErrFlushed }

// ring is a ring buffer that numbers its flushes.
type ring struct {
	*ringbuf.Reader
	asked atomic.Uint64
}

func openRing(m *ebpf.Map) (*ring, error) {
	r, err := ringbuf.NewReader(m)
	if err != nil {
		return nil, fmt.Errorf("open ring buffer: %w", err)
	}
	return &ring{Reader: r}, nil
}

// ReadInto returns a FlushedError where the Reader returns ErrFlushed.
func (r *ring) ReadInto(record *ringbuf.Record) error {
	// Before the ring buffer is found empty, in this call, those were there for which
	// these have asked.
	n := r.asked.Load()
	err := r.Reader.ReadInto(record)
	if !errors.Is(err, ringbuf.ErrFlushed) {
		return err
	}
	if r.asked.Load() != n {
		// The reader wakes up once for several.
		if err := r.Reader.Flush(); err != nil {
			return err
		}
	}
	return &FlushedError{n}
}

// Flush returns the number of the FlushedError to wait for, or a greater one.
func (r *ring) Flush() (uint64, error) {
	n := r.asked.Add(1)
	if err := r.Reader.Flush(); err != nil {
		return 0, fmt.Errorf("flush ring buffer: %w", err)
	}
	return n, nil
}
