// SPDX-License-Identifier: MIT

package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/wgroam/wgroam/applier"
	"github.com/wgroam/wgroam/failover"
	"github.com/wgroam/wgroam/internal/config"
	"github.com/wgroam/wgroam/internal/control"
	"github.com/wgroam/wgroam/internal/feed"
)

const (
	// replyWithin is how long a node may take to say whether it could take over.
	replyWithin = 2 * time.Second
	// equalWithin is how long it waits for its table to be that of the active.
	equalWithin = time.Second
	// ticketFor is how long it can then be told to.
	ticketFor = 3 * time.Second
	// openWithin is how long it may take until it calls the peers.
	openWithin = 3 * time.Second
	// takenWithin is how long the former active waits for that to be confirmed, and
	// is quiet without an active at most. By then the ticket is void, and who took it
	// has given it up or says in its beats that it is active.
	takenWithin = ticketFor + openWithin
	// movedWithin is how long keepalived, or whoever moves the virtual IP, may take.
	movedWithin = 30 * time.Second
	// wantWithin is how long a standby waits for the active to hand over: to prepare takes
	// that 20 seconds at most.
	wantWithin = movedWithin + takenWithin + 25*time.Second
	// lastWithin is how long the last roams may take to be read.
	lastWithin = 50 * time.Millisecond
	// givingWithin is how long somebody may look whether a handover was interrupted.
	givingWithin = 100 * time.Millisecond
	// maxTickets bounds the tickets that are good at once.
	maxTickets = 16
	// pollHandover is how often it is looked whether something has happened.
	pollHandover = 2 * time.Millisecond
)

// handover is what a device knows of the handovers that it has a part in.
type handover struct {
	giving sync.Mutex // held while this node hands over

	mu      sync.Mutex
	wanted  func(step, detail string) // while this node has asked to be handed the role
	tickets map[feed.Ticket]ticket
	// yields is the node that keepalived is to prefer; empty for none.
	yields string
	// stop ends what this node's handover waits for, while it has taken nothing from
	// anybody; or nil.
	stop context.CancelFunc
}

// stoppable says by what the handover can be ended, from now on.
func (h *handover) stoppable(stop context.CancelFunc) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.stop = stop
}

// end ends a handover that waits for the other node, or for the virtual IP.
func (h *handover) end() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.stop != nil {
		h.stop()
	}
}

// errStopped: an operator has decided otherwise.
var errStopped = errors.New("wgroam role has ended the handover: it shows what is so now")

// ticket is good for one StepTake, of that life of a node.
type ticket struct {
	from  feed.Header
	until time.Time
}

// begin locks giving. It returns errBusy where that is locked for long.
func (h *handover) begin(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, givingWithin)
	defer cancel()
	if await(ctx, h.giving.TryLock) != nil {
		return errBusy
	}
	return nil
}

var errBusy = errors.New("a handover is going on already: wait for its end")

// handover hands the role of a device over, and tells how far it is, to the end. The
// error is about what was asked for. The device is named as in the status, and empty for the only one whose role is not fixed.
func (d *daemon) handover(ctx context.Context, name, to string, tell func(control.HandoverStep)) error {
	var found []*device
	for _, dev := range d.devices {
		if at := where(dev.cfg.Name, dev.cfg.Netns); name == at || name == "" && dev.cfg.Role == config.RoleAuto {
			found = append(found, dev)
		}
	}
	switch {
	case len(found) == 0 && name == "":
		return fmt.Errorf("%w: set role = \"auto\" for the device that is to be handed over", failover.ErrFixed)
	case len(found) == 0:
		return noDevice(name)
	case len(found) > 1:
		return errors.New("there are several devices: say which one with --device")
	}
	dev, began := found[0], time.Now()
	say := func(step, detail string) {
		now := time.Now()
		tell(control.HandoverStep{
			Time: now.UTC(), Device: dev.cfg.Name, Netns: dev.cfg.Netns, Step: step, MS: now.Sub(began).Milliseconds(), Detail: detail,
		})
	}
	if err := dev.handOverRole(ctx, to, say); err != nil {
		say(control.HandoverFailed, err.Error())
	}
	return nil
}

