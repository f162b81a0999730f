// SPDX-License-Identifier: MIT

package wgroam

import (
	"errors"
	"math"
	"slices"
	"sync"
	"testing"
	"time"
	"unsafe"

	"pgregory.net/rapid"
)

var started = time.Now()

// moment returns a time on this machine: elapsed since the test started, when
// the wall clock has been set forward by step. Times that a program reads look
// like this after a step, and package time has no other way to make them.
func moment(elapsed, step time.Duration) time.Time {
	t := started.Add(elapsed + step)
	// struct{ wall uint64; ext int64; loc *Location }, where ext is the
	// monotonic reading (time/time.go).
	*(*int64)(unsafe.Add(unsafe.Pointer(&t), 8)) -= int64(step)
	return t
}

func TestMoment(t *testing.T) {
	a, b := moment(time.Second, 0), moment(2*time.Second, -time.Hour)
	if d := b.Sub(a); d != time.Second {
		t.Fatalf("%v have elapsed", d)
	}
	if d := b.Round(0).Sub(a.Round(0)); d != time.Second-time.Hour {
		t.Fatalf("the wall clock has moved by %v", d)
	}
}

// genStep draws where the wall clock is set to, in steps of whole milliseconds
// and more.
var genStep = rapid.Map(rapid.OneOf(
	rapid.Just(0), rapid.IntRange(-3, 3), rapid.IntRange(-20_000, 20_000), rapid.IntRange(-3_600_000, 3_600_000),
), func(ms int) time.Duration { return time.Duration(ms) * time.Millisecond })

// TestClock drives a clock through everything that can happen to it, and knows
// what each stamp must be.
func TestClock(t *testing.T) {
	const maxSkew = 10 * time.Second
	rapid.Check(t, func(t *rapid.T) {
		type merged struct {
			at  time.Duration
			hlc HLC
		}
		var (
			c       = NewClock(maxSkew)
			elapsed time.Duration
			step    time.Duration
			last    HLC
			merges  []merged
		)
		t.Repeat(map[string]func(*rapid.T){
			"": func(t *rapid.T) { elapsed += time.Duration(rapid.IntRange(0, 3000).Draw(t, "µs")) * time.Microsecond },
			"step": func(t *rapid.T) {
				step = genStep.Draw(t, "step")
			},
			"stamp": func(t *rapid.T) {
				// Observations wait in queues, and come out of them in disorder.
				seen := elapsed - time.Duration(rapid.OneOf(rapid.Just(0), rapid.IntRange(0, 5000)).Draw(t, "queued µs"))*time.Microsecond
				at := moment(seen, step)
				want := max(HLCAt(at), last+1)
				for _, m := range merges {
					if m.at <= seen {
						want = max(want, m.hlc+1)
					}
				}
				got := c.Stamp(at)
				if got != want {
					t.Fatalf("the stamp is %x, want %x", got, want)
				}
				if got <= last {
					t.Fatalf("the stamp goes from %x back to %x", last, got)
				}
				last = got
			},
			"merge": func(t *rapid.T) {
				now := moment(elapsed, step)
				ahead := time.Duration(rapid.OneOf(
					rapid.IntRange(-5, 5), rapid.IntRange(9_995, 10_005), rapid.IntRange(-60_000, 60_000),
				).Draw(t, "ahead ms")) * time.Millisecond
				h := HLCAt(now.Add(ahead)) + HLC(rapid.Uint16().Draw(t, "counter"))
				err := c.Merge(h, now)
				if refuse := h.Time().Sub(now) > maxSkew; refuse != errors.Is(err, ErrSkew) || refuse != (err != nil) {
					t.Fatalf("%v ahead: %v", h.Time().Sub(now), err)
				}
				if err == nil {
					merges = append(merges, merged{elapsed, h})
				}
			},
		})
	})
}

