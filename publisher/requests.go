// SPDX-License-Identifier: MIT

package publisher

import (
	"sync"
	"time"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/feed"
)

// maxAskers bounds the memory of who asked.
const maxAskers = 64

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

// requests are the sync requests that wait for an answer: one of each node, the
// newest. An answer is much larger than its request, so there is a limit to how
// many a node can have.
type requests struct {
	ready chan struct{}

	mu      sync.Mutex
	askers  map[name]*asker
	order   []*asker
	refused uint64
}

// name keeps what may be a recording of a node apart from the node itself.
type name struct {
	node     wgroam.NodeID
	unproven bool
}

type asker struct {
	last    feed.Header   // of the newest request
	waiting *feed.Request // nil: all answered
	// full is when the node has its whole burst again.
	full time.Time
}

func newRequests() *requests {
	return &requests{ready: make(chan struct{}, 1), askers: make(map[name]*asker)}
}

func (q *requests) add(r *feed.Request) { q.addAt(r, time.Now()) }

func (q *requests) addAt(r *feed.Request, now time.Time) {
	q.mu.Lock()
	defer q.mu.Unlock()
	who, limit := name{r.Node, r.Unproven}, provenLimit
	if r.Unproven {
		limit = unprovenLimit
	}
	a := q.askers[who]
	if a == nil {
		if len(q.askers) >= maxAskers && !q.forget(now) {
			q.refused++
			return
		}
		a = &asker{}
		q.askers[who] = a
	}
	// One that is not newer came twice, or is a recording played back by
	// somebody who cannot make his own.
	if r.Boot == a.last.Boot && r.Seq <= a.last.Seq {
		q.refused++
		return
	}
	a.last = r.Header
	if a.waiting != nil {
		a.waiting = r
		return
	}
	if a.full.Sub(now) > time.Duration(limit.burst-1)*limit.every {
		q.refused++
		return
	}
	if a.full.Before(now) {
		a.full = now
	}
	a.full = a.full.Add(limit.every)
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

// sent notes how many records were the answer to a request.
func (q *requests) sent(r *feed.Request, records int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if a := q.askers[name{r.Node, r.Unproven}]; a != nil {
		a.full = a.full.Add(time.Duration(records) * perRecord)
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