// handOverRole hands the role over to a node, or has the active hand it to this one.
func (d *device) handOverRole(ctx context.Context, to string, tell func(step, detail string)) error {
	s := d.live()
	if s == nil {
		return errors.New("the device is not there, or has no part in a group: see wgroam status")
	}
	switch role, by, _ := d.desk.Role(); {
	case by == failover.ByConfig:
		return fmt.Errorf("%w: the configuration says %s: set role = \"auto\" there", failover.ErrFixed, role)
	case role == failover.Active:
		if err := d.handing.begin(ctx); err != nil {
			return err
		}
		defer d.handing.giving.Unlock()
		n, err := soon(ctx, func() (applier.Node, error) { return s.standby(to) })
		if err != nil {
			return err
		}
		return d.give(ctx, s, n, false, tell)
	case to != "" && to != d.d.cfg.Node:
		return fmt.Errorf("this node is a standby: say so on the active, or let this one take over without --to")
	}
	n, err := soon(ctx, s.active)
	if err != nil {
		return err
	}
	return d.want(ctx, s, n, tell)
}

// soon gives f some time to find a node: a role that has just changed is in the next
// beat.
func soon(ctx context.Context, f func() (applier.Node, error)) (n applier.Node, err error) {
	ctx, cancel := context.WithTimeout(ctx, equalWithin)
	defer cancel()
	_ = await(ctx, func() bool {
		n, err = f()
		return err == nil
	})
	return n, err
}

// active returns the only other node that says it is active.
func (s *session) active() (applier.Node, error) {
	actives := slices.DeleteFunc(s.merger.Nodes(), func(n applier.Node) bool { return n.Role != feed.RoleActive || n.State == applier.NodeStale })
	if len(actives) != 1 {
		return applier.Node{}, fmt.Errorf("there are %d other actives to take over from; if there is none: wgroam role active", len(actives))
	}
	return actives[0], nil
}

// standby returns the node to hand over to: the only standby, or the one of that name.
func (s *session) standby(name string) (applier.Node, error) {
	var found []applier.Node
	var names []string
	for _, n := range s.merger.Nodes() {
		if n.Role == feed.RoleStandby && n.State != applier.NodeStale {
			names = append(names, cmp.Or(n.Name, n.ID.String()))
			if name == "" || name == n.Name {
				found = append(found, n)
			}
		}
	}
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(names) == 0:
		return applier.Node{}, errors.New("no standby is heard that could take over: see wgroam status")
	}
	return applier.Node{}, fmt.Errorf("say which standby is to take over with --to: %s", strings.Join(names, ", "))
}

// want asks the active to hand over to this node.
func (d *device) want(ctx context.Context, s *session, from applier.Node, tell func(step, detail string)) error {
	d.handing.mu.Lock()
	busy := d.handing.wanted != nil
	if !busy {
		d.handing.wanted = tell
	}
	d.handing.mu.Unlock()
	if busy {
		return errBusy
	}
	defer func() {
		d.handing.mu.Lock()
		defer d.handing.mu.Unlock()
		d.handing.wanted = nil
	}()
	ctx, cancel := context.WithTimeout(ctx, wantWithin)
	defer cancel()
	tell("asked", from.Name)
	r, err := s.feed.Consult(ctx, from.ID, feed.Question{Step: feed.StepWant})
	switch {
	case err != nil:
		return fmt.Errorf("%s has not answered (%w): look at wgroam status on both; a version without handover does not answer", from.Name, err)
	case r.Verdict != feed.Agreed:
		return fmt.Errorf("%s: %s", from.Name, r.Reason)
	}
	tell("done", d.d.cfg.Node+" is active")
	return nil
}

