// SPDX-License-Identifier: MIT

package publisher

import (
	"testing"
	"time"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/feed"
)

func ask(node, boot, seq int) *feed.Request {
	return &feed.Request{Header: feed.Header{Node: wgroam.NodeID(node), Boot: uint64(boot), Seq: uint64(seq)}}
}

func TestRequestsOnePerNode(t *testing.T) {
	q, now := newRequests(), time.Unix(1000, 0)
	q.addAt(ask(1, 1, 1), now)
	q.addAt(ask(2, 1, 1), now)
	newest := ask(1, 1, 2)
	q.addAt(newest, now)
	select {
	case <-q.ready:
	default:
		t.Error("does not say that there is something")
	}
	if r := q.next(); r != newest {
		t.Errorf("got %+v, want the newest", r)
	}
	if r := q.next(); r == nil || r.Node != 2 {
		t.Errorf("got %+v", r)
	}
	if r := q.next(); r != nil {
		t.Errorf("got %+v", r)
	}
}

func TestRequestsReplayed(t *testing.T) {
	q, now := newRequests(), time.Unix(1000, 0)
	take := func(r *feed.Request) bool {
		q.addAt(r, now)
		return q.next() == r
	}
	for _, tc := range []struct {
		boot, seq int
		want      bool
	}{{5, 3, true}, {5, 3, false}, {5, 2, false}, {5, 4, true}, {4, 1, true}, {4, 1, false}} {
		if got := take(ask(1, tc.boot, tc.seq)); got != tc.want {
			t.Errorf("boot %d, seq %d: accepted is %v", tc.boot, tc.seq, got)
		}
	}
}

// TestRequestsUnproven: recordings of former lives of a node, by turns and over and
// over, get one answer each, and take nothing from the node itself, whether it is
// proven or has just begun another life.
func TestRequestsUnproven(t *testing.T) {
	for _, former := range []int{2, 5 * maxLives} {
		q, now := newRequests(), time.Unix(1000, 0)
		const seconds, each, recorded = 120, 10, 3
		var recordings, proven, restarted int
		const live = 1000
		for i := range seconds * each {
			now = now.Add(time.Second / each)
			for boot := range former {
				r := ask(1, boot+1, 1+i%recorded)
				r.Unproven = true
				q.addAt(r, now)
			}
			q.addAt(ask(2, live, i+1), now)
			for boot := range former {
				r := ask(2, boot+1, 1+i%recorded)
				r.Unproven = true
				q.addAt(r, now)
			}
			var waits *feed.Request
			if i%each == 0 { // as it does until it has an answer
				waits = ask(1, live, i+1)
				waits.Unproven = true
				q.addAt(waits, now)
			}
			for r := q.next(); r != nil; r = q.next() {
				switch {
				case r.Boot != live:
					recordings++
				case r.Node == 2:
					proven++
				case r == waits:
					restarted++
				}
				if r.Unproven {
					q.sentAt(r, 1000, now)
				}
			}
		}
		if recordings > 2*former*recorded {
			t.Errorf("%d former lives: recordings were answered %d times", former, recordings)
		}
		if proven != seconds*each {
			t.Errorf("%d former lives: the node itself was answered %d times of %d", former, proven, seconds*each)
		}
		if restarted < seconds/2 {
			t.Errorf("%d former lives: the node that restarted was answered %d times of %d", former, restarted, seconds)
		}
	}
}

// TestRequestsClockSetBack: the present life of a node is the oldest by its clock,
// and the only one that has anything new to ask.
func TestRequestsClockSetBack(t *testing.T) {
	q, now := newRequests(), time.Unix(1000, 0)
	answered, proven := 0, 0
	for i := range 100 {
		now = now.Add(time.Second / 10)
		q.addAt(ask(2, 1, i+1), now)
		for boot := range 3 * maxLives {
			r := ask(2, 2+boot, 1+i)
			r.Unproven = true
			q.addAt(r, now)
		}
		for boot := 2; boot <= maxLives; boot++ {
			r := ask(1, boot, 1+i)
			r.Unproven = true
			q.addAt(r, now)
		}
		live := ask(1, 1, 1+i)
		live.Unproven = true
		q.addAt(live, now)
		for r := q.next(); r != nil; r = q.next() {
			switch {
			case r == live:
				answered++
			case r.Node == 2 && r.Boot == 1:
				proven++
			}
		}
	}
	if proven != 100 {
		t.Errorf("the proven life was answered %d times of 100", proven)
	}
	if least := 10 / maxLives; answered < least {
		t.Errorf("answered %d times in 10 s, want %d", answered, least)
	}
}

