// SPDX-License-Identifier: MIT

package wgroam

import (
	"testing"
	"time"
)

// TestWaits: who waits already goes on waiting, and who has come to an end begins anew.
func TestWaits(t *testing.T) {
	w, at, a, b := NewWaits(), time.Unix(1000, 0), Key{1}, Key{2}
	w.Begin(a, at)
	w.Begin(b, at.Add(time.Second))
	w.Begin(a, at.Add(2*time.Second))
	for _, tc := range []struct {
		peer Key
		want time.Duration
		ok   bool
	}{{a, 3 * time.Second, true}, {a, 0, false}, {b, 2 * time.Second, true}, {Key{3}, 0, false}} {
		if got, ok := w.End(tc.peer, at.Add(3*time.Second)); got != tc.want || ok != tc.ok {
			t.Errorf("%v: waited %v, %v, want %v, %v", tc.peer, got, ok, tc.want, tc.ok)
		}
	}
	w.Begin(a, at.Add(4*time.Second))
	if got, ok := w.End(a, at.Add(5*time.Second)); got != time.Second || !ok {
		t.Errorf("the second time: waited %v, %v", got, ok)
	}
}