// give hands the role over to another node. giving is held.
func (d *device) give(ctx context.Context, s *session, to applier.Node, wanted bool, tell func(step, detail string)) (err error) {
	waiting, stop := context.WithCancel(ctx)
	defer stop()
	d.handing.stoppable(stop)
	defer func() {
		if d.handing.stoppable(nil); waiting.Err() != nil && ctx.Err() == nil {
			err = errStopped
		}
	}()
	_, by, since := d.desk.Role() // it can change as soon as the other node is ready
	r, err := d.prepare(waiting, s, to, wanted)
	if err != nil {
		return err
	}
	theirs := failover.Source(r.By)
	switch other := d.overruled(); {
	case verbDecides(by) && other != "":
		return fmt.Errorf("the verb overrules %s here, which the role cannot be handed over against: take its word back on both nodes, with wgroam role auto", other)
	case verbDecides(theirs) != verbDecides(by):
		return fmt.Errorf("the role of this node is by %s, that of %s by %s: let them be the same, with wgroam role auto where the verb has spoken", by, to.Name, theirs)
	case !verbDecides(by):
		return d.letMove(waiting, s, to, since, tell)
	}
	// From here on it goes on to its end, within takenWithin, whoever has lost interest.
	if d.handing.stoppable(nil); waiting.Err() != nil {
		return waiting.Err()
	}
	tell("ready", to.Name+" has every endpoint")
	if err := d.mem.Offer(to.ID.String()); err != nil {
		return fmt.Errorf("nothing is handed over that could be forgotten: %w", err)
	}
	if err := d.desk.Say(failover.ByVerb, failover.Standby); err != nil {
		d.log.Error("going on with the handover", "err", err)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), takenWithin)
	defer cancel()
	err = await(ctx, func() bool { return d.acts() == failover.Standby })
	if err == nil {
		tell("quiet", d.d.cfg.Node+" is a standby")
		s.lastRoams(ctx)
		s.flush(ctx)
		r, err = s.feed.Consult(ctx, to.ID, feed.Question{Step: feed.StepTake, Ticket: r.Ticket})
	}
	refused := err == nil && r.Verdict != feed.Agreed
	switch {
	case refused:
		// Its last beat may still say that it is active.
		err = errors.New(r.Reason)
	case err != nil && s.staysActive(context.WithoutCancel(ctx), to.ID.String()):
		// The answer is lost, and settleOffer sees whether it stays so.
		tell("done", to.Name+" says that it is active")
		return nil
	}
	if err != nil {
		if e := d.desk.Say(failover.ByVerb, failover.Active); e != nil {
			d.log.Error("active again", "err", e)
		}
		return fmt.Errorf("%s has not taken over, and this node is active again: %w", to.Name, err)
	}
	if err := d.mem.Offer(""); err != nil {
		d.log.Error("the handover is not noted as done", "err", err)
	}
	tell("done", to.Name+" is active")
	return nil
}

// verbDecides reports whether the verb may give a role that is given by that source.
func verbDecides(by failover.Source) bool { return by == failover.ByVerb || by == failover.ByNone }

// overruled returns a source that would give the role, if the verb had not spoken; empty
// if there is none.
func (d *device) overruled() failover.Source {
	for _, s := range []failover.Source{failover.ByVRRP, failover.ByVIP} {
		if d.desk.Said(s) != "" {
			return s
		}
	}
	return ""
}

// prepare has a node get all that this one knows, and say that it could take over.
func (d *device) prepare(ctx context.Context, s *session, to applier.Node, wanted bool) (feed.Reply, error) {
	var (
		r   feed.Reply
		err error
	)
	// Under churn, tables are equal for moments only.
	for range 5 {
		s.catchUp(ctx)
		s.flush(ctx)
		digests := s.table.Digests()
		asking, cancel := context.WithTimeout(ctx, replyWithin)
		r, err = s.feed.Consult(asking, to.ID, feed.Question{Step: feed.StepPrepare, Wanted: wanted, Digest: digests.Sum()})
		cancel()
		switch {
		case err != nil:
			return r, fmt.Errorf("%s does not answer, and nothing has changed (%w): a version without handover does not", to.Name, err)
		case r.Verdict == feed.Agreed:
			return r, nil
		case r.Verdict == feed.Refused:
			return r, fmt.Errorf("%s is not ready, and nothing has changed: %s", to.Name, r.Reason)
		}
	}
	return r, fmt.Errorf("%s is not ready, and nothing has changed: %s", to.Name, r.Reason)
}

// catchUp waits until the table has every roam that the device knows of, or gives up
// after a while.
func (s *session) catchUp(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, equalWithin)
	defer cancel()
	_ = await(ctx, func() bool { return s.tracker.Sync(ctx) })
}

// lastRoams has the table get what has come since catchUp, when nothing comes any more. The
// peers wait meanwhile, and a device of many takes long to read.
func (s *session) lastRoams(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, lastWithin)
	defer cancel()
	s.tracker.Sync(ctx)
}

// flush sends what waits to be sent, or gives up after a while.
func (s *session) flush(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, equalWithin)
	defer cancel()
	_ = await(ctx, func() bool { return s.publisher.Waiting() == 0 })
}