func TestRequestsRate(t *testing.T) {
	q, now := newRequests(), time.Unix(1000, 0)
	answers, seq := 0, 0
	for range 1000 { // one every millisecond
		seq++
		now = now.Add(time.Millisecond)
		q.addAt(ask(1, 1, seq), now)
		if q.next() != nil {
			answers++
		}
	}
	if answers < 19 || answers > 20 {
		t.Errorf("%d answers in a second, want 10 at once and 10 a second", answers)
	}
	now = now.Add(time.Hour)
	for range 100 {
		seq++
		q.addAt(ask(1, 1, seq), now)
		if q.next() != nil {
			answers++
		}
	}
	if answers < 29 || answers > 30 {
		t.Errorf("%d answers after a pause, want 10 more", answers)
	}
}

// TestRequestsOfAll: a node that asks for a large table all the time, over and over,
// gets no more than so many records a second, with all the lives that it says to have.
func TestRequestsOfAll(t *testing.T) {
	const seconds, table = 20, 100_000
	q, now := newRequests(), time.Unix(1000, 0)
	records := map[bool]int{}
	for i := range seconds * 50 {
		now = now.Add(20 * time.Millisecond)
		for _, unproven := range []bool{false, true} {
			r := ask(1, 9, i+1)
			if r.Unproven = unproven; unproven {
				r.Boot = uint64(i % 3)
			}
			q.addAt(r, now)
		}
		for r := q.next(); r != nil; r = q.next() {
			records[r.Unproven] += table
			q.sentAt(r, table, now)
		}
	}
	for unproven, n := range records {
		if most := (seconds + 3) * int(time.Second/perRecord); n > most || n < most/3 {
			t.Errorf("%d records in %d s, want %d at most (unproven: %v)", n, seconds, most, unproven)
		}
	}
}

// TestNew: a node that begins to beat is new, whatever its clock was set to. Who plays
// back the beats of former lives does not make us beat all the time.
func TestNew(t *testing.T) {
	const every = 250 * time.Millisecond
	p := &Publisher{cfg: Config{Beat: every}, heard: make(map[wgroam.NodeID]heard)}
	now := time.Unix(1000, 0)
	says := func(node, boot int) bool {
		now = now.Add(every / 10)
		return p.isNew(feed.Beat{Header: feed.Header{Node: wgroam.NodeID(node), Boot: uint64(boot)}}, now)
	}
	if !says(1, 7) || says(1, 7) {
		t.Error("want a node to be new once")
	}
	now = now.Add(time.Hour)
	if !says(1, 5) || says(1, 5) {
		t.Error("want a node to be new once after its clock was set back")
	}
	began, n := now, 0
	for range 100 {
		for _, boot := range []int{3, 4, 5} {
			if says(1, boot) {
				n++
			}
		}
	}
	if most := int(now.Sub(began) / every); n > most {
		t.Errorf("new %d times, want %d at most", n, most)
	}
	now = now.Add(forgetAfter)
	says(2, 1)
	if len(p.heard) != 1 {
		t.Errorf("remembers %d nodes, want the one that still beats", len(p.heard))
	}
}

func TestRequestsBounded(t *testing.T) {
	q, now := newRequests(), time.Unix(1000, 0)
	for i := range 10 * maxAskers {
		q.addAt(ask(i, 1, 1), now)
	}
	if len(q.askers) != maxAskers || len(q.order) != maxAskers {
		t.Errorf("%d askers, %d waiting", len(q.askers), len(q.order))
	}
	for q.next() != nil {
	}
	q.addAt(ask(-1, 1, 1), now)
	if q.next() != nil {
		t.Error("a node too many was answered")
	}
	q.addAt(ask(-1, 1, 2), now.Add(time.Minute))
	if q.next() == nil || len(q.askers) != maxAskers {
		t.Error("a new node was not answered when the others had long been")
	}
}
