// SPDX-License-Identifier: MIT

package feed

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"unicode/utf8"

	"github.com/nats-io/nats.go"

	"github.com/wgroam/wgroam"
)

// Step is what a node asks another one for in a handover.
type Step uint8

// The values are part of the wire format.
const (
	// StepWant: hand your role over to me.
	StepWant Step = 1
	// StepPrepare: could you take over from me? The reply has a ticket.
	StepPrepare Step = 2
	// StepTake: do, with the ticket of before.
	StepTake Step = 3
)

// Ticket is chosen at random by who is to take over, for one time. A recorded
// StepTake has none that is still good.
type Ticket [16]byte

// Question is one step of a handover, from one node to another. What happens
// because of StepWant and StepPrepare must do no harm when they are recordings.
type Question struct {
	Header
	Step   Step
	Wanted bool   // StepPrepare: because of a StepWant
	Ticket Ticket // StepTake
	Digest uint64 // of the asking node's table, as in Beat

	bind  [bindSize]byte
	inbox string
	via   *conn
}

// Verdict is the sense of a Reply.
type Verdict uint8

// The values are part of the wire format.
const (
	Refused Verdict = 0
	Agreed  Verdict = 1
	// NotYet: ask again.
	NotYet Verdict = 2
)

// Reply is the answer to a Question.
type Reply struct {
	Verdict Verdict
	By      string // who gives the role of the node that answers
	Ticket  Ticket // for StepPrepare
	Reason  string // unless Agreed; at most maxReason bytes of it are sent
}

const (
	questionSize = bindSize + 8 + 1 + 1 + 16 + 8
	maxBy        = 16
	maxReason    = 200
	replySize    = 1 + 16 + 1 + maxBy + 1 + maxReason
)

// appendQuestion appends the body of a question:
//
//	 0  nonce   16 bytes, random, as in a sync request
//	16  node    u64, who is asked
//	24  step    u8
//	25  wanted  u8
//	26  ticket  16 bytes
//	42  digest  u64
func appendQuestion(dst []byte, q *Question, asked wgroam.NodeID) []byte {
	dst = append(dst, q.bind[:]...)
	dst = binary.BigEndian.AppendUint64(dst, uint64(asked))
	wanted := byte(0)
	if q.Wanted {
		wanted = 1
	}
	dst = append(dst, byte(q.Step), wanted)
	dst = append(dst, q.Ticket[:]...)
	return binary.BigEndian.AppendUint64(dst, q.Digest)
}

func decodeQuestion(h header, body []byte) (q *Question, asked wgroam.NodeID, err error) {
	if h.count != 1 || len(body) < questionSize {
		return nil, 0, errMalformed
	}
	return &Question{
		Header: h.Header,
		Step:   Step(body[24]),
		Wanted: body[25] != 0,
		Ticket: Ticket(body[26:]),
		Digest: binary.BigEndian.Uint64(body[42:]),
		bind:   [bindSize]byte(body),
	}, wgroam.NodeID(binary.BigEndian.Uint64(body[bindSize:])), nil
}

// appendReply appends the body of a reply:
//
//	 0  verdict  u8
//	 1  ticket   16 bytes
//	17  by       u8 length, then 16 bytes padded with zeros
//	34  reason   u8 length, then 200 bytes padded with zeros
func appendReply(dst []byte, r Reply) []byte {
	dst = append(dst, byte(r.Verdict))
	dst = append(dst, r.Ticket[:]...)
	dst = appendText(dst, r.By, maxBy)
	return appendText(dst, r.Reason, maxReason)
}

// appendText appends a text with its length, cut off and padded to a size.
func appendText(dst []byte, s string, size int) []byte {
	for len(s) > size {
		_, n := utf8.DecodeLastRuneInString(s)
		s = s[:len(s)-n]
	}
	dst = append(append(dst, byte(len(s))), s...)
	return append(dst, make([]byte, size-len(s))...)
}

