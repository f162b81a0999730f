// SPDX-License-Identifier: MIT

package main

import (
	"cmp"
	"context"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/applier"
	"github.com/wgroam/wgroam/internal/feed"
	"github.com/wgroam/wgroam/internal/natsd"
	"github.com/wgroam/wgroam/internal/snapshot"
	"github.com/wgroam/wgroam/internal/wg"
	"github.com/wgroam/wgroam/publisher"
)

// Keys are rolled from node to node, and the others must hear a node that has
// the new ones, and the reverse. So a node that knows former keys of its device
// stays in their group: it listens and publishes there as well.

const (
	// formerFor is how long a node stays in the group of a private key that its
	// device had while the daemon ran.
	formerFor = 24 * time.Hour
	// maxFormer bounds the groups that a device is in for that.
	maxFormer = 2
)

// keys derives the group's keys from the device's private key, which does not
// stay in memory, and returns the former ones.
func (d *device) keys(client *wg.Client) (feed.Keys, []snapshot.Former, error) {
	private, err := client.PrivateKey(d.cfg.Name)
	defer clear(private[:])
	if err != nil {
		return feed.Keys{}, nil, err
	}
	keys, err := feed.Derive(private, d.cfg.Secret)
	if err != nil {
		return feed.Keys{}, nil, err
	}
	var former []snapshot.Former
	if d.cfg.FormerSecretFile != "" {
		k, err := feed.Derive(private, d.cfg.FormerSecret)
		if err != nil {
			return feed.Keys{}, nil, err
		}
		former = append(former, snapshot.Former{Keys: k})
	}
	return keys, append(former, d.rekeyed(keys, time.Now())...), nil
}

// rekeyed notes the keys that are in force now, and returns those that were
// before, oldest first. They are kept in a file, sealed with those in force, for the daemon
// that comes after this one.
func (d *device) rekeyed(keys feed.Keys, now time.Time) []snapshot.Former {
	d.mu.Lock()
	defer d.mu.Unlock()
	was, dir := d.inForce, d.d.cfg.StateDir
	changed := d.group != "" && d.group != keys.Group()
	switch {
	case changed:
		d.former = append(d.former, snapshot.Former{Keys: was, Until: now.Add(formerFor)})
		d.log.Warn("the device has another private key; staying in the group of the former one as well, for the nodes that still have it",
			"former", d.group, "until", now.Add(formerFor))
	case d.group == "": // the daemon has just started
		former, err := snapshot.ReadFormer(dir, keys)
		if err != nil {
			d.log.Error("not staying in the groups of former private keys, if there are any", "err", err)
		}
		for i := range former { // the clock was ahead, perhaps
			if most := now.Add(formerFor); former[i].Until.After(most) {
				former[i].Until = most
			}
		}
		d.former = former
	}
	d.group, d.inForce = keys.Group(), keys
	if len(d.former) == 0 {
		return nil // and a file that cannot be read stays, for a daemon that can
	}
	var out []snapshot.Former
	for _, f := range d.former {
		if f.Group() != d.group && now.Before(f.Until) {
			out = append(out, f)
		}
	}
	d.former = out[max(0, len(out)-maxFormer):]
	err := snapshot.WriteFormer(dir, keys, d.former)
	if changed && err == nil {
		err = snapshot.WriteFormer(dir, was, nil)
	}
	if err != nil {
		d.log.Error("a restart forgets the former private keys: make room, or make state.dir writable", "err", err)
	}
	return d.former
}

// lastLook notices keys that have come since the last dump when the daemon ends, or the
// next one would not know that there were others.
func (d *device) lastLook(daemon context.Context, client *wg.Client) {
	if daemon.Err() != nil {
		_, _, _ = d.keys(client) // the device may be gone
	}
}

// member is this node's part in a group of former keys. It has a table of its
// own, because digests depend on the group.
type member struct {
	keys       snapshot.Former
	table      *wgroam.Table
	feed       *feed.Link
	merger     *applier.Merger
	publisher  *publisher.Publisher
	toUs, from *wgroam.Changes // of the member's table, and of the device's
	leave      func()
	yielded    <-chan struct{} // closed when they are another device's keys
	ended      atomic.Bool     // the keys have had their time, or are another's
}

