// SPDX-License-Identifier: MIT

package tracker

import (
	"context"
	"errors"
	"testing"
)

// TestFlusher: an earlier flush does not let go who waits for a later one.
func TestFlusher(t *testing.T) {
	var f flusher
	flush := func(n uint64) func() (uint64, error) { return func() (uint64, error) { return n, nil } }
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	check := func(what string, ctx context.Context, n uint64, want bool) {
		t.Helper()
		if done, err := f.wait(ctx, flush(n)); done != want || err != nil {
			t.Errorf("%s: done: %v, error %v", what, done, err)
		}
	}
	check("nothing flushed", ended, 1, false)
	f.reach(1)
	check("flushed before", t.Context(), 1, true)
	check("the next one", ended, 2, false)
	check("a timeout", t.Context(), 2, false)
	go func() { f.reach(1); f.reach(3) }()
	check("while waiting", t.Context(), 3, true)
	f.reach(2)
	check("late news of an earlier one", t.Context(), 3, true)

	broken := func() (uint64, error) { return 0, errors.New("closed") }
	if done, err := f.wait(t.Context(), broken); done || err == nil {
		t.Errorf("an error: done: %v, error %v", done, err)
	}
	f.end()
	check("the end", t.Context(), 99, true)
	if done, err := f.wait(t.Context(), broken); !done || err != nil {
		t.Errorf("after the end: done: %v, error %v", done, err)
	}
}
