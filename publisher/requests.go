// SPDX-License-Identifier: MIT

package publisher

import (
	"sync"
	"time"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/feed"
)

const (
	// A node is answered this often at most, and this many times at once after
	// a pause.
	answerEvery = 100 * time.Millisecond
	answerBurst = 10
	// setBack is how long a node must not have asked before one of an earlier
	// boot is believed to be it: restarted, after its clock was set back.
	setBack = 2 * time.Second
	// maxAskers bounds the memory of who asked.
	maxAskers = 64
)

// requests are the sync requests that wait for an answer: one of each node, the
// newest. An answer is much larger than its request, so there is a limit to how
// many a node can have.
type requests struct {
	ready chan struct{}

	mu      sync.Mutex
	askers  map[wgroam.NodeID]*asker
	order   []*asker
	refused uint64
}

type asker struct {
	last    feed.Header   // of the newest request
	at      time.Time     // when that came
	waiting *feed.Request // nil: all answered
	// full is when the node has its whole burst again.
	full time.Time
}

func newRequests() *requests {
	return &requests{ready: make(chan struct{}, 1), askers: make(map[wgroam.NodeID]*asker)}
}

func (q *requests) add(r *feed.Request) { q.addAt(r, time.Now()) }

func (q *requests) addAt(r *feed.Request, now time.Time) {
	q.mu.Lock()
	defer q.mu.Unlock()
	a := q.askers[r.Node]
	if a == nil {
		if len(q.askers) >= maxAskers && !q.forget(now) {
			q.refused++
			return
		}
		a = &asker{}
		q.askers[r.Node] = a
	}
	// One that is not newer came twice, or is a recording played back by
	// somebody who cannot make his own.
	if r.Boot < a.last.Boot && now.Sub(a.at) < setBack || r.Boot == a.last.Boot && r.Seq <= a.last.Seq {
		q.refused++
		return
	}
	a.last, a.at = r.Header, now
	if a.waiting != nil {
		a.waiting = r
		return
	}
	if a.full.Sub(now) > (answerBurst-1)*answerEvery {
		q.refused++
		return
	}
	if a.full.Before(now) {
		a.full = now
	}
	a.full = a.full.Add(answerEvery)
	a.waiting = r
	q.order = append(q.order, a)
	signal(q.ready)
}

// forget drops one node that has not asked lately.
func (q *requests) forget(now time.Time) bool {
	for n, a := range q.askers {
		if a.waiting == nil && a.full.Before(now) {
			delete(q.askers, n)
			return true
		}
	}
	return false
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
