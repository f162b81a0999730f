// SPDX-License-Identifier: MIT

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/applier"
	"github.com/wgroam/wgroam/failover"
	"github.com/wgroam/wgroam/internal/config"
	"github.com/wgroam/wgroam/internal/control"
	"github.com/wgroam/wgroam/internal/feed"
)

// status is the daemon's answer to the verb status.
func (d *daemon) status() control.Status {
	s := control.Status{
		Node: d.cfg.Node, NodeID: wgroam.NodeIDOf(d.cfg.Node).String(),
		Version: version, Started: d.started,
	}
	for _, dev := range d.devices {
		s.Devices = append(s.Devices, dev.status())
	}
	if d.public != nil {
		e := d.public.Status()
		s.Events = &e
	}
	return s
}

func (d *device) status() control.DeviceStatus {
	d.mu.Lock()
	s, seen, problem, group := d.current, d.seen, d.problem, d.group
	d.mu.Unlock()

	out := control.DeviceStatus{
		Name: d.cfg.Name, Netns: d.cfg.Netns, Standby: string(d.cfg.Standby), VIP: d.cfg.VIP,
		Group: group, State: control.StateWaiting,
		Detector: control.Detector{Rung: control.RungNone},
		Feed:     control.FeedStatus{Mode: control.FeedNone, Listen: d.d.cfg.NATS.Listen},
	}
	d.roleStatus(&out)
	switch {
	case d.d.cfg.NATS.Existing():
		out.Feed.Mode = control.FeedExisting
	case d.d.cfg.NATS.Listen != "" || len(d.d.cfg.NATS.Peers) > 0:
		out.Feed.Mode = control.FeedEmbedded
	}
	var errs []string
	if problem != nil {
		errs = append(errs, problem.Error())
	}
	if _, err := d.d.natsd(); err != nil {
		errs = append(errs, err.Error())
		out.Feed.Error = err.Error()
	}
	d.keeperStatus(&out.Failover)
	if s == nil {
		if seen {
			out.State = control.StateMissing
		}
		out.LastError = strings.Join(errs, "; ")
		return out
	}

	out.State = control.StateDown
	if link, err := linkByName(s.space, d.cfg.Name); err == nil {
		out.Ifindex = link.Ifindex
		if link.Up {
			out.State = control.StateUp
		}
	}
	out.NetnsInode = s.netns
	t := s.tracker.Status()
	out.Detector = control.Detector{Rung: string(t.Rung), Reason: t.Reason}
	out.Events, out.Resyncs, out.SweepRepairs = t.Events, t.Resyncs, t.SweepRepairs
	out.Lost, out.Limited = d.d.kernel.Lost()+d.d.port.Lost(), d.d.kernel.Limited()
	out.Peers, out.Records = s.view.Len(), s.table.Len()
	for _, r := range s.table.Records() {
		if _, ok := s.view.Get(r.Peer); !ok {
			out.Waiting++
		}
	}
	if err := s.future(); err != nil {
		errs = append(errs, err.Error())
	}
	behind := s.behind()
	if out.ClockBehindMS = behind.Milliseconds(); out.ClockBehindMS > skewWarn {
		errs = append(errs, fmt.Sprintf("this host's clock is %v behind the group's: keep it on NTP, or peers ignore its handshakes for that long", behind.Round(100*time.Millisecond)))
	}
	f := s.state.Status()
	out.Snapshot = control.Snapshot{Path: f.Path, Written: f.Written, Records: f.Records, Writes: f.Writes, Errors: f.Errors}
	if f.Err != nil {
		out.Snapshot.Error = f.Err.Error()
		errs = append(errs, f.Err.Error())
	}
	a := s.applier.Status()
	out.Applied, out.ApplyErrors, out.Undone = a.Applied, a.Errors, a.Undone
	if a.LastError != nil {
		errs = append(errs, a.LastError.Error())
	}
	out.LastError = strings.Join(errs, "; ")
	s.feedStatus(&out.Feed)
	return out
}

