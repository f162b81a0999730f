// SPDX-License-Identifier: MIT

package wgroam

import (
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// TestChanges: a peer waits once, however often it changes, in the order of the
// first change; and when peers wait, a consumer that goes by Ready and Take is
// not left waiting.
func TestChanges(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := NewChanges()
		var want []Key
		told := false // the consumer has heard from Ready and may Take
		t.Repeat(map[string]func(*rapid.T){
			"": func(t *rapid.T) {
				if c.Len() != len(want) {
					t.Fatalf("%d peers wait, want %d", c.Len(), len(want))
				}
				if len(want) > 0 && !told && len(c.Ready()) == 0 {
					t.Fatalf("%d peers wait, and nobody says so", len(want))
				}
			},
			"mark": func(t *rapid.T) {
				k := genPeer.Draw(t, "peer")
				c.Mark(k)
				if !slices.Contains(want, k) {
					want = append(want, k)
				}
			},
			"ready": func(*rapid.T) {
				select {
				case <-c.Ready():
					told = true
				default:
				}
			},
			"take": func(t *rapid.T) {
				limit := rapid.IntRange(0, 9).Draw(t, "limit")
				got := c.Take(limit)
				n := min(limit, len(want))
				if diff := cmp.Diff(want[:n:n], got, cmp.Transformer("", func(k []Key) string { return string(concat(k)) })); diff != "" {
					t.Fatalf("(-want +got):\n%s", diff)
				}
				want = want[n:]
				told = false // Who stops here must be told again, if there is more.
			},
		})
	})
}

func concat(keys []Key) (b []byte) {
	for _, k := range keys {
		b = append(b, k[:]...)
	}
	return b
}

// TestChangesConcurrently: whatever the producers do last to a peer, the
// consumer looks at it afterwards.
func TestChangesConcurrently(t *testing.T) {
	for name, tt := range map[string]struct {
		limit int
		drain bool // until there is nothing, or once per Ready
	}{
		"drain":    {7, true},
		"one take": {3, false},
		"one":      {1, false},
	} {
		t.Run(name, func(t *testing.T) {
			const producers, peers, each = 4, 32, 5000
			c := NewChanges()
			var state [peers]atomic.Int64
			var wg sync.WaitGroup
			for p := range producers {
				wg.Go(func() {
					for i := range each {
						k := (i*7 + p*11) % peers
						state[k].Add(1)
						c.Mark(Key{byte(k)})
					}
				})
			}
			defer wg.Wait()

			var seen [peers]int64
			complete := func() bool {
				sum := int64(0)
				for _, n := range seen {
					sum += n
				}
				return sum == producers*each
			}
			timeout := time.After(30 * time.Second)
			for !complete() {
				select {
				case <-c.Ready():
				case <-timeout:
					t.Fatalf("nobody says that %d peers wait; seen %v", c.Len(), seen)
				}
				for {
					keys := c.Take(tt.limit)
					for _, k := range keys {
						seen[k[0]] = state[k[0]].Load()
					}
					if !tt.drain || len(keys) == 0 {
						break
					}
				}
			}
		})
	}
}

// TestChangesBounded: churn takes no memory, and a storm gives it back.
func TestChangesBounded(t *testing.T) {
	c := NewChanges()
	for i := range 100_000 {
		c.Mark(Key{byte(i % 10)})
		if i%3 == 0 {
			c.Take(1)
		}
	}
	if c.Len() > 10 || cap(c.order) > 1000 || len(c.waiting) != c.Len() {
		t.Errorf("%d peers wait, with room for %d, and %d in the set", c.Len(), cap(c.order), len(c.waiting))
	}
	for i := range 1000 {
		c.Mark(Key{1, byte(i >> 8), byte(i)})
	}
	for len(c.Take(100)) > 0 {
	}
	if cap(c.order) > 0 {
		t.Errorf("after a storm there is room for %d peers", cap(c.order))
	}
}

func BenchmarkChanges(b *testing.B) {
	c := NewChanges()
	for i := 0; b.Loop(); i++ {
		c.Mark(Key{byte(i), byte(i >> 8)})
		if i%64 == 63 {
			c.Take(64)
		}
	}
}
