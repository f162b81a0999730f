// SPDX-License-Identifier: MIT

package model

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/feed"
)

// kind is what a message is, for those who lose it.
type kind int

const (
	update kind = iota
	beat
	request
	reply
	kinds
)

// network carries messages between nodes, badly.
type network struct {
	began time.Time
	trace []string

	mu    sync.Mutex
	nodes []*node
	// What becomes of the messages of one kind from one node to another is a
	// stream of its own, so that it does not depend on who else speaks at the
	// same moment.
	fate [][][kinds]*rand.Rand
	// epoch counts the times that all that was under way has been lost.
	epoch                int
	lossPercent, doubles int // percent
	lossUpdates          bool
	delay                time.Duration
	cut                  [][]bool // from, to
	deaf                 []int    // so many messages of the next ones do not fit into the node's queue
	old                  []message
	sent                 [kinds]int
	replied              [][]time.Time // when the newest reply arrives: they share a connection, and keep their order
}

// message is one on its way to a node, whoever lives there when it arrives.
type message struct {
	kind     kind
	from, to int
	deliver  func(*life)
}

func newNetwork(seed uint64, nodes int) *network {
	w := &network{began: time.Now(), deaf: make([]int, nodes)}
	for from := range nodes {
		w.cut = append(w.cut, make([]bool, nodes))
		w.replied = append(w.replied, make([]time.Time, nodes))
		w.fate = append(w.fate, make([][kinds]*rand.Rand, nodes))
		for to := range nodes {
			for k := range kinds {
				w.fate[from][to][k] = rand.New(rand.NewPCG(seed, uint64(from<<16|to<<8|int(k))))
			}
		}
	}
	return w
}

// says adds a line to the trace. w.mu is not needed: only the schedule does.
func (w *network) says(format string, args ...any) {
	w.trace = append(w.trace, fmt.Sprintf("%6d ms  ", time.Since(w.began).Milliseconds())+fmt.Sprintf(format, args...))
}

// send lets a message go, once, twice or not at all.
func (w *network) send(m message) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.sent[m.kind]++
	if m.kind != reply && len(w.old) < 100 {
		w.old = append(w.old, m)
	}
	fate := w.fate[m.from][m.to][m.kind]
	copies := 1
	if fate.IntN(100) < w.doubles {
		copies = 2
	}
	for range copies {
		after := time.Millisecond + time.Duration(fate.Int64N(int64(w.delay)+1))
		if m.kind == reply {
			at := time.Now().Add(after)
			if last := &w.replied[m.from][m.to]; !at.After(*last) {
				at = last.Add(time.Microsecond)
				after = time.Until(at)
			}
			w.replied[m.from][m.to] = at
		}
		lost := fate.IntN(100) < w.lossPercent || w.lossUpdates && m.kind == update
		if !lost {
			w.arrives(m, after)
		}
	}
}

// arrives is called with w.mu held.
func (w *network) arrives(m message, after time.Duration) {
	epoch := w.epoch
	time.AfterFunc(after, func() {
		w.mu.Lock()
		l := w.nodes[m.to].life
		lost := w.epoch != epoch || w.cut[m.from][m.to] || l == nil || l.offline
		if !lost && w.deaf[m.to] > 0 {
			w.deaf[m.to]--
			lost = true
		}
		w.mu.Unlock()
		if !lost {
			m.deliver(l)
		}
	})
}

// others returns the numbers of all nodes but one.
func (w *network) others(me int) []int {
	var out []int
	for i := range w.nodes {
		if i != me {
			out = append(out, i)
		}
	}
	return out
}

// link is what a node has of the network during one life of its daemon: it does
// what feed.Link does, without NATS.
type link struct {
	w    *network
	node *node
	life *life
	boot uint64

	onRequest func(*feed.Request)
	onBeat    func(feed.Beat)
	onEvent   func(feed.Event)

	mu        sync.Mutex
	seq, asks uint64
}

// question is a sync request that waits for its answer.
type question struct {
	from   *life
	chunks chan chunk
	done   chan struct{}
}

type chunk struct {
	feed.Update
	last bool
}

// chunkRecords is so little that most answers take several.
const chunkRecords = 2