func (s *session) feedStatus(out *control.FeedStatus) {
	out.Subjects = s.feed.Subjects()
	connections := func(link *feed.Link, former bool) {
		for _, c := range link.Status() {
			conn := control.Connection{Name: c.Name, Connected: c.Connected, Since: c.Since, Error: c.Denied}
			if !c.Connected {
				conn.Error = c.LastError
			}
			out.Connections = append(out.Connections, control.FeedConnection{Connection: conn, Former: former})
		}
	}
	connections(s.feed, false)
	for _, m := range s.members() {
		connections(m.feed, true)
	}
	for _, n := range s.nodes() {
		out.Nodes = append(out.Nodes, control.NodeStatus{
			Name: n.Name, ID: n.ID.String(), Role: n.Role.String(), State: string(n.State),
			AgeMS: time.Since(n.Heard).Milliseconds(), SkewMS: n.Skew.Milliseconds(), Records: n.Records, Former: n.former,
		})
	}
	c := s.feed.Counters()
	out.Sent, out.Received = c.SentRecords, c.Records
	out.FramesSent, out.FramesReceived = c.FramesSent, c.FramesReceived
	out.BytesSent, out.BytesReceived = c.BytesSent, c.BytesReceived
	out.Dropped = c.Dropped
	m := s.merger.Counters()
	out.Gaps, out.Syncs, out.SyncErrors, out.Synced = m.Gaps, m.Syncs, m.SyncErrors, m.Synced
	out.Refused = map[string]uint64{"aged": 0, "endpoint": 0, "full": 0, "skew": 0}
	refused := func(c feed.Counters, records map[string]uint64) {
		for reason, n := range map[string]uint64{
			"short": c.Short, "version": c.Version, "type": c.Type, "key_id": c.KeyID, "auth": c.Auth,
			"malformed": c.Malformed, "old": c.Old, "echo": c.OwnEcho, "name_clash": c.NameClash,
		} {
			out.Refused[reason] += n
		}
		for reason, n := range records {
			out.Refused[reason] += n
		}
	}
	refused(c, s.merger.Refused())
	// Also of those that have ended, for a counter does not go back.
	for _, m := range s.former {
		refused(m.feed.Counters(), m.merger.Refused())
	}
}

// peers is the daemon's answer to the verb peers.
func (d *daemon) peers() []control.Peer {
	var out []control.Peer
	for _, dev := range d.devices {
		dev.mu.Lock()
		s := dev.current
		dev.mu.Unlock()
		if s != nil {
			out = append(out, s.peers(dev.cfg, d.cfg.Node)...)
		}
	}
	return out
}

func (s *session) peers(device config.Device, self string) []control.Peer {
	now := time.Now()
	held := s.view.Peers()
	names := make(map[wgroam.NodeID]string)
	for _, n := range s.nodes() {
		names[n.ID] = n.Name
	}
	out := make([]control.Peer, 0, len(held))
	for _, r := range s.table.Records() {
		node := self
		if r.Version.Node != s.feed.Self() {
			node = cmp.Or(names[r.Version.Node], r.Version.Node.String())
		}
		at := r.Version.HLC.Time()
		p := control.Peer{
			Device: device.Name, Netns: device.Netns, Peer: r.Peer, Endpoint: r.Endpoint, Held: held[r.Peer].Endpoint,
			Cause: r.Cause.String(), Node: node, Observed: at, AgeS: max(0, int64(now.Sub(at).Seconds())),
			Applied: string(s.applier.State(r.Peer)),
		}
		if p.Applied == string(applier.StateNo) {
			if err := s.applier.Status().LastError; err != nil {
				p.Error = err.Error()
			}
		}
		out = append(out, p)
		delete(held, r.Peer)
	}
	// Peers that nobody has seen yet.
	for k, h := range held {
		p := control.Peer{Device: device.Name, Netns: device.Netns, Peer: k, Held: h.Endpoint, Applied: control.AppliedYes}
		if h.Endpoint.IsValid() {
			p.Cause = h.Cause.String()
		}
		out = append(out, p)
	}
	return out
}