func decodeReply(h header, body []byte) (Reply, error) {
	if h.count != 1 || len(body) < replySize {
		return Reply{}, errMalformed
	}
	by, ok := text(body[17:], maxBy)
	reason, ok2 := text(body[18+maxBy:], maxReason)
	if !ok || !ok2 {
		return Reply{}, errMalformed
	}
	return Reply{Verdict: Verdict(body[0]), Ticket: Ticket(body[1:]), By: by, Reason: reason}, nil
}

func text(b []byte, size int) (string, bool) {
	n := int(b[0])
	if n > size || !utf8.Valid(b[1:1+n]) {
		return "", false
	}
	return string(b[1 : 1+n]), true
}

// OnQuestion registers a callback for questions that are meant for this node; see
// OnUpdate. They are to be answered with Reply. One that comes on two connections is
// handed over once.
func (l *Link) OnQuestion(f func(*Question)) { l.onQuestion = append(l.onQuestion, f) }

// Consult asks a node, and waits for its reply until ctx ends. The question takes the
// way of the updates, so the other node has those from before it by then. The error is
// ctx's, or wraps ErrNoLink.
//
// A node of a version without handover does not reply.
func (l *Link) Consult(ctx context.Context, node wgroam.NodeID, q Question) (Reply, error) {
	_, _ = rand.Read(q.bind[:]) // never fails
	inbox := l.inbox(l.self, q.bind)
	replies := make(chan *nats.Msg)
	done := make(chan struct{})
	defer close(done)
	var subs []*nats.Subscription
	defer func() {
		for _, sub := range subs {
			_ = sub.Unsubscribe()
		}
	}()
	for _, c := range l.connected() {
		sub, err := c.nc.Load().Subscribe(inbox, func(m *nats.Msg) {
			l.count.receivedFrame(m.Data)
			select {
			case replies <- m:
			case <-done:
			}
		})
		if err == nil {
			subs = append(subs, sub)
		}
	}
	if err := l.question(node, &q); err != nil {
		return Reply{}, fmt.Errorf("ask %v: %w", node, err)
	}
	for {
		var m *nats.Msg
		select {
		case m = <-replies:
		case <-ctx.Done():
			return Reply{}, ctx.Err()
		}
		h, body, err := l.keys.open(m.Data, m.Subject, q.bind[:], kindReplied)
		var r Reply
		if err == nil {
			r, err = decodeReply(h, body)
		}
		if err == nil && h.Node != node {
			err = errMalformed
		}
		if err == nil {
			l.prove(h.Header)
			return r, nil
		}
		if c := l.connected(); len(c) > 0 {
			l.refuse(c[0], m.Subject, err)
		}
	}
}

func (l *Link) question(node wgroam.NodeID, q *Question) error {
	l.pub.Lock()
	defer l.pub.Unlock()
	l.body = appendQuestion(l.body[:0], q, node)
	return l.publish(l.subject('h', l.self), l.header(kindQuestion, l.asks.Add(1), questionSize, 1))
}

// Reply answers a question.
func (l *Link) Reply(q *Question, r Reply) error {
	if !q.via.up.Load() {
		return errors.Join(ErrNoLink, errors.New(q.via.name))
	}
	h := l.header(kindReplied, 1, replySize, 1)
	return q.via.publish(q.inbox, l.keys.seal(nil, h, appendReply(nil, r), q.inbox, q.bind[:]))
}

// receiveQuestion handles a message on h.<node>.
func (l *Link) receiveQuestion(c *conn, subject string, h header, body []byte) {
	q, asked, err := decodeQuestion(h, body)
	if err != nil {
		l.refuse(c, subject, err)
		return
	}
	l.heardMu.Lock()
	again := q.bind == l.questioned
	l.questioned = q.bind
	l.heardMu.Unlock()
	if asked != l.self || again {
		return
	}
	q.inbox, q.via = l.inbox(h.Node, q.bind), c
	for _, f := range l.onQuestion {
		f(q)
	}
}
