// SPDX-License-Identifier: MIT

package wgroam

import (
	"errors"
	"fmt"
	"slices"
	"sort"
	"sync"
	"time"
)

// HLC is a hybrid logical clock stamp: 48 bits of Unix milliseconds above a
// 16-bit counter. It orders observations across nodes; with no skew it is the
// wall clock time at which the kernel accepted the packet.
type HLC uint64

const hlcCounterBits = 16

// HLCAt returns the stamp of the wall clock time t with a zero counter. Times
// before 1970 give zero.
func HLCAt(t time.Time) HLC {
	ms := t.UnixMilli()
	if ms < 0 {
		return 0
	}
	return HLC(ms) << hlcCounterBits
}

// Time returns the wall clock part of the stamp.
func (h HLC) Time() time.Time { return time.UnixMilli(int64(h >> hlcCounterBits)) }

// ErrSkew is returned for a stamp that lies further in the future than the
// clock allows: the sender's clock is ahead, or ours is behind.
var ErrSkew = errors.New("stamp too far in the future")

// Clock stamps the observations of one node. The stamps that Stamp returns
// never go back, also when the wall clock does.
//
// A Clock is safe for concurrent use. Its zero value refuses every stamp that
// is ahead of the local clock; use NewClock.
type Clock struct {
	maxSkew time.Duration

	mu     sync.Mutex
	last   HLC     // newest stamp issued here
	merged []merge // those newer than all before them; both fields rise
}

// merge says: from at on, this node knew of hlc.
type merge struct {
	at  time.Time
	hlc HLC
}

// maxMerged bounds Clock.merged. An observation that waits in a queue while half
// as many records come in may find the merges that it should supersede
// forgotten: some 20 ms at 100 000 records a second.
const maxMerged = 4096

// NewClock returns a Clock that accepts stamps at most maxSkew ahead.
func NewClock(maxSkew time.Duration) *Clock { return &Clock{maxSkew: maxSkew} }

// Stamp returns the stamp for an observation that the kernel made at the given
// time, newer than every stamp issued before.
//
// It is newer than every stamp merged before that time, too: what a node sees
// after it has heard of a record supersedes the record, whatever the two wall
// clocks say. An observation that waited in a queue while a record came in
// gets no such bonus, because it is older than the record.
func (c *Clock) Stamp(at time.Time) HLC {
	c.mu.Lock()
	defer c.mu.Unlock()
	h := max(HLCAt(at), c.last+1)
	if n := sort.Search(len(c.merged), func(i int) bool { return at.Before(c.merged[i].at) }); n > 0 {
		h = max(h, c.merged[n-1].hlc+1)
	}
	c.last = h
	return h
}

// Merge takes note of a stamp that another node issued. The error wraps
// ErrSkew when the stamp is more than the permitted skew ahead of now; the
// clock is then left alone.
func (c *Clock) Merge(h HLC, now time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if ahead := h.Time().Sub(now); ahead > c.maxSkew {
		return fmt.Errorf("%w: %v ahead of this node's clock, %v allowed", ErrSkew, ahead.Round(time.Millisecond), c.maxSkew)
	}
	if n := len(c.merged); n > 0 {
		newest := c.merged[n-1]
		if h <= newest.hlc {
			return nil
		}
		if now.Before(newest.at) {
			now = newest.at // Two callers raced for the lock.
		}
		if n == maxMerged {
			c.merged = slices.Delete(c.merged, 0, n/2)
		}
	}
	c.merged = append(c.merged, merge{now, h})
	return nil
}

// MaxSkew is how far ahead of the local clock a stamp may be.
func (c *Clock) MaxSkew() time.Duration { return c.maxSkew }

// Limit is the newest stamp that others with the right time accept now.
func (c *Clock) Limit(now time.Time) HLC { return HLCAt(now.Add(c.maxSkew)) }

// Ahead reports whether the clock goes on from a stamp that others would refuse
// now. It does when the wall clock was ahead and has been set back.
func (c *Clock) Ahead(now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	limit := c.Limit(now)
	return c.last > limit || len(c.merged) > 0 && c.merged[len(c.merged)-1].hlc > limit
}

// Rewind makes stamps follow the wall clock again after it has been set back to
// now: others would refuse those that go on from where it was.
//
// What was stamped no further ahead than they permit they have taken, or still
// will. The next stamp must be newer than that, or an observation of a peer loses
// to an earlier one of this node. So stamps go on from there, and are ahead until
// the wall clock is.
func (c *Clock) Rewind(now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	limit := c.Limit(now)
	c.last = min(c.last, limit)
	n := sort.Search(len(c.merged), func(i int) bool { return c.merged[i].hlc > limit })
	c.merged = c.merged[:n]
}

// SetBack returns by how much the wall clock has been set back between two
// readings of time.Now; zero if it was not.
func SetBack(from, to time.Time) time.Duration {
	return max(0, to.Sub(from)-to.Round(0).Sub(from.Round(0))) // Round takes the monotonic reading away
}