// TestClockQueued is the case for which a clock remembers more than the newest
// merge: an observation that is newer than one merge and older than the next.
func TestClockQueued(t *testing.T) {
	c := NewClock(10 * time.Second)
	first, second := HLCAt(moment(5*time.Second, 0)), HLCAt(moment(6*time.Second, 0))
	if err := errors.Join(c.Merge(first, moment(1*time.Millisecond, 0)), c.Merge(second, moment(3*time.Millisecond, 0))); err != nil {
		t.Fatal(err)
	}
	if got := c.Stamp(moment(0, 0)); got != HLCAt(moment(0, 0)) {
		t.Errorf("older than both: %v, want the time it was made", got.Time())
	}
	if got := c.Stamp(moment(2*time.Millisecond, 0)); got != first+1 {
		t.Errorf("between the two: %v, want the first and one", got.Time())
	}
	if got := c.Stamp(moment(4*time.Millisecond, 0)); got != second+1 {
		t.Errorf("newer than both: %v, want the second and one", got.Time())
	}
}

// TestClockRace: two callers may get the lock in the other order than the time.
func TestClockRace(t *testing.T) {
	c := NewClock(10 * time.Second)
	first, second := HLCAt(moment(5*time.Second, 0)), HLCAt(moment(6*time.Second, 0))
	if err := errors.Join(c.Merge(first, moment(3*time.Millisecond, 0)), c.Merge(second, moment(1*time.Millisecond, 0))); err != nil {
		t.Fatal(err)
	}
	if got := c.Stamp(moment(2*time.Millisecond, 0)); got != HLCAt(moment(2*time.Millisecond, 0)) {
		t.Errorf("older than one of the two: %v, want the time it was made", got.Time())
	}
	if got := c.Stamp(moment(3*time.Millisecond, 0)); got != second+1 {
		t.Errorf("newer than both: %v, want the second and one", got.Time())
	}
}

// TestClockForgets: the memory of merges is bounded, and what is left of it is
// the newest.
func TestClockForgets(t *testing.T) {
	c := NewClock(10 * time.Second)
	hlc := func(i int) HLC { return HLCAt(moment(5*time.Second, 0)) + HLC(i) }
	const merges = 2*maxMerged + 1 // The last one finds no room.
	for i := range merges {
		if err := c.Merge(hlc(i), moment(time.Duration(i)*time.Microsecond, 0)); err != nil {
			t.Fatal(err)
		}
	}
	if len(c.merged) > maxMerged || cap(c.merged) > 2*maxMerged {
		t.Errorf("%d merges in memory, room for %d", len(c.merged), cap(c.merged))
	}
	i := merges - maxMerged/2 // as much as is promised
	if got, want := c.Stamp(moment(time.Duration(i)*time.Microsecond, 0)), hlc(i)+1; got != want {
		t.Errorf("the stamp is %x, want %x", got, want)
	}
	if got, want := c.Stamp(moment(merges*time.Microsecond, 0)), hlc(merges-1)+1; got != want {
		t.Errorf("the stamp is %x, want %x", got, want)
	}
}

func TestClockSkew(t *testing.T) {
	now := time.Date(2026, 11, 23, 7, 0, 0, 0, time.UTC)
	for _, tt := range []struct {
		maxSkew, ahead time.Duration
		ok             bool
	}{
		{10 * time.Second, 10 * time.Second, true},
		{10 * time.Second, 10*time.Second + time.Millisecond, false},
		{10 * time.Second, -time.Hour, true},
		{0, 0, true},
		{0, time.Millisecond, false},
	} {
		c := NewClock(tt.maxSkew)
		h := HLCAt(now.Add(tt.ahead))
		err := c.Merge(h, now)
		if (err == nil) != tt.ok || err != nil && !errors.Is(err, ErrSkew) {
			t.Errorf("%v ahead, %v allowed: %v", tt.ahead, tt.maxSkew, err)
		}
		want := HLCAt(now)
		if tt.ok {
			want = max(want, h+1)
		}
		if got := c.Stamp(now); got != want {
			t.Errorf("%v ahead, %v allowed: the next stamp is %v, want %v", tt.ahead, tt.maxSkew, got.Time(), want.Time())
		}
	}
	// Whatever comes from outside.
	if err := NewClock(10*time.Second).Merge(math.MaxUint64, now); !errors.Is(err, ErrSkew) {
		t.Errorf("the end of time: %v", err)
	}
	if err := NewClock(10*time.Second).Merge(0, now); err != nil {
		t.Errorf("the beginning of time: %v", err)
	}
}

