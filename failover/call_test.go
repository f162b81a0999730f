// SPDX-License-Identifier: MIT

package failover

import (
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/wg"
)

// fakeDevice is a device whose peers answer, or do not, in the time of synctest.
type fakeDevice struct {
	t     *testing.T
	peers map[wgroam.Key]*fakePeer
	order []wgroam.Key // of the calls
	most  int          // answers that were outstanding at once
	dumps int
	early int // calls before the first dump
	// told, unless nil, hears of the answers.
	told func(wgroam.Key)
}

type fakePeer struct {
	wg.Peer
	answers time.Duration // after a call; 0 for never
	calls   []time.Time
}

// at returns the device as it is now.
func (d *fakeDevice) settle() {
	now := time.Now()
	for _, p := range d.peers {
		for _, c := range p.calls {
			if p.answers > 0 && !now.Before(c.Add(p.answers)) && p.LastHandshake.Before(c) {
				p.LastHandshake = c.Add(p.answers)
			}
		}
	}
}

func (d *fakeDevice) Device(string) (wg.Device, error) {
	d.settle()
	if d.dumps++; d.dumps == 1 {
		d.early = len(d.order)
	}
	out := wg.Device{Kernel: d.told != nil}
	for _, p := range d.peers {
		out.Peers = append(out.Peers, p.Peer)
	}
	return out, nil
}

func (d *fakeDevice) SetKeepalives(_ string, intervals []wg.Keepalive) error {
	if len(intervals) > wg.ChunkPeers {
		d.t.Errorf("%d intervals in one call", len(intervals))
	}
	d.settle()
	now := time.Now()
	for _, i := range intervals {
		p := d.peers[i.Peer]
		if p.Keepalive == 0 && i.Interval != 0 && !p.LastHandshake.After(now.Add(-time.Minute)) {
			p.calls = append(p.calls, now)
			d.order = append(d.order, i.Peer)
			if d.told != nil && p.answers > 0 {
				time.AfterFunc(p.answers, func() { d.told(i.Peer) })
			}
		}
		p.Keepalive = i.Interval
	}
	outstanding := 0
	for _, p := range d.peers {
		if n := len(p.calls); n > 0 && p.answers > 0 && now.Before(p.calls[n-1].Add(p.answers)) {
			outstanding++
		}
	}
	d.most = max(d.most, outstanding)
	return nil
}

func peerKey(i int) wgroam.Key { return wgroam.Key{byte(i), byte(i >> 8), 1} }

// TestCall: those seen last first, never more at a time than may be answered, each
// with the interval that it had, and those that nobody answers for last of all.
func TestCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const count = 1000
		d := &fakeDevice{t: t, peers: map[wgroam.Key]*fakePeer{}}
		taken := &taken{Keepalives: map[wgroam.Key]time.Duration{}, Promoted: time.Now()}
		start := time.Now()
		seen := map[wgroam.Key]time.Time{}
		want := Promotion{Began: start, Peers: count}
		for i := range count {
			k := peerKey(i)
			p := &fakePeer{Peer: wg.Peer{Key: k, Endpoint: netip.MustParseAddrPort("192.0.2.1:1000")}, answers: 50 * time.Millisecond}
			seen[k] = start.Add(-time.Duration(i) * time.Second)
			switch i % 100 {
			case 98: // gone
				p.answers = 0
				want.Silent++
			case 99: // never seen
				p.Endpoint = netip.AddrPort{}
				want.Unknown++
			}
			if i%2 == 0 {
				taken.Keepalives[k] = time.Duration(1+i%60) * time.Second
			}
			d.peers[k] = p
		}
		want.Called = count - want.Unknown
		want.Answered = want.Called - want.Silent
		var told []Promotion
		k := NewKeeper(KeeperConfig{
			Device: d, Log: slog.New(slog.DiscardHandler),
			Told:     func() bool { return false },
			Seen:     func(k wgroam.Key) time.Time { return seen[k] },
			Progress: func(p Promotion) { told = append(told, p) },
		})
		if err := k.call(t.Context(), taken, func() {}); err != nil {
			t.Fatal(err)
		}
		got := k.Status().Last
		if got.P50 <= 0 || got.P99 < got.P50 || got.P99 > 3*time.Second {
			t.Errorf("p50 %v, p99 %v", got.P50, got.P99)
		}
		// Calls that take six seconds are told of some twenty times, and of their end.
		if n := len(told); n < 5 || n > 40 || told[n-1] != got {
			t.Errorf("told %d times, in the end %+v", n, told[max(0, n-1):])
		}
		for i := range max(0, len(told)-1) {
			if told[i].Called > told[i+1].Called || told[i].Answered > told[i+1].Answered || !told[i].Ended.IsZero() {
				t.Errorf("told %+v, and then %+v", told[i], told[i+1])
			}
		}
		if took := got.Ended.Sub(start); took < giveUpAfter || took > giveUpAfter+3*time.Second {
			t.Errorf("it took %v", took)
		}
		got.Ended, got.P50, got.P99 = time.Time{}, 0, 0
		if got != want {
			t.Errorf("promotion %+v, want %+v", got, want)
		}
		if d.most > userWindow || d.most < userWindow/2 {
			t.Errorf("%d answers were outstanding at once, want some %d", d.most, userWindow)
		}
		if !slices.IsSortedFunc(d.order, func(a, b wgroam.Key) int { return seen[b].Compare(seen[a]) }) {
			t.Error("the peers were not called in the order of when they were seen")
		}
		for key, p := range d.peers {
			if p.Keepalive != taken.Keepalives[key] {
				t.Errorf("peer %v has the interval %v, want %v", key, p.Keepalive, taken.Keepalives[key])
			}
			if len(p.calls) > 1 {
				t.Errorf("peer %v was called %d times", key, len(p.calls))
			}
		}
	})
}