// letMove waits for the virtual IP to move, for whoever moves it. This node has been active
// since then.
func (d *device) letMove(ctx context.Context, s *session, to applier.Node, since time.Time, tell func(step, detail string)) error {
	keepalived := d.hearsVRRP()
	if keepalived {
		d.yield(to.Name)
		tell("ready", to.Name+" has every endpoint; wgroam check --elect and --feed fail here now, so that keepalived prefers it")
	} else {
		tell("ready", to.Name+" has every endpoint; move the virtual IP there now")
	}
	ctx, cancel := context.WithTimeout(ctx, movedWithin)
	defer cancel()
	gone, back := false, false
	err := await(ctx, func() bool {
		role, _, now := d.desk.Role()
		if !gone && !now.Equal(since) { // or it is back already
			gone = true
			tell("quiet", d.d.cfg.Node+" is a standby")
			s.lastRoams(ctx)
		}
		back = gone && role == failover.Active
		return back || gone && len(d.actives()) > 0
	})
	switch {
	case back:
		d.yield("") // or keepalived would take it away again
		return fmt.Errorf("the virtual IP has come back to this node: %s has not taken it; see what moves it there", to.Name)
	case err == nil && s.isActive(to.ID.String()):
		tell("done", to.Name+" is active")
		return nil
	case err == nil:
		return fmt.Errorf("%s is active now, and not %s: see what moves the virtual IP there", strings.Join(d.actives(), ", "), to.Name)
	case gone:
		return fmt.Errorf("this node is a standby, and %s does not say that it is active: look where the virtual IP is", to.Name)
	case keepalived:
		d.yield("")
		return fmt.Errorf("keepalived has not moved the virtual IP within %v: let it track wgroam check --elect, as in contrib/keepalived", movedWithin)
	}
	return fmt.Errorf("nobody has moved the virtual IP to %s within %v, and nothing has changed", to.Name, movedWithin)
}

// yield has keepalived prefer another node, or none.
func (d *device) yield(to string) {
	d.handing.mu.Lock()
	defer d.handing.mu.Unlock()
	d.handing.yields = to
}

// yields returns the node that keepalived is to prefer: until it is this one's turn
// again.
func (d *device) yields() string {
	d.handing.mu.Lock()
	defer d.handing.mu.Unlock()
	return d.handing.yields
}

// acts returns the role that the device acts by.
func (d *device) acts() failover.Role { return d.keeping().Acts }

// keeping returns what the keeper makes of the device; why there is none, where there
// should be one.
func (d *device) keeping() failover.Status {
	d.mu.Lock()
	keeper, left := d.keeper, d.left
	d.mu.Unlock()
	if keeper == nil {
		return failover.Status{Err: left}
	}
	return keeper.Status()
}

// isActive reports whether a node says that it is active.
func (s *session) isActive(id string) bool {
	n, live := s.node(id)
	return live && n.Role == feed.RoleActive
}

// node returns a node of the group, and whether it is heard of.
func (s *session) node(id string) (n applier.Node, live bool) {
	nodes := s.merger.Nodes()
	i := slices.IndexFunc(nodes, func(n applier.Node) bool { return n.ID.String() == id })
	if i < 0 {
		return applier.Node{}, false
	}
	return nodes[i], nodes[i].State != applier.NodeStale
}

// staysActive reports whether a node that says it is active still does so in its next
// beat: it may have given up meanwhile.
func (s *session) staysActive(ctx context.Context, id string) bool {
	if !s.isActive(id) {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, openWithin)
	defer cancel()
	asked := time.Now()
	_ = await(ctx, func() bool {
		n, live := s.node(id)
		return !live || n.Heard.After(asked)
	})
	return s.isActive(id)
}

// answer answers the questions of another node, until ctx ends.
func (d *device) answer(ctx context.Context, s *session, questions <-chan *feed.Question) {
	for {
		select {
		case <-ctx.Done():
			return
		case q := <-questions:
			r := feed.Reply{Verdict: feed.Agreed}
			_, by, _ := d.desk.Role()
			var err error
			switch q.Step {
			case feed.StepPrepare:
				r.Ticket, err = d.agree(ctx, s, q)
			case feed.StepTake:
				err = d.take(ctx, q)
			case feed.StepWant:
				if err = d.handing.begin(ctx); err != nil {
					break
				}
				// The other node is asked in turn, and has to answer meanwhile; and so has
				// this one.
				go func() {
					defer d.handing.giving.Unlock()
					d.wantedBy(ctx, s, q, r)
				}()
				continue
			default:
				err = errors.New("this version does not know that step of a handover: upgrade it")
			}
			d.reply(s, q, r, by, err)
		}
	}
}

