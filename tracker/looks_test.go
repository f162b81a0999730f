// SPDX-License-Identifier: MIT

package tracker

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/wgroam/wgroam/bpf"
)

// fakeHook is a hook whose peers move at a test's word.
type fakeHook struct {
	limited bpf.Limited
	latest  map[uint64]bpf.Event
	device  map[uint64]netip.AddrPort // where it differs
	err     error
	all     int // calls of Latest
}

func (h *fakeHook) Limited() (bpf.Limited, error) { return h.limited, h.err }

func (h *fakeHook) Latest() (out []bpf.Event, err error) {
	h.all++
	for _, e := range h.latest {
		out = append(out, e)
	}
	return out, h.err
}

func (h *fakeHook) Newest(id uint64) (bpf.Event, bool, error) {
	e, ok := h.latest[id]
	return e, ok, h.err
}

func (h *fakeHook) Look(id uint64) (netip.AddrPort, bool, error) {
	e, ok := h.latest[id]
	if at, differs := h.device[id]; differs {
		return at, ok, h.err
	}
	return e.New, ok, h.err
}

// looked is looks at a fake hook, and what they lead to. Times are milliseconds.
type looked struct {
	looks
	t     *testing.T
	hook  fakeHook
	known map[uint64]time.Duration
	said  []string
}

func newLooked(t *testing.T) *looked {
	l := &looked{t: t, known: make(map[uint64]time.Duration)}
	l.newest = make(map[uint64]bpf.Event)
	l.hook.latest, l.hook.device = make(map[uint64]bpf.Event), make(map[uint64]netip.AddrPort)
	return l
}

// moves makes a peer move, and report it if the limits let it.
func (l *looked) moves(ms int, id uint64, reported bool) {
	e := bpf.Event{InternalID: id, Boot: time.Duration(ms) * time.Millisecond, New: at(ms)}
	l.hook.latest[id] = e
	if reported && l.deliver(e) {
		l.event(e)
	}
}

func (l *looked) deliver(e bpf.Event) bool {
	if e.Boot <= l.known[e.InternalID] {
		return false
	}
	l.known[e.InternalID] = e.Boot
	l.said = append(l.said, fmt.Sprintf("%d moved at %v", e.InternalID, e.Boot))
	return true
}

func (l *looked) passed(ms int, want ...string) {
	l.t.Helper()
	err := l.pass(time.Duration(ms)*time.Millisecond, &l.hook, l.deliver, func(e bpf.Event, at netip.AddrPort, ok bool) {
		l.said = append(l.said, fmt.Sprintf("%d settled: %v, %v", e.InternalID, at == e.New, ok))
	})
	if err != nil {
		l.t.Error(err)
	}
	if diff := cmp.Diff(want, l.said, opts); diff != "" {
		l.t.Errorf("at %d ms (-want +got):\n%s", ms, diff)
	}
	l.said = nil
}

// TestLookAfterRoam: a peer that has moved once is looked at once.
func TestLookAfterRoam(t *testing.T) {
	l := newLooked(t)
	if due, ok := l.next(); ok {
		t.Errorf("a look is due at %v", due)
	}
	l.moves(10, 1, true)
	if due, ok := l.next(); due != 110*time.Millisecond || !ok {
		t.Errorf("a look is due at %v, %v", due, ok)
	}
	l.passed(109, "1 moved at 10ms")
	l.passed(110, "1 settled: true, true")
	if due, ok := l.next(); ok || len(l.newest) != 0 {
		t.Errorf("a look is due at %v, of %v", due, l.newest)
	}
	if l.hook.all != 0 {
		t.Error("all peers were looked at")
	}

	// What the device has is not what was said, or cannot be told.
	l.moves(200, 1, true)
	l.hook.device[1] = at(7)
	l.passed(300, "1 moved at 200ms", "1 settled: false, true")
	l.moves(400, 1, true)
	delete(l.hook.latest, 1)
	l.passed(500, "1 moved at 400ms", "1 settled: false, false")
}

// TestLookTrailingEdge: a storm is heard of once in a while, and to its end, also
// when that is held back.
func TestLookTrailingEdge(t *testing.T) {
	l := newLooked(t)
	l.moves(10, 1, true)
	for ms := 11; ms < 410; ms++ {
		l.moves(ms, 1, false)
		l.hook.limited.Peer++
		var want []string
		switch ms {
		case 110, 210, 310:
			want = []string{fmt.Sprintf("1 moved at %v", time.Duration(ms)*time.Millisecond)}
		case 11:
			want = []string{"1 moved at 10ms"}
		}
		l.passed(ms, want...)
	}
	l.passed(410, "1 moved at 409ms")
	l.passed(509)
	l.passed(510, "1 settled: true, true")
	if _, ok := l.next(); ok || l.hook.all != 0 {
		t.Errorf("another look is due: %v; all peers were looked at %d times", ok, l.hook.all)
	}
}

// TestLookAtAll: what the limit of all holds back has no event of its peer.
func TestLookAtAll(t *testing.T) {
	l := newLooked(t)
	l.moves(10, 1, true)
	l.moves(20, 2, false)
	l.hook.limited.All++
	l.passed(110, "1 moved at 10ms", "2 moved at 20ms", "1 settled: true, true")
	l.passed(120, "2 settled: true, true")

	// A loss.
	l.moves(200, 3, false)
	l.all = true
	l.passed(201, "3 moved at 200ms")
	l.passed(300, "3 settled: true, true")
	if l.hook.all != 2 {
		t.Errorf("all peers were looked at %d times", l.hook.all)
	}
}

// TestLookFlush: before a dump is compared, all that was held back is heard.
func TestLookFlush(t *testing.T) {
	l := newLooked(t)
	l.moves(10, 1, true)
	l.moves(20, 1, false)
	l.hook.limited.Peer++
	for range 2 {
		if err := l.flush(&l.hook, l.deliver); err != nil {
			t.Fatal(err)
		}
	}
	if l.hook.all != 1 {
		t.Errorf("all peers were looked at %d times", l.hook.all)
	}
	l.passed(119, "1 moved at 10ms", "1 moved at 20ms")
	l.passed(219, "1 settled: true, true")
}

func TestLookFails(t *testing.T) {
	l := newLooked(t)
	l.moves(10, 1, true)
	l.hook.err = errors.New("no")
	if err := l.pass(time.Second, &l.hook, l.deliver, nil); !errors.Is(err, l.hook.err) {
		t.Errorf("pass: %v", err)
	}
	l.all = true
	if err := l.flush(&l.hook, l.deliver); !errors.Is(err, l.hook.err) {
		t.Errorf("flush: %v", err)
	}
}