// TestClockSetBack: stamps that were made with a clock an hour ahead do not go on
// when it has been set right, and those that others accept never go back.
func TestClockSetBack(t *testing.T) {
	const skew = 10 * time.Second
	right := time.Date(2026, 11, 23, 7, 0, 0, 0, time.UTC)
	c := NewClock(skew)
	ahead := right.Add(time.Hour)
	c.Stamp(ahead)
	if err := c.Merge(HLCAt(ahead.Add(time.Second)), ahead); err != nil {
		t.Fatal(err)
	}
	if c.Ahead(ahead) || !c.Ahead(right) {
		t.Errorf("ahead of its own time: %v; of the right time: %v", c.Ahead(ahead), c.Ahead(right))
	}
	c.Rewind(right)
	other := NewClock(skew)
	for i := range 3 {
		at := right.Add(time.Duration(i) * time.Millisecond)
		if h := c.Stamp(at); other.Merge(h, at) != nil {
			t.Errorf("stamp %d is refused: %v at %v", i, h.Time(), at)
		}
	}
	if c.Ahead(right.Add(time.Second)) {
		t.Error("still ahead")
	}

	// What the others took while the clock was ahead does not win over what
	// comes now.
	edge := NewClock(skew)
	taken := edge.Stamp(right.Add(skew))
	if err := other.Merge(taken, right); err != nil {
		t.Fatal(err)
	}
	edge.Stamp(ahead)
	edge.Rewind(right)
	if next := edge.Stamp(right); next <= taken || other.Merge(next, right) != nil {
		t.Errorf("stamp %v after %v", next.Time(), taken.Time())
	}

	// A step that others do not mind.
	small := NewClock(skew)
	first := small.Stamp(right.Add(skew / 2))
	if small.Ahead(right) {
		t.Error("a small step counts")
	}
	if next := small.Stamp(right); next <= first {
		t.Errorf("stamp %x after %x", next, first)
	}
}

func TestSetBack(t *testing.T) {
	now := time.Now()
	if got := SetBack(now, now.Add(time.Hour)); got != 0 {
		t.Errorf("time goes by: %v", got)
	}
	// Without a monotonic reading nothing can be told.
	if got := SetBack(now.Round(0), now.Round(0).Add(-time.Hour)); got != 0 {
		t.Errorf("no reading of the monotonic clock: %v", got)
	}
}

func TestHLC(t *testing.T) {
	at := time.Date(2026, 11, 23, 7, 0, 0, 123_456_789, time.UTC)
	if got, want := HLCAt(at).Time(), at.Truncate(time.Millisecond); !got.Equal(want) {
		t.Errorf("%v, want %v", got, want)
	}
	if got := HLCAt(at) & (1<<16 - 1); got != 0 {
		t.Errorf("the counter begins at %d", got)
	}
	if got := HLCAt(time.Date(1969, 1, 1, 0, 0, 0, 0, time.UTC)); got != 0 {
		t.Errorf("before 1970: %x", got)
	}
	if a, b := HLCAt(at), HLCAt(at.Add(time.Millisecond)); b != a+1<<16 {
		t.Errorf("a millisecond is %x", b-a)
	}
}

// TestClockConcurrently: no two callers get the same stamp.
func TestClockConcurrently(t *testing.T) {
	const callers, each = 8, 2000
	c := NewClock(10 * time.Second)
	stamps := make([][]HLC, callers)
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() {
			for range each {
				now := time.Now()
				stamps[i] = append(stamps[i], c.Stamp(now))
				if err := c.Merge(HLCAt(now.Add(time.Second)), now); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	for _, s := range stamps {
		if !slices.IsSorted(s) {
			t.Error("a caller's stamps go back")
		}
	}
	all := slices.Concat(stamps...)
	slices.Sort(all)
	if n := len(slices.Compact(all)); n != callers*each {
		t.Errorf("%d different stamps, want %d", n, callers*each)
	}
}

func BenchmarkClock(b *testing.B) {
	c := NewClock(10 * time.Second)
	now := time.Now()
	for i := 0; b.Loop(); i++ {
		if err := c.Merge(HLCAt(now)+HLC(2*i), now); err != nil {
			b.Fatal(err)
		}
		c.Stamp(now)
	}
}
