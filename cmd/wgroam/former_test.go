// SPDX-License-Identifier: MIT

package main

import (
	"log/slog"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/wgroam/wgroam/internal/feed"
)

// TestRekeyed gives a device one private key after the other.
func TestRekeyed(t *testing.T) {
	var keys []feed.Keys
	number := make(map[string]int)
	for i := range 4 {
		k, err := feed.Derive([32]byte{8, byte(i)}, nil)
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, k)
		number[k.Group()] = i
	}
	d := &device{log: slog.New(slog.DiscardHandler)}
	start := time.Now()
	for i, step := range []struct {
		key   int
		after time.Duration
		want  []int
	}{
		{0, 0, nil},
		{0, time.Minute, nil},                     // a session more
		{1, time.Hour, []int{0}},                  // rolled
		{0, 2 * time.Hour, []int{1}},              // and back
		{2, 3 * time.Hour, []int{1, 0}},           // once more
		{3, 4 * time.Hour, []int{0, 2}},           // no more than two
		{3, 3*time.Hour + formerFor, []int{2}},    // the older one has had its time
		{3, 4*time.Hour + formerFor, []int(nil)},  // both have
		{3, 40*time.Hour + formerFor, []int(nil)}, // for good
	} {
		var got []int
		for _, f := range d.rekeyed(keys[step.key], start.Add(step.after)) {
			got = append(got, number[f.Group()])
		}
		if diff := cmp.Diff(step.want, got); diff != "" {
			t.Errorf("step %d: former keys (-want +got)\n%s", i, diff)
		}
	}
}