func (l *link) Self() wgroam.NodeID             { return l.node.id }
func (l *link) OnRequest(f func(*feed.Request)) { l.onRequest = f }
func (l *link) OnBeat(f func(feed.Beat))        { l.onBeat = f }
func (l *link) OnEvent(f func(feed.Event))      { l.onEvent = f }
func (l *link) Flush(context.Context) error     { return nil }

// up reports whether the daemon lives and is connected.
func (l *link) up() bool {
	l.w.mu.Lock()
	defer l.w.mu.Unlock()
	return l.node.life == l.life && !l.life.offline
}

// broadcast sends to all, or says that nothing is connected.
func (l *link) broadcast(k kind, deliver func(*life)) error {
	if !l.up() {
		return feed.ErrNoLink
	}
	for _, to := range l.w.others(l.node.index) {
		l.w.send(message{k, l.node.index, to, deliver})
	}
	return nil
}

func (l *link) Publish(records []wgroam.Record) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	u := feed.Update{Header: feed.Header{Node: l.node.id, Boot: l.boot, Seq: l.seq + 1}, Records: slices.Clone(records)}
	err := l.broadcast(update, func(to *life) {
		to.hears(u.Records)
		to.merger.Update(feed.Update{Header: u.Header, Records: slices.Clone(u.Records)})
	})
	if err == nil {
		l.seq++
	}
	return err
}

func (l *link) Beat(b feed.Beat) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	b.Header = feed.Header{Node: l.node.id, Boot: l.boot, Seq: l.seq}
	b.Name, b.Time = l.node.name, l.node.now()
	return l.broadcast(beat, func(to *life) { to.merger.Beat(b); to.link.onBeat(b) })
}

// Ask is the half of a sync that feed.Link does.
func (l *link) Ask(ctx context.Context, id wgroam.NodeID, have *wgroam.Digests) iter.Seq2[feed.Update, error] {
	return func(yield func(feed.Update, error) bool) {
		to := slices.IndexFunc(l.w.nodes, func(n *node) bool { return n.id == id })
		if !l.up() || to < 0 {
			yield(feed.Update{}, feed.ErrNoLink)
			return
		}
		l.mu.Lock()
		l.asks++
		h := feed.Header{Node: l.node.id, Boot: l.boot, Seq: l.asks}
		l.mu.Unlock()
		q := &question{from: l.life, chunks: make(chan chunk), done: make(chan struct{})}
		defer close(q.done)
		l.w.send(message{request, l.node.index, to, func(at *life) {
			r := &feed.Request{Header: h, Have: *have}
			at.link.mu.Lock()
			at.questions[r] = q
			at.link.mu.Unlock()
			at.link.onRequest(r)
		}})
		var from feed.Header
		for wait := 250 * time.Millisecond; ; wait = 500 * time.Millisecond { // answerWait, chunkWait
			var c chunk
			select {
			case c = <-q.chunks:
			case <-time.After(wait):
				yield(feed.Update{}, feed.ErrNoAnswer)
				return
			case <-ctx.Done():
				yield(feed.Update{}, ctx.Err())
				return
			}
			if c.Seq != from.Seq+1 {
				yield(feed.Update{}, errors.New("a chunk is missing"))
				return
			}
			from = c.Header
			l.life.hears(c.Records)
			if len(c.Records) > 0 && !yield(c.Update, nil) || c.last {
				return
			}
		}
	}
}

// Answer is the other half.
func (l *link) Answer(_ context.Context, r *feed.Request, records []wgroam.Record) (sent int, err error) {
	l.mu.Lock()
	q := l.life.questions[r]
	delete(l.life.questions, r)
	l.mu.Unlock()
	for c := (chunk{Update: feed.Update{Header: feed.Header{Node: l.node.id, Boot: l.boot}}}); !c.last; {
		if !l.up() {
			return sent, feed.ErrNoLink
		}
		c.Seq++
		c.Records = records[:min(chunkRecords, len(records))]
		records = records[len(c.Records):]
		sent += len(c.Records)
		c.last = len(records) == 0
		l.w.send(message{reply, l.node.index, q.from.node.index, func(to *life) {
			if to != q.from {
				return
			}
			select {
			case q.chunks <- c:
			case <-q.done:
			}
		}})
	}
	return sent, nil
}
