// SPDX-License-Identifier: MIT

package feed

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"iter"
	"slices"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/wgroam/wgroam"
)

// ErrNoAnswer is returned by Ask when no node has answered in full.
var ErrNoAnswer = errors.New("no node has answered")

const (
	// answerWait is how long the first chunk of an answer may take.
	answerWait = 250 * time.Millisecond
	// chunkWait is how long a later chunk may take. What came before it is not lost
	// when it does not come: the next request is about the rest.
	chunkWait = 500 * time.Millisecond
	// maxHeard bounds the memory of other nodes.
	maxHeard = 256
)

// hear remembers how far a node has counted, and which connection leads to it.
// It reports whether the beat is news, and completes it.
//
// Which life of a node is the present one is not told by the order of their
// boots, which are times of a clock that may have been set back: it is the one
// that answers.
func (l *Link) hear(c *conn, b *Beat) (news bool) {
	now := time.Now()
	l.heardMu.Lock()
	defer l.heardMu.Unlock()
	if len(l.heard) == 0 {
		close(l.hearing) // once: it never becomes empty again
	}
	h := l.heard[b.Node]
	if h == nil {
		if len(l.heard) >= maxHeard && !l.forget(now) {
			b.Unproven = true
			return true
		}
		h = &heard{}
		l.heard[b.Node] = h
	}
	of := &h.proven
	if b.Boot != of.boot {
		b.Unproven = true
		of = &h.other
		if b.Boot != of.boot {
			*of = life{boot: b.Boot}
		}
	}
	if b.Number <= of.beat {
		return false
	}
	of.beat = b.Number
	h.at, h.via, h.records, h.silence = now, c, b.Records, b.Silence()
	return true
}

// forget drops one node that has fallen silent.
func (l *Link) forget(now time.Time) bool {
	for n, h := range l.heard {
		if !h.fresh(now) {
			delete(l.heard, n)
			return true
		}
	}
	return false
}

// fresh reports whether a node is worth asking.
func (h *heard) fresh(now time.Time) bool { return now.Sub(h.at) <= 2*h.silence }

// prove notes that a node has answered a question of ours.
func (l *Link) prove(answer Header) {
	l.heardMu.Lock()
	defer l.heardMu.Unlock()
	h := l.heard[answer.Node]
	if h == nil || h.proven.boot == answer.Boot {
		return
	}
	if h.other.boot != answer.Boot {
		h.other = life{boot: answer.Boot}
	}
	h.proven, h.other = h.other, life{}
}

func (l *Link) isProven(of Header) bool {
	l.heardMu.Lock()
	defer l.heardMu.Unlock()
	h := l.heard[of.Node]
	return h != nil && h.proven.boot == of.Boot
}

// target is a node to ask, and the connections to ask it on.
type target struct {
	node    wgroam.NodeID
	via     []*conn
	records uint32
}

// targets returns the nodes that have been heard lately, fullest table first,
// or only the given one.
func (l *Link) targets(node wgroam.NodeID) []target {
	now := time.Now()
	l.heardMu.Lock()
	defer l.heardMu.Unlock()
	var out []target
	for n, h := range l.heard {
		if (node == 0 || n == node) && h.fresh(now) && h.via.up.Load() {
			out = append(out, target{n, []*conn{h.via}, h.records})
		}
	}
	slices.SortFunc(out, func(a, b target) int {
		return cmp.Or(cmp.Compare(b.records, a.records), cmp.Compare(a.node, b.node))
	})
	return out
}

func (l *Link) connected() []*conn {
	var up []*conn
	for _, c := range l.conns {
		if c.up.Load() {
			up = append(up, c)
		}
	}
	return up
}

