// SPDX-License-Identifier: MIT

package publisher

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"time"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/feed"
)

const (
	// maxAskers bounds the memory of who asked.
	maxAskers = 64
	// maxLives bounds the memory of the lives of one node.
	maxLives = 8
)

// perRecord is how much later a node is answered again for each record that it
// got: 100 000 a second are some 7 MB.
const perRecord = 10 * time.Microsecond

// limit says how often there is an answer at most, and how many times at once
// after a pause.
type limit struct {
	every time.Duration
	burst int
}

var (
	provenLimit = limit{100 * time.Millisecond, 10}
	// A node that joins asks before it has been asked. So does a recording.
	unprovenLimit = limit{time.Second, 2}
)

// requests are the requests of one kind that wait for an answer: one of each life of a
// node, the newest. An answer is much larger than its request, so there is a limit
// to how many a node can have.
//
// A node has one life that is proven, and may just have begun another that is not.
// All the others are recordings. They share what the node can have unproven, so that
// none of them can take it all, and each is good for one answer: who plays them back
// cannot make new ones.
type requests struct {
	ready chan struct{}

	mu      sync.Mutex
	askers  map[wgroam.NodeID][]*asker // lives, oldest first
	order   []*asker
	refused uint64
}

// asker is one life of a node.
type asker struct {
	boot     uint64
	seq      uint64        // of the newest request
	unproven bool          // it was, or another has been proven since
	waiting  *feed.Request // nil: all answered
	// full is when the life has its whole burst again.
	full time.Time
}

func newRequests() *requests {
	return &requests{ready: make(chan struct{}, 1), askers: make(map[wgroam.NodeID][]*asker)}
}

func (q *requests) add(r *feed.Request) { q.addAt(r, time.Now()) }

func (q *requests) addAt(r *feed.Request, now time.Time) {
	q.mu.Lock()
	defer q.mu.Unlock()
	a := q.asker(r, now)
	// One that is not newer came twice, or is a recording played back by
	// somebody who cannot make his own.
	if a == nil || r.Seq <= a.seq {
		q.refused++
		return
	}
	a.seq = r.Seq
	if a.unproven != r.Unproven {
		a.unproven, a.full = r.Unproven, now
	}
	if !r.Unproven {
		for _, b := range q.askers[r.Node] {
			b.unproven = b != a
		}
	}
	if a.waiting != nil {
		a.waiting = r
		return
	}
	limit := provenLimit
	if r.Unproven {
		limit = unprovenLimit
	}
	every := limit.every * q.share(a, r.Node, now)
	if a.full.Sub(now) > time.Duration(limit.burst-1)*every {
		q.refused++
		return
	}
	if a.full.Before(now) {
		a.full = now
	}
	a.full = a.full.Add(every)
	a.waiting = r
	q.order = append(q.order, a)
	signal(q.ready)
}

// asker returns the life of a node that asks; nil if there is no room for it. The
// proven one stays, and of the others those that began last: were the dropped ones
// not refused, their recordings would be good again.
func (q *requests) asker(r *feed.Request, now time.Time) *asker {
	lives := q.askers[r.Node]
	i, known := slices.BinarySearchFunc(lives, r.Boot, func(a *asker, boot uint64) int { return cmp.Compare(a.boot, boot) })
	if known {
		return lives[i]
	}
	if lives == nil && len(q.askers) >= maxAskers && !q.forget(now) {
		return nil
	}
	a := &asker{boot: r.Boot, unproven: r.Unproven, full: now}
	lives = slices.Insert(lives, i, a)
	if len(lives) > maxLives {
		i := slices.IndexFunc(lives, func(a *asker) bool { return a.unproven })
		if lives[i] == a {
			a = nil
		}
		lives = slices.Delete(lives, i, i+1)
	}
	q.askers[r.Node] = lives
	return a
}

// share returns how many lives of its node have a part in what this one can have.
func (q *requests) share(a *asker, node wgroam.NodeID, now time.Time) time.Duration {
	n := time.Duration(1)
	for _, b := range q.askers[node] {
		if a != b && a.unproven && b.unproven && b.full.After(now) {
			n++
		}
	}
	return n
}

// forget drops one node that has not asked lately.
func (q *requests) forget(now time.Time) bool {
	for n, lives := range q.askers {
		if !slices.ContainsFunc(lives, func(a *asker) bool { return a.waiting != nil || !a.full.Before(now) }) {
			delete(q.askers, n)
			return true
		}
	}
	return false
}

// sent notes how many records were the answer to a request.
func (q *requests) sent(r *feed.Request, records int) { q.sentAt(r, records, time.Now()) }

func (q *requests) sentAt(r *feed.Request, records int, now time.Time) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, a := range q.askers[r.Node] {
		if a.boot == r.Boot {
			a.full = a.full.Add(time.Duration(records) * perRecord * q.share(a, r.Node, now))
		}
	}
}

// next returns the request that has waited longest, or nil.
func (q *requests) next() *feed.Request {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.order) == 0 {
		return nil
	}
	a := q.order[0]
	q.order = q.order[1:]
	r := a.waiting
	a.waiting = nil
	return r
}

// each has every request answered, until ctx ends, by a function that returns how many
// records the answer had.
func (q *requests) each(ctx context.Context, answer func(*feed.Request) int) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-q.ready:
		}
		for ctx.Err() == nil {
			r := q.next()
			if r == nil {
				break
			}
			q.sent(r, answer(r))
		}
	}
}