func (d *device) reply(s *session, q *feed.Question, r feed.Reply, by failover.Source, err error) {
	r.By = string(by)
	if err != nil {
		r.Verdict, r.Reason = feed.Refused, err.Error()
		if errors.Is(err, errBehind) {
			r.Verdict = feed.NotYet
		}
	}
	if err := s.feed.Reply(q, r); err != nil {
		d.log.Warn("another node asked for a handover, and the answer cannot be sent", "node", s.merger.NameOf(q.Node), "err", err)
	}
}

// wantedBy hands the role over to the node that asked for it. That it did so just now,
// and this is no recording, it says when it is asked whether it could.
func (d *device) wantedBy(ctx context.Context, s *session, q *feed.Question, r feed.Reply) {
	role, by, _ := d.desk.Role()
	name := s.merger.NameOf(q.Node)
	var err error
	switch {
	case by == failover.ByConfig:
		err = fmt.Errorf("%w by the configuration", failover.ErrFixed)
	case role != failover.Active:
		err = fmt.Errorf("its role is %s", role)
	default:
		var to applier.Node
		if to, err = soon(ctx, func() (applier.Node, error) { return s.standby(name) }); err == nil {
			err = d.give(ctx, s, to, true, func(step, detail string) { d.log.Info("handover", "step", step, "detail", detail) })
		}
	}
	d.reply(s, q, r, by, err)
}

// errBehind: something is on its way to this node.
var errBehind = errors.New("it lacks something")

// agree says whether this node could take over now, and makes the ticket for it.
func (d *device) agree(ctx context.Context, s *session, q *feed.Question) (feed.Ticket, error) {
	role, _, _ := d.desk.Role()
	d.handing.mu.Lock()
	wanted := d.handing.wanted
	d.handing.mu.Unlock()
	switch {
	case q.Wanted && wanted == nil:
		return feed.Ticket{}, errors.New("it has not asked for that")
	case d.cfg.Role != config.RoleAuto:
		return feed.Ticket{}, fmt.Errorf("%w by the configuration", failover.ErrFixed)
	case role != failover.Standby:
		return feed.Ticket{}, fmt.Errorf("its role is %s", cmp.Or(role, "not known yet"))
	}
	waiting, cancel := context.WithTimeout(ctx, equalWithin)
	defer cancel()
	err := await(waiting, func() bool {
		digests := s.table.Digests()
		return digests.Sum() == q.Digest && d.settled()
	})
	switch {
	case err != nil && d.settled():
		return feed.Ticket{}, fmt.Errorf("%w: its table is another one; see wgroam status there", errBehind)
	case err != nil:
		return feed.Ticket{}, fmt.Errorf("%w: its device has not taken every endpoint; see wgroam peers there", errBehind)
	}
	if behind := d.behind(); behind > 0 {
		return feed.Ticket{}, fmt.Errorf("its clock is %v behind, and peers would ignore it for so long: keep both nodes on NTP", behind.Round(time.Millisecond))
	}
	// Acts is known before the rest is done.
	if k := d.keeping(); k.Acts != failover.Standby || k.Err != nil {
		return feed.Ticket{}, errors.New("its device is not that of a standby: see wgroam status there")
	}
	var t feed.Ticket
	_, _ = rand.Read(t[:]) // never fails
	now := time.Now()
	d.handing.mu.Lock()
	defer d.handing.mu.Unlock()
	for old, of := range d.handing.tickets {
		if now.After(of.until) {
			delete(d.handing.tickets, old)
		}
	}
	if len(d.handing.tickets) >= maxTickets {
		return feed.Ticket{}, errBusy
	}
	if d.handing.tickets == nil {
		d.handing.tickets = make(map[feed.Ticket]ticket)
	}
	d.handing.tickets[t] = ticket{q.Header, now.Add(ticketFor)}
	d.handing.yields = ""
	if q.Wanted {
		wanted("ready", "every endpoint is here; where keepalived does not, move the virtual IP here now")
	}
	return t, nil
}

