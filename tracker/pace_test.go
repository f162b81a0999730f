// SPDX-License-Identifier: MIT

package tracker

import (
	"testing"
	"time"
)

// TestPace: work that is asked for all the time gets a tenth of the time, and
// the first piece after a quiet time does not wait.
func TestPace(t *testing.T) {
	for _, test := range []struct{ took, least, most, between time.Duration }{
		{took: time.Millisecond, least: 200 * time.Millisecond, most: time.Minute, between: 200 * time.Millisecond},
		{took: 50 * time.Millisecond, least: 200 * time.Millisecond, most: time.Minute, between: 450 * time.Millisecond},
		{took: 5 * time.Second, least: 200 * time.Millisecond, most: time.Minute, between: 45 * time.Second},
		{took: 5 * time.Second, most: time.Minute, between: 45 * time.Second},
		{took: time.Hour, most: time.Minute, between: time.Minute},
	} {
		p := pace{least: test.least, most: test.most}
		now := time.Now()
		if rest := p.rest(now); rest > 0 {
			t.Errorf("rests %v before the first piece", rest)
		}
		var worked, waited time.Duration
		for range 10 {
			p.did(now, now.Add(test.took))
			now = now.Add(test.took)
			worked += test.took
			rest := p.rest(now)
			if rest != test.between {
				t.Errorf("rests %v after %v of work, want %v", rest, test.took, test.between)
			}
			waited += rest
			now = now.Add(rest)
		}
		if share := float64(worked) / float64(worked+waited); share > 0.1 && test.between < test.most {
			t.Errorf("pieces of %v take %.2f of the time", test.took, share)
		}
		if rest := p.rest(now.Add(time.Hour)); rest > 0 {
			t.Errorf("rests %v after a quiet hour", rest)
		}
	}
}

// TestPaceStopped: a daemon that was stopped in the middle of a piece does not rest for the
// time in which it could not work.
func TestPaceStopped(t *testing.T) {
	p := pace{least: 200 * time.Millisecond, most: 10 * time.Second}
	now := time.Now()
	for i, c := range []struct{ took, rest time.Duration }{
		{3 * time.Millisecond, 200 * time.Millisecond},
		{30 * time.Second, 200 * time.Millisecond},
		{3 * time.Millisecond, 200 * time.Millisecond},
		// What stays slow is.
		{time.Second, 200 * time.Millisecond},
		{time.Second, 9 * time.Second},
		{120 * time.Millisecond, 1080 * time.Millisecond},
		{30 * time.Second, 1080 * time.Millisecond},
	} {
		p.did(now, now.Add(c.took))
		now = now.Add(c.took)
		if rest := p.rest(now); rest != c.rest {
			t.Errorf("piece %d, of %v: rests %v, want %v", i, c.took, rest, c.rest)
		}
	}
}