// Ask asks a node for all that it has and we have not, by the digests of our
// table, and yields the answer in pieces of at most MaxRecords records. It may
// contain records that we have.
//
// With node zero, it asks the node with the most records of those it hears, and
// the next one when there is no answer within 250 ms. While it hears none, it
// waits as long for one to appear, and then asks whoever listens.
//
// An error is the last thing that is yielded. It is ctx's error, or wraps
// ErrNoAnswer or ErrNoLink. What came before it is good all the same.
func (l *Link) Ask(ctx context.Context, node wgroam.NodeID, have *wgroam.Digests) iter.Seq2[Update, error] {
	return func(yield func(Update, error) bool) {
		up := l.connected()
		if len(up) == 0 {
			yield(Update{}, fmt.Errorf("ask for missed records: %w", ErrNoLink))
			return
		}
		list := l.targets(node)
		if len(list) == 0 && node == 0 {
			select {
			case <-l.hearing:
			case <-time.After(answerWait):
			case <-ctx.Done():
			}
			list = l.targets(node)
		}
		if len(list) == 0 {
			list = append(list, target{node: node, via: up})
		}
		var errs []error
		q := question{kindRequest, kindReply, "q", answerWait}
		read := func(h header, body []byte) error {
			records, bad, err := decodeRecords(h, body)
			if err != nil {
				return err
			}
			for range bad {
				l.refuse(up[0], q.subject, errMalformed)
			}
			if len(records) > 0 && !yield(Update{h.Header, records}, nil) {
				return errStop
			}
			return nil
		}
		for _, t := range list {
			err := l.ask(ctx, t, q, have, read)
			if err == nil || errors.Is(err, errStop) {
				return
			}
			if ctx.Err() != nil {
				yield(Update{}, ctx.Err())
				return
			}
			errs = append(errs, err)
		}
		yield(Update{}, fmt.Errorf("%w: %w", ErrNoAnswer, errors.Join(errs...)))
	}
}

var errStop = errors.New("the caller has had enough")

// question is a kind of request.
type question struct {
	asks, answers kind
	subject       string
	wait          time.Duration // for the first chunk of an answer
}

// ask does one attempt. Each chunk of the answer goes to read, in order; one for which
// it returns an error is refused. With errStop it ends.
func (l *Link) ask(ctx context.Context, t target, q question, have *wgroam.Digests, read func(header, []byte) error) error {
	req := &Request{Have: *have, asked: t.node}
	_, _ = rand.Read(req.bind[:]) // never fails
	inbox, subject := l.inbox(l.self, req.bind), l.prefix+q.subject
	frame := l.keys.seal(nil, l.header(q.asks, l.asks.Add(1), requestSize, 1), appendRequest(nil, req), subject, nil)

	replies := make(chan *nats.Msg)
	done := make(chan struct{})
	defer close(done)
	var subs []*nats.Subscription
	defer func() {
		for _, sub := range subs {
			_ = sub.Unsubscribe()
		}
	}()
	asked := 0
	for _, c := range t.via {
		nc := c.nc.Load()
		sub, err := nc.Subscribe(inbox, func(m *nats.Msg) {
			l.count.receivedFrame(m.Data)
			select {
			case replies <- m:
			case <-done:
			}
		})
		if err != nil {
			continue
		}
		subs = append(subs, sub)
		_ = sub.SetPendingLimits(-1, pendingBytes)
		// The servers want to know where the answer will come, or a new
		// subscription in another cluster may miss it.
		if nc.PublishRequest(subject, inbox, frame) == nil {
			l.count.sentFrame(frame)
			asked++
		}
	}
	if asked == 0 {
		return fmt.Errorf("%v: %w", t.node, ErrNoLink)
	}

	var from Header // the first who answers has the word
	timer := time.NewTimer(q.wait)
	defer timer.Stop()
	for {
		var m *nats.Msg
		select {
		case m = <-replies:
		case <-timer.C:
			return fmt.Errorf("%v: timeout after %d chunks", t.node, from.Seq)
		case <-ctx.Done():
			return ctx.Err()
		}
		h, body, err := l.keys.open(m.Data, m.Subject, req.bind[:], q.answers)
		if err != nil {
			l.refuse(t.via[0], m.Subject, err)
			continue
		}
		if from.Node == 0 {
			from = Header{Node: h.Node, Boot: h.Boot}
			l.prove(h.Header)
		}
		if h.Node != from.Node || h.Boot != from.Boot || h.Seq <= from.Seq {
			continue // another one's, or it came twice
		}
		if h.Seq > from.Seq+1 {
			return fmt.Errorf("%v: chunk %d came after %d", t.node, h.Seq, from.Seq)
		}
		if err := read(h, body); errors.Is(err, errStop) {
			return err
		} else if err != nil {
			l.refuse(t.via[0], m.Subject, err)
			continue
		}
		from.Seq = h.Seq
		if h.flags&flagLast != 0 {
			return nil
		}
		timer.Reset(chunkWait)
	}
}