func statusVerb(ctx context.Context, e env, args []string) error {
	return ask(ctx, e, "status", control.VerbStatus, args, func(s control.Status, w *tabwriter.Writer) error {
		fmt.Fprintf(w, "node\t%s (%s), version %s, up %s\n", s.Node, s.NodeID, s.Version, time.Since(s.Started).Round(time.Second))
		if e := s.Events; e != nil {
			fmt.Fprintf(w, "events\t%d published, %d dropped, %d waiting\n", e.Sent, e.Dropped, e.Waiting)
			printConnection(w, e.Connection)
		}
		for _, d := range s.Devices {
			printDevice(w, d)
		}
		return unhealthy(s)
	})
}

// unhealthy returns an error that names what is not working.
func unhealthy(s control.Status) error {
	var bad []string
	for _, d := range s.Devices {
		if d.State == control.StateWaiting || d.State == control.StateMissing {
			bad = append(bad, where(d.Name, d.Netns)+" is "+d.State)
		}
	}
	if bad != nil {
		return fmt.Errorf("not ready: %s", strings.Join(bad, ", "))
	}
	return nil
}

func printDevice(w *tabwriter.Writer, d control.DeviceStatus) {
	fmt.Fprintf(w, "\ndevice\t%s: %s, group %s\n", where(d.Name, d.Netns), d.State, d.Group)
	fmt.Fprintf(w, "role\t%s\n", roleLine(d))
	for _, a := range d.Alarms {
		fmt.Fprintf(w, "alarm\t%s: %s\n", a.Alarm, a.Detail)
	}
	if d.Failover.State != "" && d.Failover.State != failover.StateIdle || d.Failover.Error != "" {
		fmt.Fprintf(w, "failover\t%s\n", withReason(d.Failover.State, d.Failover.Error))
	}
	if to := d.Failover.Yields; to != "" {
		fmt.Fprintf(w, "  yields\tto %s, which keepalived is to prefer\n", to)
	}
	if p := d.Failover.Promotion; p != nil {
		fmt.Fprintf(w, "  promotion\t%s ago, %s\n", time.Since(p.Began).Round(time.Second), promotionLine(*p))
	}
	fmt.Fprintf(w, "detector\t%s\n", withReason(d.Detector.Rung, d.Detector.Reason))
	fmt.Fprintf(w, "changes\t%d seen, %d held back, %d lost, %d resyncs, %d repaired by the sweep\n", d.Events, d.Limited, d.Lost, d.Resyncs, d.SweepRepairs)
	fmt.Fprintf(w, "peers\t%d in the device, %d records, %d of them waiting for their peer\n", d.Peers, d.Records, d.Waiting)
	fmt.Fprintf(w, "applied\t%d endpoints, %d errors, %d unconfirmed ones taken back\n", d.Applied, d.ApplyErrors, d.Undone)
	if !d.Snapshot.Written.IsZero() {
		fmt.Fprintf(w, "snapshot\t%d records, %s ago, %s\n", d.Snapshot.Records, time.Since(d.Snapshot.Written).Round(time.Second), d.Snapshot.Path)
	}
	if d.LastError != "" {
		fmt.Fprintf(w, "error\t%s\n", d.LastError)
	}
	if d.Feed.Mode == control.FeedNone {
		fmt.Fprintf(w, "feed\tnone: set nats.listen and nats.peers, or nats.url, to reach other nodes\n")
		return
	}
	fmt.Fprintf(w, "feed\t%s, %d records sent, %d received\n", d.Feed.Mode, d.Feed.Sent, d.Feed.Received)
	if d.Feed.Mode == control.FeedExisting {
		fmt.Fprintf(w, "  subjects\t%s\n", d.Feed.Subjects)
	}
	for _, c := range d.Feed.Connections {
		if c.Former {
			c.Name += " (former keys)"
		}
		printConnection(w, c.Connection)
	}
	for _, n := range d.Feed.Nodes {
		under := ""
		if n.Former {
			under = ", under former keys"
		}
		fmt.Fprintf(w, "  node %s\t%s%s, role %s, clock %+d ms, %d records\n", n.Name, stateLine(n), under, n.Role, n.SkewMS, n.Records)
	}
	for _, why := range slices.Sorted(maps.Keys(d.Feed.Refused)) {
		if n := d.Feed.Refused[why]; n > 0 {
			fmt.Fprintf(w, "  refused\t%d (%s)\n", n, withReason(why, remedies[why]))
		}
	}
}