// join makes this node a member of the group of former keys, of which nothing
// runs yet. It is none of a group that another device is in.
func (d *device) join(s *session, keys snapshot.Former, server *natsd.Server) error {
	yielded := make(chan struct{})
	release, err := d.d.claim(keys.Group(), claim{where(d.cfg.Name, d.cfg.Netns), sync.OnceFunc(func() { close(yielded) })})
	if err != nil {
		d.log.Warn("not staying in the group of former keys", "err", err)
		return nil
	}
	m := &member{
		keys: keys, table: wgroam.NewTable(keys.DigestKey()),
		toUs: wgroam.NewChanges(), from: wgroam.NewChanges(), yielded: yielded,
	}
	m.table.KeepFor(d.d.cfg.MaxAge)
	m.leave = sync.OnceFunc(func() {
		if server != nil {
			server.RemoveGroup(keys.Keys)
		}
		release()
	})
	s.former = append(s.former, m)
	s.table.Notify(m.from, func(wgroam.Record) bool { return !m.ended.Load() })
	for _, r := range s.table.Records() {
		m.table.Merge(r)
	}
	m.table.Notify(m.toUs, nil)
	if m.feed, m.merger, err = d.connect(s, keys.Keys, m.table, server); err != nil {
		return err
	}
	m.publisher = publisher.New(publisher.Config{
		Table: m.table, Link: m.feed, Role: d.feedRole, Beat: d.d.cfg.NATS.Heartbeat, Log: d.log,
	})
	return nil
}

// members returns the memberships that have not had their time.
func (s *session) members() []*member {
	return slices.DeleteFunc(slices.Clone(s.former), func(m *member) bool { return m.ended.Load() })
}

// future returns the alarm about records from the future, in whichever group.
func (s *session) future() error {
	err := s.merger.Future()
	for _, m := range s.members() {
		err = cmp.Or(err, m.merger.Future())
	}
	return err
}

// leave ends the memberships, which do not run any more.
func (s *session) leave() {
	for _, m := range s.former {
		m.leave()
	}
}

// restore takes over what this node knew when the keys were in force.
func (m *member) restore(d *device) {
	file := snapshot.New(snapshot.Config{Dir: d.d.cfg.StateDir, Keys: m.keys.Keys, Log: d.log})
	records, err := file.Read()
	if err != nil {
		d.log.Error("cannot use the snapshot of the former keys; the other nodes may know", "err", err)
	}
	m.merger.Restore(records)
}

// run is the membership, until ctx ends, or the keys have had their time or are another
// device's; then this one is in their group no more. What one table learns, the other does.
func (m *member) run(ctx context.Context, ours *wgroam.Table, log *slog.Logger) {
	m.feed.Start()
	membership, cancel := context.WithCancel(ctx)
	defer cancel()
	if !m.keys.Until.IsZero() {
		membership, cancel = context.WithDeadline(membership, m.keys.Until)
		defer cancel()
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		defer cancel()
		select {
		case <-membership.Done():
		case <-m.yielded:
		}
	})
	wg.Go(func() { m.merger.Run(membership) })
	wg.Go(func() { _ = m.publisher.Run(membership) }) // always nil
	wg.Go(func() { carry(membership, m.toUs, m.table, ours) })
	wg.Go(func() { carry(membership, m.from, ours, m.table) })
	wg.Wait()
	m.feed.Close()
	if ctx.Err() == nil {
		m.ended.Store(true)
		m.leave()
		log.Info("not in the group of a former key any more", "group", m.keys.Group())
	}
}

// carry merges into a table what changes in another, until ctx ends.
func carry(ctx context.Context, changes *wgroam.Changes, from, to *wgroam.Table) {
	const some = 1000
	for {
		select {
		case <-ctx.Done():
			return
		case <-changes.Ready():
		}
		for _, k := range changes.Take(some) {
			if r, ok := from.Get(k); ok {
				to.Merge(r)
			}
		}
	}
}

// groupNode is another node, of the group or of that of former keys.
type groupNode struct {
	applier.Node
	former bool // not heard under the keys in force
}

// nodes returns the other nodes.
func (s *session) nodes() []groupNode {
	var out []groupNode
	at := make(map[wgroam.NodeID]int)
	add := func(list []applier.Node, former bool) {
		for _, n := range list {
			i, ok := at[n.ID]
			switch {
			case !ok:
				at[n.ID] = len(out)
				out = append(out, groupNode{n, former})
			case out[i].State == applier.NodeStale && n.State != applier.NodeStale:
				out[i] = groupNode{n, former}
			}
		}
	}
	add(s.merger.Nodes(), false)
	for _, m := range s.members() {
		add(m.merger.Nodes(), true)
	}
	return out
}