// TestCallTold: where answers are heard of, the device is hardly read, the first are
// called before it is, and the next when there is room.
func TestCallTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const count, takes = 4000, 50 * time.Millisecond
		start := time.Now()
		d := &fakeDevice{t: t, peers: map[wgroam.Key]*fakePeer{}}
		for i := range count {
			p := &fakePeer{Peer: wg.Peer{Key: peerKey(i), Endpoint: netip.MustParseAddrPort("192.0.2.1:1000")}, answers: takes}
			if i == 7 { // gone
				p.answers = 0
			}
			d.peers[p.Key] = p
		}
		k := NewKeeper(KeeperConfig{
			Device: d, Log: slog.New(slog.DiscardHandler),
			Progress: func(Promotion) {},
			Told:     func() bool { return true },
			Seen:     func(k wgroam.Key) time.Time { return start.Add(-time.Duration(k[0]) - time.Duration(k[1])<<8) },
		})
		d.told = k.Answered
		k.kernel = true
		for _, p := range d.peers {
			k.known = append(k.known, contact{peer: p.Key})
		}
		if err := k.call(t.Context(), &taken{Promoted: start}, func() {}); err != nil {
			t.Fatal(err)
		}
		got := k.Status().Last
		if got.Answered != count-1 || got.Silent != 1 {
			t.Errorf("promotion %+v", got)
		}
		if d.early < kernelWindow {
			t.Errorf("%d were called before the device was read", d.early)
		}
		// Nobody waits for more than those that may be called at once before him.
		if most := (count/kernelWindow + 1) * takes; got.P99 > most {
			t.Errorf("the last answered after %v, want %v at most", got.P99, most)
		}
		if d.most > kernelWindow || d.most < kernelWindow/2 {
			t.Errorf("%d answers were outstanding at once, want some %d", d.most, kernelWindow)
		}
		if most := int(giveUpAfter/lookSeldom) + 4; d.dumps > most {
			t.Errorf("the device was read %d times, want %d at most", d.dumps, most)
		}
		if !slices.IsSortedFunc(d.order, func(a, b wgroam.Key) int { return k.cfg.Seen(b).Compare(k.cfg.Seen(a)) }) {
			t.Error("the peers were not called in the order of when they were seen")
		}
	})
}

// TestCallGoesOn: what a killed daemon has begun is ended, and nobody is called
// twice.
func TestCallGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ep := netip.MustParseAddrPort("192.0.2.1:1000")
		d := &fakeDevice{t: t, peers: map[wgroam.Key]*fakePeer{}}
		start := time.Now()
		taken := &taken{Keepalives: map[wgroam.Key]time.Duration{peerKey(1): time.Second}, Promoted: start.Add(-time.Second)}
		for i, p := range []*fakePeer{
			{Peer: wg.Peer{Endpoint: ep, Keepalive: called, LastHandshake: start}},               // called, and has answered
			{Peer: wg.Peer{Endpoint: ep, Keepalive: time.Second, LastHandshake: start}},          // the same, with an interval
			{Peer: wg.Peer{Endpoint: ep, Keepalive: called}},                                     // called
			{Peer: wg.Peer{Endpoint: ep}, answers: time.Millisecond},                             // to be called
			{Peer: wg.Peer{Endpoint: ep, Keepalive: 7 * time.Second}, answers: time.Millisecond}, // set by somebody else since
		} {
			p.Key = peerKey(i)
			d.peers[p.Key] = p
		}
		k := NewKeeper(KeeperConfig{Device: d, Log: slog.New(slog.DiscardHandler), Told: func() bool { return false }, Seen: func(wgroam.Key) time.Time { return time.Time{} }, Progress: func(Promotion) {}})

		// One that is ended early goes on later.
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := k.call(ctx, taken, func() {}); err != nil || !k.Status().Last.Ended.IsZero() {
			t.Errorf("ended early: %v, %+v", err, k.Status().Last)
		}
		if err := k.call(t.Context(), taken, func() {}); err != nil || k.Status().Last.Ended.IsZero() {
			t.Fatalf("error %v, %+v", err, k.Status().Last)
		}
		if !slices.Equal(d.order, []wgroam.Key{peerKey(3)}) {
			t.Errorf("called %v", d.order)
		}
		for i, want := range []time.Duration{0, time.Second, 0, 0, 7 * time.Second} {
			if got := d.peers[peerKey(i)].Keepalive; got != want {
				t.Errorf("peer %d has the interval %v, want %v", i, got, want)
			}
		}
	})
}