// promotionLine is a promotion for people.
func promotionLine(p control.Promotion) string {
	ended := "going on"
	if !p.Ended.IsZero() {
		ended = "took " + p.Ended.Sub(p.Began).Round(time.Millisecond).String()
	}
	return fmt.Sprintf("%s: %d of %d peers answered (p50 %d ms, p99 %d ms), %d called, %d silent, %d nobody knows where",
		ended, p.Answered, p.Peers, p.P50MS, p.P99MS, p.Called, p.Silent, p.Unknown)
}

// remedies say what to do about refused frames, where something can be done.
var remedies = map[string]string{
	"auth":       "somebody alters what passes the bus, or sends what is not the group's: see who has access to it",
	"full":       "give this device the peers that the others have",
	"version":    "another node runs a later version of wgroam: upgrade this one",
	"name_clash": "another node goes by this one's name: give each its own (node = ...)",
	"skew":       "keep all nodes on NTP: what claims to be from the future is refused",
	"aged":       "old records; if more and more, set feed.max_age to the same on all nodes",
}

func printConnection(w io.Writer, c control.Connection) {
	state := "connected"
	if !c.Connected {
		state = "not connected"
	}
	fmt.Fprintf(w, "  %s\t%s\n", c.Name, withReason(state, c.Error))
}

// stateLine is the state of a node, with how long it has been silent if it is.
func stateLine(n control.NodeStatus) string {
	if n.State != control.NodeStale {
		return n.State
	}
	return fmt.Sprintf("%s %.1fs", n.State, float64(n.AgeMS)/1000)
}

func withReason(state, reason string) string {
	if reason == "" {
		return state
	}
	return state + ": " + reason
}

func peersVerb(ctx context.Context, e env, args []string) error {
	return ask(ctx, e, "peers", control.VerbPeers, args, func(p control.Peers, w *tabwriter.Writer) error {
		fmt.Fprintln(w, "DEVICE\tPEER\tENDPOINT\tSEEN BY\tAGE\tCAUSE\tAPPLIED")
		for _, p := range p.Peers {
			ep, age, node := orNone(p.Endpoint), "-", "-"
			if p.Endpoint.IsValid() {
				age, node = (time.Duration(p.AgeS) * time.Second).String(), p.Node
			} else if p.Held.IsValid() {
				ep, node = p.Held.String(), "configuration"
			}
			applied := p.Applied
			if p.Error != "" {
				applied += ": " + p.Error
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", where(p.Device, p.Netns), p.Peer, ep, node, age, p.Cause, applied)
		}
		return nil
	})
}

// ask is a verb that gets one document from the daemon: as it is with --json,
// or printed as a table.
func ask[T any](ctx context.Context, e env, name, verb string, args []string, print func(T, *tabwriter.Writer) error) error {
	fs, parse := flags(e, name)
	asJSON := fs.Bool("json", false, "print JSON")
	socket := fs.String("socket", defaultSocket, "control socket of the daemon")
	if err := parse(args); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	var raw json.RawMessage
	if err := control.Get(ctx, *socket, verb, &raw); err != nil {
		return err
	}
	var doc T
	if err := json.Unmarshal(raw, &doc); err != nil {
		return fmt.Errorf("answer of the daemon: %w", err)
	}
	if *asJSON {
		fmt.Fprintf(e.stdout, "%s\n", raw)
		if s, ok := any(doc).(control.Status); ok {
			return unhealthy(s)
		}
		return nil
	}
	w := tabwriter.NewWriter(e.stdout, 0, 0, 2, ' ', 0)
	err := print(doc, w)
	if flushErr := w.Flush(); flushErr != nil {
		return flushErr
	}
	return err
}