// take makes this node the active one, and returns when it calls the peers.
func (d *device) take(ctx context.Context, q *feed.Question) error {
	d.handing.mu.Lock()
	t, ok := d.handing.tickets[q.Ticket]
	delete(d.handing.tickets, q.Ticket)
	d.handing.mu.Unlock()
	role, by, _ := d.desk.Role()
	switch {
	case !ok || t.from.Node != q.Node || t.from.Boot != q.Boot || time.Now().After(t.until):
		return errors.New("the ticket is not good, or not any more")
	case role != failover.Standby:
		return fmt.Errorf("its role is %s now", role)
	case !verbDecides(by):
		return fmt.Errorf("its role is by %s: let those of both nodes be the same", by)
	}
	before := d.desk.Said(failover.ByVerb)
	err := d.desk.Say(failover.ByVerb, failover.Active)
	if err == nil {
		ctx, cancel := context.WithTimeout(ctx, openWithin)
		defer cancel()
		if err = await(ctx, func() bool { return d.acts() == failover.Active }); err == nil {
			return nil
		}
		err = errors.New("its device did not become that of an active: see its log")
	}
	// Unless an operator has said something else meanwhile.
	if d.desk.Said(failover.ByVerb) == failover.Active {
		if err := d.desk.Say(failover.ByVerb, before); err != nil {
			d.log.Error("a standby again", "err", err)
		}
	}
	return err
}

// settleOffer finds out what became of a handover that has no known end, because this
// daemon or the other was killed, or an answer lost: if another node is active this
// one is not, and else it is again.
func (d *device) settleOffer(ctx context.Context, s *session) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	open := time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if !d.handing.giving.TryLock() {
			open = time.Now()
			continue
		}
		to := d.mem.Offered()
		role, by, _ := d.desk.Role()
		if role == failover.Active {
			d.yield("") // it is this one's turn again
		}
		_, heard := s.node(to)
		late := time.Since(open) > takenWithin
		word, known := role, false
		switch {
		case to == "":
			open = time.Now()
		case !verbDecides(by):
			known = true // somebody else decides
		case len(d.actives()) > 0:
			// That node, or another to which it went on. For a moment it may be one that gives
			// up again.
			if time.Since(open) > openWithin {
				word, known = failover.Standby, true
			}
		case late:
			word, known = failover.Active, heard
		}
		if word != role {
			d.log.Warn("a handover was interrupted", "role", word)
			if err := d.desk.Say(failover.ByVerb, word); err != nil {
				d.log.Error("after an interrupted handover", "err", err)
			}
		}
		if known {
			if err := d.mem.Offer(""); err != nil {
				d.log.Error("after an interrupted handover", "err", err)
			}
		}
		d.handing.giving.Unlock()
	}
}

// await polls until something holds, or ctx ends; then it returns ctx's error.
func await(ctx context.Context, holds func() bool) error {
	tick := time.NewTicker(pollHandover)
	defer tick.Stop()
	for !holds() {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
	return nil
}

func handoverVerb(ctx context.Context, e env, args []string) error {
	fs, parse := flags(e, "handover")
	asJSON := fs.Bool("json", false, "print one JSON object a line")
	socket := fs.String("socket", defaultSocket, "control socket of the daemon")
	device := fs.String("device", "", "the device, as status names it, if there are several")
	to := fs.String("to", "", "the node that is to be active, if there are several standbys")
	if err := parse(args); err != nil {
		return err
	}
	failed := errors.New("the daemon has not said how it ended: see wgroam role")
	err := control.Handover(ctx, *socket, *device, *to, func(line json.RawMessage) error {
		var step control.HandoverStep
		if err := json.Unmarshal(line, &step); err != nil {
			return err
		}
		var err error
		switch {
		case *asJSON:
			_, err = fmt.Fprintf(e.stdout, "%s\n", line)
		case step.Step != control.HandoverFailed: // which is the error
			_, err = fmt.Fprintf(e.stdout, "%6d ms  %-6s  %s\n", step.MS, step.Step, step.Detail)
		}
		switch step.Step {
		case control.HandoverDone:
			failed = nil
		case control.HandoverFailed:
			failed = errors.New(step.Detail)
		}
		return err
	})
	if errors.Is(err, context.Canceled) {
		return errors.New("the handover goes on: wgroam role shows what became of it")
	}
	return cmp.Or(err, failed)
}
