// SPDX-License-Identifier: MIT

package failover

import (
	"cmp"
	"context"
	"slices"
	"time"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/wg"
)

const (
	// kernelWindow and userWindow are how many answers may be outstanding. With 512
	// of them in its queue WireGuard takes itself for overloaded and asks for cookies,
	// which costs each peer 5 seconds (receive.c, MAX_QUEUED_INCOMING_HANDSHAKES / 8);
	// wireguard-go does so with 128 (device.go, QueueHandshakeSize/8).
	kernelWindow = 384
	userWindow   = 96
	// answerWithin is how long an answer is counted on. The peer may be gone, and
	// must not be in the way of the others.
	answerWithin = time.Second
	// giveUpAfter is when a call has failed: WireGuard has repeated it after 5
	// seconds, and up to 334 ms of chance (timers.c), and there was time to answer
	// that.
	giveUpAfter = 5*time.Second + 334*time.Millisecond + answerWithin
	// lookAgain is the least time between two looks at the device, and lookSeldom
	// that where Answered tells of the answers.
	lookAgain  = 10 * time.Millisecond
	lookSeldom = time.Second
	// tellAgain is the least time between two words on the progress.
	tellAgain = 250 * time.Millisecond
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
	k.status.State = StatePromoting
	k.mu.Unlock()
	k.told = time.Time{}
	k.progress(func(p *Promotion) { *p = Promotion{Began: t.Promoted} })
}

// progress notes how far a promotion has come, and tells.
func (k *Keeper) progress(note func(*Promotion)) {
	k.mu.Lock()
	note(&k.status.Last)
	p := k.status.Last
	k.mu.Unlock()
	if now := time.Now(); !p.Ended.IsZero() || now.Sub(k.told) > tellAgain {
		k.told = now
		k.cfg.Progress(p)
	}
}

// calls are those of a promotion.
type calls struct {
	*taken
	todo     []wg.Keepalive           // to be made, in order
	made     map[wgroam.Key]time.Time // when
	answered map[wgroam.Key]bool      // have a session since the promotion began
	open     int                      // made and not answered
	// waiting are those whose answers are counted on, of queue, which has the newest
	// calls in their order.
	waiting map[wgroam.Key]bool
	queue   []wgroam.Key
}

// contact is a peer whose endpoint the device has.
type contact struct {
	peer      wgroam.Key
	handshake time.Time // the last one
}

// call gives all peers the intervals that they had, which calls them: those last
// seen first, as many at a time as can be answered. A peer without an interval gets
// one for the time of the call. It ends when every peer with an endpoint has
// answered, or had its chance; and early with ctx.
//
// The device of many peers takes long to read. So the first to be called are those
// that it had when it was last read, and where Answered tells of the answers it is
// read once in a while only. Whenever it is read, tend looks after the rest.
func (k *Keeper) call(ctx context.Context, t *taken, tend func()) error {
	answers := wgroam.NewChanges()
	k.answers.Store(answers)
	defer k.answers.Store(nil)
	c := &calls{taken: t, made: make(map[wgroam.Key]time.Time), answered: make(map[wgroam.Key]bool), waiting: make(map[wgroam.Key]bool)}
	if k.known != nil {
		c.todo = k.order(t, k.known)
		k.known = nil
		if err := k.talk(ctx, c, answers, 0); err != nil {
			return err
		}
	}
	for ctx.Err() == nil {
		tend()
		began := time.Now()
		dev, err := k.dump()
		if err != nil {
			return err
		}
		restore, p := k.judge(dev.Peers, c)
		if err := k.keepalives(restore); err != nil {
			return err
		}
		k.progress(func(last *Promotion) { *last = p })
		over := len(c.todo) == 0
		for key, at := range c.made {
			over = over && (c.answered[key] || time.Since(at) > giveUpAfter)
		}
		if over {
			return k.finish(dev.Peers, t, p)
		}
		if err := k.talk(ctx, c, answers, time.Since(began)); err != nil {
			return err
		}
	}
	return nil
}

// Answered tells the keeper that a peer has a session from now on.
func (k *Keeper) Answered(peer wgroam.Key) {
	if answers := k.answers.Load(); answers != nil {
		answers.Mark(peer)
	}
}

// talk makes calls as answers leave room for them, until the device is to be looked
// at again, which took so long the last time, or ctx ends.
func (k *Keeper) talk(ctx context.Context, c *calls, answers *wgroam.Changes, cost time.Duration) error {
	window, pause := userWindow, max(lookAgain, cost)
	if k.kernel {
		window = kernelWindow
	}
	told := k.cfg.Told()
	if told {
		pause = max(lookSeldom, 9*cost)
	}
	began := time.Now()
	for ctx.Err() == nil {
		for _, key := range answers.Take(answers.Len()) {
			c.answer(key)
		}
		c.expire()
		n := min(window-len(c.waiting), len(c.todo), wg.ChunkPeers)
		if n > 0 {
			if err := k.keepalives(c.todo[:n]); err != nil {
				return err
			}
			c.call(n)
		}
		k.acts(Active)
		k.progress(func(p *Promotion) { p.Called, p.Answered = len(c.made), len(c.answered) })
		rest := pause - time.Since(began)
		switch {
		case told && len(c.todo) == 0 && c.open == 0, rest <= 0:
			return nil
		case n > 0:
			continue
		case len(c.todo) > 0:
			rest = min(rest, answerWithin-time.Since(c.made[c.queue[0]]))
		}
		select {
		case <-ctx.Done():
		case <-answers.Ready():
		case <-time.After(rest):
		}
	}
	return nil
}

