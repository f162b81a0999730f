// SPDX-License-Identifier: MIT

package feed

import "sync/atomic"

// Counters are what a Link has counted since it was made. A refused message
// changes nothing but these.
type Counters struct {
	// Sent counts updates and beats, SentRecords the records in the updates.
	Sent, SentRecords uint64
	// Updates, Beats and Requests of other nodes were accepted; Records were in
	// the updates.
	Updates, Records, Beats, Requests uint64
	Traffic
	// Dropped counts the times that messages were lost because callbacks were
	// too slow.
	Dropped uint64

	// Refused messages, by reason.

	// Short: too few bytes for a frame.
	Short uint64
	// Version: a frame version that this node does not read.
	Version uint64
	// Type: unknown, or not the one that belongs on the subject.
	Type uint64
	// KeyID: sealed with another key.
	KeyID uint64
	// Auth: altered, or never sealed by a member.
	Auth uint64
	// Malformed: authentic, but its contents make no sense. A record in an
	// otherwise good update counts alone.
	Malformed uint64
	// Old: a beat that was heard before, or an earlier one: brought by a second
	// connection, or recorded and played back.
	Old uint64
	// OwnEcho: our own message came back.
	OwnEcho uint64
	// NameClash: from another node that goes by our name.
	NameClash uint64
}

// Traffic counts frames of all kinds and their bytes, without those of NATS, TLS
// and TCP: sent, once for each connection, and received, refused or not.
type Traffic struct {
	FramesSent, BytesSent         uint64
	FramesReceived, BytesReceived uint64
}

// refusal is an error: why a message was refused.
type refusal int

const (
	errShort refusal = iota
	errVersion
	errType
	errKeyID
	errAuth
	errMalformed
	errOld
	errEcho
	errName
	refusals
)

// Error implements error.
func (r refusal) Error() string {
	return [refusals]string{
		errShort:     "too short for a frame",
		errVersion:   "unknown frame version",
		errType:      "frame type unknown, or not the one of its subject",
		errKeyID:     "sealed with another key",
		errAuth:      "not authentic",
		errMalformed: "malformed",
		errOld:       "heard before",
		errEcho:      "our own",
		errName:      "from a node that goes by our name",
	}[r]
}

type counters struct {
	sent, sentRecords                 atomic.Uint64
	updates, records, beats, requests atomic.Uint64
	framesSent, bytesSent             atomic.Uint64
	framesReceived, bytesReceived     atomic.Uint64
	dropped                           atomic.Uint64
	refused                           [refusals]atomic.Uint64
}

func (c *counters) sentFrame(frame []byte) {
	c.framesSent.Add(1)
	c.bytesSent.Add(uint64(len(frame)))
}

func (c *counters) receivedFrame(frame []byte) {
	c.framesReceived.Add(1)
	c.bytesReceived.Add(uint64(len(frame)))
}

// Counters returns what has been counted so far.
func (l *Link) Counters() Counters {
	c := &l.count
	return Counters{
		Sent:        c.sent.Load(),
		SentRecords: c.sentRecords.Load(),
		Updates:     c.updates.Load(),
		Records:     c.records.Load(),
		Beats:       c.beats.Load(),
		Requests:    c.requests.Load(),
		Traffic: Traffic{
			FramesSent: c.framesSent.Load(), BytesSent: c.bytesSent.Load(),
			FramesReceived: c.framesReceived.Load(), BytesReceived: c.bytesReceived.Load(),
		},
		Dropped:   c.dropped.Load(),
		Short:     c.refused[errShort].Load(),
		Version:   c.refused[errVersion].Load(),
		Type:      c.refused[errType].Load(),
		KeyID:     c.refused[errKeyID].Load(),
		Auth:      c.refused[errAuth].Load(),
		Malformed: c.refused[errMalformed].Load(),
		Old:       c.refused[errOld].Load(),
		OwnEcho:   c.refused[errEcho].Load(),
		NameClash: c.refused[errName].Load(),
	}
}
