// SPDX-License-Identifier: MIT

package feed

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/wgroam/wgroam"
)

// TestNoise plays a million frames that are no member's to a Link: flipped, cut,
// lengthened, replayed, and taken to other subjects and groups. Each is refused
// and counted, and nothing changes.
func TestNoise(t *testing.T) {
	const frames = 1_000_000
	k, foreign := testKeys(t), derive(t, [32]byte{1}, nil)
	l, err := New(Config{Name: "gw-z", Keys: k, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	table := wgroam.NewTable(k.DigestKey())
	l.OnUpdate(func(u Update) {
		for _, r := range u.Records {
			table.Merge(r)
		}
	})
	requests := 0
	l.OnRequest(func(*Request) { requests++ })

	c := &conn{l: l, name: "test"}
	ours, theirs := samples(k), samples(foreign)
	bind := ours[3].bind
	var work []byte
	// play reports whether a reply was taken; of the others the counters tell.
	play := func(s sample, frame []byte) bool {
		work = append(work[:0], frame...)
		switch s.kind {
		case kindRequest:
			l.receiveRequest(c, &nats.Msg{Subject: s.subject, Data: work})
		case kindReply: // as ask does
			_, _, err := k.open(work, s.subject, bind, kindReply)
			if err != nil {
				l.refuse(c, s.subject, err)
			}
			return err == nil
		default:
			l.receive(c, &nats.Msg{Subject: s.subject, Data: work})
		}
		return false
	}
	// The genuine ones are taken, or the rest proves nothing.
	for _, s := range ours {
		if play(s, s.frame) != (s.kind == kindReply) {
			t.Errorf("%s: refused", s.name)
		}
	}
	before, digests := l.Counters(), table.Digests()
	if before.Updates != 1 || before.Beats != 1 || before.Requests != 1 || before.refusals() != 0 || table.Len() != 1 {
		t.Fatalf("after one of each: %+v", before)
	}

	rng := rand.New(rand.NewPCG(4, 5))
	var replayed, played uint64
	for played < frames {
		s := ours[rng.IntN(len(ours))]
		if s.kind == kindRequest && rng.IntN(10) > 0 {
			continue // they are a hundred times larger
		}
		played++
		frame := append([]byte(nil), s.frame...)
		switch rng.IntN(6) {
		case 0, 1: // one bit, or a few bytes
			frame[rng.IntN(len(frame))] ^= 1 << rng.IntN(8)
			for range rng.IntN(4) {
				frame[rng.IntN(len(frame))] = byte(rng.Uint32())
			}
			if string(frame) == string(s.frame) {
				frame[0] ^= 1
			}
		case 2:
			frame = frame[:rng.IntN(len(frame))]
		case 3:
			frame = append(frame, make([]byte, 1+rng.IntN(100))...)
		case 4: // another place
			from := rng.IntN(len(ours) + len(theirs))
			switch {
			case from >= len(ours):
				frame = theirs[from-len(ours)].frame
			case ours[from].name != s.name:
				frame = ours[from].frame
			case s.kind == kindRequest:
				frame = frame[:minFrame]
			default:
				s.subject = s.subject[:len(s.subject)-2] + "00"
			}
		case 5:
			if s.kind == kindReply {
				// To another question; to its own it is as good as ever.
				frame = append([]byte(nil), k.seal(nil, testHeader(kindReply, 7, 0, 0), nil, s.subject, bind[1:])...)
			} else if s.kind != kindBeat {
				replayed++ // not refused: the table and the publisher know it
			}
		}
		if play(s, frame) {
			t.Fatalf("took %x as a reply", frame)
		}
	}
	after := l.Counters()
	if table.Digests() != digests {
		t.Error("the table has changed")
	}
	if after.Beats != before.Beats {
		t.Errorf("%d beats were taken", after.Beats-before.Beats)
	}
	if got := after.Updates - before.Updates + after.Requests - before.Requests; got != replayed || uint64(requests) != after.Requests {
		t.Errorf("%d updates and requests were taken, want the %d replayed", got, replayed)
	}
	if got := after.refusals(); got != frames-replayed {
		t.Errorf("%d refused, want %d", got, frames-replayed)
	}
	for why, n := range map[string]uint64{
		"short": after.Short, "version": after.Version, "type": after.Type,
		"key id": after.KeyID, "auth": after.Auth, "old": after.Old,
	} {
		if n == 0 {
			t.Errorf("none was refused for the reason %s", why)
		}
	}
	t.Logf("%+v", after)
}

func (c Counters) refusals() uint64 {
	return c.Short + c.Version + c.Type + c.KeyID + c.Auth + c.Malformed + c.Old + c.OwnEcho + c.NameClash
}

// TestNewer has frames of a member that runs a later version: what it has appended
// is skipped, and what cannot be read is refused, counted, and told once.
func TestNewer(t *testing.T) {
	k := testKeys(t)
	log := &logged{}
	l, err := New(Config{Name: "gw-z", Keys: k, Log: slog.New(log)})
	if err != nil {
		t.Fatal(err)
	}
	var records []wgroam.Record
	var beats []Beat
	var requests []*Request
	l.OnUpdate(func(u Update) { records = append(records, u.Records...) })
	l.OnBeat(func(b Beat) { beats = append(beats, b) })
	l.OnRequest(func(r *Request) { requests = append(requests, r) })
	c := &conn{l: l, name: "test"}
	list := samples(k)
	seal := func(i, size, count int, body []byte) (string, []byte) {
		s := list[i]
		h := testHeader(s.kind, 9, size, count)
		h.flags = 0x8000
		return s.subject, k.seal(nil, h, body, s.subject, nil)
	}
	const more = 24 // bytes that a later version appends
	var body []byte
	want := testRecords(3)
	want[1].Cause = 200 // a later version's
	for _, r := range want {
		body = append(appendRecords(body, []wgroam.Record{r}), make([]byte, more)...)
	}
	subject, frame := seal(0, wgroam.RecordSize+more, 3, body)
	l.receive(c, &nats.Msg{Subject: subject, Data: frame})
	if !slices.Equal(records, want) {
		t.Errorf("records %+v", records)
	}
	sent := Beat{Number: 5, Name: "gw-new", Time: time.Unix(1700000000, 0), Records: 3}
	subject, frame = seal(1, beatSize+more, 1, append(appendBeat(nil, sent), make([]byte, more)...))
	l.receive(c, &nats.Msg{Subject: subject, Data: frame})
	if len(beats) != 1 || beats[0].Name != "gw-new" || beats[0].Number != 5 || beats[0].Records != 3 {
		t.Errorf("beats %+v", beats)
	}
	subject, frame = seal(2, requestSize+more, 1, append(appendRequest(nil, &Request{}), make([]byte, more)...))
	l.receiveRequest(c, &nats.Msg{Subject: subject, Data: frame})
	if len(requests) != 1 {
		t.Errorf("%d requests", len(requests))
	}
	subject, frame = seal(3, wgroam.RecordSize+more, 3, body)
	if h, body, err := k.open(frame, subject, nil, kindReply); err != nil {
		t.Error(err)
	} else if got, bad, err := decodeRecords(h, body); err != nil || bad != 0 || !slices.Equal(got, want) {
		t.Errorf("reply: %d good, %d bad, %v", len(got), bad, err)
	}

	for range 3 {
		for v := range 4 {
			frame := append([]byte(nil), list[0].frame...)
			frame[0] = version + 1 + byte(v)
			l.receive(c, &nats.Msg{Subject: list[0].subject, Data: frame})
			// A kind of later, on a subject of its own.
			l.receive(c, &nats.Msg{Subject: l.prefix + "z." + testNode.String(), Data: append([]byte(nil), list[0].frame...)})
		}
	}
	if got := l.Counters(); got.Version != 12 || got.Type != 12 || got.refusals() != 24 {
		t.Errorf("counted %+v", got)
	}
	if n := log.count("a later version of wgroam"); n != 1 {
		t.Errorf("told %d times", n)
	}
}

// logged counts log lines by their message.
type logged struct {
	slog.Handler
	lines []string
}

func (l *logged) Enabled(context.Context, slog.Level) bool { return true }

func (l *logged) Handle(_ context.Context, r slog.Record) error {
	l.lines = append(l.lines, r.Message)
	return nil
}

func (l *logged) count(text string) (n int) {
	for _, line := range l.lines {
		if strings.Contains(line, text) {
			n++
		}
	}
	return n
}