// call notes that the first n of todo have been called.
func (c *calls) call(n int) {
	now := time.Now()
	for _, k := range c.todo[:n] {
		c.ring(k.Peer, now)
	}
	c.todo = c.todo[n:]
}

// ring notes a call.
func (c *calls) ring(peer wgroam.Key, at time.Time) {
	c.made[peer] = at
	if !c.answered[peer] {
		c.open++
		c.waiting[peer] = true
		c.queue = append(c.queue, peer)
	}
}

// answer notes that a peer has a session.
func (c *calls) answer(peer wgroam.Key) {
	if _, called := c.made[peer]; called && !c.answered[peer] {
		c.open--
	}
	c.answered[peer] = true
	delete(c.waiting, peer)
}

// expire stops to count on those that have not answered for long.
func (c *calls) expire() {
	for len(c.queue) > 0 {
		if first := c.queue[0]; c.waiting[first] && time.Since(c.made[first]) < answerWithin {
			return
		}
		delete(c.waiting, c.queue[0])
		c.queue = c.queue[1:]
	}
}

// judge compares the device with what it should have. It makes anew what is to be
// called; restore are the peers that need their interval only.
func (k *Keeper) judge(peers []wg.Peer, c *calls) (restore []wg.Keepalive, p Promotion) {
	p = Promotion{Began: c.Promoted, Peers: len(peers)}
	var (
		took []time.Duration
		todo []contact
	)
	now := time.Now()
	for _, peer := range peers {
		key, want := peer.Key, c.Keepalives[peer.Key]
		if peer.LastHandshake.After(c.Promoted) {
			c.answer(key)
			took = append(took, peer.LastHandshake.Sub(c.Promoted))
		}
		calling := peer.Keepalive == called || want != 0 && peer.Keepalive == want
		if _, known := c.made[key]; calling && !known && !c.answered[key] {
			// By a daemon that was killed since.
			c.ring(key, now)
		}
		at, known := c.made[key]
		if known {
			p.Called++
		}
		switch {
		case c.answered[key]:
			p.Answered++
			if peer.Keepalive == called || peer.Keepalive == 0 && want != 0 {
				restore = append(restore, wg.Keepalive{Peer: key, Interval: want})
			}
		case !peer.Endpoint.IsValid():
			// A call now would leave nobody to be called for 5 seconds, should its
			// endpoint come (send.c, wg_packet_send_handshake_initiation).
			p.Unknown++
		case peer.Keepalive == 0:
			todo = append(todo, contact{key, peer.LastHandshake})
		case now.Sub(at) > answerWithin:
			p.Silent++
		}
	}
	c.todo = k.order(c.taken, todo)
	slices.Sort(took)
	if n := len(took); n > 0 {
		p.P50, p.P99 = took[(n-1)*50/100], took[(n-1)*99/100]
	}
	return restore, p
}

// contacts returns the peers that can be called.
func contacts(peers []wg.Peer) []contact {
	out := make([]contact, 0, len(peers))
	for _, p := range peers {
		if p.Endpoint.IsValid() {
			out = append(out, contact{p.Key, p.LastHandshake})
		}
	}
	return out
}

// order returns the intervals that call peers, those last seen first.
func (k *Keeper) order(t *taken, peers []contact) []wg.Keepalive {
	for i, p := range peers {
		if seen := k.cfg.Seen(p.peer); seen.After(p.handshake) {
			peers[i].handshake = seen
		}
	}
	slices.SortFunc(peers, func(a, b contact) int { return b.handshake.Compare(a.handshake) })
	out := make([]wg.Keepalive, len(peers))
	for i, p := range peers {
		out[i] = wg.Keepalive{Peer: p.peer, Interval: cmp.Or(t.Keepalives[p.peer], called)}
	}
	return out
}

// restore gives peers the intervals that they had.
func (k *Keeper) restore(peers []wg.Peer, t *taken) error {
	var rest []wg.Keepalive
	for _, peer := range peers {
		if want := t.Keepalives[peer.Key]; peer.Keepalive == called || peer.Keepalive == 0 && want != 0 {
			rest = append(rest, wg.Keepalive{Peer: peer.Key, Interval: want})
		}
	}
	return k.keepalives(rest)
}

// finish gives the peers that have not answered their intervals, and sums up.
func (k *Keeper) finish(peers []wg.Peer, t *taken, p Promotion) error {
	if err := k.restore(peers, t); err != nil {
		return err
	}
	p.Ended = time.Now()
	k.progress(func(last *Promotion) { *last = p })
	k.cfg.Log.Info("promoted", "peers", p.Peers, "called", p.Called, "answered", p.Answered, "silent", p.Silent, "unknown", p.Unknown,
		"p50", p.P50.Round(time.Millisecond), "p99", p.P99.Round(time.Millisecond), "took", p.Ended.Sub(p.Began).Round(time.Millisecond))
	return nil
}
