// SPDX-License-Identifier: MIT

package failover

import (
	"context"
	"slices"
	"time"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/wg"
)

const (
	// window is how many answers may be outstanding. With 512 of them in its queue
	// WireGuard takes itself for overloaded and asks for cookies, which costs each
	// peer 5 seconds (receive.c, MAX_QUEUED_INCOMING_HANDSHAKES / 8).
	window = 384
	// answerWithin is how long an answer is counted on. The peer may be gone, and
	// must not be in the way of the others.
	answerWithin = time.Second
	// giveUpAfter is when a call has failed: WireGuard has repeated it after 5
	// seconds, and up to 334 ms of chance (timers.c), and there was time to answer
	// that.
	giveUpAfter = 5*time.Second + 334*time.Millisecond + answerWithin
	// lookAgain is the least time between two looks at the device.
	lookAgain = 10 * time.Millisecond
)

// Promotion is how far the calls of a promotion have come.
type Promotion struct {
	Began, Ended time.Time // Ended is zero while it goes on
	Peers        int       // in the device
	Called       int
	Answered     int // have a session since it began
	Silent       int // were called and have not answered
	Unknown      int // nobody knows where they are
	// P50 and P99 are from when it began to the handshake, of those that answered.
	P50, P99 time.Duration
}

func (k *Keeper) begin(t *taken) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.status.State, k.status.Last = StatePromoting, Promotion{Began: t.Promoted}
}

// call gives all peers the intervals that they had, which calls them: those last
// seen first, as many at a time as can be answered. A peer without an interval gets
// one for the time of the call. It ends when every peer with an endpoint has
// answered, or had its chance; and early with ctx.
func (k *Keeper) call(ctx context.Context, t *taken) error {
	calls := make(map[wgroam.Key]time.Time)
	for {
		began := time.Now()
		peers, err := k.peers()
		if err != nil {
			return err
		}
		todo, restore, p := k.judge(peers, t, calls)
		if err := k.keepalives(restore); err != nil {
			return err
		}
		k.mu.Lock()
		k.status.Last = p
		k.mu.Unlock()

		outstanding, over := 0, true
		for key, at := range calls {
			if answered(peers[key], t) {
				continue
			}
			since := time.Since(at)
			over = over && since > giveUpAfter
			if since < answerWithin {
				outstanding++
			}
		}
		if len(todo) == 0 && over {
			return k.finish(peers, t, p)
		}
		for room := window - outstanding; room > 0 && len(todo) > 0; {
			n := min(room, len(todo), wg.ChunkPeers)
			now := time.Now()
			if err := k.keepalives(todo[:n]); err != nil {
				return err
			}
			for _, c := range todo[:n] {
				calls[c.Peer] = now
			}
			todo, room = todo[n:], room-n
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(max(lookAgain, time.Since(began))):
		}
	}
}

// answered reports whether a peer has a session since the promotion began.
func answered(p wg.Peer, t *taken) bool { return p.LastHandshake.After(t.Promoted) }

// judge compares the device with what it should have. todo are the peers to call,
// in order, and restore those that need their interval only.
func (k *Keeper) judge(peers map[wgroam.Key]wg.Peer, t *taken, calls map[wgroam.Key]time.Time) (todo, restore []wg.Keepalive, p Promotion) {
	p = Promotion{Began: t.Promoted, Peers: len(peers)}
	var took []time.Duration
	now := time.Now()
	for key, peer := range peers {
		want := t.Keepalives[key]
		calling := peer.Keepalive == called || want != 0 && peer.Keepalive == want
		if _, known := calls[key]; calling && !known && !answered(peer, t) {
			// By a daemon that was killed since.
			calls[key] = now
		}
		if _, known := calls[key]; known {
			p.Called++
		}
		switch {
		case answered(peer, t):
			p.Answered++
			took = append(took, peer.LastHandshake.Sub(t.Promoted))
			if peer.Keepalive == called || peer.Keepalive == 0 && want != 0 {
				restore = append(restore, wg.Keepalive{Peer: key, Interval: want})
			}
		case !peer.Endpoint.IsValid():
			// A call now would leave nobody to be called for 5 seconds, should its
			// endpoint come (send.c, wg_packet_send_handshake_initiation).
			p.Unknown++
		case peer.Keepalive == 0:
			if want == 0 {
				want = called
			}
			todo = append(todo, wg.Keepalive{Peer: key, Interval: want})
		case now.Sub(calls[key]) > answerWithin:
			p.Silent++
		}
	}
	seen := make(map[wgroam.Key]time.Time, len(todo))
	for _, c := range todo {
		seen[c.Peer] = k.seen(peers[c.Peer])
	}
	slices.SortFunc(todo, func(a, b wg.Keepalive) int { return seen[b.Peer].Compare(seen[a.Peer]) })
	slices.Sort(took)
	if n := len(took); n > 0 {
		p.P50, p.P99 = took[(n-1)*50/100], took[(n-1)*99/100]
	}
	return todo, restore, p
}

// seen returns when a peer was last known to be alive.
func (k *Keeper) seen(p wg.Peer) time.Time {
	at := k.cfg.Seen(p.Key)
	if p.LastHandshake.After(at) {
		return p.LastHandshake
	}
	return at
}

// finish gives the peers that have not answered their intervals, and sums up.
func (k *Keeper) finish(peers map[wgroam.Key]wg.Peer, t *taken, p Promotion) error {
	var rest []wg.Keepalive
	for key, peer := range peers {
		if want := t.Keepalives[key]; peer.Keepalive == called || peer.Keepalive == 0 && want != 0 {
			rest = append(rest, wg.Keepalive{Peer: key, Interval: want})
		}
	}
	if err := k.keepalives(rest); err != nil {
		return err
	}
	p.Ended = time.Now()
	k.mu.Lock()
	k.status.Last = p
	k.mu.Unlock()
	k.cfg.Log.Info("promoted", "peers", p.Peers, "called", p.Called, "answered", p.Answered, "silent", p.Silent, "unknown", p.Unknown,
		"p50", p.P50.Round(time.Millisecond), "p99", p.P99.Round(time.Millisecond), "took", p.Ended.Sub(p.Began).Round(time.Millisecond))
	return nil
}
