// SPDX-License-Identifier: MIT

// Package publisher tells the other nodes of a group what this node has seen:
// records as they are made, beats in between, and all that is in the table when
// another node asks.
package publisher

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"sync"
	"time"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/feed"
)

// Link is the part of feed.Link that a Publisher calls.
type Link interface {
	Self() wgroam.NodeID
	OnRequest(func(*feed.Request))
	OnBeat(func(feed.Beat))
	OnEvent(func(feed.Event))
	Publish([]wgroam.Record) error
	Beat(feed.Beat) error
	Answer(context.Context, *feed.Request, []wgroam.Record) (sent int, err error)
	Flush(context.Context) error
}

// Config says what to publish, and where.
type Config struct {
	// Link must not have been started when New is called.
	Link  Link
	Table *wgroam.Table
	// Role tells what this node is, for its beats; it must not block.
	Role func() feed.Role
	// Beat is the time between beats; zero is feed.DefaultInterval.
	Beat time.Duration
	// Sent, if set, is told how long a record took from the Table to a server. It
	// must not block.
	Sent func(time.Duration)
	Log  *slog.Logger
}

const (
	// retry is how long to wait after a failed publish that no connection
	// event explains.
	retry = 100 * time.Millisecond
	// farewell bounds what is still sent when Run is asked to end.
	farewell = 100 * time.Millisecond
	// forgetAfter is how long a node must be silent to be forgotten.
	forgetAfter = 24 * time.Hour
)

// heard is what is remembered of another node.
type heard struct {
	boot  uint64    // of a life that has begun
	begun time.Time // then
	at    time.Time // its newest beat
}

// Publisher publishes the records of one table.
type Publisher struct {
	cfg     Config
	changes *wgroam.Changes
	waits   *wgroam.Waits // since the record is in the Table
	flushUp chan struct{} // a connection came up
	beatUp  chan struct{}
	asked   *requests

	mu    sync.Mutex
	heard map[wgroam.NodeID]heard
}

// New makes a Publisher. From now on, the records of this node that win in the
// table wait to be published; Run publishes them.
func New(cfg Config) *Publisher {
	if cfg.Beat == 0 {
		cfg.Beat = feed.DefaultInterval
	}
	p := &Publisher{
		cfg:     cfg,
		changes: wgroam.NewChanges(),
		waits:   wgroam.NewWaits(),
		flushUp: make(chan struct{}, 1),
		beatUp:  make(chan struct{}, 1),
		asked:   newRequests(),
		heard:   make(map[wgroam.NodeID]heard),
	}
	cfg.Table.Notify(p.changes, func(r wgroam.Record) bool {
		if !p.own(r) {
			return false
		}
		p.waits.Begin(r.Peer, time.Now())
		return true
	})
	cfg.Link.OnRequest(p.asked.add)
	cfg.Link.OnBeat(func(b feed.Beat) {
		if p.isNew(b, time.Now()) {
			signal(p.beatUp)
		}
	})
	cfg.Link.OnEvent(func(e feed.Event) {
		if e.Up {
			signal(p.flushUp)
			signal(p.beatUp)
		}
	})
	return p
}

// isNew reports whether a node has begun to beat. Boots have no order: they are times
// of a clock that may have been set back. Who is new waits for a beat of ours, to know
// whom to ask for what it missed.
func (p *Publisher) isNew(b feed.Beat, now time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	h := p.heard[b.Node]
	h.at = now
	// Recordings of two lives by turns are new all the time.
	begun := h.boot != b.Boot && now.Sub(h.begun) >= p.cfg.Beat
	if begun {
		h.boot, h.begun = b.Boot, now
		maps.DeleteFunc(p.heard, func(_ wgroam.NodeID, h heard) bool { return now.Sub(h.at) > forgetAfter })
	}
	p.heard[b.Node] = h
	return begun
}

// own keeps what came from another node from being published again.
func (p *Publisher) own(r wgroam.Record) bool { return r.Version.Node == p.cfg.Link.Self() }

// Waiting returns the number of peers whose newest record has not been
// published.
func (p *Publisher) Waiting() int { return p.changes.Len() }

// Run publishes until ctx ends. Then it sends what still waits, for at most
// 100 ms, and returns nil. The Link must outlive it.
func (p *Publisher) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	wg.Go(func() { p.beat(ctx) })
	wg.Go(func() { p.answer(ctx) })
	p.publish(ctx)
	wg.Wait()

	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), farewell)
	defer cancel()
	for end.Err() == nil {
		if some, err := p.flush(); !some || err != nil {
			break
		}
	}
	p.sendBeat()
	if err := p.cfg.Link.Flush(end); err != nil {
		p.cfg.Log.Warn("the last records may not have reached the other nodes", "err", err)
	}
	return nil
}

func (p *Publisher) publish(ctx context.Context) {
	failing := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.changes.Ready():
		case <-p.flushUp:
		}
		for ctx.Err() == nil {
			some, err := p.flush()
			if err == nil {
				failing = false
				if !some {
					break
				}
				continue
			}
			// The peers stay marked, once each, however often they change until
			// a connection is up.
			var again <-chan time.Time
			if !errors.Is(err, feed.ErrNoLink) {
				again = time.After(retry)
				if !failing {
					failing = true
					p.cfg.Log.Warn("cannot publish, trying again", "err", err)
				}
			}
			select {
			case <-p.flushUp:
			case <-again:
			case <-ctx.Done():
			}
		}
	}
}

// flush publishes the newest records of peers that wait, as many as fit into
// one frame. It reports whether any waited.
func (p *Publisher) flush() (some bool, err error) {
	keys := p.changes.Take(feed.MaxRecords)
	records := make([]wgroam.Record, 0, len(keys))
	for _, k := range keys {
		// Another node may have seen the peer since.
		if r, ok := p.cfg.Table.Get(k); ok && p.own(r) {
			records = append(records, r)
		} else {
			p.waits.End(k, time.Now())
		}
	}
	if len(records) == 0 {
		return len(keys) > 0, nil
	}
	if err := p.cfg.Link.Publish(records); err != nil {
		for _, k := range keys {
			p.changes.Mark(k)
		}
		return true, err
	}
	now := time.Now()
	for _, r := range records {
		if waited, ok := p.waits.End(r.Peer, now); ok && p.cfg.Sent != nil {
			p.cfg.Sent(waited)
		}
	}
	return true, nil
}

func (p *Publisher) beat(ctx context.Context) {
	t := time.NewTicker(p.cfg.Beat)
	defer t.Stop()
	for {
		p.sendBeat()
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		case <-p.beatUp:
		}
	}
}

func (p *Publisher) sendBeat() {
	digests := p.cfg.Table.Digests()
	// Without a connection there is nobody to miss it.
	_ = p.cfg.Link.Beat(feed.Beat{
		Time:     time.Now(),
		Interval: p.cfg.Beat,
		Role:     p.cfg.Role(),
		Digest:   digests.Sum(),
		Records:  uint32(p.cfg.Table.Len()),
	})
}

func (p *Publisher) answer(ctx context.Context) {
	p.asked.each(ctx, func(r *feed.Request) int {
		n, err := p.cfg.Link.Answer(ctx, r, p.cfg.Table.Differing(&r.Have))
		if err != nil {
			p.cfg.Log.Debug("answer to a sync request cut short", "node", r.Node, "err", err)
		}
		return n
	})
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
