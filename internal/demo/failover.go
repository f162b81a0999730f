// SPDX-License-Identifier: MIT

package demo

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"
)

// kinds are the clients of a lab, in their order.
var kinds = []struct {
	name      string
	sends     bool          // else a gateway sends to it
	keepalive time.Duration // persistent
}{
	{"sends", true, 0},
	{"idle", false, 25 * time.Second},
	{"silent", false, 0},
}

const (
	// before is how long all flows must have run when the gateway dies.
	before = 1500 * time.Millisecond
	// notice is how long a is dead before h is told: what watches over gateways needs
	// time, and with wgroam that is the most of an outage.
	notice = time.Second
	// limit is how long traffic may take to come back from then on.
	limit = 40 * time.Second
	// callAgain is when WireGuard repeats a handshake that was not answered
	// (drivers/net/wireguard/messages.h, REKEY_TIMEOUT). Who is back by then has
	// answered the first.
	callAgain = 5 * time.Second
)

// failover is the second act.
func (s *show) failover(ctx context.Context) error {
	s.screen.print("", s.screen.paint(bold, failoverTitle))
	s.screen.print(s.screen.wrap(failoverText)...)
	if err := s.allFlow(ctx); err != nil {
		return err
	}
	for _, side := range s.sides() {
		if err := side.count(); err != nil {
			return err
		}
	}
	var g errgroup.Group
	g.Go(func() error { return errors.Join(s.with.die(), s.a.kill()) })
	g.Go(s.without.die)
	if err := g.Wait(); err != nil {
		return err
	}
	err := s.picture(ctx, func() bool { return time.Since(s.without.death) >= notice })
	if err != nil {
		return err
	}
	g.Go(s.with.takeOver)
	g.Go(func() error {
		// What an operator's script does, and the daemon on the other side.
		return errors.Join(s.without.takeOver(), s.without.standby().LinkUp())
	})
	if err := g.Wait(); err != nil {
		return err
	}
	err = s.picture(ctx, func() bool { return s.isOver() || time.Since(s.without.told) >= limit })
	if err != nil {
		return err
	}
	now := time.Now()
	s.screen.print(s.failoverRows(now)...)
	s.screen.print(s.closeRows(now)...)
	s.sum.Failover, err = s.outcome(ctx)
	return err
}

// sides returns both labs.
func (s *show) sides() []*side { return []*side{s.with, s.without} }

// allFlow waits until every flow has run for a while.
func (s *show) allFlow(ctx context.Context) error {
	for _, side := range s.sides() {
		// Also the clients that do not send have moved by now: without wgroam the
		// standby cannot know.
		if err := side.roamAll(ctx); err != nil {
			return err
		}
	}
	if err := s.synced(ctx); err != nil {
		return err
	}
	from := time.Now()
	return eventually(ctx, "traffic to all clients", func() (bool, error) {
		s.screen.draw("Traffic flows; the death of a is next ...")
		for _, side := range s.sides() {
			for _, f := range side.flows {
				if _, ok := f.outage(from, from.Add(before)); !ok {
					return false, nil
				}
			}
		}
		return true, nil
	})
}

// count notes what h knows.
func (s *side) count() error {
	held, err := s.standby().Endpoints()
	if err != nil {
		return err
	}
	for _, c := range s.lab.Clients {
		if held[c.Key()] == c.Endpoint() {
			s.known++
		}
	}
	return nil
}

// die cuts a off, and ends its device: what went on sending would fill queues that
// nobody empties, and hold up the end of the demo.
func (s *side) die() error {
	s.death = time.Now()
	err := s.active().Kill()
	s.cut = time.Now()
	return errors.Join(err, s.active().LinkDown())
}

// takeOver moves the virtual IP to h.
func (s *side) takeOver() error {
	s.told = time.Now()
	return s.lab.MoveVIP(s.standby())
}

// outage returns how long a client had no traffic since h was told; ok is false
// while it has none.
func (s *side) outage(client int) (d time.Duration, ok bool) {
	if s.told.IsZero() {
		return 0, false
	}
	return s.flows[client].outage(s.told, s.cut)
}

// picture shows the packets until it is over, and tells who is back.
func (s *show) picture(ctx context.Context, over func() bool) error {
	tick := time.NewTicker(frame)
	defer tick.Stop()
	for {
		for _, side := range s.sides() {
			for i, f := range side.flows {
				if outage, ok := side.outage(i); ok && !s.back[f] {
					s.back[f] = true
					if !s.screen.live {
						s.screen.print(s.backRow(side, i, outage))
					}
				}
			}
		}
		if over() {
			return nil
		}
		s.screen.draw(s.failoverRows(time.Now())...)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}

// isOver tells that all clients are back.
func (s *show) isOver() bool { return len(s.back) == len(s.with.flows)+len(s.without.flows) }

func (s *show) outcome(ctx context.Context) (*Failover, error) {
	d, err := s.h.device(ctx)
	if err != nil {
		return nil, fmt.Errorf("ask gateway h how the failover went: %w", err)
	}
	f := &Failover{
		Method: outageMethod, LimitMS: limit.Milliseconds(),
		With: s.with.outcome(), Without: s.without.outcome(),
	}
	if p := d.Failover.Promotion; p != nil {
		f.Answered = p.Answered
	}
	return f, nil
}

func (s *side) outcome() Outcome {
	o := Outcome{NoticeMS: milliseconds(s.told.Sub(s.death)), Known: s.known}
	for i := range s.flows {
		d, ok := s.outage(i)
		if !ok {
			d = limit
		}
		o.Clients = append(o.Clients, Outage{Client: kinds[i].name, Back: ok, OutageMS: milliseconds(d)})
	}
	return o
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// verdict returns what the demo claims and has not shown.
func (s *show) verdict() error {
	f := s.sum.Failover
	var errs []error
	if n := len(kinds); f.With.Known < n || f.Answered < n {
		errs = append(errs, fmt.Errorf("failover with wgroam: gateway h knew %d of %d clients, and says that %d answered it",
			f.With.Known, n, f.Answered))
	}
	for i, with := range f.With.Clients {
		without := f.Without.Clients[i]
		switch {
		case !with.Back || with.OutageMS >= milliseconds(callAgain):
			errs = append(errs, fmt.Errorf("failover with wgroam: the client that %s was not back at h's first call", does(i)))
		case with.OutageMS >= without.OutageMS:
			errs = append(errs, fmt.Errorf("failover: the client that %s was back no sooner with wgroam than without", does(i)))
		}
	}
	return errors.Join(errs...)
}
